//! The unfinished file beside the output: one writer at a time, removed unless it is committed.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use crate::FormatError;

/// Bytes gathered before they go to the file; larger pieces go there directly. Linux (6.x, ext4) takes up to ten times
/// the time to copy pieces of a megabyte and more into its page cache.
const BUFFER_BYTES: usize = 256 << 10;

/// Bytes after which what is written is sent to the disk, while more is being made: a system that starts on its own
/// waits until the end, and the last sync then takes as long as all of the writing.
const SYNC_BYTES: u64 = 256 << 20;

/// `OUT.partial`, open for writing at its end.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    file: BufWriter<File>,
    is_committed: bool,
    n_bytes_unsynced: u64,
    /// The sync under way, at most one.
    sync: Option<JoinHandle<io::Result<()>>>,
}

impl Partial {
    /// Creates `OUT.partial` and locks it. What a killed run left there is replaced; what another process is
    /// writing is not.
    ///
    /// # Errors
    /// [`FormatError::Busy`] where another process is writing it; a folder that cannot be written.
    pub fn create(out: &Path) -> Result<Self, FormatError> {
        let Some(path) = partial_path(out) else {
            let source = io::Error::new(ErrorKind::InvalidInput, "the path does not name a file");
            return Err(failed("create", out)(source));
        };
        // Opening a pipe would wait for its other end.
        check_regular(&path)?;
        match File::open(&path) {
            Ok(stale) => {
                lock(&stale, &path)?;
                std::fs::remove_file(&path).map_err(failed("replace", &path))?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(failed("replace", &path)(error)),
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(failed("create", &path))?;
        lock(&file, &path)?;
        let file = BufWriter::with_capacity(BUFFER_BYTES, file);
        Ok(Self { path, file, is_committed: false, n_bytes_unsynced: 0, sync: None })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Appends.
    ///
    /// # Errors
    /// The disk is full.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.file.write_all(bytes).map_err(failed("write", &self.path))?;
        self.n_bytes_unsynced += bytes.len() as u64;
        if self.n_bytes_unsynced >= SYNC_BYTES && self.sync.as_ref().is_none_or(JoinHandle::is_finished) {
            self.finish_sync().map_err(failed("sync", &self.path))?;
            let file = self.file.get_ref().try_clone().map_err(failed("sync", &self.path))?;
            self.sync = Some(std::thread::spawn(move || file.sync_data()));
            self.n_bytes_unsynced = 0;
        }
        Ok(())
    }

    /// Waits for the sync under way. Its error is this file's: the system tells it once.
    fn finish_sync(&mut self) -> io::Result<()> {
        match self.sync.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }

    /// Drops everything from `len_bytes` on; the next write goes there.
    pub(crate) fn truncate(&mut self, len_bytes: u64) -> Result<(), FormatError> {
        let shorten = |file: &mut BufWriter<File>| {
            file.seek(SeekFrom::Start(len_bytes))?;
            file.get_ref().set_len(len_bytes)
        };
        shorten(&mut self.file).map_err(failed("truncate", &self.path))
    }

    /// Writes over the first bytes and flushes the whole file to the system.
    pub(crate) fn write_start(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        let write = |file: &mut BufWriter<File>| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(bytes)?;
            file.seek(SeekFrom::End(0))?;
            Ok(())
        };
        write(&mut self.file).map_err(failed("write", &self.path))
    }

    /// Syncs the file, gives it the name `out`, and syncs the folder.
    ///
    /// Without `replace` an `out` that came to exist meanwhile is left alone and is an error.
    ///
    /// # Errors
    /// [`FormatError::Exists`]; the disk is full; the unfinished file is then removed.
    pub fn commit(mut self, out: &Path, replace: bool) -> Result<(), FormatError> {
        let sync = |partial: &mut Self| {
            partial.finish_sync()?;
            partial.file.flush()?;
            partial.file.get_ref().sync_all()
        };
        sync(&mut self).map_err(failed("sync", &self.path))?;
        if !replace && link(&self.path, out)? {
            // The output has its name; the other one goes when `self` is dropped.
            return sync_folder(out);
        }
        std::fs::rename(&self.path, out).map_err(failed("rename", &self.path))?;
        self.is_committed = true;
        sync_folder(out)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_committed {
            // Nobody is left to tell: the file may be gone, and a later run replaces it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// `OUT.partial`; none where `out` names no file.
pub fn partial_path(out: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(out.file_name()?);
    name.push(".partial");
    Some(out.with_file_name(name))
}

/// An existing output is an error unless it may be replaced, which only a file can.
///
/// # Errors
/// [`FormatError::Exists`], or what the system says.
pub fn check_output(out: &Path, replace: bool) -> Result<(), FormatError> {
    if out.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(failed("create", out)(io::Error::from(ErrorKind::IsADirectory)));
    }
    if replace {
        check_regular(out)?;
    }
    match out.symlink_metadata() {
        Ok(_) if replace => Ok(()),
        Ok(_) => Err(FormatError::Exists { path: out.to_owned() }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("look at", out)(error)),
    }
}

/// That `path`, if it leads to anything, leads to a file: devices and pipes are not there to be replaced.
fn check_regular(path: &Path) -> Result<(), FormatError> {
    match path.metadata() {
        Ok(found) if found.is_dir() => Err(failed("replace", path)(io::Error::from(ErrorKind::IsADirectory))),
        Ok(found) if !found.is_file() => {
            let source = io::Error::new(
                ErrorKind::InvalidInput,
                "expected a file, found a device, a pipe or a socket",
            );
            Err(failed("replace", path)(source))
        }
        // A link that leads nowhere is replaced as a file is.
        _ => Ok(()),
    }
}

/// Gives the file a second name `out` if nothing has it, in one step. False where the file system has no such
/// links; `out` was then not there a moment ago.
fn link(path: &Path, out: &Path) -> Result<bool, FormatError> {
    match std::fs::hard_link(path, out) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            Err(FormatError::Exists { path: out.to_owned() })
        }
        Err(_) => check_output(out, false).map(|()| false),
    }
}

/// Takes the lock that every writer holds. File systems without locks go unprotected.
fn lock(file: &File, path: &Path) -> Result<(), FormatError> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(FormatError::Busy { path: path.to_owned() }),
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// Makes the new name last through a loss of power.
fn sync_folder(out: &Path) -> Result<(), FormatError> {
    if cfg!(unix) {
        let folder = match out.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync", folder))?;
    }
    Ok(())
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> FormatError {
    let path = path.to_owned();
    move |source| FormatError::Io { action, path: path.clone(), source }
}
