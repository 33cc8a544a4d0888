//! A context being filled: weights by reference, cache and buffers of its own.

use crate::{Model, RuntimeError};

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
    /// Factor on every layer's alpha; 1 leaves the stored limits as they are.
    pub alpha_scale: f64,
}

/// Rows that an MLP reads while decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Sign disagreements of every row with `x`, `(n_tokens, intermediate_size)`; empty unless
    /// [`MlpObserver::wants_n_neg`].
    pub n_neg: &'a [u32],
    /// Rows that the mask leaves out, `(n_tokens, intermediate_size)`; empty when the pass is not masked or the
    /// layer predicts nothing.
    pub skip: &'a [bool],
}

/// Sees every layer's MLP of a batch, in layer order.
pub trait MlpObserver {
    /// True if [`MlpBatch::n_neg`] is to be filled.
    fn wants_n_neg(&self) -> bool {
        false
    }

    /// Called once for each layer of each batch, before the down projection.
    fn mlp(&mut self, batch: &MlpBatch<'_>);
}

/// What decoding has read since [`Session::reset_usage`]; prompts are not counted.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Tokens decoded.
    pub n_tokens: u64,
    /// Bytes needed: weights, sign words and cache that the decoded tokens used, each once per token.
    pub n_bytes: u64,
    /// By layer.
    pub layers: Vec<LayerUsage>,
}

/// Gate rows that decoding computed in one layer, summed over tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct LayerUsage {
    /// Gate rows computed.
    pub n_kept: u64,
    /// Rows whose activation was not zero.
    pub n_active: u64,
}

/// A context being filled.
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

    /// The model.
    pub fn model(&self) -> &'m Model {
        todo!()
    }

    /// Forgets all positions.
    pub fn reset(&mut self) {
        todo!()
    }

    /// Changes the rows that decode reads; the context stays.
    pub fn set_mode(&mut self, mode: MlpMode, alpha_scale: f64) {
        let _ = (mode, alpha_scale);
        todo!()
    }

    /// Positions filled.
    pub fn n_positions(&self) -> usize {
        todo!()
    }

    /// Positions that the cache holds.
    pub fn n_positions_max(&self) -> usize {
        todo!()
    }

    /// What runs the model, for people: `cpu (avx512, 2 threads)`.
    pub fn backend(&self) -> String {
        todo!()
    }

    /// The limits on n_neg that the session's mode uses, one per layer; `None` where a layer predicts nothing.
    pub fn limits(&self) -> &[Option<u32>] {
        todo!()
    }

    /// What decoding has read since the last [`Session::reset_usage`].
    pub fn usage(&self) -> &Usage {
        todo!()
    }

    /// Starts counting anew.
    pub fn reset_usage(&mut self) {
        todo!()
    }

    /// Plain read bandwidth of the backend over fresh memory, in GB/s (10^9), now.
    pub fn measure_read_gb_per_s(&self) -> f64 {
        todo!()
    }

    /// Dense pass over `tokens` in batches, appended to the context; logits of the last one, `(vocab_size,)`.
    ///
    /// # Errors
    /// [`RuntimeError::ContextFull`] before anything is computed; [`RuntimeError::TokenId`].
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<&[f32], RuntimeError> {
        let _ = tokens;
        todo!()
    }

    /// One token through all layers, reading the rows that the mode selects; logits of the next, `(vocab_size,)`.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, token: u32) -> Result<&[f32], RuntimeError> {
        let _ = token;
        todo!()
    }

    /// One batch (at most `n_batch_max` tokens) appended to the context. With `masked`, rows that the session's mode
    /// would skip contribute nothing, as in decode. `logits`, where wanted: `(n_tokens, vocab_size)`.
    ///
    /// # Errors
    /// As [`Session::prefill`].
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
