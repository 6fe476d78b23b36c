//! `bench gradients`: what per-row clipped gradients cost over a plain step, for every kind of adapter.
//!
//! Rows are random: time doesn't depend on their values. The three measures take turns, so that a machine that is busy with
//! something else is so for all of them, and medians over the turns are given. Processor time is that of the whole process,
//! as the kernel counts it, in steps of a hundredth of a second: each turn runs a measure until half a second is used up.

use std::path::PathBuf;

use anstream::println;
use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use comfy_table::Table;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tabmesh_federation::descriptor::scale_for;
use tabmesh_tfm::adapter::{Adapter, Kind};
use tabmesh_tfm::context::Context;
use tabmesh_tfm::gradient::{Clip, PreparedRows, UnitGroup};
use tabmesh_tfm::model::Model;

use super::serving::table;
use crate::cli::Output;

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Kind of adapter; all kinds if not given.
    #[arg(long)]
    kind: Option<Name>,
    /// Rank of lora and frozen_lora.
    #[arg(long, default_value_t = 1)]
    rank: usize,
    /// Rank of core.
    #[arg(long, default_value_t = 8)]
    core_rank: usize,
    /// Model file; the shipped base if not given.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Rows of the context.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    context: u32,
    /// Rows whose gradients are taken, each a privacy unit.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rows: u32,
    /// Columns of the table.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
    columns: u32,
    /// Turns that the measures take.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    turns: u32,
}

/// Kinds of adapter, by the names plans have for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Name {
    FeatureTokens,
    Head,
    Lora,
    FrozenLora,
    Core,
}

#[derive(Debug, Serialize)]
struct Outcome {
    parameters: usize,
    context_rows: u32,
    columns: u32,
    rows: u32,
    kinds: Vec<Figures>,
}

/// One kind. Samples are rows.
#[derive(Debug, Serialize)]
struct Figures {
    #[serde(flatten)]
    kind: Kind,
    values: usize,
    forward_samples_per_cpu_s: f64,
    plain_step_samples_per_cpu_s: f64,
    clipped_samples_per_cpu_s: f64,
    /// Cost of a plain step over the forward pass.
    plain_step_over_forward: f64,
    /// Cost of clipped per-row gradients over a plain step.
    clipped_over_plain_step: f64,
}

/// Measures and prints.
///
/// # Errors
/// A model file that can't be read, a kind that doesn't fit it, or a kernel that doesn't tell processor time.
pub fn run(args: &Args, output: Output) -> Result<()> {
    let model = match &args.model {
        Some(path) => {
            let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
            Model::from_safetensors(&bytes).with_context(|| path.display().to_string())?.0
        }
        None => Model::from_safetensors(crate::quickstart::deployed::BASE_MODEL)?.0,
    };
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let context = Context::build(&model, &table(&mut rng, args.context as usize, args.columns as usize))?;
    let rows = table(&mut rng, args.rows as usize, args.columns as usize);
    let kinds = [
        (Name::FeatureTokens, Kind::FeatureTokens),
        (Name::Head, Kind::Head),
        (Name::Lora, Kind::Lora { rank: args.rank }),
        (Name::FrozenLora, Kind::FrozenLora { rank: args.rank, seed: 0 }),
        (Name::Core, Kind::Core { rank: args.core_rank }),
    ];
    let mut figures = Vec::new();
    for (name, kind) in kinds {
        if args.kind.is_none_or(|asked| asked == name) {
            let initial = Adapter::initial(kind, &model, context.column_keys())?;
            let values =
                initial.values().iter().map(|v| v + rng.random_range(-SPREAD..SPREAD)).collect::<Vec<f32>>();
            let adapter = initial.with_values(values)?;
            let prepared = context.prepare(&rows, &adapter)?;
            figures.push(measure(&context, &prepared, &adapter, args)?);
        }
    }
    let outcome = Outcome {
        parameters: model.parameters(),
        context_rows: args.context,
        columns: args.columns,
        rows: args.rows,
        kinds: figures,
    };
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&outcome)?),
        Output::Text => print(&outcome),
    }
    Ok(())
}

fn measure(context: &Context, rows: &PreparedRows, adapter: &Adapter, args: &Args) -> Result<Figures> {
    let units: Vec<UnitGroup> = (0..args.rows as usize).map(|row| UnitGroup { rows: vec![row] }).collect();
    let norm = context.norm_quantile(rows, adapter, &units, 0.95)?;
    let clip = Clip::new(norm, scale_for(norm) as f64)?;
    let forward = || -> Result<()> {
        let losses = context.losses(rows, adapter)?;
        ensure!(losses.iter().all(|loss| loss.is_finite()), "a loss is not finite");
        Ok(())
    };
    let plain_step = || -> Result<()> {
        let sum = context.summed_gradient(rows, adapter)?;
        ensure!(sum.iter().any(|g| *g != 0.0), "the gradient is zero");
        Ok(())
    };
    let clipped = || -> Result<()> {
        let sum = context.clipped_sum(rows, adapter, &units, clip)?;
        ensure!(sum.values.iter().any(|g| *g != 0), "the clipped gradient is zero");
        Ok(())
    };
    let mut turns: Vec<[f64; 3]> = Vec::new();
    for _ in 0..args.turns {
        turns.push([cost(&forward)?, cost(&plain_step)?, cost(&clipped)?]);
    }
    let median = |figure: &dyn Fn(&[f64; 3]) -> f64| {
        let mut values: Vec<f64> = turns.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let samples = f64::from(args.rows);
    Ok(Figures {
        kind: adapter.layout().kind,
        values: adapter.dimension(),
        forward_samples_per_cpu_s: median(&|[forward, _, _]| samples / forward),
        plain_step_samples_per_cpu_s: median(&|[_, step, _]| samples / step),
        clipped_samples_per_cpu_s: median(&|[_, _, clipped]| samples / clipped),
        plain_step_over_forward: median(&|[forward, step, _]| step / forward),
        clipped_over_plain_step: median(&|[_, step, clipped]| clipped / step),
    })
}

/// Processor seconds of one run, from as many as fill a turn.
fn cost(run: &dyn Fn() -> Result<()>) -> Result<f64> {
    let began = cpu_seconds()?;
    for runs in 1_u32.. {
        run()?;
        let used = cpu_seconds()? - began;
        if used >= TURN_S {
            return Ok(used / f64::from(runs));
        }
    }
    Ok(f64::NAN)
}

/// Processor seconds of this process, all threads.
pub(super) fn cpu_seconds() -> Result<f64> {
    let text =
        std::fs::read_to_string("/proc/self/stat").context("processor time is read from /proc/self/stat")?;
    // The command name may hold spaces, so fields are counted after its closing bracket.
    let fields = text.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(11));
    let mut ticks = fields.into_iter().flatten().map(str::parse::<f64>);
    let (Some(Ok(user)), Some(Ok(system))) = (ticks.next(), ticks.next()) else {
        anyhow::bail!("/proc/self/stat has no processor time")
    };
    Ok((user + system) / TICKS_PER_S)
}

fn print(outcome: &Outcome) {
    let Outcome { parameters, context_rows, columns, rows, .. } = outcome;
    println!(
        "{parameters} parameters, context of {context_rows} rows x {columns} columns, {rows} query rows"
    );
    let mut shown = Table::new();
    shown.load_style(comfy_table::presets::ASCII_MARKDOWN);
    shown.set_header([
        "adapter",
        "values",
        "forward, rows/CPU-s",
        "plain step",
        "clipped",
        "step / forward",
        "clipped / step",
    ]);
    for f in &outcome.kinds {
        shown.add_row([
            f.kind.name().to_owned(),
            f.values.to_string(),
            format!("{:.0}", f.forward_samples_per_cpu_s),
            format!("{:.0}", f.plain_step_samples_per_cpu_s),
            format!("{:.0}", f.clipped_samples_per_cpu_s),
            format!("{:.2}", f.plain_step_over_forward),
            format!("{:.2}", f.clipped_over_plain_step),
        ]);
    }
    println!("{shown}");
}

/// Processor seconds that a measure runs for in each turn.
const TURN_S: f64 = 0.5;
const TICKS_PER_S: f64 = 100.0;
/// Largest distance of the measured adapter's values from where they start.
const SPREAD: f32 = 0.05;
