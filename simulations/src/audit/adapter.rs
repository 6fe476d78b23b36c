//! Membership in an adapter: can one who has what all rounds made tell whether somebody's row was trained on?
//!
//! The likelihood-ratio attack with shadow models (Carlini et al. 2022, arXiv 2112.03570, section 4): the attacker trains
//! adapters of their own, by the same plan, on halves of a pool of people, the target among them or not, and fits a normal
//! distribution to the confidence in the target's label of either kind, the logit of that label. An adapter is judged by the
//! ratio of the two densities. All rounds are run by the agent's trainer and the coordinator's rule and optimiser.
//!
//! The target is the person whose row moves the adapter most, as far as the first round shows it. Each adapter that is
//! judged is trained on a half of its own and judged about the one target, so guesses are independent. Two figures: which
//! of two adapters had the target, and how many are found at a false alarm in a hundred, by a threshold from the shadows' kind
//! without the target. Control: no noise, with the clip as it is.

use anyhow::{Context, Result};
use rand::seq::SliceRandom;
use rand::{CryptoRng, RngCore};
use tabmesh_tfm::adapter::Kind;

use super::bounds::{normal_quantile, upper_rate};
use super::guess::{FAILURE, Guesses, Subject};
use super::round::{Round, Wanted};
use super::setting::Person;

/// Attacks `pairs` pairs of adapters, with and without the target, at a plan's ε for each subject.
///
/// # Errors
/// A budget that buys no usable noise.
pub(super) fn audit<R: RngCore + CryptoRng>(epsilon: f64, pairs: usize, rng: &mut R) -> Result<Vec<Guesses>> {
    let adapter = "feature_tokens";
    let wanted = Wanted { epsilon, rounds: ROUNDS, adapter, kind: Kind::FeatureTokens, clip: 1.0 };
    let round = Round::new(wanted, rng)?;
    let claim = round.claim_of_all()?;
    let mut pool: Vec<Person> = (0..=POOL).map(|_| Person::random(rng)).collect();
    let target = pool.swap_remove(loudest(&round.gradients(&pool)?).context("a pool of people")?);
    let mut all = Vec::new();
    for subject in [Subject::Shipped, Subject::NoNoise] {
        let noise = round.noise(subject)?;
        let confidence = |with: bool, rng: &mut R| -> Result<f64> {
            let mut people = pool.clone();
            people.shuffle(rng);
            people.truncate(POOL / 2);
            if with {
                people.push(target);
            }
            let adapter = round.trained(&people, (POOL / 2) as f64, noise.as_ref(), rng)?;
            Ok(round.confidence(&[target], &adapter)?[0])
        };
        let kind = |with: bool, count: usize, rng: &mut R| -> Result<Vec<f64>> {
            (0..count).map(|_| confidence(with, rng)).collect()
        };
        let shadows = [false, true].map(|with| kind(with, SHADOWS / 2, rng).map(|seen| Normal::of(&seen)));
        let [out, within] = shadows;
        let (out, within) = (out?, within?);
        let threshold = out.ratio_at(&within, 1.0 - FALSE_ALARMS);
        let scores = |seen: Vec<f64>| -> Vec<f64> {
            seen.into_iter().map(|logit| within.log_density(logit) - out.log_density(logit)).collect()
        };
        let (without, with) = (scores(kind(false, pairs, rng)?), scores(kind(true, pairs, rng)?));
        let above = with.iter().zip(&without).filter(|(with, without)| with > without).count();
        let beyond = |scores: &[f64]| scores.iter().filter(|score| **score > threshold).count();
        all.push(Guesses::of_pairs(("which of two adapters", subject), &claim, (above, pairs)));
        let alarms = upper_rate(beyond(&without), pairs, FAILURE);
        let test = ("found at 1 % false alarms", subject);
        all.push(Guesses::of_secrets(test, &claim, (beyond(&with), pairs), alarms));
    }
    Ok(all)
}

/// The person with the longest clipped gradient; among equals the one that the others' sum explains least.
fn loudest(gradients: &[Vec<i64>]) -> Option<usize> {
    let mut sum = vec![0.0; gradients.first()?.len()];
    for gradient in gradients {
        sum.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += *value as f64);
    }
    let rest = |gradient: &Vec<i64>| -> f64 {
        let own = |value: &i64| *value as f64;
        let square: f64 = gradient.iter().map(|value| own(value).powi(2)).sum();
        let along: f64 = gradient.iter().zip(&sum).map(|(value, sum)| own(value) * sum).sum();
        square - along.powi(2) / sum.iter().map(|value| value * value).sum::<f64>().max(1.0)
    };
    (0..gradients.len()).max_by(|a, b| rest(&gradients[*a]).total_cmp(&rest(&gradients[*b])))
}

/// A normal distribution fitted to a few values.
#[derive(Debug, Clone, Copy)]
struct Normal {
    mean: f64,
    deviation: f64,
}

impl Normal {
    fn of(values: &[f64]) -> Self {
        let n = values.len().max(2) as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        Self { mean, deviation: variance.sqrt().max(LEAST_DEVIATION) }
    }

    /// Up to a constant.
    fn log_density(&self, value: f64) -> f64 {
        -0.5 * ((value - self.mean) / self.deviation).powi(2) - self.deviation.ln()
    }

    /// The likelihood ratio of `other` to this that values of this reach with probability `1 - rank`, by its quantiles.
    fn ratio_at(&self, other: &Self, rank: f64) -> f64 {
        let steps = 2_000;
        let value = |step: i32| {
            self.mean + self.deviation * normal_quantile((f64::from(step) + 0.5) / f64::from(steps))
        };
        let ratio = |value: f64| other.log_density(value) - self.log_density(value);
        let mut ratios: Vec<f64> = (0..steps).map(|step| ratio(value(step))).collect();
        ratios.sort_by(f64::total_cmp);
        let at = (rank * f64::from(steps)) as usize;
        ratios.get(at).copied().unwrap_or(f64::INFINITY)
    }
}

/// Rounds of the plan.
const ROUNDS: u32 = 12;
/// People beside the target; half of them are in each adapter.
const POOL: usize = 6;
/// The attacker's own adapters.
const SHADOWS: usize = 64;
/// Rate of false alarms that the threshold is set for.
const FALSE_ALARMS: f64 = 0.01;
/// Least standard deviation of a confidence.
const LEAST_DEVIATION: f64 = 1e-6;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    /// A fixed seed: the outcome is the same in every run.
    #[test]
    fn nobody_is_found_in_an_adapter_more_often_than_its_claim_allows_and_the_control_is_caught() {
        let found = audit(3.0, 60, &mut ChaCha20Rng::seed_from_u64(24)).unwrap();
        assert_eq!(found.len(), 4);
        for guesses in &found {
            assert!(guesses.as_it_must(), "{guesses:?}");
        }
    }

    #[test]
    fn a_threshold_lets_as_many_pass_as_it_says() {
        let (out, within) = (Normal { mean: 0.0, deviation: 1.0 }, Normal { mean: 2.0, deviation: 1.0 });
        // Of equal spread the ratio rises with the value: the threshold is that at the 99th percentile.
        let at = normal_quantile(0.99);
        let expected = within.log_density(at) - out.log_density(at);
        assert!((out.ratio_at(&within, 0.99) - expected).abs() < 0.02);
        let fitted = Normal::of(&[1.0, 3.0]);
        assert!((fitted.mean - 2.0).abs() < 1e-12 && (fitted.deviation - 2.0_f64.sqrt()).abs() < 1e-12);
    }
}
