//! Standardisation of columns, and outliers drawn in logarithmically instead of cut off.

use super::{Numbers, moments};

/// Mean and scale of each column.
#[derive(Debug, Clone, PartialEq)]
pub struct Standard {
    /// Means.
    pub mean: Vec<f64>,
    /// Population deviations plus 1e-6.
    pub scale: Vec<f64>,
}

impl Standard {
    pub(super) fn fit(context: &Numbers) -> Self {
        let (mean, scale) = (0..context.columns())
            .map(|c| {
                let (mean, variance) = moments(context.column(c));
                (mean, variance.sqrt() + SCALE_FLOOR)
            })
            .unzip();
        Self { mean, scale }
    }

    /// `(x - mean) / scale`, held within ±100.
    pub(super) fn apply(&self, rows: &Numbers) -> Numbers {
        rows.map(|c, v| match (self.mean.get(c), self.scale.get(c)) {
            (Some(mean), Some(scale)) => ((v - mean) / scale).clamp(-CLIP, CLIP),
            _ => v,
        })
    }
}

/// Bounds of each column, beyond which a value only counts by its logarithm.
#[derive(Debug, Clone, PartialEq)]
pub struct Outliers {
    /// Lower bounds.
    pub lower: Vec<f64>,
    /// Upper bounds.
    pub upper: Vec<f64>,
}

impl Outliers {
    /// Mean -+ 4 sample deviations of the values that lie within -+ 4 deviations of all values.
    pub(super) fn fit(context: &Numbers) -> Self {
        let (lower, upper) = (0..context.columns())
            .map(|c| {
                let (low, high) = bounds(context.column(c), context.rows());
                bounds(context.column(c).filter(|v| (low..=high).contains(v)), context.rows())
            })
            .unzip();
        Self { lower, upper }
    }

    /// `max(L - ln(1 + |x|), x)`, then `min(U + ln(1 + |x|), x)`.
    pub(super) fn apply(&self, rows: &Numbers) -> Numbers {
        rows.map(|c, v| match (self.lower.get(c), self.upper.get(c)) {
            (Some(lower), Some(upper)) => {
                let raised = v.max(lower - v.abs().ln_1p());
                raised.min(upper + raised.abs().ln_1p())
            }
            _ => v,
        })
    }
}

/// Mean -+ 4 deviations, over `n - 1` if the table has more than one row.
fn bounds(values: impl Iterator<Item = f64> + Clone, rows: usize) -> (f64, f64) {
    let (mean, variance) = moments(values.clone());
    let count = values.count() as f64;
    let unbiased = if rows > 1 { variance * count / (count - 1.0).max(1.0) } else { variance };
    let reach = THRESHOLD * unbiased.sqrt().max(SCALE_FLOOR);
    (mean - reach, mean + reach)
}

const SCALE_FLOOR: f64 = 1e-6;
const CLIP: f64 = 100.0;
const THRESHOLD: f64 = 4.0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{Numbers, Outliers, Standard};

    #[test]
    fn standardised_columns_are_held_within_their_clip() {
        let numbers = Numbers::new(2, 1, vec![0.0, 2.0]).unwrap();
        let fitted = Standard::fit(&numbers);
        assert_eq!((fitted.mean[0], fitted.scale[0]), (1.0, 1.0 + 1e-6));
        let far = fitted.apply(&Numbers::new(2, 1, vec![1e6, -1e6]).unwrap());
        assert_eq!(far.values(), [100.0, -100.0]);
    }

    #[test]
    fn outliers_do_not_shape_the_bounds_and_are_drawn_in() {
        let mut values: Vec<f64> = (0..40).map(|i| f64::from(i % 2)).collect();
        values.push(1000.0);
        let fitted = Outliers::fit(&Numbers::new(41, 1, values).unwrap());
        assert!(fitted.upper[0] < 4.0 && fitted.lower[0] > -4.0);
        let out = fitted.apply(&Numbers::new(2, 1, vec![1000.0, 0.5]).unwrap());
        assert!((out.values()[0] - (fitted.upper[0] + 1001f64.ln())).abs() < 1e-12);
        assert!((out.values()[1] - 0.5).abs() < 1e-12);
    }
}
