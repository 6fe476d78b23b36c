//! The crate's one error type: every way a set of noisy tables can fail to describe a model.

use thiserror::Error;

/// Why noisy tables, a structure or a request for rows is refused.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum SynthesisError {
    /// A table has another number of values than its dimensions promise.
    #[error("marginal over {attributes:?} must hold {expected} cells, got {got}")]
    CellCount {
        /// Attributes of the table.
        attributes: Vec<usize>,
        /// Product of its dimensions.
        expected: usize,
        /// Values found.
        got: usize,
    },
    /// A table names one attribute twice, has no attribute, or as many dimensions as attributes is not true.
    #[error(
        "marginal over {attributes:?} must have distinct attributes, one dimension of at least 1 each, got {dims:?}"
    )]
    BadAxes {
        /// Attributes of the table.
        attributes: Vec<usize>,
        /// Its dimensions.
        dims: Vec<usize>,
    },
    /// A table holds NaN or an infinite count, or its variance is not a finite number of at least 0.
    #[error("marginal over {attributes:?} must hold finite counts and a finite variance of at least 0")]
    NotFinite {
        /// Attributes of the table.
        attributes: Vec<usize>,
    },
    /// Two tables, or a table and the layout, disagree on how many cells an attribute has.
    #[error(
        "attribute {attribute} has {expected} cells elsewhere, but {got} here; measure it at one resolution"
    )]
    DimensionMismatch {
        /// The attribute.
        attribute: usize,
        /// Cells known before.
        expected: usize,
        /// Cells found.
        got: usize,
    },
    /// A table or vector of more cells than the limit.
    #[error("a table of {got} cells is over the limit of {limit}; merge levels or bins")]
    TooManyCells {
        /// Cells asked for.
        got: usize,
        /// The limit.
        limit: usize,
    },
    /// No released table covers the attributes asked for.
    #[error("no released marginal covers attributes {attributes:?}; add it to the release plan")]
    MissingMarginal {
        /// Attributes needed together.
        attributes: Vec<usize>,
    },
    /// A list of no tables was given.
    #[error("at least one marginal is needed, got none")]
    NoMarginals,
    /// A parent list with a cycle, a self-loop, a label with a parent, or a parent that is not a feature.
    #[error(
        "attribute {attribute} has no valid path to a root; parents must form a forest over the features"
    )]
    BadTree {
        /// The first attribute that could not be placed.
        attribute: usize,
    },
    /// An attribute number outside the layout.
    #[error("attribute {got} is out of range; the layout has {attributes}")]
    UnknownAttribute {
        /// The attribute named.
        got: usize,
        /// Attributes of the layout.
        attributes: usize,
    },
    /// A pair score that is not a finite number.
    #[error("score of pair ({first}, {second}) must be finite, got {got}")]
    BadScore {
        /// First feature.
        first: usize,
        /// Second feature.
        second: usize,
        /// The score found.
        got: f64,
    },
    /// A grouping of cells that does not fit the table or leaves its range.
    #[error("grouping of attribute {attribute} must map {expected} cells into 0..{groups}")]
    BadGroups {
        /// The attribute.
        attribute: usize,
        /// Cells of the attribute.
        expected: usize,
        /// Groups promised.
        groups: usize,
    },
    /// More rows asked for, or more rows times columns, than the limit.
    #[error("{rows} rows asked for, the limit is {limit}")]
    TooManyRows {
        /// Rows asked for.
        rows: usize,
        /// The limit.
        limit: usize,
    },
    /// Rows, attributes and model are not of one layout.
    #[error("expected {expected} {what}, got {got}")]
    LayoutMismatch {
        /// What is counted.
        what: &'static str,
        /// Number expected.
        expected: usize,
        /// Number found.
        got: usize,
    },
}
