//! Where an attempt at a sum is: one phase of the protocol, what it waits for, and what it asks when it is closed.

use std::collections::BTreeSet;

use tabmesh_federation::secagg::document::{Reply, Request};
use tabmesh_federation::secagg::message::{Masked, Step};
use tabmesh_federation::secagg::roster::Seat;
use tabmesh_federation::secagg::server::{
    Abort, Accepted, Advertising, Consenting, Masking, Opening, Revealing, SecureSum, Sharing,
};

use super::Refused;

/// Documents of a step, each with the seats that get it.
pub(super) type Asked = Vec<(BTreeSet<Seat>, Vec<u8>)>;

/// A phase of the protocol.
#[derive(Clone)]
pub(super) enum Phase {
    Advertise(Advertising),
    /// On a ring only.
    Reveal(Revealing),
    Share(Sharing),
    Mask(Masking),
    Consent(Consenting),
    Open(Opening),
    /// Ended; the record says how.
    Over,
}

/// What closing a step leads to.
pub(super) enum Next {
    Step(Box<Phase>, Asked),
    Sum(Box<SecureSum>),
}

/// An answer as stored and as taken.
pub(super) enum Answer {
    Reply(Reply),
    Masked(Masked),
}

impl Phase {
    pub(super) fn accept(&mut self, answer: &Answer, now_ms: i64) -> Result<Accepted, Refused> {
        Ok(match (self, answer) {
            (Self::Advertise(phase), Answer::Reply(Reply::Advert(advert))) => {
                phase.accept(advert.clone(), now_ms)?
            }
            (Self::Reveal(phase), Answer::Reply(Reply::Revealed(reveal))) => phase.accept(reveal, now_ms)?,
            (Self::Share(phase), Answer::Reply(Reply::Shares(shares))) => {
                phase.accept(shares.clone(), now_ms)?
            }
            (Self::Mask(phase), Answer::Masked(masked)) => phase.accept(masked, now_ms)?,
            (Self::Consent(phase), Answer::Reply(Reply::Consent(consent))) => {
                phase.accept(consent, now_ms)?
            }
            (Self::Open(phase), Answer::Reply(Reply::Opened(opened))) => {
                phase.accept(opened.clone(), now_ms)?
            }
            (_, answer) => return Err(Refused::NotDue { got: answer.step() }),
        })
    }

    /// The current step; nothing after the end.
    pub(super) fn step(&self) -> Option<Step> {
        Some(match self {
            Self::Advertise(_) => Step::Advertise,
            Self::Reveal(_) => Step::Reveal,
            Self::Share(_) => Step::Share,
            Self::Mask(_) => Step::Mask,
            Self::Consent(_) => Step::Consent,
            Self::Open(_) => Step::Open,
            Self::Over => return None,
        })
    }

    /// Who hasn't answered the current step.
    pub(super) fn missing(&self) -> Vec<Seat> {
        match self {
            Self::Advertise(phase) => phase.missing(),
            Self::Reveal(phase) => phase.missing(),
            Self::Share(phase) => phase.missing(),
            Self::Mask(phase) => phase.missing(),
            Self::Consent(phase) => phase.missing(),
            Self::Open(phase) => phase.missing(),
            Self::Over => Vec::new(),
        }
    }

    pub(super) fn close(self) -> Result<Next, Abort> {
        let ask = |phase: Self, seats: BTreeSet<Seat>, request: Request| {
            Next::Step(Box::new(phase), vec![(seats, request.to_bytes())])
        };
        Ok(match self {
            Self::Advertise(phase) => {
                let (list, revealing) = phase.close()?;
                let seats = list.adverts.iter().map(|advert| advert.seat).collect();
                if revealing.needed() {
                    return Ok(ask(Self::Reveal(revealing), seats, Request::Reveal(list)));
                }
                let (_, sharing) = revealing.close()?;
                ask(Self::Share(sharing), seats, Request::Share(list))
            }
            Self::Reveal(phase) => match phase.close()? {
                (Some(list), sharing) => {
                    let seats = list.nonces.keys().copied().collect();
                    ask(Self::Share(sharing), seats, Request::Ring(list))
                }
                // A complete graph has no such phase; what follows it asks for nothing new.
                (None, sharing) => Next::Step(Box::new(Self::Share(sharing)), Vec::new()),
            },
            Self::Share(phase) => {
                let (deliveries, masking) = phase.close()?;
                let each = |(seat, delivery)| (BTreeSet::from([seat]), Request::Mask(delivery).to_bytes());
                Next::Step(Box::new(Self::Mask(masking)), deliveries.into_iter().map(each).collect())
            }
            Self::Mask(phase) => {
                let (list, consenting) = phase.close()?;
                let seats = list.survivors.iter().map(|(seat, _)| *seat).collect();
                ask(Self::Consent(consenting), seats, Request::Consent(list))
            }
            Self::Consent(phase) => {
                let (list, opening) = phase.close()?;
                let seats = list.signatures.iter().map(|(seat, _)| *seat).collect();
                ask(Self::Open(opening), seats, Request::Open(list))
            }
            Self::Open(phase) => Next::Sum(Box::new(phase.close()?)),
            Self::Over => Next::Step(Box::new(Self::Over), Vec::new()),
        })
    }
}

impl Answer {
    pub(super) fn step(&self) -> Step {
        match self {
            Self::Reply(Reply::Advert(_)) => Step::Advertise,
            Self::Reply(Reply::Revealed(_)) => Step::Reveal,
            Self::Reply(Reply::Shares(_)) => Step::Share,
            Self::Masked(_) => Step::Mask,
            Self::Reply(Reply::Consent(_)) => Step::Consent,
            Self::Reply(Reply::Opened(_)) => Step::Open,
            // Taken apart, in place of a vector.
            Self::Reply(Reply::Complaint(_)) => Step::Mask,
        }
    }

    pub(super) fn seat(&self) -> Seat {
        match self {
            Self::Reply(reply) => reply.seat(),
            Self::Masked(masked) => masked.seat,
        }
    }
}

/// The steps in order; the complete graph has no second one.
pub(super) const STEPS: [Step; 6] =
    [Step::Advertise, Step::Reveal, Step::Share, Step::Mask, Step::Consent, Step::Open];
