//! What a backend does for a session: the model's layers over a cache that it owns.
//!
//! One implementation per kind of device. A session checks tokens and positions before it calls an engine, so that an
//! engine is about mathematics only.

use kernels::BitPlanes;

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

    /// False if scores cannot be computed here: the session then asks for exact rows in their place.
    fn has_scores(&self) -> bool {
        true
    }

    /// Takes `planes`, one for each layer, in place of the file's. False if the engine cannot.
    fn set_planes(&mut self, planes: &[Option<BitPlanes<'m>>]) -> bool {
        let _ = planes;
        false
    }

    /// Rows that decoding and masked batches read from now on, one choice per layer.
    fn set_rows(&mut self, rows: Vec<RowChoice>);

    /// Appends one token at `position`; adds what was read to `usage`.
    fn decode(&mut self, token: u32, position: usize, usage: &mut Usage) -> Result<(), RuntimeError>;

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
