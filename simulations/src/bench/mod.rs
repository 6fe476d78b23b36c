//! `tabmesh-sim bench`: answers that are checked or timed, one file a subject.

pub mod accountant;
pub mod merkle;
pub mod sampler;

use anyhow::Context;
use clap::Subcommand;

use crate::cli::Output;

/// What to check or time.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Computes the figures of privacy accounting vectors and compares them; fails unless all agree.
    Accountant {
        /// The vectors (CSV; columns and kinds as in the privacy crate's fixtures).
        #[arg(long)]
        vectors: std::path::PathBuf,
        /// Form of the result.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Draws noise vectors and prints draws per second of processor time.
    Sampler {
        /// Coordinates of a vector.
        #[arg(long, default_value_t = 1_000_000)]
        dimension: u32,
        /// Form of the result.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Verifies a log: hash chain and Merkle root over all entries, in seconds of processor time.
    Merkle {
        /// Entries of the log.
        #[arg(long, default_value_t = 1_000_000)]
        entries: u32,
        /// Form of the result.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
}

/// Runs a benchmark.
///
/// # Errors
/// What went wrong, or which check failed.
pub fn run(action: Action) -> anyhow::Result<()> {
    match action {
        Action::Accountant { vectors, output } => accountant::run(&vectors, output),
        Action::Sampler { dimension, output } => sampler::run(dimension, output),
        Action::Merkle { entries, output } => merkle::run(entries, output),
    }
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
