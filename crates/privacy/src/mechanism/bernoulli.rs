//! Exact Bernoulli and uniform draws on 64- and 128-bit integers.
//!
//! Building blocks of the discrete Gaussian: Bernoulli(exp(-a/b)) by the alternating series of Algorithm 1 of
//! Canonne, Kamath, Steinke (arXiv 2004.00010), which only compares uniform integers. No floats anywhere.

use rand::RngCore;

/// A uniform integer in `0..bound`; `bound` must not be zero.
///
/// Multiply-shift with rejection (Lemire, arXiv 1805.10941): exactly uniform, and a division only when needed.
#[inline]
pub(super) fn uniform<R: RngCore>(bound: u64, rng: &mut R) -> u64 {
    let mut product = u128::from(rng.next_u64()) * u128::from(bound);
    if (product as u64) < bound {
        let threshold = bound.wrapping_neg() % bound;
        while (product as u64) < threshold {
            product = u128::from(rng.next_u64()) * u128::from(bound);
        }
    }
    (product >> 64) as u64
}

/// True with probability `1/k` for `k ≥ 1`.
#[inline]
pub(super) fn one_in<R: RngCore>(k: u32, rng: &mut R) -> bool {
    // The 32-bit version of `uniform`: k stays tiny, so half a word of randomness is enough.
    let mut product = u64::from(rng.next_u32()) * u64::from(k);
    if (product as u32) < k {
        let threshold = k.wrapping_neg() % k;
        while (product as u32) < threshold {
            product = u64::from(rng.next_u32()) * u64::from(k);
        }
    }
    product >> 32 == 0
}

/// True with probability `num/den`, for `num ≤ den < 2^127` and `den > 0`.
///
/// Compares a uniform binary fraction with `num/den`. The first 64 bits nearly always decide, by two 64-bit
/// multiplications; a tie is settled exactly, bit by bit.
#[inline]
pub(super) fn ratio<R: RngCore>(num: u128, den: u128, rng: &mut R) -> bool {
    let shift = den.leading_zeros();
    let (num_high, den_high) = (((num << shift) >> 64) as u64, ((den << shift) >> 64) as u64);
    let bits = rng.next_u64();
    // U lies in [bits, bits+1)/2^64; num·2^shift in [num_high, num_high+1)·2^64, den alike.
    let low = u128::from(bits) * u128::from(den_high);
    // (bits+1)(den_high+1) leaves 128 bits only where the comparison below is false anyway.
    let high = low.checked_add(u128::from(bits) + u128::from(den_high) + 1);
    if high.is_some_and(|high| high <= u128::from(num_high) << 64) {
        return true;
    }
    if num_high != u64::MAX && low >= (u128::from(num_high) + 1) << 64 {
        return false;
    }
    ratio_by_bits(num, den, bits, rng)
}

/// Bernoulli(exp(-num/den)) for `num ≤ den < 2^127` and `den > 0`: γ in `[0, 1]`.
#[inline]
pub(super) fn exp_minus_fraction<R: RngCore>(num: u128, den: u128, rng: &mut R) -> bool {
    alternating(rng, |rng| ratio(num, den, rng))
}

/// Bernoulli(exp(-num/den)) for `num ≤ den` in 64 bits, `den > 0`: the case of the discrete Laplace.
#[inline]
pub(super) fn exp_minus_small<R: RngCore>(num: u64, den: u64, rng: &mut R) -> bool {
    alternating(rng, |rng| uniform(den, rng) < num)
}

/// Bernoulli(exp(-1)).
#[inline]
pub(super) fn exp_minus_one<R: RngCore>(rng: &mut R) -> bool {
    alternating(rng, |_| true)
}

// Algorithm 1: K = index of the first failure of Bernoulli(γ/k), k = 1, 2, …; the result is "K is odd".
// Bernoulli(γ/k) is Bernoulli(γ) and Bernoulli(1/k), drawn independently. The loop runs past 32 with
// probability below 1/32!.
#[inline]
fn alternating<R: RngCore>(rng: &mut R, gamma: impl Fn(&mut R) -> bool) -> bool {
    let mut k = 1u32;
    while (k == 1 || one_in(k, rng)) && gamma(rng) {
        k = k.saturating_add(1);
    }
    k % 2 == 1
}

// Decides U < num/den by long division of num/den, the first 64 bits of U given.
#[cold]
fn ratio_by_bits<R: RngCore>(num: u128, den: u128, first: u64, rng: &mut R) -> bool {
    if num >= den {
        return true;
    }
    let (mut rest, mut word, mut left) = (num, first, 64);
    loop {
        if left == 0 {
            (word, left) = (rng.next_u64(), 64);
        }
        rest <<= 1;
        let digit = rest >= den;
        if digit {
            rest -= den;
        }
        let bit = word >> 63 == 1;
        if digit != bit {
            return digit;
        }
        if rest == 0 {
            // num/den ends here: U is at least that.
            return false;
        }
        word <<= 1;
        left -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    // 5 standard errors of a binomial proportion: two-sided error rate below 6e-7 for each comparison.
    fn close(hits: u32, n: u32, p: f64) -> bool {
        let n = f64::from(n);
        (f64::from(hits) - n * p).abs() <= 5.0 * (n * p * (1.0 - p)).sqrt().max(0.2)
    }

    #[test]
    fn probabilities_match_their_closed_forms() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let n = 200_000;
        for (num, den) in [(0u64, 7u64), (1, 7), (3, 7), (7, 7), (1 << 40, (1 << 41) + 1)] {
            let gamma = num as f64 / den as f64;
            let hits = (0..n).filter(|_| exp_minus_small(num, den, &mut rng)).count() as u32;
            assert!(close(hits, n, (-gamma).exp()), "small {num}/{den}: {hits}");
            let scaled = |v: u64| u128::from(v) << 80;
            let hits =
                (0..n).filter(|_| exp_minus_fraction(scaled(num), scaled(den), &mut rng)).count() as u32;
            assert!(close(hits, n, (-gamma).exp()), "fraction {num}/{den}: {hits}");
            let hits = (0..n).filter(|_| ratio(num.into(), den.into(), &mut rng)).count() as u32;
            assert!(close(hits, n, gamma), "ratio {num}/{den}: {hits}");
        }
        let hits = (0..n).filter(|_| exp_minus_one(&mut rng)).count() as u32;
        assert!(close(hits, n, (-1f64).exp()));
        for k in [1, 2, 3, 7, 1000] {
            let hits = (0..n).filter(|_| one_in(k, &mut rng)).count() as u32;
            assert!(close(hits, n, 1.0 / f64::from(k)), "1/{k}");
        }
    }

    #[test]
    fn the_short_way_agrees_with_long_division_bit_by_bit() {
        // A generator that gives one fixed word: the shortcut and the exact comparison must say the same.
        struct Fixed(u64);
        impl RngCore for Fixed {
            fn next_u32(&mut self) -> u32 {
                self.0 as u32
            }
            fn next_u64(&mut self) -> u64 {
                self.0
            }
            fn fill_bytes(&mut self, dest: &mut [u8]) {
                dest.fill(0);
            }
        }
        let mut rng = ChaCha20Rng::seed_from_u64(5);
        for round in 0..20_000u32 {
            let den = (u128::from(rng.next_u64()) << 63 | u128::from(rng.next_u64())) >> (round % 100) | 1;
            let num = (u128::from(rng.next_u64()) << 63 | u128::from(rng.next_u64())) % (den + 1);
            let word = match round % 4 {
                // A word next to the quotient is the hard case.
                0 if den < 1 << 63 => {
                    (((num << 64) / den) as u64).wrapping_add(u64::from(round % 3)).wrapping_sub(1)
                }
                1 => u64::MAX,
                2 => 0,
                _ => rng.next_u64(),
            };
            assert_eq!(
                ratio(num, den, &mut Fixed(word)),
                ratio_by_bits(num, den, word, &mut Fixed(word)),
                "{num}/{den} against {word}"
            );
        }
    }

    #[test]
    fn uniform_is_uniform() {
        // Chi-square with 12 degrees of freedom at p = 1e-6 is 51.6.
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let mut counts = [0u32; 13];
        let n = 130_000;
        for _ in 0..n {
            counts[uniform(13, &mut rng) as usize] += 1;
        }
        let expected = f64::from(n) / 13.0;
        let chi: f64 = counts.iter().map(|c| (f64::from(*c) - expected).powi(2) / expected).sum();
        assert!(chi < 51.6, "{chi}");
        // The largest bound keeps within range.
        assert!(uniform(u64::MAX, &mut rng) < u64::MAX);
        assert_eq!(uniform(1, &mut rng), 0);
    }
}
