//! Row stage: the cells of one row attend to each other and are read out by row tokens.
//!
//! Rows don't see each other here. Input `(rows, columns, E)`, output `(rows, C * E)`.

use candle_core::Tensor;

use super::{
    attention::{Block, BlockSizes},
    config::ModelConfig,
    forward::Observe,
    params::{Init, Source, norm},
    variant::Ssmax,
};
use crate::{error::TfmError, ops::norm::layer_norm};

/// The row stage.
pub(crate) struct RowStage {
    tokens: Tensor,
    frequencies: Vec<f32>,
    blocks: Vec<Block>,
    out_norm: (Tensor, Tensor),
}

impl RowStage {
    pub(crate) fn new(source: &mut dyn Source, config: &ModelConfig) -> Result<Self, TfmError> {
        let width = config.embed_dim;
        let sizes = BlockSizes {
            width,
            heads: config.row_nhead,
            ff_factor: config.ff_factor,
            ssmax: Ssmax::None,
            ssmax_hidden: config.ssmax_hidden,
            bias_free_ln: config.variant.bias_free_ln,
            interleaved: config.variant.row_rope_interleaved,
        };
        let tokens =
            source.tensor("row_interactor.cls_tokens", &[config.row_num_cls, width], Init::Normal(0.02))?;
        let blocks = (0..config.row_num_blocks)
            .map(|i| Block::new(source, &format!("row_interactor.tf_row.blocks.{i}"), sizes))
            .collect::<Result<_, _>>()?;
        let frequencies = source
            .tensor(FREQUENCIES, &[width / config.row_nhead / 2], Init::Rotary(config.row_rope_base))?
            .to_vec1()?;
        let out_norm = norm(source, "row_interactor.out_ln", width, config.variant.bias_free_ln)?;
        Ok(Self { tokens, frequencies, blocks, out_norm })
    }

    /// Row vectors `(rows, C * E)` of cells `(rows, columns, E)`.
    pub(crate) fn rows(&self, cells: &Tensor) -> Result<Tensor, TfmError> {
        self.observed(cells, &mut |_, _| Ok(()))
    }

    /// As [`Self::rows`], where `observe` sees the tokens and cells `(rows, C + columns, E)` after each block; after
    /// the last one the tokens `(rows, C, E)` alone.
    pub(crate) fn observed(&self, cells: &Tensor, observe: Observe<'_>) -> Result<Tensor, TfmError> {
        let (rows, _, width) = cells.dims3()?;
        let count = self.tokens.dim(0)?;
        let tokens = self.tokens.unsqueeze(0)?.broadcast_as((rows, count, width))?;
        let mut z = Tensor::cat(&[&tokens, cells], 1)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let normed = block.normed(&z)?;
            let kv = block.rotate_keys(&block.keys_values(&normed)?, &self.frequencies)?;
            let last = i + 1 == self.blocks.len();
            z = if last {
                let (x, q) = (z.narrow(1, 0, count)?, normed.narrow(1, 0, count)?);
                block.attend(&x, &q, &kv, Some(&self.frequencies), 0)?
            } else {
                block.attend(&z, &normed, &kv, Some(&self.frequencies), 0)?
            };
            observe(&format!("row_block.{i}"), &z)?;
        }
        Ok(layer_norm(&z, &self.out_norm.0, &self.out_norm.1)?.reshape((rows, count * width))?)
    }
}

/// Name of the rotary frequencies, which are stored but never trained.
pub(crate) const FREQUENCIES: &str = "row_interactor.tf_row.rope.freqs";
