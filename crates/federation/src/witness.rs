//! What coordinator and agents say to each other about a checkpoint of the audit log.
//!
//! The log's leaves are the coordinator's audit entries, byte for byte; among them, after each plan, the heads of all
//! ledgers as they were stated. An agent confirms a checkpoint only after it has seen that the log it knew is the
//! beginning of the new one, and that its own ledger's head is in it: so a coordinator that shows two histories, or
//! leaves out a debit, needs every agent's help. Hashes, proofs and signatures are those of RFC 6962 and of the C2SP
//! checkpoint, cosignature and signed note; the binaries compute them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::id::{AgentId, Digest};

/// A checkpoint to confirm, with what one agent needs to check it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WitnessRequest {
    /// The checkpoint as a signed note.
    pub note: String,
    /// Size of the log that this agent confirmed last, as the coordinator has it; 0 for none.
    pub old_size: u64,
    /// Consistency proof from that size, lowest hash first.
    pub consistency: Vec<Digest>,
    /// The agent's own head in the log.
    pub own: ProvenLeaf,
}

/// A leaf of the log with the proof that it is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProvenLeaf {
    /// Its place in the log, from 0.
    pub index: u64,
    /// The audit entry, byte for byte.
    pub payload: String,
    /// Inclusion proof, lowest hash first.
    pub inclusion: Vec<Digest>,
}

/// An agent's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum WitnessReply {
    /// The note with the agent's cosignature.
    Cosigned {
        /// The signed note.
        note: String,
    },
    /// The proof starts elsewhere than at what the agent confirmed last: it needs one from here.
    Held {
        /// Size of the log it confirmed.
        size: u64,
        /// Root over it.
        root: Digest,
    },
}

/// The last entry of an agent's ledger as the audit log has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerHead {
    /// The agent.
    pub agent: AgentId,
    /// Its data product.
    pub product: String,
    /// Place of the entry in the ledger.
    pub seq: u64,
    /// Chain hash of the entry, which covers all before it.
    pub hash: Digest,
}

impl LedgerHead {
    /// The head that an audit entry records; nothing for another entry.
    #[must_use]
    pub fn of_entry(payload: &str) -> Option<Self> {
        let mut entry: Value = serde_json::from_str(payload).ok()?;
        if entry.get("action")?.as_str()? != LEDGER_HEAD_ACTION {
            return None;
        }
        serde_json::from_value(entry.get_mut("facts")?.take()).ok()
    }
}

/// The audit entry's action that records a [`LedgerHead`].
pub const LEDGER_HEAD_ACTION: &str = "ledger_head";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_head_is_read_from_its_audit_entry_and_from_no_other() {
        let head = LedgerHead {
            agent: AgentId::new("spiffe://mesh/tabmesh/agent/a/one").unwrap(),
            product: "a.orders".to_owned(),
            seq: 7,
            hash: Digest::of(b"entry"),
        };
        let entry = |action: &str, facts: Value| {
            serde_json::json!({ "time_ms": 1, "actor": "coordinator", "action": action, "facts": facts })
                .to_string()
        };
        let facts = serde_json::to_value(&head).unwrap();
        assert_eq!(LedgerHead::of_entry(&entry(LEDGER_HEAD_ACTION, facts.clone())), Some(head));
        assert_eq!(LedgerHead::of_entry(&entry("publish", facts.clone())), None);
        let mut more = facts;
        more["rows"] = 3.into();
        assert_eq!(LedgerHead::of_entry(&entry(LEDGER_HEAD_ACTION, more)), None);
        assert_eq!(LedgerHead::of_entry("{}"), None);
    }

    #[test]
    fn documents_survive_json_and_unknown_fields_are_refused() {
        let own = ProvenLeaf { index: 3, payload: "{}".to_owned(), inclusion: vec![Digest::of(b"a")] };
        let request = WitnessRequest { note: "n".to_owned(), old_size: 2, consistency: Vec::new(), own };
        let json = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<WitnessRequest>(&json).unwrap(), request);
        assert!(serde_json::from_str::<WitnessRequest>(&json.replacen('{', "{\"more\":1,", 1)).is_err());
        let held = WitnessReply::Held { size: 2, root: Digest::of(b"r") };
        let json = serde_json::to_string(&held).unwrap();
        assert_eq!(serde_json::from_str::<WitnessReply>(&json).unwrap(), held);
    }
}
