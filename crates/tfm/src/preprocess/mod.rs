//! Preprocessing of tables for imported models, as their own package does it: parity, not privacy.
//!
//! Impute and code columns, drop constant ones, then per view standardise, optionally transform by Yeo and Johnson,
//! and draw in outliers. Everything is fitted on context rows and therefore depends on them: private rows must not be
//! fitted on where a result leaves the domain. Our own models are fed by [`crate::table::Preprocessing`] instead,
//! whose statistics are released or public. Rules are those of PyPI tabicl 2.2.0 with scikit-learn 1.9.1.

pub mod impute;
pub mod power;
pub mod scale;

use serde::{Deserialize, Serialize};

pub use self::impute::{Column, Imputer};
use self::{
    power::PowerTransform,
    scale::{Outliers, Standard},
};
use crate::error::TfmError;

/// Numbers `(rows, columns)`, row by row, finite.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbers {
    rows: usize,
    columns: usize,
    values: Vec<f64>,
}

impl Numbers {
    /// A table of numbers.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for a wrong number of values or one that isn't finite; [`TfmError::TooLarge`] beyond
    /// [`crate::model::forward::MAX_TASK_CELLS`].
    pub fn new(rows: usize, columns: usize, values: Vec<f64>) -> Result<Self, TfmError> {
        let (cells, limit) = (rows.saturating_mul(columns), crate::model::forward::MAX_TASK_CELLS);
        if cells > limit {
            return Err(TfmError::TooLarge { what: "table cells", got: cells, limit });
        }
        if values.len() != cells {
            return Err(TfmError::mismatch("number of values", cells, values.len()));
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::mismatch("table values", "finite numbers", "a value that is not"));
        }
        Ok(Self { rows, columns, values })
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Values, row by row.
    #[must_use]
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// Values, row by row.
    #[must_use]
    pub fn into_values(self) -> Vec<f64> {
        self.values
    }

    /// Values of one column.
    pub fn column(&self, index: usize) -> impl Iterator<Item = f64> + Clone + '_ {
        self.values.iter().skip(index).step_by(self.columns.max(1)).copied()
    }

    /// The given columns in the given order; indices that don't exist are left out.
    #[must_use]
    pub fn select(&self, columns: &[usize]) -> Self {
        let kept: Vec<usize> = columns.iter().copied().filter(|c| *c < self.columns).collect();
        let rows = self.values.chunks_exact(self.columns.max(1));
        let values = rows.flat_map(|row| kept.iter().filter_map(|c| row.get(*c)).copied()).collect();
        Self { rows: self.rows, columns: kept.len(), values }
    }

    /// Columns with more than one value. With a single row, all of them.
    #[must_use]
    pub fn varying(&self) -> Vec<usize> {
        let varies = |c: &usize| {
            let mut values = self.column(*c);
            let first = values.next();
            self.rows <= 1 || values.any(|v| first.is_none_or(|f| (v - f).abs() > 0.0))
        };
        (0..self.columns).filter(varies).collect()
    }

    /// Every column mapped by a function of its index and value.
    fn map(&self, mut f: impl FnMut(usize, f64) -> f64) -> Self {
        let columns = self.columns.max(1);
        let values = self.values.iter().enumerate().map(|(i, v)| f(i % columns, *v)).collect();
        Self { values, ..*self }
    }
}

/// Normalisation of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// Standardised only.
    None,
    /// Standardised, then transformed by Yeo and Johnson and standardised again.
    Power,
}

/// A fitted normalisation.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalisation {
    /// First standardisation.
    pub standard: Standard,
    /// Transformation of a [`Norm::Power`] view.
    pub power: Option<PowerTransform>,
    /// Outlier bounds.
    pub outliers: Outliers,
    /// Smallest and largest standardised context value of each column.
    span: Vec<(f64, f64)>,
}

impl Normalisation {
    /// Fits on context rows, columns already imputed and varying.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for no row or no column, and for a column whose values leave the range of doubles.
    pub fn fit(norm: Norm, context: &Numbers) -> Result<Self, TfmError> {
        if context.rows == 0 || context.columns == 0 {
            let got = format!("{} rows, {} columns", context.rows, context.columns);
            return Err(TfmError::mismatch("context", "at least one row and one varying column", got));
        }
        let standard = Standard::fit(context);
        if standard.mean.iter().chain(&standard.scale).any(|v| !v.is_finite()) {
            return Err(TfmError::mismatch("mean and deviation of a column", "finite", "overflow"));
        }
        let scaled = standard.apply(context);
        let span = (0..context.columns)
            .map(|c| {
                scaled
                    .column(c)
                    .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
            })
            .collect();
        let power = match norm {
            Norm::None => None,
            Norm::Power => Some(PowerTransform::fit(&scaled)),
        };
        let normal = power.as_ref().map_or_else(|| scaled.clone(), |power| power.apply(&scaled));
        let outliers = Outliers::fit(&normal);
        let fitted = Self { standard, power, outliers, span };
        fitted.apply(context)?;
        Ok(fitted)
    }

    /// Normalises rows of the fitted columns.
    ///
    /// A power transformation that overflows is repeated on values held within those of the context.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for another number of columns, or values that leave the range of doubles even so.
    pub fn apply(&self, rows: &Numbers) -> Result<Numbers, TfmError> {
        if rows.columns != self.span.len() {
            return Err(TfmError::mismatch("columns", self.span.len(), rows.columns));
        }
        let scaled = self.standard.apply(rows);
        let normal = match &self.power {
            None => scaled,
            Some(power) => {
                let once = power.apply(&scaled);
                if once.values.iter().all(|v| v.is_finite()) {
                    once
                } else {
                    power.apply(
                        &scaled.map(|c, v| self.span.get(c).map_or(v, |(low, high)| v.clamp(*low, *high))),
                    )
                }
            }
        };
        let out = self.outliers.apply(&normal);
        Numbers::new(out.rows, out.columns, out.values)
    }
}

/// Mean and population variance.
fn moments(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let (count, sum) = values.clone().fold((0usize, 0.0), |(n, s), v| (n + 1, s + v));
    let count = count.max(1) as f64;
    let mean = sum / count;
    (mean, values.map(|v| (v - mean).powi(2)).sum::<f64>() / count)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{Norm, Normalisation, Numbers};
    use crate::{error::TfmError, model::forward::MAX_TASK_CELLS};

    #[test]
    fn columns_are_selected_and_constant_ones_found() {
        let numbers = Numbers::new(2, 3, vec![1.0, 2.0, 3.0, 1.0, 5.0, 3.0]).unwrap();
        assert_eq!(numbers.varying(), [1]);
        assert_eq!(numbers.select(&[2, 0, 9]).values(), [3.0, 1.0, 3.0, 1.0]);
        assert_eq!(Numbers::new(1, 2, vec![1.0, 1.0]).unwrap().varying(), [0, 1]);
    }

    #[test]
    fn unfit_tables_are_refused() {
        assert!(matches!(Numbers::new(1, 1, vec![f64::NAN]), Err(TfmError::Mismatch { .. })));
        assert!(matches!(Numbers::new(2, 2, vec![0.0; 3]), Err(TfmError::Mismatch { .. })));
        assert!(matches!(Numbers::new(MAX_TASK_CELLS + 1, 1, vec![]), Err(TfmError::TooLarge { .. })));
        let empty = Numbers::new(0, 2, vec![]).unwrap();
        assert!(Normalisation::fit(Norm::None, &empty).is_err());
        let two = Numbers::new(2, 1, vec![0.0, 1.0]).unwrap();
        let fitted = Normalisation::fit(Norm::Power, &two).unwrap();
        assert!(fitted.apply(&Numbers::new(1, 2, vec![0.0; 2]).unwrap()).is_err());
        assert!(fitted.apply(&Numbers::new(2, 1, vec![1e300, -1e300]).unwrap()).is_ok());
        // Sums that overflow while fitting are an error, not a silent infinity.
        let vast = Numbers::new(2, 1, vec![1.7e308, -1.7e308]).unwrap();
        assert!(Normalisation::fit(Norm::None, &vast).is_err());
    }
}
