//! The inner loops: rows times a packed matrix, norms, activations and softmax weights, eight values side by side.
//!
//! Every loop is compiled twice, for processors with AVX2 and FMA and for any other, and the fitting one is taken at
//! run time. What is computed for a row doesn't depend on how many rows are computed with it: each output sums its
//! products in the same order, whatever the tile. So a batch gives the bits that single rows give.

use std::any::TypeId;

use half::f16;
use pulp::{Scalar256b, Simd, WithSimd};

use crate::ops::math::{exp, normal, tanh};

/// Runs loops with the widest instructions that this processor has.
pub(super) fn dispatch<Op: WithSimd>(op: Op) -> Op::Output {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let Some(simd) = pulp::x86::V3::try_new() {
        return Simd::vectorize(simd, op);
    }
    Scalar256b.vectorize(op)
}

/// `out[r][o] += sum over k of x[r][k] * w[k][o]`, all sizes in values.
pub(super) struct Product<'a> {
    /// Rows of the left side, `x_stride` apart.
    pub(super) x: &'a [f32],
    pub(super) x_stride: usize,
    pub(super) rows: usize,
    /// Length of the sums.
    pub(super) depth: usize,
    /// Strips of eight outputs, each `(depth, 8)`, `strip_stride` apart.
    pub(super) strips: &'a [f32],
    pub(super) strip_stride: usize,
    /// Outputs per row; the last strip may be wider.
    pub(super) outputs: usize,
    /// Rows of the result, `out_stride` apart.
    pub(super) out: &'a mut [f32],
    pub(super) out_stride: usize,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        if self.outputs <= NARROW && self.depth >= LONG {
            self.rows_by::<S, 3, 2>(simd);
        } else {
            self.rows_by::<S, 6, 1>(simd);
        }
    }
}

impl Product<'_> {
    /// All rows, `MOST` at a time, every sum in `PARTS` parts. `MOST` is 6 or 3.
    #[inline(always)]
    fn rows_by<S: Simd, const MOST: usize, const PARTS: usize>(&mut self, simd: S) {
        let whole = self.rows - self.rows % MOST;
        let strips = self.outputs.div_ceil(LANES);
        // A pair of strips stays in the first-level cache while all rows pass it.
        if whole > 0 {
            for first in (0..strips).step_by(2) {
                for row in (0..whole).step_by(MOST) {
                    if first + 1 < strips {
                        self.tile::<S, MOST, 2, PARTS>(simd, row, first);
                    } else {
                        self.tile::<S, MOST, 1, PARTS>(simd, row, first);
                    }
                }
            }
        }
        match (self.rows - whole, PARTS) {
            (1, 1) => self.sweep::<S, 1, 8, PARTS>(simd, whole, strips),
            (2, 1) => self.sweep::<S, 2, 4, PARTS>(simd, whole, strips),
            (3, 1) => self.sweep::<S, 3, 4, PARTS>(simd, whole, strips),
            (4, 1) => self.sweep::<S, 4, 2, PARTS>(simd, whole, strips),
            (5, 1) => self.sweep::<S, 5, 2, PARTS>(simd, whole, strips),
            (1, _) => self.sweep::<S, 1, 4, PARTS>(simd, whole, strips),
            (2, _) => self.sweep::<S, 2, 2, PARTS>(simd, whole, strips),
            _ => {}
        }
    }

    /// All strips for `R` rows, `V` at a time.
    #[inline(always)]
    fn sweep<S: Simd, const R: usize, const V: usize, const PARTS: usize>(
        &mut self,
        simd: S,
        row: usize,
        strips: usize,
    ) {
        let mut at = 0;
        while strips - at >= V {
            self.tile::<S, R, V, PARTS>(simd, row, at);
            at += V;
        }
        if V > 4 && strips - at >= 4 {
            self.tile::<S, R, 4, PARTS>(simd, row, at);
            at += 4;
        }
        if V > 2 && strips - at >= 2 {
            self.tile::<S, R, 2, PARTS>(simd, row, at);
            at += 2;
        }
        if strips > at {
            self.tile::<S, R, 1, PARTS>(simd, row, at);
        }
    }

    /// `R` rows times `V` strips, sums in registers: of every `PARTS`-th product, so that one sum needn't wait for the
    /// one before.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize, const PARTS: usize>(
        &mut self,
        simd: S,
        row: usize,
        strip: usize,
    ) {
        let depth = self.depth;
        let mut x: [&[f32]; R] = [&[]; R];
        for (i, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + i) * self.x_stride..][..depth];
        }
        let mut w: [&[S::f32s]; V] = [&[]; V];
        for (v, w) in w.iter_mut().enumerate() {
            *w =
                &S::as_simd_f32s(&self.strips[(strip + v) * self.strip_stride..][..depth * LANES]).0[..depth];
        }
        let zero = simd.splat_f32s(0.0);
        let mut sums = [[[zero; V]; R]; PARTS];
        let whole = depth - depth % PARTS;
        for k in (0..whole).step_by(PARTS) {
            for (part, sums) in sums.iter_mut().enumerate() {
                add_products(simd, sums, &x, &w, k + part);
            }
        }
        for k in whole..depth {
            add_products(simd, &mut sums[0], &x, &w, k);
        }
        for i in 0..R {
            for v in 0..V {
                let mut sum = sums[0][i][v];
                for part in &sums[1..] {
                    sum = simd.add_f32s(sum, part[i][v]);
                }
                let column = (strip + v) * LANES;
                let to = &mut self.out[(row + i) * self.out_stride + column..];
                let left = self.outputs - column;
                if left >= LANES {
                    if let Some(to) = S::as_mut_simd_f32s(&mut to[..LANES]).0.first_mut() {
                        *to = simd.add_f32s(*to, sum);
                    }
                } else {
                    let before = simd.partial_load_f32s(&to[..left]);
                    simd.partial_store_f32s(&mut to[..left], simd.add_f32s(before, sum));
                }
            }
        }
    }
}

/// Adds the products of input `k`.
#[inline(always)]
fn add_products<S: Simd, const R: usize, const V: usize>(
    simd: S,
    sums: &mut [[S::f32s; V]; R],
    x: &[&[f32]; R],
    w: &[&[S::f32s]; V],
    k: usize,
) {
    let mut weights = [simd.splat_f32s(0.0); V];
    for (weight, w) in weights.iter_mut().zip(w) {
        *weight = w[k];
    }
    for (sums, x) in sums.iter_mut().zip(x) {
        let x = simd.splat_f32s(x[k]);
        for (sum, weight) in sums.iter_mut().zip(&weights) {
            *sum = fused(simd, x, *weight, *sum);
        }
    }
}

/// `a * b + c`, in one rounding where the processor has the instruction.
#[inline(always)]
fn fused<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
    if TypeId::of::<S>() == TypeId::of::<Scalar256b>() {
        simd.add_f32s(simd.mul_f32s(a, b), c)
    } else {
        simd.mul_add_f32s(a, b, c)
    }
}

/// `(x - mean) / sqrt(var + 1e-5) * gain + bias` of each row of `gain.len()` values.
pub(super) fn layer_norm(x: &[f32], gain: &[f32], bias: &[f32], out: &mut [f32]) {
    dispatch(LayerNorm { x, gain, bias, out });
}

struct LayerNorm<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    bias: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.gain.len();
        for (row, to) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let mean = lane_sum(row, 0.0, false) / width as f32;
            let variance = lane_sum(row, mean, true) / width as f32;
            let inverse = 1.0 / (variance + EPS).sqrt();
            for (((o, v), g), b) in to.iter_mut().zip(row).zip(self.gain).zip(self.bias) {
                *o = (v - mean) * inverse * g + b;
            }
        }
    }
}

/// Sum of the values less `mean`, or of their squares, in eight lanes.
#[inline(always)]
fn lane_sum(values: &[f32], mean: f32, square: bool) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            let v = v - mean;
            *lane += if square { v * v } else { v };
        }
    }
    let mut total = 0f32;
    for lane in lanes {
        total += lane;
    }
    for v in rest {
        let v = v - mean;
        total += if square { v * v } else { v };
    }
    total
}

/// `x * Phi(x)` in place.
pub(super) fn gelu(values: &mut [f32]) {
    dispatch(Gelu(values));
}

struct Gelu<'a>(&'a mut [f32]);

impl WithSimd for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (chunks, rest) = self.0.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for v in chunk.iter_mut() {
                *v *= normal(*v).0;
            }
        }
        for v in rest {
            *v *= normal(*v).0;
        }
    }
}

/// `q *= base * (1 + tanh t)`; `base` repeats along the rows.
pub(super) fn gate(q: &mut [f32], t: &[f32], base: &[f32]) {
    dispatch(Gate { q, t, base });
}

struct Gate<'a> {
    q: &'a mut [f32],
    t: &'a [f32],
    base: &'a [f32],
}

impl WithSimd for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.base.len();
        for (q, t) in self.q.chunks_exact_mut(width).zip(self.t.chunks_exact(width)) {
            for ((q, t), b) in q.iter_mut().zip(t).zip(self.base) {
                *q *= b * (1.0 + tanh(*t));
            }
        }
    }
}

/// Replaces each row of `width` scores by `exp(scale * (score - peak))` and stores the inverse of their sum.
pub(super) fn softmax_weights(scores: &mut [f32], width: usize, scale: f32, inverses: &mut [f32]) {
    dispatch(SoftmaxWeights { scores, width, scale, inverses });
}

struct SoftmaxWeights<'a> {
    scores: &'a mut [f32],
    width: usize,
    scale: f32,
    inverses: &'a mut [f32],
}

impl WithSimd for SoftmaxWeights<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (row, inverse) in self.scores.chunks_exact_mut(self.width).zip(self.inverses) {
            *inverse = weights_of(row, self.scale);
        }
    }
}

#[inline(always)]
fn weights_of(row: &mut [f32], scale: f32) -> f32 {
    let mut peaks = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
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
    let mut sums = [0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (s, sum) in chunk.iter_mut().zip(&mut sums) {
            *s = exp((*s - peak) * scale);
            *sum += *s;
        }
    }
    let mut total = 0f32;
    for sum in sums {
        total += sum;
    }
    for s in rest {
        *s = exp((*s - peak) * scale);
        total += *s;
    }
    1.0 / total
}

/// Widens halves.
pub(super) fn widen(from: &[f16], into: &mut [f32]) {
    dispatch(Widen { from, into });
}

struct Widen<'a> {
    from: &'a [f16],
    into: &'a mut [f32],
}

impl WithSimd for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (from, from_rest) = self.from.as_chunks::<LANES>();
        let (into, into_rest) = self.into.as_chunks_mut::<LANES>();
        for (from, into) in from.iter().zip(into) {
            for (half, wide) in from.iter().zip(into) {
                *wide = widened(*half);
            }
        }
        for (half, wide) in from_rest.iter().zip(into_rest) {
            *wide = widened(*half);
        }
    }
}

/// A half: its exponent and fraction as those of a single, which differ by a factor of `2^112`, and its sign. What isn't
/// finite stays so.
#[inline(always)]
fn widened(half: f16) -> f32 {
    let bits = u32::from(half.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let beyond = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | beyond | (bits & 0x8000) << 16)
}

/// Values side by side, and outputs of a strip.
pub(super) const LANES: usize = 8;
/// Outputs up to which there are too few sums to keep the processor busy, and inputs from which that costs: every
/// sum is then computed in two parts.
const NARROW: usize = 32;
const LONG: usize = 64;
const EPS: f32 = 1e-5;

#[cfg(test)]
mod tests {
    use half::f16;
    use pulp::{Scalar256b, Simd};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::{LANES, Product, dispatch, gelu, layer_norm, softmax_weights, widen};

    struct Case {
        x: Vec<f32>,
        strips: Vec<f32>,
        out: Vec<f32>,
    }

    fn case(rows: usize, depth: usize, outputs: usize) -> Case {
        let mut rng = ChaCha20Rng::seed_from_u64((rows * 31 + depth * 7 + outputs) as u64);
        let mut draw = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0f32)).collect::<Vec<_>>();
        Case {
            x: draw(rows * depth),
            strips: draw(outputs.div_ceil(LANES) * depth * LANES),
            out: draw(rows * outputs),
        }
    }

    fn product<'a>(
        c: &'a Case,
        rows: usize,
        depth: usize,
        outputs: usize,
        out: &'a mut [f32],
    ) -> Product<'a> {
        Product {
            x: &c.x,
            x_stride: depth,
            rows,
            depth,
            strips: &c.strips,
            strip_stride: depth * LANES,
            outputs,
            out,
            out_stride: outputs,
        }
    }

    /// Against sums in double precision, for every tile and remainder; both compilations.
    #[test]
    fn products_equal_plain_sums_in_every_tile() {
        for rows in [1usize, 2, 3, 4, 5, 6, 7, 13] {
            for (depth, outputs) in
                [(1usize, 1usize), (5, 7), (32, 64), (33, 131), (16, 24), (9, 40), (201, 29), (64, 8)]
            {
                let c = case(rows, depth, outputs);
                let (mut wide, mut plain) = (c.out.clone(), c.out.clone());
                dispatch(product(&c, rows, depth, outputs, &mut wide));
                Scalar256b.vectorize(product(&c, rows, depth, outputs, &mut plain));
                for r in 0..rows {
                    for o in 0..outputs {
                        let weight = |k: usize| c.strips[(o / LANES * depth + k) * LANES + o % LANES];
                        let sum: f64 =
                            (0..depth).map(|k| f64::from(c.x[r * depth + k]) * f64::from(weight(k))).sum();
                        let exact = f64::from(c.out[r * outputs + o]) + sum;
                        for got in [wide[r * outputs + o], plain[r * outputs + o]] {
                            assert!(
                                (f64::from(got) - exact).abs() < 1e-5,
                                "{rows} {depth} {outputs}: {got} {exact}"
                            );
                        }
                    }
                }
            }
        }
    }

    /// Attack on "batched equals single": another tile for the same row must not change a bit.
    #[test]
    fn a_row_s_bits_do_not_depend_on_the_rows_beside_it() {
        for (rows, depth, outputs) in [(17, 37, 75), (17, 131, 32), (11, 64, 5)] {
            let c = case(rows, depth, outputs);
            let mut all = c.out.clone();
            dispatch(product(&c, rows, depth, outputs, &mut all));
            for r in 0..rows {
                let one = Case {
                    x: c.x[r * depth..][..depth].to_vec(),
                    strips: c.strips.clone(),
                    out: c.out[r * outputs..][..outputs].to_vec(),
                };
                let mut single = one.out.clone();
                dispatch(product(&one, 1, depth, outputs, &mut single));
                assert_eq!(single, all[r * outputs..][..outputs], "row {r} of {rows}, {depth}, {outputs}");
            }
        }
    }

    /// Every half there is, against the conversion of the crate that defines them.
    #[test]
    fn all_halves_widen_to_their_value() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let mut wide = vec![f32::NAN; halves.len()];
        widen(&halves, &mut wide);
        for (half, wide) in halves.iter().zip(&wide) {
            let same = half.to_f32().to_bits() == wide.to_bits() || half.is_nan() && wide.is_nan();
            assert!(same, "{half:?}: {wide}");
        }
    }

    #[test]
    fn norms_activations_and_weights_match_double_precision() {
        let x: Vec<f32> = (0..38).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let (gain, bias) = (vec![1.5f32; 19], vec![0.25f32; 19]);
        let mut normed = vec![0f32; 38];
        layer_norm(&x, &gain, &bias, &mut normed);
        for (row, got) in x.chunks_exact(19).zip(normed.chunks_exact(19)) {
            let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / 19.0;
            let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / 19.0;
            for (v, g) in row.iter().zip(got) {
                let exact = (f64::from(*v) - mean) / (variance + 1e-5).sqrt() * 1.5 + 0.25;
                assert!((f64::from(*g) - exact).abs() < 1e-5, "{g} {exact}");
            }
        }
        // gelu(-1), gelu(0.5), gelu(2) from tables of the normal distribution.
        let mut values = [-1.0f32, 0.5, 2.0];
        gelu(&mut values);
        for (got, exact) in values.iter().zip([-0.158_655_3, 0.345_731_2, 1.954_499_7]) {
            assert!((got - exact).abs() < 1e-6, "{got} {exact}");
        }
        let (mut scores, mut inverse) = (x[..19].to_vec(), [0f32]);
        softmax_weights(&mut scores, 19, 0.5, &mut inverse);
        let peak = x[..19].iter().fold(f64::MIN, |a, b| a.max(f64::from(*b)));
        let exact: Vec<f64> = x[..19].iter().map(|v| (0.5 * (f64::from(*v) - peak)).exp()).collect();
        let total: f64 = exact.iter().sum();
        for (got, exact) in scores.iter().zip(&exact) {
            assert!((f64::from(got * inverse[0]) - exact / total).abs() < 1e-6);
        }
    }
}
