//! Operations on noisy count tables: sums, totals, reconciliation, and the way from counts to probabilities.
//!
//! Owns everything that needs no model: all of it is post-processing of released numbers and costs no privacy.
//! Refuses tables whose shape, counts or variance make no sense; never clamps before it has averaged, since
//! clamping biases sums upwards.
//!
//! Reconciliation is the exact generalised least squares estimate, without any linear solver. A table with equal
//! independent noise measures every interaction component (total, main effects, pairs, …) of its attributes
//! with noise that is independent between components, so each component is averaged by inverse variance over
//! the tables that hold it. Components come in groups: those of one group are held by the same tables, and a
//! group is an intersection of tables' attribute sets. Going through the intersections from small to large and
//! spreading each correction evenly over the cells it sums (the consistency step of Qardaji, Yang & Li, *PriView*,
//! 2014; the decomposition of Xiao et al., *ResidualPlanner*, 2305.08175) leaves earlier steps untouched.

use std::collections::BTreeSet;

use tabmesh_privacy::release::{Attribute, Binning, MarginalTable};

use crate::SynthesisError;

/// A number with the variance of its noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The value, in rows.
    pub value: f64,
    /// Variance of its noise, in rows²; 0 = exact.
    pub variance: f64,
}

/// Checks the shape, counts and variance of a table.
///
/// # Errors
/// [`SynthesisError::BadAxes`], [`SynthesisError::TooManyCells`], [`SynthesisError::CellCount`] or
/// [`SynthesisError::NotFinite`].
pub fn check(table: &MarginalTable) -> Result<(), SynthesisError> {
    let MarginalTable { attributes, dims, values, variance } = table;
    let distinct: BTreeSet<_> = attributes.iter().collect();
    if attributes.is_empty()
        || distinct.len() != attributes.len()
        || dims.len() != attributes.len()
        || dims.contains(&0)
    {
        return Err(SynthesisError::BadAxes { attributes: attributes.clone(), dims: dims.clone() });
    }
    let expected = cell_count(dims)?;
    if values.len() != expected {
        return Err(SynthesisError::CellCount {
            attributes: attributes.clone(),
            expected,
            got: values.len(),
        });
    }
    if !(variance.is_finite() && *variance >= 0.0 && values.iter().all(|v| v.is_finite())) {
        return Err(SynthesisError::NotFinite { attributes: attributes.clone() });
    }
    Ok(())
}

/// Sums a table over every attribute not in `keep`; the result's axes are in the order of `keep`.
///
/// The variance of a cell of the result is that of the table times the number of cells summed.
///
/// # Errors
/// As [`check`]; [`SynthesisError::MissingMarginal`] if `keep` names an attribute the table doesn't have,
/// [`SynthesisError::BadAxes`] if it is empty or names one twice.
pub fn marginalise(table: &MarginalTable, keep: &[usize]) -> Result<MarginalTable, SynthesisError> {
    check(table)?;
    let axes = axes_of(table, keep)?;
    let dims: Vec<usize> = axes.iter().map(|&axis| table.dims[axis]).collect();
    if keep.is_empty() || keep.iter().collect::<BTreeSet<_>>().len() != keep.len() {
        return Err(SynthesisError::BadAxes { attributes: keep.to_vec(), dims });
    }
    let values = collapse(table, &axes);
    let summed = table.values.len() / values.len();
    Ok(MarginalTable { attributes: keep.to_vec(), dims, values, variance: table.variance * summed as f64 })
}

/// Sums cells of one attribute into coarser ones: cell `c` goes to cell `groups[c]` of `cells` new cells.
///
/// The new cells sum different numbers of old ones; the variance of the result is their mean variance.
///
/// # Errors
/// As [`check`]; [`SynthesisError::MissingMarginal`] if the table doesn't have the attribute,
/// [`SynthesisError::BadGroups`] unless `groups` has one entry below `cells` for each cell of the attribute.
pub fn merge_cells(
    table: &MarginalTable,
    attribute: usize,
    groups: &[usize],
    cells: usize,
) -> Result<MarginalTable, SynthesisError> {
    check(table)?;
    let axis = axes_of(table, &[attribute])?[0];
    let fine = table.dims[axis];
    if groups.len() != fine || cells == 0 || groups.iter().any(|&g| g >= cells) {
        return Err(SynthesisError::BadGroups { attribute, expected: fine, groups: cells });
    }
    let mut dims = table.dims.clone();
    dims[axis] = cells;
    let inner: usize = dims[axis + 1..].iter().product();
    let mut values = vec![0.0; cell_count(&dims)?];
    for (index, value) in table.values.iter().enumerate() {
        let (outer, rest) = (index / (fine * inner), index % (fine * inner));
        values[(outer * cells + groups[rest / inner]) * inner + rest % inner] += value;
    }
    let variance = table.variance * fine as f64 / cells as f64;
    Ok(MarginalTable { attributes: table.attributes.clone(), dims, values, variance })
}

/// Sums the cells of an unmerged attribute into those of another cut of it: fewer edges, merged bins or levels.
///
/// `from` describes the table's cells, `to` the wanted ones. Bins are placed by their lower bound, so `to` should
/// cut only where `from` does.
///
/// # Errors
/// As [`merge_cells`]; [`SynthesisError::LayoutMismatch`] if one is numeric and the other is not, or `from`
/// is merged.
pub fn recut(
    table: &MarginalTable,
    attribute: usize,
    from: &Attribute,
    to: &Attribute,
) -> Result<MarginalTable, SynthesisError> {
    let cells = from.fine_cells();
    let numeric = |a: &Attribute| matches!(a.binning, Binning::Edges { .. });
    if numeric(from) != numeric(to) || from.merge.is_some() {
        return Err(SynthesisError::LayoutMismatch {
            what: "unmerged cells of the same kind",
            expected: cells,
            got: from.cells(),
        });
    }
    let place = |fine: usize| match from.bin_bounds(fine) {
        Some((lower, _)) => to.merged(to.fine_cell_of(lower)),
        None if numeric(to) => to.merged(to.fine_cell_of(f64::NAN)),
        None => to.merged(fine),
    };
    merge_cells(table, attribute, &(0..cells).map(place).collect::<Vec<_>>(), to.cells())
}

/// The total number of rows by inverse variance over all tables, which need not share attributes or resolution.
///
/// # Errors
/// As [`check`] for each table; [`SynthesisError::NoMarginals`] for an empty list.
pub fn total(tables: &[MarginalTable]) -> Result<Estimate, SynthesisError> {
    let mut sums = Vec::with_capacity(tables.len());
    for table in tables {
        check(table)?;
        let variance = table.variance * table.values.len() as f64;
        sums.push(Estimate { value: table.values.iter().sum(), variance });
    }
    let variances: Vec<f64> = sums.iter().map(|s| s.variance).collect();
    let (weights, variance) = inverse_variance(&variances).ok_or(SynthesisError::NoMarginals)?;
    Ok(Estimate { value: sums.iter().zip(&weights).map(|(s, w)| s.value * w).sum(), variance })
}

/// The lowest-variance table over exactly `keep` (in that order) that `tables` can give by summing.
///
/// # Errors
/// As [`marginalise`]; [`SynthesisError::MissingMarginal`] if no table has all attributes of `keep`.
pub fn best_marginal(tables: &[MarginalTable], keep: &[usize]) -> Result<MarginalTable, SynthesisError> {
    let implied = |table: &MarginalTable| table.variance * table.values.len() as f64;
    let best = tables
        .iter()
        .filter(|table| keep.iter().all(|a| table.attributes.contains(a)))
        .min_by(|a, b| implied(a).total_cmp(&implied(b)))
        .ok_or_else(|| SynthesisError::MissingMarginal { attributes: keep.to_vec() })?;
    marginalise(best, keep)
}

/// Makes overlapping tables agree on every marginal they share, at the generalised least squares estimate.
///
/// Afterwards any two tables give the same sums over their common attributes, and the same total. Counts may
/// be negative before and after. Each table's `variance` is left as released: an upper bound from now on.
///
/// # Errors
/// As [`check`] for each table; [`SynthesisError::NoMarginals`] for an empty list;
/// [`SynthesisError::DimensionMismatch`] if an attribute has different numbers of cells in two tables.
pub fn reconcile(tables: &mut [MarginalTable]) -> Result<(), SynthesisError> {
    if tables.is_empty() {
        return Err(SynthesisError::NoMarginals);
    }
    let mut cells = std::collections::BTreeMap::new();
    for table in tables.iter() {
        check(table)?;
        for (&attribute, &got) in table.attributes.iter().zip(&table.dims) {
            let expected = *cells.entry(attribute).or_insert(got);
            if expected != got {
                return Err(SynthesisError::DimensionMismatch { attribute, expected, got });
            }
        }
    }
    for shared in closed_intersections(tables) {
        let shared: Vec<usize> = shared.into_iter().collect();
        agree_on(tables, &shared);
    }
    Ok(())
}

/// The Euclidean projection of `counts` on the non-negative tables with the sum `total` (maximum likelihood
/// under equal Gaussian noise): a constant is taken off every cell and what falls below 0 is set to 0.
///
/// All zeros if `total` is not above 0.
#[must_use]
pub fn project_to_simplex(counts: &[f64], total: f64) -> Vec<f64> {
    if total.is_nan() || total <= 0.0 || counts.is_empty() {
        return vec![0.0; counts.len()];
    }
    let mut sorted = counts.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut shift) = (0.0, 0.0);
    for (rank, value) in sorted.iter().enumerate() {
        sum += value;
        let candidate = (sum - total) / (rank + 1) as f64;
        if *value <= candidate {
            break;
        }
        shift = candidate;
    }
    counts.iter().map(|value| (value - shift).max(0.0)).collect()
}

/// Turns noisy counts into probabilities: projection on their own total, then `pseudo_rows` rows of `prior`.
///
/// Never negative, sums to 1. Where nothing is left of the counts, the result is `prior`. A prior of another length
/// than `counts`, such as an empty one, or without mass counts as uniform.
#[must_use]
pub fn probabilities(counts: &[f64], prior: &[f64], pseudo_rows: f64) -> Vec<f64> {
    let own = project_to_simplex(counts, counts.iter().sum());
    let mass: f64 = prior.iter().sum();
    let uniform = 1.0 / counts.len().max(1) as f64;
    let usable = prior.len() == counts.len() && mass > 0.0;
    let prior = |i: usize| if usable { prior[i] / mass } else { uniform };
    // The sum of the projection is positive or exactly 0; tiny positive sums must not overflow the quotient.
    let sum: f64 = own.iter().sum::<f64>() + pseudo_rows.max(0.0);
    if sum < f64::MIN_POSITIVE * 1e20 {
        return (0..counts.len()).map(prior).collect();
    }
    let mut out: Vec<f64> =
        own.iter().enumerate().map(|(i, n)| (n + pseudo_rows.max(0.0) * prior(i)) / sum).collect();
    let norm: f64 = out.iter().sum();
    out.iter_mut().for_each(|p| *p /= norm);
    out
}

/// Number of cells of a table with these dimensions.
///
/// # Errors
/// [`SynthesisError::TooManyCells`] above [`MAX_CELLS`].
pub fn cell_count(dims: &[usize]) -> Result<usize, SynthesisError> {
    let got = dims.iter().try_fold(1_usize, |n, &d| n.checked_mul(d)).unwrap_or(usize::MAX);
    if got > MAX_CELLS { Err(SynthesisError::TooManyCells { got, limit: MAX_CELLS }) } else { Ok(got) }
}

/// Positions of `keep` among the table's attributes.
fn axes_of(table: &MarginalTable, keep: &[usize]) -> Result<Vec<usize>, SynthesisError> {
    keep.iter()
        .map(|a| table.attributes.iter().position(|b| a == b))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| SynthesisError::MissingMarginal { attributes: keep.to_vec() })
}

/// For every cell of a table of shape `dims`, the cell it sums into when only `axes` are kept, in that order.
fn cell_map(dims: &[usize], axes: &[usize]) -> Vec<usize> {
    let mut strides = vec![0; dims.len()];
    let mut stride = 1;
    for &axis in axes.iter().rev() {
        strides[axis] = stride;
        stride *= dims[axis];
    }
    let mut map = vec![0];
    for (&dim, &stride) in dims.iter().zip(&strides) {
        map = map.iter().flat_map(|&base| (0..dim).map(move |i| base + i * stride)).collect();
    }
    map
}

/// Sums of a checked table over all axes but `axes`; one cell with the total if `axes` is empty.
fn collapse(table: &MarginalTable, axes: &[usize]) -> Vec<f64> {
    let mut sums = vec![0.0; axes.iter().map(|&axis| table.dims[axis]).product()];
    for (value, cell) in table.values.iter().zip(cell_map(&table.dims, axes)) {
        sums[cell] += value;
    }
    sums
}

/// Weights that sum to 1 and the variance of the weighted mean; exact members take all the weight.
fn inverse_variance(variances: &[f64]) -> Option<(Vec<f64>, f64)> {
    if variances.is_empty() {
        return None;
    }
    let exact = variances.iter().filter(|v| **v <= 0.0).count();
    if exact > 0 {
        let share = 1.0 / exact as f64;
        return Some((variances.iter().map(|v| if *v <= 0.0 { share } else { 0.0 }).collect(), 0.0));
    }
    // Relative to the smallest, so that extreme variances neither overflow nor vanish together.
    let least = variances.iter().copied().fold(f64::INFINITY, f64::min);
    let relative: Vec<f64> = variances.iter().map(|v| least / v).collect();
    let sum: f64 = relative.iter().sum();
    Some((relative.iter().map(|w| w / sum).collect(), least / sum))
}

/// All intersections of the tables' attribute sets held by two tables or more, smaller sets first.
fn closed_intersections(tables: &[MarginalTable]) -> Vec<BTreeSet<usize>> {
    let sets: Vec<BTreeSet<usize>> = tables.iter().map(|t| t.attributes.iter().copied().collect()).collect();
    let mut closed: BTreeSet<BTreeSet<usize>> = sets.iter().cloned().collect();
    let mut fresh: Vec<BTreeSet<usize>> = closed.iter().cloned().collect();
    while let Some(set) = fresh.pop() {
        for other in &sets {
            let common: BTreeSet<usize> = set.intersection(other).copied().collect();
            if closed.insert(common.clone()) {
                fresh.push(common);
            }
        }
    }
    closed.insert(BTreeSet::new());
    let mut ordered: Vec<_> = closed.into_iter().collect();
    ordered.sort_by_key(BTreeSet::len);
    ordered
}

/// Moves every table that holds all of `shared` to the inverse-variance mean of their sums over `shared`.
fn agree_on(tables: &mut [MarginalTable], shared: &[usize]) {
    let holders: Vec<(usize, Vec<usize>)> =
        tables.iter().enumerate().filter_map(|(i, table)| Some((i, axes_of(table, shared).ok()?))).collect();
    if holders.len() < 2 {
        return;
    }
    let sums: Vec<Vec<f64>> = holders.iter().map(|(i, axes)| collapse(&tables[*i], axes)).collect();
    let cells_summed: Vec<f64> = holders
        .iter()
        .zip(&sums)
        .map(|((i, _), sum)| tables[*i].values.len() as f64 / sum.len() as f64)
        .collect();
    let variances: Vec<f64> =
        holders.iter().zip(&cells_summed).map(|((i, _), n)| tables[*i].variance * n).collect();
    let Some((weights, _)) = inverse_variance(&variances) else { return };
    let mut mean = vec![0.0; sums[0].len()];
    for (sum, weight) in sums.iter().zip(&weights) {
        mean.iter_mut().zip(sum).for_each(|(m, s)| *m += weight * s);
    }
    for (((i, axes), sum), n) in holders.iter().zip(&sums).zip(&cells_summed) {
        let table = &mut tables[*i];
        let map = cell_map(&table.dims, axes);
        for (value, cell) in table.values.iter_mut().zip(map) {
            *value += (mean[cell] - sum[cell]) / n;
        }
    }
}

/// Most cells of one table (32 MiB of counts).
pub const MAX_CELLS: usize = 1 << 22;

#[cfg(test)]
mod tests;
