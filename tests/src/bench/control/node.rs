//! What one node pays for what it hears: from the message that came to the acknowledgement, that is applied, lowered, put in
//! force in a kernel that only remembers, and kept on the disk.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use controller_api::v1;
use node::enforce::guard::Watch;
use node::enforce::{Enforcer, Setup};
use node::kernel::Backend;
use node::kernel::fake::{FakeKernel, RememberedWireGuard};
use node::key::PrivateKey;
use node::lower::RuleSlots;
use node::uplink::follow::{Enforced, receive};
use node::uplink::journal::Journal;
use policy::{Action, Change, DefaultPolicy, Matrix, Network, NodeId, Prefixes, Revision, RuleSpec, Slice, SliceDelta};
use prost::Message as _;
use tokio::sync::watch;

use super::growth::exponent;
use super::running;
use crate::bench::Effort;
use crate::bench::report::{Report, Row, Target};
use crate::bench::scale::{Families, Layout, Scale, Size};
use crate::bench::statistics::{median, quantile};

/// Milliseconds of one change, of 99 in 100.
const CHANGE: f64 = 1.0;
/// Milliseconds of a snapshot.
const SNAPSHOT: f64 = 500.0;
/// A change costs the same however many peers there are.
const EXPONENT: f64 = 0.1;
const SUBJECT: &str = "node-0";
/// Peers whose prefixes rules tell apart before anything is measured.
const MARKED: u32 = 50;

/// A kind of change, and what it is of a turn.
type Kind = (&'static str, fn(u32, u32) -> Result<Change>);

/// In the order of a turn.
const KINDS: [Kind; 6] = [
    ("a rule to one peer comes", |turn, peers| rule(turn, &format!("node:{}", name(turn, peers)))),
    ("it goes", |turn, _| Ok(Change::DeleteRule { name: format!("rule-{turn}").parse()? })),
    ("a rule to everybody comes", |turn, _| rule(turn, "any")),
    ("it goes, too", |turn, _| Ok(Change::DeleteRule { name: format!("rule-{turn}").parse()? })),
    ("a peer has another endpoint", |turn, peers| {
        let endpoint = Some(format!("192.0.2.1:{}", 1_024 + turn % 60_000).parse()?);
        Ok(Change::SetEndpoint { name: name(turn, peers).parse()?, endpoint })
    }),
    ("a peer goes, or comes with another key", |turn, peers| {
        let public_key = PrivateKey::generate()?.public();
        Ok(Change::ActivateNode { name: name(turn, peers).parse()?, public_key })
    }),
];

/// Not a change of the policy.
const SEEN: &str = "a peer is seen elsewhere";

/// The names of [`KINDS`], and of what is none of them.
fn names() -> impl Iterator<Item = &'static str> {
    KINDS.iter().map(|(name, _)| *name).chain([SEEN])
}

pub(super) fn measure(effort: Effort, report: &mut Report) -> Result<()> {
    let mut points: Vec<Vec<(f64, f64)>> = vec![Vec::new(); names().count()];
    for peers in effort.choose([1_000, 10_000], [20, 40]) {
        let (mut node, snapshot) = {
            let (network, subject) = mesh(peers)?;
            Node::start(network, subject)?
        };
        let target = Target::AtMost(SNAPSHOT);
        report
            .push(Row::new(format!("node with {peers} peers: snapshot"), milliseconds(snapshot), "ms").target(target));
        for turn in 0..MARKED.min(peers / 2) {
            let far = rule(1_000_000 + turn, &format!("node:node-{}", peers - turn))?;
            let messages = node.messages([(0, far)])?;
            node.receive_all(&messages)?;
        }
        let times = changes(&mut node, peers, effort.choose(300, 4))?;
        for ((kind, times), points) in names().zip(times).zip(&mut points) {
            let name = format!("node with {peers} peers: {kind}, received to acknowledged, p99");
            let row = Row::new(name, quantile(&times, 0.99), "ms").also("p50", median(&times));
            report.push(row.also("most", quantile(&times, 1.0)).target(Target::AtMost(CHANGE)));
            points.push((f64::from(peers), median(&times)));
        }
    }
    for (kind, points) in names().zip(&points) {
        let name = format!("node: {kind}: growth with the peers, exponent");
        let row = exponent(points).map_or_else(
            || Row::missing(name.clone(), "fewer than two sizes were measured", ""),
            |exponent| Row::new(name.clone(), exponent, ""),
        );
        report.push(row.target(Target::AtMost(EXPONENT)));
    }
    let (cidrs, rules) = effort.choose((10_000, 10), (100, 10));
    let scale = Scale::new(Size::mixed(cidrs, rules, Layout::Dense, Families::Both))?;
    let (_node, snapshot) = Node::start(scale.network, scale.subject)?;
    let name = format!("node, {cidrs} cidrs, {} rules: snapshot", cidrs * rules);
    report.push(Row::new(name, milliseconds(snapshot), "ms").target(Target::AtMost(SNAPSHOT)));
    Ok(())
}

/// Milliseconds of each change, by kind. All messages are made first, so that a controller's work disturbs no measurement.
fn changes(node: &mut Node, peers: u32, turns: u32) -> Result<Vec<Vec<f64>>> {
    let mut messages = Vec::new();
    for turn in 0..turns {
        for (kind, (_, change)) in KINDS.iter().enumerate() {
            for change in prepared(change(turn, peers)?) {
                messages.extend(node.messages([(kind, change)])?);
            }
        }
        let id = *node.held.peers.keys().nth(turn as usize % node.held.peers.len()).context("it has peers")?;
        messages.push((KINDS.len(), Heard::Seen(id, ([198, 51, 100, 1], 1 + turn as u16).into())));
    }
    let mut times = vec![Vec::new(); names().count()];
    for (kind, took) in node.receive_all(&messages)? {
        times[kind].push(milliseconds(took));
    }
    Ok(times)
}

/// A node must have lost its key before it gets another.
fn prepared(change: Change) -> Vec<Change> {
    match &change {
        Change::ActivateNode { name, .. } => {
            vec![Change::DisableNode { name: name.clone() }, Change::EnableNode { name: name.clone() }, change.clone()]
        }
        _ => vec![change],
    }
}

fn name(turn: u32, peers: u32) -> String {
    format!("node-{}", 1 + turn * 7 % (peers / 2))
}

fn rule(turn: u32, to: &str) -> Result<Change> {
    Ok(Change::AddRule(RuleSpec {
        name: format!("rule-{turn}").parse()?,
        action: Action::Deny,
        from: vec![format!("node:{SUBJECT}").parse()?],
        to: vec![to.parse()?],
        services: vec![format!("tcp/{}", 1 + turn % 60_000).parse()?],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    }))
}

/// A node, and the policy as its controller has it.
struct Node {
    network: Network,
    matrix: Matrix,
    revision: Revision,
    id: NodeId,
    held: Arc<Slice>,
    enforcer: Enforcer,
    enforced: watch::Receiver<Enforced>,
    _state_dir: tempfile::TempDir,
}

/// A message, and the kind that it is of.
type Message = (usize, Heard);

enum Heard {
    Update(Vec<u8>),
    Seen(NodeId, SocketAddr),
}

impl Node {
    /// A node that has its first slice in force, and how long that took.
    fn start(mut network: Network, id: NodeId) -> Result<(Self, Duration)> {
        network.take_touched();
        let matrix = Matrix::compile(&network)?;
        let state_dir = running::directory(&std::env::temp_dir())?;
        let kernel = FakeKernel::new(Backend::Userspace);
        let setup = Setup {
            wireguard: Box::new(RememberedWireGuard::new(kernel.wireguard())),
            link: Box::new(kernel.link()),
            datapath: Box::new(kernel.datapath()),
            guard: Watch::none(),
            key: PrivateKey::generate()?,
            journal: Journal::new(state_dir.path().to_owned()),
            listen_port: 51_820,
            mtu: 1_420,
            persistent_keepalive: None,
            reconcile_interval: Duration::from_secs(60),
            slots: Some(RuleSlots::new()),
            holders: Default::default(),
            time: 0,
        };
        let (enforced, acknowledged) = watch::channel(Enforced::default());
        let mut enforcer = Enforcer::new(setup, enforced, watch::channel(Arc::default()).0);
        enforcer.round();
        let revision = Revision(1);
        let message = encoded(&matrix.snapshot(id, revision).context("the node is not active")?);
        let began = Instant::now();
        let held = Arc::new(receive(None, decoded(&message)?, id)?);
        enforcer.enforce(Arc::clone(&held));
        let took = began.elapsed();
        enforcer.settle();
        let enforced = acknowledged;
        let node = Self { network, matrix, revision, id, held, enforcer, enforced, _state_dir: state_dir };
        node.check(revision)?;
        Ok((node, took))
    }

    /// What the controller would send of changes, one after the other; of those that do not concern the node nothing.
    fn messages(&mut self, changes: impl IntoIterator<Item = (usize, Change)>) -> Result<Vec<Message>> {
        let mut messages = Vec::new();
        for (kind, change) in changes {
            self.network.apply(&change)?;
            let touched = self.network.take_touched();
            let (next, _) = self.matrix.follow(&self.network, &touched)?;
            let revisions = (self.revision, Revision(self.revision.0 + 1));
            let delta = next.delta(Some(&self.matrix), self.id, revisions).context("the node is not active")?;
            self.matrix = next;
            if !delta.is_empty() {
                self.revision = revisions.1;
                messages.push((kind, Heard::Update(encoded(&delta))));
            }
        }
        Ok(messages)
    }

    /// How long each took.
    fn receive_all(&mut self, messages: &[Message]) -> Result<Vec<(usize, Duration)>> {
        let mut times = Vec::with_capacity(messages.len());
        for (kind, message) in messages {
            let began = Instant::now();
            let held = match message {
                Heard::Update(message) => Arc::new(receive(Some(&self.held), decoded(message)?, self.id)?),
                Heard::Seen(peer, endpoint) => {
                    let mut held = Slice::clone(&self.held);
                    held.see([(*peer, *endpoint)]);
                    Arc::new(held)
                }
            };
            let former = std::mem::replace(&mut self.held, Arc::clone(&held));
            self.enforcer.enforce(held);
            times.push((*kind, began.elapsed()));
            drop(former);
            self.enforcer.settle();
            self.check(self.held.revision)?;
        }
        Ok(times)
    }

    fn check(&self, revision: Revision) -> Result<()> {
        let enforced = self.enforced.borrow();
        ensure!(enforced.revision == revision && enforced.error.is_none(), "not in force: {enforced:?}");
        Ok(())
    }
}

fn encoded(delta: &SliceDelta) -> Vec<u8> {
    v1::Update::from(delta).encode_to_vec()
}

fn decoded(message: &[u8]) -> Result<SliceDelta> {
    Ok(SliceDelta::try_from(v1::Update::decode(message)?)?)
}

/// One cidr in which everybody is a peer of everybody, and one of its nodes.
fn mesh(peers: u32) -> Result<(Network, NodeId)> {
    let nets = |text: &str| Prefixes::from_nets(text.split(' ').map(|net| net.parse().expect("a prefix")));
    let mut network = Network::new("mesh".parse()?, nets("10.0.0.0/8 fd42::/48")?, DefaultPolicy::Lineage)?;
    network.apply(&Change::AddCidr {
        name: "all".parse()?,
        prefixes: nets("10.1.0.0/16 fd42:0:0:1::/64")?,
        isolated: false,
        external: false,
    })?;
    for number in 0..=peers {
        let name = format!("node-{number}");
        network.apply(&Change::AddNode {
            name: name.parse()?,
            cidr: "all".parse()?,
            addresses: None,
            groups: Vec::new(),
            gateway_for: Vec::new(),
        })?;
        let mut bytes = [1; 32];
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        let public_key = policy::PublicKey::try_from(bytes.as_slice())?;
        network.apply(&Change::ActivateNode { name: name.parse()?, public_key })?;
    }
    let subject = network.node_named(&SUBJECT.parse()?).context("it was added")?.id;
    Ok((network, subject))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
