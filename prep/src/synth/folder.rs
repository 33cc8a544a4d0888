//! The folder that is written: beside the wanted one first, renamed at the end, and nothing of others touched.

use std::path::{Path, PathBuf};

use super::SynthError;
use super::error::option;

/// The folder beside the wanted one; removed unless it is renamed.
pub(super) struct PartialFolder {
    pub(super) path: PathBuf,
    kept: bool,
}

impl PartialFolder {
    pub(super) fn create(out_dir: &Path) -> Result<Self, SynthError> {
        let mut name = out_dir.file_name().unwrap_or_default().to_owned();
        if name.is_empty() {
            return Err(option("OUT_DIR", "the name of a folder", out_dir.display()));
        }
        name.push(".partial");
        let path = out_dir.with_file_name(name);
        // What an interrupted run left behind.
        refuse_occupied(&path, true)?;
        remove_checkpoint(&path)?;
        std::fs::create_dir_all(&path).map_err(|source| SynthError::Io { path: path.clone(), source })?;
        Ok(Self { path, kept: false })
    }

    pub(super) fn rename_to(mut self, out_dir: &Path) -> Result<(), SynthError> {
        remove_checkpoint(out_dir)?;
        std::fs::rename(&self.path, out_dir)
            .map_err(|source| SynthError::Io { path: out_dir.to_owned(), source })?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.kept {
            // The error that brought us here is the one to report.
            let _ = remove_checkpoint(&self.path);
        }
    }
}

/// Refuses a folder with files in it; with `force`, one with files that are no part of a checkpoint.
pub(super) fn refuse_occupied(folder: &Path, force: bool) -> Result<(), SynthError> {
    for name in file_names(folder)? {
        let foreign = !is_checkpoint_file(&name);
        if foreign || !force {
            return Err(SynthError::Occupied { path: folder.to_owned(), found: name, foreign });
        }
    }
    Ok(())
}

/// Removes a folder whose files have been checked, if it exists.
fn remove_checkpoint(folder: &Path) -> Result<(), SynthError> {
    let io = |source| SynthError::Io { path: folder.to_owned(), source };
    for name in file_names(folder)? {
        std::fs::remove_file(folder.join(name)).map_err(io)?;
    }
    match std::fs::remove_dir(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io(error)),
        _ => Ok(()),
    }
}

/// Names in `folder`, sorted; none if it does not exist.
pub(super) fn file_names(folder: &Path) -> Result<Vec<String>, SynthError> {
    let io = |source| SynthError::Io { path: folder.to_owned(), source };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io(error)),
    };
    let mut names = entries
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(io)?;
    names.sort();
    Ok(names)
}

fn is_checkpoint_file(name: &str) -> bool {
    matches!(
        name,
        "config.json" | "tokenizer.json" | "tokenizer_config.json" | "model.safetensors.index.json"
    ) || name.ends_with(".safetensors")
}
