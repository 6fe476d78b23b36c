//! `tabmesh-agent predict`: a Parquet file of rows in, a Parquet file of probabilities out.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use indicatif::{ProgressBar, ProgressStyle};
use miette::{IntoDiagnostic, WrapErr, miette};
use parquet::arrow::ArrowWriter;
use tabmesh_contract::contract::{Contract, Role, SourceKind, SourceSpec};

use crate::Local;
use crate::serve::Predictor;
use crate::source::{self, DomainKey, View};

/// Predicts every row of `input`, in order. The output is written beside and renamed: whole or not at all.
pub(crate) fn run(agent: &Local, input: &Path, output: &Path) -> miette::Result<ExitCode> {
    if !agent.serving.restore().into_diagnostic()? {
        return Err(miette!(
            help = "run the agent until the coordinator has published",
            "no model has been promoted yet"
        ));
    }
    let domain = &agent.domain;
    let contract = for_prediction(&domain.contract);
    let spec = SourceSpec { kind: SourceKind::Parquet, path: input.display().to_string(), delimiter: None };
    let source = source::open(&spec, Path::new("."));
    let schema = &domain.schema;
    let key = DomainKey::new(&domain.secret("units"));
    let view = View::unlabelled(&*source, &contract, schema, key).into_diagnostic()?;
    let classes = &schema.target().classes;
    let mut fields = vec![Field::new("label", DataType::Utf8, false)];
    fields.extend(
        classes.iter().map(|class| Field::new(format!("probability_{class}"), DataType::Float32, false)),
    );
    let written = Arc::new(Schema::new(fields));
    let beside = output.with_extension("writing");
    let file = File::create(&beside).into_diagnostic().wrap_err_with(|| beside.display().to_string())?;
    let mut writer = ArrowWriter::try_new(file, Arc::clone(&written), None).into_diagnostic()?;
    let bar = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("{spinner} {human_pos} rows, {per_sec}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    for rows in view.rows().into_diagnostic()? {
        let batch = rows.into_diagnostic()?.batch;
        let probabilities = agent.serving.predict(&batch).into_diagnostic()?;
        let label = |row: &Vec<f32>| {
            let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(class, _)| class);
            classes.get(best).cloned().unwrap_or_default()
        };
        let mut columns: Vec<ArrayRef> =
            vec![Arc::new(StringArray::from_iter_values(probabilities.iter().map(label)))];
        for class in 0..classes.len() {
            let column = probabilities.iter().map(|row| row.get(class).copied().unwrap_or(f32::NAN));
            columns.push(Arc::new(Float32Array::from_iter_values(column)));
        }
        writer
            .write(&RecordBatch::try_new(Arc::clone(&written), columns).into_diagnostic()?)
            .into_diagnostic()?;
        bar.inc(batch.rows() as u64);
    }
    writer.close().into_diagnostic()?;
    std::fs::rename(&beside, output).into_diagnostic()?;
    bar.finish_and_clear();
    eprintln!("wrote {} ({} rows)", output.display(), bar.position());
    Ok(ExitCode::SUCCESS)
}

/// The contract as far as prediction needs it: its features.
fn for_prediction(contract: &Contract) -> Contract {
    let mut contract = contract.clone();
    contract.columns.retain(|column| column.role == Role::Feature);
    contract
}
