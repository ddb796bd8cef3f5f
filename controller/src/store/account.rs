//! What the controller knows besides the policy: whom it invited, whose keys are good, who its admins are.

use std::collections::BTreeSet;

use controller_api::identity::Identity;
use policy::{Map, NodeId};

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
                f.write_str(&hex::encode(self.0))
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
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
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

/// Everything in the store that is not policy. A clone costs nothing, and shares what neither of the two changes.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    pub settings: Settings,
    invitations: Map<SecretHash, Invitation>,
    by_invitee: Map<(Invitee, SecretHash), ()>,
    credentials: Map<NodeId, Credential>,
    admins: Map<String, Admin>,
    touched: AccountRows,
}

/// Which rows a change touches: adds, alters or deletes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccountRows {
    pub invitations: BTreeSet<SecretHash>,
    pub credentials: BTreeSet<NodeId>,
    pub admins: BTreeSet<String>,
}

impl AccountRows {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What was touched is not part of the accounts.
impl PartialEq for Accounts {
    fn eq(&self, other: &Self) -> bool {
        let Self { settings, invitations, by_invitee: _, credentials, admins, touched: _ } = self;
        *settings == other.settings
            && *invitations == other.invitations
            && *credentials == other.credentials
            && *admins == other.admins
    }
}

impl Eq for Accounts {}

impl Accounts {
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// What the changes since the last call have touched.
    pub fn take_touched(&mut self) -> AccountRows {
        std::mem::take(&mut self.touched)
    }

    pub fn invitations(&self) -> &Map<SecretHash, Invitation> {
        &self.invitations
    }

    pub fn credentials(&self) -> &Map<NodeId, Credential> {
        &self.credentials
    }

    pub fn admins(&self) -> &Map<String, Admin> {
        &self.admins
    }

    /// The invitations of one invitee.
    pub fn invitations_of(&self, invitee: &Invitee) -> Vec<SecretHash> {
        let first = (invitee.clone(), SecretHash([0; 32]));
        let of_invitee = self.by_invitee.range(first..).take_while(|((other, _), ())| other == invitee);
        of_invitee.map(|((_, hash), ())| *hash).collect()
    }

    pub fn put_invitation(&mut self, hash: SecretHash, new: Option<Invitation>) {
        self.touched.invitations.insert(hash);
        if let Some(old) = self.invitations.remove(&hash) {
            self.by_invitee.remove(&(old.invitee, hash));
        }
        if let Some(new) = new {
            self.by_invitee.insert((new.invitee.clone(), hash), ());
            self.invitations.insert(hash, new);
        }
    }

    pub fn put_credential(&mut self, node: NodeId, new: Option<Credential>) {
        self.touched.credentials.insert(node);
        match new {
            Some(new) => drop(self.credentials.insert(node, new)),
            None => drop(self.credentials.remove(&node)),
        }
    }

    pub fn put_admin(&mut self, name: String, new: Option<Admin>) {
        self.touched.admins.insert(name.clone());
        match new {
            Some(new) => drop(self.admins.insert(name, new)),
            None => drop(self.admins.remove(&name)),
        }
    }

    /// Whether a certificate of this key speaks for this identity now. The node's own state is the network's to say.
    pub fn accepts(&self, identity: &Identity, key: &KeyHash) -> bool {
        match identity {
            Identity::Node(id) => self.credentials.get(id).is_some_and(|credential| credential.keys.contains(key)),
            Identity::Admin(name) => self.admins.get(name).is_some_and(|admin| !admin.revoked && admin.key == *key),
            Identity::Controller => false,
        }
    }
}
