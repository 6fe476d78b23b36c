//! Inversion of a round: can somebody's row be read from the vector that an agent with few rows sends?
//!
//! Here the vector is the gradient of an adapter, in [`super::forest`] the sums in the leaves of a round's trees.
//!
//! An agent has four rows, of which the attacker knows three, and everything published: base, context, coding, adapter. The
//! fourth is one of 64 that are equally likely, 32 made-up people with either label. With the shipped code the attacker
//! computes the clipped gradient of each, and guesses the row whose gradient is nearest to what is left of the vector: for
//! Gaussian noise that is the likeliest one, so no other attack does better against these odds (Balunović et al. 2022, arXiv
//! 2111.04706, section 4; matching gradients of candidates instead of searching for inputs as Zhu et al. 2019, arXiv 1906.08935,
//! loses nothing where the candidates can be listed). Two questions: which row, and, its features being known, which label.
//!
//! Each candidate is the target equally often, and the sums are those of the agent's own trainer. Controls: a tenth of the
//! noise, and none; without noise every row and label must be found.

use anyhow::{Result, ensure};
use rand::{CryptoRng, RngCore};
use tabmesh_privacy::mechanism::{DiscreteGaussian, Noise};
use tabmesh_tfm::adapter::Kind;

use super::guess::{Claim, Guesses, Subject};
use super::round::{Round, Wanted};
use super::setting::Person;

/// Attacks one of twelve rounds of a plan about `trials` times for each subject with noise.
///
/// # Errors
/// A budget that buys no usable noise; an agent whose sum isn't that of its rows' gradients.
pub(super) fn audit<R: RngCore + CryptoRng>(
    epsilon: f64,
    trials: usize,
    rng: &mut R,
) -> Result<Vec<Guesses>> {
    let wanted =
        Wanted { epsilon, rounds: ROUNDS, adapter: "feature_tokens", kind: Kind::FeatureTokens, clip: 1.0 };
    let round = Round::new(wanted, rng)?;
    let claim = round.claim()?;
    let known: Vec<Person> = (0..KNOWN).map(|_| Person::random(rng)).collect();
    let candidates = candidates(rng);
    let gradients = round.gradients(&candidates)?;
    let mut others = vec![0_i64; gradients.first().map_or(0, Vec::len)];
    for gradient in round.gradients(&known)? {
        others.iter_mut().zip(&gradient).for_each(|(sum, value)| *sum += value);
    }
    let mut sums = Vec::with_capacity(candidates.len());
    for (target, gradient) in candidates.iter().zip(&gradients) {
        let table: Vec<Person> = known.iter().chain([target]).copied().collect();
        let sum = round.agents_sum(&table)?;
        let same = sum.iter().zip(&others).zip(gradient).all(|((sum, other), own)| *sum == other + own);
        ensure!(same && sum.len() == gradient.len(), "the agent's sum isn't the sum of its rows' gradients");
        sums.push(sum);
    }
    let aim = Aim { names: ["the row, of 64", "the label"], claim, others, vectors: gradients, sums };
    let mut all = Vec::new();
    for subject in SUBJECTS {
        all.extend(aim.attacked(subject, round.noise(subject)?.as_ref(), trials, rng));
    }
    Ok(all)
}

/// What an attacker of one vector knows, and the vectors before noise for each truth.
pub(super) struct Aim {
    /// The two questions.
    pub(super) names: [&'static str; 2],
    pub(super) claim: Claim,
    /// What the known rows add up to.
    pub(super) others: Vec<i64>,
    /// What each candidate would add, the two labels of a person side by side.
    pub(super) vectors: Vec<Vec<i64>>,
    /// What the agent's code makes of the known rows and each candidate.
    pub(super) sums: Vec<Vec<i64>>,
}

impl Aim {
    /// Attacks about `trials` vectors with this noise; each once without noise.
    pub(super) fn attacked<R: RngCore + CryptoRng>(
        &self,
        subject: Subject,
        noise: Option<&DiscreteGaussian>,
        trials: usize,
        rng: &mut R,
    ) -> [Guesses; 2] {
        let candidates = self.vectors.len();
        let times = if noise.is_some() { trials.div_ceil(candidates) } else { 1 };
        let (mut rows, mut labels) = (0, 0);
        for (truth, sum) in self.sums.iter().enumerate() {
            for _ in 0..times {
                let seen = match noise {
                    Some(noise) => noise.privatize(sum, rng).into_inner(),
                    None => sum.clone(),
                };
                let own: Vec<f64> =
                    seen.iter().zip(&self.others).map(|(seen, other)| (seen - other) as f64).collect();
                let fits: Vec<f64> = self.vectors.iter().map(|vector| fit(&own, vector)).collect();
                rows += usize::from(best(&fits) == Some(truth));
                let pair = truth - truth % 2;
                labels += usize::from(best(&fits[pair..pair + 2]) == Some(truth - pair));
            }
        }
        let trials = times * candidates;
        let [row, label] = self.names;
        [
            Guesses::of_secrets((row, subject), &self.claim, (rows, trials), 1.0 / candidates as f64),
            Guesses::of_secrets((label, subject), &self.claim, (labels, trials), 0.5),
        ]
    }
}

/// People that a target may be, each with either label.
pub(super) fn candidates<R: RngCore>(rng: &mut R) -> Vec<Person> {
    (0..PEOPLE)
        .flat_map(|_| {
            let person = Person::random(rng);
            [0, 1].map(|label| Person { label, ..person })
        })
        .collect()
}

/// How well a gradient explains a vector: minus half of the squared distance, less what all gradients share.
fn fit(own: &[f64], gradient: &[i64]) -> f64 {
    own.iter().zip(gradient).map(|(seen, value)| (seen - 0.5 * *value as f64) * *value as f64).sum()
}

fn best(fits: &[f64]) -> Option<usize> {
    (0..fits.len()).max_by(|a, b| fits[*a].total_cmp(&fits[*b]))
}

/// Rounds of the plan, as plans have them by default.
const ROUNDS: u32 = 12;
/// What is attacked.
pub(super) const SUBJECTS: [Subject; 3] = [Subject::Shipped, Subject::TenthNoise, Subject::NoNoise];
/// Rows that the attacker knows.
pub(super) const KNOWN: usize = 3;
/// People that the target may be, each with either label.
const PEOPLE: usize = 32;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    /// A fixed seed: the outcome is the same in every run.
    #[test]
    fn a_row_is_read_from_a_bare_sum_and_hardly_better_than_guessed_from_what_an_agent_sends() {
        let found = audit(3.0, 2_000, &mut ChaCha20Rng::seed_from_u64(41)).unwrap();
        assert_eq!(found.len(), 6);
        for guesses in &found {
            assert!(guesses.as_it_must(), "{guesses:?}");
            if guesses.subject == Subject::NoNoise {
                assert!(guesses.rate > 0.95, "{guesses:?}");
            }
        }
        // A round of this plan allows 1.44 times the rate of a guess without the vector; with the error of some two thousand
        // trials that is less than twice.
        assert!(found[0].allowed < 1.5 * found[0].prior, "{:?}", found[0]);
        assert!(found[0].interval[1] < 2.0 * found[0].prior, "{:?}", found[0]);
    }
}
