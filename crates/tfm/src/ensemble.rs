//! Prediction with an imported model the way its package does it: several views of one table, averaged.
//!
//! A view normalises the columns one way, permutes them, and renames the classes; its scores are put back before the
//! average. Class scores are averaged as logits, then softmax at temperature 0.9; numbers are averaged in the original
//! scale. Rules are those of PyPI tabicl 2.2.0, whose own views come from Python's generator: [`views`] draws others
//! of the same kind, and [`Ensemble::fit`] takes any.
//!
//! Context rows shape every prediction. This is inference inside one domain and no private release.

use std::collections::{BTreeMap, btree_map::Entry};

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;

use crate::{
    error::TfmError,
    model::{
        Model,
        forward::{SOFTMAX_TEMPERATURE, Targets, Task},
    },
    preprocess::{Column, Imputer, Norm, Normalisation, Numbers},
    regression::{Quantiles, TargetScale},
};

/// One view of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// How columns are normalised.
    pub norm: Norm,
    /// Position `p` of the view holds varying column `permutation[p]`.
    pub permutation: Vec<usize>,
    /// Class `c` is called `classes[c]` in the view; empty for regression.
    pub classes: Vec<usize>,
}

/// What an ensemble learns.
#[derive(Debug, Clone, PartialEq)]
pub enum Labels {
    /// Class indices below `classes`, one per context row.
    Classes {
        /// Number of classes.
        classes: usize,
        /// Class of each context row.
        labels: Vec<usize>,
    },
    /// Numbers in their original scale, one per context row.
    Numbers(Vec<f64>),
}

/// `count` views of tables with `columns` varying columns and `classes` classes (`None` for regression), fewer if
/// there aren't as many: rows of a random Latin square, times cyclic shifts of the classes, in random order, times
/// both normalisations. A single view leaves columns and classes as they are.
///
/// # Errors
/// [`TfmError::TooLarge`] beyond [`MAX_VIEWS`]; [`TfmError::Mismatch`] for no view or no column.
pub fn views(columns: usize, classes: Option<usize>, count: usize, seed: u64) -> Result<Vec<View>, TfmError> {
    if count > MAX_VIEWS {
        return Err(TfmError::TooLarge { what: "views", got: count, limit: MAX_VIEWS });
    }
    if count == 0 || columns == 0 || classes == Some(0) {
        let got = format!("{count} views, {columns} columns, {classes:?} classes");
        return Err(TfmError::mismatch("views", "at least one view, column and class", got));
    }
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let shifted = |by: usize| match classes {
        Some(classes) => (0..classes).map(|c| (c + classes - by) % classes).collect(),
        None => Vec::new(),
    };
    let (permutations, shifts) = if count == 1 {
        (vec![(0..columns).collect()], 1)
    } else {
        (latin_rows(columns, count, &mut rng), classes.unwrap_or(1))
    };
    let mut pairs: Vec<(usize, usize)> =
        (0..permutations.len()).flat_map(|p| (0..shifts).map(move |s| (p, s))).collect();
    pairs.shuffle(&mut rng);
    let norms = [Norm::None, Norm::Power];
    let all = pairs.into_iter().flat_map(|pair| norms.map(|norm| (pair, norm)));
    Ok(all
        .filter_map(|((p, s), norm)| {
            let permutation = permutations.get(p)?.clone();
            Some(View { norm, permutation, classes: shifted(s) })
        })
        .take(count)
        .collect())
}

/// Up to `count` rows of a random Latin square: permutations that put every column at most once in each position.
fn latin_rows(columns: usize, count: usize, rng: &mut ChaCha20Rng) -> Vec<Vec<usize>> {
    let mut shuffled = || {
        let mut order: Vec<usize> = (0..columns).collect();
        order.shuffle(rng);
        order
    };
    let (symbols, positions, rows) = (shuffled(), shuffled(), shuffled());
    rows.iter()
        .take(count)
        .map(|row| positions.iter().filter_map(|p| symbols.get((row + p) % columns).copied()).collect())
        .collect()
}

/// A model with a context and its views, ready to predict.
#[derive(Debug)]
pub struct Ensemble {
    model: Model,
    imputer: Imputer,
    kept: Vec<usize>,
    context: Numbers,
    normalisations: BTreeMap<Norm, Normalisation>,
    labels: Labels,
    scale: Option<TargetScale>,
    views: Vec<View>,
}

impl Ensemble {
    /// Fits preprocessing on labelled context rows. `views` gets the number of varying columns and of classes and
    /// gives the views, e.g. [`views`].
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if labels don't fit the rows or the model, no column varies or a view is no permutation;
    /// as [`Imputer::fit`], [`Normalisation::fit`] and `views`.
    pub fn fit(
        model: &Model,
        context: &[Column],
        labels: Labels,
        views: impl FnOnce(usize, Option<usize>) -> Result<Vec<View>, TfmError>,
    ) -> Result<Self, TfmError> {
        let imputer = Imputer::fit(context)?;
        let numbers = imputer.apply(context)?;
        let kept = numbers.varying();
        let context = numbers.select(&kept);
        let (classes, scale, count) = match &labels {
            Labels::Classes { classes, labels } => (Some(*classes), None, labels.len()),
            Labels::Numbers(values) => (None, Some(TargetScale::fit(values)?), values.len()),
        };
        if count != context.rows() {
            return Err(TfmError::mismatch("number of labels", context.rows(), count));
        }
        if let Labels::Classes { classes, labels } = &labels
            && let Some(label) = labels.iter().find(|label| *label >= classes)
        {
            return Err(TfmError::mismatch("class index", format!("< {classes}"), label));
        }
        let views = views(kept.len(), classes)?;
        if views.is_empty() || views.len() > MAX_VIEWS {
            return Err(TfmError::TooLarge { what: "views", got: views.len(), limit: MAX_VIEWS });
        }
        let mut normalisations = BTreeMap::new();
        for view in &views {
            check_permutation("columns of a view", &view.permutation, kept.len())?;
            check_permutation("classes of a view", &view.classes, classes.unwrap_or(0))?;
            if let Entry::Vacant(vacant) = normalisations.entry(view.norm) {
                vacant.insert(Normalisation::fit(view.norm, &context)?);
            }
        }
        Ok(Self { model: model.clone(), imputer, kept, context, normalisations, labels, scale, views })
    }

    /// The views.
    #[must_use]
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// Indices of the varying columns among the imputer's outputs.
    #[must_use]
    pub fn kept(&self) -> &[usize] {
        &self.kept
    }

    /// The scale of the targets; `None` for classes.
    #[must_use]
    pub fn scale(&self) -> Option<TargetScale> {
        self.scale
    }

    /// The model's outputs for the query rows, view by view, flattened: class scores `(m, K)` in the view's own class
    /// names, or unsorted quantiles `(m, Q)` of standardised targets.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for other columns than the context's; as [`Model::outputs`].
    pub fn outputs(&self, queries: &[Column]) -> Result<Vec<Vec<f32>>, TfmError> {
        let queries = self.imputer.apply(queries)?.select(&self.kept);
        if queries.rows() == 0 {
            return Ok(vec![Vec::new(); self.views.len()]);
        }
        let mut tables = BTreeMap::new();
        for (norm, fitted) in &self.normalisations {
            tables.insert(*norm, (fitted.apply(&self.context)?, fitted.apply(&queries)?));
        }
        let mut outputs = Vec::with_capacity(self.views.len());
        for view in &self.views {
            let Some((context, queries)) = tables.get(&view.norm) else { continue };
            let values =
                [context, queries].into_iter().flat_map(|t| t.select(&view.permutation).into_values());
            let targets = match (&self.labels, self.scale) {
                (Labels::Classes { classes, labels }, _) => Targets::Classes {
                    classes: *classes,
                    labels: labels.iter().filter_map(|label| view.classes.get(*label).copied()).collect(),
                },
                (Labels::Numbers(values), Some(scale)) => {
                    Targets::Values(values.iter().map(|v| scale.standardise(*v) as f32).collect())
                }
                (Labels::Numbers(_), None) => continue,
            };
            outputs.push(self.model.outputs(&Task {
                rows: context.rows() + queries.rows(),
                columns: self.kept.len(),
                context: context.rows(),
                values: values.map(|v| v as f32).collect(),
                targets,
            })?);
        }
        Ok(outputs)
    }

    /// Probabilities of the classes, one row per query row.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for an ensemble of numbers; as [`Self::outputs`].
    pub fn probabilities(&self, queries: &[Column]) -> Result<Vec<Vec<f64>>, TfmError> {
        let Labels::Classes { classes, .. } = self.labels else {
            return Err(TfmError::mismatch("labels of the ensemble", "classes", "numbers"));
        };
        let outputs = self.outputs(queries)?;
        let rows = outputs.first().map_or(0, Vec::len) / classes.max(1);
        let mut totals = vec![vec![0f64; classes]; rows];
        for (view, scores) in self.views.iter().zip(&outputs) {
            for (total, row) in totals.iter_mut().zip(scores.chunks_exact(classes.max(1))) {
                for (t, name) in total.iter_mut().zip(&view.classes) {
                    *t += row.get(*name).copied().map_or(0.0, f64::from);
                }
            }
        }
        let scale = f64::from(SOFTMAX_TEMPERATURE) * self.views.len() as f64;
        for row in &mut totals {
            let peak = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            row.iter_mut().for_each(|t| *t = ((*t - peak) / scale).exp());
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|t| *t /= sum);
        }
        Ok(totals)
    }

    /// Predicted distributions of standardised targets, view by view, one per query row.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for an ensemble of classes; as [`Self::outputs`].
    pub fn quantiles(&self, queries: &[Column]) -> Result<Vec<Vec<Quantiles>>, TfmError> {
        if self.scale.is_none() {
            return Err(TfmError::mismatch("labels of the ensemble", "numbers", "classes"));
        }
        let quantiles = self.model.config().outputs();
        self.outputs(queries)?.into_iter().map(|rows| Quantiles::rows(rows, quantiles)).collect()
    }

    /// A statistic of each query row's distribution in the original scale, averaged over the views; e.g.
    /// [`Quantiles::mean`], or [`Quantiles::at`] a level.
    ///
    /// # Errors
    /// As [`Self::quantiles`].
    pub fn numbers(
        &self,
        queries: &[Column],
        statistic: impl Fn(&Quantiles) -> f64,
    ) -> Result<Vec<f64>, TfmError> {
        let views = self.quantiles(queries)?;
        let scale = self.scale.unwrap_or(TargetScale { mean: 0.0, deviation: 1.0 });
        let mut totals = vec![0f64; views.first().map_or(0, Vec::len)];
        for rows in &views {
            for (total, row) in totals.iter_mut().zip(rows) {
                *total += scale.restore(statistic(row)) / views.len() as f64;
            }
        }
        Ok(totals)
    }
}

fn check_permutation(what: &'static str, order: &[usize], count: usize) -> Result<(), TfmError> {
    let mut sorted = order.to_vec();
    sorted.sort_unstable();
    if sorted.iter().copied().eq(0..count) {
        return Ok(());
    }
    Err(TfmError::mismatch(what, format!("each of 0..{count} once"), format!("{order:?}")))
}

/// Most views of an ensemble.
pub const MAX_VIEWS: usize = 64;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeSet;

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::{Ensemble, Labels, MAX_VIEWS, View, views};
    use crate::{
        error::TfmError,
        model::{Model, config::ModelConfig, variant::Variant},
        preprocess::{Column, Norm},
    };

    fn model(max_classes: usize) -> Model {
        let variant = Variant { num_quantiles: 9, ..Variant::default() };
        let config = ModelConfig { max_classes, feature_text_dim: 0, variant, ..ModelConfig::tiny() };
        Model::random(&config, &mut ChaCha20Rng::seed_from_u64(8)).unwrap()
    }

    fn columns(rows: usize, seed: u64) -> Vec<Column> {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let mut numbers = || (0..rows).map(|_| Some(rng.random_range(-3.0..3.0))).collect();
        vec![Column::Numeric(numbers()), Column::Numeric(vec![Some(1.0); rows]), Column::Numeric(numbers())]
    }

    #[test]
    fn views_are_distinct_and_balanced() {
        let drawn = views(5, Some(3), 8, 42).unwrap();
        assert_eq!(drawn, views(5, Some(3), 8, 42).unwrap());
        assert_ne!(drawn, views(5, Some(3), 8, 43).unwrap());
        let distinct: BTreeSet<String> = drawn.iter().map(|v| format!("{v:?}")).collect();
        assert_eq!((drawn.len(), distinct.len()), (8, 8));
        assert_eq!(drawn.iter().filter(|v| v.norm == Norm::Power).count(), 4);
        // Two columns and no classes give two permutations and four views in all; a square puts each column first once.
        let few = views(2, None, 8, 1).unwrap();
        assert_eq!(few.len(), 4);
        assert_eq!(few.iter().map(|v| v.permutation[0]).collect::<BTreeSet<_>>().len(), 2);
        let one = views(4, Some(2), 1, 9).unwrap();
        assert_eq!(
            (one[0].permutation.as_slice(), one[0].classes.as_slice()),
            (&[0, 1, 2, 3][..], &[0, 1][..])
        );
        assert!(views(4, None, MAX_VIEWS, 1).is_ok());
        assert!(matches!(views(4, None, MAX_VIEWS + 1, 1), Err(TfmError::TooLarge { .. })));
        assert!(views(0, None, 1, 1).is_err() && views(1, Some(0), 1, 1).is_err());
    }

    #[test]
    fn predictions_are_distributions_and_numbers_in_the_targets_scale() {
        let (context, queries) = (columns(30, 1), columns(4, 2));
        let labels = Labels::Classes { classes: 5, labels: (0..30).map(|i| i % 5).collect() };
        let many = Ensemble::fit(&model(3), &context, labels, |c, k| views(c, k, 4, 7)).unwrap();
        assert_eq!(many.kept(), [0, 2]);
        for row in many.probabilities(&queries).unwrap() {
            assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-9 && row.iter().all(|p| *p > 0.0));
        }
        assert!(matches!(many.quantiles(&queries), Err(TfmError::Mismatch { .. })));
        let targets: Vec<f64> = (0..30).map(|i| 1000.0 + f64::from(i)).collect();
        let labels = Labels::Numbers(targets.clone());
        let numbers = Ensemble::fit(&model(0), &context, labels, |c, k| views(c, k, 4, 7)).unwrap();
        let means = numbers.numbers(&queries, super::Quantiles::mean).unwrap();
        let shifted = Labels::Numbers(targets.iter().map(|t| 2.0 * t + 5.0).collect());
        let other = Ensemble::fit(&model(0), &context, shifted, |c, k| views(c, k, 4, 7)).unwrap();
        for (a, b) in means.iter().zip(other.numbers(&queries, super::Quantiles::mean).unwrap()) {
            assert!((2.0 * a + 5.0 - b).abs() < 1e-2, "{a} {b}");
        }
        assert!(numbers.probabilities(&queries).is_err());
        assert!(numbers.numbers(&columns(0, 3), super::Quantiles::mean).unwrap().is_empty());
    }

    #[test]
    fn unfit_ensembles_are_refused() {
        let context = columns(6, 1);
        let labels = |labels: Vec<usize>| Labels::Classes { classes: 2, labels };
        let fit = |labels, view: View| {
            Ensemble::fit(&model(3), &context, labels, |_, _| Ok(vec![view])).unwrap_err()
        };
        let view = View { norm: Norm::None, permutation: vec![0, 1], classes: vec![1, 0] };
        let refused = fit(labels(vec![0, 1]), view.clone());
        assert!(matches!(refused, TfmError::Mismatch { what: "number of labels", .. }));
        let refused = fit(labels(vec![0, 1, 2, 0, 1, 0]), view.clone());
        assert!(matches!(refused, TfmError::Mismatch { what: "class index", .. }));
        let doubled = View { permutation: vec![0, 0], ..view.clone() };
        let refused = fit(labels(vec![0; 6]), doubled);
        assert!(matches!(refused, TfmError::Mismatch { what: "columns of a view", .. }));
        let refused = fit(labels(vec![0; 6]), View { classes: vec![], ..view });
        assert!(matches!(refused, TfmError::Mismatch { what: "classes of a view", .. }));
    }
}
