//! From gradients to steps: AdamW, and Muon for the matrices of blocks. Owns the moments of a run.
//!
//! Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) keeps a momentum and steps along its orthogonal factor,
//! which a few Newton-Schulz iterations approach; the step's root mean square is brought to that of AdamW by
//! 0.2 sqrt(max(rows, columns)) (Liu et al. 2025, arXiv 2502.16982, section 2.2), so both share a learning rate.
//! Stacked query, key and value projections are three matrices.

use std::ops::Range;

use candle_core::{Device, Tensor, Var};

use super::{Optimiser, PretrainConfig};
use crate::error::TfmError;

/// First and second moments of all trained tensors, end to end.
pub(super) struct Moments {
    pub(super) first: Vec<f32>,
    /// Not used where Muon steps.
    pub(super) second: Vec<f32>,
    parts: Vec<Part>,
}

/// What one tensor, or a third of a stacked one, takes of the moments.
#[derive(Debug, Clone, PartialEq)]
struct Part {
    range: Range<usize>,
    /// Rows and columns, if Muon steps here.
    matrix: Option<(usize, usize)>,
    decays: bool,
}

impl Moments {
    /// Zero moments for trained tensors in their order.
    pub(super) fn new(vars: &[(String, Var)], optimiser: Optimiser) -> Self {
        let (mut parts, mut at) = (Vec::new(), 0);
        for (name, var) in vars {
            let size = var.elem_count();
            let decays = var.dims().len() > 1;
            match *var.dims() {
                [rows, columns] if optimiser == Optimiser::Muon && orthogonalised(name) => {
                    let stacked = if name.ends_with(STACKED) { 3 } else { 1 };
                    for third in 0..stacked {
                        let from = at + third * size / stacked;
                        let matrix = Some((rows / stacked, columns));
                        parts.push(Part { range: from..from + size / stacked, matrix, decays });
                    }
                }
                _ => parts.push(Part { range: at..at + size, matrix: None, decays }),
            }
            at += size;
        }
        Self { first: vec![0.0; at], second: vec![0.0; at], parts }
    }

    /// Moves the weights by one step (counted from 0) along a clipped gradient.
    pub(super) fn step(
        &mut self,
        config: &PretrainConfig,
        step: u64,
        weights: &mut [f32],
        gradient: &[f32],
    ) -> Result<(), TfmError> {
        let rate = config.rate(step) as f32;
        let time = i32::try_from(step + 1).unwrap_or(i32::MAX);
        let (c1, c2) = (1.0 - BETA1.powi(time), 1.0 - BETA2.powi(time));
        let mut matrices = Vec::new();
        for part in &self.parts {
            let range = part.range.clone();
            let decay = if part.decays { rate * config.weight_decay as f32 } else { 0.0 };
            let (weights, gradient) = (&mut weights[range.clone()], &gradient[range.clone()]);
            weights.iter_mut().for_each(|w| *w -= decay * *w);
            let first = &mut self.first[range.clone()];
            if let Some(sizes) = part.matrix {
                for (m, g) in first.iter_mut().zip(gradient) {
                    *m = MOMENTUM * *m + g;
                }
                // One step ahead, after Nesterov.
                let ahead = first.iter().zip(gradient).map(|(m, g)| g + MOMENTUM * m).collect();
                matrices.push((range, sizes, ahead));
                continue;
            }
            let moments = first.iter_mut().zip(&mut self.second[range]);
            for ((w, (m, v)), g) in weights.iter_mut().zip(moments).zip(gradient) {
                *m = BETA1 * *m + (1.0 - BETA1) * g;
                *v = BETA2 * *v + (1.0 - BETA2) * g * g;
                *w -= rate * (*m / c1) / ((*v / c2).sqrt() + 1e-8);
            }
        }
        for (range, (rows, columns), direction) in orthogonal_all(matrices, config.threads)? {
            let scale = rate * UPDATE_RMS * (rows.max(columns) as f32).sqrt();
            for (w, o) in weights[range].iter_mut().zip(direction) {
                *w -= scale * o;
            }
        }
        Ok(())
    }
}

/// A matrix on its way: where it belongs, rows and columns, values.
type Matrix = (Range<usize>, (usize, usize), Vec<f32>);

/// Orthogonal factors, shared out over threads; each depends on its own matrix alone.
fn orthogonal_all(matrices: Vec<Matrix>, threads: usize) -> Result<Vec<Matrix>, TfmError> {
    let share = |worker: usize| -> Result<Vec<Matrix>, TfmError> {
        let own = matrices.iter().skip(worker).step_by(threads);
        own.map(|(range, sizes, values)| Ok((range.clone(), *sizes, orthogonal(values, *sizes)?))).collect()
    };
    if threads == 1 || matrices.is_empty() {
        return share(0);
    }
    let share = &share;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|w| scope.spawn(move || share(w))).collect();
        let mut all = Vec::new();
        for worker in workers {
            // Unwrap safety: a worker only panics on a defect, which must not pass unseen.
            all.extend(worker.join().expect("optimiser worker doesn't panic")?);
        }
        Ok(all)
    })
}

/// The orthogonal factor `U V'` of a matrix `U S V'` of these rows and columns, nearly: singular values come out between
/// about 0.7 and 1.2; those far below the largest come out smaller, and a matrix of noughts as noughts.
fn orthogonal(values: &[f32], (rows, columns): (usize, usize)) -> Result<Vec<f32>, TfmError> {
    // The iteration's coefficients are those of Jordan et al.: fastest growth of small singular values.
    const A: f64 = 3.4445;
    const B: f64 = -4.7750;
    const C: f64 = 2.0315;
    let norm = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
    let x = (Tensor::from_slice(values, (rows, columns), &Device::Cpu)? / (norm + 1e-12))?;
    // The products are cheaper on the short side.
    let mut x = if rows > columns { x.t()?.contiguous()? } else { x };
    for _ in 0..ITERATIONS {
        let gram = x.matmul(&x.t()?)?;
        let inner = ((&gram * B)? + (gram.matmul(&gram)? * C)?)?;
        x = ((&x * A)? + inner.matmul(&x)?)?;
    }
    let x = if rows > columns { x.t()?.contiguous()? } else { x };
    Ok(x.flatten_all()?.to_vec1()?)
}

/// Whether Muon steps a matrix: those inside blocks. Inputs, labels, outputs, tokens, inducing points and the
/// softmax-scaling networks stay with AdamW, as embeddings and heads do in the literature.
fn orthogonalised(name: &str) -> bool {
    name.contains(".blocks.")
        && !name.contains("ssmax")
        && (name.ends_with(".weight") || name.ends_with(STACKED))
}

/// End of the name of a stacked query, key and value projection.
const STACKED: &str = "in_proj_weight";
/// Decay of AdamW's first moment.
const BETA1: f32 = 0.9;
/// Decay of AdamW's second moment.
const BETA2: f32 = 0.98;
/// Decay of Muon's momentum.
const MOMENTUM: f32 = 0.95;
/// Root mean square of a Muon step at learning rate 1, about that of AdamW.
const UPDATE_RMS: f32 = 0.2;
/// Newton-Schulz iterations.
const ITERATIONS: usize = 5;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use candle_core::{Device, Tensor, Var};

    use super::{Moments, Optimiser, UPDATE_RMS, orthogonal};
    use crate::{
        model::config::ModelConfig,
        pretrain::PretrainConfig,
        prior::{generator, random_normals},
    };

    /// The textbook product, in f64.
    fn product(a: &[f64], b: &[f64], (n, k, m): (usize, usize, usize)) -> Vec<f64> {
        let mut out = vec![0f64; n * m];
        for i in 0..n {
            for j in 0..m {
                out[i * m + j] = (0..k).map(|l| a[i * k + l] * b[l * m + j]).sum();
            }
        }
        out
    }

    fn transposed(a: &[f64], (n, m): (usize, usize)) -> Vec<f64> {
        (0..m * n).map(|at| a[at % n * m + at / n]).collect()
    }

    /// The polar factor by the plain cubic iteration `X (3 I - X'X) / 2` in f64, run until it stands still: slow,
    /// obviously right (its fixed points of full rank are orthogonal, and it keeps the singular vectors).
    fn polar(values: &[f32], (rows, columns): (usize, usize)) -> Vec<f64> {
        let norm = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let mut x: Vec<f64> = values.iter().map(|v| f64::from(*v) / norm).collect();
        for _ in 0..200 {
            let gram = product(&transposed(&x, (rows, columns)), &x, (columns, rows, columns));
            let step = product(&x, &gram, (rows, columns, columns));
            x = x.iter().zip(step).map(|(x, s)| 1.5 * x - 0.5 * s).collect();
        }
        x
    }

    /// Against the naive twin: same singular vectors, singular values within the published band. `O P'` with the polar
    /// factor P is symmetric and has the singular values of O as eigenvalues; Rayleigh quotients bound them.
    #[test]
    fn orthogonal_factor_agrees_with_the_plain_iteration() {
        let mut rng = generator(81, 0);
        for (rows, columns) in [(8, 24), (24, 8), (16, 12), (1, 5)] {
            let values = random_normals(rows * columns, &mut rng);
            let ours: Vec<f64> =
                orthogonal(&values, (rows, columns)).unwrap().into_iter().map(f64::from).collect();
            let exact = polar(&values, (rows, columns));
            let (short, ours, exact) = if rows <= columns {
                (rows, ours, exact)
            } else {
                (columns, transposed(&ours, (rows, columns)), transposed(&exact, (rows, columns)))
            };
            let long = rows.max(columns);
            let gram = product(&exact, &transposed(&exact, (short, long)), (short, long, short));
            for i in 0..short {
                for j in 0..short {
                    let identity = if i == j { 1.0 } else { 0.0 };
                    assert!((gram[i * short + j] - identity).abs() < 1e-9, "the twin isn't orthogonal");
                }
            }
            let inner = product(&ours, &transposed(&exact, (short, long)), (short, long, short));
            for i in 0..short {
                for j in 0..short {
                    assert!((inner[i * short + j] - inner[j * short + i]).abs() < 1e-3, "not symmetric");
                }
            }
            for _ in 0..200 {
                let v: Vec<f64> = random_normals(short, &mut rng).into_iter().map(f64::from).collect();
                let image = product(&v, &inner, (1, short, short));
                let quotient = image.iter().zip(&v).map(|(a, b)| a * b).sum::<f64>()
                    / v.iter().map(|a| a * a).sum::<f64>();
                assert!((0.6..1.25).contains(&quotient), "{rows} x {columns}: {quotient}");
            }
        }
        assert_eq!(orthogonal(&[0.0; 6], (2, 3)).unwrap(), [0.0; 6]);
    }

    fn config(optimiser: Optimiser, threads: usize) -> PretrainConfig {
        PretrainConfig {
            optimiser,
            threads,
            learning_rate: 0.1,
            warmup_steps: 1,
            weight_decay: 0.0,
            ..PretrainConfig::scratch(ModelConfig::tiny(), 1_000_000, 1)
        }
    }

    fn vars() -> Vec<(String, Var)> {
        let var = |name: &str, shape: (usize, usize)| {
            let zeros = Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
            (name.to_owned(), Var::from_tensor(&zeros).unwrap())
        };
        vec![
            var("icl_predictor.decoder.2.weight", (2, 8)),
            var("tf.blocks.0.attn.in_proj_weight", (24, 8)),
            var("tf.blocks.0.attn.ssmax_layer.base_mlp.2.weight", (8, 8)),
            var("tf.blocks.0.linear1.weight", (16, 8)),
        ]
    }

    /// Steps have the documented size, stacked thirds are orthogonal each, the others are AdamW's; threads change
    /// nothing.
    #[test]
    fn muon_steps_blocks_and_adam_the_rest() {
        let vars = vars();
        let size: usize = vars.iter().map(|(_, v)| v.elem_count()).sum();
        let gradient = random_normals(size, &mut generator(82, 0));
        let moved = |optimiser, threads| {
            let mut weights = vec![0f32; size];
            let mut moments = Moments::new(&vars, optimiser);
            moments.step(&config(optimiser, threads), 0, &mut weights, &gradient).unwrap();
            weights
        };
        let (adam, muon) = (moved(Optimiser::AdamW, 1), moved(Optimiser::Muon, 1));
        assert_eq!(muon, moved(Optimiser::Muon, 3));
        // AdamW's first step is the sign of the gradient times the rate.
        assert!(adam.iter().zip(&gradient).all(|(w, g)| (w + 0.1 * g.signum()).abs() < 1e-4));
        let (head, rest) = (0..16, 16 + 192..16 + 192 + 64);
        assert_eq!((&adam[head.clone()], &adam[rest.clone()]), (&muon[head], &muon[rest]));
        for third in 0..3 {
            let at = 16 + third * 64..16 + (third + 1) * 64;
            let norm = muon[at.clone()].iter().map(|w| w * w).sum::<f32>().sqrt();
            // Eight singular values near 1 at rate .1, scaled by .2 sqrt(8).
            let expected = 0.1 * UPDATE_RMS * 8f32.sqrt() * 8f32.sqrt();
            assert!((0.75..1.2).contains(&(norm / expected)), "{norm} {expected}");
            let along = muon[at.clone()].iter().zip(&gradient[at]).map(|(w, g)| w * g).sum::<f32>();
            assert!(along < 0.0, "a step goes down");
        }
    }
}
