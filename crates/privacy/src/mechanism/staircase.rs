//! Exact symmetric draws on the integers by rejection from a staircase.
//!
//! The density falls with |x|, so blocks of 2^w neighbouring magnitudes are covered by steps whose heights are integers
//! (units of 2⁻⁵⁶) not below the density. One random word picks a block *and* a height within its step, another the
//! place in the block and the sign; the draw stands if the height is below the density there, which
//! [`Exponent::exceeds`] decides exactly. Most heights are below the density of the block's far end and need no
//! exponential. Beyond the last block, blocks of sixteen-fold width have steps that halve from one to the next: the
//! support isn't cut off. No floating-point number reaches a draw.
//!
//! How many words a draw takes depends on the noise, not on data.

use super::exponential::Exponent;
use rand::RngCore;

/// What is drawn: P[X = x] ∝ exp(-γ(|x|)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// γ = x²·den / (2·num): discrete Gaussian of variance parameter num/den.
    Gaussian {
        /// Below 2⁵⁸.
        num: u64,
        /// At most 2⁶⁰.
        den: u64,
    },
    /// γ = |x|·den / num: discrete Laplace of scale num/den.
    Laplace {
        /// Below 2⁵⁸.
        num: u64,
        /// At most 2⁶⁰.
        den: u64,
    },
}

impl Shape {
    fn exponent(self, magnitude: u64) -> Exponent {
        match self {
            Self::Gaussian { num, den } => {
                Exponent { factors: [magnitude, magnitude, den], divisor: 2 * num }
            }
            Self::Laplace { num, den } => Exponent { factors: [magnitude, den, 1], divisor: num },
        }
    }

    // ⌊σ⌋ or ⌊scale⌋.
    fn spread(self) -> u64 {
        match self {
            Self::Gaussian { num, den } => (num / den).isqrt(),
            Self::Laplace { num, den } => num / den,
        }
    }
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    /// First value of the picking number that picks it.
    from: u64,
    /// The first that doesn't.
    to: u64,
    /// Heights below this are below the density of the whole block.
    sure: u64,
}

/// A sampler with its tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Staircase {
    shape: Shape,
    /// Blocks are 2^`width` wide.
    width: u32,
    /// The steps; the last stands for everything beyond.
    blocks: Vec<Block>,
    total: u64,
    /// 2⁶⁴ mod `total`.
    reject_below: u64,
    /// First block that a picking number with these leading bits may pick.
    guide: Vec<u16>,
    guide_shift: u32,
}

impl Staircase {
    pub(super) fn new(shape: Shape) -> Self {
        let reach = match shape {
            Shape::Gaussian { .. } => GAUSSIAN_REACH,
            Shape::Laplace { .. } => LAPLACE_REACH,
        };
        Self::reaching(shape, reach)
    }

    // Blocks up to `reach` spreads. From there on a wide block (at least one spread) must at least halve the density:
    // for the Laplace e^-1, for the Gaussian e^-reach, so any reach from 1 on will do.
    fn reaching(shape: Shape, reach: u64) -> Self {
        let spread = shape.spread();
        // 2^width in (spread/16, spread/8], or 1.
        let width = (spread / 8).max(1).ilog2();
        let count = (reach * (spread + 1)).div_ceil(1 << width);
        let density = |block: u64| shape.exponent(block << width).bounds();
        let mut blocks = Vec::new();
        let mut total = 0u64;
        for block in 0..count {
            let height = (density(block).1 * UNIT).ceil() as u64 + 1;
            let sure = ((density(block + 1).0 * UNIT).floor() as u64).saturating_sub(1);
            blocks.push(Block { from: total, to: total + height, sure });
            total += height;
        }
        // The first of the halving steps is half of all of them together, and sixteen blocks wide.
        let beyond = 2 * ((density(count).1 * UNIT).ceil() as u64 + 1);
        blocks.push(Block { from: total, to: total + (beyond << WIDER), sure: 0 });
        total += beyond << WIDER;

        let guide_shift = (64 - total.leading_zeros()).saturating_sub(GUIDE_BITS);
        let first = |start: u64| blocks.partition_point(|block| block.to <= start);
        // At most a few hundred blocks.
        let guide = (0..=total >> guide_shift).map(|i| first(i << guide_shift) as u16).collect();
        Self { shape, width, blocks, total, reject_below: total.wrapping_neg() % total, guide, guide_shift }
    }

    /// One draw.
    #[inline]
    pub(super) fn draw<R: RngCore>(&self, rng: &mut R) -> i64 {
        loop {
            let pick = self.pick(rng);
            let guess = self.guide.get((pick >> self.guide_shift) as usize).copied().unwrap_or(0);
            let mut index = u64::from(guess);
            let mut steps = self.blocks.iter().skip(usize::from(guess));
            let Some(mut block) = steps.next() else { continue };
            while pick >= block.to {
                let Some(next) = steps.next() else { break };
                (block, index) = (next, index + 1);
            }
            let height = pick - block.from;
            let word = rng.next_u64();
            let negative = word >> 63 == 1;
            let place = word & ((1 << self.width) - 1);
            let magnitude = if index + 1 < self.blocks.len() as u64 {
                let magnitude = (index << self.width) + place;
                if height >= block.sure && !self.shape.exponent(magnitude).exceeds(height, UNIT_BITS, rng) {
                    continue;
                }
                magnitude
            } else {
                let Some(magnitude) = self.draw_beyond(index, height, rng) else { continue };
                magnitude
            };
            // Zero would come up twice, once with each sign.
            if negative && magnitude == 0 {
                continue;
            }
            // A magnitude needs 2^63 in i64 only after 2^34 heads in a row.
            let value = i64::try_from(magnitude).unwrap_or(i64::MAX);
            return if negative { -value } else { value };
        }
    }

    /// A uniform number below `total`: multiply-shift with rejection (Lemire, arXiv 1805.10941).
    #[inline]
    fn pick<R: RngCore>(&self, rng: &mut R) -> u64 {
        loop {
            let product = u128::from(rng.next_u64()) * u128::from(self.total);
            if product as u64 >= self.reject_below {
                return (product >> 64) as u64;
            }
        }
    }

    /// A magnitude beyond block `last`, or nothing if it is rejected.
    #[cold]
    fn draw_beyond<R: RngCore>(&self, last: u64, height: u64, rng: &mut R) -> Option<u64> {
        let mut halvings = 0u32;
        while rng.next_u32() & 1 == 1 {
            halvings = halvings.saturating_add(1);
        }
        let width = self.width + WIDER;
        let place = rng.next_u64() & ((1 << width) - 1);
        let magnitude = (last << self.width).checked_add(u64::from(halvings) << width)?.checked_add(place)?;
        // The height is uniform over a step 2^(WIDER + 1 + halvings) times as high as the one at this place.
        let bits = UNIT_BITS + WIDER + 1 + halvings;
        self.shape.exponent(magnitude).exceeds(height, bits, rng).then_some(magnitude)
    }
}

/// Heights are integers in units of 2^-56.
const UNIT_BITS: u32 = 56;
const UNIT: f64 = 72_057_594_037_927_936.0;
/// Blocks beyond the last are 2^4 times as wide.
const WIDER: u32 = 4;
const GUIDE_BITS: u32 = 11;
/// Beyond 12 σ a draw falls with probability 1e-32.
const GAUSSIAN_REACH: u64 = 12;
/// Beyond 40 scales a draw falls with probability 4e-18.
const LAPLACE_REACH: u64 = 40;

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    /// Chi-square of `n` draws against probabilities ∝ weight(x), neighbours grouped until 20 draws are expected.
    ///
    /// Laurent and Massart (2000): P[X ≥ d + 2√(da) + 2a] ≤ e^-a for d degrees of freedom; a = 14: error rate below 1e-6.
    pub(in crate::mechanism) fn follows(
        n: u32,
        range: i64,
        weight: impl Fn(i64) -> f64,
        mut draw: impl FnMut() -> i64,
    ) -> Result<(), String> {
        let weights: Vec<f64> = (-range..=range).map(weight).collect();
        let total: f64 = weights.iter().sum();
        let mut counts = vec![0u32; weights.len()];
        for _ in 0..n {
            let x = draw();
            let at = usize::try_from(x + range).ok().and_then(|at| counts.get_mut(at));
            *at.ok_or_else(|| format!("{x} is outside of what is expected ever"))? += 1;
        }
        let (mut chi, mut cells) = (0.0, 0.0);
        let (mut expected, mut observed) = (0.0, 0.0);
        for (weight, count) in weights.iter().zip(&counts) {
            expected += weight / total * f64::from(n);
            observed += f64::from(*count);
            if expected >= 20.0 {
                chi += (observed - expected).powi(2) / expected;
                cells += 1.0;
                (expected, observed) = (0.0, 0.0);
            }
        }
        let freedom: f64 = cells - 1.0;
        let limit = freedom + 2.0 * (freedom * 14.0).sqrt() + 28.0;
        if cells >= 5.0 && chi < limit { Ok(()) } else { Err(format!("chi² {chi} over {cells} cells")) }
    }

    /// Chi-square of two samples of equal size for one distribution, values grouped until 40 draws are in a group.
    ///
    /// Error rate below 1e-6, as for [`follows`].
    pub(in crate::mechanism) fn alike(ours: &[i64], theirs: &[i64]) -> Result<(), String> {
        assert_eq!(ours.len(), theirs.len());
        let mut values: Vec<(i64, bool)> = ours.iter().map(|value| (*value, true)).collect();
        values.extend(theirs.iter().map(|value| (*value, false)));
        values.sort_unstable();
        let (mut chi, mut cells) = (0.0, 0.0);
        let (mut mine, mut all) = (0.0, 0.0);
        for (at, (value, of_ours)) in values.iter().enumerate() {
            mine += f64::from(u8::from(*of_ours));
            all += 1.0;
            // A group ends between two values, never within one.
            if all >= 40.0 && values.get(at + 1).is_some_and(|(next, _)| next != value) {
                chi += (2.0f64 * mine - all).powi(2) / all;
                cells += 1.0;
                (mine, all) = (0.0, 0.0);
            }
        }
        let freedom: f64 = cells;
        let limit = freedom + 2.0 * (freedom * 14.0).sqrt() + 28.0;
        if cells >= 2.0 && chi < limit { Ok(()) } else { Err(format!("chi² {chi} over {cells} cells")) }
    }

    #[test]
    fn two_samples_of_slightly_different_deviation_are_told_apart() {
        let draws = |num: u64, seed: u64| -> Vec<i64> {
            let sampler = Staircase::new(Shape::Gaussian { num, den: 100 });
            let mut rng = ChaCha20Rng::seed_from_u64(seed);
            (0..100_000).map(|_| sampler.draw(&mut rng)).collect()
        };
        assert_eq!(alike(&draws(900, 1), &draws(900, 2)), Ok(()));
        assert!(alike(&draws(900, 1), &draws(990, 2)).is_err());
    }

    /// A float normal rounded to integers is another distribution where the deviation is small: what a sampler of that kind
    /// would be refused for (Canonne, Kamath and Steinke 2020 draw the discrete one exactly).
    #[test]
    fn a_rounded_float_normal_does_not_follow() {
        for sigma in [0.5f64, 1.0] {
            let mut rng = ChaCha20Rng::seed_from_u64(5);
            let uniform =
                |rng: &mut ChaCha20Rng| (rand::Rng::random::<u32>(rng) as f64 + 0.5) / 4_294_967_296.0;
            let mut rounded = || {
                let radius = (-2.0 * uniform(&mut rng).ln()).sqrt();
                (sigma * radius * (std::f64::consts::TAU * uniform(&mut rng)).cos()).round() as i64
            };
            let weight = |x: i64| (-(x as f64).powi(2) / (2.0 * sigma * sigma)).exp();
            assert!(follows(1_000_000, 14, weight, &mut rounded).is_err(), "sigma {sigma}");
        }
    }

    #[test]
    fn the_test_itself_sees_a_slightly_wrong_deviation() {
        let sampler = Staircase::new(Shape::Gaussian { num: 9, den: 1 });
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let wrong = 9.0 * 1.02;
        let outcome =
            follows(1_000_000, 40, |x| (-(x * x) as f64 / (2.0 * wrong)).exp(), || sampler.draw(&mut rng));
        assert!(outcome.is_err());
    }

    // With few blocks, a third of all draws come from beyond them: the halving steps must give the right tail.
    #[test]
    fn draws_beyond_the_blocks_follow_the_density_too() {
        for (num, den) in [(1u64, 4u64), (25, 1), (10_007, 1)] {
            let sampler = Staircase::reaching(Shape::Gaussian { num, den }, 1);
            let sigma_squared = num as f64 / den as f64;
            let mut rng = ChaCha20Rng::seed_from_u64(2);
            let weight = |x: i64| (-(x as f64).powi(2) / (2.0 * sigma_squared)).exp();
            let range = (12.0 * sigma_squared.sqrt()) as i64 + 5;
            follows(400_000, range, weight, || sampler.draw(&mut rng)).unwrap();
        }
        for (num, den) in [(1u64, 2u64), (50, 1)] {
            let sampler = Staircase::reaching(Shape::Laplace { num, den }, 1);
            let scale = num as f64 / den as f64;
            let mut rng = ChaCha20Rng::seed_from_u64(3);
            let weight = |x: i64| (-(x.abs() as f64) / scale).exp();
            follows(400_000, (40.0 * scale) as i64 + 5, weight, || sampler.draw(&mut rng)).unwrap();
        }
    }

    // Steps are nowhere below the density, and cover it: the two conditions of rejection sampling.
    #[test]
    fn every_step_covers_its_block() {
        for shape in [
            Shape::Gaussian { num: 1, den: 8 },
            Shape::Gaussian { num: 1_524_155_677_489, den: 1_000_000 },
            Shape::Gaussian { num: 1 << 56, den: 1 },
            Shape::Laplace { num: 7, den: 3 },
            Shape::Laplace { num: 1 << 28, den: 1 },
        ] {
            let sampler = Staircase::new(shape);
            let mut next = 0;
            for (index, block) in sampler.blocks.iter().enumerate() {
                assert_eq!(block.from, next, "{shape:?}");
                next = block.to;
                if index + 1 == sampler.blocks.len() {
                    break;
                }
                let at = |block: usize| shape.exponent((block as u64) << sampler.width).bounds();
                assert!((block.to - block.from) as f64 >= at(index).1 * UNIT);
                assert!(block.sure as f64 <= at(index + 1).0 * UNIT);
            }
            assert_eq!(next, sampler.total);
        }
    }
}
