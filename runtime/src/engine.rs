//! What a backend does for a session: the model's layers over a cache that it owns.
//!
//! One implementation per kind of device. A session checks tokens and positions before it calls an engine, so that an
//! engine is about mathematics only.

use crate::sampler::{SampleError, SamplerOptions};
use crate::session::{MlpObserver, Usage};
use crate::{MlpMode, RuntimeError};

/// Which rows the MLP of each layer reads while decoding.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RowChoice {
    /// Every row of every matrix.
    All,
    /// Every gate row, up and down rows where the activation is not zero.
    Active,
    /// Gate rows whose n_neg is at most the layer's limit.
    Limit(u32),
    /// Gate rows whose n_neg is at most the row's limit, `(intermediate_size,)`.
    RowLimits(Vec<u32>),
}

/// Which logits of a batch are wanted.
pub(crate) enum BatchLogits<'a> {
    /// None.
    None,
    /// Those of the last token, kept where [`Engine::logits`] finds them.
    Last,
    /// All of them, `(n_tokens, vocab_size)`.
    All(&'a mut [f32]),
}

/// A batch of consecutive tokens.
pub(crate) struct Batch<'a> {
    /// At most the session's `n_batch_max`, all inside the vocabulary.
    pub(crate) tokens: &'a [u32],
    /// Position of the first.
    pub(crate) first_position: usize,
    /// Leave out the MLP rows that decode would leave out.
    pub(crate) masked: bool,
    pub(crate) logits: BatchLogits<'a>,
}

/// The layers of a model on one device.
pub(crate) trait Engine: std::fmt::Debug {
    /// For people: `cpu (avx512, 2 threads)`.
    fn describe(&self) -> String;

    /// Tokens of a batch that prompts go through best in; at most the session's `n_batch_max`.
    fn n_batch(&self) -> usize;

    /// Rows that decoding and masked batches read from now on, one choice per layer.
    fn set_rows(&mut self, rows: Vec<RowChoice>);

    /// Appends one token at `position`; adds what was read to `usage`.
    fn decode(&mut self, token: u32, position: usize, usage: &mut Usage) -> Result<(), RuntimeError>;

    /// Has [`Engine::decode_and_choose`] draw from now on as a [`crate::sampler::Sampler`] with these options and tokens
    /// never chosen does, or not draw where the engine cannot do so.
    fn set_sampler(&mut self, _options: &SamplerOptions, _excluded: &[u32]) -> Result<(), RuntimeError> {
        Ok(())
    }

    /// As [`Engine::decode`], and draws the next token where the logits are; `None`, without any of it, from an engine
    /// that does not draw.
    fn decode_and_choose(
        &mut self,
        _token: u32,
        _position: usize,
        _usage: &mut Usage,
    ) -> Result<Option<Result<u32, SampleError>>, RuntimeError> {
        Ok(None)
    }

    /// Appends a batch, computing every row.
    fn forward_batch(
        &mut self,
        batch: Batch<'_>,
        observer: Option<&mut dyn MlpObserver>,
    ) -> Result<(), RuntimeError>;

    /// Logits after the last decoded token or [`BatchLogits::Last`], `(vocab_size,)`.
    fn logits(&self) -> &[f32];

    /// Plain read bandwidth over memory of the device that nothing else uses, in GB/s (10^9).
    fn measure_read_gb_per_s(&self) -> f64;
}

impl RowChoice {
    /// The choice of `mode` where the file's predictor would keep `stored` rows (`None`: it predicts nothing).
    pub(crate) fn new(mode: MlpMode, stored: Option<Self>) -> Self {
        match mode {
            MlpMode::Dense => Self::All,
            MlpMode::Exact => Self::Active,
            MlpMode::Stored => stored.unwrap_or(Self::Active),
        }
    }
}
