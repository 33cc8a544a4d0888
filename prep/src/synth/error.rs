//! Why no checkpoint was made.

use std::fmt::Display;
use std::path::PathBuf;

use kernels::ShapeError;

/// Why no checkpoint was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SynthError {
    /// An option that no Llama has.
    #[error("{option}: expected {expected}, found {found}")]
    Option {
        /// Name on the command line.
        option: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The folder holds something.
    #[error("{path}: already holds {found}")]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// A file in it.
        found: String,
        /// True when `--force` would not help either: the file is no part of a checkpoint.
        foreign: bool,
    },
    /// Reading or writing failed.
    #[error("{path}: cannot read or write")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What failed.
        source: std::io::Error,
    },
    /// The bisection found no shift.
    #[error("layer {layer}: expected a sparsity of {expected:.4}, reached {found:.4}")]
    Sparsity {
        /// Layer.
        layer: u32,
        /// Share asked for.
        expected: f64,
        /// Share reached.
        found: f64,
    },
    /// Shapes that do not fit each other: a bug.
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

impl SynthError {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Occupied { foreign: false, .. } => Some("--force replaces a checkpoint".to_owned()),
            Self::Occupied { foreign: true, .. } => Some("name a new folder".to_owned()),
            Self::Sparsity { .. } => Some("the shape is too small for its share; make it wider".to_owned()),
            _ => None,
        }
    }
}

pub(super) fn option(name: &'static str, expected: &str, found: impl Display) -> SynthError {
    SynthError::Option { option: name, expected: expected.to_owned(), found: found.to_string() }
}
