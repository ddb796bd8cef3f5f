//! Denied packets and packets of rules with `log`, as the programs report them.
#![allow(unsafe_code, reason = "tokio wants a promise about the descriptor")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use aya::maps::{Array, Map, MapData, RingBuf};
use ebpf_common::event::{Bucket, Event};
use ebpf_common::{map, reason};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::pin::Pins;
use super::{map::open, sys};
use crate::kernel::KernelError;

/// The reader of the events. There must be one at a time: what it has read is gone. Its descriptor is readable when
/// there is something to read.
pub struct Events {
    ring: RingBuf<MapData>,
    buckets: Array<MapData, Bucket>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("fd", &self.as_raw_fd()).finish()
    }
}

impl Events {
    /// Of an interface in the network namespace of the calling thread, once its datapath was attached.
    pub fn open(interface: &str, pin_root: &Path) -> Result<Self, KernelError> {
        Self::open_in(&Pins::new(pin_root, interface)?.maps)
    }

    pub(super) fn open_in(folder: &Path) -> Result<Self, KernelError> {
        let ring = RingBuf::try_from(Map::RingBuf(open(folder, map::EVENTS)?))
            .map_err(|error| KernelError::with("failed to map the ring buffer of events", error))?;
        let buckets = Array::try_from(Map::Array(open(folder, map::EVENT_BUCKETS)?))
            .map_err(|error| KernelError::with("`EVENT_BUCKETS` is no array", error))?;
        Ok(Self { ring, buckets })
    }

    /// By reason: how many events were suppressed since the last one that was reported.
    fn suppressed(&self) -> io::Result<Vec<(u8, u64)>> {
        let count = |reason: u8| match self.buckets.get(&reason.into(), 0) {
            Ok(bucket) => Ok((reason, bucket.suppressed)),
            Err(error) => Err(io::Error::other(error)),
        };
        reason::ALL.iter().map(|(reason, ..)| count(*reason)).collect()
    }

    /// The next event that is there; never waits.
    pub fn poll(&mut self) -> Option<Event> {
        loop {
            let record = self.ring.next()?;
            // Shorter than an event: none of ours.
            if let Some(event) = sys::from_bytes(&record) {
                return Some(event);
            }
        }
    }

    /// For a task of a tokio runtime.
    pub fn into_stream(self) -> io::Result<EventStream> {
        // SAFETY: the descriptor is the map's, which `self` holds open and never exchanges.
        let events = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?;
        Ok(EventStream { events })
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// Events as they come.
#[derive(Debug)]
pub struct EventStream {
    events: AsyncFd<Events>,
}

impl EventStream {
    /// By reason: how many events were suppressed since the last one that was reported.
    pub fn suppressed(&self) -> io::Result<Vec<(u8, u64)>> {
        self.events.get_ref().suppressed()
    }

    /// Waits for the next event. Nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> io::Result<Event> {
        loop {
            let mut guard = self.events.readable_mut().await?;
            if let Some(event) = guard.get_inner_mut().poll() {
                return Ok(event);
            }
            guard.clear_ready();
        }
    }
}
