//! Who may take part in a secure sum: an ordered list with identity keys, and seats in it.
//!
//! Every agent holds its own copy, from registration, not from the message that starts the sum; the descriptor
//! names its digest. A server that invents agents has no identity key the copy would contain.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use tabmesh_privacy::signature::VerifyingKey;
use thiserror::Error;

use crate::id::{AgentId, Digest};

/// A position in the roster, from 0: how messages name an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seat(u16);

impl Seat {
    /// The seat at a position.
    #[must_use]
    pub const fn new(index: u16) -> Self {
        Self(index)
    }

    /// Its position.
    #[must_use]
    pub const fn index(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One agent of a roster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its id.
    pub agent: AgentId,
    /// Its registered Ed25519 key.
    pub key: VerifyingKey,
    /// The organisation that answers for it: agents of one organisation count as one against invented agents.
    pub organisation: String,
}

/// Why a list of members is no roster.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RosterError {
    /// Too few or too many.
    #[error("roster: expected {MIN_MEMBERS} to {MAX_MEMBERS} agents, got {got}")]
    Size {
        /// Members found.
        got: usize,
    },
    /// Not in the order of agent ids, or one twice.
    #[error("roster: agent {agent} is out of order or listed twice")]
    Order {
        /// The agent.
        agent: AgentId,
    },
    /// Two agents with one identity key.
    #[error("roster: agent {agent} has the identity key of another agent")]
    SharedKey {
        /// The second agent.
        agent: AgentId,
    },
    /// An organisation's name is empty or too long.
    #[error("roster: organisation of {agent}: expected 1 to {MAX_ORGANISATION_BYTES} bytes, got {got}")]
    Organisation {
        /// The agent.
        agent: AgentId,
        /// Bytes found.
        got: usize,
    },
}

/// The agents of a secure sum, in the order of their ids, with distinct identity keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roster {
    members: Vec<Member>,
    digest: Digest,
}

impl Roster {
    /// Checks a list.
    ///
    /// # Errors
    /// [`RosterError`] naming what is wrong.
    pub fn new(members: Vec<Member>) -> Result<Self, RosterError> {
        if !(MIN_MEMBERS..=MAX_MEMBERS).contains(&members.len()) {
            return Err(RosterError::Size { got: members.len() });
        }
        let mut keys = BTreeSet::new();
        let mut before: Option<&AgentId> = None;
        for member in &members {
            let agent = || member.agent.clone();
            if before.is_some_and(|before| *before >= member.agent) {
                return Err(RosterError::Order { agent: agent() });
            }
            before = Some(&member.agent);
            if !keys.insert(member.key) {
                return Err(RosterError::SharedKey { agent: agent() });
            }
            let got = member.organisation.len();
            if !(1..=MAX_ORGANISATION_BYTES).contains(&got) {
                return Err(RosterError::Organisation { agent: agent(), got });
            }
        }
        let digest = digest(&members);
        Ok(Self { members, digest })
    }

    /// SHA-256 over count and members: `id ‖ key ‖ organisation`, texts behind their length as a little-endian 32-bit
    /// number.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Number of agents.
    #[must_use]
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Never: a roster has at least [`MIN_MEMBERS`] agents.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The agent at a seat.
    #[must_use]
    pub fn member(&self, seat: Seat) -> Option<&Member> {
        self.members.get(usize::from(seat.index()))
    }

    /// The seat of an agent.
    #[must_use]
    pub fn seat(&self, agent: &AgentId) -> Option<Seat> {
        let at = self.members.binary_search_by(|member| member.agent.cmp(agent)).ok()?;
        u16::try_from(at).ok().map(Seat::new)
    }

    /// All seats, in order.
    pub fn seats(&self) -> impl Iterator<Item = Seat> + use<> {
        // A roster has at most MAX_MEMBERS agents, so the cast keeps every bit.
        (0..self.members.len() as u16).map(Seat::new)
    }

    /// Number of different organisations.
    #[must_use]
    pub fn organisations(&self) -> usize {
        self.members.iter().map(|member| member.organisation.as_str()).collect::<BTreeSet<_>>().len()
    }
}

fn digest(members: &[Member]) -> Digest {
    let mut bytes = Vec::new();
    let mut push = |part: &[u8]| bytes.extend_from_slice(part);
    push(&(members.len() as u32).to_le_bytes());
    for member in members {
        for text in [member.agent.as_str(), &member.organisation] {
            push(&(text.len() as u32).to_le_bytes());
            push(text.as_bytes());
        }
        push(member.key.as_bytes());
    }
    Digest::of(&bytes)
}

/// Fewest agents: with fewer, a sum hides too little from the others in it.
pub const MIN_MEMBERS: usize = 4;
/// Most agents.
pub const MAX_MEMBERS: usize = 1024;
/// Longest name of an organisation, in bytes.
pub const MAX_ORGANISATION_BYTES: usize = 128;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn member(i: usize) -> Member {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&(i as u64).to_le_bytes());
        Member {
            agent: AgentId::new(format!("agent-{i:04}")).unwrap(),
            key: VerifyingKey::from_bytes(key),
            organisation: format!("org-{}", i % 3),
        }
    }

    fn members(n: usize) -> Vec<Member> {
        (0..n).map(member).collect()
    }

    #[test]
    fn seats_follow_the_order_of_ids() {
        let roster = Roster::new(members(5)).unwrap();
        for (i, seat) in roster.seats().enumerate() {
            assert_eq!(roster.member(seat), Some(&member(i)));
            assert_eq!(roster.seat(&member(i).agent), Some(seat));
        }
        assert_eq!((roster.len(), roster.organisations()), (5, 3));
        assert_eq!(roster.member(Seat::new(5)), None);
        assert_eq!(roster.seat(&AgentId::new("nobody").unwrap()), None);
    }

    #[test]
    fn sizes_order_keys_and_names_are_checked() {
        for got in [MIN_MEMBERS - 1, MAX_MEMBERS + 1] {
            assert_eq!(Roster::new(members(got)), Err(RosterError::Size { got }));
        }
        assert!(Roster::new(members(MIN_MEMBERS)).is_ok() && Roster::new(members(MAX_MEMBERS)).is_ok());
        let mut swapped = members(5);
        swapped.swap(1, 2);
        assert!(matches!(Roster::new(swapped), Err(RosterError::Order { .. })));
        let mut twice = members(5);
        twice[3] = twice[2].clone();
        assert!(matches!(Roster::new(twice), Err(RosterError::Order { .. })));
        let mut shared = members(5);
        shared[4].key = shared[0].key;
        assert_eq!(Roster::new(shared), Err(RosterError::SharedKey { agent: member(4).agent }));
        for length in [0, MAX_ORGANISATION_BYTES + 1] {
            let mut named = members(5);
            named[0].organisation = "o".repeat(length);
            assert!(
                matches!(Roster::new(named), Err(RosterError::Organisation { got, .. }) if got == length)
            );
        }
    }

    #[test]
    fn the_digest_depends_on_every_field() {
        let base = Roster::new(members(4)).unwrap().digest();
        let mut other = members(4);
        other[0].organisation.push('x');
        assert_ne!(base, Roster::new(other).unwrap().digest());
        let mut other = members(4);
        other[0].key = member(9).key;
        assert_ne!(base, Roster::new(other).unwrap().digest());
        assert_ne!(base, Roster::new(members(5)).unwrap().digest());
    }
}
