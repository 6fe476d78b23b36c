//! The command line of `tabmesh-sim`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anstream::println;
use clap::{Parser, Subcommand, ValueEnum};

use crate::audit::{self, Audit};
use crate::bench::{self, Bench};
use crate::scenario::compare::{self, CompareArgs};
use crate::scenario::document::Scenario;
use crate::scenario::report::{self, ReportArgs};
use crate::scenario::run::{self, RunArgs};
use crate::scenario::sweep::{self, SweepArgs};
use crate::scenario::targets::{self, TargetsArgs};
use crate::{process, quickstart};

/// Runs whole Tabmesh deployments on one machine, on shipped data, and measures them.
#[derive(Debug, Parser)]
#[command(name = "tabmesh-sim", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The main job: one coordinator and six agents as processes over mutual TLS, from contract to report.
    Quickstart {
        /// Folder of the deployment; a temporary one by default.
        #[arg(long)]
        dir: Option<PathBuf>,
        /// Keep the temporary folder.
        #[arg(long)]
        keep: bool,
        /// Leave everything running at the end, until Ctrl-C, to try the printed commands.
        #[arg(long)]
        hold: bool,
        /// Smaller counts, same path: for continuous integration.
        #[arg(long)]
        fast: bool,
        /// Make the figures of two runs equal: noise is drawn from this seed, NOT private.
        #[arg(long)]
        seed: Option<u64>,
        /// What the rounds train, as a plan's `rounds.adapter` says it: `lora`, or `{kind: lora, rank: 2}`.
        #[arg(long, value_name = "KIND")]
        adapter: Option<String>,
        /// The coordinator gets sums over the agents alone: secure aggregation, each agent adds a share of the noise.
        #[arg(long)]
        secure_sum: bool,
        /// Form of the result.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Runs a scenario: federations of 2 to 10,000 virtual domains in this process, with results, report and resume.
    Run(RunArgs),
    /// Runs a scenario under every combination of values for some of its keys.
    Sweep(SweepArgs),
    /// Holds two runs, or two methods of one, against each other: paired differences with 95 % intervals.
    Compare {
        #[command(flatten)]
        args: CompareArgs,
        /// Form of the result.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Judges the targets of a scenario on what has been run: each with its value, its 95 % interval, met or missed.
    Targets {
        #[command(flatten)]
        args: TargetsArgs,
        /// Form of the result.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Draws the report of a run anew, or of the parts of one together.
    Report(ReportArgs),
    /// Scenario documents.
    Scenario {
        #[command(subcommand)]
        action: ScenarioAction,
    },
    /// Measures: each subcommand answers one question, on this machine.
    Bench {
        #[command(subcommand)]
        what: Bench,
        /// Form of the result.
        #[arg(long, value_enum, default_value_t = Output::Text, global = true)]
        output: Output,
    },
    /// Attacks our own code, each beside controls that it must catch.
    Audit {
        #[command(subcommand)]
        what: Audit,
        /// Put what was found on record in this file, as a coordinator's `attacks:` takes it for its reports; older
        /// results of the same attack are replaced.
        #[arg(long, global = true)]
        record: Option<PathBuf>,
        /// Form of the result.
        #[arg(long, value_enum, default_value_t = Output::Text, global = true)]
        output: Output,
    },
    /// Development certificates.
    Certs {
        #[command(subcommand)]
        action: CertsAction,
    },
}

#[derive(Debug, Subcommand)]
enum ScenarioAction {
    /// Checks documents: keys, ranges, combinations. Reads no tables.
    Validate {
        /// The scenarios (YAML).
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Prints the JSON Schema of scenarios, for editors.
    Schema,
}

#[derive(Debug, Subcommand)]
enum CertsAction {
    /// Makes a development CA with certificates and signing keys for a coordinator, an operator, an auditor and agents.
    Dev {
        /// Folder to write to.
        #[arg(long)]
        out: PathBuf,
        /// Domains that get an agent, separated by commas.
        #[arg(long, value_delimiter = ',', required = true)]
        domains: Vec<String>,
    },
}

/// Form of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// One JSON object.
    Json,
}

/// Runs the command line and gives the process's exit code: 0 only if everything worked.
pub fn main(args: Vec<OsString>) -> ExitCode {
    if let Some(code) = process::take_role(&args) {
        return code;
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    if matches!(
        &cli.command,
        Command::Run(_) | Command::Sweep(_) | Command::Bench { what: Bench::Utility(_), .. }
    ) {
        process::enter_long_work(&args);
    }
    match dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Quickstart { dir, keep, hold, fast, seed, adapter, secure_sum, output } => {
            let options = quickstart::Options { dir, keep, hold, fast, seed, adapter, secure_sum, output };
            quickstart::run(options)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Run(args) => {
            let folder = run::run(&args)?;
            println!("rows: {}", folder.results_path().display());
            println!("means: {}", folder.summary_path().display());
            println!("report: {}", folder.report_path().display());
            if folder.targets_path().is_file() {
                let judgement = serde_json::from_slice(&std::fs::read(folder.targets_path())?)?;
                println!("\n{}", targets::table(&judgement));
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Targets { args, output } => {
            let judgement = targets::targets(&args)?;
            match output {
                Output::Json => println!("{}", serde_json::to_string_pretty(&judgement)?),
                Output::Text => println!("{}", targets::table(&judgement)),
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Sweep(args) => {
            for folder in sweep::sweep(&args)? {
                println!("{}", folder.root().display());
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Compare { args, output } => {
            let all = compare::compare(&args)?;
            match output {
                Output::Json => println!("{}", serde_json::to_string_pretty(&all)?),
                Output::Text => println!("{}", compare::table(&all)),
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Report(args) => {
            println!("report: {}", report::report(&args)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Scenario { action: ScenarioAction::Schema } => {
            println!("{}", serde_json::to_string_pretty(&Scenario::json_schema())?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Scenario { action: ScenarioAction::Validate { files } } => {
            let mut good = true;
            for file in &files {
                match Scenario::load(file) {
                    Ok((scenario, _)) => println!("{}: {} is a scenario", file.display(), scenario.name),
                    Err(error) => {
                        good = false;
                        eprintln!("{error:#}");
                    }
                }
            }
            Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Bench { what, output } => bench::run(what, output),
        Command::Audit { what, record, output } => audit::run(what, output, record.as_deref()),
        Command::Certs { action: CertsAction::Dev { out, domains } } => {
            let mut roles = vec![quickstart::pki::Role::Coordinator];
            roles.push(quickstart::deployment::operator());
            roles.push(quickstart::deployment::auditor());
            roles.extend(domains.iter().map(|domain| quickstart::pki::Role::agent(domain)));
            quickstart::pki::write(&out, &roles, time::OffsetDateTime::now_utc())?;
            println!("development certificates for {} processes in {}", roles.len(), out.display());
            Ok(ExitCode::SUCCESS)
        }
    }
}
