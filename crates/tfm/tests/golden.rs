//! Forward pass against the public package, stage by stage.
//!
//! The fixtures hold random weights, made-up tables, and activations and outputs of PyPI tabicl 2.2.0 on torch 2.15.0
//! with mixed precision off. Tolerance 1e-4 for values up to about 50, as the files' noise floor is 1.4e-5; the
//! checkpoint has the weights of `v2_clf_tiny.safetensors`.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use serde_json::Value;
use tabmesh_tfm::{
    Context, EncodedTable, Model, Targets, Task,
    context::{CacheKind, Plan},
    import::PublicFile,
    regression::Quantiles,
};

const TOLERANCE: f32 = 1e-4;

/// Largest difference, and the stage it is at.
fn worst(pairs: &[(String, Vec<f32>, Vec<f32>)]) -> (f32, &str) {
    pairs.iter().fold((0.0, ""), |worst, (stage, got, expected)| {
        assert_eq!(got.len(), expected.len(), "{stage}");
        let apart = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        if apart > worst.0 { (apart, stage) } else { worst }
    })
}

/// Checks a model against the cases of a golden file and gives the number of compared tensors.
fn check(model: &Model, golden: &PublicFile) -> usize {
    let stored = |case: &str, name: &str| golden.tensors.get(&format!("__io.{case}.{name}"));
    let cases: Vec<Value> = serde_json::from_str(&golden.metadata["cases"]).unwrap();
    let mut compared = 0;
    for case in cases {
        let size = |key: &str| usize::try_from(case[key].as_u64().unwrap()).unwrap();
        let (context, columns, classes) = (size("n"), size("H"), size("K"));
        let name = case["name"].as_str().unwrap();
        let y = stored(name, "y").unwrap().1.clone();
        let targets = if model.config().regression() {
            Targets::Values(y)
        } else {
            Targets::Classes { classes, labels: y.iter().map(|v| *v as usize).collect() }
        };
        let values = stored(name, "X").unwrap().1.clone();
        let task = Task { rows: context + size("m"), columns, context, values, targets };
        let mut got: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
        let outputs = model
            .observed_outputs(&task, &mut |stage, shape, values| {
                got.insert(stage.to_owned(), (shape.to_vec(), values));
            })
            .unwrap();
        let plain = model.outputs(&task).unwrap();
        let mut pairs = vec![("outputs without observation".to_owned(), plain, outputs.clone())];
        if model.config().regression() {
            let rows = Quantiles::rows(outputs, model.config().outputs()).unwrap();
            let alphas: Vec<f64> = serde_json::from_str(&golden.metadata["alphas"]).unwrap();
            let each = |f: &dyn Fn(&Quantiles) -> Vec<f32>| rows.iter().flat_map(f).collect::<Vec<f32>>();
            let one = |v: f64| vec![v as f32];
            for (stage, values) in [
                ("quantiles", each(&|q| q.values().to_vec())),
                ("mean", each(&|q| one(q.mean()))),
                ("median", each(&|q| one(q.at(0.5)))),
                ("quantiles_at_alphas", each(&|q| alphas.iter().map(|a| q.at(*a) as f32).collect())),
            ] {
                pairs.push((stage.to_owned(), values, stored(name, stage).unwrap().1.clone()));
            }
            // The variance is checked relatively.
            let variance = &stored(name, "variance").unwrap().1;
            let relative = rows.iter().zip(variance).map(|(q, v)| q.variance() as f32 / v).collect();
            pairs.push(("variance".into(), relative, vec![1.0; variance.len()]));
        } else {
            // Logarithms of a class tree's small probabilities magnify rounding.
            let scale = if case["hierarchical"] == true { 0.5 } else { 1.0 };
            let scaled = |v: &[f32]| v.iter().map(|v| v * scale).collect();
            pairs.push(("logits".into(), scaled(&outputs), scaled(&stored(name, "logits").unwrap().1)));
        }
        let stages = ["col_block.", "col", "row_block.", "row", "icl_block.", "decoder"];
        for (full, (shape, expected)) in &golden.tensors {
            let Some(stage) = full.strip_prefix(&format!("__io.{name}.")) else { continue };
            if stages.iter().any(|s| if s.ends_with('.') { stage.starts_with(s) } else { stage == *s }) {
                let (found, values) = &got[stage];
                assert_eq!(found, shape, "{name} {stage}");
                pairs.push((stage.to_owned(), values.clone(), expected.clone()));
            }
        }
        let (apart, stage) = worst(&pairs);
        assert!(apart < TOLERANCE, "case {name}: {apart} at {stage}");
        compared += pairs.len();
    }
    compared
}

/// Checks served scores, from a context held ready, against the stored logits; gives the number of cases.
///
/// A prediction averages two labellings of the context. The second one's part is taken out by the forward pass that
/// `check` compares with the same files.
fn check_served(model: &Model, golden: &PublicFile) -> usize {
    let cases: Vec<Value> = serde_json::from_str(&golden.metadata["cases"]).unwrap();
    let mut compared = 0;
    for case in &cases {
        let size = |key: &str| usize::try_from(case[key].as_u64().unwrap()).unwrap();
        let (context, columns, classes, queries) = (size("n"), size("H"), size("K"), size("m"));
        if !(2..=model.config().max_classes).contains(&classes) {
            continue;
        }
        let name = case["name"].as_str().unwrap();
        let stored = |what: &str| golden.tensors[&format!("__io.{name}.{what}")].1.clone();
        let labels: Vec<usize> = stored("y").iter().map(|v| *v as usize).collect();
        let turned = |class: usize| (class + classes / 2) % classes;
        let second = Task {
            rows: context + queries,
            columns,
            context,
            values: stored("X"),
            targets: Targets::Classes { classes, labels: labels.iter().map(|l| turned(*l)).collect() },
        };
        let second = model.outputs(&second).unwrap();
        let values = stored("X");
        let keys: Vec<String> = (0..columns).map(|i| i.to_string()).collect();
        let table = |rows: usize, values: &[f32], labels: Vec<Option<u8>>| EncodedTable {
            rows,
            columns,
            values: values.to_vec(),
            labels,
            column_keys: keys.clone(),
            column_texts: keys.clone(),
        };
        let (first_rows, last_rows) = values.split_at(context * columns);
        let rows = table(context, first_rows, labels.iter().map(|l| Some(*l as u8)).collect());
        let asked = table(queries, last_rows, vec![None; queries]);
        for kind in [CacheKind::Kv, CacheKind::Repr] {
            let plan = Plan { classes, kind: Some(kind), ..Plan::default() };
            let held = Context::build_as(model, &rows, plan).unwrap();
            let scores = held.scores(&asked, None).unwrap();
            let first = scores.chunks_exact(classes).zip(second.chunks_exact(classes)).flat_map(
                |(average, second)| {
                    (0..classes).map(move |class| 2.0 * average[class] - second[turned(class)])
                },
            );
            let pair = (format!("{name} {kind:?}"), first.collect(), stored("logits"));
            let pairs = [pair];
            let (apart, stage) = worst(&pairs);
            assert!(apart < 2.0 * TOLERANCE, "case {stage}: {apart}");
        }
        compared += 1;
    }
    compared
}

#[test]
fn served_scores_match_the_public_package() {
    for bytes in [
        &include_bytes!("fixtures/v1_clf_tiny.safetensors")[..],
        &include_bytes!("fixtures/v2_clf_tiny.safetensors")[..],
    ] {
        let file = PublicFile::read(bytes).unwrap();
        assert!(check_served(&file.model(None).unwrap(), &file) >= 5);
    }
}

#[test]
fn first_classifier_matches_the_public_package() {
    let file = PublicFile::read(include_bytes!("fixtures/v1_clf_tiny.safetensors")).unwrap();
    assert_eq!(check(&file.model(None).unwrap(), &file), 7 * 8 + 6 * 3);
}

#[test]
fn second_classifier_matches_the_public_package() {
    let file = PublicFile::read(include_bytes!("fixtures/v2_clf_tiny.safetensors")).unwrap();
    assert_eq!(check(&file.model(None).unwrap(), &file), 6 * 12 + 7);
}

#[test]
fn regressor_matches_the_public_package() {
    let file = PublicFile::read(include_bytes!("fixtures/v2_reg_tiny.safetensors")).unwrap();
    assert_eq!(check(&file.model(None).unwrap(), &file), 5 * 15);
}

#[test]
fn checkpoint_gives_the_outputs_of_its_safetensors_form() {
    let golden = PublicFile::read(include_bytes!("fixtures/v2_clf_tiny.safetensors")).unwrap();
    let file = PublicFile::read(include_bytes!("fixtures/v2_clf_tiny.ckpt")).unwrap();
    assert_eq!(check(&file.model(None).unwrap(), &golden), 6 * 12 + 7);
}
