//! What operators ask: plans and agents.

use std::sync::Arc;

use tabmesh_contract::policy::{Aggregation, DecisionKind, Request};
use tabmesh_federation::id::PlanDigest;
use tabmesh_federation::plan::{Plan, PlanError};
use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::{AgentSummary, Id, PlanEvent, PlanFinding, PlanSummary, PlanValidation};
use tabmesh_proto::server::{Answer, BoxStream, OperatorService};
use tabmesh_proto::status::WireError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::refused;
use crate::error::CoordinatorError;
use crate::mesh::Mesh;
use crate::pipeline;
use crate::plans::{Submitted, plan_digest};
use crate::report::{PLAN_REFUSED, PlanRefusal};

/// The operators' side of a [`Mesh`].
pub(crate) struct OperatorCalls(pub(crate) Arc<Mesh>);

impl OperatorService for OperatorCalls {
    async fn submit_plan(&self, peer: SpiffeId, yaml: Vec<u8>) -> Answer<PlanSummary> {
        let mesh = Arc::clone(&self.0);
        let (plan, digest) = Plan::parse(&yaml, "plan.yaml").map_err(|e| refused(&peer, "plan")(e.into()))?;
        judge(&mesh, &plan, Some(&digest)).map_err(refused(&peer, "plan"))?;
        let by = peer.to_string();
        let submitted = Submitted { plan, digest, yaml, by: by.clone(), created_ms: mesh.now_ms() };
        let (id, new) = mesh.plans.submit(submitted).map_err(refused(&peer, "plan"))?;
        if new {
            let facts = serde_json::json!({ "plan": id.as_str() });
            mesh.audit(&by, "submit_plan", facts).map_err(refused(&peer, "audit"))?;
            tokio::spawn(pipeline::drive(Arc::clone(&mesh), digest));
        }
        mesh.plans.summary(digest).ok_or(WireError::Internal)
    }

    async fn validate_plan(&self, peer: SpiffeId, yaml: Vec<u8>) -> Answer<PlanValidation> {
        let finding = |path: &str, text: String| PlanFinding { path: path.to_owned(), text };
        let findings = match Plan::parse(&yaml, "plan.yaml") {
            Ok((plan, _)) => match judge(&self.0, &plan, None) {
                Ok(()) => Vec::new(),
                Err(error) => vec![finding("", error.to_string())],
            },
            Err(PlanError::Faulty(faults)) => faults
                .list()
                .iter()
                .map(|fault| finding(&fault.path, format!("line {}: {}", fault.line, fault.message)))
                .collect(),
            Err(error) => vec![finding("", error.to_string())],
        };
        tracing::info!(%peer, findings = findings.len(), "plan validated");
        Ok(PlanValidation { valid: findings.is_empty(), findings })
    }

    async fn plan_status(&self, _peer: SpiffeId, plan_id: Id) -> Answer<PlanSummary> {
        plan_digest(&plan_id).and_then(|digest| self.0.plans.summary(digest)).ok_or(WireError::NotFound)
    }

    async fn watch_plan(
        &self,
        _peer: SpiffeId,
        plan_id: Id,
        after_seq: u64,
    ) -> Answer<BoxStream<Answer<PlanEvent>>> {
        let digest = plan_digest(&plan_id).ok_or(WireError::NotFound)?;
        self.0.plans.summary(digest).ok_or(WireError::NotFound)?;
        let (sender, receiver) = mpsc::channel(EVENTS_IN_FLIGHT);
        let mesh = Arc::clone(&self.0);
        tokio::spawn(async move {
            let mut after = after_seq;
            while let Some((events, mut news, over)) = mesh.plans.watch(digest, after) {
                for event in events {
                    after = event.seq;
                    if sender.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
                if over {
                    return;
                }
                let more = news.wait_for(|latest| *latest > after);
                tokio::select! {
                    changed = more => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    async fn cancel_plan(&self, peer: SpiffeId, plan_id: Id) -> Answer<PlanSummary> {
        let digest = plan_digest(&plan_id).ok_or(WireError::NotFound)?;
        let mesh = &self.0;
        let summary = mesh.plans.summary(digest).ok_or(WireError::NotFound)?;
        if !mesh.plans.unfinished().contains(&digest) {
            return Ok(summary);
        }
        let by = peer.to_string();
        pipeline::cancel(mesh, digest, &by).map_err(refused(&peer, "cancel"))?;
        mesh.audit(&by, "cancel_plan", plan_id.as_str()).map_err(refused(&peer, "audit"))?;
        mesh.plans.summary(digest).ok_or(WireError::Internal)
    }

    async fn list_agents(&self, _peer: SpiffeId) -> Answer<Vec<AgentSummary>> {
        let summary = |(agent, admitted): (SpiffeId, Arc<crate::catalog::Admitted>)| {
            let facts = self.0.outbox.facts(&agent);
            AgentSummary {
                spiffe_id: agent,
                connected: facts.connected,
                product_version: facts.product_version,
                last_seen_ms: facts.last_seen_ms,
                products: vec![admitted.contract.name.clone()],
            }
        };
        Ok(self.0.catalog.all().into_iter().map(summary).collect())
    }

    async fn list_plans(&self, _peer: SpiffeId) -> Answer<Vec<PlanSummary>> {
        let mut all = self.0.plans.summaries();
        all.reverse();
        Ok(all)
    }
}

/// Holds a plan against the base, and asks policy about it for each product that would take part. What policy refuses of a plan
/// that was handed in, by its digest, goes into the audit log and from there into reports.
fn judge(mesh: &Mesh, plan: &Plan, handed_in: Option<&PlanDigest>) -> Result<(), CoordinatorError> {
    pipeline::rounds::check_adapter(mesh, plan.rounds.adapter)?;
    let members = pipeline::candidates(mesh, plan);
    let cohort = u32::try_from(members.len()).unwrap_or(u32::MAX);
    for (agent, admitted) in members {
        for (kind, purpose) in [
            (DecisionKind::Release, tabmesh_contract::contract::Purpose::CentralAggregate),
            (DecisionKind::Training, tabmesh_contract::contract::Purpose::FederatedAdapter),
        ] {
            let request = Request {
                purpose,
                epsilon: plan.privacy.epsilon,
                delta: plan.privacy.delta,
                cohort,
                aggregation: match plan.secure_sum() {
                    None => Aggregation::LocalNoise,
                    Some(_) => Aggregation::SecureAggregation,
                },
            };
            let decision = mesh.policy.decide_contract(kind, &admitted.contract, Some(&request));
            if !decision.allow {
                let rules: Vec<String> = decision.rules.iter().map(|rule| rule.as_str().to_owned()).collect();
                let product = admitted.contract.name.clone();
                let named = format!("{} ({product})", rules.join(", "));
                if let Some(digest) = handed_in {
                    let plan_digest = digest.to_string();
                    let facts = PlanRefusal { plan_digest, product, rules, decision: decision.log_entry() };
                    mesh.audit(&agent.to_string(), PLAN_REFUSED, facts)?;
                }
                let rules = named;
                return Err(CoordinatorError::Policy { what: "plan", rules });
            }
        }
    }
    Ok(())
}

/// Progress lines that may wait for one watcher.
const EVENTS_IN_FLIGHT: usize = 64;
