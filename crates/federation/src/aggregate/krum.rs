//! Krum and Multi-Krum: Blanchard et al. 2017 (NeurIPS, "Machine Learning with Adversaries").
//!
//! Of n updates of which f are assumed hostile, each is scored by the sum of its n − f − 2 smallest squared distances to
//! others. Krum takes the update with the smallest score; Multi-Krum the mean of the n − 2f − 3 best, the most for which the
//! paper's condition n − m > 2f + 2 holds (at least one). Both need n ≥ 2f + 3. Ties go to the first agent by id. Not linear,
//! and impossible on a securely aggregated sum.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::strategy::{FederatedStrategy, PLAIN_STEP, default_hostile};
use crate::aggregate::{Aggregate, AggregateError, Rule, Updates, squared_distance};

/// The update nearest to its neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Krum {
    /// Share of agents assumed hostile, in [0, 0.5). Default 0.2.
    #[serde(default = "default_hostile")]
    pub hostile: f64,
}

/// The mean of the updates nearest to their neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MultiKrum {
    /// Share of agents assumed hostile, in [0, 0.5). Default 0.2.
    #[serde(default = "default_hostile")]
    pub hostile: f64,
}

impl Aggregate for Krum {
    fn name(&self) -> &'static str {
        "krum"
    }

    fn needs_separate_updates(&self) -> bool {
        true
    }

    fn is_linear(&self) -> bool {
        false
    }

    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError> {
        best(self.name(), self.hostile, updates, |_, _| 1)
    }
}

impl Aggregate for MultiKrum {
    fn name(&self) -> &'static str {
        "multi_krum"
    }

    fn needs_separate_updates(&self) -> bool {
        true
    }

    fn is_linear(&self) -> bool {
        false
    }

    fn mean(&self, updates: &Updates<'_>) -> Result<Vec<f64>, AggregateError> {
        best(self.name(), self.hostile, updates, |agents, hostile| {
            agents.saturating_sub(2 * hostile + 3).max(1)
        })
    }
}

/// The mean of the `kept(n, f)` updates with the best scores.
fn best(
    rule: &'static str,
    hostile: f64,
    updates: &Updates<'_>,
    kept: fn(usize, usize) -> usize,
) -> Result<Vec<f64>, AggregateError> {
    if !(0.0..0.5).contains(&hostile) {
        return Err(AggregateError::OutOfRange { what: "hostile", range: "in [0, 0.5)", got: hostile });
    }
    let means = updates.means(rule)?;
    let agents = means.len();
    let hostile = (agents as f64 * hostile).floor() as usize;
    let needed = 2 * hostile + 3;
    if agents < needed {
        return Err(AggregateError::TooFew { rule, needed, agents });
    }
    let mut distances = vec![0.0; agents * agents];
    for (a, from) in means.iter().enumerate() {
        for (b, to) in means.iter().enumerate().skip(a + 1) {
            let distance = squared_distance(from, to);
            distances[a * agents + b] = distance;
            distances[b * agents + a] = distance;
        }
    }
    let mut scored: Vec<(f64, usize)> = (0..agents)
        .map(|a| {
            let mut others: Vec<f64> =
                (0..agents).filter(|b| *b != a).map(|b| distances[a * agents + b]).collect();
            others.sort_by(f64::total_cmp);
            (others.iter().take(agents - hostile - 2).sum(), a)
        })
        .collect();
    // A stable sort: equal scores stay in agent-id order.
    scored.sort_by(|x, y| x.0.total_cmp(&y.0));
    scored.truncate(kept(agents, hostile));
    let weight = 1.0 / scored.len() as f64;
    let mut mean = vec![0.0; means.first().map_or(0, Vec::len)];
    for (_, at) in scored {
        mean.iter_mut().zip(means.get(at).into_iter().flatten()).for_each(|(m, v)| *m += v * weight);
    }
    Ok(mean)
}

impl FederatedStrategy for Krum {
    fn kind(&self) -> &'static str {
        "krum"
    }

    fn paper(&self) -> &'static str {
        "Blanchard et al. 2017, NeurIPS"
    }

    fn rule(&self) -> Rule {
        Rule::Krum(*self)
    }

    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }
}

impl FederatedStrategy for MultiKrum {
    fn kind(&self) -> &'static str {
        "multi_krum"
    }

    fn paper(&self) -> &'static str {
        "Blanchard et al. 2017, NeurIPS"
    }

    fn rule(&self) -> Rule {
        Rule::MultiKrum(*self)
    }

    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }
}
