//! How closely synthetic rows follow the noisy tables they were made from.
//!
//! Owns total variation distances only: they need no private data, so they may be published with the corpus. They say
//! nothing about the domains' true rows beyond the release; a distance near the noise floor is as good as the
//! release allows, one far above it means structure the tree could not carry.

use serde::{Deserialize, Serialize};
use tabmesh_privacy::release::MarginalTable;

use crate::SynthesisError;
use crate::marginal::{best_marginal, cell_count, probabilities, total};
use crate::sample::CellRows;
use crate::tree::{MEAN_ABSOLUTE_NORMAL, TreeStructure};

/// Total variation distances (0 = equal, 1 = disjoint) of synthetic rows from the released noisy marginals.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Mean distance over all 1-way marginals, the label's among them.
    pub one_way_mean: f64,
    /// Largest distance of a 1-way marginal.
    pub one_way_max: f64,
    /// Mean distance over the (feature, label) and (feature, parent) marginals.
    pub two_way_mean: f64,
    /// Largest distance of a (feature, label) or (feature, parent) marginal.
    pub two_way_max: f64,
    /// Mean 1-way distance expected of perfect rows from release noise and the number of rows alone.
    pub one_way_noise_floor: f64,
    /// Mean 2-way distance expected of perfect rows from release noise and the number of rows alone.
    pub noise_floor: f64,
}

/// Compares drawn rows with noisy tables that cover each feature's family (those the model was fitted to).
///
/// The floor adds, cell by cell, the variance of the release's noise to that of drawing the rows; it is slightly
/// high, since counts are projected before they are compared.
///
/// # Errors
/// As [`best_marginal`]; [`SynthesisError::LayoutMismatch`] without rows or if rows and tables differ in layout.
pub fn measure(
    rows: &CellRows,
    structure: &TreeStructure,
    tables: &[MarginalTable],
) -> Result<Quality, SynthesisError> {
    if rows.rows() == 0 {
        return Err(SynthesisError::LayoutMismatch { what: "synthetic rows at least", expected: 1, got: 0 });
    }
    let label = structure.label();
    let mut one_way = Distances::new(total(tables)?.value);
    let mut two_way = Distances::new(one_way.total);
    for &attribute in structure.order().iter().chain([&label]) {
        one_way.add(rows, best_marginal(tables, &[attribute])?)?;
    }
    for &feature in structure.order() {
        two_way.add(rows, best_marginal(tables, &[feature, label])?)?;
        for parent in structure.above(feature) {
            two_way.add(rows, best_marginal(tables, &[feature, parent])?)?;
        }
    }
    Ok(Quality {
        one_way_mean: one_way.mean(one_way.sum),
        one_way_max: one_way.max,
        two_way_mean: two_way.mean(two_way.sum),
        two_way_max: two_way.max,
        one_way_noise_floor: one_way.mean(one_way.floor),
        noise_floor: two_way.mean(two_way.floor),
    })
}

/// Running sums over marginals of one order.
struct Distances {
    total: f64,
    count: usize,
    sum: f64,
    max: f64,
    floor: f64,
}

impl Distances {
    fn new(total: f64) -> Self {
        Self { total, count: 0, sum: 0.0, max: 0.0, floor: 0.0 }
    }

    fn add(&mut self, rows: &CellRows, table: MarginalTable) -> Result<(), SynthesisError> {
        let noisy = probabilities(&table.values, &[], 0.0);
        let synthetic = shares(rows, &table)?;
        let distance: f64 = noisy.iter().zip(&synthetic).map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0;
        let released = if self.total >= 1.0 { table.variance / self.total.powi(2) } else { f64::INFINITY };
        let drawn = |p: f64| p * (1.0 - p) / rows.rows() as f64;
        let floor: f64 = noisy.iter().map(|&p| (released + drawn(p)).sqrt()).sum::<f64>();
        self.count += 1;
        self.sum += distance;
        self.max = self.max.max(distance);
        self.floor += (floor * MEAN_ABSOLUTE_NORMAL / 2.0).min(1.0);
        Ok(())
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.count.max(1) as f64
    }
}

/// Shares of the rows in each cell of a table's layout.
fn shares(rows: &CellRows, table: &MarginalTable) -> Result<Vec<f64>, SynthesisError> {
    let mut shares = vec![0.0; cell_count(&table.dims)?];
    let one = 1.0 / rows.rows() as f64;
    let mut columns = Vec::with_capacity(table.dims.len());
    for (&attribute, &dim) in table.attributes.iter().zip(&table.dims) {
        let got = rows.dims().get(attribute).copied().unwrap_or(0);
        if got != dim {
            return Err(SynthesisError::LayoutMismatch { what: "cells of an attribute", expected: dim, got });
        }
        columns.push((rows.column(attribute), dim));
    }
    for row in 0..rows.rows() {
        let cell = columns.iter().fold(0, |index, (column, dim)| index * dim + column[row] as usize);
        shares[cell] += one;
    }
    Ok(shares)
}

#[cfg(test)]
mod tests;
