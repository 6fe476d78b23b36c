//! The pre-norm attention block that all three stages share, with scalable softmax.
//!
//! `x = q + O(softmax(Q K^T / sqrt(hd)) V)`, then `x + L2(gelu(L1(LN2 x)))`; queries and keys share one norm. The
//! scalable softmax multiplies queries by a learnt function of `ln n` and, in its second form ("QASSMax"), of the
//! query itself, so that attention doesn't flatten as the context grows.

use candle_core::{Device, Tensor};

use super::{
    params::{Init, Source, affine, norm},
    variant::Ssmax,
};
use crate::{
    error::TfmError,
    ops::{
        activation::{gate, gelu},
        attention::attention,
        feed_forward::feed_forward,
        linear::{linear, linear_onto},
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
    pub(crate) ssmax: Ssmax,
    /// Hidden width of the softmax-scaling networks.
    pub(crate) ssmax_hidden: usize,
    pub(crate) bias_free_ln: bool,
    /// Rotary pairs are neighbours.
    pub(crate) interleaved: bool,
}

/// One attention block.
pub(crate) struct Block {
    width: usize,
    heads: usize,
    in_proj: (Tensor, Tensor),
    out_proj: (Tensor, Tensor),
    /// Order `(2 width)` of the query and key features that turns rotary neighbours into halves, if they need it.
    ///
    /// Inner products don't see a permutation of both sides, so one rotation serves both conventions.
    order: Option<Tensor>,
    scaling: Option<Scaling>,
    norm1: (Tensor, Tensor),
    norm2: (Tensor, Tensor),
    linear1: (Tensor, Tensor),
    linear2: (Tensor, Tensor),
}

impl Block {
    pub(crate) fn new(source: &mut dyn Source, name: &str, sizes: BlockSizes) -> Result<Self, TfmError> {
        let BlockSizes { width, heads, ff_factor, bias_free_ln, .. } = sizes;
        let xavier = (6.0 / (4 * width) as f32).sqrt();
        let attn = format!("{name}.attn");
        let in_weight =
            source.tensor(&format!("{attn}.in_proj_weight"), &[3 * width, width], Init::Uniform(xavier))?;
        let in_bias = source.tensor(&format!("{attn}.in_proj_bias"), &[3 * width], Init::Zero)?;
        let limit = 1.0 / (width as f32).sqrt();
        let out_weight =
            source.tensor(&format!("{attn}.out_proj.weight"), &[width, width], Init::Uniform(limit))?;
        let out_bias = source.tensor(&format!("{attn}.out_proj.bias"), &[width], Init::Zero)?;
        let scaling = Scaling::new(source, &format!("{attn}.ssmax_layer"), sizes)?;
        let order = if sizes.interleaved { Some(halves_order(width, heads)?) } else { None };
        Ok(Self {
            width,
            heads,
            in_proj: (in_weight, in_bias),
            out_proj: (out_weight, out_bias),
            order,
            scaling,
            norm1: norm(source, &format!("{name}.norm1"), width, bias_free_ln)?,
            norm2: norm(source, &format!("{name}.norm2"), width, bias_free_ln)?,
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
        let (weight, bias) = self.projection(self.width, 2 * self.width)?;
        Ok(linear(normed, &weight, &bias)?)
    }

    /// Weight `(width, width)` of the queries, rows in the model file's order.
    pub(crate) fn query_weight(&self) -> Result<Tensor, TfmError> {
        Ok(self.in_proj.0.narrow(0, 0, self.width)?)
    }

    /// Rows `first..first + count` of the input projection, which holds queries, keys and values in this order.
    fn projection(&self, first: usize, count: usize) -> Result<(Tensor, Tensor), TfmError> {
        let weight = self.in_proj.0.narrow(0, first, count)?;
        let bias = self.in_proj.1.narrow(0, first, count)?;
        match &self.order {
            Some(order) => {
                let order = order.narrow(0, 0, count)?;
                Ok((weight.index_select(&order, 0)?, bias.index_select(&order, 0)?))
            }
            None => Ok((weight, bias)),
        }
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
        let (weight, bias) = self.projection(0, self.width)?;
        let mut q = linear(normed, &weight, &bias)?;
        if let Some(frequencies) = frequencies {
            q = rope::rotate(&q, self.heads, frequencies)?;
        }
        if let Some(scaling) = &self.scaling {
            q = scaling.apply(&q, context)?;
        }
        let (read, (weight, bias)) = (attention(&q, kv, self.heads)?, &self.out_proj);
        let x = if read.dims() == x.dims() {
            linear_onto(x, &read, weight, bias)?
        } else {
            linear(&read, weight, bias)?.broadcast_add(x)?
        };
        Ok(feed_forward(&x, &self.norm2, &self.linear1, &self.linear2)?)
    }

    /// Rotates the keys of a packed `(batch, length, 2 width)` tensor.
    pub(crate) fn rotate_keys(&self, kv: &Tensor, frequencies: &[f32]) -> Result<Tensor, TfmError> {
        Ok(rope::rotate(kv, self.heads, frequencies)?)
    }
}

/// Positions `(2 width)` of the even, then the odd features of each head, followed by the values' features as they
/// are.
fn halves_order(width: usize, heads: usize) -> Result<Tensor, TfmError> {
    let head_dim = width / heads;
    let within = (0..head_dim).step_by(2).chain((1..head_dim).step_by(2));
    let queries_or_keys = (0..heads).flat_map(|head| within.clone().map(move |i| head * head_dim + i));
    let order: Vec<u32> = queries_or_keys.chain(width..2 * width).map(|i| i as u32).collect();
    Ok(Tensor::from_vec(order, 2 * width, &Device::Cpu)?)
}

/// Query scaling of the scalable softmax.
struct Scaling {
    heads: usize,
    head_dim: usize,
    base: Base,
    /// Network of the query, one output per feature or one in all.
    query: Option<Network>,
}

/// The part of the scaling that depends on the number of context rows only.
enum Base {
    /// `s * ln n` per head.
    Heads(Tensor),
    /// A network of `ln n`, one output per head or per feature.
    Network(Network),
}

/// Two affine maps with a GELU between them.
type Network = [(Tensor, Tensor); 2];

impl Scaling {
    fn new(source: &mut dyn Source, name: &str, sizes: BlockSizes) -> Result<Option<Self>, TfmError> {
        let BlockSizes { width, heads, ssmax, ssmax_hidden: hidden, .. } = sizes;
        let head_dim = width / heads;
        let (network, outputs) = match ssmax {
            Ssmax::None => return Ok(None),
            Ssmax::Heads => {
                let scales = source.tensor(&format!("{name}.scales"), &[heads], Init::One)?;
                return Ok(Some(Self { heads, head_dim, base: Base::Heads(scales), query: None }));
            }
            Ssmax::Mlp => ("mlp", heads),
            Ssmax::MlpElementwise => ("mlp", width),
            Ssmax::QueryMlp => ("base_mlp", heads),
            Ssmax::QueryMlpElementwise => ("base_mlp", width),
        };
        let base = Base::Network([
            affine(source, &format!("{name}.{network}.0"), hidden, 1)?,
            affine(source, &format!("{name}.{network}.2"), outputs, hidden)?,
        ]);
        let query = match ssmax {
            Ssmax::QueryMlp => Some(1),
            Ssmax::QueryMlpElementwise => Some(head_dim),
            _ => None,
        };
        let query = match query {
            Some(outputs) => {
                let first = affine(source, &format!("{name}.query_mlp.0"), hidden, head_dim)?;
                let last = format!("{name}.query_mlp.2");
                let weight = source.tensor(&format!("{last}.weight"), &[outputs, hidden], Init::Zero)?;
                let bias = source.tensor(&format!("{last}.bias"), &[outputs], Init::Zero)?;
                Some([first, (weight, bias)])
            }
            None => None,
        };
        Ok(Some(Self { heads, head_dim, base, query }))
    }

    fn apply(&self, q: &Tensor, context: usize) -> Result<Tensor, TfmError> {
        let width = self.heads * self.head_dim;
        let size = (context.max(1) as f32).ln();
        let base = match &self.base {
            Base::Heads(scales) => (scales * f64::from(size))?,
            Base::Network(network) => {
                run(network, &Tensor::from_vec(vec![size], (1, 1), q.device())?)?.flatten_all()?
            }
        };
        let base = if base.elem_count() == width {
            base
        } else {
            base.reshape((self.heads, 1))?.broadcast_as((self.heads, self.head_dim))?.flatten_all()?
        };
        let Some(query) = &self.query else { return Ok(q.broadcast_mul(&base)?) };
        let turned = run(query, &q.reshape(((), self.head_dim))?)?;
        let turned = if turned.dim(1)? == self.head_dim {
            turned
        } else {
            turned.broadcast_as((turned.dim(0)?, self.head_dim))?.contiguous()?
        };
        Ok(gate(q, &turned.reshape(q.shape())?, &base)?)
    }
}

fn run(network: &Network, x: &Tensor) -> Result<Tensor, TfmError> {
    let hidden = gelu(&linear(x, &network[0].0, &network[0].1)?)?;
    Ok(linear(&hidden, &network[1].0, &network[1].1)?)
}
