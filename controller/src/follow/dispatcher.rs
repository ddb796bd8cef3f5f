//! The one thread that tells nodes what concerns them. It owns every stream's queue, takes each new policy once, looks at the
//! nodes that it affects and at no others, and waits for nobody: a node whose queue is full gets a later policy, as one
//! message, when it has room again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller_api::v1;
use policy::{Affected, NodeId, Revision, Role};
use prost::Message as _;
use prost::bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot};
use tonic::Status;

use super::message::{Holds, Message, Messages, dismissal, endpoints, up_to_date};
use super::report::{Reports, StreamId};
use crate::metrics::{self, Metrics};
use crate::state::directory::Directory;
use crate::state::history::History;
use crate::state::{Followers, Policy};

/// From the first endpoint that moves to the message that names all that moved: a thousand nodes that connect at once are
/// a few messages to each.
const GATHER: Duration = Duration::from_millis(50);
/// How long endpoints are gathered after many nodes were told some: so long for each of those nodes, up to a bound.
#[derive(Clone, Copy, Debug)]
struct Gather {
    each: Duration,
    most: Duration,
}

/// A node that was seen elsewhere before: its peers know of it within a second.
const MOVED: Gather = Gather { each: Duration::from_micros(100), most: Duration::from_millis(700) };
/// A node that comes for the first time since the controller started. When everybody comes back, their peers know where most
/// of them are, and would hear of each by itself.
const APPEARED: Gather = Gather { each: Duration::from_millis(1), most: Duration::from_secs(3) };

/// What a stream's queue holds.
pub type Queued = Result<v1::FollowResponse, Status>;

/// Why a stream must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Another one speaks for the node now.
    Replaced,
    /// The node was told that it has no part in the network.
    Dismissed,
}

/// A node that begins to follow.
#[derive(Debug)]
pub struct Follower {
    pub node: NodeId,
    pub version: String,
    /// Revision and digest of the slice that the node holds.
    pub revision: Revision,
    pub digest: policy::Digest,
    /// Where it was seen.
    pub endpoint: Option<SocketAddr>,
    pub queue: mpsc::Sender<Queued>,
}

/// What the thread is told.
#[derive(Debug)]
enum Event {
    Opened { follower: Follower, stream: StreamId, signals: Signals, now: u64 },
    Closed { node: NodeId, stream: StreamId },
    HasRoom { node: NodeId, stream: StreamId },
    Policy(Arc<Policy>, Affected),
    Doubted(BTreeSet<NodeId>),
}

/// How the thread speaks to a stream's task.
#[derive(Debug)]
struct Signals {
    end: oneshot::Sender<End>,
    doubt: Arc<Notify>,
}

/// How others reach the thread. It ends when the last of these is gone.
#[derive(Clone, Debug)]
pub struct Dispatch {
    events: mpsc::UnboundedSender<Event>,
    streams: Arc<std::sync::atomic::AtomicU64>,
    pub reports: Reports,
    pub directory: Directory,
}

/// One stream of one node. The node counts as connected until this is dropped.
#[derive(Debug)]
pub struct Following {
    events: mpsc::UnboundedSender<Event>,
    node: NodeId,
    pub stream: StreamId,
    /// Is told when the stream must end.
    pub end: oneshot::Receiver<End>,
    /// Is notified when the node's certificate may be refused now.
    pub doubt: Arc<Notify>,
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.events.send(Event::Closed { node: self.node, stream: self.stream });
    }
}

impl Dispatch {
    /// A new stream of a node, which replaces an older one. `now`: seconds since the epoch.
    pub fn open(&self, follower: Follower, now: u64) -> Following {
        let stream = StreamId(1 + self.streams.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let (sender, end) = oneshot::channel();
        let (node, doubt) = (follower.node, Arc::new(Notify::new()));
        let signals = Signals { end: sender, doubt: Arc::clone(&doubt) };
        let _ = self.events.send(Event::Opened { follower, stream, signals, now });
        Following { events: self.events.clone(), node, stream, end, doubt }
    }
}

impl Followers for Dispatch {
    fn publish(&self, policy: Arc<Policy>, affected: Affected) {
        let _ = self.events.send(Event::Policy(policy, affected));
    }

    fn doubt(&self, nodes: BTreeSet<NodeId>) {
        if !nodes.is_empty() {
            let _ = self.events.send(Event::Doubted(nodes));
        }
    }
}

/// Starts the thread. Called within a runtime, on which it waits for room in queues.
pub fn start(history: History, metrics: Arc<Metrics>) -> std::io::Result<Dispatch> {
    let (events, receiver) = mpsc::unbounded_channel();
    let (reports, directory) = (Reports::default(), Directory::default());
    let dispatch = Dispatch {
        events: events.clone(),
        streams: Arc::default(),
        reports: reports.clone(),
        directory: directory.clone(),
    };
    let dispatcher = Dispatcher {
        history,
        streams: BTreeMap::new(),
        greetings: HashMap::new(),
        moved: BTreeSet::new(),
        ungreeted: BTreeSet::new(),
        tick: None,
        told: (Instant::now(), 0),
        reports,
        directory,
        metrics,
        runtime: Handle::current(),
        events: events.downgrade(),
    };
    std::thread::Builder::new().name("dispatcher".to_owned()).spawn(move || dispatcher.run(receiver))?;
    Ok(dispatch)
}

/// A stream as the thread knows it.
struct Stream {
    id: StreamId,
    queue: mpsc::Sender<Queued>,
    signals: Signals,
    /// What the node holds once it has read its queue.
    holds: Holds,
    /// The policy that it holds its slice of, if that is not the newest one: its queue was full.
    behind: Option<Arc<Policy>>,
    /// Its queue was full: the thread hears when there is room.
    is_full: bool,
}

struct Dispatcher {
    history: History,
    streams: BTreeMap<NodeId, Stream>,
    /// To the newest policy: for strangers, and by revision for those who were away.
    greetings: HashMap<Option<Revision>, Messages>,
    /// Nodes whose endpoints their peers do not know yet, also those that have just appeared.
    moved: BTreeSet<NodeId>,
    /// Nodes that do not know the endpoints of their peers yet.
    ungreeted: BTreeSet<NodeId>,
    /// When endpoints are told next.
    tick: Option<Instant>,
    /// When some were told last, and to how many nodes.
    told: (Instant, u32),
    reports: Reports,
    directory: Directory,
    metrics: Arc<Metrics>,
    runtime: Handle,
    events: mpsc::WeakUnboundedSender<Event>,
}

impl Dispatcher {
    fn run(mut self, mut events: mpsc::UnboundedReceiver<Event>) {
        loop {
            let event = match self.tick {
                None => events.blocking_recv(),
                Some(tick) => {
                    match self.runtime.block_on(async { tokio::time::timeout_at(tick.into(), events.recv()).await }) {
                        Ok(event) => event,
                        Err(_) => {
                            self.tell_endpoints();
                            continue;
                        }
                    }
                }
            };
            match event {
                Some(Event::Opened { follower, stream, signals, now }) => self.open(follower, stream, signals, now),
                Some(Event::Closed { node, stream }) => self.close(node, stream),
                Some(Event::HasRoom { node, stream }) => self.catch_up(node, stream),
                Some(Event::Policy(policy, affected)) => self.publish(policy, &affected),
                Some(Event::Doubted(nodes)) => {
                    let doubted = nodes.iter().filter_map(|node| self.streams.get(node));
                    doubted.for_each(|stream| stream.signals.doubt.notify_one());
                }
                None => return,
            }
        }
    }

    fn open(&mut self, follower: Follower, id: StreamId, signals: Signals, now: u64) {
        let Follower { node, version, revision, digest, endpoint, queue } = follower;
        self.end(node, End::Replaced);
        self.reports.open(node, id, version, now);
        let policy = Arc::clone(self.history.newest());
        let held = Holds { revision, digest };
        let stream = Stream { id, queue, signals, holds: held, behind: None, is_full: false };
        self.streams.insert(node, stream);
        let Some(message) = self.greeting(&policy, node, held) else {
            // It was active a moment ago.
            return self.end(node, End::Dismissed);
        };
        self.send(node, message, &policy);
        let known = self.directory.get(node);
        if let Some(endpoint) = endpoint
            && self.directory.observe(policy.network(), node, endpoint)
        {
            self.moved.insert(node);
            self.gather(if known.is_some() { MOVED } else { APPEARED });
        }
        self.ungreeted.insert(node);
        self.gather(APPEARED);
    }

    /// A delta, where it is known what the node holds; else everything.
    fn greeting(&mut self, policy: &Arc<Policy>, node: NodeId, held: Holds) -> Option<Message> {
        let is_known = |policy: &Policy| policy.matrix.digest(node) == Some(held.digest);
        if held.revision != Revision(0) && held.revision <= policy.revision {
            if is_known(policy) {
                return Some(up_to_date(held, policy.revision));
            }
            if let Some(old) = self.history.at(held.revision).filter(|old| is_known(old)).cloned() {
                return self.greetings(Some(old), policy).to(node, held, true);
            }
        }
        self.greetings(None, policy).to(node, Holds::default(), true)
    }

    fn greetings(&mut self, old: Option<Arc<Policy>>, new: &Arc<Policy>) -> &mut Messages {
        if self.greetings.values().map(Messages::size).sum::<usize>() > GREETINGS {
            self.greetings.clear();
        }
        let directory = self.directory.clone();
        let revision = old.as_ref().map(|old| old.revision);
        self.greetings.entry(revision).or_insert_with(|| Messages::new(old, Arc::clone(new), None, directory))
    }

    fn close(&mut self, node: NodeId, id: StreamId) {
        self.reports.close(node, id);
        if self.streams.get(&node).is_some_and(|stream| stream.id == id) {
            self.streams.remove(&node);
            self.ungreeted.remove(&node);
        }
    }

    /// Tells a stream's task that it must end; it is not a stream of the node any more.
    fn end(&mut self, node: NodeId, why: End) {
        if let Some(stream) = self.streams.remove(&node) {
            let _ = stream.signals.end.send(why);
        }
    }

    fn publish(&mut self, policy: Arc<Policy>, affected: &Affected) {
        let start = Instant::now();
        let old = Arc::clone(self.history.newest());
        self.history.push(Arc::clone(&policy));
        self.greetings.clear();
        let nodes: Vec<NodeId> = if affected.common {
            self.streams.keys().copied().collect()
        } else {
            affected.nodes.iter().filter(|node| self.streams.contains_key(*node)).copied().collect()
        };
        let changed = (!affected.is_everybody).then(|| affected.changed.clone());
        let known = Some(Arc::clone(&old));
        let mut messages = Messages::new(known, Arc::clone(&policy), changed, self.directory.clone());
        for node in nodes {
            self.tell(node, &old, &policy, &mut messages, affected.nodes.contains(&node));
        }
        metrics::since(&self.metrics.publish_seconds, start);
    }

    /// One node's part of a new policy.
    fn tell(&mut self, node: NodeId, old: &Arc<Policy>, policy: &Policy, messages: &mut Messages, is_affected: bool) {
        let Some(stream) = self.streams.get(&node).filter(|stream| stream.behind.is_none()) else { return };
        match messages.to(node, stream.holds, is_affected) {
            Some(message) if message.response.update.is_empty() => {}
            Some(message) => self.send(node, message, old),
            None => self.dismiss(node, old, policy.revision),
        }
    }

    /// `old`: the policy whose slice the node holds until it has read the message.
    fn send(&mut self, node: NodeId, message: Message, old: &Arc<Policy>) {
        let Some(stream) = self.streams.get_mut(&node) else { return };
        let Message { response, holds, is_snapshot } = message;
        let is_full = match stream.queue.try_reserve() {
            Ok(room) => {
                stream.holds = holds;
                // The node may acknowledge it as soon as it is in the queue.
                self.reports.sent(node, stream.id, holds.revision);
                let kind = if is_snapshot { metrics::Update::Snapshot } else { metrics::Update::Delta };
                self.metrics.update(kind, response.encoded_len());
                room.send(Ok(response));
                false
            }
            Err(mpsc::error::TrySendError::Full(())) => {
                self.metrics.slow_nodes.inc();
                stream.behind = Some(Arc::clone(old));
                true
            }
            // Its task is about to say so.
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        };
        if is_full {
            self.wait_for_room(node);
        }
    }

    /// What a node missed while its queue was full, as one message.
    fn catch_up(&mut self, node: NodeId, id: StreamId) {
        let policy = Arc::clone(self.history.newest());
        let Some(stream) = self.streams.get_mut(&node).filter(|stream| stream.id == id) else { return };
        stream.is_full = false;
        let (holds, behind) = (stream.holds, stream.behind.take());
        if self.ungreeted.contains(&node) {
            self.gather(APPEARED);
        }
        let Some(old) = behind else { return };
        let mut messages = Messages::new(Some(Arc::clone(&old)), Arc::clone(&policy), None, self.directory.clone());
        match messages.to(node, holds, true) {
            Some(message) if message.response.update.is_empty() => {}
            Some(message) => self.send(node, message, &old),
            None => self.dismiss(node, &old, policy.revision),
        }
    }

    /// The last word. Its task ends the stream, and says why.
    fn dismiss(&mut self, node: NodeId, old: &Policy, revision: Revision) {
        if let (Some(last), Some(stream)) = (dismissal(old, node, revision), self.streams.get(&node))
            && let Ok(room) = stream.queue.try_reserve()
        {
            self.reports.sent(node, stream.id, revision);
            room.send(Ok(last));
        }
        self.end(node, End::Dismissed);
    }

    /// Has endpoints told, soon.
    fn gather(&mut self, Gather { each, most }: Gather) {
        let (last, nodes) = self.told;
        let soonest = (Instant::now() + GATHER).max(last + each.saturating_mul(nodes).min(most));
        self.tick = Some(self.tick.map_or(soonest, |tick| tick.min(soonest)));
    }

    /// Tells nodes where their peers were seen, as far as they do not know it.
    fn tell_endpoints(&mut self) {
        self.tick = None;
        let mut told = 0;
        let policy = Arc::clone(self.history.newest());
        let (moved, ungreeted) = (std::mem::take(&mut self.moved), std::mem::take(&mut self.ungreeted));
        let mut of_role: HashMap<Arc<Role>, Bytes> = HashMap::new();
        for node in &ungreeted {
            let Some(role) = policy.matrix.role(*node) else { continue };
            let all = || endpoints(&self.directory, policy.matrix.peers(role));
            let seen = of_role.entry(Arc::clone(role)).or_insert_with(all).clone();
            told += 1;
            self.send_endpoints(*node, seen);
        }
        // Nodes of one role have the same peers, and are peers of the same.
        let mut by_role: HashMap<&Arc<Role>, BTreeSet<NodeId>> = HashMap::new();
        for node in &moved {
            if let Some(role) = policy.matrix.role(*node) {
                by_role.entry(role).or_default().insert(*node);
            }
        }
        let mut concerned: BTreeMap<NodeId, Vec<&Arc<Role>>> = BTreeMap::new();
        for role in by_role.keys() {
            for peer in policy.matrix.peers(role) {
                if self.streams.contains_key(&peer) && !ungreeted.contains(&peer) {
                    concerned.entry(peer).or_default().push(role);
                }
            }
        }
        let mut made: HashMap<Vec<&Arc<Role>>, Bytes> = HashMap::new();
        for (node, mut roles) in concerned {
            roles.sort_unstable();
            let directory = &self.directory;
            let all = |roles: &Vec<&Arc<Role>>| {
                endpoints(directory, roles.iter().flat_map(|role| by_role[role].iter().copied()))
            };
            let seen = match made.get(&roles) {
                Some(seen) => seen.clone(),
                None => made.entry(roles.clone()).or_insert(all(&roles)).clone(),
            };
            told += 1;
            self.send_endpoints(node, seen);
        }
        self.told = (Instant::now(), told);
    }

    /// A node whose queue is full is told everything once it has room.
    fn send_endpoints(&mut self, node: NodeId, seen: Bytes) {
        let Some(stream) = self.streams.get(&node).filter(|_| !seen.is_empty()) else { return };
        let response = v1::FollowResponse { update: Vec::new(), endpoints: vec![seen] };
        if let Err(mpsc::error::TrySendError::Full(_)) = stream.queue.try_send(Ok(response)) {
            self.ungreeted.insert(node);
            self.wait_for_room(node);
        }
    }

    /// Has the thread told, once, when a node's queue has room.
    fn wait_for_room(&mut self, node: NodeId) {
        let Some(stream) = self.streams.get_mut(&node).filter(|stream| !stream.is_full) else { return };
        stream.is_full = true;
        let (queue, events, stream) = (stream.queue.clone(), self.events.clone(), stream.id);
        self.runtime.spawn(async move {
            if queue.reserve().await.is_ok()
                && let Some(events) = events.upgrade()
            {
                let _ = events.send(Event::HasRoom { node, stream });
            }
        });
    }
}

/// Bytes of greetings that are kept for the next ones.
const GREETINGS: usize = 64 << 20;
