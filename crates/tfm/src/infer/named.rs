//! A model's tensors by name, copied out as plain numbers.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::matrix::{Matrix, Norm};
use crate::error::TfmError;

/// The tensors of a model.
#[derive(Clone, Copy)]
pub(super) struct Named<'a> {
    pub(super) tensors: &'a BTreeMap<String, Tensor>,
}

impl<'a> Named<'a> {
    /// The values of a tensor, row by row.
    pub(super) fn values(self, name: &str) -> Result<Vec<f32>, TfmError> {
        Ok(self.tensor(name)?.flatten_all()?.to_vec1()?)
    }

    /// The affine map `{name}.weight (out, in)`, `{name}.bias (out)`.
    pub(super) fn affine(self, name: &str) -> Result<Matrix, TfmError> {
        let weight = format!("{name}.weight");
        let (_, input) = self.tensor(&weight)?.dims2()?;
        Ok(Matrix::new(&self.values(&weight)?, self.values(&format!("{name}.bias"))?, input))
    }

    /// The norm `{name}`; without a bias in the file it is zero.
    pub(super) fn norm(self, name: &str, width: usize) -> Result<Norm, TfmError> {
        let bias = format!("{name}.bias");
        let bias = if self.tensors.contains_key(&bias) { self.values(&bias)? } else { vec![0.0; width] };
        Ok(Norm::new(self.values(&format!("{name}.weight"))?, bias))
    }

    fn tensor(self, name: &str) -> Result<&'a Tensor, TfmError> {
        self.tensors.get(name).ok_or_else(|| TfmError::MissingTensor { name: name.to_owned() })
    }
}
