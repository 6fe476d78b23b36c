//! `bench serving`: how long one prediction takes, and how many a second a batch gives, against a ready context.
//!
//! Rows are random: time doesn't depend on their values. A context is built once per way to hold it, as an agent does
//! when it promotes; then single rows are predicted one after the other, and one batch. Every prediction averages two
//! views of the context. Times are given by the clock and, as a machine is rarely idle, by the processor time that
//! this process used. `RAYON_NUM_THREADS=1` measures one core.

use std::path::PathBuf;
use std::time::Instant;

use anstream::println;
use anyhow::{Context as _, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tabmesh_tfm::context::{Budget, Cache, CacheKind, Context, Plan, Precision, Serving};
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
    /// What of the context is held; both if not given.
    #[arg(long, value_parser = parse_kind)]
    cache: Option<CacheKind>,
    /// In which numbers it is held; both if not given.
    #[arg(long, value_parser = parse_precision)]
    precision: Option<Precision>,
}

fn parse_kind(text: &str) -> Result<CacheKind, String> {
    match text {
        "kv" => Ok(CacheKind::Kv),
        "repr" => Ok(CacheKind::Repr),
        _ => Err(format!("expected kv or repr, got {text:?}")),
    }
}

fn parse_precision(text: &str) -> Result<Precision, String> {
    match text {
        "f32" => Ok(Precision::F32),
        "f16" => Ok(Precision::F16),
        _ => Err(format!("expected f32 or f16, got {text:?}")),
    }
}

#[derive(Debug, Serialize)]
struct Outcome {
    parameters: usize,
    context_rows: u32,
    columns: u32,
    views: usize,
    threads: usize,
    /// Weights copied for serving, whatever the number of contexts.
    weights_mib: f64,
    caches: Vec<Measured>,
}

/// One way to hold the context.
#[derive(Debug, Serialize)]
struct Measured {
    cache: String,
    held_mib: f64,
    build_s: f64,
    build_cpu_s: f64,
    /// What building was foretold to need, held bytes included.
    build_foretold_mib: f64,
    /// Growth of the process's peak memory while building; nothing where the system doesn't tell, and a lower bound
    /// where something before needed more.
    build_grew_mib: Option<f64>,
    singles: u32,
    single_row_ms: Quantiles,
    single_row_cpu_ms: f64,
    batch_rows_per_s: f64,
    /// Largest difference between the batch's and the single rows' probabilities.
    batch_against_single: f64,
    /// Largest difference to the probabilities of the first way measured.
    against_first: f64,
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
    let rows = table(&mut rng, args.rows as usize, columns);
    let queries = table(&mut rng, args.batch.max(args.singles) as usize, columns);
    // The weights are copied when the first context is built, which is no part of any measurement.
    let first = Context::build(&model, &rows.take(&[0]))?;
    let wanted = |cache: &Cache| {
        args.cache.is_none_or(|kind| kind == cache.kind)
            && args.precision.is_none_or(|precision| precision == cache.precision)
    };
    // The smallest first, so that each one's peak memory stands out.
    let mut caches = Vec::new();
    let mut reference = None;
    for cache in Cache::ALL.into_iter().filter(wanted).rev() {
        caches.push(measure(args, &model, &rows, &queries, cache, &mut reference)?);
    }
    let outcome = Outcome {
        parameters: model.parameters(),
        context_rows: args.rows,
        columns: args.columns,
        views: first.views(),
        threads: tabmesh_tfm::context::threads(),
        weights_mib: mib(first.weight_bytes()),
        caches,
    };
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&outcome)?),
        Output::Text => print(&outcome),
    }
    Ok(())
}

fn measure(
    args: &Args,
    model: &Model,
    rows: &EncodedTable,
    queries: &EncodedTable,
    cache: Cache,
    reference: &mut Option<Vec<[f64; 2]>>,
) -> Result<Measured> {
    let plan = Plan {
        classes: 2,
        kind: Some(cache.kind),
        precision: Some(cache.precision),
        budget: Budget::UNLIMITED,
    };
    let (began, cpu, resident) = (now(), cpu_s(), status_mib("VmRSS:"));
    let context = Context::build_as(model, rows, plan)?;
    let (build_s, build_cpu_s) = (elapsed(began), cpu_s() - cpu);
    let build_grew_mib = status_mib("VmHWM:").zip(resident).map(|(peak, before)| peak - before);

    let predict = |rows: &EncodedTable| context.predict(rows, Serving::default());
    // Without held keys and values a row costs a pass over the context: a few tell.
    let singles = if cache.kind == CacheKind::Repr { args.singles.min(REPR_SINGLES) } else { args.singles };
    let warm_up = if cache.kind == CacheKind::Repr { 1 } else { WARM_UP };
    for row in 0..warm_up.min(queries.rows) {
        predict(&queries.take(&[row]))?;
    }
    let (mut milliseconds, mut single) = (Vec::new(), Vec::new());
    let cpu = cpu_s();
    for row in 0..singles as usize {
        let query = queries.take(&[row]);
        let began = now();
        single.extend(predict(&query)?);
        milliseconds.push(elapsed(began) * 1e3);
    }
    let single_row_cpu_ms = (cpu_s() - cpu) / f64::from(singles) * 1e3;
    let batch = queries.take(&(0..args.batch as usize).collect::<Vec<_>>());
    let began = now();
    let batched = predict(&batch)?;
    let batch_rows_per_s = f64::from(args.batch) / elapsed(began);
    milliseconds.sort_by(f64::total_cmp);
    let quantile = |share: f64| {
        let at = (milliseconds.len() as f64 * share).ceil() as usize;
        milliseconds.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    };
    let apart = |a: &[[f64; 2]], b: &[[f64; 2]]| {
        a.iter().zip(b).map(|(a, b)| (a[1] - b[1]).abs()).fold(0.0, f64::max)
    };
    let foretold = Context::footprint(model.config(), rows.rows, rows.columns, cache);
    let measured = Measured {
        cache: cache.to_string(),
        held_mib: mib(context.bytes()),
        build_s,
        build_cpu_s,
        build_foretold_mib: mib(foretold.building),
        build_grew_mib,
        singles,
        single_row_ms: Quantiles { p50: quantile(0.5), p99: quantile(0.99) },
        single_row_cpu_ms,
        batch_rows_per_s,
        batch_against_single: apart(&single, &batched),
        against_first: reference.as_ref().map_or(0.0, |first| apart(first, &batched)),
    };
    reference.get_or_insert(batched);
    Ok(measured)
}

fn print(outcome: &Outcome) {
    let Outcome { parameters, context_rows, columns, views, threads, .. } = outcome;
    println!(
        "{parameters} parameters, context of {context_rows} rows x {columns} columns, {views} views, {threads} threads"
    );
    println!("weights copied for serving: {:.1} MiB", outcome.weights_mib);
    for one in &outcome.caches {
        println!("{}: {:.1} MiB held", one.cache, one.held_mib);
        println!(
            "  built in {:.2} s ({:.2} CPU-s), {:.1} MiB foretold, {} MiB grown",
            one.build_s,
            one.build_cpu_s,
            one.build_foretold_mib,
            one.build_grew_mib.map_or_else(|| "?".to_owned(), |mib| format!("{mib:.1}")),
        );
        println!(
            "  one row: {:.2} ms median, {:.2} ms p99, {:.2} CPU-ms mean of {}",
            one.single_row_ms.p50, one.single_row_ms.p99, one.single_row_cpu_ms, one.singles
        );
        println!(
            "  a batch: {:.0} rows a second; {:.1e} from single rows, {:.1e} from the first way",
            one.batch_rows_per_s, one.batch_against_single, one.against_first
        );
    }
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A line of this process's status in MiB; nothing where `/proc` is missing.
pub(super) fn status_mib(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

/// Processor seconds that this process used so far; 0 where `/proc` is missing.
fn cpu_s() -> f64 {
    // Nanoseconds on the processor, summed over the threads.
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
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
/// Most single rows predicted where each computes keys and values anew.
const REPR_SINGLES: u32 = 10;
