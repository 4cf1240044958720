//! Docker config documents, image names and challenges, as a pod and a registry may send them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| krustlet_runtime::fuzzing::credentials(data));
