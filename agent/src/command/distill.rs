//! `tabmesh-agent distill`: a small student of the promoted model, and how well it follows.

use std::process::ExitCode;

use anstream::println;
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use miette::IntoDiagnostic;
use tabmesh_tfm::student::Fitting;

use crate::Local;
use crate::cli::Output;
use crate::student::{Record, STUDENT_SUFFIX, distil};

/// Distils, writes the student, prints its record.
pub(crate) fn run(agent: &Local, fitting: Fitting, output: Output, now_ms: i64) -> miette::Result<ExitCode> {
    let style = ProgressStyle::with_template("{spinner} {msg} {bar:30} {pos}/{len} epochs, {eta} left");
    let bar = ProgressBar::new(fitting.epochs as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message("asking the teacher");
    bar.tick();
    let mut progress = |epoch: usize, loss: f64| {
        bar.set_message(format!("held-out cross-entropy {loss:.4}"));
        bar.set_position(epoch as u64 + 1);
    };
    let record = distil(&agent.domain, &agent.serving, fitting, now_ms, &mut progress).into_diagnostic()?;
    bar.finish_and_clear();
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&record).into_diagnostic()?),
        Output::Text => show(agent, &record),
    }
    Ok(ExitCode::SUCCESS)
}

fn show(agent: &Local, record: &Record) {
    let Record { rows, corpus_rows, gate, .. } = record;
    println!(
        "student of {:?}, from {} own rows and {corpus_rows} corpus rows",
        record.teacher,
        rows - corpus_rows
    );
    let figure = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
    let mut table = Table::new();
    table.set_header(vec![format!("on {} gate rows", gate.rows), "teacher".into(), "student".into()]);
    table.add_row(vec!["ROC-AUC".to_owned(), figure(gate.teacher_auc), figure(gate.student_auc)]);
    table.add_row(vec!["log loss".to_owned(), figure(gate.teacher_log_loss), figure(gate.student_log_loss)]);
    println!("{table}");
    println!(
        "same class in {:.1} % of rows, probabilities {:.3} apart on average",
        100.0 * gate.same_class,
        gate.mean_distance
    );
    println!("served as {}{STUDENT_SUFFIX} by a running agent", agent.domain.config.serve.model_name);
}
