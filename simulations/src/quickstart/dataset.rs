//! The shipped census tables: their bytes, their domains, and what an owner would declare about each column.
//!
//! Ranges, levels and scales are written down from the survey's code book (US Current Population Survey, March
//! supplement, as documented for the KDD Census-Income files), never found by looking at rows, because numeric
//! ranges double as clipping bounds of a private release. The tables are part of the program, so nothing has to
//! be fetched or found; `data/census_income/README.md` says where they come from.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use hyper::body::Bytes;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use tabmesh_contract::schema::{
    Feature, FeatureId, FeatureKind, FeatureSchema, NumericDomain, Scale, SchemaError, Target,
};

/// Whether a domain helps to build the model or only receives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Participation {
    /// Takes part in the release and in rounds.
    Member,
    /// Has few rows, takes part in nothing, and is served the finished model.
    Newcomer,
}

/// One domain: the employed people of one industry, as if their employers' association held the table.
#[derive(Debug, Clone, Copy)]
pub struct Domain {
    /// Short name, as in paths, SPIFFE ids and product names.
    pub id: &'static str,
    /// Name for people.
    pub title: &'static str,
    /// What the domain does in the quickstart.
    pub participation: Participation,
    /// Rows of the training table.
    pub train_rows: usize,
    /// Rows of the test table.
    pub test_rows: usize,
    train: &'static [u8],
    test: &'static [u8],
}

impl Domain {
    /// The training table as Parquet bytes.
    #[must_use]
    pub fn train_parquet(&self) -> &'static [u8] {
        self.train
    }

    /// The test table as Parquet bytes; for the final figures alone.
    #[must_use]
    pub fn test_parquet(&self) -> &'static [u8] {
        self.test
    }

    /// Writes the training table, or its first `rows` rows, to `path`, making its folder.
    ///
    /// # Errors
    /// The folder or file can't be written.
    pub fn write_train(&self, path: &Path, rows: Option<usize>) -> Result<()> {
        write(path, self.train, rows)
    }

    /// Writes the test table, or its first `rows` rows, to `path`, making its folder.
    ///
    /// # Errors
    /// The folder or file can't be written.
    pub fn write_test(&self, path: &Path, rows: Option<usize>) -> Result<()> {
        write(path, self.test, rows)
    }
}

fn write(path: &Path, bytes: &'static [u8], rows: Option<usize>) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("can't make folder {}", folder.display()))?;
    }
    let context = || format!("can't write {}", path.display());
    let Some(rows) = rows else { return std::fs::write(path, bytes).with_context(context) };
    let builder = ParquetRecordBatchReaderBuilder::try_new(Bytes::from_static(bytes))?;
    let schema = Arc::clone(builder.schema());
    let mut writer = ArrowWriter::try_new(File::create(path).with_context(context)?, schema, None)?;
    let reader = builder.with_limit(rows).build()?;
    for batch in reader {
        writer.write(&batch?)?;
    }
    writer.close()?;
    Ok(())
}

macro_rules! domain {
    ($id:literal, $title:literal, $participation:ident, $train_rows:literal, $test_rows:literal) => {
        Domain {
            id: $id,
            title: $title,
            participation: Participation::$participation,
            train_rows: $train_rows,
            test_rows: $test_rows,
            train: include_bytes!(concat!("../../data/census_income/train/", $id, ".parquet")),
            test: include_bytes!(concat!("../../data/census_income/test/", $id, ".parquet")),
        }
    };
}

/// The domains, members first, each group by name.
pub const DOMAINS: [Domain; 6] = [
    domain!("education", "Education", Member, 3000, 1500),
    domain!("finance", "Finance, insurance and real estate", Member, 3000, 1500),
    domain!("manufacturing", "Manufacturing, durable goods", Member, 3000, 1500),
    domain!("retail", "Retail trade", Member, 3000, 1500),
    domain!("transportation", "Transportation", Member, 3000, 1500),
    domain!("communications", "Communications", Newcomer, 64, 532),
];

/// The domains that take part in the release and in rounds.
pub fn members() -> impl Iterator<Item = &'static Domain> {
    DOMAINS.iter().filter(|domain| domain.participation == Participation::Member)
}

/// The domains that only receive.
pub fn newcomers() -> impl Iterator<Item = &'static Domain> {
    DOMAINS.iter().filter(|domain| domain.participation == Participation::Newcomer)
}

/// What an owner declares about one feature column.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// Name in the table.
    pub name: &'static str,
    /// Canonical feature id.
    pub feature: &'static str,
    /// What the column holds.
    pub description: &'static str,
    /// Protected attribute: allowed as a feature, declared as sensitive.
    pub sensitive: bool,
    /// Declared values.
    pub values: Values,
}

/// Declared values of a column.
#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// Whole numbers within bounds.
    Number {
        /// Least value of the code book.
        lower: u32,
        /// Greatest value of the code book.
        upper: u32,
        /// Scale of binning and standardising.
        scale: Scale,
        /// Unit of measure.
        unit: &'static str,
    },
    /// All codes of the code book, in its order or, where levels have one, in theirs.
    Levels(&'static [&'static str]),
}

/// Table name of the row id.
pub const ROW_ID: &str = "row_id";
/// Table name of the target.
pub const LABEL: &str = "label";
/// Canonical id of the target.
pub const TARGET: &str = "income.above_50k";
/// What the target means.
pub const TARGET_DESCRIPTION: &str = "total income of the person above 50,000 dollars a year";
/// Classes of the target as written in the table.
pub const CLASSES: [&str; 2] = ["0", "1"];

const fn number(lower: u32, upper: u32, scale: Scale, unit: &'static str) -> Values {
    Values::Number { lower, upper, scale, unit }
}

/// The feature columns, in the order of the tables.
pub const COLUMNS: [Column; 14] = [
    Column {
        name: "age",
        feature: "person.age",
        description: "age of the person, top-coded at 90",
        sensitive: true,
        // The employment questions are put to people of 15 and above.
        values: number(15, 90, Scale::Linear, "years"),
    },
    Column {
        name: "capital_gains",
        feature: "income.capital_gains",
        description: "capital gains of the year",
        sensitive: false,
        values: number(0, 99_999, Scale::Log1p, "US dollars"),
    },
    Column {
        name: "capital_losses",
        feature: "income.capital_losses",
        description: "capital losses of the year",
        sensitive: false,
        values: number(0, 99_999, Scale::Log1p, "US dollars"),
    },
    Column {
        name: "dividends_from_stocks",
        feature: "income.dividends",
        description: "dividends from stocks of the year",
        sensitive: false,
        values: number(0, 99_999, Scale::Log1p, "US dollars"),
    },
    Column {
        name: "num_persons_worked_for_employer",
        feature: "job.employer_size",
        description: "size class of the employer: 0 not in universe, 1 under 10 people, 2 from 10, 3 from 25, 4 from \
                      100, 5 from 500, 6 from 1000",
        sensitive: false,
        values: number(0, 6, Scale::Linear, "size class"),
    },
    Column {
        name: "wage_per_hour",
        feature: "job.wage_per_hour",
        description: "hourly wage, 0 unless paid by the hour and asked",
        sensitive: false,
        values: number(0, 9_999, Scale::Log1p, "US cents"),
    },
    Column {
        name: "weeks_worked_in_year",
        feature: "job.weeks_worked",
        description: "weeks worked in the year",
        sensitive: false,
        values: number(0, 52, Scale::Linear, "weeks"),
    },
    Column {
        name: "class_of_worker",
        feature: "job.class_of_worker",
        description: "kind of employer or self-employment",
        sensitive: false,
        values: Values::Levels(&[
            "Not in universe",
            "Federal government",
            "Local government",
            "Never worked",
            "Private",
            "Self-employed-incorporated",
            "Self-employed-not incorporated",
            "State government",
            "Without pay",
        ]),
    },
    Column {
        name: "education",
        feature: "person.education",
        description: "highest level of education, in rising order",
        sensitive: false,
        values: Values::Levels(&[
            "Children",
            "Less than 1st grade",
            "1st 2nd 3rd or 4th grade",
            "5th or 6th grade",
            "7th and 8th grade",
            "9th grade",
            "10th grade",
            "11th grade",
            "12th grade no diploma",
            "High school graduate",
            "Some college but no degree",
            "Associates degree-occup /vocational",
            "Associates degree-academic program",
            "Bachelors degree(BA AB BS)",
            "Masters degree(MA MS MEng MEd MSW MBA)",
            "Prof school degree (MD DDS DVM LLB JD)",
            "Doctorate degree(PhD EdD)",
        ]),
    },
    Column {
        name: "major_occupation_code",
        feature: "job.occupation",
        description: "major occupation group",
        sensitive: false,
        values: Values::Levels(&[
            "Not in universe",
            "Adm support including clerical",
            "Armed Forces",
            "Executive admin and managerial",
            "Farming forestry and fishing",
            "Handlers equip cleaners etc",
            "Machine operators assmblrs & inspctrs",
            "Other service",
            "Precision production craft & repair",
            "Private household services",
            "Professional specialty",
            "Protective services",
            "Sales",
            "Technicians and related support",
            "Transportation and material moving",
        ]),
    },
    Column {
        name: "marital_stat",
        feature: "person.marital_status",
        description: "marital status",
        sensitive: true,
        values: Values::Levels(&[
            "Divorced",
            "Married-A F spouse present",
            "Married-civilian spouse present",
            "Married-spouse absent",
            "Never married",
            "Separated",
            "Widowed",
        ]),
    },
    Column {
        name: "migration_code_change_in_msa",
        feature: "person.move_between_areas",
        description: "move between metropolitan areas within the last year; not asked in one of the two years",
        sensitive: false,
        values: Values::Levels(&[
            "Abroad to MSA",
            "Abroad to nonMSA",
            "MSA to MSA",
            "MSA to nonMSA",
            "NonMSA to MSA",
            "NonMSA to nonMSA",
            "Nonmover",
            "Not identifiable",
            "Not in universe",
        ]),
    },
    Column {
        name: "sex",
        feature: "person.sex",
        description: "sex as recorded by the survey",
        sensitive: true,
        values: Values::Levels(&["Female", "Male"]),
    },
    Column {
        name: "tax_filer_stat",
        feature: "household.tax_filer_status",
        description: "kind of tax return filed",
        sensitive: false,
        values: Values::Levels(&[
            "Head of household",
            "Joint both 65+",
            "Joint both under 65",
            "Joint one under 65 & one 65+",
            "Nonfiler",
            "Single",
        ]),
    },
];

/// The declarations as the schema that all domains of the quickstart share.
///
/// # Errors
/// None for the declarations above; a test builds it.
pub fn schema() -> Result<FeatureSchema, SchemaError> {
    let features = COLUMNS.iter().map(feature).collect::<Result<_, _>>()?;
    let classes = CLASSES.map(str::to_owned).to_vec();
    FeatureSchema::new(features, Target { id: FeatureId::new(TARGET)?, classes })
}

fn feature(column: &Column) -> Result<Feature, SchemaError> {
    let (kind, unit) = match column.values {
        Values::Number { lower, upper, scale, unit } => {
            let (lower, upper) = (f64::from(lower), f64::from(upper));
            (
                FeatureKind::Numeric(NumericDomain { lower, upper, scale, cut_points: None }),
                Some(unit.to_owned()),
            )
        }
        Values::Levels(levels) => {
            (FeatureKind::Categorical { levels: levels.iter().map(|&l| l.to_owned()).collect() }, None)
        }
    };
    Ok(Feature {
        id: FeatureId::new(column.feature)?,
        kind,
        unit,
        description: Some(column.description.to_owned()),
    })
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeSet;

    use arrow_array::cast::AsArray;
    use arrow_array::types::{Int8Type, Int64Type};
    use arrow_array::{Array, RecordBatch};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
    use tabmesh_contract::batch::{TypedBatch, TypedColumn, missing_code};

    use super::*;

    fn batches(path: &Path) -> Vec<RecordBatch> {
        let file = File::open(path).unwrap();
        let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
        reader.map(Result::unwrap).collect()
    }

    /// Train and test rows of a domain in the schema's terms, read by the declarations of this module.
    pub(crate) fn typed(id: &str) -> (TypedBatch, TypedBatch) {
        let (_, train, test) = tables().into_iter().find(|(domain, ..)| domain.id == id).unwrap();
        let schema = schema().unwrap();
        let typed = |table: Vec<RecordBatch>| {
            let mut rows = TypedBatch::empty(&schema);
            for batch in table {
                let columns = schema.features().iter().map(|feature| {
                    let column = COLUMNS.iter().find(|c| c.feature == feature.id.as_str()).unwrap();
                    let cells = batch.column_by_name(column.name).unwrap();
                    match column.values {
                        Values::Number { .. } => {
                            let cells = cells.as_primitive::<Int64Type>().iter();
                            TypedColumn::Numeric(cells.map(|v| v.map_or(f64::NAN, |v| v as f64)).collect())
                        }
                        Values::Levels(levels) => {
                            let code = |v: &str| levels.iter().position(|&l| l == v).unwrap_or(levels.len());
                            let missing = missing_code(levels.len());
                            let cells = cells.as_string::<i32>().iter();
                            TypedColumn::Categorical(
                                cells.map(|v| v.map_or(missing, |v| code(v) as u32)).collect(),
                            )
                        }
                    }
                });
                let labels = batch.column_by_name(LABEL).unwrap().as_primitive::<Int8Type>();
                rows.append(&TypedBatch {
                    columns: columns.collect(),
                    labels: labels.values().iter().map(|&l| Some(l as u16)).collect(),
                    units: vec![[0; 16]; batch.num_rows()],
                });
            }
            rows
        };
        (typed(train), typed(test))
    }

    /// Every shipped table, written to a folder and read back.
    fn tables() -> Vec<(&'static Domain, Vec<RecordBatch>, Vec<RecordBatch>)> {
        let folder = tempfile::tempdir().unwrap();
        DOMAINS
            .iter()
            .map(|domain| {
                let (train, test) =
                    (folder.path().join("a/train.parquet"), folder.path().join("b/test.parquet"));
                domain.write_train(&train, None).unwrap();
                domain.write_test(&test, None).unwrap();
                (domain, batches(&train), batches(&test))
            })
            .collect()
    }

    fn row_ids(table: &[RecordBatch]) -> Vec<i64> {
        table
            .iter()
            .flat_map(|b| b.column_by_name(ROW_ID).unwrap().as_primitive::<Int64Type>().values().to_vec())
            .collect()
    }

    #[test]
    fn tables_have_the_stated_rows_and_no_row_twice() {
        let mut seen = BTreeSet::new();
        for (domain, train, test) in tables() {
            let (train, test) = (row_ids(&train), row_ids(&test));
            assert_eq!((train.len(), test.len()), (domain.train_rows, domain.test_rows), "{}", domain.id);
            for id in train.into_iter().chain(test) {
                assert!(seen.insert(id), "row {id} is there twice");
            }
        }
    }

    #[test]
    fn both_classes_are_in_every_table() {
        for (domain, train, test) in tables() {
            for table in [train, test] {
                let labels: BTreeSet<i8> = table
                    .iter()
                    .flat_map(|b| {
                        b.column_by_name(LABEL).unwrap().as_primitive::<Int8Type>().values().to_vec()
                    })
                    .collect();
                assert_eq!(labels, BTreeSet::from([0, 1]), "{}", domain.id);
            }
        }
    }

    #[test]
    fn every_value_is_declared_and_some_are_missing() {
        let mut missing = 0;
        for (domain, train, test) in tables() {
            for batch in train.iter().chain(&test) {
                assert_eq!(batch.num_columns(), COLUMNS.len() + 2);
                for column in &COLUMNS {
                    let cells = batch.column_by_name(column.name).unwrap();
                    missing += cells.null_count();
                    match column.values {
                        Values::Number { lower, upper, .. } => {
                            for value in cells.as_primitive::<Int64Type>().iter().flatten() {
                                let inside = (i64::from(lower)..=i64::from(upper)).contains(&value);
                                assert!(inside, "{} of {}: {value}", column.name, domain.id);
                            }
                        }
                        Values::Levels(levels) => {
                            for value in cells.as_string::<i32>().iter().flatten() {
                                assert!(
                                    levels.contains(&value),
                                    "{} of {}: {value:?}",
                                    column.name,
                                    domain.id
                                );
                            }
                        }
                    }
                }
            }
        }
        // About half of the rows are of the year in which the migration question wasn't asked.
        assert!(missing > 10_000, "{missing}");
    }

    #[test]
    fn declarations_make_a_schema() {
        let schema = schema().unwrap();
        assert_eq!(schema.features().len(), COLUMNS.len());
        assert_eq!(schema.target().classes, CLASSES);
        assert!(schema.position(&FeatureId::new("person.age").unwrap()).is_some());
        let sensitive: Vec<_> = COLUMNS.iter().filter(|c| c.sensitive).map(|c| c.name).collect();
        assert_eq!(sensitive, ["age", "marital_stat", "sex"]);
    }

    #[test]
    fn one_newcomer_with_few_rows() {
        assert_eq!(members().count(), 5);
        let newcomers: Vec<_> = newcomers().map(|d| (d.id, d.train_rows)).collect();
        assert_eq!(newcomers, [("communications", 64)]);
    }
}
