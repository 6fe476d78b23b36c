//! The quickstart: a deployment made, started, run through the whole flow, measured, reported, stopped.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anstream::println;
use anyhow::{Context, Result, bail, ensure};
use comfy_table::Table;
use serde::Serialize;
use serde_json::{Value, json};
use tabmesh_agent::Switches;
use tabmesh_coordinator::witness::{self, Trust};
use tabmesh_federation::peers::PeersFile;
use tabmesh_federation::plan::Plan;
use tabmesh_privacy::budget::Epsilon;
use tabmesh_privacy::report::{Report, SignedReport, render_html, verify};
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_proto::client::OperatorClient;
use tabmesh_proto::message::PlanEvent;

use super::dataset::{DOMAINS, schema};
use super::deployed::{Deployment, Lines, Setup};
use super::deployment::PlanChoices;
use super::pki::Role;
use super::{measure, predict};
use crate::audit;
use crate::cli::Output;
use crate::process::now;
use crate::score::{DomainScores, MacroScores, ScoreTable};

/// What the command line asks for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder of the deployment; temporary if none.
    pub dir: Option<PathBuf>,
    /// Whether a temporary folder is kept.
    pub keep: bool,
    /// Whether everything stays running until Ctrl-C.
    pub hold: bool,
    /// Smaller counts.
    pub fast: bool,
    /// Seed of noise and secrets.
    pub seed: Option<u64>,
    /// What the rounds train, as a plan says it.
    pub adapter: Option<String>,
    /// Whether the coordinator gets secure sums alone.
    pub secure_sum: bool,
    /// Form of the result.
    pub output: Output,
}

/// Runs the quickstart; an error means that something did not work.
///
/// # Errors
/// The first step that failed, with the log of the process concerned.
pub fn run(options: Options) -> Result<()> {
    let (root, temporary) = match &options.dir {
        Some(dir) => (dir.clone(), None),
        None => {
            let folder = tempfile::Builder::new().prefix("tabmesh-quickstart-").tempdir()?;
            (folder.path().to_owned(), Some(folder))
        }
    };
    std::fs::create_dir_all(&root)?;
    let root = root.canonicalize()?;
    // Ledgers, addresses and certificates of an earlier deployment don't go with those of a new one.
    ensure!(
        std::fs::read_dir(&root)?.next().is_none(),
        "{} is not empty: name a new folder, or remove this one",
        root.display()
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = whole(&options, &root) => outcome,
            _ = tokio::signal::ctrl_c(), if !options.hold => bail!("stopped by Ctrl-C; all processes are being stopped"),
        }
    });
    runtime.shutdown_background();
    if let Some(folder) = temporary.filter(|_| options.keep) {
        eprintln!("the deployment is kept in {}", folder.keep().display());
    }
    outcome
}

/// A step with its wall time.
#[derive(Debug, Clone, Serialize)]
struct Step {
    name: String,
    wall_s: f64,
}

/// Times steps and tells them.
struct Steps {
    done: Vec<Step>,
    began: Instant,
}

impl Steps {
    fn new() -> Self {
        Self { done: Vec::new(), began: now() }
    }

    fn end(&mut self, name: &str) {
        let wall_s = self.began.elapsed().as_secs_f64();
        eprintln!("[{wall_s:6.1} s] {name}");
        self.done.push(Step { name: name.to_owned(), wall_s });
        self.began = now();
    }
}

#[derive(Debug, Serialize)]
struct ByStep {
    release: f64,
    rounds: f64,
}

#[derive(Debug, Serialize)]
struct PrivacyLine {
    product: String,
    unit: String,
    adjacency: String,
    epsilon: f64,
    delta: f64,
    by_step: ByStep,
}

#[derive(Debug, Serialize)]
struct ProcessLine {
    role: String,
    pid: u32,
    peak_rss_mib: Option<f64>,
}

#[derive(Debug, Serialize)]
struct ReportFiles {
    html: PathBuf,
    json: PathBuf,
    verified: bool,
    /// Agents that cosigned the audit log the report's ledgers are proven to be in.
    cosigned: usize,
}

#[derive(Debug, Serialize)]
struct Outcome {
    domains: Vec<DomainScores>,
    #[serde(rename = "macro")]
    macro_mean: MacroScores,
    privacy: Vec<PrivacyLine>,
    noise_placement: String,
    steps: Vec<Step>,
    processes: Vec<ProcessLine>,
    report: ReportFiles,
    prediction: Value,
    seed: Option<u64>,
    version: &'static str,
}

async fn whole(options: &Options, root: &Path) -> Result<()> {
    let mut steps = Steps::new();
    let (adapter, secure_sum) = (options.adapter.clone(), options.secure_sum);
    let plan = PlanChoices { adapter, secure_sum, ..PlanChoices::default() };
    let plan = if options.fast {
        PlanChoices { corpus_rows: 4_000, pretrain_steps: 12, rounds: 3, ..plan }
    } else {
        plan
    };
    let program = std::env::current_exe().context("finding this program's own file")?;
    let rows = options.fast.then_some(FAST_ROWS);
    let mut deployment =
        Deployment::start(root, Setup { program, rows, plan, seed: options.seed, more: Lines::default() })?;
    let operator = deployment.operator().await?;
    deployment.admitted(&operator).await?;
    steps.end("1 contracts: six agents admitted");

    let plan = std::fs::read(deployment.layout.plan())?;
    let plan_epsilon = Plan::parse(&plan, "plan.yaml")?.0.privacy.epsilon;
    let summary = operator.submit_plan(plan).await.context("the plan was not admitted")?;
    follow(&operator, &summary.plan_id, &mut deployment, &mut steps).await?;
    deployment.promoted().await?;
    steps.end("7 serve: every agent has chosen and serves");

    let seed = options.seed.unwrap_or(1);
    let mut scoring = Vec::new();
    for (domain, address) in DOMAINS.iter().zip(&deployment.agent_addresses) {
        let (layout, address) = (deployment.layout.clone(), address.clone());
        let switches = Switches { insecure_dev: true, reproducible_noise: options.seed };
        scoring.push(tokio::task::spawn_blocking(move || {
            measure::domain(&layout, domain, &address, switches, seed)
        }));
    }
    let mut predictions = Vec::new();
    for domain in scoring {
        predictions.push(domain.await??);
    }
    let table = ScoreTable::measure(&predictions);
    let prediction = one_prediction(&deployment).await?;
    steps.end("measured on every domain's test rows");

    let (attacks, epsilon) = (deployment.layout.attacks(), plan_epsilon);
    tokio::task::spawn_blocking(move || audit::mechanism_on_record(epsilon, &attacks)).await??;
    steps.end("the mechanism attacked, for the report");
    let (report, files) = report(&deployment, root).await?;
    steps.end("8 report written and verified");

    let processes = deployment
        .processes()
        .map(|p| ProcessLine { role: p.role().to_owned(), pid: p.pid(), peak_rss_mib: p.peak_rss_mib() })
        .collect();
    let outcome = Outcome {
        domains: table.domains.clone(),
        macro_mean: table.macro_mean,
        privacy: report.products.iter().map(privacy_line).collect(),
        noise_placement: report.deployment_model.clone(),
        steps: steps.done,
        processes,
        report: files,
        prediction,
        seed: options.seed,
        version: env!("CARGO_PKG_VERSION"),
    };
    match options.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&outcome)?),
        Output::Text => print(&outcome, &table, &deployment, options),
    }
    if options.hold {
        eprintln!("\neverything is running; Ctrl-C stops it");
        tokio::signal::ctrl_c().await?;
    }
    Ok(())
}

/// Follows a plan to its end and times its phases.
async fn follow(
    operator: &OperatorClient,
    id: &tabmesh_proto::message::Id,
    deployment: &mut Deployment,
    steps: &mut Steps,
) -> Result<()> {
    let mut events = operator.watch_plan(id, 0).await?;
    let mut phase = String::new();
    let mut last: Option<PlanEvent> = None;
    while let Some(event) = events.next().await? {
        let group = group_of(&event.phase);
        if !phase.is_empty() && group != phase {
            steps.end(step_name(&phase));
        }
        phase = group.to_owned();
        eprintln!("           {}", event.detail);
        deployment.check()?;
        last = Some(event);
    }
    let last = last.context("the plan had no events")?;
    ensure!(last.phase == "done", "the plan ended as: {} ({})", last.phase, last.detail);
    Ok(())
}

fn group_of(phase: &str) -> &str {
    phase.split_whitespace().next().unwrap_or(phase)
}

fn step_name(group: &str) -> &'static str {
    match group {
        "admitted" => "1 plan: announced, checked by every agent, budgets reserved",
        "release" => "2 release: noisy counts in four stages",
        "corpus" => "3 corpus: tree model fitted, rows drawn",
        "pretrain" => "4 pre-train: base tuned on the corpus",
        "round" => "5 rounds: noised sums from every member",
        _ => "6 publish: manifest signed and sent",
    }
}

/// Asks the first agent for one prediction.
async fn one_prediction(deployment: &Deployment) -> Result<Value> {
    let (domain, address) = (&DOMAINS[0], &deployment.agent_addresses[0]);
    let schema = schema()?;
    let contract = measure::contract(&deployment.layout, domain)?;
    let rows = measure::rows(&contract, &deployment.layout.test_table(domain.id), &schema)?;
    let body = predict::request(&schema, &rows, 0, 1, "quickstart");
    let response = predict::infer(address, &body).await?;
    let file = deployment.layout.root().join("prediction.json");
    std::fs::write(&file, serde_json::to_vec_pretty(&body)?)?;
    Ok(json!({ "request": body, "response": response }))
}

/// Fetches the signed report, writes it as JSON and page, verifies both with the pinned key.
async fn report(deployment: &Deployment, root: &Path) -> Result<(Report, ReportFiles)> {
    let bytes = deployment.auditor().await?.report_input(None).await?;
    let key = std::fs::read(deployment.pki.signing_public_key(&Role::Coordinator))?;
    let key: [u8; 32] = key.try_into().ok().context("the coordinator's public key has not 32 bytes")?;
    let key = VerifyingKey::from_bytes(key);
    let verified = verify(&bytes, Some(&key)).context("the report does not verify")?;
    let signed: SignedReport = serde_json::from_slice(&bytes)?;
    let page = render_html(&verified.report, &signed)?;
    verify(page.as_bytes(), Some(&key)).context("the report's page does not verify")?;
    let peers = std::fs::read_to_string(deployment.layout.auditors_peers())?;
    let trust = Trust { agents: PeersFile::keys(&peers)?, cosigners: None };
    let witnessed = witness::verify(&verified.report, &key, Some(&trust))
        .context("the report's audit log does not verify")?
        .context("the report has no checkpoint of the audit log")?;
    let cosigned = witnessed.cosigned.len();
    let (html, json) = (root.join("report.html"), root.join("report.json"));
    std::fs::write(&html, page)?;
    std::fs::write(&json, bytes)?;
    Ok((verified.report, ReportFiles { html, json, verified: true, cosigned }))
}

fn privacy_line(section: &tabmesh_privacy::report::ProductSection) -> PrivacyLine {
    let figure = |epsilon: Option<Epsilon>| epsilon.map_or(0.0, Epsilon::get);
    PrivacyLine {
        product: section.product.clone(),
        unit: section.unit.clone(),
        adjacency: section.adjacency.clone(),
        epsilon: figure(section.spent.epsilon),
        delta: section.granted.delta.get(),
        by_step: ByStep {
            release: figure(section.by_step.release.epsilon),
            rounds: figure(section.by_step.rounds.epsilon),
        },
    }
}

fn print(outcome: &Outcome, table: &ScoreTable, deployment: &Deployment, options: &Options) {
    println!("\n{}\n", table.render());
    println!(
        "local trees: gradient-boosted trees on the domain's own rows. + corpus: with the published synthetic rows."
    );
    println!(
        "base: the shipped model, own rows in context. corpus: tuned on the corpus, own and corpus rows in context."
    );
    println!(
        "served: as each agent chose on its own gate rows. communications is a newcomer: 64 rows, gives nothing.\n"
    );
    let mut privacy = Table::new();
    privacy.load_style(comfy_table::presets::ASCII_MARKDOWN);
    privacy.set_header(["product", "unit", "epsilon spent", "delta", "release alone", "rounds alone"]);
    for line in &outcome.privacy {
        privacy.add_row([
            line.product.clone(),
            line.unit.clone(),
            format!("{:.3}", line.epsilon),
            line.delta.to_string(),
            format!("{:.3}", line.by_step.release),
            format!("{:.3}", line.by_step.rounds),
        ]);
    }
    println!("{privacy}");
    println!("{}", outcome.noise_placement);
    println!(
        "adjacency: add or remove one unit; epsilons of steps are each alone and don't add up to the total"
    );
    if options.seed.is_some() {
        println!("a seed was given: noise is REPRODUCIBLE, NOT PRIVATE; ledgers and report say so");
    }
    let total: f64 = outcome.processes.iter().filter_map(|p| p.peak_rss_mib).sum();
    println!("\npeak memory: {total:.0} MiB over all processes");
    for process in &outcome.processes {
        println!("  {:24} {:6.0} MiB", process.role, process.peak_rss_mib.unwrap_or(f64::NAN));
    }
    println!(
        "\none prediction; the same with curl while the agents run (quickstart --hold keeps them running):"
    );
    println!(
        "  curl -s http://{}/v2/models/income/infer -H 'content-type: application/json' -d @{}",
        deployment.agent_addresses[0],
        deployment.layout.root().join("prediction.json").display()
    );
    println!("  {}", outcome.prediction["response"]);
    println!(
        "\nprivacy-budget report, verified; {} of {} agents cosigned the audit log its ledgers are in:",
        outcome.report.cosigned,
        deployment.agent_addresses.len()
    );
    println!("  {}\n  {}", outcome.report.html.display(), outcome.report.json.display());
    println!(
        "  tabmesh-coordinator report verify {} --key {} --agents {}",
        outcome.report.json.display(),
        deployment.pki.signing_public_key(&Role::Coordinator).display(),
        deployment.layout.auditors_peers().display()
    );
    println!("deployment folder: {}", deployment.layout.root().display());
    if options.dir.is_none() && !options.keep {
        println!("  (temporary: give --keep or --dir DIR to keep it)");
    }
}

/// Rows of each table in the short form, for agents, trees and scoring alike.
const FAST_ROWS: usize = 1_000;
