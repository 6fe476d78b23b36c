//! What an agent holds a release query against: its own contract and the plan, never the coordinator's word.
//!
//! Runs before anything is counted or debited. The query may ask about approved features only, within the
//! declared ranges and levels, at exactly the plan's cost for its stage, with the agent's own bound on rows per
//! unit, and in the shape its stage has. Refusals depend on the query, never on rows.

use std::collections::BTreeSet;

use tabmesh_contract::schema::{FeatureId, FeatureKind, FeatureSchema, NumericDomain, Scale};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::release::{Attribute, Binning, QueryError, ReleaseQuery, fine_edges};
use thiserror::Error;

use crate::id::PlanDigest;
use crate::plan::{Plan, PlanError, STAGES};
use crate::release_plan::usable_rho;

/// Why an agent refuses a query.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum QueryRefusal {
    /// The query breaks a limit of its own vocabulary.
    #[error(transparent)]
    Malformed(#[from] QueryError),
    /// The plan's budget can't be shared out.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The query belongs to another plan.
    #[error("query is for plan {got}, this agent admitted {expected}")]
    Digest {
        /// The admitted plan.
        expected: PlanDigest,
        /// The plan the query names.
        got: String,
    },
    /// There is no such stage.
    #[error("stage must be 1 to {STAGES}, got {got}")]
    Stage {
        /// Stage named.
        got: u8,
    },
    /// The query costs something else than the plan says.
    #[error("stage {stage} costs rho {expected} by the plan, the query asks for {got}")]
    Cost {
        /// The stage.
        stage: u8,
        /// The plan's cost.
        expected: Rho,
        /// The query's cost.
        got: Rho,
    },
    /// The query assumes another bound on rows per unit.
    #[error("this agent's units contribute at most {expected} rows, the query assumes {got}")]
    RowsPerUnit {
        /// The agent's bound.
        expected: u32,
        /// The query's bound.
        got: u32,
    },
    /// The feature isn't approved in this agent's contract.
    #[error("feature {id:?} is not approved by this agent's contract")]
    NotApproved {
        /// Id in the query.
        id: String,
    },
    /// Cells don't follow from this agent's own declaration.
    #[error("cells of {id} differ from the contract: {what}")]
    Cells {
        /// Id in the query.
        id: String,
        /// What differs.
        what: &'static str,
    },
    /// More cells than the stage allows for one feature.
    #[error("stage {stage} allows {limit} cells of {id}, the query has {got}")]
    TooFine {
        /// The stage.
        stage: u8,
        /// Id in the query.
        id: String,
        /// Most cells.
        limit: usize,
        /// Cells asked for.
        got: usize,
    },
    /// A marginal has a shape its stage doesn't ask for.
    #[error("marginal {index} has a shape stage {stage} does not ask for")]
    Shape {
        /// The stage.
        stage: u8,
        /// Position of the marginal.
        index: usize,
    },
}

/// Checks a query against the agent's own schema, its bound `k` on rows per unit, and the admitted plan; `agents` of
/// the cohort divide the noise of a secure sum.
///
/// # Errors
/// The first [`QueryRefusal`] found.
pub fn check_query(
    query: &ReleaseQuery,
    own: &FeatureSchema,
    max_rows_per_unit: u32,
    plan: &Plan,
    digest: &PlanDigest,
    agents: usize,
) -> Result<(), QueryRefusal> {
    query.check()?;
    if query.plan_digest != digest.to_string() {
        return Err(QueryRefusal::Digest { expected: *digest, got: query.plan_digest.clone() });
    }
    let stage = query.stage;
    let budget = plan.budget()?;
    let stages = budget.per_stage;
    let Some(expected) = usize::from(stage).checked_sub(1).and_then(|at| stages.get(at).copied()) else {
        return Err(QueryRefusal::Stage { got: stage });
    };
    let expected = usable_rho(expected, query.l2_sensitivity_squared(), plan.counted(agents));
    if query.rho != expected {
        return Err(QueryRefusal::Cost { stage, expected, got: query.rho });
    }
    if query.max_rows_per_unit != max_rows_per_unit {
        return Err(QueryRefusal::RowsPerUnit { expected: max_rows_per_unit, got: query.max_rows_per_unit });
    }
    for attribute in &query.attributes {
        check_attribute(attribute, own, plan, stage)?;
    }
    check_shapes(query).map_err(|index| QueryRefusal::Shape { stage, index })
}

fn check_attribute(
    attribute: &Attribute,
    own: &FeatureSchema,
    plan: &Plan,
    stage: u8,
) -> Result<(), QueryRefusal> {
    let id = || attribute.id.clone();
    let differs = |what| Err(QueryRefusal::Cells { id: id(), what });
    if attribute.is_label() {
        let classes = own.target().classes.len();
        return match attribute.binning {
            Binning::Levels { levels } if levels as usize == classes => Ok(()),
            _ => differs("number of classes"),
        };
    }
    let feature = FeatureId::new(attribute.id.clone()).ok().and_then(|id| own.position(&id));
    let Some(feature) = feature.and_then(|at| own.features().get(at)) else {
        return Err(QueryRefusal::NotApproved { id: id() });
    };
    match (&feature.kind, &attribute.binning) {
        (FeatureKind::Categorical { levels: own }, Binning::Levels { levels }) => {
            if *levels as usize != own.len() {
                return differs("number of levels");
            }
        }
        (FeatureKind::Numeric(domain), Binning::Edges { lower, upper, log1p, edges }) => {
            if lower.to_bits() != domain.lower.to_bits() || upper.to_bits() != domain.upper.to_bits() {
                return differs("declared range");
            }
            if *log1p != (domain.scale == Scale::Log1p) {
                return differs("scale");
            }
            if let Some(what) = edges_differ(edges, domain, plan, stage) {
                return differs(what);
            }
        }
        _ => return differs("type"),
    }
    if stage == 1 && attribute.merge.is_some() {
        return differs("stage 1 merges no cells");
    }
    let limit = most_cells(&feature.kind, plan, stage);
    let got = attribute.cells();
    if got > limit {
        return Err(QueryRefusal::TooFine { stage, id: id(), limit, got });
    }
    Ok(())
}

/// Declared cut points must stand as declared; derived edges follow from the range in stage 1 and are a choice
/// among released cells later.
fn edges_differ(edges: &[f64], domain: &NumericDomain, plan: &Plan, stage: u8) -> Option<&'static str> {
    if let Some(declared) = &domain.cut_points {
        let same = edges.len() == declared.len()
            && edges.iter().zip(declared).all(|(a, b)| a.to_bits() == b.to_bits());
        return (!same).then_some("declared cut points");
    }
    if stage > 1 {
        return None;
    }
    let log1p = domain.scale == Scale::Log1p;
    let derived = fine_edges(domain.lower, domain.upper, log1p, plan.release.fine_bins as usize);
    // Mathematical libraries of two machines may differ in the last digits of a logarithm.
    let slack = EDGE_SLACK * (domain.upper - domain.lower);
    let same =
        edges.len() == derived.len() && edges.iter().zip(&derived).all(|(a, b)| (a - b).abs() <= slack);
    (!same).then_some("fine bins of the declared range")
}

/// Most cells of one feature in a stage, the missing cell included.
fn most_cells(kind: &FeatureKind, plan: &Plan, stage: u8) -> usize {
    let spec = &plan.release;
    match (kind, stage) {
        // Stage 1 is compared edge by edge and level by level; later, declared cut points too.
        (_, 1) => usize::MAX,
        (FeatureKind::Numeric(domain), 2 | 4) => {
            domain.cut_points.as_ref().map_or(spec.bins as usize + 1, |cuts| cuts.len() + 2)
        }
        (FeatureKind::Numeric(_), _) => spec.coarse_bins as usize + 1,
        (FeatureKind::Categorical { .. }, 2 | 4) => spec.max_levels as usize,
        (FeatureKind::Categorical { .. }, _) => spec.coarse_bins as usize,
    }
}

/// Stage 1: single attributes. 2: (feature, label). 3: (feature, feature), or one lone feature. 4: (feature, label), (feature,
/// feature) or (feature, feature, label). No marginal twice. Otherwise the position of the first at fault.
pub(super) fn check_shapes(query: &ReleaseQuery) -> Result<(), usize> {
    let features = query.attributes.iter().filter(|attribute| !attribute.is_label()).count();
    let mut seen = BTreeSet::new();
    for (index, marginal) in query.marginals.iter().enumerate() {
        let is_label = |i: &usize| query.attributes.get(*i).is_some_and(Attribute::is_label);
        let labels: Vec<bool> = marginal.attributes.iter().map(is_label).collect();
        let legal = match (query.stage, labels.as_slice()) {
            (1, [_]) | (2 | 4, [false, true]) | (3 | 4, [false, false]) | (4, [false, false, true]) => true,
            (3, [false]) => features == 1,
            _ => false,
        };
        let mut sorted = marginal.attributes.clone();
        sorted.sort_unstable();
        if !legal || !seen.insert(sorted) {
            return Err(index);
        }
    }
    Ok(())
}

/// Difference of derived edges that counts as equal, in parts of the declared range.
const EDGE_SLACK: f64 = 1e-9;
