//! Why the ledger said no, or couldn't answer.

use super::JournalError;
use crate::accountant::crosscheck::CrossCheckError;
use crate::budget::Rho;
use crate::mechanism::MechanismError;

/// Errors of the ledger. The first group are refusals ("you may not"), the second failures of the record.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LedgerError {
    /// The plan asks for more than is left.
    #[error("over budget: asked for rho {asked}, {left} is left")]
    OverBudget {
        /// ρ of the plan.
        asked: Rho,
        /// ρ neither spent nor reserved.
        left: Rho,
    },
    /// The plan asks for more than is left of a window of time.
    #[error("over the budget of {length_ms} ms: asked for rho {asked}, {left} is left within that time")]
    OverWindow {
        /// ρ of the plan.
        asked: Rho,
        /// ρ of the window neither spent in it nor reserved.
        left: Rho,
        /// Length of the window in milliseconds.
        length_ms: u64,
    },
    /// The window of a grant can't be.
    #[error("window of a grant: {reason}")]
    Window {
        /// What is wrong with it, naming expected and found.
        reason: String,
    },
    /// The product has no grant.
    #[error("no grant for product {product:?}: the domain's policy must grant a budget first")]
    NoGrant {
        /// The product.
        product: String,
    },
    /// The grant's ρ costs more than its ε allows.
    #[error("grant states rho {rho}, but epsilon {epsilon} at its delta buys less")]
    GrantTooLarge {
        /// ρ of the grant.
        rho: Rho,
        /// ε of the grant.
        epsilon: crate::budget::Epsilon,
    },
    /// The source can't be put under another one's account any more.
    #[error(
        "source {lineage:?} can't be derived from {derived_from:?}: it has an account or an origin of its own"
    )]
    Lineage {
        /// The source.
        lineage: String,
        /// Where its rows were said to come from.
        derived_from: String,
    },
    /// The plan already has an open reservation of another size.
    #[error("plan {plan_digest} already has an open reservation of rho {reserved}")]
    PlanReserved {
        /// The plan.
        plan_digest: String,
        /// ρ of the open reservation.
        reserved: Rho,
    },
    /// The reservation was refunded, or belongs to another ledger.
    #[error("reservation {reservation} isn't open: reserve again before releasing")]
    NotReserved {
        /// Number of the reservation.
        reservation: u64,
    },
    /// The event costs more than the reservation has left.
    #[error("over the reservation: asked for rho {asked}, {left} is left of it")]
    OverReserved {
        /// ρ of the event.
        asked: Rho,
        /// ρ reserved and not committed.
        left: Rho,
    },
    /// The event's figures don't fit together.
    #[error(transparent)]
    Mechanism(#[from] MechanismError),
    /// The second accountant disagrees.
    #[error(transparent)]
    CrossCheck(#[from] CrossCheckError),
    /// The payload isn't the vector the event describes.
    #[error("payload: expected {expected} bytes for the event's dimension, got {got}")]
    PayloadSize {
        /// Eight bytes per coordinate.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// Storage failed; the state is unchanged.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// An append failed earlier, so what is stored is unknown.
    #[error("ledger stopped after a failed append: open it again to read what is stored")]
    Stopped,
    /// The journal's entries don't form one chain.
    #[error("hash chain broken at entry {seq}: the record was changed, cut or reordered")]
    Chain {
        /// Position of the first entry that doesn't follow.
        seq: u64,
    },
    /// An entry doesn't parse.
    #[error("malformed ledger entry: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
    /// A stored entry breaks the ledger's own rules.
    #[error("entry {seq} breaks the ledger's rules: {rule}")]
    Unlawful {
        /// Position of the entry.
        seq: u64,
        /// The rule, in the words of the refusal it should have met.
        rule: String,
    },
}
