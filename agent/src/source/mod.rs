//! Table sources: a domain's table as a stream of bounded batches, checked against its contract.
//!
//! Owns the [`Source`] trait, its errors and the arms behind it (one file each); [`view`] turns batches into the
//! contract's terms, [`units`] names and caps privacy units. A source never holds the whole table, never sends
//! anything, and never quotes a cell in an error: errors name file, column, line and types. A new kind of table
//! is one file here and one arm of [`open`].

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tabmesh_contract::contract::{Contract, SourceKind, SourceSpec};
use tabmesh_contract::profile::TableProfile;
use thiserror::Error;

use crate::lineage::places_of;

#[cfg(not(feature = "postgres"))]
mod absent;
#[cfg(test)]
mod answering;
pub mod check;
mod csv;
pub mod marginals;
mod parquet;
#[cfg(feature = "postgres")]
mod postgres;
pub mod raw;
pub mod units;
pub mod view;

pub use check::TableCheck;
pub use marginals::{Admission, MarginalError, MarginalRequest, NamedUnits, Origin};
pub use raw::RawBatch;
pub use units::{DomainKey, UnitCap, UnitFilter};
pub use view::{Rows, View};

/// Why a table can't be read under its contract. The text stays in the domain's own logs.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SourceError {
    /// The contract doesn't say where the table is.
    #[error("contract {contract} declares no source: add `source: {{type: parquet, path: ..}}`")]
    Undeclared {
        /// Name of the data product.
        contract: String,
    },
    /// The file can't be opened or read.
    #[error("can't read {file}: {message}; check the path in the contract and the file's permissions")]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        message: String,
    },
    /// The file isn't of the declared format.
    #[error("{file} is not a {expected} file: {message}; correct `source.type` or the file")]
    WrongFormat {
        /// The file.
        file: PathBuf,
        /// The declared format.
        expected: &'static str,
        /// What the reader said.
        message: String,
    },
    /// The file starts as it should and then ends early.
    #[error("{file} is truncated: {message}; write the file again, then move it into place")]
    Truncated {
        /// The file.
        file: PathBuf,
        /// What the reader said.
        message: String,
    },
    /// A block or line in the middle of the file can't be decoded.
    #[error("{file} can't be decoded after row {rows}: {message}; write the file again")]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// Rows read before it.
        rows: u64,
        /// What the reader said.
        message: String,
    },
    /// The kind of source isn't part of this build.
    #[error("{file}: this build has no {kind} source; build the agent with `--features {kind}`")]
    Absent {
        /// The file.
        file: PathBuf,
        /// The kind, and the feature that has it.
        kind: &'static str,
    },
    /// The table has no row.
    #[error("{file} has no rows: a contract is checked against at least one")]
    NoRows {
        /// The file.
        file: PathBuf,
    },
    /// A declared column isn't in the file.
    #[error("{file} has no column `{column}`, found: {}; rename it or drop it from the contract", found.join(", "))]
    MissingColumn {
        /// The file.
        file: PathBuf,
        /// The declared column.
        column: String,
        /// Columns in the file.
        found: Vec<String>,
    },
    /// Two columns of the file have the name of a declared one.
    #[error("{file} has more than one column `{column}`: rename the others")]
    AmbiguousColumn {
        /// The file.
        file: PathBuf,
        /// The name.
        column: String,
    },
    /// A column's values don't have the declared type.
    #[error(
        "column `{column}` of {file} must be {expected}, found {found}; correct `type` in the contract or the file"
    )]
    WrongType {
        /// The file.
        file: PathBuf,
        /// The column.
        column: String,
        /// The declared type, in words.
        expected: String,
        /// The type found, in words.
        found: String,
    },
    /// A plan's feature isn't declared in the same way by this domain's contract.
    #[error("feature {feature} must be {expected}, the contract declares {found}")]
    FeatureMismatch {
        /// Canonical id.
        feature: String,
        /// What the schema needs.
        expected: &'static str,
        /// What the contract declares.
        found: &'static str,
    },
    /// The contract declares no target of the schema's id.
    #[error("the contract declares no target {target}")]
    MissingTarget {
        /// Canonical id.
        target: String,
    },
}

/// Batches of a table, in file order.
pub type Batches<'a> = Box<dyn Iterator<Item = Result<RawBatch, SourceError>> + Send + 'a>;

/// A table that is read as a stream.
pub trait Source: Send + Sync {
    /// The file, or whatever stands for it in errors.
    fn location(&self) -> &Path;

    /// Where the rows physically are, however the contract writes it: what a budget is kept for. They stay on the agent's machine.
    fn places(&self) -> BTreeSet<String> {
        places_of(self.location())
    }

    /// Checks that every declared column is there with a fitting type and that there is at least one row.
    ///
    /// # Errors
    /// The first [`SourceError`] in the contract's column order.
    fn schema_check(&self, contract: &Contract) -> Result<(), SourceError>;

    /// Streams the declared columns in the contract's order, [`BATCH_ROWS`] rows at a time. A table without rows
    /// is an empty stream: after admission, an empty table answers like any other.
    ///
    /// # Errors
    /// [`SourceError`] if the table can't be opened or lacks a column; the stream carries later ones and ends
    /// after the first.
    fn batches<'a>(&'a self, contract: &'a Contract) -> Result<Batches<'a>, SourceError>;

    /// Counts the cells of a request's marginals: one number for each of [`ReleaseQuery::cells_total`], in its order.
    ///
    /// By default the table is streamed. A source with an engine of its own may count there instead, as one `GROUP BY` a
    /// marginal, but noise is calibrated to what is promised here, so it must keep all of it or call
    /// [`MarginalRequest::stream`]:
    ///
    /// 1. **The same rows.** Which rows count follows from keyed hashes, and the keys stay in the agent: no key, and no hash
    ///    that an engine could compute, is handed over. [`MarginalRequest::admission`] says whether units have names in a
    ///    column; if they don't, only streaming tells which rows count. If they do, the source reads that column, asks
    ///    [`NamedUnits::admits`] for each name, and lets the engine count the rows that join those admitted, kept in a
    ///    temporary table of the session which no log and no other session sees.
    /// 2. **The cap.** No unit has more than [`NamedUnits::max_rows`] rows in the table, by a constraint that the engine
    ///    enforces or by a count over all rows. A unit of more needs a choice among its rows by keyed hash: stream then.
    /// 3. **One snapshot.** Names, the count of 2. and all marginals are read in one transaction that sees one state of the
    ///    table. A row that appears in between belongs to a unit whose cap was checked without it.
    /// 4. **The same cells.** A value's cell is the one that [`Origin`] and the query define. All marginals count the same
    ///    rows: where the query has the label, those without a declared class are in none of them.
    /// 5. **No word of a row.** Errors name tables, columns and types, as everywhere here; counts go nowhere but to the
    ///    caller, who adds noise.
    ///
    /// The caller checks size and sign of the counts and that all marginals have one total; that can't tell a cap or a
    /// gate that was passed over.
    ///
    /// [`ReleaseQuery::cells_total`]: tabmesh_privacy::release::ReleaseQuery::cells_total
    ///
    /// # Errors
    /// [`MarginalError`]; whether it occurs may depend on files and limits, never on values.
    fn marginals(&self, request: &MarginalRequest<'_>) -> Result<Vec<i64>, MarginalError> {
        request.stream()
    }
}

/// Opens the table of a source specification; relative paths are taken from `folder`.
#[must_use]
pub fn open(spec: &SourceSpec, folder: &Path) -> Box<dyn Source> {
    let path = folder.join(&spec.path);
    match spec.kind {
        SourceKind::Parquet => Box::new(parquet::ParquetSource::new(path)),
        SourceKind::Csv => Box::new(csv::CsvSource::new(path, spec.delimiter.unwrap_or(b','))),
        #[cfg(feature = "postgres")]
        SourceKind::Postgres => Box::new(postgres::PostgresSource::new(path)),
        #[cfg(not(feature = "postgres"))]
        SourceKind::Postgres => Box::new(absent::AbsentSource::new(path, "postgres")),
    }
}

/// Opens the table that a contract names.
///
/// # Errors
/// [`SourceError::Undeclared`] if it names none.
pub fn open_contract(contract: &Contract, folder: &Path) -> Result<Box<dyn Source>, SourceError> {
    match &contract.source {
        Some(spec) => Ok(open(spec, folder)),
        None => Err(SourceError::Undeclared { contract: contract.name.clone() }),
    }
}

/// Profiles every declared column in one pass. The profile stays in the domain.
///
/// # Errors
/// The [`SourceError`] that ends the stream.
pub fn profile(source: &dyn Source, contract: &Contract) -> Result<TableProfile, SourceError> {
    let mut profile = TableProfile::new(contract);
    for batch in source.batches(contract)? {
        let batch = batch?;
        let mut cells = Vec::with_capacity(contract.columns.len());
        for row in 0..batch.rows() {
            cells.clear();
            cells.extend(batch.columns().iter().map(|column| column.cell(row)));
            profile.push_row(&cells);
        }
    }
    Ok(profile)
}

/// Rows of one batch.
pub const BATCH_ROWS: usize = 8192;

/// Positions of the declared columns among the file's names.
fn locate(file: &Path, found: &[String], contract: &Contract) -> Result<Vec<usize>, SourceError> {
    let mut positions = Vec::with_capacity(contract.columns.len());
    for column in &contract.columns {
        let mut matching = found.iter().enumerate().filter(|(_, name)| **name == column.name).map(|(i, _)| i);
        match (matching.next(), matching.next()) {
            (Some(position), None) => positions.push(position),
            (Some(_), Some(_)) => {
                return Err(SourceError::AmbiguousColumn {
                    file: file.to_owned(),
                    column: column.name.clone(),
                });
            }
            (None, _) => {
                return Err(SourceError::MissingColumn {
                    file: file.to_owned(),
                    column: column.name.clone(),
                    found: found.to_vec(),
                });
            }
        }
    }
    Ok(positions)
}

#[cfg(test)]
mod tests;
