//! Secure sums end to end: real processes over mutual TLS, on the shipped tables cut short.
//!
//! Under a seed everybody's noise can be drawn again. So each sum that the coordinator unmasked is held, value by value,
//! against the plain sum of the same noised vectors, made here from the tables: counts of every release stage, gradients
//! of every round. Then the same with an agent that dies within a round, and with processes that are killed and come
//! back.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use tabmesh_agent::gate::Gate;
use tabmesh_agent::train::Trainer;
use tabmesh_agent::{Agent, Switches};
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_federation::descriptor::RoundDescriptor;
use tabmesh_federation::id::{AgentId, Digest, PlanDigest};
use tabmesh_federation::plan::Plan;
use tabmesh_federation::secagg::contribution::Contribution;
use tabmesh_federation::secagg::descriptor::SumDescriptor;
use tabmesh_federation::secagg::document::{Opening, Summed};
use tabmesh_privacy::ledger::{Commit, Entry, Purpose};
use tabmesh_privacy::noise::{NoiseSource, Purpose as NoisePurpose};
use tabmesh_privacy::release::{ColumnRef, Counter, ReleaseQuery};
use tabmesh_privacy::report::{DEPLOYMENT_MODEL_SUMS, Report, verify};
use tabmesh_proto::client::OperatorClient;
use tabmesh_proto::message::Id;
use tabmesh_sim::quickstart::dataset::{DOMAINS, Domain, members, newcomers};
use tabmesh_sim::quickstart::deployed::{Deployment, Lines, Setup};
use tabmesh_sim::quickstart::deployment::{Layout, PlanChoices};
use tabmesh_store::{BlobStore, Records, Sled};
use tabmesh_tfm::table::Coding;
use tokio::sync::OnceCell;

use crate::common::{Published, published, submitted, until};

/// Rounds of the plan.
const ROUNDS: u32 = 2;
/// Stages of the release.
const STAGES: u32 = 4;
/// Seed of noise and secrets.
const SEED: u64 = 23;

fn setup(deadline_s: u32) -> Setup {
    let plan = PlanChoices {
        corpus_rows: 1_000,
        pretrain_steps: 2,
        rounds: ROUNDS,
        deadline_s,
        secure_sum: true,
        ..PlanChoices::default()
    };
    Setup {
        program: env!("CARGO_BIN_EXE_tabmesh-sim").into(),
        rows: Some(200),
        plan,
        seed: Some(SEED),
        more: Lines::default(),
    }
}

/// A deployment with its plan submitted. Every contract keeps its domain's aggregates confidential.
async fn started(root: &Path, deadline_s: u32) -> (Deployment, OperatorClient, Id) {
    let mut deployment = Deployment::start(root, setup(deadline_s)).unwrap();
    let (operator, id) = submitted(&mut deployment).await;
    (deployment, operator, id)
}

async fn done(operator: &OperatorClient, id: &Id) {
    let last = until(operator, id, "").await;
    assert_eq!(last.phase, "done", "{last:?}");
}

/// Debits of secure sums, with their places in the ledger.
fn all_debits(layout: &Layout, domain: &str) -> Vec<(u64, Commit)> {
    let folder = layout.domain(domain).join("data").join("books");
    let mut found = Vec::new();
    for entry in tabmesh_agent::books::read_entries(&folder).unwrap() {
        if let Entry::Commit(commit) = Entry::from_json(&entry.payload).unwrap() {
            assert!(commit.event.shares.is_some(), "no vector leaves without a mask");
            found.push((entry.seq, *commit));
        }
    }
    found
}

/// Debits by purpose and step; a step debited twice stops the test.
fn debits(layout: &Layout, domain: &str) -> BTreeMap<(Purpose, u64), (u64, Commit)> {
    let mut found = BTreeMap::new();
    for (seq, commit) in all_debits(layout, domain) {
        let shares = commit.event.shares.unwrap();
        assert_eq!((shares.agents, shares.dropouts, shares.colluders), (5, 1, 1));
        let step = (commit.purpose, commit.step);
        assert!(found.insert(step, (seq, commit)).is_none(), "{domain}: {step:?} was debited twice");
    }
    found
}

/// Every stage and round.
fn all_steps() -> BTreeSet<(Purpose, u64)> {
    let stages = (1..=STAGES).map(|stage| (Purpose::Release, u64::from(stage)));
    stages.chain((0..ROUNDS).map(|round| (Purpose::Round, u64::from(round)))).collect()
}

/// What a coordinator has recorded of a sum.
struct Recorded {
    opening: Opening,
    values: Vec<i64>,
    survivors: BTreeSet<AgentId>,
}

#[derive(Deserialize)]
struct Opened {
    opening: Opening,
}

#[derive(Deserialize)]
struct Ended {
    /// Nothing of an attempt that was given up.
    summed: Option<Sum>,
}

#[derive(Deserialize)]
struct Sum {
    values: Vec<i64>,
    survivors: BTreeSet<AgentId>,
}

/// The sums in the records of a coordinator that has been stopped, in the order they were opened.
fn recorded(layout: &Layout) -> Vec<Recorded> {
    let data = layout.coordinator().join("data");
    let records = Sled::open(&data.join("records")).unwrap();
    let blobs = BlobStore::open(&data.join("blobs")).unwrap();
    let blob = |record: &[u8]| blobs.get(&String::from_utf8_lossy(record).parse().unwrap()).unwrap();
    let mut sums = Vec::new();
    let kept = records.scan_all(b"sum/").unwrap();
    for (key, record) in &kept {
        let key = String::from_utf8_lossy(key);
        assert!(!key.contains("/answer/"), "keys and shares of an ended sum are kept: {key}");
        let Some(id) = key.strip_suffix("/opened") else { continue };
        let end = records.get(format!("{id}/ended").as_bytes()).unwrap().unwrap();
        let opened: Opened = serde_json::from_slice(&blob(record)).unwrap();
        let ended: Ended = serde_json::from_slice(&blob(&end)).unwrap();
        let Some(Sum { values, survivors }) = ended.summed else { continue };
        sums.push(Recorded { opening: opened.opening, values, survivors });
    }
    sums
}

/// The agent of a domain, opened in this process once its own has ended.
fn opened(layout: &Layout, domain: &Domain) -> Agent {
    let config = tabmesh_agent::config::Config::load(&layout.agent_config(domain.id)).unwrap();
    let switches = Switches { insecure_dev: true, reproducible_noise: Some(SEED) };
    Agent::open(config, switches, NoiseSource::Seeded { seed: SEED }, Arc::new(|| 0)).unwrap()
}

fn counts(query: &ReleaseQuery, agent: &Agent, training: &TypedBatch) -> Vec<i64> {
    let schema = &agent.work.domain.schema;
    let features = query.attributes.iter().filter(|attribute| !attribute.is_label());
    let columns: Vec<ColumnRef<'_>> = features
        .map(|attribute| {
            let at = schema.features().iter().position(|f| f.id.as_str() == attribute.id).unwrap();
            match &training.columns[at] {
                TypedColumn::Numeric(values) => ColumnRef::Numeric(values),
                TypedColumn::Categorical(codes) => ColumnRef::Codes(codes),
            }
        })
        .collect();
    let mut counter = Counter::new(query).unwrap();
    counter.add(&columns, &training.labels).unwrap();
    counter.finish()
}

/// One agent's noised vector for a sum, made anew from its table.
fn contribution(layout: &Layout, domain: &Domain, agent: &Agent, sum: &Recorded) -> Vec<i64> {
    let facts = &agent.work.domain;
    let rows = facts.rows(&facts.schema).unwrap();
    let training = rows.take(&Gate::new(&facts.secret("gate")).split(&rows).training);
    let (purpose, vector) = match &sum.opening.summed {
        Summed::Stage(text) => {
            let query = ReleaseQuery::from_json(text.as_bytes()).unwrap();
            (NoisePurpose::Release, counts(&query, agent, &training))
        }
        Summed::Round(text) => {
            let descriptor = RoundDescriptor::from_bytes(text.as_bytes()).unwrap();
            let (plan, _) = Plan::parse(&std::fs::read(layout.plan()).unwrap(), "plan.yaml").unwrap();
            let artefacts = &agent.work.artefacts;
            let mut draws = agent.work.books().draws().unwrap();
            let coding = agent.work.coding(&descriptor.plan);
            assert_eq!(coding, Coding::OwnRow, "the plan's release counted its rows");
            let trainer =
                Trainer::new(artefacts, &descriptor, &plan, &facts.schema, &training, coding).unwrap();
            (NoisePurpose::Round, trainer.clipped_sum(&descriptor, &mut draws).unwrap())
        }
    };
    let bytes = sum.opening.descriptor.as_bytes();
    let mut debits = all_debits(layout, domain.id);
    debits.retain(|(_, commit)| commit.query_digest == *Digest::of(bytes).as_bytes());
    let [(seq, commit)] = debits.as_slice() else { panic!("one debit for an attempt, got {}", debits.len()) };
    let seq = *seq;
    let descriptor = SumDescriptor::from_bytes(bytes).unwrap();
    let (id, product) = (facts.identity.to_string(), &facts.contract.name);
    let mut noise = NoiseSource::Seeded { seed: SEED }.stream(&id, product, seq, purpose).unwrap();
    let noised = Contribution::noised(&vector, &descriptor, Digest::of(bytes), seq, &mut noise).unwrap();
    assert_ne!(noised.values().as_slice(), vector, "there is noise in it");
    let unmasked = Digest::of_payload(noised.values().as_slice());
    assert_ne!(commit.payload_digest, *unmasked.as_bytes(), "what was sent is masked");
    noised.values().as_slice().to_vec()
}

/// Holds every recorded sum against the plain sum of the same vectors; gives the survivors of each.
fn sums_are_plain_sums(layout: &Layout) -> Vec<usize> {
    let agents: Vec<(&Domain, Agent)> = members().map(|domain| (domain, opened(layout, domain))).collect();
    let mut survivors = Vec::new();
    let (sums, mut own_vectors) = (recorded(layout), Vec::new());
    for sum in &sums {
        let mut plain = vec![0_i64; sum.values.len()];
        let within = |agent: &Agent| {
            let id = agent.work.domain.identity.to_string();
            sum.survivors.iter().any(|survivor| survivor.as_str() == id)
        };
        for (domain, agent) in agents.iter().filter(|(_, agent)| within(agent)) {
            let own = contribution(layout, domain, agent, sum);
            plain.iter_mut().zip(&own).for_each(|(total, value)| *total += value);
            own_vectors.push(own);
        }
        assert!(plain.iter().any(|value| *value != 0));
        assert_eq!(sum.values, plain, "sum number {}", survivors.len());
        survivors.push(sum.survivors.len());
    }
    sums_alone_are_kept(layout, &sums, &own_vectors);
    survivors
}

/// What the coordinator keeps of a release stage.
#[derive(Deserialize)]
struct StageKept {
    #[serde(rename = "query")]
    _query: serde_json::Value,
    totals: BTreeMap<String, f64>,
}

/// The coordinator has every sum, and nowhere a domain's own vector or total.
fn sums_alone_are_kept(layout: &Layout, sums: &[Recorded], own_vectors: &[Vec<i64>]) {
    let mut files = Vec::new();
    read_all(&layout.coordinator(), &mut files);
    for sum in sums {
        assert!(keeps(&files, &sum.values), "the sums must be found, or this sees nothing");
    }
    assert_eq!(own_vectors.len(), sums.iter().map(|sum| sum.survivors.len()).sum::<usize>());
    // The search sees a vector in either of its forms, wherever in a file it stands.
    for form in [words, digits] {
        let own = own_vectors.first().unwrap();
        let planted = [b"before ".as_slice(), &form(own), b" after"].concat();
        assert!(keeps(&[planted], own), "a planted vector must be found");
    }
    for own in own_vectors {
        assert!(!keeps(&files, own), "the coordinator keeps a domain's own vector");
    }
    let stages: Vec<StageKept> = files.iter().filter_map(|file| serde_json::from_slice(file).ok()).collect();
    assert_eq!(stages.len(), STAGES as usize);
    assert!(stages.iter().all(|stage| stage.totals.is_empty()), "the coordinator keeps a domain's own total");
}

fn read_all(path: &Path, files: &mut Vec<Vec<u8>>) {
    if path.is_dir() {
        std::fs::read_dir(path).unwrap().for_each(|entry| read_all(&entry.unwrap().path(), files));
    } else {
        files.push(std::fs::read(path).unwrap());
    }
}

/// Whether a file has the first of these values in a row, as 64-bit words or as digits.
fn keeps(files: &[Vec<u8>], values: &[i64]) -> bool {
    let run = &values[..8];
    let has = |file: &[u8], wanted: &[u8]| {
        let starts = file.iter().enumerate().filter(|(_, byte)| **byte == wanted[0]);
        starts.into_iter().any(|(at, _)| file[at..].starts_with(wanted))
    };
    files.iter().any(|file| has(file, &words(run)) || has(file, &digits(run)))
}

fn words(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn digits(values: &[i64]) -> Vec<u8> {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",").into_bytes()
}

/// Stops every process of a deployment, so that its files can be opened.
fn stopped(mut deployment: Deployment) -> Layout {
    deployment.coordinator.kill().unwrap();
    deployment.agents.iter_mut().for_each(|agent| agent.kill().unwrap());
    deployment.layout.clone()
}

async fn report(deployment: &Deployment) -> Report {
    let report = deployment.auditor().await.unwrap().report_input(None).await.unwrap();
    verify(&report, None).unwrap().report
}

/// What an undisturbed run publishes; its sums and its report are checked on the way.
async fn undisturbed() -> &'static Published {
    static REFERENCE: OnceCell<Published> = OnceCell::const_new();
    let run = || async {
        let root = tempfile::tempdir().unwrap();
        let (mut deployment, operator, id) = started(root.path(), 180).await;
        done(&operator, &id).await;
        deployment.promoted().await.unwrap();
        local_noise_is_refused(&deployment.layout, &operator).await;
        let report = report(&deployment).await;
        assert_eq!(report.deployment_model, DEPLOYMENT_MODEL_SUMS);
        assert!(report.trust_model.iter().any(|line| line.contains("no more of the others collude")));
        for section in report.products.iter().filter(|section| section.spent.epsilon.is_some()) {
            assert!(section.spent.rho <= section.granted.rho, "{}", section.product);
            assert_eq!(section.charged.rho, section.spent.rho, "{}: nothing stays reserved", section.product);
        }
        assert_eq!((report.transparency.tier, report.published.len()), (3, 1), "stated, and published once");
        let plan = PlanDigest(report.published[0].plan_digest.parse().unwrap());
        let published = published(&deployment);
        let layout = stopped(deployment);
        for (domain, there) in members().map(|d| (d, true)).chain(newcomers().map(|d| (d, false))) {
            let counted = opened(&layout, domain).work.domain.counted_by(&plan).unwrap();
            assert_eq!(counted.is_some(), there, "{}: whose labels are in the release", domain.id);
        }
        for domain in members() {
            assert_eq!(debits(&layout, domain.id).into_keys().collect::<BTreeSet<_>>(), all_steps());
        }
        assert_eq!(sums_are_plain_sums(&layout), vec![5; (STAGES + ROUNDS) as usize]);
        published
    };
    REFERENCE.get_or_init(run).await
}

/// The same plan with local noise would show each domain's aggregates: the contracts refuse it, by name.
async fn local_noise_is_refused(layout: &Layout, operator: &OperatorClient) {
    let plan = std::fs::read_to_string(layout.plan()).unwrap();
    let local = plan.replace(SECURE, "");
    assert_ne!(local, plan);
    let local = local.into_bytes();
    let validation = operator.validate_plan(local.clone()).await.unwrap();
    assert!(!validation.valid);
    let named = |rule: &str| validation.findings.iter().any(|finding| finding.text.contains(rule));
    assert!(named("confidential_aggregates"), "{:?}", validation.findings);
    assert!(operator.submit_plan(local).await.is_err());
}

/// What makes the plan one with secure sums.
const SECURE: &str = ", noise_placement: secure_sum, secure_sum: {colluders: 1, dropouts: 1}";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_sum_is_the_plain_sum_of_the_same_noised_vectors() {
    undisturbed().await;
}

/// An agent dies within the first round and stays away: whether it is in that sum or not, the others' noise is enough,
/// and what it was debited stays debited.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sum_goes_on_without_an_agent_that_died() {
    let root = tempfile::tempdir().unwrap();
    // Six steps of ten seconds: the dead agent's first one is waited for in every later sum.
    let (mut deployment, operator, id) = started(root.path(), 60).await;
    until(&operator, &id, "round 1 asked").await;
    deployment.agents[0].kill().unwrap();
    let before = debits(&deployment.layout, DOMAINS[0].id);
    done(&operator, &id).await;
    let layout = stopped(deployment);
    assert_eq!(debits(&layout, DOMAINS[0].id), before, "a debit is never taken back");
    let survivors = sums_are_plain_sums(&layout);
    assert_eq!(survivors[..STAGES as usize], [5; STAGES as usize]);
    assert!([4, 5].contains(&survivors[STAGES as usize]), "{survivors:?}");
    assert_eq!(survivors[STAGES as usize + 1..], [4], "{survivors:?}");
}

/// A plan whose sums bear no loss loses an agent for good: those who are left sum again, with fresh noise, at another
/// debit, out of what the plan has set aside.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sum_that_lost_too_many_is_made_again_by_those_who_are_left() {
    let root = tempfile::tempdir().unwrap();
    let mut deployment = Deployment::start(root.path(), setup(60)).unwrap();
    let plan = std::fs::read_to_string(deployment.layout.plan()).unwrap();
    let (cohort, again) =
        ("min_agents: 5", "noise_placement: secure_sum, secure_sum: {dropouts: 0, retries: 2}");
    assert!(plan.contains(cohort) && plan.contains(SECURE));
    let plan = plan.replace(cohort, "min_agents: 4").replace(SECURE, &format!(", {again}"));
    std::fs::write(deployment.layout.plan(), plan).unwrap();
    let (operator, id) = submitted(&mut deployment).await;
    until(&operator, &id, "round 1 asked").await;
    deployment.agents[0].kill().unwrap();
    let before = all_debits(&deployment.layout, DOMAINS[0].id);
    done(&operator, &id).await;
    for domain in members().skip(1) {
        let debits = all_debits(&deployment.layout, domain.id);
        // All four were asked for a vector over four agents; over five only if the fifth was lost after it had shared.
        let last = debits.iter().filter(|(_, commit)| (commit.purpose, commit.step) == (Purpose::Round, 1));
        let agents: Vec<u32> = last.map(|(_, commit)| commit.event.shares.unwrap().agents).collect();
        assert!(agents == [4] || agents == [5, 4], "{}: {agents:?}", domain.id);
        let spent: u64 = debits.iter().map(|(_, commit)| commit.event.rho.units()).sum();
        every_debit_is_reported(&deployment, domain, spent).await;
    }
    let layout = stopped(deployment);
    assert_eq!(all_debits(&layout, DOMAINS[0].id), before, "a debit is never taken back");
    let survivors = sums_are_plain_sums(&layout);
    assert_eq!(survivors[..STAGES as usize], [5; STAGES as usize]);
    assert_eq!(survivors[STAGES as usize + 1..], [4], "{survivors:?}");
}

/// Waits until a report has a domain's every debit: agents state their ledgers once they hear that the plan is over.
async fn every_debit_is_reported(deployment: &Deployment, domain: &Domain, units: u64) {
    let mut found = 0;
    for _ in 0..300 {
        let report = report(deployment).await;
        let section = report.products.iter().find(|section| section.product.starts_with(domain.id)).unwrap();
        assert!(section.spent.rho <= section.granted.rho);
        found = section.spent.rho.units();
        if found == units {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    panic!("{}: expected {units} units in the report, got {found}", domain.id);
}

/// SIGKILL leaves no time for any clean-up: an agent within one round, the coordinator within the next. Both go on where
/// they were, nobody pays twice, and under equal seeds the model is that of an undisturbed run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_killed_within_a_sum_go_on_with_it_after_their_restart() {
    let root = tempfile::tempdir().unwrap();
    let (mut deployment, operator, id) = started(root.path(), 180).await;
    until(&operator, &id, "round 1 asked").await;
    deployment.agents[0].kill().unwrap();
    deployment.restart_agent(0).unwrap();
    until(&operator, &id, "round 2 asked").await;
    deployment.coordinator.kill().unwrap();
    deployment.restart_coordinator().unwrap();
    let operator = deployment.operator().await.unwrap();
    done(&operator, &id).await;
    deployment.promoted().await.unwrap();
    let found = published(&deployment);
    let layout = stopped(deployment);
    for domain in members() {
        assert_eq!(debits(&layout, domain.id).into_keys().collect::<BTreeSet<_>>(), all_steps());
    }
    assert_eq!(sums_are_plain_sums(&layout), vec![5; (STAGES + ROUNDS) as usize]);
    assert_eq!(&found, undisturbed().await);
}
