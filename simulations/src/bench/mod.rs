//! `bench`: measurements of the product on data from outside.

pub mod raw_table;
pub mod tables;

use clap::Subcommand;

/// What is measured.
#[derive(Debug, Clone, Subcommand)]
pub enum Bench {
    /// A base without any training on single two-class tables, beside logistic regression and boosted trees.
    Tables(tables::Args),
}

/// Runs one measurement and prints its result.
///
/// # Errors
/// Data that can't be read, a base that doesn't load, or rows a model refuses.
pub fn run(bench: Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Tables(args) => tables::run(&args),
    }
}
