//! The fixed first block of a file: identification, extents, model dimensions, digests.

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
}
