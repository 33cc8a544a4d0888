//! Why a command stops: one variant per cause, each with the file, what was expected and what was found.

use std::path::PathBuf;

use format_spec::{DType, FormatError};
use kernels::cuda::CudaError;
use runtime::{RuntimeError, TokenizerError};

use crate::pack::BadElement;

/// Why a command stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepError {
    /// The operating system refused.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// What was tried: "open", "read", ...
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file that every checkpoint has is not in the folder.
    #[error("{}: expected {expected}, found {found}", folder.display())]
    FileMissing {
        /// The folder.
        folder: PathBuf,
        /// Names that would do.
        expected: &'static str,
        /// What is there instead.
        found: String,
    },
    /// Weights are there, but only as pickles, which can run code and are never opened.
    #[error("{}: expected weights in safetensors files, found only {file}", folder.display())]
    OnlyPickles {
        /// The folder.
        folder: PathBuf,
        /// One of the pickles.
        file: String,
    },
    /// A small file is larger than any of its kind.
    #[error("{}: expected at most {max} bytes, found {found}", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Most bytes accepted.
        max: u64,
        /// Its length.
        found: u64,
    },
    /// A file does not follow its own syntax.
    #[error("{}: expected {expected}, found: {found}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// The parser's answer.
        found: String,
    },
    /// A field has a value that this program does not accept.
    #[error("{}: {field}: expected {expected}, found {found}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, with its parents.
        field: String,
        /// What is accepted.
        expected: String,
        /// What is there.
        found: String,
        /// What to do about it.
        hint: Option<&'static str>,
    },
    /// The index names a shard by something else than a file name inside the folder.
    #[error("{}: weight_map: expected the name of a .safetensors file of this folder, found {found:?}", path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The name.
        found: String,
    },
    /// The index names a shard that is not there.
    #[error("{}: weight_map: expected the shard {shard} in this folder, found no such file", path.display())]
    ShardMissing {
        /// The index.
        path: PathBuf,
        /// Name of the shard.
        shard: String,
    },
    /// A shard's length does not fit its header.
    #[error("{}: expected {expected} bytes by its header, found {found}", path.display())]
    ShardLength {
        /// The shard.
        path: PathBuf,
        /// Header and data.
        expected: u64,
        /// Length of the file.
        found: u64,
    },
    /// A tensor that the configuration asks for is not there.
    #[error("{}: expected tensor {tensor}, found no tensor of this name", path.display())]
    TensorMissing {
        /// The shard, index or folder that should hold it.
        path: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// A tensor that a Llama of this configuration does not have.
    #[error("{}: tensor {tensor}: expected only the tensors of a Llama of this config.json, found this one too", path.display())]
    TensorExtra {
        /// The shard.
        path: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// A tensor is in two shards.
    #[error("{}: tensor {tensor}: expected in one shard, found in {other} too", path.display())]
    TensorTwice {
        /// One shard.
        path: PathBuf,
        /// Name of the other.
        other: String,
        /// Its name.
        tensor: String,
    },
    /// A tensor has an element type that is not converted.
    #[error("{}: tensor {tensor}: expected dtype F32, F16 or BF16, found {found}", path.display())]
    TensorDType {
        /// The shard.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// Its type.
        found: String,
    },
    /// A tensor's shape does not fit the configuration.
    #[error("{}: tensor {tensor}: expected shape {expected:?} by config.json, found {found:?}", path.display())]
    TensorShape {
        /// The shard.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// By the configuration.
        expected: Vec<u64>,
        /// In the shard.
        found: Vec<u64>,
    },
    /// A weight is not a number, or not one of the output type.
    #[error("{}: tensor {tensor}: element {index}: expected a finite {dtype_name} value, found {value}", path.display(), index = bad.index, value = bad.value, dtype_name = dtype.name())]
    Element {
        /// The shard.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type that it was converted to.
        dtype: DType,
        /// The element, its index counted from the start of the tensor.
        bad: BadElement,
    },
    /// The sign predictor was asked for where no activation is zero.
    #[error("{}: hidden_act: expected relu or fatrelu for a predictor other than exact, found silu", path.display())]
    NotSparse {
        /// config.json.
        path: PathBuf,
    },
    /// A tensor of an imported predictor is not what this model's would be.
    #[error("{}: tensor {tensor}: expected {expected}, found {found}", path.display())]
    PredictorTensor {
        /// The file, or the folder that lacks it.
        path: PathBuf,
        /// Its name, or what it would be.
        tensor: String,
        /// What would be accepted.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A file without sign words was to be evaluated.
    #[error("{}: expected sign words, found a file made without prediction", path.display())]
    NoSigns {
        /// The file.
        path: PathBuf,
    },
    /// An output, or the unfinished file beside it, was to replace what it is made of.
    #[error("{}: expected an output other than the input, found the same file", path.display())]
    OutputIsInput {
        /// The file.
        path: PathBuf,
    },
    /// A rank above that of the matrix.
    #[error("expected a rank of at most {max}, found {found}")]
    Rank {
        /// The smaller of rows and columns of W_gate.
        max: u32,
        /// What was asked for.
        found: u32,
    },
    /// As many values of alpha as there are neither models nor layers.
    #[error("--alpha: expected one value or one for each of the {n_layers} layers, found {found}")]
    AlphaCount {
        /// Layers of the model.
        n_layers: u32,
        /// Values given.
        found: usize,
    },
    /// A calibration text that is no text, or has none.
    #[error("{name}: expected {expected}, found {found}")]
    CalibrationText {
        /// The file.
        name: String,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The forward pass leaves the range of numbers.
    #[error("layer {layer}: expected finite activations over the calibration text, found infinity or NaN")]
    NotFinite {
        /// Decoder layer.
        layer: u32,
    },
    /// The output cannot be written.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A `.sinf` file is not valid, or the forward pass failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The tokenizer contradicts itself.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Somebody asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl PrepError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::FileMissing { .. } => {
                Some("name the folder of a Hugging Face checkpoint, with all its files")
            }
            Self::OnlyPickles { .. } => Some(
                "convert the weights to safetensors first (transformers: save_pretrained with \
                 safe_serialization=True); pickles can run code and are never opened",
            ),
            Self::Field { hint, .. } => *hint,
            Self::ShardMissing { .. } | Self::ShardLength { .. } => {
                Some("the download is incomplete; fetch the file again")
            }
            Self::TensorExtra { .. } | Self::TensorMissing { .. } | Self::TensorShape { .. } => Some(
                "config.json and the weights are not of one model, or its architecture is no plain Llama",
            ),
            Self::Element { bad, .. } if bad.is_overflow() => Some("--dtype bf16 or --dtype f32 can hold it"),
            Self::Element { .. } => Some("the checkpoint is damaged; fetch it again"),
            Self::NotFinite { .. } => {
                Some("the weights are damaged or not those of config.json; --alpha needs no forward pass")
            }
            Self::NotSparse { .. } => Some("--predictor exact computes every gate row"),
            Self::PredictorTensor { .. } => Some(
                "a layer's predictor is fc1.weight (rank, hidden_size) and fc2.weight (intermediate_size, rank), trained \
                 for this model, in model_N.safetensors for layer N or named layers.N.fc1.weight and so on",
            ),
            Self::OutputIsInput { .. } => Some("name another output"),
            Self::Rank { .. } => Some("W_gate itself has no higher rank than its smaller side"),
            Self::NoSigns { .. } => Some("convert the model again, with any predictor but exact"),
            // Those of the runtime name flags that are not here.
            Self::Runtime(RuntimeError::Cuda(CudaError::OutOfMemory { .. })) => {
                Some("end other programs on the GPU, or use --device cpu")
            }
            Self::Runtime(RuntimeError::Cuda(CudaError::NoSuchDevice { .. })) => {
                Some("runtime --list-devices shows the numbers")
            }
            Self::Runtime(error) => error.hint(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_file_tensor_expected_and_found() {
        let error = PrepError::Element {
            path: "m/a.safetensors".into(),
            tensor: "lm_head.weight".to_owned(),
            dtype: DType::F16,
            bad: BadElement { index: 7, value: 1e6 },
        };
        assert_eq!(
            error.to_string(),
            "m/a.safetensors: tensor lm_head.weight: element 7: expected a finite f16 value, found 1000000"
        );
        assert!(error.hint().expect("a way out").contains("--dtype"));
    }

    #[test]
    fn hints_name_no_flag_of_the_runtime() {
        let full = CudaError::OutOfMemory { wanted_bytes: 9, free_bytes: 1, total_bytes: 2 };
        let hint = PrepError::Runtime(full.into()).hint().expect("a way out");
        assert!(hint.contains("--device cpu") && !hint.contains("--ctx-size"), "{hint}");
    }
}
