//! The command line of `tabmesh-coordinator`: the one place that reads arguments and the clock.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anstream::{print, println};
use clap::{Parser, Subcommand, ValueEnum};

use crate::command::{self, client::Client};
use crate::config::Config;
use crate::mesh::Clock;
use crate::{Switches, pretrain_job};

/// Runs the centre of a Tabmesh federation: admits data-product contracts, runs differentially private plans over the
/// agents' domains, pre-trains and publishes the tabular foundation model, reports privacy budgets.
#[derive(Debug, Parser)]
#[command(name = "tabmesh-coordinator", version, propagate_version = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Log filter, e.g. `info` or `tabmesh_coordinator=debug`.
    #[arg(long, global = true, env = "TABMESH_LOG", default_value = "info")]
    log: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves agents, operators and auditors.
    Serve {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        /// Accept certificates of the development CA. Never in production.
        #[arg(long)]
        insecure_dev: bool,
        /// Stop when standard input closes (for harnesses that start this process).
        #[arg(long, hide = true)]
        until_stdin_closes: bool,
    },
    /// Validates, submits, follows and cancels plans (role: operator).
    Plan {
        #[command(subcommand)]
        action: PlanAction,
    },
    /// Lists admitted agents (role: operator).
    Agents {
        #[command(flatten)]
        client: Client,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Pre-trains a base model from the synthetic prior; resumes where a checkpoint ends.
    Pretrain(pretrain_job::Args),
    /// Brings in, lists, describes and exports model files, by licence and purpose. Offline.
    Model {
        #[command(subcommand)]
        action: command::model::ModelAction,
    },
    /// Writes or verifies the privacy-budget report (role: auditor).
    Report {
        #[command(subcommand)]
        action: ReportAction,
    },
    /// Shows or checks a configuration.
    Config {
        #[command(subcommand)]
        action: ConfigAction,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PlanAction {
    /// Prints the JSON Schema of plans, for editors.
    Schema,
    /// Checks a plan: offline, or against a coordinator's admitted contracts and policy.
    Validate {
        /// The plan (YAML).
        plan: PathBuf,
        /// Client profile; without it the plan is checked by itself.
        #[arg(long)]
        client: Option<PathBuf>,
    },
    /// Prints what a plan would cost one privacy unit, step by step, before anything runs.
    Cost {
        /// The plan (YAML).
        plan: PathBuf,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
        /// Draw epsilon over the steps into this file.
        #[arg(long)]
        svg: Option<PathBuf>,
    },
    /// Submits a plan and follows it to its end.
    Submit {
        /// The plan (YAML).
        plan: PathBuf,
        #[command(flatten)]
        client: Client,
        /// Return once the plan is admitted.
        #[arg(long)]
        detach: bool,
        /// Form of the answer; `json` prints one line an event.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Describes a plan, or all plans.
    Status {
        /// Its id; all plans without one.
        id: Option<String>,
        #[command(flatten)]
        client: Client,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Follows a running plan to its end.
    Watch {
        /// Its id.
        id: String,
        #[command(flatten)]
        client: Client,
        /// Form of the answer; `json` prints one line an event.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Stops a plan. What agents have sent stays debited.
    Cancel {
        /// Its id.
        id: String,
        #[command(flatten)]
        client: Client,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReportAction {
    /// Fetches the signed report and writes it.
    Write {
        #[command(flatten)]
        client: Client,
        /// Write the page here.
        #[arg(long, required_unless_present = "json")]
        html: Option<PathBuf>,
        /// Write the signed JSON here.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Only this data product.
        #[arg(long)]
        product: Option<String>,
    },
    /// Prints the JSON Schema of the text that a report signs (also docs/report.schema.json).
    Schema,
    /// Verifies a report file (JSON or HTML) offline: signature, hash chains, recomputed totals, audit log and who cosigned it.
    Verify {
        /// The file.
        file: PathBuf,
        /// File with the coordinator's 32-byte public key; without it anybody may have signed.
        #[arg(long)]
        key: Option<PathBuf>,
        /// File with the agents' public keys (`peers:`, as agents are given it), from their operators and not from the
        /// coordinator; without it a coordinator may have made agents up. Each ledger must end in a head signed by its
        /// agent's key, and be in the audit log.
        #[arg(long, requires = "key")]
        agents: Option<PathBuf>,
        /// How many of these agents must have cosigned the audit log's checkpoint. Default: all.
        #[arg(long, requires = "agents")]
        cosigners: Option<usize>,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigAction {
    /// Prints a commented example.
    Example,
    /// Prints a commented example of a client profile, as `--client` takes it.
    ClientExample,
    /// Parses a file and prints what it means, with paths resolved.
    Check {
        /// The file.
        file: PathBuf,
    },
}

/// Form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// JSON.
    Json,
}

const EXAMPLES: &str = "\
Examples:
  tabmesh-coordinator config example > coordinator.yaml
  tabmesh-coordinator serve --config coordinator.yaml
  tabmesh-coordinator plan validate plan.yaml
  tabmesh-coordinator plan cost plan.yaml --svg cost.svg
  tabmesh-coordinator plan submit plan.yaml --client operator.yaml
  tabmesh-coordinator model import tabicl.ckpt --licence BSD-3-Clause --source https://example.org/tabicl.ckpt
  tabmesh-coordinator report write --client auditor.yaml --html report.html --json report.json
  tabmesh-coordinator report verify report.html --key coordinator.pub --agents peers.yaml";

/// Runs the command line and gives the process's exit code: 0 done, 1 failed, 2 wrong usage.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    start_log(&cli.log);
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(report) => {
            eprintln!("{report:?}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> miette::Result<ExitCode> {
    match command {
        Command::Serve { config, insecure_dev, until_stdin_closes } => {
            let config = Config::load(&config)?;
            let clock: Clock = Arc::new(now_ms);
            runtime()?.block_on(command::serve::run(
                config,
                Switches { insecure_dev, go_on_without_late: false },
                clock,
                until_stdin_closes,
            ))
        }
        Command::Plan { action } => runtime()?.block_on(command::plan::run(action)),
        Command::Agents { client, output } => runtime()?.block_on(command::agents::run(&client, output)),
        Command::Pretrain(args) => pretrain(&args),
        Command::Model { action } => command::model::run(action, now_ms()),
        Command::Report { action } => runtime()?.block_on(command::report::run(action)),
        Command::Config { action: ConfigAction::Example } => {
            print!("{}", Config::example());
            Ok(ExitCode::SUCCESS)
        }
        Command::Config { action: ConfigAction::ClientExample } => {
            print!("{}", command::client::EXAMPLE);
            Ok(ExitCode::SUCCESS)
        }
        Command::Config { action: ConfigAction::Check { file } } => {
            println!("{:#?}", Config::load(&file)?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "the command line is where the clock comes from")]
fn pretrain(args: &pretrain_job::Args) -> miette::Result<ExitCode> {
    let began = Instant::now();
    let stop = Arc::new(AtomicBool::new(false));
    // Ctrl-C and SIGTERM end the run after the current step with its state saved.
    let runtime = runtime()?;
    let flag = Arc::clone(&stop);
    runtime.spawn(async move {
        command::serve::stop(false).await;
        flag.store(true, Ordering::Relaxed);
    });
    let card =
        pretrain_job::run(args, &|| began.elapsed(), &stop).map_err(|error| miette::miette!("{error}"))?;
    println!("{}", serde_json::to_string_pretty(&card).unwrap_or_default());
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> miette::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| miette::miette!("starting the runtime: {error}"))
}

/// UTC milliseconds since 1970.
#[allow(clippy::disallowed_methods, reason = "the command line is where the clock comes from")]
fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn start_log(filter: &str) {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).unwrap_or_else(|_| "info".into());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A harness may run several command lines in one process; the first log set-up stays.
    let _ = if std::io::stderr().is_terminal() {
        builder.compact().try_init()
    } else {
        builder.json().try_init()
    };
}
