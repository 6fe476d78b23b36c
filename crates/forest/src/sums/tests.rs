//! Sums of a handful of rows by hand, and what one unit can do to them.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
use tabmesh_contract::batch::TypedColumn;

use super::*;
use crate::forest::Shape;
use crate::split::Split;
use crate::step::Step;

/// Three trees of one question each on one number.
fn forest() -> Forest {
    let tree = |threshold| vec![Split::AtLeast { column: 0, threshold }];
    Forest::bare(0.0, vec![tree(0.5), tree(1.5), tree(2.5)], Shape { trees: 3, depth: 1 })
}

fn rows(values: &[f64], labels: &[u16], units: &[u8]) -> TypedBatch {
    TypedBatch {
        columns: vec![TypedColumn::Numeric(values.to_vec())],
        labels: labels.iter().map(|label| Some(*label)).collect(),
        units: units.iter().map(|unit| [*unit; 16]).collect(),
    }
}

const SCALE: u64 = 1 << 12;

fn sums(forest: &Forest, rows: &TypedBatch, trees: Range<usize>, clip: f64) -> Vec<f64> {
    let sums = Rows::new(forest, rows).unwrap().sums(forest.values(), trees, (clip, SCALE), || true).unwrap();
    sums.into_iter().map(|value| value as f64 / SCALE as f64).collect()
}

/// By hand: at p = 1/2 a row of class 1 adds 1/2 and 1/4, one of class 0 takes 1/2 and adds 1/4.
#[test]
fn each_row_counts_in_its_leaf_of_each_tree() {
    let table = rows(&[0.0, 1.0, 3.0], &[1, 0, 1], &[1, 2, 3]);
    assert_eq!(sums(&forest(), &table, 0..2, 10.0), [0.5, 0.25, 0.0, 0.5, 0.0, 0.5, 0.5, 0.25]);
    assert_eq!(sums(&forest(), &table, 2..3, 10.0), [0.0, 0.5, 0.5, 0.25]);
    // Rows without a label are in no sum.
    let mut unlabelled = table;
    unlabelled.labels[2] = None;
    assert_eq!(sums(&forest(), &unlabelled, 2..3, 10.0), [0.0, 0.5, 0.0, 0.0]);
}

/// What a tree has learnt changes the sums of the next.
#[test]
fn later_trees_see_what_earlier_ones_say() {
    let learnt = forest().with_values(vec![2.0, -2.0, 0.0, 0.0, 0.0, 0.0]).unwrap();
    let p = 1.0 / (1.0 + (-2.0_f64).exp());
    let got = sums(&learnt, &rows(&[0.0], &[1], &[1]), 1..2, 10.0);
    assert!((got[0] - (1.0 - p)).abs() < 1e-3 && (got[1] - p * (1.0 - p)).abs() < 1e-3, "{got:?}");
}

/// No row's vector is longer than √trees, the norm that plans clip to; a unit of many rows is cut to the clip norm, whatever its rows are.
#[test]
fn one_unit_moves_the_sum_by_no_more_than_the_clip_norm() {
    for logit in [-60.0, -3.0, -0.5, 0.0, 1.0, 60.0] {
        for label in [0, 1] {
            let certain = forest().with_values(vec![logit; 6]).unwrap();
            let norm = sums(&certain, &rows(&[9.0], &[label], &[1]), 0..3, 100.0);
            let norm = norm.iter().map(|v| v * v).sum::<f64>().sqrt();
            assert!(norm <= 3.0_f64.sqrt() + 1e-9, "{logit} {label}: {norm}");
        }
    }
    let before = rows(&[0.0, 3.0], &[0, 1], &[1, 2]);
    let mut after = before.clone();
    after.append(&rows(&[0.0; 50], &[1; 50], &[9; 50]));
    let clip = 2.0_f64.sqrt();
    let counted = |table: &TypedBatch| {
        Rows::new(&forest(), table).unwrap().sums(forest().values(), 0..2, (clip, SCALE), || true).unwrap()
    };
    let moved: i64 = counted(&before).iter().zip(counted(&after)).map(|(a, b)| (a - b) * (a - b)).sum();
    let bound = (clip * SCALE as f64).floor();
    assert!((moved as f64) <= bound * bound, "{moved}");
    assert!((moved as f64) > 0.98 * bound * bound, "the unit has 50 rows and is cut: {moved}");
    // As rows of their own they would have moved it much further.
    after.units = (0..52).map(|row| [row; 16]).collect();
    let moved: i64 = counted(&before).iter().zip(counted(&after)).map(|(a, b)| (a - b) * (a - b)).sum();
    assert!(moved as f64 > 100.0 * bound * bound);
}

#[test]
fn units_that_are_not_taken_are_in_no_sum_and_none_at_all_gives_zeros() {
    let table = rows(&[0.0, 1.0], &[1, 0], &[1, 2]);
    let sorted = Rows::new(&forest(), &table).unwrap();
    assert_eq!(sorted.units(), 2);
    let mut turn = 0;
    let second = sorted
        .sums(forest().values(), 0..1, (10.0, SCALE), || {
            turn += 1;
            turn == 2
        })
        .unwrap();
    assert_eq!(second, [0, 0, -(SCALE as i64) / 2, SCALE as i64 / 4]);
    assert_eq!(sorted.sums(forest().values(), 0..3, (10.0, SCALE), || false).unwrap(), [0; 12]);
    let none = Rows::new(&forest(), &rows(&[], &[], &[])).unwrap();
    assert_eq!(none.sums(forest().values(), 0..1, (10.0, SCALE), || true).unwrap(), [0; 4]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let sorted = Rows::new(&forest(), &rows(&[0.0], &[1], &[1])).unwrap();
    for values in [&[0.0; 5][..], &[0.0; 7], &[f32::NAN; 6]] {
        assert!(matches!(sorted.sums(values, 0..1, (1.0, 1), || true), Err(ForestError::Shape { .. })));
    }
    for trees in [0..0, 2..4, 3..4] {
        assert!(sorted.sums(forest().values(), trees, (1.0, 1), || true).is_err());
    }
    assert!(matches!(
        sorted.sums(forest().values(), 0..1, (f64::NAN, 1), || true),
        Err(ForestError::Clip(_))
    ));
    assert!(matches!(sorted.sums(forest().values(), 0..1, (1.0, 3), || true), Err(ForestError::Clip(_))));
}

/// Without noise, rounds of Newton steps find an interaction that no single column shows: class 1 where two bits differ.
#[test]
fn rounds_learn_what_two_columns_say_together() {
    let tree =
        || vec![Split::AtLeast { column: 0, threshold: 0.5 }, Split::AtLeast { column: 1, threshold: 0.5 }];
    let mut forest = Forest::bare(0.0, vec![tree(), tree(), tree()], Shape { trees: 3, depth: 2 });
    let bit = |row: usize, place: usize| (row >> place & 1) as f64;
    let table = TypedBatch {
        columns: (0..2).map(|at| TypedColumn::Numeric((0..400).map(|row| bit(row, at)).collect())).collect(),
        labels: (0..400).map(|row| Some(u16::from(row & 1 != row >> 1 & 1))).collect(),
        units: (0..400_u16).map(|row| std::array::from_fn(|at| row.to_le_bytes()[at % 2])).collect(),
    };
    let sorted = Rows::new(&forest, &table).unwrap();
    for round in 0..3 {
        let sums = sorted.sums(forest.values(), round..round + 1, (1.0, SCALE), || true).unwrap();
        let sums: Vec<f64> = sums.into_iter().map(|value| value as f64 / SCALE as f64).collect();
        let learnt = Step { trees: 1, noise: 0.0 }.values(&sums).unwrap();
        let mut values = forest.values().to_vec();
        values[4 * round..4 * (round + 1)].copy_from_slice(&learnt);
        forest = forest.with_values(values).unwrap();
    }
    let logits = forest.logits(&table).unwrap();
    for (logit, label) in logits.iter().zip(&table.labels) {
        assert!(if *label == Some(1) { *logit > 2.0 } else { *logit < -2.0 }, "{logit} {label:?}");
    }
}
