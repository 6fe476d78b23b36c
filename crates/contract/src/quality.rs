//! ODCS quality rules: the five library metrics by the eight `mustBe` operators, judged on a local profile.
//!
//! A rule for another engine (SQL, Soda, Great Expectations) is reported as skipped, never as passed. Outcomes
//! carry measured values and stay in the domain, like the profile they come from.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::contract::{Column, names};
use crate::odcs::QualityEntry;
use crate::profile::{ColumnProfile, TableProfile};

/// One promise about the rows.
#[derive(Debug, Clone, PartialEq)]
pub struct QualityRule {
    /// Column the rule is about; none = the table.
    pub column: Option<String>,
    /// What is measured and what it must be.
    pub measure: Measure,
    /// Whether a breach refuses the table or is only shown.
    pub severity: Severity,
}

/// What a rule measures.
#[derive(Debug, Clone, PartialEq)]
pub enum Measure {
    /// A library metric.
    Library {
        /// What is counted.
        metric: Metric,
        /// Rows, or percent of rows.
        unit: Unit,
        /// What the count must be.
        must: Must,
        /// Values listed for `invalidValues` (the valid ones) or `missingValues` (the missing ones).
        listed: Option<BTreeSet<String>>,
    },
    /// A rule of another engine.
    Foreign {
        /// The engine's name.
        engine: String,
    },
}

/// A library metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Rows without a value.
    NullValues,
    /// Rows without a value, or with one that stands for none.
    MissingValues,
    /// Rows whose value breaks the declaration.
    InvalidValues,
    /// Values that repeat an earlier one.
    DuplicateValues,
    /// Rows of the table.
    RowCount,
}

names!(Metric {
    NullValues = "nullValues",
    MissingValues = "missingValues",
    InvalidValues = "invalidValues",
    DuplicateValues = "duplicateValues",
    RowCount = "rowCount",
});

/// What a measurement is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Rows.
    Rows,
    /// Percent of the table's rows, 0 to 100.
    Percent,
}

/// A `mustBe` operator with its bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Must {
    /// `mustBe`.
    Be(f64),
    /// `mustNotBe`.
    NotBe(f64),
    /// `mustBeGreaterThan`.
    BeGreaterThan(f64),
    /// `mustBeGreaterOrEqualTo`.
    BeGreaterOrEqualTo(f64),
    /// `mustBeLessThan`.
    BeLessThan(f64),
    /// `mustBeLessOrEqualTo`.
    BeLessOrEqualTo(f64),
    /// `mustBeBetween`, bounds included.
    BeBetween(f64, f64),
    /// `mustNotBeBetween`, bounds included.
    NotBeBetween(f64, f64),
}

impl Must {
    /// Whether a measurement satisfies the operator.
    #[must_use]
    pub fn holds(self, value: f64) -> bool {
        // Measurements are counts, or percentages that are compared to what the owner wrote.
        let equal = |bound: f64| (value - bound).abs() <= 1e-9 * bound.abs().max(1.0);
        match self {
            Self::Be(bound) => equal(bound),
            Self::NotBe(bound) => !equal(bound),
            Self::BeGreaterThan(bound) => value > bound && !equal(bound),
            Self::BeGreaterOrEqualTo(bound) => value >= bound || equal(bound),
            Self::BeLessThan(bound) => value < bound && !equal(bound),
            Self::BeLessOrEqualTo(bound) => value <= bound || equal(bound),
            Self::BeBetween(lower, upper) => {
                (value >= lower && value <= upper) || equal(lower) || equal(upper)
            }
            Self::NotBeBetween(lower, upper) => {
                !((value >= lower && value <= upper) || equal(lower) || equal(upper))
            }
        }
    }
}

impl std::fmt::Display for Must {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Be(bound) => write!(f, "= {bound}"),
            Self::NotBe(bound) => write!(f, "≠ {bound}"),
            Self::BeGreaterThan(bound) => write!(f, "> {bound}"),
            Self::BeGreaterOrEqualTo(bound) => write!(f, "≥ {bound}"),
            Self::BeLessThan(bound) => write!(f, "< {bound}"),
            Self::BeLessOrEqualTo(bound) => write!(f, "≤ {bound}"),
            Self::BeBetween(lower, upper) => write!(f, "in [{lower}, {upper}]"),
            Self::NotBeBetween(lower, upper) => write!(f, "not in [{lower}, {upper}]"),
        }
    }
}

/// What a breach means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The table doesn't keep its contract.
    Error,
    /// Worth knowing.
    Warning,
}

/// The outcome of one rule. Local: it says what was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct QualityOutcome {
    /// The rule.
    pub rule: QualityRule,
    /// What was measured, in the rule's unit.
    pub measured: Option<f64>,
    /// The judgement.
    pub verdict: Verdict,
}

/// The judgement of a rule or service level.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Kept.
    Passed,
    /// Broken.
    Failed,
    /// Not judged, and why.
    Skipped(String),
}

impl QualityRule {
    /// Rules that a column's own declaration implies.
    #[must_use]
    pub fn implied(column: &Column) -> Vec<Self> {
        let rule = |metric, severity| Self {
            column: Some(column.name.clone()),
            measure: Measure::Library { metric, unit: Unit::Rows, must: Must::Be(0.0), listed: None },
            severity,
        };
        let mut rules = Vec::new();
        if column.required {
            rules.push(rule(Metric::NullValues, Severity::Error));
        }
        if column.unique {
            rules.push(rule(Metric::DuplicateValues, Severity::Error));
        }
        if column.range.is_some() {
            rules.push(rule(Metric::InvalidValues, Severity::Error));
        } else if column.categories.is_some() {
            // Rare values may be left undeclared on purpose: they count as "other".
            rules.push(rule(Metric::InvalidValues, Severity::Warning));
        }
        rules
    }

    /// Reads an ODCS entry.
    ///
    /// # Errors
    /// `(expected, got)` in words.
    pub(crate) fn from_entry(entry: &QualityEntry, column: Option<&str>) -> Result<Self, (String, String)> {
        let severity = match entry.severity.as_deref() {
            Some("warning" | "warn" | "info") => Severity::Warning,
            _ => Severity::Error,
        };
        let column = column.map(str::to_owned);
        let metric_name = entry.metric.as_deref().or(entry.rule.as_deref());
        let foreign = match entry.kind.as_deref() {
            None | Some("library") => metric_name.is_none(),
            Some(_) => true,
        };
        if foreign {
            let engine = entry.engine.as_deref().or(entry.kind.as_deref()).unwrap_or("text").to_owned();
            return Ok(Self { column, measure: Measure::Foreign { engine }, severity });
        }
        let name = metric_name.unwrap_or_default();
        let metric = Metric::from_name(name)
            .ok_or_else(|| (format!("metric {}", Metric::NAMES.join(", ")), format!("`{name}`")))?;
        let unit = match entry.unit.as_deref() {
            None | Some("rows") => Unit::Rows,
            Some("percent" | "%") => Unit::Percent,
            Some(other) => return Err(("unit rows or percent".into(), format!("`{other}`"))),
        };
        let list_name = match metric {
            Metric::InvalidValues => "validValues",
            _ => "missingValues",
        };
        if let Some(pattern) = entry.arguments.as_ref().and_then(|a| a.get("pattern")) {
            let engine = format!("pattern {pattern}");
            return Ok(Self { column, measure: Measure::Foreign { engine }, severity });
        }
        let listed = entry.arguments.as_ref().and_then(|a| a.get(list_name)).and_then(Value::as_array);
        let listed = listed.map(|values| {
            let text = |v: &Value| match v {
                Value::String(text) => text.clone(),
                Value::Null => String::new(),
                other => other.to_string(),
            };
            values.iter().map(text).collect()
        });
        let must = operator(entry)?;
        Ok(Self { column, measure: Measure::Library { metric, unit, must, listed }, severity })
    }

    /// Whether judging the rule needs an exact count of distinct values.
    #[must_use]
    pub fn counts_duplicates(&self) -> bool {
        matches!(&self.measure, Measure::Library { metric: Metric::DuplicateValues, .. })
    }

    /// Judges the rule on a profile.
    #[must_use]
    pub fn judge(&self, profile: &TableProfile) -> QualityOutcome {
        let outcome = |measured, verdict| QualityOutcome { rule: self.clone(), measured, verdict };
        let (metric, unit, must, listed) = match &self.measure {
            Measure::Library { metric, unit, must, listed } => (*metric, *unit, *must, listed.as_ref()),
            Measure::Foreign { engine } => {
                return outcome(None, Verdict::Skipped(format!("needs engine {engine}")));
            }
        };
        let count = match (metric, &self.column) {
            (Metric::RowCount, _) => Ok(profile.rows()),
            (_, None) => Err("needs a column".to_owned()),
            (_, Some(name)) => match profile.column(name) {
                Some(column) => count(metric, column, listed),
                None => Err(format!("column {name} was not profiled")),
            },
        };
        match count {
            Err(why) => outcome(None, Verdict::Skipped(why)),
            Ok(_) if unit == Unit::Percent && profile.rows() == 0 => {
                outcome(None, Verdict::Skipped("the table has no rows".into()))
            }
            Ok(count) => {
                #[allow(clippy::cast_precision_loss, reason = "row counts stay far below 2^53")]
                let (count, rows) = (count as f64, profile.rows() as f64);
                let measured = match unit {
                    Unit::Rows => count,
                    Unit::Percent => 100.0 * count / rows,
                };
                outcome(Some(measured), if must.holds(measured) { Verdict::Passed } else { Verdict::Failed })
            }
        }
    }
}

/// Judges all rules of a contract.
#[must_use]
pub fn judge(rules: &[QualityRule], profile: &TableProfile) -> Vec<QualityOutcome> {
    rules.iter().map(|rule| rule.judge(profile)).collect()
}

fn count(metric: Metric, column: &ColumnProfile, listed: Option<&BTreeSet<String>>) -> Result<u64, String> {
    let too_many = || "too many distinct values to count".to_owned();
    match (metric, listed) {
        (Metric::RowCount, _) => Ok(column.values() + column.nulls() + column.unreadable()),
        (Metric::NullValues, _) | (Metric::MissingValues, None) => Ok(column.nulls()),
        (Metric::MissingValues, Some(missing)) => {
            let levels = column.levels().ok_or_else(too_many)?;
            let standing_in: u64 = levels.iter().filter(|(l, _)| missing.contains(*l)).map(|(_, n)| n).sum();
            Ok(column.nulls() + standing_in)
        }
        (Metric::InvalidValues, None) => Ok(column.invalid()),
        (Metric::InvalidValues, Some(valid)) => {
            let levels = column.levels().ok_or_else(too_many)?;
            let invalid: u64 = levels.iter().filter(|(l, _)| !valid.contains(*l)).map(|(_, n)| n).sum();
            Ok(invalid + column.unreadable())
        }
        (Metric::DuplicateValues, _) => column.duplicates().ok_or_else(too_many),
    }
}

/// The one operator of an entry.
fn operator(entry: &QualityEntry) -> Result<Must, (String, String)> {
    let number = |value: &Value| {
        value.as_f64().ok_or_else(|| ("a number after mustBe or mustNotBe".to_owned(), value.to_string()))
    };
    let mut found = Vec::new();
    if let Some(value) = &entry.must_be {
        found.push(Must::Be(number(value)?));
    }
    if let Some(value) = &entry.must_not_be {
        found.push(Must::NotBe(number(value)?));
    }
    found.extend(entry.must_be_greater_than.map(Must::BeGreaterThan));
    found.extend(entry.must_be_greater_or_equal_to.map(Must::BeGreaterOrEqualTo));
    found.extend(entry.must_be_less_than.map(Must::BeLessThan));
    found.extend(entry.must_be_less_or_equal_to.map(Must::BeLessOrEqualTo));
    found.extend(entry.must_be_between.map(|[lower, upper]| Must::BeBetween(lower, upper)));
    found.extend(entry.must_not_be_between.map(|[lower, upper]| Must::NotBeBetween(lower, upper)));
    match found.as_slice() {
        [must] => Ok(*must),
        _ => Err(("exactly one mustBe operator".into(), format!("{} operators", found.len()))),
    }
}
