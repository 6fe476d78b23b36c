//! How many bytes a cache takes, and its building, before anything is computed.
//!
//! Held bytes are exact. The bytes of building are those of every buffer that can be alive at once, for as many
//! threads as there are; the input rows and the model's own weights are not counted.

use serde::{Deserialize, Serialize};

use super::{
    CELL_ROWS,
    build::{COLUMN_ROWS, ICL_ROWS},
    heads::{HeadSizes, Precision, QUERY_BLOCK, WIDE_BLOCK},
    scratch::FEW_NUMBERS,
};
use crate::{
    error::TfmError,
    model::{config::ModelConfig, variant::Ssmax},
};

/// What of a context is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheKind {
    /// Keys and values of every in-context block: a prediction costs a pass over the query rows alone.
    Kv,
    /// Row vectors: a fraction of the bytes, but every prediction passes the context through the in-context stage again.
    Repr,
}

/// How a context is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// What is held.
    pub kind: CacheKind,
    /// In which numbers.
    pub precision: Precision,
}

impl Cache {
    /// Keys and values in single precision: the fastest and exact.
    pub const DEFAULT: Self = Self { kind: CacheKind::Kv, precision: Precision::F32 };

    /// All ways, the fastest first.
    pub const ALL: [Self; 4] = [
        Self::DEFAULT,
        Self { kind: CacheKind::Kv, precision: Precision::F16 },
        Self { kind: CacheKind::Repr, precision: Precision::F32 },
        Self { kind: CacheKind::Repr, precision: Precision::F16 },
    ];
}

impl std::fmt::Display for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            CacheKind::Kv => "kv",
            CacheKind::Repr => "repr",
        };
        let precision = match self.precision {
            Precision::F32 => "f32",
            Precision::F16 => "f16",
        };
        write!(f, "{kind} {precision}")
    }
}

/// Bytes of a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes held as long as the context is.
    pub held: usize,
    /// Most bytes alive while it is built, held ones included.
    pub building: usize,
}

/// Bytes that a context may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Most bytes held.
    pub held: usize,
    /// Most bytes alive while building.
    pub building: usize,
}

impl Budget {
    /// No limit.
    pub const UNLIMITED: Self = Self { held: usize::MAX, building: usize::MAX };

    /// Checks a footprint.
    ///
    /// # Errors
    /// [`TfmError::OverBudget`] naming what is needed and what is allowed.
    pub fn check(self, cache: Cache, footprint: Footprint) -> Result<(), TfmError> {
        let over = |what, needed, allowed| {
            Err(TfmError::OverBudget { what, cache: cache.to_string(), needed, allowed })
        };
        if footprint.held > self.held {
            return over("held context", footprint.held, self.held);
        }
        if footprint.building > self.building {
            return over("building the context", footprint.building, self.building);
        }
        Ok(())
    }
}

impl Footprint {
    /// Bytes of a context of `rows` rows and `columns` model columns, built on some threads.
    #[must_use]
    pub(crate) fn of(
        config: &ModelConfig,
        rows: usize,
        columns: usize,
        threads: usize,
        cache: Cache,
        views: usize,
    ) -> Self {
        let (cell, vector) = (config.embed_dim, config.row_width());
        let slots = config.variant.grouping().slots(columns);
        let heads = |heads: usize, width: usize, keys: usize| {
            HeadSizes { heads, head_dim: width / heads, keys }.numbers()
        };
        let summary = heads(config.col_nhead, cell, config.col_num_inds);
        let summaries = config.col_num_blocks * views * slots * summary;
        let held = match cache.kind {
            CacheKind::Kv => config.icl_num_blocks * views * heads(config.icl_nhead, vector, rows),
            CacheKind::Repr => views * rows * vector,
        };
        let bases = if config.variant.icl_ssmax == Ssmax::None { 0 } else { config.icl_num_blocks * vector };
        let held = (summaries + held) * cache.precision.bytes() + bases * size_of::<f32>();

        let column = column_numbers(config, rows, heads(config.col_nhead, cell, rows), summary);
        let cells = cell_numbers(config, slots, rows.min(CELL_ROWS));
        let icl = Reading {
            width: vector,
            heads: config.icl_nhead,
            ff_factor: config.ff_factor,
            scaled: query_hidden(config.variant.icl_ssmax, config.ssmax_hidden),
        };
        let count = rows.min(ICL_ROWS);
        let icl = icl.numbers(count, rows).max(3 * count * vector);
        // Each thread keeps some memory for its next pass.
        let transient =
            (threads * column).max(rows * vector + threads * cells.max(icl)) + threads * FEW_NUMBERS;
        Self { held, building: held + transient * size_of::<f32>() }
    }
}

/// Numbers alive while one column is summarised.
fn column_numbers(config: &ModelConfig, rows: usize, gathered: usize, summary: usize) -> usize {
    let (cell, inducing) = (config.embed_dim, config.col_num_inds);
    let reading = |ssmax| Reading {
        width: cell,
        heads: config.col_nhead,
        ff_factor: config.ff_factor,
        scaled: query_hidden(ssmax, config.ssmax_hidden),
    };
    let chunk = rows.min(COLUMN_ROWS);
    let input = rows * config.variant.grouping().width();
    let gather = inducing * cell + reading(config.variant.col_ssmax).numbers(inducing, rows);
    let spread = summary + 2 * inducing * cell + reading(Ssmax::None).numbers(chunk, inducing);
    let results = config.col_num_blocks * 2 * inducing * cell;
    rows * cell + gathered + input.max(3 * chunk * cell).max(gather).max(spread) + results
}

/// Numbers alive while the vectors of a few rows are computed.
fn cell_numbers(config: &ModelConfig, slots: usize, rows: usize) -> usize {
    let (cell, length) = (config.embed_dim, config.row_num_cls + slots);
    let (cells, tokens) = (rows * slots, rows * length);
    let reading = Reading { width: cell, heads: config.col_nhead, ff_factor: config.ff_factor, scaled: 0 };
    let groups = cells * config.variant.grouping().width();
    let column = groups + cells * cell + reading.numbers(cells, config.col_num_inds).max(3 * cells * cell);
    // Tokens, their norms, keys and values, queries, what was read, then the feed-forward part.
    let row = tokens * cell * (7 + config.ff_factor) + 2 * length * 2 * cell;
    groups + rows * config.row_width() * 2 + column.max(cells * cell + row)
}

/// Hidden width of a network of the query, 0 without one.
fn query_hidden(ssmax: Ssmax, hidden: usize) -> usize {
    if matches!(ssmax, Ssmax::QueryMlp | Ssmax::QueryMlpElementwise) { hidden } else { 0 }
}

/// A block that reads keys.
struct Reading {
    width: usize,
    heads: usize,
    ff_factor: usize,
    scaled: usize,
}

impl Reading {
    /// Numbers alive while `rows` rows read `keys` keys.
    fn numbers(&self, rows: usize, keys: usize) -> usize {
        let row = rows * self.width;
        let scaling = rows * self.heads * self.scaled;
        let head_dim = self.width / self.heads;
        let scores = rows.min(QUERY_BLOCK) * keys + WIDE_BLOCK * head_dim.next_multiple_of(8);
        2 * row + scaling.max(scores).max(row * (1 + self.ff_factor))
    }
}
