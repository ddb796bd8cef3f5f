//! Connections, from the socket to the caller's identity. TLS is ended here, not in tonic, so that handshakes have a bound
//! in number and time, and whoever is behind a connection is known before its first call.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{interval, timeout};
use tokio_rustls::TlsAcceptor;

use super::admission::{Admission, HANDSHAKES, Handshakes, ROUND};
use super::connection::{Connection, Failures, Incoming};
use super::principal::{Certificate, Principal};
use crate::metrics::Metrics;

/// A handshake that takes longer is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// What enrolment needs of a connection is done by then.
const ANONYMOUS_LIFETIME: Duration = Duration::from_secs(60);
/// Whoever is not accepted has heard why by then.
const REFUSED_LIFETIME: Duration = Duration::from_secs(10);

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

/// Whether a certificate is accepted now.
pub type Accepts = Arc<dyn Fn(&Principal) -> bool + Send + Sync>;

/// Accepts nodes and admins.
pub fn accept(listener: TcpListener, tls: Tls, accepts: Accepts, metrics: &Arc<Metrics>) -> Incoming {
    let (sender, receiver) = mpsc::channel(HANDSHAKES);
    let limit = Arc::new(Semaphore::new(HANDSHAKES));
    let door = Door { accepts, metrics: Arc::clone(metrics), admission: Admission::new(Arc::clone(metrics)) };
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
                door.metrics.rejected_connections.inc();
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
                        door.metrics.rejected_connections.inc();
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
            _ = rounds.tick() => door.admission.inspect(&*door.accepts),
            () = sender.closed() => return,
        }
    }
}

/// Where callers come in.
#[derive(Clone)]
struct Door {
    accepts: Accepts,
    metrics: Arc<Metrics>,
    admission: Admission,
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
        let principal = match certificate {
            None => Principal::Anonymous { address },
            Some(der) => {
                let certificate = Certificate::read(der).inspect_err(|_| {
                    self.metrics.rejected_certificates.inc();
                })?;
                Principal::Certified { address, certificate }
            }
        };
        // Who is not accepted gets in far enough to hear why.
        let accepted = (self.accepts)(&principal);
        let lifetime = match (&principal, accepted) {
            (Principal::Anonymous { .. }, _) => Some(ANONYMOUS_LIFETIME),
            (_, false) => Some(REFUSED_LIFETIME),
            (_, true) => None,
        };
        let admitted = self.admission.admit(&principal, accepted).ok_or("there are too many connections")?;
        Ok(Connection::tls(stream, principal, lifetime, admitted))
    }
}
