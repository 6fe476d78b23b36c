//! The identity keys of a mesh's agents, as their operators tell each other and an auditor: never by way of the coordinator.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tabmesh_privacy::signature::VerifyingKey;
use thiserror::Error;

use crate::id::AgentId;
use crate::secagg::roster::MAX_MEMBERS;

/// Why a text is no list of agents' keys.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PeersFileError {
    /// Not YAML of this shape.
    #[error("{0}")]
    Malformed(String),
    /// More than a mesh has.
    #[error("expected at most {MAX_MEMBERS} peers, got {got}")]
    TooMany {
        /// How many.
        got: usize,
    },
    /// An agent with two lines.
    #[error("{agent} is listed twice")]
    Twice {
        /// The agent.
        agent: AgentId,
    },
}

/// One line of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// SPIFFE id of the agent.
    pub agent: AgentId,
    /// Its Ed25519 public key, 64 hexadecimal digits.
    pub signing_public_key: VerifyingKey,
}

/// The file: `peers: [{agent: …, signing_public_key: …}]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeersFile {
    /// The agents.
    pub peers: Vec<Peer>,
}

impl PeersFile {
    /// Reads a file's text: keys by agent.
    ///
    /// # Errors
    /// [`PeersFileError`] for another text, too many agents, or one twice.
    pub fn keys(text: &str) -> Result<BTreeMap<AgentId, VerifyingKey>, PeersFileError> {
        let file: Self =
            serde_saphyr::from_str(text).map_err(|error| PeersFileError::Malformed(error.to_string()))?;
        if file.peers.len() > MAX_MEMBERS {
            return Err(PeersFileError::TooMany { got: file.peers.len() });
        }
        let mut keys = BTreeMap::new();
        for Peer { agent, signing_public_key } in file.peers {
            if keys.insert(agent.clone(), signing_public_key).is_some() {
                return Err(PeersFileError::Twice { agent });
            }
        }
        Ok(keys)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn text(count: usize) -> String {
        let line = |i: usize| {
            format!("  - {{agent: spiffe://m/tabmesh/agent/d{i}/one, signing_public_key: {i:064x}}}\n")
        };
        format!("peers:\n{}", (0..count).map(line).collect::<String>())
    }

    #[test]
    fn a_file_has_a_key_for_each_agent_and_no_more_than_a_mesh() {
        let keys = PeersFile::keys(&text(3)).unwrap();
        let second = AgentId::new("spiffe://m/tabmesh/agent/d1/one").unwrap();
        assert_eq!((keys.len(), keys[&second].as_bytes()[31]), (3, 1));
        assert_eq!(PeersFile::keys(&text(MAX_MEMBERS)).unwrap().len(), MAX_MEMBERS);
        let too_many = PeersFile::keys(&text(MAX_MEMBERS + 1));
        assert_eq!(too_many, Err(PeersFileError::TooMany { got: MAX_MEMBERS + 1 }));
    }

    #[test]
    fn doubles_and_other_texts_are_refused() {
        let twice = format!("{}{}", text(2), &text(1)["peers:\n".len()..]);
        assert!(matches!(PeersFile::keys(&twice), Err(PeersFileError::Twice { .. })));
        for bad in ["peers: [{agent: a, signing_public_key: \"00\"}]", "peers: []\nkeys: []", "[]"] {
            assert!(matches!(PeersFile::keys(bad), Err(PeersFileError::Malformed(_))), "{bad}");
        }
    }
}
