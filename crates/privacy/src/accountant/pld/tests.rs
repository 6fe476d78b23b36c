//! Tests of the PLD accountant: closed forms, a naive twin, the other accountant, and the limits of the grid.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::accountant::phase::Step;
use crate::accountant::{gdp, rdp};
use proptest::prelude::*;

fn delta(value: f64) -> Delta {
    Delta::new(value).unwrap()
}

fn one(step: Step, steps: u64) -> Vec<Phase> {
    vec![Phase::new(step, steps).unwrap()]
}

// Unsampled Gaussians compose in closed form; the FFT must reproduce it from above, also at δ far below 1e-16.
#[test]
fn gaussian_plans_meet_their_closed_form_at_any_delta() {
    for (sigma, steps) in [(0.3, 1u64), (1.0, 1), (4.0, 100), (30.0, 1000), (200.0, 100_000)] {
        for d in [1e-3, 1e-6, 1e-12, 1e-30] {
            let phases = one(Step::Gaussian { sigma }, steps);
            let ours = epsilon(&phases, Adjacency::AddRemove, delta(d)).unwrap().get();
            let exact = gdp::epsilon_at_mu((steps as f64).sqrt() / sigma, delta(d)).unwrap().get();
            assert!(ours >= exact * (1.0 - 1e-12), "{sigma} x {steps} at {d}: {ours} below {exact}");
            assert!(ours <= exact * (1.0 + 1e-4), "{sigma} x {steps} at {d}: {ours} above {exact}");
        }
    }
}

/// The naive twin: ε of discrete Gaussians on one coordinate each, by listing and convolving exact atoms.
fn listed_discrete(sigma: f64, shift: i64, steps: u32, d: f64) -> f64 {
    let reach = (12.0 * sigma) as i64 + shift;
    let weight = |x: i64| (-(x as f64).powi(2) / (2.0 * sigma * sigma)).exp();
    let total: f64 = (-reach..=reach).map(weight).sum();
    let single: Vec<f64> = (-reach..=reach).map(|x| weight(x) / total).collect();
    let mut sums = vec![1.0];
    for _ in 0..steps {
        let mut next = vec![0.0; sums.len() + single.len() - 1];
        for (i, a) in sums.iter().enumerate() {
            for (j, b) in single.iter().enumerate() {
                next[i + j] += a * b;
            }
        }
        sums = next;
    }
    // The loss is linear in the sum of the coordinates.
    let (s, n) = (shift as f64, f64::from(steps));
    let origin = i64::from(steps) * reach;
    let delta_at = |eps: f64| {
        let loss = |i: usize| s * (n * s - 2.0 * (i as i64 - origin) as f64) / (2.0 * sigma * sigma);
        let over = |(i, p): (usize, &f64)| if loss(i) > eps { -p * (eps - loss(i)).exp_m1() } else { 0.0 };
        sums.iter().enumerate().map(over).sum::<f64>()
    };
    let (mut low, mut high) = (0.0, 100.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if delta_at(middle) <= d { high = middle } else { low = middle }
    }
    high
}

#[test]
fn discrete_gaussians_meet_the_listed_convolution() {
    for (sigma, shift, steps) in
        [(0.5, 1, 1), (1.0, 1, 1), (2.0, 1, 1), (5.0, 2, 3), (1.0, 1, 6), (20.0, 1, 4)]
    {
        for d in [1e-5, 1e-9] {
            let step = Step::DiscreteGaussian { sigma, shift: shift as u32 };
            let ours = epsilon(&one(step, u64::from(steps)), Adjacency::AddRemove, delta(d)).unwrap().get();
            let listed = listed_discrete(sigma, shift, steps, d);
            assert!(ours >= listed * (1.0 - 1e-9), "{sigma} {shift} x {steps} at {d}: {ours} below {listed}");
            assert!(ours <= listed * (1.0 + 1e-4), "{sigma} {shift} x {steps} at {d}: {ours} above {listed}");
        }
    }
    // A little above the continuous Gaussian, and approaching it: 4.430 against 4.377 at σ = 1.
    let at = |sigma| {
        let step = Step::DiscreteGaussian { sigma, shift: 1 };
        epsilon(&one(step, 1), Adjacency::AddRemove, delta(1e-5)).unwrap().get()
    };
    assert!((at(1.0) - 4.430).abs() < 1e-3, "{}", at(1.0));
    assert!((at(2.0) - 2.011).abs() < 1e-3, "{}", at(2.0));
}

// One Laplace step: δ(ε) = (1 - e^((ε-1/b)/2))₊ between the atoms (Koskela, Jälkö, Honkela 2020), so ε is in closed
// form; without δ it would be 1/b.
#[test]
fn a_laplace_step_meets_its_closed_form() {
    for scale in [0.3f64, 1.0, 7.0, 30.0] {
        for d in [1e-3f64, 1e-6, 1e-10] {
            let ours =
                epsilon(&one(Step::Laplace { scale }, 1), Adjacency::AddRemove, delta(d)).unwrap().get();
            let exact = 1.0 / scale + 2.0 * (-d).ln_1p();
            assert!(ours >= exact * (1.0 - 1e-12), "{scale} at {d}: {ours} below {exact}");
            assert!(ours <= exact * (1.0 + 1e-6) + 1e-6, "{scale} at {d}: {ours} above {exact}");
        }
    }
}

/// The naive twin of one sampled Gaussian step: δ(ε) by closed form in both directions, ε by bisection.
fn sampled_once(rate: f64, sigma: f64, d: f64) -> f64 {
    let tail = |z: f64| super::super::normal::upper_tail(z);
    let threshold = |l: f64| sigma * sigma * ((l.exp_m1() + rate) / rate).ln() + 0.5;
    let mixture = |x: f64| (1.0 - rate) * tail(x / sigma) + rate * tail((x - 1.0) / sigma);
    let delta_at = |eps: f64| {
        let x = threshold(eps);
        let remove = mixture(x) - eps.exp() * tail(x / sigma);
        let below = (-eps).exp_m1() + rate;
        let add = if below > 0.0 {
            let x = threshold(-eps);
            (1.0 - tail(x / sigma)) - eps.exp() * (1.0 - mixture(x))
        } else {
            0.0
        };
        remove.max(add)
    };
    let (mut low, mut high) = (0.0, 50.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if delta_at(middle) <= d { high = middle } else { low = middle }
    }
    high
}

#[test]
fn one_sampled_step_meets_its_closed_form() {
    for (rate, sigma) in [(0.001, 0.6), (0.01, 1.0), (0.1, 0.5), (0.5, 2.0), (0.9, 1.0), (0.99, 0.3)] {
        for d in [1e-3, 1e-5, 1e-8] {
            let phases = one(Step::SampledGaussian { rate, sigma }, 1);
            let ours = epsilon(&phases, Adjacency::AddRemove, delta(d)).unwrap().get();
            let exact = sampled_once(rate, sigma, d);
            assert!(ours >= exact - 1e-9, "{rate} {sigma} at {d}: {ours} below {exact}");
            assert!(ours <= exact * (1.0 + 3e-4) + 1e-8, "{rate} {sigma} at {d}: {ours} above {exact}");
        }
    }
}

#[test]
fn edges_of_the_range_give_finite_figures() {
    for (step, steps) in [
        (Step::Gaussian { sigma: 0.05 }, 1),
        (Step::Gaussian { sigma: 1e6 }, 1),
        (Step::SampledGaussian { rate: 1e-9, sigma: 0.1 }, 1),
        (Step::SampledGaussian { rate: 1e-6, sigma: 1.0 }, 10_000_000),
        (Step::SampledGaussian { rate: 0.999, sigma: 0.1 }, 20),
        (Step::Laplace { scale: 0.05 }, 10),
        (Step::DiscreteGaussian { sigma: 0.25, shift: 1 }, 3),
        (Step::DiscreteGaussian { sigma: 16_384.0, shift: 4096 }, 2),
    ] {
        for adjacency in [Adjacency::AddRemove, Adjacency::ReplaceOne] {
            let ours = epsilon(&one(step, steps), adjacency, delta(1e-6)).unwrap().get();
            assert!(ours.is_finite() && ours >= EPSILON_FLOOR, "{step:?}: {ours}");
        }
    }
    assert!(epsilon(&[], Adjacency::AddRemove, delta(1e-5)).unwrap().get() <= EPSILON_FLOOR);
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0.5f64..20.0).prop_map(|sigma| Step::Gaussian { sigma }),
        (-3.0f64..0.0, 0.6f64..5.0)
            .prop_map(|(log, sigma)| Step::SampledGaussian { rate: 10f64.powf(log), sigma }),
        (1.0f64..30.0).prop_map(|scale| Step::Laplace { scale }),
        (1.0f64..30.0, 1u32..3).prop_map(|(sigma, shift)| Step::DiscreteGaussian { sigma, shift }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    // Two derivations that share no formula: the tight figure never exceeds the Rényi one, and grows with the plan.
    #[test]
    fn pld_is_at_most_rdp_and_grows_with_steps(
        steps in prop::collection::vec((step(), 1u64..200), 1..4),
        log_delta in -9.0f64..-3.0,
    ) {
        let d = delta(10f64.powf(log_delta));
        let phases: Vec<Phase> = steps.iter().map(|(step, n)| Phase::new(*step, *n).unwrap()).collect();
        let more: Vec<Phase> = steps.iter().map(|(step, n)| Phase::new(*step, n + 1).unwrap()).collect();
        let tight = epsilon(&phases, Adjacency::AddRemove, d).unwrap().get();
        let renyi = rdp::epsilon(&phases, Adjacency::AddRemove, d).unwrap().get();
        prop_assert!(tight <= renyi, "{phases:?}: {tight} above {renyi}");
        let longer = epsilon(&more, Adjacency::AddRemove, d).unwrap().get();
        prop_assert!(longer >= tight * (1.0 - 1e-3), "{phases:?}: {longer} below {tight}");
    }
}
