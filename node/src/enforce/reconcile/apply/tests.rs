//! The executor on fakes, with a failure at every step.

use std::collections::BTreeSet;

use policy::{Network, Slice};

use super::*;
use crate::enforce;
use crate::enforce::reconcile::plan::{Desired, plan};
use crate::fixture;
use crate::kernel::Backend;
use crate::kernel::fake::FakeKernel;
use crate::lower::{RuleSlots, lower};

struct Node {
    kernel: FakeKernel,
    slots: RuleSlots,
}

impl Node {
    fn new() -> Self {
        Self { kernel: FakeKernel::new(Backend::Userspace), slots: RuleSlots::new() }
    }

    /// One round towards a slice.
    fn round(&mut self, slice: &Slice) -> Outcome {
        let tables = lower(slice, &mut self.slots).unwrap();
        let desired = desired(slice);
        let (mut wireguard, mut link, mut datapath) =
            (self.kernel.wireguard(), self.kernel.link(), self.kernel.datapath());
        let mut kernel = Kernel { wireguard: &mut wireguard, link: &mut link, datapath: &mut datapath };
        let observed = kernel.observe().unwrap();
        let steps = plan(Some(&desired), &observed);
        apply(&mut kernel, &fixture::key("web1"), Some(&tables), steps)
    }

    /// Rounds until there is nothing left to do.
    fn settle(&mut self, slice: &Slice) {
        for _ in 0..4 {
            let outcome = self.round(slice);
            if outcome.done.is_empty() && outcome.failed.is_empty() {
                return;
            }
        }
        panic!("it does not settle");
    }
}

fn desired(slice: &Slice) -> Desired {
    let mut desired = enforce::desired(slice, fixture::public_key("web1"), None);
    desired.listen_port = 51_820;
    desired.mtu = 1_420;
    desired
}

/// Before: web1 speaks to app1. After: only to db1.
fn slices() -> (Network, std::sync::Arc<Slice>, std::sync::Arc<Slice>) {
    let mut network = fixture::network();
    let before = fixture::slice(&network, "web1", 1);
    network.apply(&policy::Change::DeleteRule { name: "web-to-app".parse().unwrap() }).unwrap();
    fixture::allow(&mut network, "web-to-db", "cidr:web", "cidr:db", "tcp/5432");
    let after = fixture::slice(&network, "web1", 2);
    (network, before, after)
}

#[test]
fn a_slice_is_put_in_force_and_the_second_round_finds_nothing_to_do() {
    let (_, before, after) = slices();
    let mut node = Node::new();
    node.settle(&before);
    let keys = |node: &Node| node.kernel.world().device.as_ref().unwrap().peers.keys().copied().collect::<Vec<_>>();
    assert_eq!(keys(&node), [fixture::public_key("app1")]);
    node.settle(&after);
    assert_eq!(keys(&node), [fixture::public_key("db1")]);
    assert_eq!(node.kernel.world().violations, [""; 0]);
}

/// With a failure at each step in turn, from an empty machine and from a running one: the link is never up without
/// programs, the tables switch unless they or the programs cannot be had, no peer of the new policy is there under the old
/// tables or beside one that should have gone, and the next rounds repair everything.
#[test]
fn a_failure_at_any_step_leaves_nothing_half_applied() {
    let (_, before, after) = slices();
    for start in [None, Some(&before)] {
        for at in 0.. {
            let mut node = Node::new();
            if let Some(slice) = start {
                node.settle(slice);
            }
            node.kernel.take_steps();
            node.kernel.fail_after(at);
            let outcome = node.round(&after);
            let Some((failed, _)) = outcome.failed.first() else {
                assert!(at >= 3, "the plan has fewer steps than it must have");
                break;
            };
            let datapath = matches!(failed, Step::CreateLink | Step::AttachDatapath | Step::SwitchTables(_));
            let revision = node.kernel.world().datapath.as_ref().map(|datapath| datapath.revision);
            assert_eq!(revision == Some(after.revision), !datapath, "after a failure to {failed}");
            check_peers(&node, &before, &after, failed);
            node.kernel.world().fail_at = None;
            node.settle(&after);
            let device = node.kernel.world().device.clone().unwrap();
            assert_eq!(device.peers.into_keys().collect::<BTreeSet<_>>(), keys(&after));
            assert_eq!(node.kernel.world().violations, [""; 0]);
        }
    }
}

fn keys(slice: &Slice) -> BTreeSet<policy::PublicKey> {
    slice.peers.values().map(|peer| peer.public_key).collect()
}

fn check_peers(node: &Node, before: &Slice, after: &Slice, failed: &Step) {
    let world = node.kernel.world();
    let Some(device) = &world.device else { return };
    let switched = world.datapath.as_ref().is_some_and(|datapath| datapath.revision == after.revision);
    let allowed = match failed {
        Step::RemovePeer(_) => keys(before),
        _ if switched => keys(after),
        _ => keys(before),
    };
    let peers: BTreeSet<_> = device.peers.keys().copied().collect();
    assert!(peers.is_subset(&allowed), "after a failure to {failed}: {peers:?}");
}

/// Whatever else is broken for good, what was revoked is denied after the round.
#[test]
fn no_other_trouble_holds_a_revocation_back() {
    let (mut network, before, _) = slices();
    for change in ["web-to-db", "app-to-db"] {
        network.apply(&policy::Change::DeleteRule { name: change.parse().unwrap() }).unwrap();
    }
    let after = fixture::slice(&network, "web1", 2);
    for refused in ["set device", "set mtu", "remove peer", "remove route", "remove address", "add", "up", "set peer"] {
        let mut node = Node::new();
        node.settle(&before);
        {
            let mut world = node.kernel.world();
            world.refuse = Some(refused);
            world.device.as_mut().unwrap().listen_port = 1;
            let link = world.link.as_mut().unwrap();
            (link.up, link.mtu) = (false, 9_000);
            link.routes = ["10.77.0.0/16".parse().unwrap()].into();
            link.addresses = ["10.77.0.1/32".parse().unwrap()].into();
            world.barriers.clear();
        }
        let outcome = node.round(&after);
        assert!(!outcome.failed.is_empty() || refused == "set peer", "nothing was refused that begins with {refused}");
        assert_eq!(node.kernel.world().tables.as_ref().unwrap().revision, after.revision, "{refused}");
    }
}

#[test]
fn no_peer_comes_while_one_that_should_have_gone_is_there() {
    let (_, before, after) = slices();
    let mut node = Node::new();
    node.settle(&before);
    node.kernel.world().refuse = Some("remove peer");
    let outcome = node.round(&after);
    assert!(matches!(outcome.failed[..], [(Step::RemovePeer(_), _)]));
    assert!(matches!(outcome.skipped[..], [Step::SetPeer(_)]));
}

#[test]
fn a_process_that_does_not_start_is_not_configured() {
    let (_, before, after) = slices();
    let mut node = Node::new();
    node.settle(&before);
    node.kernel.world().device = None;
    node.kernel.world().refuse = Some("serve");
    let outcome = node.round(&after);
    assert_eq!(outcome.done, [Step::SwitchTables(after.revision)]);
    assert!(matches!(outcome.skipped[..], [Step::SetDevice { .. }, Step::SetPeer(_)]));
}

#[test]
fn one_peer_that_the_kernel_refuses_does_not_keep_the_others_out() {
    let mut network = fixture::network();
    fixture::allow(&mut network, "web-to-db", "cidr:web", "cidr:db", "tcp/5432");
    let slice = fixture::slice(&network, "web1", 3);
    let mut node = Node::new();
    // The first `set peer` of a fresh interface.
    let mut dry = Node::new();
    dry.round(&slice);
    let first = dry.kernel.take_steps().iter().position(|step| step.starts_with("set peer")).unwrap();
    node.kernel.fail_after(first);
    let outcome = node.round(&slice);
    assert_eq!(outcome.failed.len(), 1);
    assert!(outcome.skipped.is_empty() && outcome.error().unwrap().contains("set peer"));
    assert_eq!(node.kernel.world().device.as_ref().unwrap().peers.len(), 1);
}

#[test]
fn a_link_whose_programs_cannot_be_attached_again_goes_down() {
    let (_, before, _) = slices();
    let mut node = Node::new();
    node.settle(&before);
    node.kernel.world().datapath.as_mut().unwrap().egress = false;
    node.kernel.take_steps();
    node.kernel.fail_after(0);
    let outcome = node.round(&before);
    assert!(matches!(outcome.failed[..], [(Step::AttachDatapath, _)]));
    assert!(!node.kernel.world().link.as_ref().unwrap().up);
    node.kernel.world().fail_at = None;
    node.settle(&before);
    assert!(node.kernel.world().link.as_ref().unwrap().up);
}
