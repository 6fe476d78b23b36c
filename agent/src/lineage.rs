//! Which physical source a contract's words name: a budget follows the file or table, not how its path is written.
//!
//! A contract says `path: orders.parquet`; another, under a new product name, may say `./orders.parquet`, or name a link. The
//! agent remembers, beside its ledger and on its own machine alone, where each source of its ledger was found, and gives a source
//! that is found there again the name under which it is counted. What is remembered never leaves: the ledger has the contract's words.
//! A copy of a table is another file; whoever makes one says so by `derived_from` in the policy.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::files;

/// Why sources can't be told apart.
#[derive(Debug, Error)]
pub enum LineageError {
    /// The file of known sources can't be read or written.
    #[error("{path}: {reason}; it says which sources the ledger counts: restore it, or the folder it is in")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system or the parser says.
        reason: String,
    },
    /// More sources than one agent can have.
    #[error("{path} has {MAX_SOURCES} sources, more are refused")]
    TooMany {
        /// The file.
        path: PathBuf,
    },
}

/// The sources that an agent's ledger counts, and where they were found.
#[derive(Debug)]
pub struct Lineages {
    path: PathBuf,
    known: Vec<Known>,
}

/// A source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    /// Its name in the ledger: what the first contract called it.
    lineage: String,
    /// Where it was found.
    places: BTreeSet<String>,
}

impl Lineages {
    /// Reads what a data folder remembers; nothing in a new one.
    ///
    /// # Errors
    /// [`LineageError::File`] if it can't be read.
    pub fn open(data_dir: &Path) -> Result<Self, LineageError> {
        let path = data_dir.join("sources.json");
        let broken = |reason: String| LineageError::File { path: path.clone(), reason };
        let known = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(broken(error.to_string())),
        };
        Ok(Self { path, known })
    }

    /// The name in the ledger of the source that a contract calls `declared` and that is found at these places.
    ///
    /// One that was found at one of them before keeps its name; else one that was called so; else it is new. What is learnt is
    /// stored before this returns, so that no budget is granted under a name that a crash forgets.
    ///
    /// # Errors
    /// [`LineageError`] if it can't be stored.
    pub fn named(&mut self, declared: &str, places: BTreeSet<String>) -> Result<String, LineageError> {
        let found = |known: &Known| !known.places.is_disjoint(&places);
        let at = self.known.iter().position(found);
        let at = at.or_else(|| self.known.iter().position(|known| known.lineage == declared));
        let mut after = self.known.clone();
        if at.is_none() && after.len() >= MAX_SOURCES {
            return Err(LineageError::TooMany { path: self.path.clone() });
        }
        let name = match at.and_then(|at| after.get_mut(at)) {
            Some(known) => {
                // Numbers of files that are gone come back with other files: the last one seen is the source's.
                if places.iter().any(|place| place.starts_with(NUMBER)) {
                    known.places.retain(|place| !place.starts_with(NUMBER));
                }
                known.places.extend(places);
                known.lineage.clone()
            }
            None => {
                after.push(Known { lineage: declared.to_owned(), places });
                declared.to_owned()
            }
        };
        if after != self.known {
            let broken = |reason: String| LineageError::File { path: self.path.clone(), reason };
            let text = serde_json::to_vec_pretty(&after).map_err(|error| broken(error.to_string()))?;
            files::write_secret(&self.path, &text).map_err(|error| broken(error.to_string()))?;
            self.known = after;
        }
        Ok(name)
    }
}

/// Where a file is, whatever its path looks like: with links resolved, and by its number in the file system, which a renamed file
/// keeps. Nothing for a file that isn't there.
#[must_use]
pub fn places_of(file: &Path) -> BTreeSet<String> {
    let mut places = BTreeSet::new();
    if let Ok(path) = std::fs::canonicalize(file) {
        places.insert(format!("path {}", path.display()));
    }
    if let Ok(found) = std::fs::metadata(file) {
        places.insert(format!("{NUMBER}{} on {}", found.ino(), found.dev()));
    }
    places
}

/// What the place of a file by its number begins with.
const NUMBER: &str = "file ";
/// Sources that one agent's ledger may count.
pub const MAX_SOURCES: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn named(data: &Path, declared: &str, file: &Path) -> String {
        Lineages::open(data).unwrap().named(declared, places_of(file)).unwrap()
    }

    #[test]
    fn a_source_keeps_its_name_however_it_is_written_linked_or_moved() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("data")).unwrap();
        std::fs::write(at("orders.csv"), "1").unwrap();
        std::fs::write(at("people.csv"), "2").unwrap();
        let data = at("data");
        let called = |declared: &str| named(&data, declared, &at(declared));
        assert_eq!(called("orders.csv"), "orders.csv");
        assert_eq!(called("./orders.csv"), "orders.csv");
        assert_eq!(called("data/../orders.csv"), "orders.csv");
        std::os::unix::fs::symlink(at("orders.csv"), at("sales.csv")).unwrap();
        assert_eq!(called("sales.csv"), "orders.csv");
        std::fs::hard_link(at("orders.csv"), at("hard.csv")).unwrap();
        assert_eq!(called("hard.csv"), "orders.csv");
        // By the link alone: the file behind it is a new one.
        std::fs::write(at("beside.csv"), "4").unwrap();
        std::fs::rename(at("beside.csv"), at("orders.csv")).unwrap();
        std::os::unix::fs::symlink(at("orders.csv"), at("again.csv")).unwrap();
        assert_eq!(called("again.csv"), "orders.csv");
        // Another table is another source.
        assert_eq!(called("people.csv"), "people.csv");
        // Written anew at its place, and renamed afterwards.
        std::fs::remove_file(at("people.csv")).unwrap();
        std::fs::write(at("people.csv"), "3").unwrap();
        assert_eq!(called("people.csv"), "people.csv");
        std::fs::rename(at("people.csv"), at("persons.csv")).unwrap();
        assert_eq!(called("persons.csv"), "people.csv");
        // However often a table is written anew, one number is remembered.
        let numbers = Lineages::open(&data).unwrap().known.into_iter().flat_map(|known| known.places);
        assert_eq!(numbers.filter(|place| place.starts_with(NUMBER)).count(), 2);
    }

    #[test]
    fn a_name_without_a_place_is_its_name_and_two_names_of_one_place_are_the_place_s() {
        let folder = tempfile::tempdir().unwrap();
        let mut known = Lineages::open(folder.path()).unwrap();
        let place = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(known.named("a", place(&[])).unwrap(), "a");
        assert_eq!(known.named("b", place(&["x"])).unwrap(), "b");
        assert_eq!(known.named("a", place(&["x"])).unwrap(), "b", "found there before");
        assert_eq!(known.named("a", place(&["y"])).unwrap(), "a");
        assert_eq!(Lineages::open(folder.path()).unwrap().named("c", place(&["y"])).unwrap(), "a");
    }

    #[test]
    fn a_damaged_file_and_one_source_too_many_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut known = Lineages::open(folder.path()).unwrap();
        known.known =
            (0..MAX_SOURCES).map(|i| Known { lineage: i.to_string(), places: BTreeSet::new() }).collect();
        assert!(known.named("7", BTreeSet::new()).is_ok());
        assert!(matches!(known.named("more", BTreeSet::new()), Err(LineageError::TooMany { .. })));
        std::fs::write(folder.path().join("sources.json"), "[{").unwrap();
        let error = Lineages::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("sources.json"), "{error}");
    }
}
