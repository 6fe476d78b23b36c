//! An agent's side of a secure sum: one answer a step, stored before it is sent, or a refusal with its reason.
//!
//! ```text
//! Advertise → (Reveal, on a ring) → Share → Mask → Consent → Open
//! ```
//!
//! One file a step. Every answer comes as a [`Prepared`]: its caller stores the snapshot, then the [`Guard`], and
//! only then gets the message. The same request again gets the same bytes; another request for an answered step is
//! refused for ever, also after a restart, since two answers are what the attacks on secure sums live on. The
//! guard is a counter that the caller keeps where a restored snapshot doesn't bring it back (beside the ledger's
//! head): a snapshot older than its guard is refused. A failed step leaves the agent as it was.

mod advertise;
mod consent;
mod mask;
mod open;
mod share;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tabmesh_privacy::signature::SigningKey;
use thiserror::Error;

use crate::id::Digest;
use crate::secagg::consistency::{ConsentError, Transcript};
use crate::secagg::descriptor::SumDescriptor;
use crate::secagg::graph::GraphError;
use crate::secagg::keys::{KeyError, Nonce, PublicKey, Secret};
use crate::secagg::message::{Advert, Consent, Masked, Opened, Reveal, Shares, Step};
use crate::secagg::policy::PolicyRefusal;
use crate::secagg::roster::{Roster, Seat};
use crate::secagg::share::{Share, ShareError};

pub use advertise::Entry;
pub use mask::{SEALED_SHARES_BYTES, pair_sign};
pub use share::Joined;
pub use snapshot::{SNAPSHOT_VERSION, SnapshotError};

/// Why an agent doesn't answer. Nothing has left it, and its state is unchanged.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The sum isn't one it takes part in.
    #[error(transparent)]
    Policy(#[from] PolicyRefusal),
    /// The roster has another identity key for it, or none.
    #[error("this agent's identity key is not in the roster at its seat")]
    NotInRoster,
    /// A message for another descriptor.
    #[error("wrong descriptor: expected {expected}, got {got}")]
    WrongDescriptor {
        /// Digest of the descriptor it takes part in.
        expected: Digest,
        /// Digest the message names.
        got: Digest,
    },
    /// The step was answered, to another request.
    #[error("step {step} was answered, to another request: there is no second answer")]
    SecondAnswer {
        /// The step.
        step: Step,
    },
    /// The step is over, or its turn hasn't come.
    #[error("step {got} is not due: expected {expected:?}")]
    NotDue {
        /// The step that is due; nothing at the end.
        expected: Option<Step>,
        /// The step asked for.
        got: Step,
    },
    /// The step's deadline has passed.
    #[error("step {step} is late: its deadline was {deadline_ms} ms, it is {now_ms} ms")]
    Late {
        /// The step.
        step: Step,
        /// First late moment, UTC milliseconds.
        deadline_ms: i64,
        /// Now, UTC milliseconds.
        now_ms: i64,
    },
    /// A list is out of order or has somebody twice.
    #[error("{what}: seat {seat} is out of order or listed twice")]
    Order {
        /// The list.
        what: &'static str,
        /// The seat.
        seat: Seat,
    },
    /// A list has somebody who can't be in it.
    #[error("{what}: seat {seat} doesn't belong there")]
    Foreign {
        /// The list.
        what: &'static str,
        /// The seat.
        seat: Seat,
    },
    /// A list lacks somebody who must be in it.
    #[error("{what}: seat {seat} is missing")]
    Missing {
        /// The list.
        what: &'static str,
        /// The seat.
        seat: Seat,
    },
    /// Too few agents are left.
    #[error("{what}: expected at least {expected} agents, got {got}")]
    TooFew {
        /// The list.
        what: &'static str,
        /// The threshold.
        expected: usize,
        /// Agents listed.
        got: usize,
    },
    /// What the agent sent is listed as something else.
    #[error("{what}: this agent's own entry was altered")]
    OwnEntryAltered {
        /// The list.
        what: &'static str,
    },
    /// An advert isn't signed by the identity that the agent's own roster has.
    #[error("advert of seat {seat} is not signed by that agent's registered key")]
    BadSignature {
        /// The seat.
        seat: Seat,
    },
    /// A public key occurs twice.
    #[error("advert of seat {seat} has a key that another advert has, or one key for both uses")]
    SharedKey {
        /// The second seat.
        seat: Seat,
    },
    /// A revealed part of the graph seed isn't what was committed to.
    #[error("seat {seat} revealed another part of the graph seed than it had committed to")]
    BadReveal {
        /// The seat.
        seat: Seat,
    },
    /// The graph over those who are left isn't secure.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// A key or sealed shares are refused.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Shares are malformed.
    #[error("shares from seat {from}: {cause}")]
    Share {
        /// Sender.
        from: Seat,
        /// Why.
        cause: ShareError,
    },
    /// The contribution was made for another descriptor.
    #[error("contribution is for descriptor {got}, expected {expected}")]
    ForeignContribution {
        /// Digest of the descriptor it takes part in.
        expected: Digest,
        /// Digest the contribution names.
        got: Digest,
    },
    /// The contribution's debit isn't newer than the last one used: it would be sent twice.
    #[error(
        "contribution has debit {got}, but {last} was used already: a new attempt needs new noise and a new debit"
    )]
    UsedDebit {
        /// The newest debit used.
        last: u64,
        /// The contribution's.
        got: u64,
    },
    /// The honest survivors' noise isn't enough.
    #[error("survivors: the noise of {honest} honest ones is less than the sum needs")]
    TooLittleNoise {
        /// |U3| − C.
        honest: usize,
    },
    /// Too many of the agent's neighbours are gone: it could be told apart.
    #[error("survivors: {got} of this agent's neighbours are missing, at most {most} may be")]
    TooManyDropped {
        /// Most that may be missing.
        most: usize,
        /// Missing.
        got: usize,
    },
    /// The survivors don't agree.
    #[error(transparent)]
    Consent(#[from] ConsentError),
    /// The guard that was stored isn't this answer's.
    #[error("not stored: this answer has {expected:?}, the guard stored is {got:?}")]
    NotStored {
        /// The guard to store.
        expected: Guard,
        /// The guard read back.
        got: Guard,
    },
}

impl Refusal {
    /// Who sealed something for this agent that doesn't open, if that is the reason.
    #[must_use]
    pub fn unopened(&self) -> Option<Seat> {
        match self {
            Self::Key(KeyError::Sealed { from, .. }) | Self::Share { from, .. } => Some(*from),
            _ => None,
        }
    }
}

/// A counter that only goes up, one for each agent over all its sums. An agent takes part in one sum at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Answers given.
    pub answers: u64,
    /// Ledger sequence number of the newest debit used.
    pub last_debit: u64,
}

/// An answer that may be sent once it is stored.
#[derive(Clone)]
#[must_use = "an answer that isn't stored and released was never given"]
pub struct Prepared<M> {
    snapshot: Vec<u8>,
    guard: Guard,
    message: M,
}

impl<M> Prepared<M> {
    /// The agent's state, to be stored first. Holds secrets: readable by the agent alone.
    #[must_use]
    pub fn snapshot(&self) -> &[u8] {
        &self.snapshot
    }

    /// The guard, to be stored second.
    #[must_use]
    pub fn guard(&self) -> Guard {
        self.guard
    }

    /// The message, against the guard read back from where it was stored.
    ///
    /// # Errors
    /// [`Refusal::NotStored`] if that one is another.
    pub fn release(self, stored: Guard) -> Result<M, Refusal> {
        if stored == self.guard {
            Ok(self.message)
        } else {
            Err(Refusal::NotStored { expected: self.guard, got: stored })
        }
    }
}

impl<M: std::fmt::Debug> std::fmt::Debug for Prepared<M> {
    // Without the snapshot: it holds secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Prepared({:?}, {:?})", self.guard, self.message)
    }
}

/// An agent in one secure sum.
pub struct Agent {
    identity: Arc<SigningKey>,
    roster: Arc<Roster>,
    state: State,
}

impl Agent {
    /// The sum's descriptor.
    #[must_use]
    pub fn descriptor(&self) -> &SumDescriptor {
        &self.state.descriptor
    }

    /// Digest of the descriptor's bytes.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.state.digest
    }

    /// Its seat.
    #[must_use]
    pub fn seat(&self) -> Seat {
        self.state.seat
    }

    /// The guard of its latest answer.
    #[must_use]
    pub fn guard(&self) -> Guard {
        self.state.guard
    }

    /// The step it can answer next; nothing at the end.
    #[must_use]
    pub fn due(&self) -> Option<Step> {
        match &self.state.phase {
            Phase::Advertised(_) if self.ring() => Some(Step::Reveal),
            Phase::Advertised(_) | Phase::Revealed { .. } => Some(Step::Share),
            Phase::Shared(_) => Some(Step::Mask),
            Phase::Masked(_) => Some(Step::Consent),
            Phase::Consented { .. } => Some(Step::Open),
            Phase::Opened => None,
        }
    }

    /// The answer given already to this very request; nothing if the step is due.
    fn replay(&self, step: Step, descriptor: Digest, request: Digest) -> Result<Option<Answer>, Refusal> {
        if descriptor != self.state.digest {
            return Err(Refusal::WrongDescriptor { expected: self.state.digest, got: descriptor });
        }
        let last = &self.state.last;
        if last.answer.step() == step {
            return match last.request == request {
                true => Ok(Some(last.answer.clone())),
                false => Err(Refusal::SecondAnswer { step }),
            };
        }
        match self.due() {
            Some(due) if due == step => Ok(None),
            expected => Err(Refusal::NotDue { expected, got: step }),
        }
    }

    fn in_time(&self, step: Step, now_ms: i64) -> Result<(), Refusal> {
        in_time(&self.state.descriptor, step, now_ms)
    }

    /// Takes a new state over and hands its snapshot out.
    fn answered(&mut self, phase: Phase, guard: Guard, request: Digest, answer: Answer) -> Vec<u8> {
        let answers = self.state.guard.answers + 1;
        self.state.guard = Guard { answers, ..guard };
        self.state.phase = phase;
        self.state.last = Last { request, answer };
        self.state.seal()
    }

    fn again<M>(&self, message: M) -> Prepared<M> {
        Prepared { snapshot: self.state.seal(), guard: self.state.guard, message }
    }

    fn ring(&self) -> bool {
        matches!(self.state.descriptor.topology, crate::secagg::graph::Topology::Regular(_))
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Agent(seat {}, due {:?})", self.state.seat, self.due())
    }
}

/// Everything a restart needs, secrets included.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    descriptor: SumDescriptor,
    digest: Digest,
    seat: Seat,
    guard: Guard,
    phase: Phase,
    last: Last,
}

/// The latest answer and the request it was to.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Last {
    request: Digest,
    answer: Answer,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(tag = "step", content = "message", rename_all = "snake_case")]
enum Answer {
    Advertise(Advert),
    Reveal(Reveal),
    Share(Shares),
    Mask(Masked),
    Consent(Consent),
    Open(Opened),
}

impl Answer {
    fn step(&self) -> Step {
        match self {
            Self::Advertise(_) => Step::Advertise,
            Self::Reveal(_) => Step::Reveal,
            Self::Share(_) => Step::Share,
            Self::Mask(_) => Step::Mask,
            Self::Consent(_) => Step::Consent,
            Self::Open(_) => Step::Open,
        }
    }
}

/// What is known after each step. Secrets are forgotten as soon as no later step needs them.
#[derive(Clone, Serialize, Deserialize)]
#[serde(tag = "after", content = "with", rename_all = "snake_case")]
enum Phase {
    Advertised(Own),
    Revealed { own: Own, peers: BTreeMap<Seat, Peer>, transcript: Transcript },
    Shared(Shared),
    Masked(Waiting),
    Consented { waiting: Waiting, survivors: BTreeSet<Seat> },
    Opened,
}

/// The agent's own secrets of this sum.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    share_secret: Secret,
    mask_secret: Secret,
    self_seed: Secret,
    nonce: Nonce,
    advert: Advert,
}

/// What another agent advertised.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    share_key: PublicKey,
    mask_key: PublicKey,
    nonce_commitment: Digest,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shared {
    own: Own,
    /// The neighbours.
    peers: BTreeMap<Seat, Peer>,
    /// Everybody who advertised: U1.
    joined: BTreeSet<Seat>,
    /// The share of its own seed that stays here.
    kept: Share,
    transcript: Transcript,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Waiting {
    /// Shares of neighbours that shared: seed and mask key.
    held: BTreeMap<Seat, (Share, Share)>,
    kept: Share,
    /// Neighbours, also those that never shared.
    neighbours: BTreeSet<Seat>,
    /// Everybody who shared: U2.
    senders: BTreeSet<Seat>,
    /// Digest of the masked vector sent.
    payload: Digest,
    transcript: Transcript,
}

fn in_time(descriptor: &SumDescriptor, step: Step, now_ms: i64) -> Result<(), Refusal> {
    let deadline_ms = descriptor.deadline_ms(step);
    if now_ms < deadline_ms { Ok(()) } else { Err(Refusal::Late { step, deadline_ms, now_ms }) }
}

/// Identity of a request within this agent's memory.
fn request_of<T: Serialize>(request: &T) -> Digest {
    // Unwrap safety: messages are structs, numbers, strings and maps with number keys, which always serialise.
    Digest::of(&serde_json::to_vec(request).expect("a message has a JSON form"))
}

/// A list of seats as a set, if it is in order and has at least `threshold` seats.
fn ordered(
    what: &'static str,
    seats: impl Iterator<Item = Seat>,
    threshold: usize,
) -> Result<BTreeSet<Seat>, Refusal> {
    let mut set = BTreeSet::new();
    for seat in seats {
        if set.last().is_some_and(|last| *last >= seat) {
            return Err(Refusal::Order { what, seat });
        }
        set.insert(seat);
    }
    if set.len() < threshold {
        return Err(Refusal::TooFew { what, expected: threshold, got: set.len() });
    }
    Ok(set)
}

/// The first seat of `set` that isn't in `all`.
fn foreign(what: &'static str, set: &BTreeSet<Seat>, all: &BTreeSet<Seat>) -> Result<(), Refusal> {
    match set.difference(all).next() {
        Some(seat) => Err(Refusal::Foreign { what, seat: *seat }),
        None => Ok(()),
    }
}
