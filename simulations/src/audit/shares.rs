//! What a colluding coordinator sees of a secure sum: the noise shares of the honest survivors, under the code that agents run.
//!
//! Masks cancel in the sum and hide nothing from whoever sees it whole, so they are left out; the shares are
//! [`Contribution::noised`]'s. Those of colluders are taken off, and those of agents that dropped out are missing: what is
//! left at the limit that a plan assumes.

use anyhow::{Context, Result};
use rand::{CryptoRng, RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tabmesh_federation::id::{CollectionId, Digest, PlanDigest};
use tabmesh_federation::secagg::contribution::Contribution;
use tabmesh_federation::secagg::descriptor::SumDescriptor;
use tabmesh_federation::secagg::graph::Topology;
use tabmesh_federation::secagg::mask::Width;
use tabmesh_federation::secagg::noise::NoisePlan;
use tabmesh_privacy::budget::Rho;

use super::mechanism::Subject;

/// A sum whose honest survivors are as few as its plan allows.
pub(super) struct Shares {
    descriptor: SumDescriptor,
    digest: Digest,
    honest: usize,
}

impl Shares {
    /// Of a plan whose sum costs `rho` at this sensitivity; as shipped, or with the error of the subject.
    ///
    /// # Errors
    /// A cost that buys no usable noise.
    pub(super) fn new(subject: Subject, l2_sensitivity_squared: u64, rho: Rho) -> Result<Self> {
        let mut noise = NoisePlan::for_cost(l2_sensitivity_squared, rho, AGENTS, DROPOUTS, COLLUDERS)?;
        let mut honest = AGENTS - (DROPOUTS + COLLUDERS) as usize;
        match subject {
            // A deviation of σ/h where σ/√h is needed.
            Subject::ThinShares => {
                let as_many = honest * honest + (DROPOUTS + COLLUDERS) as usize;
                noise.share = NoisePlan::new(noise.central, as_many, DROPOUTS, COLLUDERS)?.share;
            }
            Subject::TooFewShares => honest /= 2,
            _ => {}
        }
        let width = Width::Bits64;
        let descriptor = SumDescriptor {
            collection: CollectionId::new(0, &mut ChaCha20Rng::seed_from_u64(0), None),
            attempt: 1,
            payload: Digest::of(b"audited"),
            model: Digest::of(b"audited"),
            plan: PlanDigest::of(b"audited"),
            roster: Digest::of(b"audited"),
            dimension: u32::try_from(VALUES)?,
            width,
            max_abs: width.max_sum() / AGENTS as u64,
            l2_sensitivity_squared,
            noise,
            threshold: u32::try_from(AGENTS)? - DROPOUTS,
            topology: Topology::Complete,
            opened_ms: 0,
            step_s: 60,
            log_head: Digest::of(b"audited"),
        };
        let digest = Digest::of(&descriptor.to_bytes());
        Ok(Self { descriptor, digest, honest })
    }

    /// Values of the sum over the honest survivors, of whom one has `value` everywhere and the others nothing: noise is
    /// independent from value to value, so each is a trial of its own.
    ///
    /// # Errors
    /// Noise that can't be drawn.
    pub(super) fn values<R: RngCore + CryptoRng>(&self, value: i64, rng: &mut R) -> Result<Vec<i64>> {
        let mut sum = vec![0_i64; VALUES];
        for agent in 0..self.honest {
            let own = vec![if agent == 0 { value } else { 0 }; VALUES];
            let share = Contribution::noised(&own, &self.descriptor, self.digest, 0, rng)?;
            for (total, part) in sum.iter_mut().zip(share.values().as_slice()) {
                *total = total.checked_add(*part).context("a sum out of range")?;
            }
        }
        Ok(sum)
    }
}

/// Values of a vector.
const VALUES: usize = 100;
/// Agents of the cohort.
const AGENTS: usize = 6;
/// Agents that are missing.
const DROPOUTS: u32 = 1;
/// Agents that take their own share off.
const COLLUDERS: u32 = 1;
