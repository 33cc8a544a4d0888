//! Whole-model results against float32 reference outputs of Hugging Face transformers (`tests/golden/README.md`).

use std::path::{Path, PathBuf};

use integration_tests::{
    assert_close, bundled_model, bundled_sinf, expect_json, expect_success, prep, runtime, shared, workspace,
};
use serde::Deserialize;
use tempfile::TempDir;

/// Greedy steps whose best two logits are closer than this may go either way in half precision.
const SAFE_MARGIN: f64 = 0.01;
/// Largest difference of a logit: weights in half precision with an f16 cache.
const TOLERANCE_HALF: f64 = 0.02;
/// Largest difference of a logit: everything in f32.
const TOLERANCE_F32: f64 = 1e-3;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Prompt>,
    perplexity: Perplexity,
}

#[derive(Deserialize)]
struct Prompt {
    text: String,
    ids: Vec<u32>,
    top_ids: Vec<u32>,
    top_logits: Vec<f64>,
    greedy_ids: Vec<u32>,
    greedy_margin: Vec<f64>,
}

#[derive(Deserialize)]
struct Perplexity {
    n_tokens: u64,
    mean_nll: f64,
    ppl: f64,
    nll_per_window: Vec<f64>,
}

#[derive(Deserialize)]
struct Generated {
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    top_logits: Vec<Vec<(u32, f64)>>,
}

fn golden(path: &Path) -> Golden {
    serde_json::from_slice(&std::fs::read(path).expect("the golden file is readable"))
        .expect("it is as described")
}

fn bundled_golden() -> Golden {
    golden(&workspace().join("tests/golden/relu-llama-8m.json"))
}

fn generate(sinf: &Path, prompt: &Prompt, mode: &str) -> Generated {
    let n = prompt.greedy_ids.len().to_string();
    let json = expect_json(
        runtime()
            .arg(sinf)
            .args([
                "--prompt",
                &prompt.text,
                "-n",
                &n,
                "--temp",
                "0",
                "--ignore-eos",
                "--json",
                "--logits",
                "20",
            ])
            .args(["--device", "cpu", "--predictor", mode]),
    );
    serde_json::from_value(json).expect("the object has the documented fields")
}

/// Tokenizer, the 20 largest logits and the greedy text of every golden prompt. Returns the largest difference.
fn check_prompts(sinf: &Path, golden: &Golden, mode: &str, tolerance: f64) -> f64 {
    let mut worst: f64 = 0.0;
    for prompt in &golden.prompts {
        let generated = generate(sinf, prompt, mode);
        assert_eq!(generated.prompt_ids, prompt.ids, "token ids of {:?}", prompt.text);
        let found = &generated.top_logits[0];
        assert_eq!(found.len(), prompt.top_ids.len());
        for (rank, (&id, &expected)) in prompt.top_ids.iter().zip(&prompt.top_logits).enumerate() {
            // The last ranks may be swapped with ones outside the 20 when they are closer than the tolerance.
            let logit = found.iter().find(|(found, _)| *found == id).unwrap_or(&found[rank]).1;
            assert_close(logit, expected, tolerance, &format!("{:?}: logit of token {id}", prompt.text));
            worst = worst.max((logit - expected).abs());
        }
        for (step, (&expected, &margin)) in prompt.greedy_ids.iter().zip(&prompt.greedy_margin).enumerate() {
            if margin <= SAFE_MARGIN && generated.ids[step] != expected {
                break;
            }
            assert_eq!(generated.ids[step], expected, "{:?}: step {step}, margin {margin}", prompt.text);
        }
    }
    println!("{}: {mode}: largest logit difference {worst:.6}", sinf.display());
    worst
}

fn convert(model: &Path, arguments: &[&str]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("model.sinf");
    expect_success(prep().arg("convert").arg(model).arg(&out).args(arguments).arg("--quiet"));
    (folder, out)
}

#[test]
fn bundled_model_dense_equals_the_reference() {
    check_prompts(bundled_sinf(), &bundled_golden(), "dense", TOLERANCE_HALF);
}

#[test]
fn bundled_model_exact_equals_the_reference() {
    check_prompts(bundled_sinf(), &bundled_golden(), "exact", TOLERANCE_HALF);
}

#[test]
fn bundled_model_in_f32_equals_the_reference_closely() {
    let (_folder, sinf) = convert(&bundled_model(), &["--dtype", "f32", "--predictor", "exact"]);
    check_prompts(&sinf, &bundled_golden(), "dense", TOLERANCE_F32);
}

#[test]
fn bundled_model_in_bf16_keeps_the_tokenizer_and_runs() {
    let (_folder, sinf) = convert(&bundled_model(), &["--dtype", "bf16", "--predictor", "exact"]);
    // Rounding f16 weights to bf16 loses three bits: a sanity bound, not an accuracy claim.
    check_first_logits(&sinf, &bundled_golden(), 0.5);
}

fn check_first_logits(sinf: &Path, golden: &Golden, tolerance: f64) {
    for prompt in &golden.prompts {
        let found = generate(sinf, prompt, "dense").top_logits[0][0].1;
        assert_close(found, prompt.top_logits[0], tolerance, &prompt.text);
    }
}

/// Perplexity and its windows on the held-out text, dense and exact.
fn check_perplexity(sinf: &Path, golden: &Golden) {
    let Some(text) = shared("data/val.txt") else { return };
    let windows = golden.perplexity.nll_per_window.len().to_string();
    for mode in ["dense", "exact"] {
        let json = expect_json(runtime().arg(sinf).arg("--perplexity").arg(&text).args([
            "--windows",
            &windows,
            "--predictor",
            mode,
            "--device",
            "cpu",
            "--json",
        ]));
        assert_eq!(json["n_tokens"], golden.perplexity.n_tokens);
        let (ppl, nll) = (json["ppl"].as_f64().expect("ppl"), json["mean_nll"].as_f64().expect("mean_nll"));
        println!("{}: {mode}: perplexity {ppl:.6}, reference {:.6}", sinf.display(), golden.perplexity.ppl);
        assert_close(ppl, golden.perplexity.ppl, golden.perplexity.ppl * 1e-3, "perplexity");
        assert_close(nll, golden.perplexity.mean_nll, 1e-3, "mean negative log likelihood");
    }
}

#[test]
fn bundled_model_perplexity_equals_the_reference() {
    check_perplexity(bundled_sinf(), &bundled_golden());
}

fn check_shared_model(name: &str, dtypes: &[(&str, f64)]) {
    let (Some(model), Some(file)) =
        (shared(&format!("models/{name}")), shared(&format!("golden/{name}.json")))
    else {
        return;
    };
    let golden = golden(&file);
    for &(dtype, tolerance) in dtypes {
        let (_folder, sinf) = convert(&model, &["--dtype", dtype, "--predictor", "exact"]);
        check_prompts(&sinf, &golden, "dense", tolerance);
        if dtype == "auto" {
            check_perplexity(&sinf, &golden);
        }
    }
}

#[test]
fn relu_llama_46m_equals_the_reference() {
    check_shared_model("relu-llama-46m", &[("auto", TOLERANCE_HALF), ("f32", TOLERANCE_F32)]);
}

#[test]
fn silu_llama_8m_equals_the_reference() {
    check_shared_model("silu-llama-8m", &[("auto", TOLERANCE_HALF), ("f32", TOLERANCE_F32)]);
}

/// The masked pass over the predictor that the file stores, and its distance from the dense pass.
#[test]
fn predicted_perplexity_stays_within_one_percent_of_dense() {
    let Some(text) = shared("data/val.txt") else { return };
    let json = expect_json(runtime().arg(bundled_sinf()).arg("--perplexity").arg(&text).args([
        "--kl",
        "--windows",
        "4",
        "--json",
    ]));
    let dense = expect_json(runtime().arg(bundled_sinf()).arg("--perplexity").arg(&text).args([
        "--predictor",
        "dense",
        "--windows",
        "4",
        "--json",
    ]));
    let (ppl, dense_ppl) = (json["ppl"].as_f64().expect("ppl"), dense["ppl"].as_f64().expect("ppl"));
    assert_close(ppl, dense_ppl, dense_ppl * 0.01, "perplexity with the stored predictor");
    let kl = json["kl_mean"].as_f64().expect("kl_mean");
    assert!(kl > 0.0 && kl < 0.05, "mean KL divergence {kl}");
    let layers = json["layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 8);
    for layer in layers {
        let share = |name: &str| layer[name].as_f64().unwrap_or_else(|| panic!("{name} in {layer}"));
        assert!(
            share("rows_kept") < 1.0 && share("rows_kept") > share("rows_active") * share("recall") * 0.999
        );
        assert!(share("recall") > 0.5 && share("recall") <= 1.0);
    }
}
