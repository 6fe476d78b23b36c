//! Logistic regression with a ridge on a domain's own rows: the plain rival of the tables of results.
//!
//! Numbers are standardised on their declared scale, with a flag where cells are missing; categories are one 0/1
//! column a level, or, above [`MAX_ONE_HOT_LEVELS`] seen levels, one column of smoothed label log-odds without the
//! row itself. Fitted by Newton's method (iteratively re-weighted least squares; Hastie, Tibshirani and Friedman,
//! *The Elements of Statistical Learning*, 2nd ed., section 4.4.1) with halved steps. The ridge is chosen by
//! cross-validated log loss on training rows. Two-class targets only.

use anyhow::{Result, ensure};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;
use tabmesh_contract::{
    batch::{TypedBatch, TypedColumn},
    schema::{FeatureKind, FeatureSchema, NumericDomain},
};
use tabmesh_tfm::table::log_odds;

/// Fits on the labelled training rows and gives the probability of class 1 of every test row, in `(0, 1)`.
///
/// With rows of one class only the answer is a constant: the smoothed share of class 1. Equal arguments give equal
/// answers.
///
/// # Errors
/// A target that has not two classes, no labelled row, or batches that don't fit the schema.
pub fn fit_predict(
    train: &TypedBatch,
    test: &TypedBatch,
    schema: &FeatureSchema,
    seed: u64,
) -> Result<Vec<f64>> {
    let classes = schema.target().classes.len();
    ensure!(classes == 2, "logistic regression needs a target of 2 classes, got {classes}");
    let labelled: Vec<usize> =
        train.labels.iter().enumerate().filter(|(_, l)| l.is_some()).map(|(i, _)| i).collect();
    ensure!(!labelled.is_empty(), "logistic regression needs labelled rows");
    let train = train.take(&labelled);
    let labels: Vec<f64> = train.labels.iter().map(|l| f64::from(u8::from(*l == Some(1)))).collect();
    let ones: f64 = labels.iter().sum();
    if ones < 0.5 || ones > labels.len() as f64 - 0.5 {
        return Ok(vec![(ones + 0.5) / (labels.len() as f64 + 1.0); test.rows()]);
    }
    let coders = coders(&train, &labels, schema)?;
    let rows = design(&coders, &train, Some(&labels))?;
    let held = design(&coders, test, None)?;
    let ridge = choose_ridge(&rows, &labels, seed);
    let weights = fit(&rows, &labels, ridge);
    Ok((0..test.rows()).map(|i| sigmoid(held.logit(i, &weights))).collect())
}

/// Weights, the intercept last, that minimise `sum log(1 + exp(-y f)) + ridge / 2 |w|^2` (intercept free).
#[must_use]
pub fn fit(rows: &Matrix, labels: &[f64], ridge: f64) -> Vec<f64> {
    let size = rows.columns + 1;
    let mut weights = vec![0f64; size];
    let mut loss = objective(rows, labels, ridge, &weights);
    for _ in 0..MAX_STEPS {
        let (mut gradient, mut hessian) = (vec![0f64; size], vec![0f64; size * size]);
        for (i, label) in labels.iter().enumerate() {
            let p = sigmoid(rows.logit(i, &weights));
            let (residual, curvature) = (p - label, (p * (1.0 - p)).max(1e-12));
            let row = || rows.row(i).iter().copied().chain(std::iter::once(1.0)).enumerate();
            for (a, x) in row().filter(|(_, x)| x.abs() > 0.0) {
                gradient[a] += residual * x;
                for (b, z) in row().take(a + 1) {
                    hessian[a * size + b] += curvature * x * z;
                }
            }
        }
        for (a, (g, w)) in gradient.iter_mut().zip(&weights).take(rows.columns).enumerate() {
            *g += ridge * w;
            hessian[a * size + a] += ridge;
        }
        hessian[size * size - 1] += 1e-9;
        let Some(step) = solve(hessian, gradient, size) else { break };
        let (mut scale, before) = (1.0, loss);
        for _ in 0..MAX_HALVINGS {
            let moved: Vec<f64> = weights.iter().zip(&step).map(|(w, s)| w - scale * s).collect();
            let next = objective(rows, labels, ridge, &moved);
            if next <= loss {
                (weights, loss) = (moved, next);
                break;
            }
            scale *= 0.5;
        }
        if before - loss < 1e-9 * (1.0 + loss.abs()) {
            break;
        }
    }
    weights
}

/// Rows of numbers, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    columns: usize,
    values: Vec<f64>,
}

impl Matrix {
    /// Rows of `columns` numbers each, end to end.
    ///
    /// # Errors
    /// A length that isn't a multiple of `columns`, or a value that isn't finite.
    pub fn new(columns: usize, values: Vec<f64>) -> Result<Self> {
        ensure!(columns > 0 && values.len().is_multiple_of(columns), "rows of {columns} numbers needed");
        ensure!(values.iter().all(|v| v.is_finite()), "finite numbers needed");
        Ok(Self { columns, values })
    }

    fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.columns..(i + 1) * self.columns]
    }

    fn logit(&self, i: usize, weights: &[f64]) -> f64 {
        self.row(i).iter().zip(weights).map(|(x, w)| x * w).sum::<f64>() + weights[self.columns]
    }

    fn take(&self, rows: &[usize]) -> Self {
        Self { columns: self.columns, values: rows.iter().flat_map(|i| self.row(*i)).copied().collect() }
    }
}

fn objective(rows: &Matrix, labels: &[f64], ridge: f64, weights: &[f64]) -> f64 {
    let fit: f64 = labels.iter().enumerate().map(|(i, label)| row_loss(rows.logit(i, weights), *label)).sum();
    fit + 0.5 * ridge * weights[..rows.columns].iter().map(|w| w * w).sum::<f64>()
}

/// `ln(1 + exp(-f))` for label 1, `ln(1 + exp(f))` for label 0, without overflow.
fn row_loss(logit: f64, label: f64) -> f64 {
    let margin = if label > 0.5 { logit } else { -logit };
    (-margin).max(0.0) + (-margin.abs()).exp().ln_1p()
}

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

/// Solves `A x = b` for the lower triangle of a positive definite `A` by Cholesky; `None` if it isn't.
pub(crate) fn solve(mut a: Vec<f64>, mut b: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    for j in 0..n {
        for i in j..n {
            let dot: f64 = (0..j).map(|k| a[i * n + k] * a[j * n + k]).sum();
            let rest = a[i * n + j] - dot;
            if i == j {
                if rest.is_nan() || rest <= 0.0 {
                    return None;
                }
                a[i * n + j] = rest.sqrt();
            } else {
                a[i * n + j] = rest / a[j * n + j];
            }
        }
    }
    for i in 0..n {
        let dot: f64 = (0..i).map(|k| a[i * n + k] * b[k]).sum();
        b[i] = (b[i] - dot) / a[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|k| a[k * n + i] * b[k]).sum();
        b[i] = (b[i] - dot) / a[i * n + i];
    }
    Some(b)
}

/// The ridge with the smallest cross-validated log loss; [`PLAIN_RIDGE`] where rows are too few or enough.
fn choose_ridge(rows: &Matrix, labels: &[f64], seed: u64) -> f64 {
    let n = labels.len();
    let ones = labels.iter().filter(|l| **l > 0.5).count();
    if ones.min(n - ones) < FOLDS || n > MAX_CHOICE_ROWS || rows.columns > MAX_CHOICE_COLUMNS {
        return PLAIN_RIDGE;
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut ChaCha20Rng::seed_from_u64(seed));
    // Folds class by class, so that each has both.
    order.sort_by_key(|i| labels[*i] > 0.5);
    let mut best = (PLAIN_RIDGE, f64::INFINITY);
    for ridge in RIDGES {
        let mut loss = 0.0;
        for fold in 0..FOLDS {
            let part = |held: bool| -> Vec<usize> {
                order
                    .iter()
                    .enumerate()
                    .filter(|(k, _)| (k % FOLDS == fold) == held)
                    .map(|(_, i)| *i)
                    .collect()
            };
            let kept = part(false);
            let kept_labels: Vec<f64> = kept.iter().map(|i| labels[*i]).collect();
            let weights = fit(&rows.take(&kept), &kept_labels, ridge);
            loss += part(true).iter().map(|i| row_loss(rows.logit(*i, &weights), labels[*i])).sum::<f64>();
        }
        if loss < best.1 {
            best = (ridge, loss);
        }
    }
    best.0
}

/// How one feature becomes columns.
enum Coder {
    Number {
        domain: NumericDomain,
        mean: f64,
        deviation: f64,
        flag: bool,
    },
    /// Column of each code.
    OneHot {
        slots: Vec<Option<usize>>,
        width: usize,
    },
    /// Counts `[class 0, class 1]` of each code, and mean and deviation of the log-odds.
    LogOdds {
        counts: Vec<[f64; 2]>,
        totals: [f64; 2],
        mean: f64,
        deviation: f64,
    },
}

fn coders(train: &TypedBatch, labels: &[f64], schema: &FeatureSchema) -> Result<Vec<Coder>> {
    ensure!(train.columns.len() == schema.features().len(), "as many columns as features needed");
    schema
        .features()
        .iter()
        .zip(&train.columns)
        .map(|(feature, column)| match (&feature.kind, column) {
            (FeatureKind::Numeric(domain), TypedColumn::Numeric(values)) => {
                let known: Vec<f64> =
                    values.iter().filter(|v| !v.is_nan()).map(|v| on_scale(domain, *v)).collect();
                let (mean, deviation) = moments(&known);
                let flag = known.len() < values.len();
                Ok(Coder::Number { domain: domain.clone(), mean, deviation, flag })
            }
            (FeatureKind::Categorical { levels }, TypedColumn::Categorical(codes)) => {
                Ok(category(codes, labels, levels.len() + 2))
            }
            _ => anyhow::bail!("column of {} has the wrong kind", feature.id),
        })
        .collect()
}

fn category(codes: &[u32], labels: &[f64], size: usize) -> Coder {
    let mut counts = vec![[0f64; 2]; size];
    for (code, label) in codes.iter().zip(labels) {
        counts[index(*code, size)][usize::from(*label > 0.5)] += 1.0;
    }
    let seen = |c: &[f64; 2]| c[0] + c[1] > 0.5;
    let width = counts.iter().filter(|c| seen(c)).count();
    if width <= MAX_ONE_HOT_LEVELS {
        let mut next = 0;
        let slots = counts
            .iter()
            .map(|c| {
                seen(c).then(|| {
                    next += 1;
                    next - 1
                })
            })
            .collect();
        return Coder::OneHot { slots, width };
    }
    let totals = counts.iter().fold([0.0; 2], |s: [f64; 2], c| [s[0] + c[0], s[1] + c[1]]);
    let odds: Vec<f64> = codes
        .iter()
        .zip(labels)
        .map(|(code, label)| level_odds(&counts, totals, index(*code, size), Some(*label)))
        .collect();
    let (mean, deviation) = moments(&odds);
    Coder::LogOdds { counts, totals, mean, deviation }
}

fn index(code: u32, size: usize) -> usize {
    usize::try_from(code).map_or(size - 1, |c| c.min(size - 1))
}

/// Smoothed log-odds of a level, without one row of this label.
fn level_odds(counts: &[[f64; 2]], totals: [f64; 2], level: usize, own: Option<f64>) -> f64 {
    let mut count = counts[level];
    if let Some(label) = own {
        count[usize::from(label > 0.5)] -= 1.0;
    }
    log_odds(count[0], count[1], totals[0], totals[1])
}

fn on_scale(domain: &NumericDomain, value: f64) -> f64 {
    domain.scale.apply(value.clamp(domain.lower, domain.upper))
}

/// Mean and deviation; a deviation of 0 is given as 1.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    (mean, if variance.sqrt() > 1e-9 * mean.abs().max(1e-9) { variance.sqrt() } else { 1.0 })
}

/// Rows as numbers; `own` are the labels of rows that the coders were fitted on.
fn design(coders: &[Coder], rows: &TypedBatch, own: Option<&[f64]>) -> Result<Matrix> {
    ensure!(rows.columns.len() == coders.len(), "as many columns as features needed");
    let width = |coder: &Coder| match coder {
        Coder::Number { flag, .. } => 1 + usize::from(*flag),
        Coder::OneHot { width, .. } => *width,
        Coder::LogOdds { .. } => 1,
    };
    let columns: usize = coders.iter().map(width).sum();
    let mut values = vec![0f64; rows.rows() * columns];
    let mut first = 0;
    for (coder, column) in coders.iter().zip(&rows.columns) {
        ensure!(column.len() == rows.rows(), "columns of equal length needed");
        for (i, row) in values.chunks_exact_mut(columns).enumerate() {
            let to = &mut row[first..];
            match (coder, column) {
                (Coder::Number { domain, mean, deviation, flag }, TypedColumn::Numeric(numbers)) => {
                    let v = numbers[i];
                    to[0] = if v.is_nan() { 0.0 } else { (on_scale(domain, v) - mean) / deviation };
                    if *flag {
                        to[1] = f64::from(u8::from(v.is_nan()));
                    }
                }
                (Coder::OneHot { slots, .. }, TypedColumn::Categorical(codes)) => {
                    if let Some(slot) = slots[index(codes[i], slots.len())] {
                        to[slot] = 1.0;
                    }
                }
                (Coder::LogOdds { counts, totals, mean, deviation }, TypedColumn::Categorical(codes)) => {
                    let level = index(codes[i], counts.len());
                    to[0] = (level_odds(counts, *totals, level, own.map(|l| l[i])) - mean) / deviation;
                }
                _ => anyhow::bail!("a column has the wrong kind"),
            }
        }
        first += width(coder);
    }
    Matrix::new(columns, values)
}

/// Seen levels up to which a category is coded by 0/1 columns.
pub const MAX_ONE_HOT_LEVELS: usize = 20;
/// Ridges to choose from.
const RIDGES: [f64; 4] = [0.1, 1.0, 10.0, 100.0];
/// Ridge where none is chosen.
const PLAIN_RIDGE: f64 = 1.0;
const FOLDS: usize = 5;
/// Rows from which on the ridge hardly matters.
const MAX_CHOICE_ROWS: usize = 1000;
/// Columns from which on choosing takes too long.
const MAX_CHOICE_COLUMNS: usize = 150;
const MAX_STEPS: usize = 50;
const MAX_HALVINGS: usize = 30;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::Rng;
    use tabmesh_contract::schema::{Feature, FeatureId, Scale, Target};
    use tabmesh_tfm::metrics;

    use super::*;

    /// Group means of a single 0/1 column are fitted exactly: intercept and slope by hand.
    #[test]
    fn one_flag_without_ridge_gives_the_log_odds_of_both_groups() {
        // Flag 0: 1 of 4 rows is class 1; flag 1: 3 of 5 rows are.
        let flags = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        let labels = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0];
        let weights = fit(&Matrix::new(1, flags.to_vec()).unwrap(), &labels, 0.0);
        let (zero, one) = ((1f64 / 3.0).ln(), (3f64 / 2.0).ln());
        assert!((weights[1] - zero).abs() < 1e-6 && (weights[0] - (one - zero)).abs() < 1e-6, "{weights:?}");
    }

    /// At the optimum the gradient vanishes, also for separable rows, which only the ridge keeps finite.
    #[test]
    fn gradient_vanishes_at_the_solution() {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let values: Vec<f64> = (0..300).map(|_| rng.random_range(-1.0..1.0)).collect();
        let rows = Matrix::new(3, values.clone()).unwrap();
        for noise in [0.0, 1.0] {
            let labels: Vec<f64> = values
                .chunks_exact(3)
                .map(|r| f64::from(u8::from(r[0] - 0.5 * r[1] + noise * rng.random_range(-1.0..1.0) > 0.1)))
                .collect();
            let weights = fit(&rows, &labels, 0.7);
            for a in 0..4 {
                let total: f64 = (0..100)
                    .map(|i| {
                        let x = if a < 3 { rows.row(i)[a] } else { 1.0 };
                        (sigmoid(rows.logit(i, &weights)) - labels[i]) * x
                    })
                    .sum();
                let pull = if a < 3 { 0.7 * weights[a] } else { 0.0 };
                assert!((total + pull).abs() < 1e-3, "weight {a}: {total} {pull}");
            }
        }
    }

    fn schema(levels: usize) -> FeatureSchema {
        let id = |text: &str| FeatureId::new(text).unwrap();
        let domain = NumericDomain { lower: -9.0, upper: 9.0, scale: Scale::Linear, cut_points: None };
        let levels = (0..levels).map(|i| format!("l{i}")).collect();
        let feature = |name: &str, kind| Feature { id: id(name), kind, unit: None, description: None };
        FeatureSchema::new(
            vec![
                feature("a", FeatureKind::Numeric(domain)),
                feature("b", FeatureKind::Categorical { levels }),
            ],
            Target { id: id("y"), classes: vec!["no".into(), "yes".into()] },
        )
        .unwrap()
    }

    fn rows(count: usize, levels: u32, seed: u64) -> TypedBatch {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let mut batch = TypedBatch::empty(&schema(usize::try_from(levels).unwrap()));
        let (mut numbers, mut codes) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let (number, code) = (rng.random_range(-1.0..1.0), rng.random_range(0..levels));
            let logit = 2.0 * number + if code % 2 == 0 { 1.5 } else { -1.5 };
            batch.labels.push(Some(u16::from(rng.random_bool(sigmoid(logit)))));
            numbers.push(if rng.random_bool(0.1) { f64::NAN } else { number });
            codes.push(code);
            batch.units.push([0; 16]);
        }
        batch.columns = vec![TypedColumn::Numeric(numbers), TypedColumn::Categorical(codes)];
        batch
    }

    /// The true model has an AUC of about .86; one-hot and log-odds coding come near it.
    #[test]
    fn finds_the_signal_in_numbers_and_in_few_and_many_levels() {
        for levels in [4, 60] {
            let (train, test) = (rows(800, levels, 1), rows(2000, levels, 2));
            let schema = schema(usize::try_from(levels).unwrap());
            let p = fit_predict(&train, &test, &schema, 5).unwrap();
            let labels: Vec<u8> = test.labels.iter().map(|l| u8::from(*l == Some(1))).collect();
            let auc = metrics::roc_auc(&p, &labels).unwrap();
            assert!((0.8..0.93).contains(&auc), "{levels} levels: {auc}");
            assert!(metrics::log_loss(&p, &labels).unwrap() < 0.56);
            assert_eq!(p, fit_predict(&train, &test, &schema, 5).unwrap());
        }
    }

    #[test]
    fn one_class_gives_the_smoothed_share_and_bad_batches_are_refused() {
        let mut train = rows(9, 3, 1);
        train.labels = vec![Some(0); 9];
        let p = fit_predict(&train, &rows(2, 3, 2), &schema(3), 1).unwrap();
        assert!(p.iter().all(|v| (v - 0.05).abs() < 1e-12));
        let mut short = rows(9, 3, 1);
        short.columns.pop();
        assert!(fit_predict(&short, &rows(2, 3, 2), &schema(3), 1).is_err());
        assert!(fit_predict(&rows(9, 3, 1), &short, &schema(3), 1).is_err());
        train.labels = vec![None; 9];
        assert!(fit_predict(&train, &rows(2, 3, 2), &schema(3), 1).is_err());
        assert!(Matrix::new(2, vec![1.0, f64::NAN]).is_err() && Matrix::new(2, vec![1.0; 3]).is_err());
    }
}
