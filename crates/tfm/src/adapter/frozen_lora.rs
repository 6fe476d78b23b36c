//! LoRA with the reading factor fixed at random values that a seed of the plan gives: only the writing one is trained.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::{
    AdapterKind, Entry, Layout,
    low_rank::{self, add_outer, product},
    path::{Applied, Site},
};
use crate::{context::Context, error::TfmError, model::config::ModelConfig};

#[derive(Debug)]
pub(super) struct FrozenLora {
    rank: usize,
    width: usize,
    /// The fixed factor `(rank, D)` of each block.
    downs: Vec<Vec<f32>>,
}

/// Keys and values per key: of each block `up (D, rank)`.
pub(super) fn keys(config: &ModelConfig, rank: usize) -> (Vec<String>, usize) {
    (low_rank::keys(config, &["up"]), rank * config.row_width())
}

impl FrozenLora {
    pub(super) fn new(config: &ModelConfig, rank: usize, seed: u64) -> Self {
        let width = config.row_width();
        Self { rank, width, downs: draws(seed, config.icl_num_blocks, rank, width) }
    }
}

/// Factors `(rank, width)` of variance `1 / width`, uniform. Every step is exact in f32, so all parties draw the same.
pub(super) fn draws(seed: u64, blocks: usize, rank: usize, width: usize) -> Vec<Vec<f32>> {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let limit = (3.0 / width as f32).sqrt();
    // 24 bits as a number in [-1, 1).
    let mut draw = || ((rng.random::<u32>() >> 8) as f32 / 8_388_608.0 - 1.0) * limit;
    (0..blocks).map(|_| (0..rank * width).map(|_| draw()).collect()).collect()
}

impl AdapterKind for FrozenLora {
    fn entry(&self) -> Entry {
        Entry::Vectors
    }

    fn applied(&self, layout: &Layout, values: &[f32], context: &Context) -> Result<Applied, TfmError> {
        let ups = values.chunks_exact(layout.width);
        let factors = self.downs.iter().zip(ups).map(|(down, up)| (down.clone(), up.to_vec()));
        low_rank::applied(context, self.width, factors)
    }

    fn add_gradient(&self, _applied: &Applied, _values: &[f32], sites: &[Site<'_>], gradient: &mut [f32]) {
        let size = self.rank * self.width;
        for ((site, down), to) in sites.iter().zip(&self.downs).zip(gradient.chunks_exact_mut(size)) {
            add_outer(to, site.gradient, &product(down, site.input));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::draws;

    /// First values by the ChaCha20 stream of seed 0: a change would part agents of different versions.
    #[test]
    fn draws_follow_from_the_seed_alone_and_have_unit_gain() {
        let blocks = draws(0, 2, 2, 4096);
        assert_eq!(blocks, draws(0, 2, 2, 4096));
        assert_ne!(blocks[0], blocks[1]);
        assert_ne!(blocks[0], draws(1, 1, 2, 4096)[0]);
        for row in blocks[0].chunks_exact(4096) {
            let norm: f32 = row.iter().map(|v| v * v).sum();
            assert!((norm - 1.0).abs() < 0.05, "{norm}");
        }
    }
}
