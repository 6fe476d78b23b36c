//! `tabmesh-sim audit`: attacks on our own code, each beside controls that it must catch.

mod adapter;
mod bounds;
mod corpus;
mod forest;
mod guess;
mod inversion;
mod mechanism;
mod membership;
pub mod noninterference;
mod one_run;
mod reconstruction;
mod record;
mod release;
mod round;
mod sampler;
mod setting;
mod shares;

use std::path::Path;
use std::process::ExitCode;

use anstream::println;
use anyhow::{Context, ensure};
use clap::Subcommand;
use comfy_table::{Table, presets};
use rand::SeedableRng;
use rand::rngs::OsRng;
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tabmesh_privacy::accountant::zcdp;
use tabmesh_privacy::budget::{Delta, Epsilon};

use self::guess::Guesses;
use self::mechanism::{Finding, Subject};
use self::one_run::Run;
use self::record::Outcome;
use crate::cli::Output;
use crate::process::unix_ms;

/// What is attacked.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// Clipping, integers and noise: can one vector tell whether one unit was in it?
    ///
    /// Exit code 0 if the shipped code keeps its claim and every control (half the noise, a loose clip, no noise for no
    /// rows, thin shares or too few of them in a secure sum) is caught; 1 otherwise.
    Mechanism {
        /// ε of the audited use, at δ = 1e-5.
        #[arg(long, default_value_t = 4.7, value_parser = epsilon)]
        epsilon: f64,
        /// Vectors with and vectors without the unit.
        #[arg(long, default_value_t = DEFAULT_TRIALS, value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
        trials: u32,
    },
    /// The samplers: do draws have the distribution that costs are worked out for, at scales from 0.5 to 1234.567?
    ///
    /// Exit code 0 if chi-square and variance fit the exact ones and every control (continuous noise, rounded) is told; 1 otherwise.
    Sampler {
        /// Draws of each sampler at each scale.
        #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(100_000..=100_000_000))]
        draws: u32,
    },
    /// All four stages of a release: can somebody's label be solved for from the noisy counts?
    ///
    /// Exit code 0 if the shipped code keeps its claim and every control (less noise, no noise) is caught; 1 otherwise.
    Reconstruction {
        /// ε of a plan without rounds, at δ = 1e-5.
        #[arg(long, default_value_t = 3.0, value_parser = plan_epsilon)]
        epsilon: f64,
        /// Releases attacked for each row of the result.
        #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(500..=100_000))]
        trials: u32,
    },
    /// All four stages of a release: can one who knows everybody else tell whether a unit was in the table?
    ///
    /// Exit code 0 if the shipped code keeps its claim and every control (half the noise, no bound on the rows of a unit, no
    /// noise) is caught; 1 otherwise. The attack is the strongest there is and comes close to the claim: near ε = 1 it takes
    /// 20,000 trials to tell the claim from half the noise surely.
    Membership {
        /// ε of a plan without rounds, at δ = 1e-5.
        #[arg(long, default_value_t = 3.0, value_parser = plan_epsilon)]
        epsilon: f64,
        /// Releases with and releases without the unit, for each row of the result.
        #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(500..=100_000))]
        trials: u32,
    },
    /// The synthetic rows that a release becomes: can one who has them and knows everybody else tell whether a unit was counted?
    ///
    /// Exit code 0 if the shipped code keeps its claim and every control (a tenth of the noise, no noise) is caught; 1 otherwise.
    Corpus {
        /// ε of a plan without rounds, at δ = 1e-5.
        #[arg(long, default_value_t = 3.0, value_parser = plan_epsilon)]
        epsilon: f64,
        /// Corpora with and corpora without the unit, for each row of the result; as many again set the threshold.
        #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(400..=100_000))]
        trials: u32,
    },
    /// The adapter that all rounds of a plan make: can one who has it tell whether a row was trained on?
    ///
    /// The likelihood-ratio attack with shadow adapters. Exit code 0 if the shipped code keeps its claim and the control (no
    /// noise) is caught; 1 otherwise.
    Adapter {
        /// ε of the plan, at δ = 1e-5; its rounds have half of the budget.
        #[arg(long, default_value_t = 3.0, value_parser = plan_epsilon)]
        epsilon: f64,
        /// Adapters with and adapters without the row, for each row of the result; 64 more are the attacker's shadows.
        #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(60..=100_000))]
        trials: u32,
    },
    /// The noised sums of all rounds that learn a forest: can one who sees them all and knows everybody else tell whether a unit was there?
    ///
    /// Exit code 0 if the shipped code keeps its claim and every control (half the noise, no clip, no noise) is caught; 1 otherwise.
    /// The attack is the strongest there is and comes close to the claim.
    Forest {
        /// ε of the plan, at δ = 1e-5; its rounds have half of the budget.
        #[arg(long, default_value_t = 3.0, value_parser = plan_epsilon)]
        epsilon: f64,
        /// Pairs of forests with and without the unit, for each row of the result.
        #[arg(long, default_value_t = 4_000, value_parser = clap::value_parser!(u32).range(200..=100_000))]
        trials: u32,
    },
    /// One vector with many units in or out by a coin, counts and gradients: how many guesses about it are right?
    ///
    /// Exit code 0 if the shipped code keeps its claim and every control (less noise, no bound on the rows of a unit, no clip,
    /// no noise) is caught; 1 otherwise.
    OneRun {
        /// ε of the vector, at δ = 1e-5. More than 2.5 can't be refuted by as many guesses as are made about gradients.
        #[arg(long, default_value_t = 2.0, value_parser = one_run_epsilon)]
        epsilon: f64,
    },
    /// The whole loop on neighbouring tables with equal seeds: does anything but the noised payload differ?
    ///
    /// Coordinator and agents run in this process over mutual TLS; every stream, log line and record is compared. Exit code 0 if
    /// nothing differs and every leak that is planted into what a loop left behind is seen; 1 otherwise. A minute or two.
    Noninterference {
        /// Where the noise is added; both if none is named.
        #[arg(long, value_enum)]
        placement: Option<noninterference::Placement>,
    },
    /// One round, of an adapter and of a forest: can a row be read from the vector that an agent with few rows sends?
    ///
    /// Exit code 0 if the shipped code keeps its claim and every control (a tenth of the noise, no noise) is caught; 1 otherwise.
    Inversion {
        /// ε of the plan, at δ = 1e-5; its rounds (twelve of an adapter, twenty of a forest) have half of the budget.
        #[arg(long, default_value_t = 3.0, value_parser = plan_epsilon)]
        epsilon: f64,
        /// Vectors attacked for each row of the result.
        #[arg(long, default_value_t = 6_400, value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
        trials: u32,
    },
}

fn epsilon(text: &str) -> Result<f64, String> {
    within(text, 0.1, 20.0)
}

/// Within these an attack on a few hundred releases or vectors tells the controls from the claim.
fn plan_epsilon(text: &str) -> Result<f64, String> {
    within(text, 1.0, 8.0)
}

fn one_run_epsilon(text: &str) -> Result<f64, String> {
    within(text, 1.0, 2.5)
}

fn within(text: &str, least: f64, most: f64) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(format!("expected a number from {least} to {most}, got {text:?}")),
    }
}

/// Attacks and prints; what was found goes on record in a file, if one is named.
///
/// # Errors
/// Whatever keeps the attack from being made.
pub fn run(audit: Audit, output: Output, record: Option<&Path>) -> anyhow::Result<ExitCode> {
    let mut rng = ChaCha20Rng::try_from_rng(&mut OsRng).context("randomness of the operating system")?;
    let (passed, outcomes) = match audit {
        Audit::Mechanism { epsilon, trials } => {
            let findings = mechanism_findings(epsilon, trials, &mut rng)?;
            let passed = mechanism_passed(&findings);
            show(output, passed, &findings, print)?;
            (passed, Outcome::of_mechanism(&findings))
        }
        Audit::Reconstruction { epsilon, trials } => {
            guessed(output, "reconstruction", &reconstruction::audit(epsilon, trials as usize, &mut rng)?)?
        }
        Audit::Membership { epsilon, trials } => {
            guessed(output, "membership", &membership::audit(epsilon, trials as usize, &mut rng)?)?
        }
        Audit::Corpus { epsilon, trials } => {
            guessed(output, "corpus", &corpus::audit(epsilon, trials as usize, &mut rng)?)?
        }
        Audit::Adapter { epsilon, trials } => {
            guessed(output, "adapter", &adapter::audit(epsilon, trials as usize, &mut rng)?)?
        }
        Audit::Forest { epsilon, trials } => {
            guessed(output, "forest", &forest::audit(epsilon, trials as usize, &mut rng)?)?
        }
        Audit::Inversion { epsilon, trials } => {
            let mut found = inversion::audit(epsilon, trials as usize, &mut rng)?;
            found.extend(forest::inversion(epsilon, trials as usize, &mut rng)?);
            guessed(output, "inversion", &found)?
        }
        Audit::Sampler { draws } => {
            ensure!(record.is_none(), "a fit proves no epsilon, so there is nothing to put on record");
            let fits = sampler::audit(draws as usize, &mut rng)?;
            let passed = fits.iter().all(sampler::Fit::as_it_must);
            show(output, passed, &fits, print_fits)?;
            (passed, Vec::new())
        }
        Audit::Noninterference { placement } => {
            ensure!(
                record.is_none(),
                "non-interference proves no epsilon, so there is nothing to put on record"
            );
            let findings = noninterference_findings(placement)?;
            let passed = findings.iter().all(noninterference::Finding::as_it_must);
            show(output, passed, &findings, print_comparisons)?;
            (passed, Vec::new())
        }
        Audit::OneRun { epsilon } => {
            let mut runs = one_run::counts(epsilon, &mut rng)?;
            runs.extend(one_run::gradients(epsilon, &mut rng)?);
            let passed = runs.iter().all(|run| run.subject.as_it_must(run.broken));
            show(output, passed, &runs, print_runs)?;
            (passed, Outcome::of_runs(&runs))
        }
    };
    if let Some(path) = record {
        record::add(path, &outcomes, unix_ms())?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn noninterference_findings(
    placement: Option<noninterference::Placement>,
) -> anyhow::Result<Vec<noninterference::Finding>> {
    let both = [noninterference::Placement::Local, noninterference::Placement::SecureSum];
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let bar = indicatif::ProgressBar::new_spinner();
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    let mut findings = Vec::new();
    for placement in both.into_iter().filter(|known| placement.is_none_or(|wanted| wanted == *known)) {
        let tell = |doing: &str| bar.set_message(doing.to_owned());
        findings.extend(runtime.block_on(noninterference::audit(placement, tell))?);
    }
    bar.finish_and_clear();
    Ok(findings)
}

/// Attacks the mechanism at an ε and puts what was found on record, without a word.
///
/// # Errors
/// The claim is broken or a control isn't caught; the record can't be written.
pub(crate) fn mechanism_on_record(epsilon: f64, path: &Path) -> anyhow::Result<()> {
    let mut rng = ChaCha20Rng::try_from_rng(&mut OsRng).context("randomness of the operating system")?;
    let findings = mechanism_findings(epsilon, DEFAULT_TRIALS, &mut rng)?;
    ensure!(mechanism_passed(&findings), "the audit of the mechanism failed: {findings:?}");
    record::add(path, &Outcome::of_mechanism(&findings), unix_ms())
}

fn mechanism_findings(epsilon: f64, trials: u32, rng: &mut ChaCha20Rng) -> anyhow::Result<Vec<Finding>> {
    let delta = Delta::new(DELTA)?;
    let rho = zcdp::rho_for(Epsilon::new(epsilon)?, delta);
    Subject::ALL
        .into_iter()
        .map(|subject| mechanism::audit(subject, rho, delta, trials as usize, rng))
        .collect()
}

fn mechanism_passed(findings: &[Finding]) -> bool {
    findings.iter().all(|finding| finding.broken != finding.subject.is_shipped())
}

/// Prints how guesses went; says whether all went as they must, and what goes on record.
fn guessed(output: Output, audit: &'static str, guesses: &[Guesses]) -> anyhow::Result<(bool, Vec<Outcome>)> {
    let passed = guesses.iter().all(Guesses::as_it_must);
    show(output, passed, guesses, print_guesses)?;
    Ok((passed, Outcome::of_guesses(audit, guesses)))
}

fn show<T: Serialize>(output: Output, passed: bool, findings: &[T], print: fn(&[T])) -> anyhow::Result<()> {
    match output {
        Output::Json => println!("{}", serde_json::json!({ "passed": passed, "findings": findings })),
        Output::Text => {
            print(findings);
            println!("{}", if passed { "passed" } else { "FAILED" });
        }
    }
    Ok(())
}

fn print_guesses(guesses: &[Guesses]) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "attack",
        "what",
        "right",
        "97.5 % bounds",
        "without it",
        "allowed",
        "claimed epsilon",
        "exact",
        "found",
        "verdict",
    ]);
    for guess in guesses {
        let [low, high] = guess.interval;
        table.add_row([
            guess.attack.to_owned(),
            guess.subject.words().to_owned(),
            format!("{:.4}", guess.rate),
            format!("{low:.4} to {high:.4}"),
            format!("{:.4}", guess.prior),
            format!("{:.4}", guess.allowed),
            format!("{:.2}", guess.claimed),
            format!("{:.2}", guess.exact),
            format!("{:.2}", guess.found),
            guess.subject.verdict(guess.broken).to_owned(),
        ]);
    }
    println!("{table}");
    let trials = guesses.iter().map(|guess| guess.trials).max().unwrap_or(0);
    println!(
        "up to {trials} guesses a row; found: the epsilon at delta {DELTA} that the lower bound of the rate needs, at 97.5 %"
    );
}

fn print_comparisons(findings: &[noninterference::Finding]) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["noise", "what", "may differ", "messages", "differs", "verdict"]);
    for finding in findings {
        let what =
            if finding.control { format!("control: {}", finding.what) } else { finding.what.to_owned() };
        let verdict = match (finding.control, finding.as_it_must()) {
            (false, true) => "nothing leaks",
            (false, false) => "LEAKS",
            (true, seen) => caught(seen),
        };
        table.add_row([
            finding.placement.words().to_owned(),
            what,
            finding.may_differ.to_owned(),
            finding.messages.to_string(),
            finding.differences.first().cloned().unwrap_or_default(),
            verdict.to_owned(),
        ]);
    }
    println!("{table}");
}

fn print_fits(fits: &[sampler::Fit]) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "sampler",
        "scale",
        "chi-square",
        "cells - 1",
        "p",
        "variance, in its errors",
        "verdict",
    ]);
    for fit in fits {
        let verdict = match (fit.as_it_must(), fit.told()) {
            (true, false) => "fits",
            (true, true) => "caught",
            (false, true) => "DOES NOT FIT",
            (false, false) => "NOT CAUGHT",
        };
        table.add_row([
            fit.sampler.words().to_owned(),
            fit.scale.to_string(),
            format!("{:.1}", fit.chi_squared),
            fit.degrees.to_string(),
            format!("{:.2e}", fit.p),
            format!("{:+.2}", fit.variance_errors),
            verdict.to_owned(),
        ]);
    }
    println!("{table}");
    let draws = fits.first().map_or(0, |fit| fit.draws);
    println!("{draws} draws a row; a sampler as it should be fails one row in ten million");
}

fn print_runs(runs: &[Run]) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "vector",
        "what",
        "units",
        "guesses",
        "right",
        "claimed epsilon",
        "exact",
        "found",
        "verdict",
    ]);
    for run in runs {
        table.add_row([
            run.vector.to_owned(),
            run.subject.words().to_owned(),
            run.canaries.to_string(),
            run.guesses.to_string(),
            run.right.to_string(),
            format!("{:.2}", run.claimed),
            format!("{:.2}", run.exact),
            format!("{:.2}", run.found),
            run.subject.verdict(run.broken).to_owned(),
        ]);
    }
    println!("{table}");
    println!(
        "one vector a row; found: the largest epsilon at delta {DELTA} that the right guesses refute, at 95 %"
    );
}

fn print(findings: &[Finding]) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["what", "claimed epsilon", "exact", "found, added", "found, removed", "verdict"]);
    for finding in findings {
        let verdict = match (finding.subject.is_shipped(), finding.broken) {
            (true, false) => "keeps its claim",
            (true, true) => "BREAKS ITS CLAIM",
            (false, broken) => caught(broken),
        };
        let figures = [finding.claimed, finding.exact, finding.found[0], finding.found[1]];
        let figures = figures.map(|figure| format!("{figure:.2}"));
        table.add_row(
            [finding.subject.words().to_owned()].into_iter().chain(figures).chain([verdict.to_owned()]),
        );
    }
    println!("{table}");
    let trials = findings.first().map_or(0, |finding| finding.trials);
    println!(
        "lower bounds on epsilon at delta {DELTA} from {trials} vectors each; every error rate bounded at 97.5 %"
    );
}

fn caught(broken: bool) -> &'static str {
    if broken { "caught" } else { "NOT CAUGHT" }
}

/// Vectors with and without the unit, if nobody says how many.
const DEFAULT_TRIALS: u32 = 20_000;
/// δ of the claim.
const DELTA: f64 = 1e-5;
