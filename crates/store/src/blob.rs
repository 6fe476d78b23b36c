//! Content-addressed files: models, corpora, adapters, payloads awaiting transfer.
//!
//! A blob lies at `sha256/ab/<64 hex digits>`; its name is its proof. Writing is temporary file → fsync → rename →
//! fsync of the directory, so a name that exists holds all its bytes. Blobs that arrive in pieces collect in
//! `partial/<hex>` and survive a restart; their digest is checked before they get a name. Safe for several processes
//! on one directory: equal names hold equal bytes, and files being written carry a lock.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use crate::{Digest, Hasher, StoreError, disk};

/// Most bytes of one blob: 1 GiB, ten times the largest importable checkpoint.
pub const MAX_BLOB_BYTES: u64 = 1 << 30;

/// A directory of content-addressed files.
#[derive(Debug)]
pub struct BlobStore {
    root: PathBuf,
    counter: AtomicU64,
}

impl BlobStore {
    /// Opens or creates the directory and removes temporary files that no process is writing any more.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the system refuses.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for dir in [SHA256, TEMPORARY, PARTIAL] {
            disk::create_dir(&root.join(dir))?;
        }
        let store = Self { root: root.to_owned(), counter: AtomicU64::new(0) };
        let temporary = root.join(TEMPORARY);
        let listing = fs::read_dir(&temporary).map_err(|error| StoreError::io("list", &temporary, &error))?;
        for found in listing {
            let path = found.map_err(|error| StoreError::io("list", &temporary, &error))?.path();
            if disk::open_locked(&path).is_ok() {
                remove(&path)?;
            }
        }
        Ok(store)
    }

    /// Stores bytes and returns their digest; durable when it returns. Storing the same bytes again changes nothing.
    ///
    /// # Errors
    /// [`StoreError::BlobTooLarge`] above [`MAX_BLOB_BYTES`]; [`StoreError::Io`] if the system refuses.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        check_size(bytes.len() as u64)?;
        let digest = Digest::of(bytes);
        let to = self.path(&digest);
        if to.is_file() {
            return Ok(digest);
        }
        let unique = format!("{}-{}", std::process::id(), self.counter.fetch_add(1, Ordering::Relaxed));
        let temporary = self.root.join(TEMPORARY).join(unique);
        let mut file = disk::open_locked(&temporary)?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(|error| StoreError::io("write", &temporary, &error))
            .and_then(|()| make_shard(&to))
            .and_then(|()| disk::publish(&temporary, &to))
            .inspect_err(|_| drop(fs::remove_file(&temporary)))?;
        Ok(digest)
    }

    /// Reads a whole blob and checks it against its name.
    ///
    /// # Errors
    /// - [`StoreError::BlobMissing`] if there is none
    /// - [`StoreError::BlobDamaged`] if the bytes changed on disk
    /// - [`StoreError::BlobTooLarge`] if the file grew beyond [`MAX_BLOB_BYTES`]
    pub fn get(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let (file, length) = self.open_file(digest)?;
        check_size(length)?;
        let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
        file.take(MAX_BLOB_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|error| StoreError::io("read", &self.path(digest), &error))?;
        let got = Digest::of(&bytes);
        if got == *digest { Ok(bytes) } else { Err(StoreError::BlobDamaged { expected: *digest, got }) }
    }

    /// Reads `len` bytes from `offset`, fewer where the blob ends. The range is not checked against the digest: the
    /// receiver of a transfer checks the whole.
    ///
    /// # Errors
    /// [`StoreError::BlobMissing`] if there is none; [`StoreError::BlobLength`] if `offset` lies beyond its end.
    pub fn open_range(&self, digest: &Digest, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
        let (file, length) = self.open_file(digest)?;
        let rest =
            length.checked_sub(offset).ok_or(StoreError::BlobLength { expected: length, got: offset })?;
        let wanted = usize::try_from(rest).map_or(len, |rest| rest.min(len));
        let mut bytes = vec![0; wanted];
        file.read_exact_at(&mut bytes, offset)
            .map_err(|error| StoreError::io("read", &self.path(digest), &error))?;
        Ok(bytes)
    }

    /// Length of a blob in bytes.
    ///
    /// # Errors
    /// [`StoreError::BlobMissing`] if there is none.
    pub fn length(&self, digest: &Digest) -> Result<u64, StoreError> {
        self.open_file(digest).map(|(_, length)| length)
    }

    /// Whether a blob with this name exists.
    #[must_use]
    pub fn contains(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Removes a blob, durably; a missing one is no error.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the system refuses.
    pub fn remove(&self, digest: &Digest) -> Result<(), StoreError> {
        let path = self.path(digest);
        if !path.exists() {
            return Ok(());
        }
        remove(&path)?;
        disk::sync_parent(&path)
    }

    /// Lists all blobs in order of their digests.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the system refuses.
    pub fn list(&self) -> Result<Vec<Digest>, StoreError> {
        let mut digests = Vec::new();
        let top = self.root.join(SHA256);
        for shard in read_names(&top)? {
            for name in read_names(&top.join(&shard))? {
                digests.extend(name.parse::<Digest>());
            }
        }
        digests.sort();
        Ok(digests)
    }

    /// Starts or resumes receiving a blob of `length` bytes that arrives in pieces.
    ///
    /// # Errors
    /// - [`StoreError::BlobTooLarge`] if `length` exceeds [`MAX_BLOB_BYTES`]
    /// - [`StoreError::Locked`] if another writer is receiving the same blob
    pub fn writer(&self, digest: Digest, length: u64) -> Result<BlobWriter<'_>, StoreError> {
        check_size(length)?;
        let path = self.root.join(PARTIAL).join(digest.to_string());
        let file = disk::open_locked(&path)?;
        let mut hasher = Hasher::new();
        let mut offset = copy_into(&file, &path, &mut hasher)?;
        if offset > length {
            file.set_len(0).map_err(|error| StoreError::io("cut back", &path, &error))?;
            (hasher, offset) = (Hasher::new(), 0);
        }
        Ok(BlobWriter { store: self, file, path, digest, length, offset, hasher })
    }

    fn open_file(&self, digest: &Digest) -> Result<(File, u64), StoreError> {
        let path = self.path(digest);
        let file = OpenOptions::new().read(true).open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::BlobMissing { digest: *digest },
            _ => StoreError::io("open", &path, &error),
        })?;
        let length = file.metadata().map_err(|error| StoreError::io("read", &path, &error))?.len();
        Ok((file, length))
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        let shard: String = name.chars().take(2).collect();
        self.root.join(SHA256).join(shard).join(name)
    }
}

/// Receives one blob in pieces; what has arrived survives dropping the writer and killing the process.
pub struct BlobWriter<'a> {
    store: &'a BlobStore,
    file: File,
    path: PathBuf,
    digest: Digest,
    length: u64,
    offset: u64,
    hasher: Hasher,
}

impl BlobWriter<'_> {
    /// Where the next chunk must begin: the offset to ask the sender for.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether all announced bytes are here.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.offset == self.length
    }

    /// Adds the chunk that begins at `offset`.
    ///
    /// # Errors
    /// - [`StoreError::BlobOffset`] if it does not continue the partial blob
    /// - [`StoreError::BlobLength`] if it exceeds the announced length
    /// - [`StoreError::Io`] if the write fails; the chunk may be sent again
    pub fn write_chunk(&mut self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        if offset != self.offset {
            return Err(StoreError::BlobOffset { expected: self.offset, got: offset });
        }
        let end = offset.saturating_add(bytes.len() as u64);
        if end > self.length {
            return Err(StoreError::BlobLength { expected: self.length, got: end });
        }
        self.file.write_all_at(bytes, offset).map_err(|error| StoreError::io("write", &self.path, &error))?;
        self.hasher.update(bytes);
        self.offset = end;
        Ok(())
    }

    /// Checks the digest and gives the blob its name; durable when it returns.
    ///
    /// # Errors
    /// - [`StoreError::BlobLength`] if bytes are missing; the partial file is kept
    /// - [`StoreError::BlobDamaged`] if the bytes are not the announced ones; the partial file is removed, since no
    ///   further chunk can cure it
    pub fn finish(self) -> Result<Digest, StoreError> {
        if self.offset != self.length {
            return Err(StoreError::BlobLength { expected: self.length, got: self.offset });
        }
        let got = self.hasher.finish();
        if got != self.digest {
            remove(&self.path)?;
            return Err(StoreError::BlobDamaged { expected: self.digest, got });
        }
        self.file
            .set_len(self.length)
            .and_then(|()| self.file.sync_all())
            .map_err(|error| StoreError::io("sync", &self.path, &error))?;
        let to = self.store.path(&self.digest);
        make_shard(&to)?;
        disk::publish(&self.path, &to)?;
        Ok(self.digest)
    }
}

/// Makes the directory of a blob if there is none.
fn make_shard(path: &Path) -> Result<(), StoreError> {
    path.parent().map_or(Ok(()), disk::create_dir)
}

fn check_size(got: u64) -> Result<(), StoreError> {
    if got > MAX_BLOB_BYTES {
        return Err(StoreError::BlobTooLarge { got, max: MAX_BLOB_BYTES });
    }
    Ok(())
}

fn copy_into(mut file: &File, path: &Path, hasher: &mut Hasher) -> Result<u64, StoreError> {
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    loop {
        let got = file.read(&mut buffer).map_err(|error| StoreError::io("read", path, &error))?;
        if got == 0 {
            return Ok(total);
        }
        hasher.update(buffer.split_at(got).0);
        total += got as u64;
    }
}

fn read_names(dir: &Path) -> Result<Vec<String>, StoreError> {
    let failed = |error: io::Error| StoreError::io("list", dir, &error);
    fs::read_dir(dir)
        .map_err(failed)?
        .map(|found| Ok(found.map_err(failed)?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn remove(path: &Path) -> Result<(), StoreError> {
    fs::remove_file(path).map_err(|error| StoreError::io("remove", path, &error))
}

const SHA256: &str = "sha256";
const TEMPORARY: &str = "tmp";
const PARTIAL: &str = "partial";
const BUFFER: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, BlobStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = BlobStore::open(dir.path()).unwrap();
        (dir, store)
    }

    #[test]
    fn put_get_list_remove() {
        let (dir, store) = store();
        let digest = store.put(b"abc").unwrap();
        assert_eq!(store.put(b"abc").unwrap(), digest);
        let name = digest.to_string();
        assert!(dir.path().join("sha256").join(&name[..2]).join(&name).is_file());
        assert_eq!(store.get(&digest).unwrap(), b"abc");
        assert_eq!(store.length(&digest).unwrap(), 3);
        let other = store.put(b"").unwrap();
        let mut both = vec![digest, other];
        both.sort();
        assert_eq!(store.list().unwrap(), both);
        store.remove(&digest).unwrap();
        store.remove(&digest).unwrap();
        assert_eq!(store.get(&digest), Err(StoreError::BlobMissing { digest }));
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0, "no temporary file is left");
    }

    #[test]
    fn ranges_end_with_the_blob() {
        let (_dir, store) = store();
        let digest = store.put(b"0123456789").unwrap();
        assert_eq!(store.open_range(&digest, 2, 3).unwrap(), b"234");
        assert_eq!(store.open_range(&digest, 8, 100).unwrap(), b"89");
        assert_eq!(store.open_range(&digest, 10, 1).unwrap(), b"");
        assert_eq!(store.open_range(&digest, 11, 1), Err(StoreError::BlobLength { expected: 10, got: 11 }));
    }

    #[test]
    fn changed_bytes_on_disk_are_refused() {
        let (_dir, store) = store();
        let digest = store.put(b"weights").unwrap();
        fs::write(store.path(&digest), b"Weights").unwrap();
        assert_eq!(
            store.get(&digest),
            Err(StoreError::BlobDamaged { expected: digest, got: Digest::of(b"Weights") })
        );
    }

    #[test]
    fn a_transfer_resumes_after_the_store_was_reopened() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
        let (digest, length) = (Digest::of(&bytes), bytes.len() as u64);
        {
            let store = BlobStore::open(dir.path()).unwrap();
            let mut writer = store.writer(digest, length).unwrap();
            writer.write_chunk(0, &bytes[..70_000]).unwrap();
            assert_eq!(
                store.writer(digest, length).map(|_| ()),
                Err(StoreError::Locked { path: writer.path.clone() })
            );
        }
        let store = BlobStore::open(dir.path()).unwrap();
        assert!(!store.contains(&digest));
        let mut writer = store.writer(digest, length).unwrap();
        assert_eq!(writer.offset(), 70_000);
        assert_eq!(writer.write_chunk(0, &bytes), Err(StoreError::BlobOffset { expected: 70_000, got: 0 }));
        writer.write_chunk(70_000, &bytes[70_000..]).unwrap();
        assert!(writer.is_complete());
        assert_eq!(writer.finish().unwrap(), digest);
        assert_eq!(store.get(&digest).unwrap(), bytes);
    }

    #[test]
    fn a_wrong_or_short_transfer_gets_no_name() {
        let (_dir, store) = store();
        let digest = Digest::of(b"right");
        let mut writer = store.writer(digest, 5).unwrap();
        assert_eq!(writer.write_chunk(0, b"rights"), Err(StoreError::BlobLength { expected: 5, got: 6 }));
        writer.write_chunk(0, b"wro").unwrap();
        assert_eq!(writer.finish(), Err(StoreError::BlobLength { expected: 5, got: 3 }));
        let mut writer = store.writer(digest, 5).unwrap();
        writer.write_chunk(3, b"ng").unwrap();
        assert_eq!(
            writer.finish(),
            Err(StoreError::BlobDamaged { expected: digest, got: Digest::of(b"wrong") })
        );
        assert!(!store.contains(&digest));
        assert_eq!(store.writer(digest, 5).unwrap().offset(), 0, "damaged bytes are not resumed");
    }

    #[test]
    fn the_size_limit_is_exact_and_refused_before_any_byte() {
        let (_dir, store) = store();
        let digest = Digest::of(b"");
        assert!(store.writer(digest, MAX_BLOB_BYTES).is_ok());
        assert_eq!(
            store.writer(digest, MAX_BLOB_BYTES + 1).map(|_| ()),
            Err(StoreError::BlobTooLarge { got: MAX_BLOB_BYTES + 1, max: MAX_BLOB_BYTES })
        );
    }

    #[test]
    fn stale_temporary_files_go_at_opening() {
        let dir = tempfile::tempdir().unwrap();
        drop(BlobStore::open(dir.path()).unwrap());
        let (stale, busy) = (dir.path().join("tmp/1-0"), dir.path().join("tmp/2-0"));
        fs::write(&stale, b"half").unwrap();
        let held = disk::open_locked(&busy).unwrap();
        drop(BlobStore::open(dir.path()).unwrap());
        assert!(!stale.exists());
        assert!(busy.exists(), "a file another process is writing stays");
        drop(held);
    }
}
