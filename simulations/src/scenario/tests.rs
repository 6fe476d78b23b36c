//! Scenarios from end to end: the worked example of the guide, killed, resumed, split over shards and compared.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use super::compare::{CompareArgs, compare};
use super::document::Scenario;
use super::report::{ReportArgs, report};
use super::results::Shard;
use super::run::{How, RunArgs, run};
use super::sweep::{SweepArgs, sweep};

fn scenarios() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")
}

fn how(shard: Option<Shard>) -> How {
    How { data: None, shard, jobs: Some(2) }
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
