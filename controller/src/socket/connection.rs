//! A connection whose other end is known, for as long as it may last.

use std::io;
use std::pin::Pin;
use std::task::{self, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Sleep, sleep};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::admission::{Admitted, Close};
use super::principal::Principal;

/// A connection that says nothing for so long after its handshake is dropped.
const SILENCE: Duration = Duration::from_secs(5);
/// Bytes of HTTP/2's preface, which a client sends first.
const PREFACE: usize = 24;
/// How long to wait when the process has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Without a failure for this long, the next one is another episode.
const EPISODE: Duration = Duration::from_secs(60);

/// Connections as they become known, until the receiver is dropped.
pub type Incoming = tokio_stream::wrappers::ReceiverStream<io::Result<Connection>>;

/// A connection whose other end is known.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    principal: Principal,
    deadline: Option<Pin<Box<Sleep>>>,
    /// The deadline from when the caller has shown that it speaks HTTP/2.
    lifetime: Option<Duration>,
    close: Option<Close>,
    read: usize,
    /// Held for as long as the connection lives.
    _admitted: Option<Admitted>,
}

impl Connection {
    /// `lifetime`: from when the caller has shown that it speaks HTTP/2; `None`: as long as it likes.
    pub(super) fn tls(
        stream: TlsStream<TcpStream>,
        principal: Principal,
        lifetime: Option<Duration>,
        (admitted, close): (Admitted, Option<Close>),
    ) -> Self {
        Self {
            stream: Stream::Tls(Box::new(stream)),
            principal,
            deadline: Some(Box::pin(sleep(SILENCE))),
            lifetime,
            close,
            read: 0,
            _admitted: Some(admitted),
        }
    }

    /// Root's.
    pub(super) fn unix(stream: UnixStream) -> Self {
        let (stream, principal) = (Stream::Unix(stream), Principal::Root);
        Self { stream, principal, deadline: None, lifetime: None, close: None, read: 0, _admitted: None }
    }

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
    type ConnectInfo = Principal;

    fn connect_info(&self) -> Principal {
        self.principal.clone()
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

/// Failures to accept, with one log line for each episode. The usual cause is a lack of file descriptors.
#[derive(Default)]
pub(super) struct Failures {
    last: Option<Instant>,
}

impl Failures {
    pub(super) async fn pause(&mut self, error: &io::Error) {
        let now = Instant::now();
        if self.last.replace(now).is_none_or(|last| now - last >= EPISODE) {
            tracing::warn!(%error, "connections cannot be accepted for now");
        }
        sleep(ACCEPT_PAUSE).await;
    }
}
