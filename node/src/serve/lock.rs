//! One daemon for one interface of a network namespace, and for one state directory.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, UnixCredentials, connect, getsockopt, socket, sockopt,
};

use crate::config::{self, Settings};
use host::file::{self, DiskError};

/// Held for as long as the daemon lives; the kernel releases it, whatever the daemon dies of.
#[derive(Debug)]
pub struct Lock {
    _interface: File,
    /// Where the daemons of one network namespace meet, whatever their directories. `None`: another program has the name.
    _namespace: Option<UnixListener>,
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
    #[error("failed to bind the socket `@{name}`")]
    Socket {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Directory(#[from] DiskError),
    #[error("failed to lock `{}`", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Lock {
    /// Takes the locks of the interface (a file beside the socket, and a name in the network namespace) and of the state
    /// directory that the settings name.
    pub fn take(settings: &Settings) -> Result<Self, LockError> {
        let directory = settings.socket.parent().unwrap_or(Path::new("/run/rampart"));
        let taken = |pid| LockError::Interface { interface: settings.interface.to_string(), pid };
        let interface = lock(directory, &format!("{}.lock", settings.interface))?.map_err(taken)?;
        let namespace = bind(&format!("rampart/{}", settings.interface))?.map_err(taken)?;
        let state_dir = lock(&settings.state_dir, config::LOCK)?
            .map_err(|pid| LockError::StateDir { path: settings.state_dir.clone(), pid })?;
        Ok(Self { _interface: interface, _namespace: namespace, _state_dir: state_dir })
    }
}

/// The abstract socket of this name, or the pid of the daemon that has it. Anybody may bind such a name: one whom it is not
/// for keeps no daemon from its work.
fn bind(name: &str) -> Result<Result<Option<UnixListener>, String>, LockError> {
    let failed = |source| LockError::Socket { name: name.to_owned(), source };
    let address = SocketAddr::from_abstract_name(name).map_err(failed)?;
    match UnixListener::bind_addr(&address) {
        Ok(listener) => Ok(Ok(Some(listener))),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match owner(name) {
            Ok(owner) if owner.uid() == 0 || owner.uid() == nix::unistd::geteuid().as_raw() => {
                // Zero: it is in a pid namespace that this process does not see.
                Ok(Err(if owner.pid() == 0 { "unknown".to_owned() } else { owner.pid().to_string() }))
            }
            other => {
                let uid = other.ok().map(|owner| owner.uid());
                tracing::warn!(name, ?uid, "another program than `noded` has this node's abstract socket; going on");
                Ok(Ok(None))
            }
        },
        Err(error) => Err(failed(error)),
    }
}

/// Who listens at the abstract socket of this name.
fn owner(name: &str) -> nix::Result<UnixCredentials> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    getsockopt(&socket, sockopt::PeerCredentials)
}

/// The locked file, or the pid of the one who has it.
fn lock(directory: &Path, name: &str) -> Result<Result<File, String>, LockError> {
    file::make_private_dir(directory)?;
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
