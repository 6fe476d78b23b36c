//! Figures of merit of predictions: ranking, log loss, Brier score and calibration.
//!
//! All of them are local figures; which of them may leave a domain is decided elsewhere.

/// Area under the ROC curve with ties counted half; `None` without both classes.
///
/// `labels` are 0 or 1, of the same length as `scores`; a `NaN` score gives `None`.
#[must_use]
pub fn roc_auc(scores: &[f64], labels: &[u8]) -> Option<f64> {
    if scores.len() != labels.len() || scores.iter().any(|s| s.is_nan()) {
        return None;
    }
    let mut order: Vec<(f64, u8)> = scores.iter().copied().zip(labels.iter().copied()).collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut wins) = (0f64, 0f64);
    let (mut positives, mut negatives) = (0f64, 0f64);
    for tied in order.chunk_by(|a, b| a.0.partial_cmp(&b.0) == Some(std::cmp::Ordering::Equal)) {
        let ones = tied.iter().filter(|t| t.1 == 1).count() as f64;
        let zeros = tied.len() as f64 - ones;
        wins += ones * (below + 0.5 * zeros);
        below += zeros;
        positives += ones;
        negatives += zeros;
    }
    (positives > 0.0 && negatives > 0.0).then(|| wins / (positives * negatives))
}

/// Mean negative log-likelihood of binary labels under probabilities of class 1; `None` for no rows.
///
/// Probabilities are clamped to `[1e-7, 1 - 1e-7]`.
#[must_use]
pub fn log_loss(probabilities: &[f64], labels: &[u8]) -> Option<f64> {
    mean(probabilities, labels, |p, y| {
        let p = p.clamp(1e-7, 1.0 - 1e-7);
        if y == 1 { -p.ln() } else { -(1.0 - p).ln() }
    })
}

/// Mean squared distance of probabilities of class 1 from the labels; `None` for no rows.
#[must_use]
pub fn brier(probabilities: &[f64], labels: &[u8]) -> Option<f64> {
    mean(probabilities, labels, |p, y| (p - f64::from(y.min(1))).powi(2))
}

/// Intercept and slope of a logistic regression of the label on the logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// 0 for calibrated predictions; positive if probabilities are too low on average.
    pub intercept: f64,
    /// 1 for calibrated predictions; below 1 if they are too extreme.
    pub slope: f64,
}

/// Fits [`Calibration`] by Newton's method with a weak ridge (1e-6); `None` without both classes.
#[must_use]
pub fn calibration(probabilities: &[f64], labels: &[u8]) -> Option<Calibration> {
    let logits: Vec<f64> = probabilities
        .iter()
        .map(|p| {
            let p = p.clamp(1e-7, 1.0 - 1e-7);
            (p / (1.0 - p)).ln()
        })
        .collect();
    roc_auc(&logits, labels)?;
    let (mut a, mut b) = (0f64, 1f64);
    for _ in 0..50 {
        let (mut ga, mut gb, mut haa, mut hab, mut hbb) = (-1e-6 * a, -1e-6 * (b - 1.0), 1e-6, 0.0, 1e-6);
        for (x, &y) in logits.iter().zip(labels) {
            let p = 1.0 / (1.0 + (-(a + b * x)).exp());
            let (residual, weight) = (f64::from(y.min(1)) - p, p * (1.0 - p));
            ga += residual;
            gb += residual * x;
            haa += weight;
            hab += weight * x;
            hbb += weight * x * x;
        }
        let determinant = haa * hbb - hab * hab;
        if determinant <= 0.0 {
            break;
        }
        let (da, db) = ((hbb * ga - hab * gb) / determinant, (haa * gb - hab * ga) / determinant);
        // Separable labels send the slope to infinity; bounded steps and values keep the figure finite.
        a = (a + da.clamp(-2.0, 2.0)).clamp(-50.0, 50.0);
        b = (b + db.clamp(-2.0, 2.0)).clamp(-50.0, 50.0);
        if da.abs() + db.abs() < 1e-10 {
            break;
        }
    }
    Some(Calibration { intercept: a, slope: b })
}

fn mean(probabilities: &[f64], labels: &[u8], f: impl Fn(f64, u8) -> f64) -> Option<f64> {
    if probabilities.is_empty() || probabilities.len() != labels.len() {
        return None;
    }
    let sum: f64 = probabilities.iter().zip(labels).map(|(p, y)| f(*p, *y)).sum();
    Some(sum / probabilities.len() as f64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{brier, calibration, log_loss, roc_auc};

    /// The obvious quadratic definition.
    fn naive_auc(scores: &[f64], labels: &[u8]) -> f64 {
        let (mut wins, mut pairs) = (0.0, 0.0);
        for (s, y) in scores.iter().zip(labels) {
            for (t, z) in scores.iter().zip(labels) {
                if *y == 1 && *z == 0 {
                    pairs += 1.0;
                    wins += if s > t {
                        1.0
                    } else if s < t {
                        0.0
                    } else {
                        0.5
                    };
                }
            }
        }
        wins / pairs
    }

    #[test]
    fn auc_equals_the_quadratic_definition_with_ties() {
        let scores: Vec<f64> = (0..60).map(|i| f64::from((i * 37) % 11)).collect();
        let labels: Vec<u8> = (0..60).map(|i| u8::from((i * 13) % 7 < 3)).collect();
        assert!((roc_auc(&scores, &labels).unwrap() - naive_auc(&scores, &labels)).abs() < 1e-12);
        assert_eq!(roc_auc(&[0.1, 0.2], &[1, 1]), None);
        assert_eq!(roc_auc(&[0.1, f64::NAN], &[1, 0]), None);
    }

    #[test]
    fn losses_match_hand_computed_values() {
        // -(ln .8 + ln .6) / 2 and (.04 + .16) / 2.
        assert!((log_loss(&[0.8, 0.4], &[1, 0]).unwrap() - 0.366_984_588).abs() < 1e-8);
        assert!((brier(&[0.8, 0.4], &[1, 0]).unwrap() - 0.1).abs() < 1e-12);
        assert_eq!(log_loss(&[], &[]), None);
    }

    #[test]
    fn calibration_recovers_a_known_distortion() {
        // 3000 rows whose true logit is 0.5 + 0.4 * reported logit, labels at their expected frequency.
        let (mut p, mut y) = (Vec::new(), Vec::new());
        for level in 0..30 {
            let logit = -3.0 + 0.2 * f64::from(level);
            let truth = 1.0 / (1.0 + (-(0.5 + 0.4 * logit)).exp());
            for i in 0..1000 {
                p.push(1.0 / (1.0 + (-logit).exp()));
                y.push(u8::from((f64::from(i) + 0.5) / 1000.0 < truth));
            }
        }
        let fit = calibration(&p, &y).unwrap();
        assert!((fit.intercept - 0.5).abs() < 0.01 && (fit.slope - 0.4).abs() < 0.01, "{fit:?}");
    }
}
