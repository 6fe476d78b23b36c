//! What noise made is given back, what it can't have made stays.

#![allow(clippy::unwrap_used, reason = "tests")]

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::*;

fn table(attributes: &[usize], dims: &[usize], values: Vec<f64>, variance: f64) -> MarginalTable {
    MarginalTable { attributes: attributes.to_vec(), dims: dims.to_vec(), values, variance }
}

fn normal(rng: &mut ChaCha20Rng) -> f64 {
    (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0
}

#[test]
fn exact_counts_stay_as_they_are() {
    let counts = vec![10.0, 0.0, 30.0, 5.0, 7.0, 100.0];
    let drawn = counts_by(&[table(&[1, 0], &[2, 3], counts.clone(), 0.0)], 1, 0).unwrap();
    assert!(drawn.values.iter().zip(&counts).all(|(a, b)| (a - b).abs() < 1e-9), "{:?}", drawn.values);
}

/// Independent attributes: nearly all that noise put between the groups is taken out again.
#[test]
fn noise_alone_leaves_little_of_a_difference() {
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let cells = 12;
    let expected: Vec<f64> = [300.0, 700.0].iter().flat_map(|rows| vec![rows / 12.0; cells]).collect();
    let (mut left, mut was) = (0.0, 0.0);
    for _ in 0..100 {
        let noisy: Vec<f64> = expected.iter().map(|n| n + 15.0 * normal(&mut rng)).collect();
        let apart = |values: &[f64]| values.iter().zip(&expected).map(|(n, e)| (n - e).abs()).sum::<f64>();
        was += apart(&noisy);
        // The shape over both groups is known from a table without noise.
        let alone = table(&[0], &[cells], vec![1000.0 / 12.0; cells], 0.0);
        let mut tables = [table(&[1, 0], &[2, cells], noisy, 225.0), alone];
        crate::marginal::reconcile(&mut tables).unwrap();
        left += apart(&counts_by(&tables, 1, 0).unwrap().values);
    }
    assert!(left < 0.5 * was, "{left} of {was} is left");
}

/// A strong difference outlives the noise, in full cells more than in empty ones.
#[test]
fn what_is_far_above_the_noise_stays() {
    let counts = vec![5_000.0, 1_000.0, 4.0, 1_000.0, 5_000.0, 0.0];
    let drawn = counts_by(&[table(&[1, 0], &[2, 3], counts.clone(), 100.0)], 1, 0).unwrap().values;
    assert!((drawn[0] - counts[0]).abs() < 5.0 && (drawn[1] - counts[1]).abs() < 5.0, "{drawn:?}");
    // 4 and 0 with noise of 10: next to nothing says that they differ.
    assert!((drawn[2] - drawn[5]).abs() < 1.0, "{drawn:?}");
    // Each group keeps its total.
    let totals: Vec<f64> = drawn.chunks_exact(3).map(|group| group.iter().sum()).collect();
    assert!((totals[0] - 6_004.0).abs() < 1e-6 && (totals[1] - 6_000.0).abs() < 1e-6, "{totals:?}");
}

#[test]
fn measurements_of_one_marginal_add_their_precision() {
    let twice = [table(&[0], &[2], vec![1.0, 2.0], 4.0), table(&[0, 1], &[2, 3], vec![0.5; 6], 4.0)];
    let variance = agreed_marginal(&twice, &[0]).unwrap().variance;
    assert!((variance - 1.0 / (1.0 / 4.0 + 1.0 / 12.0)).abs() < 1e-12, "{variance}");
    let missing = agreed_marginal(&twice, &[2]).unwrap_err();
    assert_eq!(missing, SynthesisError::MissingMarginal { attributes: vec![2] });
}
