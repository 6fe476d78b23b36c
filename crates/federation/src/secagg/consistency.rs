//! The signed agreement on who is in the sum: nobody opens a share before enough agents have signed the same history.
//!
//! Bonawitz et al. 2017, §6 (round 3, "consistency check", against an active server). What is signed is a running
//! digest over the descriptor, all adverts, the graph seed, everybody who shared, and every survivor with the
//! digest of its masked vector. Two agents that were told different things sign different digests. With a
//! threshold of more than (n + C)/2 two sets of signers have an honest agent in common, who signs once: so only
//! one history can be opened.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use tabmesh_privacy::signature::{Context, Signature, SigningKey};
use thiserror::Error;

use crate::id::Digest;
use crate::secagg::message::{Advert, Consents};
use crate::secagg::roster::{Roster, Seat};

/// Why a list of signatures proves no agreement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ConsentError {
    /// Out of order, or one twice.
    #[error("signatures: seat {seat} is out of order or listed twice")]
    Order {
        /// The seat.
        seat: Seat,
    },
    /// A signature of somebody who isn't among the survivors.
    #[error("signatures: seat {seat} is not among the survivors")]
    NotSurvivor {
        /// The seat.
        seat: Seat,
    },
    /// A signature over something else: that agent was told another history, or never signed.
    #[error("seat {seat} didn't sign this set of survivors")]
    OtherHistory {
        /// The seat.
        seat: Seat,
    },
    /// Too few of them.
    #[error("signatures: expected at least {expected}, got {got}")]
    TooFew {
        /// The threshold.
        expected: usize,
        /// Signatures given.
        got: usize,
    },
}

/// Digest of everything an agent was told so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Transcript(Digest);

impl Transcript {
    /// Begins with the descriptor.
    #[must_use]
    pub fn begin(descriptor: &Digest) -> Self {
        Self(Digest::of(&[LABEL, descriptor.as_bytes()].concat()))
    }

    /// Adds the adverts.
    #[must_use]
    pub fn adverts<'a>(self, adverts: impl IntoIterator<Item = &'a Advert>) -> Self {
        self.extend(b"adverts", adverts.into_iter().flat_map(Advert::signed_bytes))
    }

    /// Adds the seed of the graph.
    #[must_use]
    pub fn graph(self, seed: &Digest) -> Self {
        self.extend(b"graph", seed.as_bytes().iter().copied())
    }

    /// Adds everybody who shared.
    #[must_use]
    pub fn senders(self, senders: &BTreeSet<Seat>) -> Self {
        self.extend(b"senders", senders.iter().flat_map(|seat| seat.index().to_le_bytes()))
    }

    /// Adds the survivors and what they sent.
    #[must_use]
    pub fn survivors(self, survivors: &[(Seat, Digest)]) -> Self {
        let bytes = survivors.iter().flat_map(|(seat, digest)| {
            seat.index().to_le_bytes().into_iter().chain(*digest.as_bytes()).collect::<Vec<u8>>()
        });
        self.extend(b"survivors", bytes)
    }

    /// Signs it.
    #[must_use]
    pub fn sign(&self, key: &SigningKey) -> Signature {
        key.sign(Context::SumSurvivors, self.0.as_bytes())
    }

    /// Whether a seat signed it.
    #[must_use]
    pub fn signed_by(&self, seat: Seat, signature: &Signature, roster: &Roster) -> bool {
        roster.member(seat).is_some_and(|member| {
            member.key.verify(Context::SumSurvivors, self.0.as_bytes(), signature).is_ok()
        })
    }

    /// Checks that at least `threshold` survivors signed it, and that no signature given is over anything else.
    ///
    /// # Errors
    /// The first [`ConsentError`].
    pub fn check(
        &self,
        consents: &Consents,
        survivors: &BTreeSet<Seat>,
        threshold: usize,
        roster: &Roster,
    ) -> Result<(), ConsentError> {
        let got = consents.signatures.len();
        if got < threshold {
            return Err(ConsentError::TooFew { expected: threshold, got });
        }
        let mut before = None;
        for (seat, signature) in &consents.signatures {
            let seat = *seat;
            if before.is_some_and(|before| before >= seat) {
                return Err(ConsentError::Order { seat });
            }
            before = Some(seat);
            if !survivors.contains(&seat) {
                return Err(ConsentError::NotSurvivor { seat });
            }
            if !self.signed_by(seat, signature, roster) {
                return Err(ConsentError::OtherHistory { seat });
            }
        }
        Ok(())
    }

    fn extend(self, part: &[u8], bytes: impl Iterator<Item = u8>) -> Self {
        // Every part has its own name, and the digest so far a fixed length: parts can't run into one another.
        let mut all = [self.0.as_bytes().as_slice(), part, &[0]].concat();
        all.extend(bytes);
        Self(Digest::of(&all))
    }
}

const LABEL: &[u8] = b"tabmesh secagg transcript v1\0";
