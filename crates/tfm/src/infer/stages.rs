//! The four stages for rows against a ready context, on slices.
//!
//! Cells of the column stage are `(batches, rows, E)`, where a batch is one slot of one view; the row stage takes
//! `(items, C + slots, E)`, where an item is one row of one view; row vectors are `(views, rows, D)`.

use super::{
    block::Block,
    change::{Change, Head, HeadAddend},
    heads::{HeadSizes, Heads, Precision},
    kernel::gelu,
    matrix::{Matrix, Norm},
    named::Named,
    scratch::Buffer,
};
use crate::{
    error::TfmError,
    model::{
        attention::BlockSizes,
        config::ModelConfig,
        row::FREQUENCIES,
        variant::{Grouping, Ssmax},
    },
    ops::rope::turn,
};

/// The column stage.
pub(super) struct Column {
    grouping: Grouping,
    input: Matrix,
    /// Embedding of each class `(max_classes, E)`, where this stage sees labels.
    labels: Option<Vec<f32>>,
    pub(super) blocks: Vec<Isab>,
    /// Maps of the affine output: factor and addend.
    affine: Option<[(Matrix, Norm); 2]>,
}

/// One induced set-attention block.
pub(super) struct Isab {
    /// `(inducing, E)`.
    pub(super) inducing: Vec<f32>,
    pub(super) gather: Block,
    pub(super) spread: Block,
}

impl Column {
    pub(super) fn new(named: Named<'_>, config: &ModelConfig) -> Result<Self, TfmError> {
        let width = config.embed_dim;
        let plain = BlockSizes { heads: config.col_nhead, ..block_sizes(config, width) };
        let scaled = BlockSizes { ssmax: config.variant.col_ssmax, ..plain };
        let mut blocks = Vec::with_capacity(config.col_num_blocks);
        for i in 0..config.col_num_blocks {
            let name = format!("col_embedder.tf_col.blocks.{i}");
            blocks.push(Isab {
                inducing: named.values(&format!("{name}.ind_vectors"))?,
                gather: Block::new(named, &format!("{name}.multihead_attn1"), scaled)?,
                spread: Block::new(named, &format!("{name}.multihead_attn2"), plain)?,
            });
        }
        let labels = if config.variant.col_target_aware {
            Some(label_rows(named, "col_embedder.y_encoder", config)?)
        } else {
            None
        };
        let normed = |part: &str| -> Result<(Matrix, Norm), TfmError> {
            let map = named.affine(&format!("col_embedder.out_{part}"))?;
            Ok((map, named.norm(&format!("col_embedder.ln_{part}"), width)?))
        };
        let affine = if config.variant.col_affine { Some([normed("w")?, normed("b")?]) } else { None };
        let input = named.affine("col_embedder.in_linear")?;
        Ok(Self { grouping: config.variant.grouping(), input, labels, blocks, affine })
    }

    pub(super) fn slots(&self, columns: usize) -> usize {
        self.grouping.slots(columns)
    }

    /// Values of one slot `(rows, group)` from values `(rows, columns)`.
    pub(super) fn group(&self, values: &[f32], columns: usize, slot: usize) -> Vec<f32> {
        let members: Vec<Option<usize>> = self.grouping.members(slot, columns).collect();
        let rows = values.chunks_exact(columns);
        rows.flat_map(|row| members.iter().map(|m| m.and_then(|m| row.get(m)).copied().unwrap_or(0.0)))
            .collect()
    }

    /// Cells before the first block `(n, E)` from grouped values `(n, group)`.
    pub(super) fn input(&self, groups: &[f32]) -> Buffer {
        self.input.of(groups)
    }

    /// Adds each row's class embedding to its cell, where this stage sees labels.
    pub(super) fn label(&self, cells: &mut [f32], labels: &[u8]) {
        if let Some(table) = &self.labels {
            add_labels(table, cells, labels);
        }
    }

    /// Lets cells of `batches` batches from `first` on read the context's summaries, block by block.
    pub(super) fn read(&self, cells: &mut [f32], summaries: &[Heads], first: usize, batches: usize) {
        for (block, heads) in self.blocks.iter().zip(summaries) {
            block.spread.read(cells, heads, first, batches, &[]);
        }
    }

    /// The stage's output: the cells, or `value * W + b` with `W` and `b` from the cells; all views share the values.
    pub(super) fn output(&self, cells: Buffer, groups: &[f32]) -> Buffer {
        let Some([factor, addend]) = &self.affine else { return cells };
        let of = |(map, norm): &(Matrix, Norm)| norm.of(&map.of(&cells));
        let (mut out, addend) = (of(factor), of(addend));
        let width = factor.0.output();
        for ((row, addend), value) in
            out.chunks_exact_mut(width).zip(addend.chunks_exact(width)).zip(groups.iter().cycle())
        {
            row.iter_mut().zip(addend).for_each(|(o, a)| *o = *o * value + a);
        }
        out
    }

    pub(super) fn bytes(&self) -> usize {
        let blocks = self
            .blocks
            .iter()
            .map(|b| size_of_val(b.inducing.as_slice()) + b.gather.bytes() + b.spread.bytes());
        let affine = self.affine.iter().flatten().map(|(map, norm)| map.bytes() + norm.bytes());
        self.input.bytes()
            + self.labels.as_deref().map_or(0, size_of_val)
            + blocks.sum::<usize>()
            + affine.sum::<usize>()
    }
}

/// The row stage.
pub(super) struct Row {
    /// Row tokens `(C, E)`.
    tokens: Vec<f32>,
    frequencies: Vec<f32>,
    pub(super) blocks: Vec<Block>,
    pub(super) out_norm: Norm,
    pub(super) width: usize,
}

impl Row {
    pub(super) fn new(named: Named<'_>, config: &ModelConfig) -> Result<Self, TfmError> {
        let width = config.embed_dim;
        let sizes = BlockSizes {
            heads: config.row_nhead,
            interleaved: config.variant.row_rope_interleaved,
            ..block_sizes(config, width)
        };
        let blocks = (0..config.row_num_blocks)
            .map(|i| Block::new(named, &format!("row_interactor.tf_row.blocks.{i}"), sizes))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            tokens: named.values("row_interactor.cls_tokens")?,
            frequencies: named.values(FREQUENCIES)?,
            blocks,
            out_norm: named.norm("row_interactor.out_ln", width)?,
            width,
        })
    }

    /// Tokens that stand before the cells of each item, `(C, E)`.
    pub(super) fn tokens(&self) -> &[f32] {
        &self.tokens
    }

    /// Row vectors `(items, C * E)` of items `(items, length, E)`, tokens first.
    pub(super) fn vectors(&self, mut z: Buffer, length: usize) -> Buffer {
        let (width, count) = (self.width, self.tokens.len() / self.width);
        let angles = self.angles(length);
        for (i, block) in self.blocks.iter().enumerate() {
            let normed = block.normed(&z);
            let mut kv = block.keys_values(&normed);
            self.rotate(&mut kv, 2 * width, length, &angles, 1.0);
            let (rows, mut queries) = if i + 1 == self.blocks.len() {
                z = first_rows(&z, length * width, count * width);
                (count, block.queries(&first_rows(&normed, length * width, count * width)))
            } else {
                (length, block.queries(&normed))
            };
            self.rotate(&mut queries, width, rows, &angles, 1.0);
            let head_dim = width / block.heads();
            let sizes = HeadSizes { heads: block.heads(), head_dim, keys: length };
            let mut heads = Heads::zeros(sizes, 1, Precision::F32);
            let mut read = Buffer::stale(z.len());
            let items = kv.chunks_exact(length * 2 * width).zip(queries.chunks_exact(rows * width));
            for ((kv, queries), read) in items.zip(read.chunks_exact_mut(rows * width)) {
                heads.put(0, 0, kv);
                heads.attend(0, queries, read);
            }
            block.finish(&mut z, &read);
        }
        self.out_norm.of(&z)
    }

    /// Sine and cosine by position and frequency.
    pub(super) fn angles(&self, length: usize) -> Vec<(f32, f32)> {
        let of = |position| self.frequencies.iter().map(move |f| (position as f32 * f).sin_cos());
        (0..length).flat_map(of).collect()
    }

    /// Turns the heads in the first `E` features of each token of items of `length` tokens, `stride` values apart; with
    /// direction -1 back.
    pub(super) fn rotate(
        &self,
        values: &mut [f32],
        stride: usize,
        length: usize,
        angles: &[(f32, f32)],
        direction: f32,
    ) {
        let half = self.frequencies.len();
        turn(values, (stride, self.width, half), &angles[..length * half], direction);
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.tokens.as_slice())
            + size_of_val(self.frequencies.as_slice())
            + self.blocks.iter().map(Block::bytes).sum::<usize>()
            + self.out_norm.bytes()
    }
}

/// The first `count` values of every `size`.
pub(super) fn first_rows(values: &[f32], size: usize, count: usize) -> Buffer {
    let mut first = Buffer::stale(values.len() / size * count);
    let items = first.chunks_exact_mut(count).zip(values.chunks_exact(size));
    items.for_each(|(first, item)| first.copy_from_slice(&item[..count]));
    first
}

/// The in-context stage.
pub(super) struct Icl {
    /// Embedding of each class `(max_classes, D)`.
    labels: Vec<f32>,
    pub(super) blocks: Vec<Block>,
}

impl Icl {
    pub(super) fn new(named: Named<'_>, config: &ModelConfig) -> Result<Self, TfmError> {
        let ssmax = config.variant.icl_ssmax;
        let sizes = BlockSizes { heads: config.icl_nhead, ssmax, ..block_sizes(config, config.row_width()) };
        let blocks = (0..config.icl_num_blocks)
            .map(|i| Block::new(named, &format!("icl_predictor.tf_icl.blocks.{i}"), sizes))
            .collect::<Result<_, _>>()?;
        Ok(Self { labels: label_rows(named, "icl_predictor.y_encoder", config)?, blocks })
    }

    /// Adds each context row's class embedding to its vector.
    pub(super) fn label(&self, vectors: &mut [f32], labels: &[u8]) {
        add_labels(&self.labels, vectors, labels);
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.labels.as_slice()) + self.blocks.iter().map(Block::bytes).sum::<usize>()
    }
}

/// The decoder.
pub(super) struct Decoder {
    pub(super) norm: Norm,
    pub(super) hidden: Matrix,
    pub(super) output: Matrix,
}

impl Decoder {
    pub(super) fn new(named: Named<'_>, config: &ModelConfig) -> Result<Self, TfmError> {
        Ok(Self {
            norm: named.norm("icl_predictor.ln", config.row_width())?,
            hidden: named.affine("icl_predictor.decoder.0")?,
            output: named.affine("icl_predictor.decoder.2")?,
        })
    }

    /// Class scores per row.
    pub(super) fn outputs(&self) -> usize {
        self.output.output()
    }

    /// Class scores `(n, outputs)` of row vectors `(n, D)`, with another norm and last layer if given.
    pub(super) fn scores(&self, rows: &[f32], head: Option<&Head>) -> Buffer {
        let (norm, output) = head.map_or((&self.norm, &self.output), |head| (&head.norm, &head.output));
        let mut hidden = self.hidden.of(&norm.of(rows));
        gelu(&mut hidden);
        output.of(&hidden)
    }

    pub(super) fn change(&self, HeadAddend { gain, bias, output }: &HeadAddend) -> Change {
        Change::of_head(self.norm.plus(gain, bias), self.output.plus(output))
    }

    pub(super) fn bytes(&self) -> usize {
        self.norm.bytes() + self.hidden.bytes() + self.output.bytes()
    }
}

/// Sizes of a block of this width without scaling; the number of heads is the caller's.
fn block_sizes(config: &ModelConfig, width: usize) -> BlockSizes {
    BlockSizes {
        width,
        heads: 1,
        ff_factor: config.ff_factor,
        ssmax: Ssmax::None,
        ssmax_hidden: config.ssmax_hidden,
        bias_free_ln: config.variant.bias_free_ln,
        interleaved: false,
    }
}

/// Embedding of each class `(max_classes, width)`: a column of the label map and its bias.
fn label_rows(named: Named<'_>, name: &str, config: &ModelConfig) -> Result<Vec<f32>, TfmError> {
    let (classes, map) = (config.label_width(), named.affine(name)?);
    let mut one_hot = vec![0f32; classes * classes];
    one_hot.iter_mut().step_by(classes + 1).for_each(|cell| *cell = 1.0);
    Ok(map.of(&one_hot).to_vec())
}

fn add_labels(table: &[f32], rows: &mut [f32], labels: &[u8]) {
    let width = rows.len() / labels.len().max(1);
    for (row, label) in rows.chunks_exact_mut(width.max(1)).zip(labels) {
        // Classes are checked before; one beyond the table would add nothing.
        let embedded = table.chunks_exact(width).nth(usize::from(*label)).unwrap_or_default();
        row.iter_mut().zip(embedded).for_each(|(v, e)| *v += e);
    }
}
