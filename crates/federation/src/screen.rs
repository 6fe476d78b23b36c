//! What an update must look like before it may enter a sum: shape, digest, range, norm.
//!
//! Updates are integers, so NaN and infinity cannot occur in them; floats in documents go through
//! [`finite`]. The bounds follow from public figures only (sensitivity, noise variance and the released noisy
//! total), and what is screened is already noised, so a refusal tells nothing that the update itself didn't.
//! A refused update never enters a sum; an accepted one can never make a sum overflow.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::Digest;
use crate::vector::Vector;

/// Why an update is not let into the sum.
#[derive(Debug, Clone, PartialEq, Error, Serialize, Deserialize)]
#[serde(tag = "refusal", rename_all = "snake_case")]
pub enum ScreenRefusal {
    /// Wrong number of integers.
    #[error("update has {got} values, this collection needs {expected}")]
    Shape {
        /// Values needed.
        expected: usize,
        /// Values found.
        got: usize,
    },
    /// The values don't hash to the digest they came under.
    #[error("payload digest mismatch: announced {announced}, the values give {got}")]
    Digest {
        /// Digest the agent announced.
        announced: Digest,
        /// Digest of the values received.
        got: Digest,
    },
    /// A value no honest agent can produce.
    #[error("value {value} at position {position} is beyond the plausible range of ±{limit}")]
    Range {
        /// First position beyond the range.
        position: usize,
        /// The value there.
        value: i64,
        /// Largest plausible magnitude.
        limit: u64,
    },
    /// A whole vector no honest agent can produce.
    #[error("the update's norm is above the plausible limit of {limit}")]
    Norm {
        /// Largest plausible L2 norm.
        limit: u64,
    },
}

/// A float in a document that isn't a finite number.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what} has a value at position {position} that is not a finite number")]
pub struct NotFinite {
    /// What the vector is.
    pub what: &'static str,
    /// First bad position.
    pub position: usize,
}

/// The public figures a plausible range follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plausible {
    /// Integers per vector.
    pub len: usize,
    /// Agents whose vectors are added up, at least 1.
    pub agents: usize,
    /// Most privacy units one agent may hold, from a declaration or the released noisy total.
    pub max_units: u64,
    /// Largest change of one value by one unit, in integer steps.
    pub unit_max: u64,
    /// Largest change of the vector's L2 norm by one unit, in integer steps.
    pub unit_norm: u64,
    /// The noise's standard deviation, rounded up, in integer steps.
    pub sigma_ceil: u64,
}

/// Bounds an update is held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScreenLimits {
    /// Integers per vector.
    pub len: usize,
    /// Largest magnitude of one value.
    pub max_abs: u64,
    /// Largest L2 norm, rounded up.
    pub max_norm: u64,
}

impl ScreenLimits {
    /// Bounds that an honest update breaks with a probability below `len`·10⁻³⁰.
    ///
    /// Range: `max_units·unit_max + 12σ`, and never so much that `agents` such values overflow an `i64`.
    /// Norm: `max_units·unit_norm + σ·(√len + 12)`.
    #[must_use]
    pub fn new(figures: Plausible) -> Self {
        let Plausible { len, agents, max_units, unit_max, unit_norm, sigma_ceil } = figures;
        let noise = sigma_ceil.saturating_mul(TAIL_SIGMAS);
        let room = i64::MAX.unsigned_abs() / (agents.max(1) as u64);
        let max_abs = max_units.saturating_mul(unit_max).saturating_add(noise).min(room);
        let root = (len as u64).isqrt() + 1;
        let noise_norm = sigma_ceil.saturating_mul(root.saturating_add(TAIL_SIGMAS));
        let max_norm = max_units.saturating_mul(unit_norm).saturating_add(noise_norm);
        Self { len, max_abs, max_norm }
    }

    /// Checks one update against the bounds and its announced digest.
    ///
    /// # Errors
    /// The first [`ScreenRefusal`] in the order shape, range, norm, digest (cheap checks first).
    pub fn screen(&self, vector: &Vector, announced: &Digest) -> Result<(), ScreenRefusal> {
        let values = vector.values();
        if values.len() != self.len {
            return Err(ScreenRefusal::Shape { expected: self.len, got: values.len() });
        }
        let beyond = values.iter().position(|v| v.unsigned_abs() > self.max_abs);
        if let Some((position, &value)) = beyond.and_then(|at| values.get(at).map(|v| (at, v))) {
            return Err(ScreenRefusal::Range { position, value, limit: self.max_abs });
        }
        // Squares of 64-bit magnitudes fit 128 bits; their sum saturates, which refuses.
        let squares = values.iter().fold(0_u128, |sum, v| {
            let magnitude = u128::from(v.unsigned_abs());
            sum.saturating_add(magnitude * magnitude)
        });
        if squares > u128::from(self.max_norm) * u128::from(self.max_norm) {
            return Err(ScreenRefusal::Norm { limit: self.max_norm });
        }
        if vector.digest() != announced {
            return Err(ScreenRefusal::Digest { announced: *announced, got: *vector.digest() });
        }
        Ok(())
    }
}

/// Checks that every value of a document's float vector is a finite number.
///
/// # Errors
/// [`NotFinite`] naming the first position that isn't.
pub fn finite(what: &'static str, values: impl IntoIterator<Item = f64>) -> Result<(), NotFinite> {
    match values.into_iter().position(|v| !v.is_finite()) {
        Some(position) => Err(NotFinite { what, position }),
        None => Ok(()),
    }
}

/// Standard deviations of noise that count as plausible: a Gaussian is beyond 12 with probability 3.6·10⁻³³.
pub const TAIL_SIGMAS: u64 = 12;

#[cfg(test)]
mod tests {
    use super::*;

    const FIGURES: Plausible =
        Plausible { len: 4, agents: 3, max_units: 100, unit_max: 10, unit_norm: 20, sigma_ceil: 5 };

    fn screen(values: &[i64]) -> Result<(), ScreenRefusal> {
        ScreenLimits::new(FIGURES).screen(&Vector::new(values), &Digest::of_payload(values))
    }

    #[test]
    fn bounds_are_the_formula_by_hand() {
        // 100·10 + 12·5 = 1060; 100·20 + 5·((√4 + 1) + 12) = 2075.
        let expected = ScreenLimits { len: 4, max_abs: 1060, max_norm: 2075 };
        assert_eq!(ScreenLimits::new(FIGURES), expected);
    }

    #[test]
    fn each_refusal_is_named_and_the_limit_itself_passes() {
        assert_eq!(screen(&[1060, -1060, 0, 0]), Ok(()));
        assert_eq!(screen(&[0; 3]), Err(ScreenRefusal::Shape { expected: 4, got: 3 }));
        assert_eq!(
            screen(&[0, 1061, 0, 0]),
            Err(ScreenRefusal::Range { position: 1, value: 1061, limit: 1060 })
        );
        assert_eq!(
            screen(&[0, 0, 0, i64::MIN]),
            Err(ScreenRefusal::Range { position: 3, value: i64::MIN, limit: 1060 })
        );
        assert_eq!(screen(&[1060; 4]), Err(ScreenRefusal::Norm { limit: 2075 }));
        let (announced, got) = (Digest::of(b"other"), Digest::of_payload(&[1, 2, 3, 4]));
        assert_eq!(
            ScreenLimits::new(FIGURES).screen(&Vector::new([1, 2, 3, 4]), &announced),
            Err(ScreenRefusal::Digest { announced, got })
        );
    }

    #[test]
    fn accepted_values_cannot_overflow_the_sum() {
        let huge = Plausible { max_units: u64::MAX, unit_max: u64::MAX, agents: 7, ..FIGURES };
        let limits = ScreenLimits::new(huge);
        assert!(i64::try_from(limits.max_abs).is_ok_and(|most| most.checked_mul(7).is_some()));
        let screened = |limits: ScreenLimits| {
            let vector = Vector::new([i64::MIN; 3]);
            limits.screen(&vector, vector.digest())
        };
        let extreme = ScreenLimits { len: 3, max_abs: u64::MAX, max_norm: u64::MAX };
        assert_eq!(screened(extreme), Ok(()));
        let tight = ScreenLimits { max_norm: 1 << 63, ..extreme };
        assert_eq!(screened(tight), Err(ScreenRefusal::Norm { limit: 1 << 63 }));
    }

    #[test]
    fn floats_in_documents_must_be_finite() {
        assert_eq!(finite("adapter values", [0.0, -1.5]), Ok(()));
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let refused = NotFinite { what: "adapter values", position: 1 };
            assert_eq!(finite("adapter values", [0.0, bad]), Err(refused));
        }
    }
}
