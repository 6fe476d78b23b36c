//! `tabmesh-sim bench`: figures that answer a user's question, each by one command.

pub mod accountant;
pub mod golden;
mod golden_tables;
pub mod gradients;
pub mod marginals;
pub mod merkle;
pub mod pretrain;
pub mod raw_table;
pub mod report;
pub mod rounds;
pub mod sampler;
pub mod secagg;
pub mod serving;
pub mod tables;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;

use crate::cli::Output;

/// What is measured or compared.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// How long does a round take when training costs nothing? Real processes over mutual TLS.
    Rounds(rounds::Options),
    /// Compares the model with stored activations and predictions of the public package.
    ///
    /// DIR holds any of: safetensors files with a `config`, `cases` and `__io.<case>.<stage>` tensors; torch
    /// checkpoints (.ckpt, .pt, .pth), each compared with the cases of the safetensors file of the same name; JSON
    /// files with `preprocess` tables and `predict` ensembles, whose `weights` lie in DIR. Sizes are read from the
    /// files.
    ///
    /// The result has one entry per file and case: `max_abs_diff` is the largest difference over all `compared`
    /// tensors of the case, and `stage` names the tensor it is at. Three kinds of numbers are scaled first: logits of
    /// a class tree count half (they are logarithms of small probabilities), variances and preprocessing numbers above
    /// 1 are taken relative to their value, and predicted numbers are divided by the deviation of the targets.
    ///
    /// Exit code: 0 if every difference is at most 1e-4, 1 otherwise or if a file can't be read.
    Golden {
        /// Folder of golden files.
        #[arg(long)]
        dir: PathBuf,
    },
    /// How good is a base without any training? Single two-class tables, beside logistic regression and boosted trees.
    Tables(tables::Args),
    /// What is a federation worth? The whole loop on a folder of domain-split tables, beside its rivals.
    ///
    /// Every seed is one federation with another domain left out as the newcomer, who is scored on draws of 64 and 256 of
    /// its rows. `best_local` is the best of local trees, local logistic regression and the base; `best_pooled` of those
    /// that pool real rows, which nobody may. `local_base` and `pooled_base` code columns by the rows they read, `base` by the
    /// release. Takes minutes a seed.
    Utility(crate::utility::Args),
    /// How many virtual clients a second, when training costs nothing? FedAvg over one vector, all in this process.
    Null(crate::scenario::null::Args),
    /// Computes the figures of privacy accounting vectors and compares them; fails unless all agree.
    Accountant {
        /// The vectors (CSV; columns and kinds as in the privacy crate's fixtures).
        #[arg(long)]
        vectors: PathBuf,
    },
    /// How long does a prediction take against a ready context? One row at a time, and a batch.
    Serving(serving::Args),
    /// What do clipped per-row gradients cost over a plain step? Every kind of adapter, in processor time.
    ///
    /// Measured on one context: the forward pass, a step without privacy (the sum of all rows' gradients), and per-row gradients
    /// clipped and summed as integers, as an agent answers a round. What no value of the adapter changes is computed once
    /// before, as it is over the rounds of a plan.
    Gradients(gradients::Args),
    /// How many tables a second of processor time does pre-training learn from? One thread, the shipped sizes.
    Pretrain(pretrain::Args),
    /// Draws noise vectors and prints draws per second of processor time.
    Sampler {
        /// Coordinates of a vector.
        #[arg(long, default_value_t = 1_000_000)]
        dimension: u32,
    },
    /// What does a secure sum cost an agent and the server? Simulated agents, all in this process.
    Secagg(secagg::Options),
    /// How many rows a second are all pairs of columns counted over? Parquet, cap and gate, in memory that rows don't grow.
    Marginals(marginals::Args),
    /// Verifies a log: hash chain and Merkle root over all entries, in seconds of processor time.
    Merkle {
        /// Entries of the log.
        #[arg(long, default_value_t = 1_000_000)]
        entries: u32,
    },
    /// Verifies a privacy-budget report: signature, hash chain, rules of the ledger and every figure, in seconds of processor time.
    Report {
        /// Debits of its one ledger.
        #[arg(long, default_value_t = 20_000)]
        debits: u32,
    },
}

/// Measures and prints.
///
/// # Errors
/// Whatever keeps it from giving a result, or which check failed.
pub fn run(bench: Bench, output: Output) -> anyhow::Result<ExitCode> {
    match bench {
        Bench::Golden { dir } => return golden::run(&dir, output),
        Bench::Rounds(options) => rounds::run(&options, output)?,
        Bench::Tables(args) => tables::run(&args, output)?,
        Bench::Utility(args) => crate::utility::run(&args, output)?,
        Bench::Null(args) => crate::scenario::null::run(&args, output)?,
        Bench::Accountant { vectors } => accountant::run(&vectors, output)?,
        Bench::Serving(args) => serving::run(&args, output)?,
        Bench::Gradients(args) => gradients::run(&args, output)?,
        Bench::Pretrain(args) => pretrain::run(&args, output)?,
        Bench::Sampler { dimension } => sampler::run(dimension, output)?,
        Bench::Secagg(options) => secagg::run(&options, output)?,
        Bench::Marginals(args) => marginals::run(&args, output)?,
        Bench::Merkle { entries } => merkle::run(entries, output)?,
        Bench::Report { debits } => report::run(debits, output)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Nanoseconds of processor time this thread has used, by the kernel's count.
///
/// # Errors
/// The kernel doesn't tell (it isn't Linux, or keeps no scheduler statistics).
pub(crate) fn cpu_ns() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")
        .context("processor time is read from /proc/thread-self/schedstat")?;
    let first = text.split_whitespace().next().context("empty /proc/thread-self/schedstat")?;
    first.parse().context("/proc/thread-self/schedstat")
}
