//! GELU (exact, by the error function) and the gate of the scalable softmax.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};

use super::{
    math::{normal, tanh},
    rows_and_width, values, wanted, with_values,
};
use crate::simd::wide;

/// `x * Phi(x)`.
pub(crate) fn gelu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Gelu)
}

/// `q * base * (1 + tanh(t))`; `q` and `t` are `(.., width)`, `base` is `(width)`.
pub(crate) fn gate(q: &Tensor, t: &Tensor, base: &Tensor) -> Result<Tensor> {
    q.contiguous()?.apply_op3(&t.contiguous()?, &base.contiguous()?, Gate)
}

struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(x, lx)?;
        let mut out = x.to_vec();
        gelu_in_place(&mut out);
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !wanted(x) {
            return Ok(None);
        }
        let grad = grad.contiguous()?;
        let dx = with_values(x, |xs| {
            with_values(&grad, |gs| {
                let mut dx = xs.to_vec();
                gelu_backward(gs, &mut dx);
                Ok(dx)
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

struct Gate;

impl CustomOp3 for Gate {
    fn name(&self) -> &'static str {
        "softmax_gate"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        t: &CpuStorage,
        lt: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = rows_and_width(lq)?;
        let (q, t, base) = (values(q, lq)?, values(t, lt)?, values(b, lb)?);
        let mut out = q.to_vec();
        gate_in_place(&mut out, t, base, width);
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        t: &Tensor,
        base: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let width = base.dim(0)?;
        let grad = grad.contiguous()?;
        let size = q.elem_count();
        let (mut dq, mut dt, mut db) = (vec![0f32; size], vec![0f32; size], vec![0f32; width]);
        with_values(q, |qs| {
            with_values(t, |ts| {
                with_values(base, |base| {
                    with_values(&grad, |gs| {
                        gate_backward((qs, ts, gs), base, &mut dq, &mut dt, &mut db);
                        Ok(())
                    })
                })
            })
        })?;
        let device = q.device();
        let dq = if wanted(q) { Some(Tensor::from_vec(dq, q.shape(), device)?) } else { None };
        let dt = if wanted(t) { Some(Tensor::from_vec(dt, t.shape(), device)?) } else { None };
        let db = if wanted(base) { Some(Tensor::from_vec(db, width, device)?) } else { None };
        Ok((dq, dt, db))
    }
}

wide!(pub(super) fn gelu_in_place(values: &'a mut [f32]) => gelu_loop);

#[inline(always)]
fn gelu_loop<const FUSED: bool>(values: &mut [f32]) {
    for v in values {
        *v *= normal::<FUSED>(*v).0;
    }
}

wide!(
    /// Turns inputs into gradients.
    fn gelu_backward(grad: &'a [f32], values: &'a mut [f32]) => gelu_backward_loop
);

#[inline(always)]
fn gelu_backward_loop<const FUSED: bool>(grad: &[f32], values: &mut [f32]) {
    for (v, g) in values.iter_mut().zip(grad) {
        let (cdf, density) = normal::<FUSED>(*v);
        *v = g * (cdf + *v * density);
    }
}

wide!(
    /// Replaces inputs of the activation by its slopes, and stores its results.
    pub(crate) fn activate(slopes: &'a mut [f32], active: &'a mut [f32]) => activate_loop
);

#[inline(always)]
fn activate_loop<const FUSED: bool>(slopes: &mut [f32], active: &mut [f32]) {
    for (s, a) in slopes.iter_mut().zip(active) {
        let (cdf, density) = normal::<FUSED>(*s);
        *a = *s * cdf;
        *s = cdf + *s * density;
    }
}

wide!(
    /// Multiplies entry by entry.
    pub(crate) fn multiply(values: &'a mut [f32], by: &'a [f32]) => multiply_loop
);

#[inline(always)]
fn multiply_loop<const FUSED: bool>(values: &mut [f32], by: &[f32]) {
    for (v, b) in values.iter_mut().zip(by) {
        *v *= b;
    }
}

wide!(fn gate_in_place(q: &'a mut [f32], t: &'a [f32], base: &'a [f32], width: usize) => gate_loop);

#[inline(always)]
fn gate_loop<const FUSED: bool>(q: &mut [f32], t: &[f32], base: &[f32], width: usize) {
    for (q, t) in q.chunks_exact_mut(width).zip(t.chunks_exact(width)) {
        for ((q, t), b) in q.iter_mut().zip(t).zip(base) {
            *q = *q * b * (1.0 + tanh::<FUSED>(*t));
        }
    }
}

wide!(
    /// Gradients of all three operands from queries, gates and the gradient of the result.
    pub(crate) fn gate_backward(
        sources: (&'a [f32], &'a [f32], &'a [f32]),
        base: &'a [f32],
        dq: &'a mut [f32],
        dt: &'a mut [f32],
        db: &'a mut [f32],
    ) => gate_backward_loop
);

#[inline(always)]
fn gate_backward_loop<const FUSED: bool>(
    (qs, ts, gs): (&[f32], &[f32], &[f32]),
    base: &[f32],
    dq: &mut [f32],
    dt: &mut [f32],
    db: &mut [f32],
) {
    let width = base.len();
    let sources = qs.chunks_exact(width).zip(ts.chunks_exact(width)).zip(gs.chunks_exact(width));
    let sinks = dq.chunks_exact_mut(width).zip(dt.chunks_exact_mut(width));
    for (((q, t), g), (dq, dt)) in sources.zip(sinks) {
        let sources = q.iter().zip(t).zip(g).zip(base);
        let sinks = dq.iter_mut().zip(dt).zip(db.iter_mut());
        for ((((q, t), g), b), ((dq, dt), db)) in sources.zip(sinks) {
            let h = tanh::<FUSED>(*t);
            let scaled = g * b;
            *dq = scaled * (1.0 + h);
            *dt = scaled * q * (1.0 - h * h);
            *db += g * q * (1.0 + h);
        }
    }
}
