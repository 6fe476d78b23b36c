//! Strategies by name: how agents make an update, how a round's updates become a mean, how the mean becomes a step.
//!
//! A strategy is a struct with its figures in a file of its own, an implementation of [`FederatedStrategy`], and an arm of
//! [`Scheme`]. Server-side parts are a [`Rule`] and an [`OptimiserSpec`], as in plans; what happens in the agent is a
//! correction of its local gradients. A strategy whose rule needs each agent's own update can't be combined with secure
//! aggregation, where only the sum exists: [`Scheme::check_sum_only`] refuses it by name.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::{
    Aggregate, AggregateError, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedBuff, FedProx, FedSgd, FedYogi,
    GeometricMedian, Krum, Median, MultiKrum, Rule, Scaffold, TrimmedMean,
};

/// What an agent makes of the round's model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalWork {
    /// One gradient over its units, at the round's model.
    Gradient,
    /// Gradient steps of its own; it sends the change.
    Steps,
}

/// When the server steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Once a round, on all updates of the round.
    Rounds,
    /// Whenever so many updates are in, whichever model they started from.
    Buffered {
        /// How many.
        size: u32,
    },
}

/// Where an agent is in its local steps; all vectors have the model's length.
#[derive(Debug, Clone, Copy)]
pub struct Point<'a> {
    /// The round's model.
    pub start: &'a [f64],
    /// The agent's model now.
    pub now: &'a [f64],
    /// The agent's own control variate.
    pub own: &'a [f64],
    /// The server's control variate.
    pub shared: &'a [f64],
}

/// What a strategy decides.
pub trait FederatedStrategy {
    /// Its `kind` in scenarios.
    fn kind(&self) -> &'static str;

    /// Where it was published.
    fn paper(&self) -> &'static str;

    /// How a round's updates become a mean.
    fn rule(&self) -> Rule;

    /// How the mean becomes a step, unless something else is asked for.
    fn optimiser(&self) -> OptimiserSpec;

    /// What agents do.
    fn local_work(&self) -> LocalWork {
        LocalWork::Steps
    }

    /// When the server steps.
    fn pace(&self) -> Pace {
        Pace::Rounds
    }

    /// Whether agents and server keep control variates between rounds.
    fn keeps_controls(&self) -> bool {
        false
    }

    /// Adds the strategy's own term to a local gradient.
    fn correct(&self, _at: &Point<'_>, _gradient: &mut [f64]) {}
}

/// A configured strategy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Scheme {
    /// One gradient over all units; see [`FedSgd`].
    #[serde(rename = "fedsgd")]
    FedSgd(FedSgd),
    /// Local steps; see [`FedAvg`].
    #[serde(rename = "fedavg")]
    FedAvg(FedAvg),
    /// Local steps, server momentum; see [`FedAvgM`].
    #[serde(rename = "fedavgm")]
    FedAvgM(FedAvgM),
    /// Local steps near the round's model; see [`FedProx`].
    #[serde(rename = "fedprox")]
    FedProx(FedProx),
    /// Local steps, Adam at the server; see [`FedAdam`].
    #[serde(rename = "fedadam")]
    FedAdam(FedAdam),
    /// Local steps, Yogi at the server; see [`FedYogi`].
    #[serde(rename = "fedyogi")]
    FedYogi(FedYogi),
    /// Local steps, Adagrad at the server; see [`FedAdagrad`].
    #[serde(rename = "fedadagrad")]
    FedAdagrad(FedAdagrad),
    /// Local steps with control variates; see [`Scaffold`].
    Scaffold(Scaffold),
    /// Asynchronous local steps; see [`FedBuff`].
    #[serde(rename = "fedbuff")]
    FedBuff(FedBuff),
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

impl Scheme {
    /// Every strategy with its defaults.
    #[must_use]
    pub fn all() -> Vec<Self> {
        vec![
            Self::FedSgd(FedSgd {}),
            Self::FedAvg(FedAvg {}),
            Self::FedAvgM(FedAvgM { momentum: 0.9 }),
            Self::FedProx(FedProx { proximal: 0.01 }),
            Self::FedAdam(FedAdam {}),
            Self::FedYogi(FedYogi {}),
            Self::FedAdagrad(FedAdagrad {}),
            Self::Scaffold(Scaffold {}),
            Self::FedBuff(FedBuff { buffer: 10 }),
            Self::TrimmedMean(TrimmedMean { trim: default_trim() }),
            Self::Median(Median {}),
            Self::GeometricMedian(GeometricMedian {}),
            Self::Krum(Krum { hostile: default_hostile() }),
            Self::MultiKrum(MultiKrum { hostile: default_hostile() }),
        ]
    }

    fn arm(&self) -> &dyn FederatedStrategy {
        match self {
            Self::FedSgd(s) => s,
            Self::FedAvg(s) => s,
            Self::FedAvgM(s) => s,
            Self::FedProx(s) => s,
            Self::FedAdam(s) => s,
            Self::FedYogi(s) => s,
            Self::FedAdagrad(s) => s,
            Self::Scaffold(s) => s,
            Self::FedBuff(s) => s,
            Self::TrimmedMean(s) => s,
            Self::Median(s) => s,
            Self::GeometricMedian(s) => s,
            Self::Krum(s) => s,
            Self::MultiKrum(s) => s,
        }
    }

    /// Whether the sum of all updates is enough for it.
    #[must_use]
    pub fn works_on_a_sum(&self) -> bool {
        !self.rule().needs_separate_updates() && self.pace() == Pace::Rounds
    }

    /// Refuses it where only a sum exists.
    ///
    /// # Errors
    /// [`AggregateError::SumOnly`] with its name if it needs each agent's own update.
    pub fn check_sum_only(&self) -> Result<(), AggregateError> {
        if self.works_on_a_sum() { Ok(()) } else { Err(AggregateError::SumOnly { rule: self.kind() }) }
    }

    /// Refuses figures out of range: the figure's name, its range in words, and what was given.
    ///
    /// # Errors
    /// [`AggregateError::OutOfRange`].
    pub fn check(&self) -> Result<(), AggregateError> {
        let (what, range, got, fits) = match self {
            Self::FedAvgM(s) => ("momentum", "in [0, 1)", s.momentum, (0.0..1.0).contains(&s.momentum)),
            Self::FedProx(s) => {
                ("proximal", "in [0, 1000]", s.proximal, (0.0..=1000.0).contains(&s.proximal))
            }
            Self::FedBuff(s) => {
                ("buffer", "in [1, 10000]", f64::from(s.buffer), (1..=10_000).contains(&s.buffer))
            }
            Self::TrimmedMean(s) => ("trim", "in [0, 0.5)", s.trim, (0.0..0.5).contains(&s.trim)),
            Self::Krum(s) => ("hostile", "in [0, 0.5)", s.hostile, (0.0..0.5).contains(&s.hostile)),
            Self::MultiKrum(s) => ("hostile", "in [0, 0.5)", s.hostile, (0.0..0.5).contains(&s.hostile)),
            _ => return Ok(()),
        };
        if fits { Ok(()) } else { Err(AggregateError::OutOfRange { what, range, got }) }
    }
}

impl FederatedStrategy for Scheme {
    fn kind(&self) -> &'static str {
        self.arm().kind()
    }

    fn paper(&self) -> &'static str {
        self.arm().paper()
    }

    fn rule(&self) -> Rule {
        self.arm().rule()
    }

    fn optimiser(&self) -> OptimiserSpec {
        self.arm().optimiser()
    }

    fn local_work(&self) -> LocalWork {
        self.arm().local_work()
    }

    fn pace(&self) -> Pace {
        self.arm().pace()
    }

    fn keeps_controls(&self) -> bool {
        self.arm().keeps_controls()
    }

    fn correct(&self, at: &Point<'_>, gradient: &mut [f64]) {
        self.arm().correct(at, gradient);
    }
}

/// Share cut at each end by a trimmed mean if none is named.
pub(crate) fn default_trim() -> f64 {
    0.1
}

/// Share of agents assumed hostile if none is named.
pub(crate) fn default_hostile() -> f64 {
    0.2
}

/// The mean change as it is: the step of averaging.
pub const PLAIN_STEP: OptimiserSpec = OptimiserSpec::Sgd { learning_rate: 1.0, momentum: 0.0 };

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeSet;

    use super::*;

    /// The family's laws: names are unique and what scenarios say, figures survive, papers are named, corrections vanish at
    /// the start without controls, and who needs single updates is refused on a sum by its own name.
    #[test]
    fn every_strategy_keeps_the_laws_of_the_family() {
        let all = Scheme::all();
        let names: BTreeSet<&str> = all.iter().map(FederatedStrategy::kind).collect();
        assert_eq!(names.len(), all.len());
        for scheme in all {
            let value = serde_json::to_value(scheme).unwrap();
            assert_eq!(value["kind"], scheme.kind());
            assert_eq!(serde_json::from_value::<Scheme>(value.clone()).unwrap(), scheme);
            // Its name alone is enough: every figure has a default.
            let short: Scheme = serde_json::from_value(serde_json::json!({"kind": scheme.kind()})).unwrap();
            assert_eq!(short, scheme);
            let mut unknown = value;
            unknown["colour"] = 1.into();
            assert!(serde_json::from_value::<Scheme>(unknown).is_err(), "{}", scheme.kind());
            assert!(scheme.paper().contains("20") && scheme.check() == Ok(()));
            let zeros = [0.0; 3];
            let at = Point { start: &[1.0; 3], now: &[1.0; 3], own: &zeros, shared: &zeros };
            let mut gradient = [0.5, -1.0, 2.0];
            scheme.correct(&at, &mut gradient);
            assert_eq!(
                gradient.map(f64::to_bits),
                [0.5_f64, -1.0, 2.0].map(f64::to_bits),
                "{}",
                scheme.kind()
            );
            let refused = scheme.check_sum_only();
            if scheme.works_on_a_sum() {
                assert_eq!(refused, Ok(()));
            } else {
                assert_eq!(refused, Err(AggregateError::SumOnly { rule: scheme.kind() }));
            }
        }
    }

    #[test]
    fn robust_and_buffered_strategies_need_each_update() {
        let needy: Vec<&str> =
            Scheme::all().iter().filter(|s| !s.works_on_a_sum()).map(FederatedStrategy::kind).collect();
        let expected = ["fedbuff", "trimmed_mean", "median", "geometric_median", "krum", "multi_krum"];
        assert_eq!(needy, expected);
    }

    #[test]
    fn figures_out_of_range_are_refused_by_name() {
        for (scheme, name) in [
            (Scheme::FedAvgM(FedAvgM { momentum: 1.0 }), "momentum"),
            (Scheme::FedProx(FedProx { proximal: -0.1 }), "proximal"),
            (Scheme::FedBuff(FedBuff { buffer: 0 }), "buffer"),
            (Scheme::FedBuff(FedBuff { buffer: 10_001 }), "buffer"),
            (Scheme::TrimmedMean(TrimmedMean { trim: 0.5 }), "trim"),
            (Scheme::Krum(Krum { hostile: f64::NAN }), "hostile"),
            (Scheme::MultiKrum(MultiKrum { hostile: 0.5 }), "hostile"),
        ] {
            assert!(matches!(scheme.check(), Err(AggregateError::OutOfRange { what, .. }) if what == name));
        }
    }

    #[test]
    fn a_proximal_term_pulls_back_and_controls_shift() {
        let (start, now, own, shared) = ([0.0; 2], [1.0, -2.0], [0.25, 0.0], [1.0, 0.5]);
        let at = Point { start: &start, now: &now, own: &own, shared: &shared };
        let mut gradient = [0.0; 2];
        Scheme::FedProx(FedProx { proximal: 0.5 }).correct(&at, &mut gradient);
        assert_eq!(gradient.map(f64::to_bits), [0.5_f64, -1.0].map(f64::to_bits));
        let mut gradient = [0.0; 2];
        Scheme::Scaffold(Scaffold {}).correct(&at, &mut gradient);
        assert_eq!(gradient.map(f64::to_bits), [0.75_f64, 0.5].map(f64::to_bits));
    }
}
