//! What operators, owners and auditors see beside a plan: budget alerts at a webhook, figures for a scraper, refused plans and
//! disjoint sources in the report.
//!
//! The deployment is real: processes over mutual TLS, on the shipped tables cut short.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

#[allow(dead_code, reason = "other tests use the rest")]
mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use tabmesh_agent::alerts::Alert;
use tabmesh_privacy::report::{Report, render_html, verify};
use tabmesh_sim::quickstart::dataset::{DOMAINS, Participation, members};
use tabmesh_sim::quickstart::deployed::{Deployment, Lines, Setup};
use tabmesh_sim::quickstart::deployment::{PlanChoices, plan_yaml};
use tabmesh_sim::quickstart::pki::Role;

use crate::common::{submitted, until};

/// Shares of the budget that operators want to hear of; the plan uses all of it.
const PERCENT: [u8; 2] = [25, 75];
/// Longest wait for an alert that is due.
const PATIENCE: Duration = Duration::from_secs(60);
/// Why the owners of the first two domains know that their people are others.
const REASON: &str = "nobody has two main industries";

fn setup(webhook: u16, metrics: u16) -> Setup {
    let plan = PlanChoices { corpus_rows: 500, pretrain_steps: 1, rounds: 1, ..PlanChoices::default() };
    let [low, high] = PERCENT;
    let more = Lines {
        coordinator: format!("metrics_listen: 127.0.0.1:{metrics}\n"),
        agent: format!(
            "alerts: {{percent: [{low}, {high}], webhook: 'http://127.0.0.1:{webhook}/budget'}}\n"
        ),
        privacy: "  entity_namespace: people\n".to_owned(),
    };
    Setup { program: env!("CARGO_BIN_EXE_tabmesh-sim").into(), rows: Some(200), plan, seed: Some(5), more }
}

/// An operator's webhook: takes every alert that is posted.
fn webhook() -> (u16, Receiver<Alert>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, heard) = channel();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let text = request(&mut stream);
            stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("POST /budget "), "{head}");
            if sender.send(serde_json::from_str(body).unwrap()).is_err() {
                return;
            }
        }
    });
    (port, heard)
}

/// Head and body of a request with a stated length.
fn request(stream: &mut TcpStream) -> String {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let got = stream.read(&mut buffer).unwrap();
        bytes.extend_from_slice(&buffer[..got]);
        let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            assert!(got > 0, "the request ends in its head");
            continue;
        };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:")).unwrap();
        if body.len() >= length.trim().parse::<usize>().unwrap() {
            return String::from_utf8(bytes).unwrap();
        }
        assert!(got > 0, "the request ends in its body");
    }
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The figures of a scrape, by name with labels.
fn scrape(port: u16) -> BTreeMap<String, f64> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    let figures = text.lines().filter(|line| line.starts_with("tabmesh_"));
    let figures = figures.filter_map(|line| line.rsplit_once(' '));
    figures.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
}

/// The agent's own command line.
fn agent(words: &[&str]) -> bool {
    let args = ["tabmesh-agent"].iter().chain(words).map(OsString::from);
    tabmesh_agent::cli::main(args) == ExitCode::SUCCESS
}

async fn report(deployment: &Deployment) -> Report {
    let bytes = deployment.auditor().await.unwrap().report_input(None).await.unwrap();
    verify(&bytes, None).unwrap().report
}

/// Both owners sign; each needs its own agent's configuration alone.
fn declare(deployment: &mut Deployment) {
    let layout = deployment.layout.clone();
    let config = |at: usize| layout.agent_config(DOMAINS[at].id).display().to_string();
    let file = layout.coordinator_config().with_file_name("disjoint.json").display().to_string();
    let (first, second) = (Role::agent(DOMAINS[0].id).spiffe_id(), Role::agent(DOMAINS[1].id).spiffe_id());
    let sign = |at: usize| agent(&["disjoint", "sign", "--config", &config(at), "--insecure-dev", &file]);
    let declare = |with: &str, file: &str| {
        let named = ["--agent", with, "--lineage", "train.parquet", "--reason", REASON, "--insecure-dev"];
        agent(&[&["disjoint", "declare", "--config", &config(0)][..], &named, &[file]].concat())
    };
    assert!(!declare(&first, &file), "a source isn't disjoint from itself");
    assert!(declare(&second, &file));
    assert!(!declare(&second, &file), "a declaration isn't overwritten");
    assert!(!sign(0), "an owner signs once");
    assert!(!sign(2), "who owns neither source can't sign");
    // Half a declaration is none: a coordinator that is told of it says so and doesn't start.
    deployment.configure_coordinator("disjoint: [disjoint.json]\n");
    deployment.coordinator.kill().unwrap();
    let refused = deployment.restart_coordinator().unwrap_err().to_string();
    assert!(refused.contains("disjoint.json") && refused.contains("hasn't signed"), "{refused}");
    assert!(sign(1));
    deployment.restart_coordinator().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn budgets_are_heard_of_and_refusals_and_declarations_are_reported() {
    let root = tempfile::tempdir().unwrap();
    let ((webhook, heard), metrics) = (webhook(), free_port());
    let mut deployment = Deployment::start(root.path(), setup(webhook, metrics)).unwrap();
    let operator = deployment.operator().await.unwrap();
    deployment.admitted(&operator).await.unwrap();

    // Above what the policy lets through at this sensitivity: it refuses before any agent sees it. A dry run refuses too, and is no request.
    let greedy = PlanChoices { name: "greedy".into(), epsilon: 5.0, ..PlanChoices::default() };
    let greedy = plan_yaml(&greedy).into_bytes();
    assert!(!operator.validate_plan(greedy.clone()).await.unwrap().valid);
    operator.submit_plan(greedy).await.unwrap_err();

    let (operator, id) = submitted(&mut deployment).await;
    assert_eq!(until(&operator, &id, "").await.phase, "done");
    deployment.promoted().await.unwrap();

    // Every member's operator hears of each share once, from the agent that keeps the ledger.
    let mut said: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for _ in 0..members().count() * PERCENT.len() {
        let alert = heard.recv_timeout(PATIENCE).unwrap();
        assert!(alert.epsilon_charged.unwrap() <= alert.epsilon_granted, "{alert:?}");
        said.entry(alert.product).or_default().push(alert.percent);
    }
    said.values_mut().for_each(|percent| percent.sort_unstable());
    assert_eq!(said.len(), members().count());
    assert!(said.values().all(|percent| *percent == PERCENT), "{said:?}");

    declare(&mut deployment);
    deployment.admitted(&deployment.operator().await.unwrap()).await.unwrap();
    let report = report(&deployment).await;
    let [refused] = report.refused.as_slice() else { panic!("one refused plan: {:?}", report.refused) };
    assert!(refused.rules.iter().any(|rule| rule == "epsilon_above_limit"), "{refused:?}");
    // Both lines stand in the audit log, which the agents cosigned at the plan's end.
    let entries = &report.audit.as_ref().unwrap().entries;
    assert_eq!((report.published.len(), entries.len()), (1, 2), "{entries:?}");
    let [declared] = report.disjoint.as_slice() else { panic!("one declaration") };
    assert_eq!(declared.said().unwrap().reason, REASON);
    let [headline] = report.headlines.as_slice() else { panic!("one namespace: {:?}", report.headlines) };
    assert_eq!(headline.in_at_most, Some(headline.accounts - 1));
    let spent: Vec<u64> = report.products.iter().map(|section| section.spent.rho.units()).collect();
    let apart = |at: usize| {
        let product = format!("{}.", DOMAINS[at].id);
        report
            .products
            .iter()
            .find(|section| section.product.starts_with(&product))
            .unwrap()
            .spent
            .rho
            .units()
    };
    let saved = apart(0).min(apart(1));
    assert!(saved > 0);
    assert_eq!(headline.spent.rho.units(), spent.iter().sum::<u64>() - saved);
    let key = tabmesh_privacy::signature::SigningKey::generate(&ring::rand::SystemRandom::new()).unwrap().1;
    assert!(render_html(&report, &report.sign(&key)).unwrap().contains(REASON));

    // What the scraper reads is what the report says.
    let figures = scrape(metrics);
    let plans = figures.iter().filter(|(name, _)| name.starts_with("tabmesh_plans{")).map(|(_, plans)| plans);
    assert!((plans.sum::<f64>() - 1.0).abs() < 1e-9, "the refused plan is none: {figures:?}");
    let agents = |state: &str| figures[&format!("tabmesh_agents{{state=\"{state}\"}}")];
    assert_eq!((agents("admitted"), agents("connected")), (DOMAINS.len() as f64, DOMAINS.len() as f64));
    for section in &report.products {
        let name = format!("tabmesh_epsilon{{product=\"{}\",state=\"spent\"}}", section.product);
        let spent = section.spent.epsilon.map_or(0.0, |epsilon| epsilon.get());
        assert!((figures[&name] - spent).abs() < 1e-9, "{name}");
        let ratio = figures[&format!("tabmesh_epsilon_spent_ratio{{product=\"{}\"}}", section.product)];
        let member = DOMAINS.iter().any(|domain| {
            domain.participation == Participation::Member
                && section.product.starts_with(&format!("{}.", domain.id))
        });
        assert!(if member { ratio > 0.9 } else { ratio == 0.0 }, "{}: {ratio}", section.product);
    }
}
