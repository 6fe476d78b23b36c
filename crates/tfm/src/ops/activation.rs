//! GELU (exact, by the error function) and the gate of the scalable softmax.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};

use super::{
    math::{normal, tanh},
    rows_and_width, values, wanted, with_values,
};

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
        let mut out = vec![0f32; x.len()];
        for (o, &v) in out.iter_mut().zip(x) {
            *o = v * normal(v).0;
        }
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !wanted(x) {
            return Ok(None);
        }
        let grad = grad.contiguous()?;
        let dx = with_values(x, |xs| {
            with_values(&grad, |gs| {
                let mut dx = vec![0f32; xs.len()];
                for ((d, &v), &g) in dx.iter_mut().zip(xs).zip(gs) {
                    let (cdf, density) = normal(v);
                    *d = g * (cdf + v * density);
                }
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
        let mut out = vec![0f32; q.len()];
        let rows = q.chunks_exact(width).zip(t.chunks_exact(width)).zip(out.chunks_exact_mut(width));
        for ((q, t), to) in rows {
            for (((o, q), t), b) in to.iter_mut().zip(q).zip(t).zip(base) {
                *o = q * b * (1.0 + tanh(*t));
            }
        }
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
                        let sources = qs.chunks_exact(width).zip(ts.chunks_exact(width));
                        let sinks = dq.chunks_exact_mut(width).zip(dt.chunks_exact_mut(width));
                        for (((q, t), g), (dq, dt)) in sources.zip(gs.chunks_exact(width)).zip(sinks) {
                            for i in 0..width {
                                let h = tanh(t[i]);
                                let scaled = g[i] * base[i];
                                dq[i] = scaled * (1.0 + h);
                                dt[i] = scaled * q[i] * (1.0 - h * h);
                                db[i] += g[i] * q[i] * (1.0 + h);
                            }
                        }
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
