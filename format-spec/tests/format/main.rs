//! Tests of the format through its public face.

mod round_trip;
mod sample;
mod writing;
