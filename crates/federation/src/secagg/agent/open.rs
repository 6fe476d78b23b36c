//! Step 6: open one share of each neighbour, of the one secret or of the other, once enough agents have signed.

use std::collections::BTreeMap;

use super::{Agent, Answer, Phase, Prepared, Refusal, request_of};
use crate::secagg::message::{Consents, Opened, Step};
use crate::secagg::roster::Seat;
use crate::secagg::share::Share;

impl Agent {
    /// Answers the survivors' signatures with shares: of the self-mask seed of each survivor, of the mask key of each
    /// dropout. Never both of one agent: which one follows from the set this agent signed.
    ///
    /// # Errors
    /// [`Refusal::Consent`] if fewer than the threshold have signed the same, or a signature is over something else.
    pub fn open(&mut self, list: &Consents, now_ms: i64) -> Result<Prepared<Opened>, Refusal> {
        let request = request_of(list);
        if let Some(Answer::Open(opened)) = self.replay(Step::Open, list.descriptor, request)? {
            return Ok(self.again(opened));
        }
        self.in_time(Step::Open, now_ms)?;
        let Phase::Consented { waiting, survivors } = &self.state.phase else {
            return Err(Refusal::NotDue { expected: self.due(), got: Step::Open });
        };
        let threshold = self.state.descriptor.threshold as usize;
        waiting.transcript.check(list, survivors, threshold, &self.roster)?;
        let mut seeds: BTreeMap<Seat, Share> = BTreeMap::from([(self.state.seat, waiting.kept.clone())]);
        let mut keys = BTreeMap::new();
        for (owner, (seed, key)) in &waiting.held {
            if survivors.contains(owner) {
                seeds.insert(*owner, seed.clone());
            } else {
                keys.insert(*owner, key.clone());
            }
        }
        let opened = Opened { descriptor: self.state.digest, seat: self.state.seat, seeds, keys };
        let snapshot = self.answered(Phase::Opened, self.state.guard, request, Answer::Open(opened.clone()));
        Ok(Prepared { snapshot, guard: self.state.guard, message: opened })
    }
}
