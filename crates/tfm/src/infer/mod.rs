//! Serving and adapter gradients on plain numbers: a context is built, held and read without a tensor library in the way.
//!
//! The model's weights are copied once into the order that the loops read them. Single rows then cost little more
//! than reading weights and cache from memory, and a batch shares that reading. What is computed is what
//! `model::forward` computes: tests hold the two together, for every variant and for the public package's goldens.
//!
//! `build` makes a cache from labelled rows in bounded memory, `size` says beforehand how many bytes it takes, `back`
//! takes query rows forward and back.

pub(crate) mod back;
mod block;
pub(crate) mod build;
pub(crate) mod change;
pub(crate) mod heads;
mod kernel;
mod matrix;
mod named;
mod scratch;
pub(crate) mod size;
mod stages;

use std::sync::OnceLock;

use rayon::prelude::*;

use self::{
    back::TurnedEngine,
    change::{Change, HeadAddend},
    heads::{Heads, Numbers},
    named::Named,
    scratch::Buffer,
    stages::{Column, Decoder, Icl, Row},
};
use crate::{error::TfmError, model::Model};

/// A model's weights in the order of the loops.
pub(crate) struct Engine {
    column: Column,
    row: Row,
    icl: Icl,
    decoder: Decoder,
    /// Width of a cell, `E`.
    cell: usize,
    /// Width of a row's vector, `D`.
    vector: usize,
    heads: usize,
    /// The maps for the way back, from the first gradient on.
    turned: OnceLock<TurnedEngine>,
}

/// A context held ready.
pub(crate) struct Cached {
    /// Context rows, `n`.
    rows: usize,
    columns: usize,
    /// Classes told apart, `K`.
    classes: usize,
    views: usize,
    /// What each column block knows of the context: batches `(views * slots)` of inducing points.
    pub(crate) summaries: Vec<Heads>,
    pub(crate) held: Held,
    /// Query scaling of each in-context block.
    bases: Vec<Vec<f32>>,
}

/// How the context rows are held.
pub(crate) enum Held {
    /// Keys and values of each in-context block: batches `(views)` of context rows.
    KeysValues(Vec<Heads>),
    /// Labelled row vectors `(views, n, D)`; keys and values are computed anew for every prediction.
    Vectors(Numbers),
}

impl Engine {
    /// Copies a classifier's weights.
    pub(crate) fn new(model: &Model) -> Result<Self, TfmError> {
        let (named, config) = (Named { tensors: model.tensors() }, model.config());
        Ok(Self {
            column: Column::new(named, config)?,
            row: Row::new(named, config)?,
            icl: Icl::new(named, config)?,
            decoder: Decoder::new(named, config)?,
            cell: config.embed_dim,
            vector: config.row_width(),
            heads: config.icl_nhead,
            turned: OnceLock::new(),
        })
    }

    /// Width of a row's vector, `D`.
    pub(crate) fn vector(&self) -> usize {
        self.vector
    }

    /// Bytes of the copied weights.
    pub(crate) fn bytes(&self) -> usize {
        self.column.bytes() + self.row.bytes() + self.icl.bytes() + self.decoder.bytes()
    }

    /// The change of the query side that addends of final norm and decoder are.
    pub(crate) fn head_change(&self, addend: &HeadAddend) -> Change {
        self.decoder.change(addend)
    }

    /// Class scores `(rows, K)` of query rows `(rows, columns)`, averaged over the views with the classes put back.
    ///
    /// `added (slots, E)` is added to every row's cells, the query side is the model's with `change`.
    pub(crate) fn scores(&self, cached: &Cached, values: &[f32], added: &[f32], change: &Change) -> Vec<f32> {
        match &cached.held {
            Held::KeysValues(blocks) => {
                let chunk = |values: &[f32]| {
                    let mut rows = self.vectors(cached, values, added);
                    let read = self.icl.blocks.iter().zip(blocks).zip(&cached.bases);
                    for (i, ((block, heads), base)) in read.enumerate() {
                        let batches = (0, cached.views);
                        block.read_changed(&mut rows, heads, batches, base, change.queries(i));
                    }
                    self.averaged(cached, &rows, change)
                };
                if values.len() <= QUERY_ROWS * cached.columns {
                    return chunk(values);
                }
                let chunks: Vec<Vec<f32>> =
                    values.par_chunks(QUERY_ROWS * cached.columns).map(chunk).collect();
                chunks.concat()
            }
            Held::Vectors(vectors) => {
                let chunks = values.chunks(REREAD_ROWS * cached.columns);
                chunks.flat_map(|values| self.reread(cached, vectors, values, added, change)).collect()
            }
        }
    }

    /// As [`Self::scores`], where each block's keys and values are computed and dropped again.
    fn reread(
        &self,
        cached: &Cached,
        vectors: &Numbers,
        values: &[f32],
        added: &[f32],
        change: &Change,
    ) -> Vec<f32> {
        let mut queries = self.vectors(cached, values, added);
        let (per_view, size) = (queries.len() / cached.views, cached.rows * self.vector);
        for (view, queries) in queries.chunks_exact_mut(per_view.max(1)).enumerate() {
            let mut context = vectors.read(view * size, size);
            let mut heads = self.icl_heads(cached.rows);
            for (i, (block, base)) in self.icl.blocks.iter().zip(&cached.bases).enumerate() {
                self.put_context(block, &context, &mut heads, 0);
                self.advance(block, queries, (&heads, 0), base, change.queries(i));
                if i + 1 < self.icl.blocks.len() {
                    self.advance(block, &mut context, (&heads, 0), base, None);
                }
            }
        }
        self.averaged(cached, &queries, change)
    }

    /// Row vectors `(views, rows, D)` of query rows.
    fn vectors(&self, cached: &Cached, values: &[f32], added: &[f32]) -> Buffer {
        let (views, rows) = (cached.views, values.len() / cached.columns);
        if rows <= CELL_ROWS {
            return self.some_vectors(cached, 0, views, values, None, added);
        }
        let mut vectors = Buffer::stale(views * rows * self.vector);
        for (i, values) in values.chunks(CELL_ROWS * cached.columns).enumerate() {
            let some = self.some_vectors(cached, 0, views, values, None, added);
            for (view, some) in some.chunks_exact(some.len() / views).enumerate() {
                vectors[(view * rows + i * CELL_ROWS) * self.vector..][..some.len()].copy_from_slice(some);
            }
        }
        vectors
    }

    /// Row vectors `(count, rows, D)` of a few rows in the views from `view` on; with labels for context rows.
    fn some_vectors(
        &self,
        cached: &Cached,
        view: usize,
        count: usize,
        values: &[f32],
        labels: Option<&[u8]>,
        added: &[f32],
    ) -> Buffer {
        let items = self.items(cached, (view, count), values, labels, added);
        self.row.vectors(items, self.length(cached))
    }

    /// Tokens and slots of an item.
    fn length(&self, cached: &Cached) -> usize {
        self.row.tokens().len() / self.cell + self.column.slots(cached.columns)
    }

    /// Items `(count, rows, C + slots, E)` of a few rows in the views from the first on: row tokens, then cells with what is
    /// added to them.
    fn items(
        &self,
        cached: &Cached,
        (view, count): (usize, usize),
        values: &[f32],
        labels: Option<&[u8]>,
        added: &[f32],
    ) -> Buffer {
        let (columns, column) = (cached.columns, &self.column);
        let (rows, slots) = (values.len() / columns, column.slots(columns));
        let groups: Vec<f32> = (0..slots).flat_map(|slot| column.group(values, columns, slot)).collect();
        let mut cells = column.input(&groups);
        if let Some(labels) = labels {
            cells.chunks_exact_mut(rows * self.cell).for_each(|cells| column.label(cells, labels));
        }
        if count > 1 {
            cells = repeated(&cells, count);
        }
        column.read(&mut cells, &cached.summaries, view * slots, count * slots);
        let cells = column.output(cells, &groups);
        let tokens = self.row.tokens();
        let size = tokens.len() + slots * self.cell;
        let mut z = Buffer::stale(count * rows * size);
        let views = z.chunks_exact_mut(rows * size).zip(cells.chunks_exact(slots * rows * self.cell));
        for (items, cells) in views {
            for (row, item) in items.chunks_exact_mut(size).enumerate() {
                let (of_tokens, of_cells) = item.split_at_mut(tokens.len());
                of_tokens.copy_from_slice(tokens);
                let slots = cells.chunks_exact(rows * self.cell).zip(added.chunks_exact(self.cell));
                for (to, (cells, added)) in of_cells.chunks_exact_mut(self.cell).zip(slots) {
                    let cell = &cells[row * self.cell..][..self.cell];
                    to.iter_mut().zip(cell).zip(added).for_each(|((t, c), a)| *t = c + a);
                }
            }
        }
        z
    }

    /// Class scores `(rows, K)` from rows `(views, rows, D)` after the last block.
    fn averaged(&self, cached: &Cached, rows: &[f32], change: &Change) -> Vec<f32> {
        let (classes, outputs) = (cached.classes, self.decoder.outputs());
        let scores = self.decoder.scores(rows, change.head());
        let count = scores.len() / outputs / cached.views;
        let mut averages = vec![0f32; count * classes];
        for (view, scores) in scores.chunks_exact((count * outputs).max(1)).enumerate() {
            for (to, scores) in averages.chunks_exact_mut(classes).zip(scores.chunks_exact(outputs)) {
                for (class, to) in to.iter_mut().enumerate() {
                    *to += scores[shifted(class, view, classes)] / cached.views as f32;
                }
            }
        }
        averages
    }
}

impl Cached {
    /// Bytes of the numbers held.
    pub(crate) fn bytes(&self) -> usize {
        let heads = |all: &[Heads]| all.iter().map(Heads::bytes).sum::<usize>();
        let held = match &self.held {
            Held::KeysValues(blocks) => heads(blocks),
            Held::Vectors(numbers) => numbers.bytes(),
        };
        heads(&self.summaries) + held + self.bases.iter().map(|b| size_of_val(b.as_slice())).sum::<usize>()
    }
}

/// `count` copies, one after the other.
fn repeated(values: &[f32], count: usize) -> Buffer {
    let mut all = Buffer::stale(count * values.len());
    all.chunks_exact_mut(values.len().max(1)).for_each(|copy| copy.copy_from_slice(values));
    all
}

/// What class `class` is called in a view: classes turn in a circle, with two classes they change places.
pub(crate) fn shifted(class: usize, view: usize, classes: usize) -> usize {
    (class + view * (classes / 2).max(1)) % classes
}

/// Query rows that pass the in-context stage together; more are spread over the cores.
const QUERY_ROWS: usize = 64;
/// Rows whose cells are computed together.
const CELL_ROWS: usize = 32;
/// Query rows for which keys and values that aren't held are computed once.
const REREAD_ROWS: usize = 4096;
