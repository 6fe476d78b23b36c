//! Phase 1: agents announce their keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use tabmesh_privacy::signature::Context;

use super::{Abort, Accepted, Common, Rejection, Revealing, missing, once};
use crate::id::Digest;
use crate::secagg::descriptor::SumDescriptor;
use crate::secagg::message::{Advert, AdvertList, Step};
use crate::secagg::roster::{Roster, Seat};

/// Taking adverts.
#[derive(Debug, Clone)]
pub struct Advertising {
    common: Common,
    adverts: BTreeMap<Seat, Advert>,
}

impl Advertising {
    /// Opens a sum; `bytes` are the descriptor as it is sent to the agents.
    ///
    /// # Errors
    /// [`Abort::Descriptor`] if it is malformed or doesn't fit the roster.
    pub fn open(bytes: &[u8], roster: Arc<Roster>) -> Result<Self, Abort> {
        let descriptor = SumDescriptor::from_bytes(bytes)?;
        descriptor.check(&roster)?;
        let common = Common { descriptor: Arc::new(descriptor), digest: Digest::of(bytes), roster };
        Ok(Self { common, adverts: BTreeMap::new() })
    }

    /// Takes an advert.
    ///
    /// # Errors
    /// [`Rejection`] naming what is wrong with it.
    pub fn accept(&mut self, advert: Advert, now_ms: i64) -> Result<Accepted, Rejection> {
        let (step, seat) = (Step::Advertise, advert.seat);
        let member = self.common.roster.member(seat);
        self.common.check(step, seat, advert.descriptor, |_| member.is_some(), now_ms)?;
        let signed = member.is_some_and(|member| {
            member.key.verify(Context::SumAdvert, &advert.signed_bytes(), &advert.signature).is_ok()
        });
        if !signed {
            return Err(Rejection::BadSignature { seat });
        }
        let accepted = once(step, seat, self.adverts.get(&seat), &advert)?;
        if accepted == Accepted::New {
            let own = [advert.share_key, advert.mask_key];
            let taken = |other: &Advert| own.contains(&other.share_key) || own.contains(&other.mask_key);
            if advert.share_key == advert.mask_key || self.adverts.values().any(taken) {
                return Err(Rejection::SharedKey { seat });
            }
            self.adverts.insert(seat, advert);
        }
        Ok(accepted)
    }

    /// Seats that haven't answered.
    #[must_use]
    pub fn missing(&self) -> Vec<Seat> {
        missing(&self.common.roster.seats().collect(), |seat| self.adverts.contains_key(&seat))
    }

    /// Ends the phase: the list for every agent that advertised.
    ///
    /// # Errors
    /// [`Abort::TooFew`] below the threshold, [`Abort::TooLittleNoise`] if theirs wouldn't suffice.
    pub fn close(self) -> Result<(AdvertList, Revealing), Abort> {
        self.common.may_mask(Step::Advertise, self.adverts.len())?;
        let list =
            AdvertList { descriptor: self.common.digest, adverts: self.adverts.values().cloned().collect() };
        Ok((list, Revealing::new(self.common, self.adverts)))
    }
}
