//! Answers on test rows as they were given, kept beside the figures: what a bootstrap over test entities draws from.
//!
//! One Parquet file a task, a line for each answer; it appears whole or not at all, before the task's figures do.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, UInt8Type, UInt32Type};
use arrow_array::{Array, ArrayRef, Float32Array, RecordBatch, StringArray, UInt8Array, UInt32Array};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use tabmesh_contract::batch::{TypedBatch, UnitKey};

/// What one method said about one domain's test rows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answered {
    pub(crate) set: String,
    pub(crate) seed: u64,
    pub(crate) arm: String,
    pub(crate) method: String,
    pub(crate) domain: String,
    /// A newcomer's number of own rows.
    pub(crate) rows: Option<u32>,
    /// Which draw of them.
    pub(crate) draw: u32,
    /// Entity of each test row, counted from 0 in the order of rows.
    pub(crate) entities: Arc<Vec<u32>>,
    /// 0 or 1 for each test row.
    pub(crate) labels: Arc<Vec<u8>>,
    /// Probability of class 1 for each test row.
    pub(crate) answers: Vec<f32>,
}

/// Entities of rows, counted from 0 in the order in which they appear.
pub(crate) fn entities(rows: &TypedBatch) -> Vec<u32> {
    let mut known: BTreeMap<UnitKey, u32> = BTreeMap::new();
    rows.units
        .iter()
        .map(|unit| {
            let next = u32::try_from(known.len()).unwrap_or(u32::MAX);
            *known.entry(*unit).or_insert(next)
        })
        .collect()
}

/// The bytes of a file of answers.
///
/// # Errors
/// More rows than the format counts.
pub(crate) fn to_parquet(all: &[Answered]) -> Result<Vec<u8>> {
    let properties =
        WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?)).build();
    let schema = batch(&[])?.schema();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, schema, Some(properties))?;
    for some in all.chunks(ANSWERED_PER_BATCH) {
        writer.write(&batch(some)?)?;
    }
    writer.close()?;
    Ok(bytes)
}

fn batch(all: &[Answered]) -> Result<RecordBatch> {
    let each = |of: fn(&Answered) -> &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(
            all.iter().flat_map(|a| std::iter::repeat_n(of(a), a.answers.len())),
        ))
    };
    let number = |of: &dyn Fn(&Answered) -> Option<u32>| -> ArrayRef {
        Arc::new(UInt32Array::from_iter(all.iter().flat_map(|a| std::iter::repeat_n(of(a), a.answers.len()))))
    };
    let seed = number(&|a| u32::try_from(a.seed).ok());
    let columns: Vec<(&str, ArrayRef, bool)> = vec![
        ("set", each(|a| &a.set), false),
        ("seed", seed, true),
        ("arm", each(|a| &a.arm), false),
        ("method", each(|a| &a.method), false),
        ("domain", each(|a| &a.domain), false),
        ("rows", number(&|a| a.rows), true),
        ("draw", number(&|a| Some(a.draw)), true),
        (
            "entity",
            Arc::new(UInt32Array::from_iter_values(all.iter().flat_map(|a| a.entities.iter().copied()))),
            false,
        ),
        (
            "label",
            Arc::new(UInt8Array::from_iter_values(all.iter().flat_map(|a| a.labels.iter().copied()))),
            false,
        ),
        (
            "answer",
            Arc::new(Float32Array::from_iter_values(all.iter().flat_map(|a| a.answers.iter().copied()))),
            false,
        ),
    ];
    Ok(RecordBatch::try_from_iter_with_nullable(columns)?)
}

/// Reads a file of answers.
///
/// # Errors
/// A file that can't be read or is none.
pub(crate) fn read(path: &Path) -> Result<Vec<Answered>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)?;
    let mut all: Vec<Open> = Vec::new();
    for batch in reader.with_batch_size(1 << 16).build()? {
        add(&batch?, &mut all).with_context(|| format!("reading {}", path.display()))?;
    }
    let closed = all.into_iter().map(Open::close).collect::<Result<_>>();
    closed.with_context(|| format!("reading {}", path.display()))
}

/// One method's answers while their lines are read.
struct Open {
    answered: Answered,
    entities: Vec<u32>,
    labels: Vec<u8>,
}

impl Open {
    /// Checks what figures count with: labels of two classes, and entities numbered as they appear.
    fn close(self) -> Result<Answered> {
        let mut known = 0;
        for (row, (entity, label)) in self.entities.iter().zip(&self.labels).enumerate() {
            ensure!(*label <= 1, "row {row} of {}: label {label}, expected 0 or 1", self.answered.method);
            ensure!(
                *entity <= known,
                "row {row} of {}: entity {entity}, expected at most {known}",
                self.answered.method
            );
            known += u32::from(*entity == known);
        }
        Ok(Answered { entities: Arc::new(self.entities), labels: Arc::new(self.labels), ..self.answered })
    }
}

fn add(batch: &RecordBatch, all: &mut Vec<Open>) -> Result<()> {
    let column = |name: &str| batch.column_by_name(name).with_context(|| format!("no column {name}"));
    let text = |name: &str| -> Result<&StringArray> {
        column(name)?.as_string_opt::<i32>().with_context(|| format!("column {name} is no text"))
    };
    let number = |name: &str| -> Result<&UInt32Array> {
        column(name)?.as_primitive_opt::<UInt32Type>().with_context(|| format!("column {name} is no number"))
    };
    let (set, arm, method, domain) = (text("set")?, text("arm")?, text("method")?, text("domain")?);
    let (seed, rows, draw, entity) = (number("seed")?, number("rows")?, number("draw")?, number("entity")?);
    let label = column("label")?.as_primitive_opt::<UInt8Type>().context("labels are no numbers")?;
    let answer = column("answer")?.as_primitive_opt::<Float32Type>().context("answers are no numbers")?;
    let whole: [&dyn Array; 9] = [set, arm, method, domain, seed, draw, entity, label, answer];
    ensure!(whole.iter().all(|column| column.null_count() == 0), "a value is missing");
    for i in 0..batch.num_rows() {
        let own_rows = rows.is_valid(i).then(|| rows.value(i));
        let same = |open: &Open| {
            let a = &open.answered;
            a.set == set.value(i)
                && a.seed == u64::from(seed.value(i))
                && a.arm == arm.value(i)
                && a.method == method.value(i)
                && a.domain == domain.value(i)
                && a.rows == own_rows
                && a.draw == draw.value(i)
        };
        if !all.last().is_some_and(same) {
            all.push(Open {
                answered: Answered {
                    set: set.value(i).to_owned(),
                    seed: u64::from(seed.value(i)),
                    arm: arm.value(i).to_owned(),
                    method: method.value(i).to_owned(),
                    domain: domain.value(i).to_owned(),
                    rows: own_rows,
                    draw: draw.value(i),
                    entities: Arc::default(),
                    labels: Arc::default(),
                    answers: Vec::new(),
                },
                entities: Vec::new(),
                labels: Vec::new(),
            });
        }
        if let Some(open) = all.last_mut() {
            open.entities.push(entity.value(i));
            open.labels.push(label.value(i));
            open.answered.answers.push(answer.value(i));
        }
    }
    Ok(())
}

/// Methods and domains that are written at once.
const ANSWERED_PER_BATCH: usize = 64;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn answered(method: &str, rows: Option<u32>, draw: u32) -> Answered {
        Answered {
            set: "s".into(),
            seed: 3,
            arm: "ours".into(),
            method: method.into(),
            domain: "d".into(),
            rows,
            draw,
            entities: Arc::new(vec![0, 1, 1]),
            labels: Arc::new(vec![1, 0, 1]),
            answers: vec![0.25, 0.5, 1.0],
        }
    }

    #[test]
    fn answers_come_back_as_they_were() {
        let all = [answered("a", None, 0), answered("b", Some(64), 0), answered("b", Some(64), 1)];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.parquet");
        for some in [&all[..], &[]] {
            std::fs::write(&path, to_parquet(some).unwrap()).unwrap();
            assert_eq!(read(&path).unwrap(), some);
        }
        std::fs::write(&path, b"no parquet").unwrap();
        assert!(read(&path).is_err());
        let one = &all[0];
        for (wrong, said) in [
            (Answered { labels: Arc::new(vec![1, 0, 2]), ..one.clone() }, "row 2 of a: label 2"),
            (Answered { entities: Arc::new(vec![0, 2, 1]), ..one.clone() }, "row 1 of a: entity 2"),
            (Answered { entities: Arc::new(vec![u32::MAX, 0, 1]), ..one.clone() }, "expected at most 0"),
        ] {
            std::fs::write(&path, to_parquet(&[wrong]).unwrap()).unwrap();
            let refused = format!("{:#}", read(&path).unwrap_err());
            assert!(refused.contains(said) && refused.contains("answers.parquet"), "{refused}");
        }
    }

    #[test]
    fn entities_are_counted_as_they_appear() {
        let units = [[7; 16], [3; 16], [7; 16]].to_vec();
        let rows = TypedBatch { columns: Vec::new(), labels: vec![None; 3], units };
        assert_eq!(entities(&rows), [0, 1, 0]);
    }
}
