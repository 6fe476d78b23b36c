//! `bench utility`: federations of a set under several seeds, and the table of what each step is worth.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anstream::println;
use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::ProgressBar;
use serde::Serialize;
use tabmesh_federation::plan::Plan;
use tabmesh_federation::secagg::roster::MIN_MEMBERS;

use super::contracts::Declared;
use super::federation::{self, Federated, Setting};
use super::measure::{self, DomainLine, Figures, NewcomerLine, Scoring};
use super::member::Member;
use super::newcomer::newcomer;
use super::set::Set;
use crate::cli::Output;
use crate::process::now;
use crate::quickstart::deployment::{self, PlanChoices};
use crate::scenario::document::FlowFaults;
use crate::score::MIN_CLASS_ROWS;

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Folder of a set: `dataset.json`, `train/DOMAIN.parquet`, `test/DOMAIN.parquet`.
    #[arg(long)]
    data: PathBuf,
    /// ε of the whole plan, at δ = 1e-5.
    #[arg(long, default_value_t = 3.0)]
    epsilon: f64,
    /// Federations, each with another newcomer and other noise.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// Draws of a newcomer's rows.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    draws: u16,
    /// Rounds of the plan.
    #[arg(long, default_value_t = PlanChoices::default().rounds)]
    rounds: u32,
    /// Who adds the noise: `secure-sum`, each agent a share under a mask that only the sum over the cohort is free of (one colluder and
    /// one dropout assumed; with fewer than 4 members each adds all of it), or `local`, each agent all of it.
    #[arg(long, value_enum, default_value_t = Placement::SecureSum)]
    noise: Placement,
    /// Steps of pre-training on the corpus.
    #[arg(long, default_value_t = PlanChoices::default().pretrain_steps)]
    pretrain_steps: u32,
}

/// Who adds the noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Placement {
    /// Each agent a share.
    SecureSum,
    /// Each agent all of it.
    Local,
}

impl Placement {
    /// Whether a federation of so many members sums securely.
    fn is_secure(self, members: usize) -> bool {
        self == Self::SecureSum && members >= MIN_MEMBERS
    }
}

#[derive(Debug, Serialize)]
struct Outcome {
    set: String,
    epsilon: f64,
    delta: f64,
    seeds: u64,
    unit: &'static str,
    noise: &'static str,
    declarations: &'static str,
    #[serde(rename = "macro")]
    macro_mean: Macro,
    /// Standard errors of the macro means over seeds; empty for one seed.
    macro_standard_error: Macro,
    /// What agents serve: how often, and with what weight, over the domains that count.
    served: Vec<MemberLine>,
    /// Domains of a seed that have too few test rows of a class for the means.
    excluded: Vec<Excluded>,
    domains: Vec<DomainLine>,
    newcomers: Vec<NewcomerLine>,
    version: &'static str,
    wall_s: f64,
}

#[derive(Debug, Default, Serialize)]
struct Macro {
    auc: BTreeMap<String, f64>,
    log_loss: BTreeMap<String, f64>,
    /// Intercept and slope of the labels' logit on the served one; 0 and 1 are calibrated.
    served_calibration: BTreeMap<String, f64>,
}

/// A member of the blends that are served.
#[derive(Debug, PartialEq, Serialize)]
struct MemberLine {
    member: String,
    /// Share of domains whose blend it is in.
    served_in: f64,
    /// Its weight, 0 where it isn't served.
    mean_weight: f64,
}

#[derive(Debug, Serialize)]
struct Excluded {
    seed: u64,
    domain: String,
}

/// Tells steps, and how long the rest may take.
struct Progress {
    bar: Option<ProgressBar>,
    began: std::time::Instant,
    done: Cell<u64>,
    /// Steps as far as they are known beforehand.
    total: u64,
}

impl Progress {
    fn new(total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(ProgressBar::new_spinner);
        if let Some(bar) = &bar {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self { bar, began: now(), done: Cell::new(0), total }
    }

    /// A step begins.
    fn tell(&self, what: &str) {
        let (done, elapsed) = (self.done.get(), self.began.elapsed());
        self.done.set(done + 1);
        let line = format!("{what}; {}", left(done, self.total, elapsed));
        match &self.bar {
            Some(bar) => bar.set_message(line),
            None => eprintln!("[{:6.1} s] {line}", elapsed.as_secs_f64()),
        }
    }

    fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How long the rest may take, if it takes as long a step as what is done.
fn left(done: u64, total: u64, elapsed: Duration) -> String {
    if done == 0 || total <= done {
        return format!("step {} of about {total}", done + 1);
    }
    let rest = elapsed.as_secs_f64() / done as f64 * (total - done) as f64;
    format!("step {} of about {total}, about {} min left", done + 1, (rest / 60.0).ceil())
}

/// Runs the federations, scores them, prints the table.
///
/// # Errors
/// A folder that can't be read, or a federation that doesn't come to its end.
pub fn run(args: &Args, output: Output) -> Result<()> {
    let outcome = measured(args)?;
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&outcome)?),
        Output::Text => print(&outcome),
    }
    Ok(())
}

fn measured(args: &Args) -> Result<Outcome> {
    let began = now();
    let set = Set::read(&args.data)?;
    let sizes = measure::NEWCOMER_ROWS.len() as u64;
    let of_seed = FLOW_STEPS
        + u64::from(args.rounds) * EVENTS_A_ROUND
        + set.domains.len() as u64
        + sizes * u64::from(args.draws);
    let progress = Progress::new(args.seeds * of_seed);
    let (mut domains, mut newcomers) = (Vec::new(), Vec::new());
    for seed in 0..args.seeds {
        let last = RefCell::new(String::new());
        let tell = |what: &str| {
            // Steps that report themselves again and again count once.
            if last.replace(what.to_owned()) != what {
                progress.tell(&format!("seed {seed} of {}: {what}", args.seeds));
            }
        };
        let (lines, more) = one(args, &set, seed, &tell)?;
        domains.extend(lines);
        newcomers.extend(more);
    }
    progress.end();
    ensure!(domains.iter().any(|line| line.counted), "no domain has enough test rows of each class");
    let macro_of = |of_domain: fn(&DomainLine) -> &Figures,
                    of_newcomer: fn(&NewcomerLine) -> &Figures,
                    best: fn(f64, f64) -> f64| {
        let mut by_seed: Vec<BTreeMap<String, f64>> = (0..args.seeds)
            .map(|seed| {
                let lines: Vec<&DomainLine> =
                    domains.iter().filter(|l| l.seed == seed && l.counted).collect();
                let mut figures = means(&lines.iter().map(|line| of_domain(line)).collect::<Vec<_>>());
                for line in newcomers.iter().filter(|line| line.seed == seed) {
                    let size = if line.rows == 64 { String::new() } else { format!("_{}", line.rows) };
                    figures
                        .extend(of_newcomer(line).iter().map(|(n, f)| (format!("newcomer{size}_{n}"), *f)));
                }
                figures
            })
            .collect();
        with_best(&mut by_seed, best);
        over_seeds(&by_seed)
    };
    let (auc, auc_error) = macro_of(|line| &line.auc, |line| &line.auc, f64::max);
    let (log_loss, log_loss_error) = macro_of(|line| &line.log_loss, |line| &line.log_loss, f64::min);
    let calibration: Vec<BTreeMap<String, f64>> = (0..args.seeds)
        .map(|seed| {
            let of_seed = domains.iter().filter(|line| line.seed == seed && line.counted);
            let found: Vec<_> = of_seed.filter_map(|line| line.served_calibration).collect();
            let mean = |figure: fn(&measure::Calibrated) -> f64| {
                found.iter().map(figure).sum::<f64>() / found.len().max(1) as f64
            };
            BTreeMap::from([
                ("intercept".to_owned(), mean(|c| c.intercept)),
                ("slope".to_owned(), mean(|c| c.slope)),
            ])
        })
        .collect();
    let (calibration, calibration_error) = over_seeds(&calibration);
    Ok(Outcome {
        set: set.name.clone(),
        epsilon: args.epsilon,
        delta: PlanChoices::default().delta,
        seeds: args.seeds,
        unit: if set.by_entity { "entity" } else { "row" },
        noise: if args.noise.is_secure(set.domains.len().saturating_sub(1)) {
            "secure_sum: every agent adds a share, for 1 dropout and 1 colluder; the coordinator sees sums alone"
        } else {
            "local: every agent noises alone"
        },
        declarations: "ranges and levels stand in for the owners' and come from pooled training rows, outside the claim",
        macro_mean: Macro { auc, log_loss, served_calibration: calibration },
        macro_standard_error: Macro {
            auc: auc_error,
            log_loss: log_loss_error,
            served_calibration: calibration_error,
        },
        served: members(&domains),
        excluded: domains
            .iter()
            .filter(|line| !line.counted)
            .map(|line| Excluded { seed: line.seed, domain: line.domain.clone() })
            .collect(),
        domains,
        newcomers,
        version: env!("CARGO_PKG_VERSION"),
        wall_s: began.elapsed().as_secs_f64(),
    })
}

/// One federation, with another domain as the newcomer each time.
fn one(
    args: &Args,
    set: &Set,
    seed: u64,
    tell: &dyn Fn(&str),
) -> Result<(Vec<DomainLine>, Vec<NewcomerLine>)> {
    let size = |domain: &String| set.size(&set.train(domain), &set.test(domain));
    let sizes = set.domains.iter().map(size).collect::<Result<Vec<_>>>()?;
    let left_out = newcomer(&sizes, &measure::NEWCOMER_ROWS, seed);
    let newcomer = set.domains.get(left_out).context("no domain")?;
    let members: Vec<String> = set.domains.iter().filter(|domain| *domain != newcomer).cloned().collect();
    let declared = Declared::from_rows(set, &set.pooled(&members)?)?;
    let of = |domain: &String| -> Result<Member> {
        let train = set.train(domain).canonicalize()?;
        Ok(declared.member(domain, &train, &set.test(domain), &BTreeSet::new()))
    };
    let members = members.iter().map(of).collect::<Result<Vec<_>>>()?;
    let root = tempfile::Builder::new().prefix("tabmesh-utility-").tempdir()?;
    let choices = PlanChoices {
        name: set.name.clone(),
        target: "target.label".into(),
        epsilon: args.epsilon,
        agents: members.len(),
        rounds: args.rounds,
        pretrain_steps: args.pretrain_steps,
        deadline_s: 3600,
        secure_sum: args.noise.is_secure(members.len()),
        ..PlanChoices::default()
    };
    let (plan, _) = Plan::parse(deployment::plan_yaml(&choices).as_bytes(), "plan.yaml")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let faults = FlowFaults::default();
    let setting = Setting { members: &members, plan: &plan, seed, faults: &faults, tell };
    let federated: Federated = runtime.block_on(federation::run(root.path(), setting))?;
    runtime.shutdown_background();
    let rounds = args.rounds;
    let scoring = Scoring { federated: &federated, members: &members, seed, rounds, also: &[], tell };
    let lines = measure::members(&scoring)?;
    let newcomer = of(newcomer)?;
    Ok((lines, measure::newcomer(&scoring, &newcomer, &measure::NEWCOMER_ROWS, usize::from(args.draws))?))
}

/// Adds the best of the local and of the pooled rivals: the one that is best over all seeds, since picking anew in each would
/// flatter it.
fn with_best(by_seed: &mut [BTreeMap<String, f64>], best: fn(f64, f64) -> f64) {
    let (means, _) = over_seeds(by_seed);
    for (name, rivals) in [("best_local", LOCAL), ("best_pooled", POOLED)] {
        let known = || rivals.iter().filter_map(|rival| Some((*rival, *means.get(*rival)?)));
        let Some(top) = known().map(|(_, mean)| mean).reduce(best) else { continue };
        let Some((rival, _)) = known().find(|(_, mean)| mean.total_cmp(&top).is_eq()) else { continue };
        for figures in &mut *by_seed {
            let own = figures.get(rival).copied();
            figures.extend(own.map(|figure| (name.to_owned(), figure)));
        }
    }
}

/// How often and with what weight each member is served in the domains that count.
fn members(domains: &[DomainLine]) -> Vec<MemberLine> {
    let counted: Vec<&DomainLine> = domains.iter().filter(|line| line.counted).collect();
    let names: BTreeSet<&String> = counted.iter().flat_map(|line| line.served.keys()).collect();
    let n = counted.len().max(1) as f64;
    names
        .into_iter()
        .map(|name| {
            let weights: Vec<f64> =
                counted.iter().filter_map(|line| line.served.get(name).copied()).collect();
            MemberLine {
                member: name.clone(),
                served_in: weights.len() as f64 / n,
                mean_weight: weights.iter().sum::<f64>() / n,
            }
        })
        .collect()
}

/// Means over lines of the figures that all of them have.
fn means(lines: &[&Figures]) -> BTreeMap<String, f64> {
    let names: BTreeSet<&str> = lines.iter().flat_map(|line| line.keys().copied()).collect();
    names
        .into_iter()
        .filter_map(|name| {
            let figures: Vec<f64> =
                lines.iter().map(|line| line.get(name).copied()).collect::<Option<_>>()?;
            Some((name.to_owned(), figures.iter().sum::<f64>() / figures.len() as f64))
        })
        .collect()
}

/// Means over seeds, and their standard errors where there is more than one seed.
fn over_seeds(by_seed: &[BTreeMap<String, f64>]) -> (BTreeMap<String, f64>, BTreeMap<String, f64>) {
    let (mut all, mut errors) = (BTreeMap::new(), BTreeMap::new());
    let names: BTreeSet<&String> = by_seed.iter().flat_map(BTreeMap::keys).collect();
    for name in names {
        let figures: Vec<f64> = by_seed.iter().filter_map(|figures| figures.get(name).copied()).collect();
        let n = figures.len() as f64;
        let mean = figures.iter().sum::<f64>() / n;
        all.insert(name.clone(), mean);
        if figures.len() > 1 {
            let variance = figures.iter().map(|f| (f - mean).powi(2)).sum::<f64>() / (n - 1.0);
            errors.insert(name.clone(), (variance / n).sqrt());
        }
    }
    (all, errors)
}

fn print(outcome: &Outcome) {
    let Outcome { set, epsilon, delta, seeds, unit, noise, declarations, .. } = outcome;
    println!("{set}: epsilon {epsilon}, delta {delta}, unit {unit}, {seeds} federations; {noise}");
    println!("{declarations}");
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["macro mean", "AUC", "s.e.", "log loss", "s.e."]);
    let figure = |figures: &BTreeMap<String, f64>, name: &str| {
        figures.get(name).map_or_else(|| "-".to_owned(), |figure| format!("{figure:.4}"))
    };
    for name in outcome.macro_mean.auc.keys() {
        table.add_row([
            name.clone(),
            figure(&outcome.macro_mean.auc, name),
            figure(&outcome.macro_standard_error.auc, name),
            figure(&outcome.macro_mean.log_loss, name),
            figure(&outcome.macro_standard_error.log_loss, name),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["served", "in domains", "mean weight"]);
    for MemberLine { member, served_in, mean_weight } in &outcome.served {
        table.add_row([member.clone(), format!("{:.0} %", 100.0 * served_in), format!("{mean_weight:.3}")]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    let calibration = &outcome.macro_mean.served_calibration;
    println!(
        "calibration of what is served: slope {}, intercept {} (1 and 0 are calibrated)",
        figure(calibration, "slope"),
        figure(calibration, "intercept")
    );
    for Excluded { seed, domain } in &outcome.excluded {
        println!("not in the means: {domain}, seed {seed}: fewer than {MIN_CLASS_ROWS} test rows of a class");
    }
    println!("{:.0} s", outcome.wall_s);
}

/// Events of a plan that don't depend on the command line, and the scoring of pooled rivals.
const FLOW_STEPS: u64 = 10;
/// Events of a round.
const EVENTS_A_ROUND: u64 = 1;
/// Rivals that use a domain's own rows alone.
const LOCAL: &[&str] = &["local_trees", "local_logistic", "local_base"];
/// Rivals that pool real rows, as nobody may.
const POOLED: &[&str] = &["pooled_trees", "pooled_logistic", "pooled_base"];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::Arc;

    use tabmesh_agent::choose::Member as BlendMember;
    use tabmesh_agent::promote::{Candidate, Rows, Tokens, Weights};
    use tabmesh_agent::serve::Predictor;
    use tabmesh_agent::{Local, Switches};
    use tabmesh_contract::contract::Contract;
    use tabmesh_tfm::context::Context;
    use tabmesh_tfm::model::Model;
    use tabmesh_tfm::table::{Coding, Preprocessing};

    use super::*;
    use crate::quickstart::deployed::BASE_MODEL;
    use crate::quickstart::measure::loaded;
    use crate::utility::made_up::write_set;

    #[test]
    fn a_folder_goes_through_the_whole_loop_and_every_step_has_a_figure() {
        let folder = tempfile::tempdir().unwrap();
        write_set(folder.path(), &["north_1", "south_1", "east_1", "west_1"]);
        let args = Args {
            data: folder.path().to_owned(),
            epsilon: 3.0,
            seeds: 1,
            draws: 1,
            noise: Placement::Local,
            rounds: 1,
            pretrain_steps: 1,
        };
        let outcome = measured(&args).unwrap();
        // The first domain is the first seed's newcomer and takes part in nothing.
        let domains: Vec<&str> = outcome.domains.iter().map(|line| line.domain.as_str()).collect();
        assert_eq!(domains, ["south_1", "east_1", "west_1"]);
        assert_eq!(
            outcome.newcomers.first().map(|line| (line.domain.as_str(), line.rows)),
            Some(("north_1", 64))
        );
        let names = [
            "local_trees",
            "local_logistic",
            "local_base",
            "local_trees_corpus",
            "corpus_logistic",
            "pooled_trees",
            "pooled_logistic",
            "pooled_base",
            "base",
            "base_mixed",
            "corpus",
            "forest",
            "rounds",
            "served",
            "best_local",
            "best_pooled",
            "newcomer_local_trees",
            "newcomer_local_base",
            "newcomer_local_trees_corpus",
            "newcomer_corpus_logistic",
            "newcomer_forest",
            "newcomer_served",
        ];
        for name in names {
            let auc = outcome.macro_mean.auc.get(name).unwrap_or_else(|| panic!("no figure for {name}"));
            assert!(
                (0.0..=1.0).contains(auc) && outcome.macro_mean.log_loss.contains_key(name),
                "{name}: {auc}"
            );
        }
        assert!(outcome.macro_mean.auc["pooled_trees"] > 0.7, "{:?}", outcome.macro_mean.auc);
        // Every member's weights sum to 1, and the means over members as well.
        let weights: f64 = outcome.served.iter().map(|line| line.mean_weight).sum();
        assert!((weights - 1.0).abs() < 1e-9 && outcome.served.len() >= 3, "{:?}", outcome.served);
        assert!(outcome.excluded.is_empty() && outcome.macro_mean.served_calibration["slope"] > 0.0);
        let best = outcome.macro_mean.auc["best_local"];
        assert!(LOCAL.iter().all(|n| outcome.macro_mean.auc[*n] <= best));
    }

    /// With the coordinator gone, a restarted agent serves bit for bit what it served before: trees are fitted again.
    #[test]
    fn a_restart_without_coordinator_serves_the_same() {
        let folder = tempfile::tempdir().unwrap();
        write_set(folder.path(), &["north_1", "south_1", "east_1", "west_1"]);
        let set = Set::read(folder.path()).unwrap();
        let declared = Declared::from_rows(&set, &set.pooled(&set.domains).unwrap()).unwrap();
        let of = |domain: &String| {
            declared.member(domain, &set.train(domain), &set.test(domain), &BTreeSet::new())
        };
        let members: Vec<Member> = set.domains.iter().map(of).collect();
        let root = tempfile::tempdir().unwrap();
        let choices = PlanChoices {
            name: set.name.clone(),
            target: "target.label".into(),
            agents: set.domains.len(),
            rounds: 1,
            pretrain_steps: 1,
            deadline_s: 600,
            ..PlanChoices::default()
        };
        let (plan, _) = Plan::parse(deployment::plan_yaml(&choices).as_bytes(), "plan.yaml").unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let faults = FlowFaults::default();
        let setting = Setting { members: &members, plan: &plan, seed: 0, faults: &faults, tell: &|_| () };
        let federated = runtime.block_on(federation::run(root.path(), setting)).unwrap();
        let serving = federated.ends[0].serving.as_ref().unwrap();
        let name = members[0].name();
        let blend = serving.blend().unwrap();
        assert!(blend.shares.iter().any(|share| share.settings.is_some()), "no trees are served: {blend}");

        let config = tabmesh_agent::config::Config::load(&federated.layout.agent_config(&name)).unwrap();
        let contract = Contract::parse(
            "contract.yaml",
            &std::fs::read_to_string(federated.layout.contract(&name)).unwrap(),
        )
        .unwrap()
        .0;
        let schema = contract.approved_schema().unwrap();
        let test = crate::quickstart::measure::rows(&contract, &set.test(&set.domains[0]), &schema).unwrap();
        let switches = Switches { insecure_dev: true, reproducible_noise: Some(0) };
        let again = Local::open(config, switches, Arc::new(|| 0)).unwrap().serving;
        assert!(again.current().is_none());
        assert!(again.restore().unwrap());
        assert_eq!(again.predict(&test).unwrap(), serving.predict(&test).unwrap());
        assert_eq!(again.blend(), Some(blend.clone()));
        let (before, after) = (serving.current().unwrap(), again.current().unwrap());
        assert_eq!(before, after);
        assert!(blend.shares.iter().any(|share| share.member == BlendMember::OwnBase), "{blend}");

        // The base on own rows is the base and these rows, whatever was released; with one class it has corpus rows alone.
        let ours = loaded(&federated.layout, &federated.pki, &name, &schema, [0; 32]).unwrap();
        let own = members[0].tables().unwrap().train;
        let own = own.take(&(0..own.rows().min(200)).collect::<Vec<_>>());
        let (base, _) = Model::from_safetensors(BASE_MODEL).unwrap();
        let by_own = Preprocessing::fit(&schema, &own).unwrap();
        let context = Context::build(&base, &by_own.encode(&own, Coding::OwnRow).unwrap()).unwrap();
        let wanted = context.logits(&by_own.encode(&test, Coding::Foreign).unwrap(), None).unwrap();
        let got = ours.own_base(&own).unwrap().logits(&test).unwrap();
        assert!(got.len() == wanted.len() && got.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 0.02));
        let zeros: Vec<usize> = (0..own.rows()).filter(|row| own.labels[*row] == Some(0)).collect();
        let zeros = own.take(&zeros);
        let alone = Candidate { weights: Weights::Base, rows: Rows::Local, tokens: Tokens::Off };
        let of_one_class = ours.own_base(&zeros).unwrap().logits(&test).unwrap();
        assert_eq!(of_one_class, ours.build(alone, &zeros).unwrap().logits(&test).unwrap());

        // Nothing of the choice is in what the endpoint's metadata are made of.
        let told = format!("{} {} {:?}", after.name, after.base, after.adapter);
        assert!(!told.contains("trees") && !told.contains("context"), "{told}");
    }

    #[test]
    fn means_are_over_figures_that_every_domain_has() {
        let (a, b) = (Figures::from([("x", 1.0), ("y", 3.0)]), Figures::from([("x", 2.0)]));
        assert_eq!(means(&[&a, &b]), BTreeMap::from([("x".to_owned(), 1.5)]));
    }

    /// One is better in the first seed, the other in the second and overall.
    #[test]
    fn the_best_rival_is_one_over_all_seeds() {
        let seed = |trees: f64, logistic: f64| {
            BTreeMap::from([("local_trees".to_owned(), trees), ("local_logistic".to_owned(), logistic)])
        };
        let mut by_seed = [seed(0.80, 0.70), seed(0.60, 0.75)];
        with_best(&mut by_seed, f64::max);
        let chosen = |by_seed: &[BTreeMap<String, f64>; 2], rival: &str| {
            by_seed.iter().all(|figures| figures["best_local"].total_cmp(&figures[rival]).is_eq())
        };
        assert!(chosen(&by_seed, "local_logistic"), "{by_seed:?}");
        assert!(by_seed.iter().all(|figures| !figures.contains_key("best_pooled")));
        with_best(&mut by_seed, f64::min);
        assert!(chosen(&by_seed, "local_trees"), "{by_seed:?}");
    }

    #[test]
    fn standard_errors_need_two_seeds() {
        let one = BTreeMap::from([("x".to_owned(), 1.0)]);
        let (all, errors) = over_seeds(std::slice::from_ref(&one));
        assert_eq!((all, errors.len()), (one.clone(), 0));
        let (all, errors) = over_seeds(&[one, BTreeMap::from([("x".to_owned(), 3.0)])]);
        assert_eq!((all["x"], errors["x"]), (2.0, 1.0));
    }
}
