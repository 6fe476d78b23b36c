//! Counts over a table: what a source is asked, what it must know to answer, and the answer by streaming.
//!
//! Which rows count is the agent's business alone: at most k of each unit, chosen by keyed hash, and none of the gate's.
//! [`View::marginals`] is the only way to counts; it asks the source, whose default is [`MarginalRequest::stream`]:
//! batches are read ahead on one thread, named and coded on the caller's, counted on others.

use std::collections::BTreeMap;
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, PoisonError};
use std::thread;

use tabmesh_contract::batch::TypedColumn;
use tabmesh_contract::contract::{Column, Contract};
use tabmesh_contract::profile::Cell;
use tabmesh_privacy::release::{ColumnRef, CountError, Counter, ReleaseQuery, Resources};
use thiserror::Error;

use super::view::{Mapped, Namer, UnitColumn, View};
use super::{Batches, RawBatch, SourceError};
use crate::gate::Gate;

/// Why a table isn't counted. Stays in the domain.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum MarginalError {
    /// The table can't be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The query is refused, or takes too much memory.
    #[error(transparent)]
    Count(#[from] CountError),
    /// The query counts a feature that the schema doesn't have.
    #[error("the query counts {feature}, which the announced schema does not have")]
    UnknownFeature {
        /// Its canonical id.
        feature: String,
    },
    /// An engine's answer can't be counts of the query.
    #[error("{location} answered with counts that can't be the query's: {reason}")]
    Answer {
        /// The source.
        location: String,
        /// What is wrong with them, without a count.
        reason: &'static str,
    },
}

/// What is to be counted over a table, and by which rules rows count.
pub struct MarginalRequest<'r> {
    view: &'r View<'r>,
    query: &'r ReleaseQuery,
    gate: &'r Gate,
    resources: Resources,
    /// The schema's feature of each attribute; none for the label.
    features: Vec<Option<usize>>,
}

/// Where an attribute's values come from and how they become a fine cell.
///
/// Fine cells are numbered as the query's binning says; merging follows.
#[derive(Debug, Clone, Copy)]
pub enum Origin<'r> {
    /// The class: rows without a declared one count in no marginal.
    Label {
        /// The column.
        column: &'r Column,
        /// Class of each text. Numbers, true and false are compared in their shortest text.
        classes: &'r BTreeMap<String, u16>,
    },
    /// A feature that this table lacks: every row is in its last fine cell, missing.
    Missing,
    /// A number: bin i holds `edges[i - 1] <= value < edges[i]`. Null, `NaN`, infinities and what can't be read are
    /// missing, the last fine cell.
    Numeric {
        /// The column.
        column: &'r Column,
    },
    /// A level: others than these are the last fine cell but one, null and what can't be read the last.
    Levels {
        /// The column.
        column: &'r Column,
        /// Fine cell of each text. Numbers, true and false are compared in their shortest text.
        levels: &'r BTreeMap<String, u32>,
    },
}

/// How to know which rows count.
pub enum Admission<'r> {
    /// By the unit that a column names.
    Named(NamedUnits<'r>),
    /// By the content of all columns, as the agent reads them: no engine can tell, the table has to be streamed.
    Streamed,
}

/// Units that are named by a column.
pub struct NamedUnits<'r> {
    view: &'r View<'r>,
    gate: &'r Gate,
    column: &'r Column,
}

impl NamedUnits<'_> {
    /// The column. Rows of one value are one unit.
    #[must_use]
    pub fn column(&self) -> &Column {
        self.column
    }

    /// Rows of one unit that may count at most. Of a unit with more, the agent alone knows which.
    #[must_use]
    pub fn max_rows(&self) -> u32 {
        self.view.contract.privacy.unit.max_rows()
    }

    /// Whether the rows of a unit count; none if this value doesn't name one, and the table has to be streamed.
    ///
    /// The answer is as secret as a row: it must not outlive the session that counts.
    #[must_use]
    pub fn admits(&self, value: Cell<'_>) -> Option<bool> {
        let unit = self.view.unit_named(value, &mut Vec::new())?;
        Some(!self.gate.holds(&unit))
    }
}

impl<'r> MarginalRequest<'r> {
    /// The query.
    #[must_use]
    pub fn query(&self) -> &'r ReleaseQuery {
        self.query
    }

    /// The contract that the table is read under.
    #[must_use]
    pub fn contract(&self) -> &'r Contract {
        self.view.contract
    }

    /// Where the values of one of the query's attributes come from; none beyond their number.
    #[must_use]
    pub fn origin(&self, attribute: usize) -> Option<Origin<'r>> {
        let column = |at: usize| self.view.contract.columns.get(at);
        let Some(feature) = self.features.get(attribute)? else {
            let label = self.view.label.and_then(column);
            return label.map(|column| Origin::Label { column, classes: &self.view.classes });
        };
        match self.view.features.get(*feature)? {
            Mapped::Missing(_) => Some(Origin::Missing),
            Mapped::Numeric { column: at } => column(*at).map(|column| Origin::Numeric { column }),
            Mapped::Categorical { column: at, levels } => {
                column(*at).map(|column| Origin::Levels { column, levels })
            }
        }
    }

    /// How to know which rows count.
    #[must_use]
    pub fn admission(&self) -> Admission<'r> {
        let column = match self.view.unit {
            UnitColumn::Entity(at) | UnitColumn::RowId(at) => self.view.contract.columns.get(at),
            UnitColumn::RowContent => None,
        };
        column.map_or(Admission::Streamed, |column| {
            Admission::Named(NamedUnits { view: self.view, gate: self.gate, column })
        })
    }

    /// Counts by reading the table through, in memory that the query bounds. Only the cap needs memory for units, see
    /// [`UnitCap`](super::UnitCap); and a table whose rows have no id is remembered by a hash for each distinct row.
    ///
    /// # Errors
    /// [`MarginalError`]. Memory is checked before the table is opened.
    pub fn stream(&self) -> Result<Vec<i64>, MarginalError> {
        let view = self.view;
        let mut counter = Counter::with(self.query, self.resources)?;
        let mut filter = view.cap()?;
        let mut namer = Namer::default();
        let batches = view.source.batches(view.contract)?;
        let ahead = if self.resources.threads > 1 { BATCHES_AHEAD } else { 0 };
        read_ahead(batches, ahead, |raw| {
            let units = view.units(&raw, &mut namer);
            let mut rows = match &mut filter {
                Some(filter) => units.kept(filter),
                None => (0..raw.rows()).collect(),
            };
            rows.retain(|row| units.keys.get(*row).is_some_and(|unit| !self.gate.holds(unit)));
            let columns: Vec<TypedColumn> =
                self.features.iter().flatten().map(|feature| view.column(*feature, &raw)).collect();
            let columns: Vec<ColumnRef<'_>> = columns.iter().map(column_ref).collect();
            Ok(counter.add_chosen(&columns, &view.labels(&raw), rows)?)
        })?;
        Ok(counter.finish())
    }
}

impl View<'_> {
    /// Counts a query's cells over the training rows: at most k of each unit, none of the gate's.
    ///
    /// The source is asked; see [`Source::marginals`](super::Source::marginals).
    ///
    /// # Errors
    /// [`MarginalError`]; nothing was counted then.
    pub fn marginals(
        &self,
        query: &ReleaseQuery,
        gate: &Gate,
        resources: Resources,
    ) -> Result<Vec<i64>, MarginalError> {
        query.check().map_err(CountError::from)?;
        let mut features = Vec::with_capacity(query.attributes.len());
        for attribute in &query.attributes {
            let found = self.ids.iter().position(|id| *id == attribute.id);
            if found.is_none() && !attribute.is_label() {
                return Err(MarginalError::UnknownFeature { feature: attribute.id.clone() });
            }
            features.push(found.filter(|_| !attribute.is_label()));
        }
        let request = MarginalRequest { view: self, query, gate, resources, features };
        let counts = self.source.marginals(&request)?;
        let refused = |reason| {
            let location = self.source.location().display().to_string();
            Err(MarginalError::Answer { location, reason })
        };
        if counts.len() != query.cells_total() {
            return refused("their number differs from the query's cells");
        }
        if counts.iter().any(|count| *count < 0) {
            return refused("some are negative");
        }
        let mut rest = counts.as_slice();
        let mut totals = Vec::with_capacity(query.marginals.len());
        for marginal in &query.marginals {
            let cells: usize = query.dims(marginal).iter().product();
            let (own, later) = rest.split_at(cells.min(rest.len()));
            totals.push(own.iter().map(|count| i128::from(*count)).sum::<i128>());
            rest = later;
        }
        if totals.windows(2).any(|pair| pair.first() != pair.last()) {
            return refused("marginals differ in their totals");
        }
        Ok(counts)
    }
}

/// What counting may use on this machine.
#[must_use]
pub fn resources() -> Resources {
    Resources { threads: thread::available_parallelism().map_or(1, usize::from), ..Resources::default() }
}

/// Hands every batch to `visit`, reading up to `ahead` batches on another thread meanwhile. A short table needs none.
fn read_ahead(
    mut batches: Batches<'_>,
    ahead: usize,
    mut visit: impl FnMut(RawBatch) -> Result<(), MarginalError>,
) -> Result<(), MarginalError> {
    let alone = if ahead == 0 { usize::MAX } else { BATCHES_ALONE };
    for _ in 0..alone {
        let Some(raw) = batches.next() else { return Ok(()) };
        visit(raw?)?;
    }
    // The stream lies outside the thread, so that it isn't lost with one that can't start.
    let stream = Mutex::new(Some(batches));
    let take = || stream.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (sender, receiver) = sync_channel(ahead);
    thread::scope(|scope| {
        let read = || {
            let sender = sender;
            // Sending fails when the visitor has given up.
            take().into_iter().flatten().try_for_each(|raw| sender.send(raw))
        };
        match thread::Builder::new().name("reading".to_owned()).spawn_scoped(scope, read) {
            Ok(_) => receiver.into_iter().try_for_each(|raw| visit(raw?)),
            Err(_) => take().into_iter().flatten().try_for_each(|raw| visit(raw?)),
        }
    })
}

fn column_ref(column: &TypedColumn) -> ColumnRef<'_> {
    match column {
        TypedColumn::Numeric(values) => ColumnRef::Numeric(values),
        TypedColumn::Categorical(codes) => ColumnRef::Codes(codes),
    }
}

/// Batches read ahead at most.
const BATCHES_AHEAD: usize = 2;
/// Batches read before another thread is started.
const BATCHES_ALONE: usize = 4;

#[cfg(test)]
mod tests;
