//! Weights of an affine map or a norm, copied out of the model once in the order that the loops read them.

use super::kernel::{Product, layer_norm, packed, place};
use crate::simd::dispatch;

/// An affine map `x W^T + b` with its weights in panels of outputs.
pub(super) struct Matrix {
    /// As [`Product`] reads them; outputs beyond the last are zero.
    panels: Vec<f32>,
    bias: Vec<f32>,
    input: usize,
}

impl Matrix {
    /// From a weight `(output, input)`, row by row, and a bias `(output)`.
    pub(super) fn new(weight: &[f32], bias: Vec<f32>, input: usize) -> Self {
        let mut panels = vec![0f32; packed(input, bias.len())];
        for (o, row) in weight.chunks_exact(input).enumerate() {
            for (k, w) in row.iter().enumerate() {
                panels[place(k, o, input, bias.len())] = *w;
            }
        }
        Self { panels, bias, input }
    }

    /// The map with an addend `(output, input)` of its weight.
    pub(super) fn plus(&self, weight: &[f32]) -> Self {
        let mut addend = Self::new(weight, vec![0.0; self.bias.len()], self.input);
        addend.panels.iter_mut().zip(&self.panels).for_each(|(a, w)| *a += w);
        Self { bias: self.bias.clone(), ..addend }
    }

    /// Values a row comes out with.
    pub(super) fn output(&self) -> usize {
        self.bias.len()
    }

    /// The map of rows `(n, input)`, `(n, output)`.
    pub(super) fn of(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.input;
        let mut out = self.bias.repeat(rows);
        self.product(x, rows, &mut out);
        out
    }

    /// Adds the map of rows `(n, input)` to rows `(n, output)`.
    pub(super) fn add_to(&self, x: &[f32], out: &mut [f32]) {
        for row in out.chunks_exact_mut(self.bias.len()) {
            for (o, b) in row.iter_mut().zip(&self.bias) {
                *o += b;
            }
        }
        self.product(x, x.len() / self.input, out);
    }

    fn product(&self, x: &[f32], rows: usize, out: &mut [f32]) {
        dispatch(Product {
            x,
            x_stride: self.input,
            rows,
            depth: self.input,
            panels: &self.panels,
            outputs: self.bias.len(),
            out,
            out_stride: self.bias.len(),
        });
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        (self.panels.len() + self.bias.len()) * size_of::<f32>()
    }
}

/// A layer norm's gain and bias.
pub(super) struct Norm {
    gain: Vec<f32>,
    bias: Vec<f32>,
}

impl Norm {
    pub(super) fn new(gain: Vec<f32>, bias: Vec<f32>) -> Self {
        Self { gain, bias }
    }

    /// The norm with addends of gain and bias, each as long as the norm's or empty.
    pub(super) fn plus(&self, gain: &[f32], bias: &[f32]) -> Self {
        let sum = |own: &[f32], addend: &[f32]| {
            let addend = addend.iter().chain(std::iter::repeat(&0.0));
            own.iter().zip(addend).map(|(o, a)| o + a).collect()
        };
        Self { gain: sum(&self.gain, gain), bias: sum(&self.bias, bias) }
    }

    /// The normed rows.
    pub(super) fn of(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0f32; x.len()];
        layer_norm(x, &self.gain, &self.bias, &mut out);
        out
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        (self.gain.len() + self.bias.len()) * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::Matrix;

    #[test]
    fn maps_match_hand_computation() {
        // Two inputs, three outputs: x0 + 2 x1, 3 x0 + 4 x1, 5 x0 + 6 x1, plus 10, 20, 30.
        let matrix = Matrix::new(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], vec![10.0, 20.0, 30.0], 2);
        let x = [1.0, 1.0, -1.0, 2.0];
        assert_eq!(matrix.of(&x), [13.0, 27.0, 41.0, 13.0, 25.0, 37.0]);
        let mut sums = vec![100.0; 6];
        matrix.add_to(&x, &mut sums);
        assert_eq!(sums, [113.0, 127.0, 141.0, 113.0, 125.0, 137.0]);
        assert_eq!((matrix.output(), matrix.bytes()), (3, (2 * 8 + 3) * 4));
        // Twice the first weight of each output more: 2 x0 on top of the above.
        let more = matrix.plus(&[2.0, 0.0, 2.0, 0.0, 2.0, 0.0]);
        assert_eq!(more.of(&x), [15.0, 29.0, 43.0, 11.0, 23.0, 35.0]);
    }
}
