//! What a message says once the noised payload, and what is computed from it, is covered.
//!
//! Messages are read as protobuf by field number, so nothing that a future field adds is overlooked: a field that is not
//! covered here is compared byte for byte.

use std::collections::BTreeSet;

use serde_json::Value;
use tabmesh_federation::secagg::document::Reply;
use tabmesh_federation::witness::WitnessReply;

/// A covered message.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Said {
    /// A noised vector: everything but payload, its digest and the ledger hash; and the payload's length.
    Vector { rest: Vec<Field>, bytes: usize },
    /// A ledger statement: product and entries, digests and mechanism figures covered.
    Ledger { product: Vec<u8>, entries: Vec<String> },
    /// An answer to a step of a secure sum: the assignment, the step with whom it is about, and the size. Keys, seals and
    /// signatures follow from the descriptor of the sum, and that from what was released before it.
    Sum { assignment: Vec<u8>, step: String, bytes: usize },
    /// An answer to a checkpoint of the audit log: the assignment, whether it was cosigned, and the size. The log's root and
    /// with it the signature follow from the ledgers' hashes.
    Witnessed { assignment: Vec<u8>, cosigned: bool, bytes: usize },
    /// A request for an artefact, whose name is a digest.
    Fetch,
    /// Anything else, whole.
    Other(Vec<u8>),
}

/// A field: its number and its bytes.
pub(crate) type Field = (u64, Vec<u8>);

/// Covers one message of an agent.
pub(crate) fn said(message: &[u8]) -> Said {
    let Some(fields) = fields(message) else { return Said::Other(message.to_vec()) };
    let numbers: BTreeSet<u64> = fields.iter().map(|(number, _)| *number).collect();
    let lengths = |number: u64| fields.iter().filter(move |(n, _)| *n == number).map(|(_, v)| v.len());
    if numbers.contains(&5) && lengths(6).eq([32]) && lengths(7).eq([32]) {
        let bytes = lengths(5).sum();
        let rest = fields.into_iter().filter(|(number, _)| ![5, 6, 7].contains(number)).collect();
        return Said::Vector { rest, bytes };
    }
    if numbers == BTreeSet::from([1, 2, 3]) && lengths(3).eq([64]) {
        let product = fields.iter().filter(|(n, _)| *n == 1).flat_map(|(_, v)| v.clone()).collect();
        let entries = fields.iter().filter(|(n, _)| *n == 2).map(|(_, entry)| covered(entry)).collect();
        return Said::Ledger { product, entries };
    }
    if numbers == BTreeSet::from([1, 2, 3]) && lengths(3).eq([32]) {
        let field = |number: u64| {
            fields.iter().find(|(n, _)| *n == number).map(|(_, v)| v.clone()).unwrap_or_default()
        };
        let document = field(2);
        if let Ok(reply) = Reply::from_bytes(&document) {
            return Said::Sum { assignment: field(1), step: about(&reply), bytes: document.len() };
        }
        if let Ok(reply) = serde_json::from_slice::<WitnessReply>(&document) {
            let cosigned = matches!(reply, WitnessReply::Cosigned { .. });
            return Said::Witnessed { assignment: field(1), cosigned, bytes: document.len() };
        }
    }
    if numbers == BTreeSet::from([1]) && lengths(1).eq([32]) {
        return Said::Fetch;
    }
    Said::Other(message.to_vec())
}

/// The step an answer is to, and the seats it names.
fn about(reply: &Reply) -> String {
    let seat = reply.seat();
    match reply {
        Reply::Advert(_) => format!("{seat} advert"),
        Reply::Revealed(_) => format!("{seat} reveals its part of the order"),
        Reply::Shares(shares) => format!("{seat} shares for {:?}", shares.sealed.keys()),
        Reply::Consent(_) => format!("{seat} consent"),
        Reply::Opened(opened) => {
            format!("{seat} opens seeds of {:?}, keys of {:?}", opened.seeds.keys(), opened.keys.keys())
        }
        Reply::Complaint(complaint) => format!("{seat} can't open what {} sealed", complaint.about),
    }
}

/// A ledger entry without chain hash, payload digest, query digest and the figures of its mechanism.
///
/// The query or descriptor of a step, and with it the mechanism, follows from what was released before it.
fn covered(entry: &[u8]) -> String {
    let fields = fields(entry).unwrap_or_default();
    let payload =
        fields.iter().find(|(number, _)| *number == 3).map(|(_, v)| v.as_slice()).unwrap_or_default();
    // What isn't an entry is compared as it is.
    let Ok(mut json) = serde_json::from_slice::<Value>(payload) else { return format!("{entry:?}") };
    for name in ["payload_digest", "query_digest", "event"] {
        if let Some(value) = json.get_mut(name) {
            *value = Value::Null;
        }
    }
    let place = fields.iter().find(|(number, _)| *number == 1).map(|(_, v)| v.clone()).unwrap_or_default();
    format!("{place:?} {json}")
}

/// The fields of a protobuf message in order; nothing if it is none.
pub(crate) fn fields(mut bytes: &[u8]) -> Option<Vec<Field>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let (key, rest) = varint(bytes)?;
        let (value, rest) = match key & 7 {
            0 => {
                let (_, after) = varint(rest)?;
                rest.split_at(rest.len() - after.len())
            }
            2 => {
                let (length, rest) = varint(rest)?;
                rest.split_at_checked(usize::try_from(length).ok()?)?
            }
            _ => return None,
        };
        all.push((key >> 3, value.to_vec()));
        bytes = rest;
    }
    Some(all)
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (place, byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(place + 1..)?));
        }
    }
    None
}
