//! Two agents that state ledgers, and what a coordinator makes of their answers.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use ring::signature::Ed25519KeyPair;
use tabmesh_proto::message::{ChainedEntry, LedgerStatement};
use tabmesh_proto::status::WireError;
use tabmesh_store::merkle::verify_consistency;

use super::*;
use crate::test_mesh::{TestMesh, agent, product};

/// A coordinator with the agents 0 and 1.
struct World {
    test: TestMesh,
    ledgers: [Vec<ChainedEntry>; 2],
}

impl World {
    fn new() -> Self {
        Self { test: TestMesh::new(2), ledgers: [Vec::new(), Vec::new()] }
    }

    fn mesh(&self) -> &Mesh {
        &self.test.mesh
    }

    /// Appends to an agent's ledger and states all of it.
    fn debit(&mut self, i: usize, what: &str) {
        let ledger = &mut self.ledgers[i];
        let prev = ledger.last().map_or([0; 32], ChainedEntry::hash);
        ledger.push(ChainedEntry { seq: ledger.len() as u64, prev, payload: what.as_bytes().to_vec() });
        let statement =
            LedgerStatement::sign(product(i), ledger.clone(), &agent(i), &self.test.pairs[i]).unwrap();
        self.test.mesh.mirror.state(&agent(i), &statement).unwrap();
    }

    /// What an agent is asked to witness; nothing if it owes no answer.
    fn asked(&self, i: usize) -> Option<(Id, WitnessRequest)> {
        let owed = self.test.owed(i);
        assert!(owed.len() <= 1, "an agent owes one answer at most");
        let assignment = owed.first()?;
        assert_eq!(assignment.kind(), AssignmentKind::Witness);
        let request = serde_json::from_slice(assignment.document()).unwrap();
        Some((assignment.id().clone(), request))
    }

    /// The note that an agent asked for would give, signed with the key of `by`.
    fn cosign(&self, i: usize, by: usize, note: &str) -> WitnessReply {
        let signer = Signer::from_pair(
            &agent(i).to_string(),
            KeyKind::CosignatureV1,
            Arc::clone(&self.test.pairs[by]),
        );
        let mut note = Note::parse(note.as_bytes()).unwrap();
        note.cosign(&signer.unwrap(), 9).unwrap();
        WitnessReply::Cosigned { note: note.to_string() }
    }

    fn take(&self, i: usize, id: &Id, reply: WitnessReply) -> Result<(), CoordinatorError> {
        take(self.mesh(), &agent(i), id, reply)
    }

    /// Agents whose cosignature is on the latest checkpoint.
    fn cosigners(&self) -> Vec<String> {
        let owner =
            VerifierKey::new(&origin(self.mesh()), KeyKind::Ed25519, public(&self.mesh().key)).unwrap();
        let keys = [0, 1].map(|i| {
            VerifierKey::new(&agent(i).to_string(), KeyKind::CosignatureV1, public(&self.test.pairs[i]))
                .unwrap()
        });
        let note = latest(self.mesh()).unwrap().unwrap();
        let (_, cosigned) = note.open(&owner, &keys.iter().collect::<Vec<_>>(), 0).unwrap();
        cosigned.into_iter().map(|signed| signed.name).collect()
    }

    /// The audit log's entries of an action.
    fn logged(&self, action: &str) -> Vec<serde_json::Value> {
        let entries = self.mesh().audit_log().entries().collect::<Result<Vec<_>, _>>().unwrap();
        let parsed = entries.iter().map(|entry| serde_json::from_slice(&entry.payload).unwrap());
        parsed.filter(|entry: &serde_json::Value| entry["action"] == action).collect()
    }
}

fn public(key: &Ed25519KeyPair) -> [u8; 32] {
    tabmesh_proto::signing::public_key(key)
}

fn checkpoint_of(request: &WitnessRequest) -> Checkpoint {
    Checkpoint::parse(Note::parse(request.note.as_bytes()).unwrap().text()).unwrap()
}

#[test]
fn heads_enter_the_log_once_and_cosignatures_gather_on_one_checkpoint() {
    let mut world = World::new();
    world.debit(0, "first of one");
    world.debit(1, "first of another");
    checkpoint(world.mesh()).unwrap();
    assert_eq!(world.logged(LEDGER_HEAD_ACTION).len(), 2);
    assert!(world.cosigners().is_empty());
    for i in [0, 1] {
        let (id, request) = world.asked(i).unwrap();
        let head = LedgerHead::of_entry(&request.own.payload).unwrap();
        assert_eq!((head.agent.as_str(), head.seq), (agent(i).to_string().as_str(), 0));
        assert_eq!(*head.hash.as_bytes(), world.ledgers[i][0].hash());
        let reply = world.cosign(i, i, &request.note);
        // A receipt that got lost makes the agent answer again.
        for _ in 0..3 {
            world.take(i, &id, reply.clone()).unwrap();
        }
        assert_eq!(world.asked(i), None);
    }
    assert_eq!(world.cosigners(), [agent(0).to_string(), agent(1).to_string()]);
    let text = latest(world.mesh()).unwrap().unwrap().to_string();
    assert_eq!(text.matches("agent/d0/one ").count(), 1, "one line a witness: {text}");

    // The next checkpoint: only a ledger that grew gets another entry, and proofs start at what was confirmed.
    world.debit(1, "second");
    checkpoint(world.mesh()).unwrap();
    assert_eq!(world.logged(LEDGER_HEAD_ACTION).len(), 3);
    assert!(world.cosigners().is_empty(), "a new checkpoint has no witnesses yet");
    let (_, request) = world.asked(1).unwrap();
    assert_eq!(request.old_size, 2);
    assert_eq!(LedgerHead::of_entry(&request.own.payload).unwrap().seq, 1);
}

#[test]
fn an_agent_that_stands_elsewhere_is_asked_once_more_with_the_proof_from_there() {
    let mut world = World::new();
    world.debit(0, "first");
    checkpoint(world.mesh()).unwrap();
    let (id, request) = world.asked(0).unwrap();
    world.take(0, &id, world.cosign(0, 0, &request.note)).unwrap();
    let held = checkpoint_of(&request);
    // The coordinator lost what this agent confirmed, as after a restored backup.
    world.mesh().records.delete(&key("confirmed", &agent(0))).unwrap();
    world.debit(0, "second");
    checkpoint(world.mesh()).unwrap();
    let (id, request) = world.asked(0).unwrap();
    assert_eq!(request.old_size, 0);
    let size = held.size;
    world.take(0, &id, WitnessReply::Held { size, root: named(held.root) }).unwrap();

    let (again, proven) = world.asked(0).unwrap();
    assert_ne!(again, id);
    assert_eq!((proven.old_size, &proven.note), (size, &latest(world.mesh()).unwrap().unwrap().to_string()));
    let now = checkpoint_of(&proven);
    let proof: Vec<Digest> = proven.consistency.iter().map(|hash| stored(*hash)).collect();
    verify_consistency(size, &held.root, now.size, &now.root, &proof).unwrap();
    // The answer to the first request is nobody's any more: it neither settles the second nor is asked a third time.
    world.take(0, &id, WitnessReply::Held { size, root: named(held.root) }).unwrap();
    assert_eq!(world.asked(0).unwrap().0, again);
    world.take(0, &again, world.cosign(0, 0, &proven.note)).unwrap();
    assert_eq!(world.cosigners(), [agent(0).to_string()]);
    assert!(world.logged("witness_conflict").is_empty());
}

/// An agent that confirmed another history says so: the contradiction is on record, and it isn't asked on.
#[test]
fn a_history_that_this_log_never_had_is_a_conflict_in_the_log() {
    // Within this log and beyond its end.
    for size in [1, 1_000] {
        let mut world = World::new();
        world.debit(0, "first");
        checkpoint(world.mesh()).unwrap();
        let (id, _) = world.asked(0).unwrap();
        let root = named(Digest::of(b"another history"));
        for _ in 0..2 {
            world.take(0, &id, WitnessReply::Held { size, root }).unwrap();
        }
        let conflicts = world.logged("witness_conflict");
        assert_eq!(conflicts.len(), 1, "a repeated answer adds nothing");
        assert_eq!(conflicts[0]["actor"], agent(0).to_string());
        assert_eq!(conflicts[0]["facts"], serde_json::json!({ "size": size, "root": root.to_string() }));
        assert_eq!(world.asked(0), None);
        assert_eq!(confirmed(world.mesh(), &agent(0)).unwrap(), None);
        assert!(world.cosigners().is_empty());
    }
}

#[test]
fn notes_of_others_and_unasked_answers_change_nothing() {
    let mut world = World::new();
    world.debit(0, "first");
    world.debit(1, "first");
    checkpoint(world.mesh()).unwrap();
    let (id, request) = world.asked(0).unwrap();
    let before = latest(world.mesh()).unwrap().unwrap().to_string();
    let refused = |reply: WitnessReply| {
        let error = world.take(0, &id, reply).unwrap_err();
        assert!(matches!(error, CoordinatorError::Checkpoint(_)), "{error}");
        error.wire()
    };
    // Cosigned with another agent's key under this agent's name.
    refused(world.cosign(0, 1, &request.note));
    // Cosigned properly, by another agent: this one didn't sign.
    refused(world.cosign(1, 1, &request.note));
    // Nobody cosigned.
    refused(WitnessReply::Cosigned { note: request.note.clone() });
    // No note at all.
    let code = refused(WitnessReply::Cosigned { note: "hello".to_owned() });
    assert_ne!(code, WireError::Internal);
    // Another checkpoint, cosigned by the agent, that this coordinator never signed.
    let mut other = checkpoint_of(&request);
    other.root = Digest::of(b"another root");
    let forger = Arc::new(Ed25519KeyPair::from_seed_unchecked(&[9; 32]).unwrap());
    let forger = Signer::from_pair(&other.origin, KeyKind::Ed25519, forger).unwrap();
    refused(world.cosign(0, 0, &Note::sign(&other, &forger).unwrap().to_string()));
    assert_eq!(latest(world.mesh()).unwrap().unwrap().to_string(), before);
    assert_eq!(confirmed(world.mesh(), &agent(0)).unwrap(), None);
    assert_eq!(world.asked(0).unwrap().0, id, "the answer is still owed");

    // Answers under an id that the agent doesn't owe are dropped, whatever they say.
    let unknown: Id = "a-1".parse().unwrap();
    world.take(0, &unknown, world.cosign(0, 0, &request.note)).unwrap();
    let root = named(Digest::of(b"another history"));
    world.take(0, &unknown, WitnessReply::Held { size: 1, root }).unwrap();
    assert!(world.cosigners().is_empty() && world.logged("witness_conflict").is_empty());
    world.take(0, &id, world.cosign(0, 0, &request.note)).unwrap();
    assert_eq!(world.cosigners(), [agent(0).to_string()]);
}
