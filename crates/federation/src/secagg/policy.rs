//! An agent's own floor: what it takes part in, whatever the server says.

use serde::{Deserialize, Serialize};
use tabmesh_privacy::budget::Rho;
use thiserror::Error;

use crate::id::{CollectionId, Digest, PlanDigest};
use crate::secagg::descriptor::{SumDescriptor, SumDescriptorError, least_threshold};
use crate::secagg::noise::{Guarantee, NoiseError};
use crate::secagg::roster::{MIN_MEMBERS, Roster};

/// Why an agent stays out of a secure sum.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum PolicyRefusal {
    /// The descriptor's figures don't fit each other.
    #[error(transparent)]
    Descriptor(#[from] SumDescriptorError),
    /// A figure is below the agent's floor, or above its ceiling.
    #[error("{what}: this agent's policy has {limit}, the descriptor {got}")]
    Beyond {
        /// Which figure.
        what: &'static str,
        /// The agent's limit.
        limit: u64,
        /// What the descriptor says.
        got: u64,
    },
    /// The sum isn't the one this agent has admitted.
    #[error("{what}: this agent admitted {expected}, the descriptor says {got}")]
    Other {
        /// Which fact.
        what: &'static str,
        /// What the agent admitted.
        expected: String,
        /// What the descriptor says.
        got: String,
    },
    /// The cost can't be stated.
    #[error(transparent)]
    Noise(#[from] NoiseError),
}

/// The floor, from the domain's local policy file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Fewest agents; [`MIN_MEMBERS`] at least, whatever it says.
    pub min_agents: u32,
    /// Fewest organisations that answer for the agents.
    pub min_organisations: u32,
    /// Colluding agents this agent wants to be safe against, at least 1.
    pub colluders: u32,
    /// Most attempts at one collection.
    pub max_attempts: u32,
    /// Most the sum may cost, with the noise of the honest survivors.
    pub max_rho: Rho,
    /// Most this agent's contribution may cost if everybody else colludes.
    pub max_local_rho: Rho,
    /// Fewest agents that this one exchanges masks with: on a ring these hide it.
    pub min_neighbours: u32,
}

/// What the agent knows of the sum from its own checks: the plan it admitted, the model it verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Round or release stage.
    pub collection: CollectionId,
    /// Digest of the round's descriptor or of the release query.
    pub payload: Digest,
    /// Digest of the model.
    pub model: Digest,
    /// The plan.
    pub plan: PlanDigest,
    /// Values of a vector.
    pub dimension: u32,
    /// Squared L2 sensitivity that its own clipping gives.
    pub l2_sensitivity_squared: u64,
}

impl Policy {
    /// Decides whether to take part.
    ///
    /// # Errors
    /// [`PolicyRefusal`] naming the first figure that is not to be had.
    pub fn admit(
        &self,
        descriptor: &SumDescriptor,
        roster: &Roster,
        expected: &Expected,
    ) -> Result<Guarantee, PolicyRefusal> {
        descriptor.check(roster)?;
        same("collection", &expected.collection, &descriptor.collection)?;
        same("payload", &expected.payload, &descriptor.payload)?;
        same("model", &expected.model, &descriptor.model)?;
        same("plan", &expected.plan, &descriptor.plan)?;
        same("dimension", &expected.dimension, &descriptor.dimension)?;
        same("sensitivity", &expected.l2_sensitivity_squared, &descriptor.l2_sensitivity_squared)?;
        let agents = u64::from(self.min_agents).max(MIN_MEMBERS as u64);
        at_least("agents", agents, roster.len() as u64)?;
        at_least("organisations", self.min_organisations.into(), roster.organisations() as u64)?;
        at_least("colluders", self.colluders.max(1).into(), descriptor.noise.colluders.into())?;
        let floor = least_threshold(roster.len(), self.colluders.max(1)) as u64;
        at_least("threshold", floor, descriptor.threshold.into())?;
        let neighbours = descriptor.topology.degree(roster.len()) as u64;
        at_least("neighbours", self.min_neighbours.into(), neighbours)?;
        at_most("attempt", self.max_attempts.into(), descriptor.attempt.into())?;
        let guarantee = descriptor.guarantee(roster)?;
        at_most("rho units of the sum", self.max_rho.units(), guarantee.rho.units())?;
        at_most("rho units of the own share", self.max_local_rho.units(), guarantee.local.units())?;
        Ok(guarantee)
    }
}

fn same<T: PartialEq + ToString>(what: &'static str, expected: &T, got: &T) -> Result<(), PolicyRefusal> {
    if expected == got {
        Ok(())
    } else {
        Err(PolicyRefusal::Other { what, expected: expected.to_string(), got: got.to_string() })
    }
}

fn at_least(what: &'static str, limit: u64, got: u64) -> Result<(), PolicyRefusal> {
    if got >= limit { Ok(()) } else { Err(PolicyRefusal::Beyond { what, limit, got }) }
}

fn at_most(what: &'static str, limit: u64, got: u64) -> Result<(), PolicyRefusal> {
    if got <= limit { Ok(()) } else { Err(PolicyRefusal::Beyond { what, limit, got }) }
}
