//! Phase 2, on a ring only: agents reveal their parts of the graph seed.

use std::collections::{BTreeMap, BTreeSet};

use super::{Abort, Accepted, Common, Rejection, Sharing, missing, once};
use crate::secagg::consistency::Transcript;
use crate::secagg::graph::{Graph, Topology, seed};
use crate::secagg::keys::{Label, Nonce, commit};
use crate::secagg::message::{Advert, Reveal, RevealList, Step};
use crate::secagg::roster::Seat;

/// Taking reveals.
#[derive(Debug, Clone)]
pub struct Revealing {
    common: Common,
    adverts: BTreeMap<Seat, Advert>,
    nonces: BTreeMap<Seat, Nonce>,
}

impl Revealing {
    pub(super) fn new(common: Common, adverts: BTreeMap<Seat, Advert>) -> Self {
        Self { common, adverts, nonces: BTreeMap::new() }
    }

    /// Whether there is a graph seed to reveal; if not, close at once.
    #[must_use]
    pub fn needed(&self) -> bool {
        matches!(self.common.descriptor.topology, Topology::Regular(_))
    }

    /// Takes a reveal.
    ///
    /// # Errors
    /// [`Rejection`] naming what is wrong with it.
    pub fn accept(&mut self, reveal: &Reveal, now_ms: i64) -> Result<Accepted, Rejection> {
        let (step, seat) = (Step::Reveal, reveal.seat);
        let advert = self.adverts.get(&seat).filter(|_| self.needed());
        self.common.check(step, seat, reveal.descriptor, |_| advert.is_some(), now_ms)?;
        let commitment = commit(Label::GraphNonce, &self.common.digest, seat, reveal.nonce.as_bytes());
        if advert.is_none_or(|advert| advert.nonce_commitment != commitment) {
            return Err(Rejection::BadReveal { seat });
        }
        let accepted = once(step, seat, self.nonces.get(&seat), &reveal.nonce)?;
        self.nonces.insert(seat, reveal.nonce);
        Ok(accepted)
    }

    /// Seats that haven't answered.
    #[must_use]
    pub fn missing(&self) -> Vec<Seat> {
        let expected = if self.needed() { self.adverts.keys().copied().collect() } else { BTreeSet::new() };
        missing(&expected, |seat| self.nonces.contains_key(&seat))
    }

    /// Ends the phase: on a ring, the list for every agent.
    ///
    /// # Errors
    /// [`Abort::MissingReveal`] unless all parts are there.
    pub fn close(self) -> Result<(Option<RevealList>, Sharing), Abort> {
        if let Some(seat) = self.missing().first() {
            return Err(Abort::MissingReveal { seat: *seat });
        }
        let Self { common, adverts, nonces } = self;
        let seats: BTreeSet<Seat> = adverts.keys().copied().collect();
        let transcript = Transcript::begin(&common.digest).adverts(adverts.values());
        let (list, graph, transcript) = match &common.descriptor.topology {
            Topology::Complete => (None, Graph::complete(&seats), transcript),
            Topology::Regular(shape) => {
                let seed = seed(&common.digest, &nonces);
                let list = RevealList { descriptor: common.digest, nonces };
                (Some(list), Graph::regular(&seats, shape.degree, &seed), transcript.graph(&seed))
            }
        };
        Ok((list, Sharing::new(common, adverts, graph, transcript)))
    }
}
