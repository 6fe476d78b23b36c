//! Phase 5: survivors sign who is in the sum.

use std::collections::BTreeMap;

use tabmesh_privacy::signature::Signature;

use super::mask::Sealed;
use super::{Abort, Accepted, Common, Opening, Rejection, missing, once};
use crate::secagg::consistency::Transcript;
use crate::secagg::message::{Consent, Consents, Step};
use crate::secagg::roster::Seat;

/// Taking signatures.
#[derive(Debug, Clone)]
pub struct Consenting {
    common: Common,
    transcript: Transcript,
    sealed: Sealed,
    signatures: BTreeMap<Seat, Signature>,
}

impl Consenting {
    pub(super) fn new(common: Common, transcript: Transcript, sealed: Sealed) -> Self {
        Self { common, transcript, sealed, signatures: BTreeMap::new() }
    }

    /// Takes a signature.
    ///
    /// # Errors
    /// [`Rejection`] naming what is wrong with it.
    pub fn accept(&mut self, consent: &Consent, now_ms: i64) -> Result<Accepted, Rejection> {
        let (step, seat) = (Step::Consent, consent.seat);
        let expected = |seat| self.sealed.survivors.contains(&seat);
        self.common.check(step, seat, consent.descriptor, expected, now_ms)?;
        if !self.transcript.signed_by(seat, &consent.signature, &self.common.roster) {
            return Err(Rejection::BadSignature { seat });
        }
        let accepted = once(step, seat, self.signatures.get(&seat), &consent.signature)?;
        self.signatures.insert(seat, consent.signature);
        Ok(accepted)
    }

    /// Seats that haven't answered.
    #[must_use]
    pub fn missing(&self) -> Vec<Seat> {
        missing(&self.sealed.survivors, |seat| self.signatures.contains_key(&seat))
    }

    /// Ends the phase: the signatures, for each agent that signed.
    ///
    /// # Errors
    /// [`Abort::TooFew`] below the threshold.
    pub fn close(self) -> Result<(Consents, Opening), Abort> {
        self.common.enough(Step::Consent, self.signatures.len())?;
        let signatures = self.signatures.iter().map(|(seat, signature)| (*seat, *signature)).collect();
        let list = Consents { descriptor: self.common.digest, signatures };
        let signers = self.signatures.into_keys().collect();
        Ok((list, Opening::new(self.common, self.sealed, signers)))
    }
}
