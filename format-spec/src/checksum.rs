//! XXH3-64 of header and sections, BLAKE3 of the file. The only module that knows either.

use std::fmt;

use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// XXH3-64 with the default secret and seed 0.
pub(crate) fn xxh3(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// [`xxh3`] of bytes that come in pieces.
#[derive(Clone)]
pub(crate) struct SectionHasher(Xxh3Default);

impl fmt::Debug for SectionHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SectionHasher({:016x})", self.finish())
    }
}

impl SectionHasher {
    pub(crate) fn new() -> Self {
        Self(Xxh3Default::new())
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(&self) -> u64 {
        self.0.digest()
    }
}

/// BLAKE3 of a file in the order in which it is written: everything after the header, then the header up to the
/// digest itself. The state after the weights can be cloned, so that what follows them can be written again.
#[derive(Clone, Debug)]
pub(crate) struct FileHasher(blake3::Hasher);

impl FileHasher {
    pub(crate) fn new() -> Self {
        Self(blake3::Hasher::new())
    }

    /// Takes the next bytes after the header.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Takes the header's digested part and ends.
    pub(crate) fn finish(mut self, digested_header: &[u8]) -> [u8; 32] {
        *self.0.update(digested_header).finalize().as_bytes()
    }
}
