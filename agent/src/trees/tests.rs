//! Trees on made-up tables: what they learn, and that equal rows give equal trees.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests")]

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tabmesh_contract::schema::{Feature, FeatureId, NumericDomain, Scale, Target};
use tabmesh_tfm::metrics;

use super::*;

const LEVELS: usize = 60;

/// A numeric column and a categorical one of [`LEVELS`] levels.
fn schema(classes: &[&str]) -> FeatureSchema {
    let domain = NumericDomain { lower: -4.0, upper: 4.0, scale: Scale::Linear, cut_points: None };
    let levels = (0..LEVELS).map(|l| l.to_string()).collect();
    let feature =
        |id: &str, kind| Feature { id: FeatureId::new(id).unwrap(), kind, unit: None, description: None };
    let classes = classes.iter().map(|&c| c.to_owned()).collect();
    FeatureSchema::new(
        vec![feature("a", FeatureKind::Numeric(domain)), feature("b", FeatureKind::Categorical { levels })],
        Target { id: FeatureId::new("y").unwrap(), classes },
    )
    .unwrap()
}

/// Rows whose chance of class 1 is `chance(number, code)`.
fn rows(count: usize, seed: u64, chance: impl Fn(f64, u32) -> f64) -> TypedBatch {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let (mut numbers, mut codes, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..count {
        let (number, code) = (rng.random_range(-2.0..2.0), rng.random_range(0..LEVELS as u32));
        labels.push(Some(u16::from(rng.random_bool(chance(number, code)))));
        numbers.push(number);
        codes.push(code);
    }
    TypedBatch {
        columns: vec![TypedColumn::Numeric(numbers), TypedColumn::Categorical(codes)],
        labels,
        units: vec![[0; 16]; count],
    }
}

fn fit_predict(
    own: &TypedBatch,
    corpus: Option<&TypedBatch>,
    test: &TypedBatch,
    schema: &FeatureSchema,
    seed: u64,
) -> Result<Vec<f64>, TreeError> {
    Trees::fit(own, corpus, schema, seed)?.probabilities(test)
}

fn auc(test: &TypedBatch, probabilities: &[f64]) -> f64 {
    metrics::roc_auc(probabilities, &labels(test)).unwrap()
}

fn labels(test: &TypedBatch) -> Vec<u8> {
    test.labels.iter().map(|l| u8::from(*l == Some(1))).collect()
}

fn binary() -> FeatureSchema {
    schema(&["0", "1"])
}

#[test]
fn numbers_and_categories_are_both_learnt() {
    let chance = |number: f64, code: u32| match (number > 0.0, code.is_multiple_of(2)) {
        (true, true) => 0.95,
        (false, false) => 0.05,
        _ => 0.5,
    };
    let (train, test) = (rows(2000, 1, chance), rows(1000, 2, chance));
    let learnt = auc(&test, &fit_predict(&train, None, &test, &binary(), 3).unwrap());
    let truth: Vec<f64> = match (&test.columns[0], &test.columns[1]) {
        (TypedColumn::Numeric(n), TypedColumn::Categorical(c)) => {
            n.iter().zip(c).map(|(&n, &c)| chance(n, c)).collect()
        }
        _ => unreachable!(),
    };
    assert!(learnt > auc(&test, &truth) - 0.03, "{learnt}");
}

/// Out-of-fold statistics: a row's own label must not come back to it through its category. With labels
/// independent of everything the AUC on 2000 test rows has a standard error of .013; the band is 4 of them.
#[test]
fn a_random_column_of_many_levels_gains_nothing() {
    let (train, test) = (rows(800, 4, |_, _| 0.5), rows(2000, 5, |_, _| 0.5));
    let probabilities = fit_predict(&train, None, &test, &binary(), 6).unwrap();
    assert!((auc(&test, &probabilities) - 0.5).abs() < 0.052);
    // Cross-validated rounds leave the predictions near the base rate: log loss close to ln 2.
    let loss = metrics::log_loss(&probabilities, &labels(&test)).unwrap();
    assert!(loss < std::f64::consts::LN_2 + 0.02, "{loss}");
}

#[test]
fn rows_of_one_class_give_a_constant() {
    let test = rows(5, 2, |_, _| 0.5);
    let all_ones = fit_predict(&rows(9, 1, |_, _| 1.0), None, &test, &binary(), 0).unwrap();
    assert!(all_ones.len() == 5 && all_ones.iter().all(|p| (p - 0.95).abs() < 1e-12));
    let none = fit_predict(&rows(0, 1, |_, _| 1.0), None, &test, &binary(), 0).unwrap();
    assert!(none.len() == 5 && none.iter().all(|p| (p - 0.5).abs() < 1e-12));
}

#[test]
fn one_row_of_a_class_is_enough_to_fit() {
    let mut train = rows(64, 1, |_, _| 0.0);
    train.labels[7] = Some(1);
    let test = rows(50, 2, |_, _| 0.5);
    let probabilities = fit_predict(&train, None, &test, &binary(), 0).unwrap();
    assert!(probabilities.iter().all(|p| (0.0..0.5).contains(p)));
    assert!(fit_predict(&train, None, &rows(0, 2, |_, _| 0.5), &binary(), 0).unwrap().is_empty());
}

#[test]
fn corpus_rows_help_where_own_rows_are_few() {
    let chance = |number: f64, code: u32| if number + f64::from(code % 3) > 1.0 { 0.9 } else { 0.1 };
    let (own, corpus, test) = (rows(48, 1, chance), rows(1500, 2, chance), rows(1000, 3, chance));
    let loss = |corpus| {
        let probabilities = fit_predict(&own, corpus, &test, &binary(), 0).unwrap();
        metrics::log_loss(&probabilities, &labels(&test)).unwrap()
    };
    let (alone, helped) = (loss(None), loss(Some(&corpus)));
    assert!(helped < alone - 0.05, "{alone} {helped}");
    // No own row at all: the corpus alone.
    let none = fit_predict(&rows(0, 1, chance), Some(&corpus), &test, &binary(), 0).unwrap();
    assert!(auc(&test, &none) > 0.8);
}

#[test]
fn corpus_rows_weigh_their_share_of_the_own_rows_and_have_their_label_rate() {
    let chance = |_, _| 0.5;
    let weigh = |own: usize, corpus: usize, share: f64| {
        let (mut own, mut corpus) = (rows(own, 1, chance), rows(corpus, 2, chance));
        for (row, label) in own.labels.iter_mut().chain(&mut corpus.labels).enumerate() {
            *label = Some((row % 2) as u16);
        }
        let weights = Sample::new(&own, Some(&corpus)).weights(share);
        (weights.first().copied().unwrap(), *weights.last().unwrap())
    };
    assert_eq!(weigh(100, 600, 3.0), (1.0, 0.5));
    assert_eq!(weigh(100, 600, 0.3), (1.0, 0.05));
    assert_eq!(weigh(100, 200, 3.0), (1.0, 1.0));
    assert_eq!(weigh(0, 200, 3.0), (1.0, 1.0));
    // Own rate 10 of 100 drawn to .5 by 20 rows: (10 + 10) / 120 = 1/6 of 600 rows.
    let [zero, one] = weights_to_rate(10, 100, 300, 600);
    assert!((300.0 * (zero + one) - 600.0).abs() < 1e-9 && (300.0 * one - 100.0).abs() < 1e-9);
    assert_eq!(weights_to_rate(5, 10, 0, 60), [1.0, 1.0]);
    assert_eq!(weights_to_rate(5, 10, 0, 0), [1.0, 1.0]);
}

/// Labels of the corpus are turned round, so any weight on it hurts.
#[test]
fn a_corpus_that_misleads_is_given_little_weight() {
    let chance = |number: f64, _| if number > 0.0 { 0.9 } else { 0.1 };
    let (own, wrong) = (rows(400, 1, chance), rows(1500, 2, |number, code| 1.0 - chance(number, code)));
    let right = rows(1500, 2, chance);
    let share = |corpus| Trees::fit(&own, Some(corpus), &binary(), 0).unwrap().settings().corpus_share;
    assert!(share(&wrong) < 0.5 && share(&right) >= 1.0);
}

#[test]
fn rows_without_a_label_change_nothing_and_equal_seeds_agree() {
    let chance = |number: f64, _| if number > 0.0 { 0.8 } else { 0.2 };
    let (train, test) = (rows(300, 1, chance), rows(40, 2, chance));
    let mut more = rows(50, 3, chance);
    more.labels.fill(None);
    more.append(&train);
    let first = fit_predict(&train, None, &test, &binary(), 9).unwrap();
    assert_eq!(first, fit_predict(&more, None, &test, &binary(), 9).unwrap());
    assert_ne!(first, fit_predict(&train, None, &test, &binary(), 10).unwrap());
}

#[test]
fn missing_values_carry_information() {
    let mut train = rows(1200, 1, |number, _| if number > 1.0 { 0.9 } else { 0.1 });
    let mut test = rows(600, 2, |number, _| if number > 1.0 { 0.9 } else { 0.1 });
    for batch in [&mut train, &mut test] {
        let TypedColumn::Numeric(numbers) = &mut batch.columns[0] else { unreachable!() };
        for number in numbers.iter_mut() {
            *number = if *number > 1.0 { f64::NAN } else { 0.5 };
        }
    }
    let probabilities = fit_predict(&train, None, &test, &binary(), 0).unwrap();
    assert!(auc(&test, &probabilities) > 0.85);
    // Level never seen in training, and "missing", in test rows only.
    test.columns[1] = TypedColumn::Categorical((0..600).map(|i| LEVELS as u32 + i % 2).collect());
    assert!(fit_predict(&train, None, &test, &binary(), 0).unwrap().iter().all(|p| p.is_finite()));
}

#[test]
fn columns_without_a_value_or_with_one_value_are_no_obstacle() {
    let mut train = rows(200, 1, |_, _| 0.5);
    let test = rows(20, 2, |_, _| 0.5);
    for value in [f64::NAN, 1.0] {
        train.columns[0] = TypedColumn::Numeric(vec![value; 200]);
        let found = fit_predict(&train, None, &test, &binary(), 0).unwrap();
        assert!(found.iter().all(|p| (0.0..1.0).contains(p)));
    }
}

/// What a restart relies on: equal rows, settings and seed give equal trees.
#[test]
fn trees_fitted_again_with_their_settings_are_the_same() {
    let chance = |number: f64, code: u32| if number + f64::from(code % 3) > 1.0 { 0.9 } else { 0.1 };
    let (own, corpus, test) = (rows(600, 1, chance), rows(900, 2, chance), rows(200, 3, chance));
    for corpus in [None, Some(&corpus)] {
        let first = Trees::fit(&own, corpus, &binary(), 4).unwrap();
        let text = serde_json::to_string(&first.settings()).unwrap();
        let settings = serde_json::from_str(&text).unwrap();
        let second = Trees::refit(settings, &own, corpus, &binary(), 4).unwrap();
        assert_eq!(first.logits(&test).unwrap(), second.logits(&test).unwrap());
        // One row at a time or all at once: the same.
        assert_eq!(first.logits(&test.take(&[7])).unwrap()[0], second.logits(&test).unwrap()[7]);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let train = rows(20, 1, |_, _| 0.5);
    let three = Trees::fit(&train, None, &schema(&["0", "1", "2"]), 0).err().unwrap();
    assert_eq!(three, TreeError::Classes { target: "y".into(), got: 3 });
    let mut swapped = train.clone();
    swapped.columns.swap(0, 1);
    let fitted = Trees::fit(&train, None, &binary(), 0).unwrap();
    assert_eq!(fitted.logits(&swapped), Err(TreeError::Kind { feature: "a".into() }));
    let mut short = train.clone();
    short.columns.pop();
    let refused = Trees::fit(&train, Some(&short), &binary(), 0).err().unwrap();
    assert_eq!(refused, TreeError::Columns { expected: 2, got: 1 });
    short.columns.push(TypedColumn::Categorical(vec![0; 3]));
    assert!(matches!(fitted.logits(&short), Err(TreeError::Length { expected: 20, got: 3, .. })));
}

/// All own rows stay, and corpus rows weigh together what they did before.
#[test]
fn a_part_of_the_corpus_weighs_as_much_as_the_whole() {
    let chance = |number: f64, _| if number > 0.0 { 0.8 } else { 0.3 };
    let whole = Sample::new(&rows(100, 1, chance), Some(&rows(600, 2, chance)));
    let of_corpus = |sample: &Sample| sample.weights(0.5).iter().skip(100).sum::<f64>();
    let part = whole.with_corpus_rows(150);
    assert_eq!((part.own, part.labels.len()), (100, 250));
    assert_eq!(part.labels, whole.labels[..250]);
    assert!((of_corpus(&whole) - 50.0).abs() < 1e-9 && (of_corpus(&part) - 50.0).abs() < 1e-9);
    assert_eq!(whole.with_corpus_rows(10_000).labels, whole.labels);
    assert_eq!(whole.with_corpus_rows(0).labels.len(), 100);
}

/// Labels by a coin: the held-out loss soon only rises. Few rows are fitted to the end all the same.
#[test]
fn a_fold_that_loses_stops_unless_rows_are_few() {
    let rounds = |count: usize| {
        let sample = Sample::new(&rows(count, 3, |_, _| 0.5), None);
        let (fit, held): (Vec<usize>, Vec<usize>) = (0..count).partition(|row| row % 5 > 0);
        let settings = Settings { rounds: 200, ..Settings::DEFAULT };
        let coded = Coded::fit(settings, &sample, &fit, &binary(), 0);
        let table = coded.coder.apply(&sample.batch.take(&held));
        let labels: Vec<f64> = held.iter().map(|row| sample.labels[*row]).collect();
        let held = Some((&table, labels.as_slice()));
        let booster = settings::boost(&coded.fitted, &sample, &fit, settings, 0, held).unwrap();
        booster.evaluation_history.unwrap().data.len()
    };
    assert_eq!(rounds(300), 200);
    assert!(rounds(1_000) < 200);
}
