//! Scenarios from end to end: the worked example of the guide, killed, resumed, split over shards and compared.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::compare::{CompareArgs, compare};
use super::document::Scenario;
use super::report::{ReportArgs, report};
use super::results::{Noise, RunFolder, Shard};
use super::run::{How, RunArgs, run};
use super::sweep::{SweepArgs, sweep};
use super::targets::{TargetsArgs, targets};
use crate::utility::contracts::Declared;
use crate::utility::made_up::{self, write_set};
use crate::utility::set::Set;

fn scenarios() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")
}

fn how(shard: Option<Shard>) -> How {
    How { data: None, shard, sets: Vec::new(), jobs: Some(2), real: false }
}

#[test]
fn every_shipped_scenario_is_one_and_the_schema_is_published() {
    let mut seen = 0;
    for entry in std::fs::read_dir(scenarios()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "yaml") {
            Scenario::load(&path).unwrap_or_else(|error| panic!("{error:#}"));
            seen += 1;
        }
    }
    assert!(seen >= 5, "{seen}");
    let published = std::fs::read_to_string(scenarios().join("scenario.schema.json")).unwrap();
    let published: serde_json::Value = serde_json::from_str(&published).unwrap();
    assert_eq!(
        published,
        Scenario::json_schema(),
        "write `tabmesh-sim scenario schema` to scenario.schema.json"
    );
}

/// The worked example of docs/RESEARCH.md, which shows the document as it is.
#[test]
fn the_worked_example_runs_as_the_guide_says() {
    let guide = include_str!("../../../docs/RESEARCH.md");
    let example = std::fs::read_to_string(scenarios().join("example.yaml")).unwrap();
    let shown: String = example.lines().map(|line| format!("    {line}\n")).collect();
    assert!(guide.contains(shown.trim_end()), "docs/RESEARCH.md shows another example.yaml");

    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("whole");
    let args = RunArgs { scenario: scenarios().join("example.yaml"), out: Some(out.clone()), how: how(None) };
    let folder = run(&args).unwrap();
    let rows = folder.all_rows().unwrap();
    for (arm, method) in
        [("rivals", "local_logistic"), ("fedavg", "model"), ("fedprox", "model"), ("private", "model")]
    {
        let of = |row: &&super::results::Row| row.arm == arm && row.method == method && row.metric == "auc";
        let domains = rows.iter().filter(of).filter(|row| row.seed == 1 && row.round.is_none_or(|r| r == 10));
        assert_eq!(domains.count(), 8, "{arm}");
    }
    let page = std::fs::read_to_string(folder.report_path()).unwrap();
    for part in
        ["Test figures", "Learning curves", "Privacy and utility", "Calibration", "Domains of", "Rounds"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("<script") && !page.contains("http"), "the page loads something");

    // A run that was killed goes on: tasks that are there stay, the rest is done, and the bytes are those of a whole run.
    let whole = std::fs::read(folder.results_path()).unwrap();
    let lost = out.join("tasks").join("census_income.0001.private.jsonl");
    std::fs::remove_file(&lost).unwrap();
    std::fs::remove_file(folder.results_path()).unwrap();
    let kept = out.join("tasks").join("census_income.0000.private.jsonl");
    let before = std::fs::metadata(&kept).unwrap().modified().unwrap();
    run(&args).unwrap();
    assert_eq!(std::fs::read(folder.results_path()).unwrap(), whole);
    assert_eq!(std::fs::metadata(&kept).unwrap().modified().unwrap(), before);

    // Parts put together are the whole.
    for part in 1..=2 {
        let shard = Some(Shard { part, of: 2 });
        let out = Some(root.path().join("parts").join(part.to_string()));
        run(&RunArgs { out, how: how(shard), ..args.clone() }).unwrap();
    }
    let text = |path: &Path| path.display().to_string();
    let parts = text(&root.path().join("parts"));
    let compared =
        |a: String, b: String| compare(&CompareArgs { a, b, metric: "auc".into(), draws: 200 }).unwrap();
    for c in compared(parts.clone(), text(&out)) {
        assert!(c.difference.abs() < 1e-15 && c.low.abs() < 1e-15 && c.high.abs() < 1e-15, "{c:?}");
    }
    let one = compared(format!("{parts}@fedavg/model"), format!("{}@fedprox/model", text(&out)));
    assert_eq!((one.len(), one[0].seeds), (1, 2));
    let page = root.path().join("parts.html");
    report(&ReportArgs { runs: parts, out: Some(page.clone()) }).unwrap();
    assert!(page.is_file());
}

#[test]
fn a_sweep_has_a_run_for_every_combination() {
    let root = tempfile::tempdir().unwrap();
    let scenario = root.path().join("s.yaml");
    let text = "kind: TabmeshScenario\nname: s\ndata: {shipped: census_income}\nmetrics: [auc]\n\
                federations:\n  - {name: f, strategy: {kind: fedavg}, rounds: 2, local_steps: 1}\n";
    std::fs::write(&scenario, text).unwrap();
    let args = SweepArgs {
        scenario,
        sets: vec!["federations.f.rounds=1;2".into(), "federations.f.local_rate=0.1;1".into()],
        out: Some(root.path().join("out")),
        how: how(None),
    };
    let folders = sweep(&args).unwrap();
    assert_eq!(folders.len(), 4);
    let rounds = |i: usize| folders[i].scenario().unwrap().federations[0].rounds;
    assert_eq!([rounds(0), rounds(3)], [1, 2]);
    assert!(folders.iter().all(|folder| folder.report_path().is_file()));
    // One table has the means of all; runs of two keys are read by their folders, whole or in parts.
    let table = std::fs::read_to_string(root.path().join("out").join("sweep.csv")).unwrap();
    let means: usize = folders
        .iter()
        .map(|folder| std::fs::read_to_string(folder.summary_path()).unwrap().lines().count() - 1)
        .sum();
    assert_eq!(table.lines().count(), 1 + means);
    assert!(
        table.starts_with("variant,arm,") && table.contains("\nrounds=1+local_rate=0.1,f,model,"),
        "{table}"
    );
    let parts: Vec<_> = [1, 2]
        .into_iter()
        .map(|part| {
            let out = Some(root.path().join("parts").join(part.to_string()));
            sweep(&SweepArgs { out, how: how(Some(Shard { part, of: 2 })), ..args.clone() }).unwrap()
        })
        .collect();
    for (at, whole) in folders.iter().enumerate() {
        let text = |folder: &RunFolder| folder.root().display().to_string();
        let a = format!("{},{}", text(&parts[0][at]), text(&parts[1][at]));
        let compared = compare(&CompareArgs { a, b: text(whole), metric: "auc".into(), draws: 200 }).unwrap();
        assert!(!compared.is_empty() && compared.iter().all(|c| c.difference.abs() < 1e-15), "{compared:?}");
    }
    let refused = sweep(&SweepArgs { sets: vec!["federations.f.epochs=1".into()], ..args }).unwrap_err();
    assert!(format!("{refused:#}").contains("epochs"), "{refused:#}");
}

/// Domains of which each keeps a part of the columns learn together, and every flow or rival sees the same tables.
#[test]
fn columns_that_differ_are_missing_where_they_are_not() {
    let root = tempfile::tempdir().unwrap();
    let scenario = root.path().join("s.yaml");
    let text = "kind: TabmeshScenario\nname: s\ndata: {shipped: census_income}\n\
                partition: {kind: columns, share: 0.5}\nmetrics: [auc]\nrivals: [local_logistic]\n\
                federations:\n  - {name: f, strategy: {kind: fedavg}, rounds: 5, local_rate: 2}\n";
    std::fs::write(&scenario, text).unwrap();
    let out = Some(root.path().join("out"));
    let folder = run(&RunArgs { scenario, out, how: how(None) }).unwrap();
    let rows = folder.all_rows().unwrap();
    let auc: Vec<f64> = rows
        .iter()
        .filter(|r| r.arm == "f" && r.round == Some(5))
        .filter(|r| r.metric == "auc")
        .map(|r| r.value)
        .collect();
    assert_eq!(auc.len(), 6);
    assert!(auc.iter().sum::<f64>() / 6.0 > 0.6, "{auc:?}");
}

/// Runs a scenario on made-up tables of some domains; gives what its folder holds.
fn ran_on(domains: &[&str], text: &str) -> (tempfile::TempDir, RunFolder) {
    let root = tempfile::tempdir().unwrap();
    let tables = root.path().join("tables");
    std::fs::create_dir_all(&tables).unwrap();
    write_set(&tables, domains);
    let scenario = root.path().join("s.yaml");
    let head = "kind: TabmeshScenario\nname: s\ndata: {folder: tables}\n";
    std::fs::write(&scenario, format!("{head}{text}")).unwrap();
    let out = Some(root.path().join("out"));
    let folder = run(&RunArgs { scenario, out, how: how(None) }).unwrap();
    (root, folder)
}

/// One flow in which everything goes wrong at once, and one without rounds under a secure sum.
#[test]
fn flows_with_faults_come_to_their_end_and_every_part_has_its_figures() {
    let domains = ["a", "b", "c", "d", "e", "f"];
    let (root, folder) = ran_on(
        &domains,
        "duplicates: true\nkeep_answers: true\nrivals: [local_trees, local_logistic, local_base, pooled_base]\n\
         tampering: [{share: 0.17, kind: {kind: label_shift, rate: 0.3}}]\n\
         flows:\n  - name: faulty\n    corpus_rows: 300\n    pretrain_steps: 0\n    rounds: 1\n\
         \x20   also: [corpus_local, own_label_kept, picked, shipped_blend]\n\
         \x20   faults: {late: 1, short_budget: 1, byzantine: {share: 0.17, attack: {kind: collusion_within_bound}}}\n\
         \x20 - {name: no_rounds, corpus_rows: 300, pretrain_steps: 0, rounds: 0, noise_placement: secure_sum}\n\
         targets:\n  aims:\n    - {kind: non_inferior, flow: no_rounds, margin: 0.5}\n",
    );
    let rows = folder.all_rows().unwrap();
    let values = |arm: &str, method: &str, metric: &str| -> Vec<f64> {
        let of = |row: &&super::results::Row| {
            row.arm == arm && row.method == method && row.metric == metric && row.round.is_none()
        };
        rows.iter().filter(of).map(|row| row.value).collect()
    };
    // The liar serves nothing; who came late or had no budget serves and has spent nothing.
    for method in ["served", "forest", "base", "corpus_local", "own_label_kept", "picked", "shipped_blend"] {
        assert_eq!(values("faulty", method, "auc").len(), 5, "{method}");
    }
    let spent = values("faulty", "served", "epsilon");
    assert_eq!(spent.len(), 3);
    assert!(spent.iter().all(|epsilon| *epsilon > 1.0 && *epsilon <= 3.0), "{spent:?}");
    assert!(root.path().join("out/adapters/made_up.0000.faulty.json").is_file());
    // Without rounds there is no forest, and the release has the budget.
    assert_eq!(
        (values("no_rounds", "served", "auc").len(), values("no_rounds", "forest", "auc").len()),
        (6, 0)
    );
    assert!(!root.path().join("out/adapters/made_up.0000.no_rounds.json").exists());
    // Shares of noise are rounded up, so some of the budget stays.
    let spent = values("no_rounds", "served", "epsilon");
    assert_eq!(spent.len(), 6);
    assert!(spent.iter().all(|epsilon| *epsilon > 0.5 && *epsilon <= 3.0), "{spent:?}");
    let noise =
        |arm: &str, method: &str| rows.iter().find(|r| r.arm == arm && r.method == method).unwrap().noise;
    assert_eq!(noise("no_rounds", "served"), Noise::SecureSum);
    assert_eq!(noise("faulty", "local_trees_corpus"), Noise::Local);
    assert_eq!(noise("rivals", "pooled_base"), Noise::None);
    // Counted before anything else: rows of numbers hardly repeat.
    let twice = values("duplicates", "test_rows", "among_own_training_rows");
    assert_eq!(twice.len(), 7);
    assert!(twice.iter().all(|share| *share < 0.5), "{twice:?}");

    let text = folder.root().display().to_string();
    let (a, b) = (format!("{text}@rivals/local_trees"), format!("{text}@no_rounds/served"));
    let c = compare(&CompareArgs { a, b, metric: "auc".into(), draws: 200 }).unwrap();
    assert_eq!((c[0].domains, c[0].entities), (6, 6 * made_up::ROWS));
    assert!(c[0].low < c[0].high);
    let judged = targets(&TargetsArgs { runs: text, draws: 200, out: None }).unwrap();
    assert_eq!(judged.verdicts[0].entities, 6 * made_up::ROWS);
    assert!(folder.targets_path().is_file());
    let page = std::fs::read_to_string(folder.report_path()).unwrap();
    assert!(page.contains("<h2>Targets</h2>") && page.contains("<h2>Duplicates</h2>"));
}

/// An adversary's domain is scored and counts nowhere; one that stands there twice counts twice.
#[test]
fn domains_of_an_adversary_are_left_out_of_means() {
    let (_root, folder) = ran_on(
        &["a", "b", "c", "d", "e", "f", "g", "h"],
        "metrics: [auc]\nrivals: [local_trees]\n\
         tampering: [{share: 0.25, kind: {kind: flipped_labels}}, {share: 0.13, kind: {kind: duplicated}}]\n\
         federations:\n  - {name: f, strategy: {kind: median}, rounds: 2, local_rate: 2, evaluate_every: 2}\n",
    );
    let rows = folder.all_rows().unwrap();
    for arm in ["f", "rivals"] {
        let own = |counted: bool| -> Vec<f64> {
            let of = |row: &&super::results::Row| row.arm == arm && row.metric == "auc" && row.domain != "*";
            rows.iter().filter(of).filter(|row| row.counted == counted).map(|row| row.value).collect()
        };
        assert_eq!((own(true).len(), own(false).len()), (6, 2), "{arm}");
        if arm == "rivals" {
            // Trees on flipped labels say the opposite on test rows that nobody touched.
            assert!(own(false).iter().all(|auc| *auc < 0.5), "{:?}", own(false));
        }
    }
}

/// Who leaves for good serves nothing; the others' rounds and choices go on.
#[test]
fn a_domain_that_leaves_within_the_rounds_keeps_nobody_from_the_end() {
    let (root, folder) = ran_on(
        &["a", "b", "c", "d", "e"],
        "metrics: [auc]\nflows:\n  - name: f\n    corpus_rows: 300\n    pretrain_steps: 0\n    rounds: 2\n\
         \x20   faults: {leaving: {domains: 1, after_rounds: 1}}\n",
    );
    let rows = folder.all_rows().unwrap();
    let served = rows.iter().filter(|row| row.method == "served" && row.metric == "auc");
    assert_eq!(served.count(), 4);
    // Both rounds took place.
    assert!(rows.iter().any(|row| row.method == "forest" && row.round == Some(2)));
    assert!(root.path().join("out/adapters/made_up.0000.f.json").is_file());
}

/// A liar who says the truth can't be told from an honest agent: the same bytes are published. One who doesn't changes them.
#[test]
fn a_liar_keeps_to_the_protocol_and_changes_nothing_but_values() {
    let adapter = |faults: &str| {
        let text = format!(
            "metrics: [auc]\nflows:\n  - {{name: f, epsilon: 8, corpus_rows: 300, pretrain_steps: 0, rounds: 1, faults: {{{faults}}}}}\n"
        );
        let (root, _folder) = ran_on(&["a", "b", "c", "d"], &text);
        std::fs::read(root.path().join("out/adapters/made_up.0000.f.json")).unwrap()
    };
    let honest = adapter("");
    assert_eq!(adapter("byzantine: {share: 0.25, attack: {kind: scaling, factor: 1}}"), honest);
    assert_ne!(adapter("byzantine: {share: 0.25, attack: {kind: sign_flip}}"), honest);
}

/// Under a seed, so that equal settings give equal bytes: what is drawn and counted changes what is published.
#[test]
fn sampled_rounds_and_norms_that_follow_a_quantile_come_to_their_end() {
    let learnt = |ending: &str, settings: &str| {
        let text = format!(
            "metrics: [auc]\nflows:\n  - {{name: f, epsilon: 8, corpus_rows: 300, pretrain_steps: 0, rounds: 2, {settings}}}\n"
        );
        let (root, folder) = ran_on(&["a", "b", "c", "d"], &text);
        let rows = folder.all_rows().unwrap();
        // A forest's figures come round by round as well, and the last round's are those of its end.
        let after = |round: Option<u32>| -> Vec<f64> {
            rows.iter().filter(|r| r.method == "forest" && r.round == round).map(|r| r.value).collect()
        };
        assert_eq!(after(Some(2)), after(None));
        assert!(after(None).is_empty() || after(Some(1)) != after(Some(2)));
        let page = std::fs::read_to_string(folder.report_path()).unwrap();
        assert_eq!(page.contains("<h2>Learning curves</h2>"), !after(None).is_empty());
        let methods: BTreeSet<String> = rows.into_iter().map(|row| row.method).collect();
        (std::fs::read(root.path().join(format!("out/adapters/made_up.0000.f.{ending}"))).unwrap(), methods)
    };
    let tokens = |settings: &str| {
        let text = format!("adapter: {{kind: feature_tokens}}, also: [rounds_untuned], {settings}");
        let (bytes, methods) = learnt("safetensors", &text);
        assert!(
            methods.contains("rounds") && methods.contains("rounds_untuned") && !methods.contains("forest")
        );
        bytes
    };
    let forest = |settings: &str| learnt("json", settings).0;
    for kind in [&tokens as &dyn Fn(&str) -> Vec<u8>, &forest] {
        let plain = kind("clip_norm: 1");
        assert_eq!(plain, kind("clip_norm: 1, sampling_rate: 1"));
        assert_ne!(plain, kind("clip_norm: 1, sampling_rate: 0.5"));
    }
    let followed = tokens("clip_norm: {quantile: 0.9, initial: 1}");
    let summed =
        tokens("clip_norm: {quantile: 0.9, initial: 1}, sampling_rate: 0.5, noise_placement: secure_sum");
    assert!(followed != summed && followed.len() == summed.len());
}

/// Tables of one's own, by contracts whose sources are relative to them, go through rivals, rounds and a flow.
#[test]
fn own_tables_by_contract_are_run() {
    let root = tempfile::tempdir().unwrap();
    let domains = ["north", "south", "east", "west"];
    write_set(root.path(), &domains);
    let set = Set::read(root.path()).unwrap();
    let declared = Declared::from_rows(&set, &set.pooled(&set.domains).unwrap()).unwrap();
    let mut data = String::new();
    for domain in domains {
        let train = set.train(domain);
        let member = declared.member(domain, &train, &set.test(domain), &BTreeSet::new());
        let (whole, relative) = (train.display().to_string(), format!("../train/{domain}.parquet"));
        let contract = member.contract.replace(&whole, &relative);
        assert!(contract.contains(&relative));
        std::fs::create_dir_all(root.path().join("contracts")).unwrap();
        std::fs::write(root.path().join("contracts").join(format!("{domain}.yaml")), contract).unwrap();
        data.push_str(&format!(
            "    - {{domain: {domain}, contract: contracts/{domain}.yaml, test: test/{domain}.parquet}}\n"
        ));
    }
    let scenario = root.path().join("s.yaml");
    let text = format!(
        "kind: TabmeshScenario\nname: s\ndata:\n  contracts:\n{data}metrics: [auc]\nrivals: [local_trees]\n\
         flows: [{{name: ours, corpus_rows: 300, pretrain_steps: 0, rounds: 0}}]\n\
         federations:\n  - {{name: fedavg, strategy: {{kind: fedavg}}, rounds: 5, local_rate: 2}}\n\
         \x20 - {{name: one_shot, model: {{kind: ridge}}, strategy: {{kind: fedsgd}}, rounds: 1}}\n"
    );
    std::fs::write(&scenario, text).unwrap();
    let out = Some(root.path().join("out"));
    let rows = run(&RunArgs { scenario, out, how: how(None) }).unwrap().all_rows().unwrap();
    for (arm, method) in
        [("rivals", "local_trees"), ("ours", "served"), ("fedavg", "model"), ("one_shot", "model")]
    {
        let last = rows.iter().filter(|row| row.arm == arm && row.method == method && row.metric == "auc");
        let last: Vec<f64> = last
            .filter(|row| row.round.is_none_or(|r| r == 5 || arm == "one_shot"))
            .map(|row| row.value)
            .collect();
        assert_eq!(last.len(), 4, "{arm}");
        // The signal alone is worth about .8.
        assert!(last.iter().sum::<f64>() / 4.0 > 0.65, "{arm}: {last:?}");
    }
    assert!(
        rows.iter()
            .all(|row| row.set == "own" && domains.contains(&row.domain.as_str()) || row.domain == "*")
    );
}
