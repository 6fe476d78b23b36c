//! Crash tests: a child process appends and commits, is killed with SIGKILL at a moment the parent chooses, and every
//! acknowledged write must be there afterwards.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use tabmesh_store::{Digest, Log, Op, Records, Sled, log};

const KILLS: usize = 6;

/// A child role runs only where the parent has left this file, so that running all ignored tests by hand ends.
const MARKER: &str = "crash-test";

/// Runs the ignored test `role` of this binary in `dir` and kills it after `acks` acknowledgements.
fn run_and_kill(role: &str, dir: &Path, acks: usize) -> Vec<u64> {
    std::fs::write(dir.join(MARKER), b"").unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", role, "--ignored", "--nocapture", "--test-threads=1"])
        .current_dir(dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let mut seen = Vec::new();
    let mut lines = output.lines();
    while seen.len() < acks {
        let line = lines.next().expect("the child runs until it is killed").unwrap();
        if let Some(n) = line.strip_prefix("ack ") {
            seen.push(n.parse().unwrap());
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // What it acknowledged between our last read and its death counts too.
    seen.extend(
        lines.map_while(Result::ok).filter_map(|line| line.strip_prefix("ack ")?.parse::<u64>().ok()),
    );
    seen
}

/// Ends a role when its parent is gone, so that a failed test leaves nothing running.
fn goes_on(parent: u32) -> bool {
    std::os::unix::process::parent_id() == parent
}

#[test]
#[ignore = "a role of the crash test, run in a child process"]
fn child_appends_to_a_log() {
    if !Path::new(MARKER).exists() {
        return;
    }
    let parent = std::os::unix::process::parent_id();
    let (mut log, _) = Log::open(Path::new("ledger.log")).unwrap();
    while goes_on(parent) {
        let n = log.len();
        log.append(format!("entry {n} {}", "x".repeat(n as usize % 97)).as_bytes()).unwrap();
        println!("\nack {n}");
    }
}

#[test]
fn a_killed_writer_loses_no_acknowledged_entry() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.log");
    let mut heads: Vec<(u64, Digest)> = Vec::new();
    for kill in 0..KILLS {
        let acked = run_and_kill("child_appends_to_a_log", dir.path(), 5 + 3 * kill);
        let (log, _) = Log::open(&path).unwrap();
        assert!(log.len() > *acked.last().unwrap(), "acknowledged entries are missing");
        let entries: Vec<log::LogEntry> = log.entries().collect::<Result<_, _>>().unwrap();
        for (n, entry) in entries.iter().enumerate() {
            assert!(entry.payload.starts_with(format!("entry {n} ").as_bytes()));
        }
        assert!(heads.iter().all(|(seq, hash)| entries[*seq as usize].hash == *hash));
        heads.push((log.len() - 1, log.head_hash()));
    }
}

#[test]
#[ignore = "a role of the crash test, run in a child process"]
fn child_commits_records() {
    if !Path::new(MARKER).exists() {
        return;
    }
    let parent = std::os::unix::process::parent_id();
    let records = Sled::open(Path::new("db")).unwrap();
    let read =
        |key: &[u8]| records.get(key).unwrap().map_or(0, |v| u64::from_be_bytes(v.try_into().unwrap()));
    let mut n = read(b"count");
    while goes_on(parent) {
        n += 1;
        let value = n.to_be_bytes();
        records
            .commit(&[
                Op::put("count", value),
                Op::put("mirror", value),
                Op::put([b"item/", &value[..]].concat(), [0]),
            ])
            .unwrap();
        println!("\nack {n}");
    }
}

#[test]
fn a_killed_committer_loses_no_acknowledged_commit_and_tears_none() {
    let dir = tempfile::tempdir().unwrap();
    for kill in 0..KILLS {
        let acked = run_and_kill("child_commits_records", dir.path(), 5 + 3 * kill);
        let records = Sled::open(&dir.path().join("db")).unwrap();
        let count = records.get(b"count").unwrap().unwrap();
        assert_eq!(records.get(b"mirror").unwrap().unwrap(), count, "a commit is torn");
        let count = u64::from_be_bytes(count.try_into().unwrap());
        assert!(count >= *acked.last().unwrap(), "an acknowledged commit is missing");
        assert_eq!(records.scan_all(b"item/").unwrap().len() as u64, count);
    }
}
