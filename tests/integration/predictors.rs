//! Kinds of predictors: forced and chosen, compared by `prep eval`, moved by `runtime --budget`.

use std::path::{Path, PathBuf};

use integration_tests::{
    bundled_model, bundled_sinf, expect_code, expect_error, expect_json, expect_success, prep, runtime,
    workspace,
};
use runtime::{LayerPrediction, MlpMode, Model, PredictionLimit, RuntimeError, Session, SessionOptions};
use serde_json::Value;
use tempfile::TempDir;

/// The bundled model converted with `arguments`, and what `--json` says of it.
fn converted(arguments: &[&str]) -> (TempDir, PathBuf, Value) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("out.sinf");
    let mut command = prep();
    command.arg("convert").arg(bundled_model()).arg(&out).args(["--quiet", "--json"]).args(arguments);
    let report = expect_json(&mut command);
    (folder, out, report)
}

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or_else(|| panic!("{name} is no number: {value}"))
}

fn rows(value: &Value, name: &str) -> Vec<Value> {
    value[name].as_array().unwrap_or_else(|| panic!("{name} is no list: {value}")).clone()
}

fn rows_kept(file: &Path, arguments: &[&str]) -> f64 {
    let fixed = ["-p", "The Linux kernel", "-n", "24", "--temp", "0", "--ignore-eos", "--json"];
    number(&expect_json(runtime().arg(file).args(fixed).args(arguments))["stats"], "rows_kept")
}

/// Text that the model was neither trained nor calibrated on.
fn text() -> PathBuf {
    workspace().join("format-spec/FORMAT.md")
}

#[test]
fn a_forced_kind_is_in_every_layer_where_it_saves_bytes() {
    for (name, kind) in [
        ("exact", "exact"),
        ("sign", "sign"),
        ("sign-x8", "sign_x8"),
        ("low-rank:16", "low_rank"),
        ("low-rank-sign:8", "low_rank_sign"),
        ("w2", "w2"),
        ("w3", "w3"),
    ] {
        let calibration = ["--calibration-tokens", "700", "--target-kl", "0.05"];
        let more = if name == "exact" { &[][..] } else { &calibration };
        let (_folder, out, report) = converted(&[&["--predictor", name], more].concat());
        let kinds: Vec<Value> = rows(&report, "predictors").iter().map(|row| row["kind"].clone()).collect();
        assert!(kinds.iter().all(|found| found == kind || found == "exact"), "{name}: {kinds:?}");
        assert!(kinds.iter().any(|found| found == kind), "{name}: {kinds:?}");
        expect_success(prep().arg("verify").arg(&out));
        let kept = rows_kept(&out, &[]);
        assert_eq!(kept < 1.0, name != "exact", "{name} keeps {kept}");
        // Computing every row is the same text, whatever the file predicts with.
        let ids = |file: &Path| {
            let line =
                ["-p", "The Linux kernel", "-n", "12", "--temp", "0", "--predictor", "exact", "--json"];
            expect_json(runtime().arg(file).args(line))["ids"].clone()
        };
        assert_eq!(ids(&out), ids(bundled_sinf()), "{name}");
    }
}

#[test]
fn targets_are_kept_and_recorded() {
    let tokens = ["--calibration-tokens", "1500"];
    let (_folder, out, report) = converted(&[&["--target-missed-energy", "0.01"], &tokens[..]].concat());
    for layer in rows(&report, "predictors") {
        // Of text that the limits were not chosen by.
        let missed = number(&layer, "missed_energy");
        assert!(missed > 0.001 && missed < 0.02, "{layer}");
    }
    let options = expect_json(prep().args(["inspect", "--json"]).arg(&out)).to_string();
    assert!(options.contains("target-missed-energy") && options.contains("0.01"), "{options}");

    let mut before = (0.0, f64::INFINITY);
    for target in ["0.002", "0.02"] {
        let (_folder, _, report) = converted(&[&["--target-kl", target], &tokens[..]].concat());
        let (kl, bytes) = (number(&report["quality"], "kl_mean"), number(&report["quality"], "mlp_bytes"));
        assert!(kl > before.0 && bytes < before.1, "{target}: {kl} and {bytes} after {before:?}");
        let ratio = kl / target.parse::<f64>().expect("a number");
        assert!((0.3..3.0).contains(&ratio), "{target}: {kl}");
        before = (kl, bytes);
    }
}

fn evaluated(file: &Path, predictors: &str) -> std::process::Command {
    let mut command = prep();
    command.arg("eval").arg(file).arg("--text").arg(text());
    command.args(["--tokens", "400", "--calibration-tokens", "700", "--predictors", predictors]);
    command
}

#[test]
fn eval_compares_predictors_on_a_text() {
    let found = expect_json(
        evaluated(bundled_sinf(), "dense,exact,stored,auto,w2,sign,low-rank,alpha=1,alpha=1.3").arg("--json"),
    );
    let of = |name: &str| -> Vec<Value> {
        rows(&found, "rows").into_iter().filter(|row| row["predictor"] == name).collect()
    };
    let counts =
        ["dense", "exact", "stored", "auto", "w2", "sign", "low-rank", "alpha=1"].map(|name| of(name).len());
    assert_eq!(counts, [1, 1, 1, 8, 8, 8, 8, 1]);
    let n_tokens = number(&found, "n_tokens");
    assert!((390.0..=400.0).contains(&n_tokens), "{n_tokens}");

    let (dense, exact) = (&of("dense")[0], &of("exact")[0]);
    for row in [dense, exact] {
        assert_eq!((number(row, "kl_mean"), number(row, "kl_max")), (0.0, 0.0), "{row}");
        assert_eq!((number(row, "top1_agreement"), number(row, "gate_bytes")), (1.0, 1.0), "{row}");
        assert!((number(row, "ppl") - number(&found, "dense_ppl")).abs() < 1e-9, "{row}");
    }
    assert_eq!(number(dense, "bytes_per_token"), number(&found, "dense_mlp_bytes"));
    assert!(number(exact, "mlp_bytes") < 0.7, "{exact}");

    for row in rows(&found, "rows") {
        let (kl, p99, max) = (number(&row, "kl_mean"), number(&row, "kl_p99"), number(&row, "kl_max"));
        assert!(kl <= p99 && p99 <= max, "{row}");
        let layers = rows(&row, "layers");
        assert_eq!((layers.len(), rows(&row, "kinds").len()), (8, 8));
        let sum: f64 = rows(&row, "layer_bytes").iter().map(|bytes| bytes.as_f64().expect("a number")).sum();
        assert!((sum / number(&row, "bytes_per_token") - 1.0).abs() < 1e-9, "{row}");
        let kept = layers.iter().map(|layer| number(layer, "rows_kept")).sum::<f64>() / 8.0;
        assert!((kept - number(&row, "rows_kept")).abs() < 1e-9, "{row}");
        assert!(number(&row, "tok_per_s") > 0.0, "{row}");
    }
    for name in ["auto", "w2", "sign", "low-rank"] {
        let budgets = of(name);
        let descends = |a: &Value, b: &Value| number(a, "bytes_per_token") >= number(b, "bytes_per_token");
        assert!(budgets.is_sorted_by(descends), "{name}");
        let (first, last) = (number(&budgets[0], "kl_mean"), number(&budgets[5], "kl_mean"));
        // Low rank overfits so short a calibration: on other text it misses more than any budget asks for.
        let factor = if name == "low-rank" { 1.0 } else { 10.0 };
        assert!(factor * first <= last, "{name}: {first} and {last}");
    }
    // More is kept with a larger alpha, and less is missed.
    let (one, more) = (&of("alpha=1")[0], &of("alpha=1.3")[0]);
    assert!(
        number(one, "rows_kept") < number(more, "rows_kept")
            && number(one, "recall") < number(more, "recall")
    );
    assert!(number(one, "missed_energy") > number(more, "missed_energy"));
}

#[test]
fn eval_prints_a_table() {
    let output = expect_success(&mut evaluated(bundled_sinf(), "stored,low-rank,alpha=1.05"));
    let table = String::from_utf8(output.stdout).expect("UTF-8");
    for word in
        ["predictor", "perplexity", "top-1", "tok/s", "stored, by layer", "energy missed", "alpha=1.05"]
    {
        assert!(table.contains(word), "the table lacks {word}: {table}");
    }
    assert_eq!(table.lines().filter(|line| line.starts_with("low-rank ")).count(), 8, "{table}");
    let too_wide =
        table.lines().filter(|line| !line.contains(".sinf")).find(|line| line.chars().count() > 150);
    assert!(too_wide.is_none(), "{too_wide:?}");
}

#[test]
fn eval_refuses_what_it_cannot_compare() {
    let (_folder, exact, _) = converted(&["--predictor", "exact"]);
    let error = expect_error(&mut evaluated(&exact, "w2"), 1);
    assert!(error.contains("out.sinf") && error.contains("sign words") && error.contains("hint"), "{error}");
    // What needs no sign words can be.
    expect_success(&mut evaluated(&exact, "dense,exact,stored"));
    for bad in ["magic", "alpha=-1", "alpha=nan", "alpha"] {
        let output = expect_code(&mut evaluated(bundled_sinf(), bad), 2);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains(bad) && error.contains("sign-x8"), "{error}");
    }
    // No machine has so many GPUs.
    let error = expect_error(evaluated(bundled_sinf(), "stored").args(["--device", "cuda:999"]), 1);
    assert!(error.to_lowercase().contains("cuda") && error.contains("hint"), "{error}");
    let output = expect_code(evaluated(bundled_sinf(), "stored").args(["--device", "gpu"]), 2);
    assert!(String::from_utf8_lossy(&output.stderr).contains("cuda:N"), "{output:?}");
    let eval = |text: &Path| {
        expect_error(
            prep().arg("eval").arg(bundled_sinf()).arg("--text").arg(text).args(["--tokens", "9"]),
            1,
        )
    };
    let folder = tempfile::tempdir().expect("a scratch folder");
    let path = folder.path().join("text");
    assert!(eval(&path).contains("cannot"), "a text that is not there");
    for (bytes, word) in [(&b""[..], "none"), (b"\xff\xfe", "UTF-8")] {
        std::fs::write(&path, bytes).expect("written");
        assert!(eval(&path).contains(word), "{word}");
    }
}

#[test]
fn predictions_that_lack_something_are_refused() {
    let model = Model::open(bundled_sinf()).expect("the converted model opens");
    let options = SessionOptions {
        n_positions_max: 4,
        n_batch_max: 4,
        n_threads: 2,
        mode: MlpMode::Stored,
        alpha_scale: 1.0,
    };
    let mut session = Session::new(&model, &options).expect("a session");
    let layers = |planes, limit: &PredictionLimit| {
        vec![LayerPrediction { planes, low_rank: None, limit: limit.clone() }; 8]
    };
    let exact = layers(None, &PredictionLimit::Exact);
    for bad in [
        exact[..7].to_vec(),
        layers(None, &PredictionLimit::Signs(9)),
        layers(None, &PredictionLimit::Scores(vec![0.0; model.config().intermediate_size as usize])),
    ] {
        let result = session.set_prediction(bad);
        assert!(matches!(result, Err(RuntimeError::Shape(_))), "{result:?}");
    }
    for good in [layers(model.gate_planes(0), &PredictionLimit::Signs(9)), exact] {
        session.set_prediction(good).expect("complete");
        session.decode(1).expect("a token");
    }
    // Limits compare with the file's signs, which the exact layers went without.
    session.set_limits(&[9; 8]).expect("a file with sign words");
    session.decode(1).expect("a token");
}

#[test]
fn convert_refuses_unknown_kinds() {
    for bad in ["magic", "svd", "auto"] {
        let mut command = prep();
        command.args(["convert", "model", "out.sinf", "--predictor", bad]);
        let error = String::from_utf8_lossy(&expect_code(&mut command, 2).stderr).into_owned();
        assert!(error.contains(bad) && error.contains("sign-x8"), "{error}");
    }
}

#[test]
fn budgets_move_along_the_curve_of_the_file() {
    let kept = |budget: &str| rows_kept(bundled_sinf(), &["--budget", budget]);
    let (tight, middle, loose) = (kept("0.0007"), kept("0.004"), kept("0.02"));
    assert!(tight > middle && middle > loose, "rows kept: {tight}, {middle}, {loose}");

    let refused = |file: &Path, budget: &str| {
        expect_error(runtime().arg(file).args(["-p", "x", "-n", "1", "--budget", budget]), 1)
    };
    for outside in ["50", "0.00000001"] {
        let error = refused(bundled_sinf(), outside);
        for word in ["budget", ".sinf", outside.trim_start_matches("0.0000000"), "hint"] {
            assert!(error.contains(word), "the error lacks {word}: {error}");
        }
    }
    let (_folder, without, _) = converted(&["--alpha", "1.1"]);
    let error = refused(&without, "0.001");
    assert!(error.contains("budget curve") && error.contains("hint"), "{error}");
    expect_code(runtime().arg(bundled_sinf()).args(["-p", "x", "--budget", "0"]), 2);
}
