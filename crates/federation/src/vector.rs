//! An integer vector together with the digest of its bytes as stored and sent.
//!
//! A vector of a large adapter is hashed once, where it comes in; whoever is handed a [`Vector`] compares digests.

use std::sync::Arc;

use crate::id::Digest;

/// An update or count vector and its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vector {
    values: Arc<[i64]>,
    digest: Digest,
}

impl Vector {
    /// Takes integers and hashes them as [`Digest::of_payload`] says.
    #[must_use]
    pub fn new(values: impl Into<Arc<[i64]>>) -> Self {
        let values = values.into();
        let digest = Digest::of_payload(&values);
        Self { values, digest }
    }

    /// Reads little-endian 8-byte words whose SHA-256 the caller has found to be `digest`; nothing unless their
    /// length is a multiple of eight.
    ///
    /// For bytes that a reader has already checked, as the wire does with every payload.
    #[must_use]
    pub fn from_checked_bytes(bytes: &[u8], digest: Digest) -> Option<Self> {
        let (words, rest) = bytes.as_chunks();
        let values = words.iter().map(|word| i64::from_le_bytes(*word)).collect();
        rest.is_empty().then_some(Self { values, digest })
    }

    /// The integers.
    #[must_use]
    pub fn values(&self) -> &Arc<[i64]> {
        &self.values
    }

    /// SHA-256 of the bytes.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_integers_name_the_same_vector() {
        let values = [1_i64, -2, i64::MIN];
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let read = Vector::from_checked_bytes(&bytes, Digest::of(&bytes));
        assert_eq!(read, Some(Vector::new(values)));
        assert_eq!(Vector::from_checked_bytes(&bytes[1..], Digest::of(&bytes[1..])), None);
    }
}
