//! Layer normalisation over the last dimension with gain and bias, `eps = 1e-5`.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::{
    math::{dot, sum},
    rows_and_width, values, wanted, with_values,
};
use crate::simd::wide;

/// `(x - mean) / sqrt(var + eps) * gain + bias` over the last dimension of `x`.
pub(crate) fn layer_norm(x: &Tensor, gain: &Tensor, bias: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op3(gain, bias, LayerNorm)
}

struct LayerNorm;

/// Mean and inverse deviation of one row.
#[inline(always)]
fn moments(row: &[f32]) -> (f32, f32) {
    let width = row.len() as f32;
    let mean = sum(row) / width;
    let mut lanes = [0f32; 8];
    let (chunks, rest) = row.as_chunks::<8>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += (v - mean) * (v - mean);
        }
    }
    let tail: f32 = rest.iter().map(|v| (v - mean) * (v - mean)).sum();
    let var = (lanes.iter().sum::<f32>() + tail) / width;
    (mean, 1.0 / (var + EPS).sqrt())
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        g: &CpuStorage,
        lg: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = rows_and_width(lx)?;
        let (x, gain, bias) = (values(x, lx)?, values(g, lg)?, values(b, lb)?);
        let mut out = vec![0f32; x.len()];
        forward(x, width, gain, bias, &mut out);
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        bias: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let width = gain.dim(0)?;
        let grad = grad.contiguous()?;
        let (want_x, want_affine) = (wanted(x), wanted(gain) || wanted(bias));
        let mut dx = vec![0f32; if want_x { x.elem_count() } else { 0 }];
        let (mut dgain, mut dbias) = (vec![0f32; width], vec![0f32; width]);
        with_values(x, |xs| {
            with_values(&grad, |gs| {
                with_values(gain, |gain| {
                    let affine = want_affine.then_some((&mut dgain[..], &mut dbias[..]));
                    backward(xs, gs, gain, want_x.then_some(&mut dx[..]), affine);
                    Ok(())
                })
            })
        })?;
        let device = x.device();
        let dx = if want_x { Some(Tensor::from_vec(dx, x.shape(), device)?) } else { None };
        let dg = if wanted(gain) { Some(Tensor::from_vec(dgain, width, device)?) } else { None };
        let db = if wanted(bias) { Some(Tensor::from_vec(dbias, width, device)?) } else { None };
        Ok((dx, dg, db))
    }
}

wide!(fn forward(x: &'a [f32], width: usize, gain: &'a [f32], bias: &'a [f32], out: &'a mut [f32]) => forward_loop);

#[inline(always)]
fn forward_loop<const FUSED: bool>(x: &[f32], width: usize, gain: &[f32], bias: &[f32], out: &mut [f32]) {
    for (row, to) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let (mean, inverse) = moments(row);
        for (((o, v), g), b) in to.iter_mut().zip(row).zip(gain).zip(bias) {
            *o = (v - mean) * inverse * g + b;
        }
    }
}

wide!(
    /// Gradients of rows, and of gain and bias, where wanted.
    fn backward(
        x: &'a [f32],
        grad: &'a [f32],
        gain: &'a [f32],
        dx: Option<&'a mut [f32]>,
        affine: Option<(&'a mut [f32], &'a mut [f32])>,
    ) => backward_loop
);

#[inline(always)]
fn backward_loop<const FUSED: bool>(
    x: &[f32],
    grad: &[f32],
    gain: &[f32],
    mut dx: Option<&mut [f32]>,
    mut affine: Option<(&mut [f32], &mut [f32])>,
) {
    let width = gain.len();
    let (mut hat, mut scaled) = (vec![0f32; width], vec![0f32; width]);
    for (i, (row, gr)) in x.chunks_exact(width).zip(grad.chunks_exact(width)).enumerate() {
        let (mean, inverse) = moments(row);
        for (((h, s), (v, g)), w) in hat.iter_mut().zip(scaled.iter_mut()).zip(row.iter().zip(gr)).zip(gain) {
            *h = (v - mean) * inverse;
            *s = g * w;
        }
        if let Some((dgain, dbias)) = &mut affine {
            for (((dg, db), g), h) in dgain.iter_mut().zip(dbias.iter_mut()).zip(gr).zip(&hat) {
                *dg += g * h;
                *db += g;
            }
        }
        if let Some(dx) = &mut dx {
            let n = width as f32;
            let (a, c) = (sum(&scaled) / n, dot(&scaled, &hat) / n);
            let to = &mut dx[i * width..(i + 1) * width];
            for ((o, s), h) in to.iter_mut().zip(&scaled).zip(&hat) {
                *o = (s - a - h * c) * inverse;
            }
        }
    }
}

wide!(
    /// Standardised and normed rows, and the inverse deviation of each.
    pub(crate) fn standardise(
        rows: &'a [f32],
        affine: (&'a [f32], &'a [f32]),
        hat: &'a mut [f32],
        normed: &'a mut [f32],
        inverses: &'a mut [f32],
    ) => standardise_loop
);

#[inline(always)]
fn standardise_loop<const FUSED: bool>(
    rows: &[f32],
    (gain, bias): (&[f32], &[f32]),
    hat: &mut [f32],
    normed: &mut [f32],
    inverses: &mut [f32],
) {
    let width = gain.len();
    let sinks = hat.chunks_exact_mut(width).zip(normed.chunks_exact_mut(width)).zip(inverses);
    for (row, ((hat, normed), kept)) in rows.chunks_exact(width).zip(sinks) {
        let (mean, inverse) = moments(row);
        *kept = inverse;
        for ((((h, n), v), g), b) in hat.iter_mut().zip(normed).zip(row).zip(gain).zip(bias) {
            *h = (v - mean) * inverse;
            *n = *h * g + b;
        }
    }
}

wide!(
    /// Adds what flows back through the norm.
    pub(crate) fn add_row_gradients(
        dx: &'a mut [f32],
        dnormed: &'a [f32],
        hat: &'a [f32],
        inverses: &'a [f32],
        gain: &'a [f32],
    ) => add_row_gradients_loop
);

#[inline(always)]
fn add_row_gradients_loop<const FUSED: bool>(
    dx: &mut [f32],
    dnormed: &[f32],
    hat: &[f32],
    inverses: &[f32],
    gain: &[f32],
) {
    let width = gain.len();
    let mut scaled = vec![0f32; width];
    let sources = hat.chunks_exact(width).zip(dnormed.chunks_exact(width)).zip(inverses);
    for (((hat, dn), inverse), dx) in sources.zip(dx.chunks_exact_mut(width)) {
        for ((s, d), gain) in scaled.iter_mut().zip(dn).zip(gain) {
            *s = d * gain;
        }
        let n = width as f32;
        let (a, c) = (sum(&scaled) / n, dot(&scaled, hat) / n);
        for ((x, s), h) in dx.iter_mut().zip(&scaled).zip(hat) {
            *x += (s - a - h * c) * inverse;
        }
    }
}

const EPS: f32 = 1e-5;
