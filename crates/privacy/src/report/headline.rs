//! The total of an entity namespace: which of its sources one unit may be in, and what that costs it.
//!
//! Unknown overlap means sum: a unit may be in every source. Sources that are declared disjoint pair by pair form a group, of
//! which a unit is in one at most, and a group counts with its largest loss. Groups are filled greedily, largest loss
//! first; any division into such groups is an upper bound, so a poor one counts too much and never too little.

use std::collections::{BTreeMap, BTreeSet};

use super::build::{History, add, in_a_sum, times};
use super::disjoint::SignedDeclaration;
use super::section::{Headline, Spending};
use super::{ReportError, SignedHead};
use crate::budget::{Delta, Rho};

/// A source by agent, namespace and lineage.
type Source = (String, String, String);

/// Pairs of sources that no unit is in both of.
pub(super) type Disjoint = BTreeSet<(Source, Source)>;

/// Declarations, by whether they count.
#[derive(Default)]
pub(super) struct Declared {
    pub(super) pairs: Disjoint,
    pub(super) counted: Vec<SignedDeclaration>,
    /// With the reason: not both owners signed it by the keys that signed their ledgers, or it names a source that its agent's
    /// ledger doesn't know.
    pub(super) left_out: Vec<(SignedDeclaration, ReportError)>,
}

/// What both owners of two sources signed, by the keys that signed their ledgers.
pub(super) fn declared(
    declarations: Vec<SignedDeclaration>,
    histories: &BTreeMap<String, History>,
) -> Declared {
    let key = |agent: &str| histories.get(agent)?.record.head.as_ref().map(of_head);
    let pair = |signed: &SignedDeclaration| {
        let said = signed.counted(key)?;
        let namespace = said.entity_namespace;
        let [first, second] = said.sources.map(|source| (source.agent, namespace.clone(), source.lineage));
        for (agent, namespace, lineage) in [&first, &second] {
            let accounts =
                || histories.get(agent).into_iter().flat_map(|history| history.state.accounts.keys());
            if !accounts().any(|key| key.entity_namespace == *namespace && key.lineage == *lineage) {
                return Err(ReportError::UnknownSource {
                    agent: agent.clone(),
                    got: format!("{lineage:?} of namespace {namespace:?}"),
                    known: accounts()
                        .map(|key| format!("{:?} of namespace {:?}", key.lineage, key.entity_namespace))
                        .collect(),
                });
            }
        }
        Ok((first, second))
    };
    let mut declared = Declared::default();
    for signed in declarations {
        match pair(&signed) {
            Ok((first, second)) => {
                declared.pairs.insert((second.clone(), first.clone()));
                declared.pairs.insert((first, second));
                declared.counted.push(signed);
            }
            Err(error) => declared.left_out.push((signed, error)),
        }
    }
    declared
}

/// One total per entity namespace.
///
/// Within one secure sum the sensitivities of a unit's sources add up, and not their costs: (Σ√ρ)², at most Σρ times the number
/// of sources it may be in.
pub(super) fn headlines(histories: &BTreeMap<String, History>, disjoint: &Disjoint) -> Vec<Headline> {
    let mut namespaces: BTreeMap<&str, Vec<Loss>> = BTreeMap::new();
    for (agent, history) in histories {
        for (key, account) in &history.state.accounts {
            let sums = history.lines.iter().filter(|(owner, line)| owner == key && in_a_sum(line));
            namespaces.entry(&key.entity_namespace).or_default().push(Loss {
                source: (agent.clone(), key.entity_namespace.clone(), key.lineage.clone()),
                delta: account.grants.values().map(|grant| grant.delta).reduce(smaller),
                spent: account.spent,
                reserved: account.reserved,
                in_sums: sums.fold(Rho::ZERO, |total, (_, line)| add(total, line.rho)),
            });
        }
    }
    namespaces.into_iter().filter_map(|(name, losses)| headline(name, losses, disjoint)).collect()
}

/// What a source's account lost.
struct Loss {
    source: Source,
    delta: Option<Delta>,
    spent: Rho,
    reserved: Rho,
    in_sums: Rho,
}

fn headline(namespace: &str, mut losses: Vec<Loss>, disjoint: &Disjoint) -> Option<Headline> {
    let delta = losses.iter().filter_map(|loss| loss.delta).reduce(smaller)?;
    let accounts = losses.len();
    let sums = losses.iter().any(|loss| loss.in_sums > Rho::ZERO);
    losses.sort_by_key(|loss| (std::cmp::Reverse(add(loss.spent, loss.reserved)), loss.source.clone()));
    let mut groups: Vec<Vec<&Loss>> = Vec::new();
    for loss in &losses {
        let apart = |other: &&Loss| disjoint.contains(&(loss.source.clone(), other.source.clone()));
        match groups.iter_mut().find(|group| group.iter().all(&apart)) {
            Some(group) => group.push(loss),
            None => groups.push(vec![loss]),
        }
    }
    // How many more times than once a unit may be in one sum.
    let again = groups.len().saturating_sub(1) as u64;
    let spent = |loss: &Loss| add(loss.spent, times(loss.in_sums, again));
    // Nobody knows what a reservation will be used for: where there were secure sums, for one.
    let factor = if sums { again + 1 } else { 1 };
    let charged = |loss: &Loss| add(spent(loss), times(loss.reserved, factor));
    let over_groups = |cost: &dyn Fn(&Loss) -> Rho| {
        let largest = |group: &Vec<&Loss>| group.iter().map(|loss| cost(loss)).max().unwrap_or(Rho::ZERO);
        groups.iter().map(largest).fold(Rho::ZERO, add)
    };
    Some(Headline {
        entity_namespace: namespace.to_owned(),
        accounts,
        in_at_most: (groups.len() < accounts).then_some(groups.len()),
        delta,
        spent: Spending::of(over_groups(&spent), delta),
        charged: Spending::of(over_groups(&charged), delta),
    })
}

fn smaller(a: Delta, b: Delta) -> Delta {
    if b < a { b } else { a }
}

fn of_head(head: &SignedHead) -> crate::signature::VerifyingKey {
    head.public_key
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::disjoint::{DISJOINT_FORMAT, Declaration, DeclaredSource, DisjointError};
    use super::super::tests::{grant, run_plan, with_a_sum};
    use super::super::{
        DISJOINT_STATEMENT, Period, ProductLedger, Report, ReportInput, Stated, VerifyError, build,
        build_leaving_out, render_html, verify,
    };
    use super::*;
    use crate::ledger::{Ledger, MemoryJournal, Purpose};
    use crate::signature::SigningKey;
    use crate::signature::tests::fresh_key;

    /// Three domains of one namespace, one product each, that spent 1, 2 and 3 parts of eight of their grants.
    struct World {
        agents: Vec<(String, SigningKey, Ledger<MemoryJournal>)>,
    }

    fn world(sums: bool) -> World {
        let agents = (1..=3_u64).map(|n| {
            let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
            ledger.grant(grant("orders", "customers"), 1_000).unwrap();
            let part = ledger.balance("orders").unwrap().granted.share(n, 8);
            run_plan(&mut ledger, "orders", Purpose::Release, part, 2_000);
            if sums {
                with_a_sum(&mut ledger, "orders");
            }
            (format!("spiffe://mesh/tabmesh/agent/d{n}/a"), fresh_key(), ledger)
        });
        World { agents: agents.collect() }
    }

    impl World {
        fn report(&self, disjoint: Vec<SignedDeclaration>) -> Result<Report, ReportError> {
            build(self.input(disjoint))
        }

        fn input(&self, disjoint: Vec<SignedDeclaration>) -> ReportInput {
            let product =
                |(agent, key, ledger): &(String, SigningKey, Ledger<MemoryJournal>)| ProductLedger {
                    agent: agent.clone(),
                    product: "orders".to_owned(),
                    entries: ledger.entries().to_vec(),
                    head: Some(SignedHead::sign(key, agent, ledger.head().unwrap())),
                };
            ReportInput {
                deployment: "three".to_owned(),
                period: Period { from_ms: 0, until_ms: 100_000 },
                generated_at_ms: 100_000,
                generator: "test".to_owned(),
                generator_digest: None,
                stated: Stated::default(),
                published: Vec::new(),
                attacks: Vec::new(),
                trust_model: Vec::new(),
                products: self.agents.iter().map(product).collect(),
                refused: Vec::new(),
                disjoint,
                unprotected_facts: Vec::new(),
                audit: None,
            }
        }

        /// What agents `a` and `b` sign, or what is missing if they don't.
        fn declared(&self, a: usize, b: usize) -> SignedDeclaration {
            let said = said([&self.agents[a].0, &self.agents[b].0], "db.orders");
            let signed = SignedDeclaration::unsigned(&said);
            let signed = signed.sign(&self.agents[a].0, &self.agents[a].1).unwrap();
            signed.sign(&self.agents[b].0, &self.agents[b].1).unwrap()
        }

        fn spent(&self, n: usize) -> Rho {
            self.agents[n].2.balance("orders").unwrap().spent
        }
    }

    fn said(agents: [&str; 2], lineage: &str) -> Declaration {
        let source = |agent: &str| DeclaredSource { agent: agent.to_owned(), lineage: lineage.to_owned() };
        let reason = "shops of different countries, no customer has two accounts".to_owned();
        Declaration::new("customers".to_owned(), agents.map(source), reason, 5_000).unwrap()
    }

    #[test]
    fn disjoint_sources_take_the_maximum_and_all_others_the_sum() {
        let world = world(false);
        let [a, b, c] = [0, 1, 2].map(|n| world.spent(n));
        let total = |declared: &[(usize, usize)]| {
            let declared = declared.iter().map(|(a, b)| world.declared(*a, *b)).collect();
            let headline = world.report(declared).unwrap().headlines.remove(0);
            assert_eq!(headline.accounts, 3);
            (headline.spent.rho, headline.in_at_most)
        };
        assert!(a < b && b < c);
        assert_eq!(total(&[]), (add(add(a, b), c), None));
        assert_eq!(total(&[(0, 1)]), (add(b, c), Some(2)));
        // Both are disjoint from the second, and not from each other: one pair counts, the one that saves most.
        assert_eq!(total(&[(0, 1), (1, 2)]), (add(a, c), Some(2)));
        assert_eq!(total(&[(0, 1), (1, 2), (2, 0)]), (c, Some(1)));
    }

    /// A unit in k sources of a sum costs k times its ρ in each: with all disjoint, once.
    #[test]
    fn in_secure_sums_a_unit_counts_as_often_as_it_may_be_in() {
        let world = world(true);
        let [a, b, c] = [0, 1, 2].map(|n| world.spent(n));
        let in_sum = {
            let mut alone = Ledger::open(MemoryJournal::default()).unwrap();
            alone.grant(grant("orders", "customers"), 1_000).unwrap();
            with_a_sum(&mut alone, "orders")
        };
        let total = |declared| world.report(declared).unwrap().headlines.remove(0).spent.rho;
        assert_eq!(total(vec![]), add(add(add(a, b), c), times(in_sum, 6)));
        assert_eq!(total(vec![world.declared(0, 1)]), add(add(b, c), times(in_sum, 2)));
        let all = vec![world.declared(0, 1), world.declared(1, 2), world.declared(0, 2)];
        assert_eq!(total(all), c);
    }

    #[test]
    fn a_declaration_is_shown_and_verified_with_the_report() {
        let world = world(false);
        let report = world.report(vec![world.declared(1, 0)]).unwrap();
        assert!(report.statements.iter().any(|line| line == DISJOINT_STATEMENT));
        let key = fresh_key();
        let signed = report.sign(&key);
        let page = render_html(&report, &signed).unwrap();
        assert!(page.contains("one unit in at most 2") && page.contains("shops of different countries"));
        assert_eq!(verify(page.as_bytes(), None).unwrap().report, report);
        // Whoever signs the report can't leave a signature out, nor sign for an owner, nor keep the smaller total without it.
        let refused = |report: &Report| verify(report.sign(&key).to_json().as_bytes(), None).unwrap_err();
        let mut unsigned = report.clone();
        unsigned.disjoint[0].signatures.pop();
        let error = refused(&unsigned);
        assert!(matches!(error, VerifyError::Rebuild(ReportError::Disjoint(DisjointError::Unsigned { .. }))));
        let mut forged = report.clone();
        forged.disjoint[0] = SignedDeclaration { signatures: vec![], ..forged.disjoint[0].clone() };
        for (agent, ..) in world.agents.iter().take(2) {
            forged.disjoint[0] = forged.disjoint[0].clone().sign(agent, &key).unwrap();
        }
        let error = refused(&forged);
        assert!(matches!(error, VerifyError::Rebuild(ReportError::Disjoint(DisjointError::Key { .. }))));
        let mut silent = report.clone();
        silent.disjoint.clear();
        assert!(matches!(refused(&silent), VerifyError::Figure { .. }));
        let mut reworded = report;
        reworded.disjoint[0].declaration = reworded.disjoint[0].declaration.replace("different", "other");
        let error = refused(&reworded);
        assert!(matches!(
            error,
            VerifyError::Rebuild(ReportError::Disjoint(DisjointError::Signature { .. }))
        ));
    }

    /// A key that changed after the declaration: the report is there, without it, and verifies.
    #[test]
    fn a_report_can_leave_out_what_does_not_count() {
        let mut world = world(false);
        let stale = world.declared(0, 1);
        world.agents[0].1 = fresh_key();
        let fresh = world.declared(1, 2);
        assert!(matches!(
            world.report(vec![fresh.clone(), stale.clone()]),
            Err(ReportError::Disjoint(DisjointError::Key { .. }))
        ));
        let (report, left_out) = build_leaving_out(world.input(vec![stale.clone(), fresh.clone()])).unwrap();
        let [(left, ReportError::Disjoint(DisjointError::Key { agent, .. }))] = left_out.as_slice() else {
            panic!("{left_out:?}")
        };
        assert_eq!((left, agent), (&stale, &world.agents[0].0));
        assert_eq!(report, world.report(vec![fresh]).unwrap());
        assert!(verify(report.sign(&fresh_key()).to_json().as_bytes(), None).is_ok());
    }

    #[test]
    fn what_cannot_count_is_refused_by_name() {
        let world = world(false);
        let [first, second, third] = [0, 1, 2].map(|n| &world.agents[n]);
        let unsigned = SignedDeclaration::unsigned(&said([&first.0, &second.0], "db.orders"));
        let stranger = unsigned.clone().sign(&third.0, &third.1).unwrap_err();
        assert!(
            matches!(&stranger, DisjointError::Stranger { agent, .. } if *agent == third.0),
            "{stranger}"
        );
        let once = unsigned.sign(&first.0, &first.1).unwrap();
        assert!(matches!(once.clone().sign(&first.0, &first.1), Err(DisjointError::Twice { .. })));
        let missing = world.report(vec![once.clone()]).unwrap_err();
        assert!(missing.to_string().starts_with(&second.0), "{missing}");
        // A source that no ledger has.
        let typo = SignedDeclaration::unsigned(&said([&first.0, &second.0], "db.order"));
        let typo = typo.sign(&first.0, &first.1).unwrap().sign(&second.0, &second.1).unwrap();
        let refused = world.report(vec![typo]).unwrap_err().to_string();
        assert!(refused.contains("\"db.order\"") && refused.contains("\"db.orders\""), "{refused}");
        // The form.
        let parsed = |text: &str| SignedDeclaration::parse(text.as_bytes());
        assert_eq!(parsed(&once.to_json()), Ok(once.clone()));
        assert!(matches!(parsed("{}"), Err(DisjointError::Form { .. })));
        let other = once.to_json().replace(DISJOINT_FORMAT, "tabmesh disjoint 9");
        assert!(matches!(parsed(&other), Err(DisjointError::Form { .. })), "{other}");
        let long = format!("{}{}", once.to_json(), " ".repeat(super::super::MAX_DECLARATION_BYTES));
        assert!(matches!(parsed(&long), Err(DisjointError::Form { .. })));
        let source = |agent: &str| DeclaredSource { agent: agent.to_owned(), lineage: "t".to_owned() };
        let declared = |agents: [&str; 2], reason: &str| {
            Declaration::new("n".to_owned(), agents.map(source), reason.to_owned(), 0)
        };
        let most = super::super::MAX_STATED_BYTES;
        assert!(declared(["b", "a"], &"x".repeat(most)).is_ok());
        for (agents, reason) in
            [(["a", "a"], "x".to_owned()), (["a", "b"], "x".repeat(most + 1)), (["a", "b"], " ".to_owned())]
        {
            assert!(matches!(declared(agents, &reason), Err(DisjointError::Form { .. })));
        }
    }
}
