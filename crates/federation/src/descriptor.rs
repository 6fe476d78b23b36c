//! What a round tells its agents, and how an agent holds it against the plan it admitted.
//!
//! A descriptor is JSON, its adapter values packed ([`crate::packed`]); its name is the SHA-256 of the bytes as sent, and each update names it, so an update
//! can't be used for another round, attempt or adapter. Every figure the noise depends on is in it and can be
//! recomputed: an agent refuses a descriptor whose sensitivity, variance or cost don't follow from the plan.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::clip::{ClipError, integer_norm};
use tabmesh_privacy::mechanism::{DiscreteGaussian, MechanismError, SigmaSquared};
use tabmesh_privacy::release::ReleaseQuery;
use thiserror::Error;

use crate::adaptive_clip;
use crate::id::{AgentId, CollectionId, Digest, PlanDigest, RoundId};
use crate::packed;
use crate::phase::collect::{Announcement, Quorum};
use crate::plan::{ClipNorm, Plan, PlanError};
use crate::schedule::{ScheduleError, Window};
use crate::screen::{NotFinite, Plausible, ScreenLimits, TAIL_SIGMAS, finite};
use crate::secagg::noise::{NoiseError, NoisePlan};

/// Why a descriptor is refused, by its maker or by an agent.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// Not JSON of this shape, or too large.
    #[error("not a round descriptor: {reason}")]
    Malformed {
        /// The parser's words.
        reason: String,
    },
    /// A figure that must follow from the plan doesn't.
    #[error("{what}: expected {expected}, got {got}")]
    Differs {
        /// Name of the figure.
        what: &'static str,
        /// What the plan gives.
        expected: String,
        /// What the descriptor says.
        got: String,
    },
    /// A list is empty, too long, or not in canonical order.
    #[error("{what}: expected {expected}, got {got}")]
    Shape {
        /// Name of the list.
        what: &'static str,
        /// What is allowed, in words.
        expected: String,
        /// Length found.
        got: usize,
    },
    /// An adapter value isn't a number.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// Clip norm and scale are out of range.
    #[error(transparent)]
    Clip(#[from] ClipError),
    /// The plan's cost buys no usable noise here.
    #[error(transparent)]
    Noise(#[from] MechanismError),
    /// The plan's cost buys no usable noise shares here.
    #[error(transparent)]
    Shares(#[from] NoiseError),
    /// The window is out of range.
    #[error(transparent)]
    Window(#[from] ScheduleError),
    /// The plan's budget can't be shared out.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// What a round asks for. All figures are public or already differentially private.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundDescriptor {
    /// Id of the round.
    pub id: RoundId,
    /// The plan.
    pub plan: PlanDigest,
    /// Number of the round, from 0.
    pub index: u32,
    /// Attempt at it, from 1.
    pub attempt: u32,
    /// The frozen model.
    pub base: Digest,
    /// The synthetic rows in the model's context; of a forest, its trees.
    pub context: Digest,
    /// Bins, codes and scaling.
    pub preprocessing: Digest,
    /// Model columns that have adapter values, in the model's order.
    pub adapter_keys: Vec<String>,
    /// Adapter values per feature.
    pub width: u32,
    /// The current adapter: `adapter_keys.len() · width` values, feature by feature.
    #[serde(with = "packed")]
    pub adapter_values: Vec<f32>,
    /// Integers of an update where they aren't one for each adapter value: two sums for each leaf of the trees that a forest learns
    /// in this round. 0 for every other kind.
    #[serde(default, skip_serializing_if = "nothing")]
    pub leaf_sums: u64,
    /// L2 norm one unit's gradient is clipped to.
    pub clip_norm: f64,
    /// Integer steps per unit of gradient, a power of two.
    pub scale: u64,
    /// What the round costs each unit.
    pub rho: Rho,
    /// Integer steps that a unit adds to one of the vector's last two values, the first of them for units within the clip norm and
    /// the second for those beyond; the next norm follows from them. 0 where the norm doesn't follow a quantile and the vector has
    /// no such values.
    #[serde(default, skip_serializing_if = "nothing")]
    pub count_weight: u64,
    /// L2 sensitivity of the integer sum: ⌊clip_norm · scale⌋, with the counts beside it √(⌊clip_norm · scale⌋² + count_weight²).
    pub sensitivity: u64,
    /// Variance of each agent's noise on each value, in squared integer steps: all of it, or its share in a secure sum.
    pub sigma_squared: SigmaSquared,
    /// Agents that take part.
    pub roster: BTreeSet<AgentId>,
    /// When the round opened, UTC milliseconds.
    pub opened_ms: i64,
    /// First moment at which an update is late, UTC milliseconds.
    pub deadline_ms: i64,
    /// Milliseconds after the deadline in which the round is published or abandoned.
    pub grace_ms: i64,
    /// Noisy number of units over the roster, from the release, times the plan's sampling rate: what the mean gradient is divided
    /// by. Never the number of those that were drawn, which is private.
    pub divisor: u64,
    /// Most units one agent can plausibly hold, from the same total and its noise.
    pub max_units: u64,
}

/// What the maker of a descriptor chooses; the rest follows from the plan.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundInputs {
    /// Id of the round.
    pub id: RoundId,
    /// Number of the round, from 0.
    pub index: u32,
    /// Attempt at it, from 1.
    pub attempt: u32,
    /// The frozen model.
    pub base: Digest,
    /// The synthetic rows in the model's context; of a forest, its trees.
    pub context: Digest,
    /// Bins, codes and scaling.
    pub preprocessing: Digest,
    /// Model columns with adapter values, in the model's order.
    pub adapter_keys: Vec<String>,
    /// Adapter values per feature.
    pub width: u32,
    /// The current adapter.
    pub adapter_values: Vec<f32>,
    /// Clip norm: the plan's, or the corpus' percentile under `auto`.
    pub clip_norm: f64,
    /// Agents that take part.
    pub roster: BTreeSet<AgentId>,
    /// When the round opens, UTC milliseconds.
    pub opened_ms: i64,
    /// Noisy number of units over the roster, from the release.
    pub noisy_total: f64,
    /// Standard deviation of the noise in it.
    pub noisy_total_sd: f64,
}

impl RoundDescriptor {
    /// Fills in everything that follows from the plan, and checks the whole.
    ///
    /// # Errors
    /// [`DescriptorError`] for inputs out of range.
    pub fn new(inputs: RoundInputs, plan: &Plan, digest: PlanDigest) -> Result<Self, DescriptorError> {
        let window = Window::new(inputs.opened_ms, plan.rounds.deadline_s, plan.rounds.grace_s)?;
        let scale = scale_for(inputs.clip_norm);
        let norm = integer_norm(inputs.clip_norm, scale)?;
        let count_weight = plan.rounds.clip_norm.count_weight(norm);
        let sensitivity = adaptive_clip::sensitivity(norm, count_weight);
        let rho = plan.budget()?.per_round;
        let sigma_squared = own_noise(plan, sensitivity, rho, inputs.roster.len())?;
        let descriptor = Self {
            id: inputs.id,
            plan: digest,
            index: inputs.index,
            attempt: inputs.attempt,
            base: inputs.base,
            context: inputs.context,
            preprocessing: inputs.preprocessing,
            adapter_keys: inputs.adapter_keys,
            width: inputs.width,
            adapter_values: inputs.adapter_values,
            leaf_sums: plan.rounds.adapter.leaf_sums(),
            clip_norm: inputs.clip_norm,
            scale,
            rho,
            count_weight,
            sensitivity,
            sigma_squared,
            roster: inputs.roster,
            opened_ms: window.opened_ms(),
            deadline_ms: window.deadline_ms(),
            grace_ms: window.grace_ms(),
            divisor: plausible_units(inputs.noisy_total * plan.rounds.sampling_rate, 0.0).max(1),
            max_units: plausible_units(inputs.noisy_total, inputs.noisy_total_sd).max(1),
        };
        descriptor.check(plan, &digest)?;
        Ok(descriptor)
    }

    /// The bytes to store and send.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // Unwrap safety: numbers, strings and lists always serialise; a checked descriptor's floats are finite.
        serde_json::to_vec(self).expect("a descriptor has a JSON form")
    }

    /// Reads received bytes; [`Self::check`] them before anything is computed or debited.
    ///
    /// # Errors
    /// [`DescriptorError::Malformed`] for oversized or malformed bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DescriptorError> {
        if bytes.len() > MAX_DESCRIPTOR_BYTES {
            let reason = format!("expected at most {MAX_DESCRIPTOR_BYTES} bytes, got {}", bytes.len());
            return Err(DescriptorError::Malformed { reason });
        }
        serde_json::from_slice(bytes)
            .map_err(|error| DescriptorError::Malformed { reason: error.to_string() })
    }

    /// Checks that every figure follows from the plan.
    ///
    /// # Errors
    /// [`DescriptorError`] naming the first figure that doesn't.
    pub fn check(&self, plan: &Plan, digest: &PlanDigest) -> Result<(), DescriptorError> {
        same("plan", digest, &self.plan)?;
        let rounds = &plan.rounds;
        let in_range = self.index < rounds.count;
        same("round index within the plan", &true, &in_range)?;
        same("attempt above zero", &true, &(self.attempt > 0))?;
        self.check_adapter()?;
        same("leaf sums", &rounds.adapter.leaf_sums(), &self.leaf_sums)?;
        // Leaves are learnt round by round: the values are those of all rounds.
        if self.leaf_sums > 0 {
            let all = u64::from(rounds.count) * self.leaf_sums / 2;
            same("leaf values", &all, &(self.adapter_values.len() as u64))?;
        }
        let known = match rounds.clip_norm {
            ClipNorm::Fixed(norm) => Some(norm),
            ClipNorm::Auto(_) => rounds.adapter.row_norm(),
            ClipNorm::Adaptive(_) => None,
        };
        if let Some(norm) = known {
            same("clip norm", &norm, &self.clip_norm)?;
        }
        let norm = integer_norm(self.clip_norm, self.scale)?;
        let count_weight = rounds.clip_norm.count_weight(norm);
        same("weight of the counts", &count_weight, &self.count_weight)?;
        let sensitivity = adaptive_clip::sensitivity(norm, count_weight);
        same("sensitivity", &sensitivity, &self.sensitivity)?;
        same("rho", &plan.budget()?.per_round, &self.rho)?;
        let (least, most) = (plan.cohort.min_agents as usize, plan.cohort.max_agents as usize);
        if !(least..=most).contains(&self.roster.len()) {
            let expected = format!("{least} to {most} agents");
            return Err(DescriptorError::Shape { what: "roster", expected, got: self.roster.len() });
        }
        let noise = own_noise(plan, sensitivity, self.rho, self.roster.len())?;
        let fraction = |s: SigmaSquared| format!("{}/{}", s.num(), s.den());
        same("sigma squared", &fraction(noise), &fraction(self.sigma_squared))?;
        let window = Window::new(self.opened_ms, rounds.deadline_s, rounds.grace_s)?;
        same("deadline", &window.deadline_ms(), &self.deadline_ms)?;
        same("grace", &window.grace_ms(), &self.grace_ms)?;
        same("divisor above zero", &true, &(self.divisor > 0))
    }

    /// Length of an update: one integer per adapter value, or the sums of a forest's leaves, and both counts where there are any.
    #[must_use]
    pub fn len(&self) -> usize {
        let sums = usize::try_from(self.leaf_sums).unwrap_or(usize::MAX);
        let values = if sums > 0 { sums } else { self.adapter_values.len() };
        values + 2 * usize::from(self.count_weight > 0)
    }

    /// Whether there is nothing to train.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.adapter_values.is_empty()
    }

    /// What the coordinator holds updates against; `descriptor` is the digest of the bytes sent.
    ///
    /// # Errors
    /// [`DescriptorError::Window`] if the times are out of range.
    pub fn announcement(
        &self,
        descriptor: Digest,
        quorum: Quorum,
        plan: &Plan,
    ) -> Result<Announcement, DescriptorError> {
        let window = Window::new(self.opened_ms, plan.rounds.deadline_s, plan.rounds.grace_s)?;
        let limits = ScreenLimits::new(Plausible {
            len: self.len(),
            agents: self.roster.len(),
            max_units: self.max_units,
            unit_max: self.sensitivity,
            unit_norm: self.sensitivity,
            sigma_ceil: sigma_ceil(self.sigma_squared),
        });
        let (id, attempt, roster) = (self.id, self.attempt, self.roster.clone());
        Ok(Announcement { id, attempt, descriptor, roster, quorum, window, limits })
    }

    fn check_adapter(&self) -> Result<(), DescriptorError> {
        let keys = &self.adapter_keys;
        let distinct: BTreeSet<&String> = keys.iter().collect();
        let named = keys.iter().all(|key| (1..=MAX_KEY_BYTES).contains(&key.len()));
        if keys.is_empty() || !named || distinct.len() != keys.len() {
            let expected = format!("distinct column keys of 1 to {MAX_KEY_BYTES} bytes");
            return Err(DescriptorError::Shape { what: "adapter keys", expected, got: keys.len() });
        }
        let expected = keys.len().saturating_mul(self.width as usize);
        let got = self.adapter_values.len();
        if expected == 0 || got != expected || got > MAX_ADAPTER_VALUES {
            let expected = format!("{expected}, 1 to {MAX_ADAPTER_VALUES}");
            return Err(DescriptorError::Shape { what: "adapter values", expected, got });
        }
        finite("adapter values", self.adapter_values.iter().map(|v| f64::from(*v)))?;
        Ok(())
    }
}

/// A release stage's announcement: the query's digest is its descriptor.
///
/// `max_units` is the largest number of units an agent may plausibly hold, from a declaration; the total isn't
/// known before stage 1.
///
/// # Errors
/// [`DescriptorError::Noise`] if the query has no usable noise, [`DescriptorError::Window`] for a window out of
/// range.
pub fn stage_announcement(
    query: &ReleaseQuery,
    id: CollectionId,
    roster: BTreeSet<AgentId>,
    quorum: Quorum,
    window: Window,
    max_units: u64,
) -> Result<Announcement, DescriptorError> {
    let noise = query.mechanism()?;
    let limits = ScreenLimits::new(Plausible {
        len: query.cells_total(),
        agents: roster.len(),
        max_units,
        unit_max: query.max_rows_per_unit.into(),
        unit_norm: query.l2_sensitivity_squared().isqrt() + 1,
        sigma_ceil: sigma_ceil(noise.sigma_squared()),
    });
    let descriptor = Digest::from_bytes(query.digest());
    Ok(Announcement { id, attempt: 1, descriptor, roster, quorum, window, limits })
}

/// The power of two at which a clip norm becomes an integer norm in (2¹⁵, 2¹⁶], at least 1: fine enough that
/// truncation is far below the noise, small enough that sums never come near 2⁶³.
#[must_use]
pub fn scale_for(clip_norm: f64) -> u64 {
    let mut scale = 1_u64;
    while scale < MAX_SCALE && clip_norm * (scale * 2) as f64 <= INTEGER_NORM {
        scale *= 2;
    }
    scale
}

/// A noisy total plus twelve standard deviations, rounded up; zero for a negative or senseless one.
#[must_use]
pub fn plausible_units(noisy_total: f64, noise_sd: f64) -> u64 {
    // The cast saturates at both ends and maps NaN to zero.
    (noisy_total.max(0.0) + TAIL_SIGMAS as f64 * noise_sd.max(0.0)).ceil() as u64
}

/// Variance of the noise that each of `agents` adds: all of it, or its share.
fn own_noise(
    plan: &Plan,
    sensitivity: u64,
    rho: Rho,
    agents: usize,
) -> Result<SigmaSquared, DescriptorError> {
    let l2_squared = sensitivity * sensitivity;
    match plan.secure_sum() {
        None => Ok(DiscreteGaussian::from_rho(l2_squared, rho)?.sigma_squared()),
        Some(spec) => Ok(NoisePlan::for_cost(l2_squared, rho, agents, spec.dropouts, spec.colluders)?.share),
    }
}

// Descriptors without counts look as they did before there was one.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn nothing(weight: &u64) -> bool {
    *weight == 0
}

/// σ rounded up.
fn sigma_ceil(sigma_squared: SigmaSquared) -> u64 {
    sigma_squared.num().div_ceil(sigma_squared.den()).isqrt() + 1
}

fn same<T: PartialEq + std::fmt::Display>(
    what: &'static str,
    expected: &T,
    got: &T,
) -> Result<(), DescriptorError> {
    if expected == got {
        Ok(())
    } else {
        Err(DescriptorError::Differs { what, expected: expected.to_string(), got: got.to_string() })
    }
}

/// Largest descriptor, in bytes.
pub const MAX_DESCRIPTOR_BYTES: usize = 4 << 20;
/// Longest key of a model column, in bytes.
pub const MAX_KEY_BYTES: usize = 256;
/// Most adapter values of one round.
pub const MAX_ADAPTER_VALUES: usize = 1 << 17;
/// Integer norm aimed at: 2¹⁶.
const INTEGER_NORM: f64 = 65_536.0;
/// Largest scale: 2³⁰.
const MAX_SCALE: u64 = 1 << 30;

#[cfg(test)]
mod tests;
