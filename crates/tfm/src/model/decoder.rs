//! Decoder: row vectors to class scores or quantiles.

use candle_core::Tensor;

use super::{
    config::ModelConfig,
    params::{Source, affine, norm},
};
use crate::{
    error::TfmError,
    ops::{activation::gelu, linear::linear, norm::layer_norm},
};

/// Norm and two-layer perceptron.
pub(crate) struct Decoder {
    norm: (Tensor, Tensor),
    hidden: (Tensor, Tensor),
    output: (Tensor, Tensor),
}

impl Decoder {
    pub(crate) fn new(source: &mut dyn Source, config: &ModelConfig) -> Result<Self, TfmError> {
        let width = config.row_width();
        Ok(Self {
            norm: norm(source, "icl_predictor.ln", width, config.variant.bias_free_ln)?,
            hidden: affine(source, "icl_predictor.decoder.0", 2 * width, width)?,
            output: affine(source, "icl_predictor.decoder.2", config.outputs(), 2 * width)?,
        })
    }

    /// Class scores or quantiles `(.., outputs)` of row vectors `(.., D)`.
    pub(crate) fn scores(&self, rows: &Tensor) -> Result<Tensor, TfmError> {
        let normed = layer_norm(rows, &self.norm.0, &self.norm.1)?;
        let hidden = gelu(&linear(&normed, &self.hidden.0, &self.hidden.1)?)?;
        Ok(linear(&hidden, &self.output.0, &self.output.1)?)
    }
}
