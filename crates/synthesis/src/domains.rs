//! Domains as one more attribute of a release, where each domain's own noised tables are known.
//!
//! Owns what is particular to that attribute: tables of several domains become one with the domain as its first axis, which
//! sums to the table over all of them, and a feature counts as different where its pair with the domain is further from
//! independence than noise and the drawing of as many rows from one population can have made it ([`PairScore::is_signal`]).
//! Post-processing of released numbers.

use tabmesh_privacy::release::MarginalTable;

use crate::SynthesisError;
use crate::marginal::{best_marginal, cell_count, marginalise, probabilities};
use crate::tree::{PairScore, pair_scores};

/// Tables of the same attributes from each domain as tables over all, with the attribute `domain` as first axis and the domains
/// in order as its cells. The variance is the largest of the domains'.
///
/// # Errors
/// [`SynthesisError::NoMarginals`] without domains; [`SynthesisError::LayoutMismatch`] if domains have other numbers of tables,
/// [`SynthesisError::BadAxes`] if a table's attributes or cells aren't those of the first domain's;
/// [`SynthesisError::TooManyCells`] for what gets too large.
pub fn stacked(
    by_domain: &[Vec<MarginalTable>],
    domain: usize,
) -> Result<Vec<MarginalTable>, SynthesisError> {
    let first = by_domain.first().ok_or(SynthesisError::NoMarginals)?;
    if let Some(other) = by_domain.iter().find(|tables| tables.len() != first.len()) {
        let (expected, got) = (first.len(), other.len());
        return Err(SynthesisError::LayoutMismatch { what: "tables of a domain", expected, got });
    }
    let stack = |at: usize| {
        let alike = &first[at];
        let mut dims = vec![by_domain.len()];
        dims.extend_from_slice(&alike.dims);
        let mut attributes = vec![domain];
        attributes.extend_from_slice(&alike.attributes);
        let (mut values, mut variance) = (Vec::with_capacity(cell_count(&dims)?), 0.0_f64);
        for table in by_domain.iter().map(|tables| &tables[at]) {
            if table.attributes != alike.attributes || table.dims != alike.dims {
                let (attributes, dims) = (table.attributes.clone(), table.dims.clone());
                return Err(SynthesisError::BadAxes { attributes, dims });
            }
            values.extend_from_slice(&table.values);
            variance = variance.max(table.variance);
        }
        Ok(MarginalTable { attributes, dims, values, variance })
    };
    (0..first.len()).map(stack).collect()
}

/// Attributes whose distribution differs from domain to domain by more than noise and chance can have made, in the order of
/// `attributes`.
///
/// `tables` have the attribute `domain` as an axis ([`stacked`]) and cover each attribute.
///
/// # Errors
/// As [`best_marginal`] and [`pair_scores`].
pub fn differing(
    tables: &[MarginalTable],
    domain: usize,
    attributes: &[usize],
) -> Result<Vec<usize>, SynthesisError> {
    let alone = best_marginal(tables, &[domain])?;
    let mut found = Vec::new();
    for &attribute in attributes {
        let mut pair = best_marginal(tables, &[domain, attribute])?;
        let one_way = [marginalise(&pair, &[attribute])?, alone.clone()];
        pair.variance += drawn(&one_way[0], &alone);
        if pair_scores(&[pair], &one_way)?.iter().any(PairScore::is_signal) {
            found.push(attribute);
        }
    }
    Ok(found)
}

/// Variance that the drawing of rows alone gives a cell of an independent pair, n·p(1 − p)·q(1 − q), in the mean over cells.
fn drawn(attribute: &MarginalTable, domain: &MarginalTable) -> f64 {
    let spread = |table: &MarginalTable| {
        let shares = probabilities(&table.values, &[], 0.0);
        shares.iter().map(|p| p * (1.0 - p)).sum::<f64>() / shares.len().max(1) as f64
    };
    domain.values.iter().sum::<f64>().max(0.0) * spread(attribute) * spread(domain)
}

#[cfg(test)]
mod tests;
