//! The forest itself: trees of random splits, their leaf values, and what they say of a row.

use serde::{Deserialize, Serialize};
use tabmesh_contract::batch::TypedBatch;

use crate::error::ForestError;
use crate::split::Split;

/// How large a forest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Trees, 1 to [`Shape::MAX_TREES`].
    pub trees: usize,
    /// Splits between root and leaf, 1 to [`Shape::MAX_DEPTH`].
    pub depth: usize,
}

impl Shape {
    /// Most trees.
    pub const MAX_TREES: usize = 6_400;
    /// Most splits between root and leaf.
    pub const MAX_DEPTH: usize = 8;

    /// Leaves of a tree.
    #[must_use]
    pub fn leaves(&self) -> usize {
        1 << self.depth.min(Self::MAX_DEPTH)
    }

    pub(crate) fn check(&self) -> Result<(), ForestError> {
        if !(1..=Self::MAX_TREES).contains(&self.trees) {
            return Err(ForestError::shape("trees", format!("1 to {}", Self::MAX_TREES), self.trees));
        }
        if !(1..=Self::MAX_DEPTH).contains(&self.depth) {
            return Err(ForestError::shape("depth", format!("1 to {}", Self::MAX_DEPTH), self.depth));
        }
        Ok(())
    }
}

/// A forest: all trees have the same depth and ask one question a level.
///
/// A leaf's number has the answer of level `l` as its bit `l`. Nothing of a domain's rows is in it beside leaf values, which come
/// from noisy sums.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forest {
    format: Format,
    /// Logit of class 1 before any tree.
    start: f64,
    /// Questions of each tree, level by level.
    trees: Vec<Vec<Split>>,
    /// Value of each leaf, tree by tree.
    values: Vec<f32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Format {
    #[serde(rename = "tabmesh-forest-1")]
    First,
}

impl Forest {
    /// A forest whose leaves say nothing yet.
    pub(crate) fn bare(start: f64, trees: Vec<Vec<Split>>, shape: Shape) -> Self {
        let values = vec![0.0; trees.len() * shape.leaves()];
        Self { format: Format::First, start, trees, values }
    }

    /// How large it is.
    #[must_use]
    pub fn shape(&self) -> Shape {
        Shape { trees: self.trees.len(), depth: self.trees.first().map_or(0, Vec::len) }
    }

    /// Questions of each tree, level by level.
    #[must_use]
    pub fn trees(&self) -> &[Vec<Split>] {
        &self.trees
    }

    /// Value of each leaf, tree by tree: `trees × 2^depth` logits.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Logit of class 1 before any tree.
    #[must_use]
    pub fn start(&self) -> f64 {
        self.start
    }

    /// The same trees with other leaf values.
    ///
    /// # Errors
    /// [`ForestError::Shape`] for a wrong number of values, or one that isn't a number.
    pub fn with_values(self, values: Vec<f32>) -> Result<Self, ForestError> {
        let forest = Self { values, ..self };
        forest.check()?;
        Ok(forest)
    }

    /// The forest as it stood when its first trees had learnt and the others hadn't.
    #[must_use]
    pub fn after(&self, trees: usize) -> Self {
        let mut forest = self.clone();
        let learnt = trees.saturating_mul(self.shape().leaves());
        forest.values.iter_mut().skip(learnt).for_each(|value| *value = 0.0);
        forest
    }

    /// Checks a forest that was read: reading alone doesn't.
    ///
    /// # Errors
    /// [`ForestError::Shape`] naming the first figure out of range.
    pub fn check(&self) -> Result<(), ForestError> {
        let shape = self.shape();
        shape.check()?;
        if let Some(tree) = self.trees.iter().find(|tree| tree.len() != shape.depth) {
            return Err(ForestError::shape("splits of a tree", shape.depth, tree.len()));
        }
        let expected = shape.trees * shape.leaves();
        if self.values.len() != expected {
            return Err(ForestError::shape("leaf values", expected, self.values.len()));
        }
        if !self.start.is_finite() || self.values.iter().any(|value| !value.is_finite()) {
            return Err(ForestError::shape("leaf values", "numbers", "one that is none"));
        }
        let sorted = |split: &Split| match split {
            Split::OneOf { codes, .. } => codes.is_sorted_by(|a, b| a < b),
            Split::AtLeast { threshold, .. } => threshold.is_finite(),
            Split::Missing { .. } => true,
        };
        if self.trees.iter().flatten().any(|split| !sorted(split)) {
            return Err(ForestError::shape(
                "splits",
                "finite thresholds, codes in increasing order",
                "others",
            ));
        }
        Ok(())
    }

    /// The leaf of each row in some trees, row by row.
    pub(crate) fn leaves(&self, rows: &TypedBatch) -> Result<Vec<u16>, ForestError> {
        let (n, trees) = (rows.rows(), self.trees.len());
        let mut leaves = vec![0_u16; n * trees];
        for (at, tree) in self.trees.iter().enumerate() {
            for (level, split) in tree.iter().enumerate() {
                let answers = split.answers(&rows.columns)?;
                if answers.len() != n {
                    return Err(ForestError::rows(format!("column {}", split.column()), n, answers.len()));
                }
                for (leaf, yes) in leaves.iter_mut().skip(at).step_by(trees).zip(answers) {
                    *leaf |= u16::from(yes) << level;
                }
            }
        }
        Ok(leaves)
    }

    /// Logits of class 1, of rows in the columns that the forest was grown on.
    ///
    /// # Errors
    /// [`ForestError::Rows`] if they have other columns.
    pub fn logits(&self, rows: &TypedBatch) -> Result<Vec<f64>, ForestError> {
        if rows.rows() == 0 {
            return Ok(Vec::new());
        }
        let (leaves, leaf_count) = (self.leaves(rows)?, self.shape().leaves());
        let rows = leaves.chunks_exact(self.trees.len().max(1));
        Ok(rows.map(|row| self.start + said(row, &self.values, leaf_count)).collect())
    }
}

/// What trees of so many leaves say of a row by its leaves, all together.
pub(crate) fn said(leaves: &[u16], values: &[f32], leaf_count: usize) -> f64 {
    let of = |(leaf, values): (&u16, &[f32])| values.get(usize::from(*leaf)).copied().map_or(0.0, f64::from);
    leaves.iter().zip(values.chunks_exact(leaf_count)).map(of).sum()
}

/// Largest file of a forest, bytes.
pub const MAX_FOREST_BYTES: usize = 16 << 20;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use tabmesh_contract::batch::TypedColumn;

    use super::*;

    fn forest() -> Forest {
        let trees = vec![
            vec![Split::AtLeast { column: 0, threshold: 1.5 }, Split::OneOf { column: 1, codes: vec![0, 3] }],
            vec![Split::Missing { column: 0 }, Split::AtLeast { column: 0, threshold: -1.0 }],
        ];
        Forest::bare(0.5, trees, Shape { trees: 2, depth: 2 })
    }

    fn rows() -> TypedBatch {
        TypedBatch {
            columns: vec![
                TypedColumn::Numeric(vec![1.5, 1.25, f64::NAN]),
                TypedColumn::Categorical(vec![0, 1, 3]),
            ],
            labels: vec![None; 3],
            units: vec![[0; 16]; 3],
        }
    }

    /// By hand: bit 0 is the first question. A value at the threshold reaches it, a missing one reaches nothing.
    #[test]
    fn rows_end_in_the_leaves_that_their_answers_name() {
        assert_eq!(forest().leaves(&rows()).unwrap(), [3, 2, 0, 2, 2, 1]);
        let forest = forest().with_values(vec![0.0, 0.1, 0.2, 0.3, 1.0, 2.0, 4.0, 8.0]).unwrap();
        let logits = forest.logits(&rows()).unwrap();
        for (got, expected) in logits.iter().zip([0.5 + 0.3 + 4.0, 0.5 + 4.0, 0.5 + 0.2 + 2.0]) {
            assert!((got - expected).abs() < 1e-6, "{logits:?}");
        }
        assert!(forest.logits(&TypedBatch::default()).unwrap().is_empty());
        let of_first = forest.after(1).logits(&rows()).unwrap();
        for (got, expected) in of_first.iter().zip([0.5 + 0.3, 0.5, 0.5 + 0.2]) {
            assert!((got - expected).abs() < 1e-6, "{of_first:?}");
        }
        assert_eq!(forest.after(0).values(), [0.0; 8]);
        assert_eq!(forest.after(2), forest);
        assert_eq!(forest.after(usize::MAX), forest);
    }

    #[test]
    fn rows_of_other_columns_are_refused_by_name() {
        let mut other = rows();
        other.columns.swap(0, 1);
        let refused = forest().logits(&other).unwrap_err().to_string();
        assert!(refused.contains("column 0, expected numbers, got categories"), "{refused}");
        other.columns = vec![rows().columns.remove(0)];
        assert!(matches!(forest().logits(&other), Err(ForestError::Rows { .. })));
        other = rows();
        other.columns[1] = TypedColumn::Categorical(vec![0]);
        assert!(matches!(forest().logits(&other), Err(ForestError::Rows { .. })));
    }

    #[test]
    fn a_file_reads_as_it_was_written_and_a_spoilt_one_is_refused() {
        let good = forest().with_values(vec![0.25; 8]).unwrap();
        let text = serde_json::to_value(&good).unwrap();
        let read = |text: serde_json::Value| serde_json::from_value::<Forest>(text);
        assert_eq!(read(text.clone()).unwrap(), good);
        type Edit = fn(&mut serde_json::Value);
        let spoilt: [(Edit, &str); 5] = [
            (|t| t["values"].as_array_mut().unwrap().truncate(7), "leaf values"),
            (|t| t["trees"][1].as_array_mut().unwrap().truncate(1), "splits of a tree"),
            (|t| t["trees"] = serde_json::json!([]), "trees"),
            (|t| t["trees"][0][1]["one_of"]["codes"] = serde_json::json!([3, 0]), "splits"),
            (|t| t["trees"][0] = serde_json::json!([]), "depth"),
        ];
        for (edit, what) in spoilt {
            let mut text = text.clone();
            edit(&mut text);
            let refused = read(text).unwrap().check().unwrap_err().to_string();
            assert!(refused.starts_with(what), "{refused}");
        }
        let mut other = text;
        other["format"] = "tabmesh-forest-2".into();
        assert!(read(other).is_err());
        assert!(good.with_values(vec![f32::NAN; 8]).is_err());
    }
}
