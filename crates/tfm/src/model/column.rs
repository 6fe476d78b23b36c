//! Column stage: every cell is embedded by its value, its group and how the context rows of its column look.
//!
//! A set transformer per column: inducing points read the context rows, all rows read the inducing points. A query
//! row's cells therefore depend on that row and on the context only. Cells are `(tables * slots, rows, E)`, where a
//! slot is a column or a group of columns.

use candle_core::Tensor;

use super::{
    attention::{Block, BlockSizes},
    config::ModelConfig,
    forward::Observe,
    params::{Init, Source, affine, norm},
    variant::{Grouping, Ssmax},
};
use crate::{
    error::TfmError,
    ops::{linear::linear, norm::layer_norm},
};

/// The column stage.
pub(crate) struct ColumnStage {
    grouping: Grouping,
    input: (Tensor, Tensor),
    /// Label embedding, where this stage sees labels.
    label: Option<(Tensor, Tensor)>,
    blocks: Vec<Isab>,
    /// Maps of the affine output: factor and addend.
    affine: Option<[Normed; 2]>,
}

/// An affine map with a norm after it.
struct Normed {
    map: (Tensor, Tensor),
    norm: (Tensor, Tensor),
}

impl ColumnStage {
    pub(crate) fn new(source: &mut dyn Source, config: &ModelConfig) -> Result<Self, TfmError> {
        let width = config.embed_dim;
        let grouping = config.variant.grouping();
        let input = affine(source, "col_embedder.in_linear", width, grouping.width())?;
        let blocks = (0..config.col_num_blocks)
            .map(|i| Isab::new(source, &format!("col_embedder.tf_col.blocks.{i}"), config))
            .collect::<Result<_, _>>()?;
        let label = if config.variant.col_target_aware {
            Some(affine(source, "col_embedder.y_encoder", width, config.label_width())?)
        } else {
            None
        };
        let affine = if config.variant.col_affine {
            Some([Normed::new(source, "w", config)?, Normed::new(source, "b", config)?])
        } else {
            None
        };
        Ok(Self { grouping, input, label, blocks, affine })
    }

    /// Whether labels of the context enter this stage.
    pub(crate) fn sees_labels(&self) -> bool {
        self.label.is_some()
    }

    /// Adds label embeddings, from encoded labels `(tables, context, label width)`, to the first `context` rows of
    /// cells `(tables * slots, rows, E)`. Nothing where this stage doesn't see labels.
    pub(crate) fn add_labels(&self, cells: Tensor, encoded: &Tensor) -> Result<Tensor, TfmError> {
        let Some((weight, bias)) = &self.label else { return Ok(cells) };
        let (tables, context, _) = encoded.dims3()?;
        let (_, rows, width) = cells.dims3()?;
        let labels = linear(encoded, weight, bias)?.pad_with_zeros(1, 0, rows - context)?.unsqueeze(1)?;
        let labelled = cells.reshape((tables, (), rows, width))?.broadcast_add(&labels)?;
        Ok(labelled.reshape(((), rows, width))?)
    }

    /// Cells before the first block from grouped values `(tables * slots, rows, group)`.
    pub(crate) fn input(&self, groups: &Tensor) -> Result<Tensor, TfmError> {
        Ok(linear(groups, &self.input.0, &self.input.1)?)
    }

    /// Embeds context and query rows together; the first `context` rows are the context.
    pub(crate) fn embed(&self, cells: Tensor, context: usize) -> Result<Tensor, TfmError> {
        self.observed(cells, context, &mut |_, _| Ok(()))
    }

    /// As [`Self::embed`], where `observe` sees the cells after each block.
    pub(crate) fn observed(
        &self,
        mut cells: Tensor,
        context: usize,
        observe: Observe<'_>,
    ) -> Result<Tensor, TfmError> {
        for (i, block) in self.blocks.iter().enumerate() {
            let kv = block.summarise(&cells.narrow(1, 0, context)?)?;
            cells = block.read(&cells, &kv)?;
            observe(&format!("col_block.{i}"), &cells)?;
        }
        Ok(cells)
    }

    /// The stage's output from embedded cells and the grouped values they came from: the cells themselves, or
    /// `value * W + b` with `W` and `b` from the cells.
    pub(crate) fn output(&self, cells: Tensor, groups: &Tensor) -> Result<Tensor, TfmError> {
        let Some([factor, addend]) = &self.affine else { return Ok(cells) };
        Ok(factor.apply(&cells)?.broadcast_mul(groups)?.add(&addend.apply(&cells)?)?)
    }
}

impl Normed {
    /// The map `out_{part}` and the norm `ln_{part}`.
    fn new(source: &mut dyn Source, part: &str, config: &ModelConfig) -> Result<Self, TfmError> {
        let width = config.embed_dim;
        Ok(Self {
            map: affine(source, &format!("col_embedder.out_{part}"), width, width)?,
            norm: norm(source, &format!("col_embedder.ln_{part}"), width, config.variant.bias_free_ln)?,
        })
    }

    fn apply(&self, cells: &Tensor) -> Result<Tensor, TfmError> {
        Ok(layer_norm(&linear(cells, &self.map.0, &self.map.1)?, &self.norm.0, &self.norm.1)?)
    }
}

/// One induced set-attention block.
struct Isab {
    inducing: Tensor,
    gather: Block,
    spread: Block,
}

impl Isab {
    fn new(source: &mut dyn Source, name: &str, config: &ModelConfig) -> Result<Self, TfmError> {
        let plain = BlockSizes {
            width: config.embed_dim,
            heads: config.col_nhead,
            ff_factor: config.ff_factor,
            ssmax: Ssmax::None,
            ssmax_hidden: config.ssmax_hidden,
            bias_free_ln: config.variant.bias_free_ln,
            interleaved: false,
        };
        let scaled = BlockSizes { ssmax: config.variant.col_ssmax, ..plain };
        let shape = [config.col_num_inds, config.embed_dim];
        Ok(Self {
            inducing: source.tensor(&format!("{name}.ind_vectors"), &shape, Init::Normal(0.02))?,
            gather: Block::new(source, &format!("{name}.multihead_attn1"), scaled)?,
            spread: Block::new(source, &format!("{name}.multihead_attn2"), plain)?,
        })
    }

    /// Keys and values `(columns, inducing, 2 E)` that describe the context cells.
    fn summarise(&self, context: &Tensor) -> Result<Tensor, TfmError> {
        let rows = context.dim(1)?;
        let kv = self.gather.keys_values(&self.gather.normed(context)?)?;
        let inducing = self.inducing.unsqueeze(0)?;
        let hidden = self.gather.attend(&inducing, &self.gather.normed(&inducing)?, &kv, None, rows)?;
        self.spread.keys_values(&self.spread.normed(&hidden)?)
    }

    fn read(&self, cells: &Tensor, kv: &Tensor) -> Result<Tensor, TfmError> {
        self.spread.attend(cells, &self.spread.normed(cells)?, kv, None, 0)
    }
}

impl ColumnStage {
    /// Values `(tables, rows, columns)` to grouped values `(tables * slots, rows, group)`.
    pub(crate) fn groups(
        &self,
        values: &[f32],
        tables: usize,
        rows: usize,
        columns: usize,
    ) -> Result<Tensor, TfmError> {
        let (slots, width) = (self.grouping.slots(columns), self.grouping.width());
        let mut groups = Vec::with_capacity(tables * slots * rows * width);
        for table in values.chunks_exact(rows * columns) {
            for slot in 0..slots {
                let members: Vec<Option<usize>> = self.grouping.members(slot, columns).collect();
                for row in table.chunks_exact(columns) {
                    groups.extend(members.iter().map(|m| m.and_then(|m| row.get(m)).copied().unwrap_or(0.0)));
                }
            }
        }
        Ok(Tensor::from_vec(groups, (tables * slots, rows, width), &candle_core::Device::Cpu)?)
    }
}
