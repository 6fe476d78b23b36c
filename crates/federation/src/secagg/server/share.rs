//! Phase 3: agents share their secrets out; the server passes sealed shares on.

use std::collections::{BTreeMap, BTreeSet};

use super::{Abort, Accepted, Common, Masking, Rejection, missing, once};
use crate::secagg::agent::SEALED_SHARES_BYTES;
use crate::secagg::consistency::Transcript;
use crate::secagg::graph::Graph;
use crate::secagg::message::{Advert, Delivery, Shares, Step};
use crate::secagg::roster::Seat;

/// Taking shares.
#[derive(Debug, Clone)]
pub struct Sharing {
    common: Common,
    adverts: BTreeMap<Seat, Advert>,
    graph: Graph,
    transcript: Transcript,
    shares: BTreeMap<Seat, Shares>,
}

impl Sharing {
    pub(super) fn new(
        common: Common,
        adverts: BTreeMap<Seat, Advert>,
        graph: Graph,
        transcript: Transcript,
    ) -> Self {
        Self { common, adverts, graph, transcript, shares: BTreeMap::new() }
    }

    /// Takes an agent's sealed shares.
    ///
    /// # Errors
    /// [`Rejection`] naming what is wrong with them.
    pub fn accept(&mut self, shares: Shares, now_ms: i64) -> Result<Accepted, Rejection> {
        let (step, seat) = (Step::Share, shares.seat);
        let expected = |seat| self.adverts.contains_key(&seat);
        self.common.check(step, seat, shares.descriptor, expected, now_ms)?;
        let receivers = shares.sealed.keys().eq(self.graph.neighbours(seat));
        if !receivers || shares.sealed.values().any(|sealed| sealed.0.len() != SEALED_SHARES_BYTES) {
            return Err(Rejection::WrongShares { seat });
        }
        let accepted = once(step, seat, self.shares.get(&seat), &shares)?;
        self.shares.insert(seat, shares);
        Ok(accepted)
    }

    /// Seats that haven't answered.
    #[must_use]
    pub fn missing(&self) -> Vec<Seat> {
        missing(&self.adverts.keys().copied().collect(), |seat| self.shares.contains_key(&seat))
    }

    /// Ends the phase: each sharer's delivery.
    ///
    /// # Errors
    /// [`Abort::TooFew`] below the threshold, [`Abort::TooLittleNoise`] if theirs wouldn't suffice.
    pub fn close(self) -> Result<(BTreeMap<Seat, Delivery>, Masking), Abort> {
        self.common.may_mask(Step::Share, self.shares.len())?;
        let senders: BTreeSet<Seat> = self.shares.keys().copied().collect();
        let deliver = |to: &Seat| {
            let from = self.graph.neighbours(*to).iter();
            let sealed =
                from.filter_map(|from| Some((*from, self.shares.get(from)?.sealed.get(to)?.clone())));
            let delivery = Delivery {
                descriptor: self.common.digest,
                senders: senders.iter().copied().collect(),
                sealed: sealed.collect(),
            };
            (*to, delivery)
        };
        let deliveries = senders.iter().map(deliver).collect();
        let transcript = self.transcript.senders(&senders);
        Ok((deliveries, Masking::new(self.common, self.adverts, self.graph, transcript, senders)))
    }
}
