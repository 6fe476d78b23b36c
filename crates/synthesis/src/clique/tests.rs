//! Cliques put together from pairs, and what 3-way counts add.

use super::*;

fn near(got: &[f64], wanted: &[f64]) -> bool {
    got.len() == wanted.len() && got.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-9)
}

#[test]
fn independent_pairs_give_the_product() {
    let (classes, own) = ([0.25, 0.75], vec![vec![0.5, 0.5], vec![0.5, 0.5]]);
    let given = vec![vec![0.2, 0.3, 0.5]; 2];
    let pairs = Pairs { classes: &classes, parent_by_class: &own, by_class: &given, by_parent: &given };
    assert!(near(&pairs.without_interaction(), &[0.2, 0.3, 0.5].repeat(4)));
}

#[test]
fn class_and_parent_cell_that_never_meet_follow_the_class() {
    let (classes, own) = ([0.5, 0.5], vec![vec![1.0, 0.0], vec![0.5, 0.5]]);
    let by_class = vec![vec![0.9, 0.1], vec![0.1, 0.9]];
    let by_parent = vec![vec![0.6, 0.4], vec![0.3, 0.7]];
    let pairs =
        Pairs { classes: &classes, parent_by_class: &own, by_class: &by_class, by_parent: &by_parent };
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
