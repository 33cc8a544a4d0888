//! Why a run stops: one variant per cause.

/// Why a run stops.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The file is not a valid `.sinf`.
    #[error("{path}")]
    Format {
        /// The file.
        path: String,
        /// The broken rule.
        #[source]
        source: Box<format_spec::FormatError>,
    },
    /// The operating system refused.
    #[error("{path}: cannot {action}")]
    Io {
        /// What was tried: "open", "map".
        action: &'static str,
        /// On which file.
        path: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// More positions than the context holds.
    #[error("the context holds {n_positions_max} tokens, {wanted} are needed")]
    ContextFull {
        /// Positions asked for.
        wanted: usize,
        /// Positions of the session.
        n_positions_max: usize,
        /// `max_position_embeddings`.
        max: usize,
    },
    /// A context larger than the model was made for.
    #[error("a context of {wanted} tokens was asked for, the model was made for at most {max}")]
    ContextTooLong {
        /// Positions asked for.
        wanted: usize,
        /// `max_position_embeddings`.
        max: usize,
    },
    /// More tokens than one batch takes.
    #[error("a batch holds at most {n_batch_max} tokens, {n_tokens} were given")]
    BatchTooLarge {
        /// Tokens given.
        n_tokens: usize,
        /// Most tokens of one batch.
        n_batch_max: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: u32,
    },
    /// A budget was asked for that the file has no curve for.
    #[error("{path}: expected a budget curve, found none")]
    NoBudget {
        /// The file.
        path: String,
    },
    /// A scale on alphas was asked for where a layer's predictor has none.
    #[error("{path}: layer {layer}: expected a predictor with an alpha to scale, found {found}")]
    NoAlpha {
        /// The file.
        path: String,
        /// The first such layer.
        layer: usize,
        /// Name of its predictor.
        found: &'static str,
    },
    /// Audits were asked for where nothing is predicted.
    #[error("expected a layer that predicts, to audit what it leaves out; found none in {path}")]
    NothingToAudit {
        /// The file.
        path: String,
    },
    /// The file does not say what to hold, or between which bounds.
    #[error("{path}: layer {layer}: expected {expected} to adapt its limit by, found {found}")]
    NoTarget {
        /// The file.
        path: String,
        /// The first such layer.
        layer: usize,
        /// What is missing.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A budget was asked for that the file's curve does not reach.
    #[error("{path}: expected a budget from {min} to {max} by the file's curve, found {found}")]
    BudgetOutside {
        /// The file.
        path: String,
        /// Least mean KL divergence of the curve.
        min: f32,
        /// Largest.
        max: f32,
        /// What was asked for.
        found: f64,
    },
    /// Limits for a predictor that has nothing to count.
    #[error("{path}: layer {layer} has no sign words, so no limit on them can be set")]
    NoSigns {
        /// The file.
        path: String,
        /// The layer.
        layer: usize,
    },
    /// The CUDA device cannot do it.
    #[error(transparent)]
    Cuda(#[from] kernels::cuda::CudaError),
    /// The weights do not get to the device.
    #[error("{path}: cannot copy the weights to the device")]
    Upload {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: kernels::cuda::UploadError,
    },
    /// Lengths that do not fit each other: a bug of this program, as the reader checks every shape.
    #[error("internal: {0}")]
    Shape(#[from] kernels::ShapeError),
}

impl RuntimeError {
    pub(crate) fn format(path: &str, error: format_spec::FormatError) -> Self {
        Self::Format { path: path.to_owned(), source: Box::new(error) }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::IsADirectory => {
                Some("make a .sinf file of a model folder first: prep convert FOLDER OUT.sinf")
            }
            Self::Format { path, .. } if !path.ends_with(".sinf") => {
                Some("prep convert FOLDER OUT.sinf makes a .sinf file of a model folder")
            }
            Self::NoBudget { .. } => Some("convert the model again without --alpha and --predictor exact"),
            Self::NoAlpha { .. } => {
                Some("--budget KL moves the limits and thresholds of every kind of predictor")
            }
            Self::NothingToAudit { .. } => {
                Some("every row is computed; files with prediction come from prep convert")
            }
            Self::NoTarget { .. } => Some(
                "convert the model again without --alpha, so that it is calibrated; or leave out --adaptive",
            ),
            Self::BudgetOutside { .. } => {
                Some("convert the model again with --target-kl for budgets beyond the curve")
            }
            Self::ContextFull { n_positions_max, max, .. } if n_positions_max < max => {
                Some("raise -c/--ctx-size or shorten the prompt")
            }
            Self::ContextFull { .. } => Some("shorten the prompt: the model was made for no longer context"),
            Self::NoSigns { .. } => Some("prep convert --predictor sign makes a file that has them"),
            Self::Cuda(error) => error.hint(),
            Self::Upload { .. } => {
                Some("the file changed or cannot be read; copy it again, prep verify checks it")
            }
            Self::ContextTooLong { .. } => Some("lower -c/--ctx-size; longer contexts give strange text"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_context_is_suggested_only_where_there_is_one() {
        let hint = |n_positions_max| {
            RuntimeError::ContextFull { wanted: 5000, n_positions_max, max: 4096 }.hint().expect("a hint")
        };
        assert!(hint(512).contains("--ctx-size"));
        assert!(!hint(4096).contains("--ctx-size") && hint(4096).contains("shorten"));
    }
}
