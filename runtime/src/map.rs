//! Maps a file read-only, and reads it beside the map.

use std::fs::File;
use std::io;
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
        return Err(io("read")(io::Error::from(io::ErrorKind::IsADirectory)));
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

/// Fills `buffer` with the bytes from `offset` on of `file`, which had `len_bytes` when it was opened.
///
/// # Errors
/// Those of the system; [`io::ErrorKind::UnexpectedEof`] with both lengths where the file ends before.
pub(crate) fn read_at(file: &File, len_bytes: usize, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    read_exact_at(file, offset, buffer).map_err(|error| match (error.kind(), file.metadata()) {
        (io::ErrorKind::UnexpectedEof, Ok(metadata)) => {
            let found = metadata.len();
            let text = format!("the file had {len_bytes} bytes when it was opened, now it has {found}");
            io::Error::new(io::ErrorKind::UnexpectedEof, text)
        }
        _ => error,
    })
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n_read => (buffer, offset) = (&mut buffer[n_read..], offset + n_read as u64),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_cut_since_it_was_opened_is_an_error_with_both_lengths() {
        let mut cut = tempfile::NamedTempFile::new().expect("a scratch file");
        io::Write::write_all(&mut cut, &[7; 1000]).expect("written");
        let (file, map) = map(cut.path()).expect("mapped");
        let len_bytes = map.map_or(0, |map| map.len());
        let mut buffer = [0; 100];
        read_at(&file, len_bytes, 900, &mut buffer).expect("all there");
        assert_eq!(buffer, [7; 100]);
        cut.as_file().set_len(950).expect("cut");
        read_at(&file, len_bytes, 850, &mut buffer).expect("still there");
        let error = read_at(&file, len_bytes, 900, &mut buffer).expect_err("cut off");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let text = error.to_string();
        assert!(text.contains("1000 bytes") && text.contains("950"), "{text}");
    }
}
