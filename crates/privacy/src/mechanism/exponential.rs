//! Exact decisions "is a uniform number below e^-γ?" for a rational γ, with a uniform number drawn bit by bit.
//!
//! Nearly always bounds on e^-γ decide: they come from additions, multiplications and divisions that IEEE 754 rounds
//! correctly, with a margin far above their total error, so no library's exponential is trusted. What falls between the
//! bounds (once in 10¹⁰ decisions) is settled by the alternating series in integers of any length, drawing further bits
//! of the uniform number as needed. The decision is therefore exact, not merely close.

use rand::RngCore;

/// γ = (product of the factors, below 2¹²⁸) / divisor, with every figure an integer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exponent {
    pub(super) factors: [u64; 3],
    /// Above zero.
    pub(super) divisor: u64,
}

impl Exponent {
    /// Numbers below and above e^-γ.
    ///
    /// γ has a relative error below 7·2⁻⁵³; the series in γ/2¹⁰ and ten squarings leave e^-γ with one below 2⁻³⁸ for
    /// γ ≤ 128. The margin is 2⁻³⁴.
    #[inline]
    pub(super) fn bounds(&self) -> (f64, f64) {
        let gamma = self.gamma();
        if gamma > LARGEST_GAMMA {
            // e^-128 is below 2^-184.
            return (0.0, BEYOND);
        }
        let y = gamma / 1024.0;
        let mut value = 1.0;
        for k in (1..=10u32).rev() {
            value = 1.0 - y / f64::from(k) * value;
        }
        for _ in 0..10 {
            value *= value;
        }
        (value * (1.0 - MARGIN), value * (1.0 + MARGIN))
    }

    fn gamma(&self) -> f64 {
        self.factors.iter().map(|factor| *factor as f64).product::<f64>() / self.divisor as f64
    }

    /// Whether U < e^-γ, for U uniform in [`prefix`, `prefix` + 1) · 2^-`bits`.
    #[inline]
    pub(super) fn exceeds<R: RngCore>(&self, prefix: u64, bits: u32, rng: &mut R) -> bool {
        if above_one(prefix, bits) {
            return false;
        }
        let (low, high) = self.bounds();
        // Exact: powers of two up to 2^1023; beyond, the integers decide.
        if bits < 1000 {
            let scale = 2f64.powi(bits as i32);
            if prefix as f64 + 1.0 <= low * scale {
                return true;
            }
            if prefix as f64 >= high * scale {
                return false;
            }
        }
        self.exceeds_in_integers(prefix, bits, rng)
    }

    /// Limbs above the point: terms of the series reach e^γ, times the factors (below 2¹²⁸) before they are divided.
    fn whole_limbs(&self) -> usize {
        6 + (self.gamma() * std::f64::consts::LOG2_E / 32.0).ceil() as usize
    }

    #[cold]
    fn exceeds_in_integers<R: RngCore>(&self, prefix: u64, bits: u32, rng: &mut R) -> bool {
        if above_one(prefix, bits) {
            return false;
        }
        if self.factors.contains(&0) {
            // e^0 = 1 is above every U.
            return true;
        }
        let mut uniform = Uniform::new(prefix, bits);
        // As many limbs of the fraction as of the whole part are lost to rounding.
        let whole = self.whole_limbs();
        let mut fraction = (bits as usize).div_ceil(32) + whole + 2;
        loop {
            uniform.extend(fraction, rng);
            let (low, high) = self.series(fraction, whole);
            let below = uniform.limbs(whole);
            let mut above = below.clone();
            add(&mut above, &one(0, below.len()));
            if !is_above(&above, &low) {
                return true;
            }
            if !is_above(&high, &below) {
                return false;
            }
            fraction *= 2;
        }
    }

    /// Fixed-point numbers below and above e^-γ: Σ (-γ)^k/k!, every term rounded both ways, the rest bounded by the
    /// first term left out once they fall.
    fn series(&self, fraction: usize, whole: usize) -> (Vec<u32>, Vec<u32>) {
        let size = fraction + whole;
        let (mut low_term, mut high_term) = (one(fraction, size), one(fraction, size));
        let (mut plus_low, mut plus_high) = (low_term.clone(), high_term.clone());
        let (mut minus_low, mut minus_high) = (vec![0; size], vec![0; size]);
        let falling = self.gamma().ceil() as u64 + 2;
        let mut k = 1u64;
        loop {
            for factor in self.factors {
                multiply(&mut low_term, factor);
                multiply(&mut high_term, factor);
            }
            for divisor in [self.divisor, k] {
                divide(&mut low_term, divisor);
                if divide(&mut high_term, divisor) {
                    add(&mut high_term, &one(0, size));
                }
            }
            let (low_sum, high_sum) =
                if k % 2 == 1 { (&mut minus_low, &mut minus_high) } else { (&mut plus_low, &mut plus_high) };
            add(low_sum, &low_term);
            add(high_sum, &high_term);
            // The upper term never gets below one unit of the last place.
            if k > falling && high_term.iter().skip(1).all(|limb| *limb == 0) {
                break;
            }
            k += 1;
        }
        // The first term left out is below the last one taken.
        add(&mut minus_high, &high_term);
        add(&mut plus_high, &high_term);
        (difference(&plus_low, &minus_high), difference(&plus_high, &minus_low))
    }
}

/// Whether `prefix` · 2^-`bits` is 1 or more: a step's margin lets it rise there, where nothing lies.
fn above_one(prefix: u64, bits: u32) -> bool {
    bits < 64 && prefix >> bits != 0
}

/// Leading bits of a uniform number, most significant limb first.
struct Uniform {
    limbs: Vec<u32>,
    /// Prefix bits that don't fill a limb yet.
    rest: u64,
    rest_bits: u32,
}

impl Uniform {
    fn new(prefix: u64, bits: u32) -> Self {
        let mut limbs = Vec::new();
        let mut left = bits;
        while left >= 32 {
            left -= 32;
            // A prefix of more bits than 64 has leading zeros.
            limbs.push(if left < 64 { (prefix >> left) as u32 } else { 0 });
        }
        Self { limbs, rest: prefix & ((1 << left) - 1), rest_bits: left }
    }

    fn extend<R: RngCore>(&mut self, fraction: usize, rng: &mut R) {
        while self.limbs.len() < fraction {
            let missing = 32 - self.rest_bits;
            let fresh = u64::from(rng.next_u32()) & ((1 << missing) - 1);
            self.limbs.push(((self.rest << missing) | fresh) as u32);
            (self.rest, self.rest_bits) = (0, 0);
        }
    }

    /// As a fixed-point number with so many limbs above the point, least significant limb first.
    fn limbs(&self, whole: usize) -> Vec<u32> {
        self.limbs.iter().rev().copied().chain(std::iter::repeat_n(0, whole)).collect()
    }
}

// Unsigned numbers of a fixed number of limbs, least significant first; callers size them so that nothing overflows.

fn one(at: usize, size: usize) -> Vec<u32> {
    (0..size).map(|i| u32::from(i == at)).collect()
}

fn multiply(number: &mut [u32], factor: u64) {
    let mut carry = 0u128;
    for limb in number {
        carry += u128::from(*limb) * u128::from(factor);
        *limb = carry as u32;
        carry >>= 32;
    }
    debug_assert_eq!(carry, 0);
}

/// Divides, rounding down; whether something was left over.
fn divide(number: &mut [u32], divisor: u64) -> bool {
    let mut rest = 0u128;
    for limb in number.iter_mut().rev() {
        rest = (rest << 32) | u128::from(*limb);
        *limb = (rest / u128::from(divisor)) as u32;
        rest %= u128::from(divisor);
    }
    rest != 0
}

fn add(number: &mut [u32], other: &[u32]) {
    let mut carry = 0u64;
    for (limb, other) in number.iter_mut().zip(other) {
        carry += u64::from(*limb) + u64::from(*other);
        *limb = carry as u32;
        carry >>= 32;
    }
}

/// The difference, or zero where it would be negative.
fn difference(number: &[u32], other: &[u32]) -> Vec<u32> {
    let mut borrow = 0i64;
    let limbs: Vec<u32> = number
        .iter()
        .zip(other)
        .map(|(limb, other)| {
            let value = i64::from(*limb) - i64::from(*other) + borrow;
            borrow = value >> 32;
            value as u32
        })
        .collect();
    if borrow < 0 { vec![0; number.len()] } else { limbs }
}

fn is_above(number: &[u32], other: &[u32]) -> bool {
    number.iter().rev().gt(other.iter().rev())
}

const MARGIN: f64 = 5.9e-11;
const LARGEST_GAMMA: f64 = 128.0;
const BEYOND: f64 = 4.1e-56;

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    fn cases() -> Vec<Exponent> {
        let mut rng = ChaCha20Rng::seed_from_u64(8);
        let mut all = vec![
            Exponent { factors: [0, 7, 1], divisor: 3 },
            Exponent { factors: [1, 1, 1], divisor: 1 },
            Exponent { factors: [1, 1, 1], divisor: u64::MAX },
            Exponent { factors: [u64::MAX >> 30, u64::MAX >> 30, 3], divisor: 1 << 63 },
        ];
        for _ in 0..300 {
            let divisor = (rng.next_u64() >> (rng.next_u32() % 40)).max(1);
            let x = (divisor as f64).sqrt() as u64;
            let factors = [x.max(1), 1 + rng.next_u64() % (8 * x.max(1)), 1 + rng.next_u64() % 9];
            all.push(Exponent { factors, divisor });
        }
        all
    }

    // The series in integers, read as a float, against the library's exponential.
    #[test]
    fn bounds_and_series_hold_the_exponential() {
        for exponent in cases() {
            let expected = (-exponent.gamma()).exp();
            let (low, high) = exponent.bounds();
            assert!(low <= expected && expected <= high, "{exponent:?}: {low} {expected} {high}");
            if exponent.gamma() > 150.0 {
                continue;
            }
            let (low, high) = exponent.series(20, exponent.whole_limbs());
            let read = |limbs: &[u32]| {
                let whole =
                    limbs.iter().rev().fold(0.0, |sum, limb| sum * 4_294_967_296.0 + f64::from(*limb));
                whole * 2f64.powi(-32 * 20)
            };
            for value in [read(&low), read(&high)] {
                assert!(
                    (value / expected - 1.0).abs() < 1e-12 * exponent.gamma().max(1.0),
                    "{exponent:?}: {value}"
                );
            }
            assert!(!is_above(&low, &high));
        }
    }

    // Prefixes next to the threshold are the hard ones; the integers and the bounds must say the same where both speak.
    #[test]
    fn the_short_way_agrees_with_the_integers() {
        let mut rng = ChaCha20Rng::seed_from_u64(9);
        let mut decided = 0;
        for exponent in cases() {
            let threshold = (-exponent.gamma()).exp() * 2f64.powi(56);
            for off in [-1e-9, -1e-10, 0.0, 1e-10, 1e-9] {
                let prefix = (threshold * (1.0 + off)) as u64;
                let (low, high) = exponent.bounds();
                let exact = exponent.exceeds_in_integers(prefix, 56, &mut rng);
                if (prefix + 1) as f64 <= low * 2f64.powi(56) {
                    assert!(exact, "{exponent:?} {prefix}");
                    decided += 1;
                } else if prefix as f64 >= high * 2f64.powi(56) {
                    assert!(!exact, "{exponent:?} {prefix}");
                    decided += 1;
                }
            }
        }
        assert!(decided > 300, "{decided}");
    }

    // The highest step is a little above 1: what lies there is never below e^-γ, however small γ is.
    #[test]
    fn nothing_above_one_is_accepted() {
        let mut rng = ChaCha20Rng::seed_from_u64(11);
        let zero = Exponent { factors: [0, 0, 1], divisor: 1 };
        let tiny = Exponent { factors: [1, 1, 1], divisor: 1 << 57 };
        for exponent in [zero, tiny] {
            assert!(exponent.exceeds((1 << 56) - 2, 56, &mut rng));
            for prefix in [1 << 56, (1 << 56) + 1, (1 << 56) + (1 << 21)] {
                assert!(!exponent.exceeds(prefix, 56, &mut rng), "{prefix}");
            }
        }
    }

    // No prefix at all: a Bernoulli draw of e^-γ. 5 standard errors: two-sided error rate below 6e-7 for each.
    #[test]
    fn without_a_prefix_it_is_a_coin_of_that_probability() {
        let mut rng = ChaCha20Rng::seed_from_u64(10);
        let n = 4000;
        for (a, b) in [(1, 1), (1, 1000), (5, 2)] {
            let exponent = Exponent { factors: [a, 1, 1], divisor: b };
            let p = (-(a as f64) / b as f64).exp();
            let hits = (0..n).filter(|_| exponent.exceeds_in_integers(0, 0, &mut rng)).count() as f64;
            let n = f64::from(n);
            assert!((hits - n * p).abs() <= 5.0 * (n * p * (1.0 - p)).sqrt(), "{a}/{b}: {hits}");
        }
    }
}
