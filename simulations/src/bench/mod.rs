//! `tabmesh-sim bench`: figures that answer a user's question, each by one command.

pub mod golden;
mod golden_tables;
pub mod rounds;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use crate::cli::Output;

/// What is measured.
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
}

/// Measures and prints.
///
/// # Errors
/// Whatever keeps it from giving a result, named by the file it is about.
pub fn run(bench: Bench, output: Output) -> anyhow::Result<ExitCode> {
    match bench {
        Bench::Rounds(options) => rounds::run(&options, output).map(|()| ExitCode::SUCCESS),
        Bench::Golden { dir } => golden::run(&dir, output),
    }
}
