//! Processes killed without warning in the middle of a round: the plan ends as if nothing had happened.
//!
//! The deployments are real: processes over mutual TLS, on the shipped tables cut short. SIGKILL leaves no time for any
//! clean-up, so what is checked afterwards is what had been made durable before: nothing is debited twice, and under equal
//! seeds the model is the one of an undisturbed run.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use tabmesh_privacy::ledger::{ChainedEntry, Entry, Purpose};
use tabmesh_privacy::report::verify;
use tabmesh_sim::quickstart::dataset::{DOMAINS, Participation};
use tabmesh_sim::quickstart::deployed::{Deployment, Lines, Setup};
use tabmesh_sim::quickstart::deployment::PlanChoices;
use tabmesh_store::PackStore;
use tokio::sync::OnceCell;

use crate::common::{Published, published, submitted, until};

/// Rounds of the plan.
const ROUNDS: u32 = 3;
/// Longest wait for vectors that arrive within a second.
const PATIENCE: Duration = Duration::from_secs(180);
/// Stages of the release.
const STAGES: u64 = 4;

fn setup() -> Setup {
    let plan = PlanChoices {
        corpus_rows: 1_000,
        pretrain_steps: 2,
        rounds: ROUNDS,
        deadline_s: 120,
        // The default kind goes through the loop in the other tests.
        adapter: Some("{kind: lora, rank: 2}".to_owned()),
        ..PlanChoices::default()
    };
    Setup {
        program: env!("CARGO_BIN_EXE_tabmesh-sim").into(),
        rows: Some(200),
        plan,
        seed: Some(11),
        more: Lines::default(),
    }
}

fn ledger(deployment: &Deployment, domain: &str) -> Vec<ChainedEntry> {
    let folder = deployment.layout.domain(domain).join("data").join("books");
    tabmesh_agent::books::read_entries(&folder).unwrap()
}

/// Debits by purpose and step; a step that was debited twice stops the test.
fn debits(entries: &[ChainedEntry]) -> BTreeSet<(Purpose, u64)> {
    let mut steps = BTreeSet::new();
    for entry in entries {
        if let Entry::Commit(commit) = Entry::from_json(&entry.payload).unwrap() {
            assert!(steps.insert((commit.purpose, commit.step)), "{commit:?} was debited twice");
        }
    }
    steps
}

/// What an undisturbed run publishes.
async fn undisturbed() -> &'static Published {
    static REFERENCE: OnceCell<Published> = OnceCell::const_new();
    let run = || async {
        let root = tempfile::tempdir().unwrap();
        let mut deployment = Deployment::start(root.path(), setup()).unwrap();
        let (operator, id) = submitted(&mut deployment).await;
        assert_eq!(until(&operator, &id, "").await.phase, "done");
        settled(&mut deployment).await;
        published(&deployment)
    };
    REFERENCE.get_or_init(run).await
}

/// Every member paid for every stage and round once, and the signed report recomputes from the mirrored ledgers.
async fn settled(deployment: &mut Deployment) {
    deployment.promoted().await.unwrap();
    let stages = (1..=STAGES).map(|stage| (Purpose::Release, stage));
    let expected: BTreeSet<_> =
        stages.chain((0..u64::from(ROUNDS)).map(|round| (Purpose::Round, round))).collect();
    for domain in &DOMAINS {
        let paid = debits(&ledger(deployment, domain.id));
        match domain.participation {
            Participation::Member => assert_eq!(paid, expected, "{}", domain.id),
            Participation::Newcomer => assert!(paid.is_empty(), "{}", domain.id),
        }
    }
    let report = deployment.auditor().await.unwrap().report_input(None).await.unwrap();
    let report = verify(&report, None).unwrap().report;
    for section in &report.products {
        assert!(section.spent.rho <= section.granted.rho, "{}", section.product);
        assert_eq!(section.charged.rho, section.spent.rho, "{}: nothing stays reserved", section.product);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_killed_in_a_round_answers_it_once_after_its_restart() {
    let root = tempfile::tempdir().unwrap();
    let mut deployment = Deployment::start(root.path(), setup()).unwrap();
    let (operator, id) = submitted(&mut deployment).await;
    until(&operator, &id, "round 2 asked").await;
    deployment.agents[0].kill().unwrap();
    let before = ledger(&deployment, DOMAINS[0].id);
    deployment.restart_agent(0).unwrap();
    let last = until(&operator, &id, "").await;
    assert_eq!(last.phase, "done", "{last:?}");
    settled(&mut deployment).await;
    let after = ledger(&deployment, DOMAINS[0].id);
    assert_eq!(after[..before.len()], before[..], "the ledger goes on where it was");
    assert_eq!(&published(&deployment), undisturbed().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_killed_in_a_round_goes_on_with_it_after_its_restart() {
    let root = tempfile::tempdir().unwrap();
    let mut deployment = Deployment::start(root.path(), setup()).unwrap();
    let (operator, id) = submitted(&mut deployment).await;
    until(&operator, &id, "round 2 asked").await;
    deployment.coordinator.kill().unwrap();
    deployment.restart_coordinator().unwrap();
    let operator = deployment.operator().await.unwrap();
    let last = until(&operator, &id, "").await;
    assert_eq!(last.phase, "done", "{last:?}");
    settled(&mut deployment).await;
    assert_eq!(&published(&deployment), undisturbed().await);
}

/// With one agent away, the coordinator dies when it holds the vectors of all others: they are still there for the sum, and
/// nobody pays for a second one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vectors_that_were_acknowledged_survive_the_coordinator() {
    let root = tempfile::tempdir().unwrap();
    let mut deployment = Deployment::start(root.path(), setup()).unwrap();
    let (operator, id) = submitted(&mut deployment).await;
    until(&operator, &id, "round 2 asked").await;
    deployment.agents[0].kill().unwrap();
    let members = DOMAINS.iter().filter(|domain| domain.participation == Participation::Member).count();
    let packs = PackStore::open(&deployment.layout.coordinator().join("data").join("packs")).unwrap();
    let arrived = || {
        let names = packs.list().unwrap();
        // A pack may be removed between listing and reading; the next look decides.
        names.iter().map(|name| packs.read(name).map_or(0, |vectors| vectors.len())).max().unwrap_or(0)
    };
    let all_but_one = async {
        while arrived() < members - 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, all_but_one).await.expect("the other agents' vectors are kept");
    let acknowledged: Vec<_> =
        DOMAINS.iter().map(|domain| debits(&ledger(&deployment, domain.id))).skip(1).collect();
    deployment.coordinator.kill().unwrap();
    deployment.restart_coordinator().unwrap();
    deployment.restart_agent(0).unwrap();
    let operator = deployment.operator().await.unwrap();
    let last = until(&operator, &id, "").await;
    assert_eq!(last.phase, "done", "{last:?}");
    settled(&mut deployment).await;
    for (domain, before) in DOMAINS.iter().skip(1).zip(acknowledged) {
        assert!(debits(&ledger(&deployment, domain.id)).is_superset(&before), "{}", domain.id);
    }
    assert_eq!(&published(&deployment), undisturbed().await);
    assert!(packs.list().unwrap().is_empty(), "vectors of ended collections are removed");
}
