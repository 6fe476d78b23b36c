//! Phase 4: masked vectors are added up as they arrive; none is kept.

use std::collections::{BTreeMap, BTreeSet};

use super::{Abort, Accepted, Common, Consenting, Rejection, missing, once};
use crate::id::Digest;
use crate::secagg::consistency::Transcript;
use crate::secagg::graph::Graph;
use crate::secagg::mask::RingVector;
use crate::secagg::message::{Advert, Masked, Step, Survivors};
use crate::secagg::roster::Seat;

/// Taking masked vectors.
#[derive(Debug, Clone)]
pub struct Masking {
    common: Common,
    adverts: BTreeMap<Seat, Advert>,
    graph: Graph,
    transcript: Transcript,
    senders: BTreeSet<Seat>,
    total: RingVector,
    survivors: BTreeMap<Seat, Digest>,
}

/// What is left to unmask: the masked total and who is in it.
#[derive(Debug, Clone)]
pub(super) struct Sealed {
    pub(super) adverts: BTreeMap<Seat, Advert>,
    pub(super) graph: Graph,
    pub(super) senders: BTreeSet<Seat>,
    pub(super) survivors: BTreeSet<Seat>,
    pub(super) total: RingVector,
}

impl Masking {
    pub(super) fn new(
        common: Common,
        adverts: BTreeMap<Seat, Advert>,
        graph: Graph,
        transcript: Transcript,
        senders: BTreeSet<Seat>,
    ) -> Self {
        let total = RingVector::zeros(common.descriptor.width, common.descriptor.dimension as usize);
        Self { common, adverts, graph, transcript, senders, total, survivors: BTreeMap::new() }
    }

    /// Adds an agent's masked vector, exactly once.
    ///
    /// # Errors
    /// [`Rejection`] naming what is wrong with it; the total is unchanged then.
    pub fn accept(&mut self, masked: &Masked, now_ms: i64) -> Result<Accepted, Rejection> {
        let (step, seat) = (Step::Mask, masked.seat);
        self.common.check(step, seat, masked.descriptor, |seat| self.senders.contains(&seat), now_ms)?;
        if Digest::of(&masked.payload) != masked.digest {
            return Err(Rejection::Digest { seat });
        }
        let accepted = once(step, seat, self.survivors.get(&seat), &masked.digest)?;
        if accepted == Accepted::New {
            self.total.add_bytes(&masked.payload)?;
            self.survivors.insert(seat, masked.digest);
        }
        Ok(accepted)
    }

    /// Seats that haven't answered.
    #[must_use]
    pub fn missing(&self) -> Vec<Seat> {
        missing(&self.senders, |seat| self.survivors.contains_key(&seat))
    }

    /// Ends the phase: the list of survivors, for each of them.
    ///
    /// # Errors
    /// [`Abort`] if too few are left, their noise is too little, or one has lost too many neighbours: no agent
    /// would sign.
    pub fn close(self) -> Result<(Survivors, Consenting), Abort> {
        let Self { common, adverts, graph, transcript, senders, total, survivors: digests } = self;
        common.may_mask(Step::Mask, digests.len())?;
        let survivors: BTreeSet<Seat> = digests.keys().copied().collect();
        let most = common.descriptor.max_dropped();
        for seat in &survivors {
            let got = graph.neighbours(*seat).difference(&survivors).count();
            if got > most {
                return Err(Abort::TooManyDropped { seat: *seat, most, got });
            }
        }
        let list: Vec<(Seat, Digest)> = digests.into_iter().collect();
        let transcript = transcript.survivors(&list);
        let list = Survivors { descriptor: common.digest, survivors: list };
        let sealed = Sealed { adverts, graph, senders, survivors, total };
        Ok((list, Consenting::new(common, transcript, sealed)))
    }
}
