//! Where a plan's noise is added, and what a secure sum must have to be possible.
//!
//! Everything that can be known before a cohort is formed is refused here, by the field at fault; what depends on the
//! cohort's size only gets easier with more agents than the fewest.

use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, Rule};
use crate::plan::Plan;
use crate::secagg::descriptor::least_threshold;
use crate::secagg::graph::Topology;
use crate::secagg::message::Step;
use crate::secagg::roster::MIN_MEMBERS;

/// Who adds the noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NoisePlacement {
    /// Each agent adds all of it: nobody is trusted, and each domain's noised vector is seen.
    #[default]
    Local,
    /// Each agent adds a share, and the coordinator sees the sum alone: less noise and no domain's vector, if not more
    /// agents collude or drop out than the plan assumes.
    SecureSum,
}

/// What a secure sum assumes about its agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct SecureSumSpec {
    /// Agents assumed to collude with each other and with the coordinator, 1 to a third of the cohort less one. Default 1.
    #[garde(range(min = 1, max = MAX_SUM_AGENTS))]
    pub colluders: u32,
    /// Agents that may drop out of a sum; beyond it the sum is given up. The noise of so many more is added. Default 1.
    #[garde(range(max = MAX_SUM_AGENTS))]
    pub dropouts: u32,
    /// Sums of the release, and as many again of the rounds, that may be attempted once more with the agents that are left
    /// after one was given up, 0 to 8. Each is paid for in advance at the price of the dearest, and given back if it isn't
    /// needed. Default 0.
    #[garde(range(max = MAX_RETRIES))]
    pub retries: u32,
}

impl Default for SecureSumSpec {
    fn default() -> Self {
        Self { colluders: 1, dropouts: 1, retries: 0 }
    }
}

impl Plan {
    /// The assumptions of this plan's secure sums; nothing under local noise.
    #[must_use]
    pub fn secure_sum(&self) -> Option<SecureSumSpec> {
        match self.privacy.noise_placement {
            NoisePlacement::Local => None,
            NoisePlacement::SecureSum => Some(self.privacy.secure_sum.unwrap_or_default()),
        }
    }

    /// Agents of a cohort whose noise can be counted on in a secure sum; nothing under local noise.
    #[must_use]
    pub fn counted(&self, agents: usize) -> Option<u64> {
        let SecureSumSpec { colluders, dropouts, .. } = self.secure_sum()?;
        Some((agents as u64).saturating_sub(u64::from(colluders) + u64::from(dropouts)))
    }

    /// What doesn't go with the noise's place: path and message of each contradiction.
    pub(super) fn placement_contradictions(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let Some(SecureSumSpec { colluders, dropouts, .. }) = self.secure_sum() else {
            if self.privacy.secure_sum.is_some() {
                let message = "means something under noise_placement secure_sum only".to_owned();
                found.push(("privacy.secure_sum", message));
            }
            return found;
        };
        if self.release.domain_column {
            let message =
                "needs each agent's own counts, and noise_placement secure_sum shows their sum alone: \
                 leave it out or use local noise"
                    .to_owned();
            found.push(("release.domain_column", message));
        }
        let rule = Rule::new(self.rounds.aggregation, self.rounds.trim);
        if rule.needs_separate_updates() {
            let message = format!(
                "{} needs each agent's own update, and noise_placement secure_sum shows their sum alone: use fedsgd or fedadam",
                rule.name()
            );
            found.push(("rounds.aggregation", message));
        }
        let least = self.cohort.min_agents;
        if (least as usize) < MIN_MEMBERS {
            let message = format!(
                "noise_placement secure_sum needs at least {MIN_MEMBERS} agents, min_agents is {least}: with fewer, noise_placement must be local"
            );
            found.push(("cohort.min_agents", message));
            return found;
        }
        let third = (least - 1) / 3;
        if colluders > third {
            let message =
                format!("a cohort of {least} agents is safe against at most {third}, got {colluders}");
            found.push(("privacy.secure_sum.colluders", message));
        }
        let bearable = (least as usize).saturating_sub(least_threshold(least as usize, colluders));
        if dropouts as usize > bearable {
            let message =
                format!("a cohort of {least} agents can go on without at most {bearable}, got {dropouts}");
            found.push(("privacy.secure_sum.dropouts", message));
        }
        if found.is_empty() {
            // Above the complete graph's size a ring has to bear dropouts and colluders at once.
            let agents = least as usize;
            let graph = Topology::for_cohort(agents, least_threshold(agents, colluders), dropouts, colluders);
            if let Err(error) = graph {
                found.push(("privacy.secure_sum", error.to_string()));
            }
        }
        for (path, deadline_s) in
            [("release.deadline_s", self.release.deadline_s), ("rounds.deadline_s", self.rounds.deadline_s)]
        {
            if deadline_s < SUM_STEPS {
                let message = format!(
                    "a secure sum has {SUM_STEPS} steps of at least a second each, the deadline is {deadline_s} s"
                );
                found.push((path, message));
            }
        }
        found
    }
}

/// Most agents that a secure sum's assumptions may be about.
pub const MAX_SUM_AGENTS: u32 = super::MAX_AGENTS;
/// Most sums of either kind that a plan may attempt again.
pub const MAX_RETRIES: u32 = 8;
/// Steps that share a stage's or round's deadline evenly.
pub const SUM_STEPS: u32 = Step::Open.number() as u32;
