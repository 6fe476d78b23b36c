//! Publishing: the signed manifest that names every artefact of a plan, sent to everyone who may use it.

use std::sync::Arc;

use tabmesh_federation::documents::Publication;
use tabmesh_federation::job::{Job, JobEvent};
use tabmesh_federation::manifest::{MANIFEST_VERSION, Manifest, PrivacyFacts, Taint};
use tabmesh_federation::plan::AdapterSpec;
use tabmesh_privacy::budget::{Delta, Epsilon, Rho};
use tabmesh_proto::message::AssignmentKind;
use tabmesh_store::Kind;

use super::release::Released;
use super::rounds::AdapterState;
use super::{assignment_id, schema_of};
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, named, stored};
use crate::plans::Submitted;
use crate::report::PUBLISHED;

/// Signs and stores the manifest, registers the adapter, tells every agent with the plan's target.
pub(super) fn run(mesh: &Arc<Mesh>, submitted: &Submitted, job: &Job) -> Result<JobEvent, CoordinatorError> {
    let plan = &submitted.plan;
    let products = job.products();
    let missing = |what: &'static str| CoordinatorError::NotFound { what, id: submitted.digest.to_string() };
    let tuned = products.tuned.ok_or_else(|| missing("tuned model of plan"))?;
    let corpus = products.corpus.ok_or_else(|| missing("corpus of plan"))?;
    let preprocessing = products.preprocessing.ok_or_else(|| missing("preprocessing of plan"))?;
    let now_ms = mesh.now_ms();
    let (mut adapter, mut forest) = (None, None);
    if let Some(state) = products.adapter {
        let state: AdapterState = mesh.get_json(stored(state), "adapter state")?;
        if matches!(plan.rounds.adapter, AdapterSpec::Forest { .. }) {
            let digest = mesh.blobs.put(&state.forest(mesh)?)?;
            mesh.register(Kind::Adapter, digest, Vec::new())?;
            forest = Some(named(digest));
        } else {
            let digest = mesh.blobs.put(&state.caught_up(job)?.artefact(&tuned.to_string())?)?;
            mesh.register(Kind::Adapter, digest, vec![stored(tuned)])?;
            adapter = Some(named(digest));
        }
    }
    let budget = plan.budget()?;
    let used = used(&budget, &Released::load(mesh, submitted, job)?, products.rounds_published);
    let figure = |error: tabmesh_privacy::budget::BudgetError| CoordinatorError::Step(error.to_string());
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        plan: submitted.digest,
        base: named(mesh.base_model()?),
        tuned,
        preprocessing,
        corpus,
        adapter,
        forest,
        schema: schema_of(mesh, plan, job.roster())?,
        created_ms: now_ms,
        taint: if mesh.tainted(job.roster())? { Taint::ReproducibleNotPrivate } else { Taint::Private },
        parents: Vec::new(),
        privacy: PrivacyFacts {
            epsilon: Epsilon::new(plan.privacy.epsilon).map_err(figure)?,
            delta: Delta::new(plan.privacy.delta).map_err(figure)?,
            rho_total: budget.total,
            rho_used: used,
            agents: u32::try_from(job.roster().len()).unwrap_or(u32::MAX),
            rounds_published: products.rounds_published,
        },
    };
    let signed = manifest
        .sign(&mesh.signing_key)
        .map_err(|error| CoordinatorError::Step(format!("the manifest can't be signed: {error}")))?;
    let digest = mesh.blobs.put(&signed.bytes)?;
    mesh.share(&digest)?;
    let always = [manifest.base, tuned, preprocessing, corpus];
    for artefact in always.into_iter().chain(adapter).chain(forest) {
        mesh.share(&stored(artefact))?;
    }
    let publication = Publication { manifest: named(digest), signature: signed.signature.to_string() };
    let document = serde_json::to_vec(&publication).map_err(CoordinatorError::stored("publication"))?;
    let receivers: Vec<_> = mesh
        .catalog
        .all()
        .into_iter()
        .filter(|(_, admitted)| admitted.schema.target().id == plan.target)
        .map(|(agent, _)| agent)
        .collect();
    let id = assignment_id(mesh, job.latest_collection())?;
    mesh.outbox.assign(&receivers, &id, AssignmentKind::Publish, &document)?;
    mesh.audit(&submitted.by, PUBLISHED, serde_json::json!({ "manifest": digest.to_string() }))?;
    Ok(JobEvent::Published { manifest: named(digest) })
}

/// What the stages and rounds with a result cost.
fn used(budget: &tabmesh_federation::plan::PlanBudget, released: &Released, rounds: u32) -> Rho {
    let add = |sum: Rho, rho: &Rho| sum.checked_add(*rho).unwrap_or(budget.total);
    let release = released.stages.iter().map(|stage| &stage.query.rho).fold(Rho::ZERO, add);
    (0..rounds).fold(release, |sum, _| add(sum, &budget.per_round))
}
