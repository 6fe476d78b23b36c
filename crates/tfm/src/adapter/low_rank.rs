//! A change of low rank to the query projections of the in-context stage, by two factors per block.
//!
//! Context rows keep the base's projections, and so do keys and values: the cache stays as it is. In this stage a query
//! row is a single token, so its gradient by a factor is one outer product per block.

use super::{
    MAX_RANK,
    path::{Applied, LowRank},
};
use crate::{context::Context, error::TfmError, model::config::ModelConfig};

/// The changes of a context's queries, if its model has these blocks.
pub(super) fn applied(
    context: &Context,
    width: usize,
    factors: impl Iterator<Item = LowRank>,
) -> Result<Applied, TfmError> {
    let config = context.model().config();
    let queries: Vec<LowRank> = factors.collect();
    if (config.icl_num_blocks, config.row_width()) != (queries.len(), width) {
        let shown = |blocks: usize, width: usize| format!("{blocks} blocks of width {width}");
        let expected = shown(config.icl_num_blocks, config.row_width());
        return Err(TfmError::mismatch("base of the adapter", expected, shown(queries.len(), width)));
    }
    Ok(Applied { queries, ..Applied::default() })
}

/// Refuses a rank that the model's rows don't have room for.
pub(super) fn checked(rank: usize, config: &ModelConfig) -> Result<usize, TfmError> {
    if rank == 0 || rank > MAX_RANK.min(config.row_width()) {
        let (field, expected) = ("adapter rank", "1 to 64 and at most the row width of the base");
        let got = format!("{rank} with rows of width {}", config.row_width());
        return Err(TfmError::BadConfig { field, expected, got });
    }
    Ok(rank)
}

/// Keys of one part of each block.
pub(super) fn keys(config: &ModelConfig, parts: &[&str]) -> Vec<String> {
    let block = |i: usize| parts.iter().map(move |part| format!("icl.{i}.{part}"));
    (0..config.icl_num_blocks).flat_map(block).collect()
}

/// `matrix (rows, vector length) . vector`.
pub(super) fn product(matrix: &[f32], vector: &[f32]) -> Vec<f32> {
    let dot = |row: &[f32]| row.iter().zip(vector).map(|(a, b)| a * b).sum();
    matrix.chunks_exact(vector.len()).map(dot).collect()
}

/// `vector . matrix (vector length, columns)`.
pub(super) fn product_left(vector: &[f32], matrix: &[f32]) -> Vec<f32> {
    let columns = matrix.len() / vector.len();
    let mut out = vec![0f32; columns];
    for (v, row) in vector.iter().zip(matrix.chunks_exact(columns)) {
        for (o, m) in out.iter_mut().zip(row) {
            *o += v * m;
        }
    }
    out
}

/// Adds `left (rows) x right (columns)` to `matrix (rows, columns)`.
pub(super) fn add_outer(matrix: &mut [f32], left: &[f32], right: &[f32]) {
    for (row, l) in matrix.chunks_exact_mut(right.len()).zip(left) {
        for (m, r) in row.iter_mut().zip(right) {
            *m += l * r;
        }
    }
}
