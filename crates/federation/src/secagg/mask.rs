//! Masks, and the ring they live in: integers modulo 2³² or 2⁶⁴.
//!
//! A mask is the ChaCha20 keystream of a 256-bit key (RFC 8439, block counter from 1), cut in chunks of 16 KiB
//! whose number is the nonce, read as little-endian words. The modulus is a power of two, so every word is uniform
//! without rejection. Signed values are taken modulo 2^b; a descriptor's bound keeps the sum of all agents within
//! half of it, so it comes back unchanged.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::secagg::keys::Secret;

/// Bits of the modulus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Width {
    /// 2³²: half the traffic and half the keystream.
    Bits32,
    /// 2⁶⁴.
    Bits64,
}

impl Width {
    /// Bytes of a word.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bits32 => 4,
            Self::Bits64 => 8,
        }
    }

    /// Largest sum that comes back unchanged: 2^(b−1) − 1.
    #[must_use]
    pub const fn max_sum(self) -> u64 {
        match self {
            Self::Bits32 => i32::MAX as u64,
            Self::Bits64 => i64::MAX as u64,
        }
    }
}

/// Bytes that are no vector of the expected shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("masked vector: expected {expected} bytes, got {got}")]
pub struct WrongLength {
    /// Bytes expected.
    pub expected: usize,
    /// Bytes found.
    pub got: usize,
}

/// Whether a mask is put on or taken off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// Adds it.
    Plus,
    /// Subtracts it.
    Minus,
}

impl Sign {
    /// The other one.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Plus => Self::Minus,
            Self::Minus => Self::Plus,
        }
    }
}

/// A vector of words modulo 2^b.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RingVector {
    /// Modulo 2³².
    Narrow(Vec<u32>),
    /// Modulo 2⁶⁴.
    Wide(Vec<u64>),
}

impl RingVector {
    /// Zeros.
    #[must_use]
    pub fn zeros(width: Width, len: usize) -> Self {
        match width {
            Width::Bits32 => Self::Narrow(vec![0; len]),
            Width::Bits64 => Self::Wide(vec![0; len]),
        }
    }

    /// Signed values modulo 2^b, those beyond ±`max_abs` brought to it.
    ///
    /// Clamping rather than failing: a failure that depends on data would itself tell something.
    #[must_use]
    pub fn encode(width: Width, values: &[i64], max_abs: u64) -> Self {
        let most = i64::try_from(max_abs).unwrap_or(i64::MAX);
        let clamped = values.iter().map(|value| (*value).clamp(-most, most));
        match width {
            // The casts take a negative value to 2^b minus its magnitude.
            Width::Bits32 => Self::Narrow(clamped.map(|value| value as u32).collect()),
            Width::Bits64 => Self::Wide(clamped.map(|value| value as u64).collect()),
        }
    }

    /// The signed value nearest zero of each word.
    #[must_use]
    pub fn decode(&self) -> Vec<i64> {
        match self {
            Self::Narrow(words) => words.iter().map(|word| i64::from(*word as i32)).collect(),
            Self::Wide(words) => words.iter().map(|word| *word as i64).collect(),
        }
    }

    /// Bits of the modulus.
    #[must_use]
    pub fn width(&self) -> Width {
        match self {
            Self::Narrow(_) => Width::Bits32,
            Self::Wide(_) => Width::Bits64,
        }
    }

    /// Words.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Narrow(words) => words.len(),
            Self::Wide(words) => words.len(),
        }
    }

    /// Whether it has no words.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Little-endian words, in order: a size that values can't move.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Narrow(words) => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
            Self::Wide(words) => words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        }
    }

    /// Reads what [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`WrongLength`] unless there are exactly `len` words.
    pub fn from_bytes(width: Width, len: usize, bytes: &[u8]) -> Result<Self, WrongLength> {
        let expected = len.saturating_mul(width.bytes());
        if bytes.len() != expected {
            return Err(WrongLength { expected, got: bytes.len() });
        }
        Ok(match width {
            Width::Bits32 => {
                Self::Narrow(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
            }
            Width::Bits64 => {
                Self::Wide(bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
            }
        })
    }

    /// Adds the words that `bytes` hold, in place.
    ///
    /// # Errors
    /// [`WrongLength`] unless there are exactly as many; nothing is changed then.
    pub fn add_bytes(&mut self, bytes: &[u8]) -> Result<(), WrongLength> {
        let expected = self.len() * self.width().bytes();
        if bytes.len() != expected {
            return Err(WrongLength { expected, got: bytes.len() });
        }
        self.combine(0, bytes, Sign::Plus);
        Ok(())
    }

    /// Puts a mask on or takes it off.
    pub fn apply(&mut self, key: &Secret, sign: Sign) {
        let keystream = Keystream::new(key);
        let words_per_chunk = CHUNK_BYTES / self.width().bytes();
        let mut chunk = [0; CHUNK_BYTES];
        for (number, start) in (0..self.len()).step_by(words_per_chunk).enumerate() {
            let words = words_per_chunk.min(self.len() - start);
            let bytes = words * self.width().bytes();
            let Some(part) = chunk.get_mut(..bytes) else { return };
            keystream.fill(number as u64, part);
            self.combine(start, part, sign);
        }
    }

    /// Adds or subtracts words from position `start` on.
    fn combine(&mut self, start: usize, bytes: &[u8], sign: Sign) {
        match self {
            Self::Narrow(words) => {
                let pairs = words.iter_mut().skip(start).zip(bytes.as_chunks().0);
                match sign {
                    Sign::Plus => {
                        pairs.for_each(|(word, by)| *word = word.wrapping_add(u32::from_le_bytes(*by)))
                    }
                    Sign::Minus => {
                        pairs.for_each(|(word, by)| *word = word.wrapping_sub(u32::from_le_bytes(*by)))
                    }
                }
            }
            Self::Wide(words) => {
                let pairs = words.iter_mut().skip(start).zip(bytes.as_chunks().0);
                match sign {
                    Sign::Plus => {
                        pairs.for_each(|(word, by)| *word = word.wrapping_add(u64::from_le_bytes(*by)))
                    }
                    Sign::Minus => {
                        pairs.for_each(|(word, by)| *word = word.wrapping_sub(u64::from_le_bytes(*by)))
                    }
                }
            }
        }
    }
}

/// The keystream of one key, chunk by chunk.
pub struct Keystream {
    key: LessSafeKey,
}

impl Keystream {
    /// The keystream of a 256-bit key.
    #[must_use]
    pub fn new(key: &Secret) -> Self {
        // Unwrap safety: the key has the algorithm's 32 bytes, the only thing that is checked.
        let key = UnboundKey::new(&CHACHA20_POLY1305, key.as_bytes()).expect("a 32-byte key");
        Self { key: LessSafeKey::new(key) }
    }

    /// Fills `out`, at most [`CHUNK_BYTES`], with the beginning of a chunk.
    pub fn fill(&self, chunk: u64, out: &mut [u8]) {
        // Encrypting zeros gives the keystream; the tag isn't used. The nonce is 0₃₂ ‖ chunk, so no two chunks of
        // a key share keystream.
        out.fill(0);
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&chunk.to_le_bytes());
        // Unwrap safety: sealing fails above 256 GiB only.
        let _tag = self
            .key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), out)
            .expect("a chunk is far below the cipher's limit");
    }
}

impl std::fmt::Debug for Keystream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keystream(..)")
    }
}

/// Bytes of keystream under one nonce; fits a processor's first cache together with what it is added to.
pub const CHUNK_BYTES: usize = 16 << 10;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;
    use rand::{RngCore, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::*;

    const WIDTHS: [Width; 2] = [Width::Bits32, Width::Bits64];

    // Another implementation of the cipher (rand_chacha, 64-bit nonce as its stream number) gives the same words:
    // chunk 0 from block 1 on, as RFC 8439 counts for encryption.
    #[test]
    fn chunk_zero_is_the_keystream_another_library_gives() {
        let key = [7; 32];
        let mut other = ChaCha20Rng::from_seed(key);
        other.set_word_pos(16);
        let mut expected = vec![0; 1000];
        other.fill_bytes(&mut expected);
        let mut got = vec![0; 1000];
        Keystream::new(&Secret::from_bytes(key)).fill(0, &mut got);
        assert_eq!(got, expected);
    }

    proptest! {
        #[test]
        fn sums_within_half_the_modulus_come_back(
            rows in proptest::collection::vec(proptest::collection::vec(-1_000_000_i64..1_000_000, 5), 1..40)
        ) {
            for width in WIDTHS {
                let mut total = RingVector::zeros(width, 5);
                for row in &rows {
                    total.add_bytes(&RingVector::encode(width, row, 1_000_000).to_bytes()).unwrap();
                }
                let plain: Vec<i64> = (0..5).map(|i| rows.iter().map(|row| row[i]).sum()).collect();
                prop_assert_eq!(total.decode(), plain);
            }
        }
    }

    #[test]
    fn a_mask_taken_off_leaves_nothing_behind_at_every_length() {
        let key = Secret::from_bytes([3; 32]);
        for width in WIDTHS {
            let per_chunk = CHUNK_BYTES / width.bytes();
            for len in [0, 1, per_chunk - 1, per_chunk, per_chunk + 1, 3 * per_chunk + 5] {
                let values: Vec<i64> = (0..len as i64).map(|i| i * 37 - 5_000).collect();
                let plain = RingVector::encode(width, &values, 1 << 30);
                let mut masked = plain.clone();
                masked.apply(&key, Sign::Plus);
                assert!(len == 0 || masked != plain);
                masked.apply(&key, Sign::Plus.opposite());
                assert_eq!(masked, plain);
            }
        }
    }

    #[test]
    fn chunks_and_keys_give_different_streams() {
        let mut streams = std::collections::BTreeSet::new();
        for key in [[1; 32], [2; 32]] {
            for chunk in [0, 1, 2, u64::MAX] {
                let mut bytes = [0; 64];
                Keystream::new(&Secret::from_bytes(key)).fill(chunk, &mut bytes);
                assert!(streams.insert(bytes.to_vec()));
            }
        }
    }

    #[test]
    fn values_beyond_the_bound_are_brought_to_it() {
        for width in WIDTHS {
            let encoded = RingVector::encode(width, &[i64::MIN, -11, -10, 10, 11, i64::MAX], 10);
            assert_eq!(encoded.decode(), [-10, -10, -10, 10, 10, 10]);
        }
        let most = Width::Bits64.max_sum();
        assert_eq!(RingVector::encode(Width::Bits64, &[i64::MIN], most).decode(), [-i64::MAX]);
    }

    #[test]
    fn other_lengths_are_refused_and_change_nothing() {
        let mut total = RingVector::zeros(Width::Bits32, 2);
        let refused = WrongLength { expected: 8, got: 9 };
        assert_eq!(total.add_bytes(&[1; 9]), Err(refused));
        assert_eq!(RingVector::from_bytes(Width::Bits32, 2, &[1; 9]), Err(refused));
        assert_eq!(total, RingVector::zeros(Width::Bits32, 2));
        let wide = RingVector::Wide(vec![1, u64::MAX]);
        assert_eq!(RingVector::from_bytes(Width::Bits64, 2, &wide.to_bytes()), Ok(wide));
    }
}
