//! The other agents' identity keys, as this domain's operator was given them.
//!
//! A secure sum hides an agent among others that are who they say. Their keys therefore come from a file of this
//! domain, never from the coordinator: agents that it invents are in nobody's file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tabmesh_federation::id::AgentId;
use tabmesh_federation::peers::PeersFile;
use tabmesh_federation::secagg::roster::{Member, Roster, RosterError};
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_proto::identity::SpiffeId;
use thiserror::Error;

/// Why a file of peers, or a roster over it, is refused.
#[derive(Debug, Error)]
pub enum PeersError {
    /// The file can't be read.
    #[error("can't read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text isn't a list of peers.
    #[error("{path} is refused: {reason}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The roster has somebody whom this domain doesn't know.
    #[error("{agent} is in the roster and not in this domain's file of peers")]
    Unknown {
        /// The agent.
        agent: AgentId,
    },
    /// An agent's name is no SPIFFE id of an agent.
    #[error("{agent} is no SPIFFE id with a domain")]
    NoDomain {
        /// The agent.
        agent: AgentId,
    },
    /// The members are no roster.
    #[error(transparent)]
    Roster(#[from] RosterError),
}

/// Keys by agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peers(BTreeMap<AgentId, VerifyingKey>);

impl Peers {
    /// Reads and checks a file; `own` is this agent with its key.
    ///
    /// # Errors
    /// [`PeersError`] for a file that isn't one, an agent twice, or another key than `own` has.
    pub fn load(path: &Path, own: (&AgentId, VerifyingKey)) -> Result<Self, PeersError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| PeersError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text, own)
    }

    fn parse(path: &Path, text: &str, own: (&AgentId, VerifyingKey)) -> Result<Self, PeersError> {
        let refused = |reason: String| PeersError::Refused { path: path.to_owned(), reason };
        let mut keys = PeersFile::keys(text).map_err(|error| refused(error.to_string()))?;
        if keys.get(own.0).is_some_and(|key| *key != own.1) {
            return Err(refused(format!("{} is this agent, and has another key", own.0)));
        }
        keys.insert(own.0.clone(), own.1);
        Ok(Self(keys))
    }

    /// The roster of some agents, with the keys of this file; the domain is the organisation that answers for an agent.
    ///
    /// # Errors
    /// [`PeersError`] naming the first agent that isn't known, or what is wrong with the list.
    pub fn roster(&self, agents: &BTreeSet<AgentId>) -> Result<Roster, PeersError> {
        let member = |agent: &AgentId| {
            let key = *self.0.get(agent).ok_or_else(|| PeersError::Unknown { agent: agent.clone() })?;
            let id = agent.as_str().parse::<SpiffeId>().ok();
            let domain = id.as_ref().and_then(SpiffeId::domain);
            let organisation =
                domain.ok_or_else(|| PeersError::NoDomain { agent: agent.clone() })?.to_owned();
            Ok(Member { agent: agent.clone(), key, organisation })
        };
        let members: Vec<Member> = agents.iter().map(member).collect::<Result<_, PeersError>>()?;
        Ok(Roster::new(members)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(i: u8) -> AgentId {
        AgentId::new(format!("spiffe://mesh/tabmesh/agent/domain-{i}/one")).unwrap()
    }

    fn key(i: u8) -> VerifyingKey {
        VerifyingKey::from_bytes([i; 32])
    }

    fn text(peers: &[(AgentId, VerifyingKey)]) -> String {
        let line = |(agent, key): &(AgentId, VerifyingKey)| {
            format!("  - {{agent: \"{agent}\", signing_public_key: \"{key}\"}}\n")
        };
        format!("peers:\n{}", peers.iter().map(line).collect::<String>())
    }

    fn parse(text: &str) -> Result<Peers, PeersError> {
        Peers::parse(Path::new("peers.yaml"), text, (&agent(1), key(1)))
    }

    #[test]
    fn a_roster_has_the_keys_of_the_file_and_the_domains_of_the_ids() {
        let peers = parse(&text(&[2, 3, 4].map(|i| (agent(i), key(i))))).unwrap();
        let roster = peers.roster(&BTreeSet::from([1, 2, 3, 4].map(agent))).unwrap();
        assert_eq!((roster.len(), roster.organisations()), (4, 4));
        assert_eq!(roster.member(roster.seat(&agent(3)).unwrap()).unwrap().key, key(3));
        let strangers = peers.roster(&BTreeSet::from([1, 2, 3, 5].map(agent)));
        assert!(matches!(strangers, Err(PeersError::Unknown { agent: a }) if a == agent(5)));
        assert!(matches!(peers.roster(&BTreeSet::from([1, 2].map(agent))), Err(PeersError::Roster(_))));
    }

    #[test]
    fn doubles_foreign_own_keys_and_other_texts_are_refused() {
        assert!(parse(&text(&[(agent(2), key(2)), (agent(2), key(3))])).is_err());
        assert!(parse(&text(&[(agent(1), key(9))])).is_err());
        assert!(parse(&text(&[(agent(1), key(1))])).is_ok());
        assert!(parse("peers: [{agent: a, signing_public_key: \"00\"}]").is_err());
        assert!(parse("peers: []\nkeys: []").is_err());
    }
}
