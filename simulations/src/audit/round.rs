//! A round of federated training as one agent takes part in it, and as one who knows everything published computes it.
//!
//! The agent's side is the shipped trainer on stored artefacts: base, corpus, coding. The attacker has the same artefacts, since
//! they are published, and so the clipped gradient of any row that they think of.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use rand::{CryptoRng, RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tabmesh_agent::publication::Artefacts;
use tabmesh_agent::train::Trainer;
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::aggregate::optimiser::ServerOptimiser;
use tabmesh_federation::aggregate::{Aggregate, Contributions, Rule, Updates};
use tabmesh_federation::descriptor::{RoundDescriptor, RoundInputs};
use tabmesh_federation::documents::{CorpusColumn, CorpusDocument};
use tabmesh_federation::id::{AgentId, CollectionId, Digest, PlanDigest};
use tabmesh_federation::manifest::Trust;
use tabmesh_federation::plan::Plan;
use tabmesh_privacy::budget::{Delta, Rho};
use tabmesh_privacy::mechanism::{DiscreteGaussian, Noise};
use tabmesh_store::BlobStore;
use tabmesh_tfm::adapter::{Adapter, Kind};
use tabmesh_tfm::context::Context;
use tabmesh_tfm::gradient::{Clip, UnitGroup};
use tabmesh_tfm::model::Model;
use tabmesh_tfm::table::{Coding, Preprocessing};
use tempfile::TempDir;

use super::guess::{Claim, Subject};
use super::release::DELTA;
use super::setting::{Person, TARGET, one_row_each, schema};
use crate::quickstart::deployed::BASE_MODEL;

/// What a round is to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// ε of the plan.
    pub(super) epsilon: f64,
    /// Rounds of the plan.
    pub(super) rounds: u32,
    /// Adapter as plans write it.
    pub(super) adapter: &'static str,
    /// The same as the model has it.
    pub(super) kind: Kind,
    /// Clip norm over the 95th percentile of gradient norms on the corpus; plans that say `auto` have 1.
    pub(super) clip: f64,
}

/// A round that has been announced.
pub(super) struct Round {
    folder: TempDir,
    plan: Plan,
    digest: PlanDigest,
    /// What the round was made from; later rounds of the plan differ in the adapter.
    inputs: RoundInputs,
    descriptor: RoundDescriptor,
    schema: FeatureSchema,
    coding: Preprocessing,
    context: Context,
    adapter: Adapter,
}

impl Round {
    /// Publishes the shipped base with a corpus of random people, and opens the first round.
    pub(super) fn new<R: RngCore + CryptoRng>(wanted: Wanted, rng: &mut R) -> Result<Self> {
        let Wanted { epsilon, rounds, adapter, kind, clip } = wanted;
        let text = format!(
            "kind: TabmeshPlan\nname: audit\ntarget: {TARGET}\ncohort: {{min_agents: 1}}\n\
             privacy: {{epsilon: {epsilon}, delta: {DELTA}}}\n\
             rounds: {{count: {rounds}, adapter: {adapter}, context_rows: {CONTEXT_ROWS}}}\n"
        );
        let (plan, digest) = Plan::parse(text.as_bytes(), "plan.yaml")?;
        let schema = schema()?;
        let people: Vec<Person> = (0..2 * CONTEXT_ROWS).map(|_| Person::random(rng)).collect();
        let drawn = one_row_each(&people)?;
        let document = CorpusDocument {
            plan: digest,
            columns: drawn.columns.iter().map(corpus_column).collect(),
            labels: drawn.labels.iter().map(|label| label.unwrap_or_default()).collect(),
            domains: None,
        };
        let corpus = document.batch(&schema)?;
        let coding = Preprocessing::fit(&schema, &corpus)?;
        let folder = tempfile::tempdir()?;
        let store = BlobStore::open(&folder.path().join("artefacts"))?;
        let stored = |bytes: &[u8]| Ok::<_, anyhow::Error>(Digest::from_bytes(*store.put(bytes)?.as_bytes()));
        let base = stored(BASE_MODEL)?;
        let published = stored(&serde_json::to_vec(&document)?)?;
        let preprocessing = stored(&serde_json::to_vec(&coding)?)?;

        let model = Model::from_safetensors(BASE_MODEL)?.0;
        let encoded = coding.encode(&corpus, Coding::Foreign)?;
        let (shown, held_out): (Vec<usize>, Vec<usize>) =
            (0..encoded.rows).partition(|row| *row < CONTEXT_ROWS as usize);
        let context = Context::build(&model, &encoded.take(&shown))?;
        let adapter = Adapter::initial(kind, &model, context.column_keys())?;
        let rows = context.prepare(&encoded.take(&held_out), &adapter)?;
        let units: Vec<UnitGroup> = (0..held_out.len()).map(|row| UnitGroup { rows: vec![row] }).collect();
        let norm = context.norm_quantile(&rows, &adapter, &units, CLIP_QUANTILE)?;
        let layout = adapter.layout();
        let inputs = RoundInputs {
            id: CollectionId::new(OPENED_MS, rng, None),
            index: 0,
            attempt: 1,
            base,
            context: published,
            preprocessing,
            adapter_keys: layout.keys.clone(),
            width: u32::try_from(layout.width)?,
            adapter_values: adapter.values().to_vec(),
            clip_norm: clip * norm,
            roster: BTreeSet::from([AgentId::new("spiffe://audit/agent")?]),
            opened_ms: OPENED_MS,
            noisy_total: 1_000.0,
            noisy_total_sd: 10.0,
        };
        let descriptor = RoundDescriptor::new(inputs.clone(), &plan, digest)?;
        Ok(Self { folder, plan, digest, inputs, descriptor, schema, coding, context, adapter })
    }

    /// What the round costs a unit.
    pub(super) fn claim(&self) -> Result<Claim> {
        Ok(Claim { rho: self.descriptor.rho, delta: Delta::new(DELTA)? })
    }

    /// What all rounds of the plan cost a unit.
    pub(super) fn claim_of_all(&self) -> Result<Claim> {
        let rho = self.descriptor.rho.share(u64::from(self.plan.rounds.count), 1);
        Ok(Claim { rho, delta: Delta::new(DELTA)? })
    }

    /// The noise that the round's agents add, or what a control has instead. Nothing without noise.
    pub(super) fn noise(&self, subject: Subject) -> Result<Option<DiscreteGaussian>> {
        let squared = self.descriptor.sensitivity * self.descriptor.sensitivity;
        let noise = |rho: Rho| DiscreteGaussian::from_rho(squared, rho);
        Ok(subject.spent(self.descriptor.rho).map(noise).transpose()?)
    }

    /// The round with a clip norm that no gradient comes near, and with the noise of this one.
    pub(super) fn without_clip(mut self) -> Self {
        let grid = self.descriptor.scale;
        self.descriptor.clip_norm *= NO_CLIP;
        self.descriptor.scale = grid;
        self
    }

    /// The sum that an agent with this table computes, by its own code and from its own files.
    pub(super) fn agents_sum(&self, people: &[Person]) -> Result<Vec<i64>> {
        // A plan of all units: nothing is drawn.
        self.agents_draw(people, &mut ChaCha20Rng::seed_from_u64(0))
    }

    /// The same, under a plan that samples, of the units that `draws` picks.
    fn agents_draw(&self, people: &[Person], draws: &mut ChaCha20Rng) -> Result<Vec<i64>> {
        Ok(self.trainer(people)?.clipped_sum(&self.descriptor, draws)?)
    }

    fn trainer(&self, people: &[Person]) -> Result<Trainer> {
        let key = "00".repeat(32).parse()?;
        let artefacts = Artefacts::open(self.folder.path(), key, Trust::Production)?;
        let (descriptor, rows) = (&self.descriptor, one_row_each(people)?);
        Ok(Trainer::new(&artefacts, descriptor, &self.plan, &self.schema, &rows, Coding::OwnRow)?)
    }

    /// The adapter that all rounds of the plan make of one agent's people, as a coordinator publishes it.
    ///
    /// The number of units that sums are divided by is taken to be `units`, whoever is there: by the release it is noisy.
    pub(super) fn trained<R: RngCore + CryptoRng>(
        &self,
        people: &[Person],
        units: f64,
        noise: Option<&DiscreteGaussian>,
        rng: &mut R,
    ) -> Result<Adapter> {
        let (trainer, rounds) = (self.trainer(people)?, &self.plan.rounds);
        let mut values: Vec<f64> = self.adapter.values().iter().map(|value| f64::from(*value)).collect();
        let mut optimiser = ServerOptimiser::new(rounds.optimiser, rounds.count, values.len());
        let (rule, none) = (Rule::new(rounds.aggregation, rounds.trim), BTreeMap::new());
        for index in 0..rounds.count {
            let adapter_values = values.iter().map(|value| *value as f32).collect();
            let inputs = RoundInputs { index, adapter_values, ..self.inputs.clone() };
            let descriptor = RoundDescriptor::new(inputs, &self.plan, self.digest)?;
            let sum = trainer.clipped_sum(&descriptor, rng)?;
            let seen = match noise {
                Some(noise) => noise.privatize(&sum, rng).into_inner(),
                None => sum,
            };
            let updates = Updates {
                contributions: Contributions::SumOnly(&seen),
                scale: descriptor.scale as f64,
                divisor: units,
                totals: &none,
            };
            (values, optimiser) = optimiser.step(&values, &rule.mean(&updates)?, descriptor.clip_norm)?;
        }
        let published = optimiser.averaged(&values).iter().map(|value| *value as f32).collect();
        Ok(self.adapter.with_values(published)?)
    }

    /// What the model says about each person under an adapter: the logit of their own label.
    pub(super) fn confidence(&self, people: &[Person], adapter: &Adapter) -> Result<Vec<f64>> {
        let rows = self.coding.encode(&one_row_each(people)?, Coding::Foreign)?;
        let logits = self.context.logits(&rows, Some(adapter))?;
        let sign = |person: &Person| if person.label == 1 { 1.0 } else { -1.0 };
        Ok(logits.iter().zip(people).map(|(logit, person)| logit * sign(person)).collect())
    }

    /// The clipped gradient of each row, as anybody computes it who has the published artefacts.
    pub(super) fn gradients(&self, people: &[Person]) -> Result<Vec<Vec<i64>>> {
        let rows: TypedBatch = one_row_each(people)?;
        let rows = self.context.prepare(&self.coding.encode(&rows, Coding::OwnRow)?, &self.adapter)?;
        let clip = Clip::new(self.descriptor.clip_norm, self.descriptor.scale as f64)?;
        let mut all = Vec::with_capacity(people.len());
        for chunk in self.context.row_gradients(&rows, &self.adapter)? {
            for gradient in chunk?.gradients.chunks_exact(self.adapter.dimension()) {
                let gradient: Vec<f64> = gradient.iter().map(|value| f64::from(*value)).collect();
                all.push(clip.integers(&gradient));
            }
        }
        Ok(all)
    }
}

fn corpus_column(column: &TypedColumn) -> CorpusColumn {
    match column {
        TypedColumn::Numeric(values) => {
            CorpusColumn::Numeric(values.iter().map(|v| (!v.is_nan()).then_some(*v as f32)).collect())
        }
        TypedColumn::Categorical(codes) => CorpusColumn::Codes(codes.clone()),
    }
}

/// Rows of the context; the corpus has as many again, on which the clip norm is found.
const CONTEXT_ROWS: u32 = 96;
/// Share of the corpus' gradients that are shorter than the clip norm, as a coordinator has it.
const CLIP_QUANTILE: f64 = 0.95;
/// How much longer gradients may be in the control.
const NO_CLIP: f64 = 4096.0;
/// When the round opens.
const OPENED_MS: i64 = 1_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::Rng;

    use super::*;

    /// Of a sampled round whose norm follows a quantile: the agent's sum is that of the units it drew, and its last two values
    /// count them on either side of the norm.
    #[test]
    fn a_sampled_round_sums_and_counts_the_units_that_were_drawn() {
        let mut rng = ChaCha20Rng::seed_from_u64(5);
        let wanted =
            |adapter| Wanted { epsilon: 3.0, rounds: 2, adapter, kind: Kind::FeatureTokens, clip: 0.4 };
        let people: Vec<Person> = (0..60).map(|_| Person::random(&mut rng)).collect();
        let sampled = "feature_tokens, sampling_rate: 0.4, clip_norm: {quantile: 0.9}";
        let round = Round::new(wanted(sampled), &mut rng).unwrap();
        let seen = round.agents_draw(&people, &mut ChaCha20Rng::seed_from_u64(9)).unwrap();

        // Units are drawn in the order of their keys.
        let mut order: Vec<(tabmesh_contract::batch::UnitKey, usize)> =
            one_row_each(&people).unwrap().units.into_iter().zip(0..).collect();
        order.sort_unstable();
        let mut draws = ChaCha20Rng::seed_from_u64(9);
        let drawn: Vec<usize> =
            order.into_iter().filter(|_| draws.random::<f64>() < 0.4).map(|(_, row)| row).collect();
        assert!((10..40).contains(&drawn.len()), "{}", drawn.len());
        let gradients = round.gradients(&people).unwrap();
        let mut expected = vec![0; round.adapter.dimension()];
        let mut sides = [0; 2];
        let bound = (round.descriptor.clip_norm * round.descriptor.scale as f64).floor();
        for gradient in drawn.iter().map(|row| &gradients[*row]) {
            expected.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
            // Truncation takes less than one step off each value: a clipped gradient stays near the bound.
            let norm = gradient.iter().map(|value| (*value as f64).powi(2)).sum::<f64>().sqrt();
            sides[usize::from(norm > 0.999 * bound)] += 1;
        }
        let weight = i64::try_from(round.descriptor.count_weight).unwrap();
        assert!(weight > 1_000 && sides.iter().all(|units| *units > 0), "{sides:?}");
        expected.extend(sides.map(|units: i64| units * weight));
        assert_eq!(seen, expected);
        // Other draws, other units; nobody drawn, as long a vector.
        assert_ne!(round.agents_draw(&people, &mut ChaCha20Rng::seed_from_u64(10)).unwrap(), expected);
        assert_eq!(round.agents_draw(&[], &mut draws).unwrap(), vec![0; expected.len()]);
        // All units without a rate, and no counts without a quantile.
        let whole = Round::new(wanted("feature_tokens"), &mut rng).unwrap();
        let all = whole.gradients(&people).unwrap();
        let sum = |at: usize| all.iter().map(|gradient| gradient[at]).sum::<i64>();
        let expected: Vec<i64> = (0..whole.adapter.dimension()).map(sum).collect();
        assert_eq!(whole.agents_sum(&people).unwrap(), expected);
    }
}
