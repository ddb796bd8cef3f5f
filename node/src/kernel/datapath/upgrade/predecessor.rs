//! What another version of `noded` left pinned for the same interface. Its tables mean nothing to this one; its programs
//! enforce them until this one's tables are filled, and its counts are taken over by name.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use ebpf_common::{EGRESS, INGRESS, map};
use policy::{Generation, Revision};

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::Hook;
use crate::kernel::datapath::attach::pin::{self, Pins};
use crate::kernel::datapath::attach::pinned::{is_enforced, is_pinned_first};
use crate::kernel::datapath::count::counters::{CounterMaps, read_inherited};
use crate::kernel::datapath::count::inherited::PredecessorCounts;
use crate::kernel::datapath::records::flows::Flows;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::{open, read_raw};
use crate::kernel::datapath::tables::mapping::Mapping;
use crate::kernel::datapath::upgrade::description::Description;
use host::error::chain;

/// Where versions up to 3 counted pairs: a hash, each value of every CPU.
const PAIR_COUNTERS: &str = "PAIR_COUNTERS";

/// The other versions of an interface, the newest first.
#[derive(Debug, Default)]
pub(crate) struct Predecessors(Vec<Pins>);

impl Predecessors {
    pub(crate) fn find(root: &Path, interface: &str) -> Result<Self, KernelError> {
        Pins::others(root, interface).map(Self)
    }

    /// The one whose programs are attached, in whichever direction.
    pub(crate) fn in_force(&self, hooks: &[Hook<'_>; 2]) -> Result<Option<&Pins>, KernelError> {
        for pins in &self.0 {
            if is_enforced(hooks, pins)? {
                return Ok(Some(pins));
            }
        }
        Ok(None)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Links that our program may take over.
    pub(crate) fn links(&self, direction: u32) -> Vec<PathBuf> {
        self.0.iter().map(|pins| pins.link(direction)).collect()
    }

    /// Takes over what can be understood of the counts, and removes the pins, now that this version enforces. What fails
    /// is said, and does not stop enforcement.
    pub(crate) fn succeed(&self, own: &Pins, counters: &mut CounterMaps, mut flows: Option<&mut Flows>) {
        for pins in &self.0 {
            let version = pins.version;
            // Those that were opened since the first were taken over.
            if let Some(Err(error)) = flows.as_deref_mut().map(|flows| adopt_flows(pins, flows, false)) {
                tracing::warn!(version, error = chain(&error), "records of flows cannot be taken over");
            }
            match inherit(pins, own, counters) {
                Ok(true) => tracing::info!(version, "counters of a predecessor of the tables taken over"),
                Ok(false) => tracing::warn!(
                    version,
                    "counters of a predecessor of the tables are in a layout that is not known, and begin anew"
                ),
                Err(error) => tracing::warn!(
                    version,
                    error = chain(&error),
                    "counters of a predecessor of the tables cannot be taken over, and begin anew"
                ),
            }
        }
        if let Err(error) = self.remove() {
            tracing::warn!(error = chain(&error), "pins of a predecessor of the tables stay");
        }
    }

    /// Unpins everything. Links that were not taken over take their programs with them.
    pub(crate) fn remove(&self) -> Result<(), KernelError> {
        for pins in &self.0 {
            for direction in [EGRESS, INGRESS] {
                pin::remove_file(&pins.link(direction))?;
            }
            pins.remove()?;
        }
        Ok(())
    }
}

/// `false`: nobody knows how that version counts.
fn inherit(pins: &Pins, own: &Pins, counters: &mut CounterMaps) -> Result<bool, KernelError> {
    let Some(described) = Description::read(pins)? else { return Ok(false) };
    let raw = |name| Ok::<_, KernelError>(read_raw(&pins.map(name))?.unwrap_or_default());
    let predecessor = PredecessorCounts {
        version: pins.version,
        reasons: raw(map::REASON_COUNTERS)?,
        rules: raw(map::RULE_COUNTERS)?,
        pairs: raw(PAIR_COUNTERS)?,
        slots: raw(map::PAIR_TABLE)?,
        losses: raw(map::LOSSES)?,
        inherited: read_inherited(&pins.maps)?,
    };
    counters.inherit(&own.maps, &predecessor, &described)?;
    Ok(true)
}

/// Whether that version's programs are in place and first: egress, ingress.
pub(crate) fn in_place(pins: &Pins, hooks: &[Hook<'_>; 2]) -> Result<[bool; 2], KernelError> {
    Ok([is_pinned_first(&hooks[0], pins)?, is_pinned_first(&hooks[1], pins)?])
}

/// What that version enforces. Its generations are not ours: 1 stands for any, and revision 0 for one that is not known.
pub(crate) fn in_force(pins: &Pins) -> (Generation, Revision) {
    (Generation(1), Revision(revision(pins).unwrap_or(0)))
}

fn revision(pins: &Pins) -> Option<u64> {
    Description::read(pins).ok()??;
    let control = read_raw(&pins.map(map::CONTROL)).ok()??;
    let active = u32::from_ne_bytes(control.first()?.1.get(..4)?.try_into().ok()?) & 1;
    if let Some(headers) = read_raw(&pins.map(HEADER)).ok()? {
        let (_, header) = headers.into_iter().find(|(key, _)| *key == active.to_ne_bytes())?;
        return Some(u64::from_ne_bytes(header.get(..8)?.try_into().ok()?));
    }
    let tables = open(&pins.maps, map::TABLES).ok()?;
    let copy = tables.info().ok()?.value_size().next_multiple_of(8) as usize;
    let mapping = Mapping::of(tables.fd().as_fd(), ebpf_common::COPIES as usize * copy, false).ok()?;
    mapping.read(active as usize * copy, 1).first().copied()
}

/// Until version 3 a map of its own had what is said of a copy as a whole, the revision first, as it is since then.
const HEADER: &str = "HEADER";

/// Copies the records that our programs have not got, if they are laid out as ours are. They are judged anew before they
/// let anything pass. `before_programs`: ours do not run yet.
pub(crate) fn adopt_flows(pins: &Pins, flows: &mut Flows, before_programs: bool) -> Result<(), KernelError> {
    let same = Description::read(pins)?.is_some_and(|described| described.flow == ebpf_common::flow::LAYOUT);
    if !same
        || !pins.map(map::FLOWS).exists()
        || !crate::kernel::datapath::tables::map::is_like_ours(&open(&pins.maps, map::FLOWS)?, map::FLOWS)
    {
        return Ok(());
    }
    let map = open(&pins.maps, map::FLOWS)?;
    let records = sys::read_hash(map.fd().as_fd())
        .map_err(|error| KernelError::with("failed to read a predecessor's records of flows", error))?;
    flows.adopt(records, before_programs)
}
