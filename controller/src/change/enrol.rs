//! Letting nodes and admins in: what an invitation does to the state. Pure; the secret, the clock and the certificate are
//! the callers'.

use controller_api::identity::Identity;
use controller_api::invitation::{INVITATION_MAX, Subject};
use policy::{Change, ChangeError, Network, NodeName, NodeState};

use crate::store::account::{Accounts, Admin, Credential, Invitation, Invitee, KeyHash, Keys, SecretHash};

/// Why nobody was invited.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    #[error("there is no node `{name}`{hint}; add it first (`meshctl node invite {name} --cidr CIDR`)")]
    UnknownNode { name: NodeName, hint: String },
    #[error("node `{name}` is {state}; enable it first (`meshctl node enable {name}`)")]
    NotInvitable { name: NodeName, state: NodeState },
    #[error("invitation would be good for `{seconds}` s, more than {max} s (30 days); choose a shorter `--expires`", max = INVITATION_MAX)]
    TooLong { seconds: u64 },
}

/// Why an invitation was refused.
#[derive(Debug, thiserror::Error)]
pub enum RedeemError {
    #[error(
        "invitation is not known here: it was replaced by a newer one or withdrawn, or it is for another network than \
         `{network}`; ask for a new one (`meshctl node invite NAME`)"
    )]
    Unknown { network: String },
    #[error("invitation of `{name}` expired {ago} s ago; ask for a new one (`meshctl {kind} invite {name}`)")]
    Expired { kind: &'static str, name: String, ago: u64 },
    #[error(
        "invitation of `{name}` was used already, by other keys; if that was not you, `{revoke}` at once; else ask for a \
         new one (`meshctl {kind} invite {name}`)"
    )]
    OtherKeys { kind: &'static str, name: String, revoke: String },
    #[error(
        "keys of `{name}` are no longer good: a newer invitation replaced them; ask for a new one (`meshctl {kind} invite {name}`)"
    )]
    Replaced { kind: &'static str, name: String },
    #[error("node `{name}` is {state}; an admin can enable it (`meshctl node enable {name}`)")]
    NotActive { name: NodeName, state: NodeState },
    #[error("WireGuard key is {found} where an invitation of {kind} `{name}` {wanted}")]
    WireGuardKey { kind: &'static str, name: String, found: &'static str, wanted: &'static str },
    #[error(transparent)]
    Change(#[from] ChangeError),
}

/// Whom an invitation let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redeemed {
    pub identity: Identity,
    pub name: String,
}

/// Puts an invitation into the accounts; older ones of the same subject that were not used are withdrawn.
pub fn invite(
    network: &Network,
    accounts: &mut Accounts,
    subject: &Subject,
    hash: SecretHash,
    expires_at: u64,
    now: u64,
) -> Result<(), InviteError> {
    let seconds = expires_at.saturating_sub(now);
    if seconds > INVITATION_MAX {
        return Err(InviteError::TooLong { seconds });
    }
    let invitee = match subject {
        Subject::Admin(name) => Invitee::Admin(name.clone()),
        Subject::Node(name) => {
            let node = network.node_named(name);
            let node =
                node.ok_or_else(|| InviteError::UnknownNode { name: name.clone(), hint: nearest(network, name) })?;
            if !matches!(node.state, NodeState::Invited | NodeState::Active) {
                return Err(InviteError::NotInvitable { name: name.clone(), state: node.state });
            }
            Invitee::Node(node.id)
        }
    };
    for old in accounts.invitations_of(&invitee) {
        if accounts.invitations().get(&old).is_some_and(|old| old.redeemed.is_none()) {
            accounts.put_invitation(old, None);
        }
    }
    accounts.put_invitation(hash, Some(Invitation { invitee, expires_at, redeemed: None }));
    Ok(())
}

fn nearest(network: &Network, name: &NodeName) -> String {
    let known = network.nodes().values().map(|node| node.name.as_ref());
    controller_api::nearest::nearest(name.as_ref(), known)
        .map(|near| format!(" (did you mean `{near}`?)"))
        .unwrap_or_default()
}

/// Lets the holder of a secret in. `Ok((_, false))`: the same keys had been let in before, and nothing changed.
pub fn redeem(
    network: &mut Network,
    accounts: &mut Accounts,
    hash: SecretHash,
    keys: &Keys,
    certificate_expires_at: u64,
    now: u64,
) -> Result<(Redeemed, bool), RedeemError> {
    let unknown = || RedeemError::Unknown { network: network.name().to_string() };
    let invitation = accounts.invitations().get(&hash).ok_or_else(unknown)?.clone();
    let (kind, name) = match &invitation.invitee {
        Invitee::Node(id) => ("node", network.nodes().get(id).ok_or_else(unknown)?.name.to_string()),
        Invitee::Admin(name) => ("admin", name.clone()),
    };
    check_wireguard(kind, &name, keys)?;
    let identity = match &invitation.invitee {
        Invitee::Node(id) => Identity::Node(*id),
        Invitee::Admin(name) => Identity::Admin(name.clone()),
    };
    let redeemed = Redeemed { identity: identity.clone(), name: name.clone() };
    if let Invitee::Node(id) = &invitation.invitee
        && let Some(node) = network.nodes().get(id)
        && !matches!(node.state, NodeState::Invited | NodeState::Active)
    {
        return Err(RedeemError::NotActive { name: node.name.clone(), state: node.state });
    }
    match &invitation.redeemed {
        Some(before) if before != keys => {
            let revoke = match kind {
                "node" => format!("meshctl node disable {name}"),
                _ => format!("meshctl admin revoke {name}"),
            };
            return Err(RedeemError::OtherKeys { kind, name, revoke });
        }
        Some(_) if !accounts.accepts(&identity, &keys.certificate) => return Err(RedeemError::Replaced { kind, name }),
        Some(_) => {
            let renewed = renew_admin(accounts, &identity, certificate_expires_at);
            return Ok((redeemed, renewed));
        }
        None if now >= invitation.expires_at => {
            return Err(RedeemError::Expired { kind, name, ago: now - invitation.expires_at });
        }
        None => {}
    }
    admit(network, accounts, &invitation.invitee, keys, certificate_expires_at)?;
    // Only the newest invitation of a subject says who it is.
    for old in accounts.invitations_of(&invitation.invitee) {
        accounts.put_invitation(old, None);
    }
    accounts.put_invitation(hash, Some(Invitation { redeemed: Some(keys.clone()), ..invitation }));
    Ok((redeemed, true))
}

/// An admin gets a new certificate, and the list of admins says until when. `false`: there is no such admin.
pub fn renew_admin(accounts: &mut Accounts, identity: &Identity, certificate_expires_at: u64) -> bool {
    match identity {
        Identity::Admin(name) => match accounts.admins().get(name).cloned() {
            Some(admin) => {
                accounts.put_admin(name.clone(), Some(Admin { certificate_expires_at, ..admin }));
                true
            }
            None => false,
        },
        Identity::Node(_) | Identity::Controller => false,
    }
}

fn check_wireguard(kind: &'static str, name: &str, keys: &Keys) -> Result<(), RedeemError> {
    let (found, wanted) = match (kind, &keys.wireguard) {
        ("node", None) => ("missing", "needs one; send the node's public key, 32 bytes"),
        ("admin", Some(_)) => ("given", "has none; leave it out"),
        _ => return Ok(()),
    };
    Err(RedeemError::WireGuardKey { kind, name: name.to_owned(), found, wanted })
}

fn admit(
    network: &mut Network,
    accounts: &mut Accounts,
    invitee: &Invitee,
    keys: &Keys,
    certificate_expires_at: u64,
) -> Result<(), ChangeError> {
    match (invitee, keys.wireguard) {
        (Invitee::Node(id), Some(public_key)) => {
            if let Some(name) = network.nodes().get(id).map(|node| node.name.clone()) {
                network.apply(&Change::ActivateNode { name, public_key })?;
            }
            accounts.put_credential(*id, Some(Credential { keys: vec![keys.certificate] }));
        }
        (Invitee::Node(_), None) => {}
        (Invitee::Admin(name), _) => {
            let admin = Admin { key: keys.certificate, certificate_expires_at, revoked: false };
            accounts.put_admin(name.clone(), Some(admin));
        }
    }
    Ok(())
}

/// A node that renews its certificate with a new key: both keys are good until it shows the new one. `false`: nothing to
/// do.
pub fn rekey(credential: &mut Credential, shown: KeyHash, requested: KeyHash) -> bool {
    let keys = if shown == requested { vec![shown] } else { vec![shown, requested] };
    let changed = credential.keys != keys;
    credential.keys = keys;
    changed
}
