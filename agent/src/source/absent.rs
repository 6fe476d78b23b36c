//! Stands for a kind of source that this build doesn't have: says so whenever it is asked.

use std::path::{Path, PathBuf};

use tabmesh_contract::contract::Contract;

use super::{Batches, Source, SourceError};

/// A table that can't be read here.
pub(super) struct AbsentSource {
    path: PathBuf,
    kind: &'static str,
}

impl AbsentSource {
    pub(super) fn new(path: PathBuf, kind: &'static str) -> Self {
        Self { path, kind }
    }

    fn error(&self) -> SourceError {
        SourceError::Absent { file: self.path.clone(), kind: self.kind }
    }
}

impl Source for AbsentSource {
    fn location(&self) -> &Path {
        &self.path
    }

    fn schema_check(&self, _: &Contract) -> Result<(), SourceError> {
        Err(self.error())
    }

    fn batches<'a>(&'a self, _: &'a Contract) -> Result<Batches<'a>, SourceError> {
        Err(self.error())
    }
}
