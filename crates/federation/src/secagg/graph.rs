//! Who exchanges shares and masks with whom: everybody, or the `degree` nearest on a ring in random order.
//!
//! Bell, Bonawitz, Gascón, Lepoint, Raykova 2020 ("Secure Single-Server Aggregation with (Poly)Logarithmic
//! Overhead", §3) take a Harary graph over a random permutation: each agent is joined to degree/2 agents on either
//! side. The order comes from a seed that all agents commit to before any of them reveals its part, so neither the
//! server nor colluders choose it, and a missing part ends the attempt: leaving parts out would be a choice.
//!
//! The server may choose whom to drop *after* it knows the graph. So each agent refuses to unmask if more than
//! `max_dropped` of its neighbours are gone. Then, with C colluders fixed before the seed, two things can go
//! wrong, each with the probability that [`Regular::security_bits`] bounds:
//! - an agent has `share_threshold` colluding neighbours, who could open both of its secrets;
//! - the honest survivors fall into parts whose sums could be told apart. On a ring this takes an honest survivor
//!   one of whose sides has no honest survivor left: of degree/2 agents at least degree/2 − max_dropped collude.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::id::Digest;
use crate::secagg::keys::{Label, Nonce, Secret, derive};
use crate::secagg::mask::{CHUNK_BYTES, Keystream};
use crate::secagg::roster::Seat;

/// Shape of the neighbour graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Topology {
    /// Everybody with everybody; shares need the descriptor's threshold.
    Complete,
    /// A ring in random order.
    Regular(Regular),
}

impl Topology {
    /// The graph of a sum over `agents`: complete up to [`MAX_COMPLETE`], above it the smallest ring that will do.
    ///
    /// `least` is the fewest agents that may be left after the first phase.
    ///
    /// # Errors
    /// [`GraphError::None`] if no ring bears so many dropouts and colluders.
    pub fn for_cohort(
        agents: usize,
        least: usize,
        dropouts: u32,
        colluders: u32,
    ) -> Result<Self, GraphError> {
        if agents <= MAX_COMPLETE {
            return Ok(Self::Complete);
        }
        Regular::for_cohort(agents, least, dropouts, colluders).map(Self::Regular)
    }

    /// Neighbours that each of `agents` has.
    #[must_use]
    pub fn degree(&self, agents: usize) -> usize {
        match self {
            Self::Complete => agents.saturating_sub(1),
            Self::Regular(shape) => shape.degree as usize,
        }
    }
}

/// A ring in random order, each agent joined to the `degree` nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Regular {
    /// Neighbours of an agent: even.
    pub degree: u32,
    /// Shares needed of the `degree` + 1 there are (one stays with its owner).
    pub share_threshold: u32,
    /// Most neighbours that may be missing from the survivors.
    pub max_dropped: u32,
}

/// Why a graph can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
pub enum GraphError {
    /// Degree odd, zero, or not below the number of agents; or thresholds that don't fit it.
    #[error(
        "graph of degree {}, share threshold {}, {} dropped at most: doesn't fit {agents} agents",
        shape.degree, shape.share_threshold, shape.max_dropped
    )]
    Shape {
        /// What was stated.
        shape: Regular,
        /// Agents there are.
        agents: usize,
    },
    /// The chance of a bad order is too high.
    #[error(
        "graph over {agents} agents with {colluders} colluders: expected a failure below 2^-{SECURITY_BITS}, got 2^-{bits:.1}"
    )]
    Insecure {
        /// Agents there are.
        agents: usize,
        /// Colluders assumed.
        colluders: u32,
        /// Bits of security it has.
        bits: f64,
    },
    /// No degree below the number of agents is enough.
    #[error(
        "no ring over {agents} agents bears {dropouts} dropouts and {colluders} colluders: assume fewer, or use the complete graph over at most {MAX_COMPLETE} agents"
    )]
    None {
        /// Agents there are.
        agents: usize,
        /// Dropouts to bear.
        dropouts: u32,
        /// Colluders assumed.
        colluders: u32,
    },
}

impl Regular {
    /// The smallest degree over `agents` that is secure against `colluders` (failure below 2⁻[`SECURITY_BITS`])
    /// and comes through `dropouts` at random (failure below 2⁻[`LIVENESS_BITS`]).
    ///
    /// `least` is the fewest agents that may be left after the first phase; security is held against that number.
    ///
    /// # Errors
    /// [`GraphError::None`] if only the complete graph does.
    pub fn for_cohort(
        agents: usize,
        least: usize,
        dropouts: u32,
        colluders: u32,
    ) -> Result<Self, GraphError> {
        let most = (least.min(agents).saturating_sub(2) as u32).min(MAX_DEGREE);
        for degree in (2..=most).step_by(2) {
            let Some(max_dropped) = (0..degree / 2).find(|max_dropped| {
                let lost = tail(agents - 1, dropouts, degree, max_dropped + 1);
                bits(agents, lost) >= LIVENESS_BITS
            }) else {
                continue;
            };
            let fits = |threshold: &u32| {
                let shape = Self { degree, share_threshold: *threshold, max_dropped };
                shape.security_bits(least, colluders) >= SECURITY_BITS
                    && shape.security_bits(agents, colluders) >= SECURITY_BITS
            };
            if let Some(share_threshold) = (1..=degree - max_dropped).find(fits) {
                return Ok(Self { degree, share_threshold, max_dropped });
            }
        }
        Err(GraphError::None { agents, dropouts, colluders })
    }

    /// −log₂ of a bound on the chance that the order is bad for anybody among `agents`, `colluders` of whom collude.
    #[must_use]
    pub fn security_bits(&self, agents: usize, colluders: u32) -> f64 {
        let others = agents.saturating_sub(1);
        let opened = tail(others, colluders, self.degree, self.share_threshold);
        // Either side of each agent.
        let side = self.degree / 2;
        let cut = 2.0 * tail(others, colluders, side, side.saturating_sub(self.max_dropped));
        bits(agents, opened + cut)
    }

    /// Checks shape and security over so many agents.
    ///
    /// # Errors
    /// [`GraphError::Shape`] or [`GraphError::Insecure`].
    pub fn check(&self, agents: usize, colluders: u32) -> Result<(), GraphError> {
        let Self { degree, share_threshold, max_dropped } = *self;
        let even = degree >= 2 && degree % 2 == 0 && (degree as usize) + 1 < agents;
        let shared = share_threshold >= 1 && share_threshold.saturating_add(max_dropped) <= degree;
        if !even || !shared || max_dropped >= degree / 2 {
            return Err(GraphError::Shape { shape: *self, agents });
        }
        let bits = self.security_bits(agents, colluders);
        if bits >= SECURITY_BITS { Ok(()) } else { Err(GraphError::Insecure { agents, colluders, bits }) }
    }
}

/// Neighbours by seat, the same for everybody who knows seats and seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graph {
    neighbours: BTreeMap<Seat, BTreeSet<Seat>>,
}

impl Graph {
    /// Everybody with everybody.
    #[must_use]
    pub fn complete(seats: &BTreeSet<Seat>) -> Self {
        let others = |seat: &Seat| seats.iter().filter(|other| *other != seat).copied().collect();
        Self { neighbours: seats.iter().map(|seat| (*seat, others(seat))).collect() }
    }

    /// The ring of [`Regular`] in the order a seed gives.
    #[must_use]
    pub fn regular(seats: &BTreeSet<Seat>, degree: u32, seed: &Digest) -> Self {
        let ring = ordered(seats, seed);
        let side = (degree as usize / 2).min(ring.len().saturating_sub(1));
        let mut neighbours: BTreeMap<Seat, BTreeSet<Seat>> =
            seats.iter().map(|seat| (*seat, BTreeSet::new())).collect();
        for (at, seat) in ring.iter().enumerate() {
            for other in ring.iter().cycle().skip(at + 1).take(side) {
                if other != seat {
                    neighbours.entry(*seat).or_default().insert(*other);
                    neighbours.entry(*other).or_default().insert(*seat);
                }
            }
        }
        Self { neighbours }
    }

    /// Neighbours of a seat; nobody for a seat that isn't in it.
    #[must_use]
    pub fn neighbours(&self, seat: Seat) -> &BTreeSet<Seat> {
        self.neighbours.get(&seat).unwrap_or(const { &BTreeSet::new() })
    }

    /// Who holds shares of a seat's secrets: its neighbours and itself.
    #[must_use]
    pub fn holders(&self, seat: Seat) -> BTreeSet<Seat> {
        let mut holders = self.neighbours(seat).clone();
        holders.insert(seat);
        holders
    }
}

/// The public seed of the order: SHA-256 over descriptor and all revealed parts, in the order of seats.
#[must_use]
pub fn seed(descriptor: &Digest, nonces: &BTreeMap<Seat, Nonce>) -> Digest {
    let mut bytes = [Label::GraphOrder.text().as_bytes(), &[0], descriptor.as_bytes()].concat();
    for (seat, nonce) in nonces {
        bytes.extend_from_slice(&seat.index().to_le_bytes());
        bytes.extend_from_slice(nonce.as_bytes());
    }
    Digest::of(&bytes)
}

/// Fisher and Yates' shuffle with keystream of the seed; indices without bias, by drawing again.
fn ordered(seats: &BTreeSet<Seat>, seed: &Digest) -> Vec<Seat> {
    let mut ring: Vec<Seat> = seats.iter().copied().collect();
    let key = derive(&Secret::from_bytes(*seed.as_bytes()), Label::GraphOrder, seed, [Seat::new(0); 2]);
    let mut words = Words::new(&key);
    for last in (1..ring.len()).rev() {
        ring.swap(last, words.below(last as u64 + 1) as usize);
    }
    ring
}

/// Keystream read as little-endian 64-bit words.
struct Words {
    keystream: Keystream,
    chunk: u64,
    /// What is left of the chunk, its first word last.
    words: Vec<u64>,
}

impl Words {
    fn new(key: &Secret) -> Self {
        Self { keystream: Keystream::new(key), chunk: 0, words: Vec::new() }
    }

    fn next(&mut self) -> u64 {
        loop {
            if let Some(word) = self.words.pop() {
                return word;
            }
            let mut bytes = [0; CHUNK_BYTES];
            self.keystream.fill(self.chunk, &mut bytes);
            self.chunk += 1;
            self.words.extend(bytes.as_chunks().0.iter().rev().map(|word| u64::from_le_bytes(*word)));
        }
    }

    /// Uniform in 0..bound: words from the incomplete last multiple of `bound` are drawn again.
    fn below(&mut self, bound: u64) -> u64 {
        let usable = u64::MAX - u64::MAX % bound;
        loop {
            let word = self.next();
            if word < usable {
                return word % bound;
            }
        }
    }
}

/// −log₂ of `agents` times a probability.
fn bits(agents: usize, probability: f64) -> f64 {
    -(agents as f64 * probability).log2()
}

/// P[X ≥ `at_least`] for the number X of marked ones among `draws` out of `population` without replacement,
/// `marked` of whom are marked (hypergeometric).
fn tail(population: usize, marked: u32, draws: u32, at_least: u32) -> f64 {
    let (population, marked, draws) = (population as u64, u64::from(marked), u64::from(draws));
    let marked = marked.min(population);
    let draws = draws.min(population);
    let least = u64::from(at_least).max((draws + marked).saturating_sub(population));
    let all = ln_choose(population, draws);
    let term = |hit| (ln_choose(marked, hit) + ln_choose(population - marked, draws - hit) - all).exp();
    // From the smallest term up, so that small ones aren't lost.
    let sum: f64 = (least..=marked.min(draws)).rev().map(term).sum();
    sum.min(1.0)
}

/// ln of the binomial coefficient; minus infinity if it is zero.
fn ln_choose(n: u64, k: u64) -> f64 {
    if k > n {
        return f64::NEG_INFINITY;
    }
    match [n, k, n - k].map(|of| LN_FACTORIALS.get(of as usize)) {
        [Some(n), Some(k), Some(rest)] => n - k - rest,
        _ => (0..k.min(n - k)).map(|i| ((n - i) as f64 / (i + 1) as f64).ln()).sum(),
    }
}

/// ln n! by n, for every cohort that a plan may have: a search for a ring asks for millions of them.
static LN_FACTORIALS: LazyLock<Vec<f64>> = LazyLock::new(|| {
    let logs = (1..=crate::plan::MAX_AGENTS).scan(0.0, |sum, n| {
        *sum += f64::from(n).ln();
        Some(*sum)
    });
    std::iter::once(0.0).chain(logs).collect()
});

/// Most agents that are all joined with each other; above, an agent's work would grow with the cohort.
pub const MAX_COMPLETE: usize = 128;
/// Most neighbours on a ring: their sealed shares fit one answer.
pub const MAX_DEGREE: u32 = 384;
/// −log₂ of the largest chance of a graph that is bad for somebody, for each attempt.
pub const SECURITY_BITS: f64 = 40.0;
/// −log₂ of the largest chance that dropouts at random end an attempt.
pub const LIVENESS_BITS: f64 = 20.0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn seats(n: u16) -> BTreeSet<Seat> {
        (0..n).map(Seat::new).collect()
    }

    // Exact fractions in Python: sum(comb(m, h) * comb(M - m, N - h) for h in range(k, min(m, N) + 1)) / comb(M, N).
    #[test]
    fn tails_are_the_exact_ones() {
        for ((population, marked, draws, at_least), expected) in EXACT {
            let got = tail(population, marked, draws, at_least);
            assert!((got / expected - 1.0).abs() < 1e-9, "{got} {expected}");
        }
        assert!((tail(10, 3, 4, 0) - 1.0).abs() < 1e-12);
        assert!(tail(10, 3, 4, 4) <= 0.0);
    }

    #[test]
    fn degrees_grow_with_what_they_bear() {
        let degree = |n, d, c| Regular::for_cohort(n, n - d as usize, d, c).map(|shape| shape.degree);
        let (light, medium, heavy) =
            (degree(1000, 50, 20).unwrap(), degree(1000, 100, 50).unwrap(), degree(1000, 100, 100).unwrap());
        assert!(light < medium && medium < heavy, "{light} {medium} {heavy}");
        assert!((60..=160).contains(&medium), "{medium}");
        assert!(matches!(degree(20, 5, 5), Err(GraphError::None { .. })));
    }

    #[test]
    fn a_cohorts_shape_passes_its_own_check_and_weaker_ones_do_not() {
        let shape = Regular::for_cohort(1000, 900, 100, 50).unwrap();
        for agents in [900, 950, 1000] {
            assert_eq!(shape.check(agents, 50), Ok(()), "{agents}");
        }
        let thin = Regular { degree: shape.degree - 20, ..shape };
        assert!(matches!(thin.check(1000, 50), Err(GraphError::Insecure { .. })), "{thin:?}");
        let lenient = Regular { max_dropped: shape.max_dropped + 10, share_threshold: 20, ..shape };
        assert!(lenient.check(1000, 50).is_err());
        for bad in [
            Regular { degree: shape.degree + 1, ..shape },
            Regular { degree: 0, ..shape },
            Regular { degree: 1000, ..shape },
            Regular { share_threshold: 0, ..shape },
            Regular { share_threshold: shape.degree, ..shape },
        ] {
            assert!(matches!(bad.check(1000, 50), Err(GraphError::Shape { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_ring_is_regular_symmetric_and_moves_with_its_seed() {
        let all = seats(150);
        let graph = Graph::regular(&all, 20, &Digest::of(b"one"));
        for seat in &all {
            let neighbours = graph.neighbours(*seat);
            assert_eq!(neighbours.len(), 20);
            assert!(!neighbours.contains(seat) && graph.holders(*seat).len() == 21);
            assert!(neighbours.iter().all(|other| graph.neighbours(*other).contains(seat)));
        }
        assert_eq!(graph, Graph::regular(&all, 20, &Digest::of(b"one")));
        assert_ne!(graph, Graph::regular(&all, 20, &Digest::of(b"two")));
        assert!(graph.neighbours(Seat::new(150)).is_empty());
    }

    #[test]
    fn a_ring_too_small_for_its_degree_is_complete() {
        let all = seats(7);
        assert_eq!(Graph::regular(&all, 20, &Digest::of(b"x")), Graph::complete(&all));
    }

    // Chi-square over the 24 orders of four seats from 4,800 seeds; 23 degrees of freedom, 1e-6 quantile 70.
    #[test]
    fn orders_are_uniform() {
        let all = seats(4);
        let mut counts: BTreeMap<Vec<Seat>, f64> = BTreeMap::new();
        for i in 0..4800_u32 {
            *counts.entry(ordered(&all, &Digest::of(&i.to_le_bytes()))).or_default() += 1.0;
        }
        assert_eq!(counts.len(), 24);
        let chi: f64 = counts.values().map(|count| (count - 200.0).powi(2) / 200.0).sum();
        assert!(chi < 70.0, "{chi}");
    }

    // What the module text argues: with honest survivors that each miss at most `max_dropped` neighbours, honest
    // survivors stay connected for adversarial drops. The worst a server can do on a ring is to drop a run of
    // neighbours.
    #[test]
    fn dropping_a_run_isolates_nobody_who_checks() {
        let all = seats(200);
        let order = ordered(&all, &Digest::of(b"ring"));
        let graph = Graph::regular(&all, 20, &Digest::of(b"ring"));
        for run in 0..20 {
            let dropped: BTreeSet<Seat> =
                order.iter().take(run).chain(order.iter().skip(100).take(run)).copied().collect();
            let left: BTreeSet<Seat> = all.difference(&dropped).copied().collect();
            let missing = |seat: &Seat| graph.neighbours(*seat).intersection(&dropped).count();
            let accepted = left.iter().all(|seat| missing(seat) < 10);
            let mut reached = BTreeSet::from([*left.first().unwrap()]);
            let mut queue: Vec<Seat> = reached.iter().copied().collect();
            while let Some(seat) = queue.pop() {
                for next in graph.neighbours(seat).intersection(&left) {
                    if reached.insert(*next) {
                        queue.push(*next);
                    }
                }
            }
            assert_eq!(accepted, run < 10);
            assert_eq!(reached == left, run < 10, "a run of {run} on both sides");
        }
    }

    /// Population, marked, draws, at least; and the tail.
    type Case = ((usize, u32, u32, u32), f64);

    const EXACT: [Case; 4] = [
        ((999, 50, 50, 20), 2.712818382994472e-15),
        ((999, 100, 100, 30), 1.930852039506755e-9),
        ((149, 10, 20, 5), 0.004325927194658818),
        ((20, 10, 10, 10), 5.412544112234515e-6),
    ];
}
