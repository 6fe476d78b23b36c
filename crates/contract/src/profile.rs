//! A streaming profile of one table against its contract: counts, bounds, distinct values, levels.
//!
//! Everything here is computed from private rows and stays in the domain: the types have no serialised form, so
//! they can't become part of a message. Memory is bounded whatever the table holds. A profile informs the owner;
//! it never fills in a range, a category or a class of the contract.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::contract::{Column, Contract, LogicalType, Role};
use crate::schema::PrivacyUnit;

/// One value of a row, borrowed from the table engine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cell<'a> {
    /// No value.
    Null,
    /// A number; `NaN` counts as null.
    Number(f64),
    /// A whole number.
    Integer(i64),
    /// True or false.
    Bool(bool),
    /// Text.
    Text(&'a str),
    /// A point in time, milliseconds since 1970 UTC.
    TimeMs(i64),
    /// A value that doesn't have the declared type.
    Unreadable,
}

/// Profile of a table.
#[derive(Debug, Clone)]
pub struct TableProfile {
    columns: Vec<ColumnProfile>,
    required: Vec<bool>,
    time_column: Option<usize>,
    rows: u64,
    complete_rows: u64,
    newest_ms: Option<i64>,
}

impl TableProfile {
    /// A profile of no rows yet.
    #[must_use]
    pub fn new(contract: &Contract) -> Self {
        let counted: BTreeSet<&str> = contract
            .quality
            .iter()
            .filter(|rule| rule.counts_duplicates())
            .filter_map(|rule| rule.column.as_deref())
            .chain(match &contract.privacy.unit {
                PrivacyUnit::Entity { column, .. } => Some(column.as_str()),
                PrivacyUnit::Row => None,
            })
            .collect();
        let columns = contract.columns.iter();
        Self {
            columns: columns
                .clone()
                .map(|c| ColumnProfile::new(c, counted.contains(c.name.as_str())))
                .collect(),
            required: columns.map(|c| c.required).collect(),
            time_column: contract.columns.iter().position(|c| c.role == Role::Time),
            rows: 0,
            complete_rows: 0,
            newest_ms: None,
        }
    }

    /// Adds one row, cells in the contract's column order; cells that are not there count as null.
    pub fn push_row(&mut self, cells: &[Cell<'_>]) {
        self.rows += 1;
        let mut complete = true;
        for (index, (column, required)) in self.columns.iter_mut().zip(&self.required).enumerate() {
            let cell = match cells.get(index).copied().unwrap_or(Cell::Null) {
                Cell::Number(value) if value.is_nan() => Cell::Null,
                other => other,
            };
            column.push(cell);
            complete &= !(*required && matches!(cell, Cell::Null | Cell::Unreadable));
            if let (Cell::TimeMs(at), true) = (cell, self.time_column == Some(index)) {
                self.newest_ms = Some(self.newest_ms.map_or(at, |newest| newest.max(at)));
            }
        }
        self.complete_rows += u64::from(complete);
    }

    /// Rows seen.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Share of rows in which every required column has a value; none without rows.
    #[must_use]
    pub fn row_completeness(&self) -> Option<f64> {
        (self.rows > 0).then(|| ratio(self.complete_rows, self.rows))
    }

    /// Latest value of the time column, milliseconds since 1970 UTC.
    #[must_use]
    pub fn newest_ms(&self) -> Option<i64> {
        self.newest_ms
    }

    /// Profiles in the contract's column order.
    #[must_use]
    pub fn columns(&self) -> &[ColumnProfile] {
        &self.columns
    }

    /// The profile of a column.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<&ColumnProfile> {
        self.columns.iter().find(|c| c.name == name)
    }
}

/// Profile of one column.
#[derive(Debug, Clone)]
pub struct ColumnProfile {
    name: String,
    logical_type: LogicalType,
    range: Option<[f64; 2]>,
    categories: Option<BTreeSet<String>>,
    values: u64,
    nulls: u64,
    unreadable: u64,
    below: u64,
    above: u64,
    undeclared: u64,
    numbers: Numbers,
    distinct: DistinctCounter,
    levels: Levels,
}

#[derive(Debug, Clone, Copy, Default)]
struct Numbers {
    count: u64,
    min: f64,
    max: f64,
    mean: f64,
}

/// Exact number of distinct values, or a lower bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distinct {
    /// Exactly this many.
    Exactly(u64),
    /// More than this many: counting stopped.
    MoreThan(u64),
}

impl ColumnProfile {
    fn new(column: &Column, count_duplicates: bool) -> Self {
        let cap = if column.unique || count_duplicates { UNIQUE_CAP } else { DISTINCT_CAP };
        Self {
            name: column.name.clone(),
            logical_type: column.logical_type,
            range: column.range,
            categories: column.categories.as_ref().map(|levels| levels.iter().cloned().collect()),
            values: 0,
            nulls: 0,
            unreadable: 0,
            below: 0,
            above: 0,
            undeclared: 0,
            numbers: Numbers::default(),
            distinct: DistinctCounter { seen: HashSet::new(), cap, overflown: false },
            levels: Levels::default(),
        }
    }

    fn push(&mut self, cell: Cell<'_>) {
        match cell {
            Cell::Null => {
                self.nulls += 1;
                return;
            }
            Cell::Unreadable => {
                self.unreadable += 1;
                return;
            }
            _ => self.values += 1,
        }
        self.distinct.push(cell);
        match cell {
            Cell::Number(value) => self.push_number(value),
            #[allow(clippy::cast_precision_loss, reason = "bounds and mean are shown, not counted with")]
            Cell::Integer(value) => self.push_number(value as f64),
            Cell::TimeMs(_) | Cell::Bool(_) | Cell::Text(_) | Cell::Null | Cell::Unreadable => {}
        }
        if self.categories.is_some() || matches!(cell, Cell::Text(_) | Cell::Bool(_)) {
            self.push_level(&level_text(cell));
        }
    }

    fn push_number(&mut self, value: f64) {
        if let Some([lower, upper]) = self.range {
            self.below += u64::from(value < lower);
            self.above += u64::from(value > upper);
        }
        let n = &mut self.numbers;
        n.count += 1;
        if n.count == 1 {
            (n.min, n.max) = (value, value);
        }
        n.min = n.min.min(value);
        n.max = n.max.max(value);
        #[allow(clippy::cast_precision_loss, reason = "row counts stay far below 2^53")]
        let count = n.count as f64;
        n.mean += (value - n.mean) / count;
    }

    fn push_level(&mut self, level: &str) {
        if self.categories.as_ref().is_some_and(|declared| !declared.contains(level)) {
            self.undeclared += 1;
        }
        self.levels.push(level);
    }

    /// Column name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Declared type.
    #[must_use]
    pub fn logical_type(&self) -> LogicalType {
        self.logical_type
    }

    /// Rows with a readable value.
    #[must_use]
    pub fn values(&self) -> u64 {
        self.values
    }

    /// Rows without a value.
    #[must_use]
    pub fn nulls(&self) -> u64 {
        self.nulls
    }

    /// Rows whose value doesn't have the declared type.
    #[must_use]
    pub fn unreadable(&self) -> u64 {
        self.unreadable
    }

    /// Rows whose number is below, and above, the declared range.
    #[must_use]
    pub fn out_of_range(&self) -> (u64, u64) {
        (self.below, self.above)
    }

    /// Rows whose value is none of the declared categories.
    #[must_use]
    pub fn undeclared(&self) -> u64 {
        self.undeclared
    }

    /// Rows whose value breaks the declaration: unreadable, out of range or none of the categories.
    #[must_use]
    pub fn invalid(&self) -> u64 {
        self.unreadable + self.below + self.above + self.undeclared
    }

    /// Smallest number.
    #[must_use]
    pub fn min(&self) -> Option<f64> {
        (self.numbers.count > 0).then_some(self.numbers.min)
    }

    /// Largest number.
    #[must_use]
    pub fn max(&self) -> Option<f64> {
        (self.numbers.count > 0).then_some(self.numbers.max)
    }

    /// Mean of the numbers.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (self.numbers.count > 0).then_some(self.numbers.mean)
    }

    /// Distinct values, null not counted.
    #[must_use]
    pub fn distinct(&self) -> Distinct {
        let seen = self.distinct.seen.len() as u64;
        if self.distinct.overflown { Distinct::MoreThan(seen) } else { Distinct::Exactly(seen) }
    }

    /// Values that repeat an earlier one; none if there were too many distinct values to know.
    #[must_use]
    pub fn duplicates(&self) -> Option<u64> {
        match self.distinct() {
            Distinct::Exactly(distinct) => Some(self.values.saturating_sub(distinct)),
            Distinct::MoreThan(_) => None,
        }
    }

    /// Rows per level, levels in order; none if there were more than [`LEVEL_CAP`].
    #[must_use]
    pub fn levels(&self) -> Option<&BTreeMap<String, u64>> {
        (!self.levels.overflown).then_some(&self.levels.counts)
    }
}

#[derive(Debug, Clone)]
struct DistinctCounter {
    seen: HashSet<u64>,
    cap: usize,
    overflown: bool,
}

impl DistinctCounter {
    fn push(&mut self, cell: Cell<'_>) {
        if self.overflown {
            return;
        }
        let mut hasher = DefaultHasher::new();
        match cell {
            // Zero has two bit patterns and is one value.
            Cell::Number(value) => {
                (0u8, if value.abs() > 0.0 { value.to_bits() } else { 0 }).hash(&mut hasher)
            }
            Cell::Integer(value) | Cell::TimeMs(value) => (1u8, value).hash(&mut hasher),
            Cell::Bool(value) => (2u8, value).hash(&mut hasher),
            Cell::Text(value) => (3u8, value).hash(&mut hasher),
            Cell::Null | Cell::Unreadable => return,
        }
        let hash = hasher.finish();
        if self.seen.len() < self.cap {
            self.seen.insert(hash);
        } else if !self.seen.contains(&hash) {
            self.overflown = true;
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Levels {
    counts: BTreeMap<String, u64>,
    overflown: bool,
}

impl Levels {
    fn push(&mut self, level: &str) {
        if let Some(count) = self.counts.get_mut(level) {
            *count += 1;
        } else if self.counts.len() < LEVEL_CAP {
            self.counts.insert(level.to_owned(), 1);
        } else {
            self.overflown = true;
        }
    }
}

/// A cell's text form, as categories are written in a contract.
#[must_use]
pub fn level_text(cell: Cell<'_>) -> String {
    match cell {
        Cell::Null | Cell::Unreadable => String::new(),
        Cell::Number(value) => value.to_string(),
        Cell::Integer(value) | Cell::TimeMs(value) => value.to_string(),
        Cell::Bool(value) => value.to_string(),
        Cell::Text(value) => value.to_owned(),
    }
}

#[allow(clippy::cast_precision_loss, reason = "row counts stay far below 2^53")]
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

/// Most distinct values counted exactly in an ordinary column.
pub const DISTINCT_CAP: usize = 10_000;
/// Most distinct values counted exactly in a privacy unit or a column promised to be unique.
pub const UNIQUE_CAP: usize = 2_000_000;
/// Most levels counted in one column.
pub const LEVEL_CAP: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::tests::SHORT;

    fn contract() -> Contract {
        Contract::parse("c.yaml", SHORT).unwrap().0
    }

    #[test]
    fn counts_nulls_bounds_levels_and_completeness() {
        let mut profile = TableProfile::new(&contract());
        let id = |text| Cell::Text(text);
        profile.push_row(&[id("t1"), id("c1"), Cell::Number(-5.0), id("grocery"), id("0")]);
        profile.push_row(&[id("t2"), id("c1"), Cell::Number(10.0), id("casino"), id("1")]);
        profile.push_row(&[Cell::Null, id("c2"), Cell::Number(f64::NAN), Cell::Null, Cell::Integer(1)]);
        profile.push_row(&[id("t2"), id("c2"), Cell::Number(2e6), Cell::Unreadable]);
        assert_eq!(profile.rows(), 4);
        assert!((profile.row_completeness().unwrap() - 0.75).abs() < 1e-12);
        let amount = profile.column("amount").unwrap();
        assert_eq!((amount.values(), amount.nulls()), (3, 1));
        assert_eq!(amount.out_of_range(), (1, 1));
        assert!((amount.mean().unwrap() - (-5.0 + 10.0 + 2e6) / 3.0).abs() < 1e-6);
        assert_eq!((amount.min(), amount.max()), (Some(-5.0), Some(2e6)));
        let category = profile.column("merchant_category").unwrap();
        assert_eq!((category.undeclared(), category.unreadable(), category.invalid()), (1, 1, 2));
        assert_eq!(category.levels().unwrap().get("casino"), Some(&1));
        let label = profile.column("is_fraud").unwrap();
        assert_eq!((label.undeclared(), label.nulls()), (0, 1));
        let ids = profile.column("transaction_id").unwrap();
        assert_eq!((ids.distinct(), ids.duplicates()), (Distinct::Exactly(2), Some(1)));
    }

    #[test]
    fn memory_stays_bounded_at_the_caps() {
        let mut profile = TableProfile::new(&contract());
        for i in 0..=DISTINCT_CAP {
            let text = i.to_string();
            profile.push_row(&[Cell::Null, Cell::Null, Cell::Null, Cell::Text(&text)]);
            let column = profile.column("merchant_category").unwrap();
            let expected = i + 1;
            if expected <= DISTINCT_CAP {
                assert_eq!(column.distinct(), Distinct::Exactly(expected as u64));
            }
            assert_eq!(column.levels().is_some(), expected <= LEVEL_CAP);
        }
        let column = profile.column("merchant_category").unwrap();
        assert_eq!(column.distinct(), Distinct::MoreThan(DISTINCT_CAP as u64));
        assert_eq!(column.duplicates(), None);
    }
}
