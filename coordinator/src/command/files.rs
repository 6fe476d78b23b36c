//! Files that commands read and write; errors name the file.

use std::path::Path;

use miette::{IntoDiagnostic, WrapErr};

/// Reads a whole file.
pub(super) fn read(path: &Path) -> miette::Result<Vec<u8>> {
    std::fs::read(path).into_diagnostic().wrap_err_with(|| path.display().to_string())
}

/// Writes a file so that a reader sees all of it or what was there before.
pub(super) fn write(path: &Path, bytes: &[u8]) -> miette::Result<()> {
    let beside = path.with_extension("writing");
    std::fs::write(&beside, bytes)
        .and_then(|()| std::fs::rename(&beside, path))
        .into_diagnostic()
        .wrap_err_with(|| path.display().to_string())
}
