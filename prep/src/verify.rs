//! `prep verify`: every byte of a file against its checksums, and the sign words against the weights.

use std::path::Path;
use std::time::Instant;

use runtime::Model;
use serde::Serialize;

use crate::inspect::hex;
use crate::{PrepError, Progress};

/// What was found to be as it was written.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// The file.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// Sections whose checksums agree.
    pub sections: usize,
    /// The file's digest, which agrees too.
    pub blake3: String,
    /// Wall time.
    pub seconds: f64,
    /// Bytes of the file per second, 10^9.
    pub gb_per_s: f64,
}

/// Checks the structure, every section's checksum, the digest of the whole, and that the sign words are the signs of
/// the gate weights beside them.
///
/// # Errors
/// [`PrepError::Runtime`] for a file that cannot be opened or breaks a rule, naming the section.
pub fn verify(path: &Path, progress: &Progress) -> Result<Verification, PrepError> {
    let started = Instant::now();
    let model = Model::open(path)?;
    let bytes = model.bytes().len() as u64;
    progress.begin("verifying", bytes);
    let checked = model.layout().verify(model.bytes(), &mut |done| progress.set(done));
    checked.map_err(|error| model.error(error))?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Verification {
        path: model.path().to_owned(),
        bytes,
        sections: model.layout().sections().len(),
        blake3: hex(&model.layout().digest()),
        seconds,
        gb_per_s: bytes as f64 / seconds / 1e9,
    })
}
