//! Small records under byte-string keys, behind one trait with two implementations: [`Memory`] and [`Sled`].
//!
//! A commit is all or nothing and on disk when it returns. Values are at most [`MAX_VALUE_BYTES`]; larger things are
//! blobs, because sled keeps big values in files it neither syncs nor reclaims. Every stored value sits in the
//! versioned, checksummed envelope of [`crate::format`]. Nothing here may be the only copy of spent budget: that is
//! the hash-chained log's task, and a damaged directory is set aside and rebuilt from it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use sled::transaction::{ConflictableTransactionError, TransactionError};

use crate::{StoreError, disk, format};

/// Most bytes of a key.
pub const MAX_KEY_BYTES: usize = 512;
/// Most bytes of a value.
pub const MAX_VALUE_BYTES: usize = 64 * 1024;
/// Most operations of one commit.
pub const MAX_BATCH_OPS: usize = 4096;
/// Space kept aside so that the database can still open on a full disk, in bytes.
pub const RESERVE_BYTES: usize = 4 << 20;

/// One key with its value.
pub type Record = (Vec<u8>, Vec<u8>);

/// One step of a commit. All [`Op::Expect`]s are checked against the state before the commit, wherever they stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets a value.
    Put {
        /// The key.
        key: Vec<u8>,
        /// The new value.
        value: Vec<u8>,
    },
    /// Removes a key; a missing one is no error.
    Delete {
        /// The key.
        key: Vec<u8>,
    },
    /// Lets the whole commit fail unless the key has this value now; `None` means absent.
    Expect {
        /// The key.
        key: Vec<u8>,
        /// The value it must have.
        value: Option<Vec<u8>>,
    },
}

impl Op {
    /// Sets `key` to `value`.
    pub fn put(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { key: key.into(), value: value.into() }
    }

    /// Removes `key`.
    pub fn delete(key: impl Into<Vec<u8>>) -> Self {
        Self::Delete { key: key.into() }
    }

    /// Requires that `key` is absent.
    pub fn expect_absent(key: impl Into<Vec<u8>>) -> Self {
        Self::Expect { key: key.into(), value: None }
    }

    /// Requires that `key` has `value`.
    pub fn expect(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self::Expect { key: key.into(), value: Some(value.into()) }
    }

    fn key(&self) -> &[u8] {
        match self {
            Self::Put { key, .. } | Self::Delete { key } | Self::Expect { key, .. } => key,
        }
    }
}

/// A map of small records that survives the process.
pub trait Records: Send + Sync {
    /// Reads one value.
    ///
    /// # Errors
    /// [`StoreError::RecordDamaged`] or [`StoreError::UnknownVersion`] if the stored bytes can't be trusted;
    /// [`StoreError::Io`], [`StoreError::Engine`] or [`StoreError::EngineDamaged`] if the engine fails.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Reads up to `limit` records whose key begins with `prefix`, in key order, after the key `after` if given.
    ///
    /// # Errors
    /// As [`Records::get`].
    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Record>, StoreError>;

    /// Applies all operations or none; durable when it returns.
    ///
    /// # Errors
    /// - [`StoreError::KeyLength`], [`StoreError::ValueTooLarge`], [`StoreError::BatchTooLarge`]: refused, nothing
    ///   written
    /// - [`StoreError::Conflict`]: an expectation did not hold, nothing written
    /// - engine errors: the outcome is unknown until the store is opened again
    fn commit(&self, ops: &[Op]) -> Result<(), StoreError>;

    /// Sets one value; durable when it returns.
    ///
    /// # Errors
    /// As [`Records::commit`].
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.commit(&[Op::put(key, value)])
    }

    /// Removes one key; durable when it returns.
    ///
    /// # Errors
    /// As [`Records::commit`].
    fn delete(&self, key: &[u8]) -> Result<(), StoreError> {
        self.commit(&[Op::delete(key)])
    }

    /// Reads every record whose key begins with `prefix`, in key order.
    ///
    /// # Errors
    /// As [`Records::get`].
    fn scan_all(&self, prefix: &[u8]) -> Result<Vec<Record>, StoreError> {
        self.scan(prefix, None, usize::MAX)
    }
}

/// Copies every record into an empty store, as compaction and engine changes do; returns the number copied.
///
/// # Errors
/// As [`Records::get`] of the source and [`Records::commit`] of the target.
pub fn copy(from: &dyn Records, to: &dyn Records) -> Result<u64, StoreError> {
    let mut copied = 0;
    let mut after: Option<Vec<u8>> = None;
    loop {
        let page = from.scan(b"", after.as_deref(), COPY_PAGE)?;
        let Some((last, _)) = page.last() else { return Ok(copied) };
        after = Some(last.clone());
        copied += page.len() as u64;
        let ops: Vec<Op> = page.into_iter().map(|(key, value)| Op::Put { key, value }).collect();
        to.commit(&ops)?;
    }
}

/// Moves a damaged database directory to `<dir>.damaged-<n>`, so that a fresh one can be rebuilt from the log.
///
/// # Errors
/// [`StoreError::Io`] if the system refuses.
pub fn set_aside(dir: &Path) -> Result<PathBuf, StoreError> {
    for n in 1u32.. {
        let mut name = dir.as_os_str().to_owned();
        name.push(format!(".damaged-{n}"));
        let aside = PathBuf::from(name);
        if !aside.exists() {
            disk::publish(dir, &aside)?;
            return Ok(aside);
        }
    }
    Err(StoreError::Locked { path: dir.to_owned() })
}

/// Records in memory, for tests and simulations; sealed like stored ones.
#[derive(Debug, Default)]
pub struct Memory {
    map: Mutex<BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl Memory {
    /// Starts empty.
    #[must_use]
    pub const fn new() -> Self {
        Self { map: Mutex::new(BTreeMap::new()) }
    }

    fn map(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, Vec<u8>>> {
        // A panic elsewhere can't leave a commit half done: it is applied without any call that may panic.
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Records for Memory {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.map().get(key).map(|sealed| open(key, sealed)).transpose()
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Record>, StoreError> {
        self.map()
            .range::<[u8], _>((scan_start(prefix, after), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .take(limit)
            .map(|(key, sealed)| Ok((key.clone(), open(key, sealed)?)))
            .collect()
    }

    fn commit(&self, ops: &[Op]) -> Result<(), StoreError> {
        check(ops)?;
        let mut map = self.map();
        for op in ops {
            if let Op::Expect { key, value } = op {
                let found = map.get(key).map(|sealed| open(key, sealed)).transpose()?;
                if found != *value {
                    return Err(StoreError::Conflict { key: format::show_key(key) });
                }
            }
        }
        for op in ops {
            match op {
                Op::Put { key, value } => drop(map.insert(key.clone(), format::seal_record(key, value))),
                Op::Delete { key } => drop(map.remove(key)),
                Op::Expect { .. } => {}
            }
        }
        Ok(())
    }
}

/// Records in a sled database, one process at a time.
#[derive(Debug)]
pub struct Sled {
    db: sled::Db,
    tree: sled::Tree,
    dir: PathBuf,
    commit: Mutex<()>,
    reserved: bool,
}

impl Sled {
    /// Opens or creates the database in `dir`.
    ///
    /// # Errors
    /// - [`StoreError::Locked`] if another process has it open
    /// - [`StoreError::EngineDamaged`] if its files don't verify: [`set_aside`] and rebuild
    /// - [`StoreError::Io`] if the system refuses
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        disk::create_dir(dir)?;
        let reserve = dir.join(RESERVE);
        if reserve.exists() {
            fs::remove_file(&reserve).map_err(|error| StoreError::io("remove", &reserve, &error))?;
        }
        let failed = |error| engine_error(error, dir);
        let db = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .open()
            .map_err(failed)?;
        let tree = db.open_tree(TREE).map_err(failed)?;
        let reserved = write_reserve(&reserve).is_ok();
        if !reserved {
            drop(fs::remove_file(&reserve));
        }
        let opened = Self { db, tree, dir: dir.to_owned(), commit: Mutex::new(()), reserved };
        opened.make_durable()?;
        disk::sync_dir(dir)?;
        Ok(opened)
    }

    /// Whether the space set aside for opening on a full disk could be reserved; if not, the disk is nearly full.
    #[must_use]
    pub const fn has_reserve(&self) -> bool {
        self.reserved
    }

    /// Bytes the database occupies.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the system refuses.
    pub fn bytes_on_disk(&self) -> Result<u64, StoreError> {
        self.db.size_on_disk().map_err(|error| engine_error(error, &self.dir))
    }

    fn make_durable(&self) -> Result<(), StoreError> {
        self.db.flush().map_err(|error| engine_error(error, &self.dir))?;
        // sled's flush starts write-back and does not wait for the device.
        let file = self.dir.join(DATABASE);
        File::open(&file).and_then(|db| db.sync_all()).map_err(|error| StoreError::io("sync", &file, &error))
    }
}

impl Records for Sled {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let found = self.tree.get(key).map_err(|error| engine_error(error, &self.dir))?;
        found.map(|sealed| open(key, &sealed)).transpose()
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<Record>, StoreError> {
        let mut records = Vec::new();
        for found in self.tree.range::<&[u8], _>((scan_start(prefix, after), Bound::Unbounded)) {
            let (key, sealed) = found.map_err(|error| engine_error(error, &self.dir))?;
            if records.len() == limit || !key.starts_with(prefix) {
                break;
            }
            records.push((key.to_vec(), open(&key, &sealed)?));
        }
        Ok(records)
    }

    fn commit(&self, ops: &[Op]) -> Result<(), StoreError> {
        check(ops)?;
        // One commit at a time: what a caller reads after its commit returned is on disk.
        let _one = self.commit.lock().unwrap_or_else(PoisonError::into_inner);
        let applied = self.tree.transaction(|tree| {
            for op in ops {
                if let Op::Expect { key, value } = op {
                    let found = tree.get(key)?;
                    let found = found.map(|sealed| open(key, &sealed)).transpose();
                    if found.map_err(ConflictableTransactionError::Abort)? != *value {
                        let conflict = StoreError::Conflict { key: format::show_key(key) };
                        return Err(ConflictableTransactionError::Abort(conflict));
                    }
                }
            }
            for op in ops {
                match op {
                    Op::Put { key, value } => {
                        drop(tree.insert(key.as_slice(), format::seal_record(key, value))?);
                    }
                    Op::Delete { key } => drop(tree.remove(key.as_slice())?),
                    Op::Expect { .. } => {}
                }
            }
            Ok(())
        });
        match applied {
            Ok(()) => self.make_durable(),
            Err(TransactionError::Abort(refused)) => Err(refused),
            Err(TransactionError::Storage(error)) => Err(engine_error(error, &self.dir)),
        }
    }
}

fn check(ops: &[Op]) -> Result<(), StoreError> {
    if ops.len() > MAX_BATCH_OPS {
        return Err(StoreError::BatchTooLarge { got: ops.len(), max: MAX_BATCH_OPS });
    }
    for op in ops {
        let key = op.key().len();
        if key == 0 || key > MAX_KEY_BYTES {
            return Err(StoreError::KeyLength { got: key, max: MAX_KEY_BYTES });
        }
        if let Op::Put { value, .. } = op
            && value.len() > MAX_VALUE_BYTES
        {
            return Err(StoreError::ValueTooLarge { got: value.len(), max: MAX_VALUE_BYTES });
        }
    }
    Ok(())
}

fn open(key: &[u8], sealed: &[u8]) -> Result<Vec<u8>, StoreError> {
    format::open_record(key, sealed).map(<[u8]>::to_vec)
}

fn scan_start<'a>(prefix: &'a [u8], after: Option<&'a [u8]>) -> Bound<&'a [u8]> {
    match after {
        Some(after) if after >= prefix => Bound::Excluded(after),
        _ => Bound::Included(prefix),
    }
}

fn write_reserve(path: &Path) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(&vec![0; RESERVE_BYTES])?;
    file.sync_all()
}

fn engine_error(error: sled::Error, dir: &Path) -> StoreError {
    match error {
        sled::Error::Io(error) if error.to_string().contains("could not acquire lock") => {
            StoreError::Locked { path: dir.to_owned() }
        }
        sled::Error::Io(error) => StoreError::io("use", dir, &error),
        sled::Error::Corruption { .. } => StoreError::EngineDamaged { path: dir.to_owned() },
        other => StoreError::Engine { reason: other.to_string() },
    }
}

const TREE: &str = "records";
const DATABASE: &str = "db";
const RESERVE: &str = "reserve";
const CACHE_BYTES: u64 = 32 << 20;
const COPY_PAGE: usize = 256;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Runs one check over both implementations.
    fn on_both(check: impl Fn(&dyn Records)) {
        check(&Memory::new());
        let dir = tempfile::tempdir().unwrap();
        check(&Sled::open(&dir.path().join("db")).unwrap());
    }

    fn keys(records: &[Record]) -> Vec<&str> {
        records.iter().map(|(key, _)| std::str::from_utf8(key).unwrap()).collect()
    }

    #[test]
    fn conformance_get_put_delete() {
        on_both(|records| {
            assert_eq!(records.get(b"a").unwrap(), None);
            records.put(b"a", b"1").unwrap();
            records.put(b"a", b"2").unwrap();
            records.put(b"empty", b"").unwrap();
            assert_eq!(records.get(b"a").unwrap().unwrap(), b"2");
            assert_eq!(records.get(b"empty").unwrap().unwrap(), b"");
            records.delete(b"a").unwrap();
            records.delete(b"a").unwrap();
            assert_eq!(records.get(b"a").unwrap(), None);
        });
    }

    #[test]
    fn conformance_scan_is_ordered_bounded_and_stays_in_the_prefix() {
        on_both(|records| {
            let all = ["a", "round/1", "round/2", "round/3", "round0", "z"];
            let ops: Vec<Op> = all.iter().rev().map(|key| Op::put(*key, *key)).collect();
            records.commit(&ops).unwrap();
            assert_eq!(keys(&records.scan_all(b"round/").unwrap()), all[1..4]);
            assert_eq!(keys(&records.scan_all(b"").unwrap()), all);
            assert_eq!(keys(&records.scan(b"round/", None, 2).unwrap()), all[1..3]);
            assert_eq!(keys(&records.scan(b"round/", Some(b"round/2"), 9).unwrap()), all[3..4]);
            assert_eq!(keys(&records.scan(b"round/", Some(b"a"), 9).unwrap()), all[1..4]);
            assert!(records.scan(b"round/", Some(b"round/9"), 9).unwrap().is_empty());
            assert!(records.scan(b"round/", None, 0).unwrap().is_empty());
        });
    }

    #[test]
    fn conformance_a_commit_is_all_or_nothing() {
        on_both(|records| {
            records.put(b"head", b"7").unwrap();
            let refused = records.commit(&[Op::put("x", "1"), Op::expect("head", "6"), Op::delete("head")]);
            assert_eq!(refused, Err(StoreError::Conflict { key: "head".into() }));
            assert_eq!(records.get(b"x").unwrap(), None);
            let taken = records.commit(&[Op::expect_absent("head"), Op::put("head", "8")]);
            assert_eq!(taken, Err(StoreError::Conflict { key: "head".into() }));
            // Expectations look at the state before the commit, wherever they stand.
            records.commit(&[Op::put("head", "8"), Op::expect("head", "7")]).unwrap();
            assert_eq!(records.get(b"head").unwrap().unwrap(), b"8");
            let one_bad = [Op::put("y", "1"), Op::put("big", vec![0; MAX_VALUE_BYTES + 1])];
            assert!(records.commit(&one_bad).is_err());
            assert_eq!(records.get(b"y").unwrap(), None);
        });
    }

    #[test]
    fn conformance_limits_are_exact() {
        on_both(|records| {
            records.put(&[b'k'; MAX_KEY_BYTES], &vec![1; MAX_VALUE_BYTES]).unwrap();
            assert_eq!(
                records.put(b"k", &vec![1; MAX_VALUE_BYTES + 1]),
                Err(StoreError::ValueTooLarge { got: MAX_VALUE_BYTES + 1, max: MAX_VALUE_BYTES })
            );
            for got in [0, MAX_KEY_BYTES + 1] {
                let refused = records.put(&vec![b'k'; got], b"");
                assert_eq!(refused, Err(StoreError::KeyLength { got, max: MAX_KEY_BYTES }));
            }
            let batch = vec![Op::delete("k"); MAX_BATCH_OPS + 1];
            records.commit(&batch[1..]).unwrap();
            assert_eq!(
                records.commit(&batch),
                Err(StoreError::BatchTooLarge { got: MAX_BATCH_OPS + 1, max: MAX_BATCH_OPS })
            );
        });
    }

    #[test]
    fn conformance_expectations_serialise_concurrent_writers() {
        fn count_up(records: &dyn Records) {
            for _ in 0..20 {
                loop {
                    let now = records.get(b"n").unwrap();
                    let next = now.as_deref().map_or(0, |bytes| bytes[0]) + 1;
                    let expect = Op::Expect { key: b"n".to_vec(), value: now };
                    match records.commit(&[expect, Op::put("n", vec![next])]) {
                        Ok(()) => break,
                        Err(StoreError::Conflict { .. }) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            }
        }
        on_both(|records| {
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| count_up(records));
                }
            });
            assert_eq!(records.get(b"n").unwrap().unwrap(), [80]);
        });
    }

    #[test]
    fn sled_keeps_records_over_reopening_and_refuses_a_second_opener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let records = Sled::open(&path).unwrap();
        assert!(records.has_reserve());
        assert_eq!(fs::metadata(path.join(RESERVE)).unwrap().len(), RESERVE_BYTES as u64);
        records.put(b"k", b"v").unwrap();
        assert_eq!(Sled::open(&path).map(|_| ()), Err(StoreError::Locked { path: path.clone() }));
        drop(records);
        let records = Sled::open(&path).unwrap();
        assert_eq!(records.get(b"k").unwrap().unwrap(), b"v");
        assert!(records.bytes_on_disk().unwrap() > 0);
    }

    #[test]
    fn copy_and_set_aside_rebuild_a_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let from = Memory::new();
        let ops: Vec<Op> = (0..600u32).map(|i| Op::put(i.to_be_bytes(), i.to_le_bytes())).collect();
        from.commit(&ops).unwrap();
        drop(Sled::open(&path).unwrap());
        let aside = set_aside(&path).unwrap();
        assert!(aside.ends_with("db.damaged-1") && aside.is_dir() && !path.exists());
        let to: Arc<dyn Records> = Arc::new(Sled::open(&path).unwrap());
        assert_eq!(copy(&from, to.as_ref()).unwrap(), 600);
        assert_eq!(to.scan_all(b"").unwrap(), from.scan_all(b"").unwrap());
    }
}
