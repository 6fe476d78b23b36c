//! A trained square core between the leading singular directions of each query projection.
//!
//! The directions are orthonormal, so a row's gradient is no larger than that by the whole projection, and `rank^2` values
//! a block take little noise. They follow from the base's weights, which are public.

use super::{
    AdapterKind, Entry, Layout, MAX_CORE_WIDTH,
    low_rank::{self, add_outer, product, product_left},
    path::{Applied, Site},
    svd::{Directions, leading},
};
use crate::{
    context::Context,
    error::TfmError,
    model::{Model, config::ModelConfig},
};

#[derive(Debug)]
pub(super) struct Core {
    rank: usize,
    width: usize,
    /// Fixed directions of each block.
    blocks: Vec<Directions>,
}

/// Keys and values per key: of each block the core `(rank, rank)`.
pub(super) fn keys(config: &ModelConfig, rank: usize) -> (Vec<String>, usize) {
    (low_rank::keys(config, &["core"]), rank * rank)
}

/// Refuses ranks and rows that singular directions aren't computed for.
pub(super) fn checked(rank: usize, config: &ModelConfig) -> Result<usize, TfmError> {
    if config.row_width() > MAX_CORE_WIDTH {
        let (field, expected) = ("row width of the base of a core adapter", "at most 1024");
        return Err(TfmError::BadConfig { field, expected, got: config.row_width().to_string() });
    }
    low_rank::checked(rank, config)
}

impl Core {
    pub(super) fn new(model: &Model, rank: usize) -> Result<Self, TfmError> {
        let width = model.config().row_width();
        let weights = model.parts.icl.query_weights()?;
        let directions = |weight: &candle_core::Tensor| -> Result<Directions, TfmError> {
            Ok(leading(&weight.flatten_all()?.to_vec1()?, width, rank))
        };
        let blocks = weights.iter().map(directions).collect::<Result<_, _>>()?;
        Ok(Self { rank, width, blocks })
    }

    /// Fixed directions of each block.
    #[cfg(test)]
    pub(super) fn directions(&self) -> &[Directions] {
        &self.blocks
    }
}

impl AdapterKind for Core {
    fn entry(&self) -> Entry {
        Entry::Vectors
    }

    fn applied(&self, layout: &Layout, values: &[f32], context: &Context) -> Result<Applied, TfmError> {
        let factors = self.blocks.iter().zip(values.chunks_exact(layout.width)).map(|(fixed, core)| {
            let rows = core.chunks_exact(self.rank).map(|row| product_left(row, &fixed.right));
            (rows.flatten().collect(), fixed.left.clone())
        });
        low_rank::applied(context, self.width, factors)
    }

    fn add_gradient(&self, _applied: &Applied, _values: &[f32], sites: &[Site<'_>], gradient: &mut [f32]) {
        let size = self.rank * self.rank;
        for ((site, fixed), to) in sites.iter().zip(&self.blocks).zip(gradient.chunks_exact_mut(size)) {
            add_outer(to, &product_left(site.gradient, &fixed.left), &product(&fixed.right, site.input));
        }
    }
}
