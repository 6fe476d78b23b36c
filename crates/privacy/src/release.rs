//! The vocabulary of a release: which cells are counted, at what sensitivity and cost.
//!
//! A [`ReleaseQuery`] is plain JSON that coordinator and agents derive from contracts and compare; nothing in it
//! depends on rows. An attribute splits its values into *fine* cells (bins or levels, then "other", then missing),
//! optionally merged into fewer. Marginals are counted together as one integer vector of L2 sensitivity k·√m: one
//! unit has at most k rows, and all k may fall into the same cell of each of the m marginals.
//!
//! [`count`](mod@self::count) turns rows into that vector, [`bins`] chooses edges and merges from *released* counts,
//! [`table`] reads summed noisy vectors as tables.

pub mod bins;
pub mod count;
mod joint;
pub mod table;

pub use bins::{equal_mass_edges, fine_edges, merge_adjacent, merge_rare};
pub use count::{ColumnRef, CountError, Counter, MAX_COUNTER_BYTES, MAX_THREADS, Resources, count};
pub use table::MarginalTable;

use crate::budget::Rho;
use crate::mechanism::{DiscreteGaussian, EventShape, MechanismError};
use crate::private::{Digest, sha256};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Id of the label attribute.
pub const LABEL_ID: &str = "@label";

/// Attributes in one query at most.
pub const MAX_ATTRIBUTES: usize = 512;
/// Marginals in one query at most.
pub const MAX_MARGINALS: usize = 8_192;
/// Attributes of one marginal at most.
pub const MAX_MARGINAL_ATTRIBUTES: usize = 3;
/// Cells over all marginals of one query at most.
pub const MAX_CELLS: usize = 1 << 21;
/// Fine cells of one attribute at most.
pub const MAX_ATTRIBUTE_CELLS: usize = 4_096;
/// Rows one unit may contribute at most.
pub const MAX_ROWS_PER_UNIT: u32 = 10_000;
/// Bytes of an id, digest or stage name at most.
pub const MAX_NAME_BYTES: usize = 256;
/// Bytes of a query's JSON at most.
pub const MAX_QUERY_BYTES: usize = 4 << 20;

/// Why a query was refused; depends on the query alone.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QueryError {
    /// A limit of this module is exceeded, or a list is empty.
    #[error("{what}: expected 1 to {max}, got {got}")]
    Size {
        /// What was counted.
        what: &'static str,
        /// The largest number allowed.
        max: usize,
        /// The number found.
        got: usize,
    },
    /// Two attributes share an id.
    #[error("attribute {id:?} is listed twice")]
    DuplicateAttribute {
        /// The id.
        id: String,
    },
    /// Bounds or edges aren't increasing finite numbers.
    #[error("attribute {id:?}: bounds and edges must be finite and strictly increasing{hint}")]
    Edges {
        /// The attribute.
        id: String,
        /// More on log scales.
        hint: &'static str,
    },
    /// A merge map doesn't send every fine cell onto 0, 1, … without gaps.
    #[error("attribute {id:?}: merge must map {cells} fine cells onto 0, 1, 2, … without gaps")]
    Merge {
        /// The attribute.
        id: String,
        /// Fine cells of the attribute.
        cells: usize,
    },
    /// The label is binned or merged.
    #[error("the label must be plain classes: levels without merge")]
    Label,
    /// A marginal names an attribute that isn't there, or the same one twice.
    #[error("marginal {index}: attributes must be distinct indices below {attributes}")]
    Marginal {
        /// Position of the marginal.
        index: usize,
        /// Number of attributes in the query.
        attributes: usize,
    },
    /// The ρ and the sensitivity give no usable noise.
    #[error("noise: {0}")]
    Noise(#[from] MechanismError),
    /// The JSON doesn't parse.
    #[error("not a release query: {reason}")]
    Json {
        /// The parser's words.
        reason: String,
    },
}

/// How an attribute's values fall into fine cells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Binning {
    /// Numbers: `edges.len() + 1` bins, then one missing cell.
    Edges {
        /// Declared lower bound; smaller values count as this one.
        lower: f64,
        /// Declared upper bound; larger values count as this one.
        upper: f64,
        /// Whether a bin is uniform in `ln(1 + value)` rather than in the value: for heavy tails.
        log1p: bool,
        /// Inner edges on the original value scale, strictly increasing within the bounds; bin i holds
        /// `edges[i-1] ≤ value < edges[i]`.
        edges: Vec<f64>,
    },
    /// Categories: the declared levels, then "other", then missing. For the label: its classes and nothing else.
    Levels {
        /// Number of declared levels or classes.
        levels: u32,
    },
}

/// One attribute of a query.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attribute {
    /// Canonical feature id, or [`LABEL_ID`].
    pub id: String,
    /// Fine cells.
    pub binning: Binning,
    /// Merged cell of each fine cell, for rare levels or coarse bins; none means every fine cell is its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<Vec<u16>>,
}

impl Attribute {
    /// The label with its number of classes.
    #[must_use]
    pub fn label(classes: u32) -> Self {
        Self { id: LABEL_ID.to_owned(), binning: Binning::Levels { levels: classes }, merge: None }
    }

    /// Whether this is the label.
    #[must_use]
    pub fn is_label(&self) -> bool {
        self.id == LABEL_ID
    }

    /// Number of fine cells.
    #[must_use]
    pub fn fine_cells(&self) -> usize {
        match &self.binning {
            Binning::Edges { edges, .. } => edges.len() + 2,
            Binning::Levels { levels } if self.is_label() => *levels as usize,
            Binning::Levels { levels } => *levels as usize + 2,
        }
    }

    /// Number of cells counted: merged ones where there is a merge.
    #[must_use]
    pub fn cells(&self) -> usize {
        match &self.merge {
            Some(merge) => merge.iter().max().map_or(0, |top| usize::from(*top) + 1),
            None => self.fine_cells(),
        }
    }

    /// Cell counted for a fine cell; fine cells out of range count as the last one.
    #[must_use]
    pub fn merged(&self, fine: usize) -> usize {
        match &self.merge {
            Some(merge) => merge.get(fine).or_else(|| merge.last()).map_or(0, |cell| usize::from(*cell)),
            None => fine.min(self.fine_cells().saturating_sub(1)),
        }
    }

    /// Fine cells that count as a given cell.
    #[must_use]
    pub fn members(&self, cell: usize) -> Vec<usize> {
        (0..self.fine_cells()).filter(|fine| self.merged(*fine) == cell).collect()
    }

    /// Fine cell of a number: clamped to the bounds, NaN is the missing cell. Zero for an attribute with levels.
    #[must_use]
    pub fn fine_cell_of(&self, value: f64) -> usize {
        match &self.binning {
            Binning::Edges { edges, .. } if value.is_nan() => edges.len() + 1,
            // Clamping to the bounds can't change the bin: every inner edge lies within them.
            Binning::Edges { edges, .. } => edges.partition_point(|edge| *edge <= value),
            Binning::Levels { .. } => 0,
        }
    }

    /// Fine cell of a level code: codes above "other" are missing. For numbers the code is the bin.
    #[must_use]
    pub fn fine_cell_of_code(&self, code: u32) -> usize {
        usize::try_from(code).unwrap_or(usize::MAX).min(self.fine_cells().saturating_sub(1))
    }

    /// Bounds of an ordinary bin on the value scale; nothing for levels and for the missing cell.
    #[must_use]
    pub fn bin_bounds(&self, fine: usize) -> Option<(f64, f64)> {
        let Binning::Edges { lower, upper, edges, .. } = &self.binning else { return None };
        if fine > edges.len() {
            return None;
        }
        let left = fine.checked_sub(1).and_then(|i| edges.get(i)).unwrap_or(lower);
        Some((*left, *edges.get(fine).unwrap_or(upper)))
    }

    fn check(&self) -> Result<(), QueryError> {
        size("id bytes", self.id.len(), MAX_NAME_BYTES)?;
        match &self.binning {
            Binning::Edges { .. } if self.is_label() => return Err(QueryError::Label),
            Binning::Edges { lower, upper, log1p, edges } => {
                self.check_edges(*lower, *upper, *log1p, edges)?
            }
            Binning::Levels { levels } => size("levels", *levels as usize, MAX_ATTRIBUTE_CELLS)?,
        }
        size("cells of an attribute", self.fine_cells(), MAX_ATTRIBUTE_CELLS)?;
        let Some(merge) = &self.merge else { return Ok(()) };
        if self.is_label() {
            return Err(QueryError::Label);
        }
        let cells = self.fine_cells();
        let used: BTreeSet<u16> = merge.iter().copied().collect();
        let gapless = used.iter().enumerate().all(|(i, cell)| i == usize::from(*cell));
        if merge.len() == cells && gapless {
            Ok(())
        } else {
            Err(QueryError::Merge { id: self.id.clone(), cells })
        }
    }

    fn check_edges(&self, lower: f64, upper: f64, log1p: bool, edges: &[f64]) -> Result<(), QueryError> {
        let refused = |hint| Err(QueryError::Edges { id: self.id.clone(), hint });
        let points = std::iter::once(&lower).chain(edges).chain(std::iter::once(&upper));
        let increasing = points.clone().zip(points.clone().skip(1)).all(|(a, b)| a < b);
        if !increasing || !points.clone().all(|p| p.is_finite()) {
            return refused("");
        }
        if log1p && lower <= -1.0 {
            return refused("; a log1p scale needs a lower bound above -1");
        }
        Ok(())
    }
}

/// Counts over the cells of one, two or three attributes together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MarginalSpec {
    /// Indices into the query's attribute list; the last one varies fastest.
    pub attributes: Vec<usize>,
}

/// One step of a release: what is counted together and what it may cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseQuery {
    /// Digest of the plan this step belongs to.
    pub plan_digest: String,
    /// Number of the step, from 1.
    pub stage: u8,
    /// What the step is for, such as `one_way`, `scores` or `tree`.
    pub stage_name: String,
    /// Attributes; the label is one of them where it is counted.
    pub attributes: Vec<Attribute>,
    /// Marginals, measured together.
    pub marginals: Vec<MarginalSpec>,
    /// What this step may cost.
    pub rho: Rho,
    /// Rows one unit contributes at most (k), chosen without looking at values.
    pub max_rows_per_unit: u32,
}

impl ReleaseQuery {
    /// Parses and checks a query from JSON.
    ///
    /// # Errors
    /// [`QueryError`] for oversized or malformed JSON and everything [`Self::check`] refuses.
    pub fn from_json(bytes: &[u8]) -> Result<Self, QueryError> {
        size("query bytes", bytes.len(), MAX_QUERY_BYTES)?;
        let query: Self =
            serde_json::from_slice(bytes).map_err(|error| QueryError::Json { reason: error.to_string() })?;
        query.check()?;
        Ok(query)
    }

    /// The query as JSON; its digest is over these bytes.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Unwrap safety: strings, numbers and lists always serialise, and map keys are field names.
        serde_json::to_vec(self).expect("a release query has a JSON form")
    }

    /// SHA-256 of [`Self::to_json`].
    #[must_use]
    pub fn digest(&self) -> Digest {
        sha256(&self.to_json())
    }

    /// Checks every limit and that the noise the ρ buys is usable.
    ///
    /// # Errors
    /// [`QueryError`] names the first thing that is wrong.
    pub fn check(&self) -> Result<(), QueryError> {
        size("plan digest bytes", self.plan_digest.len(), MAX_NAME_BYTES)?;
        size("stage name bytes", self.stage_name.len(), MAX_NAME_BYTES)?;
        size("stage", usize::from(self.stage), usize::from(u8::MAX))?;
        size("rows per unit", self.max_rows_per_unit as usize, MAX_ROWS_PER_UNIT as usize)?;
        size("attributes", self.attributes.len(), MAX_ATTRIBUTES)?;
        size("marginals", self.marginals.len(), MAX_MARGINALS)?;
        let mut ids = BTreeSet::new();
        for attribute in &self.attributes {
            attribute.check()?;
            if !ids.insert(attribute.id.as_str()) {
                return Err(QueryError::DuplicateAttribute { id: attribute.id.clone() });
            }
        }
        let mut total = 0usize;
        for (index, marginal) in self.marginals.iter().enumerate() {
            size("attributes of a marginal", marginal.attributes.len(), MAX_MARGINAL_ATTRIBUTES)?;
            let distinct: BTreeSet<&usize> = marginal.attributes.iter().collect();
            if distinct.len() != marginal.attributes.len()
                || distinct.iter().any(|i| **i >= self.attributes.len())
            {
                return Err(QueryError::Marginal { index, attributes: self.attributes.len() });
            }
            // At most 4096³ per marginal, so the sum can't overflow before the limit stops it.
            total += self.marginal_cells(marginal);
            size("cells", total, MAX_CELLS)?;
        }
        self.mechanism()?;
        Ok(())
    }

    /// Length of the counted vector: cells over all marginals.
    #[must_use]
    pub fn cells_total(&self) -> usize {
        self.marginals.iter().map(|marginal| self.marginal_cells(marginal)).sum()
    }

    /// Cells along each attribute of a marginal, in its order.
    #[must_use]
    pub fn dims(&self, marginal: &MarginalSpec) -> Vec<usize> {
        marginal.attributes.iter().filter_map(|i| self.attributes.get(*i)).map(Attribute::cells).collect()
    }

    /// Squared L2 sensitivity of the counted vector: k²·m.
    #[must_use]
    pub fn l2_sensitivity_squared(&self) -> u64 {
        let k = u64::from(self.max_rows_per_unit);
        k * k * self.marginals.len() as u64
    }

    /// The noise that spends this query's ρ.
    ///
    /// # Errors
    /// [`MechanismError`] when ρ and sensitivity give a σ out of range.
    pub fn mechanism(&self) -> Result<DiscreteGaussian, MechanismError> {
        DiscreteGaussian::from_rho(self.l2_sensitivity_squared(), self.rho)
    }

    /// The vector's public shape, for the ledger's event.
    #[must_use]
    pub fn event_shape(&self) -> EventShape {
        // Checked queries stay far below u32.
        let fit = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        EventShape {
            rows_per_unit: self.max_rows_per_unit,
            marginals: fit(self.marginals.len()),
            dimension: fit(self.cells_total()),
        }
    }

    /// Position of the label among the attributes, if it is counted.
    #[must_use]
    pub fn label_index(&self) -> Option<usize> {
        self.attributes.iter().position(Attribute::is_label)
    }

    fn marginal_cells(&self, marginal: &MarginalSpec) -> usize {
        self.dims(marginal).iter().product()
    }
}

fn size(what: &'static str, got: usize, max: usize) -> Result<(), QueryError> {
    if (1..=max).contains(&got) { Ok(()) } else { Err(QueryError::Size { what, max, got }) }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    pub(crate) fn numeric(id: &str, edges: &[f64]) -> Attribute {
        Attribute {
            id: id.to_owned(),
            binning: Binning::Edges { lower: 0.0, upper: 100.0, log1p: false, edges: edges.to_vec() },
            merge: None,
        }
    }

    pub(crate) fn levels(id: &str, levels: u32, merge: Option<Vec<u16>>) -> Attribute {
        Attribute { id: id.to_owned(), binning: Binning::Levels { levels }, merge }
    }

    pub(crate) fn query(attributes: Vec<Attribute>, marginals: &[&[usize]]) -> ReleaseQuery {
        ReleaseQuery {
            plan_digest: "p".to_owned(),
            stage: 1,
            stage_name: "one_way".to_owned(),
            attributes,
            marginals: marginals.iter().map(|m| MarginalSpec { attributes: m.to_vec() }).collect(),
            rho: Rho::from_f64_round_down(0.01).unwrap(),
            max_rows_per_unit: 1,
        }
    }

    #[test]
    fn cells_follow_the_declared_order() {
        let age = numeric("age", &[10.0, 20.0]);
        assert_eq!((age.fine_cells(), age.cells()), (4, 4));
        let cells = [-5.0, 0.0, 9.99, 10.0, 1e9, f64::INFINITY, f64::NAN].map(|v| age.fine_cell_of(v));
        assert_eq!(cells, [0, 0, 0, 1, 2, 2, 3]);
        assert_eq!(age.bin_bounds(0), Some((0.0, 10.0)));
        assert_eq!(age.bin_bounds(2), Some((20.0, 100.0)));
        assert_eq!(age.bin_bounds(3), None);

        let colour = levels("colour", 3, Some(vec![0, 2, 2, 2, 1]));
        assert_eq!((colour.fine_cells(), colour.cells()), (5, 3));
        assert_eq!(colour.members(2), vec![1, 2, 3]);
        assert_eq!([0, 1, 3, 4, 9].map(|c| colour.merged(colour.fine_cell_of_code(c))), [0, 2, 2, 1, 1]);
        assert_eq!(Attribute::label(2).cells(), 2);
    }

    #[test]
    fn sensitivity_is_k_root_m() {
        let mut query = query(vec![numeric("a", &[1.0]), Attribute::label(2)], &[&[0], &[1], &[0, 1]]);
        query.max_rows_per_unit = 4;
        assert_eq!(query.l2_sensitivity_squared(), 16 * 3);
        assert_eq!(query.cells_total(), 3 + 2 + 6);
        query.check().unwrap();
        assert!(query.mechanism().unwrap().sigma_squared().sigma() > 48.0);
    }

    #[test]
    fn json_round_trip_is_exact_and_closed() {
        let mut query = query(vec![numeric("a", &[0.1, 1.0 / 3.0]), Attribute::label(2)], &[&[0, 1]]);
        query.attributes[0].merge = Some(vec![0, 0, 1, 2]);
        let json = query.to_json();
        assert_eq!(ReleaseQuery::from_json(&json).unwrap(), query);
        let text = String::from_utf8(json).unwrap();
        let extra = text.replacen("\"stage\"", "\"where\":1,\"stage\"", 1);
        assert!(matches!(ReleaseQuery::from_json(extra.as_bytes()), Err(QueryError::Json { .. })));
    }

    #[test]
    fn every_defect_is_refused_by_name() {
        let good = || query(vec![numeric("a", &[1.0]), Attribute::label(2)], &[&[0]]);
        good().check().unwrap();
        let refused = |change: &dyn Fn(&mut ReleaseQuery)| {
            let mut query = good();
            change(&mut query);
            query.check().unwrap_err()
        };
        let edges = |lower: f64, edges: &[f64], log1p: bool| Binning::Edges {
            lower,
            upper: 9.0,
            log1p,
            edges: edges.to_vec(),
        };
        for bad in [
            edges(0.0, &[2.0, 1.0], false),
            edges(0.0, &[1.0, 1.0], false),
            edges(0.0, &[f64::NAN], false),
            edges(0.0, &[9.0], false),
            edges(f64::NEG_INFINITY, &[1.0], false),
            edges(-1.0, &[1.0], true),
        ] {
            assert!(
                matches!(refused(&|q| q.attributes[0].binning = bad.clone()), QueryError::Edges { .. }),
                "{bad:?}"
            );
        }
        assert!(matches!(
            refused(&|q| q.attributes[0].merge = Some(vec![0, 2, 1, 1])),
            QueryError::Merge { .. }
        ));
        assert!(matches!(
            refused(&|q| q.attributes[0].merge = Some(vec![0, 2, 2])),
            QueryError::Merge { .. }
        ));
        assert_eq!(refused(&|q| q.attributes[1].merge = Some(vec![0, 0])), QueryError::Label);
        assert!(matches!(
            refused(&|q| q.attributes[1].id = "a".into()),
            QueryError::DuplicateAttribute { .. }
        ));
        assert!(matches!(refused(&|q| q.marginals[0].attributes = vec![2]), QueryError::Marginal { .. }));
        assert!(matches!(refused(&|q| q.marginals[0].attributes = vec![0, 0]), QueryError::Marginal { .. }));
        assert!(matches!(
            refused(&|q| q.marginals[0].attributes = vec![0, 1, 0, 1]),
            QueryError::Size { .. }
        ));
        assert!(matches!(refused(&|q| q.marginals.clear()), QueryError::Size { .. }));
        assert!(matches!(refused(&|q| q.stage = 0), QueryError::Size { .. }));
        assert!(matches!(refused(&|q| q.rho = Rho::from_units(1 << 40)), QueryError::Noise(_)));
        assert!(matches!(refused(&|q| q.rho = Rho::ZERO), QueryError::Noise(_)));
    }

    #[test]
    fn limits_hold_at_max_plus_one() {
        let refused = |query: &ReleaseQuery| matches!(query.check(), Err(QueryError::Size { .. }));
        let mut q = query(vec![levels("a", 1, None)], &[&[0]]);
        q.max_rows_per_unit = MAX_ROWS_PER_UNIT;
        q.check().unwrap();
        q.max_rows_per_unit += 1;
        assert!(refused(&q));

        let names = |n: usize| (0..n).map(|i| levels(&format!("f{i}"), 1, None)).collect::<Vec<_>>();
        query(names(MAX_ATTRIBUTES), &[&[0]]).check().unwrap();
        assert!(refused(&query(names(MAX_ATTRIBUTES + 1), &[&[0]])));

        let mut q = query(names(1), &[]);
        q.marginals = vec![MarginalSpec { attributes: vec![0] }; MAX_MARGINALS];
        q.check().unwrap();
        q.marginals.push(MarginalSpec { attributes: vec![0] });
        assert!(refused(&q));

        let wide = |cells: usize| levels("w", u32::try_from(cells).unwrap() - 2, None);
        query(vec![wide(MAX_ATTRIBUTE_CELLS)], &[&[0]]).check().unwrap();
        assert!(refused(&query(vec![wide(MAX_ATTRIBUTE_CELLS + 1)], &[&[0]])));

        let mut narrow = wide(MAX_CELLS / MAX_ATTRIBUTE_CELLS);
        narrow.id = "n".to_owned();
        query(vec![wide(MAX_ATTRIBUTE_CELLS), narrow.clone()], &[&[0, 1]]).check().unwrap();
        assert!(refused(&query(vec![wide(MAX_ATTRIBUTE_CELLS), narrow], &[&[0, 1], &[1]])));

        let mut q = query(names(1), &[&[0]]);
        q.stage_name = "x".repeat(MAX_NAME_BYTES + 1);
        assert!(refused(&q));
        assert!(matches!(
            ReleaseQuery::from_json(&vec![b' '; MAX_QUERY_BYTES + 1]),
            Err(QueryError::Size { what: "query bytes", .. })
        ));
    }
}
