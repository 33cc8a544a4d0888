//! Element types of sections and the bytes they take.

/// Element type of a section. Codes are part of the format and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DType {
    /// Opaque bytes (bincode + zstd blobs, fixed-size records).
    U8 = 1,
    /// 32-bit words, used for sign words and integer limits.
    U32 = 2,
    /// IEEE 754 binary32.
    F32 = 16,
    /// IEEE 754 binary16.
    F16 = 17,
    /// The upper half of a binary32.
    Bf16 = 18,
    /// Block-quantised 8-bit integers: code reserved, layout defined when it is built.
    Q8Block = 32,
    /// Block-quantised 4-bit integers: code reserved, layout defined when it is built.
    Q4Block = 33,
}
