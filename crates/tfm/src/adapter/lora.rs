//! LoRA on the queries of the in-context stage: both factors of a change of low rank are trained.
//!
//! The factor that reads rows starts at fixed random values and the other at zero, so the base is unchanged at first.

use super::{
    AdapterKind, Entry, Layout,
    frozen_lora::draws,
    low_rank::{self, add_outer, product, product_left},
    path::{Applied, Site},
};
use crate::{context::Context, error::TfmError, model::config::ModelConfig};

#[derive(Debug)]
pub(super) struct Lora {
    rank: usize,
    width: usize,
}

/// Keys and values per key: of each block `down (rank, D)`, then `up (D, rank)`.
pub(super) fn keys(config: &ModelConfig, rank: usize) -> (Vec<String>, usize) {
    (low_rank::keys(config, &["down", "up"]), rank * config.row_width())
}

impl Lora {
    pub(super) fn new(config: &ModelConfig, rank: usize) -> Self {
        Self { rank, width: config.row_width() }
    }

    /// The two factors of each block.
    fn blocks<'a>(&self, values: &'a [f32]) -> impl Iterator<Item = (&'a [f32], &'a [f32])> {
        let size = self.rank * self.width;
        values.chunks_exact(2 * size).map(move |block| block.split_at(size))
    }
}

impl AdapterKind for Lora {
    fn entry(&self) -> Entry {
        Entry::Vectors
    }

    fn initial(&self, layout: &Layout) -> Vec<f32> {
        let blocks = layout.keys.len() / 2;
        let downs = draws(SEED, blocks, self.rank, self.width);
        downs.into_iter().flat_map(|down| [down, vec![0.0; layout.width]].concat()).collect()
    }

    fn applied(&self, _layout: &Layout, values: &[f32], context: &Context) -> Result<Applied, TfmError> {
        let factors = self.blocks(values).map(|(down, up)| (down.to_vec(), up.to_vec()));
        low_rank::applied(context, self.width, factors)
    }

    fn add_gradient(&self, _applied: &Applied, values: &[f32], sites: &[Site<'_>], gradient: &mut [f32]) {
        let size = self.rank * self.width;
        for ((site, (down, up)), to) in
            sites.iter().zip(self.blocks(values)).zip(gradient.chunks_exact_mut(2 * size))
        {
            let (of_down, of_up) = to.split_at_mut(size);
            add_outer(of_down, &product_left(site.gradient, up), site.input);
            add_outer(of_up, site.gradient, &product(down, site.input));
        }
    }
}

/// Seed of the first values of the trained reading factors.
const SEED: u64 = 0;
