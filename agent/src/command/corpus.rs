//! `tabmesh-agent corpus`: the published synthetic rows as a file for any tool, with their Croissant card.
//!
//! The corpus is differentially private as it was published; writing it out is post-processing and costs nothing.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anstream::println;
use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use miette::{IntoDiagnostic, WrapErr, miette};
use tabmesh_contract::batch::{TypedBatch, TypedColumn, other_code};
use tabmesh_contract::card::{DatasetFacts, croissant};
use tabmesh_contract::schema::{FeatureKind, FeatureSchema};
use tabmesh_federation::id::Digest;
use tabmesh_federation::manifest::{Manifest, Taint};

use crate::Local;
use crate::cli::Output;

/// Writes `corpus.csv` and `croissant.json` of the current publication into a folder.
pub(crate) fn run(
    agent: &Local,
    folder: &Path,
    licence: Option<&str>,
    output: Output,
) -> miette::Result<ExitCode> {
    let Some((_, manifest)) = agent.artefacts.current().into_diagnostic()? else {
        return Err(miette!(
            help = "run the agent until the coordinator has published",
            "nothing has been published yet"
        ));
    };
    let corpus = agent.artefacts.corpus(&manifest.corpus, &manifest.schema).into_diagnostic()?;
    let csv = as_csv(&corpus, &manifest.schema)?;
    let card = card(&manifest, &corpus, &csv, licence)?;
    std::fs::create_dir_all(folder).into_diagnostic().wrap_err_with(|| folder.display().to_string())?;
    let (rows, described) = (folder.join(FILE), folder.join("croissant.json"));
    let text = serde_json::to_vec_pretty(&card).into_diagnostic()?;
    for (path, bytes) in [(&rows, &csv), (&described, &text)] {
        crate::files::replace(path, bytes).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
    }
    match output {
        Output::Json => println!(
            "{}",
            serde_json::json!({ "rows": corpus.rows(), "file": rows, "card": described, "corpus": manifest.corpus })
        ),
        Output::Text => {
            println!("{} synthetic rows in {}", corpus.rows(), rows.display());
            println!("their Croissant card in {}", described.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Features under their canonical ids in the schema's order, then the target; what is missing is an empty cell.
fn as_csv(corpus: &TypedBatch, schema: &FeatureSchema) -> miette::Result<Vec<u8>> {
    let (mut fields, mut columns): (Vec<Field>, Vec<ArrayRef>) = (Vec::new(), Vec::new());
    for (feature, column) in schema.features().iter().zip(&corpus.columns) {
        let (kind, array): (DataType, ArrayRef) = match (column, &feature.kind) {
            (TypedColumn::Numeric(values), _) => {
                let cells = values.iter().map(|v| (!v.is_nan()).then_some(*v));
                (DataType::Float64, Arc::new(cells.collect::<Float64Array>()))
            }
            (TypedColumn::Categorical(codes), kind) => {
                let levels = match kind {
                    FeatureKind::Categorical { levels } => levels.as_slice(),
                    FeatureKind::Numeric(_) => &[],
                };
                let name = |code: &u32| match levels.get(*code as usize) {
                    Some(level) => Some(level.as_str()),
                    None if *code == other_code(levels.len()) => Some(OTHER),
                    None => None,
                };
                (DataType::Utf8, Arc::new(codes.iter().map(name).collect::<StringArray>()))
            }
        };
        fields.push(Field::new(feature.id.as_str(), kind, true));
        columns.push(array);
    }
    let target = schema.target();
    let class = |label: &Option<u16>| label.and_then(|label| target.classes.get(usize::from(label)));
    fields.push(Field::new(target.id.as_str(), DataType::Utf8, true));
    columns.push(Arc::new(corpus.labels.iter().map(class).collect::<StringArray>()));
    let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).into_diagnostic()?;
    let mut bytes = Vec::new();
    arrow_csv::Writer::new(&mut bytes).write(&batch).into_diagnostic()?;
    Ok(bytes)
}

fn card(
    manifest: &Manifest,
    corpus: &TypedBatch,
    csv: &[u8],
    licence: Option<&str>,
) -> miette::Result<serde_json::Value> {
    let target = &manifest.schema.target().id;
    let privacy = &manifest.privacy;
    let noise = match manifest.taint {
        Taint::Private => "",
        Taint::ReproducibleNotPrivate => {
            " The noise came from a fixed seed: REPRODUCIBLE, NOT PRIVATE; the guarantee does not hold."
        }
    };
    let published = time::OffsetDateTime::from_unix_timestamp(manifest.created_ms.div_euclid(1000))
        .into_diagnostic()?
        .date()
        .to_string();
    Ok(croissant(&DatasetFacts {
        name: &format!("tabmesh-corpus-{target}"),
        description: &format!(
            "{} synthetic rows for {target}, drawn from noisy low-order marginal counts of {} domains (plan {}).",
            corpus.rows(),
            privacy.agents,
            manifest.plan
        ),
        licence,
        version: "1.0.0",
        published: &published,
        file: FILE,
        file_bytes: csv.len() as u64,
        file_sha256: &Digest::of(csv).to_string(),
        schema: &manifest.schema,
        collection: &format!(
            "Synthetic. A tree-structured model was fitted to marginal counts with discrete Gaussian noise. The plan that \
             paid for them stands under differential privacy with epsilon {} and delta {} for one unit of each domain's \
             data product, adjacency add or remove one unit, over its release and rounds together.{noise}",
            privacy.epsilon, privacy.delta
        ),
        limitations: "No row is a person's. Dependencies beyond the released pairs and triples are not there, rare levels \
                      are merged or noisy, values within a bin are uniform, and label rates are those of all domains \
                      together.",
        uses: "Context rows and training rows for models of the mesh; examples for those who have no table of their own. \
               Not for statistics about any domain or group.",
    }))
}

const FILE: &str = "corpus.csv";
/// A value outside the declared levels.
const OTHER: &str = "(other)";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use tabmesh_contract::schema::{Feature, FeatureId, NumericDomain, Scale, Target};

    #[test]
    fn cells_are_numbers_levels_other_or_empty() {
        let id = |text: &str| FeatureId::new(text).unwrap();
        let number = NumericDomain { lower: 0.0, upper: 9.0, scale: Scale::Linear, cut_points: None };
        let kinds = [
            ("a", FeatureKind::Numeric(number)),
            ("b", FeatureKind::Categorical { levels: vec!["x, y".into(), "z".into()] }),
        ];
        let features = kinds
            .into_iter()
            .map(|(name, kind)| Feature { id: id(name), kind, unit: None, description: None })
            .collect();
        let target = Target { id: id("t"), classes: vec!["no".into(), "yes".into()] };
        let schema = FeatureSchema::new(features, target).unwrap();
        let rows = TypedBatch {
            columns: vec![
                TypedColumn::Numeric(vec![1.5, f64::NAN, 3.0, 4.0]),
                TypedColumn::Categorical(vec![0, 1, 2, 3]),
            ],
            labels: vec![Some(0), Some(1), None, Some(1)],
            units: vec![[0; 16]; 4],
        };
        let text = String::from_utf8(as_csv(&rows, &schema).unwrap()).unwrap();
        assert_eq!(text, "a,b,t\n1.5,\"x, y\",no\n,z,yes\n3.0,(other),\n4.0,,yes\n");
    }
}
