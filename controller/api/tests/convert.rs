//! Everything that goes over the wire comes back as it was, and what no policy has a word for is refused.

use controller_api::{ConvertError, v1};
use ipnet::IpNet;
use policy::{
    Action, Addresses, Cell, CellEntry, Cells, Change, CidrId, ClassId, DefaultPolicy, Digest, Local, Matrix, Mode,
    Network, NetworkParts, NodeId, Peer, Prefixes, PublicKey, Reason, Revision, Rule, RuleId, RuleSpec, Selector,
    ServiceRange, SliceCidr, SliceDelta, SliceRule, Verdict,
};
use prost::Message;

fn text<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("a valid text")
}

fn key(byte: u8) -> PublicKey {
    PublicKey::try_from(&[byte; 32][..]).expect("a key")
}

fn prefixes(texts: &[&str]) -> Prefixes {
    Prefixes::from_nets(texts.iter().map(|net| text::<IpNet>(net))).expect("prefixes")
}

fn addresses(v4: &str, v6: &str) -> Addresses {
    Addresses::new(v4.parse().ok(), v6.parse().ok()).expect("addresses")
}

/// Every change that an admin can ask for, in an order that a network accepts.
fn changes() -> Vec<Change> {
    let rule = |name: &str, action, from: &str, to: &str, service: &str| {
        Change::AddRule(RuleSpec {
            name: text(name),
            action,
            from: vec![text(from)],
            to: vec![text(to)],
            services: vec![text(service), text("icmp/8")],
            priority: -7,
            both: true,
            log: true,
            comment: "why".to_owned(),
        })
    };
    vec![
        Change::SetDefault(DefaultPolicy::Lineage),
        Change::AddCidr {
            name: text("web"),
            prefixes: prefixes(&["10.42.1.0/24", "fd42:0:0:1::/64"]),
            isolated: true,
            external: false,
        },
        Change::AddCidr {
            name: text("app"),
            prefixes: prefixes(&["10.42.2.0/24", "fd42:0:0:2::/64"]),
            isolated: false,
            external: false,
        },
        Change::AddCidr { name: text("old"), prefixes: prefixes(&["10.42.9.0/24"]), isolated: false, external: false },
        Change::AddCidr {
            name: text("office"),
            prefixes: prefixes(&["192.168.7.0/24"]),
            isolated: false,
            external: true,
        },
        Change::MoveCidr { name: text("old"), prefixes: prefixes(&["10.42.8.0/24"]) },
        Change::SetCidr { name: text("old"), isolated: true },
        Change::RenameCidr { from: text("old"), to: text("older") },
        Change::DeleteCidr { name: text("older") },
        Change::AddGroup { name: text("front"), members: vec![text("cidr:web")] },
        Change::AddNode {
            name: text("web1"),
            cidr: text("web"),
            addresses: Some(addresses("10.42.1.7", "fd42:0:0:1::7")),
            groups: vec![text("front")],
            gateway_for: vec![text("office")],
        },
        Change::AddNode {
            name: text("app0"),
            cidr: text("app"),
            addresses: None,
            groups: Vec::new(),
            gateway_for: Vec::new(),
        },
        Change::RenameNode { from: text("app0"), to: text("app1") },
        Change::DisableNode { name: text("app1") },
        Change::EnableNode { name: text("app1") },
        Change::SetEndpoint { name: text("web1"), endpoint: Some(text("[2001:db8::1]:51820")) },
        Change::SetEndpoint { name: text("app1"), endpoint: None },
        Change::AddMember { group: text("front"), member: text("node:app1") },
        Change::RemoveMember { group: text("front"), member: text("node:app1") },
        Change::RenameGroup { from: text("front"), to: text("fronts") },
        Change::AddService { name: text("site"), services: vec![text("tcp/80,443"), text("udp/443")] },
        rule("by-group", Action::Allow, "group:fronts", "cidr:app", "service:site"),
        rule("by-node", Action::Deny, "node:app1", "10.42.0.0/16", "proto/47"),
        rule("by-any", Action::Allow, "any", "fd42::/48", "any"),
        rule("gone", Action::Allow, "cidr:web", "any", "any"),
        Change::DeleteRule { name: text("gone") },
        Change::AddService { name: text("gone"), services: vec![text("any")] },
        Change::DeleteService { name: text("gone") },
        Change::AddGroup { name: text("gone"), members: Vec::new() },
        Change::DeleteGroup { name: text("gone") },
        Change::AddNode {
            name: text("gone"),
            cidr: text("app"),
            addresses: None,
            groups: Vec::new(),
            gateway_for: Vec::new(),
        },
        Change::DeleteNode { name: text("gone") },
    ]
}

fn network() -> Network {
    let roots = prefixes(&["10.42.0.0/16", "fd42::/48"]);
    let mut network = Network::new(text("corp"), roots, DefaultPolicy::Deny).expect("a network");
    let joined =
        [("web1", 1), ("app1", 2)].map(|(name, byte)| Change::ActivateNode { name: text(name), public_key: key(byte) });
    for change in changes().iter().chain(&joined) {
        network.apply(change).unwrap_or_else(|error| panic!("{change:?}: {error}"));
    }
    network
}

/// Over the wire: encoded and decoded again.
fn wire<M: Message + Default>(message: &M) -> M {
    M::decode(&message.encode_to_vec()[..]).expect("what was encoded")
}

#[test]
fn a_network_comes_back_as_it_was() {
    let network = network();
    let back = Network::try_from(wire(&v1::Network::from(&network))).expect("a network");
    assert_eq!(back.to_parts(), network.to_parts());
    let parts = network.to_parts();
    assert_eq!(NetworkParts::try_from(wire(&v1::Network::from(&parts))).expect("parts"), parts);
}

#[test]
fn every_change_comes_back_as_it_was() {
    for change in changes() {
        let sent = v1::Change::try_from(&change).expect("an admin's change");
        assert_eq!(Change::try_from(wire(&sent)).expect("a change"), change);
    }
}

#[test]
fn what_is_the_controllers_own_no_admin_can_ask_for() {
    let change = Change::ActivateNode { name: text("web1"), public_key: key(1) };
    assert!(v1::Change::try_from(&change).is_err(), "{change:?}");
}

#[test]
fn an_endpoint_that_an_older_controller_observed_is_not_configured() {
    let mut network = v1::Network::from(&network());
    let node = network.nodes.iter_mut().find(|node| node.name == "web1").expect("a node");
    assert!(node.endpoint_fixed);
    node.endpoint_fixed = false;
    let network = Network::try_from(network).expect("a network");
    assert_eq!(network.node_named(&text("web1")).expect("a node").endpoint, None);
}

#[test]
fn a_rule_keeps_what_comes_later() {
    let mut rule: Rule = network().rules().values().next().expect("a rule").clone();
    rule.mode = Mode::Audit;
    rule.expires_at = Some(1_800_000_000);
    rule.schedule = Some("mon-fri 08:00-18:00".to_owned());
    rule.from = [Selector::Any, Selector::Cidr(CidrId(3)), Selector::Prefix(text("fd42::/48"))].into();
    assert_eq!(Rule::try_from(wire(&v1::Rule::from(&rule))).expect("a rule"), rule);
}

#[test]
fn the_slices_of_a_network_come_back_as_they_were() {
    let network = network();
    let matrix = Matrix::compile(&network).expect("a matrix");
    for node in network.nodes().keys() {
        let delta = matrix.slice(*node, Revision(9)).expect("an active node").to_delta();
        assert_eq!(SliceDelta::try_from(wire(&v1::Update::from(&delta))).expect("a delta"), delta);
    }
}

#[test]
fn a_delta_comes_back_as_it_was() {
    let delta = delta();
    assert_eq!(SliceDelta::try_from(wire(&v1::Update::from(&delta))).expect("a delta"), delta);
}

/// With something in every field.
fn delta() -> SliceDelta {
    let verdict = Verdict { action: Action::Deny, reason: Reason::Rule, rule: Some(RuleId(4)) };
    let entry = |protocol, low, high, verdict| CellEntry { range: ServiceRange { protocol, low, high }, verdict };
    let peer = |endpoint: Option<&str>| Peer {
        name: text("db1"),
        public_key: key(3),
        endpoint: endpoint.map(text),
        seen: None,
        allowed_ips: std::sync::Arc::new([text("10.42.3.1/32"), text("192.168.0.0/16")].into()),
    };
    SliceDelta {
        from: Revision(8),
        base: Digest::from_bytes([7; 16]),
        revision: Revision(u64::MAX),
        digest: Digest::from_bytes([9; 16]),
        local: Some(Local {
            node: NodeId(1),
            name: text("web1"),
            network: text("corp"),
            addresses: addresses("10.42.1.7", ""),
            roots: prefixes(&["10.42.0.0/16"]),
            is_split: true,
            external_routes: Default::default(),
            gateway_for: [text("192.168.7.0/24"), text("2001:db8::/32")].into(),
            requires: ["schedule".to_owned()].into(),
        }),
        peers: [(NodeId(2), peer(None)), (NodeId(3), peer(Some("[2001:db8::1]:51820")))].into(),
        removed_peers: [NodeId(4)].into(),
        cidrs: [(CidrId(5), SliceCidr { name: text("web"), prefixes: prefixes(&["10.42.1.0/24"]), is_routed: true })]
            .into(),
        removed_cidrs: [CidrId(6)].into(),
        rules: [(
            RuleId(4),
            SliceRule { name: text("r"), action: Action::Deny, log: true, requires: ["moon".to_owned()].into() },
        )]
        .into(),
        removed_rules: [RuleId(8)].into(),
        prefixes: [(text("10.42.1.0/24"), (ClassId(1), CidrId(5))), (text("::/0"), (ClassId(2), CidrId(5)))].into(),
        removed_prefixes: [text("10.42.9.0/24")].into(),
        cells: vec![Cells {
            sources: vec![ClassId(1)],
            destinations: vec![ClassId(1), ClassId(2)],
            cell: Cell {
                otherwise: Verdict::LINEAGE,
                entries: vec![entry(6, 0, 65535, verdict), entry(17, 53, 53, Verdict::NO_RULE)],
            },
        }],
    }
}

/// Takes a good message, spoils it, and expects an error that names the field.
fn spoil<M, T>(good: &M, spoil: impl FnOnce(&mut M), field: &str)
where
    M: Clone,
    T: TryFrom<M, Error = ConvertError> + std::fmt::Debug,
{
    let mut bad = good.clone();
    spoil(&mut bad);
    let error = T::try_from(bad).expect_err(field).to_string();
    assert!(error.contains(field), "`{error}` does not name `{field}`");
}

#[test]
fn malformed_objects_are_refused_by_field() {
    let network = v1::Network::from(&network());
    let check = |change: &dyn Fn(&mut v1::Network), field: &str| spoil::<_, Network>(&network, change, field);
    check(&|network| network.name = "Corp".to_owned(), "network.name");
    check(&|network| network.roots = None, "network.roots");
    check(&|network| network.default = 0, "network.default");
    check(&|network| network.default = 99, "network.default");
    check(&|network| network.cidrs[0].id = 0, "cidr.id");
    check(&|network| network.cidrs[0].prefixes = Some(v1::Prefixes::default()), "prefixes");
    check(&|network| network.nodes[0].public_key = vec![1; 31], "node.public_key");
    check(&|network| network.nodes[0].public_key = vec![0; 32], "node.public_key");
    check(&|network| network.nodes[0].state = 7, "node.state");
    check(&|network| network.nodes[0].endpoint = "here".to_owned(), "node.endpoint");
    check(&|network| network.nodes[0].addresses = None, "node.addresses");
    check(&|network| network.nodes[0].gateway_for = vec![3, 3], "node.gateway_for");
    check(&|network| network.groups[0].nodes = vec![0], "group.nodes");
    check(&|network| network.services[0].services = vec!["tcp/70000".to_owned()], "service.services");
    check(&|network| network.rules[0].from = vec![v1::Selector::default()], "selector.kind");
    check(&|network| network.rules[0].services = vec!["service:web".to_owned()], "rule.services");
    check(&|network| network.rules[0].mode = 0, "rule.mode");
    check(&|network| network.rules[0].action = 3, "rule.action");
    let prefix = |network: &mut v1::Network, change: &dyn Fn(&mut v1::Prefix)| {
        change(network.cidrs[0].prefixes.as_mut().and_then(|prefixes| prefixes.v4.as_mut()).expect("a prefix"));
    };
    check(&|network| prefix(network, &|prefix| prefix.address = vec![10, 42, 1].into()), "prefix.address");
    check(&|network| prefix(network, &|prefix| prefix.length = 33), "prefix.length");
    check(&|network| prefix(network, &|prefix| prefix.length = 256), "prefix.length");
    check(&|network| prefix(network, &|prefix| prefix.address = vec![10, 42, 1, 1].into()), "write `10.42.1.0/24`");
    check(&|network| prefix(network, &|prefix| prefix.address = vec![0; 16].into()), "prefixes.v4");
}

#[test]
fn objects_that_make_no_network_together_are_refused() {
    let mut network = v1::Network::from(&network());
    network.cidrs[1].name = network.cidrs[0].name.clone();
    assert!(matches!(Network::try_from(network), Err(ConvertError::Network(_))));
}

#[test]
fn malformed_deltas_are_refused_by_field() {
    let update = v1::Update::from(&delta());
    let check = |change: &dyn Fn(&mut v1::Update), field: &str| spoil::<_, SliceDelta>(&update, change, field);
    check(&|update| update.local.as_mut().expect("local").node = 0, "local.node");
    check(&|update| update.local.as_mut().expect("local").roots = None, "local.roots");
    check(&|update| update.peers[0].public_key.clear(), "peer.public_key");
    check(&|update| update.peers[1].node = 2, "update.peers");
    check(&|update| update.peers[1].endpoint = "x".to_owned(), "peer.endpoint");
    check(&|update| update.removed_peers[0] = 0, "update.removed_peers");
    check(&|update| update.prefixes[0].class = 0, "prefix.class");
    check(&|update| update.prefixes[1] = update.prefixes[0].clone(), "update.prefixes");
    check(&|update| update.rules[0].name.clear(), "rule.name");
    check(&|update| update.cidrs[0].prefixes = None, "cidr.prefixes");
    check(&|update| update.base.truncate(15), "update.base");
    check(&|update| update.digest.push(0), "update.digest");
    check(&|update| update.cells[0].sources[0] = 0, "cells.sources");
    check(&|update| update.cells[0].otherwise = None, "cells.otherwise");
    check(&|update| update.cells[0].entries[0].protocol = 256, "entry.protocol");
    check(&|update| update.cells[0].entries[0].high = 65_536, "entry.high");
    check(&|update| update.cells[0].entries[1].low = 54, "entry.high");
    check(&|update| update.cells[0].entries[0].verdict.as_mut().expect("a verdict").rule = 0, "verdict.rule");
    check(&|update| update.cells[0].otherwise.as_mut().expect("a verdict").rule = 4, "verdict.rule");
    check(&|update| update.cells[0].otherwise.as_mut().expect("a verdict").reason = 9, "verdict.reason");
}

#[test]
fn a_change_that_says_nothing_is_refused() {
    assert!(matches!(Change::try_from(v1::Change::default()), Err(ConvertError::Missing { .. })));
    let rule = v1::AddRule { name: "r".to_owned(), action: 1, from: vec!["cdir:web".to_owned()], ..Default::default() };
    let error = RuleSpec::try_from(rule).expect_err("a mistyped selector").to_string();
    assert!(error.contains("cdir:web") && error.contains("cidr:web"), "{error}");
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_network_and_its_slices_come_back(network in policy::arbitrary::network()) {
        let back = Network::try_from(wire(&v1::Network::from(&network))).expect("a network");
        proptest::prop_assert_eq!(back.to_parts(), network.to_parts());
        let matrix = Matrix::compile(&network).expect("a matrix");
        for node in network.nodes().keys() {
            if let Some(slice) = matrix.slice(*node, Revision(1)) {
                let delta = slice.to_delta();
                let back = SliceDelta::try_from(wire(&v1::Update::from(&delta))).expect("a delta");
                proptest::prop_assert_eq!(back, delta);
            }
        }
    }

    #[test]
    fn any_change_comes_back(change in policy::arbitrary::change()) {
        if let Ok(sent) = v1::Change::try_from(&change) {
            proptest::prop_assert_eq!(Change::try_from(wire(&sent)).expect("a change"), change);
        }
    }
}
