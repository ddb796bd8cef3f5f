//! A change that is followed leaves the kernel as a whole look would, whatever the peers, and wherever it is cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use policy::{NodeId, SliceDelta, arbitrary};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::*;
use crate::enforce::tests::Node;
use crate::fixture;
use crate::kernel::fake::World;

/// Prefixes that peers may have, some inside others.
const PREFIXES: [&str; 9] = [
    "10.42.2.1/32",
    "10.42.2.2/32",
    "10.42.2.3/32",
    "10.42.2.0/24",
    "fd42:0:0:2::1/128",
    "fd42:0:0:2::/64",
    "10.50.0.0/16",
    "10.50.1.0/24",
    "10.50.1.1/32",
];

/// One peer as a test means it: key and endpoint by number.
type Given = (u8, Option<u16>, Vec<&'static str>);

fn key(number: u8) -> PublicKey {
    PublicKey::try_from([number; 32].as_slice()).unwrap()
}

fn endpoint_of(number: u16) -> SocketAddr {
    SocketAddr::new([192, 0, 2, 1].into(), number)
}

/// The slice of `web1` with these peers, by node.
fn slice(revision: u64, peers: &BTreeMap<u32, Given>) -> Arc<Slice> {
    let whole = fixture::slice(&fixture::network(), "web1", revision).to_delta();
    let example = whole.peers.values().next().expect("web1 has a peer").clone();
    let peer = |(id, (number, endpoint, prefixes)): (&u32, &Given)| {
        let mut peer = example.clone();
        peer.name = format!("peer-{id}").parse().unwrap();
        peer.public_key = key(*number);
        peer.endpoint = endpoint.map(endpoint_of);
        peer.allowed_ips = Arc::new(prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect());
        (NodeId(100 + id), peer)
    };
    let delta = arbitrary::sealed(None, SliceDelta { peers: peers.iter().map(peer).collect(), ..whole });
    Arc::new(Slice::from_snapshot(delta).expect("a sound slice"))
}

/// Peers with keys and prefixes of their own.
fn peers() -> impl Strategy<Value = BTreeMap<u32, Given>> {
    let prefixes = subsequence(PREFIXES.to_vec(), 0..=PREFIXES.len()).prop_shuffle();
    let keys = subsequence(vec![1, 2, 3, 4, 5], 0..=4).prop_shuffle();
    let endpoints = prop::collection::vec(prop::option::of(1..4u16), 4);
    let owners = prop::collection::vec(0..4usize, PREFIXES.len());
    (keys, endpoints, prefixes, owners, select(vec![0, 1])).prop_map(|(keys, endpoints, prefixes, owners, first)| {
        let given = |(number, key): (usize, u8)| {
            let own = prefixes.iter().zip(&owners).filter(|(_, owner)| **owner == number).map(|(prefix, _)| *prefix);
            (first + number as u32, (key, endpoints[number], own.collect()))
        };
        keys.into_iter().enumerate().map(given).collect()
    })
}

/// Likewise, with an address each, none around another.
fn plain_peers() -> impl Strategy<Value = BTreeMap<u32, Given>> {
    let peer = (prop::option::of(1..4u16), 0..3usize);
    prop::collection::btree_map(0..4u32, peer, 0..4).prop_map(|peers| {
        let mut taken = BTreeSet::new();
        let given = |(id, (endpoint, prefix)): (u32, (Option<u16>, usize))| {
            let own = taken.insert(prefix).then(|| PREFIXES[prefix]);
            (id, (1 + (id as u8 + prefix as u8) % 4, endpoint, own.into_iter().collect()))
        };
        let peers: Vec<(u32, Given)> = peers.into_iter().map(given).collect();
        let mut keys = BTreeSet::new();
        peers.into_iter().filter(|(_, (key, ..))| keys.insert(*key)).collect()
    })
}

/// Flows with an end in each of the prefixes, and endpoints that WireGuard has learned.
fn use_it(world: &mut World, learned: u16) {
    let own: IpAddr = "10.42.1.1".parse().unwrap();
    for prefix in PREFIXES {
        let flow = (own, prefix.parse::<IpNet>().unwrap().addr());
        if !world.flows.contains(&flow) {
            world.flows.push(flow);
        }
    }
    if let Some(peer) = world.device.as_mut().and_then(|device| device.peers.values_mut().next()) {
        peer.endpoint = Some(endpoint_of(1_000 + learned));
    }
}

/// What is compared: everything that a change may touch.
fn seen(node: &Node) -> impl PartialEq + std::fmt::Debug {
    let world = node.kernel.world();
    let mut flows = world.flows.clone();
    flows.sort_unstable();
    let revision = world.datapath.as_ref().map(|datapath| datapath.revision);
    (world.device.clone(), world.link.clone(), flows, revision, world.tables.clone(), world.violations.clone())
}

/// The whole look that a daemon takes which knows nothing of what it did.
fn look(node: &mut Node, slice: &Arc<Slice>) {
    if let Some(intent) = &mut node.enforcer.intent {
        intent.settled = false;
    }
    node.enforcer.enforce(Arc::clone(slice));
}

fn steps_of(node: &Node) -> Vec<String> {
    let steps = node.kernel.world().steps.clone();
    steps.into_iter().filter(|step| !step.starts_with("reset")).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn what_is_followed_is_what_a_whole_look_makes(
        states in prop::collection::vec(prop_oneof![peers(), plain_peers()], 1..8),
    ) {
        let (mut following, mut looking) = (Node::new(), Node::new());
        for (number, peers) in states.iter().enumerate() {
            let slice = slice(5 + number as u64, peers);
            for node in [&mut following, &mut looking] {
                use_it(&mut node.kernel.world(), number as u16);
            }
            following.enforcer.enforce(Arc::clone(&slice));
            look(&mut looking, &slice);
            prop_assert_eq!(seen(&following), seen(&looking));
            prop_assert_eq!(following.enforced(), looking.enforced());
            following.kernel.take_steps();
            following.enforcer.round();
            prop_assert_eq!(following.kernel.take_steps(), [""; 0], "a whole look finds nothing to do");
            prop_assert_eq!(following.kept(), looking.kept());
        }
    }

    /// A step that fails, and a daemon that dies: at every step of a change.
    #[test]
    fn a_change_that_is_cut_off_is_finished_by_a_look(
        before in prop_oneof![peers(), plain_peers()],
        after in prop_oneof![peers(), plain_peers()],
    ) {
        let (before, after) = (slice(5, &before), slice(6, &after));
        let mut looking = Node::new();
        look(&mut looking, &before);
        look(&mut looking, &after);
        let keys = |slice: &Slice| slice.peers.values().map(|peer| peer.public_key).collect::<BTreeSet<_>>();
        for dies in [false, true] {
            for at in 0.. {
                let mut node = Node::new();
                node.enforcer.enforce(Arc::clone(&before));
                node.kernel.take_steps();
                if dies { node.kernel.die_after(at) } else { node.kernel.fail_after(at) };
                node.enforcer.enforce(Arc::clone(&after));
                let steps = steps_of(&node).len();
                // Under the old tables nobody comes, under the new ones nobody stays who is not meant by them.
                let world = node.kernel.world().clone();
                let switched = world.datapath.as_ref().unwrap().revision == after.revision;
                let there: BTreeSet<_> = world.device.as_ref().unwrap().peers.keys().copied().collect();
                prop_assert!(switched || there.is_subset(&keys(&before)), "{:?}", world.steps);
                if dies {
                    node.kernel.take_steps();
                    node = node.restart();
                    node.enforcer.enforce(Arc::clone(&after));
                }
                node.kernel.take_steps();
                node.enforcer.round();
                node.enforcer.round();
                let peers = |node: &Node| {
                    let peers = node.kernel.world().device.clone().unwrap().peers;
                    peers.into_iter().map(|(key, peer)| (key, peer.allowed_ips)).collect::<BTreeMap<_, _>>()
                };
                prop_assert_eq!(peers(&node), peers(&looking));
                prop_assert_eq!(node.kernel.world().datapath.as_ref().unwrap().revision, after.revision);
                prop_assert_eq!(node.enforced().error, None);
                prop_assert_eq!(node.kernel.world().violations.clone(), [""; 0]);
                if at >= steps {
                    break;
                }
            }
        }
    }
}

/// Breaks if a change is planned over all peers, or waits for a look.
#[test]
fn a_change_costs_the_steps_that_it_needs_and_no_look() {
    let mut node = Node::new();
    let peers = |list: &[(u32, Given)]| list.iter().cloned().collect::<BTreeMap<_, _>>();
    let (a, b) = ((1, (1, Some(1), vec!["10.42.2.1/32"])), (2, (2, None, vec!["10.42.2.2/32"])));
    node.enforcer.enforce(slice(5, &peers(&[a.clone(), b.clone()])));
    node.kernel.world().hide_device = true;
    let mut check = |revision: u64, list: &[(u32, Given)], steps: &[&str]| {
        node.kernel.take_steps();
        node.enforcer.enforce(slice(revision, &peers(list)));
        assert_eq!(steps_of(&node), steps.iter().map(|step| step.to_string()).collect::<Vec<_>>());
        assert_eq!(node.enforced().error, None);
        assert!(node.enforcer.is_guard_behind || list.is_empty());
    };
    let c = (3, (3, None, vec!["10.42.2.3/32"]));
    let set = |number| format!("set peer {}", key(number));
    let remove = |number| format!("remove peer {}", key(number));
    check(6, &[a.clone(), b.clone(), c.clone()], &["switch 6", &set(3)]);
    check(7, &[a.clone(), c.clone()], &[&remove(2), "switch 7"]);
    // An address that changes hands.
    let d = (2, (4, None, vec!["10.42.2.3/32"]));
    check(8, &[a.clone(), d.clone()], &[&remove(3), "switch 8", "forget flows [10.42.2.3/32]", &set(4)]);
    // News of an endpoint, and nothing else.
    let moved = (1, (1, Some(2), vec!["10.42.2.1/32"]));
    check(8, &[moved, d], &[&set(1)]);
}

#[test]
fn what_lies_around_or_inside_anothers_prefix_is_looked_at_whole() {
    let peers = |list: &[&(u32, Given)]| slice(5, &list.iter().map(|given| (*given).clone()).collect());
    let outer = (1, (1, None, vec!["10.50.0.0/16"]));
    let inner = (2, (2, None, vec!["10.50.1.1/32"]));
    let other = (3, (3, None, vec!["10.42.2.1/32"]));
    let memory = |slice: &Slice| crate::enforce::reconcile::holders::holders(slice, fixture::public_key("web1"));
    for (old, new, is_followed) in [
        (peers(&[&outer]), peers(&[&outer, &inner]), false),
        (peers(&[&inner]), peers(&[&outer, &inner]), false),
        (peers(&[&outer, &inner]), peers(&[&outer]), false),
        (peers(&[&outer, &inner]), peers(&[&outer, &inner, &other]), true),
        (peers(&[&outer]), peers(&[&outer, &other]), true),
    ] {
        let change = Change::between(&old, &new, &memory(&old), None);
        assert_eq!(change.is_some(), is_followed, "{:?} -> {:?}", old.peers, new.peers);
    }
    let (old, new) = (peers(&[&inner]), peers(&[]));
    assert_eq!(
        Change::between(&old, &new, &memory(&old), None).unwrap().holders,
        memory(&old),
        "an orphan is remembered"
    );
    let mut moved = (*old).clone();
    moved.local = Arc::new(policy::Local { name: "web2".parse().unwrap(), ..(*old.local).clone() });
    assert!(Change::between(&old, &moved, &memory(&old), None).is_none(), "the node itself is another");
}
