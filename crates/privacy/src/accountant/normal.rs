//! The standard normal distribution: density and tails with small relative error.

/// Density at `x`.
pub(super) fn density(x: f64) -> f64 {
    (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// P[N > x].
pub(super) fn upper_tail(x: f64) -> f64 {
    if x >= TAIL_START {
        return density(x) * mills(x);
    }
    if x <= -TAIL_START {
        return 1.0 - density(x) * mills(-x);
    }
    // Φ(x) - 1/2 = φ(x) Σ x^(2n+1) / (1·3·5···(2n+1)): all terms of one sign.
    let (mut term, mut sum, mut n) = (x, 0.0, 1.0);
    while term.abs() > f64::EPSILON * 1e-3 {
        sum += term;
        n += 2.0;
        term *= x * x / n;
    }
    0.5 - density(x) * sum
}

/// Mills' ratio P[N > x] / φ(x) for x > 0.
pub(super) fn mills(x: f64) -> f64 {
    if x < TAIL_START {
        return upper_tail(x) / density(x);
    }
    // 1/(x + 1/(x + 2/(x + 3/(x + …)))), evaluated from a depth where the rest is below 1e-16 for x ≥ 1.5.
    let mut fraction = 0.0;
    for k in (1..=CONTINUED_FRACTION_DEPTH).rev() {
        fraction = f64::from(k) / (x + fraction);
    }
    1.0 / (x + fraction)
}

/// From here on tails are computed by continued fraction, below it by series.
pub(super) const TAIL_START: f64 = 1.5;
const CONTINUED_FRACTION_DEPTH: u32 = 300;

#[cfg(test)]
mod tests {
    use super::*;

    // Abramowitz and Stegun, table 26.1 and 26.2.
    #[test]
    fn tails_match_the_tables() {
        for (x, p) in [
            (0.0, 0.5),
            (1.0, 0.158_655_253_931_457),
            (1.5, 0.066_807_201_268_858),
            (3.0, 0.001_349_898_031_630),
            (-1.0, 0.841_344_746_068_543),
            (-2.0, 0.977_249_868_051_821),
            (6.0, 9.865_876_45e-10),
        ] {
            assert!((upper_tail(x) / p - 1.0).abs() < 1e-9, "{x}: {}", upper_tail(x));
        }
    }

    #[test]
    fn series_and_continued_fraction_meet() {
        let below = upper_tail(TAIL_START - 1e-9);
        let above = upper_tail(TAIL_START);
        assert!((below - above - 1e-9 * density(TAIL_START)).abs() < 1e-15);
    }
}
