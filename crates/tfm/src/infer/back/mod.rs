//! Query rows forward and back: gradients by what an adapter adds to them, all weights frozen.
//!
//! Rows don't meet on the query path, so one pass over many gives each row's own gradient. A pass keeps what the way back
//! needs and nothing else; weights get no gradient. What is computed forward is what serving computes, up to the order
//! of sums in norms and in attention within a row.

mod block;
mod reading;
mod row;

use rayon::prelude::*;

use self::{
    block::{FeedForward, Gated, Turned, activated},
    reading::{ContextRows, Weights},
};
use super::{
    CELL_ROWS, Cached, Engine, Held,
    change::{Change, TurnedFactors},
    heads::HeadSizes,
    matrix::{Matrix, Standardised},
    scratch::{Buffer, keep_many},
    shifted,
};

/// A model's maps as gradients come back through them.
pub(super) struct TurnedEngine {
    row: Vec<Turned>,
    icl: Vec<Turned>,
    hidden: Matrix,
}

impl TurnedEngine {
    pub(super) fn of(engine: &Engine) -> Self {
        Self {
            row: engine.row.blocks.iter().map(Turned::of).collect(),
            icl: engine.icl.blocks.iter().map(Turned::of).collect(),
            hidden: engine.decoder.hidden.turned(),
        }
    }
}

/// Rows where they enter the query path, row by row.
#[derive(Clone, Copy)]
pub(crate) enum Entering<'a> {
    /// Cells `(rows, slots, E)`, before the row stage.
    Cells(&'a [f32]),
    /// Row vectors `(rows, D)`, before the in-context stage.
    Vectors(&'a [f32]),
    /// Rows `(rows, D)` that have read the context, before the decoder.
    Read(&'a [f32]),
}

/// What one place of the query path where an adapter adds something saw of some rows, row by row.
pub(crate) struct Seen {
    /// What went in; empty where nothing but the adapter's values did.
    pub(crate) input: Vec<f32>,
    /// Gradient by what came out.
    pub(crate) gradient: Vec<f32>,
}

/// Keys and values of each view and in-context block in the order of a pass's loops, for as many passes as there are.
pub(crate) struct Readable(Vec<Vec<ContextRows>>);

/// The query path of a context of two classes with an adapter's changes.
pub(crate) struct Passes<'a> {
    engine: &'a Engine,
    cached: &'a Cached,
    turned: &'a TurnedEngine,
    context: &'a Readable,
    /// Added to every row's cells `(slots, E)`; empty for nothing.
    added: Vec<f32>,
    change: Change,
    factors: Vec<TurnedFactors>,
    /// Weights of the decoder's last layer for class 1 less those for class 0, as the model names them.
    margin: Vec<f32>,
}

/// What a forward pass of one view keeps.
pub(crate) struct Trail {
    /// Class 1's score less class 0's, `(rows)`.
    pub(crate) margins: Vec<f32>,
    view: usize,
    rows: Vec<row::Kept>,
    blocks: Vec<KeptBlock>,
    norm: Standardised,
    slopes: Buffer,
    active: Buffer,
}

struct KeptBlock {
    norm: Standardised,
    /// Normed rows, where an adapter reads them.
    normed: Option<Buffer>,
    gated: Option<Gated>,
    weights: Weights,
    feed_forward: FeedForward,
}

impl Engine {
    /// What rows that enter before the in-context stage will read.
    pub(crate) fn readable(&self, cached: &Cached) -> Readable {
        let sizes = HeadSizes { heads: self.heads, head_dim: self.vector / self.heads, keys: cached.rows };
        let blocks = |view| {
            let blocks = self.context_rows(cached, view);
            blocks.iter().map(|rows| ContextRows::new(sizes, rows)).collect()
        };
        Readable((0..cached.views).map(blocks).collect())
    }

    /// Cells `(rows, slots, E)` of query rows in one view, before any adapter; `added (slots, E)` is the base's own. Each row's
    /// are a function of that row and the context, to the last bit, and so is all that follows.
    pub(crate) fn query_cells(
        &self,
        cached: &Cached,
        view: usize,
        values: &[f32],
        added: &[f32],
    ) -> Vec<f32> {
        let (tokens, item) = (self.row.tokens().len(), self.length(cached) * self.cell);
        let chunks = values.par_chunks(CELL_ROWS * cached.columns);
        let cells = chunks.flat_map_iter(|values| {
            let items = self.items(cached, (view, 1), values, None, added);
            items.chunks_exact(item).flat_map(|item| item[tokens..].iter().copied()).collect::<Vec<f32>>()
        });
        cells.collect()
    }

    /// The query path of a context of two classes. `added (slots, E)` is added to every row's cells, nothing if it is empty.
    pub(crate) fn passes<'a>(
        &'a self,
        cached: &'a Cached,
        context: &'a Readable,
        change: Change,
        added: Vec<f32>,
    ) -> Passes<'a> {
        let output = change.head().map_or(&self.decoder.output, |head| &head.output);
        let ones = output.weights_of(1);
        let margin = ones.iter().zip(output.weights_of(0)).map(|(one, zero)| one - zero).collect();
        let factors = change.turned();
        let turned = self.turned.get_or_init(|| TurnedEngine::of(self));
        Passes { engine: self, cached, turned, context, added, change, factors, margin }
    }

    /// Keys and values `(keys, 2 D)` of each in-context block in one view.
    fn context_rows(&self, cached: &Cached, view: usize) -> Vec<Vec<f32>> {
        let vectors = match &cached.held {
            Held::KeysValues(blocks) => return blocks.iter().map(|heads| heads.rows(view)).collect(),
            Held::Vectors(vectors) => vectors,
        };
        let size = cached.rows * self.vector;
        let mut context = vectors.read(view * size, size);
        let mut heads = self.icl_heads(cached.rows);
        let mut all = Vec::with_capacity(self.icl.blocks.len());
        for (block, base) in self.icl.blocks.iter().zip(&cached.bases) {
            self.put_context(block, &context, &mut heads, 0);
            all.push(heads.rows(0));
            self.advance(block, &mut context, (&heads, 0), base, None);
        }
        all
    }
}

impl Passes<'_> {
    /// Rows of a pass, few enough that what it keeps of their attention stays near the processor.
    pub(crate) fn rows(&self) -> usize {
        let a_row = self.engine.icl.blocks.len() * self.engine.heads * self.cached.rows;
        (KEPT_WEIGHTS / a_row.max(1)).clamp(LEAST_ROWS, MOST_ROWS)
    }

    /// The way of some rows in one view.
    pub(crate) fn forward(&self, view: usize, entering: Entering<'_>) -> Trail {
        keep_many();
        let (mut rows, kept_rows) = match entering {
            Entering::Cells(cells) => self.vectors(cells),
            Entering::Vectors(values) | Entering::Read(values) => (Buffer::copy(values), Vec::new()),
        };
        let blocks = match entering {
            Entering::Read(_) => Vec::new(),
            Entering::Cells(_) | Entering::Vectors(_) => self.read(view, &mut rows),
        };
        let decoder = &self.engine.decoder;
        let (norm, output) =
            self.change.head().map_or((&decoder.norm, &decoder.output), |head| (&head.norm, &head.output));
        let (normed, norm) = norm.kept(&rows);
        let (active, slopes) = activated(decoder.hidden.of(&normed));
        let scores = output.of(&active);
        let [zero, one] = [0, 1].map(|class| shifted(class, view, 2));
        let margins = scores.chunks_exact(output.output()).map(|scores| scores[one] - scores[zero]).collect();
        Trail { margins, view, rows: kept_rows, blocks, norm, slopes, active }
    }

    /// Row vectors `(rows, D)` of cells.
    pub(crate) fn row_vectors(&self, cells: &[f32]) -> Vec<f32> {
        self.vectors(cells).0.to_vec()
    }

    /// Rows `(rows, D)` that have read one view's context, of row vectors.
    pub(crate) fn read_rows(&self, view: usize, vectors: &[f32]) -> Vec<f32> {
        let chunks = vectors.par_chunks(self.rows() * self.engine.vector);
        let read = chunks.flat_map_iter(|vectors| {
            let mut rows = Buffer::copy(vectors);
            self.read(view, &mut rows);
            rows.to_vec()
        });
        read.collect()
    }

    /// What the adapter's places saw, in the order in which rows pass them, if the loss has gradient `outer (rows)` by the
    /// margins.
    pub(crate) fn back(&self, trail: &Trail, outer: &[f32]) -> Vec<Seen> {
        // What a view calls class 1 is the margin's first term.
        let sign = if shifted(1, trail.view, 2) == 1 { 1.0 } else { -1.0 };
        let mut hidden = Buffer::copy(&trail.slopes);
        for (hidden, outer) in hidden.chunks_exact_mut(self.margin.len()).zip(outer) {
            hidden.iter_mut().zip(&self.margin).for_each(|(slope, weight)| *slope *= weight * outer * sign);
        }
        let of_normed = self.turned.hidden.of(&hidden);
        let decoder = &self.engine.decoder;
        if self.change.head().is_some() {
            let outputs = decoder.output.output();
            let scores = outer.iter().flat_map(|outer| {
                (0..outputs).map(move |class| match class {
                    0 => -outer * sign,
                    1 => outer * sign,
                    _ => 0.0,
                })
            });
            return vec![
                Seen { input: trail.norm.rows.to_vec(), gradient: of_normed.to_vec() },
                Seen { input: trail.active.to_vec(), gradient: scores.collect() },
            ];
        }
        let mut gradient = Buffer::zeros(of_normed.len());
        decoder.norm.add_back(&trail.norm, &of_normed, &mut gradient);
        let mut seen = Vec::new();
        for (i, kept) in trail.blocks.iter().enumerate().rev() {
            let of_queries =
                self.block_back(trail.view, i, kept, &mut gradient, i > 0 || !trail.rows.is_empty());
            if let Some(normed) = &kept.normed {
                seen.push(Seen { input: normed.to_vec(), gradient: of_queries.to_vec() });
            }
        }
        seen.reverse();
        if !trail.rows.is_empty() {
            seen.insert(0, Seen { input: Vec::new(), gradient: self.vectors_back(&trail.rows, &gradient) });
        }
        seen
    }

    /// Row vectors `(rows, D)` of cells `(rows, slots, E)`.
    fn vectors(&self, cells: &[f32]) -> (Buffer, Vec<row::Kept>) {
        let (row, width, vector) = (&self.engine.row, self.engine.cell, self.engine.vector);
        let slots = self.engine.column.slots(self.cached.columns);
        let (tokens, size) = (row.tokens(), slots * width);
        let mut vectors = Buffer::stale(cells.len() / size * vector);
        let chunks = cells.chunks(ROW_ITEMS * size).zip(vectors.chunks_mut(ROW_ITEMS * vector));
        let kept = chunks.map(|(cells, to)| {
            let mut z = Buffer::stale(cells.len() / size * (tokens.len() + size));
            for (item, cells) in z.chunks_exact_mut(tokens.len() + size).zip(cells.chunks_exact(size)) {
                let (of_tokens, of_cells) = item.split_at_mut(tokens.len());
                of_tokens.copy_from_slice(tokens);
                of_cells.copy_from_slice(cells);
                of_cells.iter_mut().zip(&self.added).for_each(|(c, a)| *c += a);
            }
            let (some, kept) = row::forward(row, z, tokens.len() / width + slots);
            to.copy_from_slice(&some);
            kept
        });
        let kept = kept.collect();
        (vectors, kept)
    }

    /// Gradient of cells `(rows, slots, E)` from that of row vectors.
    fn vectors_back(&self, kept: &[row::Kept], of_vectors: &[f32]) -> Vec<f32> {
        let row = &self.engine.row;
        let slots = self.engine.column.slots(self.cached.columns);
        let (tokens, size) = (row.tokens().len(), slots * self.engine.cell);
        let mut of_cells = Vec::with_capacity(of_vectors.len() / self.engine.vector * size);
        for (kept, of_vectors) in kept.iter().zip(of_vectors.chunks(ROW_ITEMS * self.engine.vector)) {
            let of_items = row::back(row, &self.turned.row, kept, of_vectors);
            of_items.chunks_exact(tokens + size).for_each(|item| of_cells.extend_from_slice(&item[tokens..]));
        }
        of_cells
    }

    /// Lets rows read one view's context, block by block.
    fn read(&self, view: usize, rows: &mut [f32]) -> Vec<KeptBlock> {
        let (blocks, bases) = (&self.engine.icl.blocks, &self.cached.bases);
        let mut all = Vec::with_capacity(blocks.len());
        for (i, ((block, context), base)) in blocks.iter().zip(&self.context.0[view]).zip(bases).enumerate() {
            let (normed, norm) = block.norm1.kept(rows);
            let mut queries = block.queries(&normed);
            let normed = self.change.queries(i).map(|factors| {
                factors.add_to(&normed, &mut queries);
                normed
            });
            let gated = Gated::forward(block, &mut queries, base);
            let weights = context.attend(&queries);
            block.out.add_to(&weights.read, rows);
            let feed_forward = FeedForward::forward(block, rows);
            all.push(KeptBlock { norm, normed, gated, weights, feed_forward });
        }
        all
    }

    /// Turns the gradient of one block's output into that of its input, if `further`; returns that of the queries.
    fn block_back(
        &self,
        view: usize,
        i: usize,
        kept: &KeptBlock,
        gradient: &mut [f32],
        further: bool,
    ) -> Buffer {
        let (block, turned) = (&self.engine.icl.blocks[i], &self.turned.icl[i]);
        kept.feed_forward.back(block, turned, gradient);
        let mut of_queries = self.context.0[view][i].attend_back(&kept.weights, &turned.out.of(gradient));
        Gated::back(kept.gated.as_ref(), turned, &mut of_queries, &self.cached.bases[i]);
        if further {
            let mut of_normed = turned.query.of(&of_queries);
            if let Some(factors) = self.factors.get(i) {
                factors.add_to(&of_queries, &mut of_normed);
            }
            block.norm1.add_back(&kept.norm, &of_normed, gradient);
        }
        of_queries
    }
}

/// Rows whose cells pass the row stage together: what is kept of them stays in the second-level cache.
const ROW_ITEMS: usize = 16;
/// Numbers of attention weights that a pass keeps: eight megabytes.
const KEPT_WEIGHTS: usize = 2 << 20;
/// Fewest and most rows of a pass; products take six rows at a time.
const LEAST_ROWS: usize = 18;
const MOST_ROWS: usize = 132;
