//! From noisy tables to a proper distribution: P(label) · Π P(feature | parent, label).
//!
//! Owns the estimation. Whatever the noise, every conditional is non-negative and sums to 1; with zero noise it is
//! the exact relative frequency wherever there is a row to divide by.
//!
//! Steps, each post-processing: (1) all tables are reconciled, so each shared marginal uses every measurement of it;
//! (2) each column of counts n(· | parent cell, class) is projected on the non-negative counts with its own
//! total, which takes a constant off every cell and zeroes what noise alone could have made; (3) the column is scaled
//! by the share of its squared distance from the back-off that noise doesn't explain (positive-part James–Stein),
//! so a column that noise could have made of the back-off gives way to it; (4) pseudo-rows of the back-off are
//! added, half a standard deviation of the noise. The back-off is the even mixture of P(feature | class)
//! and P(feature | parent cell), themselves backed off to P(feature), and that to uniform.

use serde::{Deserialize, Serialize};
use tabmesh_privacy::release::MarginalTable;

use crate::SynthesisError;
use crate::marginal::{self, best_marginal, cell_count, probabilities, project_to_simplex};
use crate::tree::{TreeStructure, family};

/// A tree-augmented naive Bayes distribution over cells and classes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "StoredModel", into = "StoredModel")]
pub struct TreeModel {
    structure: TreeStructure,
    dims: Vec<usize>,
    classes: Vec<f64>,
    /// One per attribute, laid out `(class, parent cell, cell)`; empty for the label.
    conditionals: Vec<Vec<f64>>,
}

/// Fits the distribution of `structure` to noisy tables.
///
/// For every feature some table must cover `[feature, parent, label]` (or `[feature, label]` for a root); further
/// tables at the same resolution are welcome, they sharpen the marginals they share. Axes may be in any order.
///
/// # Errors
/// As [`marginal::reconcile`]; [`SynthesisError::MissingMarginal`] for a feature without table;
/// [`SynthesisError::UnknownAttribute`] for a table that leaves the structure.
pub fn fit(structure: &TreeStructure, tables: &[MarginalTable]) -> Result<TreeModel, SynthesisError> {
    let attributes = structure.attributes();
    if let Some(&got) = tables.iter().flat_map(|t| &t.attributes).find(|&&a| a >= attributes) {
        return Err(SynthesisError::UnknownAttribute { got, attributes });
    }
    let mut tables = tables.to_vec();
    marginal::reconcile(&mut tables)?;

    let label = structure.label();
    let counts = best_marginal(&tables, &[label])?;
    let classes = probabilities(&counts.values, &[], CLASS_PSEUDO_SDS * counts.variance.sqrt());
    let mut dims = vec![0; attributes];
    dims[label] = classes.len();
    let mut conditionals = vec![Vec::new(); attributes];
    for &feature in structure.order() {
        let (cells, conditional) = fit_feature(structure, &tables, feature)?;
        dims[feature] = cells;
        conditionals[feature] = conditional;
    }
    Ok(TreeModel { structure: structure.clone(), dims, classes, conditionals })
}

/// P(feature | parent, label) laid out `(class, parent cell, cell)`, with the feature's number of cells.
fn fit_feature(
    structure: &TreeStructure,
    tables: &[MarginalTable],
    feature: usize,
) -> Result<(usize, Vec<f64>), SynthesisError> {
    let mut axes = family(structure, feature);
    axes.reverse();
    let counts = best_marginal(tables, &axes)?;
    let alone = best_marginal(tables, &[feature])?;
    let cells = alone.values.len();
    let overall = probabilities(&alone.values, &[], MARGIN_PSEUDO_SDS * alone.variance.sqrt());
    let given = |other: usize| -> Result<Vec<Vec<f64>>, SynthesisError> {
        let table = best_marginal(tables, &[other, feature])?;
        let pseudo = MARGIN_PSEUDO_SDS * table.variance.sqrt();
        Ok(table.values.chunks_exact(cells).map(|column| probabilities(column, &overall, pseudo)).collect())
    };
    let by_class = given(structure.label())?;
    let Some(parent) = structure.parent(feature) else {
        return Ok((cells, by_class.concat()));
    };
    let by_parent = given(parent)?;
    let pseudo = CELL_PSEUDO_SDS * counts.variance.sqrt();
    let mut conditional = Vec::with_capacity(counts.values.len());
    for (index, column) in counts.values.chunks_exact(cells).enumerate() {
        let class = &by_class[index / by_parent.len()];
        let above = &by_parent[index % by_parent.len()];
        let back_off: Vec<f64> = class.iter().zip(above).map(|(p, q)| 0.5 * (p + q)).collect();
        conditional.extend(probabilities(&shrunk(column, &back_off, counts.variance), &back_off, pseudo));
    }
    Ok((cells, conditional))
}

/// A noisy column made non-negative, scaled by the share of its squared distance from `back_off` that is not noise.
fn shrunk(column: &[f64], back_off: &[f64], variance: f64) -> Vec<f64> {
    let rows = column.iter().sum::<f64>().max(0.0);
    let distance: f64 = column.iter().zip(back_off).map(|(n, p)| (n - rows * p).powi(2)).sum();
    let noise = variance * column.len() as f64;
    let share = if noise > 0.0 { (1.0 - noise / distance).max(0.0) } else { 1.0 };
    project_to_simplex(column, rows).into_iter().map(|n| n * share).collect()
}

impl TreeModel {
    /// A model from its distributions: `classes` sums to 1, `conditionals[a]` is laid out
    /// `(class, parent cell, cell)` with each run over cells summing to 1, empty for the label.
    ///
    /// # Errors
    /// [`SynthesisError::LayoutMismatch`] if the lengths don't fit `structure` and `dims`, or a
    /// distribution is negative or doesn't sum to 1 within 1e-9; [`SynthesisError::TooManyCells`].
    pub fn new(
        structure: TreeStructure,
        dims: Vec<usize>,
        classes: Vec<f64>,
        conditionals: Vec<Vec<f64>>,
    ) -> Result<Self, SynthesisError> {
        let mismatch = |what, expected, got| Err(SynthesisError::LayoutMismatch { what, expected, got });
        let attributes = structure.attributes();
        if dims.len() != attributes {
            return mismatch("dimensions", attributes, dims.len());
        }
        if conditionals.len() != attributes {
            return mismatch("conditionals", attributes, conditionals.len());
        }
        if classes.len() != dims[structure.label()] || !sums_to_one(&classes) {
            return mismatch(
                "classes with probabilities that sum to 1",
                dims[structure.label()],
                classes.len(),
            );
        }
        for &feature in structure.order() {
            let axes: Vec<usize> = family(&structure, feature).iter().map(|&a| dims[a]).collect();
            let (expected, got) = (cell_count(&axes)?, conditionals[feature].len());
            let proper = got == expected
                && got > 0
                && conditionals[feature].chunks_exact(dims[feature]).all(sums_to_one);
            if !proper {
                return mismatch("conditional probabilities that sum to 1", expected, got);
            }
        }
        Ok(Self { structure, dims, classes, conditionals })
    }

    /// The forest and label the model is built on.
    #[must_use]
    pub fn structure(&self) -> &TreeStructure {
        &self.structure
    }

    /// Cells of each attribute, the label's classes among them.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// P(label), one entry per class.
    #[must_use]
    pub fn classes(&self) -> &[f64] {
        &self.classes
    }

    /// P(feature | parent cell, class) over the feature's cells; `parent` is ignored for a root.
    ///
    /// `None` if the attribute is the label or anything is out of range.
    #[must_use]
    pub fn conditional(&self, feature: usize, parent: usize, class: usize) -> Option<&[f64]> {
        let cells = *self.dims.get(feature)?;
        let (parents, parent) = match self.structure.parent(feature) {
            Some(above) => (self.dims[above], parent),
            None => (1, 0),
        };
        if parent >= parents || class >= self.classes.len() || feature == self.structure.label() {
            return None;
        }
        let start = (class * parents + parent) * cells;
        self.conditionals[feature].get(start..start + cells)
    }

    /// ln P(cells, class) of one row; `cells` has one entry per attribute, the label's is the class.
    ///
    /// Negative infinity for a row the model excludes or that is out of range.
    #[must_use]
    pub fn log_likelihood(&self, cells: &[u32]) -> f64 {
        let cell = |attribute: usize| cells.get(attribute).map_or(usize::MAX, |&c| c as usize);
        let class = cell(self.structure.label());
        let mut sum = self.classes.get(class).map_or(f64::NEG_INFINITY, |p| p.ln());
        if class >= self.classes.len() {
            return sum;
        }
        for &feature in self.structure.order() {
            let parent = self.structure.parent(feature).map_or(0, cell);
            let run = self.conditional(feature, parent, class);
            sum += run.and_then(|p| p.get(cell(feature))).map_or(f64::NEG_INFINITY, |p| p.ln());
        }
        sum
    }
}

fn sums_to_one(run: &[f64]) -> bool {
    run.iter().all(|p| *p >= 0.0) && (run.iter().sum::<f64>() - 1.0).abs() < 1e-9
}

/// The stored form of a [`TreeModel`]; parsing goes through [`TreeModel::new`].
#[derive(Serialize, Deserialize)]
struct StoredModel {
    structure: TreeStructure,
    dims: Vec<usize>,
    classes: Vec<f64>,
    conditionals: Vec<Vec<f64>>,
}

impl TryFrom<StoredModel> for TreeModel {
    type Error = SynthesisError;

    fn try_from(stored: StoredModel) -> Result<Self, SynthesisError> {
        Self::new(stored.structure, stored.dims, stored.classes, stored.conditionals)
    }
}

impl From<TreeModel> for StoredModel {
    fn from(model: TreeModel) -> Self {
        let TreeModel { structure, dims, classes, conditionals } = model;
        Self { structure, dims, classes, conditionals }
    }
}

/// Pseudo-rows of back-off per (parent cell, class), in standard deviations of a 3-way cell's noise.
const CELL_PSEUDO_SDS: f64 = 0.5;
/// Pseudo-rows behind a 2-way or 1-way marginal, in standard deviations of its cells' noise.
const MARGIN_PSEUDO_SDS: f64 = 0.25;
/// Pseudo-rows spread over the classes, in standard deviations of a class count's noise.
const CLASS_PSEUDO_SDS: f64 = 0.25;

#[cfg(test)]
mod tests;
