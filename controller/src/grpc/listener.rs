//! Connections, from the socket to the caller's identity. TLS is ended here, not in tonic, so that handshakes have a bound
//! in number and time, and whoever is behind a connection is known before its first call.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use controller_api::identity::{self, Identity};
use policy::NetworkName;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::authority::key_of_certificate;
use crate::metrics::Metrics;
use crate::record::KeyHash;

/// Handshakes at one time; connections beyond wait in the kernel's queue.
const HANDSHAKES: usize = 1_024;
/// A handshake that takes longer is dropped, and so is a connection that says nothing after it.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections of certified callers at one time: nodes and a few admins. Below the usual limit of open files.
const CONNECTIONS: usize = 16_384;
/// Connections without a certificate at one time, which can only enrol.
const ANONYMOUS: usize = 512;
/// What enrolment needs of a connection is done by then.
const ANONYMOUS_LIFETIME: Duration = Duration::from_secs(60);
/// Bytes of HTTP/2's preface, which a client sends first.
const PREFACE: usize = 24;
/// How long to wait when the process has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is behind a connection, by what the connection itself shows. Whether they may still call is for
/// [`super::gate`] to say, at each call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Root, on the Unix socket.
    Root,
    /// Over TLS, without a certificate.
    Anonymous {
        address: SocketAddr,
    },
    Certified {
        address: SocketAddr,
        certificate: PeerCertificate,
    },
}

/// What a certificate of the network's authority says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    pub network: NetworkName,
    pub identity: Identity,
    pub key: KeyHash,
    /// Seconds since the epoch.
    pub expires_at: u64,
}

impl Peer {
    /// `None` on the Unix socket.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Root => None,
            Self::Anonymous { address } | Self::Certified { address, .. } => Some(address.ip().to_canonical()),
        }
    }
}

/// The TLS configuration that new connections get; replaced when the controller's certificate is renewed.
#[derive(Clone, Debug)]
pub struct Tls(Arc<RwLock<Arc<ServerConfig>>>);

impl Tls {
    pub fn new(config: ServerConfig) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(config))))
    }

    pub fn replace(&self, config: ServerConfig) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    fn acceptor(&self) -> TlsAcceptor {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)).into()
    }
}

/// A connection whose other end is known.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: Peer,
    /// Given up when the caller has shown that it speaks HTTP/2, or for good.
    deadline: Option<Pin<Box<Sleep>>>,
    read: usize,
    /// Held for as long as the connection lives.
    _place: Option<Place>,
}

#[derive(Debug)]
enum Stream {
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

/// A place among the bounded number of connections.
#[derive(Debug)]
struct Place {
    _permit: OwnedSemaphorePermit,
    metrics: Arc<Metrics>,
}

impl Place {
    fn new(permit: OwnedSemaphorePermit, metrics: &Arc<Metrics>) -> Self {
        metrics.connections.inc();
        Self { _permit: permit, metrics: Arc::clone(metrics) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buffer.filled().len();
        let result = match &mut this.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        if this.read < PREFACE && result.is_ready() {
            this.read += buffer.filled().len() - before;
            if this.read >= PREFACE {
                this.deadline = match this.peer {
                    Peer::Anonymous { .. } => Some(Box::pin(sleep(ANONYMOUS_LIFETIME))),
                    Peer::Root | Peer::Certified { .. } => None,
                };
            }
        }
        result
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_write(context, buffer),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Connections as they become known, until the receiver is dropped.
pub type Incoming = tokio_stream::wrappers::ReceiverStream<io::Result<Connection>>;

/// Accepts nodes and admins.
pub fn accept_tls(listener: TcpListener, tls: Tls, metrics: Arc<Metrics>) -> Incoming {
    let (sender, receiver) = mpsc::channel(HANDSHAKES);
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let limits = Limits {
        certified: Arc::new(Semaphore::new(CONNECTIONS)),
        anonymous: Arc::new(Semaphore::new(ANONYMOUS)),
        metrics,
    };
    tokio::spawn(async move {
        while let Ok(handshake) = Arc::clone(&handshakes).acquire_owned().await {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (sender, acceptor, limits) = (sender.clone(), tls.acceptor(), limits.clone());
            tokio::spawn(async move {
                let connection = limits.handshake(acceptor, stream, address).await;
                drop(handshake);
                match connection {
                    Ok(connection) => drop(sender.send(Ok(connection)).await),
                    Err(reason) => {
                        limits.metrics.rejected_connections.inc();
                        tracing::debug!(%address, reason, "a connection was dropped");
                    }
                }
            });
        }
    });
    Incoming::new(receiver)
}

#[derive(Clone)]
struct Limits {
    certified: Arc<Semaphore>,
    anonymous: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl Limits {
    async fn handshake(
        &self,
        acceptor: TlsAcceptor,
        stream: TcpStream,
        address: SocketAddr,
    ) -> Result<Connection, String> {
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let handshake = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await;
        let stream = handshake.map_err(|_| "TLS handshake took too long")?.map_err(|error| error.to_string())?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let (peer, places) = match certificate {
            None => (Peer::Anonymous { address }, &self.anonymous),
            Some(der) => {
                let certificate = read_certificate(der).inspect_err(|_| {
                    self.metrics.rejected_certificates.inc();
                })?;
                (Peer::Certified { address, certificate }, &self.certified)
            }
        };
        let place = Arc::clone(places).try_acquire_owned().map_err(|_| "there are too many connections")?;
        Ok(Connection {
            stream: Stream::Tls(Box::new(stream)),
            peer,
            deadline: Some(Box::pin(tokio::time::sleep_until(Instant::now() + HANDSHAKE_TIMEOUT))),
            read: 0,
            _place: Some(Place::new(place, &self.metrics)),
        })
    }
}

fn read_certificate(der: &[u8]) -> Result<PeerCertificate, String> {
    let (network, identity) = Identity::of_certificate(der).map_err(|error| error.to_string())?;
    let (_, expires_at) = identity::validity(der).map_err(|error| error.to_string())?;
    let key = key_of_certificate(der).ok_or("certificate has no key that can be read")?;
    Ok(PeerCertificate { network, identity, key, expires_at })
}

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
pub fn bind_unix(path: &Path) -> Result<UnixListener, SocketError> {
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
pub fn accept_unix(listener: UnixListener, metrics: Arc<Metrics>) -> Incoming {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if !stream.peer_cred().is_ok_and(|credentials| credentials.uid() == 0) {
                metrics.rejected_connections.inc();
                tracing::warn!("a user other than root tried the controller's socket");
                continue;
            }
            let connection =
                Connection { stream: Stream::Unix(stream), peer: Peer::Root, deadline: None, read: 0, _place: None };
            if sender.send(Ok(connection)).await.is_err() {
                return;
            }
        }
    });
    Incoming::new(receiver)
}
