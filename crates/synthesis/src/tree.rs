//! Which feature depends on which: a maximum spanning tree over noisy pair scores.
//!
//! Owns the score of a pair, the tree and the list of marginals the tree asks for. A pair's score is the L1 distance
//! of its noisy counts from the product of the *already released* 1-way marginals, as McKenna, Miklau & Sheldon
//! (*Winning the NIST Contest*, 2108.04978, MST) score edges, with one change: MST needs the exact counts
//! in one place for its exponential mechanism, while noisy counts sum over domains. So the noise is known, and
//! the L1 norm it would have alone is subtracted. Everything here is post-processing.
//!
//! The label is no node: it is a parent of every feature (tree-augmented naive Bayes, Friedman, Geiger & Goldszmidt,
//! *Bayesian Network Classifiers*, 1997, without its conditioning of the scores on the label, which would double
//! the cells of every pair).
//!
//! A tree can be widened into a junction tree: a feature gets parents beside its own, all of them from one clique above, which
//! is a feature placed before with its parents. That is the running intersection property (Lauritzen & Spiegelhalter, *Local
//! computations with probabilities on graphical structures*, 1988): sums over a clique are all that is needed of what is above.
//! The cells of the largest clique are bounded.

mod domain;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tabmesh_privacy::release::MarginalTable;

use crate::{SynthesisError, marginal};

/// How far a pair of features is from independence, according to noisy counts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PairScore {
    /// The lower attribute number.
    pub first: usize,
    /// The higher attribute number.
    pub second: usize,
    /// Noise-debiased L1 distance from independence, as a share of the total; 0 ± `noise` if independent, below 2.
    pub score: f64,
    /// What pure noise is expected to add to the L1 distance, as a share of the total; already subtracted.
    pub noise: f64,
    /// Standard deviation of `score` for independent features, as a share of the total.
    pub sd: f64,
}

impl PairScore {
    /// Whether noise alone is unlikely to have made the score.
    #[must_use]
    pub fn is_signal(&self) -> bool {
        self.score > SIGNAL_SDS * self.sd
    }
}

/// Scores every 2-way table in `pairs` against the product of 1-way tables at the same resolution.
///
/// Of several 1-way tables of one attribute the one with the least variance is used. All scores are 0 where
/// the released total is not above 0.
///
/// # Errors
/// As [`marginal::check`]; [`SynthesisError::BadAxes`] for a pair that is not 2-way;
/// [`SynthesisError::MissingMarginal`] for an attribute without 1-way table; [`SynthesisError::DimensionMismatch`]
/// if that table has another number of cells.
pub fn pair_scores(
    pairs: &[MarginalTable],
    one_way: &[MarginalTable],
) -> Result<Vec<PairScore>, SynthesisError> {
    if pairs.is_empty() {
        return Ok(Vec::new());
    }
    let total = marginal::total(one_way)?.value;
    pairs.iter().map(|pair| pair_score(pair, one_way, total)).collect()
}

fn pair_score(
    pair: &MarginalTable,
    one_way: &[MarginalTable],
    total: f64,
) -> Result<PairScore, SynthesisError> {
    marginal::check(pair)?;
    let (&[a, b], &[cells_a, cells_b]) = (pair.attributes.as_slice(), pair.dims.as_slice()) else {
        return Err(SynthesisError::BadAxes { attributes: pair.attributes.clone(), dims: pair.dims.clone() });
    };
    let own = |attribute: usize, expected: usize| {
        let table = marginal::best_marginal(one_way, &[attribute])?;
        let got = table.values.len();
        if got == expected {
            Ok(table)
        } else {
            Err(SynthesisError::DimensionMismatch { attribute, expected, got })
        }
    };
    let (rows, columns) = (own(a, cells_a)?, own(b, cells_b)?);
    let (first, second) = (a.min(b), a.max(b));
    if total.is_nan() || total < 1.0 {
        return Ok(PairScore { first, second, score: 0.0, noise: 0.0, sd: 0.0 });
    }
    let share = |table: &MarginalTable| marginal::probabilities(&table.values, &[], 0.0);
    let (share_a, share_b) = (share(&rows), share(&columns));
    let (mut distance, mut noise, mut variance) = (0.0, 0.0, 0.0);
    for (index, count) in pair.values.iter().enumerate() {
        let (p, q) = (share_a[index / cells_b], share_b[index % cells_b]);
        distance += (count - total * p * q).abs();
        // The product's own noise counts too: d(n_a·n_b/n) = q·dn_a + p·dn_b.
        let own = pair.variance + q * q * rows.variance + p * p * columns.variance;
        noise += own.sqrt();
        variance += own;
    }
    let noise = noise * MEAN_ABSOLUTE_NORMAL / total;
    let sd = (variance * (1.0 - MEAN_ABSOLUTE_NORMAL.powi(2))).sqrt() / total;
    Ok(PairScore { first, second, score: distance / total - noise, noise, sd })
}

/// A rooted forest over the features, with the label as a further parent of each; or a junction tree grown from one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ParentList", into = "ParentList")]
pub struct TreeStructure {
    label: usize,
    parent: Vec<Option<usize>>,
    /// Parents of each attribute beside its own.
    more: Vec<Vec<usize>>,
    order: Vec<usize>,
}

/// How wide a junction tree may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Width {
    /// Most parents of a feature beside the label; 1 is a tree.
    pub parents: usize,
    /// Most cells of a clique that a further parent makes: a feature, its parents and the label.
    pub cells: usize,
}

impl Width {
    /// So many parents, in cliques of at most [`MAX_CLIQUE_CELLS`].
    #[must_use]
    pub fn of(parents: usize) -> Self {
        Self { parents, cells: MAX_CLIQUE_CELLS }
    }
}

impl TreeStructure {
    /// A structure from one parent per attribute; the label's own entry is `None`, as is every root's.
    ///
    /// # Errors
    /// [`SynthesisError::UnknownAttribute`] if the label or a parent is out of range;
    /// [`SynthesisError::BadTree`] for a cycle, or where the label has or is a parent.
    pub fn new(label: usize, parent: Vec<Option<usize>>) -> Result<Self, SynthesisError> {
        let attributes = parent.len();
        if label >= attributes {
            return Err(SynthesisError::UnknownAttribute { got: label, attributes });
        }
        if let Some(&got) = parent.iter().flatten().find(|&&p| p >= attributes) {
            return Err(SynthesisError::UnknownAttribute { got, attributes });
        }
        let mut children = vec![Vec::new(); attributes];
        let mut order = Vec::with_capacity(attributes - 1);
        for (attribute, above) in parent.iter().enumerate() {
            match above {
                _ if attribute == label => {}
                Some(above) => children[*above].push(attribute),
                None => order.push(attribute),
            }
        }
        let mut next = 0;
        while let Some(&above) = order.get(next) {
            order.extend_from_slice(&children[above]);
            next += 1;
        }
        // Children of the label and members of cycles are reached from no root.
        let unplaced = (0..attributes).find(|a| (*a == label) == order.contains(a));
        match unplaced {
            None if parent[label].is_none() => {
                Ok(Self { label, more: vec![Vec::new(); attributes], parent, order })
            }
            _ => Err(SynthesisError::BadTree { attribute: unplaced.unwrap_or(label) }),
        }
    }

    /// The maximum spanning tree of the scored pairs over all attributes but the label.
    ///
    /// Equal scores are taken in order of `(first, second)`. Each tree is rooted at the feature with the highest
    /// sum of scores of its edges. Features that no scored pair connects become roots of their own, so a list
    /// without pairs gives naive Bayes.
    ///
    /// # Errors
    /// [`SynthesisError::UnknownAttribute`] or [`SynthesisError::BadTree`] for a pair of attributes that are not
    /// two different features; [`SynthesisError::BadScore`] for a NaN or infinite score.
    pub fn spanning(attributes: usize, label: usize, scores: &[PairScore]) -> Result<Self, SynthesisError> {
        let mut edges = Vec::with_capacity(scores.len());
        for &PairScore { first, second, score, .. } in scores {
            let got = first.max(second);
            if got >= attributes {
                return Err(SynthesisError::UnknownAttribute { got, attributes });
            }
            if first == second || first == label || second == label {
                return Err(SynthesisError::BadTree { attribute: first });
            }
            if !score.is_finite() {
                return Err(SynthesisError::BadScore { first, second, got: score });
            }
            edges.push((score, first.min(second), got));
        }
        edges.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));

        // Kruskal; `component` holds the smallest member's number.
        let mut component: Vec<usize> = (0..attributes).collect();
        let mut neighbours = vec![Vec::new(); attributes];
        let mut strength = vec![0.0; attributes];
        for (score, a, b) in edges {
            let (keep, gone) = (component[a].min(component[b]), component[a].max(component[b]));
            if keep == gone {
                continue;
            }
            component.iter_mut().filter(|c| **c == gone).for_each(|c| *c = keep);
            neighbours[a].push(b);
            neighbours[b].push(a);
            strength[a] += score;
            strength[b] += score;
        }

        let mut roots: BTreeMap<usize, usize> = BTreeMap::new();
        for attribute in (0..attributes).filter(|a| *a != label) {
            let root = roots.entry(component[attribute]).or_insert(attribute);
            if strength[attribute] > strength[*root] {
                *root = attribute;
            }
        }
        let mut parent = vec![None; attributes];
        let mut open: Vec<usize> = roots.into_values().collect();
        while let Some(above) = open.pop() {
            let from = parent[above];
            for &below in neighbours[above].iter().filter(|n| from != Some(**n)) {
                parent[below] = Some(above);
                open.push(below);
            }
        }
        Self::new(label, parent)
    }

    /// The junction tree that grows from this tree: each feature gets more parents from the clique above it that it depends on
    /// most, by the sum of the scores.
    ///
    /// `scores` are those of pairs that count as dependent, `cells` the attributes' numbers of cells. A parent that would take the
    /// feature's clique beyond the width is passed over.
    ///
    /// # Errors
    /// [`SynthesisError::LayoutMismatch`] unless there is one number of cells an attribute.
    pub fn widened(
        mut self,
        scores: &[PairScore],
        cells: &[usize],
        width: Width,
    ) -> Result<Self, SynthesisError> {
        let (expected, got) = (self.attributes(), cells.len());
        if got != expected {
            return Err(SynthesisError::LayoutMismatch { what: "numbers of cells", expected, got });
        }
        let scores: BTreeMap<(usize, usize), f64> =
            scores.iter().map(|s| ((s.first.min(s.second), s.first.max(s.second)), s.score)).collect();
        for (place, feature) in self.order.clone().into_iter().enumerate() {
            let Some(parent) = self.parent(feature) else { continue };
            let narrow =
                [feature, parent, self.label].iter().fold(1_usize, |n, a| n.saturating_mul(cells[*a]));
            let mut best: (f64, Vec<usize>) = (0.0, Vec::new());
            for above in &self.order[..place] {
                let clique = self.clique(*above);
                if !clique.contains(&parent) {
                    continue;
                }
                let scored = |other: &usize| {
                    let pair = (feature.min(*other), feature.max(*other));
                    scores.get(&pair).filter(|_| *other != parent).map(|score| (*score, *other))
                };
                let mut candidates: Vec<(f64, usize)> = clique.iter().filter_map(scored).collect();
                candidates.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)));
                let (mut sum, mut taken, mut size) = (0.0, Vec::new(), narrow);
                for (score, other) in candidates {
                    let wider = size.saturating_mul(cells[other]);
                    if taken.len() + 1 < width.parents && wider <= width.cells {
                        (sum, size) = (sum + score, wider);
                        taken.push(other);
                    }
                }
                if sum > best.0 {
                    best = (sum, taken);
                }
            }
            self.more[feature] = best.1;
        }
        Ok(self)
    }

    /// A feature with its parents.
    fn clique(&self, feature: usize) -> Vec<usize> {
        [feature].into_iter().chain(self.above(feature)).collect()
    }

    /// The first feature in order whose clique has all parents of another; nothing for a root.
    pub(crate) fn host(&self, feature: usize) -> Option<usize> {
        let above = self.above(feature);
        let before = self.order.iter().take_while(|other| **other != feature);
        let holds = |other: &&usize| {
            let clique = self.clique(**other);
            above.iter().all(|parent| clique.contains(parent))
        };
        before.filter(|_| !above.is_empty()).find(holds).copied()
    }

    /// Number of attributes, the label among them.
    #[must_use]
    pub fn attributes(&self) -> usize {
        self.parent.len()
    }

    /// Attribute number of the label.
    #[must_use]
    pub fn label(&self) -> usize {
        self.label
    }

    /// One entry per attribute: its parent feature; `None` for a root and for the label.
    #[must_use]
    pub fn parents(&self) -> &[Option<usize>] {
        &self.parent
    }

    /// The parent feature of an attribute, if it has one.
    #[must_use]
    pub fn parent(&self, attribute: usize) -> Option<usize> {
        self.parent.get(attribute).copied().flatten()
    }

    /// All parent features of an attribute, its own in the tree first; none for a root and for the label.
    #[must_use]
    pub fn above(&self, attribute: usize) -> Vec<usize> {
        let more = self.more.get(attribute).into_iter().flatten().copied();
        self.parent(attribute).into_iter().chain(more).collect()
    }

    /// All features, each after its parents; roots first.
    #[must_use]
    pub fn order(&self) -> &[usize] {
        &self.order
    }
}

/// A feature's clique in the order in which conditionals are laid out: the label, the parents, the feature.
pub(crate) fn family(structure: &TreeStructure, feature: usize) -> Vec<usize> {
    [structure.label()].into_iter().chain(structure.above(feature)).chain([feature]).collect()
}

/// The stored form of a [`TreeStructure`]; parsing goes through [`TreeStructure::new`].
#[derive(Serialize, Deserialize)]
struct ParentList {
    label: usize,
    parent: Vec<Option<usize>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    more: Vec<Vec<usize>>,
}

impl TryFrom<ParentList> for TreeStructure {
    type Error = SynthesisError;

    fn try_from(list: ParentList) -> Result<Self, SynthesisError> {
        let mut tree = Self::new(list.label, list.parent)?;
        if !list.more.is_empty() {
            let (expected, got) = (tree.attributes(), list.more.len());
            if got != expected {
                return Err(SynthesisError::LayoutMismatch {
                    what: "lists of further parents",
                    expected,
                    got,
                });
            }
            for feature in tree.order.clone() {
                tree.more[feature].clone_from(&list.more[feature]);
                let above = tree.above(feature);
                let distinct = above.iter().enumerate().all(|(at, a)| !above[..at].contains(a));
                let placed = if above.is_empty() {
                    list.more[feature].is_empty()
                } else {
                    tree.host(feature).is_some()
                };
                if !(distinct && placed) {
                    return Err(SynthesisError::BadTree { attribute: feature });
                }
            }
            if !list.more[tree.label].is_empty() {
                return Err(SynthesisError::BadTree { attribute: tree.label });
            }
        }
        Ok(tree)
    }
}

impl From<TreeStructure> for ParentList {
    fn from(structure: TreeStructure) -> Self {
        let TreeStructure { label, parent, mut more, .. } = structure;
        if more.iter().all(Vec::is_empty) {
            more.clear();
        }
        Self { label, parent, more }
    }
}

/// Most cells of a clique that a junction tree is widened to: half a megabyte.
pub const MAX_CLIQUE_CELLS: usize = 1 << 16;
/// A pair counts as dependent from so many standard deviations of what noise alone scores: about one in 700 independent
/// pairs does.
const SIGNAL_SDS: f64 = 3.0;
/// E|Z| of a standard normal variable, √(2/π).
pub(crate) const MEAN_ABSOLUTE_NORMAL: f64 = 0.797_884_560_802_865_4;

#[cfg(test)]
mod tests;
