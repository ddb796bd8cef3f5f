//! A small network for tests: `web1`, `app1` and `db1`, each in a cidr of its own.

use std::sync::Arc;

use policy::{Action, Change, DefaultPolicy, Matrix, Network, Prefixes, PublicKey, Revision, RuleSpec, Slice};

use crate::key::PrivateKey;

/// The private key of a node of [`network`].
pub(crate) fn key(node: &str) -> PrivateKey {
    let mut bytes = [0x42; 32];
    bytes[1..=node.len()].copy_from_slice(node.as_bytes());
    PrivateKey::from_bytes(&bytes).unwrap()
}

pub(crate) fn public_key(node: &str) -> PublicKey {
    key(node).public()
}

pub(crate) fn prefixes(text: &str) -> Prefixes {
    Prefixes::from_nets(text.split_whitespace().map(|net| net.parse().unwrap())).unwrap()
}

/// web -> app tcp/8080, app -> db tcp/5432, nothing else.
pub(crate) fn network() -> Network {
    let mut network =
        Network::new("corp".parse().unwrap(), prefixes("10.42.0.0/16 fd42::/48"), DefaultPolicy::Deny).unwrap();
    for (number, cidr) in ["web", "app", "db"].iter().enumerate() {
        let name = format!("{cidr}1");
        let text = format!("10.42.{}.0/24 fd42:0:0:{}::/64", number + 1, number + 1);
        let add = Change::AddCidr {
            name: cidr.parse().unwrap(),
            prefixes: prefixes(&text),
            isolated: false,
            external: false,
        };
        let node = Change::AddNode {
            name: name.parse().unwrap(),
            cidr: cidr.parse().unwrap(),
            addresses: None,
            groups: Vec::new(),
            gateway_for: Vec::new(),
        };
        let activate = Change::ActivateNode { name: name.parse().unwrap(), public_key: public_key(&name) };
        for change in [add, node, activate] {
            network.apply(&change).unwrap();
        }
    }
    allow(&mut network, "web-to-app", "cidr:web", "cidr:app", "tcp/8080");
    allow(&mut network, "app-to-db", "cidr:app", "cidr:db", "tcp/5432");
    network
}

pub(crate) fn allow(network: &mut Network, name: &str, from: &str, to: &str, service: &str) {
    let rule = Change::AddRule(RuleSpec {
        name: name.parse().unwrap(),
        action: Action::Allow,
        from: vec![from.parse().unwrap()],
        to: vec![to.parse().unwrap()],
        services: vec![service.parse().unwrap()],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    });
    network.apply(&rule).unwrap();
}

/// A node's slice.
pub(crate) fn slice(network: &Network, node: &str, revision: u64) -> Arc<Slice> {
    let id = network.node_named(&node.parse().unwrap()).unwrap().id;
    let matrix = Matrix::compile(network).unwrap();
    Arc::new(matrix.slice(id, Revision(revision)).unwrap())
}
