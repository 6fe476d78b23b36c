//! Integer clipping: one unit's vector with a bounded norm, before noise.
//!
//! A unit's float vector is scaled down to L2 norm `clip`, multiplied by a power of two, truncated toward zero
//! (which never raises a norm) and checked again in integers, so the sensitivity claim doesn't rest on float
//! rounding. Non-finite input becomes the zero vector: skipping or failing on it would itself tell something.

/// Why a quantisation plan was refused. Depends on the plan, never on values.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClipError {
    /// The clip norm isn't a finite number above zero.
    #[error("clip norm out of range: expected a finite number above 0, got {got}")]
    Clip {
        /// The refused norm.
        got: f64,
    },
    /// The scale isn't a power of two.
    #[error("scale must be a power of two, got {got}")]
    Scale {
        /// The refused scale.
        got: u64,
    },
    /// `clip · scale` is below one or above [`MAX_INTEGER_NORM`].
    #[error("integer norm out of range: expected clip times scale in 1..={MAX_INTEGER_NORM}, got {got}")]
    Norm {
        /// The product.
        got: f64,
    },
}

/// Largest integer norm: its square fits 62 bits, so sums over units stay within `i64` and σ² within the sampler.
pub const MAX_INTEGER_NORM: u64 = 1 << 28;

/// The largest L2 norm, in integer units, a vector clipped to `clip` at `scale` can have: ⌊clip · scale⌋.
///
/// # Errors
/// [`ClipError`] names the plan figure that is out of range.
pub fn integer_norm(clip: f64, scale: u64) -> Result<u64, ClipError> {
    if !(clip.is_finite() && clip > 0.0) {
        return Err(ClipError::Clip { got: clip });
    }
    if !scale.is_power_of_two() {
        return Err(ClipError::Scale { got: scale });
    }
    // A power of two only moves the exponent, so the product is exact.
    let norm = clip * scale as f64;
    if (1.0..=MAX_INTEGER_NORM as f64).contains(&norm) {
        Ok(norm as u64)
    } else {
        Err(ClipError::Norm { got: norm })
    }
}

/// Squared L2 sensitivity of a sum of such vectors when one unit contributes one vector: ⌊clip · scale⌋².
///
/// # Errors
/// As [`integer_norm`].
pub fn l2_sensitivity_squared(clip: f64, scale: u64) -> Result<u64, ClipError> {
    integer_norm(clip, scale).map(|norm| norm * norm)
}

/// Clips one unit's vector to L2 norm `clip`, scales it and truncates toward zero.
///
/// The result has the input's length and an L2 norm of at most ⌊clip · scale⌋ whatever the input was.
///
/// # Errors
/// As [`integer_norm`]; never because of values in `vec`.
pub fn quantize_clipped(vec: &[f32], clip: f64, scale: u64) -> Result<Vec<i64>, ClipError> {
    let limit = integer_norm(clip, scale)?;
    let norm_squared: f64 = vec.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    if !norm_squared.is_finite() {
        return Ok(vec![0; vec.len()]);
    }
    let mut factor = (limit as f64 / norm_squared.sqrt()).min(scale as f64);
    let mut shrink = SHRINK;
    loop {
        // Finite and at most 2^28 in absolute value, so the cast truncates toward zero exactly.
        let scaled: Vec<i64> = vec.iter().map(|v| (f64::from(*v) * factor) as i64).collect();
        if norm_within(&scaled, limit) {
            return Ok(scaled);
        }
        // Float rounding left the norm a hair above the limit. Shrinking ends: the zero vector fits.
        factor *= 1.0 - shrink;
        shrink = (shrink * 2.0).min(0.5);
    }
}

/// Whether an integer vector's L2 norm is at most `limit`, computed without rounding.
#[must_use]
pub fn norm_within(vec: &[i64], limit: u64) -> bool {
    let mut sum = 0u128;
    for v in vec {
        let magnitude = u128::from(v.unsigned_abs());
        let Some(next) = magnitude.checked_mul(magnitude).and_then(|square| sum.checked_add(square)) else {
            return false;
        };
        sum = next;
    }
    sum <= u128::from(limit) * u128::from(limit)
}

const SHRINK: f64 = 1e-12;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn short_vectors_are_scaled_and_truncated_toward_zero() {
        assert_eq!(quantize_clipped(&[0.3, -0.3, 0.0], 1.0, 16).unwrap(), vec![4, -4, 0]);
    }

    #[test]
    fn non_finite_input_is_the_zero_vector_not_an_error() {
        assert_eq!(quantize_clipped(&[f32::NAN, 1.0], 1.0, 16).unwrap(), vec![0, 0]);
        assert_eq!(quantize_clipped(&[f32::INFINITY, 1.0], 1.0, 16).unwrap(), vec![0, 0]);
        assert_eq!(quantize_clipped(&[], 1.0, 16).unwrap(), Vec::<i64>::new());
    }

    #[test]
    fn a_fractional_integer_norm_is_floored() {
        let out = quantize_clipped(&[3.0, 4.0], 2.5, 1).unwrap();
        assert_eq!(out, vec![1, 1]);
    }

    #[test]
    fn plans_out_of_range_are_refused_by_name() {
        assert_eq!(integer_norm(0.0, 16), Err(ClipError::Clip { got: 0.0 }));
        assert_eq!(integer_norm(1.0, 12), Err(ClipError::Scale { got: 12 }));
        assert_eq!(integer_norm(1.0, MAX_INTEGER_NORM), Ok(MAX_INTEGER_NORM));
        assert!(matches!(integer_norm(1.0, MAX_INTEGER_NORM * 2), Err(ClipError::Norm { .. })));
        assert!(matches!(integer_norm(0.01, 16), Err(ClipError::Norm { .. })));
        assert_eq!(l2_sensitivity_squared(2.5, 2), Ok(25));
    }

    proptest! {
        #[test]
        fn integer_norm_never_exceeds_the_limit(
            vec in prop::collection::vec(prop_oneof![-1e3f32..1e3, -1e-3f32..1e-3, -1e30f32..1e30], 0..64),
            clip in 0.01f64..50.0,
            bits in 8u32..20,
        ) {
            let scale = 1u64 << bits;
            let out = quantize_clipped(&vec, clip, scale).unwrap();
            prop_assert_eq!(out.len(), vec.len());
            prop_assert!(norm_within(&out, integer_norm(clip, scale).unwrap()));
        }

        #[test]
        fn each_coordinate_keeps_its_sign_and_shrinks(vec in prop::collection::vec(-1f32..1.0, 1..32)) {
            let out = quantize_clipped(&vec, 0.5, 1 << 16).unwrap();
            for (q, v) in out.iter().zip(&vec) {
                prop_assert!((*q as f64).abs() <= f64::from(v.abs()) * 65536.0);
                prop_assert!(*q == 0 || (*q > 0) == (*v > 0.0));
            }
        }
    }
}
