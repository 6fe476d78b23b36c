//! The server's side of a secure sum: collects answers, drops who is late, and unmasks nothing but the sum.
//!
//! ```text
//! Advertising → Revealing → Sharing → Masking → Consenting → Opening → SecureSum
//! ```
//!
//! One type and one file a phase; `accept` takes an agent's answer, `close` ends the phase and gives what to send
//! and the next phase, or an [`Abort`] by name. The server never has a secret that agents didn't open to it. An
//! answer sent twice counts once; another one in its place is refused. When to close is its driver's matter: at
//! the deadline, or earlier if everybody who could has answered.

mod advertise;
mod consent;
mod mask;
mod open;
mod reveal;
mod share;

use std::collections::BTreeSet;
use std::sync::Arc;

use thiserror::Error;

use crate::id::Digest;
use crate::secagg::descriptor::{SumDescriptor, SumDescriptorError};
use crate::secagg::keys::KeyError;
use crate::secagg::mask::WrongLength;
use crate::secagg::message::Step;
use crate::secagg::noise::NoiseError;
use crate::secagg::roster::{Roster, Seat};

pub use advertise::Advertising;
pub use consent::Consenting;
pub use mask::Masking;
pub use open::{Opening, SecureSum};
pub use reveal::Revealing;
pub use share::Sharing;

/// Whether an answer was new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// It was.
    New,
    /// The very same answer was in already.
    Again,
}

/// Why one agent's answer isn't taken. The sum goes on without it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Rejection {
    /// The seat can't answer in this phase: not in the roster, or dropped out before.
    #[error("seat {seat} is not expected to answer step {step}")]
    NotExpected {
        /// The seat.
        seat: Seat,
        /// The step.
        step: Step,
    },
    /// An answer for another descriptor.
    #[error("wrong descriptor: expected {expected}, got {got}")]
    WrongDescriptor {
        /// Digest of this sum's descriptor.
        expected: Digest,
        /// Digest the answer names.
        got: Digest,
    },
    /// The seat gave another answer before.
    #[error("seat {seat} answered step {step} otherwise before")]
    Conflict {
        /// The seat.
        seat: Seat,
        /// The step.
        step: Step,
    },
    /// The step's deadline has passed.
    #[error("late: the deadline was {deadline_ms} ms, it is {now_ms} ms")]
    Late {
        /// First late moment, UTC milliseconds.
        deadline_ms: i64,
        /// Time of arrival, UTC milliseconds.
        now_ms: i64,
    },
    /// A signature that isn't by the seat's registered key over what was announced.
    #[error("seat {seat}: the signature doesn't verify")]
    BadSignature {
        /// The seat.
        seat: Seat,
    },
    /// A public key that another advert has, or one key for both uses.
    #[error("seat {seat}: a public key occurs twice")]
    SharedKey {
        /// The seat.
        seat: Seat,
    },
    /// Another part of the graph seed than was committed to.
    #[error("seat {seat}: the reveal isn't what was committed to")]
    BadReveal {
        /// The seat.
        seat: Seat,
    },
    /// Shares for others than its neighbours, or sealed to another length.
    #[error("seat {seat}: shares are not exactly those of its neighbours")]
    WrongShares {
        /// The seat.
        seat: Seat,
    },
    /// A masked vector of another length.
    #[error(transparent)]
    Length(#[from] WrongLength),
    /// A masked vector that doesn't hash to its digest.
    #[error("seat {seat}: the masked vector doesn't hash to its digest")]
    Digest {
        /// The seat.
        seat: Seat,
    },
}

/// Why a sum ends without a result. What was debited stays debited.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Abort {
    /// The descriptor doesn't fit the roster.
    #[error(transparent)]
    Descriptor(#[from] SumDescriptorError),
    /// Too few agents answered.
    #[error("step {step}: expected at least {expected} agents, got {got}")]
    TooFew {
        /// The step.
        step: Step,
        /// The threshold.
        expected: usize,
        /// Agents that answered.
        got: usize,
    },
    /// A part of the graph seed is missing; going on without it would be a choice.
    #[error("seat {seat} didn't reveal its part of the graph seed: a new attempt is needed")]
    MissingReveal {
        /// The first such seat.
        seat: Seat,
    },
    /// The survivors' honest noise isn't enough.
    #[error("the noise of {honest} honest survivors is less than the sum needs")]
    TooLittleNoise {
        /// |U3| − C.
        honest: usize,
    },
    /// More neighbours of an agent are gone than it would accept.
    #[error("seat {seat}: {got} of its neighbours are missing, at most {most} may be")]
    TooManyDropped {
        /// The agent.
        seat: Seat,
        /// Most that may be missing.
        most: usize,
        /// Missing.
        got: usize,
    },
    /// Too few shares of an agent's secret were opened.
    #[error("secret of seat {owner}: expected {expected} shares, got {got}")]
    NotEnoughShares {
        /// Whose secret.
        owner: Seat,
        /// Shares needed.
        expected: usize,
        /// Shares opened.
        got: usize,
    },
    /// The shares of an agent's secret don't join to what it had committed to.
    #[error("secret of seat {owner}: the shares opened don't give what it committed to")]
    WrongShares {
        /// Whose secret.
        owner: Seat,
    },
    /// A key is refused.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The sum is beyond what the survivors can add up to: somebody didn't follow the protocol.
    #[error("sum at position {position}: {value} is beyond ±{limit}, the most that {agents} agents give")]
    OutOfRange {
        /// First position.
        position: usize,
        /// The value there.
        value: i64,
        /// Largest magnitude.
        limit: u64,
        /// Survivors.
        agents: usize,
    },
    /// The cost can't be stated.
    #[error(transparent)]
    Noise(#[from] NoiseError),
}

/// What all phases share.
#[derive(Debug, Clone)]
struct Common {
    descriptor: Arc<SumDescriptor>,
    digest: Digest,
    roster: Arc<Roster>,
}

impl Common {
    /// The checks every answer passes first: descriptor, sender, time.
    fn check(
        &self,
        step: Step,
        seat: Seat,
        descriptor: Digest,
        expected: impl Fn(Seat) -> bool,
        now_ms: i64,
    ) -> Result<(), Rejection> {
        if descriptor != self.digest {
            return Err(Rejection::WrongDescriptor { expected: self.digest, got: descriptor });
        }
        if !expected(seat) {
            return Err(Rejection::NotExpected { seat, step });
        }
        let deadline_ms = self.descriptor.deadline_ms(step);
        if now_ms >= deadline_ms {
            return Err(Rejection::Late { deadline_ms, now_ms });
        }
        Ok(())
    }

    /// Whether as many may go on towards masked vectors: they reach the threshold, and their noise suffices. Asked before an
    /// agent is debited for a vector, so that nobody pays for a sum that can't be opened.
    fn may_mask(&self, step: Step, got: usize) -> Result<(), Abort> {
        self.enough(step, got)?;
        let noise = &self.descriptor.noise;
        if noise.suffices(got) { Ok(()) } else { Err(Abort::TooLittleNoise { honest: noise.honest(got) }) }
    }

    fn enough(&self, step: Step, got: usize) -> Result<(), Abort> {
        let expected = self.descriptor.threshold as usize;
        if got >= expected { Ok(()) } else { Err(Abort::TooFew { step, expected, got }) }
    }
}

/// What to do with an answer beside the one there may be already.
fn once<T: PartialEq>(step: Step, seat: Seat, before: Option<&T>, now: &T) -> Result<Accepted, Rejection> {
    match before {
        None => Ok(Accepted::New),
        Some(before) if before == now => Ok(Accepted::Again),
        Some(_) => Err(Rejection::Conflict { seat, step }),
    }
}

/// Seats that answered, of those that could.
fn missing(expected: &BTreeSet<Seat>, answered: impl Fn(Seat) -> bool) -> Vec<Seat> {
    expected.iter().copied().filter(|seat| !answered(*seat)).collect()
}
