//! The L2 clip of a unit's gradient and its integer form, whose norm the noise is calibrated to.

use crate::error::TfmError;

/// L2 clip of one unit's gradient and the grid of its integer form.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    norm: f64,
    scale: f64,
}

impl Clip {
    /// A clip norm in gradient units and a power-of-two number of integer steps per gradient unit.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] unless the norm is finite and above 0, the scale a power of two within
    /// `[2^-20, 2^40]`, and the integer bound `floor(norm * scale)` within `[1, 2^40]`.
    pub fn new(norm: f64, scale: f64) -> Result<Self, TfmError> {
        let bad =
            |field, expected, got: f64| Err(TfmError::BadConfig { field, expected, got: got.to_string() });
        if !(norm.is_finite() && norm > 0.0) {
            return bad("clip norm", "finite and above 0", norm);
        }
        // A power of two has an empty mantissa.
        let power_of_two = scale.is_finite() && scale > 0.0 && scale.to_bits().trailing_zeros() >= 52;
        if !power_of_two || !(0.5f64.powi(20)..=2f64.powi(40)).contains(&scale) {
            return bad("gradient scale", "a power of two from 2^-20 to 2^40", scale);
        }
        let bound = (norm * scale).floor();
        if !(1.0..=2f64.powi(40)).contains(&bound) {
            return bad("clip norm times scale", "from 1 to 2^40", norm * scale);
        }
        Ok(Self { norm, scale })
    }

    /// The integer L2 bound of one unit, `floor(norm * scale)`: the sensitivity of the sum.
    #[must_use]
    pub fn integer_norm(&self) -> u64 {
        // Between 1 and 2^40 by construction.
        (self.norm * self.scale).floor() as u64
    }

    /// Clips a unit's gradient to the norm, scales and truncates each entry toward zero.
    ///
    /// A gradient with an entry that isn't finite becomes zero, so that no row can make the round fail.
    #[must_use]
    pub fn integers(&self, gradient: &[f64]) -> Vec<i64> {
        let mut integers = Vec::with_capacity(gradient.len());
        self.integers_into(gradient, &mut integers);
        integers
    }

    /// As [`Self::integers`], into a vector that is used again for the next unit.
    pub fn integers_into(&self, gradient: &[f64], integers: &mut Vec<i64>) {
        integers.clear();
        let norm = square(gradient).sqrt();
        if !norm.is_finite() {
            integers.resize(gradient.len(), 0);
            return;
        }
        let bound = self.integer_norm();
        let limit = u128::from(bound) * u128::from(bound);
        let mut factor = self.scale * (bound as f64 / self.scale / norm).min(1.0);
        loop {
            integers.clear();
            // The cast truncates toward zero.
            integers.extend(gradient.iter().map(|g| (g * factor) as i64));
            let square: u128 =
                integers.iter().map(|v| u128::from(v.unsigned_abs()) * u128::from(v.unsigned_abs())).sum();
            if square <= limit {
                return;
            }
            // Rounding of the factor left the norm a hair too large.
            factor *= 1.0 - 1e-12;
        }
    }
}

/// Sum of squares in four independent lanes.
pub(super) fn square(values: &[f64]) -> f64 {
    let mut lanes = [0f64; 4];
    let (chunks, rest) = values.as_chunks::<4>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v * v;
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|v| v * v).sum::<f64>()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::Clip;

    #[test]
    fn clip_refuses_grids_that_are_not_powers_of_two() {
        assert!(Clip::new(1.0, 1024.0).is_ok() && Clip::new(1.0, 0.5f64.powi(3)).is_err());
        for (norm, scale) in
            [(1.0, 1000.0), (0.0, 1024.0), (f64::NAN, 1024.0), (1.0, 2f64.powi(41)), (1e-9, 1024.0)]
        {
            assert!(Clip::new(norm, scale).is_err(), "{norm} {scale}");
        }
        assert_eq!(Clip::new(1.0, 1024.0).unwrap().integers(&[f64::NAN, 1.0]), [0, 0]);
        assert_eq!(Clip::new(1.0, 4.0).unwrap().integers(&[0.3, -0.3]), [1, -1]);
    }

    proptest! {
        /// Whatever the gradient, the integer norm keeps the bound that the noise is calibrated to.
        #[test]
        fn integer_norm_never_exceeds_the_bound(
            gradient in prop::collection::vec(-1e6f64..1e6, 1..60),
            norm in 1e-3f64..1e3,
            power in 4i32..30,
        ) {
            let Ok(clip) = Clip::new(norm, 2f64.powi(power)) else { return Ok(()) };
            let plain: f64 = gradient.iter().map(|g| g * g).sum();
            prop_assert!((super::square(&gradient) - plain).abs() <= 1e-12 * plain);
            let square: u128 = clip
                .integers(&gradient)
                .iter()
                .map(|v| u128::from(v.unsigned_abs()).pow(2))
                .sum();
            prop_assert!(square <= u128::from(clip.integer_norm()).pow(2));
        }
    }
}
