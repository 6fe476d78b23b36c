//! The inner loops: rows times a packed matrix, norms, activations and softmax weights, eight values side by side.
//!
//! Every loop is compiled for the processor at hand ([`crate::simd`]). What is computed for a row doesn't depend on how
//! many rows are computed with it: each output sums its products in the same order, whatever the tile. So a batch gives
//! the bits that single rows give.

use half::f16;
use pulp::{Simd, WithSimd};

use crate::{
    ops::math::{exp, normal, tanh},
    simd::{fuses, wide},
};

/// `out[r][o] += sum over k of x[r][k] * w[k][o]`, all sizes in values.
pub(super) struct Product<'a> {
    /// Rows of the left side, `x_stride` apart.
    pub(super) x: &'a [f32],
    pub(super) x_stride: usize,
    pub(super) rows: usize,
    /// Length of the sums.
    pub(super) depth: usize,
    /// The right side by [`place`]: panels of up to [`PANEL`] outputs, each `(depth, its outputs rounded up to eight)`,
    /// so that a row of the left side reads it from end to end.
    pub(super) panels: &'a [f32],
    /// Outputs per row; the last eight may be more than there are.
    pub(super) outputs: usize,
    /// Rows of the result, `out_stride` apart.
    pub(super) out: &'a mut [f32],
    pub(super) out_stride: usize,
}

/// Numbers of a packed right side.
pub(super) fn packed(depth: usize, outputs: usize) -> usize {
    depth * outputs.next_multiple_of(LANES)
}

/// Where input `k` of output `o` stands in a packed right side.
pub(super) fn place(k: usize, o: usize, depth: usize, outputs: usize) -> usize {
    let first = o - o % PANEL;
    let width = PANEL.min(outputs.next_multiple_of(LANES) - first);
    first * depth + k * width + o % PANEL
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        if self.depth == 0 {
            return;
        }
        let halved = self.outputs <= NARROW && self.depth >= LONG;
        for (i, numbers) in self.panels.chunks(PANEL * self.depth).enumerate() {
            let panel = Panel::<S> { vectors: S::as_simd_f32s(numbers).0, first: i * PANEL };
            if halved {
                self.rows_by::<S, 3, 2>(simd, panel);
            } else {
                self.rows_by::<S, 6, 1>(simd, panel);
            }
        }
    }
}

/// Up to four strips of eight outputs, input by input.
#[derive(Clone, Copy)]
struct Panel<'a, S: Simd> {
    vectors: &'a [S::f32s],
    /// Its first output.
    first: usize,
}

impl Product<'_> {
    /// All rows, `MOST` at a time, every sum in `PARTS` parts. `MOST` is 6 or 3.
    #[inline(always)]
    fn rows_by<S: Simd, const MOST: usize, const PARTS: usize>(&mut self, simd: S, panel: Panel<'_, S>) {
        let whole = self.rows - self.rows % MOST;
        let strips = panel.vectors.len() / self.depth;
        // A pair of strips stays in the first-level cache while all rows pass it.
        if whole > 0 {
            for first in (0..strips).step_by(2) {
                for row in (0..whole).step_by(MOST) {
                    if first + 1 < strips {
                        self.tile::<S, MOST, 2, PARTS>(simd, panel, row, first);
                    } else {
                        self.tile::<S, MOST, 1, PARTS>(simd, panel, row, first);
                    }
                }
            }
        }
        match (self.rows - whole, PARTS) {
            (1, _) => self.sweep::<S, 1, 4, PARTS>(simd, panel, whole),
            (2, 1) => self.sweep::<S, 2, 4, PARTS>(simd, panel, whole),
            (3, 1) => self.sweep::<S, 3, 4, PARTS>(simd, panel, whole),
            (4, 1) => self.sweep::<S, 4, 2, PARTS>(simd, panel, whole),
            (5, 1) => self.sweep::<S, 5, 2, PARTS>(simd, panel, whole),
            (2, _) => self.sweep::<S, 2, 2, PARTS>(simd, panel, whole),
            _ => {}
        }
    }

    /// All strips of a panel for `R` rows, `V` at a time.
    #[inline(always)]
    fn sweep<S: Simd, const R: usize, const V: usize, const PARTS: usize>(
        &mut self,
        simd: S,
        panel: Panel<'_, S>,
        row: usize,
    ) {
        let strips = panel.vectors.len() / self.depth;
        let mut at = 0;
        while strips - at >= V {
            self.tile::<S, R, V, PARTS>(simd, panel, row, at);
            at += V;
        }
        if V > 2 && strips - at >= 2 {
            self.tile::<S, R, 2, PARTS>(simd, panel, row, at);
            at += 2;
        }
        if strips > at {
            self.tile::<S, R, 1, PARTS>(simd, panel, row, at);
        }
    }

    /// `R` rows times `V` strips, sums in registers: of every `PARTS`-th product, so that one sum needn't wait for the
    /// one before.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize, const PARTS: usize>(
        &mut self,
        simd: S,
        panel: Panel<'_, S>,
        row: usize,
        strip: usize,
    ) {
        let (depth, strips) = (self.depth, panel.vectors.len() / self.depth);
        let mut x: [&[[f32; PARTS]]; R] = [&[]; R];
        let mut rest: [&[f32]; R] = [&[]; R];
        for (i, (x, rest)) in x.iter_mut().zip(&mut rest).enumerate() {
            (*x, *rest) = self.x[(row + i) * self.x_stride..][..depth].as_chunks::<PARTS>();
            *x = &x[..depth / PARTS];
            *rest = &rest[..depth % PARTS];
        }
        let zero = simd.splat_f32s(0.0);
        let mut sums = [[[zero; V]; R]; PARTS];
        let mut inputs = panel.vectors.chunks_exact(strips * PARTS);
        for (k, vectors) in (0..depth / PARTS).zip(&mut inputs) {
            for (part, sums) in sums.iter_mut().enumerate() {
                if let Some(weights) = vectors[part * strips + strip..].first_chunk::<V>() {
                    for (sums, x) in sums.iter_mut().zip(&x) {
                        add_products(simd, sums, x[k][part], weights);
                    }
                }
            }
        }
        for (k, vectors) in (0..depth % PARTS).zip(inputs.remainder().chunks_exact(strips)) {
            if let Some(weights) = vectors[strip..].first_chunk::<V>() {
                for (sums, x) in sums[0].iter_mut().zip(&rest) {
                    add_products(simd, sums, x[k], weights);
                }
            }
        }
        for i in 0..R {
            for v in 0..V {
                let mut sum = sums[0][i][v];
                for part in &sums[1..] {
                    sum = simd.add_f32s(sum, part[i][v]);
                }
                let column = panel.first + (strip + v) * LANES;
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

/// Adds the products of one input.
#[inline(always)]
fn add_products<S: Simd, const V: usize>(simd: S, sums: &mut [S::f32s; V], x: f32, weights: &[S::f32s; V]) {
    let x = simd.splat_f32s(x);
    for (sum, weight) in sums.iter_mut().zip(weights) {
        *sum = fused(simd, x, *weight, *sum);
    }
}

/// `a * b + c`, in one rounding where the processor has the instruction.
#[inline(always)]
fn fused<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
    if fuses::<S>() { simd.mul_add_f32s(a, b, c) } else { simd.add_f32s(simd.mul_f32s(a, b), c) }
}

wide!(
    /// `(x - mean) / sqrt(var + 1e-5) * gain + bias` of each row of `gain.len()` values.
    pub(super) fn layer_norm(
        x: &'a [f32],
        gain: &'a [f32],
        bias: &'a [f32],
        out: &'a mut [f32],
    ) => layer_norm_loop
);

#[inline(always)]
fn layer_norm_loop<const FUSED: bool>(x: &[f32], gain: &[f32], bias: &[f32], out: &mut [f32]) {
    let width = gain.len();
    for (row, to) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean = lane_sum(row, 0.0, false) / width as f32;
        let variance = lane_sum(row, mean, true) / width as f32;
        let inverse = 1.0 / (variance + EPS).sqrt();
        for (((o, v), g), b) in to.iter_mut().zip(row).zip(gain).zip(bias) {
            *o = (v - mean) * inverse * g + b;
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

wide!(
    /// `x * Phi(x)` in place.
    pub(super) fn gelu(values: &'a mut [f32]) => gelu_loop
);

#[inline(always)]
fn gelu_loop<const FUSED: bool>(values: &mut [f32]) {
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

wide!(
    /// `q *= base * (1 + tanh t)`; `base` repeats along the rows.
    pub(super) fn gate(q: &'a mut [f32], t: &'a [f32], base: &'a [f32]) => gate_loop
);

#[inline(always)]
fn gate_loop<const FUSED: bool>(q: &mut [f32], t: &[f32], base: &[f32]) {
    for (q, t) in q.chunks_exact_mut(base.len()).zip(t.chunks_exact(base.len())) {
        for ((q, t), b) in q.iter_mut().zip(t).zip(base) {
            *q *= b * (1.0 + tanh(*t));
        }
    }
}

wide!(
    /// Replaces each row of `width` scores by `exp(scale * (score - peak))` and stores the inverse of their sum.
    pub(super) fn softmax_weights(
        scores: &'a mut [f32],
        width: usize,
        scale: f32,
        inverses: &'a mut [f32],
    ) => softmax_weights_loop
);

#[inline(always)]
fn softmax_weights_loop<const FUSED: bool>(
    scores: &mut [f32],
    width: usize,
    scale: f32,
    inverses: &mut [f32],
) {
    for (row, inverse) in scores.chunks_exact_mut(width).zip(inverses) {
        *inverse = weights_of(row, scale);
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

wide!(
    /// Widens halves.
    pub(super) fn widen(from: &'a [f16], into: &'a mut [f32]) => widen_loop
);

#[inline(always)]
fn widen_loop<const FUSED: bool>(from: &[f16], into: &mut [f32]) {
    for (half, wide) in from.iter().zip(into) {
        *wide = widened(*half);
    }
}

/// A half: with its sign extended, sign, exponent and fraction are shifted to where a single has them, whose exponent counts
/// from 112 less. What isn't finite stays so.
#[inline(always)]
fn widened(half: f16) -> f32 {
    const KEPT: i32 = 0x8fff_e000_u32 as i32;
    const LARGEST: i32 = 0x0f80_0000;
    let bits = (i32::from(half.to_bits() as i16) << 13) & KEPT;
    let value = f32::from_bits(bits as u32) * f32::from_bits(0x7780_0000);
    let beyond = if bits & LARGEST == LARGEST { 0x7f80_0000 } else { 0 };
    f32::from_bits(value.to_bits() | beyond)
}

/// Values side by side, and outputs of a strip.
pub(super) const LANES: usize = 8;
/// Outputs of a panel: for one row four sums at a time, for many rows what stays in the first-level cache.
pub(super) const PANEL: usize = 32;
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

    use super::{Product, gelu, layer_norm, packed, place, softmax_weights, widen};
    use crate::simd::dispatch;

    struct Case {
        x: Vec<f32>,
        panels: Vec<f32>,
        out: Vec<f32>,
    }

    fn case(rows: usize, depth: usize, outputs: usize) -> Case {
        let mut rng = ChaCha20Rng::seed_from_u64((rows * 31 + depth * 7 + outputs) as u64);
        let mut draw = |n: usize| (0..n).map(|_| rng.random_range(-1.0..1.0f32)).collect::<Vec<_>>();
        Case { x: draw(rows * depth), panels: draw(packed(depth, outputs)), out: draw(rows * outputs) }
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
            panels: &c.panels,
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
                        let weight = |k: usize| c.panels[place(k, o, depth, outputs)];
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

    /// Every weight has a place of its own, inside.
    #[test]
    fn places_are_distinct_and_fill_all_but_the_padding() {
        for (depth, outputs) in [(1, 1), (3, 8), (2, 64), (5, 65), (4, 131)] {
            let mut seen: Vec<usize> =
                (0..depth * outputs).map(|i| place(i % depth, i / depth, depth, outputs)).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), depth * outputs);
            assert!(seen.last().is_some_and(|last| *last < packed(depth, outputs)));
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
                    panels: c.panels.clone(),
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
