//! A domain's part in a round: clipped sums over its units in the leaves of the round's trees.

use std::collections::BTreeMap;
use std::ops::Range;

use tabmesh_contract::batch::{TypedBatch, UnitKey};
use tabmesh_privacy::clip::quantize_clipped;

use crate::error::ForestError;
use crate::forest::{Forest, said};

/// A domain's labelled rows, sorted into leaves once for all rounds. Private; has no wire form.
#[derive(Debug)]
pub struct Rows {
    /// Logit before any tree.
    start: f64,
    trees: usize,
    leaf_count: usize,
    /// Leaf in each tree, row by row.
    leaves: Vec<u16>,
    ones: Vec<bool>,
    /// Rows of each unit.
    units: Vec<Vec<usize>>,
}

impl Rows {
    /// Sorts rows, in the forest's columns, into leaves; those without a label are left out.
    ///
    /// # Errors
    /// [`ForestError::Rows`] if they have other columns.
    pub fn new(forest: &Forest, rows: &TypedBatch) -> Result<Self, ForestError> {
        let labelled: Vec<usize> = (0..rows.rows()).filter(|&row| rows.labels[row].is_some()).collect();
        let rows = rows.take(&labelled);
        let mut units: BTreeMap<UnitKey, Vec<usize>> = BTreeMap::new();
        for (row, unit) in rows.units.iter().enumerate() {
            units.entry(*unit).or_default().push(row);
        }
        let shape = forest.shape();
        Ok(Self {
            start: forest.start(),
            trees: shape.trees,
            leaf_count: shape.leaves(),
            leaves: forest.leaves(&rows)?,
            ones: rows.labels.iter().map(|label| *label == Some(1)).collect(),
            units: units.into_values().collect(),
        })
    }

    /// Number of units.
    #[must_use]
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// For each leaf of some trees, the sums over units of `y − p` and of `p (1 − p)`, side by side and in integer steps.
    ///
    /// The vector has `2 · 2^depth` entries a tree, whatever the rows are. A unit's rows are summed first; its vector is then clipped
    /// to L2 norm `clip` and truncated toward zero, so one unit changes the sum by at most ⌊`clip · scale`⌋ in L2 norm when
    /// it comes or goes. `taken` says which units count in this round.
    ///
    /// `values` are the forest's leaf values so far, tree by tree.
    ///
    /// # Errors
    /// [`ForestError::Shape`] for trees that the forest hasn't, or values that aren't one number a leaf;
    /// [`ForestError::Clip`] for a clip norm or a scale out of range.
    pub fn sums(
        &self,
        values: &[f32],
        trees: Range<usize>,
        (clip, scale): (f64, u64),
        mut taken: impl FnMut() -> bool,
    ) -> Result<Vec<i64>, ForestError> {
        let expected = self.trees * self.leaf_count;
        if values.len() != expected {
            return Err(ForestError::shape("leaf values", expected, values.len()));
        }
        if values.iter().any(|value| !value.is_finite()) {
            return Err(ForestError::shape("leaf values", "numbers", "one that is none"));
        }
        if trees.start >= trees.end || trees.end > self.trees {
            let expected = format!("some of {}", self.trees);
            return Err(ForestError::shape("trees of a round", expected, format!("{trees:?}")));
        }
        let mut total = vec![0_i64; 2 * self.leaf_count * trees.len()];
        let mut unit = vec![0_f32; total.len()];
        for rows in &self.units {
            if !taken() {
                continue;
            }
            unit.fill(0.0);
            for &row in rows {
                let leaves = &self.leaves[row * self.trees..(row + 1) * self.trees];
                let logit = self.start + said(leaves, values, self.leaf_count);
                let p = 1.0 / (1.0 + (-logit).exp());
                let gradient = f64::from(u8::from(self.ones[row])) - p;
                for (at, &leaf) in leaves[trees.clone()].iter().enumerate() {
                    let first = 2 * (at * self.leaf_count + usize::from(leaf));
                    unit[first] += gradient as f32;
                    unit[first + 1] += (p * (1.0 - p)) as f32;
                }
            }
            for (sum, value) in total.iter_mut().zip(quantize_clipped(&unit, clip, scale)?) {
                *sum = sum.saturating_add(value);
            }
        }
        Ok(total)
    }
}

#[cfg(test)]
mod tests;
