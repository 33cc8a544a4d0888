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
        source: format_spec::FormatError,
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
    },
    /// A context larger than the model was made for.
    #[error("a context of {wanted} tokens was asked for, the model was made for at most {max}")]
    ContextTooLong {
        /// Positions asked for.
        wanted: usize,
        /// `max_position_embeddings`.
        max: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: u32,
    },
}
