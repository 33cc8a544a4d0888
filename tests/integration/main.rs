//! One binary for all black-box tests: they drive the built `prep` and `runtime` as a user would.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "figures and skipped checks are for the reader of the log"
)]

mod audit;
mod cli;
mod convert;
mod failures;
mod golden;
mod predictors;
mod python_reader;
mod report;
