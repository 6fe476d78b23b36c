//! The paired bootstrap over the hierarchy that figures have: sets, domains, test entities, seeds.
//!
//! A percentile bootstrap (Davison and Hinkley 1997, section 3.8): sets are drawn with replacement, in each its seeds and its
//! domains. A seed makes one federation of all domains of a set, whose noise and corpus they share, so seeds are crossed
//! with domains and drawn once for a set. Where answers on test rows were kept, a domain's test entities are drawn too,
//! once for all methods and seeds, and figures are computed again on what was drawn. A level with one member adds nothing
//! to an interval. All methods that are compared share every draw.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::Rng;
use rand_chacha::ChaCha20Rng;

use super::answers::Answered;

/// Set, domain, seed.
pub(crate) type Place = (String, String, u64);

/// A set's place in its forest, and the means of all methods there.
pub(crate) type SetMeans = (usize, Vec<f64>);

/// What one method came to: figures by place, and answers where they were kept.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures {
    pub(crate) values: BTreeMap<Place, f64>,
    pub(crate) answers: BTreeMap<Place, Vec<Answered>>,
}

/// Figures of several methods at the places that all of them have.
#[derive(Debug, Default)]
pub(crate) struct Forest {
    sets: Vec<SetTree>,
}

#[derive(Debug)]
struct SetTree {
    name: String,
    /// Seeds that some domain has figures of.
    seeds: Vec<u64>,
    domains: Vec<DomainTree>,
}

#[derive(Debug, Default)]
struct DomainTree {
    /// Test rows; one entry if they are the same under all seeds.
    tests: Vec<TestRows>,
    seeds: Vec<Leaf>,
}

#[derive(Debug, Clone)]
struct TestRows {
    entities: Arc<Vec<u32>>,
    labels: Arc<Vec<u8>>,
    /// How many entities there are.
    count: usize,
}

#[derive(Debug)]
struct Leaf {
    seed: u64,
    tests: Option<usize>,
    methods: Vec<Figure>,
}

#[derive(Debug)]
enum Figure {
    Fixed(f64),
    /// Computed from answers; a mean over draws of own rows.
    Computed(Vec<Scorer>),
}

/// How many of each level are in a forest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) sets: usize,
    pub(crate) domains: usize,
    pub(crate) seeds: usize,
    /// Test entities that are drawn; 0 where figures stay as they are.
    pub(crate) entities: usize,
    pub(crate) places: usize,
}

impl Forest {
    /// Joins methods; `metric` names the figure.
    pub(crate) fn new(metric: &str, methods: &[&Figures]) -> Self {
        let mut sets: BTreeMap<String, BTreeMap<String, DomainTree>> = BTreeMap::new();
        let Some((first, others)) = methods.split_first() else { return Self::default() };
        for place in first.values.keys() {
            if others.iter().any(|figures| !figures.values.contains_key(place)) {
                continue;
            }
            let (set, domain, _) = place;
            let tree = sets.entry(set.clone()).or_default().entry(domain.clone()).or_default();
            let leaf = tree.leaf(metric, methods, place);
            tree.seeds.push(leaf);
        }
        let sets = sets
            .into_iter()
            .map(|(name, domains)| {
                let domains: Vec<DomainTree> = domains.into_values().collect();
                let seeds: BTreeSet<u64> =
                    domains.iter().flat_map(|domain| domain.seeds.iter().map(|leaf| leaf.seed)).collect();
                SetTree { name, seeds: seeds.into_iter().collect(), domains }
            })
            .collect();
        Self { sets }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }

    /// Name of a set.
    pub(crate) fn name(&self, set: usize) -> &str {
        self.sets.get(set).map_or("", |tree| &tree.name)
    }

    pub(crate) fn sizes(&self) -> Sizes {
        let domains = || self.sets.iter().flat_map(|set| &set.domains);
        Sizes {
            sets: self.sets.len(),
            domains: domains().count(),
            seeds: domains().map(|domain| domain.seeds.len()).max().unwrap_or(0),
            entities: domains().filter_map(|domain| domain.tests.first()).map(|tests| tests.count).sum(),
            places: domains().map(|domain| domain.seeds.len()).sum(),
        }
    }

    /// Each set's means of all methods, as they are: over seeds, then domains.
    pub(crate) fn means(&self) -> Vec<SetMeans> {
        let whole = |set: &SetTree| {
            let means = set.domains.iter().map(|domain| {
                mean_of(domain.seeds.iter().map(|leaf| {
                    leaf.methods.iter().map(|figure| figure.plain()).collect::<Option<Vec<f64>>>()
                }))
            });
            mean_of(means)
        };
        self.sets.iter().enumerate().filter_map(|(at, set)| Some((at, whole(set)?))).collect()
    }

    /// Seeds of a set.
    pub(crate) fn seeds(&self, set: usize) -> usize {
        self.sets.get(set).map_or(0, |tree| tree.seeds.len())
    }

    /// The same over one draw of sets, seeds, domains and entities.
    pub(crate) fn drawn(&self, rng: &mut ChaCha20Rng) -> Vec<SetMeans> {
        let mut all = Vec::with_capacity(self.sets.len());
        for _ in 0..self.sets.len() {
            let at = rng.random_range(0..self.sets.len());
            let Some(set) = self.sets.get(at) else { continue };
            let seeds: Vec<u64> = (0..set.seeds.len())
                .filter_map(|_| set.seeds.get(rng.random_range(0..set.seeds.len())).copied())
                .collect();
            let domains: Vec<Option<Vec<f64>>> = (0..set.domains.len())
                .map(|_| set.domains.get(rng.random_range(0..set.domains.len()))?.drawn(&seeds, rng))
                .collect();
            all.extend(mean_of(domains.into_iter()).map(|means| (at, means)));
        }
        all
    }

    /// A statistic of sets' means: its value and the ends of its 95 % interval over `draws` draws.
    pub(crate) fn interval(
        &self,
        draws: u32,
        rng: &mut ChaCha20Rng,
        statistic: &dyn Fn(&[SetMeans]) -> Option<f64>,
    ) -> Option<Interval> {
        let value = statistic(&self.means())?;
        let mut drawn: Vec<f64> = (0..draws).filter_map(|_| statistic(&self.drawn(rng))).collect();
        drawn.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = (share * drawn.len().saturating_sub(1) as f64).round() as usize;
            drawn.get(place).copied()
        };
        Some(Interval { value, low: at(0.025)?, high: at(0.975)? })
    }
}

/// A value with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Interval {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl DomainTree {
    fn leaf(&mut self, metric: &str, methods: &[&Figures], place: &Place) -> Leaf {
        let fixed = || Leaf {
            seed: place.2,
            tests: None,
            methods: methods
                .iter()
                .map(|figures| Figure::Fixed(figures.values.get(place).copied().unwrap_or(f64::NAN)))
                .collect(),
        };
        let kept: Option<Vec<&Vec<Answered>>> =
            methods.iter().map(|figures| figures.answers.get(place)).collect();
        let Some(kept) = kept else { return fixed() };
        let Some(one) = kept.first().and_then(|answers| answers.first()) else { return fixed() };
        let alike = |answered: &Answered| answered.labels == one.labels && answered.entities == one.entities;
        let scorer = |answered: &Answered| Scorer::new(metric, answered);
        let computed: Option<Vec<Figure>> = kept
            .iter()
            .map(|all| {
                let alike = !all.is_empty() && all.iter().all(alike);
                let scorers = all.iter().map(scorer).collect::<Option<Vec<_>>>()?;
                alike.then_some(Figure::Computed(scorers))
            })
            .collect();
        let Some(methods) = computed else { return fixed() };
        let known = self.tests.iter().position(|t| t.labels == one.labels && t.entities == one.entities);
        let at = known.unwrap_or_else(|| {
            let count = one.entities.iter().max().map_or(0, |last| *last as usize + 1);
            self.tests.push(TestRows {
                entities: Arc::clone(&one.entities),
                labels: Arc::clone(&one.labels),
                count,
            });
            self.tests.len() - 1
        });
        Leaf { seed: place.2, tests: Some(at), methods }
    }

    /// Means of all methods over drawn seeds and one draw of entities. Seeds that the domain has no figures of, as one that
    /// left it out, are passed over; so is a figure that isn't defined on what was drawn.
    fn drawn(&self, seeds: &[u64], rng: &mut ChaCha20Rng) -> Option<Vec<f64>> {
        let times: Vec<Vec<f64>> = self.tests.iter().map(|tests| tests.times(rng)).collect();
        let mut known: BTreeMap<u64, Option<Vec<f64>>> = BTreeMap::new();
        for leaf in self.seeds.iter().filter(|leaf| seeds.contains(&leaf.seed)) {
            let drawn = leaf.tests.and_then(|at| Some((self.tests.get(at)?, times.get(at)?)));
            known.insert(leaf.seed, leaf.methods.iter().map(|figure| figure.over(drawn)).collect());
        }
        mean_of(seeds.iter().filter_map(|seed| known.get(seed)).cloned())
    }
}

impl TestRows {
    /// How often each row is there when entities are drawn with replacement.
    fn times(&self, rng: &mut ChaCha20Rng) -> Vec<f64> {
        let mut times = vec![0.0; self.count];
        for _ in 0..self.count {
            if let Some(one) = times.get_mut(rng.random_range(0..self.count)) {
                *one += 1.0;
            }
        }
        self.entities.iter().map(|entity| times.get(*entity as usize).copied().unwrap_or(0.0)).collect()
    }
}

impl Figure {
    fn plain(&self) -> Option<f64> {
        match self {
            Self::Fixed(value) => Some(*value),
            Self::Computed(scorers) => mean_of(scorers.iter().map(|s| Some(vec![s.plain]))).map(|m| m[0]),
        }
    }

    fn over(&self, drawn: Option<(&TestRows, &Vec<f64>)>) -> Option<f64> {
        match (self, drawn) {
            (Self::Computed(scorers), Some((tests, times))) => {
                let each = scorers.iter().map(|s| Some(vec![s.over(&tests.labels, times)?]));
                mean_of(each).map(|means| means[0])
            }
            _ => self.plain(),
        }
    }
}

/// One figure on test rows that can each be there several times.
#[derive(Debug)]
struct Scorer {
    /// The figure with every row once.
    plain: f64,
    how: How,
}

#[derive(Debug)]
enum How {
    /// Rows in the order of their answers, and where runs of equal answers end.
    Ranks { order: Vec<u32>, ends: Vec<u32> },
    /// Loss of each row.
    Losses(Vec<f32>),
}

impl Scorer {
    /// None for a figure that isn't computed again, or isn't defined.
    fn new(metric: &str, answered: &Answered) -> Option<Self> {
        let Answered { answers, labels, .. } = answered;
        if answers.iter().any(|answer| answer.is_nan()) || answers.len() != labels.len() {
            return None;
        }
        let each = |loss: fn(f64, u8) -> f64| {
            let losses = answers.iter().zip(labels.iter());
            How::Losses(losses.map(|(answer, label)| loss(f64::from(*answer), *label) as f32).collect())
        };
        let how = match metric {
            "auc" => ranks(answers),
            "log_loss" => each(|p, y| {
                let p = p.clamp(1e-7, 1.0 - 1e-7);
                if y == 1 { -p.ln() } else { -(1.0 - p).ln() }
            }),
            "brier" => each(|p, y| (p - f64::from(y.min(1))).powi(2)),
            _ => return None,
        };
        let mut scorer = Self { plain: f64::NAN, how };
        scorer.plain = scorer.over(labels, &vec![1.0; answers.len()])?;
        Some(scorer)
    }

    /// The figure with each row so many times; none without both classes, or without rows.
    fn over(&self, labels: &[u8], times: &[f64]) -> Option<f64> {
        match &self.how {
            How::Losses(losses) => {
                let total: f64 = times.iter().sum();
                let sum: f64 = losses.iter().zip(times).map(|(loss, times)| f64::from(*loss) * times).sum();
                (total > 0.0).then(|| sum / total)
            }
            How::Ranks { order, ends } => {
                let (mut below, mut wins, mut positives) = (0.0, 0.0, 0.0);
                let mut start = 0;
                for end in ends {
                    let end = *end as usize;
                    let (mut zeros, mut ones) = (0.0, 0.0);
                    for row in order.get(start..end).unwrap_or_default() {
                        let row = *row as usize;
                        let times = times.get(row).copied().unwrap_or(0.0);
                        if labels.get(row) == Some(&1) { ones += times } else { zeros += times }
                    }
                    wins += ones * (below + 0.5 * zeros);
                    below += zeros;
                    positives += ones;
                    start = end;
                }
                (positives > 0.0 && below > 0.0).then(|| wins / (positives * below))
            }
        }
    }
}

fn ranks(answers: &[f32]) -> How {
    let mut order: Vec<u32> = (0_u32..).take(answers.len()).collect();
    let of = |row: &u32| answers.get(*row as usize).copied().unwrap_or(f32::NAN);
    order.sort_by(|a, b| of(a).total_cmp(&of(b)));
    let mut ends = Vec::new();
    for (at, pair) in (1_u32..).zip(order.windows(2)) {
        if of(&pair[0]).to_bits() != of(&pair[1]).to_bits() {
            ends.push(at);
        }
    }
    ends.push(u32::try_from(order.len()).unwrap_or(u32::MAX));
    How::Ranks { order, ends }
}

/// Mean, position by position, of what is there; none if nothing is.
fn mean_of(all: impl Iterator<Item = Option<Vec<f64>>>) -> Option<Vec<f64>> {
    let mut sums: Option<(Vec<f64>, f64)> = None;
    for one in all.flatten() {
        let (sum, n) = sums.get_or_insert_with(|| (vec![0.0; one.len()], 0.0));
        sum.iter_mut().zip(one).for_each(|(s, v)| *s += v);
        *n += 1.0;
    }
    sums.map(|(sum, n)| sum.into_iter().map(|s| s / n).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::SeedableRng;
    use tabmesh_tfm::metrics;

    use super::*;

    fn place(domain: usize, seed: u64) -> Place {
        ("s".into(), format!("d{domain}"), seed)
    }

    fn answered(labels: &Arc<Vec<u8>>, answers: Vec<f32>) -> Answered {
        Answered {
            set: "s".into(),
            seed: 0,
            arm: "a".into(),
            method: "m".into(),
            domain: "d".into(),
            rows: None,
            draw: 0,
            entities: Arc::new((0_u32..).take(labels.len()).collect()),
            labels: Arc::clone(labels),
            answers,
        }
    }

    /// Figures over rows that are there several times are those of the rows written out; oracle: the model's own metrics.
    #[test]
    fn repeated_rows_count_as_often_as_they_are_there() {
        let mut rng = ChaCha20Rng::seed_from_u64(5);
        let labels: Arc<Vec<u8>> = Arc::new((0..40).map(|_| u8::from(rng.random_bool(0.4))).collect());
        // One decimal: many ties.
        let answers: Vec<f32> = (0..40).map(|_| (rng.random::<f32>() * 10.0).round() / 10.0).collect();
        let times: Vec<f64> = (0..40).map(|_| f64::from(rng.random_range(0..4_u8))).collect();
        let (mut more_answers, mut more_labels) = (Vec::new(), Vec::new());
        for ((answer, label), times) in answers.iter().zip(labels.iter()).zip(&times) {
            for _ in 0..*times as usize {
                more_answers.push(f64::from(*answer));
                more_labels.push(*label);
            }
        }
        let one = answered(&labels, answers);
        for (metric, oracle) in [
            ("auc", metrics::roc_auc as fn(&[f64], &[u8]) -> Option<f64>),
            ("log_loss", metrics::log_loss),
            ("brier", metrics::brier),
        ] {
            let found = Scorer::new(metric, &one).unwrap().over(&labels, &times).unwrap();
            let expected = oracle(&more_answers, &more_labels).unwrap();
            assert!((found - expected).abs() < 1e-6, "{metric}: {found} {expected}");
        }
        assert!(Scorer::new("calibration_slope", &one).is_none());
        assert!(Scorer::new("auc", &answered(&Arc::new(vec![1, 1]), vec![0.5, 0.6])).is_none());
    }

    /// One domain, one seed: only test rows are drawn, and the interval of a mean loss is the normal one, 1.96·s/√n on each side.
    /// n = 400, within 15 %; fixed seed.
    #[test]
    fn test_rows_alone_give_the_sampling_error_of_a_mean() {
        let mut rng = ChaCha20Rng::seed_from_u64(6);
        let labels: Arc<Vec<u8>> = Arc::new((0..400).map(|_| u8::from(rng.random_bool(0.5))).collect());
        let of = |answers: Vec<f32>| {
            let one = answered(&labels, answers);
            let value = Scorer::new("brier", &one).unwrap().plain;
            Figures {
                values: BTreeMap::from([(place(0, 0), value)]),
                answers: BTreeMap::from([(place(0, 0), vec![one])]),
            }
        };
        let answers: Vec<f32> = (0..400).map(|_| rng.random()).collect();
        let (a, b) = (of(vec![0.5; 400]), of(answers.clone()));
        let forest = Forest::new("brier", &[&a, &b]);
        assert_eq!(forest.sizes(), Sizes { sets: 1, domains: 1, seeds: 1, entities: 400, places: 1 });
        let difference = |sets: &[(usize, Vec<f64>)]| sets.first().map(|(_, m)| m[1] - m[0]);
        let found = forest.interval(2000, &mut rng, &difference).unwrap();
        let losses: Vec<f64> = answers
            .iter()
            .zip(labels.iter())
            .map(|(p, y)| (f64::from(*p) - f64::from(*y)).powi(2) - 0.25)
            .collect();
        let mean = losses.iter().sum::<f64>() / 400.0;
        let s = (losses.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / 399.0).sqrt();
        assert!((found.value - mean).abs() < 1e-6);
        for end in [found.value - found.low, found.high - found.value] {
            assert!((end / (1.96 * s / 20.0) - 1.0).abs() < 0.15, "{end} {s}");
        }
    }

    /// A seed's effect on all domains alike doesn't shrink with their number: over ten seeds the interval of the mean is that of
    /// ten draws, 1.96·s/√10 on each side, whether there is one domain or fifty. Within 20 %; fixed seed.
    #[test]
    fn seeds_are_shared_by_the_domains_of_a_set() {
        let effects: Vec<f64> = (0..10).map(|seed| f64::from((seed * 7) % 10)).collect();
        let s = (effects.iter().map(|e| (e - 4.5f64).powi(2)).sum::<f64>() / 10.0).sqrt();
        for domains in [1, 50] {
            let mut figures = Figures::default();
            for (domain, (seed, effect)) in
                (0..domains).flat_map(|domain| (0_u64..).zip(&effects).map(move |at| (domain, at)))
            {
                figures.values.insert(place(domain, seed), *effect);
            }
            let forest = Forest::new("auc", &[&figures]);
            let mean = |sets: &[(usize, Vec<f64>)]| sets.first().map(|(_, means)| means[0]);
            let found = forest.interval(2000, &mut ChaCha20Rng::seed_from_u64(8), &mean).unwrap();
            for end in [found.value - found.low, found.high - found.value] {
                let normal = 1.96 * s / 10f64.sqrt();
                assert!((end / normal - 1.0).abs() < 0.2, "{domains} domains: {end} {normal}");
            }
        }
    }

    /// Equal answers differ by nothing in every draw: the draws are shared.
    #[test]
    fn methods_share_every_draw() {
        let mut rng = ChaCha20Rng::seed_from_u64(7);
        let labels: Arc<Vec<u8>> = Arc::new((0..30).map(|i| u8::from(i % 3 == 0)).collect());
        let answers: Vec<f32> = (0..30).map(|_| rng.random()).collect();
        let mut one = Figures::default();
        for seed in 0..3 {
            one.values.insert(place(0, seed), 0.5);
            one.answers.insert(place(0, seed), vec![answered(&labels, answers.clone())]);
        }
        let forest = Forest::new("auc", &[&one, &one]);
        for _ in 0..50 {
            for (_, means) in forest.drawn(&mut rng) {
                assert!((means[0] - means[1]).abs() < 1e-15);
            }
        }
        // Without answers on one side, figures stay as they are on both.
        let bare = Figures { answers: BTreeMap::new(), ..one.clone() };
        assert_eq!(Forest::new("auc", &[&one, &bare]).sizes().entities, 0);
    }
}
