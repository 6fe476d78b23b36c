//! Forests from small tables by hand.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
use super::*;

/// Two columns that tell classes apart and one that doesn't: a number in four bins and no missing value, categories in five cells
/// of which the last holds two codes, and a number whose bins are alike.
fn columns() -> Vec<Column> {
    vec![
        Column {
            position: 0,
            cells: Cells::Bins(vec![1.0, 2.0, 3.0]),
            counts: vec![[240.0, 10.0], [240.0, 10.0], [150.0, 100.0], [100.0, 150.0], [0.0, 0.0]],
            variance: 0.0,
        },
        Column {
            position: 1,
            cells: Cells::Levels(vec![vec![0], vec![1], vec![2], vec![3], vec![4, 6]]),
            counts: vec![[200.0, 0.0], [30.0, 170.0], [200.0, 0.0], [100.0, 100.0], [200.0, 0.0]],
            variance: 0.0,
        },
        Column {
            position: 2,
            cells: Cells::Bins(vec![0.5]),
            counts: vec![[365.0, 135.0], [365.0, 135.0], [0.0, 0.0]],
            variance: 0.0,
        },
    ]
}

const SHAPE: Shape = Shape { trees: 200, depth: 2 };

#[test]
fn equal_arguments_give_equal_forests_and_another_seed_another() {
    let grown = |seed: u8| Forest::grow(&columns(), SHAPE, [seed; 32]).unwrap();
    assert_eq!(grown(1), grown(1));
    assert_ne!(grown(1).trees(), grown(2).trees());
    assert_eq!((grown(1).shape(), grown(1).values().len()), (SHAPE, 800));
    assert!(grown(1).values().iter().all(|value| *value == 0.0));
    grown(1).check().unwrap();
    // 270 of 1000 rows are of class 1, by each of the three columns.
    let expected = (810.5_f64 / 2190.5).ln();
    assert!((grown(1).start() - expected).abs() < 1e-12, "{}", grown(1).start());
}

/// A tree's columns differ, and the third, which tells nothing, is hardly ever asked.
#[test]
fn trees_ask_what_tells_classes_apart() {
    let forest = Forest::grow(&columns(), SHAPE, [3; 32]).unwrap();
    let asked = |tree: &[Split]| tree.iter().map(Split::column).collect::<std::collections::BTreeSet<_>>();
    assert!(forest.trees().iter().all(|tree| asked(tree).len() == 2));
    let idle = forest.trees().iter().filter(|tree| asked(tree).contains(&2)).count();
    assert!((1..20).contains(&idle), "{idle}: a small chance is kept");
    // Codes without class 1 against the rest: a head of three cells, with both codes of the merged one.
    let head = Split::OneOf { column: 1, codes: vec![0, 2, 4, 6] };
    assert!(forest.trees().iter().flatten().filter(|split| **split == head).count() > 20);
    let deep = Forest::grow(&columns(), Shape { depth: 5, ..SHAPE }, [3; 32]).unwrap();
    assert!(deep.trees().iter().all(|tree| tree.len() == 5 && asked(tree).len() == 3));
}

/// By hand, of the cut at 2: 500 rows with a rate of .04 and 500 with .5, so .25 · .46² of variance is explained. Noise of
/// variance 100 in each count moves shares by 2 or 3 cells · 100 · (.27² + .73²) / 500².
#[test]
fn noise_is_taken_off_what_a_split_tells() {
    let mut column = columns().remove(0);
    let told = |column: &Column| {
        let cut = Split::AtLeast { column: 0, threshold: 2.0 };
        column.splits().unwrap().into_iter().find(|(split, _)| *split == cut).unwrap().1
    };
    assert!((told(&column) - 0.25 * 0.46 * 0.46).abs() < 1e-12);
    column.variance = 100.0;
    let noise = 5.0 * 100.0 * (0.27 * 0.27 + 0.73 * 0.73) / 250_000.0;
    assert!((told(&column) - 0.25 * (0.46 * 0.46 - noise)).abs() < 1e-12);
    column.variance = 1e6;
    assert!(told(&column) <= 0.0);
}

/// A side with less than a hundredth of the rows, or a negative one, is no side: such questions aren't asked beside others.
#[test]
fn questions_that_nearly_all_rows_answer_alike_are_not_asked() {
    let column = |position: u32, small: f64| Column {
        position,
        cells: Cells::Bins(vec![1.0]),
        counts: vec![[500.0, 500.0 - small], [small, 0.0], [0.0, 0.0]],
        variance: 0.0,
    };
    let asked = |small| {
        let columns = [column(0, 300.0), column(1, small)];
        let forest = Forest::grow(&columns, Shape { trees: 200, depth: 1 }, [0; 32]).unwrap();
        forest.trees().iter().any(|tree| tree[0].column() == 1)
    };
    assert!(!asked(9.0) && !asked(-50.0) && asked(11.0));
    let mut gaps = column(0, 0.0);
    gaps.counts = vec![[300.0, 300.0], [0.0, 0.0], [300.0, 100.0]];
    let forest = Forest::grow(&[gaps], Shape { trees: 30, depth: 1 }, [0; 32]).unwrap();
    assert!(forest.trees().contains(&vec![Split::Missing { column: 0 }]));
}

/// Counts that noise has made negative as a whole leave every question open instead of ending the plan whose budget they took.
#[test]
fn counts_drowned_in_noise_still_give_a_forest() {
    let mut drowned = columns();
    for count in drowned.iter_mut().flat_map(|column| &mut column.counts) {
        *count = [-1_000.0, -2_000.0];
    }
    let forest = Forest::grow(&drowned, SHAPE, [4; 32]).unwrap();
    forest.check().unwrap();
    let asked: std::collections::BTreeSet<u32> = forest.trees().iter().flatten().map(Split::column).collect();
    assert_eq!(asked.len(), 3);
    assert!(forest.start().abs() < 1e-12);
}

#[test]
fn limits_hold_at_one_above() {
    let grown = |trees, depth| Forest::grow(&columns(), Shape { trees, depth }, [0; 32]);
    assert!(grown(Shape::MAX_TREES, 1).is_ok() && grown(1, Shape::MAX_DEPTH).is_ok());
    for (trees, depth) in [(0, 1), (Shape::MAX_TREES + 1, 1), (1, 0), (1, Shape::MAX_DEPTH + 1)] {
        assert!(matches!(grown(trees, depth), Err(ForestError::Shape { .. })), "{trees} {depth}");
    }
    let spoilt = |edit: fn(&mut Column)| {
        let mut columns = columns();
        edit(&mut columns[1]);
        Forest::grow(&columns, SHAPE, [0; 32]).unwrap_err().to_string()
    };
    assert!(spoilt(|column| column.counts.truncate(4)).contains("expected 5, got 4"));
    assert!(spoilt(|column| column.counts[0][0] = f64::NAN).contains("numbers"));
    assert!(spoilt(|column| column.variance = f64::INFINITY).contains("numbers"));
    assert_eq!(Forest::grow(&[], SHAPE, [0; 32]), Err(ForestError::NothingToSplit));
}
