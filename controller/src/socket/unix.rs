//! Root's socket.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::sync::mpsc;

use super::connection::{Connection, Failures, Incoming};
use crate::metrics::Metrics;

/// Why the Unix socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("socket `{}` is served by another process; stop that one, or choose another with `--socket`", path.display())]
    InUse { path: PathBuf },
    #[error("`{}` exists and is no socket; remove it, or choose another with `--socket`", path.display())]
    NoSocket { path: PathBuf },
    #[error("failed to {what} socket `{}`", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Binds the socket for root: never open to others, not even for a moment.
pub fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    let io = |what| move |source| SocketError::Io { what, path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(io("make the directory of"))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NoSocket { path: path.to_owned() });
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(SocketError::InUse { path: path.to_owned() });
        }
        // Left behind by a process that was killed.
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
    Ok(listener)
}

/// Accepts root; everybody else is dropped, whatever the mode of the socket has become.
pub fn accept(listener: UnixListener, metrics: Arc<Metrics>) -> Incoming {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut failures = Failures::default();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    failures.pause(&error).await;
                    continue;
                }
            };
            if !stream.peer_cred().is_ok_and(|credentials| credentials.uid() == 0) {
                metrics.rejected_connections.inc();
                tracing::warn!("a user other than root tried the controller's socket");
                continue;
            }
            if sender.send(Ok(Connection::unix(stream))).await.is_err() {
                return;
            }
        }
    });
    Incoming::new(receiver)
}
