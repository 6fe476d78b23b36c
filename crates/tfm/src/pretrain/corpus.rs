//! Rows to continue pre-training on: post-processing of a private release, or public rows; never private rows.

use rand::Rng;
use rand_chacha::ChaCha20Rng;

use crate::{
    error::TfmError,
    features::text_vectors,
    model::{Tables, config::ModelConfig},
    table::EncodedTable,
};

/// Encoded rows of a released corpus: post-processing of a private release, never private rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Corpus {
    /// Columns of each row, in canonical order.
    pub columns: usize,
    /// Values `(rows, columns)`, standardised.
    pub values: Vec<f32>,
    /// Class of each row.
    pub labels: Vec<u8>,
    /// Hashed feature texts `(columns, feature_text_dim)`, if the model reads them.
    pub texts: Option<Vec<f32>>,
}

impl Corpus {
    /// A corpus from encoded rows, with their feature texts if the model reads them.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if the table doesn't fit or a row has no label.
    pub fn from_table(table: &EncodedTable, config: &ModelConfig) -> Result<Self, TfmError> {
        table.check()?;
        let dim = config.feature_text_dim;
        Ok(Self {
            columns: table.columns,
            values: table.values.clone(),
            labels: table.known_labels()?,
            texts: (dim > 0).then(|| text_vectors(&table.column_texts, dim)),
        })
    }

    pub(super) fn check(&self, config: &ModelConfig) -> Result<(), TfmError> {
        let rows = self.labels.len();
        if rows < MIN_CORPUS_ROWS {
            return Err(TfmError::mismatch("corpus rows", format!("at least {MIN_CORPUS_ROWS}"), rows));
        }
        let tables = Tables {
            tables: 1,
            rows,
            columns: self.columns,
            context: 1,
            values: self.values.clone(),
            labels: self.labels.clone(),
            texts: self.texts.clone(),
        };
        tables.check(config)?;
        if self.labels.iter().all(|l| Some(l) == self.labels.first()) {
            return Err(TfmError::mismatch("classes in the corpus", "at least 2", 1));
        }
        Ok(())
    }

    /// Tables of random corpus rows with a fixed column order; a random relabelling per table keeps the model
    /// from tying a class index to a meaning.
    pub(super) fn draw(
        &self,
        tables: usize,
        queries: usize,
        classes: usize,
        rng: &mut ChaCha20Rng,
    ) -> Tables {
        let rows = self.labels.len();
        let queries = queries.min(rows / 4);
        let most = (rows / 2).min(MAX_CORPUS_CONTEXT);
        let context = (rng.random_range(32f64.ln()..=(most as f64).ln()).exp().round() as usize).min(most);
        let total = context + queries;
        let mut drawn = Tables {
            tables,
            rows: total,
            columns: self.columns,
            context,
            values: Vec::with_capacity(tables * total * self.columns),
            labels: Vec::with_capacity(tables * total),
            texts: self.texts.as_ref().map(|t| t.repeat(tables)),
        };
        let used = usize::from(self.labels.iter().copied().max().unwrap_or(1)) + 1;
        for _ in 0..tables {
            let shift = rng.random_range(0..used.min(classes));
            for i in rand::seq::index::sample(rng, rows, total) {
                drawn.values.extend_from_slice(&self.values[i * self.columns..(i + 1) * self.columns]);
                // Unwrap safety: labels were checked against max_classes <= 64.
                let label = (usize::from(self.labels[i]) + shift) % used;
                drawn.labels.push(u8::try_from(label).expect("class index below 64"));
            }
        }
        drawn
    }
}

/// Fewest rows of a corpus.
pub const MIN_CORPUS_ROWS: usize = 128;
/// Most context rows of a table drawn from a corpus.
pub const MAX_CORPUS_CONTEXT: usize = 512;
