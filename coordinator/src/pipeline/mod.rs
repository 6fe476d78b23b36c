//! The pipeline of one plan: asks the job what is next, does it, records what came of it.
//!
//! Everything a step needs is read from what earlier steps stored, so a restarted coordinator goes on where the
//! records end, and doing a step again after a crash is harmless.

pub(crate) mod corpus;
mod domains;
mod publish;
mod release;
pub(crate) mod rounds;
mod secure;
mod tune;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::documents::{PlanAnnouncement, PlanClosing};
use tabmesh_federation::id::{AgentId, CollectionId, PlanDigest};
use tabmesh_federation::job::{Action, Job, JobEvent};
use tabmesh_federation::phase::collect::Quorum;
use tabmesh_federation::plan::Plan;
use tabmesh_federation::release_plan::shared_schema;
use tabmesh_federation::selection::{Candidate, select};
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::{AssignmentKind, Id};

use crate::catalog::Admitted;
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, locked};
use crate::plans::Submitted;
use crate::witness;

/// Drives a plan to its end.
pub(crate) async fn drive(mesh: Arc<Mesh>, digest: PlanDigest) {
    while let Some((submitted, job)) = mesh.plans.get(digest) {
        let Some(action) = job.next() else { break };
        let collected = action.collection();
        let event = match perform(&mesh, &submitted, &job, action).await {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(plan = %digest, %error, "a step failed");
                JobEvent::Failed { what: error.to_string() }
            }
        };
        // A cancelled job has ended meanwhile; what the step brought is then not recorded.
        if let Err(error) = mesh.plans.apply(digest, event, mesh.now_ms()) {
            tracing::warn!(plan = %digest, %error, "a step's result was not recorded");
            if mesh.plans.get(digest).is_none_or(|(_, job)| job.is_over()) {
                break;
            }
            let failed = JobEvent::Failed { what: error.to_string() };
            if mesh.plans.apply(digest, failed, mesh.now_ms()).is_err() {
                break;
            }
        }
        // What came of the vectors is recorded; after a crash before this the next start removes them.
        if let Some(collection) = collected
            && let Err(error) = mesh.collections.discard(collection)
        {
            tracing::warn!(%collection, %error, "vectors of an ended collection were not removed");
        }
        if let Some(collection) = collected
            && let Err(error) = mesh.sums.discard(collection)
        {
            tracing::warn!(%collection, %error, "answers of an ended sum were not removed");
        }
    }
    match close(&mesh, digest) {
        Ok(Some(Closing { id, agents, patience })) => {
            if let Err(error) = witness::after_plan(&mesh, &id, agents, patience).await {
                tracing::error!(plan = %digest, %error, "agents could not be asked to witness the audit log");
            }
        }
        Ok(None) => {}
        Err(error) => {
            tracing::error!(plan = %digest, %error, "agents could not be told that the plan is over");
        }
    }
}

/// Stops a plan on an operator's word.
///
/// # Errors
/// [`CoordinatorError`] if the end can't be recorded.
pub(crate) fn cancel(mesh: &Mesh, digest: PlanDigest, by: &str) -> Result<(), CoordinatorError> {
    mesh.plans.apply(digest, JobEvent::Cancelled { by: by.to_owned() }, mesh.now_ms())?;
    mesh.collections.cancel_all(by)?;
    mesh.sums.cancel_all(by);
    mesh.stop_tuning();
    Ok(())
}

/// Agents whose contracts fit a plan: they promise its target and let their product contribute.
pub(crate) fn candidates(mesh: &Mesh, plan: &Plan) -> Vec<(SpiffeId, Arc<Admitted>)> {
    let fits = |admitted: &Admitted| admitted.schema.target().id == plan.target && admitted.contributes();
    mesh.catalog.all().into_iter().filter(|(_, admitted)| fits(admitted)).collect()
}

async fn perform(
    mesh: &Arc<Mesh>,
    submitted: &Arc<Submitted>,
    job: &Job,
    action: Action,
) -> Result<JobEvent, CoordinatorError> {
    match action {
        Action::SelectCohort => select_cohort(mesh, submitted).await,
        Action::OpenStage { stage } => release::open(mesh, submitted, job, stage),
        Action::RunStage { stage, collection } => release::run(mesh, submitted, job, stage, collection).await,
        Action::BuildCorpus => corpus::build(mesh, submitted, job).await,
        Action::Pretrain => tune::run(mesh, submitted, job).await,
        Action::OpenRound { index } => rounds::open(mesh, submitted, job, index).await,
        Action::RunRound { index, round } => rounds::run(mesh, submitted, job, index, round).await,
        Action::Publish => publish::run(mesh, submitted, job),
    }
}

/// Announces the plan, and takes those that reserved their budget into the cohort.
async fn select_cohort(mesh: &Arc<Mesh>, submitted: &Submitted) -> Result<JobEvent, CoordinatorError> {
    let plan = &submitted.plan;
    let members = candidates(mesh, plan);
    let offered: Vec<Candidate> = members
        .iter()
        .filter_map(|(agent, admitted)| {
            // The domain is a tag of its own.
            let mut tags = admitted.contract.tags.clone();
            tags.insert(admitted.contract.domain.clone());
            Some(Candidate { agent: agent_id(agent).ok()?, tags })
        })
        .collect();
    let chosen = select(&offered, &plan.cohort, &submitted.digest)?;
    let schema = schema_of(mesh, plan, &chosen)?;
    let announcement = PlanAnnouncement {
        plan: String::from_utf8_lossy(&submitted.yaml).into_owned(),
        digest: submitted.digest,
        schema,
        cohort: u32::try_from(chosen.len()).unwrap_or(u32::MAX),
        approvals: vec![submitted.by.clone()],
    };
    let document = serde_json::to_vec(&announcement).map_err(CoordinatorError::stored("announcement"))?;
    let peers = spiffe_ids(&chosen)?;
    let id = assignment_id(mesh, None)?;
    mesh.answers.expect(&id);
    mesh.outbox.assign(&peers, &id, AssignmentKind::Plan, &document)?;
    let patience = Duration::from_secs(u64::from(plan.release.deadline_s));
    let answers = mesh.answers.wait(&id, peers.len(), patience).await;
    mesh.outbox.withdraw(&peers, &id)?;
    let mut roster = BTreeSet::new();
    for (agent, refusal) in answers {
        match refusal {
            None => {
                roster.insert(agent_id(&agent)?);
            }
            Some(code) => {
                mesh.plans.tell(submitted.digest, mesh.now_ms(), format!("{agent} refuses: {code}"))
            }
        }
    }
    if roster.len() < plan.cohort.min_agents as usize {
        let what = format!(
            "{} of {} agents took the plan on, it needs {}",
            roster.len(),
            peers.len(),
            plan.cohort.min_agents
        );
        return Err(CoordinatorError::Step(what));
    }
    Ok(JobEvent::Started { roster })
}

/// A closing on its way.
struct Closing {
    id: Id,
    agents: usize,
    /// How long to wait for their answers.
    patience: Duration,
}

/// Tells the agents of a plan that it is over, so that they refund and state their ledgers.
fn close(mesh: &Mesh, digest: PlanDigest) -> Result<Option<Closing>, CoordinatorError> {
    let Some((submitted, job)) = mesh.plans.get(digest) else { return Ok(None) };
    let mut peers: BTreeSet<SpiffeId> =
        candidates(mesh, &submitted.plan).into_iter().map(|(id, _)| id).collect();
    peers.extend(spiffe_ids(job.roster())?);
    let document =
        serde_json::to_vec(&PlanClosing { plan: digest }).map_err(CoordinatorError::stored("closing"))?;
    let id = assignment_id(mesh, job.latest_collection())?;
    let peers: Vec<SpiffeId> = peers.into_iter().collect();
    mesh.answers.expect(&id);
    mesh.outbox.assign(&peers, &id, AssignmentKind::ClosePlan, &document)?;
    let patience = Duration::from_secs(u64::from(submitted.plan.release.deadline_s));
    Ok(Some(Closing { id, agents: peers.len(), patience }))
}

/// The schema that the agents of a cohort share.
pub(crate) fn schema_of(
    mesh: &Mesh,
    plan: &Plan,
    roster: &BTreeSet<AgentId>,
) -> Result<FeatureSchema, CoordinatorError> {
    let schemas =
        contracts(mesh, roster)?.into_iter().map(|(id, admitted)| (id, admitted.schema.clone())).collect();
    Ok(shared_schema(&schemas, &plan.target)?)
}

/// The contracts of a cohort.
pub(crate) fn contracts(
    mesh: &Mesh,
    roster: &BTreeSet<AgentId>,
) -> Result<Vec<(AgentId, Arc<Admitted>)>, CoordinatorError> {
    let find = |agent: &AgentId| {
        let missing = || CoordinatorError::NotFound { what: "admitted contract of", id: agent.to_string() };
        let id = spiffe_id(agent)?;
        Ok((agent.clone(), mesh.catalog.get(&id).ok_or_else(missing)?))
    };
    roster.iter().map(find).collect()
}

/// How many vectors a collection waits for.
pub(crate) fn quorum(mesh: &Mesh, plan: &Plan) -> Quorum {
    // In development runs figures must not depend on which agent was late.
    if mesh.waits_for_all { Quorum::Everyone } else { Quorum::AtLeast { updates: plan.cohort.min_agents } }
}

/// A new id above an earlier one.
pub(crate) fn collection_id(mesh: &Mesh, after: Option<CollectionId>) -> CollectionId {
    CollectionId::new(mesh.now_ms(), &mut **locked(&mesh.ids), after)
}

/// A new assignment id above an earlier one.
pub(crate) fn assignment_id(mesh: &Mesh, after: Option<CollectionId>) -> Result<Id, CoordinatorError> {
    Ok(collection_id(mesh, after).to_string().parse()?)
}

/// The federation's name of an agent.
pub(crate) fn agent_id(agent: &SpiffeId) -> Result<AgentId, CoordinatorError> {
    AgentId::new(agent.to_string()).map_err(|error| CoordinatorError::Step(error.to_string()))
}

/// The identity behind an agent's name.
pub(crate) fn spiffe_id(agent: &AgentId) -> Result<SpiffeId, CoordinatorError> {
    agent.as_str().parse().map_err(|_| CoordinatorError::Step(format!("{agent} is no SPIFFE id")))
}

/// The identities of a roster, in its order.
pub(crate) fn spiffe_ids(roster: &BTreeSet<AgentId>) -> Result<Vec<SpiffeId>, CoordinatorError> {
    roster.iter().map(spiffe_id).collect()
}
