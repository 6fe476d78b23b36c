//! Geometric median of the agents' means: Pillutla, Kakade, Harchaoui 2022 (RFA, arXiv 1912.13445).
//!
//! The point with the least sum of Euclidean distances to all updates, by the smoothed Weiszfeld iteration (algorithm 2
//! there): each agent's weight is the inverse of its distance from the present point. Up to half of the agents can
//! be hostile. Not linear, and impossible here on a securely aggregated sum (the paper's own protocol asks for one sum
//! an iteration).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::strategy::{FederatedStrategy, PLAIN_STEP};
use crate::aggregate::{Aggregate, AggregateError, Rule, Updates, squared_distance};

/// The geometric median over agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GeometricMedian {}

impl Aggregate for GeometricMedian {
    fn name(&self) -> &'static str {
        "geometric_median"
    }

    fn needs_separate_updates(&self) -> bool {
        true
    }

    fn is_linear(&self) -> bool {
        false
    }

    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError> {
        let means = updates.means(self.name())?;
        let len = means.first().map_or(0, Vec::len);
        let mut point = weighted(&means, &vec![1.0; means.len()], len);
        let distances =
            |point: &[f64]| -> Vec<f64> { means.iter().map(|m| squared_distance(m, point).sqrt()).collect() };
        let mut away = distances(&point);
        let spread = away.iter().copied().fold(0.0, f64::max);
        if spread <= 0.0 {
            return Ok(point);
        }
        for _ in 0..MAX_ITERATIONS {
            // The middle distance sets the unit of smoothing and stopping: liars can't.
            let mut sorted = away.clone();
            sorted.sort_by(f64::total_cmp);
            let middle = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0).max(spread * SMALLEST);
            let floor = middle * SMOOTHING;
            let weights: Vec<f64> = away.iter().map(|distance| 1.0 / distance.max(floor)).collect();
            let next = weighted(&means, &weights, len);
            let moved = squared_distance(&next, &point).sqrt();
            point = next;
            if moved <= middle * TOLERANCE {
                break;
            }
            away = distances(&point);
        }
        Ok(point)
    }
}

/// The weighted mean of vectors of length `len`.
fn weighted(means: &[Vec<f64>], weights: &[f64], len: usize) -> Vec<f64> {
    let total: f64 = weights.iter().sum();
    let mut sum = vec![0.0; len];
    for (values, weight) in means.iter().zip(weights) {
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += v * (weight / total));
    }
    sum
}

impl FederatedStrategy for GeometricMedian {
    fn kind(&self) -> &'static str {
        "geometric_median"
    }

    fn paper(&self) -> &'static str {
        "Pillutla, Kakade, Harchaoui 2022, arXiv 1912.13445"
    }

    fn rule(&self) -> Rule {
        Rule::GeometricMedian(*self)
    }

    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }
}

/// Smallest distance that counts, as a share of the middle one.
const SMOOTHING: f64 = 1e-6;
/// A move by less than this share of it ends the iteration.
const TOLERANCE: f64 = 1e-8;
/// Smallest middle distance, as a share of the largest from the plain mean.
const SMALLEST: f64 = 1e-15;
/// Iterations at most; the convergence is linear and the paper stops after three.
const MAX_ITERATIONS: u32 = 300;
