//! The options of `prep synth`: what the command line says, presets and defaults filled in, and checked.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use format_spec::{Activation, DType};

use super::SynthError;
use super::error::option;
use super::vocabulary::MIN_VOCAB_SIZE;

/// Share of zeros when none is asked for: what ProSparse-Llama2 measures.
const DEFAULT_SPARSITY: f64 = 0.89;

/// `prep synth`.
#[derive(Args, Clone, Debug)]
pub struct SynthArgs {
    /// Folder to write; it must not exist or be empty.
    pub out_dir: PathBuf,
    /// Start from a known shape; the other options override it.
    #[arg(long, value_enum, value_name = "NAME", required_unless_present_all = ["hidden", "intermediate", "layers"])]
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
    /// Query heads; divides half the hidden size [default: heads 128 wide, or 64 where 128 does not divide].
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

impl SynthArgs {
    /// Options with presets and defaults filled in.
    ///
    /// # Errors
    /// [`SynthError::Option`] for a threshold or a sparsity that the activation does not have, and for a width whose
    /// heads have no default.
    pub fn options(&self) -> Result<SynthOptions, SynthError> {
        let preset = self.shape.map(ShapePreset::dimensions);
        let (hidden, intermediate, layers) = preset.unwrap_or_default();
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
        let hidden = self.hidden.unwrap_or(hidden);
        let heads = match self.heads {
            Some(heads) => heads,
            None if hidden.is_multiple_of(128) => hidden / 128,
            None if hidden.is_multiple_of(64) => hidden / 64,
            None => {
                let expected = format!("a number of heads, as 64 does not divide the hidden size {hidden}");
                return Err(option("--heads", &expected, "none"));
            }
        };
        Ok(SynthOptions {
            hidden_size: hidden,
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
    /// Hidden size, intermediate size, layers. Heads are 128 wide in all.
    fn dimensions(self) -> (u32, u32, u32) {
        match self {
            Self::Bench2048 => (2048, 5504, 16),
            Self::Prosparse7b => (4096, 11008, 32),
            Self::Prosparse13b => (5120, 13824, 40),
        }
    }
}

impl SynthOptions {
    /// Width of one head.
    pub(super) fn head_dim(&self) -> u32 {
        self.hidden_size / self.num_attention_heads
    }

    pub(super) fn check(&self) -> Result<(), SynthError> {
        // The upper bounds only keep a slip of the keyboard from asking for more memory than there is.
        for (name, value, range) in [
            ("--hidden", self.hidden_size, 16..=1 << 16),
            ("--intermediate", self.intermediate_size, 16..=1 << 18),
            ("--layers", self.num_hidden_layers, 1..=1 << 10),
            ("--heads", self.num_attention_heads, 1..=self.hidden_size / 2),
            ("--kv-heads", self.num_key_value_heads, 1..=self.num_attention_heads),
            ("--vocab", self.vocab_size, MIN_VOCAB_SIZE..=1 << 20),
            ("--context", self.max_position_embeddings, 2..=1 << 24),
        ] {
            if !range.contains(&value) {
                return Err(option(name, &format!("{} to {}", range.start(), range.end()), value));
            }
        }
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
    pub(super) fn is_sparse(&self) -> bool {
        self.activation != Activation::Silu
    }
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

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, n_bytes) in [("5GB", 5_000_000_000), ("1.5mb", 1_500_000), ("800", 800), ("2K", 2000)] {
            assert_eq!(parse_bytes(text), Ok(n_bytes));
        }
        for text in ["", "GB", "5TB", "-1GB", "0", "nan", "inf"] {
            parse_bytes(text).unwrap_err();
        }
    }

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: SynthArgs,
    }

    fn parse(line: &str) -> SynthArgs {
        <Command as clap::Parser>::try_parse_from(["synth"].into_iter().chain(line.split(' '))).unwrap().args
    }

    #[test]
    fn a_preset_fills_in_what_is_not_given() {
        let options = parse("--shape prosparse-7b --layers 2 --dtype f32 --seed 9 out").options().unwrap();
        assert_eq!((options.hidden_size, options.intermediate_size), (4096, 11008));
        assert_eq!((options.num_hidden_layers, options.num_attention_heads), (2, 32));
        assert_eq!(options.activation, Activation::FatRelu { threshold: 0.01 });
        assert_eq!((options.dtype, options.seed, options.vocab_size), (DType::F32, 9, 32_000));
        options.check().unwrap();
    }

    #[test]
    fn heads_have_a_width_of_128_or_64_unless_their_number_is_given() {
        let dimensions = "--intermediate 176 --layers 2 --sparsity 0.9 out";
        for (hidden, heads, kv_heads) in
            [("2048", 16, 16), ("192", 3, 3), ("96 --heads 6 --kv-heads 2", 6, 2)]
        {
            let options = parse(&format!("--hidden {hidden} {dimensions}")).options().unwrap();
            assert_eq!((options.num_attention_heads, options.num_key_value_heads), (heads, kv_heads));
            assert_eq!(options.activation, Activation::Relu);
            options.check().unwrap();
        }
        let error = parse(&format!("--hidden 96 {dimensions}")).options().unwrap_err();
        assert!(matches!(error, SynthError::Option { option: "--heads", .. }), "{error}");
    }

    #[test]
    fn options_that_an_activation_does_not_have_are_refused() {
        for (extra, name) in [
            ("--activation silu --sparsity 0.9", "--sparsity"),
            ("--activation silu --threshold 0.1", "--threshold"),
            ("--threshold 0.1", "--threshold"),
        ] {
            let error = parse(&format!("--shape bench-2048 {extra} out")).options().unwrap_err();
            assert!(matches!(error, SynthError::Option { option, .. } if option == name), "{error}");
        }
    }

    #[test]
    fn a_shape_or_its_dimensions_are_needed() {
        for line in ["out", "--hidden 64 --layers 2 out", "--shape bench-2048"] {
            let words = ["synth"].into_iter().chain(line.split(' '));
            assert!(<Command as clap::Parser>::try_parse_from(words).is_err(), "{line}");
        }
    }
}
