//! Federated rounds: descriptor out, noised gradients in, one server step, durable at each turn.

mod clip;
mod forest;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tabmesh_federation::adaptive_clip::{AdaptiveClip, SMALLEST_NORM};
use tabmesh_federation::aggregate::optimiser::ServerOptimiser;
use tabmesh_federation::aggregate::{Aggregate, Contributions, Rule, Updates};
use tabmesh_federation::descriptor::{MAX_ADAPTER_VALUES, RoundDescriptor, RoundInputs};
use tabmesh_federation::id::{AgentId, Digest as NamedDigest, PlanDigest, RoundId};
use tabmesh_federation::job::{Job, JobEvent};
use tabmesh_federation::packed;
use tabmesh_federation::phase::abandon::AbandonReason;
use tabmesh_federation::plan::{AdapterSpec, ClipNorm, Plan, SecureSumSpec};
use tabmesh_federation::round::{Phase, Round, RoundEvent};
use tabmesh_federation::secagg::document;
use tabmesh_federation::secagg::setup::Subject;
use tabmesh_privacy::ledger::Purpose;
use tabmesh_proto::message::AssignmentKind;
use tabmesh_store::{Digest, Op};
use tabmesh_tfm::adapter::{Adapter, Kind, Layout};
use tabmesh_tfm::context::Context;
use tabmesh_tfm::gradient::UnitGroup;
use tabmesh_tfm::model::Model;
use tabmesh_tfm::model::config::ModelConfig;

use super::release::Released;
use super::{collection_id, corpus, quorum, secure, spiffe_ids};
use crate::collections::Open;
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, locked, named, stored};
use crate::plans::Submitted;
use crate::sums::{SumEnd, Summed};

/// The adapter between rounds: kind, keys, current iterate, optimiser, clip norm.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct AdapterState {
    /// States from before there was a choice have the default kind; so have those of a forest, to which it means nothing.
    #[serde(default)]
    kind: Kind,
    /// A forest's trees, whose leaf values these are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trees: Option<NamedDigest>,
    pub(crate) keys: Vec<String>,
    pub(crate) width: usize,
    #[serde(with = "packed")]
    pub(crate) values: Vec<f64>,
    pub(crate) clip_norm: f64,
    optimiser: ServerOptimiser,
}

impl AdapterState {
    /// An adapter before the first round, at values that leave the model as it is.
    pub(crate) fn initial(layout: Layout, values: &[f32], clip_norm: f64, plan: &Plan) -> Self {
        let Layout { kind, keys, width } = layout;
        let optimiser = ServerOptimiser::new(plan.rounds.optimiser, plan.rounds.count, values.len());
        let values = values.iter().map(|v| f64::from(*v)).collect();
        Self { kind, trees: None, keys, width, values, clip_norm, optimiser }
    }

    /// The forest at its leaf values, as published.
    pub(super) fn forest(&self, mesh: &Mesh) -> Result<Vec<u8>, CoordinatorError> {
        forest::artefact(mesh, self)
    }

    /// The state after the abandoned rounds too: the schedule goes on, the iterate stays.
    pub(super) fn caught_up(mut self, job: &Job) -> Result<Self, CoordinatorError> {
        let ended = job.products().rounds_published + job.products().rounds_abandoned;
        while self.optimiser.done() < ended {
            let skipped = self.optimiser.skip(&self.values);
            self.optimiser = skipped.map_err(|error| CoordinatorError::Step(error.to_string()))?;
        }
        Ok(self)
    }

    /// The adapter as published: the mean of the last iterates.
    pub(super) fn artefact(&self, base: &str) -> Result<Vec<u8>, CoordinatorError> {
        let values: Vec<f32> = self.optimiser.averaged(&self.values).iter().map(|v| *v as f32).collect();
        let layout = Layout { kind: self.kind, keys: self.keys.clone(), width: self.width };
        Ok(layout.to_safetensors(&values, base)?)
    }
}

/// Stores a new round, not yet announced.
pub(super) async fn open(
    mesh: &Arc<Mesh>,
    submitted: &Arc<Submitted>,
    job: &Job,
    index: u32,
) -> Result<JobEvent, CoordinatorError> {
    let state = state(mesh, submitted, job).await?;
    let products = job.products();
    let missing = |what: &'static str| CoordinatorError::NotFound { what, id: submitted.digest.to_string() };
    let (noisy_total, noisy_total_sd) = Released::load(mesh, submitted, job)?.total()?;
    let inputs = RoundInputs {
        id: collection_id(mesh, job.latest_collection()),
        index,
        attempt: 1,
        base: products.tuned.ok_or_else(|| missing("tuned model of plan"))?,
        context: state.trees.or(products.corpus).ok_or_else(|| missing("corpus of plan"))?,
        preprocessing: products.preprocessing.ok_or_else(|| missing("preprocessing of plan"))?,
        adapter_keys: state.keys.clone(),
        width: u32::try_from(state.width).unwrap_or(u32::MAX),
        adapter_values: state.values.iter().map(|v| *v as f32).collect(),
        clip_norm: state.clip_norm,
        roster: job.roster().clone(),
        opened_ms: mesh.now_ms(),
        noisy_total,
        noisy_total_sd,
    };
    let (plan, digest) = (&submitted.plan, submitted.digest);
    let round = match plan.secure_sum() {
        None => announce(mesh, inputs, plan, digest)?,
        Some(spec) => announce_sum(mesh, inputs, plan, digest, spec)?,
    };
    Ok(JobEvent::RoundOpened { index, round })
}

/// Stores a round's descriptor and opens its collection.
pub(crate) fn announce(
    mesh: &Mesh,
    inputs: RoundInputs,
    plan: &Plan,
    digest: PlanDigest,
) -> Result<RoundId, CoordinatorError> {
    let (id, index) = (inputs.id, inputs.index);
    let descriptor = RoundDescriptor::new(inputs, plan, digest)?;
    let stored = mesh.blobs.put(&descriptor.to_bytes())?;
    let names_it = Op::put(descriptor_key(id), stored.to_string().into_bytes());
    let announcement = descriptor.announcement(named(stored), quorum(mesh, plan), plan)?;
    let round = Round::new(digest, index, announcement);
    mesh.collections.open(id, Open::Round(Box::new(round)), vec![names_it])?;
    Ok(id)
}

/// Stores a round's descriptor and opens its secure sum.
fn announce_sum(
    mesh: &Mesh,
    inputs: RoundInputs,
    plan: &Plan,
    digest: PlanDigest,
    spec: SecureSumSpec,
) -> Result<RoundId, CoordinatorError> {
    let id = inputs.id;
    let descriptor = RoundDescriptor::new(inputs, plan, digest)?;
    let bytes = descriptor.to_bytes();
    let stored = mesh.blobs.put(&bytes)?;
    let names_it = Op::put(descriptor_key(id), stored.to_string().into_bytes());
    let subject = Subject::round(&descriptor, named(stored), plan.rounds.deadline_s);
    let text = String::from_utf8(bytes).map_err(|error| CoordinatorError::Step(error.to_string()))?;
    let summed = document::Summed::Round(text);
    secure::open(mesh, spec, &subject, summed, &descriptor.roster, descriptor.opened_ms, vec![names_it])?;
    Ok(id)
}

/// Announces a round, waits for the agents, takes the server's step.
pub(super) async fn run(
    mesh: &Arc<Mesh>,
    submitted: &Arc<Submitted>,
    job: &Job,
    index: u32,
    round: RoundId,
) -> Result<JobEvent, CoordinatorError> {
    if submitted.plan.secure_sum().is_some() {
        return run_sum(mesh, submitted, job, index, round).await;
    }
    mesh.collections.resume(round)?;
    let descriptor = collect(mesh, round, job.roster()).await?;
    let before = state(mesh, submitted, job).await?;
    // The divisor counts those whose updates are in, by their noisy totals of the release.
    let totals = released_totals(mesh, submitted, job)?;
    let event = match finish(mesh, &submitted.plan, totals, &descriptor, &before, round) {
        Ok(adapter) => JobEvent::RoundPublished { index, adapter },
        Err(RoundEnd::Abandoned(cause)) => JobEvent::RoundAbandoned { index, cause },
        Err(RoundEnd::Failed(error)) => return Err(error),
    };
    mesh.collections.close(round);
    Ok(event)
}

/// Runs a round's secure sum and takes the server's step on what comes of it.
async fn run_sum(
    mesh: &Arc<Mesh>,
    submitted: &Arc<Submitted>,
    job: &Job,
    index: u32,
    round: RoundId,
) -> Result<JobEvent, CoordinatorError> {
    let (descriptor, bytes) = descriptor_of(mesh, round)?;
    let subject = Subject::round(&descriptor, NamedDigest::of(&bytes), submitted.plan.rounds.deadline_s);
    let what = format!("round {}", index + 1);
    let summed = match secure::run(mesh, submitted, &subject, (Purpose::Round, &what)).await? {
        SumEnd::Summed(summed) => summed,
        SumEnd::Abandoned(cause) => return Ok(JobEvent::RoundAbandoned { index, cause }),
    };
    let before = state(mesh, submitted, job).await?;
    let Summed { values, survivors, .. } = &summed;
    let divisor = divisor_of(survivors, &released_totals(mesh, submitted, job)?, &descriptor);
    let none = BTreeMap::new();
    let updates = Updates {
        contributions: Contributions::SumOnly(values),
        scale: descriptor.scale as f64,
        divisor,
        totals: &none,
    };
    let result = step(mesh, &submitted.plan, &updates, survivors.len(), &descriptor, &before)?;
    Ok(JobEvent::RoundPublished { index, adapter: result })
}

/// Noisy number of units of those who are in a sum: of each, where the release has it, or their part of all.
fn divisor_of(
    survivors: &BTreeSet<AgentId>,
    totals: &BTreeMap<AgentId, f64>,
    descriptor: &RoundDescriptor,
) -> f64 {
    let own: Vec<f64> = survivors.iter().filter_map(|agent| totals.get(agent).copied()).collect();
    if own.len() == survivors.len() {
        return own.iter().sum::<f64>().max(1.0);
    }
    let part = survivors.len() as f64 / descriptor.roster.len().max(1) as f64;
    (descriptor.divisor as f64 * part).max(1.0)
}

/// The stored descriptor of a round, and its bytes.
fn descriptor_of(mesh: &Mesh, round: RoundId) -> Result<(RoundDescriptor, Vec<u8>), CoordinatorError> {
    let record = mesh.records.get(&descriptor_key(round))?.unwrap_or_default();
    let digest: Digest = String::from_utf8_lossy(&record).parse()?;
    let bytes = mesh.blobs.get(&digest)?;
    Ok((RoundDescriptor::from_bytes(&bytes)?, bytes))
}

/// Sends a round's descriptor to its roster and waits until its collection is settled.
pub(crate) async fn collect(
    mesh: &Mesh,
    round: RoundId,
    roster: &BTreeSet<AgentId>,
) -> Result<RoundDescriptor, CoordinatorError> {
    let (descriptor, bytes) = descriptor_of(mesh, round)?;
    let peers = spiffe_ids(roster)?;
    let id = round.to_string().parse()?;
    mesh.collections.apply(round, [RoundEvent::Opened])?;
    mesh.outbox.assign(&peers, &id, AssignmentKind::Round, &bytes)?;
    mesh.collections.settled(round).await?;
    mesh.outbox.withdraw(&peers, &id)?;
    Ok(descriptor)
}

/// Why a round has no result.
pub(crate) enum RoundEnd {
    /// It ended without enough updates, or by word.
    Abandoned(AbandonReason),
    /// Something broke here.
    Failed(CoordinatorError),
}

impl<E: Into<CoordinatorError>> From<E> for RoundEnd {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Aggregates what was collected and takes the server's step; gives the digest of the adapter's new state.
pub(crate) fn finish(
    mesh: &Mesh,
    plan: &Plan,
    totals: BTreeMap<AgentId, f64>,
    descriptor: &RoundDescriptor,
    before: &AdapterState,
    id: RoundId,
) -> Result<NamedDigest, RoundEnd> {
    let round = mesh.collections.apply(id, [RoundEvent::DeadlineReached])?;
    let collection = match round.phase() {
        Phase::Aggregate(aggregating) => &aggregating.collection,
        Phase::Publish(publishing) => {
            let result = publishing.result;
            mesh.collections.apply(id, [RoundEvent::Published { result }])?;
            return Ok(result);
        }
        Phase::Published { end, .. } => return Ok(end.result),
        Phase::Abandoned { end, .. } => return Err(RoundEnd::Abandoned(end.cause.clone())),
        Phase::Open(_) | Phase::Collect(_) => {
            let what = "the round ended before it was collected".to_owned();
            return Err(RoundEnd::Abandoned(AbandonReason::Failed { what }));
        }
    };
    let totals: BTreeMap<AgentId, f64> =
        totals.into_iter().filter(|(agent, _)| collection.values().contains_key(agent)).collect();
    let divisor = totals.values().sum::<f64>().max(1.0);
    let updates = Updates {
        contributions: Contributions::Separate(collection.values()),
        scale: descriptor.scale as f64,
        divisor,
        totals: &totals,
    };
    let result = step(mesh, plan, &updates, collection.values().len(), descriptor, before)?;
    mesh.collections.apply(id, [RoundEvent::Aggregated { result }, RoundEvent::Published { result }])?;
    Ok(result)
}

/// Turns the updates of so many agents into a gradient and takes the server's step; gives the digest of the adapter's new state.
fn step(
    mesh: &Mesh,
    plan: &Plan,
    updates: &Updates<'_>,
    agents: usize,
    descriptor: &RoundDescriptor,
    before: &AdapterState,
) -> Result<NamedDigest, CoordinatorError> {
    let failed = |error: String| CoordinatorError::Step(error);
    let rule = Rule::new(plan.rounds.aggregation, plan.rounds.trim);
    let mut gradient = rule.mean(updates).map_err(|error| failed(error.to_string()))?;
    if descriptor.leaf_sums > 0 {
        let values = forest::values(&gradient, updates.divisor, agents, descriptor, before)?;
        return kept(mesh, AdapterState { values, ..before.clone() });
    }
    let mut clip_norm = before.clip_norm;
    if let (ClipNorm::Adaptive(clip), true) = (plan.rounds.clip_norm, descriptor.count_weight > 0) {
        // The last values are no gradient: noisy numbers of units, over one divisor.
        let (beyond, within) = (gradient.pop().unwrap_or(f64::NAN), gradient.pop().unwrap_or(f64::NAN));
        clip_norm = clip.next(before.clip_norm, within, beyond);
        tracing::info!(round = descriptor.index + 1, clip_norm, "the clip norm follows its quantile");
    }
    let (values, optimiser) = before
        .optimiser
        .step(&before.values, &gradient, descriptor.clip_norm)
        .map_err(|error| failed(error.to_string()))?;
    kept(mesh, AdapterState { values, optimiser, clip_norm, ..before.clone() })
}

/// Stores a state, and keeps it at hand for the next round.
fn kept(mesh: &Mesh, after: AdapterState) -> Result<NamedDigest, CoordinatorError> {
    let digest = mesh.put_json(&after)?;
    mesh.adapters.keep(digest, after);
    Ok(named(digest))
}

/// The adapter state of the last round that ended here, so that the next one needn't read it back.
#[derive(Default)]
pub(crate) struct Adapters(Mutex<Option<(Digest, AdapterState)>>);

impl Adapters {
    fn keep(&self, digest: Digest, state: AdapterState) {
        *locked(&self.0) = Some((digest, state));
    }

    fn get(&self, digest: Digest) -> Option<AdapterState> {
        locked(&self.0).as_ref().filter(|(kept, _)| *kept == digest).map(|(_, state)| state.clone())
    }
}

/// A stored adapter state.
pub(crate) fn read(mesh: &Mesh, digest: Digest) -> Result<AdapterState, CoordinatorError> {
    match mesh.adapters.get(digest) {
        Some(state) => Ok(state),
        None => mesh.get_json(digest, "adapter state"),
    }
}

/// The adapter after the last published round, or the initial one before the first.
async fn state(
    mesh: &Arc<Mesh>,
    submitted: &Arc<Submitted>,
    job: &Job,
) -> Result<AdapterState, CoordinatorError> {
    if let Some(digest) = job.products().adapter {
        return read(mesh, stored(digest))?.caught_up(job);
    }
    let key = format!("adapter/{}", submitted.digest).into_bytes();
    if let Some(record) = mesh.records.get(&key)? {
        let state: AdapterState =
            mesh.get_json(String::from_utf8_lossy(&record).parse()?, "adapter state")?;
        return state.caught_up(job);
    }
    let work = {
        let (mesh, submitted, job) = (Arc::clone(mesh), Arc::clone(submitted), job.clone());
        move || initial(&mesh, &submitted, &job)
    };
    let joined = tokio::task::spawn_blocking(work).await;
    let state =
        joined.map_err(|error| CoordinatorError::Step(format!("clip search ended early: {error}")))??;
    let digest = mesh.put_json(&state)?;
    mesh.records.put(&key, digest.to_string().as_bytes())?;
    Ok(state)
}

/// The plan's adapter as it starts, with the clip norm of the plan or the one that gradients of corpus rows ask for.
fn initial(mesh: &Mesh, submitted: &Submitted, job: &Job) -> Result<AdapterState, CoordinatorError> {
    let rounds = &submitted.plan.rounds;
    let Some(kind) = kind_of(rounds.adapter) else { return forest::initial(mesh, submitted, job) };
    let tuned = job.products().tuned.ok_or_else(|| CoordinatorError::Step("no tuned model".to_owned()))?;
    let (model, _) = Model::from_safetensors(&mesh.blobs.get(&stored(tuned))?)?;
    let encoded = corpus::encoded(mesh, submitted, job)?;
    let adapter = Adapter::initial(kind, &model, &encoded.column_keys)?;
    let clip_norm = match rounds.clip_norm {
        ClipNorm::Fixed(norm) | ClipNorm::Adaptive(AdaptiveClip { initial: Some(norm), .. }) => norm,
        ClipNorm::Auto(_) | ClipNorm::Adaptive(_) => {
            let context_rows = (rounds.context_rows as usize).min(encoded.rows / 2);
            let context = Context::build(&model, &encoded.take(&(0..context_rows).collect::<Vec<_>>()))?;
            let queries: Vec<usize> = (context_rows..encoded.rows).take(CLIP_ROWS).collect();
            let queried = encoded.take(&queries);
            let prepared = context.prepare(&queried, &adapter)?;
            let units: Vec<UnitGroup> = (0..queries.len()).map(|row| UnitGroup { rows: vec![row] }).collect();
            let norms = context.norms(&prepared, &adapter, &units)?;
            let norm = match rounds.clip_norm {
                ClipNorm::Adaptive(follows) => clip::quantile(norms, follows.quantile),
                ClipNorm::Fixed(_) | ClipNorm::Auto(_) => clip::balanced(&norms, &queried.labels),
            };
            norm.max(SMALLEST_NORM)
        }
    };
    Ok(AdapterState::initial(adapter.layout().clone(), adapter.values(), clip_norm, &submitted.plan))
}

/// The model's name for what a plan trains; none for a forest, which stands beside the model.
fn kind_of(spec: AdapterSpec) -> Option<Kind> {
    Some(match spec {
        AdapterSpec::FeatureTokens => Kind::FeatureTokens,
        AdapterSpec::Head => Kind::Head,
        AdapterSpec::Lora { rank } => Kind::Lora { rank: rank as usize },
        AdapterSpec::FrozenLora { rank, seed } => Kind::FrozenLora { rank: rank as usize, seed },
        AdapterSpec::Core { rank } => Kind::Core { rank: rank as usize },
        AdapterSpec::Forest { .. } => return None,
    })
}

/// Refuses an adapter that the base has no room for, or whose values don't fit into a round.
pub(crate) fn check_adapter(mesh: &Mesh, adapter: AdapterSpec) -> Result<(), CoordinatorError> {
    // Feature tokens fit every base; how many there are shows when the columns are known.
    if adapter == AdapterSpec::FeatureTokens {
        return Ok(());
    }
    let (base, _) = Model::from_safetensors(&mesh.blobs.get(&mesh.base_model()?)?)?;
    fits(adapter, base.config()).map_err(|reason| CoordinatorError::Adapter { adapter, reason })
}

fn fits(adapter: AdapterSpec, config: &ModelConfig) -> Result<(), String> {
    let Some(kind) = kind_of(adapter) else { return Ok(()) };
    let layout = Layout::of(kind, config, &[]).map_err(|error| error.to_string())?;
    let got = layout.dimension();
    if got <= MAX_ADAPTER_VALUES {
        Ok(())
    } else {
        Err(format!("it has {got} values there, a round has at most {MAX_ADAPTER_VALUES}"))
    }
}

/// Noisy number of units of each agent that take part in a round, from the label counts of stage 1 and the plan's sampling rate.
fn released_totals(
    mesh: &Mesh,
    submitted: &Submitted,
    job: &Job,
) -> Result<BTreeMap<AgentId, f64>, CoordinatorError> {
    let released = Released::load(mesh, submitted, job)?;
    let name = |(agent, total): (&String, &f64)| {
        let agent = AgentId::new(agent.clone()).map_err(|error| CoordinatorError::Step(error.to_string()))?;
        Ok((agent, (total * submitted.plan.rounds.sampling_rate).max(1.0)))
    };
    released.stage(1)?.totals.iter().map(name).collect()
}

fn descriptor_key(id: RoundId) -> Vec<u8> {
    format!("descriptor/{id}").into_bytes()
}

/// Corpus rows whose gradients the automatic clip norm is taken from.
const CLIP_ROWS: usize = 512;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_mesh::TestMesh;

    #[test]
    fn adapters_without_room_are_refused_by_name() {
        let nano = ModelConfig::nano();
        for adapter in [
            AdapterSpec::Head,
            AdapterSpec::Lora { rank: 64 },
            AdapterSpec::FrozenLora { rank: 64, seed: 1 },
            AdapterSpec::Core { rank: 64 },
        ] {
            assert_eq!(fits(adapter, &nano), Ok(()), "{adapter}");
        }
        // 12 blocks, two factors, rows of 512: rank 10 has 122,880 values and rank 11 has 135,168.
        let published = ModelConfig::published();
        assert_eq!(fits(AdapterSpec::Lora { rank: 10 }, &published), Ok(()));
        let refused = fits(AdapterSpec::Lora { rank: 11 }, &published).unwrap_err();
        assert!(refused.contains("135168 values"), "{refused}");
        let refused = fits(AdapterSpec::Core { rank: 17 }, &ModelConfig::tiny()).unwrap_err();
        assert!(refused.contains("17 with rows of width 16"), "{refused}");
    }

    /// States stored before plans could choose hold feature tokens.
    #[test]
    fn states_without_a_kind_hold_feature_tokens() {
        let (plan, _) = Plan::parse(b"kind: TabmeshPlan\nname: p\ntarget: a.y\n", "p").unwrap();
        let layout = Layout { kind: Kind::Lora { rank: 1 }, keys: vec!["icl.0.up".to_owned()], width: 2 };
        let state = AdapterState::initial(layout, &[0.5, 0.0], 1.0, &plan);
        let mut stored = serde_json::to_value(&state).unwrap();
        let read: AdapterState = serde_json::from_value(stored.clone()).unwrap();
        assert_eq!((read.kind, read.values), (state.kind, vec![0.5, 0.0]));
        stored.as_object_mut().unwrap().remove("kind");
        let read: AdapterState = serde_json::from_value(stored).unwrap();
        assert_eq!(read.kind, Kind::FeatureTokens);
    }

    /// The counts at the vector's end move the norm and never reach the adapter. They are of 400 units, each with several of the
    /// 1000 rows that the divisor counts.
    #[test]
    fn the_counts_of_units_within_and_beyond_move_the_norm_and_no_value() {
        let test = TestMesh::new(0);
        let parsed = |clip: &str| {
            let text = format!(
                "kind: TabmeshPlan\nname: p\ntarget: a.y\nrounds: {{adapter: feature_tokens, clip_norm: {clip}}}\nprivacy: {{epsilon: 8}}\n"
            );
            Plan::parse(text.as_bytes(), "p").unwrap()
        };
        let agents: BTreeSet<AgentId> = ["a", "b", "c"].map(|name| AgentId::new(name).unwrap()).into();
        let stepped = |clip: &str, share: f64| {
            let (plan, digest) = parsed(clip);
            let layout = Layout { kind: Kind::FeatureTokens, keys: vec!["x".to_owned()], width: 2 };
            let before = AdapterState::initial(layout, &[0.0, 0.0], 2.0, &plan);
            let inputs = RoundInputs {
                id: collection_id(&test.mesh, None),
                index: 0,
                attempt: 1,
                base: NamedDigest::of(b"base"),
                context: NamedDigest::of(b"context"),
                preprocessing: NamedDigest::of(b"bins"),
                adapter_keys: before.keys.clone(),
                width: 2,
                adapter_values: vec![0.0; 2],
                clip_norm: before.clip_norm,
                roster: agents.clone(),
                opened_ms: 1,
                noisy_total: 1_000.0,
                noisy_total_sd: 0.0,
            };
            let descriptor = RoundDescriptor::new(inputs, &plan, digest).unwrap();
            // A mean gradient of (-0.5, 0.25) over 1000 units, of which a share was within the norm.
            let unit = |mean: f64| (1_000.0 * mean * descriptor.scale as f64) as i64;
            let mut sum = vec![unit(-0.5), unit(0.25)];
            if descriptor.count_weight > 0 {
                sum.extend(
                    [share, 1.0 - share].map(|part| (400.0 * part * descriptor.count_weight as f64) as i64),
                );
            }
            assert_eq!(sum.len(), descriptor.len());
            let none = BTreeMap::new();
            let contributions = Contributions::SumOnly(&sum);
            let scale = descriptor.scale as f64;
            let updates = Updates { contributions, scale, divisor: 1_000.0, totals: &none };
            let digest = step(&test.mesh, &plan, &updates, 3, &descriptor, &before).unwrap();
            read(&test.mesh, stored(digest)).unwrap()
        };
        let fixed = stepped("2", 0.0);
        assert!(fixed.values[0] > 0.0 && fixed.values[1] < 0.0);
        assert!((fixed.clip_norm - 2.0).abs() < f64::EPSILON);
        for (share, expected) in [(0.9, 2.0), (1.0, 2.0 * (-0.02_f64).exp()), (0.0, 2.0 * 0.18_f64.exp())] {
            let after = stepped("{quantile: 0.9, initial: 2}", share);
            assert_eq!(after.values, fixed.values, "share {share}");
            assert!((after.clip_norm - expected).abs() < 1e-3, "share {share}: {}", after.clip_norm);
        }
    }
}
