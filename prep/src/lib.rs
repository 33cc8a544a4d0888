//! Offline converter: a ReLU-sparse Hugging Face checkpoint becomes one `.sinf` file.
#![forbid(unsafe_code)]

pub mod calibrate;
pub mod synth;
