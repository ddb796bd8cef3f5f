//! Policies of which one node could not hold its part.

use policy::{
    Action, Bounded, Change, DefaultPolicy, LimitError, Matrix, Network, PublicKey, Revision, RuleSpec, limit,
};

fn apply(network: &mut Network, change: Change) {
    network.apply(&change).unwrap();
}

fn rule(name: String, from: &str, to: &str, service: String) -> Change {
    Change::AddRule(RuleSpec {
        name: name.parse().unwrap(),
        action: Action::Allow,
        from: vec![from.parse().unwrap()],
        to: vec![to.parse().unwrap()],
        services: vec![service.parse().unwrap()],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    })
}

/// The nodes `hub` and `other`, each in a cidr of its own.
fn network() -> Network {
    let prefixes = |text: &str| policy::Prefixes::from_nets([text.parse().unwrap()]).unwrap();
    let mut network = Network::new("corp".parse().unwrap(), prefixes("10.0.0.0/8"), DefaultPolicy::Lineage).unwrap();
    for (byte, name, prefix) in [(1, "hub", "10.1.0.0/16"), (2, "other", "10.2.0.0/16")] {
        let cidr = Change::AddCidr {
            name: name.parse().unwrap(),
            prefixes: prefixes(prefix),
            isolated: false,
            external: false,
        };
        apply(&mut network, cidr);
        let node = Change::AddNode {
            name: name.parse().unwrap(),
            cidr: name.parse().unwrap(),
            addresses: None,
            groups: Vec::new(),
            gateway_for: Vec::new(),
        };
        apply(&mut network, node);
        let public_key = PublicKey::try_from([byte; 32]).unwrap();
        apply(&mut network, Change::ActivateNode { name: name.parse().unwrap(), public_key });
    }
    network
}

/// Adds `count` clients of the hub, each with a service of its own.
fn add_clients(network: &mut Network, first: usize, count: usize) {
    for number in first..first + count {
        let client = format!("10.2.{}.{}/32", 1 + number / 256, number % 256);
        apply(network, rule(format!("r{number}"), &client, "node:hub", format!("tcp/{}", 1_000 + number)));
    }
}

/// Breaks if a node could be sent more sets of services than it has room for, or if a network that just fits is refused.
#[test]
fn a_node_with_too_many_sets_of_services_is_named() {
    let mut network = network();
    add_clients(&mut network, 0, limit::MAX_SLICE_PAGES);
    assert_eq!(Matrix::compile(&network).unwrap().check(), Ok(()));
    add_clients(&mut network, limit::MAX_SLICE_PAGES, 1);
    let matrix = Matrix::compile(&network).unwrap();
    let error = matrix.check().unwrap_err();
    assert_eq!(error.node.as_ref(), "hub");
    let what = Bounded::SlicePages;
    assert_eq!(error.limit, LimitError { what, count: limit::MAX_SLICE_PAGES + 1, limit: limit::MAX_SLICE_PAGES });
    assert!(error.limit.to_string().contains("share their services"), "{}", error.limit);
    // The node itself would have refused it.
    let node = network.node_named(&"hub".parse().unwrap()).unwrap().id;
    assert!(matrix.slice(node, Revision(1)).unwrap().validate().is_err());
}

/// Breaks if what no active node has to hold is refused.
#[test]
fn a_node_that_is_off_needs_no_room() {
    let mut network = network();
    add_clients(&mut network, 0, limit::MAX_SLICE_PAGES + 1);
    apply(&mut network, Change::DisableNode { name: "hub".parse().unwrap() });
    assert_eq!(Matrix::compile(&network).unwrap().check(), Ok(()));
}
