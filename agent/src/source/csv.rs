//! Delimited text with a header line, one batch of lines at a time.
//!
//! Every field is read as text first and parsed as its declared type here, so that a cell which doesn't parse is
//! counted as unreadable instead of ending the stream. An empty field is null. UTF-8 only.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_csv::reader::{BufReader as CsvReader, Format, ReaderBuilder};
use arrow_schema::{ArrowError, DataType, Field, Schema};
use tabmesh_contract::contract::Contract;

use super::raw::{RawBatch, RawColumn};
use super::{BATCH_ROWS, Batches, Source, SourceError, locate};

/// A CSV file.
pub(super) struct CsvSource {
    path: PathBuf,
    delimiter: u8,
}

impl CsvSource {
    pub(super) fn new(path: PathBuf, delimiter: u8) -> Self {
        Self { path, delimiter }
    }

    fn file(&self) -> Result<File, SourceError> {
        File::open(&self.path)
            .map_err(|error| SourceError::Read { file: self.path.clone(), message: error.to_string() })
    }

    /// The names in the header line.
    fn header(&self) -> Result<Vec<String>, SourceError> {
        let format = Format::default().with_header(true).with_delimiter(self.delimiter);
        let (schema, _) = format.infer_schema(BufReader::new(self.file()?), Some(0)).map_err(|error| {
            SourceError::WrongFormat { file: self.path.clone(), expected: "csv", message: error.to_string() }
        })?;
        let mut names: Vec<String> = schema.fields().iter().map(|f| f.name().clone()).collect();
        if let Some(first) = names.first_mut() {
            *first = first.trim_start_matches('\u{feff}').to_owned();
        }
        Ok(names)
    }

    fn stream<'a>(&'a self, contract: &'a Contract) -> Result<CsvBatches<'a>, SourceError> {
        let names = self.header()?;
        let positions = locate(&self.path, &names, contract)?;
        let fields: Vec<Field> = names.iter().map(|name| Field::new(name, DataType::Utf8, true)).collect();
        let reader = ReaderBuilder::new(Arc::new(Schema::new(fields)))
            .with_header(true)
            .with_delimiter(self.delimiter)
            .with_projection(positions)
            .with_batch_size(BATCH_ROWS)
            .build_buffered(BufReader::new(self.file()?))
            .map_err(|error| corrupt(&self.path, 0, &error))?;
        Ok(CsvBatches { path: &self.path, contract, reader, rows: 0, ended: false })
    }
}

impl Source for CsvSource {
    fn location(&self) -> &Path {
        &self.path
    }

    /// A column has the wrong type if a value among the first [`BATCH_ROWS`] doesn't parse.
    fn schema_check(&self, contract: &Contract) -> Result<(), SourceError> {
        let Some(first) = self.stream(contract)?.next() else {
            return Err(SourceError::NoRows { file: self.path.clone() });
        };
        for (column, raw) in contract.columns.iter().zip(first?.columns()) {
            if let Some(row) = raw.first_unreadable() {
                return Err(SourceError::WrongType {
                    file: self.path.clone(),
                    column: column.name.clone(),
                    expected: format!("{} in every row", column.logical_type.as_str()),
                    found: format!("other text in row {}", row + 1),
                });
            }
        }
        Ok(())
    }

    fn batches<'a>(&'a self, contract: &'a Contract) -> Result<Batches<'a>, SourceError> {
        Ok(Box::new(self.stream(contract)?))
    }
}

struct CsvBatches<'a> {
    path: &'a Path,
    contract: &'a Contract,
    reader: CsvReader<BufReader<File>>,
    rows: u64,
    ended: bool,
}

impl Iterator for CsvBatches<'_> {
    type Item = Result<RawBatch, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        match self.reader.next()? {
            Err(error) => {
                self.ended = true;
                Some(Err(corrupt(self.path, self.rows, &error)))
            }
            Ok(batch) => {
                let columns = self.contract.columns.iter().zip(batch.columns());
                let columns =
                    columns.map(|(column, array)| RawColumn::from_text(column, array.as_string())).collect();
                self.rows += batch.num_rows() as u64;
                Some(Ok(RawBatch::new(columns, batch.num_rows())))
            }
        }
    }
}

/// A reader's error. Every field is read as text, so its messages hold line and field numbers, never a cell.
fn corrupt(path: &Path, rows: u64, error: &ArrowError) -> SourceError {
    SourceError::Corrupt { file: path.to_owned(), rows, message: error.to_string() }
}
