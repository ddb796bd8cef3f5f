//! The enforcer on a kernel in memory.

use std::path::Path;

use policy::{Action, Change, Flow, SliceRule};

use super::*;
use crate::fixture;
use crate::kernel::Backend;
use crate::kernel::fake::{FakeKernel, World};
use crate::uplink::journal::Opened;

pub(crate) struct Node {
    pub(crate) kernel: FakeKernel,
    pub(crate) enforcer: Enforcer,
    enforced: watch::Receiver<Enforced>,
    pub(crate) state_dir: tempfile::TempDir,
}

fn enforcer(kernel: &FakeKernel, opened: Opened) -> (Enforcer, watch::Receiver<Enforced>) {
    let (enforced, enforced_rx) = watch::channel(Enforced::default());
    let Opened { journal, state, error: _ } = opened;
    let setup = Setup {
        wireguard: Box::new(kernel.wireguard()),
        link: Box::new(kernel.link()),
        datapath: Box::new(kernel.datapath()),
        guard: crate::enforce::guard::Watch::none(),
        key: fixture::key("web1"),
        journal,
        listen_port: 51_820,
        mtu: 1_420,
        persistent_keepalive: None,
        reconcile_interval: Duration::from_secs(2),
        slots: state.as_ref().map(|state| state.slots.clone()),
        holders: state.map(|state| state.holders).unwrap_or_default(),
        time: 0,
    };
    (Enforcer::new(setup, enforced, watch::channel(Arc::default()).0), enforced_rx)
}

fn empty(state_dir: &Path) -> Opened {
    Opened { journal: Journal::new(state_dir.to_owned()), state: None, error: None }
}

impl Node {
    pub(crate) fn new() -> Self {
        let (kernel, state_dir) = (FakeKernel::new(Backend::Kernel), tempfile::tempdir().unwrap());
        let (mut enforcer, enforced) = enforcer(&kernel, empty(state_dir.path()));
        enforcer.round();
        Self { kernel, enforcer, enforced, state_dir }
    }

    /// The daemon is killed and another one started.
    pub(crate) fn restart(self) -> Self {
        let Self { kernel, enforcer: former, state_dir, .. } = self;
        let slice = former.intent.as_ref().map(|intent| Arc::clone(&intent.slice));
        drop(former);
        let node = slice.as_ref().map(|slice| slice.local.node);
        let opened = node.map_or_else(|| empty(state_dir.path()), |node| Journal::open(state_dir.path(), node));
        assert!(opened.error.is_none(), "{:?}", opened.error);
        let slice = opened.state.as_ref().map(|state| Arc::clone(&state.slice));
        let (mut enforcer, enforced) = enforcer(&kernel, opened);
        enforcer.round();
        if let Some(slice) = slice {
            enforcer.resume(slice);
        }
        Self { kernel, enforcer, enforced, state_dir }
    }

    pub(crate) fn enforced(&self) -> Enforced {
        self.enforced.borrow().clone()
    }

    /// What the next daemon would begin with, but for what depends on the moment.
    pub(crate) fn kept(&self) -> Option<(Arc<Slice>, Holders, BTreeMap<RuleId, u32>)> {
        let node = self.enforcer.intent.as_ref()?.slice.local.node;
        let state = Journal::open(self.state_dir.path(), node).state?;
        Some((state.slice, state.holders, state.slots.pairs()))
    }

    fn state(&self) -> Option<Arc<Slice>> {
        let node = self.enforcer.intent.as_ref()?.slice.local.node;
        let Opened { state, error, .. } = Journal::open(self.state_dir.path(), node);
        assert!(error.is_none(), "{error:?}");
        state.map(|state| state.slice)
    }
}

#[test]
fn before_the_first_policy_the_link_is_there_closed_and_down() {
    let node = Node::new();
    let world = node.kernel.world();
    assert!(!world.link.as_ref().unwrap().up);
    assert!(world.datapath.as_ref().unwrap().egress && world.datapath.as_ref().unwrap().ingress);
    assert_eq!(*node.enforced.borrow(), Enforced::default());
}

#[test]
fn what_is_acknowledged_is_in_force_and_on_disk() {
    let mut node = Node::new();
    let slice = fixture::slice(&fixture::network(), "web1", 5);
    node.enforcer.enforce(Arc::clone(&slice));
    let enforced = node.enforced.borrow().clone();
    assert_eq!((enforced.revision, enforced.generation, enforced.error), (Revision(5), Generation(1), None));
    assert_eq!(node.kernel.world().datapath.as_ref().unwrap().revision, Revision(5));
    assert_eq!(node.state().as_ref(), Some(&slice));
    assert!(node.enforcer.repairs.is_empty(), "a change is no drift");
}

#[test]
fn drift_is_repaired_and_counted_and_a_quiet_round_does_nothing() {
    let mut node = Node::new();
    node.enforcer.enforce(fixture::slice(&fixture::network(), "web1", 5));
    node.enforcer.round();
    assert!(node.enforcer.repairs.is_empty());
    node.kernel.world().device.as_mut().unwrap().peers.clear();
    node.kernel.world().datapath.as_mut().unwrap().egress = false;
    node.kernel.world().datapath.as_mut().unwrap().generation = Generation(9);
    node.enforcer.round();
    assert_eq!(node.enforcer.repairs, [("attachment", 1), ("peer", 1), ("tables", 1)].into());
    assert_eq!(node.enforced.borrow().generation, Generation(10));
    node.kernel.take_steps();
    node.enforcer.round();
    assert_eq!(node.kernel.take_steps(), [""; 0]);
}

#[test]
fn somebody_who_got_ahead_is_drift_of_a_kind_of_its_own() {
    use crate::kernel::{Attachment, Program};
    let mut node = Node::new();
    node.enforcer.enforce(fixture::slice(&fixture::network(), "web1", 5));
    let ahead = Program {
        attachment: Attachment::Ingress,
        position: 1,
        id: Some(7),
        name: Some("tap".to_owned()),
        ours: false,
    };
    let overtaken = |world: &mut World| {
        let datapath = world.datapath.as_mut().unwrap();
        (datapath.ingress, datapath.ahead) = (false, vec![ahead]);
    };
    overtaken(&mut node.kernel.world());
    node.enforcer.round();
    assert_eq!(node.enforcer.repairs, [("order", 1)].into());
    assert!(node.kernel.world().datapath.as_ref().unwrap().ingress);
}

#[test]
fn a_refused_step_is_reported_and_the_next_round_reports_that_it_is_done() {
    let mut node = Node::new();
    let network = fixture::network();
    node.enforcer.enforce(fixture::slice(&network, "web1", 5));
    node.kernel.world().refuse = Some("switch");
    node.enforcer.enforce(fixture::slice(&network, "web1", 6));
    let enforced = node.enforced.borrow().clone();
    assert_eq!(enforced.revision, Revision(6));
    assert!(enforced.error.unwrap().contains("switch the tables to revision 6"));
    assert_eq!(node.state().unwrap().revision, Revision(5), "what is not in force is not kept");
    assert_eq!(node.enforcer.pause(Duration::from_secs(2)), RETRY);
    node.kernel.world().refuse = None;
    node.enforcer.round();
    assert_eq!(
        *node.enforced.borrow(),
        Enforced { revision: Revision(6), generation: Generation(2), error: None, lacks: Vec::new() }
    );
    assert_eq!(node.state().unwrap().revision, Revision(6));
    assert!(node.enforcer.repairs.is_empty(), "trying again is no drift");
}

/// A newer controller may send a rule with a condition of which this version knows nothing.
#[test]
fn what_is_not_understood_is_denied_and_reported() {
    let mut node = Node::new();
    let slice = fixture::slice(&fixture::network(), "web1", 5);
    let address = |slice: &Slice| slice.local.addresses.v4().unwrap().into();
    let app = fixture::slice(&fixture::network(), "app1", 5);
    let flow = Flow { source: address(&slice), destination: address(&app), protocol: 6, port: 8080 };
    assert_eq!(slice.verdict(&flow).action, Action::Allow);
    let mut newer = (*slice).clone();
    for (id, rule) in &slice.rules {
        newer.rules.insert(*id, SliceRule { requires: ["schedule".to_owned()].into(), ..rule.clone() });
    }
    node.enforcer.enforce(Arc::new(newer));
    let enforced = node.enforced.borrow().clone();
    assert_eq!((enforced.revision, enforced.error, enforced.lacks), (Revision(5), None, vec!["schedule".to_owned()]));
    assert_eq!(node.enforcer.intent.as_ref().unwrap().slice.verdict(&flow).action, Action::Deny);
    // The rule without the condition is in force as before.
    node.enforcer.enforce(fixture::slice(&fixture::network(), "web1", 6));
    assert_eq!(node.enforced.borrow().lacks, [""; 0]);
    assert_eq!(node.enforcer.intent.as_ref().unwrap().slice.verdict(&flow).action, Action::Allow);
}

/// Breaks if the policy waits for the rest of the interface, which may take long to read.
#[test]
fn a_change_of_the_policy_alone_is_in_force_before_the_rest_is_looked_at() {
    let mut node = Node::new();
    let mut network = fixture::network();
    let before = fixture::slice(&network, "web1", 5);
    node.enforcer.enforce(Arc::clone(&before));
    fixture::allow(&mut network, "more", "cidr:web", "cidr:app", "udp/53");
    let after = fixture::slice(&network, "web1", 6);
    assert!(before.peers == after.peers && before.cells != after.cells);
    // What is repaired before tables are switched in a round.
    node.kernel.world().barriers.clear();
    node.kernel.take_steps();
    node.enforcer.enforce(Arc::clone(&after));
    assert_eq!(node.kernel.take_steps(), ["switch 6"]);
    assert_eq!(
        *node.enforced.borrow(),
        Enforced { revision: Revision(6), generation: Generation(2), error: None, lacks: Vec::new() }
    );
    assert_eq!(node.state().as_ref(), Some(&after));

    // With another peer, what is withdrawn goes first.
    network.apply(&Change::DeleteRule { name: "web-to-app".parse().unwrap() }).unwrap();
    network.apply(&Change::DeleteRule { name: "more".parse().unwrap() }).unwrap();
    let last = fixture::slice(&network, "web1", 7);
    assert!(after.peers != last.peers);
    node.enforcer.round();
    let steps = node.kernel.take_steps();
    assert!(!steps.is_empty() && steps.iter().all(|step| step.starts_with("add barrier")), "{steps:?}");
    node.enforcer.enforce(last);
    let steps = node.kernel.take_steps();
    assert!(!steps[0].starts_with("switch") && steps.iter().any(|step| step.starts_with("switch")), "{steps:?}");
}

#[test]
fn a_slice_that_cannot_become_tables_leaves_the_policy_in_force() {
    let mut node = Node::new();
    let slice = fixture::slice(&fixture::network(), "web1", 5);
    node.enforcer.enforce(Arc::clone(&slice));
    let mut broken = (*slice).clone();
    broken.revision = Revision(6);
    broken.rules.clear();
    node.enforcer.enforce(Arc::new(broken));
    let enforced = node.enforced.borrow().clone();
    assert_eq!((enforced.revision, enforced.generation), (Revision(6), Generation(1)));
    assert!(enforced.error.unwrap().contains("revision 6 cannot be put in force"));
    assert_eq!(node.kernel.world().datapath.as_ref().unwrap().revision, Revision(5));
    node.enforcer.round();
    assert_eq!(node.kernel.world().datapath.as_ref().unwrap().revision, Revision(5));
}

#[test]
fn a_state_that_cannot_be_written_is_said_and_does_not_keep_the_policy_out() {
    let mut node = Node::new();
    node.enforcer.journal = Journal::new(node.state_dir.path().join("not there"));
    node.enforcer.enforce(fixture::slice(&fixture::network(), "web1", 5));
    assert_eq!(node.kernel.world().datapath.as_ref().unwrap().revision, Revision(5));
    let stale =
        |node: &Node| node.enforced.borrow().error.as_ref().is_some_and(|error| error.contains("last good state"));
    assert!(stale(&node));
    node.enforcer.round();
    assert!(stale(&node), "it is not acknowledged before it is on disk");
    node.enforcer.journal = Journal::new(node.state_dir.path().to_owned());
    node.enforcer.round();
    assert_eq!(node.enforced.borrow().error, None);
    assert_eq!(node.state().unwrap().revision, Revision(5));
}

#[test]
fn a_restarted_daemon_takes_over_and_cuts_nothing() {
    let mut node = Node::new();
    node.enforcer.enforce(fixture::slice(&fixture::network(), "web1", 5));
    let flow = ("10.42.1.1".parse().unwrap(), "10.42.2.1".parse().unwrap());
    node.kernel.world().flows.push(flow);
    node.kernel.take_steps();
    let node = node.restart();
    assert_eq!(node.kernel.take_steps(), ["attach", "switch 5"]);
    assert_eq!(node.kernel.world().flows, [flow]);
    assert_eq!(node.kernel.world().violations, [""; 0]);
}

/// What is revoked stays so: the former daemon was killed after the switch, and the disk has the policy before.
#[test]
fn a_daemon_killed_right_after_a_switch_does_not_come_back_with_the_policy_before() {
    let mut network = fixture::network();
    let mut node = Node::new();
    node.enforcer.enforce(fixture::slice(&network, "web1", 5));
    network.apply(&Change::DeleteRule { name: "web-to-app".parse().unwrap() }).unwrap();
    node.enforcer.journal = Journal::new(node.state_dir.path().join("not there"));
    node.enforcer.enforce(fixture::slice(&network, "web1", 6));
    node.kernel.take_steps();
    let mut node = node.restart();
    assert_eq!(node.kernel.take_steps(), ["attach"]);
    assert_eq!(node.enforcer.outdated, Some(Revision(5)));
    node.enforcer.round();
    assert_eq!(node.kernel.world().datapath.as_ref().unwrap().revision, Revision(6));
    // What the controller sends counts, whatever its number.
    node.enforcer.enforce(fixture::slice(&network, "web1", 4));
    assert_eq!(node.kernel.world().datapath.as_ref().unwrap().revision, Revision(4));
    assert_eq!(node.enforcer.outdated, None);
    // After a reboot the kernel has none, and the disk's is put in force.
    *node.kernel.world() = FakeKernel::new(Backend::Kernel).world().clone();
    let node = node.restart();
    assert_eq!(node.kernel.world().datapath.as_ref().unwrap().revision, Revision(4));
}

#[test]
fn a_device_that_cannot_be_read_keeps_no_policy_out_and_is_reported() {
    let network = fixture::network();
    for hide in [|world: &mut World| world.hide_device = true, |world: &mut World| world.hide_link = true] {
        let mut node = Node::new();
        node.enforcer.enforce(fixture::slice(&network, "web1", 5));
        hide(&mut node.kernel.world());
        node.kernel.take_steps();
        node.enforcer.enforce(fixture::slice(&network, "web1", 6));
        node.enforcer.round();
        assert_eq!(node.kernel.take_steps(), ["switch 6"]);
        assert!(node.enforced.borrow().error.as_ref().unwrap().contains("reading back"));
        assert_eq!(node.enforcer.pause(Duration::from_secs(2)), RETRY);
        assert!(node.enforcer.observe().is_err(), "who asks is told");
        (node.kernel.world().hide_device, node.kernel.world().hide_link) = (false, false);
        node.enforcer.round();
        let expected = Enforced { revision: Revision(6), generation: Generation(2), error: None, lacks: Vec::new() };
        assert_eq!(*node.enforced.borrow(), expected);
        assert!(node.enforcer.repairs.is_empty());
    }
}

#[test]
fn flows_die_when_their_address_changes_hands_also_over_a_gap_and_a_restart() {
    let mut network = fixture::network();
    let mut node = Node::new();
    node.enforcer.enforce(fixture::slice(&network, "web1", 5));
    let flow = ("10.42.1.1".parse().unwrap(), "10.42.2.1".parse().unwrap());
    node.kernel.world().flows.push(flow);
    let change = |network: &mut policy::Network, change: Change| drop(network.apply(&change).unwrap());
    change(&mut network, Change::DeleteNode { name: "app1".parse().unwrap() });
    node.enforcer.enforce(fixture::slice(&network, "web1", 6));
    assert_eq!(node.kernel.world().flows, [flow], "nobody has the address");
    let mut node = node.restart();
    change(
        &mut network,
        Change::AddNode {
            name: "app2".parse().unwrap(),
            cidr: "app".parse().unwrap(),
            addresses: None,
            groups: Vec::new(),
            gateway_for: Vec::new(),
        },
    );
    change(
        &mut network,
        Change::ActivateNode { name: "app2".parse().unwrap(), public_key: fixture::public_key("app2") },
    );
    node.kernel.take_steps();
    node.enforcer.enforce(fixture::slice(&network, "web1", 7));
    assert_eq!(node.kernel.world().flows, []);
    let steps = node.kernel.take_steps();
    let at = |word: &str| {
        steps.iter().position(|step| step.starts_with(word)).unwrap_or_else(|| panic!("{word}: {steps:?}"))
    };
    assert!(at("switch") < at("forget") && at("forget") < at("set peer"), "{steps:?}");
}

/// As the agent does it beside the enforcer's thread.
fn verify(node: &mut Node) -> Finding {
    let kernel = node.kernel.clone();
    let expected = node.enforcer.expected().unwrap();
    let read = || {
        let world = kernel.world();
        Ok(Some((world.datapath.as_ref().unwrap().generation, world.tables.clone().unwrap())))
    };
    let finding = expected.check(read).unwrap().expect("the generation in force");
    node.enforcer.verified(finding.clone());
    finding
}

#[test]
fn tables_that_somebody_changed_are_named_counted_and_written_anew() {
    let mut node = Node::new();
    assert!(node.enforcer.expected().unwrap_err().to_string().contains("no policy"));
    node.enforcer.enforce(fixture::slice(&fixture::network(), "web1", 5));
    assert!(verify(&mut node).verified.equal);
    assert!(node.enforcer.repairs.is_empty());
    for decision in node.kernel.world().tables.as_mut().unwrap().decisions.iter_mut() {
        decision.verdict = ebpf_common::table::ALLOW;
        decision.reason = ebpf_common::reason::LINEAGE;
        decision.rule = ebpf_common::table::NO_RULE_SLOT;
    }
    let found = verify(&mut node).verified;
    assert!(!found.equal);
    let named = |found: &crate::view::verified::Differing| found.text.contains("`web`") && found.text.contains("`app`");
    assert!(found.differences.iter().any(named), "{:?}", found.differences);
    assert_eq!(node.enforcer.repairs, [("tables", 1)].into());
    assert!(verify(&mut node).verified.equal, "they were written anew");
    let record = &node.enforcer.verifications;
    assert_eq!((record.equal, record.different), (2, 1));
    node.kernel.take_steps();
    node.enforcer.round();
    assert_eq!(node.kernel.take_steps(), [""; 0], "once is enough");
}

#[test]
fn a_finding_about_tables_that_went_meanwhile_changes_nothing() {
    let mut node = Node::new();
    let network = fixture::network();
    node.enforcer.enforce(fixture::slice(&network, "web1", 5));
    let expected = node.enforcer.expected().unwrap();
    let tables = node.kernel.world().tables.clone().unwrap();
    let empty = Tables { matrix: Default::default(), ..tables.clone() };
    let finding = expected.check(|| Ok(Some((Generation(1), empty.clone())))).unwrap().unwrap();
    node.enforcer.enforce(fixture::slice(&network, "web1", 6));
    node.enforcer.verified(finding);
    assert!(node.enforcer.repairs.is_empty());
    assert!(expected.check(|| Ok(Some((Generation(2), tables.clone())))).unwrap().is_none(), "it is of another");
    assert!(expected.check(|| Ok(None)).unwrap().is_none(), "it cannot be read in peace");
}

#[tokio::test]
async fn the_thread_answers_between_its_rounds_and_ends_with_its_last_handle() {
    let (kernel, state_dir) = (FakeKernel::new(Backend::Userspace), tempfile::tempdir().unwrap());
    let setup = Setup {
        wireguard: Box::new(kernel.wireguard()),
        link: Box::new(kernel.link()),
        datapath: Box::new(kernel.datapath()),
        guard: crate::enforce::guard::Watch::none(),
        key: fixture::key("web1"),
        journal: Journal::new(state_dir.path().to_owned()),
        listen_port: 1,
        mtu: 1_420,
        persistent_keepalive: None,
        reconcile_interval: Duration::from_secs(2),
        slots: None,
        holders: Holders::new(),
        time: 0,
    };
    let handle = start(setup);
    handle.enforce(fixture::slice(&fixture::network(), "web1", 5)).unwrap();
    let revision = handle.ask(|enforcer| enforcer.intent.as_ref().map(|intent| intent.slice.revision)).await.unwrap();
    assert_eq!(revision, Some(Revision(5)));
    assert_eq!(handle.enforced.borrow().revision, Revision(5));
}
