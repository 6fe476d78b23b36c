//! Least squares from sums alone: one noisy sum of second moments, solved by the server (sufficient statistics, one shot).
//!
//! What a row adds is the upper triangle of `xxᵀ` and the vector `xy`, for `x` with a 1 behind it and a label `y` of -1 or 1; its
//! norm is clipped and its sum noised like a gradient. The solution is post-processing: (A + λI)⁻¹b with λ in proportion to
//! the mean of A's diagonal, doubled until A is positive definite, which noise may keep it from being (Vu and Slavković 2009;
//! Wang 2018, "Revisiting differentially private linear regression", arXiv 1803.02596, chooses λ by the noise).

use rand_chacha::ChaCha20Rng;

use super::Learner;
use crate::logistic::solve;

/// Least squares on rows of `width` numbers.
pub(super) struct Ridge {
    pub(super) width: usize,
}

impl Ridge {
    /// Columns with the intercept.
    fn columns(&self) -> usize {
        self.width + 1
    }

    fn triangle(&self) -> usize {
        self.columns() * (self.columns() + 1) / 2
    }
}

impl Learner for Ridge {
    fn dimension(&self) -> usize {
        self.triangle() + self.columns()
    }

    fn initial(&self, _rng: &mut ChaCha20Rng) -> Vec<f64> {
        vec![0.0; self.dimension()]
    }

    fn solved(&self, parameters: &[f64]) -> Vec<f64> {
        let n = self.columns();
        let (triangle, right) = parameters.split_at(self.triangle().min(parameters.len()));
        let mut full = vec![0.0; n * n];
        let mut next = triangle.iter();
        for i in 0..n {
            for j in i..n {
                // Off the diagonal a sum stands for two cells, so that the norm of a row's part is that of xxᵀ.
                let value = next.next().copied().unwrap_or(0.0) / if i == j { 1.0 } else { ROOT_2 };
                full[i * n + j] = value;
                full[j * n + i] = value;
            }
        }
        let mean = (0..n).map(|i| full[i * n + i]).sum::<f64>() / n as f64;
        let mut ridge = LEAST_RIDGE * mean.abs().max(f64::MIN_POSITIVE);
        for _ in 0..MOST_DOUBLINGS {
            let mut with = full.clone();
            (0..n).for_each(|i| with[i * n + i] += ridge);
            if let Some(weights) = solve(with, right.to_vec(), n) {
                return weights;
            }
            ridge *= 2.0;
        }
        vec![0.0; n]
    }

    fn probability(&self, solved: &[f64], row: &[f32]) -> f64 {
        let dot: f64 = row.iter().zip(solved).map(|(x, w)| f64::from(*x) * w).sum();
        let score = dot + solved.last().copied().unwrap_or(0.0);
        (0.5 * (1.0 + score)).clamp(LEAST_PROBABILITY, 1.0 - LEAST_PROBABILITY)
    }

    fn add_gradient(&self, _parameters: &[f64], row: &[f32], label: u8, into: &mut [f64]) {
        let x = |i: usize| row.get(i).map_or(1.0, |v| f64::from(*v));
        let y = if label == 1 { 1.0 } else { -1.0 };
        let n = self.columns();
        let mut at = 0;
        // The server goes against what it is sent.
        for i in 0..n {
            let xi = x(i);
            if xi == 0.0 {
                at += n - i;
                continue;
            }
            for j in i..n {
                into[at] -= xi * x(j) * if i == j { 1.0 } else { ROOT_2 };
                at += 1;
            }
        }
        for i in 0..n {
            into[at + i] -= x(i) * y;
        }
    }
}

const ROOT_2: f64 = std::f64::consts::SQRT_2;
/// λ in parts of the mean of A's diagonal, where noise doesn't ask for more.
const LEAST_RIDGE: f64 = 1e-3;
const MOST_DOUBLINGS: usize = 60;
/// A score is no probability; it is kept this far from 0 and 1.
const LEAST_PROBABILITY: f64 = 0.01;

#[cfg(test)]
mod tests {
    use super::*;

    /// Exact sums give the least-squares line; oracle: the normal equations of y = 2x + 1 by hand.
    #[test]
    fn exact_sums_give_the_line_through_the_points() {
        let ridge = Ridge { width: 1 };
        let mut sums = vec![0.0; ridge.dimension()];
        // Labels -1 and 1 at x = -1 and 0: the line through both.
        for (x, label) in [(-1.0_f32, 0), (0.0, 1), (-1.0, 0), (0.0, 1)] {
            ridge.add_gradient(&[], &[x], label, &mut sums);
        }
        let parameters: Vec<f64> = sums.iter().map(|s| -s / 4.0).collect();
        let solved = ridge.solved(&parameters);
        assert!((solved[0] - 2.0).abs() < 0.02 && (solved[1] - 1.0).abs() < 0.02, "{solved:?}");
        assert!(ridge.probability(&solved, &[0.0]) > 0.98 && ridge.probability(&solved, &[-1.0]) < 0.02);
    }

    /// A matrix that noise has made indefinite is solved all the same.
    #[test]
    fn an_indefinite_matrix_gets_more_ridge() {
        let ridge = Ridge { width: 1 };
        // [[1, 3], [3, 1]] has the eigenvalues 4 and -2.
        let solved = ridge.solved(&[1.0, 3.0 * ROOT_2, 1.0, 1.0, 0.0]);
        assert!(solved.iter().all(|w| w.is_finite()) && solved[0].abs() > 0.0, "{solved:?}");
    }

    /// What a row adds has the norm of xxᵀ and xy together: |x|²·√(1 + 1/|x|²).
    #[test]
    fn a_rows_part_has_the_norm_of_its_moments() {
        let ridge = Ridge { width: 2 };
        let mut part = vec![0.0; ridge.dimension()];
        ridge.add_gradient(&[], &[0.5, -1.0], 1, &mut part);
        let square = 0.25 + 1.0 + 1.0;
        let norm: f64 = part.iter().map(|v| v * v).sum();
        assert!((norm - (square * square + square)).abs() < 1e-9, "{norm}");
    }
}
