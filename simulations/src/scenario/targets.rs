//! What a scenario aims at, and whether a run met it: each aim's value with its 95 % interval, met or missed.
//!
//! An aim counts on the sets that the scenario names for it, which had no part in any choice; the same figure over the
//! other sets is shown beside it. Intervals are those of the paired bootstrap (see [`super::bootstrap`]). The best
//! rival of a set is the one with the highest mean there, and stays it in every draw.

mod aim;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use serde::{Deserialize, Serialize};
use tabmesh_federation::id::Digest;

pub use self::aim::{Aim, Targets};
pub use self::table::table;
use super::bootstrap::{Figures, Forest, Interval, SetMeans};
use super::compare::{BOOTSTRAP_SEED, DRAWS, Loaded, MethodKey, difference, figures_of};
use super::report::summary::last;
use super::results::Row;
use super::run::RIVALS;

/// How a run's targets are judged from the command line.
#[derive(Debug, Clone, clap::Args)]
pub struct TargetsArgs {
    /// A run's folder, a folder of its parts, or several separated by commas.
    pub runs: String,
    /// Draws of the bootstrap.
    #[arg(long, default_value_t = DRAWS, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub draws: u32,
    /// File to which the verdicts are written as JSON too.
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// What came of a run's targets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// Commit of the work tree that the scenario lay in.
    pub commit: Option<String>,
    /// SHA-256 of the program that made the figures.
    pub program: Digest,
    /// One for each aim and kind of sets.
    pub verdicts: Vec<Verdict>,
    /// Where domains end on their own trees.
    pub own_trees: Vec<OwnTrees>,
}

/// One aim over some sets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Its flow.
    pub flow: String,
    /// What is measured, in words.
    pub what: String,
    /// What is aimed at, in words.
    pub aim: String,
    /// Whether these are the sets that count.
    pub counts: bool,
    /// The sets that have figures.
    pub sets: Vec<String>,
    /// The figure and its interval; none if the run has no figures for it yet.
    pub value: Option<f64>,
    /// Lower end of the 95 % interval.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
    /// Whether every set that this is about has figures of all seeds; what is incomplete is neither met nor missed.
    pub complete: bool,
    /// Whether the end of the interval passes, and the figures are complete.
    pub met: bool,
    /// Domains.
    pub domains: usize,
    /// Test entities that were drawn; 0 where no answers were kept.
    pub entities: usize,
    /// The rivals held against, by set.
    pub against: BTreeMap<String, String>,
}

/// Domains of a flow that serve their own trees and nothing else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OwnTrees {
    /// The flow.
    pub flow: String,
    /// Whether these are the sets that count.
    pub counts: bool,
    /// Domains under a seed that serve something.
    pub domains: usize,
    /// Share of them that serve trees on own rows alone.
    pub own_rows_alone: f64,
    /// Share in which no model has any weight: trees on own rows, or on own and corpus rows.
    pub no_model: f64,
    /// Mean weight of trees on own rows.
    pub weight_of_own_trees: f64,
    /// Mean weight of trees on own and corpus rows.
    pub weight_of_trees_and_corpus: f64,
    /// Mean weight of all variants of the model together.
    pub weight_of_model: f64,
}

/// Judges the targets of a run.
///
/// # Errors
/// The scenario has none, or a run that can't be read.
pub fn targets(args: &TargetsArgs) -> Result<Judgement> {
    let loaded = Loaded::read(&args.runs)?;
    ensure!(loaded.scenario.targets.is_some(), "the scenario of {} has no targets", args.runs);
    let judgement = judge(&loaded, args.draws)?;
    if let Some(out) = &args.out {
        super::results::write(out, &serde_json::to_vec_pretty(&judgement)?)?;
    }
    Ok(judgement)
}

/// Judges what has been run so far.
///
/// # Errors
/// Answers that can't be read.
pub(crate) fn judge(loaded: &Loaded, draws: u32) -> Result<Judgement> {
    let (mut verdicts, mut own) = (Vec::new(), Vec::new());
    if let Some(targets) = &loaded.scenario.targets {
        let needed: BTreeSet<&str> = targets.aims.iter().map(Aim::flow).chain([RIVALS]).collect();
        let wanted = |key: &MethodKey| needed.contains(key.0.as_str());
        let auc = loaded.figures("auc", &wanted)?;
        // Slopes are never made anew from answers.
        let slope = figures_of(&loaded.rows, "calibration_slope", &wanted);
        let all_count = targets.sets.is_empty();
        for counts in [true, false] {
            let named = |set: &str| all_count || targets.sets.iter().any(|known| known == set);
            let within = |set: &str| named(set) == counts;
            let sets = loaded.scenario.data.sets.iter().filter(|set| within(set)).cloned().collect();
            let seeds = loaded.scenario.seeds as usize;
            let (auc, slope) = (narrowed(&auc, &within), narrowed(&slope, &within));
            let sides = Sides { auc, slope, draws, counts, sets, seeds };
            for aim in &targets.aims {
                verdicts.extend(sides.verdicts(aim));
            }
            let flows: BTreeSet<&str> = loaded.scenario.flows.iter().map(|flow| flow.name.as_str()).collect();
            own.extend(flows.into_iter().filter_map(|flow| own_trees(&loaded.rows, flow, counts, &within)));
        }
    }
    let (commit, program) = (loaded.manifest.commit.clone(), loaded.manifest.program_digest);
    Ok(Judgement { commit, program, verdicts, own_trees: own })
}

type ByMethod = BTreeMap<MethodKey, Figures>;

/// The figures of some sets alone.
fn narrowed(all: &ByMethod, within: &dyn Fn(&str) -> bool) -> ByMethod {
    let mut kept = ByMethod::new();
    for (key, figures) in all {
        let values = figures.values.iter().filter(|(place, _)| within(&place.0));
        let answers = figures.answers.iter().filter(|(place, _)| within(&place.0));
        let figures = Figures {
            values: values.map(|(place, value)| (place.clone(), *value)).collect(),
            answers: answers.map(|(place, all)| (place.clone(), all.clone())).collect(),
        };
        if !figures.values.is_empty() {
            kept.insert(key.clone(), figures);
        }
    }
    kept
}

/// Figures over sets that count, or over the others.
struct Sides {
    auc: ByMethod,
    slope: ByMethod,
    draws: u32,
    counts: bool,
    /// The sets, and the seeds that each has to have figures of.
    sets: BTreeSet<String>,
    seeds: usize,
}

impl Sides {
    fn verdicts(&self, aim: &Aim) -> Vec<Verdict> {
        match aim {
            Aim::GapClosed { flow, least } => {
                let served = self.of(flow, "served", None);
                let (locals, pooled) = (self.rivals(&LOCAL), self.rivals(&POOLED));
                let bounds = [&locals, &pooled];
                let found = self.held(served.clone(), &bounds, |sets, best| {
                    gains_and_gaps(sets, best)
                        .filter(|(_, gaps)| *gaps > 0.0)
                        .map(|(gains, gaps)| gains / gaps)
                });
                // A draw without a gap has no such part. What decides has a figure in every draw: gains less the least part of
                // the gaps, which is above zero just where the part is above the least.
                let beyond = self.held(served, &bounds, |sets, best| {
                    gains_and_gaps(sets, best).map(|(gains, gaps)| (gains - least * gaps) / sets.len() as f64)
                });
                let beyond = beyond.map_or(f64::NEG_INFINITY, |found| found.interval.low);
                let text = format!("at least {least}, in all draws but 2.5 %");
                let what = "part of the gap closed".to_owned();
                vec![self.verdict(flow, what, text, found, |_| beyond >= 0.0)]
            }
            Aim::NonInferior { flow, margin } => {
                let served = self.of(flow, "served", None);
                let locals = self.rivals(&LOCAL);
                let found = self.held(served, &[&locals], gain);
                let what = "gain over the best local rival, AUC".to_owned();
                let text = format!("interval above -{margin}, mean above 0");
                vec![self.verdict(flow, what, text, found, |i| i.low > -margin && i.value > 0.0)]
            }
            Aim::Newcomers { flow, rows, over_trees, over_best } => {
                let served = || self.of(flow, "served", Some(*rows));
                // All or none: the best of some is not the best.
                let of = |names: &[&str]| -> Vec<(String, &Figures)> {
                    let found: Option<Vec<_>> =
                        names.iter().map(|name| self.of(flow, name, Some(*rows))).collect();
                    found.unwrap_or_default()
                };
                let (trees, all) = (of(&["local_trees"]), of(&NEWCOMER_RIVALS));
                let over = |rivals: &Vec<(String, &Figures)>| self.held(served(), &[rivals], gain);
                let words = |than: &str| format!("newcomers with {rows} rows: gain over {than}, AUC");
                let at_least = |least: f64| format!("at least {least}");
                let (trees, all) = (over(&trees), over(&all));
                vec![
                    self.verdict(flow, words("own trees"), at_least(*over_trees), trees, |i| {
                        i.low >= *over_trees
                    }),
                    self.verdict(flow, words("the best rival"), at_least(*over_best), all, |i| {
                        i.low >= *over_best
                    }),
                ]
            }
            Aim::Calibrated { flow, low, high } => {
                let key = (flow.clone(), "served".to_owned(), None);
                let served = self.slope.get(&key).map(|figures| (flow.clone(), figures));
                let found = self.held(served, &[], |sets, _| {
                    let sum: f64 = sets.iter().map(|(_, means)| means[0]).sum();
                    (!sets.is_empty()).then(|| sum / sets.len() as f64)
                });
                let text = format!("interval within {low} to {high}");
                let fits = |i: Interval| i.low >= *low && i.high <= *high;
                vec![self.verdict(flow, "calibration slope".to_owned(), text, found, fits)]
            }
        }
    }

    fn of(&self, arm: &str, method: &str, rows: Option<u32>) -> Option<(String, &Figures)> {
        let key = (arm.to_owned(), method.to_owned(), rows);
        Some((method.to_owned(), self.auc.get(&key)?))
    }

    /// All of these rivals, or none of them: the best of some would be a smaller best.
    fn rivals(&self, names: &[&str]) -> Vec<(String, &Figures)> {
        let all: Option<Vec<_>> = names.iter().map(|name| self.of(RIVALS, name, None)).collect();
        all.unwrap_or_default()
    }

    /// What is served, held against the best of each group of rivals; none without figures of each.
    fn held(
        &self,
        served: Option<(String, &Figures)>,
        groups: &[&Vec<(String, &Figures)>],
        statistic: impl Fn(&[SetMeans], &BTreeMap<usize, Vec<usize>>) -> Option<f64>,
    ) -> Option<Found> {
        let (_, served) = served?;
        if groups.iter().any(|group| group.is_empty()) {
            return None;
        }
        let mut methods = vec![served];
        methods.extend(groups.iter().flat_map(|group| group.iter().map(|(_, figures)| *figures)));
        let metric = if groups.is_empty() { "calibration_slope" } else { "auc" };
        let forest = Forest::new(metric, &methods);
        if forest.is_empty() {
            return None;
        }
        // The best of each group in each set, by its place among the methods.
        let mut best: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        let mut against = BTreeMap::new();
        for (set, means) in forest.means() {
            let mut first = 1;
            let mut names = Vec::new();
            for group in groups {
                let places = first..first + group.len();
                let top = places.max_by(|a, b| means[*a].total_cmp(&means[*b])).unwrap_or(first);
                best.entry(set).or_default().push(top);
                names.push(group[top - first].0.clone());
                first += group.len();
            }
            if !names.is_empty() {
                against.insert(forest.name(set).to_owned(), names.join(", "));
            }
        }
        let mut rng = ChaCha20Rng::seed_from_u64(BOOTSTRAP_SEED);
        let interval = forest.interval(self.draws, &mut rng, &|sets| statistic(sets, &best))?;
        let sizes = forest.sizes();
        let sets: Vec<String> = (0..sizes.sets).map(|set| forest.name(set).to_owned()).collect();
        let complete = self.sets.iter().all(|set| sets.contains(set))
            && (0..sizes.sets).all(|set| forest.seeds(set) == self.seeds);
        let (domains, entities) = (sizes.domains, sizes.entities);
        Some(Found { interval, complete, sets, against, domains, entities })
    }

    fn verdict(
        &self,
        flow: &str,
        what: String,
        aim: String,
        found: Option<Found>,
        met: impl Fn(Interval) -> bool,
    ) -> Verdict {
        let interval = found.as_ref().map(|found| found.interval);
        let complete = found.as_ref().is_some_and(|found| found.complete);
        let (sets, against, domains, entities) = match found {
            Some(Found { sets, against, domains, entities, .. }) => (sets, against, domains, entities),
            None => Default::default(),
        };
        Verdict {
            flow: flow.to_owned(),
            what,
            aim,
            counts: self.counts,
            sets,
            value: interval.map(|i| i.value),
            low: interval.map(|i| i.low),
            high: interval.map(|i| i.high),
            complete,
            met: complete && interval.is_some_and(met),
            domains,
            entities,
            against,
        }
    }
}

struct Found {
    interval: Interval,
    complete: bool,
    sets: Vec<String>,
    against: BTreeMap<String, String>,
    domains: usize,
    entities: usize,
}

/// Over all sets: what is served less the best local rival, and the best pooled rival less the best local one.
fn gains_and_gaps(sets: &[SetMeans], best: &BTreeMap<usize, Vec<usize>>) -> Option<(f64, f64)> {
    let (mut gains, mut gaps) = (0.0, 0.0);
    for (at, means) in sets {
        let best = best.get(at)?;
        gains += means[0] - means[best[0]];
        gaps += means[best[1]] - means[best[0]];
    }
    Some((gains, gaps))
}

/// Mean over sets of what is served less the best of the first group.
fn gain(sets: &[SetMeans], best: &BTreeMap<usize, Vec<usize>>) -> Option<f64> {
    let pairs: Option<Vec<SetMeans>> =
        sets.iter().map(|(at, means)| Some((*at, vec![means[best.get(at)?[0]], means[0]]))).collect();
    difference(&pairs?, 0, 1)
}

/// How often and with what weight domains of a flow serve their own trees; none if none serves anything.
fn own_trees(rows: &[Row], flow: &str, counts: bool, within: &dyn Fn(&str) -> bool) -> Option<OwnTrees> {
    // Weights of own trees, of trees with the corpus, of everything else.
    let mut blends: BTreeMap<(&str, &str, u64), [f64; 3]> = BTreeMap::new();
    for row in last(rows) {
        let Some(member) = row.metric.strip_prefix("weight of ") else { continue };
        if row.arm != flow || row.rows.is_some() || !row.counted || !within(&row.set) {
            continue;
        }
        let place = match member {
            "trees on own rows" => 0,
            "trees on own and corpus rows" => 1,
            _ => 2,
        };
        blends.entry((&row.set, &row.domain, row.seed)).or_default()[place] += row.value;
    }
    let n = blends.len() as f64;
    let share = |is: &dyn Fn(&[f64; 3]) -> bool| blends.values().filter(|b| is(b)).count() as f64 / n;
    let mean = |place: usize| blends.values().map(|blend| blend[place]).sum::<f64>() / n;
    (!blends.is_empty()).then(|| OwnTrees {
        flow: flow.to_owned(),
        counts,
        domains: blends.len(),
        own_rows_alone: share(&|blend| blend[1] + blend[2] <= f64::EPSILON),
        no_model: share(&|blend| blend[2] <= f64::EPSILON),
        weight_of_own_trees: mean(0),
        weight_of_trees_and_corpus: mean(1),
        weight_of_model: mean(2),
    })
}

/// Rivals that use a domain's own rows alone.
const LOCAL: [&str; 3] = ["local_trees", "local_logistic", "local_base"];
/// Rivals that pool real rows, as nobody may.
const POOLED: [&str; 3] = ["pooled_trees", "pooled_logistic", "pooled_base"];
/// What a newcomer could serve without a model: local ones, and simple ones that read the release.
const NEWCOMER_RIVALS: [&str; 5] =
    ["local_trees", "local_logistic", "local_base", "local_trees_corpus", "corpus_logistic"];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::document::Scenario;
    use super::super::results::{FORMAT, Manifest, Noise, RunFolder, Shard};
    use super::*;

    const TEXT: &str = "kind: TabmeshScenario
name: t
seeds: 2
data: {folder: x, sets: [a, b, c]}
newcomers: {rows: [64], draws: 1}
rivals: [local_trees, local_logistic, local_base, pooled_trees, pooled_logistic, pooled_base]
flows: [{name: ours}]
targets:
  sets: [a, b]
  aims:
    - {kind: gap_closed, flow: ours, least: 0.4}
    - {kind: non_inferior, flow: ours, margin: 0.01}
    - {kind: newcomers, flow: ours, rows: 64, over_trees: 0.08, over_best: 0.03}
    - {kind: calibrated, flow: ours, low: 0.8, high: 1.2}
";

    fn row(set: &str, seed: u64, arm: &str, method: &str, metric: &str, value: f64) -> Row {
        Row {
            set: set.into(),
            seed,
            arm: arm.into(),
            method: method.into(),
            round: None,
            domain: format!("{set}_d"),
            rows: None,
            counted: true,
            noise: Noise::None,
            metric: metric.into(),
            value,
        }
    }

    fn judged(rows: &[Row]) -> Judgement {
        judged_by(TEXT, rows)
    }

    fn judged_by(text: &str, rows: &[Row]) -> Judgement {
        let root = tempfile::tempdir().unwrap();
        let manifest = Manifest {
            format: FORMAT,
            scenario: "t".into(),
            scenario_digest: Digest::of(text.as_bytes()),
            program: "1".into(),
            program_digest: Digest::of(b"program"),
            base_model: Digest::of(b"base"),
            seeds: 2,
            sets: Vec::new(),
            tasks: 1,
            shard: Shard::WHOLE,
            commit: Some("abc".into()),
            real: false,
        };
        let folder = RunFolder::open(root.path(), text, &manifest).unwrap();
        folder.store("all", rows).unwrap();
        judge(&Loaded::read(&root.path().display().to_string()).unwrap(), 200).unwrap()
    }

    fn rows() -> Vec<Row> {
        let mut rows = Vec::new();
        for seed in 0..2 {
            // Local .7 and .72, pooled .9 and .8, served .8 and .74: (.1 + .02) / (.2 + .08) by hand.
            for (set, local, logistic, pooled, served) in
                [("a", 0.7, 0.6, 0.9, 0.8), ("b", 0.5, 0.72, 0.8, 0.74), ("c", 0.5, 0.5, 0.9, 0.5)]
            {
                rows.push(row(set, seed, "rivals", "local_trees", "auc", local));
                rows.push(row(set, seed, "rivals", "local_logistic", "auc", logistic));
                rows.push(row(set, seed, "rivals", "pooled_trees", "auc", pooled));
                for method in ["local_base", "pooled_logistic", "pooled_base"] {
                    rows.push(row(set, seed, "rivals", method, "auc", 0.4));
                }
                rows.push(row(set, seed, "ours", "served", "auc", served));
                rows.push(row(set, seed, "ours", "served", "calibration_slope", 1.1));
                let newcomers = [
                    ("local_trees", 0.6),
                    ("local_logistic", 0.5),
                    ("local_base", 0.5),
                    ("local_trees_corpus", 0.66),
                    ("corpus_logistic", 0.65),
                    ("served", 0.7),
                ];
                for (method, value) in newcomers {
                    let one = row(set, seed, "ours", method, "auc", value);
                    rows.push(Row { rows: Some(64), ..one });
                }
            }
            rows.push(row("a", seed, "ours", "served", "weight of trees on own rows", 1.0));
            rows.push(row("b", seed, "ours", "served", "weight of trees on own rows", 0.25));
            rows.push(row("b", seed, "ours", "served", "weight of tuned, mixed context, adapter", 0.75));
        }
        rows
    }

    #[test]
    fn every_aim_is_judged_on_the_sets_that_count_and_shown_for_the_others() {
        let judged = judged(&rows());
        let of = |what: &str, counts: bool| {
            let mut found = judged.verdicts.iter().filter(|v| v.counts == counts && v.what.contains(what));
            found.next().unwrap().clone()
        };
        let gap = of("gap", true);
        assert!((gap.value.unwrap() - 0.12 / 0.28).abs() < 1e-9, "{gap:?}");
        // A draw of set b twice closes .02 of .08.
        assert!((gap.low.unwrap() - 0.25).abs() < 1e-9 && !gap.met, "{gap:?}");
        assert_eq!(gap.against["a"], "local_trees, pooled_trees");
        assert_eq!(gap.against["b"], "local_logistic, pooled_trees");
        assert_eq!(
            (gap.sets.as_slice(), of("gap", false).sets.as_slice()),
            (&["a".to_owned(), "b".to_owned()][..], &["c".to_owned()][..])
        );
        assert!(of("best local", true).met && !of("best local", false).met);
        // .7 − .6 passes .08, .7 − .66 passes .03.
        assert!(of("own trees", true).met && of("best rival", true).met);
        assert!(of("slope", true).met);
        let own = judged.own_trees.iter().find(|own| own.counts).unwrap();
        assert_eq!(own.domains, 4);
        assert!((own.own_rows_alone - 0.5).abs() < 1e-12 && (own.no_model - 0.5).abs() < 1e-12);
        assert!(
            (own.weight_of_own_trees - 0.625).abs() < 1e-12 && (own.weight_of_model - 0.375).abs() < 1e-12
        );
        let text = table(&judged);
        assert!(
            text.contains("met") && text.contains("missed") && text.contains("work tree at abc"),
            "{text}"
        );
    }

    /// One set gains .1 of a gap of .2, another loses .05 and has no gap. Over both that is a quarter, but a draw of the second
    /// twice has no part at all: leaving such draws out would let an aim of .2 pass.
    #[test]
    fn draws_without_a_gap_count_against_the_part_that_is_closed() {
        let mut all = rows();
        for row in &mut all {
            match (row.set.as_str(), row.method.as_str(), row.rows) {
                ("b", "pooled_trees", None) => row.value = 0.72,
                ("b", "served", None) if row.metric == "auc" => row.value = 0.67,
                _ => {}
            }
        }
        let judged = judged_by(&TEXT.replace("least: 0.4", "least: 0.2"), &all);
        let gap = judged.verdicts.iter().find(|v| v.counts && v.what.contains("gap")).unwrap();
        assert!((gap.value.unwrap() - 0.25).abs() < 1e-9 && !gap.met, "{gap:?}");
        assert!(gap.low.unwrap() > 0.2, "the part's own interval doesn't show it: {gap:?}");
    }

    #[test]
    fn what_was_not_run_is_neither_met_nor_missed() {
        let only_rivals: Vec<Row> = rows().into_iter().filter(|row| row.arm == "rivals").collect();
        let judged = judged(&only_rivals);
        assert!(judged.verdicts.iter().all(|v| v.value.is_none() && !v.met && v.word() == "no figures"));
        assert!(judged.own_trees.is_empty());
    }

    /// A run of one of the sets, of one of the seeds, or without a rival proves nothing, however good its figures are.
    #[test]
    fn what_was_run_in_part_is_incomplete() {
        let all = rows();
        let without =
            |gone: &dyn Fn(&Row) -> bool| all.iter().filter(|row| !gone(row)).cloned().collect::<Vec<_>>();
        let about = |rows: &[Row], what: &str| {
            let judged = judged(rows);
            judged.verdicts.into_iter().find(|v| v.counts && v.what.contains(what)).unwrap()
        };
        let best_local = |rows: &[Row]| about(rows, "best local");
        assert_eq!(best_local(&all).word(), "met");
        for part in [without(&|row| row.set == "b"), without(&|row| row.set == "b" && row.seed == 1)] {
            let found = best_local(&part);
            assert!(found.low.unwrap() > 0.0 && !found.met, "{found:?}");
            assert_eq!(found.word(), "incomplete");
        }
        assert_eq!(best_local(&without(&|row| row.method == "local_base")).word(), "no figures");
        // The best of some rivals isn't the best.
        let best_rival = "gain over the best rival";
        assert_eq!(about(&all, best_rival).word(), "met");
        let one_less = without(&|row| row.rows.is_some() && row.method == "corpus_logistic");
        assert_eq!(about(&one_less, best_rival).word(), "no figures");
    }

    #[test]
    fn aims_that_name_nothing_are_refused_with_their_place() {
        for (from, to, path) in [
            ("flow: ours, least", "flow: theirs, least", "targets.aims[0].flow"),
            ("least: 0.4", "least: 0", "targets.aims[0].least"),
            ("margin: 0.01", "margin: 1.5", "targets.aims[1].margin"),
            ("rows: 64, over", "rows: 65, over", "targets.aims[2].rows"),
            ("low: 0.8", "low: 1.2", "targets.aims[3].low"),
            ("sets: [a, b]\n", "sets: [a, z]\n", "targets.sets[1]"),
            ("local_base, ", "", "targets.aims[1].kind"),
            (", pooled_base", "", "targets.aims[0].kind"),
        ] {
            let text = TEXT.replacen(from, to, 1);
            let refused = format!("{:#}", Scenario::parse(&text, "t.yaml").unwrap_err());
            assert!(refused.contains(path), "{to}: {refused}");
        }
    }
}
