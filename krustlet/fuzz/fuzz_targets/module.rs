//! Modules, as anyone with a trusted key may sign them: compile, load, link.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krustlet_runtime::fuzzing::module(data));
