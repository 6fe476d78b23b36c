//! Which admitted agents form a plan's cohort: tags, a minimum, a maximum, and nothing measured on data.
//!
//! The choice is a function of the plan's digest and the candidates' ids, so any coordinator replica and any
//! restart chooses alike. When more agents fit than may take part, those with the smallest
//! SHA-256(plan digest ‖ agent id) do: fair over plans, and no agent can choose its rank without a new identity.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use crate::id::{AgentId, Digest, PlanDigest};
use crate::plan::Cohort;

/// An admitted agent that could take part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its identity.
    pub agent: AgentId,
    /// Tags its contract declares.
    pub tags: BTreeSet<String>,
}

/// Why no cohort can be formed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SelectionError {
    /// Fewer agents fit than the plan's minimum.
    #[error(
        "cohort needs at least {expected} agents with all of its tags, {got} of {candidates} admitted agents fit"
    )]
    TooFew {
        /// The plan's minimum.
        expected: u32,
        /// Agents that fit.
        got: usize,
        /// Agents looked at.
        candidates: usize,
    },
}

/// Chooses the cohort: candidates that carry every tag of the plan, at most its maximum.
///
/// An agent listed twice counts once.
///
/// # Errors
/// [`SelectionError::TooFew`] if fewer than the minimum fit.
pub fn select(
    candidates: &[Candidate],
    cohort: &Cohort,
    plan: &PlanDigest,
) -> Result<BTreeSet<AgentId>, SelectionError> {
    let fitting: BTreeMap<Digest, &AgentId> = candidates
        .iter()
        .filter(|candidate| cohort.tags.iter().all(|tag| candidate.tags.contains(tag)))
        .map(|candidate| (rank(plan, &candidate.agent), &candidate.agent))
        .collect();
    if fitting.len() < cohort.min_agents as usize {
        let (expected, got) = (cohort.min_agents, fitting.len());
        return Err(SelectionError::TooFew { expected, got, candidates: candidates.len() });
    }
    Ok(fitting.into_values().take(cohort.max_agents as usize).cloned().collect())
}

fn rank(plan: &PlanDigest, agent: &AgentId) -> Digest {
    let mut bytes = plan.0.as_bytes().to_vec();
    bytes.extend_from_slice(agent.as_str().as_bytes());
    Digest::of(&bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn candidates(n: usize) -> Vec<Candidate> {
        (0..n)
            .map(|i| Candidate {
                agent: AgentId::new(format!("agent-{i}")).unwrap(),
                tags: if i % 2 == 0 { ["eu".to_owned()].into() } else { BTreeSet::new() },
            })
            .collect()
    }

    fn cohort(min_agents: u32, max_agents: u32, tags: &[&str]) -> Cohort {
        Cohort { min_agents, max_agents, tags: tags.iter().map(|t| (*t).to_owned()).collect() }
    }

    #[test]
    fn tags_select_and_order_of_candidates_does_not_matter() {
        let plan = PlanDigest::of(b"plan");
        let all = candidates(10);
        let chosen = select(&all, &cohort(1, 64, &["eu"]), &plan).unwrap();
        assert_eq!(chosen.len(), 5);
        let mut reversed = all.clone();
        reversed.reverse();
        reversed.extend(all);
        assert_eq!(select(&reversed, &cohort(1, 64, &["eu"]), &plan).unwrap(), chosen);
    }

    #[test]
    fn a_maximum_cuts_fairly_over_plans() {
        // Each of 10 agents is in a cohort of 3 with probability .3. Over 400 plans a count has mean 120 and
        // standard deviation 9.2; five deviations, ten agents: false alarm below 6e-6, and the plans are fixed.
        let all = candidates(10);
        let mut times = BTreeMap::new();
        for i in 0..400_u32 {
            for agent in select(&all, &cohort(1, 3, &[]), &PlanDigest::of(&i.to_le_bytes())).unwrap() {
                *times.entry(agent).or_insert(0_u32) += 1;
            }
        }
        assert_eq!(times.len(), 10);
        assert!(times.values().all(|n| (74..=166).contains(n)), "{times:?}");
    }

    #[test]
    fn too_few_is_refused_with_figures() {
        let plan = PlanDigest::of(b"plan");
        let refused = select(&candidates(10), &cohort(6, 64, &["eu"]), &plan);
        assert_eq!(refused, Err(SelectionError::TooFew { expected: 6, got: 5, candidates: 10 }));
        let unknown = select(&candidates(10), &cohort(1, 64, &["mars"]), &plan);
        assert_eq!(unknown, Err(SelectionError::TooFew { expected: 1, got: 0, candidates: 10 }));
    }
}
