//! Opening a secure sum for a stage or a round: the roster from the catalog, the descriptor from the plan.

use std::collections::BTreeSet;

use serde_json::json;
use tabmesh_federation::id::AgentId;
use tabmesh_federation::plan::SecureSumSpec;
use tabmesh_federation::secagg::document::{Opening, Summed};
use tabmesh_federation::secagg::roster::{Member, Roster};
use tabmesh_federation::secagg::setup::Subject;
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_store::Op;

use super::{contracts, spiffe_id};
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, named};
use crate::sums::Opened;

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
    let members = members(mesh, agents)?;
    let roster = Roster::new(members.clone())
        .map_err(|error| CoordinatorError::Step(format!("secure sum: {error}")))?;
    let collection = subject.expected.collection;
    let facts = json!({ "collection": collection.to_string(), "roster": roster.digest().to_string() });
    let log_head = named(mesh.audit("coordinator", "secure_sum_opened", facts)?);
    let descriptor = subject.describe(spec, &roster, opened_ms, log_head)?;
    let descriptor = String::from_utf8(descriptor.to_bytes())
        .map_err(|error| CoordinatorError::Step(format!("secure sum: {error}")))?;
    let opening = Opening { descriptor, summed, roster: agents.clone() };
    mesh.sums.open(collection, &Opened { opening, members }, with)
}

/// The cohort with the keys of the catalog; the domain is the organisation that answers for an agent.
fn members(mesh: &Mesh, agents: &BTreeSet<AgentId>) -> Result<Vec<Member>, CoordinatorError> {
    let member = |(agent, admitted): (AgentId, std::sync::Arc<crate::catalog::Admitted>)| {
        let organisation = spiffe_id(&agent)?.domain().unwrap_or_default().to_owned();
        Ok(Member { agent, key: VerifyingKey::from_bytes(admitted.public_key), organisation })
    };
    contracts(mesh, agents)?.into_iter().map(member).collect()
}
