//! Parquet tables, one row-group page at a time.
//!
//! Text of categorical columns is read as places in its dictionary, as most files hold it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_schema::Schema;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use tabmesh_contract::contract::Contract;

use super::raw::{RawBatch, RawColumn};
use super::{BATCH_ROWS, Batches, Source, SourceError, locate};

/// A Parquet file.
pub(super) struct ParquetSource {
    path: PathBuf,
}

impl ParquetSource {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn open(&self) -> Result<(File, ArrowReaderMetadata), SourceError> {
        let read =
            |error: std::io::Error| SourceError::Read { file: self.path.clone(), message: error.to_string() };
        let file = File::open(&self.path).map_err(read)?;
        match ArrowReaderMetadata::load(&file, ArrowReaderOptions::default()) {
            Ok(metadata) => Ok((file, metadata)),
            Err(error) => {
                // The last four bytes of a whole file are its magic; with only the first four, the end is gone.
                let mut start = Vec::new();
                File::open(&self.path).and_then(|f| f.take(4).read_to_end(&mut start)).map_err(read)?;
                let (file, message) = (self.path.clone(), error.to_string());
                Err(if start == MAGIC {
                    SourceError::Truncated { file, message }
                } else {
                    SourceError::WrongFormat { file, expected: "parquet", message }
                })
            }
        }
    }

    fn columns(
        &self,
        metadata: &ArrowReaderMetadata,
        contract: &Contract,
    ) -> Result<Vec<usize>, SourceError> {
        let names: Vec<String> = metadata.schema().fields().iter().map(|f| f.name().clone()).collect();
        locate(&self.path, &names, contract)
    }
}

/// The same file with text of categorical columns as places in a dictionary; as it was where the reader can't.
fn with_levels(
    metadata: ArrowReaderMetadata,
    contract: &Contract,
    positions: &[usize],
) -> ArrowReaderMetadata {
    let mut fields: Vec<_> = metadata.schema().fields().iter().map(Arc::clone).collect();
    for (column, position) in contract.columns.iter().zip(positions) {
        if let Some(field) = fields.get_mut(*position)
            && RawColumn::wants_levels(column, field.data_type())
        {
            *field = Arc::new(field.as_ref().clone().with_data_type(RawColumn::levels_type()));
        }
    }
    let schema = Arc::new(Schema::new_with_metadata(fields, metadata.schema().metadata().clone()));
    let options = ArrowReaderOptions::new().with_schema(schema);
    ArrowReaderMetadata::try_new(Arc::clone(metadata.metadata()), options).unwrap_or(metadata)
}

impl Source for ParquetSource {
    fn location(&self) -> &Path {
        &self.path
    }

    fn schema_check(&self, contract: &Contract) -> Result<(), SourceError> {
        let (_, metadata) = self.open()?;
        let positions = self.columns(&metadata, contract)?;
        for (column, position) in contract.columns.iter().zip(positions) {
            let found = metadata.schema().field(position).data_type().clone();
            let empty = arrow_array::new_empty_array(&found);
            RawColumn::from_array(column, &empty).map_err(|expected| SourceError::WrongType {
                file: self.path.clone(),
                column: column.name.clone(),
                expected,
                found: found.to_string(),
            })?;
        }
        if metadata.metadata().file_metadata().num_rows() == 0 {
            return Err(SourceError::NoRows { file: self.path.clone() });
        }
        Ok(())
    }

    fn batches<'a>(&'a self, contract: &'a Contract) -> Result<Batches<'a>, SourceError> {
        let (file, metadata) = self.open()?;
        let positions = self.columns(&metadata, contract)?;
        let metadata = with_levels(metadata, contract, &positions);
        let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata);
        let mask = ProjectionMask::roots(builder.parquet_schema(), positions.iter().copied());
        let reader = builder.with_projection(mask).with_batch_size(BATCH_ROWS).build();
        let reader = reader.map_err(|error| SourceError::Corrupt {
            file: self.path.clone(),
            rows: 0,
            message: error.to_string(),
        })?;
        // A projection keeps the file's order: rank each declared column among the chosen positions.
        let rank = |position: &usize| positions.iter().filter(|other| *other < position).count();
        let order = positions.iter().map(rank).collect();
        Ok(Box::new(ParquetBatches { path: &self.path, contract, reader, order, rows: 0, ended: false }))
    }
}

struct ParquetBatches<'a> {
    path: &'a Path,
    contract: &'a Contract,
    reader: ParquetRecordBatchReader,
    order: Vec<usize>,
    rows: u64,
    ended: bool,
}

impl Iterator for ParquetBatches<'_> {
    type Item = Result<RawBatch, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let outcome = self.reader.next()?.map_err(|error| SourceError::Corrupt {
            file: self.path.to_owned(),
            rows: self.rows,
            message: error.to_string(),
        });
        let outcome = outcome.and_then(|batch| {
            let mut columns = Vec::with_capacity(self.order.len());
            for (column, &position) in self.contract.columns.iter().zip(&self.order) {
                let array = batch.column(position);
                let raw =
                    RawColumn::from_array(column, array).map_err(|expected| SourceError::WrongType {
                        file: self.path.to_owned(),
                        column: column.name.clone(),
                        expected,
                        found: array.data_type().to_string(),
                    })?;
                columns.push(raw);
            }
            self.rows += batch.num_rows() as u64;
            Ok(RawBatch::new(columns, batch.num_rows()))
        });
        self.ended = outcome.is_err();
        Some(outcome)
    }
}

/// First and last four bytes of a Parquet file.
const MAGIC: &[u8] = b"PAR1";
