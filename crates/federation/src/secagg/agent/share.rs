//! Steps 2 and 3: check everybody's keys, reveal a part of the graph seed where there is a ring, and share secrets
//! out.

use std::collections::{BTreeMap, BTreeSet};

use rand::{CryptoRng, RngCore};

use super::{Agent, Answer, Own, Peer, Phase, Prepared, Refusal, Shared, ordered, request_of};
use crate::secagg::consistency::Transcript;
use crate::secagg::graph::{Graph, Topology, seed};
use crate::secagg::keys::{Label, commit, seal};
use crate::secagg::message::{Advert, AdvertList, Reveal, RevealList, Sealed, Shares, Step};
use crate::secagg::roster::Seat;
use crate::secagg::share::{ShareError, split};

/// What follows the adverts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Joined {
    /// On a ring: the agent's part of the graph seed.
    Reveal(Reveal),
    /// On the complete graph: its shares.
    Shares(Shares),
}

impl Agent {
    /// Answers the list of adverts: with a reveal on a ring, with shares on the complete graph.
    ///
    /// # Errors
    /// [`Refusal`] if the list is short, out of order, has strangers, a bad signature or a key twice, or if this
    /// agent's own advert isn't in it as it was sent.
    pub fn adverts<R: RngCore + CryptoRng>(
        &mut self,
        list: &AdvertList,
        rng: &mut R,
        now_ms: i64,
    ) -> Result<Prepared<Joined>, Refusal> {
        let step = if self.ring() { Step::Reveal } else { Step::Share };
        let request = request_of(list);
        match self.replay(step, list.descriptor, request)? {
            Some(Answer::Reveal(reveal)) => return Ok(self.again(Joined::Reveal(reveal))),
            Some(Answer::Share(shares)) => return Ok(self.again(Joined::Shares(shares))),
            _ => {}
        }
        self.in_time(step, now_ms)?;
        let Phase::Advertised(own) = &self.state.phase else {
            return Err(Refusal::NotDue { expected: self.due(), got: step });
        };
        let peers = self.check_adverts(own, &list.adverts)?;
        let transcript = Transcript::begin(&self.state.digest).adverts(&list.adverts);
        let own = own.clone();
        if step == Step::Reveal {
            let reveal = Reveal { descriptor: self.state.digest, seat: self.state.seat, nonce: own.nonce };
            let phase = Phase::Revealed { own, peers, transcript };
            let snapshot = self.answered(phase, self.state.guard, request, Answer::Reveal(reveal.clone()));
            return Ok(Prepared { snapshot, guard: self.state.guard, message: Joined::Reveal(reveal) });
        }
        let joined: BTreeSet<Seat> = peers.keys().copied().collect();
        let graph = Graph::complete(&joined);
        let (shared, shares) = self.share_out(own, peers, &joined, &graph, transcript, rng)?;
        let snapshot =
            self.answered(Phase::Shared(shared), self.state.guard, request, Answer::Share(shares.clone()));
        Ok(Prepared { snapshot, guard: self.state.guard, message: Joined::Shares(shares) })
    }

    /// Answers the revealed parts of the graph seed with shares for the neighbours that follow from it.
    ///
    /// # Errors
    /// [`Refusal`] if a part is missing, foreign or not what was committed to, or the ring isn't secure.
    pub fn reveals<R: RngCore + CryptoRng>(
        &mut self,
        list: &RevealList,
        rng: &mut R,
        now_ms: i64,
    ) -> Result<Prepared<Shares>, Refusal> {
        let request = request_of(list);
        if let Some(Answer::Share(shares)) = self.replay(Step::Share, list.descriptor, request)? {
            return Ok(self.again(shares));
        }
        self.in_time(Step::Share, now_ms)?;
        let (Phase::Revealed { own, peers, transcript }, Topology::Regular(shape)) =
            (&self.state.phase, &self.state.descriptor.topology)
        else {
            return Err(Refusal::NotDue { expected: self.due(), got: Step::Share });
        };
        let what = "reveals";
        for (seat, peer) in peers {
            let nonce = list.nonces.get(seat).ok_or(Refusal::Missing { what, seat: *seat })?;
            if commit(Label::GraphNonce, &self.state.digest, *seat, nonce.as_bytes()) != peer.nonce_commitment
            {
                return Err(Refusal::BadReveal { seat: *seat });
            }
        }
        if let Some(seat) = list.nonces.keys().find(|seat| !peers.contains_key(seat)) {
            return Err(Refusal::Foreign { what, seat: *seat });
        }
        let joined: BTreeSet<Seat> = peers.keys().copied().collect();
        shape.check(joined.len(), self.state.descriptor.noise.colluders)?;
        let seed = seed(&self.state.digest, &list.nonces);
        let graph = Graph::regular(&joined, shape.degree, &seed);
        let (own, peers, transcript) = (own.clone(), peers.clone(), transcript.graph(&seed));
        let (shared, shares) = self.share_out(own, peers, &joined, &graph, transcript, rng)?;
        let snapshot =
            self.answered(Phase::Shared(shared), self.state.guard, request, Answer::Share(shares.clone()));
        Ok(Prepared { snapshot, guard: self.state.guard, message: shares })
    }

    fn check_adverts(&self, own: &Own, adverts: &[Advert]) -> Result<BTreeMap<Seat, Peer>, Refusal> {
        let what = "adverts";
        let threshold = self.state.descriptor.threshold as usize;
        let seats = ordered(what, adverts.iter().map(|advert| advert.seat), threshold)?;
        if !seats.contains(&self.state.seat) {
            return Err(Refusal::Missing { what, seat: self.state.seat });
        }
        let mut keys = BTreeSet::new();
        let mut peers = BTreeMap::new();
        for advert in adverts {
            let seat = advert.seat;
            let member = self.roster.member(seat).ok_or(Refusal::Foreign { what, seat })?;
            if advert.descriptor != self.state.digest {
                let (expected, got) = (self.state.digest, advert.descriptor);
                return Err(Refusal::WrongDescriptor { expected, got });
            }
            if seat == self.state.seat {
                // Its own advert needs no signature check: it must be the very one it sent.
                if *advert != own.advert {
                    return Err(Refusal::OwnEntryAltered { what });
                }
            } else {
                let context = tabmesh_privacy::signature::Context::SumAdvert;
                let signed = member.key.verify(context, &advert.signed_bytes(), &advert.signature);
                signed.map_err(|_| Refusal::BadSignature { seat })?;
            }
            if !keys.insert(advert.share_key) || !keys.insert(advert.mask_key) {
                return Err(Refusal::SharedKey { seat });
            }
            let (share_key, mask_key) = (advert.share_key, advert.mask_key);
            peers.insert(seat, Peer { share_key, mask_key, nonce_commitment: advert.nonce_commitment });
        }
        Ok(peers)
    }

    /// Shares of both secrets for every neighbour, sealed, and one of the seed that stays.
    fn share_out<R: RngCore + CryptoRng>(
        &self,
        own: Own,
        peers: BTreeMap<Seat, Peer>,
        joined: &BTreeSet<Seat>,
        graph: &Graph,
        transcript: Transcript,
        rng: &mut R,
    ) -> Result<(Shared, Shares), Refusal> {
        let (seat, digest) = (self.state.seat, self.state.digest);
        let holders = graph.holders(seat);
        let threshold = self.state.descriptor.share_threshold();
        let refused = |cause: ShareError| Refusal::Share { from: seat, cause };
        let mut seeds = split(&own.self_seed, threshold, holders.iter().copied(), rng).map_err(refused)?;
        let keys = split(&own.mask_secret, threshold, holders.iter().copied(), rng).map_err(refused)?;
        let mut sealed = BTreeMap::new();
        for to in graph.neighbours(seat) {
            let missing = Refusal::Missing { what: "adverts", seat: *to };
            let (Some(peer), Some(one), Some(other)) = (peers.get(to), seeds.get(to), keys.get(to)) else {
                return Err(missing);
            };
            let agreed = own.share_secret.agree(&peer.share_key, *to)?;
            let plain = [one.to_bytes(), other.to_bytes()].concat();
            sealed.insert(*to, Sealed(seal(&agreed, &digest, seat, *to, &plain)));
        }
        let kept = seeds.remove(&seat).ok_or(Refusal::Missing { what: "holders", seat })?;
        let peers = peers.into_iter().filter(|(other, _)| graph.neighbours(seat).contains(other)).collect();
        let shared = Shared { own, peers, joined: joined.clone(), kept, transcript };
        Ok((shared, Shares { descriptor: digest, seat, sealed }))
    }
}
