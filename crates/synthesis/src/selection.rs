//! What the last stage of a release is to measure: the pairs and triples whose signal is more than their noise.
//!
//! Owns the choice of the tree from pair statistics, and that of the marginals from the tree. Both read released
//! numbers alone, so they cost nothing, and both sides of a federation can make them from the same sums; AIM (McKenna et
//! al., *AIM: An Adaptive and Iterative Mechanism*, 2201.12677) weighs the same two things, on exact counts.

use tabmesh_privacy::release::{Attribute, MarginalSpec, MarginalTable};

use crate::SynthesisError;
use crate::marginal::{best_marginal, marginalise, recut};
use crate::tree::{MEAN_ABSOLUTE_NORMAL, PairScore, TreeStructure, Width, pair_scores};

/// The tree of the pairs of features that noise can't have made, widened as far as `width` lets it; the label stands after
/// the features.
///
/// `fine` are the 1-way tables of the features at the cells of `asked`, `pairs` the 2-way tables at those of `coarse`,
/// each attribute at its feature's place; `cells` are the attributes' numbers of cells in the last stage, the label's among
/// them. Features that depend on no other become roots.
///
/// # Errors
/// [`SynthesisError::MissingMarginal`] for a feature without 1-way table; as [`recut`], [`pair_scores`] and
/// [`TreeStructure::spanning`] and [`TreeStructure::widened`].
pub fn structure(
    fine: &[MarginalTable],
    asked: &[Attribute],
    coarse: &[Attribute],
    pairs: &[MarginalTable],
    (cells, width): (&[usize], Width),
) -> Result<TreeStructure, SynthesisError> {
    let features = coarse.len();
    let mut one_way = Vec::with_capacity(features);
    for (at, to) in coarse.iter().enumerate() {
        let missing = || SynthesisError::MissingMarginal { attributes: vec![at] };
        let table = fine.iter().find(|table| table.attributes == [at]).ok_or_else(missing)?;
        one_way.push(recut(table, at, asked.get(at).ok_or_else(missing)?, to)?);
    }
    let pairs: Vec<MarginalTable> =
        pairs.iter().filter(|table| table.attributes.len() == 2).cloned().collect();
    let mut scores = pair_scores(&pairs, &one_way)?;
    scores.retain(PairScore::is_signal);
    TreeStructure::spanning(features + 1, features, &scores)?.widened(&scores, cells, width)
}

/// Whether each feature's counts by label are further from independence than noise can have made them; `by_label` covers
/// (feature, label) of every feature before `label`.
///
/// # Errors
/// As [`best_marginal`] and [`pair_scores`].
pub fn informative(by_label: &[MarginalTable], label: usize) -> Result<Vec<bool>, SynthesisError> {
    let classes = best_marginal(by_label, &[label])?;
    let of_feature = |feature: usize| {
        let pair = best_marginal(by_label, &[feature, label])?;
        let one_way = [marginalise(&pair, &[feature])?, classes.clone()];
        Ok(pair_scores(&[pair], &one_way)?.iter().any(PairScore::is_signal))
    };
    (0..label).map(of_feature).collect()
}

/// The marginals to measure for a tree: each feature that `with_label` names with the label and each with its parents, or all three
/// at once where there is one parent and that many cells bear the noise. If that is nothing, each feature with the label.
///
/// `cells` has the attributes' numbers of cells, the label's among them; `total` is the number of rows; `variance_each` is
/// what every marginal of the stage adds to the variance of a cell's noise.
#[must_use]
pub fn marginals(
    tree: &TreeStructure,
    (cells, with_label): (&[usize], &[bool]),
    total: f64,
    variance_each: f64,
) -> Vec<MarginalSpec> {
    let label = tree.label();
    let edges: usize = tree.order().iter().map(|feature| tree.above(*feature).len()).sum();
    let named = |feature: usize| with_label.get(feature).is_some_and(|named| *named);
    let some = edges > 0 || tree.order().iter().any(|feature| named(*feature));
    let by_label = |feature: usize| named(feature) || !some;
    let labels = tree.order().iter().filter(|feature| by_label(**feature)).count();
    let sd = (variance_each * (labels + edges) as f64).sqrt();
    let bears = |attributes: &[usize]| {
        let cells: f64 =
            attributes.iter().map(|&at| cells.get(at).map_or(1.0, |&cells| cells as f64)).product();
        MEAN_ABSOLUTE_NORMAL * sd * cells <= MOST_NOISE * total
    };
    let mut asked = Vec::with_capacity(tree.order().len() + edges);
    for &feature in tree.order() {
        match tree.above(feature).as_slice() {
            [parent] if by_label(feature) && bears(&[feature, *parent, label]) => {
                asked.push(vec![feature, *parent, label]);
            }
            above => {
                if by_label(feature) {
                    asked.push(vec![feature, label]);
                }
                asked.extend(above.iter().map(|parent| vec![feature, *parent]));
            }
        }
    }
    asked.into_iter().map(|attributes| MarginalSpec { attributes }).collect()
}

/// A 3-way table is measured if noise is expected to add no more than this to its L1 distance, as a share of the rows.
const MOST_NOISE: f64 = 0.1;

#[cfg(test)]
mod tests;
