//! Preprocessing and ensemble predictions against the public package.
//!
//! `preprocess.json` holds made-up tables, fitted numbers and outputs of PyPI tabicl 2.2.0 with scikit-learn 1.9.1 and
//! scipy 1.17.1, and predictions of ensembles on the random weights of the other fixtures. Tolerances: exponents 1e-5,
//! columns and logits 1e-4, probabilities 5e-5, numbers 1e-3 at targets of about 100.

#![allow(clippy::unwrap_used, reason = "tests")]

use serde_json::Value;
use tabmesh_tfm::{
    Model,
    ensemble::{Ensemble, Labels, View},
    import::PublicFile,
    preprocess::{Column, Imputer, Norm, Normalisation},
    regression::Quantiles,
};

fn golden() -> Value {
    serde_json::from_slice(include_bytes!("fixtures/preprocess.json")).unwrap()
}

fn model(name: &str) -> Model {
    let bytes: &[u8] = match name {
        "v1_clf" => include_bytes!("fixtures/v1_clf_tiny.safetensors"),
        "v2_clf" => include_bytes!("fixtures/v2_clf_tiny.safetensors"),
        _ => include_bytes!("fixtures/v2_reg_tiny.safetensors"),
    };
    PublicFile::read(bytes).unwrap().model(None).unwrap()
}

fn indices(value: &Value) -> Vec<usize> {
    value.as_array().map_or(Vec::new(), |v| v.iter().map(|i| i.as_u64().unwrap() as usize).collect())
}

/// Numbers of nested lists, end to end.
fn flat(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(members) => members.iter().flat_map(flat).collect(),
        number => vec![number.as_f64().unwrap()],
    }
}

fn columns(rows: &Value) -> Vec<Column> {
    let rows = rows.as_array().unwrap();
    let width = rows[0].as_array().unwrap().len();
    (0..width).map(|c| Column::Numeric(rows.iter().map(|row| row[c].as_f64()).collect())).collect()
}

fn norm(name: &Value) -> Norm {
    if name == "power" { Norm::Power } else { Norm::None }
}

fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (a, b) in got.iter().zip(expected) {
        assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{what}: {a} instead of {b}");
    }
}

#[test]
fn columns_are_preprocessed_as_the_package_does() {
    let golden = golden();
    let mut views = 0;
    for table in golden["preprocess"].as_array().unwrap().iter().filter(|t| t["X_train"].is_array()) {
        let name = &table["name"];
        let (train, test) = (columns(&table["X_train"]), columns(&table["X_test"]));
        let imputer = Imputer::fit(&train).unwrap();
        let (train, test) = (imputer.apply(&train).unwrap(), imputer.apply(&test).unwrap());
        assert_close("imputed", train.values(), &flat(&table["imputed_train"]), 1e-9);
        assert_close("imputed", test.values(), &flat(&table["imputed_test"]), 1e-9);
        let kept = train.varying();
        assert_eq!(kept, indices(&table["kept_columns"]), "{name}");
        let (train, test) = (train.select(&kept), test.select(&kept));
        for (method, stored) in table["views"].as_object().unwrap() {
            let what = format!("{name} {method}");
            let fitted = Normalisation::fit(norm(&Value::from(method.as_str())), &train).unwrap();
            if let Some(power) = &fitted.power {
                assert_close(&what, &power.lambdas, &flat(&stored["lambdas"]), 1e-5);
            }
            assert_close(&what, &fitted.standard.mean, &flat(&stored["scaler_mean"]), 1e-9);
            assert_close(&what, &fitted.outliers.upper, &flat(&stored["upper_bounds"]), 1e-4);
            assert_close(&what, fitted.apply(&train).unwrap().values(), &flat(&stored["train"]), 1e-4);
            assert_close(&what, fitted.apply(&test).unwrap().values(), &flat(&stored["test"]), 1e-4);
            views += 1;
        }
    }
    assert_eq!(views, 6);
}

#[test]
fn ensembles_predict_as_the_package_does() {
    let golden = golden();
    for case in golden["predict"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let (train, test) = (columns(&case["X_train"]), columns(&case["X_test"]));
        let y = case["y_train"].as_array().unwrap();
        let labels = match case["classes"].as_array() {
            Some(classes) => Labels::Classes {
                classes: classes.len(),
                labels: y.iter().map(|y| classes.iter().position(|c| c == y).unwrap()).collect(),
            },
            None => Labels::Numbers(flat(&case["y_train"])),
        };
        let stored = case["views"].as_array().unwrap();
        let views = stored.iter().map(|view| View {
            norm: norm(&view["norm_method"]),
            permutation: indices(&view["feature_perm"]),
            classes: indices(&view["class_map"]),
        });
        let ensemble = Ensemble::fit(&model(name), &train, labels, |_, _| Ok(views.collect())).unwrap();
        assert_eq!(ensemble.kept(), indices(&case["kept_columns"]));
        if ensemble.scale().is_some() {
            let means = ensemble.numbers(&test, Quantiles::mean).unwrap();
            assert_close(name, &means, &flat(&case["mean"]), 1e-5);
            let medians = ensemble.numbers(&test, |q| q.at(0.5)).unwrap();
            assert_close(name, &medians, &flat(&case["median"]), 1e-5);
        } else {
            for (scores, view) in ensemble.outputs(&test).unwrap().iter().zip(stored) {
                let scores: Vec<f64> = scores.iter().map(|s| f64::from(*s)).collect();
                let differences = scores.iter().zip(flat(&view["logits"])).map(|(a, b)| (a - b).abs());
                assert!(differences.fold(0.0, f64::max) < 1e-4, "{name}");
            }
            let probabilities = ensemble.probabilities(&test).unwrap().concat();
            assert_close(name, &probabilities, &flat(&case["predict_proba"]), 5e-5);
        }
    }
}
