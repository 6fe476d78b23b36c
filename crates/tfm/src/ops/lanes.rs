//! Attention of any number of queries to a few keys, eight queries side by side.
//!
//! Scores of eight queries are eight lanes, so maxima, exponentials and sums over keys run without a reduction across
//! lanes. Cells of a row and inducing points of a column are such short sequences; probabilities are recomputed in
//! the backward pass.

use super::{
    attention::{Sizes, lane},
    math::exp,
};
use crate::simd::{fused, wide};

/// Reads eight queries of one head as `(HD, lane)`; lanes beyond `count` are 0.
#[inline(always)]
fn turned<const HD: usize>(rows: &[[f32; HD]; LANES]) -> [[f32; LANES]; HD] {
    let mut out = [[0f32; LANES]; HD];
    for (l, row) in rows.iter().enumerate() {
        for (o, v) in out.iter_mut().zip(row) {
            o[l] = *v;
        }
    }
    out
}

/// Vectors of one head of up to eight consecutive rows; rows beyond `count` are 0.
#[inline(always)]
fn rows<const HD: usize>(values: &[f32], at: usize, stride: usize, count: usize) -> [[f32; HD]; LANES] {
    let mut out = [[0f32; HD]; LANES];
    for (l, row) in out.iter_mut().enumerate().take(count) {
        *row = lane::<HD>(values, at + l * stride);
    }
    out
}

/// Inner products of eight queries with one vector.
#[inline(always)]
fn products<const FUSED: bool, const HD: usize>(
    queries: &[[f32; LANES]; HD],
    vector: &[f32; HD],
) -> [f32; LANES] {
    let mut out = [0f32; LANES];
    for (query, v) in queries.iter().zip(vector) {
        for (o, q) in out.iter_mut().zip(query) {
            *o = fused::<FUSED>(*q, *v, *o);
        }
    }
    out
}

/// Probabilities `(key, lane)` of eight queries.
#[inline(always)]
fn probabilities<const FUSED: bool, const HD: usize>(
    queries: &[[f32; LANES]; HD],
    kv: &[f32],
    stride: usize,
    at: usize,
    scale: f32,
    p: &mut [[f32; LANES]],
) {
    let mut peak = [f32::NEG_INFINITY; LANES];
    for (scores, row) in p.iter_mut().zip(kv.chunks_exact(stride)) {
        *scores = products::<FUSED, HD>(queries, &lane::<HD>(row, at));
        for (m, s) in peak.iter_mut().zip(scores.iter()) {
            // A NaN stays out of the peak; it reappears through `exp` below.
            *m = if *s > *m { *s } else { *m };
        }
    }
    let mut total = [0f32; LANES];
    for scores in p.iter_mut() {
        for ((s, m), t) in scores.iter_mut().zip(&peak).zip(&mut total) {
            *s = exp((*s - m) * scale);
            *t += *s;
        }
    }
    let inverse = total.map(|t| 1.0 / t);
    for scores in p.iter_mut() {
        for (s, i) in scores.iter_mut().zip(&inverse) {
            *s *= i;
        }
    }
}

wide!(pub(super) fn forward<const HD>(s: Sizes, q: &'a [f32], kv: &'a [f32], out: &'a mut [f32]) => forward_loop);

#[inline(always)]
fn forward_loop<const FUSED: bool, const HD: usize>(s: Sizes, q: &[f32], kv: &[f32], out: &mut [f32]) {
    let (scale, stride) = (s.scale(), 2 * s.width);
    let mut p = vec![[0f32; LANES]; s.keys];
    for b in 0..s.batch {
        let kv = &kv[b * s.keys * stride..][..s.keys * stride];
        let q = &q[s.query_start(b)..][..s.queries * s.width];
        let out = &mut out[b * s.queries * s.width..][..s.queries * s.width];
        for h in 0..s.heads {
            for first in (0..s.queries).step_by(LANES) {
                let (at, count) = (first * s.width + h * HD, LANES.min(s.queries - first));
                let queries = turned(&rows::<HD>(q, at, s.width, count));
                probabilities::<FUSED, HD>(&queries, kv, stride, h * HD, scale, &mut p);
                let mut sums = [[0f32; LANES]; HD];
                for (p, row) in p.iter().zip(kv.chunks_exact(stride)) {
                    let v = lane::<HD>(row, s.width + h * HD);
                    for (sum, v) in sums.iter_mut().zip(&v) {
                        for (o, p) in sum.iter_mut().zip(p) {
                            *o = fused::<FUSED>(*p, *v, *o);
                        }
                    }
                }
                for (l, to) in out[at..].chunks_mut(s.width).take(count).enumerate() {
                    for (o, sum) in to[..HD].iter_mut().zip(&sums) {
                        *o = sum[l];
                    }
                }
            }
        }
    }
}

wide!(
    pub(super) fn backward<const HD>(
        s: Sizes,
        q: &'a [f32],
        kv: &'a [f32],
        grad: &'a [f32],
        dq: &'a mut [f32],
        dkv: Option<&'a mut [f32]>,
    ) => backward_loop
);

#[inline(always)]
fn backward_loop<const FUSED: bool, const HD: usize>(
    s: Sizes,
    q: &[f32],
    kv: &[f32],
    grad: &[f32],
    dq: &mut [f32],
    mut dkv: Option<&mut [f32]>,
) {
    let (scale, stride) = (s.scale(), 2 * s.width);
    let (mut p, mut ds) = (vec![[0f32; LANES]; s.keys], vec![[0f32; LANES]; s.keys]);
    for b in 0..s.batch {
        let kv = &kv[b * s.keys * stride..][..s.keys * stride];
        let (q_start, g_start) = (s.query_start(b), b * s.queries * s.width);
        for h in 0..s.heads {
            for first in (0..s.queries).step_by(LANES) {
                let (at, count) = (first * s.width + h * HD, LANES.min(s.queries - first));
                let query_rows = rows::<HD>(q, q_start + at, s.width, count);
                let grad_rows = rows::<HD>(grad, g_start + at, s.width, count);
                let (queries, grads) = (turned(&query_rows), turned(&grad_rows));
                probabilities::<FUSED, HD>(&queries, kv, stride, h * HD, scale, &mut p);
                let mut mean = [0f32; LANES];
                for ((ds, p), row) in ds.iter_mut().zip(&p).zip(kv.chunks_exact(stride)) {
                    *ds = products::<FUSED, HD>(&grads, &lane::<HD>(row, s.width + h * HD));
                    for ((m, d), p) in mean.iter_mut().zip(ds.iter()).zip(p) {
                        *m = fused::<FUSED>(*d, *p, *m);
                    }
                }
                let mut dqueries = [[0f32; LANES]; HD];
                for ((ds, p), row) in ds.iter_mut().zip(&p).zip(kv.chunks_exact(stride)) {
                    for ((d, p), m) in ds.iter_mut().zip(p).zip(&mean) {
                        *d = p * (*d - m) * scale;
                    }
                    let k = lane::<HD>(row, h * HD);
                    for (sum, k) in dqueries.iter_mut().zip(&k) {
                        for (o, d) in sum.iter_mut().zip(ds.iter()) {
                            *o = fused::<FUSED>(*d, *k, *o);
                        }
                    }
                }
                for (l, to) in dq[q_start + at..].chunks_mut(s.width).take(count).enumerate() {
                    for (o, sum) in to[..HD].iter_mut().zip(&dqueries) {
                        *o += sum[l];
                    }
                }
                if let Some(dkv) = dkv.as_deref_mut() {
                    let sinks = dkv[b * s.keys * stride..][..s.keys * stride].chunks_exact_mut(stride);
                    for ((row, ds), p) in sinks.zip(&ds).zip(&p) {
                        let (dk, dv) = row.split_at_mut(s.width);
                        add_weighted::<FUSED, HD>(&mut dk[h * HD..h * HD + HD], ds, &query_rows);
                        add_weighted::<FUSED, HD>(&mut dv[h * HD..h * HD + HD], p, &grad_rows);
                    }
                }
            }
        }
    }
}

/// `to += sum over lanes of weight * row`.
#[inline(always)]
fn add_weighted<const FUSED: bool, const HD: usize>(
    to: &mut [f32],
    weights: &[f32; LANES],
    rows: &[[f32; HD]; LANES],
) {
    let mut sum = lane::<HD>(to, 0);
    for (w, row) in weights.iter().zip(rows) {
        for (s, v) in sum.iter_mut().zip(row) {
            *s = fused::<FUSED>(*w, *v, *s);
        }
    }
    to.copy_from_slice(&sum);
}

/// Queries worked on together.
const LANES: usize = 8;
/// Most keys for which this beats loops over keys: the probabilities of a tile stay in the first-level cache.
pub(super) const MAX_KEYS: usize = 64;
