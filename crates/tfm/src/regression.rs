//! Numbers from a regression model's quantiles: order, mean, variance, interpolation, original scale.
//!
//! Quantile `i` of `Q` stands for level `i / (Q + 1)`. Between levels the quantile function is linear; beyond the
//! outermost ones it is `beta ln(level)` (left) and `-beta ln(1 - level)` (right) plus what makes it continuous, with
//! `beta` from a regression over the outermost quantiles, as in the public package (PyPI tabicl 2.2.0).

use serde::{Deserialize, Serialize};

use crate::error::TfmError;

/// The predicted distribution of one row, by its sorted quantiles.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantiles {
    values: Vec<f32>,
}

impl Quantiles {
    /// Sorts the quantiles of one row.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for fewer than two or a value that isn't finite.
    pub fn new(mut values: Vec<f32>) -> Result<Self, TfmError> {
        if values.len() < 2 {
            return Err(TfmError::mismatch("number of quantiles", "at least 2", values.len()));
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::mismatch("quantiles", "finite numbers", "a value that is not"));
        }
        values.sort_by(f32::total_cmp);
        Ok(Self { values })
    }

    /// One distribution per row of a regression model's outputs `(rows, quantiles)`.
    ///
    /// # Errors
    /// As [`Self::new`]; [`TfmError::Mismatch`] if the outputs aren't whole rows.
    pub fn rows(outputs: Vec<f32>, quantiles: usize) -> Result<Vec<Self>, TfmError> {
        if quantiles == 0 || !outputs.len().is_multiple_of(quantiles) {
            return Err(TfmError::mismatch("outputs", format!("rows of {quantiles}"), outputs.len()));
        }
        outputs.chunks_exact(quantiles).map(|row| Self::new(row.to_vec())).collect()
    }

    /// The quantiles in ascending order.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Mean of the quantiles.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.values.iter().map(|v| f64::from(*v)).sum::<f64>() / self.values.len() as f64
    }

    /// Variance of the quantiles, over `Q - 1`.
    #[must_use]
    pub fn variance(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum();
        squares / (self.values.len() - 1) as f64
    }

    /// The value at a probability level, clamped to `[1e-6, 1 - 1e-6]`.
    #[must_use]
    pub fn at(&self, level: f64) -> f64 {
        let level = level.clamp(LEVEL_FLOOR, 1.0 - LEVEL_FLOOR);
        let count = self.values.len();
        let position = level * (count + 1) as f64 - 1.0;
        if position < 0.0 {
            return self.value(0) + self.tail(false) * (level.ln() - level_of(0, count).ln());
        }
        if position > (count - 1) as f64 {
            let last = 1.0 - level_of(count - 1, count);
            return self.value(count - 1) - self.tail(true) * ((1.0 - level).ln() - last.ln());
        }
        let below = (position.floor() as usize).min(count - 2);
        let (low, high) = (self.value(below), self.value(below + 1));
        low + (position - below as f64) * (high - low)
    }

    fn value(&self, i: usize) -> f64 {
        self.values.get(i).copied().map_or(0.0, f64::from)
    }

    /// Scale of a tail: slope of its quantiles over the logarithm of the level that they leave outside.
    fn tail(&self, right: bool) -> f64 {
        let count = self.values.len();
        let used = TAIL_QUANTILES.min(count / 4);
        if used == 0 {
            return MIN_TAIL;
        }
        let points: Vec<(f64, f64)> = (0..used)
            .map(|i| {
                let outside = level_of(i, count).max(LEVEL_FLOOR);
                (outside.ln(), self.value(if right { count - 1 - i } else { i }))
            })
            .collect();
        let mean = |f: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(f).sum::<f64>() / used as f64;
        let (level, value) = (mean(&|p| p.0), mean(&|p| p.1));
        let covariance = mean(&|p| (p.0 - level) * (p.1 - value));
        let variance = mean(&|p| (p.0 - level).powi(2)).max(LEVEL_FLOOR);
        (covariance / variance).abs().clamp(MIN_TAIL, MAX_TAIL)
    }
}

/// Level of quantile `i` of `count`, counted from 0.
fn level_of(i: usize, count: usize) -> f64 {
    (i + 1) as f64 / (count + 1) as f64
}

/// Mean and deviation that targets were standardised with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TargetScale {
    /// Mean of the context rows' targets.
    pub mean: f64,
    /// Their population deviation; 1 for targets that are all equal.
    pub deviation: f64,
}

impl TargetScale {
    /// Mean and population deviation of targets.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for no target or one that isn't finite.
    pub fn fit(targets: &[f64]) -> Result<Self, TfmError> {
        if targets.is_empty() || targets.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::mismatch("targets", "finite numbers", format!("{} values", targets.len())));
        }
        let count = targets.len() as f64;
        let mean = targets.iter().sum::<f64>() / count;
        let variance = targets.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        // Equal targets leave rounding behind, which must not become the scale.
        let rounding = count * f64::EPSILON * variance + (count * mean * f64::EPSILON).powi(2);
        Ok(Self { mean, deviation: if variance <= rounding { 1.0 } else { variance.sqrt() } })
    }

    /// Original to standardised.
    #[must_use]
    pub fn standardise(&self, value: f64) -> f64 {
        (value - self.mean) / self.deviation
    }

    /// Standardised to original.
    #[must_use]
    pub fn restore(&self, value: f64) -> f64 {
        value * self.deviation + self.mean
    }
}

const LEVEL_FLOOR: f64 = 1e-6;
const TAIL_QUANTILES: usize = 20;
const MIN_TAIL: f64 = 0.01;
const MAX_TAIL: f64 = 100.0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{Quantiles, TargetScale};

    #[test]
    fn quantiles_are_sorted_and_interpolated_by_level() {
        let q = Quantiles::new(vec![4.0, 1.0, 2.0]).unwrap();
        assert_eq!(q.values(), [1.0, 2.0, 4.0]);
        assert!((q.mean() - 7.0 / 3.0).abs() < 1e-12 && (q.variance() - 7.0 / 3.0).abs() < 1e-12);
        for (level, value) in [(0.25, 1.0), (0.375, 1.5), (0.5, 2.0), (0.625, 3.0), (0.75, 4.0)] {
            assert!((q.at(level) - value).abs() < 1e-12, "{level}");
        }
    }

    /// The quantile function of an exponential distribution is its own tail: `-ln(1 - level)` at every level.
    #[test]
    fn tails_continue_an_exponential_distribution() {
        let count = 99;
        let levels = (1..=count).map(|i| f64::from(i) / 100.0);
        let right = Quantiles::new(levels.clone().map(|l| -(1.0 - l).ln() as f32).collect()).unwrap();
        let left = Quantiles::new(levels.map(|l| l.ln() as f32).collect()).unwrap();
        for level in [0.99, 0.995, 0.9999] {
            assert!((right.at(level) + (1.0 - level).ln()).abs() < 1e-4, "{level}");
            assert!((left.at(1.0 - level) - (1.0 - level).ln()).abs() < 1e-4, "{level}");
        }
        assert!(right.at(2.0).is_finite() && right.at(-1.0) < right.at(0.01));
    }

    #[test]
    fn scale_restores_what_it_standardised() {
        let scale = TargetScale::fit(&[1.0, 3.0]).unwrap();
        assert_eq!((scale.mean, scale.deviation), (2.0, 1.0));
        assert!((scale.restore(scale.standardise(7.25)) - 7.25).abs() < 1e-12);
        assert!((TargetScale::fit(&[0.1; 7]).unwrap().deviation - 1.0).abs() < 1e-12);
        assert!(TargetScale::fit(&[]).is_err() && TargetScale::fit(&[f64::NAN]).is_err());
        assert!(Quantiles::new(vec![1.0]).is_err() && Quantiles::new(vec![1.0, f32::NAN]).is_err());
        assert!(Quantiles::rows(vec![1.0; 5], 2).is_err());
    }
}
