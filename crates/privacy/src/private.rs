//! The type that may leave a domain.
//!
//! A [`Private`] is the output of a mechanism of this crate, or bytes the ledger has a committed entry for. There is
//! no public constructor: code that sends data can ask for a `Private` and know that noise was added. Reading one is
//! free (it is differentially private already); making one is not.

use ring::digest::{SHA256, digest};
use std::fmt;
use std::sync::OnceLock;

/// SHA-256 of bytes as stored.
pub type Digest = [u8; 32];

/// A value that a mechanism of this crate has made differentially private.
///
/// Code outside the crate can name the type and read it,
///
/// ```
/// use tabmesh_privacy::private::Private;
///
/// fn size(noised: &Private<Vec<i64>>) -> usize {
///     noised.dimension()
/// }
/// ```
///
/// but it can neither write one down
///
/// ```compile_fail,E0451
/// use tabmesh_privacy::private::Private;
///
/// let rows = vec![1_i64, 2, 3];
/// let _: Private<Vec<i64>> = Private { value: rows };
/// ```
///
/// nor wrap data into one.
///
/// ```compile_fail,E0624
/// use tabmesh_privacy::private::Private;
///
/// let rows = vec![1_i64, 2, 3];
/// let _ = Private::new(rows);
/// ```
pub struct Private<T> {
    value: T,
    /// Digest of a payload, once somebody asked for it: large ones are hashed once on their way out.
    digest: OnceLock<Digest>,
}

impl<T: Clone> Clone for Private<T> {
    fn clone(&self) -> Self {
        Self { value: self.value.clone(), digest: self.digest.clone() }
    }
}

impl<T: PartialEq> PartialEq for Private<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl<T: Eq> Eq for Private<T> {}

impl<T> Private<T> {
    /// Wraps mechanism output, or stored bytes a committed ledger entry names.
    pub(crate) fn new(value: T) -> Self {
        Self { value, digest: OnceLock::new() }
    }

    /// The value itself.
    #[must_use]
    pub fn into_inner(self) -> T {
        self.value
    }
}

impl Private<Vec<i64>> {
    /// The noised vector.
    #[must_use]
    pub fn as_slice(&self) -> &[i64] {
        &self.value
    }

    /// Number of coordinates.
    #[must_use]
    pub fn dimension(&self) -> usize {
        self.value.len()
    }

    /// Fixed-width little-endian bytes, eight per coordinate: the size depends on the dimension alone, never on
    /// values (a varint would tell magnitudes apart by length).
    #[must_use]
    pub fn encode(&self) -> Private<Vec<u8>> {
        Private::new(self.value.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    /// The vector under a mask, as it goes into a secure sum: each value brought within ±`max_abs` and added to a word
    /// of the mask modulo 2ᵇ, as little-endian words. Nothing unless the mask has a word for each coordinate.
    ///
    /// Whatever the mask is, the noise of the vector is in the result.
    #[must_use]
    pub fn masked(&self, mask: Mask<'_>, max_abs: u64) -> Option<Private<Vec<u8>>> {
        let most = i64::try_from(max_abs).unwrap_or(i64::MAX);
        let bounded = self.value.iter().map(|value| (*value).clamp(-most, most));
        // The casts take a negative value to 2ᵇ minus its magnitude.
        let bytes = match mask {
            Mask::Narrow(words) if words.len() == self.value.len() => {
                bounded.zip(words).flat_map(|(v, word)| word.wrapping_add(v as u32).to_le_bytes()).collect()
            }
            Mask::Wide(words) if words.len() == self.value.len() => {
                bounded.zip(words).flat_map(|(v, word)| word.wrapping_add(v as u64).to_le_bytes()).collect()
            }
            Mask::Narrow(_) | Mask::Wide(_) => return None,
        };
        Some(Private::new(bytes))
    }
}

/// A one-time mask: a word modulo 2ᵇ for each coordinate of a vector.
#[derive(Debug, Clone, Copy)]
pub enum Mask<'a> {
    /// Modulo 2³².
    Narrow(&'a [u32]),
    /// Modulo 2⁶⁴.
    Wide(&'a [u64]),
}

impl Private<Vec<u8>> {
    /// The bytes to store and to send.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.value
    }

    /// SHA-256 of the bytes; the ledger's commit entry names it.
    #[must_use]
    pub fn payload_digest(&self) -> Digest {
        *self.digest.get_or_init(|| sha256(&self.value))
    }
}

impl<T> fmt::Debug for Private<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Private(..)")
    }
}

/// Reads a vector written by [`Private::<Vec<i64>>::encode`]; nothing unless the length is a multiple of eight.
///
/// For receivers: the result is plain data and can't be turned back into a [`Private`].
#[must_use]
pub fn decode_vector(bytes: &[u8]) -> Option<Vec<i64>> {
    let (chunks, rest) = bytes.as_chunks::<8>();
    rest.is_empty().then(|| chunks.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect())
}

/// SHA-256 of some bytes.
#[must_use]
pub fn sha256(bytes: &[u8]) -> Digest {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

/// Serde form of a digest: 64 hex digits.
pub(crate) mod hex_digest {
    use super::Digest;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(digest))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut digest = [0; 32];
        hex::decode_to_slice(&text, &mut digest).map_err(D::Error::custom)?;
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoding_has_a_size_that_values_cannot_move() {
        let small = Private::new(vec![0i64, 0, 1]).encode();
        let large = Private::new(vec![i64::MIN, i64::MAX, -1]).encode();
        assert_eq!(small.as_bytes().len(), 24);
        assert_eq!(large.as_bytes().len(), 24);
        assert_eq!(decode_vector(large.as_bytes()), Some(vec![i64::MIN, i64::MAX, -1]));
        assert_eq!(decode_vector(&large.as_bytes()[1..]), None);
    }

    #[test]
    fn a_mask_is_added_to_bounded_values_modulo_the_ring() {
        let noised = Private::new(vec![1_i64, -2, 900, -900]);
        let wide = noised.masked(Mask::Wide(&[u64::MAX, 1, 10, 10]), 100).unwrap();
        assert_eq!(decode_vector(wide.as_bytes()), Some(vec![0, -1, 110, -90]));
        let narrow = noised.masked(Mask::Narrow(&[u32::MAX, 1, 10, 10]), 100).unwrap();
        let words: Vec<i32> =
            narrow.as_bytes().as_chunks().0.iter().map(|word| i32::from_le_bytes(*word)).collect();
        assert_eq!(words, [0, -1, 110, -90]);
        assert!(noised.masked(Mask::Wide(&[0; 3]), 100).is_none());
    }

    #[test]
    fn digest_is_sha256_of_the_bytes() {
        // FIPS 180-4 test vector: SHA-256 of the empty string.
        let empty = Private::new(Vec::<u8>::new());
        assert_eq!(
            hex::encode(empty.payload_digest()),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn debug_output_shows_no_values() {
        assert_eq!(format!("{:?}", Private::new(vec![42i64])), "Private(..)");
    }
}
