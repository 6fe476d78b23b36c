//! A coordinator's log in memory, and an agent that is shown it.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use ring::signature::{Ed25519KeyPair, KeyPair};
use tabmesh_federation::id::AgentId;
use tabmesh_federation::witness::{LEDGER_HEAD_ACTION, LedgerHead, ProvenLeaf, WitnessReply, WitnessRequest};
use tabmesh_privacy::ledger::ChainedEntry;
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_store::audit_origin;
use tabmesh_store::checkpoint::{Checkpoint, KeyKind, Note, Signer, VerifierKey};
use tabmesh_store::merkle::MerkleTree;

use super::{Witness, WitnessError, named};

const COORDINATOR: &str = "spiffe://mesh/tabmesh/coordinator";
const AGENT: &str = "spiffe://mesh/tabmesh/agent/a/one";
const PRODUCT: &str = "a.orders";

fn pair(seed: u8) -> Arc<Ed25519KeyPair> {
    Arc::new(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap())
}

fn public(seed: u8) -> [u8; 32] {
    pair(seed).public_key().as_ref().try_into().unwrap()
}

/// The agent's ledger: the hashes are all that a witness looks at.
fn ledger() -> Vec<ChainedEntry> {
    (0..4).map(|i| ChainedEntry { seq: i, prev: [0; 32], hash: [i as u8; 32], payload: Vec::new() }).collect()
}

/// An audit log whose entry at `at` records the agent's head `seq`.
struct Mesh {
    tree: MerkleTree,
    leaves: Vec<String>,
}

impl Mesh {
    fn new(words: &[&str]) -> Self {
        let mut mesh = Self { tree: MerkleTree::new(), leaves: Vec::new() };
        words.iter().for_each(|word| mesh.push(word));
        mesh
    }

    fn push(&mut self, leaf: &str) {
        self.tree.push(leaf.as_bytes());
        self.leaves.push(leaf.to_owned());
    }

    fn head(&mut self, agent: &str, seq: u64) {
        self.head_with_hash(agent, seq, [seq as u8; 32]);
    }

    fn head_with_hash(&mut self, agent: &str, seq: u64, hash: [u8; 32]) {
        let head = LedgerHead {
            agent: AgentId::new(agent).unwrap(),
            product: PRODUCT.to_owned(),
            seq,
            hash: tabmesh_federation::id::Digest::from_bytes(hash),
        };
        let entry = serde_json::json!({ "action": LEDGER_HEAD_ACTION, "facts": head });
        self.push(&entry.to_string());
    }

    fn request(&self, key: u8, old_size: u64, own: u64) -> WitnessRequest {
        let size = self.tree.size();
        let owner = Signer::from_pair(&audit_origin(COORDINATOR), KeyKind::Ed25519, pair(key)).unwrap();
        let root = self.tree.root(size).unwrap();
        let checkpoint = Checkpoint { origin: audit_origin(COORDINATOR), size, root, extensions: Vec::new() };
        WitnessRequest {
            note: Note::sign(&checkpoint, &owner).unwrap().to_string(),
            old_size,
            consistency: self
                .tree
                .consistency_proof(old_size, size)
                .unwrap()
                .into_iter()
                .map(named)
                .collect(),
            own: ProvenLeaf {
                index: own,
                payload: self.leaves[usize::try_from(own).unwrap()].clone(),
                inclusion: self.tree.inclusion_proof(own, size).unwrap().into_iter().map(named).collect(),
            },
        }
    }
}

fn witness(folder: &tempfile::TempDir) -> Witness {
    let coordinator_key = VerifyingKey::from_bytes(public(1));
    Witness::new(folder.path(), (COORDINATOR, &coordinator_key), (AGENT, &pair(2))).unwrap()
}

fn judge(witness: &Witness, request: &WitnessRequest) -> Result<WitnessReply, WitnessError> {
    witness.judge(request, PRODUCT, &ledger(), 1_700_000_000)
}

#[test]
fn a_growing_log_is_cosigned_and_a_repeated_request_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut mesh = Mesh::new(&["start", "plan"]);
    mesh.head(AGENT, 1);
    let first = mesh.request(1, 0, 2);
    for _ in 0..2 {
        let WitnessReply::Cosigned { note } = judge(&witness(&folder), &first).unwrap() else { panic!() };
        let owner = VerifierKey::new(&audit_origin(COORDINATOR), KeyKind::Ed25519, public(1)).unwrap();
        let agent = VerifierKey::new(AGENT, KeyKind::CosignatureV1, public(2)).unwrap();
        let (checkpoint, cosigned) =
            Note::parse(note.as_bytes()).unwrap().open(&owner, &[&agent], 1).unwrap();
        assert_eq!((checkpoint.size, cosigned[0].time_s), (3, 1_700_000_000));
    }
    mesh.push("more");
    mesh.head(AGENT, 3);
    assert!(matches!(judge(&witness(&folder), &mesh.request(1, 3, 4)), Ok(WitnessReply::Cosigned { .. })));
}

#[test]
fn a_proof_from_elsewhere_is_answered_with_where_the_agent_stands() {
    let folder = tempfile::tempdir().unwrap();
    let mut mesh = Mesh::new(&["start"]);
    mesh.head(AGENT, 1);
    judge(&witness(&folder), &mesh.request(1, 0, 1)).unwrap();
    let root = named(mesh.tree.root(2).unwrap());
    mesh.push("more");
    let answer = judge(&witness(&folder), &mesh.request(1, 1, 1)).unwrap();
    assert_eq!(answer, WitnessReply::Held { size: 2, root });
    assert!(matches!(judge(&witness(&folder), &mesh.request(1, 2, 1)), Ok(WitnessReply::Cosigned { .. })));
}

#[test]
fn roll_backs_and_rewrites_are_refused_and_both_notes_kept() {
    let folder = tempfile::tempdir().unwrap();
    let mut mesh = Mesh::new(&["start", "plan"]);
    mesh.head(AGENT, 1);
    let confirmed = mesh.request(1, 0, 2);
    judge(&witness(&folder), &confirmed).unwrap();

    let mut shorter = Mesh::new(&["start"]);
    shorter.head(AGENT, 1);
    let refused = judge(&witness(&folder), &shorter.request(1, 0, 1));
    assert!(matches!(refused, Err(WitnessError::RolledBack { held: 3, got: 2, .. })));

    let mut other = Mesh::new(&["start", "another plan"]);
    other.head(AGENT, 1);
    for longer in [false, true] {
        if longer {
            other.push("more");
        }
        let shown = other.request(1, 3, 2);
        let Err(WitnessError::Forked { held: 3, evidence, .. }) = judge(&witness(&folder), &shown) else {
            panic!("a rewritten log is refused")
        };
        let text = std::fs::read_to_string(evidence).unwrap();
        assert!(text.contains(&confirmed.note) && text.contains(&shown.note));
    }
    // The memory is what it was: the true log goes on.
    mesh.push("more");
    assert!(matches!(judge(&witness(&folder), &mesh.request(1, 3, 2)), Ok(WitnessReply::Cosigned { .. })));
}

#[test]
fn a_log_without_the_agents_own_head_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut mesh = Mesh::new(&["start"]);
    mesh.head("spiffe://mesh/tabmesh/agent/b/one", 1);
    mesh.head(AGENT, 9);
    mesh.head(AGENT, 2);
    let refused = |request: &WitnessRequest, word: &str| match judge(&witness(&folder), request) {
        Err(WitnessError::NotIncluded { reason }) => assert!(reason.contains(word), "{reason}"),
        other => panic!("{other:?}"),
    };
    refused(&mesh.request(1, 0, 0), "no ledger's head");
    refused(&mesh.request(1, 0, 1), "another agent");
    refused(&mesh.request(1, 0, 2), "more entries");
    let mut moved = mesh.request(1, 0, 3);
    moved.own.index = 2;
    refused(&moved, "root");
    let mut false_hash = mesh.request(1, 0, 3);
    false_hash.own.payload = false_hash.own.payload.replace("0202", "0203");
    refused(&false_hash, "root");
    assert!(!folder.path().join("audit-seen.json").exists(), "nothing was confirmed");
    assert!(judge(&witness(&folder), &mesh.request(1, 0, 3)).is_ok());
}

/// Attack: the log itself records, provably, an entry that this agent never wrote at that place.
#[test]
fn a_head_that_the_log_includes_under_another_hash_is_not_cosigned() {
    let folder = tempfile::tempdir().unwrap();
    let mut mesh = Mesh::new(&["start"]);
    mesh.head_with_hash(AGENT, 2, [3; 32]);
    match judge(&witness(&folder), &mesh.request(1, 0, 1)) {
        Err(WitnessError::NotIncluded { reason }) => {
            assert!(reason.contains("another entry at that place"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert!(!folder.path().join("audit-seen.json").exists(), "nothing was confirmed");
    // The hash of the neighbouring entry is no better, and the true one is taken.
    mesh.head_with_hash(AGENT, 3, [2; 32]);
    assert!(matches!(
        judge(&witness(&folder), &mesh.request(1, 0, 2)),
        Err(WitnessError::NotIncluded { .. })
    ));
    mesh.head(AGENT, 3);
    assert!(matches!(judge(&witness(&folder), &mesh.request(1, 0, 3)), Ok(WitnessReply::Cosigned { .. })));
}

#[test]
fn another_key_and_a_damaged_memory_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut mesh = Mesh::new(&["start"]);
    mesh.head(AGENT, 1);
    assert!(matches!(judge(&witness(&folder), &mesh.request(7, 0, 1)), Err(WitnessError::Note(_))));
    std::fs::write(folder.path().join("audit-seen.json"), b"{}").unwrap();
    assert!(matches!(judge(&witness(&folder), &mesh.request(1, 0, 1)), Err(WitnessError::File { .. })));
}
