//! Step 1: decide whether to take part, and announce fresh keys.

use std::sync::Arc;

use rand::{CryptoRng, RngCore};
use tabmesh_privacy::signature::{Signature, SigningKey};

use super::{Agent, Answer, Guard, Last, Own, Phase, Prepared, Refusal, State, in_time};
use crate::id::{AgentId, Digest};
use crate::secagg::descriptor::SumDescriptor;
use crate::secagg::keys::{Label, Nonce, Secret, commit};
use crate::secagg::message::{Advert, Step};
use crate::secagg::policy::{Expected, Policy, PolicyRefusal};
use crate::secagg::roster::Roster;

/// What an agent brings to a sum.
pub struct Entry<'a> {
    /// Its id.
    pub agent: &'a AgentId,
    /// Its Ed25519 key.
    pub identity: Arc<SigningKey>,
    /// Its own copy of the roster, from registration.
    pub roster: Arc<Roster>,
    /// Its floor.
    pub policy: &'a Policy,
    /// The sum it has admitted.
    pub expected: &'a Expected,
    /// Its guard, from where it is stored.
    pub guard: Guard,
}

impl Agent {
    /// Enters the sum that `bytes` describe, with keys drawn for it alone.
    ///
    /// Entering once more instead of restoring has fresh keys, so it goes with no earlier message, and takes a new
    /// debit.
    ///
    /// # Errors
    /// [`Refusal::Policy`], [`Refusal::NotInRoster`] or [`Refusal::Late`].
    pub fn enter<R: RngCore + CryptoRng>(
        entry: Entry<'_>,
        bytes: &[u8],
        rng: &mut R,
        now_ms: i64,
    ) -> Result<(Self, Prepared<Advert>), Refusal> {
        let Entry { agent, identity, roster, policy, expected, guard } = entry;
        let descriptor = SumDescriptor::from_bytes(bytes).map_err(PolicyRefusal::from)?;
        policy.admit(&descriptor, &roster, expected)?;
        in_time(&descriptor, Step::Advertise, now_ms)?;
        let seat = roster.seat(agent).ok_or(Refusal::NotInRoster)?;
        if roster.member(seat).is_none_or(|member| member.key != identity.verifying_key()) {
            return Err(Refusal::NotInRoster);
        }
        let digest = Digest::of(bytes);
        let (share_secret, mask_secret) = (Secret::random(rng), Secret::random(rng));
        let (self_seed, nonce) = (Secret::random(rng), Nonce::random(rng));
        let advert = Advert {
            descriptor: digest,
            seat,
            share_key: share_secret.public(),
            mask_key: mask_secret.public(),
            seed_commitment: commit(Label::SelfSeed, &digest, seat, self_seed.as_bytes()),
            nonce_commitment: commit(Label::GraphNonce, &digest, seat, nonce.as_bytes()),
            signature: Signature::from_bytes([0; 64]),
        }
        .signed(&identity);
        let own = Own { share_secret, mask_secret, self_seed, nonce, advert: advert.clone() };
        let guard = Guard { answers: guard.answers + 1, ..guard };
        let last = Last { request: digest, answer: Answer::Advertise(advert.clone()) };
        let state = State { descriptor, digest, seat, guard, phase: Phase::Advertised(own), last };
        let agent = Self { identity, roster, state };
        let prepared = agent.again(advert);
        Ok((agent, prepared))
    }

    /// The advert once more, as long as nothing was answered after it.
    #[must_use]
    pub fn advertised(&self) -> Option<Prepared<Advert>> {
        match &self.state.last.answer {
            Answer::Advertise(advert) => Some(self.again(advert.clone())),
            _ => None,
        }
    }
}
