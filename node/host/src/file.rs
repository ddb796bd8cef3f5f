//! Private files, written whole or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What could not be done to which file.
#[derive(Debug, thiserror::Error)]
#[error("failed to {what} `{}`{}", path.display(), remedy(source))]
pub struct FileError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl FileError {
    /// For [`Result::map_err`]; `what` is a verb.
    pub fn new(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { what, path, source }
    }

    /// Whether there was simply nothing to read.
    pub fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => ": run as root",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ": free some space and try again",
        io::ErrorKind::ReadOnlyFilesystem => ": choose a writable directory with `--state-dir`",
        _ => "",
    }
}

/// Makes a directory that only its owner may enter. One that is there is left as it is: the files in it are private anyway.
pub fn make_private_dir(path: &Path) -> Result<(), FileError> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(FileError::new("create", path))
}

/// Replaces a file (0600): a temporary one beside it, fsync, rename, fsync of the directory. A reader sees the old or the
/// new content; so does the machine after a crash.
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let temporary = temporary(path);
    let written = write_and_sync(&temporary, content)
        .map_err(FileError::new("write", path))
        .and_then(|()| replace(path, &temporary));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Puts a file that is on disk in the place of another in the same directory: rename, fsync of the directory.
pub fn replace(path: &Path, by: &Path) -> Result<(), FileError> {
    fs::rename(by, path).map_err(FileError::new("replace", path)).and_then(|()| sync_parent(path))
}

/// The whole file, if it is no longer than `limit` bytes.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let length = fs::metadata(path).map_err(FileError::new("read", path))?.len();
    if length > limit {
        let source =
            io::Error::new(io::ErrorKind::FileTooLarge, format!("{length} bytes, at most {limit} are expected"));
        return Err(FileError::new("read", path)(source));
    }
    fs::read(path).map_err(FileError::new("read", path))
}

/// Removes a file for good; one that is not there is removed already.
pub fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(FileError::new("remove", path)(error)),
        Ok(()) => sync_parent(path),
    }
}

/// Renames a file out of the way to the first free `<path>.<word>-<n>`, and says to where.
pub fn set_aside(path: &Path, word: &str) -> Result<PathBuf, FileError> {
    let mut number = 1u32;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{word}-{number}"));
        let aside = PathBuf::from(name);
        if !aside.exists() {
            fs::rename(path, &aside).map_err(FileError::new("set aside", path))?;
            sync_parent(path)?;
            return Ok(aside);
        }
        number += 1;
    }
}

/// Removes every file that [`set_aside`] made of this one.
pub fn remove_aside(path: &Path) -> Result<(), FileError> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(());
    };
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    for entry in entries.flatten() {
        let aside = entry.file_name().to_str().is_some_and(|other| {
            let number =
                other.strip_prefix(name).and_then(|rest| rest.strip_prefix('.')).and_then(|rest| rest.rsplit_once('-'));
            number.is_some_and(|(_, number)| number.parse::<u32>().is_ok())
        });
        if aside {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

fn write_and_sync(path: &Path, content: &[u8]) -> io::Result<()> {
    // A leftover of a crash may have other permissions.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn sync_parent(path: &Path) -> Result<(), FileError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|directory| directory.sync_all()).map_err(FileError::new("sync", parent))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_written_file_is_private_whole_and_leaves_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        fs::write(directory.path().join("state.new"), "left by a crash").unwrap();
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(read(&path, 10).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn errors_name_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("none").join("state");
        assert!(write_private(&path, b"x").unwrap_err().to_string().contains("none/state`"));
        let missing = read(&path, 10).unwrap_err();
        assert!(missing.is_missing());
        let long = directory.path().join("long");
        fs::write(&long, "0123456789").unwrap();
        assert!(read(&long, 9).unwrap_err().source.to_string().contains("at most 9"));
    }

    #[test]
    fn files_set_aside_never_replace_each_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        for number in 1..=2 {
            fs::write(&path, "bad").unwrap();
            let aside = set_aside(&path, "corrupt").unwrap();
            assert_eq!(aside, directory.path().join(format!("state.corrupt-{number}")));
        }
        remove(&path).unwrap();
    }
}
