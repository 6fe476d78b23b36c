//! Where a model's tensors come from: drawn at random, read from a file, or held as training variables.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rand_chacha::ChaCha20Rng;

use crate::error::TfmError;

/// How a tensor starts when it isn't read from a file.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Init {
    /// Uniform in `[-limit, limit]`.
    Uniform(f32),
    /// Normal with this standard deviation.
    Normal(f32),
    /// All zero.
    Zero,
    /// All one.
    One,
    /// Rotary frequencies `base^(-2 i / (2 len))`.
    Rotary(f64),
}

/// A supplier of named tensors.
pub(crate) trait Source {
    fn tensor(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor, TfmError>;
}

/// Draws every tensor from one generator, in construction order.
pub(crate) struct Random<'a> {
    pub(crate) rng: &'a mut ChaCha20Rng,
    pub(crate) drawn: BTreeMap<String, Tensor>,
}

impl Source for Random<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor, TfmError> {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = match init {
            Init::Uniform(limit) => (0..count).map(|_| self.rng.random_range(-limit..=limit)).collect(),
            Init::Normal(deviation) => (0..count).map(|_| deviation * normal(self.rng)).collect(),
            Init::Zero => vec![0.0; count],
            Init::One => vec![1.0; count],
            Init::Rotary(base) => (0..count).map(|i| base.powf(-(i as f64) / count as f64) as f32).collect(),
        };
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        self.drawn.insert(name.to_owned(), tensor.clone());
        Ok(tensor)
    }
}

/// Hands out given tensors and checks their shapes.
pub(crate) struct Given<'a> {
    pub(crate) tensors: &'a BTreeMap<String, Tensor>,
    pub(crate) used: usize,
}

impl Source for Given<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize], _init: Init) -> Result<Tensor, TfmError> {
        let tensor =
            self.tensors.get(name).ok_or_else(|| TfmError::MissingTensor { name: name.to_owned() })?;
        if tensor.dims() != shape {
            return Err(TfmError::WrongShape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                got: tensor.dims().to_vec(),
            });
        }
        self.used += 1;
        Ok(tensor.clone())
    }
}

/// A standard normal draw (Box and Muller).
pub(crate) fn normal(rng: &mut ChaCha20Rng) -> f32 {
    let u: f32 = 1.0 - rng.random::<f32>();
    let v: f32 = rng.random();
    (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

/// An affine map's weight `(out, in)` and bias `(out)`, drawn uniformly within `1 / sqrt(in)`.
pub(crate) fn affine(
    source: &mut dyn Source,
    name: &str,
    output: usize,
    input: usize,
) -> Result<(Tensor, Tensor), TfmError> {
    let limit = 1.0 / (input as f32).sqrt();
    let weight = source.tensor(&format!("{name}.weight"), &[output, input], Init::Uniform(limit))?;
    let bias = source.tensor(&format!("{name}.bias"), &[output], Init::Uniform(limit))?;
    Ok((weight, bias))
}

/// A layer norm's gain and bias; without a bias of its own the norm adds a constant zero, which no file holds.
pub(crate) fn norm(
    source: &mut dyn Source,
    name: &str,
    width: usize,
    bias_free: bool,
) -> Result<(Tensor, Tensor), TfmError> {
    let gain = source.tensor(&format!("{name}.weight"), &[width], Init::One)?;
    let bias = if bias_free {
        Tensor::zeros(width, DType::F32, &Device::Cpu)?
    } else {
        source.tensor(&format!("{name}.bias"), &[width], Init::Zero)?
    };
    Ok((gain, bias))
}
