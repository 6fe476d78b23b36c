//! One scenario, run twice: in one process, and with a process for the coordinator and for each agent over mutual TLS. Both
//! publish the same adapter, to the byte, and come to the same figures.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use arrow_array::{ArrayRef, Float64Array, Int8Array, Int64Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

/// Rows of each table.
const ROWS: usize = 160;
/// Few rows and steps: what is compared is bytes.
const SCENARIO: &str = "kind: TabmeshScenario
name: both
data: {folder: tables}
flows: [{name: ours, epsilon: 8, corpus_rows: 400, pretrain_steps: 1, rounds: 2}]
keep_answers: true
";

/// Four domains with a signal that rounds find.
fn write_tables(folder: &Path) {
    let columns = r#"[{"name":"row_id","type":"int64","role":"row_id"},{"name":"label","type":"int8","role":"label"},
        {"name":"visits","type":"int64","role":"feature"},{"name":"load","type":"double","role":"feature"},
        {"name":"kind","type":"string","role":"feature"}]"#;
    let names = ["north", "south", "east", "west"];
    let domains: Vec<String> = names.iter().map(|name| format!(r#"{{"name":"{name}"}}"#)).collect();
    let text = format!(
        r#"{{"name":"made_up","kind":"domains","task":"binary","privacy_unit":"row_id","columns":{columns},"domains":[{}]}}"#,
        domains.join(",")
    );
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("dataset.json"), text).unwrap();
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    for part in ["train", "test"] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
        for name in names {
            let visits: Vec<i64> = (0..ROWS).map(|_| rng.random_range(0..40)).collect();
            let load: Vec<f64> = (0..ROWS).map(|_| rng.random_range(-1.0..1.0)).collect();
            let kinds: Vec<&str> = (0..ROWS).map(|_| ["a", "b", "c"][rng.random_range(0..3)]).collect();
            let labels: Vec<i8> = visits
                .iter()
                .zip(&kinds)
                .map(|(v, kind)| {
                    let p = if *v > 20 { 0.8 } else { 0.3 } - if *kind == "a" { 0.15 } else { 0.0 };
                    i8::from(rng.random_bool(p))
                })
                .collect();
            let columns: Vec<(&str, ArrayRef)> = vec![
                ("row_id", Arc::new(Int64Array::from_iter_values(0..ROWS as i64))),
                ("label", Arc::new(Int8Array::from(labels))),
                ("visits", Arc::new(Int64Array::from(visits))),
                ("load", Arc::new(Float64Array::from(load))),
                ("kind", Arc::new(StringArray::from(kinds))),
            ];
            let batch = RecordBatch::try_from_iter(columns).unwrap();
            let file = File::create(folder.join(part).join(format!("{name}.parquet"))).unwrap();
            let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
        }
    }
}

fn ran(root: &Path, out: &str, more: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_tabmesh-sim"))
        .args(["run", "both.yaml", "--jobs", "1", "--out", out])
        .args(more)
        .current_dir(root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn processes_over_sockets_publish_the_adapter_of_one_process() {
    let root = tempfile::tempdir().unwrap();
    write_tables(&root.path().join("tables"));
    std::fs::write(root.path().join("both.yaml"), SCENARIO).unwrap();
    ran(root.path(), "one", &[]);
    ran(root.path(), "real", &["--real"]);
    let read = |run: &str, file: &str| std::fs::read(root.path().join(run).join(file)).unwrap();
    let adapter = "adapters/made_up.0000.ours.json";
    assert!(read("one", adapter).len() > 100);
    assert_eq!(read("one", adapter), read("real", adapter), "the adapters differ");
    assert_eq!(read("one", "results.jsonl"), read("real", "results.jsonl"), "the figures differ");
    let answers = "answers/made_up.0000.ours.parquet";
    assert_eq!(read("one", answers), read("real", answers), "the answers differ");
    // Noise of another seed gives another adapter: equal bytes are no accident.
    std::fs::write(root.path().join("both.yaml"), SCENARIO.replace("name: both\n", "name: both\nseeds: 2\n"))
        .unwrap();
    ran(root.path(), "two", &[]);
    assert_eq!(read("two", adapter), read("one", adapter));
    assert_ne!(read("two", "adapters/made_up.0001.ours.json"), read("one", adapter));
}
