//! One daemon for one interface, and for one state directory.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::config::Settings;
use crate::disk::{self, DiskError};

/// Held for as long as the daemon lives; the kernel releases it, whatever the daemon dies of.
#[derive(Debug)]
pub struct Lock {
    _interface: File,
    _state_dir: File,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error(
        "another `noded` (pid {pid}) runs interface `{interface}`: stop it first, or choose another with `--interface`"
    )]
    Interface { interface: String, pid: String },
    #[error("another `noded` (pid {pid}) uses `{}`: stop it first, or choose another with `--state-dir`", path.display())]
    StateDir { path: PathBuf, pid: String },
    #[error(transparent)]
    Directory(#[from] DiskError),
    #[error("failed to lock `{}`", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The lock's name in the state directory.
pub const FILE: &str = "lock";

impl Lock {
    /// Takes the locks of the interface (it lies beside the socket) and of the state directory that the settings name.
    pub fn take(settings: &Settings) -> Result<Self, LockError> {
        let directory = settings.socket.parent().unwrap_or(Path::new("/run/rampart"));
        let interface = lock(directory, &format!("{}.lock", settings.interface))?
            .map_err(|pid| LockError::Interface { interface: settings.interface.to_string(), pid })?;
        let state_dir = lock(&settings.state_dir, FILE)?
            .map_err(|pid| LockError::StateDir { path: settings.state_dir.clone(), pid })?;
        Ok(Self { _interface: interface, _state_dir: state_dir })
    }
}

/// The locked file, or the pid of the one who has it.
fn lock(directory: &Path, name: &str) -> Result<Result<File, String>, LockError> {
    disk::make_private_dir(directory)?;
    let path = directory.join(name);
    let failed = |source| LockError::Io { path: path.clone(), source };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {
            write_pid(&mut file).map_err(failed)?;
            Ok(Ok(file))
        }
        Err(TryLockError::WouldBlock) => Ok(Err(read_pid(&mut file))),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

fn read_pid(file: &mut File) -> String {
    let mut pid = String::new();
    let _ = file.take(20).read_to_string(&mut pid);
    if pid.trim().is_empty() { "unknown".to_owned() } else { pid.trim().to_owned() }
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
        let settings = |interface: &str, state_dir: &str| {
            config::load(&Flags {
                socket: Some(directory.path().join(format!("{interface}.sock"))),
                interface: Some(interface.parse().unwrap()),
                state_dir: Some(directory.path().join(state_dir)),
                ..Flags::default()
            })
            .unwrap()
        };
        let pid = format!("pid {}", std::process::id());
        let first = Lock::take(&settings("wg7", "a")).unwrap();
        let error = Lock::take(&settings("wg7", "b")).unwrap_err().to_string();
        assert!(error.contains("`wg7`") && error.contains(&pid), "{error}");
        let error = Lock::take(&settings("wg8", "a")).unwrap_err().to_string();
        assert!(error.contains("/a`") && error.contains(&pid), "{error}");
        Lock::take(&settings("wg8", "b")).unwrap();
        drop(first);
        Lock::take(&settings("wg7", "a")).unwrap();
    }
}
