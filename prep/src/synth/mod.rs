//! Makes checkpoints of any Llama shape whose MLP is as sparse as asked, for benches and tests of sizes that no
//! trained model at hand has.
//!
//! What is written is an ordinary Hugging Face folder. The weights are random, but not independent of each other: the
//! hidden states of a sample of random tokens go through every layer as it is made, and its gate rows are set against
//! the mean input that the sample shows.
//!
//! ```text
//! embedding[t] = common + noise(t)                       the inputs of all layers share a mean, as trained ones do
//! per layer:   m = mean input of the MLP over a third of the sample, s = sign(m)
//!   B_i ~ N(b, ROW_SPREAD^2)                             rows differ: some are active often, most seldom
//!   gate[i, j] = s_j * (+-a_ij) - c * s_j / sum|m|       a_ij uniform in [0.5, 1.5] / sqrt(d); + with the probability
//!                                                        that moves the row's mean projection to B_i deviations
//!   c by bisection                                       over another third, until the share of zeros is the asked one
//!   up, down, attention ~ N(0, .)                        down scaled so that no layer drowns the ones before it
//! ```
//!
//! The last third of the sample is fresh: the figures of the report (sparsity, and what a limit on sign disagreements
//! keeps and misses) come from it, by the dense forward pass.
//!
//! What these models are not: evidence for the sign rule. Near-constant magnitudes and rows of different readiness are
//! chosen so that signs say about as much here as trained predictors say about ProSparse models (22 to 25 % of rows
//! kept for 91 to 93 % of the active ones). With normal gate weights of one readiness, 20 % kept would miss 21 % of
//! the energy. Speed at a given share of rows kept is what they can measure; quality is what trained models are for.

mod error;
mod folder;
mod generate;
mod options;
mod plan;
mod random;
mod report;
mod sample;
mod shards;
mod vocabulary;

use std::path::Path;

use format_spec::DType;
use half::{bf16, f16};

pub use self::error::SynthError;
use self::folder::{PartialFolder, refuse_occupied};
use self::generate::Generator;
pub use self::options::{ActivationName, DTypeName, ShapePreset, SynthArgs, SynthOptions};
pub use self::report::{LayerReport, SignRulePoint, SynthReport};

/// Makes a checkpoint in `out_dir`: in a folder beside it first, renamed at the end. `progress` gets bytes written and
/// bytes in all. Nothing is synced to the disk, as a lost checkpoint is made again by the same command.
///
/// # Errors
/// [`SynthError::Option`] for a shape that no Llama has, [`SynthError::Occupied`] for a folder in use,
/// [`SynthError::Io`] when writing fails.
pub fn generate(
    options: &SynthOptions,
    out_dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<SynthReport, SynthError> {
    options.check()?;
    refuse_occupied(out_dir, options.force)?;
    let partial = PartialFolder::create(out_dir)?;
    let report = match options.dtype {
        DType::F32 => Generator::<f32>::new(options, &partial.path, progress).run()?,
        DType::Bf16 => Generator::<bf16>::new(options, &partial.path, progress).run()?,
        _ => Generator::<f16>::new(options, &partial.path, progress).run()?,
    };
    partial.rename_to(out_dir)?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::folder::file_names;
    use super::*;
    use format_spec::Activation;
    use std::collections::BTreeMap;

    fn tiny() -> SynthOptions {
        SynthOptions {
            hidden_size: 64,
            intermediate_size: 176,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            vocab_size: 300,
            max_position_embeddings: 128,
            activation: Activation::Relu,
            sparsity: 0.89,
            dtype: DType::F16,
            seed: 3,
            shard_bytes: u64::MAX,
            n_threads: 1,
            force: false,
        }
    }

    fn make(options: &SynthOptions, out_dir: &Path) -> SynthReport {
        generate(options, out_dir, &mut |_, _| ()).unwrap()
    }

    fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
        file_names(folder)
            .unwrap()
            .into_iter()
            .map(|name| {
                let bytes = std::fs::read(folder.join(&name)).unwrap();
                (name, bytes)
            })
            .collect()
    }

    #[test]
    fn fresh_tokens_are_as_sparse_as_asked() {
        let folder = tempfile::tempdir().unwrap();
        for (idx, (activation, sparsity, dtype)) in [
            (Activation::Relu, 0.89, DType::F16),
            (Activation::FatRelu { threshold: 0.01 }, 0.95, DType::Bf16),
            (Activation::FatRelu { threshold: 0.5 }, 0.7, DType::F32),
        ]
        .into_iter()
        .enumerate()
        {
            let options = SynthOptions { activation, sparsity, dtype, ..tiny() };
            let report = make(&options, &folder.path().join(idx.to_string()));
            assert_eq!(report.layers.len(), 2);
            for layer in &report.layers {
                assert!((layer.sparsity - sparsity).abs() < 0.01, "{layer:?}");
                assert!((0.5..3.0).contains(&layer.residual_rms), "{layer:?}");
            }
        }
    }

    #[test]
    fn bytes_depend_on_the_seed_and_not_on_threads_or_shards() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        make(&tiny(), &path("one"));
        make(&SynthOptions { n_threads: 3, ..tiny() }, &path("three"));
        make(&SynthOptions { seed: 4, ..tiny() }, &path("other"));
        let one = files(&path("one"));
        assert!(one == files(&path("three")));
        let other = files(&path("other"));
        assert_eq!(one["tokenizer.json"], other["tokenizer.json"]);
        assert_ne!(one["model.safetensors"], other["model.safetensors"]);

        let report = make(&SynthOptions { shard_bytes: 30_000, ..tiny() }, &path("shards"));
        let shards = files(&path("shards"));
        assert!(report.n_files > 3);
        assert_eq!(shards.keys().filter(|name| name.contains("model")).count(), report.n_files);
        let whole = safetensors::SafeTensors::deserialize(&one["model.safetensors"]).unwrap();
        let mut n_tensors = 0;
        for (name, bytes) in shards.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
            for (tensor, view) in safetensors::SafeTensors::deserialize(bytes).unwrap().tensors() {
                assert_eq!(view.data(), whole.tensor(&tensor).unwrap().data(), "{tensor} in {name}");
                n_tensors += 1;
            }
        }
        assert_eq!(n_tensors, whole.names().len());
        assert_eq!(n_tensors, 3 + 2 * 9);
    }

    #[test]
    fn folders_in_use_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let out_dir = folder.path().join("model");
        std::fs::create_dir(&out_dir).unwrap();
        make(&tiny(), &out_dir);
        let before = files(&out_dir);

        let other = SynthOptions { seed: 4, ..tiny() };
        let error = generate(&other, &out_dir, &mut |_, _| ()).unwrap_err();
        assert!(matches!(error, SynthError::Occupied { foreign: false, .. }), "{error}");
        assert!(error.hint().unwrap().contains("--force"));
        assert!(before == files(&out_dir));

        make(&SynthOptions { force: true, ..other.clone() }, &out_dir);
        assert_ne!(before["model.safetensors"], files(&out_dir)["model.safetensors"]);

        std::fs::write(out_dir.join("notes.txt"), "mine").unwrap();
        let error = generate(&SynthOptions { force: true, ..other }, &out_dir, &mut |_, _| ()).unwrap_err();
        assert!(
            matches!(&error, SynthError::Occupied { foreign: true, found, .. } if found == "notes.txt"),
            "{error}"
        );
        assert!(out_dir.join("notes.txt").exists());
        assert!(!folder.path().join("model.partial").exists());
    }

    #[test]
    fn impossible_shapes_are_refused_by_the_option_they_come_from() {
        let folder = tempfile::tempdir().unwrap();
        for (options, name) in [
            (SynthOptions { hidden_size: 8, ..tiny() }, "--hidden"),
            (SynthOptions { num_attention_heads: 5, ..tiny() }, "--heads"),
            (SynthOptions { num_attention_heads: 64, ..tiny() }, "--heads"),
            (SynthOptions { num_attention_heads: u32::MAX, ..tiny() }, "--heads"),
            (SynthOptions { num_key_value_heads: 0, ..tiny() }, "--kv-heads"),
            (SynthOptions { intermediate_size: u32::MAX, ..tiny() }, "--intermediate"),
            (SynthOptions { num_hidden_layers: 0, ..tiny() }, "--layers"),
            (SynthOptions { max_position_embeddings: 1, ..tiny() }, "--context"),
            (SynthOptions { num_key_value_heads: 3, ..tiny() }, "--kv-heads"),
            (SynthOptions { vocab_size: 259, ..tiny() }, "--vocab"),
            (SynthOptions { sparsity: 0.3, ..tiny() }, "--sparsity"),
            (SynthOptions { sparsity: f64::NAN, ..tiny() }, "--sparsity"),
            (
                SynthOptions { activation: Activation::FatRelu { threshold: f32::NAN }, ..tiny() },
                "--threshold",
            ),
        ] {
            let error = generate(&options, &folder.path().join("model"), &mut |_, _| ()).unwrap_err();
            assert!(matches!(&error, SynthError::Option { option, .. } if *option == name), "{error}");
        }
        assert!(file_names(folder.path()).unwrap().is_empty());
    }

    #[test]
    fn folders_hold_what_a_checkpoint_needs() {
        let folder = tempfile::tempdir().unwrap();
        let out_dir = folder.path().join("model");
        let activation = Activation::FatRelu { threshold: 0.01 };
        let names = [(DType::F32, "float32", 4), (DType::F16, "float16", 2), (DType::Bf16, "bfloat16", 2)];
        for (dtype, name, element_bytes) in names {
            let report = make(&SynthOptions { activation, dtype, force: true, ..tiny() }, &out_dir);
            let files = files(&out_dir);
            let config: serde_json::Value = serde_json::from_slice(&files["config.json"]).unwrap();
            assert_eq!(config["torch_dtype"], name);
            assert_eq!(config["hidden_act"], "fatrelu");
            assert_eq!(config["hidden_act_param"], 0.01);
            assert_eq!(config["num_key_value_heads"], 2);

            let tokenizer = tokenizers::Tokenizer::from_bytes(&files["tokenizer.json"]).unwrap();
            assert_eq!(tokenizer.get_vocab_size(true), 300);

            let tensors = safetensors::SafeTensors::deserialize(&files["model.safetensors"]).unwrap();
            let n_bytes: usize = tensors.tensors().iter().map(|(_, view)| view.data().len()).sum();
            assert_eq!(n_bytes as u64, report.weight_bytes);
            assert_eq!(n_bytes as u64, report.n_parameters * element_bytes);
            for (tensor, shape) in [
                ("model.embed_tokens.weight", [300, 64]),
                ("model.layers.1.self_attn.k_proj.weight", [32, 64]),
                ("model.layers.1.mlp.gate_proj.weight", [176, 64]),
                ("model.layers.0.mlp.down_proj.weight", [64, 176]),
                ("lm_head.weight", [300, 64]),
            ] {
                assert_eq!(tensors.tensor(tensor).unwrap().shape(), shape, "{tensor}");
            }
        }
    }

    #[test]
    fn progress_ends_at_the_bytes_of_all_weights() {
        let folder = tempfile::tempdir().unwrap();
        let mut seen = Vec::new();
        let report =
            generate(&tiny(), &folder.path().join("model"), &mut |done, total| seen.push((done, total)))
                .unwrap();
        assert!(seen.is_sorted());
        assert_eq!(*seen.last().unwrap(), (report.weight_bytes, report.weight_bytes));
    }
}
