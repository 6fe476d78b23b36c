//! A round whose updates are in: the coordinator turns them into one server step.
//!
//! The computation is a function of the vectors, the descriptor and the optimiser's state, so a crash here is
//! repaired by doing it again. The phase ends when the result is durable under its digest.

use serde::{Deserialize, Serialize};

use crate::id::Digest;
use crate::phase::abandon::AbandonReason;
use crate::phase::collect::Collection;
use crate::phase::publish::Publishing;
use crate::phase::{PhaseName, Refusal};
use crate::schedule::Moment;

/// A round that waits for its aggregate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Aggregating {
    /// The complete collection.
    pub collection: Collection,
}

impl Aggregating {
    /// Records the durable result. The vectors leave memory; receipts stay.
    #[must_use]
    pub fn aggregated(&self, result: Digest) -> Publishing {
        Publishing { collection: self.collection.clone().without_values(), result }
    }

    /// Why the round must end now, if it must.
    #[must_use]
    pub fn overdue(&self, now_ms: i64) -> Option<AbandonReason> {
        overdue(&self.collection, PhaseName::Aggregate, now_ms)
    }
}

/// The rule both unfinished phases after the deadline share: over means over.
pub(crate) fn overdue(collection: &Collection, phase: PhaseName, now_ms: i64) -> Option<AbandonReason> {
    match collection.announcement().window.at(now_ms) {
        Moment::Open | Moment::Grace => None,
        Moment::Over => Some(AbandonReason::Overdue { phase }),
    }
}

/// Refuses a second result under another digest: what has been recorded never changes.
pub(crate) fn same_result(expected: Digest, got: Digest) -> Result<(), Refusal> {
    if expected == got { Ok(()) } else { Err(Refusal::ResultChanged { expected, got }) }
}
