//! Reconstruction from a release: can its noisy counts be solved for somebody's label?
//!
//! The label is what a release exposes most: three of its four stages count it with everything else. All labels are fair
//! coins, so the best guess without the release is right half of the time. Two attackers see all stages:
//!
//! - *All else known*: everybody's rows but the target's label. That is the attacker that differential privacy speaks of;
//!   with its Gaussian noise the likelier of the two tables is told by one inner product.
//! - *Features known*: nobody's label. All labels at once are solved for by regularised least squares over all cells that
//!   count a label (Dinur and Nissim 2003; for contingency tables Kasiviswanathan, Rudelson, Smith and Ullman 2010), and the
//!   target's is read off.
//!
//! Both guess about one unit of each release, so guesses are independent and their rate is bounded exactly. Controls: a quarter
//! of the noise must break the claim for the first attacker, exact counts for both.

use anyhow::{Context, Result};
use rand::{CryptoRng, Rng, RngCore};

use super::guess::{Guesses, Subject};
use super::release::{MAX_ROWS, Setting, Stage};
use super::setting::{Person, owners, read};
use crate::logistic::solve;

/// Attacks `trials` releases at a plan's ε for each subject.
///
/// # Errors
/// A budget that buys no usable noise.
pub(super) fn audit<R: RngCore + CryptoRng>(
    epsilon: f64,
    trials: usize,
    rng: &mut R,
) -> Result<Vec<Guesses>> {
    let setting = Setting::new(epsilon)?;
    let people: Vec<(Person, u32)> = (0..PEOPLE).map(|_| (Person::random(rng), MAX_ROWS)).collect();
    let mut table = read(&people, MAX_ROWS)?;
    let owners = owners(&table);
    let first_rows: Vec<usize> =
        (0..PEOPLE).filter_map(|who| owners.iter().position(|owner| *owner == who)).collect();
    let mut all = Vec::new();
    for subject in [Subject::Shipped, Subject::QuarterNoise, Subject::NoNoise] {
        let (mut right, mut claim) = ([0_usize; 2], None);
        for _ in 0..trials {
            let labels: Vec<u16> = (0..PEOPLE).map(|_| rng.random_range(0..2)).collect();
            table.labels = owners.iter().map(|who| Some(labels[*who])).collect();
            let stages = setting.release(&table, subject, rng)?.stages;
            if claim.is_none() {
                claim = Some(setting.claim(&stages)?);
            }
            let system = System::of(&setting, &stages, &table, &first_rows)?;
            // Labels as signs.
            let signs: Vec<f64> = labels.iter().map(|label| if *label == 1 { 1.0 } else { -1.0 }).collect();
            let guesses = [system.one_of(TARGET, &signs), system.all().context("least squares")?[TARGET]];
            for (right, guess) in right.iter_mut().zip(guesses) {
                *right += usize::from((guess > 0.0) == (labels[TARGET] == 1));
            }
        }
        let claim = claim.context("at least one release")?;
        all.push(Guesses::of_secrets(("label, all else known", subject), &claim, (right[0], trials), 0.5));
        if subject != Subject::QuarterNoise {
            all.push(Guesses::of_secrets(
                ("label, features known", subject),
                &claim,
                (right[1], trials),
                0.5,
            ));
        }
    }
    Ok(all)
}

/// The released counts as linear equations in the labels' signs, weighed by their precision: `gram · signs ≈ sides`.
struct System {
    gram: Vec<f64>,
    sides: Vec<f64>,
}

impl System {
    fn of(
        setting: &Setting,
        stages: &[Stage],
        table: &tabmesh_contract::batch::TypedBatch,
        first_rows: &[usize],
    ) -> Result<Self> {
        let n = first_rows.len();
        let (mut gram, mut sides) = (vec![0.0; n * n], vec![0.0; n]);
        let half = f64::from(MAX_ROWS) / 2.0;
        for stage in stages {
            // A label moves half of a person's rows from the middle of its two cells into one of them.
            let mut rest: Vec<f64> = stage.seen.iter().map(|count| *count as f64).collect();
            let mut moves: Vec<Vec<(usize, f64)>> = Vec::with_capacity(n);
            for row in first_rows {
                let zero = setting.places(&stage.query, table, *row, 0)?;
                let one = setting.places(&stage.query, table, *row, 1)?;
                let mut moved = Vec::new();
                for (zero, one) in zero.into_iter().zip(one) {
                    rest[zero] -= half;
                    rest[one] -= half;
                    if zero != one {
                        moved.extend([(zero, -half), (one, half)]);
                    }
                }
                moves.push(moved);
            }
            let precision = stage.precision();
            let mut spread = vec![0.0; rest.len()];
            for (i, own) in moves.iter().enumerate() {
                own.iter().for_each(|(place, by)| spread[*place] += by);
                sides[i] += precision * own.iter().map(|(place, by)| by * rest[*place]).sum::<f64>();
                for (j, other) in moves.iter().enumerate() {
                    gram[i * n + j] +=
                        precision * other.iter().map(|(place, by)| by * spread[*place]).sum::<f64>();
                }
                own.iter().for_each(|(place, _)| spread[*place] = 0.0);
            }
        }
        Ok(Self { gram, sides })
    }

    /// Above zero if the counts speak for label 1 of `target`, the others' signs being known.
    fn one_of(&self, target: usize, signs: &[f64]) -> f64 {
        let n = self.sides.len();
        let known = |who: &usize| *who != target;
        let others: f64 = (0..n).filter(known).map(|who| self.gram[target * n + who] * signs[who]).sum();
        self.sides[target] - others
    }

    /// Everybody's sign by least squares, with the variance that a fair sign has as prior.
    fn all(&self) -> Option<Vec<f64>> {
        let n = self.sides.len();
        let mut gram = self.gram.clone();
        (0..n).for_each(|who| gram[who * n + who] += 1.0);
        solve(gram, self.sides.clone(), n)
    }
}

/// People in the table.
const PEOPLE: usize = 24;
/// Whose label is guessed.
const TARGET: usize = 0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    /// A fixed seed: the outcome is the same in every run.
    #[test]
    fn a_release_gives_labels_away_no_more_than_it_may_and_exact_counts_all_of_them() {
        let found = audit(3.0, 600, &mut ChaCha20Rng::seed_from_u64(21)).unwrap();
        assert_eq!(found.len(), 5);
        for guesses in &found {
            assert!(guesses.as_it_must(), "{guesses:?}");
            match guesses.subject {
                Subject::NoNoise => assert!(guesses.rate > 0.95, "{guesses:?}"),
                Subject::Shipped => assert!(guesses.interval[0] < guesses.allowed, "{guesses:?}"),
                _ => {}
            }
        }
        // The first attack has power: with the shipped noise it is better than a coin.
        assert!(found[0].interval[0] > 0.5, "{:?}", found[0]);
    }
}
