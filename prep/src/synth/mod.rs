//! Makes checkpoints of any Llama shape whose MLP is as sparse as asked, for benches and tests of sizes that no
//! trained model at hand has.
//!
//! What is written is an ordinary Hugging Face folder. The weights are random, but not independent of each other: the
//! hidden states of a sample of random tokens go through every layer as it is made, and its gate rows are set against
//! the mean input that the sample shows.
//!
//! ```text
//! embedding[t] = common + noise(t)                       the inputs of all layers share a mean, as trained ones do
//! per layer:   m = mean input of the MLP over a third of the sample, s = sign(m)
//!   B_i ~ N(b, ROW_SPREAD^2)                             rows differ: some are active often, most seldom
//!   gate[i, j] = s_j * (+-a_ij) - c * s_j / sum|m|       a_ij uniform in [0.5, 1.5] / sqrt(d); + with the probability
//!                                                        that moves the row's mean projection to B_i deviations
//!   c by bisection                                       over another third, until the share of zeros is the asked one
//!   up, down, attention ~ N(0, .)                        down scaled so that no layer drowns the ones before it
//! ```
//!
//! The last third of the sample is fresh: the figures of the report (sparsity, and what a limit on sign disagreements
//! keeps and misses) come from it, by the dense forward pass.
//!
//! What these models are not: evidence for the sign rule. Near-constant magnitudes and rows of different readiness are
//! chosen so that signs say about as much here as trained predictors say about ProSparse models (22 to 25 % of rows
//! kept for 91 to 93 % of the active ones). With normal gate weights of one readiness, 20 % kept would miss 21 % of
//! the energy. Speed at a given share of rows kept is what they can measure; quality is what trained models are for.

mod random;
mod shards;
mod vocabulary;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use format_spec::{Activation, DType};
use half::{bf16, f16};
use kernels::{AttentionScratch, AttentionShape, Cpu, Matrix, ShapeError, SignMatrix};
use serde::Serialize;
use serde_json::json;

use self::random::{Element, GateTable, NormalTable, Quantiles, Stream, normal_quantile};
use self::shards::{ShardWriter, TensorPlan};
use crate::calibrate::SignHistogram;

/// Share of zeros when none is asked for: what ProSparse-Llama2 measures.
const DEFAULT_SPARSITY: f64 = 0.89;
/// Magnitude of the common part of an embedding against the rest.
const MEAN_TO_NOISE: f64 = 0.7;
/// Spread of the rows' mean projections, in deviations of one row's projection from token to token.
const ROW_SPREAD: f64 = 1.5;
/// What all MLP (and all attention) outputs together add to the residual stream, as a share of its deviation.
const RESIDUAL_GROWTH: f64 = 0.7;
/// Largest difference from the asked share of zeros that the bisection may leave.
const SPARSITY_TOLERANCE: f64 = 0.005;
/// Shares of rows for which the report says what the sign rule misses.
const REPORTED_SHARES: [f64; 2] = [0.20, 0.35];
/// RoPE base.
const ROPE_THETA: f64 = 10_000.0;
/// RMSNorm epsilon.
const RMS_NORM_EPS: f32 = 1e-5;
/// Bytes generated at once where no whole matrix is needed.
const BLOCK_BYTES: usize = 32 << 20;
/// Ids below this are special tokens and bytes.
const BOS: u32 = 1;

/// `prep synth`.
#[derive(Args, Clone, Debug)]
pub struct SynthArgs {
    /// Folder to write; it must not exist or be empty.
    pub out_dir: PathBuf,
    /// Start from a known shape; the other options override it.
    #[arg(long, value_enum, value_name = "NAME", required_unless_present_all = ["hidden", "intermediate", "layers", "heads"])]
    pub shape: Option<ShapePreset>,
    /// Width of the residual stream.
    #[arg(long, value_name = "H")]
    pub hidden: Option<u32>,
    /// Neurons of the MLP.
    #[arg(long, value_name = "F")]
    pub intermediate: Option<u32>,
    /// Decoder layers.
    #[arg(long, value_name = "L")]
    pub layers: Option<u32>,
    /// Query heads; divides the hidden size.
    #[arg(long, value_name = "N")]
    pub heads: Option<u32>,
    /// Key/value heads; divides the query heads [default: as many].
    #[arg(long, value_name = "K")]
    pub kv_heads: Option<u32>,
    /// Vocabulary entries, at least 260 [default: 32000].
    #[arg(long, value_name = "V")]
    pub vocab: Option<u32>,
    /// Largest context [default: 4096].
    #[arg(long, value_name = "C")]
    pub context: Option<u32>,
    /// MLP activation [default: relu].
    #[arg(long, value_enum, value_name = "NAME")]
    pub activation: Option<ActivationName>,
    /// Threshold of fatrelu [default: 0.01].
    #[arg(long, value_name = "T")]
    pub threshold: Option<f32>,
    /// Share of MLP activations that are zero, 0.5 to 0.995 [default: 0.89; silu has none].
    #[arg(long, value_name = "X")]
    pub sparsity: Option<f64>,
    /// Element type of all weights.
    #[arg(long, value_enum, default_value = "f16", value_name = "TYPE")]
    pub dtype: DTypeName,
    /// Seed; the same seed and options give the same bytes.
    #[arg(long, default_value_t = 0, value_name = "S")]
    pub seed: u64,
    /// Largest safetensors file, such as 5GB or 500MB (10^9, 10^6).
    #[arg(long, default_value = "5GB", value_parser = parse_bytes, value_name = "SIZE")]
    pub shard_size: u64,
    /// Threads; 0 takes one for each available core.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: usize,
    /// Replace a checkpoint that is in OUT_DIR.
    #[arg(long)]
    pub force: bool,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
    /// No progress.
    #[arg(long)]
    pub quiet: bool,
}

/// Shapes with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ShapePreset {
    /// 2048 / 5504, 16 layers, 16 heads, vocabulary 32000, relu: the shape of the project's speed figures.
    #[value(name = "bench-2048")]
    Bench2048,
    /// 4096 / 11008, 32 layers, 32 heads, vocabulary 32000, fatrelu 0.01.
    #[value(name = "prosparse-7b")]
    Prosparse7b,
    /// 5120 / 13824, 40 layers, 40 heads, vocabulary 32000, fatrelu 0.01.
    #[value(name = "prosparse-13b")]
    Prosparse13b,
}

/// Activations by the name config.json gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ActivationName {
    /// `max(v, 0)`.
    Relu,
    /// `v if v >= threshold else 0`.
    Fatrelu,
    /// `v * sigmoid(v)`.
    Silu,
}

/// Element types by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DTypeName {
    /// binary16.
    F16,
    /// Upper half of a binary32.
    Bf16,
    /// binary32.
    F32,
}

/// A checkpoint to make.
#[derive(Clone, Debug)]
pub struct SynthOptions {
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Neurons of the MLP.
    pub intermediate_size: u32,
    /// Decoder layers.
    pub num_hidden_layers: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key/value heads.
    pub num_key_value_heads: u32,
    /// Vocabulary entries.
    pub vocab_size: u32,
    /// Largest context.
    pub max_position_embeddings: u32,
    /// MLP activation.
    pub activation: Activation,
    /// Share of zeros in the MLP; not used with silu.
    pub sparsity: f64,
    /// F32, F16 or Bf16.
    pub dtype: DType,
    /// Seed.
    pub seed: u64,
    /// Largest safetensors file.
    pub shard_bytes: u64,
    /// Threads; 0 takes one for each available core.
    pub n_threads: usize,
    /// Replace a checkpoint that is in the folder.
    pub force: bool,
}

/// Why no checkpoint was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthError {
    /// An option that no Llama has.
    #[error("{option}: expected {expected}, found {found}")]
    Option {
        /// Name on the command line.
        option: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The folder holds something.
    #[error("{path}: already holds {found}")]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// A file in it.
        found: String,
        /// True when `--force` would not help either: the file is no part of a checkpoint.
        foreign: bool,
    },
    /// Reading or writing failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What failed.
        source: std::io::Error,
    },
    /// The bisection found no shift.
    #[error("layer {layer}: expected a sparsity of {expected:.4}, reached {found:.4}")]
    Sparsity {
        /// Layer.
        layer: u32,
        /// Share asked for.
        expected: f64,
        /// Share reached.
        found: f64,
    },
    /// Shapes that do not fit each other: a bug.
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

impl SynthError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Occupied { foreign: false, .. } => Some("--force replaces a checkpoint".to_owned()),
            Self::Occupied { foreign: true, .. } => Some("name a new folder".to_owned()),
            Self::Sparsity { .. } => Some("the shape is too small for its share; make it wider".to_owned()),
            _ => None,
        }
    }
}

/// What was made.
#[derive(Clone, Debug, Serialize)]
pub struct SynthReport {
    /// Weights.
    pub n_parameters: u64,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Safetensors files, with the index if there is one.
    pub n_files: usize,
    /// Wall time.
    pub seconds: f64,
    /// Weights written a second, MB (10^6).
    pub mb_per_s: f64,
    /// Share of zeros asked for; none with silu.
    pub sparsity: Option<f64>,
    /// Fresh tokens behind the figures of each layer.
    pub n_tokens: usize,
    /// One for each layer.
    pub layers: Vec<LayerReport>,
}

/// What a layer shows on fresh tokens.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// Layer.
    pub layer: u32,
    /// Share of zeros measured.
    pub sparsity: f64,
    /// Square of the mean MLP input over the mean square of the inputs: what all tokens share.
    pub mean_share: f64,
    /// Root mean square of the residual stream after the layer.
    pub residual_rms: f64,
    /// What a limit on sign disagreements would do; none with silu.
    pub sign_rule: Vec<SignRulePoint>,
}

/// One limit of the sign rule.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SignRulePoint {
    /// Limit on n_neg.
    pub limit: u32,
    /// Share of rows kept.
    pub rows_kept: f64,
    /// Share of active rows kept.
    pub recall: f64,
    /// Share of output energy missed.
    pub missed_energy: f64,
}

impl SynthArgs {
    /// Options with presets and defaults filled in.
    ///
    /// # Errors
    /// [`SynthError::Option`] for a threshold or a sparsity that the activation does not have.
    pub fn options(&self) -> Result<SynthOptions, SynthError> {
        let preset = self.shape.map(ShapePreset::dimensions);
        let (hidden, intermediate, layers, heads) = preset.unwrap_or_default();
        let prosparse = matches!(self.shape, Some(ShapePreset::Prosparse7b | ShapePreset::Prosparse13b));
        let default_activation = if prosparse { ActivationName::Fatrelu } else { ActivationName::Relu };
        let name = self.activation.unwrap_or(default_activation);
        let activation = match (name, self.threshold) {
            (ActivationName::Fatrelu, threshold) => {
                Activation::FatRelu { threshold: threshold.unwrap_or(0.01) }
            }
            (_, Some(threshold)) => return Err(option("--threshold", "--activation fatrelu", threshold)),
            (ActivationName::Relu, None) => Activation::Relu,
            (ActivationName::Silu, None) => Activation::Silu,
        };
        if let (Activation::Silu, Some(sparsity)) = (activation, self.sparsity) {
            return Err(option("--sparsity", "an activation with zeros", sparsity));
        }
        let heads = self.heads.unwrap_or(heads);
        Ok(SynthOptions {
            hidden_size: self.hidden.unwrap_or(hidden),
            intermediate_size: self.intermediate.unwrap_or(intermediate),
            num_hidden_layers: self.layers.unwrap_or(layers),
            num_attention_heads: heads,
            num_key_value_heads: self.kv_heads.unwrap_or(heads),
            vocab_size: self.vocab.unwrap_or(32_000),
            max_position_embeddings: self.context.unwrap_or(4096),
            activation,
            sparsity: self.sparsity.unwrap_or(DEFAULT_SPARSITY),
            dtype: match self.dtype {
                DTypeName::F16 => DType::F16,
                DTypeName::Bf16 => DType::Bf16,
                DTypeName::F32 => DType::F32,
            },
            seed: self.seed,
            shard_bytes: self.shard_size,
            n_threads: self.threads,
            force: self.force,
        })
    }
}

impl ShapePreset {
    /// Hidden size, intermediate size, layers, heads.
    fn dimensions(self) -> (u32, u32, u32, u32) {
        match self {
            Self::Bench2048 => (2048, 5504, 16, 16),
            Self::Prosparse7b => (4096, 11008, 32, 32),
            Self::Prosparse13b => (5120, 13824, 40, 40),
        }
    }
}

impl SynthOptions {
    /// Width of one head.
    fn head_dim(&self) -> u32 {
        self.hidden_size / self.num_attention_heads
    }

    fn check(&self) -> Result<(), SynthError> {
        let at_least = |name, value: u32, least: u32| match value >= least {
            true => Ok(()),
            false => Err(option(name, &format!("at least {least}"), value)),
        };
        at_least("--hidden", self.hidden_size, 16)?;
        at_least("--intermediate", self.intermediate_size, 16)?;
        at_least("--layers", self.num_hidden_layers, 1)?;
        at_least("--heads", self.num_attention_heads, 1)?;
        at_least("--kv-heads", self.num_key_value_heads, 1)?;
        at_least("--vocab", self.vocab_size, vocabulary::MIN_VOCAB_SIZE)?;
        at_least("--context", self.max_position_embeddings, 2)?;
        if !self.hidden_size.is_multiple_of(2 * self.num_attention_heads) {
            let expected = format!("a divisor of half the hidden size {}", self.hidden_size);
            return Err(option("--heads", &expected, self.num_attention_heads));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of the {} heads", self.num_attention_heads);
            return Err(option("--kv-heads", &expected, self.num_key_value_heads));
        }
        if !(0.5..=0.995).contains(&self.sparsity) {
            return Err(option("--sparsity", "0.5 to 0.995", self.sparsity));
        }
        if let Activation::FatRelu { threshold } = self.activation
            && !(0.0..=10.0).contains(&threshold)
        {
            return Err(option("--threshold", "0 to 10", threshold));
        }
        if !matches!(self.dtype, DType::F32 | DType::F16 | DType::Bf16) {
            return Err(option("--dtype", "f32, f16 or bf16", format!("{:?}", self.dtype)));
        }
        Ok(())
    }

    /// True when the MLP has zeros to place.
    fn is_sparse(&self) -> bool {
        self.activation != Activation::Silu
    }

    fn config_json(&self, torch_dtype: &str) -> serde_json::Value {
        let fatrelu = matches!(self.activation, Activation::FatRelu { .. });
        let mut config = json!({
            "architectures": [if fatrelu { "SparseLlamaForCausalLM" } else { "LlamaForCausalLM" }],
            "model_type": if fatrelu { "sparsellama" } else { "llama" },
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": RMS_NORM_EPS as f64,
            "rope_theta": ROPE_THETA,
            "rope_scaling": null,
            "tie_word_embeddings": false,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": BOS,
            "eos_token_id": 2,
            "torch_dtype": torch_dtype,
            "synthetic": {
                "tool": concat!("prep synth ", env!("CARGO_PKG_VERSION")),
                "seed": self.seed,
                "sparsity": self.is_sparse().then_some(self.sparsity),
            }
        });
        match self.activation {
            Activation::Relu => config["hidden_act"] = json!("relu"),
            Activation::Silu => config["hidden_act"] = json!("silu"),
            Activation::FatRelu { threshold } => {
                config["hidden_act"] = json!("fatrelu");
                // Through the shortest decimal, so that 0.01 stays 0.01.
                config["hidden_act_param"] = json!(threshold.to_string().parse::<f64>().unwrap_or_default());
            }
        }
        config
    }

    /// Every tensor in the order it is made.
    fn tensors(&self) -> Vec<TensorPlan> {
        let [d, f, v] = [self.hidden_size, self.intermediate_size, self.vocab_size].map(|n| n as usize);
        let kv = (self.num_key_value_heads * self.head_dim()) as usize;
        let mut tensors = Vec::new();
        let mut push =
            |name: String, shape: &[usize]| tensors.push(TensorPlan { name, shape: shape.to_vec() });
        push("model.embed_tokens.weight".to_owned(), &[v, d]);
        for layer in 0..self.num_hidden_layers {
            push(layer_name(layer, "input_layernorm"), &[d]);
            push(layer_name(layer, "self_attn.q_proj"), &[d, d]);
            push(layer_name(layer, "self_attn.k_proj"), &[kv, d]);
            push(layer_name(layer, "self_attn.v_proj"), &[kv, d]);
            push(layer_name(layer, "self_attn.o_proj"), &[d, d]);
            push(layer_name(layer, "post_attention_layernorm"), &[d]);
            push(layer_name(layer, "mlp.gate_proj"), &[f, d]);
            push(layer_name(layer, "mlp.up_proj"), &[f, d]);
            push(layer_name(layer, "mlp.down_proj"), &[d, f]);
        }
        push("model.norm.weight".to_owned(), &[d]);
        push("lm_head.weight".to_owned(), &[v, d]);
        tensors
    }
}

impl SynthReport {
    /// The report for people.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_text(&self, out: &mut dyn Write) -> std::io::Result<()> {
        writeln!(
            out,
            "{:.2} G parameters, {:.2} GB in {} files, {:.1} s ({:.0} MB/s)",
            self.n_parameters as f64 / 1e9,
            self.weight_bytes as f64 / 1e9,
            self.n_files,
            self.seconds,
            self.mb_per_s
        )?;
        writeln!(out, "measured on {} fresh tokens:", self.n_tokens)?;
        write!(out, "layer  zeros   mean  residual")?;
        if self.sparsity.is_some() {
            write!(out, "   sign rule: rows kept, recall, energy missed")?;
        }
        writeln!(out)?;
        for layer in &self.layers {
            write!(
                out,
                "{:5}  {:.4}  {:.2}  {:8.3}",
                layer.layer, layer.sparsity, layer.mean_share, layer.residual_rms
            )?;
            for point in &layer.sign_rule {
                write!(out, "   {:.3} {:.3} {:.4}", point.rows_kept, point.recall, point.missed_energy)?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

/// Makes a checkpoint in `out_dir`: in a folder beside it first, renamed at the end. `progress` gets bytes written and
/// bytes in all. Nothing is synced to the disk, as a lost checkpoint is made again by the same command.
///
/// # Errors
/// [`SynthError::Option`] for a shape that no Llama has, [`SynthError::Occupied`] for a folder in use,
/// [`SynthError::Io`] when writing fails.
pub fn generate(
    options: &SynthOptions,
    out_dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<SynthReport, SynthError> {
    options.check()?;
    refuse_occupied(out_dir, options.force)?;
    let partial = PartialFolder::create(out_dir)?;
    let report = match options.dtype {
        DType::F32 => Generator::<f32>::new(options, &partial.path, progress).run()?,
        DType::Bf16 => Generator::<bf16>::new(options, &partial.path, progress).run()?,
        _ => Generator::<f16>::new(options, &partial.path, progress).run()?,
    };
    partial.rename_to(out_dir)?;
    Ok(report)
}

/// Kinds of rows, each with random streams of its own.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Common,
    Embedding,
    AttnNorm,
    Q,
    K,
    V,
    O,
    MlpNorm,
    GateBias,
    Gate,
    Up,
    Down,
    FinalNorm,
    LmHead,
    Sample,
}

/// One checkpoint being made.
struct Generator<'a, T> {
    options: &'a SynthOptions,
    folder: &'a Path,
    progress: &'a mut dyn FnMut(u64, u64),
    cpu: Cpu,
    quantiles: Quantiles,
    shards: ShardWriter,
    bytes_done: u64,
    /// The matrix at hand.
    weights: Vec<T>,
    sample: Sample,
}

/// Hidden states of random tokens on their way through the layers: three groups of the same number of sequences.
struct Sample {
    n_sequences: usize,
    sequence_len: usize,
    /// `(n_tokens, hidden_size)`.
    hidden: Vec<f32>,
    /// `(n_tokens, hidden_size)`.
    x: Vec<f32>,
    attention_shape: AttentionShape,
    scratch: AttentionScratch,
    /// `(sequence_len, head_dim / 2)`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Sample {
    fn new(options: &SynthOptions, n_threads: usize) -> Self {
        let sequence_len = options.max_position_embeddings.min(64) as usize;
        // Enough (token, row) pairs in a group for a share good to a tenth of a percent or so.
        let n_group_tokens = (1_usize << 18).div_ceil(options.intermediate_size as usize).clamp(64, 1024);
        let n_sequences = 3 * n_group_tokens.div_ceil(sequence_len);
        let n_values = n_sequences * sequence_len * options.hidden_size as usize;
        let head_dim = options.head_dim() as usize;
        let attention_shape = AttentionShape {
            n_heads: options.num_attention_heads as usize,
            n_kv_heads: options.num_key_value_heads as usize,
            head_dim,
            n_positions_max: sequence_len,
        };
        let angles = (0..sequence_len).flat_map(|position| {
            (0..head_dim / 2)
                .map(move |i| position as f64 / ROPE_THETA.powf(2.0 * i as f64 / head_dim as f64))
        });
        let (sin, cos) = angles.map(|angle| (angle.sin() as f32, angle.cos() as f32)).unzip();
        Self {
            n_sequences,
            sequence_len,
            hidden: vec![0.0; n_values],
            x: vec![0.0; n_values],
            attention_shape,
            scratch: AttentionScratch::new(&attention_shape, n_threads),
            cos,
            sin,
        }
    }

    fn n_tokens(&self) -> usize {
        self.n_sequences * self.sequence_len
    }

    /// Tokens of one group: 0 measures the mean, 1 sets the share of zeros, 2 is fresh.
    fn group(&self, group: usize) -> std::ops::Range<usize> {
        let n = self.n_tokens() / 3;
        group * n..(group + 1) * n
    }

    /// Causal attention of every sequence; `q`, `k`, `v` and the result are `(n_tokens, heads x head_dim)`.
    fn attention(
        &mut self,
        cpu: &Cpu,
        q: &mut [f32],
        k: &mut [f32],
        v: &[f32],
    ) -> Result<Vec<f32>, ShapeError> {
        let shape = self.attention_shape;
        let (head_dim, n_kv_heads) = (shape.head_dim, shape.n_kv_heads);
        let mut out = vec![0.0; q.len()];
        let q_len = self.sequence_len * shape.n_heads * head_dim;
        let kv_len = self.sequence_len * n_kv_heads * head_dim;
        let mut keys = vec![0.0; kv_len];
        let mut values = vec![0.0; kv_len];
        let sequences = q.chunks_exact_mut(q_len).zip(k.chunks_exact_mut(kv_len)).zip(v.chunks_exact(kv_len));
        for (((q, k), v), out) in sequences.zip(out.chunks_exact_mut(q_len)) {
            cpu.rope(q, shape.n_heads, head_dim, &self.cos, &self.sin)?;
            cpu.rope(k, n_kv_heads, head_dim, &self.cos, &self.sin)?;
            for position in 0..self.sequence_len {
                for head in 0..n_kv_heads {
                    let from = (position * n_kv_heads + head) * head_dim;
                    let to = (head * self.sequence_len + position) * head_dim;
                    keys[to..to + head_dim].copy_from_slice(&k[from..from + head_dim]);
                    values[to..to + head_dim].copy_from_slice(&v[from..from + head_dim]);
                }
            }
            let (keys, values) = (f32::elements(&keys), f32::elements(&values));
            cpu.attention(&shape, self.sequence_len, 0, q, keys, values, &mut self.scratch, out)?;
        }
        Ok(out)
    }
}

/// What the MLP inputs of a layer share.
struct MeanInput {
    /// Sign of each column's mean.
    negative: Vec<bool>,
    /// Sum of the means' magnitudes.
    l1: f64,
    /// Deviation of a column from its mean, root mean square over columns.
    noise: f64,
    /// Square of the mean over the mean square.
    share: f64,
}

impl MeanInput {
    /// Over the rows of `x (n_tokens, width)`.
    fn of(x: &[f32], width: usize) -> Self {
        let n = (x.len() / width) as f64;
        let mut mean = vec![0.0_f64; width];
        for row in x.chunks_exact(width) {
            mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += f64::from(x) / n);
        }
        let mean_square = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
        let square_of_mean = mean.iter().map(|m| m * m).sum::<f64>() / width as f64;
        Self {
            negative: mean.iter().map(|&m| m < 0.0).collect(),
            l1: mean.iter().map(|m| m.abs()).sum(),
            noise: (mean_square - square_of_mean).max(1e-6).sqrt(),
            share: square_of_mean / mean_square,
        }
    }

    /// `sum_j sign(m_j) x_j / sum|m|` of each row of `x`: what a gate loses to a shift of 1. About 1 on average.
    fn projections(&self, x: &[f32]) -> Vec<f32> {
        x.chunks_exact(self.negative.len())
            .map(|row| {
                let along: f64 = row
                    .iter()
                    .zip(&self.negative)
                    .map(|(&x, &negative)| f64::from(if negative { -x } else { x }))
                    .sum();
                (along / self.l1) as f32
            })
            .collect()
    }
}

impl<'a, T: Element> Generator<'a, T> {
    fn new(options: &'a SynthOptions, folder: &'a Path, progress: &'a mut dyn FnMut(u64, u64)) -> Self {
        let cpu = Cpu::new(options.n_threads);
        let element_bytes = size_of::<T>();
        let shards =
            ShardWriter::new(folder, options.tensors(), T::SAFETENSORS, element_bytes, options.shard_bytes);
        let sample = Sample::new(options, cpu.n_threads());
        Self {
            options,
            folder,
            progress,
            cpu,
            quantiles: Quantiles::new(),
            shards,
            bytes_done: 0,
            weights: Vec::new(),
            sample,
        }
    }

    fn run(mut self) -> Result<SynthReport, SynthError> {
        let start = Instant::now();
        self.write_json("config.json", &self.options.config_json(T::TORCH))?;
        self.write_json("tokenizer.json", &vocabulary::tokenizer_json(self.options.vocab_size))?;
        let tokenizer_config = vocabulary::tokenizer_config_json(self.options.max_position_embeddings);
        self.write_json("tokenizer_config.json", &tokenizer_config)?;

        self.embedding()?;
        let layers =
            (0..self.options.num_hidden_layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        self.lm_head()?;

        let weight_bytes = self.shards.total_bytes();
        let n_files = self.shards.n_files();
        self.shards.finish().map_err(|source| SynthError::Io { path: self.folder.to_owned(), source })?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(SynthReport {
            n_parameters: weight_bytes / size_of::<T>() as u64,
            weight_bytes,
            n_files,
            seconds,
            mb_per_s: weight_bytes as f64 / 1e6 / seconds,
            sparsity: self.options.is_sparse().then_some(self.options.sparsity),
            n_tokens: self.sample.group(2).len(),
            layers,
        })
    }

    fn write_json(&self, name: &str, value: &serde_json::Value) -> Result<(), SynthError> {
        let path = self.folder.join(name);
        std::fs::write(&path, format!("{value:#}\n")).map_err(|source| SynthError::Io { path, source })
    }

    /// The embedding, and the sample's rows of it.
    fn embedding(&mut self) -> Result<(), SynthError> {
        let d = self.options.hidden_size as usize;
        let noise = 1.0 / (1.0 + MEAN_TO_NOISE * MEAN_TO_NOISE).sqrt();
        let mut common = vec![0.0_f32; d];
        GateTable::new((noise * MEAN_TO_NOISE) as f32, 0.0).fill(
            self.stream(Kind::Common, 0, 0),
            0.5,
            &vec![false; d],
            &mut common,
        );
        let normal = self.quantiles.scaled::<f32>(noise as f32);
        let seed = self.options.seed;
        let fill = |row: usize, out: &mut [T], buffer: &mut Vec<f32>| {
            buffer.resize(d, 0.0);
            normal.fill(Stream::new(seed, tensor_key(Kind::Embedding, 0), row as u64), buffer);
            for ((out, &noise), &common) in out.iter_mut().zip(buffer.iter()).zip(&common) {
                *out = T::from_f32(common + noise);
            }
        };

        let mut row = vec![T::zeroed(); d];
        let mut buffer = Vec::new();
        let mut ids = self.stream(Kind::Sample, 0, 0);
        let n_ordinary = self.options.vocab_size - 3;
        for (token, hidden) in self.sample.hidden.chunks_exact_mut(d).enumerate() {
            let first = token % self.sample.sequence_len == 0;
            let id = if first { BOS } else { 3 + ids.next_below(n_ordinary) };
            fill(id as usize, &mut row, &mut buffer);
            hidden.iter_mut().zip(&row).for_each(|(hidden, weight)| *hidden = weight.to_f32());
        }
        let vocab_size = self.options.vocab_size as usize;
        self.write_rows("model.embed_tokens.weight", vocab_size, d, fill)
    }

    /// One layer: its tensors in the order of the plan, the sample moved on through it.
    fn layer(&mut self, layer: u32) -> Result<LayerReport, SynthError> {
        let d = self.options.hidden_size as usize;
        let f = self.options.intermediate_size as usize;
        let kv = (self.options.num_key_value_heads * self.options.head_dim()) as usize;
        let n_tokens = self.sample.n_tokens();
        let growth = RESIDUAL_GROWTH / f64::from(self.options.num_hidden_layers).sqrt();
        let unit = 1.0 / (d as f64).sqrt();

        self.norm(&layer_name(layer, "input_layernorm"), Kind::AttnNorm, layer)?;
        let x = std::mem::take(&mut self.sample.x);
        let mut q = vec![0.0; n_tokens * d];
        let mut k = vec![0.0; n_tokens * kv];
        let mut v = vec![0.0; n_tokens * kv];
        for (name, kind, n_rows, y) in [
            ("self_attn.q_proj", Kind::Q, d, &mut q),
            ("self_attn.k_proj", Kind::K, kv, &mut k),
            ("self_attn.v_proj", Kind::V, kv, &mut v),
        ] {
            self.normal_weights(kind, layer, n_rows, d, unit);
            self.emit(&layer_name(layer, name), n_rows, d, &x, y, false)?;
        }
        let attended = self.sample.attention(&self.cpu, &mut q, &mut k, &v)?;
        drop((q, k, v));
        let mut hidden = std::mem::take(&mut self.sample.hidden);
        self.normal_weights(Kind::O, layer, d, d, unit * growth);
        self.emit(&layer_name(layer, "self_attn.o_proj"), d, d, &attended, &mut hidden, true)?;
        self.sample.hidden = hidden;
        self.sample.x = x;

        self.norm(&layer_name(layer, "post_attention_layernorm"), Kind::MlpNorm, layer)?;
        let x = std::mem::take(&mut self.sample.x);
        let mean = MeanInput::of(&x[..self.sample.group(0).end * d], d);
        let mut gate = vec![0.0; n_tokens * f];
        self.gate(layer, &mean, &x, &mut gate)?;
        let signs = self.fresh_n_neg(&x)?;

        let mut h = vec![0.0; n_tokens * f];
        self.normal_weights(Kind::Up, layer, f, d, unit);
        self.emit(&layer_name(layer, "mlp.up_proj"), f, d, &x, &mut h, false)?;
        let activation = kernel_activation(self.options.activation);
        h.iter_mut().zip(&gate).for_each(|(h, &gate)| *h *= activation.apply(gate));

        // Outputs of rms `growth`: their mean square is the sum of h squared over a token, times sigma squared.
        let measured = &h[..self.sample.group(1).end * f];
        let energy =
            measured.iter().map(|&h| f64::from(h).powi(2)).sum::<f64>() * f as f64 / measured.len() as f64;
        self.normal_weights(Kind::Down, layer, d, f, growth / energy.max(1e-12).sqrt());
        let squared_norms = self.column_squared_norms(d, f);
        let mut hidden = std::mem::take(&mut self.sample.hidden);
        self.emit(&layer_name(layer, "mlp.down_proj"), d, f, &h, &mut hidden, true)?;

        let fresh = self.sample.group(2);
        let (gate, h) = (&gate[fresh.start * f..fresh.end * f], &h[fresh.start * f..fresh.end * f]);
        let n_active = gate.iter().filter(|&&gate| activation.apply(gate) != 0.0).count();
        let mut sign_rule = Vec::new();
        if self.options.is_sparse() {
            let mut histogram = SignHistogram::new(self.options.hidden_size);
            histogram.add(&signs, gate, h, &squared_norms, activation);
            sign_rule = REPORTED_SHARES.map(|share| sign_rule_point(&histogram, share)).into();
        }
        let mean_square = hidden.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / hidden.len() as f64;
        self.sample.hidden = hidden;
        self.sample.x = x;
        Ok(LayerReport {
            layer,
            sparsity: 1.0 - n_active as f64 / gate.len() as f64,
            mean_share: mean.share,
            residual_rms: mean_square.sqrt(),
            sign_rule,
        })
    }

    /// W_gate with the asked share of zeros; `gate` gets its products with the sample.
    fn gate(&mut self, layer: u32, mean: &MeanInput, x: &[f32], gate: &mut [f32]) -> Result<(), SynthError> {
        let d = self.options.hidden_size as usize;
        let f = self.options.intermediate_size as usize;
        let name = layer_name(layer, "mlp.gate_proj");
        let sigma = 1.0 / (d as f64).sqrt();
        if !self.options.is_sparse() {
            self.normal_weights(Kind::Gate, layer, f, d, sigma);
            return self.emit(&name, f, d, x, gate, false);
        }
        let centre = -normal_quantile(self.options.sparsity) * (1.0 + ROW_SPREAD * ROW_SPREAD).sqrt();
        let deviation = mean.noise * (d as f64).sqrt();
        let mut biases = self.stream(Kind::GateBias, layer, 0);
        let p_agree: Vec<f64> = (0..f)
            .map(|_| {
                let bias = centre + ROW_SPREAD * f64::from(self.quantiles.draw(&mut biases));
                (0.5 + 0.5 * bias * deviation / mean.l1).clamp(0.02, 0.98)
            })
            .collect();

        self.gate_weights(layer, sigma, 0.0, &p_agree, &mean.negative);
        let matrix = Matrix::new(T::elements(&self.weights), f, d)?;
        self.cpu.matmul(&matrix, self.sample.n_tokens(), x, gate, false)?;
        let group = self.sample.group(1);
        let projections = mean.projections(&x[group.start * d..group.end * d]);
        let shift = self.bisect(layer, &gate[group.start * f..group.end * f], &projections)?;

        self.gate_weights(layer, sigma, shift / mean.l1, &p_agree, &mean.negative);
        self.emit(&name, f, d, x, gate, false)
    }

    /// The shift that leaves the asked share of `gate (n_tokens, intermediate_size)` without activation, when each
    /// token's row loses `shift * projections[token]`.
    fn bisect(&self, layer: u32, gate: &[f32], projections: &[f32]) -> Result<f64, SynthError> {
        let f = self.options.intermediate_size as usize;
        let activation = kernel_activation(self.options.activation);
        let sparsity = |shift: f64| {
            let n_active: usize = gate
                .chunks_exact(f)
                .zip(projections)
                .map(|(gate, &projection)| {
                    let loss = shift as f32 * projection;
                    gate.iter().filter(|&&gate| activation.apply(gate - loss) != 0.0).count()
                })
                .sum();
            1.0 - n_active as f64 / gate.len() as f64
        };
        let (mut low, mut high) = (-16.0, 16.0);
        for _ in 0..30 {
            let middle = 0.5 * (low + high);
            if sparsity(middle) < self.options.sparsity { low = middle } else { high = middle }
        }
        let found = sparsity(high);
        if (found - self.options.sparsity).abs() > SPARSITY_TOLERANCE {
            return Err(SynthError::Sparsity { layer, expected: self.options.sparsity, found });
        }
        Ok(high)
    }

    fn gate_weights(&mut self, layer: u32, sigma: f64, shift: f64, p_agree: &[f64], mean_negative: &[bool]) {
        let table = GateTable::<T>::new(sigma as f32, shift as f32);
        let (seed, key) = (self.options.seed, tensor_key(Kind::Gate, layer));
        self.resize_weights(p_agree.len() * mean_negative.len());
        fill_rows(self.cpu.n_threads(), &mut self.weights, mean_negative.len(), 0, |row, out, _| {
            table.fill(Stream::new(seed, key, row as u64), p_agree[row], mean_negative, out);
        });
    }

    fn normal_weights(&mut self, kind: Kind, layer: u32, n_rows: usize, n_cols: usize, sigma: f64) {
        let table: NormalTable<T> = self.quantiles.scaled(sigma as f32);
        let (seed, key) = (self.options.seed, tensor_key(kind, layer));
        self.resize_weights(n_rows * n_cols);
        fill_rows(self.cpu.n_threads(), &mut self.weights, n_cols, 0, |row, out, _| {
            table.fill(Stream::new(seed, key, row as u64), out);
        });
    }

    fn resize_weights(&mut self, n: usize) {
        self.weights.resize(n, T::zeroed());
    }

    /// Writes the matrix at hand while the sample is multiplied with it: `y (+)= x W^T`.
    fn emit(
        &mut self,
        name: &str,
        n_rows: usize,
        n_cols: usize,
        x: &[f32],
        y: &mut [f32],
        accumulate: bool,
    ) -> Result<(), SynthError> {
        let matrix = Matrix::new(T::elements(&self.weights), n_rows, n_cols)?;
        let bytes: &[u8] = bytemuck::cast_slice(&self.weights);
        let (shards, cpu, n_tokens) = (&mut self.shards, &self.cpu, self.sample.n_tokens());
        let (written, multiplied) = std::thread::scope(|scope| {
            let writer = scope.spawn(|| shards.write(name, bytes));
            let multiplied = cpu.matmul(&matrix, n_tokens, x, y, accumulate);
            (writer.join(), multiplied)
        });
        let written = written.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written.map_err(|source| SynthError::Io { path: self.folder.to_owned(), source })?;
        multiplied?;
        self.advance(bytes.len());
        Ok(())
    }

    /// A norm of weights in [0.8, 1.2], and `x` of the sample normalised by it.
    fn norm(&mut self, name: &str, kind: Kind, layer: u32) -> Result<(), SynthError> {
        let mut stream = self.stream(kind, layer, 0);
        let weights: Vec<T> = (0..self.options.hidden_size)
            .map(|_| T::from_f32((0.8 + 0.4 * stream.next_unit()) as f32))
            .collect();
        self.write(name, bytemuck::cast_slice(&weights))?;
        let weights: Vec<f32> = weights.into_iter().map(T::to_f32).collect();
        self.cpu.rmsnorm(&self.sample.hidden, &weights, RMS_NORM_EPS, &mut self.sample.x)?;
        Ok(())
    }

    /// The final norm, and an lm_head that does not see the mean: it would give every position the same next token.
    fn lm_head(&mut self) -> Result<(), SynthError> {
        let d = self.options.hidden_size as usize;
        self.norm("model.norm.weight", Kind::FinalNorm, 0)?;
        let x = &self.sample.x[..self.sample.group(0).end * d];
        let mut mean = vec![0.0_f64; d];
        for row in x.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += f64::from(x));
        }
        let norm = mean.iter().map(|m| m * m).sum::<f64>().sqrt();
        let mean: Vec<f32> = mean.iter().map(|m| (m / norm) as f32).collect();
        let normal = self.quantiles.scaled::<f32>(2.0 / (d as f32).sqrt());
        let seed = self.options.seed;
        let fill = |row: usize, out: &mut [T], buffer: &mut Vec<f32>| {
            buffer.resize(d, 0.0);
            normal.fill(Stream::new(seed, tensor_key(Kind::LmHead, 0), row as u64), buffer);
            let along: f32 = buffer.iter().zip(&mean).map(|(w, m)| w * m).sum();
            for ((out, &weight), &mean) in out.iter_mut().zip(buffer.iter()).zip(&mean) {
                *out = T::from_f32(weight - along * mean);
            }
        };
        self.write_rows("lm_head.weight", self.options.vocab_size as usize, d, fill)
    }

    /// Makes and writes a matrix that nothing is multiplied with, in blocks.
    fn write_rows(
        &mut self,
        name: &str,
        n_rows: usize,
        n_cols: usize,
        fill: impl Fn(usize, &mut [T], &mut Vec<f32>) + Sync,
    ) -> Result<(), SynthError> {
        let n_block_rows = (BLOCK_BYTES / (n_cols * size_of::<T>())).max(1);
        let mut block = Vec::new();
        for first_row in (0..n_rows).step_by(n_block_rows) {
            block.resize(n_block_rows.min(n_rows - first_row) * n_cols, T::zeroed());
            fill_rows(self.cpu.n_threads(), &mut block, n_cols, first_row, &fill);
            self.write(name, bytemuck::cast_slice(&block))?;
        }
        Ok(())
    }

    fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), SynthError> {
        self.shards
            .write(name, bytes)
            .map_err(|source| SynthError::Io { path: self.folder.to_owned(), source })?;
        self.advance(bytes.len());
        Ok(())
    }

    fn advance(&mut self, n_bytes: usize) {
        self.bytes_done += n_bytes as u64;
        (self.progress)(self.bytes_done, self.shards.total_bytes());
    }

    fn stream(&self, kind: Kind, layer: u32, row: u64) -> Stream {
        Stream::new(self.options.seed, tensor_key(kind, layer), row)
    }

    /// Sign disagreements of the gate at hand with the fresh tokens, `(n_tokens, intermediate_size)`.
    fn fresh_n_neg(&self, x: &[f32]) -> Result<Vec<u32>, SynthError> {
        let d = self.options.hidden_size as usize;
        let f = self.options.intermediate_size as usize;
        let n_words = d.div_ceil(32);
        let mut words = vec![0_u32; f * n_words];
        for (words, row) in words.chunks_exact_mut(n_words).zip(self.weights.chunks_exact(d)) {
            for (word, weights) in words.iter_mut().zip(row.chunks(32)) {
                *word = weights
                    .iter()
                    .enumerate()
                    .fold(0, |word, (bit, weight)| word | u32::from(weight.to_f32() < 0.0) << bit);
            }
        }
        let fresh = self.sample.group(2);
        let mut n_neg = vec![0; fresh.len() * f];
        let signs = SignMatrix { words: &words, n_rows: f, n_words };
        self.cpu.n_neg(&signs, fresh.len(), &x[fresh.start * d..fresh.end * d], &mut n_neg)?;
        Ok(n_neg)
    }

    /// Squared norm of each column of the matrix at hand, `(n_rows, n_cols)`.
    fn column_squared_norms(&self, n_rows: usize, n_cols: usize) -> Vec<f64> {
        let mut sums = vec![0.0_f64; n_cols];
        for row in self.weights.chunks_exact(n_cols).take(n_rows) {
            sums.iter_mut().zip(row).for_each(|(sum, weight)| *sum += f64::from(weight.to_f32()).powi(2));
        }
        sums
    }
}

/// The folder beside the wanted one; removed unless it is renamed.
struct PartialFolder {
    path: PathBuf,
    kept: bool,
}

impl PartialFolder {
    fn create(out_dir: &Path) -> Result<Self, SynthError> {
        let mut name = out_dir.file_name().unwrap_or_default().to_owned();
        if name.is_empty() {
            return Err(option("OUT_DIR", "the name of a folder", out_dir.display()));
        }
        name.push(".partial");
        let path = out_dir.with_file_name(name);
        // What an interrupted run left behind.
        refuse_occupied(&path, true)?;
        remove_checkpoint(&path)?;
        std::fs::create_dir_all(&path).map_err(|source| SynthError::Io { path: path.clone(), source })?;
        Ok(Self { path, kept: false })
    }

    fn rename_to(mut self, out_dir: &Path) -> Result<(), SynthError> {
        remove_checkpoint(out_dir)?;
        std::fs::rename(&self.path, out_dir)
            .map_err(|source| SynthError::Io { path: out_dir.to_owned(), source })?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.kept {
            // The error that brought us here is the one to report.
            let _ = remove_checkpoint(&self.path);
        }
    }
}

/// Refuses a folder with files in it; with `force`, one with files that are no part of a checkpoint.
fn refuse_occupied(folder: &Path, force: bool) -> Result<(), SynthError> {
    for name in file_names(folder)? {
        let foreign = !is_checkpoint_file(&name);
        if foreign || !force {
            return Err(SynthError::Occupied { path: folder.to_owned(), found: name, foreign });
        }
    }
    Ok(())
}

/// Removes a folder whose files have been checked, if it exists.
fn remove_checkpoint(folder: &Path) -> Result<(), SynthError> {
    let io = |source| SynthError::Io { path: folder.to_owned(), source };
    for name in file_names(folder)? {
        std::fs::remove_file(folder.join(name)).map_err(io)?;
    }
    match std::fs::remove_dir(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(error)),
        _ => Ok(()),
    }
}

/// Names in `folder`, sorted; none if it does not exist.
fn file_names(folder: &Path) -> Result<Vec<String>, SynthError> {
    let io = |source| SynthError::Io { path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io(error)),
    };
    let mut names = entries
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(io)?;
    names.sort();
    Ok(names)
}

fn is_checkpoint_file(name: &str) -> bool {
    matches!(
        name,
        "config.json" | "tokenizer.json" | "tokenizer_config.json" | "model.safetensors.index.json"
    ) || name.ends_with(".safetensors")
}

/// Calls `fill(row, row_of_out, buffer)` for every row, over threads; `first_row` is the number of the first one.
fn fill_rows<T: Element>(
    n_threads: usize,
    out: &mut [T],
    n_cols: usize,
    first_row: usize,
    fill: impl Fn(usize, &mut [T], &mut Vec<f32>) + Sync,
) {
    let n_rows_each = (out.len() / n_cols).div_ceil(n_threads).max(1);
    std::thread::scope(|scope| {
        for (part_idx, part) in out.chunks_mut(n_rows_each * n_cols).enumerate() {
            let fill = &fill;
            scope.spawn(move || {
                let mut buffer = Vec::new();
                for (row, out) in part.chunks_exact_mut(n_cols).enumerate() {
                    fill(first_row + part_idx * n_rows_each + row, out, &mut buffer);
                }
            });
        }
    });
}

/// The limit whose share of rows kept is nearest to `share`.
fn sign_rule_point(histogram: &SignHistogram, share: f64) -> SignRulePoint {
    let curve = histogram.curve();
    let nearest = curve
        .iter()
        .min_by(|a, b| (a.rows_kept - share).abs().total_cmp(&(b.rows_kept - share).abs()))
        .expect("a curve has a point for limit 0");
    SignRulePoint {
        limit: nearest.limit,
        rows_kept: nearest.rows_kept,
        recall: nearest.recall,
        missed_energy: nearest.missed_energy,
    }
}

fn kernel_activation(activation: Activation) -> kernels::Activation {
    match activation {
        Activation::Relu => kernels::Activation::Relu,
        Activation::FatRelu { threshold } => kernels::Activation::FatRelu(threshold),
        Activation::Silu => kernels::Activation::Silu,
    }
}

fn tensor_key(kind: Kind, layer: u32) -> u64 {
    u64::from(layer) << 8 | kind as u64
}

fn layer_name(layer: u32, part: &str) -> String {
    format!("model.layers.{layer}.{part}.weight")
}

fn option(name: &'static str, expected: &str, found: impl std::fmt::Display) -> SynthError {
    SynthError::Option { option: name, expected: expected.to_owned(), found: found.to_string() }
}

/// A number of bytes with an optional unit: B, KB, MB, GB (powers of 1000).
fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "K" | "KB" => 1e3,
        "M" | "MB" => 1e6,
        "G" | "GB" => 1e9,
        unit => return Err(format!("expected B, KB, MB or GB, found {unit:?}")),
    };
    match digits.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok((number * unit) as u64),
        _ => Err(format!("expected a number of bytes above 0, found {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn tiny() -> SynthOptions {
        SynthOptions {
            hidden_size: 64,
            intermediate_size: 176,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            vocab_size: 300,
            max_position_embeddings: 128,
            activation: Activation::Relu,
            sparsity: 0.89,
            dtype: DType::F16,
            seed: 3,
            shard_bytes: u64::MAX,
            n_threads: 1,
            force: false,
        }
    }

    fn make(options: &SynthOptions, out_dir: &Path) -> SynthReport {
        generate(options, out_dir, &mut |_, _| ()).unwrap()
    }

    fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
        file_names(folder)
            .unwrap()
            .into_iter()
            .map(|name| {
                let bytes = std::fs::read(folder.join(&name)).unwrap();
                (name, bytes)
            })
            .collect()
    }

    #[test]
    fn fresh_tokens_are_as_sparse_as_asked() {
        let folder = tempfile::tempdir().unwrap();
        for (idx, (activation, sparsity, dtype)) in [
            (Activation::Relu, 0.89, DType::F16),
            (Activation::FatRelu { threshold: 0.01 }, 0.95, DType::Bf16),
            (Activation::FatRelu { threshold: 0.5 }, 0.7, DType::F32),
        ]
        .into_iter()
        .enumerate()
        {
            let options = SynthOptions { activation, sparsity, dtype, ..tiny() };
            let report = make(&options, &folder.path().join(idx.to_string()));
            assert_eq!(report.layers.len(), 2);
            for layer in &report.layers {
                assert!((layer.sparsity - sparsity).abs() < 0.01, "{layer:?}");
                assert!((0.5..3.0).contains(&layer.residual_rms), "{layer:?}");
            }
        }
    }

    #[test]
    fn bytes_depend_on_the_seed_and_not_on_threads_or_shards() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        make(&tiny(), &path("one"));
        make(&SynthOptions { n_threads: 3, ..tiny() }, &path("three"));
        make(&SynthOptions { seed: 4, ..tiny() }, &path("other"));
        let one = files(&path("one"));
        assert!(one == files(&path("three")));
        let other = files(&path("other"));
        assert_eq!(one["tokenizer.json"], other["tokenizer.json"]);
        assert_ne!(one["model.safetensors"], other["model.safetensors"]);

        let report = make(&SynthOptions { shard_bytes: 30_000, ..tiny() }, &path("shards"));
        let shards = files(&path("shards"));
        assert!(report.n_files > 3);
        assert_eq!(shards.keys().filter(|name| name.contains("model")).count(), report.n_files);
        let whole = safetensors::SafeTensors::deserialize(&one["model.safetensors"]).unwrap();
        let mut n_tensors = 0;
        for (name, bytes) in shards.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
            for (tensor, view) in safetensors::SafeTensors::deserialize(bytes).unwrap().tensors() {
                assert_eq!(view.data(), whole.tensor(&tensor).unwrap().data(), "{tensor} in {name}");
                n_tensors += 1;
            }
        }
        assert_eq!(n_tensors, whole.names().len());
        assert_eq!(n_tensors, 3 + 2 * 9);
    }

    #[test]
    fn folders_in_use_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let out_dir = folder.path().join("model");
        std::fs::create_dir(&out_dir).unwrap();
        make(&tiny(), &out_dir);
        let before = files(&out_dir);

        let other = SynthOptions { seed: 4, ..tiny() };
        let error = generate(&other, &out_dir, &mut |_, _| ()).unwrap_err();
        assert!(matches!(error, SynthError::Occupied { foreign: false, .. }), "{error}");
        assert!(error.hint().unwrap().contains("--force"));
        assert!(before == files(&out_dir));

        make(&SynthOptions { force: true, ..other.clone() }, &out_dir);
        assert_ne!(before["model.safetensors"], files(&out_dir)["model.safetensors"]);

        std::fs::write(out_dir.join("notes.txt"), "mine").unwrap();
        let error = generate(&SynthOptions { force: true, ..other }, &out_dir, &mut |_, _| ()).unwrap_err();
        assert!(
            matches!(&error, SynthError::Occupied { foreign: true, found, .. } if found == "notes.txt"),
            "{error}"
        );
        assert!(out_dir.join("notes.txt").exists());
        assert!(!folder.path().join("model.partial").exists());
    }

    #[test]
    fn impossible_shapes_are_refused_by_the_option_they_come_from() {
        let folder = tempfile::tempdir().unwrap();
        for (options, name) in [
            (SynthOptions { hidden_size: 8, ..tiny() }, "--hidden"),
            (SynthOptions { num_attention_heads: 5, ..tiny() }, "--heads"),
            (SynthOptions { num_attention_heads: 64, ..tiny() }, "--heads"),
            (SynthOptions { num_key_value_heads: 3, ..tiny() }, "--kv-heads"),
            (SynthOptions { vocab_size: 259, ..tiny() }, "--vocab"),
            (SynthOptions { sparsity: 0.3, ..tiny() }, "--sparsity"),
            (SynthOptions { sparsity: f64::NAN, ..tiny() }, "--sparsity"),
            (
                SynthOptions { activation: Activation::FatRelu { threshold: f32::NAN }, ..tiny() },
                "--threshold",
            ),
        ] {
            let error = generate(&options, &folder.path().join("model"), &mut |_, _| ()).unwrap_err();
            assert!(matches!(&error, SynthError::Option { option, .. } if *option == name), "{error}");
        }
        assert!(file_names(folder.path()).unwrap().is_empty());
    }

    #[test]
    fn progress_ends_at_the_bytes_of_all_weights() {
        let folder = tempfile::tempdir().unwrap();
        let mut seen = Vec::new();
        let report =
            generate(&tiny(), &folder.path().join("model"), &mut |done, total| seen.push((done, total)))
                .unwrap();
        assert!(seen.is_sorted());
        assert_eq!(*seen.last().unwrap(), (report.weight_bytes, report.weight_bytes));
    }

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, n_bytes) in [("5GB", 5_000_000_000), ("1.5mb", 1_500_000), ("800", 800), ("2K", 2000)] {
            assert_eq!(parse_bytes(text), Ok(n_bytes));
        }
        for text in ["", "GB", "5TB", "-1GB", "0", "nan", "inf"] {
            parse_bytes(text).unwrap_err();
        }
    }
}
