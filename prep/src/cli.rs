//! Flags and help text.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use format_spec::DType;
use runtime::N_THREADS_MAX;
use runtime::device::Device;

use crate::synth::SynthArgs;
use crate::{
    CalibrationOptions, Contender, ConvertOptions, EvalOptions, Kind, LowRankOptions, Predictor,
    ReportOptions, Target,
};

/// Converts ReLU-sparse Hugging Face checkpoints to .sinf files.
#[derive(Parser, Debug)]
#[command(name = "prep", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Convert a model folder to one .sinf file, choosing each layer's predictor.
    Convert(ConvertArgs),
    /// Compare predictors on a text: rows kept, divergence from the dense model, bytes read.
    Eval(EvalArgs),
    /// Write a page about a .sinf file: bytes a token, layers, bytes against quality, provenance.
    Report(ReportArgs),
    /// Show what is in a .sinf file.
    Inspect(InspectArgs),
    /// Check every byte of a .sinf file against its checksums.
    Verify(VerifyArgs),
    /// Make a synthetic checkpoint of any Llama shape, as sparse as asked.
    Synth(SynthArgs),
}

/// `prep convert`.
#[derive(Args, Clone, Debug)]
#[command(after_long_help = "\
Examples:
  prep convert ProSparse-Llama-2-7b/ prosparse-7b.sinf
  prep convert model/ out.sinf --alpha 1               the rule of SparseInfer (arXiv 2411.12692) as it stands
  prep convert model/ out.sinf --alpha 1.02x20,1x12    its setting: a margin in the first 20 of 32 layers

A row is skipped when n_neg > alpha * n_pos: n_neg of its signs disagree with the signs of the input, n_pos agree.")]
pub struct ConvertArgs {
    /// Folder with config.json, safetensors shards, and tokenizer.json or tokenizer.model.
    pub model_dir: PathBuf,
    /// File to write; OUT.partial lies beside it until it is complete.
    pub out: PathBuf,
    /// Type of the weights; auto keeps f16 and bf16 and turns f32 into f16.
    #[arg(long, value_enum, default_value = "auto", value_name = "TYPE")]
    pub dtype: DTypeName,
    /// Predictor of every layer [default: chosen for each; exact for silu]. sign: signs of weights and input
    /// (SparseInfer); sign-x8: signs of weights, input in 8 bits; w2, w3: weights in 2 or 3 bits; low-rank or
    /// low-rank:RANK: two thin matrices (SVDP); low-rank-sign: thinner ones, and signs of what they leave out; exact:
    /// every gate row.
    #[arg(long, value_name = "NAME", value_parser = PredictorName::parse)]
    pub predictor: Option<PredictorName>,
    /// Folder of trained predictors to take for every layer where they save bytes: fc1.weight and fc2.weight of layer N
    /// in model_N.safetensors, or as layers.N.fc1.weight (PowerInfer, Deja Vu).
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["predictor", "alpha"])]
    pub import_predictor: Option<PathBuf>,
    /// What lies between the two: relu as in PowerInfer's, none as in Deja Vu's [default: relu].
    #[arg(long, value_enum, value_name = "NAME", requires = "import_predictor")]
    pub import_activation: Option<ImportActivation>,
    /// Ratio of the sign rule, one value or one for each layer (1.02x20 stands for 20 of 1.02), instead of
    /// calibration.
    #[arg(
        long,
        value_name = "X[,X...]",
        value_parser = parse_alphas,
        conflicts_with_all = ["calibration", "calibration_tokens", "target_kl", "target_missed_energy"]
    )]
    pub alpha: Option<Alphas>,
    /// UTF-8 text to calibrate on [default: built-in prose].
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Most tokens to calibrate on [default: 4096]. On two busy cores: 2 to 3 s for 8 million
    /// weights, 4 to 5 minutes for 1 billion in 16 layers of 2048 columns.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub calibration_tokens: Option<u32>,
    /// Largest mean KL divergence from the dense model, in nats, shared over the layers so that the fewest bytes are
    /// read [default: 0.0007].
    #[arg(long, value_name = "KL", value_parser = parse_divergence, conflicts_with = "target_missed_energy")]
    pub target_kl: Option<f64>,
    /// Instead: the largest share of each layer's MLP output energy that skipped rows may have, 0 to 1.
    #[arg(long, value_name = "E", value_parser = parse_share)]
    pub target_missed_energy: Option<f64>,
    /// Threads; 0 takes one for each available core. The output does not depend on it.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = parse_threads)]
    pub threads: usize,
    /// Where the model runs on the calibration text: cpu, cuda, cuda:N, or auto for the first GPU with room for it. Sums
    /// come in another order on each, so what is chosen differs a little.
    #[arg(long, default_value_t = Device::Cpu, value_name = "NAME")]
    pub device: Device,
    /// Replace an existing OUT.
    #[arg(long)]
    pub force: bool,
    /// Print a summary as JSON.
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors (and --json).
    #[arg(long)]
    pub quiet: bool,
}

/// Most tokens that kinds are compared on.
const DEFAULT_EVAL_TOKENS: u32 = 8192;

/// `prep eval`.
#[derive(Args, Clone, Debug)]
pub struct EvalArgs {
    /// A .sinf file made for prediction.
    pub file: PathBuf,
    /// UTF-8 text to measure on; not the one that the file was calibrated with.
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Most tokens of it; fewer where their dense logits take more than 256 MiB.
    #[arg(long, default_value_t = DEFAULT_EVAL_TOKENS, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: u32,
    /// What to compare: dense, exact, stored (the file's own), auto (the best for each layer), sign, sign-x8, low-rank,
    /// low-rank-sign, w2, w3, alpha=X (the rule of SparseInfer) [default: all, with seven alphas].
    #[arg(long, value_name = "NAME[,NAME...]", value_delimiter = ',', value_parser = Contender::parse)]
    pub predictors: Vec<Contender>,
    /// Most tokens of the built-in text that kinds are fitted on.
    #[arg(long, default_value_t = CalibrationOptions::DEFAULT.n_tokens, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub calibration_tokens: u32,
    /// Rank of low-rank and low-rank-sign [default: in bytes the share of the gate that 256 has at 7B; a third of it].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rank: Option<u32>,
    /// Threads; 0 takes one for each available core.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = parse_threads)]
    pub threads: usize,
    /// Where the model runs on both texts and decodes: cpu, cuda, cuda:N, or auto for the first GPU with room for it. Sums
    /// come in another order on each, so what is chosen differs a little.
    #[arg(long, default_value_t = Device::Cpu, value_name = "NAME")]
    pub device: Device,
    /// Print JSON, with every contender's rows by layer.
    #[arg(long)]
    pub json: bool,
}

impl EvalArgs {
    /// The library's options.
    pub fn options(&self) -> EvalOptions {
        let is_default = self.predictors.is_empty();
        EvalOptions {
            text: self.text.clone(),
            n_tokens: self.tokens,
            contenders: if is_default { Contender::defaults() } else { self.predictors.clone() },
            calibration_tokens: self.calibration_tokens,
            rank: self.rank,
            n_threads: self.threads,
            device: self.device,
        }
    }
}

/// `prep report`.
#[derive(Args, Clone, Debug)]
pub struct ReportArgs {
    /// A .sinf file.
    pub file: PathBuf,
    /// HTML page to write; OUT.partial lies beside it until it is complete.
    #[arg(short, long, value_name = "OUT")]
    pub out: PathBuf,
    /// UTF-8 text to measure every kind of predictor on, as prep eval does [default: show what the file holds].
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Most tokens of it [default: that of prep eval].
    #[arg(long, requires = "text", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: Option<u32>,
    /// Most tokens of the built-in text that kinds are fitted on [default: that of prep eval].
    #[arg(long, requires = "text", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub calibration_tokens: Option<u32>,
    /// Threads; 0 takes one for each available core [default: 0].
    #[arg(long, requires = "text", value_name = "N", value_parser = parse_threads)]
    pub threads: Option<usize>,
    /// Where the model runs, as for prep eval [default: cpu].
    #[arg(long, requires = "text", value_name = "NAME")]
    pub device: Option<Device>,
    /// Replace an existing OUT.
    #[arg(long)]
    pub force: bool,
    /// Print nothing but errors.
    #[arg(long)]
    pub quiet: bool,
}

impl ReportArgs {
    /// The library's options.
    pub fn options(&self) -> ReportOptions {
        let eval = self.text.as_ref().map(|text| EvalOptions {
            text: text.clone(),
            n_tokens: self.tokens.unwrap_or(DEFAULT_EVAL_TOKENS),
            contenders: Contender::defaults(),
            calibration_tokens: self.calibration_tokens.unwrap_or(CalibrationOptions::DEFAULT.n_tokens),
            rank: None,
            n_threads: self.threads.unwrap_or(0),
            device: self.device.unwrap_or(Device::Cpu),
        });
        ReportOptions { out: self.out.clone(), force: self.force, eval }
    }
}

/// `prep inspect`.
#[derive(Args, Clone, Debug)]
pub struct InspectArgs {
    /// A .sinf file.
    pub file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// List every section with type, shape, place and checksum.
    #[arg(long)]
    pub tensors: bool,
}

/// `prep verify`.
#[derive(Args, Clone, Debug)]
pub struct VerifyArgs {
    /// A .sinf file.
    pub file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Types of weights on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the names say it")]
pub enum DTypeName {
    Auto,
    F32,
    F16,
    Bf16,
}

/// A predictor on the command line: a kind, and `:RANK` where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PredictorName {
    kind: Kind,
    rank: Option<u32>,
}

impl PredictorName {
    fn parse(text: &str) -> Result<Self, String> {
        let (name, rank) = text.split_once(':').map_or((text, None), |(name, rank)| (name, Some(rank)));
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == name) else {
            let names = Kind::ALL.map(Kind::name).join(", ");
            return Err(format!("expected one of {names}, found {name:?}"));
        };
        let rank = match rank {
            None => None,
            Some(rank) if kind.has_factors() => {
                let parsed = rank.parse().ok().filter(|rank| *rank > 0);
                Some(
                    parsed
                        .ok_or_else(|| format!("expected a rank from 1 to {}, found {rank:?}", u32::MAX))?,
                )
            }
            Some(rank) => return Err(format!("expected no rank for {name}, found {rank:?}")),
        };
        Ok(Self { kind, rank })
    }
}

/// What lies between the factors of an imported predictor, on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the names say it")]
pub enum ImportActivation {
    Relu,
    None,
}

/// Values of `--alpha`, repetitions written out.
#[derive(Clone, Debug, PartialEq)]
pub struct Alphas(pub Vec<f64>);

/// Most values of `--alpha`: more layers than any model has.
const MAX_ALPHAS: usize = 4096;

impl ConvertArgs {
    /// The library's options.
    ///
    /// # Errors
    /// A usage error if `--predictor exact` meets an option of the sign predictor.
    pub fn options(&self) -> Result<ConvertOptions, clap::Error> {
        let calibrates = self.calibration.is_some()
            || self.calibration_tokens.is_some()
            || self.target_kl.is_some()
            || self.target_missed_energy.is_some()
            || self.import_predictor.is_some();
        let kind = self.predictor.map(|name| name.kind);
        let predictor = match (kind, &self.alpha) {
            (Some(Kind::Exact), alpha) => {
                if alpha.is_some() || calibrates {
                    let message = "--predictor exact has no use for --alpha, --calibration, \
                                   --calibration-tokens, --target-kl or --target-missed-energy";
                    return Err(Cli::command().error(ErrorKind::ArgumentConflict, message));
                }
                Some(Predictor::Exact)
            }
            (None | Some(Kind::Sign), Some(Alphas(alphas))) => Some(Predictor::Alpha(alphas.clone())),
            (Some(_), Some(_)) => {
                let message = "--alpha is the ratio of --predictor sign";
                return Err(Cli::command().error(ErrorKind::ArgumentConflict, message));
            }
            (None, None) if !calibrates => None,
            (_, None) => {
                let default = CalibrationOptions::DEFAULT;
                Some(Predictor::Calibrated(CalibrationOptions {
                    text: self.calibration.clone(),
                    n_tokens: self.calibration_tokens.unwrap_or(default.n_tokens),
                    target: match (self.target_kl, self.target_missed_energy) {
                        (_, Some(target)) => Target::MissedEnergy(target),
                        (Some(target), None) => Target::Divergence(target),
                        (None, None) => default.target,
                    },
                    kind,
                    low_rank: match &self.import_predictor {
                        Some(folder) => LowRankOptions::Imported {
                            folder: folder.clone(),
                            relu: self.import_activation != Some(ImportActivation::None),
                        },
                        None => LowRankOptions::Fitted { rank: self.predictor.and_then(|name| name.rank) },
                    },
                }))
            }
        };
        Ok(ConvertOptions {
            dtype: match self.dtype {
                DTypeName::Auto => None,
                DTypeName::F32 => Some(DType::F32),
                DTypeName::F16 => Some(DType::F16),
                DTypeName::Bf16 => Some(DType::Bf16),
            },
            predictor,
            n_threads: self.threads,
            device: self.device,
            force: self.force,
        })
    }
}

/// `X`, `X,Y`, `XxN,YxM`: X finite and not negative, N a number of layers.
fn parse_alphas(text: &str) -> Result<Alphas, String> {
    let mut alphas = Vec::new();
    for part in text.split(',') {
        let (alpha, n) = part.split_once('x').unwrap_or((part, "1"));
        let alpha = alpha.trim().parse().ok().filter(|alpha: &f64| alpha.is_finite() && *alpha >= 0.0);
        let alpha = alpha.ok_or_else(|| format!("expected a number of at least 0, found {part:?}"))?;
        let n = n.trim().parse().ok().filter(|n| (1..=MAX_ALPHAS - alphas.len()).contains(n));
        let n = n.ok_or_else(|| {
            format!("expected a number of layers up to {MAX_ALPHAS} in all, found {part:?}")
        })?;
        alphas.extend(std::iter::repeat_n(alpha, n));
    }
    Ok(Alphas(alphas))
}

/// A finite number above 0.
fn parse_divergence(text: &str) -> Result<f64, String> {
    let divergence = text.parse().ok().filter(|kl: &f64| *kl > 0.0 && kl.is_finite());
    divergence.ok_or_else(|| format!("expected a number above 0, found {text:?}"))
}

/// A number of threads.
fn parse_threads(text: &str) -> Result<usize, String> {
    let n_threads = text.parse().ok().filter(|n_threads| *n_threads <= N_THREADS_MAX);
    n_threads.ok_or_else(|| format!("expected a whole number from 0 to {N_THREADS_MAX}, found {text:?}"))
}

/// A number from 0 to 1.
fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| format!("expected a number from 0 to 1, found {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<ConvertOptions, clap::Error> {
        let cli = Cli::try_parse_from("prep convert m o".split(' ').chain(line.split_whitespace()))?;
        let Command::Convert(args) = cli.command else { panic!("{:?}", cli.command) };
        args.options()
    }

    fn alphas(line: &str) -> Vec<f64> {
        match parse(line).expect("accepted").predictor {
            Some(Predictor::Alpha(alphas)) => alphas,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn alphas_are_lists_with_repetitions() {
        assert_eq!(alphas("--alpha 1.05"), [1.05]);
        assert_eq!(alphas("--alpha 1.1,1.05,1"), [1.1, 1.05, 1.0]);
        assert_eq!(alphas("--alpha 1.02x3,1x2 --predictor sign"), [1.02, 1.02, 1.02, 1.0, 1.0]);
        for bad in ["", "nan", "inf", "-1", "1,", "1x", "1x0", "1x5000", "1x4000,1x97", "x3", "1x2x3"] {
            let error = parse(&format!("--alpha={bad}")).expect_err("refused");
            assert_eq!(error.exit_code(), 2, "{bad:?}");
        }
    }

    #[test]
    fn options_of_different_predictors_conflict() {
        for line in [
            "--alpha 1 --calibration text",
            "--alpha 1 --calibration-tokens 5",
            "--alpha 1 --target-missed-energy 0.1",
            "--predictor exact --alpha 1",
            "--predictor exact --calibration text",
            "--predictor exact --target-missed-energy 0.1",
            "--calibration-tokens 0",
            "--target-missed-energy 1.5",
            "--target-missed-energy nan",
            "--target-kl 0",
            "--target-kl inf",
            "--target-kl 0.001 --target-missed-energy 0.01",
            "--predictor w2 --alpha 1",
            "--predictor exact --target-kl 0.1",
            "--predictor low-rank:0",
            "--predictor low-rank:x",
            "--predictor low-rank --alpha 1",
            "--predictor low-rank-relu",
            "--predictor w2:4",
            "--import-predictor folder --predictor w2",
            "--import-predictor folder --alpha 1",
            "--import-activation none",
        ] {
            assert_eq!(parse(line).expect_err(line).exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn what_is_not_said_is_the_librarys_default() {
        assert!(parse("").expect("accepted").predictor.is_none());
        let Some(Predictor::Calibrated(options)) = parse("--predictor sign").expect("accepted").predictor
        else {
            panic!("sign without alpha calibrates");
        };
        assert_eq!(
            options,
            CalibrationOptions { kind: Some(Kind::Sign), ..CalibrationOptions::DEFAULT.clone() }
        );
        let low_rank = |line: &str| match parse(line).expect("accepted").predictor {
            Some(Predictor::Calibrated(options)) => (options.kind, options.low_rank),
            other => panic!("{other:?}"),
        };
        let fitted = |rank| (Some(Kind::LowRank), LowRankOptions::Fitted { rank });
        assert_eq!(low_rank("--predictor low-rank"), fitted(None));
        assert_eq!(low_rank("--predictor low-rank:64"), fitted(Some(64)));
        for (line, relu) in
            [("", true), (" --import-activation relu", true), (" --import-activation none", false)]
        {
            let imported = LowRankOptions::Imported { folder: "p".into(), relu };
            assert_eq!(low_rank(&format!("--import-predictor p{line}")), (None, imported));
        }
        let target = |line: &str| match parse(line).expect("accepted").predictor {
            Some(Predictor::Calibrated(options)) => options.target,
            other => panic!("{other:?}"),
        };
        let device = |line: &str| parse(line).expect("accepted").device;
        assert_eq!((device(""), device("--device cuda:1")), (Device::Cpu, Device::Cuda(1)));
        assert_eq!(target("--target-kl 0.01"), Target::Divergence(0.01));
        assert_eq!(target("--target-missed-energy 0.01"), Target::MissedEnergy(0.01));
    }

    #[test]
    fn eval_runs_where_it_is_told_to() {
        let device = |line: &str| {
            let cli = Cli::try_parse_from("prep eval f --text t".split(' ').chain(line.split_whitespace()));
            match cli.expect(line).command {
                Command::Eval(args) => args.options().device,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!([device(""), device("--device auto")], [Device::Cpu, Device::Auto]);
        assert_eq!([device("--device cuda"), device("--device cuda:1")], [Device::Cuda(0), Device::Cuda(1)]);
    }

    #[test]
    fn threads_have_an_end() {
        assert_eq!(parse("--threads 1024").expect("accepted").n_threads, 1024);
        for bad in ["1025", "-1", "x", "18446744073709551616"] {
            let error = parse(&format!("--threads={bad}")).expect_err("refused").to_string();
            assert!(error.contains("0 to 1024") && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn report_measures_where_it_is_told_to() {
        let parse = |line: &str| Cli::try_parse_from(line.split_whitespace());
        let device = |line: &str| match parse(line).expect(line).command {
            Command::Report(args) => args.options().eval.expect("a text").device,
            other => panic!("{other:?}"),
        };
        assert_eq!(device("prep report f -o page --text t"), Device::Cpu);
        assert_eq!(device("prep report f -o page --text t --device cuda:1"), Device::Cuda(1));
        let error = parse("prep report f -o page --device cuda").expect_err("nothing to measure");
        assert!(error.to_string().contains("--text"), "{error}");
    }

    /// The help states the defaults in words.
    #[test]
    fn help_states_the_defaults() {
        let CalibrationOptions { n_tokens, target, .. } = CalibrationOptions::DEFAULT;
        let Target::Divergence(target) = target else { panic!("{target:?}") };
        let mut command = Cli::command();
        let convert = command.find_subcommand_mut("convert").expect("there").render_long_help().to_string();
        let convert = convert.split_whitespace().collect::<Vec<_>>().join(" ");
        for default in [format!("[default: {n_tokens}]"), format!("[default: {target}]")] {
            assert!(convert.contains(&default), "no {default} in: {convert}");
        }
    }
}
