//! A single table from a folder: `dataset.json`, `train.parquet`, `test.parquet`, as typed rows of a schema.
//!
//! Declarations (ranges, scales, levels) are read off the rows that a model may learn from, never off test rows: an
//! owner of a real table would write them down from knowledge, which a benchmark doesn't have.

use std::{fs::File, path::Path};

use anyhow::{Context, Result, bail, ensure};
use arrow_array::{
    Array,
    cast::AsArray,
    types::{Float64Type, Int8Type, Int64Type},
};
use arrow_schema::DataType;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Deserialize;
use tabmesh_contract::{
    batch::{TypedBatch, TypedColumn, missing_code, other_code},
    schema::{Feature, FeatureId, FeatureKind, FeatureSchema, NumericDomain, Scale, Target},
};

/// A table's description, as far as it is used.
#[derive(Debug, Clone, Deserialize)]
pub struct Description {
    /// Name of the table.
    pub name: String,
    /// `binary` or something else, which is left out.
    pub task: String,
    columns: Vec<ColumnDescription>,
}

#[derive(Debug, Clone, Deserialize)]
struct ColumnDescription {
    name: String,
    role: String,
}

/// Cells of one column.
#[derive(Debug, Clone, PartialEq)]
pub enum RawColumn {
    /// Numbers; `NaN` is missing.
    Numeric(Vec<f64>),
    /// Texts; none is missing.
    Text(Vec<Option<String>>),
}

/// Rows of a table before any declaration.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTable {
    /// Name and cells of each feature column.
    pub columns: Vec<(String, RawColumn)>,
    /// 0 or 1 for each row.
    pub labels: Vec<u8>,
}

impl Description {
    /// Reads `dataset.json` of a table's folder.
    ///
    /// # Errors
    /// The file can't be read or isn't a description.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("dataset.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a description", path.display()))
    }

    /// Reads one Parquet file of the table: features and sensitive columns, no ids, nothing personal.
    ///
    /// # Errors
    /// The file can't be read, lacks a column, or holds a type that isn't a number or a text.
    pub fn rows(&self, path: &Path) -> Result<RawTable> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(file)?.with_batch_size(1 << 20).build()?;
        let wanted: Vec<&str> = self
            .columns
            .iter()
            .filter(|c| c.role == "feature" || c.role == "sensitive")
            .map(|c| c.name.as_str())
            .collect();
        let mut table = RawTable { columns: Vec::new(), labels: Vec::new() };
        for batch in reader {
            let batch = batch?;
            let column = |name: &str| {
                batch.column_by_name(name).with_context(|| format!("{} has no column {name}", path.display()))
            };
            let labels = column("label")?;
            let labels = labels.as_primitive_opt::<Int8Type>().context("labels are not 8-bit numbers")?;
            for label in labels {
                match label {
                    Some(label @ (0 | 1)) => table.labels.push(u8::from(label == 1)),
                    other => bail!("{}: label {other:?} is neither 0 nor 1", path.display()),
                }
            }
            for (at, name) in wanted.iter().enumerate() {
                let cells = cells(column(name)?.as_ref()).with_context(|| format!("column {name}"))?;
                match table.columns.get_mut(at) {
                    None => table.columns.push(((*name).to_owned(), cells)),
                    Some((_, all)) => all.append(cells)?,
                }
            }
        }
        ensure!(!table.labels.is_empty() && !table.columns.is_empty(), "{} has no rows", path.display());
        Ok(table)
    }
}

fn cells(array: &dyn Array) -> Result<RawColumn> {
    Ok(match array.data_type() {
        DataType::Float64 => RawColumn::Numeric(
            array.as_primitive::<Float64Type>().iter().map(|v| v.unwrap_or(f64::NAN)).collect(),
        ),
        DataType::Int64 => RawColumn::Numeric(
            array.as_primitive::<Int64Type>().iter().map(|v| v.map_or(f64::NAN, |v| v as f64)).collect(),
        ),
        DataType::Utf8 => {
            RawColumn::Text(array.as_string::<i32>().iter().map(|v| v.map(str::to_owned)).collect())
        }
        DataType::LargeUtf8 => {
            RawColumn::Text(array.as_string::<i64>().iter().map(|v| v.map(str::to_owned)).collect())
        }
        other => bail!("type {other} is neither a number nor a text"),
    })
}

impl RawColumn {
    fn append(&mut self, more: Self) -> Result<()> {
        match (self, more) {
            (Self::Numeric(all), Self::Numeric(more)) => all.extend(more),
            (Self::Text(all), Self::Text(more)) => all.extend(more),
            _ => bail!("a column changes its type"),
        }
        Ok(())
    }
}

impl RawTable {
    /// Adds the rows of a table with the same columns.
    ///
    /// # Errors
    /// Its columns differ.
    pub fn append(&mut self, more: Self) -> Result<()> {
        if self.columns.is_empty() {
            *self = more;
            return Ok(());
        }
        let names = |table: &Self| table.columns.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        ensure!(names(self) == names(&more), "columns {:?} and {:?} differ", names(self), names(&more));
        for ((name, all), (_, cells)) in self.columns.iter_mut().zip(more.columns) {
            all.append(cells).with_context(|| format!("column {name}"))?;
        }
        self.labels.extend(more.labels);
        Ok(())
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.labels.len()
    }

    /// The declaration that the rows at `indices` suggest; columns without any value there are left out.
    ///
    /// # Errors
    /// No column is left, or more features or levels than a schema takes.
    pub fn schema(&self, indices: &[usize]) -> Result<FeatureSchema> {
        let mut features = Vec::new();
        for (at, (name, column)) in self.columns.iter().enumerate() {
            let Some(kind) = Self::kind(column, indices) else { continue };
            features.push(Feature {
                id: FeatureId::new(Self::id(at, name))?,
                kind,
                unit: None,
                description: Some(name.clone()),
            });
        }
        let target = Target { id: FeatureId::new("target")?, classes: vec!["0".into(), "1".into()] };
        Ok(FeatureSchema::new(features, target)?)
    }

    /// The rows at `indices` in a schema's terms.
    ///
    /// # Errors
    /// A schema that wasn't made from a table with the same columns.
    pub fn typed(&self, schema: &FeatureSchema, indices: &[usize]) -> Result<TypedBatch> {
        let mut columns = Vec::with_capacity(schema.features().len());
        for feature in schema.features() {
            let found = self
                .columns
                .iter()
                .enumerate()
                .find(|(at, (name, _))| Self::id(*at, name) == feature.id.as_str())
                .with_context(|| format!("no column for {}", feature.id))?;
            columns.push(match (&found.1.1, &feature.kind) {
                (RawColumn::Numeric(all), FeatureKind::Numeric(_)) => {
                    TypedColumn::Numeric(indices.iter().map(|i| all[*i]).collect())
                }
                (RawColumn::Text(all), FeatureKind::Categorical { levels }) => {
                    let code = |cell: &Option<String>| match cell {
                        None => missing_code(levels.len()),
                        Some(text) => levels
                            .binary_search(text)
                            .ok()
                            .and_then(|at| u32::try_from(at).ok())
                            .unwrap_or_else(|| other_code(levels.len())),
                    };
                    TypedColumn::Categorical(indices.iter().map(|i| code(&all[*i])).collect())
                }
                _ => bail!("column of {} has another kind", feature.id),
            });
        }
        Ok(TypedBatch {
            columns,
            labels: indices.iter().map(|i| Some(u16::from(self.labels[*i]))).collect(),
            units: vec![[0; 16]; indices.len()],
        })
    }

    /// An id that no two columns share, whatever their names.
    #[must_use]
    pub fn id(at: usize, name: &str) -> String {
        let kept: String = name
            .chars()
            .map(|c| c.to_ascii_lowercase())
            .map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' })
            .take(40)
            .collect();
        format!("c{at:03}.{kept}")
    }

    /// What the cells at `indices` are; `None` if none of them has a value.
    #[must_use]
    pub fn kind(column: &RawColumn, indices: &[usize]) -> Option<FeatureKind> {
        match column {
            RawColumn::Numeric(all) => {
                let mut known: Vec<f64> = indices.iter().map(|i| all[*i]).filter(|v| v.is_finite()).collect();
                known.sort_by(f64::total_cmp);
                let (lower, upper) = (*known.first()?, *known.last()?);
                let middle = known[known.len() / 2];
                let scale = if lower >= 0.0 && upper > HEAVY_TAIL * middle.max(1.0) {
                    Scale::Log1p
                } else {
                    Scale::Linear
                };
                // A constant still needs a range.
                let upper = if upper > lower { upper } else { lower + lower.abs().max(1.0) };
                Some(FeatureKind::Numeric(NumericDomain { lower, upper, scale, cut_points: None }))
            }
            RawColumn::Text(all) => {
                let mut levels: Vec<String> = indices.iter().filter_map(|i| all[*i].clone()).collect();
                levels.sort();
                levels.dedup();
                (!levels.is_empty()).then_some(FeatureKind::Categorical { levels })
            }
        }
    }
}

/// A column without negative values whose largest is above this many times its median is put on a log scale.
const HEAVY_TAIL: f64 = 20.0;

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Float64Array, Int8Array, Int64Array, RecordBatch, StringArray};
    use parquet::arrow::ArrowWriter;

    use super::*;

    fn shared(array: impl Array + 'static) -> ArrayRef {
        Arc::new(array)
    }

    /// Writes a small table folder with made-up rows; used by the benchmark's own test too.
    pub(crate) fn write_folder(folder: &Path, rows: usize) {
        std::fs::create_dir_all(folder).unwrap();
        let columns = r#"[{"name":"row_id","role":"row_id"},{"name":"label","role":"label"},
            {"name":"Age years","role":"sensitive"},{"name":"kind","role":"feature"},
            {"name":"visits","role":"feature"},{"name":"surname","role":"pii"}]"#;
        let text = format!(r#"{{"name":"made_up","task":"binary","columns":{columns},"rows":{rows}}}"#);
        std::fs::write(folder.join("dataset.json"), text).unwrap();
        for (name, offset) in [("train", 0), ("test", 7)] {
            let at = |i: usize| (i * 37 + offset * 11) % 101;
            let label = |i: usize| i8::from(at(i) + (i * 17) % 40 > 75);
            let kinds = (0..rows).map(|i| (i % 11 != 3).then(|| ["a", "b", "c"][at(i) / 40]));
            let number = |i: usize| (!i.is_multiple_of(5)).then_some((i % 9) as f64);
            let batch = RecordBatch::try_from_iter([
                ("row_id", shared(Int64Array::from_iter_values(0..rows as i64))),
                ("label", shared(Int8Array::from_iter_values((0..rows).map(label)))),
                ("Age years", shared(Int64Array::from_iter_values((0..rows).map(|i| at(i) as i64)))),
                ("kind", shared(StringArray::from_iter(kinds))),
                ("visits", shared(Float64Array::from_iter((0..rows).map(number)))),
                ("surname", shared(StringArray::from_iter_values((0..rows).map(|i| format!("n{i}"))))),
            ])
            .unwrap();
            let file = File::create(folder.join(format!("{name}.parquet"))).unwrap();
            let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
        }
    }

    #[test]
    fn reads_features_and_leaves_ids_and_names_out() {
        let dir = tempfile::tempdir().unwrap();
        write_folder(dir.path(), 40);
        let description = Description::read(dir.path()).unwrap();
        let table = description.rows(&dir.path().join("train.parquet")).unwrap();
        let names: Vec<&str> = table.columns.iter().map(|c| c.0.as_str()).collect();
        assert_eq!(names, ["Age years", "kind", "visits"]);
        assert_eq!(table.rows(), 40);
        let all: Vec<usize> = (0..40).collect();
        let schema = table.schema(&all).unwrap();
        assert_eq!(schema.features()[0].id.as_str(), "c000.age_years");
        let typed = table.typed(&schema, &all).unwrap();
        let (TypedColumn::Categorical(kinds), TypedColumn::Numeric(visits)) =
            (&typed.columns[1], &typed.columns[2])
        else {
            panic!("a text column is a category, a number column a number")
        };
        assert_eq!((kinds[0], kinds[3]), (0, 4), "level a, missing");
        assert!(visits[0].is_nan() && (visits[6] - 6.0).abs() < 1e-9);
    }

    /// Levels that only test rows have are "other", and a column that is empty in training is no feature.
    #[test]
    fn declarations_come_from_the_given_rows_alone() {
        let text =
            |values: &[Option<&str>]| RawColumn::Text(values.iter().map(|v| v.map(str::to_owned)).collect());
        let table = RawTable {
            columns: vec![
                ("a".into(), text(&[Some("x"), Some("y"), Some("z"), None])),
                ("b".into(), RawColumn::Numeric(vec![f64::NAN, f64::NAN, 1.0, 2.0])),
                ("c".into(), RawColumn::Numeric(vec![0.0, 3.0, 1000.0, -5.0])),
                ("d".into(), RawColumn::Numeric(vec![4.0, 4.0, 9.0, 9.0])),
            ],
            labels: vec![0, 1, 0, 1],
        };
        let schema = table.schema(&[0, 1]).unwrap();
        let ids: Vec<&str> = schema.features().iter().map(|f| f.id.as_str()).collect();
        assert_eq!(ids, ["c000.a", "c002.c", "c003.d"]);
        let typed = table.typed(&schema, &[0, 2, 3]).unwrap();
        assert_eq!(typed.columns[0], TypedColumn::Categorical(vec![0, 2, 3]));
        let scale = |rows: &[usize]| match &table.schema(rows).unwrap().features()[1].kind {
            FeatureKind::Numeric(domain) => domain.scale,
            FeatureKind::Categorical { .. } => panic!("a number"),
        };
        // Rows 0 to 2 have b and c as second feature: order of ids decides.
        assert_eq!(scale(&[0, 1]), Scale::Linear);
        let FeatureKind::Numeric(heavy) = RawTable::kind(&table.columns[2].1, &[0, 1, 2]).unwrap() else {
            panic!("a number")
        };
        assert_eq!(heavy.scale, Scale::Log1p);
        assert!(RawTable::kind(&table.columns[1].1, &[0, 1]).is_none());
    }

    #[test]
    fn broken_folders_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Description::read(dir.path()).is_err());
        write_folder(dir.path(), 10);
        let description = Description::read(dir.path()).unwrap();
        std::fs::write(dir.path().join("train.parquet"), b"PAR1").unwrap();
        assert!(description.rows(&dir.path().join("train.parquet")).is_err());
        std::fs::write(dir.path().join("dataset.json"), "{}").unwrap();
        assert!(Description::read(dir.path()).is_err());
    }
}
