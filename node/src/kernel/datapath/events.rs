//! What the programs report of packets: the policy's of denied ones and those of rules with `log`, the guard's of dropped
//! datagrams.
#![allow(unsafe_code, reason = "tokio wants a promise about the descriptor")]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::{Array, Map, MapData, PerCpuArray, RingBuf};
use ebpf_common::event::{Bucket, Event};
use ebpf_common::{map, underlay};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::kernel::KernelError;
use crate::kernel::datapath::attach::pin::Pins;
use crate::kernel::datapath::sys;
use crate::kernel::datapath::tables::map::{is_map, open};

/// The reader of the events. There must be one at a time: what it has read is gone. Its descriptor is readable when
/// there is something to read.
pub struct Events<E = Event> {
    ring: RingBuf<MapData>,
    pin: PathBuf,
    id: u32,
    unreported: Unreported,
    kind: PhantomData<E>,
}

/// Where the programs count what they did not report, by reason.
enum Unreported {
    Buckets(Array<MapData, Bucket>),
    PerCpu(PerCpuArray<MapData, u64>),
}

impl<E> std::fmt::Debug for Events<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl Events {
    /// Of an interface in the network namespace of the calling thread, once its datapath was attached.
    pub fn open(interface: &str, pin_root: &Path) -> Result<Self, KernelError> {
        Self::open_in(&Pins::new(pin_root, interface)?.maps)
    }

    pub(crate) fn open_in(folder: &Path) -> Result<Self, KernelError> {
        let buckets = Map::Array(open(folder, map::EVENT_BUCKETS)?);
        let buckets = Array::try_from(buckets).map_err(|error| no_counts(map::EVENT_BUCKETS, error))?;
        Self::with(folder, map::EVENTS, Unreported::Buckets(buckets))
    }
}

impl Events<underlay::Event> {
    pub(crate) fn open_guard_in(folder: &Path) -> Result<Self, KernelError> {
        let counts = Map::PerCpuArray(open(folder, underlay::map::UNREPORTED)?);
        let counts = PerCpuArray::try_from(counts).map_err(|error| no_counts(underlay::map::UNREPORTED, error))?;
        Self::with(folder, underlay::map::EVENTS, Unreported::PerCpu(counts))
    }
}

fn no_counts(name: &str, error: aya::maps::MapError) -> KernelError {
    KernelError::with(format!("`{name}` does not count events"), error)
}

impl<E: Pod> Events<E> {
    fn with(folder: &Path, name: &str, unreported: Unreported) -> Result<Self, KernelError> {
        let failed = |error| KernelError::with(format!("failed to map the ring buffer `{name}`"), error);
        let ring = open(folder, name)?;
        let id = ring.info().map_err(failed)?.id();
        let ring = RingBuf::try_from(Map::RingBuf(ring)).map_err(failed)?;
        Ok(Self { ring, pin: folder.join(name), id, unreported, kind: PhantomData })
    }

    /// By reason: how many events were suppressed since the last one that was reported.
    pub fn suppressed(&self) -> io::Result<Vec<(u8, u64)>> {
        match &self.unreported {
            Unreported::Buckets(buckets) => counts(buckets.len(), |reason| Ok(buckets.get(&reason, 0)?.suppressed)),
            Unreported::PerCpu(counters) => counts(counters.len(), |reason| Ok(counters.get(&reason, 0)?.iter().sum())),
        }
    }

    /// Whether the programs' events still come here: their maps may have been made anew.
    pub fn is_current(&self) -> bool {
        is_map(&self.pin, self.id)
    }

    /// The next event that is there; never waits.
    pub fn poll(&mut self) -> Option<E> {
        loop {
            let record = self.ring.next()?;
            // Shorter than an event: none of ours.
            if let Some(event) = sys::from_bytes(&record) {
                return Some(event);
            }
        }
    }

    /// For a task of a tokio runtime.
    pub fn into_stream(self) -> io::Result<EventStream<E>> {
        // SAFETY: the descriptor is the map's, which `self` holds open and never exchanges.
        let events = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?;
        Ok(EventStream { events })
    }
}

fn counts(reasons: u32, count: impl Fn(u32) -> Result<u64, aya::maps::MapError>) -> io::Result<Vec<(u8, u64)>> {
    // Reasons are bytes.
    (0..reasons).map(|reason| Ok((reason as u8, count(reason).map_err(io::Error::other)?))).collect()
}

impl<E> AsRawFd for Events<E> {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// Events as they come.
#[derive(Debug)]
pub struct EventStream<E = Event> {
    events: AsyncFd<Events<E>>,
}

impl<E: Pod> EventStream<E> {
    /// By reason: how many events were suppressed since the last one that was reported.
    pub fn suppressed(&self) -> io::Result<Vec<(u8, u64)>> {
        self.events.get_ref().suppressed()
    }

    /// See [`Events::is_current`].
    pub fn is_current(&self) -> bool {
        self.events.get_ref().is_current()
    }

    /// Waits for the next event. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> io::Result<E> {
        loop {
            let mut guard = self.events.readable_mut().await?;
            if let Some(event) = guard.get_inner_mut().poll() {
                return Ok(event);
            }
            guard.clear_ready();
        }
    }
}
