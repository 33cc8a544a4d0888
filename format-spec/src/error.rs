//! One variant per broken rule.

use std::fmt;
use std::path::PathBuf;

use crate::SectionKind;

/// Which row of the section table a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionId {
    /// Index of the row.
    pub index: u32,
    /// Its kind code, known or not.
    pub kind: u32,
    /// Its layer, if it is a section of a layer.
    pub layer: Option<u32>,
}

impl fmt::Display for SectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "section {} (", self.index)?;
        match SectionKind::from_code(self.kind) {
            Some(kind) => f.write_str(kind.name())?,
            None => write!(f, "unknown kind {}", self.kind)?,
        }
        match self.layer {
            Some(layer) => write!(f, ", layer {layer})"),
            None => f.write_str(")"),
        }
    }
}

/// Where in a file a rule is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The section, when it is about one; otherwise the header.
    pub section: Option<SectionId>,
    /// The byte, from the beginning of the file; `None` for a section that is not written yet.
    pub offset_bytes: Option<u64>,
}

impl Place {
    /// The place `n_bytes` further on.
    pub(crate) fn plus(self, n_bytes: usize) -> Self {
        Self { offset_bytes: self.offset_bytes.map(|offset| offset + n_bytes as u64), ..self }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.section {
            Some(section) => write!(f, "{section}")?,
            None => f.write_str("header")?,
        }
        match self.offset_bytes {
            Some(offset_bytes) => write!(f, " at byte {offset_bytes}"),
            None => Ok(()),
        }
    }
}

/// Why a file is refused or cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    // Identification, in the order in which a reader meets the fields.
    /// The first eight bytes are not those of a `.sinf` file.
    #[error("not a .sinf file: it starts with {found:02x?}, expected {:02x?}", crate::header::MAGIC_BYTES)]
    Magic {
        /// The first bytes, at most eight.
        found: Vec<u8>,
    },
    /// The file ends inside the header.
    #[error("the file has {len_bytes} bytes, the header alone takes {}", crate::header::HEADER_LEN)]
    TooShort {
        /// Length of the file.
        len_bytes: u64,
    },
    /// The endianness word reads differently.
    #[error(
        "{place}: endianness is {found:#010x}, expected {:#010x}\nhint: the file was written with the \
             wrong byte order",
        crate::header::ENDIANNESS_WORD
    )]
    Endianness {
        /// Where.
        place: Place,
        /// The word.
        found: u32,
    },
    /// The major version is not this crate's.
    #[error("{place}: format version {}.{}, expected {}.x\nhint: use a program of that version, or convert \
             the model again", found.0, found.1, crate::FORMAT_VERSION.0)]
    Version {
        /// Where.
        place: Place,
        /// Major and minor version of the file.
        found: (u16, u16),
    },
    /// The header states another length than this major version's.
    #[error("{place}: header_len_bytes is {found}, expected {}", crate::header::HEADER_LEN)]
    HeaderLen {
        /// Where.
        place: Place,
        /// The stated length.
        found: u32,
    },
    /// The header is damaged.
    #[error("{place}: header checksum is {found:016x}, the header hashes to {expected:016x}")]
    HeaderChecksum {
        /// Where.
        place: Place,
        /// As stated.
        found: u64,
        /// As computed.
        expected: u64,
    },
    /// The file is truncated or has bytes after its end.
    #[error("{place}: total_len_bytes is {stated}, the file has {found} bytes\nhint: the file is {}",
            if found < stated { "truncated; copy it again" } else { "followed by foreign bytes" })]
    TotalLen {
        /// Where.
        place: Place,
        /// As stated in the header.
        stated: u64,
        /// As found.
        found: u64,
    },

    // Fields of the header, of section rows and of records.
    /// The alignment is not a power of two in its range.
    #[error("{place}: alignment_bytes is {found}, expected a power of two from {} to {}",
            crate::header::ALIGNMENTS.start(), crate::header::ALIGNMENTS.end())]
    Alignment {
        /// Where.
        place: Place,
        /// The value.
        found: u32,
    },
    /// The section table does not end where the file ends.
    #[error(
        "{place}: a table of {n_sections} rows at byte {offset_bytes} does not end with the file at byte \
             {total_len_bytes}"
    )]
    TableBounds {
        /// Where.
        place: Place,
        /// Stated number of rows.
        n_sections: u32,
        /// Stated start.
        offset_bytes: u64,
        /// Length of the file.
        total_len_bytes: u64,
    },
    /// Bytes that a writer must leave zero are not.
    #[error("{place}: a reserved byte is not zero")]
    Reserved {
        /// Where.
        place: Place,
    },
    /// Flag bits without a meaning in this version.
    #[error("{place}: {field} is {found:#x}, expected bits of {known:#x} alone")]
    UnknownFlags {
        /// Where.
        place: Place,
        /// Name of the field.
        field: &'static str,
        /// The value.
        found: u32,
        /// Bits with a meaning.
        known: u32,
    },
    /// A code without a meaning in this version.
    #[error("{place}: {field} is {found}, which no version up to this one defines")]
    UnknownCode {
        /// Where.
        place: Place,
        /// Name of the field.
        field: &'static str,
        /// The code.
        found: u32,
    },
    /// A code set aside for later.
    #[error("{place}: {field} is {found} ({meaning}), reserved, not supported by this version")]
    ReservedCode {
        /// Where.
        place: Place,
        /// Name of the field.
        field: &'static str,
        /// The code.
        found: u32,
        /// What it is set aside for.
        meaning: &'static str,
    },
    /// A field of the header that holds a count or a width is out of its range.
    #[error("{place}: {field} is {found}, expected 1 to {max}")]
    Dimension {
        /// Where.
        place: Place,
        /// Name of the field.
        field: &'static str,
        /// The value.
        found: u64,
        /// Largest accepted value.
        max: u64,
    },
    /// Query heads cannot be shared evenly.
    #[error("{place}: num_key_value_heads is {n_kv}, expected a divisor of num_attention_heads {n_q}")]
    Heads {
        /// Where.
        place: Place,
        /// `num_attention_heads`.
        n_q: u32,
        /// `num_key_value_heads`.
        n_kv: u32,
    },
    /// RoPE turns pairs, so a head has an even width.
    #[error("{place}: head_dim is {found}, expected an even number")]
    HeadDim {
        /// Where.
        place: Place,
        /// The value.
        found: u32,
    },
    /// A constant of the model is not finite or out of its range.
    #[error("{place}: {field} is {found}, expected {expected}")]
    Constant {
        /// Where.
        place: Place,
        /// Name of the field.
        field: &'static str,
        /// The value.
        found: f64,
        /// What is accepted.
        expected: &'static str,
    },
    /// A special token is not in the vocabulary.
    #[error("{place}: {field} is {found}, expected a token id below vocab_size {vocab_size}")]
    TokenId {
        /// Where.
        place: Place,
        /// Name of the field.
        field: &'static str,
        /// The id.
        found: u32,
        /// Size of the vocabulary.
        vocab_size: u32,
    },
    /// More end-of-sequence tokens than the header holds, or one after an unused entry.
    #[error(
        "{place}: end-of-sequence ids are {found:?}, expected at most {} and no gap",
        crate::ModelConfig::MAX_EOS
    )]
    EosIds {
        /// Where.
        place: Place,
        /// The ids.
        found: Vec<u32>,
    },

    // Extents of sections.
    /// A section, or the table, does not start on the file's alignment.
    #[error("{place}: starts at byte {found}, expected a multiple of {alignment_bytes}")]
    Unaligned {
        /// Where.
        place: Place,
        /// The offset.
        found: u64,
        /// The file's alignment.
        alignment_bytes: u32,
    },
    /// A section starts before the one in front of it in the table.
    #[error("{place}: offset_bytes is {found}, not above {previous} of the section before")]
    Unsorted {
        /// Where.
        place: Place,
        /// The offset.
        found: u64,
        /// Offset of the row before.
        previous: u64,
    },
    /// A section starts inside the one before, or inside the header.
    #[error("{place}: offset_bytes is {found}, expected {expected}: it overlaps what lies before")]
    Overlap {
        /// Where.
        place: Place,
        /// The offset.
        found: u64,
        /// The first aligned byte after what lies before.
        expected: u64,
    },
    /// Bytes that belong to no section lie before a section or before the table.
    #[error("{place}: starts at byte {found}, expected {expected}: bytes before it belong to nothing")]
    Hole {
        /// Where.
        place: Place,
        /// Where it starts.
        found: u64,
        /// The first aligned byte after what lies before.
        expected: u64,
    },
    /// A section reaches into the table or beyond the file.
    #[error(
        "{place}: {len_bytes} bytes at byte {offset_bytes} reach past the section table at byte \
             {table_offset_bytes}"
    )]
    SectionBounds {
        /// Where.
        place: Place,
        /// The section's start.
        offset_bytes: u64,
        /// The section's length.
        len_bytes: u64,
        /// Where the table starts.
        table_offset_bytes: u64,
    },
    /// A section has no bytes.
    #[error("{place}: len_bytes is 0")]
    Empty {
        /// Where.
        place: Place,
    },
    /// A byte between sections is not zero.
    #[error("padding before {before} at byte {offset_bytes} is {found:#04x}, expected 0")]
    Padding {
        /// What follows the padding.
        before: String,
        /// The byte.
        offset_bytes: u64,
        /// Its value.
        found: u8,
    },

    // Contents of section rows.
    /// A section that this version does not know must be understood.
    #[error("{place}: required, and not known to this version\nhint: use a newer program")]
    UnknownSection {
        /// Where.
        place: Place,
    },
    /// The required flag is not the one of the section's kind.
    #[error("{place}: the required flag is {found}, expected {}", !found)]
    RequiredFlag {
        /// Where.
        place: Place,
        /// The flag.
        found: bool,
    },
    /// A section of the whole model names a layer, or one of a layer names none or one that is not there.
    #[error("{place}: layer is {}, expected {expected}", layer_text(*found))]
    Layer {
        /// Where.
        place: Place,
        /// The layer; `None` for the whole model.
        found: Option<u32>,
        /// What is accepted.
        expected: String,
    },
    /// The element type is not one of the section kind's.
    #[error("{place}: dtype is {found}, expected {expected}")]
    DType {
        /// Where.
        place: Place,
        /// Name of the type.
        found: &'static str,
        /// Names of the accepted ones.
        expected: String,
    },
    /// The encoding is not the section kind's.
    #[error("{place}: encoding is {found}, expected {expected}")]
    Encoding {
        /// Where.
        place: Place,
        /// Name of the encoding.
        found: &'static str,
        /// Name of the accepted one.
        expected: &'static str,
    },
    /// The number of dimensions is wrong, a dimension is zero, or an unused one is not.
    #[error("{place}: {n_dims} dimensions {dims:?}, expected one to four that are not 0, and 0 in the rest")]
    Dims {
        /// Where.
        place: Place,
        /// Stated number.
        n_dims: u32,
        /// All four stored dimensions.
        dims: [u64; 4],
    },
    /// The shape is not the one that the model's dimensions imply.
    #[error("{place}: shape is {found:?}, expected {expected}")]
    Shape {
        /// Where.
        place: Place,
        /// The dimensions.
        found: Vec<u64>,
        /// The implied ones.
        expected: String,
    },
    /// The length is not that of the elements.
    #[error("{place}: len_bytes is {found}, expected {expected} for {dtype} {dims:?}")]
    SectionSize {
        /// Where.
        place: Place,
        /// The length.
        found: u64,
        /// Bytes of the elements, at most 2^64 - 1.
        expected: u64,
        /// Name of the element type.
        dtype: &'static str,
        /// The dimensions.
        dims: Vec<u64>,
    },
    /// A kind occurs twice for one layer.
    #[error("{place}: the same kind and layer as section {first}")]
    Duplicate {
        /// Where.
        place: Place,
        /// Index of the other row.
        first: u32,
    },
    /// A section that the model needs is not there.
    #[error("{} is missing{}", kind.name(), layer.map(|layer| format!(" for layer {layer}")).unwrap_or_default())]
    MissingSection {
        /// Its kind.
        kind: SectionKind,
        /// Its layer.
        layer: Option<u32>,
    },
    /// A section that contradicts the header: lm_head of a model with tied embeddings.
    #[error("{place}: not expected, as {reason}")]
    UnexpectedSection {
        /// Where.
        place: Place,
        /// The contradiction.
        reason: &'static str,
    },

    // Contents of sections.
    /// A bit of the last sign word of a row that stands for no column is set.
    #[error("{place}: row {row} sets bits {found:#010x} past column {n_cols}, expected 0")]
    SignTail {
        /// Where.
        place: Place,
        /// The row of W_gate.
        row: u64,
        /// The stray bits.
        found: u32,
        /// hidden_size.
        n_cols: u32,
    },
    /// Sign words are not the signs of W_gate. Found by [`crate::Layout::verify`] alone.
    #[error("{place}: the sign words of row {row} are not the signs of w_gate")]
    Signs {
        /// Where.
        place: Place,
        /// The first wrong row.
        row: u64,
    },
    /// A value of a predictor record is out of its range.
    #[error("{place}: predictor of layer {layer}: {field} is {found}, expected {expected}")]
    Predictor {
        /// Where.
        place: Place,
        /// The layer.
        layer: u32,
        /// Name of the field.
        field: &'static str,
        /// The value.
        found: f64,
        /// What is accepted.
        expected: String,
    },
    /// A model whose activation has no zeros names a predictor.
    #[error("{place}: layer {layer} has predictor {found}, expected off as the activation is silu")]
    PredictorNotSparse {
        /// Where.
        place: Place,
        /// The layer.
        layer: u32,
        /// Name of the predictor.
        found: &'static str,
    },
    /// A limit per row is larger than there are columns.
    #[error("{place}: the limit of row {row} is {found}, expected at most {max}")]
    GateLimit {
        /// Where.
        place: Place,
        /// The row of W_gate.
        row: u64,
        /// The limit.
        found: u32,
        /// hidden_size.
        max: u32,
    },
    /// An offset per row is not finite.
    #[error("{place}: the value of row {row} is {found}, expected a finite number")]
    GateOffset {
        /// Where.
        place: Place,
        /// The row of W_gate.
        row: u64,
        /// The offset.
        found: f32,
    },
    /// A layer has other bit planes than its predictor reads.
    #[error("gate_planes of layer {layer}: {found} planes, expected {expected} for predictor {kind}")]
    GatePlanes {
        /// The layer.
        layer: u32,
        /// Planes that are there.
        found: u64,
        /// Planes that the predictor reads below the signs.
        expected: u64,
        /// Name of the predictor.
        kind: &'static str,
    },
    /// A layer has a part of a predictor of low rank that its own does not read.
    #[error("{} of layer {layer}: expected no such section for predictor {kind}", section.name())]
    GateFactors {
        /// The layer.
        layer: u32,
        /// The part.
        section: SectionKind,
        /// Name of the predictor.
        kind: &'static str,
    },
    /// The factors of a layer do not fit each other.
    #[error("gate_fc2 of layer {layer}: {found} columns, expected {expected}, the rows of gate_fc1")]
    GateRank {
        /// The layer.
        layer: u32,
        /// Columns of the second factor.
        found: u64,
        /// Rows of the first.
        expected: u64,
    },
    /// A value of the budget curve is out of its range.
    #[error("{place}: budget curve, point {point}: {field} is {found}, expected {expected}")]
    Budget {
        /// Where.
        place: Place,
        /// Index of the point.
        point: u64,
        /// `kl`, `bytes` or `limit of layer N`.
        field: String,
        /// The value.
        found: f32,
        /// What is accepted.
        expected: &'static str,
    },
    /// A value of a calibration curve is out of its range or its limits are not in order.
    #[error("{place}: curve of layer {layer}, point {point}: {field} is {found}, expected {expected}")]
    Curve {
        /// Where.
        place: Place,
        /// The layer.
        layer: u32,
        /// Index of the point.
        point: u64,
        /// Name of the value.
        field: &'static str,
        /// The value.
        found: f32,
        /// What is accepted.
        expected: &'static str,
    },
    /// A compressed record is no single zstd frame.
    #[error("{place}: not one zstd frame: {reason}")]
    Zstd {
        /// Where.
        place: Place,
        /// What the decoder says.
        reason: String,
    },
    /// A compressed record is larger than any real one.
    #[error("{place}: decompresses to more than {max_bytes} bytes")]
    RecordTooLarge {
        /// Where.
        place: Place,
        /// The bound.
        max_bytes: usize,
    },
    /// A decompressed record does not decode.
    #[error("{place}: not a record of this kind: {reason}")]
    Record {
        /// Where.
        place: Place,
        /// What the decoder says.
        reason: String,
    },
    /// A tokenizer contradicts itself or the vocabulary.
    #[error("{place}: {field} is {found}, expected {expected}")]
    Tokenizer {
        /// Where.
        place: Place,
        /// Which part.
        field: String,
        /// The value.
        found: String,
        /// What is accepted.
        expected: String,
    },

    // Checksums, looked at by `verify`.
    /// A section's bytes are damaged.
    #[error(
        "{place}: XXH3 is {found:016x}, expected {expected:016x}\nhint: the file is damaged; copy it again"
    )]
    SectionChecksum {
        /// Where.
        place: Place,
        /// As computed.
        found: u64,
        /// As stated in the table.
        expected: u64,
    },
    /// The file is damaged.
    #[error(
        "BLAKE3 of the file is {}, expected {}\nhint: the file is damaged; copy it again",
        hex(found),
        hex(expected)
    )]
    Digest {
        /// As computed.
        found: [u8; 32],
        /// As stated in the header.
        expected: [u8; 32],
    },

    // Writing.
    /// The output exists and may not be replaced.
    #[error("{} exists\nhint: --force replaces it", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// Another process is writing the same output.
    #[error("{} is being written by another process", path.display())]
    Busy {
        /// The unfinished file.
        path: PathBuf,
    },
    /// The parts of a file come in the wrong order or number.
    #[error("{what}: {found}, expected {expected}")]
    WriteOrder {
        /// What was attempted.
        what: &'static str,
        /// What happened.
        found: String,
        /// What the writer needs.
        expected: String,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

fn layer_text(layer: Option<u32>) -> String {
    layer.map_or_else(|| "none".to_owned(), |layer| layer.to_string())
}

fn hex(bytes: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*bytes).to_string()
}
