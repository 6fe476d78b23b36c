//! `pretrain`: trains a base on the prior, resumably and in sittings, with its model card beside it.
//!
//! Owns the files of a run: checkpoint, metrics lines, the exported weights at every checkpoint and the card with
//! the figures that were measured. A run may start from another base: its card then adds up what all its ancestors saw and
//! took, and lists them. On a terminal it shows a bar, elsewhere a line at every validation. It reads no
//! table of any domain.

use std::{
    fs::OpenOptions,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::Duration,
};

use clap::{Args as ClapArgs, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use tabmesh_tfm::{
    Model, ModelConfig, TfmError,
    checkpoint::BaseInfo,
    pretrain::{self, Optimiser, PretrainConfig, Progress, Schedule, Start, Validation},
};
use thiserror::Error;

/// Pre-trains a base model on synthetic tables and episodes from the public tables that ship with it.
#[derive(Debug, Clone, ClapArgs)]
pub struct Args {
    /// Model sizes: `nano`, `small`, or a JSON file with the fields of a model configuration.
    #[arg(long, default_value = "nano")]
    pub config: String,
    /// Optimiser steps.
    #[arg(long, default_value_t = 4000)]
    pub steps: u64,
    /// Synthetic tables per step; an even number.
    #[arg(long, default_value_t = 8)]
    pub tables_per_step: usize,
    /// Seed of weights and tables; equal seeds give equal weights on equal machines and builds.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Base to go on from, of the same sizes (it may have fewer classes), with its card beside it; another seed than any
    /// it was trained with, or the same tables would come again.
    #[arg(long)]
    pub from: Option<PathBuf>,
    /// What turns gradients into steps.
    #[arg(long, value_enum, default_value_t = OptimiserArg::AdamW)]
    pub optimiser: OptimiserArg,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1.5e-3)]
    pub learning_rate: f64,
    /// How the learning rate runs: with `hold`, a run may be resumed with another number of steps while the rate is
    /// still flat (the first 70 % of the steps).
    #[arg(long, value_enum, default_value_t = ScheduleArg::Cosine)]
    pub schedule: ScheduleArg,
    /// Share of tables that are episodes from the shipped real tables.
    #[arg(long, default_value_t = 0.05)]
    pub real_share: f64,
    /// Write the weights in 16 bits.
    #[arg(long)]
    pub f16: bool,
    /// Worker threads; the result doesn't depend on it. Run with RAYON_NUM_THREADS=1.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Where the weights go; the card goes to the same name with extension json.
    #[arg(long)]
    pub out: PathBuf,
    /// Directory of the training checkpoint; an existing one is resumed.
    #[arg(long)]
    pub checkpoint: PathBuf,
    /// File that gets one JSON line every 25 steps.
    #[arg(long)]
    pub metrics: Option<PathBuf>,
}

/// What turns gradients into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OptimiserArg {
    /// AdamW for all weights.
    AdamW,
    /// Muon for the matrices of blocks, AdamW for the rest.
    Muon,
}

impl From<OptimiserArg> for Optimiser {
    fn from(arg: OptimiserArg) -> Self {
        match arg {
            OptimiserArg::AdamW => Self::AdamW,
            OptimiserArg::Muon => Self::Muon,
        }
    }
}

/// How the learning rate runs over the steps, after a warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScheduleArg {
    /// A cosine to nearly nought.
    Cosine,
    /// Flat, then straight down to nought.
    Hold,
}

impl From<ScheduleArg> for Schedule {
    fn from(arg: ScheduleArg) -> Self {
        match arg {
            ScheduleArg::Cosine => Self::Cosine,
            ScheduleArg::Hold => Self::Hold,
        }
    }
}

/// Why a pre-training run ended early.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PretrainJobError {
    /// The model or its training refused.
    #[error(transparent)]
    Tfm(#[from] TfmError),
    /// A file can't be read or written.
    #[error("{action} {path} failed: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The model configuration file isn't valid.
    #[error("model configuration {path} is not valid: {reason}")]
    BadConfig {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A card beside the weights can't be read.
    #[error("card {path} is not valid: {reason}")]
    BadCard {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An ancestor of the base was trained on the tables of this seed.
    #[error(
        "seed {seed} was used by a sitting that the base comes from; its tables would come again: take another"
    )]
    UsedSeed {
        /// The seed given.
        seed: u64,
    },
    /// Tables are trained in pairs of equal shape.
    #[error("tables per step must be even and at least 2, got {got}")]
    OddTables {
        /// The number given.
        got: usize,
    },
}

/// What a run left behind, and the fields of the card.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Name of the base.
    pub name: String,
    /// Trainable parameters.
    pub parameters: usize,
    /// Optimiser steps of the last sitting.
    pub steps: u64,
    /// Optimiser steps planned for it; equal to `steps` for a finished run.
    pub planned_steps: u64,
    /// Tables seen over all sittings.
    pub tables: u64,
    /// Processor seconds over all sittings, where the platform tells.
    pub cpu_s: Option<f64>,
    /// Seed of the last sitting.
    pub seed: u64,
    /// Moving average of the training loss.
    pub loss_ema: f64,
    /// Newest figures on the fixed synthetic validation tables.
    pub validation: Option<Validation>,
    /// Model sizes.
    pub config: ModelConfig,
    /// Training settings of the last sitting.
    pub training: PretrainConfig,
    /// Command that repeats the last sitting.
    pub command: String,
    /// All sittings, the first one first; empty in cards from before there was more than one.
    #[serde(default)]
    pub sittings: Vec<Sitting>,
    /// What the weights were trained on.
    pub data: String,
    /// Licence of the weights.
    pub licence: String,
}

/// One run of the chain that led to a base.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sitting {
    /// Command that repeats it.
    pub command: String,
    /// Optimiser steps.
    pub steps: u64,
    /// Tables seen.
    pub tables: u64,
    /// Seed of weights and tables.
    pub seed: u64,
    /// Processor seconds, where the platform tells.
    pub cpu_s: Option<f64>,
    /// SHA-256 (hex) of the base it started from, if any.
    pub parent: Option<String>,
}

/// A base that a run starts from.
struct Parent {
    model: Model,
    digest: String,
    sittings: Vec<Sitting>,
}

/// One line of the metrics file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Line {
    step: u64,
    loss_ema: f64,
    tables_per_s: f64,
    /// Wall-clock seconds left at the speed since the start or resumption.
    #[serde(default)]
    eta_s: f64,
    cpu_s: Option<f64>,
    validation: Option<Validation>,
}

/// Runs or resumes pre-training; `now` is a monotonic clock, `stop` ends the run after the current step.
///
/// # Errors
/// [`PretrainJobError`] for bad arguments, refused files, a diverged or a stopped run.
pub fn run(args: &Args, now: &dyn Fn() -> Duration, stop: &AtomicBool) -> Result<Card, PretrainJobError> {
    let parent = args.from.as_deref().map(|path| read_parent(path, args.seed)).transpose()?;
    let config = training_config(args, parent.as_ref())?;
    for dir in [Some(args.checkpoint.as_path()), args.out.parent()].into_iter().flatten() {
        std::fs::create_dir_all(dir).map_err(io("creating directory", dir))?;
    }
    let state = args.checkpoint.join("training.safetensors");
    let done = pretrain::checkpoint_step(&state)?.unwrap_or(0);
    let cpu_before = match &args.metrics {
        Some(path) => keep_metrics(path, done)?,
        None => 0.0,
    };
    let cpu_at_start = cpu_seconds();
    let cpu = || Some(cpu_before + cpu_seconds()? - cpu_at_start?);
    let bar = progress_bar(config.steps);
    let mut newest = None;
    let mut report = |p: &Progress<'_>| -> Result<(), TfmError> {
        bar.set_position(p.step);
        bar.set_message(shown(p));
        if bar.is_hidden() && p.validated {
            eprintln!("{}/{} steps, {}", p.step, p.total, shown(p));
        }
        if let Some(path) = args.metrics.as_ref().filter(|_| p.validated || p.step.is_multiple_of(LINE_EVERY))
        {
            let line = Line {
                step: p.step,
                loss_ema: p.loss_ema,
                tables_per_s: p.tables_per_s,
                eta_s: p.eta_s,
                cpu_s: cpu(),
                validation: p.validation.filter(|_| p.validated),
            };
            append(path, &line)?;
        }
        if let Some(model) = p.checkpoint {
            let card = card(args, &config, parent.as_ref(), p, model.parameters(), cpu());
            let info = BaseInfo {
                name: card.name.clone(),
                licence: LICENCE.to_owned(),
                parent: config.parent.clone(),
                steps: p.step,
                seed: args.seed,
            };
            let weights =
                if args.f16 { model.to_safetensors_f16(&info)? } else { model.to_safetensors(&info)? };
            replace(&args.out, &weights)?;
            let text = serde_json::to_vec_pretty(&card)
                .map_err(|e| TfmError::Format { what: "model card", reason: e.to_string() })?;
            replace(&args.out.with_extension("json"), &text)?;
            newest = Some(card);
        }
        Ok(())
    };
    let start = match &parent {
        Some(parent) => Start::Base(Box::new(parent.model.clone())),
        None => Start::Scratch,
    };
    let ended = pretrain::run(&config, &start, Some(&state), now, &mut report, stop);
    bar.finish_and_clear();
    ended?;
    match newest {
        Some(card) => Ok(card),
        // The checkpoint was already at its last step: the card on disk is that of the finished run.
        None => read_card(&args.out.with_extension("json")),
    }
}

/// A base with the sittings of its card, none of which used `seed`.
fn read_parent(path: &Path, seed: u64) -> Result<Parent, PretrainJobError> {
    let bytes = std::fs::read(path).map_err(io("reading", path))?;
    let (model, _) = Model::from_safetensors(&bytes)?;
    let card = read_card(&path.with_extension("json"))?;
    let sittings = if card.sittings.is_empty() {
        let Card { command, steps, tables, seed, cpu_s, .. } = card;
        vec![Sitting { command, steps, tables, seed, cpu_s, parent: None }]
    } else {
        card.sittings
    };
    if sittings.iter().any(|sitting| sitting.seed == seed) {
        return Err(PretrainJobError::UsedSeed { seed });
    }
    let digest = ring::digest::digest(&ring::digest::SHA256, &bytes);
    Ok(Parent { model, digest: hex::encode(digest), sittings })
}

fn training_config(args: &Args, parent: Option<&Parent>) -> Result<PretrainConfig, PretrainJobError> {
    if args.tables_per_step < 2 || !args.tables_per_step.is_multiple_of(2) {
        return Err(PretrainJobError::OddTables { got: args.tables_per_step });
    }
    let model = match args.config.as_str() {
        "nano" => ModelConfig::nano(),
        "small" => ModelConfig::small(),
        path => {
            let path = PathBuf::from(path);
            let text = std::fs::read_to_string(&path).map_err(io("reading", &path))?;
            serde_json::from_str(&text)
                .map_err(|e| PretrainJobError::BadConfig { path, reason: e.to_string() })?
        }
    };
    let mut config = PretrainConfig {
        slices_per_step: args.tables_per_step / 2,
        tables_per_slice: 2,
        threads: args.threads,
        learning_rate: args.learning_rate,
        optimiser: args.optimiser.into(),
        schedule: args.schedule.into(),
        parent: parent.map(|p| p.digest.clone()),
        ..PretrainConfig::scratch(model, args.steps, args.seed)
    };
    config.prior.real_share = args.real_share;
    config.check()?;
    Ok(config)
}

fn card(
    args: &Args,
    config: &PretrainConfig,
    parent: Option<&Parent>,
    p: &Progress<'_>,
    parameters: usize,
    cpu_s: Option<f64>,
) -> Card {
    let mut sittings = parent.map_or_else(Vec::new, |p| p.sittings.clone());
    sittings.push(Sitting {
        command: command(args),
        steps: p.step,
        tables: p.step * args.tables_per_step as u64,
        seed: args.seed,
        cpu_s,
        parent: config.parent.clone(),
    });
    let name =
        Path::new(&args.config).file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
    Card {
        name,
        parameters,
        steps: p.step,
        planned_steps: p.total,
        tables: sittings.iter().map(|s| s.tables).sum(),
        cpu_s: sittings.iter().map(|s| s.cpu_s).sum(),
        seed: args.seed,
        loss_ema: p.loss_ema,
        validation: p.validation,
        config: config.model.clone(),
        training: config.clone(),
        command: command(args),
        sittings,
        data: if args.real_share > 0.0 { DATA_WITH_REAL } else { DATA }.to_owned(),
        licence: LICENCE.to_owned(),
    }
}

/// The command line that repeats a sitting, with file names for paths.
fn command(args: &Args) -> String {
    let named = |arg: Option<clap::builder::PossibleValue>| {
        arg.map_or_else(String::new, |value| value.get_name().to_owned())
    };
    let mut line = format!(
        "tabmesh-coordinator pretrain --config {} --steps {} --tables-per-step {} --seed {} --optimiser {} \
         --learning-rate {} --schedule {} --real-share {}",
        args.config,
        args.steps,
        args.tables_per_step,
        args.seed,
        named(args.optimiser.to_possible_value()),
        args.learning_rate,
        named(args.schedule.to_possible_value()),
        args.real_share,
    );
    if let Some(from) = &args.from {
        line.push_str(&format!(" --from {}", file_name(from)));
    }
    if args.f16 {
        line.push_str(" --f16");
    }
    line.push_str(&format!(" --out {} --checkpoint {}", file_name(&args.out), file_name(&args.checkpoint)));
    line
}

/// Loss, newest validation, speed and time left, for people.
fn shown(p: &Progress<'_>) -> String {
    let validation =
        p.validation.map_or_else(String::new, |v| format!(", validation {:.4} AUC {:.4}", v.loss, v.auc));
    let minutes = (p.eta_s / 60.0).ceil().max(0.0) as u64;
    let (hours, minutes) = (minutes / 60, minutes % 60);
    format!(
        "loss {:.4}{validation}, {:.1} tables/s, {hours} h {minutes:02} min left",
        p.loss_ema, p.tables_per_s
    )
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

fn progress_bar(steps: u64) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(steps), target);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} steps, {msg}") {
        bar.set_style(style);
    }
    bar
}

/// Drops metrics lines beyond the resumed step and returns the processor seconds used up to it.
fn keep_metrics(path: &Path, done: u64) -> Result<f64, PretrainJobError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0.0),
        Err(e) => return Err(io("reading", path)(e)),
    };
    let kept: Vec<(&str, Line)> = text
        .lines()
        .filter_map(|l| serde_json::from_str(l).ok().map(|line: Line| (l, line)))
        .filter(|(_, line)| line.step <= done)
        .collect();
    let rest: String = kept.iter().map(|(l, _)| format!("{l}\n")).collect();
    std::fs::write(path, rest).map_err(io("writing", path))?;
    Ok(kept.last().and_then(|(_, line)| line.cpu_s).unwrap_or(0.0))
}

fn append(path: &Path, line: &Line) -> Result<(), TfmError> {
    let failed = |source| TfmError::Io { action: "writing", path: path.display().to_string(), source };
    let text = serde_json::to_string(line)
        .map_err(|e| TfmError::Format { what: "metrics line", reason: e.to_string() })?;
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(failed)?;
    writeln!(file, "{text}").map_err(failed)
}

/// Replaces a file so that a crash leaves either the old or the new content.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), TfmError> {
    let failed = |source| TfmError::Io { action: "writing", path: path.display().to_string(), source };
    let mut staged = path.as_os_str().to_owned();
    staged.push(".tmp");
    let mut file = std::fs::File::create(&staged).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    std::fs::rename(&staged, path).map_err(failed)
}

fn read_card(path: &Path) -> Result<Card, PretrainJobError> {
    let text = std::fs::read_to_string(path).map_err(io("reading", path))?;
    serde_json::from_str(&text)
        .map_err(|e| PretrainJobError::BadCard { path: path.to_owned(), reason: e.to_string() })
}

fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> PretrainJobError + 'a {
    move |source| PretrainJobError::Io { action, path: path.to_owned(), source }
}

/// Processor seconds of this process, from Linux's `/proc`; `None` elsewhere.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The command name may hold spaces, so fields are counted after its closing bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_S)
}

const TICKS_PER_S: f64 = 100.0;
const LINE_EVERY: u64 = 25;
const LICENCE: &str = "Apache-2.0";
const DATA: &str = "synthetic tables drawn from random structural models; no real data";
const DATA_WITH_REAL: &str = "synthetic tables drawn from random structural models, and episodes from eight small \
                              public tables (crates/tfm/data/real/PROVENANCE.md)";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::{sync::atomic::AtomicBool, time::Duration};

    use super::{Args, OptimiserArg, PretrainJobError, ScheduleArg, Sitting, run, shown};
    use tabmesh_tfm::{
        Model, ModelConfig,
        pretrain::{Progress, Validation},
    };

    #[test]
    fn progress_is_shown_in_hours_and_minutes() {
        let progress = Progress {
            step: 10,
            total: 100,
            loss: 0.7,
            loss_ema: 0.65,
            validation: Some(Validation { loss: 0.5, auc: 0.75 }),
            validated: true,
            tables_per_s: 12.34,
            eta_s: 7230.0,
            checkpoint: None,
        };
        let expected = "loss 0.6500, validation 0.5000 AUC 0.7500, 12.3 tables/s, 2 h 01 min left";
        assert_eq!(shown(&progress), expected);
    }

    #[test]
    fn run_leaves_weights_card_and_metrics_and_a_finished_run_stays_finished() {
        let dir = tempfile::tempdir().unwrap();
        let sizes = dir.path().join("tiny.json");
        std::fs::write(&sizes, serde_json::to_string(&ModelConfig::tiny()).unwrap()).unwrap();
        let args = Args {
            config: sizes.display().to_string(),
            steps: 3,
            tables_per_step: 2,
            seed: 4,
            from: None,
            optimiser: OptimiserArg::Muon,
            learning_rate: 1.5e-3,
            schedule: ScheduleArg::Cosine,
            real_share: 0.5,
            f16: false,
            threads: 1,
            out: dir.path().join("base.safetensors"),
            checkpoint: dir.path().join("state"),
            metrics: Some(dir.path().join("metrics.jsonl")),
        };
        let stop = AtomicBool::new(false);
        let card = run(&args, &|| Duration::ZERO, &stop).unwrap();
        assert_eq!((card.steps, card.planned_steps, card.tables), (3, 3, 6));
        assert!(card.validation.is_some());
        let (model, info) = Model::from_safetensors(&std::fs::read(&args.out).unwrap()).unwrap();
        assert_eq!((model.parameters(), info.steps), (card.parameters, 3));
        let lines = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 1);
        assert_eq!(run(&args, &|| Duration::ZERO, &stop).unwrap(), card);

        // A second sitting from those weights, for more classes: the card adds both up and names the parent.
        let more = dir.path().join("more.json");
        let wider = ModelConfig { max_classes: 4, ..ModelConfig::tiny() };
        std::fs::write(&more, serde_json::to_string(&wider).unwrap()).unwrap();
        let second = Args {
            config: more.display().to_string(),
            from: Some(args.out.clone()),
            seed: 5,
            steps: 2,
            f16: true,
            out: dir.path().join("second.safetensors"),
            checkpoint: dir.path().join("second"),
            metrics: None,
            ..args
        };
        let both = run(&second, &|| Duration::ZERO, &stop).unwrap();
        assert_eq!((both.steps, both.tables, both.sittings.len()), (2, 10, 2));
        assert_eq!((&both.sittings[0], &both.sittings[0].parent), (&card.sittings[0], &None));
        let Sitting { seed, tables, parent, command, .. } = &both.sittings[1];
        assert_eq!((*seed, *tables, command), (5, 4, &both.command));
        assert!(command.contains("--optimiser muon") && command.contains("--from base.safetensors --f16"));
        let (model, info) = Model::from_safetensors(&std::fs::read(&second.out).unwrap()).unwrap();
        assert_eq!((model.config().max_classes, &info.parent), (4, parent));
        assert!(parent.as_ref().is_some_and(|digest| digest.len() == 64));
        let again = Args { seed: 4, ..second.clone() };
        assert!(matches!(
            run(&again, &|| Duration::ZERO, &stop),
            Err(PretrainJobError::UsedSeed { seed: 4 })
        ));
        // A checkpoint of a run from another base isn't resumed.
        let other = Args { from: None, ..second };
        assert!(run(&other, &|| Duration::ZERO, &stop).is_err());
        let odd = Args { tables_per_step: 3, ..args };
        assert!(matches!(run(&odd, &|| Duration::ZERO, &stop), Err(PretrainJobError::OddTables { got: 3 })));
    }
}
