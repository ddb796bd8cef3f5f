//! Bad input: each is refused with the value, the reason and the remedy, and changes nothing.

use super::*;
use crate::limit;
use crate::object::key::PublicKey;
use crate::object::node::NodeState;
use crate::object::prefix::Addresses;
use crate::object::rule::{Action, Mode, RuleSpec};

fn prefixes(texts: &str) -> Prefixes {
    Prefixes::from_nets(texts.split(' ').map(|text| text.parse().unwrap())).unwrap()
}

fn cidr(name: &str, texts: &str) -> Change {
    Change::AddCidr { name: name.parse().unwrap(), prefixes: prefixes(texts), isolated: false, external: false }
}

fn external(name: &str, texts: &str) -> Change {
    Change::AddCidr { name: name.parse().unwrap(), prefixes: prefixes(texts), isolated: false, external: true }
}

fn moved(name: &str, texts: &str) -> Change {
    Change::MoveCidr { name: name.parse().unwrap(), prefixes: prefixes(texts) }
}

fn node(name: &str, cidr: &str, addresses: &str) -> Change {
    let addresses = addresses.split_whitespace().map(|text| text.parse().unwrap());
    Change::AddNode {
        name: name.parse().unwrap(),
        cidr: cidr.parse().unwrap(),
        addresses: Addresses::from_addresses(addresses).ok(),
        groups: Vec::new(),
        gateway_for: Vec::new(),
    }
}

fn activate(name: &str, byte: u8) -> Change {
    Change::ActivateNode { name: name.parse().unwrap(), public_key: PublicKey::try_from([byte; 32]).unwrap() }
}

fn group(name: &str, members: &str) -> Change {
    let members = members.split_whitespace().map(|text| text.parse().unwrap()).collect();
    Change::AddGroup { name: name.parse().unwrap(), members }
}

/// "allow cidr:web cidr:app tcp/80"
fn rule(name: &str, text: &str) -> RuleSpec {
    let words: Vec<&str> = text.split(' ').collect();
    let &[action, from, to, service] = words.as_slice() else { panic!("{text}") };
    RuleSpec {
        name: name.parse().unwrap(),
        action: if action == "deny" { Action::Deny } else { Action::Allow },
        from: vec![from.parse().unwrap()],
        to: vec![to.parse().unwrap()],
        services: vec![service.parse().unwrap()],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    }
}

fn network() -> Network {
    let mut network =
        Network::new("corp".parse().unwrap(), prefixes("10.42.0.0/16 fd42::/48"), DefaultPolicy::Deny).unwrap();
    let gateway = Change::AddNode {
        name: "gate".parse().unwrap(),
        cidr: "app".parse().unwrap(),
        addresses: None,
        groups: vec!["ops".parse().unwrap()],
        gateway_for: vec!["lab".parse().unwrap()],
    };
    for change in [
        cidr("web", "10.42.1.0/24 fd42:0:0:1::/64"),
        cidr("app", "10.42.2.0/24 fd42:0:0:2::/64"),
        cidr("tiny", "10.42.3.0/30"),
        external("lab", "192.168.0.0/16"),
        group("ops", ""),
        group("empty", ""),
        node("web1", "web", ""),
        node("web2", "web", ""),
        gateway,
        activate("web1", 1),
        Change::AddService { name: "http".parse().unwrap(), services: vec!["tcp/80".parse().unwrap()] },
        group("edge", "cidr:web"),
        Change::AddRule(rule("web-to-app", "allow cidr:web cidr:app service:http")),
        Change::AddRule(rule("no-ops", "deny group:ops any tcp/22")),
    ] {
        network.apply(&change).unwrap();
    }
    network
}

#[track_caller]
fn refused(change: Change, expected: &str) {
    let mut network = network();
    let before = network.clone();
    let error = network.apply(&change).expect_err("is refused").to_string();
    assert!(error.contains(expected), "{error}");
    assert!(network == before, "half-applied");
}

#[track_caller]
fn taken(change: Change) -> (Network, Vec<String>) {
    let mut network = network();
    let warnings = network.apply(&change).expect("is taken");
    (network, warnings.iter().map(ToString::to_string).collect())
}

fn named<T: FromStr<Err: fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

#[test]
fn cidrs_keep_their_trees() {
    refused(cidr("web", "10.42.9.0/24"), "the name of cidr `web` is taken; choose another");
    refused(cidr("x", "10.43.0.0/24"), "`10.43.0.0/24` of cidr `x` is not inside the network's root `10.42.0.0/16`");
    refused(cidr("x", "10.42.1.0/24"), "`10.42.1.0/24` is already that of cidr `web`");
    refused(external("x", "10.42.9.0/24"), "overlaps the network's root `10.42.0.0/16`");
    refused(external("x", "0.0.0.0/0"), "overlaps the network's root");
    refused(
        cidr("x", "10.42.1.0/25 fd42:0:0:2:8000::/65"),
        "its IPv4 prefix lies in cidr `web`, its IPv6 prefix in cidr `app`",
    );
    refused(cidr("x", "10.42.1.0/25 fd42::/56"), "would contain each other");
    refused(moved("wbe", "10.42.9.0/24"), "there is no cidr `wbe`; did you mean `web`?");
    refused(
        moved("web", "10.42.9.0/24 fd42:0:0:9::/64"),
        "would no longer contain nodes `web1` and `web2`; move or delete them first",
    );
    refused(
        moved("web", "10.42.1.2/31 fd42:0:0:1::/64"),
        "would no longer contain node `web1`; move or delete it first",
    );
    refused(moved("web", "10.42.1.0/24"), "would no longer contain nodes `web1` and `web2`");
    refused(cidr("x", "10.42.1.0/25"), "the addresses of node `web1` would lie in two cidrs, `x` and `web`");
    let mut only_v4 = Network::new(named("corp"), prefixes("10.42.0.0/16"), DefaultPolicy::Deny).unwrap();
    let error = only_v4.apply(&cidr("x", "fd42::/64")).unwrap_err().to_string();
    assert!(error.contains("the network has no IPv6 root"), "{error}");
    // Between the roots and what is there, and inside what is there.
    let (network, warnings) = taken(cidr("all", "10.42.0.0/16 fd42::/48"));
    assert_eq!(warnings, [""; 0]);
    let all = network.cidr_named(&named("all")).unwrap().id;
    assert_eq!(network.children_of(all).len(), 3);
    let (_, warnings) = taken(cidr("front", "10.42.1.0/25 fd42:0:0:1::/65"));
    assert_eq!(warnings[0], "node `web1` is now in cidr `front`, before in `web`");
    taken(moved("web", "10.42.1.0/25 fd42:0:0:1::/80"));
    taken(Change::RenameCidr { from: named("web"), to: named("web") });
    refused(Change::RenameCidr { from: named("web"), to: named("app") }, "taken");
}

#[test]
fn what_is_in_use_stays_and_says_by_whom() {
    let delete_cidr = |name| Change::DeleteCidr { name: named(name) };
    refused(
        delete_cidr("web"),
        "in use by node `web1`, node `web2`, group `edge` and rule `web-to-app`; change or delete them first",
    );
    refused(delete_cidr("lab"), "cidr `lab` is in use by node `gate`; change or delete it first");
    refused(Change::DeleteNode { name: named("gate") }, "node `gate` is in use by group `ops`");
    refused(Change::DeleteGroup { name: named("ops") }, "group `ops` is in use by rule `no-ops`");
    refused(Change::DeleteService { name: named("http") }, "service `http` is in use by rule `web-to-app`");
    taken(delete_cidr("tiny"));
    taken(Change::DeleteGroup { name: named("empty") });
    taken(Change::DeleteNode { name: named("web1") });
    refused(
        Change::DeleteRule { name: named("web-to-ap") },
        "there is no rule `web-to-ap`; did you mean `web-to-app`?",
    );
}

#[test]
fn nodes_have_a_place_of_their_own() {
    refused(node("web1", "web", ""), "the name of node `web1` is taken");
    refused(node("x", "web", "10.42.1.1 fd42:0:0:1::9"), "address `10.42.1.1` is taken by node `web1`");
    refused(
        node("x", "web", "10.42.2.9 fd42:0:0:1::9"),
        "address `10.42.2.9` lies outside cidr `web` (10.42.1.0/24 fd42:0:0:1::/64)",
    );
    refused(node("x", "web", "10.42.1.9"), "has no IPv6 address, but its cidr `web` has an IPv6 prefix");
    refused(node("x", "lab", ""), "cidr `lab` is external");
    refused(node("x", "webb", ""), "did you mean `web`?");
    let (network, _) = taken(node("x", "web", ""));
    assert_eq!(network.node_named(&named("x")).unwrap().addresses.to_string(), "10.42.1.3 fd42:0:0:1::3");
    let gateway = |cidr| {
        let mut change = node("x", "web", "");
        if let Change::AddNode { gateway_for, .. } = &mut change {
            gateway_for.push(named(cidr));
        }
        change
    };
    refused(gateway("app"), "cidr `app` is not external");
    taken(gateway("lab"));
    let mut full = self::network();
    full.apply(&node("a", "tiny", "")).unwrap();
    full.apply(&node("b", "tiny", "")).unwrap();
    let error = full.apply(&node("c", "tiny", "")).unwrap_err().to_string();
    assert!(error.contains("cidr `tiny` has no free address left in `10.42.3.0/30`"), "{error}");
    full.apply(&cidr("inner", "10.42.2.0/29 fd42:0:0:2::/125")).unwrap();
    full.apply(&node("d", "app", "")).unwrap();
    assert_eq!(full.node_named(&named("d")).unwrap().addresses.to_string(), "10.42.2.8 fd42:0:0:2::8");
    let elsewhere = full.apply(&node("e", "app", "10.42.2.5 fd42:0:0:2::9")).unwrap_err().to_string();
    assert!(elsewhere.contains("is not directly in cidr `app` but in `inner`"), "{elsewhere}");
}

#[test]
fn nodes_change_their_state() {
    refused(activate("web2", 1), "already that of node `web1`");
    refused(activate("web9", 1), "there is no node `web9`; did you mean `web1`?");
    taken(activate("web1", 9));
    let (mut network, _) = taken(Change::DisableNode { name: named("web1") });
    let error = network.apply(&activate("web1", 9)).unwrap_err().to_string();
    assert_eq!(error, "node `web1` is disabled, so it cannot join; enable it first");
    network.apply(&Change::EnableNode { name: named("web1") }).unwrap();
    assert_eq!(network.node_named(&named("web1")).unwrap().state, NodeState::Active);
    network.apply(&Change::EnableNode { name: named("web2") }).unwrap();
    assert_eq!(network.node_named(&named("web2")).unwrap().state, NodeState::Invited);
    let (network, _) = taken(Change::RenameNode { from: named("web1"), to: named("web3") });
    assert!(network.node_named(&named("web1")).is_none());
    refused(Change::RenameNode { from: named("web1"), to: named("web2") }, "taken");
}

#[test]
fn rules_say_what_they_mean() {
    let add = Change::AddRule;
    refused(add(rule("web-to-app", "allow any any any")), "the name of rule `web-to-app` is taken");
    refused(add(rule("x", "allow cidr:wbe any any")), "there is no cidr `wbe`; did you mean `web`?");
    refused(add(rule("x", "allow any node:web3 any")), "there is no node `web3`; did you mean");
    refused(add(rule("x", "allow any group:opz any")), "there is no group `opz`; did you mean `ops`?");
    refused(add(rule("x", "allow any any service:htp")), "there is no service `htp`; did you mean `http`?");
    refused(
        add(rule("x", "deny any group:empty any")),
        "`group:empty` resolves to nothing, so deny rule `x` would deny nothing",
    );
    refused(add(RuleSpec { priority: 1_000_001, ..rule("x", "deny any any any") }), "it is -1000000 to 1000000");
    refused(add(RuleSpec { services: vec![], ..rule("x", "deny any any any") }), "rule `x` has no service");
    refused(add(RuleSpec { from: vec![], ..rule("x", "deny any any any") }), "rule `x` has nothing in `from`");
    refused(add(RuleSpec { to: vec![], ..rule("x", "deny any any any") }), "rule `x` has nothing in `to`");
    let from = vec![SelectorSpec::Prefix("10.0.0.1/8".parse().unwrap())];
    refused(add(RuleSpec { from, ..rule("x", "deny any any any") }), "host bits set; write `10.0.0.0/8`");
    let comment = "x".repeat(limit::MAX_COMMENT + 1);
    refused(add(RuleSpec { comment, ..rule("x", "deny any any any") }), "1025 bytes of comment are more than the 1024");
    let (_, warnings) = taken(add(rule("x", "allow any group:empty any")));
    assert_eq!(
        warnings,
        ["`group:empty` resolves to nothing, so rule `x` allows nothing until the group has a member"]
    );
    taken(add(rule("x", "deny any 172.16.0.0/12 any")));
    taken(add(rule("x", "deny 0.0.0.0/0 any any")));
    refused(Change::AddService { name: named("none"), services: vec![] }, "service `none` is empty");
    refused(Change::AddService { name: named("http"), services: vec![] }, "taken");
}

#[test]
fn groups_do_not_empty_a_deny_rule() {
    let remove = |group: &str, member: &str| Change::RemoveMember { group: named(group), member: named(member) };
    let add = |group: &str, member: &str| Change::AddMember { group: named(group), member: named(member) };
    refused(remove("ops", "node:gate"), "deny rule `no-ops` would deny nothing");
    refused(remove("ops", "node:web1"), "`node:web1` is not a member of group `ops`");
    refused(add("ops", "node:gate"), "`node:gate` is already a member of group `ops`");
    refused(add("ops", "node:gat"), "did you mean `gate`?");
    refused(add("opps", "node:gate"), "did you mean `ops`?");
    refused(group("ops", ""), "taken");
    refused(group("x", "cidr:web cidr:web"), "already a member");
    refused(Change::RenameGroup { from: named("ops"), to: named("edge") }, "taken");
    taken(remove("edge", "cidr:web"));
    let (mut network, _) = taken(add("empty", "cidr:app"));
    network.apply(&Change::AddRule(rule("x", "allow group:empty any any"))).unwrap();
    let warnings = network.apply(&remove("empty", "cidr:app")).unwrap();
    assert_eq!(warnings.len(), 1);
}

#[test]
fn parts_are_checked_whole() {
    let check = |expected: &str, spoil: &dyn Fn(&mut NetworkParts)| {
        let mut parts = network().to_parts();
        spoil(&mut parts);
        let error = Network::from_parts(parts).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    check("the expiry of node `web1` is not supported yet by this version", &|parts| {
        parts.nodes[0].expires_at = Some(1)
    });
    check("mode `audit` of rule `web-to-app` is not supported yet", &|parts| parts.rules[0].mode = Mode::Audit);
    check("the expiry of rule `web-to-app` is not supported yet", &|parts| parts.rules[0].expires_at = Some(1));
    check("the schedule of rule `web-to-app` is not supported yet", &|parts| {
        parts.rules[0].schedule = Some("daily".into())
    });
    check("cidr `web` has the id 0", &|parts| parts.cidrs[0].id = CidrId(0));
    check("but the next id to give out is 3", &|parts| parts.next_id = 3);
    check("which another has too", &|parts| parts.cidrs[1].id = parts.cidrs[0].id);
    check("the name of cidr `web` is taken", &|parts| parts.cidrs[1].name = parts.cidrs[0].name.clone());
    check("rule `web-to-app` refers to cidr", &|parts| {
        parts.rules[0].to.extend([Selector::Cidr(CidrId(99))]);
    });
    check("refers to service", &|parts| parts.services.clear());
    check("refers to group", &|parts| parts.groups.clear());
    check("lies in no cidr", &|parts| parts.cidrs.clear());
    check("group `ops` refers to node", &|parts| drop(parts.nodes.pop()));
    check("node `web1` is active but has no public key", &|parts| parts.nodes[0].public_key = None);
    check("is taken by node `web1`", &|parts| parts.nodes[1].addresses = parts.nodes[0].addresses);
    check("not external", &|parts| {
        parts.nodes[0].gateway_for.extend(parts.cidrs.iter().map(|cidr| cidr.id));
    });
    check("would deny nothing", &|parts| parts.groups[0].nodes.clear());
    check("32769 nodes are more than the 32768", &|parts| {
        parts.nodes = vec![parts.nodes[0].clone(); limit::MAX_NODES + 1]
    });
    assert_eq!(Network::from_parts(network().to_parts()), Ok(network()));
}
