//! What agents and server tell each other, phase by phase.
//!
//! No message has a field that depends on rows, except the masked vector: no counts, no metrics, no failure texts.
//! Every one names the digest of the descriptor; lists are in the order of seats, so that one list has one form.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tabmesh_privacy::signature::{Context, Signature, SigningKey};

use crate::id::Digest;
use crate::secagg::encoded;
use crate::secagg::keys::{Nonce, PublicKey};
use crate::secagg::roster::Seat;
use crate::secagg::share::Share;

/// Agent, phase 1: its fresh keys and commitments, signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Advert {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// The agent.
    pub seat: Seat,
    /// Key that shares are sealed with.
    pub share_key: PublicKey,
    /// Key that pairwise masks come from.
    pub mask_key: PublicKey,
    /// Commitment to the seed of the self mask.
    pub seed_commitment: Digest,
    /// Commitment to the agent's part of the graph seed.
    pub nonce_commitment: Digest,
    /// Signature of the agent's identity key over all of it.
    pub signature: Signature,
}

impl Advert {
    /// Signs an advert; the `signature` given is replaced.
    #[must_use]
    pub fn signed(self, key: &SigningKey) -> Self {
        let signature = key.sign(Context::SumAdvert, &self.signed_bytes());
        Self { signature, ..self }
    }

    /// `H(descriptor) ‖ seat ‖ share key ‖ mask key ‖ seed commitment ‖ nonce commitment`, the seat as a
    /// little-endian 16-bit number.
    #[must_use]
    pub fn signed_bytes(&self) -> Vec<u8> {
        [
            self.descriptor.as_bytes().as_slice(),
            &self.seat.index().to_le_bytes(),
            self.share_key.as_bytes(),
            self.mask_key.as_bytes(),
            self.seed_commitment.as_bytes(),
            self.nonce_commitment.as_bytes(),
        ]
        .concat()
    }
}

/// Server, after phase 1: everybody's adverts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdvertList {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// The adverts, by seat.
    pub adverts: Vec<Advert>,
}

/// Agent, on a ring only: its part of the graph seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reveal {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// The agent.
    pub seat: Seat,
    /// What it committed to.
    pub nonce: Nonce,
}

/// Server: all parts of the graph seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevealList {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// The parts, one for every advert.
    pub nonces: BTreeMap<Seat, Nonce>,
}

/// Sealed shares of both of an agent's secrets for one other agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sealed(#[serde(with = "encoded")] pub Vec<u8>);

/// Agent, phase 2: shares for each neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shares {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// The agent.
    pub seat: Seat,
    /// By receiver.
    pub sealed: BTreeMap<Seat, Sealed>,
}

/// Server, after phase 2, to one agent: who shared, and what its neighbours among them sealed for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delivery {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// Everybody who shared, in order.
    pub senders: Vec<Seat>,
    /// By sender.
    pub sealed: BTreeMap<Seat, Sealed>,
}

/// Agent, phase 3: its masked vector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Masked {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// The agent.
    pub seat: Seat,
    /// Little-endian words modulo 2^b.
    #[serde(with = "encoded")]
    pub payload: Vec<u8>,
    /// SHA-256 of the payload.
    pub digest: Digest,
}

/// Server, after phase 3: whose vectors are in the sum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Survivors {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// Seat and payload digest, in order of seats.
    pub survivors: Vec<(Seat, Digest)>,
}

/// Agent, phase 4: that it was told of this set of survivors, signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Consent {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// The agent.
    pub seat: Seat,
    /// Signature over the transcript ([`crate::secagg::consistency`]).
    pub signature: Signature,
}

/// Server, after phase 4: the survivors' signatures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Consents {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// Seat and signature, in order of seats.
    pub signatures: Vec<(Seat, Signature)>,
}

/// Agent, phase 5: its shares of what unmasks the sum.
///
/// Nobody asks for shares by name: which secret of whom is opened follows from the survivors the agent has signed, so
/// that both secrets of one agent can't be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Opened {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// The agent.
    pub seat: Seat,
    /// Shares of survivors' self-mask seeds, by owner.
    pub seeds: BTreeMap<Seat, Share>,
    /// Shares of dropouts' mask keys, by owner.
    pub keys: BTreeMap<Seat, Share>,
}

/// Agent, phase 3, in place of a masked vector: what another agent sealed for it doesn't open, so it can't go on.
///
/// It says nothing but who: nobody's rows, keys or shares are in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Complaint {
    /// Digest of the descriptor.
    pub descriptor: Digest,
    /// The agent.
    pub seat: Seat,
    /// Whose sealed shares don't open.
    pub about: Seat,
}

/// The steps an agent answers, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Announces keys.
    Advertise,
    /// Reveals its part of the graph seed.
    Reveal,
    /// Shares its secrets out.
    Share,
    /// Sends its masked vector.
    Mask,
    /// Signs the set of survivors.
    Consent,
    /// Opens shares.
    Open,
}

impl Step {
    /// Position of the step's deadline, from 1.
    #[must_use]
    pub const fn number(self) -> i64 {
        match self {
            Self::Advertise => 1,
            Self::Reveal => 2,
            Self::Share => 3,
            Self::Mask => 4,
            Self::Consent => 5,
            Self::Open => 6,
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Advertise => "advertise",
            Self::Reveal => "reveal",
            Self::Share => "share",
            Self::Mask => "mask",
            Self::Consent => "consent",
            Self::Open => "open",
        })
    }
}
