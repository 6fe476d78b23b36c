//! Streamed counts against a naive count, and against a second source that counts by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use tabmesh_contract::contract::Contract;
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::release::{Attribute, Binning, MarginalSpec};
use tempfile::TempDir;

use super::super::answering::Answering;
use super::super::{DomainKey, Source, UnitCap, open_contract};
use super::*;

/// Enough for several chunks, so that threads are started.
const ROWS: usize = 70_000;

type Line = [String; 6];

/// Every 97th row has no customer, some cells are empty, odd or undeclared. `repeat` rows in a row are one customer's.
fn lines(rows: usize, repeat: usize) -> Vec<Line> {
    let line = |i: usize| {
        let mixed = i.wrapping_mul(2_654_435_761) >> 7;
        let amount = match mixed % 23 {
            0 => String::new(),
            1 => "inf".to_owned(),
            n => format!("{}.{}", n * 17 % 101, mixed % 10),
        };
        let category = ["grocery", "travel", "casino", ""][mixed % 11 % 4];
        let customer = if i.is_multiple_of(97) { String::new() } else { format!("c{}", i / repeat) };
        let label = ["0", "1", "1", "2", ""][mixed % 61 % 5];
        [
            format!("t{i}"),
            customer,
            amount,
            category.into(),
            ["true", "false", ""][mixed % 3].into(),
            label.into(),
        ]
    };
    (0..rows).map(line).collect()
}

fn contract(unit: &str, id: bool) -> Contract {
    let role = if unit.contains("customer") { ", role: entity" } else { "" };
    let id = if id { "  - {name: tid, type: string, role: id, unique: true}\n" } else { "" };
    let text = format!(
        "name: shop.sales
version: '1.0.0'
owner: shop@example.com
schema:
{id}  - {{name: customer, type: string, pii: true{role}}}
  - {{name: label, type: integer, role: target, feature: sale.fraud, categories: ['0', '1']}}
  - {{name: amount, type: decimal, range: [0, 100], feature: sale.amount}}
  - {{name: category, type: categorical, categories: [grocery, travel], feature: sale.category}}
  - {{name: online, type: boolean, feature: sale.online}}
privacy: {{sensitivity: low, allow_training: true, {unit}, max_units: 1000000}}
source: {{type: csv, path: sales.csv}}
"
    );
    Contract::parse("contract.yaml", &text).unwrap_or_else(|error| panic!("{}", error.render())).0
}

fn by_row() -> Contract {
    contract("unit: row", true)
}

fn by_customer(max_rows: usize) -> Contract {
    contract(&format!("unit: customer, max_rows_per_unit: {max_rows}"), false)
}

fn query(label: bool) -> ReleaseQuery {
    let edges = Binning::Edges { lower: 0.0, upper: 100.0, log1p: false, edges: vec![10.0, 20.0, 55.5] };
    let feature = |id: &str, binning| Attribute { id: id.to_owned(), binning, merge: None };
    let mut attributes = vec![
        feature("sale.online", Binning::Levels { levels: 2 }),
        feature("sale.amount", edges),
        feature("sale.category", Binning::Levels { levels: 2 }),
        feature("other.size", Binning::Levels { levels: 3 }),
    ];
    attributes[2].merge = Some(vec![0, 1, 1, 2]);
    let mut marginals = vec![vec![0], vec![1], vec![2, 1], vec![0, 1, 2], vec![3, 0]];
    if label {
        attributes.insert(1, Attribute::label(2));
        marginals = vec![vec![1], vec![1, 2], vec![0, 3], vec![3, 2, 1], vec![4, 1]];
    }
    ReleaseQuery {
        plan_digest: "p".to_owned(),
        stage: 1,
        stage_name: "tree".to_owned(),
        attributes,
        marginals: marginals.into_iter().map(|attributes| MarginalSpec { attributes }).collect(),
        rho: Rho::from_f64_round_down(0.01).unwrap(),
        max_rows_per_unit: 2,
    }
}

/// The table's own features and one that it lacks.
fn schema(contract: &Contract) -> FeatureSchema {
    let other = "name: other.sales
version: '1.0.0'
owner: other@example.com
schema:
  - {name: size, type: categorical, categories: [s, m, l], feature: other.size}
  - {name: y, type: categorical, role: target, feature: sale.fraud, categories: ['0', '1']}
privacy: {sensitivity: low, allow_training: true, max_units: 10}
";
    let other = Contract::parse("other.yaml", other).unwrap().0.approved_schema().unwrap();
    let own = contract.approved_schema().unwrap();
    let features = own.features().iter().chain(other.features()).cloned().collect();
    FeatureSchema::new(features, own.target().clone()).unwrap()
}

fn key() -> DomainKey {
    DomainKey::new(&[3; 32])
}

fn gate() -> Gate {
    Gate::new(b"gate")
}

fn threads(threads: usize) -> Resources {
    Resources { threads, ..Resources::default() }
}

struct World {
    _folder: TempDir,
    path: PathBuf,
    contract: Contract,
    source: Box<dyn Source>,
}

impl World {
    fn new(contract: Contract, lines: &[Line]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sales.csv");
        let mut text = "tid,customer,amount,category,online,label\n".to_owned();
        for line in lines {
            text.push_str(&line.join(","));
            text.push('\n');
        }
        fs::write(&path, text).unwrap();
        let source = open_contract(&contract, folder.path()).unwrap();
        Self { _folder: folder, path, contract, source }
    }

    fn count_by(
        &self,
        source: &dyn Source,
        query: &ReleaseQuery,
        threads: Resources,
    ) -> Result<Vec<i64>, MarginalError> {
        let view = View::new(source, &self.contract, &schema(&self.contract), key()).unwrap();
        view.marginals(query, &gate(), threads)
    }

    fn streamed(&self, query: &ReleaseQuery, threads: Resources) -> Vec<i64> {
        self.count_by(&*self.source, query, threads).unwrap()
    }

    /// The whole table in memory, capped, split, then counted cell by cell.
    fn naive(&self, query: &ReleaseQuery) -> Vec<i64> {
        let schema = schema(&self.contract);
        let view = View::new(&*self.source, &self.contract, &schema, key()).unwrap();
        let mut table = tabmesh_contract::batch::TypedBatch::empty(&schema);
        view.rows().unwrap().for_each(|rows| table.append(&rows.unwrap().batch));
        let capped = UnitCap::apply(key(), self.contract.privacy.unit.max_rows(), &table);
        let training = capped.take(&gate().split(&capped).training);
        assert!(training.rows() > 0 && training.rows() < table.rows());
        let mut all = Vec::new();
        for marginal in &query.marginals {
            let dims = query.dims(marginal);
            let mut counts = vec![0; dims.iter().product()];
            for row in 0..training.rows() {
                if query.label_index().is_some() && training.labels[row].is_none() {
                    continue;
                }
                let cell = marginal.attributes.iter().zip(&dims).fold(0, |cell, (at, dim)| {
                    let attribute = &query.attributes[*at];
                    let feature = schema.features().iter().position(|f| f.id.as_str() == attribute.id);
                    let fine = match feature.map(|at| &training.columns[at]) {
                        None => usize::from(training.labels[row].unwrap()),
                        Some(TypedColumn::Numeric(values)) => attribute.fine_cell_of(values[row]),
                        Some(TypedColumn::Categorical(codes)) => attribute.fine_cell_of_code(codes[row]),
                    };
                    cell * dim + attribute.merged(fine)
                });
                counts[cell] += 1;
            }
            all.extend(counts);
        }
        all
    }
}

/// An engine: groups text by text, as a database would, where the promises allow.
struct Engine {
    rows: Vec<BTreeMap<&'static str, String>>,
    counted: AtomicBool,
}

impl Engine {
    fn new(lines: &[Line]) -> Self {
        let names = ["tid", "customer", "amount", "category", "online", "label"];
        let rows = lines.iter().map(|line| names.into_iter().zip(line.iter().cloned()).collect()).collect();
        Self { rows, counted: AtomicBool::new(false) }
    }

    /// The rows that count; none if only streaming can tell.
    fn admitted(&self, units: &NamedUnits<'_>) -> Option<Vec<&BTreeMap<&'static str, String>>> {
        let mut rows_of: BTreeMap<&str, u32> = BTreeMap::new();
        for row in &self.rows {
            *rows_of.entry(&row[units.column().name.as_str()]).or_default() += 1;
        }
        if rows_of.values().any(|rows| *rows > units.max_rows()) {
            return None;
        }
        let mut joined = BTreeSet::new();
        for name in rows_of.keys() {
            if units.admits(if name.is_empty() { Cell::Null } else { Cell::Text(name) })? {
                joined.insert(*name);
            }
        }
        Some(
            self.rows
                .iter()
                .filter(|row| joined.contains(row[units.column().name.as_str()].as_str()))
                .collect(),
        )
    }

    fn fine(
        row: &BTreeMap<&'static str, String>,
        origin: Origin<'_>,
        query: &ReleaseQuery,
        at: usize,
    ) -> Option<usize> {
        let last = query.attributes[at].fine_cells() - 1;
        let text = |column: &Column| row[column.name.as_str()].clone();
        Some(match origin {
            Origin::Label { column, classes } => usize::from(*classes.get(&text(column))?),
            Origin::Missing => last,
            Origin::Numeric { column } => match text(column).parse::<f64>() {
                Ok(value) if value.is_finite() => query.attributes[at].fine_cell_of(value),
                _ => last,
            },
            Origin::Levels { column, levels } => match text(column) {
                text if text.is_empty() => last,
                text => levels.get(&text).map_or(last - 1, |code| *code as usize),
            },
        })
    }

    fn marginals(&self, request: &MarginalRequest<'_>) -> Result<Vec<i64>, MarginalError> {
        let Admission::Named(units) = request.admission() else { return request.stream() };
        let Some(rows) = self.admitted(&units) else { return request.stream() };
        let query = request.query();
        let mut all = Vec::new();
        for marginal in &query.marginals {
            let mut groups: BTreeMap<Vec<usize>, i64> = BTreeMap::new();
            for row in &rows {
                let fine = |at: usize| Self::fine(row, request.origin(at).unwrap(), query, at);
                let labelled = query.label_index().is_none_or(|label| fine(label).is_some());
                if let (true, Some(group)) =
                    (labelled, marginal.attributes.iter().map(|at| fine(*at)).collect())
                {
                    *groups.entry(group).or_default() += 1;
                }
            }
            let dims = query.dims(marginal);
            let mut counts = vec![0; dims.iter().product()];
            for (group, count) in groups {
                let places = marginal.attributes.iter().zip(group).zip(&dims);
                let cell =
                    places.fold(0, |cell, ((at, fine), dim)| cell * dim + query.attributes[*at].merged(fine));
                counts[cell] += count;
            }
            all.extend(counts);
        }
        self.counted.store(true, Ordering::Relaxed);
        Ok(all)
    }
}

#[test]
fn streaming_equals_a_naive_count_for_every_unit_and_number_of_threads() {
    let lines = lines(ROWS, 3);
    for contract in [by_row(), contract("unit: row", false), by_customer(2), by_customer(5)] {
        let world = World::new(contract, &lines);
        for query in [query(true), query(false)] {
            let expected = world.naive(&query);
            assert!(expected.iter().filter(|count| **count > 0).count() > 20);
            for counting in [1, 2, 5] {
                assert_eq!(world.streamed(&query, threads(counting)), expected, "{counting} threads");
            }
        }
    }
}

/// An id that is missing or comes twice, a name with many rows: the cap and the names of rows without an id.
#[test]
fn odd_ids_are_counted_as_the_whole_table_is_loaded() {
    let mut lines = lines(300, 2);
    lines[5][0] = String::new();
    lines[6] = lines[5].clone();
    for at in [20, 21, 22, 150] {
        lines[at][0] = "t9".to_owned();
    }
    let world = World::new(by_row(), &lines);
    assert_eq!(world.streamed(&query(false), threads(1)), world.naive(&query(false)));
    let view = View::new(&*world.source, &world.contract, &schema(&world.contract), key()).unwrap();
    assert_eq!(view.load().unwrap().batch.rows(), 296, "four of the five rows of t9 go");
}

#[test]
fn a_source_that_counts_by_itself_gets_the_same_counts() {
    let by_two = lines(600, 2);
    let mut without_id = by_two.clone();
    without_id[17][0] = String::new();
    // Rows without a customer are one unit of seven rows here.
    for (contract, lines, counts_itself) in [
        (by_row(), &by_two, true),
        (by_row(), &without_id, false),
        (contract("unit: row", false), &by_two, false),
        (by_customer(7), &by_two, true),
        (by_customer(6), &by_two, false),
        (by_customer(1), &by_two, false),
    ] {
        let world = World::new(contract, lines);
        for query in [query(true), query(false)] {
            let engine = Engine::new(lines);
            let source = Answering {
                inner: &*world.source,
                answer: |request: &MarginalRequest<'_>| engine.marginals(request),
            };
            let counts = world.count_by(&source, &query, threads(1)).unwrap();
            assert_eq!(counts, world.streamed(&query, threads(1)));
            assert_eq!(counts, world.naive(&query));
            assert_eq!(engine.counted.load(Ordering::Relaxed), counts_itself);
        }
    }
}

type Spoil = fn(&mut Vec<i64>);

/// A source whose batches end with an error.
struct Breaking<'w>(&'w dyn Source);

impl Source for Breaking<'_> {
    fn location(&self) -> &Path {
        self.0.location()
    }

    fn schema_check(&self, contract: &Contract) -> Result<(), SourceError> {
        self.0.schema_check(contract)
    }

    fn batches<'a>(&'a self, contract: &'a Contract) -> Result<Batches<'a>, SourceError> {
        let file = self.location().to_owned();
        let batches = self.0.batches(contract)?;
        let error = SourceError::Corrupt { file, rows: 1, message: "planted".to_owned() };
        // The unit's column alone is read before, by the cap.
        if contract.columns.len() == 1 {
            return Ok(batches);
        }
        Ok(Box::new(batches.take(7).chain(std::iter::once(Err(error)))))
    }
}

#[test]
fn answers_that_cannot_be_counts_are_refused() {
    let lines = lines(500, 1);
    let world = World::new(by_row(), &lines);
    let spoils: [(Spoil, &str); 4] = [
        (|counts| counts.truncate(counts.len() - 1), "number"),
        (|counts| counts.push(0), "number"),
        (|counts| counts[0] = -1, "negative"),
        (|counts| counts[0] += 1, "totals"),
    ];
    for (spoil, word) in spoils {
        let answer = |request: &MarginalRequest<'_>| {
            let mut counts = request.stream()?;
            spoil(&mut counts);
            Ok(counts)
        };
        let wrong = Answering { inner: &*world.source, answer };
        let error = world.count_by(&wrong, &query(true), threads(1)).unwrap_err();
        let MarginalError::Answer { reason, .. } = &error else { panic!("{error:?}") };
        assert!(reason.contains(word), "{reason}");
    }
}

#[test]
fn a_stream_that_breaks_gives_no_counts_on_any_number_of_threads() {
    let world = World::new(by_row(), &lines(ROWS, 1));
    let wrong = Breaking(&*world.source);
    for counting in [1, 3] {
        let error = world.count_by(&wrong, &query(true), threads(counting)).unwrap_err();
        assert!(matches!(&error, MarginalError::Source(SourceError::Corrupt { .. })), "{error:?}");
    }
}

#[test]
fn what_cannot_be_counted_is_refused_before_the_table_is_opened() {
    let world = World::new(by_row(), &lines(10, 1));
    fs::remove_file(&world.path).unwrap();
    let refused =
        |query: &ReleaseQuery, resources| world.count_by(&*world.source, query, resources).unwrap_err();
    let mut other = query(true);
    other.attributes[0].id = "sale.unheard_of".to_owned();
    assert_eq!(
        refused(&other, threads(1)),
        MarginalError::UnknownFeature { feature: "sale.unheard_of".to_owned() }
    );
    let little = Resources { threads: 1, bytes: 1000 };
    assert!(matches!(
        refused(&query(true), little),
        MarginalError::Count(CountError::Memory { allowed: 1000, .. })
    ));
    other = query(true);
    other.attributes[2].binning = Binning::Levels { levels: 4 };
    assert!(matches!(refused(&query(true), threads(1)), MarginalError::Source(SourceError::Read { .. })));
    let empty = World::new(by_row(), &lines(200, 1));
    assert!(matches!(
        empty.count_by(&*empty.source, &other, threads(1)),
        Err(MarginalError::Count(CountError::Kind { .. }))
    ));
}

#[test]
fn no_rows_are_counts_of_zero() {
    let world = World::new(by_customer(2), &[]);
    let counts = world.streamed(&query(true), threads(2));
    assert_eq!(counts, vec![0; query(true).cells_total()]);
}
