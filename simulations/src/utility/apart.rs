//! A federation whose domains differ, from the plan that asks for a domain column to the context that begins with own rows.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::Path;

use tabmesh_agent::publication::Artefacts;
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::contract::Contract;
use tabmesh_federation::manifest::Trust;
use tabmesh_federation::plan::Plan;
use tabmesh_privacy::signature::VerifyingKey;

use super::contracts::Declared;
use super::federation::{self, Federated, Setting};
use super::made_up::{write_set, write_set_apart};
use super::member::Member;
use super::set::Set;
use crate::quickstart::pki::Role;
use crate::scenario::document::FlowFaults;

const DOMAINS: [&str; 4] = ["north_1", "south_1", "east_1", "west_1"];
const PLAN: &str = "kind: TabmeshPlan\nname: apart\ntarget: target.label\ncohort: {min_agents: 4}\nprivacy: {epsilon: 8}\n\
    release: {domain_column: true, deadline_s: 600}\ncorpus: {rows: 6000}\npretrain: {steps: 0}\nrounds: {count: 0}\n";

fn federated(write: fn(&Path, &[&str])) -> (tempfile::TempDir, Vec<Member>, Federated) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &DOMAINS);
    let set = Set::read(folder.path()).unwrap();
    let declared = Declared::from_rows(&set, &set.pooled(&set.domains).unwrap()).unwrap();
    let of =
        |domain: &String| declared.member(domain, &set.train(domain), &set.test(domain), &BTreeSet::new());
    let members: Vec<Member> = set.domains.iter().map(of).collect();
    let (plan, _) = Plan::parse(PLAN.as_bytes(), "plan.yaml").unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let faults = FlowFaults::default();
    let setting = Setting { members: &members, plan: &plan, seed: 0, faults: &faults, tell: &|_| () };
    let federated = runtime.block_on(federation::run(&folder.path().join("run"), setting)).unwrap();
    (folder, members, federated)
}

/// The corpus as an agent loads it for a data product, and the features of its schema by name.
fn corpus(federated: &Federated, member: &Member, product: &str) -> (TypedBatch, usize) {
    let key = std::fs::read(federated.pki.signing_public_key(&Role::Coordinator)).unwrap();
    let key = VerifyingKey::from_bytes(key.try_into().unwrap());
    let data = federated.layout.domain(&member.name()).join("data");
    let artefacts = Artefacts::open(&data, key, Trust::InsecureDev).unwrap();
    let (_, manifest) = artefacts.current().unwrap().unwrap();
    let kind = manifest.schema.features().iter().position(|feature| feature.id.as_str().contains("kind"));
    (artefacts.corpus_for(&manifest.corpus, &manifest.schema, product).unwrap(), kind.unwrap())
}

/// Rows as text, in which missing numbers are alike.
fn shown(rows: &TypedBatch) -> String {
    format!("{:?} {:?}", rows.columns, rows.labels)
}

/// Share of level `code` among the first rows of the column `kind`.
fn share(rows: &TypedBatch, kind: usize, code: u32) -> f64 {
    let TypedColumn::Categorical(codes) = &rows.columns[kind] else { panic!("kind is a category") };
    codes.iter().take(1000).filter(|own| **own == code).count() as f64 / 1000.0
}

#[test]
fn where_domains_differ_each_finds_its_own_rows_first() {
    let (_folder, members, federated) = federated(write_set_apart);
    for (at, member) in members.iter().enumerate() {
        // The contract that the agent runs under is the member's, but for what may be told.
        let text = std::fs::read_to_string(federated.layout.contract(&member.name())).unwrap();
        let (contract, _) = Contract::parse("contract.yaml", &text).unwrap();
        let (own, kind) = corpus(&federated, member, &contract.name);
        let (all, _) = corpus(&federated, member, "");
        // 0.55 + 0.45/3 of a domain's rows are of its kind; the first kind is that of two domains in four.
        let (code, of_all) = if at % 3 == 0 { (0, 0.425) } else { (u32::try_from(at).unwrap(), 0.2875) };
        assert!(
            (share(&own, kind, code) - 0.7).abs() < 0.12,
            "{}: {}",
            member.domain,
            share(&own, kind, code)
        );
        assert!((share(&all, kind, code) - of_all).abs() < 0.1, "{}", share(&all, kind, code));
        assert_eq!(own.rows(), all.rows());
        // It is what the agent's own context begins with.
        let serving = federated.ends[at].serving.as_ref().unwrap();
        assert_eq!(shown(serving.published().unwrap().unwrap().corpus()), shown(&own));
    }
}

/// Noise makes no column: the corpus is what it would be without.
#[test]
fn domains_that_are_alike_are_not_told_apart() {
    let (_folder, members, federated) = federated(write_set);
    let (all, _) = corpus(&federated, &members[0], "");
    for member in &members {
        assert_eq!(shown(&corpus(&federated, member, &member.product).0), shown(&all));
    }
}
