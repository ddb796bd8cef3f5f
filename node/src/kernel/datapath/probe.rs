//! A probe: the same program on the live tables, with counters, records and events of its own, fed by hand. It tells what
//! the kernel would do with a packet and disturbs nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use aya::Ebpf;
use aya::programs::{TestRun, TestRunOptions, Xdp};
use ebpf_common::event::Event;
use ebpf_common::flow::{Flow, FlowKey};
use ebpf_common::fragment::{Fragment, FragmentKey};
use ebpf_common::table::NO_RULE_SLOT;
use ebpf_common::{EGRESS, INGRESS, reason};

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin::{create_folder, name};
use crate::kernel::datapath::count::counters::CounterMaps;
use crate::kernel::datapath::events::Events;
use crate::kernel::datapath::program::{Instance, NEXT, classifier};
use crate::kernel::datapath::records::flows::Flows;
use crate::kernel::inspect::{Counters, Probed};

/// Shorter packets the kernel does not take for a test run: the length of an Ethernet header, which it wants to see.
pub const SHORTEST: usize = 14;

/// Two instances, one for each direction, that share their records.
pub struct Probe {
    egress: Ebpf,
    ingress: Ebpf,
    counters: CounterMaps,
    flows: Flows,
    events: Events,
    /// The counters as they were after the last packet.
    reasons: BTreeMap<(u32, u8), u64>,
    rules: BTreeMap<u32, u64>,
}

/// A reason's counter that is not what it was.
#[derive(Clone, Copy, Debug)]
struct Moved {
    direction: u32,
    reason: u8,
    packets: u64,
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe").finish_non_exhaustive()
    }
}

/// Begins the name of the folder in which a probe's own maps are pinned while it is loaded.
const FOLDER: &str = "probe-";
static NUMBER: AtomicU32 = AtomicU32::new(0);

impl Probe {
    /// `tables` is the folder of the pinned tables. `every`: for [`Probe::report`].
    pub(crate) fn load(tables: &Path, every: bool) -> Result<Self, KernelError> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = tables.with_file_name(format!("{FOLDER}{}-{number}", process::id()));
        create_folder(&folder)?;
        // The two meet by the pins; then they hold the maps themselves.
        let probe = Self::load_in(tables, &folder, every);
        let removed = fs::remove_dir_all(&folder)
            .map_err(|error| KernelError::with(format!("failed to remove `{}`", folder.display()), error));
        let probe = probe?;
        removed.map(|()| probe)
    }

    fn load_in(tables: &Path, state: &Path, every: bool) -> Result<Self, KernelError> {
        let load = |direction| Instance { direction, trace: false, tables, state, small: true, every }.load();
        let mut ingress = load(INGRESS)?;
        if every {
            early_drop(&mut ingress)?.load().map_err(|error| {
                KernelError::with("the kernel's verifier refused the early drop: this build is broken", error)
            })?;
        }
        let egress = load(EGRESS)?;
        let mut flows = Flows::open(state)?;
        flows.begin();
        Ok(Self {
            egress,
            ingress,
            counters: CounterMaps::open(state)?,
            flows,
            events: Events::open_in(state)?,
            reasons: BTreeMap::new(),
            rules: BTreeMap::new(),
        })
    }

    /// Lets the program judge a packet, from its IP header on. Of the rules, those that count in `slots` are looked at.
    /// Records stay for the packets after it; see [`Probe::forget`].
    ///
    /// # Errors
    /// The packet is shorter than [`SHORTEST`] or longer than the kernel takes, or the program contradicts itself.
    pub fn judge(
        &mut self,
        direction: u32,
        packet: &[u8],
        slots: impl IntoIterator<Item = u32>,
    ) -> Result<Probed, KernelError> {
        let returned = self.run(direction, packet)?;
        let moved = self.moved()?;
        let [Moved { direction: counted_direction, reason, packets: 1 }] = moved[..] else {
            return Err(KernelError::new(format!("one packet moved these counters: {moved:?}")));
        };
        let rules = self.moved_rules(slots)?;
        let passes = returned == NEXT;
        if counted_direction != direction || passes != reason::passes(reason) || rules.len() > 1 {
            return Err(KernelError::new(format!(
                "the {} probe returned {} and counted `{}`, rule slots {rules:?}",
                name(direction),
                returned,
                reason::name(reason),
            )));
        }
        Ok(Probed { passes, reason, rule: rules.first().copied() })
    }

    /// As [`Probe::judge`], by a probe that reports every packet: the event says what was found, and no counter is looked
    /// at, which is some fifty times as fast. Whoever wants the counters held against the packets adds these up.
    ///
    /// # Errors
    /// As there; or the probe does not report every packet.
    pub fn report(&mut self, direction: u32, packet: &[u8]) -> Result<(Probed, Event), KernelError> {
        let returned = self.run(direction, packet)?;
        let (Some(event), None) = (self.events.poll(), self.events.poll()) else {
            return Err(KernelError::new(format!("the {} probe did not report one packet once", name(direction))));
        };
        let passes = returned == NEXT;
        if u32::from(event.direction) != direction || passes != reason::passes(event.reason) {
            return Err(KernelError::new(format!(
                "the {} probe returned {returned} and reported {event:?}",
                name(direction)
            )));
        }
        let rule = (event.rule != NO_RULE_SLOT).then_some(event.rule);
        Ok((Probed { passes, reason: event.reason, rule }, event))
    }

    /// Whether the early drop, which runs in XDP ahead of the one at ingress, drops a packet, and why.
    ///
    /// # Errors
    /// As [`Probe::report`]'s.
    pub fn report_early(&mut self, packet: &[u8]) -> Result<Option<Probed>, KernelError> {
        let options = TestRunOptions { data_in: Some(packet), ..TestRunOptions::default() };
        let result = early_drop(&mut self.ingress)?.test_run(options).map_err(|error| {
            KernelError::with(format!("failed to run the early drop on a packet of {} bytes", packet.len()), error)
        })?;
        match (result.return_value, self.events.poll(), self.events.poll()) {
            (XDP_PASS, None, None) => Ok(None),
            (XDP_DROP, Some(event), None) if !reason::passes(event.reason) => {
                let rule = (event.rule != NO_RULE_SLOT).then_some(event.rule);
                Ok(Some(Probed { passes: false, reason: event.reason, rule }))
            }
            (returned, event, _) => {
                Err(KernelError::new(format!("the early drop returned {returned} and reported {event:?}")))
            }
        }
    }

    /// Runs the program once; what it returned.
    fn run(&mut self, direction: u32, packet: &[u8]) -> Result<i32, KernelError> {
        let ebpf = if direction == EGRESS { &mut self.egress } else { &mut self.ingress };
        let options = TestRunOptions { data_in: Some(packet), ..TestRunOptions::default() };
        let result = classifier(ebpf)?.test_run(options).map_err(|error| {
            let (direction, length) = (name(direction), packet.len());
            KernelError::with(format!("failed to run the {direction} probe on a packet of {length} bytes"), error)
        })?;
        Ok(result.return_value as i32)
    }

    fn moved(&mut self) -> Result<Vec<Moved>, KernelError> {
        let now = self.counters.reasons()?;
        let mut moved = Vec::new();
        for ((direction, reason), counter) in now {
            let before = self.reasons.insert((direction, reason), counter.packets).unwrap_or(0);
            if counter.packets != before {
                moved.push(Moved { direction, reason, packets: counter.packets.wrapping_sub(before) });
            }
        }
        Ok(moved)
    }

    fn moved_rules(&mut self, slots: impl IntoIterator<Item = u32>) -> Result<Vec<u32>, KernelError> {
        let mut moved = Vec::new();
        for slot in slots {
            let packets = self.counters.rule(slot)?.packets;
            if self.rules.insert(slot, packets).unwrap_or(0) != packets {
                moved.push(slot);
            }
        }
        Ok(moved)
    }

    /// What the probe itself has counted.
    pub fn counters(&self, slots: impl IntoIterator<Item = u32>) -> Result<Counters, KernelError> {
        self.counters.read(slots)
    }

    /// The probe's own records.
    pub fn flows(&self) -> Result<Vec<(FlowKey, Flow)>, KernelError> {
        self.flows.list()
    }

    /// The probe's own records of datagrams in fragments.
    pub fn fragments(&self) -> Result<Vec<(FragmentKey, Fragment)>, KernelError> {
        self.flows.list_fragments()
    }

    /// The probe's own events.
    pub fn events(&mut self) -> &mut Events {
        &mut self.events
    }

    /// Deletes the probe's records.
    pub fn forget(&mut self) -> Result<(), KernelError> {
        self.flows.clear().map(drop)
    }
}

/// What an XDP program returns, as the kernel numbers it.
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
/// Name of the program in the object.
const EARLY: &str = "early";

fn early_drop(ebpf: &mut Ebpf) -> Result<&mut Xdp, KernelError> {
    let program = ebpf.program_mut(EARLY);
    let program = program.ok_or_else(|| KernelError::new(format!("the embedded object has no program `{EARLY}`")))?;
    program.try_into().map_err(|error| KernelError::with(format!("`{EARLY}` is no XDP program"), error))
}

/// Removes what probes left that were killed while they were loaded.
pub(crate) fn clean(top: &Path) -> io::Result<()> {
    for entry in fs::read_dir(top)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(FOLDER) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}
