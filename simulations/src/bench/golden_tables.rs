//! Comparison of preprocessing and whole ensemble predictions with stored ones of the public package.

use std::path::Path;

use anyhow::{Context, anyhow, bail};
use serde::Deserialize;
use serde_json::{Map, Value};
use tabmesh_tfm::ensemble::{Ensemble, Labels, View};
use tabmesh_tfm::preprocess::{Column, Imputer, Norm, Normalisation};
use tabmesh_tfm::regression::Quantiles;

use super::golden::{CaseResult, Differences, read};

/// Compares the tables and predictions of a JSON file.
pub(super) fn compare(dir: &Path, name: &str) -> anyhow::Result<Vec<CaseResult>> {
    let file: File = serde_json::from_slice(&std::fs::read(dir.join(name))?)?;
    let mut results = Vec::new();
    for table in &file.preprocess {
        let differences = preprocess(table).with_context(|| format!("table {}", table.name))?;
        results.push(differences.result(name, format!("preprocess/{}", table.name)));
    }
    for case in &file.predict {
        let differences = predict(dir, case).with_context(|| format!("prediction {}", case.name))?;
        results.push(differences.result(name, format!("predict/{}", case.name)));
    }
    Ok(results)
}

#[derive(Debug, Deserialize)]
struct File {
    #[serde(default)]
    preprocess: Vec<Table>,
    #[serde(default)]
    predict: Vec<Prediction>,
}

/// One preprocessed table.
#[derive(Debug, Deserialize)]
struct Table {
    name: String,
    #[serde(rename = "X_train")]
    train: Value,
    #[serde(rename = "X_test")]
    test: Value,
    /// Columns of a typed table by kind, in the order of the outputs.
    #[serde(default)]
    output_columns: Vec<(String, Vec<String>)>,
    imputed_train: Vec<Vec<f64>>,
    imputed_test: Vec<Vec<f64>>,
    kept_columns: Vec<usize>,
    views: Map<String, Value>,
}

/// Fitted numbers and outputs of one normalisation.
#[derive(Debug, Deserialize)]
struct StoredView {
    scaler_mean: Vec<f64>,
    scaler_scale: Vec<f64>,
    lower_bounds: Vec<f64>,
    upper_bounds: Vec<f64>,
    train: Vec<Vec<f64>>,
    test: Vec<Vec<f64>>,
    #[serde(default)]
    lambdas: Vec<f64>,
    #[serde(default)]
    power_mean: Vec<f64>,
    #[serde(default)]
    power_scale: Vec<f64>,
}

fn preprocess(table: &Table) -> anyhow::Result<Differences> {
    let (train, test) =
        (columns(&table.train, &table.output_columns)?, columns(&table.test, &table.output_columns)?);
    let imputer = Imputer::fit(&train)?;
    let (train, test) = (imputer.apply(&train)?, imputer.apply(&test)?);
    let mut differences = Differences::default();
    relative(&mut differences, "imputed_train", train.values(), &table.imputed_train.concat());
    relative(&mut differences, "imputed_test", test.values(), &table.imputed_test.concat());
    let kept = train.varying();
    differences.flag("kept_columns", kept == table.kept_columns);
    let (train, test) = (train.select(&kept), test.select(&kept));
    for (name, view) in &table.views {
        let stored: StoredView =
            serde_json::from_value(view.clone()).with_context(|| format!("view {name}"))?;
        let fitted = Normalisation::fit(norm(name)?, &train)?;
        let mut check = |stage: &str, got: &[f64], expected: &[f64]| {
            relative(&mut differences, &format!("{name}.{stage}"), got, expected);
        };
        check("scaler_mean", &fitted.standard.mean, &stored.scaler_mean);
        check("scaler_scale", &fitted.standard.scale, &stored.scaler_scale);
        check("lower_bounds", &fitted.outliers.lower, &stored.lower_bounds);
        check("upper_bounds", &fitted.outliers.upper, &stored.upper_bounds);
        if let Some(power) = &fitted.power {
            check("lambdas", &power.lambdas, &stored.lambdas);
            check("power_mean", &power.mean, &stored.power_mean);
            check("power_scale", &power.scale, &stored.power_scale);
        }
        check("train", fitted.apply(&train)?.values(), &stored.train.concat());
        check("test", fitted.apply(&test)?.values(), &stored.test.concat());
    }
    Ok(differences)
}

/// One ensemble with its predictions.
#[derive(Debug, Deserialize)]
struct Prediction {
    name: String,
    weights: String,
    #[serde(rename = "X_train")]
    train: Value,
    y_train: Vec<Value>,
    #[serde(rename = "X_test")]
    test: Value,
    kept_columns: Vec<usize>,
    views: Vec<PredictionView>,
    #[serde(default)]
    classes: Vec<Value>,
    #[serde(default)]
    predict_proba: Vec<Vec<f64>>,
    #[serde(default)]
    predict: Vec<Value>,
    y_mean: Option<f64>,
    y_scale: Option<f64>,
    #[serde(default)]
    mean: Vec<f64>,
    #[serde(default)]
    median: Vec<f64>,
    #[serde(default)]
    alphas: Vec<f64>,
    #[serde(default)]
    quantiles: Vec<Vec<f64>>,
}

#[derive(Debug, Deserialize)]
struct PredictionView {
    norm_method: String,
    feature_perm: Vec<usize>,
    #[serde(default)]
    class_map: Vec<usize>,
    #[serde(default)]
    logits: Vec<Vec<f64>>,
    #[serde(default)]
    mean: Vec<f64>,
}

fn predict(dir: &Path, case: &Prediction) -> anyhow::Result<Differences> {
    if Path::new(&case.weights).components().count() != 1 {
        bail!("weights {:?} must be a file name", case.weights);
    }
    let model = read(dir, &case.weights)?.model(None)?;
    let (train, test) = (columns(&case.train, &[])?, columns(&case.test, &[])?);
    let labels = if model.config().regression() {
        let numbers: Option<Vec<f64>> = case.y_train.iter().map(Value::as_f64).collect();
        Labels::Numbers(numbers.context("a target is not a number")?)
    } else {
        let position = |label: &Value| case.classes.iter().position(|class| class == label);
        let labels: Option<Vec<usize>> = case.y_train.iter().map(position).collect();
        Labels::Classes { classes: case.classes.len(), labels: labels.context("a label is not a class")? }
    };
    let views = case
        .views
        .iter()
        .map(|view| {
            let (permutation, classes) = (view.feature_perm.clone(), view.class_map.clone());
            Ok(View { norm: norm(&view.norm_method)?, permutation, classes })
        })
        .collect::<anyhow::Result<Vec<View>>>()?;
    let ensemble = Ensemble::fit(&model, &train, labels, |_, _| Ok(views))?;
    let mut differences = Differences::default();
    differences.flag("kept_columns", ensemble.kept() == case.kept_columns);
    if let Some(scale) = ensemble.scale() {
        for (stage, got, expected) in
            [("y_mean", scale.mean, case.y_mean), ("y_scale", scale.deviation, case.y_scale)]
        {
            relative(
                &mut differences,
                stage,
                &[got],
                &[expected.with_context(|| format!("{stage} is missing"))?],
            );
        }
        for (i, (rows, view)) in ensemble.quantiles(&test)?.iter().zip(&case.views).enumerate() {
            let means: Vec<f64> = rows.iter().map(Quantiles::mean).collect();
            differences.compare(&format!("view {i} mean"), &means, &view.mean, 1.0);
        }
        let unit = 1.0 / scale.deviation;
        differences.compare("mean", &ensemble.numbers(&test, Quantiles::mean)?, &case.mean, unit);
        differences.compare("median", &ensemble.numbers(&test, |q| q.at(0.5))?, &case.median, unit);
        for (i, level) in case.alphas.iter().enumerate() {
            let stored: Vec<f64> = case.quantiles.iter().filter_map(|row| row.get(i).copied()).collect();
            let got = ensemble.numbers(&test, |q| q.at(*level))?;
            differences.compare(&format!("quantile {level}"), &got, &stored, unit);
        }
        return Ok(differences);
    }
    for (i, (scores, view)) in ensemble.outputs(&test)?.iter().zip(&case.views).enumerate() {
        let scores: Vec<f64> = scores.iter().map(|s| f64::from(*s)).collect();
        differences.compare(&format!("view {i} logits"), &scores, &view.logits.concat(), 1.0);
    }
    let probabilities = ensemble.probabilities(&test)?;
    differences.compare("predict_proba", &probabilities.concat(), &case.predict_proba.concat(), 1.0);
    let best: Vec<&Value> = probabilities
        .iter()
        .filter_map(|row| {
            let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1))?;
            case.classes.get(best.0)
        })
        .collect();
    if !case.predict.is_empty() {
        differences.flag("predict", best.iter().copied().eq(&case.predict));
    }
    Ok(differences)
}

/// Differences relative to values above 1.
fn relative(differences: &mut Differences, stage: &str, got: &[f64], expected: &[f64]) {
    let unit = |v: &f64| v.abs().max(1.0);
    let scaled = |values: &[f64]| -> Vec<f64> {
        values
            .iter()
            .zip(expected.iter().map(unit).chain(std::iter::repeat(1.0)))
            .map(|(v, u)| v / u)
            .collect()
    };
    differences.compare(stage, &scaled(got), &scaled(expected), 1.0);
}

fn norm(name: &str) -> anyhow::Result<Norm> {
    match name {
        "none" => Ok(Norm::None),
        "power" => Ok(Norm::Power),
        other => bail!("normalisation {other:?} is unknown"),
    }
}

/// Columns of a table: rows of numbers, or named columns of the kinds that `order` gives.
fn columns(table: &Value, order: &[(String, Vec<String>)]) -> anyhow::Result<Vec<Column>> {
    match table {
        Value::Array(rows) => {
            let rows: Vec<Vec<Option<f64>>> =
                rows.iter().map(|row| serde_json::from_value(row.clone())).collect::<Result<_, _>>()?;
            let width = rows.first().map_or(0, Vec::len);
            if rows.iter().any(|row| row.len() != width) {
                bail!("rows of a table have different lengths");
            }
            Ok((0..width)
                .map(|c| Column::Numeric(rows.iter().map(|row| row.get(c).copied().flatten()).collect()))
                .collect())
        }
        Value::Object(named) => {
            let mut columns = Vec::new();
            for (kind, names) in order {
                for name in names {
                    let cells = named.get(name).and_then(Value::as_array);
                    let cells = cells.with_context(|| format!("column {name} is missing"))?;
                    columns.push(match kind.as_str() {
                        "categorical" => Column::Category(cells.iter().map(category).collect()),
                        "continuous" => Column::Numeric(cells.iter().map(Value::as_f64).collect()),
                        other => bail!("column kind {other:?} is unknown"),
                    });
                }
            }
            Ok(columns)
        }
        _ => Err(anyhow!("a table is neither rows nor columns")),
    }
}

/// A category as a text that sorts as the value does.
fn category(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => number.as_f64().map(|v| {
            let bits = v.to_bits();
            // Flipping makes the order of bits the order of numbers.
            let ordered = if v.is_sign_negative() { !bits } else { bits | (1 << 63) };
            format!("{ordered:016x}")
        }),
        other => Some(other.to_string()),
    }
}
