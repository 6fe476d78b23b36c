//! A pre-training process that is killed (SIGKILL) after a checkpoint resumes to the weights of one that wasn't.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use tabmesh_tfm::ModelConfig;

/// Steps of the run; the first checkpoint is at step 250.
const STEPS: &str = "300";

fn start(dir: &Path, name: &str, threads: &str) -> Child {
    let file = |end: &str| dir.join(format!("{name}{end}")).display().to_string();
    Command::new(env!("CARGO_BIN_EXE_tabmesh-coordinator"))
        .args(["pretrain", "--steps", STEPS, "--tables-per-step", "2", "--seed", "3", "--threads", threads])
        .args(["--config", &dir.join("tiny.json").display().to_string()])
        .args(["--out", &file(".safetensors"), "--checkpoint", &file("-state"), "--metrics", &file(".jsonl")])
        .env("RAYON_NUM_THREADS", "1")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn killed_process_resumes_to_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = ModelConfig { max_classes: 10, ..ModelConfig::tiny() };
    std::fs::write(dir.path().join("tiny.json"), serde_json::to_string(&tiny).unwrap()).unwrap();
    let mut whole = start(dir.path(), "whole", "1");
    let mut killed = start(dir.path(), "killed", "1");
    while !dir.path().join("killed-state/training.safetensors").exists() {
        assert!(killed.try_wait().unwrap().is_none(), "the process ended before its first checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    // On Unix this is SIGKILL.
    killed.kill().unwrap();
    assert!(!killed.wait().unwrap().success(), "the process ended before it could be killed");
    assert!(whole.wait().unwrap().success());
    assert!(start(dir.path(), "killed", "2").wait().unwrap().success());
    let weights = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert_eq!(weights("whole.safetensors"), weights("killed.safetensors"));
    let lines = std::fs::read_to_string(dir.path().join("killed.jsonl")).unwrap();
    let steps: Vec<u64> = lines
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert!(steps.windows(2).all(|w| w[0] < w[1]), "no step twice: {steps:?}");
    assert_eq!(steps.last(), Some(&300));
}
