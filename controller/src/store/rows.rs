//! The rows of the store. Objects of the policy are the wire's messages; what only the controller knows of (invitations,
//! credentials, admins, its own settings) has messages here. Field numbers are never given out twice.

use std::collections::{BTreeMap, BTreeSet};

use controller_api::{ConvertError, v1};
use policy::{
    ChangeError, CidrId, GroupId, Header, Map, Network, NetworkParts, NodeId, Replacement, Revision, Rows, RuleId,
    ServiceId,
};
use prost::Message;

use super::account::{
    AccountRows, Accounts, Admin, Credential, Invitation, Invitee, KeyHash, Keys, SecretHash, Settings,
};
use super::{Key, Op, Precondition, Row, Snapshot};

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
pub fn decode(rows: &BTreeMap<Key, Row>) -> Result<(Network, Accounts), RowError> {
    let mut network = None;
    let (mut cidrs, mut nodes, mut groups, mut services, mut rules) =
        <(Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
    let mut accounts = Accounts::default();
    for (key, Row { value: bytes, revision: _ }) in rows {
        let (kind, id) = key.split();
        match kind {
            "network" => network = Some(message::<v1::Network>(key, bytes)?),
            "cidr" => cidrs.push(message(key, bytes)?),
            "node" => nodes.push(message(key, bytes)?),
            "group" => groups.push(message(key, bytes)?),
            "service" => services.push(message(key, bytes)?),
            "rule" => rules.push(message(key, bytes)?),
            "settings" | "invitation" | "credential" | "admin" => {
                accounts.follow(account_change(key, kind, id, Some(bytes))?);
            }
            _ => return Err(RowError::Row { key: key.clone(), reason: "is of an unknown kind" }),
        }
    }
    let head = network.ok_or(RowError::NoNetwork)?;
    let whole = v1::Network { cidrs, nodes, groups, services, rules, ..head };
    let parts = NetworkParts::try_from(whole).map_err(RowError::Convert)?;
    accounts.take_touched();
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
    hex::decode_to_slice(text, &mut bytes).map_err(|_| bad(key, "has a hash that is not 64 hexadecimal digits"))?;
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

/// Rows of an empty store for a network and accounts.
pub fn of_everything(network: &Network, accounts: &Accounts) -> Vec<Op> {
    let settings = Op::Put(Key::single("settings"), row::Settings::from(&accounts.settings).encode_to_vec());
    let touched = AccountRows {
        invitations: accounts.invitations().keys().copied().collect(),
        credentials: accounts.credentials().keys().copied().collect(),
        admins: accounts.admins().keys().cloned().collect(),
    };
    let mut ops = of_policy(network, &Rows::all(network));
    ops.push(settings);
    ops.extend(of_accounts(accounts, &touched));
    ops
}

/// The touched rows of the policy as they are now. The header is always among them: the revision at which it was written
/// last is the policy's.
pub fn of_policy(network: &Network, touched: &Rows) -> Vec<Op> {
    if touched.is_empty() {
        return Vec::new();
    }
    let mut ops = vec![Op::Put(Key::single(HEADER), header(network))];
    now::<_, _, v1::Cidr>("cidr", &touched.cidrs, network.cidrs(), &mut ops);
    now::<_, _, v1::Node>("node", &touched.nodes, network.nodes(), &mut ops);
    now::<_, _, v1::Group>("group", &touched.groups, network.groups(), &mut ops);
    now::<_, _, v1::NamedService>("service", &touched.services, network.services(), &mut ops);
    now::<_, _, v1::Rule>("rule", &touched.rules, network.rules(), &mut ops);
    ops
}

/// The touched rows of accounts as they are now.
pub fn of_accounts(accounts: &Accounts, touched: &AccountRows) -> Vec<Op> {
    let mut ops = Vec::new();
    now::<_, _, row::Invitation>("invitation", &touched.invitations, accounts.invitations(), &mut ops);
    now::<_, _, row::Credential>("credential", &touched.credentials, accounts.credentials(), &mut ops);
    now::<_, _, row::Admin>("admin", &touched.admins, accounts.admins(), &mut ops);
    ops
}

/// That nobody else has written the touched rows since `since`, which are read in `before`. All of the policy goes by its
/// header. `written`: rows of which that is known otherwise.
pub fn unchanged(
    policy: &Rows,
    (before, touched): (&Accounts, &AccountRows),
    since: Revision,
    written: &BTreeSet<Key>,
) -> Vec<Precondition> {
    let AccountRows { invitations, credentials, admins } = touched;
    let header = (!policy.is_empty()).then(|| (Key::single(HEADER), true));
    let invitations = invitations.iter().map(|id| (Key::new("invitation", id), before.invitations().contains_key(id)));
    let credentials = credentials.iter().map(|id| (Key::new("credential", id), before.credentials().contains_key(id)));
    let admins = admins.iter().map(|id| (Key::new("admin", id), before.admins().contains_key(id)));
    header
        .into_iter()
        .chain(invitations)
        .chain(credentials)
        .chain(admins)
        .filter(|(key, _)| !written.contains(key))
        .map(|(key, exists)| if exists { Precondition::Unchanged(key, since) } else { Precondition::Absent(key) })
        .collect()
}

/// The row that says of the network what no object does.
pub const HEADER: &str = "network";

/// The revision that touched the policy last.
pub fn policy_revision(snapshot: &Snapshot) -> Revision {
    snapshot.rows.get(&Key::single(HEADER)).map_or(snapshot.revision, |row| row.revision)
}

fn header(network: &Network) -> Vec<u8> {
    let Header { name, roots, default, next_id } = network.header();
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

fn now<'a, I, T, M>(kind: &str, touched: &BTreeSet<I>, objects: &'a Map<I, T>, ops: &mut Vec<Op>)
where
    I: Ord + Clone + std::fmt::Display,
    M: Message + From<&'a T>,
{
    ops.extend(touched.iter().map(|id| match objects.get(id) {
        Some(object) => Op::Put(Key::new(kind, id), M::from(object).encode_to_vec()),
        None => Op::Delete(Key::new(kind, id)),
    }));
}

/// What a commit changes, read back from its rows.
#[derive(Debug, Default)]
pub struct Changed {
    /// `None`: it does not touch the policy.
    pub policy: Option<Replacement>,
    pub accounts: Vec<AccountChange>,
}

/// One row of the accounts; `None`: it is deleted.
#[derive(Debug)]
pub enum AccountChange {
    Settings(Settings),
    Invitation(SecretHash, Option<Invitation>),
    Credential(NodeId, Option<Credential>),
    Admin(String, Option<Admin>),
}

/// Reads the rows of one commit.
pub fn changed(ops: &[Op]) -> Result<Changed, RowError> {
    let mut changed = Changed::default();
    for op in ops {
        let (key, bytes) = match op {
            Op::Put(key, bytes) => (key, Some(bytes.as_slice())),
            Op::Delete(key) => (key, None),
        };
        let (kind, id) = key.split();
        match kind {
            "settings" | "invitation" | "credential" | "admin" => {
                changed.accounts.push(account_change(key, kind, id, bytes)?);
            }
            _ => replace(changed.policy.get_or_insert_default(), key, kind, id, bytes)?,
        }
    }
    Ok(changed)
}

fn account_change(key: &Key, kind: &str, id: &str, bytes: Option<&[u8]>) -> Result<AccountChange, RowError> {
    Ok(match kind {
        "settings" => {
            let bytes = bytes.ok_or_else(|| bad(key, "is deleted"))?;
            let row::Settings { endpoints, authority } = message(key, bytes)?;
            AccountChange::Settings(Settings { endpoints, authority })
        }
        "invitation" => {
            let read = |bytes| invitation(key, message(key, bytes)?);
            AccountChange::Invitation(SecretHash(from_hex(key, id)?), bytes.map(read).transpose()?)
        }
        "credential" => {
            let read = |bytes| {
                let row::Credential { keys } = message(key, bytes)?;
                let keys = keys.iter().map(|hash| key_hash(key, hash)).collect::<Result<_, _>>()?;
                Ok::<_, RowError>(Credential { keys })
            };
            AccountChange::Credential(node_id(key, id)?, bytes.map(read).transpose()?)
        }
        _ => {
            let read = |bytes| {
                let row::Admin { key: hash, certificate_expires_at, revoked } = message(key, bytes)?;
                Ok::<_, RowError>(Admin { key: key_hash(key, &hash)?, certificate_expires_at, revoked })
            };
            AccountChange::Admin(id.to_owned(), bytes.map(read).transpose()?)
        }
    })
}

fn replace(
    replacement: &mut Replacement,
    key: &Key,
    kind: &str,
    id: &str,
    bytes: Option<&[u8]>,
) -> Result<(), RowError> {
    fn object<W, T>(key: &Key, bytes: Option<&[u8]>) -> Result<Option<T>, RowError>
    where
        W: Message + Default,
        T: TryFrom<W, Error = ConvertError>,
    {
        let read = |bytes| T::try_from(message::<W>(key, bytes)?).map_err(RowError::Convert);
        bytes.map(read).transpose()
    }
    let number = || id.parse::<u32>().ok().filter(|id| *id > 0).ok_or_else(|| bad(key, "has no valid id"));
    match kind {
        HEADER => {
            let bytes = bytes.ok_or(RowError::NoNetwork)?;
            let parts = NetworkParts::try_from(message::<v1::Network>(key, bytes)?).map_err(RowError::Convert)?;
            let NetworkParts { name, roots, default, next_id, .. } = parts;
            replacement.header = Some(Header { name, roots, default, next_id });
        }
        "cidr" => drop(replacement.cidrs.insert(CidrId(number()?), object::<v1::Cidr, _>(key, bytes)?)),
        "node" => drop(replacement.nodes.insert(NodeId(number()?), object::<v1::Node, _>(key, bytes)?)),
        "group" => drop(replacement.groups.insert(GroupId(number()?), object::<v1::Group, _>(key, bytes)?)),
        "service" => {
            drop(replacement.services.insert(ServiceId(number()?), object::<v1::NamedService, _>(key, bytes)?));
        }
        "rule" => drop(replacement.rules.insert(RuleId(number()?), object::<v1::Rule, _>(key, bytes)?)),
        _ => return Err(bad(key, "is of an unknown kind")),
    }
    Ok(())
}

impl Accounts {
    /// Makes one change as it lies in the store.
    pub fn follow(&mut self, change: AccountChange) {
        match change {
            AccountChange::Settings(settings) => self.settings = settings,
            AccountChange::Invitation(hash, invitation) => self.put_invitation(hash, invitation),
            AccountChange::Credential(node, credential) => self.put_credential(node, credential),
            AccountChange::Admin(name, admin) => self.put_admin(name, admin),
        }
    }
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

    fn rows(ops: Vec<Op>) -> BTreeMap<Key, Row> {
        let mut rows = BTreeMap::new();
        write(&mut rows, ops);
        rows
    }

    fn write(rows: &mut BTreeMap<Key, Row>, ops: Vec<Op>) {
        let mut snapshot = Snapshot { revision: Revision(1), rows: std::mem::take(rows) };
        snapshot.apply(Revision(2), &ops);
        *rows = snapshot.rows;
    }

    fn accounts() -> Accounts {
        let keys = Keys { certificate: key_hash(3), wireguard: Some(public_key(4)) };
        let open = Invitation { invitee: Invitee::Admin("alice".to_owned()), expires_at: NOW, redeemed: None };
        let used = Invitation { invitee: Invitee::Node(NodeId(7)), expires_at: NOW, redeemed: Some(keys) };
        let settings = Settings { endpoints: vec!["controller.example:7443".to_owned()], authority: vec![5; 32] };
        let mut accounts = Accounts::new(settings);
        accounts.put_invitation(SecretHash([1; 32]), Some(open));
        accounts.put_invitation(SecretHash([0xab; 32]), Some(used));
        accounts.put_credential(NodeId(7), Some(Credential { keys: vec![key_hash(3), key_hash(8)] }));
        let bob = Admin { key: key_hash(6), certificate_expires_at: NOW, revoked: true };
        accounts.put_admin("bob".to_owned(), Some(bob));
        accounts.take_touched();
        accounts
    }

    #[test]
    fn rows_read_as_they_were_written() {
        let (network, accounts) = (network(), accounts());
        let (read, read_accounts) = decode(&rows(of_everything(&network, &accounts))).expect("reads");
        assert_eq!(read.to_parts(), network.to_parts());
        assert_eq!(read_accounts, accounts);
    }

    #[test]
    fn a_change_writes_what_it_touches_and_is_read_back() {
        let (mut old, accounts) = (network(), accounts());
        old.take_touched();
        let mut rows = rows(of_everything(&old, &accounts));
        assert_eq!(of_policy(&old, &Rows::default()), []);
        let mut new = old.clone();
        apply(&mut new, &Change::RenameNode { from: crate::fixture::parse("web1"), to: crate::fixture::parse("www1") });
        apply(&mut new, &Change::DeleteRule { name: crate::fixture::parse("web-to-app") });
        let mut fewer = accounts.clone();
        fewer.put_invitation(SecretHash([1; 32]), None);
        let mut ops = of_policy(&new, &new.clone().take_touched());
        let touched = fewer.take_touched();
        ops.extend(of_accounts(&fewer, &touched));
        let kinds: Vec<_> = ops.iter().map(|op| (matches!(op, Op::Put(..)), op.key().split().0)).collect();
        assert_eq!(kinds, [(true, "network"), (true, "node"), (false, "rule"), (false, "invitation")]);
        let Changed { policy, accounts: changes } = changed(&ops).expect("reads");
        let (mut followed, mut followed_accounts) = (old, accounts);
        followed.replace(policy.expect("the policy is touched")).expect("replaced");
        changes.into_iter().for_each(|change| followed_accounts.follow(change));
        assert_eq!((&followed, &followed_accounts), (&new, &fewer));
        write(&mut rows, ops);
        let (read, read_accounts) = decode(&rows).expect("reads");
        assert_eq!((read.to_parts(), read_accounts), (new.to_parts(), fewer));
    }

    #[test]
    fn damaged_rows_are_named() {
        let mut network = empty();
        apply(&mut network, &add_cidr("web", "10.42.1.0/24"));
        let whole = rows(of_everything(&network, &accounts()));
        let cidr = whole.keys().find(|key| key.split().0 == "cidr").expect("a cidr").clone();
        for (key, value) in [
            (cidr.clone(), vec![0xff]),
            (Key::new("colour", 1), vec![]),
            (Key::new("invitation", "xyz"), vec![]),
            (Key::new("credential", "07x"), vec![]),
        ] {
            let mut rows = whole.clone();
            rows.insert(key.clone(), Row { value, revision: Revision(3) });
            let error = decode(&rows).expect_err("damaged").to_string();
            assert!(error.contains(&format!("`{key}`")), "{error}");
        }
        let mut rows = whole;
        rows.remove(&Key::single("network"));
        assert!(matches!(decode(&rows), Err(RowError::NoNetwork)));
        assert!(matches!(decode(&BTreeMap::new()), Err(RowError::NoNetwork)));
    }
}
