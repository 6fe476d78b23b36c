//! Agents and servers without one check each: what the real ones would be if it were removed.
//!
//! The product has no switch for that; these are built from the protocol's parts.

use std::collections::{BTreeMap, BTreeSet};

use tabmesh_federation::id::Digest;
use tabmesh_federation::secagg::agent::pair_sign;
use tabmesh_federation::secagg::keys::{PublicKey, Secret, pair_mask_key, self_mask_key};
use tabmesh_federation::secagg::mask::{RingVector, Sign, Width};
use tabmesh_federation::secagg::message::Opened;
use tabmesh_federation::secagg::roster::Seat;
use tabmesh_federation::secagg::share::{Share, join, split};

use crate::world::{rng, seat};

/// An agent that believes what it is told.
pub(crate) struct Naive {
    pub(crate) seat: Seat,
    pub(crate) mask_secret: Secret,
    pub(crate) self_seed: Secret,
    /// What goes into its key derivations where the real one has the descriptor's digest.
    pub(crate) bound_to: Digest,
}

impl Naive {
    pub(crate) fn new(i: usize, bound_to: Digest) -> Self {
        let mut rng = rng(5_000 + i as u64);
        Self {
            seat: seat(i),
            mask_secret: Secret::random(&mut rng),
            self_seed: Secret::random(&mut rng),
            bound_to,
        }
    }

    /// The masked vector towards others with these keys.
    pub(crate) fn mask(&self, values: &[i64], others: &BTreeMap<Seat, PublicKey>) -> RingVector {
        let mut vector = RingVector::encode(Width::Bits64, values, 1 << 40);
        vector.apply(&self_mask_key(&self.self_seed, &self.bound_to, self.seat), Sign::Plus);
        for (other, key) in others.iter().filter(|(other, _)| **other != self.seat) {
            let agreed = self.mask_secret.agree(key, *other).unwrap();
            vector.apply(
                &pair_mask_key(&agreed, &self.bound_to, self.seat, *other),
                pair_sign(self.seat, *other),
            );
        }
        vector
    }

    /// Shares of both secrets, by holder.
    pub(crate) fn shares(&self, holders: usize, threshold: usize) -> BTreeMap<Seat, (Share, Share)> {
        let mut rng = rng(6_000 + u64::from(self.seat.index()));
        let seats = || (0..holders).map(seat).collect::<Vec<_>>().into_iter();
        let seeds = split(&self.self_seed, threshold, seats(), &mut rng).unwrap();
        let mut keys = split(&self.mask_secret, threshold, seats(), &mut rng).unwrap();
        seeds.into_iter().map(|(holder, seed)| (holder, (seed, keys.remove(&holder).unwrap()))).collect()
    }
}

/// What a server does that has got both secrets of one agent: its vector in the clear.
pub(crate) fn strip(
    masked: &[u8],
    width: Width,
    victim: Seat,
    digest: &Digest,
    self_seed: &Secret,
    mask_secret: &Secret,
    others: &BTreeMap<Seat, PublicKey>,
) -> Vec<i64> {
    let mut vector = RingVector::from_bytes(width, masked.len() / width.bytes(), masked).unwrap();
    vector.apply(&self_mask_key(self_seed, digest, victim), Sign::Minus);
    for (other, key) in others.iter().filter(|(other, _)| **other != victim) {
        let agreed = mask_secret.agree(key, *other).unwrap();
        vector.apply(&pair_mask_key(&agreed, digest, victim, *other), pair_sign(victim, *other).opposite());
    }
    vector.decode()
}

/// The victim's secrets from what agents opened, as far as the shares reach.
pub(crate) fn secrets_of(
    victim: Seat,
    opened: &[Opened],
    threshold: usize,
) -> (Option<Secret>, Option<Secret>) {
    let joined = |of: fn(&Opened) -> &BTreeMap<Seat, Share>| {
        let mut seen = BTreeSet::new();
        let shares: Vec<(Seat, &Share)> = opened
            .iter()
            .filter_map(|o| Some((o.seat, of(o).get(&victim)?)))
            .filter(|(from, _)| seen.insert(*from))
            .collect();
        join(&shares, threshold).ok()
    };
    (joined(|o| &o.seeds), joined(|o| &o.keys))
}
