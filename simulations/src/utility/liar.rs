//! An agent that keeps to the protocol and lies in rounds: what a robust rule is there for.
//!
//! It admits its contract, states its ledger and answers plans, stages and closings with the product's own code. In a round
//! it takes its honest sum, makes a lie of it, and noises and debits the lie as an update, so that nothing but its values
//! tells it from an honest one. It chooses and serves nothing. Only this harness has it: no binary of the product does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tabmesh_agent::Agent;
use tabmesh_agent::gate::Gate;
use tabmesh_agent::train::Trainer;
use tabmesh_agent::work::{Answer, Work};
use tabmesh_federation::descriptor::RoundDescriptor;
use tabmesh_federation::documents::{self, MAX_DOCUMENT_BYTES, PlanAnnouncement};
use tabmesh_federation::id::Digest;
use tabmesh_federation::phase::collect::Quorum;
use tabmesh_federation::plan::Plan;
use tabmesh_privacy::ledger::Purpose;
use tabmesh_privacy::mechanism::{DiscreteGaussian, EventShape};
use tabmesh_proto::client::{MeshClient, SessionSender};
use tabmesh_proto::connect::{CoordinatorAddress, connect};
use tabmesh_proto::message::{
    AgentFrame, Assignment, AssignmentKind, ChainedEntry, ContractRegistration, CoordinatorFrame,
    DocumentAnswer, LedgerStatement, SubmissionTarget,
};
use tabmesh_proto::tls::ClientTls;
use tokio::sync::Barrier;

use super::wire::Pipes;
use crate::scenario::document::Attack;
use crate::scenario::rounds::against;

/// What the liars of one federation know of each other.
pub(super) struct Collusion {
    attack: Attack,
    all_in: Barrier,
    /// Honest sums of all liars, by round.
    honest: Mutex<BTreeMap<u32, Vec<Vec<i64>>>>,
}

impl Collusion {
    /// Among so many liars.
    pub(super) fn new(attack: Attack, liars: usize) -> Arc<Self> {
        Arc::new(Self { attack, all_in: Barrier::new(liars.max(1)), honest: Mutex::default() })
    }
}

/// One liar.
pub(super) struct Liar {
    pub(super) work: Arc<Work>,
    pub(super) address: CoordinatorAddress,
    pub(super) tls: ClientTls,
    pub(super) dial: Pipes,
    pub(super) clock: tabmesh_agent::serve::Clock,
    pub(super) collusion: Arc<Collusion>,
}

/// The plan that an assignment announced.
struct Known {
    plan: Plan,
    announcement: PlanAnnouncement,
    trainer: Option<Arc<Trainer>>,
}

impl Liar {
    /// From an agent that has been opened and won't run.
    pub(super) fn new(
        agent: &Agent,
        address: CoordinatorAddress,
        tls: ClientTls,
        dial: Pipes,
        clock: tabmesh_agent::serve::Clock,
        collusion: Arc<Collusion>,
    ) -> Self {
        Self { work: Arc::clone(&agent.work), address, tls, dial, clock, collusion }
    }

    /// One session, until the coordinator ends it.
    ///
    /// # Errors
    /// The link fails, or the product's code refuses an answer.
    pub(super) async fn run(self) -> Result<()> {
        let client = MeshClient::new(connect(&self.address, &self.tls, self.dial.clone()).await?);
        let domain = &self.work.domain;
        let (contract, product) = (domain.contract_bytes.clone(), domain.contract.name.clone());
        let registration = ContractRegistration::sign(contract, product, &domain.identity, &domain.key)?;
        let admission = client.register_contract(registration).await?;
        anyhow::ensure!(admission.admitted, "a liar's contract isn't admitted: {:?}", admission.refusals);
        self.mirror(&client).await?;
        let session = client.session(env!("CARGO_PKG_VERSION")).await?;
        let (sender, mut frames) = session.split();
        let alive = {
            let sender = sender.clone();
            async move { sender.keep_alive().await }
        };
        let heard = async {
            let mut known = None;
            while let Some(frame) = frames.next().await? {
                match frame {
                    CoordinatorFrame::Assignment(assignment) => {
                        self.answer(&client, &sender, assignment, &mut known).await?;
                    }
                    CoordinatorFrame::HeartbeatAck => {}
                    CoordinatorFrame::Goodbye(_) => return Ok(()),
                }
            }
            Ok(())
        };
        tokio::select! {
            ended = heard => ended,
            () = alive => bail!("a liar's session ended"),
        }
    }

    async fn mirror(&self, client: &MeshClient) -> Result<()> {
        let domain = &self.work.domain;
        let statement = {
            let books = self.work.books();
            let chained = |entry: &tabmesh_privacy::ledger::ChainedEntry| ChainedEntry {
                seq: entry.seq,
                prev: entry.prev,
                payload: entry.payload.clone(),
            };
            let entries = books.entries().iter().map(chained).collect();
            LedgerStatement::sign(books.product().to_owned(), entries, &domain.identity, &domain.key)?
        };
        client.mirror_ledger(statement).await?;
        Ok(())
    }

    async fn answer(
        &self,
        client: &MeshClient,
        sender: &SessionSender,
        assignment: Assignment,
        known: &mut Option<Known>,
    ) -> Result<()> {
        let now_ms = (self.clock)();
        let (kind, assignment_id) = (assignment.kind(), assignment.id().clone());
        let assignment = Arc::new(assignment);
        match kind {
            AssignmentKind::Plan => {
                let announcement: PlanAnnouncement =
                    documents::read("plan announcement", assignment.document(), MAX_DOCUMENT_BYTES)?;
                let (plan, _) = Plan::parse(announcement.plan.as_bytes(), "announced plan")?;
                if let Err(rule) = self.work.plan(&assignment, now_ms)? {
                    bail!("a liar's ledger refuses the plan: {}", rule.label());
                }
                *known = Some(Known { plan, announcement, trainer: None });
                self.mirror(client).await?;
                sender.send(AgentFrame::ArtefactReceived { assignment_id }).await?;
            }
            AssignmentKind::ReleaseQuery => {
                let work = Arc::clone(&self.work);
                let released =
                    tokio::task::spawn_blocking(move || work.release(&assignment, now_ms)).await??;
                let Answer { target, payload, debit } = released;
                client.submit_release(&target, &payload, &debit).await?;
            }
            AssignmentKind::Round => {
                let known = known.as_mut().context("a round before its plan")?;
                let Answer { target, payload, debit } = self.lie(client, &assignment, known).await?;
                client.submit_update(&target, &payload, &debit).await?;
            }
            AssignmentKind::Witness => {
                let document = self.work.witness(&assignment, now_ms)?;
                client.answer_witness(DocumentAnswer::new(assignment_id, document)).await?;
            }
            AssignmentKind::Publish => {
                self.work.artefacts.take(client, assignment.document()).await?;
                sender.send(AgentFrame::ArtefactReceived { assignment_id }).await?;
            }
            AssignmentKind::ClosePlan => {
                self.work.close(&assignment, now_ms)?;
                self.mirror(client).await?;
                sender.send(AgentFrame::ArtefactReceived { assignment_id }).await?;
            }
            AssignmentKind::SecureSum => bail!("liars speak up in rounds with local noise"),
        }
        Ok(())
    }

    /// A round's update that isn't the honest one.
    async fn lie(
        &self,
        client: &MeshClient,
        assignment: &Arc<Assignment>,
        known: &mut Known,
    ) -> Result<Answer> {
        let descriptor = RoundDescriptor::from_bytes(assignment.document())?;
        for digest in self.work.round_needs(assignment)? {
            self.work.artefacts.fetch(client, &digest).await?;
        }
        let trainer = match &known.trainer {
            Some(trainer) => Arc::clone(trainer),
            None => {
                let (work, descriptor, plan) =
                    (Arc::clone(&self.work), descriptor.clone(), known.plan.clone());
                let schema = known.announcement.schema.clone();
                let made = tokio::task::spawn_blocking(move || -> Result<Trainer> {
                    let rows = work.domain.rows(&schema)?;
                    let training = rows.take(&Gate::new(&work.domain.secret("gate")).split(&rows).training);
                    let coding = work.coding(&descriptor.plan);
                    Ok(Trainer::new(&work.artefacts, &descriptor, &plan, &schema, &training, coding)?)
                });
                let made = Arc::new(made.await??);
                known.trainer = Some(Arc::clone(&made));
                made
            }
        };
        let honest = {
            let (descriptor, mut draws) = (descriptor.clone(), self.work.books().draws()?);
            tokio::task::spawn_blocking(move || trainer.clipped_sum(&descriptor, &mut draws)).await??
        };
        let lie = match self.collusion.attack {
            Attack::SignFlip => honest.iter().map(|v| v.saturating_neg()).collect(),
            // The cast saturates: a liar may say anything.
            Attack::Scaling { factor } => honest.iter().map(|v| (*v as f64 * factor) as i64).collect(),
            Attack::CollusionWithinBound => {
                let index = descriptor.index;
                let sums = || self.collusion.honest.lock().unwrap_or_else(PoisonError::into_inner);
                sums().entry(index).or_default().push(honest);
                tokio::time::timeout(PARTNERS, self.collusion.all_in.wait())
                    .await
                    .context("another of the colluding agents has gone")?;
                // In one order, whoever came first.
                let mut all = sums().get(&index).cloned().unwrap_or_default();
                all.sort_unstable();
                let digest = Digest::of(assignment.document());
                let mut limits = descriptor.announcement(digest, Quorum::Everyone, &known.plan)?.limits;
                // Its noise comes on top and mustn't take it beyond what a screen lets through.
                let sigma = descriptor.sigma_squared.as_f64().sqrt();
                let room = |limit: u64, noise: f64| (limit as f64 - noise).max(0.0) as u64;
                limits.max_abs = room(limits.max_abs, ROOM * sigma);
                limits.max_norm = room(limits.max_norm, sigma * ((limits.len as f64).sqrt() + ROOM));
                against(&all.iter().collect::<Vec<_>>(), limits)
            }
        };
        let mechanism =
            DiscreteGaussian::from_rho(descriptor.sensitivity * descriptor.sensitivity, descriptor.rho)?;
        let question = tabmesh_agent::books::Question {
            plan: &known.announcement.digest.to_string(),
            purpose: Purpose::Round,
            step: u64::from(descriptor.index),
            digest: *assignment.digest(),
            mechanism: &mechanism,
            shape: EventShape {
                rows_per_unit: self.work.domain.max_rows(),
                marginals: 0,
                dimension: u32::try_from(descriptor.len())?,
            },
        };
        let (payload, debit) = self.work.books().answer(&question, &lie, (self.clock)())?;
        let target = SubmissionTarget {
            assignment_id: assignment.id().clone(),
            plan_digest: *known.announcement.digest.0.as_bytes(),
            stage_or_round: descriptor.index,
            attempt: descriptor.attempt,
        };
        Ok(Answer { target, payload, debit })
    }
}

/// How long a colluding agent waits for the others.
const PARTNERS: Duration = Duration::from_secs(120);
/// Standard deviations of noise that a lie leaves room for.
const ROOM: f64 = 8.0;
