//! The guard on the underlay as the agent minds it: kept as it should be in every round, and spoken of where it is not. A node
//! without it enforces its policy all the same, so nothing here is ever an error of the enforcement.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ebpf_common::counter::Counter;
use ebpf_common::underlay::reason;
use policy::PublicKey;

use crate::config;
use crate::kernel::guard::{GuardAttachment, Kept, Wanted};
use crate::kernel::{Device, Guard, KernelError, PeerConfig};
use host::error::chain;

/// Among repairs, in metrics.
pub const REPAIR: &str = "guard";
/// Between two looks that nothing new asks for: a change of policy need not wait for them.
const LOOK: Duration = Duration::from_secs(1);
/// Between two lines in the log about what was dropped.
const TELL: Duration = Duration::from_secs(60);

/// The guard, and what was last seen of it.
pub struct Watch {
    guard: Option<Box<dyn Guard>>,
    settings: Option<config::Guard>,
    kept: Kept,
    endpoints: BTreeSet<SocketAddr>,
    looked: Option<Instant>,
    /// `None`: not looked at yet; what an earlier process has seen is no news.
    dropped: Option<BTreeMap<u8, u64>>,
    told: Option<Instant>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("settings", &self.settings).field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl Watch {
    /// `settings: None` takes off what an earlier process put on.
    pub fn new(guard: Box<dyn Guard>, settings: Option<config::Guard>) -> Self {
        Self { guard: Some(guard), settings, ..Self::none() }
    }

    /// Nothing to mind.
    pub fn none() -> Self {
        Self {
            guard: None,
            settings: None,
            kept: Kept::default(),
            endpoints: BTreeSet::new(),
            looked: None,
            dropped: None,
            told: None,
        }
    }

    /// One look, and what follows from it; returns how often it was put back. Endpoints are known from what WireGuard has
    /// learned, and from what the controller says: a peer that is new here is no stranger. Without a device those of the
    /// last look stay.
    pub fn round<'a>(
        &mut self,
        port: u16,
        public_key: PublicKey,
        device: Option<&Device>,
        peers: impl Iterator<Item = &'a PeerConfig>,
    ) -> u64 {
        if let Some(device) = device {
            let learned = device.peers.values().filter_map(|peer| peer.endpoint);
            let endpoints: BTreeSet<_> = learned.chain(peers.filter_map(|peer| peer.endpoint)).collect();
            if endpoints != self.endpoints {
                (self.endpoints, self.looked) = (endpoints, None);
            }
        }
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return 0;
        }
        let Some(guard) = &mut self.guard else { return 0 };
        let wanted = self.settings.as_ref().map(|settings| Wanted {
            interfaces: settings.interfaces.clone(),
            mode: settings.mode,
            limits: settings.limits,
            port,
            public_key,
            endpoints: self.endpoints.clone(),
        });
        let kept = guard.keep(wanted.as_ref());
        self.looked = Some(Instant::now());
        self.say(&kept);
        let repaired = kept.repaired as u64;
        self.kept = kept;
        self.tell_drops();
        repaired
    }

    /// What is new about it.
    fn say(&self, kept: &Kept) {
        if let Some(error) = kept.error.as_ref().filter(|error| self.kept.error.as_ref() != Some(error)) {
            tracing::warn!(error, "the guard on the underlay is not there; the policy is enforced all the same");
        }
        for place in kept.attachments.iter().filter(|place| !self.kept.attachments.contains(place)) {
            let GuardAttachment { interface, hook, ahead, note } = place;
            match (hook, note) {
                (Some(hook), None) => tracing::info!(interface, %hook, ahead, "guard on the underlay"),
                (Some(hook), Some(note)) => {
                    tracing::warn!(interface, %hook, ahead, note, "guard on the underlay, not as it was asked for");
                }
                (None, note) => {
                    tracing::warn!(interface, note, "no guard on this interface; the policy is enforced all the same");
                }
            }
        }
        if kept.repaired > 0 {
            tracing::warn!(count = kept.repaired, kind = REPAIR, "drift repaired");
        }
    }

    /// Drops since the last line, when one is due.
    fn tell_drops(&mut self) {
        if self.told.is_some_and(|told| told.elapsed() < TELL) {
            return;
        }
        let Ok(counters) = self.counters() else { return };
        let mut dropped = BTreeMap::new();
        for ((_, number), counter) in counters.into_iter().filter(|((_, number), _)| !reason::passes(*number)) {
            *dropped.entry(number).or_insert(0u64) += counter.packets;
        }
        let Some(former) = self.dropped.replace(dropped.clone()) else { return };
        let fresh: Vec<_> = dropped
            .iter()
            .map(|(number, packets)| (number, packets.saturating_sub(former.get(number).copied().unwrap_or(0))))
            .filter(|(_, packets)| *packets > 0)
            .map(|(number, packets)| format!("{}: {packets}", reason::name(*number)))
            .collect();
        if !fresh.is_empty() {
            self.told = Some(Instant::now());
            tracing::warn!(packets = fresh.join(", "), "packets to WireGuard's port dropped by the guard");
        }
    }

    /// Where it stands, as of the last look.
    pub fn attachments(&self) -> &[GuardAttachment] {
        &self.kept.attachments
    }

    /// Why it is nowhere, as of the last look.
    pub fn error(&self) -> Option<&str> {
        self.kept.error.as_deref()
    }

    /// Whether there is to be one.
    pub fn is_wanted(&self) -> bool {
        self.guard.is_some() && self.settings.is_some()
    }

    /// By interface and reason.
    pub fn counters(&mut self) -> Result<BTreeMap<(String, u8), Counter>, String> {
        let counters = self.guard.as_mut().map_or(Ok(BTreeMap::new()), |guard| guard.counters());
        counters.map_err(|error: KernelError| chain(&error))
    }
}
