//! What can go wrong in the coordinator, and which code of the closed list a peer gets to see.

use miette::Diagnostic;
use tabmesh_federation::descriptor::DescriptorError;
use tabmesh_federation::job::JobError;
use tabmesh_federation::plan::{AdapterSpec, PlanError};
use tabmesh_federation::release_plan::{ReleasePlanError, SharedError};
use tabmesh_federation::selection::SelectionError;
use tabmesh_proto::convert::ConvertError;
use tabmesh_proto::status::WireError;
use tabmesh_store::StoreError;
use tabmesh_store::checkpoint::CheckpointError;
use tabmesh_synthesis::SynthesisError;
use tabmesh_tfm::error::TfmError;
use thiserror::Error;

/// A failure inside the coordinator.
#[derive(Debug, Error, Diagnostic)]
#[non_exhaustive]
pub enum CoordinatorError {
    /// Records, blobs or logs.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A stored document doesn't parse; the store was changed from outside or by another version.
    #[error("stored {what} does not parse: {reason}")]
    Stored {
        /// What was read.
        what: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// The configured file of measured attacks isn't one.
    #[error("attacks {path}: {reason}; tabmesh-sim audit --record writes such a file")]
    Attacks {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A configured declaration of disjoint sources doesn't count.
    #[error("disjoint {path}: {reason}; tabmesh-agent disjoint writes and signs such a file")]
    Disjoint {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The plan is refused.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The job can't take this step.
    #[error(transparent)]
    Job(#[from] JobError),
    /// No cohort can be formed.
    #[error(transparent)]
    Selection(#[from] SelectionError),
    /// Contracts of the cohort don't agree.
    #[error(transparent)]
    Shared(#[from] SharedError),
    /// A release stage has no query.
    #[error(transparent)]
    Release(#[from] ReleasePlanError),
    /// A round has no descriptor.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// The corpus can't be drawn.
    #[error(transparent)]
    Synthesis(#[from] SynthesisError),
    /// The model refuses.
    #[error(transparent)]
    Model(#[from] TfmError),
    /// A message can't be built.
    #[error(transparent)]
    Message(#[from] ConvertError),
    /// Policy refused the plan.
    #[error("policy refuses the {what}: {rules}")]
    Policy {
        /// What was asked.
        what: &'static str,
        /// Names of the rules.
        rules: String,
    },
    /// A forest can't be grown or read.
    #[error(transparent)]
    Forest(#[from] tabmesh_forest::ForestError),
    /// The plan's adapter has no place on the base.
    #[error("rounds.adapter: {adapter} does not fit the base model: {reason}")]
    Adapter {
        /// What the plan trains.
        adapter: AdapterSpec,
        /// What is wrong, naming expected and found.
        reason: String,
    },
    /// Another plan is running.
    #[error("plan {running} is running; cancel it or wait for its end")]
    Running {
        /// Its id.
        running: String,
    },
    /// The thing named isn't there.
    #[error("there is no {what} {id}")]
    NotFound {
        /// Kind of thing.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// A file the configuration names can't be used.
    #[error("{what} {path}: {reason}")]
    File {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Network or TLS set-up.
    #[error("{what}: {reason}")]
    Transport {
        /// What was being done.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A checkpoint of the audit log, or a cosignature on it.
    #[error("audit log: {0}")]
    Checkpoint(CheckpointError),
    /// A secure sum can't be described over its roster.
    #[error("secure sum: {0}")]
    Sum(String),
    /// A step of the pipeline can't go on.
    #[error("{0}")]
    Step(String),
}

impl CoordinatorError {
    /// A stored document that doesn't parse.
    pub(crate) fn stored(what: &'static str) -> impl FnOnce(serde_json::Error) -> Self {
        move |error| Self::Stored { what, reason: error.to_string() }
    }

    /// The code a peer sees; the log has the cause.
    #[must_use]
    pub fn wire(&self) -> WireError {
        match self {
            Self::Plan(_) | Self::Policy { .. } | Self::Adapter { .. } | Self::Message(_) => {
                WireError::Malformed
            }
            Self::NotFound { .. } => WireError::NotFound,
            Self::Checkpoint(_) => WireError::Signature,
            Self::Running { .. } => WireError::Conflict,
            _ => WireError::Internal,
        }
    }
}
