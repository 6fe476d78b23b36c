//! What an agent puts into the sum: its vector with its noise share, bound to one descriptor and one debit.
//!
//! There is no other way to make one: a vector that was never noised can't be masked.

use rand::{CryptoRng, RngCore};
use tabmesh_privacy::mechanism::{DiscreteGaussian, Noise};
use tabmesh_privacy::private::{Mask, Private};
use thiserror::Error;

use crate::id::Digest;
use crate::secagg::descriptor::SumDescriptor;
use crate::secagg::mask::RingVector;
use crate::secagg::noise::NoiseError;

/// Why a vector can't be put into a sum. Depends on the plan, never on values.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
pub enum ContributionError {
    /// Wrong number of values.
    #[error("contribution: expected {expected} values, got {got}")]
    Length {
        /// Values of the descriptor.
        expected: usize,
        /// Values found.
        got: usize,
    },
    /// The noise share can't be drawn.
    #[error(transparent)]
    Noise(#[from] NoiseError),
}

/// A noised vector for one attempt at one sum.
#[derive(Debug, Clone, PartialEq)]
pub struct Contribution {
    descriptor: Digest,
    debit: u64,
    values: Private<Vec<i64>>,
}

impl Contribution {
    /// Brings each value within the descriptor's bound on data and adds this agent's noise share.
    ///
    /// `digest` is that of the descriptor as received and checked; `debit` is the ledger sequence number of the
    /// entry that pays for this attempt. Bringing values within a bound moves no two vectors further apart, so the
    /// sensitivity stands.
    ///
    /// # Errors
    /// [`ContributionError`] for another length or noise that can't be drawn.
    pub fn noised<R: RngCore + CryptoRng>(
        sum: &[i64],
        descriptor: &SumDescriptor,
        digest: Digest,
        debit: u64,
        rng: &mut R,
    ) -> Result<Self, ContributionError> {
        let expected = descriptor.dimension as usize;
        if sum.len() != expected {
            return Err(ContributionError::Length { expected, got: sum.len() });
        }
        let most = i64::try_from(descriptor.signal_bound()).unwrap_or(i64::MAX);
        let bounded: Vec<i64> = sum.iter().map(|value| (*value).clamp(-most, most)).collect();
        let sensitivity = descriptor.l2_sensitivity_squared;
        let share = DiscreteGaussian::from_sigma_squared(sensitivity, descriptor.noise.share);
        let share = share.map_err(NoiseError::from)?;
        Ok(Self { descriptor: digest, debit, values: share.privatize(&bounded, rng) })
    }

    /// Digest of the descriptor it is for.
    #[must_use]
    pub fn descriptor(&self) -> Digest {
        self.descriptor
    }

    /// Ledger sequence number of its debit.
    #[must_use]
    pub fn debit(&self) -> u64 {
        self.debit
    }

    /// The vector with its noise share; differentially private at the cost of the share alone.
    #[must_use]
    pub fn values(&self) -> &Private<Vec<i64>> {
        &self.values
    }

    /// The vector under a mask; nothing if the mask has another length.
    #[must_use]
    pub fn masked(&self, mask: &RingVector, descriptor: &SumDescriptor) -> Option<Private<Vec<u8>>> {
        let mask = match mask {
            RingVector::Narrow(words) => Mask::Narrow(words),
            RingVector::Wide(words) => Mask::Wide(words),
        };
        self.values.masked(mask, descriptor.max_abs)
    }
}
