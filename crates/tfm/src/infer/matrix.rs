//! Weights of an affine map or a norm, copied out of the model once in the order that the loops read them.

use super::{
    kernel::{Product, Start, halved, layer_norm, packed, place},
    scratch::Buffer,
};
use crate::{
    ops::norm::{add_row_gradients, standardise},
    simd::dispatch,
};

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

    /// The map that gradients of outputs come back by, `g W`: from `(n, output)` to `(n, input)`, without a bias.
    pub(super) fn turned(&self) -> Self {
        let (input, output) = (self.input, self.bias.len());
        let mut panels = vec![0f32; packed(output, input)];
        for o in 0..output {
            for k in 0..input {
                panels[place(o, k, output, input)] = self.panels[place(k, o, input, output)];
            }
        }
        Self { panels, bias: vec![0.0; input], input: output }
    }

    /// The weights of one output, `(input)`.
    pub(super) fn weights_of(&self, output: usize) -> Vec<f32> {
        (0..self.input).map(|k| self.panels[place(k, output, self.input, self.bias.len())]).collect()
    }

    /// Values a row goes in with.
    pub(super) fn input(&self) -> usize {
        self.input
    }

    /// Values a row comes out with.
    pub(super) fn output(&self) -> usize {
        self.bias.len()
    }

    /// The map of rows `(n, input)`, `(n, output)`.
    pub(super) fn of(&self, x: &[f32]) -> Buffer {
        let mut out = Buffer::stale(x.len() / self.input * self.bias.len());
        self.product(x, &mut out, Start::Bias(&self.bias));
        out
    }

    /// Adds the map of rows `(n, input)` to rows `(n, output)`.
    pub(super) fn add_to(&self, x: &[f32], out: &mut [f32]) {
        self.product(x, out, Start::HeldAndBias(&self.bias));
    }

    /// As [`Self::add_to`] without the bias.
    pub(super) fn add_product(&self, x: &[f32], out: &mut [f32]) {
        self.product(x, out, Start::Held);
    }

    fn product(&self, x: &[f32], out: &mut [f32], start: Start<'_>) {
        dispatch(Product {
            x,
            x_stride: self.input,
            rows: x.len() / self.input,
            depth: self.input,
            panels: &self.panels,
            outputs: self.bias.len(),
            out,
            out_stride: self.bias.len(),
            start,
            halved: halved(self.input, self.bias.len()),
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
    pub(super) fn of(&self, x: &[f32]) -> Buffer {
        let mut out = Buffer::stale(x.len());
        layer_norm(x, &self.gain, &self.bias, &mut out);
        out
    }

    /// The normed rows, with what the way back needs of them.
    pub(super) fn kept(&self, x: &[f32]) -> (Buffer, Standardised) {
        let (mut rows, mut normed) = (Buffer::stale(x.len()), Buffer::stale(x.len()));
        let mut inverses = Buffer::stale(x.len() / self.gain.len());
        standardise(x, (&self.gain, &self.bias), &mut rows, &mut normed, &mut inverses);
        (normed, Standardised { rows, inverses })
    }

    /// Adds to `gradient` what flows back to the norm's input from the gradient of its output.
    pub(super) fn add_back(&self, kept: &Standardised, of_normed: &[f32], gradient: &mut [f32]) {
        add_row_gradients(gradient, of_normed, &kept.rows, &kept.inverses, &self.gain);
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        (self.gain.len() + self.bias.len()) * size_of::<f32>()
    }
}

/// Rows less their mean, over their deviation, as a norm has them before gain and bias.
pub(super) struct Standardised {
    pub(super) rows: Buffer,
    /// The inverse deviation of each row.
    inverses: Buffer,
}

#[cfg(test)]
mod tests {
    use super::Matrix;

    #[test]
    fn maps_match_hand_computation() {
        // Two inputs, three outputs: x0 + 2 x1, 3 x0 + 4 x1, 5 x0 + 6 x1, plus 10, 20, 30.
        let matrix = Matrix::new(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], vec![10.0, 20.0, 30.0], 2);
        let x = [1.0, 1.0, -1.0, 2.0];
        assert_eq!(matrix.of(&x)[..], [13.0, 27.0, 41.0, 13.0, 25.0, 37.0]);
        let mut sums = vec![100.0; 6];
        matrix.add_to(&x, &mut sums);
        assert_eq!(sums, [113.0, 127.0, 141.0, 113.0, 125.0, 137.0]);
        assert_eq!((matrix.output(), matrix.bytes()), (3, (2 * 8 + 3) * 4));
        // Twice the first weight of each output more: 2 x0 on top of the above.
        let more = matrix.plus(&[2.0, 0.0, 2.0, 0.0, 2.0, 0.0]);
        assert_eq!(more.of(&x)[..], [15.0, 29.0, 43.0, 11.0, 23.0, 35.0]);
        // Back: 1 (1, 2) + 2 (3, 4) + 3 (5, 6).
        let turned = matrix.turned();
        assert_eq!(turned.of(&[1.0, 2.0, 3.0])[..], [22.0, 28.0]);
        let mut sums = vec![1.0; 2];
        turned.add_product(&[0.0, 1.0, 0.0], &mut sums);
        assert_eq!((sums, matrix.weights_of(2)), (vec![4.0, 5.0], vec![5.0, 6.0]));
    }
}
