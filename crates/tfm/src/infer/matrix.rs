//! Weights of an affine map or a norm, copied out of the model once in the order that the loops read them.

use super::kernel::{LANES, Product, dispatch, layer_norm};

/// An affine map `x W^T + b` with its weights in strips of eight outputs.
pub(super) struct Matrix {
    /// `(ceil(output / 8), input, 8)`; outputs beyond the last are zero.
    strips: Vec<f32>,
    bias: Vec<f32>,
    input: usize,
}

impl Matrix {
    /// From a weight `(output, input)`, row by row, and a bias `(output)`.
    pub(super) fn new(weight: &[f32], bias: Vec<f32>, input: usize) -> Self {
        let mut strips = vec![0f32; bias.len().div_ceil(LANES) * input * LANES];
        for (o, row) in weight.chunks_exact(input).enumerate() {
            let strip = &mut strips[o / LANES * input * LANES..];
            for (k, w) in row.iter().enumerate() {
                strip[k * LANES + o % LANES] = *w;
            }
        }
        Self { strips, bias, input }
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
            strips: &self.strips,
            strip_stride: self.input * LANES,
            outputs: self.bias.len(),
            out,
            out_stride: self.bias.len(),
        });
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        (self.strips.len() + self.bias.len()) * size_of::<f32>()
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
    }
}
