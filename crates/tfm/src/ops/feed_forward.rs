//! Norm, two-layer perceptron and residual as one operation: `x + W2 gelu(W1 norm(x) + b1) + b2`.
//!
//! Rows are worked on in tiles that stay in the processor's cache. Only the output is kept: the hidden layer is
//! computed again in the backward pass, which costs one product of seven and saves writing and reading every
//! intermediate tensor, its gradient and the sums of those gradients.

use candle_core::{
    CpuStorage, CustomOp2, Layout, Result, Shape, Storage, Tensor, backend::BackendStorage, bail,
};

use super::{
    activation::{activate, gelu_in_place, multiply},
    linear::{add_rows_to, add_to_rows},
    norm::{add_row_gradients, standardise},
    rows_and_width, values, wanted,
};
use crate::simd::wide;

/// Applies the block to `x (.., width)`: `norm` is gain and bias `(width)`, `first` weight `(hidden, width)` and bias,
/// `second` weight `(width, hidden)` and bias.
pub(crate) fn feed_forward(
    x: &Tensor,
    norm: &(Tensor, Tensor),
    first: &(Tensor, Tensor),
    second: &(Tensor, Tensor),
) -> Result<Tensor> {
    let (hidden, width) = first.0.dims2()?;
    let parts = [&norm.0, &norm.1, &first.0, &first.1, &second.0, &second.1];
    let flat = parts.iter().map(|t| t.flatten_all()).collect::<Result<Vec<_>>>()?;
    x.contiguous()?.apply_op2(&Tensor::cat(&flat, 0)?, FeedForward { width, hidden })
}

/// Sizes; the second operand holds gain, bias, `W1`, `b1`, `W2`, `b2`, end to end.
#[derive(Clone, Copy)]
struct FeedForward {
    width: usize,
    hidden: usize,
}

impl FeedForward {
    fn bias(self) -> usize {
        self.width
    }

    fn first(self) -> usize {
        2 * self.width
    }

    fn first_bias(self) -> usize {
        self.first() + self.width * self.hidden
    }

    fn second(self) -> usize {
        self.first_bias() + self.hidden
    }

    fn second_bias(self) -> usize {
        self.second() + self.width * self.hidden
    }

    /// Rows of a tile whose hidden layer takes about [`TILE_VALUES`].
    fn tile(self) -> usize {
        (TILE_VALUES / self.hidden).max(16)
    }

    /// Standardised and normed rows.
    fn norm(self, rows: &[f32], weights: &[f32]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (gain, bias) = (&weights[..self.width], &weights[self.bias()..self.first()]);
        let (mut hat, mut normed) = (vec![0f32; rows.len()], vec![0f32; rows.len()]);
        let mut inverses = vec![0f32; rows.len() / self.width];
        standardise(rows, (gain, bias), &mut hat, &mut normed, &mut inverses);
        (hat, normed, inverses)
    }

    /// Hidden layer before the activation, bias included.
    fn hidden(self, normed: &CpuStorage, weights: (&CpuStorage, usize), rows: usize) -> Result<Vec<f32>> {
        let turned =
            Layout::new((self.width, self.hidden).into(), vec![1, self.width], weights.1 + self.first());
        let size = (1, rows, self.hidden, self.width);
        let plain = Layout::contiguous((rows, self.width));
        let mut hidden = floats(normed.matmul(weights.0, size, &plain, &turned)?)?;
        let start = weights.1 + self.first_bias();
        let bias = &slice(weights.0)?[start..start + self.hidden];
        add_to_rows(&mut hidden, bias);
        Ok(hidden)
    }
}

fn floats(storage: CpuStorage) -> Result<Vec<f32>> {
    match storage {
        CpuStorage::F32(values) => Ok(values),
        _ => bail!("product is not f32"),
    }
}

fn slice(storage: &CpuStorage) -> Result<&[f32]> {
    match storage {
        CpuStorage::F32(values) => Ok(values),
        _ => bail!("operand is not f32"),
    }
}

fn add_to(sums: &mut [f32], values: &[f32]) {
    for (s, v) in sums.iter_mut().zip(values) {
        *s += v;
    }
}

impl CustomOp2 for FeedForward {
    fn name(&self) -> &'static str {
        "feed_forward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = rows_and_width(lx)?;
        if width != self.width {
            bail!("feed-forward of width {} got rows of width {width}", self.width)
        }
        let (x, weights, start) = (values(x, lx)?, values(w, lw)?, lw.start_offset());
        let last_bias = &weights[self.second_bias()..];
        let turned = Layout::new((self.hidden, width).into(), vec![1, self.hidden], start + self.second());
        let mut out = Vec::with_capacity(x.len());
        for rows in x.chunks(self.tile() * width) {
            let count = rows.len() / width;
            let normed = CpuStorage::F32(self.norm(rows, weights).1);
            let mut hidden = self.hidden(&normed, (w, start), count)?;
            gelu_in_place(&mut hidden);
            let size = (1, count, width, self.hidden);
            let plain = Layout::contiguous((count, self.hidden));
            let read = floats(CpuStorage::F32(hidden).matmul(w, size, &plain, &turned)?)?;
            let from = out.len();
            out.extend_from_slice(rows);
            add_both(&mut out[from..], &read, last_bias);
        }
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weights: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let ((xs, lx), (ws, lw), (gs, lg)) =
            (x.storage_and_layout(), weights.storage_and_layout(), grad.storage_and_layout());
        let (Storage::Cpu(xs), Storage::Cpu(ws), Storage::Cpu(gs)) = (&*xs, &*ws, &*gs) else {
            bail!("operand is not on the cpu")
        };
        let wanted = (wanted(x), wanted(weights));
        let (dx, dw) = self.backward((xs, lx), (ws, lw), (gs, lg), wanted)?;
        let dx = if wanted.0 { Some(Tensor::from_vec(dx, x.shape(), x.device())?) } else { None };
        let dw = if wanted.1 { Some(Tensor::from_vec(dw, weights.shape(), x.device())?) } else { None };
        Ok((dx, dw))
    }
}

type Operand<'a> = (&'a CpuStorage, &'a Layout);

impl FeedForward {
    /// Gradients of the rows and of the weights, each empty if not wanted.
    fn backward(
        self,
        x: Operand<'_>,
        w: Operand<'_>,
        grad: Operand<'_>,
        (want_rows, want_weights): (bool, bool),
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let (width, hidden) = (self.width, self.hidden);
        let (xs, weights, gs) = (values(x.0, x.1)?, values(w.0, w.1)?, values(grad.0, grad.1)?);
        let start = w.1.start_offset();
        let mut dx = Vec::with_capacity(if want_rows { xs.len() } else { 0 });
        let mut dw = vec![0f32; if want_weights { weights.len() } else { 0 }];
        let mut at = grad.1.start_offset();
        for (rows, gradient) in xs.chunks(self.tile() * width).zip(gs.chunks(self.tile() * width)) {
            let count = rows.len() / width;
            let (narrow, wide) = (Layout::contiguous((count, width)), Layout::contiguous((count, hidden)));
            let (hat, normed, inverses) = self.norm(rows, weights);
            let normed = CpuStorage::F32(normed);
            let mut slopes = self.hidden(&normed, (w.0, start), count)?;
            let mut active = vec![0f32; slopes.len()];
            activate(&mut slopes, &mut active);
            let back = Layout::contiguous_with_offset((width, hidden), start + self.second());
            let incoming = Layout::contiguous_with_offset((count, width), at);
            let mut dhidden = floats(grad.0.matmul(w.0, (1, count, hidden, width), &incoming, &back)?)?;
            multiply(&mut dhidden, &slopes);
            let active = CpuStorage::F32(active);
            if want_weights {
                let turned = Layout::new((width, count).into(), vec![1, width], at);
                let part = floats(grad.0.matmul(&active, (1, width, hidden, count), &turned, &wide)?)?;
                add_to(&mut dw[self.second()..], &part);
                add_rows_to(&mut dw[self.second_bias()..], gradient);
                add_rows_to(&mut dw[self.first_bias()..self.second()], &dhidden);
            }
            let dhidden = CpuStorage::F32(dhidden);
            if want_weights {
                let turned = Layout::new((hidden, count).into(), vec![1, hidden], 0);
                let part = floats(dhidden.matmul(&normed, (1, hidden, width, count), &turned, &narrow)?)?;
                add_to(&mut dw[self.first()..self.first_bias()], &part);
            }
            let back = Layout::contiguous_with_offset((hidden, width), start + self.first());
            let dnormed = floats(dhidden.matmul(w.0, (1, count, width, hidden), &wide, &back)?)?;
            if want_weights {
                let (dgain, dbias) = dw[..2 * width].split_at_mut(width);
                add_affine(dgain, dbias, &dnormed, &hat);
            }
            if want_rows {
                let from = dx.len();
                dx.extend_from_slice(gradient);
                add_row_gradients(&mut dx[from..], &dnormed, &hat, &inverses, &weights[..width]);
            }
            at += rows.len();
        }
        Ok((dx, dw))
    }
}

wide!(
    /// Adds what was read, and a bias, to rows.
    fn add_both(rows: &'a mut [f32], read: &'a [f32], bias: &'a [f32]) => add_both_loop
);

#[inline(always)]
fn add_both_loop<const FUSED: bool>(rows: &mut [f32], read: &[f32], bias: &[f32]) {
    for (row, read) in rows.chunks_exact_mut(bias.len()).zip(read.chunks_exact(bias.len())) {
        for ((x, r), b) in row.iter_mut().zip(read).zip(bias) {
            *x = *x + r + b;
        }
    }
}

wide!(
    /// Adds the gradients of gain and bias.
    fn add_affine(dgain: &'a mut [f32], dbias: &'a mut [f32], dnormed: &'a [f32], hat: &'a [f32]) => add_affine_loop
);

#[inline(always)]
fn add_affine_loop<const FUSED: bool>(dgain: &mut [f32], dbias: &mut [f32], dnormed: &[f32], hat: &[f32]) {
    let width = dgain.len();
    for (dn, hat) in dnormed.chunks_exact(width).zip(hat.chunks_exact(width)) {
        for (((dg, db), d), h) in dgain.iter_mut().zip(dbias.iter_mut()).zip(dn).zip(hat) {
            *dg += d * h;
            *db += d;
        }
    }
}

/// Hidden values of a tile: with their slopes and gradients about half of a second-level cache.
const TILE_VALUES: usize = 24_576;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use candle_core::Tensor;

    use super::feed_forward;
    use crate::ops::{
        activation::gelu,
        attention::tests::{check, noise},
        linear::linear,
        norm::layer_norm,
    };

    type Pairs = [(Tensor, Tensor); 3];

    fn weights(width: usize, hidden: usize) -> Pairs {
        [
            ((noise(2, &[width]) + 1.0).unwrap(), noise(3, &[width])),
            (noise(4, &[hidden, width]), noise(5, &[hidden])),
            (noise(6, &[width, hidden]), noise(7, &[width])),
        ]
    }

    /// Against the same block from single operations, over more rows than one tile holds.
    #[test]
    fn equals_single_operations() {
        for (rows, width, hidden) in [(3, 8, 16), (1100, 16, 48)] {
            let x = noise(1, &[1, rows, width]);
            let [norm, first, second] = weights(width, hidden);
            let got = feed_forward(&x, &norm, &first, &second).unwrap();
            let inner =
                gelu(&linear(&layer_norm(&x, &norm.0, &norm.1).unwrap(), &first.0, &first.1).unwrap());
            let plain = (linear(&inner.unwrap(), &second.0, &second.1).unwrap() + &x).unwrap();
            let gap = (got - plain).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(gap < 2e-5, "{rows} rows: {gap}");
        }
    }

    #[test]
    fn gradients_match_central_differences() {
        let [norm, first, second] = weights(6, 10);
        let inputs = [noise(1, &[2, 3, 6]), norm.0, norm.1, first.0, first.1, second.0, second.1];
        check(&inputs, |t| {
            let pair = |i: usize| (t[i].clone(), t[i + 1].clone());
            feed_forward(&t[0], &pair(1), &pair(3), &pair(5)).unwrap()
        });
    }
}
