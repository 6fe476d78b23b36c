//! Step 4: take the neighbours' shares in and send the masked vector, once.

use std::collections::{BTreeMap, BTreeSet};

use tabmesh_privacy::private::Private;

use super::{Agent, Answer, Guard, Phase, Prepared, Refusal, Shared, Waiting, foreign, ordered, request_of};
use crate::id::Digest;
use crate::secagg::contribution::Contribution;
use crate::secagg::keys::{KeyError, SEAL_BYTES, open, pair_mask_key, self_mask_key};
use crate::secagg::mask::{RingVector, Sign};
use crate::secagg::message::{Delivery, Masked, Step};
use crate::secagg::roster::Seat;
use crate::secagg::share::{SHARE_BYTES, Share};

impl Agent {
    /// Answers the delivery of shares with the masked contribution.
    ///
    /// The contribution's debit must be durable before the answer leaves. Asked again with the same delivery, the
    /// agent gives the same bytes and looks at no contribution.
    ///
    /// # Errors
    /// [`Refusal`] if too few shared, shares are missing, foreign or don't open, or the contribution is for another
    /// descriptor or was used before.
    pub fn mask(
        &mut self,
        delivery: &Delivery,
        contribution: &Contribution,
        now_ms: i64,
    ) -> Result<Prepared<Masked>, Refusal> {
        match self.masked_before(delivery)? {
            Some(again) => Ok(again),
            None => Ok(self.mask_for_debit(delivery, contribution, now_ms)?.0),
        }
    }

    /// The answer given to this very delivery; nothing if the step is due.
    ///
    /// # Errors
    /// [`Refusal`] if the step was answered to another delivery or isn't due.
    pub fn masked_before(&self, delivery: &Delivery) -> Result<Option<Prepared<Masked>>, Refusal> {
        Ok(match self.replay(Step::Mask, delivery.descriptor, request_of(delivery))? {
            Some(Answer::Mask(masked)) => Some(self.again(masked)),
            _ => None,
        })
    }

    /// The answer to a delivery that wasn't answered yet, and its payload in the form that a ledger debits and the
    /// wire takes.
    ///
    /// # Errors
    /// As [`Self::mask`]; also if the step was answered before.
    pub fn mask_for_debit(
        &mut self,
        delivery: &Delivery,
        contribution: &Contribution,
        now_ms: i64,
    ) -> Result<(Prepared<Masked>, Private<Vec<u8>>), Refusal> {
        let request = request_of(delivery);
        if self.replay(Step::Mask, delivery.descriptor, request)?.is_some() {
            return Err(Refusal::SecondAnswer { step: Step::Mask });
        }
        self.in_time(Step::Mask, now_ms)?;
        let Phase::Shared(shared) = &self.state.phase else {
            return Err(Refusal::NotDue { expected: self.due(), got: Step::Mask });
        };
        if contribution.descriptor() != self.state.digest {
            let (expected, got) = (self.state.digest, contribution.descriptor());
            return Err(Refusal::ForeignContribution { expected, got });
        }
        let last = self.state.guard.last_debit;
        if contribution.debit() <= last {
            return Err(Refusal::UsedDebit { last, got: contribution.debit() });
        }
        let what = "senders";
        let threshold = self.state.descriptor.threshold as usize;
        let senders = ordered(what, delivery.senders.iter().copied(), threshold)?;
        foreign(what, &senders, &shared.joined)?;
        if !senders.contains(&self.state.seat) {
            return Err(Refusal::Missing { what, seat: self.state.seat });
        }
        // Nobody would sign for fewer survivors, and the senders are the most there can be: no debit for nothing.
        let noise = &self.state.descriptor.noise;
        if !noise.suffices(senders.len()) {
            return Err(Refusal::TooLittleNoise { honest: noise.honest(senders.len()) });
        }
        let held = self.open_shares(shared, delivery, &senders)?;

        let descriptor = &self.state.descriptor;
        let digest = self.state.digest;
        let seat = self.state.seat;
        let mut mask = RingVector::zeros(descriptor.width, descriptor.dimension as usize);
        mask.apply(&self_mask_key(&shared.own.self_seed, &digest, seat), Sign::Plus);
        for other in held.keys() {
            let peer = shared.peers.get(other).ok_or(Refusal::Missing { what, seat: *other })?;
            let agreed = shared.own.mask_secret.agree(&peer.mask_key, *other)?;
            mask.apply(&pair_mask_key(&agreed, &digest, seat, *other), pair_sign(seat, *other));
        }
        // A contribution has the descriptor's dimension, or it could not be made.
        let foreign = || Refusal::ForeignContribution { expected: digest, got: contribution.descriptor() };
        let private = contribution.masked(&mask, descriptor).ok_or_else(foreign)?;
        let payload = private.as_bytes().to_vec();
        let payload_digest = Digest::from_bytes(private.payload_digest());
        let masked = Masked { descriptor: digest, seat, digest: payload_digest, payload };
        let waiting = Waiting {
            held,
            kept: shared.kept.clone(),
            neighbours: shared.peers.keys().copied().collect(),
            transcript: shared.transcript.senders(&senders),
            senders,
            payload: masked.digest,
        };
        let guard = Guard { last_debit: contribution.debit(), ..self.state.guard };
        let snapshot = self.answered(Phase::Masked(waiting), guard, request, Answer::Mask(masked.clone()));
        Ok((Prepared { snapshot, guard: self.state.guard, message: masked }, private))
    }

    /// Both shares of every neighbour that shared: exactly theirs, and each opens.
    fn open_shares(
        &self,
        shared: &Shared,
        delivery: &Delivery,
        senders: &BTreeSet<Seat>,
    ) -> Result<BTreeMap<Seat, (Share, Share)>, Refusal> {
        let what = "sealed shares";
        let to = self.state.seat;
        let belongs = |seat: &Seat| shared.peers.contains_key(seat) && senders.contains(seat);
        if let Some(seat) = delivery.sealed.keys().find(|seat| !belongs(seat)) {
            return Err(Refusal::Foreign { what, seat: *seat });
        }
        let mut held = BTreeMap::new();
        for (from, peer) in shared.peers.iter().filter(|(seat, _)| senders.contains(seat)) {
            let from = *from;
            let sealed = delivery.sealed.get(&from).ok_or(Refusal::Missing { what, seat: from })?;
            if sealed.0.len() != SEALED_SHARES_BYTES {
                return Err(KeyError::Sealed { from, to }.into());
            }
            let agreed = shared.own.share_secret.agree(&peer.share_key, from)?;
            let plain = open(&agreed, &self.state.digest, from, to, &sealed.0)?;
            let (seed, key) = plain.split_at_checked(SHARE_BYTES).ok_or(KeyError::Sealed { from, to })?;
            let read = |bytes| Share::from_bytes(bytes).map_err(|cause| Refusal::Share { from, cause });
            held.insert(from, (read(seed)?, read(key)?));
        }
        Ok(held)
    }
}

/// The lower seat adds the mask of a pair, the higher one subtracts it, so that they cancel in the sum.
#[must_use]
pub fn pair_sign(own: Seat, other: Seat) -> Sign {
    if own < other { Sign::Plus } else { Sign::Minus }
}

/// Bytes of both shares, sealed.
pub const SEALED_SHARES_BYTES: usize = 2 * SHARE_BYTES + SEAL_BYTES;
