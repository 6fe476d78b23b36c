//! Where an adapter may change the way of query rows, and nothing else may: context rows never come by here.

use candle_core::Tensor;

use crate::{error::TfmError, ops::norm::layer_norm};

/// The way of query rows from their cells to class scores; as it stands, the model's own.
pub(crate) trait QueryPath {
    /// Cells `(rows, slots, E)` before the row stage.
    fn cells(&mut self, cells: Tensor) -> Result<Tensor, TfmError> {
        Ok(cells)
    }

    /// Queries `(batch, rows, D)` of in-context block `block`, projected from `normed (batch, rows, D)`.
    fn queries(&mut self, _block: usize, _normed: &Tensor, queries: Tensor) -> Result<Tensor, TfmError> {
        Ok(queries)
    }

    /// The final norm of rows `(batch, rows, D)`.
    fn norm(&mut self, rows: &Tensor, gain: &Tensor, bias: &Tensor) -> Result<Tensor, TfmError> {
        Ok(layer_norm(rows, gain, bias)?)
    }

    /// Class scores `(batch, rows, outputs)`, computed from the decoder's hidden layer `(batch, rows, 2 D)`.
    fn scores(&mut self, _hidden: &Tensor, scores: Tensor) -> Result<Tensor, TfmError> {
        Ok(scores)
    }
}

/// The model's own way.
pub(crate) struct Plain;

impl QueryPath for Plain {}
