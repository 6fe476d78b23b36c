//! Yeo and Johnson's power transformation, its exponent fitted by maximum likelihood, followed by standardisation.
//!
//! Yeo, Johnson: A new family of power transformations to improve normality or symmetry, Biometrika 87 (2000). The
//! likelihood is maximised by Brent's method (Brent: Algorithms for minimization without derivatives, 1973, ch. 5)
//! within a bracket found downhill from exponents -2 and 2.

use super::{Numbers, moments};

/// Fitted exponents and the standardisation after them.
#[derive(Debug, Clone, PartialEq)]
pub struct PowerTransform {
    /// Exponents, lambda.
    pub lambdas: Vec<f64>,
    /// Means of the transformed columns.
    pub mean: Vec<f64>,
    /// Population deviations of the transformed columns; 1 for those without spread.
    pub scale: Vec<f64>,
}

impl PowerTransform {
    pub(super) fn fit(context: &Numbers) -> Self {
        let mut fitted = Self { lambdas: Vec::new(), mean: Vec::new(), scale: Vec::new() };
        for c in 0..context.columns() {
            let values: Vec<f64> = context.column(c).collect();
            let lambda = if flat(&values) { 1.0 } else { best_lambda(&values) };
            let moved: Vec<f64> = values.iter().map(|v| yeo_johnson(*v, lambda)).collect();
            let (mean, variance) = moments(moved.iter().copied());
            fitted.lambdas.push(lambda);
            fitted.mean.push(mean);
            fitted.scale.push(if flat(&moved) { 1.0 } else { variance.sqrt() });
        }
        fitted
    }

    /// Transformed and standardised columns; a result may be infinite.
    pub(super) fn apply(&self, rows: &Numbers) -> Numbers {
        rows.map(|c, v| match (self.lambdas.get(c), self.mean.get(c), self.scale.get(c)) {
            (Some(lambda), Some(mean), Some(scale)) => (yeo_johnson(v, *lambda) - mean) / scale,
            _ => v,
        })
    }
}

/// The transformation at exponent `lambda`.
#[must_use]
pub fn yeo_johnson(x: f64, lambda: f64) -> f64 {
    let power = |x: f64, lambda: f64| {
        if lambda.abs() < f64::EPSILON { x.ln_1p() } else { (lambda * x.ln_1p()).exp_m1() / lambda }
    };
    if x >= 0.0 { power(x, lambda) } else { -power(-x, 2.0 - lambda) }
}

/// Whether the spread of values is rounding only.
fn flat(values: &[f64]) -> bool {
    let (mean, variance) = moments(values.iter().copied());
    let count = values.len() as f64;
    variance <= count * f64::EPSILON * variance + (count * mean * f64::EPSILON).powi(2)
}

/// The exponent of largest likelihood.
fn best_lambda(values: &[f64]) -> f64 {
    let slope: f64 = values.iter().map(|v| v.signum() * v.abs().ln_1p()).sum();
    let loss = |lambda: f64| {
        let (_, variance) = moments(values.iter().map(|v| yeo_johnson(*v, lambda)));
        if variance < f64::MIN_POSITIVE || !variance.is_finite() {
            return f64::INFINITY;
        }
        0.5 * values.len() as f64 * variance.ln() - (lambda - 1.0) * slope
    };
    minimum(loss, bracket(loss))
}

/// An interval and a point within it whose loss is not above those of the ends, widened downhill from -2 and 2.
fn bracket(loss: impl Fn(f64) -> f64) -> [f64; 3] {
    let (mut a, mut b) = (-2.0, 2.0);
    if loss(a) < loss(b) {
        (a, b) = (b, a);
    }
    let mut c = b + GOLDEN * (b - a);
    for _ in 0..MAX_WIDENINGS {
        if loss(c) >= loss(b) {
            break;
        }
        (a, b) = (b, c);
        c = b + GOLDEN * (b - a);
    }
    if a < c { [a, b, c] } else { [c, b, a] }
}

/// Brent's minimum of a function within a bracket.
fn minimum(loss: impl Fn(f64) -> f64, [mut low, start, mut high]: [f64; 3]) -> f64 {
    let (mut x, mut w, mut v) = (start, start, start);
    let mut fx = loss(x);
    let (mut fw, mut fv) = (fx, fx);
    let (mut step, mut last) = (0f64, 0f64);
    for _ in 0..MAX_STEPS {
        let middle = 0.5 * (low + high);
        let tolerance = TOLERANCE * x.abs() + 1e-11;
        if (x - middle).abs() <= 2.0 * tolerance - 0.5 * (high - low) {
            break;
        }
        let mut parabolic = false;
        if last.abs() > tolerance {
            let r = (x - w) * (fx - fv);
            let q = (x - v) * (fx - fw);
            let numerator = (x - v) * q - (x - w) * r;
            let denominator = 2.0 * (q - r);
            let (p, q) =
                if denominator > 0.0 { (-numerator, denominator) } else { (numerator, -denominator) };
            if p.abs() < (0.5 * q * last).abs() && p > q * (low - x) && p < q * (high - x) {
                last = step;
                step = p / q;
                parabolic = true;
                let u = x + step;
                if u - low < 2.0 * tolerance || high - u < 2.0 * tolerance {
                    step = tolerance.copysign(middle - x);
                }
            }
        }
        if !parabolic {
            last = if x >= middle { low - x } else { high - x };
            step = (2.0 - GOLDEN) * last;
        }
        let u = if step.abs() >= tolerance { x + step } else { x + tolerance.copysign(step) };
        let fu = loss(u);
        if fu <= fx {
            if u >= x {
                low = x;
            } else {
                high = x;
            }
            (v, fv, w, fw, x, fx) = (w, fw, x, fx, u, fu);
        } else {
            if u < x {
                low = u;
            } else {
                high = u;
            }
            // Ties between remembered points are those that were never moved.
            if fu <= fw || (w - x).abs() == 0.0 {
                (v, fv, w, fw) = (w, fw, u, fu);
            } else if fu <= fv || (v - x).abs() == 0.0 || (v - w).abs() == 0.0 {
                (v, fv) = (u, fu);
            }
        }
    }
    x
}

const GOLDEN: f64 = 1.618_033_988_749_895;
const TOLERANCE: f64 = 1.48e-8;
const MAX_STEPS: usize = 500;
const MAX_WIDENINGS: usize = 50;

#[cfg(test)]
mod tests {
    use super::{best_lambda, bracket, minimum, yeo_johnson};

    /// Values by hand from the definition: `((x + 1)^l - 1) / l`, `ln(x + 1)` at 0, and mirrored with `2 - l`.
    #[test]
    fn transformation_follows_its_definition() {
        for (x, lambda, expected) in [
            (3.0, 0.5, 2.0),
            (3.0, 0.0, 4f64.ln()),
            (3.0, 2.0, 7.5),
            (-3.0, 1.5, -2.0),
            (-3.0, 2.0, -(4f64.ln())),
            (-3.0, 1.0, -3.0),
        ] {
            assert!((yeo_johnson(x, lambda) - expected).abs() < 1e-12, "{x} {lambda}");
        }
    }

    #[test]
    fn minima_are_found_in_and_far_outside_the_first_bracket() {
        for at in [-30.0, -1.0, 0.0, 0.3, 2.0, 17.0] {
            let loss = |x: f64| (x - at).powi(2) + 0.1 * (x - at).powi(4);
            assert!((minimum(loss, bracket(loss)) - at).abs() < 1e-6, "{at}");
        }
    }

    /// A grid search is the obvious way to the same exponent.
    #[test]
    fn exponent_is_that_of_a_fine_grid() {
        let values: Vec<f64> = (1..60).map(|i| (f64::from(i) * 0.07).exp() - 3.0).collect();
        let found = best_lambda(&values);
        let loss = |lambda: f64| {
            let (_, variance) = super::moments(values.iter().map(|v| yeo_johnson(*v, lambda)));
            let slope: f64 = values.iter().map(|v: &f64| v.signum() * v.abs().ln_1p()).sum();
            0.5 * values.len() as f64 * variance.ln() - (lambda - 1.0) * slope
        };
        let grid = (-4000..4000).map(|i| f64::from(i) * 1e-3);
        let best = grid.min_by(|a, b| loss(*a).total_cmp(&loss(*b)));
        assert!(best.is_some_and(|best| (best - found).abs() < 2e-3), "{found} {best:?}");
    }
}
