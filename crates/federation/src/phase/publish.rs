//! A round whose result is durable: it becomes visible under its digest, once.
//!
//! Publishing is idempotent by digest. After a crash the driver publishes again; another digest is refused, so a
//! published result never changes (invariant R2).

use serde::{Deserialize, Serialize};

use crate::id::Digest;
use crate::phase::PhaseName;
use crate::phase::abandon::AbandonReason;
use crate::phase::aggregate::overdue;
use crate::phase::collect::Collection;

/// A round whose result is stored, not yet visible.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Publishing {
    /// The complete collection.
    pub collection: Collection,
    /// Digest of the stored result.
    pub result: Digest,
}

impl Publishing {
    /// Marks the result visible.
    #[must_use]
    pub fn published(&self, at_ms: i64) -> Published {
        Published { result: self.result, at_ms }
    }

    /// Why the round must end now, if it must.
    #[must_use]
    pub fn overdue(&self, now_ms: i64) -> Option<AbandonReason> {
        overdue(&self.collection, PhaseName::Publish, now_ms)
    }
}

/// A finished round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Digest of the result.
    pub result: Digest,
    /// Since when, UTC milliseconds.
    pub at_ms: i64,
}
