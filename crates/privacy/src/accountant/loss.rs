//! The privacy loss of one step as probabilities on a grid, never below the truth.
//!
//! For neighbouring outputs P and Q the loss at an outcome drawn from P is ln(P/Q); (ε, δ) of any composition follows
//! from its distribution (Sommer, Meiser, Mohammadi, PoPETs 2019). "Connect the dots" (Doroshenko, Ghazi, Kamath,
//! Kumar, Manurangsi, arXiv 2207.04380) gives the tightest distribution on a grid whose δ(ε) is nowhere below the
//! true one: an outcome whose loss lies within a cell is divided between the cell's ends such that its probability
//! under P *and* under Q is kept. The share of the upper end is (1 - e^-t)/(1 - e^-h) for a loss t above the lower end
//! of a cell of width h. That share is integrated over the outcomes of a cell, so nothing is a difference of nearly
//! equal numbers. What is cut off at the upper tail becomes infinite loss, at the lower tail it is moved up.

use super::normal::{density, upper_tail};
use super::phase::{Adjacency, Step};

/// Which of two neighbours the outcomes are drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// Drawn with the unit, compared with it removed.
    Remove,
    /// Drawn without the unit, compared with it added.
    Add,
    /// Drawn with one unit, compared with another in its place.
    Replace,
}

impl Direction {
    /// The directions an adjacency asks for; the larger ε counts.
    pub(super) fn of(adjacency: Adjacency) -> &'static [Self] {
        match adjacency {
            Adjacency::AddRemove => &[Self::Remove, Self::Add],
            Adjacency::ReplaceOne => &[Self::Replace],
        }
    }
}

/// Loss of one step in one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Loss {
    /// A Poisson-sampled Gaussian (sampled or not: rate 1), as an increasing function of an outcome x.
    Curve(Curve),
    /// Laplace noise on a query of sensitivity 1.
    Laplace {
        /// Scale over sensitivity.
        scale: f64,
    },
    /// Discrete Gaussian noise, shifted.
    Discrete {
        /// Parameter σ.
        sigma: f64,
        /// Difference of the neighbours' values.
        shift: f64,
    },
}

/// P and Q of the sampled Gaussian, all of deviation σ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Curve {
    direction: Direction,
    rate: f64,
    sigma: f64,
}

/// Probabilities of losses `(first + i) · grid`, and of an infinite loss.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LossPmf {
    pub(super) first: i64,
    pub(super) masses: Vec<f64>,
    pub(super) infinity: f64,
}

impl Loss {
    pub(super) fn of(step: Step, direction: Direction) -> Self {
        // An unsampled step is symmetric; a replaced unit moves its sum by twice the sensitivity.
        let factor = if direction == Direction::Replace { 2.0 } else { 1.0 };
        match step {
            Step::SampledGaussian { rate, sigma } if rate < 1.0 => {
                Self::Curve(Curve { direction, rate, sigma })
            }
            Step::Gaussian { sigma } | Step::SampledGaussian { sigma, .. } => {
                Self::Curve(Curve { direction: Direction::Remove, rate: 1.0, sigma: sigma / factor })
            }
            Step::Laplace { scale } => Self::Laplace { scale: scale / factor },
            Step::DiscreteGaussian { sigma, shift } => {
                Self::Discrete { sigma, shift: f64::from(shift) * factor }
            }
        }
    }

    /// Variance of the loss, for choosing a grid.
    pub(super) fn variance(&self) -> f64 {
        let (mut mass, mut first, mut second) = (0.0, 0.0, 0.0);
        let mut add = |loss: f64, weight: f64| {
            mass += weight;
            first += weight * loss;
            second += weight * loss * loss;
        };
        match self {
            Self::Curve(curve) => {
                let (low, high) = curve.outcomes(VARIANCE_DEVIATIONS);
                integrate(low, high, curve.scale(), |x, dx| add(curve.loss(x), curve.density(x) * dx));
            }
            Self::Laplace { scale } => {
                let top = 1.0 / scale;
                add(top, 0.5);
                add(-top, 0.5 * (-top).exp());
                integrate(-top, top, 1.0, |loss, dl| add(loss, laplace_density(loss, top) * dl));
            }
            Self::Discrete { sigma, shift } => atoms(*sigma, *shift, VARIANCE_DEVIATIONS, add),
        }
        (second / mass - (first / mass).powi(2)).max(0.0)
    }

    /// Smallest and largest loss listed when a probability of `cut` may be cut off at each tail.
    pub(super) fn range(&self, cut: f64) -> (f64, f64) {
        match self {
            Self::Curve(curve) => {
                let (low, high) = curve.outcomes(deviations(cut));
                (curve.loss(low), curve.loss(high))
            }
            Self::Laplace { scale } => (-1.0 / scale, 1.0 / scale),
            Self::Discrete { sigma, shift } => {
                let reach = (deviations(cut) * sigma).ceil();
                let loss = |x: f64| discrete_loss(x, *sigma, *shift);
                (loss(reach), loss(-reach))
            }
        }
    }

    /// The unit all losses of a step with atoms are multiples of: a grid that divides it represents them exactly.
    pub(super) fn lattice(&self) -> Option<f64> {
        match self {
            Self::Curve(_) => None,
            Self::Laplace { scale } => Some(1.0 / scale),
            Self::Discrete { sigma, shift } => Some(shift / (2.0 * sigma * sigma)),
        }
    }

    /// The loss on a grid, with at most about `cut` of probability cut off at each tail.
    pub(super) fn on_grid(&self, grid: f64, cut: f64) -> LossPmf {
        let (low, high) = self.range(cut);
        let mut cells = Cells::new(low, high, grid);
        let infinity = match self {
            Self::Curve(curve) => {
                let (from, to) = curve.outcomes(deviations(cut));
                cells.add_at_or_above(low, curve.lower_tail(from));
                let mut left = from;
                for k in cells.first..cells.last() {
                    // Rounding of the cell's ends moves outcomes between cells, not probability out of them.
                    let right = curve.outcome((k + 1) as f64 * grid).clamp(left, to);
                    let right = if k + 1 == cells.last() { to } else { right };
                    let start = k as f64 * grid;
                    integrate(left, right, curve.scale(), |x, dx| {
                        cells.split(k, curve.loss(x) - start, curve.density(x) * dx);
                    });
                    left = right;
                }
                curve.upper_tail(to)
            }
            Self::Laplace { scale } => {
                let top = 1.0 / scale;
                cells.add(top, 0.5);
                cells.add(-top, 0.5 * (-top).exp());
                for k in cells.first..cells.last() {
                    let start = k as f64 * grid;
                    let (from, to) = (start.max(-top), (start + grid).min(top));
                    integrate(from, to.max(from), 1.0, |loss, dl| {
                        cells.split(k, loss - start, laplace_density(loss, top) * dl);
                    });
                }
                0.0
            }
            Self::Discrete { sigma, shift } => {
                let reach = (deviations(cut) * sigma).ceil();
                atoms(*sigma, *shift, deviations(cut), |loss, mass| cells.add(loss, mass));
                // Geometric series: the ratio of neighbours falls. The listed masses were divided by their own sum,
                // which is smaller than all of them, so both tails are covered once more.
                let ratio = (-(reach + 1.0) / (sigma * sigma)).exp();
                2.0 * (-(reach + 1.0).powi(2) / (2.0 * sigma * sigma)).exp() / (1.0 - ratio)
            }
        };
        LossPmf { first: cells.first, masses: cells.masses, infinity }
    }
}

impl Curve {
    // Outcomes run upwards with the loss, so the added unit's direction is mirrored.
    fn loss(&self, x: f64) -> f64 {
        let Self { direction, rate, sigma } = *self;
        let variance = sigma * sigma;
        let exponent = |x: f64| (2.0 * x - 1.0) / (2.0 * variance);
        if rate >= 1.0 {
            return exponent(x);
        }
        let mixed = |exponent: f64| {
            // ln(1 - q + q e^y), for large y without overflow.
            if exponent > LARGE_EXPONENT {
                exponent + rate.ln() + ((1.0 - rate) / rate * (-exponent).exp()).ln_1p()
            } else {
                (rate * exponent.exp_m1()).ln_1p()
            }
        };
        match direction {
            Direction::Remove => mixed(exponent(x)),
            Direction::Add => -mixed(exponent(-x)),
            Direction::Replace => mixed(exponent(x)) - mixed(exponent(-x)),
        }
    }

    /// The outcome with a given loss; infinite where no outcome has it.
    fn outcome(&self, loss: f64) -> f64 {
        let Self { direction, rate, sigma } = *self;
        let variance = sigma * sigma;
        if rate >= 1.0 {
            return variance * loss + 0.5;
        }
        // 1 - q + q e^y = e^l solved for y, then for x.
        let mixed = |loss: f64| {
            let above = loss.exp_m1() + rate;
            if above > 0.0 { variance * (above / rate).ln() + 0.5 } else { f64::NEG_INFINITY }
        };
        match direction {
            Direction::Remove => mixed(loss),
            Direction::Add => -mixed(-loss),
            Direction::Replace => {
                // With u = e^(x/σ²) and a = q e^(-1/2σ²): a u² - (1-q)(e^l - 1) u - a e^l = 0, whose positive root for
                // l ≥ 0 has no cancellation; the loss is odd in x.
                let size = loss.abs();
                let a = rate * (-0.5 / variance).exp();
                let linear = (1.0 - rate) * size.exp_m1();
                let root = linear.hypot(2.0 * a * (size / 2.0).exp());
                let x = variance * ((linear + root) / (2.0 * a)).ln();
                if loss < 0.0 { -x } else { x }
            }
        }
    }

    /// Density of the outcomes.
    fn density(&self, x: f64) -> f64 {
        let without = if self.with_unit() < 1.0 { density(x / self.sigma) } else { 0.0 };
        let with = if self.with_unit() > 0.0 { density((x - 1.0) / self.sigma) } else { 0.0 };
        ((1.0 - self.with_unit()) * without + self.with_unit() * with) / self.sigma
    }

    fn lower_tail(&self, x: f64) -> f64 {
        (1.0 - self.with_unit()) * upper_tail(-x / self.sigma)
            + self.with_unit() * upper_tail((1.0 - x) / self.sigma)
    }

    fn upper_tail(&self, x: f64) -> f64 {
        (1.0 - self.with_unit()) * upper_tail(x / self.sigma)
            + self.with_unit() * upper_tail((x - 1.0) / self.sigma)
    }

    /// Probability that the unit moves an outcome of P.
    fn with_unit(&self) -> f64 {
        match self.direction {
            Direction::Remove | Direction::Replace => self.rate,
            Direction::Add => 0.0,
        }
    }

    /// Outcomes from so many deviations below the lower to as many above the upper centre.
    fn outcomes(&self, deviations: f64) -> (f64, f64) {
        let top = if self.with_unit() > 0.0 { 1.0 } else { 0.0 };
        let bottom = if self.with_unit() < 1.0 { 0.0 } else { 1.0 };
        (bottom - deviations * self.sigma, top + deviations * self.sigma)
    }

    /// Length over which density and loss are smooth: the loss bends on the scale σ².
    fn scale(&self) -> f64 {
        self.sigma.min(self.sigma * self.sigma)
    }
}

/// A growing distribution on the grid.
struct Cells {
    first: i64,
    grid: f64,
    /// 1/(1 - e^-h).
    share: f64,
    masses: Vec<f64>,
}

impl Cells {
    fn new(low: f64, high: f64, grid: f64) -> Self {
        // The caller keeps (high - low)/grid within MAX_LOSS_CELLS; one cell more at each end absorbs rounding.
        let first = (low / grid).floor() as i64 - 1;
        let last = (high / grid).ceil() as i64 + 1;
        let cells = usize::try_from(last - first + 1).unwrap_or(1);
        Self { first, grid, share: -1.0 / (-grid).exp_m1(), masses: vec![0.0; cells] }
    }

    fn last(&self) -> i64 {
        self.first + self.masses.len() as i64 - 1
    }

    fn put(&mut self, k: i64, mass: f64) {
        let at = (k - self.first).clamp(0, self.masses.len() as i64 - 1);
        if let Some(cell) = usize::try_from(at).ok().and_then(|at| self.masses.get_mut(at)) {
            *cell += mass;
        }
    }

    /// Divides a mass whose loss is `t` above grid point `k` between `k` and `k + 1`.
    fn split(&mut self, k: i64, t: f64, mass: f64) {
        let upper = -(-t).exp_m1() * self.share * mass;
        self.put(k, mass - upper);
        self.put(k + 1, upper);
    }

    fn add(&mut self, loss: f64, mass: f64) {
        let k = (loss / self.grid).floor() as i64;
        self.split(k, loss - k as f64 * self.grid, mass);
    }

    fn add_at_or_above(&mut self, loss: f64, mass: f64) {
        self.put((loss / self.grid).ceil() as i64, mass);
    }
}

// Loss density of the Laplace mechanism between its two atoms at ±top.
fn laplace_density(loss: f64, top: f64) -> f64 {
    0.25 * ((loss - top) / 2.0).exp()
}

fn discrete_loss(x: f64, sigma: f64, shift: f64) -> f64 {
    shift * (shift - 2.0 * x) / (2.0 * sigma * sigma)
}

/// Calls `visit(loss, probability)` for every integer within so many σ of zero.
fn atoms(sigma: f64, shift: f64, deviations: f64, mut visit: impl FnMut(f64, f64)) {
    let reach = (deviations * sigma).ceil() as i64;
    let weight = |x: i64| (-(x as f64 / sigma).powi(2) / 2.0).exp();
    // Smallest first, so that the sum loses nothing.
    let total = 2.0 * (1..=reach).rev().map(weight).sum::<f64>() + 1.0;
    for x in -reach..=reach {
        visit(discrete_loss(x as f64, sigma, shift), weight(x) / total);
    }
}

/// P[N > z] ≤ cut at the returned z.
fn deviations(cut: f64) -> f64 {
    (-2.0 * cut.ln()).max(1.0).sqrt()
}

/// Gauss-Legendre quadrature: calls `visit(x, weight)` at the nodes of panels from `low` to `high`.
///
/// Short intervals take three nodes, longer ones panels of a quarter `scale` with eight nodes: errors below 1e-13 of
/// the integral for integrands smooth over `scale`.
fn integrate(low: f64, high: f64, scale: f64, mut visit: impl FnMut(f64, f64)) {
    let width = high - low;
    if width <= 0.0 {
        return;
    }
    if width < SHORT * scale {
        let (middle, half) = (low + width / 2.0, width / 2.0);
        visit(middle, half * 8.0 / 9.0);
        for side in [-1.0, 1.0] {
            visit(middle + side * half * THREE_NODES, half * 5.0 / 9.0);
        }
        return;
    }
    let panels = (width / (PANEL * scale)).ceil().max(1.0);
    let half = width / panels / 2.0;
    for panel in 0..panels as u64 {
        let middle = low + (2.0 * panel as f64 + 1.0) * half;
        for (node, weight) in EIGHT_NODES {
            visit(middle - half * node, half * weight);
            visit(middle + half * node, half * weight);
        }
    }
}

const SHORT: f64 = 0.02;
const PANEL: f64 = 0.25;
/// √(3/5).
const THREE_NODES: f64 = 0.774_596_669_241_483_4;
/// Positive nodes and their weights (Abramowitz and Stegun, table 25.4).
const EIGHT_NODES: [(f64, f64); 4] = [
    (0.183_434_642_495_649_8, 0.362_683_783_378_362),
    (0.525_532_409_916_329, 0.313_706_645_877_887_3),
    (0.796_666_477_413_626_7, 0.222_381_034_453_374_5),
    (0.960_289_856_497_536_3, 0.101_228_536_290_376_26),
];
/// Above this e^y is large enough to be taken out of the logarithm.
const LARGE_EXPONENT: f64 = 30.0;
const VARIANCE_DEVIATIONS: f64 = 9.0;

#[cfg(test)]
mod tests {
    use super::*;

    fn cases() -> Vec<Loss> {
        let mut all = vec![
            Loss::Laplace { scale: 0.7 },
            Loss::Laplace { scale: 30.0 },
            Loss::Discrete { sigma: 1.0, shift: 1.0 },
            Loss::Discrete { sigma: 40.0, shift: 3.0 },
        ];
        for direction in [Direction::Remove, Direction::Add, Direction::Replace] {
            for (rate, sigma) in [(1e-6, 1.0), (0.01, 0.6), (0.3, 3.0), (0.9, 0.15), (1.0, 1.0)] {
                all.push(Loss::of(Step::SampledGaussian { rate, sigma }, direction));
            }
        }
        all
    }

    // Probability under P, and under Q as E_P[e^-loss], are those of distributions: 1 but for what was cut off.
    #[test]
    fn both_neighbours_keep_their_probability() {
        for loss in cases() {
            let grid = (0.02 * loss.variance().sqrt()).min(1e-3);
            let pmf = loss.on_grid(grid, 1e-18);
            let p: f64 = pmf.masses.iter().sum::<f64>() + pmf.infinity;
            assert!((p - 1.0).abs() < 1e-12, "{loss:?}: {p}");
            let losses = (0..).map(|i| (pmf.first + i) as f64 * grid);
            let q: f64 = losses.zip(&pmf.masses).map(|(l, m)| m * (-l).exp()).sum();
            // Moving the lower tail up loses the part of Q that lies there, most where P and Q hardly overlap.
            assert!(q <= 1.0 + 1e-12 && q > 0.99, "{loss:?}: {q}");
            assert!(pmf.masses.iter().all(|m| *m >= -1e-16), "{loss:?}");
        }
    }

    #[test]
    fn outcome_inverts_loss_and_loss_increases() {
        for loss in cases() {
            let Loss::Curve(curve) = loss else { continue };
            let (low, high) = curve.outcomes(6.0);
            let mut last = f64::NEG_INFINITY;
            for i in 0..=200 {
                let x = low + (high - low) * f64::from(i) / 200.0;
                let l = curve.loss(x);
                assert!(l >= last, "{curve:?} at {x}");
                last = l;
                // Where the loss is flat its inverse can't be sharp: compared by loss.
                let back = curve.loss(curve.outcome(l).clamp(low - 50.0, high + 50.0));
                assert!((back - l).abs() <= 1e-9 * l.abs().max(curve.rate), "{curve:?} at {x}: {l} {back}");
            }
        }
    }

    // δ(ε) of the grid's distribution is at or above the closed form of the Gaussian, and at most h² above.
    #[test]
    fn a_gaussian_on_the_grid_is_never_below_its_closed_form() {
        for sigma in [0.5, 1.0, 5.0] {
            let loss = Loss::of(Step::Gaussian { sigma }, Direction::Remove);
            let grid = 1e-3;
            let pmf = loss.on_grid(grid, 1e-18);
            for eps in [0.0, 0.05, 0.123_45, 0.7, 1.9, 4.0] {
                let losses = (0..).map(|i| (pmf.first + i) as f64 * grid);
                let over = losses.zip(&pmf.masses).filter(|(l, _)| *l > eps);
                let ours: f64 = pmf.infinity + over.map(|(l, m)| -m * (eps - l).exp_m1()).sum::<f64>();
                let exact = crate::accountant::gdp::delta_at(1.0 / sigma, eps);
                assert!(ours >= exact * (1.0 - 1e-11), "sigma {sigma}, {eps}: {ours} below {exact}");
                assert!(ours <= exact + grid * grid, "sigma {sigma}, {eps}: {ours} above {exact}");
            }
        }
    }

    #[test]
    fn quadrature_is_exact_for_smooth_integrands() {
        for (low, high) in [(0.0, 0.01), (-1.0, 2.5)] {
            let mut sum = 0.0;
            integrate(low, high, 1.0, |x: f64, dx| sum += (3.0 * x).exp() * dx);
            let exact = ((3.0 * high).exp() - (3.0 * low).exp()) / 3.0;
            assert!((sum / exact - 1.0).abs() < 1e-12, "{low} {high}: {sum} {exact}");
        }
    }
}
