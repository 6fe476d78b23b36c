//! Keys of one secure sum: fresh X25519 pairs, what is derived from them, and the sealing of shares.
//!
//! Each agent draws two pairs a sum (Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving
//! Machine Learning", round 0): one agrees on keys that seal shares, the other on keys of pairwise masks. The
//! second one's secret is shared out and may be given to the server if its owner drops out, so the two must never
//! be the same. Every derived key depends on the digest of the descriptor: keys of another model, plan, attempt or
//! roster don't fit.

use std::fmt;

use rand::{CryptoRng, RngCore};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce as AeadNonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use zeroize::Zeroize;

use crate::id::Digest;
use crate::secagg::roster::Seat;

/// Why a key or sealed bytes are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum KeyError {
    /// The other side's public key is of small order: the agreed key would be known to everybody.
    #[error("public key of seat {seat} is of small order, the agreed key would be no secret")]
    SmallOrder {
        /// Whose key.
        seat: Seat,
    },
    /// Sealed bytes don't open: changed, for another agent, another descriptor, or under another key.
    #[error("sealed shares from seat {from} to seat {to} don't open")]
    Sealed {
        /// Sender.
        from: Seat,
        /// Receiver.
        to: Seat,
    },
}

macro_rules! hex_32 {
    ($type:ident) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&hex::encode(self.0))
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                let mut bytes = [0; 32];
                hex::decode_to_slice(text.as_ref(), &mut bytes).map_err(serde::de::Error::custom)?;
                Ok(Self(bytes))
            }
        }
    };
}

/// 32 secret bytes: an X25519 private key or a seed. Erased when dropped, never printed; serialised for the agent's
/// own snapshot only.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// Full-entropy bytes from the caller's generator.
    #[must_use]
    pub fn random<R: RngCore + CryptoRng>(rng: &mut R) -> Self {
        let mut bytes = [0; 32];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// Takes over 32 bytes that are a secret already.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The X25519 public key of these bytes (RFC 7748: clamped before use).
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let secret = x25519_dalek::StaticSecret::from(self.0);
        PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }

    /// The X25519 shared secret with another agent's public key.
    ///
    /// # Errors
    /// [`KeyError::SmallOrder`] if that key makes the result independent of this secret.
    pub fn agree(&self, other: &PublicKey, seat: Seat) -> Result<Self, KeyError> {
        let secret = x25519_dalek::StaticSecret::from(self.0);
        let shared = secret.diffie_hellman(&x25519_dalek::PublicKey::from(other.0));
        if shared.was_contributory() {
            Ok(Self(shared.to_bytes()))
        } else {
            Err(KeyError::SmallOrder { seat })
        }
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

hex_32!(Secret);

/// An X25519 public key; in JSON 64 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// Wraps the 32 bytes of a public key.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

hex_32!(PublicKey);

/// An agent's part of the public graph seed: committed to first, revealed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nonce([u8; 32]);

impl Nonce {
    /// Fresh bytes from the caller's generator.
    #[must_use]
    pub fn random<R: RngCore + CryptoRng>(rng: &mut R) -> Self {
        let mut bytes = [0; 32];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

hex_32!(Nonce);

/// What a derived key or a commitment is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Label {
    /// The mask two agents share.
    PairMask,
    /// The mask an agent adds for itself.
    SelfMask,
    /// Sealing shares from one agent to another.
    Share,
    /// Commitment to the seed of the self mask.
    SelfSeed,
    /// Commitment to a part of the graph seed.
    GraphNonce,
    /// Order of the agents on the ring of the neighbour graph.
    GraphOrder,
}

impl Label {
    /// The text in every derivation; part of the wire form.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::PairMask => "tabmesh secagg pair mask v1",
            Self::SelfMask => "tabmesh secagg self mask v1",
            Self::Share => "tabmesh secagg share v1",
            Self::SelfSeed => "tabmesh secagg self seed v1",
            Self::GraphNonce => "tabmesh secagg graph nonce v1",
            Self::GraphOrder => "tabmesh secagg graph order v1",
        }
    }
}

/// HKDF-SHA256 (RFC 5869) of a secret: salt `tabmesh secagg v1`, info `label ‖ 00 ‖ H(descriptor) ‖ seat ‖ seat`,
/// seats as little-endian 16-bit numbers; 32 bytes out.
#[must_use]
pub fn derive(secret: &Secret, label: Label, descriptor: &Digest, seats: [Seat; 2]) -> Secret {
    let [first, second] = seats.map(|seat| seat.index().to_le_bytes());
    let info: [&[u8]; 5] = [label.text().as_bytes(), &[0], descriptor.as_bytes(), &first, &second];
    let mut out = [0; 32];
    // Unwrap safety: 32 bytes is one SHA-256 block, far below HKDF's limit of 255 blocks, the only failure there is.
    Salt::new(HKDF_SHA256, SALT)
        .extract(&secret.0)
        .expand(&info, HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut out))
        .expect("HKDF-SHA256 gives 32 bytes");
    Secret(out)
}

/// Key of the mask between two agents, the same from both sides.
#[must_use]
pub fn pair_mask_key(agreed: &Secret, descriptor: &Digest, one: Seat, other: Seat) -> Secret {
    derive(agreed, Label::PairMask, descriptor, [one.min(other), one.max(other)])
}

/// Key of the mask an agent adds for itself.
#[must_use]
pub fn self_mask_key(seed: &Secret, descriptor: &Digest, seat: Seat) -> Secret {
    derive(seed, Label::SelfMask, descriptor, [seat, seat])
}

/// SHA-256 of `label ‖ 00 ‖ H(descriptor) ‖ seat ‖ 32 bytes`: hides bytes of full entropy, and binds to them.
#[must_use]
pub fn commit(label: Label, descriptor: &Digest, seat: Seat, bytes: &[u8; 32]) -> Digest {
    let seat = seat.index().to_le_bytes();
    Digest::of(&[label.text().as_bytes(), &[0], descriptor.as_bytes(), &seat, bytes].concat())
}

/// Seals bytes from one agent to another under their agreed secret (ChaCha20-Poly1305).
///
/// The key belongs to one descriptor and one direction and seals once, so the nonce is zero.
#[must_use]
pub fn seal(agreed: &Secret, descriptor: &Digest, from: Seat, to: Seat, plain: &[u8]) -> Vec<u8> {
    let mut bytes = plain.to_vec();
    // Unwrap safety: sealing fails above 256 GiB only.
    share_key(agreed, descriptor, from, to)
        .seal_in_place_append_tag(
            AeadNonce::assume_unique_for_key([0; 12]),
            Aad::from(share_aad(descriptor, from, to)),
            &mut bytes,
        )
        .expect("shares are far below the cipher's limit");
    bytes
}

/// Opens what [`seal`] made.
///
/// # Errors
/// [`KeyError::Sealed`] if anything differs.
pub fn open(
    agreed: &Secret,
    descriptor: &Digest,
    from: Seat,
    to: Seat,
    sealed: &[u8],
) -> Result<Vec<u8>, KeyError> {
    let mut bytes = sealed.to_vec();
    let nonce = AeadNonce::assume_unique_for_key([0; 12]);
    let aad = Aad::from(share_aad(descriptor, from, to));
    let key = share_key(agreed, descriptor, from, to);
    let plain = key.open_in_place(nonce, aad, &mut bytes).map_err(|_| KeyError::Sealed { from, to })?.len();
    bytes.truncate(plain);
    Ok(bytes)
}

/// Bytes that sealing adds.
pub const SEAL_BYTES: usize = 16;

fn share_key(agreed: &Secret, descriptor: &Digest, from: Seat, to: Seat) -> LessSafeKey {
    let key = derive(agreed, Label::Share, descriptor, [from, to]);
    // Unwrap safety: the key has the algorithm's 32 bytes, the only thing that is checked.
    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &key.0).expect("a 32-byte key"))
}

fn share_aad(descriptor: &Digest, from: Seat, to: Seat) -> Vec<u8> {
    let (from, to) = (from.index().to_le_bytes(), to.index().to_le_bytes());
    [descriptor.as_bytes().as_slice(), &from, &to, b"share"].concat()
}

const SALT: &[u8] = b"tabmesh secagg v1";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    const A: Seat = Seat::new(1);
    const B: Seat = Seat::new(2);

    fn bytes(text: &str) -> [u8; 32] {
        let mut out = [0; 32];
        hex::decode_to_slice(text, &mut out).unwrap();
        out
    }

    #[test]
    fn agreement_is_the_published_vector() {
        // RFC 7748, section 6.1.
        let alice = Secret(bytes("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"));
        let bob = Secret(bytes("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"));
        let shared = bytes("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742");
        assert_eq!(alice.agree(&bob.public(), B).unwrap().as_bytes(), &shared);
        assert_eq!(bob.agree(&alice.public(), A).unwrap().as_bytes(), &shared);
    }

    #[test]
    fn keys_of_small_order_are_refused() {
        let secret = Secret::random(&mut ChaCha20Rng::seed_from_u64(1));
        for small in [[0; 32], {
            let mut one = [0; 32];
            one[0] = 1;
            one
        }] {
            assert_eq!(secret.agree(&PublicKey(small), B), Err(KeyError::SmallOrder { seat: B }));
        }
    }

    #[test]
    fn both_sides_agree_and_every_input_of_a_derivation_counts() {
        let mut rng = ChaCha20Rng::seed_from_u64(2);
        let (a, b) = (Secret::random(&mut rng), Secret::random(&mut rng));
        let (ab, ba) = (a.agree(&b.public(), B).unwrap(), b.agree(&a.public(), A).unwrap());
        assert_eq!(ab, ba);
        let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
        assert_eq!(pair_mask_key(&ab, &one, A, B), pair_mask_key(&ab, &one, B, A));
        let base = derive(&ab, Label::PairMask, &one, [A, B]);
        for changed in [
            derive(&a, Label::PairMask, &one, [A, B]),
            derive(&ab, Label::SelfMask, &one, [A, B]),
            derive(&ab, Label::PairMask, &other, [A, B]),
            derive(&ab, Label::PairMask, &one, [B, A]),
        ] {
            assert_ne!(base, changed);
        }
    }

    #[test]
    fn sealed_bytes_open_for_their_receiver_descriptor_and_direction_only() {
        let agreed = Secret::random(&mut ChaCha20Rng::seed_from_u64(3));
        let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
        let sealed = seal(&agreed, &one, A, B, b"shares");
        assert_eq!(sealed.len(), b"shares".len() + SEAL_BYTES);
        assert_eq!(open(&agreed, &one, A, B, &sealed).unwrap(), b"shares");
        let refused = Err(KeyError::Sealed { from: A, to: B });
        assert_eq!(open(&agreed, &other, A, B, &sealed), refused);
        assert!(open(&agreed, &one, B, A, &sealed).is_err());
        for position in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[position] ^= 1;
            assert_eq!(open(&agreed, &one, A, B, &changed), refused, "byte {position}");
        }
        assert!(open(&agreed, &one, A, B, &[]).is_err());
    }

    #[test]
    fn secrets_are_not_printed() {
        assert_eq!(format!("{:?}", Secret([7; 32])), "Secret(..)");
    }
}
