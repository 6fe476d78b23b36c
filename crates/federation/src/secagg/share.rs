//! Shamir's shares of 32-byte secrets: any `threshold` of them give the secret back, fewer tell nothing.
//!
//! A secret is five limbs of 52 bits, each the constant term of its own polynomial over the field of
//! p = 2⁶¹ − 1 elements (Shamir 1979, "How to share a secret"); a holder's share is the five values at its seat + 1.
//! Field arithmetic takes the same steps whatever the values are. The naive twin in the tests uses big remainders.

use std::collections::BTreeMap;

use rand::{CryptoRng, RngCore};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroize;

use crate::secagg::keys::Secret;
use crate::secagg::roster::Seat;

/// Why shares can't be made or joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ShareError {
    /// A threshold outside 1 to the number of holders.
    #[error("share threshold: expected 1 to {holders}, got {threshold}")]
    Threshold {
        /// Shares needed.
        threshold: usize,
        /// Holders there are.
        holders: usize,
    },
    /// Fewer shares than the threshold.
    #[error("too few shares: expected {threshold}, got {got}")]
    TooFew {
        /// Shares needed.
        threshold: usize,
        /// Shares given.
        got: usize,
    },
    /// A number that is no field element, or bytes of another length.
    #[error("not a share: expected five numbers below 2^61 - 1 in {SHARE_BYTES} bytes")]
    Malformed,
    /// The joined limbs are no 32-byte secret: at least one share is wrong.
    #[error("the shares don't join to a 32-byte secret: at least one of them is wrong")]
    Wrong,
}

/// One holder's share; the holder's seat says at which point. In JSON 80 hex digits.
#[derive(Clone, PartialEq, Eq)]
pub struct Share([u64; LIMBS]);

impl Share {
    /// Little-endian bytes, eight a limb.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; SHARE_BYTES] {
        let mut bytes = [0; SHARE_BYTES];
        for (to, limb) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(&self.0) {
            *to = limb.to_le_bytes();
        }
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`ShareError::Malformed`] for another length or a number that is no field element.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ShareError> {
        let (chunks, rest) = bytes.as_chunks::<8>();
        let limbs: Vec<u64> = chunks.iter().map(|chunk| u64::from_le_bytes(*chunk)).collect();
        match <[u64; LIMBS]>::try_from(limbs) {
            Ok(limbs) if rest.is_empty() && limbs.iter().all(|limb| *limb < P) => Ok(Self(limbs)),
            _ => Err(ShareError::Malformed),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Share(..)")
    }
}

impl Serialize for Share {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(self.to_bytes()))
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let bytes = hex::decode(text.as_ref()).map_err(D::Error::custom)?;
        Self::from_bytes(&bytes).map_err(D::Error::custom)
    }
}

/// Shares a secret out to `holders`, any `threshold` of whom can join it.
///
/// # Errors
/// [`ShareError::Threshold`] if that many holders don't exist, or for a threshold of zero.
pub fn split<R: RngCore + CryptoRng>(
    secret: &Secret,
    threshold: usize,
    holders: impl ExactSizeIterator<Item = Seat>,
    rng: &mut R,
) -> Result<BTreeMap<Seat, Share>, ShareError> {
    if !(1..=holders.len()).contains(&threshold) {
        return Err(ShareError::Threshold { threshold, holders: holders.len() });
    }
    let mut polynomials: Vec<[u64; LIMBS]> = vec![limbs(secret)];
    polynomials.extend((1..threshold).map(|_| std::array::from_fn(|_| element(rng))));
    let shares = holders
        .map(|holder| {
            let x = point(holder);
            let at = |limb: usize| {
                // Horner's rule from the highest coefficient down.
                polynomials
                    .iter()
                    .rev()
                    .fold(0, |sum, terms| add(mul(sum, x), terms.get(limb).copied().unwrap_or(0)))
            };
            (holder, Share(std::array::from_fn(at)))
        })
        .collect();
    polynomials.iter_mut().for_each(Zeroize::zeroize);
    Ok(shares)
}

/// Joins shares by Lagrange interpolation at 0; the first `threshold` of them are used.
///
/// # Errors
/// [`ShareError::TooFew`], or [`ShareError::Wrong`] if the result is visibly no secret. A wrong share isn't always
/// visible: hold the result against a public key or a commitment.
pub fn join(shares: &[(Seat, &Share)], threshold: usize) -> Result<Secret, ShareError> {
    let used = match shares.get(..threshold) {
        Some(used) if threshold > 0 => used,
        _ => return Err(ShareError::TooFew { threshold, got: shares.len() }),
    };
    let points: Vec<u64> = used.iter().map(|(seat, _)| point(*seat)).collect();
    let mut sums = [0; LIMBS];
    for (j, (_, share)) in used.iter().enumerate() {
        let weight = lagrange_at_zero(&points, j);
        for (sum, limb) in sums.iter_mut().zip(&share.0) {
            *sum = add(*sum, mul(weight, *limb));
        }
    }
    secret(&sums)
}

/// ∏ x_m / (x_m − x_j) over m ≠ j.
fn lagrange_at_zero(points: &[u64], j: usize) -> u64 {
    let own = points.get(j).copied().unwrap_or(0);
    let (mut above, mut below) = (1, 1);
    for (m, x) in points.iter().enumerate() {
        if m != j {
            above = mul(above, *x);
            below = mul(below, subtract(*x, own));
        }
    }
    mul(above, inverse(below))
}

fn limbs(secret: &Secret) -> [u64; LIMBS] {
    let bytes = secret.as_bytes();
    // Limb i holds bits 52·i to 52·i + 51, read bit by bit position: no branch depends on a value.
    std::array::from_fn(|i| {
        (0..LIMB_BITS).fold(0, |limb, bit| {
            let at = i * LIMB_BITS + bit;
            let byte = bytes.get(at / 8).copied().unwrap_or(0);
            limb | (u64::from((byte >> (at % 8)) & 1) << bit)
        })
    })
}

fn secret(limbs: &[u64; LIMBS]) -> Result<Secret, ShareError> {
    let beyond = limbs.iter().zip(LIMB_WIDTHS).fold(0, |beyond, (limb, width)| beyond | (limb >> width));
    if beyond != 0 {
        return Err(ShareError::Wrong);
    }
    let mut bytes = [0_u8; 32];
    for (i, limb) in limbs.iter().enumerate() {
        for bit in 0..LIMB_BITS {
            let at = i * LIMB_BITS + bit;
            if let Some(byte) = bytes.get_mut(at / 8) {
                *byte |= (((limb >> bit) & 1) as u8) << (at % 8);
            }
        }
    }
    Ok(Secret::from_bytes(bytes))
}

/// A holder's point: never zero, where the secret is.
fn point(seat: Seat) -> u64 {
    u64::from(seat.index()) + 1
}

/// A uniform field element: 61 random bits, drawn again for the one value that is p.
fn element<R: RngCore + CryptoRng>(rng: &mut R) -> u64 {
    loop {
        let value = rng.next_u64() & P;
        if value != P {
            return value;
        }
    }
}

/// From 0..2p down to 0..p without a branch.
fn reduce(value: u64) -> u64 {
    let reduced = value.wrapping_sub(P);
    let borrow = (reduced >> 63).wrapping_neg();
    reduced.wrapping_add(P & borrow)
}

fn add(a: u64, b: u64) -> u64 {
    reduce(a + b)
}

fn subtract(a: u64, b: u64) -> u64 {
    reduce(a + P - b)
}

/// 2⁶¹ ≡ 1, so the upper half of a product is added to its lower half.
fn mul(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    reduce((product as u64 & P) + (product >> 61) as u64)
}

/// a^(p − 2), by Fermat.
fn inverse(a: u64) -> u64 {
    let (mut result, mut power) = (1, a);
    // p − 2 in binary is 59 ones, a zero and a one: the exponent is public, so branching on it tells nothing.
    for bit in 0..61 {
        if ((P - 2) >> bit) & 1 == 1 {
            result = mul(result, power);
        }
        power = mul(power, power);
    }
    result
}

/// Bytes of a share.
pub const SHARE_BYTES: usize = LIMBS * 8;
/// The Mersenne prime 2⁶¹ − 1.
const P: u64 = (1 << 61) - 1;
const LIMBS: usize = 5;
const LIMB_BITS: usize = 52;
/// 4 · 52 + 48 = 256 bits.
const LIMB_WIDTHS: [u32; LIMBS] = [52, 52, 52, 52, 48];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    // The naive twin: remainders of 128-bit numbers, and the extended Euclidean algorithm instead of Fermat.
    mod twin {
        use super::P;

        pub(super) fn mul(a: u64, b: u64) -> u64 {
            ((u128::from(a) * u128::from(b)) % u128::from(P)) as u64
        }

        pub(super) fn inverse(a: u64) -> u64 {
            let (mut r, mut next_r, mut t, mut next_t) = (i128::from(P), i128::from(a), 0_i128, 1_i128);
            while next_r != 0 {
                let quotient = r / next_r;
                (r, next_r) = (next_r, r - quotient * next_r);
                (t, next_t) = (next_t, t - quotient * next_t);
            }
            u64::try_from(t.rem_euclid(i128::from(P))).unwrap()
        }

        /// Value at zero of the polynomial through the points, by Newton's divided differences.
        pub(super) fn at_zero(points: &[(u64, u64)]) -> u64 {
            let p = u128::from(P);
            let mut table: Vec<u64> = points.iter().map(|(_, y)| *y).collect();
            for order in 1..points.len() {
                for i in (order..points.len()).rev() {
                    let rise = ((u128::from(table[i]) + p - u128::from(table[i - 1])) % p) as u64;
                    let run = ((u128::from(points[i].0) + p - u128::from(points[i - order].0)) % p) as u64;
                    table[i] = mul(rise, inverse(run));
                }
            }
            let mut value = 0_u64;
            for i in (0..points.len()).rev() {
                let minus_x = P - points[i].0 % P;
                value = ((u128::from(mul(value, minus_x)) + u128::from(table[i])) % p) as u64;
            }
            value
        }
    }

    fn seats(n: u16) -> Vec<Seat> {
        (0..n).map(Seat::new).collect()
    }

    proptest! {
        #[test]
        fn field_arithmetic_is_the_twins(a in 0..P, b in 1..P) {
            prop_assert_eq!(mul(a, b), twin::mul(a, b));
            prop_assert_eq!(inverse(b), twin::inverse(b));
            prop_assert_eq!(add(subtract(a, b), b), a);
            prop_assert_eq!(u128::from(add(a, b)), (u128::from(a) + u128::from(b)) % u128::from(P));
        }

        #[test]
        fn any_threshold_of_holders_join_the_secret_as_the_twin_does(
            bytes in any::<[u8; 32]>(), holders in 1_u16..40, cut in any::<u16>(), seed in any::<u64>()
        ) {
            let secret = Secret::from_bytes(bytes);
            let threshold = usize::from(cut % holders) + 1;
            let mut rng = ChaCha20Rng::seed_from_u64(seed);
            let shares = split(&secret, threshold, seats(holders).into_iter(), &mut rng).unwrap();
            // A rotation by the seed picks which holders answer.
            let mut given: Vec<(Seat, &Share)> = shares.iter().map(|(seat, share)| (*seat, share)).collect();
            given.rotate_left((seed % u64::from(holders)) as usize);
            prop_assert_eq!(join(&given, threshold), Ok(secret.clone()));
            let naive: [u64; LIMBS] = std::array::from_fn(|limb| {
                let points: Vec<(u64, u64)> =
                    given[..threshold].iter().map(|(seat, share)| (point(*seat), share.0[limb])).collect();
                twin::at_zero(&points)
            });
            prop_assert_eq!(naive, limbs(&secret));
            let got = threshold - 1;
            prop_assert_eq!(join(&given[..got], threshold), Err(ShareError::TooFew { threshold, got }));
        }
    }

    #[test]
    fn ends_of_the_range_survive() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        for bytes in [[0; 32], [255; 32], {
            let mut top = [0; 32];
            top[31] = 128;
            top
        }] {
            let secret = Secret::from_bytes(bytes);
            let shares = split(&secret, 3, seats(5).into_iter(), &mut rng).unwrap();
            let given: Vec<(Seat, &Share)> =
                shares.iter().map(|(seat, share)| (*seat, share)).skip(2).collect();
            assert_eq!(join(&given, 3), Ok(secret));
        }
        for (a, b) in [(P - 1, P - 1), (0, P - 1), (1, 0)] {
            assert_eq!(mul(a, b), twin::mul(a, b));
        }
    }

    // With one share below the threshold every secret is equally likely: the missing share decides. Shown by finding,
    // for another secret, the missing share that gives it.
    #[test]
    fn fewer_shares_fit_every_secret() {
        let mut rng = ChaCha20Rng::seed_from_u64(2);
        let shares = split(&Secret::from_bytes([1; 32]), 3, seats(3).into_iter(), &mut rng).unwrap();
        let known: Vec<(Seat, Share)> = shares.into_iter().take(2).collect();
        let wanted = limbs(&Secret::from_bytes([200; 32]));
        let points = [1, 2, 3];
        let missing = Share(std::array::from_fn(|limb| {
            let sum = known
                .iter()
                .enumerate()
                .fold(0, |sum, (j, (_, share))| add(sum, mul(lagrange_at_zero(&points, j), share.0[limb])));
            mul(subtract(wanted[limb], sum), inverse(lagrange_at_zero(&points, 2)))
        }));
        let all = [(known[0].0, &known[0].1), (known[1].0, &known[1].1), (Seat::new(2), &missing)];
        assert_eq!(join(&all, 3), Ok(Secret::from_bytes([200; 32])));
    }

    #[test]
    fn a_wrong_share_is_never_the_right_secret() {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let secret = Secret::from_bytes([9; 32]);
        let mut shares = split(&secret, 3, seats(4).into_iter(), &mut rng).unwrap();
        shares.get_mut(&Seat::new(1)).unwrap().0[4] ^= 1;
        let given: Vec<(Seat, &Share)> = shares.iter().map(|(seat, share)| (*seat, share)).collect();
        assert_ne!(join(&given, 3), Ok(secret));
    }

    #[test]
    fn thresholds_and_foreign_bytes_are_refused() {
        let mut rng = ChaCha20Rng::seed_from_u64(4);
        let secret = Secret::from_bytes([3; 32]);
        for threshold in [0, 4] {
            let refused = split(&secret, threshold, seats(3).into_iter(), &mut rng);
            assert_eq!(refused, Err(ShareError::Threshold { threshold, holders: 3 }));
        }
        assert!(matches!(join(&[], 0), Err(ShareError::TooFew { .. })));
        let share = split(&secret, 2, seats(3).into_iter(), &mut rng).unwrap().remove(&Seat::new(0)).unwrap();
        assert_eq!(Share::from_bytes(&share.to_bytes()), Ok(share.clone()));
        assert_eq!(Share::from_bytes(&share.to_bytes()[1..]), Err(ShareError::Malformed));
        assert_eq!(Share::from_bytes(&[255; SHARE_BYTES]), Err(ShareError::Malformed));
        let json = serde_json::to_string(&share).unwrap();
        assert_eq!(serde_json::from_str::<Share>(&json).unwrap(), share);
        assert_eq!(format!("{share:?}"), "Share(..)");
    }
}
