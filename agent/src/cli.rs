//! The command line of `tabmesh-agent`: the one place that reads arguments, clock and operating-system randomness.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anstream::{print, println};
use clap::{Parser, Subcommand, ValueEnum};
use ring::rand::SystemRandom;
use tabmesh_privacy::noise::NoiseSource;
use tabmesh_proto::connect::TcpDial;
use tabmesh_tfm::student::Fitting;

use crate::command;
use crate::config::Config;
use crate::serve::Clock;
use crate::{Agent, AgentError, Local, Switches};

/// Runs beside one domain's tables: answers a Tabmesh coordinator with differentially private statistics and gradients,
/// and serves predictions. Rows never leave; every release is debited in a ledger first.
#[derive(Debug, Parser)]
#[command(name = "tabmesh-agent", version, propagate_version = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Log filter, e.g. `info` or `tabmesh_agent=debug`.
    #[arg(long, global = true, env = "TABMESH_LOG", default_value = "info")]
    log: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connects to the coordinator, answers its assignments, serves predictions.
    Run {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        #[command(flatten)]
        dev: Development,
        /// Stop when standard input closes (for harnesses that start this process).
        #[arg(long, hide = true)]
        until_stdin_closes: bool,
    },
    /// Checks a contract against its table, and says what a release would send and cost. Sends nothing.
    Check {
        /// The contract file; relative table paths are taken from its folder.
        contract: PathBuf,
        /// Local policy file: its grant is the ε that a release is priced at.
        #[arg(long)]
        policy: Option<PathBuf>,
        /// Agents in the cohort to judge by.
        #[arg(long, default_value_t = 3)]
        cohort: u32,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Writes a contract in the Open Data Contract Standard's form (v3.1), whichever form it is in.
    Convert {
        /// The contract file.
        contract: PathBuf,
        /// Where to write the document; standard output without it.
        #[arg(long, short)]
        output: Option<PathBuf>,
    },
    /// Predicts a Parquet file of rows with the promoted model, without any connection.
    Predict {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        /// Rows to predict: Parquet with the contract's feature columns.
        #[arg(long)]
        input: PathBuf,
        /// Where to write the probabilities (Parquet).
        #[arg(long, short)]
        output: PathBuf,
        #[command(flatten)]
        dev: Development,
    },
    /// Writes the published synthetic corpus as a CSV file with its Croissant card.
    ///
    /// The rows are differentially private as they were published; writing them out costs nothing.
    Corpus {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        /// Folder for `corpus.csv` and `croissant.json`.
        #[arg(long)]
        out: PathBuf,
        /// Address of the licence to state in the card.
        #[arg(long)]
        licence: Option<String>,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        dev: Development,
    },
    /// Distils a small student from the promoted model: no context at serving time, for latency-sensitive use.
    ///
    /// The student learns the promoted model's answers to the domain's own training rows and to corpus rows, and is
    /// compared with it on the gate rows, which neither has seen. It stays in the data folder; a running agent serves it
    /// under the model's name with `-student` behind it. Nothing is sent.
    Distill {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        /// Units of each of its two hidden layers.
        #[arg(long, default_value_t = Fitting::default().hidden)]
        hidden: usize,
        /// Passes over the rows.
        #[arg(long, default_value_t = Fitting::default().epochs)]
        epochs: usize,
        /// Seed: equal seeds give equal students.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        dev: Development,
    },
    /// Finds the common levels of a column that nobody declared, by a private threshold histogram paid from the budget.
    ///
    /// Without --spend it says what that costs, and how many rows a level must have to be told. The agent must not be running: it has
    /// the ledger. The same question again gets the same answer, free of charge. Nothing is sent.
    Levels {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        /// Column of the contract; `role: unused` until its levels are declared.
        #[arg(long)]
        column: String,
        /// ε that the question may cost by itself, at the grant's δ.
        #[arg(long, default_value_t = 0.1)]
        epsilon: f64,
        /// Ask, and debit the budget.
        #[arg(long)]
        spend: bool,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        dev: Development,
    },
    /// Shows the privacy budget: granted, spent, left; or writes the signed report of this domain.
    Budget {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        /// Write the report as a page.
        #[arg(long)]
        html: Option<PathBuf>,
        /// Write the signed report as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Shows what is served and why: members of the blend, weights, log losses at the gate. These records stay local.
    Promotion {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        /// Form of the answer.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Declares, with another domain's owner, that no unit is in both your sources: reports then count the larger loss.
    ///
    /// Without such a declaration a unit of a namespace is taken to be in every domain of it, and losses add up. One owner
    /// declares, the other signs the same file, and the coordinator's configuration names it. It rests on the owners' word.
    Disjoint {
        #[command(subcommand)]
        action: DisjointAction,
    },
    /// Shows or checks a configuration.
    Config {
        #[command(subcommand)]
        action: ConfigAction,
    },
}

#[derive(Debug, Subcommand)]
enum DisjointAction {
    /// Writes a declaration about this domain's source and another's, signed by this agent.
    Declare {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        /// SPIFFE id of the other domain's agent.
        #[arg(long, value_name = "SPIFFE_ID")]
        agent: String,
        /// Source of the other domain as its contract and the reports name it.
        #[arg(long)]
        lineage: String,
        /// How both owners know.
        #[arg(long)]
        reason: String,
        /// File to write; an existing one isn't overwritten.
        file: PathBuf,
        #[command(flatten)]
        dev: Development,
    },
    /// Adds this agent's signature to a declaration that the other domain's owner wrote.
    Sign {
        /// Configuration file.
        #[arg(long, short)]
        config: PathBuf,
        /// The declaration.
        file: PathBuf,
        #[command(flatten)]
        dev: Development,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigAction {
    /// Prints a commented example.
    Example,
    /// Parses a file and prints what it means, with paths resolved.
    Check {
        /// The file.
        file: PathBuf,
    },
}

/// Switches for development alone; each of them is printed in ledger and report.
#[derive(Debug, Clone, Copy, clap::Args)]
struct Development {
    /// Accept certificates of the development CA. Never in production.
    #[arg(long)]
    insecure_dev: bool,
    /// Draw noise from this seed instead of the operating system: reproducible, NOT private.
    #[arg(long, value_name = "SEED", requires = "insecure_dev")]
    reproducible_noise: Option<u64>,
}

impl Development {
    fn noise(self) -> NoiseSource {
        match self.reproducible_noise {
            Some(seed) => NoiseSource::Seeded { seed },
            None => NoiseSource::os(SystemRandom::new()),
        }
    }

    fn switches(self) -> Switches {
        Switches { insecure_dev: self.insecure_dev, reproducible_noise: self.reproducible_noise }
    }
}

/// Form of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// One JSON object.
    Json,
}

const EXAMPLES: &str = "\
Examples:
  tabmesh-agent config example > agent.yaml
  tabmesh-agent check contract.yaml --policy policy.yaml
  tabmesh-agent levels --config agent.yaml --column city --epsilon 0.1
  tabmesh-agent convert contract.yaml --output contract.odcs.yaml
  tabmesh-agent run --config agent.yaml
  tabmesh-agent predict --config agent.yaml --input rows.parquet --output out.parquet
  tabmesh-agent distill --config agent.yaml
  tabmesh-agent corpus --config agent.yaml --out corpus
  tabmesh-agent promotion --config agent.yaml
  tabmesh-agent budget --config agent.yaml --html budget.html
  tabmesh-agent disjoint sign --config agent.yaml retail-and-travel.json";

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
        Command::Run { config, dev, until_stdin_closes } => {
            let agent = open(&config, dev)?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .map_err(|source| AgentError::System { what: "starting the runtime", source })?;
            runtime.block_on(agent.run(TcpDial, stop(until_stdin_closes)))?;
            // Work on the blocking pool holds nothing that isn't durable; it is not waited for.
            runtime.shutdown_background();
            Ok(ExitCode::SUCCESS)
        }
        Command::Check { contract, policy, cohort, output } => {
            command::check::run(&contract, policy.as_deref(), cohort, output, now_ms())
        }
        Command::Convert { contract, output } => command::convert::run(&contract, output.as_deref()),
        Command::Predict { config, input, output, dev } => {
            command::predict::run(&local(&config, dev)?, &input, &output)
        }
        Command::Corpus { config, out, licence, output, dev } => {
            command::corpus::run(&local(&config, dev)?, &out, licence.as_deref(), output)
        }
        Command::Distill { config, hidden, epochs, seed, output, dev } => {
            let fitting = Fitting { hidden, epochs, seed };
            command::distill::run(&local(&config, dev)?, fitting, output, now_ms())
        }
        Command::Levels { config, column, epsilon, spend, output, dev } => {
            let asked = command::levels::Asked { column: &column, epsilon, spend };
            command::levels::run(&local(&config, dev)?, &asked, dev.noise(), output, now_ms())
        }
        Command::Budget { config, html, json, output } => {
            let config = Config::load(&config)?;
            command::budget::run(&config, html.as_deref(), json.as_deref(), output, now_ms())
        }
        Command::Promotion { config, output } => command::promotion::run(&Config::load(&config)?, output),
        Command::Disjoint {
            action: DisjointAction::Declare { config, agent, lineage, reason, file, dev },
        } => command::disjoint::declare(&local(&config, dev)?, &agent, &lineage, &reason, &file, now_ms()),
        Command::Disjoint { action: DisjointAction::Sign { config, file, dev } } => {
            command::disjoint::sign(&local(&config, dev)?, &file)
        }
        Command::Config { action: ConfigAction::Example } => {
            print!("{}", Config::example());
            Ok(ExitCode::SUCCESS)
        }
        Command::Config { action: ConfigAction::Check { file } } => {
            println!("{:#?}", Config::load(&file)?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Everything that predicts, without the ledger: a running agent may have it open.
fn local(config: &std::path::Path, dev: Development) -> miette::Result<Local> {
    Ok(Local::open(Config::load(config)?, dev.switches(), Arc::new(now_ms))?)
}

fn open(config: &std::path::Path, dev: Development) -> miette::Result<Agent> {
    let config = Config::load(config)?;
    let switches = dev.switches();
    let noise = dev.noise();
    if noise.reproducible() {
        tracing::warn!("noise comes from a fixed seed: REPRODUCIBLE, NOT PRIVATE");
    }
    let clock: Clock = Arc::new(now_ms);
    Ok(Agent::open(config, switches, noise, clock)?)
}

/// Ends with Ctrl-C, SIGTERM, or the closing of standard input.
async fn stop(until_stdin_closes: bool) {
    let stdin = async {
        if until_stdin_closes {
            let (closed, ended) = tokio::sync::oneshot::channel();
            // A thread of its own: a read of standard input can't be cancelled, and must not keep the runtime.
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                let _ = closed.send(());
            });
            let _ = ended.await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminated => {}
        () = stdin => {}
    }
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
