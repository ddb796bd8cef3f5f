//! One daemon for one interface of a network namespace, and for one state directory.

use std::path::{Path, PathBuf};

use host::file::{self, FileError};
use host::lock::{FileLock, LockError as HostError, NameLock};

use crate::config::{self, Settings};

/// Held for as long as the daemon lives; the kernel releases it, whatever the daemon dies of.
#[derive(Debug)]
pub struct Lock {
    _interface: FileLock,
    /// Where the daemons of one network namespace meet, whatever their directories.
    _namespace: NameLock,
    _state_dir: FileLock,
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
    Directory(#[from] FileError),
    #[error(transparent)]
    Host(HostError),
}

impl Lock {
    /// Takes the locks of the interface (a file beside the socket, and a name in the network namespace) and of the state
    /// directory that the settings name.
    pub fn take(settings: &Settings) -> Result<Self, LockError> {
        let directory = settings.socket.parent().unwrap_or(Path::new("/run/rampart"));
        let interface = |pid| LockError::Interface { interface: settings.interface.to_string(), pid };
        let state_dir = |pid| LockError::StateDir { path: settings.state_dir.clone(), pid };
        file::make_private_dir(directory)?;
        let name = format!("{}.lock", settings.interface);
        let _interface = FileLock::take(&directory.join(name)).map_err(held(interface))?;
        let _namespace = NameLock::take(&format!("rampart/{}", settings.interface)).map_err(held(interface))?;
        file::make_private_dir(&settings.state_dir)?;
        let _state_dir = FileLock::take(&settings.state_dir.join(config::LOCK)).map_err(held(state_dir))?;
        Ok(Self { _interface, _namespace, _state_dir })
    }
}

/// What is locked, for the one who is refused.
fn held(what: impl Fn(String) -> LockError) -> impl Fn(HostError) -> LockError {
    move |error| match error {
        HostError::Held { pid } => what(pid),
        other => LockError::Host(other),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};

    use super::*;
    use crate::config::Flags;

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

    /// Two directories do not make two interfaces.
    #[test]
    fn another_directory_does_not_hide_the_daemon_of_an_interface() {
        let settings = |directory: &Path| {
            config::load(&Flags {
                socket: Some(directory.join("noded.sock")),
                interface: Some("wg9".parse().unwrap()),
                state_dir: Some(directory.join("state")),
                ..Flags::default()
            })
            .unwrap()
        };
        let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let first = Lock::take(&settings(directories[0].path())).unwrap();
        let error = Lock::take(&settings(directories[1].path())).unwrap_err().to_string();
        assert!(error.contains("`wg9`") && error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        // Somebody has the name who is no daemon: nobody listens there.
        let address = UnixAddr::new_abstract(b"rampart/wg9").unwrap();
        let squatter = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        nix::sys::socket::bind(squatter.as_raw_fd(), &address).unwrap();
        Lock::take(&settings(directories[1].path())).unwrap();
    }
}
