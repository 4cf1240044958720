//! Signature manifests, payloads and signatures, as a registry may send them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krustlet_runtime::fuzzing::signature(data));
