//! Affine map `x W^T + b` over the last dimension, as one operation.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, backend::BackendStorage};

use super::{rows_and_width, values, wanted, with_values};
use crate::simd::wide;

/// `x (.., in)`, `weight (out, in)`, `bias (out)` to `(.., out)`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Linear)
}

struct Linear;

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, input) = rows_and_width(lx)?;
        let (output, _) = lw.shape().dims2()?;
        let bias = values(b, lb)?;
        let left = Layout::contiguous_with_offset((rows, input), lx.start_offset());
        let right = Layout::new((input, output).into(), vec![1, input], lw.start_offset());
        let mut product = x.matmul(w, (1, rows, output, input), &left, &right)?;
        if let CpuStorage::F32(out) = &mut product {
            add_to_rows(out, bias);
        }
        let mut dims = lx.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = output;
        }
        Ok((product, dims.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (output, input) = w.dims2()?;
        let grad = grad.contiguous()?.reshape(((), output))?;
        let dx = if wanted(x) { Some(grad.matmul(w)?.reshape(x.shape())?) } else { None };
        let dw = if wanted(w) { Some(grad.t()?.matmul(&x.reshape(((), input))?)?) } else { None };
        let db = if wanted(b) { Some(column_sums(&grad, output)?) } else { None };
        Ok((dx, dw, db))
    }
}

/// Sums of the columns of a `(rows, width)` tensor.
pub(super) fn column_sums(grad: &Tensor, width: usize) -> Result<Tensor> {
    let sums = with_values(grad, |g| {
        let mut sums = vec![0f32; width];
        add_rows_to(&mut sums, g);
        Ok(sums)
    })?;
    Tensor::from_vec(sums, width, grad.device())
}

wide!(
    /// Adds a vector to each row.
    pub(super) fn add_to_rows(rows: &'a mut [f32], vector: &'a [f32]) => add_to_rows_loop
);

#[inline(always)]
fn add_to_rows_loop<const FUSED: bool>(rows: &mut [f32], vector: &[f32]) {
    for row in rows.chunks_exact_mut(vector.len()) {
        for (r, v) in row.iter_mut().zip(vector) {
            *r += v;
        }
    }
}

wide!(
    /// Adds each row to a vector.
    pub(super) fn add_rows_to(vector: &'a mut [f32], rows: &'a [f32]) => add_rows_to_loop
);

#[inline(always)]
fn add_rows_to_loop<const FUSED: bool>(vector: &mut [f32], rows: &[f32]) {
    for row in rows.chunks_exact(vector.len()) {
        for (v, r) in vector.iter_mut().zip(row) {
            *v += r;
        }
    }
}
