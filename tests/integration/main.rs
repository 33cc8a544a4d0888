//! One binary for all black-box tests: they drive the built `prep` and `runtime` as a user would.

mod cli;
mod convert;
mod failures;
mod golden;
mod python_reader;
