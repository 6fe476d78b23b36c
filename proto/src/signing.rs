//! What is signed, byte for byte, and by which kind of key: Ed25519, one signing key per process beside its TLS key.
//!
//! Every statement begins with a context string of its own, so that a signature of one kind can't be read as another.
//! Registrations and assignments write each field with its length; a ledger head has the form that reports carry and
//! verify offline. Keys are bound to SPIFFE ids at registration and pinned by verifiers; nothing here decides whom to
//! trust.

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use tabmesh_privacy::{
    report::head_statement,
    signature::{Context, covered},
};

use crate::{
    identity::SpiffeId,
    message::{AssignmentKind, Digest, Id, PUBLIC_KEY_BYTES, SIGNATURE_BYTES},
};

/// A signature does not verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("signature does not verify")]
pub struct SignatureError;

/// Something a process of the mesh signs.
#[derive(Debug, Clone, Copy)]
pub enum Statement<'a> {
    /// An agent offers a contract and binds its signing key to its SPIFFE id.
    Registration {
        /// The agent.
        agent: &'a SpiffeId,
        /// The data product.
        product: &'a str,
        /// SHA-256 of the contract as stored.
        contract_digest: &'a Digest,
        /// The key being bound.
        public_key: &'a [u8; PUBLIC_KEY_BYTES],
    },
    /// The coordinator gives a task.
    Assignment {
        /// The coordinator.
        coordinator: &'a SpiffeId,
        /// The task's identifier.
        id: &'a Id,
        /// Its kind.
        kind: AssignmentKind,
        /// SHA-256 of its document.
        digest: &'a Digest,
    },
    /// An agent states the end of its ledger.
    LedgerHead {
        /// The agent.
        agent: &'a SpiffeId,
        /// Sequence number of the last entry.
        seq: u64,
        /// Chain hash of the last entry.
        hash: &'a Digest,
    },
}

impl Statement<'_> {
    /// The bytes that are signed.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Registration { agent, product, contract_digest, public_key } => fields(&[
                b"tabmesh contract registration v1",
                agent.to_string().as_bytes(),
                product.as_bytes(),
                *contract_digest,
                *public_key,
            ]),
            Self::Assignment { coordinator, id, kind, digest } => fields(&[
                b"tabmesh assignment v1",
                coordinator.to_string().as_bytes(),
                id.as_str().as_bytes(),
                kind.as_str().as_bytes(),
                *digest,
            ]),
            // The form that reports carry and verify offline.
            Self::LedgerHead { agent, seq, hash } => {
                covered(Context::LedgerHead, &head_statement(&agent.to_string(), *seq, hash))
            }
        }
    }

    /// Signs it.
    #[must_use]
    pub fn sign(&self, key: &Ed25519KeyPair) -> [u8; SIGNATURE_BYTES] {
        let mut signature = [0; SIGNATURE_BYTES];
        // An Ed25519 signature has 64 bytes: RFC 8032, section 5.1.6.
        signature.copy_from_slice(key.sign(&self.bytes()).as_ref());
        signature
    }

    /// Checks a signature.
    ///
    /// # Errors
    /// [`SignatureError`] if it is not this key's signature over this statement.
    pub fn verify(&self, key: &[u8; PUBLIC_KEY_BYTES], signature: &[u8]) -> Result<(), SignatureError> {
        UnparsedPublicKey::new(&ED25519, key).verify(&self.bytes(), signature).map_err(|_| SignatureError)
    }
}

/// The public half of a signing key.
#[must_use]
pub fn public_key(key: &Ed25519KeyPair) -> [u8; PUBLIC_KEY_BYTES] {
    let mut bytes = [0; PUBLIC_KEY_BYTES];
    // An Ed25519 public key has 32 bytes: RFC 8032, section 5.1.5.
    bytes.copy_from_slice(key.public_key().as_ref());
    bytes
}

fn fields(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Assignment, ChainedEntry, ContractRegistration, LedgerStatement, sha256};

    fn key(seed: u8) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
    }

    fn agent(name: &str) -> SpiffeId {
        SpiffeId::agent("acme.example", "payments", name).unwrap()
    }

    #[test]
    fn a_registration_binds_key_product_contract_and_agent() {
        let signed =
            ContractRegistration::sign(b"kind: DataContract".to_vec(), "cards".into(), &agent("a"), &key(1))
                .unwrap();
        assert_eq!(signed.verify(&agent("a")), Ok(()));
        assert_eq!(signed.verify(&agent("b")), Err(SignatureError));
        let edits: [fn(&mut ContractRegistration); 4] = [
            |r| r.contract.push(b' '),
            |r| r.product = "loans".into(),
            |r| r.signing_public_key = public_key(&key(2)),
            |r| r.signature[0] ^= 1,
        ];
        for edit in edits {
            let mut changed = signed.clone();
            edit(&mut changed);
            assert_eq!(changed.verify(&agent("a")), Err(SignatureError));
        }
    }

    #[test]
    fn an_assignment_binds_id_kind_document_and_coordinator() {
        let coordinator = SpiffeId::coordinator("acme.example").unwrap();
        let id: Id = "a-1".parse().unwrap();
        let signed =
            Assignment::sign(id, AssignmentKind::Round, b"{}".to_vec(), &coordinator, &key(1)).unwrap();
        let public = public_key(&key(1));
        assert_eq!(signed.verify(&coordinator, &public), Ok(()));
        assert_eq!(
            signed.verify(&SpiffeId::coordinator("evil.example").unwrap(), &public),
            Err(SignatureError)
        );
        assert_eq!(signed.verify(&coordinator, &public_key(&key(2))), Err(SignatureError));
        for changed in [
            Assignment { kind: AssignmentKind::ReleaseQuery, ..signed.clone() },
            Assignment { id: "a-2".parse().unwrap(), ..signed.clone() },
            Assignment { digest: sha256(b"[]"), ..signed },
        ] {
            assert_eq!(changed.verify(&coordinator, &public), Err(SignatureError));
        }
    }

    #[test]
    fn a_ledger_head_binds_product_position_and_chain() {
        let first = ChainedEntry { seq: 0, prev: [0; 32], payload: b"grant".to_vec() };
        let second = ChainedEntry { seq: 1, prev: first.hash(), payload: b"spend".to_vec() };
        let signed =
            LedgerStatement::sign("cards".into(), vec![first, second], &agent("a"), &key(1)).unwrap();
        let public = public_key(&key(1));
        assert_eq!(signed.verify(&agent("a"), &public), Ok(()));
        assert_eq!(signed.verify(&agent("b"), &public), Err(SignatureError));
        let mut shorter = signed;
        shorter.entries.pop();
        assert_eq!(shorter.verify(&agent("a"), &public), Err(SignatureError));
    }

    #[test]
    fn fields_cannot_flow_into_each_other() {
        let digest = [7; 32];
        let bytes = |agent: &SpiffeId, product: &str| {
            let (contract_digest, public_key) = (&digest, &digest);
            Statement::Registration { agent, product, contract_digest, public_key }.bytes()
        };
        assert_ne!(bytes(&agent("a"), "bcards"), bytes(&agent("ab"), "cards"));
    }
}
