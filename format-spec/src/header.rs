//! The fixed first block of a file: identification, extents, model dimensions, digests.

use std::ops::RangeInclusive;

use crate::checksum::xxh3;
use crate::error::Place;
use crate::field::Field;
use crate::{FORMAT_VERSION, FormatError};

/// Length of the header.
pub(crate) const HEADER_LEN: usize = 256;
/// A byte that is no ASCII, the name, and line ends that a transfer as text would change.
pub(crate) const MAGIC_BYTES: [u8; 8] = *b"\x89SINF\r\n\x1a";
/// Reads as this only in the right byte order.
pub(crate) const ENDIANNESS_WORD: u32 = 0x0102_0304;
/// Accepted alignments, powers of two alone.
pub(crate) const ALIGNMENTS: RangeInclusive<u32> = 64..=65536;
/// Largest dimension, so that counts of rows and columns are exact in f32 and products of two fit in u64 with room.
pub(crate) const MAX_DIMENSION: u32 = 1 << 24;
/// Stands for an absent token id and for the layer of a section that has none.
pub(crate) const NONE: u32 = u32::MAX;

const TIE_WORD_EMBEDDINGS: u32 = 1;

const MAGIC: Field<8> = Field::first("magic");
const MAJOR: Field<2> = MAGIC.then("version_major");
const MINOR: Field<2> = MAJOR.then("version_minor");
const ENDIANNESS: Field<4> = MINOR.then("endianness");
const HEADER_LEN_BYTES: Field<4> = ENDIANNESS.then("header_len_bytes");
const ALIGNMENT_BYTES: Field<4> = HEADER_LEN_BYTES.then("alignment_bytes");
const TOTAL_LEN_BYTES: Field<8> = ALIGNMENT_BYTES.then("total_len_bytes");
const TABLE_OFFSET_BYTES: Field<8> = TOTAL_LEN_BYTES.then("table_offset_bytes");
const N_SECTIONS: Field<4> = TABLE_OFFSET_BYTES.then("n_sections");
const FLAGS: Field<4> = N_SECTIONS.then("flags");
const HIDDEN_SIZE: Field<4> = FLAGS.then("hidden_size");
const INTERMEDIATE_SIZE: Field<4> = HIDDEN_SIZE.then("intermediate_size");
const NUM_HIDDEN_LAYERS: Field<4> = INTERMEDIATE_SIZE.then("num_hidden_layers");
const NUM_ATTENTION_HEADS: Field<4> = NUM_HIDDEN_LAYERS.then("num_attention_heads");
const NUM_KEY_VALUE_HEADS: Field<4> = NUM_ATTENTION_HEADS.then("num_key_value_heads");
const HEAD_DIM: Field<4> = NUM_KEY_VALUE_HEADS.then("head_dim");
const VOCAB_SIZE: Field<4> = HEAD_DIM.then("vocab_size");
const MAX_POSITION_EMBEDDINGS: Field<4> = VOCAB_SIZE.then("max_position_embeddings");
const ROPE_THETA: Field<8> = MAX_POSITION_EMBEDDINGS.then("rope_theta");
const ROPE_SCALING_FACTOR: Field<8> = ROPE_THETA.then("rope_scaling_factor");
const ROPE_SCALING: Field<4> = ROPE_SCALING_FACTOR.then("rope_scaling");
const RMS_NORM_EPS: Field<4> = ROPE_SCALING.then("rms_norm_eps");
const ACTIVATION: Field<4> = RMS_NORM_EPS.then("activation");
const ACTIVATION_THRESHOLD: Field<4> = ACTIVATION.then("activation_threshold");
const BOS_TOKEN_ID: Field<4> = ACTIVATION_THRESHOLD.then("bos_token_id");
const EOS_TOKEN_IDS: Field<16> = BOS_TOKEN_ID.then("eos_token_ids");
const RESERVED: Field<84> = EOS_TOKEN_IDS.then("reserved");
const DIGEST: Field<32> = RESERVED.then("digest");
const HEADER_CHECKSUM: Field<8> = DIGEST.then("header_checksum");
const _: () = assert!(HEADER_CHECKSUM.end() == HEADER_LEN);

/// Where the digest's field starts: the digest covers the header up to here, the checksum the digest too.
pub(crate) const DIGESTED_HEADER_LEN: usize = DIGEST.offset;

/// What stands between the gate projection and the product with the up projection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `max(v, 0)`.
    Relu,
    /// `v if v >= threshold else 0` (ProSparse, arXiv 2402.13516).
    FatRelu {
        /// Smallest value that passes; finite and not negative.
        threshold: f32,
    },
    /// `v * sigmoid(v)`: not sparse, so only the `Off` predictor goes with it.
    Silu,
}

impl Activation {
    /// Lower-case name, as in config.json.
    pub fn name(self) -> &'static str {
        match self {
            Self::Relu => "relu",
            Self::FatRelu { .. } => "fatrelu",
            Self::Silu => "silu",
        }
    }
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies, `rope_theta` in config.json.
    pub theta: f64,
    /// How positions or frequencies are stretched.
    pub scaling: RopeScaling,
}

/// Accepted `rope_scaling` types.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Positions as they are.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// Finite and at least 1.
        factor: f64,
    },
}

/// Dimensions and constants of the model, in the words of config.json.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Rows of W_gate and W_up, neurons of the MLP.
    pub intermediate_size: u32,
    /// Number of decoder layers.
    pub num_hidden_layers: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key/value heads; divides `num_attention_heads`.
    pub num_key_value_heads: u32,
    /// Width of one head; even.
    pub head_dim: u32,
    /// Rows of the embedding and of lm_head.
    pub vocab_size: u32,
    /// Largest context the model was made for.
    pub max_position_embeddings: u32,
    /// Epsilon inside the RMSNorm root.
    pub rms_norm_eps: f32,
    /// MLP activation.
    pub activation: Activation,
    /// Rotary position embedding.
    pub rope: Rope,
    /// True when lm_head is the embedding; the file then has no `LmHead` section.
    pub tie_word_embeddings: bool,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens, at most [`ModelConfig::MAX_EOS`].
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Most end-of-sequence ids that the header holds.
    pub const MAX_EOS: usize = 4;

    /// Width of a token's queries: `num_attention_heads * head_dim`.
    pub fn q_size(&self) -> u64 {
        u64::from(self.num_attention_heads) * u64::from(self.head_dim)
    }

    /// Width of a token's keys, and of its values: `num_key_value_heads * head_dim`.
    pub fn kv_size(&self) -> u64 {
        u64::from(self.num_key_value_heads) * u64::from(self.head_dim)
    }

    /// The rules on dimensions, constants and token ids.
    pub(crate) fn check(&self) -> Result<(), FormatError> {
        let max = u64::from(MAX_DIMENSION);
        let dimensions = [
            (HIDDEN_SIZE, u64::from(self.hidden_size)),
            (INTERMEDIATE_SIZE, u64::from(self.intermediate_size)),
            (NUM_HIDDEN_LAYERS, u64::from(self.num_hidden_layers)),
            (NUM_ATTENTION_HEADS, u64::from(self.num_attention_heads)),
            (NUM_KEY_VALUE_HEADS, u64::from(self.num_key_value_heads)),
            (HEAD_DIM, u64::from(self.head_dim)),
            (Field { name: "num_attention_heads * head_dim", ..NUM_ATTENTION_HEADS }, self.q_size()),
            (VOCAB_SIZE, u64::from(self.vocab_size)),
            (MAX_POSITION_EMBEDDINGS, u64::from(self.max_position_embeddings)),
        ];
        if let Some(&(field, found)) = dimensions.iter().find(|(_, found)| !(1..=max).contains(found)) {
            return Err(FormatError::Dimension { place: place(field), field: field.name, found, max });
        }
        let (n_q, n_kv) = (self.num_attention_heads, self.num_key_value_heads);
        if !n_q.is_multiple_of(n_kv) {
            return Err(FormatError::Heads { place: place(NUM_KEY_VALUE_HEADS), n_q, n_kv });
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(FormatError::HeadDim { place: place(HEAD_DIM), found: self.head_dim });
        }
        self.check_constants()?;
        self.check_tokens()
    }

    fn check_constants(&self) -> Result<(), FormatError> {
        let refuse =
            |place, field, found, expected| Err(FormatError::Constant { place, field, found, expected });
        let eps = self.rms_norm_eps;
        if !(eps.is_finite() && eps > 0.0) {
            return refuse(place(RMS_NORM_EPS), RMS_NORM_EPS.name, f64::from(eps), "finite and above 0");
        }
        let theta = self.rope.theta;
        if !(theta.is_finite() && theta > 0.0) {
            return refuse(place(ROPE_THETA), ROPE_THETA.name, theta, "finite and above 0");
        }
        if let RopeScaling::Linear { factor } = self.rope.scaling
            && !(factor.is_finite() && factor >= 1.0)
        {
            let field = ROPE_SCALING_FACTOR;
            return refuse(place(field), field.name, factor, "finite and at least 1");
        }
        if let Activation::FatRelu { threshold } = self.activation
            && !(threshold.is_finite() && threshold >= 0.0)
        {
            let field = ACTIVATION_THRESHOLD;
            return refuse(place(field), field.name, f64::from(threshold), "finite and not negative");
        }
        Ok(())
    }

    fn check_tokens(&self) -> Result<(), FormatError> {
        if self.eos_token_ids.len() > Self::MAX_EOS {
            let found = self.eos_token_ids.clone();
            return Err(FormatError::EosIds { place: place(EOS_TOKEN_IDS), found });
        }
        let outside = |id: &&u32| **id >= self.vocab_size;
        let refuse = |place, field, found| {
            Err(FormatError::TokenId { place, field, found, vocab_size: self.vocab_size })
        };
        if let Some(&id) = self.bos_token_id.iter().find(outside) {
            return refuse(place(BOS_TOKEN_ID), BOS_TOKEN_ID.name, id);
        }
        if let Some(&id) = self.eos_token_ids.iter().find(outside) {
            return refuse(place(EOS_TOKEN_IDS), EOS_TOKEN_IDS.name, id);
        }
        Ok(())
    }
}

/// The header's contents.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Header {
    pub(crate) version: (u16, u16),
    pub(crate) alignment_bytes: u32,
    pub(crate) total_len_bytes: u64,
    pub(crate) table_offset_bytes: u64,
    pub(crate) n_sections: u32,
    pub(crate) config: ModelConfig,
    pub(crate) digest: [u8; 32],
}

impl Header {
    /// Reads and checks the header of `file`, the whole file's bytes; what it says about extents is checked only
    /// against the file's length and by [`crate::table`].
    pub(crate) fn parse(file: &[u8]) -> Result<Self, FormatError> {
        let start = &file[..file.len().min(MAGIC_BYTES.len())];
        if start != MAGIC_BYTES {
            return Err(FormatError::Magic { found: start.to_vec() });
        }
        let len_bytes = file.len() as u64;
        let Some(header) = file.first_chunk::<HEADER_LEN>() else {
            return Err(FormatError::TooShort { len_bytes });
        };
        check_identity(header)?;
        let stated = TOTAL_LEN_BYTES.u64(header);
        if stated != len_bytes {
            return Err(FormatError::TotalLen { place: place(TOTAL_LEN_BYTES), stated, found: len_bytes });
        }
        let alignment_bytes = ALIGNMENT_BYTES.u32(header);
        check_alignment(alignment_bytes)?;
        let config = parse_config(header)?;
        config.check()?;
        if let Some(offset_bytes) = RESERVED.first_nonzero(header, 0) {
            return Err(FormatError::Reserved { place: place_at(offset_bytes) });
        }
        Ok(Self {
            version: (MAJOR.u16(header), MINOR.u16(header)),
            alignment_bytes,
            total_len_bytes: stated,
            table_offset_bytes: TABLE_OFFSET_BYTES.u64(header),
            n_sections: N_SECTIONS.u32(header),
            config,
            digest: DIGEST.get(header),
        })
    }

    /// The header's bytes. The digest covers the part up to [`DIGESTED_HEADER_LEN`], so `digest` gets that part.
    pub(crate) fn encode(&self, digest: impl FnOnce(&[u8]) -> [u8; 32]) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        let block = &mut header[..];
        MAGIC.put(block, MAGIC_BYTES);
        MAJOR.put(block, self.version.0.to_le_bytes());
        MINOR.put(block, self.version.1.to_le_bytes());
        ENDIANNESS.put(block, ENDIANNESS_WORD.to_le_bytes());
        HEADER_LEN_BYTES.put(block, (HEADER_LEN as u32).to_le_bytes());
        ALIGNMENT_BYTES.put(block, self.alignment_bytes.to_le_bytes());
        TOTAL_LEN_BYTES.put(block, self.total_len_bytes.to_le_bytes());
        TABLE_OFFSET_BYTES.put(block, self.table_offset_bytes.to_le_bytes());
        N_SECTIONS.put(block, self.n_sections.to_le_bytes());
        encode_config(&self.config, block);
        let digest = digest(&header[..DIGESTED_HEADER_LEN]);
        DIGEST.put(&mut header, digest);
        let checksum = xxh3(&header[..HEADER_CHECKSUM.offset]);
        HEADER_CHECKSUM.put(&mut header, checksum.to_le_bytes());
        header
    }
}

/// Where the header states the extent of the section table.
pub(crate) fn table_place() -> Place {
    place(TABLE_OFFSET_BYTES)
}

/// Name, offset and length of every field, for the test that compares them with FORMAT.md.
#[cfg(test)]
pub(crate) fn fields() -> Vec<(&'static str, usize, usize)> {
    vec![
        MAGIC.info(),
        MAJOR.info(),
        MINOR.info(),
        ENDIANNESS.info(),
        HEADER_LEN_BYTES.info(),
        ALIGNMENT_BYTES.info(),
        TOTAL_LEN_BYTES.info(),
        TABLE_OFFSET_BYTES.info(),
        N_SECTIONS.info(),
        FLAGS.info(),
        HIDDEN_SIZE.info(),
        INTERMEDIATE_SIZE.info(),
        NUM_HIDDEN_LAYERS.info(),
        NUM_ATTENTION_HEADS.info(),
        NUM_KEY_VALUE_HEADS.info(),
        HEAD_DIM.info(),
        VOCAB_SIZE.info(),
        MAX_POSITION_EMBEDDINGS.info(),
        ROPE_THETA.info(),
        ROPE_SCALING_FACTOR.info(),
        ROPE_SCALING.info(),
        RMS_NORM_EPS.info(),
        ACTIVATION.info(),
        ACTIVATION_THRESHOLD.info(),
        BOS_TOKEN_ID.info(),
        EOS_TOKEN_IDS.info(),
        RESERVED.info(),
        DIGEST.info(),
        HEADER_CHECKSUM.info(),
    ]
}

/// Makes length and checksum of a file's header right; `None` if there is no whole header.
pub(crate) fn repair(file: &mut [u8]) -> Option<()> {
    let len_bytes = file.len() as u64;
    let header = file.first_chunk_mut::<HEADER_LEN>()?;
    TOTAL_LEN_BYTES.put(header, len_bytes.to_le_bytes());
    let checksum = xxh3(&header[..HEADER_CHECKSUM.offset]);
    HEADER_CHECKSUM.put(header, checksum.to_le_bytes());
    Some(())
}

/// The alignment is a power of two in its range.
pub(crate) fn check_alignment(alignment_bytes: u32) -> Result<(), FormatError> {
    if alignment_bytes.is_power_of_two() && ALIGNMENTS.contains(&alignment_bytes) {
        return Ok(());
    }
    Err(FormatError::Alignment { place: place(ALIGNMENT_BYTES), found: alignment_bytes })
}

/// What must hold before any other field means anything.
fn check_identity(header: &[u8; HEADER_LEN]) -> Result<(), FormatError> {
    let found = ENDIANNESS.u32(header);
    if found != ENDIANNESS_WORD {
        return Err(FormatError::Endianness { place: place(ENDIANNESS), found });
    }
    let found = (MAJOR.u16(header), MINOR.u16(header));
    if found.0 != FORMAT_VERSION.0 {
        return Err(FormatError::Version { place: place(MAJOR), found });
    }
    let found = HEADER_LEN_BYTES.u32(header);
    if found as usize != HEADER_LEN {
        return Err(FormatError::HeaderLen { place: place(HEADER_LEN_BYTES), found });
    }
    let (found, expected) = (HEADER_CHECKSUM.u64(header), xxh3(&header[..HEADER_CHECKSUM.offset]));
    if found != expected {
        return Err(FormatError::HeaderChecksum { place: place(HEADER_CHECKSUM), found, expected });
    }
    Ok(())
}

fn parse_config(header: &[u8]) -> Result<ModelConfig, FormatError> {
    let flags = FLAGS.u32(header);
    if flags & !TIE_WORD_EMBEDDINGS != 0 {
        let (place, field) = (place(FLAGS), FLAGS.name);
        return Err(FormatError::UnknownFlags { place, field, found: flags, known: TIE_WORD_EMBEDDINGS });
    }
    let bos = BOS_TOKEN_ID.u32(header);
    Ok(ModelConfig {
        hidden_size: HIDDEN_SIZE.u32(header),
        intermediate_size: INTERMEDIATE_SIZE.u32(header),
        num_hidden_layers: NUM_HIDDEN_LAYERS.u32(header),
        num_attention_heads: NUM_ATTENTION_HEADS.u32(header),
        num_key_value_heads: NUM_KEY_VALUE_HEADS.u32(header),
        head_dim: HEAD_DIM.u32(header),
        vocab_size: VOCAB_SIZE.u32(header),
        max_position_embeddings: MAX_POSITION_EMBEDDINGS.u32(header),
        rms_norm_eps: RMS_NORM_EPS.f32(header),
        activation: parse_activation(header)?,
        rope: parse_rope(header)?,
        tie_word_embeddings: flags & TIE_WORD_EMBEDDINGS != 0,
        bos_token_id: (bos != NONE).then_some(bos),
        eos_token_ids: parse_eos(header)?,
    })
}

fn parse_activation(header: &[u8]) -> Result<Activation, FormatError> {
    let threshold = ACTIVATION_THRESHOLD.f32(header);
    let activation = match ACTIVATION.u32(header) {
        1 => Activation::Relu,
        2 => return Ok(Activation::FatRelu { threshold }),
        3 => Activation::Silu,
        4 => return Err(reserved(ACTIVATION, 4, "relu squared")),
        5 => return Err(reserved(ACTIVATION, 5, "dReLU")),
        6 => return Err(reserved(ACTIVATION, 6, "gelu")),
        found => return Err(unknown(ACTIVATION, found)),
    };
    unused(ACTIVATION_THRESHOLD, header)?;
    Ok(activation)
}

fn parse_rope(header: &[u8]) -> Result<Rope, FormatError> {
    let theta = ROPE_THETA.f64(header);
    let scaling = match ROPE_SCALING.u32(header) {
        0 => {
            unused(ROPE_SCALING_FACTOR, header)?;
            RopeScaling::None
        }
        1 => RopeScaling::Linear { factor: ROPE_SCALING_FACTOR.f64(header) },
        2 => return Err(reserved(ROPE_SCALING, 2, "dynamic")),
        3 => return Err(reserved(ROPE_SCALING, 3, "yarn")),
        4 => return Err(reserved(ROPE_SCALING, 4, "llama3")),
        found => return Err(unknown(ROPE_SCALING, found)),
    };
    Ok(Rope { theta, scaling })
}

/// Ids first, then [`NONE`] in the entries that are not used.
fn parse_eos(header: &[u8]) -> Result<Vec<u32>, FormatError> {
    let bytes = EOS_TOKEN_IDS.get(header);
    let entries: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|&id| u32::from_le_bytes(id)).collect();
    let n_used = entries.iter().position(|&id| id == NONE).unwrap_or(entries.len());
    if entries[n_used..].iter().any(|&id| id != NONE) {
        return Err(FormatError::EosIds { place: place(EOS_TOKEN_IDS), found: entries });
    }
    Ok(entries[..n_used].to_vec())
}

/// `config` obeys [`ModelConfig::check`].
fn encode_config(config: &ModelConfig, block: &mut [u8]) {
    let flags = if config.tie_word_embeddings { TIE_WORD_EMBEDDINGS } else { 0 };
    let (activation, threshold) = match config.activation {
        Activation::Relu => (1_u32, 0.0),
        Activation::FatRelu { threshold } => (2, threshold),
        Activation::Silu => (3, 0.0),
    };
    let (scaling, factor) = match config.rope.scaling {
        RopeScaling::None => (0_u32, 0.0),
        RopeScaling::Linear { factor } => (1, factor),
    };
    FLAGS.put(block, flags.to_le_bytes());
    HIDDEN_SIZE.put(block, config.hidden_size.to_le_bytes());
    INTERMEDIATE_SIZE.put(block, config.intermediate_size.to_le_bytes());
    NUM_HIDDEN_LAYERS.put(block, config.num_hidden_layers.to_le_bytes());
    NUM_ATTENTION_HEADS.put(block, config.num_attention_heads.to_le_bytes());
    NUM_KEY_VALUE_HEADS.put(block, config.num_key_value_heads.to_le_bytes());
    HEAD_DIM.put(block, config.head_dim.to_le_bytes());
    VOCAB_SIZE.put(block, config.vocab_size.to_le_bytes());
    MAX_POSITION_EMBEDDINGS.put(block, config.max_position_embeddings.to_le_bytes());
    ROPE_THETA.put(block, config.rope.theta.to_le_bytes());
    ROPE_SCALING_FACTOR.put(block, f64::to_le_bytes(factor));
    ROPE_SCALING.put(block, scaling.to_le_bytes());
    RMS_NORM_EPS.put(block, config.rms_norm_eps.to_le_bytes());
    ACTIVATION.put(block, activation.to_le_bytes());
    ACTIVATION_THRESHOLD.put(block, f32::to_le_bytes(threshold));
    BOS_TOKEN_ID.put(block, config.bos_token_id.unwrap_or(NONE).to_le_bytes());
    let mut eos = [0xFF; 16];
    for (entry, id) in eos.as_chunks_mut::<4>().0.iter_mut().zip(&config.eos_token_ids) {
        *entry = id.to_le_bytes();
    }
    EOS_TOKEN_IDS.put(block, eos);
}

/// A field that the chosen code gives no meaning is zero.
fn unused<const N: usize>(field: Field<N>, header: &[u8]) -> Result<(), FormatError> {
    match field.first_nonzero(header, 0) {
        Some(offset_bytes) => Err(FormatError::Reserved { place: place_at(offset_bytes) }),
        None => Ok(()),
    }
}

fn reserved<const N: usize>(field: Field<N>, found: u32, meaning: &'static str) -> FormatError {
    FormatError::ReservedCode { place: place(field), field: field.name, found, meaning }
}

fn unknown<const N: usize>(field: Field<N>, found: u32) -> FormatError {
    FormatError::UnknownCode { place: place(field), field: field.name, found }
}

fn place<const N: usize>(field: Field<N>) -> Place {
    place_at(field.offset as u64)
}

fn place_at(offset_bytes: u64) -> Place {
    Place { section: None, offset_bytes: Some(offset_bytes) }
}
