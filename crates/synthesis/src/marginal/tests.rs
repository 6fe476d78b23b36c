//! Marginal operations against naive twins.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests")]

use proptest::prelude::*;

use super::*;

fn table(attributes: &[usize], dims: &[usize], values: &[f64], variance: f64) -> MarginalTable {
    MarginalTable { attributes: attributes.to_vec(), dims: dims.to_vec(), values: values.to_vec(), variance }
}

/// Cell numbers of a flat index, the slow way.
fn unravel(mut index: usize, dims: &[usize]) -> Vec<usize> {
    let mut cell = vec![0; dims.len()];
    for axis in (0..dims.len()).rev() {
        cell[axis] = index % dims[axis];
        index /= dims[axis];
    }
    cell
}

#[test]
fn marginalise_sums_and_reorders() {
    let t = table(&[4, 7, 2], &[2, 3, 2], &(0..12).map(f64::from).collect::<Vec<_>>(), 2.0);
    let m = marginalise(&t, &[2, 4]).unwrap();
    assert_eq!((m.attributes.as_slice(), m.dims.as_slice()), ([2, 4].as_slice(), [2, 2].as_slice()));
    assert_eq!(m.values, vec![0.0 + 2.0 + 4.0, 6.0 + 8.0 + 10.0, 1.0 + 3.0 + 5.0, 7.0 + 9.0 + 11.0]);
    assert_eq!(m.variance, 6.0);
    assert_eq!(marginalise(&t, &[4, 7, 2]).unwrap(), t);
    assert!(matches!(marginalise(&t, &[9]), Err(SynthesisError::MissingMarginal { .. })));
    assert!(matches!(marginalise(&t, &[4, 4]), Err(SynthesisError::BadAxes { .. })));
    assert!(matches!(marginalise(&t, &[]), Err(SynthesisError::BadAxes { .. })));
}

#[test]
fn merging_cells_keeps_the_other_axes() {
    let t = table(&[0, 1, 2], &[2, 3, 2], &(1..13).map(f64::from).collect::<Vec<_>>(), 1.0);
    let m = merge_cells(&t, 1, &[1, 0, 1], 2).unwrap();
    assert_eq!(m.dims, vec![2, 2, 2]);
    assert_eq!(m.values, vec![3.0, 4.0, 1.0 + 5.0, 2.0 + 6.0, 9.0, 10.0, 7.0 + 11.0, 8.0 + 12.0]);
    assert_eq!(m.variance, 1.5);
    for (groups, cells) in [(vec![0, 1], 2), (vec![0, 1, 2], 2), (vec![0, 0, 0], 0)] {
        let refused = merge_cells(&t, 1, &groups, cells);
        assert_eq!(refused, Err(SynthesisError::BadGroups { attribute: 1, expected: 3, groups: cells }));
    }
}

#[test]
fn malformed_tables_are_refused() {
    let bad = |t: MarginalTable| check(&t).unwrap_err();
    assert!(matches!(bad(table(&[], &[], &[1.0], 1.0)), SynthesisError::BadAxes { .. }));
    assert!(matches!(bad(table(&[1, 1], &[1, 1], &[1.0], 1.0)), SynthesisError::BadAxes { .. }));
    assert!(matches!(bad(table(&[1], &[0], &[], 1.0)), SynthesisError::BadAxes { .. }));
    assert!(matches!(bad(table(&[1, 2], &[1], &[1.0], 1.0)), SynthesisError::BadAxes { .. }));
    assert!(matches!(
        bad(table(&[1], &[2], &[1.0], 1.0)),
        SynthesisError::CellCount { expected: 2, got: 1, .. }
    ));
    for (value, variance) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (1.0, f64::NAN), (1.0, -1.0)] {
        assert!(matches!(bad(table(&[1], &[1], &[value], variance)), SynthesisError::NotFinite { .. }));
    }
    assert_eq!(cell_count(&[MAX_CELLS]), Ok(MAX_CELLS));
    let over = Err(SynthesisError::TooManyCells { got: MAX_CELLS + 1, limit: MAX_CELLS });
    assert_eq!(cell_count(&[MAX_CELLS + 1]), over);
    assert!(cell_count(&[usize::MAX, 2]).is_err());
    assert_eq!(reconcile(&mut []), Err(SynthesisError::NoMarginals));
    let mut two = [table(&[1], &[1], &[1.0], 1.0), table(&[1], &[2], &[1.0, 1.0], 1.0)];
    assert_eq!(
        reconcile(&mut two),
        Err(SynthesisError::DimensionMismatch { attribute: 1, expected: 1, got: 2 })
    );
}

#[test]
fn total_weighs_by_inverse_variance_of_the_sum() {
    // Sums 10 (variance 2 · 1) and 13 (variance 4 · 1): weights 2/3 and 1/3, variance 1/(1/2 + 1/4).
    let tables = [table(&[0], &[2], &[4.0, 6.0], 1.0), table(&[1, 2], &[2, 2], &[1.0, 2.0, 3.0, 7.0], 1.0)];
    let got = total(&tables).unwrap();
    assert!((got.value - 11.0).abs() < 1e-12 && (got.variance - 4.0 / 3.0).abs() < 1e-12);
    let exact = [tables[0].clone(), table(&[5], &[1], &[12.0], 0.0)];
    assert_eq!(total(&exact).unwrap(), Estimate { value: 12.0, variance: 0.0 });
    assert_eq!(total(&[]), Err(SynthesisError::NoMarginals));
}

#[test]
fn an_exact_table_overrules_noisy_ones() {
    let exact = table(&[0], &[2], &[30.0, 70.0], 0.0);
    let mut tables = [table(&[0, 1], &[2, 2], &[10.0, 10.0, 50.0, 10.0], 5.0), exact.clone()];
    reconcile(&mut tables).unwrap();
    assert_eq!(tables[1], exact);
    let sums = marginalise(&tables[0], &[0]).unwrap();
    assert!((sums.values[0] - 30.0).abs() < 1e-9 && (sums.values[1] - 70.0).abs() < 1e-9);
}

/// Generalised least squares the obvious way: unknown joint cells, normal equations, Gaussian elimination.
/// The tables don't determine the joint, so a tiny ridge picks one; the fitted tables are unique all the same.
fn dense_least_squares(tables: &[MarginalTable], dims: &[usize]) -> Vec<Vec<f64>> {
    let n: usize = dims.iter().product();
    let mut normal = vec![vec![0.0; n + 1]; n];
    let cell_of = |t: &MarginalTable, joint: usize| {
        let cell = unravel(joint, dims);
        t.attributes.iter().zip(&t.dims).fold(0, |index, (a, d)| index * d + cell[*a])
    };
    for t in tables {
        for (i, row) in normal.iter_mut().enumerate() {
            for (j, entry) in row.iter_mut().take(n).enumerate() {
                if cell_of(t, i) == cell_of(t, j) {
                    *entry += 1.0 / t.variance;
                }
            }
            row[n] += t.values[cell_of(t, i)] / t.variance;
        }
    }
    for (i, row) in normal.iter_mut().enumerate() {
        row[i] += 1e-8;
    }
    for pivot in 0..n {
        let best =
            (pivot..n).max_by(|a, b| normal[*a][pivot].abs().total_cmp(&normal[*b][pivot].abs())).unwrap();
        normal.swap(pivot, best);
        let lead = normal[pivot].clone();
        for (_, row) in normal.iter_mut().enumerate().filter(|(i, _)| *i != pivot) {
            let factor = row[pivot] / lead[pivot];
            row.iter_mut().zip(&lead).for_each(|(x, l)| *x -= factor * l);
        }
    }
    let joint: Vec<f64> = (0..n).map(|i| normal[i][n] / normal[i][i]).collect();
    tables
        .iter()
        .map(|t| {
            let mut values = vec![0.0; t.values.len()];
            joint.iter().enumerate().for_each(|(i, x)| values[cell_of(t, i)] += x);
            values
        })
        .collect()
}

/// Overlapping tables over attributes of 2, 3, 2 and 2 cells, with arbitrary counts and variances.
fn overlapping() -> impl Strategy<Value = Vec<MarginalTable>> {
    const DIMS: [usize; 4] = [2, 3, 2, 2];
    let families: [&[usize]; 7] = [&[0, 1, 3], &[3, 2, 1], &[0, 2], &[1], &[2, 3], &[0, 1, 2], &[3]];
    let one = move |attributes: &'static [usize]| {
        let dims: Vec<usize> = attributes.iter().map(|&a| DIMS[a]).collect();
        let cells: usize = dims.iter().product();
        (prop::collection::vec(-20.0..80.0_f64, cells), 0.25..4.0_f64)
            .prop_map(move |(values, variance)| table(attributes, &dims, &values, variance))
    };
    let all: Vec<_> = families.into_iter().map(one).collect();
    (all, prop::collection::vec(any::<bool>(), 7)).prop_map(|(tables, keep)| {
        let kept: Vec<_> = tables.iter().zip(keep).filter(|(_, k)| *k).map(|(t, _)| t.clone()).collect();
        if kept.is_empty() { tables } else { kept }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn reconciliation_is_generalised_least_squares(tables in overlapping()) {
        let mut ours = tables.clone();
        reconcile(&mut ours).unwrap();
        for (mine, twin) in ours.iter().zip(dense_least_squares(&tables, &[2, 3, 2, 2])) {
            for (a, b) in mine.values.iter().zip(&twin) {
                prop_assert!((a - b).abs() < 1e-4, "{:?}: {a} against {b}", mine.attributes);
            }
        }
    }

    #[test]
    fn reconciled_tables_agree_on_all_they_share(tables in overlapping()) {
        let mut ours = tables;
        reconcile(&mut ours).unwrap();
        for a in &ours {
            for b in &ours {
                let (sa, sb): (f64, f64) = (a.values.iter().sum(), b.values.iter().sum());
                prop_assert!((sa - sb).abs() < 1e-8);
                let common: Vec<usize> =
                    a.attributes.iter().filter(|x| b.attributes.contains(x)).copied().collect();
                if common.is_empty() {
                    continue;
                }
                let (ma, mb) = (marginalise(a, &common).unwrap(), marginalise(b, &common).unwrap());
                prop_assert!(ma.values.iter().zip(&mb.values).all(|(x, y)| (x - y).abs() < 1e-8));
            }
        }
        let mut again = ours.clone();
        reconcile(&mut again).unwrap();
        for (a, b) in again.iter().zip(&ours) {
            prop_assert!(a.values.iter().zip(&b.values).all(|(x, y)| (x - y).abs() < 1e-8));
        }
    }

    #[test]
    fn projection_is_the_nearest_table_with_that_total(
        counts in prop::collection::vec(-50.0..50.0_f64, 1..20), total in 0.1..200.0_f64,
    ) {
        // Naive twin: bisection for the constant whose removal leaves the total.
        let left = |shift: f64| counts.iter().map(|v| (v - shift).max(0.0)).sum::<f64>();
        let (mut low, mut high) = (-300.0, 60.0);
        for _ in 0..200 {
            let middle = 0.5 * (low + high);
            if left(middle) > total { low = middle } else { high = middle }
        }
        for (ours, v) in project_to_simplex(&counts, total).iter().zip(&counts) {
            prop_assert!((ours - (v - low).max(0.0)).abs() < 1e-9);
        }
    }

    #[test]
    fn probabilities_are_always_a_distribution(
        counts in prop::collection::vec(prop_oneof![-1e12..1e12_f64, -3.0..3.0_f64, Just(0.0), Just(1e-300)], 1..20),
        prior in prop::collection::vec(0.0..1.0_f64, 0..20),
        pseudo in prop_oneof![Just(0.0), 0.0..1e6_f64],
    ) {
        let p = probabilities(&counts, &prior, pseudo);
        prop_assert_eq!(p.len(), counts.len());
        prop_assert!(p.iter().all(|x| *x >= 0.0 && *x <= 1.0 + 1e-12));
        prop_assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}

#[test]
fn empty_or_negative_counts_fall_back_on_the_prior() {
    assert_eq!(probabilities(&[0.0; 4], &[], 0.0), vec![0.25; 4]);
    assert_eq!(probabilities(&[-3.0, -1.0], &[3.0, 1.0], 5.0), vec![0.75, 0.25]);
    assert_eq!(probabilities(&[1.0, -1.0], &[0.0, 0.0], 0.0), vec![0.5, 0.5]);
    assert_eq!(probabilities(&[30.0, 10.0], &[], 0.0), vec![0.75, 0.25]);
    assert_eq!(project_to_simplex(&[1.0, 2.0], -1.0), vec![0.0, 0.0]);
    assert_eq!(project_to_simplex(&[1.0, 2.0], f64::NAN), vec![0.0, 0.0]);
}

#[test]
fn projection_removes_noise_from_empty_cells() {
    // 100 rows in one of 11 cells, ±5 of noise in the others: clamping at 0 would give them 25 rows.
    let mut counts = vec![100.0];
    counts.extend([5.0, -5.0].repeat(5));
    let clean = project_to_simplex(&counts, 100.0);
    assert!((clean[0] - (100.0 - 25.0 / 6.0)).abs() < 1e-9);
    assert!(clean[1] < 1.0 && clean[2] == 0.0);
}

#[test]
fn recutting_follows_edges_levels_and_merges() {
    let bins = |edges: &[f64], merge: Option<Vec<u16>>| Attribute {
        id: "x".into(),
        binning: Binning::Edges { lower: 0.0, upper: 8.0, log1p: false, edges: edges.to_vec() },
        merge,
    };
    let fine = bins(&[1.0, 2.0, 3.0, 6.0], None);
    let t = table(&[0], &[6], &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0], 1.0);
    let coarse = recut(&t, 0, &fine, &bins(&[2.0, 6.0], None)).unwrap();
    assert_eq!(coarse.values, vec![3.0, 12.0, 16.0, 32.0]);
    let merged = recut(&t, 0, &fine, &bins(&[2.0, 6.0], Some(vec![0, 1, 0, 2]))).unwrap();
    assert_eq!(merged.values, vec![19.0, 12.0, 32.0]);
    let levels = |merge| Attribute { id: "l".into(), binning: Binning::Levels { levels: 4 }, merge };
    let rare = recut(&t, 0, &levels(None), &levels(Some(vec![0, 2, 2, 1, 2, 2]))).unwrap();
    assert_eq!(rare.values, vec![1.0, 8.0, 2.0 + 4.0 + 16.0 + 32.0]);
    assert!(matches!(recut(&t, 0, &fine, &levels(None)), Err(SynthesisError::LayoutMismatch { .. })));
    assert!(recut(&rare, 0, &levels(Some(vec![0, 2, 2, 1, 2, 2])), &levels(None)).is_err());
}
