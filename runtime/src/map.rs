//! Maps a file read-only, and reads it beside the map.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::RuntimeError;

/// Opens and maps `path`; an empty file becomes `None`, as nothing of it can be mapped.
///
/// # Errors
/// [`RuntimeError::Io`] when the system refuses, or when `path` is a folder.
pub(crate) fn map(path: &Path) -> Result<(File, Option<Mmap>), RuntimeError> {
    let io = |action| move |source| RuntimeError::Io { action, path: path.display().to_string(), source };
    let file = File::open(path).map_err(io("open"))?;
    let metadata = file.metadata().map_err(io("open"))?;
    if metadata.is_dir() {
        return Err(io("read")(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    if metadata.len() == 0 {
        return Ok((file, None));
    }
    // SAFETY: the map is read-only. Its bytes may change only if another process writes into the file while it is
    // mapped, which the README asks users not to do: `prep` never writes into a finished file, it renames a new one
    // over it, and the old pages stay. A file that is cut under a running program ends it with SIGBUS.
    let map = unsafe { Mmap::map(&file) }.map_err(io("map"))?;
    // A hint, worth a sixth of the speed on a CPU: what the system now reads from the disk it keeps in pages of 2 MiB,
    // so that rows take few address translations. Systems without such pages for files refuse it, which is no error.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok((file, Some(map)))
}

/// Fills `buffer` with the bytes of `file` from `offset` on.
///
/// # Errors
/// Those of the system; [`std::io::ErrorKind::UnexpectedEof`] where the file ends before.
#[cfg(unix)]
pub(crate) fn read_at(file: &File, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

/// Fills `buffer` with the bytes of `file` from `offset` on.
///
/// # Errors
/// Those of the system; [`std::io::ErrorKind::UnexpectedEof`] where the file ends before.
#[cfg(windows)]
pub(crate) fn read_at(file: &File, mut offset: u64, mut buffer: &mut [u8]) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n_read => (buffer, offset) = (&mut buffer[n_read..], offset + n_read as u64),
        }
    }
    Ok(())
}
