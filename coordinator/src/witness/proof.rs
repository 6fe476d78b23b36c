//! What the audit log proves of a report's ledgers: collected for a report here, and checked offline here.

use std::collections::BTreeMap;

use tabmesh_federation::witness::LedgerHead;
use tabmesh_privacy::report::{AuditProof, LedgerRecord, ProvenHead, Report};
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_proto::identity::SpiffeId;
use tabmesh_store::Digest;
use tabmesh_store::checkpoint::{Checkpoint, CheckpointError, KeyKind, Note, VerifierKey};
use tabmesh_store::merkle::{ProofError, leaf_hash, verify_inclusion};
use thiserror::Error;

use super::{failed, first, latest, logged, proven};
use crate::error::CoordinatorError;
use crate::mesh::Mesh;

/// The latest checkpoint with its cosignatures, and where in the log the heads of these agents' ledgers are.
///
/// # Errors
/// [`CoordinatorError`] if log or records can't be read.
pub(crate) fn of_report(mesh: &Mesh, agents: &[SpiffeId]) -> Result<Option<AuditProof>, CoordinatorError> {
    let Some(note) = latest(mesh)? else { return Ok(None) };
    let tree = first(mesh, Checkpoint::parse(note.text()).map_err(failed)?.size)?;
    let mut heads = Vec::new();
    for agent in agents {
        let Some(logged) = logged(mesh, agent)? else { continue };
        // A head that came after the checkpoint waits for the next one.
        let Some(leaf) = proven(mesh, &tree, logged.index)? else { continue };
        heads.push(ProvenHead {
            agent: agent.to_string(),
            index: leaf.index,
            payload: leaf.payload,
            inclusion: leaf.inclusion.iter().map(ToString::to_string).collect(),
        });
    }
    Ok(Some(AuditProof { note: note.to_string(), heads }))
}

/// What the audit log was found to prove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Witnessed {
    /// Entries of the log.
    pub size: u64,
    /// Root over them.
    pub root: Digest,
    /// Agents of the report that cosigned.
    pub cosigned: Vec<String>,
    /// Ledger entries proven to be in the log, by agent, of those in the report.
    pub proven: BTreeMap<String, u64>,
}

/// Why the audit proof of a report doesn't hold.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AuditProofError {
    /// The note, or a signature on it.
    #[error("checkpoint of the audit log: {0}")]
    Checkpoint(#[from] CheckpointError),
    /// A head isn't in the log.
    #[error("ledger head of {agent}: {source}")]
    Inclusion {
        /// The agent.
        agent: String,
        /// What is wrong with the proof.
        source: ProofError,
    },
    /// A head isn't the one of the report's ledger.
    #[error("ledger head of {agent}: {reason}")]
    Head {
        /// The agent.
        agent: String,
        /// What doesn't fit.
        reason: &'static str,
    },
}

/// Checks a report's audit proof with the key that signed the report; nothing for a report without one.
///
/// The keys of witnesses are those by which the agents signed their ledgers' heads.
///
/// # Errors
/// [`AuditProofError`] naming the first thing that doesn't hold.
pub fn verify(report: &Report, owner: &VerifyingKey) -> Result<Option<Witnessed>, AuditProofError> {
    let Some(audit) = &report.audit else { return Ok(None) };
    let note = Note::parse(audit.note.as_bytes())?;
    let origin = Checkpoint::parse(note.text())?.origin;
    let owner = VerifierKey::new(&origin, KeyKind::Ed25519, *owner.as_bytes())?;
    let mut witnesses = Vec::new();
    for ledger in &report.ledgers {
        if let Some(head) = &ledger.head {
            let key = *head.public_key.as_bytes();
            witnesses.push(VerifierKey::new(&ledger.agent, KeyKind::CosignatureV1, key)?);
        }
    }
    let (checkpoint, cosigned) = note.open(&owner, &witnesses.iter().collect::<Vec<_>>(), 0)?;
    let mut proven = BTreeMap::new();
    for head in &audit.heads {
        let ledger = report.ledgers.iter().find(|ledger| ledger.agent == head.agent);
        let entries = included(head, ledger, &checkpoint)?;
        proven.insert(head.agent.clone(), entries);
    }
    let cosigned = cosigned.into_iter().map(|signed| signed.name).collect();
    Ok(Some(Witnessed { size: checkpoint.size, root: checkpoint.root, cosigned, proven }))
}

/// The number of entries of a ledger that a head in the log covers.
fn included(
    head: &ProvenHead,
    ledger: Option<&LedgerRecord>,
    checkpoint: &Checkpoint,
) -> Result<u64, AuditProofError> {
    let refused = |reason| AuditProofError::Head { agent: head.agent.clone(), reason };
    let proof: Option<Vec<Digest>> = head.inclusion.iter().map(|hash| hash.parse().ok()).collect();
    let proof = proof.ok_or_else(|| refused("the proof holds something that isn't a hash"))?;
    let leaf = leaf_hash(head.payload.as_bytes());
    verify_inclusion(&leaf, head.index, checkpoint.size, &proof, &checkpoint.root)
        .map_err(|source| AuditProofError::Inclusion { agent: head.agent.clone(), source })?;
    let recorded =
        LedgerHead::of_entry(&head.payload).ok_or_else(|| refused("the log's entry records no head"))?;
    if recorded.agent.as_str() != head.agent {
        return Err(refused("the log's entry is about another agent"));
    }
    let ledger = ledger.ok_or_else(|| refused("the report has no ledger of this agent"))?;
    let entry = usize::try_from(recorded.seq).ok().and_then(|seq| ledger.entries.get(seq));
    match entry {
        Some(entry) if entry.hash == *recorded.hash.as_bytes() => Ok(recorded.seq + 1),
        Some(_) => Err(refused("the log has another entry at that place: one of the two was rewritten")),
        None => Err(refused("the log has more entries than the report: the ledger was cut")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
    use std::sync::Arc;

    use ring::signature::{Ed25519KeyPair, KeyPair};
    use tabmesh_federation::id::{AgentId, Digest as NamedDigest};
    use tabmesh_federation::witness::LEDGER_HEAD_ACTION;
    use tabmesh_privacy::report::{Period, RecordedEntry, ReportInput, SignedHead, Stated, build};
    use tabmesh_privacy::signature::Signature;
    use tabmesh_store::checkpoint::Signer;
    use tabmesh_store::merkle::MerkleTree;

    use super::*;

    const AGENT: &str = "spiffe://mesh/tabmesh/agent/a/one";

    fn pair(seed: u8) -> Arc<Ed25519KeyPair> {
        Arc::new(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap())
    }

    fn key(seed: u8) -> VerifyingKey {
        VerifyingKey::from_bytes(pair(seed).public_key().as_ref().try_into().unwrap())
    }

    /// A report with a ledger of three entries, whose head stands in a log of five; cosigned by the agent.
    fn report() -> Report {
        let entries: Vec<RecordedEntry> = (0..3)
            .map(|i| RecordedEntry { seq: i, prev: [0; 32], hash: [i as u8; 32], payload: String::new() })
            .collect();
        let head = SignedHead { signature: Signature::from_bytes([0; 64]), public_key: key(2) };
        let recorded = LedgerHead {
            agent: AgentId::new(AGENT).unwrap(),
            product: "a.orders".to_owned(),
            seq: 2,
            hash: NamedDigest::from_bytes([2; 32]),
        };
        let payload = serde_json::json!({ "action": LEDGER_HEAD_ACTION, "facts": recorded }).to_string();
        let mut tree = MerkleTree::new();
        for leaf in ["a", "b", &payload, "d", "e"] {
            tree.push(leaf.as_bytes());
        }
        let origin = "mesh/tabmesh/coordinator/audit".to_owned();
        let owner = Signer::from_pair(&origin, KeyKind::Ed25519, pair(1)).unwrap();
        let witness = Signer::from_pair(AGENT, KeyKind::CosignatureV1, pair(2)).unwrap();
        let root = tree.root(5).unwrap();
        let checkpoint = Checkpoint { origin, size: 5, root, extensions: Vec::new() };
        let mut note = Note::sign(&checkpoint, &owner).unwrap();
        note.cosign(&witness, 9).unwrap();
        let inclusion = tree.inclusion_proof(2, 5).unwrap().iter().map(ToString::to_string).collect();
        let heads = vec![ProvenHead { agent: AGENT.to_owned(), index: 2, payload, inclusion }];
        let mut report = build(ReportInput {
            deployment: "d".to_owned(),
            period: Period { from_ms: 0, until_ms: 1 },
            generated_at_ms: 0,
            generator: "test".to_owned(),
            generator_digest: None,
            stated: Stated::default(),
            published: Vec::new(),
            attacks: Vec::new(),
            trust_model: Vec::new(),
            products: Vec::new(),
            refused: Vec::new(),
            unprotected_facts: Vec::new(),
            audit: Some(AuditProof { note: note.to_string(), heads }),
        })
        .unwrap();
        report.ledgers = vec![LedgerRecord { agent: AGENT.to_owned(), entries, head: Some(head) }];
        report
    }

    #[test]
    fn a_cosigned_log_proves_the_ledger_it_records() {
        let witnessed = verify(&report(), &key(1)).unwrap().unwrap();
        assert_eq!((witnessed.size, witnessed.cosigned), (5, vec![AGENT.to_owned()]));
        assert_eq!(witnessed.proven, BTreeMap::from([(AGENT.to_owned(), 3)]));
        let mut without = report();
        without.audit = None;
        assert_eq!(verify(&without, &key(1)), Ok(None));
    }

    #[test]
    fn what_was_changed_is_named() {
        let refused = |edit: fn(&mut Report), word: &str| {
            let mut report = report();
            edit(&mut report);
            let error = verify(&report, &key(1)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(|r| r.ledgers[0].entries.truncate(2), "was cut");
        refused(|r| r.ledgers[0].entries[2].hash = [7; 32], "rewritten");
        refused(|r| r.ledgers.clear(), "no ledger");
        refused(|r| audit(r).heads[0].index = 3, "root");
        refused(|r| audit(r).heads[0].payload = "d".to_owned(), "root");
        refused(|r| audit(r).heads[0].agent.push('x'), "another agent");
        refused(|r| audit(r).heads[0].inclusion[0] = "zz".to_owned(), "isn't a hash");
        refused(|r| audit(r).note = audit(r).note.replacen("\n5\n", "\n6\n", 1), "doesn't verify");
        let other = verify(&report(), &key(3)).unwrap_err();
        assert!(matches!(other, AuditProofError::Checkpoint(_)), "{other}");
        // A witness whose key the report doesn't have counts as none.
        let mut unknown = report();
        unknown.ledgers[0].head = None;
        assert!(verify(&unknown, &key(1)).unwrap().unwrap().cosigned.is_empty());
    }

    fn audit(report: &mut Report) -> &mut AuditProof {
        report.audit.as_mut().unwrap()
    }
}
