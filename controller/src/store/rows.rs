//! The rows of the store. Objects of the policy are the wire's messages; what only the controller knows of (invitations,
//! credentials, admins, its own settings) has messages here. Field numbers are never given out twice.

use std::collections::BTreeMap;

use controller_api::{ConvertError, v1};
use policy::{ChangeError, Network, NetworkParts, NodeId};
use prost::Message;

use super::account::{Accounts, Admin, Credential, Invitation, Invitee, KeyHash, Keys, SecretHash, Settings};
use super::{Key, Op};

/// A row that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    #[error("row `{key}` cannot be decoded; restore a copy of the state directory")]
    Decode {
        key: Key,
        #[source]
        source: prost::DecodeError,
    },
    #[error(
        "row `{key}` {reason}; it may be of a newer controllerd: run that one, or restore a copy of the state directory"
    )]
    Row { key: Key, reason: &'static str },
    #[error("the store holds no network; make one with `controllerd init`")]
    NoNetwork,
    #[error("the stored objects cannot be read; restore a copy of the state directory")]
    Convert(#[source] ConvertError),
    #[error("the stored objects contradict each other; restore a copy of the state directory")]
    Network(#[source] ChangeError),
}

mod row {
    //! Messages as they lie in the store.

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Invitation {
        /// Not 0: for this node; else for the admin.
        #[prost(uint32, tag = "1")]
        pub(super) node: u32,
        #[prost(string, tag = "2")]
        pub(super) admin: String,
        #[prost(uint64, tag = "3")]
        pub(super) expires_at: u64,
        /// Empty: not redeemed yet.
        #[prost(bytes = "vec", tag = "4")]
        pub(super) certificate_key: Vec<u8>,
        #[prost(bytes = "vec", tag = "5")]
        pub(super) wireguard_key: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Credential {
        #[prost(bytes = "vec", repeated, tag = "1")]
        pub(super) keys: Vec<Vec<u8>>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Admin {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) key: Vec<u8>,
        #[prost(uint64, tag = "2")]
        pub(super) certificate_expires_at: u64,
        #[prost(bool, tag = "3")]
        pub(super) revoked: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Settings {
        #[prost(string, repeated, tag = "1")]
        pub(super) endpoints: Vec<String>,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) authority: Vec<u8>,
    }
}

/// Reads the whole store.
pub fn decode(rows: &BTreeMap<Key, Vec<u8>>) -> Result<(Network, Accounts), RowError> {
    let mut network = None;
    let (mut cidrs, mut nodes, mut groups, mut services, mut rules) =
        <(Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
    let mut accounts = Accounts::default();
    for (key, bytes) in rows {
        let (kind, id) = key.split();
        match kind {
            "network" => network = Some(message::<v1::Network>(key, bytes)?),
            "cidr" => cidrs.push(message(key, bytes)?),
            "node" => nodes.push(message(key, bytes)?),
            "group" => groups.push(message(key, bytes)?),
            "service" => services.push(message(key, bytes)?),
            "rule" => rules.push(message(key, bytes)?),
            "settings" => {
                let row::Settings { endpoints, authority } = message(key, bytes)?;
                accounts.settings = Settings { endpoints, authority };
            }
            "invitation" => {
                let hash = SecretHash(from_hex(key, id)?);
                accounts.invitations.insert(hash, invitation(key, message(key, bytes)?)?);
            }
            "credential" => {
                let row::Credential { keys } = message(key, bytes)?;
                let keys = keys.iter().map(|hash| key_hash(key, hash)).collect::<Result<_, _>>()?;
                accounts.credentials.insert(node_id(key, id)?, Credential { keys });
            }
            "admin" => {
                let row::Admin { key: hash, certificate_expires_at, revoked } = message(key, bytes)?;
                let admin = Admin { key: key_hash(key, &hash)?, certificate_expires_at, revoked };
                accounts.admins.insert(id.to_owned(), admin);
            }
            _ => return Err(RowError::Row { key: key.clone(), reason: "is of an unknown kind" }),
        }
    }
    let head = network.ok_or(RowError::NoNetwork)?;
    let whole = v1::Network { cidrs, nodes, groups, services, rules, ..head };
    let parts = NetworkParts::try_from(whole).map_err(RowError::Convert)?;
    Ok((Network::from_parts(parts).map_err(RowError::Network)?, accounts))
}

fn message<M: Message + Default>(key: &Key, bytes: &[u8]) -> Result<M, RowError> {
    M::decode(bytes).map_err(|source| RowError::Decode { key: key.clone(), source })
}

fn bad(key: &Key, reason: &'static str) -> RowError {
    RowError::Row { key: key.clone(), reason }
}

fn node_id(key: &Key, id: &str) -> Result<NodeId, RowError> {
    match id.parse() {
        Ok(id) if id > 0 => Ok(NodeId(id)),
        _ => Err(bad(key, "has no valid id")),
    }
}

fn key_hash(key: &Key, bytes: &[u8]) -> Result<KeyHash, RowError> {
    bytes.try_into().map(KeyHash).map_err(|_| bad(key, "has a hash that is not 32 bytes"))
}

fn from_hex(key: &Key, text: &str) -> Result<[u8; 32], RowError> {
    let mut bytes = [0; 32];
    let valid = text.len() == 64 && text.is_ascii();
    for (index, byte) in bytes.iter_mut().enumerate() {
        let digits = valid.then(|| &text[index * 2..index * 2 + 2]);
        *byte = digits
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .ok_or_else(|| bad(key, "has a hash that is not 64 hexadecimal digits"))?;
    }
    Ok(bytes)
}

fn invitation(key: &Key, row: row::Invitation) -> Result<Invitation, RowError> {
    let row::Invitation { node, admin, expires_at, certificate_key, wireguard_key } = row;
    let invitee = match (node, admin.is_empty()) {
        (0, false) => Invitee::Admin(admin),
        (1.., true) => Invitee::Node(NodeId(node)),
        _ => return Err(bad(key, "is for nobody, or for two")),
    };
    let redeemed = if certificate_key.is_empty() {
        None
    } else {
        let wireguard = match &wireguard_key[..] {
            [] => None,
            bytes => Some(bytes.try_into().map_err(|_| bad(key, "has an invalid WireGuard key"))?),
        };
        Some(Keys { certificate: key_hash(key, &certificate_key)?, wireguard })
    };
    Ok(Invitation { invitee, expires_at, redeemed })
}

/// The operations that make `new` out of `old`, in the order of their keys. `old`: `None` for an empty store.
pub fn diff(old: Option<(&Network, &Accounts)>, new: (&Network, &Accounts)) -> Vec<Op> {
    let mut ops = Vec::new();
    let (network, accounts) = new;
    let head = header(network);
    if old.map(|(network, _)| header(network)).as_ref() != Some(&head) {
        ops.push(Op::Put(Key::single("network"), head));
    }
    let before = old.map(|(network, _)| network);
    rows::<_, _, v1::Cidr>("cidr", before.map(Network::cidrs), network.cidrs(), &mut ops);
    rows::<_, _, v1::Node>("node", before.map(Network::nodes), network.nodes(), &mut ops);
    rows::<_, _, v1::Group>("group", before.map(Network::groups), network.groups(), &mut ops);
    rows::<_, _, v1::NamedService>("service", before.map(Network::services), network.services(), &mut ops);
    rows::<_, _, v1::Rule>("rule", before.map(Network::rules), network.rules(), &mut ops);
    let before = old.map(|(_, accounts)| accounts);
    if before.map(|accounts| &accounts.settings) != Some(&accounts.settings) {
        let settings = row::Settings::from(&accounts.settings);
        ops.push(Op::Put(Key::single("settings"), settings.encode_to_vec()));
    }
    rows::<_, _, row::Invitation>("invitation", before.map(|old| &old.invitations), &accounts.invitations, &mut ops);
    rows::<_, _, row::Credential>("credential", before.map(|old| &old.credentials), &accounts.credentials, &mut ops);
    rows::<_, _, row::Admin>("admin", before.map(|old| &old.admins), &accounts.admins, &mut ops);
    ops
}

/// The network without its objects.
fn header(network: &Network) -> Vec<u8> {
    let NetworkParts { name, roots, default, next_id, .. } = network.to_parts();
    let empty = NetworkParts {
        name,
        roots,
        default,
        next_id,
        cidrs: Vec::new(),
        nodes: Vec::new(),
        groups: Vec::new(),
        services: Vec::new(),
        rules: Vec::new(),
    };
    v1::Network::from(&empty).encode_to_vec()
}

fn rows<'a, I, T, M>(kind: &str, old: Option<&BTreeMap<I, T>>, new: &'a BTreeMap<I, T>, ops: &mut Vec<Op>)
where
    I: Ord + std::fmt::Display,
    T: PartialEq,
    M: Message + From<&'a T>,
{
    for (id, object) in new {
        if old.and_then(|old| old.get(id)) != Some(object) {
            ops.push(Op::Put(Key::new(kind, id), M::from(object).encode_to_vec()));
        }
    }
    let gone = old.into_iter().flatten().filter(|(id, _)| !new.contains_key(id));
    ops.extend(gone.map(|(id, _)| Op::Delete(Key::new(kind, id))));
}

impl From<&Settings> for row::Settings {
    fn from(settings: &Settings) -> Self {
        let Settings { endpoints, authority } = settings.clone();
        Self { endpoints, authority }
    }
}

impl From<&Invitation> for row::Invitation {
    fn from(invitation: &Invitation) -> Self {
        let Invitation { invitee, expires_at, redeemed } = invitation;
        let (node, admin) = match invitee {
            Invitee::Node(id) => (id.0, String::new()),
            Invitee::Admin(name) => (0, name.clone()),
        };
        let certificate_key = redeemed.as_ref().map(|keys| keys.certificate.0.to_vec());
        let wireguard_key = redeemed.as_ref().and_then(|keys| keys.wireguard).map(|key| key.as_bytes().to_vec());
        Self {
            node,
            admin,
            expires_at: *expires_at,
            certificate_key: certificate_key.unwrap_or_default(),
            wireguard_key: wireguard_key.unwrap_or_default(),
        }
    }
}

impl From<&Credential> for row::Credential {
    fn from(credential: &Credential) -> Self {
        Self { keys: credential.keys.iter().map(|key| key.0.to_vec()).collect() }
    }
}

impl From<&Admin> for row::Admin {
    fn from(admin: &Admin) -> Self {
        let Admin { key, certificate_expires_at, revoked } = admin;
        Self { key: key.0.to_vec(), certificate_expires_at: *certificate_expires_at, revoked: *revoked }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{NOW, add_cidr, apply, empty, key_hash, network, public_key};
    use policy::Change;

    fn rows(ops: Vec<Op>) -> BTreeMap<Key, Vec<u8>> {
        let mut rows = BTreeMap::new();
        write(&mut rows, ops);
        rows
    }

    fn write(rows: &mut BTreeMap<Key, Vec<u8>>, ops: Vec<Op>) {
        for op in ops {
            match op {
                Op::Put(key, value) => rows.insert(key, value),
                Op::Delete(key) => rows.remove(&key),
            };
        }
    }

    fn accounts() -> Accounts {
        let keys = Keys { certificate: key_hash(3), wireguard: Some(public_key(4)) };
        let open = Invitation { invitee: Invitee::Admin("alice".to_owned()), expires_at: NOW, redeemed: None };
        let used = Invitation { invitee: Invitee::Node(NodeId(7)), expires_at: NOW, redeemed: Some(keys) };
        Accounts {
            settings: Settings { endpoints: vec!["controller.example:7443".to_owned()], authority: vec![5; 32] },
            invitations: [(SecretHash([1; 32]), open), (SecretHash([0xab; 32]), used)].into(),
            credentials: [(NodeId(7), Credential { keys: vec![key_hash(3), key_hash(8)] })].into(),
            admins: [("bob".to_owned(), Admin { key: key_hash(6), certificate_expires_at: NOW, revoked: true })].into(),
        }
    }

    #[test]
    fn rows_read_as_they_were_written() {
        let (network, accounts) = (network(), accounts());
        let (read, read_accounts) = decode(&rows(diff(None, (&network, &accounts)))).expect("reads");
        assert_eq!(read.to_parts(), network.to_parts());
        assert_eq!(read_accounts, accounts);
    }

    #[test]
    fn a_change_writes_what_differs() {
        let (old, accounts) = (network(), accounts());
        let mut rows = rows(diff(None, (&old, &accounts)));
        assert_eq!(diff(Some((&old, &accounts)), (&old, &accounts)), []);
        let mut new = old.clone();
        apply(&mut new, &Change::RenameNode { from: crate::fixture::parse("web1"), to: crate::fixture::parse("www1") });
        apply(&mut new, &Change::DeleteRule { name: crate::fixture::parse("web-to-app") });
        let mut fewer = accounts.clone();
        fewer.invitations.remove(&SecretHash([1; 32]));
        let ops = diff(Some((&old, &accounts)), (&new, &fewer));
        let kinds: Vec<_> = ops.iter().map(|op| (matches!(op, Op::Put(..)), op.key().split().0)).collect();
        assert_eq!(kinds, [(true, "node"), (false, "rule"), (false, "invitation")]);
        write(&mut rows, ops);
        let (read, read_accounts) = decode(&rows).expect("reads");
        assert_eq!((read.to_parts(), read_accounts), (new.to_parts(), fewer));
    }

    #[test]
    fn damaged_rows_are_named() {
        let mut network = empty();
        apply(&mut network, &add_cidr("web", "10.42.1.0/24"));
        let whole = rows(diff(None, (&network, &accounts())));
        let cidr = whole.keys().find(|key| key.split().0 == "cidr").expect("a cidr").clone();
        for (key, value) in [
            (cidr.clone(), vec![0xff]),
            (Key::new("colour", 1), vec![]),
            (Key::new("invitation", "xyz"), vec![]),
            (Key::new("credential", "07x"), vec![]),
        ] {
            let mut rows = whole.clone();
            rows.insert(key.clone(), value);
            let error = decode(&rows).expect_err("damaged").to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
        let mut rows = whole;
        rows.remove(&Key::single("network"));
        assert!(matches!(decode(&rows), Err(RowError::NoNetwork)));
        assert!(matches!(decode(&BTreeMap::new()), Err(RowError::NoNetwork)));
    }
}
