//! Cliques put together from pairs, and what 3-way counts add.

use super::*;

fn near(got: &[f64], wanted: &[f64]) -> bool {
    got.len() == wanted.len() && got.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-9)
}

#[test]
fn independent_pairs_give_the_product() {
    let given = vec![vec![0.2, 0.3, 0.5]; 2];
    let own = [0.125, 0.125, 0.375, 0.375];
    let pairs = Pairs { own: &own, by_class: &given, by_parent: std::slice::from_ref(&given) };
    assert!(near(&pairs.without_interaction(), &[0.2, 0.3, 0.5].repeat(4)));
}

#[test]
fn class_and_parent_cell_that_never_meet_follow_the_class() {
    let own = [0.5, 0.0, 0.25, 0.25];
    let by_class = vec![vec![0.9, 0.1], vec![0.1, 0.9]];
    let by_parent = [vec![vec![0.6, 0.4], vec![0.3, 0.7]]];
    let pairs = Pairs { own: &own, by_class: &by_class, by_parent: &by_parent };
    let all = pairs.without_interaction();
    assert!(near(&all[2..4], &by_class[0]), "{all:?}");
    assert!(all.chunks_exact(2).all(|run| (run[0] + run[1] - 1.0).abs() < 1e-12));
}

/// The exclusive or of parent and class can't be seen in pairs; 3-way counts show it, unless noise can have made it.
#[test]
fn an_interaction_comes_from_counts_that_are_more_than_noise() {
    let even = [0.5; 8];
    let counts = [900.0, 100.0, 100.0, 900.0, 100.0, 900.0, 900.0, 100.0];
    let exact = with_counts(&even, &counts, 2, 0.0);
    assert!(near(&exact, &[0.9, 0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1]), "{exact:?}");
    let noisy = with_counts(&even, &counts, 2, 400.0);
    assert!(noisy[0] > 0.85 && noisy[2] < 0.15, "{noisy:?}");
    let drowned = with_counts(&even, &counts, 2, 1e6);
    assert!(near(&drowned, &even), "{drowned:?}");
}

/// Two parents that depend on each other and on the class: all pairs are met, by a distribution that has no interaction of
/// three, which is known since the tables are made from one.
#[test]
fn two_parents_are_met_at_once() {
    // P(class, a, b) anyhow; the feature's log-odds are a sum of a part for each.
    let own = [0.10, 0.05, 0.05, 0.15, 0.20, 0.05, 0.10, 0.30];
    let odds = |class: usize, a: usize, b: usize| -0.3 + 0.8 * class as f64 + 1.1 * a as f64 - 0.7 * b as f64;
    let truth: Vec<f64> = (0..8)
        .flat_map(|at| {
            let one = 1.0 / (1.0 + (-odds(at / 4, at / 2 % 2, at % 2)).exp());
            [1.0 - one, one]
        })
        .collect();
    let given = |of: &dyn Fn(usize) -> usize| -> Vec<Vec<f64>> {
        let run = |value: usize| {
            let runs: Vec<usize> = (0..8).filter(|at| of(*at) == value).collect();
            let mass: f64 = runs.iter().map(|at| own[*at]).sum();
            (0..2)
                .map(|cell| runs.iter().map(|at| own[*at] * truth[2 * at + cell]).sum::<f64>() / mass)
                .collect()
        };
        vec![run(0), run(1)]
    };
    let by_parent = [given(&|at| at / 2 % 2), given(&|at| at % 2)];
    let pairs = Pairs { own: &own, by_class: &given(&|at| at / 4), by_parent: &by_parent };
    let found = pairs.without_interaction();
    let far = found.iter().zip(&truth).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(far < 1e-6, "{far}: {found:?} {truth:?}");
}
