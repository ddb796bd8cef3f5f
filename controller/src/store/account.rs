//! What the controller knows besides the policy: whom it invited, whose keys are good, who its admins are.

use std::collections::BTreeMap;

use controller_api::identity::Identity;
use policy::NodeId;

/// SHA-256 of an invitation's secret.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecretHash(pub [u8; 32]);

/// SHA-256 of a certificate's public key (its SubjectPublicKeyInfo in DER).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHash(pub [u8; 32]);

macro_rules! hash_text {
    ($($name:ident)*) => {
        $(impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        })*
    };
}
hash_text!(SecretHash KeyHash);

/// Whom an invitation is for. A node by its id, so that it may be renamed meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invitee {
    Node(NodeId),
    Admin(String),
}

/// An invitation as the controller keeps it: without the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invitation {
    pub invitee: Invitee,
    /// Seconds since the epoch.
    pub expires_at: u64,
    /// Whose keys redeemed it.
    pub redeemed: Option<Keys>,
}

/// The keys of one holder: of its certificates, and of its WireGuard (a node's only).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    pub certificate: KeyHash,
    pub wireguard: Option<policy::PublicKey>,
}

/// Certificates of these keys are good; every other that was ever signed for this node is refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credential {
    /// One, or two while a node changes its key.
    pub keys: Vec<KeyHash>,
}

/// An admin who was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    pub key: KeyHash,
    pub certificate_expires_at: u64,
    pub revoked: bool,
}

/// What `controllerd init` was told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Written into invitations.
    pub endpoints: Vec<String>,
    /// SHA-256 of the authority's certificate.
    pub authority: Vec<u8>,
}

/// Everything in the store that is not policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounts {
    pub settings: Settings,
    pub invitations: BTreeMap<SecretHash, Invitation>,
    pub credentials: BTreeMap<NodeId, Credential>,
    pub admins: BTreeMap<String, Admin>,
}

impl Accounts {
    /// Whether a certificate of this key speaks for this identity now. The node's own state is the network's to say.
    pub fn accepts(&self, identity: &Identity, key: &KeyHash) -> bool {
        match identity {
            Identity::Node(id) => self.credentials.get(id).is_some_and(|credential| credential.keys.contains(key)),
            Identity::Admin(name) => self.admins.get(name).is_some_and(|admin| !admin.revoked && admin.key == *key),
            Identity::Controller => false,
        }
    }
}
