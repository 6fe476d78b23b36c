//! Turning the agents' integer vectors into one gradient: one rule a file, one arm a rule.
//!
//! Agents send clipped, noised *sums* over their units. Every rule divides by noisy totals from the release,
//! never by a number of examples. Rules that look at single agents' vectors refuse a sum-only (securely
//! aggregated) round. What a rule returns is a mean gradient in the model's units; [`optimiser`] turns it into a
//! step. A new rule is one file here and one arm of [`Rule`]; the conformance test below runs over all of them. Rules,
//! optimisers and what agents do are put together in a [`strategy`]. Linear rules need no more than a [`running`] sum.

pub mod fedadagrad;
pub mod fedadam;
pub mod fedavg;
pub mod fedavgm;
pub mod fedbuff;
pub mod fedprox;
pub mod fedsgd;
pub mod fedyogi;
pub mod geometric_median;
pub mod krum;
pub mod median;
pub mod optimiser;
pub mod running;
pub mod scaffold;
pub mod strategy;
pub mod trimmed_mean;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::AgentId;
use crate::phase::collect::ByAgent;

pub use fedadagrad::FedAdagrad;
pub use fedadam::FedAdam;
pub use fedavg::FedAvg;
pub use fedavgm::FedAvgM;
pub use fedbuff::FedBuff;
pub use fedprox::FedProx;
pub use fedsgd::FedSgd;
pub use fedyogi::FedYogi;
pub use geometric_median::GeometricMedian;
pub use krum::{Krum, MultiKrum};
pub use median::Median;
pub use running::Running;
pub use scaffold::Scaffold;
pub use strategy::{FederatedStrategy, Scheme};
pub use trimmed_mean::TrimmedMean;

/// Why updates can't be aggregated.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum AggregateError {
    /// No update, or vectors without values.
    #[error("nothing to aggregate: {agents} updates of {len} values")]
    Empty {
        /// Updates given.
        agents: usize,
        /// Values in each.
        len: usize,
    },
    /// A vector of another length than the first.
    #[error("update of {agent} has {got} values, the others have {expected}")]
    Shape {
        /// Whose.
        agent: AgentId,
        /// Length of the first vector.
        expected: usize,
        /// Length found.
        got: usize,
    },
    /// The rule needs each agent's vector and only their sum exists.
    #[error(
        "{rule} needs each agent's own update, a securely aggregated round has only the sum; use fedsgd or fedadam"
    )]
    SumOnly {
        /// The rule.
        rule: &'static str,
    },
    /// An agent without a released total.
    #[error("{rule} needs a noisy total of {agent} from the release, there is none")]
    NoTotal {
        /// The rule.
        rule: &'static str,
        /// The agent.
        agent: AgentId,
    },
    /// Scale, divisor or trimming share out of range.
    #[error("{what} must be finite and {range}, got {got}")]
    OutOfRange {
        /// Name of the figure.
        what: &'static str,
        /// The range, in words.
        range: &'static str,
        /// The value given.
        got: f64,
    },
    /// A vector of another length than the sum.
    #[error("update has {got} values, the sum has {expected}")]
    Length {
        /// Length of the sum.
        expected: usize,
        /// Length found.
        got: usize,
    },
    /// A sum leaves the range of 64-bit integers.
    #[error("the sum of the updates overflows")]
    Overflow,
    /// Too few agents for what the rule assumes.
    #[error("{rule} needs at least {needed} updates for its share of hostile agents, there are {agents}")]
    TooFew {
        /// The rule.
        rule: &'static str,
        /// Updates needed.
        needed: usize,
        /// Updates there are.
        agents: usize,
    },
    /// Trimming would leave nothing.
    #[error("trimming {cut} of {agents} updates at each end leaves none")]
    TrimsAll {
        /// Updates cut at each end.
        cut: usize,
        /// Updates there are.
        agents: usize,
    },
}

/// The agents' contribution to one round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Contributions<'a> {
    /// Each agent's own vector.
    Separate(&'a ByAgent),
    /// Secure aggregation: the sum over the participants, and nothing else.
    SumOnly(&'a [i64]),
}

/// Everything a rule may look at. All of it is differentially private or public.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Updates<'a> {
    /// The vectors or their sum.
    pub contributions: Contributions<'a>,
    /// Integer steps per unit of gradient: the plan's power of two.
    pub scale: f64,
    /// Noisy number of units over the participants, from the release.
    pub divisor: f64,
    /// Noisy number of units of each agent, from the release; empty when only a joint total was released.
    pub totals: &'a BTreeMap<AgentId, f64>,
}

/// A rule from updates to a mean gradient.
pub trait Aggregate {
    /// Its name in plans.
    fn name(&self) -> &'static str;

    /// Whether it needs each agent's own vector.
    fn needs_separate_updates(&self) -> bool;

    /// Whether the result is a linear map of the updates, so that a sum of them is enough.
    fn is_linear(&self) -> bool;

    /// Mean gradient in the model's units, one value per position.
    ///
    /// # Errors
    /// [`AggregateError`] for empty or ragged updates, figures out of range, or what the rule lacks.
    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError>;
}

/// Names of the rules in a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// One mean over all units: sum of gradients over the noisy total.
    #[default]
    #[serde(rename = "fedsgd")]
    FedSgd,
    /// Each agent's mean counts alike, whatever its size.
    #[serde(rename = "fedavg")]
    FedAvg,
    /// `fedsgd` with an adaptive server optimiser.
    #[serde(rename = "fedadam")]
    FedAdam,
    /// `fedsgd` with the optimiser `yogi`.
    #[serde(rename = "fedyogi")]
    FedYogi,
    /// `fedsgd` with the optimiser `adagrad`.
    #[serde(rename = "fedadagrad")]
    FedAdagrad,
    /// Coordinate-wise trimmed mean of the agents' means.
    TrimmedMean,
    /// Coordinate-wise median of the agents' means.
    Median,
    /// The point with the least sum of distances to the agents' means.
    GeometricMedian,
    /// The agent's mean that is nearest to its neighbours.
    Krum,
    /// The mean of those that are nearest to their neighbours.
    MultiKrum,
}

impl Aggregation {
    /// The kind of server optimiser it goes with, and no other.
    #[must_use]
    pub const fn optimiser(self) -> &'static str {
        match self {
            Self::FedAdam => "adam",
            Self::FedYogi => "yogi",
            Self::FedAdagrad => "adagrad",
            _ => "sgd",
        }
    }
}

/// A configured rule.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "snake_case")]
pub enum Rule {
    /// See [`FedSgd`].
    FedSgd(FedSgd),
    /// See [`FedAvg`].
    FedAvg(FedAvg),
    /// See [`TrimmedMean`].
    TrimmedMean(TrimmedMean),
    /// See [`Median`].
    Median(Median),
    /// See [`GeometricMedian`].
    GeometricMedian(GeometricMedian),
    /// See [`Krum`].
    Krum(Krum),
    /// See [`MultiKrum`].
    MultiKrum(MultiKrum),
}

impl Rule {
    /// The rule a plan names; `trim` is the share of agents that a trimmed mean cuts at each end and that Krum takes for
    /// hostile.
    #[must_use]
    pub fn new(aggregation: Aggregation, trim: f64) -> Self {
        match aggregation {
            // What sets the adaptive ones apart is the server's optimiser alone.
            Aggregation::FedSgd | Aggregation::FedAdam | Aggregation::FedYogi | Aggregation::FedAdagrad => {
                Self::FedSgd(FedSgd {})
            }
            Aggregation::FedAvg => Self::FedAvg(FedAvg {}),
            Aggregation::TrimmedMean => Self::TrimmedMean(TrimmedMean { trim }),
            Aggregation::Median => Self::Median(Median {}),
            Aggregation::GeometricMedian => Self::GeometricMedian(GeometricMedian {}),
            Aggregation::Krum => Self::Krum(Krum { hostile: trim }),
            Aggregation::MultiKrum => Self::MultiKrum(MultiKrum { hostile: trim }),
        }
    }

    fn arm(&self) -> &dyn Aggregate {
        match self {
            Self::FedSgd(rule) => rule,
            Self::FedAvg(rule) => rule,
            Self::TrimmedMean(rule) => rule,
            Self::Median(rule) => rule,
            Self::GeometricMedian(rule) => rule,
            Self::Krum(rule) => rule,
            Self::MultiKrum(rule) => rule,
        }
    }
}

impl Aggregate for Rule {
    fn name(&self) -> &'static str {
        self.arm().name()
    }

    fn needs_separate_updates(&self) -> bool {
        self.arm().needs_separate_updates()
    }

    fn is_linear(&self) -> bool {
        self.arm().is_linear()
    }

    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError> {
        self.arm().mean(updates)
    }
}

impl<'a> Updates<'a> {
    /// Sum over the participants in agent-id order, exact, as floats.
    pub(crate) fn sum(&self) -> Result<Vec<f64>, AggregateError> {
        self.check_scale()?;
        match self.contributions {
            Contributions::SumOnly([]) => Err(AggregateError::Empty { agents: 1, len: 0 }),
            Contributions::SumOnly(sum) => Ok(sum.iter().map(|v| *v as f64).collect()),
            Contributions::Separate(by_agent) => {
                let len = shape(by_agent)?;
                let mut sum = vec![0_i128; len];
                for values in by_agent.values() {
                    for (total, value) in sum.iter_mut().zip(values.iter()) {
                        // Fewer than 2⁶³ vectors of 64-bit integers always fit 128 bits.
                        *total += i128::from(*value);
                    }
                }
                Ok(sum.into_iter().map(|v| v as f64).collect())
            }
        }
    }

    /// Each participant's mean gradient in agent-id order: its sum over its noisy total (at least one unit).
    pub(crate) fn means(&self, rule: &'static str) -> Result<Vec<Vec<f64>>, AggregateError> {
        self.check_scale()?;
        let Contributions::Separate(by_agent) = self.contributions else {
            return Err(AggregateError::SumOnly { rule });
        };
        shape(by_agent)?;
        let mut means = Vec::with_capacity(by_agent.len());
        for (agent, values) in by_agent {
            let total = self.totals.get(agent).copied();
            let total = total.ok_or_else(|| AggregateError::NoTotal { rule, agent: agent.clone() })?;
            let factor = 1.0 / (self.scale * at_least_one("noisy total", total)?);
            means.push(values.iter().map(|v| *v as f64 * factor).collect());
        }
        Ok(means)
    }

    /// The noisy total of all participants, at least one unit.
    pub(crate) fn divisor(&self) -> Result<f64, AggregateError> {
        at_least_one("divisor", self.divisor)
    }

    fn check_scale(&self) -> Result<(), AggregateError> {
        if self.scale.is_finite() && self.scale >= 1.0 {
            Ok(())
        } else {
            Err(AggregateError::OutOfRange { what: "scale", range: "at least 1", got: self.scale })
        }
    }
}

/// Noise can push a small total to zero or below; one unit is the least a mean may divide by.
fn at_least_one(what: &'static str, total: f64) -> Result<f64, AggregateError> {
    if total.is_finite() {
        Ok(total.max(1.0))
    } else {
        Err(AggregateError::OutOfRange { what, range: "a number", got: total })
    }
}

/// Squared Euclidean distance of two vectors of one length.
fn squared_distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum()
}

/// The common length of all vectors.
fn shape(by_agent: &ByAgent) -> Result<usize, AggregateError> {
    let expected = by_agent.values().next().map_or(0, |values| values.len());
    if expected == 0 {
        return Err(AggregateError::Empty { agents: by_agent.len(), len: 0 });
    }
    match by_agent.iter().find(|(_, values)| values.len() != expected) {
        Some((agent, values)) => {
            Err(AggregateError::Shape { agent: agent.clone(), expected, got: values.len() })
        }
        None => Ok(expected),
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::float_cmp,
        reason = "tests; exact equality is meant where it stands"
    )]
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn rules() -> Vec<Rule> {
        use Aggregation as A;
        let all = [
            A::FedSgd,
            A::FedAvg,
            A::FedAdam,
            A::FedYogi,
            A::FedAdagrad,
            A::TrimmedMean,
            A::Median,
            A::GeometricMedian,
            A::Krum,
            A::MultiKrum,
        ];
        all.map(|a| Rule::new(a, 0.2)).to_vec()
    }

    fn agent(i: usize) -> AgentId {
        AgentId::new(format!("agent-{i:03}")).unwrap()
    }

    fn by_agent(vectors: &[Vec<i64>]) -> ByAgent {
        vectors.iter().enumerate().map(|(i, v)| (agent(i), Arc::from(v.as_slice()))).collect()
    }

    fn run(
        rule: &Rule,
        vectors: &ByAgent,
        divisor: f64,
        totals: &BTreeMap<AgentId, f64>,
    ) -> Result<Vec<f64>, AggregateError> {
        rule.mean(&Updates {
            contributions: Contributions::Separate(vectors),
            scale: 1024.0,
            divisor,
            totals,
        })
    }

    /// Obviously-right versions, written from the definitions.
    fn naive(rule: &Rule, vectors: &[Vec<i64>], divisor: f64, totals: &[f64]) -> Vec<f64> {
        let (agents, len) = (vectors.len(), vectors[0].len());
        let mean_of = |a: usize, j: usize| vectors[a][j] as f64 / 1024.0 / totals[a].max(1.0);
        let distance =
            |a: usize, b: usize| -> f64 { (0..len).map(|j| (mean_of(a, j) - mean_of(b, j)).powi(2)).sum() };
        // The agents whose neighbours are nearest, best first.
        let nearest = |hostile: f64| -> Vec<usize> {
            let hostile = (agents as f64 * hostile).floor() as usize;
            let score = |a: usize| -> f64 {
                let mut others: Vec<f64> = (0..agents).filter(|b| *b != a).map(|b| distance(a, b)).collect();
                others.sort_by(f64::total_cmp);
                others[..agents - hostile - 2].iter().sum()
            };
            let mut order: Vec<usize> = (0..agents).collect();
            order.sort_by(|a, b| score(*a).total_cmp(&score(*b)));
            order
        };
        (0..len)
            .map(|j| match rule {
                Rule::FedSgd(_) => {
                    (0..agents).map(|a| vectors[a][j] as f64).sum::<f64>() / 1024.0 / divisor.max(1.0)
                }
                Rule::FedAvg(_) => (0..agents).map(|a| mean_of(a, j)).sum::<f64>() / agents as f64,
                Rule::TrimmedMean(TrimmedMean { trim }) => {
                    let mut column: Vec<f64> = (0..agents).map(|a| mean_of(a, j)).collect();
                    for _ in 0..(agents as f64 * trim).floor() as usize {
                        let least =
                            (0..column.len()).min_by(|a, b| column[*a].total_cmp(&column[*b])).unwrap();
                        column.remove(least);
                        let most =
                            (0..column.len()).max_by(|a, b| column[*a].total_cmp(&column[*b])).unwrap();
                        column.remove(most);
                    }
                    column.iter().sum::<f64>() / column.len() as f64
                }
                Rule::Median(_) => {
                    let mut column: Vec<f64> = (0..agents).map(|a| mean_of(a, j)).collect();
                    while column.len() > 2 {
                        let least =
                            (0..column.len()).min_by(|a, b| column[*a].total_cmp(&column[*b])).unwrap();
                        column.remove(least);
                        let most =
                            (0..column.len()).max_by(|a, b| column[*a].total_cmp(&column[*b])).unwrap();
                        column.remove(most);
                    }
                    column.iter().sum::<f64>() / column.len() as f64
                }
                Rule::Krum(Krum { hostile }) => mean_of(nearest(*hostile)[0], j),
                Rule::MultiKrum(MultiKrum { hostile }) => {
                    let cut = (agents as f64 * hostile).floor() as usize;
                    let kept = agents.saturating_sub(2 * cut + 3).max(1);
                    nearest(*hostile)[..kept].iter().map(|a| mean_of(*a, j)).sum::<f64>() / kept as f64
                }
                Rule::GeometricMedian(_) => unreachable!("has a test of its own: there is no closed form"),
            })
            .collect()
    }

    /// Sum of distances of a point from all agents' means.
    fn reach(point: &[f64], vectors: &[Vec<i64>], totals: &[f64]) -> f64 {
        let of = |(v, total): (&Vec<i64>, &f64)| -> f64 {
            let at = |x: &i64| *x as f64 / 1024.0 / total.max(1.0);
            v.iter().zip(point).map(|(x, p)| (at(x) - p).powi(2)).sum::<f64>().sqrt()
        };
        vectors.iter().zip(totals).map(of).sum()
    }

    fn close(a: &[f64], b: &[f64]) -> bool {
        a.len() == b.len()
            && a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 1e-12 * (1.0 + x.abs().max(y.abs())))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_rule_equals_its_naive_twin_and_keeps_the_family_laws(
            vectors in (1_usize..9).prop_flat_map(|len| {
                prop::collection::vec(prop::collection::vec(-1_000_000_i64..1_000_000, len), 1..12)
            }),
            total in -3.0_f64..500.0,
        ) {
            let updates = by_agent(&vectors);
            let each: Vec<f64> = (0..vectors.len()).map(|i| total + i as f64).collect();
            let totals: BTreeMap<_, _> = each.iter().enumerate().map(|(i, t)| (agent(i), *t)).collect();
            let divisor = each.iter().sum::<f64>();
            for rule in rules() {
                let krum = matches!(rule, Rule::Krum(_) | Rule::MultiKrum(_));
                if krum && vectors.len() < 3 {
                    let few = AggregateError::TooFew { rule: rule.name(), needed: 3, agents: vectors.len() };
                    prop_assert_eq!(run(&rule, &updates, divisor, &totals), Err(few));
                    continue;
                }
                let mean = run(&rule, &updates, divisor, &totals).unwrap();
                if matches!(rule, Rule::GeometricMedian(_)) {
                    // No step in any direction comes nearer to all, but for rounding: of one agent all distances are rounding.
                    let least = reach(&mean, &vectors, &each);
                    let size = least / vectors.len() as f64;
                    for j in 0..mean.len() {
                        for step in [-0.01 * size, 0.01 * size] {
                            let mut moved = mean.clone();
                            moved[j] += step;
                            prop_assert!(reach(&moved, &vectors, &each) >= least * (1.0 - 1e-6) - 1e-9, "{mean:?}");
                        }
                    }
                } else {
                    prop_assert!(close(&mean, &naive(&rule, &vectors, divisor, &each)), "{}", rule.name());
                }

                // The order in which updates arrived can't matter: a map built backwards gives the same bits.
                let backwards: ByAgent =
                    updates.iter().rev().map(|(a, v)| (a.clone(), Arc::clone(v))).collect();
                prop_assert_eq!(&run(&rule, &backwards, divisor, &totals).unwrap(), &mean);

                // Scaling.
                let tripled: Vec<Vec<i64>> =
                    vectors.iter().map(|v| v.iter().map(|x| x * 3).collect()).collect();
                let scaled = run(&rule, &by_agent(&tripled), divisor, &totals).unwrap();
                if rule.is_linear() {
                    let expected: Vec<f64> = mean.iter().map(|m| m * 3.0).collect();
                    prop_assert!(close(&scaled, &expected), "{}", rule.name());
                }

                // Only linear rules work on a sum alone, and give the same.
                let sum: Vec<i64> =
                    (0..vectors[0].len()).map(|j| vectors.iter().map(|v| v[j]).sum()).collect();
                let only = Updates {
                    contributions: Contributions::SumOnly(&sum), scale: 1024.0, divisor, totals: &totals,
                };
                if rule.needs_separate_updates() {
                    prop_assert_eq!(rule.mean(&only), Err(AggregateError::SumOnly { rule: rule.name() }));
                } else {
                    prop_assert!(close(&rule.mean(&only).unwrap(), &mean));
                }
            }
        }
    }

    #[test]
    fn zero_updates_give_a_zero_gradient_and_rules_survive_serde() {
        let zero = by_agent(&vec![vec![0; 5]; 5]);
        let totals: BTreeMap<_, _> = (0..5).map(|i| (agent(i), 40.0)).collect();
        for rule in rules() {
            assert_eq!(run(&rule, &zero, 200.0, &totals).unwrap(), vec![0.0; 5], "{}", rule.name());
            let text = serde_json::to_string(&rule).unwrap();
            assert_eq!(serde_json::from_str::<Rule>(&text).unwrap(), rule, "{text}");
        }
    }

    #[test]
    fn malformed_updates_are_refused_by_every_rule() {
        let totals: BTreeMap<_, _> = (0..3).map(|i| (agent(i), 40.0)).collect();
        let ragged = by_agent(&[vec![1, 2], vec![1, 2], vec![1]]);
        let good = by_agent(&[vec![1, 2], vec![1, 2]]);
        for rule in rules() {
            let shape = AggregateError::Shape { agent: agent(2), expected: 2, got: 1 };
            assert_eq!(run(&rule, &ragged, 9.0, &totals), Err(shape));
            let empty = AggregateError::Empty { agents: 0, len: 0 };
            assert_eq!(run(&rule, &ByAgent::new(), 9.0, &totals), Err(empty));
            let bad_scale = Updates {
                contributions: Contributions::Separate(&good),
                scale: f64::NAN,
                divisor: 9.0,
                totals: &totals,
            };
            assert!(matches!(rule.mean(&bad_scale), Err(AggregateError::OutOfRange { what: "scale", .. })));
            if rule.needs_separate_updates() {
                let no_total = AggregateError::NoTotal { rule: rule.name(), agent: agent(0) };
                assert_eq!(run(&rule, &good, 9.0, &BTreeMap::new()), Err(no_total));
            } else {
                let refused = run(&rule, &good, f64::INFINITY, &totals);
                assert!(matches!(refused, Err(AggregateError::OutOfRange { what: "divisor", .. })));
            }
        }
    }

    #[test]
    fn one_liar_moves_a_mean_but_no_robust_rule() {
        let mut vectors = vec![vec![1024]; 9];
        vectors.push(vec![-1_000_000_000]);
        let totals: BTreeMap<_, _> = (0..10).map(|i| (agent(i), 1.0)).collect();
        let updates = by_agent(&vectors);
        use Aggregation as A;
        for robust in [A::TrimmedMean, A::Median, A::GeometricMedian, A::Krum, A::MultiKrum] {
            let kept = run(&Rule::new(robust, 0.1), &updates, 10.0, &totals).unwrap();
            assert!((kept[0] - 1.0).abs() < 1e-3, "{robust:?}: {kept:?}");
        }
        let mean = run(&Rule::new(Aggregation::FedSgd, 0.1), &updates, 10.0, &totals).unwrap();
        assert!(mean[0] < -90_000.0);
    }
}
