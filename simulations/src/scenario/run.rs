//! `run`: a scenario's tasks, done once each, on all cores, taken up where a killed run stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tabmesh_agent::books::read_entries;
use tabmesh_federation::id::{Digest, PlanDigest};
use tabmesh_federation::plan::NoisePlacement;
use tabmesh_privacy::ledger::{balance_of, replay};

use super::answers::{Answered, entities};
use super::compare::{DRAWS, Loaded};
use super::data::{Data, Source, World, virtual_domains};
use super::document::{Federation, Flow, FlowFaults, Metric, Placement, Scenario};
use super::duplicates;
use super::figures::{Pool, Tenths, Where};
use super::report;
use super::results::{FORMAT, Manifest, Noise, Row, RunFolder, SetDigest, Shard};
use super::rounds::{self, RoundEnd};
use super::targets::{self, Judgement};
use crate::process::{now, program_digest};
use crate::quickstart::deployed::BASE_MODEL;
use crate::utility::federation::{self, Setting};
use crate::utility::measure::{self, Answers, Ours, Scoring};
use crate::utility::member::{Member, Tables};

/// How a scenario is run.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArgs {
    /// The scenario (YAML).
    pub scenario: PathBuf,
    /// Folder of the run; it is taken up if it holds a part of the same run. Default: `runs/NAME`.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Tables, part, tasks at a time.
    #[command(flatten)]
    pub how: How,
}

/// What `run` and `sweep` share.
#[derive(Debug, Clone, clap::Args)]
pub struct How {
    /// Folder of tables, in place of the scenario's `data.folder`.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Do one part of the tasks, `I/N`; `compare` and `report` put parts together.
    #[arg(long, value_name = "I/N")]
    pub shard: Option<Shard>,
    /// Do the tasks of these sets alone, separated by commas; the same folder takes those of the others later.
    #[arg(long, value_name = "SET,SET", value_delimiter = ',')]
    pub sets: Vec<String>,
    /// Tasks at a time. Default: one a core.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub jobs: Option<u16>,
    /// Run flows as processes of the operating system over sockets: a coordinator and an agent for each domain. They publish
    /// the same bytes as in one process under the same seed.
    #[arg(long)]
    pub real: bool,
}

/// A run that has been prepared: its folder and what is to be done.
pub(crate) struct Prepared {
    pub(crate) folder: RunFolder,
    pub(crate) scenario: Scenario,
    digest: PlanDigest,
    data: Arc<Data>,
    /// The tasks that were asked for, done or not.
    tasks: Vec<Task>,
    /// Names of all tasks of this shard.
    shard: Vec<String>,
    real: bool,
}

/// One arm on one set under one seed.
#[derive(Debug, Clone)]
struct Task {
    set: usize,
    seed: u64,
    arm: Arm,
    id: String,
}

/// What a task runs.
#[derive(Debug, Clone)]
enum Arm {
    Duplicates,
    Rivals,
    Flow(Flow),
    Federation(Federation),
}

impl Arm {
    fn name(&self) -> &str {
        match self {
            Self::Duplicates => DUPLICATES,
            Self::Rivals => RIVALS,
            Self::Flow(flow) => &flow.name,
            Self::Federation(federation) => &federation.name,
        }
    }
}

/// Runs a scenario; gives the run's folder.
///
/// # Errors
/// The scenario's faults, tables or folders that can't be used, or the first task that failed.
pub fn run(args: &RunArgs) -> Result<RunFolder> {
    let (scenario, text) = Scenario::load(&args.scenario)?;
    let base = args.scenario.parent().unwrap_or_else(|| Path::new(".")).to_owned();
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(&scenario.name));
    let data = Arc::new(Data::open(&scenario.data, &base, args.how.data.as_deref())?);
    let mut first = 0;
    let prepared = prepare(&out, scenario, &text, data, &base, &args.how, &mut first)?;
    let mut done = execute(vec![prepared], args.how.jobs)?;
    done.pop().context("no run")
}

/// Opens a run's folder; `base` is the scenario's own, and `first` counts tasks over several runs, so that shards are cut
/// through all of them.
pub(crate) fn prepare(
    out: &Path,
    scenario: Scenario,
    text: &str,
    data: Arc<Data>,
    base: &Path,
    how: &How,
    first: &mut usize,
) -> Result<Prepared> {
    if how.real
        && let Some(flow) = scenario.flows.iter().find(|flow| flow.faults != FlowFaults::default())
    {
        bail!(
            "--real runs flows in which nothing goes wrong: flow {} has faults; run it without --real",
            flow.name
        );
    }
    if how.real && scenario.flows.is_empty() {
        bail!("--real runs flows as processes, and {} has none; run it without --real", scenario.name);
    }
    let shard = how.shard.unwrap_or(Shard::WHOLE);
    let all = tasks(&scenario, data.sets());
    let sets = data
        .sets()
        .iter()
        .map(|set| Ok(SetDigest { name: set.name().to_owned(), digest: set.digest()? }))
        .collect::<Result<Vec<_>>>()?;
    let manifest = Manifest {
        format: FORMAT,
        scenario: scenario.name.clone(),
        scenario_digest: Digest::of(text.as_bytes()),
        program: env!("CARGO_PKG_VERSION").to_owned(),
        program_digest: program_digest()?,
        base_model: Digest::of(BASE_MODEL),
        seeds: scenario.seeds,
        sets,
        tasks: all.len(),
        shard,
        commit: commit(base),
        real: how.real,
    };
    let folder = RunFolder::open(out, text, &manifest)?;
    let start = *first;
    *first += all.len();
    let known: Vec<&str> = data.sets().iter().map(Source::name).collect();
    if let Some(strange) = how.sets.iter().find(|set| !known.contains(&set.as_str())) {
        bail!("--sets: {strange} is none of {}", known.join(", "));
    }
    let asked = |task: &Task| {
        how.sets.is_empty() || known.get(task.set).is_some_and(|name| how.sets.iter().any(|set| set == name))
    };
    let mine = all.into_iter().enumerate().filter(|(i, _)| shard.has(start + i)).map(|(_, task)| task);
    let mine: Vec<Task> = mine.collect();
    let names = mine.iter().map(|task| task.id.clone()).collect();
    let tasks = mine.into_iter().filter(asked).collect();
    let digest = PlanDigest::of(text.as_bytes());
    Ok(Prepared { folder, digest, data, tasks, shard: names, scenario, real: how.real })
}

/// The commit of the work tree that a folder lies in; none outside of one, or without git.
fn commit(folder: &Path) -> Option<String> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let git = |args: &[&str]| {
        let output = std::process::Command::new("git").arg("-C").arg(folder).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"])?;
    let changed = !git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(if changed { format!("{commit}+changes") } else { commit })
}

fn tasks(scenario: &Scenario, sets: &[Source]) -> Vec<Task> {
    let mut arms = Vec::new();
    if !scenario.rivals.is_empty() {
        arms.push(Arm::Rivals);
    }
    arms.extend(scenario.federations.iter().cloned().map(Arm::Federation));
    arms.extend(scenario.flows.iter().cloned().map(Arm::Flow));
    let mut all = Vec::new();
    if scenario.duplicates {
        // Before any figure that they would inflate.
        all.extend(sets.iter().enumerate().map(|(set, source)| {
            let id = format!("{}.0000.{DUPLICATES}", source.name());
            Task { set, seed: 0, arm: Arm::Duplicates, id }
        }));
    }
    for (set, source) in sets.iter().enumerate() {
        for seed in 0..u64::from(scenario.seeds) {
            for arm in &arms {
                let id = format!("{}.{seed:04}.{}", source.name(), arm.name());
                all.push(Task { set, seed, arm: arm.clone(), id });
            }
        }
    }
    all
}

/// Does everything that isn't done yet, then gathers rows and draws reports.
pub(crate) fn execute(runs: Vec<Prepared>, jobs: Option<u16>) -> Result<Vec<RunFolder>> {
    let queue: Vec<(&Prepared, &Task)> = runs
        .iter()
        .flat_map(|run| run.tasks.iter().map(move |task| (run, task)))
        .filter(|(run, task)| !run.folder.has(&task.id))
        .collect();
    let total: usize = runs.iter().map(|run| run.tasks.len()).sum();
    let jobs = jobs
        .map_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get), usize::from);
    let progress = Progress::new(total, total - queue.len(), jobs, queue.iter().map(|(_, task)| *task));
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let failed: Mutex<Option<anyhow::Error>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(queue.len()) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Some((run, task)) = queue.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                    let began = now();
                    let tell = |what: &str| progress.tell(task, what);
                    let outcome = run
                        .rows(task, &tell)
                        .and_then(|rows| run.folder.store(&task.id, &rows))
                        .with_context(|| task.id.clone());
                    match outcome {
                        Ok(()) => progress.done(task, began.elapsed()),
                        Err(error) => {
                            stop.store(true, Ordering::Relaxed);
                            let mut first = failed.lock().unwrap_or_else(PoisonError::into_inner);
                            first.get_or_insert(error);
                        }
                    }
                }
            });
        }
    });
    progress.end();
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error.context("a task failed; the same command goes on from here"));
    }
    let mut folders = Vec::new();
    for run in runs {
        let ids: Vec<String> = run.shard.iter().filter(|id| run.folder.has(id)).cloned().collect();
        let rows = run.folder.gather(&ids)?;
        let manifest = run.folder.manifest()?;
        let judgement = run.judged()?;
        let page = report::html(&run.scenario, &manifest, &rows, judgement.as_ref());
        super::results::write(&run.folder.report_path(), page.as_bytes())?;
        super::results::write(&run.folder.summary_path(), report::summary::csv(&rows).as_bytes())?;
        folders.push(run.folder);
    }
    Ok(folders)
}

impl Prepared {
    /// What came of the scenario's targets, kept beside the rows; none without targets, or in a part of a run.
    fn judged(&self) -> Result<Option<Judgement>> {
        if self.scenario.targets.is_none() || self.folder.manifest()?.shard != Shard::WHOLE {
            return Ok(None);
        }
        let loaded = Loaded::read(&self.folder.root().display().to_string())?;
        let judgement = targets::judge(&loaded, DRAWS)?;
        super::results::write(&self.folder.targets_path(), &serde_json::to_vec_pretty(&judgement)?)?;
        Ok(Some(judgement))
    }

    /// Does one task.
    fn rows(&self, task: &Task, tell: &dyn Fn(&str)) -> Result<Vec<Row>> {
        let source = self.data.sets().get(task.set).context("no such set")?;
        let world = source.world(&self.scenario, task.seed)?;
        let noise = match &task.arm {
            Arm::Duplicates | Arm::Rivals => Noise::None,
            Arm::Flow(flow) => match flow.noise_placement.unwrap_or_default() {
                NoisePlacement::Local => Noise::Local,
                NoisePlacement::SecureSum => Noise::SecureSum,
            },
            Arm::Federation(federation) => match federation.privacy.as_ref().map(|p| p.placement) {
                None => Noise::None,
                Some(Placement::Local) => Noise::Local,
                Some(Placement::Shared) => Noise::SecureSum,
            },
        };
        let arm = task.arm.name();
        let place = Where { set: source.name(), seed: task.seed, arm, round: None, noise };
        let Done { mut rows, answers } = match &task.arm {
            Arm::Duplicates => {
                tell("counting rows that are there twice");
                let everybody = world.members.iter().chain(&world.newcomer).cloned().collect::<Vec<_>>();
                Done { rows: duplicates::measure(&everybody, &place)?, answers: Vec::new() }
            }
            Arm::Rivals => self.rivals(&world, &place, tell)?,
            Arm::Flow(flow) => self.flow(flow, &world, task, &place, tell)?,
            Arm::Federation(federation) => self.federation(federation, &world, &place, tell)?,
        };
        for row in rows.iter_mut().filter(|row| world.hostile.contains(&row.domain)) {
            row.counted = false;
        }
        if self.scenario.keep_answers {
            self.folder.store_answers(&task.id, &answers)?;
        }
        Ok(rows)
    }

    /// What a method said about a domain, to be kept.
    fn kept(place: &Where<'_>, method: &str, domain: &str, test: &Test, answers: &[f64]) -> Answered {
        Answered {
            set: place.set.to_owned(),
            seed: place.seed,
            arm: place.arm.to_owned(),
            method: method.to_owned(),
            domain: domain.to_owned(),
            rows: None,
            draw: 0,
            entities: Arc::clone(&test.0),
            labels: Arc::clone(&test.1),
            answers: answers.iter().map(|answer| *answer as f32).collect(),
        }
    }

    /// All of what methods said, if it is to be kept.
    fn all_kept(&self, place: &Where<'_>, domains: &[(&str, &Answers, &Tables)]) -> Vec<Answered> {
        let mut all = Vec::new();
        if self.scenario.keep_answers {
            for (domain, answers, tables) in domains {
                let test = (Arc::new(entities(&tables.test)), Arc::new(tables.labels.clone()));
                all.extend(
                    answers.iter().map(|(method, said)| Self::kept(place, method, domain, &test, said)),
                );
            }
        }
        all
    }

    fn rivals(&self, world: &World, place: &Where<'_>, tell: &dyn Fn(&str)) -> Result<Done> {
        let tables = world.members.iter().map(Member::tables).collect::<Result<Vec<_>>>()?;
        let wanted: Vec<&'static str> = self.scenario.rivals.iter().map(|rival| rival.name()).collect();
        let answers = measure::rivals(&world.members, &tables, &wanted, place.seed, tell)?;
        let domains: Vec<(&str, &Answers, &Tables)> = world
            .members
            .iter()
            .zip(&answers)
            .zip(&tables)
            .map(|((member, answers), tables)| (member.domain.as_str(), answers, tables))
            .collect();
        let rows = place.all(&self.scenario.metrics, &labelled(&domains));
        Ok(Done { rows, answers: self.all_kept(place, &domains) })
    }

    fn flow(
        &self,
        flow: &Flow,
        world: &World,
        task: &Task,
        place: &Where<'_>,
        tell: &dyn Fn(&str),
    ) -> Result<Done> {
        let root = tempfile::Builder::new().prefix("tabmesh-flow-").tempdir()?;
        let plan = flow.plan(&world.target, world.members.len())?;
        let members = &world.members;
        let setting = Setting { members, plan: &plan, seed: place.seed, faults: &flow.faults, tell };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let federated = if self.real {
            let program = std::env::current_exe().context("this program's own file")?;
            runtime.block_on(federation::run_real(root.path(), setting, &program))?
        } else {
            runtime.block_on(federation::run(root.path(), setting))?
        };
        runtime.shutdown_background();
        if let Some(learnt) = &federated.learnt {
            self.folder.store_adapter(&task.id, learnt)?;
        }
        let (seed, rounds, also) = (place.seed, plan.rounds.count, flow.also.as_slice());
        let scoring = Scoring { federated: &federated, members, seed, rounds, also, tell };
        let tables = members.iter().map(Member::tables).collect::<Result<Vec<_>>>()?;
        let ours = measure::ours(&scoring, &tables)?;
        let mut there: Vec<(&Member, &Ours, &Tables)> = Vec::new();
        for ours in &ours {
            let member = members.get(ours.member).context("no such member")?;
            there.push((member, ours, tables.get(ours.member).context("no such member")?));
        }
        let domains: Vec<(&str, &Answers, &Tables)> = there
            .iter()
            .map(|(member, ours, tables)| (member.domain.as_str(), &ours.answers, *tables))
            .collect();
        let mut rows = place.all(&self.scenario.metrics, &labelled(&domains));
        let mut answers = self.all_kept(place, &domains);
        // A member of some blends has the weight 0 in the others: means are over all domains.
        let served: BTreeSet<&String> = there.iter().flat_map(|(_, ours, _)| ours.blend.keys()).collect();
        for (member, ours, tables) in &there {
            for (round, said) in &ours.by_round {
                let place = Where { round: Some(*round), ..place.clone() };
                let wanted = &self.scenario.metrics;
                rows.extend(place.domain(wanted, "forest", &member.domain, said, &tables.labels));
            }
            let counts = measure::counted(&tables.labels);
            for name in &served {
                let weight = ours.blend.get(*name).copied().unwrap_or_default();
                rows.extend(place.row(
                    "served",
                    &member.domain,
                    counts,
                    &format!("weight of {name}"),
                    Some(weight),
                ));
            }
            let books = federated.layout.domain(&member.name()).join("data").join("books");
            let spent = balance_of(&replay(&read_entries(&books)?)?, &member.product)
                .and_then(|balance| balance.epsilon_spent)
                .map(tabmesh_privacy::budget::Epsilon::get);
            rows.extend(place.row("served", &member.domain, counts, "epsilon", spent));
        }
        if let (Some(newcomer), Some(spec)) = (&world.newcomer, &self.scenario.newcomers) {
            let sizes: Vec<usize> = spec.rows.iter().map(|rows| *rows as usize).collect();
            for line in measure::newcomer(&scoring, newcomer, &sizes, usize::from(spec.draws))? {
                let labels: Vec<u8> =
                    line.test.labels.iter().map(|label| u8::from(*label == Some(1))).collect();
                let counts = line.counted_draws > 0 && measure::counted(&labels);
                let size = u32::try_from(line.rows).ok();
                for (name, weight) in &line.served {
                    let metric = format!("weight of {name}");
                    let row = place.row("served", &newcomer.domain, counts, &metric, Some(*weight));
                    rows.extend(row.map(|row| Row { rows: size, ..row }));
                }
                if self.scenario.keep_answers {
                    let test = (Arc::new(entities(&line.test)), Arc::new(labels));
                    for (draw, said) in (0_u32..).zip(&line.answers) {
                        answers.extend(said.iter().map(|(method, said)| Answered {
                            rows: size,
                            draw,
                            ..Self::kept(place, method, &newcomer.domain, &test, said)
                        }));
                    }
                }
                for (metric, figures) in [("auc", &line.auc), ("log_loss", &line.log_loss)] {
                    let wanted = match metric {
                        "auc" => Metric::Auc,
                        _ => Metric::LogLoss,
                    };
                    if !self.scenario.metrics.contains(&wanted) {
                        continue;
                    }
                    for (method, value) in figures {
                        let row = place.row(method, &newcomer.domain, counts, metric, Some(*value));
                        rows.extend(row.map(|row| Row { rows: size, ..row }));
                    }
                }
            }
        }
        Ok(Done { rows, answers })
    }

    fn federation(
        &self,
        spec: &Federation,
        world: &World,
        place: &Where<'_>,
        tell: &dyn Fn(&str),
    ) -> Result<Done> {
        tell("coding rows");
        let domains = virtual_domains(&world.members)?;
        let wanted = &self.scenario.metrics;
        let (mut rows, mut kept) = (Vec::new(), Vec::new());
        let mut hear = |end: &RoundEnd<'_>| -> Result<()> {
            tell(&format!("round {} of {}", end.round, spec.rounds));
            let place = Where { round: Some(end.round), ..place.clone() };
            let (mut tenths, mut pool) = (Tenths::default(), Pool::default());
            let solved = end.learner.solved(end.parameters);
            for domain in &domains {
                let test = &domain.test;
                let answers: Vec<f64> =
                    (0..test.len()).map(|row| end.learner.probability(&solved, test.row(row))).collect();
                rows.extend(place.domain(wanted, MODEL, &domain.domain, &answers, &test.labels));
                tenths.add(&answers, &test.labels);
                pool.add(&answers, &test.labels);
                if end.round == spec.rounds && self.scenario.keep_answers {
                    let test = (Arc::clone(&domain.entities), Arc::new(test.labels.clone()));
                    kept.push(Self::kept(&place, MODEL, &domain.domain, &test, &answers));
                }
            }
            rows.extend(pool.rows(&place, wanted, MODEL));
            if end.round == spec.rounds && wanted.contains(&Metric::Reliability) {
                rows.extend(tenths.rows(&place, MODEL));
            }
            let counts = end.counts;
            for (metric, value) in [
                ("updates_accepted", counts.accepted),
                ("updates_dropped", counts.dropped),
                ("updates_late", counts.late),
                ("updates_screened", counts.screened),
                ("updates_over_budget", counts.exhausted),
                ("rounds_abandoned", counts.abandoned),
            ] {
                rows.extend(place.row(MODEL, "*", true, metric, Some(f64::from(value))));
            }
            rows.extend(place.row(MODEL, "*", true, "epsilon", counts.epsilon));
            Ok(())
        };
        rounds::run(spec, &domains, place.seed, self.digest, &mut hear)?;
        Ok(Done { rows, answers: kept })
    }
}

/// What came of a task.
struct Done {
    rows: Vec<Row>,
    /// What is to be kept of answers.
    answers: Vec<Answered>,
}

/// Entities and labels of test rows.
type Test = (Arc<Vec<u32>>, Arc<Vec<u8>>);

/// Domains with the labels of their test rows.
fn labelled<'a>(domains: &[(&'a str, &'a Answers, &'a Tables)]) -> Vec<(&'a str, &'a Answers, &'a [u8])> {
    domains.iter().map(|(domain, answers, tables)| (*domain, *answers, tables.labels.as_slice())).collect()
}

/// Tells what is done and how long the rest may take.
struct Progress {
    bar: Option<ProgressBar>,
    state: Mutex<State>,
    jobs: usize,
    total: usize,
}

struct State {
    done: usize,
    /// Tasks left, and seconds and number of those done here, by arm.
    left: BTreeMap<String, usize>,
    took: BTreeMap<String, (f64, usize)>,
    /// When a line was last told.
    told: Instant,
}

impl Progress {
    fn new<'a>(total: usize, done: usize, jobs: usize, queue: impl Iterator<Item = &'a Task>) -> Self {
        let mut left: BTreeMap<String, usize> = BTreeMap::new();
        queue.for_each(|task| *left.entry(task.arm.name().to_owned()).or_default() += 1);
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total as u64);
            if let Ok(style) = ProgressStyle::with_template("[{pos}/{len}] {bar:30} {prefix} {msg}") {
                bar.set_style(style);
            }
            bar.set_position(done as u64);
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        if done > 0 {
            say(&format!("{done} of {total} tasks are done already"));
        }
        let state = State { done, left, took: BTreeMap::new(), told: now() };
        Self { bar, state: Mutex::new(state), jobs, total }
    }

    fn tell(&self, task: &Task, what: &str) {
        let line = format!("{}: {what}", task.id);
        match &self.bar {
            Some(bar) => bar.set_message(line),
            // Where nobody watches a bar, a word now and then says that it goes on.
            None => {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.told.elapsed() >= SILENCE {
                    state.told = now();
                    say(&format!("[{}/{}] {line}", state.done, self.total));
                }
            }
        }
    }

    fn done(&self, task: &Task, took: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.done += 1;
        let arm = task.arm.name().to_owned();
        if let Some(left) = state.left.get_mut(&arm) {
            *left -= 1;
        }
        let entry = state.took.entry(arm).or_default();
        *entry = (entry.0 + took.as_secs_f64(), entry.1 + 1);
        let rest = state.rest(self.jobs);
        state.told = now();
        let line = format!("{} took {:.1} s", task.id, took.as_secs_f64());
        match &self.bar {
            Some(bar) => {
                bar.set_position(state.done as u64);
                bar.set_prefix(rest);
                bar.set_message(line);
            }
            None => say(&format!("[{}/{}] {line}; {rest}", state.done, self.total)),
        }
    }

    fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Tells a line; that nobody listens any more is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

impl State {
    /// How long the rest may take if each arm goes on as it did; arms not seen yet take as long as the mean of all.
    fn rest(&self, jobs: usize) -> String {
        let (seconds, number) = self.took.values().fold((0.0, 0), |s, t| (s.0 + t.0, s.1 + t.1));
        let mean = seconds / number.max(1) as f64;
        let of = |arm: &String| self.took.get(arm).map_or(mean, |(s, n)| s / (*n).max(1) as f64);
        let rest: f64 = self.left.iter().map(|(arm, left)| of(arm) * *left as f64).sum::<f64>();
        let rest = rest / jobs.max(1) as f64;
        if rest < 90.0 {
            format!("about {:.0} s left", rest.ceil())
        } else {
            format!("about {:.0} min left", (rest / 60.0).ceil())
        }
    }
}

/// After so long without a line, where there is no bar, one says what is being done.
const SILENCE: Duration = Duration::from_secs(60);
/// Name of the arm of methods without a federation.
pub(crate) const RIVALS: &str = "rivals";
/// Name of the arm that counts rows that are there twice.
pub(crate) const DUPLICATES: &str = "duplicates";
/// Method name of a federation's model.
pub(crate) const MODEL: &str = "model";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_told_by_arm_over_all_jobs() {
        let state = State {
            done: 2,
            left: BTreeMap::from([("a".to_owned(), 3), ("b".to_owned(), 1)]),
            took: BTreeMap::from([("a".to_owned(), (20.0, 2))]),
            told: now(),
        };
        // Three of 10 s, one unseen of the mean 10 s, on two cores.
        assert_eq!(state.rest(2), "about 20 s left");
        assert_eq!(state.rest(1), "about 40 s left");
    }
}
