//! Who may call what. Each service has a gate, which looks at the caller's certificate and at the network's newest state
//! at every call: a certificate that was signed yesterday says nothing about today.

use std::sync::Arc;
use std::time::Instant;

use controller_api::identity::Identity;
use controller_api::refusal::Refusal;
use policy::NodeId;
use tonic::{Request, Status};

use super::listener::{Peer, PeerCertificate};
use super::throttle::Throttle;
use crate::audit::Actor;
use crate::metrics::Metrics;
use crate::state::{Current, State};

/// A caller who may call, in the extensions of its request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    Root,
    Admin { name: String },
    Node(NodeCaller),
}

/// A node that is active now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeCaller {
    pub id: NodeId,
    pub name: policy::NodeName,
    pub certificate: PeerCertificate,
    pub address: std::net::IpAddr,
}

impl Caller {
    pub fn actor(&self) -> Actor {
        match self {
            Self::Root => Actor::Root,
            Self::Admin { name } => Actor::Admin(name.clone()),
            Self::Node(node) => Actor::Node(node.name.clone()),
        }
    }
}

/// Whom a service answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Nodes,
    Admins,
    /// Nodes and admins: health and reflection.
    Known,
}

/// Lets callers through a [`Door`].
#[derive(Clone, Debug)]
pub struct Gate {
    pub door: Door,
    pub current: Current,
    pub metrics: Arc<Metrics>,
    pub clock: fn() -> u64,
    pub refusals: Arc<Throttle>,
}

impl tonic::service::Interceptor for Gate {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let peer = request.extensions().get::<Peer>();
        let peer = peer.ok_or_else(|| Status::internal("connection shows no caller; report this as a bug"))?;
        let caller = identify(peer, &self.current.get(), (self.clock)()).inspect_err(|status| {
            self.metrics.rejected_certificates.inc();
            self.log(peer, status.message());
        })?;
        self.check(&caller)?;
        request.extensions_mut().insert(caller);
        Ok(request)
    }
}

impl Gate {
    fn log(&self, peer: &Peer, reason: &str) {
        match peer {
            // Anybody can do that, and it says nothing of the network.
            Peer::Anonymous { address } => tracing::debug!(%address, reason, "a call was refused"),
            Peer::Root | Peer::Certified { .. } => {
                if let Some(suppressed) = self.refusals.pass(Instant::now()) {
                    tracing::info!(?peer, reason, suppressed, "a call was refused");
                }
            }
        }
    }

    fn check(&self, caller: &Caller) -> Result<(), Status> {
        match (self.door, caller) {
            (Door::Known, _) | (Door::Nodes, Caller::Node(_)) | (Door::Admins, Caller::Root | Caller::Admin { .. }) => {
                Ok(())
            }
            (Door::Nodes, Caller::Root) => {
                Err(Status::permission_denied("root is no node; nodes call over TLS with their own certificate"))
            }
            (Door::Nodes, Caller::Admin { name }) => Err(Status::permission_denied(format!(
                "admin `{name}` is no node; nodes call with their own certificate"
            ))),
            (Door::Admins, Caller::Node(node)) => Err(Status::permission_denied(format!(
                "node `{}` is no admin; use an admin's identity (`meshctl admin invite NAME`), or root's socket on the \
                 controller's machine",
                node.name
            ))),
        }
    }
}

/// Whom a connection speaks for, at this state and time. Only a node whose certificate is good in every other respect is
/// told that it has no part in the network ([`Refusal`]).
pub fn identify(peer: &Peer, state: &State, now: u64) -> Result<Caller, Status> {
    let (address, certificate) = match peer {
        Peer::Root => return Ok(Caller::Root),
        Peer::Anonymous { .. } => {
            return Err(Status::unauthenticated(
                "there is no certificate; join with an invitation first (`noded join` or `meshctl admin join`)",
            ));
        }
        Peer::Certified { address, certificate } => (address, certificate),
    };
    let PeerCertificate { network, identity, key, expires_at } = certificate;
    let denied = |text: String| Err(Status::permission_denied(text));
    let known_key = || match state.records.accepts(identity, key) {
        true => Ok(()),
        false => {
            Err(Status::permission_denied("certificate was replaced by one of other keys; ask for a new invitation"))
        }
    };
    if network != state.network.name() {
        return denied(format!("certificate is for network `{network}`, and this is `{}`", state.network.name()));
    }
    if now >= *expires_at {
        return denied("certificate has expired; connect again with a new one, or ask for an invitation".to_owned());
    }
    let caller = match identity {
        Identity::Node(id) => {
            let Some(node) = state.network.nodes().get(id) else {
                let text = format!("node with id `{id}` was deleted; ask for a new invitation");
                return Err(Refusal::Deleted.mark(Status::permission_denied(text)));
            };
            // Whose keys were replaced hears nothing of the node that has its place.
            known_key()?;
            if !state.is_active(*id, now) {
                let text = format!(
                    "node `{}` is {}; an admin can enable it (`meshctl node enable {}`)",
                    node.name, node.state, node.name
                );
                return Err(Refusal::NotActive.mark(Status::permission_denied(text)));
            }
            let address = address.ip().to_canonical();
            Caller::Node(NodeCaller { id: *id, name: node.name.clone(), certificate: certificate.clone(), address })
        }
        Identity::Admin(name) => {
            if state.records.admins.get(name).is_none_or(|admin| admin.revoked) {
                return denied(format!("admin `{name}` was revoked; ask for a new invitation"));
            }
            known_key()?;
            Caller::Admin { name: name.clone() }
        }
        Identity::Controller => return denied("controller's own certificate is for no caller".to_owned()),
    };
    Ok(caller)
}
