//! The pinned maps: their layout, and handles to them.

use std::path::Path;

use std::os::fd::AsFd;

use aya::maps::{MapData, MapInfo, MapType};
use aya::util::nr_cpus;
use ebpf_common::counter::{Counter, LOSSES, PairBucket};
use ebpf_common::event::{Bucket, Clock};
use ebpf_common::flow::{Flow, FlowFilter, FlowKey, Remote, TOTALS};
use ebpf_common::fragment::{Fragment, FragmentKey};
use ebpf_common::table::{Control, TableCopy};
use ebpf_common::{COPIES, DIRECTIONS, limit, map, reason};

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin;
use crate::kernel::datapath::sys;

/// What a map must be for the programs and this build to understand each other.
pub(crate) struct Layout {
    pub(crate) name: &'static str,
    pub(crate) kind: MapType,
    pub(crate) key: usize,
    pub(crate) value: usize,
    pub(crate) entries: u32,
}

pub(crate) const fn array(name: &'static str, value: usize, entries: u32) -> Layout {
    Layout { name, kind: MapType::Array, key: 4, value, entries }
}

pub(crate) const fn per_cpu(name: &'static str, value: usize, entries: u32) -> Layout {
    Layout { name, kind: MapType::PerCpuArray, key: 4, value, entries }
}

const fn hash(name: &'static str, key: usize, value: usize, entries: u32) -> Layout {
    Layout { name, kind: MapType::Hash, key, value, entries }
}

const LAYOUTS: [Layout; 15] = [
    array(map::CONTROL, size_of::<Control>(), 1),
    array(map::TABLES, size_of::<TableCopy>(), COPIES),
    hash(map::FLOWS, size_of::<FlowKey>(), size_of::<Flow>(), limit::FLOWS),
    array(map::FLOW_FILTER, size_of::<FlowFilter>(), 1),
    hash(map::FLOWS_OPENED, size_of::<Remote>(), size_of::<u64>(), limit::REMOTES),
    hash(map::FLOWS_GONE, size_of::<Remote>(), size_of::<u64>(), limit::REMOTES),
    array(map::FLOW_TOTALS, size_of::<u64>(), TOTALS),
    hash(map::FRAGMENTS, size_of::<FragmentKey>(), size_of::<Fragment>(), limit::FRAGMENTS),
    per_cpu(map::REASON_COUNTERS, size_of::<Counter>(), DIRECTIONS * reason::COUNT),
    per_cpu(map::RULE_COUNTERS, size_of::<Counter>(), limit::RULES),
    per_cpu(map::PAIR_TABLE, size_of::<PairBucket>(), limit::PAIR_BUCKETS),
    per_cpu(map::LOSSES, size_of::<u64>(), LOSSES),
    Layout { name: map::EVENTS, kind: MapType::RingBuf, key: 0, value: 0, entries: limit::EVENT_BYTES },
    array(map::EVENT_BUCKETS, size_of::<Bucket>(), reason::COUNT),
    per_cpu(map::CLOCK, size_of::<Clock>(), 1),
];

/// Refuses pinned maps that are not laid out as this build has it. Maps that are not there are made by the loader;
/// returns whether all tables are there.
pub(crate) fn check_layouts(folder: &Path) -> Result<bool, KernelError> {
    let mut complete = true;
    for layout in &LAYOUTS {
        let path = folder.join(layout.name);
        let Some(fd) = sys::object(&path)
            .map_err(|error| KernelError::with(format!("failed to open the pinned map `{}`", path.display()), error))?
        else {
            complete &= !map::POLICY.contains(&layout.name);
            continue;
        };
        let info = MapData::from_fd(fd).and_then(|map| map.info());
        let info = info.map_err(|error| KernelError::with(format!("`{}` is no map", path.display()), error))?;
        if !layout.describes(&info) {
            return Err(KernelError::new(format!(
                "the pinned map `{}` is a {:?} of {} entries of {} bytes by {} bytes and not a {:?} of {}, {}, {}: another \
                 build of `noded` made it; run its `noded leave`, or stop it and remove `{}`",
                path.display(),
                info.map_type().ok(),
                info.max_entries(),
                info.value_size(),
                info.key_size(),
                layout.kind,
                layout.entries,
                layout.value,
                layout.key,
                folder.parent().unwrap_or(folder).display(),
            )));
        }
    }
    Ok(complete)
}

impl Layout {
    /// Whether the map that is pinned in a folder, if there is one, is laid out like this.
    pub(crate) fn fits(&self, folder: &Path) -> Result<bool, KernelError> {
        let path = folder.join(self.name);
        let failed = |error| KernelError::with(format!("failed to open the pinned map `{}`", path.display()), error);
        let Some(fd) = sys::object(&path).map_err(failed)? else { return Ok(true) };
        Ok(MapData::from_fd(fd).and_then(|map| map.info()).is_ok_and(|info| self.describes(&info)))
    }

    fn describes(&self, info: &MapInfo) -> bool {
        info.map_type().is_ok_and(|kind| kind == self.kind)
            && info.key_size() as usize == self.key
            && info.value_size() as usize == self.value
            && info.max_entries() == self.entries
    }
}

/// Whether a map is what this build has under a name.
pub(crate) fn is_like_ours(map: &MapData, name: &str) -> bool {
    let layout = LAYOUTS.iter().find(|layout| layout.name == name);
    layout.is_some_and(|layout| map.info().is_ok_and(|info| layout.describes(&info)))
}

/// Opens a pinned map.
pub(crate) fn open(folder: &Path, name: &str) -> Result<MapData, KernelError> {
    let path = folder.join(name);
    MapData::from_pin(&path)
        .map_err(|error| KernelError::with(format!("failed to open the pinned map `{}`", path.display()), error))
}

/// Everything in a pinned map, as bytes: keys, and the values of all CPUs. `None`: nothing is pinned there.
pub(crate) fn read_raw(path: &Path) -> Result<Option<Vec<sys::RawEntry>>, KernelError> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        KernelError::with(format!("failed to read the pinned map `{}`", path.display()), error)
    };
    let Some(fd) = sys::object(path).map_err(|error| failed(error.into()))? else { return Ok(None) };
    let map = MapData::from_fd(fd).map_err(|error| failed(error.into()))?;
    let info = map.info().map_err(|error| failed(error.into()))?;
    let (key, value) = (info.key_size() as usize, info.value_size() as usize);
    let value = match info.map_type() {
        Ok(MapType::PerCpuArray | MapType::PerCpuHash) => {
            let cpus = nr_cpus().map_err(|(path, error)| failed(format!("{path}: {error}").into()))?;
            value.next_multiple_of(8) * cpus
        }
        Ok(MapType::Array | MapType::Hash) => value,
        kind => return Err(failed(format!("it is a {kind:?}").into())),
    };
    sys::read_raw(map.fd().as_fd(), key, value).map(Some).map_err(|error| failed(error.into()))
}

/// Every map of the datapath, held so that pins which somebody removed can be put back.
#[derive(Debug)]
pub(crate) struct Held(Vec<(&'static str, MapData, u32)>);

impl Held {
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let beside = [map::LAYOUT, map::INHERITED].into_iter().filter(|name| folder.join(name).exists());
        let held = LAYOUTS.iter().map(|layout| layout.name).chain(beside).map(|name| {
            let map = open(folder, name)?;
            let id = map.info().map_err(|error| KernelError::with(format!("failed to ask for `{name}`"), error))?.id();
            Ok((name, map, id))
        });
        held.collect::<Result<_, _>>().map(Self)
    }

    /// Whether every pin is there and is the map that the programs use.
    pub(crate) fn are_pinned(&self, folder: &Path) -> bool {
        self.0.iter().all(|(name, _, id)| is_map(&folder.join(name), *id))
    }

    pub(crate) fn pin_again(&self, folder: &Path) -> Result<(), KernelError> {
        for (name, map, id) in &self.0 {
            let path = folder.join(name);
            if !is_map(&path, *id) {
                pin::replace(&path, |path| map.pin(path))?;
            }
        }
        Ok(())
    }
}

/// Whether what is pinned there is the map with this id.
pub(crate) fn is_map(path: &Path, id: u32) -> bool {
    let Ok(Some(fd)) = sys::object(path) else { return false };
    MapData::from_fd(fd).and_then(|map| map.info()).is_ok_and(|info| info.id() == id)
}
