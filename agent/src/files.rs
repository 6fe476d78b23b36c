//! Small files that must be whole or absent: written beside, fsynced, renamed, folder fsynced.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;

/// Replaces a file by these bytes, or leaves it as it is.
///
/// # Errors
/// What the system says; the old content is untouched then.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, 0o644)
}

/// As [`replace`], readable by the owner alone.
///
/// # Errors
/// As [`replace`].
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, 0o600)
}

/// Appends one JSON line.
///
/// # Errors
/// What the system or the serialiser says.
pub fn append_line<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(&line)?;
    file.sync_data()
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    // A bare file name has an empty parent, which stands for the current folder.
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let beside = path.with_extension("writing");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_as_a_whole_and_secrets_are_the_owners() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        replace(&path, b"a long first content").unwrap();
        write_secret(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_bare_file_name_is_written_to_the_current_folder() {
        let name = Path::new("files-test-bare-name.json");
        replace(name, b"here").unwrap();
        let read = std::fs::read(name).unwrap();
        std::fs::remove_file(name).unwrap();
        assert_eq!(read, b"here");
    }
}
