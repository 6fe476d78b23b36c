//! From noisy tables to a proper distribution: P(label) · Π P(feature | parent, label).
//!
//! Owns the estimation. Whatever the noise, every conditional is non-negative and sums to 1; with zero noise it is
//! the exact relative frequency wherever there is a row to divide by.
//!
//! Steps, each post-processing: (1) all tables are reconciled, so each shared marginal uses every measurement of it;
//! (2) P(feature | class) and P(feature | parent cell) are drawn towards P(feature) by as much as noise can have made
//! of them ([`crate::signal`]); (3) P(feature | parent cell, class) is the distribution with these and no interaction
//! of all three, moved by 3-way counts where some were released and hold more than noise (module `clique`).

use serde::{Deserialize, Serialize};
use tabmesh_privacy::release::MarginalTable;

use crate::SynthesisError;
use crate::clique::{Pairs, with_counts};
use crate::marginal::{self, cell_count, probabilities};
use crate::signal::{agreed_marginal, conditionals_by};
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
/// For every feature tables must cover `[feature, label]` and, unless it is a root, `[feature, parent]`: apart, or
/// together as `[feature, parent, label]`; further tables at the same resolution are welcome, they sharpen the marginals
/// they share. Axes may be in any order.
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
    let counts = agreed_marginal(&tables, &[label])?;
    let classes = probabilities(&counts.values, &[], CLASS_PSEUDO_SDS * counts.variance.sqrt());
    let mut dims = vec![0; attributes];
    dims[label] = classes.len();
    let mut by_class = vec![Vec::new(); attributes];
    let mut conditionals = vec![Vec::new(); attributes];
    // Parents come first.
    for &feature in structure.order() {
        by_class[feature] = conditionals_by(&tables, label, feature)?;
        dims[feature] = by_class[feature].first().map_or(0, Vec::len);
        conditionals[feature] = match structure.parent(feature) {
            None => by_class[feature].concat(),
            Some(parent) => {
                let pairs = Pairs {
                    classes: &classes,
                    parent_by_class: &by_class[parent],
                    by_class: &by_class[feature],
                    by_parent: &conditionals_by(&tables, parent, feature)?,
                };
                let back_off = pairs.without_interaction();
                match agreed_marginal(&tables, &[label, parent, feature]) {
                    Ok(counts) => with_counts(&back_off, &counts.values, dims[feature], counts.variance),
                    Err(SynthesisError::MissingMarginal { .. }) => back_off,
                    Err(error) => return Err(error),
                }
            }
        };
    }
    Ok(TreeModel { structure: structure.clone(), dims, classes, conditionals })
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

/// Pseudo-rows spread over the classes, in standard deviations of a class count's noise.
const CLASS_PSEUDO_SDS: f64 = 0.25;

#[cfg(test)]
mod tests;
