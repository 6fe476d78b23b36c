//! A table in the terms of a federation: typed columns in canonical order, class labels, privacy units.
//!
//! Owns the mapping from a contract's columns to a [`FeatureSchema`] that many domains share. A feature the
//! domain lacks is a column of missing values. Conversion never fails on a value: what doesn't parse is missing,
//! a level outside the schema's is "other", so a bad cell can't make this domain answer differently from others.
//! Clamping to declared ranges is left to those who need it.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;

use tabmesh_contract::batch::{TypedBatch, TypedColumn, UnitKey, missing_code, other_code};
use tabmesh_contract::contract::{Column, Contract, FeatureType, Role};
use tabmesh_contract::profile::{Cell, level_text};
use tabmesh_contract::schema::{FeatureKind, FeatureSchema, PrivacyUnit};

use super::raw::RawColumn;
use super::units::{DomainKey, UnitCap, UnitFilter};
use super::{Batches, RawBatch, Source, SourceError};

/// A source seen through a schema.
pub struct View<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) contract: &'a Contract,
    /// Canonical id of each feature.
    pub(super) ids: Vec<String>,
    pub(super) features: Vec<Mapped>,
    pub(super) label: Option<usize>,
    pub(super) classes: BTreeMap<String, u16>,
    pub(super) unit: UnitColumn,
    time: Option<usize>,
    key: DomainKey,
}

/// Where a feature's values come from.
pub(super) enum Mapped {
    Missing(FeatureKind),
    Numeric { column: usize },
    Categorical { column: usize, levels: BTreeMap<String, u32> },
}

/// Which column names a row's privacy unit.
#[derive(Clone, Copy)]
pub(super) enum UnitColumn {
    Entity(usize),
    RowId(usize),
    RowContent,
}

/// Units of a batch's rows.
pub(super) struct Units {
    pub(super) keys: Vec<UnitKey>,
    /// Rows that are named by their own content, so that no other row has their name.
    alone: Vec<bool>,
}

/// Names rows over one pass.
#[derive(Default)]
pub(super) struct Namer {
    /// Rows of equal content so far.
    occurrences: HashMap<UnitKey, u32>,
    text: Vec<u8>,
    content: Vec<u8>,
}

/// Typed rows with the time of each.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// The rows.
    pub batch: TypedBatch,
    /// Value of the time column of each row, milliseconds since 1970 UTC; none where there is no value or column.
    pub times_ms: Vec<Option<i64>>,
}

impl<'a> View<'a> {
    /// Maps a contract's columns to a schema, which may be its own or one shared by several domains.
    ///
    /// # Errors
    /// [`SourceError::MissingTarget`] if the contract doesn't declare the schema's target,
    /// [`SourceError::FeatureMismatch`] if it declares a feature as another kind.
    pub fn new(
        source: &'a dyn Source,
        contract: &'a Contract,
        schema: &FeatureSchema,
        key: DomainKey,
    ) -> Result<Self, SourceError> {
        let view = Self::unlabelled(source, contract, schema, key)?;
        match view.label {
            Some(_) => Ok(view),
            None => Err(SourceError::MissingTarget { target: schema.target().id.to_string() }),
        }
    }

    /// As [`View::new`] for rows to predict: without a target column every label is none.
    ///
    /// # Errors
    /// [`SourceError::FeatureMismatch`] if the contract declares a feature as another kind.
    pub fn unlabelled(
        source: &'a dyn Source,
        contract: &'a Contract,
        schema: &FeatureSchema,
        key: DomainKey,
    ) -> Result<Self, SourceError> {
        let position = |role: Role, id: &str| {
            contract.columns.iter().position(|c| c.role == role && c.feature.as_str() == id)
        };
        let target = schema.target();
        let mut features = Vec::with_capacity(schema.features().len());
        for feature in schema.features() {
            let Some(column) = position(Role::Feature, feature.id.as_str()) else {
                features.push(Mapped::Missing(feature.kind.clone()));
                continue;
            };
            let declared = contract.columns.get(column).and_then(|c: &Column| c.feature_type);
            let mapped = match (&feature.kind, declared) {
                (FeatureKind::Numeric(_), Some(FeatureType::Numeric)) => Mapped::Numeric { column },
                (FeatureKind::Categorical { levels }, Some(FeatureType::Categorical)) => {
                    let codes = levels.iter().zip(0..).map(|(level, code)| (level.clone(), code)).collect();
                    Mapped::Categorical { column, levels: codes }
                }
                (kind, declared) => {
                    return Err(SourceError::FeatureMismatch {
                        feature: feature.id.to_string(),
                        expected: match kind {
                            FeatureKind::Numeric(_) => FeatureType::Numeric.as_str(),
                            FeatureKind::Categorical { .. } => FeatureType::Categorical.as_str(),
                        },
                        found: declared.map_or("neither numeric nor categorical", FeatureType::as_str),
                    });
                }
            };
            features.push(mapped);
        }
        let row_id = contract.columns.iter().position(|c| c.role == Role::Id);
        let unit = match &contract.privacy.unit {
            PrivacyUnit::Entity { column, .. } => {
                contract.columns.iter().position(|c| c.name == *column).map_or(
                    // A contract cut down to the columns of rows to predict may lack it.
                    UnitColumn::RowContent,
                    UnitColumn::Entity,
                )
            }
            PrivacyUnit::Row => row_id.map_or(UnitColumn::RowContent, UnitColumn::RowId),
        };
        Ok(Self {
            source,
            contract,
            ids: schema.features().iter().map(|feature| feature.id.to_string()).collect(),
            features,
            label: position(Role::Target, target.id.as_str()),
            classes: target.classes.iter().zip(0..).map(|(class, code)| (class.clone(), code)).collect(),
            unit,
            time: contract.columns.iter().position(|c| c.role == Role::Time),
            key,
        })
    }

    /// All rows in file order, batch by batch.
    ///
    /// # Errors
    /// See [`Source::batches`].
    pub fn rows(&self) -> Result<RowStream<'_>, SourceError> {
        Ok(RowStream {
            batches: self.source.batches(self.contract)?,
            view: self,
            filter: None,
            namer: Namer::default(),
        })
    }

    /// Rows in file order, at most `k` of each privacy unit, where `k` is the contract's. Where units are named by a
    /// column, that column is read once or twice before.
    ///
    /// # Errors
    /// See [`Source::batches`]; the first pass's errors come here, the last one's in the stream.
    pub fn capped_rows(&self) -> Result<RowStream<'_>, SourceError> {
        let filter = self.cap()?;
        let mut rows = self.rows()?;
        rows.filter = filter;
        Ok(rows)
    }

    /// Rows of each value of a column as text, at most `k` of each privacy unit; a cell without a value counts nowhere.
    ///
    /// # Errors
    /// See [`Source::batches`]; [`SourceError::MissingColumn`] for one that the contract doesn't declare.
    pub fn level_counts(&self, column: &str) -> Result<BTreeMap<String, i64>, SourceError> {
        let at = self.contract.columns.iter().position(|declared| declared.name == column);
        let at = at.ok_or_else(|| SourceError::MissingColumn {
            file: self.source.location().to_owned(),
            column: column.to_owned(),
            found: self.contract.columns.iter().map(|declared| declared.name.clone()).collect(),
        })?;
        let mut filter = self.cap()?;
        let (mut namer, mut counts) = (Namer::default(), BTreeMap::new());
        for raw in self.source.batches(self.contract)? {
            let raw = raw?;
            let units = self.units(&raw, &mut namer);
            let kept = match &mut filter {
                Some(filter) => units.kept(filter),
                None => (0..raw.rows()).collect(),
            };
            for row in kept {
                let cell = raw.columns().get(at).map_or(Cell::Null, |values| values.cell(row));
                let text = match cell {
                    Cell::Null | Cell::Unreadable => continue,
                    Cell::Text(text) => text.to_owned(),
                    other => level_text(other),
                };
                *counts.entry(text).or_insert(0) += 1;
            }
        }
        Ok(counts)
    }

    /// What keeps units from having more than `k` rows; none where each row is a unit of its own.
    pub(super) fn cap(&self) -> Result<Option<UnitFilter>, SourceError> {
        let column = match self.unit {
            UnitColumn::Entity(column) | UnitColumn::RowId(column) => column,
            UnitColumn::RowContent => return Ok(None),
        };
        let mut narrow = self.contract.clone();
        narrow.columns = narrow.columns.into_iter().skip(column).take(1).collect();
        let mut cap = UnitCap::new(self.key.clone(), self.contract.privacy.unit.max_rows());
        let mut text = Vec::new();
        let mut names = |raw: &RawBatch| -> Vec<UnitKey> {
            let name = |row| self.unit_named(raw.columns().first()?.cell(row), &mut text);
            (0..raw.rows()).filter_map(name).collect()
        };
        for raw in self.source.batches(&narrow)? {
            cap.observe(&names(&raw?));
        }
        if cap.undecided() {
            for raw in self.source.batches(&narrow)? {
                cap.observe_again(&names(&raw?));
            }
        }
        Ok(Some(cap.finish()))
    }

    /// The whole capped table, for those that need it in memory.
    ///
    /// # Errors
    /// The first error of either pass.
    pub fn load(&self) -> Result<Rows, SourceError> {
        let mut all: Option<Rows> = None;
        for rows in self.capped_rows()? {
            let rows = rows?;
            match &mut all {
                None => all = Some(rows),
                Some(all) => {
                    all.batch.append(&rows.batch);
                    all.times_ms.extend_from_slice(&rows.times_ms);
                }
            }
        }
        Ok(all.unwrap_or_else(|| self.typed(&RawBatch::new(Vec::new(), 0), Vec::new())))
    }

    fn typed(&self, raw: &RawBatch, units: Vec<UnitKey>) -> Rows {
        let columns = (0..self.features.len()).map(|feature| self.column(feature, raw)).collect();
        let time = |row| match raw.columns().get(self.time?).map(|column| column.cell(row)) {
            Some(Cell::TimeMs(at)) => Some(at),
            _ => None,
        };
        let times_ms = (0..raw.rows()).map(time).collect();
        Rows { batch: TypedBatch { columns, labels: self.labels(raw), units }, times_ms }
    }

    /// Values of one of the schema's features.
    pub(super) fn column(&self, feature: usize, raw: &RawBatch) -> TypedColumn {
        let rows = raw.rows();
        match self.features.get(feature) {
            Some(Mapped::Missing(kind)) => TypedColumn::missing(kind, rows),
            Some(Mapped::Numeric { column }) => TypedColumn::Numeric(
                raw.columns().get(*column).map_or_else(|| vec![f64::NAN; rows], |c| c.as_numbers(rows)),
            ),
            Some(Mapped::Categorical { column, levels }) => {
                let missing = || vec![missing_code(levels.len()); rows];
                let codes = |column: &RawColumn| column.map(rows, |cell| code(cell, levels));
                TypedColumn::Categorical(raw.columns().get(*column).map_or_else(missing, codes))
            }
            None => TypedColumn::Numeric(vec![f64::NAN; rows]),
        }
    }

    /// The class of each row.
    pub(super) fn labels(&self, raw: &RawBatch) -> Vec<Option<u16>> {
        let class = |cell: Cell<'_>| match cell {
            Cell::Null | Cell::Unreadable => None,
            Cell::Text(text) => self.classes.get(text).copied(),
            other => self.classes.get(&level_text(other)).copied(),
        };
        match self.label.and_then(|label| raw.columns().get(label)) {
            Some(column) => column.map(raw.rows(), class),
            None => vec![None; raw.rows()],
        }
    }

    /// The unit of each row. A namer serves one pass.
    pub(super) fn units(&self, raw: &RawBatch, namer: &mut Namer) -> Units {
        let mut units = Units { keys: Vec::with_capacity(raw.rows()), alone: Vec::with_capacity(raw.rows()) };
        for row in 0..raw.rows() {
            let named = match self.unit {
                UnitColumn::Entity(column) | UnitColumn::RowId(column) => {
                    let cell = raw.columns().get(column).map_or(Cell::Null, |c| c.cell(row));
                    self.unit_named(cell, &mut namer.text)
                }
                UnitColumn::RowContent => None,
            };
            units.alone.push(named.is_none());
            units.keys.push(named.unwrap_or_else(|| self.row_content(raw, row, namer)));
        }
        units
    }

    /// The unit that a value of the unit's column names; none if the row is named by its content instead.
    pub(super) fn unit_named(&self, cell: Cell<'_>, text: &mut Vec<u8>) -> Option<UnitKey> {
        let named = !matches!(cell, Cell::Null | Cell::Unreadable);
        text.clear();
        push_text(cell, text);
        match self.unit {
            UnitColumn::Entity(_) if named => Some(self.key.derive("tabmesh entity v1", &[text])),
            // Rows without an entity may all be one person's: they share one unit and its cap.
            UnitColumn::Entity(_) => Some(self.key.derive("tabmesh no entity v1", &[])),
            UnitColumn::RowId(_) if named => Some(self.key.derive("tabmesh row id v1", &[text])),
            UnitColumn::RowId(_) | UnitColumn::RowContent => None,
        }
    }

    /// A row without an id is named by its own content and by how many equal rows came before. A row number would
    /// do worse: removing one row would rename all rows after it, and with them the keyed choices made by name.
    fn row_content(&self, raw: &RawBatch, row: usize, namer: &mut Namer) -> UnitKey {
        let Namer { occurrences, text, content } = namer;
        content.clear();
        for column in raw.columns() {
            let cell = column.cell(row);
            let kind = match cell {
                Cell::Null => 0u8,
                Cell::Unreadable => 1,
                _ => 2,
            };
            text.clear();
            push_text(cell, text);
            content.push(kind);
            content.extend_from_slice(&(text.len() as u64).to_be_bytes());
            content.extend_from_slice(text);
        }
        let name = self.key.derive("tabmesh row v1", &[content]);
        let count = occurrences.entry(name).or_insert(0);
        let unit = self.key.derive("tabmesh equal row v1", &[&name, &count.to_be_bytes()]);
        *count = count.saturating_add(1);
        unit
    }
}

/// A pass over a view.
pub struct RowStream<'v> {
    batches: Batches<'v>,
    view: &'v View<'v>,
    filter: Option<UnitFilter>,
    namer: Namer,
}

impl Iterator for RowStream<'_> {
    type Item = Result<Rows, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        let raw = match self.batches.next()? {
            Ok(raw) => raw,
            Err(error) => return Some(Err(error)),
        };
        let units = self.view.units(&raw, &mut self.namer);
        let kept = self.filter.as_mut().map(|filter| units.kept(filter));
        let rows = self.view.typed(&raw, units.keys);
        Some(Ok(match kept {
            None => rows,
            Some(kept) if kept.len() == rows.times_ms.len() => rows,
            Some(kept) => Rows {
                batch: rows.batch.take(&kept),
                times_ms: kept.iter().filter_map(|&i| rows.times_ms.get(i).copied()).collect(),
            },
        }))
    }
}

impl Units {
    /// Rows that the cap lets through, for the next batch of the pass.
    pub(super) fn kept(&self, filter: &mut UnitFilter) -> Vec<usize> {
        filter.keep_or_pass(&self.keys, &self.alone)
    }
}

/// Appends what [`level_text`] makes of a cell.
fn push_text(cell: Cell<'_>, text: &mut Vec<u8>) {
    let written = match cell {
        Cell::Null | Cell::Unreadable => Ok(()),
        Cell::Number(value) => write!(text, "{value}"),
        Cell::Integer(value) | Cell::TimeMs(value) => write!(text, "{value}"),
        Cell::Bool(value) => write!(text, "{value}"),
        Cell::Text(value) => text.write_all(value.as_bytes()),
    };
    debug_assert!(written.is_ok(), "writing to memory doesn't fail");
}

/// A cell as a level code of a feature.
fn code(cell: Cell<'_>, levels: &BTreeMap<String, u32>) -> u32 {
    let known = match cell {
        Cell::Null | Cell::Unreadable => return missing_code(levels.len()),
        Cell::Text(text) => levels.get(text),
        other => levels.get(&level_text(other)),
    };
    known.copied().unwrap_or_else(|| other_code(levels.len()))
}
