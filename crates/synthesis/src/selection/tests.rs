//! Which pairs become edges, and what is measured of them.

#![allow(clippy::unwrap_used, reason = "tests")]

use tabmesh_privacy::release::Binning;

use super::*;

fn attribute(cells: u32) -> Attribute {
    // Two cells more: other and missing.
    let binning = Binning::Levels { levels: cells - 2 };
    Attribute { id: "a.b".to_owned(), binning, merge: None }
}

fn table(attributes: &[usize], dims: &[usize], values: Vec<f64>, variance: f64) -> MarginalTable {
    MarginalTable { attributes: attributes.to_vec(), dims: dims.to_vec(), values, variance }
}

/// Features 0 and 1 are equal, 2 is independent of both.
fn chosen(variance: f64) -> TreeStructure {
    let attributes = [attribute(3), attribute(3), attribute(3)];
    let fine: Vec<MarginalTable> = (0..3).map(|at| table(&[at], &[3], vec![100.0; 3], 0.0)).collect();
    let equal = vec![100.0, 0.0, 0.0, 0.0, 100.0, 0.0, 0.0, 0.0, 100.0];
    let even = vec![100.0 / 3.0; 9];
    let pairs = [
        table(&[0, 1], &[3, 3], equal, variance),
        table(&[0, 2], &[3, 3], even.clone(), variance),
        table(&[1, 2], &[3, 3], even, variance),
    ];
    structure(&fine, &attributes, &attributes, &pairs, (&[3, 3, 3, 2], TREE)).unwrap()
}

const TREE: Width = Width { parents: 1, cells: usize::MAX };

#[test]
fn edges_are_pairs_that_noise_cannot_have_made() {
    assert_eq!(attribute(3).cells(), 3);
    assert_eq!(chosen(1.0).parents(), [None, Some(0), None, None]);
    assert_eq!(chosen(10_000.0).parents(), [None; 4]);
}

#[test]
fn three_at_once_only_where_their_cells_bear_the_noise() {
    let tree = chosen(1.0);
    let asked = |variance_each: f64| -> Vec<Vec<usize>> {
        marginals(&tree, (&[3, 3, 3, 2], &[true; 3]), 300.0, variance_each)
            .into_iter()
            .map(|m| m.attributes)
            .collect()
    };
    // 18 cells with four marginals: up to an absolute deviation of 30 over all.
    let most = (30.0 / (18.0 * MEAN_ABSOLUTE_NORMAL)).powi(2) / 4.0;
    assert_eq!(asked(0.99 * most), [vec![0, 3], vec![2, 3], vec![1, 0, 3]]);
    assert_eq!(asked(1.01 * most), [vec![0, 3], vec![2, 3], vec![1, 3], vec![1, 0]]);
    let without_rows = marginals(&tree, (&[3, 3, 3, 2], &[true; 3]), 0.0, 1.0);
    assert_eq!(without_rows.len(), 4);
}

/// Feature 0 follows the label, 1 and 2 don't; 1 hangs on 0.
#[test]
fn counts_by_label_can_be_left_to_features_that_say_something_of_it() {
    let by_label = [
        table(&[0, 3], &[3, 2], vec![100.0, 0.0, 50.0, 50.0, 0.0, 100.0], 1.0),
        table(&[1, 3], &[3, 2], vec![50.0; 6], 1.0),
        table(&[2, 3], &[3, 2], vec![51.0, 49.0, 50.0, 50.0, 49.0, 51.0], 1.0),
    ];
    let told = informative(&by_label, 3).unwrap();
    assert_eq!(told, [true, false, false]);
    // With more noise nothing is known of any of them.
    let noisy: Vec<MarginalTable> =
        by_label.iter().map(|table| MarginalTable { variance: 1e4, ..table.clone() }).collect();
    assert_eq!(informative(&noisy, 3).unwrap(), [false; 3]);
    assert!(informative(&by_label[..2], 3).is_err());
    let asked = |tree: &TreeStructure, told: &[bool]| -> Vec<Vec<usize>> {
        let specs = marginals(tree, (&[3, 3, 3, 2], told), 300.0, 0.0);
        specs.into_iter().map(|marginal| marginal.attributes).collect()
    };
    assert_eq!(asked(&chosen(1.0), &told), [vec![0, 3], vec![1, 0]]);
    assert_eq!(asked(&chosen(1.0), &[false, true, false]), [vec![1, 0, 3]]);
    let apart = chosen(10_000.0);
    assert_eq!(asked(&apart, &told), [vec![0, 3]]);
    // A stage asks for something.
    assert_eq!(asked(&apart, &[false; 3]), [vec![0, 3], vec![1, 3], vec![2, 3]]);
}

#[test]
fn a_feature_without_counts_is_refused() {
    let refused = structure(&[], &[attribute(3)], &[attribute(3)], &[], (&[3, 2], TREE)).unwrap_err();
    assert_eq!(refused, SynthesisError::MissingMarginal { attributes: vec![0] });
}

/// Three features that are copies of each other: with two parents all three pairs are measured, and none of the three at once.
#[test]
fn every_parent_of_a_junction_tree_is_measured() {
    let attributes = [attribute(3), attribute(3), attribute(3)];
    let fine: Vec<MarginalTable> = (0..3).map(|at| table(&[at], &[3], vec![100.0; 3], 0.0)).collect();
    let equal = [100.0, 0.0, 0.0, 0.0, 100.0, 0.0, 0.0, 0.0, 100.0];
    let pairs = [[0, 1], [0, 2], [1, 2]].map(|pair| table(&pair, &[3, 3], equal.to_vec(), 1.0));
    let of = |parents| {
        let width = Width { parents, cells: 54 };
        structure(&fine, &attributes, &attributes, &pairs, (&[3, 3, 3, 2], width)).unwrap()
    };
    let tree = of(2);
    let last = tree.order()[2];
    assert_eq!(tree.above(last).len(), 2);
    let mut asked: Vec<Vec<usize>> =
        marginals(&tree, (&[3, 3, 3, 2], &[true; 3]), 300.0, 1e9).into_iter().map(|m| m.attributes).collect();
    asked.iter_mut().for_each(|attributes| attributes.sort_unstable());
    asked.sort();
    assert_eq!(asked, [vec![0, 1], vec![0, 2], vec![0, 3], vec![1, 2], vec![1, 3], vec![2, 3]]);
    // Where cells bear the noise, the one with one parent is measured with it and the label at once.
    let exact = marginals(&tree, (&[3, 3, 3, 2], &[true; 3]), 300.0, 0.0);
    assert_eq!(exact.iter().filter(|marginal| marginal.attributes.len() == 3).count(), 1);
}
