//! Secure sums of a stage or a round: the roster from the catalog, the descriptor from the plan, and another attempt
//! with the agents that are left where the plan has paid for one.
//!
//! A new attempt has a new descriptor, so every agent draws fresh keys and a fresh share of the noise, and is debited
//! again for what it sends. The one before stays debited once a masked vector was asked for: such an attempt uses up one
//! of the plan's retries, an earlier end doesn't.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::json;
use tabmesh_federation::id::{AgentId, Digest as NamedDigest, PlanDigest};
use tabmesh_federation::phase::abandon::AbandonReason;
use tabmesh_federation::plan::SecureSumSpec;
use tabmesh_federation::secagg::document::{Opening, Summed};
use tabmesh_federation::secagg::roster::{Member, Roster};
use tabmesh_federation::secagg::setup::{Attempt, Subject};
use tabmesh_privacy::ledger::Purpose;
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_store::Op;

use super::{contracts, spiffe_id};
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, named};
use crate::plans::Submitted;
use crate::sums::{self, Aborted, AttemptEnd, Opened, SumEnd};

/// Stores a new sum over the cohort, `with` whatever belongs to it in the same commit.
///
/// # Errors
/// [`CoordinatorError`] if an agent isn't in the catalog, the noise can't be divided over the cohort, or it can't be
/// stored.
pub(super) fn open(
    mesh: &Mesh,
    spec: SecureSumSpec,
    subject: &Subject,
    summed: Summed,
    agents: &BTreeSet<AgentId>,
    opened_ms: i64,
    with: Vec<Op>,
) -> Result<(), CoordinatorError> {
    attempt(mesh, spec, subject, summed, agents, (1, opened_ms), with)
}

/// Drives a sum to its end, over as many attempts as its plan allows; `what` is its name for people.
///
/// # Errors
/// [`CoordinatorError`] if it isn't there, is damaged, or can't be stored. An abandoned sum is no error.
pub(super) async fn run(
    mesh: &Arc<Mesh>,
    submitted: &Submitted,
    subject: &Subject,
    (purpose, what): (Purpose, &str),
) -> Result<SumEnd, CoordinatorError> {
    loop {
        let aborted = match sums::run(mesh, subject.expected.collection).await? {
            AttemptEnd::Summed(summed) => return Ok(SumEnd::Summed(summed)),
            AttemptEnd::Abandoned(cause) => return Ok(SumEnd::Abandoned(cause)),
            AttemptEnd::Aborted(aborted) => aborted,
        };
        let is_over = || mesh.plans.get(submitted.digest).is_some_and(|(_, job)| job.is_over());
        if is_over() || !again(mesh, submitted, subject, purpose, &aborted)? {
            return Ok(SumEnd::Abandoned(AbandonReason::SecureSum { cause: aborted.cause }));
        }
        let (number, left) = (aborted.attempt + 1, aborted.left.len());
        let told = format!("{what}: attempt {number} with {left} agents, after {}", aborted.cause);
        mesh.plans.tell(submitted.digest, mesh.now_ms(), told);
        // A plan that was cancelled in between has cancelled the attempts that there were then.
        if is_over() {
            mesh.sums.cancel_all("the plan's end");
        }
    }
}

/// Opens another attempt if the plan has paid for one and enough agents are left.
fn again(
    mesh: &Mesh,
    submitted: &Submitted,
    subject: &Subject,
    purpose: Purpose,
    aborted: &Aborted,
) -> Result<bool, CoordinatorError> {
    let Some(spec) = submitted.plan.secure_sum() else { return Ok(false) };
    let used = used(mesh, submitted.digest, purpose)? + u32::from(aborted.charged());
    let least = submitted.plan.cohort.min_agents as usize;
    if aborted.attempt > spec.retries || used > spec.retries || aborted.left.len() < least {
        return Ok(false);
    }
    let summed = mesh.sums.opened(subject.expected.collection)?.opening.summed;
    let counts = Op::put(retries_key(submitted.digest, purpose), used.to_string().into_bytes());
    let at = (aborted.attempt + 1, mesh.now_ms());
    match attempt(mesh, spec, subject, summed, &aborted.left, at, vec![counts]) {
        Ok(()) => Ok(true),
        // So few agents can't divide the noise: the sum is given up, and that is no fault of this coordinator.
        Err(CoordinatorError::Sum(reason)) => {
            tracing::warn!(%reason, agents = aborted.left.len(), "no further attempt at a secure sum");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Stores an attempt over a roster.
fn attempt(
    mesh: &Mesh,
    spec: SecureSumSpec,
    subject: &Subject,
    summed: Summed,
    agents: &BTreeSet<AgentId>,
    (number, opened_ms): (u32, i64),
    with: Vec<Op>,
) -> Result<(), CoordinatorError> {
    let members = members(mesh, agents)?;
    let roster = Roster::new(members.clone()).map_err(|error| CoordinatorError::Sum(error.to_string()))?;
    let collection = subject.expected.collection;
    // A sum that can't be isn't one that was opened: described once before the audit log hears of it.
    let described = |log_head| subject.describe(spec, &roster, Attempt { number, opened_ms, log_head });
    described(NamedDigest::of(b"not yet"))?;
    let mut facts = json!({ "collection": collection.to_string(), "roster": roster.digest().to_string() });
    if number > 1 {
        facts["attempt"] = number.into();
    }
    let log_head = named(mesh.audit("coordinator", "secure_sum_opened", facts)?);
    let descriptor = String::from_utf8(described(log_head)?.to_bytes())
        .map_err(|error| CoordinatorError::Sum(error.to_string()))?;
    let opening = Opening { descriptor, summed, roster: agents.clone() };
    mesh.sums.open(collection, &Opened { opening, members }, with)
}

/// Retries that charged attempts of a plan have used up, of its release or of its rounds.
fn used(mesh: &Mesh, plan: PlanDigest, purpose: Purpose) -> Result<u32, CoordinatorError> {
    let Some(record) = mesh.records.get(&retries_key(plan, purpose))? else { return Ok(0) };
    let damaged = |error: std::num::ParseIntError| CoordinatorError::Stored {
        what: "number of retries",
        reason: error.to_string(),
    };
    String::from_utf8_lossy(&record).parse().map_err(damaged)
}

fn retries_key(plan: PlanDigest, purpose: Purpose) -> Vec<u8> {
    format!("sum-retries/{plan}/{}", purpose.label()).into_bytes()
}

/// The cohort with the keys of the catalog; the domain is the organisation that answers for an agent.
fn members(mesh: &Mesh, agents: &BTreeSet<AgentId>) -> Result<Vec<Member>, CoordinatorError> {
    let member = |(agent, admitted): (AgentId, Arc<crate::catalog::Admitted>)| {
        let organisation = spiffe_id(&agent)?.domain().unwrap_or_default().to_owned();
        Ok(Member { agent, key: VerifyingKey::from_bytes(admitted.public_key), organisation })
    };
    contracts(mesh, agents)?.into_iter().map(member).collect()
}

#[cfg(test)]
mod tests;
