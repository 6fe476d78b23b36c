//! The attention block of all three stages, on slices.

use super::{
    change::Factors,
    heads::Heads,
    kernel::{gate, gelu},
    matrix::{Matrix, Norm},
    named::Named,
    scratch::Buffer,
};
use crate::{
    error::TfmError,
    model::{attention::BlockSizes, variant::Ssmax},
};

/// One attention block, `model::attention::Block` with its weights packed.
pub(super) struct Block {
    heads: usize,
    pub(super) norm1: Norm,
    pub(super) query: Matrix,
    /// Keys and values side by side.
    pub(super) key_value: Matrix,
    pub(super) out: Matrix,
    pub(super) scaling: Option<Scaling>,
    pub(super) norm2: Norm,
    pub(super) first: Matrix,
    pub(super) second: Matrix,
}

impl Block {
    pub(super) fn new(named: Named<'_>, name: &str, sizes: BlockSizes) -> Result<Self, TfmError> {
        let BlockSizes { width, heads, .. } = sizes;
        let attn = format!("{name}.attn");
        let mut weight = named.values(&format!("{attn}.in_proj_weight"))?;
        let mut bias = named.values(&format!("{attn}.in_proj_bias"))?;
        if sizes.interleaved {
            let order = halves_order(width, heads);
            let rows: Vec<&[f32]> = weight.chunks_exact(width).collect();
            let turned = order.iter().filter_map(|from| rows.get(*from)).flat_map(|row| row.iter().copied());
            weight = turned.collect();
            bias = order.iter().filter_map(|from| bias.get(*from)).copied().collect();
        }
        let (query, key_value) = weight.split_at(width * width);
        let key_value_bias = bias.split_off(width);
        Ok(Self {
            heads,
            norm1: named.norm(&format!("{name}.norm1"), width)?,
            query: Matrix::new(query, bias, width),
            key_value: Matrix::new(key_value, key_value_bias, width),
            out: named.affine(&format!("{attn}.out_proj"))?,
            scaling: Scaling::new(named, &format!("{attn}.ssmax_layer"), sizes)?,
            norm2: named.norm(&format!("{name}.norm2"), width)?,
            first: named.affine(&format!("{name}.linear1"))?,
            second: named.affine(&format!("{name}.linear2"))?,
        })
    }

    pub(super) fn heads(&self) -> usize {
        self.heads
    }

    /// Rows ready for use as queries or as keys and values.
    pub(super) fn normed(&self, rows: &[f32]) -> Buffer {
        self.norm1.of(rows)
    }

    /// Keys and values side by side, `(n, 2 width)`, of normed rows.
    pub(super) fn keys_values(&self, normed: &[f32]) -> Buffer {
        self.key_value.of(normed)
    }

    /// Queries of normed rows before any scaling.
    pub(super) fn queries(&self, normed: &[f32]) -> Buffer {
        self.query.of(normed)
    }

    /// What queries are multiplied by against `context` rows; empty without softmax scaling.
    pub(super) fn base(&self, context: usize) -> Vec<f32> {
        self.scaling.as_ref().map_or_else(Vec::new, |scaling| scaling.base(context))
    }

    /// Scales queries by [`Self::base`] of their context and, in the softmax's second form, by themselves.
    pub(super) fn scale(&self, queries: &mut [f32], base: &[f32]) {
        if let Some(scaling) = &self.scaling {
            scaling.apply(queries, base);
        }
    }

    /// Lets residual rows, split evenly among consecutive batches from `first` on, read their batch's keys and values.
    pub(super) fn read(&self, rows: &mut [f32], heads: &Heads, first: usize, batches: usize, base: &[f32]) {
        self.read_changed(rows, heads, (first, batches), base, None);
    }

    /// As [`Self::read`] of `(first, batches)`, with a change of the rows' queries.
    pub(super) fn read_changed(
        &self,
        rows: &mut [f32],
        heads: &Heads,
        (first, batches): (usize, usize),
        base: &[f32],
        change: Option<&Factors>,
    ) {
        let normed = self.normed(rows);
        let mut queries = self.queries(&normed);
        if let Some(change) = change {
            change.add_to(&normed, &mut queries);
        }
        self.scale(&mut queries, base);
        let mut read = Buffer::stale(rows.len());
        let size = (rows.len() / batches).max(1);
        for (i, (queries, read)) in queries.chunks_exact(size).zip(read.chunks_exact_mut(size)).enumerate() {
            heads.attend(first + i, queries, read);
        }
        self.finish(rows, &read);
    }

    /// Adds what was read, then the feed-forward part.
    pub(super) fn finish(&self, rows: &mut [f32], read: &[f32]) {
        self.out.add_to(read, rows);
        let mut hidden = self.first.of(&self.norm2.of(rows));
        gelu(&mut hidden);
        self.second.add_to(&hidden, rows);
    }

    pub(super) fn bytes(&self) -> usize {
        let maps = [&self.query, &self.key_value, &self.out, &self.first, &self.second];
        maps.iter().map(|m| m.bytes()).sum::<usize>()
            + self.norm1.bytes()
            + self.norm2.bytes()
            + self.scaling.as_ref().map_or(0, Scaling::bytes)
    }
}

/// Positions of the even, then the odd features of each head among queries and keys, then the values' as they are:
/// the order that turns rotary neighbours into halves.
fn halves_order(width: usize, heads: usize) -> Vec<usize> {
    let head_dim = width / heads;
    let within = (0..head_dim).step_by(2).chain((1..head_dim).step_by(2));
    let turned = (0..2 * heads).flat_map(|head| within.clone().map(move |i| head * head_dim + i));
    turned.chain(2 * width..3 * width).collect()
}

/// Query scaling of the scalable softmax.
pub(super) struct Scaling {
    heads: usize,
    pub(super) head_dim: usize,
    base: Base,
    /// Network of the query, one output per feature or one in all.
    pub(super) query: Option<[Matrix; 2]>,
}

/// The part that depends on the number of context rows only.
enum Base {
    /// `s * ln n` per head.
    Heads(Vec<f32>),
    /// A network of `ln n`, one output per head or per feature.
    Network([Matrix; 2]),
}

impl Scaling {
    fn new(named: Named<'_>, name: &str, sizes: BlockSizes) -> Result<Option<Self>, TfmError> {
        let network = |part: &str| -> Result<[Matrix; 2], TfmError> {
            Ok([named.affine(&format!("{name}.{part}.0"))?, named.affine(&format!("{name}.{part}.2"))?])
        };
        let (base, query) = match sizes.ssmax {
            Ssmax::None => return Ok(None),
            Ssmax::Heads => (Base::Heads(named.values(&format!("{name}.scales"))?), None),
            Ssmax::Mlp | Ssmax::MlpElementwise => (Base::Network(network("mlp")?), None),
            Ssmax::QueryMlp | Ssmax::QueryMlpElementwise => {
                (Base::Network(network("base_mlp")?), Some(network("query_mlp")?))
            }
        };
        Ok(Some(Self { heads: sizes.heads, head_dim: sizes.width / sizes.heads, base, query }))
    }

    fn base(&self, context: usize) -> Vec<f32> {
        let size = (context.max(1) as f32).ln();
        let base = match &self.base {
            Base::Heads(scales) => scales.iter().map(|s| s * size).collect(),
            Base::Network(network) => run(network, &[size]).to_vec(),
        };
        if base.len() == self.heads * self.head_dim {
            return base;
        }
        base.into_iter().flat_map(|scale| std::iter::repeat_n(scale, self.head_dim)).collect()
    }

    fn apply(&self, queries: &mut [f32], base: &[f32]) {
        let Some(network) = &self.query else {
            for row in queries.chunks_exact_mut(base.len()) {
                row.iter_mut().zip(base).for_each(|(q, b)| *q *= b);
            }
            return;
        };
        let mut turned = run(network, queries);
        if network[1].output() != self.head_dim {
            turned = spread(&turned, self.head_dim);
        }
        gate(queries, &turned, base);
    }

    fn bytes(&self) -> usize {
        let of = |network: &[Matrix; 2]| network.iter().map(Matrix::bytes).sum::<usize>();
        let base = match &self.base {
            Base::Heads(scales) => size_of_val(scales.as_slice()),
            Base::Network(network) => of(network),
        };
        base + self.query.as_ref().map_or(0, of)
    }
}

/// Each number `times` times.
pub(super) fn spread(values: &[f32], times: usize) -> Buffer {
    let mut all = Buffer::stale(values.len() * times);
    all.chunks_exact_mut(times).zip(values).for_each(|(all, v)| all.fill(*v));
    all
}

fn run(network: &[Matrix; 2], x: &[f32]) -> Buffer {
    let mut hidden = network[0].of(x);
    gelu(&mut hidden);
    network[1].of(&hidden)
}
