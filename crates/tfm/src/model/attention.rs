//! The pre-norm attention block that all three stages share, with scalable softmax.
//!
//! `x = q + O(softmax(Q K^T / sqrt(hd)) V)`, then `x + L2(gelu(L1(LN2 x)))`; queries and keys share one norm. The
//! scalable softmax ("QASSMax") multiplies queries by a learnt function of `ln n` and of the query itself, so that
//! attention doesn't flatten as the context grows.

use candle_core::Tensor;

use super::params::{Init, Source, affine, norm};
use crate::{
    error::TfmError,
    ops::{
        activation::{gate, gelu},
        attention::attention,
        feed_forward::feed_forward,
        linear::linear,
        norm::layer_norm,
        rope,
    },
};

/// Sizes of one block.
#[derive(Clone, Copy)]
pub(crate) struct BlockSizes {
    pub(crate) width: usize,
    pub(crate) heads: usize,
    pub(crate) ff_factor: usize,
    /// Hidden width of the softmax-scaling networks; `None` = plain softmax.
    pub(crate) ssmax_hidden: Option<usize>,
}

/// One attention block.
pub(crate) struct Block {
    width: usize,
    heads: usize,
    in_proj: (Tensor, Tensor),
    out_proj: (Tensor, Tensor),
    ssmax: Option<Ssmax>,
    norm1: (Tensor, Tensor),
    norm2: (Tensor, Tensor),
    linear1: (Tensor, Tensor),
    linear2: (Tensor, Tensor),
}

impl Block {
    pub(crate) fn new(source: &mut dyn Source, name: &str, sizes: BlockSizes) -> Result<Self, TfmError> {
        let BlockSizes { width, heads, ff_factor, ssmax_hidden } = sizes;
        let xavier = (6.0 / (4 * width) as f32).sqrt();
        let attn = format!("{name}.attn");
        let in_weight =
            source.tensor(&format!("{attn}.in_proj_weight"), &[3 * width, width], Init::Uniform(xavier))?;
        let in_bias = source.tensor(&format!("{attn}.in_proj_bias"), &[3 * width], Init::Zero)?;
        let limit = 1.0 / (width as f32).sqrt();
        let out_weight =
            source.tensor(&format!("{attn}.out_proj.weight"), &[width, width], Init::Uniform(limit))?;
        let out_bias = source.tensor(&format!("{attn}.out_proj.bias"), &[width], Init::Zero)?;
        let ssmax = match ssmax_hidden {
            Some(hidden) => Some(Ssmax::new(source, &format!("{attn}.ssmax_layer"), width, heads, hidden)?),
            None => None,
        };
        Ok(Self {
            width,
            heads,
            in_proj: (in_weight, in_bias),
            out_proj: (out_weight, out_bias),
            ssmax,
            norm1: norm(source, &format!("{name}.norm1"), width)?,
            norm2: norm(source, &format!("{name}.norm2"), width)?,
            linear1: affine(source, &format!("{name}.linear1"), ff_factor * width, width)?,
            linear2: affine(source, &format!("{name}.linear2"), width, ff_factor * width)?,
        })
    }

    /// Normalises rows for use as queries or as keys and values.
    pub(crate) fn normed(&self, x: &Tensor) -> Result<Tensor, TfmError> {
        Ok(layer_norm(x, &self.norm1.0, &self.norm1.1)?)
    }

    /// Keys and values side by side, `(batch, length, 2 width)`, from normed rows.
    pub(crate) fn keys_values(&self, normed: &Tensor) -> Result<Tensor, TfmError> {
        let weight = self.in_proj.0.narrow(0, self.width, 2 * self.width)?;
        let bias = self.in_proj.1.narrow(0, self.width, 2 * self.width)?;
        Ok(linear(normed, &weight, &bias)?)
    }

    /// Runs the block for residual rows `x` with their normed form; `context` is the number of context rows.
    ///
    /// A batch of one in `x` is shared by all batches of `kv`.
    pub(crate) fn attend(
        &self,
        x: &Tensor,
        normed: &Tensor,
        kv: &Tensor,
        frequencies: Option<&[f32]>,
        context: usize,
    ) -> Result<Tensor, TfmError> {
        let weight = self.in_proj.0.narrow(0, 0, self.width)?;
        let bias = self.in_proj.1.narrow(0, 0, self.width)?;
        let mut q = linear(normed, &weight, &bias)?;
        if let Some(frequencies) = frequencies {
            q = rope::rotate(&q, self.heads, frequencies)?;
        }
        if let Some(ssmax) = &self.ssmax {
            q = ssmax.apply(&q, context)?;
        }
        let read = linear(&attention(&q, kv, self.heads)?, &self.out_proj.0, &self.out_proj.1)?;
        let x = if read.dims() == x.dims() { (read + x)? } else { read.broadcast_add(x)? };
        Ok(feed_forward(&x, &self.norm2, &self.linear1, &self.linear2)?)
    }

    /// Rotates the keys of a packed `(batch, length, 2 width)` tensor.
    pub(crate) fn rotate_keys(&self, kv: &Tensor, frequencies: &[f32]) -> Result<Tensor, TfmError> {
        Ok(rope::rotate(kv, self.heads, frequencies)?)
    }
}

/// Query scaling of the scalable softmax.
struct Ssmax {
    head_dim: usize,
    base: [(Tensor, Tensor); 2],
    query: [(Tensor, Tensor); 2],
}

impl Ssmax {
    fn new(
        source: &mut dyn Source,
        name: &str,
        width: usize,
        heads: usize,
        hidden: usize,
    ) -> Result<Self, TfmError> {
        let head_dim = width / heads;
        let base = [
            affine(source, &format!("{name}.base_mlp.0"), hidden, 1)?,
            affine(source, &format!("{name}.base_mlp.2"), width, hidden)?,
        ];
        let first = affine(source, &format!("{name}.query_mlp.0"), hidden, head_dim)?;
        let last = format!("{name}.query_mlp.2");
        let weight = source.tensor(&format!("{last}.weight"), &[head_dim, hidden], Init::Zero)?;
        let bias = source.tensor(&format!("{last}.bias"), &[head_dim], Init::Zero)?;
        Ok(Self { head_dim, base, query: [first, (weight, bias)] })
    }

    fn apply(&self, q: &Tensor, context: usize) -> Result<Tensor, TfmError> {
        let size = (context.max(1) as f32).ln();
        let size = Tensor::from_vec(vec![size], (1, 1), q.device())?;
        let base = gelu(&linear(&size, &self.base[0].0, &self.base[0].1)?)?;
        let base = linear(&base, &self.base[1].0, &self.base[1].1)?.flatten_all()?;
        let heads = q.reshape(((), self.head_dim))?;
        let hidden = gelu(&linear(&heads, &self.query[0].0, &self.query[0].1)?)?;
        let turned = linear(&hidden, &self.query[1].0, &self.query[1].1)?.reshape(q.shape())?;
        Ok(gate(q, &turned, &base)?)
    }
}
