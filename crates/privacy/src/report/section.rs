//! The derived figures of a report.

use crate::accountant::{gdp, zcdp};
use crate::budget::{Delta, Epsilon, Rho};
use crate::ledger::window::DAY_MS;
use crate::ledger::{Purpose, RefusalRule};
use crate::mechanism::MechanismEvent;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A loss as ρ and as ε.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spending {
    /// Sum of ρ, exact.
    pub rho: Rho,
    /// ε by the zCDP conversion: the claim. Nothing where nothing was spent.
    pub epsilon: Option<Epsilon>,
    /// ε if the noise were continuous Gaussian: for comparison only.
    pub epsilon_gaussian: Option<Epsilon>,
}

impl Spending {
    /// Converts a sum of ρ at a δ.
    #[must_use]
    pub fn of(rho: Rho, delta: Delta) -> Self {
        let some = rho > Rho::ZERO;
        Self {
            rho,
            epsilon: some.then(|| zcdp::epsilon(rho, delta)),
            epsilon_gaussian: some.then(|| gdp::epsilon(rho, delta)),
        }
    }
}

/// A grant's figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Granted {
    /// Granted ε.
    pub epsilon: Epsilon,
    /// The one fixed δ.
    pub delta: Delta,
    /// What they buy; the limit of the account is the smallest of its products' grants.
    pub rho: Rho,
    /// Who signed the policy.
    pub signer: String,
    /// How fast it may be spent, if that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<WindowFigures>,
}

/// A grant's rolling window at the end of the report's period, or at the ledger's last entry if that is later.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WindowFigures {
    /// Its length in milliseconds.
    pub length_ms: u64,
    /// ε of what may be spent within it.
    pub epsilon: Epsilon,
    /// What that buys: the limit that is enforced.
    pub rho: Rho,
    /// Spent within it, alone; the lifetime figure stands beside it, and is the claim.
    pub spent: Spending,
    /// Neither spent within it nor reserved.
    pub left: Rho,
    /// When the oldest of what was spent within it has left it, UTC milliseconds since 1970.
    pub frees_ms: Option<i64>,
}

impl WindowFigures {
    /// Its length in days, rounded up.
    #[must_use]
    pub fn days(&self) -> u64 {
        self.length_ms.div_ceil(DAY_MS)
    }
}

/// Each kind of step alone; the figures don't add up to the total.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ByStep {
    /// Noisy marginal counts.
    pub release: Spending,
    /// Noised adapter gradients.
    pub rounds: Spending,
}

/// What an (ε, δ) means for somebody who tries to tell whether one unit is in the data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Odds {
    /// e^ε: the attacker's odds change by at most this factor.
    pub factor: f64,
    /// Largest share of members found when 1 % of non-members are wrongly accused: min(1, e^ε·0.01 + δ).
    pub found_at_one_percent: f64,
}

impl Odds {
    /// The odds of an (ε, δ); of nothing spent, the odds of guessing.
    #[must_use]
    pub fn of(epsilon: Option<Epsilon>, delta: Delta) -> Self {
        // A factor beyond the largest number says nothing more than the number.
        let factor = epsilon.map_or(1.0, |epsilon| epsilon.get().exp().min(f64::MAX));
        let slack = if epsilon.is_some() { delta.get() } else { 0.0 };
        Self { factor, found_at_one_percent: (factor * FALSE_ALARMS + slack).min(1.0) }
    }

    /// The odds in words.
    #[must_use]
    pub fn sentence(&self) -> String {
        format!(
            "Whoever sees everything released changes their odds that a given unit is in the data by a factor of at \
             most {}; accusing 1 % of outsiders wrongly, they find at most {} % of the members.",
            rounded_up(self.factor, 2),
            rounded_up(self.found_at_one_percent * 100.0, 2),
        )
    }
}

/// What an event line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// Budget given.
    Grant,
    /// Budget set aside.
    Reserve,
    /// Budget spent.
    Commit,
    /// Budget set aside and not used.
    Refund,
}

impl EventKind {
    /// The word in the page.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Grant => "grant",
            Self::Reserve => "reserve",
            Self::Commit => "spend",
            Self::Refund => "refund",
        }
    }
}

/// One entry of an account.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EventLine {
    /// Position in the agent's chain.
    pub seq: u64,
    /// Time in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// What happened.
    pub kind: EventKind,
    /// Product named by the entry or by its reservation.
    pub product: String,
    /// What a reservation or a commit is for.
    pub purpose: Option<Purpose>,
    /// Stage of the release, or number of the round.
    pub step: Option<u64>,
    /// Digest of the plan.
    pub plan_digest: Option<String>,
    /// Mechanism, sensitivity and noise of a commit.
    pub mechanism: Option<MechanismEvent>,
    /// ρ granted, set aside, spent or freed.
    pub rho: Rho,
    /// ε of a commit alone.
    pub epsilon_alone: Option<Epsilon>,
    /// ρ of a secure sum's commit if all other agents and the coordinator collude.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rho_if_all_collude: Option<Rho>,
    /// Who approved the plan.
    pub approvals: Vec<String>,
    /// Whether the noise could be drawn again.
    pub reproducible: bool,
}

/// A plan the agent refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RefusalLine {
    /// Position in the agent's chain.
    pub seq: u64,
    /// Time in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// Digest of the plan.
    pub plan_digest: String,
    /// Why.
    pub rule: RefusalRule,
    /// What it asked for.
    pub rho: Rho,
}

/// One product of one agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProductSection {
    /// SPIFFE id of the agent.
    pub agent: String,
    /// Data product.
    pub product: String,
    /// Who the units are.
    pub entity_namespace: String,
    /// Physical source of the rows; products of one source share the figures below.
    pub lineage: String,
    /// What one unit is.
    pub unit: String,
    /// Which data sets count as neighbours.
    pub adjacency: String,
    /// The product's grant.
    pub granted: Granted,
    /// Spent over the lifetime.
    pub spent: Spending,
    /// Spent within the report's period, alone.
    pub spent_in_period: Spending,
    /// Spent if every open reservation is used up.
    pub charged: Spending,
    /// Neither spent nor reserved; ε as if the rest were spent alone.
    pub left: Spending,
    /// Each kind of step alone.
    pub by_step: ByStep,
    /// Odds of what is spent.
    pub odds_spent: Odds,
    /// Odds if the whole grant is used up.
    pub odds_granted: Odds,
    /// Entries of the account.
    pub events: Vec<EventLine>,
    /// Refused plans of the product.
    pub refusals: Vec<RefusalLine>,
    /// Whether any entry was made under reproducible noise.
    pub reproducible: bool,
}

/// The total of one entity namespace over all products and agents: who is in several of them loses this much.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Headline {
    /// Who the units are.
    pub entity_namespace: String,
    /// Number of its accounts.
    pub accounts: usize,
    /// How many of them one unit is in at most, where owners declared sources disjoint; otherwise it may be in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_at_most: Option<usize>,
    /// Smallest δ of their grants.
    pub delta: Delta,
    /// The most that one unit can have lost.
    pub spent: Spending,
    /// The same if every open reservation is used up.
    pub charged: Spending,
}

/// A number rounded up to so many decimals, without trailing zeros.
pub(super) fn rounded_up(value: f64, decimals: i32) -> String {
    let scale = 10f64.powi(decimals);
    let rounded = (value * scale).ceil() / scale;
    // Very large numbers have no decimals to round.
    if rounded.is_finite() { format!("{rounded}") } else { format!("{value:e}") }
}

const FALSE_ALARMS: f64 = 0.01;
