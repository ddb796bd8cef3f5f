//! The one thread that touches the kernel. It puts slices in force, looks after what others change, keeps the last good
//! state on disk, and lets others ask.

mod change;
mod conclusion;
pub mod guard;
mod handle;
mod intent;
pub mod reconcile;
mod round;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use host::error::chain;
use policy::{
    CidrId, Generation, Map, PublicKey, Revision, RuleId, RuleName, Slice, SliceCidr, SliceRule, Understanding,
};
use tokio::sync::watch;

use self::change::Change;
use self::handle::Command;
use self::reconcile::{Holders, Kernel, Observed, holders, plan_change};
use crate::kernel::{Inspect, KernelError, Link, PeerConfig, WireGuard};
use crate::key::PrivateKey;
use crate::lower::{Lowering, RuleSlots, Tables};
use crate::uplink::follow::{Enforced, FEATURES};
use crate::uplink::journal::Journal;
use crate::verify::finding::{self, Expected, Finding};
use crate::view::Unanswered;

pub use self::handle::{Gone, Handle};
pub use self::intent::{Intent, desired};

/// Everything that the thread needs, given once.
pub struct Setup {
    pub wireguard: Box<dyn WireGuard>,
    pub link: Box<dyn Link>,
    pub datapath: Box<dyn Inspect>,
    pub guard: guard::Watch,
    pub key: PrivateKey,
    /// Where the last good state is kept.
    pub journal: Journal,
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
    pub cidrs: Map<CidrId, SliceCidr>,
    /// By counter slot.
    pub rules: Map<u32, RuleName>,
}

/// The rules that [`Names`] was made of.
#[derive(Debug, Default)]
struct Named {
    slots: Map<RuleId, u32>,
    rules: Map<RuleId, SliceRule>,
}

/// The thread's own state.
pub struct Enforcer {
    pub wireguard: Box<dyn WireGuard>,
    pub link: Box<dyn Link>,
    pub datapath: Box<dyn Inspect>,
    pub guard: guard::Watch,
    pub slots: RuleSlots,
    pub intent: Option<Intent>,
    /// The slice that the intent was made of, as the controller sent it.
    received: Option<Arc<Slice>>,
    /// What that requires and this node does not understand: what it concerns is denied.
    pub lacks: Vec<String>,
    understanding: Understanding,
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
    journal: Journal,
    listen_port: u16,
    mtu: u32,
    persistent_keepalive: Option<Duration>,
    holders: Holders,
    time: u64,
    /// Whether the guard has not heard of every peer yet.
    is_guard_behind: bool,
    /// Whether tables were switched since a round last told of it.
    switched: bool,
    /// Whether what is in force is not on disk yet.
    unsaved: bool,
    /// Whether the rule counters hold figures of rules that nobody remembers.
    stale_counters: bool,
    rounds: u64,
    enforced: watch::Sender<Enforced>,
    names: watch::Sender<Arc<Names>>,
    /// The rules that `names` has.
    named: Named,
}

/// After a failed round the next one comes sooner.
const RETRY: Duration = Duration::from_millis(250);
/// Between two rounds while changes bring peers that the guard does not know.
const GUARD_BEHIND: Duration = Duration::from_secs(1);
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
            journal,
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
            received: None,
            lacks: Vec::new(),
            understanding: Understanding::default(),
            repairs: BTreeMap::new(),
            error: None,
            refused: None,
            outdated: None,
            attached: false,
            verifications: finding::Record::default(),
            tables_wrong: false,
            lowering: Lowering::default(),
            key,
            journal,
            listen_port,
            mtu,
            persistent_keepalive,
            holders,
            time,
            is_guard_behind: false,
            switched: false,
            unsaved: false,
            rounds: 0,
            enforced,
            names,
            named: Named::default(),
        }
    }

    fn run(&mut self, commands: &mpsc::Receiver<Command>, interval: Duration) {
        self.round();
        let mut last_round = Instant::now();
        let mut next_round = last_round + interval;
        let mut next_collection = Instant::now() + COLLECT;
        loop {
            match commands.recv_timeout(next_round.min(next_collection).saturating_duration_since(Instant::now())) {
                Ok(Command::Ask(question)) => question(self),
                Ok(Command::Enforce(slice)) => {
                    let rounds = self.rounds;
                    self.enforce(slice);
                    self.settle();
                    let now = Instant::now();
                    if self.rounds > rounds {
                        (last_round, next_round) = (now, now + interval);
                    }
                    next_round = next_round.min(now + self.pause(interval));
                    if self.is_guard_behind {
                        next_round = next_round.min(last_round + GUARD_BEHIND);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= next_round {
                self.round();
                last_round = Instant::now();
                next_round = last_round + self.pause(interval);
            }
            if Instant::now() >= next_collection {
                if let Err(error) = self.datapath.collect_flows() {
                    tracing::debug!(error = chain(&error), "flow records cannot be collected");
                }
                self.journal.tend();
                next_collection = Instant::now() + COLLECT;
            }
        }
    }

    /// Makes ready for the next change, once one is in force.
    pub fn settle(&mut self) {
        if let Err(error) = self.datapath.settle() {
            tracing::debug!(error = chain(&error), "the copy that went cannot be brought up to date yet");
        }
        self.journal.tend();
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
    pub fn enforce(&mut self, received: Arc<Slice>) {
        let revision = received.revision;
        let is_understood = self.understanding.follow(&received, FEATURES);
        let understood = (!is_understood).then(|| received.understood(FEATURES)).flatten();
        let slice = understood.map_or_else(|| Arc::clone(&received), Arc::new);
        if self.stale_counters {
            self.reset_stale_counters();
        }
        let tables = match self.lowering.lower(&slice, &mut self.slots) {
            Ok(tables) => tables,
            Err(error) => return self.refuse(revision, format!("revision {revision} cannot be put in force: {error}")),
        };
        (self.refused, self.outdated) = (None, None);
        self.note_lacks(if is_understood { Vec::new() } else { received.lacks(FEATURES).into_iter().collect() });
        self.received = Some(received);
        // Where peers were seen outlives the daemon too.
        self.unsaved = true;
        let old = self.intent.take();
        // The rest is as it was, as far as anybody knows: the change need not wait until it was looked at.
        let settled = old.as_ref().filter(|old| old.settled && self.attached && !self.tables_wrong);
        let between = |old: &Intent| Change::between(&old.slice, &slice, &self.holders, self.persistent_keepalive);
        match settled.and_then(between) {
            Some(change) => self.follow(old, slice, tables, change),
            None => {
                self.intend(old, slice, tables);
                self.round();
            }
        }
        if self.stale_counters {
            // Another version's programs were in force, whose counters were only now taken over.
            self.reset_stale_counters();
        }
    }

    fn note_lacks(&mut self, lacks: Vec<String>) {
        if lacks != self.lacks && !lacks.is_empty() {
            tracing::warn!(features = lacks.join(", "), "policy requires what this noded does not understand: denied");
        }
        self.lacks = lacks;
    }

    /// Puts a change in force. What goes wrong here the next round tries again, after a look.
    fn follow(&mut self, old: Option<Intent>, slice: Arc<Slice>, tables: Tables, change: Change) {
        let Change { peers, holders } = change;
        let generation = old.and_then(|old| old.generation).filter(|_| peers.switch.is_none());
        let steps = plan_change(&peers);
        // The guard hears of the endpoints in a round.
        self.is_guard_behind |= !peers.wanted.is_empty();
        let (fresh_endpoints, changed_holder) = (peers.fresh_endpoints, peers.changed_holder);
        self.holders = holders;
        self.intent = Some(Intent { slice, tables, generation, settled: false, fresh_endpoints, changed_holder });
        let outcome = self.apply(steps);
        self.switched |= outcome.generation.is_some();
        self.note(&outcome);
        self.conclude(outcome.error(), false);
    }

    fn intend(&mut self, old: Option<Intent>, slice: Arc<Slice>, tables: Tables) {
        let holders = holders::holders(&slice, self.key.public());
        let mut changed_holder = holders::changed(&self.holders, &holders);
        let mut fresh_endpoints = intent::fresh_endpoints(old.as_ref().map(|intent| &*intent.slice), &slice);
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
        self.enforced.send_replace(Enforced { revision, generation, error: Some(error), lacks: self.lacks.clone() });
    }

    /// What the tables should say; an error: they need not say anything yet.
    pub fn expected(&self) -> Result<Expected, Unanswered> {
        if let Some(held) = self.outdated {
            return Err(Unanswered::Outdated { held });
        }
        let intent = self.intent.as_ref().and_then(|intent| Some((intent, intent.generation?)));
        let (intent, generation) = intent.ok_or(Unanswered::NotInForce)?;
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

    fn kernel(&mut self) -> Kernel<'_> {
        Kernel { wireguard: &mut *self.wireguard, link: &mut *self.link, datapath: &mut *self.datapath }
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
        self.intent.as_ref().map(|intent| intent::peers(&intent.slice, self.persistent_keepalive)).unwrap_or_default()
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
        f.debug_struct("Setup").field("journal", &self.journal).finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests;
