//! Secure sums as documents: what the coordinator asks in each step, and what an agent answers.
//!
//! The masked vector is no document: it travels as every noised vector does, with the receipt of its debit. No answer
//! here has a field that depends on rows.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::{AgentId, CollectionId, Digest, PlanDigest};
use crate::secagg::message::{
    Advert, AdvertList, Complaint, Consent, Consents, Delivery, Opened, Reveal, RevealList, Shares, Step,
    Survivors,
};
use crate::secagg::roster::Seat;
use tabmesh_privacy::budget::Rho;

/// Bytes that are no such document.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("not a {what} of a secure sum: {reason}")]
pub struct NotADocument {
    /// What was expected.
    what: &'static str,
    /// The parser's words, or the size.
    reason: String,
}

/// What is summed: the document that a vector answers, as the agents get it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Summed {
    /// JSON of a [`tabmesh_privacy::release::ReleaseQuery`].
    Stage(String),
    /// JSON of a [`crate::descriptor::RoundDescriptor`].
    Round(String),
}

impl Summed {
    /// The document's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Stage(text) | Self::Round(text) => text.as_bytes(),
        }
    }

    /// Its digest: the payload that a sum's descriptor names.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(self.bytes())
    }
}

/// A sum's opening: everything an agent needs to decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Opening {
    /// JSON of the [`crate::secagg::descriptor::SumDescriptor`].
    pub descriptor: String,
    /// What is summed.
    pub summed: Summed,
    /// Who takes part; identity keys are each agent's own knowledge.
    pub roster: BTreeSet<AgentId>,
}

/// The end of a sum, for those whose vectors are in it; the assignment that carries it is signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// Stage or round.
    pub collection: CollectionId,
    /// The plan.
    pub plan: PlanDigest,
    /// Digest of the sum's descriptor.
    pub descriptor: Digest,
    /// SHA-256 of the sum as little-endian 64-bit words.
    pub sum: Digest,
    /// Whose vectors are in it.
    pub survivors: BTreeSet<Seat>,
    /// What it costs each unit.
    pub rho: Rho,
}

/// The coordinator's side of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Take part?
    Advertise(Opening),
    /// Everybody's keys, on a ring: reveal your part of its order.
    Reveal(AdvertList),
    /// Everybody's part of the ring's order: share your secrets with your neighbours.
    Ring(RevealList),
    /// Everybody's keys, on the complete graph: share your secrets.
    Share(AdvertList),
    /// The shares for you: send your masked vector.
    Mask(Delivery),
    /// Who is in the sum: sign it.
    Consent(Survivors),
    /// Who has signed: open your shares.
    Open(Consents),
    /// What came of it; asks for a receipt alone.
    Ended(Outcome),
}

impl Request {
    /// The step it asks for; nothing for the end.
    #[must_use]
    pub fn step(&self) -> Option<Step> {
        match self {
            Self::Advertise(_) => Some(Step::Advertise),
            Self::Reveal(_) => Some(Step::Reveal),
            Self::Ring(_) | Self::Share(_) => Some(Step::Share),
            Self::Mask(_) => Some(Step::Mask),
            Self::Consent(_) => Some(Step::Consent),
            Self::Open(_) => Some(Step::Open),
            Self::Ended(_) => None,
        }
    }

    /// The bytes to store and send.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }

    /// Reads received bytes.
    ///
    /// # Errors
    /// [`NotADocument`] for oversized or malformed bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NotADocument> {
        from_bytes("request", bytes, MAX_REQUEST_BYTES)
    }
}

/// An agent's answer to a step other than the masked vector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// Its keys.
    Advert(Advert),
    /// Its part of a ring's order.
    Revealed(Reveal),
    /// Its secrets, shared out and sealed.
    Shares(Shares),
    /// Its signature on who is in the sum.
    Consent(Consent),
    /// Its shares of what unmasks the sum.
    Opened(Opened),
    /// Why it sends no vector: another agent's shares for it don't open.
    Complaint(Complaint),
}

impl Reply {
    /// The seat it names.
    #[must_use]
    pub fn seat(&self) -> Seat {
        match self {
            Self::Advert(advert) => advert.seat,
            Self::Revealed(reveal) => reveal.seat,
            Self::Shares(shares) => shares.seat,
            Self::Consent(consent) => consent.seat,
            Self::Opened(opened) => opened.seat,
            Self::Complaint(complaint) => complaint.seat,
        }
    }

    /// The bytes to store and send.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(self)
    }

    /// Reads received bytes.
    ///
    /// # Errors
    /// [`NotADocument`] for oversized or malformed bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NotADocument> {
        from_bytes("reply", bytes, MAX_REPLY_BYTES)
    }
}

fn to_bytes<T: Serialize>(document: &T) -> Vec<u8> {
    // Unwrap safety: structs, numbers, strings and maps with number keys always serialise.
    serde_json::to_vec(document).expect("a document has a JSON form")
}

fn from_bytes<T: serde::de::DeserializeOwned>(
    what: &'static str,
    bytes: &[u8],
    most: usize,
) -> Result<T, NotADocument> {
    if bytes.len() > most {
        let reason = format!("expected at most {most} bytes, got {}", bytes.len());
        return Err(NotADocument { what, reason });
    }
    serde_json::from_slice(bytes).map_err(|error| NotADocument { what, reason: error.to_string() })
}

/// Largest request, in bytes: as an assignment's document.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Largest reply, in bytes: sealed shares for the most neighbours there can be fit.
pub const MAX_REPLY_BYTES: usize = 128 << 10;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeMap;

    use super::*;
    use crate::secagg::agent::SEALED_SHARES_BYTES;
    use crate::secagg::graph::{MAX_COMPLETE, MAX_DEGREE};
    use crate::secagg::message::Sealed;
    use crate::secagg::roster::MAX_MEMBERS;

    #[test]
    fn the_largest_reply_fits_and_one_byte_too_many_does_not() {
        assert!(MAX_COMPLETE <= MAX_DEGREE as usize + 1);
        let seat = |i: usize| Seat::new(u16::try_from(i).unwrap());
        let sealed: BTreeMap<Seat, Sealed> = (MAX_MEMBERS - MAX_DEGREE as usize..MAX_MEMBERS)
            .map(|i| (seat(i), Sealed(vec![255; SEALED_SHARES_BYTES])))
            .collect();
        let reply = Reply::Shares(Shares { descriptor: Digest::of(b"d"), seat: Seat::new(127), sealed });
        let mut bytes = reply.to_bytes();
        assert!(bytes.len() <= MAX_REPLY_BYTES, "{}", bytes.len());
        assert_eq!(Reply::from_bytes(&bytes), Ok(reply));
        bytes.resize(MAX_REPLY_BYTES, b' ');
        assert!(Reply::from_bytes(&bytes).is_ok());
        bytes.push(b' ');
        let refused = Reply::from_bytes(&bytes).unwrap_err().to_string();
        assert!(refused.contains("131073"), "{refused}");
    }

    #[test]
    fn unknown_steps_and_fields_are_refused() {
        let consents = Consents { descriptor: Digest::of(b"d"), signatures: Vec::new() };
        let text = String::from_utf8(Request::Open(consents.clone()).to_bytes()).unwrap();
        assert_eq!(Request::from_bytes(text.as_bytes()), Ok(Request::Open(consents)));
        for bad in [
            text.replacen("open", "close", 1),
            text.replacen("signatures", "signature", 1),
            text.replacen("\"descriptor\"", "\"rows\":7,\"descriptor\"", 1),
            String::new(),
        ] {
            assert!(Request::from_bytes(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
