//! Summed noisy counts, read as tables.
//!
//! Post-processing of released vectors: costs no privacy. Values can be negative; their variance is the sum of the
//! agents' noise.

use super::{MarginalSpec, ReleaseQuery};
use crate::mechanism::Noise;

/// One marginal of a released vector.
#[derive(Debug, Clone, PartialEq)]
pub struct MarginalTable {
    /// Indices into the query's attribute list; the last one varies fastest.
    pub attributes: Vec<usize>,
    /// Cells along each attribute.
    pub dims: Vec<usize>,
    /// Noisy counts, row-major.
    pub values: Vec<f64>,
    /// Variance of the noise on each value.
    pub variance: f64,
}

impl MarginalTable {
    /// Sum of the noisy counts.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.values.iter().sum()
    }

    /// Standard deviation of the noise on one value.
    #[must_use]
    pub fn noise_sd(&self) -> f64 {
        self.variance.sqrt()
    }
}

/// A summed vector that isn't as long as the query's cells, or a query without usable noise.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("summed release: expected {expected} cells, got {got}")]
pub struct WrongLength {
    /// Cells of the query.
    pub expected: usize,
    /// Values given.
    pub got: usize,
}

impl ReleaseQuery {
    /// Splits the sum of `agents` noised vectors into tables, each with variance `agents · σ²`.
    ///
    /// # Errors
    /// [`WrongLength`] when the vector isn't this query's.
    pub fn tables(&self, summed: &[i64], agents: usize) -> Result<Vec<MarginalTable>, WrongLength> {
        // A checked query always has a mechanism; an unchecked one gets no confidence at all.
        let variance = self.mechanism().map_or(f64::INFINITY, |m| m.variance() * agents as f64);
        self.tables_of(summed, variance)
    }

    /// Splits a sum whose noise has this variance on each value into tables.
    ///
    /// # Errors
    /// [`WrongLength`] when the vector isn't this query's.
    pub fn tables_of(&self, summed: &[i64], variance: f64) -> Result<Vec<MarginalTable>, WrongLength> {
        let expected = self.cells_total();
        if summed.len() != expected {
            return Err(WrongLength { expected, got: summed.len() });
        }
        let mut rest = summed;
        let mut tables = Vec::with_capacity(self.marginals.len());
        for MarginalSpec { attributes } in &self.marginals {
            let marginal = MarginalSpec { attributes: attributes.clone() };
            let dims = self.dims(&marginal);
            let (head, tail) = rest.split_at(dims.iter().product());
            rest = tail;
            let values = head.iter().map(|v| *v as f64).collect();
            tables.push(MarginalTable { attributes: marginal.attributes, dims, values, variance });
        }
        Ok(tables)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::tests::{levels, query};
    use super::super::{Attribute, ColumnRef, count};
    use super::*;

    #[test]
    fn tables_read_what_count_wrote() {
        let query = query(vec![levels("c", 2, None), Attribute::label(2)], &[&[1], &[0, 1]]);
        let counts =
            count(&query, &[ColumnRef::Codes(&[0, 0, 1, 3])], &[Some(0), Some(1), Some(1), Some(1)]).unwrap();
        let tables = query.tables(&counts, 3).unwrap();
        assert_eq!(tables[0].values, vec![1.0, 3.0]);
        assert_eq!(tables[1].dims, vec![4, 2]);
        assert_eq!(tables[1].values, vec![1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
        assert_eq!(tables[1].total().to_bits(), 4f64.to_bits());
        let sigma_squared = query.mechanism().unwrap().variance();
        assert!((tables[0].variance / (3.0 * sigma_squared) - 1.0).abs() < 1e-12);
        assert_eq!(query.tables(&counts[1..], 1), Err(WrongLength { expected: 10, got: 9 }));
    }
}
