//! The whole conversion in reading order: a Hugging Face folder becomes one `.sinf` file.
//!
//! ```text
//! config.json, shard headers, tokenizer    checked before anything is written
//! weights                                  streamed once into OUT.partial
//! seal                                     OUT.partial is a valid file without prediction
//! calibration                              the runtime's dense pass over it chooses each layer's limit
//! seal, sync, rename                       OUT appears, complete
//! ```
//!
//! Nothing in the output depends on the number of threads, on the time or on where the folder lies. What a device other
//! than the CPU calibrates depends on it by a little: sums come in another order there.

use std::path::{Path, PathBuf};
use std::time::Instant;

use format_spec::calibration::limit_from_alpha;
use format_spec::{
    Activation, CalibrationText, DType, Encoding, ModelConfig, PredictorKind, PredictorRecord, Provenance,
    SectionKind, SectionSpec, Shape, SourceFile, Tail, Writer,
};
use runtime::device::Device;
use runtime::{Model, RuntimeError};
use serde::Serialize;

use crate::arch::{self, CONFIG_FILE, TensorName};
use crate::calibrate::{
    self, Calibration, CalibrationOptions, FAR_FROM_TARGET, LowRankOptions, Machine, Target, Text,
};
use crate::checkpoint::{Checkpoint, hash_file};
use crate::import::read_predictors;
use crate::inspect::PredictorRow;
use crate::output::check_is_no_input;
use crate::predict::{Factors, Kind, LowRankSource, Residual};
use crate::stream::{BlockSizes, WeightStream};
use crate::tokenizer::{FolderTokenizer, read_tokenizer};
use crate::{PrepError, Progress};

/// Alignment of sections: a page, so that a mapped section can be registered with a device by itself.
const ALIGNMENT_BYTES: u32 = 4096;

/// How to convert.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Type of all weights but the norms. `None` keeps 16-bit types and turns f32 into f16.
    pub dtype: Option<DType>,
    /// How rows will be predicted. `None`: calibrated where the activation is sparse, exact where it is not.
    pub predictor: Option<Predictor>,
    /// Threads that convert and calibrate; 0 takes one for each available core. Hashing and writing have one each.
    pub n_threads: usize,
    /// Where the model runs on the calibration text.
    pub device: Device,
    /// Replace an existing output.
    pub force: bool,
}

/// How the rows of an MLP will be predicted.
#[derive(Clone, Debug)]
pub enum Predictor {
    /// Not at all.
    Exact,
    /// By signs, with one alpha for all layers or one for each.
    Alpha(Vec<f64>),
    /// As a text says.
    Calibrated(CalibrationOptions),
}

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertReport {
    /// The file.
    pub out: String,
    /// Its length.
    pub bytes: u64,
    /// Type of the weights.
    pub dtype: &'static str,
    /// Decoder layers.
    pub layers: u32,
    /// Vocabulary entries that have a spelling, where the embedding has more rows.
    pub n_pieces: usize,
    /// Predictor of every layer.
    pub predictors: Vec<PredictorRow>,
    /// What they do to text that they were not chosen by; absent without calibration.
    pub quality: Option<Quality>,
    /// Tokens behind their limits; 0 without calibration.
    pub calibration_tokens: u64,
    /// Wall time in all.
    pub seconds: f64,
    /// Wall time of reading, converting and writing the weights.
    pub weights_seconds: f64,
    /// Wall time of the calibration.
    pub calibration_seconds: f64,
    /// Bytes of the shards per second of `weights_seconds`, 10^9.
    pub read_gb_per_s: f64,
    /// What a user may not expect.
    pub notes: Vec<String>,
}

/// Distance of the predicted model from the dense one.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quality {
    /// It is of text that nothing was fitted to, as of all texts but the shortest.
    pub is_unseen: bool,
    /// Mean KL divergence of the next token's distribution from the dense model's, in nats.
    pub kl_mean: f64,
    /// Share of tokens whose most probable successor is the same.
    pub top1_agreement: f64,
    /// Perplexity of the predicted model.
    pub ppl: f64,
    /// Perplexity of the dense model.
    pub dense_ppl: f64,
    /// Bytes of predictors, gate, up and down rows that a token reads, over those of a dense pass.
    pub mlp_bytes: f64,
}

impl Quality {
    fn new(found: &Calibration) -> Self {
        Self {
            is_unseen: found.is_unseen,
            kl_mean: found.measured.kl_mean,
            top1_agreement: found.measured.top1_agreement,
            ppl: found.measured.ppl,
            dense_ppl: found.dense_ppl,
            mlp_bytes: found.mlp_bytes,
        }
    }
}

/// Converts the model in `folder` to `out`.
///
/// # Errors
/// A checkpoint that is not accepted, options that do not fit it, an output that exists or cannot be written.
/// Nothing is then left behind.
pub fn convert(
    folder: &Path,
    out: &Path,
    options: &ConvertOptions,
    progress: &Progress,
) -> Result<ConvertReport, PrepError> {
    let started = Instant::now();
    let mut notes = Vec::new();
    let mut config = arch::read_config(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    let tensors = arch::tensors(&config);
    checkpoint.expect(&tensors)?;
    let FolderTokenizer { tokenizer, bos_token_id, files: tokenizer_files } =
        read_tokenizer(folder, &config)?;
    config.bos_token_id = config.bos_token_id.or(bos_token_id);
    let n_pieces = tokenizer.pieces.len();
    if n_pieces < config.vocab_size as usize {
        notes.push(format!(
            "the tokenizer has {n_pieces} pieces for a vocab_size of {}; ids past the last piece have no text",
            config.vocab_size
        ));
    }
    let predictor = Plan::new(options.predictor.as_ref(), &config, folder, &mut notes, progress)?;
    let dtype = options.dtype.unwrap_or(auto_dtype(&checkpoint, &tensors)?);
    let n_threads = match options.n_threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n_threads => n_threads,
    };
    let machine = Machine { device: options.device, n_threads };
    if let (Plan::Calibrated { .. }, Device::Cuda(ordinal)) = (&predictor, machine.device) {
        // Better known now than after all weights.
        kernels::cuda::Device::open(ordinal as usize).map_err(RuntimeError::from)?;
    }

    let small_files = small_files(folder, &checkpoint, tokenizer_files);
    check_is_no_input(out, inputs(&checkpoint, &small_files, &predictor))?;
    let mut writer = Writer::create(out, &config, ALIGNMENT_BYTES, options.force)?;
    let weights_started = Instant::now();
    let with_signs = !matches!(predictor, Plan::Exact);
    let stream = WeightStream {
        checkpoint: &checkpoint,
        tensors: &tensors,
        dtype,
        with_signs,
        n_threads,
        block_sizes: BlockSizes::DEFAULT,
    };
    let mut source_files = stream.write(&mut writer, progress)?;
    let weights_seconds = weights_started.elapsed().as_secs_f64();
    let n_source_bytes: u64 = source_files.iter().map(|file| file.len_bytes).sum();
    for path in &small_files {
        source_files.push(hash_file(path)?);
    }
    if let Plan::Calibrated { imported, .. } = &predictor {
        source_files.extend(imported.iter().cloned());
    }
    source_files.sort_by(|a, b| a.name.cmp(&b.name));
    let mut provenance = Provenance {
        source_name: folder_name(folder)?,
        source_files,
        tool: concat!("prep ", env!("CARGO_PKG_VERSION")).to_owned(),
        options: recorded_options(dtype, &predictor, options.device),
        calibration: None,
    };

    let calibration_started = Instant::now();
    let mut found = None;
    let predictors = match &predictor {
        Plan::Exact => vec![off(&config); config.num_hidden_layers as usize],
        Plan::Alphas(alphas) => alphas.iter().map(|&alpha| by_alpha(alpha, &config)).collect(),
        Plan::Calibrated { text, options, source, .. } => {
            let predictors = vec![off(&config); config.num_hidden_layers as usize];
            writer.seal(&Tail {
                predictors: &predictors,
                curves: None,
                budget: None,
                tokenizer: &tokenizer,
                provenance: None,
            })?;
            let model = Model::open(&writer.partial_path())?;
            let calibration = calibrate::run(&model, &tokenizer, text, options, source, machine, progress)?;
            if machine.device != Device::Cpu {
                notes.push(format!("calibrated on {}", calibration.backend));
            }
            notes.extend(shortcomings(&calibration, options));
            provenance.calibration = Some(CalibrationText {
                name: text.name.clone(),
                blake3: text.blake3,
                n_tokens: calibration.n_tokens,
                window: calibration.window,
            });
            found.insert(calibration).predictors.clone()
        }
    };
    if let Some(found) = &found {
        write_planes(&mut writer, &found.planes, &config)?;
        write_offsets(&mut writer, &found.offsets)?;
        write_factors(&mut writer, &found.factors, &config)?;
    }
    let calibration_seconds = calibration_started.elapsed().as_secs_f64();
    writer.seal(&Tail {
        predictors: &predictors,
        curves: found.as_ref().map(|found| &found.curves[..]),
        budget: found.as_ref().map(|found| &found.budget[..]),
        tokenizer: &tokenizer,
        provenance: Some(&provenance),
    })?;
    progress.check()?;
    let bytes = writer.commit()?;
    Ok(ConvertReport {
        out: out.display().to_string(),
        bytes,
        dtype: dtype.name(),
        layers: config.num_hidden_layers,
        n_pieces,
        predictors: PredictorRow::all(&predictors),
        quality: found.as_ref().map(Quality::new),
        calibration_tokens: provenance.calibration.map_or(0, |text| text.n_tokens),
        seconds: started.elapsed().as_secs_f64(),
        weights_seconds,
        calibration_seconds,
        read_gb_per_s: n_source_bytes as f64 / weights_seconds / 1e9,
        notes,
    })
}

/// Every file that a conversion reads.
fn inputs(checkpoint: &Checkpoint, small_files: &[PathBuf], predictor: &Plan<'_>) -> Vec<PathBuf> {
    let mut inputs = small_files.to_vec();
    inputs.extend(checkpoint.shards().iter().map(|shard| shard.path.clone()));
    if let Plan::Calibrated { options, imported, .. } = predictor {
        inputs.extend(options.text.clone());
        if let LowRankOptions::Imported { folder, .. } = &options.low_rank {
            let names = imported.iter().filter_map(|file| Path::new(&file.name).file_name());
            inputs.extend(names.map(|name| folder.join(name)));
        }
    }
    inputs
}

/// How a calibration fell short of what was asked for.
fn shortcomings(found: &Calibration, options: &CalibrationOptions) -> Vec<String> {
    let mut notes = Vec::new();
    if !found.is_unseen {
        notes.push(format!(
            "a calibration text of {} tokens has no part that nothing was fitted to: its quality is no forecast",
            found.n_tokens
        ));
    }
    let kl = found.measured.kl_mean;
    if let Target::Divergence(target) = options.target
        && kl > FAR_FROM_TARGET * target
    {
        notes.push(format!(
            "KL {kl:.6} on the last of the calibration text, {:.1} times the target of {target}: more of it comes closer",
            kl / target
        ));
    }
    let ranks = found.factors.iter().flatten().map(|factors| factors.rank);
    if let (LowRankOptions::Fitted { rank: Some(rank) }, Some(least)) = (&options.low_rank, ranks.min())
        && least < *rank as usize
    {
        notes.push(format!(
            "rank {least} where {rank} was asked for: the calibration text has no more tokens to fit to"
        ));
    }
    notes
}

/// What the options ask for, checked against the model, before anything is written.
enum Plan<'a> {
    Exact,
    /// One for each layer.
    Alphas(Vec<f64>),
    Calibrated {
        text: Text,
        options: &'a CalibrationOptions,
        source: LowRankSource,
        /// What an import read.
        imported: Vec<SourceFile>,
    },
}

impl<'a> Plan<'a> {
    fn new(
        predictor: Option<&'a Predictor>,
        config: &ModelConfig,
        folder: &Path,
        notes: &mut Vec<String>,
        progress: &Progress,
    ) -> Result<Self, PrepError> {
        let is_sparse = config.activation != Activation::Silu;
        match predictor {
            None if !is_sparse => {
                notes.push("silu leaves no row at zero: predictor exact, every row is computed".to_owned());
                Ok(Self::Exact)
            }
            Some(Predictor::Exact) => Ok(Self::Exact),
            Some(_) if !is_sparse => Err(PrepError::NotSparse { path: folder.join(CONFIG_FILE) }),
            Some(Predictor::Alpha(alphas)) => {
                let n_layers = config.num_hidden_layers;
                match alphas.as_slice() {
                    &[alpha] => Ok(Self::Alphas(vec![alpha; n_layers as usize])),
                    alphas if alphas.len() == n_layers as usize => Ok(Self::Alphas(alphas.to_vec())),
                    alphas => Err(PrepError::AlphaCount { n_layers, found: alphas.len() }),
                }
            }
            Some(Predictor::Calibrated(options)) => Self::calibrated(options, config, progress),
            None => Self::calibrated(CalibrationOptions::DEFAULT, config, progress),
        }
    }

    fn calibrated(
        options: &'a CalibrationOptions,
        config: &ModelConfig,
        progress: &Progress,
    ) -> Result<Self, PrepError> {
        let text = Text::load(options.text.as_deref())?;
        let (source, imported) = match &options.low_rank {
            LowRankOptions::Fitted { rank } => {
                check_rank(*rank, config)?;
                (LowRankSource::Fitted { rank: rank.map(|rank| rank as usize) }, Vec::new())
            }
            LowRankOptions::Imported { folder, relu } => {
                let (factors, mut files) = read_predictors(folder, config, *relu, progress)?;
                let name = folder_name(folder)?;
                files.iter_mut().for_each(|file| file.name = format!("{name}/{}", file.name));
                (LowRankSource::Imported(factors), files)
            }
        };
        Ok(Self::Calibrated { text, options, source, imported })
    }
}

/// That W_gate has room for factors of `rank`.
///
/// # Errors
/// [`PrepError::Rank`].
pub(crate) fn check_rank(rank: Option<u32>, config: &ModelConfig) -> Result<(), PrepError> {
    let max = config.hidden_size.min(config.intermediate_size);
    match rank {
        Some(found) if found > max => Err(PrepError::Rank { max, found }),
        _ => Ok(()),
    }
}

/// The 16-bit type that the checkpoint has; f16 where it has none, or both.
fn auto_dtype(checkpoint: &Checkpoint, tensors: &[TensorName]) -> Result<DType, PrepError> {
    let mut found = Vec::new();
    for tensor in tensors.iter().filter(|tensor| tensor.shape.len() > 1) {
        found.push(checkpoint.tensor(&tensor.name)?.dtype);
    }
    let is_bf16 = found.contains(&DType::Bf16) && !found.contains(&DType::F16);
    Ok(if is_bf16 { DType::Bf16 } else { DType::F16 })
}

/// A layer without prediction.
pub(crate) fn off(config: &ModelConfig) -> PredictorRecord {
    PredictorRecord {
        kind: PredictorKind::Off,
        limit: config.hidden_size,
        alpha: f32::INFINITY,
        rows_active: f32::NAN,
        rows_kept: f32::NAN,
        recall: f32::NAN,
        missed_energy: f32::NAN,
        n_tokens: 0,
        threshold: 0.0,
    }
}

/// A layer with a limit that somebody chose.
fn by_alpha(alpha: f64, config: &ModelConfig) -> PredictorRecord {
    PredictorRecord {
        kind: PredictorKind::Sign,
        limit: limit_from_alpha(alpha, config.hidden_size),
        alpha: alpha as f32,
        ..off(config)
    }
}

/// Options that change the output, sorted by name.
fn recorded_options(dtype: DType, predictor: &Plan<'_>, device: Device) -> Vec<(String, String)> {
    let mut options = vec![("dtype", dtype.name().to_owned())];
    match predictor {
        Plan::Exact => options.push(("predictor", "exact".to_owned())),
        Plan::Alphas(alphas) => {
            let alphas: Vec<String> = alphas.iter().map(f64::to_string).collect();
            options.extend([("alpha", alphas.join(",")), ("predictor", "sign".to_owned())]);
        }
        Plan::Calibrated { options: calibration, .. } => {
            if device != Device::Cpu {
                options.push(("device", device.to_string()));
            }
            match &calibration.low_rank {
                LowRankOptions::Fitted { rank: Some(rank) } => options.push(("rank", rank.to_string())),
                LowRankOptions::Fitted { rank: None } => {}
                LowRankOptions::Imported { relu, .. } => {
                    let activation = if *relu { "relu" } else { "none" };
                    options.push(("import-activation", activation.to_owned()));
                }
            }
            let is_imported = matches!(calibration.low_rank, LowRankOptions::Imported { .. });
            let kind = if is_imported { "imported" } else { calibration.kind.map_or("auto", Kind::name) };
            options.extend([
                ("calibration-tokens", calibration.n_tokens.to_string()),
                ("predictor", kind.to_owned()),
                match calibration.target {
                    Target::Divergence(target) => ("target-kl", target.to_string()),
                    Target::MissedEnergy(target) => ("target-missed-energy", target.to_string()),
                },
            ]);
        }
    }
    options.sort_unstable();
    options.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// Writes the planes below the signs of the layers that have some.
fn write_planes(writer: &mut Writer, planes: &[Vec<u32>], config: &ModelConfig) -> Result<(), PrepError> {
    for (layer, words) in (0..).zip(planes).filter(|(_, words)| !words.is_empty()) {
        let n_words = u64::from(config.hidden_size.div_ceil(32));
        let n_rows = u64::from(config.intermediate_size);
        let n_planes = words.len() as u64 / (n_rows * n_words);
        let shape = [n_planes, n_rows, n_words];
        write_section(writer, SectionKind::GatePlanes, layer, &shape, words.iter().map(|v| v.to_le_bytes()))?;
    }
    Ok(())
}

/// Writes the offsets of the layers that have some.
fn write_offsets(writer: &mut Writer, offsets: &[Vec<f32>]) -> Result<(), PrepError> {
    for (layer, offsets) in (0..).zip(offsets).filter(|(_, offsets)| !offsets.is_empty()) {
        let shape = [offsets.len() as u64];
        let bytes = offsets.iter().map(|v| v.to_le_bytes());
        write_section(writer, SectionKind::GateOffsets, layer, &shape, bytes)?;
    }
    Ok(())
}

/// Writes the factors of the layers that have some.
fn write_factors(
    writer: &mut Writer,
    layers: &[Option<Factors>],
    config: &ModelConfig,
) -> Result<(), PrepError> {
    let (n_rows, n_cols) = (u64::from(config.intermediate_size), u64::from(config.hidden_size));
    for (layer, factors) in (0..).zip(layers) {
        let Some(Factors { rank, fc1, fc2, residual, .. }) = factors else { continue };
        let rank = *rank as u64;
        let (fc1, fc2) = (fc1.iter().map(|v| v.to_le_bytes()), fc2.iter().map(|v| v.to_le_bytes()));
        write_section(writer, SectionKind::GateFc1, layer, &[rank, n_cols], fc1)?;
        write_section(writer, SectionKind::GateFc2, layer, &[n_rows, rank], fc2)?;
        let Some(Residual { signs, scales }) = residual else { continue };
        let shape = [n_rows, signs.len() as u64 / n_rows];
        write_section(
            writer,
            SectionKind::ResidualSigns,
            layer,
            &shape,
            signs.iter().map(|v| v.to_le_bytes()),
        )?;
        let scales = scales.iter().map(|v| v.to_le_bytes());
        write_section(writer, SectionKind::ResidualScales, layer, &[n_rows], scales)?;
    }
    Ok(())
}

/// Writes a raw section of `layer`, of a kind that has one element type, from the bytes of its elements.
fn write_section<const N: usize>(
    writer: &mut Writer,
    kind: SectionKind,
    layer: u32,
    shape: &[u64],
    elements: impl Iterator<Item = [u8; N]>,
) -> Result<(), PrepError> {
    writer.begin(SectionSpec {
        kind,
        layer: Some(layer),
        dtype: kind.dtypes()[0],
        shape: Shape::new(shape),
        encoding: Encoding::Raw,
        required: kind.is_required(),
    })?;
    writer.write(&elements.flatten().collect::<Vec<u8>>())?;
    Ok(())
}

/// Source files that hold no weights.
fn small_files(folder: &Path, checkpoint: &Checkpoint, tokenizer_files: Vec<PathBuf>) -> Vec<PathBuf> {
    let index = checkpoint.index().map(Path::to_owned);
    std::iter::once(folder.join(CONFIG_FILE)).chain(index).chain(tokenizer_files).collect()
}

/// The folder's own name, also where it is given as `.` or through a link.
fn folder_name(folder: &Path) -> Result<String, PrepError> {
    let resolved = folder.canonicalize().map_err(crate::checkpoint::io_error("open", folder))?;
    Ok(resolved.file_name().unwrap_or(resolved.as_os_str()).to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundled() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/relu-llama-8m")
    }

    fn options(predictor: Option<Predictor>) -> ConvertOptions {
        ConvertOptions { dtype: None, predictor, n_threads: 2, device: Device::Cpu, force: false }
    }

    #[test]
    fn calibration_keeps_what_it_promises() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let text = folder.path().join("text.txt");
        std::fs::write(&text, "It was the best of times, it was the worst of times.\n".repeat(40))
            .expect("written");
        let target = Target::MissedEnergy(0.02);
        let calibration = CalibrationOptions {
            text: Some(text),
            n_tokens: 700,
            target,
            ..CalibrationOptions::DEFAULT.clone()
        };
        let options = options(Some(Predictor::Calibrated(calibration)));
        let out = folder.path().join("out.sinf");
        let report = convert(&bundled(), &out, &options, &Progress::silent()).expect("converted");
        // The text has fewer tokens than may be used.
        let n_tokens = report.calibration_tokens;
        assert!((400..700).contains(&n_tokens), "{n_tokens}");

        let model = Model::open(&out).expect("valid");
        let curves = model.layout().calibration_curves(model.bytes()).expect("valid").expect("there");
        assert_eq!((model.layout().predictors().len(), curves.len()), (8, 8));
        for (layer, (record, curve)) in (0..).zip(model.layout().predictors().iter().zip(&curves)) {
            assert!(record.kind.has_score(), "signs alone read more: {record:?}");
            let at =
                curve.iter().position(|point| point.limit == record.threshold).expect("the chosen point");
            assert!(curve[at].missed_energy <= 0.02, "{curve:?}");
            // On the other half, which repeats the same sentence.
            assert!(record.missed_energy <= 0.03, "{record:?}");
            // Energy is promised, not rows: 98 % of it is in half of the active rows of some layers (recall 0.475 at the
            // least), and fewer of them are kept the better the scores tell large gates from small ones. What is kept
            // is active, though.
            assert!(record.recall > 0.4, "{record:?}");
            assert!(record.recall * record.rows_active > 0.9 * record.rows_kept, "{record:?}");
            assert!(curve.is_sorted_by(|a, b| a.limit > b.limit && a.rows_kept <= b.rows_kept));
            let planes = model.layout().find(SectionKind::GatePlanes, Some(layer));
            let n_low = planes.map_or(0, |section| section.shape.dims()[0]);
            assert_eq!(1 + n_low, u64::from(record.kind.n_planes()));
        }
        let budget = model.layout().budget_curve(model.bytes()).expect("valid").expect("there");
        assert!(budget.is_sorted_by(|a, b| a.mlp_bytes >= b.mlp_bytes) && budget.len() > 2, "{budget:?}");
        let own: Vec<f32> = model.layout().predictors().iter().map(|record| record.threshold).collect();
        let point = budget.iter().find(|point| point.limits == own).expect("the records' own point");
        let quality = report.quality.expect("measured");
        assert_eq!((point.kl, point.mlp_bytes), (quality.kl_mean as f32, quality.mlp_bytes as f32));
        let provenance = model.layout().provenance(model.bytes()).expect("valid").expect("there");
        let names: Vec<_> = provenance.source_files.iter().map(|file| file.name.as_str()).collect();
        let expected = ["config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json"];
        assert_eq!(names[..4], expected);
        assert_eq!(provenance.calibration.expect("there").name, "text.txt");
        assert_eq!(provenance.options[0], ("calibration-tokens".to_owned(), "700".to_owned()));
    }

    /// A target of missed energy holds for text of another kind than the built-in prose: a specification with its tables.
    #[test]
    fn missed_energy_is_near_its_target_on_other_text() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let out = folder.path().join("out.sinf");
        let target = 0.01;
        let calibration = CalibrationOptions {
            target: Target::MissedEnergy(target),
            ..CalibrationOptions::DEFAULT.clone()
        };
        let options = options(Some(Predictor::Calibrated(calibration)));
        convert(&bundled(), &out, &options, &Progress::silent()).expect("converted");
        let options = crate::EvalOptions {
            text: Path::new(env!("CARGO_MANIFEST_DIR")).join("../format-spec/FORMAT.md"),
            n_tokens: 4096,
            contenders: vec![crate::Contender::Stored],
            calibration_tokens: 640,
            rank: None,
            n_threads: 2,
            device: Device::Cpu,
        };
        let evaluation = crate::eval(&out, &options, &Progress::silent()).expect("measured");
        let row = &evaluation.rows[0];
        assert!(row.missed_energy <= 1.3 * target && row.missed_energy > 0.3 * target, "{row:?}");
        assert!(row.quality.layers.iter().all(|layer| layer.missed_energy <= 2.0 * target), "{row:?}");
    }

    #[test]
    fn what_a_conversion_reads_is_no_output() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let (model, text) = (folder.path().join("model"), folder.path().join("text.txt.partial"));
        std::fs::create_dir(&model).expect("made");
        for entry in std::fs::read_dir(bundled()).expect("readable") {
            let path = entry.expect("readable").path();
            std::fs::copy(&path, model.join(path.file_name().expect("a name"))).expect("copied");
        }
        std::fs::write(&text, "It was the best of times, it was the worst of times.").expect("written");
        let calibration =
            CalibrationOptions { text: Some(text.clone()), ..CalibrationOptions::DEFAULT.clone() };
        let options = ConvertOptions { force: true, ..options(Some(Predictor::Calibrated(calibration))) };
        let inputs = ["config.json", "model.safetensors", "tokenizer.json"].map(|name| model.join(name));
        // Without its ending, what is written first is the text.
        let unfinished_is_text = text.with_extension("");
        for out in [&text, &unfinished_is_text].into_iter().chain(&inputs) {
            let before = std::fs::read(out).ok();
            let error = convert(&model, out, &options, &Progress::silent()).expect_err("an input");
            assert!(matches!(error, PrepError::OutputIsInput { .. }), "{error}");
            assert!(std::fs::read(out).ok() == before, "{}", out.display());
        }
        assert!(text.exists());
    }

    #[test]
    fn calibrations_that_fall_short_say_so() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let (text, out) = (folder.path().join("text"), folder.path().join("out.sinf"));
        std::fs::write(&text, "a").expect("written");
        let calibrated = |rank| {
            let calibration = CalibrationOptions {
                text: Some(text.clone()),
                kind: Some(Kind::LowRank),
                low_rank: LowRankOptions::Fitted { rank: Some(rank) },
                ..CalibrationOptions::DEFAULT.clone()
            };
            let options = ConvertOptions { force: true, ..options(Some(Predictor::Calibrated(calibration))) };
            convert(&bundled(), &out, &options, &Progress::silent())
        };
        let report = calibrated(64).expect("converted");
        assert!(!report.quality.expect("measured").is_unseen);
        for words in ["nothing was fitted to", "times the target", "where 64 was asked for"] {
            assert!(report.notes.iter().any(|note| note.contains(words)), "{words}: {:?}", report.notes);
        }
        let error = calibrated(257).expect_err("wider than the model");
        assert!(matches!(error, PrepError::Rank { max: 256, found: 257 }), "{error}");
    }

    /// A target of 0 keeps nearly all rows of so narrow a model.
    #[test]
    fn layers_that_would_read_more_are_not_predicted() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let calibration = CalibrationOptions {
            n_tokens: 2048,
            target: Target::MissedEnergy(0.0),
            kind: Some(Kind::Sign),
            ..CalibrationOptions::DEFAULT.clone()
        };
        let options = options(Some(Predictor::Calibrated(calibration)));
        let out = folder.path().join("out.sinf");
        let report = convert(&bundled(), &out, &options, &Progress::silent()).expect("converted");
        let off = report.predictors.iter().filter(|row| row.kind == "exact").count();
        assert!(off > 0, "{:?}", report.predictors);
        for row in &report.predictors {
            assert!(["exact", "sign"].contains(&row.kind), "{row:?}");
            assert_eq!(row.kind == "exact", row.rows_kept == Some(1.0), "{row:?}");
        }
    }

    /// The divergence on text that nothing was chosen by is near the one asked for, and a larger one reads less.
    #[test]
    fn a_budget_of_divergence_is_kept() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let out = folder.path().join("out.sinf");
        let mut bytes = Vec::new();
        for target in [0.003, 0.03] {
            let calibration = CalibrationOptions {
                n_tokens: 2560,
                target: Target::Divergence(target),
                ..CalibrationOptions::DEFAULT.clone()
            };
            let options = ConvertOptions { force: true, ..options(Some(Predictor::Calibrated(calibration))) };
            let report = convert(&bundled(), &out, &options, &Progress::silent()).expect("converted");
            let quality = report.quality.expect("measured");
            assert!((0.4..2.5).contains(&(quality.kl_mean / target)), "{quality:?}");
            bytes.push(quality.mlp_bytes);
        }
        assert!(bytes[1] < bytes[0] && bytes[0] < 0.5, "{bytes:?}");
    }

    /// Factors of low rank are in the file, and miss about what they may.
    #[test]
    fn predictors_of_low_rank_are_stored() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let out = folder.path().join("out.sinf");
        let mut files = Vec::new();
        for (n_threads, kind) in
            [(1, Kind::LowRank), (2, Kind::LowRank), (1, Kind::LowRankSign), (2, Kind::LowRankSign)]
        {
            let calibration = CalibrationOptions {
                n_tokens: 2560,
                target: Target::MissedEnergy(0.01),
                kind: Some(kind),
                low_rank: LowRankOptions::Fitted { rank: Some(24) },
                ..CalibrationOptions::DEFAULT.clone()
            };
            let predictor = Some(Predictor::Calibrated(calibration));
            let options = ConvertOptions { force: true, n_threads, ..options(predictor) };
            convert(&bundled(), &out, &options, &Progress::silent()).expect("converted");
            files.push(std::fs::read(&out).expect("written"));
            let model = Model::open(&out).expect("valid");
            let records = model.layout().predictors();
            let kind = kind.record_kind();
            assert!(records.iter().any(|record| record.kind == kind), "{records:?}");
            for (layer, record) in records.iter().enumerate() {
                let factors = model.low_rank(layer);
                assert_eq!(factors.is_some(), record.kind == kind);
                if let Some(factors) = factors {
                    assert_eq!((factors.fc1.n_rows, factors.relu), (24, false));
                    assert_eq!(factors.residual.is_some(), kind.has_residual());
                    assert!(model.gate_offsets(layer).is_some() && record.threshold.is_finite());
                    // On the half that was not fitted.
                    assert!(record.missed_energy <= 0.02 && record.rows_kept < 1.0, "{record:?}");
                }
            }
        }
        assert!(files[0] == files[1] && files[2] == files[3], "the number of threads changes the file");
        let model = Model::open(&out).expect("valid");
        let provenance = model.layout().provenance(model.bytes()).expect("valid").expect("there");
        assert!(
            provenance.options.contains(&("rank".to_owned(), "24".to_owned())),
            "{:?}",
            provenance.options
        );
    }

    /// What an import holds is in the file bit for bit, and provenance names what was read.
    #[test]
    fn imported_predictors_are_stored_as_they_are() {
        use safetensors::{Dtype, tensor::TensorView};
        let folder = tempfile::tempdir().expect("a scratch folder");
        let import = folder.path().join("trained");
        std::fs::create_dir(&import).expect("made");
        let (d, f, rank) = (256, 704, 8);
        let config = arch::read_config(&bundled()).expect("a Llama");
        assert_eq!((config.hidden_size, config.intermediate_size), (d as u32, f as u32));
        // Multiples of 1/64 without a pattern: f16 holds them.
        let values = |n: usize, seed: usize| -> Vec<u8> {
            let value = |i: usize| ((i * 7919 + seed * 104_729) % 127) as f32 / 64.0 - 1.0;
            (0..n).flat_map(|i| value(i).to_le_bytes()).collect()
        };
        for layer in 0..8 {
            let (fc1, fc2) = (values(rank * d, layer), values(f * rank, layer + 8));
            let tensors = [("fc1.weight", vec![rank, d], &fc1), ("fc2.weight", vec![f, rank], &fc2)];
            let views = tensors.map(|(name, shape, bytes)| {
                (name, TensorView::new(Dtype::F32, shape, bytes).expect("shape fits"))
            });
            let path = import.join(format!("model_{layer}.safetensors"));
            safetensors::serialize_to_file(views, None, &path).expect("written");
        }
        let out = folder.path().join("out.sinf");
        for relu in [true, false] {
            // Such predictors foretell nothing, and save bytes only where much may be missed.
            let calibration = CalibrationOptions {
                n_tokens: 700,
                target: Target::MissedEnergy(0.5),
                low_rank: LowRankOptions::Imported { folder: import.clone(), relu },
                ..CalibrationOptions::DEFAULT.clone()
            };
            let options = ConvertOptions { force: true, ..options(Some(Predictor::Calibrated(calibration))) };
            convert(&bundled(), &out, &options, &Progress::silent()).expect("converted");
            let model = Model::open(&out).expect("valid");
            let kind = if relu { PredictorKind::LowRankRelu } else { PredictorKind::LowRank };
            let records = model.layout().predictors();
            assert!(records.iter().any(|record| record.kind == kind), "{records:?}");
            for (layer, record) in records.iter().enumerate().filter(|(_, record)| record.kind == kind) {
                let factors = model.low_rank(layer).expect("stored");
                assert_eq!(
                    (factors.relu, factors.fc1.n_rows, record.missed_energy > 0.0),
                    (relu, rank, true)
                );
                for (found, seed, n) in [(factors.fc1, layer, rank * d), (factors.fc2, layer + 8, f * rank)] {
                    let wanted = values(n, seed);
                    let is_same = wanted.as_chunks::<4>().0.iter().enumerate();
                    let mut is_same = is_same.map(|(i, &v)| found.data.get(i) == f32::from_le_bytes(v));
                    assert!(is_same.all(|same| same), "layer {layer}");
                }
            }
            let provenance = model.layout().provenance(model.bytes()).expect("valid").expect("there");
            let names: Vec<&str> = provenance.source_files.iter().map(|file| file.name.as_str()).collect();
            assert!(names.contains(&"trained/model_7.safetensors") && names.is_sorted(), "{names:?}");
            let activation = if relu { "relu" } else { "none" };
            for option in [("predictor", "imported"), ("import-activation", activation)] {
                let option = (option.0.to_owned(), option.1.to_owned());
                assert!(provenance.options.contains(&option), "{:?}", provenance.options);
            }
        }
    }

    #[test]
    fn exact_files_have_no_sign_words() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let out = folder.path().join("out.sinf");
        convert(&bundled(), &out, &options(Some(Predictor::Exact)), &Progress::silent()).expect("converted");
        let model = Model::open(&out).expect("valid");
        assert!(model.layout().predictors().iter().all(|record| record.kind == PredictorKind::Off));
        assert!(model.layout().find(SectionKind::GateSigns, Some(0)).is_none());
    }

    #[test]
    fn a_device_that_is_not_there_leaves_nothing_behind() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let calibration = CalibrationOptions { n_tokens: 100, ..CalibrationOptions::DEFAULT.clone() };
        let options =
            ConvertOptions { device: Device::Cuda(999), ..options(Some(Predictor::Calibrated(calibration))) };
        let out = folder.path().join("out.sinf");
        let error = convert(&bundled(), &out, &options, &Progress::silent()).expect_err("no such device");
        assert!(matches!(error, PrepError::Runtime(_)), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0);
    }

    #[test]
    fn an_interrupt_leaves_nothing_behind() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let progress = Progress::silent();
        progress.interrupt();
        let result = convert(&bundled(), &folder.path().join("out.sinf"), &options(None), &progress);
        assert!(matches!(result, Err(PrepError::Interrupted)), "{result:?}");
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0);
    }

    #[test]
    fn texts_that_calibrate_nothing_are_refused() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let (text, out) = (folder.path().join("text"), folder.path().join("out.sinf"));
        for (content, words) in [(&b""[..], "text, found none"), (b"\xff\xfe", "UTF-8"), (b"\n<|doc|>\n", "")]
        {
            std::fs::write(&text, content).expect("written");
            let calibration =
                CalibrationOptions { text: Some(text.clone()), ..CalibrationOptions::DEFAULT.clone() };
            let result = convert(
                &bundled(),
                &out,
                &options(Some(Predictor::Calibrated(calibration))),
                &Progress::silent(),
            );
            match result {
                Err(error @ PrepError::CalibrationText { .. }) => {
                    assert!(error.to_string().contains(words) && !words.is_empty(), "{error}");
                }
                // Line ends alone are a text of a few tokens.
                Ok(report) => assert!(words.is_empty() && report.calibration_tokens > 0, "{report:?}"),
                Err(error) => panic!("{error}"),
            }
        }
    }
}
