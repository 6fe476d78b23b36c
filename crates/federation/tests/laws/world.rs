//! The shared stage: agents with one-hot updates, so that a sum of zeros and ones is right and a 2 is a double count.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use tabmesh_federation::id::{AgentId, CollectionId, Digest};
use tabmesh_federation::phase::collect::{Announcement, Payloads, Quorum, Submission};
use tabmesh_federation::phase::{Outcome, Receipt, Refusal};
use tabmesh_federation::schedule::Window;
use tabmesh_federation::screen::{Plausible, ScreenLimits};
use tabmesh_federation::vector::Vector;

/// Agents in the roster; one more exists outside it.
pub(crate) const AGENTS: usize = 5;
/// First late millisecond: opened at 1000, deadline after 60 s.
pub(crate) const DEADLINE_MS: i64 = 61_000;
/// First millisecond after grace.
pub(crate) const ENDS_MS: i64 = 71_000;

pub(crate) fn agent(i: usize) -> AgentId {
    AgentId::new(format!("agent-{i}")).unwrap()
}

pub(crate) fn id(seed: u64) -> CollectionId {
    CollectionId::new(1_000, &mut ChaCha20Rng::seed_from_u64(seed), None)
}

pub(crate) fn announcement(quorum: Quorum) -> Announcement {
    Announcement {
        id: id(1),
        attempt: 1,
        descriptor: Digest::of(b"descriptor"),
        roster: (0..AGENTS).map(agent).collect::<BTreeSet<_>>(),
        quorum,
        window: Window::new(1_000, 60, 10).unwrap(),
        limits: ScreenLimits::new(Plausible {
            len: AGENTS,
            agents: AGENTS,
            max_units: 1,
            unit_max: 1,
            unit_norm: 1,
            sigma_ceil: 1,
        }),
    }
}

/// An update of agent `i`: `amount` at its own position. One is its update; two is another noise draw, which must
/// never be let in beside the first.
pub(crate) fn one_hot(i: usize, amount: i64) -> Arc<[i64]> {
    (0..AGENTS).map(|j| if i == j { amount } else { 0 }).collect()
}

pub(crate) fn submission(i: usize, amount: i64) -> Submission {
    let vector = Vector::new(one_hot(i, amount));
    Submission {
        collection: id(1),
        attempt: 1,
        descriptor: Digest::of(b"descriptor"),
        agent: agent(i),
        payload: *vector.digest(),
        vector,
    }
}

/// A blob store that has every update of these agents.
pub(crate) fn payloads(agents: impl IntoIterator<Item = usize>) -> Payloads {
    agents
        .into_iter()
        .flat_map(|i| [one_hot(i, 1), one_hot(i, 2)])
        .map(|v| (Digest::of_payload(&v), v))
        .collect()
}

/// The rules of collecting, one sentence each.
#[derive(Debug)]
pub(crate) struct Oracle {
    /// First accepted update of each agent: amount and receipt.
    pub(crate) accepted: BTreeMap<usize, (i64, Receipt)>,
    /// Latest time seen.
    pub(crate) now: i64,
    /// None while collecting, then whether there are enough updates.
    pub(crate) ended: Option<bool>,
    needed: usize,
}

impl Oracle {
    pub(crate) fn new(needed: usize) -> Self {
        Self { accepted: BTreeMap::new(), now: 1_000, ended: None, needed }
    }

    /// Time passes; then the end is due if all are in or the deadline has come.
    pub(crate) fn at(&mut self, clock: i64) {
        self.now = self.now.max(clock);
        if self.ended.is_none() {
            if self.accepted.len() == AGENTS {
                self.ended = Some(true);
            } else if self.now >= DEADLINE_MS {
                self.ended = Some(self.accepted.len() >= self.needed);
            }
        }
    }

    /// The one right answer to an update of `amount` by agent `i`.
    pub(crate) fn submit(&mut self, i: usize, amount: i64, clock: i64) -> Answer {
        self.at(clock);
        let answer = match self.accepted.get(&i) {
            _ if i >= AGENTS => Answer::NotInRoster,
            Some((first, receipt)) if *first == amount => Answer::Duplicate(receipt.clone()),
            Some(_) => Answer::Conflict,
            None if self.now >= DEADLINE_MS => Answer::Late,
            None if self.ended.is_some() => Answer::WrongPhase,
            None => {
                let receipt = Receipt {
                    collection: id(1),
                    attempt: 1,
                    agent: agent(i),
                    payload: Digest::of_payload(&one_hot(i, amount)),
                    received_ms: self.now,
                };
                self.accepted.insert(i, (amount, receipt.clone()));
                Answer::Accepted(receipt)
            }
        };
        self.at(clock);
        answer
    }

    /// The sum over what was accepted: each agent 0 or 1 times.
    pub(crate) fn sum(&self) -> Vec<i64> {
        (0..AGENTS).map(|i| self.accepted.get(&i).map_or(0, |(amount, _)| *amount)).collect()
    }

    pub(crate) fn receipts(&self) -> Vec<Receipt> {
        self.accepted.values().map(|(_, receipt)| receipt.clone()).collect()
    }
}

/// An answer, reduced to what the oracle can know.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    Accepted(Receipt),
    Duplicate(Receipt),
    NotInRoster,
    Conflict,
    Late,
    WrongPhase,
    Applied,
    Other(String),
}

pub(crate) fn answer(outcome: &Outcome) -> Answer {
    match outcome {
        Outcome::Accepted(receipt) => Answer::Accepted(receipt.clone()),
        Outcome::Duplicate(receipt) => Answer::Duplicate(receipt.clone()),
        Outcome::Applied => Answer::Applied,
        Outcome::Refused(Refusal::NotInRoster { .. }) => Answer::NotInRoster,
        Outcome::Refused(Refusal::Conflict { .. }) => Answer::Conflict,
        Outcome::Refused(Refusal::Late { .. }) => Answer::Late,
        Outcome::Refused(Refusal::WrongPhase { .. }) => Answer::WrongPhase,
        Outcome::Refused(other) => Answer::Other(other.to_string()),
    }
}
