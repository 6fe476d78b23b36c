//! Affine map `x W^T + b` over the last dimension as one operation, alone or added to a residual.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, backend::BackendStorage, bail};

use super::{rows_and_width, values, wanted, with_values};
use crate::simd::wide;

/// `x (.., in)`, `weight (out, in)`, `bias (out)` to `(.., out)`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, Linear)
}

/// `residual + x W^T + b`, for `x (.., in)`, `weight (out, in)`, `bias (out)` and `residual (.., out)`: the sum and its
/// two gradients take no tensors of their own.
pub(crate) fn linear_onto(residual: &Tensor, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (output, input) = weight.dims2()?;
    let weights = Tensor::cat(&[&weight.flatten_all()?, bias], 0)?;
    residual.contiguous()?.apply_op3(&x.contiguous()?, &weights, LinearOnto { output, input })
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

/// Sizes; the third operand holds weight and bias, end to end.
struct LinearOnto {
    output: usize,
    input: usize,
}

impl CustomOp3 for LinearOnto {
    fn name(&self) -> &'static str {
        "linear_onto"
    }

    fn cpu_fwd(
        &self,
        r: &CpuStorage,
        lr: &Layout,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, input) = rows_and_width(lx)?;
        let (residuals, output) = rows_and_width(lr)?;
        if (rows, input, output) != (residuals, self.input, self.output) {
            bail!("{rows} rows of {input} onto {residuals} of {output}: {} to {}", self.input, self.output)
        }
        let (residual, weights) = (values(r, lr)?, values(w, lw)?);
        let left = Layout::contiguous_with_offset((rows, input), lx.start_offset());
        let right = Layout::new((input, output).into(), vec![1, input], lw.start_offset());
        let mut product = x.matmul(w, (1, rows, output, input), &left, &right)?;
        if let CpuStorage::F32(out) = &mut product {
            add_rows_and_vector(out, residual, &weights[output * input..]);
        }
        Ok((product, lr.shape().clone()))
    }

    fn bwd(
        &self,
        residual: &Tensor,
        x: &Tensor,
        weights: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (output, input) = (self.output, self.input);
        let grad = grad.contiguous()?;
        let flat = grad.reshape(((), output))?;
        let weight = || weights.narrow(0, 0, output * input)?.reshape((output, input));
        let dx = if wanted(x) { Some(flat.matmul(&weight()?)?.reshape(x.shape())?) } else { None };
        let dw = if wanted(weights) {
            let dw = flat.t()?.matmul(&x.reshape(((), input))?)?.flatten_all()?;
            Some(Tensor::cat(&[&dw, &column_sums(&flat, output)?], 0)?)
        } else {
            None
        };
        Ok((if wanted(residual) { Some(grad) } else { None }, dx, dw))
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
    /// Adds other rows and a vector to each row.
    fn add_rows_and_vector(rows: &'a mut [f32], others: &'a [f32], vector: &'a [f32]) => add_rows_and_vector_loop
);

#[inline(always)]
fn add_rows_and_vector_loop<const FUSED: bool>(rows: &mut [f32], others: &[f32], vector: &[f32]) {
    for (row, other) in rows.chunks_exact_mut(vector.len()).zip(others.chunks_exact(vector.len())) {
        for ((r, o), v) in row.iter_mut().zip(other).zip(vector) {
            *r += o + v;
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{linear, linear_onto};
    use crate::ops::attention::tests::{check, noise};

    #[test]
    fn onto_a_residual_is_the_map_and_a_sum() {
        let (r, x, w, b) = (noise(1, &[2, 5, 6]), noise(2, &[2, 5, 4]), noise(3, &[6, 4]), noise(4, &[6]));
        let plain = (linear(&x, &w, &b).unwrap() + &r).unwrap();
        let got = linear_onto(&r, &x, &w, &b).unwrap();
        let gap = (got - plain).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(gap < 1e-6, "{gap}");
        assert!(linear_onto(&r.narrow(1, 0, 4).unwrap(), &x, &w, &b).is_err());
        check(&[r, x, w, b], |t| linear_onto(&t[0], &t[1], &t[2], &t[3]).unwrap());
    }
}
