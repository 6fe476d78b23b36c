//! Training tables that aren't what they should be: adversaries, shifted labels, domains that stand there twice.
//!
//! Tables are written anew, so flows, rivals and rounds of small models read the same ones in the same way. Test tables
//! stay as they are.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use arrow_array::cast::AsArray;
use arrow_array::types::Int8Type;
use arrow_array::{ArrayRef, Int8Array, RecordBatch, UInt32Array};
use arrow_select::concat::concat_batches;
use arrow_select::take::take_record_batch;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;

use super::document::{Tampering, TamperingKind};
use crate::utility::member::Member;

/// Replaces training tables of some domains; gives the names of those that an adversary made.
///
/// # Errors
/// A table can't be read or written, or there are fewer domains than kinds of tampering.
pub(crate) fn tamper(
    members: &mut [Member],
    kinds: &[Tampering],
    folder: &Path,
    seed: u64,
) -> Result<BTreeSet<String>> {
    let mut rng = ChaCha20Rng::seed_from_u64(seed ^ TAMPERING);
    let mut order: Vec<usize> = (0..members.len()).collect();
    order.shuffle(&mut rng);
    let mut hostile = BTreeSet::new();
    for Tampering { share, kind } in kinds {
        let number = ((members.len() as f64 * share).round() as usize).max(1);
        ensure!(number < order.len(), "{} domains are too few for so much tampering", members.len());
        let chosen: Vec<usize> = order.drain(..number).collect();
        for at in chosen {
            // Whose rows a copy takes is nobody whose turn is over or still to come.
            let other = order.last().and_then(|other| members.get(*other)).map(|other| other.train.clone());
            let Some(member) = members.get_mut(at) else { continue };
            let train = match kind {
                TamperingKind::Duplicated => other.context("no domain is left to be copied")?,
                _ => {
                    let path = folder.join(format!("{at:05}.parquet"));
                    let table = tampered(&read(&member.train)?, *kind, &mut rng)
                        .with_context(|| format!("rows of {}", member.domain))?;
                    let mut writer = ArrowWriter::try_new(File::create(&path)?, table.schema(), None)?;
                    writer.write(&table)?;
                    writer.close()?;
                    path
                }
            };
            *member = member.clone().with_train(train)?;
            if kind.hostile() {
                hostile.insert(member.domain.clone());
            }
        }
    }
    Ok(hostile)
}

fn read(table: &Path) -> Result<RecordBatch> {
    let file = File::open(table).with_context(|| format!("opening {}", table.display()))?;
    let batches = ParquetRecordBatchReaderBuilder::try_new(file)?.build()?.collect::<Result<Vec<_>, _>>()?;
    let schema = batches.first().context("no rows")?.schema();
    Ok(concat_batches(&schema, &batches)?)
}

fn tampered(table: &RecordBatch, kind: TamperingKind, rng: &mut ChaCha20Rng) -> Result<RecordBatch> {
    let (at, _) =
        table.schema().column_with_name("label").map(|(at, f)| (at, f.clone())).context("no labels")?;
    let labels = table.column(at).as_primitive_opt::<Int8Type>().context("labels are not 8-bit numbers")?;
    let labels: Vec<Option<i8>> = labels.iter().collect();
    let with = |labels: Vec<Option<i8>>| -> Result<RecordBatch> {
        let mut columns = table.columns().to_vec();
        let labels: ArrayRef = Arc::new(Int8Array::from(labels));
        if let Some(column) = columns.get_mut(at) {
            *column = labels;
        }
        Ok(RecordBatch::try_new(table.schema(), columns)?)
    };
    match kind {
        TamperingKind::FlippedLabels => {
            let flipped = labels.into_iter().map(|label| match label {
                None => Ok(None),
                Some(label @ 0..=1) => Ok(Some(1 - label)),
                Some(label) => bail!("label {label}, expected 0 or 1"),
            });
            with(flipped.collect::<Result<_>>()?)
        }
        TamperingKind::ShuffledLabels => {
            let mut labels = labels;
            labels.shuffle(rng);
            with(labels)
        }
        TamperingKind::LabelShift { rate } => {
            let of = |class: i8| -> Vec<u32> {
                (0_u32..)
                    .zip(&labels)
                    .filter(|(_, label)| **label == Some(class))
                    .map(|(row, _)| row)
                    .collect()
            };
            let (mut zeros, mut ones) = (of(0), of(1));
            let now = ones.len() as f64 / (zeros.len() + ones.len()).max(1) as f64;
            let (fewer, kept) = if now > rate {
                let kept = zeros.len() as f64 * rate / (1.0 - rate);
                (&mut ones, kept)
            } else {
                let kept = ones.len() as f64 * (1.0 - rate) / rate;
                (&mut zeros, kept)
            };
            fewer.shuffle(rng);
            fewer.truncate(kept.round() as usize);
            let mut rows: Vec<u32> = zeros.into_iter().chain(ones).collect();
            rows.sort_unstable();
            ensure!(!rows.is_empty(), "no row is left at a label rate of {rate}");
            Ok(take_record_batch(table, &UInt32Array::from(rows))?)
        }
        TamperingKind::Duplicated => Ok(table.clone()),
    }
}

/// Sets the stream of tampering apart from that of the experiment.
const TAMPERING: u64 = 0x7461_6d70_6572_6564;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use arrow_array::Int64Array;

    use super::*;

    fn table() -> RecordBatch {
        let labels: Vec<i8> = (0..100).map(|i| i8::from(i % 5 == 0)).collect();
        RecordBatch::try_from_iter([
            ("x", Arc::new(Int64Array::from_iter_values(0..100)) as ArrayRef),
            ("label", Arc::new(Int8Array::from(labels))),
        ])
        .unwrap()
    }

    fn ones(table: &RecordBatch) -> usize {
        let labels = table.column(1).as_primitive::<Int8Type>();
        labels.iter().filter(|label| *label == Some(1)).count()
    }

    #[test]
    fn labels_are_flipped_shuffled_and_shifted() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let mut of = |kind| tampered(&table(), kind, &mut rng).unwrap();
        let flipped = of(TamperingKind::FlippedLabels);
        assert_eq!((flipped.num_rows(), ones(&flipped)), (100, 80));
        assert_eq!(flipped.column(0), table().column(0));
        let shuffled = of(TamperingKind::ShuffledLabels);
        assert_eq!(ones(&shuffled), 20);
        assert_ne!(shuffled.column(1), table().column(1));
        // 20 ones stay, 20 zeros beside them; then 80 zeros stay, and 9 ones beside them.
        for (rate, rows, positive) in [(0.5, 40, 20), (0.1, 89, 9)] {
            let shifted = of(TamperingKind::LabelShift { rate });
            assert_eq!((shifted.num_rows(), ones(&shifted)), (rows, positive));
        }
    }

    #[test]
    fn a_copy_reads_the_table_of_an_honest_domain() {
        let folder = tempfile::tempdir().unwrap();
        let mut members: Vec<Member> = (0..4)
            .map(|i| {
                let train = folder.path().join(format!("own{i}.parquet"));
                let mut writer =
                    ArrowWriter::try_new(File::create(&train).unwrap(), table().schema(), None).unwrap();
                writer.write(&table()).unwrap();
                writer.close().unwrap();
                Member {
                    domain: format!("d{i}"),
                    product: format!("d{i}.t"),
                    contract: format!("source: {{type: parquet, path: {:?}}}\n", train.display().to_string()),
                    train: train.clone(),
                    test: train,
                }
            })
            .collect();
        let before: Vec<_> = members.iter().map(|member| member.train.clone()).collect();
        let kinds = [
            Tampering { share: 0.25, kind: TamperingKind::FlippedLabels },
            Tampering { share: 0.25, kind: TamperingKind::Duplicated },
        ];
        let hostile = tamper(&mut members, &kinds, folder.path(), 3).unwrap();
        assert_eq!(hostile.len(), 1);
        let changed: Vec<&Member> =
            members.iter().zip(&before).filter(|(m, b)| m.train != **b).map(|(m, _)| m).collect();
        assert_eq!(changed.len(), 2);
        for member in changed {
            assert!(member.contract.contains(&member.train.display().to_string()));
            // The adversary's table is new, the copy's is another domain's that stayed as it was.
            assert_eq!(hostile.contains(&member.domain), !before.contains(&member.train));
        }
        let all = [Tampering { share: 0.5, kind: TamperingKind::ShuffledLabels }; 2];
        assert!(tamper(&mut members, &all, folder.path(), 3).is_err());
    }
}
