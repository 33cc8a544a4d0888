//! The compressed records: tokenizer and provenance (bincode 2 inside zstd). The only module that knows bincode.

use bincode::{Decode, Encode};

/// What a vocabulary entry is (SentencePiece's piece types).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum PieceKind {
    /// Ordinary text.
    Normal,
    /// The unknown token.
    Unknown,
    /// Never printed, never matched in text: BOS, EOS.
    Control,
    /// Matched whole before BPE.
    UserDefined,
    /// One raw byte, spelled `<0xNN>`.
    Byte,
}

/// One vocabulary entry; its id is its index.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Piece {
    /// Spelling, with U+2581 for a space.
    pub text: String,
    /// What it is.
    pub kind: PieceKind,
}

/// A token matched in the text before BPE (`added_tokens` in tokenizer.json).
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// Its spelling.
    pub content: String,
    /// Left out of decoded text.
    pub special: bool,
    /// Matches only at word boundaries.
    pub single_word: bool,
    /// Takes white space on its left.
    pub lstrip: bool,
    /// Takes white space on its right.
    pub rstrip: bool,
    /// Matched after normalisation.
    pub normalized: bool,
}

/// Where the dummy prefix U+2581 is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum DummyPrefix {
    /// Nowhere.
    Never,
    /// Before every stretch of text between added tokens (the `legacy` Llama behaviour).
    EveryStretch,
    /// Before the first stretch only.
    First,
}

/// A Llama tokenizer: SentencePiece BPE with byte fallback.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Tokenizer {
    /// Vocabulary by id.
    pub pieces: Vec<Piece>,
    /// Merges in rank order, ids of the left and the right piece; the result is their concatenation.
    pub merges: Vec<(u32, u32)>,
    /// Tokens matched before BPE.
    pub added_tokens: Vec<AddedToken>,
    /// Where the dummy prefix goes.
    pub dummy_prefix: DummyPrefix,
    /// Unknown characters become `<0xNN>` pieces.
    pub byte_fallback: bool,
    /// Neighbouring unknown tokens become one.
    pub fuse_unk: bool,
    /// Id of the unknown token.
    pub unk_token_id: Option<u32>,
    /// BOS is put before the text.
    pub add_bos: bool,
    /// EOS is put after the text.
    pub add_eos: bool,
}

/// A file that the conversion read.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SourceFile {
    /// Name inside the model folder.
    pub name: String,
    /// Length.
    pub len_bytes: u64,
    /// BLAKE3 of the whole file, as `b3sum` prints it.
    pub blake3: [u8; 32],
}

/// The text that calibration ran on.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct CalibrationText {
    /// File name, or `built-in`.
    pub name: String,
    /// BLAKE3 of the text.
    pub blake3: [u8; 32],
    /// Tokens used.
    pub n_tokens: u64,
    /// Tokens in one window, BOS included.
    pub window: u32,
}

/// Where a file came from. Nothing in it changes between two runs on the same input.
#[derive(Clone, Debug, PartialEq, Encode, Decode)]
pub struct Provenance {
    /// Name of the source folder.
    pub source_name: String,
    /// Everything that was read from it, sorted by name.
    pub source_files: Vec<SourceFile>,
    /// `prep` and its version.
    pub tool: String,
    /// Options that change the output, name and value, sorted by name.
    pub options: Vec<(String, String)>,
    /// Calibration text, if any.
    pub calibration: Option<CalibrationText>,
}
