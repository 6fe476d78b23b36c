//! Rotary position embedding, halves convention: feature `i` of a head turns with feature `i + head_dim / 2`.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{rows_and_width, values, wanted, with_values};
use crate::simd::wide;

/// Rotates the first `heads * head_dim` features of each token of `x (batch, length, width)`; the rest passes.
///
/// `frequencies` holds `head_dim / 2` angles per position step.
pub(crate) fn rotate(x: &Tensor, heads: usize, frequencies: &[f32]) -> Result<Tensor> {
    let length = x.dim(1)?;
    let mut table = Vec::with_capacity(length * frequencies.len());
    for position in 0..length {
        table.extend(frequencies.iter().map(|f| (position as f32 * f).sin_cos()));
    }
    x.contiguous()?.apply_op1(Rotate { heads, half: frequencies.len(), table })
}

struct Rotate {
    heads: usize,
    half: usize,
    /// Sine and cosine by position and frequency.
    table: Vec<(f32, f32)>,
}

impl Rotate {
    fn turn(&self, values: &mut [f32], width: usize, direction: f32) {
        turn(values, (width, self.heads * 2 * self.half, self.half), &self.table, direction);
    }
}

wide!(
    /// Turns the first `turned` of `width` features of each token, heads of twice `half`.
    pub(crate) fn turn(
        values: &'a mut [f32],
        sizes: (usize, usize, usize),
        table: &'a [(f32, f32)],
        direction: f32,
    ) => turn_loop
);

#[inline(always)]
fn turn_loop<const FUSED: bool>(
    values: &mut [f32],
    (width, turned, half): (usize, usize, usize),
    table: &[(f32, f32)],
    direction: f32,
) {
    for (row, angles) in values.chunks_exact_mut(width).zip(table.chunks_exact(half).cycle()) {
        for head in row[..turned].chunks_exact_mut(half * 2) {
            let (first, second) = head.split_at_mut(half);
            for ((a, b), (sin, cos)) in first.iter_mut().zip(second).zip(angles) {
                let (x, y) = (*a, *b);
                *a = x * cos - direction * y * sin;
                *b = y * cos + direction * x * sin;
            }
        }
    }
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "rotary_embedding"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = rows_and_width(lx)?;
        let mut out = values(x, lx)?.to_vec();
        self.turn(&mut out, width, 1.0);
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !wanted(x) {
            return Ok(None);
        }
        let width = x.dim(2)?;
        let mut dx = with_values(&grad.contiguous()?, |g| Ok(g.to_vec()))?;
        self.turn(&mut dx, width, -1.0);
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
