//! Tables for tests: a few domains of one made-up set.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, Float64Array, Int8Array, Int64Array, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

/// Tables of some domains with a signal that a tree finds.
pub(crate) fn write_set(folder: &Path, domains: &[&str]) {
    write_set_of(folder, domains, |_, rng| rng.random_range(0..KINDS.len()));
}

/// Such tables, of which seven in ten rows of a domain are of a kind that the next domain has few of.
pub(crate) fn write_set_apart(folder: &Path, domains: &[&str]) {
    write_set_of(folder, domains, |domain, rng| {
        if rng.random_bool(0.55) { domain % KINDS.len() } else { rng.random_range(0..KINDS.len()) }
    });
}

fn write_set_of(folder: &Path, domains: &[&str], kind: impl Fn(usize, &mut ChaCha20Rng) -> usize) {
    let columns = r#"[{"name":"row_id","type":"int64","role":"row_id"},{"name":"label","type":"int8","role":"label"},
        {"name":"Visits","type":"int64","role":"feature"},{"name":"load","type":"double","role":"feature"},
        {"name":"kind","type":"string","role":"sensitive"},{"name":"surname","type":"string","role":"pii"}]"#;
    let named: Vec<String> = domains.iter().map(|name| format!(r#"{{"name":"{name}"}}"#)).collect();
    let text = format!(
        r#"{{"name":"made_up","kind":"domains","task":"binary","privacy_unit":"row_id (visit)","columns":{columns},"domains":[{}]}}"#,
        named.join(",")
    );
    std::fs::write(folder.join("dataset.json"), text).unwrap();
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    for part in ["train", "test"] {
        std::fs::create_dir_all(folder.join(part)).unwrap();
        for (at, domain) in domains.iter().enumerate() {
            let visits: Vec<i64> = (0..ROWS).map(|_| rng.random_range(0..40)).collect();
            let load: Vec<Option<f64>> =
                (0..ROWS).map(|_| rng.random_bool(0.9).then(|| rng.random_range(-1.0..1.0))).collect();
            let kinds: Vec<&str> = (0..ROWS).map(|_| KINDS[kind(at, &mut rng)]).collect();
            let labels = visits.iter().zip(&kinds).map(|(v, kind)| {
                let p = if *v > 20 { 0.8 } else { 0.2 } - if *kind == "a" { 0.15 } else { 0.0 };
                i8::from(rng.random_bool(p))
            });
            let labels: Vec<i8> = labels.collect();
            let columns: Vec<(&str, ArrayRef)> = vec![
                ("row_id", Arc::new(Int64Array::from_iter_values(0..ROWS as i64))),
                ("label", Arc::new(Int8Array::from(labels))),
                ("Visits", Arc::new(Int64Array::from(visits))),
                ("load", Arc::new(Float64Array::from(load))),
                ("kind", Arc::new(StringArray::from(kinds))),
                ("surname", Arc::new(StringArray::from_iter_values((0..ROWS).map(|i| format!("s{i}"))))),
            ];
            let batch = RecordBatch::try_from_iter(columns).unwrap();
            let file = File::create(folder.join(part).join(format!("{domain}.parquet"))).unwrap();
            let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
        }
    }
}

const KINDS: [&str; 3] = ["a", "b", "c"];
/// Rows of each table.
pub(crate) const ROWS: usize = 240;
