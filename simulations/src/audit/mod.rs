//! `tabmesh-sim audit`: attacks on our own code, each beside controls that it must catch.

mod bounds;
mod mechanism;

use std::process::ExitCode;

use anstream::println;
use anyhow::Context;
use clap::Subcommand;
use comfy_table::{Table, presets};
use rand::SeedableRng;
use rand::rngs::OsRng;
use rand_chacha::ChaCha20Rng;
use tabmesh_privacy::accountant::zcdp;
use tabmesh_privacy::budget::{Delta, Epsilon};

use self::mechanism::{Finding, Subject};
use crate::cli::Output;

/// What is attacked.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// Clipping, integers and noise: can one vector tell whether one unit was in it?
    ///
    /// Exit code 0 if the shipped code keeps its claim and every control (half the noise, a loose clip, no noise for no
    /// rows) is caught; 1 otherwise.
    Mechanism {
        /// ε of the audited use, at δ = 1e-5.
        #[arg(long, default_value_t = 4.7, value_parser = epsilon)]
        epsilon: f64,
        /// Vectors with and vectors without the unit.
        #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
        trials: u32,
    },
}

fn epsilon(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.1..=20.0).contains(&value) => Ok(value),
        _ => Err(format!("expected a number from 0.1 to 20, got {text:?}")),
    }
}

/// Attacks and prints.
///
/// # Errors
/// Whatever keeps the attack from being made.
pub fn run(audit: Audit, output: Output) -> anyhow::Result<ExitCode> {
    let Audit::Mechanism { epsilon, trials } = audit;
    let delta = Delta::new(DELTA)?;
    let rho = zcdp::rho_for(Epsilon::new(epsilon)?, delta);
    let mut rng = ChaCha20Rng::try_from_rng(&mut OsRng).context("randomness of the operating system")?;
    let mut findings = Vec::new();
    for subject in Subject::ALL {
        findings.push(mechanism::audit(subject, rho, delta, trials as usize, &mut rng)?);
    }
    let passed = findings.iter().all(|finding| finding.broken == (finding.subject != Subject::Shipped));
    match output {
        Output::Json => println!("{}", serde_json::json!({ "passed": passed, "findings": findings })),
        Output::Text => print(&findings, passed),
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(findings: &[Finding], passed: bool) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["what", "claimed epsilon", "exact", "found, added", "found, removed", "verdict"]);
    for finding in findings {
        let (what, verdict) = match (finding.subject, finding.broken) {
            (Subject::Shipped, false) => ("the shipped code", "keeps its claim"),
            (Subject::Shipped, true) => ("the shipped code", "BREAKS ITS CLAIM"),
            (Subject::HalfSigma, broken) => ("control: half the noise", caught(broken)),
            (Subject::LooseClip, broken) => ("control: clip off by the root of 2", caught(broken)),
            (Subject::SilentWhenEmpty, broken) => ("control: no noise for no rows", caught(broken)),
        };
        let figures = [finding.claimed, finding.exact, finding.found[0], finding.found[1]];
        let figures = figures.map(|figure| format!("{figure:.2}"));
        table.add_row([what.to_owned()].into_iter().chain(figures).chain([verdict.to_owned()]));
    }
    println!("{table}");
    let trials = findings.first().map_or(0, |finding| finding.trials);
    println!(
        "lower bounds on epsilon at delta {DELTA} from {trials} vectors each; every error rate bounded at 97.5 %"
    );
    println!("{}", if passed { "passed" } else { "FAILED" });
}

fn caught(broken: bool) -> &'static str {
    if broken { "caught" } else { "NOT CAUGHT" }
}

/// δ of the claim.
const DELTA: f64 = 1e-5;
