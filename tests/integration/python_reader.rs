//! FORMAT.md suffices: `read_sinf.py`, written from it alone, reads what `prep` writes and finds the same.

use std::path::Path;
use std::process::Command;

use format_spec::{DType, Layout, Section};
use half::{bf16, f16};
use integration_tests::{assert_close, bundled_sinf, expect_code, expect_json, workspace};
use serde_json::Value;

/// `python3 read_sinf.py FILE`, or nothing, and a note on stderr, where Python or NumPy is missing.
/// `SINF_PYTHON` names another interpreter.
fn reader(file: &Path) -> Option<Command> {
    let python = std::env::var("SINF_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has_numpy = Command::new(&python).args(["-c", "import numpy"]).output();
    if !has_numpy.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: {python} with NumPy is not there");
        return None;
    }
    let mut command = Command::new(python);
    command.arg(workspace().join("tests/read_sinf.py")).arg(file);
    Some(command)
}

#[test]
fn the_python_reader_finds_the_same_model() {
    let golden = workspace().join("format-spec/tests/golden/tiny.sinf");
    for path in [bundled_sinf(), golden.as_path()] {
        let Some(mut command) = reader(path) else { return };
        let found = expect_json(&mut command);
        let file = std::fs::read(path).expect("the file");
        let layout = Layout::parse(&file).expect("valid");
        assert_config(&found["config"], &layout);
        assert_predictors(found["predictors"].as_array().expect("predictors"), &layout);
        assert_tensors(found["tensors"].as_array().expect("tensors"), &layout, &file);
    }
}

#[test]
fn the_python_reader_refuses_sign_words_of_other_weights() {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let mut file = std::fs::read(bundled_sinf()).expect("the file");
    let layout = Layout::parse(&file).expect("valid");
    let signs = layout.find(format_spec::SectionKind::GateSigns, Some(0)).expect("a sparse model");
    file[signs.offset_bytes as usize + 17] ^= 4;
    let path = folder.path().join("signs.sinf");
    std::fs::write(&path, file).expect("written");
    let Some(mut command) = reader(&path) else { return };
    let output = expect_code(&mut command, 1);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("sign words of layer 0"), "{error}");
}

fn assert_config(found: &Value, layout: &Layout) {
    let config = layout.config();
    for (name, expected) in [
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_attention_heads", config.num_attention_heads),
        ("num_key_value_heads", config.num_key_value_heads),
        ("head_dim", config.head_dim),
        ("vocab_size", config.vocab_size),
        ("max_position_embeddings", config.max_position_embeddings),
    ] {
        assert_eq!(found[name].as_u64(), Some(u64::from(expected)), "{name}");
    }
    assert_eq!(found["activation"], config.activation.name());
    assert_eq!(found["rope_theta"].as_f64(), Some(config.rope.theta));
    assert_eq!(found["rms_norm_eps"].as_f64(), Some(f64::from(config.rms_norm_eps)));
    assert_eq!(found["tie_word_embeddings"], config.tie_word_embeddings);
    assert_eq!(found["bos_token_id"].as_u64(), config.bos_token_id.map(u64::from));
    assert_eq!(found["eos_token_ids"], serde_json::json!(config.eos_token_ids));
}

fn assert_predictors(found: &[Value], layout: &Layout) {
    assert_eq!(found.len(), layout.predictors().len());
    for (found, expected) in found.iter().zip(layout.predictors()) {
        assert_eq!(found["kind"], expected.kind.name());
        assert_eq!(found["limit"].as_u64(), Some(u64::from(expected.limit)));
        assert_eq!(found["n_tokens"].as_u64(), Some(u64::from(expected.n_tokens)));
        let alpha: f64 = found["alpha"].as_str().expect("text").parse().expect("a number");
        assert_eq!(alpha, f64::from(expected.alpha));
        for (name, share) in [
            ("rows_active", expected.rows_active),
            ("rows_kept", expected.rows_kept),
            ("recall", expected.recall),
            ("missed_energy", expected.missed_energy),
        ] {
            let found = found[name].as_f64().map(|found| found as f32);
            assert_eq!(found, (!share.is_nan()).then_some(share), "{name}");
        }
    }
}

fn assert_tensors(found: &[Value], layout: &Layout, file: &[u8]) {
    assert_eq!(found.len(), layout.sections().len());
    for (found, section) in found.iter().zip(layout.sections()) {
        let name = format!("{} {:?}", section.kind.name(), section.layer);
        assert_eq!(found["kind"], section.kind.name());
        assert_eq!(found["layer"].as_u64(), section.layer.map(u64::from), "{name}");
        assert_eq!(found["shape"], serde_json::json!(section.shape.dims()), "{name}");
        let (sum, sum_abs) = sums(section, section.bytes(file));
        assert_close(found["sum"].as_f64().expect("a sum"), sum, 1e-9 * sum_abs, &name);
    }
}

/// Sum of the elements and of their magnitudes. NaN counts as zero, as it stands for shares that were not measured.
fn sums(section: &Section, bytes: &[u8]) -> (f64, f64) {
    let element_bytes = section.dtype.element_bytes().expect("not a block type");
    let values = bytes.chunks_exact(element_bytes).map(|bytes| match (section.dtype, bytes) {
        (DType::U8, &[a]) => f64::from(a),
        (DType::U32, &[a, b, c, d]) => f64::from(u32::from_le_bytes([a, b, c, d])),
        (DType::F32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (DType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        (DType::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        (dtype, _) => unreachable!("elements of {}", dtype.name()),
    });
    let values = values.filter(|value| !value.is_nan());
    values.fold((0.0, 0.0), |(sum, sum_abs), value| (sum + value, sum_abs + value.abs()))
}
