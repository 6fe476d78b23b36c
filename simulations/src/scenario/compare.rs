//! `compare`: what differs between two runs, or two methods of one, with intervals.
//!
//! Figures are paired by set, seed, domain and a newcomer's number of rows; a difference is B − A. The interval is a
//! percentile bootstrap over the hierarchy the figures have (Davison and Hinkley 1997, section 3.8): sets are drawn with
//! replacement, in each the domains, in each the seeds. A level with one member adds nothing to the interval, and what is
//! printed says how many each had. Test rows within a domain aren't drawn again: their sampling error shows only as far as
//! domains differ.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use comfy_table::{CellAlignment, Table, presets};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use serde::Serialize;

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
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
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
}

/// The rows of a run, from one folder or several parts.
pub(crate) struct Loaded {
    pub(crate) scenario: Scenario,
    pub(crate) manifest: Manifest,
    pub(crate) rows: Vec<Row>,
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
                None => loaded = Some(Self { scenario: folder.scenario()?, manifest, rows }),
                Some(first) => {
                    let known = &first.manifest;
                    ensure!(
                        known.scenario_digest == manifest.scenario_digest
                            && known.sets == manifest.sets
                            && known.program == manifest.program
                            && known.base_model == manifest.base_model
                            && known.shard.of == manifest.shard.of,
                        "{} is no part of the same run as the first folder",
                        path.display()
                    );
                    first.rows.extend(rows);
                }
            }
        }
        loaded.context("no folder")
    }
}

/// A run and the method picked from it.
struct Side {
    rows: Vec<Row>,
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
        Ok(Self { rows: Loaded::read(path)?.rows, picked })
    }

    /// Figures of each method: by set, domain, seed.
    fn figures(&self, metric: &str) -> BTreeMap<MethodKey, Figures> {
        let mut all: BTreeMap<MethodKey, Figures> = BTreeMap::new();
        for row in last(&self.rows) {
            let picked = self.picked.as_ref().is_none_or(|(arm, m)| *arm == row.arm && *m == row.method);
            if !picked || row.metric != metric || !row.counted || row.domain == "*" {
                continue;
            }
            let key = (row.arm.clone(), row.method.clone(), row.rows);
            all.entry(key).or_default().insert((row.set.clone(), row.domain.clone(), row.seed), row.value);
        }
        all
    }

    fn known(&self) -> String {
        let names: BTreeSet<String> =
            self.rows.iter().map(|row| format!("{}/{}", row.arm, row.method)).collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    }
}

/// Arm, method, a newcomer's number of rows.
type MethodKey = (String, String, Option<u32>);
/// Figures by set, domain, seed.
type Figures = BTreeMap<(String, String, u64), f64>;

/// Compares two runs method by method, or one picked method with another.
///
/// # Errors
/// Runs that can't be read, or nothing to pair.
pub fn compare(args: &CompareArgs) -> Result<Vec<Comparison>> {
    let (a, b) = (Side::read(&args.a)?, Side::read(&args.b)?);
    let (of_a, of_b) = (a.figures(&args.metric), b.figures(&args.metric));
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
        let joined: Vec<(&(String, String, u64), f64, f64)> =
            x.iter().filter_map(|(key, a)| Some((key, *a, *y.get(key)?))).collect();
        if joined.is_empty() {
            continue;
        }
        let shown = |key: &MethodKey| match key.2 {
            Some(rows) => format!("{}/{} ({rows} rows)", key.0, key.1),
            None => format!("{}/{}", key.0, key.1),
        };
        all.push(comparison(&joined, shown(left), shown(right), args));
    }
    ensure!(!all.is_empty(), "nothing to pair for {}: A has {}; B has {}", args.metric, a.known(), b.known());
    Ok(all)
}

/// A figure of A and the same of B, by seed.
type Pairs = Vec<(f64, f64)>;

fn comparison(
    joined: &[(&(String, String, u64), f64, f64)],
    a: String,
    b: String,
    args: &CompareArgs,
) -> Comparison {
    // set → domain → figures of A and B by seed.
    let mut tree: BTreeMap<&str, BTreeMap<&str, Pairs>> = BTreeMap::new();
    let mut seeds = BTreeSet::new();
    for ((set, domain, seed), a, b) in joined {
        seeds.insert(seed);
        tree.entry(set).or_default().entry(domain).or_default().push((*a, *b));
    }
    let tree: Vec<Vec<Pairs>> = tree.into_values().map(|domains| domains.into_values().collect()).collect();
    let mean_of = |side: fn(&(f64, f64)) -> f64| {
        mean(tree.iter().map(|domains| mean(domains.iter().map(|seeds| mean(seeds.iter().map(side))))))
    };
    let (a_mean, b_mean) = (mean_of(|p| p.0), mean_of(|p| p.1));
    let mut rng = ChaCha20Rng::seed_from_u64(BOOTSTRAP_SEED);
    let mut drawn: Vec<f64> = (0..args.draws).map(|_| resampled(&tree, &mut rng)).collect();
    drawn.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let place = (share * (drawn.len() - 1) as f64).round() as usize;
        drawn.get(place).copied().unwrap_or(f64::NAN)
    };
    Comparison {
        a,
        b,
        metric: args.metric.clone(),
        a_mean,
        b_mean,
        difference: b_mean - a_mean,
        low: at(0.025),
        high: at(0.975),
        pairs: joined.len(),
        sets: tree.len(),
        domains: tree.iter().map(Vec::len).sum(),
        seeds: seeds.len(),
    }
}

/// The mean difference over one draw of sets, domains and seeds.
fn resampled(tree: &[Vec<Vec<(f64, f64)>>], rng: &mut ChaCha20Rng) -> f64 {
    let mut over_sets = 0.0;
    for _ in 0..tree.len() {
        let domains = &tree[rng.random_range(0..tree.len())];
        let mut over_domains = 0.0;
        for _ in 0..domains.len() {
            let seeds = &domains[rng.random_range(0..domains.len())];
            let drawn = (0..seeds.len()).map(|_| {
                let (a, b) = seeds[rng.random_range(0..seeds.len())];
                b - a
            });
            over_domains += drawn.sum::<f64>() / seeds.len() as f64;
        }
        over_sets += over_domains / domains.len() as f64;
    }
    over_sets / tree.len() as f64
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0_u32), |(sum, n), v| (sum + v, n + 1));
    sum / f64::from(n.max(1))
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
        "sets/domains/seeds",
    ]);
    for c in all {
        table.add_row([
            c.a.clone(),
            c.b.clone(),
            format!("{:.4}", c.a_mean),
            format!("{:.4}", c.b_mean),
            format!("{:+.4}", c.difference),
            format!("{:+.4} to {:+.4}", c.low, c.high),
            format!("{}/{}/{}", c.sets, c.domains, c.seeds),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// Seed of the bootstrap: equal runs compare equally.
const BOOTSTRAP_SEED: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> CompareArgs {
        CompareArgs { a: String::new(), b: String::new(), metric: "auc".into(), draws: 4000 }
    }

    fn key(set: usize, domain: usize, seed: u64) -> (String, String, u64) {
        (format!("s{set}"), format!("d{domain}"), seed)
    }

    #[test]
    fn equal_differences_have_an_interval_of_one_point() {
        let keys: Vec<_> = (0..3).map(|d| key(0, d, 0)).collect();
        let joined: Vec<_> = keys.iter().map(|k| (k, 0.5, 0.75)).collect();
        let c = comparison(&joined, "a".into(), "b".into(), &args());
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
        let keys: Vec<_> = (0..200).map(|d| key(0, d, 0)).collect();
        let joined: Vec<_> = keys.iter().map(|k| (k, 0.0, draw(&mut rng))).collect();
        let c = comparison(&joined, "a".into(), "b".into(), &args());
        let s = (joined.iter().map(|j| (j.2 - c.difference).powi(2)).sum::<f64>() / 199.0).sqrt();
        let half = 1.96 * s / 200_f64.sqrt();
        for end in [c.difference - c.low, c.high - c.difference] {
            assert!((end / half - 1.0).abs() < 0.15, "{end} {half}");
        }
    }

    /// Sets that differ widen the interval, however many domains each has: domains of one set aren't independent.
    #[test]
    fn the_interval_respects_the_hierarchy() {
        let keys: Vec<_> = (0..4).flat_map(|s| (0..50).map(move |d| key(s, d, 0))).collect();
        let joined: Vec<_> = keys
            .iter()
            .enumerate()
            .map(|(i, k)| (k, 0.0, if i / 50 % 2 == 0 { 0.1 } else { -0.1 }))
            .collect();
        let c = comparison(&joined, "a".into(), "b".into(), &args());
        assert!(c.low <= -0.05 && c.high >= 0.05, "{c:?}");
    }
}
