//! `tabmesh-agent levels`: which values a column has that nobody declared, as far as privacy lets anybody say.
//!
//! A contract has to declare the levels of a categorical feature, and nothing may write them there from rows without a debit. Where no
//! code book lists them, a threshold histogram finds the common ones at a price in the budget. The answer stays here; what its
//! owner declares from it is as public as the contract.

use std::process::ExitCode;

use anstream::println;
use comfy_table::{CellAlignment, Table};
use miette::{IntoDiagnostic, miette};
use serde_json::json;
use tabmesh_contract::contract::Role;
use tabmesh_privacy::accountant::zcdp;
use tabmesh_privacy::budget::Epsilon;
use tabmesh_privacy::mechanism::threshold::{LEAST_DELTA, MOST_EPSILON, SURCHARGE, THRESHOLD_DELTA};
use tabmesh_privacy::mechanism::{FoundLevels, ThresholdHistogram};
use tabmesh_privacy::noise::NoiseSource;

use crate::Local;
use crate::books::Books;
use crate::cli::Output;
use crate::work::record_grant;

/// What is asked.
pub(crate) struct Asked<'a> {
    pub(crate) column: &'a str,
    pub(crate) epsilon: f64,
    /// Whether to ask, instead of saying what it would cost.
    pub(crate) spend: bool,
}

/// Prices the question; asks it if that is wanted.
pub(crate) fn run(
    local: &Local,
    asked: &Asked<'_>,
    noise: NoiseSource,
    output: Output,
    now_ms: i64,
) -> miette::Result<ExitCode> {
    let domain = &local.domain;
    let name = asked.column;
    let column = domain.contract.columns.iter().find(|column| column.name == name);
    let column = column.ok_or_else(|| {
        let names: Vec<&str> = domain.contract.columns.iter().map(|column| column.name.as_str()).collect();
        miette!("--column {name}: the contract declares {}", names.join(", "))
    })?;
    if column.pii || matches!(column.role, Role::Id | Role::Entity | Role::Target) {
        return Err(miette!(
            "--column {name}: it identifies somebody or is the target; only columns that could become a feature are asked about"
        ));
    }
    let (granted, delta) = (domain.policy.grant.epsilon.get(), domain.policy.grant.delta);
    if granted > MOST_EPSILON || delta.get() < LEAST_DELTA {
        return Err(miette!(
            "the grant is of epsilon {granted} at delta {}; a threshold is paid from epsilon {MOST_EPSILON} at most and delta \
             {LEAST_DELTA} at least: declare the levels from a code book",
            delta.get()
        ));
    }
    let rho = zcdp::rho_for(Epsilon::new(asked.epsilon).into_diagnostic()?, delta);
    if rho <= SURCHARGE {
        let least = zcdp::epsilon(SURCHARGE, delta).get();
        return Err(miette!("--epsilon {}: a threshold alone costs {least:.3}, give more", asked.epsilon));
    }
    let histogram = ThresholdHistogram::from_rho(domain.max_rows(), rho).into_diagnostic()?;
    let alone = zcdp::epsilon(histogram.rho(), delta).get();
    let facts = json!({
        "column": name, "epsilon_alone": alone, "delta": delta.get(), "rho": histogram.rho().as_f64(),
        "sigma": histogram.sigma(), "threshold": histogram.threshold(), "threshold_delta": THRESHOLD_DELTA,
        "unit": domain.grant().unit,
    });
    if !asked.spend {
        match output {
            Output::Json => println!("{facts}"),
            Output::Text => {
                println!("{}", price(name, alone, &histogram));
                println!("nothing was counted or spent; --spend asks");
            }
        }
        return Ok(ExitCode::SUCCESS);
    }
    let product = &domain.contract.name;
    let folder = domain.config.data_dir.join("books");
    let mut books = Books::open(&folder, noise, &domain.identity.to_string(), product).into_diagnostic()?;
    record_grant(domain, &mut books, now_ms).into_diagnostic()?;
    let counts = || domain.level_counts(name);
    let payload = books.levels(name, &histogram, counts, now_ms).into_diagnostic()?;
    let found: FoundLevels = serde_json::from_slice(&payload).into_diagnostic()?;
    match output {
        Output::Json => println!("{}", json!({ "asked": facts, "levels": found.levels })),
        Output::Text => {
            println!("{}", price(name, alone, &histogram));
            print(&found);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn price(name: &str, alone: f64, histogram: &ThresholdHistogram) -> String {
    format!(
        "levels of {name}: epsilon {alone:.4} alone, counts with noise of {:.1} rows; levels of fewer than {} rows are not told",
        histogram.sigma(),
        histogram.threshold()
    )
}

fn print(found: &FoundLevels) {
    if found.levels.is_empty() {
        println!("no level has that many rows");
        return;
    }
    let mut table = Table::new();
    table.set_header(["level", "rows, noised"]);
    for (level, count) in &found.levels {
        table.add_row([level.clone(), count.to_string()]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    let quoted: Vec<String> =
        found.levels.iter().map(|(level, _)| serde_json::Value::from(level.as_str()).to_string()).collect();
    println!("for the contract: categories: [{}]", quoted.join(", "));
}
