//! What an output must not be.

use std::path::Path;

use format_spec::partial::partial_path;

use crate::PrepError;

/// That neither `out` nor the unfinished file beside it is one of `inputs`, by whatever name.
///
/// # Errors
/// [`PrepError::OutputIsInput`].
pub(crate) fn check_is_no_input<'a>(
    out: &Path,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> Result<(), PrepError> {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    let written: Vec<_> =
        [real(out), partial_path(out).and_then(|path| real(&path))].into_iter().flatten().collect();
    match inputs.into_iter().find(|input| real(input).is_some_and(|input| written.contains(&input))) {
        Some(input) => Err(PrepError::OutputIsInput { path: input.to_owned() }),
        None => Ok(()),
    }
}
