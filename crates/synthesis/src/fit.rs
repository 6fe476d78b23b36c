//! From noisy tables to a proper distribution: P(label) · Π P(feature | parents, label).
//!
//! Owns the estimation. Whatever the noise, every conditional is non-negative and sums to 1; with zero noise it is
//! the exact relative frequency wherever there is a row to divide by.
//!
//! Steps, each post-processing: (1) all tables are reconciled, so each shared marginal uses every measurement of it;
//! (2) P(feature | class) and P(feature | parent cell) are drawn towards P(feature) by as much as noise can have made
//! of them ([`crate::signal`]); (3) P(feature | parent cells, class) is the distribution with these and no interaction
//! beyond, moved by 3-way counts where some were released and hold more than noise (module `clique`). Parents come
//! first, and those of a feature lie in one clique above it: their joint distribution is a sum over that clique, a message
//! along an edge of the junction tree.

use serde::{Deserialize, Serialize};
use tabmesh_privacy::release::MarginalTable;

use crate::SynthesisError;
use crate::clique::{Pairs, with_counts};
use crate::marginal::{self, cell_count, probabilities};
use crate::signal::{agreed_marginal, conditionals_by};
use crate::tree::{TreeStructure, family};

/// A distribution over cells and classes: tree-augmented naive Bayes, or wider cliques along the tree.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "StoredModel", into = "StoredModel")]
pub struct TreeModel {
    structure: TreeStructure,
    dims: Vec<usize>,
    classes: Vec<f64>,
    /// One per attribute, laid out `(class, parent cells, cell)`; empty for the label.
    conditionals: Vec<Vec<f64>>,
}

/// Fits the distribution of `structure` to noisy tables.
///
/// For every feature tables must cover `[feature, label]` and `[feature, parent]` of each parent: apart, or, for a feature with
/// one parent, together as `[feature, parent, label]`; further tables at the same resolution are welcome, they sharpen the marginals
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
    let mut joints: Vec<Option<MarginalTable>> = vec![None; attributes];
    // Parents come first.
    for &feature in structure.order() {
        by_class[feature] = conditionals_by(&tables, label, feature)?;
        dims[feature] = by_class[feature].first().map_or(0, Vec::len);
        let above = structure.above(feature);
        let own = match above.as_slice() {
            [] => classes.clone(),
            // What pairs say of a parent is what its clique was fitted to.
            [parent] => {
                let given = classes.iter().zip(&by_class[*parent]);
                given.flat_map(|(class, run)| run.iter().map(move |p| class * p)).collect()
            }
            _ => {
                let host = structure.host(feature).and_then(|host| joints[host].as_ref());
                let host = host.ok_or(SynthesisError::BadTree { attribute: feature })?;
                let wanted: Vec<usize> = [label].into_iter().chain(above.iter().copied()).collect();
                marginal::marginalise(host, &wanted)?.values
            }
        };
        conditionals[feature] = if above.is_empty() {
            by_class[feature].concat()
        } else {
            let by_parent = above
                .iter()
                .map(|parent| conditionals_by(&tables, *parent, feature))
                .collect::<Result<Vec<_>, _>>()?;
            let pairs = Pairs { own: &own, by_class: &by_class[feature], by_parent: &by_parent };
            let back_off = pairs.without_interaction();
            match agreed_marginal(&tables, &family(structure, feature)) {
                Ok(counts) => with_counts(&back_off, &counts.values, dims[feature], counts.variance),
                Err(SynthesisError::MissingMarginal { .. }) => back_off,
                Err(error) => return Err(error),
            }
        };
        let values: Vec<f64> = own
            .iter()
            .zip(conditionals[feature].chunks_exact(dims[feature].max(1)))
            .flat_map(|(mass, run)| run.iter().map(move |p| mass * p))
            .collect();
        let attributes = family(structure, feature);
        let dims = attributes.iter().map(|a| dims[*a]).collect();
        joints[feature] = Some(MarginalTable { attributes, dims, values, variance: 0.0 });
    }
    Ok(TreeModel { structure: structure.clone(), dims, classes, conditionals })
}

impl TreeModel {
    /// A model from its distributions: `classes` sums to 1, `conditionals[a]` is laid out
    /// `(class, parent cells, cell)` with each run over cells summing to 1, empty for the label.
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

    /// P(feature | parent cells, class) over the feature's cells; `above` is the number of the parents' cells, the last
    /// parent's side by side ([`TreeStructure::above`]), and ignored for a root.
    ///
    /// `None` if the attribute is the label or anything is out of range.
    #[must_use]
    pub fn conditional(&self, feature: usize, above: usize, class: usize) -> Option<&[f64]> {
        let cells = *self.dims.get(feature)?;
        let combinations = self.combinations(feature);
        let above = if self.structure.parent(feature).is_some() { above } else { 0 };
        if above >= combinations || class >= self.classes.len() || feature == self.structure.label() {
            return None;
        }
        let start = (class * combinations + above) * cells;
        self.conditionals[feature].get(start..start + cells)
    }

    /// Combinations of the parents' cells.
    pub(crate) fn combinations(&self, feature: usize) -> usize {
        self.structure.above(feature).iter().map(|parent| self.dims[*parent]).product()
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
            let parents = self.structure.above(feature);
            let above = parents.iter().try_fold(0_usize, |at, parent| {
                let own = cell(*parent);
                (own < self.dims[*parent]).then(|| at * self.dims[*parent] + own)
            });
            let run = above.and_then(|above| self.conditional(feature, above, class));
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
