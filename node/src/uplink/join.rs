//! Joining a network: an invitation's secret against a certificate, and against a new one where that has expired.

use std::path::Path;
use std::time::Duration;

use controller_api::client::{self, ConnectError};
use controller_api::identity as names;
use controller_api::invitation::{Invitation, Subject};
use controller_api::refusal::Refusal;
use controller_api::time::timestamp;
use controller_api::tls::{self, Trust};
use controller_api::v1;
use controller_api::v1::enrol_client::EnrolClient;
use policy::{NetworkName, NodeName};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::config::Settings;
use crate::uplink::identity::{self, Identity, IdentityError, Keys};
use crate::uplink::state;

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Joined {
    Now(Identity),
    /// This machine is that node already and its certificate is good; the invitation could not be used, which does not
    /// matter.
    Already {
        identity: Identity,
        reason: String,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(
        "the invitation is for the admin `{name}`, not for a node: it is for `meshctl admin join`; make one for a node with `meshctl node invite`"
    )]
    ForAdmin { name: String },
    #[error(
        "the invitation to `{network}` expired at {at}: ask for a new one (`meshctl node invite {node}`), or set this \
         machine's clock if it is wrong"
    )]
    Expired { network: NetworkName, node: NodeName, at: String },
    #[error("this machine is node `{name}` of the network `{network}` already: `noded leave` first")]
    OtherNetwork { network: NetworkName, name: NodeName },
    #[error(
        "this machine is node `{has}` of this network already, and the invitation is for `{wanted}`: `noded leave` first"
    )]
    OtherNode { has: NodeName, wanted: NodeName },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the controller refused the invitation: {0}")]
    Refused(String),
    /// It says besides that whoever was let in by this invitation has no part in the network (any more).
    #[error("the controller refused the invitation: {text}")]
    NoPart { refusal: Refusal, text: String },
    #[error("the controller failed to answer ({0}): try again")]
    Failed(String),
    #[error("the controller's answer makes no sense ({0}): ask for a new invitation")]
    Answer(&'static str),
}

/// How long the controller may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

/// Redeems the invitation and stores what it gives. `now` is in seconds since the epoch. Done again with the same keys it
/// changes nothing.
pub async fn join(settings: &Settings, invitation: &Invitation, now: u64) -> Result<Joined, JoinError> {
    let Subject::Node(name) = &invitation.subject else {
        return Err(JoinError::ForAdmin { name: invitation.subject.to_string().replacen("admin:", "", 1) });
    };
    let present = present(settings, invitation, name)?;
    match redeem_and_store(settings, invitation, name, present.as_ref(), now).await {
        Ok(identity) => Ok(Joined::Now(identity)),
        Err(error) => match present {
            Some(identity) if identity.validity().is_ok_and(|(begin, end)| (begin..end).contains(&now)) => {
                Ok(Joined::Already { identity, reason: error.to_string() })
            }
            _ => Err(error),
        },
    }
}

/// The identity that this machine has; an error where it is another than the invitation's.
fn present(settings: &Settings, invitation: &Invitation, wanted: &NodeName) -> Result<Option<Identity>, JoinError> {
    let identity = match Identity::load(&settings.state_dir) {
        Ok(identity) => identity,
        Err(IdentityError::NotJoined) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if identity.fingerprint() != invitation.fingerprint {
        return Err(JoinError::OtherNetwork { network: identity.network, name: identity.name });
    }
    if identity.name != *wanted {
        return Err(JoinError::OtherNode { has: identity.name, wanted: wanted.clone() });
    }
    Ok(Some(identity))
}

async fn redeem_and_store(
    settings: &Settings,
    invitation: &Invitation,
    name: &NodeName,
    present: Option<&Identity>,
    now: u64,
) -> Result<Identity, JoinError> {
    // Whom it has let in already it goes on letting in.
    if present.is_none() && invitation.is_expired(now) {
        let at = timestamp(invitation.expires_at);
        return Err(JoinError::Expired { network: invitation.network.clone(), node: name.clone(), at });
    }
    let keys = Keys::load_or_make(&settings.state_dir)?;
    let response = redeem(invitation, &keys).await?;
    let identity = accept(invitation, response)?;
    // It must be usable before it counts.
    keys.client_identity(&identity)?;
    if present.is_some_and(|present| present.node != identity.node) {
        // The node was deleted and made anew: what it knew as another is not its own.
        state::remove(&settings.state_dir).map_err(IdentityError::from)?;
    }
    identity::keep_invitation(&settings.state_dir, invitation).map_err(IdentityError::from)?;
    identity.store(&settings.state_dir)?;
    Ok(identity)
}

/// Why this node does not get through to its controller.
#[derive(Debug, thiserror::Error)]
pub enum ReachError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{refused}; and redeeming the invitation again gave no new certificate")]
    Again {
        refused: ConnectError,
        #[source]
        error: JoinError,
    },
}

/// A connection with this node's certificate. A node that was away for longer than its certificate was good for gets a
/// new one for the same keys, by the invitation that it joined with.
pub async fn reach(state_dir: &Path, identity: &mut Identity, keys: &Keys) -> Result<Channel, ReachError> {
    let shown = keys.client_identity(identity)?;
    let refused = match client::connect(&identity.endpoints, &identity.trust(), Some(&shown)).await {
        Err(error @ ConnectError::Refused { .. }) => error,
        other => return Ok(other?),
    };
    let Some(invitation) = identity::kept_invitation(state_dir)? else { return Err(refused.into()) };
    let fresh = match redeem_again(&invitation, identity, keys).await {
        Ok(fresh) => fresh,
        Err(error) => return Err(ReachError::Again { refused, error }),
    };
    fresh.store(state_dir)?;
    tracing::info!(reason = %refused, "certificate was refused; the invitation was redeemed again and gave a new one");
    *identity = fresh;
    let shown = keys.client_identity(identity)?;
    Ok(client::connect(&identity.endpoints, &identity.trust(), Some(&shown)).await?)
}

async fn redeem_again(invitation: &Invitation, identity: &Identity, keys: &Keys) -> Result<Identity, JoinError> {
    if invitation.fingerprint != identity.fingerprint() {
        return Err(JoinError::OtherNetwork { network: identity.network.clone(), name: identity.name.clone() });
    }
    let fresh = accept(invitation, redeem(invitation, keys).await?)?;
    if fresh.node != identity.node {
        return Err(JoinError::Answer("it names another node"));
    }
    keys.client_identity(&fresh)?;
    Ok(fresh)
}

async fn redeem(invitation: &Invitation, keys: &Keys) -> Result<v1::RedeemResponse, JoinError> {
    let trust = Trust::Fingerprint(invitation.fingerprint);
    let channel = client::connect(&invitation.endpoints, &trust, None).await?;
    let mut request = tonic::Request::new(v1::RedeemRequest {
        secret: invitation.secret.as_bytes().to_vec(),
        certificate_request: keys.certificate_request()?,
        wireguard_public_key: keys.wireguard.public().as_bytes().to_vec(),
    });
    request.set_timeout(ANSWER);
    let response = EnrolClient::new(channel).redeem(request).await.map_err(refusal)?;
    Ok(response.into_inner())
}

fn refusal(status: Status) -> JoinError {
    if let Some(refusal) = Refusal::of(&status) {
        return JoinError::NoPart { refusal, text: status.message().to_owned() };
    }
    match status.code() {
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::Internal
        | Code::Unknown
        | Code::Aborted
        | Code::Cancelled => JoinError::Failed(status.message().to_owned()),
        _ => JoinError::Refused(status.message().to_owned()),
    }
}

/// The answer, checked against the invitation.
fn accept(invitation: &Invitation, response: v1::RedeemResponse) -> Result<Identity, JoinError> {
    let v1::RedeemResponse { certificate, authority, network, name, node } = response;
    if tls::fingerprint(&authority) != invitation.fingerprint {
        return Err(JoinError::Answer("its authority is not the invitation's"));
    }
    let identity = Identity {
        network: network.parse().map_err(|_| JoinError::Answer("it names no network"))?,
        node: policy::NodeId(node),
        name: name.parse().map_err(|_| JoinError::Answer("it names no node"))?,
        endpoints: invitation.endpoints.clone(),
        certificate,
        authority,
    };
    match names::Identity::of_certificate(&identity.certificate) {
        Ok((network, names::Identity::Node(node))) if network == identity.network && node == identity.node => {
            Ok(identity)
        }
        _ => Err(JoinError::Answer("its certificate is another's")),
    }
}
