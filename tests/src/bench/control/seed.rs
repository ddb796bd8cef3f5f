//! A controller's state directory and its nodes' state directories, made in bulk: what joining one by one would have
//! left. The store is written before `controllerd` starts, and the network's own authority signs the certificates.
//!
//! Everything of the bench that knows the inside of `controller` is here.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use controller::access::authority::{Authority, CertificateRequest};
use controller::clock;
use controller::init::DATABASE;
use controller::store::account::{Accounts, Credential, Invitation, Invitee, SecretHash, Settings};
use controller::store::sqlite::SqliteStore;
use controller::store::{AuditLine, Commit, Store, rows};
use controller_api::identity::Identity;
use controller_api::invitation::{Invitation as Line, Secret, Subject};
use node::uplink::identity::{Identity as NodeIdentity, Keys};
use policy::{Network, NetworkParts, NodeName, NodeState};
use rand::Rng as _;
use tempfile::TempDir;

use super::server::PORT;
use super::{loopback, running};

/// Longer than any bench.
const LIFETIME: Duration = Duration::from_secs(86_400);
/// In memory: 10,000 nodes have as many disks, and this machine has one.
const MEMORY: &str = "/dev/shm";

/// What was made. Removed when dropped.
#[derive(Debug)]
pub(super) struct Seeded {
    pub(super) controller: TempDir,
    /// The state directory of each node, by its index.
    pub(super) nodes: TempDir,
    /// Of nodes that were invited and have not joined, by their index.
    pub(super) invitations: BTreeMap<u32, Line>,
}

/// The state directory of a node.
pub(super) fn node_dir(nodes: &Path, index: u32) -> PathBuf {
    nodes.join(index.to_string())
}

/// Makes the network. Active nodes get keys and a certificate; `indices` says
/// which nodes, by their place in `parts`, are to follow.
pub(super) fn seed(mut parts: NetworkParts, indices: &[u32]) -> Result<Seeded> {
    let memory = Path::new(MEMORY);
    let controller = running::directory(&std::env::temp_dir())?;
    let nodes = running::directory(if memory.is_dir() { memory } else { controller.path() })?;
    let now = clock::now();
    let authority = Authority::create(controller.path(), &parts.name, now)?;
    let mut accounts = Accounts::new(Settings {
        endpoints: vec![format!("{}:{PORT}", loopback::address(0))],
        authority: authority.fingerprint().to_vec(),
    });
    for &index in indices {
        let network = parts.name.clone();
        let node = parts.nodes.get_mut(index as usize).context("there is no such node")?;
        let directory = node_dir(nodes.path(), index);
        DirBuilder::new().mode(0o700).create(&directory)?;
        let keys = Keys::load_or_make(&directory)?;
        let request = CertificateRequest::parse(&keys.certificate_request()?)?;
        let certificate = authority.sign(&request, &Identity::Node(node.id), now, LIFETIME)?;
        NodeIdentity {
            network,
            node: node.id,
            name: node.name.clone(),
            endpoints: vec![format!("{}:{PORT}", loopback::address(index))],
            certificate,
            authority: authority.certificate().to_vec(),
        }
        .store(&directory)?;
        node.public_key = Some(keys.wireguard.public());
        accounts.put_credential(node.id, Some(Credential { keys: vec![request.key()] }));
    }
    let invitations = invite(&parts, &authority, &mut accounts, now)?;
    commit(controller.path(), parts, &accounts, now)?;
    Ok(Seeded { controller, nodes, invitations })
}

/// Invitations of all nodes that have not joined.
fn invite(
    parts: &NetworkParts,
    authority: &Authority,
    accounts: &mut Accounts,
    now: u64,
) -> Result<BTreeMap<u32, Line>> {
    let mut lines = BTreeMap::new();
    for (index, node) in (0..).zip(&parts.nodes).filter(|(_, node)| node.state == NodeState::Invited) {
        let secret = Secret::new(rand::rng().random());
        let expires_at = now + LIFETIME.as_secs();
        let invitation = Invitation { invitee: Invitee::Node(node.id), expires_at, redeemed: None };
        accounts.put_invitation(SecretHash(secret.hash()), Some(invitation));
        let line = Line {
            network: parts.name.clone(),
            subject: Subject::Node(NodeName::clone(&node.name)),
            endpoints: vec![format!("{}:{PORT}", loopback::address(index))],
            fingerprint: authority.fingerprint(),
            secret,
            expires_at,
        };
        lines.insert(index, line);
    }
    Ok(lines)
}

fn commit(directory: &Path, parts: NetworkParts, accounts: &Accounts, now: u64) -> Result<()> {
    let network = Network::from_parts(parts)?;
    let store = SqliteStore::create(&directory.join(DATABASE))?;
    store.commit(&Commit {
        request: None,
        preconditions: Vec::new(),
        ops: rows::of_everything(&network, accounts),
        audit: vec![AuditLine { actor: "controller".to_owned(), change: "a network of the bench".to_owned() }],
        time: now,
    })?;
    Ok(())
}
