//! Step 5: check who is in the sum, and sign it.

use super::{Agent, Answer, Phase, Prepared, Refusal, foreign, ordered, request_of};
use crate::secagg::message::{Consent, Step, Survivors};

impl Agent {
    /// Answers the list of survivors with a signature over everything this agent was told.
    ///
    /// # Errors
    /// [`Refusal`] if the list is short or has strangers, this agent's own vector isn't in it as it was sent, the
    /// honest survivors' noise is too little, or too many neighbours are gone.
    pub fn consent(&mut self, list: &Survivors, now_ms: i64) -> Result<Prepared<Consent>, Refusal> {
        let request = request_of(list);
        if let Some(Answer::Consent(consent)) = self.replay(Step::Consent, list.descriptor, request)? {
            return Ok(self.again(consent));
        }
        self.in_time(Step::Consent, now_ms)?;
        let Phase::Masked(waiting) = &self.state.phase else {
            return Err(Refusal::NotDue { expected: self.due(), got: Step::Consent });
        };
        let what = "survivors";
        let descriptor = &self.state.descriptor;
        let threshold = descriptor.threshold as usize;
        let survivors = ordered(what, list.survivors.iter().map(|(seat, _)| *seat), threshold)?;
        foreign(what, &survivors, &waiting.senders)?;
        let seat = self.state.seat;
        match list.survivors.iter().find(|(listed, _)| *listed == seat) {
            None => return Err(Refusal::Missing { what, seat }),
            Some((_, payload)) if *payload != waiting.payload => {
                return Err(Refusal::OwnEntryAltered { what });
            }
            Some(_) => {}
        }
        if !descriptor.noise.suffices(survivors.len()) {
            return Err(Refusal::TooLittleNoise { honest: descriptor.noise.honest(survivors.len()) });
        }
        let (most, got) = (descriptor.max_dropped(), waiting.neighbours.difference(&survivors).count());
        if got > most {
            return Err(Refusal::TooManyDropped { most, got });
        }
        let mut waiting = waiting.clone();
        waiting.transcript = waiting.transcript.survivors(&list.survivors);
        let signature = waiting.transcript.sign(&self.identity);
        let consent = Consent { descriptor: self.state.digest, seat, signature };
        let phase = Phase::Consented { waiting, survivors };
        let snapshot = self.answered(phase, self.state.guard, request, Answer::Consent(consent.clone()));
        Ok(Prepared { snapshot, guard: self.state.guard, message: consent })
    }
}
