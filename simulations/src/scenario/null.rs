//! `bench null`: how many virtual clients a second, when training costs nothing?
//!
//! FedAvg over one vector, the workload that simulators are compared on: every client reads the model, adds a constant and
//! sends the change, weighed by its 100 units; the server takes the weighted mean. Changes are the integers that agents send,
//! they go into running sums (one a thread), and nothing else is kept: memory doesn't depend on the number of clients.

use std::collections::BTreeMap;
use std::time::Instant;

use anstream::println;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tabmesh_federation::aggregate::{Aggregate, AggregateError, Contributions, FedSgd, Running, Updates};

use crate::cli::Output;
use crate::process::now;

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Virtual clients of each round.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub clients: u32,
    /// Values of the model.
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub parameters: u32,
    /// Rounds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Threads. Default: one a core.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Outcome {
    clients: u32,
    parameters: u32,
    rounds: u32,
    threads: usize,
    /// Over all rounds.
    clients_per_second: f64,
    seconds_per_round: Vec<f64>,
    /// Processor time of the whole process, by the kernel's count.
    cpu_seconds: f64,
    peak_memory_mib: f64,
    /// First value of the model afterwards: rounds times the clients' constant, as far as integers and floats say.
    first_value: f64,
}

/// Measures and prints.
///
/// # Errors
/// A sum that overflows, or a model that isn't what the clients' changes add up to.
pub fn run(args: &Args, output: Output) -> Result<()> {
    let outcome = measured(args)?;
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&outcome)?),
        Output::Text => {
            let Outcome { clients, parameters, rounds, threads, .. } = outcome;
            println!(
                "{clients} clients of {parameters} values, {rounds} rounds, {threads} threads, no training"
            );
            println!("  clients a second: {:.0}", outcome.clients_per_second);
            println!("  processor time: {:.2} s in all", outcome.cpu_seconds);
            println!("  resident memory at its peak: {:.0} MiB", outcome.peak_memory_mib);
        }
    }
    Ok(())
}

fn measured(args: &Args) -> Result<Outcome> {
    let threads = args
        .threads
        .map_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get), usize::from);
    let mut model = vec![0_f32; args.parameters as usize];
    let mut seconds_per_round = Vec::new();
    let cpu = process_cpu_seconds()?;
    let began = now();
    for _ in 0..args.rounds {
        let round: Instant = now();
        let sum = summed(&model, args.clients, threads)?;
        ensure!(
            sum.updates() == u64::from(args.clients),
            "{} of {} clients counted",
            sum.updates(),
            args.clients
        );
        let divisor = f64::from(args.clients) * f64::from(UNITS);
        let contributions = Contributions::SumOnly(sum.sum());
        let totals = BTreeMap::new();
        let mean =
            FedSgd {}.mean(&Updates { contributions, scale: f64::from(SCALE), divisor, totals: &totals })?;
        model.iter_mut().zip(&mean).for_each(|(w, change)| *w -= *change as f32);
        seconds_per_round.push(round.elapsed().as_secs_f64());
    }
    let seconds = began.elapsed().as_secs_f64();
    let first_value = f64::from(model.first().copied().unwrap_or(0.0));
    let expected = f64::from(args.rounds) * f64::from(STEP);
    // A change is rounded to a 2⁻²⁰th in each round, and the model is of 32-bit floats.
    let tolerance = f64::from(args.rounds) * 2.0 / f64::from(SCALE);
    ensure!((first_value - expected).abs() <= tolerance, "the model is {first_value}, expected {expected}");
    Ok(Outcome {
        clients: args.clients,
        parameters: args.parameters,
        rounds: args.rounds,
        threads,
        clients_per_second: f64::from(args.clients) * f64::from(args.rounds) / seconds,
        seconds_per_round,
        cpu_seconds: process_cpu_seconds()? - cpu,
        peak_memory_mib: peak_memory_mib()?,
        first_value,
    })
}

/// The sum of all clients' changes.
fn summed(model: &[f32], clients: u32, threads: usize) -> Result<Running, AggregateError> {
    let share = |thread: usize| {
        let (clients, threads) = (clients as usize, threads.max(1));
        clients * (thread + 1) / threads - clients * thread / threads
    };
    let parts: Vec<Result<Running, AggregateError>> = std::thread::scope(|scope| {
        #[expect(clippy::needless_collect, reason = "all threads are started before the first is waited for")]
        let running: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || -> Result<Running, AggregateError> {
                    let mut sum = Running::new(model.len());
                    let mut update = vec![0_i64; model.len()];
                    for _ in 0..share(thread) {
                        change(model, &mut update);
                        sum.add(&update)?;
                    }
                    Ok(sum)
                })
            })
            .collect();
        // Unwrap safety: the threads above don't panic; one that did ends this measurement as it should.
        running.into_iter().map(|thread| thread.join().expect("a client thread ends")).collect()
    });
    let mut all = Running::new(model.len());
    for part in parts {
        all.merge(&part?)?;
    }
    Ok(all)
}

/// One client: the model plus a constant, and the sum of the change over its units in integer steps.
fn change(model: &[f32], update: &mut [i64]) {
    for (to, w) in update.iter_mut().zip(model) {
        let local = w + STEP;
        let steps = (w - local) * (SCALE * UNITS);
        // Rounds to the nearest integer: in the float 1.5·2²³ + steps the last bits are the integer's. |steps| < 2²².
        *to = i64::from((steps + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()).cast_signed());
    }
}

fn process_cpu_seconds() -> Result<f64> {
    let stat =
        std::fs::read_to_string("/proc/self/stat").context("processor time is read from /proc/self/stat")?;
    // Fields 14 and 15, counted after the name, which may hold spaces and ends with ')'.
    let fields: Vec<&str> = stat.rsplit_once(')').context("/proc/self/stat")?.1.split_whitespace().collect();
    let ticks: u64 = fields.iter().skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
    Ok(ticks as f64 / TICKS_A_SECOND)
}

fn peak_memory_mib() -> Result<f64> {
    let status =
        std::fs::read_to_string("/proc/self/status").context("memory is read from /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().context("VmHWM")?;
    Ok(kib / 1024.0)
}

/// What every client adds to every value.
const STEP: f32 = 0.001;
/// Integer steps of a change: 2²⁰ a unit.
const SCALE: f32 = 1_048_576.0;
/// 1.5·2²³.
const MAGIC: f32 = 12_582_912.0;
/// Units each client stands for.
const UNITS: f32 = 100.0;
/// Clock ticks of /proc/self/stat: 100 on every Linux.
const TICKS_A_SECOND: f64 = 100.0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// The trick is a rounding.
    #[test]
    fn a_change_is_the_nearest_integer() {
        let model: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 0.0007).collect();
        let mut update = vec![0; model.len()];
        change(&model, &mut update);
        for (w, got) in model.iter().zip(update) {
            let exact = ((w - (w + STEP)) * (SCALE * UNITS)).round_ties_even();
            assert_eq!(got, exact as i64);
        }
    }

    #[test]
    fn every_thread_count_gives_the_same_sum_over_all_clients() {
        let model = vec![0.25; 33];
        let one = summed(&model, 101, 1).unwrap();
        assert_eq!(one.updates(), 101);
        for threads in [2, 3, 7, 200] {
            assert_eq!(summed(&model, 101, threads).unwrap(), one);
        }
    }

    #[test]
    fn the_model_moves_by_the_clients_constant() {
        let args = Args { clients: 10, parameters: 5, rounds: 3, threads: Some(2) };
        let outcome = measured(&args).unwrap();
        assert!((outcome.first_value - 0.003).abs() < 1e-5, "{outcome:?}");
        assert!(outcome.peak_memory_mib > 0.0 && outcome.clients_per_second > 0.0);
    }
}
