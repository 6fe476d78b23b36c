//! Comparison of the model with stored activations of the public package, file by file, case by case.
//!
//! Every size comes from the files. A case is compared stage by stage; what is stored but unknown is left out of the
//! count, what is known but stored in another shape fails the case.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anstream::println;
use anyhow::{Context, anyhow, bail};
use serde::{Deserialize, Serialize};
use tabmesh_tfm::import::{ACTIVATION_PREFIX, Container, PublicFile};
use tabmesh_tfm::model::forward::SOFTMAX_TEMPERATURE;
use tabmesh_tfm::model::many::radix_bases;
use tabmesh_tfm::regression::Quantiles;
use tabmesh_tfm::{Model, Targets, Task};

use super::golden_tables;
use crate::cli::Output;

/// Result of one case of one file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseResult {
    /// File name.
    pub file: String,
    /// Case name; `preprocess/<table>` or `predict/<name>` for tables.
    pub case: String,
    /// Largest difference; infinite differences and other shapes are the largest double.
    pub max_abs_diff: f64,
    /// The stage it is at.
    pub stage: String,
    /// Stages compared.
    pub compared: usize,
}

/// Results of a folder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GoldenReport {
    /// One entry per file and case.
    pub cases: Vec<CaseResult>,
}

impl GoldenReport {
    /// Whether every difference is within [`TOLERANCE`].
    #[must_use]
    pub fn passed(&self) -> bool {
        self.cases.iter().all(|case| case.max_abs_diff <= TOLERANCE)
    }
}

/// Compares a folder and prints the result.
///
/// # Errors
/// As [`compare`].
pub fn run(dir: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let report = compare(dir)?;
    match output {
        Output::Json => println!("{}", serde_json::to_string(&report)?),
        Output::Text => {
            for case in &report.cases {
                let CaseResult { file, case, max_abs_diff, stage, compared } = case;
                let mark = if *max_abs_diff <= TOLERANCE { "ok" } else { "DIFFERS" };
                println!(
                    "{file:<28} {case:<20} {max_abs_diff:<10.2e} {mark:<8} {compared:>3} stages, {stage}"
                );
            }
        }
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Compares every golden file of a folder.
///
/// # Errors
/// A file that can't be read, or a folder without any, named.
pub fn compare(dir: &Path) -> anyhow::Result<GoldenReport> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.with_context(|| format!("reading {}", dir.display()))?.file_name();
        names.push(name.into_string().map_err(|name| anyhow!("file name {} is not text", name.display()))?);
    }
    names.sort();
    let mut cases = Vec::new();
    for name in &names {
        let extension = Path::new(name).extension().and_then(|e| e.to_str()).unwrap_or_default();
        let results = match extension {
            "safetensors" => model_file(dir, name, name),
            "ckpt" | "pt" | "pth" => {
                let golden = Path::new(name).with_extension("safetensors");
                model_file(dir, name, &golden.to_string_lossy())
            }
            "json" => golden_tables::compare(dir, name),
            _ => continue,
        };
        cases.extend(results.with_context(|| dir.join(name).display().to_string())?);
    }
    if cases.is_empty() {
        bail!("{} holds no golden file", dir.display());
    }
    Ok(GoldenReport { cases })
}

/// A file of the public package's layout.
pub(super) fn read(dir: &Path, name: &str) -> anyhow::Result<PublicFile> {
    let path = dir.join(name);
    let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    PublicFile::read(&bytes).with_context(|| path.display().to_string())
}

/// Checks the weights of `name` against the cases of `golden`.
fn model_file(dir: &Path, name: &str, golden: &str) -> anyhow::Result<Vec<CaseResult>> {
    let weights = read(dir, name)?;
    let golden = if weights.container == Container::Torch { read(dir, golden)? } else { weights.clone() };
    let model = weights.model(None)?;
    let cases = golden.metadata.get("cases").context("metadata entry \"cases\" is missing")?;
    let cases: Vec<Case> = serde_json::from_str(cases).context("metadata entry \"cases\"")?;
    let alphas: Vec<f64> = match golden.metadata.get("alphas") {
        Some(text) => serde_json::from_str(text).context("metadata entry \"alphas\"")?,
        None => Vec::new(),
    };
    cases
        .iter()
        .map(|case| {
            let mut differences =
                check(&model, &golden, case, &alphas).with_context(|| format!("case {}", case.name))?;
            if let Some(stored) = &case.mixed_radix_bases {
                let bases = radix_bases(case.classes, model.config().max_classes);
                differences.flag("mixed_radix_bases", *stored == bases);
            }
            Ok(differences.result(name, case.name.clone()))
        })
        .collect()
}

/// A case's description in a file's metadata.
#[derive(Debug, Deserialize)]
struct Case {
    name: String,
    #[serde(rename = "n")]
    context: usize,
    #[serde(rename = "m")]
    queries: usize,
    #[serde(rename = "H")]
    columns: usize,
    #[serde(rename = "K")]
    classes: usize,
    #[serde(default)]
    mixed_radix_bases: Option<Vec<usize>>,
}

/// Runs one case and compares what is stored of it.
fn check(model: &Model, golden: &PublicFile, case: &Case, alphas: &[f64]) -> anyhow::Result<Differences> {
    let prefix = format!("{ACTIVATION_PREFIX}{}.", case.name);
    let stored = |stage: &str| {
        let name = format!("{prefix}{stage}");
        golden
            .tensors
            .get(&name)
            .map(|(_, values)| values)
            .with_context(|| format!("tensor {name} is missing"))
    };
    let y = stored("y")?;
    let regression = model.config().regression();
    let targets = if regression {
        Targets::Values(y.clone())
    } else {
        let labels = y.iter().map(|v| *v as usize).collect();
        Targets::Classes { classes: case.classes, labels }
    };
    let rows = case.context.checked_add(case.queries).context("too many rows")?;
    let values = stored("X")?.clone();
    let task = Task { rows, columns: case.columns, context: case.context, values, targets };

    let mut got: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    let outputs = model.observed_outputs(&task, &mut |stage, shape, values| {
        got.insert(stage.to_owned(), (shape.to_vec(), values));
    })?;
    let width = outputs.len() / case.queries.max(1);
    let mut add = |stage: &str, width: usize, values: Vec<f32>| {
        let shape = if width == 0 { vec![case.queries] } else { vec![case.queries, width] };
        got.insert(stage.to_owned(), (shape, values));
    };
    let mut differences = Differences::default();
    if regression {
        let rows = Quantiles::rows(outputs.clone(), width)?;
        add("raw_quantiles", width, outputs.clone());
        add("quantiles", width, rows.iter().flat_map(|q| q.values().to_vec()).collect());
        add("mean", 0, rows.iter().map(|q| q.mean() as f32).collect());
        add("median", 0, rows.iter().map(|q| q.at(0.5) as f32).collect());
        let levels = rows.iter().flat_map(|q| alphas.iter().map(|a| q.at(*a) as f32));
        add("quantiles_at_alphas", alphas.len(), levels.collect());
        if let Ok(variance) = stored("variance") {
            let relative: Vec<f32> =
                rows.iter().zip(variance).map(|(q, v)| q.variance() as f32 / v).collect();
            differences.compare("variance", &relative, &vec![1.0; variance.len()], 1.0);
        }
    } else {
        add("logits", width, outputs.clone());
        add("probs", width, outputs.chunks_exact(width.max(1)).flat_map(probabilities).collect());
    }
    // The path that serves computes less than the observed one.
    differences.compare("outputs", &model.outputs(&task)?, &outputs, 1.0);
    let tree = !regression && case.classes > model.config().max_classes;
    for (name, (shape, expected)) in &golden.tensors {
        let Some(stage) = name.strip_prefix(&prefix) else { continue };
        let Some((found, values)) = got.get(stage) else { continue };
        if found != shape {
            bail!("stage {stage} has shape {found:?}, stored is {shape:?}");
        }
        let scale = if tree && stage == "logits" { 0.5 } else { 1.0 };
        differences.compare(stage, values, expected, scale);
    }
    Ok(differences)
}

/// Softmax at the published temperature.
fn probabilities(scores: &[f32]) -> Vec<f32> {
    let temperature = f64::from(SOFTMAX_TEMPERATURE);
    let peak = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = scores.iter().map(|s| (f64::from(s - peak) / temperature).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|p| (p / sum) as f32).collect()
}

/// The largest difference seen and where.
#[derive(Debug, Default)]
pub(super) struct Differences {
    largest: f64,
    stage: String,
    compared: usize,
}

impl Differences {
    /// Compares values, differences multiplied by `scale`. Another number of values is the largest difference.
    pub(super) fn compare<T: Copy + Into<f64>>(
        &mut self,
        stage: &str,
        got: &[T],
        expected: &[T],
        scale: f64,
    ) {
        self.compared += 1;
        if got.len() != expected.len() {
            self.keep(stage, f64::MAX);
        }
        for (a, b) in got.iter().zip(expected) {
            let apart = ((*a).into() - (*b).into()).abs() * scale;
            self.keep(stage, if apart.is_finite() { apart } else { f64::MAX });
        }
    }

    /// Counts a comparison that holds or doesn't.
    pub(super) fn flag(&mut self, stage: &str, holds: bool) {
        self.compared += 1;
        self.keep(stage, if holds { 0.0 } else { f64::MAX });
    }

    fn keep(&mut self, stage: &str, apart: f64) {
        if apart > self.largest || self.stage.is_empty() {
            self.largest = apart;
            stage.clone_into(&mut self.stage);
        }
    }

    /// The result of a case.
    pub(super) fn result(self, file: &str, case: String) -> CaseResult {
        let Self { largest, stage, compared } = self;
        CaseResult { file: file.to_owned(), case, max_abs_diff: largest, stage, compared }
    }
}

/// Largest difference that passes.
pub const TOLERANCE: f64 = 1e-4;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::path::PathBuf;

    use super::{Differences, compare};

    fn fixtures() -> PathBuf {
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/tfm/tests/fixtures"))
    }

    /// Seven cases of each classifier and of the checkpoint, five of the regressor, four tables, three ensembles.
    #[test]
    fn every_case_of_the_fixtures_passes() {
        let report = compare(&fixtures()).unwrap();
        assert_eq!(report.cases.len(), 7 + 7 + 7 + 5 + 4 + 3);
        assert!(report.passed(), "{:?}", report.cases);
        assert!(report.cases.iter().all(|case| case.compared >= 6));
        let tree = report.cases.iter().find(|case| case.case == "many13").unwrap();
        assert!(tree.max_abs_diff > 0.0);
    }

    #[test]
    fn a_changed_weight_fails_and_a_broken_file_is_named() {
        let name = "v1_clf_tiny.safetensors";
        let dir = tempfile::tempdir().unwrap();
        assert!(compare(dir.path()).unwrap_err().to_string().contains("no golden file"));
        let mut bytes = std::fs::read(fixtures().join(name)).unwrap();
        // The last value of the file is a rotary frequency.
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&1f32.to_le_bytes());
        std::fs::write(dir.path().join(name), &bytes).unwrap();
        assert!(!compare(dir.path()).unwrap().passed());
        std::fs::write(dir.path().join(name), &bytes[..end - 1]).unwrap();
        assert!(format!("{:?}", compare(dir.path()).unwrap_err()).contains(name));
        // A checkpoint needs the cases of its safetensors form.
        std::fs::remove_file(dir.path().join(name)).unwrap();
        std::fs::copy(fixtures().join("v2_clf_tiny.ckpt"), dir.path().join("alone.ckpt")).unwrap();
        assert!(format!("{:?}", compare(dir.path()).unwrap_err()).contains("alone.safetensors"));
    }

    #[test]
    fn what_is_not_a_number_or_has_another_length_never_passes() {
        for got in [vec![f64::NAN], vec![], vec![f64::INFINITY]] {
            let mut differences = Differences::default();
            differences.compare("stage", &got, &[1.0], 1.0);
            assert_eq!(differences.result("file", "case".into()).max_abs_diff.to_bits(), f64::MAX.to_bits());
        }
    }
}
