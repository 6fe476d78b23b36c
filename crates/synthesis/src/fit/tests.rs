//! The fitted distribution against the one that made the tables.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests")]

use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::*;
use crate::marginal::{best_marginal, marginalise};

/// Attributes: features 0 to 3 with 3, 4, 2 and 5 cells, label 4 with 2 classes; 1 ← 0, 2 ← 1, 3 ← 0.
const DIMS: [usize; 5] = [3, 4, 2, 5, 2];

fn structure() -> TreeStructure {
    TreeStructure::new(4, vec![None, Some(0), Some(1), Some(0), None]).unwrap()
}

fn random_model(rng: &mut ChaCha20Rng) -> TreeModel {
    let structure = structure();
    let mut run = |cells: usize| {
        let weights: Vec<f64> = (0..cells).map(|_| rng.random_range(0.05..1.0_f64)).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect::<Vec<_>>()
    };
    let conditionals = (0..5)
        .map(|a| match structure.parent(a) {
            _ if a == 4 => Vec::new(),
            Some(above) => (0..2 * DIMS[above]).flat_map(|_| run(DIMS[a])).collect(),
            None => (0..2).flat_map(|_| run(DIMS[a])).collect(),
        })
        .collect();
    TreeModel::new(structure, DIMS.to_vec(), vec![0.3, 0.7], conditionals).unwrap()
}

/// Draws rows straight from the definition, not with the crate's sampler.
fn naive_rows(model: &TreeModel, rows: usize, rng: &mut ChaCha20Rng) -> Vec<[usize; 5]> {
    let mut pick = |p: &[f64]| {
        let mut left: f64 = rng.random();
        p.iter().position(|q| {
            left -= q;
            left < 0.0
        })
    };
    (0..rows)
        .map(|_| {
            let mut row = [0; 5];
            row[4] = pick(model.classes()).unwrap_or(1);
            for a in [0, 1, 2, 3] {
                let parent = model.structure().parent(a).map_or(0, |p| row[p]);
                row[a] = pick(model.conditional(a, parent, row[4]).unwrap()).unwrap_or(DIMS[a] - 1);
            }
            row
        })
        .collect()
}

fn count(rows: &[[usize; 5]], attributes: &[usize], variance: f64) -> MarginalTable {
    let dims: Vec<usize> = attributes.iter().map(|&a| DIMS[a]).collect();
    let mut values = vec![0.0; dims.iter().product()];
    for row in rows {
        values[attributes.iter().fold(0, |index, &a| index * DIMS[a] + row[a])] += 1.0;
    }
    MarginalTable { attributes: attributes.to_vec(), dims, values, variance }
}

/// The families of [`structure`] in assorted axis orders.
const FAMILIES: [&[usize]; 4] = [&[0, 4], &[1, 0, 4], &[4, 2, 1], &[0, 4, 3]];

#[test]
fn without_noise_conditionals_are_relative_frequencies_and_near_the_truth() {
    let mut rng = ChaCha20Rng::seed_from_u64(3);
    let truth = random_model(&mut rng);
    let rows = naive_rows(&truth, 200_000, &mut rng);
    let tables: Vec<_> = FAMILIES.iter().map(|f| count(&rows, f, 0.0)).collect();
    let fitted = fit(&structure(), &tables).unwrap();
    assert_eq!(fitted.dims(), DIMS);
    for a in 0..4 {
        for parent in 0..structure().parent(a).map_or(1, |p| DIMS[p]) {
            for class in 0..2 {
                let of = |row: &&[usize; 5]| {
                    row[4] == class && structure().parent(a).is_none_or(|p| row[p] == parent)
                };
                let base = rows.iter().filter(of).count() as f64;
                let (ours, theirs) = (
                    fitted.conditional(a, parent, class).unwrap(),
                    truth.conditional(a, parent, class).unwrap(),
                );
                for cell in 0..DIMS[a] {
                    let here = rows.iter().filter(of).filter(|row| row[a] == cell).count() as f64;
                    assert!((ours[cell] - here / base).abs() < 1e-9);
                    // 5 standard errors for each of 76 cells: false alarm below 1e-4 over all.
                    let error = (theirs[cell] * (1.0 - theirs[cell]) / base).sqrt();
                    assert!((ours[cell] - theirs[cell]).abs() < 5.0 * error);
                }
            }
        }
    }
    assert!((fitted.classes()[0] - 0.3).abs() < 5.0 * (0.21_f64 / 200_000.0).sqrt());
}

/// Pairs alone: what each feature has with the class and with its parent is met exactly, without interaction of all three.
#[test]
fn without_noise_pairs_alone_are_met_and_nothing_is_added() {
    let mut rng = ChaCha20Rng::seed_from_u64(13);
    let rows = naive_rows(&random_model(&mut rng), 50_000, &mut rng);
    let pairs: [&[usize]; 7] = [&[0, 4], &[1, 4], &[0, 1], &[2, 4], &[2, 1], &[4, 3], &[3, 0]];
    let tables: Vec<_> = pairs.iter().map(|pair| count(&rows, pair, 0.0)).collect();
    let model = fit(&structure(), &tables).unwrap();
    assert!(valid(&model));
    for (feature, cells) in DIMS.into_iter().enumerate().take(4).skip(1) {
        let parent = structure().parent(feature).unwrap();
        let above = count(&rows, &[4, parent], 0.0);
        let joint = |class: usize, q: usize, cell: usize| {
            above.values[class * DIMS[parent] + q] * model.conditional(feature, q, class).unwrap()[cell]
        };
        let (by_class, by_parent) = (count(&rows, &[4, feature], 0.0), count(&rows, &[parent, feature], 0.0));
        for cell in 0..cells {
            for class in 0..2 {
                let got: f64 = (0..DIMS[parent]).map(|q| joint(class, q, cell)).sum();
                let wanted = by_class.values[class * cells + cell];
                assert!((got - wanted).abs() < 1e-3, "{feature} {class} {cell}: {got} against {wanted}");
            }
            for q in 0..DIMS[parent] {
                let got = joint(0, q, cell) + joint(1, q, cell);
                let wanted = by_parent.values[q * cells + cell];
                assert!((got - wanted).abs() < 1e-3, "{feature} {q} {cell}: {got} against {wanted}");
            }
        }
        // No interaction: log odds ratios between the classes are the same for any two parent cells.
        let odds = |class: usize, q: usize| {
            let p = model.conditional(feature, q, class).unwrap();
            (p[1] / p[0]).ln()
        };
        let ratio = |q: usize| odds(1, q) - odds(0, q);
        assert!((1..DIMS[parent]).all(|q| (ratio(q) - ratio(0)).abs() < 1e-4), "{feature}");
    }
}

fn noisy(tables: &[MarginalTable], sd: f64, rng: &mut ChaCha20Rng) -> Vec<MarginalTable> {
    let normal = |rng: &mut ChaCha20Rng| (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
    tables
        .iter()
        .map(|t| MarginalTable {
            values: t.values.iter().map(|v| (v + sd * normal(rng)).round()).collect(),
            variance: sd * sd,
            ..t.clone()
        })
        .collect()
}

fn valid(model: &TreeModel) -> bool {
    TreeModel::new(
        model.structure.clone(),
        model.dims.clone(),
        model.classes.clone(),
        model.conditionals.clone(),
    )
    .is_ok()
}

/// Mean total variation distance between P(f | q, y) and P(f | y) over features with a parent, cells and classes.
fn dependence(model: &TreeModel) -> f64 {
    let mut distances = Vec::new();
    for a in 1..4 {
        let parents = DIMS[model.structure.parent(a).unwrap()];
        for class in 0..2 {
            let runs: Vec<&[f64]> = (0..parents).map(|q| model.conditional(a, q, class).unwrap()).collect();
            let mean: Vec<f64> =
                (0..DIMS[a]).map(|i| runs.iter().map(|r| r[i]).sum::<f64>() / parents as f64).collect();
            distances.extend(
                runs.iter().map(|r| r.iter().zip(&mean).map(|(x, m)| (x - m).abs()).sum::<f64>() / 2.0),
            );
        }
    }
    distances.iter().sum::<f64>() / distances.len() as f64
}

/// Clamping at 0 and normalising, the naive rival, makes noise look like strong dependence.
fn clamped(tables: &[MarginalTable]) -> TreeModel {
    let mut conditionals = vec![Vec::new(); 5];
    for (a, axes) in [(0, vec![4, 0]), (1, vec![4, 0, 1]), (2, vec![4, 1, 2]), (3, vec![4, 0, 3])] {
        let t = best_marginal(tables, &axes).unwrap();
        for column in t.values.chunks_exact(DIMS[a]) {
            let sum: f64 = column.iter().map(|v| v.max(0.0) + 1e-3).sum();
            conditionals[a].extend(column.iter().map(|v| (v.max(0.0) + 1e-3) / sum));
        }
    }
    TreeModel::new(structure(), DIMS.to_vec(), vec![0.5, 0.5], conditionals).unwrap()
}

#[test]
fn noise_is_taken_for_far_less_dependence_than_clamping_takes_it() {
    let mut rng = ChaCha20Rng::seed_from_u64(4);
    let truth = random_model(&mut rng);
    let rows = naive_rows(&truth, 2_000, &mut rng);
    let exact: Vec<_> = FAMILIES.iter().map(|f| count(&rows, f, 0.0)).collect();
    let (mut ours, mut naive) = (0.0, 0.0);
    for _ in 0..20 {
        // Noise of sd 5,000 a cell on 2,000 rows: nothing is left to learn.
        let tables = noisy(&exact, 5_000.0, &mut rng);
        let model = fit(&structure(), &tables).unwrap();
        assert!(valid(&model));
        ours += dependence(&model) / 20.0;
        naive += dependence(&clamped(&tables)) / 20.0;
    }
    // Over 40 seeds ours had mean 0.096 and sd 0.0066, so 0.13 is 5 sd above; the smallest ratio was 3.1.
    assert!(ours < 0.13 && naive > 2.5 * ours, "ours {ours}, clamped {naive}");
}

#[test]
fn fitted_model_predicts_new_rows_better_than_clamping() {
    let mut rng = ChaCha20Rng::seed_from_u64(8);
    let truth = random_model(&mut rng);
    let rows = naive_rows(&truth, 3_000, &mut rng);
    let fresh = naive_rows(&truth, 2_000, &mut rng);
    let exact: Vec<_> = FAMILIES.iter().map(|f| count(&rows, f, 0.0)).collect();
    let score = |model: &TreeModel| {
        let likelihood = |row: &[usize; 5]| model.log_likelihood(&row.map(|c| u32::try_from(c).unwrap()));
        fresh.iter().map(likelihood).sum::<f64>() / fresh.len() as f64
    };
    let best = score(&truth);
    for sd in [10.0, 40.0, 160.0] {
        let tables = noisy(&exact, sd, &mut rng);
        let (ours, naive) = (score(&fit(&structure(), &tables).unwrap()), score(&clamped(&tables)));
        assert!(ours > naive && ours < best, "sd {sd}: {ours} against {naive}, truth {best}");
    }
}

#[test]
fn an_extra_marginal_sharpens_the_fit() {
    let mut rng = ChaCha20Rng::seed_from_u64(9);
    let truth = random_model(&mut rng);
    let rows = naive_rows(&truth, 3_000, &mut rng);
    let exact: Vec<_> = FAMILIES.iter().map(|f| count(&rows, f, 0.0)).collect();
    let mut tables = noisy(&exact, 60.0, &mut rng);
    tables.push(count(&rows, &[4], 0.0));
    let model = fit(&structure(), &tables).unwrap();
    let label = count(&rows, &[4], 0.0);
    assert!((model.classes()[1] - label.values[1] / 3_000.0).abs() < 1e-9);
}

#[test]
fn empty_and_negative_tables_give_uniform_models() {
    for value in [0.0, -4.0] {
        let tables: Vec<_> = FAMILIES
            .iter()
            .map(|f| {
                let mut t = count(&[], f, 9.0);
                t.values.iter_mut().for_each(|v| *v = value);
                t
            })
            .collect();
        let model = fit(&structure(), &tables).unwrap();
        assert!(valid(&model));
        assert!(model.classes().iter().all(|p| (p - 0.5).abs() < 1e-12));
        for (conditional, cells) in model.conditionals.iter().zip(DIMS).take(4) {
            let uniform = 1.0 / cells as f64;
            assert!(conditional.iter().all(|p| (p - uniform).abs() < 1e-12));
        }
    }
}

#[test]
fn a_class_without_rows_has_no_mass_and_valid_conditionals() {
    let mut rng = ChaCha20Rng::seed_from_u64(6);
    let mut rows = naive_rows(&random_model(&mut rng), 500, &mut rng);
    rows.retain(|row| row[4] == 1);
    let exact: Vec<_> = FAMILIES.iter().map(|f| count(&rows, f, 0.0)).collect();
    let model = fit(&structure(), &exact).unwrap();
    assert_eq!(model.classes(), [0.0, 1.0]);
    assert!(valid(&model));
    assert!(valid(&fit(&structure(), &noisy(&exact, 30.0, &mut rng)).unwrap()));
}

#[test]
fn uncovered_families_and_strangers_are_refused() {
    let tables: Vec<_> = FAMILIES[..3].iter().map(|f| count(&[], f, 1.0)).collect();
    let missing = fit(&structure(), &tables).unwrap_err();
    assert_eq!(missing, SynthesisError::MissingMarginal { attributes: vec![4, 3] });
    let stranger = MarginalTable { attributes: vec![5], dims: vec![1], values: vec![1.0], variance: 1.0 };
    assert_eq!(
        fit(&structure(), &[stranger]),
        Err(SynthesisError::UnknownAttribute { got: 5, attributes: 5 })
    );
    assert_eq!(fit(&structure(), &[]), Err(SynthesisError::NoMarginals));
}

#[test]
fn stored_models_are_checked_when_read() {
    let model = random_model(&mut ChaCha20Rng::seed_from_u64(1));
    let text = serde_json::to_string(&model).unwrap();
    assert_eq!(serde_json::from_str::<TreeModel>(&text).unwrap(), model);
    let tampered = text.replacen("\"classes\":[0.3,0.7]", "\"classes\":[0.9,0.7]", 1);
    assert_ne!(tampered, text);
    assert!(serde_json::from_str::<TreeModel>(&tampered).is_err());
    assert_eq!(model.conditional(4, 0, 0), None);
    assert_eq!(model.conditional(1, 3, 0), None);
    assert_eq!(model.conditional(1, 0, usize::MAX), None);
    assert_eq!(model.conditional(9, 0, 0), None);
    assert_eq!(model.log_likelihood(&[0, 0]), f64::NEG_INFINITY);
    assert_eq!(model.log_likelihood(&[0, 0, 0, 99, 1]), f64::NEG_INFINITY);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_counts_give_a_valid_model(
        seed in any::<u64>(), scale in prop_oneof![Just(0.0), Just(1.0), Just(1e4), Just(1e9)],
        variance in prop_oneof![Just(0.0), Just(1.0), Just(1e6), Just(1e15)],
    ) {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let tables: Vec<_> = FAMILIES.iter().map(|f| {
            let mut t = count(&[], f, variance);
            t.values.iter_mut().for_each(|v| *v = scale * rng.random_range(-1.0..1.0));
            t
        }).collect();
        let model = fit(&structure(), &tables).unwrap();
        prop_assert!(valid(&model));
        prop_assert_eq!(fit(&structure(), &tables).unwrap(), model);
        let root = marginalise(&tables[0], &[0]).unwrap();
        prop_assert_eq!(root.dims, vec![3]);
    }
}

/// A feature with two parents that depend on each other: the fit has the pairs that were counted, and rows drawn from it too.
#[test]
fn a_junction_tree_meets_all_pairs_of_its_cliques() {
    let scores = [(0, 1, 1.0), (0, 2, 0.9), (1, 2, 0.8)]
        .map(|(first, second, score)| crate::tree::PairScore { first, second, score, noise: 0.0, sd: 0.0 });
    let (dims, width) = ([3, 2, 4, 2], crate::tree::Width { parents: 2, cells: 48 });
    let wide = TreeStructure::spanning(4, 3, &scores).unwrap().widened(&scores, &dims, width).unwrap();
    assert_eq!(wide.above(2), [0, 1]);
    // Counts of all cells of three features and the label, drawn anyhow.
    let mut rng = ChaCha20Rng::seed_from_u64(3);
    let cells: usize = dims.iter().product();
    let whole = MarginalTable {
        attributes: vec![0, 1, 2, 3],
        dims: dims.to_vec(),
        values: (0..cells).map(|_| rng.random_range(1.0..200.0_f64).round()).collect(),
        variance: 1e-9,
    };
    let total: f64 = whole.values.iter().sum();
    let pairs = [[0, 3], [1, 3], [2, 3], [0, 1], [0, 2], [1, 2]];
    let tables: Vec<MarginalTable> = pairs.iter().map(|keep| marginalise(&whole, keep).unwrap()).collect();
    let model = fit(&wide, &tables).unwrap();
    let mut joint = vec![0.0; cells];
    for (at, p) in joint.iter_mut().enumerate() {
        let row = [at / 16, at / 8 % 2, at / 2 % 4, at % 2].map(|cell| u32::try_from(cell).unwrap());
        *p = model.log_likelihood(&row).exp();
    }
    assert!((joint.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    let fitted = MarginalTable { values: joint, ..whole.clone() };
    for keep in &pairs {
        let (got, wanted) = (marginalise(&fitted, keep).unwrap(), marginalise(&whole, keep).unwrap());
        for (p, n) in got.values.iter().zip(&wanted.values) {
            assert!((p - n / total).abs() < 2e-4, "{keep:?}: {p} {}", n / total);
        }
    }
    let rows = crate::sample::draw(&model, 200_000, &mut rng).unwrap();
    let share =
        (0..rows.rows()).filter(|r| rows.column(1)[*r] == 1 && rows.column(2)[*r] == 3).count() as f64;
    let wanted = marginalise(&fitted, &[1, 2]).unwrap().values[7];
    assert!((share / 200_000.0 - wanted).abs() < 0.005, "{share} {wanted}");
    // A tree without the third edge misses that pair.
    let narrow = TreeStructure::spanning(4, 3, &scores[..2]).unwrap();
    let narrow = fit(&narrow, &tables).unwrap();
    let missed: f64 = (0..cells)
        .filter(|at| at / 8 % 2 == 1 && at / 2 % 4 == 3)
        .map(|at| {
            let row = [at / 16, 1, 3, at % 2].map(|cell| u32::try_from(cell).unwrap());
            narrow.log_likelihood(&row).exp()
        })
        .sum();
    assert!((missed - wanted).abs() > 1e-3, "{missed} {wanted}");
    // A row outside of the cells, of a parent too, is one that the model excludes.
    assert_eq!(model.log_likelihood(&[9, 0, 0, 0]), f64::NEG_INFINITY);
    assert_eq!(model.log_likelihood(&[0, 2, 0, 0]), f64::NEG_INFINITY);
}
