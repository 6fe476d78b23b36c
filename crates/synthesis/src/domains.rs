//! Domains as one more attribute of a release, where each domain's own noised tables are known.
//!
//! Owns what is particular to that attribute: tables of several domains become one with the domain as its first axis, which
//! sums to the table over all of them, and a feature counts as different where its pair with the domain is further from
//! independence than noise and the drawing of as many rows from one population can have made it. Post-processing of released numbers.

use tabmesh_privacy::release::MarginalTable;

use crate::SynthesisError;
use crate::marginal::{best_marginal, cell_count, marginalise, probabilities};

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
/// As [`best_marginal`].
pub fn differing(
    tables: &[MarginalTable],
    domain: usize,
    attributes: &[usize],
) -> Result<Vec<usize>, SynthesisError> {
    let mut found = Vec::new();
    for &attribute in attributes {
        let pair = best_marginal(tables, &[domain, attribute])?;
        if depends(&pair)? {
            found.push(attribute);
        }
    }
    Ok(found)
}

/// Whether a pair's cells lie further from the product of its sums than noise of its variance and the drawing of its rows can
/// have made them.
///
/// The squared distance is compared with what both make of it, Σ(σ² + n·p·q)(1 − p)(1 − q), as a chi-square of (rows − 1)·(columns − 1)
/// degrees (Pearson 1900), whose upper tail is Wilson and Hilferty's (1931).
fn depends(pair: &MarginalTable) -> Result<bool, SynthesisError> {
    let (&[first, second], &[rows, columns]) = (pair.attributes.as_slice(), pair.dims.as_slice()) else {
        return Err(SynthesisError::BadAxes { attributes: pair.attributes.clone(), dims: pair.dims.clone() });
    };
    let share = |attribute: usize| -> Result<Vec<f64>, SynthesisError> {
        Ok(probabilities(&marginalise(pair, &[attribute])?.values, &[], 0.0))
    };
    let (of_rows, of_columns) = (share(first)?, share(second)?);
    let total = pair.values.iter().sum::<f64>().max(0.0);
    let (mut distance, mut chance) = (0.0, 0.0);
    for (cell, count) in pair.values.iter().enumerate() {
        let (p, q) = (of_rows[cell / columns], of_columns[cell % columns]);
        distance += (count - total * p * q).powi(2);
        chance += (pair.variance + total * p * q) * (1.0 - p) * (1.0 - q);
    }
    let degrees = (rows.saturating_sub(1) * columns.saturating_sub(1)) as f64;
    let ninth = 2.0 / (9.0 * degrees);
    Ok(degrees > 0.0 && distance > chance * (1.0 - ninth + SIGNAL_SDS * ninth.sqrt()).powi(3))
}

/// Standard deviations beyond chance from which a pair counts: about one in 700 pairs that don't depend does.
const SIGNAL_SDS: f64 = 3.0;

#[cfg(test)]
mod tests;
