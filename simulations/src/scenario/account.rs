//! A virtual agent's books: the product's ledger in memory, its noise, its order (noise, debit, send).

use anyhow::{Context, Result};
use tabmesh_federation::id::{AgentId, Digest};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::ledger::{
    CommitRequest, GrantRequest, Ledger, MemoryJournal, PlanRequest, Purpose, Reservation,
};
use tabmesh_privacy::mechanism::{DiscreteGaussian, EventShape, Mechanism, MechanismEvent, Noise};
use tabmesh_privacy::noise::{NoiseSource, Purpose as NoisePurpose};

use super::rounds::Budget;

/// What a ledger is told a noised vector costs.
#[derive(Debug, Clone)]
pub(crate) struct Price {
    event: MechanismEvent,
}

impl Price {
    /// The price of a mechanism on vectors of `dimension` integers.
    pub(crate) fn of(mechanism: &impl Noise, dimension: usize) -> Self {
        let dimension = u32::try_from(dimension).unwrap_or(u32::MAX);
        Self { event: mechanism.event(EventShape { rows_per_unit: 1, marginals: 0, dimension }) }
    }
}

/// Ledger and noise of one domain.
pub(crate) struct Account {
    ledger: Ledger<MemoryJournal>,
    release: Option<Reservation>,
    rounds: Reservation,
    total: Rho,
    noise: NoiseSource,
    agent: String,
}

impl Account {
    /// Grants the whole budget and reserves it; of what is for rounds, the part `granted` in (0, 1].
    ///
    /// # Errors
    /// The ledger's refusal.
    pub(crate) fn open(
        agent: &AgentId,
        seed: u64,
        plan: &str,
        budget: &Budget,
        granted: f64,
    ) -> Result<Self> {
        let mut ledger = Ledger::open_reproducible(MemoryJournal::default())?;
        ledger.grant(
            GrantRequest {
                product: PRODUCT.into(),
                entity_namespace: budget.unit.into(),
                lineage: agent.to_string(),
                unit: budget.unit.into(),
                epsilon: budget.epsilon,
                delta: budget.delta,
                signer: "scenario".into(),
            },
            0,
        )?;
        let mut reserve = |purpose, rho| {
            let (plan_digest, product) = (plan.to_owned(), PRODUCT.to_owned());
            let request = PlanRequest {
                plan_digest,
                product,
                purpose,
                rho,
                approvals: Vec::new(),
                planned: Vec::new(),
            };
            ledger.reserve(request, 0)
        };
        let release =
            if budget.total == Rho::ZERO { None } else { Some(reserve(Purpose::Release, budget.total)?) };
        // The cast is of at most a million.
        let part = (granted * PARTS as f64).round() as u64;
        let rounds = reserve(Purpose::Round, budget.vectors.share(part, PARTS))?;
        let noise = NoiseSource::Seeded { seed };
        Ok(Self { ledger, release, rounds, total: budget.total, noise, agent: agent.to_string() })
    }

    /// The noisy number of units.
    ///
    /// # Errors
    /// Nothing was reserved for it, or the ledger's refusal.
    pub(crate) fn release_total(&mut self, units: usize) -> Result<f64> {
        let reservation = self.release.clone().context("no budget for a total")?;
        let mechanism = DiscreteGaussian::from_rho(TOTAL_SCALE * TOTAL_SCALE, self.total)?;
        let price = Price::of(&mechanism, 1);
        let steps = i64::try_from(units as u64 * TOTAL_SCALE)?;
        let noised = self.noised(&reservation, NoisePurpose::Release, &[steps], (&mechanism, &price), 0)?;
        Ok(noised.first().copied().unwrap_or(0) as f64 / TOTAL_SCALE as f64)
    }

    /// Noises a round's vector and debits it: what comes back may be sent.
    ///
    /// # Errors
    /// The ledger's refusal; nothing may be sent then.
    pub(crate) fn answer(
        &mut self,
        sum: &[i64],
        drawn: &Mechanism,
        price: &Price,
        step: u32,
    ) -> Result<Vec<i64>> {
        let reservation = self.rounds.clone();
        self.noised(&reservation, NoisePurpose::Round, sum, (drawn, price), u64::from(step))
    }

    fn noised(
        &mut self,
        reservation: &Reservation,
        purpose: NoisePurpose,
        sum: &[i64],
        (drawn, price): (&impl Noise, &Price),
        step: u64,
    ) -> Result<Vec<i64>> {
        let sequence = self.ledger.entries().len() as u64;
        let mut stream = self.noise.stream(&self.agent, PRODUCT, sequence, purpose)?;
        let noised = drawn.privatize(sum, &mut stream);
        let query_digest = *Digest::of(format!("{} {step}", purpose.label()).as_bytes()).as_bytes();
        let request = CommitRequest { event: price.event.clone(), step, query_digest };
        self.ledger.commit(reservation, request, &noised.encode(), 0)?;
        Ok(noised.into_inner())
    }

    /// ε of everything debited so far.
    pub(crate) fn epsilon_spent(&self) -> Option<f64> {
        self.ledger.balance(PRODUCT)?.epsilon_spent.map(tabmesh_privacy::budget::Epsilon::get)
    }
}

/// Name of the one product of a virtual domain.
const PRODUCT: &str = "scenario.rows";
/// Parts of a budget that may be granted.
const PARTS: u64 = 1_000_000;
/// Integer steps of a count: σ stays above the least that may be drawn.
const TOTAL_SCALE: u64 = 1 << 16;
