//! What an adapter changes on the way of query rows, and what a row's gradient by its values is made of.
//!
//! Changes are added where they act, weights are never copied. Each place where something is added is a site: the gradient
//! of a row by the adapter's values follows from what went into the row's sites and the gradient at their outputs.

use crate::infer::{
    Engine,
    back::Seen,
    change::{Change, HeadAddend},
};

/// An adapter's changes of the query path of one context; the default has none.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    pub(super) cells: Option<Cells>,
    /// Changes of the queries, block by block.
    pub(super) queries: Vec<LowRank>,
    pub(super) head: Option<HeadAddend>,
}

/// What is added to cells.
#[derive(Debug)]
pub(super) struct Cells {
    /// Addend `(slots, E)`.
    pub(super) delta: Vec<f32>,
    /// The adapter's rows of values that each slot is the sum of.
    pub(super) members: Vec<Vec<usize>>,
}

/// Two factors beside the query projection of one block: what reads normed rows `(rank, D)`, and what writes queries
/// `(D, rank)`.
pub(super) type LowRank = (Vec<f32>, Vec<f32>);

impl Applied {
    /// What is changed behind the cells, as the engine reads it.
    pub(crate) fn change(&self, engine: &Engine) -> Change {
        match &self.head {
            Some(addend) => engine.head_change(addend),
            None => Change::of_queries(&self.queries, engine.vector()),
        }
    }

    /// What is added to cells, `(slots, E)`; empty for nothing.
    pub(crate) fn addend(&self) -> &[f32] {
        self.cells.as_ref().map_or(&[], |cells| &cells.delta)
    }
}

/// What the sites of one view saw of some rows, in the order in which rows pass them.
pub(crate) struct Played {
    seen: Vec<Seen>,
    rows: usize,
}

impl Played {
    /// What was seen of `rows` rows.
    pub(crate) fn new(seen: Vec<Seen>, rows: usize) -> Self {
        Self { seen, rows }
    }

    /// The sites of one row.
    pub(crate) fn row(&self, row: usize) -> Vec<Site<'_>> {
        let all = self.seen.iter();
        all.map(|seen| Site { input: self.part(&seen.input, row), gradient: self.part(&seen.gradient, row) })
            .collect()
    }

    fn part<'a>(&self, values: &'a [f32], row: usize) -> &'a [f32] {
        let width = values.len() / self.rows.max(1);
        &values[row * width..(row + 1) * width]
    }
}

/// One row at one site.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Site<'a> {
    /// What went in; empty where nothing but the values did.
    pub(super) input: &'a [f32],
    /// Gradient of the loss by what came out.
    pub(super) gradient: &'a [f32],
}
