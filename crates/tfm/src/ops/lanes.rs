//! Attention of any number of queries to a few keys, eight queries side by side.
//!
//! Scores of eight queries are eight lanes, so maxima, exponentials and sums over keys run without a reduction across
//! lanes. Cells of a row and inducing points of a column are such short sequences; probabilities are recomputed in
//! the backward pass. Vectors are written out, since the compiler takes these loops apart into single numbers.

use pulp::{Simd, WithSimd};

use super::{attention::Sizes, math::exp};
use crate::simd::{dispatch, fuses, multiply_add};

/// What queries read. `HD`, the size of a head, is a multiple of [`LANES`].
pub(super) fn forward<const HD: usize>(s: Sizes, q: &[f32], kv: &[f32], out: &mut [f32]) {
    dispatch(Forward::<HD> { s, q, kv, out });
}

/// Adds gradients of queries, and of keys and values where wanted, from that of what was read.
pub(super) fn backward<const HD: usize>(
    s: Sizes,
    q: &[f32],
    kv: &[f32],
    grad: &[f32],
    dq: &mut [f32],
    dkv: Option<&mut [f32]>,
) {
    dispatch(Backward::<HD> { s, q, kv, grad, dq, dkv });
}

/// Eight rows of one head; rows beyond those there are are 0.
type Rows<const HD: usize> = [[f32; HD]; LANES];
/// The same, feature by feature.
type Turned<const HD: usize> = [[f32; LANES]; HD];

#[inline(always)]
fn rows<const HD: usize>(values: &[f32], at: usize, stride: usize, count: usize) -> Rows<HD> {
    let mut out = [[0f32; HD]; LANES];
    for (l, row) in out.iter_mut().enumerate().take(count) {
        row.copy_from_slice(&values[at + l * stride..][..HD]);
    }
    out
}

#[inline(always)]
fn turned<const HD: usize>(rows: &Rows<HD>) -> Turned<HD> {
    let mut out = [[0f32; LANES]; HD];
    for (l, row) in rows.iter().enumerate() {
        for (o, v) in out.iter_mut().zip(row) {
            o[l] = *v;
        }
    }
    out
}

#[inline(always)]
fn load<S: Simd>(_: S, values: &[f32]) -> S::f32s {
    S::as_simd_f32s(&values[..LANES]).0[0]
}

#[inline(always)]
fn store<S: Simd>(_: S, values: &mut [f32], vector: S::f32s) {
    S::as_mut_simd_f32s(&mut values[..LANES]).0[0] = vector;
}

/// Inner products of eight queries with one vector.
#[inline(always)]
fn products<S: Simd, const HD: usize>(simd: S, queries: &Turned<HD>, vector: &[f32]) -> S::f32s {
    // Two sums, so that one product needn't wait for the one before.
    let (mut even, mut odd) = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
    for (queries, vector) in queries.as_chunks::<LANES>().0.iter().zip(vector[..HD].as_chunks::<LANES>().0) {
        for i in (0..LANES).step_by(2) {
            even = multiply_add(simd, load(simd, &queries[i]), simd.splat_f32s(vector[i]), even);
            odd = multiply_add(simd, load(simd, &queries[i + 1]), simd.splat_f32s(vector[i + 1]), odd);
        }
    }
    simd.add_f32s(even, odd)
}

/// Adds to `to`, feature by feature, vectors of keys weighted by lanes.
#[inline(always)]
fn gather<S: Simd, const HD: usize>(
    simd: S,
    weights: &[[f32; LANES]],
    kv: &[f32],
    stride: usize,
    at: usize,
    to: &mut Turned<HD>,
) {
    for (block, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let mut sums = [simd.splat_f32s(0.0); LANES];
        for (weight, row) in weights.iter().zip(kv.chunks_exact(stride)) {
            let weight = load(simd, weight);
            for row in row[at + block * LANES..][..LANES].as_chunks::<LANES>().0 {
                for i in 0..LANES {
                    sums[i] = multiply_add(simd, weight, simd.splat_f32s(row[i]), sums[i]);
                }
            }
        }
        for (to, sum) in to.iter_mut().zip(sums) {
            store(simd, to, sum);
        }
    }
}

/// Adds rows weighted by lanes to the vector of one key.
#[inline(always)]
fn scatter<S: Simd, const HD: usize>(simd: S, to: &mut [f32], weights: &[f32; LANES], rows: &Rows<HD>) {
    for (block, to) in to[..HD].chunks_exact_mut(LANES).enumerate() {
        let (mut even, mut odd) = (load(simd, to), simd.splat_f32s(0.0));
        for l in (0..LANES).step_by(2) {
            let row = |l: usize| load(simd, &rows[l][block * LANES..]);
            even = multiply_add(simd, simd.splat_f32s(weights[l]), row(l), even);
            odd = multiply_add(simd, simd.splat_f32s(weights[l + 1]), row(l + 1), odd);
        }
        store(simd, to, simd.add_f32s(even, odd));
    }
}

/// Probabilities `(key, lane)` of eight queries.
#[inline(always)]
fn probabilities<S: Simd, const HD: usize>(
    simd: S,
    queries: &Turned<HD>,
    (kv, stride, at): (&[f32], usize, usize),
    scale: f32,
    p: &mut [[f32; LANES]],
) {
    let mut peak = simd.splat_f32s(f32::NEG_INFINITY);
    for (scores, row) in p.iter_mut().zip(kv.chunks_exact(stride)) {
        let products = products(simd, queries, &row[at..]);
        // A NaN stays out of the peak; it reappears through `exp` below.
        peak = simd.select_f32s(simd.greater_than_f32s(products, peak), products, peak);
        store(simd, scores, products);
    }
    let scaled = simd.splat_f32s(scale);
    for scores in p.iter_mut() {
        let above = simd.sub_f32s(load(simd, scores), peak);
        store(simd, scores, simd.mul_f32s(above, scaled));
    }
    if fuses::<S>() {
        p.as_flattened_mut().iter_mut().for_each(|score| *score = exp::<true>(*score));
    } else {
        p.as_flattened_mut().iter_mut().for_each(|score| *score = exp::<false>(*score));
    }
    let mut total = simd.splat_f32s(0.0);
    for scores in p.iter() {
        total = simd.add_f32s(total, load(simd, scores));
    }
    let inverse = simd.div_f32s(simd.splat_f32s(1.0), total);
    for scores in p.iter_mut() {
        let probability = simd.mul_f32s(load(simd, scores), inverse);
        store(simd, scores, probability);
    }
}

struct Forward<'a, const HD: usize> {
    s: Sizes,
    q: &'a [f32],
    kv: &'a [f32],
    out: &'a mut [f32],
}

impl<const HD: usize> WithSimd for Forward<'_, HD> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { s, q, kv, out } = self;
        let stride = 2 * s.width;
        let mut p = vec![[0f32; LANES]; s.keys];
        for b in 0..s.batch {
            let kv = &kv[b * s.keys * stride..][..s.keys * stride];
            let q = &q[s.query_start(b)..][..s.queries * s.width];
            let out = &mut out[b * s.queries * s.width..][..s.queries * s.width];
            for (h, first) in places(s) {
                let (at, count) = (first * s.width + h * HD, LANES.min(s.queries - first));
                let queries = turned(&rows::<HD>(q, at, s.width, count));
                probabilities(simd, &queries, (kv, stride, h * HD), s.scale(), &mut p);
                let mut sums = [[0f32; LANES]; HD];
                gather(simd, &p, kv, stride, s.width + h * HD, &mut sums);
                for (l, to) in out[at..].chunks_mut(s.width).take(count).enumerate() {
                    for (o, sum) in to[..HD].iter_mut().zip(&sums) {
                        *o = sum[l];
                    }
                }
            }
        }
    }
}

struct Backward<'a, const HD: usize> {
    s: Sizes,
    q: &'a [f32],
    kv: &'a [f32],
    grad: &'a [f32],
    dq: &'a mut [f32],
    dkv: Option<&'a mut [f32]>,
}

impl<const HD: usize> WithSimd for Backward<'_, HD> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { s, q, kv, grad, dq, mut dkv } = self;
        let (scale, stride) = (simd.splat_f32s(s.scale()), 2 * s.width);
        let (mut p, mut ds) = (vec![[0f32; LANES]; s.keys], vec![[0f32; LANES]; s.keys]);
        for b in 0..s.batch {
            let kv = &kv[b * s.keys * stride..][..s.keys * stride];
            let (q_start, g_start) = (s.query_start(b), b * s.queries * s.width);
            for (h, first) in places(s) {
                let (at, count) = (first * s.width + h * HD, LANES.min(s.queries - first));
                let query_rows = rows::<HD>(q, q_start + at, s.width, count);
                let grad_rows = rows::<HD>(grad, g_start + at, s.width, count);
                probabilities(simd, &turned(&query_rows), (kv, stride, h * HD), s.scale(), &mut p);
                let grads = turned(&grad_rows);
                let mut mean = simd.splat_f32s(0.0);
                for ((ds, p), row) in ds.iter_mut().zip(&p).zip(kv.chunks_exact(stride)) {
                    let slope = products(simd, &grads, &row[s.width + h * HD..]);
                    mean = multiply_add(simd, slope, load(simd, p), mean);
                    store(simd, ds, slope);
                }
                for (ds, p) in ds.iter_mut().zip(&p) {
                    let above = simd.sub_f32s(load(simd, ds), mean);
                    let slope = simd.mul_f32s(simd.mul_f32s(load(simd, p), above), scale);
                    store(simd, ds, slope);
                }
                let mut dqueries = [[0f32; LANES]; HD];
                gather(simd, &ds, kv, stride, h * HD, &mut dqueries);
                for (l, to) in dq[q_start + at..].chunks_mut(s.width).take(count).enumerate() {
                    for (o, sum) in to[..HD].iter_mut().zip(&dqueries) {
                        *o += sum[l];
                    }
                }
                if let Some(dkv) = dkv.as_deref_mut() {
                    let sinks = dkv[b * s.keys * stride..][..s.keys * stride].chunks_exact_mut(stride);
                    for ((row, ds), p) in sinks.zip(&ds).zip(&p) {
                        let (dk, dv) = row.split_at_mut(s.width);
                        scatter(simd, &mut dk[h * HD..], ds, &query_rows);
                        scatter(simd, &mut dv[h * HD..], p, &grad_rows);
                    }
                }
            }
        }
    }
}

/// Heads and first queries of the groups worked on together.
#[inline(always)]
fn places(s: Sizes) -> impl Iterator<Item = (usize, usize)> {
    (0..s.heads).flat_map(move |h| (0..s.queries).step_by(LANES).map(move |first| (h, first)))
}

/// Queries worked on together.
pub(super) const LANES: usize = 8;
/// Most keys for which this beats loops over keys: the probabilities of a tile stay in the first-level cache.
pub(super) const MAX_KEYS: usize = 64;
