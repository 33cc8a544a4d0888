//! What happens to the elements of a tensor between checkpoint and file.

/// An element that the output cannot hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BadElement {
    /// Its index from the start of what was converted.
    pub index: u64,
    /// Its value in the checkpoint.
    pub value: f32,
}

impl BadElement {
    /// True if the checkpoint's value is a number that is too large for the output type, false for NaN and infinity.
    pub fn is_overflow(&self) -> bool {
        self.value.is_finite()
    }
}
