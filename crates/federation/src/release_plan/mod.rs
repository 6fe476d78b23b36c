//! The release, derived: which noisy counts each of the four stages asks for.
//!
//! Queries are functions of the shared schema, the plan and earlier *released* counts; no row is ever looked at.
//! Stage 1 counts every feature alone, finely; stage 2 each feature with the label; stage 3 all pairs of features,
//! coarsely, from which a tree is chosen; stage 4 what the tree needs at full resolution. The pair statistics
//! are linear, so they add up over domains, unlike MST's exponential-mechanism scores. [`check`] is the other
//! side: what an agent holds a query against before it counts anything.

pub mod check;
pub mod shared;

use std::collections::BTreeMap;

use tabmesh_contract::schema::{Feature, FeatureId, FeatureKind, FeatureSchema, Scale};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::mechanism::discrete_gaussian::MIN_SIGMA;
use tabmesh_privacy::mechanism::shares::LEAST_EXCESS;
use tabmesh_privacy::release::{
    Attribute, Binning, MarginalSpec, MarginalTable, QueryError, ReleaseQuery, equal_mass_edges, fine_edges,
    merge_adjacent, merge_rare,
};
use thiserror::Error;

use crate::id::PlanDigest;
use crate::plan::{Plan, PlanBudget, STAGES};

use check::check_shapes;
pub use check::{QueryRefusal, check_query};
pub use shared::{SharedError, shared_max_rows, shared_schema};

/// Attributes of the shared features by canonical id, in the order of the schema.
pub type Attributes = BTreeMap<FeatureId, Attribute>;

/// Why a stage has no query.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ReleasePlanError {
    /// A feature of the schema has no attribute.
    #[error("feature {feature} has no bins yet: the stage before must be released first")]
    NoAttribute {
        /// Its canonical id.
        feature: FeatureId,
    },
    /// A marginal of stage 4 that its agents would refuse.
    #[error(
        "marginal {index} is not (feature, label), (feature, feature) or (feature, feature, label), or comes twice"
    )]
    Shape {
        /// Its position.
        index: usize,
    },
    /// Not one entry per feature.
    #[error("expected one {what} per feature, {expected} in all, got {got}")]
    Count {
        /// What was counted.
        what: &'static str,
        /// Features of the schema.
        expected: usize,
        /// Entries given.
        got: usize,
    },
    /// The query breaks a limit or its noise is unusable.
    #[error("stage {stage}: {source}")]
    Query {
        /// Stage, 1 to 4.
        stage: u8,
        /// The limit.
        source: QueryError,
    },
}

/// What every stage of one release is derived from.
#[derive(Debug, Clone, Copy)]
pub struct Release<'a> {
    /// Features and target the cohort shares.
    pub schema: &'a FeatureSchema,
    /// The plan.
    pub plan: &'a Plan,
    /// Its digest.
    pub digest: PlanDigest,
    /// Its budget.
    pub budget: PlanBudget,
    /// Rows one privacy unit contributes at most (k), the same at every agent.
    pub max_rows_per_unit: u32,
    /// Agents of the cohort; what a secure sum's noise is divided over.
    pub agents: usize,
}

impl Release<'_> {
    /// Stage 1: every feature alone in fine cells, and the label alone.
    ///
    /// # Errors
    /// [`ReleasePlanError::Query`] if a limit is broken.
    pub fn stage_one(&self) -> Result<ReleaseQuery, ReleasePlanError> {
        let features = self.schema.features();
        let mut attributes: Vec<Attribute> = features.iter().map(|f| fine(f, self.plan)).collect();
        attributes.push(self.label());
        let marginals = (0..attributes.len()).map(|i| MarginalSpec { attributes: vec![i] }).collect();
        self.query(1, attributes, marginals)
    }

    /// Stage 2: each feature with the label, over the final bins.
    ///
    /// # Errors
    /// [`ReleasePlanError::NoAttribute`] for a feature without bins, [`ReleasePlanError::Query`] for a limit.
    pub fn stage_two(&self, finals: &Attributes) -> Result<ReleaseQuery, ReleasePlanError> {
        let (attributes, label) = self.with_label(finals)?;
        let marginals = (0..label).map(|i| MarginalSpec { attributes: vec![i, label] }).collect();
        self.query(LABEL_STAGE, attributes, marginals)
    }

    /// Stage 3: all pairs of features, over the coarse bins. Nothing to ask with a single feature: then the first
    /// feature alone is counted, so that every plan has four stages.
    ///
    /// # Errors
    /// [`ReleasePlanError::NoAttribute`] for a feature without bins, [`ReleasePlanError::Query`] for a limit.
    pub fn stage_three(&self, coarse: &Attributes) -> Result<ReleaseQuery, ReleasePlanError> {
        let attributes = self.in_order(coarse)?;
        let n = attributes.len();
        let pairs = (0..n).flat_map(|i| (i + 1..n).map(move |j| MarginalSpec { attributes: vec![i, j] }));
        let mut marginals: Vec<MarginalSpec> = pairs.collect();
        if marginals.is_empty() {
            marginals.push(MarginalSpec { attributes: vec![0] });
        }
        self.query(3, attributes, marginals)
    }

    /// Stage 4: the marginals chosen from the released stages, over the final bins: (feature, label), (feature, feature) or
    /// (feature, feature, label). The label's position is after the features'.
    ///
    /// # Errors
    /// [`ReleasePlanError::Shape`] for a marginal of another kind or one asked for twice,
    /// [`ReleasePlanError::NoAttribute`] for a feature without bins, [`ReleasePlanError::Query`] for a limit.
    pub fn stage_four(
        &self,
        finals: &Attributes,
        marginals: Vec<MarginalSpec>,
    ) -> Result<ReleaseQuery, ReleasePlanError> {
        let (attributes, _) = self.with_label(finals)?;
        let query = self.query(4, attributes, marginals)?;
        check_shapes(&query).map_err(|index| ReleasePlanError::Shape { index })?;
        Ok(query)
    }

    /// The final bins, from stage 1's released tables: equal-mass bins of numbers, rare levels merged.
    ///
    /// Declared cut points stay as they are. Post-processing: costs nothing.
    ///
    /// # Errors
    /// [`ReleasePlanError::Count`] unless there is one table per feature (a label table after them is ignored).
    pub fn final_attributes(&self, stage_one: &[MarginalTable]) -> Result<Attributes, ReleasePlanError> {
        let spec = &self.plan.release;
        self.rebinned(stage_one, spec.bins as usize, spec.max_levels as usize, false)
    }

    /// The coarse bins of the pair statistics, from stage 1's released tables.
    ///
    /// # Errors
    /// As [`Self::final_attributes`].
    pub fn coarse_attributes(&self, stage_one: &[MarginalTable]) -> Result<Attributes, ReleasePlanError> {
        let coarse = self.plan.release.coarse_bins as usize;
        self.rebinned(stage_one, coarse, coarse, true)
    }

    fn rebinned(
        &self,
        tables: &[MarginalTable],
        bins: usize,
        levels: usize,
        merge_declared: bool,
    ) -> Result<Attributes, ReleasePlanError> {
        let features = self.schema.features();
        if tables.len() < features.len() {
            let (expected, got) = (features.len(), tables.len());
            return Err(ReleasePlanError::Count { what: "stage 1 table", expected, got });
        }
        let rebin = |(feature, table): (&Feature, &MarginalTable)| {
            let mut attribute = fine(feature, self.plan);
            let sd = table.noise_sd();
            match (&feature.kind, &mut attribute.binning) {
                (FeatureKind::Numeric(domain), Binning::Edges { edges, .. })
                    if domain.cut_points.is_none() =>
                {
                    *edges = equal_mass_edges(&table.values, edges, bins, sd);
                }
                (FeatureKind::Numeric(_), _) => {
                    if merge_declared {
                        attribute.merge = Some(merge_adjacent(&table.values, bins, sd));
                    }
                }
                (FeatureKind::Categorical { .. }, _) => {
                    attribute.merge = Some(merge_rare(&table.values, RARE_SD * sd, levels));
                }
            }
            (feature.id.clone(), attribute)
        };
        Ok(features.iter().zip(tables).map(rebin).collect())
    }

    fn label(&self) -> Attribute {
        // A schema has at most 1024 classes.
        Attribute::label(u32::try_from(self.schema.target().classes.len()).unwrap_or(u32::MAX))
    }

    /// Attributes in canonical order.
    fn in_order(&self, attributes: &Attributes) -> Result<Vec<Attribute>, ReleasePlanError> {
        let find = |feature: &Feature| {
            let missing = || ReleasePlanError::NoAttribute { feature: feature.id.clone() };
            attributes.get(&feature.id).cloned().ok_or_else(missing)
        };
        self.schema.features().iter().map(find).collect()
    }

    /// Attributes in canonical order, then the label, and the label's index.
    fn with_label(&self, attributes: &Attributes) -> Result<(Vec<Attribute>, usize), ReleasePlanError> {
        let mut all = self.in_order(attributes)?;
        let label = all.len();
        all.push(self.label());
        Ok((all, label))
    }

    fn query(
        &self,
        stage: u8,
        attributes: Vec<Attribute>,
        marginals: Vec<MarginalSpec>,
    ) -> Result<ReleaseQuery, ReleasePlanError> {
        let at = usize::from(stage) - 1;
        let mut query = ReleaseQuery {
            plan_digest: self.digest.to_string(),
            stage,
            stage_name: STAGE_NAMES[at].to_owned(),
            attributes,
            marginals,
            rho: self.budget.per_stage[at],
            max_rows_per_unit: self.max_rows_per_unit,
        };
        let counted = self.plan.counted(self.agents);
        query.rho = usable_rho(query.rho, query.l2_sensitivity_squared(), counted);
        query.check().map_err(|source| ReleasePlanError::Query { stage, source })?;
        Ok(query)
    }
}

/// The cells of stage 1: declared cut points or fine bins over the declared range; all declared levels.
fn fine(feature: &Feature, plan: &Plan) -> Attribute {
    let binning = match &feature.kind {
        FeatureKind::Numeric(domain) => {
            let log1p = domain.scale == Scale::Log1p;
            let (lower, upper) = (domain.lower, domain.upper);
            let derived = || fine_edges(lower, upper, log1p, plan.release.fine_bins as usize);
            Binning::Edges { lower, upper, log1p, edges: domain.cut_points.clone().unwrap_or_else(derived) }
        }
        // A schema has at most 1024 levels.
        FeatureKind::Categorical { levels } => {
            Binning::Levels { levels: u32::try_from(levels.len()).unwrap_or(u32::MAX) }
        }
    };
    Attribute { id: feature.id.to_string(), binning, merge: None }
}

/// The part of a stage's ρ that buys noise of a standard deviation not below the mechanism's smallest.
///
/// With few features a stage can afford less noise than a discrete Gaussian on counts may have; the rest is left
/// unspent. Coordinator and agents compute it alike. In a secure sum it is each share that has this smallest
/// deviation, over the agents `counted` on; their sum costs a little more than one Gaussian.
#[must_use]
pub fn usable_rho(planned: Rho, l2_sensitivity_squared: u64, counted: Option<u64>) -> Rho {
    // ρ = Δ²/(2σ²) in units of 2⁻⁴⁰, at the smallest σ.
    let least = u128::from(MIN_SIGMA * MIN_SIGMA) * u128::from(counted.unwrap_or(1).max(1));
    let most = (u128::from(l2_sensitivity_squared) << 39) / least;
    let most = most + u128::from(counted.map_or(0, |_| LEAST_EXCESS));
    planned.min(Rho::from_units(u64::try_from(most).unwrap_or(u64::MAX)))
}

/// Names of the stages, for logs, ledgers and reports.
pub const STAGE_NAMES: [&str; STAGES] = ["one_way", "label_pairs", "structure", "tree"];
/// The stage that counts each feature by label: levels of categories are coded by what it says.
pub const LABEL_STAGE: u8 = 2;
/// A level whose noisy count is below this many standard deviations of noise is merged with other rare ones.
pub const RARE_SD: f64 = 3.0;

#[cfg(test)]
mod tests;
