#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| soccr_fuzz::targets::side(input));
