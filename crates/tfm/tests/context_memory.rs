//! The memory that building a context takes is what was foretold. Alone in its process, whose peak it reads.

#![allow(clippy::unwrap_used, reason = "tests")]

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tabmesh_tfm::{
    Context, EncodedTable, Model, ModelConfig,
    context::{Budget, CacheKind, Plan, Precision},
};

fn table(rows: usize, columns: usize) -> EncodedTable {
    let mut rng = ChaCha20Rng::seed_from_u64(3);
    let keys: Vec<String> = (0..columns).map(|i| format!("f.c{i}")).collect();
    EncodedTable {
        rows,
        columns,
        values: (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect(),
        labels: (0..rows).map(|_| Some(u8::from(rng.random_bool(0.4)))).collect(),
        column_keys: keys.clone(),
        column_texts: keys,
    }
}

/// Bytes of a line of this process's status; nothing where `/proc` is missing.
fn status(field: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}

#[test]
fn building_stays_within_the_bytes_foretold() {
    let config = ModelConfig { icl_num_blocks: 2, ..ModelConfig::nano() };
    let model = Model::random(&config, &mut ChaCha20Rng::seed_from_u64(1)).unwrap();
    let rows = table(3000, 60);
    // The first context copies the weights, which are not counted.
    Context::build(&model, &rows.take(&[0])).unwrap();
    // Row vectors in half precision: almost all of the peak is passing memory.
    let (kind, precision) = (CacheKind::Repr, Precision::F16);
    let plan = Plan { classes: 2, kind: Some(kind), precision: Some(precision), budget: Budget::UNLIMITED };
    let cache = Context::choose(&config, rows.rows, rows.columns, plan).unwrap();
    let foretold = Context::footprint(&config, rows.rows, rows.columns, cache);
    let Some(before) = status("VmRSS:") else {
        println!("skipped: this system has no /proc/self/status");
        return;
    };
    let peak_before = status("VmHWM:").unwrap();
    let context = Context::build_as(&model, &rows, plan).unwrap();
    let grew = status("VmHWM:").unwrap() - before;
    assert_eq!(context.bytes(), foretold.held);
    assert!(grew <= foretold.building + SLACK, "{grew} bytes, foretold {}", foretold.building);
    // The estimate means something: not the whole table's cells (60 columns x 3,000 rows x 32 numbers, 23 MiB), and not
    // far above what is used.
    assert!(foretold.building < 16 << 20, "{}", foretold.building);
    assert!(grew + (peak_before - before) + SLACK > foretold.building / 3, "{grew} of {}", foretold.building);
}

/// What the allocator and the threads' stacks take beside the numbers.
const SLACK: usize = 3 << 20;
