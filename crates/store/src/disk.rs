//! File operations whose effect is durable when they return. Private to the crate.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    path::Path,
};

use crate::StoreError;

/// Creates a directory and its parents, and makes the new entries durable.
pub(crate) fn create_dir(path: &Path) -> Result<(), StoreError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(|error| StoreError::io("create", path, &error))?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => Ok(()),
    }
}

/// Makes creations, renames and removals inside a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|error| StoreError::io("sync", path, &error))
}

/// Makes a name in its directory durable.
pub(crate) fn sync_parent(path: &Path) -> Result<(), StoreError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => sync_dir(Path::new(".")),
    }
}

/// Opens for reading and writing, creating the file if there is none, and takes its exclusive lock.
///
/// The lock goes with the handle: the system drops it when the process ends, however it ends.
pub(crate) fn open_locked(path: &Path) -> Result<File, StoreError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|error| StoreError::io("open", path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(StoreError::io("lock", path, &error)),
    }
}

/// Moves a complete, synced file to its final name and makes the name durable.
pub(crate) fn publish(from: &Path, to: &Path) -> Result<(), StoreError> {
    rename(from, to)?;
    sync_parent(to)
}

/// Moves a complete, synced file to its final name; durable once its directory is synced.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::rename(from, to).map_err(|error| StoreError::io("rename", from, &error))
}
