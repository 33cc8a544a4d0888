//! What a backend does for a session: the model's layers over a cache that it owns.
//!
//! One implementation per kind of device. A session checks tokens and positions before it calls an engine, so that an
//! engine is about mathematics only.

use kernels::{BitPlanes, LowRank};

use crate::audit::Audit;
use crate::sampler::{SampleError, SamplerOptions};
use crate::session::{MlpObserver, Usage};
use crate::steps::Step;
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
    /// Gate rows whose score is at least the layer's threshold.
    Threshold(f32),
    /// Gate rows whose score is at least the row's threshold, `(intermediate_size,)`.
    RowThresholds(Vec<f32>),
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
pub(crate) trait Engine<'m>: std::fmt::Debug {
    /// For people: `cpu (avx512, 2 threads)`.
    fn describe(&self) -> String;

    /// Tokens of a batch that prompts go through best in; at most the session's `n_batch_max`.
    fn n_batch(&self) -> usize;

    /// Takes `planes` and `factors`, one of each for each layer, in place of those it has; a layer that has factors makes
    /// scores of them and not of planes. Rows are set next: those from before may need what is gone. After an error,
    /// every gate row is computed until then.
    fn set_predictors(
        &mut self,
        planes: &[Option<BitPlanes<'m>>],
        factors: &[Option<LowRank<'m>>],
    ) -> Result<(), RuntimeError>;

    /// Rows that decoding and masked batches read from now on, one choice per layer.
    fn set_rows(&mut self, rows: Vec<RowChoice>);

    /// Appends one token at `position`; adds what was read to `usage`.
    fn decode(&mut self, token: u32, position: usize, usage: &mut Usage) -> Result<(), RuntimeError>;

    /// As [`Engine::decode`], with the same logits; in every layer that predicts, rows of `audit.draw(number, layer)`
    /// that the predictor leaves out are computed beside the others, and `audit.record` gets what they have.
    fn decode_audited(
        &mut self,
        token: u32,
        position: usize,
        usage: &mut Usage,
        audit: &mut Audit,
        number: usize,
    ) -> Result<(), RuntimeError>;

    /// The choice of one layer, whose limits or thresholds are to be moved: it stays of its kind.
    fn layer_rows_mut(&mut self, layer: usize) -> &mut RowChoice;

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

    /// Decodes `tokens` from `first_position` on, and times the steps of a token by counting clocks; usage and logits are
    /// left alone. No steps where this engine runs the model's tokens in a way that counts none; `None` from an engine
    /// that never does.
    fn time_steps(
        &mut self,
        _tokens: &[u32],
        _first_position: usize,
    ) -> Result<Option<Vec<Step>>, RuntimeError> {
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
    /// True if gate rows are left out by prediction.
    pub(crate) fn is_predicted(&self) -> bool {
        !matches!(self, Self::All | Self::Active)
    }

    /// The limit on n_neg, or the threshold, the widest where rows have their own; none where nothing is predicted.
    pub(crate) fn widest(&self) -> Option<f32> {
        match self {
            Self::All | Self::Active => None,
            Self::Limit(limit) => Some(*limit as f32),
            Self::RowLimits(limits) => limits.iter().max().map(|&limit| limit as f32),
            Self::Threshold(threshold) => Some(*threshold),
            Self::RowThresholds(thresholds) => thresholds.iter().copied().reduce(f32::min),
        }
    }

    /// The choice of `mode` where the file's predictor would keep `stored` rows (`None`: it predicts nothing).
    pub(crate) fn new(mode: MlpMode, stored: Option<Self>) -> Self {
        match mode {
            MlpMode::Dense => Self::All,
            MlpMode::Exact => Self::Active,
            MlpMode::Stored => stored.unwrap_or(Self::Active),
        }
    }
}
