//! The inner loops: rows times a packed matrix, norms, activations and softmax weights, eight values side by side.
//!
//! Every loop is compiled twice, for processors with AVX2 and FMA and for any other, and the fitting one is taken at
//! run time. What is computed for a row doesn't depend on how many rows are computed with it: each output sums its
//! products in the order of the inputs, whatever the tile. So a batch gives the bits that single rows give.

use std::any::TypeId;

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
        let whole = self.rows - self.rows % MOST_ROWS;
        let strips = self.outputs.div_ceil(LANES);
        // A pair of strips stays in the first-level cache while all rows pass it.
        if whole > 0 {
            for first in (0..strips).step_by(2) {
                for row in (0..whole).step_by(MOST_ROWS) {
                    if first + 1 < strips {
                        self.tile::<S, MOST_ROWS, 2>(simd, row, first);
                    } else {
                        self.tile::<S, MOST_ROWS, 1>(simd, row, first);
                    }
                }
            }
        }
        match self.rows - whole {
            1 => self.sweep::<S, 1, 8>(simd, whole, strips),
            2 => self.sweep::<S, 2, 4>(simd, whole, strips),
            3 => self.sweep::<S, 3, 4>(simd, whole, strips),
            4 => self.sweep::<S, 4, 2>(simd, whole, strips),
            5 => self.sweep::<S, 5, 2>(simd, whole, strips),
            _ => {}
        }
    }
}

impl Product<'_> {
    /// All strips for `R` rows, `V` at a time.
    #[inline(always)]
    fn sweep<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, row: usize, strips: usize) {
        let mut at = 0;
        while strips - at >= V {
            self.tile::<S, R, V>(simd, row, at);
            at += V;
        }
        if V > 4 && strips - at >= 4 {
            self.tile::<S, R, 4>(simd, row, at);
            at += 4;
        }
        if V > 2 && strips - at >= 2 {
            self.tile::<S, R, 2>(simd, row, at);
            at += 2;
        }
        if strips > at {
            self.tile::<S, R, 1>(simd, row, at);
        }
    }

    /// `R` rows times `V` strips, sums in registers.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, row: usize, strip: usize) {
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
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        for (i, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                let column = (strip + v) * LANES;
                let from = &self.out[(row + i) * self.out_stride + column..];
                *sum = simd.partial_load_f32s(&from[..LANES.min(self.outputs - column)]);
            }
        }
        for k in 0..depth {
            let mut weights = [simd.splat_f32s(0.0); V];
            for (weight, w) in weights.iter_mut().zip(&w) {
                *weight = w[k];
            }
            for (sums, x) in sums.iter_mut().zip(&x) {
                let x = simd.splat_f32s(x[k]);
                for (sum, weight) in sums.iter_mut().zip(&weights) {
                    *sum = fused(simd, x, *weight, *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let column = (strip + v) * LANES;
                let to = &mut self.out[(row + i) * self.out_stride + column..];
                simd.partial_store_f32s(&mut to[..LANES.min(self.outputs - column)], *sum);
            }
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
    dispatch(|| layer_norm_loop(x, gain, bias, out));
}

#[inline(always)]
fn layer_norm_loop(x: &[f32], gain: &[f32], bias: &[f32], out: &mut [f32]) {
    let width = gain.len();
    for (row, to) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean = lane_sum(row, |v| v) / width as f32;
        let variance = lane_sum(row, |v| (v - mean) * (v - mean)) / width as f32;
        let inverse = 1.0 / (variance + EPS).sqrt();
        for (((o, v), g), b) in to.iter_mut().zip(row).zip(gain).zip(bias) {
            *o = (v - mean) * inverse * g + b;
        }
    }
}

/// Sum of `f` over the values, in eight lanes.
#[inline(always)]
fn lane_sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f(*v);
        }
    }
    let mut total = 0f32;
    for lane in lanes {
        total += lane;
    }
    for v in rest {
        total += f(*v);
    }
    total
}

/// `x * Phi(x)` in place.
pub(super) fn gelu(values: &mut [f32]) {
    dispatch(|| gelu_loop(values));
}

#[inline(always)]
fn gelu_loop(values: &mut [f32]) {
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for v in chunk.iter_mut() {
            *v *= normal(*v).0;
        }
    }
    for v in rest {
        *v *= normal(*v).0;
    }
}

/// `q *= base * (1 + tanh t)`; `base` repeats along the rows.
pub(super) fn gate(q: &mut [f32], t: &[f32], base: &[f32]) {
    dispatch(|| gate_loop(q, t, base));
}

#[inline(always)]
fn gate_loop(q: &mut [f32], t: &[f32], base: &[f32]) {
    for (q, t) in q.chunks_exact_mut(base.len()).zip(t.chunks_exact(base.len())) {
        for ((q, t), b) in q.iter_mut().zip(t).zip(base) {
            *q *= b * (1.0 + tanh(*t));
        }
    }
}

/// Replaces each row of `width` scores by `exp(scale * (score - peak))` and stores the inverse of their sum.
pub(super) fn softmax_weights(scores: &mut [f32], width: usize, scale: f32, inverses: &mut [f32]) {
    dispatch(|| {
        for (row, inverse) in scores.chunks_exact_mut(width).zip(inverses) {
            *inverse = weights_loop(row, scale);
        }
    });
}

#[inline(always)]
fn weights_loop(row: &mut [f32], scale: f32) -> f32 {
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

/// Values side by side, and outputs of a strip.
pub(super) const LANES: usize = 8;
/// Rows of a tile: twelve sums, two weights and one value fill sixteen registers.
const MOST_ROWS: usize = 6;
const EPS: f32 = 1e-5;

#[cfg(test)]
mod tests {
    use pulp::{Scalar256b, Simd};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::{LANES, Product, dispatch, gelu, layer_norm, softmax_weights};

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
            for (depth, outputs) in [(1usize, 1usize), (5, 7), (32, 64), (33, 131), (16, 24), (9, 40)] {
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
        let (rows, depth, outputs) = (17, 37, 75);
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
            assert_eq!(single, all[r * outputs..][..outputs], "row {r}");
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
