//! Maps a `.sinf` file and generates text with it; `prep` borrows the dense forward pass from here.

use std::path::Path;

/// A mapped, validated file.
#[derive(Debug)]
pub struct Model {}

/// What a session needs to know up front.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Positions that the cache holds; at most `max_position_embeddings`.
    pub n_positions_max: usize,
    /// Most tokens of one batch.
    pub n_batch_max: usize,
    /// Threads; 0 takes one for each available core.
    pub n_threads: usize,
    /// Rows that decode reads.
    pub mode: MlpMode,
}

/// Rows that an MLP reads while decoding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MlpMode {
    /// As the file's predictor records say.
    Stored,
    /// Every gate row, up and down where active.
    Exact,
    /// Everything.
    Dense,
}

/// What one layer's MLP saw for a batch of tokens. All row-major.
#[derive(Clone, Copy, Debug)]
pub struct MlpBatch<'a> {
    /// Layer.
    pub layer: usize,
    /// Tokens.
    pub n_tokens: usize,
    /// Input after RMSNorm, `(n_tokens, hidden_size)`.
    pub x: &'a [f32],
    /// Gate projections before the activation, `(n_tokens, intermediate_size)`.
    pub gate: &'a [f32],
    /// `act(gate) * up` before any mask, `(n_tokens, intermediate_size)`.
    pub h: &'a [f32],
}

/// Sees every layer's MLP of a batch, in layer order.
pub trait MlpObserver {
    /// Called once for each layer of each batch, before the down projection.
    fn mlp(&mut self, batch: &MlpBatch<'_>);
}

/// Why a run stops.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The file is not a valid `.sinf`.
    #[error("{path}")]
    Format {
        /// The file.
        path: String,
        /// The broken rule.
        #[source]
        source: format_spec::FormatError,
    },
}

impl Model {
    /// Maps and validates `path`.
    pub fn open(path: &Path) -> Result<Self, RuntimeError> {
        let _ = path;
        todo!()
    }

    /// Dimensions and constants.
    pub fn config(&self) -> &format_spec::ModelConfig {
        todo!()
    }

    /// The validated structure.
    pub fn layout(&self) -> &format_spec::Layout {
        todo!()
    }

    /// The mapped bytes.
    pub fn bytes(&self) -> &[u8] {
        todo!()
    }
}

/// A context being filled: weights by reference, cache and buffers of its own.
#[derive(Debug)]
pub struct Session<'m> {
    _model: &'m Model,
}

impl<'m> Session<'m> {
    /// Allocates everything that decoding needs.
    pub fn new(model: &'m Model, options: &SessionOptions) -> Result<Self, RuntimeError> {
        let _ = options;
        Ok(Self { _model: model })
    }

    /// Forgets all positions.
    pub fn reset(&mut self) {
        todo!()
    }

    /// Positions filled.
    pub fn n_positions(&self) -> usize {
        todo!()
    }

    /// The backend, for callers that need one kernel (calibration's n_neg).
    pub fn cpu(&self) -> &kernels::Cpu {
        todo!()
    }

    /// Dense pass over `tokens` in batches, appended to the context; logits of the last one.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32], RuntimeError> {
        let _ = tokens;
        todo!()
    }

    /// One token through all layers, reading the rows that the mode selects; logits of the next.
    pub fn decode(&mut self, token: u32) -> Result<&[f32], RuntimeError> {
        let _ = token;
        todo!()
    }

    /// One batch (at most `n_batch_max` tokens) appended to the context. With `masked`, rows that the session's mode
    /// would skip contribute nothing, as in decode. `logits`, where wanted: `(n_tokens, vocab_size)`.
    pub fn forward_batch(
        &mut self,
        tokens: &[u32],
        masked: bool,
        logits: Option<&mut [f32]>,
        observer: Option<&mut dyn MlpObserver>,
    ) -> Result<(), RuntimeError> {
        let _ = (tokens, masked, logits, observer);
        todo!()
    }
}
