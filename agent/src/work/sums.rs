//! What an agent answers to the steps of a secure sum.
//!
//! The sum's descriptor must be the one that this agent computes itself: from the plan it took on, what is summed, and
//! the roster with its own copy of the keys. Every answer is stored before it leaves and given once; the masked vector
//! is debited before.

use std::sync::{Arc, MutexGuard, PoisonError};

use tabmesh_federation::descriptor::RoundDescriptor;
use tabmesh_federation::documents::PlanAnnouncement;
use tabmesh_federation::id::{AgentId, CollectionId, Digest, PlanDigest};
use tabmesh_federation::plan::{Plan, SecureSumSpec};
use tabmesh_federation::release_plan::check_query;
use tabmesh_federation::secagg::agent::{Agent, Entry, Joined};
use tabmesh_federation::secagg::descriptor::SumDescriptor;
use tabmesh_federation::secagg::document::{Opening, Reply, Request, Summed};
use tabmesh_federation::secagg::message::{Complaint, Delivery};
use tabmesh_federation::secagg::policy::Policy;
use tabmesh_federation::secagg::roster::Roster;
use tabmesh_federation::secagg::setup::{self, Attempt, Subject};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::ledger::Purpose;
use tabmesh_privacy::mechanism::EventShape;
use tabmesh_privacy::release::ReleaseQuery;
use tabmesh_proto::message::{Assignment, SubmissionTarget};

use super::{Answer, Work, WorkError};
use crate::books::SumQuestion;
use crate::sums::{Current, SumError, SumStore};

/// What goes back for a step.
pub enum SumReply {
    /// A document: keys, sealed shares, a signature.
    Document(Vec<u8>),
    /// The masked vector with its debit.
    Vector(Box<Answer>),
    /// Nothing but a receipt: the sum has ended.
    Received,
}

/// What is summed, read and held against plan and contract.
enum Asked {
    Stage(ReleaseQuery),
    Round(Box<RoundDescriptor>),
}

impl Work {
    /// Answers one step of a secure sum. The artefacts that a round needs must have been fetched.
    ///
    /// # Errors
    /// [`WorkError`]; nothing may be sent then.
    pub fn sum(&self, assignment: &Assignment, now_ms: i64) -> Result<SumReply, WorkError> {
        let store = self.sums();
        let request = Request::from_bytes(assignment.document()).map_err(SumError::from)?;
        let document = |reply: Reply| Ok(SumReply::Document(reply.to_bytes()));
        match request {
            Request::Advertise(opening) => {
                document(self.advertise(&store, &opening, collection(assignment)?, now_ms)?)
            }
            // What follows the adverts is this agent's to say: on a ring it has something to reveal first.
            Request::Share(list) | Request::Reveal(list) => {
                let mut current = self.current(&store)?;
                let mut keys = self.books().keys(current.agent.guard().answers)?;
                let joined = current.agent.adverts(&list, &mut keys, now_ms).map_err(SumError::from)?;
                document(match store.keep(joined)? {
                    Joined::Shares(shares) => Reply::Shares(shares),
                    Joined::Reveal(reveal) => Reply::Revealed(reveal),
                })
            }
            Request::Ring(list) => {
                let mut current = self.current(&store)?;
                let mut keys = self.books().keys(current.agent.guard().answers)?;
                let shares = current.agent.reveals(&list, &mut keys, now_ms).map_err(SumError::from)?;
                document(Reply::Shares(store.keep(shares)?))
            }
            Request::Mask(delivery) => match self.contribute(&store, assignment, &delivery, now_ms) {
                Err(WorkError::Sum(SumError::Refused(refusal))) if refusal.unopened().is_some() => {
                    let agent = self.current(&store)?.agent;
                    let Some(about) = refusal.unopened() else { return Err(SumError::from(refusal).into()) };
                    tracing::warn!(seat = %about, %refusal, "no vector is sent; the sum can go on without that agent");
                    document(Reply::Complaint(Complaint {
                        descriptor: agent.digest(),
                        seat: agent.seat(),
                        about,
                    }))
                }
                answered => answered,
            },
            Request::Consent(survivors) => {
                let mut current = self.current(&store)?;
                let consent = current.agent.consent(&survivors, now_ms).map_err(SumError::from)?;
                document(Reply::Consent(store.keep(consent)?))
            }
            Request::Open(consents) => {
                let mut current = self.current(&store)?;
                let opened = current.agent.open(&consents, now_ms).map_err(SumError::from)?;
                document(Reply::Opened(store.keep(opened)?))
            }
            Request::Ended(outcome) => {
                tracing::info!(
                    collection = %outcome.collection, sum = %outcome.sum, rho = %outcome.rho,
                    agents = outcome.survivors.len(), "secure sum ended"
                );
                Ok(SumReply::Received)
            }
        }
    }

    /// Artefacts that a step's round needs and that aren't here.
    ///
    /// # Errors
    /// [`WorkError`] if the document isn't one.
    pub fn sum_needs(&self, assignment: &Assignment) -> Result<Vec<Digest>, WorkError> {
        let request = Request::from_bytes(assignment.document()).map_err(SumError::from)?;
        let opening = match request {
            Request::Advertise(opening) => Some(opening),
            Request::Mask(_) => self.sums().opening()?,
            _ => None,
        };
        let Some(Opening { summed: Summed::Round(text), .. }) = opening else { return Ok(Vec::new()) };
        let descriptor = RoundDescriptor::from_bytes(text.as_bytes())?;
        let needed = [descriptor.base, descriptor.context, descriptor.preprocessing];
        Ok(needed.into_iter().filter(|digest| !self.artefacts.has(digest)).collect())
    }

    /// Enters a sum, or gives the advert of the one that was entered already.
    fn advertise(
        &self,
        store: &SumStore,
        opening: &Opening,
        collection: CollectionId,
        now_ms: i64,
    ) -> Result<Reply, WorkError> {
        let bytes = opening.descriptor.as_bytes();
        let digest = Digest::of(bytes);
        // A state of another sum that can't be taken up is no reason to stay out of this one.
        let same = store.opening().ok().flatten().is_some_and(|known| known == *opening);
        if same && let Some(Current { agent, .. }) = self.stored(store)? {
            // Past its first step a sum isn't entered again: its keys are in use.
            let again = agent.advertised().ok_or(SumError::AnsweredBefore)?;
            return Ok(Reply::Advert(store.keep(again)?));
        }
        if self.books().debited(digest.as_bytes()) {
            return Err(SumError::AnsweredBefore.into());
        }
        let (plan, announcement) = self.kept(&plan_of(&opening.summed)?)?;
        let descriptor = SumDescriptor::from_bytes(bytes).map_err(SumError::from)?;
        let asked = self.asked(opening, descriptor.attempt, &plan, &announcement)?;
        let spec = plan.secure_sum().ok_or(SumError::NotPlanned)?;
        let (plan_digest, step) = (announcement.digest.to_string(), u64::from(asked.step()));
        let debited = self.books().debits(&plan_digest, asked.purpose(), step);
        // One debit an attempt at most, so whatever opens now comes after as many.
        if descriptor.attempt as usize <= debited {
            return Err(SumError::OldAttempt { debited, got: descriptor.attempt }.into());
        }
        let subject = asked.subject(opening, &plan, announcement.digest, collection)?;
        let roster = Arc::new(self.roster(opening)?);
        follows(&descriptor, &subject, spec, &roster, now_ms)?;
        let own = AgentId::new(self.domain.identity.to_string()).map_err(|_| WorkError::NotInRoster)?;
        let guard = store.guard()?;
        let entry = Entry {
            agent: &own,
            identity: Arc::clone(&self.domain.signer),
            roster,
            policy: &self.floor(spec, subject.rho),
            expected: &subject.expected,
            guard,
        };
        let mut keys = self.books().keys(guard.answers)?;
        let (_, advert) = Agent::enter(entry, bytes, &mut keys, now_ms).map_err(SumError::from)?;
        store.begin(opening)?;
        Ok(Reply::Advert(store.keep(advert)?))
    }

    /// Computes, noises, masks, debits: the one answer that depends on rows.
    fn contribute(
        &self,
        store: &SumStore,
        assignment: &Assignment,
        delivery: &Delivery,
        now_ms: i64,
    ) -> Result<SumReply, WorkError> {
        let Current { mut agent, opening } = self.current(store)?;
        let (plan, announcement) = self.kept(&plan_of(&opening.summed)?)?;
        let asked = self.asked(&opening, agent.descriptor().attempt, &plan, &announcement)?;
        let target = SubmissionTarget {
            assignment_id: assignment.id().clone(),
            plan_digest: *announcement.digest.0.as_bytes(),
            stage_or_round: asked.step(),
            attempt: agent.descriptor().attempt,
        };
        let digest = *agent.digest().as_bytes();
        if let Some(again) = agent.masked_before(delivery).map_err(SumError::from)? {
            let (payload, debit) = self.books().answered(&digest)?.ok_or(SumError::AnsweredBefore)?;
            store.keep(again)?;
            return Ok(SumReply::Vector(Box::new(Answer { target, payload, debit })));
        }
        let sum = match &asked {
            Asked::Stage(query) => self.count(query, &announcement.schema)?,
            Asked::Round(descriptor) => self.train(descriptor, &plan, &announcement)?,
        };
        let descriptor = agent.descriptor().clone();
        let shape = asked.shape(self.domain.max_rows());
        let event = setup::event(&descriptor, opening.roster.len(), shape).map_err(SumError::from)?;
        let plan_digest = announcement.digest.to_string();
        let question = SumQuestion {
            plan: &plan_digest,
            purpose: asked.purpose(),
            step: u64::from(asked.step()),
            descriptor: &descriptor,
            digest,
            event,
        };
        let mut prepared = None;
        let sendable = self.books().contribute(&question, &sum, now_ms, |contribution| {
            let (answer, payload) = agent.mask_for_debit(delivery, contribution, now_ms)?;
            store.prepare(&answer)?;
            prepared = Some(answer);
            Ok::<_, SumError>(payload)
        });
        let (payload, debit) = sendable?;
        if let Some(answer) = prepared {
            store.debited(answer)?;
        }
        Ok(SumReply::Vector(Box::new(Answer { target, payload, debit })))
    }

    /// What is summed, held against plan and contract as if it were asked alone. Later attempts are about the same, over
    /// those who are left of the first one's roster.
    fn asked(
        &self,
        opening: &Opening,
        attempt: u32,
        plan: &Plan,
        announcement: &PlanAnnouncement,
    ) -> Result<Asked, WorkError> {
        let (least, most) = (plan.cohort.min_agents as usize, plan.cohort.max_agents as usize);
        let own = self.domain.identity.to_string();
        let mine = opening.roster.iter().any(|agent| agent.as_str() == own);
        if !mine || !(least..=most).contains(&opening.roster.len()) {
            return Err(WorkError::NotInRoster);
        }
        match &opening.summed {
            Summed::Stage(text) => {
                let query = ReleaseQuery::from_json(text.as_bytes())?;
                let (schema, rows) = (&self.domain.schema, self.domain.max_rows());
                let check = |agents| check_query(&query, schema, rows, plan, &announcement.digest, agents);
                let (now, first) = (opening.roster.len(), announcement.cohort as usize);
                // How many agents the first attempt had decides how much noise a stage can afford at least.
                let before = attempt > 1 && (now + 1..=first).any(|agents| check(agents).is_ok());
                if !before {
                    check(now)?;
                }
                Ok(Asked::Stage(query))
            }
            Summed::Round(text) => {
                let descriptor = RoundDescriptor::from_bytes(text.as_bytes())?;
                descriptor.check(plan, &announcement.digest)?;
                let same = descriptor.roster == opening.roster;
                if !same && (attempt == 1 || !opening.roster.is_subset(&descriptor.roster)) {
                    return Err(WorkError::NotInRoster);
                }
                Ok(Asked::Round(Box::new(descriptor)))
            }
        }
    }

    fn roster(&self, opening: &Opening) -> Result<Roster, SumError> {
        let peers = self.domain.peers.as_ref().ok_or(SumError::NotPlanned)?;
        Ok(peers.roster(&opening.roster)?)
    }

    fn stored(&self, store: &SumStore) -> Result<Option<Current>, SumError> {
        let debited = |digest: &Digest| self.books().debited(digest.as_bytes());
        store.current(|opening| self.roster(opening), &self.domain.signer, debited)
    }

    fn current(&self, store: &SumStore) -> Result<Current, SumError> {
        self.stored(store)?.ok_or(SumError::NotIn)
    }

    fn sums(&self) -> MutexGuard<'_, SumStore> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The local policy as the protocol has it.
    fn floor(&self, spec: SecureSumSpec, rho: Rho) -> Policy {
        let floor = self.domain.policy.secure_sum;
        let cohort = u32::try_from(self.domain.policy.minimum_cohort).unwrap_or(u32::MAX);
        let factor = u64::from(floor.max_own_share_factor);
        Policy {
            min_agents: floor.min_agents.max(cohort),
            min_organisations: floor.min_domains,
            colluders: floor.colluders,
            max_attempts: spec.retries.min(floor.max_retries).saturating_add(1),
            max_rho: rho,
            max_local_rho: Rho::from_units(rho.units().saturating_mul(factor)),
            min_neighbours: floor.min_neighbours,
        }
    }
}

impl Asked {
    fn subject(
        &self,
        opening: &Opening,
        plan: &Plan,
        digest: PlanDigest,
        collection: CollectionId,
    ) -> Result<Subject, SumError> {
        let payload = opening.summed.digest();
        match self {
            Self::Stage(query) => {
                Ok(Subject::stage(query, payload, collection, digest, plan.release.deadline_s))
            }
            Self::Round(descriptor) if descriptor.id == collection => {
                Ok(Subject::round(descriptor, payload, plan.rounds.deadline_s))
            }
            Self::Round(descriptor) => Err(SumError::OtherCollection {
                expected: collection.to_string(),
                got: descriptor.id.to_string(),
            }),
        }
    }

    fn purpose(&self) -> Purpose {
        match self {
            Self::Stage(_) => Purpose::Release,
            Self::Round(_) => Purpose::Round,
        }
    }

    fn step(&self) -> u32 {
        match self {
            Self::Stage(query) => u32::from(query.stage),
            Self::Round(descriptor) => descriptor.index,
        }
    }

    fn shape(&self, rows_per_unit: u32) -> EventShape {
        match self {
            Self::Stage(query) => query.event_shape(),
            Self::Round(descriptor) => {
                let dimension = u32::try_from(descriptor.len()).unwrap_or(u32::MAX);
                EventShape { rows_per_unit, marginals: 0, dimension }
            }
        }
    }
}

/// Holds a descriptor against the one that follows from this agent's own facts; only which attempt it is, when it opened
/// and where the coordinator's log stood are the coordinator's to say.
fn follows(
    descriptor: &SumDescriptor,
    subject: &Subject,
    spec: SecureSumSpec,
    roster: &Roster,
    now_ms: i64,
) -> Result<(), SumError> {
    let SumDescriptor { attempt: number, opened_ms, log_head, .. } = *descriptor;
    let own = subject.describe(spec, roster, Attempt { number, opened_ms, log_head })?;
    if own != *descriptor {
        return Err(SumError::OtherDescriptor);
    }
    if descriptor.opened_ms > now_ms.saturating_add(MAX_AHEAD_MS) {
        return Err(SumError::Ahead { opened_ms: descriptor.opened_ms, now_ms });
    }
    Ok(())
}

/// The plan that what is summed names.
fn plan_of(summed: &Summed) -> Result<String, WorkError> {
    Ok(match summed {
        Summed::Stage(text) => ReleaseQuery::from_json(text.as_bytes())?.plan_digest,
        Summed::Round(text) => RoundDescriptor::from_bytes(text.as_bytes())?.plan.to_string(),
    })
}

/// The stage or round that an assignment is for.
fn collection(assignment: &Assignment) -> Result<CollectionId, SumError> {
    let id = assignment.id().as_str();
    let uuid = uuid::Uuid::parse_str(id);
    let uuid = uuid.map_err(|_| SumError::OtherCollection { expected: id.to_owned(), got: String::new() })?;
    Ok(CollectionId::from_uuid(uuid))
}

/// How far a sum's opening may be ahead of this agent's clock, in milliseconds.
const MAX_AHEAD_MS: i64 = 5 * 60 * 1000;

#[cfg(test)]
mod tests;
