//! Membership in a corpus: can one who has the synthetic rows tell whether a unit's rows were behind them?
//!
//! The attacker has the corpus and nothing else of the release, and knows everybody else's rows. A unit that was counted makes
//! its own cells heavier: the score is the mean, over the marginals that the corpus is drawn from, of the share of corpus rows in
//! the target's cell over the share of the others' rows there (the focal points of MAMA-MIA: Golob, Pentyala, Maratkhan and
//! De Cock 2024, arXiv 2410.05506, section 4; the others' own rows take the place of auxiliary data).
//!
//! A corpus is drawn from noisy counts, so it gives away no more than they do, and this attack finds less than the one on the
//! counts. Two figures as there: which of two corpora had the target, and how many targets are found at a false alarm in a
//! hundred, by a threshold from other corpora without the target. Controls: a tenth of the noise, and exact counts.

use anyhow::{Context, Result};
use rand::{CryptoRng, RngCore};
use tabmesh_contract::batch::TypedBatch;
use tabmesh_synthesis::sample::CellRows;

use super::bounds::upper_rate;
use super::guess::{FAILURE, Guesses, Subject};
use super::release::{MAX_ROWS, Released, Setting};
use super::setting::{Person, owners, read};

/// Attacks `pairs` pairs of corpora, with and without the target, at a plan's ε for each subject.
///
/// # Errors
/// A budget that buys no usable noise.
pub(super) fn audit<R: RngCore + CryptoRng>(epsilon: f64, pairs: usize, rng: &mut R) -> Result<Vec<Guesses>> {
    let setting = Setting::new(epsilon)?;
    let others: Vec<(Person, u32)> = (0..OTHERS).map(|_| (Person::random(rng), MAX_ROWS)).collect();
    let mut people = vec![(Person::random(rng), MAX_ROWS)];
    people.extend(&others);
    let (without, with) = (read(&others, MAX_ROWS)?, read(&people, MAX_ROWS)?);
    let mut all = Vec::new();
    for subject in [Subject::Shipped, Subject::TenthNoise, Subject::NoNoise] {
        let mut claim = None;
        let mut score = |table: &TypedBatch, rng: &mut R| -> Result<f64> {
            let released = setting.release(table, subject, rng)?;
            if claim.is_none() {
                claim = Some(setting.claim(&released.stages)?);
            }
            let corpus = setting.corpus(&released, rng)?;
            target_score(&setting, &released, &corpus, &with, &without)
        };
        // The threshold is settled before anything is judged by it.
        let mut alone = (0..pairs).map(|_| score(&without, rng)).collect::<Result<Vec<_>>>()?;
        alone.sort_by(|a, b| b.total_cmp(a));
        let threshold = alone.get(pairs / FALSE_ALARMS_ONE_IN).copied().context("enough corpora")?;
        let (mut above, mut hits, mut alarms) = (0, 0, 0);
        for _ in 0..pairs {
            let (out, within) = (score(&without, rng)?, score(&with, rng)?);
            above += usize::from(within > out);
            alarms += usize::from(out > threshold);
            hits += usize::from(within > threshold);
        }
        let claim = claim.context("at least one release")?;
        all.push(Guesses::of_pairs(("which of two corpora", subject), &claim, (above, pairs)));
        if subject != Subject::TenthNoise {
            let alarms = upper_rate(alarms, pairs, FAILURE);
            let test = ("found at 1 % false alarms", subject);
            all.push(Guesses::of_secrets(test, &claim, (hits, pairs), alarms));
        }
    }
    Ok(all)
}

/// How much heavier the target's cells are in the corpus than among the others, over all marginals of the last stage.
fn target_score(
    setting: &Setting,
    released: &Released,
    corpus: &CellRows,
    with: &TypedBatch,
    without: &TypedBatch,
) -> Result<f64> {
    let query = &released.stages.last().context("a release has stages")?.query;
    let target = owners(with).iter().position(|owner| *owner == 0).context("the target has rows")?;
    let label = |table: &TypedBatch, row: usize| table.labels.get(row).copied().flatten();
    let own = setting.cells(query, with, target, label(with, target).context("the target has a label")?)?;
    let others = (0..without.rows())
        .map(|row| setting.cells(query, without, row, label(without, row).unwrap_or_default()))
        .collect::<Result<Vec<_>>>()?;
    let mut score = 0.0;
    for marginal in &query.marginals {
        let known = others.iter().filter(|cells| marginal.attributes.iter().all(|at| cells[*at] == own[*at]));
        // Half a row, so that a cell that nobody else is in has a share.
        let expected = (known.count() as f64 + 0.5) / (others.len() as f64 + 1.0);
        let columns: Vec<(&[u32], usize)> =
            marginal.attributes.iter().map(|at| (corpus.column(*at), own[*at])).collect();
        let alike = |row: &usize| columns.iter().all(|(column, cell)| column[*row] as usize == *cell);
        let seen = (0..corpus.rows()).filter(alike).count() as f64 / corpus.rows().max(1) as f64;
        score += seen / expected;
    }
    Ok(score / query.marginals.len().max(1) as f64)
}

/// People beside the target.
const OTHERS: usize = 24;
/// The threshold is set so that one corpus in so many is a false alarm.
const FALSE_ALARMS_ONE_IN: usize = 100;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    /// A fixed seed: the outcome is the same in every run.
    #[test]
    fn nobody_is_found_in_a_corpus_more_often_than_its_claim_allows_and_every_control_is_caught() {
        let found = audit(3.0, 200, &mut ChaCha20Rng::seed_from_u64(23)).unwrap();
        assert_eq!(found.len(), 5);
        for guesses in &found {
            assert!(guesses.as_it_must(), "{guesses:?}");
        }
        // The attack has power: without noise it is right nearly always, with the shipped noise more often than a coin.
        assert!(found[3].rate > 0.95 && found[0].interval[0] > 0.5, "{found:?}");
    }
}
