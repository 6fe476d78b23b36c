//! A source that answers marginals as a test says, for tests of engines: rows are those of another source.

use std::path::Path;

use tabmesh_contract::contract::Contract;

use super::{Batches, MarginalError, MarginalRequest, Source, SourceError};

/// A source with another's rows and its own counts.
pub(super) struct Answering<'s, F> {
    pub(super) inner: &'s dyn Source,
    pub(super) answer: F,
}

impl<F> Source for Answering<'_, F>
where
    F: Fn(&MarginalRequest<'_>) -> Result<Vec<i64>, MarginalError> + Send + Sync,
{
    fn location(&self) -> &Path {
        self.inner.location()
    }

    fn schema_check(&self, contract: &Contract) -> Result<(), SourceError> {
        self.inner.schema_check(contract)
    }

    fn batches<'a>(&'a self, contract: &'a Contract) -> Result<Batches<'a>, SourceError> {
        self.inner.batches(contract)
    }

    fn marginals(&self, request: &MarginalRequest<'_>) -> Result<Vec<i64>, MarginalError> {
        (self.answer)(request)
    }
}
