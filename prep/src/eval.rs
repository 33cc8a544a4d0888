//! What each kind of prediction does to a model on a text of one's own.
//!
//! ```text
//! dense         every row of every matrix: what the others are compared with
//! exact         every gate row, up and down where active
//! stored        the file's own records
//! auto          the best kind for each layer, fitted on the built-in text for several budgets
//! KIND          one kind for all layers (sign, sign-x8, low-rank, low-rank-sign, w2, w3), fitted likewise
//! alpha=X       the rule of SparseInfer (arXiv 2411.12692) with one alpha
//! ```
//!
//! All run over the same windows against the model's own dense pass, and each decodes some tokens of the text for its speed.
//! Bytes are those of one token, of the MLPs alone: attention, its cache and the lm_head are the same for all.
//!
//! First everything is fitted, then everything is measured, in one session each, so that a device holds the model once and
//! one predictor that is not the file's, for as long as that decodes.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use format_spec::calibration::limit_from_alpha;
use runtime::device::Device;
use runtime::perplexity::LayerQuality;
use runtime::{MlpMode, Model, Session};
use serde::Serialize;

use crate::calibrate::{Bench, Machine, Text, Windows};
use crate::convert::check_rank;
use crate::predict::{
    Fit, Kind, LayerSetting, LimitEffect, LowRankSource, Masking, Measured, Reference, Search, Setting,
    decoded, measure,
};
use crate::{PrepError, Progress};

/// Divergences that kinds are fitted for.
const TARGETS: [f64; 8] = [0.0003, 0.0006, 0.001, 0.003, 0.005, 0.01, 0.03, 0.05];
/// The one of them whose fit is corrected by what masked passes measure; the others follow from it.
const FITTED_TARGET: f64 = 0.003;
/// Alphas of the sign rule: from the paper's own to what a divergence of a few ten-thousandths takes.
const ALPHAS: [f64; 7] = [1.0, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3];
/// Tokens of the text that are decoded to time them, and tokens before them.
const N_DECODED: usize = 32;
const N_PROMPT: usize = 16;
/// Times that they are; the fastest counts, as others may use the machine too.
const N_TIMES: usize = 3;

/// What to compare.
#[derive(Clone, Debug, PartialEq)]
pub enum Contender {
    /// Every row of every matrix.
    Dense,
    /// The file's own records.
    Stored,
    /// One kind for all layers, for several budgets.
    Kind(Kind),
    /// The best kind for each layer, for several budgets.
    Auto,
    /// The sign rule with one alpha.
    Alpha(f64),
}

impl Contender {
    /// What is compared where nothing is said.
    pub fn defaults() -> Vec<Self> {
        let kinds = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Exact).map(Self::Kind);
        let first = [Self::Dense, Self::Kind(Kind::Exact), Self::Stored, Self::Auto];
        first.into_iter().chain(kinds).chain(ALPHAS.map(Self::Alpha)).collect()
    }

    /// The contender that the command line calls so.
    ///
    /// # Errors
    /// A message that lists the names.
    pub fn parse(name: &str) -> Result<Self, String> {
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name);
        match (name, kind) {
            ("dense", _) => Ok(Self::Dense),
            ("stored", _) => Ok(Self::Stored),
            ("auto", _) => Ok(Self::Auto),
            (_, Some(kind)) => Ok(Self::Kind(kind)),
            (name, None) => {
                let alpha = name.strip_prefix("alpha=").and_then(|alpha| alpha.parse().ok());
                let alpha = alpha.filter(|alpha: &f64| alpha.is_finite() && *alpha >= 0.0);
                alpha.map(Self::Alpha).ok_or_else(|| {
                    format!(
                        "expected dense, exact, stored, auto, sign, sign-x8, low-rank, low-rank-sign, w2, w3 or \
                         alpha=X with X at least 0, found {name:?}"
                    )
                })
            }
        }
    }
}

/// How to evaluate.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// A UTF-8 text that the model was not calibrated on.
    pub text: PathBuf,
    /// Tokens of it, at most.
    pub n_tokens: u32,
    /// What to compare.
    pub contenders: Vec<Contender>,
    /// Tokens of the built-in text that kinds are fitted on.
    pub calibration_tokens: u32,
    /// Rank of the kinds that have one; `None` takes the default of a conversion.
    pub rank: Option<u32>,
    /// Threads; 0 takes one for each available core.
    pub n_threads: usize,
    /// Where the model runs.
    pub device: Device,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// The file.
    pub path: String,
    /// Tokens predicted.
    pub n_tokens: usize,
    /// Perplexity of the dense model.
    pub dense_ppl: f64,
    /// Bytes of the MLPs that a dense token reads.
    pub dense_mlp_bytes: f64,
    /// What the model ran on: instruction set and threads, or the GPU.
    pub backend: String,
    /// One row for each contender and budget.
    pub rows: Vec<EvalRow>,
}

/// One contender at one budget.
#[derive(Clone, Debug, Serialize)]
pub struct EvalRow {
    /// As on the command line.
    pub predictor: String,
    /// Divergence that it was fitted for.
    pub target_kl: Option<f64>,
    /// Predictor and gate bytes of a token, over those of a dense W_gate.
    pub gate_bytes: f64,
    /// Predictor, gate, up and down bytes, over those of a dense pass.
    pub mlp_bytes: f64,
    /// Predictor, gate, up and down bytes of a token.
    pub bytes_per_token: f64,
    /// Share of rows kept.
    pub rows_kept: f64,
    /// Share of rows that are active.
    pub rows_active: f64,
    /// Share of active rows that are kept, mean over layers.
    pub recall: f64,
    /// Share of the MLPs' output energy in rows left out, mean over layers.
    pub missed_energy: f64,
    /// Perplexity, divergence and rows by layer.
    #[serde(flatten)]
    pub(crate) quality: Measured,
    /// Predictor of each layer.
    pub kinds: Vec<&'static str>,
    /// Predictor, gate, up and down bytes of a token by layer.
    pub layer_bytes: Vec<f64>,
    /// Tokens decoded in a second.
    pub tok_per_s: f64,
}

/// Evaluates the model in `path`.
///
/// # Errors
/// A file that cannot be read or was made without prediction, a text that is empty, a device that does not answer or has no
/// room, a failed pass.
pub fn eval(path: &Path, options: &EvalOptions, progress: &Progress) -> Result<Evaluation, PrepError> {
    let model = Model::open(path)?;
    let mut kinds: Vec<Kind> = Vec::new();
    for contender in &options.contenders {
        match contender {
            Contender::Kind(kind) => kinds.push(*kind),
            Contender::Auto => kinds.extend(Kind::CHOICES),
            Contender::Dense | Contender::Stored => kinds.push(Kind::Exact),
            Contender::Alpha(_) => kinds.push(Kind::Sign),
        }
    }
    kinds.sort_by_key(|kind| kind.name());
    kinds.dedup();
    if kinds.iter().any(|kind| kind.n_planes() > 0) && model.gate_planes(0).is_none() {
        return Err(PrepError::NoSigns { path: path.to_owned() });
    }
    check_rank(options.rank, model.config())?;
    let tokenizer = model.layout().tokenizer(model.bytes())?;
    let text = Text::load(Some(&options.text))?;
    let windows = Windows::new(&model, &tokenizer, &text, options.n_tokens as usize)?;
    let built_in = Text::load(None)?;
    let fit_windows = Windows::new(&model, &tokenizer, &built_in, options.calibration_tokens as usize)?;
    let machine = Machine { device: options.device, n_threads: options.n_threads };

    let mut fitting = Bench::new(&model, fit_windows.clone(), machine)?;
    progress.begin("fitting", fit_windows.fit.iter().map(|window| window.len() as u64).sum());
    let source = LowRankSource::Fitted { rank: options.rank.map(|rank| rank as usize) };
    let session = &mut fitting.session;
    let fit = Fit::run(session, &fit_windows, &kinds, &source, options.n_threads, progress)?;
    progress.begin("choosing", 0);
    let candidates = candidates(&options.contenders, &fit, fitting, progress)?;

    let mut bench = Bench::new(&model, windows, machine)?;
    let windows = bench.windows.all();
    progress.begin("dense", windows.iter().map(|window| window.len() as u64).sum());
    let reference = bench.reference(&windows, progress)?;
    progress.begin("evaluating", 0);
    let tokens = windows[0].iter().copied().take(N_PROMPT + N_DECODED).collect();
    let mut evaluator = Evaluator { session: bench.session, reference, fit: &fit, tokens, progress };
    let rows = candidates.iter().map(|candidate| evaluator.row(candidate)).collect::<Result<_, _>>()?;
    Ok(Evaluation {
        path: path.display().to_string(),
        n_tokens: evaluator.reference.n_tokens(),
        dense_ppl: evaluator.reference.dense_ppl,
        dense_mlp_bytes: fit.bytes.dense() * fit.layers.len() as f64,
        backend: evaluator.session.backend(),
        rows,
    })
}

/// A contender at one budget.
struct Candidate {
    /// As on the command line.
    predictor: String,
    target_kl: Option<f64>,
    choice: Choice,
}

/// What it leaves out.
enum Choice {
    Dense,
    Stored,
    Setting(Setting),
}

/// Every one of `contenders` at every budget that it has, chosen in the session of `fitting`.
fn candidates<'m>(
    contenders: &[Contender],
    fit: &Fit<'m>,
    mut fitting: Bench<'m>,
    progress: &Progress,
) -> Result<Vec<Candidate>, PrepError> {
    let windows = fitting.windows.check.clone();
    let check = fitting.reference(&windows, progress)?;
    let mut candidates = Vec::new();
    let mut add = |predictor: String, target_kl, choice| {
        candidates.push(Candidate { predictor, target_kl, choice });
    };
    for contender in contenders {
        let (name, kinds) = match contender {
            Contender::Dense => {
                add("dense".to_owned(), None, Choice::Dense);
                continue;
            }
            Contender::Stored => {
                add("stored".to_owned(), None, Choice::Stored);
                continue;
            }
            Contender::Alpha(alpha) => {
                add(format!("alpha={alpha}"), None, Choice::Setting(by_alpha(fit, *alpha)));
                continue;
            }
            Contender::Kind(Kind::Exact) => {
                add("exact".to_owned(), None, Choice::Setting(Setting::exact(fit)));
                continue;
            }
            Contender::Kind(kind) => (kind.name(), vec![*kind]),
            Contender::Auto => ("auto", Kind::CHOICES.to_vec()),
        };
        let session = &mut fitting.session;
        let mut search = Search::new(fit, &kinds, session, &fit.reference, progress)?;
        let kinds = vec![kinds; fit.layers.len()];
        search.for_divergence(&kinds, FITTED_TARGET, session, &check, progress)?;
        for target in TARGETS {
            add(name.to_owned(), Some(target), Choice::Setting(search.expecting(&kinds, target)));
        }
    }
    Ok(candidates)
}

/// The sign rule with one alpha.
fn by_alpha(fit: &Fit<'_>, alpha: f64) -> Setting {
    let limit = limit_from_alpha(alpha, fit.model.config().hidden_size);
    let layer = |_| LayerSetting { kind: Kind::Sign, effect: LimitEffect { limit, ..LimitEffect::KEEP_ALL } };
    Setting { layers: fit.layers.iter().map(layer).collect() }
}

/// What every row is measured with.
struct Evaluator<'a> {
    /// Predicts by the file's records between rows.
    session: Session<'a>,
    reference: Reference,
    fit: &'a Fit<'a>,
    /// Of the text, the first of them a prompt and the others decoded against the clock.
    tokens: Vec<u32>,
    progress: &'a Progress,
}

impl Evaluator<'_> {
    fn row(&mut self, candidate: &Candidate) -> Result<EvalRow, PrepError> {
        let fit = self.fit;
        let masking = match &candidate.choice {
            Choice::Dense => Masking::Dense,
            Choice::Stored => Masking::Stored,
            Choice::Setting(setting) => Masking::Setting(fit, setting),
        };
        let quality = measure(&mut self.session, &self.reference, &masking, self.progress)?;
        let tok_per_s = self.tok_per_s(&candidate.choice)?;
        let fitted = |(layer, kind)| (kind, fit.rank(layer, kind));
        let kinds: Vec<(Kind, usize)> = match &candidate.choice {
            Choice::Dense => vec![(Kind::Exact, 0); fit.layers.len()],
            Choice::Stored => {
                let records = fit.model.layout().predictors().iter().enumerate();
                let rank = |layer| fit.model.low_rank(layer).map_or(0, |factors| factors.fc1.n_rows);
                records.map(|(layer, record)| (Kind::of_record(record), rank(layer))).collect()
            }
            Choice::Setting(setting) => {
                setting.layers.iter().map(|layer| layer.kind).enumerate().map(fitted).collect()
            }
        };
        Ok(EvalRow::new(candidate, fit, &kinds, quality, tok_per_s))
    }

    /// Of the tokens after the prompt, each after the one before it, with the rows of `choice` left out.
    fn tok_per_s(&mut self, choice: &Choice) -> Result<f64, PrepError> {
        match choice {
            Choice::Dense => self.session.set_mode(MlpMode::Dense, 1.0)?,
            Choice::Stored => {}
            Choice::Setting(setting) => self.session.set_prediction(decoded(self.fit, setting))?,
        }
        let (prompt, tokens) = self.tokens.split_at((self.tokens.len() - 1).min(N_PROMPT));
        let mut best = f64::INFINITY;
        for _ in 0..N_TIMES {
            self.session.reset();
            self.session.prefill(prompt)?;
            let started = Instant::now();
            for &token in tokens {
                self.session.decode(token)?;
            }
            best = best.min(started.elapsed().as_secs_f64());
        }
        self.session.set_mode(MlpMode::Stored, 1.0)?;
        Ok(tokens.len() as f64 / best)
    }
}

impl EvalRow {
    fn new(
        candidate: &Candidate,
        fit: &Fit<'_>,
        kinds: &[(Kind, usize)],
        quality: Measured,
        tok_per_s: f64,
    ) -> Self {
        let is_dense = matches!(candidate.choice, Choice::Dense);
        let n_layers = kinds.len() as f64;
        let mean = |of: &dyn Fn((Kind, usize), &LayerQuality) -> f64| {
            kinds.iter().zip(&quality.layers).map(|(&kind, layer)| of(kind, layer)).sum::<f64>() / n_layers
        };
        let share = |(kind, rank), layer: &LayerQuality| {
            let rows_active = if is_dense { 1.0 } else { layer.rows_active * layer.recall };
            fit.bytes.mlp_share(kind, rank, layer.rows_kept, rows_active)
        };
        let layers = kinds.iter().zip(&quality.layers);
        let layer_bytes: Vec<f64> =
            layers.map(|(&kind, layer)| fit.bytes.dense() * share(kind, layer)).collect();
        Self {
            predictor: candidate.predictor.clone(),
            target_kl: candidate.target_kl,
            gate_bytes: mean(&|(kind, rank), layer| fit.bytes.gate_share(kind, rank, layer.rows_kept)),
            mlp_bytes: mean(&share),
            bytes_per_token: layer_bytes.iter().sum(),
            rows_kept: mean(&|_, layer| layer.rows_kept),
            rows_active: mean(&|_, layer| layer.rows_active),
            recall: mean(&|_, layer| layer.recall),
            missed_energy: mean(&|_, layer| layer.missed_energy),
            kinds: kinds.iter().map(|(kind, _)| kind.name()).collect(),
            layer_bytes,
            quality,
            tok_per_s,
        }
    }
}

impl Evaluation {
    /// A table for people, and the rows by layer of the file's own records, or else of the first contender.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_text(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "{}: {} tokens, dense perplexity {:.4}, {:.2} MB of MLP a token; {}",
            self.path,
            self.n_tokens,
            self.dense_ppl,
            self.dense_mlp_bytes / 1e6,
            self.backend
        )?;
        writeln!(
            out,
            "\n                        KL, nats a token                              rows            energy  gate and      MLP bytes a\n\
             predictor      for KL      mean     p99     max   top-1  perplexity    kept  recall   missed  predictor          token   tok/s"
        )?;
        let mut before: Option<&EvalRow> = None;
        for row in &self.rows {
            // The budgets of a kind are a group.
            let is_group = row.target_kl.is_some() || before.is_some_and(|row| row.target_kl.is_some());
            if before.is_some_and(|before| before.predictor != row.predictor) && is_group {
                writeln!(out)?;
            }
            before = Some(row);
            let target = row.target_kl.map_or_else(|| "-".to_owned(), |target| target.to_string());
            let quality = &row.quality;
            writeln!(
                out,
                "{:13}  {target:>6}  {:>8.6}  {:>6.4}  {:>6.3}  {:>5.2}%  {:>+9.2}%  {:>5.1}%  {:>5.1}%  {:>6.3}%  \
                 {:>8.1}%  {:>8.2} {:>4.1}%  {:>6.1}",
                row.predictor,
                quality.kl_mean,
                quality.kl_p99,
                quality.kl_max,
                100.0 * quality.top1_agreement,
                100.0 * (quality.ppl / self.dense_ppl - 1.0),
                100.0 * row.rows_kept,
                100.0 * row.recall,
                100.0 * row.missed_energy,
                100.0 * row.gate_bytes,
                row.bytes_per_token / 1e6,
                100.0 * row.mlp_bytes,
                row.tok_per_s,
            )?;
        }
        let stored = self.rows.iter().find(|row| row.predictor == "stored");
        let Some(row) = stored.or(self.rows.first()) else { return Ok(()) };
        writeln!(
            out,
            "\n{}, by layer\nlayer  predictor         kept   active   recall  energy missed  MB a token",
            row.predictor
        )?;
        let layers = row.quality.layers.iter().zip(&row.kinds).zip(&row.layer_bytes);
        for (idx, ((layer, kind), bytes)) in layers.enumerate() {
            writeln!(
                out,
                "{idx:5}  {kind:13}  {:6.2}%  {:6.2}%  {:6.2}%  {:12.4}%  {:10.3}",
                100.0 * layer.rows_kept,
                100.0 * layer.rows_active,
                100.0 * layer.recall,
                100.0 * layer.missed_energy,
                bytes / 1e6
            )?;
        }
        writeln!(
            out,
            "\nMB are 10^6 bytes of the MLPs; percentages of bytes are of the dense ones.\n\
             auto and the kinds are fitted on the built-in text for the divergence in the second column."
        )?;
        Ok(())
    }
}
