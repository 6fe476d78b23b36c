//! What a ledger entry says, as JSON.
//!
//! Entries are figures of plans, digests of differentially private bytes, names and times. Nothing in an entry
//! depends on rows; unknown fields are refused, so a reader never skips what it doesn't understand.

use super::LedgerError;
use crate::budget::{Delta, Epsilon, Rho};
use crate::mechanism::MechanismEvent;
use crate::private::{Digest, hex_digest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The one adjacency this house uses.
pub const ADJACENCY: &str = "add/remove one unit";

/// Bytes of a name, digest text or signer at most.
pub const MAX_FIELD_BYTES: usize = 512;
/// Approvals of one plan at most.
pub const MAX_APPROVALS: usize = 16;
/// Bytes of one entry at most.
pub const MAX_ENTRY_BYTES: usize = 64 << 10;

/// What a debit is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Noisy marginal counts.
    Release,
    /// Noised adapter gradients.
    Round,
}

impl Purpose {
    /// The word in logs and reports.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Round => "round",
        }
    }
}

/// Why a plan was refused; a closed list without values, so that it may cross the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RefusalRule {
    /// The plan asks for more than is left.
    OverBudget,
    /// The plan asks for more than may be spent in one window of time.
    OverWindow,
    /// The product has no grant.
    NoGrant,
    /// A planned mechanism's cost isn't what the plan says.
    WrongCost,
    /// The second accountant charges more.
    SecondOpinion,
    /// The domain's own policy forbids the plan.
    Policy,
    /// The plan doesn't fit the domain's contract.
    ContractMismatch,
    /// Too few agents take part.
    CohortTooSmall,
    /// The contract keeps domain aggregates confidential and the plan uses local noise.
    AggregatesConfidential,
    /// The plan's model, corpus or base descends from reproducible noise.
    Reproducible,
}

impl RefusalRule {
    /// The rule in words.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::OverBudget => "asks for more than is left",
            Self::OverWindow => "asks for more than may be spent in one window of time",
            Self::NoGrant => "no budget granted",
            Self::WrongCost => "stated cost is wrong",
            Self::SecondOpinion => "second accountant disagrees",
            Self::Policy => "forbidden by the domain's policy",
            Self::ContractMismatch => "differs from the domain's contract",
            Self::CohortTooSmall => "too few agents take part",
            Self::AggregatesConfidential => "domain aggregates are confidential",
            Self::Reproducible => "descends from reproducible noise",
        }
    }
}

/// Budget given to a product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Time in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// Set where noise could be drawn again: reproducible, not private.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reproducible: bool,
    /// Data product.
    pub product: String,
    /// Who the units are; products that share units share a namespace.
    pub entity_namespace: String,
    /// Physical source of the rows: survives contract versions and renames.
    pub lineage: String,
    /// What one unit is, such as `customer`.
    pub unit: String,
    /// Always [`ADJACENCY`].
    pub adjacency: String,
    /// Granted ε.
    pub epsilon: Epsilon,
    /// The budget's one fixed δ.
    pub delta: Delta,
    /// What (ε, δ) buys, rounded down: the limit that is enforced.
    pub rho: Rho,
    /// Who signed the policy with this grant.
    pub signer: String,
    /// How fast it may be spent; without one, as fast as it is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<WindowLimit>,
}

/// A limit on what may be spent within any span of a given length.
///
/// It rolls: there is no date at which a budget comes back, each debit leaves the window by itself. And it limits the pace,
/// not the loss: what was spent before stays spent, ρ adds up over all windows, and the grant's own ε caps the lifetime.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowLimit {
    /// Length of the span in milliseconds.
    pub length_ms: u64,
    /// ε of what may be spent within it, at the grant's δ.
    pub epsilon: Epsilon,
    /// What that buys, rounded down: the limit that is enforced.
    pub rho: Rho,
}

/// A source of rows that came out of another one: a split, a copy, a move to another place.
///
/// From here on it has the other's account, so that no budget is spent twice on the same rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Derive {
    /// Time in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// Set where noise could be drawn again: reproducible, not private.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reproducible: bool,
    /// Who the units are, in both.
    pub entity_namespace: String,
    /// The new physical source.
    pub lineage: String,
    /// The physical source its rows come from.
    pub derived_from: String,
    /// Who says so.
    pub signer: String,
}

/// Budget set aside for a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reserve {
    /// Time in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// Set where noise could be drawn again.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reproducible: bool,
    /// Number of the reservation in this ledger, from 1.
    pub reservation: u64,
    /// Digest of the plan.
    pub plan_digest: String,
    /// Data product.
    pub product: String,
    /// What it is for.
    pub purpose: Purpose,
    /// What the plan may spend.
    pub rho: Rho,
    /// Who approved the plan.
    pub approvals: Vec<String>,
}

/// One use of a mechanism, durable before its output leaves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// Time in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// Set where noise could be drawn again.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reproducible: bool,
    /// The reservation it is charged to.
    pub reservation: u64,
    /// The mechanism and its cost.
    pub event: MechanismEvent,
    /// What it is for.
    pub purpose: Purpose,
    /// Stage of the release, or number of the round.
    pub step: u64,
    /// SHA-256 of the noised bytes.
    #[serde(with = "hex_digest")]
    pub payload_digest: Digest,
    /// Digest of the query or round descriptor the bytes answer.
    #[serde(with = "hex_digest")]
    pub query_digest: Digest,
}

/// The end of a plan: what it didn't use is free again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refund {
    /// Time in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// Set where noise could be drawn again.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reproducible: bool,
    /// The reservation that ends.
    pub reservation: u64,
    /// Reserved and not committed.
    pub rho: Rho,
}

/// A plan that was refused. Costs nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refuse {
    /// Time in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// Set where noise could be drawn again.
    #[serde(default, skip_serializing_if = "is_false")]
    pub reproducible: bool,
    /// Digest of the plan.
    pub plan_digest: String,
    /// Data product.
    pub product: String,
    /// Why.
    pub rule: RefusalRule,
    /// What the plan asked for.
    pub rho: Rho,
}

/// One ledger entry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "snake_case")]
pub enum Entry {
    /// Budget given.
    Grant(Grant),
    /// Budget set aside.
    Reserve(Reserve),
    /// Budget spent.
    Commit(Box<Commit>),
    /// Budget set aside and not used.
    Refund(Refund),
    /// A refusal.
    Refuse(Refuse),
    /// A source that came out of another one.
    Derive(Derive),
}

impl Entry {
    /// Parses stored bytes.
    ///
    /// # Errors
    /// [`LedgerError::Malformed`] for oversized bytes, unknown fields or kinds, and figures out of range.
    pub fn from_json(bytes: &[u8]) -> Result<Self, LedgerError> {
        if bytes.len() > MAX_ENTRY_BYTES {
            let reason = format!("expected at most {MAX_ENTRY_BYTES} bytes, got {}", bytes.len());
            return Err(LedgerError::Malformed { reason });
        }
        let entry: Self = serde_json::from_slice(bytes)
            .map_err(|error| LedgerError::Malformed { reason: error.to_string() })?;
        entry.check_fields()?;
        Ok(entry)
    }

    /// The bytes to append.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        // Unwrap safety: strings, integers and lists always serialise, and map keys are field names.
        serde_json::to_vec(self).expect("a ledger entry has a JSON form")
    }

    /// Time of the entry in milliseconds since 1970, UTC.
    #[must_use]
    pub fn time_ms(&self) -> i64 {
        match self {
            Self::Grant(entry) => entry.time_ms,
            Self::Reserve(entry) => entry.time_ms,
            Self::Commit(entry) => entry.time_ms,
            Self::Refund(entry) => entry.time_ms,
            Self::Refuse(entry) => entry.time_ms,
            Self::Derive(entry) => entry.time_ms,
        }
    }

    /// Whether the entry was made under reproducible noise.
    #[must_use]
    pub fn reproducible(&self) -> bool {
        match self {
            Self::Grant(entry) => entry.reproducible,
            Self::Reserve(entry) => entry.reproducible,
            Self::Commit(entry) => entry.reproducible,
            Self::Refund(entry) => entry.reproducible,
            Self::Refuse(entry) => entry.reproducible,
            Self::Derive(entry) => entry.reproducible,
        }
    }

    /// Checks the lengths of texts and lists.
    ///
    /// # Errors
    /// [`LedgerError::Malformed`] names the field.
    pub fn check_fields(&self) -> Result<(), LedgerError> {
        match self {
            Self::Grant(grant) => {
                text("product", &grant.product)?;
                text("entity namespace", &grant.entity_namespace)?;
                text("lineage", &grant.lineage)?;
                text("unit", &grant.unit)?;
                text("signer", &grant.signer)?;
                if grant.adjacency != ADJACENCY {
                    let reason = format!("adjacency: expected {ADJACENCY:?}, got {:?}", grant.adjacency);
                    return Err(LedgerError::Malformed { reason });
                }
                Ok(())
            }
            Self::Reserve(reserve) => {
                text("plan digest", &reserve.plan_digest)?;
                text("product", &reserve.product)?;
                if reserve.approvals.len() > MAX_APPROVALS {
                    let reason = format!(
                        "approvals: expected at most {MAX_APPROVALS}, got {}",
                        reserve.approvals.len()
                    );
                    return Err(LedgerError::Malformed { reason });
                }
                reserve.approvals.iter().try_for_each(|approval| text("approval", approval))
            }
            Self::Refuse(refuse) => {
                text("plan digest", &refuse.plan_digest)?;
                text("product", &refuse.product)
            }
            Self::Derive(derive) => {
                text("entity namespace", &derive.entity_namespace)?;
                text("lineage", &derive.lineage)?;
                text("derived from", &derive.derived_from)?;
                text("signer", &derive.signer)
            }
            Self::Commit(_) | Self::Refund(_) => Ok(()),
        }
    }
}

fn text(what: &str, value: &str) -> Result<(), LedgerError> {
    if (1..=MAX_FIELD_BYTES).contains(&value.len()) {
        Ok(())
    } else {
        let reason = format!("{what}: expected 1 to {MAX_FIELD_BYTES} bytes, got {}", value.len());
        Err(LedgerError::Malformed { reason })
    }
}

// Serde's `skip_serializing_if` hands over a reference.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "signature fixed by serde")]
fn is_false(value: &bool) -> bool {
    !*value
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn reserve() -> Reserve {
        Reserve {
            time_ms: 5,
            reproducible: false,
            reservation: 1,
            plan_digest: "d".to_owned(),
            product: "p".to_owned(),
            purpose: Purpose::Release,
            rho: Rho::from_units(9),
            approvals: vec!["a".to_owned()],
        }
    }

    // The stored form is public and permanent: a golden text, not a round trip.
    #[test]
    fn the_stored_form_is_fixed() {
        let golden = r#"{"entry":"reserve","time_ms":5,"reservation":1,"plan_digest":"d","product":"p","purpose":"release","rho":9,"approvals":["a"]}"#;
        assert_eq!(String::from_utf8(Entry::Reserve(reserve()).to_json()).unwrap(), golden);
        assert_eq!(Entry::from_json(golden.as_bytes()).unwrap(), Entry::Reserve(reserve()));
        let tainted =
            Entry::Refund(Refund { time_ms: 1, reproducible: true, reservation: 2, rho: Rho::ZERO });
        assert_eq!(
            String::from_utf8(tainted.to_json()).unwrap(),
            r#"{"entry":"refund","time_ms":1,"reproducible":true,"reservation":2,"rho":0}"#
        );
        assert!(Entry::from_json(&tainted.to_json()).unwrap().reproducible());
        let derived = Entry::Derive(Derive {
            time_ms: 7,
            reproducible: false,
            entity_namespace: "customers".to_owned(),
            lineage: "db.table_a".to_owned(),
            derived_from: "db.table".to_owned(),
            signer: "owner".to_owned(),
        });
        let golden = r#"{"entry":"derive","time_ms":7,"entity_namespace":"customers","lineage":"db.table_a","derived_from":"db.table","signer":"owner"}"#;
        assert_eq!(String::from_utf8(derived.to_json()).unwrap(), golden);
        assert_eq!(Entry::from_json(golden.as_bytes()).unwrap(), derived);
    }

    #[test]
    fn unknown_fields_kinds_and_lengths_are_refused() {
        let golden = String::from_utf8(Entry::Reserve(reserve()).to_json()).unwrap();
        for bad in [
            golden.replacen("\"time_ms\"", "\"rows\":7,\"time_ms\"", 1),
            golden.replacen("reserve", "preserve", 1),
            golden.replacen("\"rho\":9", "\"rho\":-9", 1),
            golden.replacen("\"rho\":9", "\"rho\":9.5", 1),
            golden.replacen("\"p\"", "\"\"", 1),
        ] {
            assert!(matches!(Entry::from_json(bad.as_bytes()), Err(LedgerError::Malformed { .. })), "{bad}");
        }
        let mut entry = reserve();
        entry.product = "x".repeat(MAX_FIELD_BYTES);
        Entry::Reserve(entry.clone()).check_fields().unwrap();
        entry.product.push('x');
        assert!(Entry::Reserve(entry).check_fields().is_err());
        let mut entry = reserve();
        entry.approvals = vec!["a".to_owned(); MAX_APPROVALS + 1];
        assert!(Entry::Reserve(entry).check_fields().is_err());
        assert!(Entry::from_json(&vec![b' '; MAX_ENTRY_BYTES + 1]).is_err());
    }
}
