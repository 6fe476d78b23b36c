//! `plan cost`: what a plan would cost one privacy unit, step by step, before anything runs.
//!
//! Every stage and round is discrete Gaussian noise on the whole cohort, so losses are exact integers of ρ. Four
//! figures of ε stand side by side, all cumulative and at the plan's one δ: the zCDP conversion (the claim, and what the
//! agents' filters enforce), the closed form for continuous Gaussian noise, and the two accountants of continuous noise
//! in general, the privacy loss distribution (tight) and Rényi DP over a fixed set of orders (never below it). These two
//! take the rounds as sampled where a plan samples units; the claim doesn't.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anstream::{print, println};
use comfy_table::Table;
use miette::IntoDiagnostic;
use serde::Serialize;
use tabmesh_federation::id::PlanDigest;
use tabmesh_federation::plan::{Plan, PlanBudget, SecureSumSpec};
use tabmesh_privacy::accountant::phase::{Adjacency, Phase, Step};
use tabmesh_privacy::accountant::{gdp, pld, rdp, zcdp};
use tabmesh_privacy::budget::{Delta, Epsilon, Rho};

use super::files::write;
use crate::cli::Output;

/// What a plan costs one unit.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Cost {
    plan: String,
    digest: String,
    adjacency: &'static str,
    /// Who adds the noise, and what the figures assume.
    noise_placement: String,
    /// Share of units in a round; the claim is as if all took part.
    sampling_rate: f64,
    epsilon_granted: f64,
    delta: f64,
    /// In order of execution.
    steps: Vec<StepCost>,
    total: Total,
}

/// One release stage or round.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct StepCost {
    step: String,
    rho_units: u64,
    rho: f64,
    /// Standard deviation of the noise over the L2 sensitivity.
    noise_multiplier: f64,
    /// ε of this step by itself; these don't add up to the total.
    epsilon_alone: f64,
    /// ε of everything up to and including this step.
    #[serde(flatten)]
    so_far: Figures,
}

/// ε by each accountant.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Figures {
    epsilon_zcdp: f64,
    epsilon_gaussian: f64,
    epsilon_pld: f64,
    epsilon_rdp: f64,
}

/// Equal steps in a row.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Run {
    rho: Rho,
    /// Share of units that take part.
    rate: f64,
    count: u64,
}

impl Run {
    fn phase(self) -> miette::Result<Phase> {
        let sigma = noise_multiplier(self.rho);
        let step = if self.rate < 1.0 {
            Step::SampledGaussian { rate: self.rate, sigma }
        } else {
            Step::Gaussian { sigma }
        };
        Phase::new(step, self.count).into_diagnostic()
    }
}

/// Standard deviation over sensitivity of Gaussian noise that costs ρ.
fn noise_multiplier(rho: Rho) -> f64 {
    (0.5 / rho.as_f64()).sqrt()
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Total {
    rho_units: u64,
    #[serde(flatten)]
    figures: Figures,
    /// Of the ρ that the plan's ε and δ stand for.
    share_of_budget: f64,
}

/// Prints a plan's cost, and draws it.
pub(super) fn run(
    plan: &Plan,
    digest: PlanDigest,
    output: Output,
    svg: Option<&Path>,
) -> miette::Result<ExitCode> {
    let cost = cost(plan, digest)?;
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&cost).into_diagnostic()?),
        Output::Text => print!("{}", text(&cost)),
    }
    if let Some(path) = svg {
        write(path, picture(&cost).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn cost(plan: &Plan, digest: PlanDigest) -> miette::Result<Cost> {
    let budget = plan.budget()?;
    let delta = Delta::new(plan.privacy.delta).into_diagnostic()?;
    let mut steps: Vec<StepCost> = Vec::new();
    let (mut spent, mut runs) = (Rho::ZERO, Vec::<Run>::new());
    for (step, rho, rate) in parts(plan, &budget) {
        // What was spent can't overflow: the shares are parts of one ρ.
        spent = spent.checked_add(rho).ok_or_else(|| miette::miette!("rho of the plan is out of range"))?;
        match runs.last_mut() {
            Some(last) if last.rho == rho && last.rate.total_cmp(&rate).is_eq() => last.count += 1,
            _ => runs.push(Run { rho, rate, count: 1 }),
        }
        steps.push(StepCost {
            step,
            rho_units: rho.units(),
            rho: rho.as_f64(),
            noise_multiplier: noise_multiplier(rho),
            epsilon_alone: zcdp::epsilon(rho, delta).get(),
            so_far: figures(&runs, spent, delta)?,
        });
    }
    let figures = figures(&runs, spent, delta)?;
    let share_of_budget = spent.as_f64() / budget.total.as_f64();
    Ok(Cost {
        plan: plan.name.clone(),
        digest: digest.to_string(),
        adjacency: Adjacency::AddRemove.label(),
        noise_placement: placement(plan),
        sampling_rate: plan.rounds.sampling_rate,
        epsilon_granted: plan.privacy.epsilon,
        delta: plan.privacy.delta,
        steps,
        total: Total { rho_units: spent.units(), figures, share_of_budget },
    })
}

/// Who adds the noise, in words.
fn placement(plan: &Plan) -> String {
    let Some(SecureSumSpec { colluders, dropouts, retries }) = plan.secure_sum() else {
        return "local noise: each agent adds all of it".to_owned();
    };
    let least = plan.cohort.min_agents as usize;
    let again = match retries {
        0 => String::new(),
        some => format!(
            "; {some} more sums of the release and {some} of the rounds may be attempted again, which is reserved and not \
             in the figures"
        ),
    };
    format!(
        "secure sums: the figures hold against the coordinator and {colluders} colluding agents, with {dropouts} missing; \
         if all others collude, a step costs {} times its rho in a cohort of {least}{again}",
        plan.counted(least).unwrap_or(1)
    )
}

/// Steps in order, each with its ρ and the share of units in it.
fn parts(plan: &Plan, budget: &PlanBudget) -> Vec<(String, Rho, f64)> {
    let stages = ["one-way counts", "label pairs", "structure", "tree"];
    let release =
        stages.iter().zip(budget.per_stage).map(|(name, rho)| (format!("release: {name}"), rho, 1.0));
    let rate = plan.rounds.sampling_rate;
    let rounds = (1..=plan.rounds.count).map(|round| (format!("round {round}"), budget.per_round, rate));
    release.chain(rounds).collect()
}

fn figures(runs: &[Run], spent: Rho, delta: Delta) -> miette::Result<Figures> {
    let phases = runs.iter().map(|run| run.phase()).collect::<Result<Vec<_>, _>>()?;
    let loss = pld::epsilon(&phases, Adjacency::AddRemove, delta).into_diagnostic()?;
    let renyi = rdp::epsilon(&phases, Adjacency::AddRemove, delta).into_diagnostic()?;
    Ok(Figures {
        epsilon_zcdp: zcdp::epsilon(spent, delta).get(),
        epsilon_gaussian: gdp::epsilon(spent, delta).get(),
        epsilon_pld: Epsilon::get(loss),
        epsilon_rdp: Epsilon::get(renyi),
    })
}

fn text(cost: &Cost) -> String {
    let mut table = Table::new();
    table.set_header(["step", "rho", "noise", "alone", "zCDP", "Gaussian", "PLD", "RDP"]);
    for step in &cost.steps {
        let figures = step.so_far;
        table.add_row([
            step.step.clone(),
            format!("{:.6}", step.rho),
            format!("{:.2}", step.noise_multiplier),
            format!("{:.4}", step.epsilon_alone),
            format!("{:.4}", figures.epsilon_zcdp),
            format!("{:.4}", figures.epsilon_gaussian),
            format!("{:.4}", figures.epsilon_pld),
            format!("{:.4}", figures.epsilon_rdp),
        ]);
    }
    let mut out = format!(
        "{}: epsilon {} at delta {}, {}; noise in multiples of the sensitivity, epsilon cumulative\n{}\n{table}\n\n",
        cost.plan, cost.epsilon_granted, cost.delta, cost.adjacency, cost.noise_placement
    );
    let width = cost.steps.iter().map(|step| step.step.len()).max().unwrap_or(0);
    for step in &cost.steps {
        let epsilon = step.so_far.epsilon_zcdp;
        // Between 0 and 1 of the bar; the cast saturates.
        let filled = ((epsilon / cost.epsilon_granted).min(1.0) * BAR as f64).round() as usize;
        let (bar, rest) = ("█".repeat(filled), "░".repeat(BAR - filled));
        // Writing to a String can't fail.
        let _ = writeln!(out, "{:width$} {bar}{rest} {epsilon:.3}", step.step);
    }
    let Figures { epsilon_zcdp, epsilon_pld, epsilon_rdp, .. } = cost.total.figures;
    let sampled = if cost.sampling_rate < 1.0 {
        format!(" with a sample of {} in each round, which the claim doesn't count", cost.sampling_rate)
    } else {
        String::new()
    };
    let _ = writeln!(
        out,
        "\nin all: epsilon {epsilon_zcdp:.4} by zCDP (the claim); of continuous noise{sampled} {epsilon_pld:.4} by privacy loss \
         distribution, {epsilon_rdp:.4} by Renyi DP; {:.1} % of the budget",
        cost.total.share_of_budget * 100.0
    );
    out
}

/// Bars of ε over the steps, and a line at what was granted; needs nothing from outside.
fn picture(cost: &Cost) -> String {
    let highest = cost.total.figures.epsilon_rdp.max(cost.epsilon_granted) * 1.05;
    let (width, height, margin) = (800.0, 300.0, 45.0);
    let bar = (width - 2.0 * margin) / cost.steps.len().max(1) as f64;
    let y = |epsilon: f64| height - margin - epsilon / highest * (height - 2.0 * margin);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>{}: epsilon over the plan's steps</title>\n<rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n",
        escaped(&cost.plan)
    );
    for (at, step) in cost.steps.iter().enumerate() {
        let x = margin + at as f64 * bar;
        let Figures { epsilon_zcdp, epsilon_rdp, .. } = step.so_far;
        for (epsilon, fill) in [(epsilon_rdp, "#c9d7e8"), (epsilon_zcdp, "#2f5d8a")] {
            let _ = writeln!(
                out,
                "<rect x=\"{x:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{:.2}\" fill=\"{fill}\"><title>{}: {epsilon:.4}</title></rect>",
                y(epsilon),
                bar * 0.8,
                height - margin - y(epsilon),
                escaped(&step.step)
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{x:.2}\" y=\"{:.2}\" font-size=\"10\">{}</text>",
            height - margin + 13.0,
            at + 1
        );
        // Figures of narrow bars would run into each other; the last is always told.
        if bar >= NARROWEST_LABELLED_BAR || at + 1 == cost.steps.len() {
            let _ = writeln!(
                out,
                "<text x=\"{:.2}\" y=\"{:.2}\" font-size=\"10\" fill=\"#fff\" text-anchor=\"middle\" \
                 transform=\"rotate(-90 {0:.2} {1:.2})\">{epsilon_zcdp:.2}</text>",
                x + bar * 0.4 + 3.5,
                (y(epsilon_zcdp) + 18.0).min(height - margin - 14.0),
            );
        }
    }
    let granted = y(cost.epsilon_granted);
    let _ = write!(
        out,
        "<line x1=\"{margin}\" x2=\"{:.0}\" y1=\"{granted:.2}\" y2=\"{granted:.2}\" stroke=\"#a33\" stroke-dasharray=\"5 4\"/>\n\
         <text x=\"{margin}\" y=\"{:.2}\">granted: epsilon {} at delta {}</text>\n\
         <text x=\"{margin}\" y=\"{:.0}\">steps of {}: four release stages, then rounds; dark zCDP, light Renyi DP</text>\n</svg>\n",
        width - margin,
        granted - 6.0,
        cost.epsilon_granted,
        cost.delta,
        height - 15.0,
        escaped(&cost.plan),
    );
    out
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const BAR: usize = 40;
/// Width below which a bar of the picture carries no figure.
const NARROWEST_LABELLED_BAR: f64 = 14.0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn priced(rounds: &str) -> Cost {
        let yaml = format!("kind: TabmeshPlan\nname: income\ntarget: person.income\n{rounds}");
        let (plan, digest) = Plan::parse(yaml.as_bytes(), "plan.yaml").unwrap();
        cost(&plan, digest).unwrap()
    }

    #[test]
    fn the_last_step_is_the_total_and_stays_within_what_was_granted() {
        let cost = priced("rounds: {count: 7}\n");
        assert_eq!(cost.steps.len(), 4 + 7);
        let last = cost.steps.last().unwrap();
        assert_eq!(last.so_far, cost.total.figures);
        assert_eq!(cost.total.rho_units, cost.steps.iter().map(|step| step.rho_units).sum::<u64>());
        assert!(last.so_far.epsilon_zcdp <= cost.epsilon_granted);
        assert!(cost.total.share_of_budget > 0.999 && cost.total.share_of_budget <= 1.0);
    }

    #[test]
    fn a_secure_sum_costs_the_same_and_says_under_which_assumptions() {
        let local = priced("cohort: {min_agents: 6}\n");
        let sums = priced("cohort: {min_agents: 6}\nprivacy: {noise_placement: secure_sum}\n");
        assert_eq!(local.steps, sums.steps);
        assert!(local.noise_placement.starts_with("local"), "{}", local.noise_placement);
        let text = text(&sums);
        assert!(
            text.contains("1 colluding agents, with 1 missing") && text.contains("4 times its rho"),
            "{text}"
        );
    }

    #[test]
    fn figures_grow_and_keep_their_order() {
        let cost = priced("");
        let mut last = 0.0;
        for step in &cost.steps {
            let Figures { epsilon_zcdp, epsilon_gaussian, epsilon_pld, epsilon_rdp } = step.so_far;
            assert!(
                epsilon_gaussian < epsilon_zcdp && epsilon_zcdp <= epsilon_rdp * (1.0 + 1e-9),
                "{step:?}"
            );
            // Without sampling the distribution has a closed form, which its discretisation rounds up.
            assert!(
                epsilon_pld >= epsilon_gaussian
                    && epsilon_pld <= epsilon_gaussian * 1.001
                    && epsilon_pld < epsilon_rdp,
                "{step:?}"
            );
            assert!(epsilon_zcdp > last, "{step:?}");
            last = epsilon_zcdp;
        }
    }

    #[test]
    fn a_sample_of_units_costs_less_by_both_accountants_and_the_claim_stays() {
        let all = priced("rounds: {count: 20, sampling_rate: 1}\n");
        let tenth = priced("rounds: {count: 20, sampling_rate: 0.1}\n");
        let (all_figures, figures) = (all.total.figures, tenth.total.figures);
        assert_eq!(figures.epsilon_zcdp.to_bits(), all_figures.epsilon_zcdp.to_bits());
        assert!(figures.epsilon_pld < 0.95 * all_figures.epsilon_pld, "{figures:?} {all_figures:?}");
        assert!(figures.epsilon_pld < figures.epsilon_rdp, "{figures:?}");
        // The release isn't sampled.
        let release = |cost: &Cost| cost.steps[3].so_far.epsilon_pld.to_bits();
        assert_eq!(release(&tenth), release(&all));
        assert!(text(&tenth).contains("a sample of 0.1 in each round"), "{}", text(&tenth));
        assert!(!text(&all).contains("a sample of"));
    }

    #[test]
    fn text_and_picture_show_every_step() {
        let cost = priced("rounds: {count: 3}\n");
        let text = text(&cost);
        assert!(text.contains("round 3") && text.contains("release: tree") && text.contains('█'), "{text}");
        let picture = picture(&cost);
        assert_eq!(picture.matches("<rect x=").count(), 2 * (4 + 3));
        assert!(picture.starts_with("<svg") && picture.ends_with("</svg>\n"));
        assert_eq!(escaped("<a & \"b\">"), "&lt;a &amp; &quot;b&quot;&gt;");
    }
}
