//! Phase 6: survivors open shares; the sum loses its masks and is checked.

use std::collections::{BTreeMap, BTreeSet};

use super::mask::Sealed;
use super::{Abort, Accepted, Common, Rejection, missing, once};
use crate::id::Digest;
use crate::secagg::message::{Opened, Step};
use crate::secagg::noise::Guarantee;
use crate::secagg::roster::Seat;
use crate::secagg::unmask::Unmask;

/// Taking opened shares.
#[derive(Debug, Clone)]
pub struct Opening {
    common: Common,
    sealed: Sealed,
    /// Who has got the signatures and can answer.
    signers: BTreeSet<Seat>,
    opened: BTreeMap<Seat, Opened>,
}

/// The result: the noised sum over the survivors, and nothing about any one of them.
#[derive(Debug, Clone, PartialEq)]
pub struct SecureSum {
    /// The sum, in integer steps.
    pub values: Vec<i64>,
    /// SHA-256 of the values as little-endian 64-bit words.
    pub digest: Digest,
    /// Whose vectors are in it.
    pub survivors: BTreeSet<Seat>,
    /// What it costs each unit.
    pub guarantee: Guarantee,
    /// Seats that opened shares which didn't fit the others'.
    pub wrong_shares: BTreeSet<Seat>,
}

impl Opening {
    pub(super) fn new(common: Common, sealed: Sealed, signers: BTreeSet<Seat>) -> Self {
        Self { common, sealed, signers, opened: BTreeMap::new() }
    }

    /// Takes an agent's opened shares.
    ///
    /// # Errors
    /// [`Rejection`] unless they are exactly the ones due: a seed of each survivor, a key of each dropout, among
    /// those whose shares it holds.
    pub fn accept(&mut self, opened: Opened, now_ms: i64) -> Result<Accepted, Rejection> {
        let (step, seat) = (Step::Open, opened.seat);
        self.common.check(step, seat, opened.descriptor, |seat| self.signers.contains(&seat), now_ms)?;
        let owners = self.sealed.graph.holders(seat);
        let owners = owners.intersection(&self.sealed.senders);
        let (alive, dropped): (Vec<&Seat>, Vec<&Seat>) =
            owners.partition(|owner| self.sealed.survivors.contains(owner));
        if !opened.seeds.keys().eq(alive) || !opened.keys.keys().eq(dropped) {
            return Err(Rejection::WrongShares { seat });
        }
        let accepted = once(step, seat, self.opened.get(&seat), &opened)?;
        self.opened.insert(seat, opened);
        Ok(accepted)
    }

    /// Seats that haven't answered.
    #[must_use]
    pub fn missing(&self) -> Vec<Seat> {
        missing(&self.signers, |seat| self.opened.contains_key(&seat))
    }

    /// Takes the masks off.
    ///
    /// # Errors
    /// [`Abort`] if shares of a secret are too few or wrong, or the sum is one that survivors can't give.
    pub fn close(self) -> Result<SecureSum, Abort> {
        self.common.enough(Step::Open, self.opened.len())?;
        let Self { common, sealed, opened, .. } = self;
        let agents = sealed.survivors.len();
        let (total, wrong_shares) = Unmask {
            descriptor: &common.descriptor,
            digest: common.digest,
            adverts: &sealed.adverts,
            graph: &sealed.graph,
            survivors: &sealed.survivors,
            senders: &sealed.senders,
            opened: &opened,
        }
        .run(sealed.total)?;
        let values = total.decode();
        // A checked descriptor keeps this product below half the modulus.
        let limit = common.descriptor.max_abs.saturating_mul(agents as u64);
        if let Some((position, value)) = values.iter().enumerate().find(|(_, v)| v.unsigned_abs() > limit) {
            return Err(Abort::OutOfRange { position, value: *value, limit, agents });
        }
        let guarantee = common.descriptor.guarantee(&common.roster)?;
        let digest = Digest::of_payload(&values);
        Ok(SecureSum { values, digest, survivors: sealed.survivors, guarantee, wrong_shares })
    }
}
