//! Draws and column arithmetic that every part of the prior uses.

use rand::Rng;
use rand_chacha::ChaCha20Rng;

/// One of the choices, each as likely.
pub(super) fn pick<'a, T>(choices: &'a [T], rng: &mut ChaCha20Rng) -> &'a T {
    &choices[rng.random_range(0..choices.len())]
}

/// A number in `[low, high]` whose logarithm is uniform; `low` if the range is empty. Both above 0.
pub(super) fn log_uniform(rng: &mut ChaCha20Rng, low: f32, high: f32) -> f32 {
    if high <= low { low } else { rng.random_range(low.ln()..=high.ln()).exp() }
}

/// As [`log_uniform`] for counts; both ends included.
pub(super) fn log_uniform_count(rng: &mut ChaCha20Rng, low: usize, high: usize) -> usize {
    (log_uniform(rng, low as f32, high as f32).round() as usize).clamp(low, high.max(low))
}

/// Adds normal noise of the given deviation to each value (Box and Muller, both halves of a pair used).
pub(super) fn add_noise(values: &mut [f32], deviation: f32, rng: &mut ChaCha20Rng) {
    for pair in values.chunks_mut(2) {
        let radius = deviation * (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * rng.random::<f32>()).sin_cos();
        for (v, part) in pair.iter_mut().zip([cos, sin]) {
            *v += radius * part;
        }
    }
}

/// Standard normal values.
pub(super) fn normals(count: usize, rng: &mut ChaCha20Rng) -> Vec<f32> {
    let mut values = vec![0f32; count];
    add_noise(&mut values, 1.0, rng);
    values
}

/// Centres to mean 0 and scales to deviation 1; constants become 0.
pub(super) fn normalise(values: &mut [f32]) {
    let n = values.len().max(1) as f32;
    let mean = values.iter().sum::<f32>() / n;
    let var = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
    let inverse = 1.0 / (var.sqrt() + 1e-6);
    for v in values.iter_mut() {
        *v = (*v - mean) * inverse;
    }
}

#[cfg(test)]
mod tests {
    use super::{log_uniform_count, normalise, normals};
    use crate::prior::generator;

    /// 20,000 draws: the mean has deviation .007, the variance .01, so the bounds are five of them.
    #[test]
    fn noise_has_mean_nought_and_variance_one() {
        let values = normals(20_001, &mut generator(1, 1));
        let mean = values.iter().sum::<f32>() / 20_001.0;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / 20_001.0;
        assert!(mean.abs() < 0.036 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }

    #[test]
    fn counts_stay_in_range_and_constants_become_nought() {
        let mut rng = generator(1, 2);
        let counts: Vec<usize> = (0..2000).map(|_| log_uniform_count(&mut rng, 2, 9)).collect();
        assert_eq!((counts.iter().min(), counts.iter().max()), (Some(&2), Some(&9)));
        assert_eq!(log_uniform_count(&mut rng, 5, 3), 5);
        let mut constant = vec![3.0; 4];
        normalise(&mut constant);
        assert!(constant.iter().all(|v| v.abs() < 1e-3));
    }
}
