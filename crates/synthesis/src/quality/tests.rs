//! The quality measure on rows with a known distance.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests")]

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

use super::*;
use crate::{draw, fit};

fn table(attributes: &[usize], dims: &[usize], values: &[f64], variance: f64) -> MarginalTable {
    MarginalTable { attributes: attributes.to_vec(), dims: dims.to_vec(), values: values.to_vec(), variance }
}

#[test]
fn distances_by_hand() {
    // Label is attribute 0; feature 1 is a root. Rows: (0,0) (0,1) (1,1) (1,1).
    let structure = TreeStructure::new(0, vec![None, None]).unwrap();
    let rows = CellRows::new(vec![2, 2], vec![vec![0, 0, 1, 1], vec![0, 1, 1, 1]]).unwrap();
    let tables = [table(&[1, 0], &[2, 2], &[30.0, 10.0, 20.0, 40.0], 0.0)];
    let q = measure(&rows, &structure, &tables).unwrap();
    // Released: label (.5, .5), feature (.4, .6), pairs (0,0) .3 (0,1) .2 (1,0) .1 (1,1) .4.
    // Drawn:    label (.5, .5), feature (.25, .75), pairs .25 .25 0 .5.
    assert!((q.one_way_max - 0.15).abs() < 1e-12 && (q.one_way_mean - 0.075).abs() < 1e-12);
    assert!((q.two_way_mean - 0.15).abs() < 1e-12 && (q.two_way_max - 0.15).abs() < 1e-12);
    assert_eq!(serde_json::from_str::<Quality>(&serde_json::to_string(&q).unwrap()).unwrap(), q);
}

#[test]
fn perfect_rows_sit_at_the_floor_and_wrong_rows_far_above() {
    let structure = TreeStructure::new(2, vec![None, Some(0), None]).unwrap();
    let counts: Vec<f64> = (0..24).map(|i| f64::from(1 + (i * 7) % 11) * 40.0).collect();
    let exact = [table(&[1, 0, 2], &[3, 4, 2], &counts, 0.0)];
    let model = fit(&structure, &exact).unwrap();
    let rows = draw(&model, 4_000, &mut ChaCha20Rng::seed_from_u64(1)).unwrap();
    let good = measure(&rows, &structure, &exact).unwrap();
    // Floor: mean of a half-normal sum; the measured mean over three 2-way tables stays within a factor of 2.
    assert!(good.two_way_mean < 2.0 * good.noise_floor && good.two_way_mean > 0.3 * good.noise_floor);
    assert!(good.two_way_max < 0.05);
    let constant = CellRows::new(vec![4, 3, 2], vec![vec![0; 50], vec![0; 50], vec![0; 50]]).unwrap();
    let bad = measure(&constant, &structure, &exact).unwrap();
    assert!(bad.two_way_mean > 0.7 && bad.one_way_max > 0.5);
}

#[test]
fn noise_raises_the_floor() {
    let structure = TreeStructure::new(0, vec![None, None]).unwrap();
    let rows = CellRows::new(vec![2, 2], vec![vec![0, 1], vec![0, 1]]).unwrap();
    let floor = |variance| {
        let tables = [table(&[0, 1], &[2, 2], &[250.0; 4], variance)];
        measure(&rows, &structure, &tables).unwrap().noise_floor
    };
    assert!(floor(0.0) < floor(1e4) && floor(1e4) < floor(1e6));
    assert_eq!(floor(1e12), 1.0);
}

#[test]
fn rows_of_another_layout_are_refused() {
    let structure = TreeStructure::new(0, vec![None, None]).unwrap();
    let tables = [table(&[0, 1], &[2, 2], &[1.0; 4], 0.0)];
    let none = CellRows::new(vec![2, 2], vec![vec![], vec![]]).unwrap();
    assert!(matches!(measure(&none, &structure, &tables), Err(SynthesisError::LayoutMismatch { .. })));
    let wide = CellRows::new(vec![2, 3], vec![vec![0], vec![2]]).unwrap();
    assert!(matches!(measure(&wide, &structure, &tables), Err(SynthesisError::LayoutMismatch { .. })));
    let short = CellRows::new(vec![2], vec![vec![0]]).unwrap();
    assert!(matches!(measure(&short, &structure, &tables), Err(SynthesisError::LayoutMismatch { .. })));
}
