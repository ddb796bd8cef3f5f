//! Small networks for directed cases.

use std::net::IpAddr;

use policy::{Action, Change, DefaultPolicy, Flow, Network, NodeId, Prefixes, PublicKey, RuleSpec};

/// `web` (10.42.1.0/24, fd42:0:0:1::/64) with nodes `web1` and `web2`, `db` (10.42.2.0/24, fd42:0:0:2::/64) with `db1`, and
/// the external `lan` (192.168.0.0/16, 2001:db8::/32) behind `db1`. Nothing is allowed.
pub fn small() -> Network {
    let roots = prefixes("10.42.0.0/16", "fd42::/48");
    let mut network = Network::new("corp".parse().expect("a name"), roots, DefaultPolicy::Deny).expect("no objects");
    for (name, v4, v6, external) in [
        ("web", "10.42.1.0/24", "fd42:0:0:1::/64", false),
        ("db", "10.42.2.0/24", "fd42:0:0:2::/64", false),
        ("lan", "192.168.0.0/16", "2001:db8::/32", true),
    ] {
        let name = name.parse().expect("a name");
        apply(&mut network, Change::AddCidr { name, prefixes: prefixes(v4, v6), isolated: false, external });
    }
    for (number, (name, cidr, gateway_for)) in
        [("web1", "web", None), ("web2", "web", None), ("db1", "db", Some("lan"))].into_iter().enumerate()
    {
        apply(
            &mut network,
            Change::AddNode {
                name: name.parse().expect("a name"),
                cidr: cidr.parse().expect("a name"),
                addresses: None,
                groups: Vec::new(),
                gateway_for: gateway_for.map(|name: &str| name.parse().expect("a name")).into_iter().collect(),
            },
        );
        let key = [number as u8 + 1; 32];
        let public_key = PublicKey::try_from(key.as_slice()).expect("a key");
        apply(&mut network, Change::ActivateNode { name: name.parse().expect("a name"), public_key });
    }
    network
}

fn prefixes(v4: &str, v6: &str) -> Prefixes {
    Prefixes::from_nets([v4, v6].map(|net| net.parse().expect("a prefix"))).expect("one of each")
}

fn apply(network: &mut Network, change: Change) {
    network.apply(&change).expect("a valid change");
}

/// With the lineage default.
pub fn lineage(mut network: Network) -> Network {
    apply(&mut network, Change::SetDefault(DefaultPolicy::Lineage));
    network
}

/// With one more rule.
pub fn with_rule(mut network: Network, name: &str, action: Action, from: &str, to: &str, service: &str) -> Network {
    apply(
        &mut network,
        Change::AddRule(RuleSpec {
            name: name.parse().expect("a name"),
            action,
            from: vec![from.parse().expect("a selector")],
            to: vec![to.parse().expect("a selector")],
            services: vec![service.parse().expect("a service")],
            priority: 0,
            both: false,
            log: false,
            comment: String::new(),
        }),
    );
    network
}

/// With one more rule that allows.
pub fn allowing(network: Network, name: &str, from: &str, to: &str, service: &str) -> Network {
    with_rule(network, name, Action::Allow, from, to, service)
}

/// The node of a name.
pub fn node(network: &Network, name: &str) -> NodeId {
    network.node_named(&name.parse().expect("a name")).expect("it is there").id
}

/// The flow between two addresses in words: "10.42.1.1", "10.42.2.1", "tcp/443".
pub fn flow(source: &str, destination: &str, service: &str) -> Flow {
    let address = |text: &str| text.parse::<IpAddr>().expect("an address");
    let (protocol, port) = policy::parse_flow_service(service).expect("a service");
    Flow { source: address(source), destination: address(destination), protocol, port }
}

/// The first address of `web1` and of `db1`, one of `web2`, and one behind `db1`, in each family.
pub const ENDS: [[&str; 4]; 2] = [
    ["10.42.1.1", "10.42.2.1", "10.42.1.2", "192.168.7.7"],
    ["fd42:0:0:1::1", "fd42:0:0:2::1", "fd42:0:0:1::2", "2001:db8:7::7"],
];
