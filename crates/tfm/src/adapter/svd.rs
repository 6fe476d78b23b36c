//! The leading singular directions of a square matrix, the same on every machine.
//!
//! Subspace iteration on a few more directions than asked (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4),
//! then one-sided Jacobi rotations inside the subspace (Hestenes 1958). Sums run in a fixed order in f64, with square roots
//! as the only function, so equal matrices give equal bits: parties that compute the directions apart agree on them.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

/// Orthonormal directions of a `(width, width)` matrix, largest singular value first.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Directions {
    /// Left directions as columns, `(width, rank)`.
    pub(super) left: Vec<f32>,
    /// Right directions as rows, `(rank, width)`.
    pub(super) right: Vec<f32>,
}

/// Vectors of one length.
type Basis = Vec<Vec<f64>>;

/// The `rank <= width` leading directions of a matrix given row by row.
pub(super) fn leading(matrix: &[f32], width: usize, rank: usize) -> Directions {
    let (left, _, right) = decompose(matrix, width, rank);
    let column = |i: usize| left.iter().take(rank).map(move |direction| direction[i] as f32);
    Directions {
        left: (0..width).flat_map(column).collect(),
        right: right.iter().take(rank).flatten().map(|v| *v as f32).collect(),
    }
}

/// Left directions, singular values and right directions, at least `rank` of each.
fn decompose(matrix: &[f32], width: usize, rank: usize) -> (Basis, Vec<f64>, Basis) {
    let matrix: Basis =
        matrix.chunks_exact(width).map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect();
    let size = width.min(rank + OVERSAMPLED);
    let mut rng = ChaCha20Rng::seed_from_u64(0);
    let mut draw = || f64::from(rng.random::<u32>() >> 1) / f64::from(1_u32 << 30) - 1.0;
    let mut basis: Basis = (0..size).map(|_| (0..width).map(|_| draw()).collect()).collect();
    orthonormalise(&mut basis);
    for _ in 0..ITERATIONS {
        basis = basis.iter().map(|q| turned(&matrix, &applied(&matrix, q))).collect();
        orthonormalise(&mut basis);
    }
    let mut images: Basis = basis.iter().map(|q| applied(&matrix, q)).collect();
    rotate_apart(&mut images, &mut basis);
    let norm = |v: &[f64]| dot(v, v).sqrt();
    let mut order: Vec<usize> = (0..size).collect();
    order.sort_by(|a, b| norm(&images[*b]).total_cmp(&norm(&images[*a])));
    let values: Vec<f64> = order.iter().map(|i| norm(&images[*i])).collect();
    let mut left: Basis = order.iter().map(|i| images[*i].clone()).collect();
    let mut right: Basis = order.iter().map(|i| basis[*i].clone()).collect();
    // Directions without an image get an arbitrary orthogonal one; the others are only scaled by this.
    orthonormalise(&mut left);
    for (left, right) in left.iter_mut().zip(&mut right) {
        let peak = right.iter().fold(0f64, |peak, v| if v.abs() > peak.abs() { *v } else { peak });
        if peak < 0.0 {
            left.iter_mut().chain(right.iter_mut()).for_each(|v| *v = -*v);
        }
    }
    (left, values, right)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// `matrix . vector`.
fn applied(matrix: &Basis, vector: &[f64]) -> Vec<f64> {
    matrix.iter().map(|row| dot(row, vector)).collect()
}

/// `vector . matrix`.
fn turned(matrix: &Basis, vector: &[f64]) -> Vec<f64> {
    let mut out = vec![0f64; matrix.first().map_or(0, Vec::len)];
    for (row, v) in matrix.iter().zip(vector) {
        for (o, m) in out.iter_mut().zip(row) {
            *o += v * m;
        }
    }
    out
}

/// Gram and Schmidt, twice for each vector; one that depends on those before it is replaced by a unit vector that doesn't.
fn orthonormalise(basis: &mut Basis) {
    let longest = basis.iter().map(|v| dot(v, v)).fold(0.0, f64::max).sqrt();
    for i in 0..basis.len() {
        let (done, rest) = basis.split_at_mut(i);
        let Some(vector) = rest.first_mut() else { return };
        let width = vector.len();
        let mut units = 0..width;
        loop {
            for _ in 0..2 {
                for other in done.iter() {
                    let share = dot(vector, other);
                    vector.iter_mut().zip(other).for_each(|(v, o)| *v -= share * o);
                }
            }
            let norm = dot(vector, vector).sqrt();
            if norm > DEPENDENT * longest && norm > 0.0 {
                vector.iter_mut().for_each(|v| *v /= norm);
                break;
            }
            let Some(unit) = units.next() else { return };
            vector.fill(0.0);
            // Long enough to pass where a direction of it is left.
            vector[unit] = longest.max(1.0);
        }
    }
}

/// Rotates pairs of images, and the vectors they are images of alike, until the images are orthogonal.
fn rotate_apart(images: &mut Basis, vectors: &mut Basis) {
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for i in 0..images.len() {
            for j in i + 1..images.len() {
                let (a, b, c) =
                    (dot(&images[i], &images[i]), dot(&images[j], &images[j]), dot(&images[i], &images[j]));
                if c == 0.0 || c * c <= ORTHOGONAL * ORTHOGONAL * a * b {
                    continue;
                }
                rotated = true;
                let zeta = (b - a) / (2.0 * c);
                let tangent = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
                let sine = cosine * tangent;
                for pair in [&mut *images, &mut *vectors] {
                    let (first, second) = pair.split_at_mut(j);
                    for (x, y) in first[i].iter_mut().zip(&mut second[0]) {
                        (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
                    }
                }
            }
        }
        if !rotated {
            return;
        }
    }
}

/// Directions iterated beyond those asked for.
const OVERSAMPLED: usize = 8;
/// Multiplications by the matrix and its transpose.
const ITERATIONS: usize = 24;
/// Most passes over all pairs; a handful is enough.
const SWEEPS: usize = 60;
/// Cosine below which two images count as orthogonal.
const ORTHOGONAL: f64 = 1e-14;
/// Part of the longest vector below which what is left of a vector is rounding.
const DEPENDENT: f64 = 1e-12;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{decompose, dot, leading};

    /// A fixed full matrix with falling singular values.
    fn matrix(width: usize) -> Vec<f32> {
        let entry =
            |i: usize, j: usize| ((i * 7 + j * 13 + i * j) % 11) as f32 - 5.0 + 9.0 / (1 + i + j) as f32;
        (0..width * width).map(|at| entry(at / width, at % width)).collect()
    }

    #[test]
    fn all_directions_give_the_matrix_back() {
        let (width, given) = (12, matrix(12));
        let (left, values, right) = decompose(&given, width, width);
        assert!(values.windows(2).all(|pair| pair[0] >= pair[1]));
        for (at, expected) in given.iter().enumerate() {
            let term = |k: usize| values[k] * left[k][at / width] * right[k][at % width];
            let got: f64 = (0..width).map(term).sum();
            assert!((got - f64::from(*expected)).abs() < 1e-9, "{at}: {got} {expected}");
        }
        for basis in [&left, &right] {
            for (i, a) in basis.iter().enumerate() {
                for (j, b) in basis.iter().enumerate() {
                    assert!((dot(a, b) - f64::from(u8::from(i == j))).abs() < 1e-10, "{i} {j}");
                }
            }
        }
    }

    /// The few directions asked for are the first ones of all.
    #[test]
    fn leading_directions_are_those_of_the_whole() {
        let given = matrix(40);
        let (whole, few) = (leading(&given, 40, 40), leading(&given, 40, 4));
        for at in 0..4 * 40 {
            assert!((whole.right[at] - few.right[at]).abs() < 1e-4, "right {at}");
            let (row, k) = (at / 4, at % 4);
            assert!((whole.left[row * 40 + k] - few.left[at]).abs() < 1e-4, "left {at}");
        }
        assert_eq!(leading(&given, 40, 4), few);
    }

    /// diag(3, -2, 0): values by hand, signs by the rule that the largest entry on the right is positive.
    #[test]
    fn a_matrix_without_full_rank_still_gets_orthonormal_directions() {
        let found = leading(&[3.0, 0.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0], 3, 3);
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-6);
        assert!(close(&found.right, &[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]), "{found:?}");
        assert!(close(&found.left[..6], &[1.0, 0.0, 0.0, 0.0, -1.0, 0.0]), "{found:?}");
        assert!((found.left[8].abs() - 1.0).abs() < 1e-6);
        let nothing = leading(&[0.0; 9], 3, 2);
        let gram: f32 = nothing.left.iter().map(|v| v * v).sum();
        assert!((gram - 2.0).abs() < 1e-6, "{nothing:?}");
    }
}
