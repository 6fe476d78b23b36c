//! The link to the coordinator: connect, register, hear assignments, answer them at schedule slots, reconnect.
//!
//! The agent opens every connection. Assignments are answered one after another in the order they come, each answer is sent
//! at the next multiple of the send slot after its assignment arrived, so that small differences in work don't show.
//! A connection that breaks is opened again after a jittered, growing pause; what was not answered comes again.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::OsRng;
use rand::{Rng, TryRngCore};
use tabmesh_privacy::ledger::{ChainedEntry as Entry, RefusalRule};
use tabmesh_proto::client::{ClientError, MeshClient, SessionSender};
use tabmesh_proto::connect::{CoordinatorAddress, Dial, connect};
use tabmesh_proto::message::{
    AgentFrame, Assignment, AssignmentKind, AssignmentRefusal, ChainedEntry, ContractRegistration,
    CoordinatorFrame, DocumentAnswer, LedgerStatement,
};
use tabmesh_proto::status::WireError;
use tabmesh_proto::tls::ClientTls;
use thiserror::Error;
use tokio::time::Instant;

use crate::alerts::{Alerts, Webhook};
use crate::publication::ArtefactError;
use crate::serve::Clock;
use crate::serving::Serving;
use crate::work::{Answer, SumReply, Work, WorkError};

/// Why a session ends.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The connection or a call fails.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The connection can't be opened.
    #[error(transparent)]
    Connect(#[from] tabmesh_proto::connect::ConnectError),
    /// The coordinator doesn't admit the contract.
    #[error("the coordinator does not admit the contract: {codes}")]
    NotAdmitted {
        /// The codes given.
        codes: String,
    },
    /// An assignment isn't signed by the pinned coordinator.
    #[error("assignment {id} is not signed by the pinned coordinator key")]
    NotSigned {
        /// Its id.
        id: String,
    },
    /// A message can't be built.
    #[error(transparent)]
    Message(#[from] tabmesh_proto::convert::ConvertError),
    /// The work itself fails; it stays unanswered.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// An artefact can't be fetched or is refused.
    #[error(transparent)]
    Artefact(#[from] ArtefactError),
}

/// One agent's link.
pub struct Link<D> {
    /// Where the coordinator is and who it must be.
    pub address: CoordinatorAddress,
    /// The agent's TLS identity.
    pub tls: ClientTls,
    /// How connections are opened.
    pub dial: D,
    /// What answers.
    pub work: Arc<Work>,
    /// What is served.
    pub serving: Arc<Serving>,
    /// What is said of the budget.
    pub alerts: Arc<Alerts>,
    /// Where that goes besides the log.
    pub webhook: Option<Webhook>,
    /// The clock.
    pub clock: Clock,
    /// Answers leave at multiples of this after their assignment arrived.
    pub send_slot: Duration,
}

impl<D: Dial + Clone> Link<D> {
    /// Keeps the link up for as long as the future is polled.
    pub async fn keep(&self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let began = Instant::now();
            match self.once().await {
                Ok(()) => tracing::info!("the coordinator ended the session"),
                Err(error) => tracing::warn!(%error, "the session ended"),
            }
            if began.elapsed() > STEADY_SESSION {
                pause = FIRST_PAUSE;
            }
            let jittered = pause.mul_f64(0.5 + OsRng.unwrap_err().random::<f64>());
            tracing::debug!(pause_ms = jittered.as_millis(), "connecting again after a pause");
            tokio::time::sleep(jittered).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One session, from connecting to its end.
    async fn once(&self) -> Result<(), SessionError> {
        let client = MeshClient::new(connect(&self.address, &self.tls, self.dial.clone()).await?);
        self.register(&client).await?;
        self.mirror(&client).await?;
        self.watch_budget().await;
        let session = client.session(env!("CARGO_PKG_VERSION")).await?;
        tracing::info!(session = %session.welcome().session_id, "connected to the coordinator");
        let (sender, mut frames) = session.split();
        let alive = {
            let sender = sender.clone();
            async move { sender.keep_alive().await }
        };
        let heard = async {
            while let Some(frame) = frames.next().await? {
                self.serving.heard();
                match frame {
                    CoordinatorFrame::Assignment(assignment) => {
                        self.answer(&client, &sender, assignment).await?;
                        self.watch_budget().await;
                    }
                    CoordinatorFrame::HeartbeatAck => {}
                    CoordinatorFrame::Goodbye(reason) => {
                        tracing::info!(?reason, "goodbye from the coordinator");
                        return Ok(());
                    }
                }
            }
            Ok(())
        };
        tokio::select! {
            ended = heard => ended,
            () = alive => Err(ClientError::SessionEnded.into()),
        }
    }

    /// Says what the ledger gives cause to say; a failure here stops nothing else.
    async fn watch_budget(&self) {
        let (work, alerts, now_ms) = (Arc::clone(&self.work), Arc::clone(&self.alerts), (self.clock)());
        let noticed = tokio::task::spawn_blocking(move || {
            let books = work.books();
            // Most assignments change nothing here, and a balance is not for nothing.
            if books.charged().is_none_or(|charged| !alerts.is_news(charged)) {
                return Ok(Vec::new());
            }
            let (balance, window) = (books.balance(), books.standing(now_ms));
            drop(books);
            balance.map_or_else(|| Ok(Vec::new()), |balance| alerts.notice(&balance, window.as_ref(), now_ms))
        });
        let said = match noticed.await {
            Ok(Ok(said)) => said,
            Ok(Err(error)) => {
                tracing::error!(%error, "a budget alert can't be recorded");
                return;
            }
            Err(error) => {
                tracing::error!(%error, "looking at the budget ended early");
                return;
            }
        };
        let Some(webhook) = &self.webhook else { return };
        for alert in said {
            let webhook = webhook.clone();
            tokio::spawn(async move {
                if let Err(error) = webhook.post(&alert).await {
                    tracing::error!(%error, percent = alert.percent, "a budget alert was not taken by the webhook");
                }
            });
        }
    }

    async fn register(&self, client: &MeshClient) -> Result<(), SessionError> {
        let domain = &self.work.domain;
        let (contract, product) = (domain.contract_bytes.clone(), domain.contract.name.clone());
        let registration = ContractRegistration::sign(contract, product, &domain.identity, &domain.key)?;
        let admission = client.register_contract(registration).await?;
        if admission.admitted {
            return Ok(());
        }
        let codes: Vec<String> = admission.refusals.iter().map(|code| format!("{code:?}")).collect();
        Err(SessionError::NotAdmitted { codes: codes.join(", ") })
    }

    /// States the ledger: entries are figures of plans and digests, nothing that depends on rows.
    async fn mirror(&self, client: &MeshClient) -> Result<(), SessionError> {
        let domain = &self.work.domain;
        let mut statements = Vec::new();
        {
            let books = self.work.books();
            for piece in books.entries().chunks(ENTRIES_PER_STATEMENT) {
                let chained =
                    |e: &Entry| ChainedEntry { seq: e.seq, prev: e.prev, payload: e.payload.clone() };
                let entries = piece.iter().map(chained).collect();
                let product = books.product().to_owned();
                statements.push(LedgerStatement::sign(product, entries, &domain.identity, &domain.key)?);
            }
        }
        for statement in statements {
            client.mirror_ledger(statement).await?;
        }
        Ok(())
    }

    async fn answer(
        &self,
        client: &MeshClient,
        sender: &SessionSender,
        assignment: Assignment,
    ) -> Result<(), SessionError> {
        let arrived = Instant::now();
        let domain = &self.work.domain;
        let pinned = domain.coordinator_key.as_bytes();
        if assignment.verify(self.address.coordinator(), pinned).is_err() {
            return Err(SessionError::NotSigned { id: assignment.id().to_string() });
        }
        let kind = assignment.kind();
        tracing::info!(id = %assignment.id(), kind = kind.as_str(), "assignment");
        let assignment = Arc::new(assignment);
        match kind {
            AssignmentKind::Plan => {
                let judged = self.blocking(&assignment, |work, a, now_ms| work.plan(a, now_ms)).await?;
                self.mirror(client).await?;
                self.slot(arrived).await;
                let assignment_id = assignment.id().clone();
                let frame = match judged {
                    Ok(()) => AgentFrame::ArtefactReceived { assignment_id },
                    Err(rule) => AgentFrame::AssignmentRefused { assignment_id, code: code_of(rule) },
                };
                sender.send(frame).await?;
            }
            AssignmentKind::ReleaseQuery => {
                let answer = self.blocking(&assignment, |work, a, now_ms| work.release(a, now_ms)).await;
                let answer = self.or_skip(answer, &assignment)?;
                if let Some(Answer { target, payload, debit }) = answer {
                    self.slot(arrived).await;
                    self.settled(client.submit_release(&target, &payload, &debit).await.map(drop))?;
                }
            }
            AssignmentKind::Round => {
                let needs = self.work.round_needs(&assignment);
                for digest in self.or_skip(needs, &assignment)?.unwrap_or_default() {
                    self.work.artefacts.fetch(client, &digest).await?;
                }
                let answer = self.blocking(&assignment, |work, a, now_ms| work.round(a, now_ms)).await;
                let answer = self.or_skip(answer, &assignment)?;
                if let Some(Answer { target, payload, debit }) = answer {
                    self.slot(arrived).await;
                    self.settled(client.submit_update(&target, &payload, &debit).await.map(drop))?;
                }
            }
            AssignmentKind::SecureSum => {
                let needs = self.work.sum_needs(&assignment);
                for digest in self.or_skip(needs, &assignment)?.unwrap_or_default() {
                    self.work.artefacts.fetch(client, &digest).await?;
                }
                let reply = self.blocking(&assignment, |work, a, now_ms| work.sum(a, now_ms)).await;
                let Some(reply) = self.or_skip(reply, &assignment)? else { return Ok(()) };
                self.slot(arrived).await;
                let assignment_id = assignment.id().clone();
                match reply {
                    SumReply::Document(document) => {
                        let answer = DocumentAnswer::new(assignment_id, document);
                        self.settled(client.answer_sum(answer).await.map(drop))?;
                    }
                    SumReply::Vector(answer) => {
                        let Answer { target, payload, debit } = *answer;
                        self.settled(client.submit_update(&target, &payload, &debit).await.map(drop))?;
                    }
                    SumReply::Received => {
                        sender.send(AgentFrame::ArtefactReceived { assignment_id }).await?;
                    }
                }
            }
            AssignmentKind::Witness => {
                let reply = self.blocking(&assignment, |work, a, now_ms| work.witness(a, now_ms)).await;
                let Some(document) = self.or_skip(reply, &assignment)? else { return Ok(()) };
                self.slot(arrived).await;
                let answer = DocumentAnswer::new(assignment.id().clone(), document);
                self.settled(client.answer_witness(answer).await.map(drop))?;
            }
            AssignmentKind::Publish => {
                self.work.artefacts.take(client, assignment.document()).await?;
                self.slot(arrived).await;
                sender.send(AgentFrame::ArtefactReceived { assignment_id: assignment.id().clone() }).await?;
                // The choice is made after the receipt and beside the session: nothing about it can show.
                let serving = Arc::clone(&self.serving);
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = serving.promote() {
                        tracing::error!(%error, "promotion failed; what was served before is served on");
                    }
                });
            }
            AssignmentKind::ClosePlan => {
                self.blocking(&assignment, |work, a, now_ms| work.close(a, now_ms)).await?;
                self.mirror(client).await?;
                self.slot(arrived).await;
                sender.send(AgentFrame::ArtefactReceived { assignment_id: assignment.id().clone() }).await?;
            }
        }
        Ok(())
    }

    /// Runs work on the blocking pool.
    async fn blocking<T: Send + 'static>(
        &self,
        assignment: &Arc<Assignment>,
        run: impl FnOnce(&Work, &Assignment, i64) -> Result<T, WorkError> + Send + 'static,
    ) -> Result<T, WorkError> {
        let (work, assignment) = (Arc::clone(&self.work), Arc::clone(assignment));
        let now_ms = (self.clock)();
        let joined = tokio::task::spawn_blocking(move || run(&work, &assignment, now_ms)).await;
        joined.unwrap_or_else(|error| Err(WorkError::Interrupted { reason: error.to_string() }))
    }

    /// What can't be answered is logged here, and the session goes on: the deadline decides for the others.
    fn or_skip<T>(
        &self,
        answer: Result<T, WorkError>,
        assignment: &Assignment,
    ) -> Result<Option<T>, SessionError> {
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(error) => {
                tracing::error!(id = %assignment.id(), %error, "the assignment can't be answered");
                Ok(None)
            }
        }
    }

    /// A refusal of a vector is final for it; only a broken connection ends the session.
    fn settled(&self, sent: Result<(), ClientError>) -> Result<(), SessionError> {
        match sent {
            Err(ClientError::Refused(refusal))
                if !refusal.is_retryable() && refusal != WireError::Internal =>
            {
                tracing::warn!(%refusal, "the coordinator did not take the vector");
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// Waits for the next send slot after an arrival.
    async fn slot(&self, arrived: Instant) {
        let slot = self.send_slot.max(Duration::from_millis(1));
        let passed = arrived.elapsed().as_nanos() / slot.as_nanos();
        let slots = u32::try_from(passed).unwrap_or(u32::MAX - 1) + 1;
        tokio::time::sleep_until(arrived + slot * slots).await;
    }
}

fn code_of(rule: RefusalRule) -> AssignmentRefusal {
    match rule {
        RefusalRule::OverBudget | RefusalRule::OverWindow | RefusalRule::NoGrant => AssignmentRefusal::Budget,
        RefusalRule::WrongCost | RefusalRule::SecondOpinion | RefusalRule::ContractMismatch => {
            AssignmentRefusal::Contract
        }
        RefusalRule::Policy => AssignmentRefusal::Policy,
        RefusalRule::CohortTooSmall => AssignmentRefusal::Cohort,
        RefusalRule::AggregatesConfidential => AssignmentRefusal::Confidential,
        RefusalRule::Reproducible => AssignmentRefusal::Reproducible,
    }
}

/// Ledger entries in one statement.
const ENTRIES_PER_STATEMENT: usize = 512;
/// First pause before connecting again.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause before connecting again.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A session of this length resets the pause.
const STEADY_SESSION: Duration = Duration::from_secs(10);
