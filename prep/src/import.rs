//! Trained predictors of low rank, from a folder of safetensors files.
//!
//! Deja Vu (arXiv 2310.17157, `sparse_predictor/main_mlp.py`) and PowerInfer (arXiv 2312.12456,
//! `convert-hf-to-powerinfer-gguf.py`) train a network of two linear layers for each MLP, `fc2 act(fc1 x)`, with x the MLP's
//! input after its norm. PowerInfer has a ReLU between them, files `model_N.pt` with `fc1.weight` and `fc2.weight`, and in
//! GGUF the names `blk.N.fc1.weight`; Deja Vu has nothing between them, and the names of a sequence, `0.weight` and
//! `1.weight`. Neither has biases; one of the second layer is accepted. Taken are
//!
//! ```text
//! fc1.weight, fc2.weight [, fc2.bias]     in a file whose name ends in the layer: model_N.safetensors
//! 0.weight, 1.weight [, 1.bias]           likewise
//! blk.N.fc1.weight, ...                   in any file, with any words before and after the layer
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use format_spec::{DType, ModelConfig, SourceFile};
use half::f16;

use crate::checkpoint::{Checkpoint, TensorInfo, hash_file, io_error};
use crate::pack;
use crate::predict::Factors;
use crate::{PrepError, Progress};

const ENDING: &str = "safetensors";

/// A part of a layer's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Fc1,
    Fc2,
    Bias,
}

impl Part {
    const ALL: [Self; 3] = [Self::Fc1, Self::Fc2, Self::Bias];

    fn name(self) -> &'static str {
        match self {
            Self::Fc1 => "fc1.weight",
            Self::Fc2 => "fc2.weight",
            Self::Bias => "fc2.bias",
        }
    }

    /// In a sequence of two layers.
    fn name_in_sequence(self) -> &'static str {
        match self {
            Self::Fc1 => "0.weight",
            Self::Fc2 => "1.weight",
            Self::Bias => "1.bias",
        }
    }
}

/// Reads the predictors of all layers in `folder`, and what was read from it; `relu` says what lies between the factors.
///
/// # Errors
/// No safetensors files, one that is damaged, a tensor that is no part of a predictor of this model, has another shape or
/// elements that f16 cannot hold, or is missing.
pub(crate) fn read_predictors(
    folder: &Path,
    config: &ModelConfig,
    relu: bool,
    progress: &Progress,
) -> Result<(Vec<Factors>, Vec<SourceFile>), PrepError> {
    let mut parts: BTreeMap<(u32, Part), (usize, TensorInfo)> = BTreeMap::new();
    let mut files = Vec::new();
    for path in files_of(folder)? {
        let checkpoint = Checkpoint::open_file(&path)?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        for name in checkpoint.names() {
            let refuse = |expected: String, found: String| PrepError::PredictorTensor {
                path: path.clone(),
                tensor: name.to_owned(),
                expected,
                found,
            };
            let Some((layer, part)) = place_of(name, &stem) else {
                let expected = "fc1.weight, fc2.weight or fc2.bias of a layer that it or its file names";
                return Err(refuse(expected.to_owned(), "this name".to_owned()));
            };
            if layer >= config.num_hidden_layers {
                let expected = format!("a layer below {}", config.num_hidden_layers);
                return Err(refuse(expected, format!("layer {layer}")));
            }
            let tensor = checkpoint.tensor(name)?.clone();
            if parts.insert((layer, part), (files.len(), tensor)).is_some() {
                let expected = format!("one {} of layer {layer}", part.name());
                return Err(refuse(expected, "another one too".to_owned()));
            }
        }
        files.push(checkpoint);
    }
    let read = |layer: u32, part: Part, shape: &dyn Fn(&[u64]) -> Result<(), String>| {
        let Some((file, tensor)) = parts.get(&(layer, part)) else { return Ok(None) };
        progress.check()?;
        read_part(&files[*file], tensor, shape).map(Some)
    };
    let mut layers = Vec::new();
    for layer in 0..config.num_hidden_layers {
        let missing = |part: Part| PrepError::PredictorTensor {
            path: folder.to_owned(),
            tensor: format!("{} of layer {layer}", part.name()),
            expected: format!("it in model_{layer}.{ENDING} or as layers.{layer}.{}", part.name()),
            found: "none".to_owned(),
        };
        let (d, f) = (u64::from(config.hidden_size), u64::from(config.intermediate_size));
        let fc1 = read(layer, Part::Fc1, &|dims| match *dims {
            [rank, n_cols] if (1..=d).contains(&rank) && n_cols == d => Ok(()),
            _ => Err(format!("[rank up to {d}, {d}]")),
        })?;
        let fc1 = fc1.ok_or_else(|| missing(Part::Fc1))?;
        let rank = fc1.len() / d as usize;
        let fits = |expected: Vec<u64>| {
            move |dims: &[u64]| if dims == expected { Ok(()) } else { Err(format!("{expected:?}")) }
        };
        let fc2 = read(layer, Part::Fc2, &fits(vec![f, rank as u64]))?.ok_or_else(|| missing(Part::Fc2))?;
        let bias = read(layer, Part::Bias, &fits(vec![f]))?;
        let bias =
            bias.map_or_else(|| vec![0.0; f as usize], |bias| bias.into_iter().map(f16::to_f32).collect());
        layers.push(Factors { rank, fc1, fc2, bias, relu, residual: None });
    }
    let sources = files.iter().flat_map(Checkpoint::shards).map(|shard| hash_file(&shard.path));
    Ok((layers, sources.collect::<Result<_, _>>()?))
}

/// The safetensors files of `folder`, by name.
fn files_of(folder: &Path) -> Result<Vec<PathBuf>, PrepError> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io_error("open", folder))? {
        paths.push(entry.map_err(io_error("read", folder))?.path());
    }
    paths.sort();
    let pickle = paths.iter().find(|path| path.extension().is_some_and(|ending| ending == "pt")).cloned();
    paths.retain(|path| path.extension().is_some_and(|ending| ending == ENDING));
    match (paths.is_empty(), pickle) {
        (false, _) => Ok(paths),
        (true, Some(pickle)) => Err(PrepError::OnlyPickles {
            folder: folder.to_owned(),
            file: pickle.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        }),
        (true, None) => Err(PrepError::PredictorTensor {
            path: folder.to_owned(),
            tensor: "fc1.weight of layer 0".to_owned(),
            expected: "safetensors files of a predictor".to_owned(),
            found: "none".to_owned(),
        }),
    }
}

/// The layer and part of the tensor `name` of the file `stem`.
fn place_of(name: &str, stem: &str) -> Option<(u32, Part)> {
    for part in Part::ALL {
        if name == part.name() || name == part.name_in_sequence() {
            let digits = stem.len() - stem.trim_end_matches(|c: char| c.is_ascii_digit()).len();
            return Some((stem[stem.len() - digits..].parse().ok()?, part));
        }
        if let Some(words) = name.strip_suffix(part.name()).and_then(|words| words.strip_suffix('.')) {
            let layer = words.rsplit('.').find_map(|word| word.parse().ok())?;
            return Some((layer, part));
        }
    }
    None
}

/// A tensor in f16.
fn read_part(
    file: &Checkpoint,
    tensor: &TensorInfo,
    shape: &dyn Fn(&[u64]) -> Result<(), String>,
) -> Result<Vec<f16>, PrepError> {
    let path = || file.path_of(tensor).to_owned();
    shape(&tensor.shape).map_err(|expected| PrepError::PredictorTensor {
        path: path(),
        tensor: tensor.name.clone(),
        expected: format!("shape {expected}"),
        found: format!("{:?}", tensor.shape),
    })?;
    let mut bytes = vec![0; tensor.len as usize];
    file.read_at(tensor, 0, &mut bytes)?;
    let mut halves = Vec::new();
    pack::convert(&bytes, tensor.dtype, DType::F16, &mut halves).map_err(|bad| {
        PrepError::PredictorTensor {
            path: path(),
            tensor: tensor.name.clone(),
            expected: "finite values that f16 holds".to_owned(),
            found: format!("{} at element {}", bad.value, bad.index),
        }
    })?;
    Ok(halves.as_chunks::<2>().0.iter().map(|&bytes| f16::from_le_bytes(bytes)).collect())
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::arch;

    /// A tensor of f32: name, shape, and values by index.
    type Named<'a> = (&'a str, &'a [usize], fn(usize) -> f32);

    fn write(folder: &Path, file: &str, tensors: &[Named<'_>]) {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, shape, value)| {
                (0..shape.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect()
            })
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            (name.to_string(), TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("shape fits"))
        });
        let views: Vec<_> = views.collect();
        safetensors::serialize_to_file(views, None, &folder.join(file)).expect("written");
    }

    fn config() -> ModelConfig {
        let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/relu-llama-8m");
        let config = arch::read_config(&bundled).expect("a Llama");
        ModelConfig { num_hidden_layers: 2, hidden_size: 4, intermediate_size: 6, ..config }
    }

    fn read(folder: &Path) -> Result<(Vec<Factors>, Vec<SourceFile>), PrepError> {
        read_predictors(folder, &config(), true, &Progress::silent())
    }

    const FC1: Named<'static> = ("fc1.weight", &[3, 4], |i| i as f32);
    const FC2: Named<'static> = ("fc2.weight", &[6, 3], |i| 0.5 * i as f32);

    #[test]
    fn files_and_tensors_may_name_the_layer() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let bias: Named<'_> = ("1.bias", &[6], |i| -(i as f32));
        write(
            folder.path(),
            "model_0.safetensors",
            &[("0.weight", FC1.1, FC1.2), ("1.weight", FC2.1, FC2.2), bias],
        );
        let low: [Named<'_>; 2] =
            [("blk.1.fc1.weight", &[1, 4], |i| i as f32), ("blk.1.fc2.weight", &[6, 1], |_| 2.0)];
        write(folder.path(), "rest.safetensors", &low);
        std::fs::write(folder.path().join("README.md"), "not read").expect("written");
        let (layers, files) = read(folder.path()).expect("accepted");
        assert_eq!((layers[0].rank, layers[1].rank), (3, 1));
        assert!(layers.iter().all(|layer| layer.relu));
        assert_eq!(layers[0].fc1, (0..12).map(|i| f16::from_f32(i as f32)).collect::<Vec<_>>());
        assert_eq!(layers[0].fc2[17], f16::from_f32(8.5));
        assert_eq!(layers[0].bias, [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]);
        assert_eq!((&layers[1].bias, layers[1].fc2[5]), (&vec![0.0; 6], f16::from_f32(2.0)));
        let names: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["model_0.safetensors", "rest.safetensors"]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let second = ("model_1.safetensors", vec![FC1, FC2]);
        let wide: Named<'_> = ("fc2.weight", &[6, 2], |_| 1.0);
        let short: Named<'_> = ("fc1.weight", &[3, 5], |_| 1.0);
        let high: Named<'_> = ("fc1.weight", &[5, 4], |_| 1.0);
        let infinite: Named<'_> = ("fc2.weight", &[6, 3], |i| if i == 7 { 1e9 } else { 0.0 });
        let twice: Named<'_> = ("layers.1.fc1.weight", &[3, 4], |_| 1.0);
        let later: Named<'_> = ("layers.7.fc1.weight", &[3, 4], |_| 1.0);
        let cases: [(&str, Vec<Named<'_>>, &[&str]); 9] = [
            ("model_0.safetensors", vec![FC1, wide], &["model_0", "fc2.weight", "[6, 3]", "[6, 2]"]),
            (
                "model_0.safetensors",
                vec![short, FC2],
                &["model_0", "fc1.weight", "[rank up to 4, 4]", "[3, 5]"],
            ),
            ("model_0.safetensors", vec![high, FC2], &["model_0", "fc1.weight", "rank up to 4", "[5, 4]"]),
            (
                "model_0.safetensors",
                vec![FC1],
                &["fc2.weight of layer 0", "model_0.safetensors", "found none"],
            ),
            ("model_0.safetensors", vec![FC1, infinite], &["fc2.weight", "1000000000 at element 7"]),
            ("model_0.safetensors", vec![FC1, FC2, twice], &["model_1", "one fc1.weight of layer 1"]),
            ("model_0.safetensors", vec![FC1, FC2, later], &["layers.7.fc1.weight", "below 2", "layer 7"]),
            ("model_0.safetensors", vec![FC1, FC2, ("fc1.bias", &[3], |_| 1.0)], &["fc1.bias", "this name"]),
            ("last.safetensors", vec![FC1, FC2], &["last.safetensors", "fc1.weight", "names"]),
        ];
        for (file, tensors, words) in cases {
            let folder = tempfile::tempdir().expect("a scratch folder");
            write(folder.path(), file, &tensors);
            write(folder.path(), second.0, &second.1);
            let error = read(folder.path()).expect_err(words[0]);
            assert!(words.iter().all(|word| error.to_string().contains(word)), "{words:?}: {error}");
            assert!(error.hint().is_some(), "{error}");
        }
        let folder = tempfile::tempdir().expect("a scratch folder");
        assert!(read(folder.path()).expect_err("empty").to_string().contains("safetensors files"));
        std::fs::write(folder.path().join("model_0.pt"), "pickle").expect("written");
        assert!(matches!(read(folder.path()), Err(PrepError::OnlyPickles { .. })));
        assert!(matches!(read(&folder.path().join("none")), Err(PrepError::Io { .. })));
    }
}
