//! The guard's maps, as userspace reads and writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, MapType, PerCpuArray};
use ebpf_common::counter::Counter;
use ebpf_common::table::Address;
use ebpf_common::underlay::{
    self, BINS, Config, Endpoint, EndpointBuckets, HANDSHAKES, ROWS, Rate, mac1_state, map, reason,
};

use super::ebpf::{Folders, remove_folder};
use crate::kernel::KernelError;
use crate::kernel::datapath::count::counters;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::{Layout, array, open, per_cpu};
use crate::kernel::guard::{Limit, Wanted};

const HASH: MapType = MapType::Hash;

/// What the maps in `maps/` must be.
const LAYOUTS: [Layout; 9] = [
    array(map::CONFIG, size_of::<Config>(), 1),
    Layout { name: map::ADDRESSES, kind: HASH, key: size_of::<Address>(), value: 4, entries: underlay::ADDRESSES },
    Layout {
        name: map::ENDPOINTS,
        kind: HASH,
        key: size_of::<Endpoint>(),
        value: size_of::<EndpointBuckets>(),
        entries: underlay::ENDPOINTS,
    },
    array(map::SOURCES, size_of::<u64>(), ROWS * BINS),
    array(map::TOTALS, size_of::<u64>(), HANDSHAKES),
    per_cpu(map::CHECKS, size_of::<u64>(), HANDSHAKES),
    Layout { name: map::EVENTS, kind: MapType::RingBuf, key: 0, value: 0, entries: underlay::EVENT_BYTES },
    array(map::EVENT_BUCKETS, size_of::<u64>(), reason::COUNT),
    per_cpu(map::UNREPORTED, size_of::<u64>(), reason::COUNT),
];
const COUNTERS: Layout = per_cpu(map::COUNTERS, size_of::<Counter>(), reason::COUNT);

/// Makes room where another build left maps of other shapes: nothing in them is worth a guard that is not there.
pub(crate) fn remove_others(folders: &Folders) -> Result<(), KernelError> {
    let shared =
        LAYOUTS.iter().try_fold(true, |fits, layout| Ok::<_, KernelError>(fits & layout.fits(&folders.maps)?))?;
    let own = folders.places()?.iter().try_fold(true, |fits, name| Ok(fits & COUNTERS.fits(&folders.at(name))?))?;
    if shared && own { Ok(()) } else { remove_folder(&folders.top) }
}

/// What all places share.
pub(crate) struct Shared {
    config: Array<MapData, Config>,
    addresses: Keys<Address, u32>,
    endpoints: Keys<Endpoint, EndpointBuckets>,
}

impl Shared {
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            config: Array::try_from(Map::Array(open(folder, map::CONFIG)?)).map_err(failed)?,
            addresses: Keys::open(folder, map::ADDRESSES)?,
            endpoints: Keys::open(folder, map::ENDPOINTS)?,
        })
    }

    /// Brings the programs' knowledge up to date; they use it from the next packet on.
    pub(crate) fn write(&mut self, wanted: &Wanted, addresses: &BTreeSet<IpAddr>) -> Result<(), KernelError> {
        let addresses = addresses.iter().map(|address| Address::from(*address));
        self.addresses.follow(addresses.take(underlay::ADDRESSES as usize).collect(), 0)?;
        let endpoints = wanted.endpoints.iter().map(|endpoint| Endpoint::from(*endpoint));
        // Buckets of those that stay are as empty as they are.
        let endpoints = endpoints.take(underlay::ENDPOINTS as usize).collect();
        self.endpoints.follow(endpoints, EndpointBuckets::default())?;
        let present = self.config.get(&0, 0).map_err(failed)?;
        let config = config(wanted, if present.seed == 0 { seed()? } else { present.seed });
        if config != present {
            self.config.set(0, config, 0).map_err(failed)?;
        }
        Ok(())
    }
}

fn seed() -> Result<u64, KernelError> {
    let seed = getrandom::u64().map_err(|error| KernelError::new(format!("there is no randomness: {error}")))?;
    // 0 means that there is none.
    Ok(seed | 1)
}

fn config(wanted: &Wanted, seed: u64) -> Config {
    let Wanted { limits, port, public_key, .. } = wanted;
    let rate = |limit: Limit| Rate::new(limit.per_second, limit.burst);
    Config {
        source: rate(limits.source),
        total: rate(limits.total),
        endpoint: rate(limits.endpoint),
        checks: rate(limits.checks),
        seed,
        mac1: mac1_state(public_key.as_bytes()),
        port: *port,
        enabled: 1,
        keyed: 1,
        _pad: 0,
    }
}

/// A hash map of which userspace minds the keys.
struct Keys<K, V> {
    map: HashMap<MapData, K, V>,
    /// The same map, to be read whole.
    data: MapData,
}

impl<K: Pod + Ord, V: Pod> Keys<K, V> {
    fn open(folder: &Path, name: &str) -> Result<Self, KernelError> {
        let map = HashMap::try_from(Map::HashMap(open(folder, name)?)).map_err(failed)?;
        Ok(Self { map, data: open(folder, name)? })
    }

    /// Adds and removes keys until they are the wanted ones. Values of those that stay are left alone.
    fn follow(&mut self, wanted: BTreeSet<K>, value: V) -> Result<(), KernelError> {
        let present = sys::read_hash::<K, V>(self.data.fd().as_fd()).map_err(failed)?;
        let present: BTreeSet<K> = present.into_iter().map(|(key, _)| key).collect();
        for key in present.difference(&wanted) {
            self.map.remove(key).map_err(failed)?;
        }
        for key in wanted.difference(&present) {
            self.map.insert(key, value, 0).map_err(failed)?;
        }
        Ok(())
    }
}

/// What became of datagrams at one interface.
pub(crate) struct Counters(PerCpuArray<MapData, Counter>);

impl Counters {
    pub(crate) fn open(folder: &Path) -> Result<Self, KernelError> {
        let map = Map::PerCpuArray(open(folder, map::COUNTERS)?);
        PerCpuArray::try_from(map).map(Self).map_err(failed)
    }

    pub(crate) fn read(&self) -> Result<BTreeMap<u8, Counter>, KernelError> {
        let every = reason::ALL
            .iter()
            .map(|(reason, ..)| Ok((*reason, counters::sum(&self.0.get(&u32::from(*reason), 0).map_err(failed)?))));
        every.collect()
    }
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> KernelError {
    KernelError::with("the guard's maps cannot be read or written", error)
}
