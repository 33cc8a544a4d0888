//! Named fields of fixed-size little-endian blocks: the header, a row of the section table, a predictor record.
//!
//! A block is declared as a chain, each field where the one before ends, so that it has no holes by construction:
//!
//! ```text
//! const KIND: Field<4> = Field::first("kind");
//! const LAYER: Field<4> = KIND.then("layer");      // at byte 4
//! ```
//!
//! Reading and writing go through the same constants, and so do the byte offsets in error messages.

/// `N` bytes of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field<const N: usize> {
    /// Name in FORMAT.md and in messages.
    pub(crate) name: &'static str,
    /// First byte, from the beginning of the block.
    pub(crate) offset: usize,
}

impl<const N: usize> Field<N> {
    pub(crate) const fn first(name: &'static str) -> Self {
        Self { name, offset: 0 }
    }

    pub(crate) const fn then<const M: usize>(self, name: &'static str) -> Field<M> {
        Field { name, offset: self.end() }
    }

    /// First byte after the field.
    pub(crate) const fn end(self) -> usize {
        self.offset + N
    }

    /// The field's bytes in `block`, which is at least as long as the block's length.
    pub(crate) fn get(self, block: &[u8]) -> [u8; N] {
        *block[self.offset..].first_chunk().expect("callers pass whole blocks")
    }

    pub(crate) fn put(self, block: &mut [u8], bytes: [u8; N]) {
        block[self.offset..self.end()].copy_from_slice(&bytes);
    }

    #[cfg(test)]
    pub(crate) fn info(self) -> (&'static str, usize, usize) {
        (self.name, self.offset, N)
    }

    /// Position in the file of the field's first byte that is not zero, for a block at `block_offset_bytes`.
    pub(crate) fn first_nonzero(self, block: &[u8], block_offset_bytes: u64) -> Option<u64> {
        let at = self.get(block).iter().position(|&byte| byte != 0)?;
        Some(block_offset_bytes + (self.offset + at) as u64)
    }
}

impl Field<2> {
    pub(crate) fn u16(self, block: &[u8]) -> u16 {
        u16::from_le_bytes(self.get(block))
    }
}

impl Field<4> {
    pub(crate) fn u32(self, block: &[u8]) -> u32 {
        u32::from_le_bytes(self.get(block))
    }

    pub(crate) fn f32(self, block: &[u8]) -> f32 {
        f32::from_le_bytes(self.get(block))
    }
}

impl Field<8> {
    pub(crate) fn u64(self, block: &[u8]) -> u64 {
        u64::from_le_bytes(self.get(block))
    }

    pub(crate) fn f64(self, block: &[u8]) -> f64 {
        f64::from_le_bytes(self.get(block))
    }
}
