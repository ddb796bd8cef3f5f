//! Reaching a controller: over TLS at the first of its endpoints that answers, or over its Unix socket.
//!
//! With TLS 1.3 a client has finished its handshake before the server has looked at its certificate. So a connection
//! counts as made only when the server's first HTTP/2 bytes, or its refusal, have arrived.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::defaults::{CONNECT_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};
use crate::endpoint::{ControllerEndpoint, EndpointError};
use crate::tls::{self, ClientIdentity, TlsError, Trust};

/// Why there is no connection. The texts name the endpoint, the reason and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no endpoint of the controller is known; name one as `HOST:PORT`")]
    NoEndpoint,
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    #[error(
        "controller cannot be reached: {attempts}; check that `controllerd serve` runs there and that TCP reaches it"
    )]
    Unreachable {
        /// Each endpoint with its reason.
        attempts: String,
    },
    #[error(
        "controller socket `{}` cannot be reached: {reason}; check that `controllerd serve` runs here, or name its socket \
         with `--socket`", .path.display()
    )]
    Socket { path: PathBuf, reason: String },
    #[error("controller socket `{}` may not be used by this user; run as root, or use `--controller` with an admin's identity", .path.display())]
    SocketDenied { path: PathBuf },
    #[error(
        "`{endpoint}` is a controller of another authority: it is not the network that this machine was invited to; \
         check the endpoint, or ask for a new invitation"
    )]
    OtherAuthority { endpoint: String },
    #[error("`{endpoint}` refused this machine's certificate: {reason}")]
    Refused { endpoint: String, reason: &'static str },
    #[error("`{endpoint}` is no controller that can be trusted: {reason}")]
    Untrusted { endpoint: String, reason: String },
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl ConnectError {
    /// Whether trying again later may help without anybody doing anything here.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Socket { .. })
    }

    /// Which of several endpoints' errors tells the most.
    fn weight(&self) -> u8 {
        match self {
            Self::Refused { .. } => 3,
            Self::OtherAuthority { .. } => 2,
            Self::Untrusted { .. } => 1,
            _ => 0,
        }
    }
}

/// A byte stream that the server has answered on.
type Stream = BufReader<tokio_rustls::client::TlsStream<TcpStream>>;

/// Connects to the first of `endpoints` that answers as a controller of `trust`. Calls on the channel reconnect, to any of
/// the endpoints, when the connection breaks.
pub async fn connect(
    endpoints: &[String],
    trust: &Trust,
    identity: Option<&ClientIdentity>,
) -> Result<Channel, ConnectError> {
    let dialer = Arc::new(Dialer::new(endpoints, trust, identity)?);
    let first = Arc::new(Mutex::new(Some(dialer.dial().await?)));
    let connector = tower::service_fn(move |_: Uri| {
        let dialer = Arc::clone(&dialer);
        let made = first.lock().ok().and_then(|mut first| first.take());
        async move {
            match made {
                Some(stream) => Ok(TokioIo::new(stream)),
                None => dialer.dial().await.map(TokioIo::new),
            }
        }
    });
    let channel = settings().connect_with_connector(connector).await;
    channel.map_err(|error| ConnectError::Unreachable { attempts: innermost(&error) })
}

/// Connects to the controller of this machine.
pub async fn connect_unix(path: impl AsRef<Path>) -> Result<Channel, ConnectError> {
    let path = path.as_ref().to_owned();
    let first = UnixStream::connect(&path).await.map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => ConnectError::SocketDenied { path: path.clone() },
        io::ErrorKind::NotFound => ConnectError::Socket { path: path.clone(), reason: "it does not exist".to_owned() },
        io::ErrorKind::ConnectionRefused => {
            ConnectError::Socket { path: path.clone(), reason: "nobody listens".to_owned() }
        }
        _ => ConnectError::Socket { path: path.clone(), reason: plain(&error) },
    })?;
    let first = Arc::new(Mutex::new(Some(first)));
    let socket = path.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        let made = first.lock().ok().and_then(|mut first| first.take());
        async move {
            match made {
                Some(stream) => Ok(TokioIo::new(stream)),
                None => UnixStream::connect(socket).await.map(TokioIo::new),
            }
        }
    });
    let channel = settings().connect_with_connector(connector).await;
    channel.map_err(|error| ConnectError::Socket { path, reason: innermost(&error) })
}

/// HTTP/2 as both kinds of connection use it. The name in the URI is only the authority that requests carry: where they
/// go and whom they meet is the connector's business.
fn settings() -> Endpoint {
    Endpoint::from_static("http://controller.rampart")
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .http2_adaptive_window(true)
}

struct Dialer {
    endpoints: Vec<ControllerEndpoint>,
    config: Arc<ClientConfig>,
}

impl Dialer {
    fn new(endpoints: &[String], trust: &Trust, identity: Option<&ClientIdentity>) -> Result<Self, ConnectError> {
        if endpoints.is_empty() {
            return Err(ConnectError::NoEndpoint);
        }
        Ok(Self {
            endpoints: endpoints.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
            config: Arc::new(tls::client_config(trust, identity)?),
        })
    }

    /// The first endpoint that answers; else the error that tells the most.
    fn dial(&self) -> Pin<Box<dyn Future<Output = Result<Stream, ConnectError>> + Send + '_>> {
        Box::pin(async move {
            let mut attempts = Vec::new();
            let mut worst: Option<ConnectError> = None;
            for endpoint in &self.endpoints {
                match self.dial_one(endpoint).await {
                    Ok(stream) => return Ok(stream),
                    Err(Failure::Silent(reason)) => attempts.push(format!("`{endpoint}` {reason}")),
                    Err(Failure::Answered(error)) => {
                        if worst.as_ref().is_none_or(|worst| worst.weight() < error.weight()) {
                            worst = Some(error);
                        }
                    }
                }
            }
            Err(worst.unwrap_or_else(|| ConnectError::Unreachable { attempts: attempts.join(", ") }))
        })
    }

    async fn dial_one(&self, endpoint: &ControllerEndpoint) -> Result<Stream, Failure> {
        let tcp = within(TcpStream::connect((endpoint.host(), endpoint.port())))
            .await?
            .map_err(|error| Failure::Silent(plain(&error)))?;
        // Small messages that somebody waits for.
        let _ = tcp.set_nodelay(true);
        let tls = within(TlsConnector::from(Arc::clone(&self.config)).connect(tls::server_name(), tcp))
            .await?
            .map_err(|error| failure(endpoint, error))?;
        let mut stream = BufReader::new(tls);
        answered(&mut stream).await.map_err(|error| failure(endpoint, error))?;
        Ok(stream)
    }
}

/// How one endpoint failed.
enum Failure {
    /// Nothing there that speaks: the reason.
    Silent(String),
    /// Something there that is not for us.
    Answered(ConnectError),
}

async fn within<F: Future>(attempt: F) -> Result<F::Output, Failure> {
    timeout(CONNECT_TIMEOUT, attempt)
        .await
        .map_err(|_| Failure::Silent(format!("did not answer within {} s", CONNECT_TIMEOUT.as_secs())))
}

/// How long a server may keep its first bytes to itself before it is believed to wait for ours.
const FIRST_BYTES: Duration = Duration::from_secs(2);

/// Waits for the server's first bytes without consuming them.
async fn answered<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut BufReader<S>) -> io::Result<()> {
    match timeout(FIRST_BYTES, stream.fill_buf()).await {
        Err(_) => Ok(()),
        Ok(Ok([])) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed the connection")),
        Ok(result) => result.map(|_| ()),
    }
}

fn failure(endpoint: &ControllerEndpoint, error: io::Error) -> Failure {
    use rustls::Error;
    let Some(tls) = error.get_ref().and_then(|error| error.downcast_ref::<Error>()) else {
        return Failure::Silent(plain(&error));
    };
    let endpoint = endpoint.to_string();
    let untrusted = |reason: String| ConnectError::Untrusted { endpoint: endpoint.clone(), reason };
    Failure::Answered(match tls {
        Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature | CertificateError::NotValidForName,
        )
        | Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. }) => {
            ConnectError::OtherAuthority { endpoint }
        }
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            untrusted("its certificate has expired; check this machine's clock, and restart `controllerd`".to_owned())
        }
        Error::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
            untrusted("its certificate is not valid yet; check this machine's clock".to_owned())
        }
        Error::InvalidCertificate(other) => untrusted(format!("its certificate is not good ({other:?})")),
        Error::AlertReceived(alert) => match refusal(*alert) {
            Some(reason) => ConnectError::Refused { endpoint, reason },
            None => untrusted(format!("it ended the TLS handshake ({alert:?}); check the endpoint")),
        },
        Error::InvalidMessage(_) => untrusted("what answers there does not speak TLS; check the endpoint".to_owned()),
        other => untrusted(format!("TLS failed ({other})")),
    })
}

/// Alerts that are about the client's certificate.
fn refusal(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::CertificateExpired => {
            "it has expired; ask for a new invitation (and check this machine's clock)"
        }
        AlertDescription::CertificateRevoked | AlertDescription::AccessDenied => {
            "it has been revoked; ask for a new invitation"
        }
        AlertDescription::CertificateRequired => "there is none; ask for an invitation",
        AlertDescription::UnknownCA
        | AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::DecryptError => "it is not of this controller's network; ask for a new invitation",
        _ => return None,
    })
}

/// An IO error as a person says it.
fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "refused the connection".to_owned(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => "closed the connection".to_owned(),
        io::ErrorKind::TimedOut => "did not answer".to_owned(),
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "has no route to it".to_owned(),
        _ => format!("failed ({error})"),
    }
}

/// The last of a chain of causes.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
