//! A small network for tests: `web1`, `app1`, `db1` in cidrs of their own, all active, default deny, `web` to `app` on
//! tcp/8080.

use std::sync::Arc;

use policy::{Action, Change, DefaultPolicy, Network, NodeId, Prefixes, PublicKey, Revision, RuleSpec};

use crate::state::{Policy, State};
use crate::store::account::{Accounts, Credential, KeyHash};

pub(crate) const NOW: u64 = 1_700_000_000;

pub(crate) fn parse<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect(text)
}

pub(crate) fn public_key(byte: u8) -> PublicKey {
    PublicKey::try_from(&[byte; 32][..]).expect("a key")
}

pub(crate) fn key_hash(byte: u8) -> KeyHash {
    KeyHash([byte; 32])
}

pub(crate) fn add_cidr(name: &str, prefix: &str) -> Change {
    let prefixes = Prefixes::from_nets([parse(prefix)]).expect("prefixes");
    Change::AddCidr { name: parse(name), prefixes, isolated: false, external: false }
}

pub(crate) fn add_node(name: &str, cidr: &str) -> Change {
    Change::AddNode {
        name: parse(name),
        cidr: parse(cidr),
        addresses: None,
        groups: Vec::new(),
        gateway_for: Vec::new(),
    }
}

pub(crate) fn allow(name: &str, from: &str, to: &str, service: &str) -> Change {
    Change::AddRule(RuleSpec {
        name: parse(name),
        action: Action::Allow,
        from: vec![parse(from)],
        to: vec![parse(to)],
        services: vec![parse(service)],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    })
}

pub(crate) fn empty() -> Network {
    let roots = Prefixes::from_nets([parse("10.42.0.0/16")]).expect("roots");
    Network::new(parse("corp"), roots, DefaultPolicy::Deny).expect("a network")
}

pub(crate) fn network() -> Network {
    let mut network = empty();
    for (index, name) in ["web", "app", "db"].into_iter().enumerate() {
        let byte = u8::try_from(index + 1).expect("small");
        apply(&mut network, &add_cidr(name, &format!("10.42.{byte}.0/24")));
        let node = format!("{name}1");
        apply(&mut network, &add_node(&node, name));
        apply(&mut network, &Change::ActivateNode { name: parse(&node), public_key: public_key(byte) });
    }
    apply(&mut network, &allow("web-to-app", "cidr:web", "cidr:app", "tcp/8080"));
    network
}

pub(crate) fn apply(network: &mut Network, change: &Change) {
    network.apply(change).expect("a valid change");
}

pub(crate) fn id(network: &Network, name: &str) -> NodeId {
    network.node_named(&parse(name)).expect(name).id
}

/// Every node's certificate has the key hash of its id.
pub(crate) fn state(revision: u64, network: &Network) -> State {
    let mut accounts = Accounts::default();
    for id in network.nodes().keys() {
        let credential = Credential { keys: vec![key_hash(u8::try_from(id.0).expect("small"))] };
        accounts.put_credential(*id, Some(credential));
    }
    accounts.take_touched();
    let policy = Policy::compile(Revision(revision), network).expect("within limits");
    State { revision: Revision(revision), policy: Arc::new(policy), accounts: Arc::new(accounts) }
}
