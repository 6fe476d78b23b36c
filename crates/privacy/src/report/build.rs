//! From ledgers to figures: every number of a report is computed here, from entries that were verified first.
//!
//! Building is deterministic; verification builds again and compares.

use super::headline::{Declared, declared, headlines};
use super::section::{
    ByStep, EventKind, EventLine, Granted, Odds, ProductSection, RefusalLine, Spending, WindowFigures,
};
use super::{
    DEPLOYMENT_MODEL, DEPLOYMENT_MODEL_BOTH, DEPLOYMENT_MODEL_SUMS, DISJOINT_STATEMENT, FORMAT,
    LOCAL_STATEMENT, LedgerRecord, Period, ProductLedger, RecordedEntry, Report, ReportError, ReportInput,
    STATEMENTS, SUM_STATEMENTS, SignedDeclaration, SignedHead, Transparency, WINDOW_STATEMENT,
};
use crate::budget::{Delta, Rho};
use crate::ledger::window::{Standing, standing};
use crate::ledger::{
    Account, AccountKey, ChainedEntry, Entry, LedgerError, Purpose, State, epsilon_of, verify_chain,
};
use std::collections::BTreeMap;

/// Builds a report.
///
/// # Errors
/// [`ReportError`] when a ledger doesn't verify, a product has no grant in it, one agent has two ledgers, or a declaration doesn't
/// count.
pub fn build(input: ReportInput) -> Result<Report, ReportError> {
    let (report, left_out) = build_leaving_out(input)?;
    left_out.into_iter().next().map_or(Ok(report), |(_, error)| Err(error))
}

/// As [`build`], without declarations of disjoint sources that don't count (their losses add up), which come beside it with the
/// reason: one whose owner has got a new key since must not keep the whole report from its readers.
///
/// # Errors
/// As [`build`], but for declarations.
pub fn build_leaving_out(
    input: ReportInput,
) -> Result<(Report, Vec<(SignedDeclaration, ReportError)>), ReportError> {
    let histories = histories(&input.products)?;
    let mut products: Vec<ProductSection> = Vec::with_capacity(input.products.len());
    for wanted in &input.products {
        let unknown =
            || ReportError::UnknownProduct { agent: wanted.agent.clone(), product: wanted.product.clone() };
        let history = histories.get(&wanted.agent).ok_or_else(unknown)?;
        products.push(history.section(wanted, input.period).ok_or_else(unknown)?);
    }
    products.sort_by(|a, b| (&a.agent, &a.product).cmp(&(&b.agent, &b.product)));
    products.dedup_by(|a, b| a.agent == b.agent && a.product == b.product);
    let (deployment_model, mut statements) = placement(&histories);
    if products.iter().any(|section| section.granted.window.is_some()) {
        statements.push(WINDOW_STATEMENT.to_owned());
    }
    let Declared { pairs, counted, left_out } = declared(input.disjoint, &histories);
    if !pairs.is_empty() {
        statements.push(DISJOINT_STATEMENT.to_owned());
    }
    let report = Report {
        format: FORMAT.to_owned(),
        deployment: input.deployment,
        period: input.period,
        generated_at_ms: input.generated_at_ms,
        id: id(&histories, input.generated_at_ms),
        generator: input.generator,
        generator_digest: input.generator_digest,
        transparency: Transparency::of(&input.stated),
        stated: input.stated,
        published: input.published,
        attacks: input.attacks,
        deployment_model,
        trust_model: input.trust_model,
        statements,
        reproducible: histories.values().any(|history| history.state.reproducible),
        headlines: headlines(&histories, &pairs),
        disjoint: counted,
        products,
        refused: input.refused,
        unprotected_facts: input.unprotected_facts,
        audit: input.audit,
        ledgers: histories.into_values().map(|history| history.record).collect(),
    };
    Ok((report, left_out))
}

/// A name that the same ledgers have at the same time, and no others.
fn id(histories: &BTreeMap<String, History>, generated_at_ms: i64) -> String {
    let mut text = generated_at_ms.to_le_bytes().to_vec();
    for history in histories.values() {
        text.extend_from_slice(history.record.agent.as_bytes());
        text.push(0);
        if let Some(last) = history.record.entries.last() {
            text.extend_from_slice(&last.hash);
        }
    }
    hex::encode(ring::digest::digest(&ring::digest::SHA256, &text).as_ref().get(..16).unwrap_or_default())
}

/// Where the noise was added, by the debits; before the first one it is said to be local.
fn placement(histories: &BTreeMap<String, History>) -> (String, Vec<String>) {
    let lines = || histories.values().flat_map(|history| &history.lines).map(|(_, line)| line);
    let sums = lines().any(in_a_sum);
    let local = !sums || lines().any(|line| line.kind == EventKind::Commit && !in_a_sum(line));
    let model = match (local, sums) {
        (true, true) => DEPLOYMENT_MODEL_BOTH,
        (true, false) => DEPLOYMENT_MODEL,
        (false, _) => DEPLOYMENT_MODEL_SUMS,
    };
    let mut statements: Vec<&str> = Vec::new();
    statements.extend(local.then_some(LOCAL_STATEMENT));
    statements.extend(SUM_STATEMENTS.iter().filter(|_| sums));
    statements.extend(STATEMENTS);
    (model.to_owned(), statements.into_iter().map(str::to_owned).collect())
}

/// Whether a line is the debit of a secure sum.
pub(super) fn in_a_sum(line: &EventLine) -> bool {
    line.mechanism.as_ref().is_some_and(|event| event.shares.is_some())
}

/// One agent's ledger, replayed.
pub(super) struct History {
    pub(super) record: LedgerRecord,
    pub(super) state: State,
    pub(super) lines: Vec<(AccountKey, EventLine)>,
    refusals: Vec<(String, RefusalLine)>,
}

impl History {
    fn replay(agent: &str, entries: &[ChainedEntry], head: Option<SignedHead>) -> Result<Self, LedgerError> {
        verify_chain(entries)?;
        let record =
            LedgerRecord { agent: agent.to_owned(), entries: Vec::with_capacity(entries.len()), head };
        let mut history = Self { record, state: State::default(), lines: Vec::new(), refusals: Vec::new() };
        for chained in entries {
            history.follow(chained)?;
        }
        Ok(history)
    }

    fn follow(&mut self, chained: &ChainedEntry) -> Result<(), LedgerError> {
        let entry = Entry::from_json(&chained.payload)?;
        let payload = String::from_utf8(chained.payload.clone())
            .map_err(|error| LedgerError::Malformed { reason: error.to_string() })?;
        // A refund closes its reservation, so its plan is looked up before the entry is applied.
        let reservation = match &entry {
            Entry::Commit(commit) => self.state.reservations.get(&commit.reservation).cloned(),
            Entry::Refund(refund) => self.state.reservations.get(&refund.reservation).cloned(),
            _ => None,
        };
        self.state
            .apply(chained.seq, chained.hash, &entry)
            .map_err(|error| LedgerError::Unlawful { seq: chained.seq, rule: error.to_string() })?;
        self.record.entries.push(RecordedEntry {
            seq: chained.seq,
            prev: chained.prev,
            hash: chained.hash,
            payload,
        });

        let line = EventLine {
            seq: chained.seq,
            time_ms: entry.time_ms(),
            kind: EventKind::Grant,
            product: String::new(),
            purpose: None,
            step: None,
            plan_digest: None,
            mechanism: None,
            rho: Rho::ZERO,
            epsilon_alone: None,
            rho_if_all_collude: None,
            approvals: Vec::new(),
            reproducible: entry.reproducible(),
        };
        let line = match entry {
            Entry::Grant(grant) => {
                EventLine { product: grant.product, rho: grant.rho, approvals: vec![grant.signer], ..line }
            }
            Entry::Reserve(reserve) => EventLine {
                kind: EventKind::Reserve,
                product: reserve.product,
                purpose: Some(reserve.purpose),
                plan_digest: Some(reserve.plan_digest),
                rho: reserve.rho,
                approvals: reserve.approvals,
                ..line
            },
            Entry::Commit(commit) => EventLine {
                kind: EventKind::Commit,
                purpose: Some(commit.purpose),
                step: Some(commit.step),
                rho: commit.event.rho,
                rho_if_all_collude: commit
                    .event
                    .shares
                    .and_then(|shares| shares.share.cost(commit.event.l2_sensitivity_squared)),
                mechanism: Some(commit.event),
                ..line
            },
            Entry::Refund(refund) => EventLine { kind: EventKind::Refund, rho: refund.rho, ..line },
            Entry::Refuse(refuse) => {
                let refusal = RefusalLine {
                    seq: chained.seq,
                    time_ms: refuse.time_ms,
                    plan_digest: refuse.plan_digest,
                    rule: refuse.rule,
                    rho: refuse.rho,
                };
                self.refusals.push((refuse.product, refusal));
                return Ok(());
            }
            // Moves no budget; it stays in the record, where replay checks it.
            Entry::Derive(_) => return Ok(()),
        };
        let (account, line) = match reservation {
            Some(open) => {
                let line = EventLine {
                    product: open.entry.product,
                    purpose: Some(open.entry.purpose),
                    plan_digest: Some(open.entry.plan_digest),
                    approvals: open.entry.approvals,
                    ..line
                };
                (Some(open.account), line)
            }
            None => (self.state.products.get(&line.product).cloned(), line),
        };
        // Every admitted entry other than a refusal belongs to an account.
        if let Some(account) = account {
            self.lines.push((account, line));
        }
        Ok(())
    }

    fn section(&self, wanted: &ProductLedger, period: Period) -> Option<ProductSection> {
        let (key, account) = self.state.account_of(&wanted.product)?;
        let grant = account.grants.get(&wanted.product)?;
        let delta = grant.delta;
        let events: Vec<EventLine> = self
            .lines
            .iter()
            .filter(|(owner, _)| owner == key)
            .map(|(_, line)| match line.kind {
                EventKind::Commit => EventLine { epsilon_alone: epsilon_of(line.rho, grant), ..line.clone() },
                _ => line.clone(),
            })
            .collect();
        let in_period = events
            .iter()
            .filter(|line| line.kind == EventKind::Commit && period.contains(line.time_ms))
            .fold(Rho::ZERO, |sum, line| add(sum, line.rho));
        let spent = Spending::of(account.spent, delta);
        let step = |purpose| Spending::of(account.spent_by.get(&purpose).copied().unwrap_or_default(), delta);
        let refusals = self.refusals.iter().filter(|(product, _)| *product == wanted.product);
        Some(ProductSection {
            agent: wanted.agent.clone(),
            product: wanted.product.clone(),
            entity_namespace: key.entity_namespace.clone(),
            lineage: key.lineage.clone(),
            unit: grant.unit.clone(),
            adjacency: grant.adjacency.clone(),
            granted: Granted {
                epsilon: grant.epsilon,
                delta,
                rho: account.granted(),
                signer: grant.signer.clone(),
                window: standing(&self.state, &wanted.product, period.until_ms.saturating_sub(1))
                    .map(|standing| window_figures(&standing, delta)),
            },
            spent,
            spent_in_period: Spending::of(in_period, delta),
            charged: Spending::of(charged(account), delta),
            left: Spending::of(account.left(), delta),
            by_step: ByStep { release: step(Purpose::Release), rounds: step(Purpose::Round) },
            odds_spent: Odds::of(spent.epsilon, delta),
            odds_granted: Odds::of(Some(grant.epsilon), delta),
            reproducible: events.iter().any(|line| line.reproducible),
            events,
            refusals: refusals.map(|(_, line)| line.clone()).collect(),
        })
    }
}

fn histories(products: &[ProductLedger]) -> Result<BTreeMap<String, History>, ReportError> {
    let mut histories: BTreeMap<String, History> = BTreeMap::new();
    for ledger in products {
        if let Some(known) = histories.get(&ledger.agent) {
            if known.record.chained() != ledger.entries || known.record.head != ledger.head {
                return Err(ReportError::TwoLedgers { agent: ledger.agent.clone() });
            }
            continue;
        }
        let history = History::replay(&ledger.agent, &ledger.entries, ledger.head)
            .map_err(|source| ReportError::Ledger { agent: ledger.agent.clone(), source })?;
        histories.insert(ledger.agent.clone(), history);
    }
    Ok(histories)
}

fn window_figures(standing: &Standing, delta: Delta) -> WindowFigures {
    let Standing { limit, spent, left, frees_ms, .. } = *standing;
    let (length_ms, epsilon, rho) = (limit.length_ms, limit.epsilon, limit.rho);
    WindowFigures { length_ms, epsilon, rho, spent: Spending::of(spent, delta), left, frees_ms }
}

fn charged(account: &Account) -> Rho {
    add(account.spent, account.reserved)
}

// Saturating: sums over many ledgers could leave 64 bits only with grants nobody would give.
pub(super) fn add(a: Rho, b: Rho) -> Rho {
    a.checked_add(b).unwrap_or(Rho::from_units(u64::MAX))
}

pub(super) fn times(rho: Rho, factor: u64) -> Rho {
    Rho::from_units(rho.units().saturating_mul(factor))
}
