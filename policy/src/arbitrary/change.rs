//! Random changes, from small pools of names and prefixes.

use std::fmt::Debug;
use std::str::FromStr;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;

use crate::{
    Action, Change, CidrName, GroupName, MemberSpec, NodeName, Prefixes, PublicKey, RuleSpec, SelectorSpec, Service,
    ServiceName, ServiceSpec, check_prefix,
};

/// Any change, whether or not some network takes it.
pub fn change() -> impl Strategy<Value = Change> {
    let default = prop_oneof![Just(crate::DefaultPolicy::Lineage), Just(crate::DefaultPolicy::Deny)];
    prop_oneof![
        1 => default.prop_map(Change::SetDefault),
        3 => add_cidr(),
        1 => (cidr(), cidr()).prop_map(|(from, to)| Change::RenameCidr { from, to }),
        2 => (cidr(), prefixes()).prop_map(|(name, prefixes)| Change::MoveCidr { name, prefixes }),
        2 => (cidr(), any::<bool>()).prop_map(|(name, isolated)| Change::SetCidr { name, isolated }),
        1 => cidr().prop_map(|name| Change::DeleteCidr { name }),
        3 => add_node(),
        3 => activate_node(),
        1 => (node(), node()).prop_map(|(from, to)| Change::RenameNode { from, to }),
        1 => node().prop_map(|name| Change::DisableNode { name }),
        2 => node().prop_map(|name| Change::EnableNode { name }),
        1 => node().prop_map(|name| Change::DeleteNode { name }),
        1 => (node(), prop::option::of(1_u16..)).prop_map(|(name, port)| {
            let endpoint = port.map(|port| ([192, 0, 2, 7], port).into());
            Change::SetEndpoint { name, endpoint }
        }),
        2 => add_group(),
        1 => (group(), group()).prop_map(|(from, to)| Change::RenameGroup { from, to }),
        1 => group().prop_map(|name| Change::DeleteGroup { name }),
        2 => (group(), member()).prop_map(|(group, member)| Change::AddMember { group, member }),
        2 => (group(), member()).prop_map(|(group, member)| Change::RemoveMember { group, member }),
        8 => add_rule(),
        4 => named("r", 20).prop_map(|name| Change::DeleteRule { name }),
        1 => add_service(),
        1 => service_name().prop_map(|name| Change::DeleteService { name }),
    ]
}

pub(super) fn add_cidr() -> impl Strategy<Value = Change> {
    let flags = (prop::bool::weighted(0.15), prop::bool::weighted(0.25));
    (cidr(), prefixes(), flags).prop_map(|(name, prefixes, (isolated, external))| Change::AddCidr {
        name,
        prefixes,
        isolated,
        external,
    })
}

pub(super) fn add_node() -> impl Strategy<Value = Change> {
    let groups = prop::collection::vec(group(), 0..1);
    let gateway_for = prop_oneof![3 => Just(Vec::new()), 2 => prop::collection::vec(cidr(), 1..3)];
    (node(), cidr(), groups, gateway_for).prop_map(|(name, cidr, groups, gateway_for)| Change::AddNode {
        name,
        cidr,
        addresses: None,
        groups,
        gateway_for,
    })
}

pub(super) fn activate_node() -> impl Strategy<Value = Change> {
    (node(), 1_u8..16).prop_map(|(name, byte)| {
        let public_key = PublicKey::try_from([byte; PublicKey::LEN]).expect("32 bytes, not zero");
        Change::ActivateNode { name, public_key }
    })
}

pub(super) fn add_group() -> impl Strategy<Value = Change> {
    (group(), prop::collection::vec(member(), 0..4)).prop_map(|(name, members)| Change::AddGroup { name, members })
}

pub(super) fn add_service() -> impl Strategy<Value = Change> {
    let services = prop::collection::vec(service(), 1..4);
    (service_name(), services).prop_map(|(name, services)| Change::AddService { name, services })
}

pub(super) fn add_rule() -> impl Strategy<Value = Change> {
    rule().prop_map(Change::AddRule)
}

/// A rule in its author's words.
pub fn rule() -> impl Strategy<Value = RuleSpec> {
    let action = prop_oneof![3 => Just(Action::Allow), 2 => Just(Action::Deny)];
    let side = || prop::collection::vec(selector(), 1..3);
    let service =
        prop_oneof![6 => service().prop_map(ServiceSpec::Literal), 1 => service_name().prop_map(ServiceSpec::Named)];
    let services = prop::collection::vec(service, 1..4);
    let priority = select(vec![0, 0, 0, 1, -1, 7, 1_000_000, -1_000_000]);
    let flags = (prop::bool::weighted(0.25), any::<bool>());
    (named("r", 20), action, side(), side(), services, priority, flags).prop_map(
        |(name, action, from, to, services, priority, (both, log))| {
            let comment = String::new();
            RuleSpec { name, action, from, to, services, priority, both, log, comment }
        },
    )
}

/// A selector in its author's words.
pub fn selector() -> impl Strategy<Value = SelectorSpec> {
    prop_oneof![
        1 => Just(SelectorSpec::Any),
        5 => cidr().prop_map(SelectorSpec::Cidr),
        3 => node().prop_map(SelectorSpec::Node),
        2 => group().prop_map(SelectorSpec::Group),
        3 => prefix().prop_map(SelectorSpec::Prefix),
    ]
}

/// A service in any form, its ports at and around the boundaries that tables have.
pub fn service() -> impl Strategy<Value = Service> {
    let texts = [
        "any",
        "tcp",
        "udp",
        "icmp",
        "icmpv6",
        "tcp/0",
        "tcp/65535",
        "tcp/443",
        "tcp/80,443",
        "tcp/255-256",
        "tcp/256-511",
        "tcp/1-65534",
        "tcp/400-500",
        "udp/53",
        "udp/1000-2000",
        "udp/0-255",
        "udp/65535",
        "icmp/8",
        "icmp/0",
        "icmp/255",
        "icmp/0-8",
        "icmpv6/128",
        "icmpv6/255",
        "proto/47",
        "proto/0",
        "proto/255",
        "proto/132",
    ];
    let range = (select(vec!["tcp", "udp"]), any::<u16>(), any::<u16>());
    prop_oneof![
        4 => select(texts.to_vec()).prop_map(parsed::<Service>),
        1 => range.prop_map(|(name, a, b)| parsed(&format!("{name}/{}-{}", a.min(b), a.max(b)))),
    ]
}

/// A prefix of either family, from /0 to /32 or /128, likely to nest with others.
pub fn prefix() -> impl Strategy<Value = IpNet> {
    prop_oneof![prefix_v4(), prefix_v6()]
}

fn prefixes() -> impl Strategy<Value = Prefixes> {
    let of = |nets: Vec<IpNet>| Prefixes::from_nets(nets).expect("one of each family");
    prop_oneof![
        3 => (prefix_v4(), prefix_v6()).prop_map(move |(v4, v6)| of(vec![v4, v6])),
        2 => aligned().prop_map(move |(v4, v6)| of(vec![v4, v6])),
        2 => prefix_v4().prop_map(move |v4| of(vec![v4])),
        2 => prefix_v6().prop_map(move |v6| of(vec![v6])),
    ]
}

/// A pair as people choose it, which nests in both families alike.
fn aligned() -> impl Strategy<Value = (IpNet, IpNet)> {
    let texts = [
        ("10.42.0.0/16", "fd42::/48"),
        ("10.42.1.0/24", "fd42:0:0:1::/64"),
        ("10.42.1.0/25", "fd42:0:0:1::/80"),
        ("10.42.1.128/25", "fd42:0:0:1:8000::/65"),
        ("10.42.2.0/24", "fd42:0:0:2::/64"),
        ("192.168.0.0/16", "2001:db8::/32"),
        ("192.168.1.0/24", "2001:db8:1::/48"),
    ];
    select(texts.to_vec()).prop_map(|(v4, v6)| (parsed(v4), parsed(v6)))
}

fn prefix_v4() -> impl Strategy<Value = IpNet> {
    let addresses = [
        "10.42.0.0",
        "10.42.0.0",
        "10.42.1.0",
        "10.42.1.0",
        "10.42.1.128",
        "10.42.1.1",
        "10.42.2.0",
        "10.42.255.255",
        "10.0.0.0",
        "10.255.255.255",
        "192.168.0.0",
        "192.168.1.0",
        "192.168.1.77",
        "172.16.0.0",
    ];
    let lengths = [0, 1, 8, 9, 15, 16, 16, 17, 23, 24, 24, 25, 28, 29, 30, 31, 32];
    cut(&addresses, &lengths)
}

fn prefix_v6() -> impl Strategy<Value = IpNet> {
    let addresses = [
        "fd42::",
        "fd42::",
        "fd42:0:0:1::",
        "fd42:0:0:1::",
        "fd42:0:0:1::1",
        "fd42:0:0:1:8000::",
        "fd42:0:0:2::",
        "fd42:0:0:ffff:ffff:ffff:ffff:ffff",
        "fd00::",
        "fdff:ffff::",
        "2001:db8::",
        "2001:db8:1::",
    ];
    let lengths = [0, 1, 8, 9, 16, 47, 48, 48, 49, 63, 64, 64, 65, 80, 96, 112, 120, 126, 127, 128];
    cut(&addresses, &lengths)
}

fn cut(addresses: &[&'static str], lengths: &[u8]) -> impl Strategy<Value = IpNet> + use<> {
    (select(addresses.to_vec()), select(lengths.to_vec())).prop_filter_map("reserved", |(address, length)| {
        let prefix = IpNet::new(parsed(address), length).expect("a length of the family").trunc();
        check_prefix(prefix).ok()
    })
}

fn cidr() -> BoxedStrategy<CidrName> {
    named("c", 10)
}

fn node() -> BoxedStrategy<NodeName> {
    named("n", 7)
}

fn group() -> BoxedStrategy<GroupName> {
    named("g", 4)
}

fn service_name() -> BoxedStrategy<ServiceName> {
    named("s", 3)
}

fn member() -> impl Strategy<Value = MemberSpec> {
    prop_oneof![2 => node().prop_map(MemberSpec::Node), 1 => cidr().prop_map(MemberSpec::Cidr)]
}

fn named<T: FromStr<Err: Debug> + Debug + 'static>(letter: &'static str, count: u32) -> BoxedStrategy<T> {
    (0..count).prop_map(move |number| parsed(&format!("{letter}{number}"))).boxed()
}

fn parsed<T: FromStr<Err: Debug>>(text: &str) -> T {
    text.parse().expect("made to be parsed")
}
