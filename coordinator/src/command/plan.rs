//! `tabmesh-coordinator plan`: schema, validate, cost, submit, status, watch, cancel.

use std::path::Path;
use std::process::ExitCode;

use anstream::println;
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use miette::{IntoDiagnostic, WrapErr};
use tabmesh_federation::plan::Plan;
use tabmesh_proto::client::OperatorClient;
use tabmesh_proto::message::{Id, PlanSummary};

use super::client::link;
use super::cost;
use super::files::read;
use crate::cli::{Output, PlanAction};

/// Runs one of the plan commands.
pub(crate) async fn run(action: PlanAction) -> miette::Result<ExitCode> {
    match action {
        PlanAction::Schema => {
            println!("{}", serde_json::to_string_pretty(&Plan::json_schema()).into_diagnostic()?);
            Ok(ExitCode::SUCCESS)
        }
        PlanAction::Validate { plan, client } => validate(&plan, client.as_deref()).await,
        PlanAction::Cost { plan: path, output, svg } => {
            let (plan, digest) = Plan::parse(&read(&path)?, &path.display().to_string())?;
            cost::run(&plan, digest, output, svg.as_deref())
        }
        PlanAction::Submit { plan, client, detach, output } => {
            let yaml = read(&plan)?;
            check(&plan, &yaml)?;
            let operator = OperatorClient::new(client.connect().await?);
            let summary =
                operator.submit_plan(yaml).await.into_diagnostic().wrap_err("the plan was not admitted")?;
            if detach {
                show(&[summary], output)?;
                return Ok(ExitCode::SUCCESS);
            }
            follow(&operator, &summary.plan_id, output).await
        }
        PlanAction::Status { id: None, client, output } => {
            let operator = OperatorClient::new(client.connect().await?);
            show(&operator.list_plans().await.into_diagnostic()?, output)?;
            Ok(ExitCode::SUCCESS)
        }
        PlanAction::Status { id: Some(id), client, output } => {
            let operator = OperatorClient::new(client.connect().await?);
            show(&[operator.plan_status(&parse(&id)?).await.into_diagnostic()?], output)?;
            Ok(ExitCode::SUCCESS)
        }
        PlanAction::Watch { id, client, output } => {
            let operator = OperatorClient::new(client.connect().await?);
            follow(&operator, &parse(&id)?, output).await
        }
        PlanAction::Cancel { id, client } => {
            let operator = OperatorClient::new(client.connect().await?);
            let summary = operator.cancel_plan(&parse(&id)?).await.into_diagnostic()?;
            let cancelled = summary.phase.starts_with("cancelled");
            show(&[summary], Output::Text)?;
            if !cancelled {
                eprintln!("the plan was over before; nothing was stopped");
            }
            Ok(if cancelled { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

async fn validate(path: &Path, client: Option<&Path>) -> miette::Result<ExitCode> {
    let yaml = read(path)?;
    let plan = check(path, &yaml)?;
    let budget = plan.budget()?;
    println!("{}: epsilon {}, delta {}", plan.name, plan.privacy.epsilon, plan.privacy.delta);
    println!("  rho {} in all: {} for four release stages,", budget.total, budget.release);
    println!("  {} for {} rounds, {} each", budget.rounds, plan.rounds.count, budget.per_round);
    if let Some(client) = client {
        let operator = OperatorClient::new(link(client).await?);
        let answer = operator.validate_plan(yaml).await.into_diagnostic()?;
        for finding in &answer.findings {
            println!("  {} {}", finding.path, finding.text);
        }
        if !answer.valid {
            return Ok(ExitCode::FAILURE);
        }
        println!("  the coordinator would admit it");
    }
    Ok(ExitCode::SUCCESS)
}

async fn follow(operator: &OperatorClient, id: &Id, output: Output) -> miette::Result<ExitCode> {
    let bar = match output {
        Output::Text => {
            let style = ProgressStyle::with_template("{bar:30} {percent}% {msg}");
            ProgressBar::new(1000).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        }
        Output::Json => ProgressBar::hidden(),
    };
    let mut events = operator.watch_plan(id, 0).await.into_diagnostic()?;
    while let Some(event) = events.next().await.into_diagnostic()? {
        match output {
            Output::Json => {
                let line = serde_json::json!({
                    "seq": event.seq, "time_ms": event.time_ms, "phase": event.phase,
                    "detail": event.detail, "progress": event.progress,
                });
                println!("{line}");
            }
            Output::Text => {
                // The cast saturates: progress is within 0 and 1.
                bar.set_position((event.progress * 1000.0) as u64);
                bar.set_message(event.phase.clone());
                bar.println(format!("{}: {}", event.phase, event.detail));
            }
        }
    }
    bar.finish_and_clear();
    let summary = operator.plan_status(id).await.into_diagnostic()?;
    show(std::slice::from_ref(&summary), output)?;
    Ok(if summary.phase.starts_with("done") { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(plans: &[PlanSummary], output: Output) -> miette::Result<()> {
    match output {
        Output::Json => {
            for plan in plans {
                let job: serde_json::Value = serde_json::from_slice(&plan.document).unwrap_or_default();
                let line = serde_json::json!({
                    "plan_id": plan.plan_id.as_str(), "name": plan.name, "phase": plan.phase,
                    "progress": plan.progress, "created_ms": plan.created_ms, "updated_ms": plan.updated_ms,
                    "job": job,
                });
                println!("{line}");
            }
        }
        Output::Text => {
            let mut table = Table::new();
            table.set_header(["plan", "name", "phase", "done"]);
            for plan in plans {
                table.add_row([
                    plan.plan_id.to_string(),
                    plan.name.clone(),
                    plan.phase.clone(),
                    format!("{:.0} %", plan.progress * 100.0),
                ]);
            }
            println!("{table}");
        }
    }
    Ok(())
}

fn check(path: &Path, yaml: &[u8]) -> miette::Result<Plan> {
    let (plan, _) = Plan::parse(yaml, &path.display().to_string())?;
    Ok(plan)
}

fn parse(id: &str) -> miette::Result<Id> {
    id.parse().into_diagnostic().wrap_err("plan ids are the 64 hexadecimal digits that `plan status` lists")
}
