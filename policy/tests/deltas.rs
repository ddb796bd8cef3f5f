//! Deltas: `old.apply(old.diff(new)) == new`, through any sequence of changes.

use policy::{
    Action, Cell, Cells, Change, ClassId, DefaultPolicy, DeltaError, Matrix, Network, NodeId, Peer, Prefixes,
    PublicKey, Revision, RuleId, RuleSpec, Slice, SliceCidr, SliceDelta, SliceRule, arbitrary, interpret,
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
                let Some(new) = matrix.slice(node, revision) else { continue };
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

    /// Breaks if a delta that is checked by what it touches is judged otherwise than the whole slice would be.
    #[test]
    fn what_a_delta_touches_is_judged_as_the_whole_slice_is(
        (network, changes) in arbitrary::history(12),
        spoils in prop::collection::vec((0..SPOILS, any::<prop::sample::Index>(), any::<prop::sample::Index>()), 12),
    ) {
        let mut network = network;
        let mut held: std::collections::BTreeMap<NodeId, (Slice, Slice)> = Default::default();
        for (number, change) in changes.iter().enumerate() {
            let _refused = network.apply(change);
            let matrix = Matrix::compile(&network).unwrap();
            for &node in network.nodes().keys() {
                let old = held.remove(&node);
                let Some(new) = matrix.slice(node, Revision(number as u64 + 1)) else { continue };
                let mut followed = counted(&new);
                if let Some((built, counted)) = old {
                    let good = built.diff(&new);
                    for (kind, a, b) in &spoils {
                        let bad = arbitrary::sealed(Some(&built), spoiled(&built, good.clone(), *kind, a, b));
                        let (mut whole, mut touched) = (built.clone(), counted.clone());
                        prop_assert_eq!(touched.apply(bad.clone()), whole.apply(bad), "kind {}", kind);
                        prop_assert_eq!(touched, whole);
                    }
                    followed = counted;
                    followed.apply(good).unwrap();
                }
                held.insert(node, (new, followed));
            }
        }
    }

    /// Breaks if a change that does not concern a node gives it something to hear: the same slice again is no delta.
    #[test]
    fn an_unchanged_slice_has_an_empty_delta(network in arbitrary::network()) {
        let matrix = Matrix::compile(&network).unwrap();
        for &node in network.nodes().keys() {
            let Some(old) = matrix.slice(node, Revision(1)) else { continue };
            let new = matrix.slice(node, Revision(2)).unwrap();
            prop_assert!(old.diff(&new).is_empty());
        }
    }
}

/// The slice as a node has it that follows: what is counted of it is at hand.
fn counted(slice: &Slice) -> Slice {
    let mut counted = Slice::from_snapshot(slice.to_delta()).unwrap();
    let (revision, digest) = (slice.revision, slice.digest);
    let nothing = SliceDelta { from: revision, base: digest, revision, digest, ..SliceDelta::default() };
    counted.apply(nothing).unwrap();
    counted
}

const SPOILS: usize = 19;

/// A delta with something more in it, which is wrong more often than not.
fn spoiled(
    old: &Slice,
    mut delta: SliceDelta,
    kind: usize,
    a: &prop::sample::Index,
    b: &prop::sample::Index,
) -> SliceDelta {
    fn pick<T: Clone>(all: impl IntoIterator<Item = T>, index: &prop::sample::Index) -> Option<T> {
        let all: Vec<T> = all.into_iter().collect();
        (!all.is_empty()).then(|| index.get(&all).clone())
    }
    let rule = pick(&old.rules, a).map(|(id, rule)| (*id, rule.clone()));
    let peer = pick(&old.peers, a).map(|(id, peer)| (*id, peer.clone()));
    let class = |index| pick(old.prefixes.values(), index).map_or(ClassId(1), |(class, _)| *class);
    let cell = pick(old.cells.values(), b).unwrap_or(&Cell::CLOSED).clone();
    let of_rule = |action, rule| Cell::uniform(policy::Verdict::of_rule(action, RuleId(rule)));
    let set = |sources, destinations, cell| Cells { sources: vec![sources], destinations: vec![destinations], cell };
    let other_key = PublicKey::try_from([99; 32]).unwrap();
    match (kind, rule, peer) {
        (0, Some((id, _)), _) => delta.removed_rules.extend([id]),
        (1, Some((id, rule)), _) => {
            let action = if rule.action == Action::Allow { Action::Deny } else { Action::Allow };
            delta.rules.extend([(id, SliceRule { action, ..rule })]);
        }
        (2, _, _) => delta.rules.clear(),
        (3, Some((_, rule)), _) => delta.rules.extend([(RuleId(0), rule)]),
        (4, _, _) => delta.removed_cidrs.extend(pick(old.cidrs.keys().copied(), a)),
        (5, _, _) => delta.cidrs.extend([(policy::CidrId(0), other_cidr(old))]),
        (6, _, Some((_, peer))) => delta.peers.extend([(NodeId(9_999), peer)]),
        (7, _, Some((_, peer))) => delta.peers.extend([(NodeId(9_999), Peer { public_key: other_key, ..peer })]),
        (8, _, Some((id, peer))) => {
            delta.removed_peers.extend([id]);
            delta.peers.remove(&id);
            delta.peers.extend([(old.local.node, peer)]);
        }
        (9, _, Some((id, _))) => delta.removed_peers.extend([id]),
        (10, _, _) => delta.cells.push(set(class(a), class(b), cell)),
        (11, _, _) => delta.cells.push(set(class(a), class(b), of_rule(Action::Allow, 9_999))),
        (12, _, _) => delta.removed_prefixes.extend(pick(old.prefixes.keys().copied(), a)),
        (13, _, Some((id, mut peer))) => {
            std::sync::Arc::make_mut(&mut peer.allowed_ips).extend(["10.42.9.1/24".parse::<ipnet::IpNet>().unwrap()]);
            delta.peers.extend([(id, peer)]);
        }
        // Nothing is wrong with these.
        (14, _, Some((id, peer))) => delta.peers.extend([(id, Peer { endpoint: None, public_key: other_key, ..peer })]),
        (15, Some((id, _)), Some(_)) => {
            let mut free = old.rules[&id].clone();
            free.log = !free.log;
            delta.rules.extend([(id, free)]);
        }
        (16, _, Some((_, peer))) => {
            let mut local = (*old.local).clone();
            local.gateway_for.extend(peer.allowed_ips.iter());
            delta.local = Some(local);
        }
        (17, _, _) => {
            let net: ipnet::IpNet = "10.42.9.0/24".parse().unwrap();
            delta.prefixes.extend([(net, (class(a), policy::CidrId(9_999)))]);
        }
        // A rule of the other action, in a cell of its own, or in the place of one.
        (18, Some((id, rule)), _) => {
            let action = if rule.action == Action::Allow { Action::Deny } else { Action::Allow };
            delta.cells.push(set(class(a), class(b), of_rule(action, id.0)));
        }
        _ => {}
    }
    delta
}

/// A cidr like one of the slice, elsewhere.
fn other_cidr(old: &Slice) -> SliceCidr {
    let prefixes = Prefixes::from_nets(["10.42.250.0/24".parse().unwrap()]).unwrap();
    let is_routed = old.cidrs.values().any(|cidr| cidr.is_routed);
    SliceCidr { name: "other".parse().unwrap(), prefixes, is_routed }
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
        action: Action::Allow,
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

fn slice(network: &Network, node: &str, revision: u64) -> Slice {
    let node = network.node_named(&node.parse().unwrap()).unwrap().id;
    Matrix::compile(network).unwrap().slice(node, Revision(revision)).unwrap()
}

/// Breaks if one rule between two cidrs costs more than that rule and its cell, or is heard where it does not matter.
#[test]
fn one_rule_is_one_rule_and_one_cell() {
    let mut network = triangle();
    allow(&mut network, "ping", "any", "any", "icmp");
    let old: Vec<Slice> = ["web1", "app1", "db1"].iter().map(|node| slice(&network, node, 1)).collect();
    let rule = allow(&mut network, "web-to-app", "cidr:web", "cidr:app", "tcp/8080");
    for (node, old) in ["web1", "app1"].iter().zip(&old) {
        let new = slice(&network, node, 2);
        let delta = old.diff(&new);
        assert_eq!(delta.rules.keys().copied().collect::<Vec<_>>(), [rule]);
        assert_eq!(delta.cells.len(), 1);
        let nothing_else = SliceDelta { rules: Default::default(), cells: Vec::new(), ..delta.clone() };
        assert!(nothing_else.is_empty(), "{nothing_else:#?}");
        let back = new.diff(&slice(&network, node, 3));
        assert!(back.is_empty());
    }
    assert!(old[2].diff(&slice(&network, "db1", 2)).is_empty());
}

/// Breaks if what concerns others is told to a node, or two nodes that share a class are told apart for nothing.
#[test]
fn a_slice_holds_what_concerns_its_node() {
    let mut network = triangle();
    allow(&mut network, "a", "node:app1", "node:db1", "tcp/1");
    allow(&mut network, "b", "10.42.2.128/25", "cidr:db", "tcp/2");
    let web = slice(&network, "web1", 1);
    assert_eq!(web.rules.len(), 0);
    assert_eq!(web.cells.len(), 0);
    assert_eq!(web.prefixes.len(), 6 + 2, "one prefix per cidr and family, and its own: {:?}", web.prefixes);
    assert_eq!(web.peers.len(), 0);
    let app = slice(&network, "app1", 1);
    assert_eq!(app.rules.len(), 1, "app1 is not in the upper half of its cidr");
    assert_eq!(app.peers.len(), 1);
    let db = slice(&network, "db1", 1);
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
    let old = slice(&network, "web1", 7);
    allow(&mut network, "second", "cidr:web", "cidr:app", "tcp/2");
    let new = slice(&network, "web1", 8);
    let good = old.diff(&new);
    let check = |what: &str, spoil: &dyn Fn(&mut SliceDelta)| {
        let mut delta = good.clone();
        spoil(&mut delta);
        let (from, revision) = (delta.from, delta.revision);
        let delta = SliceDelta { from, revision, ..arbitrary::sealed(Some(&old), delta) };
        for mut held in [old.clone(), counted(&old)] {
            let error = held.apply(delta.clone()).expect_err(what);
            assert!(!error.to_string().is_empty());
            assert_eq!(held, old, "{what}: half-applied");
        }
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
    check("a prefix is removed that is not told apart", &|delta| {
        delta.removed_prefixes.extend(old.prefixes.keys().take(1));
    });
    check("a prefix is of the node's own class", &|delta| {
        let cidr = *old.cidrs.keys().next().unwrap();
        delta.prefixes.extend([("10.42.2.9/32".parse().unwrap(), (ClassId::OWN, cidr))]);
    });
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
        let other = old.prefixes[&"10.42.2.0/24".parse::<ipnet::IpNet>().unwrap()].0;
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
    assert!(matches!(Slice::from_snapshot(arbitrary::sealed(None, whole)), Err(DeltaError::Cell(_))));
}

/// Breaks if a delta that was made for another slice of the same revision is applied: two controllers may have given one
/// number to two revisions.
#[test]
fn a_delta_for_another_slice_of_the_same_revision_is_refused() {
    let (mut here, mut there) = (triangle(), triangle());
    allow(&mut here, "here", "cidr:web", "cidr:app", "tcp/1");
    allow(&mut there, "there", "cidr:web", "cidr:app", "tcp/2");
    let held = slice(&here, "web1", 7);
    let old = slice(&there, "web1", 7);
    allow(&mut there, "second", "cidr:app", "cidr:web", "tcp/3");
    let delta = old.diff(&slice(&there, "web1", 8));
    for mut slice in [held.clone(), counted(&held)] {
        assert!(matches!(slice.apply(delta.clone()), Err(DeltaError::Base { .. })));
        assert_eq!(slice, held);
        // One that says otherwise leads to another digest than it names.
        let lying = SliceDelta { base: held.digest, ..delta.clone() };
        assert!(matches!(slice.apply(lying), Err(DeltaError::Digest { .. })));
        assert_eq!(slice, held);
    }
}
