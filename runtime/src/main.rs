//! Binary `runtime`.
fn main() {}
