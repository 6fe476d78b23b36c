//! `bench marginals`: all pairs of a large table's columns, counted as an agent counts them for a release.
//!
//! The table is synthetic Parquet: an id, a label, and columns of whole numbers, fractions and texts in turn. It is read
//! through a contract with rows as units, so that the id column is read first for the cap, every row is named and stands
//! on one side of the gate by keyed hash, and the training rows are counted. What another program needs to count the
//! same can be written beside: binning, levels, and the ids on the training side.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anstream::println;
use anyhow::{Context as _, Result, bail, ensure};
use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, DictionaryArray, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde::Serialize;
use tabmesh_agent::gate::Gate;
use tabmesh_agent::source::{
    Admission, Batches, DomainKey, MarginalError, MarginalRequest, Source, SourceError, View, marginals,
    open_contract,
};
use tabmesh_contract::contract::Contract;
use tabmesh_contract::profile::Cell;
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::release::{Attribute, Binning, MarginalSpec, ReleaseQuery, Resources};

use super::gradients::cpu_seconds;
use super::serving::status_mib;
use crate::cli::Output;
use crate::process::now;

/// What is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Rows of the table.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000_000))]
    rows: u32,
    /// Columns counted, the label among them; the id comes on top.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(2..=100))]
    columns: u32,
    /// Parquet file of an earlier run with the same numbers; written if it isn't there. A temporary one if not given.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Threads that count, beside reading and naming; the machine's if not given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16))]
    threads: Option<u32>,
    /// Folder for what another program needs to count the same: `query.json` and `training.parquet`.
    #[arg(long, value_name = "FOLDER")]
    peer: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Outcome {
    rows: u32,
    /// Rows on the training side of the gate: those counted.
    counted: i64,
    columns: u32,
    marginals: usize,
    cells: usize,
    threads: usize,
    file_mib: f64,
    /// Seconds and processor seconds of writing the table; none if it was there.
    written: Option<(f64, f64)>,
    wall_s: f64,
    cpu_s: f64,
    rows_per_s: f64,
    rows_per_cpu_s: f64,
    /// Largest resident memory while counting; none where the system doesn't tell.
    peak_rss_mib: Option<f64>,
    /// SHA-256 of the counts as little-endian 64-bit integers, marginal by marginal.
    sha256: String,
}

/// Measures and prints.
///
/// # Errors
/// A file that can't be written or read, or that has other rows or columns.
pub fn run(args: &Args, output: Output) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let data = args.data.clone().unwrap_or_else(|| folder.path().join("marginals.parquet"));
    let mut written = None;
    if !data.exists() {
        let (began, cpu) = (now(), cpu_seconds()?);
        write(&data, args).with_context(|| data.display().to_string())?;
        written = Some((began.elapsed().as_secs_f64(), cpu_seconds()? - cpu));
    }
    let file = File::open(&data).with_context(|| data.display().to_string())?;
    let found = ArrowReaderMetadata::load(&file, ArrowReaderOptions::default())?;
    let rows = found.metadata().file_metadata().num_rows();
    ensure!(
        rows == i64::from(args.rows) && found.schema().fields().len() == args.columns as usize + 1,
        "{} has {rows} rows and {} columns; expected {} and {} with the id",
        data.display(),
        found.schema().fields().len(),
        args.rows,
        args.columns + 1,
    );

    let (contract, query) = (contract(&data, args.columns)?, query(args.columns)?);
    let source = open_contract(&contract, Path::new("."))?;
    let schema = contract.approved_schema().map_err(|error| anyhow::anyhow!(error.render()))?;
    let view = View::new(&*source, &contract, &schema, DomainKey::new(&[7; 32]))?;
    let gate = Gate::new(b"bench marginals");
    let resources = match args.threads {
        Some(threads) => Resources { threads: threads as usize, ..Resources::default() },
        None => marginals::resources(),
    };
    forget_peak();
    let (began, cpu) = (now(), cpu_seconds()?);
    let counts = view.marginals(&query, &gate, resources)?;
    let (wall_s, cpu_s) = (began.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
    let peak_rss_mib = status_mib("VmHWM:");

    let bytes: Vec<u8> = counts.iter().flat_map(|count| count.to_le_bytes()).collect();
    let first: usize = query.marginals.first().map_or(0, |marginal| query.dims(marginal).iter().product());
    let outcome = Outcome {
        rows: args.rows,
        counted: counts.iter().take(first).sum(),
        columns: args.columns,
        marginals: query.marginals.len(),
        cells: counts.len(),
        threads: resources.threads,
        file_mib: file.metadata()?.len() as f64 / f64::from(1 << 20),
        written,
        wall_s,
        cpu_s,
        rows_per_s: f64::from(args.rows) / wall_s,
        rows_per_cpu_s: f64::from(args.rows) / cpu_s,
        peak_rss_mib,
        sha256: hex::encode(ring::digest::digest(&ring::digest::SHA256, &bytes)),
    };
    if let Some(folder) = &args.peer {
        let training = Training { source: &*source, rows: args.rows, ids: Mutex::default() };
        View::new(&training, &contract, &schema, DomainKey::new(&[7; 32]))?
            .marginals(&query, &gate, resources)?;
        let ids = training.ids.into_inner().unwrap_or_else(PoisonError::into_inner);
        write_peer(folder, args.columns, &query, ids).with_context(|| folder.display().to_string())?;
    }
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&outcome)?),
        Output::Text => print(&outcome),
    }
    Ok(())
}

fn print(outcome: &Outcome) {
    let Outcome { rows, counted, columns, marginals, cells, threads, .. } = outcome;
    println!(
        "{rows} rows x {columns} columns: {marginals} pairs, {cells} cells, {counted} rows on the training side"
    );
    println!(
        "{:.2} s, {:.2} CPU-s with {threads} counting threads: {:.0} rows a second, {:.0} a CPU-second",
        outcome.wall_s, outcome.cpu_s, outcome.rows_per_s, outcome.rows_per_cpu_s
    );
    println!(
        "peak {} MiB resident, file of {:.0} MiB",
        outcome.peak_rss_mib.map_or_else(|| "?".to_owned(), |mib| format!("{mib:.0}")),
        outcome.file_mib
    );
}

/// What a column of the synthetic table holds.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Label,
    /// From 0 to 99, small ones more often.
    Whole,
    /// From 0 to 100, every fiftieth missing.
    Fraction,
    /// One of so many texts, early ones more often.
    Text(u32),
}

fn kind(column: u32) -> Kind {
    match column % 4 {
        _ if column == 0 => Kind::Label,
        1 => Kind::Whole,
        2 => Kind::Fraction,
        _ => Kind::Text(3 + column % 10),
    }
}

fn name(column: u32) -> String {
    if column == 0 { "label".to_owned() } else { format!("c{column:02}") }
}

fn levels(count: u32) -> Vec<String> {
    (0..count).map(|level| format!("level {level}")).collect()
}

fn contract(data: &Path, columns: u32) -> Result<Contract> {
    let mut text = "name: bench.marginals\nversion: '1.0.0'\nowner: bench@example.com\nschema:\n".to_owned();
    text.push_str("  - {name: id, type: integer, role: id, unique: true}\n");
    for column in 0..columns {
        let name = name(column);
        match kind(column) {
            Kind::Label => {
                writeln!(
                    text,
                    "  - {{name: {name}, type: categorical, role: target, categories: ['0', '1']}}"
                )?;
            }
            Kind::Whole => writeln!(text, "  - {{name: {name}, type: integer, range: [0, 100]}}")?,
            Kind::Fraction => writeln!(text, "  - {{name: {name}, type: number, range: [0, 100]}}")?,
            Kind::Text(count) => {
                let levels = levels(count).join(", ");
                writeln!(text, "  - {{name: {name}, type: categorical, categories: [{levels}]}}")?;
            }
        }
    }
    text.push_str("privacy: {sensitivity: low, allow_training: true, unit: row, max_units: 1000000000}\n");
    // A path may hold anything; JSON text is YAML too.
    let path = serde_json::to_string(&std::path::absolute(data)?)?;
    writeln!(text, "source: {{type: parquet, path: {path}}}")?;
    let parsed = Contract::parse("contract of the benchmark", &text);
    Ok(parsed.map_err(|error| anyhow::anyhow!(error.render()))?.0)
}

/// All pairs; numbers in [`BINS`] bins.
fn query(columns: u32) -> Result<ReleaseQuery> {
    let attribute = |column| {
        let binning = match kind(column) {
            Kind::Label => return Attribute::label(2),
            Kind::Whole | Kind::Fraction => {
                let edges = (1..BINS).map(|bin| f64::from(bin) * 100.0 / f64::from(BINS)).collect();
                Binning::Edges { lower: 0.0, upper: 100.0, log1p: false, edges }
            }
            Kind::Text(levels) => Binning::Levels { levels },
        };
        Attribute { id: name(column), binning, merge: None }
    };
    let all = columns as usize;
    let pairs = (0..all).flat_map(|a| (a + 1..all).map(move |b| MarginalSpec { attributes: vec![a, b] }));
    let query = ReleaseQuery {
        plan_digest: "bench".to_owned(),
        stage: 1,
        stage_name: "pairs".to_owned(),
        attributes: (0..columns).map(attribute).collect(),
        marginals: pairs.collect(),
        // Nothing is noised here, but a query of few pairs has to leave noise its grid.
        rho: Rho::from_f64_round_down(0.01)?,
        max_rows_per_unit: 1,
    };
    query.check()?;
    Ok(query)
}

/// A number from 0 to 1 for each cell of the table, small ones more often.
fn drawn(row: u64, column: u32) -> f64 {
    // Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014): the mixing of SplitMix64.
    let mut bits = (row * 128 + u64::from(column) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    let uniform = (bits >> 11) as f64 / (1u64 << 53) as f64;
    uniform * uniform
}

fn write(path: &Path, args: &Args) -> Result<()> {
    let rows = u64::from(args.rows);
    let mut writer: Option<ArrowWriter<File>> = None;
    for from in (0..rows).step_by(WRITTEN_ROWS) {
        let rows = from..rows.min(from + WRITTEN_ROWS as u64);
        let mut columns: Vec<(String, ArrayRef, bool)> = vec![(
            "id".to_owned(),
            Arc::new(Int64Array::from_iter_values(rows.clone().map(u64::cast_signed))),
            false,
        )];
        for column in 0..args.columns {
            let draws = rows.clone().map(|row| drawn(row, column));
            let text = |levels: Vec<String>| -> Result<ArrayRef> {
                let places = draws.clone().map(|draw| (draw * levels.len() as f64) as i32);
                let values = Arc::new(StringArray::from_iter_values(&levels));
                Ok(Arc::new(DictionaryArray::<Int32Type>::try_new(
                    Int32Array::from_iter_values(places),
                    values,
                )?))
            };
            let values: ArrayRef = match kind(column) {
                Kind::Label => text(vec!["0".to_owned(), "1".to_owned()])?,
                Kind::Whole => {
                    Arc::new(Int64Array::from_iter_values(draws.map(|draw| (draw * 100.0) as i64)))
                }
                Kind::Fraction => {
                    let value =
                        |(row, draw): (u64, f64)| (row % 50 != u64::from(column)).then_some(draw * 100.0);
                    Arc::new(Float64Array::from_iter(rows.clone().zip(draws).map(value)))
                }
                Kind::Text(count) => text(levels(count))?,
            };
            columns.push((name(column), values, true));
        }
        let batch = RecordBatch::try_from_iter_with_nullable(columns)?;
        let writer = match &mut writer {
            Some(writer) => writer,
            None => {
                let properties = WriterProperties::builder()
                    .set_compression(Compression::SNAPPY)
                    .set_max_row_group_row_count(Some(WRITTEN_ROWS * 2))
                    .build();
                // Without Arrow's own schema, as files of other programs are.
                let options =
                    ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
                writer.insert(ArrowWriter::try_new_with_options(
                    File::create(path)?,
                    batch.schema(),
                    options,
                )?)
            }
        };
        writer.write(&batch)?;
    }
    match writer {
        Some(writer) => drop(writer.close()?),
        None => bail!("no rows to write"),
    }
    Ok(())
}

/// A source that notes the ids of the rows that count, instead of counting.
struct Training<'s> {
    source: &'s dyn Source,
    rows: u32,
    ids: Mutex<Vec<i64>>,
}

impl Source for Training<'_> {
    fn location(&self) -> &Path {
        self.source.location()
    }

    fn schema_check(&self, contract: &Contract) -> Result<(), SourceError> {
        self.source.schema_check(contract)
    }

    fn batches<'a>(&'a self, contract: &'a Contract) -> Result<Batches<'a>, SourceError> {
        self.source.batches(contract)
    }

    fn marginals(&self, request: &MarginalRequest<'_>) -> Result<Vec<i64>, MarginalError> {
        let Admission::Named(units) = request.admission() else { return request.stream() };
        let counts = |id: &i64| units.admits(Cell::Integer(*id)) == Some(true);
        let ids = (0..i64::from(self.rows)).filter(counts).collect();
        *self.ids.lock().unwrap_or_else(PoisonError::into_inner) = ids;
        Ok(vec![0; request.query().cells_total()])
    }
}

fn write_peer(folder: &Path, columns: u32, query: &ReleaseQuery, ids: Vec<i64>) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let described = |(column, attribute): (u32, &Attribute)| match (&attribute.binning, kind(column)) {
        (Binning::Edges { edges, .. }, _) => serde_json::json!({"column": name(column), "edges": edges}),
        (Binning::Levels { .. }, Kind::Text(count)) => {
            serde_json::json!({"column": name(column), "levels": levels(count)})
        }
        (Binning::Levels { .. }, _) => serde_json::json!({"column": name(column), "classes": ["0", "1"]}),
    };
    let attributes: Vec<_> = (0..columns).zip(&query.attributes).map(described).collect();
    let pairs: Vec<_> = query.marginals.iter().map(|marginal| &marginal.attributes).collect();
    let text = serde_json::to_string(&serde_json::json!({"attributes": attributes, "marginals": pairs}))?;
    std::fs::write(folder.join("query.json"), text)?;
    let ids: ArrayRef = Arc::new(Int64Array::from(ids));
    let batch = RecordBatch::try_from_iter([("id", ids)])?;
    let mut writer =
        ArrowWriter::try_new(File::create(folder.join("training.parquet"))?, batch.schema(), None)?;
    writer.write(&batch)?;
    writer.close()?;
    Ok(())
}

/// Starts the process's peak memory anew, where the system lets it: the peak is that of counting, not of writing.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Bins of a number; missing comes on top.
const BINS: u32 = 16;
/// Rows written at a time; a row group holds two such parts.
const WRITTEN_ROWS: usize = 1 << 16;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeMap;

    use arrow_array::Array as _;
    use arrow_array::cast::AsArray as _;
    use arrow_array::types::{Float64Type, Int64Type};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
    use serde_json::Value;

    use super::*;

    fn cells(batch: &RecordBatch, column: &str) -> Vec<Option<String>> {
        let array = batch.column_by_name(column).unwrap();
        let text = |row| match array.data_type() {
            arrow_schema::DataType::Int64 => array.as_primitive::<Int64Type>().value(row).to_string(),
            arrow_schema::DataType::Float64 => array.as_primitive::<Float64Type>().value(row).to_string(),
            _ => array.as_string::<i32>().value(row).to_owned(),
        };
        (0..batch.num_rows()).map(|row| (!array.is_null(row)).then(|| text(row))).collect()
    }

    fn read(path: &Path) -> RecordBatch {
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
        let mut batches = reader.with_batch_size(1 << 20).build().unwrap();
        batches.next().unwrap().unwrap()
    }

    /// What the peer is told suffices for the same counts: pairs of texts of the training ids' rows, by hand.
    #[test]
    fn what_the_peer_is_told_gives_the_same_counts() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data.parquet");
        let args = Args {
            rows: 700,
            columns: 7,
            data: Some(data.clone()),
            threads: Some(2),
            peer: Some(dir.path().into()),
        };
        run(&args, Output::Json).unwrap();
        let (contract, query) = (contract(&data, 7).unwrap(), query(7).unwrap());
        let source = open_contract(&contract, Path::new(".")).unwrap();
        let schema = contract.approved_schema().unwrap();
        let view = View::new(&*source, &contract, &schema, DomainKey::new(&[7; 32])).unwrap();
        let counts = view.marginals(&query, &Gate::new(b"bench marginals"), Resources::default()).unwrap();

        let told: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("query.json")).unwrap()).unwrap();
        let training = read(&dir.path().join("training.parquet"));
        let training: Vec<Option<String>> = cells(&training, "id");
        assert!((480..640).contains(&training.len()), "a fifth stands at the gate: {}", training.len());
        let table = read(&data);
        let ids = cells(&table, "id");
        let codes: Vec<(usize, Vec<usize>)> = told["attributes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|attribute| {
                let texts = |key: &str| -> Option<Vec<String>> {
                    serde_json::from_value(attribute[key].clone()).ok()
                };
                let column = cells(&table, attribute["column"].as_str().unwrap());
                let edges: Option<Vec<f64>> = serde_json::from_value(attribute["edges"].clone()).ok();
                if let Some(edges) = edges {
                    let bin = |value: f64| edges.iter().filter(|edge| **edge <= value).count();
                    let code = |text: Option<String>| {
                        text.map_or(edges.len() + 1, |text| bin(text.parse().unwrap()))
                    };
                    return (edges.len() + 2, column.into_iter().map(code).collect());
                }
                let (list, more) =
                    texts("levels").map_or_else(|| (texts("classes").unwrap(), 0), |list| (list, 2));
                let code = |text: Option<String>| {
                    list.iter().position(|level| Some(level) == text.as_ref()).unwrap()
                };
                (list.len() + more, column.into_iter().map(code).collect())
            })
            .collect();
        let mut by_hand: Vec<i64> = Vec::new();
        for pair in told["marginals"].as_array().unwrap() {
            let [a, b] = [0, 1].map(|at| &codes[pair[at].as_u64().unwrap() as usize]);
            let mut groups: BTreeMap<usize, i64> = BTreeMap::new();
            for row in (0..table.num_rows()).filter(|row| training.contains(&ids[*row])) {
                *groups.entry(a.1[row] * b.0 + b.1[row]).or_default() += 1;
            }
            by_hand.extend((0..a.0 * b.0).map(|cell| groups.get(&cell).copied().unwrap_or_default()));
        }
        assert_eq!(counts, by_hand);
    }

    #[test]
    fn a_table_of_other_sizes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data.parquet");
        let args = |rows| Args { rows, columns: 3, data: Some(data.clone()), threads: None, peer: None };
        run(&args(50), Output::Json).unwrap();
        run(&args(50), Output::Json).unwrap();
        assert!(run(&args(51), Output::Json).unwrap_err().to_string().contains("has 50 rows and 4 columns"));
    }
}
