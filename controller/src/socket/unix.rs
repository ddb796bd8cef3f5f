//! Root's socket.

use std::sync::Arc;

pub use host::socket::{PrivateSocket, SocketFile, bind_private as bind};
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use super::connection::{Connection, Failures, Incoming};
use crate::metrics::Metrics;

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
