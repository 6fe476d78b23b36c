//! Scalar and slice arithmetic that the compiler can vectorise: exponential, error function, sums.
//!
//! What is to be inlined into loops for wide processors says so (see [`crate::simd`]).
//!
//! The standard library's `exp` and `erf` are scalar calls; these are branch-free polynomials that stay within
//! 3e-7 of the exact value, which is below the rounding of the surrounding single-precision sums. A `NaN` input
//! stays `NaN`, so a diverged training run is seen and not hidden.

use crate::simd::fused;

/// `e^x` for `x` clamped to `[-87, 88]`; relative error below 3e-7.
#[inline(always)]
pub(crate) fn exp<const FUSED: bool>(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = fused::<FUSED>(x, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fused::<FUSED>(n, -LN2_LOW, fused::<FUSED>(n, -LN2_HIGH, x));
    let poly =
        polynomial::<FUSED, 7>(r, [1.0, 1.0, 0.5, 0.166_666_67, 0.041_666_668, 0.008_333_334, 0.001_388_889]);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    poly * f32::from_bits(exponent)
}

/// A polynomial by Horner's rule, coefficients from the constant on.
#[inline(always)]
fn polynomial<const FUSED: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    for i in (0..N - 1).rev() {
        sum = fused::<FUSED>(sum, x, coefficients[i]);
    }
    sum
}

/// `tanh x`, absolute error below 3e-7.
#[inline(always)]
pub(crate) fn tanh<const FUSED: bool>(x: f32) -> f32 {
    1.0 - 2.0 / (exp::<FUSED>(2.0 * x) + 1.0)
}

/// Standard normal distribution function and density at `x`: `(Phi(x), phi(x))`.
///
/// Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7).
#[inline(always)]
pub(crate) fn normal<const FUSED: bool>(x: f32) -> (f32, f32) {
    const P: f32 = 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2;
    let gauss = exp::<FUSED>(-0.5 * x * x);
    let t = 1.0 / fused::<FUSED>(P, x.abs(), 1.0);
    let poly =
        t * polynomial::<FUSED, 5>(t, [0.254_829_6, -0.284_496_74, 1.421_413_7, -1.453_152_1, 1.061_405_4]);
    let upper = 0.5 * poly * gauss;
    let cdf = if x < 0.0 { upper } else { 1.0 - upper };
    (cdf, gauss * 0.398_942_3)
}

/// Sum in eight independent lanes.
#[inline(always)]
pub(crate) fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (chunks, rest) = values.as_chunks::<8>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

/// Inner product in eight independent lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (ca, ra) = a.as_chunks::<8>();
    let (cb, rb) = b.as_chunks::<8>();
    for (x, y) in ca.iter().zip(cb) {
        for ((lane, u), v) in lanes.iter_mut().zip(x).zip(y) {
            *lane += u * v;
        }
    }
    lanes.iter().sum::<f32>() + ra.iter().zip(rb).map(|(u, v)| u * v).sum::<f32>()
}

/// Replaces `scores` by `softmax(scale * scores)` in place.
#[inline(always)]
pub(crate) fn softmax<const FUSED: bool>(scores: &mut [f32], scale: f32) {
    let mut peaks = [f32::NEG_INFINITY; 8];
    let (chunks, rest) = scores.as_chunks::<8>();
    for chunk in chunks {
        for (peak, s) in peaks.iter_mut().zip(chunk) {
            // Comparison order keeps a NaN out of the peak; it reappears through `exp` below.
            *peak = if *s > *peak { *s } else { *peak };
        }
    }
    let mut peak = f32::NEG_INFINITY;
    for &s in peaks.iter().chain(rest) {
        peak = if s > peak { s } else { peak };
    }
    for s in scores.iter_mut() {
        *s = exp::<FUSED>((*s - peak) * scale);
    }
    let inverse = 1.0 / sum(scores);
    for s in scores.iter_mut() {
        *s *= inverse;
    }
}

#[cfg(test)]
mod tests {
    use super::{dot, exp, normal, softmax, sum, tanh};

    #[test]
    fn elementary_functions_match_double_precision() {
        for i in -8000..=8000 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            for value in [exp::<false>(x), exp::<true>(x)] {
                assert!(((f64::from(value) - exact) / exact).abs() < 1e-6, "exp({x})");
            }
            for value in [tanh::<false>(x), tanh::<true>(x)] {
                assert!((f64::from(value) - f64::from(x).tanh()).abs() < 1e-6, "tanh({x})");
            }
        }
        // Phi at -3, -1, 0, 0.5, 2 (tables of the normal distribution, seven digits).
        for (x, phi) in
            [(-3.0, 0.001_349_9), (-1.0, 0.158_655_3), (0.0, 0.5), (0.5, 0.691_462_5), (2.0, 0.977_249_9)]
        {
            for value in [normal::<false>(x).0, normal::<true>(x).0] {
                assert!((f64::from(value) - phi).abs() < 3e-7, "Phi({x})");
            }
        }
        assert!(exp::<false>(f32::NAN).is_nan() && exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn lane_sums_cover_the_remainder() {
        let a: Vec<f32> = (0..19).map(|i| i as f32).collect();
        assert!((sum(&a) - 171.0).abs() < 1e-6);
        assert!((dot(&a, &a) - 2109.0).abs() < 1e-3);
        let mut s = vec![1.0, 2.0, 3.0];
        softmax::<true>(&mut s, 2.0);
        // softmax(2, 4, 6) by hand.
        assert!((s[2] - 0.866_813_3).abs() < 1e-6 && (sum(&s) - 1.0).abs() < 1e-6);
    }
}
