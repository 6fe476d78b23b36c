//! `tabmesh-sim bench`: figures that answer a user's question, each by one command.

pub mod rounds;

use clap::Subcommand;

use crate::cli::Output;

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// How long does a round take when training costs nothing? Real processes over mutual TLS.
    Rounds(rounds::Options),
}

/// Measures and prints.
///
/// # Errors
/// What the measurement says.
pub fn run(bench: Bench, output: Output) -> anyhow::Result<()> {
    match bench {
        Bench::Rounds(options) => rounds::run(&options, output),
    }
}
