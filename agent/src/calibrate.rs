//! Intercept and slope on the served logit, fitted on the domain's gate rows and never leaving the domain.
//!
//! A context whose label rate or noise differs from the served rows' shifts and flattens probabilities while it leaves
//! ranks alone. Two numbers mend that (Platt 1999): the logit becomes `slope · logit + intercept`, fitted by
//! penalised maximum likelihood that holds them near `(1, 0)`. They are used only where held-out folds of the gate rows
//! show a gain of at least one standard error, so few rows leave the model as it is. Two classes.

use serde::{Deserialize, Serialize};

/// What is done to a logit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Factor of the logit, above 0.
    pub slope: f64,
    /// Added afterwards.
    pub intercept: f64,
}

impl Default for Calibration {
    fn default() -> Self {
        Self::NONE
    }
}

impl Calibration {
    /// Leaves logits as they are.
    pub const NONE: Self = Self { slope: 1.0, intercept: 0.0 };

    /// The probability of class 1 for a logit.
    #[must_use]
    pub fn probability(self, logit: f64) -> f64 {
        1.0 / (1.0 + (-self.apply(logit)).exp())
    }

    /// This first, then another.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        Self { slope: next.slope * self.slope, intercept: next.slope * self.intercept + next.intercept }
    }

    /// The logit after it.
    #[must_use]
    pub fn apply(self, logit: f64) -> f64 {
        self.slope * logit + self.intercept
    }

    /// Fits on logits and labels; [`Self::NONE`] with few rows of a class, or unless cross-validation shows a gain of one standard
    /// error.
    ///
    /// `labels` are whether each row is of class 1. Rows are dealt to folds by position.
    #[must_use]
    pub fn fit(logits: &[f64], labels: &[bool]) -> Self {
        let rows: Vec<(f64, bool)> = logits
            .iter()
            .copied()
            .zip(labels.iter().copied())
            .filter(|(logit, _)| logit.is_finite())
            .collect();
        let ones = rows.iter().filter(|(_, label)| *label).count();
        if ones.min(rows.len() - ones) < MIN_CLASS_ROWS {
            return Self::NONE;
        }
        let mut gains = Vec::with_capacity(rows.len());
        for fold in 0..FOLDS {
            let part =
                |held: bool| rows.iter().enumerate().filter(move |(at, _)| (at % FOLDS == fold) == held);
            let rest: Vec<(f64, bool)> = part(false).map(|(_, row)| *row).collect();
            let fitted = Self::penalised(&rest);
            gains.extend(part(true).map(|(_, row)| Self::NONE.loss(*row) - fitted.loss(*row)));
        }
        let (mean, error) = mean_and_error(&gains);
        if mean > 0.0 && mean >= error { Self::penalised(&rows) } else { Self::NONE }
    }

    /// Newton's method with halved steps on the penalised log-likelihood, which is concave.
    fn penalised(rows: &[(f64, bool)]) -> Self {
        let objective = |c: Self| {
            rows.iter().map(|row| c.loss(*row)).sum::<f64>()
                + 0.5 * PENALTY * ((c.slope - 1.0).powi(2) + c.intercept.powi(2))
        };
        let mut at = Self::NONE;
        let mut value = objective(at);
        for _ in 0..MOST_STEPS {
            let mut gradient = [PENALTY * (at.slope - 1.0), PENALTY * at.intercept];
            let [mut ss, mut si, mut ii] = [PENALTY, 0.0, PENALTY];
            for &(logit, label) in rows {
                let p = at.probability(logit);
                let (residual, curvature) = (p - f64::from(u8::from(label)), p * (1.0 - p));
                gradient[0] += residual * logit;
                gradient[1] += residual;
                ss += curvature * logit * logit;
                si += curvature * logit;
                ii += curvature;
            }
            let determinant = ss * ii - si * si;
            let step = [
                (ii * gradient[0] - si * gradient[1]) / determinant,
                (ss * gradient[1] - si * gradient[0]) / determinant,
            ];
            let mut length = 1.0;
            let next = loop {
                let tried = Self {
                    slope: (at.slope - length * step[0]).max(SMALLEST_SLOPE),
                    intercept: at.intercept - length * step[1],
                };
                if objective(tried) <= value || length < 1e-6 {
                    break tried;
                }
                length *= 0.5;
            };
            let gained = value - objective(next);
            if gained.is_nan() || gained <= 1e-10 {
                break;
            }
            (at, value) = (next, value - gained);
        }
        at
    }

    /// Log loss of one row.
    fn loss(self, (logit, label): (f64, bool)) -> f64 {
        let margin = self.slope * logit + self.intercept;
        let signed = if label { -margin } else { margin };
        // log(1 + exp(x)) without overflow.
        signed.max(0.0) + (-signed.abs()).exp().ln_1p()
    }
}

/// Mean and its standard error, which is infinite for fewer than two values.
pub(crate) fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    if n < 2.0 {
        return (0.0, f64::INFINITY);
    }
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// Rows of each class below which nothing is fitted.
const MIN_CLASS_ROWS: usize = 10;
/// Parts of the gate rows that are held out in turn.
const FOLDS: usize = 5;
/// Weight of the penalty, in rows: a handful of rows moves nothing.
const PENALTY: f64 = 5.0;
/// Newton steps at most.
const MOST_STEPS: usize = 30;
/// The slope never turns ranks around.
const SMALLEST_SLOPE: f64 = 0.05;

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits on a grid; labels by thresholding a low-discrepancy sequence, so rates are those of `truth`.
    fn sample(n: usize, truth: Calibration) -> (Vec<f64>, Vec<bool>) {
        let logits: Vec<f64> = (0..n).map(|i| -3.0 + 6.0 * ((i as f64 * 0.618_034) % 1.0)).collect();
        let labels = logits
            .iter()
            .enumerate()
            .map(|(i, logit)| (i as f64 * 0.754_877_7 + 0.31) % 1.0 < truth.probability(*logit))
            .collect();
        (logits, labels)
    }

    #[test]
    fn shift_and_slope_are_found_from_enough_rows() {
        let truth = Calibration { slope: 0.5, intercept: -1.2 };
        let (logits, labels) = sample(4000, truth);
        let found = Calibration::fit(&logits, &labels);
        assert!((found.slope - truth.slope).abs() < 0.06, "{found:?}");
        assert!((found.intercept - truth.intercept).abs() < 0.12, "{found:?}");
    }

    #[test]
    fn a_calibrated_model_and_few_rows_are_left_alone() {
        let (logits, labels) = sample(2000, Calibration::NONE);
        assert_eq!(Calibration::fit(&logits, &labels), Calibration::NONE);
        assert_eq!(Calibration::fit(&logits[..6], &[false; 6]), Calibration::NONE);
        assert_eq!(Calibration::fit(&[], &[]), Calibration::NONE);
    }

    #[test]
    fn one_after_the_other_is_one() {
        let (first, second) =
            (Calibration { slope: 2.0, intercept: 1.0 }, Calibration { slope: 0.5, intercept: -3.0 });
        assert!((first.then(second).apply(0.7) - second.apply(first.apply(0.7))).abs() < 1e-12);
        assert_eq!(first.then(Calibration::NONE), first);
    }

    #[test]
    fn the_standard_error_is_that_of_a_mean() {
        // Variance of 1, 2, 3, 4 is 5/3; its mean's standard error is sqrt(5/12).
        let (mean, error) = mean_and_error(&[1.0, 2.0, 3.0, 4.0]);
        assert!((mean - 2.5).abs() < 1e-12 && (error - (5.0_f64 / 12.0).sqrt()).abs() < 1e-12);
        assert!(mean_and_error(&[1.0]).1.is_infinite());
    }

    #[test]
    fn separable_and_extreme_logits_stay_finite_and_keep_their_order() {
        let logits = [-900.0, -20.0, -0.5, 0.5, 30.0, 900.0, f64::NAN];
        let labels = [false, false, false, true, true, true, true];
        for labels in [labels, labels.map(|label| !label)] {
            let (logits, labels) = (logits.repeat(40), labels.repeat(40));
            let found = Calibration::fit(&logits, &labels);
            assert!(found.slope.is_finite() && found.slope > 0.0 && found.intercept.is_finite(), "{found:?}");
            assert!(found.probability(1.0) >= found.probability(-1.0));
        }
    }
}
