//! The four stages of a release: each asks for noisy counts that the earlier released ones determine.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::descriptor::stage_announcement;
use tabmesh_federation::id::CollectionId;
use tabmesh_federation::job::{Job, JobEvent};
use tabmesh_federation::phase::abandon::AbandonReason;
use tabmesh_federation::phase::collect::{Collection, CollectionState};
use tabmesh_federation::plan::LabelMarginals;
use tabmesh_federation::release_plan::{Attributes, Release, shared_max_rows};
use tabmesh_federation::schedule::Window;
use tabmesh_federation::secagg::document;
use tabmesh_federation::secagg::setup::Subject;
use tabmesh_privacy::ledger::Purpose;
use tabmesh_privacy::mechanism::SigmaSquared;
use tabmesh_privacy::release::{Attribute, MarginalTable, ReleaseQuery};
use tabmesh_proto::message::AssignmentKind;
use tabmesh_store::Digest;
use tabmesh_synthesis::selection;
use tabmesh_synthesis::tree::{TreeStructure, Width};

use super::{collection_id, contracts, quorum, schema_of, secure, spiffe_ids};
use crate::collections::Open;
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, named, stored};
use crate::plans::Submitted;
use crate::sums::SumEnd;

/// A stage's result: what was asked, and the sum over the agents.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StageSum {
    pub(super) query: ReleaseQuery,
    pub(super) agents: usize,
    pub(super) sum: Vec<i64>,
    /// Noisy total of each agent, from the label counts of stage 1; none from a secure sum.
    pub(super) totals: BTreeMap<String, f64>,
    /// Each agent's own noised counts, where the plan draws a corpus with a domain column.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) by_agent: BTreeMap<String, Vec<i64>>,
    /// Variance of each agent's noise, where it is a share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) share: Option<SigmaSquared>,
}

impl StageSum {
    pub(super) fn tables(&self) -> Result<Vec<MarginalTable>, CoordinatorError> {
        let tables = match self.share {
            None => self.query.tables(&self.sum, self.agents),
            Some(share) => self.query.tables_of(&self.sum, share.as_f64() * self.agents as f64),
        };
        tables.map_err(|error| CoordinatorError::Step(error.to_string()))
    }
}

/// What the released stages amount to so far.
pub(super) struct Released {
    pub(super) schema: FeatureSchema,
    pub(super) stages: Vec<StageSum>,
    pub(super) max_rows_per_unit: u32,
    agents: usize,
}

impl Released {
    pub(super) fn load(mesh: &Mesh, submitted: &Submitted, job: &Job) -> Result<Self, CoordinatorError> {
        let schema = schema_of(mesh, &submitted.plan, job.roster())?;
        let sums = &job.products().sums;
        let load = |digest: &tabmesh_federation::id::Digest| mesh.get_json(stored(*digest), "stage sum");
        let stages = sums.iter().map(load).collect::<Result<_, _>>()?;
        let rows = contracts(mesh, job.roster())?;
        let rows =
            rows.into_iter().map(|(id, admitted)| (id, admitted.contract.privacy.unit.max_rows())).collect();
        Ok(Self { schema, stages, max_rows_per_unit: shared_max_rows(&rows)?, agents: job.roster().len() })
    }

    pub(super) fn plan<'a>(&'a self, submitted: &'a Submitted) -> Result<Release<'a>, CoordinatorError> {
        Ok(Release {
            schema: &self.schema,
            plan: &submitted.plan,
            digest: submitted.digest,
            budget: submitted.plan.budget()?,
            max_rows_per_unit: self.max_rows_per_unit,
            agents: self.agents,
        })
    }

    pub(super) fn stage(&self, number: usize) -> Result<&StageSum, CoordinatorError> {
        let missing = || CoordinatorError::NotFound { what: "release stage", id: number.to_string() };
        self.stages.get(number.wrapping_sub(1)).ok_or_else(missing)
    }

    pub(super) fn finals(&self, submitted: &Submitted) -> Result<Attributes, CoordinatorError> {
        Ok(self.plan(submitted)?.final_attributes(&self.stage(1)?.tables()?)?)
    }

    /// The tree chosen on stage 3, as wide as the plan wants it; the label's place is after the features.
    pub(super) fn tree(&self, submitted: &Submitted) -> Result<TreeStructure, CoordinatorError> {
        let first = self.stage(1)?;
        let fine = first.tables()?;
        // Stage 1 counted fine cells; stage 3 counts coarse ones of the same attributes.
        let coarse = self.plan(submitted)?.coarse_attributes(&fine)?;
        let coarse: Vec<Attribute> =
            self.schema.features().iter().filter_map(|feature| coarse.get(&feature.id).cloned()).collect();
        let width = Width::of(submitted.plan.release.parents as usize);
        let (asked, pairs) = (&first.query.attributes, self.stage(3)?.tables()?);
        Ok(selection::structure(&fine, asked, &coarse, &pairs, (&self.final_cells()?, width))?)
    }

    /// Final numbers of cells of the attributes, the label's last.
    fn final_cells(&self) -> Result<Vec<usize>, CoordinatorError> {
        Ok(self.stage(2)?.query.attributes.iter().map(Attribute::cells).collect())
    }

    /// What the last stage asks for: the tree's marginals over the final bins.
    fn last(&self, submitted: &Submitted) -> Result<ReleaseQuery, CoordinatorError> {
        let plan = self.plan(submitted)?;
        let finals = self.finals(submitted)?;
        let second = self.stage(2)?;
        let counted = second.tables()?;
        // A cell's variance is the squared sensitivity over ρ, times what depends on who adds the noise alone; each marginal
        // adds the same to the squared sensitivity.
        let variance = counted.first().map_or(0.0, |table| table.variance);
        let rho = plan.budget.per_stage.last().map_or(0.0, |rho| rho.as_f64());
        let variance_each = variance * second.query.rho.as_f64() / (counted.len() as f64 * rho);
        let (tree, cells) = (self.tree(submitted)?, self.final_cells()?);
        let with_label = match submitted.plan.release.label_marginals {
            LabelMarginals::All => vec![true; tree.label()],
            LabelMarginals::Signal => selection::informative(&counted, tree.label())?,
        };
        let wanted = (cells.as_slice(), with_label.as_slice());
        let marginals = selection::marginals(&tree, wanted, self.total()?.0, variance_each);
        Ok(plan.stage_four(&finals, marginals)?)
    }

    /// Noisy number of units over the cohort and its standard deviation, from the label counts of stage 1.
    pub(super) fn total(&self) -> Result<(f64, f64), CoordinatorError> {
        let label = self.schema.features().len();
        let tables = self.stage(1)?.tables()?;
        let table = tables.iter().find(|t| t.attributes == [label]);
        let table = table.ok_or_else(|| CoordinatorError::Step("stage 1 has no label counts".to_owned()))?;
        Ok((table.total(), (table.variance * table.values.len() as f64).sqrt()))
    }
}

/// Stores a new collection for a stage.
pub(super) fn open(
    mesh: &Arc<Mesh>,
    submitted: &Submitted,
    job: &Job,
    stage: u8,
) -> Result<JobEvent, CoordinatorError> {
    let plan = &submitted.plan;
    let query = query(mesh, submitted, job, stage)?;
    let collection = collection_id(mesh, job.latest_collection());
    if let Some(spec) = plan.secure_sum() {
        let json = query.to_json();
        let payload = tabmesh_federation::id::Digest::of(&json);
        let subject = Subject::stage(&query, payload, collection, submitted.digest, plan.release.deadline_s);
        let text = String::from_utf8(json).map_err(|error| CoordinatorError::Step(error.to_string()))?;
        let summed = document::Summed::Stage(text);
        secure::open(mesh, spec, &subject, summed, job.roster(), mesh.now_ms(), Vec::new())?;
        return Ok(JobEvent::StageOpened { stage, collection });
    }
    let window = Window::new(mesh.now_ms(), plan.release.deadline_s, plan.release.grace_s)
        .map_err(|error| CoordinatorError::Step(error.to_string()))?;
    let roster = job.roster().clone();
    let announcement =
        stage_announcement(&query, collection, roster, quorum(mesh, plan), window, MAX_PLAUSIBLE_UNITS)?;
    mesh.collections.open(collection, Open::Stage(Box::new(Collection::new(announcement))), Vec::new())?;
    Ok(JobEvent::StageOpened { stage, collection })
}

/// Announces a stage, waits for the agents, stores the sum.
pub(super) async fn run(
    mesh: &Arc<Mesh>,
    submitted: &Submitted,
    job: &Job,
    stage: u8,
    collection: CollectionId,
) -> Result<JobEvent, CoordinatorError> {
    let query = query(mesh, submitted, job, stage)?;
    if submitted.plan.secure_sum().is_some() {
        let (json, deadline_s) = (query.to_json(), submitted.plan.release.deadline_s);
        let payload = tabmesh_federation::id::Digest::of(&json);
        let subject = Subject::stage(&query, payload, collection, submitted.digest, deadline_s);
        let what = format!("release stage {stage}");
        return match secure::run(mesh, submitted, &subject, (Purpose::Release, &what)).await? {
            SumEnd::Summed(summed) => {
                let (agents, share) = (summed.survivors.len(), Some(summed.share));
                let (sum, totals, by_agent) = (summed.values, BTreeMap::new(), BTreeMap::new());
                let digest = mesh.put_json(&StageSum { query, agents, sum, totals, by_agent, share })?;
                Ok(JobEvent::StageReleased { stage, sum: named(digest) })
            }
            SumEnd::Abandoned(cause) => Ok(JobEvent::StageAbandoned { stage, cause }),
        };
    }
    mesh.collections.resume(collection)?;
    let peers = spiffe_ids(job.roster())?;
    let id = collection.to_string().parse()?;
    mesh.outbox.assign(&peers, &id, AssignmentKind::ReleaseQuery, &query.to_json())?;
    let settled = mesh.collections.settled(collection).await?;
    mesh.outbox.withdraw(&peers, &id)?;
    mesh.collections.close(collection);
    let Open::Stage(settled) = settled else {
        return Err(CoordinatorError::NotFound { what: "release stage", id: id.to_string() });
    };
    match settled.state() {
        CollectionState::Complete { .. } => {
            let sum = settled.sum().map_err(|error| CoordinatorError::Step(error.to_string()))?;
            let totals = totals(&query, &settled)?;
            let agents = settled.receipts().len();
            let own = settled.values().iter().filter(|_| submitted.plan.release.domain_column);
            let by_agent = own.map(|(agent, values)| (agent.to_string(), values.to_vec())).collect();
            let stage_sum = StageSum { query, agents, sum, totals, by_agent, share: None };
            let digest: Digest = mesh.put_json(&stage_sum)?;
            Ok(JobEvent::StageReleased { stage, sum: named(digest) })
        }
        CollectionState::Abandoned { cause, .. } => {
            Ok(JobEvent::StageAbandoned { stage, cause: cause.clone() })
        }
        CollectionState::Collecting => {
            let cause = AbandonReason::Failed { what: "the collection ended while collecting".to_owned() };
            Ok(JobEvent::StageAbandoned { stage, cause })
        }
    }
}

/// Noisy totals by agent, from the 1-way label counts where the stage has them.
fn totals(query: &ReleaseQuery, collection: &Collection) -> Result<BTreeMap<String, f64>, CoordinatorError> {
    let label = query.attributes.iter().position(Attribute::is_label);
    let mut totals = BTreeMap::new();
    for (agent, values) in collection.values() {
        let tables = query.tables(values, 1).map_err(|error| CoordinatorError::Step(error.to_string()))?;
        if let Some(table) = tables.iter().find(|t| label.is_some_and(|l| t.attributes == [l])) {
            totals.insert(agent.to_string(), table.total());
        }
    }
    Ok(totals)
}

/// The stage's query, from the plan, the shared schema and earlier sums alone.
fn query(mesh: &Mesh, submitted: &Submitted, job: &Job, stage: u8) -> Result<ReleaseQuery, CoordinatorError> {
    let released = Released::load(mesh, submitted, job)?;
    let plan = released.plan(submitted)?;
    Ok(match stage {
        1 => plan.stage_one()?,
        2 => plan.stage_two(&released.finals(submitted)?)?,
        3 => plan.stage_three(&plan.coarse_attributes(&released.stage(1)?.tables()?)?)?,
        _ => released.last(submitted)?,
    })
}

/// Units one agent may hold at most before a total is known: only absurd vectors are screened out in stage 1.
const MAX_PLAUSIBLE_UNITS: u64 = 1 << 32;
