//! Byte strings that arrive together and leave together: one append-only file a group, one flush a batch.
//!
//! A [`crate::blob`] costs a flush of its own. What many peers send at once and nobody needs once its group is over (the
//! vectors of a round) goes into a pack instead: frames of length, digest and bytes, durable together. A pack is
//! removed as a whole. A frame that a crash left unfinished was acknowledged to nobody; the next append cuts it off.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::blob::MAX_BLOB_BYTES;
use crate::{Digest, StoreError, disk};

/// A folder of packs. One process at a time writes to it.
#[derive(Debug)]
pub struct PackStore {
    root: PathBuf,
}

impl PackStore {
    /// Opens a folder, creating it if there is none.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the system refuses.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        disk::create_dir(root)?;
        Ok(Self { root: root.to_owned() })
    }

    /// Appends byte strings to the pack `name`, each under its digest as the caller computed it; all of them are durable
    /// when it returns. Reading checks each against its digest.
    ///
    /// # Errors
    /// - [`StoreError::PackName`] for a name that can't be a file's
    /// - [`StoreError::BlobTooLarge`] above [`MAX_BLOB_BYTES`]
    /// - [`StoreError::PackDamaged`] if what is there isn't a pack; nothing is written then
    /// - [`StoreError::Io`] if the system refuses; some may be there then, unacknowledged
    pub fn append(&self, name: &str, parts: &[(Digest, &[u8])]) -> Result<(), StoreError> {
        let path = self.path(name)?;
        if let Some((_, long)) = parts.iter().find(|(_, bytes)| bytes.len() as u64 > MAX_BLOB_BYTES) {
            return Err(StoreError::BlobTooLarge { got: long.len() as u64, max: MAX_BLOB_BYTES });
        }
        let fresh = !path.exists();
        let failed = |error: std::io::Error| StoreError::io("write", &path, &error);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let end = if fresh { 0 } else { whole_frames(&file, &path, &mut |_, _| Ok(()))? };
        file.set_len(end).map_err(failed)?;
        file.seek(SeekFrom::Start(end)).map_err(failed)?;
        for (digest, bytes) in parts {
            file.write_all(&header(digest, bytes.len() as u64))
                .and_then(|()| file.write_all(bytes))
                .map_err(failed)?;
        }
        file.sync_data().map_err(failed)?;
        if fresh { disk::sync_dir(&self.root) } else { Ok(()) }
    }

    /// Everything in the pack `name` that matches its digest; empty if there is no such pack.
    ///
    /// # Errors
    /// [`StoreError::PackName`], [`StoreError::PackDamaged`], [`StoreError::Io`].
    pub fn read(&self, name: &str) -> Result<BTreeMap<Digest, Vec<u8>>, StoreError> {
        let path = self.path(name)?;
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(StoreError::io("read", &path, &error)),
        };
        let mut found = BTreeMap::new();
        whole_frames(&file, &path, &mut |digest, bytes| {
            let mut part = Vec::new();
            bytes.read_to_end(&mut part).map_err(|error| StoreError::io("read", &path, &error))?;
            if Digest::of(&part) == digest {
                found.insert(digest, part);
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Removes a pack, durably; a missing one is no error.
    ///
    /// # Errors
    /// [`StoreError::PackName`], [`StoreError::Io`].
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path(name)?;
        match std::fs::remove_file(&path) {
            Ok(()) => disk::sync_dir(&self.root),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(StoreError::io("remove", &path, &error)),
        }
    }

    /// Names of all packs, in order.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the system refuses.
    pub fn list(&self) -> Result<Vec<String>, StoreError> {
        let failed = |error: std::io::Error| StoreError::io("list", &self.root, &error);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            names.extend(name.to_str().and_then(|name| name.strip_suffix(EXTENSION)).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    fn path(&self, name: &str) -> Result<PathBuf, StoreError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(plain) {
            return Err(StoreError::PackName { got: name.chars().take(2 * MAX_NAME_BYTES).collect() });
        }
        Ok(self.root.join(format!("{name}{EXTENSION}")))
    }
}

/// Visits every whole frame and gives the offset where they end.
fn whole_frames(
    file: &File,
    path: &Path,
    visit: &mut dyn FnMut(Digest, &mut dyn Read) -> Result<(), StoreError>,
) -> Result<u64, StoreError> {
    let failed = |error: std::io::Error| StoreError::io("read", path, &error);
    let length = file.metadata().map_err(failed)?.len();
    let mut reader = BufReader::new(file);
    let mut at = 0;
    while length - at >= HEADER_BYTES as u64 {
        let mut read = [0; HEADER_BYTES];
        reader.read_exact(&mut read).map_err(failed)?;
        let Some((digest, size)) = parse(&read) else {
            // A file that grew before its bytes were written ends in noughts.
            if read == [0; HEADER_BYTES] && only_noughts(&mut reader).map_err(failed)? {
                break;
            }
            return Err(StoreError::PackDamaged { path: path.to_owned(), offset: at });
        };
        let frame = HEADER_BYTES as u64 + size;
        if length - at < frame {
            break;
        }
        let mut part = (&mut reader).take(size);
        visit(digest, &mut part)?;
        let rest = part.limit();
        reader.seek_relative(rest.cast_signed()).map_err(failed)?;
        at += frame;
    }
    Ok(at)
}

fn only_noughts(reader: &mut impl Read) -> std::io::Result<bool> {
    let mut piece = [0; 4096];
    loop {
        let got = reader.read(&mut piece)?;
        if got == 0 {
            return Ok(true);
        }
        if piece.iter().take(got).any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
}

/// Magic, length, digest, CRC-32 of these.
fn header(digest: &Digest, size: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    let fields = MAGIC.iter().copied().chain(size.to_le_bytes()).chain(*digest.as_bytes());
    bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
    let (covered, sum) = bytes.split_at_mut(COVERED_BYTES);
    sum.copy_from_slice(&crc32fast::hash(covered).to_le_bytes());
    bytes
}

fn parse(bytes: &[u8; HEADER_BYTES]) -> Option<(Digest, u64)> {
    let (covered, sum) = bytes.split_at(COVERED_BYTES);
    let (magic, rest) = covered.split_at(MAGIC.len());
    let (size, digest) = rest.split_at(size_of::<u64>());
    let size = u64::from_le_bytes(size.try_into().ok()?);
    let sound = magic == MAGIC && sum == crc32fast::hash(covered).to_le_bytes() && size <= MAX_BLOB_BYTES;
    sound.then(|| digest.try_into().ok().map(|digest| (Digest::from_bytes(digest), size)))?
}

const MAGIC: &[u8; 4] = b"TMP\x01";
const COVERED_BYTES: usize = 4 + 8 + 32;
const HEADER_BYTES: usize = COVERED_BYTES + 4;
const EXTENSION: &str = ".pack";
/// Longest name of a pack.
pub const MAX_NAME_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn part(bytes: &[u8]) -> (Digest, &[u8]) {
        (Digest::of(bytes), bytes)
    }

    fn read(store: &PackStore) -> Vec<Vec<u8>> {
        store.read("round").unwrap().into_values().collect()
    }

    #[test]
    fn batches_add_up_and_a_pack_goes_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let store = PackStore::open(&dir.path().join("packs")).unwrap();
        assert!(read(&store).is_empty());
        store.append("round", &[part(b"one"), part(b"")]).unwrap();
        store.append("round", &[part(b"three")]).unwrap();
        store.append("other", &[part(b"x")]).unwrap();
        let mut expected = vec![b"one".to_vec(), Vec::new(), b"three".to_vec()];
        expected.sort_by_key(|bytes| Digest::of(bytes));
        assert_eq!(read(&store), expected);
        assert_eq!(store.list().unwrap(), ["other", "round"]);
        store.remove("round").unwrap();
        store.remove("round").unwrap();
        assert!(read(&store).is_empty());
        assert_eq!(store.list().unwrap(), ["other"]);
    }

    /// A crash within a write leaves any prefix of it, or noughts in its place; what was acknowledged before stays, and
    /// the next append lies behind it.
    #[test]
    fn a_torn_end_is_cut_off_at_every_byte() {
        let dir = tempfile::tempdir().unwrap();
        let store = PackStore::open(dir.path()).unwrap();
        store.append("round", &[part(b"kept")]).unwrap();
        let path = dir.path().join("round.pack");
        let kept = std::fs::read(&path).unwrap();
        store.append("round", &[part(b"torn")]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in kept.len()..whole.len() {
            let mut noughts = whole[..cut].to_vec();
            noughts[kept.len()..].fill(0);
            for left in [&whole[..cut], &noughts] {
                std::fs::write(&path, left).unwrap();
                assert_eq!(read(&store), [b"kept"]);
                store.append("round", &[part(b"next")]).unwrap();
                assert_eq!(store.read("round").unwrap().len(), 2, "cut at {cut}");
            }
        }
    }

    #[test]
    fn damage_is_named_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let store = PackStore::open(dir.path()).unwrap();
        store.append("round", &[part(b"first"), part(b"second")]).unwrap();
        let path = dir.path().join("round.pack");
        let whole = std::fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        // The last byte of the first payload: that part is missing, the other is there.
        bytes[HEADER_BYTES + 4] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&store), [b"second"]);
        // The second header: where frames end can't be told any more.
        let offset = HEADER_BYTES + 5;
        let mut bytes = whole;
        bytes[offset + 6] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let damaged = StoreError::PackDamaged { path: path.clone(), offset: offset as u64 };
        assert_eq!(store.read("round"), Err(damaged.clone()));
        assert_eq!(store.append("round", &[part(b"third")]), Err(damaged));
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn names_are_plain_and_limited() {
        let dir = tempfile::tempdir().unwrap();
        let store = PackStore::open(dir.path()).unwrap();
        assert!(store.append(&"a".repeat(MAX_NAME_BYTES), &[]).is_ok());
        for name in ["", "..", "a/b", "A", &"a".repeat(MAX_NAME_BYTES + 1)] {
            assert!(matches!(store.append(name, &[]), Err(StoreError::PackName { .. })), "{name}");
        }
    }
}
