//! A table in the terms of a federation: typed columns in canonical order, class labels, privacy units.
//!
//! Owns the mapping from a contract's columns to a [`FeatureSchema`] that many domains share. A feature the
//! domain lacks is a column of missing values. Conversion never fails on a value: what doesn't parse is missing,
//! a level outside the schema's is "other", so a bad cell can't make this domain answer differently from others.
//! Clamping to declared ranges is left to those who need it.

use std::collections::{BTreeMap, HashMap};

use tabmesh_contract::batch::{TypedBatch, TypedColumn, UnitKey, missing_code, other_code};
use tabmesh_contract::contract::{Column, Contract, FeatureType, Role};
use tabmesh_contract::profile::{Cell, level_text};
use tabmesh_contract::schema::{FeatureKind, FeatureSchema, PrivacyUnit};

use super::units::{DomainKey, UnitCap, UnitFilter};
use super::{Batches, RawBatch, Source, SourceError};

/// A source seen through a schema.
pub struct View<'a> {
    source: &'a dyn Source,
    contract: &'a Contract,
    features: Vec<Mapped>,
    label: Option<usize>,
    classes: BTreeMap<String, u16>,
    unit: UnitColumn,
    time: Option<usize>,
    key: DomainKey,
}

/// Where a feature's values come from.
enum Mapped {
    Missing(FeatureKind),
    Numeric { column: usize },
    Categorical { column: usize, levels: BTreeMap<String, u32> },
}

/// Which column names a row's privacy unit.
#[derive(Clone, Copy)]
enum UnitColumn {
    Entity(usize),
    RowId(usize),
    RowContent,
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
            occurrences: HashMap::new(),
        })
    }

    /// Rows in file order, at most `k` of each privacy unit, where `k` is the contract's. Reads the table twice.
    ///
    /// # Errors
    /// See [`Source::batches`]; the first pass's errors come here, the second's in the stream.
    pub fn capped_rows(&self) -> Result<RowStream<'_>, SourceError> {
        let mut cap = UnitCap::new(self.key.clone(), self.contract.privacy.unit.max_rows());
        let mut occurrences = HashMap::new();
        for raw in self.source.batches(self.contract)? {
            cap.observe(&self.units(&raw?, &mut occurrences));
        }
        let mut rows = self.rows()?;
        rows.filter = Some(cap.finish());
        Ok(rows)
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
        let cell = |column: usize, row: usize| raw.columns().get(column).map_or(Cell::Null, |c| c.cell(row));
        let rows = 0..raw.rows();
        let columns = self
            .features
            .iter()
            .map(|mapped| match mapped {
                Mapped::Missing(kind) => TypedColumn::missing(kind, raw.rows()),
                Mapped::Numeric { column } => {
                    TypedColumn::Numeric(rows.clone().map(|row| number(cell(*column, row))).collect())
                }
                Mapped::Categorical { column, levels } => TypedColumn::Categorical(
                    rows.clone().map(|row| code(cell(*column, row), levels)).collect(),
                ),
            })
            .collect();
        let labels = rows
            .clone()
            .map(|row| match self.label.map_or(Cell::Null, |label| cell(label, row)) {
                Cell::Null | Cell::Unreadable => None,
                Cell::Text(text) => self.classes.get(text).copied(),
                other => self.classes.get(&level_text(other)).copied(),
            })
            .collect();
        let time = |row| match cell(self.time?, row) {
            Cell::TimeMs(at) => Some(at),
            _ => None,
        };
        Rows { batch: TypedBatch { columns, labels, units }, times_ms: rows.map(time).collect() }
    }

    /// The unit key of each row. `occurrences` counts equal rows over one pass.
    fn units(&self, raw: &RawBatch, occurrences: &mut HashMap<UnitKey, u32>) -> Vec<UnitKey> {
        (0..raw.rows()).map(|row| self.unit_of(raw, row, occurrences)).collect()
    }

    fn unit_of(&self, raw: &RawBatch, row: usize, occurrences: &mut HashMap<UnitKey, u32>) -> UnitKey {
        let named = |column: usize| match raw.columns().get(column).map_or(Cell::Null, |c| c.cell(row)) {
            Cell::Null | Cell::Unreadable => None,
            cell => Some(level_text(cell)),
        };
        match self.unit {
            UnitColumn::Entity(column) => match named(column) {
                Some(id) => self.key.derive("tabmesh entity v1", &[id.as_bytes()]),
                // Rows without an entity may all be one person's: they share one unit and its cap.
                None => self.key.derive("tabmesh no entity v1", &[]),
            },
            UnitColumn::RowId(column) => match named(column) {
                Some(id) => self.key.derive("tabmesh row id v1", &[id.as_bytes()]),
                None => self.row_content(raw, row, occurrences),
            },
            UnitColumn::RowContent => self.row_content(raw, row, occurrences),
        }
    }

    /// A row without an id is named by its own content and by how many equal rows came before. A row number would
    /// do worse: removing one row would rename all rows after it, and with them the keyed choices made by name.
    fn row_content(&self, raw: &RawBatch, row: usize, occurrences: &mut HashMap<UnitKey, u32>) -> UnitKey {
        let mut content = Vec::new();
        for column in raw.columns() {
            let cell = column.cell(row);
            let kind = match cell {
                Cell::Null => 0u8,
                Cell::Unreadable => 1,
                _ => 2,
            };
            let text = level_text(cell);
            content.push(kind);
            content.extend_from_slice(&(text.len() as u64).to_be_bytes());
            content.extend_from_slice(text.as_bytes());
        }
        let name = self.key.derive("tabmesh row v1", &[&content]);
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
    occurrences: HashMap<UnitKey, u32>,
}

impl Iterator for RowStream<'_> {
    type Item = Result<Rows, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        let raw = match self.batches.next()? {
            Ok(raw) => raw,
            Err(error) => return Some(Err(error)),
        };
        let units = self.view.units(&raw, &mut self.occurrences);
        let kept = self.filter.as_mut().map(|filter| filter.keep(&units));
        let rows = self.view.typed(&raw, units);
        Some(Ok(match kept {
            None => rows,
            Some(kept) => Rows {
                batch: rows.batch.take(&kept),
                times_ms: kept.iter().filter_map(|&i| rows.times_ms.get(i).copied()).collect(),
            },
        }))
    }
}

/// A cell as a number; `NaN` where there is none.
#[allow(clippy::cast_precision_loss, reason = "a model reads numbers as floats anyway")]
fn number(cell: Cell<'_>) -> f64 {
    match cell {
        Cell::Number(value) if value.is_finite() => value,
        Cell::Integer(value) => value as f64,
        Cell::Bool(value) => f64::from(u8::from(value)),
        _ => f64::NAN,
    }
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
