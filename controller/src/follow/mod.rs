//! What each node has to be told. A node's [`Follow`] computes its slice of each new state and the difference from what was
//! sent last; a node that a change does not affect hears nothing. Every node is told by a task of its own, which asks for
//! room in the node's queue first and takes the newest state then: a slow node gets several changes as one, and nobody
//! waits for it.
//!
//! Within one process a node has at most one slice per revision, because each is made from the one before, and a controller
//! begins with a revision of its own ([`Request::Start`](crate::change::Request::Start)). So a node that says which
//! revision it holds has said which class ids it knows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use policy::{Generation, NodeId, Revision, Slice, SliceDelta};
use tokio::sync::oneshot;

use crate::state::State;

/// What is known of a node while this controller runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub connected: bool,
    /// Seconds since the epoch; 0: never.
    pub last_seen: u64,
    /// The newest revision that was sent, or that the node was found to hold.
    pub sent: Revision,
    /// The newest revision that the node said it enforces.
    pub enforced: Revision,
    pub generation: Generation,
    /// Why the node could not enforce what it was sent; empty: it could.
    pub error: String,
    /// The agent's.
    pub version: String,
}

impl Report {
    /// Whether the node enforces everything that concerns it.
    pub fn converged(&self) -> bool {
        self.connected && self.error.is_empty() && self.sent != Revision(0) && self.enforced == self.sent
    }
}

/// Every node that follows, or followed.
#[derive(Clone, Debug, Default)]
pub struct Followers(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    streams: u64,
    nodes: BTreeMap<NodeId, Follower>,
}

#[derive(Debug, Default)]
struct Follower {
    stream: u64,
    report: Report,
    /// The slice that was sent last, as the node has it once it has read everything.
    slice: Option<Arc<Slice>>,
    /// Whether the stream has brought anything yet.
    greeted: bool,
    /// Dropped when a newer stream of the same node takes over.
    current: Option<oneshot::Sender<()>>,
}

impl Followers {
    pub fn new() -> Self {
        Self::default()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new stream of a node, which replaces an older one. `held`: the revision of the slice that the node has.
    pub fn open(&self, node: NodeId, held: Revision, version: String, now: u64) -> (Follow, Replaced) {
        let mut inner = self.inner();
        inner.streams += 1;
        let stream = inner.streams;
        let (sender, replaced) = oneshot::channel();
        let follower = inner.nodes.entry(node).or_default();
        follower.stream = stream;
        follower.greeted = false;
        follower.current = Some(sender);
        let error = String::new();
        follower.report = Report { connected: true, last_seen: now, version, error, ..follower.report.clone() };
        let slice = follower.slice.clone();
        let resumed = held != Revision(0) && slice.as_ref().is_some_and(|slice| slice.revision == held);
        let follow = Follow { followers: self.clone(), node, stream, slice, greeting: Some(resumed) };
        (follow, Replaced(replaced))
    }

    pub fn report(&self, node: NodeId) -> Report {
        self.inner().nodes.get(&node).map(|follower| follower.report.clone()).unwrap_or_default()
    }

    /// Connected, and converged.
    pub fn count(&self) -> (usize, usize) {
        let inner = self.inner();
        let reports = || inner.nodes.values().map(|follower| &follower.report);
        (reports().filter(|report| report.connected).count(), reports().filter(|report| report.converged()).count())
    }

    /// Forgets nodes that are gone.
    pub fn retain(&self, state: &State) {
        self.inner().nodes.retain(|node, _| state.network.nodes().contains_key(node));
    }
}

/// Is done when a newer stream of the same node has taken over.
#[derive(Debug)]
pub struct Replaced(oneshot::Receiver<()>);

impl Replaced {
    pub async fn wait(&mut self) {
        // The sender is dropped, never used.
        let _ = (&mut self.0).await;
    }
}

/// What a state means for a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing that concerns it.
    Nothing,
    Send(Box<SliceDelta>),
    /// The node has no part in the network (any more): the last word, if it is known what it was.
    Dismiss(Option<Box<SliceDelta>>),
    /// Another stream speaks for the node now.
    Replaced,
}

/// One stream of one node. The node counts as connected until this is dropped.
#[derive(Debug)]
pub struct Follow {
    followers: Followers,
    node: NodeId,
    stream: u64,
    slice: Option<Arc<Slice>>,
    /// Until the first step: whether the node holds `slice`.
    greeting: Option<bool>,
}

impl Follow {
    /// What to send, which counts as sent: the caller must have room for it.
    pub fn step(&mut self, state: &State) -> Step {
        let previous = self.slice.as_deref();
        let slice = match previous {
            Some(slice) if slice.revision == state.revision => slice.clone(),
            _ => match state.matrix.slice(&state.network, state.revision, self.node, previous) {
                Some(slice) => slice,
                None => return self.dismiss(state),
            },
        };
        let greeting = self.greeting;
        let delta = match (greeting, previous) {
            (None | Some(true), Some(previous)) => previous.diff(&slice),
            _ => slice.to_delta(),
        };
        // The first answer says that the node is up to date, if it says nothing else.
        if greeting.is_none() && delta.is_empty() {
            return Step::Nothing;
        }
        let slice = Arc::new(slice);
        let Some(()) = self.record(|follower| {
            follower.report.sent = slice.revision;
            follower.greeted = true;
            follower.slice = Some(Arc::clone(&slice));
        }) else {
            return Step::Replaced;
        };
        self.greeting = None;
        self.slice = Some(slice);
        Step::Send(Box::new(delta))
    }

    /// What a node is told that is not active any more: that it has no peers, and that nothing is allowed. Should it come
    /// back it begins anew.
    pub fn dismiss(&mut self, state: &State) -> Step {
        let last = self.slice.take().map(|slice| {
            let local = Some((*slice.local).clone());
            Box::new(SliceDelta { revision: state.revision, local, ..SliceDelta::default() })
        });
        // A node that was deleted may be forgotten already.
        self.record(|follower| {
            follower.slice = None;
            if last.is_some() {
                follower.report.sent = state.revision;
                follower.greeted = true;
            }
        });
        Step::Dismiss(last)
    }

    /// What the node said of the revision that it enforces.
    pub fn reporter(&self) -> Reporter {
        Reporter { followers: self.followers.clone(), node: self.node, stream: self.stream }
    }

    /// `None`: a newer stream speaks for the node, and nothing was recorded.
    fn record<T>(&self, action: impl FnOnce(&mut Follower) -> T) -> Option<T> {
        record(&self.followers, self.node, self.stream, action)
    }
}

fn record<T>(followers: &Followers, node: NodeId, stream: u64, action: impl FnOnce(&mut Follower) -> T) -> Option<T> {
    let mut inner = followers.inner();
    inner.nodes.get_mut(&node).filter(|follower| follower.stream == stream).map(action)
}

impl Drop for Follow {
    fn drop(&mut self) {
        self.record(|follower| {
            follower.report.connected = false;
            follower.current = None;
        });
    }
}

/// The half of a stream that listens.
#[derive(Clone, Debug)]
pub struct Reporter {
    followers: Followers,
    node: NodeId,
    stream: u64,
}

/// An acknowledgement of something that was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("revision `{acknowledged}` was acknowledged, and `{sent}` is the newest that was sent; restart `noded`")]
pub struct NeverSent {
    acknowledged: Revision,
    sent: Revision,
}

impl Reporter {
    /// Before the stream's first update a node may speak of what an earlier controller sent: that is no news.
    pub fn acknowledge(
        &self,
        revision: Revision,
        generation: Generation,
        error: &str,
        now: u64,
    ) -> Result<(), NeverSent> {
        record(&self.followers, self.node, self.stream, |follower| {
            let greeted = follower.greeted;
            let report = &mut follower.report;
            report.last_seen = now;
            if revision > report.sent && !greeted {
                return Ok(());
            }
            if revision > report.sent {
                return Err(NeverSent { acknowledged: revision, sent: report.sent });
            }
            report.error = error.chars().take(ERROR_MAX).collect();
            if error.is_empty() {
                report.enforced = revision;
                report.generation = generation;
            }
            Ok(())
        })
        .unwrap_or(Ok(()))
    }
}

/// Characters of a node's error that are kept.
pub(crate) const ERROR_MAX: usize = 500;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{NOW, add_node, allow, apply, id, network, parse, public_key, state};
    use policy::{Action, Change, Flow, Network};

    /// A node with the slice that it has been told.
    struct Node {
        follow: Follow,
        _replaced: Replaced,
        slice: Option<Slice>,
    }

    impl Node {
        fn open(followers: &Followers, node: NodeId, held: Option<Slice>) -> Self {
            let revision = held.as_ref().map_or(Revision(0), |slice| slice.revision);
            let (follow, replaced) = followers.open(node, revision, "1.0".to_owned(), NOW);
            Self { follow, _replaced: replaced, slice: held }
        }

        /// The delta of this state, applied.
        fn hear(&mut self, state: &State) -> Option<SliceDelta> {
            match self.follow.step(state) {
                Step::Nothing => None,
                Step::Send(delta) => {
                    match &mut self.slice {
                        Some(slice) if delta.from != Revision(0) => slice.apply((*delta).clone()).expect("applies"),
                        slice => *slice = Some(Slice::from_snapshot((*delta).clone()).expect("a snapshot")),
                    }
                    Some(*delta)
                }
                step => panic!("{step:?}"),
            }
        }

        fn slice(&self) -> &Slice {
            self.slice.as_ref().expect("was told")
        }
    }

    fn open_all(followers: &Followers, network: &Network) -> Vec<Node> {
        network.nodes().keys().map(|node| Node::open(followers, *node, None)).collect()
    }

    /// Every flow between two nodes has the verdict of the oracle at both ends.
    fn check_verdicts(state: &State, nodes: &[Node]) {
        for node in nodes {
            let own = node.slice().local.addresses.v4().expect("dual-stack is tested in policy");
            for other in state.network.nodes().values() {
                let other = other.addresses.v4().expect("an address");
                for (source, destination) in [(own, other), (other, own)] {
                    for (protocol, port) in [(6, 8080), (6, 5432), (17, 8080), (1, 8)] {
                        let flow = Flow { source: source.into(), destination: destination.into(), protocol, port };
                        let expected = policy::interpret(&state.network, &flow);
                        assert_eq!(node.slice().verdict(&flow), expected, "{flow:?} at {}", node.slice().local.name);
                    }
                }
            }
        }
    }

    #[test]
    fn a_change_reaches_the_nodes_it_affects_and_no_others() {
        let (followers, mut network) = (Followers::new(), network());
        let mut nodes = open_all(&followers, &network);
        let first = state(1, &network);
        for node in &mut nodes {
            assert_eq!(node.hear(&first).expect("a snapshot").from, Revision(0));
        }
        check_verdicts(&first, &nodes);

        apply(&mut network, &allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432"));
        let second = state(2, &network);
        let heard: Vec<_> = nodes.iter_mut().map(|node| node.hear(&second).is_some()).collect();
        assert_eq!(heard, [false, true, true], "web1 has no part in app-to-db");
        check_verdicts(&second, &nodes);
        assert_eq!(followers.report(id(&network, "web1")).sent, Revision(1));
        assert_eq!(followers.report(id(&network, "db1")).sent, Revision(2));

        // The next delta of a node that heard nothing builds on what it holds.
        apply(&mut network, &Change::DeleteRule { name: parse("web-to-app") });
        let third = state(3, &network);
        let heard: Vec<_> =
            nodes.iter_mut().map(|node| node.hear(&third).map(|delta| (delta.from.0, delta.revision.0))).collect();
        assert_eq!(heard, [Some((1, 3)), Some((2, 3)), None]);
        check_verdicts(&third, &nodes);
    }

    #[test]
    fn deltas_lead_to_the_slice_that_a_stranger_gets() {
        let (followers, mut network) = (Followers::new(), network());
        let mut nodes = open_all(&followers, &network);
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
        for (index, change) in changes.iter().enumerate() {
            apply(&mut network, change);
            let state = state(u64::try_from(index).expect("small") + 1, &network);
            for node in &mut nodes {
                node.hear(&state);
                node.slice().validate().expect("a closed slice");
                let id = node.slice().local.node;
                let stranger = state.matrix.slice(&network, state.revision, id, None).expect("active");
                assert_eq!(node.slice().local, stranger.local);
                assert_eq!(node.slice().peers, stranger.peers, "after {change:?}");
                assert_eq!(node.slice().rules, stranger.rules);
            }
            check_verdicts(&state, &nodes);
        }
    }

    #[test]
    fn a_slow_node_gets_many_changes_as_one() {
        let (followers, mut network) = (Followers::new(), network());
        let mut db = Node::open(&followers, id(&network, "db1"), None);
        db.hear(&state(1, &network));
        for port in 1..=9 {
            apply(&mut network, &allow(&format!("r{port}"), "cidr:app", "cidr:db", &format!("tcp/{port}")));
        }
        let newest = state(10, &network);
        let delta = db.hear(&newest).expect("a delta");
        assert_eq!((delta.from, delta.revision, delta.rules.len()), (Revision(1), Revision(10), 9));
        check_verdicts(&newest, &[db]);
    }

    #[test]
    fn a_node_that_comes_back_goes_on_from_what_it_holds() {
        let (followers, mut network) = (Followers::new(), network());
        let db = id(&network, "db1");
        let mut node = Node::open(&followers, db, None);
        node.hear(&state(1, &network));
        let held = node.slice.clone();
        drop(node);
        assert!(!followers.report(db).connected);

        // Up to date: told so.
        let mut node = Node::open(&followers, db, held.clone());
        let delta = node.hear(&state(2, &network)).expect("an answer");
        assert!(delta.is_empty() && delta.from == Revision(1), "{delta:?}");
        let held = node.slice.clone();
        drop(node);

        // Behind: a delta.
        apply(&mut network, &allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432"));
        let mut node = Node::open(&followers, db, held.clone());
        let delta = node.hear(&state(3, &network)).expect("a delta");
        assert_eq!((delta.from, delta.rules.len()), (Revision(2), 1));
        drop(node);

        // With something else than what was sent last: everything.
        let mut node = Node::open(&followers, db, held);
        assert_eq!(node.hear(&state(3, &network)).expect("a snapshot").from, Revision(0));
        drop(node);

        // To a controller that has not seen the node before: everything.
        let mut stranger = Node::open(&Followers::new(), db, None);
        assert_eq!(stranger.hear(&state(3, &network)).expect("a snapshot").from, Revision(0));
    }

    #[test]
    fn a_node_has_one_slice_per_revision() {
        let (followers, network) = (Followers::new(), network());
        let web = id(&network, "web1");
        let mut first = Node::open(&followers, web, None);
        first.hear(&state(5, &network));
        let mut second = Node::open(&followers, web, None);
        second.hear(&state(5, &network));
        assert_eq!(first.slice, second.slice);
    }

    #[tokio::test]
    async fn a_newer_stream_replaces_an_older_one() {
        let (followers, network) = (Followers::new(), network());
        let web = id(&network, "web1");
        let (mut old, mut replaced) = followers.open(web, Revision(0), String::new(), NOW);
        let (mut new, _kept) = followers.open(web, Revision(0), String::new(), NOW);
        replaced.wait().await;
        assert_eq!(old.step(&state(1, &network)), Step::Replaced);
        drop(old);
        assert!(followers.report(web).connected, "the newer stream is still there");
        assert!(matches!(new.step(&state(1, &network)), Step::Send(_)));
    }

    #[test]
    fn convergence_is_what_nodes_say_they_enforce() {
        let (followers, network) = (Followers::new(), network());
        let web = id(&network, "web1");
        let mut node = Node::open(&followers, web, None);
        let reporter = node.follow.reporter();
        reporter.acknowledge(Revision(9), Generation(1), "", NOW).expect("an earlier controller sent it");
        assert_eq!(followers.report(web).enforced, Revision(0));
        node.hear(&state(1, &network));
        reporter.acknowledge(Revision(9), Generation(1), "", NOW).expect_err("nobody sent it");
        assert_eq!(followers.count(), (1, 0));
        reporter.acknowledge(Revision(1), Generation(7), "no room in `BLOCKS`", NOW + 1).expect("was sent");
        assert_eq!(followers.count(), (1, 0), "a node that could not is not converged");
        reporter.acknowledge(Revision(1), Generation(8), "", NOW + 2).expect("was sent");
        assert_eq!(followers.count(), (1, 1));
        let report = followers.report(web);
        assert_eq!((report.enforced, report.generation, report.last_seen), (Revision(1), Generation(8), NOW + 2));
        // A change that does not concern it changes nothing of that.
        assert_eq!(node.follow.step(&state(2, &network)), Step::Nothing);
        assert_eq!(followers.count(), (1, 1));
    }

    #[test]
    fn a_disabled_node_is_emptied_and_begins_anew_when_it_is_enabled() {
        let (followers, mut network) = (Followers::new(), network());
        let web = id(&network, "web1");
        let mut node = Node::open(&followers, web, None);
        node.hear(&state(1, &network));
        let held = node.slice.clone().expect("was told");
        apply(&mut network, &Change::DisableNode { name: parse("web1") });
        let Step::Dismiss(Some(last)) = node.follow.step(&state(2, &network)) else { panic!("no last word") };
        let last = Slice::from_snapshot(*last).expect("a whole slice");
        assert_eq!((last.revision, &last.local), (Revision(2), &held.local));
        assert!(last.peers.is_empty() && last.prefixes.is_empty() && last.cells.is_empty());
        let flow = Flow { source: parse("10.42.1.1"), destination: parse("10.42.2.1"), protocol: 6, port: 8080 };
        assert_eq!((held.verdict(&flow).action, last.verdict(&flow).action), (Action::Allow, Action::Deny));
        assert_eq!(node.follow.dismiss(&state(2, &network)), Step::Dismiss(None), "once is enough");
        drop(node);
        apply(&mut network, &Change::EnableNode { name: parse("web1") });
        for held in [held, last] {
            let mut node = Node::open(&followers, web, Some(held));
            assert_eq!(node.hear(&state(3, &network)).expect("a snapshot").from, Revision(0));
        }
        apply(&mut network, &Change::DeleteNode { name: parse("web1") });
        followers.retain(&state(4, &network));
        assert_eq!(followers.report(web), Report::default());
    }
}
