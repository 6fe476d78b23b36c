//! What is published: which bytes belong together, what they cost, and a signature over exactly that.
//!
//! A manifest names every artefact by digest; its own bytes are signed as stored, detached, with the
//! coordinator's Ed25519 key. An agent trusts one pinned key, checks the signature before it parses anything,
//! and refuses an artefact that descends from reproducible noise unless it runs in insecure development mode:
//! such noise can be subtracted by anyone who knows the seed.

use serde::{Deserialize, Serialize};
use tabmesh_contract::schema::{FeatureSchema, SchemaError};
use tabmesh_privacy::budget::{Delta, Epsilon, Rho};
use tabmesh_privacy::signature::{Context, Signature, SignatureError, SigningKey, VerifyingKey};
use thiserror::Error;

use crate::id::{Digest, PlanDigest};

/// Why a manifest is refused.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// More bytes than a manifest has.
    #[error("a manifest has at most {MAX_MANIFEST_BYTES} bytes, got {got}")]
    TooLarge {
        /// Bytes given.
        got: usize,
    },
    /// The signature isn't the pinned key's over these bytes.
    #[error("manifest is not signed by the pinned coordinator key {pinned}: {source}")]
    NotSigned {
        /// The key trusted.
        pinned: VerifyingKey,
        /// The verifier's refusal.
        source: SignatureError,
    },
    /// Signed bytes that aren't a manifest of this version.
    #[error("not a manifest of version {MANIFEST_VERSION}: {reason}")]
    Malformed {
        /// The parser's words.
        reason: String,
    },
    /// The feature schema breaks its own rules.
    #[error("feature schema of the manifest: {0}")]
    Schema(#[from] SchemaError),
    /// The artefacts descend from reproducible noise.
    #[error(
        "manifest is marked reproducible, not private; only an agent in insecure development mode takes it"
    )]
    Tainted,
    /// The manifest is about another plan.
    #[error("manifest belongs to plan {got}, expected {expected}")]
    WrongPlan {
        /// The plan asked for.
        expected: PlanDigest,
        /// The plan it names.
        got: PlanDigest,
    },
    /// Too many parents.
    #[error("a manifest names at most {MAX_PARENTS} parents, got {got}")]
    TooManyParents {
        /// Parents given.
        got: usize,
    },
}

/// Whether the noise behind an artefact can be drawn again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Taint {
    /// Fresh randomness of the operating system at every agent.
    Private,
    /// A fixed seed somewhere in its descent.
    ReproducibleNotPrivate,
}

impl Taint {
    /// The taint of something made from two others.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        if self == Self::Private && other == Self::Private {
            Self::Private
        } else {
            Self::ReproducibleNotPrivate
        }
    }
}

/// Which taints a verifier takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Private artefacts only.
    Production,
    /// Reproducible ones too: for demonstrations and tests.
    InsecureDev,
}

/// What the artefacts cost each privacy unit, as planned; agents' ledgers have what was spent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrivacyFacts {
    /// ε of the plan, a decimal string in JSON.
    pub epsilon: Epsilon,
    /// δ of the plan, a decimal string in JSON.
    pub delta: Delta,
    /// ρ the plan stands for, in units of 2⁻⁴⁰.
    pub rho_total: Rho,
    /// ρ of the release stages and rounds that ended with a result.
    pub rho_used: Rho,
    /// Agents in the cohort.
    pub agents: u32,
    /// Rounds with a result.
    pub rounds_published: u32,
}

/// A published model: every artefact by the digest of its bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format version.
    pub version: u32,
    /// The plan.
    pub plan: PlanDigest,
    /// The base model before the plan.
    pub base: Digest,
    /// The base model tuned on the corpus.
    pub tuned: Digest,
    /// Bins, codes and scaling.
    pub preprocessing: Digest,
    /// The synthetic corpus.
    pub corpus: Digest,
    /// The adapter; none if no round had a result, or rounds learn a forest.
    pub adapter: Option<Digest>,
    /// The forest that the rounds learnt; none if they learnt something else, or nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forest: Option<Digest>,
    /// Features and target, in canonical order.
    pub schema: FeatureSchema,
    /// When it was made, UTC milliseconds.
    pub created_ms: i64,
    /// Whether its noise is private.
    pub taint: Taint,
    /// Manifests this one builds on.
    pub parents: Vec<Digest>,
    /// What it cost.
    pub privacy: PrivacyFacts,
}

/// A manifest's bytes with their detached signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedManifest {
    /// The bytes to store and send; their SHA-256 names the publication.
    pub bytes: Vec<u8>,
    /// Ed25519 over the bytes, for the purpose of a manifest.
    pub signature: Signature,
}

impl Manifest {
    /// Writes the manifest down and signs the bytes.
    ///
    /// # Errors
    /// [`ManifestError`] if it breaks a limit or its schema a rule: what a verifier would refuse isn't signed.
    pub fn sign(&self, key: &SigningKey) -> Result<SignedManifest, ManifestError> {
        self.check()?;
        let malformed = |error: serde_json::Error| ManifestError::Malformed { reason: error.to_string() };
        let bytes = serde_json::to_vec(self).map_err(malformed)?;
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLarge { got: bytes.len() });
        }
        let signature = key.sign(Context::Manifest, &bytes);
        Ok(SignedManifest { bytes, signature })
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.version != MANIFEST_VERSION {
            return Err(ManifestError::Malformed { reason: format!("version {}", self.version) });
        }
        if self.parents.len() > MAX_PARENTS {
            return Err(ManifestError::TooManyParents { got: self.parents.len() });
        }
        // Reading JSON doesn't run the schema's own checks; building it anew does, and sorts as it must be sorted.
        let checked = FeatureSchema::new(self.schema.features().to_vec(), self.schema.target().clone())?;
        if checked != self.schema {
            return Err(ManifestError::Malformed {
                reason: "features are not in canonical order".to_owned(),
            });
        }
        Ok(())
    }
}

impl SignedManifest {
    /// Name of the publication: SHA-256 of the bytes.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    /// Checks signature, then form, then taint, and gives the manifest.
    ///
    /// `pinned` comes from the verifier's own configuration, never from the message; `plan` is the plan the
    /// verifier takes part in, if it asks for one.
    ///
    /// # Errors
    /// [`ManifestError`], in that order; nothing is parsed before the signature holds.
    pub fn verify(
        &self,
        pinned: &VerifyingKey,
        trust: Trust,
        plan: Option<&PlanDigest>,
    ) -> Result<Manifest, ManifestError> {
        if self.bytes.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLarge { got: self.bytes.len() });
        }
        pinned
            .verify(Context::Manifest, &self.bytes, &self.signature)
            .map_err(|source| ManifestError::NotSigned { pinned: *pinned, source })?;
        let manifest: Manifest = serde_json::from_slice(&self.bytes)
            .map_err(|error| ManifestError::Malformed { reason: error.to_string() })?;
        manifest.check()?;
        match plan {
            Some(expected) if *expected != manifest.plan => {
                return Err(ManifestError::WrongPlan { expected: *expected, got: manifest.plan });
            }
            _ => {}
        }
        if manifest.taint == Taint::ReproducibleNotPrivate && trust == Trust::Production {
            return Err(ManifestError::Tainted);
        }
        Ok(manifest)
    }
}

/// Format version written and read.
pub const MANIFEST_VERSION: u32 = 1;
/// Largest manifest, in bytes.
pub const MAX_MANIFEST_BYTES: usize = 4 << 20;
/// Most parents of a manifest.
pub const MAX_PARENTS: usize = 64;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use ring::rand::SystemRandom;
    use tabmesh_contract::schema::{Feature, FeatureId, FeatureKind, NumericDomain, Scale, Target};

    use super::*;

    fn key() -> SigningKey {
        SigningKey::generate(&SystemRandom::new()).unwrap().1
    }

    fn manifest(taint: Taint) -> Manifest {
        let domain = NumericDomain { lower: 0.0, upper: 1.5, scale: Scale::Linear, cut_points: None };
        let kind = FeatureKind::Numeric(domain);
        let feature = Feature { id: FeatureId::new("a.x").unwrap(), kind, unit: None, description: None };
        let target = Target { id: FeatureId::new("a.y").unwrap(), classes: vec!["n".into(), "y".into()] };
        let digest = |text: &str| Digest::of(text.as_bytes());
        Manifest {
            version: MANIFEST_VERSION,
            plan: PlanDigest::of(b"plan"),
            base: digest("base"),
            tuned: digest("tuned"),
            preprocessing: digest("bins"),
            corpus: digest("corpus"),
            adapter: Some(digest("adapter")),
            forest: None,
            schema: FeatureSchema::new(vec![feature], target).unwrap(),
            created_ms: 1_700_000_000_000,
            taint,
            parents: vec![digest("parent")],
            privacy: PrivacyFacts {
                epsilon: Epsilon::new(3.0).unwrap(),
                delta: Delta::new(1e-5).unwrap(),
                rho_total: Rho::from_units(1 << 37),
                rho_used: Rho::from_units(1 << 36),
                agents: 3,
                rounds_published: 12,
            },
        }
    }

    #[test]
    fn a_signed_manifest_verifies_and_every_changed_byte_is_found() {
        let key = key();
        let pinned = key.verifying_key();
        let manifest = manifest(Taint::Private);
        let signed = manifest.sign(&key).unwrap();
        assert_eq!(signed.verify(&pinned, Trust::Production, Some(&manifest.plan)), Ok(manifest.clone()));
        assert_eq!(signed.digest(), Digest::of(&signed.bytes));
        for at in 0..signed.bytes.len() {
            let mut bytes = signed.bytes.clone();
            bytes[at] ^= 1;
            let forged = SignedManifest { bytes, signature: signed.signature };
            let refused = forged.verify(&pinned, Trust::Production, None);
            assert!(matches!(refused, Err(ManifestError::NotSigned { .. })), "byte {at}");
        }
    }

    #[test]
    fn another_key_or_purpose_is_refused() {
        let (own, other) = (key(), key());
        let signed = manifest(Taint::Private).sign(&other).unwrap();
        let refused = signed.verify(&own.verifying_key(), Trust::InsecureDev, None);
        assert!(matches!(refused, Err(ManifestError::NotSigned { .. })));
        let report = SignedManifest { signature: other.sign(Context::Report, &signed.bytes), ..signed };
        let refused = report.verify(&other.verifying_key(), Trust::InsecureDev, None);
        assert!(matches!(refused, Err(ManifestError::NotSigned { .. })));
    }

    #[test]
    fn a_tainted_manifest_is_for_development_only() {
        let key = key();
        let signed = manifest(Taint::ReproducibleNotPrivate).sign(&key).unwrap();
        let pinned = key.verifying_key();
        assert_eq!(signed.verify(&pinned, Trust::Production, None), Err(ManifestError::Tainted));
        assert!(signed.verify(&pinned, Trust::InsecureDev, None).is_ok());
        let tainted = Taint::ReproducibleNotPrivate;
        assert_eq!(Taint::Private.and(tainted), tainted);
        assert_eq!(tainted.and(Taint::Private), tainted);
        assert_eq!(Taint::Private.and(Taint::Private), Taint::Private);
    }

    #[test]
    fn another_plan_and_malformed_content_are_refused_though_signed() {
        let key = key();
        let pinned = key.verifying_key();
        let manifest = manifest(Taint::Private);
        let signed = manifest.sign(&key).unwrap();
        let (expected, got) = (PlanDigest::of(b"other"), manifest.plan);
        let refused = signed.verify(&pinned, Trust::Production, Some(&expected));
        assert_eq!(refused, Err(ManifestError::WrongPlan { expected, got }));

        let text = String::from_utf8(signed.bytes).unwrap();
        for (from, to) in [
            ("\"version\":1", "\"version\":2"),
            ("\"version\":1", "\"version\":1,\"extra\":0"),
            ("\"upper\":1.5", "\"upper\":null"),
            ("\"epsilon\":\"3\"", "\"epsilon\":\"NaN\""),
            ("\"epsilon\":\"3\"", "\"epsilon\":3"),
        ] {
            let bytes = text.replacen(from, to, 1).into_bytes();
            assert_ne!(bytes, text.as_bytes(), "{from}");
            let signature = key.sign(Context::Manifest, &bytes);
            let refused = SignedManifest { bytes, signature }.verify(&pinned, Trust::Production, None);
            assert!(matches!(refused, Err(ManifestError::Malformed { .. })), "{to}: {refused:?}");
        }
        let bytes = text.replacen("\"upper\":1.5", "\"upper\":-1.5", 1).into_bytes();
        let signature = key.sign(Context::Manifest, &bytes);
        let refused = SignedManifest { bytes, signature }.verify(&pinned, Trust::Production, None);
        assert!(matches!(refused, Err(ManifestError::Schema(SchemaError::BadRange { .. }))));
    }

    #[test]
    fn limits_hold_at_one_too_many() {
        let key = key();
        let mut manifest = manifest(Taint::Private);
        manifest.parents = vec![Digest::of(b"p"); MAX_PARENTS];
        assert!(manifest.sign(&key).is_ok());
        manifest.parents.push(Digest::of(b"p"));
        assert_eq!(manifest.sign(&key), Err(ManifestError::TooManyParents { got: MAX_PARENTS + 1 }));
        let bytes = vec![b' '; MAX_MANIFEST_BYTES + 1];
        let signature = key.sign(Context::Manifest, &bytes);
        let refused =
            SignedManifest { bytes, signature }.verify(&key.verifying_key(), Trust::Production, None);
        assert_eq!(refused, Err(ManifestError::TooLarge { got: MAX_MANIFEST_BYTES + 1 }));
    }
}
