//! Why a forest can't be grown, read or asked.

use tabmesh_privacy::clip::ClipError;
use thiserror::Error;

/// Why a forest can't be grown, read or asked.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ForestError {
    /// A figure is out of range.
    #[error("{what} of a forest: expected {expected}, got {got}")]
    Shape {
        /// The figure.
        what: &'static str,
        /// What is allowed, in words.
        expected: String,
        /// What was found.
        got: String,
    },
    /// There is no column with a cell.
    #[error("there is no column to split")]
    NothingToSplit,
    /// Rows don't fit the columns that the forest was grown on.
    #[error("rows do not fit the forest: {what}, expected {expected}, got {got}")]
    Rows {
        /// The part that doesn't fit.
        what: String,
        /// What fits.
        expected: String,
        /// What was found.
        got: String,
    },
    /// Clip norm and scale are out of range.
    #[error(transparent)]
    Clip(#[from] ClipError),
}

impl ForestError {
    pub(crate) fn shape(what: &'static str, expected: impl ToString, got: impl ToString) -> Self {
        Self::Shape { what, expected: expected.to_string(), got: got.to_string() }
    }

    pub(crate) fn rows(what: impl Into<String>, expected: impl ToString, got: impl ToString) -> Self {
        Self::Rows { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }
}
