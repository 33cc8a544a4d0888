//! `cargo +nightly fuzz run read`: any bytes are refused or read, never a panic. The body is in the library, so that
//! ordinary tests replay the corpus.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| format_spec::fuzzing::read(data));
