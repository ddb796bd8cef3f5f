//! Who calls, by the certificate that the connection shows and the newest state.

use controller_api::identity::Identity;
use controller_api::refusal::Refusal;
use policy::NodeId;
use tonic::Status;

use crate::change::audit::Actor;
use crate::socket::principal::{Certificate, Principal};
use crate::state::State;

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
    pub certificate: Certificate,
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

/// Whom a connection speaks for, at this state and time. Only a node whose certificate is good in every other respect is
/// told that it has no part in the network ([`Refusal`]).
pub fn identify(principal: &Principal, state: &State, now: u64) -> Result<Caller, Status> {
    let (address, certificate) = match principal {
        Principal::Root => return Ok(Caller::Root),
        Principal::Anonymous { .. } => {
            return Err(Status::unauthenticated(
                "there is no certificate; join with an invitation first (`noded join` or `meshctl admin join`)",
            ));
        }
        Principal::Certified { address, certificate } => (address, certificate),
    };
    let Certificate { network, identity, key, expires_at } = certificate;
    let denied = |text: String| Err(Status::permission_denied(text));
    let known_key = || match state.accounts.accepts(identity, key) {
        true => Ok(()),
        false => {
            Err(Status::permission_denied("certificate was replaced by one of other keys; ask for a new invitation"))
        }
    };
    if network != state.network().name() {
        return denied(format!("certificate is for network `{network}`, and this is `{}`", state.network().name()));
    }
    if now >= *expires_at {
        return denied("certificate has expired; connect again with a new one, or ask for an invitation".to_owned());
    }
    let caller = match identity {
        Identity::Node(id) => {
            let Some(node) = state.network().nodes().get(id) else {
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
            if state.accounts.admins().get(name).is_none_or(|admin| admin.revoked) {
                return denied(format!("admin `{name}` was revoked; ask for a new invitation"));
            }
            known_key()?;
            Caller::Admin { name: name.clone() }
        }
        Identity::Controller => return denied("controller's own certificate is for no caller".to_owned()),
    };
    Ok(caller)
}
