//! The declarative plan: everything a federation run may do, checked before anybody sees it.
//!
//! A plan is a YAML document with no code in it. Unknown keys, values out of range and contradictions are refused
//! with file, line and caret. Its name everywhere is the SHA-256 of the bytes as submitted. Every field has a
//! documented default except `kind`, `name` and `target`; features are what the admitted contracts share, so a
//! plan cannot ask for more than owners approved.

mod adapter;
mod budget;
mod document;
mod placement;

use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tabmesh_contract::schema::FeatureId;

use crate::adaptive_clip::{self, AdaptiveClip, LARGEST_NORM, SMALLEST_NORM};
use crate::aggregate::Aggregation;
use crate::aggregate::optimiser::OptimiserSpec;
use crate::checks;
use crate::descriptor::MAX_ADAPTER_VALUES;
use crate::id::PlanDigest;

pub use adapter::{AdapterSpec, MAX_ADAPTER_RANK, MAX_ROUND_TREES, MAX_TREE_DEPTH};
pub use budget::{PlanBudget, STAGES};
pub use document::{Fault, Faults, PlanError, read_document};
pub use placement::{MAX_RETRIES, MAX_SUM_AGENTS, NoisePlacement, SUM_STEPS, SecureSumSpec};

/// A checked plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Always `TabmeshPlan`.
    #[garde(skip)]
    pub kind: PlanKind,
    /// Short name for people: 1 to 64 characters of a-z, 0-9, '_', '-'.
    #[garde(custom(checks::name(MAX_NAME_BYTES)))]
    pub name: String,
    /// Canonical id of the target; the features are what admitted contracts with this target share.
    #[garde(skip)]
    #[schemars(with = "String")]
    pub target: FeatureId,
    /// Who may take part.
    #[serde(default)]
    #[garde(dive)]
    pub cohort: Cohort,
    /// What it may cost each privacy unit.
    #[serde(default)]
    #[garde(dive)]
    pub privacy: PrivacySpec,
    /// The noisy statistics.
    #[serde(default)]
    #[garde(dive)]
    pub release: ReleaseSpec,
    /// The synthetic corpus.
    #[serde(default)]
    #[garde(dive)]
    pub corpus: CorpusSpec,
    /// Continued pre-training on the corpus.
    #[serde(default)]
    #[garde(dive)]
    pub pretrain: PretrainSpec,
    /// Federated rounds.
    #[serde(default)]
    #[garde(dive)]
    pub rounds: RoundsSpec,
}

/// The document kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PlanKind {
    /// The only kind there is.
    TabmeshPlan,
}

/// Who may take part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct Cohort {
    /// Fewest agents, 1 to 1024; also the quorum of every stage and round. Default 3.
    #[garde(range(min = 1, max = MAX_AGENTS))]
    pub min_agents: u32,
    /// Most agents, `min_agents` to 1024. Default 64.
    #[garde(range(min = 1, max = MAX_AGENTS))]
    pub max_agents: u32,
    /// Tags an agent's contract must all carry, at most 16. Default none.
    #[garde(length(max = MAX_TAGS), inner(custom(checks::name(MAX_NAME_BYTES))))]
    pub tags: Vec<String>,
}

impl Default for Cohort {
    fn default() -> Self {
        Self { min_agents: 3, max_agents: 64, tags: Vec::new() }
    }
}

/// What the plan may cost each privacy unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct PrivacySpec {
    /// ε of the whole plan, in (0, 20]. Default 3.
    #[garde(custom(epsilon_in_range))]
    pub epsilon: f64,
    /// δ of the whole plan, in (0, 0.001]. Default 1e-5.
    #[garde(custom(delta_in_range))]
    pub delta: f64,
    /// Share of ρ for the statistics, in (0, 1); the rest is for the rounds. All of it where there are none. Default 0.5.
    #[garde(custom(checks::open_unit))]
    pub release_share: f64,
    /// Who adds the noise: `local`, each agent all of it, or `secure_sum`, each agent a share, under a mask that only
    /// the sum over the cohort is free of. Default `local`.
    #[garde(skip)]
    pub noise_placement: NoisePlacement,
    /// What `secure_sum` assumes; for it alone. Default one dropout, one colluder.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[garde(dive)]
    pub secure_sum: Option<SecureSumSpec>,
}

impl Default for PrivacySpec {
    fn default() -> Self {
        Self {
            epsilon: 3.0,
            delta: 1e-5,
            release_share: 0.5,
            noise_placement: NoisePlacement::default(),
            secure_sum: None,
        }
    }
}

/// The noisy statistics, in four stages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct ReleaseSpec {
    /// Seconds each stage is open. Default 60.
    #[garde(custom(checks::deadline))]
    pub deadline_s: u32,
    /// Seconds the coordinator has after a deadline. Default 10.
    #[garde(custom(checks::grace))]
    pub grace_s: u32,
    /// Cells of the fine histogram of a numeric feature without declared cut points, 16 to 256. Default 128.
    #[garde(range(min = 16, max = MAX_FINE_BINS))]
    pub fine_bins: u32,
    /// Bins of a numeric feature afterwards, 2 to 64. Default 8.
    #[garde(range(min = 2, max = MAX_BINS))]
    pub bins: u32,
    /// Bins in the pair statistics that choose the tree, 2 to 16. Default 5.
    #[garde(range(min = 2, max = MAX_COARSE_BINS))]
    pub coarse_bins: u32,
    /// Levels kept of a categorical feature, 2 to 256; rarer ones are merged. Default 24.
    #[garde(range(min = 2, max = MAX_KEPT_LEVELS))]
    pub max_levels: u32,
    /// Features that one may depend on beside the label, 1 to 3: 1 is a tree, more a junction tree, whose further edges are counted
    /// too and so leave each count more noise. Default 1.
    #[garde(range(min = 1, max = MAX_PARENTS))]
    pub parents: u32,
    /// Features that stage 4 counts by label once more: `all`, or only those of `signal` in stage 2, which leaves the others' counts less
    /// noise. Default `all`.
    #[serde(skip_serializing_if = "LabelMarginals::is_all")]
    #[garde(skip)]
    pub label_marginals: LabelMarginals,
    /// Draw the corpus with a domain column where domains differ by more than noise can have made: features then depend on the
    /// domain as well, and each agent's context begins with rows that stand for its own. It costs no privacy and tells every domain
    /// of the plan what sets each apart, so all contracts must say `domain_aggregates: published`; with local noise only, since a
    /// secure sum knows no domain. Default false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[garde(skip)]
    pub domain_column: bool,
    /// Shares of the release's ρ.
    #[garde(dive)]
    pub shares: StageShares,
}

impl Default for ReleaseSpec {
    fn default() -> Self {
        Self {
            deadline_s: 60,
            grace_s: 10,
            fine_bins: 128,
            bins: 8,
            coarse_bins: 5,
            max_levels: 24,
            parents: 1,
            label_marginals: LabelMarginals::All,
            domain_column: false,
            shares: StageShares::default(),
        }
    }
}

/// Features that stage 4 counts by label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LabelMarginals {
    /// Every one.
    #[default]
    All,
    /// Those whose counts by label in stage 2 are further from independence than noise can have made them.
    Signal,
}

impl LabelMarginals {
    fn is_all(&self) -> bool {
        *self == Self::All
    }
}

/// Shares of the release's ρ; together at most 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct StageShares {
    /// Stage 1: fine histograms and label counts. Default 0.1.
    #[garde(custom(checks::open_unit))]
    pub one_way: f64,
    /// Stage 2: (feature, label) counts. Default 0.2.
    #[garde(custom(checks::open_unit))]
    pub label_pairs: f64,
    /// Stage 3: coarse counts of all pairs of features. Default 0.2.
    #[garde(custom(checks::open_unit))]
    pub structure: f64,
    /// Stage 4: counts of each feature with the label and with the feature it depends on. Default 0.5.
    #[garde(custom(checks::open_unit))]
    pub tree: f64,
}

impl Default for StageShares {
    fn default() -> Self {
        Self { one_way: 0.1, label_pairs: 0.2, structure: 0.2, tree: 0.5 }
    }
}

/// The synthetic corpus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct CorpusSpec {
    /// Rows drawn, 100 to 1,000,000. Default 12,000.
    #[garde(range(min = 100, max = MAX_CORPUS_ROWS))]
    pub rows: u32,
}

impl Default for CorpusSpec {
    fn default() -> Self {
        Self { rows: 12_000 }
    }
}

/// Continued pre-training on the corpus.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct PretrainSpec {
    /// Optimiser steps, 0 to 100,000; 0 keeps the base as it is. Default 300.
    #[garde(range(max = MAX_PRETRAIN_STEPS))]
    pub steps: u32,
    /// Tables in each step, 1 to 64. Default 4.
    #[garde(range(min = 1, max = MAX_TABLES_PER_STEP))]
    pub tables_per_step: u32,
    /// Learning rate, in (0, 1000]. Default 5e-4.
    #[garde(custom(checks::learning_rate))]
    pub learning_rate: f64,
    /// Share of tables drawn from the prior instead of the corpus, in [0, 1]. Default 0.25.
    #[garde(custom(checks::between(0.0, 1.0)))]
    pub prior_replay: f64,
}

impl Default for PretrainSpec {
    fn default() -> Self {
        Self { steps: 300, tables_per_step: 4, learning_rate: 5e-4, prior_replay: 0.25 }
    }
}

/// Federated rounds. All agents of the cohort take part in each, with all their units or a sample that each draws for itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct RoundsSpec {
    /// Number of rounds, 0 to 200; without rounds the release has the whole budget. Default 20.
    #[garde(range(max = MAX_ROUNDS))]
    pub count: u32,
    /// Seconds each round is open. Default 60.
    #[garde(custom(checks::deadline))]
    pub deadline_s: u32,
    /// Seconds the coordinator has after a deadline. Default 10.
    #[garde(custom(checks::grace))]
    pub grace_s: u32,
    /// Share of units in a round, in (0, 1]: each agent draws each of its units with this probability and tells nobody which.
    /// It saves computing where tables are large; privacy is charged as if all took part. Default 1, which has the least noise.
    #[garde(custom(checks::between(SMALLEST_RATE, 1.0)))]
    pub sampling_rate: f64,
    /// Norm one unit's gradient is clipped to: `auto` (on the corpus, the 95th percentile or the median of a class, whichever is larger; of a forest, the largest that a row has), a number in [0.0001, 10000], or a map with
    /// the `quantile` of the units' norms that it follows from round to round, by noisy counts. Default `auto`.
    #[garde(custom(clip_norm_in_range))]
    pub clip_norm: ClipNorm,
    /// Noise standard deviation over the L2 sensitivity (the clip norm, and half a percent more where it follows a quantile), in
    /// [0.1, 10000]; none = what the budget allows. A value the budget doesn't cover is refused. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[garde(inner(custom(checks::between(0.1, 1e4))))]
    pub noise_multiplier: Option<f64>,
    /// Server optimiser. Default momentum SGD with learning rate 4 and momentum 0.9.
    #[garde(dive)]
    pub optimiser: OptimiserSpec,
    /// How updates become one gradient. Default `fedsgd`.
    #[garde(skip)]
    pub aggregation: Aggregation,
    /// Share of agents that `trimmed_mean` cuts at each end and that `krum` and `multi_krum` take for hostile, in [0, 0.5).
    /// Default 0.1.
    #[garde(custom(checks::below_half))]
    pub trim: f64,
    /// What is trained: a kind's name, or a map with `kind` and its figures. Default `forest`.
    #[serde(deserialize_with = "adapter::name_or_map")]
    #[schemars(with = "adapter::NameOrMap")]
    #[garde(dive)]
    pub adapter: AdapterSpec,
    /// Corpus rows in the model's context during rounds, 16 to 4096. Default 384.
    #[garde(range(min = 16, max = MAX_CONTEXT_ROWS))]
    pub context_rows: u32,
}

impl Default for RoundsSpec {
    fn default() -> Self {
        Self {
            count: 20,
            deadline_s: 60,
            grace_s: 10,
            sampling_rate: 1.0,
            clip_norm: ClipNorm::default(),
            noise_multiplier: None,
            optimiser: OptimiserSpec::default(),
            aggregation: Aggregation::default(),
            trim: 0.1,
            adapter: AdapterSpec::default(),
            context_rows: 384,
        }
    }
}

/// The norm one unit's gradient is clipped to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ClipNorm {
    /// This norm.
    Fixed(f64),
    /// Found on the corpus.
    Auto(Auto),
    /// Follows a quantile of the units' own norms.
    Adaptive(AdaptiveClip),
}

impl ClipNorm {
    /// Integer steps that a unit adds to a count in the round's vector; 0 where there are no such counts.
    #[must_use]
    pub fn count_weight(&self, integer_norm: u64) -> u64 {
        match self {
            Self::Fixed(_) | Self::Auto(_) => 0,
            Self::Adaptive(_) => adaptive_clip::weight(integer_norm),
        }
    }
}

/// The word `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Auto {
    /// The 95th percentile of gradient norms on corpus rows, or a class' median where that is larger, so that a rare class isn't
    /// clipped away: post-processing, costs no privacy.
    Auto,
}

impl Default for ClipNorm {
    fn default() -> Self {
        Self::Auto(Auto::Auto)
    }
}

impl Plan {
    /// Parses and checks a submitted plan; `file` is the name shown in refusals.
    ///
    /// # Errors
    /// [`PlanError`]: too large, not text, or faulty, with every fault found and its place.
    pub fn parse(bytes: &[u8], file: &str) -> Result<(Self, PlanDigest), PlanError> {
        let plan = document::parse(bytes, file)?;
        Ok((plan, PlanDigest::of(bytes)))
    }

    /// JSON Schema of the document, for editors.
    #[must_use]
    pub fn json_schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }

    /// What each part may cost.
    ///
    /// # Errors
    /// A [`Fault`]-like message if ε and δ buy nothing or the noise multiplier needs more than the rounds have; a
    /// plan that came out of [`Self::parse`] has no such fault.
    pub fn budget(&self) -> Result<PlanBudget, PlanError> {
        PlanBudget::of(self).map_err(|(path, message)| PlanError::Budget { path, message })
    }

    /// Checks over several fields: path and message of each contradiction.
    fn contradictions(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let Cohort { min_agents, max_agents, .. } = self.cohort;
        if min_agents > max_agents {
            let message = format!("min_agents {min_agents} is above max_agents {max_agents}");
            found.push(("cohort.min_agents", message));
        }
        let StageShares { one_way, label_pairs, structure, tree } = self.release.shares;
        let sum =
            budget::ppm(one_way) + budget::ppm(label_pairs) + budget::ppm(structure) + budget::ppm(tree);
        if sum > budget::PPM {
            let message =
                format!("shares sum to {}, at most 1 may be given out", sum as f64 / budget::PPM as f64);
            found.push(("release.shares", message));
        }
        let ReleaseSpec { fine_bins, bins, coarse_bins, .. } = self.release;
        if bins > fine_bins {
            found.push(("release.bins", format!("bins {bins} is above fine_bins {fine_bins}")));
        }
        if coarse_bins > bins {
            found.push(("release.coarse_bins", format!("coarse_bins {coarse_bins} is above bins {bins}")));
        }
        let (expected, got) = (self.rounds.aggregation.optimiser(), self.rounds.optimiser.name());
        if expected != got {
            found.push(("rounds.aggregation", format!("goes with optimiser {expected} only, got {got}")));
        }
        found.extend(self.forest_contradictions());
        found.extend(self.placement_contradictions());
        if found.is_empty()
            && let Err((path, message)) = PlanBudget::of(self)
        {
            found.push((path, message));
        }
        found
    }

    /// What doesn't go with a forest: its step is its own, and its rows' norm is known.
    fn forest_contradictions(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        if !matches!(self.rounds.adapter, AdapterSpec::Forest { .. }) {
            return found;
        }
        if self.rounds.optimiser != OptimiserSpec::default() {
            let message = "a forest takes a Newton step and has no optimiser: leave it out".to_owned();
            found.push(("rounds.optimiser", message));
        }
        if matches!(self.rounds.clip_norm, ClipNorm::Adaptive(_)) {
            let message =
                "the norm of a forest's rows is known, none has to be followed: use auto or a number"
                    .to_owned();
            found.push(("rounds.clip_norm", message));
        }
        let values = u64::from(self.rounds.count) * self.rounds.adapter.leaf_sums() / 2;
        if values > MAX_ADAPTER_VALUES as u64 {
            let message = format!(
                "{} rounds of {} make {values} leaf values, at most {MAX_ADAPTER_VALUES} fit into a round",
                self.rounds.count, self.rounds.adapter
            );
            found.push(("rounds.adapter", message));
        }
        found
    }
}

fn epsilon_in_range(value: &f64, (): &()) -> garde::Result {
    if *value > 0.0 && *value <= MAX_EPSILON {
        Ok(())
    } else {
        Err(garde::Error::new(format!("must be above 0 and at most {MAX_EPSILON}, got {value}")))
    }
}

fn delta_in_range(value: &f64, (): &()) -> garde::Result {
    if *value > 0.0 && *value <= MAX_DELTA {
        Ok(())
    } else {
        Err(garde::Error::new(format!("must be above 0 and at most {MAX_DELTA}, got {value}")))
    }
}

fn clip_norm_in_range(value: &ClipNorm, (): &()) -> garde::Result {
    match value {
        ClipNorm::Auto(_) => Ok(()),
        ClipNorm::Fixed(norm) => checks::between(SMALLEST_NORM, LARGEST_NORM)(norm, &()),
        ClipNorm::Adaptive(clip) => {
            clip.validate().map_err(|report| garde::Error::new(report.to_string().trim_end().to_owned()))
        }
    }
}

/// Smallest share of units in a round.
pub const SMALLEST_RATE: f64 = 1e-4;
/// Longest plan name or tag, in bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// Largest plan document, in bytes.
pub const MAX_PLAN_BYTES: usize = 64 * 1024;
/// Most agents of one plan.
pub const MAX_AGENTS: u32 = 1024;
/// Most tags of one plan.
pub const MAX_TAGS: usize = 16;
/// Largest ε of a plan: beyond it the guarantee says nothing.
pub const MAX_EPSILON: f64 = 20.0;
/// Largest δ of a plan.
pub const MAX_DELTA: f64 = 1e-3;
/// Most cells of a fine histogram.
pub const MAX_FINE_BINS: u32 = 256;
/// Most bins of a numeric feature.
pub const MAX_BINS: u32 = 64;
/// Most bins of a numeric feature in the pair statistics.
pub const MAX_COARSE_BINS: u32 = 16;
/// Most features that one may depend on in the corpus' model, beside the label.
pub const MAX_PARENTS: u32 = 3;
/// Most levels kept of a categorical feature.
pub const MAX_KEPT_LEVELS: u32 = 256;
/// Most corpus rows.
pub const MAX_CORPUS_ROWS: u32 = 1_000_000;
/// Most pre-training steps.
pub const MAX_PRETRAIN_STEPS: u32 = 100_000;
/// Most tables in a pre-training step.
pub const MAX_TABLES_PER_STEP: u32 = 64;
/// Most rounds.
pub const MAX_ROUNDS: u32 = 200;
/// Most context rows during rounds.
pub const MAX_CONTEXT_ROWS: u32 = 4096;

#[cfg(test)]
mod tests;
