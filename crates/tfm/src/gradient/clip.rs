//! The L2 clip of a unit's gradient and its integer form, whose norm the noise is calibrated to.

use crate::{error::TfmError, simd::wide};

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
        let mut integers = vec![0; gradient.len()];
        self.integers_into(gradient, &mut integers);
        integers
    }

    /// As [`Self::integers`], into a slice of the gradient's length that is used again for the next unit. Says whether the
    /// gradient was within the norm.
    pub(super) fn integers_into(&self, gradient: &[f64], integers: &mut [i64]) -> bool {
        let norm = square(gradient).sqrt();
        if !norm.is_finite() {
            integers.fill(0);
            return false;
        }
        let bound = self.integer_norm();
        let limit = u128::from(bound) * u128::from(bound);
        // What rounding may take off a sum of as many squares is a fraction of this.
        let certain = limit as f64 * (1.0 - 2.0 * f64::EPSILON * (gradient.len() + 2) as f64);
        let mut factor = self.scale * (bound as f64 / self.scale / norm).min(1.0);
        loop {
            let rounded = truncate(gradient, factor, integers);
            if rounded <= certain || exact_square(integers) <= limit {
                return norm <= self.norm;
            }
            // Rounding of the factor left the norm a hair too large.
            factor *= 1.0 - 1e-12;
        }
    }

    /// Whether sums over this many units stay within 64 bits whatever the gradients are.
    pub(super) fn sums_fit(&self, units: usize) -> bool {
        // No entry is above the norm.
        (units as u128).saturating_mul(u128::from(self.integer_norm())) <= i64::MAX as u128
    }
}

/// The exact sum of squares.
fn exact_square(integers: &[i64]) -> u128 {
    integers.iter().map(|v| u128::from(v.unsigned_abs()) * u128::from(v.unsigned_abs())).sum()
}

wide!(
    /// Truncates `factor * gradient`, below 2^51 in size, toward zero; returns the sum of squares, rounded.
    fn truncate(gradient: &'a [f64], factor: f64, integers: &'a mut [i64]) -> f64 => truncate_loop
);

#[inline(always)]
fn truncate_loop<const FUSED: bool>(gradient: &[f64], factor: f64, integers: &mut [i64]) -> f64 {
    let mut lanes = [0f64; 4];
    let (chunks, rest) = gradient.as_chunks::<4>();
    let (into, into_rest) = integers.as_chunks_mut::<4>();
    for (chunk, into) in chunks.iter().zip(into) {
        for ((g, i), lane) in chunk.iter().zip(into).zip(&mut lanes) {
            let whole = (g * factor).trunc();
            *lane += whole * whole;
            *i = to_integer(whole);
        }
    }
    let mut total = lanes.iter().sum::<f64>();
    for (g, i) in rest.iter().zip(into_rest) {
        let whole = (g * factor).trunc();
        total += whole * whole;
        *i = to_integer(whole);
    }
    total
}

/// A whole number below 2^51 in size: added to 1.5 * 2^52 it stands in the lowest bits. A cast has no wide instruction.
#[inline(always)]
fn to_integer(whole: f64) -> i64 {
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    (whole + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()) as i64
}

wide!(
    /// Adds integers to sums that are known to hold them.
    pub(super) fn add_integers(sums: &'a mut [i64], integers: &'a [i64]) => add_integers_loop
);

#[inline(always)]
fn add_integers_loop<const FUSED: bool>(sums: &mut [i64], integers: &[i64]) {
    for (sum, value) in sums.iter_mut().zip(integers) {
        *sum = sum.wrapping_add(*value);
    }
}

wide!(
    /// Sum of squares in four independent lanes.
    pub(super) fn square(values: &'a [f64]) -> f64 => square_loop
);

#[inline(always)]
fn square_loop<const FUSED: bool>(values: &[f64]) -> f64 {
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

    use super::{Clip, to_integer};

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

    /// Whole numbers up to the largest norm and beyond come out as they are; so do truncated entries at the grid's ends.
    #[test]
    fn integers_are_exact_at_the_ends_of_the_grid() {
        for whole in [0i64, 1, -1, 65_535, -65_536, 1 << 40, -(1 << 40), (1 << 51) - 1, -(1 << 51) + 1] {
            assert_eq!(to_integer(whole as f64), whole);
        }
        let clip = Clip::new(1.0, 2f64.powi(40)).unwrap();
        for value in [0.6, -0.8, 0.123_456_789, 0.999_999_999] {
            assert_eq!(clip.integers(&[value, 0.0]), [(value * 2f64.powi(40)).trunc() as i64, 0]);
        }
        // Five equal entries at the norm: one over the square root of five each.
        let fifth = (2f64.powi(40) / 5f64.sqrt()) as i64;
        let clipped = clip.integers(&[3.0; 5]);
        assert!(clipped.iter().all(|v| (v - fifth).abs() <= 2), "{clipped:?}");
    }

    #[test]
    fn sums_fit_up_to_the_last_unit_that_can_not_overflow() {
        let clip = Clip::new(1.0, 2f64.powi(40)).unwrap();
        assert!(clip.sums_fit((1 << 23) - 1) && !clip.sums_fit(1 << 23));
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
