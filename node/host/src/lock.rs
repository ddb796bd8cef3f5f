//! One process for one thing. The kernel releases a lock, whatever its process dies of.

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

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The remedy is the caller's to give.
    #[error("it is locked by another process (pid {pid})")]
    Held { pid: String },
    #[error("failed to lock `{}`", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("failed to bind the socket `@{name}`")]
    Socket {
        name: String,
        #[source]
        source: io::Error,
    },
}

/// A locked file, with the pid of its process in it. The file stays when the lock goes: without it two processes could lock
/// two files of one name.
#[derive(Debug)]
pub struct FileLock(#[expect(dead_code, reason = "held")] File);

impl FileLock {
    /// Locks a file (0600), and makes it where it is not there.
    pub fn take(path: &Path) -> Result<Self, LockError> {
        let failed = |source| LockError::Io { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LockError::Held { pid: read_pid(&mut file) }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        if let Err(error) = write_pid(&mut file) {
            // The pid serves the message above only: a full disk does not stop the daemon.
            tracing::warn!(path = %path.display(), %error, "the pid could not be written to the lock file");
        }
        Ok(Self(file))
    }
}

/// A name in the network namespace, where processes meet whatever their directories.
#[derive(Debug)]
pub struct NameLock(#[expect(dead_code, reason = "held")] Option<UnixListener>);

impl NameLock {
    /// Binds an abstract socket. Anybody may bind such a name: one whom it is not for keeps no daemon from its work.
    pub fn take(name: &str) -> Result<Self, LockError> {
        let failed = |source| LockError::Socket { name: name.to_owned(), source };
        let address = SocketAddr::from_abstract_name(name).map_err(failed)?;
        match UnixListener::bind_addr(&address) {
            Ok(listener) => Ok(Self(Some(listener))),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => match owner(name) {
                Ok(owner) if owner.uid() == 0 || owner.uid() == nix::unistd::geteuid().as_raw() => {
                    // Zero: it is in a pid namespace that this process does not see.
                    let pid = if owner.pid() == 0 { "unknown".to_owned() } else { owner.pid().to_string() };
                    Err(LockError::Held { pid })
                }
                other => {
                    let uid = other.ok().map(|owner| owner.uid());
                    tracing::warn!(name, ?uid, "another program has this daemon's abstract socket; going on");
                    Ok(Self(None))
                }
            },
            Err(error) => Err(failed(error)),
        }
    }
}

/// Who listens at the abstract socket of this name.
fn owner(name: &str) -> nix::Result<UnixCredentials> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    getsockopt(&socket, sockopt::PeerCredentials)
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

    fn holder<T: std::fmt::Debug>(taken: Result<T, LockError>) -> String {
        match taken {
            Err(LockError::Held { pid }) => pid,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_second_process_hears_the_pid_of_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let own = std::process::id().to_string();
        let first = FileLock::take(&path).unwrap();
        assert_eq!(holder(FileLock::take(&path)), own);
        drop(first);
        FileLock::take(&path).unwrap();

        let name = format!("rampart/test-{own}");
        let first = NameLock::take(&name).unwrap();
        assert_eq!(holder(NameLock::take(&name)), own);
        drop(first);
        NameLock::take(&name).unwrap();
    }

    #[test]
    fn a_name_that_nobody_listens_at_locks_nobody_out() {
        let name = format!("rampart/squatted-{}", std::process::id());
        let address = UnixAddr::new_abstract(name.as_bytes()).unwrap();
        let squatter = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None).unwrap();
        nix::sys::socket::bind(squatter.as_raw_fd(), &address).unwrap();
        NameLock::take(&name).unwrap();
    }
}
