//! Drawn rows against the model, with stated error rates.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests")]

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

use super::*;
use crate::tree::TreeStructure;

fn rng(seed: u64) -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(seed)
}

/// Label 0 with 2 classes; feature 1 a root with 3 cells, one impossible in class 1; feature 2 ← 1 with 2 cells.
fn model() -> TreeModel {
    TreeModel::new(
        TreeStructure::new(0, vec![None, None, Some(1)]).unwrap(),
        vec![2, 3, 2],
        vec![0.25, 0.75],
        vec![
            vec![],
            vec![0.2, 0.3, 0.5, 0.6, 0.4, 0.0],
            vec![0.9, 0.1, 0.5, 0.5, 0.3, 0.7, 0.25, 0.75, 0.6, 0.4, 1.0, 0.0],
        ],
    )
    .unwrap()
}

/// χ² of the 10 possible joint cells over 50,000 rows, fixed seed. The 1 − 1e-6 quantile of χ² with 9 degrees of
/// freedom is 44.8 (scipy 1.17.1 `chi2.ppf`): a correct sampler fails for one seed in a million.
#[test]
fn joint_frequencies_match_the_model() {
    let (model, rows) = (model(), 50_000);
    let drawn = draw(&model, rows, &mut rng(17)).unwrap();
    let mut counts = [[[0.0_f64; 2]; 3]; 2];
    for row in 0..rows {
        let cell = |a: usize| drawn.column(a)[row] as usize;
        counts[cell(0)][cell(1)][cell(2)] += 1.0;
    }
    let (mut statistic, mut possible) = (0.0, 0);
    for (class, planes) in counts.iter().enumerate() {
        for (first, lines) in planes.iter().enumerate() {
            for (second, &count) in lines.iter().enumerate() {
                let p = model.classes()[class]
                    * model.conditional(1, 0, class).unwrap()[first]
                    * model.conditional(2, first, class).unwrap()[second];
                let by_likelihood =
                    model.log_likelihood(&[class, first, second].map(|c| u32::try_from(c).unwrap())).exp();
                assert!((p - by_likelihood).abs() < 1e-12);
                if p > 0.0 {
                    statistic += (count - rows as f64 * p).powi(2) / (rows as f64 * p);
                    possible += 1;
                } else {
                    assert_eq!(count, 0.0, "an impossible cell was drawn");
                }
            }
        }
    }
    assert_eq!(possible, 10);
    assert!(statistic < 44.8, "chi-square {statistic}");
}

#[test]
fn equal_seeds_give_equal_rows_and_other_seeds_others() {
    let model = model();
    assert_eq!(draw(&model, 100, &mut rng(1)).unwrap(), draw(&model, 100, &mut rng(1)).unwrap());
    assert_ne!(draw(&model, 100, &mut rng(1)).unwrap(), draw(&model, 100, &mut rng(2)).unwrap());
}

#[test]
fn rows_for_given_labels_keep_them() {
    let labels = [1, 0, 0, 1, 1];
    let rows = draw_for_labels(&model(), &labels, &mut rng(1)).unwrap();
    assert_eq!(rows.column(0), labels);
    assert!(rows.column(1).iter().zip(labels).all(|(cell, class)| class == 0 || *cell < 2));
    let refused = draw_for_labels(&model(), &[2], &mut rng(1)).unwrap_err();
    assert_eq!(refused, SynthesisError::LayoutMismatch { what: "classes", expected: 2, got: 3 });
}

#[test]
fn row_limits_hold() {
    let refused = draw(&model(), MAX_ROWS + 1, &mut rng(1)).unwrap_err();
    assert_eq!(refused, SynthesisError::TooManyRows { rows: MAX_ROWS + 1, limit: MAX_ROWS });
    assert!(limit_rows(MAX_ROWS, 1).is_ok());
    assert!(
        limit_rows(MAX_ROW_CELLS / 512 + 1, 512).is_err() && limit_rows(MAX_ROW_CELLS / 512, 512).is_ok()
    );
    assert_eq!(draw(&model(), 0, &mut rng(1)).unwrap().rows(), 0);
}

fn numeric(lower: f64, upper: f64, log1p: bool, edges: &[f64]) -> Attribute {
    Attribute {
        id: "n".into(),
        binning: Binning::Edges { lower, upper, log1p, edges: edges.to_vec() },
        merge: None,
    }
}

fn levels(levels: u32, merge: Option<Vec<u16>>) -> Attribute {
    Attribute { id: "l".into(), binning: Binning::Levels { levels }, merge }
}

fn numbers(attribute: Attribute, cells: Vec<u32>) -> Vec<f64> {
    let rows = CellRows::new(vec![attribute.cells(), 1], vec![cells.clone(), vec![0; cells.len()]]).unwrap();
    let table =
        decode(&rows, &[attribute, Attribute::label(1)], FineHistograms::default(), &mut rng(9)).unwrap();
    assert_eq!(table.rows, cells.len());
    let [SynthColumn::Numeric(values)] = table.columns.as_slice() else { panic!("one numeric column") };
    values.clone()
}

#[test]
fn numbers_fall_back_into_their_own_bin() {
    for attribute in [
        numeric(-5.0, 40.0, false, &[-1.0, 0.0, 0.125, 30.0]),
        numeric(0.0, 1e9, true, &[1e-9, 1.0, 1_000.0]),
        numeric(-0.5, 3.0, true, &[0.0]),
        numeric(1e15, 1e15 + 1.0, false, &[1e15 + 0.125, 1e15 + 0.25]),
        numeric(-f64::MAX, f64::MAX, false, &[0.0]),
    ] {
        let cells: Vec<u32> = (0..4_000).map(|i| i % u32::try_from(attribute.cells()).unwrap()).collect();
        for (value, cell) in numbers(attribute.clone(), cells.clone()).iter().zip(cells) {
            assert_eq!(attribute.fine_cell_of(*value), cell as usize, "{value} of {attribute:?}");
            let Some((low, high)) = attribute.bin_bounds(cell as usize) else {
                assert!(value.is_nan());
                continue;
            };
            assert!((low..=high).contains(value));
        }
    }
}

/// Means of 20,000 uniform draws: within 5 standard errors (false alarm 6e-7 each).
#[test]
fn numbers_are_uniform_on_their_scale() {
    let n = 20_000_usize;
    let tolerance = 5.0 / (12.0 * n as f64).sqrt();
    let linear = numbers(numeric(10.0, 30.0, false, &[20.0]), vec![1; n]);
    let mean = linear.iter().map(|v| (v - 20.0) / 10.0).sum::<f64>() / n as f64;
    assert!((mean - 0.5).abs() < tolerance);
    let heavy = numbers(numeric(0.0, 1_000.0, true, &[]), vec![0; n]);
    let mean = heavy.iter().map(|v| v.ln_1p() / 1_000.0_f64.ln_1p()).sum::<f64>() / n as f64;
    assert!((mean - 0.5).abs() < tolerance);
}

#[test]
fn merged_levels_split_by_the_fine_histogram() {
    // Levels 0..4, other 4, missing 5; 1, 3, other and missing share cell 2.
    let attribute = levels(4, Some(vec![0, 2, 1, 2, 2, 2]));
    let n = 10_000_usize;
    let rows = CellRows::new(vec![1, 3], vec![vec![0; n + 2], [vec![2; n], vec![0, 1]].concat()]).unwrap();
    let fine = |variance, values: [f64; 6]| MarginalTable {
        attributes: vec![1],
        dims: vec![6],
        values: values.to_vec(),
        variance,
    };
    let attributes = [Attribute::label(1), attribute];
    let unmerged = [Attribute::label(1), levels(4, None)];
    let codes = |tables: &[MarginalTable]| {
        let fine = FineHistograms { attributes: &unmerged, tables };
        let table = decode(&rows, &attributes, fine, &mut rng(4)).unwrap();
        assert_eq!(table.labels, vec![0; n + 2]);
        let SynthColumn::Codes(codes) = table.columns[0].clone() else { panic!("one column of codes") };
        assert_eq!(codes[n..], [0, 2]);
        let share = |code| codes[..n].iter().filter(|c| **c == code).count() as f64 / n as f64;
        [0, 1, 2, 3, 4, 5].map(share)
    };
    let tables = [fine(9.0, [1.0; 6]), fine(1.0, [500.0, 30.0, 400.0, 10.0, 0.0, -7.0])];
    let got = codes(&tables);
    // The projection takes the -7 off all five positive cells: 1.4 each, so 28.6 and 8.6 remain.
    assert_eq!([got[0], got[2], got[4], got[5]], [0.0; 4]);
    assert!((got[1] - 28.6 / 37.2).abs() < 5.0 * (0.25 / n as f64).sqrt());
    for even in [codes(&[]), codes(&[fine(1.0, [-1.0; 6])])] {
        assert!([1, 3, 4, 5].iter().all(|&c| (even[c] - 0.25).abs() < 5.0 * (0.1875 / n as f64).sqrt()));
    }
}

/// 10,000 rows per bin: shares within 5 standard errors (false alarm 6e-7 each).
#[test]
fn numbers_gather_where_the_fine_histogram_saw_them() {
    // Values 0, 1, 2, 3 in eighths; the final bins are [0, 0.5), [0.5, 4] and missing, the last two merged.
    let eighths: Vec<f64> = (1..32).map(|i| f64::from(i) / 8.0).collect();
    let counted = [numeric(0.0, 4.0, false, &eighths), Attribute::label(1)];
    let mut values = vec![0.0; 33];
    for (bin, count) in [(0, 900.0), (8, 300.0), (16, 100.0), (32, 100.0)] {
        values[bin] = count;
    }
    let table = MarginalTable { attributes: vec![0], dims: vec![33], values, variance: 0.0 };
    let mut bins = numeric(0.0, 4.0, false, &[0.5]);
    bins.merge = Some(vec![0, 1, 1]);
    let n = 10_000_usize;
    let rows = CellRows::new(vec![2, 1], vec![[vec![0; n], vec![1; n]].concat(), vec![0; 2 * n]]).unwrap();
    let fine = FineHistograms { attributes: &counted, tables: std::slice::from_ref(&table) };
    let attributes = [bins, Attribute::label(1)];
    let decoded = decode(&rows, &attributes, fine, &mut rng(8)).unwrap();
    let SynthColumn::Numeric(drawn) = &decoded.columns[0] else { panic!("one numeric column") };
    assert!(drawn[..n].iter().all(|v| (0.0..0.125).contains(v)));
    let share =
        |inside: &dyn Fn(f64) -> bool| drawn[n..].iter().filter(|v| inside(**v)).count() as f64 / n as f64;
    let tolerance = 5.0 * (0.25 / n as f64).sqrt();
    assert!((share(&|v| (1.0..1.125).contains(&v)) - 0.6).abs() < tolerance);
    assert!((share(&|v| (2.0..2.125).contains(&v)) - 0.2).abs() < tolerance);
    assert!((share(&|v| v.is_nan()) - 0.2).abs() < tolerance);
    // A histogram that saw nothing leaves the whole bin.
    let blank = MarginalTable { values: vec![0.0; 33], ..table };
    let fine = FineHistograms { attributes: &counted, tables: &[blank] };
    let decoded = decode(&rows, &attributes, fine, &mut rng(8)).unwrap();
    let SynthColumn::Numeric(drawn) = &decoded.columns[0] else { panic!("one numeric column") };
    assert!(drawn[..n].iter().any(|v| *v > 0.4) && drawn[n..].iter().any(|v| *v > 3.9));
}

#[test]
fn a_towering_fine_bin_is_one_value_and_a_smooth_one_is_not() {
    let tenths: Vec<f64> = (1..10).map(f64::from).collect();
    let counted = [numeric(0.0, 10.0, false, &tenths), Attribute::label(1)];
    // Spikes in the first, fifth and last bin; bins 1 and 2 are level, bin 7 is within the noise.
    let values = vec![900.0, 100.0, 90.0, 0.0, 400.0, 0.0, 0.0, 30.0, 0.0, 500.0, 0.0];
    let tables = [MarginalTable { attributes: vec![0], dims: vec![11], values, variance: 100.0 }];
    let rows = CellRows::new(vec![2, 1], vec![vec![0; 3_000], vec![0; 3_000]]).unwrap();
    let attributes = [numeric(0.0, 10.0, false, &[]), Attribute::label(1)];
    let fine = FineHistograms { attributes: &counted, tables: &tables };
    let decoded = decode(&rows, &attributes, fine, &mut rng(3)).unwrap();
    let SynthColumn::Numeric(drawn) = &decoded.columns[0] else { panic!("one numeric column") };
    for (low, high, single) in [(0.0, 1.0, 0.0), (4.0, 5.0, 4.5), (9.0, 10.1, 10.0)] {
        let here: Vec<&f64> = drawn.iter().filter(|v| (low..high).contains(*v)).collect();
        assert!(!here.is_empty() && here.iter().all(|v| **v == single), "{single}");
    }
    for low in [1.0, 2.0, 7.0] {
        let here: Vec<&f64> = drawn.iter().filter(|v| (low..low + 1.0).contains(*v)).collect();
        assert!(here.len() > 1 && here.iter().any(|v| *v != here[0]), "{low}");
    }
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let rows = CellRows::new(vec![2, 4], vec![vec![1, 0], vec![3, 0]]).unwrap();
    let label = Attribute::label(2);
    let run = |attributes: &[Attribute]| {
        decode(&rows, attributes, FineHistograms::default(), &mut rng(1)).map(|t| t.columns)
    };
    let two = |attribute: Attribute| [label.clone(), attribute];
    assert_eq!(run(&two(levels(2, None))).unwrap(), vec![SynthColumn::Codes(vec![3, 0])]);
    let mismatch = |what, expected, got| Err(SynthesisError::LayoutMismatch { what, expected, got });
    assert_eq!(run(std::slice::from_ref(&label)), mismatch("attributes", 2, 1));
    assert_eq!(run(&[levels(1, None), levels(2, None)]), mismatch("label attributes", 1, 0));
    let cells = Err(SynthesisError::DimensionMismatch { attribute: 1, expected: 4, got: 5 });
    assert_eq!(run(&two(levels(3, None))), cells);
    let groups = Err(SynthesisError::BadGroups { attribute: 1, expected: 5, groups: 4 });
    assert_eq!(run(&two(levels(3, Some(vec![0, 1, 1, 3, 3])))), groups);
    assert!(CellRows::new(vec![2], vec![]).is_err());
    assert!(CellRows::new(vec![2], vec![vec![2]]).is_err());
    assert!(CellRows::new(vec![2, 2], vec![vec![0], vec![]]).is_err());

    let histogram = |counted: &[Attribute], cells: usize| {
        let table =
            MarginalTable { attributes: vec![1], dims: vec![cells], values: vec![1.0; cells], variance: 1.0 };
        let fine = FineHistograms { attributes: counted, tables: &[table] };
        decode(&rows, &two(levels(2, None)), fine, &mut rng(1)).map(|t| t.columns)
    };
    assert!(histogram(&two(levels(2, None)), 4).is_ok());
    let short = Err(SynthesisError::DimensionMismatch { attribute: 1, expected: 4, got: 3 });
    assert_eq!(histogram(&two(levels(2, None)), 3), short);
    let kind = "unmerged cells of the same kind";
    assert_eq!(histogram(&two(levels(9, None)), 11), mismatch(kind, 4, 11));
    assert_eq!(histogram(&two(numeric(0.0, 1.0, false, &[0.5, 0.6])), 4), mismatch(kind, 4, 4));
    assert_eq!(histogram(&two(levels(2, Some(vec![0, 1, 1, 1]))), 4), mismatch(kind, 4, 2));
    let unknown = Err(SynthesisError::UnknownAttribute { got: 1, attributes: 1 });
    assert_eq!(histogram(std::slice::from_ref(&label), 4), unknown);
}
