//! A scenario's process killed without warning in the middle of its tasks: the same command goes on, and its results are those of
//! a run that nobody disturbed.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Pause between two looks.
const POLL: Duration = Duration::from_millis(2);
/// Looks at most: two minutes.
const LOOKS: u32 = 60_000;

const SCENARIO: &str = "kind: TabmeshScenario
name: killed
seeds: 3
data: {shipped: census_income}
partition: {kind: dirichlet, domains: 6, alpha: 1}
keep_answers: true
federations:
  - {name: first, strategy: {kind: fedavg}, rounds: 30, local_steps: 5}
  - {name: second, strategy: {kind: scaffold}, rounds: 30, local_steps: 5}
";

fn started(scenario: &Path, out: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tabmesh-sim"));
    command.arg("run").arg(scenario).arg("--out").arg(out).args(["--jobs", "2"]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Files of tasks that are there, whole ones and parts alike.
fn tasks(out: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(out.join("tasks")).into_iter().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn a_killed_run_goes_on_to_the_same_results() {
    let root = tempfile::tempdir().unwrap();
    let scenario = root.path().join("killed.yaml");
    std::fs::write(&scenario, SCENARIO).unwrap();
    let (whole, broken) = (root.path().join("whole"), root.path().join("broken"));
    assert!(started(&scenario, &whole).wait().unwrap().success());
    let all = tasks(&whole).len();
    assert_eq!(all, 6, "two federations, three seeds");

    // After each kill a task more is there, and what was there stays as it was.
    let mut kills = 0;
    for least in 1..all {
        let mut child = started(&scenario, &broken);
        let waiting = |child: &mut Child| tasks(&broken).len() < least && child.try_wait().unwrap().is_none();
        let ended = (0..LOOKS).any(|_| {
            std::thread::sleep(POLL);
            !waiting(&mut child)
        });
        assert!(ended, "no task ends");
        kills += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(kills > 0, "no process was alive to be killed");
    assert!(started(&scenario, &broken).wait().unwrap().success());
    for file in ["results.jsonl", "summary.csv"] {
        let read = |out: &Path| std::fs::read(out.join(file)).unwrap();
        assert!(read(&broken) == read(&whole), "{file} differs from an undisturbed run's");
    }
    let named = |out: &Path| -> Vec<_> {
        tasks(out).iter().map(|path| path.file_name().unwrap().to_owned()).collect()
    };
    assert_eq!(named(&broken), named(&whole), "nothing half-written is left");
}
