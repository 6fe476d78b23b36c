//! `bench sampler`: how fast exact noise is drawn.

use anstream::println;
use anyhow::Context;
use rand::SeedableRng;
use rand::rngs::OsRng;
use rand_chacha::ChaCha20Rng;
use tabmesh_privacy::mechanism::{DiscreteGaussian, DiscreteLaplace, Noise, SigmaSquared};

use crate::bench::cpu_ns;
use crate::cli::Output;

/// Draws one vector of each kind and scale from ChaCha20 seeded by the operating system.
///
/// # Errors
/// Processor time can't be read, or the operating system gives no randomness.
pub fn run(dimension: u32, output: Output) -> anyhow::Result<()> {
    let mut rng = ChaCha20Rng::try_from_rng(&mut OsRng).context("randomness of the operating system")?;
    let zeros = vec![0i64; dimension as usize];
    let mut lines = Vec::new();
    for (name, num, den) in SCALES {
        let sigma_squared = SigmaSquared::new(num * num, den * den)?;
        let gaussian = DiscreteGaussian::from_sigma_squared(1, sigma_squared)?;
        let begun = cpu_ns()?;
        let noised = gaussian.privatize(&zeros, &mut rng);
        let spent = cpu_ns()?.saturating_sub(begun);
        lines.push((
            "discrete gaussian",
            name,
            second_moment(noised.as_slice()).sqrt(),
            rate(dimension, spent),
        ));

        let laplace = DiscreteLaplace::new(u64::try_from(num)?, u64::try_from(den)?)?;
        let begun = cpu_ns()?;
        let noise: Vec<i64> = zeros.iter().map(|_| laplace.draw(&mut rng)).collect();
        let spent = cpu_ns()?.saturating_sub(begun);
        lines.push(("discrete laplace", name, second_moment(&noise).sqrt(), rate(dimension, spent)));
    }
    for (kind, scale, deviation, rate) in lines {
        match output {
            Output::Text => {
                println!(
                    "{kind} {scale}: {:.2} million draws per CPU-second (deviation {deviation:.3})",
                    rate / 1e6
                );
            }
            Output::Json => {
                let line = serde_json::json!({
                    "mechanism": kind, "scale": scale, "dimension": dimension,
                    "deviation": deviation, "draws_per_cpu_s": rate,
                });
                println!("{line}");
            }
        }
    }
    Ok(())
}

fn rate(draws: u32, ns: u64) -> f64 {
    f64::from(draws) * 1e9 / ns.max(1) as f64
}

fn second_moment(values: &[i64]) -> f64 {
    values.iter().map(|value| (*value as f64).powi(2)).sum::<f64>() / values.len().max(1) as f64
}

/// σ, or the Laplace's scale, as text and fraction.
const SCALES: [(&str, u128, u128); 5] =
    [("5", 5, 1), ("100", 100, 1), ("1234.567", 1_234_567, 1000), ("2^20", 1 << 20, 1), ("2^28", 1 << 28, 1)];
