//! `sweep`: a scenario under every combination of values for some of its keys, in one queue.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::data::Data;
use super::document::Scenario;
use super::results::RunFolder;
use super::run::{How, execute, prepare};

/// How a scenario is varied.
#[derive(Debug, Clone, clap::Args)]
pub struct SweepArgs {
    /// The scenario (YAML).
    pub scenario: PathBuf,
    /// A key and its values, `KEY=V1;V2;...`; the key is a path of names, with list items by number or by their `name`
    /// (`federations.fedavg.rounds=5;10`, `partition.alpha=0.1;1`). A value is YAML. Several `--set` combine.
    #[arg(long = "set", value_name = "KEY=V1;V2", required = true)]
    pub sets: Vec<String>,
    /// Folder of the variants' runs. Default: `runs/NAME-sweep`.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Tables, part, tasks at a time.
    #[command(flatten)]
    pub how: How,
}

/// One combination.
#[derive(Debug, Clone, PartialEq)]
struct Variant {
    name: String,
    document: Value,
}

/// Runs all variants; gives their folders. The means of all stand in one table, `sweep.csv`, a line a mean with the variant
/// before it.
///
/// # Errors
/// A key or value that a variant's scenario refuses, or what [`super::run::run`] refuses.
pub fn sweep(args: &SweepArgs) -> Result<Vec<RunFolder>> {
    let (scenario, text) = Scenario::load(&args.scenario)?;
    let base = args.scenario.parent().unwrap_or_else(|| Path::new(".")).to_owned();
    let document: Value = serde_saphyr::from_str(&text).context("the scenario as a tree")?;
    let variants = variants(&document, &args.sets)?;
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("{}-sweep", scenario.name)));
    let (mut runs, mut names) = (Vec::new(), Vec::new());
    let mut first = 0;
    for variant in variants {
        names.push(variant.name.clone());
        let text = serde_json::to_string_pretty(&variant.document)?;
        let scenario = Scenario::parse(&text, &variant.name)?;
        let data = Arc::new(Data::open(&scenario.data, &base, args.how.data.as_deref())?);
        let folder = out.join(&variant.name);
        runs.push(prepare(&folder, scenario, &text, data, &base, &args.how, &mut first)?);
    }
    let folders = execute(runs, args.how.jobs)?;
    let mut table = String::new();
    for (name, folder) in names.iter().zip(&folders) {
        let path = folder.summary_path();
        let means = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        for (at, line) in means.lines().enumerate() {
            match (at, table.is_empty()) {
                (0, true) => table.push_str(&format!("variant,{line}\n")),
                (0, false) => {}
                _ => table.push_str(&format!("{name},{line}\n")),
            }
        }
    }
    super::results::write(&out.join(TABLE), table.as_bytes())?;
    Ok(folders)
}

/// Every combination of the values, the last key changing fastest.
fn variants(document: &Value, sets: &[String]) -> Result<Vec<Variant>> {
    let mut all = vec![Variant { name: String::new(), document: document.clone() }];
    for set in sets {
        let (key, values) =
            set.split_once('=').with_context(|| format!("--set {set}: expected KEY=V1;V2"))?;
        let values: Vec<&str> = values.split(';').map(str::trim).collect();
        ensure!(values.iter().all(|v| !v.is_empty()), "--set {set}: an empty value");
        let short = key.rsplit('.').next().unwrap_or(key);
        let mut next = Vec::new();
        for variant in &all {
            for value in &values {
                let parsed: Value =
                    serde_saphyr::from_str(value).with_context(|| format!("--set {set}: {value}"))?;
                let mut document = variant.document.clone();
                *place(&mut document, key)? = parsed;
                let shown = format!("{short}={}", shown(value));
                // A comma parts folders on other command lines.
                let gap = if variant.name.is_empty() { "" } else { "+" };
                next.push(Variant { name: format!("{}{gap}{shown}", variant.name), document });
            }
        }
        ensure!(next.len() <= MAX_VARIANTS, "at most {MAX_VARIANTS} variants, got {}", next.len());
        all = next;
    }
    let names: std::collections::BTreeSet<&String> = all.iter().map(|variant| &variant.name).collect();
    ensure!(names.len() == all.len(), "two variants have one name: values must differ in letters and digits");
    Ok(all)
}

/// A value as a part of a folder's name: letters, digits, dots and underscores, runs of others as one dash.
fn shown(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
    let parts: Vec<&str> = value.split(|c| !plain(c)).filter(|part| !part.is_empty()).collect();
    let sign = if value.starts_with('-') { "-" } else { "" };
    if parts.is_empty() { "empty".to_owned() } else { format!("{sign}{}", parts.join("-")) }
}

/// The place of a key in a document, made if it is missing.
fn place<'a>(document: &'a mut Value, key: &str) -> Result<&'a mut Value> {
    let mut at = document;
    for part in key.split('.') {
        at = match at {
            Value::Array(items) => {
                let named =
                    items.iter().position(|item| item.get("name").and_then(Value::as_str) == Some(part));
                let index = named.or_else(|| part.parse().ok());
                let known = items.len();
                index
                    .and_then(|i: usize| items.get_mut(i))
                    .with_context(|| format!("{key}: no item {part} among {known}"))?
            }
            Value::Object(entries) => entries.entry(part.to_owned()).or_insert(Value::Null),
            Value::Null => {
                *at = Value::Object(serde_json::Map::new());
                let Value::Object(entries) = at else { bail!("{key}: not a map") };
                entries.entry(part.to_owned()).or_insert(Value::Null)
            }
            _ => bail!("{key}: {part} is below a value that has no keys"),
        };
    }
    Ok(at)
}

/// Most variants of one sweep.
const MAX_VARIANTS: usize = 1000;

/// Means of all variants, in the folder of the sweep.
const TABLE: &str = "sweep.csv";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_combined_and_set_by_path_number_or_name() {
        let document = json!({"seeds": 1, "federations": [{"name": "a", "rounds": 1}, {"name": "b"}]});
        let sets = ["federations.b.rounds=5;10".to_owned(), "federations.0.privacy.epsilon=1;8".to_owned()];
        let all = variants(&document, &sets).unwrap();
        let names: Vec<&str> = all.iter().map(|variant| variant.name.as_str()).collect();
        let expected =
            ["rounds=5+epsilon=1", "rounds=5+epsilon=8", "rounds=10+epsilon=1", "rounds=10+epsilon=8"];
        assert_eq!(names, expected);
        assert_eq!(all[3].document["federations"][1]["rounds"], 10);
        assert_eq!(all[3].document["federations"][0]["privacy"]["epsilon"], 8);
        assert_eq!(all[3].document["federations"][0]["rounds"], 1);
    }

    #[test]
    fn values_are_shown_as_names_of_folders() {
        for (value, name) in [
            ("{kind: sgd, learning_rate: 0.5}", "kind-sgd-learning_rate-0.5"),
            ("-8", "-8"),
            ("[]", "empty"),
            ("../x", "..-x"),
        ] {
            assert_eq!(shown(value), name);
        }
    }

    #[test]
    fn keys_without_a_place_and_values_alike_are_refused() {
        let document = json!({"seeds": 1, "federations": [{"name": "a"}]});
        for bad in ["seeds", "seeds.x=1", "federations.z.rounds=1", "seeds=1;;2", "seeds=1;1"] {
            assert!(variants(&document, &[bad.to_owned()]).is_err(), "{bad}");
        }
    }
}
