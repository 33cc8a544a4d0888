//! What `prep` writes, reads back and refuses.

use std::path::{Path, PathBuf};
use std::process::Command;

use integration_tests::{
    bundled_model, bundled_sinf, expect_code, expect_error, expect_json, expect_success, prep, runtime,
    shared,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tempfile::TempDir;

/// A copy of the bundled checkpoint that a test may break.
pub(crate) fn model_copy() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let copy = folder.path().join("model");
    std::fs::create_dir(&copy).expect("the scratch folder is writable");
    for entry in std::fs::read_dir(bundled_model()).expect("the bundled model is there") {
        let entry = entry.expect("its entries are readable");
        std::fs::copy(entry.path(), copy.join(entry.file_name())).expect("copied");
    }
    (folder, copy)
}

fn edit_config(model: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = model.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).expect("config.json")).expect("JSON");
    edit(&mut config);
    std::fs::write(&path, config.to_string()).expect("written");
}

/// One tensor on its way through a test: name, dtype, shape, bytes.
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

fn read_tensors(model: &Path) -> Vec<Tensor> {
    let bytes = std::fs::read(model.join("model.safetensors")).expect("the shard");
    let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect()
}

fn write_shard(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("shape and bytes agree"))
    });
    let bytes = safetensors::serialize(views, None).expect("serialised");
    std::fs::write(path, bytes).expect("written");
}

fn edit_tensors(model: &Path, edit: impl FnOnce(&mut Vec<Tensor>)) {
    let mut tensors = read_tensors(model);
    edit(&mut tensors);
    write_shard(&model.join("model.safetensors"), &tensors);
}

fn convert(model: &Path, out: &Path, arguments: &[&str]) -> Command {
    let mut command = prep();
    command.arg("convert").arg(model).arg(out).args(arguments);
    command
}

/// Converts `model`, expects exit 1, checks that nothing was left behind, and returns the error text.
fn refused(model: &Path, arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("out.sinf");
    let error = expect_error(&mut convert(model, &out, arguments), 1);
    let left: Vec<_> = std::fs::read_dir(folder.path()).expect("readable").collect();
    assert!(left.is_empty(), "a refused conversion left {left:?}");
    error
}

#[track_caller]
fn assert_names(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "the error does not name {word:?}: {error}");
    }
}

#[test]
fn two_runs_and_any_thread_count_give_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let first = std::fs::read(bundled_sinf()).expect("the converted model");
    for threads in ["1", "2", "5"] {
        let out = folder.path().join(format!("{threads}.sinf"));
        expect_success(&mut convert(&bundled_model(), &out, &["--threads", threads, "--quiet"]));
        assert!(std::fs::read(&out).expect("written") == first, "{threads} threads gave other bytes");
    }
}

#[test]
fn inspect_and_verify_agree_with_the_file() {
    let json = expect_json(prep().args(["inspect", "--json", "--tensors"]).arg(bundled_sinf()));
    let text = json.to_string();
    assert_names(&text, &["hidden_size", "704", "relu", "w_down_t"]);
    expect_json(prep().args(["verify", "--json"]).arg(bundled_sinf()));
    let shown = expect_success(prep().arg("inspect").arg(bundled_sinf()));
    assert_names(&String::from_utf8_lossy(&shown.stdout), &["relu-llama-8m", "relu", "sign"]);
}

#[test]
fn verify_finds_a_flipped_bit_anywhere() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let bytes = std::fs::read(bundled_sinf()).expect("the converted model");
    let path = folder.path().join("flipped.sinf");
    for part in 0..40 {
        let mut flipped = bytes.clone();
        let at = (bytes.len() - 1) * part / 39;
        flipped[at] ^= 1 << (part % 8);
        std::fs::write(&path, &flipped).expect("written");
        expect_error(prep().arg("verify").arg(&path), 1);
        expect_error(runtime().arg(&path).args(["--check", "-p", "The", "-n", "1"]), 1);
    }
}

#[test]
fn alpha_is_one_value_or_one_per_layer() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("alpha.sinf");
    let json = |arguments: &[&str]| {
        expect_success(&mut convert(&bundled_model(), &out, &[arguments, &["--force", "--quiet"]].concat()));
        expect_json(prep().args(["inspect", "--json"]).arg(&out))
    };
    // alpha = 1: skip when more than half of the 256 signs disagree.
    let limits = |json: &serde_json::Value| -> Vec<u64> {
        let layers = json["predictors"].as_array().expect("predictors");
        layers.iter().map(|layer| layer["limit"].as_u64().expect("limit")).collect()
    };
    assert_eq!(limits(&json(&["--alpha", "1"])), [128; 8]);
    let limits = limits(&json(&["--alpha", "1.1,1.1,1.05,1,1,1,1,1"]));
    assert_eq!(limits, [134, 134, 131, 128, 128, 128, 128, 128]);
    assert_names(&refused(&bundled_model(), &["--alpha", "1,1,1"]), &["3", "8"]);
}

#[test]
fn shards_and_stored_dtypes_change_nothing() {
    let (_folder, model) = model_copy();
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let expected = scratch.path().join("one.sinf");
    expect_success(&mut convert(&bundled_model(), &expected, &["--alpha", "1.05", "--quiet"]));

    // The same values stored as F32 in two shards, as ProSparse-Llama2 does.
    let widened: Vec<Tensor> = read_tensors(&model)
        .into_iter()
        .map(|(name, _, shape, bytes)| {
            let halves: Vec<u8> = bytes
                .chunks_exact(2)
                .flat_map(|half| half::f16::from_le_bytes([half[0], half[1]]).to_f32().to_le_bytes())
                .collect();
            (name, Dtype::F32, shape, halves)
        })
        .collect();
    std::fs::remove_file(model.join("model.safetensors")).expect("removed");
    let (first, second) = widened.split_at(widened.len() / 2);
    let mut weight_map = serde_json::Map::new();
    for (file, tensors) in
        [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)]
    {
        write_shard(&model.join(file), tensors);
        weight_map.extend(tensors.iter().map(|(name, ..)| (name.clone(), file.into())));
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    std::fs::write(model.join("model.safetensors.index.json"), index.to_string()).expect("written");
    let out = scratch.path().join("two.sinf");
    expect_success(&mut convert(&model, &out, &["--alpha", "1.05", "--quiet"]));
    let prompt = ["-p", "The Linux kernel", "-n", "16", "--temp", "0", "--json", "--logits", "4"];
    let (one, two) =
        (expect_json(runtime().arg(&expected).args(prompt)), expect_json(runtime().arg(&out).args(prompt)));
    assert_eq!(one["top_logits"], two["top_logits"]);

    std::fs::remove_file(model.join("model-00002-of-00002.safetensors")).expect("removed");
    assert_names(&refused(&model, &[]), &["model-00002-of-00002.safetensors"]);
}

#[test]
fn either_tokenizer_file_gives_the_same_ids() {
    let scratch = tempfile::tempdir().expect("a scratch folder");
    let mut ids = Vec::new();
    for removed in ["tokenizer.json", "tokenizer.model"] {
        let (_folder, model) = model_copy();
        std::fs::remove_file(model.join(removed)).expect("removed");
        let out = scratch.path().join(format!("without-{removed}.sinf"));
        expect_success(&mut convert(&model, &out, &["--alpha", "1", "--quiet"]));
        let text = "Naïve  café — 漢字 😀\n\tx </s> <s> <0x41> \u{200d} e\u{301}";
        ids.push(
            expect_json(runtime().arg(&out).args(["-p", text, "-n", "1", "--json"]))["prompt_ids"].clone(),
        );
    }
    assert_eq!(ids[0], ids[1]);
    assert!(ids[0].as_array().expect("ids").len() > 20);
}

/// What is wrong, how a model folder is made so, and words that the refusal has to contain.
type BrokenModel<'a> = (&'a str, &'a dyn Fn(&Path), &'a [&'a str]);

#[test]
fn refusals_name_file_tensor_expected_and_found() {
    let cases: &[BrokenModel<'_>] = &[
        ("no config", &|m| std::fs::remove_file(m.join("config.json")).expect("removed"), &["config.json"]),
        (
            "broken config",
            &|m| std::fs::write(m.join("config.json"), "{").expect("written"),
            &["config.json"],
        ),
        (
            "architecture",
            &|m| edit_config(m, |c| c["model_type"] = "mixtral".into()),
            &["model_type", "mixtral"],
        ),
        ("activation", &|m| edit_config(m, |c| c["hidden_act"] = "tanh".into()), &["hidden_act", "tanh"]),
        ("threshold", &|m| edit_config(m, |c| c["hidden_act"] = "fatrelu".into()), &["hidden_act_param"]),
        (
            "rope",
            &|m| {
                edit_config(m, |c| {
                    c["rope_scaling"] = serde_json::json!({"rope_type": "yarn", "factor": 2.0})
                })
            },
            &["rope_scaling", "yarn"],
        ),
        ("attention bias", &|m| edit_config(m, |c| c["attention_bias"] = true.into()), &["attention_bias"]),
        ("mlp bias", &|m| edit_config(m, |c| c["mlp_bias"] = true.into()), &["mlp_bias"]),
        (
            "heads",
            &|m| edit_config(m, |c| c["num_key_value_heads"] = 3.into()),
            &["num_key_value_heads", "3"],
        ),
        (
            "size",
            &|m| edit_config(m, |c| c["hidden_size"] = 512.into()),
            &["512", "256", "model.safetensors"],
        ),
        ("zero", &|m| edit_config(m, |c| c["intermediate_size"] = 0.into()), &["intermediate_size", "0"]),
        ("token id", &|m| edit_config(m, |c| c["eos_token_id"] = 999_999.into()), &["999999", "4096"]),
        (
            "missing tensor",
            &|m| edit_tensors(m, |t| t.retain(|(name, ..)| name != "model.layers.3.mlp.up_proj.weight")),
            &["model.layers.3.mlp.up_proj.weight"],
        ),
        (
            "extra tensor",
            &|m| {
                edit_tensors(m, |t| {
                    t.push(("model.layers.3.mlp.router.weight".into(), Dtype::F16, vec![2], vec![0; 4]));
                });
            },
            &["model.layers.3.mlp.router.weight", "model.safetensors"],
        ),
        (
            "wrong shape",
            &|m| {
                edit_tensors(m, |t| {
                    let (_, _, shape, _) = t
                        .iter_mut()
                        .find(|(name, ..)| name == "model.layers.2.mlp.gate_proj.weight")
                        .expect("there");
                    shape.reverse();
                });
            },
            &["model.layers.2.mlp.gate_proj.weight", "704", "256", "model.safetensors"],
        ),
        (
            "NaN",
            &|m| poison(m, "model.layers.5.self_attn.k_proj.weight", 0x7e00),
            &["k_proj", "model.safetensors", "NaN"],
        ),
        (
            "infinity",
            &|m| poison(m, "lm_head.weight", 0x7c00),
            &["lm_head.weight", "model.safetensors", "inf"],
        ),
        (
            "truncated shard",
            &|m| {
                let path = m.join("model.safetensors");
                let bytes = std::fs::read(&path).expect("read");
                std::fs::write(&path, &bytes[..bytes.len() - 1000]).expect("written");
            },
            &["model.safetensors", "17056128", "17055128"],
        ),
        (
            "hostile header",
            &|m| std::fs::write(m.join("model.safetensors"), u64::MAX.to_le_bytes()).expect("written"),
            &["model.safetensors"],
        ),
        (
            "pickle only",
            &|m| std::fs::rename(m.join("model.safetensors"), m.join("pytorch_model.bin")).expect("renamed"),
            &["pytorch_model.bin", "safetensors"],
        ),
        (
            "no tokenizer",
            &|m| {
                std::fs::remove_file(m.join("tokenizer.json")).expect("removed");
                std::fs::remove_file(m.join("tokenizer.model")).expect("removed");
            },
            &["tokenizer.json", "tokenizer.model"],
        ),
    ];
    for (what, break_it, words) in cases {
        let (_folder, model) = model_copy();
        break_it(&model);
        let error = refused(&model, &[]);
        println!("{what}: {error}");
        assert_names(&error, words);
    }
}

/// Overwrites element 1000 of an f16 tensor.
fn poison(model: &Path, tensor: &str, bits: u16) {
    edit_tensors(model, |tensors| {
        let (.., bytes) = tensors.iter_mut().find(|(name, ..)| name == tensor).expect("there");
        bytes[2000..2002].copy_from_slice(&bits.to_le_bytes());
    });
}

#[test]
fn values_too_large_for_f16_are_refused_with_a_way_out() {
    let (_folder, model) = model_copy();
    edit_tensors(&model, |tensors| {
        let (_, dtype, _, bytes) =
            tensors.iter_mut().find(|(name, ..)| name == "lm_head.weight").expect("there");
        *dtype = Dtype::F32;
        *bytes = bytes
            .chunks_exact(2)
            .flat_map(|half| half::f16::from_le_bytes([half[0], half[1]]).to_f32().to_le_bytes())
            .collect();
        bytes[..4].copy_from_slice(&1e6_f32.to_le_bytes());
    });
    assert_names(&refused(&model, &["--dtype", "f16"]), &["lm_head.weight", "1000000", "--dtype"]);
}

#[test]
fn silu_goes_with_the_exact_predictor_only() {
    let Some(model) = shared("models/silu-llama-8m") else { return };
    assert_names(&refused(&model, &["--predictor", "sign"]), &["silu", "exact"]);
}

#[test]
fn an_existing_file_needs_force() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let out = folder.path().join("out.sinf");
    std::fs::write(&out, "mine").expect("written");
    let error = expect_error(&mut convert(&bundled_model(), &out, &["--alpha", "1"]), 1);
    assert_names(&error, &["out.sinf", "--force"]);
    assert_eq!(std::fs::read(&out).expect("still there"), b"mine");
    expect_success(&mut convert(&bundled_model(), &out, &["--alpha", "1", "--force", "--quiet"]));
    expect_success(prep().arg("verify").arg(&out));
}

#[test]
fn usage_errors_exit_with_two() {
    for arguments in
        [&["convert"][..], &["convert", "a"], &["nonsense"], &["convert", "a", "b", "--dtype", "f8"]]
    {
        expect_code(prep().args(arguments), 2);
    }
}
