//! Tests of reports: the figures, the page, and one test for each way of tampering.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::accountant::zcdp;
use crate::budget::{Delta, Epsilon, Rho};
use crate::ledger::{CommitRequest, GrantRequest, Ledger, MemoryJournal, Pace, PlanRequest, Purpose};
use crate::mechanism::{DiscreteGaussian, EventShape, Noise, NoiseShares, SigmaSquared};
use crate::private::Mask;
use crate::signature::tests::fresh_key;
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

const AGENT: &str = "spiffe://mesh/tabmesh/agent/retail/a";

pub(super) fn grant(product: &str, namespace: &str) -> GrantRequest {
    GrantRequest {
        product: product.to_owned(),
        entity_namespace: namespace.to_owned(),
        lineage: format!("db.{product}"),
        unit: "customer".to_owned(),
        epsilon: Epsilon::new(3.0).unwrap(),
        delta: Delta::new(1e-5).unwrap(),
        signer: "spiffe://mesh/tabmesh/operator/retail/owner".to_owned(),
    }
}

pub(super) fn run_plan(
    ledger: &mut Ledger<MemoryJournal>,
    product: &str,
    purpose: Purpose,
    rho: Rho,
    time_ms: i64,
) {
    let plan = PlanRequest {
        plan_digest: format!("{product}-{}", purpose.label()),
        product: product.to_owned(),
        purpose,
        rho,
        approvals: vec!["<operator & co>".to_owned()],
        planned: vec![],
    };
    let reservation = ledger.reserve(plan, time_ms).unwrap();
    for step in 1..=2 {
        let mechanism = DiscreteGaussian::from_rho(1 << 20, rho.share(1, 3)).unwrap();
        let bytes = mechanism.privatize(&[1, 2, 3], &mut ChaCha20Rng::seed_from_u64(step)).encode();
        let event = mechanism.event(EventShape { rows_per_unit: 1, marginals: 3, dimension: 3 });
        let request = CommitRequest { event, step, query_digest: [step as u8; 32] };
        ledger.commit(&reservation, request, &bytes, time_ms + step as i64 * 1_000).unwrap();
    }
    ledger.close(&reservation, time_ms + 5_000).unwrap();
}

fn filled(mut ledger: Ledger<MemoryJournal>) -> Ledger<MemoryJournal> {
    ledger.grant(grant("orders", "customers"), 1_000).unwrap();
    ledger.grant(grant("visits", "customers"), 1_500).unwrap();
    let half = ledger.balance("orders").unwrap().granted.share(1, 2);
    run_plan(&mut ledger, "orders", Purpose::Release, half, 2_000);
    run_plan(&mut ledger, "orders", Purpose::Round, half, 20_000);
    run_plan(&mut ledger, "visits", Purpose::Release, half, 40_000);
    let greedy = PlanRequest {
        plan_digest: "greedy".to_owned(),
        product: "orders".to_owned(),
        purpose: Purpose::Round,
        rho: half,
        approvals: vec![],
        planned: vec![],
    };
    ledger.reserve(greedy, 50_000).unwrap_err();
    ledger
}

fn input(ledger: &Ledger<MemoryJournal>, head: Option<SignedHead>) -> ReportInput {
    let product = |product: &str| ProductLedger {
        agent: AGENT.to_owned(),
        product: product.to_owned(),
        entries: ledger.entries().to_vec(),
        head,
    };
    ReportInput {
        deployment: "demo </script><b>".to_owned(),
        period: Period { from_ms: 0, until_ms: 10_000 },
        generated_at_ms: 60_000,
        generator: "tabmesh 0.1.0".to_owned(),
        generator_digest: None,
        stated: Stated::default(),
        published: Vec::new(),
        attacks: Vec::new(),
        trust_model: vec!["the coordinator is trusted with noised totals".to_owned()],
        products: vec![product("visits"), product("orders")],
        refused: vec![RefusedRequest {
            time_ms: 10,
            plan_digest: "early".to_owned(),
            product: "orders".to_owned(),
            rules: vec!["epsilon_above_grant".to_owned()],
        }],
        disjoint: Vec::new(),
        unprotected_facts: UnprotectedFact::ALL.to_vec(),
        audit: None,
    }
}

fn report() -> Report {
    let ledger = filled(Ledger::open(MemoryJournal::default()).unwrap());
    build(input(&ledger, None)).unwrap()
}

/// A grant that is limited in its pace shows the window's figure beside the lifetime's, and neither can be changed.
#[test]
fn a_budget_window_stands_beside_the_lifetime_and_is_recomputed() {
    let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
    let pace = Pace { length_ms: 30_000, epsilon: Epsilon::new(2.0).unwrap() };
    ledger.grant_at_pace(grant("orders", "customers"), Some(pace), 1_000).unwrap();
    let part = ledger.balance("orders").unwrap().granted.share(1, 4);
    run_plan(&mut ledger, "orders", Purpose::Release, part, 2_000);
    run_plan(&mut ledger, "orders", Purpose::Round, part, 50_000);
    let mut wanted = input(&ledger, None);
    wanted.products.retain(|product| product.product == "orders");
    let built = build(wanted).unwrap();
    let section = built.products.first().unwrap();
    let window = section.granted.window.unwrap();
    assert_eq!((window.length_ms, window.epsilon, window.days()), (30_000, pace.epsilon, 1));
    // The ledger's last entry is later than the period: the second plan alone is within the window.
    assert_eq!(window.spent.rho.units() * 2, section.spent.rho.units());
    assert_eq!(window.left, window.rho.saturating_sub(window.spent.rho));
    assert_eq!(window.frees_ms, Some(51_000 + 30_000));
    assert!(
        window.spent.epsilon < section.spent.epsilon && section.spent.epsilon < Some(section.granted.epsilon)
    );
    assert!(built.statements.iter().any(|line| line == WINDOW_STATEMENT));
    let key = fresh_key();
    let signed = built.sign(&key);
    assert_eq!(verify(signed.to_json().as_bytes(), None).unwrap().report, built);
    let page = render_html(&built, &signed).unwrap();
    assert!(page.contains("within any 1 days") && verify(page.as_bytes(), None).is_ok());
    let mut changed = built;
    changed.products.first_mut().unwrap().granted.window.as_mut().unwrap().spent.rho = Rho::ZERO;
    let refused = verify(changed.sign(&key).to_json().as_bytes(), None).unwrap_err();
    assert!(matches!(&refused, VerifyError::Figure { place, .. } if place.contains("window")), "{refused}");
    // Reports without windows say nothing of them.
    let plain = serde_json::to_string(&report()).unwrap();
    assert!(!plain.contains("\"window\"") && !plain.contains(WINDOW_STATEMENT));
}

/// A ledger with one secure sum of five agents, and the ρ it was debited.
pub(super) fn with_a_sum(ledger: &mut Ledger<MemoryJournal>, product: &str) -> Rho {
    let plan = PlanRequest {
        plan_digest: "sums".to_owned(),
        product: product.to_owned(),
        purpose: Purpose::Round,
        rho: Rho::from_units(1 << 30),
        approvals: vec![],
        planned: vec![],
    };
    let reservation = ledger.reserve(plan, 70_000).unwrap();
    let central = SigmaSquared::new(1 << 30, 1).unwrap();
    let shares = NoiseShares::of(central, 5, 1, 1).unwrap().unwrap();
    let share = DiscreteGaussian::from_sigma_squared(1 << 20, shares.share).unwrap();
    let noised = share.privatize(&[1, 2, 3], &mut ChaCha20Rng::seed_from_u64(9));
    let masked = noised.masked(Mask::Wide(&[7, 8, 9]), 1 << 40).unwrap();
    let shape = EventShape { rows_per_unit: 1, marginals: 0, dimension: 3 };
    let event = shares.event(central, 1 << 20, shape).unwrap();
    let request = CommitRequest { event, step: 0, query_digest: [9; 32] };
    let receipt = ledger.commit(&reservation, request, &masked, 71_000).unwrap();
    assert!(receipt.covers(&masked), "what is debited is what is sent");
    ledger.close(&reservation, 72_000).unwrap();
    receipt.event().rho
}

#[test]
fn a_secure_sum_is_named_and_counts_for_every_account_of_its_namespace() {
    let local = report();
    assert_eq!((local.deployment_model.as_str(), local.statements.len()), (DEPLOYMENT_MODEL, 6));

    let granted = || {
        let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
        ledger.grant(grant("orders", "customers"), 1_000).unwrap();
        ledger
    };
    let (mut first, mut second) = (granted(), granted());
    let rho = with_a_sum(&mut first, "orders");
    assert_eq!(with_a_sum(&mut second, "orders"), rho);
    let mut both = input(&first, None);
    both.products.retain(|product| product.product == "orders");
    let mut other = both.products[0].clone();
    other.agent.push('2');
    other.entries = second.entries().to_vec();
    both.products.push(other);
    let report = build(both).unwrap();
    assert_eq!(report.deployment_model, DEPLOYMENT_MODEL_SUMS);
    assert_eq!(report.statements[..3], SUM_STATEMENTS.map(str::to_owned));
    // Each account has spent ρ; together (√ρ + √ρ)² = 4ρ, not 2ρ.
    assert!(report.products.iter().all(|section| section.spent.rho == rho));
    assert_eq!(report.headlines[0].spent.rho.units(), 4 * rho.units());
    let line = report.products[0].events.iter().find(|line| line.mechanism.is_some()).unwrap();
    // A third of the noise alone: three times the cost, but for rounding.
    let alone = line.rho_if_all_collude.unwrap();
    assert!(alone.units().abs_diff(3 * (rho.units() - 1)) <= 3, "{alone} against {rho}");
    let key = fresh_key();
    let signed = report.sign(&key);
    let page = render_html(&report, &signed).unwrap();
    assert!(page.contains("in a secure sum of 5 agents"));
    assert_eq!(verify(page.as_bytes(), Some(&key.verifying_key())).unwrap().report, report);
}

#[test]
fn figures_are_what_the_ledger_says() {
    let ledger = filled(Ledger::open(MemoryJournal::default()).unwrap());
    let report = build(input(&ledger, None)).unwrap();
    let delta = Delta::new(1e-5).unwrap();
    let [orders, visits] = report.products.as_slice() else { panic!("two products, by name") };
    for section in [orders, visits] {
        let balance = ledger.balance(&section.product).unwrap();
        assert_eq!(section.spent.rho, balance.spent);
        assert_eq!(section.left.rho, balance.left);
        assert_eq!(section.spent.epsilon, Some(zcdp::epsilon(balance.spent, delta)));
        assert!(section.spent.epsilon_gaussian < section.spent.epsilon);
    }
    let steps = orders.by_step;
    assert_eq!(steps.release.rho.checked_add(steps.rounds.rho), Some(orders.spent.rho));
    let alone = steps.release.epsilon.unwrap().get() + steps.rounds.epsilon.unwrap().get();
    assert!(alone > orders.spent.epsilon.unwrap().get() * 1.2, "steps alone don't add up");
    assert_eq!(orders.spent_in_period.rho, steps.release.rho, "only the release lies in the period");
    assert_eq!(visits.by_step.rounds, Spending::of(Rho::ZERO, delta));
    assert_eq!((orders.events.len(), orders.refusals.len(), visits.refusals.len()), (9, 1, 0));
    assert!(!report.reproducible);

    let [headline] = report.headlines.as_slice() else { panic!("one namespace") };
    assert_eq!(headline.accounts, 2);
    assert_eq!(Some(headline.spent.rho), orders.spent.rho.checked_add(visits.spent.rho));
}

#[test]
fn odds_follow_from_epsilon_and_delta() {
    let delta = Delta::new(1e-5).unwrap();
    let odds = Odds::of(Some(Epsilon::new(3.0).unwrap()), delta);
    assert!((odds.factor - 20.085_536_923).abs() < 1e-8);
    assert!((odds.found_at_one_percent - 0.200_865_369).abs() < 1e-8);
    assert!(odds.sentence().contains("20.09") && odds.sentence().contains("20.09 %"));
    let none = Odds::of(None, delta);
    assert!((none.factor - 1.0).abs() < 1e-15 && (none.found_at_one_percent - 0.01).abs() < 1e-15);
    let huge = Odds::of(Some(Epsilon::new(1e6).unwrap()), delta);
    assert!(huge.factor.is_finite() && (huge.found_at_one_percent - 1.0).abs() < 1e-15);
}

#[test]
fn a_signed_report_verifies_as_json_and_as_a_page() {
    let key = fresh_key();
    let ledger = filled(Ledger::open(MemoryJournal::default()).unwrap());
    let head = SignedHead::sign(&key, AGENT, ledger.head().unwrap());
    let report = build(input(&ledger, Some(head))).unwrap();
    let signed = report.sign(&key);
    let page = render_html(&report, &signed).unwrap();
    for file in [signed.to_json(), page.clone()] {
        let verified = verify(file.as_bytes(), Some(&key.verifying_key())).unwrap();
        assert_eq!((&verified.report, verified.key_pinned, verified.signed_heads), (&report, true, 1));
        assert!(!verify(file.as_bytes(), None).unwrap().key_pinned);
        let other = fresh_key().verifying_key();
        assert!(matches!(verify(file.as_bytes(), Some(&other)), Err(VerifyError::Key { .. })));
    }
    assert!(page.contains("<svg") && page.contains("&#60;operator &#38; co&#62;"));
    let links = page.replace("http://www.w3.org/2000/svg", "");
    assert!(
        !links.contains("http:") && !links.contains("https:") && !links.contains("src="),
        "nothing is loaded"
    );
    assert_eq!(page.matches("</script>").count(), 1, "texts can't end the embedded report");
    assert!(!page.contains("class=\"banner\""));
}

#[test]
fn a_page_that_shows_something_else_is_refused() {
    let key = fresh_key();
    let report = report();
    let signed = report.sign(&key);
    let page = render_html(&report, &signed).unwrap();
    let figure = format!("<b>ε = {}</b>", report.products[0].granted.epsilon);
    let forged = page.replacen(&figure, "<b>ε = 1</b>", 1);
    assert_ne!(forged, page);
    assert_eq!(verify(forged.as_bytes(), None), Err(VerifyError::Page));
    assert!(matches!(verify(b"<html></html>", None), Err(VerifyError::Form { .. })));
    assert!(matches!(verify(&vec![b' '; MAX_REPORT_BYTES + 1], None), Err(VerifyError::TooLarge { .. })));
}

#[test]
fn a_changed_byte_breaks_the_signature() {
    let signed = report().sign(&fresh_key());
    let changed = SignedReport { payload: signed.payload.replacen("demo", "dem0", 1), ..signed };
    assert!(matches!(verify(changed.to_json().as_bytes(), None), Err(VerifyError::Signature(_))));
}

/// What a dishonest signer could do: change the report, then sign it properly.
fn resigned(change: impl FnOnce(&mut Report)) -> VerifyError {
    let key = fresh_key();
    let mut report = report();
    change(&mut report);
    verify(report.sign(&key).to_json().as_bytes(), Some(&key.verifying_key())).unwrap_err()
}

fn chain_broken(error: &VerifyError) -> Option<u64> {
    match error {
        VerifyError::Ledger { source: LedgerError::Chain { seq }, .. } => Some(*seq),
        _ => None,
    }
}

#[test]
fn a_changed_entry_is_found_behind_a_good_signature() {
    let error = resigned(|report| {
        let payload = &mut report.ledgers[0].entries[3].payload;
        *payload = payload.replacen("\"step\":1", "\"step\":7", 1);
    });
    assert_eq!(chain_broken(&error), Some(3));
}

#[test]
fn a_dropped_entry_is_found() {
    let error = resigned(|report| drop(report.ledgers[0].entries.remove(4)));
    assert_eq!(chain_broken(&error), Some(4));
}

#[test]
fn reordered_entries_are_found() {
    let error = resigned(|report| report.ledgers[0].entries.swap(3, 4));
    assert_eq!(chain_broken(&error), Some(3));
}

#[test]
fn a_changed_total_is_found_and_named() {
    let error = resigned(|report| report.products[0].spent.rho = Rho::from_units(1));
    assert!(matches!(error, VerifyError::Figure { place, .. } if place == "report.products[0].spent.rho"));
    let error = resigned(|report| report.headlines[0].charged.epsilon = Some(Epsilon::new(0.5).unwrap()));
    assert!(
        matches!(error, VerifyError::Figure { place, .. } if place == "report.headlines[0].charged.epsilon")
    );
    let error = resigned(|report| report.statements.truncate(1));
    assert!(matches!(error, VerifyError::Figure { place, .. } if place == "report.statements"));
    let error = resigned(|report| report.products[0].refusals.clear());
    assert!(matches!(error, VerifyError::Figure { place, .. } if place == "report.products[0].refusals"));
}

#[test]
fn an_entry_cut_off_the_end_is_found_by_the_signed_head() {
    let key = fresh_key();
    let ledger = filled(Ledger::open(MemoryJournal::default()).unwrap());
    let head = SignedHead::sign(&key, AGENT, ledger.head().unwrap());
    let mut cut = input(&ledger, Some(head));
    for product in &mut cut.products {
        product.entries.pop();
    }
    let file = build(cut).unwrap().sign(&key).to_json();
    assert_eq!(verify(file.as_bytes(), None), Err(VerifyError::Head { agent: AGENT.to_owned() }));
}

#[test]
fn reproducible_noise_puts_a_banner_on_the_page() {
    let ledger = filled(Ledger::open_reproducible(MemoryJournal::default()).unwrap());
    let report = build(input(&ledger, None)).unwrap();
    assert!(report.reproducible && report.products.iter().all(|p| p.reproducible));
    let page = render_html(&report, &report.sign(&fresh_key())).unwrap();
    assert_eq!(page.matches("class=\"banner\"").count(), 3);
}

#[test]
fn what_cannot_be_reported_is_refused() {
    let ledger = filled(Ledger::open(MemoryJournal::default()).unwrap());
    let mut unknown = input(&ledger, None);
    unknown.products[0].product = "nothing".to_owned();
    assert!(matches!(build(unknown), Err(ReportError::UnknownProduct { .. })));
    let mut two = input(&ledger, None);
    two.products[0].entries.pop();
    assert_eq!(build(two), Err(ReportError::TwoLedgers { agent: AGENT.to_owned() }));
    let mut broken = input(&ledger, None);
    broken.products.truncate(1);
    broken.products[0].entries.remove(0);
    assert!(matches!(build(broken), Err(ReportError::Ledger { source: LedgerError::Chain { seq: 0 }, .. })));
}

/// What is stated goes through signature and verification; who it is for stands on the page, and nothing of it can be changed.
#[test]
fn what_is_stated_and_measured_is_signed_and_shown() {
    let ledger = filled(Ledger::open(MemoryJournal::default()).unwrap());
    let some = |text: &str| Some(text.to_owned());
    let stated = Stated {
        curator: some("Acme <Ltd>"),
        intended_use: some("scores"),
        description: some("a model"),
        ..Stated::default()
    };
    let attack = MeasuredAttack {
        audit: "mechanism".to_owned(),
        what: "with and without one unit".to_owned(),
        program: "ab".repeat(32),
        measured_at_ms: 1,
        claimed: Epsilon::new(4.7).unwrap(),
        delta: Delta::new(1e-5).unwrap(),
        found: 4.25,
        confidence: 0.95,
        controls: 3,
        controls_caught: 3,
    };
    let published =
        Published { manifest: "cd".repeat(32), plan_digest: "ef".repeat(32), created_at_ms: 70_000 };
    let bare = input(&ledger, None);
    let told = ReportInput {
        stated,
        published: vec![published],
        attacks: vec![attack],
        generator_digest: some(&"12".repeat(32)),
        ..bare.clone()
    };
    let key = SigningKey::generate(&ring::rand::SystemRandom::new()).unwrap().1;
    let (bare, told) = (build(bare).unwrap(), build(told).unwrap());
    assert_eq!((bare.transparency.tier, told.transparency.tier), (0, 2));
    assert_eq!(bare.id, told.id, "the same ledgers at the same time");
    let signed = told.sign(&key);
    let page = render_html(&told, &signed).unwrap();
    for shown in [
        "Acme &#60;Ltd&#62;",
        "4.250",
        "3 of 3",
        "the claim holds",
        &"cd".repeat(32),
        "tier 2",
        "data, security",
    ] {
        assert!(page.contains(shown), "{shown}");
    }
    verify(page.as_bytes(), Some(&key.verifying_key())).unwrap();
    // Whoever signs can state what they like, and can't claim a tier, or a name, that doesn't follow from it.
    for change in [
        (|report: &mut Report| report.transparency.tier = 3) as fn(&mut Report),
        |report| report.transparency.missing.clear(),
        |report| report.id = "0".repeat(32),
    ] {
        let mut other = told.clone();
        change(&mut other);
        let refused = verify(other.sign(&key).to_json().as_bytes(), None);
        assert!(matches!(refused, Err(VerifyError::Figure { .. })), "{refused:?}");
    }
    let shown = render_html(&bare, &bare.sign(&key)).unwrap();
    assert!(shown.contains("None is on record") && !shown.contains("<h2>Published"));
}

#[test]
fn the_published_schema_is_the_reports() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/report.schema.json");
    let published: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!(
        published,
        Report::json_schema(),
        "write `tabmesh-coordinator report schema` to docs/report.schema.json"
    );
    // Every field that a report has is one that the schema knows, and that it asks for where it is always there.
    let report = serde_json::to_value(report()).unwrap();
    let fields: Vec<&String> = report.as_object().unwrap().keys().collect();
    let known = published["properties"].as_object().unwrap();
    assert!(fields.iter().all(|field| known.contains_key(*field)), "{fields:?}");
    let required = published["required"].as_array().unwrap();
    assert!(required.iter().all(|field| fields.iter().any(|known| field == known.as_str())), "{required:?}");
}
