//! One conformance test over all arms, and the refusals of each.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, BooleanArray, DictionaryArray, Float32Array, Float64Array, Int8Array, Int64Array, RecordBatch,
    StringArray, TimestampMillisecondArray,
};
use tabmesh_contract::batch::{TypedColumn, missing_code, other_code};
use tabmesh_contract::contract::Contract;
use tabmesh_contract::profile::Distinct;
use tempfile::TempDir;

use super::*;

/// The same rows as text; the Parquet arm is written from them in native types.
const ROWS: [[&str; 7]; 7] = [
    ["t1", "alice", "10.5", "grocery", "true", "1", "2026-01-01T00:00:00Z"],
    ["t2", "alice", "-3", "casino", "false", "0", "2026-01-02T12:30:00Z"],
    ["t3", "bob", "", "travel", "", "0", "2026-01-03T00:00:00Z"],
    ["t4", "bob", "2500000", "", "true", "1", ""],
    ["t5", "", "7", "travel", "false", "", "2026-01-05T00:00:00Z"],
    ["t6", "", "8", "grocery", "false", "2", "2026-01-04T00:00:00Z"],
    ["t7", "", "9", "grocery", "true", "1", "2026-01-04T00:00:00Z"],
];

const NAMES: [&str; 7] = ["tid", "customer", "amount", "category", "online", "label", "at"];

fn contract(kind: &str, file: &str) -> Contract {
    let text = format!(
        "name: shop.sales
version: '1.0.0'
owner: shop@example.com
schema:
  - {{name: label, type: integer, role: target, feature: sale.fraud, categories: ['0', '1']}}
  - {{name: tid, type: string, role: id, unique: true}}
  - {{name: customer, type: string, pii: true, role: entity}}
  - {{name: amount, type: decimal, range: [0, 1000000], feature: sale.amount}}
  - {{name: category, type: categorical, categories: [grocery, travel], feature: sale.category}}
  - {{name: online, type: boolean, feature: sale.online}}
  - {{name: at, type: timestamp, role: time}}
privacy: {{sensitivity: low, allow_training: true, unit: customer, max_rows_per_unit: 2, max_units: 100}}
source: {{type: {kind}, path: {file}}}
"
    );
    Contract::parse("contract.yaml", &text).unwrap_or_else(|error| panic!("{}", error.render())).0
}

fn write_csv(path: &Path, rows: &[[&str; 7]]) {
    let mut text = NAMES.join(",");
    for row in rows {
        text.push('\n');
        text.push_str(&row.join(","));
    }
    text.push('\n');
    fs::write(path, text).unwrap();
}

fn column(rows: &[[&'static str; 7]], index: usize) -> Vec<Option<&'static str>> {
    rows.iter().map(|row| Some(row[index]).filter(|t| !t.is_empty())).collect()
}

fn arrays(rows: &[[&'static str; 7]]) -> Vec<(&'static str, ArrayRef)> {
    let text = |i| Arc::new(StringArray::from(column(rows, i))) as ArrayRef;
    let amount: Float64Array = column(rows, 2).into_iter().map(|t| t.map(|t| t.parse().unwrap())).collect();
    let category: DictionaryArray<Int32Type> = column(rows, 3).into_iter().collect();
    let online: BooleanArray = column(rows, 4).into_iter().map(|t| t.map(|t| t == "true")).collect();
    let label: Int8Array = column(rows, 5).into_iter().map(|t| t.map(|t| t.parse().unwrap())).collect();
    let at = column(rows, 6)
        .into_iter()
        .map(|t| t.map(|t| arrow_cast::parse::string_to_timestamp_nanos(t).unwrap() / 1_000_000));
    let at: TimestampMillisecondArray = at.collect();
    vec![
        ("tid", text(0)),
        ("extra", text(0)),
        ("customer", text(1)),
        ("amount", Arc::new(amount)),
        ("category", Arc::new(category)),
        ("online", Arc::new(online)),
        ("label", Arc::new(label)),
        ("at", Arc::new(at)),
    ]
}

fn write_parquet(path: &Path, arrays: Vec<(&str, ArrayRef)>) {
    let batch =
        RecordBatch::try_from_iter_with_nullable(arrays.into_iter().map(|(n, a)| (n, a, true))).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

struct Arm {
    _folder: TempDir,
    path: PathBuf,
    contract: Contract,
    source: Box<dyn Source>,
}

impl Arm {
    fn csv(rows: &[[&str; 7]]) -> Self {
        Self::new("csv", |path| write_csv(path, rows))
    }

    fn parquet(arrays: Vec<(&str, ArrayRef)>) -> Self {
        Self::new("parquet", |path| write_parquet(path, arrays))
    }

    fn new(kind: &str, write: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = format!("sales.{kind}");
        let path = folder.path().join(&file);
        write(&path);
        let contract = contract(kind, &file);
        let source = open_contract(&contract, folder.path()).unwrap();
        Self { _folder: folder, path, contract, source }
    }

    fn both() -> [Self; 2] {
        [Self::csv(&ROWS), Self::parquet(arrays(&ROWS))]
    }

    fn key() -> DomainKey {
        DomainKey::new(&[3; 32])
    }

    fn all(&self) -> Rows {
        let schema = self.contract.approved_schema().unwrap();
        let view = View::new(&*self.source, &self.contract, &schema, Self::key()).unwrap();
        let mut batches: Vec<Rows> = view.rows().unwrap().map(Result::unwrap).collect();
        assert_eq!(batches.len(), 1);
        batches.remove(0)
    }

    /// All rows in one.
    fn batches(&self) -> Rows {
        let schema = self.contract.approved_schema().unwrap();
        let view = View::new(&*self.source, &self.contract, &schema, Self::key()).unwrap();
        let mut all: Option<Rows> = None;
        for rows in view.rows().unwrap() {
            let rows = rows.unwrap();
            match &mut all {
                None => all = Some(rows),
                Some(all) => {
                    all.batch.append(&rows.batch);
                    all.times_ms.extend(rows.times_ms);
                }
            }
        }
        all.unwrap()
    }

    fn check(&self) -> SourceError {
        self.source.schema_check(&self.contract).unwrap_err()
    }
}

/// What every arm must make of [`ROWS`].
fn conforms(arm: &Arm) {
    arm.source.schema_check(&arm.contract).unwrap();
    let Rows { batch, times_ms } = arm.all();
    let [TypedColumn::Numeric(amount), TypedColumn::Categorical(category), TypedColumn::Categorical(online)] =
        batch.columns.as_slice()
    else {
        panic!("columns are {:?}", batch.columns);
    };
    assert!(amount[2].is_nan());
    let readable: Vec<f64> = amount.iter().copied().filter(|v| !v.is_nan()).collect();
    assert_eq!(readable, [10.5, -3.0, 2_500_000.0, 7.0, 8.0, 9.0], "values are not clamped here");
    assert_eq!(*category, [0, other_code(2), 1, missing_code(2), 1, 0, 0]);
    assert_eq!(*online, [1, 0, missing_code(2), 1, 0, 0, 1]);
    assert_eq!(batch.labels, [Some(1), Some(0), Some(0), Some(1), None, None, Some(1)]);
    assert_eq!(times_ms[0], Some(1_767_225_600_000));
    assert_eq!(times_ms[1], Some(1_767_357_000_000));
    assert_eq!(times_ms[3], None);

    let units = &batch.units;
    assert_eq!(units[0], units[1]);
    assert_eq!(units[2], units[3]);
    assert_ne!(units[0], units[2]);
    assert!(units[4] == units[5] && units[5] == units[6], "rows without an entity share one unit");

    let schema = arm.contract.approved_schema().unwrap();
    let view = View::new(&*arm.source, &arm.contract, &schema, Arm::key()).unwrap();
    let capped = view.load().unwrap();
    assert_eq!(capped.batch.rows(), 6);
    assert_eq!(capped.times_ms.len(), 6);
    assert_eq!(capped.batch.units.iter().filter(|u| **u == units[4]).count(), 2);

    let profile = profile(&*arm.source, &arm.contract).unwrap();
    assert_eq!(profile.rows(), 7);
    assert_eq!(profile.newest_ms(), Some(1_767_571_200_000));
    assert_eq!(profile.column("amount").unwrap().out_of_range(), (1, 1));
    assert_eq!(profile.column("amount").unwrap().nulls(), 1);
    assert_eq!(profile.column("category").unwrap().undeclared(), 1);
    assert_eq!(profile.column("label").unwrap().undeclared(), 1);
    assert_eq!(profile.column("tid").unwrap().distinct(), Distinct::Exactly(7));
    assert!(profile.columns().iter().all(|c| c.unreadable() == 0));
}

#[test]
fn every_arm_conforms_and_all_agree() {
    let arms = Arm::both();
    arms.iter().for_each(conforms);
    let [csv, parquet] = arms;
    // NaN differs from itself, so the comparison is by bits through the debug text.
    assert_eq!(format!("{:?}", csv.all()), format!("{:?}", parquet.all()));
}

#[test]
fn numbers_of_any_width_and_booleans_as_levels() {
    let mut columns = arrays(&ROWS);
    columns[3].1 = Arc::new(Float32Array::from(vec![10.5f32, -3.0, 0.0, 1.0, 2.0, 3.0, 4.0]));
    columns[4].1 = Arc::new(BooleanArray::from(vec![true; 7]));
    columns[6].1 = Arc::new(Float64Array::from(vec![1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]));
    let arm = Arm::parquet(columns);
    arm.source.schema_check(&arm.contract).unwrap();
    let batch = arm.all().batch;
    assert_eq!(batch.columns[0], TypedColumn::Numeric(vec![10.5, -3.0, 0.0, 1.0, 2.0, 3.0, 4.0]));
    assert_eq!(batch.columns[1], TypedColumn::Categorical(vec![other_code(2); 7]));
    assert_eq!(batch.labels[..3], [Some(1), Some(0), None], "half a class is unreadable as an integer");
    let profile = profile(&*arm.source, &arm.contract).unwrap();
    assert_eq!(profile.column("label").unwrap().unreadable(), 1);
}

/// Text is read as places in a dictionary whatever the file says it is; levels over several row groups and pages too.
#[test]
fn text_of_categorical_columns_is_the_same_in_every_form() {
    let rows: Vec<[&str; 7]> = (0..BATCH_ROWS * 2 + 100).map(|i| ROWS[i * i % 7]).collect();
    let expected = format!("{:?}", Arm::csv(&rows).batches());
    let dictionary = arrays(&rows);
    let mut text = arrays(&rows);
    text[4].1 = Arc::new(StringArray::from(column(&rows, 3)));
    let mut large = arrays(&rows);
    large[4].1 = Arc::new(arrow_array::LargeStringArray::from(column(&rows, 3)));
    for arrays in [dictionary, text, large] {
        let arm = Arm::new("parquet", |path| {
            let batch =
                RecordBatch::try_from_iter_with_nullable(arrays.into_iter().map(|(n, a)| (n, a, true)));
            let batch = batch.unwrap();
            let small = ::parquet::file::properties::WriterProperties::builder()
                .set_max_row_group_row_count(Some(3000))
                .set_dictionary_page_size_limit(64)
                .build();
            let mut writer =
                ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(small)).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
        });
        assert_eq!(format!("{:?}", arm.batches()), expected);
    }
}

#[test]
fn a_missing_column_is_named() {
    let mut columns = arrays(&ROWS);
    columns.remove(3);
    let arm = Arm::parquet(columns);
    let SourceError::MissingColumn { column, found, .. } = arm.check() else { panic!("{:?}", arm.check()) };
    assert_eq!(column, "amount");
    assert_eq!(found[0], "tid");

    let arm = Arm::new("csv", |path| fs::write(path, "tid,customer\nt1,a\n").unwrap());
    let error = arm.check();
    let SourceError::MissingColumn { column, .. } = &error else { panic!("{error:?}") };
    assert_eq!(column, "label");
    assert!(error.to_string().contains("sales.csv has no column `label`, found: tid, customer"), "{error}");
}

#[test]
fn a_column_of_the_wrong_type_is_named() {
    let mut columns = arrays(&ROWS);
    columns[3].1 = Arc::new(StringArray::from(column(&ROWS, 2)));
    let arm = Arm::parquet(columns);
    let SourceError::WrongType { column, expected, found, .. } = arm.check() else { panic!() };
    assert_eq!((column.as_str(), expected.as_str(), found.as_str()), ("amount", "a number", "Utf8"));

    let mut columns = arrays(&ROWS);
    columns[0].1 = Arc::new(Int64Array::from(vec![1; 7]));
    let arm = Arm::parquet(columns);
    let SourceError::WrongType { column, expected, .. } = arm.check() else { panic!() };
    assert_eq!((column.as_str(), expected.as_str()), ("tid", "text"));
    assert!(matches!(
        arm.source.batches(&arm.contract).unwrap().next(),
        Some(Err(SourceError::WrongType { .. }))
    ));
}

#[test]
fn text_that_is_no_number_is_refused_by_check_and_missing_in_the_stream() {
    let mut rows = ROWS;
    rows[1][2] = "PLANTED-VALUE";
    let arm = Arm::csv(&rows);
    let error = arm.check();
    let SourceError::WrongType { column, found, .. } = &error else { panic!("{error:?}") };
    assert_eq!((column.as_str(), found.as_str()), ("amount", "other text in row 2"));
    assert!(!error.to_string().contains("PLANTED"), "a cell is quoted: {error}");
    let TypedColumn::Numeric(amount) = &arm.all().batch.columns[0] else { panic!() };
    assert!(amount[1].is_nan());
    let profile = profile(&*arm.source, &arm.contract).unwrap();
    assert_eq!(profile.column("amount").unwrap().unreadable(), 1);
}

#[test]
fn a_truncated_parquet_file_is_told_from_another_format() {
    let arm = Arm::parquet(arrays(&ROWS));
    let bytes = fs::read(&arm.path).unwrap();
    fs::write(&arm.path, &bytes[..bytes.len() - 20]).unwrap();
    assert!(matches!(arm.check(), SourceError::Truncated { .. }), "{:?}", arm.check());
    fs::write(&arm.path, "tid,customer\n").unwrap();
    assert!(matches!(arm.check(), SourceError::WrongFormat { expected: "parquet", .. }), "{:?}", arm.check());
    fs::remove_file(&arm.path).unwrap();
    assert!(matches!(arm.check(), SourceError::Read { .. }), "{:?}", arm.check());
}

#[test]
fn damaged_pages_end_the_stream_with_an_error() {
    let arm = Arm::parquet(arrays(&ROWS));
    let mut bytes = fs::read(&arm.path).unwrap();
    for byte in &mut bytes[4..200] {
        *byte = 0xFF;
    }
    fs::write(&arm.path, bytes).unwrap();
    let outcomes: Vec<_> = arm.source.batches(&arm.contract).unwrap().collect();
    assert!(matches!(outcomes.as_slice(), [Err(SourceError::Corrupt { rows: 0, .. })]), "{outcomes:?}");
}

#[test]
fn a_line_cut_short_ends_the_stream_with_an_error() {
    let arm = Arm::csv(&ROWS);
    let text = fs::read_to_string(&arm.path).unwrap();
    fs::write(&arm.path, &text[..text.len() - 40]).unwrap();
    assert!(matches!(arm.check(), SourceError::Corrupt { .. }), "{:?}", arm.check());
}

#[test]
fn no_rows_are_refused_by_check_and_an_empty_stream_afterwards() {
    for arm in [Arm::csv(&[]), Arm::parquet(arrays(&[]))] {
        assert!(matches!(arm.check(), SourceError::NoRows { .. }), "{:?}", arm.check());
        let schema = arm.contract.approved_schema().unwrap();
        let view = View::new(&*arm.source, &arm.contract, &schema, Arm::key()).unwrap();
        let rows = view.load().unwrap();
        assert_eq!((rows.batch.rows(), rows.batch.columns.len()), (0, 3));
    }
}

#[test]
fn long_tables_come_in_bounded_batches_and_the_cap_holds_across_them() {
    let line: [&str; 7] = ["t", "carol", "1", "grocery", "true", "1", "2026-01-01T00:00:00Z"];
    let rows = vec![line; BATCH_ROWS * 2 + 5];
    for arm in [Arm::csv(&rows), Arm::parquet(arrays(&rows))] {
        let sizes: Vec<usize> =
            arm.source.batches(&arm.contract).unwrap().map(|b| b.unwrap().rows()).collect();
        assert_eq!(sizes.iter().sum::<usize>(), rows.len());
        assert!(sizes.len() >= 3 && sizes.iter().all(|&n| n <= BATCH_ROWS), "{sizes:?}");
        let schema = arm.contract.approved_schema().unwrap();
        let view = View::new(&*arm.source, &arm.contract, &schema, Arm::key()).unwrap();
        assert_eq!(view.load().unwrap().batch.rows(), 2);
    }
}

fn row_unit_contract() -> Contract {
    let text = "name: shop.rows
version: '1.0.0'
owner: shop@example.com
schema:
  - {name: x, type: number, range: [0, 10]}
  - {name: y, type: categorical, role: target, categories: ['0', '1']}
privacy: {sensitivity: low, allow_training: true, max_units: 100}
source: {type: csv, path: rows.csv}
";
    Contract::parse("contract.yaml", text).unwrap().0
}

fn row_units(text: &str) -> Vec<[u8; 16]> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("rows.csv"), text).unwrap();
    let contract = row_unit_contract();
    let source = open_contract(&contract, folder.path()).unwrap();
    let schema = contract.approved_schema().unwrap();
    let view = View::new(&*source, &contract, &schema, Arm::key()).unwrap();
    let rows = view.load().unwrap();
    rows.batch.units
}

/// Add/remove adjacency of rows: taking one row out must leave the names of all others as they were.
#[test]
fn removing_a_row_renames_no_other_row() {
    let whole = row_units("x,y\n1,0\n2,1\n2,1\n3,0\n");
    assert_eq!(whole.len(), 4);
    assert_eq!(whole.iter().collect::<BTreeSet<_>>().len(), 4, "equal rows stay apart");
    let without_first = row_units("x,y\n2,1\n2,1\n3,0\n");
    assert_eq!(whole[1..], without_first);
    let without_a_twin = row_units("x,y\n1,0\n2,1\n3,0\n");
    assert_eq!([whole[0], whole[1], whole[3]], without_a_twin[..]);
}

#[test]
fn a_feature_of_the_mesh_that_the_domain_lacks_is_missing() {
    let arm = Arm::csv(&ROWS);
    let other = contract("csv", "sales.csv");
    let text = "name: other.sales
version: '1.0.0'
owner: other@example.com
schema:
  - {name: price, type: decimal, range: [0, 5], feature: sale.amount}
  - {name: a_first, type: decimal, range: [0, 5], feature: a.first}
  - {name: kind, type: categorical, categories: [x, y, z], feature: z.last}
  - {name: y, type: categorical, role: target, feature: sale.fraud, categories: ['1', '0']}
privacy: {sensitivity: low, allow_training: true, max_units: 10}
";
    let shared = Contract::parse("other.yaml", text).unwrap().0.approved_schema().unwrap();
    let view = View::new(&*arm.source, &other, &shared, Arm::key()).unwrap();
    let batch = view.rows().unwrap().next().unwrap().unwrap().batch;
    let TypedColumn::Numeric(first) = &batch.columns[0] else { panic!() };
    assert!(first.iter().all(|v| v.is_nan()));
    let TypedColumn::Numeric(amount) = &batch.columns[1] else { panic!() };
    assert_eq!(amount[0].to_bits(), 10.5f64.to_bits());
    assert_eq!(batch.columns[2], TypedColumn::Categorical(vec![missing_code(3); 7]));
    assert_eq!(batch.labels[0], Some(0), "class codes are the shared schema's");

    let boolean = text
        .replace("type: decimal, range: [0, 5], feature: sale.amount", "type: boolean, feature: sale.amount");
    let clash = Contract::parse("other.yaml", &boolean).unwrap().0.approved_schema().unwrap();
    assert!(matches!(
        View::new(&*arm.source, &other, &clash, Arm::key()).err(),
        Some(SourceError::FeatureMismatch { expected: "categorical", found: "numeric", .. })
    ));
    let returned = text.replace("sale.fraud", "sale.returned");
    let clash = Contract::parse("other.yaml", &returned).unwrap().0.approved_schema().unwrap();
    assert!(matches!(
        View::new(&*arm.source, &other, &clash, Arm::key()).err(),
        Some(SourceError::MissingTarget { .. })
    ));
}

#[test]
fn rows_to_predict_need_no_label() {
    let arm = Arm::new("csv", |path| fs::write(path, "amount,online,category\n5,true,travel\n").unwrap());
    let mut contract = arm.contract.clone();
    let schema = contract.approved_schema().unwrap();
    contract.columns.retain(|c| c.role == tabmesh_contract::contract::Role::Feature);
    assert!(matches!(
        View::new(&*arm.source, &contract, &schema, Arm::key()).err(),
        Some(SourceError::MissingTarget { .. })
    ));
    let view = View::unlabelled(&*arm.source, &contract, &schema, Arm::key()).unwrap();
    let rows = view.rows().unwrap().next().unwrap().unwrap();
    assert_eq!(rows.batch.labels, [None]);
    assert_eq!(rows.batch.columns[1], TypedColumn::Categorical(vec![1]));
}

#[test]
fn a_check_warns_of_a_table_with_one_class() {
    let one = [ROWS[0], ROWS[3], ROWS[6]];
    for arm in [Arm::csv(&one), Arm::parquet(arrays(&one))] {
        let check = TableCheck::run(&*arm.source, &arm.contract, 0).unwrap();
        let warnings = check.warnings(&arm.contract);
        assert!(warnings.iter().any(|w| w.contains("`label` has one class")), "{warnings:?}");
    }
    let arm = Arm::csv(&ROWS);
    let warnings = TableCheck::run(&*arm.source, &arm.contract, 0).unwrap().warnings(&arm.contract);
    assert!(!warnings.iter().any(|w| w.contains("one class")), "{warnings:?}");
}

#[test]
fn a_check_says_what_is_broken_and_what_is_only_worth_knowing() {
    for arm in Arm::both() {
        let hour = 3_600_000;
        let check = TableCheck::run(&*arm.source, &arm.contract, 1_767_571_200_000 + hour).unwrap();
        assert_eq!(check.units, Distinct::Exactly(2));
        assert!(!check.passed());
        let problems = check.problems(&arm.contract);
        assert!(problems.iter().any(|p| p.contains("amount") && p.contains("invalidValues")), "{problems:?}");
        let warnings = check.warnings(&arm.contract);
        assert!(warnings.iter().any(|p| p.contains("category")), "{warnings:?}");
        assert!(!problems.iter().chain(&warnings).any(|p| p.contains("tid")), "{problems:?} {warnings:?}");
    }
    let sound = [["t1", "alice", "10.5", "grocery", "true", "1", "2026-01-01T00:00:00Z"]];
    let arm = Arm::csv(&sound);
    let check = TableCheck::run(&*arm.source, &arm.contract, 0).unwrap();
    assert!(check.passed(), "{:?}", check.problems(&arm.contract));
}

#[test]
fn more_units_than_declared_are_a_problem() {
    let ids: Vec<String> = (0..101).map(|i| format!("c{i}")).collect();
    let rows: Vec<[&str; 7]> = ids
        .iter()
        .map(|id| [id.as_str(), id.as_str(), "1", "grocery", "true", "1", "2026-01-01T00:00:00Z"])
        .collect();
    let arm = Arm::csv(&rows);
    let check = TableCheck::run(&*arm.source, &arm.contract, 0).unwrap();
    assert!(!check.passed());
    assert!(check.problems(&arm.contract)[0].contains("max_units"), "{:?}", check.problems(&arm.contract));
    let arm = Arm::csv(&rows[..100]);
    assert!(TableCheck::run(&*arm.source, &arm.contract, 0).unwrap().passed());
}
