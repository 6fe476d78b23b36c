//! `bench pretrain`: how many tables a second of processor time pre-training learns from.
//!
//! The first steps of a run from scratch as `tabmesh-coordinator pretrain` makes it, on one thread, the drawing of tables
//! included; neither the first step nor the validation after the last one is counted. The sizes of all tables are
//! printed with the result, so that another program can be timed on tables of the same sizes.

use std::cell::RefCell;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anstream::println;
use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde::Serialize;
use tabmesh_tfm::model::config::ModelConfig;
use tabmesh_tfm::pretrain::{Optimiser, PretrainConfig, SliceSizes, Start, run as train};

use super::gradients::cpu_seconds;
use crate::cli::Output;

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Steps measured.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    steps: u32,
    /// Seed of weights and tables.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How gradients become steps.
    #[arg(long, default_value = "adam_w")]
    optimiser: Name,
}

/// Optimisers, by the names that configurations have for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Name {
    AdamW,
    Muon,
}

#[derive(Debug, Serialize)]
struct Outcome {
    parameters: usize,
    optimiser: Optimiser,
    steps: u32,
    tables: usize,
    cpu_s: f64,
    tables_per_cpu_s: f64,
    cells_per_cpu_s: f64,
    /// Of the last step measured, which equal runs share.
    loss: f64,
    /// Sizes of the tables, slice by slice within each measured step.
    slices: Vec<Vec<SliceSizes>>,
}

/// Measures and prints.
///
/// # Errors
/// A kernel that doesn't tell processor time.
pub fn run(args: &Args, output: Output) -> Result<()> {
    let optimiser = match args.optimiser {
        Name::AdamW => Optimiser::AdamW,
        Name::Muon => Optimiser::Muon,
    };
    // One step before, and one after that validates.
    let steps = u64::from(args.steps) + 2;
    let config = PretrainConfig {
        optimiser,
        validate_every: steps,
        checkpoint_every: steps,
        ..PretrainConfig::scratch(ModelConfig::nano(), steps, args.seed)
    };
    let marks: RefCell<Vec<(f64, f64)>> = RefCell::default();
    let mut failed = None;
    let model = train(
        &config,
        &Start::Scratch,
        None,
        &|| Duration::ZERO,
        &mut |progress| {
            match cpu_seconds() {
                Ok(seconds) => marks.borrow_mut().push((seconds, progress.loss)),
                Err(error) => failed = Some(error),
            }
            Ok(())
        },
        &AtomicBool::new(false),
    )?;
    if let Some(error) = failed {
        return Err(error);
    }
    let marks = marks.into_inner();
    let (Some((began, _)), Some((ended, loss))) = (marks.first(), marks.get(args.steps as usize)) else {
        anyhow::bail!("{} steps reported, {steps} expected", marks.len())
    };
    let slices: Vec<Vec<SliceSizes>> = (1..=u64::from(args.steps)).map(|step| config.slices(step)).collect();
    let all = || slices.iter().flatten();
    let tables: usize = all().map(|slice| slice.tables).sum();
    let cells: usize = all().map(|slice| slice.tables * slice.rows * slice.columns).sum();
    let cpu_s = ended - began;
    let outcome = Outcome {
        parameters: model.parameters(),
        optimiser,
        steps: args.steps,
        tables,
        cpu_s,
        tables_per_cpu_s: tables as f64 / cpu_s,
        cells_per_cpu_s: cells as f64 / cpu_s,
        loss: *loss,
        slices,
    };
    match output {
        Output::Json => println!("{}", serde_json::to_string(&outcome).context("outcome")?),
        Output::Text => println!(
            "{} parameters, {} steps of {} tables in {cpu_s:.2} CPU-s: {:.1} tables and {:.0} cells a CPU-s, loss {:.4}",
            outcome.parameters,
            outcome.steps,
            tables / args.steps as usize,
            outcome.tables_per_cpu_s,
            outcome.cells_per_cpu_s,
            outcome.loss,
        ),
    }
    Ok(())
}
