//! Unix sockets for the machine's root.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use crate::file::{self, FileError};

/// Why a Unix socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("socket `{}` is served by another process; stop that one, or choose another with `--socket`", path.display())]
    InUse { path: PathBuf },
    #[error("`{}` exists and is not a socket; remove it, or choose another with `--socket`", path.display())]
    NoSocket { path: PathBuf },
    #[error(transparent)]
    Directory(#[from] FileError),
    #[error("failed to {what} socket `{}`", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A listener whose file goes with it.
#[derive(Debug)]
pub struct PrivateSocket {
    pub listener: UnixListener,
    pub file: SocketFile,
}

/// Removes a socket's file when it is dropped.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Binds a socket for its owner (0600): never open to others, not even for a moment. One that a killed process left is
/// replaced.
pub fn bind_private(path: &Path) -> Result<PrivateSocket, SocketError> {
    let io = |what| move |source| SocketError::Io { what, path: path.to_owned(), source };
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        file::make_private_dir(directory)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NoSocket { path: path.to_owned() });
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(SocketError::InUse { path: path.to_owned() });
        }
        Ok(_) => std::fs::remove_file(path).map_err(io("remove the stale"))?,
        Err(_) => {}
    }
    // Made under another name, so that nobody can connect before the mode is set.
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(name);
    let _ = std::fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary).map_err(io("bind"))?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600)).map_err(io("set the mode of"))?;
    std::fs::rename(&temporary, path).map_err(io("name"))?;
    Ok(PrivateSocket { listener, file: SocketFile(path.to_owned()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_private_replaces_a_stale_one_and_goes_with_its_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run").join("noded.sock");
        let socket = bind_private(&path).unwrap();
        let mode = |path: &Path| std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert!(matches!(bind_private(&path), Err(SocketError::InUse { .. })));
        let PrivateSocket { listener, file } = socket;
        drop(listener);
        assert!(path.exists(), "as after a kill");
        std::mem::forget(file);
        drop(bind_private(&path).unwrap());
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_left_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("noded.sock");
        std::fs::write(&path, "data").unwrap();
        let error = bind_private(&path).unwrap_err().to_string();
        assert!(error.contains("noded.sock` exists and is not a socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}
