//! Convex weights on the logits of several models, by penalised log loss near given weights.
//!
//! A blend of models whose errors differ is rarely worse than the best of them, and its weights are learnt from far fewer
//! rows than a choice needs (stacking: Wolpert 1992; convex weights: Breiman 1996). The log loss of a weighted logit is
//! convex in the weights, so projected gradients find the one optimum; a pull of [`PULL`] rows holds it near the shipped
//! weights while there is little evidence. Two classes.

/// Weights on the simplex that minimise log loss plus `PULL / 2 · |w - near|²`; weights under [`LEAST_WEIGHT`] are dropped.
///
/// `logits` are one list of logits a model, all as long as `labels` (whether a row is of class 1); `near` lies on the
/// simplex, one weight a model. Equal arguments give equal weights.
#[must_use]
pub fn fit(logits: &[&[f64]], labels: &[bool], near: &[f64]) -> Vec<f64> {
    let objective = |weights: &[f64]| {
        let loss: f64 = labels
            .iter()
            .enumerate()
            .map(|(row, label)| row_loss(blended(logits, weights, row), *label))
            .sum();
        loss + 0.5 * PULL * weights.iter().zip(near).map(|(w, n)| (w - n).powi(2)).sum::<f64>()
    };
    let mut at = near.to_vec();
    let (mut value, mut step) = (objective(&at), FIRST_STEP);
    for _ in 0..MOST_STEPS {
        let mut gradient: Vec<f64> = at.iter().zip(near).map(|(w, n)| PULL * (w - n)).collect();
        for (row, label) in labels.iter().enumerate() {
            let residual = sigmoid(blended(logits, &at, row)) - f64::from(u8::from(*label));
            for (sum, model) in gradient.iter_mut().zip(logits) {
                *sum += residual * model[row];
            }
        }
        let before = value;
        // Halved until it goes down; a step that goes down is tried twice as long next time.
        while step > SMALLEST_STEP {
            let moved: Vec<f64> = at.iter().zip(&gradient).map(|(w, g)| w - step * g).collect();
            let moved = onto_simplex(&moved);
            let next = objective(&moved);
            if next < value {
                (at, value) = (moved, next);
                step *= 2.0;
                break;
            }
            step *= 0.5;
        }
        if before - value <= 1e-9 * (1.0 + before.abs()) {
            break;
        }
    }
    without_small(&at)
}

/// The weighted logit of every row.
#[must_use]
pub fn blend(logits: &[&[f64]], weights: &[f64]) -> Vec<f64> {
    let rows = logits.first().map_or(0, |model| model.len());
    (0..rows).map(|row| blended(logits, weights, row)).collect()
}

/// Log loss of a row at a logit of class 1, without overflow.
#[must_use]
pub fn row_loss(logit: f64, label: bool) -> f64 {
    let signed = if label { -logit } else { logit };
    signed.max(0.0) + (-signed.abs()).exp().ln_1p()
}

/// Weights without those under [`LEAST_WEIGHT`], scaled to sum to 1 again.
#[must_use]
pub fn without_small(weights: &[f64]) -> Vec<f64> {
    let kept: Vec<f64> = weights.iter().map(|w| if *w < LEAST_WEIGHT { 0.0 } else { *w }).collect();
    let sum: f64 = kept.iter().sum();
    kept.into_iter().map(|w| w / sum).collect()
}

fn blended(logits: &[&[f64]], weights: &[f64], row: usize) -> f64 {
    logits.iter().zip(weights).map(|(model, weight)| weight * model[row]).sum()
}

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

/// The nearest point of the simplex (Held, Wolfe and Crowder 1974): a common shift, then nothing below 0.
fn onto_simplex(point: &[f64]) -> Vec<f64> {
    let mut sorted = point.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut shift) = (0.0, 0.0);
    for (count, value) in sorted.iter().enumerate() {
        sum += value;
        let tried = (sum - 1.0) / (count + 1) as f64;
        if value - tried > 0.0 {
            shift = tried;
        }
    }
    point.iter().map(|value| (value - shift).max(0.0)).collect()
}

/// Weight of the pull to the shipped weights, in rows.
pub const PULL: f64 = 200.0;
/// Weight below which a model isn't served: it costs its time and moves nothing.
pub const LEAST_WEIGHT: f64 = 0.02;
const MOST_STEPS: usize = 500;
const FIRST_STEP: f64 = 0.01;
const SMALLEST_STEP: f64 = 1e-12;

#[cfg(test)]
mod tests {
    use super::*;

    /// Low-discrepancy logits of two models, and labels at the rate that `truth` gives each row.
    fn sample(n: usize, truth: impl Fn(f64, f64) -> f64) -> (Vec<f64>, Vec<f64>, Vec<bool>) {
        let spread = |i: usize, step: f64| -3.0 + 6.0 * ((i as f64 * step) % 1.0);
        let (a, b): (Vec<f64>, Vec<f64>) =
            (0..n).map(|i| (spread(i, 0.618_034), spread(i, 0.414_213_6))).unzip();
        let labels = a
            .iter()
            .zip(&b)
            .enumerate()
            .map(|(i, (a, b))| (i as f64 * 0.754_877_7 + 0.31) % 1.0 < sigmoid(truth(*a, *b)))
            .collect();
        (a, b, labels)
    }

    #[test]
    fn true_weights_are_found_from_enough_rows() {
        for truth in [0.8, 0.5, 0.1] {
            let (a, b, labels) = sample(20_000, |a, b| truth * a + (1.0 - truth) * b);
            let found = fit(&[&a, &b], &labels, &[0.5, 0.5]);
            assert!(
                (found[0] - truth).abs() < 0.04 && (found[0] + found[1] - 1.0).abs() < 1e-12,
                "{found:?}"
            );
        }
    }

    #[test]
    fn few_rows_stay_near_the_shipped_weights_and_none_are_them() {
        let (a, b, labels) = sample(8, |a, _| a);
        let found = fit(&[&a, &b], &labels, &[0.3, 0.7]);
        assert!((found[0] - 0.3).abs() < 0.3, "{found:?}");
        assert_eq!(fit(&[&[], &[]], &[], &[0.3, 0.7]), [0.3, 0.7]);
    }

    /// The optimum by a grid over the simplex of three models, the third of them useless.
    #[test]
    fn no_point_of_the_simplex_is_better() {
        let (a, b, labels) = sample(400, |a, b| 0.9 * a + 0.1 * b);
        let c: Vec<f64> = a.iter().rev().map(|v| 3.0 * v).collect();
        let (models, near) = ([a.as_slice(), &b, &c], [1.0 / 3.0; 3]);
        let objective = |weights: &[f64]| {
            let loss: f64 = blend(&models, weights).iter().zip(&labels).map(|(z, y)| row_loss(*z, *y)).sum();
            loss + 0.5 * PULL * weights.iter().zip(&near).map(|(w, n)| (w - n).powi(2)).sum::<f64>()
        };
        let found = fit(&models, &labels, &near);
        let value = objective(&found);
        for i in 0..=50 {
            for j in 0..=50 - i {
                let (x, y) = (f64::from(i) / 50.0, f64::from(j) / 50.0);
                let other = objective(&[x, y, 1.0 - x - y]);
                // Dropping small weights may cost a little.
                assert!(value <= other + 0.2, "{found:?}: {value} {other} at {x} {y}");
            }
        }
    }

    #[test]
    fn projection_and_dropping_keep_the_sum() {
        assert_eq!(onto_simplex(&[0.2, 0.8]), [0.2, 0.8]);
        assert_eq!(onto_simplex(&[2.0, 0.0, -1.0]), [1.0, 0.0, 0.0]);
        let found = onto_simplex(&[0.5, 0.5, 0.5]);
        assert!(found.iter().all(|w| (w - 1.0 / 3.0).abs() < 1e-12));
        // At the limit a weight is kept, below it isn't.
        assert_eq!(without_small(&[0.02, 0.98]), [0.02, 0.98]);
        assert_eq!(without_small(&[0.0199, 0.9801]), [0.0, 1.0]);
    }

    #[test]
    fn extreme_logits_stay_finite() {
        let (a, b) = ([1e6, -1e6, 900.0, 0.0], [-1e6, 1e6, -900.0, 0.0]);
        let found = fit(&[&a, &b], &[true, false, false, true], &[0.5, 0.5]);
        assert!(found.iter().all(|w| w.is_finite()) && (found.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((row_loss(0.0, true) - std::f64::consts::LN_2).abs() < 1e-12);
        assert!((row_loss(-800.0, true) - 800.0).abs() < 1e-9);
    }
}
