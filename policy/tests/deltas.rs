//! Deltas: `old.apply(old.diff(new)) == new`, through any sequence of changes.

use policy::{
    Cell, Change, ClassId, DefaultPolicy, DeltaError, Matrix, Network, NodeId, Prefixes, PublicKey, Revision, RuleId,
    RuleSpec, Slice, SliceDelta, arbitrary, interpret,
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Breaks if a node that follows the stream ends elsewhere than one that gets the whole slice.
    #[test]
    fn a_followed_slice_is_the_built_one(
        (network, changes) in arbitrary::history(24),
        addresses in prop::collection::vec(any::<prop::sample::Index>(), 16),
    ) {
        let mut network = network;
        let mut held: std::collections::BTreeMap<NodeId, Slice> = Default::default();
        for (number, change) in changes.iter().enumerate() {
            let _refused = network.apply(change);
            let revision = Revision(number as u64 + 1);
            let matrix = Matrix::compile(&network).unwrap();
            for &node in network.nodes().keys() {
                let old = held.remove(&node);
                let Some(new) = matrix.slice(&network, revision, node, old.as_ref()) else { continue };
                prop_assert_eq!(new.validate(), Ok(()));
                let mut followed = new.clone();
                if let Some(old) = old {
                    followed = old.clone();
                    followed.apply(old.diff(&new)).unwrap();
                    prop_assert_eq!(&followed, &new);
                    let back = new.diff(&old);
                    let mut again = new.clone();
                    again.apply(back).unwrap();
                    prop_assert_eq!(&again, &old);
                }
                // Ids may differ from those of a slice made afresh; verdicts do not.
                let known = arbitrary::addresses(&network);
                let own = new.local.addresses.iter().next().unwrap();
                for address in addresses.iter().map(|index| *index.get(&known)) {
                    for (source, destination) in [(own, address), (address, own)] {
                        let flow = policy::Flow { source, destination, protocol: 6, port: 443 };
                        prop_assert_eq!(followed.verdict(&flow), interpret(&network, &flow));
                    }
                }
                held.insert(node, followed);
            }
        }
    }

    /// Breaks if a change that does not concern a node gives it something to hear: the same slice again is no delta.
    #[test]
    fn an_unchanged_slice_has_an_empty_delta(network in arbitrary::network()) {
        let matrix = Matrix::compile(&network).unwrap();
        for &node in network.nodes().keys() {
            let Some(old) = matrix.slice(&network, Revision(1), node, None) else { continue };
            let new = matrix.slice(&network, Revision(2), node, Some(&old)).unwrap();
            prop_assert!(old.diff(&new).is_empty());
        }
    }
}

/// Three cidrs with a node each, and nothing allowed.
fn triangle() -> Network {
    let roots = ["10.42.0.0/16", "fd42::/48"].map(|root| root.parse().unwrap());
    let mut network =
        Network::new("corp".parse().unwrap(), Prefixes::from_nets(roots).unwrap(), DefaultPolicy::Deny).unwrap();
    for (number, name) in [(1, "web"), (2, "app"), (3, "db")] {
        let texts = [format!("10.42.{number}.0/24"), format!("fd42:0:0:{number}::/64")];
        let prefixes = Prefixes::from_nets(texts.map(|text| text.parse().unwrap())).unwrap();
        let (cidr, node): (policy::CidrName, policy::NodeName) =
            (name.parse().unwrap(), format!("{name}1").parse().unwrap());
        let public_key = PublicKey::try_from([number; 32]).unwrap();
        for change in [
            Change::AddCidr { name: cidr.clone(), prefixes, isolated: false, external: false },
            Change::AddNode { name: node.clone(), cidr, addresses: None, groups: vec![], gateway_for: vec![] },
            Change::ActivateNode { name: node, public_key },
        ] {
            network.apply(&change).unwrap();
        }
    }
    network
}

fn allow(network: &mut Network, name: &str, from: &str, to: &str, service: &str) -> RuleId {
    let rule = RuleSpec {
        name: name.parse().unwrap(),
        action: policy::Action::Allow,
        from: vec![from.parse().unwrap()],
        to: vec![to.parse().unwrap()],
        services: vec![service.parse().unwrap()],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    };
    network.apply(&Change::AddRule(rule)).unwrap();
    network.rule_named(&name.parse().unwrap()).unwrap().id
}

fn slice(network: &Network, node: &str, revision: u64, previous: Option<&Slice>) -> Slice {
    let node = network.node_named(&node.parse().unwrap()).unwrap().id;
    Matrix::compile(network).unwrap().slice(network, Revision(revision), node, previous).unwrap()
}

/// Breaks if one rule between two cidrs costs more than that rule and its cell, or is heard where it does not matter.
#[test]
fn one_rule_is_one_rule_and_one_cell() {
    let mut network = triangle();
    allow(&mut network, "ping", "any", "any", "icmp");
    let old: Vec<Slice> = ["web1", "app1", "db1"].iter().map(|node| slice(&network, node, 1, None)).collect();
    let rule = allow(&mut network, "web-to-app", "cidr:web", "cidr:app", "tcp/8080");
    for (node, old) in ["web1", "app1"].iter().zip(&old) {
        let new = slice(&network, node, 2, Some(old));
        let delta = old.diff(&new);
        assert_eq!(delta.rules.keys().copied().collect::<Vec<_>>(), [rule]);
        assert_eq!(delta.cells.len(), 1);
        let nothing_else = SliceDelta { rules: Default::default(), cells: Vec::new(), ..delta.clone() };
        assert!(nothing_else.is_empty(), "{nothing_else:#?}");
        let back = new.diff(&slice(&network, node, 3, Some(&new)));
        assert!(back.is_empty());
    }
    assert!(old[2].diff(&slice(&network, "db1", 2, Some(&old[2]))).is_empty());
}

/// Breaks if what concerns others is told to a node, or two nodes that share a class are told apart for nothing.
#[test]
fn a_slice_holds_what_concerns_its_node() {
    let mut network = triangle();
    allow(&mut network, "a", "node:app1", "node:db1", "tcp/1");
    allow(&mut network, "b", "10.42.2.128/25", "cidr:db", "tcp/2");
    let web = slice(&network, "web1", 1, None);
    assert_eq!(web.rules.len(), 0);
    assert_eq!(web.cells.len(), 0);
    assert_eq!(web.prefixes.len(), 6, "one prefix per cidr and family: {:?}", web.prefixes);
    assert_eq!(web.peers.len(), 0);
    let app = slice(&network, "app1", 1, None);
    assert_eq!(app.rules.len(), 1, "app1 is not in the upper half of its cidr");
    assert_eq!(app.peers.len(), 1);
    let db = slice(&network, "db1", 1, None);
    assert_eq!(db.rules.len(), 2);
    assert_eq!(
        db.prefixes.len(),
        6 + 2 + 1 + 2,
        "app1 and the half of app are told apart, and so is db1: {:?}",
        db.prefixes
    );
}

/// Breaks if a node would take a delta that is not meant for what it holds, or that contradicts itself.
#[test]
fn a_bad_delta_is_refused_whole() {
    let mut network = triangle();
    let first = allow(&mut network, "first", "cidr:web", "cidr:app", "tcp/1");
    let old = slice(&network, "web1", 7, None);
    allow(&mut network, "second", "cidr:web", "cidr:app", "tcp/2");
    let new = slice(&network, "web1", 8, Some(&old));
    let good = old.diff(&new);
    let check = |what: &str, spoil: &dyn Fn(&mut SliceDelta)| {
        let mut delta = good.clone();
        spoil(&mut delta);
        let mut held = old.clone();
        let error = held.apply(delta).expect_err(what);
        assert!(!error.to_string().is_empty());
        assert_eq!(held, old, "{what}: half-applied");
    };
    let unknown = ClassId(99);
    check("from another revision", &|delta| delta.from = Revision(6));
    check("from nothing", &|delta| delta.from = Revision(0));
    check("a rule is used and removed", &|delta| delta.removed_rules.extend([first]));
    check("a rule is removed that is not there", &|delta| delta.removed_rules.extend([RuleId(99)]));
    check("a peer is removed that is not there", &|delta| delta.removed_peers.extend([NodeId(99)]));
    check("a rule is not given", &|delta| delta.rules.clear());
    check("a source is unknown", &|delta| delta.cells[0].sources.push(unknown));
    check("a destination is unknown", &|delta| delta.cells[0].destinations.push(unknown));
    check("no sources", &|delta| delta.cells[0].sources.clear());
    check("a cell is set twice", &|delta| delta.cells.push(delta.cells[0].clone()));
    check("a class is removed that lives", &|delta| delta.removed_classes.push(old.cells.keys().next().unwrap().0));
    check("a class is removed that is not there", &|delta| delta.removed_classes.push(unknown));
    check("a cidr is removed that lives", &|delta| delta.removed_cidrs.extend(old.cidrs.keys().take(1)));
    check("a prefix is of an unknown cidr", &|delta| {
        delta.prefixes.extend([("10.42.9.0/24".parse().unwrap(), (ClassId(1), policy::CidrId(99)))]);
    });
    check("a prefix has host bits", &|delta| {
        delta.prefixes.extend([("10.42.9.1/24".parse().unwrap(), *old.prefixes.values().next().unwrap())]);
    });
    check("entries overlap", &|delta| {
        let entry = delta.cells[0].cell.entries[0];
        delta.cells[0].cell.entries.push(entry);
    });
    check("a cell of others", &|delta| {
        let other = old.prefixes[&"10.42.2.0/24".parse().unwrap()].0;
        delta.cells[0].sources = vec![other];
        delta.cells[0].destinations = vec![other];
    });
    check("an id is zero", &|delta| {
        let rule = delta.rules.values().next().unwrap().clone();
        delta.rules.extend([(RuleId(0), rule)]);
    });
    assert!(matches!(Slice::from_snapshot(good.clone()), Err(DeltaError::NotWhole(_))));
    let mut whole = new.to_delta();
    whole.cells[0].cell = Cell { otherwise: policy::Verdict::UNKNOWN_SOURCE, entries: Vec::new() };
    assert!(matches!(Slice::from_snapshot(whole), Err(DeltaError::Cell(_))));
}
