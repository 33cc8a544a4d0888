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

impl DType {
    /// Every type, by code.
    pub const ALL: [Self; 7] =
        [Self::U8, Self::U32, Self::F32, Self::F16, Self::Bf16, Self::Q8Block, Self::Q4Block];

    /// Lower-case name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::U32 => "u32",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8Block => "q8_block",
            Self::Q4Block => "q4_block",
        }
    }

    /// Bytes of one element; `None` for the reserved block types, whose elements share a block.
    pub fn element_bytes(self) -> Option<usize> {
        match self {
            Self::U8 => Some(1),
            Self::F16 | Self::Bf16 => Some(2),
            Self::U32 | Self::F32 => Some(4),
            Self::Q8Block | Self::Q4Block => None,
        }
    }

    /// The code in the file.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The type of a code.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.code() == code)
    }
}
