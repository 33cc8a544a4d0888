//! Binary `prep`.
fn main() {}
