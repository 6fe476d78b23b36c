//! Membership in a release: can one who knows everybody else tell whether a unit was in the table?
//!
//! The attacker has all stages and both tables that are possible, with the target's rows and without. The likelihood ratio
//! of the two under Gaussian noise is one inner product: what the target's rows would add to each count, times what is
//! there beyond the others' (the likelihood-ratio attack of Carlini et al. 2022, arXiv 2112.03570, section 4, with the true
//! distribution in place of shadow models). The target's rows are alike and pass the agent's bound on the rows of a unit, so
//! the shift is the sensitivity in every stage and the attack is the strongest there is.
//!
//! Two figures: which of two releases had the target, by the larger score (the area under the ROC curve), and how many
//! targets are found at a false alarm in a hundred, with both rates bounded. Controls: half the noise, four times the
//! rows of a unit, and exact counts.

use anyhow::{Context, Result};
use rand::{CryptoRng, RngCore};
use tabmesh_contract::batch::TypedBatch;

use super::bounds::{normal_quantile, upper_rate};
use super::guess::{FAILURE, Guesses, Subject};
use super::release::{MAX_ROWS, Setting, Stage};
use super::setting::{Person, owners, read};

/// Attacks `pairs` pairs of releases, with and without the target, at a plan's ε for each subject.
///
/// # Errors
/// A budget that buys no usable noise.
pub(super) fn audit<R: RngCore + CryptoRng>(epsilon: f64, pairs: usize, rng: &mut R) -> Result<Vec<Guesses>> {
    let setting = Setting::new(epsilon)?;
    let others: Vec<(Person, u32)> = (0..OTHERS).map(|_| (Person::random(rng), MAX_ROWS)).collect();
    // The table holds more rows of the target than the contract lets through.
    let mut people = vec![(Person::random(rng), UNBOUNDED)];
    people.extend(&others);
    let without = read(&others, MAX_ROWS)?;
    let mut all = Vec::new();
    for subject in [Subject::Shipped, Subject::HalfNoise, Subject::NoUnitBound, Subject::NoNoise] {
        let kept = if subject == Subject::NoUnitBound { UNBOUNDED } else { MAX_ROWS };
        let with = read(&people, kept)?;
        let (mut above, mut hits, mut alarms, mut claim) = (0, 0, 0, None);
        for _ in 0..pairs {
            let mut scores = [0.0; 2];
            for (score, table) in scores.iter_mut().zip([&without, &with]) {
                let stages = setting.release(table, subject, rng)?.stages;
                if claim.is_none() {
                    claim = Some(setting.claim(&stages)?);
                }
                *score = standard_score(&setting, &stages, &with, &without)?;
            }
            let threshold = normal_quantile(1.0 - FALSE_ALARMS);
            above += usize::from(scores[1] > scores[0]);
            alarms += usize::from(scores[0] > threshold);
            hits += usize::from(scores[1] > threshold);
        }
        let claim = claim.context("at least one release")?;
        all.push(Guesses::of_pairs(("which of two releases", subject), &claim, (above, pairs)));
        if subject != Subject::HalfNoise {
            let alarms = upper_rate(alarms, pairs, FAILURE);
            let test = ("found at 1 % false alarms", subject);
            all.push(Guesses::of_secrets(test, &claim, (hits, pairs), alarms));
        }
    }
    Ok(all)
}

/// The log likelihood ratio less its part that doesn't depend on what was seen, in standard deviations of its noise.
fn standard_score(
    setting: &Setting,
    stages: &[Stage],
    with: &TypedBatch,
    without: &TypedBatch,
) -> Result<f64> {
    let rows: Vec<usize> =
        owners(with).iter().enumerate().filter(|(_, owner)| **owner == 0).map(|(row, _)| row).collect();
    let (first, count) = (*rows.first().context("the target has rows")?, rows.len() as f64);
    let label = with.labels.get(first).copied().flatten().context("the target has a label")?;
    let (mut score, mut variance) = (0.0, 0.0);
    for stage in stages {
        let others = setting.counted(&stage.query, without)?;
        for place in setting.places(&stage.query, with, first, label)? {
            score += stage.precision() * count * (stage.seen[place] - others[place]) as f64;
            variance += stage.precision() * count * count;
        }
    }
    Ok(score / variance.sqrt())
}

/// People beside the target.
const OTHERS: usize = 24;
/// Rows of the target in the table.
const UNBOUNDED: u32 = 4 * MAX_ROWS;
/// Rate of false alarms that the threshold is set for.
const FALSE_ALARMS: f64 = 0.01;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    /// A fixed seed: the outcome is the same in every run.
    #[test]
    fn nobody_is_found_in_a_release_more_often_than_its_claim_allows_and_every_control_is_caught() {
        let found = audit(3.0, 600, &mut ChaCha20Rng::seed_from_u64(22)).unwrap();
        assert_eq!(found.len(), 7);
        for guesses in &found {
            assert!(guesses.as_it_must(), "{guesses:?}");
        }
        // The attack has power: it finds half of what an exact account says even from a few hundred pairs.
        assert!(found[0].found > 0.5 * found[0].exact && found[0].found < found[0].exact, "{:?}", found[0]);
    }
}
