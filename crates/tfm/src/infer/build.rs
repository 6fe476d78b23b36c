//! A cache from labelled rows, in memory that doesn't grow with rows times columns.
//!
//! Columns are summarised a few at a time (one per thread). Then the row vectors are computed from the summaries, a
//! few rows at a time, and pass the in-context stage in chunks. Only the vectors of one view and one column's cells
//! are ever held whole; [`size`](super::size) counts both.

use rayon::prelude::*;

use super::{
    CELL_ROWS, Cached, Engine, Held,
    block::Block,
    change::Factors,
    heads::{HeadSizes, Heads, Numbers, Precision},
    shifted,
    size::{Cache, CacheKind},
    stages::Isab,
};

/// Labelled rows of a context.
#[derive(Clone, Copy)]
pub(crate) struct Labelled<'a> {
    /// Values `(n, columns)`.
    pub(crate) values: &'a [f32],
    pub(crate) columns: usize,
    /// Classes `(n)`, each below `classes`.
    pub(crate) labels: &'a [u8],
    pub(crate) classes: usize,
    /// Added to every row's cells, `(slots, E)`.
    pub(crate) added: &'a [f32],
}

impl Engine {
    /// Computes the cache of `views` labellings, each with the classes turned further.
    pub(crate) fn build(&self, context: Labelled<'_>, views: usize, cache: Cache) -> Cached {
        let rows = context.labels.len();
        let slots = self.column.slots(context.columns);
        let bases = self.icl.blocks.iter().map(|block| block.base(rows)).collect();
        let summaries = self.column.blocks.iter().map(|block| {
            let keys = block.inducing.len() / self.cell;
            Heads::zeros(head_sizes(&block.spread, self.cell, keys), views * slots, cache.precision)
        });
        let icl = HeadSizes { heads: self.heads, head_dim: self.vector / self.heads, keys: rows };
        let held = match cache.kind {
            CacheKind::Kv => Held::KeysValues(
                self.icl.blocks.iter().map(|_| Heads::zeros(icl, views, cache.precision)).collect(),
            ),
            CacheKind::Repr => Held::Vectors(Numbers::zeros(views * rows * self.vector, cache.precision)),
        };
        let (columns, classes) = (context.columns, context.classes);
        let mut cached =
            Cached { rows, columns, classes, views, summaries: summaries.collect(), held, bases };
        for view in 0..views {
            let labels: Vec<u8> = context
                .labels
                .iter()
                .map(|label| shifted(usize::from(*label), view, classes) as u8)
                .collect();
            let context = Labelled { labels: &labels, ..context };
            self.summarise(context, view, &mut cached.summaries);
            let mut vectors = vec![0f32; rows * self.vector];
            let chunks = vectors.par_chunks_mut(CELL_ROWS * self.vector);
            let sources = context.values.par_chunks(CELL_ROWS * columns).zip(labels.par_chunks(CELL_ROWS));
            chunks.zip(sources).for_each(|(to, (values, labels))| {
                let some = self.some_vectors(&cached, view, 1, values, Some(labels), context.added);
                to.copy_from_slice(&some);
            });
            self.icl.label(&mut vectors, &labels);
            match &mut cached.held {
                Held::KeysValues(blocks) => self.keep(vectors, view, blocks, &cached.bases),
                Held::Vectors(numbers) => numbers.write(view * rows * self.vector, &vectors),
            }
        }
        cached
    }

    /// Summaries of all columns in one view.
    fn summarise(&self, context: Labelled<'_>, view: usize, summaries: &mut [Heads]) {
        let slots = self.column.slots(context.columns);
        let threads = rayon::current_num_threads();
        for first in (0..slots).step_by(threads) {
            let some: Vec<Vec<Vec<f32>>> = (first..slots.min(first + threads))
                .into_par_iter()
                .map(|slot| self.summarise_slot(context, slot))
                .collect();
            for (slot, blocks) in (first..).zip(&some) {
                for (heads, kv) in summaries.iter_mut().zip(blocks) {
                    heads.put(view * slots + slot, 0, kv);
                }
            }
        }
    }

    /// Keys and values `(inducing, 2 E)` of each column block for one slot.
    fn summarise_slot(&self, context: Labelled<'_>, slot: usize) -> Vec<Vec<f32>> {
        let (rows, width) = (context.labels.len(), self.cell);
        let mut cells = self.column.input(&self.column.group(context.values, context.columns, slot));
        self.column.label(&mut cells, context.labels);
        let mut summaries = Vec::with_capacity(self.column.blocks.len());
        let mut heads: Option<Heads> = None;
        for (i, Isab { inducing, gather, spread }) in self.column.blocks.iter().enumerate() {
            let heads =
                heads.get_or_insert_with(|| Heads::zeros(head_sizes(gather, width, rows), 1, Precision::F32));
            for (j, cells) in cells.chunks(COLUMN_ROWS * width).enumerate() {
                heads.put(0, j * COLUMN_ROWS, &gather.keys_values(&gather.normed(cells)));
            }
            let mut hidden = inducing.clone();
            gather.read(&mut hidden, heads, 0, 1, &gather.base(rows));
            let summary = spread.keys_values(&spread.normed(&hidden));
            if i + 1 < self.column.blocks.len() {
                let keys = inducing.len() / width;
                let mut small = Heads::zeros(head_sizes(spread, width, keys), 1, Precision::F32);
                small.put(0, 0, &summary);
                for cells in cells.chunks_mut(COLUMN_ROWS * width) {
                    spread.read(cells, &small, 0, 1, &[]);
                }
            }
            summaries.push(summary.to_vec());
        }
        summaries
    }

    /// Passes labelled vectors of one view through the in-context stage and keeps each block's keys and values.
    fn keep(&self, mut vectors: Vec<f32>, view: usize, blocks: &mut [Heads], bases: &[Vec<f32>]) {
        let last = blocks.len() - 1;
        for (i, ((block, heads), base)) in self.icl.blocks.iter().zip(blocks).zip(bases).enumerate() {
            self.put_context(block, &vectors, heads, view);
            if i < last {
                self.advance(block, &mut vectors, (heads, view), base, None);
            }
        }
    }

    /// Stores keys and values of context rows `(n, D)`.
    pub(super) fn put_context(&self, block: &Block, rows: &[f32], heads: &mut Heads, batch: usize) {
        let size = ICL_ROWS * self.vector;
        let threads = rayon::current_num_threads();
        for (i, rows) in rows.chunks(threads * size).enumerate() {
            let some: Vec<Vec<f32>> =
                rows.par_chunks(size).map(|rows| block.keys_values(&block.normed(rows)).to_vec()).collect();
            for (j, kv) in some.iter().enumerate() {
                heads.put(batch, (i * threads + j) * ICL_ROWS, kv);
            }
        }
    }

    /// Lets rows read a batch's context through one block, query rows with a change of their queries.
    pub(super) fn advance(
        &self,
        block: &Block,
        rows: &mut [f32],
        (heads, batch): (&Heads, usize),
        base: &[f32],
        change: Option<&Factors>,
    ) {
        rows.par_chunks_mut(ICL_ROWS * self.vector)
            .for_each(|rows| block.read_changed(rows, heads, (batch, 1), base, change));
    }

    /// Room for one view's keys and values of one in-context block.
    pub(super) fn icl_heads(&self, rows: usize) -> Heads {
        let sizes = HeadSizes { heads: self.heads, head_dim: self.vector / self.heads, keys: rows };
        Heads::zeros(sizes, 1, Precision::F32)
    }
}

fn head_sizes(block: &Block, width: usize, keys: usize) -> HeadSizes {
    HeadSizes { heads: block.heads(), head_dim: width / block.heads(), keys }
}

/// Rows of a column worked on together.
pub(super) const COLUMN_ROWS: usize = 256;
/// Context rows that pass the in-context stage together.
pub(super) const ICL_ROWS: usize = 96;
