//! The audit log's checkpoints: after each plan the ledgers' heads enter the log, and every agent is asked to cosign it.
//!
//! The log's leaves are its entries, byte for byte (RFC 6962). The record of the latest checkpoint gathers cosignatures as
//! they come; what an agent confirmed last is where its next consistency proof starts. Nothing waits for a witness.

mod proof;

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tabmesh_federation::witness::{LEDGER_HEAD_ACTION, LedgerHead, ProvenLeaf, WitnessReply, WitnessRequest};
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::{AssignmentKind, Id};
use tabmesh_store::checkpoint::{Checkpoint, CheckpointError, KeyKind, Note, Signer, VerifierKey};
use tabmesh_store::merkle::MerkleTree;
use tabmesh_store::{Digest, Op, audit_origin};

pub(crate) use self::proof::of_report;
pub use self::proof::{AuditProofError, Trust, Witnessed, verify};

use crate::error::CoordinatorError;
use crate::mesh::{Mesh, locked, named, stored};
use crate::outbox::Outbox;
use crate::pipeline::{agent_id, assignment_id};

/// The last head of an agent's ledger that is in the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Logged {
    index: u64,
    hash: Digest,
}

/// The part of the log that an agent confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Confirmed {
    size: u64,
    root: Digest,
}

/// Waits until the agents of a plan have stated their ledgers at its closing, or patience ends; then asks every admitted
/// agent to witness the log.
///
/// # Errors
/// [`CoordinatorError`] if log or records can't be read or written.
pub(crate) async fn after_plan(
    mesh: &Arc<Mesh>,
    closing: &Id,
    peers: usize,
    patience: Duration,
) -> Result<(), CoordinatorError> {
    mesh.answers.wait(closing, peers, patience).await;
    let mesh = Arc::clone(mesh);
    let asked = tokio::task::spawn_blocking(move || checkpoint(&mesh)).await;
    asked.map_err(|error| CoordinatorError::Step(format!("witnessing ended early: {error}")))?
}

/// Records every ledger's head, signs a checkpoint over the log, and asks for cosignatures.
fn checkpoint(mesh: &Mesh) -> Result<(), CoordinatorError> {
    let agents: Vec<SpiffeId> = mesh.catalog.all().into_iter().map(|(agent, _)| agent).collect();
    for agent in &agents {
        record_head(mesh, agent)?;
    }
    let tree = tree(mesh)?;
    let size = tree.size();
    let root = tree.root(size).unwrap_or_else(tabmesh_store::merkle::empty_root);
    let origin = origin(mesh);
    let owner = Signer::from_pair(&origin, KeyKind::Ed25519, Arc::clone(&mesh.key)).map_err(failed)?;
    let note = Note::sign(&Checkpoint { origin, size, root, extensions: Vec::new() }, &owner);
    let note = note.map_err(failed)?.to_string();
    {
        let _one_writer = locked(&mesh.witness);
        mesh.records.put(LATEST, note.as_bytes())?;
    }
    let id = assignment_id(mesh, None)?;
    if let Some(before) = mesh.records.get(ASKED)?
        && let Ok(before) = String::from_utf8_lossy(&before).parse()
    {
        mesh.outbox.withdraw(&agents, &before)?;
    }
    mesh.records.put(ASKED, id.to_string().as_bytes())?;
    for agent in &agents {
        ask(mesh, &tree, &note, agent, &id)?;
    }
    Ok(())
}

/// Appends the head of an agent's ledger as it stated it, unless it is in the log already.
fn record_head(mesh: &Mesh, agent: &SpiffeId) -> Result<(), CoordinatorError> {
    let Some(admitted) = mesh.catalog.get(agent) else { return Ok(()) };
    let (entries, _) = mesh.mirror.entries(agent, &admitted.contract.name)?;
    let Some(last) = entries.last() else { return Ok(()) };
    if logged(mesh, agent)?.is_some_and(|logged| logged.hash == last.hash) {
        return Ok(());
    }
    let head = LedgerHead {
        agent: agent_id(agent)?,
        product: admitted.contract.name.clone(),
        seq: last.seq,
        hash: named(last.hash),
    };
    let entry = mesh.audit_entry("coordinator", LEDGER_HEAD_ACTION, head)?;
    let record = Logged { index: entry.seq, hash: last.hash };
    let bytes = serde_json::to_vec(&record).map_err(CoordinatorError::stored("ledger head"))?;
    Ok(mesh.records.put(&key("head", agent), &bytes)?)
}

/// Asks one agent for a cosignature, with the proofs it needs.
fn ask(
    mesh: &Mesh,
    tree: &MerkleTree,
    note: &str,
    agent: &SpiffeId,
    id: &Id,
) -> Result<(), CoordinatorError> {
    // An agent that stated no ledger has nothing to look for.
    let Some(logged) = logged(mesh, agent)? else { return Ok(()) };
    let size = tree.size();
    let old_size = confirmed(mesh, agent)?.map_or(0, |confirmed| confirmed.size).min(size);
    let gap = || CoordinatorError::Step("the audit log is shorter than its own records".to_owned());
    let consistency = tree.consistency_proof(old_size, size).ok_or_else(gap)?;
    let own = proven(mesh, tree, logged.index)?.ok_or_else(gap)?;
    let consistency = consistency.into_iter().map(named).collect();
    let request = WitnessRequest { note: note.to_owned(), old_size, consistency, own };
    let document = serde_json::to_vec(&request).map_err(CoordinatorError::stored("witness request"))?;
    mesh.outbox.assign(std::slice::from_ref(agent), id, AssignmentKind::Witness, &document)
}

/// A leaf with its proof; nothing beyond the tree.
fn proven(mesh: &Mesh, tree: &MerkleTree, index: u64) -> Result<Option<ProvenLeaf>, CoordinatorError> {
    let Some(inclusion) = tree.inclusion_proof(index, tree.size()) else { return Ok(None) };
    let place = usize::try_from(index).unwrap_or(usize::MAX);
    let Some(entry) = mesh.audit_log().entries().nth(place).transpose()? else { return Ok(None) };
    let payload = String::from_utf8_lossy(&entry.payload).into_owned();
    Ok(Some(ProvenLeaf { index, payload, inclusion: inclusion.into_iter().map(named).collect() }))
}

/// Takes an agent's answer; durable when it returns. An answer nobody waits for any more changes nothing.
///
/// # Errors
/// [`CoordinatorError::Checkpoint`] for a note that this agent didn't sign or this coordinator didn't; any failure of
/// the store.
pub(crate) fn take(
    mesh: &Mesh,
    agent: &SpiffeId,
    id: &Id,
    reply: WitnessReply,
) -> Result<(), CoordinatorError> {
    if !mesh.outbox.owes(agent, id)? {
        return Ok(());
    }
    match reply {
        WitnessReply::Cosigned { note } => cosigned(mesh, agent, id, &note),
        WitnessReply::Held { size, root } => {
            let tree = tree(mesh)?;
            if tree.root(size) != Some(stored(root)) {
                tracing::error!(%agent, size, "an agent confirmed another history of the audit log");
                let facts = serde_json::json!({ "size": size, "root": root.to_string() });
                mesh.audit(&agent.to_string(), "witness_conflict", facts)?;
                return mesh.outbox.answered(agent, id);
            }
            let confirmed = Confirmed { size, root: stored(root) };
            let bytes = serde_json::to_vec(&confirmed).map_err(CoordinatorError::stored("witness"))?;
            mesh.records.commit(&[Op::put(key("confirmed", agent), bytes), Outbox::settles(agent, id)])?;
            // Once more, with the proof it needs, over the checkpoint that the others are asked about.
            let Some(note) = latest(mesh)? else { return Ok(()) };
            let of_note = Checkpoint::parse(note.text()).map_err(failed)?.size;
            let again = first(mesh, of_note)?;
            ask(mesh, &again, &note.to_string(), agent, &assignment_id(mesh, None)?)
        }
    }
}

fn cosigned(mesh: &Mesh, agent: &SpiffeId, id: &Id, note: &str) -> Result<(), CoordinatorError> {
    let admitted = mesh.catalog.get(agent);
    let missing = || CoordinatorError::NotFound { what: "admitted contract of", id: agent.to_string() };
    let witness = VerifierKey::new(
        &agent.to_string(),
        KeyKind::CosignatureV1,
        admitted.ok_or_else(missing)?.public_key,
    );
    let (witness, note) = (witness.map_err(failed)?, Note::parse(note.as_bytes()).map_err(failed)?);
    let checkpoint = Checkpoint::parse(note.text()).map_err(failed)?;
    let confirmed = Confirmed { size: checkpoint.size, root: checkpoint.root };
    let bytes = serde_json::to_vec(&confirmed).map_err(CoordinatorError::stored("witness"))?;
    let _one_writer = locked(&mesh.witness);
    let Some(mut latest) = latest(mesh)? else { return mesh.outbox.answered(agent, id) };
    latest.take(&witness, &note).map_err(failed)?;
    Ok(mesh.records.commit(&[
        Op::put(LATEST.to_vec(), latest.to_string().into_bytes()),
        Op::put(key("confirmed", agent), bytes),
        Outbox::settles(agent, id),
    ])?)
}

/// The whole log's tree.
fn tree(mesh: &Mesh) -> Result<MerkleTree, CoordinatorError> {
    first(mesh, u64::MAX)
}

/// The tree over the first entries of the log.
fn first(mesh: &Mesh, size: u64) -> Result<MerkleTree, CoordinatorError> {
    let mut tree = MerkleTree::new();
    for entry in mesh.audit_log().entries().take(usize::try_from(size).unwrap_or(usize::MAX)) {
        tree.push(&entry?.payload);
    }
    Ok(tree)
}

/// The latest checkpoint with the cosignatures so far.
fn latest(mesh: &Mesh) -> Result<Option<Note>, CoordinatorError> {
    mesh.records.get(LATEST)?.map(|bytes| Note::parse(&bytes).map_err(failed)).transpose()
}

fn logged(mesh: &Mesh, agent: &SpiffeId) -> Result<Option<Logged>, CoordinatorError> {
    let record = mesh.records.get(&key("head", agent))?;
    let parse =
        |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(CoordinatorError::stored("ledger head"));
    record.map(parse).transpose()
}

fn confirmed(mesh: &Mesh, agent: &SpiffeId) -> Result<Option<Confirmed>, CoordinatorError> {
    let record = mesh.records.get(&key("confirmed", agent))?;
    let parse = |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(CoordinatorError::stored("witness"));
    record.map(parse).transpose()
}

fn origin(mesh: &Mesh) -> String {
    audit_origin(&mesh.identity.to_string())
}

fn key(what: &str, agent: &SpiffeId) -> Vec<u8> {
    format!("witness/{what}/{agent}").into_bytes()
}

fn failed(error: CheckpointError) -> CoordinatorError {
    CoordinatorError::Checkpoint(error)
}

/// Record of the latest checkpoint.
const LATEST: &[u8] = b"witness/latest";
/// Record of the assignment that asks for its cosignatures.
const ASKED: &[u8] = b"witness/asked";

#[cfg(test)]
mod tests;
