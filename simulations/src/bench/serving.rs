//! `bench serving`: how long one prediction takes, and how many a second a batch gives, against a ready context.
//!
//! Rows are random: time doesn't depend on their values. A context is built once, as an agent does when it promotes;
//! then single rows are predicted one after the other, and one batch. Every prediction averages two views of the
//! context, with the classes swapped. `RAYON_NUM_THREADS=1` measures one core.

use std::path::PathBuf;
use std::time::Instant;

use anstream::println;
use anyhow::{Context as _, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tabmesh_tfm::context::{Context, Serving};
use tabmesh_tfm::model::Model;
use tabmesh_tfm::model::config::ModelConfig;
use tabmesh_tfm::table::EncodedTable;

use crate::cli::Output;
use crate::process::now;

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Model file; the shipped base if not given.
    #[arg(long, conflicts_with = "published")]
    model: Option<PathBuf>,
    /// Random weights in the published 27-million-parameter shape instead of a file.
    #[arg(long)]
    published: bool,
    /// Rows of the context.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    rows: u32,
    /// Columns of the table.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
    columns: u32,
    /// Single rows predicted, after a few to warm up.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    singles: u32,
    /// Rows of the batch.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    batch: u32,
}

#[derive(Debug, Serialize)]
struct Outcome {
    parameters: usize,
    context_rows: u32,
    columns: u32,
    views: usize,
    build_context_s: f64,
    context_mib: f64,
    single_row_ms: Quantiles,
    batch_rows_per_s: f64,
    /// Largest difference between the batch's and the single rows' probabilities.
    batch_against_single: f64,
}

#[derive(Debug, Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

/// Measures and prints.
///
/// # Errors
/// A model file that can't be read.
pub fn run(args: &Args, output: Output) -> Result<()> {
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let model = match &args.model {
        _ if args.published => Model::random(&ModelConfig::published(), &mut rng)?,
        Some(path) => {
            let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
            Model::from_safetensors(&bytes).with_context(|| path.display().to_string())?.0
        }
        None => Model::from_safetensors(crate::quickstart::deployed::BASE_MODEL)?.0,
    };
    let columns = args.columns as usize;
    let context_rows = table(&mut rng, args.rows as usize, columns);
    let began = now();
    let context = Context::build(&model, &context_rows)?;
    let build_context_s = began.elapsed().as_secs_f64();

    let queries = table(&mut rng, args.batch.max(args.singles) as usize, columns);
    let predict = |rows: &EncodedTable| context.predict(rows, Serving::default());
    for row in 0..WARM_UP.min(queries.rows) {
        predict(&queries.take(&[row]))?;
    }
    let (mut milliseconds, mut single) = (Vec::new(), Vec::new());
    for row in 0..args.singles as usize {
        let query = queries.take(&[row]);
        let began = now();
        single.extend(predict(&query)?);
        milliseconds.push(elapsed(began) * 1e3);
    }
    let batch = queries.take(&(0..args.batch as usize).collect::<Vec<_>>());
    let began = now();
    let batched = predict(&batch)?;
    let batch_rows_per_s = f64::from(args.batch) / elapsed(began);
    milliseconds.sort_by(f64::total_cmp);
    let quantile = |share: f64| {
        let at = (milliseconds.len() as f64 * share).ceil() as usize;
        milliseconds.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    };
    let outcome = Outcome {
        parameters: model.parameters(),
        context_rows: args.rows,
        columns: args.columns,
        views: context.views(),
        build_context_s,
        context_mib: context.bytes() as f64 / f64::from(1 << 20),
        single_row_ms: Quantiles { p50: quantile(0.5), p99: quantile(0.99) },
        batch_rows_per_s,
        batch_against_single: single
            .iter()
            .zip(&batched)
            .map(|(one, many)| (one[1] - many[1]).abs())
            .fold(0.0, f64::max),
    };
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&outcome)?),
        Output::Text => print(&outcome),
    }
    Ok(())
}

fn print(outcome: &Outcome) {
    let Outcome { parameters, context_rows, columns, views, .. } = outcome;
    println!("{parameters} parameters, context of {context_rows} rows x {columns} columns, {views} views");
    println!("  context built in {:.2} s, {:.1} MiB held", outcome.build_context_s, outcome.context_mib);
    println!(
        "  one row: {:.2} ms median, {:.2} ms p99",
        outcome.single_row_ms.p50, outcome.single_row_ms.p99
    );
    println!("  a batch: {:.0} rows a second", outcome.batch_rows_per_s);
    println!("  largest difference between batch and single rows: {:.1e}", outcome.batch_against_single);
}

fn elapsed(began: Instant) -> f64 {
    began.elapsed().as_secs_f64()
}

/// Labelled rows of random values.
pub(super) fn table(rng: &mut ChaCha20Rng, rows: usize, columns: usize) -> EncodedTable {
    let keys: Vec<String> = (0..columns).map(|column| format!("bench.c{column}")).collect();
    EncodedTable {
        rows,
        columns,
        values: (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect(),
        labels: (0..rows).map(|_| Some(u8::from(rng.random_bool(0.4)))).collect(),
        column_texts: keys.clone(),
        column_keys: keys,
    }
}

/// Single rows predicted before the clock starts.
const WARM_UP: usize = 20;
