//! From a plan to a secure sum: what a stage's or round's sum is about, and the descriptor that follows.
//!
//! Coordinator and agents compute the same facts from the same documents; the coordinator adds when it opened and
//! where its log stood.

use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::mechanism::{EventShape, MechanismError, MechanismEvent};
use tabmesh_privacy::release::ReleaseQuery;

use crate::descriptor::RoundDescriptor;
use crate::id::{CollectionId, Digest, PlanDigest};
use crate::plan::{SUM_STEPS, SecureSumSpec};
use crate::secagg::descriptor::{SumDescriptor, SumDescriptorError, least_threshold};
use crate::secagg::graph::Topology;
use crate::secagg::mask::Width;
use crate::secagg::noise::NoisePlan;
use crate::secagg::policy::Expected;
use crate::secagg::roster::Roster;

/// One sum, as the plan and the document it answers determine it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// What an agent holds a descriptor against.
    pub expected: Expected,
    /// What the sum may cost each unit.
    pub rho: Rho,
    /// Largest magnitude of one agent's value that is plausible, without noise.
    pub plausible: u64,
    /// Seconds for all steps.
    pub deadline_s: u32,
}

/// What the coordinator alone can say of an attempt at a sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// Its number, from 1.
    pub number: u32,
    /// When it opens, UTC milliseconds.
    pub opened_ms: i64,
    /// Head of the coordinator's audit log then.
    pub log_head: Digest,
}

impl Subject {
    /// A training round; `payload` is the digest of the descriptor as sent.
    #[must_use]
    pub fn round(descriptor: &RoundDescriptor, payload: Digest, deadline_s: u32) -> Self {
        let expected = Expected {
            collection: descriptor.id,
            payload,
            model: descriptor.base,
            plan: descriptor.plan,
            dimension: u32::try_from(descriptor.len()).unwrap_or(u32::MAX),
            l2_sensitivity_squared: descriptor.sensitivity.saturating_mul(descriptor.sensitivity),
        };
        let plausible = descriptor.max_units.saturating_mul(descriptor.sensitivity);
        Self { expected, rho: descriptor.rho, plausible, deadline_s }
    }

    /// A stage of a release; `payload` is the digest of the query as sent.
    #[must_use]
    pub fn stage(
        query: &ReleaseQuery,
        payload: Digest,
        collection: CollectionId,
        plan: PlanDigest,
        deadline_s: u32,
    ) -> Self {
        let expected = Expected {
            collection,
            payload,
            model: NO_MODEL,
            plan,
            dimension: u32::try_from(query.cells_total()).unwrap_or(u32::MAX),
            l2_sensitivity_squared: query.l2_sensitivity_squared(),
        };
        Self { expected, rho: query.rho, plausible: MAX_PLAUSIBLE_ROWS, deadline_s }
    }

    /// The descriptor of an attempt over a roster.
    ///
    /// # Errors
    /// [`SumDescriptorError`] if the cost buys no usable shares, or the figures don't fit the roster.
    pub fn describe(
        &self,
        spec: SecureSumSpec,
        roster: &Roster,
        attempt: Attempt,
    ) -> Result<SumDescriptor, SumDescriptorError> {
        let expected = self.expected.clone();
        let (agents, l2_squared) = (roster.len(), expected.l2_sensitivity_squared);
        let SecureSumSpec { colluders, dropouts, .. } = spec;
        let Attempt { number, opened_ms, log_head } = attempt;
        let noise = NoisePlan::for_cost(l2_squared, self.rho, agents, dropouts, colluders)?;
        let (width, threshold) = (Width::Bits64, least_threshold(agents, colluders));
        let mut descriptor = SumDescriptor {
            collection: expected.collection,
            attempt: number,
            payload: expected.payload,
            model: expected.model,
            plan: expected.plan,
            roster: roster.digest(),
            dimension: expected.dimension,
            width,
            max_abs: 0,
            l2_sensitivity_squared: l2_squared,
            noise,
            threshold: u32::try_from(threshold).unwrap_or(u32::MAX),
            topology: Topology::for_cohort(agents, threshold, dropouts, colluders)?,
            opened_ms,
            step_s: (self.deadline_s / SUM_STEPS).max(1),
            log_head,
        };
        // As wide as plausible data need, and never so wide that the sum of all could leave half the modulus.
        let most = width.max_sum() / agents as u64;
        descriptor.max_abs = descriptor.noise_bound().saturating_add(self.plausible.max(1)).min(most);
        descriptor.check(roster)?;
        Ok(descriptor)
    }
}

/// The ledger's record of a contribution to a sum.
///
/// # Errors
/// [`MechanismError`] if shares don't follow; a checked descriptor's do.
pub fn event(
    descriptor: &SumDescriptor,
    agents: usize,
    shape: EventShape,
) -> Result<MechanismEvent, MechanismError> {
    let SumDescriptor { noise, l2_sensitivity_squared, .. } = descriptor;
    noise.shares(agents).event(noise.central, *l2_sensitivity_squared, shape)
}

/// What a sum that belongs to no model names.
pub const NO_MODEL: Digest = Digest::from_bytes([0; 32]);
/// Rows that one agent may hold in one cell at most: only absurd counts are cut.
const MAX_PLAUSIBLE_ROWS: u64 = 1 << 40;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;
    use tabmesh_privacy::signature::VerifyingKey;

    use super::*;
    use crate::id::AgentId;
    use crate::secagg::graph::{GraphError, MAX_COMPLETE};
    use crate::secagg::roster::Member;

    fn roster(agents: u16) -> Roster {
        let key = |i: u16| {
            let mut key = [1; 32];
            key[..2].copy_from_slice(&i.to_le_bytes());
            VerifyingKey::from_bytes(key)
        };
        let member = |i: u16| Member {
            agent: AgentId::new(format!("agent-{i:04}")).unwrap(),
            key: key(i),
            organisation: format!("org-{i}"),
        };
        Roster::new((0..agents).map(member).collect()).unwrap()
    }

    fn subject(rho: f64, plausible: u64) -> Subject {
        let expected = Expected {
            collection: CollectionId::new(1_000, &mut ChaCha20Rng::seed_from_u64(1), None),
            payload: Digest::of(b"payload"),
            model: Digest::of(b"model"),
            plan: PlanDigest::of(b"plan"),
            dimension: 416,
            l2_sensitivity_squared: 65_000 * 65_000,
        };
        let rho = Rho::from_f64_round_down(rho).unwrap();
        Subject { expected, rho, plausible, deadline_s: 61 }
    }

    fn first() -> Attempt {
        Attempt { number: 1, opened_ms: 5_000, log_head: Digest::of(b"head") }
    }

    fn spec(colluders: u32, dropouts: u32) -> SecureSumSpec {
        SecureSumSpec { colluders, dropouts, retries: 0 }
    }

    #[test]
    fn a_described_sum_costs_what_it_may_and_fits_its_roster() {
        for agents in [4, 5, 7, 64, 128, 129, 1024] {
            let (roster, subject) = (roster(agents), subject(0.003, 1 << 30));
            let descriptor = subject.describe(spec(1, 1), &roster, first()).unwrap();
            let cost = descriptor.guarantee(&roster).unwrap();
            assert!(cost.rho <= subject.rho, "{agents}");
            assert_eq!(descriptor.step_s, 10);
            assert!(descriptor.signal_bound() >= 1 << 30, "{agents}: honest data aren't cut");
            let shape = EventShape { rows_per_unit: 1, marginals: 0, dimension: 416 };
            let event = event(&descriptor, roster.len(), shape).unwrap();
            assert_eq!((event.rho, event.check()), (cost.rho, Ok(())));
        }
    }

    #[test]
    fn absurd_bounds_end_at_the_modulus_and_assumptions_that_do_not_fit_are_refused() {
        let (roster, subject) = (roster(5), subject(0.003, u64::MAX));
        let descriptor = subject.describe(spec(1, 1), &roster, first()).unwrap();
        assert_eq!(descriptor.max_abs, i64::MAX as u64 / 5);
        for spec in [spec(2, 0), spec(1, 2), spec(0, 1)] {
            assert!(subject.describe(spec, &roster, first()).is_err(), "{spec:?}");
        }
    }

    #[test]
    fn the_ring_begins_with_one_agent_more_than_the_complete_graph_takes() {
        let of = |agents: usize, colluders, dropouts| {
            let roster = roster(u16::try_from(agents).unwrap());
            subject(0.003, 1 << 30).describe(spec(colluders, dropouts), &roster, first())
        };
        assert_eq!(of(MAX_COMPLETE, 5, 10).unwrap().topology, Topology::Complete);
        let Topology::Regular(shape) = of(MAX_COMPLETE + 1, 5, 10).unwrap().topology else {
            panic!("a ring")
        };
        assert!((6..MAX_COMPLETE as u32).contains(&shape.degree), "{shape:?}");
        // A third of the agents hostile and a fifth gone is more than a ring of this size bears.
        let refused = of(MAX_COMPLETE + 1, 40, 25).unwrap_err();
        assert!(
            matches!(refused, SumDescriptorError::Graph(GraphError::None { agents: 129, .. })),
            "{refused}"
        );
    }

    #[test]
    fn another_attempt_is_another_descriptor() {
        let (roster, subject) = (roster(5), subject(0.003, 1 << 20));
        let describe = |attempt| subject.describe(spec(1, 1), &roster, attempt).unwrap();
        let (one, two) = (describe(first()), describe(Attempt { number: 2, ..first() }));
        assert_eq!((one.attempt, two.attempt), (1, 2));
        assert_ne!(Digest::of(&one.to_bytes()), Digest::of(&two.to_bytes()));
        assert_eq!(SumDescriptor { attempt: 1, ..two }, one);
    }
}
