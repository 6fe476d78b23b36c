//! What an agent answers: plans, release stages, rounds, publications, closings.
//!
//! Each answer follows from the assignment, the domain's own files and the ledger. After admission an agent always answers
//! a stage or round with a vector of the size asked for, whatever its rows are: no rows, one class or a missing
//! feature give noise on zeros. What it can't do (a damaged ledger, a lost payload) fails locally.

mod sums;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tabmesh_contract::contract::default_row_namespace;
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::descriptor::{DescriptorError, RoundDescriptor};
use tabmesh_federation::documents::{self, DocumentError, MAX_DOCUMENT_BYTES, PlanAnnouncement, PlanClosing};
use tabmesh_federation::id::PlanDigest;
use tabmesh_federation::plan::{Plan, PlanError};
use tabmesh_federation::release_plan::{QueryRefusal, check_query};
use tabmesh_federation::witness::WitnessRequest;
use tabmesh_forest::ForestError;
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::ledger::{DebitReceipt, LedgerError, Purpose, RefusalRule};
use tabmesh_privacy::mechanism::{DiscreteGaussian, EventShape, MechanismError};
use tabmesh_privacy::private::Private;
use tabmesh_privacy::release::{QueryError, ReleaseQuery};
use tabmesh_proto::message::{Assignment, SubmissionTarget};
use tabmesh_tfm::error::TfmError;
use tabmesh_tfm::table::Coding;
use thiserror::Error;

use crate::books::{Books, BooksError, Question};
use crate::domain::Domain;
use crate::gate::Gate;
use crate::lineage::{LineageError, Lineages};
use crate::publication::{ArtefactError, Artefacts};
use crate::source::{MarginalError, SourceError};
use crate::sums::{SumError, SumStore};
use crate::train::Trainer;
use crate::trees::TreeError;
use crate::witness::{Witness, WitnessError};

pub use sums::SumReply;

/// Why an assignment isn't answered. Stays in the domain.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WorkError {
    /// The document isn't what its kind says.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The plan that it belongs to was never taken on.
    #[error("plan {plan} was not taken on by this agent")]
    UnknownPlan {
        /// Its digest.
        plan: String,
    },
    /// The stored plan can't be read.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The query differs from what contract and plan allow.
    #[error("release query refused: {0}")]
    Query(#[from] QueryRefusal),
    /// The query isn't one.
    #[error("release query refused: {0}")]
    Malformed(#[from] QueryError),
    /// The descriptor differs from what the plan allows.
    #[error("round descriptor refused: {0}")]
    Descriptor(#[from] DescriptorError),
    /// The plan has secure sums, and the assignment asks for a vector without a mask.
    #[error("the plan has secure sums: a vector without a mask is not sent")]
    NeedsSum,
    /// A step of a secure sum isn't answered.
    #[error(transparent)]
    Sum(#[from] SumError),
    /// This agent isn't in the roster, or the roster isn't one of the plan's.
    #[error("this agent is not in the roster, or the roster is not one that the plan allows")]
    NotInRoster,
    /// The cost buys no usable noise.
    #[error(transparent)]
    Mechanism(#[from] MechanismError),
    /// The ledger refuses or is damaged.
    #[error(transparent)]
    Books(#[from] BooksError),
    /// It can't be told which source is counted.
    #[error(transparent)]
    Lineage(#[from] LineageError),
    /// The table can't be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Counting fails.
    #[error(transparent)]
    Count(#[from] MarginalError),
    /// An artefact is missing or refused.
    #[error(transparent)]
    Artefact(#[from] ArtefactError),
    /// The coordinator's audit log isn't confirmed.
    #[error(transparent)]
    Witness(#[from] WitnessError),
    /// The model refuses.
    #[error(transparent)]
    Model(#[from] TfmError),
    /// The rounds' forest refuses.
    #[error(transparent)]
    Forest(#[from] ForestError),
    /// Trees refuse.
    #[error(transparent)]
    Trees(#[from] TreeError),
    /// Neither the domain nor the corpus has a row to put into a context.
    #[error("there is no labelled row for a context, neither in the domain nor in the corpus")]
    NoContext,
    /// A blend with a forest over a publication that has none.
    #[error("the publication has no forest, and what was promoted names one; run the agent to choose anew")]
    NoForest,
    /// Nothing is in service yet.
    #[error("no model has been promoted yet; run the agent until the coordinator has published")]
    NotPromoted,
    /// The work ended early: a bug, since work doesn't panic on outside data.
    #[error("the work ended early: {reason}")]
    Interrupted {
        /// What the runtime said.
        reason: String,
    },
    /// A file of the agent can't be written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// An answer that may be sent.
pub struct Answer {
    /// What it answers.
    pub target: SubmissionTarget,
    /// The noised bytes.
    pub payload: Private<Vec<u8>>,
    /// Proof of the debit.
    pub debit: DebitReceipt,
}

/// Records the grant of the local policy for the physical source of the rows.
pub(crate) fn record_grant(domain: &Domain, books: &mut Books, now_ms: i64) -> Result<(), WorkError> {
    let derived_from = domain.policy.grant.derived_from.as_deref();
    let mut request = domain.grant();
    request.lineage = Lineages::open(&domain.config.data_dir)?.named(&request.lineage, domain.places())?;
    // Rows without a declared namespace are those of their source, whatever product they were first counted for.
    if request.entity_namespace == default_row_namespace(&domain.contract.name)
        && let Some(known) = books.row_namespace(&request.lineage)
    {
        request.entity_namespace = known.to_owned();
    }
    books.grant(request, domain.pace(), derived_from, now_ms)?;
    Ok(())
}

/// The agent's state for answering.
pub struct Work {
    /// The domain's facts.
    pub domain: Arc<Domain>,
    /// Published and fetched artefacts.
    pub artefacts: Arc<Artefacts>,
    books: Mutex<Books>,
    gate: Gate,
    trainer: Mutex<Option<Trainer>>,
    sums: Mutex<SumStore>,
    witness: Witness,
}

impl Work {
    /// Ready to answer, with the local policy's grant recorded.
    ///
    /// # Errors
    /// [`WorkError::Books`] if the ledger doesn't verify: then nothing may be released.
    pub fn new(
        domain: Arc<Domain>,
        artefacts: Arc<Artefacts>,
        mut books: Books,
        now_ms: i64,
    ) -> Result<Self, WorkError> {
        record_grant(&domain, &mut books, now_ms)?;
        let gate = Gate::new(&domain.secret("gate"));
        let data_dir = &domain.config.data_dir;
        let guard = domain.config.sum_guard.clone().unwrap_or_else(|| data_dir.join("sum.guard"));
        let sums = Mutex::new(SumStore::new(data_dir.join("sums"), guard));
        let coordinator = domain.config.coordinator.spiffe_id.to_string();
        let witness = Witness::new(
            data_dir,
            (&coordinator, &domain.coordinator_key),
            (&domain.identity.to_string(), &domain.key),
        )?;
        let (books, trainer) = (Mutex::new(books), Mutex::new(None));
        Ok(Self { domain, artefacts, books, gate, trainer, sums, witness })
    }

    /// The books.
    pub fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a checkpoint of the coordinator's audit log and cosigns it; the answer is a document.
    ///
    /// # Errors
    /// [`WorkError::Witness`] if the log was rolled back or rewritten or leaves this agent's ledger out.
    pub fn witness(&self, assignment: &Assignment, now_ms: i64) -> Result<Vec<u8>, WorkError> {
        let request: WitnessRequest =
            documents::read("witness request", assignment.document(), MAX_DOCUMENT_BYTES)?;
        let books = self.books();
        let now_s = u64::try_from(now_ms / 1000).unwrap_or_default();
        let reply = self.witness.judge(&request, books.product(), books.entries(), now_s)?;
        serde_json::to_vec(&reply).map_err(|error| WorkError::Interrupted { reason: error.to_string() })
    }

    /// Takes a plan on by reserving its budget, or says which rule refuses it.
    ///
    /// # Errors
    /// [`WorkError`] if the document can't be read or the ledger fails. A refusal isn't an error.
    pub fn plan(&self, assignment: &Assignment, now_ms: i64) -> Result<Result<(), RefusalRule>, WorkError> {
        let announcement: PlanAnnouncement =
            documents::read("plan announcement", assignment.document(), MAX_DOCUMENT_BYTES)?;
        let digest = announcement.digest.to_string();
        let mut books = self.books();
        let plan = match self.domain.judge(&announcement, books.balance().as_ref()) {
            Ok(plan) => plan,
            Err((rule, reason)) => {
                tracing::warn!(plan = %digest, rule = rule.label(), %reason, "plan refused");
                books.refuse(&digest, rule, Rho::ZERO, now_ms)?;
                return Ok(Err(rule));
            }
        };
        let budget = plan.budget()?;
        self.keep(&announcement)?;
        for (purpose, rho) in [(Purpose::Release, budget.release), (Purpose::Round, budget.rounds)] {
            match books.reserve(&digest, purpose, rho, announcement.approvals.clone(), now_ms) {
                Ok(_) => {}
                Err(BooksError::Ledger(LedgerError::OverBudget { asked, left })) => {
                    tracing::warn!(plan = %digest, %asked, %left, "plan refused: over budget");
                    books.close(&digest, now_ms)?;
                    return Ok(Err(RefusalRule::OverBudget));
                }
                Err(BooksError::Ledger(LedgerError::OverWindow { asked, left, length_ms })) => {
                    tracing::warn!(plan = %digest, %asked, %left, length_ms, "plan refused: over the budget window");
                    books.close(&digest, now_ms)?;
                    return Ok(Err(RefusalRule::OverWindow));
                }
                Err(error) => return Err(error.into()),
            }
        }
        tracing::info!(plan = %digest, "plan taken on, its budget is reserved");
        Ok(Ok(()))
    }

    /// Answers one stage of a release.
    ///
    /// # Errors
    /// [`WorkError`]; nothing may be sent then.
    pub fn release(&self, assignment: &Assignment, now_ms: i64) -> Result<Answer, WorkError> {
        let query = ReleaseQuery::from_json(assignment.document())?;
        let (plan, announcement) = self.kept(&query.plan_digest)?;
        let target = SubmissionTarget {
            assignment_id: assignment.id().clone(),
            plan_digest: *announcement.digest.0.as_bytes(),
            stage_or_round: u32::from(query.stage),
            attempt: 1,
        };
        if let Some((payload, debit)) = self.books().answered(assignment.digest())? {
            return Ok(Answer { target, payload, debit });
        }
        let (schema, rows) = (&self.domain.schema, self.domain.max_rows());
        check_query(&query, schema, rows, &plan, &announcement.digest, announcement.cohort as usize)?;
        only_local(&plan)?;
        let counts = self.count(&query, &announcement.schema)?;
        let mechanism = query.mechanism()?;
        let question = Question {
            plan: &query.plan_digest,
            purpose: Purpose::Release,
            step: u64::from(query.stage),
            digest: *assignment.digest(),
            mechanism: &mechanism,
            shape: query.event_shape(),
        };
        let (payload, debit) = self.books().answer(&question, &counts, now_ms)?;
        Ok(Answer { target, payload, debit })
    }

    /// Counts the query's cells over the training rows.
    fn count(&self, query: &ReleaseQuery, shared: &FeatureSchema) -> Result<Vec<i64>, WorkError> {
        Ok(self.domain.marginals(shared, query, &self.gate)?)
    }

    /// Whether every artefact that a round needs is here; those that aren't.
    ///
    /// # Errors
    /// [`WorkError::Descriptor`] if the document isn't a descriptor.
    pub fn round_needs(
        &self,
        assignment: &Assignment,
    ) -> Result<Vec<tabmesh_federation::id::Digest>, WorkError> {
        let descriptor = RoundDescriptor::from_bytes(assignment.document())?;
        let needed = [descriptor.base, descriptor.context, descriptor.preprocessing];
        Ok(needed.into_iter().filter(|digest| !self.artefacts.has(digest)).collect())
    }

    /// Answers one round. The artefacts it needs must have been fetched.
    ///
    /// # Errors
    /// [`WorkError`]; nothing may be sent then.
    pub fn round(&self, assignment: &Assignment, now_ms: i64) -> Result<Answer, WorkError> {
        let descriptor = RoundDescriptor::from_bytes(assignment.document())?;
        let (plan, announcement) = self.kept(&descriptor.plan.to_string())?;
        let target = SubmissionTarget {
            assignment_id: assignment.id().clone(),
            plan_digest: *announcement.digest.0.as_bytes(),
            stage_or_round: descriptor.index,
            attempt: descriptor.attempt,
        };
        if let Some((payload, debit)) = self.books().answered(assignment.digest())? {
            return Ok(Answer { target, payload, debit });
        }
        descriptor.check(&plan, &announcement.digest)?;
        only_local(&plan)?;
        let own = self.domain.identity.to_string();
        if !descriptor.roster.iter().any(|agent| agent.as_str() == own) {
            return Err(WorkError::NotInRoster);
        }
        let sum = self.train(&descriptor, &plan, &announcement)?;
        let mechanism =
            DiscreteGaussian::from_rho(descriptor.sensitivity * descriptor.sensitivity, descriptor.rho)?;
        let dimension = u32::try_from(descriptor.len()).unwrap_or(u32::MAX);
        let shape = EventShape { rows_per_unit: self.domain.max_rows(), marginals: 0, dimension };
        let question = Question {
            plan: &announcement.digest.to_string(),
            purpose: Purpose::Round,
            step: u64::from(descriptor.index),
            digest: *assignment.digest(),
            mechanism: &mechanism,
            shape,
        };
        let (payload, debit) = self.books().answer(&question, &sum, now_ms)?;
        Ok(Answer { target, payload, debit })
    }

    /// The clipped integer sum of this domain's gradients.
    fn train(
        &self,
        descriptor: &RoundDescriptor,
        plan: &Plan,
        announcement: &PlanAnnouncement,
    ) -> Result<Vec<i64>, WorkError> {
        let (coding, mut draws) = (self.coding(&announcement.digest), self.books().draws()?);
        let mut held = self.trainer.lock().unwrap_or_else(PoisonError::into_inner);
        let trainer = match held.take().filter(|trainer| trainer.fits(descriptor)) {
            Some(trainer) => trainer,
            None => {
                let rows = self.domain.rows(&announcement.schema)?;
                let training = rows.take(&self.gate.split(&rows).training);
                Trainer::new(&self.artefacts, descriptor, plan, &announcement.schema, &training, coding)?
            }
        };
        let sum = trainer.clipped_sum(descriptor, &mut draws)?;
        *held = Some(trainer);
        Ok(sum)
    }

    /// How training rows are coded in a plan's rounds: without their own label if the plan's release counted it.
    pub fn coding(&self, plan: &PlanDigest) -> Coding {
        if self.books().in_release(&plan.to_string()) { Coding::OwnRow } else { Coding::Foreign }
    }

    /// Ends a plan: refunds what it didn't use.
    ///
    /// # Errors
    /// [`WorkError`] if the document can't be read or the refund can't be recorded.
    pub fn close(&self, assignment: &Assignment, now_ms: i64) -> Result<(), WorkError> {
        let closing: PlanClosing =
            documents::read("plan closing", assignment.document(), MAX_DOCUMENT_BYTES)?;
        self.books().close(&closing.plan.to_string(), now_ms)?;
        *self.trainer.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    /// Keeps an announcement for the stages and rounds to come, over restarts.
    fn keep(&self, announcement: &PlanAnnouncement) -> Result<(), WorkError> {
        let path = self.plan_path(&announcement.digest.to_string());
        let failed = |source| WorkError::File { path: path.clone(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let bytes = serde_json::to_vec(announcement).map_err(|error| DocumentError::Malformed {
            what: "plan announcement",
            reason: error.to_string(),
        })?;
        crate::files::replace(&path, &bytes).map_err(failed)
    }

    fn kept(&self, digest: &str) -> Result<(Plan, PlanAnnouncement), WorkError> {
        // The digest names a file: only hexadecimal digits may get that far.
        if digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(WorkError::UnknownPlan { plan: digest.chars().take(80).collect() });
        }
        let Ok(bytes) = std::fs::read(self.plan_path(digest)) else {
            return Err(WorkError::UnknownPlan { plan: digest.to_owned() });
        };
        let announcement: PlanAnnouncement =
            documents::read("plan announcement", &bytes, MAX_DOCUMENT_BYTES)?;
        let (plan, _) = Plan::parse(announcement.plan.as_bytes(), "stored plan")?;
        Ok((plan, announcement))
    }

    fn plan_path(&self, digest: &str) -> PathBuf {
        self.domain.config.data_dir.join("plans").join(format!("{digest}.json"))
    }
}

/// A plan with secure sums is answered step by step, never by a vector without a mask: its noise is a share.
fn only_local(plan: &Plan) -> Result<(), WorkError> {
    match plan.secure_sum() {
        None => Ok(()),
        Some(_) => Err(WorkError::NeedsSum),
    }
}
