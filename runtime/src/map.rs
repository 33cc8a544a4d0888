//! Maps a file read-only: the one unsafe block of this crate.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::RuntimeError;

/// Maps `path`; an empty file becomes `None`, as nothing of it can be mapped.
///
/// # Errors
/// [`RuntimeError::Io`] when the system refuses, or when `path` is a folder.
pub(crate) fn map(path: &Path) -> Result<Option<Mmap>, RuntimeError> {
    let io = |action| move |source| RuntimeError::Io { action, path: path.display().to_string(), source };
    let file = File::open(path).map_err(io("open"))?;
    let metadata = file.metadata().map_err(io("open"))?;
    if metadata.is_dir() {
        return Err(io("read")(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    if metadata.len() == 0 {
        return Ok(None);
    }
    // SAFETY: the map is read-only. Its bytes may change only if another process writes into the file while it is
    // mapped, which the README asks users not to do: `prep` never writes into a finished file, it renames a new one
    // over it, and the old pages stay. A file that is cut under a running program ends it with SIGBUS.
    let map = unsafe { Mmap::map(&file) }.map_err(io("map"))?;
    // A hint, worth a sixth of the speed on a CPU: what the system now reads from the disk it keeps in pages of 2 MiB,
    // so that rows take few address translations. Systems without such pages for files refuse it, which is no error.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(Some(map))
}
