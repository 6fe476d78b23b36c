//! Ed25519 signatures that say what they are for.
//!
//! Every signature covers `context ‖ 0x00 ‖ bytes`: a signed policy can't be shown as a signed report. Each process
//! has one signing key beside its TLS key, bound to its SPIFFE id at registration and pinned by verifiers.

use ring::rand::SecureRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;
use std::fmt;

/// What a signature is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Context {
    /// A budget report.
    Report,
    /// A base, corpus or adapter manifest.
    Manifest,
    /// The last entry of a privacy ledger.
    LedgerHead,
    /// An agent's registration of its signing key.
    Registration,
    /// A domain's policy file.
    Policy,
    /// The fresh keys an agent announces for one secure sum.
    SumAdvert,
    /// The set of agents a secure sum is over.
    SumSurvivors,
    /// An owner's word that no unit is in two sources.
    Disjoint,
}

impl Context {
    /// Every context there is.
    pub const ALL: [Self; 8] = [
        Self::Report,
        Self::Manifest,
        Self::LedgerHead,
        Self::Registration,
        Self::Policy,
        Self::SumAdvert,
        Self::SumSurvivors,
        Self::Disjoint,
    ];

    /// The text in front of the signed bytes.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Report => "tabmesh report v1",
            Self::Manifest => "tabmesh manifest v1",
            Self::LedgerHead => "tabmesh ledger head v1",
            Self::Registration => "tabmesh registration v1",
            Self::Policy => "tabmesh policy v1",
            Self::SumAdvert => "tabmesh sum advert v1",
            Self::SumSurvivors => "tabmesh sum survivors v1",
            Self::Disjoint => "tabmesh disjoint v1",
        }
    }
}

/// Why a key or a signature was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The private key file isn't a PKCS#8 Ed25519 key with its public half.
    #[error("not an Ed25519 key: expected PKCS#8 version 2 as `generate` writes it")]
    Key,
    /// The operating system gave no randomness for a new key.
    #[error("no entropy: the operating system's random generator failed, so no key was made")]
    Entropy,
    /// The signature doesn't match the key, the context or the bytes.
    #[error("signature doesn't verify: other bytes, another key or another purpose ({context:?} expected)")]
    Mismatch {
        /// The purpose that was expected.
        context: Context,
    },
}

/// A private signing key; never printed.
pub struct SigningKey {
    pair: Ed25519KeyPair,
}

impl SigningKey {
    /// A new key, as the PKCS#8 bytes to keep in a file and the key itself.
    ///
    /// # Errors
    /// [`SignatureError::Entropy`] when the random source failed.
    pub fn generate(random: &dyn SecureRandom) -> Result<(Vec<u8>, Self), SignatureError> {
        let document = Ed25519KeyPair::generate_pkcs8(random).map_err(|_| SignatureError::Entropy)?;
        let key = Self::from_pkcs8(document.as_ref())?;
        Ok((document.as_ref().to_vec(), key))
    }

    /// Reads a key from PKCS#8 bytes.
    ///
    /// # Errors
    /// [`SignatureError::Key`] for anything else.
    pub fn from_pkcs8(bytes: &[u8]) -> Result<Self, SignatureError> {
        Ed25519KeyPair::from_pkcs8(bytes).map(|pair| Self { pair }).map_err(|_| SignatureError::Key)
    }

    /// The public half.
    #[must_use]
    pub fn verifying_key(&self) -> VerifyingKey {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        VerifyingKey(bytes)
    }

    /// Signs bytes for one purpose.
    #[must_use]
    pub fn sign(&self, context: Context, bytes: &[u8]) -> Signature {
        let mut out = [0; 64];
        out.copy_from_slice(self.pair.sign(&covered(context, bytes)).as_ref());
        Signature(out)
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.verifying_key())
    }
}

/// A public key; in JSON 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VerifyingKey([u8; 32]);

impl VerifyingKey {
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

    /// Checks a signature for one purpose.
    ///
    /// # Errors
    /// [`SignatureError::Mismatch`] when it wasn't made by this key over this context and these bytes.
    pub fn verify(
        &self,
        context: Context,
        bytes: &[u8],
        signature: &Signature,
    ) -> Result<(), SignatureError> {
        UnparsedPublicKey::new(&ED25519, &self.0)
            .verify(&covered(context, bytes), &signature.0)
            .map_err(|_| SignatureError::Mismatch { context })
    }
}

/// An Ed25519 signature; in JSON 128 hex digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature([u8; 64]);

impl Signature {
    /// Wraps the 64 bytes of a signature.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 64]) -> Self {
        Self(bytes)
    }

    /// The 64 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 64] {
        &self.0
    }
}

macro_rules! hex_text {
    ($type:ident, $bytes:literal) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($type), "({})"), self)
            }
        }

        impl std::str::FromStr for $type {
            type Err = hex::FromHexError;

            fn from_str(text: &str) -> Result<Self, hex::FromHexError> {
                let mut bytes = [0; $bytes];
                hex::decode_to_slice(text, &mut bytes)?;
                Ok(Self(bytes))
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                let pattern = format!("^[0-9a-f]{{{}}}$", 2 * $bytes);
                json_schema!({ "type": "string", "pattern": pattern })
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hex_text!(VerifyingKey, 32);
hex_text!(Signature, 64);

/// The bytes a signature covers: the context's label, a zero byte, then what is signed.
#[must_use]
pub fn covered(context: Context, bytes: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(context.label().len() + 1 + bytes.len());
    message.extend_from_slice(context.label().as_bytes());
    message.push(0);
    message.extend_from_slice(bytes);
    message
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use ring::rand::SystemRandom;

    pub(crate) fn fresh_key() -> SigningKey {
        SigningKey::generate(&SystemRandom::new()).unwrap().1
    }

    #[test]
    fn a_signature_holds_for_its_context_bytes_and_key_only() {
        let (pkcs8, key) = SigningKey::generate(&SystemRandom::new()).unwrap();
        let public = SigningKey::from_pkcs8(&pkcs8).unwrap().verifying_key();
        for context in Context::ALL {
            let signature = key.sign(context, b"bytes");
            assert_eq!(public.verify(context, b"bytes", &signature), Ok(()));
            assert!(public.verify(context, b"byteS", &signature).is_err());
            assert!(fresh_key().verifying_key().verify(context, b"bytes", &signature).is_err());
            for other in Context::ALL.into_iter().filter(|other| *other != context) {
                let refused = public.verify(other, b"bytes", &signature);
                assert_eq!(refused, Err(SignatureError::Mismatch { context: other }));
            }
        }
    }

    #[test]
    fn contexts_cannot_run_into_the_bytes() {
        let key = fresh_key();
        let signature = key.sign(Context::Report, b"x");
        let joined = [Context::Report.label().as_bytes(), b"\0x"].concat();
        assert!(key.verifying_key().verify(Context::Policy, &joined, &signature).is_err());
        let labels: std::collections::BTreeSet<_> = Context::ALL.map(Context::label).into_iter().collect();
        assert_eq!(labels.len(), Context::ALL.len());
    }

    #[test]
    fn keys_and_signatures_are_hex_in_json_and_secret_in_debug() {
        let key = fresh_key();
        let public = key.verifying_key();
        let json = serde_json::to_string(&public).unwrap();
        assert_eq!(json.len(), 66);
        assert_eq!(serde_json::from_str::<VerifyingKey>(&json).unwrap(), public);
        assert!(serde_json::from_str::<Signature>(&json).is_err());
        assert_eq!(format!("{key:?}"), format!("SigningKey({public})"));
        assert!(SigningKey::from_pkcs8(b"no key").is_err());
    }
}
