//! The record of one use of a mechanism: what a ledger entry stores and an accountant composes.
//!
//! Only figures of the plan; nothing here depends on rows. σ² is an exact fraction written as decimal strings, so
//! that ρ can be recomputed by anybody without floats.

use super::MechanismError;
use super::shares::NoiseShares;
use crate::budget::Rho;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;

/// Which mechanism drew the noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MechanismKind {
    /// Exact discrete Gaussian, unsampled.
    DiscreteGaussian,
    /// A sum of discrete Gaussians, a share from each agent of a secure sum; see [`super::shares`].
    GaussianShares,
    /// Exact discrete Laplace, unsampled; see [`super::VectorLaplace`].
    DiscreteLaplace,
    /// Exact discrete Gaussian on the counts of undeclared levels, of which those above a threshold are released; see
    /// [`super::threshold`].
    ThresholdHistogram,
}

impl MechanismKind {
    /// The noise in words.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::DiscreteGaussian | Self::GaussianShares => "discrete Gaussian",
            Self::ThresholdHistogram => "discrete Gaussian above a threshold",
            Self::DiscreteLaplace => "discrete Laplace",
        }
    }

    /// The letter of its parameter, whose square an event holds.
    #[must_use]
    pub fn parameter(self) -> &'static str {
        match self {
            Self::DiscreteGaussian | Self::GaussianShares | Self::ThresholdHistogram => "σ",
            Self::DiscreteLaplace => "t",
        }
    }
}

/// One use of a mechanism.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MechanismEvent {
    /// Which mechanism.
    pub kind: MechanismKind,
    /// Parameter σ² of the noise on each coordinate, in squared integer units; of shares, the least that their sum has; of Laplace noise,
    /// the square of its scale.
    pub sigma_squared: SigmaSquared,
    /// Squared L2 sensitivity of the noised vector, in squared integer units.
    pub l2_sensitivity_squared: u64,
    /// Rows one unit can contribute.
    pub rows_per_unit: u32,
    /// Marginals measured together; zero for a gradient.
    pub marginals: u32,
    /// Coordinates of the vector; zero where their number is no public figure.
    pub dimension: u32,
    /// Cost: ⌈Δ²/(2σ²) · 2⁴⁰⌉ units, of a threshold histogram its surcharge more; of shares, what [`NoiseShares::cost`] says; of Laplace noise, times the dimension.
    pub rho: Rho,
    /// How the noise is divided, where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shares: Option<NoiseShares>,
}

impl MechanismEvent {
    /// Recomputes the cost from σ², the sensitivity and, where there are any, the shares.
    ///
    /// # Errors
    /// [`MechanismError::Cost`] when the stated ρ differs; [`MechanismError::ZeroSensitivity`] for a query nobody
    /// can change; [`MechanismError::ZeroRho`] when the cost overflows the currency; [`MechanismError::Shares`] for
    /// shares that don't go with the kind or don't follow from σ².
    pub fn check(&self) -> Result<(), MechanismError> {
        if self.l2_sensitivity_squared == 0 {
            return Err(MechanismError::ZeroSensitivity);
        }
        let (sigma_squared, sensitivity) = (self.sigma_squared, self.l2_sensitivity_squared);
        let computed = match (self.kind, &self.shares) {
            (MechanismKind::DiscreteGaussian, None) => sigma_squared.cost(sensitivity),
            (MechanismKind::ThresholdHistogram, None) => super::threshold::cost(sigma_squared, sensitivity),
            (MechanismKind::DiscreteLaplace, None) => {
                super::vector_laplace::cost(sigma_squared, (sensitivity, self.dimension))
            }
            (MechanismKind::GaussianShares, Some(shares)) => {
                shares.check(sigma_squared, sensitivity)?;
                shares.cost(sigma_squared, sensitivity, self.dimension).map(|cost| cost.rho)
            }
            _ => return Err(MechanismError::Shares),
        };
        let computed = computed.ok_or(MechanismError::ZeroRho)?;
        if computed == self.rho {
            Ok(())
        } else {
            Err(MechanismError::Cost { stated: self.rho.units(), computed: computed.units() })
        }
    }
}

/// A positive variance as an exact fraction.
///
/// The numerator stays below 2⁵⁸ and the denominator at or below 2⁶⁰, which the sampler's 128-bit arithmetic needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SigmaSquared {
    num: u64,
    den: u64,
}

impl SigmaSquared {
    /// The fraction `num / den`, rounded **up** to a representable one (relative change below 2⁻⁵⁶).
    ///
    /// # Errors
    /// [`MechanismError::Fraction`] for a zero, or a value outside 1/8 to 2⁵⁷.
    pub fn new(num: u128, den: u128) -> Result<Self, MechanismError> {
        let refused = MechanismError::Fraction { num, den };
        if num == 0 || den == 0 {
            return Err(refused);
        }
        if num < 1 << NUM_BITS && den <= 1 << MAX_SHIFT {
            // Representable as it stands: the limits above keep both within 64 bits.
            return Self::in_range(num as u64, den as u64).ok_or(refused);
        }
        // Largest power of two so that ceil(num · 2^shift / den) stays below 2^58.
        let mut shift = MAX_SHIFT;
        loop {
            if let Some(scaled) = scaled_ceil(num, den, shift)
                && scaled < 1 << NUM_BITS
            {
                return Self::in_range(scaled as u64, 1 << shift).ok_or(refused);
            }
            shift = shift.checked_sub(1).ok_or(refused)?;
        }
    }

    /// Numerator.
    #[must_use]
    pub fn num(self) -> u64 {
        self.num
    }

    /// Denominator.
    #[must_use]
    pub fn den(self) -> u64 {
        self.den
    }

    /// σ² as a float, for display and weights.
    #[must_use]
    pub fn as_f64(self) -> f64 {
        self.num as f64 / self.den as f64
    }

    /// σ as a float.
    #[must_use]
    pub fn sigma(self) -> f64 {
        self.as_f64().sqrt()
    }

    /// ⌈Δ² / (2σ²) · 2⁴⁰⌉ units in exact integer arithmetic; nothing if that overflows.
    #[must_use]
    pub fn cost(self, l2_sensitivity_squared: u64) -> Option<Rho> {
        // Δ²·2^39·den / num, with the multiplication split so that 128 bits suffice.
        let num = u128::from(self.num);
        let product = u128::from(l2_sensitivity_squared) * u128::from(self.den);
        let (quotient, rest) = (product / num, product % num);
        let high = quotient.checked_mul(1 << 39)?;
        let low = (rest << 39).div_ceil(num);
        u64::try_from(high.checked_add(low)?).ok().map(Rho::from_units)
    }

    fn in_range(num: u64, den: u64) -> Option<Self> {
        let too_small = u128::from(num) << 3 < u128::from(den);
        let too_large = num / den >= 1 << 57;
        (!too_small && !too_large).then_some(Self { num, den })
    }
}

/// How a fraction looks in JSON: decimal strings, because 64-bit numbers lose digits in many readers.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Written {
    num: String,
    den: String,
}

impl JsonSchema for SigmaSquared {
    fn schema_name() -> Cow<'static, str> {
        "SigmaSquared".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Written::json_schema(generator)
    }
}

impl Serialize for SigmaSquared {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Written { num: self.num.to_string(), den: self.den.to_string() }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SigmaSquared {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let written = Written::deserialize(deserializer)?;
        let read = |text: &str| text.parse::<u64>().map_err(Error::custom);
        let (num, den) = (read(&written.num)?, read(&written.den)?);
        let fraction = Self::new(num.into(), den.into()).map_err(Error::custom)?;
        // A fraction that isn't stored as it was written would make hashes and costs disagree between readers.
        if fraction == (Self { num, den }) {
            Ok(fraction)
        } else {
            Err(Error::custom(MechanismError::Fraction { num: num.into(), den: den.into() }))
        }
    }
}

// ceil(num · 2^shift / den), or nothing when an intermediate value leaves 128 bits.
fn scaled_ceil(num: u128, den: u128, shift: u32) -> Option<u128> {
    let (quotient, rest) = (num / den, num % den);
    let high = quotient.checked_mul(1 << shift)?;
    let (mut rest, mut low) = (rest, 0u128);
    // Long division: 128-bit remainders can't be shifted by 60 bits at once.
    for _ in 0..shift {
        let carry = rest >= den - rest;
        low = (low << 1) | u128::from(carry);
        rest = if carry { rest - (den - rest) } else { rest << 1 };
    }
    high.checked_add(low)?.checked_add(u128::from(rest > 0))
}

const NUM_BITS: u32 = 58;
const MAX_SHIFT: u32 = 60;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn json_keeps_every_digit_and_refuses_what_it_would_change() {
        let fraction = SigmaSquared::new((1 << 58) - 1, 3).unwrap();
        let json = serde_json::to_string(&fraction).unwrap();
        assert_eq!(json, r#"{"num":"288230376151711743","den":"3"}"#);
        assert_eq!(serde_json::from_str::<SigmaSquared>(&json).unwrap(), fraction);
        for bad in [
            r#"{"num":"0","den":"3"}"#,
            r#"{"num":"1","den":"0"}"#,
            r#"{"num":1,"den":3}"#,
            r#"{"num":"18446744073709551615","den":"18446744073709551614"}"#,
            r#"{"num":"25","den":"1","x":"1"}"#,
        ] {
            assert!(serde_json::from_str::<SigmaSquared>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cost_is_exact_and_rounded_up() {
        // σ = 1, Δ = 1: ρ = 1/2 exactly.
        assert_eq!(SigmaSquared::new(1, 1).unwrap().cost(1), Some(Rho::from_units(1 << 39)));
        // σ² = 3: 2^39/3 isn't an integer.
        assert_eq!(SigmaSquared::new(3, 1).unwrap().cost(1), Some(Rho::from_units((1 << 39) / 3 + 1)));
        assert_eq!(SigmaSquared::new(1, 1).unwrap().cost(u64::MAX), None);
    }

    #[test]
    fn a_wrong_cost_in_an_event_is_found() {
        let sigma_squared = SigmaSquared::new(100, 1).unwrap();
        let rho = sigma_squared.cost(4).unwrap();
        let mut event = MechanismEvent {
            kind: MechanismKind::DiscreteGaussian,
            sigma_squared,
            l2_sensitivity_squared: 4,
            rows_per_unit: 2,
            marginals: 1,
            dimension: 10,
            rho,
            shares: None,
        };
        assert_eq!(event.check(), Ok(()));
        event.rho = Rho::from_units(rho.units() - 1);
        assert_eq!(
            event.check(),
            Err(MechanismError::Cost { stated: rho.units() - 1, computed: rho.units() })
        );
        event.l2_sensitivity_squared = 0;
        assert_eq!(event.check(), Err(MechanismError::ZeroSensitivity));
    }

    proptest! {
        #[test]
        fn rounding_is_up_and_tiny(num in 1u128..1 << 100, den in 1u128..1 << 60) {
            let Ok(fraction) = SigmaSquared::new(num, den) else { return Ok(()); };
            let (exact, got) = (num as f64 / den as f64, fraction.as_f64());
            prop_assert!((got / exact - 1.0).abs() < 1e-15);
            // Never below: num/den <= fraction, compared by cross-multiplying quotient and remainder.
            let whole = num / den;
            prop_assert!(u128::from(fraction.num()) / u128::from(fraction.den()) >= whole);
            prop_assert!(fraction.num() < 1 << NUM_BITS && fraction.den() <= 1 << MAX_SHIFT);
        }
    }
}
