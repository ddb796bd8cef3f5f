//! What nodes hear, against the slice that a stranger gets, and against the oracle.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use controller_api::convert::Followed;
use policy::{Action, Change, Flow, Generation, Network, NodeId, Revision, Slice, SliceDelta};
use tokio::sync::mpsc;

use super::dispatcher::{self, Dispatch, End, Follower, Following, Queued};
use super::report::{Report, Said};
use crate::fixture::{NOW, add_node, allow, apply, id, network, parse, public_key};
use crate::metrics::Metrics;
use crate::state::history::History;
use crate::state::{Followers, Policy};

/// No stream's queue holds more in a test that does not say so.
const ROOM: usize = 64;

/// A controller without a store and without a network.
struct World {
    network: Network,
    policy: Arc<Policy>,
    dispatch: Dispatch,
}

impl World {
    fn new() -> Self {
        let mut network = network();
        network.take_touched();
        let policy = Arc::new(Policy::compile(Revision(1), &network).expect("within limits"));
        let dispatch = start(History::new(Arc::clone(&policy)));
        Self { network, policy, dispatch }
    }

    fn id(&self, name: &str) -> NodeId {
        id(&self.network, name)
    }

    /// The next revision.
    fn publish(&mut self, changes: &[Change]) {
        changes.iter().for_each(|change| apply(&mut self.network, change));
        let rows = self.network.take_touched();
        let next = Revision(self.policy.revision.0 + 1);
        let (policy, affected) = self.policy.follow(next, &self.network, &rows).expect("within limits");
        self.policy = Arc::new(policy);
        self.dispatch.publish(Arc::clone(&self.policy), affected);
    }

    /// Returns when the dispatcher has done everything that it was asked for before.
    async fn settle(&self) {
        let (queue, _receiver) = mpsc::channel(1);
        let nobody = Follower {
            node: NodeId(9_999),
            version: String::new(),
            revision: Revision(0),
            digest: policy::Digest::default(),
            endpoint: None,
            queue,
        };
        let mut following = self.dispatch.open(nobody, NOW);
        assert_eq!((&mut following.end).await, Ok(End::Dismissed));
    }

    fn report(&self, node: NodeId) -> Report {
        self.dispatch.reports.of(node)
    }

    /// What a node that holds nothing would get.
    fn slice(&self, node: NodeId) -> Slice {
        self.policy.matrix.slice(node, self.policy.revision).expect("active")
    }
}

fn start(history: History) -> Dispatch {
    dispatcher::start(history, Metrics::new()).expect("a thread")
}

/// A node with the slice that it has been told.
struct Node {
    id: NodeId,
    following: Following,
    queue: mpsc::Receiver<Queued>,
    slice: Option<Slice>,
    endpoints: Vec<(NodeId, SocketAddr)>,
}

impl Node {
    fn open(dispatch: &Dispatch, node: NodeId, held: Option<Slice>) -> Self {
        Self::open_with(dispatch, node, held, None, ROOM)
    }

    fn open_with(
        dispatch: &Dispatch,
        node: NodeId,
        held: Option<Slice>,
        endpoint: Option<SocketAddr>,
        room: usize,
    ) -> Self {
        let (sender, queue) = mpsc::channel(room);
        let (revision, digest) = held.as_ref().map(|held| (held.revision, held.digest)).unwrap_or_default();
        let follower = Follower { node, version: "1.0".to_owned(), revision, digest, endpoint, queue: sender };
        let following = dispatch.open(follower, NOW);
        Self { id: node, following, queue, slice: held, endpoints: Vec::new() }
    }

    fn open_all(world: &World) -> Vec<Self> {
        world.network.nodes().keys().map(|node| Self::open(&world.dispatch, *node, None)).collect()
    }

    /// Reads the queue, and gives the deltas in it, which are applied.
    fn hear(&mut self) -> Vec<SliceDelta> {
        let mut heard = Vec::new();
        while let Ok(response) = self.queue.try_recv() {
            heard.extend(self.read(response));
        }
        heard
    }

    fn read(&mut self, response: Queued) -> Option<SliceDelta> {
        let Followed { update, endpoints } = response.expect("an answer").try_into().expect("can be read");
        self.endpoints.extend(endpoints);
        let delta = update?;
        match &mut self.slice {
            Some(slice) if delta.from != Revision(0) => slice.apply(delta.clone()).expect("applies"),
            slice => *slice = Some(Slice::from_snapshot(delta.clone()).expect("a snapshot")),
        }
        Some(delta)
    }

    /// Waits for one update, and leaves the next where it is.
    async fn hear_next(&mut self) -> SliceDelta {
        loop {
            let response = tokio::time::timeout(Duration::from_secs(10), self.queue.recv()).await.expect("in time");
            if let Some(delta) = self.read(response.expect("open")) {
                return delta;
            }
        }
    }

    fn hear_one(&mut self) -> SliceDelta {
        let [delta] = <[SliceDelta; 1]>::try_from(self.hear()).expect("one update");
        delta
    }

    fn slice(&self) -> &Slice {
        self.slice.as_ref().expect("was told")
    }

    fn acknowledge(&self, dispatch: &Dispatch, revision: u64, error: &str) -> Result<(), super::report::NeverSent> {
        let said = Said {
            revision: Revision(revision),
            generation: Generation(revision + 6),
            error: error.to_owned(),
            ..Said::default()
        };
        dispatch.reports.acknowledge(self.id, self.following.stream, said, NOW + revision)
    }
}

/// Every flow between two nodes has the verdict of the oracle at both ends.
fn check_verdicts(world: &World, nodes: &[Node]) {
    for node in nodes {
        let own = node.slice().local.addresses.v4().expect("dual-stack is tested in policy");
        for other in world.network.nodes().values() {
            let other = other.addresses.v4().expect("an address");
            for (source, destination) in [(own, other), (other, own)] {
                for (protocol, port) in [(6, 8080), (6, 5432), (17, 8080), (1, 8)] {
                    let flow = Flow { source: source.into(), destination: destination.into(), protocol, port };
                    let expected = policy::interpret(&world.network, &flow);
                    assert_eq!(node.slice().verdict(&flow), expected, "{flow:?} at {}", node.slice().local.name);
                }
            }
        }
    }
}

/// What it was told says what a stranger is told, but for the revision: that is the last one that concerned it.
fn check_like_a_strangers(world: &World, node: &Node) {
    let stranger = world.slice(node.id);
    node.slice().validate().expect("a closed slice");
    assert!(node.slice().revision <= stranger.revision);
    let mut slice = node.slice().clone();
    slice.revision = stranger.revision;
    assert_eq!(slice, stranger);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_reaches_the_nodes_it_affects_and_no_others() {
    let mut world = World::new();
    let mut nodes = Node::open_all(&world);
    world.settle().await;
    for node in &mut nodes {
        assert_eq!(node.hear_one().from, Revision(0));
    }
    check_verdicts(&world, &nodes);

    world.publish(&[allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432")]);
    world.settle().await;
    let heard: Vec<_> = nodes.iter_mut().map(|node| node.hear().len()).collect();
    assert_eq!(heard, [0, 1, 1], "web1 has no part in app-to-db");
    check_verdicts(&world, &nodes);
    assert_eq!(world.report(world.id("web1")).sent, Revision(1));
    assert_eq!(world.report(world.id("db1")).sent, Revision(2));

    // The next delta of a node that heard nothing builds on what it holds.
    world.publish(&[Change::DeleteRule { name: parse("web-to-app") }]);
    world.settle().await;
    let span = |delta: &SliceDelta| (delta.from.0, delta.revision.0);
    let heard: Vec<_> = nodes.iter_mut().map(|node| node.hear().iter().map(span).collect::<Vec<_>>()).collect();
    assert_eq!(heard, [vec![(1, 3)], vec![(2, 3)], vec![]]);
    check_verdicts(&world, &nodes);
}

#[tokio::test(flavor = "multi_thread")]
async fn deltas_lead_to_the_slice_that_a_stranger_gets() {
    let mut world = World::new();
    let mut nodes = Node::open_all(&world);
    let changes = [
        allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432"),
        add_node("web2", "web"),
        Change::ActivateNode { name: parse("web2"), public_key: public_key(9) },
        Change::RenameNode { from: parse("app1"), to: parse("app9") },
        Change::DisableNode { name: parse("web2") },
        allow("all", "any", "any", "icmp/8"),
        Change::DeleteRule { name: parse("web-to-app") },
        Change::EnableNode { name: parse("web2") },
        Change::RenameCidr { from: parse("web"), to: parse("www") },
    ];
    for change in &changes {
        world.publish(std::slice::from_ref(change));
        world.settle().await;
        for node in &mut nodes {
            node.hear();
            check_like_a_strangers(&world, node);
        }
        check_verdicts(&world, &nodes);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_node_gets_many_changes_as_one() {
    let mut world = World::new();
    let db = world.id("db1");
    let mut node = Node::open_with(&world.dispatch, db, None, None, 1);
    world.settle().await;
    // The snapshot fills its queue.
    for port in 1..=9 {
        world.publish(&[allow(&format!("r{port}"), "cidr:app", "cidr:db", &format!("tcp/{port}"))]);
    }
    world.settle().await;
    assert_eq!(node.hear_next().await.revision, Revision(1));
    // There is room now.
    let delta = node.hear_next().await;
    assert_eq!((delta.from, delta.revision, delta.rules.len()), (Revision(1), Revision(10), 9));
    check_like_a_strangers(&world, &node);
    assert_eq!(world.report(db).sent, Revision(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_back_goes_on_from_what_it_holds() {
    let mut world = World::new();
    let db = world.id("db1");
    let mut node = Node::open(&world.dispatch, db, None);
    world.settle().await;
    node.hear();
    let first = node.slice().clone();
    drop(node);
    world.settle().await;
    assert!(!world.report(db).connected);

    // Behind, but by nothing that concerns it: told so.
    world.publish(&[Change::RenameNode { from: parse("web1"), to: parse("web9") }]);
    let mut node = Node::open(&world.dispatch, db, Some(first.clone()));
    world.settle().await;
    let delta = node.hear_one();
    assert!(delta.is_empty() && delta.from == Revision(1), "{delta:?}");

    // Behind: a delta, also from a controller that has only just started.
    world.publish(&[allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432")]);
    for held in [&first, node.slice()] {
        let mut node = Node::open(&world.dispatch, db, Some(held.clone()));
        world.settle().await;
        let delta = node.hear_one();
        assert_eq!((delta.from, delta.rules.len()), (held.revision, 1));
        check_like_a_strangers(&world, &node);
    }

    // With something else than what that revision says, from an older policy than those that are kept, and from the
    // future of a store that was put back: everything.
    let [mut other, mut future] = [first.clone(), first.clone()];
    other.digest = policy::Digest::from_bytes([7; 16]);
    future.revision = Revision(99);
    let forgetful = start(History::new(Arc::clone(&world.policy)));
    for (dispatch, held) in [(&world.dispatch, other), (&forgetful, first), (&world.dispatch, future)] {
        let mut node = Node::open(dispatch, db, Some(held));
        let response = tokio::time::timeout(Duration::from_secs(10), node.queue.recv()).await.expect("in time");
        let followed = Followed::try_from(response.expect("open").expect("an answer")).expect("can be read");
        let delta = followed.update.expect("an update");
        assert_eq!(delta.from, Revision(0));
        node.slice = Some(Slice::from_snapshot(delta).expect("a snapshot"));
        check_like_a_strangers(&world, &node);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_stream_replaces_an_older_one() {
    let world = World::new();
    let web = world.id("web1");
    let mut old = Node::open(&world.dispatch, web, None);
    let mut new = Node::open(&world.dispatch, web, None);
    assert_eq!((&mut old.following.end).await, Ok(End::Replaced));
    drop(old);
    world.settle().await;
    assert!(world.report(web).connected, "the newer stream is still there");
    assert_eq!(new.hear_one().from, Revision(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn convergence_is_what_nodes_say_they_enforce() {
    let mut world = World::new();
    let web = world.id("web1");
    let node = Node::open(&world.dispatch, web, None);
    world.settle().await;
    node.acknowledge(&world.dispatch, 9, "").expect_err("nobody sent it");
    assert!(!world.report(web).converged());
    node.acknowledge(&world.dispatch, 1, "no room in `BLOCKS`").expect("was sent");
    assert!(!world.report(web).converged(), "a node that could not is not converged");
    node.acknowledge(&world.dispatch, 1, "").expect("was sent");
    let report = world.report(web);
    assert!(report.converged());
    assert_eq!((report.enforced, report.generation, report.last_seen), (Revision(1), Generation(7), NOW + 1));
    // A change that does not concern it changes nothing of that.
    world.publish(&[allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432")]);
    world.settle().await;
    assert!(world.report(web).converged());
    // What the node does not understand keeps it from enforcing what the policy says.
    let lacking = Said { revision: Revision(1), lacks: vec!["schedule".to_owned()], ..Said::default() };
    world.dispatch.reports.acknowledge(web, node.following.stream, lacking, NOW).expect("was sent");
    assert!(!world.report(web).converged());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_node_is_emptied_and_begins_anew_when_it_is_enabled() {
    let mut world = World::new();
    let web = world.id("web1");
    let mut node = Node::open(&world.dispatch, web, None);
    world.settle().await;
    node.hear();
    let held = node.slice().clone();
    world.publish(&[Change::DisableNode { name: parse("web1") }]);
    assert_eq!((&mut node.following.end).await, Ok(End::Dismissed));
    assert_eq!(node.hear_one().from, Revision(0));
    let last = node.slice().clone();
    assert_eq!((last.revision, &last.local.name), (Revision(2), &held.local.name));
    assert!(last.peers.is_empty() && last.prefixes.is_empty() && last.cells.is_empty());
    let flow = Flow { source: parse("10.42.1.1"), destination: parse("10.42.2.1"), protocol: 6, port: 8080 };
    assert_eq!((held.verdict(&flow).action, last.verdict(&flow).action), (Action::Allow, Action::Deny));

    // It may ask again as often as it likes.
    let mut again = Node::open(&world.dispatch, web, Some(last.clone()));
    assert_eq!((&mut again.following.end).await, Ok(End::Dismissed));
    assert_eq!(again.hear(), []);

    world.publish(&[Change::EnableNode { name: parse("web1") }]);
    for held in [held, last] {
        let mut node = Node::open(&world.dispatch, web, Some(held));
        world.settle().await;
        node.hear();
        check_like_a_strangers(&world, &node);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_hear_where_their_peers_were_seen() {
    let mut world = World::new();
    let seen = |last: u8| Some(SocketAddr::from(([192, 0, 2, last], 51_820)));
    let [web, app, db] = ["web1", "app1", "db1"].map(|name| world.id(name));
    let mut first = Node::open_with(&world.dispatch, web, None, seen(1), ROOM);
    let mut second = Node::open_with(&world.dispatch, app, None, seen(2), ROOM);
    let mut third = Node::open_with(&world.dispatch, db, None, seen(3), ROOM);
    let hears = async |node: &mut Node, peer, endpoint| {
        for _ in 0..100 {
            node.hear();
            if node.endpoints.contains(&(peer, endpoint)) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    };
    assert!(hears(&mut first, app, seen(2).expect("an endpoint")).await);
    assert!(hears(&mut second, web, seen(1).expect("an endpoint")).await);
    // `db1` has no peers, and no node has `db1` as a peer.
    third.hear();
    assert_eq!(third.endpoints, []);
    assert!(![&first, &second].iter().any(|node| node.endpoints.iter().any(|(peer, _)| *peer == db)));

    // A peer that moves, and a peer that becomes one.
    let _moved = Node::open_with(&world.dispatch, app, None, seen(9), ROOM);
    assert!(hears(&mut first, app, seen(9).expect("an endpoint")).await);
    world.publish(&[allow("web-to-db", "cidr:web", "cidr:db", "tcp/5432")]);
    assert!(hears(&mut third, web, seen(1).expect("an endpoint")).await);
    assert!(hears(&mut first, db, seen(3).expect("an endpoint")).await);
    assert!(
        first.slice().revision == Revision(2) && world.policy.revision == Revision(2),
        "no revision for an endpoint"
    );
}
