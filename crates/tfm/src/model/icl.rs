//! In-context stage: all rows attend to the labelled context rows, never to queries.

use candle_core::Tensor;

use super::{
    attention::{Block, BlockSizes},
    config::ModelConfig,
    forward::Observe,
    params::{Source, affine},
};
use crate::{error::TfmError, ops::linear::linear};

/// The in-context stage.
pub(crate) struct IclStage {
    label: (Tensor, Tensor),
    blocks: Vec<Block>,
}

impl IclStage {
    pub(crate) fn new(source: &mut dyn Source, config: &ModelConfig) -> Result<Self, TfmError> {
        let width = config.row_width();
        let sizes = BlockSizes {
            width,
            heads: config.icl_nhead,
            ff_factor: config.ff_factor,
            ssmax: config.variant.icl_ssmax,
            ssmax_hidden: config.ssmax_hidden,
            bias_free_ln: config.variant.bias_free_ln,
            interleaved: false,
        };
        let blocks = (0..config.icl_num_blocks)
            .map(|i| Block::new(source, &format!("icl_predictor.tf_icl.blocks.{i}"), sizes))
            .collect::<Result<_, _>>()?;
        Ok(Self { label: affine(source, "icl_predictor.y_encoder", width, config.label_width())?, blocks })
    }

    /// Label embeddings `(tables, context, D)` from encoded labels `(tables, context, label width)`.
    pub(crate) fn labels(&self, encoded: &Tensor) -> Result<Tensor, TfmError> {
        Ok(linear(encoded, &self.label.0, &self.label.1)?)
    }

    /// Query rows `(tables, queries, D)` after reading the context, from all rows `(tables, rows, D)`.
    pub(crate) fn queries(&self, mut rows: Tensor, context: usize) -> Result<Tensor, TfmError> {
        let total = rows.dim(1)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let normed = block.normed(&rows)?;
            let kv = block.keys_values(&normed.narrow(1, 0, context)?)?;
            rows = if i + 1 == self.blocks.len() {
                let x = rows.narrow(1, context, total - context)?;
                block.attend(&x, &normed.narrow(1, context, total - context)?, &kv, None, context)?
            } else {
                block.attend(&rows, &normed, &kv, None, context)?
            };
        }
        Ok(rows)
    }

    /// All rows `(1, rows, D)` after the last block, where `observe` sees them after each.
    pub(crate) fn observed(
        &self,
        mut rows: Tensor,
        context: usize,
        observe: Observe<'_>,
    ) -> Result<Tensor, TfmError> {
        for (i, block) in self.blocks.iter().enumerate() {
            let normed = block.normed(&rows)?;
            let kv = block.keys_values(&normed.narrow(1, 0, context)?)?;
            rows = block.attend(&rows, &normed, &kv, None, context)?;
            observe(&format!("icl_block.{i}"), &rows)?;
        }
        Ok(rows)
    }

    /// Weights `(D, D)` of the queries, block by block.
    pub(crate) fn query_weights(&self) -> Result<Vec<Tensor>, TfmError> {
        self.blocks.iter().map(Block::query_weight).collect()
    }
}
