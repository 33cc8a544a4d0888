//! Sessions on the first GPU whose predictors are not their file's, and `prep eval` there; without a GPU these tests fail.
//!
//! The bundled model is converted with one kind of predictor after the other, as each gives a file with fitted planes or
//! factors. Opened a second time such a file lies elsewhere in memory, so that what it predicts with is not the bytes that
//! the device has of the first.

#![expect(clippy::print_stdout, reason = "how far GPU and CPU differ belongs into the output of these tests")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use format_spec::PredictorKind;
use integration_tests::{assert_close, bundled_model};
use prep::{
    CalibrationOptions, Contender, ConvertOptions, EvalOptions, Kind, LowRankOptions, Predictor, Progress,
    Target,
};
use runtime::device::Device;
use runtime::{LayerPrediction, MlpMode, Model, PredictionLimit, RuntimeError, Session, SessionOptions};
use serde_json::Value;

const GPU: Device = Device::Cuda(0);
/// Kinds with scores or limits of their own, and their ranks.
const KINDS: [(Kind, Option<u32>); 6] = [
    (Kind::Sign, None),
    (Kind::SignX8, None),
    (Kind::W2, None),
    (Kind::W3, None),
    (Kind::LowRank, Some(16)),
    (Kind::LowRankSign, Some(8)),
];
/// Text that the model was neither trained nor calibrated on.
const TEXT: &str = include_str!("../format-spec/FORMAT.md");
const N_TOKENS: usize = 40;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The GPU, for one test at a time.
fn gpu() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The bundled checkpoint, beside a binary that was carried to another machine, or where it was built.
fn checkpoint() -> PathBuf {
    let here = PathBuf::from("tests/models/relu-llama-8m");
    if here.exists() { here } else { bundled_model() }
}

/// The bundled model with `kind` in every layer where that saves bytes, or with the best kind for each.
fn converted(folder: &Path, kind: Option<(Kind, Option<u32>)>) -> PathBuf {
    let out = folder.join(kind.map_or("auto", |(kind, _)| kind.name()));
    let calibration = CalibrationOptions {
        text: None,
        n_tokens: 700,
        target: Target::Divergence(0.003),
        kind: kind.map(|(kind, _)| kind),
        low_rank: LowRankOptions::Fitted { rank: kind.and_then(|(_, rank)| rank) },
    };
    let options = ConvertOptions {
        dtype: None,
        predictor: Some(Predictor::Calibrated(calibration)),
        n_threads: 0,
        device: Device::Cpu,
        force: false,
    };
    prep::convert(&checkpoint(), &out, &options, &Progress::silent()).expect("converted");
    out
}

fn open(path: &Path) -> Model {
    Model::open(path).expect("a valid file")
}

fn session(model: &Model, device: Device) -> Session<'_> {
    let options = SessionOptions {
        n_positions_max: N_TOKENS,
        n_batch_max: N_TOKENS,
        n_threads: 0,
        mode: MlpMode::Stored,
        alpha_scale: 1.0,
    };
    Session::on(device, model, &options, &mut |_, _| {})
        .unwrap_or_else(|error| panic!("these tests need a GPU: {error}"))
}

/// What the records of `model` say, as a caller would.
fn prediction(model: &Model) -> Vec<LayerPrediction<'_>> {
    let n_rows = model.config().intermediate_size as usize;
    let of_layer = |(layer, record): (usize, &format_spec::PredictorRecord)| {
        let scores = || match model.gate_offsets(layer) {
            Some(offsets) => offsets.iter().map(|offset| record.threshold + offset).collect(),
            None => vec![record.threshold; n_rows],
        };
        LayerPrediction {
            planes: model.gate_planes(layer),
            low_rank: model.low_rank(layer),
            limit: match record.kind {
                PredictorKind::Off => PredictionLimit::Exact,
                PredictorKind::Sign => PredictionLimit::Signs(record.limit),
                _ => PredictionLimit::Scores(scores()),
            },
        }
    };
    model.layout().predictors().iter().enumerate().map(of_layer).collect()
}

/// The first tokens of the text.
fn tokens(model: &Model) -> Vec<u32> {
    let spec = model.layout().tokenizer(model.bytes()).expect("a tokenizer");
    let tokenizer = runtime::Tokenizer::new(&spec, model.config().bos_token_id, None).expect("accepted");
    let tokens = tokenizer.encode_plain(&TEXT[..8 * N_TOKENS]).expect("encoded");
    tokens[..N_TOKENS].to_vec()
}

/// What a session makes of the text.
#[derive(Debug)]
struct Run {
    /// Of each token as it is decoded after those before it, `(vocab_size,)`.
    decoded: Vec<Vec<f32>>,
    /// Rows that decoding kept, for each layer.
    n_kept: Vec<u64>,
    /// Of all tokens in one batch, rows left out.
    batched: Vec<f32>,
    /// What is most probable after the first of them, one after the other.
    greedy: Vec<u32>,
}

impl Run {
    fn of(session: &mut Session<'_>) -> Self {
        let tokens = tokens(session.model());
        let mut batched = vec![f32::NAN; tokens.len() * session.model().config().vocab_size as usize];
        session.reset();
        session.forward_batch(&tokens, true, Some(&mut batched), None).expect("a batch");
        session.reset();
        session.reset_usage();
        let decoded = tokens.iter().map(|&token| session.decode(token).expect("a token").to_vec()).collect();
        let n_kept = session.usage().layers.iter().map(|layer| layer.n_kept).collect();
        session.reset();
        let mut logits = session.prefill(&tokens[..8]).expect("a prompt").to_vec();
        let greedy = (0..N_TOKENS - 8)
            .map(|_| {
                let token = top(&logits);
                logits.copy_from_slice(session.decode(token).expect("a token"));
                token
            })
            .collect();
        Self { decoded, n_kept, batched, greedy }
    }

    fn assert_equals(&self, other: &Self, what: &str) {
        assert_eq!(self.n_kept, other.n_kept, "{what}: rows kept");
        assert_eq!(self.greedy, other.greedy, "{what}: greedy tokens");
        let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect::<Vec<u32>>();
        for (position, (one, other)) in self.decoded.iter().zip(&other.decoded).enumerate() {
            assert!(one.iter().all(|logit| logit.is_finite()), "{what}: position {position}");
            assert!(bits(one) == bits(other), "{what}: logits at position {position}");
        }
        assert!(bits(&self.batched) == bits(&other.batched), "{what}: logits of a batch");
    }
}

fn top(logits: &[f32]) -> u32 {
    let top = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    top.expect("a vocabulary") as u32
}

#[test]
fn the_files_own_predictors_from_the_caller_change_no_bit() {
    let _gpu = gpu();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let auto = open(&converted(folder.path(), None));
    for kind in KINDS {
        let name = kind.0.name();
        let path = converted(folder.path(), Some(kind));
        let (model, again) = (open(&path), open(&path));
        let mut on_file = session(&model, GPU);
        let expected = Run::of(&mut on_file);
        on_file.set_prediction(prediction(&model)).expect("the same bytes");
        Run::of(&mut on_file).assert_equals(&expected, &format!("{name}: the file's bytes"));
        on_file.set_prediction(prediction(&again)).expect("room for a copy");
        Run::of(&mut on_file).assert_equals(&expected, &format!("{name}: a copy of them"));
        on_file.set_mode(MlpMode::Stored, 1.0).expect("the file's records");
        Run::of(&mut on_file).assert_equals(&expected, &format!("{name}: the file's again"));
        drop(on_file);

        // A file with other predictors, and so with other ranks, of the same weights.
        let mut elsewhere = session(&auto, GPU);
        let own = Run::of(&mut elsewhere);
        elsewhere.set_prediction(prediction(&model)).expect("room for another predictor");
        Run::of(&mut elsewhere).assert_equals(&expected, &format!("{name}: in another file's session"));
        elsewhere.set_mode(MlpMode::Stored, 1.0).expect("the file's records");
        Run::of(&mut elsewhere).assert_equals(&own, &format!("after {name}: the other file's again"));
    }
}

/// Most that a logit may differ at any position: a row beside its threshold is left out on one of them. Logits are about 10.
const TOLERANCE_OF_A_ROW: f64 = 0.2;
/// And in the mean over positions of the largest difference: sums in another order, over a cache in f16.
const TOLERANCE_MEAN: f64 = 0.02;

#[test]
fn decoding_with_fitted_predictors_agrees_with_the_cpu() {
    let _gpu = gpu();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let auto = open(&converted(folder.path(), None));
    let models = KINDS.map(|kind| open(&converted(folder.path(), Some(kind))));
    let (mut on_gpu, mut on_cpu) = (session(&auto, GPU), session(&auto, Device::Cpu));
    let mut differences = String::new();
    for ((kind, _), model) in KINDS.iter().zip(&models) {
        let name = kind.name();
        on_gpu.set_prediction(prediction(model)).expect("room for a predictor");
        on_cpu.set_prediction(prediction(model)).expect("a predictor of this model");
        let (gpu, cpu) = (Run::of(&mut on_gpu), Run::of(&mut on_cpu));
        let n_rows = u64::from(auto.config().intermediate_size) * N_TOKENS as u64;
        assert!(cpu.n_kept.iter().any(|&n_kept| n_kept < n_rows), "{name} leaves nothing out");
        for (layer, (gpu, cpu)) in gpu.n_kept.iter().zip(&cpu.n_kept).enumerate() {
            let what = format!("{name}: rows kept in layer {layer}");
            assert_close(*gpu as f64, *cpu as f64, 0.002 * *cpu as f64 + 2.0, &what);
        }
        let largest = |(gpu, cpu): (&Vec<f32>, &Vec<f32>)| {
            let pairs = gpu.iter().zip(cpu).map(|(gpu, cpu)| f64::from((gpu - cpu).abs()));
            // A maximum that keeps NaN.
            pairs.fold(0.0, |a: f64, b: f64| if a >= b { a } else { b })
        };
        let of_positions: Vec<f64> = gpu.decoded.iter().zip(&cpu.decoded).map(largest).collect();
        let mean = of_positions.iter().sum::<f64>() / of_positions.len() as f64;
        writeln!(differences, "{name}: mean {mean:.6}, {of_positions:.6?}").expect("a string");
        for (position, difference) in of_positions.into_iter().enumerate() {
            assert_close(difference, 0.0, TOLERANCE_OF_A_ROW, &format!("{name}: position {position}"));
        }
        assert_close(mean, 0.0, TOLERANCE_MEAN, &format!("{name}: mean of the largest differences"));
    }
    println!("largest difference of a logit by position\n{differences}");
}

#[test]
fn predictions_that_do_not_fit_are_errors_and_leave_a_session_of_use() {
    let _gpu = gpu();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let model = open(&converted(folder.path(), Some((Kind::W2, None))));
    let mut session = session(&model, GPU);
    let expected = Run::of(&mut session);
    let mut with = |spoil: &dyn Fn(&mut Vec<LayerPrediction<'_>>)| -> Result<(), RuntimeError> {
        let mut layers = prediction(&model);
        spoil(&mut layers);
        session.reset();
        session.set_prediction(layers)?;
        session.decode(1).map(|_| ())
    };
    let too_few = with(&|layers| layers.truncate(3));
    assert!(matches!(too_few, Err(RuntimeError::Shape(_))), "{too_few:?}");
    let without_planes = with(&|layers| layers[1].planes = None);
    assert!(matches!(without_planes, Err(RuntimeError::Shape(_))), "{without_planes:?}");
    let short = with(&|layers| layers[1].limit = PredictionLimit::Scores(vec![0.0; 3]));
    assert!(matches!(short, Err(RuntimeError::Cuda(_))), "{short:?}");
    session.set_mode(MlpMode::Stored, 1.0).expect("the file's records");
    Run::of(&mut session).assert_equals(&expected, "after errors");
}

fn evaluated(file: &Path, text: &Path, device: Device) -> Value {
    let names = ["dense", "exact", "stored", "auto", "sign", "w2", "low-rank", "low-rank-sign", "alpha=1.1"];
    let options = EvalOptions {
        text: text.to_owned(),
        n_tokens: 400,
        contenders: names.map(|name| Contender::parse(name).expect("a contender")).into(),
        calibration_tokens: 700,
        rank: None,
        n_threads: 0,
        device,
    };
    let evaluation = prep::eval(file, &options, &Progress::silent());
    let evaluation = evaluation.unwrap_or_else(|error| panic!("these tests need a GPU: {error}"));
    serde_json::to_value(&evaluation).expect("as JSON")
}

#[test]
fn eval_finds_on_a_gpu_what_it_finds_on_a_cpu() {
    let _gpu = gpu();
    let folder = tempfile::tempdir().expect("a scratch folder");
    let file = converted(folder.path(), None);
    let text = folder.path().join("text");
    std::fs::write(&text, TEXT).expect("written");
    let [cpu, gpu] = [Device::Cpu, GPU].map(|device| evaluated(&file, &text, device));
    assert!(gpu["backend"].as_str().expect("a name").starts_with("cuda:0 ("), "{}", gpu["backend"]);
    let number = |value: &Value, name: &str| {
        value[name].as_f64().unwrap_or_else(|| panic!("{name} is no number: {value}"))
    };
    let ppl = number(&cpu, "dense_ppl");
    assert_close(number(&gpu, "dense_ppl"), ppl, 1e-3 * ppl, "dense perplexity");
    let rows = |value: &Value| value["rows"].as_array().expect("rows").clone();
    let (cpu, gpu) = (rows(&cpu), rows(&gpu));
    assert_eq!(cpu.len(), gpu.len());
    for (cpu, gpu) in cpu.iter().zip(&gpu) {
        assert_eq!((&cpu["predictor"], &cpu["target_kl"]), (&gpu["predictor"], &gpu["target_kl"]));
        let name = format!("{} for {}", cpu["predictor"], cpu["target_kl"]);
        // What is fitted comes out different: the search for limits ends at the first that come near enough to the target on
        // a few windows, and sums in another order can end it a step earlier. A rule or a record does not.
        let is_fitted = !cpu["target_kl"].is_null();
        let (kl_share, kept) = if is_fitted { (0.6, 0.06) } else { (0.05, 0.002) };
        let kl = number(cpu, "kl_mean");
        println!(
            "{name}: KL {kl:.6} and {:.6}, kept {:.4} and {:.4}, tok/s {:.0} and {:.0}",
            number(gpu, "kl_mean"),
            number(cpu, "rows_kept"),
            number(gpu, "rows_kept"),
            number(cpu, "tok_per_s"),
            number(gpu, "tok_per_s")
        );
        assert_close(number(gpu, "kl_mean"), kl, kl_share * kl + 1e-4, &format!("{name}: KL divergence"));
        let of_cpu = number(cpu, "rows_kept");
        assert_close(number(gpu, "rows_kept"), of_cpu, kept, &format!("{name}: rows kept"));
        assert!(number(gpu, "tok_per_s") > 0.0, "{gpu}");
    }
}
