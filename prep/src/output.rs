//! What an output must not be.

use std::path::Path;

use format_spec::partial::partial_path;

use crate::PrepError;

/// That neither `out` nor the unfinished file beside it is one of `inputs`, by whatever name.
///
/// # Errors
/// [`PrepError::OutputIsInput`].
pub(crate) fn check_is_no_input(
    out: &Path,
    inputs: impl IntoIterator<Item: AsRef<Path>>,
) -> Result<(), PrepError> {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    let written = [real(out), partial_path(out).and_then(|path| real(&path))];
    let is_written = |input: &Path| real(input).is_some_and(|input| written.contains(&Some(input)));
    match inputs.into_iter().find(|input| is_written(input.as_ref())) {
        Some(input) => Err(PrepError::OutputIsInput { path: input.as_ref().to_owned() }),
        None => Ok(()),
    }
}
