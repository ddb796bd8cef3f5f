//! What one change costs a node that has many peers, from the message that came to the acknowledgement: applied, lowered, put
//! in force in a kernel that only remembers, and kept on disk.
//!
//! `cargo run --profile measured -p node --example change -- [PEERS] [CHANGES] [STATE-DIR]`

use std::collections::BTreeMap;
use std::path::PathBuf;
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
use node::uplink::follow::Enforced;
use node::uplink::journal::Journal;
use policy::{Action, Change, DefaultPolicy, Matrix, Network, NodeId, Prefixes, Revision, RuleSpec, Slice, SliceDelta};
use prost::Message as _;
use tokio::sync::watch;

const SUBJECT: &str = "node-0";

struct Node {
    network: Network,
    /// As the controller has it.
    sent: Arc<Slice>,
    /// As it came.
    held: Arc<Slice>,
    id: NodeId,
    enforcer: Enforcer,
    enforced: watch::Receiver<Enforced>,
}

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let peers: u32 = words.next().map_or(Ok(10_000), |word| word.parse()).context("PEERS is a number")?;
    let changes: u32 = words.next().map_or(Ok(500), |word| word.parse()).context("CHANGES is a number")?;
    let directory = words.next().map_or_else(|| std::env::temp_dir().join("rampart-change"), PathBuf::from);
    std::fs::create_dir_all(&directory)?;
    let (mut node, snapshot) = Node::new(peers, directory)?;
    println!("{peers} peers, snapshot {} ms", snapshot.as_millis());
    type Step = fn(u32, u32) -> Result<Change>;
    let steps: [(&str, Step); 6] = [
        ("a rule to one peer", |turn, peers| rule(turn, &format!("node:node-{}", 1 + turn % peers))),
        ("it goes", |turn, _| Ok(Change::DeleteRule { name: format!("rule-{turn}").parse()? })),
        ("a rule for all", |turn, _| rule(turn, "any")),
        ("it goes", |turn, _| Ok(Change::DeleteRule { name: format!("rule-{turn}").parse()? })),
        ("an endpoint moves", |turn, peers| {
            let endpoint = Some(format!("192.0.2.1:{}", 1_024 + turn % 60_000).parse()?);
            Ok(Change::SetEndpoint { name: format!("node-{}", 1 + turn % peers).parse()?, endpoint })
        }),
        ("a peer's key is new", |turn, peers| {
            let public_key = PrivateKey::generate()?.public();
            Ok(Change::ActivateNode { name: format!("node-{}", 1 + turn % peers).parse()?, public_key })
        }),
    ];
    let mut times: BTreeMap<usize, Vec<Duration>> = BTreeMap::new();
    for turn in 0..changes {
        for (number, (_, step)) in steps.iter().enumerate() {
            for change in prepared(step(turn, peers)?) {
                if let Some(took) = node.change(&change)? {
                    times.entry(number).or_default().push(took);
                }
            }
        }
    }
    println!("{:24} {:>8} {:>8} {:>8}   µs", "", "p50", "p99", "most");
    for (number, mut times) in times {
        times.sort_unstable();
        let at = |share: usize| times[(times.len() - 1) * share / 100].as_micros();
        println!("{:24} {:>8} {:>8} {:>8}", steps[number].0, at(50), at(99), at(100));
    }
    Ok(())
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

impl Node {
    /// A mesh of one cidr in which everybody is a peer of everybody; how long the first slice took to be in force.
    fn new(peers: u32, state_dir: PathBuf) -> Result<(Self, Duration)> {
        let mut network = mesh(peers)?;
        let key = PrivateKey::generate()?;
        network.apply(&Change::ActivateNode { name: SUBJECT.parse()?, public_key: key.public() })?;
        let id = network.node_named(&SUBJECT.parse()?).context("it was added")?.id;
        let sent = sent(&network, id, 1)?;
        let kernel = FakeKernel::new(Backend::Userspace);
        let setup = Setup {
            wireguard: Box::new(RememberedWireGuard::new(kernel.wireguard())),
            link: Box::new(kernel.link()),
            datapath: Box::new(kernel.datapath()),
            guard: Watch::none(),
            key,
            journal: Journal::new(state_dir),
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
        let message = v1::Update::from(&sent.to_delta()).encode_to_vec();
        let began = Instant::now();
        let held = Arc::new(Slice::from_snapshot(SliceDelta::try_from(v1::Update::decode(&*message)?)?)?);
        enforcer.enforce(Arc::clone(&held));
        let took = began.elapsed();
        Ok((Self { network, sent, held, id, enforcer, enforced: acknowledged }, took))
    }

    /// How long a change took, if it concerns the node.
    fn change(&mut self, change: &Change) -> Result<Option<Duration>> {
        self.network.apply(change)?;
        let revision = self.sent.revision.0 + 1;
        let next = sent(&self.network, self.id, revision)?;
        let delta = self.sent.diff(&next);
        if delta.is_empty() {
            return Ok(None);
        }
        let message = v1::Update::from(&delta).encode_to_vec();
        let began = Instant::now();
        let mut slice = Slice::clone(&self.held);
        slice.apply(SliceDelta::try_from(v1::Update::decode(&*message)?)?)?;
        self.held = Arc::new(slice);
        self.enforcer.enforce(Arc::clone(&self.held));
        let took = began.elapsed();
        self.enforcer.settle();
        self.sent = next;
        let enforced = self.enforced.borrow();
        ensure!(enforced.revision == Revision(revision) && enforced.error.is_none(), "{enforced:?}");
        Ok(Some(took))
    }
}

fn sent(network: &Network, node: NodeId, revision: u64) -> Result<Arc<Slice>> {
    Ok(Arc::new(Matrix::compile(network)?.slice(node, Revision(revision)).context("it is active")?))
}

fn mesh(peers: u32) -> Result<Network> {
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
        if number > 0 {
            let mut bytes = [1; 32];
            bytes[..4].copy_from_slice(&number.to_be_bytes());
            let public_key = policy::PublicKey::try_from(bytes.as_slice())?;
            network.apply(&Change::ActivateNode { name: name.parse()?, public_key })?;
        }
    }
    Ok(network)
}
