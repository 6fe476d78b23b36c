//! The row stage in both directions: cells of a row to its vector, and the vector's gradient back to the cells.

use super::{
    super::{
        matrix::Standardised,
        scratch::Buffer,
        stages::{Row, first_rows},
    },
    block::{FeedForward, Turned},
};
use crate::ops::short::Sequences;

/// What a forward pass over some rows keeps.
pub(super) struct Kept {
    blocks: Vec<KeptBlock>,
    out: Standardised,
}

struct KeptBlock {
    sequences: Sequences,
    norm: Standardised,
    /// Queries, and keys with values side by side, as they attend.
    queries: Buffer,
    keys_values: Buffer,
    feed_forward: FeedForward,
}

/// Row vectors `(items, C * E)` of items `(items, length, E)`, tokens first.
pub(super) fn forward(row: &Row, mut z: Buffer, length: usize) -> (Buffer, Kept) {
    let (width, tokens) = (row.width, row.tokens().len() / row.width);
    let angles = row.angles(length);
    let items = z.len() / (length * width);
    let mut blocks = Vec::with_capacity(row.blocks.len());
    for (i, block) in row.blocks.iter().enumerate() {
        let (normed, norm) = block.norm1.kept(&z);
        let mut keys_values = block.keys_values(&normed);
        row.rotate(&mut keys_values, 2 * width, length, &angles, 1.0);
        let (rows, mut queries) = if i + 1 == row.blocks.len() {
            z = first_rows(&z, length * width, tokens * width);
            (tokens, block.queries(&first_rows(&normed, length * width, tokens * width)))
        } else {
            (length, block.queries(&normed))
        };
        row.rotate(&mut queries, width, rows, &angles, 1.0);
        let sequences = Sequences { items, queries: rows, keys: length, width, heads: block.heads() };
        let mut read = Buffer::stale(z.len());
        sequences.attend(&queries, &keys_values, &mut read);
        block.out.add_to(&read, &mut z);
        let feed_forward = FeedForward::forward(block, &mut z);
        blocks.push(KeptBlock { sequences, norm, queries, keys_values, feed_forward });
    }
    let (vectors, out) = row.out_norm.kept(&z);
    (vectors, Kept { blocks, out })
}

/// Gradient of items `(items, length, E)` from that of their vectors `(items, C * E)`.
pub(super) fn back(row: &Row, turned: &[Turned], kept: &Kept, of_vectors: &[f32]) -> Buffer {
    let width = row.width;
    let mut gradient = Buffer::zeros(of_vectors.len());
    row.out_norm.add_back(&kept.out, of_vectors, &mut gradient);
    for ((block, turned), kept) in row.blocks.iter().zip(turned).zip(&kept.blocks).rev() {
        kept.feed_forward.back(block, turned, &mut gradient);
        let Sequences { queries, keys, .. } = kept.sequences;
        let angles = row.angles(keys);
        let of_read = turned.out.of(&gradient);
        let mut of_queries = Buffer::zeros(kept.queries.len());
        let mut of_keys_values = Buffer::zeros(kept.keys_values.len());
        let sinks = (&mut of_queries[..], &mut of_keys_values[..]);
        kept.sequences.attend_back(&kept.queries, &kept.keys_values, &of_read, sinks);
        row.rotate(&mut of_queries, width, queries, &angles, -1.0);
        row.rotate(&mut of_keys_values, 2 * width, keys, &angles, -1.0);
        let mut of_normed = turned.key_value.of(&of_keys_values);
        if queries == keys {
            turned.query.add_product(&of_queries, &mut of_normed);
        } else {
            // Only the first rows of an item went on.
            add_first(&mut of_normed, keys * width, &turned.query.of(&of_queries), queries * width);
            let mut all = Buffer::zeros(of_normed.len());
            add_first(&mut all, keys * width, &gradient, queries * width);
            gradient = all;
        }
        block.norm1.add_back(&kept.norm, &of_normed, &mut gradient);
    }
    gradient
}

/// Adds runs of `count` values to the first of every `size`.
fn add_first(to: &mut [f32], size: usize, values: &[f32], count: usize) {
    for (to, values) in to.chunks_exact_mut(size).zip(values.chunks_exact(count)) {
        to.iter_mut().zip(values).for_each(|(t, v)| *t += v);
    }
}
