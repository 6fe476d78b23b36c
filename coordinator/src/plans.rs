//! Plans and their jobs: the stored events of each, the progress people watch, and which one runs.
//!
//! A job's events are records of their own, appended before anything acts on them; the state is their replay. Progress
//! lines are for people and live in memory: after a restart they are told anew from the events.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use tabmesh_federation::id::{Digest as NamedDigest, PlanDigest};
use tabmesh_federation::job::{Job, JobEvent, JobPhase, JobRecord};
use tabmesh_federation::plan::Plan;
use tabmesh_proto::message::{Id, PlanEvent, PlanSummary};
use tabmesh_store::{BlobStore, Digest, Records};
use tokio::sync::watch;

use crate::error::CoordinatorError;
use crate::mesh::{locked, stored};

/// A plan with its bytes.
#[derive(Debug, Clone)]
pub(crate) struct Submitted {
    pub(crate) plan: Plan,
    pub(crate) digest: PlanDigest,
    pub(crate) yaml: Vec<u8>,
    pub(crate) by: String,
    pub(crate) created_ms: i64,
}

#[derive(Serialize, Deserialize)]
struct StoredPlan {
    yaml: Digest,
    by: String,
    created_ms: i64,
}

/// All plans the coordinator knows.
pub(crate) struct Plans {
    records: Arc<dyn Records>,
    blobs: Arc<BlobStore>,
    entries: Mutex<BTreeMap<PlanDigest, Entry>>,
}

struct Entry {
    submitted: Arc<Submitted>,
    job: Job,
    events: Vec<PlanEvent>,
    news: watch::Sender<u64>,
}

impl Plans {
    /// Reads every stored plan and replays its job.
    ///
    /// # Errors
    /// [`CoordinatorError`] if a record is damaged or doesn't replay.
    pub(crate) fn load(records: Arc<dyn Records>, blobs: Arc<BlobStore>) -> Result<Self, CoordinatorError> {
        let plans = Self { records, blobs, entries: Mutex::new(BTreeMap::new()) };
        for (_, value) in plans.records.scan_all(b"plan/")? {
            let stored: StoredPlan =
                serde_json::from_slice(&value).map_err(CoordinatorError::stored("plan"))?;
            let yaml = plans.blobs.get(&stored.yaml)?;
            let (plan, digest) = Plan::parse(&yaml, "stored plan")?;
            let records = plans.stored_events(digest)?;
            let job = Job::replay(&plan, digest, &records)?;
            let submitted = Submitted { plan, digest, yaml, by: stored.by, created_ms: stored.created_ms };
            let mut entry = Entry::new(submitted, job);
            for record in &records {
                entry.tell(record.at_ms, describe(&record.event));
            }
            locked(&plans.entries).insert(digest, entry);
        }
        Ok(plans)
    }

    /// Stores a new plan; submitting the same bytes again gives the plan that is there.
    ///
    /// # Errors
    /// [`CoordinatorError::Running`] if another plan hasn't ended, [`CoordinatorError::Store`] if it can't be stored.
    pub(crate) fn submit(&self, submitted: Submitted) -> Result<(Id, bool), CoordinatorError> {
        let digest = submitted.digest;
        let mut entries = locked(&self.entries);
        if entries.contains_key(&digest) {
            return Ok((plan_id(digest)?, false));
        }
        if let Some(running) = entries.values().find(|entry| !entry.job.is_over()) {
            return Err(CoordinatorError::Running { running: running.submitted.digest.to_string() });
        }
        let yaml = self.blobs.put(&submitted.yaml)?;
        let record = StoredPlan { yaml, by: submitted.by.clone(), created_ms: submitted.created_ms };
        let value = serde_json::to_vec(&record).map_err(CoordinatorError::stored("plan"))?;
        self.records.put(format!("plan/{digest}").as_bytes(), &value)?;
        let job = Job::new(&submitted.plan, digest);
        let at_ms = submitted.created_ms;
        let mut entry = Entry::new(submitted, job);
        entry.tell(at_ms, "plan admitted".to_owned());
        entries.insert(digest, entry);
        Ok((plan_id(digest)?, true))
    }

    /// The plan and its job.
    pub(crate) fn get(&self, digest: PlanDigest) -> Option<(Arc<Submitted>, Job)> {
        locked(&self.entries).get(&digest).map(|entry| (Arc::clone(&entry.submitted), entry.job.clone()))
    }

    /// Plans that ended with a publication, and their manifests.
    pub(crate) fn published(&self) -> Vec<(PlanDigest, NamedDigest)> {
        let manifest = |(digest, entry): (&PlanDigest, &Entry)| match entry.job.phase() {
            JobPhase::Done { manifest } => Some((*digest, *manifest)),
            _ => None,
        };
        locked(&self.entries).iter().filter_map(manifest).collect()
    }

    /// Digests of plans that haven't ended.
    pub(crate) fn unfinished(&self) -> Vec<PlanDigest> {
        locked(&self.entries).iter().filter(|(_, e)| !e.job.is_over()).map(|(digest, _)| *digest).collect()
    }

    /// Number of plans.
    pub(crate) fn count(&self) -> usize {
        locked(&self.entries).len()
    }

    /// Records an event: durable when it returns.
    ///
    /// # Errors
    /// [`CoordinatorError::Job`] if it doesn't fit, [`CoordinatorError::Store`] if it can't be stored.
    pub(crate) fn apply(
        &self,
        digest: PlanDigest,
        event: JobEvent,
        now_ms: i64,
    ) -> Result<Job, CoordinatorError> {
        let mut entries = locked(&self.entries);
        let entry = entries.get_mut(&digest).ok_or_else(|| not_found(digest))?;
        let next = entry.job.apply(event, now_ms)?;
        let Some(record) = next.records().last() else { return Ok(next) };
        let value = serde_json::to_vec(record).map_err(CoordinatorError::stored("job event"))?;
        let key = format!("job/{digest}/{:08}", record.sequence);
        self.records.put(key.as_bytes(), &value)?;
        let text = describe(&record.event);
        let at_ms = record.at_ms;
        entry.job = next.clone();
        entry.tell(at_ms, text);
        Ok(next)
    }

    /// Adds a line to a plan's progress.
    pub(crate) fn tell(&self, digest: PlanDigest, now_ms: i64, text: impl Into<String>) {
        if let Some(entry) = locked(&self.entries).get_mut(&digest) {
            entry.tell(now_ms, text.into());
        }
    }

    /// Progress lines after a number, and a receiver that changes when there are more.
    pub(crate) fn watch(
        &self,
        digest: PlanDigest,
        after: u64,
    ) -> Option<(Vec<PlanEvent>, watch::Receiver<u64>, bool)> {
        let entries = locked(&self.entries);
        let entry = entries.get(&digest)?;
        let events = entry.events.iter().filter(|event| event.seq > after).cloned().collect();
        Some((events, entry.news.subscribe(), entry.job.is_over()))
    }

    /// A plan's state for people.
    pub(crate) fn summary(&self, digest: PlanDigest) -> Option<PlanSummary> {
        let entries = locked(&self.entries);
        entries.get(&digest).and_then(Entry::summary)
    }

    /// All plans' states, oldest first.
    pub(crate) fn summaries(&self) -> Vec<PlanSummary> {
        let mut all: Vec<PlanSummary> = locked(&self.entries).values().filter_map(Entry::summary).collect();
        all.sort_by_key(|summary| summary.created_ms);
        all
    }

    fn stored_events(&self, digest: PlanDigest) -> Result<Vec<JobRecord>, CoordinatorError> {
        let found = self.records.scan_all(format!("job/{digest}/").as_bytes())?;
        let parse = |(_, value): &(Vec<u8>, Vec<u8>)| {
            serde_json::from_slice(value).map_err(CoordinatorError::stored("job event"))
        };
        found.iter().map(parse).collect()
    }
}

impl Entry {
    fn new(submitted: Submitted, job: Job) -> Self {
        Self { submitted: Arc::new(submitted), job, events: Vec::new(), news: watch::Sender::new(0) }
    }

    fn tell(&mut self, time_ms: i64, detail: String) {
        let seq = self.events.last().map_or(1, |event| event.seq + 1);
        let phase = self.job.phase().to_string();
        self.events.push(PlanEvent {
            seq,
            time_ms,
            phase,
            detail,
            progress: progress(&self.job, &self.submitted.plan),
        });
        self.news.send_replace(seq);
    }

    fn summary(&self) -> Option<PlanSummary> {
        let updated_ms = self.events.last().map_or(self.submitted.created_ms, |event| event.time_ms);
        Some(PlanSummary {
            plan_id: plan_id(self.submitted.digest).ok()?,
            name: self.submitted.plan.name.clone(),
            phase: self.job.phase().to_string(),
            progress: progress(&self.job, &self.submitted.plan),
            created_ms: self.submitted.created_ms,
            updated_ms,
            document: serde_json::to_vec(&self.job).unwrap_or_default(),
        })
    }
}

/// The identifier of a plan: its digest.
pub(crate) fn plan_id(digest: PlanDigest) -> Result<Id, CoordinatorError> {
    Ok(digest.to_string().parse()?)
}

/// The digest a plan's identifier stands for.
pub(crate) fn plan_digest(id: &Id) -> Option<PlanDigest> {
    id.as_str().parse().ok().map(PlanDigest)
}

fn not_found(digest: PlanDigest) -> CoordinatorError {
    CoordinatorError::NotFound { what: "plan", id: digest.to_string() }
}

/// Fraction of a job that is done: the release counts a third, tuning a third, the rounds a third.
fn progress(job: &Job, plan: &Plan) -> f64 {
    match job.phase() {
        JobPhase::Admitted => 0.0,
        JobPhase::Release { stage, .. } => f64::from(stage.saturating_sub(1)) / 12.0,
        JobPhase::Corpus | JobPhase::Pretrain => 1.0 / 3.0,
        JobPhase::Rounds { index, .. } => {
            2.0 / 3.0 + f64::from(*index) / f64::from(plan.rounds.count.max(1)) / 3.0
        }
        JobPhase::Publish => 0.99,
        JobPhase::Done { .. } | JobPhase::Abandoned { .. } | JobPhase::Cancelled { .. } => 1.0,
    }
}

fn describe(event: &JobEvent) -> String {
    match event {
        JobEvent::Started { roster } => format!("cohort of {} agents", roster.len()),
        JobEvent::StageOpened { stage, .. } => format!("release stage {stage} asked"),
        JobEvent::StageReleased { stage, .. } => format!("release stage {stage} summed"),
        JobEvent::StageAbandoned { stage, cause } => format!("release stage {stage} abandoned: {cause}"),
        JobEvent::CorpusReady { corpus, .. } => format!("corpus {:.12} drawn", stored(*corpus).to_string()),
        JobEvent::Pretrained { tuned } => format!("model {:.12} tuned", stored(*tuned).to_string()),
        JobEvent::RoundOpened { index, .. } => format!("round {} asked", index + 1),
        JobEvent::RoundPublished { index, .. } => format!("round {} published", index + 1),
        JobEvent::RoundAbandoned { index, cause } => format!("round {} abandoned: {cause}", index + 1),
        JobEvent::Published { manifest } => format!("manifest {:.12} signed", stored(*manifest).to_string()),
        JobEvent::Failed { what } => format!("failed: {what}"),
        JobEvent::Cancelled { by } => format!("cancelled by {by}"),
        other => other.name().to_owned(),
    }
}
