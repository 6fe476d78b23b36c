//! Stand-ins for what each domain's owner would declare, written as contracts.
//!
//! A folder of tables says which columns are features, personal or sensitive, but neither ranges nor levels, which an
//! owner knows from a code book. Here they are taken from the members' pooled training rows: ranges rounded outward to
//! two digits, the commonest levels. That step stands outside the differential-privacy claim, as every result says.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tabmesh_contract::schema::{FeatureKind, Scale};

use super::member::{Member, name};
use super::set::Set;
use crate::bench::raw_table::{RawColumn, RawTable};

/// What stands in for the owners' declarations; the same for every domain of a set.
pub(crate) struct Declared {
    /// Name in the table and declaration of each column.
    columns: Vec<(String, String)>,
    by_entity: bool,
    set: String,
}

impl Declared {
    /// Declares what the members' training rows show.
    ///
    /// # Errors
    /// No feature column has a value.
    pub(crate) fn from_rows(set: &Set, members: &RawTable) -> Result<Self> {
        let mut declared = Vec::new();
        let all: Vec<usize> = (0..members.rows()).collect();
        let mut features = 0;
        for column in &set.columns {
            let mut columns = String::new();
            let name = quoted(&column.name);
            match column.role.as_str() {
                "row_id" => line(
                    &mut columns,
                    format_args!("  - {{name: {name}, type: integer, pii: false, role: id}}"),
                ),
                "entity_id" if set.by_entity => {
                    line(
                        &mut columns,
                        format_args!("  - {{name: {name}, type: string, pii: true, role: entity}}"),
                    );
                }
                "label" => line(
                    &mut columns,
                    format_args!(
                        "  - {{name: {name}, type: categorical, pii: false, role: target, feature: target.label, categories: [\"0\", \"1\"]}}"
                    ),
                ),
                "feature" | "sensitive" => {
                    let found =
                        members.columns.iter().enumerate().find(|(_, (known, _))| *known == column.name);
                    let (at, (_, cells)) = found.with_context(|| format!("no cells of {}", column.name))?;
                    let Some(kind) = RawTable::kind(cells, &all) else { continue };
                    feature(&mut columns, at, column, cells, &kind);
                    features += 1;
                }
                // Personal columns and ids of another kind aren't declared: nothing reads them.
                _ => {}
            }
            if !columns.is_empty() {
                declared.push((column.name.clone(), columns));
            }
        }
        ensure!(features > 0, "{}: no feature column has a value", set.name);
        Ok(Self { columns: declared, by_entity: set.by_entity, set: set.name.clone() })
    }

    /// A domain with tables of its own, which lacks some columns.
    pub(crate) fn member(
        &self,
        domain: &str,
        train: &Path,
        test: &Path,
        without: &BTreeSet<String>,
    ) -> Member {
        let product = format!("{}.{}", name(domain), self.set);
        let unit = if self.by_entity {
            format!("unit: entity_id, max_rows_per_unit: {MAX_ROWS_PER_ENTITY}")
        } else {
            "unit: row".to_owned()
        };
        let kept = self.columns.iter().filter(|(column, _)| !without.contains(column));
        let columns: String = kept.map(|(_, declaration)| declaration.as_str()).collect();
        let contract = format!(
            "name: {product}\nversion: \"1.0.0\"\nowner: bench\nschema:\n{columns}\
             privacy: {{sensitivity: low, allow_training: true, {unit}, max_units: {MAX_UNITS}}}\n\
             source: {{type: parquet, path: {}}}\n",
            quoted(&train.display().to_string()),
        );
        Member {
            domain: domain.to_owned(),
            product,
            contract,
            train: train.to_owned(),
            test: test.to_owned(),
        }
    }

    /// Names of the feature columns, in the description's order.
    pub(crate) fn features(&self, set: &Set) -> Vec<String> {
        let feature = |name: &String| {
            let role = set.columns.iter().find(|column| column.name == *name).map(|c| c.role.as_str());
            matches!(role, Some("feature" | "sensitive"))
        };
        self.columns.iter().map(|(name, _)| name.clone()).filter(feature).collect()
    }
}

fn feature(text: &mut String, at: usize, column: &super::set::Column, cells: &RawColumn, kind: &FeatureKind) {
    line(text, format_args!("  - name: {}", quoted(&column.name)));
    let declared = match (kind, column.physical.as_str()) {
        (FeatureKind::Categorical { .. }, _) => "categorical",
        (FeatureKind::Numeric(_), "int64") => "integer",
        (FeatureKind::Numeric(_), _) => "number",
    };
    line(text, format_args!("    type: {declared}"));
    line(text, format_args!("    pii: false"));
    if column.role == "sensitive" {
        line(text, format_args!("    sensitive: true"));
    }
    line(text, format_args!("    role: feature"));
    line(text, format_args!("    feature: {}", RawTable::id(at, &column.name)));
    match (kind, cells) {
        (FeatureKind::Numeric(domain), _) => {
            let (lower, upper) = (outward(domain.lower, f64::floor), outward(domain.upper, f64::ceil));
            line(text, format_args!("    range: [{lower:?}, {upper:?}]"));
            if domain.scale == Scale::Log1p {
                line(text, format_args!("    scale: log1p"));
            }
        }
        (FeatureKind::Categorical { .. }, RawColumn::Text(cells)) => {
            line(text, format_args!("    categories:"));
            for level in common_levels(cells) {
                line(text, format_args!("      - {}", quoted(&level)));
            }
        }
        (FeatureKind::Categorical { .. }, RawColumn::Numeric(_)) => {}
    }
}

/// The commonest levels in alphabetical order, at most [`MOST_LEVELS`].
fn common_levels(cells: &[Option<String>]) -> Vec<String> {
    let mut counts: BTreeMap<&String, usize> = BTreeMap::new();
    cells.iter().flatten().for_each(|level| *counts.entry(level).or_default() += 1);
    let mut ranked: Vec<(&String, usize)> = counts.into_iter().collect();
    ranked.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    ranked.truncate(MOST_LEVELS);
    let mut levels: Vec<String> = ranked.into_iter().map(|(level, _)| level.clone()).collect();
    levels.sort();
    levels
}

/// A bound with two significant digits, `round`ed away from the values.
fn outward(value: f64, round: fn(f64) -> f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let unit = 10_f64.powf(value.abs().log10().floor() - 1.0);
    let bound = round(value / unit) * unit;
    // Powers of ten below one aren't exact; the printed form must not carry their tail.
    format!("{bound:.6e}").parse().unwrap_or(bound)
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String can't fail.
    let _ = writeln!(text, "{content}");
}

/// A text as a double-quoted YAML scalar.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// Levels of a categorical column that are declared; others count as one.
const MOST_LEVELS: usize = 128;
/// Rows of an entity that are used.
const MAX_ROWS_PER_ENTITY: u32 = 5;
/// Units each domain declares as its largest number; δ = 1e-5 is a tenth of its inverse.
const MAX_UNITS: u32 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_go_outward_to_two_digits() {
        let bounds = |lower, upper| (outward(lower, f64::floor), outward(upper, f64::ceil));
        assert_eq!(bounds(0.0, 1234.0), (0.0, 1300.0));
        assert_eq!(bounds(-0.0123, 99.0), (-0.013, 99.0));
        assert_eq!(bounds(17.0, 991.0), (17.0, 1000.0));
    }

    #[test]
    fn the_commonest_levels_are_kept_in_order() {
        let cells: Vec<Option<String>> = (0..300_usize)
            .flat_map(|level| {
                std::iter::repeat_n(Some(format!("l{level:03}")), if level < 10 { 1 } else { 2 })
            })
            .chain([None])
            .collect();
        let levels = common_levels(&cells);
        assert_eq!(levels.len(), MOST_LEVELS);
        assert_eq!(levels.first().map(String::as_str), Some("l010"));
        assert!(levels.is_sorted());
    }
}
