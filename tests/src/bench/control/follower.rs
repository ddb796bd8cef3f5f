//! One node: the code of `noded` that follows the controller, and a kernel that only remembers.
//!
//! Everything of the bench that knows the inside of `node` is here.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use controller_api::invitation::Invitation;
use node::config::{self, Flags, Metrics, Port};
use node::enforce::guard::Watch;
use node::enforce::{Enforcer, Setup};
use node::kernel::Backend;
use node::kernel::fake::{FakeKernel, RememberedWireGuard};
use node::lower::RuleSlots;
use node::uplink::follow::{self, Enforced};
use node::uplink::identity::Keys;
use node::uplink::join;
use node::uplink::journal::Journal;
use policy::{Generation, NodeId, Slice};
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::crowd::{Event, Events};

/// Not read: nothing is configured on this machine.
const NO_FILE: &str = "/dev/null";

/// What one node is, and what it does with what it hears.
#[derive(Clone, Debug)]
pub(super) struct Follower {
    pub(super) index: u32,
    pub(super) state_dir: PathBuf,
    pub(super) listen_port: u16,
    /// Whether it puts slices in force, in a kernel that only remembers. Another acknowledges what it has received.
    pub(super) enforces: bool,
    /// Nodes whose endpoint it tells about, by their index.
    pub(super) watched: Arc<Vec<(u32, NodeId)>>,
    /// What it received last, across its runtimes.
    pub(super) held: Arc<Mutex<Option<Arc<Slice>>>>,
}

impl Follower {
    /// Follows on the runtime that this is called on, for as long as that is. `turn` is given back when the first slice
    /// is here.
    pub(super) fn start(&self, turn: Option<OwnedSemaphorePermit>, events: Events) -> Result<()> {
        let settings = settings(&self.state_dir, self.listen_port)?;
        let (sender, enforced) = watch::channel(Enforced::default());
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let kernel = match self.enforces {
            true => Enforcing::Remembered(Box::new(enforcer(&self.state_dir, self.listen_port, sender)?)),
            false => Enforcing::Acknowledged(sender),
        };
        let handle = follow::start(&settings, held, enforced);
        tokio::spawn(self.clone().hear(handle, kernel, turn, events));
        Ok(())
    }

    async fn hear(
        self,
        handle: follow::Handle,
        mut kernel: Enforcing,
        mut turn: Option<OwnedSemaphorePermit>,
        events: Events,
    ) {
        let (mut received, mut endpoints) = (handle.received.clone(), BTreeMap::new());
        while received.changed().await.is_ok() {
            let Some(slice) = received.borrow_and_update().clone() else { continue };
            events.say(|at| Event::Received { index: self.index, revision: slice.revision.0, at });
            drop(turn.take());
            *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&slice));
            self.tell_endpoints(&slice, &mut endpoints, &events);
            let revision = slice.revision.0;
            kernel = match kernel.enforce(slice).await {
                Some(kernel) => kernel,
                None => return,
            };
            events.say(|at| Event::Enforced { index: self.index, revision, at });
        }
    }

    fn tell_endpoints(&self, slice: &Slice, known: &mut BTreeMap<u32, Option<SocketAddr>>, events: &Events) {
        for &(index, id) in &*self.watched {
            let Some(peer) = slice.peers.get(&id) else { continue };
            if known.insert(index, peer.reached_at()) == Some(peer.reached_at()) {
                continue;
            }
            let port = peer.reached_at().map_or(0, |endpoint| endpoint.port());
            events.say(|at| Event::Moved { observer: self.index, index, port, at });
        }
    }
}

/// What becomes of a slice.
enum Enforcing {
    Remembered(Box<Enforcer>),
    Acknowledged(watch::Sender<Enforced>),
}

impl Enforcing {
    /// `None`: the runtime ends.
    async fn enforce(self, slice: Arc<Slice>) -> Option<Self> {
        match self {
            Self::Remembered(mut enforcer) => {
                let done = tokio::task::spawn_blocking(move || {
                    enforcer.enforce(slice);
                    enforcer.settle();
                    enforcer
                });
                done.await.ok().map(Self::Remembered)
            }
            Self::Acknowledged(sender) => {
                sender.send_modify(|enforced| {
                    let generation = Generation(enforced.generation.0 + 1);
                    *enforced = Enforced { revision: slice.revision, generation, error: None, lacks: Vec::new() };
                });
                Some(Self::Acknowledged(sender))
            }
        }
    }
}

/// As an operator would have it without a file.
fn settings(state_dir: &Path, listen_port: u16) -> Result<config::Settings> {
    let flags = Flags {
        config: Some(NO_FILE.into()),
        state_dir: Some(state_dir.to_owned()),
        listen_port: Some(Port(listen_port)),
        metrics: Some(Metrics::Off),
        ..Flags::default()
    };
    Ok(config::load(&flags)?)
}

/// Joins as `noded join` does.
pub(super) async fn join(state_dir: &Path, invitation: &Invitation) -> Result<()> {
    let settings = settings(state_dir, 0x7fff)?;
    join::join(&settings, invitation, host::clock::now()).await.context("failed to join")?;
    Ok(())
}

fn enforcer(state_dir: &Path, listen_port: u16, enforced: watch::Sender<Enforced>) -> Result<Enforcer> {
    let kernel = FakeKernel::new(Backend::Userspace);
    let setup = Setup {
        wireguard: Box::new(RememberedWireGuard::new(kernel.wireguard())),
        link: Box::new(kernel.link()),
        datapath: Box::new(kernel.datapath()),
        guard: Watch::none(),
        key: Keys::load(state_dir)?.wireguard,
        journal: Journal::new(state_dir.to_owned()),
        listen_port,
        mtu: 1_420,
        persistent_keepalive: None,
        reconcile_interval: Duration::from_secs(60),
        slots: Some(RuleSlots::new()),
        holders: Default::default(),
        time: 0,
    };
    let (names, _) = watch::channel(Default::default());
    let mut enforcer = Enforcer::new(setup, enforced, names);
    enforcer.round();
    Ok(enforcer)
}
