//! Finds each layer's limit on sign disagreements from the dense forward pass over a text.
//!
//! For every pair of token and neuron the pass gives n_neg, whether the neuron is active, and the energy it adds to
//! the MLP's output, `(h_i * |W_down[:, i]|)^2`. Sums of these by n_neg are all that is kept:
//!
//! ```text
//! rows_kept(limit)     = pairs with n_neg <= limit / pairs
//! recall(limit)        = active pairs with n_neg <= limit / active pairs
//! missed_energy(limit) = energy of pairs with n_neg > limit / energy
//! limit of the layer   = the smallest whose missed_energy is at most the target
//! ```
//!
//! A layer whose limit leaves out fewer bytes than its sign words take is not predicted.
//!
//! Source of the rule: SparseInfer, arXiv 2411.12692; its alpha is found by search there, by this curve here.
//! The text runs in windows of BOS and the tokens that follow; BOS itself is in every prompt, which is dense, and does
//! not count. Sums run over tokens and neurons in order, on one thread, so that they do not depend on the number of
//! threads; the forward pass before them is hundreds of times more work.

use std::path::{Path, PathBuf};

use format_spec::calibration::alpha_from_limit;
use format_spec::{CalibrationCurve, CurvePoint, PredictorKind, PredictorRecord, SectionKind};
use kernels::Activation;
use runtime::{MlpBatch, MlpMode, MlpObserver, Model, Session, SessionOptions};

use crate::checkpoint::read_small;
use crate::{PrepError, Progress};

/// Public-domain prose, in documents that [`DOCUMENT_MARK`] separates.
const BUILT_IN_TEXT: &str = include_str!("../assets/calibration.txt");
const DOCUMENT_MARK: &str = "<|doc|>";
/// Longest accepted text; a hundred thousand tokens are half a megabyte.
const MAX_TEXT_BYTES: u64 = 64 << 20;
/// Most tokens of a window, BOS included: the batch that bounds the memory of a calibration.
const MAX_WINDOW: u32 = 512;
/// Bytes of text that are tokenised for each token wanted, at first.
const BYTES_PER_TOKEN: usize = 8;
/// Most points of a stored curve.
const N_CURVE_POINTS: usize = 65;
/// Share of rows kept at the first point of a stored curve.
const FIRST_ROWS_KEPT: f64 = 1e-3;

/// What to calibrate on, and what for.
#[derive(Clone, Debug, PartialEq)]
pub struct CalibrationOptions {
    /// A UTF-8 text; `None` takes the built-in one.
    pub text: Option<PathBuf>,
    /// Most tokens of the text, at least 1.
    pub n_tokens: u32,
    /// Largest share of a layer's MLP output energy that the rows left out may have, 0 to 1.
    pub target_missed_energy: f64,
}

impl CalibrationOptions {
    /// What is taken where nothing is said.
    ///
    /// The divergence from the dense run is about 1.4 times the target. Measured on held-out text of 8,000 to 16,000
    /// tokens (mean over layers; perplexity against the model's own dense run; KL in nats a token):
    ///
    /// | model          | target | rows kept | recall | perplexity | KL     | same top token |
    /// |----------------|--------|-----------|--------|------------|--------|----------------|
    /// | relu-llama-8m  | 0.01   | 59 %      | 95.3 % | +1.29 %    | 0.0130 | 93.7 %         |
    /// |                | 0.005  | 68 %      | 97.6 % | +0.52 %    | 0.0054 | 96.0 %         |
    /// |                | 0.003  | 72 %      | 98.3 % | +0.25 %    | 0.0035 | 97.1 %         |
    /// |                | 0.001  | 80 %      | 99.3 % | +0.13 %    | 0.0013 | 98.4 %         |
    /// | relu-llama-46m | 0.01   | 48 %      | 92.4 % | +1.89 %    | 0.0162 | 92.9 %         |
    /// |                | 0.005  | 55 %      | 95.5 % | +0.89 %    | 0.0079 | 94.9 %         |
    /// |                | 0.003  | 61 %      | 97.1 % | +0.47 %    | 0.0043 | 96.6 %         |
    /// |                | 0.001  | 72 %      | 98.9 % | +0.15 %    | 0.0014 | 98.0 %         |
    ///
    /// 0.003 is the largest round target that keeps the perplexity of both within half a percent. Half the tokens
    /// move no limit of relu-llama-46m by more than one.
    pub const DEFAULT: &Self = &Self { text: None, n_tokens: 2048, target_missed_energy: 0.003 };
}

/// A calibration text.
#[derive(Debug)]
pub(crate) struct Text {
    /// File name, or `built-in`.
    pub(crate) name: String,
    /// Of the whole text as it is stored.
    pub(crate) blake3: [u8; 32],
    /// Lines of the document mark are empty lines here.
    text: String,
}

impl Text {
    /// Reads `path`, or takes the built-in text.
    ///
    /// # Errors
    /// A file that cannot be read, is longer than 64 MiB, or is not UTF-8.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, PrepError> {
        let (name, text) = match path {
            None => ("built-in".to_owned(), BUILT_IN_TEXT.to_owned()),
            Some(path) => {
                let bytes = read_small(path, MAX_TEXT_BYTES)?;
                let text = String::from_utf8(bytes).map_err(|error| PrepError::CalibrationText {
                    name: path.display().to_string(),
                    expected: "UTF-8",
                    found: error.utf8_error().to_string(),
                })?;
                (path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(), text)
            }
        };
        let blake3 = blake3::hash(text.as_bytes()).into();
        let lines = text.split_inclusive('\n').map(|line| match line.trim_end() {
            DOCUMENT_MARK => "\n",
            _ => line,
        });
        Ok(Self { name, blake3, text: lines.collect() })
    }

    /// The text's first ids, at most `n_tokens`, without BOS and EOS. Only as much of the text is tokenised as that
    /// takes, so that a long one costs no memory.
    fn first_tokens(&self, tokenizer: &runtime::Tokenizer, n_tokens: usize) -> Result<Vec<u32>, PrepError> {
        let mut n_bytes = n_tokens.saturating_mul(BYTES_PER_TOKEN);
        loop {
            let end = self.text.floor_char_boundary(n_bytes.min(self.text.len()));
            let mut tokens = tokenizer.encode_plain(&self.text[..end])?;
            if tokens.is_empty() && end == self.text.len() {
                let name = self.name.clone();
                return Err(PrepError::CalibrationText { name, expected: "text", found: "none".to_owned() });
            }
            if tokens.len() >= n_tokens || end == self.text.len() {
                tokens.truncate(n_tokens);
                return Ok(tokens);
            }
            n_bytes = n_bytes.saturating_mul(2);
        }
    }
}

/// What a calibration found.
#[derive(Debug)]
pub(crate) struct Calibration {
    /// One for each layer.
    pub(crate) predictors: Vec<PredictorRecord>,
    /// One for each layer.
    pub(crate) curves: Vec<CalibrationCurve>,
    /// Tokens behind them.
    pub(crate) n_tokens: u64,
    /// Tokens in one window, BOS included.
    pub(crate) window: u32,
}

/// Runs the dense forward pass of `model` over `text` and chooses each layer's limit.
///
/// # Errors
/// An empty text, a failed pass, [`PrepError::NotFinite`], [`PrepError::Interrupted`].
pub(crate) fn run(
    model: &Model,
    tokenizer: &format_spec::Tokenizer,
    text: &Text,
    options: &CalibrationOptions,
    n_threads: usize,
    progress: &Progress,
) -> Result<Calibration, PrepError> {
    let config = model.config();
    let window = MAX_WINDOW.min(config.max_position_embeddings);
    let bos = config.bos_token_id.filter(|_| tokenizer.add_bos && window > 1);
    let tokenizer = runtime::Tokenizer::new(tokenizer, config.bos_token_id, None)?;
    let tokens = text.first_tokens(&tokenizer, options.n_tokens as usize)?;
    let session_options = SessionOptions {
        n_positions_max: window as usize,
        n_batch_max: window as usize,
        n_threads,
        mode: MlpMode::Dense,
        alpha_scale: 1.0,
    };
    let mut session = Session::new(model, &session_options)?;
    let mut histograms = Histograms::new(model, usize::from(bos.is_some()));
    progress.begin("calibrating", tokens.len() as u64);
    for chunk in tokens.chunks(window as usize - histograms.n_prefix) {
        let batch: Vec<u32> = bos.into_iter().chain(chunk.iter().copied()).collect();
        session.reset();
        session.forward_batch(&batch, false, None, Some(&mut histograms))?;
        progress.advance(chunk.len() as u64)?;
    }

    let n_tokens = tokens.len();
    let mut predictors = Vec::new();
    let mut curves = Vec::new();
    for (layer, histogram) in (0..).zip(&histograms.layers) {
        if !histogram.energy().is_finite() {
            return Err(PrepError::NotFinite { layer });
        }
        let curve = histogram.curve();
        let rows_active = histogram.rows_active();
        let mut chosen = choose(&curve, options.target_missed_energy, rows_active > 0.0);
        let is_worth_it = 1.0 - chosen.rows_kept > cost_of_signs(model, layer);
        if !is_worth_it {
            chosen = curve[curve.len() - 1];
        }
        curves.push(thin(&curve, chosen.limit, N_CURVE_POINTS));
        predictors.push(PredictorRecord {
            kind: if is_worth_it { PredictorKind::Sign } else { PredictorKind::Off },
            limit: chosen.limit,
            alpha: alpha_from_limit(chosen.limit, config.hidden_size) as f32,
            rows_active: rows_active as f32,
            rows_kept: chosen.rows_kept as f32,
            recall: chosen.recall as f32,
            missed_energy: chosen.missed_energy as f32,
            n_tokens: n_tokens as u32,
        });
    }
    Ok(Calibration { predictors, curves, n_tokens: n_tokens as u64, window })
}

/// Bytes of the sign words over those of the gate rows: a layer that leaves out a smaller share reads less without
/// prediction.
fn cost_of_signs(model: &Model, layer: u32) -> f64 {
    let len_bytes = |kind| model.layout().find(kind, Some(layer)).map_or(0, |section| section.len_bytes);
    len_bytes(SectionKind::GateSigns) as f64 / len_bytes(SectionKind::WGate) as f64
}

/// Collects every layer's histogram while the forward pass runs.
struct Histograms {
    layers: Vec<SignHistogram>,
    /// `|W_down[:, i]|^2`, by layer.
    squared_norms: Vec<Vec<f64>>,
    activation: Activation,
    /// Tokens at the start of a batch that do not count.
    n_prefix: usize,
}

impl Histograms {
    fn new(model: &Model, n_prefix: usize) -> Self {
        let config = model.config();
        let n_layers = config.num_hidden_layers as usize;
        Self {
            layers: vec![SignHistogram::new(config.hidden_size); n_layers],
            squared_norms: (0..n_layers).map(|layer| model.down_squared_norms(layer)).collect(),
            activation: model.activation(),
            n_prefix,
        }
    }
}

impl MlpObserver for Histograms {
    fn wants_n_neg(&self) -> bool {
        true
    }

    fn mlp(&mut self, batch: &MlpBatch<'_>) {
        let squared_norms = &self.squared_norms[batch.layer];
        let first = self.n_prefix * squared_norms.len();
        self.layers[batch.layer].add(
            &batch.n_neg[first..],
            &batch.gate[first..],
            &batch.h[first..],
            squared_norms,
            self.activation,
        );
    }
}

/// Sums over (token, neuron) pairs by n_neg.
#[derive(Clone, Debug)]
pub(crate) struct SignHistogram {
    /// Indexed by n_neg, `0..=hidden_size`.
    bins: Vec<Bin>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bin {
    n_pairs: u64,
    n_active: u64,
    energy: f64,
}

/// What one limit on n_neg does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LimitEffect {
    pub(crate) limit: u32,
    pub(crate) rows_kept: f64,
    pub(crate) recall: f64,
    pub(crate) missed_energy: f64,
    n_active_missed: u64,
}

impl SignHistogram {
    pub(crate) fn new(hidden_size: u32) -> Self {
        Self { bins: vec![Bin::default(); hidden_size as usize + 1] }
    }

    /// Adds a batch. Shapes: `n_neg`, `gate` (before the activation) and `h` `(n_tokens, intermediate_size)`,
    /// `squared_norms` of the columns of W_down `(intermediate_size,)`.
    pub(crate) fn add(
        &mut self,
        n_neg: &[u32],
        gate: &[f32],
        h: &[f32],
        squared_norms: &[f64],
        activation: Activation,
    ) {
        let f = squared_norms.len();
        for ((n_neg, gate), h) in n_neg.chunks_exact(f).zip(gate.chunks_exact(f)).zip(h.chunks_exact(f)) {
            for (((&n_neg, &gate), &h), squared_norm) in n_neg.iter().zip(gate).zip(h).zip(squared_norms) {
                let bin = &mut self.bins[n_neg as usize];
                bin.n_pairs += 1;
                if activation.apply(gate) != 0.0 {
                    bin.n_active += 1;
                    bin.energy += f64::from(h) * f64::from(h) * squared_norm;
                }
            }
        }
    }

    /// Energy of all pairs.
    fn energy(&self) -> f64 {
        self.bins.iter().map(|bin| bin.energy).sum()
    }

    /// Share of pairs that are active.
    fn rows_active(&self) -> f64 {
        let n_active: u64 = self.bins.iter().map(|bin| bin.n_active).sum();
        let n_pairs: u64 = self.bins.iter().map(|bin| bin.n_pairs).sum();
        n_active as f64 / n_pairs as f64
    }

    /// The effect of every limit, `0..=hidden_size`. With nothing active, nothing is missed.
    pub(crate) fn curve(&self) -> Vec<LimitEffect> {
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        // From the largest n_neg down, so that what is missed is exactly zero where nothing active lies above.
        let mut missed = Bin::default();
        let mut points: Vec<(u32, Bin)> = Vec::with_capacity(self.bins.len());
        for (n_neg, bin) in self.bins.iter().enumerate().rev() {
            points.push((n_neg as u32, missed));
            missed.n_pairs += bin.n_pairs;
            missed.n_active += bin.n_active;
            missed.energy += bin.energy;
        }
        let total = missed;
        points
            .into_iter()
            .rev()
            .map(|(limit, missed)| LimitEffect {
                limit,
                rows_kept: 1.0 - share(missed.n_pairs as f64, total.n_pairs as f64),
                recall: 1.0 - share(missed.n_active as f64, total.n_active as f64),
                missed_energy: share(missed.energy, total.energy),
                n_active_missed: missed.n_active,
            })
            .collect()
    }
}

/// The smallest limit that misses at most `target` of the energy; for a target of 0 none of the active pairs either,
/// however little they add. A layer without an active pair keeps every row, as the text says nothing about it.
fn choose(curve: &[LimitEffect], target: f64, any_active: bool) -> LimitEffect {
    let last = curve[curve.len() - 1];
    if !any_active {
        return last;
    }
    let good = |effect: &&LimitEffect| {
        effect.missed_energy <= target && (target > 0.0 || effect.n_active_missed == 0)
    };
    curve.iter().find(good).copied().unwrap_or(last)
}

/// At most `n_points` limits, evenly spaced from where rows begin to be kept to where all are, `chosen` among them.
fn thin(curve: &[LimitEffect], chosen: u32, n_points: usize) -> CalibrationCurve {
    let last = curve.len() - 1;
    let n_points = n_points.min(curve.len());
    let first_kept = curve.partition_point(|effect| effect.rows_kept < FIRST_ROWS_KEPT).saturating_sub(1);
    let all_kept = curve.partition_point(|effect| effect.rows_kept < 1.0).min(last);
    let (mut begin, mut end) = (first_kept.min(chosen as usize), all_kept.max(chosen as usize));
    // Room for distinct limits in narrow models.
    end = end.max(begin + n_points - 1).min(last);
    begin = begin.min(end + 1 - n_points);
    let mut limits: Vec<usize> = (0..n_points)
        .map(|i| begin + ((end - begin) * i + (n_points - 1) / 2) / (n_points - 1).max(1))
        .collect();
    let nearest = (0..n_points)
        .min_by_key(|&i| limits[i].abs_diff(chosen as usize))
        .expect("a curve has at least one point");
    limits[nearest] = chosen as usize;
    limits
        .into_iter()
        .map(|limit| CurvePoint {
            limit: limit as u32,
            rows_kept: curve[limit].rows_kept as f32,
            recall: curve[limit].recall as f32,
            missed_energy: curve[limit].missed_energy as f32,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three tokens and two neurons over widths of four signs, with exact sums.
    fn histogram() -> SignHistogram {
        let mut histogram = SignHistogram::new(4);
        histogram.add(
            &[0, 3, 1, 2, 3, 4],
            &[1.0, -1.0, 2.0, 0.5, 0.0, 1.0],
            &[1.0, 0.0, 2.0, 1.0, 0.0, 1.0],
            &[1.0, 4.0],
            Activation::Relu,
        );
        histogram
    }

    #[test]
    fn curves_count_pairs_and_energy() {
        let histogram = histogram();
        assert_eq!(histogram.rows_active(), 4.0 / 6.0);
        // By n_neg: pairs 1 1 1 2 1, active 1 1 1 0 1, energy 1 4 4 0 4.
        let expected = [
            (0, 1.0 / 6.0, 1.0 / 4.0, 12.0 / 13.0),
            (1, 2.0 / 6.0, 2.0 / 4.0, 8.0 / 13.0),
            (2, 3.0 / 6.0, 3.0 / 4.0, 4.0 / 13.0),
            (3, 5.0 / 6.0, 3.0 / 4.0, 4.0 / 13.0),
            (4, 1.0, 1.0, 0.0),
        ];
        let curve = histogram.curve();
        assert_eq!(curve.len(), expected.len());
        for (effect, (limit, rows_kept, recall, missed_energy)) in curve.iter().zip(expected) {
            assert_eq!(effect.limit, limit);
            for (found, expected) in [
                (effect.rows_kept, rows_kept),
                (effect.recall, recall),
                (effect.missed_energy, missed_energy),
            ] {
                assert!((found - expected).abs() < 1e-12, "{effect:?}");
            }
        }
    }

    #[test]
    fn the_smallest_limit_within_the_target_is_chosen() {
        let curve = histogram().curve();
        for (target, limit) in [(1.0, 0), (0.7, 1), (0.31, 2), (0.3, 4), (0.0, 4)] {
            assert_eq!(choose(&curve, target, true).limit, limit, "target {target}");
        }
        assert_eq!(choose(&SignHistogram::new(4).curve(), 0.5, false).limit, 4);
    }

    #[test]
    fn a_target_of_zero_misses_no_active_pair_however_weak() {
        let mut quiet = SignHistogram::new(4);
        quiet.add(&[1, 3], &[1.0, 1.0], &[1.0, 0.0], &[1.0, 1.0], Activation::Relu);
        assert_eq!(choose(&quiet.curve(), 0.0, true).limit, 3);
        assert_eq!(choose(&quiet.curve(), 1e-9, true).limit, 1);
    }

    #[test]
    fn stored_curves_hold_the_chosen_limit_among_ascending_ones() {
        let mut histogram = SignHistogram::new(1000);
        let n_neg: Vec<u32> = (0..2000).map(|pair| 300 + pair % 400).collect();
        let ones = vec![1.0; 2000];
        histogram.add(&n_neg, &ones, &ones, &vec![1.0; 2000], Activation::Relu);
        let curve = histogram.curve();
        for (chosen, n_points) in [(500, 65), (0, 65), (1000, 65), (437, 2), (640, 1), (500, 5000)] {
            let points = thin(&curve, chosen, n_points);
            assert_eq!(points.len(), n_points.min(1001));
            assert!(points.is_sorted_by(|a, b| a.limit < b.limit), "{chosen} of {n_points}");
            assert!(points.iter().any(|point| point.limit == chosen), "{chosen} of {n_points}");
        }
        let points = thin(&curve, 500, 65);
        assert!(points[0].rows_kept < 0.01 && points[64].rows_kept > 0.99);
    }

    #[test]
    fn no_more_of_a_text_is_tokenised_than_is_needed() {
        let text = Text::load(None).expect("built in");
        assert!(!text.text.contains(DOCUMENT_MARK) && text.text.len() > 100_000);
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/relu-llama-8m");
        let config = crate::arch::read_config(&model).expect("a Llama");
        let spec = crate::tokenizer::read_tokenizer(&model, &config).expect("accepted").tokenizer;
        let tokenizer = runtime::Tokenizer::new(&spec, Some(1), None).expect("accepted");
        let all = tokenizer.encode_plain(&text.text).expect("encoded");
        for n_tokens in [1, 10, 2048] {
            let tokens = text.first_tokens(&tokenizer, n_tokens).expect("tokens");
            assert_eq!(tokens.len(), n_tokens);
            // The piece that the cut goes through may differ.
            assert_eq!(tokens[..n_tokens - 1], all[..n_tokens - 1]);
        }
        assert_eq!(text.first_tokens(&tokenizer, usize::MAX).expect("tokens"), all);
    }
}
