//! The one thread that touches the kernel. It puts slices in force, looks after what others change, keeps the last good
//! state on disk, and lets others ask.

pub mod guard;
mod handle;
pub mod reconcile;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use policy::{CidrId, CidrName, Generation, PublicKey, Revision, RuleName, Slice};
use tokio::sync::watch;

use crate::enforce::reconcile::holders;
use crate::enforce::reconcile::{Desired, Holders, Kernel, Observed, Outcome, Step, apply, plan};
use crate::kernel::{Device, Inspect, KernelError, Link, PeerConfig, WireGuard};
use crate::key::PrivateKey;
use crate::lower::{Lowering, RuleSlots, Tables};
use crate::uplink::follow::Enforced;
use crate::uplink::state::{self, State};
use crate::verify::finding::{self, Expected, Finding};

use self::handle::Command;
pub use self::handle::{Gone, Handle};

/// Everything that the thread needs, given once.
pub struct Setup {
    pub wireguard: Box<dyn WireGuard>,
    pub link: Box<dyn Link>,
    pub datapath: Box<dyn Inspect>,
    pub guard: guard::Watch,
    pub key: PrivateKey,
    pub state_dir: PathBuf,
    pub listen_port: u16,
    pub mtu: u32,
    pub persistent_keepalive: Option<Duration>,
    pub reconcile_interval: Duration,
    /// From the state on disk. `None`: lost or never there; what the pinned rule counters count is then nobody's.
    pub slots: Option<RuleSlots>,
    pub holders: Holders,
    /// The latest time that this node has seen, in seconds since the epoch.
    pub time: u64,
}

/// What numbers in events mean.
#[derive(Clone, Debug, Default)]
pub struct Names {
    pub cidrs: policy::Map<CidrId, CidrName>,
    /// By counter slot.
    pub rules: BTreeMap<u32, RuleName>,
}

/// The thread's own state.
pub struct Enforcer {
    pub wireguard: Box<dyn WireGuard>,
    pub link: Box<dyn Link>,
    pub datapath: Box<dyn Inspect>,
    pub guard: guard::Watch,
    pub slots: RuleSlots,
    pub intent: Option<Intent>,
    /// Repairs since the start, by kind.
    pub repairs: BTreeMap<&'static str, u64>,
    /// What could not be done in the last round.
    pub error: Option<String>,
    /// Why the newest slice could not even be tried.
    pub refused: Option<String>,
    /// The revision on disk that is older than what the kernel enforces, until the controller answers.
    pub outdated: Option<Revision>,
    /// Whether this process has attached the datapath, or taken over what was attached.
    pub attached: bool,
    /// What verifying the tables has brought to light.
    pub verifications: finding::Record,
    /// Whether the tables were found to be other than they should be, and are to be written anew.
    tables_wrong: bool,
    lowering: Lowering,
    key: PrivateKey,
    state_dir: PathBuf,
    listen_port: u16,
    mtu: u32,
    persistent_keepalive: Option<Duration>,
    holders: Holders,
    time: u64,
    /// Whether tables were switched since a round last told of it.
    switched: bool,
    /// Whether what is in force is not on disk yet.
    unsaved: bool,
    /// Whether the rule counters hold figures of rules that nobody remembers.
    stale_counters: bool,
    rounds: u64,
    enforced: watch::Sender<Enforced>,
    names: watch::Sender<Arc<Names>>,
}

/// What should be in force.
pub struct Intent {
    pub slice: Arc<Slice>,
    pub tables: Tables,
    /// Of the switch that put the tables in force; `None`: not yet.
    pub generation: Option<Generation>,
    /// Whether the last round did all that it had to: what differs later was changed by others.
    settled: bool,
    fresh_endpoints: BTreeSet<PublicKey>,
    changed_holder: Vec<IpNet>,
}

/// After a failed round the next one comes sooner.
const RETRY: Duration = Duration::from_millis(250);
/// Between two collections of idle flow records.
const COLLECT: Duration = Duration::from_secs(10);

/// Starts the thread. Its first round attaches the datapath: deny-all, or what is pinned.
pub fn start(setup: Setup) -> Handle {
    let (commands, receiver) = mpsc::channel();
    let (enforced, enforced_rx) = watch::channel(Enforced::default());
    let (names, names_rx) = watch::channel(Arc::default());
    let interval = setup.reconcile_interval;
    let mut enforcer = Enforcer::new(setup, enforced, names);
    thread::spawn(move || enforcer.run(&receiver, interval));
    Handle { commands, enforced: enforced_rx, names: names_rx }
}

impl Enforcer {
    /// Does nothing by itself: the thread that [`start`] starts calls it.
    pub fn new(setup: Setup, enforced: watch::Sender<Enforced>, names: watch::Sender<Arc<Names>>) -> Self {
        let Setup {
            wireguard,
            link,
            datapath,
            guard,
            key,
            state_dir,
            listen_port,
            mtu,
            persistent_keepalive,
            reconcile_interval: _,
            slots,
            holders,
            time,
        } = setup;
        Self {
            wireguard,
            link,
            datapath,
            guard,
            stale_counters: slots.is_none(),
            slots: slots.unwrap_or_default(),
            intent: None,
            repairs: BTreeMap::new(),
            error: None,
            refused: None,
            outdated: None,
            attached: false,
            verifications: finding::Record::default(),
            tables_wrong: false,
            lowering: Lowering::default(),
            key,
            state_dir,
            listen_port,
            mtu,
            persistent_keepalive,
            holders,
            time,
            switched: false,
            unsaved: false,
            rounds: 0,
            enforced,
            names,
        }
    }

    fn run(&mut self, commands: &mpsc::Receiver<Command>, interval: Duration) {
        self.round();
        let mut next_round = Instant::now() + interval;
        let mut next_collection = Instant::now() + COLLECT;
        loop {
            match commands.recv_timeout(next_round.min(next_collection).saturating_duration_since(Instant::now())) {
                Ok(Command::Ask(question)) => question(self),
                Ok(Command::Enforce(slice)) => {
                    self.enforce(slice);
                    self.settle();
                    next_round = Instant::now() + self.pause(interval);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= next_round {
                self.round();
                next_round = Instant::now() + self.pause(interval);
            }
            if Instant::now() >= next_collection {
                if let Err(error) = self.datapath.collect_flows() {
                    tracing::debug!(error = apply::chain(&error), "flow records cannot be collected");
                }
                next_collection = Instant::now() + COLLECT;
            }
        }
    }

    /// Makes ready for the next change, once one is in force.
    pub fn settle(&mut self) {
        if let Err(error) = self.datapath.settle() {
            tracing::debug!(error = apply::chain(&error), "the copy that went cannot be brought up to date yet");
        }
    }

    fn pause(&self, interval: Duration) -> Duration {
        if self.error.is_some() { RETRY.min(interval) } else { interval }
    }

    /// Begins with the slice from disk, unless the kernel has a newer policy: the former daemon was killed between the
    /// switch and the disk, and nothing that was revoked then comes back. What the kernel has stays until the controller
    /// answers.
    pub fn resume(&mut self, slice: Arc<Slice>) {
        let held = slice.revision;
        match self.datapath.observe() {
            Ok(state) if state.generation != Generation(0) && state.revision > held => {
                tracing::warn!(
                    %held,
                    enforced = %state.revision,
                    "last good state is older than the policy in force, which stays until the controller answers"
                );
                self.outdated = Some(held);
            }
            _ => self.enforce(slice),
        }
    }

    /// Makes a slice the intent and puts it in force. A slice that the kernel's tables cannot hold changes nothing.
    pub fn enforce(&mut self, slice: Arc<Slice>) {
        let revision = slice.revision;
        if self.stale_counters {
            self.reset_stale_counters();
        }
        let tables = match self.lowering.lower(&slice, &mut self.slots) {
            Ok(tables) => tables,
            Err(error) => return self.refuse(revision, format!("revision {revision} cannot be put in force: {error}")),
        };
        (self.refused, self.outdated) = (None, None);
        match self.intent.take() {
            // The rest is as it was, as far as anybody knows: the tables need not wait until it was looked at.
            Some(old) if old.settled && self.attached && same_peers(&old.slice, &slice) => {
                let generation = self.switch_ahead(&tables);
                self.intent = Some(Intent { slice, tables, generation, settled: false, ..old });
            }
            old => self.intend(old, slice, tables),
        }
        self.round();
        if self.stale_counters {
            // Another version's programs were in force, whose counters were only now taken over.
            self.reset_stale_counters();
        }
    }

    /// Nothing but the policy changes. What goes wrong here the round tries again, and reports.
    fn switch_ahead(&mut self, tables: &Tables) -> Option<Generation> {
        let generation = self.datapath.switch(tables).ok();
        self.switched |= generation.is_some();
        generation
    }

    fn intend(&mut self, old: Option<Intent>, slice: Arc<Slice>, tables: Tables) {
        let holders = holders::holders(&slice, self.key.public());
        let mut changed_holder = holders::changed(&self.holders, &holders);
        let mut fresh_endpoints = fresh_endpoints(old.as_ref().map(|intent| &*intent.slice), &slice);
        if let Some(old) = old {
            // What an earlier round still owes.
            changed_holder.extend(old.changed_holder);
            fresh_endpoints.extend(old.fresh_endpoints);
        }
        self.holders = holders::remembered(&self.holders, holders);
        self.intent = Some(Intent { slice, tables, generation: None, settled: false, fresh_endpoints, changed_holder });
    }

    fn refuse(&mut self, revision: Revision, error: String) {
        tracing::error!(error, "policy refused; the one in force stays");
        self.refused = Some(error.clone());
        let generation = self.enforced.borrow().generation;
        self.enforced.send_replace(Enforced { revision, generation, error: Some(error) });
    }

    /// One look at the kernel, and what follows from it.
    pub fn round(&mut self) {
        let device = self.look();
        // Last, and off the path of a change: it protects the node from being kept busy, and decides about nothing.
        let peers = self.peers();
        let repaired = self.guard.round(self.listen_port, self.key.public(), device.as_ref(), peers.values());
        if repaired > 0 {
            *self.repairs.entry(guard::REPAIR).or_default() += repaired;
        }
    }

    /// Returns the device as it was before.
    fn look(&mut self) -> Option<Device> {
        self.rounds += 1;
        let settled = self.intent.as_ref().is_none_or(|intent| intent.settled);
        let (outcome, device) = match self.kernel().observe() {
            Ok(mut observed) => {
                if !self.attached {
                    // What another process attached is taken over by attaching.
                    observed.datapath = None;
                }
                (self.reconcile(&observed), observed.device)
            }
            Err(error) => {
                self.conclude(Some(apply::chain(&error)), settled);
                return None;
            }
        };
        let first = self.rounds == 1;
        for step in &outcome.done {
            if !settled || first {
                tracing::debug!(%step, "done");
            } else {
                *self.repairs.entry(step.kind()).or_default() += 1;
                tracing::warn!(%step, kind = step.kind(), "drift repaired");
            }
        }
        self.switched |= outcome.generation.is_some();
        self.note(&outcome);
        self.conclude(outcome.error(), settled);
        device
    }

    fn kernel(&mut self) -> Kernel<'_> {
        Kernel { wireguard: &mut *self.wireguard, link: &mut *self.link, datapath: &mut *self.datapath }
    }

    fn reconcile(&mut self, observed: &Observed) -> Outcome {
        let desired = self.desired(observed);
        let steps = plan(desired.as_ref(), observed);
        let mut kernel =
            Kernel { wireguard: &mut *self.wireguard, link: &mut *self.link, datapath: &mut *self.datapath };
        let outcome = apply(&mut kernel, &self.key, self.intent.as_ref().map(|intent| &intent.tables), steps);
        Outcome { unseen: observed.unseen.clone(), ..outcome }
    }

    fn desired(&mut self, observed: &Observed) -> Option<Desired> {
        let intent = self.intent.as_ref()?;
        let generation = observed.datapath.as_ref().map(|datapath| datapath.generation);
        let mut desired = desired(&intent.slice, self.key.public(), self.persistent_keepalive);
        desired.listen_port = self.listen_port;
        desired.mtu = self.mtu;
        desired.reload = self.tables_wrong || intent.generation.is_none() || intent.generation != generation;
        desired.fresh_endpoints.clone_from(&intent.fresh_endpoints);
        desired.changed_holder.clone_from(&intent.changed_holder);
        Some(desired)
    }

    /// What the tables should say; an error: they need not say anything yet.
    pub fn expected(&self) -> Result<Expected, String> {
        if let Some(held) = self.outdated {
            return Err(format!(
                "revision {held}, which is on disk, is older than the kernel's: wait for the controller"
            ));
        }
        let intent = self.intent.as_ref().and_then(|intent| Some((intent, intent.generation?)));
        let (intent, generation) =
            intent.ok_or("no policy is in force yet: everything is denied, or as it was before")?;
        Ok(Expected { slice: Arc::clone(&intent.slice), slots: self.slots.pairs(), generation })
    }

    /// Takes note of what verifying has found. Tables that are wrong, and still the ones in force, are written anew.
    pub fn verified(&mut self, finding: Finding) {
        let generation = Generation(finding.verified.generation);
        if let Some(first) = finding.verified.differences.first() {
            let count = finding.count();
            tracing::warn!(difference = first.text, count, "the tables in the kernel are not the policy");
        }
        let in_force = self.intent.as_ref().is_some_and(|intent| intent.generation == Some(generation));
        let wrong = !finding.verified.equal && in_force;
        self.verifications.note(finding);
        if wrong {
            self.tables_wrong = true;
            self.datapath.distrust();
            self.round();
        }
    }

    /// Remembers what steps have brought about.
    fn note(&mut self, outcome: &Outcome) {
        self.attached |= outcome.done.contains(&Step::AttachDatapath);
        self.tables_wrong &= outcome.generation.is_none();
        let Some(intent) = &mut self.intent else { return };
        intent.generation = outcome.generation.or(intent.generation);
        for step in &outcome.done {
            match step {
                Step::ForgetFlows(_) => intent.changed_holder.clear(),
                Step::SetPeer(peer) => drop(intent.fresh_endpoints.remove(&peer.public_key)),
                _ => {}
            }
        }
        if outcome.is_complete() {
            // A peer that has the endpoint already needed no step.
            intent.fresh_endpoints.clear();
        }
        intent.settled = outcome.is_complete();
        if self.switched {
            self.release_slots();
        }
    }

    /// Before the first switch: counters that nobody remembers the rules of begin anew.
    fn reset_stale_counters(&mut self) {
        let every: Vec<u32> = (0..ebpf_common::limit::RULES).collect();
        match self.datapath.reset_rules(&every) {
            Ok(()) => self.stale_counters = false,
            Err(error) => tracing::debug!(error = apply::chain(&error), "rule counters cannot be reset yet"),
        }
    }

    /// Rules that went count no more: their counters are free once they are zero again.
    fn release_slots(&mut self) {
        let retired = self.slots.retired();
        if retired.is_empty() {
            return;
        }
        match self.datapath.reset_rules(&retired) {
            Ok(()) => self.slots.release(&retired),
            Err(error) => tracing::warn!(error = apply::chain(&error), "counters of rules that went cannot be reset"),
        }
    }

    /// Tells everybody how it stands; a new policy is on disk before it is acknowledged.
    fn conclude(&mut self, mut error: Option<String>, was_settled: bool) {
        let switched = std::mem::take(&mut self.switched);
        self.unsaved |= switched;
        if self.unsaved && self.intent.as_ref().is_some_and(|intent| intent.generation.is_some()) {
            let stored = self.store();
            self.unsaved = stored.is_err();
            let failed = stored.err().map(|failed| apply::chain(&failed));
            let failed = failed.map(|text| format!("enforced, but the last good state cannot be kept: {text}"));
            error = error.or(failed);
        }
        if let Some(error) = error.as_ref().filter(|error| self.error.as_ref() != Some(error)) {
            if self.attached {
                tracing::warn!(error, "not everything could be done; trying again");
            } else {
                // At the start it is for the agent to say, and to end.
                tracing::debug!(error, "nothing is attached yet");
            }
        } else if error.is_none() && self.error.is_some() {
            tracing::info!("everything is done now");
        }
        let changed = error != self.error;
        self.error.clone_from(&error);
        let Some(intent) = &self.intent else { return };
        let report = Enforced {
            revision: intent.slice.revision,
            generation: intent.generation.unwrap_or_else(|| self.enforced.borrow().generation),
            error,
        };
        if switched {
            let slots = &self.slots;
            let rules = intent.slice.rules.iter().filter_map(|(id, rule)| Some((slots.slot(*id)?, rule.name.clone())));
            self.names.send_replace(Arc::new(Names { cidrs: intent.slice.cidrs.clone(), rules: rules.collect() }));
            tracing::info!(revision = %report.revision, generation = %report.generation, "policy in force");
        }
        if switched || changed || !was_settled {
            self.enforced.send_replace(report);
        }
    }

    fn store(&mut self) -> Result<(), host::file::FileError> {
        let Some(intent) = &self.intent else { return Ok(()) };
        self.time = self.time.max(host::clock::now());
        let slice = (*intent.slice).clone();
        let state = State { slice, slots: self.slots.clone(), holders: self.holders.clone(), time: self.time };
        state::store(&self.state_dir, &state)
    }

    /// Reads the device, for those who ask.
    pub fn observe(&mut self) -> Result<Observed, KernelError> {
        let observed = self.kernel().observe()?;
        match observed.unseen {
            Some(unseen) => Err(KernelError::new(unseen)),
            None => Ok(observed),
        }
    }

    /// How the peers should be, for those who ask.
    pub fn peers(&self) -> BTreeMap<PublicKey, PeerConfig> {
        self.intent.as_ref().map(|intent| peers(&intent.slice, self.persistent_keepalive)).unwrap_or_default()
    }

    pub fn public_key(&self) -> PublicKey {
        self.key.public()
    }
}

impl std::fmt::Debug for Enforcer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enforcer").field("slots", &self.slots).field("error", &self.error).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Setup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Setup").field("state_dir", &self.state_dir).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Intent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Intent")
            .field("revision", &self.slice.revision)
            .field("settled", &self.settled)
            .finish_non_exhaustive()
    }
}

/// The interface that a slice asks for; port and MTU are the caller's.
pub fn desired(slice: &Slice, public_key: PublicKey, persistent_keepalive: Option<Duration>) -> Desired {
    let local = &slice.local;
    Desired {
        public_key,
        listen_port: 0,
        mtu: 0,
        addresses: local.addresses.iter().map(IpNet::from).collect(),
        // Whoever the peers are: a packet into the network that the policy denies dies here, counted, and never leaves
        // in clear by another route.
        routes: local.roots.iter().chain(local.external_routes.iter().copied()).collect(),
        peers: peers(slice, persistent_keepalive),
        revision: slice.revision,
        reload: false,
        fresh_endpoints: BTreeSet::new(),
        changed_holder: Vec::new(),
    }
}

fn peers(slice: &Slice, persistent_keepalive: Option<Duration>) -> BTreeMap<PublicKey, PeerConfig> {
    let peer = |peer: &policy::Peer| PeerConfig {
        public_key: peer.public_key,
        endpoint: peer.endpoint,
        allowed_ips: peer.allowed_ips.clone(),
        persistent_keepalive,
    };
    slice.peers.values().map(|given| (given.public_key, peer(given))).collect()
}

/// Peers whose endpoint the new slice gives otherwise than the old one. Without an old one nothing is news: what
/// WireGuard has learned while no agent ran is as good as what the agent once heard.
fn fresh_endpoints(old: Option<&Slice>, new: &Slice) -> BTreeSet<PublicKey> {
    let Some(old) = old else { return BTreeSet::new() };
    let known: BTreeMap<_, _> = old.peers.values().map(|peer| (peer.public_key, peer.endpoint)).collect();
    new.peers
        .values()
        .filter(|peer| peer.endpoint.is_some() && known.get(&peer.public_key) != Some(&peer.endpoint))
        .map(|peer| peer.public_key)
        .collect()
}

/// Whether two slices ask for the same interface, and differ in what the tables say at most.
fn same_peers(old: &Slice, new: &Slice) -> bool {
    old.local == new.local && (old.peers.ptr_eq(&new.peers) || old.peers == new.peers)
}

#[cfg(test)]
pub(crate) mod tests;
