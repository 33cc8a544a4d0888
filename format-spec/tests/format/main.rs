//! Tests of the format through its public face.

mod corpus;
mod damage;
mod golden;
mod hostile;
mod patch;
mod random;
mod round_trip;
mod sample;
mod writing;
