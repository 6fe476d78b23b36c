//! Query rows that read a fixed context, and the way back to their queries.
//!
//! Scores and slopes are products with keys and values in the panels of [`super::super::heads`]: on the way back keys and
//! values change places. The context is no function of a query row, so it gets no gradient.

use std::ops::Range;

use super::super::{
    heads::{HeadSizes, Reading, put},
    kernel::softmax_weights,
    scratch::Buffer,
};
use crate::{ops::math::dot, simd::wide};

/// One view's keys and values of one block, in the order of either direction.
pub(super) struct ContextRows {
    sizes: HeadSizes,
    forward: Vec<f32>,
    back: Vec<f32>,
}

/// What reading keeps.
pub(super) struct Weights {
    /// Exponentials of the scores `(heads, n, keys)`.
    weights: Buffer,
    /// The inverse of their sums `(heads, n)`.
    inverses: Buffer,
    /// What was read `(n, width)`.
    pub(super) read: Buffer,
}

impl ContextRows {
    /// From keys and values `(keys, 2 width)`, side by side.
    pub(super) fn new(sizes: HeadSizes, rows: &[f32]) -> Self {
        let width = sizes.width();
        let swapped: Vec<f32> =
            rows.chunks_exact(2 * width).flat_map(|row| [&row[width..], &row[..width]].concat()).collect();
        let packed = |rows: &[f32]| {
            let mut panels = vec![0f32; sizes.numbers()];
            put(sizes, &mut panels, 0, rows);
            panels
        };
        Self { sizes, forward: packed(rows), back: packed(&swapped) }
    }

    /// What queries `(n, width)` read.
    pub(super) fn attend(&self, queries: &[f32]) -> Weights {
        let (keys, n) = (self.sizes.keys, queries.len() / self.sizes.width());
        let mut kept = Weights {
            weights: Buffer::stale(self.sizes.heads * n * keys),
            inverses: Buffer::stale(self.sizes.heads * n),
            read: Buffer::stale(queries.len()),
        };
        let width = self.sizes.width();
        for (h, rows) in self.blocks(n) {
            let (reading, key_panels, value_panels) = self.head(&self.forward, h, rows.len());
            let (from, at) = (rows.start * width, reading.at);
            let weights = &mut kept.weights[(h * n + rows.start) * keys..][..rows.len() * keys];
            let inverses = &mut kept.inverses[h * n + rows.start..][..rows.len()];
            let read = &mut kept.read[from..][..rows.len() * width];
            reading.score(&queries[from..], key_panels, 0, keys, weights);
            softmax_weights(weights, keys, self.scale(), inverses);
            reading.gather(weights, value_panels, 0, keys, read);
            for (row, inverse) in read.chunks_exact_mut(width).zip(inverses.iter()) {
                row[at..][..self.sizes.head_dim].iter_mut().for_each(|v| *v *= inverse);
            }
        }
        kept
    }

    /// Gradient of the queries from that of what they read, `(n, width)` both.
    pub(super) fn attend_back(&self, kept: &Weights, gradient: &[f32]) -> Buffer {
        let HeadSizes { head_dim, keys, .. } = self.sizes;
        let (width, n) = (self.sizes.width(), gradient.len() / self.sizes.width());
        let mut of_queries = Buffer::stale(gradient.len());
        let mut slopes = Buffer::stale(BLOCK.min(n) * keys);
        let mut less = [0f32; BLOCK];
        for (h, rows) in self.blocks(n) {
            let (reading, value_panels, key_panels) = self.head(&self.back, h, rows.len());
            let (from, at) = (rows.start * width, reading.at);
            let gradient = &gradient[from..][..rows.len() * width];
            let read = kept.read[from..].chunks_exact(width);
            // What a score's slope is less of: the product of what was read with its gradient.
            for (less, (read, gradient)) in less.iter_mut().zip(read.zip(gradient.chunks_exact(width))) {
                *less = dot(&read[at..][..head_dim], &gradient[at..][..head_dim]);
            }
            let slopes = &mut slopes[..rows.len() * keys];
            let weights = &kept.weights[(h * n + rows.start) * keys..][..slopes.len()];
            let inverses = &kept.inverses[h * n + rows.start..][..rows.len()];
            reading.score(gradient, value_panels, 0, keys, slopes);
            weigh(slopes, weights, &less[..rows.len()], (self.scale(), inverses));
            reading.gather(slopes, key_panels, 0, keys, &mut of_queries[from..]);
        }
        of_queries
    }

    /// Heads, and blocks of rows whose scores stay in the second-level cache with the head's keys and values.
    fn blocks(&self, n: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let blocks = move || (0..n).step_by(BLOCK).map(move |first| first..n.min(first + BLOCK));
        (0..self.sizes.heads).flat_map(move |h| blocks().map(move |rows| (h, rows)))
    }

    fn scale(&self) -> f32 {
        1.0 / (self.sizes.head_dim as f32).sqrt()
    }

    /// One head for `n` rows: what is scored with, and what is gathered.
    fn head<'a>(&self, panels: &'a [f32], head: usize, n: usize) -> (Reading, &'a [f32], &'a [f32]) {
        let size = self.sizes.numbers() / self.sizes.heads;
        let (scored, gathered) = panels[head * size..][..size].split_at(self.sizes.keys());
        let (width, at) = (self.sizes.width(), head * self.sizes.head_dim);
        (Reading { sizes: self.sizes, rows: n, width, at, halved: false }, scored, gathered)
    }
}

wide!(
    /// `(slopes - less) * weights * scale * inverse`, row by row.
    fn weigh(slopes: &'a mut [f32], weights: &'a [f32], less: &'a [f32], scales: (f32, &'a [f32])) => weigh_loop
);

#[inline(always)]
fn weigh_loop<const FUSED: bool>(
    slopes: &mut [f32],
    weights: &[f32],
    less: &[f32],
    (scale, inverses): (f32, &[f32]),
) {
    let keys = slopes.len() / less.len().max(1);
    let rows = slopes.chunks_exact_mut(keys.max(1)).zip(weights.chunks_exact(keys.max(1)));
    for ((slopes, weights), (less, inverse)) in rows.zip(less.iter().zip(inverses)) {
        let factor = scale * inverse;
        for (slope, weight) in slopes.iter_mut().zip(weights) {
            *slope = (*slope - less) * (weight * factor);
        }
    }
}

/// Rows of a block; products take six at a time.
const BLOCK: usize = 36;
