//! ε of composed phases by their privacy loss distributions: the tight accountant.
//!
//! Losses of independent steps add up, so the distribution of a plan's loss is a convolution, done by FFT. Each
//! direction of the adjacency is composed by itself over the whole plan and the larger ε counts. Exact for fixed plans
//! (noise, rates and step counts set in advance); adaptive plans without sampling are covered by the ρ filter.
//!
//! A plain FFT has an absolute error near 1e-16, which swamps small δ. So probabilities are first tilted: multiplied
//! by e^(λ·loss) and divided by their sum, with λ the order of the smallest Rényi bound at this δ. The tilted plan has
//! its mean near the ε sought, the FFT's error is then relative to δ, and only a window of about seven deviations
//! around that mean is computed. Mass that leaves the window wraps around *into* it, so it only adds; what lies above
//! is bounded by Chernoff and counted as infinite loss. All roundings go towards a larger ε: discretisation
//! ([`super::loss`]), truncation, the numerical slack.

use super::loss::{Direction, Loss, LossPmf};
use super::phase::{AccountantError, Adjacency, Phase};
use super::zcdp::EPSILON_FLOOR;
use crate::budget::{Delta, Epsilon};
use rustfft::FftPlanner;
use rustfft::num_complex::Complex;

/// The ε of a fixed plan at a given δ, rounded upward.
///
/// A plan of no phases costs the smallest ε there is. Takes a few hundredths of a second for most plans.
///
/// # Errors
/// [`AccountantError::Range`] when the plan's ε isn't a finite number.
pub fn epsilon(phases: &[Phase], adjacency: Adjacency, delta: Delta) -> Result<Epsilon, AccountantError> {
    let mut worst = EPSILON_FLOOR;
    let mut done: Vec<Vec<(Loss, u64)>> = Vec::new();
    for direction in Direction::of(adjacency) {
        let losses: Vec<(Loss, u64)> =
            phases.iter().map(|phase| (Loss::of(phase.step(), *direction), phase.steps())).collect();
        // Unsampled plans look the same from both neighbours.
        if !losses.is_empty() && !done.contains(&losses) {
            worst = worst.max(epsilon_of_losses(&losses, delta.get()));
            done.push(losses);
        }
    }
    Epsilon::new(worst).map_err(|_| AccountantError::Range {
        what: "epsilon",
        min: 0.0,
        max: f64::MAX,
        got: worst,
    })
}

fn epsilon_of_losses(losses: &[(Loss, u64)], delta: f64) -> f64 {
    let steps: f64 = losses.iter().map(|(_, steps)| *steps as f64).sum();
    let cut = (delta * CUT_SHARE / steps).max(f64::MIN_POSITIVE);
    let variance: f64 = losses.iter().map(|(loss, steps)| loss.variance() * *steps as f64).sum();
    let span = losses.iter().map(|(loss, _)| loss.range(cut)).map(|(low, high)| high - low);
    let span = span.fold(0.0, f64::max);
    // A cell of width h adds at most h²/4 to the variance of each step's loss.
    let fine = (4.0 * VARIANCE_SHARE * variance / steps).sqrt();
    let mut grid = COARSEST_GRID.min(fine).max(span / MAX_LOSS_CELLS);
    loop {
        let aligned = align(grid, losses);
        let plan = Composition::new(losses, aligned, cut);
        match plan.epsilon(delta) {
            Ok(epsilon) => return epsilon * (1.0 + FINAL_SLACK),
            Err(TooWide { cells }) => grid *= 2f64.max(cells / MAX_WINDOW_CELLS),
        }
    }
}

// The widest grid not above `grid` on which the first step with atoms is represented exactly.
fn align(grid: f64, losses: &[(Loss, u64)]) -> f64 {
    let lattice = losses.iter().find_map(|(loss, _)| loss.lattice()).filter(|unit| *unit >= grid);
    lattice.map_or(grid, |unit| unit / (unit / grid).ceil())
}

/// The window needs more cells than allowed: a coarser grid must do.
struct TooWide {
    cells: f64,
}

/// Steps on one grid, before convolution.
struct Composition {
    grid: f64,
    parts: Vec<(LossPmf, u64)>,
    /// Probability that any step's loss is infinite, at most.
    infinity: f64,
    steps: f64,
}

/// One tilted step.
struct Tilted {
    /// Relative weights, summing to 1.
    masses: Vec<f64>,
    mean: f64,
    variance: f64,
}

impl Composition {
    fn new(losses: &[(Loss, u64)], grid: f64, cut: f64) -> Self {
        let parts: Vec<(LossPmf, u64)> =
            losses.iter().map(|(loss, steps)| (loss.on_grid(grid, cut), *steps)).collect();
        let infinity = parts.iter().map(|(pmf, steps)| pmf.infinity * *steps as f64).sum();
        let steps = losses.iter().map(|(_, steps)| *steps as f64).sum();
        Self { grid, parts, infinity, steps }
    }

    fn epsilon(&self, delta: f64) -> Result<f64, TooWide> {
        let finite = delta - self.infinity;
        let (mut tilt, bound) = self.best_order(finite);
        let mut best = bound;
        if bound <= 0.0 {
            return Ok(0.0);
        }
        // The window of the best order nearly always holds ε; where it lies below, a smaller tilt reaches it.
        for _ in 0..MAX_TILTS {
            let found = self.epsilon_tilted(tilt, delta)?;
            best = best.min(found.epsilon);
            if found.inside {
                break;
            }
            tilt /= 2.0;
        }
        Ok(best.max(0.0))
    }

    /// ln E[e^(λ·loss)] of the whole plan, finite losses only.
    fn log_moment(&self, tilt: f64) -> f64 {
        self.parts.iter().map(|(pmf, steps)| *steps as f64 * log_moment(pmf, self.grid, tilt)).sum()
    }

    /// The λ > 0 with the smallest bound on ε, and that bound: Rényi DP of order λ + 1 converted as in [`super::zcdp`].
    fn best_order(&self, delta: f64) -> (f64, f64) {
        let bound = |log_tilt: f64| {
            let tilt = log_tilt.exp();
            let conversion = tilt * log_tilt - (tilt + 1.0) * tilt.ln_1p();
            (self.log_moment(tilt) - delta.ln() + conversion) / tilt
        };
        let (mut low, mut high) = LOG_TILT_RANGE;
        let (mut left, mut right) = (high - GOLDEN * (high - low), low + GOLDEN * (high - low));
        let (mut at_left, mut at_right) = (bound(left), bound(right));
        for _ in 0..SEARCH_STEPS {
            if at_left <= at_right {
                (high, right, at_right) = (right, left, at_left);
                left = high - GOLDEN * (high - low);
                at_left = bound(left);
            } else {
                (low, left, at_left) = (left, right, at_right);
                right = low + GOLDEN * (high - low);
                at_right = bound(right);
            }
        }
        if at_left <= at_right { (left.exp(), at_left) } else { (right.exp(), at_right) }
    }

    fn epsilon_tilted(&self, tilt: f64, delta: f64) -> Result<Found, TooWide> {
        let tilted: Vec<Tilted> =
            self.parts.iter().map(|(pmf, _)| tilt_masses(pmf, self.grid, tilt)).collect();
        let log_moment = self.log_moment(tilt);
        let (low, high) = self.window(tilt, log_moment, &tilted)?;
        let masses = self.convolve(&tilted, low, high);

        let slack = (self.steps + 64.0) * NUMERICAL_SLACK;
        // What a tilted probability at a loss stands for.
        let untilt = |k: i64| (log_moment - tilt * k as f64 * self.grid).min(LARGEST_EXPONENT).exp();
        let infinity = self.infinity + untilt(high) * WINDOW_TAIL;
        let (shrink, share) = ((-self.grid).exp(), -(-self.grid).exp_m1());
        // Over losses above the current grid point: sum of probabilities, sum weighted by e^(ε - loss), difference.
        let (mut above, mut weighted, mut over) = (0.0, 0.0, 0.0);
        for k in (low..=high).rev() {
            let factor = untilt(k);
            let extra = infinity + slack * factor;
            let here = k as f64 * self.grid;
            if over + extra > delta {
                // δ is linear in e^ε within a cell.
                let ratio = (above + extra - delta) / weighted;
                let step = if ratio > 0.0 { ratio.ln().clamp(0.0, self.grid) } else { self.grid };
                return Ok(Found { epsilon: here + step, inside: true });
            }
            if here <= 0.0 {
                return Ok(Found { epsilon: 0.0, inside: true });
            }
            let mass =
                usize::try_from(k - low).ok().and_then(|at| masses.get(at)).map_or(0.0, |m| m * factor);
            above += mass;
            over += share * (weighted + mass);
            weighted = shrink * (weighted + mass);
        }
        Ok(Found { epsilon: low as f64 * self.grid, inside: false })
    }

    /// First and last grid index of losses that hold all but [`WINDOW_TAIL`] of the tilted plan at each end.
    fn window(&self, tilt: f64, log_moment: f64, tilted: &[Tilted]) -> Result<(i64, i64), TooWide> {
        let over = |value: fn(&Tilted) -> f64| {
            tilted.iter().zip(&self.parts).map(|(t, (_, steps))| value(t) * *steps as f64).sum::<f64>()
        };
        let variance = over(|t| t.variance).max(self.grid * self.grid);
        let need = -WINDOW_TAIL.ln();
        let (mut low, mut high) = (f64::NEG_INFINITY, f64::INFINITY);
        for part in [0.25, 0.5, 1.0, 2.0] {
            let change = part * (2.0 * need / variance).sqrt();
            high = high.min((self.log_moment(tilt + change) - log_moment + need) / change);
            low = low.max((log_moment - self.log_moment(tilt - change) - need) / change);
        }
        let cells = (high - low) / self.grid;
        if cells > MAX_WINDOW_CELLS {
            return Err(TooWide { cells });
        }
        let mean = over(|t| t.mean);
        let low = (low.min(mean) / self.grid).floor() as i64;
        let high = (high.max(mean) / self.grid).ceil() as i64;
        Ok((low, high))
    }

    /// Tilted probabilities of the plan's losses `low..=high` (in grid units).
    fn convolve(&self, tilted: &[Tilted], low: i64, high: i64) -> Vec<f64> {
        let wanted = usize::try_from(high - low + 1).unwrap_or(1);
        let size = smooth_size(wanted.max(SMALLEST_FFT));
        let mut planner = FftPlanner::new();
        let forward = planner.plan_fft_forward(size);
        let mut scratch = vec![Complex::default(); forward.get_inplace_scratch_len()];
        let mut product: Vec<Complex<f64>> = Vec::new();
        let mut origin = 0i64;
        for (tilted, (pmf, steps)) in tilted.iter().zip(&self.parts) {
            // Step counts are at most MAX_STEPS and losses a few million cells: far below 2^63.
            origin += pmf.first * *steps as i64;
            let mut spectrum = vec![Complex::default(); size];
            for chunk in tilted.masses.chunks(size) {
                for (cell, mass) in spectrum.iter_mut().zip(chunk) {
                    cell.re += mass;
                }
            }
            forward.process_with_scratch(&mut spectrum, &mut scratch);
            if product.is_empty() {
                product = spectrum.iter().map(|z| power(*z, *steps)).collect();
            } else {
                product.iter_mut().zip(&spectrum).for_each(|(p, z)| *p *= power(*z, *steps));
            }
        }
        let inverse = planner.plan_fft_inverse(size);
        scratch.resize(inverse.get_inplace_scratch_len(), Complex::default());
        inverse.process_with_scratch(&mut product, &mut scratch);
        // The window starts at this place of the circle.
        let start = usize::try_from((low - origin).rem_euclid(size as i64)).unwrap_or(0);
        let scale = 1.0 / size as f64;
        let circle = product.iter().skip(start).chain(product.iter().take(start));
        circle.take(wanted).map(|z| (z.re * scale).max(0.0)).collect()
    }
}

struct Found {
    epsilon: f64,
    /// False if δ is still below the target at the window's lower end: ε may be smaller.
    inside: bool,
}

// ln Σ mass · e^(λ·loss), by Horner's rule from the end where the exponential is small.
fn log_moment(pmf: &LossPmf, grid: f64, tilt: f64) -> f64 {
    let ratio = (-tilt.abs() * grid).exp();
    let last = pmf.first + pmf.masses.len() as i64 - 1;
    let (sum, largest) = if tilt >= 0.0 {
        let fourth = ratio.powi(4);
        let mut lanes = [0.0f64; 4];
        let chunks = pmf.masses.chunks_exact(4);
        let rest = chunks.remainder();
        for chunk in chunks {
            lanes.iter_mut().zip(chunk).for_each(|(lane, mass)| *lane = *lane * fourth + mass);
        }
        let sum = lanes.iter().fold(0.0, |sum, lane| sum * ratio + lane);
        (rest.iter().fold(sum, |sum, mass| sum * ratio + mass), last)
    } else {
        (pmf.masses.iter().rev().fold(0.0, |sum, mass| sum * ratio + mass), pmf.first)
    };
    sum.ln() + tilt * largest as f64 * grid
}

fn tilt_masses(pmf: &LossPmf, grid: f64, tilt: f64) -> Tilted {
    let last = pmf.masses.len() as f64 - 1.0;
    let mut masses: Vec<f64> = pmf
        .masses
        .iter()
        .enumerate()
        .map(|(i, mass)| mass.max(0.0) * (tilt * (i as f64 - last) * grid).exp())
        .collect();
    let total: f64 = masses.iter().sum();
    masses.iter_mut().for_each(|mass| *mass /= total);
    // Moments around the end keep what matters; they only size the window.
    let losses = |i: usize| (pmf.first as f64 + i as f64) * grid;
    let mean: f64 = masses.iter().enumerate().map(|(i, mass)| losses(i) * mass).sum();
    let variance = masses.iter().enumerate().map(|(i, mass)| (losses(i) - mean).powi(2) * mass).sum();
    Tilted { masses, mean, variance }
}

// z^n by repeated squaring; relative error n times that of z.
fn power(z: Complex<f64>, n: u64) -> Complex<f64> {
    let (mut base, mut left, mut result) = (z, n, Complex::new(1.0, 0.0));
    while left > 0 {
        if left & 1 == 1 {
            result *= base;
        }
        base *= base;
        left >>= 1;
    }
    result
}

// The smallest 2^a · 3^b · 5^c from `least` on with b ≤ 2 and c ≤ 1: lengths the FFT is fast at.
fn smooth_size(least: usize) -> usize {
    [1usize, 3, 5, 9, 15, 45]
        .into_iter()
        .map(|odd| odd * least.div_ceil(odd).next_power_of_two())
        .min()
        .unwrap_or(least)
}

/// Widest cell of the grid, in ε.
const COARSEST_GRID: f64 = 1e-4;
/// Part of the loss's variance that the grid may add.
const VARIANCE_SHARE: f64 = 1e-4;
/// Part of δ that may be cut off at the tails of all steps together.
const CUT_SHARE: f64 = 1e-9;
/// Most cells of one step.
const MAX_LOSS_CELLS: f64 = 1_048_576.0;
/// Most cells of the composed window.
const MAX_WINDOW_CELLS: f64 = 2_097_152.0;
const SMALLEST_FFT: usize = 64;
/// Tilted probability outside the window at each end.
const WINDOW_TAIL: f64 = 1e-14;
/// Error allowed for each step's quadrature and FFT, relative to the tilted plan: 2^-46.
const NUMERICAL_SLACK: f64 = 1.42e-14;
const FINAL_SLACK: f64 = 1e-12;
/// ln λ is searched in this range.
const LOG_TILT_RANGE: (f64, f64) = (-10.0, 15.0);
const GOLDEN: f64 = 0.618_033_988_749_894_9;
const SEARCH_STEPS: usize = 28;
const MAX_TILTS: usize = 12;
/// Keeps e^x finite.
const LARGEST_EXPONENT: f64 = 690.0;

#[cfg(test)]
mod tests;
