//! Rows in the contract's terms: one typed column per feature in canonical order, labels and privacy units.
//!
//! Table sources parse engine values into a [`TypedBatch`] once; release counts, the model's input path and
//! serving read nothing else. A batch holds private rows and has no wire form.

use crate::schema::{FeatureKind, FeatureSchema};

/// One column of a batch.
#[derive(Debug, Clone, PartialEq)]
pub enum TypedColumn {
    /// Numbers; `NaN` is a missing value. Not yet clamped to the declared range.
    Numeric(Vec<f64>),
    /// Level codes: `0..L` declared levels, `L` = any other value ("other"), `L + 1` = missing.
    Categorical(Vec<u32>),
}

impl TypedColumn {
    /// An empty column of the kind.
    #[must_use]
    pub fn empty(kind: &FeatureKind) -> Self {
        match kind {
            FeatureKind::Numeric(_) => Self::Numeric(Vec::new()),
            FeatureKind::Categorical { .. } => Self::Categorical(Vec::new()),
        }
    }

    /// A column of `rows` missing values: a feature this domain doesn't have.
    #[must_use]
    pub fn missing(kind: &FeatureKind, rows: usize) -> Self {
        match kind {
            FeatureKind::Numeric(_) => Self::Numeric(vec![f64::NAN; rows]),
            FeatureKind::Categorical { levels } => Self::Categorical(vec![missing_code(levels.len()); rows]),
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Numeric(values) => values.len(),
            Self::Categorical(codes) => codes.len(),
        }
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Code of a value that isn't among `levels` declared levels.
#[must_use]
pub fn other_code(levels: usize) -> u32 {
    u32::try_from(levels).unwrap_or(u32::MAX - 1)
}

/// Code of a missing value of a feature with `levels` declared levels.
#[must_use]
pub fn missing_code(levels: usize) -> u32 {
    other_code(levels) + 1
}

/// Identity of a row's privacy unit within its domain (a keyed hash, never the raw id).
pub type UnitKey = [u8; 16];

/// Rows of one domain, columns in the canonical order of a [`FeatureSchema`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TypedBatch {
    /// One column per feature of the schema, in its order, all of equal length.
    pub columns: Vec<TypedColumn>,
    /// Class index of each row; `None` where the label is missing or not a declared class.
    pub labels: Vec<Option<u16>>,
    /// Privacy unit of each row.
    pub units: Vec<UnitKey>,
}

impl TypedBatch {
    /// A batch of no rows for a schema.
    #[must_use]
    pub fn empty(schema: &FeatureSchema) -> Self {
        Self {
            columns: schema.features().iter().map(|f| TypedColumn::empty(&f.kind)).collect(),
            labels: Vec::new(),
            units: Vec::new(),
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.labels.len()
    }

    /// Appends the rows of another batch of the same schema.
    pub fn append(&mut self, other: &Self) {
        for (mine, theirs) in self.columns.iter_mut().zip(&other.columns) {
            match (mine, theirs) {
                (TypedColumn::Numeric(a), TypedColumn::Numeric(b)) => a.extend_from_slice(b),
                (TypedColumn::Categorical(a), TypedColumn::Categorical(b)) => a.extend_from_slice(b),
                // Both batches come from one schema, so kinds agree position by position.
                _ => debug_assert!(false, "batches of different schemas"),
            }
        }
        self.labels.extend_from_slice(&other.labels);
        self.units.extend_from_slice(&other.units);
    }

    /// The rows at `indices`, in that order; indices out of range are skipped.
    #[must_use]
    pub fn take(&self, indices: &[usize]) -> Self {
        fn pick<T: Copy>(values: &[T], indices: &[usize]) -> Vec<T> {
            indices.iter().filter_map(|&i| values.get(i).copied()).collect()
        }
        Self {
            columns: self
                .columns
                .iter()
                .map(|column| match column {
                    TypedColumn::Numeric(values) => TypedColumn::Numeric(pick(values, indices)),
                    TypedColumn::Categorical(codes) => TypedColumn::Categorical(pick(codes, indices)),
                })
                .collect(),
            labels: pick(&self.labels, indices),
            units: pick(&self.units, indices),
        }
    }
}
