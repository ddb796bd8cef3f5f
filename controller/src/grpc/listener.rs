//! Connections, from the socket to the caller's identity. TLS is ended here, not in tonic, so that handshakes have a bound
//! in number and time, and whoever is behind a connection is known before its first call.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{self, Poll};
use std::time::Duration;

use controller_api::identity::{self, Identity};
use policy::NetworkName;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, Sleep, interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::Context;
use super::gate::identify;
use super::place::{Close, HANDSHAKES, Handshakes, Place, Places, ROUND};
use crate::authority::key_of_certificate;
use crate::metrics::Metrics;
use crate::record::KeyHash;

/// A handshake that takes longer is dropped, and so is a connection that says nothing after it.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// What enrolment needs of a connection is done by then.
const ANONYMOUS_LIFETIME: Duration = Duration::from_secs(60);
/// Whoever is not accepted has heard why by then.
const REFUSED_LIFETIME: Duration = Duration::from_secs(10);
/// Bytes of HTTP/2's preface, which a client sends first.
const PREFACE: usize = 24;
/// How long to wait when the process has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Without a failure for this long, the next one is another episode.
const EPISODE: Duration = Duration::from_secs(60);

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
    deadline: Option<Pin<Box<Sleep>>>,
    /// The deadline from when the caller has shown that it speaks HTTP/2.
    lifetime: Option<Duration>,
    close: Option<Close>,
    read: usize,
    /// Held for as long as the connection lives.
    _place: Option<Place>,
}

impl Connection {
    /// Whether the time of this connection is over. Asked before whatever it does: one that only writes ends too.
    fn poll_over(&mut self, context: &mut task::Context<'_>) -> Poll<io::Error> {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(io::ErrorKind::TimedOut.into());
        }
        if let Some(close) = &mut self.close
            && (close.is_terminated() || Pin::new(close).poll(context).is_ready())
        {
            return Poll::Ready(io::ErrorKind::ConnectionAborted.into());
        }
        Poll::Pending
    }
}

#[derive(Debug)]
enum Stream {
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
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
        context: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Poll::Ready(over) = this.poll_over(context) {
            return Poll::Ready(Err(over));
        }
        let before = buffer.filled().len();
        let result = match &mut this.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        if this.read < PREFACE && result.is_ready() {
            this.read += buffer.filled().len() - before;
            if this.read >= PREFACE {
                this.deadline = this.lifetime.map(|lifetime| Box::pin(sleep(lifetime)));
            }
        }
        result
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut task::Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        if let Poll::Ready(over) = self.poll_over(context) {
            return Poll::Ready(Err(over));
        }
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_write(context, buffer),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(over) = self.poll_over(context) {
            return Poll::Ready(Err(over));
        }
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// Connections as they become known, until the receiver is dropped.
pub type Incoming = tokio_stream::wrappers::ReceiverStream<io::Result<Connection>>;

/// Accepts nodes and admins.
pub fn accept_tls(listener: TcpListener, tls: Tls, context: &Context) -> Incoming {
    let (sender, receiver) = mpsc::channel(HANDSHAKES);
    let limit = Arc::new(Semaphore::new(HANDSHAKES));
    let door = Door { context: context.clone(), places: Places::new(Arc::clone(&context.metrics)) };
    tokio::spawn(inspect(door.clone(), sender.clone()));
    tokio::spawn(async move {
        let (handshakes, mut failures) = (Handshakes::default(), Failures::default());
        while let Ok(turn) = Arc::clone(&limit).acquire_owned().await {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    failures.pause(&error).await;
                    continue;
                }
            };
            let Some(handshake) = handshakes.begin(address.ip()) else {
                door.context.metrics.rejected_connections.inc();
                tracing::debug!(%address, "a connection was dropped: there are too many handshakes of its address");
                continue;
            };
            let (sender, acceptor, door) = (sender.clone(), tls.acceptor(), door.clone());
            tokio::spawn(async move {
                let connection = door.handshake(acceptor, stream, address).await;
                drop((turn, handshake));
                match connection {
                    Ok(connection) => drop(sender.send(Ok(connection)).await),
                    Err(reason) => {
                        door.context.metrics.rejected_connections.inc();
                        tracing::debug!(%address, reason, "a connection was dropped");
                    }
                }
            });
        }
    });
    Incoming::new(receiver)
}

/// Sends those away that are not accepted any more, until nobody takes connections.
async fn inspect(door: Door, sender: mpsc::Sender<io::Result<Connection>>) {
    let mut rounds = interval(ROUND);
    loop {
        tokio::select! {
            _ = rounds.tick() => {
                let (state, now) = (door.context.current.get(), door.context.now());
                door.places.inspect(|peer| identify(peer, &state, now).is_ok());
            }
            () = sender.closed() => return,
        }
    }
}

/// Failures to accept: one line for each episode, which is usually that there are no more file descriptors.
#[derive(Default)]
struct Failures {
    last: Option<Instant>,
}

impl Failures {
    async fn pause(&mut self, error: &io::Error) {
        let now = Instant::now();
        if self.last.replace(now).is_none_or(|last| now - last >= EPISODE) {
            tracing::warn!(%error, "connections cannot be accepted for now");
        }
        sleep(ACCEPT_PAUSE).await;
    }
}

/// Where callers come in.
#[derive(Clone)]
struct Door {
    context: Context,
    places: Places,
}

impl Door {
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
        let peer = match certificate {
            None => Peer::Anonymous { address },
            Some(der) => {
                let certificate = read_certificate(der).inspect_err(|_| {
                    self.context.metrics.rejected_certificates.inc();
                })?;
                Peer::Certified { address, certificate }
            }
        };
        // Who is not accepted gets in far enough to hear why.
        let accepted = identify(&peer, &self.context.current.get(), self.context.now()).is_ok();
        let lifetime = match (&peer, accepted) {
            (Peer::Anonymous { .. }, _) => Some(ANONYMOUS_LIFETIME),
            (_, false) => Some(REFUSED_LIFETIME),
            (_, true) => None,
        };
        let (place, close) = self.places.take(&peer, accepted).ok_or("there are too many connections")?;
        Ok(Connection {
            stream: Stream::Tls(Box::new(stream)),
            peer,
            deadline: Some(Box::pin(sleep(HANDSHAKE_TIMEOUT))),
            lifetime,
            close,
            read: 0,
            _place: Some(place),
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
            let (stream, peer) = (Stream::Unix(stream), Peer::Root);
            let connection =
                Connection { stream, peer, deadline: None, lifetime: None, close: None, read: 0, _place: None };
            if sender.send(Ok(connection)).await.is_err() {
                return;
            }
        }
    });
    Incoming::new(receiver)
}
