//! `tabmesh-agent check`: a contract held against its table, and what a release from it would send and cost.
//!
//! Everything it prints stays on this terminal: profiles, counts and service levels are never sent. Nothing it finds in
//! the table is written into the contract: ranges and levels are the owner's to declare.

use std::path::Path;
use std::process::ExitCode;

use anstream::println;
use comfy_table::Table;
use miette::{IntoDiagnostic, miette};
use serde_json::{Value, json};
use tabmesh_contract::contract::{Contract, Purpose};
use tabmesh_contract::policy::{Aggregation, Decision, DecisionKind, Request};
use tabmesh_contract::profile::{Distinct, TableProfile};
use tabmesh_contract::quality::{Measure, QualityRule, Unit, Verdict};
use tabmesh_federation::plan::Plan;
use tabmesh_federation::release_plan::Release;
use tabmesh_privacy::mechanism::Noise;
use tabmesh_privacy::release::ReleaseQuery;

use crate::cli::Output;
use crate::config::LocalPolicy;
use crate::domain;
use crate::source::{self, TableCheck};

/// Checks contract, table, quality, service levels and policy; the exit code is 0 only if all of it passes.
pub(crate) fn run(
    contract_path: &Path,
    policy: Option<&Path>,
    cohort: u32,
    output: Output,
    now_ms: i64,
) -> miette::Result<ExitCode> {
    let (contract, _) = domain::read_contract(contract_path)?;
    let schema = contract.approved_schema().map_err(|error| miette!("{}", error.render()))?;
    let policy = policy.map(LocalPolicy::load).transpose()?;
    let folder = contract_path.parent().unwrap_or_else(|| Path::new("."));
    let source = source::open_contract(&contract, folder).into_diagnostic()?;
    let check = TableCheck::run(&*source, &contract, now_ms).into_diagnostic()?;
    let profile = &check.profile;
    let findings = findings(&check);
    let (epsilon, delta) = policy
        .as_ref()
        .map_or((DEFAULT_EPSILON, DEFAULT_DELTA), |p| (p.grant.epsilon.get(), p.grant.delta.get()));
    let decisions = decisions(&contract, policy.as_ref(), cohort, epsilon, delta)?;
    let yaml = format!(
        "kind: TabmeshPlan\nname: check\ntarget: {}\nprivacy: {{epsilon: {epsilon}, delta: {delta}}}\n",
        schema.target().id
    );
    let (plan, digest) = Plan::parse(yaml.as_bytes(), "default plan").into_diagnostic()?;
    let budget = plan.budget().into_diagnostic()?;
    let max_rows_per_unit = contract.privacy.unit.max_rows();
    let agents = plan.cohort.min_agents as usize;
    let release = Release { schema: &schema, plan: &plan, digest, budget, max_rows_per_unit, agents };
    let first = release.stage_one().into_diagnostic()?;
    let passed = check.passed() && decisions.iter().all(|d| d.allow);
    match output {
        Output::Json => {
            let answer = json!({
                "contract": contract.name,
                "passed": passed,
                "rows": profile.rows(),
                "columns": profile.columns().iter().map(|c| json!({
                    "name": c.name(), "nulls": c.nulls(), "invalid": c.invalid(), "min": c.min(), "max": c.max(),
                })).collect::<Vec<Value>>(),
                "problems": check.problems(&contract),
                "warnings": check.warnings(&contract),
                "checks": findings.iter().map(Finding::json).collect::<Vec<Value>>(),
                "policy": decisions.iter().map(Decision::log_entry).collect::<Vec<Value>>(),
                "release": { "epsilon": epsilon, "delta": delta, "features": schema.features().len(),
                    "first_stage_integers": first.cells_total() },
            });
            println!("{}", serde_json::to_string_pretty(&answer).into_diagnostic()?);
        }
        Output::Text => {
            print_profile(&contract, profile);
            print_findings(&findings);
            for problem in check.problems(&contract) {
                println!("problem: {problem}");
            }
            for warning in check.warnings(&contract) {
                println!("warning: {warning}");
            }
            print_decisions(&decisions);
            print_release(&plan, &first, schema.features().len(), epsilon, delta);
            println!("\n{}", if passed { "everything passed" } else { "NOT passed: see above" });
        }
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One check with its outcome.
struct Finding {
    what: String,
    measured: Option<f64>,
    verdict: Verdict,
}

impl Finding {
    fn json(&self) -> Value {
        json!({ "check": self.what, "measured": self.measured, "verdict": verdict(&self.verdict) })
    }
}

fn findings(check: &TableCheck) -> Vec<Finding> {
    let rules = check.quality.iter().map(|outcome| Finding {
        what: describe(&outcome.rule),
        measured: outcome.measured,
        verdict: outcome.verdict.clone(),
    });
    let levels = check.slo.iter().map(|outcome| Finding {
        what: format!("{} {}", outcome.objective.as_str(), outcome.promised),
        measured: outcome.measured,
        verdict: outcome.verdict.clone(),
    });
    rules.chain(levels).collect()
}

fn decisions(
    contract: &Contract,
    policy: Option<&LocalPolicy>,
    cohort: u32,
    epsilon: f64,
    delta: f64,
) -> miette::Result<Vec<Decision>> {
    let bundle = domain::bundle(policy.and_then(|p| p.bundle.as_deref()))?;
    let mut decisions = vec![bundle.decide_contract(DecisionKind::Registration, contract, None)];
    for (kind, purpose) in [
        (DecisionKind::Release, Purpose::CentralAggregate),
        (DecisionKind::Training, Purpose::FederatedAdapter),
    ] {
        let request = Request { purpose, epsilon, delta, cohort, aggregation: Aggregation::LocalNoise };
        decisions.push(bundle.decide_contract(kind, contract, Some(&request)));
    }
    Ok(decisions)
}

fn print_profile(contract: &Contract, profile: &TableProfile) {
    println!("{} {}: {} rows (shown here only)", contract.name, contract.version, profile.rows());
    let mut table = Table::new();
    table.set_header(["column", "role", "nulls", "distinct", "min", "max", "mean", "out of declaration"]);
    let number = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.4}"));
    for column in profile.columns() {
        let role = contract.column(column.name()).map_or("", |c| c.role.as_str());
        let distinct = match column.distinct() {
            Distinct::Exactly(count) => count.to_string(),
            Distinct::MoreThan(count) => format!("over {count}"),
        };
        table.add_row([
            column.name().to_owned(),
            role.to_owned(),
            column.nulls().to_string(),
            distinct,
            number(column.min()),
            number(column.max()),
            number(column.mean()),
            column.invalid().to_string(),
        ]);
    }
    println!("{table}");
}

fn print_findings(findings: &[Finding]) {
    if findings.is_empty() {
        println!("\nno quality rule or service level is declared");
        return;
    }
    let mut table = Table::new();
    table.set_header(["check", "measured", "verdict"]);
    for finding in findings {
        let measured = finding.measured.map_or_else(String::new, |v| format!("{v:.4}"));
        table.add_row([finding.what.clone(), measured, verdict(&finding.verdict)]);
    }
    println!("\n{table}");
}

fn print_decisions(decisions: &[Decision]) {
    println!();
    for decision in decisions {
        let word = if decision.allow { "allowed" } else { "REFUSED" };
        println!("policy, {}: {word}", decision.kind.as_str());
        for reason in &decision.reasons {
            println!("  {reason}");
        }
    }
}

fn print_release(plan: &Plan, first: &ReleaseQuery, features: usize, epsilon: f64, delta: f64) {
    println!("\nwhat a default plan at epsilon {epsilon}, delta {delta} would send from here:");
    let Ok(budget) = plan.budget() else { return };
    let sigma = first.mechanism().map_or(f64::NAN, |mechanism| mechanism.variance().sqrt());
    println!(
        "  stage 1: {} noised integers ({features} features and the label, one by one), noise sd {sigma:.1}",
        first.cells_total()
    );
    println!("  stage 2: {features} tables of (feature, label)");
    println!("  stage 3: {} coarse tables of pairs of features", features * features.saturating_sub(1) / 2);
    println!(
        "  stage 4: {features} to {} tables of a feature with the label or the feature it depends on",
        2 * features
    );
    println!("  rounds: {} times one noised vector of the adapter's size", plan.rounds.count);
    println!(
        "  cost: rho {} in all, {} for the release, {} for the rounds",
        budget.total, budget.release, budget.rounds
    );
}

fn describe(rule: &QualityRule) -> String {
    let column = rule.column.as_deref().unwrap_or("table");
    match &rule.measure {
        Measure::Library { metric, must, unit, .. } => {
            let unit = if *unit == Unit::Percent { " percent" } else { "" };
            format!("{column}: {} must {must:?}{unit}", metric.as_str())
        }
        Measure::Foreign { engine } => format!("{column}: a rule of {engine}"),
    }
}

fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Passed => "passed".to_owned(),
        Verdict::Failed => "FAILED".to_owned(),
        Verdict::Skipped(why) => format!("skipped: {why}"),
    }
}

/// ε that a release is priced at without a policy file: the default grant.
const DEFAULT_EPSILON: f64 = 3.0;
/// δ of the default grant.
const DEFAULT_DELTA: f64 = 1e-5;
