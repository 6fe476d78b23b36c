//! Membership in a forest: can one who sees every noised sum of all rounds, and knows everybody else, tell whether somebody was there?
//!
//! The attacker has what a coordinator under local noise has, and more: each round's noised vector of an agent, the leaf values that
//! the next round starts from, and everybody's rows but the target's. Noise is Gaussian but for its grid, so the sum over
//! rounds of the scalar product with what the target would add is the likelihood ratio: no attack is stronger. The target has many
//! rows, all alike, so that the clip is what bounds them. All vectors come from the agent's own trainer.
//!
//! Which of two runs had the target is guessed by the larger ratio. Controls: half the noise, no clip, no noise.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use rand::{CryptoRng, RngCore};
use tabmesh_agent::publication::Artefacts;
use tabmesh_agent::train::Trainer;
use tabmesh_contract::batch::TypedBatch;
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::descriptor::{RoundDescriptor, RoundInputs};
use tabmesh_federation::id::{AgentId, CollectionId, Digest, PlanDigest};
use tabmesh_federation::manifest::Trust;
use tabmesh_federation::plan::Plan;
use tabmesh_forest::{Cells, Column, Forest, Shape, Step};
use tabmesh_privacy::budget::{Delta, Rho};
use tabmesh_privacy::mechanism::{DiscreteGaussian, Noise};
use tabmesh_store::BlobStore;
use tabmesh_tfm::table::Coding;

use super::DELTA;
use super::guess::{Claim, Guesses, Subject};
use super::inversion::{Aim, KNOWN, SUBJECTS, candidates};
use super::setting::{LEVELS, Person, TARGET, one_row_each, schema};

/// A plan's forest before its first round, with the files that an agent fetches.
struct Setting {
    folder: tempfile::TempDir,
    plan: Plan,
    digest: PlanDigest,
    inputs: RoundInputs,
    schema: FeatureSchema,
}

/// Attacks so many pairs of runs, with and without the target, at a plan's ε for each subject.
///
/// # Errors
/// A budget that buys no usable noise.
pub(super) fn audit<R: RngCore + CryptoRng>(epsilon: f64, pairs: usize, rng: &mut R) -> Result<Vec<Guesses>> {
    let setting = Setting::new(epsilon, rng)?;
    let others: Vec<Person> = (0..OTHERS).map(|_| Person::random(rng)).collect();
    let target = of_one_unit(&one_row_each(&[Person::random(rng)])?);
    let others = one_row_each(&others)?;
    let mut everybody = others.clone();
    everybody.append(&target);
    let [without, with, alone] = [&others, &everybody, &target].map(|rows| setting.trainer(rows));
    let (without, with, alone) = (without?, with?, alone?);
    let claim = setting.claim()?;
    let mut all = Vec::new();
    for subject in [Subject::Shipped, Subject::HalfNoise, Subject::NoClip, Subject::NoNoise] {
        let mut run = |there: bool| -> Result<f64> {
            let agent = if there { &with } else { &without };
            setting.score(subject, agent, (&without, &alone), rng)
        };
        let mut above = 0;
        for _ in 0..pairs {
            above += usize::from(run(true)? > run(false)?);
        }
        all.push(Guesses::of_pairs(("which of two forests", subject), &claim, (above, pairs)));
    }
    Ok(all)
}

/// Attacks the first round of such a plan as [`inversion`](super::inversion) does that of an adapter: an agent has a row that the
/// attacker doesn't know, and everything else is known. People who fall into the same leaves can't be told apart even without noise.
///
/// # Errors
/// A budget that buys no usable noise; an agent whose sum isn't that of its rows.
pub(super) fn inversion<R: RngCore + CryptoRng>(
    epsilon: f64,
    trials: usize,
    rng: &mut R,
) -> Result<Vec<Guesses>> {
    let setting = Setting::new(epsilon, rng)?;
    let descriptor = setting.round(0, &setting.inputs.adapter_values)?;
    let claim = Claim { rho: descriptor.rho, delta: Delta::new(DELTA)? };
    let known: Vec<Person> = (0..KNOWN).map(|_| Person::random(rng)).collect();
    let targets = candidates(rng);
    let mut sum_of = |people: &[Person]| -> Result<Vec<i64>> {
        Ok(setting.trainer(&one_row_each(people)?)?.clipped_sum(&descriptor, rng)?)
    };
    let others = sum_of(&known)?;
    let (mut vectors, mut sums) = (Vec::new(), Vec::new());
    for target in targets {
        let own = sum_of(&[target])?;
        let sum = sum_of(&known.iter().chain([&target]).copied().collect::<Vec<_>>())?;
        let same = sum.iter().zip(&others).zip(&own).all(|((sum, other), own)| *sum == other + own);
        ensure!(same && sum.len() == own.len(), "the agent's sum isn't the sum of its rows' vectors");
        vectors.push(own);
        sums.push(sum);
    }
    let names = ["the row, of 64, by a forest's round", "the label, by a forest's round"];
    let aim = Aim { names, claim, others, vectors, sums };
    let squared = descriptor.sensitivity * descriptor.sensitivity;
    let mut all = Vec::new();
    for subject in SUBJECTS {
        let noise = subject.spent(descriptor.rho).map(|rho| DiscreteGaussian::from_rho(squared, rho));
        all.extend(aim.attacked(subject, noise.transpose()?.as_ref(), trials, rng));
    }
    Ok(all)
}

impl Setting {
    fn new<R: RngCore>(epsilon: f64, rng: &mut R) -> Result<Self> {
        let text = format!(
            "kind: TabmeshPlan\nname: audit\ntarget: {TARGET}\ncohort: {{min_agents: 1}}\n\
             privacy: {{epsilon: {epsilon}, delta: {DELTA}}}\n\
             rounds: {{count: {ROUNDS}, adapter: {{kind: forest, trees: {TREES}, depth: {DEPTH}}}}}\n"
        );
        let (plan, digest) = Plan::parse(text.as_bytes(), "plan.yaml")?;
        let shape = Shape { trees: (ROUNDS * TREES) as usize, depth: DEPTH as usize };
        let forest = Forest::grow(&columns(), shape, *digest.0.as_bytes())?;
        let folder = tempfile::tempdir()?;
        let store = BlobStore::open(&folder.path().join("artefacts"))?;
        let trees = store.put(&serde_json::to_vec(&forest)?)?;
        let inputs = RoundInputs {
            id: CollectionId::new(OPENED_MS, rng, None),
            index: 0,
            attempt: 1,
            base: Digest::of(b"no model is read"),
            context: Digest::from_bytes(*trees.as_bytes()),
            preprocessing: Digest::of(b"no coding is read"),
            adapter_keys: (0..shape.trees).map(|tree| format!("tree.{tree}")).collect(),
            width: u32::try_from(shape.leaves())?,
            adapter_values: forest.values().to_vec(),
            clip_norm: plan.rounds.adapter.row_norm().context("a forest's rows have a norm")?,
            roster: BTreeSet::from([AgentId::new("spiffe://audit/agent")?]),
            opened_ms: OPENED_MS,
            noisy_total: 1_000.0,
            noisy_total_sd: 10.0,
        };
        Ok(Self { folder, plan, digest, inputs, schema: schema()? })
    }

    fn round(&self, index: u32, values: &[f32]) -> Result<RoundDescriptor> {
        let inputs = RoundInputs { index, adapter_values: values.to_vec(), ..self.inputs.clone() };
        Ok(RoundDescriptor::new(inputs, &self.plan, self.digest)?)
    }

    /// What all rounds of the plan cost a unit.
    fn claim(&self) -> Result<Claim> {
        let rho: Rho = self.round(0, &self.inputs.adapter_values)?.rho;
        Ok(Claim { rho: rho.share(u64::from(ROUNDS), 1), delta: Delta::new(DELTA)? })
    }

    /// An agent with a table, by its own code and from its own files.
    fn trainer(&self, rows: &TypedBatch) -> Result<Trainer> {
        let key = "00".repeat(32).parse()?;
        let artefacts = Artefacts::open(self.folder.path(), key, Trust::Production)?;
        let descriptor = self.round(0, &self.inputs.adapter_values)?;
        Ok(Trainer::new(&artefacts, &descriptor, &self.plan, &self.schema, rows, Coding::OwnRow)?)
    }

    /// Runs all rounds with an agent and gives the logarithm of the likelihood ratio, up to a factor: what was seen beside what
    /// everybody else adds, along what the target alone would.
    fn score<R: RngCore + CryptoRng>(
        &self,
        subject: Subject,
        agent: &Trainer,
        (others, target): (&Trainer, &Trainer),
        rng: &mut R,
    ) -> Result<f64> {
        let mut values = self.inputs.adapter_values.clone();
        let mut score = 0.0;
        for index in 0..ROUNDS {
            let mut descriptor = self.round(index, &values)?;
            let squared = descriptor.sensitivity * descriptor.sensitivity;
            let noise = subject.spent(descriptor.rho).map(|rho| DiscreteGaussian::from_rho(squared, rho));
            let noise = noise.transpose()?;
            if subject == Subject::NoClip {
                descriptor.clip_norm *= NO_CLIP;
            }
            let sum = agent.clipped_sum(&descriptor, rng)?;
            let seen = match &noise {
                Some(noise) => noise.privatize(&sum, rng).into_inner(),
                None => sum,
            };
            let (rest, own) = (others.clipped_sum(&descriptor, rng)?, target.clipped_sum(&descriptor, rng)?);
            for ((seen, rest), own) in seen.iter().zip(&rest).zip(&own) {
                score += (*seen as f64 - *rest as f64 - *own as f64 / 2.0) * *own as f64;
            }
            let scale = descriptor.scale as f64;
            let sums: Vec<f64> = seen.iter().map(|value| *value as f64 / scale).collect();
            let variance = descriptor.sigma_squared.as_f64() / (scale * scale);
            let learnt = Step { trees: TREES as usize, noise: variance }.values(&sums)?;
            let first = index as usize * learnt.len();
            values[first..first + learnt.len()].copy_from_slice(&learnt);
        }
        Ok(score)
    }
}

/// So many copies of a row, of one unit that nobody else has.
fn of_one_unit(row: &TypedBatch) -> TypedBatch {
    let mut rows = row.take(&[0; TARGET_ROWS]);
    rows.units = vec![[0xff; 16]; TARGET_ROWS];
    rows
}

/// Counts that make every column worth asking: what the trees look at is no secret.
fn columns() -> Vec<Column> {
    let counts = |cells: usize| (0..cells).map(|cell| [100.0, 20.0 + 40.0 * (cell % 3) as f64]).collect();
    let numbers = |position| Column {
        position,
        cells: Cells::Bins(vec![20.0, 40.0, 60.0, 80.0]),
        counts: counts(6),
        variance: 1.0,
    };
    let levels = |position| Column {
        position,
        cells: Cells::Levels((0..LEVELS as u32).map(|code| vec![code]).collect()),
        counts: counts(LEVELS),
        variance: 1.0,
    };
    // Canonical order: person.age, person.job, person.region, person.spend, person.tariff.
    vec![numbers(0), levels(1), levels(2), numbers(3), levels(4)]
}

/// Rounds of the plan.
const ROUNDS: u32 = 20;
/// Trees of a round.
const TREES: u32 = 4;
/// Splits between root and leaf.
const DEPTH: u32 = 4;
/// People beside the target.
const OTHERS: usize = 20;
/// Rows of the target.
const TARGET_ROWS: usize = 16;
/// Factor of the clip norm where there is none.
const NO_CLIP: f64 = 512.0;
/// When rounds open, UTC milliseconds.
const OPENED_MS: i64 = 1;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    #[test]
    fn a_row_is_read_from_bare_sums_and_hardly_better_than_guessed_from_noised_ones() {
        let found = inversion(3.0, 2_000, &mut ChaCha20Rng::seed_from_u64(42)).unwrap();
        assert_eq!(found.len(), 6);
        for guesses in &found {
            assert!(guesses.as_it_must(), "{guesses:?}");
        }
        assert!(found[0].interval[1] < 2.0 * found[0].prior, "{:?}", found[0]);
        // Without noise the label is always read, and the row unless others share its leaves.
        assert!(found[4].rate > 0.5 && found[5].rate > 0.95, "{:?}", &found[4..]);
    }

    /// A fixed seed: the outcome is the same in every run. The attack comes near the claim, so that a break of it would show.
    #[test]
    fn nobody_is_found_in_a_forest_more_often_than_its_claim_allows_and_every_control_is_caught() {
        let found = audit(3.0, 1_000, &mut ChaCha20Rng::seed_from_u64(7)).unwrap();
        assert_eq!(found.len(), 4);
        for guesses in &found {
            assert!(guesses.as_it_must(), "{guesses:?}");
        }
        assert!(found[0].found > 0.4 * found[0].exact, "{:?}", found[0]);
    }
}
