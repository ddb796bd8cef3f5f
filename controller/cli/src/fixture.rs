//! A small network that the tests of all nouns print.

use policy::{Action, Addresses, Change, DefaultPolicy, Network, Prefixes, PublicKey, RuleSpec};

pub(crate) fn network() -> Network {
    let mut network =
        Network::new(name("corp"), prefixes(&["10.42.0.0/16", "fd42::/48"]), DefaultPolicy::Deny).expect("a network");
    for change in changes() {
        network.apply(&change).expect("a valid change");
    }
    network
}

fn changes() -> Vec<Change> {
    let cidr = |cidr: &str, nets: &[&str], isolated, external| Change::AddCidr {
        name: name(cidr),
        prefixes: prefixes(nets),
        isolated,
        external,
    };
    vec![
        cidr("corp", &["10.42.0.0/16", "fd42::/48"], false, false),
        cidr("web", &["10.42.1.0/24", "fd42:0:0:1::/64"], false, false),
        cidr("app", &["10.42.2.0/24", "fd42:0:0:2::/64"], false, false),
        cidr("db", &["10.42.3.0/24", "fd42:0:0:3::/64"], true, false),
        cidr("office", &["192.168.7.0/24"], false, true),
        Change::AddGroup { name: name("front"), members: vec!["cidr:web".parse().expect("a member")] },
        node("web1", "web", "10.42.1.1", "fd42:0:0:1::1", &["front"], &[]),
        node("web2", "web", "10.42.1.2", "fd42:0:0:1::2", &[], &[]),
        node("app1", "app", "10.42.2.1", "fd42:0:0:2::1", &[], &["office"]),
        node("db1", "db", "10.42.3.1", "fd42:0:0:3::1", &[], &[]),
        Change::ActivateNode { name: name("web1"), public_key: key(1) },
        Change::ActivateNode { name: name("app1"), public_key: key(2) },
        Change::SetEndpoint { name: name("web1"), endpoint: Some("192.0.2.1:51820".parse().expect("an address")) },
        Change::AddService {
            name: name("ping"),
            services: vec!["icmp/8".parse().expect("a service"), "icmpv6/128".parse().expect("a service")],
        },
        rule("web-to-app", Action::Allow, "group:front", "cidr:app", &["tcp/8080", "service:ping"], 0),
        rule("app-to-db", Action::Allow, "cidr:app", "cidr:db", &["tcp/5432"], 0),
        rule("no-web2", Action::Deny, "node:web2", "cidr:app", &["tcp/8080"], 10),
    ]
}

pub(crate) fn name<T: std::str::FromStr<Err = policy::NameError>>(text: &str) -> T {
    text.parse().expect("a name")
}

fn prefixes(texts: &[&str]) -> Prefixes {
    Prefixes::from_nets(texts.iter().map(|text| text.parse().expect("a prefix"))).expect("prefixes")
}

fn key(byte: u8) -> PublicKey {
    PublicKey::try_from(&[byte; 32][..]).expect("a key")
}

fn node(node: &str, cidr: &str, v4: &str, v6: &str, groups: &[&str], gateway_for: &[&str]) -> Change {
    let addresses = Addresses::new(v4.parse().ok(), v6.parse().ok()).expect("addresses");
    Change::AddNode {
        name: name(node),
        cidr: name(cidr),
        addresses: Some(addresses),
        groups: groups.iter().map(|group| name(group)).collect(),
        gateway_for: gateway_for.iter().map(|cidr| name(cidr)).collect(),
    }
}

fn rule(rule: &str, action: Action, from: &str, to: &str, services: &[&str], priority: i32) -> Change {
    Change::AddRule(RuleSpec {
        name: name(rule),
        action,
        from: vec![from.parse().expect("a selector")],
        to: vec![to.parse().expect("a selector")],
        services: services.iter().map(|service| service.parse().expect("a service")).collect(),
        priority,
        both: false,
        log: action == Action::Deny,
        comment: String::new(),
    })
}
