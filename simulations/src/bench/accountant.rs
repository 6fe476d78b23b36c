//! `bench accountant`: every accountant against a file of reference vectors.

use std::path::Path;

use anstream::println;
use anyhow::Context;
use comfy_table::Table;
use serde::Serialize;
use tabmesh_privacy::accountant::vectors::{self, Case, Vector};

use crate::bench::cpu_ns;
use crate::cli::Output;

/// Computes every row of a file and prints how it compares.
///
/// JSON: `{"cases": [{"row", "expected", "got", "ok", "mechanism", "figures", "cpu_s"}], "ok"}`, `row` counted from 1 below
/// the header, `cpu_s` processor time of all its figures.
///
/// # Errors
/// The file can't be read, has no rows, or a row doesn't agree; the result is printed first.
pub fn run(path: &Path, output: Output) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("vectors {}", path.display()))?;
    let rows = vectors::parse(&text).with_context(|| format!("vectors {}", path.display()))?;
    anyhow::ensure!(!rows.is_empty(), "vectors {}: no rows", path.display());
    let cases = rows.iter().map(timed).collect::<anyhow::Result<Vec<Timed>>>()?;
    let wrong: Vec<usize> = cases.iter().filter(|timed| !timed.case.ok).map(|timed| timed.case.row).collect();
    match output {
        Output::Json => {
            let answer = serde_json::json!({ "cases": cases, "ok": wrong.is_empty() });
            println!("{}", serde_json::to_string_pretty(&answer)?);
        }
        Output::Text => println!("{}", table(&cases)),
    }
    anyhow::ensure!(wrong.is_empty(), "{} of {} rows don't agree: {wrong:?}", wrong.len(), cases.len());
    if output == Output::Text {
        println!("{} rows agree", cases.len());
    }
    Ok(())
}

/// A row and what it took.
#[derive(Debug, Serialize)]
struct Timed {
    #[serde(flatten)]
    case: Case,
    cpu_s: f64,
}

fn timed(row: &Vector) -> anyhow::Result<Timed> {
    let begun = cpu_ns()?;
    let case = row.check();
    Ok(Timed { case, cpu_s: cpu_ns()?.saturating_sub(begun) as f64 / 1e9 })
}

fn table(cases: &[Timed]) -> Table {
    let mut table = Table::new();
    table.set_header(["row", "kind", "figure", "expected", "got", "ok", "CPU ms"]);
    for Timed { case, cpu_s } in cases {
        if let Some(error) = &case.error {
            table.add_row([case.row.to_string(), case.mechanism.clone(), error.clone()]);
        }
        for figure in &case.figures {
            table.add_row([
                case.row.to_string(),
                case.mechanism.clone(),
                figure.name.to_owned(),
                format!("{:.9}", figure.expected),
                format!("{:.9}", figure.got),
                if figure.ok { "yes" } else { "NO" }.to_owned(),
                format!("{:.1}", 1e3 * cpu_s),
            ]);
        }
    }
    table
}
