//! Federated rounds of a small model over virtual domains, on the product's own parts.
//!
//! Each domain has its contract's rows, a ledger that grants, reserves and debits, and the product's clipping and exact noise;
//! the server has the round's state machine with its deadline, quorum and screen, the aggregation rules and the server
//! optimiser. No process, socket or file is involved and time is virtual, so a run is a function of scenario and seed. Noise
//! follows from the seed: reproducible, not private.
//!
//! What one round costs: under unit `row` with one gradient, one noised sum; with local steps, one noised sum a step (the
//! change that is sent is then post-processing); under unit `domain`, one noised change. A cohort above
//! [`MAX_HELD`] domains is summed update by update, so memory doesn't grow with it; rules that need single updates
//! refuse such a cohort.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tabmesh_federation::aggregate::fedbuff::Buffer;
use tabmesh_federation::aggregate::optimiser::ServerOptimiser;
use tabmesh_federation::aggregate::strategy::{FederatedStrategy, LocalWork, Pace, Point};
use tabmesh_federation::aggregate::{Aggregate, Contributions, Running, Scaffold, Updates};
use tabmesh_federation::descriptor::scale_for;
use tabmesh_federation::id::{AgentId, Digest, PlanDigest, RoundId};
use tabmesh_federation::phase::collect::{Announcement, ByAgent, Quorum, Submission};
use tabmesh_federation::phase::{Outcome, Refusal};
use tabmesh_federation::round::{Phase, Round, RoundEvent};
use tabmesh_federation::schedule::Window;
use tabmesh_federation::screen::{Plausible, ScreenLimits, TAIL_SIGMAS};
use tabmesh_federation::secagg::noise::NoisePlan;
use tabmesh_federation::vector::Vector;
use tabmesh_privacy::accountant::zcdp;
use tabmesh_privacy::budget::{Delta, Epsilon, Rho};
use tabmesh_privacy::clip::{integer_norm, quantize_clipped};
use tabmesh_privacy::ledger::LedgerError;
use tabmesh_privacy::mechanism::{DiscreteGaussian, Mechanism, Noise as _};

use super::account::{Account, Price};
use super::document::{Attack, Exhausted, Federation, Placement, Privacy, Unit};
use super::learner::features::Rows;
use super::learner::{Learner, learner};

/// A domain of a simulation.
pub(crate) struct VirtualDomain {
    /// Name for people.
    pub(crate) domain: String,
    /// Training rows.
    pub(crate) train: Rows,
    /// Training rows of each privacy unit.
    pub(crate) units: Vec<Vec<usize>>,
    /// Test rows.
    pub(crate) test: Rows,
    /// Entity of each of them.
    pub(crate) entities: Arc<Vec<u32>>,
}

/// What is heard of a round.
pub(crate) struct RoundEnd<'a> {
    /// Number of the round, from 1.
    pub(crate) round: u32,
    /// What would be shipped now.
    pub(crate) parameters: &'a [f64],
    /// What went on since the last evaluation, and ε so far.
    pub(crate) counts: Counts,
    /// The model.
    pub(crate) learner: &'a dyn Learner,
}

/// Updates by their fate, rounds without a step, and the largest ε of any domain.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Counts {
    pub(crate) accepted: u32,
    pub(crate) dropped: u32,
    pub(crate) late: u32,
    pub(crate) screened: u32,
    /// Updates that a ledger refused.
    pub(crate) exhausted: u32,
    pub(crate) abandoned: u32,
    /// None without privacy.
    pub(crate) epsilon: Option<f64>,
}

/// Runs a federation; `hear` is called after each evaluated round.
///
/// # Errors
/// No domain or no column, noise that can't be drawn, a rule that refuses the updates, a figure out of range.
pub(crate) fn run(
    spec: &Federation,
    domains: &[VirtualDomain],
    seed: u64,
    plan: PlanDigest,
    hear: &mut dyn FnMut(&RoundEnd<'_>) -> Result<()>,
) -> Result<()> {
    let mut world = World::new(spec, domains, seed, plan)?;
    match spec.strategy.pace() {
        Pace::Rounds => world.rounds(hear),
        Pace::Buffered { size } => world.buffered(size, hear),
    }
}

/// The figures of a round's noise, all public.
struct Noise {
    /// What each agent adds.
    drawn: Mechanism,
    /// What the ledger is told.
    price: Price,
    /// Under shared noise, how it is divided.
    shares: Option<NoisePlan>,
}

/// One virtual agent.
struct Agent<'a> {
    id: AgentId,
    rows: &'a VirtualDomain,
    account: Option<Account>,
    /// Units it stands for: exact without privacy, noisy under unit `row`, 1 under unit `domain`.
    total: f64,
    /// Its control variate, if the strategy keeps them.
    control: Vec<f64>,
    liar: bool,
    /// Rounds that it is there for.
    there: Range<u32>,
}

struct World<'a> {
    spec: &'a Federation,
    plan: PlanDigest,
    learner: Box<dyn Learner>,
    agents: Vec<Agent<'a>>,
    rng: ChaCha20Rng,
    ids: ChaCha20Rng,
    parameters: Vec<f64>,
    optimiser: ServerOptimiser,
    shared_control: Vec<f64>,
    noise: Option<Noise>,
    /// Norm that what is sent for one unit is clipped to, and its integer scale.
    sent: (f64, u64),
    last_round: Option<RoundId>,
    counts: Counts,
}

impl<'a> World<'a> {
    fn new(spec: &'a Federation, domains: &'a [VirtualDomain], seed: u64, plan: PlanDigest) -> Result<Self> {
        let width = domains.first().context("a federation needs a domain")?.train.width;
        let learner = learner(spec.model, width);
        let dimension = learner.dimension();
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let parameters = learner.initial(&mut rng);
        let liars = liars(spec, domains.len(), &mut rng);
        let there = presence(spec, domains.len(), &mut rng);
        let short = exhausted(spec, domains.len(), &mut rng);
        let sent_norm = sent_norm(spec);
        let scale = scale_for(sent_norm);
        let budget = spec.privacy.as_ref().map(|privacy| Budget::of(spec, privacy)).transpose()?;
        let asked = asked(spec, domains.len());
        let noise = budget.as_ref().map(|budget| noise(spec, budget, asked, dimension)).transpose()?;
        let mut agents = Vec::with_capacity(domains.len());
        for ((i, rows), there) in domains.iter().enumerate().zip(there) {
            let id = AgentId::new(format!("domain-{i:05}"))?;
            let mut account = match &budget {
                Some(budget) => {
                    let granted = short.get(&i).copied().unwrap_or(1.0);
                    Some(Account::open(&id, seed, &plan.to_string(), budget, granted)?)
                }
                None => None,
            };
            let total = match (&spec.privacy, &mut account) {
                (Some(Privacy { unit: Unit::Row, .. }), Some(account)) => {
                    account.release_total(rows.units.len())?.max(1.0)
                }
                (Some(_), _) => 1.0,
                (None, _) => (rows.units.len() as f64).max(1.0),
            };
            let control = if spec.strategy.keeps_controls() { vec![0.0; dimension] } else { Vec::new() };
            agents.push(Agent { id, rows, account, total, control, liar: liars.contains(&i), there });
        }
        let optimiser_spec = spec.optimiser.unwrap_or_else(|| spec.strategy.optimiser());
        let steps = match spec.strategy.pace() {
            Pace::Rounds => spec.rounds,
            Pace::Buffered { size } => {
                let arrivals = u64::from(spec.rounds) * agents.len() as u64;
                u32::try_from(arrivals.div_ceil(u64::from(size)).max(1)).unwrap_or(u32::MAX)
            }
        };
        Ok(Self {
            spec,
            plan,
            optimiser: ServerOptimiser::new(optimiser_spec, steps, dimension),
            learner,
            agents,
            rng,
            ids: ChaCha20Rng::seed_from_u64(seed ^ IDS),
            shared_control: if spec.strategy.keeps_controls() { vec![0.0; dimension] } else { Vec::new() },
            parameters,
            noise,
            sent: (sent_norm, scale),
            last_round: None,
            counts: Counts::default(),
        })
    }

    /// Synchronous rounds.
    fn rounds(&mut self, hear: &mut dyn FnMut(&RoundEnd<'_>) -> Result<()>) -> Result<()> {
        for round in 0..self.spec.rounds {
            let asked = self.draw(round);
            let mean = if asked.len() > MAX_HELD {
                self.streamed(round, &asked)?
            } else {
                self.collected(round, &asked)?
            };
            match mean {
                Some((mean, took_part)) => self.step(&mean, took_part)?,
                None => {
                    self.counts.abandoned += 1;
                    self.optimiser = self.optimiser.skip(&self.parameters)?;
                }
            }
            self.tell(round, hear)?;
        }
        Ok(())
    }

    /// The server's step on a mean.
    fn step(&mut self, mean: &[f64], took_part: usize) -> Result<()> {
        // A gradient's unit is the clip norm, as in plans; a change is a step already.
        let unit = match self.spec.strategy.local_work() {
            LocalWork::Gradient => self.spec.clip_norm,
            LocalWork::Steps => 1.0,
        };
        (self.parameters, self.optimiser) = self.optimiser.step(&self.parameters, mean, unit)?;
        if self.spec.strategy.keeps_controls() {
            let share = took_part as f64 / self.agents.len() as f64;
            let Federation { local_steps, local_rate, .. } = *self.spec;
            self.shared_control =
                Scaffold::shared_after(&self.shared_control, mean, share, local_steps, local_rate);
        }
        Ok(())
    }

    fn tell(&mut self, round: u32, hear: &mut dyn FnMut(&RoundEnd<'_>) -> Result<()>) -> Result<()> {
        let last = round + 1 == self.spec.rounds;
        if !last && !(round + 1).is_multiple_of(self.spec.evaluate_every) {
            return Ok(());
        }
        let spent = self.agents.iter().filter_map(|agent| agent.account.as_ref()?.epsilon_spent());
        let epsilon = spent.reduce(f64::max);
        let counts = Counts { epsilon, ..std::mem::take(&mut self.counts) };
        let parameters = self.optimiser.averaged(&self.parameters);
        hear(&RoundEnd { round: round + 1, parameters: &parameters, counts, learner: &*self.learner })
    }

    /// Who is asked this round, in agent order.
    fn draw(&mut self, round: u32) -> Vec<usize> {
        let there = |at: &usize| self.agents.get(*at).is_some_and(|agent| agent.there.contains(&round));
        let mut order: Vec<usize> = (0..self.agents.len()).filter(there).collect();
        let asked = asked(self.spec, order.len());
        if asked < order.len() {
            order.shuffle(&mut self.rng);
            order.truncate(asked);
            order.sort_unstable();
        }
        order
    }

    /// What an asked agent does: answers in time, late, or never.
    fn fate(&mut self) -> Fate {
        let faults = &self.spec.faults;
        if self.rng.random_bool(faults.dropout) {
            return Fate::Dropped;
        }
        match &faults.stragglers {
            Some(stragglers) if self.rng.random_bool(stragglers.share) => Fate::Late(stragglers.late_by),
            _ => Fate::InTime,
        }
    }

    /// A round through the product's state machine: the mean and how many took part, or none if it was abandoned.
    fn collected(&mut self, round: u32, asked: &[usize]) -> Result<Option<(Vec<f64>, usize)>> {
        let opened_ms = i64::from(round) * ROUND_MS;
        let id = RoundId::new(opened_ms, &mut self.ids, self.last_round);
        self.last_round = Some(id);
        let descriptor = Digest::of(format!("{} {round}", self.plan).as_bytes());
        let window = Window::new(opened_ms, DEADLINE_S, GRACE_S)?;
        let roster: BTreeSet<AgentId> =
            asked.iter().filter_map(|at| self.agents.get(*at)).map(|agent| agent.id.clone()).collect();
        let announcement = Announcement {
            id,
            attempt: 1,
            descriptor,
            roster,
            quorum: Quorum::AtLeast { updates: self.spec.quorum },
            window,
            limits: self.limits(asked.len()),
        };
        let mut machine = Round::new(self.plan, round, announcement);
        machine = machine.apply(RoundEvent::Opened, opened_ms).next;
        let mut answers = self.answers(round, asked)?;
        // In the order of arrival: time doesn't run back.
        answers.sort_by_key(|(_, _, fate)| *fate != Fate::InTime);
        for (at, update, fate) in answers {
            let arrives_ms = match fate {
                Fate::InTime => opened_ms + 1,
                Fate::Late(_) => opened_ms + i64::from(DEADLINE_S) * 1000,
                Fate::Dropped => continue,
            };
            let Some(agent) = self.agents.get(at) else { continue };
            let vector = Vector::new(update);
            let submission = Submission {
                collection: id,
                attempt: 1,
                descriptor,
                agent: agent.id.clone(),
                payload: *vector.digest(),
                vector,
            };
            let step = machine.apply(RoundEvent::UpdateReceived(submission), arrives_ms);
            machine = step.next;
            match step.outcome {
                Outcome::Accepted(_) => self.counts.accepted += 1,
                Outcome::Refused(Refusal::Screened(_)) => self.counts.screened += 1,
                _ => self.counts.late += 1,
            }
        }
        let deadline_ms = opened_ms + i64::from(DEADLINE_S) * 1000;
        machine = machine.apply(RoundEvent::DeadlineReached, deadline_ms).next;
        let Phase::Aggregate(aggregating) = machine.phase() else { return Ok(None) };
        let values = aggregating.collection.values();
        self.mean(values).map(|mean| mean.map(|mean| (mean, values.len())))
    }

    /// The rule's mean over accepted updates; none if shared noise doesn't suffice.
    fn mean(&self, values: &ByAgent) -> Result<Option<Vec<f64>>> {
        let totals = self.totals(|id| values.contains_key(id));
        let mut sum = Running::new(self.learner.dimension());
        let contributions = match &self.noise {
            Some(Noise { shares: Some(shares), .. }) => {
                if !shares.suffices(values.len()) {
                    return Ok(None);
                }
                values.values().try_for_each(|update| sum.add(update))?;
                Contributions::SumOnly(sum.sum())
            }
            _ => Contributions::Separate(values),
        };
        let divisor = totals.values().sum();
        let updates = Updates { contributions, scale: self.sent.1 as f64, divisor, totals: &totals };
        Ok(Some(self.spec.strategy.rule().mean(&updates)?))
    }

    /// A round whose updates are added as they come. Nothing but the sum is kept.
    fn streamed(&mut self, round: u32, asked: &[usize]) -> Result<Option<(Vec<f64>, usize)>> {
        self.spec.strategy.check_sum_only().with_context(|| {
            format!("{} domains are asked, at most {MAX_HELD} updates are held", asked.len())
        })?;
        ensure!(
            !matches!(&self.spec.faults.byzantine, Some(b) if b.attack == Attack::CollusionWithinBound),
            "colluding liars see each other's updates: at most {MAX_HELD} domains, {} are asked",
            asked.len()
        );
        let limits = self.limits(asked.len());
        let mut sum = Running::new(self.learner.dimension());
        let mut counted = BTreeSet::new();
        for at in asked {
            match self.fate() {
                Fate::Dropped => self.counts.dropped += 1,
                Fate::Late(_) => {
                    // It is made, debited and sent, and refused.
                    if self.update(*at, round)?.is_some() {
                        self.counts.late += 1;
                    }
                }
                Fate::InTime => {
                    let Some(honest) = self.update(*at, round)? else { continue };
                    let update = self.told(*at, honest);
                    let vector = Vector::new(update);
                    if limits.screen(&vector, vector.digest()).is_err() {
                        self.counts.screened += 1;
                        continue;
                    }
                    sum.add(vector.values())?;
                    counted.extend(self.agents.get(*at).map(|agent| agent.id.clone()));
                    self.counts.accepted += 1;
                }
            }
        }
        let suffices = match &self.noise {
            Some(Noise { shares: Some(shares), .. }) => shares.suffices(counted.len()),
            _ => true,
        };
        if counted.len() < self.spec.quorum as usize || !suffices {
            return Ok(None);
        }
        let totals = self.totals(|id| counted.contains(id));
        let divisor = totals.values().sum();
        let contributions = Contributions::SumOnly(sum.sum());
        let updates = Updates { contributions, scale: self.sent.1 as f64, divisor, totals: &totals };
        Ok(Some((self.spec.strategy.rule().mean(&updates)?, counted.len())))
    }

    fn totals(&self, is_in: impl Fn(&AgentId) -> bool) -> BTreeMap<AgentId, f64> {
        let agents = self.agents.iter().filter(|agent| is_in(&agent.id));
        agents.map(|agent| (agent.id.clone(), agent.total)).collect()
    }

    /// What a server may believe of one update. It sees no single one under shared noise.
    fn limits(&self, agents: usize) -> ScreenLimits {
        let len = self.learner.dimension();
        let norm = integer_norm(self.sent.0, self.sent.1).unwrap_or(1);
        let largest = self.agents.iter().map(|agent| agent.total).fold(1.0, f64::max);
        let reach = match &self.noise {
            Some(Noise { shares: Some(_), .. }) => {
                let max_abs = i64::MAX.unsigned_abs() / agents.max(1) as u64;
                return ScreenLimits { len, max_abs, max_norm: u64::MAX };
            }
            // What local steps were noised with is inside the clipped change.
            Some(noise) if !self.noised_in_steps() => noise.drawn.reach(),
            _ => 0.0,
        };
        ScreenLimits::new(Plausible {
            len,
            agents,
            max_units: largest.ceil() as u64,
            unit_max: norm,
            unit_norm: norm,
            sigma_ceil: (reach / TAIL_SIGMAS as f64).ceil() as u64,
        })
    }

    /// Whether noise is added in each local step and none to what is sent.
    fn noised_in_steps(&self) -> bool {
        self.spec.strategy.local_work() == LocalWork::Steps
            && matches!(&self.spec.privacy, Some(privacy) if privacy.unit == Unit::Row)
    }

    /// Everybody's answers, liars' among them.
    fn answers(&mut self, round: u32, asked: &[usize]) -> Result<Vec<(usize, Vec<i64>, Fate)>> {
        let mut answers = Vec::with_capacity(asked.len());
        for at in asked {
            let fate = self.fate();
            if fate == Fate::Dropped {
                self.counts.dropped += 1;
                continue;
            }
            let Some(honest) = self.update(*at, round)? else { continue };
            answers.push((*at, honest, fate));
        }
        let collude =
            matches!(&self.spec.faults.byzantine, Some(b) if b.attack == Attack::CollusionWithinBound);
        let is_liar = |at: &usize| self.agents.get(*at).is_some_and(|agent| agent.liar);
        if collude {
            let liars: Vec<&Vec<i64>> =
                answers.iter().filter(|(at, ..)| is_liar(at)).map(|(_, update, _)| update).collect();
            let against = against(&liars, self.limits(asked.len()));
            for (at, update, _) in &mut answers {
                if is_liar(at) {
                    update.clone_from(&against);
                }
            }
        } else {
            for (at, update, _) in &mut answers {
                *update = self.told(*at, std::mem::take(update));
            }
        }
        Ok(answers)
    }

    /// What an agent says it computed.
    fn told(&self, at: usize, honest: Vec<i64>) -> Vec<i64> {
        let liar = self.agents.get(at).is_some_and(|agent| agent.liar);
        match &self.spec.faults.byzantine {
            Some(byzantine) if liar => match byzantine.attack {
                Attack::SignFlip => honest.iter().map(|v| v.saturating_neg()).collect(),
                // The cast saturates: a liar may say anything.
                Attack::Scaling { factor } => honest.iter().map(|v| (*v as f64 * factor) as i64).collect(),
                Attack::CollusionWithinBound => honest,
            },
            _ => honest,
        }
    }

    /// One agent's honest update; none if its ledger refuses, because its budget is used up.
    fn update(&mut self, at: usize, step: u32) -> Result<Option<Vec<i64>>> {
        match self.computed(at, step) {
            Ok(update) => Ok(Some(update)),
            Err(error) if matches!(error.downcast_ref(), Some(LedgerError::OverReserved { .. })) => {
                self.counts.exhausted += 1;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// One agent's honest update from the present model, noised and debited.
    fn computed(&mut self, at: usize, step: u32) -> Result<Vec<i64>> {
        let start = self.parameters.as_slice();
        let (spec, learner, noise) = (self.spec, &*self.learner, self.noise.as_ref());
        let (norm, scale) = self.sent;
        let agent = self.agents.get_mut(at).context("no such agent")?;
        let rows = agent.rows;
        if spec.strategy.local_work() == LocalWork::Gradient {
            let by_unit = spec.privacy.as_ref().is_none_or(|privacy| privacy.unit == Unit::Row);
            let sum = if by_unit {
                clipped_sum(learner, start, rows, (norm, scale))?
            } else {
                // The domain is the unit: its mean gradient is clipped as a whole.
                quantized(&mean_gradient(learner, start, rows), norm, scale)?
            };
            return sent(agent, noise, step, sum);
        }
        let mut now = start.to_vec();
        for local in 0..spec.local_steps {
            let mut gradient = match (&spec.privacy, noise) {
                (Some(privacy), Some(noise)) if privacy.unit == Unit::Row => {
                    let clip = (spec.clip_norm, scale_for(spec.clip_norm));
                    let sum = clipped_sum(learner, &now, rows, clip)?;
                    let step = step * spec.local_steps + local;
                    let noised = sent(agent, Some(noise), step, sum)?;
                    let factor = 1.0 / (clip.1 as f64 * agent.total.max(1.0));
                    noised.iter().map(|v| *v as f64 * factor).collect()
                }
                _ => mean_gradient(learner, &now, rows),
            };
            let point = Point { start, now: &now, own: &agent.control, shared: &self.shared_control };
            spec.strategy.correct(&point, &mut gradient);
            now.iter_mut().zip(&gradient).for_each(|(w, g)| *w -= spec.local_rate * g);
        }
        let change: Vec<f64> = start.iter().zip(&now).map(|(a, b)| a - b).collect();
        let mut update = quantized(&change, norm, scale)?;
        let by_domain = matches!(&spec.privacy, Some(privacy) if privacy.unit == Unit::Domain);
        let weight = agent.total.round().max(1.0);
        if by_domain {
            update = sent(agent, noise, step, update)?;
        } else {
            // At most 2⁵³ units of at most 2²⁸ steps fit.
            update.iter_mut().for_each(|v| *v = v.saturating_mul(weight as i64));
        }
        if spec.strategy.keeps_controls() {
            // The control follows from what was sent, not from exact gradients.
            let factor = 1.0 / (scale as f64 * weight);
            let told: Vec<f64> = update.iter().map(|v| *v as f64 * factor).collect();
            agent.control = Scaffold::own_after(
                &agent.control,
                &self.shared_control,
                &told,
                spec.local_steps,
                spec.local_rate,
            );
        }
        Ok(update)
    }

    /// Ticks in which every idle agent starts from the present model; the server steps when its buffer is full.
    fn buffered(&mut self, size: u32, hear: &mut dyn FnMut(&RoundEnd<'_>) -> Result<()>) -> Result<()> {
        let mut buffer = Buffer::new(size, self.learner.dimension());
        let mut version = 0_u32;
        // What is on its way: tick of arrival, agent, version it started from, update.
        let mut underway: Vec<(u32, usize, u32, Vec<i64>)> = Vec::new();
        for tick in 0..self.spec.rounds {
            let limits = self.limits(self.agents.len());
            let arrived: Vec<_> = underway.extract_if(.., |(arrival, ..)| *arrival <= tick).collect();
            for (_, at, started, update) in arrived {
                let Some(agent) = self.agents.get(at) else { continue };
                let vector = Vector::new(update);
                if limits.screen(&vector, vector.digest()).is_err() {
                    self.counts.screened += 1;
                    continue;
                }
                self.counts.accepted += 1;
                let staleness = version - started;
                if staleness > 0 {
                    self.counts.late += 1;
                }
                let factor = 1.0 / (self.sent.1 as f64 * agent.total.round().max(1.0));
                let change: Vec<f64> = vector.values().iter().map(|v| *v as f64 * factor).collect();
                if let Some(mean) = buffer.push(&change, staleness) {
                    self.step(&mean, size as usize)?;
                    version += 1;
                }
            }
            let busy: BTreeSet<usize> = underway.iter().map(|(_, at, ..)| *at).collect();
            for at in self.draw(tick) {
                if busy.contains(&at) {
                    continue;
                }
                let arrival = match self.fate() {
                    Fate::Dropped => {
                        self.counts.dropped += 1;
                        continue;
                    }
                    Fate::InTime => tick + 1,
                    Fate::Late(by) => tick + 1 + by,
                };
                let Some(honest) = self.update(at, tick)? else { continue };
                let update = self.told(at, honest);
                underway.push((arrival, at, version, update));
            }
            self.tell(tick, hear)?;
        }
        Ok(())
    }
}

/// When an answer comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    InTime,
    Late(u32),
    Dropped,
}

/// ρ of a federation's parts.
pub(crate) struct Budget {
    pub(crate) epsilon: Epsilon,
    pub(crate) delta: Delta,
    pub(crate) unit: &'static str,
    /// For the count of units; none where the domain is the unit.
    pub(crate) total: Rho,
    /// For all noised vectors.
    pub(crate) vectors: Rho,
    /// For one of them.
    pub(crate) one: Rho,
}

impl Budget {
    fn of(spec: &Federation, privacy: &Privacy) -> Result<Self> {
        let (epsilon, delta) = (Epsilon::new(privacy.epsilon)?, Delta::new(privacy.delta)?);
        let all = zcdp::rho_for(epsilon, delta);
        let by_row = privacy.unit == Unit::Row;
        let total = if by_row { all.share(1, TOTAL_PART) } else { Rho::ZERO };
        let vectors = all.saturating_sub(total);
        let steps =
            if by_row && spec.strategy.local_work() == LocalWork::Steps { spec.local_steps } else { 1 };
        let one = vectors.share(1, u64::from(spec.rounds) * u64::from(steps));
        let unit = if by_row { "row" } else { "domain" };
        Ok(Self { epsilon, delta, unit, total, vectors, one })
    }
}

/// Norm that what is sent for one unit is clipped to.
fn sent_norm(spec: &Federation) -> f64 {
    let by_domain = matches!(&spec.privacy, Some(privacy) if privacy.unit == Unit::Domain);
    match spec.strategy.local_work() {
        LocalWork::Steps if !by_domain => {
            (CHANGE_ROOM * spec.clip_norm * spec.local_rate * f64::from(spec.local_steps)).clamp(1e-4, 1e4)
        }
        _ => spec.clip_norm,
    }
}

/// The noise of one vector.
fn noise(spec: &Federation, budget: &Budget, asked: usize, dimension: usize) -> Result<Noise> {
    let by_row = budget.unit == "row";
    let norm = if by_row { spec.clip_norm } else { sent_norm(spec) };
    let sensitivity = integer_norm(norm, scale_for(norm))?;
    let squared = sensitivity * sensitivity;
    let Some(privacy) = spec.privacy.as_ref().filter(|privacy| privacy.placement == Placement::Shared) else {
        let name = spec.privacy.as_ref().map(|privacy| privacy.mechanism).unwrap_or_default();
        let drawn = name.from_rho(squared, u32::try_from(dimension)?, budget.one)?;
        let price = Price::of(&drawn, dimension);
        return Ok(Noise { drawn, price, shares: None });
    };
    // A sum of shares costs one unit more than the Gaussian it stands for; see secagg::noise.
    let central = DiscreteGaussian::from_rho(squared, budget.one.saturating_sub(Rho::from_units(1)))?;
    let missing = (asked as f64 * privacy.missing).floor() as u32;
    let shares = NoisePlan::new(central.sigma_squared(), asked, missing, privacy.colluders)?;
    let dimension_u32 = u32::try_from(dimension)?;
    let guarantee = shares.guarantee(asked, squared, dimension_u32)?;
    ensure!(
        guarantee.rho <= budget.one,
        "a sum of {asked} noise shares costs {} a round, {} is there",
        guarantee.rho.as_f64(),
        budget.one.as_f64()
    );
    let drawn = DiscreteGaussian::from_sigma_squared(squared, shares.share)?.into();
    Ok(Noise { drawn, price: Price::of(&central, dimension), shares: Some(shares) })
}

/// Domains asked in a round.
fn asked(spec: &Federation, domains: usize) -> usize {
    ((domains as f64 * spec.participation).round() as usize).clamp(1, domains)
}

/// Which domains lie.
fn liars(spec: &Federation, domains: usize, rng: &mut ChaCha20Rng) -> BTreeSet<usize> {
    let Some(byzantine) = &spec.faults.byzantine else { return BTreeSet::new() };
    let mut order: Vec<usize> = (0..domains).collect();
    order.shuffle(rng);
    order.truncate(((domains as f64 * byzantine.share).round() as usize).max(1));
    order.into_iter().collect()
}

/// For which rounds each domain is there; somebody always is.
fn presence(spec: &Federation, domains: usize, rng: &mut ChaCha20Rng) -> Vec<Range<u32>> {
    let mut there = vec![0..u32::MAX; domains];
    let (late, leaving) = (spec.faults.late, spec.faults.leaving);
    if late <= 0.0 && leaving <= 0.0 {
        return there;
    }
    let mut order: Vec<usize> = (0..domains).collect();
    order.shuffle(rng);
    let number = |share: f64| ((domains as f64 * share).round() as usize).min(domains - 1);
    let middle = spec.rounds.div_ceil(2);
    // Who is late is taken from one end, who leaves from the other.
    for at in order.iter().take(number(late)) {
        there[*at].start = middle;
    }
    for at in order.iter().rev().take(number(leaving)) {
        there[*at].end = middle;
    }
    there
}

/// Part of the rounds' budget that was granted, of the domains where it isn't all.
fn exhausted(spec: &Federation, domains: usize, rng: &mut ChaCha20Rng) -> BTreeMap<usize, f64> {
    let Some(Exhausted { share, granted }) = spec.faults.exhausted else { return BTreeMap::new() };
    let mut order: Vec<usize> = (0..domains).collect();
    order.shuffle(rng);
    order.truncate(((domains as f64 * share).round() as usize).max(1));
    order.into_iter().map(|at| (at, granted)).collect()
}

/// Noises and debits a vector, if there is noise.
fn sent(agent: &mut Agent<'_>, noise: Option<&Noise>, step: u32, sum: Vec<i64>) -> Result<Vec<i64>> {
    match (noise, &mut agent.account) {
        (Some(noise), Some(account)) => account.answer(&sum, &noise.drawn, &noise.price, step),
        _ => Ok(sum),
    }
}

/// The longest vector against the mean of honest updates that a screen lets through.
pub(crate) fn against(honest: &[&Vec<i64>], limits: ScreenLimits) -> Vec<i64> {
    let mut sum = vec![0.0; limits.len];
    for update in honest {
        sum.iter_mut().zip(update.iter()).for_each(|(s, v)| *s += *v as f64);
    }
    let norm = sum.iter().map(|v| v * v).sum::<f64>().sqrt();
    let largest = sum.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    if norm <= 0.0 {
        return vec![0; limits.len];
    }
    // A hair below both limits, so that truncation can't pass them.
    let factor = 0.999 * (limits.max_norm as f64 / norm).min(limits.max_abs as f64 / largest);
    sum.iter().map(|v| (-v * factor) as i64).collect()
}

/// The sum over units of clipped integer gradients.
fn clipped_sum(
    learner: &dyn Learner,
    at: &[f64],
    rows: &VirtualDomain,
    (norm, scale): (f64, u64),
) -> Result<Vec<i64>> {
    let mut sum = Running::new(learner.dimension());
    let mut gradient = vec![0.0; learner.dimension()];
    for unit in &rows.units {
        gradient.fill(0.0);
        for row in unit {
            if let Some(label) = rows.train.labels.get(*row) {
                learner.add_gradient(at, rows.train.row(*row), *label, &mut gradient);
            }
        }
        sum.add(&quantized(&gradient, norm, scale)?)?;
    }
    Ok(sum.sum().to_vec())
}

/// The mean gradient over rows; zero without rows.
fn mean_gradient(learner: &dyn Learner, at: &[f64], rows: &VirtualDomain) -> Vec<f64> {
    let mut gradient = vec![0.0; learner.dimension()];
    for (row, label) in rows.train.labels.iter().enumerate() {
        learner.add_gradient(at, rows.train.row(row), *label, &mut gradient);
    }
    let factor = 1.0 / rows.train.len().max(1) as f64;
    gradient.iter_mut().for_each(|g| *g *= factor);
    gradient
}

fn quantized(values: &[f64], norm: f64, scale: u64) -> Result<Vec<i64>> {
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    Ok(quantize_clipped(&values, norm, scale)?)
}

/// Most updates that are held at once: a plan's largest cohort.
pub(crate) const MAX_HELD: usize = 1024;
/// Part of the budget that the count of units costs: one in so many.
const TOTAL_PART: u64 = 50;
/// Norms of a change beyond what clipped gradients can add up to are cut at this multiple of it.
const CHANGE_ROOM: f64 = 8.0;
/// Virtual time between two rounds.
const ROUND_MS: i64 = 120_000;
/// Virtual seconds until a round's deadline.
const DEADLINE_S: u32 = 60;
/// Virtual seconds after it.
const GRACE_S: u32 = 10;
/// Sets the stream of round ids apart from that of the experiment.
const IDS: u64 = 0x6964_735f_7374_7265;

#[cfg(test)]
mod tests;
