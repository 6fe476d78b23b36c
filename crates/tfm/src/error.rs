//! Everything this crate refuses.

use thiserror::Error;

/// Why the model, its files or its inputs are refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TfmError {
    /// A tensor operation failed; shapes were checked before, so this is a defect or lack of memory.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A file or its metadata can't be read or written.
    #[error("{action} {path} failed: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A model, adapter or training checkpoint has the wrong format.
    #[error("{what} is not usable: {reason}")]
    Format {
        /// Which kind of file.
        what: &'static str,
        /// What is wrong, naming expected and found.
        reason: String,
    },
    /// A tensor of a file is missing.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// The tensor's name.
        name: String,
    },
    /// A file holds a tensor that the configuration doesn't have.
    #[error("tensor {name} is not part of this model")]
    ExtraTensor {
        /// The tensor's name.
        name: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor {name} has shape {got:?}, expected {expected:?}")]
    WrongShape {
        /// The tensor's name.
        name: String,
        /// Shape by the configuration.
        expected: Vec<usize>,
        /// Shape found.
        got: Vec<usize>,
    },
    /// A tensor holds a value that is not finite.
    #[error("tensor {name} holds a value that is not finite")]
    NotFinite {
        /// The tensor's name.
        name: String,
    },
    /// Something is larger than its limit.
    #[error("{what} is {got}, the limit is {limit}")]
    TooLarge {
        /// What was measured.
        what: &'static str,
        /// Size found.
        got: usize,
        /// Largest size accepted.
        limit: usize,
    },
    /// A context would take more bytes than it may.
    #[error(
        "{what} as {cache} needs {needed} bytes, {allowed} are allowed: raise the limit, take fewer context rows, or \
         hold it as repr or f16"
    )]
    OverBudget {
        /// Which bytes: those held or those of building.
        what: &'static str,
        /// How the context was to be held.
        cache: String,
        /// Bytes needed.
        needed: usize,
        /// Bytes allowed.
        allowed: usize,
    },
    /// A configuration value is out of range.
    #[error("{field} must be {expected}, got {got}")]
    BadConfig {
        /// The configuration field.
        field: &'static str,
        /// What is accepted, in words.
        expected: &'static str,
        /// What was found.
        got: String,
    },
    /// Input rows, labels, columns or vectors don't fit together.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// Which quantity.
        what: &'static str,
        /// Expected value.
        expected: String,
        /// Found value.
        got: String,
    },
    /// Training produced a loss that is not finite.
    #[error("loss is not finite at step {step}; lower the learning rate or check the corpus")]
    Diverged {
        /// The step, counted from 0.
        step: u64,
    },
    /// Training was asked to stop before its last step; the checkpoint, if any, is on disk.
    #[error("stopped at step {step} of {total}")]
    Stopped {
        /// Steps completed.
        step: u64,
        /// Steps planned.
        total: u64,
    },
}

impl TfmError {
    /// Two things that must fit and do not.
    pub fn mismatch(
        what: &'static str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Mismatch { what, expected: expected.to_string(), got: got.to_string() }
    }

    pub(crate) fn format(what: &'static str, reason: impl std::fmt::Display) -> Self {
        Self::Format { what, reason: reason.to_string() }
    }
}
