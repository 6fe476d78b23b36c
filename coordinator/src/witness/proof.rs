//! What the audit log proves of a report's ledgers: collected for a report here, and checked offline here.

use std::collections::{BTreeMap, BTreeSet};

use tabmesh_federation::id::AgentId;
use tabmesh_federation::witness::LedgerHead;
use tabmesh_privacy::report::{
    AuditProof, LedgerRecord, ProvenEntry, ProvenHead, Published, RefusedRequest, Report,
};
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_proto::identity::SpiffeId;
use tabmesh_store::Digest;
use tabmesh_store::checkpoint::{Checkpoint, CheckpointError, KeyKind, Note, VerifierKey};
use tabmesh_store::merkle::{ProofError, leaf_hash, verify_inclusion};
use thiserror::Error;

use super::{failed, first, latest, logged, proven};
use crate::error::CoordinatorError;
use crate::mesh::Mesh;
use crate::report::{AuditEntry, PLAN_REFUSED, PUBLISHED, PlanRefusal};

/// The latest checkpoint with its cosignatures, and where in the log the heads of these agents' ledgers and these entries are.
///
/// # Errors
/// [`CoordinatorError`] if log or records can't be read.
pub(crate) fn of_report(
    mesh: &Mesh,
    agents: &[SpiffeId],
    places: &[u64],
) -> Result<Option<AuditProof>, CoordinatorError> {
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
    let mut entries = Vec::new();
    for place in places {
        let Some(leaf) = proven(mesh, &tree, *place)? else { continue };
        let inclusion = leaf.inclusion.iter().map(ToString::to_string).collect();
        entries.push(ProvenEntry { index: leaf.index, payload: leaf.payload, inclusion });
    }
    Ok(Some(AuditProof { note: note.to_string(), heads, entries }))
}

/// Whom an auditor believes without asking the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    /// Agents' identity keys, as their operators handed them over.
    pub agents: BTreeMap<AgentId, VerifyingKey>,
    /// How many of them must have cosigned the log's checkpoint: all if none is said.
    pub cosigners: Option<usize>,
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
    /// Refused plans of the report that are proven to be in the log; others came after the checkpoint.
    pub refused: usize,
    /// Publications of the report that are.
    pub published: usize,
    /// Trusted agents without a ledger in the report: they released nothing, or were left out.
    pub without_ledger: Vec<String>,
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
    /// The report has no audit proof, and trusted agents are said to have cosigned one.
    #[error(
        "the report has no checkpoint of the audit log, which {expected} trusted agents should have cosigned"
    )]
    NoCheckpoint {
        /// How many.
        expected: usize,
    },
    /// The report lists an agent that the auditor doesn't know, or under another key.
    #[error("ledger of {agent}: {reason}")]
    Agent {
        /// The agent.
        agent: String,
        /// What doesn't fit.
        reason: &'static str,
    },
    /// Too few trusted agents cosigned.
    #[error("{got} trusted agents cosigned the checkpoint, expected at least {expected}; missing: {missing}")]
    Cosigners {
        /// How many must.
        expected: usize,
        /// How many did.
        got: usize,
        /// Who didn't.
        missing: String,
    },
    /// An entry of the log doesn't belong to the report, or isn't in the log.
    #[error("entry {index} of the audit log: {reason}")]
    Entry {
        /// Its place.
        index: u64,
        /// What doesn't fit.
        reason: String,
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
/// Without `trust` the keys of witnesses are those by which the report says that agents signed their ledgers' heads: the
/// report is then consistent, and a coordinator that makes up agents isn't found out. With it, every ledger must end in a
/// head that its agent signed by the key the auditor has, and be in the log; and enough of these agents must have cosigned.
///
/// # Errors
/// [`AuditProofError`] naming the first thing that doesn't hold.
pub fn verify(
    report: &Report,
    owner: &VerifyingKey,
    trust: Option<&Trust>,
) -> Result<Option<Witnessed>, AuditProofError> {
    if let Some(trust) = trust {
        report.ledgers.iter().try_for_each(|ledger| trust.knows(ledger))?;
    }
    let Some(audit) = &report.audit else {
        return match trust {
            Some(trust) => Err(AuditProofError::NoCheckpoint { expected: trust.needed() }),
            None => Ok(None),
        };
    };
    let note = Note::parse(audit.note.as_bytes())?;
    let origin = Checkpoint::parse(note.text())?.origin;
    let owner = VerifierKey::new(&origin, KeyKind::Ed25519, *owner.as_bytes())?;
    let keys: Vec<(&str, &VerifyingKey)> = match trust {
        Some(trust) => trust.agents.iter().map(|(agent, key)| (agent.as_str(), key)).collect(),
        None => {
            let heads = report.ledgers.iter().map(|ledger| (&ledger.agent, &ledger.head));
            heads.filter_map(|(agent, head)| Some((agent.as_str(), &head.as_ref()?.public_key))).collect()
        }
    };
    let witnesses = keys
        .iter()
        .map(|(agent, key)| VerifierKey::new(agent, KeyKind::CosignatureV1, *key.as_bytes()))
        .collect::<Result<Vec<_>, _>>()?;
    let (checkpoint, cosigned) = note.open(&owner, &witnesses.iter().collect::<Vec<_>>(), 0)?;
    let cosigned: Vec<String> = cosigned.into_iter().map(|signed| signed.name).collect();
    let mut proven = BTreeMap::new();
    for head in &audit.heads {
        let ledger = report.ledgers.iter().find(|ledger| ledger.agent == head.agent);
        let entries = included(head, ledger, &checkpoint)?;
        proven.insert(head.agent.clone(), entries);
    }
    let (mut refused, mut published) = (BTreeSet::new(), BTreeSet::new());
    for entry in &audit.entries {
        match listed(entry, report, &checkpoint)? {
            Listed::Refused(at) => refused.insert(at),
            Listed::Published(at) => published.insert(at),
        };
    }
    let (refused, published) = (refused.len(), published.len());
    let mut without_ledger = Vec::new();
    if let Some(trust) = trust {
        trust.enough(&cosigned)?;
        if let Some(ledger) = report.ledgers.iter().find(|ledger| !proven.contains_key(&ledger.agent)) {
            return Err(AuditProofError::Agent {
                agent: ledger.agent.clone(),
                reason: "it isn't in the audit log, which it enters at the end of a plan; fetch a report after that",
            });
        }
        let has_ledger = |agent: &str| report.ledgers.iter().any(|ledger| ledger.agent == agent);
        let without = trust.agents.keys().map(AgentId::as_str).filter(|agent| !has_ledger(agent));
        without_ledger.extend(without.map(str::to_owned));
    }
    let (size, root) = (checkpoint.size, checkpoint.root);
    Ok(Some(Witnessed { size, root, cosigned, proven, refused, published, without_ledger }))
}

/// Which line of a report an entry of the log is about.
enum Listed {
    Refused(usize),
    Published(usize),
}

/// The line of the report that an entry proves, once it is found in the log.
fn listed(entry: &ProvenEntry, report: &Report, checkpoint: &Checkpoint) -> Result<Listed, AuditProofError> {
    let refused = |reason: String| AuditProofError::Entry { index: entry.index, reason };
    let proof: Option<Vec<Digest>> = entry.inclusion.iter().map(|hash| hash.parse().ok()).collect();
    let proof = proof.ok_or_else(|| refused("the proof holds something that isn't a hash".to_owned()))?;
    let leaf = leaf_hash(entry.payload.as_bytes());
    verify_inclusion(&leaf, entry.index, checkpoint.size, &proof, &checkpoint.root)
        .map_err(|error| refused(error.to_string()))?;
    let read: AuditEntry =
        serde_json::from_str(&entry.payload).map_err(|error| refused(error.to_string()))?;
    let at = match read.action.as_str() {
        PLAN_REFUSED => {
            let facts: PlanRefusal =
                serde_json::from_value(read.facts).map_err(|error| refused(error.to_string()))?;
            let same = |line: &RefusedRequest| {
                (line.time_ms, &line.plan_digest, &line.product, &line.rules)
                    == (read.time_ms, &facts.plan_digest, &facts.product, &facts.rules)
            };
            report.refused.iter().position(same).map(Listed::Refused)
        }
        PUBLISHED => {
            let manifest = read.facts.get("manifest").and_then(|manifest| manifest.as_str());
            let same = |line: &Published| Some(line.manifest.as_str()) == manifest;
            report.published.iter().position(same).map(Listed::Published)
        }
        other => return Err(refused(format!("a report lists no entries of {other:?}"))),
    };
    at.ok_or_else(|| refused("the report has no such line: it was left out or changed".to_owned()))
}

impl Trust {
    fn needed(&self) -> usize {
        self.cosigners.unwrap_or(self.agents.len())
    }

    /// Whether a ledger ends in a head by its agent's key.
    fn knows(&self, ledger: &LedgerRecord) -> Result<(), AuditProofError> {
        let refused = |reason| AuditProofError::Agent { agent: ledger.agent.clone(), reason };
        let known = self.agents.iter().find(|(agent, _)| agent.as_str() == ledger.agent);
        let (_, key) = known.ok_or_else(|| refused("the agent is none of those given"))?;
        let head = ledger.head.as_ref().ok_or_else(|| refused("no head that the agent signed"))?;
        if head.public_key == *key {
            Ok(())
        } else {
            Err(refused("its head is signed by another key than the one given"))
        }
    }

    /// Whether enough of the trusted agents cosigned.
    fn enough(&self, cosigned: &[String]) -> Result<(), AuditProofError> {
        let missing: Vec<&str> = self
            .agents
            .keys()
            .map(AgentId::as_str)
            .filter(|agent| !cosigned.iter().any(|signed| signed == agent))
            .collect();
        let (expected, got) = (self.needed(), self.agents.len() - missing.len());
        if got >= expected {
            return Ok(());
        }
        Err(AuditProofError::Cosigners { expected, got, missing: missing.join(", ") })
    }
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
    use tabmesh_federation::id::Digest as NamedDigest;
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
        let ledger: Vec<RecordedEntry> = (0..3)
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
        let line = RefusedRequest {
            time_ms: 7,
            plan_digest: "ab".repeat(32),
            product: "a.orders".to_owned(),
            rules: vec!["epsilon_above_limit".to_owned()],
        };
        let facts = PlanRefusal {
            plan_digest: line.plan_digest.clone(),
            product: line.product.clone(),
            rules: line.rules.clone(),
            decision: serde_json::Value::Null,
        };
        let refusal = serde_json::json!({ "time_ms": 7, "by": "o", "action": PLAN_REFUSED, "facts": facts });
        let manifest = "cd".repeat(32);
        let published = serde_json::json!({ "time_ms": 8, "by": "o", "action": PUBLISHED, "facts": { "manifest": manifest } });
        let (refusal, published) = (refusal.to_string(), published.to_string());
        let mut tree = MerkleTree::new();
        for leaf in ["a", &refusal, &payload, &published, "e"] {
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
        let entry = |index: u64, payload: String| {
            let inclusion = tree.inclusion_proof(index, 5).unwrap().iter().map(ToString::to_string).collect();
            ProvenEntry { index, payload, inclusion }
        };
        let entries = vec![entry(1, refusal), entry(3, published)];
        let heads = vec![ProvenHead { agent: AGENT.to_owned(), index: 2, payload, inclusion }];
        let mut report = build(ReportInput {
            deployment: "d".to_owned(),
            period: Period { from_ms: 0, until_ms: 1 },
            generated_at_ms: 0,
            generator: "test".to_owned(),
            generator_digest: None,
            stated: Stated::default(),
            published: vec![Published { manifest, plan_digest: "ef".repeat(32), created_at_ms: 8 }],
            attacks: Vec::new(),
            trust_model: Vec::new(),
            products: Vec::new(),
            refused: vec![line],
            disjoint: Vec::new(),
            unprotected_facts: Vec::new(),
            audit: Some(AuditProof { note: note.to_string(), heads, entries }),
        })
        .unwrap();
        report.ledgers = vec![LedgerRecord { agent: AGENT.to_owned(), entries: ledger, head: Some(head) }];
        report
    }

    #[test]
    fn a_cosigned_log_proves_the_ledger_it_records() {
        let witnessed = verify(&report(), &key(1), None).unwrap().unwrap();
        assert_eq!((witnessed.size, witnessed.cosigned), (5, vec![AGENT.to_owned()]));
        assert_eq!(witnessed.proven, BTreeMap::from([(AGENT.to_owned(), 3)]));
        assert_eq!((witnessed.refused, witnessed.published), (1, 1));
        let mut later = report();
        audit(&mut later).entries.clear();
        let later = verify(&later, &key(1), None).unwrap().unwrap();
        assert_eq!((later.refused, later.published), (0, 0), "after the checkpoint");
        let mut without = report();
        without.audit = None;
        assert_eq!(verify(&without, &key(1), None), Ok(None));
    }

    #[test]
    fn what_was_changed_is_named() {
        let refused = |edit: fn(&mut Report), word: &str| {
            let mut report = report();
            edit(&mut report);
            let error = verify(&report, &key(1), None).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(|r| r.ledgers[0].entries.truncate(2), "was cut");
        refused(|r| r.ledgers[0].entries[2].hash = [7; 32], "rewritten");
        refused(|r| r.ledgers.clear(), "no ledger");
        refused(|r| r.refused.clear(), "entry 1 of the audit log: the report has no such line");
        refused(|r| r.refused[0].rules.clear(), "entry 1 of the audit log: the report has no such line");
        refused(
            |r| r.published[0].manifest = "00".repeat(32),
            "entry 3 of the audit log: the report has no such line",
        );
        refused(|r| audit(r).entries[0].payload = "{}".to_owned(), "root");
        refused(|r| audit(r).entries[1].inclusion[0] = "zz".to_owned(), "isn't a hash");
        refused(|r| audit(r).heads[0].index = 3, "root");
        refused(|r| audit(r).heads[0].payload = "d".to_owned(), "root");
        refused(|r| audit(r).heads[0].agent.push('x'), "another agent");
        refused(|r| audit(r).heads[0].inclusion[0] = "zz".to_owned(), "isn't a hash");
        refused(|r| audit(r).note = audit(r).note.replacen("\n5\n", "\n6\n", 1), "doesn't verify");
        let other = verify(&report(), &key(3), None).unwrap_err();
        assert!(matches!(other, AuditProofError::Checkpoint(_)), "{other}");
        // A witness whose key the report doesn't have counts as none.
        let mut unknown = report();
        unknown.ledgers[0].head = None;
        assert!(verify(&unknown, &key(1), None).unwrap().unwrap().cosigned.is_empty());
    }

    fn trust(agents: &[(&str, u8)], cosigners: Option<usize>) -> Trust {
        let agents = agents.iter().map(|(agent, seed)| (AgentId::new(*agent).unwrap(), key(*seed)));
        Trust { agents: agents.collect(), cosigners }
    }

    const OTHER: &str = "spiffe://mesh/tabmesh/agent/b/one";

    #[test]
    fn an_auditor_with_keys_of_its_own_believes_no_agent_that_the_coordinator_made_up() {
        // The report is consistent in itself; only who holds the agent's true key sees that this agent is another.
        let made_up = trust(&[(AGENT, 9)], None);
        assert!(verify(&report(), &key(1), None).is_ok());
        let error = verify(&report(), &key(1), Some(&made_up)).unwrap_err();
        assert!(matches!(&error, AuditProofError::Agent { agent, .. } if agent == AGENT), "{error}");
        let stranger = verify(&report(), &key(1), Some(&trust(&[(OTHER, 2)], Some(0)))).unwrap_err();
        assert!(stranger.to_string().contains("none of those given"), "{stranger}");

        let witnessed = verify(&report(), &key(1), Some(&trust(&[(AGENT, 2)], None))).unwrap().unwrap();
        assert_eq!((witnessed.cosigned, witnessed.without_ledger), (vec![AGENT.to_owned()], vec![]));
    }

    #[test]
    fn an_auditor_asks_for_heads_proofs_and_cosignatures() {
        let both = |cosigners| trust(&[(AGENT, 2), (OTHER, 4)], cosigners);
        let missing = verify(&report(), &key(1), Some(&both(None))).unwrap_err();
        let expected = AuditProofError::Cosigners { expected: 2, got: 1, missing: OTHER.to_owned() };
        assert_eq!(missing, expected);
        let one = verify(&report(), &key(1), Some(&both(Some(1)))).unwrap().unwrap();
        assert_eq!(one.without_ledger, [OTHER]);

        let refused = |edit: fn(&mut Report), word: &str| {
            let mut report = report();
            edit(&mut report);
            assert!(verify(&report, &key(1), None).is_ok(), "{word}");
            let error =
                verify(&report, &key(1), Some(&trust(&[(AGENT, 2)], Some(0)))).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(|r| r.ledgers[0].head = None, "no head");
        refused(|r| r.audit = None, "no checkpoint");
        refused(|r| audit(r).heads.clear(), "isn't in the audit log");
    }

    fn audit(report: &mut Report) -> &mut AuditProof {
        report.audit.as_mut().unwrap()
    }
}
