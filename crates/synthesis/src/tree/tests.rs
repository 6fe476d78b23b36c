//! The spanning tree against a brute-force search.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests")]

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::*;

fn scored(first: usize, second: usize, score: f64) -> PairScore {
    PairScore { first, second, score, noise: 0.0, sd: 0.0 }
}

fn weight(structure: &TreeStructure, scores: &[PairScore]) -> f64 {
    structure
        .order()
        .iter()
        .filter_map(|&a| structure.parent(a).map(|b| (a.min(b), a.max(b))))
        .map(|(a, b)| scores.iter().find(|s| (s.first, s.second) == (a, b)).unwrap().score)
        .sum()
}

/// Every labelled tree on `n` vertices from its Prüfer sequence.
fn all_trees(n: usize) -> Vec<Vec<(usize, usize)>> {
    let sequences = n.pow(u32::try_from(n - 2).unwrap());
    (0..sequences)
        .map(|mut number| {
            let sequence: Vec<usize> = (0..n - 2)
                .map(|_| {
                    let digit = number % n;
                    number /= n;
                    digit
                })
                .collect();
            let mut degree = vec![1; n];
            sequence.iter().for_each(|&v| degree[v] += 1);
            let mut edges = Vec::new();
            for &v in &sequence {
                let leaf = (0..n).find(|&u| degree[u] == 1).unwrap();
                edges.push((leaf.min(v), leaf.max(v)));
                degree[leaf] -= 1;
                degree[v] -= 1;
            }
            let last: Vec<usize> = (0..n).filter(|&u| degree[u] == 1).collect();
            edges.push((last[0], last[1]));
            edges
        })
        .collect()
}

#[test]
fn spanning_tree_is_the_best_of_all_trees() {
    let mut rng = ChaCha20Rng::seed_from_u64(11);
    for n in 2..=6 {
        let trees = all_trees(n);
        assert_eq!(trees.len(), n.pow(u32::try_from(n - 2).unwrap()), "Cayley's formula");
        for _ in 0..20 {
            // The label takes number `n`; some scores are negative, some tie.
            let scores: Vec<PairScore> = (0..n)
                .flat_map(|b| (0..b).map(move |a| (a, b)))
                .map(|(a, b)| scored(a, b, f64::from(rng.random_range(-3_i32..12))))
                .collect();
            let ours = TreeStructure::spanning(n + 1, n, &scores).unwrap();
            let roots = ours.order().iter().filter(|&&a| ours.parent(a).is_none()).count();
            assert_eq!((roots, ours.order().len()), (1, n));
            let best = trees
                .iter()
                .map(|edges| {
                    let of =
                        |e: &(usize, usize)| scores.iter().find(|s| (s.first, s.second) == *e).unwrap().score;
                    edges.iter().map(of).sum::<f64>()
                })
                .fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(weight(&ours, &scores), best);
        }
    }
}

#[test]
fn ties_and_input_order_do_not_matter() {
    let mut scores: Vec<PairScore> = (0..5).flat_map(|b| (0..b).map(move |a| scored(a, b, 1.0))).collect();
    let first = TreeStructure::spanning(6, 5, &scores).unwrap();
    scores.reverse();
    let swapped: Vec<PairScore> = scores.iter().map(|s| scored(s.second, s.first, s.score)).collect();
    assert_eq!(TreeStructure::spanning(6, 5, &scores).unwrap(), first);
    assert_eq!(TreeStructure::spanning(6, 5, &swapped).unwrap(), first);
    // All equal: a star around feature 0, the lowest pairs.
    assert_eq!(first.parents(), [None, Some(0), Some(0), Some(0), Some(0), None]);
}

#[test]
fn strongest_feature_is_the_root_and_the_label_may_stand_anywhere() {
    let scores = [scored(1, 2, 0.4), scored(2, 3, 0.5), scored(1, 3, 0.1), scored(3, 4, 0.2)];
    let tree = TreeStructure::spanning(5, 0, &scores).unwrap();
    assert_eq!(tree.parents(), [None, Some(2), None, Some(2), Some(3)]);
    assert_eq!(tree.order(), [2, 1, 3, 4]);
}

#[test]
fn unscored_features_become_roots() {
    let tree = TreeStructure::spanning(5, 4, &[scored(0, 2, 1.0)]).unwrap();
    assert_eq!(tree.parents(), [None, None, Some(0), None, None]);
    assert_eq!(TreeStructure::spanning(4, 1, &[]).unwrap().order(), [0, 2, 3]);
    assert_eq!(TreeStructure::spanning(1, 0, &[]).unwrap().order(), [0_usize; 0]);
}

#[test]
fn malformed_structures_are_refused() {
    let bad = |label, parent: &[Option<usize>]| TreeStructure::new(label, parent.to_vec()).unwrap_err();
    assert_eq!(bad(2, &[None, None]), SynthesisError::UnknownAttribute { got: 2, attributes: 2 });
    assert_eq!(bad(0, &[None, Some(9)]), SynthesisError::UnknownAttribute { got: 9, attributes: 2 });
    assert_eq!(bad(2, &[Some(1), Some(0), None]), SynthesisError::BadTree { attribute: 0 });
    assert_eq!(bad(2, &[None, Some(1), None]), SynthesisError::BadTree { attribute: 1 });
    assert_eq!(bad(2, &[None, Some(2), None]), SynthesisError::BadTree { attribute: 1 });
    assert_eq!(bad(2, &[None, Some(0), Some(0)]), SynthesisError::BadTree { attribute: 2 });
    let spanning = |pair| TreeStructure::spanning(3, 2, &[pair]).unwrap_err();
    assert!(matches!(spanning(scored(0, 1, f64::NAN)), SynthesisError::BadScore { .. }));
    assert!(matches!(spanning(scored(0, 2, 1.0)), SynthesisError::BadTree { .. }));
    assert!(matches!(spanning(scored(1, 1, 1.0)), SynthesisError::BadTree { .. }));
    assert!(matches!(spanning(scored(0, 3, 1.0)), SynthesisError::UnknownAttribute { .. }));
}

#[test]
fn stored_structure_is_checked_when_read() {
    let tree = TreeStructure::new(2, vec![None, Some(0), None]).unwrap();
    let text = serde_json::to_string(&tree).unwrap();
    assert_eq!(text, r#"{"label":2,"parent":[null,0,null]}"#);
    assert_eq!(serde_json::from_str::<TreeStructure>(&text).unwrap(), tree);
    assert!(serde_json::from_str::<TreeStructure>(r#"{"label":2,"parent":[1,0,null]}"#).is_err());
}

fn table(attributes: &[usize], dims: &[usize], values: Vec<f64>, variance: f64) -> MarginalTable {
    MarginalTable { attributes: attributes.to_vec(), dims: dims.to_vec(), values, variance }
}

#[test]
fn scores_of_exact_counts_are_the_distance_from_independence() {
    let one_way = [table(&[0], &[2], vec![50.0, 50.0], 0.0), table(&[1], &[2], vec![20.0, 80.0], 0.0)];
    let independent = table(&[1, 0], &[2, 2], vec![10.0, 10.0, 40.0, 40.0], 0.0);
    let dependent = table(&[0, 1], &[2, 2], vec![20.0, 30.0, 0.0, 50.0], 0.0);
    let scores = pair_scores(&[independent, dependent], &one_way).unwrap();
    assert_eq!((scores[0].first, scores[0].second), (0, 1));
    assert!(scores[0].score.abs() < 1e-12);
    assert!((scores[1].score - 0.4).abs() < 1e-12);
    let nothing = table(&[0], &[2], vec![-5.0, 2.0], 1.0);
    let pair = table(&[0, 1], &[2, 2], vec![1.0; 4], 1.0);
    let empty = [nothing, table(&[1], &[2], vec![-1.0, 0.0], 1.0)];
    assert_eq!(pair_scores(std::slice::from_ref(&pair), &empty).unwrap()[0].score, 0.0);
    assert!(matches!(
        pair_scores(std::slice::from_ref(&pair), &one_way[..1]),
        Err(SynthesisError::MissingMarginal { .. })
    ));
    let wide = [one_way[0].clone(), table(&[1], &[3], vec![1.0; 3], 0.0)];
    assert_eq!(
        pair_scores(&[pair], &wide),
        Err(SynthesisError::DimensionMismatch { attribute: 1, expected: 2, got: 3 })
    );
}

/// Independent features, 5 × 5 and 3 × 3 cells, noise of sd 40 per cell on 4,000 rows: the mean debiased score
/// over 400 draws is 0 within 5 standard errors (false alarm below 1e-6), for both sizes, while the raw
/// distance is far from 0 and larger for the larger table.
#[test]
fn noise_alone_scores_zero_whatever_the_size() {
    let mut rng = ChaCha20Rng::seed_from_u64(5);
    let mut normal = |sd: f64| {
        // Sum of 12 uniforms has variance 1; its E|Z| is 0.4 % below the normal's.
        sd * ((0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0)
    };
    let (sd, rows) = (40.0, 4_000.0);
    for cells in [3, 5] {
        let one = |attribute| table(&[attribute], &[cells], vec![rows / cells as f64; cells], 0.0);
        let one_way = [one(0), one(1)];
        let draws: Vec<PairScore> = (0..400)
            .map(|_| {
                let values: Vec<f64> =
                    (0..cells * cells).map(|_| rows / (cells * cells) as f64 + normal(sd)).collect();
                pair_scores(&[table(&[0, 1], &[cells, cells], values, sd * sd)], &one_way).unwrap()[0]
            })
            .collect();
        let mean = draws.iter().map(|s| s.score).sum::<f64>() / 400.0;
        let spread = draws.iter().map(|s| (s.score - mean).powi(2)).sum::<f64>() / 399.0;
        let allowed = 5.0 * (spread / 400.0).sqrt() + 0.006 * draws[0].noise;
        assert!(mean.abs() < allowed, "{cells} cells: mean {mean}, allowed {allowed}");
        assert!(draws[0].noise > 10.0 * allowed);
        // The stated deviation is that of the draws: 400 of them tell it to 3.5 %, and cells aren't quite normal.
        assert!((spread.sqrt() / draws[0].sd - 1.0).abs() < 0.2, "{} against {}", spread.sqrt(), draws[0].sd);
        let taken = draws.iter().filter(|score| score.is_signal()).count();
        assert!(taken <= 4, "{taken} of 400 independent pairs count as dependent");
    }
}

/// Four features that all depend on each other: a tree has three of the six edges, a junction tree gets back the others.
#[test]
fn a_widened_tree_gets_back_the_edges_that_close_triangles() {
    let scores = [
        scored(0, 1, 1.0),
        scored(0, 2, 0.9),
        scored(1, 2, 0.8),
        scored(2, 3, 0.7),
        scored(0, 3, 0.6),
        scored(1, 3, 0.5),
    ];
    let tree = TreeStructure::spanning(5, 4, &scores).unwrap();
    assert_eq!(tree.parents(), [None, Some(0), Some(0), Some(2), None]);
    let widened =
        |parents, cells| tree.clone().widened(&scores, &[4, 4, 4, 4, 2], Width { parents, cells }).unwrap();
    assert_eq!(widened(1, usize::MAX), tree);
    let above = |tree: &TreeStructure| (0..4).map(|feature| tree.above(feature)).collect::<Vec<_>>();
    assert_eq!(above(&widened(2, 128)), [vec![], vec![0], vec![0, 1], vec![2, 0]]);
    let wide = widened(3, 512);
    assert_eq!(above(&wide), [vec![], vec![0], vec![0, 1], vec![2, 0, 1]]);
    assert_eq!(widened(3, 511), widened(2, 128), "a clique of 4 · 4 · 4 · 4 · 2 is too large");
    assert_eq!(widened(3, 127), tree, "a clique of 4 · 4 · 4 · 2 is too large");
    assert!(tree.clone().widened(&scores, &[4; 4], Width { parents: 2, cells: 128 }).is_err());
    // An edge that isn't there closes nothing.
    let open =
        tree.clone().widened(&scores[..2], &[4, 4, 4, 4, 2], Width { parents: 3, cells: 512 }).unwrap();
    assert_eq!(open, tree);

    // Stored and read back; parents that lie in no clique above are refused.
    let text = serde_json::to_string(&wide).unwrap();
    assert_eq!(serde_json::from_str::<TreeStructure>(&text).unwrap(), wide);
    let stored = |parent: &str, more: &str| {
        serde_json::from_str::<TreeStructure>(&format!(r#"{{"label":4,"parent":{parent},"more":{more}}}"#))
    };
    assert!(stored("[null,0,0,2,null]", "[[],[],[1],[0],[]]").is_ok());
    for more in [
        "[[],[],[],[1],[]]",
        "[[],[],[1],[2],[]]",
        "[[],[],[1],[0,0],[]]",
        "[[1],[],[],[],[]]",
        "[[],[],[],[4],[]]",
        "[[],[],[],[0],[0]]",
        "[[],[],[],[0]]",
        "[[],[],[],[9],[]]",
    ] {
        assert!(stored("[null,0,0,2,null]", more).is_err(), "{more}");
    }
}
