//! The inner loops: rows times a packed matrix, norms, activations and softmax weights, eight values side by side.
//!
//! Every loop is compiled for the processor at hand ([`crate::simd`]). What is computed for a row doesn't depend on how
//! many rows are computed with it: each output sums its products in the same order, whatever the tile. So a batch gives
//! the bits that single rows give.

use std::ops::Range;

use half::f16;
use pulp::{Simd, WithSimd};

use crate::{
    ops::math::{exp, normal, tanh},
    simd::{multiply_add, wide},
};

/// `out[r][o] = start + sum over k of x[r][k] * w[k][o]`, all sizes in values.
pub(super) struct Product<'a> {
    /// Rows of the left side, `x_stride` apart.
    pub(super) x: &'a [f32],
    pub(super) x_stride: usize,
    pub(super) rows: usize,
    /// Length of the sums.
    pub(super) depth: usize,
    /// The right side by [`place`]: panels of up to [`PANEL`] outputs, each `(depth, its outputs)`, so that a row of the
    /// left side reads it from end to end.
    pub(super) panels: &'a [f32],
    /// Outputs per row; the last eight may be more than there are.
    pub(super) outputs: usize,
    /// Rows of the result, `out_stride` apart.
    pub(super) out: &'a mut [f32],
    pub(super) out_stride: usize,
    pub(super) start: Start<'a>,
    /// Whether every sum is computed in two parts, see [`halved`]: one order of sums for all that are to agree to the last bit.
    pub(super) halved: bool,
}

/// Whether single rows are faster if every sum is computed in two parts: there are few outputs and long sums.
pub(super) fn halved(depth: usize, outputs: usize) -> bool {
    outputs <= NARROW && depth >= LONG
}

/// What a product's sums are added to.
#[derive(Clone, Copy)]
pub(super) enum Start<'a> {
    /// Nothing: what the result held is overwritten.
    Zero,
    /// One number per output.
    Bias(&'a [f32]),
    /// What the result holds.
    Held,
    /// What the result holds and one number per output.
    HeldAndBias(&'a [f32]),
}

/// Numbers of a packed right side.
pub(super) fn packed(depth: usize, outputs: usize) -> usize {
    depth * padded(outputs)
}

/// Where input `k` of output `o` stands in a packed right side.
pub(super) fn place(k: usize, o: usize, depth: usize, outputs: usize) -> usize {
    let first = o - o % PANEL;
    let width = PANEL.min(padded(outputs) - first);
    first * depth + k * width + o % PANEL
}

/// Outputs with those of no use: the last panel has one, two or four strips, for which there are loops.
fn padded(outputs: usize) -> usize {
    let strips = outputs.div_ceil(LANES);
    LANES * if strips % 4 == 3 { strips + 1 } else { strips }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        if self.depth == 0 {
            return;
        }
        let panels = self.panels;
        for (i, numbers) in panels.chunks(PANEL * self.depth).enumerate() {
            let (vectors, first) = (S::as_simd_f32s(numbers).0, i * PANEL);
            match vectors.len() / self.depth {
                1 => self.panel::<S, 1>(simd, vectors.as_chunks().0, first),
                2 => self.panel::<S, 2>(simd, vectors.as_chunks().0, first),
                _ => self.panel::<S, 4>(simd, vectors.as_chunks().0, first),
            }
        }
    }
}

impl Product<'_> {
    /// All rows with one panel of `W` strips, input by input, whose first output is `first`.
    #[inline(always)]
    fn panel<S: Simd, const W: usize>(&mut self, simd: S, panel: &[[S::f32s; W]], first: usize) {
        if self.halved {
            self.halves::<S, W>(simd, panel, first);
            return;
        }
        let whole = self.rows - self.rows % 6;
        // A pair of strips is read for six rows at a time.
        for row in (0..whole).step_by(6) {
            self.row_tiles::<S, W, 6, 2, 1>(simd, panel, first, row);
        }
        match self.rows - whole {
            1 => self.row_tiles::<S, W, 1, 4, 1>(simd, panel, first, whole),
            2 => self.row_tiles::<S, W, 2, 4, 1>(simd, panel, first, whole),
            3 => self.row_tiles::<S, W, 3, 4, 1>(simd, panel, first, whole),
            4 => self.row_tiles::<S, W, 4, 2, 1>(simd, panel, first, whole),
            5 => self.row_tiles::<S, W, 5, 2, 1>(simd, panel, first, whole),
            _ => {}
        }
    }

    #[inline(always)]
    fn halves<S: Simd, const W: usize>(&mut self, simd: S, panel: &[[S::f32s; W]], first: usize) {
        let whole = self.rows - self.rows % 3;
        for row in (0..whole).step_by(3) {
            self.row_tiles::<S, W, 3, 2, 2>(simd, panel, first, row);
        }
        match self.rows - whole {
            1 => self.row_tiles::<S, W, 1, 4, 2>(simd, panel, first, whole),
            2 => self.row_tiles::<S, W, 2, 2, 2>(simd, panel, first, whole),
            _ => {}
        }
    }

    /// `R` rows with all strips of a panel, at most `V` at a time.
    #[inline(always)]
    fn row_tiles<S: Simd, const W: usize, const R: usize, const V: usize, const PARTS: usize>(
        &mut self,
        simd: S,
        panel: &[[S::f32s; W]],
        first: usize,
        row: usize,
    ) {
        match (W, V) {
            (1, _) => self.tile::<S, W, R, 1, PARTS>(simd, panel, first, row, 0),
            (2, _) => self.tile::<S, W, R, 2, PARTS>(simd, panel, first, row, 0),
            (_, 2) => {
                self.tile::<S, W, R, 2, PARTS>(simd, panel, first, row, 0);
                self.tile::<S, W, R, 2, PARTS>(simd, panel, first, row, 2);
            }
            _ => self.tile::<S, W, R, 4, PARTS>(simd, panel, first, row, 0),
        }
    }

    /// `R` rows times `V` strips from `strip` on, sums in registers: of every `PARTS`-th product, so that one sum needn't wait
    /// for the one before.
    #[allow(
        clippy::needless_range_loop,
        reason = "by index the sums stay in registers, by iterator they don't"
    )]
    #[inline(always)]
    fn tile<S: Simd, const W: usize, const R: usize, const V: usize, const PARTS: usize>(
        &mut self,
        simd: S,
        panel: &[[S::f32s; W]],
        first: usize,
        row: usize,
        strip: usize,
    ) {
        let depth = self.depth;
        // Equal lengths, so that nothing is checked within the loops.
        let panel = &panel[..depth];
        let mut x: [&[f32]; R] = [&[]; R];
        for (i, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + i) * self.x_stride..][..depth];
        }
        let zero = simd.splat_f32s(0.0);
        let mut sums = [[[zero; V]; R]; PARTS];
        let whole = depth - depth % PARTS;
        for k in (0..whole).step_by(PARTS) {
            for (part, sums) in sums.iter_mut().enumerate() {
                add_products(simd, sums, &x, panel, strip, k + part);
            }
        }
        for k in whole..depth {
            add_products(simd, &mut sums[0], &x, panel, strip, k);
        }
        let mut total = sums[0];
        for i in 0..R {
            for v in 0..V {
                for part in 1..PARTS {
                    total[i][v] = simd.add_f32s(total[i][v], sums[part][i][v]);
                }
            }
        }
        let column = first + strip * LANES;
        if column + V * LANES <= self.outputs {
            self.put_whole(simd, row, column, total);
            return;
        }
        for i in 0..R {
            for v in 0..V {
                let column = column + v * LANES;
                let left = self.outputs.saturating_sub(column).min(LANES);
                if left > 0 {
                    self.put(simd, row + i, column..column + left, total[i][v]);
                }
            }
        }
    }

    /// Stores whole strips of some rows.
    #[inline(always)]
    fn put_whole<S: Simd, const R: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
        sums: [[S::f32s; V]; R],
    ) {
        let bias = |bias: &[f32]| {
            let mut strips = [simd.splat_f32s(0.0); V];
            strips.iter_mut().zip(S::as_simd_f32s(&bias[column..][..V * LANES]).0).for_each(|(s, b)| *s = *b);
            strips
        };
        let add = |a, b| simd.add_f32s(a, b);
        match self.start {
            Start::Zero => self.store::<S, R, V>(row, column, sums, |_, _, sum| sum),
            Start::Bias(given) => {
                let bias = bias(given);
                self.store::<S, R, V>(row, column, sums, |v, _, sum| add(bias[v], sum));
            }
            Start::Held => self.store::<S, R, V>(row, column, sums, |_, held, sum| add(held, sum)),
            Start::HeldAndBias(given) => {
                let bias = bias(given);
                self.store::<S, R, V>(row, column, sums, |v, held, sum| add(add(held, bias[v]), sum));
            }
        }
    }

    #[allow(
        clippy::needless_range_loop,
        reason = "by index the sums stay in registers, by iterator they don't"
    )]
    #[inline(always)]
    fn store<S: Simd, const R: usize, const V: usize>(
        &mut self,
        row: usize,
        column: usize,
        sums: [[S::f32s; V]; R],
        of: impl Fn(usize, S::f32s, S::f32s) -> S::f32s,
    ) {
        for i in 0..R {
            let to = &mut self.out[(row + i) * self.out_stride + column..][..V * LANES];
            if let Some(to) = S::as_mut_simd_f32s(to).0.first_chunk_mut::<V>() {
                for v in 0..V {
                    to[v] = of(v, to[v], sums[i][v]);
                }
            }
        }
    }

    /// Stores up to eight sums of a row.
    #[inline(always)]
    fn put<S: Simd>(&mut self, simd: S, row: usize, columns: Range<usize>, sum: S::f32s) {
        let at = row * self.out_stride + columns.start;
        let to = &mut self.out[at..at + columns.len()];
        let sum = match self.start {
            Start::Zero => sum,
            Start::Bias(bias) => simd.add_f32s(read(simd, &bias[columns]), sum),
            Start::Held => simd.add_f32s(read(simd, to), sum),
            Start::HeldAndBias(bias) => {
                simd.add_f32s(simd.add_f32s(read(simd, to), read(simd, &bias[columns])), sum)
            }
        };
        match S::as_mut_simd_f32s(to).0.first_mut() {
            Some(to) => *to = sum,
            None => simd.partial_store_f32s(to, sum),
        }
    }
}

/// Up to eight numbers.
#[inline(always)]
fn read<S: Simd>(simd: S, values: &[f32]) -> S::f32s {
    match S::as_simd_f32s(values).0.first() {
        Some(vector) => *vector,
        None => simd.partial_load_f32s(values),
    }
}

/// Adds the products of input `k`.
#[inline(always)]
fn add_products<S: Simd, const W: usize, const R: usize, const V: usize>(
    simd: S,
    sums: &mut [[S::f32s; V]; R],
    x: &[&[f32]; R],
    panel: &[[S::f32s; W]],
    strip: usize,
    k: usize,
) {
    let mut weights = [simd.splat_f32s(0.0); V];
    for (v, weight) in weights.iter_mut().enumerate() {
        *weight = panel[k][strip + v];
    }
    for (sums, x) in sums.iter_mut().zip(x) {
        let x = simd.splat_f32s(x[k]);
        for (sum, weight) in sums.iter_mut().zip(&weights) {
            *sum = multiply_add(simd, x, *weight, *sum);
        }
    }
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
            *v *= normal::<FUSED>(*v).0;
        }
    }
    for v in rest {
        *v *= normal::<FUSED>(*v).0;
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
            *q *= b * (1.0 + tanh::<FUSED>(*t));
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
        *inverse = weights_of::<FUSED>(row, scale);
    }
}

#[inline(always)]
fn weights_of<const FUSED: bool>(row: &mut [f32], scale: f32) -> f32 {
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
            *s = exp::<FUSED>((*s - peak) * scale);
            *sum += *s;
        }
    }
    let mut total = 0f32;
    for sum in sums {
        total += sum;
    }
    for s in rest {
        *s = exp::<FUSED>((*s - peak) * scale);
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

    use super::{Product, Start, gelu, halved, layer_norm, packed, place, softmax_weights, widen};
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
            start: Start::Held,
            halved: halved(depth, outputs),
        }
    }

    /// Against sums in double precision, for every tile and remainder; both compilations.
    #[test]
    fn products_equal_plain_sums_in_every_tile() {
        for rows in [1usize, 2, 3, 4, 5, 6, 7, 13] {
            for (depth, outputs) in [
                (1usize, 1usize),
                (5, 7),
                (32, 64),
                (33, 131),
                (16, 24),
                (9, 40),
                (201, 29),
                (64, 8),
                (70, 16),
            ] {
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
        for (depth, outputs) in [(1, 1), (3, 8), (2, 64), (5, 65), (4, 131), (3, 20)] {
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
