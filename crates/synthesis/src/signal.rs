//! Noisy 2-way counts drawn towards independence, by as much as their noise can have made.
//!
//! Owns P(feature | other) from one table. Each group of counts (one cell of the other attribute) is compared with what
//! it would hold if the two were independent, n·P(cell). How far cells lie from that beyond the noise, relative to
//! what they would hold, is estimated over the group; every cell then keeps the share of its distance that this
//! explains: τ²m²/(τ²m² + σ²) with m the expected count. That is the empirical Bayes estimate under a normal prior
//! of relative standard deviation τ (Efron & Morris, *Stein's estimation rule and its competitors*, JASA 68, 1973,
//! §§ 2 and 8), so full cells keep what they say, almost empty ones follow the whole, and a group that noise could
//! have made gives way to it. Post-processing of released numbers.

use tabmesh_privacy::release::MarginalTable;

use crate::SynthesisError;
use crate::marginal::{best_marginal, probabilities, project_to_simplex};

/// Expected counts of `feature` by `other`, laid out `(other cell, feature cell)`; with the number of cells of `feature`.
///
/// `tables` agree with each other ([`crate::marginal::reconcile`]). Counts are not negative; each group keeps its released
/// total (0 if that is negative).
///
/// # Errors
/// [`SynthesisError::MissingMarginal`] if no table has both attributes; as [`best_marginal`].
pub fn counts_by(
    tables: &[MarginalTable],
    other: usize,
    feature: usize,
) -> Result<MarginalTable, SynthesisError> {
    let mut table = agreed_marginal(tables, &[other, feature])?;
    let alone = agreed_marginal(tables, &[feature])?;
    let cells = alone.values.len();
    let overall = overall(&alone);
    let groups = table.values.len() / cells.max(1);
    let totals: Vec<f64> =
        table.values.chunks_exact(cells).map(|group| group.iter().sum::<f64>().max(0.0)).collect();
    let all: f64 = totals.iter().sum::<f64>();
    for (group, total) in table.values.chunks_exact_mut(cells).zip(&totals) {
        let share = if all > 0.0 { total / all } else { 0.0 };
        // A cell's distance n(g, c) − share·n(c) holds its own noise and, with the share, that of all groups.
        let variance =
            table.variance * ((1.0 - share).powi(2) + share.powi(2) * groups.saturating_sub(1) as f64);
        let drawn = drawn_to(group, &overall, *total, variance);
        let sum: f64 = drawn.iter().sum();
        // Scaled to the group's total: a constant on every cell would drown the rare ones.
        let scale = if sum > 0.0 { total / sum } else { 0.0 };
        let kept = project_to_simplex(&drawn, sum);
        group.iter_mut().zip(kept).for_each(|(count, kept)| *count = scale * kept);
    }
    Ok(table)
}

/// P(feature | other), one run for each cell of `other`: [`counts_by`] with pseudo-rows of P(feature) behind them.
///
/// # Errors
/// As [`counts_by`].
pub(crate) fn conditionals_by(
    tables: &[MarginalTable],
    other: usize,
    feature: usize,
) -> Result<Vec<Vec<f64>>, SynthesisError> {
    let counts = counts_by(tables, other, feature)?;
    let overall = overall(&agreed_marginal(tables, &[feature])?);
    let pseudo = PAIR_PSEUDO_SDS * counts.variance.sqrt();
    Ok(counts
        .values
        .chunks_exact(overall.len())
        .map(|group| probabilities(group, &overall, pseudo))
        .collect())
}

/// P(cell) of a 1-way marginal.
pub(crate) fn overall(alone: &MarginalTable) -> Vec<f64> {
    probabilities(&alone.values, &[], ALONE_PSEUDO_SDS * alone.variance.sqrt())
}

/// A marginal of tables that agree, with the variance of all that were averaged for it.
///
/// Components that still other tables share are known better: the variance is an upper bound.
///
/// # Errors
/// As [`best_marginal`].
pub(crate) fn agreed_marginal(
    tables: &[MarginalTable],
    keep: &[usize],
) -> Result<MarginalTable, SynthesisError> {
    let mut marginal = best_marginal(tables, keep)?;
    let cells = marginal.values.len() as f64;
    let holders = tables.iter().filter(|table| keep.iter().all(|a| table.attributes.contains(a)));
    let precision: f64 = holders.map(|table| cells / (table.variance * table.values.len() as f64)).sum();
    marginal.variance = 1.0 / precision;
    Ok(marginal)
}

/// A group's counts, each drawn towards its share of `total` under independence.
fn drawn_to(group: &[f64], overall: &[f64], total: f64, variance: f64) -> Vec<f64> {
    let (mut beyond, mut scale) = (variance, 0.0);
    for (count, p) in group.iter().zip(overall) {
        let expected = total * p;
        beyond += (count - expected).powi(2) - variance;
        scale += expected.powi(2);
    }
    let relative = if scale > 0.0 { (beyond / scale).max(0.0) } else { 0.0 };
    let draw = |(count, p): (&f64, &f64)| {
        let expected = total * p;
        let signal = relative * expected.powi(2);
        let kept = if signal > 0.0 { signal / (signal + variance) } else { 0.0 };
        expected + kept * (count - expected)
    };
    group.iter().zip(overall).map(draw).collect()
}

/// Pseudo-rows behind a group of a 2-way table, in standard deviations of its cells' noise.
const PAIR_PSEUDO_SDS: f64 = 1.0;
/// Pseudo-rows behind a 1-way marginal, in standard deviations of its cells' noise.
const ALONE_PSEUDO_SDS: f64 = 0.25;

#[cfg(test)]
mod tests;
