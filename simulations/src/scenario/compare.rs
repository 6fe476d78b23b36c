//! `compare`: what differs between two runs, or two methods of one, with intervals.
//!
//! Figures are paired by set, seed, domain and a newcomer's number of rows; a difference is B − A. The interval is that of the
//! bootstrap over sets, domains, seeds and, where a scenario keeps answers, test entities (see [`super::bootstrap`]); what is
//! printed says how many of each there were. Without answers, the sampling error of test rows shows only as far as
//! domains differ.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use comfy_table::{CellAlignment, Table, presets};
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use serde::Serialize;

use super::bootstrap::{Figures, Forest, SetMeans};
use super::document::Scenario;
use super::report::summary::last;
use super::results::{Manifest, Row, RunFolder};

/// What is compared.
#[derive(Debug, Clone, clap::Args)]
pub struct CompareArgs {
    /// A run: its folder, a folder of its parts, or several separated by commas; `@ARM/METHOD` behind it picks one method
    /// (`runs/utility@ours/served`).
    pub a: String,
    /// The other run.
    pub b: String,
    /// The figure.
    #[arg(long, default_value = "auc")]
    pub metric: String,
    /// Draws of the bootstrap.
    #[arg(long, default_value_t = DRAWS, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    pub draws: u32,
}

/// One method held against another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Of A, as `ARM/METHOD`, with a newcomer's number of rows.
    pub a: String,
    /// Of B.
    pub b: String,
    /// The figure.
    pub metric: String,
    /// Mean of A over seeds, domains, sets.
    pub a_mean: f64,
    /// Mean of B.
    pub b_mean: f64,
    /// B − A.
    pub difference: f64,
    /// Lower end of the 95 % interval of the difference.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Paired figures.
    pub pairs: usize,
    /// Sets.
    pub sets: usize,
    /// Domains over all sets.
    pub domains: usize,
    /// Seeds, at most.
    pub seeds: usize,
    /// Test entities that were drawn; 0 where no answers were kept.
    pub entities: usize,
}

/// The rows of a run, from one folder or several parts.
pub(crate) struct Loaded {
    pub(crate) scenario: Scenario,
    pub(crate) manifest: Manifest,
    pub(crate) rows: Vec<Row>,
    folders: Vec<RunFolder>,
}

impl Loaded {
    /// Reads folders: a run, a folder of runs, or several separated by commas.
    ///
    /// # Errors
    /// A folder that isn't a run's, parts of different runs, or one task in two parts.
    pub(crate) fn read(text: &str) -> Result<Self> {
        let mut folders = Vec::new();
        for path in text.split(',').map(Path::new) {
            if path.join("manifest.json").is_file() {
                folders.push(path.to_owned());
                continue;
            }
            let inner = std::fs::read_dir(path).with_context(|| format!("reading {}", path.display()))?;
            let mut runs: Vec<PathBuf> = inner
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.join("manifest.json").is_file())
                .collect();
            ensure!(!runs.is_empty(), "{} is no run's folder and holds none", path.display());
            runs.sort();
            folders.extend(runs);
        }
        let mut loaded: Option<Self> = None;
        let mut shards = BTreeSet::new();
        for path in folders {
            let folder = RunFolder::existing(&path)?;
            let (manifest, rows) = (folder.manifest()?, folder.all_rows()?);
            ensure!(
                shards.insert((manifest.shard.part, manifest.shard.of)),
                "{}: part {} of {} is given twice",
                path.display(),
                manifest.shard.part,
                manifest.shard.of
            );
            match &mut loaded {
                None => {
                    let (scenario, folders) = (folder.scenario()?, vec![folder]);
                    loaded = Some(Self { scenario, manifest, rows, folders });
                }
                Some(first) => {
                    let known = &first.manifest;
                    ensure!(
                        known.scenario_digest == manifest.scenario_digest
                            && known.sets == manifest.sets
                            && known.program == manifest.program
                            && known.base_model == manifest.base_model
                            && known.program_digest == manifest.program_digest
                            && known.real == manifest.real
                            && known.shard.of == manifest.shard.of,
                        "{} is no part of the same run as the first folder",
                        path.display()
                    );
                    first.rows.extend(rows);
                    first.folders.push(folder);
                }
            }
        }
        let loaded = loaded.context("no folder")?;
        if let Some(missing) = missing_parts(&shards) {
            eprintln!("{text}: {missing}; figures are of what is there");
        }
        Ok(loaded)
    }

    /// What some methods came to, with the answers that were kept.
    ///
    /// # Errors
    /// Answers that can't be read.
    pub(crate) fn figures(
        &self,
        metric: &str,
        wanted: &dyn Fn(&MethodKey) -> bool,
    ) -> Result<BTreeMap<MethodKey, Figures>> {
        let mut all = figures_of(&self.rows, metric, wanted);
        let arms: BTreeSet<String> = all.keys().map(|(arm, ..)| arm.clone()).collect();
        for folder in &self.folders {
            for answered in folder.answers(&arms)? {
                let key = (answered.arm.clone(), answered.method.clone(), answered.rows);
                let Some(figures) = all.get_mut(&key) else { continue };
                let place = (answered.set.clone(), answered.domain.clone(), answered.seed);
                if figures.values.contains_key(&place) {
                    figures.answers.entry(place).or_default().push(answered);
                }
            }
        }
        Ok(all)
    }
}

/// Which parts of a run that was divided aren't there; none if all are.
fn missing_parts(parts: &BTreeSet<(u32, u32)>) -> Option<String> {
    let (_, of) = parts.first()?;
    let missing: Vec<String> =
        (1..=*of).filter(|part| !parts.contains(&(*part, *of))).map(|part| format!("{part}/{of}")).collect();
    (!missing.is_empty()).then(|| format!("missing parts {}", missing.join(", ")))
}

/// What some methods came to, by rows alone.
pub(super) fn figures_of(
    rows: &[Row],
    metric: &str,
    wanted: &dyn Fn(&MethodKey) -> bool,
) -> BTreeMap<MethodKey, Figures> {
    let mut all: BTreeMap<MethodKey, Figures> = BTreeMap::new();
    for row in last(rows) {
        let key = (row.arm.clone(), row.method.clone(), row.rows);
        if row.metric != metric || !row.counted || row.domain == "*" || !wanted(&key) {
            continue;
        }
        let place = (row.set.clone(), row.domain.clone(), row.seed);
        all.entry(key).or_default().values.insert(place, row.value);
    }
    all
}

/// A run and the method picked from it.
struct Side {
    loaded: Loaded,
    picked: Option<(String, String)>,
}

impl Side {
    fn read(text: &str) -> Result<Self> {
        let (path, picked) = match text.rsplit_once('@') {
            None => (text, None),
            Some((path, method)) => {
                let picked =
                    method.split_once('/').with_context(|| format!("{text}: expected @ARM/METHOD"))?;
                (path, Some((picked.0.to_owned(), picked.1.to_owned())))
            }
        };
        Ok(Self { loaded: Loaded::read(path)?, picked })
    }

    fn figures(&self, metric: &str) -> Result<BTreeMap<MethodKey, Figures>> {
        self.loaded.figures(metric, &|key| {
            self.picked.as_ref().is_none_or(|(arm, method)| *arm == key.0 && *method == key.1)
        })
    }

    fn known(&self) -> String {
        let rows = &self.loaded.rows;
        let names: BTreeSet<String> = rows.iter().map(|row| format!("{}/{}", row.arm, row.method)).collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    }
}

/// Arm, method, a newcomer's number of rows.
pub(crate) type MethodKey = (String, String, Option<u32>);

/// Compares two runs method by method, or one picked method with another.
///
/// # Errors
/// Runs that can't be read, or nothing to pair.
pub fn compare(args: &CompareArgs) -> Result<Vec<Comparison>> {
    let (a, b) = (Side::read(&args.a)?, Side::read(&args.b)?);
    let (of_a, of_b) = (a.figures(&args.metric)?, b.figures(&args.metric)?);
    let mut pairs: Vec<(&MethodKey, &MethodKey)> = Vec::new();
    if a.picked.is_some() != b.picked.is_some() {
        bail!("pick a method on both sides (@ARM/METHOD), or on none");
    }
    if a.picked.is_some() {
        // The same number of rows on both sides.
        for left in of_a.keys() {
            pairs.extend(of_b.keys().filter(|right| right.2 == left.2).map(|right| (left, right)));
        }
    } else {
        pairs.extend(of_a.keys().filter(|key| of_b.contains_key(*key)).map(|key| (key, key)));
    }
    let mut all = Vec::new();
    for (left, right) in pairs {
        let (Some(x), Some(y)) = (of_a.get(left), of_b.get(right)) else { continue };
        let shown = |key: &MethodKey| match key.2 {
            Some(rows) => format!("{}/{} ({rows} rows)", key.0, key.1),
            None => format!("{}/{}", key.0, key.1),
        };
        all.extend(comparison(x, y, (shown(left), shown(right)), args));
    }
    ensure!(!all.is_empty(), "nothing to pair for {}: A has {}; B has {}", args.metric, a.known(), b.known());
    Ok(all)
}

/// None if nothing can be paired.
fn comparison(x: &Figures, y: &Figures, (a, b): (String, String), args: &CompareArgs) -> Option<Comparison> {
    let forest = Forest::new(&args.metric, &[x, y]);
    let means = forest.means();
    let mean = |side: usize| means.iter().map(|(_, m)| m[side]).sum::<f64>() / means.len() as f64;
    let mut rng = ChaCha20Rng::seed_from_u64(BOOTSTRAP_SEED);
    let found = forest.interval(args.draws, &mut rng, &|sets| difference(sets, 0, 1))?;
    let sizes = forest.sizes();
    Some(Comparison {
        a,
        b,
        metric: args.metric.clone(),
        a_mean: mean(0),
        b_mean: mean(1),
        difference: found.value,
        low: found.low,
        high: found.high,
        pairs: sizes.places,
        sets: sizes.sets,
        domains: sizes.domains,
        seeds: sizes.seeds,
        entities: sizes.entities,
    })
}

/// Mean over sets of what one method has more than another; none without sets.
pub(crate) fn difference(sets: &[SetMeans], of: usize, than: usize) -> Option<f64> {
    let sum: f64 = sets.iter().map(|(_, means)| means[than] - means[of]).sum();
    (!sets.is_empty()).then(|| sum / sets.len() as f64)
}

/// The comparisons as a table.
#[must_use]
pub fn table(all: &[Comparison]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let metric = all.first().map_or("", |c| c.metric.as_str());
    table.set_header([
        "A",
        "B",
        &format!("{metric} of A"),
        "of B",
        "B - A",
        "95 % interval",
        "sets/domains/seeds/entities",
    ]);
    for c in all {
        table.add_row([
            c.a.clone(),
            c.b.clone(),
            format!("{:.4}", c.a_mean),
            format!("{:.4}", c.b_mean),
            format!("{:+.4}", c.difference),
            format!("{:+.4} to {:+.4}", c.low, c.high),
            format!("{}/{}/{}/{}", c.sets, c.domains, c.seeds, c.entities),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// Seed of the bootstrap: equal runs compare equally.
pub(crate) const BOOTSTRAP_SEED: u64 = 1;
/// Draws of the bootstrap unless others are asked for.
pub(crate) const DRAWS: u32 = 2000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::Rng;

    use super::*;

    #[test]
    fn parts_that_are_missing_are_named() {
        let parts = |parts: &[u32]| parts.iter().map(|part| (*part, 4)).collect::<BTreeSet<_>>();
        assert_eq!(missing_parts(&parts(&[1, 3])).unwrap(), "missing parts 2/4, 4/4");
        assert_eq!(missing_parts(&parts(&[1, 2, 3, 4])), None);
        assert_eq!(missing_parts(&BTreeSet::from([(1, 1)])), None);
    }

    fn args() -> CompareArgs {
        CompareArgs { a: String::new(), b: String::new(), metric: "auc".into(), draws: 4000 }
    }

    /// Pairs at sets, domains and one seed.
    fn compared(pairs: impl IntoIterator<Item = (usize, usize, f64, f64)>) -> Comparison {
        let (mut a, mut b) = (Figures::default(), Figures::default());
        for (set, domain, x, y) in pairs {
            let place = (format!("s{set}"), format!("d{domain}"), 0);
            a.values.insert(place.clone(), x);
            b.values.insert(place, y);
        }
        comparison(&a, &b, ("a".into(), "b".into()), &args()).unwrap()
    }

    #[test]
    fn equal_differences_have_an_interval_of_one_point() {
        let c = compared((0..3).map(|d| (0, d, 0.5, 0.75)));
        assert!(
            (c.difference - 0.25).abs() < 1e-12
                && (c.low - 0.25).abs() < 1e-12
                && (c.high - 0.25).abs() < 1e-12
        );
        assert_eq!((c.pairs, c.sets, c.domains, c.seeds), (3, 1, 3, 1));
    }

    /// One set, n domains of one seed: the hierarchical bootstrap is the plain one, whose interval for the mean of n normal
    /// differences is about 1.96·s/√n wide on each side. n = 200, within 15 %; fixed seed.
    #[test]
    fn over_many_domains_the_interval_is_the_normal_one() {
        let mut rng = ChaCha20Rng::seed_from_u64(9);
        let draw = |rng: &mut ChaCha20Rng| (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
        let drawn: Vec<f64> = (0..200).map(|_| draw(&mut rng)).collect();
        let c = compared(drawn.iter().enumerate().map(|(d, value)| (0, d, 0.0, *value)));
        let s = (drawn.iter().map(|v| (v - c.difference).powi(2)).sum::<f64>() / 199.0).sqrt();
        let half = 1.96 * s / 200_f64.sqrt();
        for end in [c.difference - c.low, c.high - c.difference] {
            assert!((end / half - 1.0).abs() < 0.15, "{end} {half}");
        }
    }

    /// Sets that differ widen the interval, however many domains each has: domains of one set aren't independent.
    #[test]
    fn the_interval_respects_the_hierarchy() {
        let of = |set: usize| if set.is_multiple_of(2) { 0.1 } else { -0.1 };
        let c = compared((0..4).flat_map(|set| (0..50).map(move |d| (set, d, 0.0, of(set)))));
        assert!(c.low <= -0.05 && c.high >= 0.05, "{c:?}");
    }
}
