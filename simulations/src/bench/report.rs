//! `bench report`: how long an auditor needs for a whole privacy-budget report.

use anstream::println;
use anyhow::Context;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;
use ring::rand::SystemRandom;
use tabmesh_privacy::budget::{Delta, Epsilon};
use tabmesh_privacy::ledger::{CommitRequest, GrantRequest, Ledger, MemoryJournal, PlanRequest, Purpose};
use tabmesh_privacy::mechanism::{DiscreteGaussian, EventShape, Noise};
use tabmesh_privacy::report::{
    MAX_REPORT_BYTES, Period, ProductLedger, ReportInput, SignedHead, Stated, UnprotectedFact, build, verify,
};
use tabmesh_privacy::signature::SigningKey;

use crate::bench::cpu_ns;
use crate::cli::Output;

/// Makes a report over one agent's ledger of so many debits, then verifies it: signature, chain, the ledger's rules, the signed head,
/// and every figure anew.
///
/// # Errors
/// Processor time can't be read, the report is larger than a reader takes, or it doesn't verify.
pub fn run(debits: u32, output: Output) -> anyhow::Result<()> {
    let (_, key) = SigningKey::generate(&SystemRandom::new())?;
    let ledger = ledger(debits)?;
    let head = ledger.head().map(|head| SignedHead::sign(&key, AGENT, head));
    let entries = ledger.entries().len();
    let product = ProductLedger {
        agent: AGENT.to_owned(),
        product: PRODUCT.to_owned(),
        entries: ledger.entries().to_vec(),
        head,
    };
    let report = build(ReportInput {
        deployment: "bench".to_owned(),
        period: Period { from_ms: 0, until_ms: i64::from(debits) + 2 },
        generated_at_ms: i64::from(debits) + 2,
        generator: "tabmesh-sim bench report".to_owned(),
        generator_digest: None,
        stated: Stated::default(),
        published: Vec::new(),
        attacks: Vec::new(),
        trust_model: Vec::new(),
        products: vec![product],
        refused: Vec::new(),
        disjoint: Vec::new(),
        unprotected_facts: UnprotectedFact::ALL.to_vec(),
        audit: None,
    })?;
    let file = report.sign(&key).to_json();
    anyhow::ensure!(
        file.len() <= MAX_REPORT_BYTES,
        "a report of {debits} debits has {} bytes, a reader takes {MAX_REPORT_BYTES}; ask for fewer",
        file.len()
    );
    let begun = cpu_ns()?;
    let verified = verify(file.as_bytes(), Some(&key.verifying_key()))?;
    let seconds = cpu_ns()?.saturating_sub(begun) as f64 / 1e9;
    anyhow::ensure!(verified.report == report, "what was read isn't what was written");
    let mib = file.len() as f64 / f64::from(1 << 20);
    match output {
        Output::Text => {
            println!("a report of {entries} entries, {mib:.1} MiB, verified in {seconds:.2} CPU-seconds");
        }
        Output::Json => {
            println!("{}", serde_json::json!({ "entries": entries, "bytes": file.len(), "cpu_s": seconds }));
        }
    }
    Ok(())
}

/// A ledger whose one plan has so many debits of an equal part each.
fn ledger(debits: u32) -> anyhow::Result<Ledger<MemoryJournal>> {
    let mut ledger = Ledger::open(MemoryJournal::default())?;
    ledger.grant(
        GrantRequest {
            product: PRODUCT.to_owned(),
            entity_namespace: "people".to_owned(),
            lineage: "people.parquet".to_owned(),
            unit: "row".to_owned(),
            epsilon: Epsilon::new(8.0)?,
            delta: Delta::new(1e-5)?,
            signer: "bench".to_owned(),
        },
        0,
    )?;
    let all = ledger.balance(PRODUCT).context("a balance")?.granted;
    let plan = PlanRequest {
        plan_digest: "ab".repeat(32),
        product: PRODUCT.to_owned(),
        purpose: Purpose::Round,
        rho: all,
        approvals: vec!["bench".to_owned()],
        planned: Vec::new(),
    };
    let reservation = ledger.reserve(plan, 1)?;
    let mechanism = DiscreteGaussian::from_rho(1 << 20, all.share(1, u64::from(debits.max(1))))?;
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    for step in 0..u64::from(debits) {
        let bytes = mechanism.privatize(&[1, 2, 3, 4], &mut rng).encode();
        let event = mechanism.event(EventShape { rows_per_unit: 1, marginals: 0, dimension: 4 });
        let mut query_digest = [0; 32];
        query_digest[..8].copy_from_slice(&step.to_le_bytes());
        ledger.commit(&reservation, CommitRequest { event, step, query_digest }, &bytes, 2 + step as i64)?;
    }
    Ok(ledger)
}

const AGENT: &str = "spiffe://acme.example/tabmesh/agent/people/agent-1";
const PRODUCT: &str = "people.income";
