//! Columns to numbers: missing numbers become the mean, categories become the position among sorted categories.

use std::collections::{BTreeMap, BTreeSet};

use super::Numbers;
use crate::error::TfmError;

/// One column as it comes.
#[derive(Debug, Clone, PartialEq)]
pub enum Column {
    /// Numbers, missing ones as `None`.
    Numeric(Vec<Option<f64>>),
    /// Categories, missing ones as `None`.
    Category(Vec<Option<String>>),
}

impl Column {
    fn len(&self) -> usize {
        match self {
            Self::Numeric(values) => values.len(),
            Self::Category(values) => values.len(),
        }
    }
}

/// What was learnt of each column. Outputs hold the categorical columns first, then the numeric ones, each in their
/// own order.
#[derive(Debug, Clone, PartialEq)]
pub struct Imputer {
    columns: Vec<Fitted>,
}

#[derive(Debug, Clone, PartialEq)]
enum Fitted {
    /// Mean of the numbers that are there; 0 if there are none.
    Mean(f64),
    /// Codes by category.
    Codes(BTreeMap<String, usize>),
}

impl Imputer {
    /// Learns means and categories of the context rows.
    ///
    /// # Errors
    /// [`TfmError::TooLarge`] beyond [`MAX_RAW_COLUMNS`].
    pub fn fit(context: &[Column]) -> Result<Self, TfmError> {
        if context.len() > MAX_RAW_COLUMNS {
            return Err(TfmError::TooLarge { what: "columns", got: context.len(), limit: MAX_RAW_COLUMNS });
        }
        let columns = context
            .iter()
            .map(|column| match column {
                Column::Numeric(values) => {
                    let known = values.iter().flatten();
                    let count = known.clone().count();
                    Fitted::Mean(if count == 0 { 0.0 } else { known.sum::<f64>() / count as f64 })
                }
                Column::Category(values) => {
                    let distinct: BTreeSet<&String> = values.iter().flatten().collect();
                    Fitted::Codes(distinct.into_iter().cloned().zip(0..).collect())
                }
            })
            .collect();
        Ok(Self { columns })
    }

    /// Numbers of rows with the fitted columns; missing and unseen categories are -1.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for another number or kind of columns or columns of different lengths; as
    /// [`Numbers::new`].
    pub fn apply(&self, columns: &[Column]) -> Result<Numbers, TfmError> {
        if columns.len() != self.columns.len() {
            return Err(TfmError::mismatch("columns", self.columns.len(), columns.len()));
        }
        let rows = columns.first().map_or(0, Column::len);
        let (mut codes, mut numbers) = (Vec::new(), Vec::new());
        for (column, fitted) in columns.iter().zip(&self.columns) {
            if column.len() != rows {
                return Err(TfmError::mismatch("rows of a column", rows, column.len()));
            }
            match (column, fitted) {
                (Column::Numeric(values), Fitted::Mean(mean)) => {
                    numbers.push(values.iter().map(|v| v.unwrap_or(*mean)).collect::<Vec<f64>>());
                }
                (Column::Category(values), Fitted::Codes(known)) => {
                    let code = |v: &Option<String>| {
                        v.as_ref().and_then(|v| known.get(v)).map_or(-1.0, |code| *code as f64)
                    };
                    codes.push(values.iter().map(code).collect());
                }
                _ => return Err(TfmError::mismatch("kind of a column", "that of the context", "another")),
            }
        }
        codes.append(&mut numbers);
        let values = (0..rows).flat_map(|row| codes.iter().filter_map(move |c| c.get(row)).copied());
        Numbers::new(rows, codes.len(), values.collect())
    }
}

/// Most columns of a table before any is dropped.
pub const MAX_RAW_COLUMNS: usize = 16_384;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{Column, Imputer, MAX_RAW_COLUMNS};
    use crate::error::TfmError;

    #[test]
    fn missing_and_unseen_values_have_their_place() {
        let texts = |v: &[Option<&str>]| Column::Category(v.iter().map(|t| t.map(str::to_owned)).collect());
        let context = [
            Column::Numeric(vec![Some(1.0), None, Some(4.0)]),
            texts(&[Some("b"), None, Some("a")]),
            Column::Numeric(vec![None; 3]),
        ];
        let fitted = Imputer::fit(&context).unwrap();
        let numbers = fitted.apply(&context).unwrap();
        assert_eq!(numbers.values(), [1.0, 1.0, 0.0, -1.0, 2.5, 0.0, 0.0, 4.0, 0.0]);
        let other = [Column::Numeric(vec![None]), texts(&[Some("c")]), Column::Numeric(vec![Some(7.0)])];
        assert_eq!(fitted.apply(&other).unwrap().values(), [-1.0, 2.5, 7.0]);
        let swapped = [other[1].clone(), other[0].clone(), other[2].clone()];
        assert!(matches!(fitted.apply(&swapped), Err(TfmError::Mismatch { what: "kind of a column", .. })));
        assert!(matches!(fitted.apply(&other[..2]), Err(TfmError::Mismatch { what: "columns", .. })));
        let uneven = [other[0].clone(), other[1].clone(), Column::Numeric(vec![])];
        assert!(matches!(fitted.apply(&uneven), Err(TfmError::Mismatch { what: "rows of a column", .. })));
    }

    #[test]
    fn limits_hold_at_one_above() {
        let columns = |n| vec![Column::Numeric(vec![]); n];
        assert!(Imputer::fit(&columns(MAX_RAW_COLUMNS)).is_ok());
        assert!(matches!(Imputer::fit(&columns(MAX_RAW_COLUMNS + 1)), Err(TfmError::TooLarge { .. })));
    }
}
