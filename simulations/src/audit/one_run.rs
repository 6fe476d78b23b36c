//! One run that audits itself: many units, each in or out by a coin, and as many guesses about a single noised vector.
//!
//! The attacker sees one vector, scores every unit by how much the vector speaks for it, guesses "in" for the highest
//! scores and "out" for the lowest, and abstains in between. How many guesses can be right by chance follows from ε and δ alone,
//! whatever the scores are (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, section 5); more refute the claim. The number
//! of guesses is fixed beforehand. One run finds less than many: the bound that it gives is some way below the truth even where
//! the attack is the best there is.
//!
//! - *Counts*: each unit has a cell of its own and more rows than its contract lets through. The table is read through the
//!   agent's bound on the rows of a unit, counted and noised. Controls: a quarter of the noise, no bound, no noise.
//! - *Gradients*: each unit is a row whose clipped gradient is unlike the others'. The sum is the agent's own, from its
//!   trainer; the scores are the mean of the posterior under Gaussian noise, since gradients aren't at right angles. Controls:
//!   no clip, no noise.

use anyhow::{Context, Result, ensure};
use rand::{CryptoRng, Rng, RngCore};
use serde::Serialize;
use tabmesh_agent::source::{DomainKey, UnitCap};
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_privacy::accountant::zcdp;
use tabmesh_privacy::budget::{Delta, Epsilon, Rho};
use tabmesh_privacy::mechanism::{DiscreteGaussian, Noise};
use tabmesh_privacy::release::{Attribute, Binning, ColumnRef, MarginalSpec, ReleaseQuery, count};
use tabmesh_tfm::adapter::Kind;

use super::bounds::one_run_epsilon;
use super::guess::{Claim, Subject};
use super::release::{DELTA, MAX_ROWS};
use super::round::{Round, Wanted};
use super::setting::Person;
use crate::logistic::solve;

/// What one run says.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Run {
    /// `counts` or `gradients`.
    pub(super) vector: &'static str,
    pub(super) subject: Subject,
    /// Units that are in or out by a coin.
    pub(super) canaries: usize,
    /// Guesses made, half of them "in".
    pub(super) guesses: usize,
    /// Guesses that are right.
    pub(super) right: usize,
    /// ε of the claim.
    pub(super) claimed: f64,
    /// ε of an exact Gaussian account of the same noise.
    pub(super) exact: f64,
    /// Lower bound on ε at a confidence of 95 %.
    pub(super) found: f64,
    /// Whether that exceeds the claim.
    pub(super) broken: bool,
}

/// One run over counts for each subject, at an ε of the run.
///
/// # Errors
/// A budget that buys no usable noise.
pub(super) fn counts<R: RngCore + CryptoRng>(epsilon: f64, rng: &mut R) -> Result<Vec<Run>> {
    let delta = Delta::new(DELTA)?;
    let claim = Claim { rho: zcdp::rho_for(Epsilon::new(epsilon)?, delta), delta };
    let query = own_cells(claim.rho)?;
    let subjects = [Subject::Shipped, Subject::QuarterNoise, Subject::NoUnitBound, Subject::NoNoise];
    let one = |subject: Subject| {
        let coins: Vec<bool> = (0..COUNTED).map(|_| rng.random()).collect();
        let mut table = crowded(&coins);
        if subject != Subject::NoUnitBound {
            table = UnitCap::apply(DomainKey::new(&[9; 32]), MAX_ROWS, &table);
        }
        let Some(TypedColumn::Numeric(values)) = table.columns.first() else {
            anyhow::bail!("the table has a numeric column")
        };
        let counts = count(&query, &[ColumnRef::Numeric(values)], &table.labels)?;
        let seen = match subject.spent(query.rho) {
            Some(rho) => {
                let noise = DiscreteGaussian::from_rho(query.l2_sensitivity_squared(), rho)?;
                noise.privatize(&counts, rng).into_inner()
            }
            None => counts,
        };
        let scores: Vec<f64> = seen.iter().take(COUNTED).map(|count| *count as f64).collect();
        Ok(judged("counts", subject, &claim, &scores, &coins, COUNT_GUESSES))
    };
    subjects.into_iter().map(one).collect()
}

/// A query of one marginal in which every canary has a cell.
fn own_cells(rho: Rho) -> Result<ReleaseQuery> {
    let edges: Vec<f64> = (1..COUNTED).map(|edge| edge as f64).collect();
    let binning = Binning::Edges { lower: 0.0, upper: COUNTED as f64, log1p: false, edges };
    let query = ReleaseQuery {
        plan_digest: "audit".to_owned(),
        stage: 1,
        stage_name: "one_way".to_owned(),
        attributes: vec![Attribute { id: "person.cell".to_owned(), binning, merge: None }],
        marginals: vec![MarginalSpec { attributes: vec![0] }],
        rho,
        max_rows_per_unit: MAX_ROWS,
    };
    query.check()?;
    Ok(query)
}

/// The canaries that are in, each with four times the rows that a unit may have.
fn crowded(coins: &[bool]) -> TypedBatch {
    let rows = || {
        let present = coins.iter().enumerate().filter(|(_, coin)| **coin);
        present.flat_map(|(at, _)| std::iter::repeat_n(at, 4 * MAX_ROWS as usize))
    };
    let unit = |at: usize| {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&(at as u64).to_be_bytes());
        key
    };
    TypedBatch {
        columns: vec![TypedColumn::Numeric(rows().map(|at| at as f64 + 0.5).collect())],
        labels: rows().map(|_| Some(0)).collect(),
        units: rows().map(unit).collect(),
    }
}

/// One run over a round's clipped sum for each subject, at an ε of the round.
///
/// # Errors
/// A budget that buys no usable noise; an agent whose sum isn't that of its rows' gradients.
pub(super) fn gradients<R: RngCore + CryptoRng>(epsilon: f64, rng: &mut R) -> Result<Vec<Run>> {
    let mut round = Round::new(
        Wanted {
            // Half of a plan's budget goes to its release.
            epsilon: twice(epsilon)?,
            rounds: 1,
            adapter: "{kind: frozen_lora, rank: 4}",
            kind: Kind::FrozenLora { rank: 4, seed: 0 },
            clip: SHORT,
        },
        rng,
    )?;
    let claim = round.claim()?;
    let pool: Vec<Person> = (0..POOL).map(|_| Person::random(rng)).collect();
    let chosen = unlike(&round.gradients(&pool)?, CANARIES);
    let people: Vec<Person> = chosen.iter().map(|at| pool[*at]).collect();
    let mut runs = Vec::new();
    for subject in [Subject::Shipped, Subject::NoNoise, Subject::NoClip] {
        let noise = round.noise(subject)?;
        if subject == Subject::NoClip {
            round = round.without_clip();
        }
        let gradients = round.gradients(&people)?;
        let coins: Vec<bool> = people.iter().map(|_| rng.random()).collect();
        let present: Vec<Person> =
            people.iter().zip(&coins).filter(|(_, coin)| **coin).map(|(person, _)| *person).collect();
        let sum = round.agents_sum(&present)?;
        let mut expected = vec![0_i64; sum.len()];
        for (gradient, _) in gradients.iter().zip(&coins).filter(|(_, coin)| **coin) {
            expected.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
        }
        ensure!(sum == expected, "the agent's sum isn't the sum of its rows' gradients");
        let variance = noise.as_ref().map_or(1.0, Noise::variance);
        let seen = match &noise {
            Some(noise) => noise.privatize(&sum, rng).into_inner(),
            None => sum,
        };
        let scores = posterior_means(&gradients, &seen, variance).context("the canaries' system")?;
        runs.push(judged("gradients", subject, &claim, &scores, &coins, GRADIENT_GUESSES));
    }
    Ok(runs)
}

/// The ε of a plan whose single round has ε.
fn twice(epsilon: f64) -> Result<f64> {
    let delta = Delta::new(DELTA)?;
    Ok(zcdp::epsilon(zcdp::rho_for(Epsilon::new(epsilon)?, delta).share(2, 1), delta).get())
}

/// The `wanted` gradients that are least explained by each other, greedily: Gram-Schmidt with the longest rest first.
fn unlike(gradients: &[Vec<i64>], wanted: usize) -> Vec<usize> {
    let mut rests: Vec<Vec<f64>> =
        gradients.iter().map(|gradient| gradient.iter().map(|value| *value as f64).collect()).collect();
    let square = |rest: &Vec<f64>| rest.iter().map(|value| value * value).sum::<f64>();
    let mut lengths: Vec<f64> = rests.iter().map(square).collect();
    let mut chosen = Vec::with_capacity(wanted);
    while chosen.len() < wanted.min(gradients.len()) {
        let longest = (0..rests.len())
            .filter(|at| !chosen.contains(at))
            .max_by(|a, b| lengths[*a].total_cmp(&lengths[*b]));
        let Some(longest) = longest else { break };
        chosen.push(longest);
        let length = lengths[longest].sqrt().max(f64::MIN_POSITIVE);
        let along: Vec<f64> = rests[longest].iter().map(|value| value / length).collect();
        for (rest, square_of) in rests.iter_mut().zip(&mut lengths) {
            let share: f64 = rest.iter().zip(&along).map(|(a, b)| a * b).sum();
            rest.iter_mut().zip(&along).for_each(|(value, unit)| *value -= share * unit);
            *square_of = square(rest);
        }
    }
    chosen
}

/// How much above one half the mean of each coin is, given the sum: least squares with the variance of a coin as prior.
fn posterior_means(gradients: &[Vec<i64>], seen: &[i64], variance: f64) -> Option<Vec<f64>> {
    let n = gradients.len();
    let rows: Vec<Vec<f64>> =
        gradients.iter().map(|gradient| gradient.iter().map(|value| *value as f64).collect()).collect();
    let mut rest: Vec<f64> = seen.iter().map(|value| *value as f64).collect();
    for row in &rows {
        rest.iter_mut().zip(row).for_each(|(value, part)| *value -= 0.5 * part);
    }
    let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut gram = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            gram[i * n + j] = inner(&rows[i], &rows[j]) / variance;
            gram[j * n + i] = gram[i * n + j];
        }
        gram[i * n + i] += 1.0 / COIN_VARIANCE;
    }
    let sides = rows.iter().map(|row| inner(row, &rest) / variance).collect();
    solve(gram, sides, n)
}

/// Guesses by the extreme scores, counted and turned into a bound.
fn judged(
    vector: &'static str,
    subject: Subject,
    claim: &Claim,
    scores: &[f64],
    coins: &[bool],
    guesses: usize,
) -> Run {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    let half = guesses / 2;
    let out = order.iter().take(half).filter(|at| !coins[**at]).count();
    let within = order.iter().rev().take(half).filter(|at| coins[**at]).count();
    let (canaries, guesses, right) = (scores.len(), 2 * half, out + within);
    let (claimed, found) =
        (claim.epsilon(), one_run_epsilon(canaries, guesses, right, claim.delta, ONE_SIDE));
    Run {
        vector,
        subject,
        canaries,
        guesses,
        right,
        claimed,
        exact: claim.exact(),
        found,
        broken: found > claimed,
    }
}

/// Probability that a lower bound on ε is too high.
const ONE_SIDE: f64 = 0.05;
/// Units whose counts are guessed about; each has a cell of the query.
const COUNTED: usize = 2_000;
/// Guesses about counts.
const COUNT_GUESSES: usize = 400;
/// Rows that gradient canaries are chosen from.
const POOL: usize = 400;
/// Units whose gradients are guessed about.
const CANARIES: usize = 128;
/// Guesses about gradients.
const GRADIENT_GUESSES: usize = 64;
/// Clip norm over the usual one: what a clip holds back is then most of a gradient.
const SHORT: f64 = 1.0 / 1024.0;
/// Variance of a fair coin.
const COIN_VARIANCE: f64 = 0.25;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    /// Fixed seeds: the outcome is the same in every run.
    #[test]
    fn one_run_of_the_shipped_counts_keeps_the_claim_and_controls_do_not() {
        let runs = counts(2.0, &mut ChaCha20Rng::seed_from_u64(31)).unwrap();
        assert_eq!(runs.len(), 4);
        for run in &runs {
            assert!(run.subject.as_it_must(run.broken), "{run:?}");
        }
        // The attack has power with the shipped noise as well.
        assert!(runs[0].found > 0.2, "{:?}", runs[0]);
    }

    #[test]
    fn one_run_of_a_shipped_round_keeps_the_claim_and_controls_do_not() {
        let runs = gradients(2.0, &mut ChaCha20Rng::seed_from_u64(32)).unwrap();
        assert_eq!(runs.len(), 3);
        for run in &runs {
            assert!(run.subject.as_it_must(run.broken), "{run:?}");
        }
    }

    #[test]
    fn canaries_that_others_explain_are_left_out() {
        let gradients = vec![vec![4, 0, 0], vec![8, 0, 0], vec![0, 3, 0], vec![8, 3, 0], vec![0, 0, 1]];
        let mut chosen = unlike(&gradients, 3);
        chosen.sort_unstable();
        assert_eq!(chosen.last(), Some(&4));
        assert_eq!(unlike(&gradients, 9).len(), 5);
    }
}
