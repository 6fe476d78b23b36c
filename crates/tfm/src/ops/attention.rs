//! Multi-head attention core `softmax(Q K^T / sqrt(head_dim)) V` on interleaved heads, without transposed copies.
//!
//! Few keys (cells of a row, inducing points) and few queries (inducing points that read a column) run in register loops;
//! long sequences (rows of a table) in blocked products. Probabilities are computed again in the backward pass, so that
//! nothing of size `queries x keys` is kept, unless that is little.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, backend::BackendStorage, bail};

use super::{
    lanes,
    math::{dot, softmax},
    values, wanted, with_values,
};
use crate::simd::{fused, wide};

/// Attends from `q (batch or 1, queries, d)` to `kv (batch, keys, 2 d)` (keys, then values, side by side).
///
/// A `q` of batch 1 is shared by all batches. Returns `(batch, queries, d)`.
pub(crate) fn attention(q: &Tensor, kv: &Tensor, heads: usize) -> Result<Tensor> {
    let sizes = Sizes::of(q.dims(), kv.dims(), heads)?;
    let kept = (wanted(q) || wanted(kv)) && sizes.kernel() == Kernel::Products && sizes.scores() <= MOST_KEPT;
    let kept = kept.then(OnceLock::new);
    q.contiguous()?.apply_op2(&kv.contiguous()?, Attention { heads, kept })
}

struct Attention {
    heads: usize,
    /// Probabilities `(rows, keys)` of each batch, block of queries and head, from the forward pass for the backward pass.
    kept: Option<OnceLock<Vec<CpuStorage>>>,
}

/// Sizes of one call.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) shared_query: bool,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) width: usize,
    pub(super) heads: usize,
}

impl Sizes {
    fn of(q: &[usize], kv: &[usize], heads: usize) -> Result<Self> {
        let (&[query_batch, queries, width], &[batch, keys, double]) = (q, kv) else {
            bail!("attention needs rank-3 operands, got {q:?} and {kv:?}")
        };
        if double != 2 * width || width % heads != 0 || (query_batch != batch && query_batch != 1) {
            bail!("attention operands don't fit: q {q:?}, kv {kv:?}, {heads} heads")
        }
        Ok(Self { batch, shared_query: query_batch != batch, queries, keys, width, heads })
    }

    fn scores(self) -> usize {
        self.batch * self.heads * self.queries * self.keys
    }

    fn head_dim(self) -> usize {
        self.width / self.heads
    }

    pub(super) fn scale(self) -> f32 {
        1.0 / (self.head_dim() as f32).sqrt()
    }

    pub(super) fn query_start(self, batch: usize) -> usize {
        if self.shared_query { 0 } else { batch * self.queries * self.width }
    }

    fn kernel(self) -> Kernel {
        if self.head_dim() == 64 && self.queries < LONE_QUERIES {
            Kernel::FewQueries
        } else if !matches!(self.head_dim(), 4 | 8 | 16 | 32) {
            Kernel::Products
        } else if self.keys <= lanes::MAX_KEYS && self.head_dim().is_multiple_of(lanes::LANES) {
            Kernel::FewKeys
        } else if self.queries >= BLOCKED_FROM {
            Kernel::Products
        } else {
            Kernel::FewQueries
        }
    }
}

/// Which loops a call runs in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernel {
    /// Eight queries side by side, for cells of a row and inducing points as keys.
    FewKeys,
    /// Loops over keys, for inducing points as queries.
    FewQueries,
    /// Blocked matrix products, for rows of a table.
    Products,
}

impl CustomOp2 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        kv: &CpuStorage,
        lkv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = Sizes::of(lq.dims(), lkv.dims(), self.heads)?;
        let mut out = vec![0f32; sizes.batch * sizes.queries * sizes.width];
        if sizes.kernel() == Kernel::Products {
            let (q, kv) = ((q, lq.start_offset()), (kv, lkv.start_offset()));
            let mut kept = self.kept.as_ref().map(|_| Vec::new());
            blocked::forward(sizes, q, kv, &mut out, kept.as_mut())?;
            if let (Some(place), Some(kept)) = (&self.kept, kept) {
                place.get_or_init(|| kept);
            }
        } else {
            let few_keys = sizes.kernel() == Kernel::FewKeys;
            let (q, kv) = (values(q, lq)?, values(kv, lkv)?);
            match (sizes.head_dim(), few_keys) {
                (8, true) => lanes::forward::<8>(sizes, q, kv, &mut out),
                (16, true) => lanes::forward::<16>(sizes, q, kv, &mut out),
                (_, true) => lanes::forward::<32>(sizes, q, kv, &mut out),
                (4, false) => small_forward::<4>(sizes, q, kv, &mut out),
                (8, false) => small_forward::<8>(sizes, q, kv, &mut out),
                (16, false) => small_forward::<16>(sizes, q, kv, &mut out),
                (64, false) => small_forward::<64>(sizes, q, kv, &mut out),
                (_, false) => small_forward::<32>(sizes, q, kv, &mut out),
            }
        }
        Ok((CpuStorage::F32(out), (sizes.batch, sizes.queries, sizes.width).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        kv: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let sizes = Sizes::of(q.dims(), kv.dims(), self.heads)?;
        let grad = grad.contiguous()?;
        let want_kv = wanted(kv);
        let mut dq = vec![0f32; q.elem_count()];
        let mut dkv = vec![0f32; if want_kv { kv.elem_count() } else { 0 }];
        if sizes.kernel() == Kernel::Products {
            let kept = self.kept.as_ref().and_then(OnceLock::get).map(Vec::as_slice);
            blocked::backward(sizes, (q, kv, &grad), kept, &mut dq, want_kv.then_some(&mut dkv))?;
        } else {
            with_values(q, |q| {
                with_values(kv, |kv| {
                    with_values(&grad, |g| {
                        let dkv = want_kv.then_some(dkv.as_mut_slice());
                        match (sizes.head_dim(), sizes.kernel() == Kernel::FewKeys) {
                            (8, true) => lanes::backward::<8>(sizes, q, kv, g, &mut dq, dkv),
                            (16, true) => lanes::backward::<16>(sizes, q, kv, g, &mut dq, dkv),
                            (_, true) => lanes::backward::<32>(sizes, q, kv, g, &mut dq, dkv),
                            (4, false) => small_backward::<4>(sizes, q, kv, g, &mut dq, dkv),
                            (8, false) => small_backward::<8>(sizes, q, kv, g, &mut dq, dkv),
                            (16, false) => small_backward::<16>(sizes, q, kv, g, &mut dq, dkv),
                            (64, false) => small_backward::<64>(sizes, q, kv, g, &mut dq, dkv),
                            (_, false) => small_backward::<32>(sizes, q, kv, g, &mut dq, dkv),
                        }
                        Ok(())
                    })
                })
            })?;
        }
        let dq = if wanted(q) { Some(Tensor::from_vec(dq, q.shape(), q.device())?) } else { None };
        let dkv = if want_kv { Some(Tensor::from_vec(dkv, kv.shape(), kv.device())?) } else { None };
        Ok((dq, dkv))
    }
}

/// `HD` consecutive values as an array.
#[inline(always)]
pub(super) fn lane<const HD: usize>(values: &[f32], at: usize) -> [f32; HD] {
    let mut lane = [0f32; HD];
    lane.copy_from_slice(&values[at..at + HD]);
    lane
}

/// Copies `keys` vectors of one head, `stride` apart, into `(HD, keys)` order.
#[inline(always)]
fn transpose<const HD: usize>(source: &[f32], start: usize, stride: usize, keys: usize, into: &mut [f32]) {
    for j in 0..keys {
        let vector = lane::<HD>(source, start + j * stride);
        for (d, v) in vector.iter().enumerate() {
            into[d * keys + j] = *v;
        }
    }
}

/// `out[j] = sum_d vector[d] * transposed[d][j]`.
#[inline(always)]
fn project<const FUSED: bool, const HD: usize>(vector: &[f32; HD], transposed: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (v, row) in vector.iter().zip(transposed.chunks_exact(out.len())) {
        for (o, k) in out.iter_mut().zip(row) {
            *o = fused::<FUSED>(*v, *k, *o);
        }
    }
}

/// `out[j] = vector . key j`, keys where they lie: for so few queries that turning all keys would cost more.
#[inline(always)]
fn project_in_place<const FUSED: bool, const HD: usize>(
    vector: &[f32; HD],
    kv: &[f32],
    start: usize,
    stride: usize,
    out: &mut [f32],
) {
    for (o, row) in out.iter_mut().zip(kv.chunks_exact(stride)) {
        let key = lane::<HD>(row, start);
        let mut sums = [0f32; PARTS];
        for (v, k) in vector.chunks_exact(PARTS).zip(key.chunks_exact(PARTS)) {
            for (sum, (v, k)) in sums.iter_mut().zip(v.iter().zip(k)) {
                *sum = fused::<FUSED>(*v, *k, *sum);
            }
        }
        *o = sums.iter().sum();
    }
}

wide!(fn small_forward<const HD>(s: Sizes, q: &'a [f32], kv: &'a [f32], out: &'a mut [f32]) => small_forward_loop);

#[inline(always)]
fn small_forward_loop<const FUSED: bool, const HD: usize>(s: Sizes, q: &[f32], kv: &[f32], out: &mut [f32]) {
    let (scale, stride) = (s.scale(), 2 * s.width);
    let lone = s.queries < LONE_QUERIES;
    let mut keys = vec![0f32; if lone { 0 } else { HD * s.keys }];
    let mut scores = vec![0f32; s.keys];
    for b in 0..s.batch {
        let kv = &kv[b * s.keys * stride..][..s.keys * stride];
        let q = &q[s.query_start(b)..][..s.queries * s.width];
        let out = &mut out[b * s.queries * s.width..][..s.queries * s.width];
        for h in 0..s.heads {
            if !lone {
                transpose::<HD>(kv, h * HD, stride, s.keys, &mut keys);
            }
            for i in 0..s.queries {
                let at = i * s.width + h * HD;
                if lone {
                    project_in_place::<FUSED, HD>(&lane(q, at), kv, h * HD, stride, &mut scores);
                } else {
                    project::<FUSED, HD>(&lane(q, at), &keys, &mut scores);
                }
                softmax::<FUSED>(&mut scores, scale);
                let mut sum = [0f32; HD];
                for (p, row) in scores.iter().zip(kv.chunks_exact(stride)) {
                    let v = lane::<HD>(row, s.width + h * HD);
                    for (a, v) in sum.iter_mut().zip(&v) {
                        *a = fused::<FUSED>(*p, *v, *a);
                    }
                }
                out[at..at + HD].copy_from_slice(&sum);
            }
        }
    }
}

wide!(
    fn small_backward<const HD>(
        s: Sizes,
        q: &'a [f32],
        kv: &'a [f32],
        grad: &'a [f32],
        dq: &'a mut [f32],
        dkv: Option<&'a mut [f32]>,
    ) => small_backward_loop
);

#[inline(always)]
fn small_backward_loop<const FUSED: bool, const HD: usize>(
    s: Sizes,
    q: &[f32],
    kv: &[f32],
    grad: &[f32],
    dq: &mut [f32],
    mut dkv: Option<&mut [f32]>,
) {
    let (scale, stride) = (s.scale(), 2 * s.width);
    let (mut keys, mut vals) = (vec![0f32; HD * s.keys], vec![0f32; HD * s.keys]);
    let (mut p, mut ds) = (vec![0f32; s.keys], vec![0f32; s.keys]);
    for b in 0..s.batch {
        let kv = &kv[b * s.keys * stride..][..s.keys * stride];
        let q_start = s.query_start(b);
        let g_start = b * s.queries * s.width;
        for h in 0..s.heads {
            transpose::<HD>(kv, h * HD, stride, s.keys, &mut keys);
            transpose::<HD>(kv, s.width + h * HD, stride, s.keys, &mut vals);
            for i in 0..s.queries {
                let at = i * s.width + h * HD;
                let query = lane::<HD>(q, q_start + at);
                let out_grad = lane::<HD>(grad, g_start + at);
                project::<FUSED, HD>(&query, &keys, &mut p);
                softmax::<FUSED>(&mut p, scale);
                project::<FUSED, HD>(&out_grad, &vals, &mut ds);
                let mean = dot(&p, &ds);
                for (d, p) in ds.iter_mut().zip(&p) {
                    *d = p * (*d - mean) * scale;
                }
                let mut dquery = [0f32; HD];
                for (d, row) in ds.iter().zip(kv.chunks_exact(stride)) {
                    let k = lane::<HD>(row, h * HD);
                    for (a, k) in dquery.iter_mut().zip(&k) {
                        *a = fused::<FUSED>(*d, *k, *a);
                    }
                }
                for (a, d) in dq[q_start + at..][..HD].iter_mut().zip(&dquery) {
                    *a += d;
                }
                if let Some(dkv) = dkv.as_deref_mut() {
                    let rows = dkv[b * s.keys * stride..][..s.keys * stride].chunks_exact_mut(stride);
                    for ((row, d), p) in rows.zip(&ds).zip(&p) {
                        let (dk, dv) = row.split_at_mut(s.width);
                        for ((a, c), (q, g)) in dk[h * HD..][..HD]
                            .iter_mut()
                            .zip(&mut dv[h * HD..][..HD])
                            .zip(query.iter().zip(&out_grad))
                        {
                            *a = fused::<FUSED>(*d, *q, *a);
                            *c = fused::<FUSED>(*p, *g, *c);
                        }
                    }
                }
            }
        }
    }
}

wide!(
    /// Replaces rows of `width` scores by their softmax.
    fn softmax_rows(scores: &'a mut [f32], width: usize, scale: f32) => softmax_rows_loop
);

#[inline(always)]
fn softmax_rows_loop<const FUSED: bool>(scores: &mut [f32], width: usize, scale: f32) {
    for row in scores.chunks_exact_mut(width) {
        softmax::<FUSED>(row, scale);
    }
}

wide!(
    /// Turns gradients by probabilities, rows of `width`, into those by scores.
    fn softmax_slopes(gradients: &'a mut [f32], p: &'a [f32], width: usize, scale: f32) => softmax_slopes_loop
);

#[inline(always)]
fn softmax_slopes_loop<const FUSED: bool>(gradients: &mut [f32], p: &[f32], width: usize, scale: f32) {
    for (d, p) in gradients.chunks_exact_mut(width).zip(p.chunks_exact(width)) {
        let mean = dot(d, p);
        for (d, p) in d.iter_mut().zip(p) {
            *d = p * (*d - mean) * scale;
        }
    }
}

/// Attention over long sequences by matrix products, one batch, one block of queries and one head at a time: what is
/// worked on fits into the second-level cache.
mod blocked {
    use super::{
        super::with_values, BackendStorage, CpuStorage, Layout, Result, Sizes, Tensor, bail, softmax_rows,
        softmax_slopes,
    };

    /// `(1, rows, head_dim)` view of one of interleaved heads.
    fn rows_view(s: Sizes, rows: usize, row_stride: usize, start: usize) -> Layout {
        Layout::new((1, rows, s.head_dim()).into(), vec![0, row_stride, 1], start)
    }

    /// `(1, head_dim, rows)` view of one of interleaved heads.
    fn transposed_view(s: Sizes, rows: usize, row_stride: usize, start: usize) -> Layout {
        Layout::new((1, s.head_dim(), rows).into(), vec![0, 1, row_stride], start)
    }

    fn floats(storage: &mut CpuStorage) -> Result<&mut Vec<f32>> {
        match storage {
            CpuStorage::F32(v) => Ok(v),
            _ => bail!("product is not f32"),
        }
    }

    fn slice(storage: &CpuStorage) -> Result<&[f32]> {
        match storage {
            CpuStorage::F32(v) => Ok(v),
            _ => bail!("product is not f32"),
        }
    }

    /// Adds `(rows, head_dim)` values to one head of interleaved rows.
    fn scatter(s: Sizes, source: &[f32], row_stride: usize, into: &mut [f32]) {
        let hd = s.head_dim();
        for (i, vector) in source.chunks_exact(hd).enumerate() {
            for (o, v) in into[i * row_stride..][..hd].iter_mut().zip(vector) {
                *o += v;
            }
        }
    }

    /// First query and number of queries of each block, head by head.
    fn parts(s: Sizes) -> impl Iterator<Item = (usize, usize, usize)> {
        let blocks = (0..s.queries).step_by(QUERY_BLOCK).map(move |i| (i, QUERY_BLOCK.min(s.queries - i)));
        blocks.flat_map(move |(first, rows)| (0..s.heads).map(move |head| (first, rows, head)))
    }

    /// Probabilities `(rows, keys)` of one head, whose first feature is at these places.
    fn probabilities(
        s: Sizes,
        q: (&CpuStorage, usize),
        kv: (&CpuStorage, usize),
        rows: usize,
    ) -> Result<CpuStorage> {
        let mut p = q.0.matmul(
            kv.0,
            (1, rows, s.keys, s.head_dim()),
            &rows_view(s, rows, s.width, q.1),
            &transposed_view(s, s.keys, 2 * s.width, kv.1),
        )?;
        softmax_rows(floats(&mut p)?, s.keys, s.scale());
        Ok(p)
    }

    pub(super) fn forward(
        s: Sizes,
        q: (&CpuStorage, usize),
        kv: (&CpuStorage, usize),
        out: &mut [f32],
        mut kept: Option<&mut Vec<CpuStorage>>,
    ) -> Result<()> {
        let (hd, stride) = (s.head_dim(), 2 * s.width);
        for b in 0..s.batch {
            for (first, rows, head) in parts(s) {
                let at = head * hd;
                let kv_start = kv.1 + b * s.keys * stride + at;
                let q_start = q.1 + s.query_start(b) + first * s.width + at;
                let p = probabilities(s, (q.0, q_start), (kv.0, kv_start), rows)?;
                let mut o = p.matmul(
                    kv.0,
                    (1, rows, hd, s.keys),
                    &Layout::contiguous((1, rows, s.keys)),
                    &rows_view(s, s.keys, stride, kv_start + s.width),
                )?;
                scatter(s, floats(&mut o)?, s.width, &mut out[(b * s.queries + first) * s.width + at..]);
                if let Some(kept) = &mut kept {
                    kept.push(p);
                }
            }
        }
        Ok(())
    }

    /// Gradients of queries and, where wanted, of keys and values; `kept` are the forward pass's probabilities, if it
    /// kept them.
    pub(super) fn backward(
        s: Sizes,
        (q, kv, grad): (&Tensor, &Tensor, &Tensor),
        kept: Option<&[CpuStorage]>,
        dq: &mut [f32],
        mut dkv: Option<&mut Vec<f32>>,
    ) -> Result<()> {
        let (hd, stride) = (s.head_dim(), 2 * s.width);
        // Plain copies give storages that the products below can take slices of.
        let q = with_values(q, |v| Ok(CpuStorage::F32(v.to_vec())))?;
        let kv = with_values(kv, |v| Ok(CpuStorage::F32(v.to_vec())))?;
        let grad = with_values(grad, |v| Ok(CpuStorage::F32(v.to_vec())))?;
        let mut kept = kept.map(<[CpuStorage]>::iter);
        for b in 0..s.batch {
            for (first, rows, head) in parts(s) {
                let at = head * hd;
                let kv_start = b * s.keys * stride + at;
                let q_start = s.query_start(b) + first * s.width + at;
                let g_start = (b * s.queries + first) * s.width + at;
                let again;
                let p = match kept.as_mut().and_then(Iterator::next) {
                    Some(p) => p,
                    None => {
                        again = probabilities(s, (&q, q_start), (&kv, kv_start), rows)?;
                        &again
                    }
                };
                let mut ds = grad.matmul(
                    &kv,
                    (1, rows, s.keys, hd),
                    &rows_view(s, rows, s.width, g_start),
                    &transposed_view(s, s.keys, stride, kv_start + s.width),
                )?;
                softmax_slopes(floats(&mut ds)?, slice(p)?, s.keys, s.scale());
                let mut block = ds.matmul(
                    &kv,
                    (1, rows, hd, s.keys),
                    &Layout::contiguous((1, rows, s.keys)),
                    &rows_view(s, s.keys, stride, kv_start),
                )?;
                scatter(s, floats(&mut block)?, s.width, &mut dq[q_start..]);
                if let Some(dkv) = dkv.as_deref_mut() {
                    let turned = Layout::new((1, s.keys, rows).into(), vec![0, 1, s.keys], 0);
                    let size = (1, s.keys, hd, rows);
                    let mut dk = ds.matmul(&q, size, &turned, &rows_view(s, rows, s.width, q_start))?;
                    let mut dv = p.matmul(&grad, size, &turned, &rows_view(s, rows, s.width, g_start))?;
                    scatter(s, floats(&mut dk)?, stride, &mut dkv[kv_start..]);
                    scatter(s, floats(&mut dv)?, stride, &mut dkv[kv_start + s.width..]);
                }
            }
        }
        Ok(())
    }

    const QUERY_BLOCK: usize = 128;
}

/// Most probabilities that are kept between the passes: 4 MiB.
const MOST_KEPT: usize = 1 << 20;
const BLOCKED_FROM: usize = 24;
/// Queries below which keys stay where they lie.
const LONE_QUERIES: usize = 8;
/// Sums kept side by side in an inner product.
const PARTS: usize = 4;

#[cfg(test)]
pub(in crate::ops) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use candle_core::{Device, Tensor, Var};

    use super::{MOST_KEPT, attention};
    use crate::ops::{activation, linear::linear, norm::layer_norm, rope};

    /// Values of a fixed linear congruential sequence in `[-1, 1)`.
    pub(in crate::ops) fn noise(seed: u64, dims: &[usize]) -> Tensor {
        let mut state = seed;
        let count = dims.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32) / 8_388_608.0 - 1.0
            })
            .collect();
        Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
    }

    /// Compares the analytic gradient of `sum(f(inputs) * weights)` with central differences.
    pub(in crate::ops) fn check(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Tensor) {
        let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let out = f(&tensors);
        let weights = noise(99, out.dims());
        let grads = (&out * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        let objective = |inputs: &[Tensor]| -> f64 {
            let products: Vec<f32> =
                (f(inputs) * &weights).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            products.iter().map(|v| f64::from(*v)).sum()
        };
        for (k, var) in vars.iter().enumerate() {
            let analytic: Vec<f32> = grads.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let base: Vec<f32> = inputs[k].flatten_all().unwrap().to_vec1().unwrap();
            for at in (0..base.len()).step_by(1 + base.len() / 13) {
                let shifted = |by: f32| {
                    let mut v = base.clone();
                    v[at] += by;
                    let mut all: Vec<Tensor> = inputs.to_vec();
                    all[k] = Tensor::from_vec(v, inputs[k].dims(), &Device::Cpu).unwrap();
                    objective(&all)
                };
                let numeric = (shifted(0.01) - shifted(-0.01)) / 0.02;
                let error = (numeric - f64::from(analytic[at])).abs();
                assert!(
                    error < 2e-3 * (1.0 + numeric.abs()),
                    "input {k} at {at}: {numeric} {}",
                    analytic[at]
                );
            }
        }
    }

    #[test]
    fn gradients_match_central_differences() {
        check(&[noise(1, &[3, 5, 16]), noise(2, &[3, 7, 32])], |t| attention(&t[0], &t[1], 2).unwrap());
        check(&[noise(3, &[1, 5, 16]), noise(4, &[3, 7, 32])], |t| attention(&t[0], &t[1], 4).unwrap());
        check(&[noise(3, &[1, 5, 16]), noise(4, &[2, 70, 32])], |t| attention(&t[0], &t[1], 2).unwrap());
        check(&[noise(3, &[2, 11, 16]), noise(4, &[2, 9, 32])], |t| attention(&t[0], &t[1], 1).unwrap());
        check(&[noise(5, &[2, 30, 8]), noise(6, &[2, 70, 16])], |t| attention(&t[0], &t[1], 2).unwrap());
        check(&[noise(5, &[2, 140, 24]), noise(6, &[2, 30, 48])], |t| attention(&t[0], &t[1], 2).unwrap());
        check(&[noise(5, &[1, 2, 64]), noise(6, &[2, 70, 128])], |t| attention(&t[0], &t[1], 1).unwrap());
        check(&[noise(7, &[6, 5]), noise(8, &[4, 5]), noise(9, &[4])], |t| {
            linear(&t[0], &t[1], &t[2]).unwrap()
        });
        check(&[noise(10, &[6, 12]), noise(11, &[12]), noise(12, &[12])], |t| {
            layer_norm(&t[0], &t[1], &t[2]).unwrap()
        });
        check(&[noise(13, &[6, 12]), noise(14, &[6, 12]), noise(15, &[12])], |t| {
            activation::gate(&t[0], &t[1], &t[2]).unwrap()
        });
        check(&[(noise(16, &[40]) * 3.0).unwrap()], |t| activation::gelu(&t[0]).unwrap());
        check(&[noise(17, &[2, 5, 12])], |t| rope::rotate(&t[0], 2, &[1.0, 0.1]).unwrap());
    }

    /// Two batches are too much to keep, each alone isn't: gradients are the same to the last bit.
    #[test]
    fn kept_and_recomputed_probabilities_give_equal_gradients() {
        let (queries, keys) = (600, 450);
        assert!((2 * 2 * queries * keys) > MOST_KEPT && 2 * queries * keys <= MOST_KEPT);
        let (q, kv) = (noise(30, &[2, queries, 24]), noise(31, &[2, keys, 48]));
        let weights = noise(32, &[2, queries, 24]);
        let gradients = |first: usize, count: usize| -> Vec<Vec<f32>> {
            let of = |t: &Tensor| t.narrow(0, first, count).unwrap().contiguous().unwrap();
            let vars = [Var::from_tensor(&of(&q)).unwrap(), Var::from_tensor(&of(&kv)).unwrap()];
            let out = attention(vars[0].as_tensor(), vars[1].as_tensor(), 2).unwrap();
            let grads = (out * of(&weights)).unwrap().sum_all().unwrap().backward().unwrap();
            vars.iter().map(|var| grads.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap()).collect()
        };
        let (both, alone) = (gradients(0, 2), [gradients(0, 1), gradients(1, 1)]);
        for (i, both) in both.iter().enumerate() {
            assert_eq!(both, &[alone[0][i].clone(), alone[1][i].clone()].concat());
        }
    }

    /// All kernels against the textbook formula built from basic operations.
    #[test]
    fn all_kernels_match_basic_operations() {
        for (queries, keys) in [(5, 7), (19, 64), (5, 65), (40, 90)] {
            let (q, kv) = (noise(20, &[2, queries, 16]), noise(21, &[2, keys, 32]));
            let fused = attention(&q, &kv, 2).unwrap();
            let split = |t: &Tensor, rows: usize| {
                t.contiguous()
                    .unwrap()
                    .reshape((2, rows, 2, 8))
                    .unwrap()
                    .transpose(1, 2)
                    .unwrap()
                    .contiguous()
            };
            let k = split(&kv.narrow(2, 0, 16).unwrap(), keys).unwrap();
            let v = split(&kv.narrow(2, 16, 16).unwrap(), keys).unwrap();
            let q = split(&q, queries).unwrap();
            let scores = (q.matmul(&k.t().unwrap()).unwrap() / 8f64.sqrt()).unwrap();
            let plain = candle_nn::ops::softmax(&scores, 3).unwrap().matmul(&v).unwrap();
            let plain = plain.transpose(1, 2).unwrap().reshape((2, queries, 16)).unwrap();
            let gap = (fused - plain).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(gap < 1e-5, "{gap}");
        }
    }
}
