//! The pipeline of one plan, from admission to a published model, as an append-only list of events.
//!
//! The state is what the events so far amount to, so a restarted coordinator replays them and asks [`Job::next`]
//! what to do. Nothing is done twice for effect: stages and rounds have ids that are recorded when they open, and
//! what they produce is recorded by digest. A release stage that is abandoned ends the job, since later stages
//! build on it; an abandoned round is passed over, since its budget may be spent and can't be spent again.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::{AgentId, CollectionId, Digest, PlanDigest, RoundId};
use crate::phase::abandon::AbandonReason;
use crate::plan::{Plan, STAGES};

/// Why an event doesn't fit a job.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum JobError {
    /// The event belongs to another phase, stage or round.
    #[error("{event} does not fit a job in phase {phase}")]
    OutOfPlace {
        /// Name of the event.
        event: &'static str,
        /// The phase, in words.
        phase: String,
    },
    /// A new collection's id isn't above all earlier ones.
    #[error("collection id {got} must be above {latest}")]
    NotMonotone {
        /// The latest id so far.
        latest: CollectionId,
        /// The id given.
        got: CollectionId,
    },
    /// The cohort is empty.
    #[error("a job needs a cohort of at least one agent")]
    NoCohort,
    /// The list is as long as any job's can be.
    #[error("a job has at most {MAX_RECORDS} events")]
    TooManyEvents,
}

/// Something that happened to a job; the only way its state changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum JobEvent {
    /// The cohort is chosen.
    Started {
        /// Who takes part.
        roster: BTreeSet<AgentId>,
    },
    /// A release stage's collection is stored and about to be announced.
    StageOpened {
        /// Stage, 1 to 4.
        stage: u8,
        /// Its collection.
        collection: CollectionId,
    },
    /// A stage's sum is durable.
    StageReleased {
        /// Stage, 1 to 4.
        stage: u8,
        /// Digest of the stored sum.
        sum: Digest,
    },
    /// A stage ended without a sum.
    StageAbandoned {
        /// Stage, 1 to 4.
        stage: u8,
        /// Why.
        cause: AbandonReason,
    },
    /// The synthetic corpus is durable.
    CorpusReady {
        /// Digest of the corpus.
        corpus: Digest,
        /// Digest of bins, codes and scaling.
        preprocessing: Digest,
    },
    /// The base is tuned on the corpus.
    Pretrained {
        /// Digest of the tuned model.
        tuned: Digest,
    },
    /// A round is stored and about to be announced.
    RoundOpened {
        /// Number of the round, from 0.
        index: u32,
        /// Its id.
        round: RoundId,
    },
    /// A round's result is visible.
    RoundPublished {
        /// Number of the round, from 0.
        index: u32,
        /// Digest of the adapter after it.
        adapter: Digest,
    },
    /// A round ended without a result.
    RoundAbandoned {
        /// Number of the round, from 0.
        index: u32,
        /// Why.
        cause: AbandonReason,
    },
    /// The manifest is signed and visible.
    Published {
        /// Its digest.
        manifest: Digest,
    },
    /// A step failed for good.
    Failed {
        /// What failed, without values.
        what: String,
    },
    /// An operator stopped it.
    Cancelled {
        /// Who, as an identity.
        by: String,
    },
}

/// Where a job is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobPhase {
    /// The plan is checked and admitted.
    Admitted,
    /// Collecting noisy counts.
    Release {
        /// Stage, 1 to 4.
        stage: u8,
        /// Its collection, once opened.
        collection: Option<CollectionId>,
    },
    /// Drawing the synthetic corpus.
    Corpus,
    /// Tuning the base on the corpus.
    Pretrain,
    /// Federated rounds.
    Rounds {
        /// Number of the round, from 0.
        index: u32,
        /// Its id, once opened.
        round: Option<RoundId>,
    },
    /// Signing and publishing.
    Publish,
    /// Ended with a published manifest.
    Done {
        /// Its digest.
        manifest: Digest,
    },
    /// Ended without one.
    Abandoned {
        /// Why.
        cause: AbandonReason,
    },
    /// Stopped by an operator.
    Cancelled {
        /// Who, as an identity.
        by: String,
    },
}

/// What a coordinator must do next. Doing it again after a crash is harmless.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Choose the cohort.
    SelectCohort,
    /// Store and record a new collection for a stage.
    OpenStage {
        /// Stage, 1 to 4.
        stage: u8,
    },
    /// Drive a stage's collection to its end.
    RunStage {
        /// Stage, 1 to 4.
        stage: u8,
        /// Its collection.
        collection: CollectionId,
    },
    /// Draw the corpus.
    BuildCorpus,
    /// Tune the base.
    Pretrain,
    /// Store and record a new round.
    OpenRound {
        /// Number of the round, from 0.
        index: u32,
    },
    /// Drive a round to its end.
    RunRound {
        /// Number of the round, from 0.
        index: u32,
        /// Its id.
        round: RoundId,
    },
    /// Sign and publish.
    Publish,
}

impl Action {
    /// The collection that it drives, if it drives one.
    #[must_use]
    pub fn collection(&self) -> Option<CollectionId> {
        match self {
            Self::RunStage { collection: id, .. } | Self::RunRound { round: id, .. } => Some(*id),
            _ => None,
        }
    }
}

/// What a job has produced so far, by digest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Products {
    /// Sums of the release stages done.
    pub sums: Vec<Digest>,
    /// The synthetic corpus.
    pub corpus: Option<Digest>,
    /// Bins, codes and scaling.
    pub preprocessing: Option<Digest>,
    /// The tuned model.
    pub tuned: Option<Digest>,
    /// The adapter after the last published round.
    pub adapter: Option<Digest>,
    /// Rounds published.
    pub rounds_published: u32,
    /// Rounds abandoned.
    pub rounds_abandoned: u32,
}

/// One stored event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRecord {
    /// Position in the list, from 0.
    pub sequence: u32,
    /// When, UTC milliseconds; never before the record in front of it.
    pub at_ms: i64,
    /// What.
    pub event: JobEvent,
}

/// The pipeline of one plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    plan: PlanDigest,
    rounds: u32,
    phase: JobPhase,
    roster: BTreeSet<AgentId>,
    products: Products,
    latest: Option<CollectionId>,
    records: Vec<JobRecord>,
}

impl Job {
    /// An admitted plan.
    #[must_use]
    pub fn new(plan: &Plan, digest: PlanDigest) -> Self {
        Self {
            plan: digest,
            rounds: plan.rounds.count,
            phase: JobPhase::Admitted,
            roster: BTreeSet::new(),
            products: Products::default(),
            latest: None,
            records: Vec::new(),
        }
    }

    /// The job that a list of stored records amounts to.
    ///
    /// # Errors
    /// [`JobError`] for the first record that doesn't fit, which a store that verifies its log never hands out.
    pub fn replay(plan: &Plan, digest: PlanDigest, records: &[JobRecord]) -> Result<Self, JobError> {
        records
            .iter()
            .try_fold(Self::new(plan, digest), |job, record| job.apply(record.event.clone(), record.at_ms))
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> PlanDigest {
        self.plan
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> &JobPhase {
        &self.phase
    }

    /// Who takes part; empty before the cohort is chosen.
    #[must_use]
    pub fn roster(&self) -> &BTreeSet<AgentId> {
        &self.roster
    }

    /// What it has produced.
    #[must_use]
    pub fn products(&self) -> &Products {
        &self.products
    }

    /// All events so far; the last one is what [`Self::apply`] added.
    #[must_use]
    pub fn records(&self) -> &[JobRecord] {
        &self.records
    }

    /// The latest collection or round id, above which the next one must be.
    #[must_use]
    pub fn latest_collection(&self) -> Option<CollectionId> {
        self.latest
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.phase, JobPhase::Done { .. } | JobPhase::Abandoned { .. } | JobPhase::Cancelled { .. })
    }

    /// What to do next; nothing once it has ended.
    #[must_use]
    pub fn next(&self) -> Option<Action> {
        match self.phase {
            JobPhase::Admitted => Some(Action::SelectCohort),
            JobPhase::Release { stage, collection: None } => Some(Action::OpenStage { stage }),
            JobPhase::Release { stage, collection: Some(collection) } => {
                Some(Action::RunStage { stage, collection })
            }
            JobPhase::Corpus => Some(Action::BuildCorpus),
            JobPhase::Pretrain => Some(Action::Pretrain),
            JobPhase::Rounds { index, round: None } => Some(Action::OpenRound { index }),
            JobPhase::Rounds { index, round: Some(round) } => Some(Action::RunRound { index, round }),
            JobPhase::Publish => Some(Action::Publish),
            JobPhase::Done { .. } | JobPhase::Abandoned { .. } | JobPhase::Cancelled { .. } => None,
        }
    }

    /// The job after one more event, at `at_ms` (UTC milliseconds; an earlier time than the last record's counts
    /// as that one). To be stored before it is acted on.
    ///
    /// # Errors
    /// [`JobError`] if the event doesn't fit; the job stays as it is.
    pub fn apply(&self, event: JobEvent, at_ms: i64) -> Result<Self, JobError> {
        if self.records.len() >= MAX_RECORDS {
            return Err(JobError::TooManyEvents);
        }
        let mut next = self.clone();
        next.phase = next.moved(&event)?;
        let at_ms = self.records.last().map_or(at_ms, |record| record.at_ms.max(at_ms));
        let sequence = u32::try_from(self.records.len()).unwrap_or(u32::MAX);
        next.records.push(JobRecord { sequence, at_ms, event });
        Ok(next)
    }

    /// The phase after an event, with products and ids recorded.
    fn moved(&mut self, event: &JobEvent) -> Result<JobPhase, JobError> {
        use JobPhase as P;
        if self.is_over() {
            return Err(self.out_of_place(event));
        }
        let phase = match (&self.phase, event) {
            (_, JobEvent::Failed { what }) => {
                P::Abandoned { cause: AbandonReason::Failed { what: what.clone() } }
            }
            (_, JobEvent::Cancelled { by }) => P::Cancelled { by: by.clone() },
            (P::Admitted, JobEvent::Started { roster }) => {
                if roster.is_empty() {
                    return Err(JobError::NoCohort);
                }
                self.roster.clone_from(roster);
                P::Release { stage: 1, collection: None }
            }
            (P::Release { stage, collection: None }, JobEvent::StageOpened { stage: opened, collection })
                if stage == opened =>
            {
                let stage = *stage;
                self.record_id(*collection)?;
                P::Release { stage, collection: Some(*collection) }
            }
            (P::Release { stage, collection: Some(_) }, JobEvent::StageReleased { stage: done, sum })
                if stage == done =>
            {
                self.products.sums.push(*sum);
                if usize::from(*stage) < STAGES {
                    P::Release { stage: stage + 1, collection: None }
                } else {
                    P::Corpus
                }
            }
            (P::Release { stage, collection: Some(_) }, JobEvent::StageAbandoned { stage: ended, cause })
                if stage == ended =>
            {
                P::Abandoned { cause: cause.clone() }
            }
            (P::Corpus, JobEvent::CorpusReady { corpus, preprocessing }) => {
                self.products.corpus = Some(*corpus);
                self.products.preprocessing = Some(*preprocessing);
                P::Pretrain
            }
            (P::Pretrain, JobEvent::Pretrained { tuned }) => {
                self.products.tuned = Some(*tuned);
                self.round_or_publish(0)
            }
            (P::Rounds { index, round: None }, JobEvent::RoundOpened { index: opened, round })
                if index == opened =>
            {
                let index = *index;
                self.record_id(*round)?;
                P::Rounds { index, round: Some(*round) }
            }
            (P::Rounds { index, round: Some(_) }, JobEvent::RoundPublished { index: done, adapter })
                if index == done =>
            {
                self.products.adapter = Some(*adapter);
                self.products.rounds_published += 1;
                self.round_or_publish(index + 1)
            }
            (P::Rounds { index, round: Some(_) }, JobEvent::RoundAbandoned { index: ended, .. })
                if index == ended =>
            {
                self.products.rounds_abandoned += 1;
                self.round_or_publish(index + 1)
            }
            (P::Publish, JobEvent::Published { manifest }) => P::Done { manifest: *manifest },
            _ => return Err(self.out_of_place(event)),
        };
        Ok(phase)
    }

    fn round_or_publish(&self, index: u32) -> JobPhase {
        if index < self.rounds { JobPhase::Rounds { index, round: None } } else { JobPhase::Publish }
    }

    fn record_id(&mut self, got: CollectionId) -> Result<(), JobError> {
        match self.latest {
            Some(latest) if got <= latest => Err(JobError::NotMonotone { latest, got }),
            _ => {
                self.latest = Some(got);
                Ok(())
            }
        }
    }

    fn out_of_place(&self, event: &JobEvent) -> JobError {
        JobError::OutOfPlace { event: event.name(), phase: self.phase.to_string() }
    }
}

impl JobEvent {
    /// Name of the event, for refusals and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Started { .. } => "started",
            Self::StageOpened { .. } => "stage_opened",
            Self::StageReleased { .. } => "stage_released",
            Self::StageAbandoned { .. } => "stage_abandoned",
            Self::CorpusReady { .. } => "corpus_ready",
            Self::Pretrained { .. } => "pretrained",
            Self::RoundOpened { .. } => "round_opened",
            Self::RoundPublished { .. } => "round_published",
            Self::RoundAbandoned { .. } => "round_abandoned",
            Self::Published { .. } => "published",
            Self::Failed { .. } => "failed",
            Self::Cancelled { .. } => "cancelled",
        }
    }
}

impl std::fmt::Display for JobPhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Admitted => f.write_str("admitted"),
            Self::Release { stage, .. } => write!(f, "release stage {stage}"),
            Self::Corpus => f.write_str("corpus"),
            Self::Pretrain => f.write_str("pretrain"),
            Self::Rounds { index, .. } => write!(f, "round {index}"),
            Self::Publish => f.write_str("publish"),
            Self::Done { .. } => f.write_str("done"),
            Self::Abandoned { cause } => write!(f, "abandoned ({cause})"),
            Self::Cancelled { by } => write!(f, "cancelled by {by}"),
        }
    }
}

/// Most events of one job: four per stage and three per round at the most rounds, with room.
pub const MAX_RECORDS: usize = 1024;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    fn plan(rounds: u32) -> (Plan, PlanDigest) {
        let text = format!("kind: TabmeshPlan\nname: t\ntarget: a.b\nrounds: {{count: {rounds}}}\n");
        Plan::parse(text.as_bytes(), "t.yaml").unwrap()
    }

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    /// What a well-behaved coordinator reports for an action; `fails` decides over rounds.
    fn report(job: &Job, action: Action, fails: bool, rng: &mut ChaCha20Rng) -> JobEvent {
        let lost = AbandonReason::QuorumNotReached { expected: 2, got: 1 };
        let id = |rng: &mut ChaCha20Rng| CollectionId::new(1_000, rng, job.latest_collection());
        match action {
            Action::SelectCohort => JobEvent::Started { roster: [AgentId::new("a").unwrap()].into() },
            Action::OpenStage { stage } => JobEvent::StageOpened { stage, collection: id(rng) },
            Action::RunStage { stage, .. } => JobEvent::StageReleased { stage, sum: digest("sum") },
            Action::BuildCorpus => {
                JobEvent::CorpusReady { corpus: digest("corpus"), preprocessing: digest("bins") }
            }
            Action::Pretrain => JobEvent::Pretrained { tuned: digest("tuned") },
            Action::OpenRound { index } => JobEvent::RoundOpened { index, round: id(rng) },
            Action::RunRound { index, .. } if fails => JobEvent::RoundAbandoned { index, cause: lost },
            Action::RunRound { index, .. } => JobEvent::RoundPublished { index, adapter: digest("adapter") },
            Action::Publish => JobEvent::Published { manifest: digest("manifest") },
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn a_job_restarted_after_every_event_runs_the_same_course(
            rounds in 1_u32..6, fails in prop::collection::vec(any::<bool>(), 6), seed in any::<u64>(),
        ) {
            let (plan, digest) = plan(rounds);
            let mut rng = ChaCha20Rng::seed_from_u64(seed);
            let mut job = Job::new(&plan, digest);
            let mut steps = 0_i64;
            while let Some(action) = job.next() {
                let index = match action { Action::RunRound { index, .. } => index as usize, _ => 0 };
                let event = report(&job, action, fails[index], &mut rng);
                // Time runs backwards here; records must not.
                job = job.apply(event, 10_000 - steps).unwrap();
                let stored = serde_json::to_vec(&job).unwrap();
                let restored: Job = serde_json::from_slice(&stored).unwrap();
                prop_assert_eq!(&restored, &job);
                prop_assert_eq!(&Job::replay(&plan, digest, job.records()).unwrap(), &job);
                job = restored;
                steps += 1;
            }
            prop_assert_eq!(steps, 1 + 2 * 4 + 2 + 2 * i64::from(rounds) + 1);
            let failed = fails.iter().take(rounds as usize).filter(|f| **f).count() as u32;
            prop_assert_eq!(job.products().rounds_abandoned, failed);
            prop_assert_eq!(job.products().rounds_published, rounds - failed);
            let done = matches!(job.phase(), JobPhase::Done { .. });
            prop_assert!(done);
            let in_order = job.records().windows(2).all(|w| w[0].at_ms <= w[1].at_ms && w[0].sequence + 1 == w[1].sequence);
            prop_assert!(in_order);
        }
    }

    /// Jobs in every phase, by walking one through.
    fn course() -> Vec<Job> {
        let (plan, digest) = plan(2);
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        let mut jobs = vec![Job::new(&plan, digest)];
        while let Some(action) = jobs.last().unwrap().next() {
            let job = jobs.last().unwrap();
            let event = report(job, action, false, &mut rng);
            jobs.push(job.apply(event, 5).unwrap());
        }
        jobs
    }

    #[test]
    fn every_event_fits_exactly_its_own_phase() {
        let jobs = course();
        let events: Vec<JobEvent> = jobs.last().unwrap().records().iter().map(|r| r.event.clone()).collect();
        for (at, job) in jobs.iter().enumerate() {
            for (position, event) in events.iter().enumerate() {
                let result = job.apply(event.clone(), 5);
                assert_eq!(result.is_ok(), at == position, "event {position} on a job with {at} events");
            }
        }
    }

    #[test]
    fn cancel_and_failure_end_a_job_anywhere_and_for_good() {
        for job in course() {
            for event in [JobEvent::Cancelled { by: "op".into() }, JobEvent::Failed { what: "disk".into() }] {
                let over = job.is_over();
                let result = job.apply(event, 9);
                assert_eq!(result.is_ok(), !over);
                if let Ok(ended) = result {
                    assert!(ended.is_over() && ended.next().is_none());
                    assert!(ended.apply(JobEvent::Cancelled { by: "op".into() }, 9).is_err());
                }
            }
        }
    }

    #[test]
    fn an_abandoned_stage_ends_the_job_and_old_ids_are_refused() {
        let jobs = course();
        let cause = AbandonReason::NeverOpened;
        let stage_two =
            jobs.iter().find(|j| matches!(j.next(), Some(Action::RunStage { stage: 2, .. }))).unwrap();
        let ended = stage_two.apply(JobEvent::StageAbandoned { stage: 2, cause: cause.clone() }, 9).unwrap();
        assert_eq!(ended.phase(), &JobPhase::Abandoned { cause });

        let unopened =
            jobs.iter().find(|j| matches!(j.next(), Some(Action::OpenStage { stage: 2 }))).unwrap();
        let latest = unopened.latest_collection().unwrap();
        let again = unopened.apply(JobEvent::StageOpened { stage: 2, collection: latest }, 9);
        assert_eq!(again, Err(JobError::NotMonotone { latest, got: latest }));
        let empty = jobs[0].apply(JobEvent::Started { roster: BTreeSet::new() }, 9);
        assert_eq!(empty, Err(JobError::NoCohort));
    }
}
