//! Fused tensor operations with a backward pass.
//!
//! candle's own fused layer norm and softmax have no backward pass, and the versions built from basic operations
//! walk memory a dozen times. These operations run one loop forward and one backward, skip the gradients of
//! frozen operands and serve training and inference alike. Inputs are f32 on the CPU.

pub(crate) mod activation;
pub(crate) mod attention;
pub(crate) mod feed_forward;
mod lanes;
pub(crate) mod linear;
pub(crate) mod math;
pub(crate) mod norm;
pub(crate) mod rope;
pub(crate) mod short;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};

/// The values behind a contiguous layout.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(all), Some((start, end))) => Ok(&all[start..end]),
        (CpuStorage::F32(_), None) => bail!("operand is not contiguous"),
        _ => bail!("operand is not f32"),
    }
}

/// Calls `f` with the values of a contiguous tensor.
fn with_values<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => f(values(cpu, layout)?),
        _ => bail!("operand is not on the cpu"),
    }
}

/// Whether a gradient for this operand is wanted.
fn wanted(tensor: &Tensor) -> bool {
    tensor.track_op()
}

/// Size of the last dimension and the product of the others.
fn rows_and_width(layout: &Layout) -> Result<(usize, usize)> {
    match layout.dims().split_last() {
        Some((width, rest)) => Ok((rest.iter().product(), *width)),
        None => bail!("operand has no dimension"),
    }
}
