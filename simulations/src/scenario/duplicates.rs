//! How many test rows and entities stand among training rows: what would inflate every figure, measured before any.
//!
//! Two rows are the same if all their features are, as the contract reads them: levels that it doesn't declare are one.

use std::collections::{BTreeSet, HashSet};

use anyhow::Result;
use tabmesh_contract::batch::{TypedBatch, TypedColumn, UnitKey};
use tabmesh_contract::schema::{FeatureSchema, PrivacyUnit};

use super::figures::Where;
use super::results::Row;
use crate::utility::measure::union;
use crate::utility::member::Member;

/// Shares of test rows by domain, and over all of them.
///
/// # Errors
/// A table can't be read, or domains disagree about a feature.
pub(crate) fn measure(members: &[Member], place: &Where<'_>) -> Result<Vec<Row>> {
    let tables = members.iter().map(Member::tables).collect::<Result<Vec<_>>>()?;
    let schema = union(&tables)?;
    let onto = |rows: &TypedBatch, own: &FeatureSchema| tabmesh_agent::train::onto(rows, own, &schema);
    let train: Vec<Cells> = tables.iter().map(|t| Cells::of(&onto(&t.train, &t.schema))).collect();
    let anywhere: HashSet<&[u64]> =
        train.iter().flat_map(|cells| cells.rows.iter().map(Vec::as_slice)).collect();
    let units: BTreeSet<UnitKey> = tables.iter().flat_map(|t| t.train.units.iter().copied()).collect();
    let mut rows = Vec::new();
    let mut sums = Counts::default();
    for ((member, tables), own) in members.iter().zip(&tables).zip(&train) {
        let test = Cells::of(&onto(&tables.test, &tables.schema));
        let positives = tables.labels.iter().filter(|label| **label == 1).count();
        let mut counts = Counts { positives, ..counted(&test, own, &anywhere) };
        // Rows of a domain without entities are units by their position; they can't be told again elsewhere.
        if member.parsed()?.privacy.unit != PrivacyUnit::Row {
            let entities: BTreeSet<UnitKey> = tables.test.units.iter().copied().collect();
            counts.entities = entities.len();
            counts.entities_both = entities.intersection(&units).count();
        }
        rows.extend(counts.rows(place, &member.domain));
        sums.add(&counts);
    }
    rows.extend(sums.rows(place, "*"));
    Ok(rows)
}

/// How many test rows of a domain stand among its training rows, alone and with their label, and among all.
fn counted(test: &Cells, own: &Cells, anywhere: &HashSet<&[u64]>) -> Counts {
    let here: HashSet<&[u64]> = own.rows.iter().map(Vec::as_slice).collect();
    let labelled: HashSet<(&[u64], Option<u16>)> =
        own.rows.iter().map(Vec::as_slice).zip(own.labels.iter().copied()).collect();
    let mut counts = Counts { rows: test.rows.len(), ..Counts::default() };
    for (cells, label) in test.rows.iter().zip(&test.labels) {
        counts.own += usize::from(here.contains(cells.as_slice()));
        counts.own_label += usize::from(labelled.contains(&(cells.as_slice(), *label)));
        counts.anywhere += usize::from(anywhere.contains(cells.as_slice()));
    }
    counts
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Counts {
    rows: usize,
    positives: usize,
    own: usize,
    own_label: usize,
    anywhere: usize,
    entities: usize,
    entities_both: usize,
}

impl Counts {
    fn add(&mut self, more: &Self) {
        self.rows += more.rows;
        self.positives += more.positives;
        self.own += more.own;
        self.own_label += more.own_label;
        self.anywhere += more.anywhere;
        self.entities += more.entities;
        self.entities_both += more.entities_both;
    }

    fn rows(&self, place: &Where<'_>, domain: &str) -> Vec<Row> {
        let share = |part: usize, of: usize| (of > 0).then(|| part as f64 / of as f64);
        [
            (TEST_ROWS, Some(self.rows as f64)),
            (TEST_POSITIVES, Some(self.positives as f64)),
            ("among_own_training_rows", share(self.own, self.rows)),
            ("among_own_training_rows_with_its_label", share(self.own_label, self.rows)),
            ("among_all_training_rows", share(self.anywhere, self.rows)),
            ("entities_in_training_too", share(self.entities_both, self.entities)),
        ]
        .into_iter()
        .filter_map(|(metric, value)| place.row(METHOD, domain, true, metric, value))
        .collect()
    }
}

/// Feature cells of rows as numbers, and their labels.
struct Cells {
    rows: Vec<Vec<u64>>,
    labels: Vec<Option<u16>>,
}

impl Cells {
    fn of(batch: &TypedBatch) -> Self {
        let cell = |column: &TypedColumn, row: usize| match column {
            TypedColumn::Numeric(values) => values.get(row).map_or(u64::MAX, |value| value.to_bits()),
            TypedColumn::Categorical(codes) => codes.get(row).map_or(u64::MAX, |code| u64::from(*code)),
        };
        let rows =
            (0..batch.rows()).map(|row| batch.columns.iter().map(|column| cell(column, row)).collect());
        Self { rows: rows.collect(), labels: batch.labels.clone() }
    }
}

/// Name of a domain's number of test rows.
pub(crate) const TEST_ROWS: &str = "test_rows";
/// Name of its number of test rows of class 1.
pub(crate) const TEST_POSITIVES: &str = "test_positives";
/// Method name of these figures.
pub(crate) const METHOD: &str = "test_rows";

#[cfg(test)]
mod tests {
    use super::super::results::Noise;
    use super::*;

    /// Rows of two numbers with a label each.
    fn cells(rows: &[(f64, f64, u16)]) -> Cells {
        let bits = |row: &(f64, f64, u16)| vec![row.0.to_bits(), row.1.to_bits()];
        Cells { rows: rows.iter().map(bits).collect(), labels: rows.iter().map(|row| Some(row.2)).collect() }
    }

    #[test]
    fn rows_are_found_here_with_their_label_and_elsewhere() {
        let own = cells(&[(1.0, 2.0, 0), (1.0, 2.0, 0), (3.0, 4.0, 1)]);
        let other = cells(&[(5.0, 6.0, 0), (3.0, 4.0, 0)]);
        let anywhere: HashSet<&[u64]> =
            [&own, &other].into_iter().flat_map(|cells| cells.rows.iter().map(Vec::as_slice)).collect();
        // In own rows with its label, with the other label, in another domain alone, nowhere.
        let test = cells(&[(1.0, 2.0, 0), (3.0, 4.0, 0), (5.0, 6.0, 0), (1.0, 4.0, 0)]);
        let found = counted(&test, &own, &anywhere);
        let expected = Counts { rows: 4, own: 2, own_label: 1, anywhere: 3, ..Counts::default() };
        assert_eq!(found, expected);
    }

    #[test]
    fn sums_of_domains_have_shares_of_their_own() {
        let place = Where { set: "s", seed: 0, arm: "a", round: None, noise: Noise::None };
        let mut sums = Counts { rows: 4, own: 1, entities: 2, entities_both: 1, ..Counts::default() };
        sums.add(&Counts { rows: 6, own: 2, anywhere: 5, positives: 3, ..Counts::default() });
        let rows = sums.rows(&place, "*");
        let value = |metric: &str| rows.iter().find(|row| row.metric == metric).map(|row| row.value);
        assert_eq!(value("among_own_training_rows"), Some(0.3));
        assert_eq!(value("among_all_training_rows"), Some(0.5));
        assert_eq!(value("entities_in_training_too"), Some(0.5));
        assert_eq!(value(TEST_POSITIVES), Some(3.0));
        // A set without entities has no such share.
        assert!(
            !Counts { rows: 1, ..Counts::default() }
                .rows(&place, "*")
                .iter()
                .any(|r| r.metric.contains("entities"))
        );
    }
}
