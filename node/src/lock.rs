//! One daemon for one interface.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::config::Settings;
use crate::disk::{self, DiskError};

/// Held for as long as the daemon lives; the kernel releases it, whatever the daemon dies of.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another `noded` (pid {pid}) runs interface `{interface}`: stop it first, or choose another with `--interface`")]
    Held { interface: String, pid: String },
    #[error(transparent)]
    Directory(#[from] DiskError),
    #[error("failed to lock `{}`", path.display())]
    Io { path: PathBuf, #[source] source: io::Error },
}

impl Lock {
    /// Takes the lock of the interface that the settings name; it lies beside the socket.
    pub fn take(settings: &Settings) -> Result<Self, LockError> {
        let directory = settings.socket.parent().unwrap_or(Path::new("/run/rampart"));
        disk::make_private_dir(directory)?;
        let path = directory.join(format!("{}.lock", settings.interface));
        let mut file = open(&path).map_err(|source| LockError::Io { path: path.clone(), source })?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(&mut file, settings)),
            Err(TryLockError::Error(source)) => return Err(LockError::Io { path, source }),
        }
        write_pid(&mut file).map_err(|source| LockError::Io { path, source })?;
        Ok(Self { _file: file })
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn held(file: &mut File, settings: &Settings) -> LockError {
    let mut pid = String::new();
    let _ = file.take(20).read_to_string(&mut pid);
    let pid = pid.trim();
    let pid = if pid.is_empty() { "unknown".to_owned() } else { pid.to_owned() };
    LockError::Held { interface: settings.interface.to_string(), pid }
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Flags};

    #[test]
    fn a_second_daemon_is_refused_by_name_and_pid() {
        let directory = tempfile::tempdir().unwrap();
        let flags = Flags { socket: Some(directory.path().join("wg7.sock")), ..Flags::default() };
        let flags = Flags { interface: Some("wg7".parse().unwrap()), config: None, ..flags };
        let settings = config::load(&flags).unwrap();
        let first = Lock::take(&settings).unwrap();
        let error = Lock::take(&settings).unwrap_err().to_string();
        assert!(error.contains("`wg7`") && error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        Lock::take(&settings).unwrap();
    }
}
