//! Keys and values of attention heads in the order that the loops read them, in single or half precision.
//!
//! A head's keys stand in panels of 32 keys, feature by feature, its values in panels of 32 features, key by key; places
//! beyond the last key or feature are zero. So one query reads both from end to end. Halves are widened block by block
//! into a buffer that stays in the processor's cache, so they cost half the memory traffic and nothing else.

use half::{f16, slice::HalfFloatSliceExt};
use serde::{Deserialize, Serialize};

use super::{
    kernel::{PANEL, Product, Start, halved, packed, place, softmax_weights, widen},
    scratch::Buffer,
};
use crate::simd::dispatch;

/// Numbers that a cache is held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Single precision.
    F32,
    /// Half precision: half the bytes, about three decimal digits.
    F16,
}

impl Precision {
    /// Bytes of one number.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::F16 => size_of::<f16>(),
        }
    }
}

/// Numbers held in either precision.
pub(crate) enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Numbers {
    pub(super) fn zeros(count: usize, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(vec![0.0; count]),
            Precision::F16 => Self::F16(vec![f16::ZERO; count]),
        }
    }

    pub(super) fn write(&mut self, at: usize, values: &[f32]) {
        match self {
            Self::F32(all) => all[at..at + values.len()].copy_from_slice(values),
            Self::F16(all) => all[at..at + values.len()].copy_from_slice(&halves(values)),
        }
    }

    /// `count` values from `at`, widened.
    pub(crate) fn read(&self, at: usize, count: usize) -> Vec<f32> {
        match self {
            Self::F32(all) => all[at..at + count].to_vec(),
            Self::F16(all) => {
                let mut values = vec![0f32; count];
                widen(&all[at..at + count], &mut values);
                values
            }
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::F32(all) => size_of_val(all.as_slice()),
            Self::F16(all) => size_of_val(all.as_slice()),
        }
    }
}

/// Sizes of the heads of one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HeadSizes {
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) keys: usize,
}

impl HeadSizes {
    /// Numbers of the keys of one head.
    pub(super) fn keys(self) -> usize {
        packed(self.head_dim, self.keys)
    }

    /// Numbers of the values of one head.
    fn values(self) -> usize {
        packed(self.keys, self.head_dim)
    }

    /// Numbers of all heads.
    pub(super) fn numbers(self) -> usize {
        self.heads * (self.keys() + self.values())
    }

    pub(super) fn width(self) -> usize {
        self.heads * self.head_dim
    }
}

/// Keys and values of several batches of equal sizes.
pub(crate) struct Heads {
    sizes: HeadSizes,
    numbers: Numbers,
}

impl Heads {
    pub(super) fn zeros(sizes: HeadSizes, batches: usize, precision: Precision) -> Self {
        Self { sizes, numbers: Numbers::zeros(batches * sizes.numbers(), precision) }
    }

    /// Stores keys and values `(count, 2 width)`, side by side, as the keys from `first` on of a batch.
    pub(super) fn put(&mut self, batch: usize, first: usize, rows: &[f32]) {
        let start = batch * self.sizes.numbers();
        match &mut self.numbers {
            Numbers::F32(all) => put(self.sizes, &mut all[start..], first, rows),
            Numbers::F16(all) => {
                put(self.sizes, &mut all[start..], first, &halves(rows));
            }
        }
    }

    /// Keys and values of a batch, side by side, `(keys, 2 width)`.
    pub(crate) fn rows(&self, batch: usize) -> Vec<f32> {
        let HeadSizes { heads, head_dim, keys } = self.sizes;
        let width = self.sizes.width();
        let packed = self.numbers.read(batch * self.sizes.numbers(), self.sizes.numbers());
        let mut rows = vec![0f32; keys * 2 * width];
        for (h, head) in packed.chunks_exact(self.sizes.numbers() / heads).enumerate() {
            let (key_panels, value_panels) = head.split_at(self.sizes.keys());
            for (j, row) in rows.chunks_exact_mut(2 * width).enumerate() {
                for d in 0..head_dim {
                    row[h * head_dim + d] = key_panels[place(d, j, head_dim, keys)];
                    row[width + h * head_dim + d] = value_panels[place(j, d, keys, head_dim)];
                }
            }
        }
        rows
    }

    /// Attends from queries `(n, width)` to a batch, `(n, width)`.
    pub(super) fn attend(&self, batch: usize, queries: &[f32], out: &mut [f32]) {
        let HeadSizes { heads, head_dim, keys } = self.sizes;
        let (width, per_head) = (self.sizes.width(), self.sizes.numbers() / heads);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let block = QUERY_BLOCK.min(queries.len() / width);
        let mut scores = Buffer::stale(block * keys);
        let mut inverses = [0f32; QUERY_BLOCK];
        let mut widened = Vec::new();
        for (queries, out) in queries.chunks(block * width).zip(out.chunks_mut(block * width)) {
            let rows = queries.len() / width;
            for h in 0..heads {
                let start = batch * self.sizes.numbers() + h * per_head;
                let scores = &mut scores[..rows * keys];
                let halved = halved(keys, head_dim);
                let reading = Reading { sizes: self.sizes, rows, width, at: h * head_dim, halved };
                match &self.numbers {
                    Numbers::F32(all) => {
                        let (key_panels, value_panels) =
                            all[start..start + per_head].split_at(self.sizes.keys());
                        reading.score(queries, key_panels, 0, keys, scores);
                        softmax_weights(scores, keys, scale, &mut inverses);
                        reading.gather(scores, value_panels, 0, keys, out);
                    }
                    Numbers::F16(all) => {
                        let (key_panels, value_panels) =
                            all[start..start + per_head].split_at(self.sizes.keys());
                        for (i, part) in key_panels.chunks(WIDE_BLOCK * head_dim).enumerate() {
                            widened.resize(part.len(), 0.0);
                            widen(part, &mut widened);
                            let first = i * WIDE_BLOCK;
                            reading.score(queries, &widened, first, WIDE_BLOCK.min(keys - first), scores);
                        }
                        softmax_weights(scores, keys, scale, &mut inverses);
                        for first in (0..keys).step_by(WIDE_BLOCK) {
                            let count = WIDE_BLOCK.min(keys - first);
                            widened.clear();
                            for panel in value_panels.chunks(keys * PANEL) {
                                let (from, features) = (widened.len(), panel.len() / keys);
                                widened.resize(from + count * features, 0.0);
                                widen(&panel[first * features..][..count * features], &mut widened[from..]);
                            }
                            reading.gather(scores, &widened, first, count, out);
                        }
                    }
                }
                for (row, inverse) in out.chunks_exact_mut(width).zip(&inverses) {
                    row[h * head_dim..][..head_dim].iter_mut().for_each(|v| *v *= inverse);
                }
            }
        }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.numbers.bytes()
    }
}

/// Values as halves; those beyond the largest become it.
fn halves(values: &[f32]) -> Vec<f16> {
    let most = f16::MAX.to_f32();
    let within: Vec<f32> = values.iter().map(|v| v.clamp(-most, most)).collect();
    let mut halves = vec![f16::ZERO; values.len()];
    halves.convert_from_f32_slice(&within);
    halves
}

pub(super) fn put<T: Copy>(sizes: HeadSizes, into: &mut [T], first: usize, rows: &[T]) {
    let HeadSizes { heads, head_dim, keys } = sizes;
    let width = sizes.width();
    for (j, row) in (first..).zip(rows.chunks_exact(2 * width)) {
        let (key, value) = row.split_at(width);
        let per_head = into.chunks_exact_mut(sizes.numbers() / heads);
        for ((key, value), head) in key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim)).zip(per_head)
        {
            let (key_panels, value_panels) = head.split_at_mut(sizes.keys());
            for (d, k) in key.iter().enumerate() {
                key_panels[place(d, j, head_dim, keys)] = *k;
            }
            for (first, part) in (0..head_dim).step_by(PANEL).zip(value.chunks(PANEL)) {
                value_panels[place(j, first, keys, head_dim)..][..part.len()].copy_from_slice(part);
            }
        }
    }
}

/// One head read by some query rows.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    pub(super) sizes: HeadSizes,
    pub(super) rows: usize,
    pub(super) width: usize,
    /// First feature of the head in a row.
    pub(super) at: usize,
    /// Whether what is gathered is summed in two parts.
    pub(super) halved: bool,
}

impl Reading {
    /// Inner products with `count` keys from `first` on, in scores `(rows, keys)`.
    pub(super) fn score(
        self,
        queries: &[f32],
        panels: &[f32],
        first: usize,
        count: usize,
        scores: &mut [f32],
    ) {
        dispatch(Product {
            x: &queries[self.at..],
            x_stride: self.width,
            rows: self.rows,
            depth: self.sizes.head_dim,
            panels,
            outputs: count,
            out: &mut scores[first..],
            out_stride: self.sizes.keys,
            start: Start::Zero,
            halved: halved(self.sizes.head_dim, count),
        });
    }

    /// Values of `count` keys from `first` on, weighted: the head's part of rows `(rows, width)`, to which keys beyond the
    /// first are added.
    pub(super) fn gather(self, weights: &[f32], panels: &[f32], first: usize, count: usize, out: &mut [f32]) {
        dispatch(Product {
            x: &weights[first..],
            x_stride: self.sizes.keys,
            rows: self.rows,
            depth: count,
            panels,
            outputs: self.sizes.head_dim,
            out: &mut out[self.at..],
            out_stride: self.width,
            start: if first == 0 { Start::Zero } else { Start::Held },
            halved: self.halved,
        });
    }
}

/// Query rows whose scores are held at a time.
pub(super) const QUERY_BLOCK: usize = 24;
/// Keys that are widened at a time; a multiple of a panel.
pub(super) const WIDE_BLOCK: usize = 128;

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::{HeadSizes, Heads, Precision, QUERY_BLOCK, WIDE_BLOCK};

    fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        (0..count).map(|_| rng.random_range(-1.5..1.5)).collect()
    }

    /// `softmax(q k / sqrt(head_dim)) v` in double precision.
    fn plain(sizes: HeadSizes, queries: &[f32], kv: &[f32]) -> Vec<f64> {
        let HeadSizes { head_dim, .. } = sizes;
        let width = sizes.width();
        let mut out = Vec::new();
        for q in queries.chunks_exact(width) {
            for (h, q) in q.chunks_exact(head_dim).enumerate() {
                let at = h * head_dim;
                let dot = |row: &[f32]| -> f64 {
                    q.iter().zip(&row[at..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                let weights: Vec<f64> = kv
                    .chunks_exact(2 * width)
                    .map(|row| (dot(row) / (head_dim as f64).sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let sum: f64 = kv
                        .chunks_exact(2 * width)
                        .zip(&weights)
                        .map(|(row, w)| w * f64::from(row[width + at + d]))
                        .sum();
                    out.push(sum / total);
                }
            }
        }
        out
    }

    #[test]
    fn attention_matches_the_formula_in_both_precisions() {
        for (heads, head_dim, keys, queries) in [
            (2, 4, 5, 1),
            (1, 8, 16, 3),
            (4, 32, WIDE_BLOCK + 3, 1),
            (2, 12, 2 * WIDE_BLOCK, QUERY_BLOCK + 2),
            (1, 2, 1, 7),
            (2, 72, WIDE_BLOCK + 70, 3),
        ] {
            let sizes = HeadSizes { heads, head_dim, keys };
            let (kv, q) = (noise(1, 2 * 2 * sizes.width() * keys), noise(2, queries * sizes.width()));
            let second = &kv[2 * sizes.width() * keys..];
            let exact = plain(sizes, &q, second);
            for (precision, bound) in [(Precision::F32, 2e-6), (Precision::F16, 2e-3)] {
                let mut store = Heads::zeros(sizes, 2, precision);
                for (batch, rows) in kv.chunks_exact(2 * sizes.width() * keys).enumerate() {
                    let cut = keys / 2 * 2 * sizes.width();
                    store.put(batch, 0, &rows[..cut]);
                    store.put(batch, keys / 2, &rows[cut..]);
                }
                assert_eq!(store.bytes(), 2 * sizes.numbers() * precision.bytes());
                let apart =
                    |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(apart(&store.rows(1), second) < 1e-3);
                let mut out = vec![f32::NAN; q.len()];
                store.attend(1, &q, &mut out);
                let worst =
                    out.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                assert!(worst < bound, "{sizes:?} {precision:?}: {worst}");
                // One query at a time gives the same bits.
                for (q, expected) in q.chunks_exact(sizes.width()).zip(out.chunks_exact(sizes.width())) {
                    let mut one = vec![0f32; sizes.width()];
                    store.attend(1, q, &mut one);
                    assert_eq!(one, expected);
                }
            }
        }
    }
}
