//! Two owners' signed word that no unit is in both their sources.
//!
//! Without it a unit of a namespace is taken to be in every source of it, and their losses add up. Nobody but the owners can know
//! better, so both sign the same text with the keys that sign their ledgers. What a declaration buys is a smaller headline
//! alone: no budget is enforced by it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::facts::MAX_STATED_BYTES;
use crate::signature::{Context, Signature, SignatureError, SigningKey, VerifyingKey};

/// Name of the form of a declaration.
pub const DISJOINT_FORMAT: &str = "tabmesh disjoint 1";
/// Declarations in one report at most.
pub const MAX_DECLARATIONS: usize = 10_000;
/// Bytes of a declaration's file at most.
pub const MAX_DECLARATION_BYTES: usize = 64 << 10;

/// A source of rows, as an agent's ledger counts it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeclaredSource {
    /// SPIFFE id of the agent.
    pub agent: String,
    /// Physical source of the rows, as the ledger's grant names it.
    pub lineage: String,
}

/// What both owners say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Declaration {
    /// [`DISJOINT_FORMAT`].
    pub format: String,
    /// Whose units the sources hold.
    pub entity_namespace: String,
    /// The two sources, in order of agent.
    pub sources: [DeclaredSource; 2],
    /// How the owners know: 1 to 2,000 bytes ([`MAX_STATED_BYTES`]).
    pub reason: String,
    /// When it was first signed, in milliseconds since 1970, UTC.
    pub declared_at_ms: i64,
}

impl Declaration {
    /// Checks what is said and puts the sources in order.
    ///
    /// # Errors
    /// [`DisjointError::Form`] for sources of one agent, empty names or a reason that is none.
    pub fn new(
        entity_namespace: String,
        mut sources: [DeclaredSource; 2],
        reason: String,
        declared_at_ms: i64,
    ) -> Result<Self, DisjointError> {
        sources.sort();
        let declaration =
            Self { format: DISJOINT_FORMAT.to_owned(), entity_namespace, sources, reason, declared_at_ms };
        declaration.checked()
    }

    fn checked(self) -> Result<Self, DisjointError> {
        let bad = |reason: String| Err(DisjointError::Form { reason });
        if self.format != DISJOINT_FORMAT {
            return bad(format!("format: expected {DISJOINT_FORMAT:?}, got {:?}", self.format));
        }
        let [first, second] = &self.sources;
        if first.agent == second.agent {
            return bad(format!("sources: expected those of two agents, got {:?} twice", first.agent));
        }
        if first.agent > second.agent {
            return bad(format!(
                "sources: expected two agents in order, got {:?} and {:?}",
                first.agent, second.agent
            ));
        }
        let texts = [
            ("entity_namespace", &self.entity_namespace),
            ("agent", &first.agent),
            ("agent", &second.agent),
            ("lineage", &first.lineage),
            ("lineage", &second.lineage),
            ("reason", &self.reason),
        ];
        for (field, text) in texts {
            if text.trim().is_empty() || text.len() > MAX_STATED_BYTES {
                return bad(format!("{field}: expected 1 to {MAX_STATED_BYTES} bytes, got {}", text.len()));
            }
        }
        Ok(self)
    }
}

/// One owner's signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OwnerSignature {
    /// SPIFFE id of the owner's agent.
    pub agent: String,
    /// Key that signed: the one that signs the agent's ledger.
    pub public_key: VerifyingKey,
    /// Signature over the text.
    pub signature: Signature,
}

/// A declaration's file: the text as it was signed, and who signed it so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SignedDeclaration {
    /// JSON text of the [`Declaration`], byte for byte.
    pub declaration: String,
    /// Signatures, in order of agent.
    pub signatures: Vec<OwnerSignature>,
}

/// Why a declaration doesn't count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DisjointError {
    /// The file or its text isn't a declaration.
    #[error("not a declaration of disjoint sources: {reason}")]
    Form {
        /// What is wrong, and in which field.
        reason: String,
    },
    /// Somebody signs who owns neither source.
    #[error("{agent} owns neither source of this declaration: they are of {first} and {second}")]
    Stranger {
        /// Who.
        agent: String,
        /// Owner of one source.
        first: String,
        /// Owner of the other.
        second: String,
    },
    /// An owner hasn't signed.
    #[error("{agent} hasn't signed: `tabmesh-agent disjoint sign FILE` there does")]
    Unsigned {
        /// Whose signature is missing.
        agent: String,
    },
    /// An owner signed twice.
    #[error("{agent} has signed already")]
    Twice {
        /// Who.
        agent: String,
    },
    /// A signature doesn't match the text.
    #[error("signature of {agent}: {source}")]
    Signature {
        /// Whose.
        agent: String,
        /// What is wrong.
        source: SignatureError,
    },
    /// The key isn't that of the agent's ledger.
    #[error("{agent} signed with {got}, its ledger is signed with {expected}")]
    Key {
        /// Whose.
        agent: String,
        /// Key of the signature.
        got: VerifyingKey,
        /// Key of the ledger's head.
        expected: VerifyingKey,
    },
    /// The agent signed no ledger head, so nobody can tell whose key it is.
    #[error("{agent} is not known by a signed ledger: a declaration about it can't be checked")]
    NoLedger {
        /// Who.
        agent: String,
    },
}

impl SignedDeclaration {
    /// A declaration without signatures.
    #[must_use]
    pub fn unsigned(declaration: &Declaration) -> Self {
        // Unwrap safety: strings and an integer always serialise.
        let declaration = serde_json::to_string(declaration).expect("a declaration has a JSON form");
        Self { declaration, signatures: Vec::new() }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`DisjointError`] for another file, a text that is no declaration, or a signature that doesn't match.
    pub fn parse(file: &[u8]) -> Result<Self, DisjointError> {
        if file.len() > MAX_DECLARATION_BYTES {
            let reason = format!("expected at most {MAX_DECLARATION_BYTES} bytes, got {}", file.len());
            return Err(DisjointError::Form { reason });
        }
        let signed: Self = serde_json::from_slice(file).map_err(|error| form(&error))?;
        signed.said()?;
        Ok(signed)
    }

    /// What is said; every signature there is was checked.
    ///
    /// # Errors
    /// [`DisjointError`] for a text that is no declaration, strangers, owners that signed twice, and signatures that don't match.
    pub fn said(&self) -> Result<Declaration, DisjointError> {
        let read: Declaration = serde_json::from_str(&self.declaration).map_err(|error| form(&error))?;
        let said = read.checked()?;
        for (i, signed) in self.signatures.iter().enumerate() {
            let agent = || signed.agent.clone();
            said.owned_by(&signed.agent)?;
            if self.signatures.iter().take(i).any(|other| other.agent == signed.agent) {
                return Err(DisjointError::Twice { agent: agent() });
            }
            signed
                .public_key
                .verify(Context::Disjoint, self.declaration.as_bytes(), &signed.signature)
                .map_err(|source| DisjointError::Signature { agent: agent(), source })?;
        }
        Ok(said)
    }

    /// Adds an owner's signature.
    ///
    /// # Errors
    /// [`DisjointError`] as [`said`](Self::said), for a stranger, and for an owner that signed before.
    pub fn sign(mut self, agent: &str, key: &SigningKey) -> Result<Self, DisjointError> {
        self.said()?.owned_by(agent)?;
        if self.signatures.iter().any(|signed| signed.agent == agent) {
            return Err(DisjointError::Twice { agent: agent.to_owned() });
        }
        let signature = key.sign(Context::Disjoint, self.declaration.as_bytes());
        self.signatures.push(OwnerSignature {
            agent: agent.to_owned(),
            public_key: key.verifying_key(),
            signature,
        });
        self.signatures.sort_by(|a, b| a.agent.cmp(&b.agent));
        Ok(self)
    }

    /// What is said, if both owners signed it with the keys that `key_of` knows them by.
    ///
    /// # Errors
    /// [`DisjointError`] as [`said`](Self::said), for a missing signature, an unknown agent and another key.
    pub fn counted(
        &self,
        key_of: impl Fn(&str) -> Option<VerifyingKey>,
    ) -> Result<Declaration, DisjointError> {
        let said = self.said()?;
        for source in &said.sources {
            let agent = || source.agent.clone();
            let signed = self.signatures.iter().find(|signed| signed.agent == source.agent);
            let signed = signed.ok_or_else(|| DisjointError::Unsigned { agent: agent() })?;
            let expected = key_of(&source.agent).ok_or_else(|| DisjointError::NoLedger { agent: agent() })?;
            if signed.public_key != expected {
                return Err(DisjointError::Key { agent: agent(), got: signed.public_key, expected });
            }
        }
        Ok(said)
    }

    /// The file's text.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Unwrap safety: strings always serialise.
        serde_json::to_string_pretty(self).expect("a signed declaration has a JSON form")
    }
}

impl Declaration {
    fn owned_by(&self, agent: &str) -> Result<(), DisjointError> {
        let [first, second] = &self.sources;
        if first.agent == agent || second.agent == agent {
            return Ok(());
        }
        let (first, second) = (first.agent.clone(), second.agent.clone());
        Err(DisjointError::Stranger { agent: agent.to_owned(), first, second })
    }
}

fn form(error: &dyn std::fmt::Display) -> DisjointError {
    DisjointError::Form { reason: error.to_string() }
}
