//! Flags and help text. Names and defaults follow llama.cpp where it has them.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::builder::PossibleValuesParser;
use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory, Parser, ValueEnum};

use runtime::chat::ChatFormat;
use runtime::device::Device;
use runtime::sampler::SamplerOptions;
use runtime::{AuditOptions, MlpMode, N_THREADS_MAX};

/// Generates text with a .sinf model, reading only the MLP rows that its predictor keeps.
#[derive(Debug, Parser)]
#[command(
    name = "runtime",
    version,
    disable_help_flag = true,
    after_help = "Text goes to stdout, statistics and errors to stderr. \
                  Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted."
)]
pub(crate) struct Cli {
    /// Model, made by `prep convert`
    #[arg(value_name = "FILE", required_unless_present = "list_devices")]
    pub(crate) file: Option<PathBuf>,

    /// Print this help and stop
    #[arg(short, long, action = ArgAction::HelpShort)]
    help: Option<bool>,

    /// Prompt; with --bench, its number of tokens [bench default: 512]
    #[arg(short, long, value_name = "TEXT", help_heading = "Prompt", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Read the prompt from a file, - for stdin; a newline at its end is left out
    #[arg(
        short = 'f',
        long = "file",
        value_name = "PATH",
        help_heading = "Prompt",
        conflicts_with = "prompt"
    )]
    prompt_file: Option<PathBuf>,
    /// Put the prompt in a chat format
    #[arg(long, value_name = "NAME", help_heading = "Prompt", value_parser = chat_names())]
    chat: Option<String>,
    /// Do not repeat the prompt before the text
    #[arg(long, help_heading = "Prompt")]
    pub(crate) no_display_prompt: bool,

    /// Most tokens to generate, -1 until the context is full [default: -1, with --bench: 128]
    #[arg(
        short = 'n',
        long,
        value_name = "N",
        help_heading = "Text",
        allow_negative_numbers = true,
        value_parser = predict_count
    )]
    predict: Option<Predict>,
    /// Context, prompt and text together [default: the model's maximum]
    #[arg(short, long, value_name = "N", help_heading = "Text", value_parser = count(1..=usize::MAX))]
    pub(crate) ctx_size: Option<usize>,
    /// End the text before this string; may be given several times
    #[arg(long, value_name = "STR", help_heading = "Text", allow_hyphen_values = true, value_parser = not_empty)]
    pub(crate) stop: Vec<String>,
    /// Never choose a token that ends the text
    #[arg(long, help_heading = "Text")]
    pub(crate) ignore_eos: bool,

    /// Seed of the draw and of audits, -1 for a random one, which the statistics tell
    #[arg(
        short,
        long,
        value_name = "N",
        help_heading = "Sampling",
        allow_negative_numbers = true,
        default_value = "-1",
        value_parser = seed
    )]
    seed: Seed,
    /// Temperature, 0 takes the most probable token
    #[arg(long, value_name = "X", help_heading = "Sampling", default_value_t = SamplerOptions::default().temp, value_parser = number(0.0..=100.0))]
    temp: f64,
    /// Keep the K most probable tokens, 0 keeps all
    #[arg(long, value_name = "K", help_heading = "Sampling", default_value_t = SamplerOptions::default().top_k, value_parser = count(0..=usize::MAX))]
    top_k: usize,
    /// Keep the fewest tokens whose probabilities sum to P, 1 keeps all
    #[arg(long, value_name = "P", help_heading = "Sampling", default_value_t = SamplerOptions::default().top_p, value_parser = number(0.0..=1.0))]
    top_p: f64,
    /// Keep tokens at least P times as probable as the best, 0 keeps all
    #[arg(long, value_name = "P", help_heading = "Sampling", default_value_t = SamplerOptions::default().min_p, value_parser = number(0.0..=1.0))]
    min_p: f64,
    /// Lower the logits of the last 64 tokens by this factor, 1 leaves them
    #[arg(long, value_name = "X", help_heading = "Sampling", default_value_t = SamplerOptions::default().repeat_penalty, value_parser = number(0.01..=100.0))]
    repeat_penalty: f64,

    /// auto, cpu, cuda or cuda:N; one that is missing is an error
    #[arg(long, value_name = "NAME", help_heading = "Machine", default_value_t = Device::Auto)]
    pub(crate) device: Device,
    /// Threads, 0 for one on each core
    #[arg(short, long, value_name = "N", help_heading = "Machine", default_value_t = 0, value_parser = count(0..=N_THREADS_MAX))]
    pub(crate) threads: usize,
    /// MLP rows that decoding reads: those kept by the stored predictor, those that are active, or all
    #[arg(long, value_enum, value_name = "MODE", help_heading = "Machine", default_value_t = Predictor::Stored)]
    pub(crate) predictor: Predictor,
    /// Mean KL divergence from the dense model that predictions may have: limits from the file's curve in place of those
    /// that it was converted for
    #[arg(long, value_name = "KL", help_heading = "Machine", value_parser = number(1e-9..=100.0), conflicts_with = "alpha_scale")]
    pub(crate) budget: Option<f64>,
    /// Factor on the alphas, for files whose predictors have them (sign): above 1 keeps more rows, below 1 fewer
    #[arg(long, value_name = "X", help_heading = "Machine", default_value_t = 1.0, value_parser = number(0.01..=100.0))]
    pub(crate) alpha_scale: f64,
    /// Look at a sample of the rows left out in one of every N tokens decoded, and estimate recall and missed energy
    #[arg(long, value_name = "N", help_heading = "Machine", value_parser = count(1..=1_000_000))]
    audit: Option<usize>,
    /// Hold the missed energy that the file or the budget states by moving the limits after audits [audit default: 32]
    #[arg(long, help_heading = "Machine")]
    adaptive: bool,
    /// List devices and stop
    #[arg(long, help_heading = "Machine")]
    list_devices: bool,
    /// Measure the read bandwidth of each device of --list-devices
    #[arg(long, help_heading = "Machine")]
    measure: bool,

    /// Print one JSON object instead of text
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
    /// Add the K largest logits of each step to the JSON object
    #[arg(long, value_name = "K", help_heading = "Output", default_value_t = 0, value_parser = count(0..=usize::MAX))]
    pub(crate) logits: usize,
    /// Show no progress on a terminal
    #[arg(long, help_heading = "Output")]
    pub(crate) quiet: bool,
    /// Add rows by layer to the statistics; with --bench on a GPU (md and json), where a decoded token's time goes
    #[arg(long, help_heading = "Output")]
    pub(crate) verbose: bool,

    /// Verify every checksum of the file first
    #[arg(long, help_heading = "Measure")]
    pub(crate) check: bool,
    /// Measure the speed of a prompt (-p) and of decoding (-n): dense, exact, predicted
    #[arg(long, help_heading = "Measure", conflicts_with_all = ["prompt_file", "chat", "json", "perplexity"])]
    bench: bool,
    /// Repetitions of --bench [default: 5]
    #[arg(short, long, value_name = "N", help_heading = "Measure", value_parser = count(1..=10_000))]
    repetitions: Option<usize>,
    /// Format of --bench [default: md]
    #[arg(long, value_enum, value_name = "FORMAT", help_heading = "Measure")]
    output: Option<Table>,
    /// Shares of gate rows for --bench to keep, above 0 and at most 1: a row for each, under limits found by measuring.
    /// A layer has one whole limit, which moves its share by some 0.8 / sqrt(hidden_size); layers make up for each other
    #[arg(long, value_name = "S[,S...]", help_heading = "Measure", value_delimiter = ',', value_parser = share)]
    keep_share: Vec<f64>,
    /// Measure perplexity over a text file, - for stdin, in windows of the context
    #[arg(long, value_name = "TEXT", help_heading = "Measure", conflicts_with_all = ["prompt", "prompt_file", "chat"])]
    perplexity: Option<PathBuf>,
    /// Compare with the model's own dense run: KL divergence, top-1 agreement
    #[arg(long, help_heading = "Measure")]
    kl: bool,
    /// Most windows of --perplexity
    #[arg(long, value_name = "N", help_heading = "Measure", value_parser = count(1..=usize::MAX))]
    windows: Option<usize>,
}

/// Tokens between two audits where `--adaptive` asks for them.
const N_AUDIT: usize = 32;
const N_BENCH_PROMPT: usize = 512;
const N_BENCH_DECODE: usize = 128;
const N_BENCH_REPETITIONS: usize = 5;

/// Value of `--predict`: none for as many as the context holds.
#[derive(Clone, Copy, Debug)]
struct Predict(Option<usize>);

/// Value of `--seed`: none for a random one.
#[derive(Clone, Copy, Debug)]
struct Seed(Option<u64>);

/// Values of `--predictor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Predictor {
    Stored,
    Exact,
    Dense,
}

impl Predictor {
    pub(crate) fn mode(self) -> MlpMode {
        match self {
            Self::Stored => MlpMode::Stored,
            Self::Exact => MlpMode::Exact,
            Self::Dense => MlpMode::Dense,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Exact => "exact",
            Self::Dense => "dense",
        }
    }
}

/// Values of `--output`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Table {
    Md,
    Csv,
    Json,
}

/// Where a text comes from.
#[derive(Debug)]
pub(crate) enum Source<'a> {
    Text(&'a str),
    File(&'a Path),
    Stdin,
}

impl<'a> Source<'a> {
    fn path(path: &'a Path) -> Self {
        if path.as_os_str() == "-" { Self::Stdin } else { Self::File(path) }
    }

    /// What errors call it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Text(_) => "prompt".to_owned(),
            Self::File(path) => path.display().to_string(),
            Self::Stdin => "stdin".to_owned(),
        }
    }
}

/// What to do, flags that belong together checked.
#[derive(Debug)]
pub(crate) enum Action<'a> {
    ListDevices {
        measure: bool,
    },
    Check {
        file: &'a Path,
    },
    Generate {
        file: &'a Path,
        prompt: Source<'a>,
        chat: Option<&'static ChatFormat>,
        n_predict: Option<usize>,
    },
    Bench {
        file: &'a Path,
        n_prompt: usize,
        n_decode: usize,
        n_repetitions: usize,
        keep_shares: &'a [f64],
        output: Table,
    },
    Perplexity {
        file: &'a Path,
        text: Source<'a>,
        kl: bool,
        n_windows: Option<usize>,
    },
}

impl Cli {
    /// The action that the flags ask for.
    ///
    /// # Errors
    /// What clap prints and exits with code 2 for.
    pub(crate) fn action(&self) -> Result<Action<'_>, clap::Error> {
        if self.list_devices {
            return Ok(Action::ListDevices { measure: self.measure });
        }
        let Some(file) = self.file.as_deref() else {
            return Err(usage(ErrorKind::MissingRequiredArgument, "FILE is missing"));
        };
        self.check_companions()?;
        if self.bench {
            return self.bench_action(file);
        }
        if let Some(text) = &self.perplexity {
            return Ok(Action::Perplexity {
                file,
                text: Source::path(text),
                kl: self.kl,
                n_windows: self.windows,
            });
        }
        let prompt = match (&self.prompt, &self.prompt_file) {
            (Some(prompt), _) => Source::Text(prompt),
            (None, Some(path)) => Source::path(path),
            (None, None) if self.check => return Ok(Action::Check { file }),
            (None, None) => {
                return Err(usage(
                    ErrorKind::MissingRequiredArgument,
                    "there is no prompt: give one with -p TEXT or -f PATH (-f - reads stdin)",
                ));
            }
        };
        let chat = self.chat.as_deref().and_then(ChatFormat::from_name);
        Ok(Action::Generate { file, prompt, chat, n_predict: self.predict.and_then(|predict| predict.0) })
    }

    /// That flags of one action do not come without it. clap's `requires` gives way to its `conflicts_with`.
    fn check_companions(&self) -> Result<(), clap::Error> {
        for (flag, is_given, action, is_asked) in [
            ("--repetitions", self.repetitions.is_some(), "--bench", self.bench),
            ("--output", self.output.is_some(), "--bench", self.bench),
            ("--keep-share", !self.keep_share.is_empty(), "--bench", self.bench),
            ("--logits", self.logits > 0, "--json", self.json),
            ("--measure", self.measure, "--list-devices", self.list_devices),
            ("--kl", self.kl, "--perplexity", self.perplexity.is_some()),
            ("--windows", self.windows.is_some(), "--perplexity", self.perplexity.is_some()),
        ] {
            if is_given && !is_asked {
                let message = format!("{flag} goes with {action} only");
                return Err(usage(ErrorKind::MissingRequiredArgument, &message));
            }
        }
        if self.predictor == Predictor::Stored || self.bench {
            return Ok(());
        }
        for (flag, is_given) in [
            ("--audit", self.audit.is_some()),
            ("--adaptive", self.adaptive),
            ("--budget", self.budget.is_some()),
            ("--alpha-scale", self.alpha_scale != 1.0),
        ] {
            if is_given {
                let message = format!("{flag} goes with --predictor stored only, others predict nothing");
                return Err(usage(ErrorKind::ArgumentConflict, &message));
            }
        }
        Ok(())
    }

    fn bench_action<'a>(&'a self, file: &'a Path) -> Result<Action<'a>, clap::Error> {
        let n_prompt = match &self.prompt {
            None => N_BENCH_PROMPT,
            Some(count) => count.parse().map_err(|_| {
                let message = format!("with --bench, -p is a number of tokens, not {count:?}");
                usage(ErrorKind::ValueValidation, &message)
            })?,
        };
        let n_decode = match self.predict {
            None => N_BENCH_DECODE,
            Some(Predict(Some(n_decode))) => n_decode,
            Some(Predict(None)) => {
                return Err(usage(
                    ErrorKind::ValueValidation,
                    "with --bench, -n is a number of tokens, not -1",
                ));
            }
        };
        if n_prompt == 0 && n_decode == 0 {
            return Err(usage(ErrorKind::ValueValidation, "-p 0 and -n 0 leave --bench nothing to measure"));
        }
        Ok(Action::Bench {
            file,
            n_prompt,
            n_decode,
            n_repetitions: self.repetitions.unwrap_or(N_BENCH_REPETITIONS),
            keep_shares: &self.keep_share,
            output: self.output.unwrap_or(Table::Md),
        })
    }

    /// The seed asked for, or a random one.
    pub(crate) fn seed(&self) -> u64 {
        self.seed.0.unwrap_or_else(random_seed)
    }

    /// The audits asked for.
    pub(crate) fn audit(&self, seed: u64) -> Option<AuditOptions> {
        let every = self.audit.or(self.adaptive.then_some(N_AUDIT))?;
        Some(AuditOptions { every, seed, adaptive: self.adaptive })
    }

    /// How tokens are chosen.
    pub(crate) fn sampler(&self, seed: u64) -> SamplerOptions {
        SamplerOptions {
            temp: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed,
        }
    }
}

/// A wrong use of the flags, as clap reports its own.
fn usage(kind: ErrorKind, message: &str) -> clap::Error {
    Cli::command().error(kind, message)
}

/// 32 bits, so that every reader of JSON takes the number exactly; random by the keys of the standard library's hasher.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 32
}

fn chat_names() -> PossibleValuesParser {
    PossibleValuesParser::new(ChatFormat::ALL.iter().map(|format| format.name))
}

/// A parser of numbers in `range`.
fn number(range: RangeInclusive<f64>) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync {
    move |text| match text.parse() {
        // NaN is in no range.
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("expected a number from {} to {}", range.start(), range.end())),
    }
}

/// A share of something, of which nothing is none.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("expected a number above 0 and at most 1".to_owned()),
    }
}

/// A parser of whole numbers in `range`.
fn count(range: RangeInclusive<usize>) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync {
    move |text| match text.parse() {
        Ok(count) if range.contains(&count) => Ok(count),
        _ if *range.end() == usize::MAX => {
            Err(format!("expected a whole number of at least {}", range.start()))
        }
        _ => Err(format!("expected a whole number from {} to {}", range.start(), range.end())),
    }
}

fn predict_count(text: &str) -> Result<Predict, String> {
    match text {
        "-1" => Ok(Predict(None)),
        _ => count(0..=usize::MAX)(text)
            .map(|count| Predict(Some(count)))
            .map_err(|error| format!("{error}, or -1")),
    }
}

fn seed(text: &str) -> Result<Seed, String> {
    match text {
        "-1" => Ok(Seed(None)),
        _ => {
            text.parse().map(|seed| Seed(Some(seed))).map_err(|_| "expected a whole number or -1".to_owned())
        }
    }
}

fn not_empty(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("an empty string ends nothing".to_owned()) } else { Ok(text.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The action of a command line, or the exit code and message of its refusal.
    fn parse(arguments: &[&str]) -> Result<String, (i32, String)> {
        let refuse = |error: clap::Error| (error.exit_code(), error.to_string());
        let cli = Cli::try_parse_from([&["runtime"], arguments].concat()).map_err(refuse)?;
        let action = cli.action().map_err(refuse)?;
        Ok(format!("{action:?}"))
    }

    fn refused(arguments: &[&str]) -> String {
        let (code, message) = parse(arguments).expect_err("wrong usage");
        assert_eq!(code, 2, "{arguments:?}: {message}");
        message
    }

    fn accepted(arguments: &[&str]) -> String {
        parse(arguments).unwrap_or_else(|(_, message)| panic!("{arguments:?}: {message}"))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_action_is_reached() {
        assert_eq!(accepted(&["--list-devices"]), "ListDevices { measure: false }");
        assert_eq!(accepted(&["--list-devices", "--measure"]), "ListDevices { measure: true }");
        assert!(accepted(&["m.sinf", "--check"]).starts_with("Check"));
        let generate = accepted(&["m.sinf", "-p", "", "-n", "7", "--chat", "llama2", "--check"]);
        assert!(
            generate.contains("Text(\"\")") && generate.contains("Some(7)") && generate.contains("llama2")
        );
        assert!(accepted(&["m.sinf", "-f", "-", "-n", "-1"]).contains("Stdin"));
        assert!(accepted(&["m.sinf", "-p", "- item", "--stop", "--"]).contains("- item"));
        let bench = accepted(&["m.sinf", "--bench"]);
        assert!(bench.contains("n_prompt: 512") && bench.contains("n_decode: 128"), "{bench}");
        assert!(bench.contains("n_repetitions: 5") && bench.contains("Md"), "{bench}");
        let bench = accepted(&["m.sinf", "--bench", "-p", "16", "-n", "0", "-r", "2", "--output", "csv"]);
        assert!(bench.contains("n_prompt: 16") && bench.contains("n_decode: 0"), "{bench}");
        let bench = accepted(&["m.sinf", "--bench", "--keep-share", "0.1,0.35,1"]);
        assert!(bench.contains("keep_shares: [0.1, 0.35, 1.0]"), "{bench}");
        let perplexity = accepted(&["m.sinf", "--perplexity", "t.txt", "--kl", "--windows", "3", "--json"]);
        assert!(perplexity.contains("t.txt") && perplexity.contains("kl: true"), "{perplexity}");
    }

    #[test]
    fn flags_that_do_not_go_together_are_refused() {
        assert!(refused(&[]).contains("FILE"));
        assert!(refused(&["m.sinf"]).contains("-p"));
        assert!(refused(&["m.sinf", "-p", "x", "-f", "y"]).contains("--file"));
        assert!(refused(&["m.sinf", "--bench", "-p", "many"]).contains("number of tokens"));
        assert!(refused(&["m.sinf", "--bench", "-n", "-1"]).contains("-1"));
        refused(&["m.sinf", "--bench", "-p", "0", "-n", "0"]);
        refused(&["m.sinf", "-p", "x", "--kl"]);
        refused(&["m.sinf", "-p", "x", "--measure"]);
        refused(&["m.sinf", "-p", "x", "--logits", "3"]);
        refused(&["m.sinf", "-p", "x", "--output", "csv"]);
        refused(&["m.sinf", "-f", "x", "-r", "3"]);
        refused(&["m.sinf", "-p", "x", "--keep-share", "0.5"]);
        for share in ["0", "1.01", "-0.1", "nan", "0.1,", "0.1,x"] {
            refused(&["m.sinf", "--bench", &format!("--keep-share={share}")]);
        }
        refused(&["m.sinf", "--bench", "--windows", "3"]);
        refused(&["m.sinf", "-p", "x", "--perplexity", "t.txt"]);
        assert!(
            refused(&["m.sinf", "-p", "x", "--budget", "0.1", "--alpha-scale", "2"])
                .contains("--alpha-scale")
        );
        for flags in
            [&["--audit", "32"][..], &["--adaptive"], &["--budget", "0.1"], &["--alpha-scale", "1.1"]]
        {
            for predictor in ["exact", "dense"] {
                let arguments = [&["m.sinf", "-p", "x", "--predictor", predictor], flags].concat();
                assert!(refused(&arguments).contains(flags[0]));
            }
            accepted(&[&["m.sinf", "--bench"], flags].concat());
        }
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (flag, values) in [
            ("--temp", &["hot", "-1", "nan", "inf"][..]),
            ("--top-p", &["1.1", "-0.1"]),
            ("--min-p", &["2"]),
            ("--repeat-penalty", &["0", "-1"]),
            ("--alpha-scale", &["0", "1e9"]),
            ("--budget", &["0", "-1", "nan", "x"]),
            ("--audit", &["0", "-1", "x", "1000001"]),
            ("--top-k", &["-1", "x"]),
            ("-n", &["-2", "x"]),
            ("-c", &["0"]),
            ("-t", &["1025"]),
            ("-s", &["-2", "x", "18446744073709551616"]),
            ("--stop", &[""]),
            ("--device", &["gpu", "cuda:"]),
            ("--predictor", &["magic"]),
        ] {
            for value in values {
                refused(&["m.sinf", "-p", "x", &format!("{flag}={value}")]);
            }
        }
        let message = refused(&["m.sinf", "-p", "x", "--chat", "no-such-format"]);
        assert!(ChatFormat::ALL.iter().all(|format| message.contains(format.name)), "{message}");
    }

    #[test]
    fn adapting_audits() {
        let audit_of = |arguments: &[&str]| {
            let arguments = [&["runtime", "m.sinf", "-p", "x"], arguments].concat();
            Cli::try_parse_from(arguments).expect("right usage").audit(7)
        };
        let options = |every, adaptive| Some(AuditOptions { every, seed: 7, adaptive });
        assert_eq!(audit_of(&[]), None);
        assert_eq!(audit_of(&["--audit", "5"]), options(5, false));
        assert_eq!(audit_of(&["--adaptive"]), options(N_AUDIT, true));
        assert_eq!(audit_of(&["--adaptive", "--audit", "5"]), options(5, true));
    }

    #[test]
    fn a_seed_given_is_used_and_a_random_one_differs() {
        let seed_of = |arguments: &[&str]| {
            let arguments = [&["runtime", "m.sinf", "-p", "x"], arguments].concat();
            Cli::try_parse_from(arguments).expect("right usage").seed()
        };
        assert_eq!(seed_of(&["-s", "18446744073709551615"]), u64::MAX);
        assert!((0..4).map(|_| seed_of(&[])).any(|seed| seed != seed_of(&["--seed", "-1"])));
        assert!(seed_of(&[]) <= u64::from(u32::MAX));
    }
}
