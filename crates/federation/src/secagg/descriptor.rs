//! What a secure sum is about: every figure it depends on, in one document whose digest is in every message and key.
//!
//! The descriptor names the payload it sums (a round's descriptor or a release query), model, plan, roster,
//! dimension, modulus, bound, noise and thresholds. An agent compares it with what it has admitted itself
//! ([`super::policy`]); what is checked here is that the figures fit each other.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::{CollectionId, Digest, PlanDigest};
use crate::screen::TAIL_SIGMAS;
use crate::secagg::graph::{GraphError, Topology};
use crate::secagg::mask::Width;
use crate::secagg::message::Step;
use crate::secagg::noise::{Guarantee, NoiseError, NoisePlan};
use crate::secagg::roster::Roster;

/// Why a descriptor is refused.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum SumDescriptorError {
    /// Not JSON of this shape, or too large.
    #[error("not a descriptor of a secure sum: {reason}")]
    Malformed {
        /// The parser's words.
        reason: String,
    },
    /// It names another roster than the one at hand.
    #[error("roster: expected {expected}, got {got}")]
    Roster {
        /// Digest of the roster at hand.
        expected: Digest,
        /// Digest it names.
        got: Digest,
    },
    /// A number is out of range.
    #[error("{what}: expected {least} to {most}, got {got}")]
    Range {
        /// Which one.
        what: &'static str,
        /// Smallest allowed.
        least: u64,
        /// Largest allowed.
        most: u64,
        /// Found.
        got: u64,
    },
    /// The sum of all agents could leave half the modulus, and would come back as another number.
    #[error("{agents} values of up to {max_abs} don't fit half the modulus, {most}: they could wrap around")]
    Wraps {
        /// Agents in the roster.
        agents: usize,
        /// Largest magnitude of one agent's value.
        max_abs: u64,
        /// Largest sum that comes back unchanged.
        most: u64,
    },
    /// The noise doesn't follow or can't be drawn.
    #[error(transparent)]
    Noise(#[from] NoiseError),
    /// The graph doesn't fit or isn't secure.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// A secure sum's descriptor. Its digest is SHA-256 of its bytes as sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SumDescriptor {
    /// Round or release stage.
    pub collection: CollectionId,
    /// Attempt at it, from 1. Another attempt has fresh keys, fresh noise and a debit of its own.
    pub attempt: u32,
    /// Digest of what is summed: the round's descriptor or the release query, with clip and scale in it.
    pub payload: Digest,
    /// Digest of the model the vectors belong to.
    pub model: Digest,
    /// The plan.
    pub plan: PlanDigest,
    /// Digest of the roster.
    pub roster: Digest,
    /// Values of a vector.
    pub dimension: u32,
    /// Bits of the modulus.
    pub width: Width,
    /// Largest magnitude of one agent's value, noise included.
    pub max_abs: u64,
    /// Squared L2 sensitivity of the sum, in squared integer steps.
    pub l2_sensitivity_squared: u64,
    /// How the noise is divided.
    pub noise: NoisePlan,
    /// Agents needed in every phase, and signatures needed on the survivors.
    pub threshold: u32,
    /// Who exchanges shares and masks with whom.
    pub topology: Topology,
    /// When it opened, UTC milliseconds.
    pub opened_ms: i64,
    /// Seconds each step may take.
    pub step_s: u32,
    /// Head of the coordinator's audit log when it was opened.
    pub log_head: Digest,
}

impl SumDescriptor {
    /// The bytes to store and send.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // Unwrap safety: numbers and strings always serialise.
        serde_json::to_vec(self).expect("a descriptor has a JSON form")
    }

    /// Reads received bytes; [`Self::check`] them before use.
    ///
    /// # Errors
    /// [`SumDescriptorError::Malformed`] for oversized or malformed bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SumDescriptorError> {
        if bytes.len() > MAX_SUM_DESCRIPTOR_BYTES {
            let reason = format!("expected at most {MAX_SUM_DESCRIPTOR_BYTES} bytes, got {}", bytes.len());
            return Err(SumDescriptorError::Malformed { reason });
        }
        serde_json::from_slice(bytes)
            .map_err(|error| SumDescriptorError::Malformed { reason: error.to_string() })
    }

    /// Checks that the figures fit the roster and each other.
    ///
    /// # Errors
    /// [`SumDescriptorError`] naming the first figure that doesn't.
    pub fn check(&self, roster: &Roster) -> Result<(), SumDescriptorError> {
        if self.roster != roster.digest() {
            return Err(SumDescriptorError::Roster { expected: roster.digest(), got: self.roster });
        }
        let agents = roster.len();
        within("attempt", 1, u64::from(u32::MAX), self.attempt.into())?;
        within("dimension", 1, MAX_SUM_DIMENSION.into(), self.dimension.into())?;
        within("step seconds", 1, MAX_STEP_S.into(), self.step_s.into())?;
        // Beyond a third of the roster no threshold is safe against a server that lies (Bonawitz et al. 2017, §6).
        within("colluders", 1, (agents as u64 - 1) / 3, self.noise.colluders.into())?;
        self.noise.check(agents, self.l2_sensitivity_squared)?;
        let least = least_threshold(agents, self.noise.colluders) as u64;
        let most = (agents as u64).saturating_sub(self.noise.dropouts.into());
        within("threshold", least, most, self.threshold.into())?;
        let most = self.width.max_sum();
        // Below twelve deviations of noise the bound would cut noise off.
        within("bound on values", self.noise_bound().saturating_add(1), most, self.max_abs)?;
        if self.max_abs.checked_mul(agents as u64).is_none_or(|sum| sum > most) {
            return Err(SumDescriptorError::Wraps { agents, max_abs: self.max_abs, most });
        }
        if let Topology::Regular(shape) = &self.topology {
            for agents in [self.threshold as usize, agents] {
                shape.check(agents, self.noise.colluders)?;
            }
        }
        Ok(())
    }

    /// What the sum costs each unit.
    ///
    /// # Errors
    /// [`NoiseError`] beyond the currency.
    pub fn guarantee(&self, roster: &Roster) -> Result<Guarantee, NoiseError> {
        self.noise.guarantee(roster.len(), self.l2_sensitivity_squared, self.dimension)
    }

    /// Magnitude that a noise share stays within, but for a probability below 10⁻³⁰ a value: 12σ_l, rounded up.
    #[must_use]
    pub fn noise_bound(&self) -> u64 {
        let share = self.noise.share;
        (share.num().div_ceil(share.den()).isqrt() + 1).saturating_mul(TAIL_SIGMAS)
    }

    /// Magnitude that data are brought within before noise is added, so that noise is never cut off.
    #[must_use]
    pub fn signal_bound(&self) -> u64 {
        self.max_abs.saturating_sub(self.noise_bound())
    }

    /// Shares of a secret that give it back.
    #[must_use]
    pub fn share_threshold(&self) -> usize {
        match &self.topology {
            Topology::Complete => self.threshold as usize,
            Topology::Regular(shape) => shape.share_threshold as usize,
        }
    }

    /// Most neighbours that may be missing from the survivors.
    #[must_use]
    pub fn max_dropped(&self) -> usize {
        match &self.topology {
            // The threshold on survivors says it all where everybody is everybody's neighbour.
            Topology::Complete => usize::MAX,
            Topology::Regular(shape) => shape.max_dropped as usize,
        }
    }

    /// First millisecond at which an answer to `step` is late.
    #[must_use]
    pub fn deadline_ms(&self, step: Step) -> i64 {
        self.opened_ms.saturating_add(step.number().saturating_mul(i64::from(self.step_s) * 1000))
    }
}

/// The smallest threshold that is safe: above two thirds of the agents, the bound for a server that lies (Bonawitz
/// et al. 2017, §6), and above (n + C)/2, so that any two sets of that size have an honest agent in common.
#[must_use]
pub fn least_threshold(agents: usize, colluders: u32) -> usize {
    let thirds = (2 * agents) / 3;
    let halves = (agents + colluders as usize) / 2;
    thirds.max(halves) + 1
}

fn within(what: &'static str, least: u64, most: u64, got: u64) -> Result<(), SumDescriptorError> {
    if (least..=most).contains(&got) {
        Ok(())
    } else {
        Err(SumDescriptorError::Range { what, least, most, got })
    }
}

/// Largest descriptor, in bytes.
pub const MAX_SUM_DESCRIPTOR_BYTES: usize = 64 << 10;
/// Most values of a vector: 2²⁰.
pub const MAX_SUM_DIMENSION: u32 = 1 << 20;
/// Longest step, in seconds: a week.
pub const MAX_STEP_S: u32 = 7 * 24 * 3600;
