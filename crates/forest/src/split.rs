//! One question a tree asks of a row.

use serde::{Deserialize, Serialize};
use tabmesh_contract::batch::TypedColumn;

use crate::error::ForestError;

/// One question about one column; a row whose answer is yes goes to the upper half of the leaves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Split {
    /// Whether a number is at least a threshold; a missing one isn't.
    AtLeast {
        /// Position of the column in the schema.
        column: u32,
        /// The threshold.
        threshold: f64,
    },
    /// Whether a number is missing.
    Missing {
        /// Position of the column in the schema.
        column: u32,
    },
    /// Whether a category is one of these codes.
    OneOf {
        /// Position of the column in the schema.
        column: u32,
        /// The codes, in increasing order.
        codes: Vec<u32>,
    },
}

impl Split {
    /// Position of the column in the schema.
    #[must_use]
    pub fn column(&self) -> u32 {
        match self {
            Self::AtLeast { column, .. } | Self::Missing { column } | Self::OneOf { column, .. } => *column,
        }
    }

    /// The answer for each row.
    ///
    /// # Errors
    /// [`ForestError::Rows`] if the column is missing or of another kind.
    pub(crate) fn answers(&self, columns: &[TypedColumn]) -> Result<Vec<bool>, ForestError> {
        let at = self.column();
        let Some(found) = columns.get(at as usize) else {
            return Err(ForestError::rows("columns", format!("more than {at}"), columns.len()));
        };
        match (self, found) {
            (Self::AtLeast { threshold, .. }, TypedColumn::Numeric(values)) => {
                Ok(values.iter().map(|value| value >= threshold).collect())
            }
            (Self::Missing { .. }, TypedColumn::Numeric(values)) => {
                Ok(values.iter().map(|value| value.is_nan()).collect())
            }
            (Self::OneOf { codes, .. }, TypedColumn::Categorical(found)) => {
                Ok(found.iter().map(|code| codes.binary_search(code).is_ok()).collect())
            }
            (Self::OneOf { .. }, TypedColumn::Numeric(_)) => {
                Err(ForestError::rows(format!("column {at}"), "categories", "numbers"))
            }
            (_, TypedColumn::Categorical(_)) => {
                Err(ForestError::rows(format!("column {at}"), "numbers", "categories"))
            }
        }
    }
}
