//! The compressed records: tokenizer and provenance (bincode 2 inside zstd). The only module that knows bincode.

use std::io::Read;

use bincode::{Decode, Encode};

use crate::error::Place;
use crate::{FormatError, ModelConfig};

/// Most bytes that a record may decompress and decode to; a tokenizer of 256,000 pieces takes a quarter of it.
pub(crate) const MAX_RECORD_BYTES: usize = 64 << 20;
/// Largest zstd window, as a power of two; what [`LEVEL`] uses at most.
const MAX_WINDOW_LOG: u32 = 23;
/// Records are written once and read at every start, from disk.
const LEVEL: i32 = 19;

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

/// What a compressed section holds. So that no other module names bincode.
pub(crate) trait Record: Encode + Decode<()> {}

impl Record for Tokenizer {}
impl Record for Provenance {}

impl Tokenizer {
    /// The rules on a tokenizer of a model; `place` is its section.
    pub(crate) fn check(&self, config: &ModelConfig, place: Place) -> Result<(), FormatError> {
        let refuse = |field: String, found: String, expected: String| {
            Err(FormatError::Tokenizer { place, field, found, expected })
        };
        let vocab_size = config.vocab_size;
        let n_pieces = self.pieces.len();
        if n_pieces == 0 || n_pieces as u64 > u64::from(vocab_size) {
            let expected = format!("1 to vocab_size {vocab_size}");
            return refuse("number of pieces".to_owned(), n_pieces.to_string(), expected);
        }
        let not_a_piece = |id: &u32| *id as usize >= n_pieces;
        let a_piece = || format!("the id of one of {n_pieces} pieces");
        for (rank, &(left, right)) in self.merges.iter().enumerate() {
            if let Some(id) = [left, right].into_iter().find(not_a_piece) {
                return refuse(format!("merge {rank}"), id.to_string(), a_piece());
            }
        }
        if let Some(id) = self.unk_token_id.filter(not_a_piece) {
            return refuse("unk_token_id".to_owned(), id.to_string(), a_piece());
        }
        if let Some((n, token)) = self.added_tokens.iter().enumerate().find(|(_, t)| t.id >= vocab_size) {
            let expected = format!("a token id below vocab_size {vocab_size}");
            return refuse(format!("id of added token {n}"), token.id.to_string(), expected);
        }
        let is_odd = |piece: &Piece| piece.kind == PieceKind::Byte && byte_of(&piece.text).is_none();
        if let Some((id, piece)) = self.pieces.iter().enumerate().find(|(_, piece)| is_odd(piece)) {
            let expected = "<0xNN> with upper-case digits".to_owned();
            return refuse(format!("byte piece {id}"), format!("{:?}", piece.text), expected);
        }
        let switches = [
            ("add_bos", self.add_bos, config.bos_token_id),
            ("add_eos", self.add_eos, config.eos_token_ids.first().copied()),
        ];
        if let Some((name, ..)) = switches.iter().find(|(_, is_on, id)| *is_on && id.is_none()) {
            let expected = "false, as the header has no such token".to_owned();
            return refuse((*name).to_owned(), "true".to_owned(), expected);
        }
        Ok(())
    }
}

/// The byte that a piece spelled `<0xNN>` stands for.
pub fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_upper_hex = digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'A'..=b'F'));
    if digits.len() == 2 && is_upper_hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The bytes of a section that holds `record`: equal for equal records and one version of zstd.
pub(crate) fn encode(record: &impl Record, place: Place) -> Result<Vec<u8>, FormatError> {
    let plain = bincode::encode_to_vec(record, bincode::config::standard())
        .map_err(|error| FormatError::Record { place, reason: error.to_string() })?;
    if plain.len() > MAX_RECORD_BYTES {
        return Err(FormatError::RecordTooLarge { place, max_bytes: MAX_RECORD_BYTES });
    }
    zstd::bulk::compress(&plain, LEVEL).map_err(|error| zstd_error(place, &error))
}

/// The record in the section at `place`: one zstd frame with one bincode value, nothing after either.
pub(crate) fn decode<T: Record>(bytes: &[u8], place: Place) -> Result<T, FormatError> {
    let plain = decompress(bytes, place)?;
    let config = bincode::config::standard().with_limit::<MAX_RECORD_BYTES>();
    let (record, n_read) = bincode::decode_from_slice(&plain, config)
        .map_err(|error| FormatError::Record { place, reason: error.to_string() })?;
    if n_read != plain.len() {
        let reason = format!("{} bytes follow the value", plain.len() - n_read);
        return Err(FormatError::Record { place, reason });
    }
    Ok(record)
}

fn decompress(bytes: &[u8], place: Place) -> Result<Vec<u8>, FormatError> {
    let refuse = |error| zstd_error(place, &error);
    let mut decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(refuse)?.single_frame();
    decoder.window_log_max(MAX_WINDOW_LOG).map_err(refuse)?;
    let mut plain = Vec::new();
    decoder.by_ref().take(MAX_RECORD_BYTES as u64 + 1).read_to_end(&mut plain).map_err(refuse)?;
    if plain.len() > MAX_RECORD_BYTES {
        return Err(FormatError::RecordTooLarge { place, max_bytes: MAX_RECORD_BYTES });
    }
    let rest = decoder.finish();
    if rest.is_empty() {
        return Ok(plain);
    }
    Err(FormatError::Zstd { place, reason: format!("{} bytes follow the frame", rest.len()) })
}

fn zstd_error(place: Place, error: &std::io::Error) -> FormatError {
    FormatError::Zstd { place, reason: error.to_string() }
}
