//! Column stage: every cell is embedded by its value, its group and how the context rows of its column look.
//!
//! A set transformer per column: inducing points read the context rows, all rows read the inducing points. A query
//! row's cells therefore depend on that row and on the context only. Cells are `(tables * columns, rows, E)`.

use candle_core::Tensor;

use super::{
    attention::{Block, BlockSizes},
    config::ModelConfig,
    params::{Init, Source, affine},
};
use crate::{error::TfmError, ops::linear::linear};

/// The column stage.
pub(crate) struct ColumnStage {
    input: (Tensor, Tensor),
    label: (Tensor, Tensor),
    blocks: Vec<Isab>,
}

impl ColumnStage {
    pub(crate) fn new(source: &mut dyn Source, config: &ModelConfig) -> Result<Self, TfmError> {
        let width = config.embed_dim;
        let input = affine(source, "col_embedder.in_linear", width, GROUP_SHIFTS.len())?;
        let blocks = (0..config.col_num_blocks)
            .map(|i| Isab::new(source, &format!("col_embedder.tf_col.blocks.{i}"), config))
            .collect::<Result<_, _>>()?;
        let label = affine(source, "col_embedder.y_encoder", width, config.max_classes)?;
        Ok(Self { input, label, blocks })
    }

    /// Label embeddings `(tables, context, E)` from one-hot labels `(tables, context, classes)`.
    pub(crate) fn labels(&self, one_hot: &Tensor) -> Result<Tensor, TfmError> {
        Ok(linear(one_hot, &self.label.0, &self.label.1)?)
    }

    /// Cells before the first block from grouped values `(tables * columns, rows, 3)`.
    pub(crate) fn input(&self, groups: &Tensor) -> Result<Tensor, TfmError> {
        Ok(linear(groups, &self.input.0, &self.input.1)?)
    }

    /// Embeds context and query rows together; the first `context` rows are the context.
    pub(crate) fn embed(&self, mut cells: Tensor, context: usize) -> Result<Tensor, TfmError> {
        for block in &self.blocks {
            let kv = block.summarise(&cells.narrow(1, 0, context)?)?;
            cells = block.read(&cells, &kv)?;
        }
        Ok(cells)
    }

    /// Embeds context rows and keeps each block's summary (keys and values) for later queries.
    pub(crate) fn context(&self, mut cells: Tensor) -> Result<(Tensor, Vec<Tensor>), TfmError> {
        let mut cache = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let kv = block.summarise(&cells)?;
            cells = block.read(&cells, &kv)?;
            cache.push(kv);
        }
        Ok((cells, cache))
    }

    /// Embeds query rows against the summaries of a context.
    pub(crate) fn query(&self, mut cells: Tensor, cache: &[Tensor]) -> Result<Tensor, TfmError> {
        for (block, kv) in self.blocks.iter().zip(cache) {
            cells = block.read(&cells, kv)?;
        }
        Ok(cells)
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
            ssmax_hidden: None,
        };
        let scaled = BlockSizes { ssmax_hidden: Some(config.ssmax_hidden), ..plain };
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

/// Values `(tables, rows, columns)` to groups `(tables * columns, rows, 3)`: slot `j` holds columns `j + 1`,
/// `j + 2` and `j + 4`, counted in a circle.
pub(crate) fn group(values: &[f32], tables: usize, rows: usize, columns: usize) -> Result<Tensor, TfmError> {
    let mut groups = Vec::with_capacity(values.len() * GROUP_SHIFTS.len());
    for table in values.chunks_exact(rows * columns) {
        for j in 0..columns {
            let members = GROUP_SHIFTS.map(|shift| (j + shift) % columns);
            for row in table.chunks_exact(columns) {
                groups.extend(members.iter().map(|&m| row[m]));
            }
        }
    }
    let shape = (tables * columns, rows, GROUP_SHIFTS.len());
    Ok(Tensor::from_vec(groups, shape, &candle_core::Device::Cpu)?)
}

/// Offsets of the columns in a slot.
pub(crate) const GROUP_SHIFTS: [usize; 3] = [1, 2, 4];
