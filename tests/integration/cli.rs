//! The command line of `runtime` as its users know it from llama.cpp.

use integration_tests::{
    assert_close, bundled_model, bundled_sinf, expect_code, expect_error, expect_json, expect_success, prep,
    runtime,
};
use serde_json::Value;

fn generate(arguments: &[&str]) -> Value {
    expect_json(runtime().arg(bundled_sinf()).args(arguments).arg("--json"))
}

#[test]
fn stdout_holds_text_alone_and_stderr_the_statistics() {
    let arguments = ["-p", "The Linux kernel", "-n", "24", "--temp", "0", "--no-display-prompt"];
    let output = expect_success(runtime().arg(bundled_sinf()).args(arguments));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let json = generate(&arguments);
    assert_eq!(text.trim_end_matches('\n'), json["text"].as_str().expect("text").trim_end_matches('\n'));
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    for word in ["tok/s", "p50", "p95", "GB/s", "kept", "active"] {
        assert!(stderr.contains(word), "statistics lack {word}: {stderr}");
    }
}

#[test]
fn json_has_the_documented_fields() {
    let json = generate(&["-p", "The Linux kernel", "-n", "8", "--temp", "0", "--logits", "3"]);
    for field in
        ["prompt_ids", "ids", "text", "stop_reason", "seed", "predictor", "device", "stats", "top_logits"]
    {
        assert!(!json[field].is_null(), "{field} is missing: {json}");
    }
    for field in [
        "load_ms",
        "prompt_tok_per_s",
        "decode_tok_per_s",
        "ms_per_tok_p50",
        "ms_per_tok_p95",
        "gb_per_s",
        "rows_kept",
        "rows_active",
    ] {
        let value = json["stats"][field].as_f64().unwrap_or_else(|| panic!("stats.{field}: {json}"));
        assert!(value.is_finite() && value >= 0.0, "stats.{field} is {value}");
    }
    assert!(json["stats"]["rows_kept"].as_f64() >= json["stats"]["rows_active"].as_f64());
    assert_eq!(json["top_logits"].as_array().expect("top_logits").len(), 8);
    assert!(
        json["top_logits"]
            .as_array()
            .expect("rows")
            .iter()
            .all(|row| row.as_array().expect("pairs").len() == 3)
    );
}

#[test]
fn greedy_and_seeded_text_do_not_depend_on_threads() {
    for sampling in
        [&["--temp", "0"][..], &["--temp", "0.9", "--top-k", "50", "--top-p", "0.95", "--seed", "7"]]
    {
        let run = |threads: &str| {
            let json = generate(
                &[&["-p", "A history of", "-n", "48", "--logits", "2", "-t", threads], sampling].concat(),
            );
            (json["ids"].clone(), json["top_logits"].clone())
        };
        let one = run("1");
        for threads in ["2", "3", "8"] {
            assert_eq!(run(threads), one, "{threads} threads, {sampling:?}");
        }
    }
    let seeds: Vec<Value> = ["1", "2", "3"]
        .map(|seed| generate(&["-p", "A", "-n", "24", "--seed", seed])["ids"].clone())
        .to_vec();
    assert!(seeds[0] != seeds[1] || seeds[1] != seeds[2], "the seed changes nothing");
}

#[test]
fn a_reported_random_seed_repeats_the_text() {
    let first = generate(&["-p", "A history of", "-n", "24"]);
    let seed = first["seed"].to_string();
    assert_eq!(generate(&["-p", "A history of", "-n", "24", "--seed", &seed])["ids"], first["ids"]);
}

#[test]
fn generation_stops_for_the_stated_reason() {
    let whole = generate(&["-p", "The Linux kernel", "-n", "40", "--temp", "0", "--ignore-eos"]);
    assert_eq!(whole["ids"].as_array().expect("ids").len(), 40);
    let text = whole["text"].as_str().expect("text");
    let stop: String = text.chars().skip(12).take(5).collect();
    let stopped =
        generate(&["-p", "The Linux kernel", "-n", "40", "--temp", "0", "--ignore-eos", "--stop", &stop]);
    let expected = &text[..text.find(&stop).expect("it occurs")];
    assert_eq!(stopped["text"].as_str().expect("text"), expected, "text before the stop string");
    assert_ne!(stopped["stop_reason"], whole["stop_reason"]);
    let full = generate(&["-p", "The Linux kernel", "-n", "-1", "--temp", "0", "--ignore-eos", "-c", "32"]);
    assert!(full["ids"].as_array().expect("ids").len() <= 32 - 3);
    assert_ne!(full["stop_reason"], whole["stop_reason"]);
    assert_ne!(full["stop_reason"], stopped["stop_reason"]);
}

#[test]
fn an_empty_prompt_generates_from_bos() {
    let json = generate(&["--prompt", "", "-n", "4", "--temp", "0"]);
    assert_eq!(json["prompt_ids"], serde_json::json!([1]));
    assert_eq!(json["ids"].as_array().expect("ids").len(), 4);
}

#[test]
fn too_much_context_is_refused_with_both_numbers() {
    let prompt = "word ".repeat(700);
    let error = expect_error(runtime().arg(bundled_sinf()).args(["-p", &prompt]), 1);
    assert!(error.contains("512"), "{error}");
    let error = expect_error(runtime().arg(bundled_sinf()).args(["-p", "x", "-c", "4096"]), 1);
    assert!(error.contains("512") && error.contains("4096"), "{error}");
}

#[test]
fn a_missing_device_is_an_error_and_never_a_silent_fallback() {
    let error = expect_error(runtime().arg(bundled_sinf()).args(["-p", "x", "--device", "cuda"]), 1);
    assert!(error.to_lowercase().contains("cuda"), "{error}");
    let devices = expect_success(runtime().arg("--list-devices"));
    assert!(String::from_utf8_lossy(&devices.stdout).to_lowercase().contains("cpu"));
    let measured = expect_success(runtime().args(["--list-devices", "--measure"]));
    let text = String::from_utf8_lossy(&measured.stdout).into_owned();
    let cpu = text.lines().find(|line| line.starts_with("cpu")).expect("a line for the CPU");
    assert!(cpu.contains(", reads ") && cpu.ends_with("GB/s"), "{text}");
}

#[test]
fn wrong_usage_exits_with_two() {
    expect_code(&mut runtime(), 2);
    expect_code(runtime().arg(bundled_sinf()).arg("--no-such-flag"), 2);
    expect_code(runtime().arg(bundled_sinf()).args(["-p", "x", "--temp", "hot"]), 2);
    expect_code(runtime().arg(bundled_sinf()).args(["-p", "x", "--chat", "no-such-format"]), 2);
}

#[test]
fn exact_equals_dense() {
    let run = |mode: &str| {
        let line = ["-p", "The Linux kernel", "-n", "32", "--temp", "0", "--ignore-eos", "--predictor", mode];
        generate(&line)
    };
    let dense = run("dense");
    assert_eq!(run("exact")["ids"], dense["ids"]);
    assert!((dense["stats"]["rows_kept"].as_f64().expect("rows_kept") - 1.0).abs() < 1e-9);
}

/// The bundled model has 8 layers of 256 columns: a limit moves a layer's share by up to 5 %, layers make up for it.
#[test]
fn bench_keeps_the_share_of_rows_that_is_asked_for() {
    let bench = |args: &[&str]| {
        let command = &mut runtime();
        let output = expect_json(
            command
                .arg(bundled_sinf())
                .args(["--bench", "-p", "0", "-n", "32", "-r", "1", "--output", "json"])
                .args(args),
        );
        output["rows"].as_array().expect("rows").clone()
    };
    let rows = bench(&["--keep-share", "0.15,0.5,1"]);
    let exact = rows.iter().find(|row| row["mode"] == "exact").expect("an exact row");
    let asked: Vec<&Value> = rows.iter().filter(|row| row["keep_share"].is_number()).collect();
    assert_eq!(asked.len(), 3, "{rows:?}");
    for (row, share) in asked.iter().zip([0.15, 0.5, 1.0]) {
        let field = |name: &str| row[name].as_f64().expect("a number");
        assert_close(field("keep_share"), share, 0.0, "the share asked for");
        assert_close(field("rows_kept"), share, 0.01, "the share kept");
        assert!(field("rows_active") <= field("rows_kept"), "{row}");
        assert!(field("bytes_per_token") > 0.0, "{row}");
    }
    // With every row kept, the predictor costs its sign words and changes nothing else.
    assert_eq!(asked[2]["rows_active"], exact["rows_active"]);
    let bytes = |row: &Value| row["bytes_per_token"].as_f64().expect("a number");
    assert!(bytes(asked[0]) < bytes(asked[1]) && bytes(exact) < bytes(asked[2]), "{rows:?}");
}

#[test]
fn a_share_of_rows_needs_sign_words() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("exact.sinf");
    let convert = &mut prep();
    expect_success(convert.arg("convert").arg(bundled_model()).arg(&out).args([
        "--predictor",
        "exact",
        "--quiet",
    ]));
    let command = &mut runtime();
    let error =
        expect_error(command.arg(&out).args(["--bench", "-p", "0", "-n", "4", "--keep-share", "0.5"]), 1);
    assert!(
        error.contains("exact.sinf") && error.contains("sign words") && error.contains("--predictor sign"),
        "{error}"
    );
}

#[test]
fn bench_prints_every_row_in_every_format() {
    for format in ["md", "csv", "json"] {
        let output = expect_success(runtime().arg(bundled_sinf()).args([
            "--bench",
            "-p",
            "16",
            "-n",
            "8",
            "-r",
            "2",
            "--verbose",
            "--output",
            format,
        ]));
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        for word in ["pp16", "tg8", "dense", "exact", "predicted"] {
            assert!(text.contains(word), "--output {format} lacks {word}: {text}");
        }
        if format == "json" {
            serde_json::from_str::<Value>(&text).expect("JSON");
        }
    }
}
