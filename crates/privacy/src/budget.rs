//! Privacy budget as types: ε, δ and the integer currency ρ.
//!
//! Refuses NaN, infinities, zero and negative values at construction *and* at deserialization. In JSON, ε and δ are
//! decimal strings (a reader never meets a rounded float) and ρ is an integer number of 2⁻⁴⁰ units: sums of ρ
//! commute, associate and never round, which a budget filter needs.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;
use std::fmt;

/// Number of [`Rho`] units in ρ = 1.
pub const RHO_UNITS: u64 = 1 << 40;

/// Longest decimal string accepted for ε or δ.
pub const MAX_DECIMAL_CHARS: usize = 64;

/// Why a budget figure was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BudgetError {
    /// ε isn't a finite number above zero.
    #[error("epsilon out of range: expected a finite number above 0, got {got}")]
    Epsilon {
        /// The refused value.
        got: f64,
    },
    /// δ isn't strictly between 0 and 1.
    #[error("delta out of range: expected a number between 0 and 1 (both excluded), got {got}")]
    Delta {
        /// The refused value.
        got: f64,
    },
    /// ρ is negative, not finite, or above what 64-bit units hold.
    #[error("rho out of range: expected 0 to {max}, got {got}", max = u64::MAX / RHO_UNITS)]
    Rho {
        /// The refused value.
        got: f64,
    },
    /// A decimal string doesn't parse.
    #[error("not a decimal number: expected digits as in \"0.00001\", got {got:?}")]
    Decimal {
        /// The text, cut to [`MAX_DECIMAL_CHARS`].
        got: String,
    },
}

/// The ε of (ε, δ)-differential privacy; finite and above zero.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Epsilon(f64);

impl Epsilon {
    /// Checks and wraps a value.
    ///
    /// # Errors
    /// [`BudgetError::Epsilon`] unless the value is finite and above zero.
    pub fn new(value: f64) -> Result<Self, BudgetError> {
        if value.is_finite() && value > 0.0 {
            Ok(Self(value))
        } else {
            Err(BudgetError::Epsilon { got: value })
        }
    }

    /// The plain number.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }
}

/// The δ of (ε, δ)-differential privacy; strictly between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct Delta(f64);

impl Delta {
    /// Checks and wraps a value.
    ///
    /// # Errors
    /// [`BudgetError::Delta`] unless the value lies strictly between 0 and 1.
    pub fn new(value: f64) -> Result<Self, BudgetError> {
        if value > 0.0 && value < 1.0 { Ok(Self(value)) } else { Err(BudgetError::Delta { got: value }) }
    }

    /// The plain number.
    #[must_use]
    pub fn get(self) -> f64 {
        self.0
    }
}

impl fmt::Display for Epsilon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Delta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl std::str::FromStr for Epsilon {
    type Err = BudgetError;

    fn from_str(text: &str) -> Result<Self, BudgetError> {
        Self::new(parse_decimal(text)?)
    }
}

impl std::str::FromStr for Delta {
    type Err = BudgetError;

    fn from_str(text: &str) -> Result<Self, BudgetError> {
        Self::new(parse_decimal(text)?)
    }
}

macro_rules! decimal_schema {
    ($type:ident, $text:literal) => {
        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "description": $text, "maxLength": MAX_DECIMAL_CHARS })
            }
        }
    };
}

decimal_schema!(Epsilon, "epsilon: a decimal number above 0");
decimal_schema!(Delta, "delta: a decimal number above 0 and below 1");

impl Serialize for Epsilon {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Delta {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Epsilon {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Delta {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A zero-concentrated DP loss ρ in integer units of 2⁻⁴⁰.
///
/// A discrete Gaussian of variance σ² over a query of L2 sensitivity Δ costs ρ = Δ²/(2σ²), and costs add up.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct Rho(u64);

impl Rho {
    /// No loss at all.
    pub const ZERO: Self = Self(0);

    /// ρ of so many 2⁻⁴⁰ units.
    #[must_use]
    pub const fn from_units(units: u64) -> Self {
        Self(units)
    }

    /// The number of 2⁻⁴⁰ units.
    #[must_use]
    pub const fn units(self) -> u64 {
        self.0
    }

    /// The smallest ρ that isn't below `value`: for losses.
    ///
    /// # Errors
    /// [`BudgetError::Rho`] for a negative, non-finite or too large value.
    pub fn from_f64_round_up(value: f64) -> Result<Self, BudgetError> {
        Self::from_scaled(value, f64::ceil)
    }

    /// The largest ρ that isn't above `value`: for grants.
    ///
    /// # Errors
    /// [`BudgetError::Rho`] for a negative, non-finite or too large value.
    pub fn from_f64_round_down(value: f64) -> Result<Self, BudgetError> {
        Self::from_scaled(value, f64::floor)
    }

    /// ρ as a float, rounded to nearest: for display and for the ε conversions (which round up themselves).
    #[must_use]
    pub fn as_f64(self) -> f64 {
        self.0 as f64 / RHO_UNITS as f64
    }

    /// Sum, or nothing on overflow.
    #[must_use]
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).map(Self)
    }

    /// Difference, or nothing below zero.
    #[must_use]
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// Difference, zero where it would be negative.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// The fraction `num / den` of this ρ, rounded down; zero for a zero denominator.
    ///
    /// Shares of one ρ never add up to more than it as long as the fractions add up to at most one. Fractions
    /// above one saturate at the largest ρ.
    #[must_use]
    pub fn share(self, num: u64, den: u64) -> Self {
        let scaled = u128::from(self.0) * u128::from(num);
        Self(scaled.checked_div(u128::from(den)).map_or(0, |share| u64::try_from(share).unwrap_or(u64::MAX)))
    }

    // Multiplying by 2^40 only moves the exponent, so rounding happens once, in the asked direction.
    fn from_scaled(value: f64, round: fn(f64) -> f64) -> Result<Self, BudgetError> {
        let units = round(value * RHO_UNITS as f64);
        if value >= 0.0 && units < u64::MAX as f64 {
            Ok(Self(units as u64))
        } else {
            Err(BudgetError::Rho { got: value })
        }
    }
}

impl fmt::Display for Rho {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_f64())
    }
}

fn parse_decimal(text: &str) -> Result<f64, BudgetError> {
    let refused = || BudgetError::Decimal { got: text.chars().take(MAX_DECIMAL_CHARS).collect() };
    let decimal = |b: u8| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'-' | b'+');
    if text.len() > MAX_DECIMAL_CHARS || !text.bytes().all(decimal) {
        return Err(refused());
    }
    text.parse().map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn refuses_values_no_guarantee_can_have() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(Epsilon::new(bad).is_err(), "{bad}");
            assert!(Delta::new(bad).is_err(), "{bad}");
        }
        assert_eq!(Delta::new(1.0), Err(BudgetError::Delta { got: 1.0 }));
        assert!(Rho::from_f64_round_up(f64::NAN).is_err());
        assert!(Rho::from_f64_round_up(-1e-9).is_err());
        assert!(Rho::from_f64_round_down(2f64.powi(24)).is_err());
    }

    #[test]
    fn json_is_decimal_strings_and_goes_through_the_constructor() {
        assert_eq!(serde_json::to_string(&Delta::new(1e-5).unwrap()).unwrap(), "\"0.00001\"");
        assert_eq!(serde_json::from_str::<Epsilon>("\"3\"").unwrap(), Epsilon::new(3.0).unwrap());
        for bad in ["3", "\"0\"", "\"inf\"", "\"NaN\"", "\"-1\"", "\"\"", "\"0x3\"", "null"] {
            assert!(serde_json::from_str::<Epsilon>(bad).is_err(), "{bad}");
        }
        let long = format!("\"{}\"", "1".repeat(MAX_DECIMAL_CHARS + 1));
        assert!(serde_json::from_str::<Epsilon>(&long).is_err());
        assert_eq!(serde_json::to_string(&Rho::from_units(7)).unwrap(), "7");
    }

    #[test]
    fn rho_rounds_in_the_asked_direction() {
        let unit = 2f64.powi(-40);
        assert_eq!(Rho::from_f64_round_up(unit * 1.5).unwrap().units(), 2);
        assert_eq!(Rho::from_f64_round_down(unit * 1.5).unwrap().units(), 1);
        assert_eq!(Rho::from_f64_round_up(unit * 3.0).unwrap().units(), 3);
        assert_eq!(Rho::from_f64_round_up(f64::MIN_POSITIVE).unwrap().units(), 1);
    }

    #[test]
    fn shares_never_exceed_the_whole() {
        let whole = Rho::from_units(1_000_003);
        let parts: u64 = (1..=6).map(|i| whole.share(i, 21).units()).sum();
        assert!(parts <= whole.units() && parts + 6 > whole.units());
        assert_eq!(whole.share(1, 0), Rho::ZERO);
        assert_eq!(Rho::from_units(u64::MAX).share(2, 1).units(), u64::MAX);
    }
}
