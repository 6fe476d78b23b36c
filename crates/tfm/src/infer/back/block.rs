//! The parts of an attention block in both directions: what a forward pass keeps, and the way back to its input.

use super::super::{
    block::{Block, spread},
    kernel::gate,
    matrix::{Matrix, Standardised},
    scratch::Buffer,
};
use crate::ops::activation::{activate, gate_backward, multiply};

/// A block's maps as gradients come back through them.
pub(super) struct Turned {
    pub(super) query: Matrix,
    pub(super) key_value: Matrix,
    pub(super) out: Matrix,
    first: Matrix,
    second: Matrix,
    scaling: Option<[Matrix; 2]>,
}

impl Turned {
    pub(super) fn of(block: &Block) -> Self {
        let network = block.scaling.as_ref().and_then(|scaling| scaling.query.as_ref());
        Self {
            query: block.query.turned(),
            key_value: block.key_value.turned(),
            out: block.out.turned(),
            first: block.first.turned(),
            second: block.second.turned(),
            scaling: network.map(|[first, second]| [first.turned(), second.turned()]),
        }
    }
}

/// What the feed-forward part keeps.
pub(super) struct FeedForward {
    norm: Standardised,
    /// Slopes of the activation at the hidden layer.
    slopes: Buffer,
}

impl FeedForward {
    /// Adds the feed-forward part to residual rows.
    pub(super) fn forward(block: &Block, rows: &mut [f32]) -> Self {
        let (normed, norm) = block.norm2.kept(rows);
        let (active, slopes) = activated(block.first.of(&normed));
        block.second.add_to(&active, rows);
        Self { norm, slopes }
    }

    /// Turns the gradient of the part's output into that of its input.
    pub(super) fn back(&self, block: &Block, turned: &Turned, gradient: &mut [f32]) {
        let mut hidden = turned.second.of(gradient);
        multiply(&mut hidden, &self.slopes);
        block.norm2.add_back(&self.norm, &turned.first.of(&hidden), gradient);
    }
}

/// GELU of its inputs, and its slopes there.
pub(super) fn activated(inputs: Buffer) -> (Buffer, Buffer) {
    let mut active = Buffer::stale(inputs.len());
    let mut slopes = inputs;
    activate(&mut slopes, &mut active);
    (active, slopes)
}

/// What the scaling of queries by a network of themselves keeps.
pub(super) struct Gated {
    /// Queries before.
    queries: Buffer,
    /// Slopes of the network's activation.
    slopes: Buffer,
    /// What the network put out, one number per feature.
    turned: Buffer,
}

impl Gated {
    /// Scales queries; nothing is kept where the scaling doesn't depend on them.
    pub(super) fn forward(block: &Block, queries: &mut [f32], base: &[f32]) -> Option<Self> {
        let Some((scaling, [first, second])) =
            block.scaling.as_ref().and_then(|s| Some((s, s.query.as_ref()?)))
        else {
            block.scale(queries, base);
            return None;
        };
        let before = Buffer::copy(queries);
        let (active, slopes) = activated(first.of(queries));
        let mut turned = second.of(&active);
        if second.output() != scaling.head_dim {
            turned = spread(&turned, scaling.head_dim);
        }
        gate(queries, &turned, base);
        Some(Self { queries: before, slopes, turned })
    }

    /// Turns the gradient of scaled queries into that of the queries before.
    pub(super) fn back(kept: Option<&Self>, turned: &Turned, gradient: &mut Buffer, base: &[f32]) {
        let (Some(kept), Some([first, second])) = (kept, &turned.scaling) else {
            if !base.is_empty() {
                gradient.chunks_exact_mut(base.len()).for_each(|row| multiply(row, base));
            }
            return;
        };
        let (mut of_queries, mut of_turned) = (Buffer::stale(gradient.len()), Buffer::stale(gradient.len()));
        let mut of_base = vec![0f32; base.len()];
        let sources = (&kept.queries[..], &kept.turned[..], &gradient[..]);
        gate_backward(sources, base, &mut of_queries, &mut of_turned, &mut of_base);
        // One number that a whole head was multiplied by gets the sum of its features' gradients.
        let outputs = second.input();
        if outputs == 1 {
            let sums: Vec<f32> =
                of_turned.chunks_exact(first.output()).map(|head| head.iter().sum()).collect();
            of_turned = Buffer::copy(&sums);
        }
        let mut hidden = second.of(&of_turned);
        multiply(&mut hidden, &kept.slopes);
        first.add_product(&hidden, &mut of_queries);
        *gradient = of_queries;
    }
}
