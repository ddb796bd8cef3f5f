//! Denied packets for those who ask: the last ones from memory, then each as it comes. Whoever follows too slowly loses
//! records, is told how many, and holds up nobody.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_stream::{Stream, StreamExt, iter};

use crate::view::{DropFilter, DropRecord, Drops, Event, Suppressed};

/// Denied packets that are remembered: half a minute of what the kernel's rate limit lets through for one reason.
pub const REMEMBERED: usize = 1_024;
/// Records that a follower may be behind before it loses some.
const BEHIND: usize = 1_024;

/// Where the reader of the kernel's events puts what was denied. Clones are the same.
#[derive(Clone, Debug)]
pub struct Hub {
    memory: Arc<Mutex<Memory>>,
    live: broadcast::Sender<DropRecord>,
}

#[derive(Debug, Default)]
struct Memory {
    recent: VecDeque<Event>,
    forgotten: u64,
    suppressed: BTreeMap<String, Count>,
}

/// Events of one reason that were suppressed.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    /// That a later event has told of.
    settled: u64,
    /// Since then, as last read.
    pending: u64,
    /// Of the sum, what followers have been told.
    told: u64,
}

impl Count {
    fn total(self) -> u64 {
        // What is pending is settled by an event that may not have been read yet.
        (self.settled + self.pending).max(self.told)
    }
}

impl Default for Hub {
    fn default() -> Self {
        Self { memory: Arc::default(), live: broadcast::Sender::new(BEHIND) }
    }
}

impl Hub {
    /// Remembers a denied packet and passes it on; `suppressed` of its reason were not reported before it.
    pub fn publish(&self, event: Event, suppressed: u64) {
        let mut memory = self.memory();
        if suppressed > 0 {
            let count = memory.suppressed.entry(event.reason.clone()).or_default();
            (count.settled, count.pending) = (count.settled + suppressed, 0);
            self.tell(&mut memory, &event.reason.clone());
        }
        if memory.recent.len() == REMEMBERED {
            memory.recent.pop_front();
            memory.forgotten += 1;
        }
        memory.recent.push_back(event.clone());
        // Under the lock, so that a follower gets each record once: from memory or as it comes. Nobody may be there.
        let _ = self.live.send(DropRecord::Drop(event));
    }

    /// Takes note of how many events of a reason the kernel has suppressed since the last one that it reported.
    pub fn pending(&self, reason: &str, pending: u64) {
        let mut memory = self.memory();
        if pending > 0 || memory.suppressed.contains_key(reason) {
            memory.suppressed.entry(reason.to_owned()).or_default().pending = pending;
            self.tell(&mut memory, reason);
        }
    }

    fn tell(&self, memory: &mut Memory, reason: &str) {
        let Some(count) = memory.suppressed.get_mut(reason) else { return };
        let (total, told) = (count.total(), count.told);
        if total > told {
            count.told = total;
            let record = Suppressed { reason: reason.to_owned(), events: total, since_last: Some(total - told) };
            let _ = self.live.send(DropRecord::Suppressed(record));
        }
    }

    /// What is remembered.
    pub fn recent(&self, filter: &DropFilter) -> Drops {
        self.memory().drops(filter)
    }

    /// What is remembered, then what comes.
    pub fn follow(&self, filter: DropFilter) -> Pin<Box<dyn Stream<Item = DropRecord> + Send>> {
        let (Drops { drops, forgotten, suppressed }, live) = {
            let memory = self.memory();
            (memory.drops(&filter), self.live.subscribe())
        };
        let forgotten = (forgotten > 0).then_some(DropRecord::Forgotten { events: forgotten });
        let first = suppressed.into_iter().map(DropRecord::Suppressed).chain(forgotten);
        let first: Vec<_> = first.chain(drops.into_iter().map(DropRecord::Drop)).collect();
        let live = BroadcastStream::new(live).filter_map(move |record| match record {
            Ok(DropRecord::Drop(event)) if !filter.admits(&event) => None,
            Ok(DropRecord::Suppressed(suppressed)) if !filter.admits_reason(&suppressed.reason) => None,
            Ok(record) => Some(record),
            Err(BroadcastStreamRecvError::Lagged(records)) => Some(DropRecord::Missed { records }),
        });
        Box::pin(iter(first).chain(live))
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        // Whoever panicked under the lock left counts at worst one behind.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    fn drops(&self, filter: &DropFilter) -> Drops {
        let suppressed = self.suppressed.iter().filter(|(reason, _)| filter.admits_reason(reason));
        Drops {
            drops: self.recent.iter().filter(|event| filter.admits(event)).cloned().collect(),
            forgotten: self.forgotten,
            suppressed: suppressed
                .map(|(reason, count)| Suppressed { reason: reason.clone(), events: count.total(), since_last: None })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use futures_util::FutureExt;

    use super::*;
    use crate::view::Direction;

    fn event(port: u16, reason: &str) -> Event {
        Event {
            time: "2026-01-01T00:00:00Z".to_owned(),
            direction: Direction::Egress,
            interface: "rampart0".to_owned(),
            source: IpAddr::from([10, 42, 1, 2]),
            destination: IpAddr::from([10, 42, 3, 2]),
            protocol: 6,
            source_port: Some(40_000),
            destination_port: Some(port),
            service: format!("tcp/{port}"),
            source_cidr: Some("web".to_owned()),
            destination_cidr: None,
            reason: reason.to_owned(),
            rule: None,
            revision: Some(7),
            length: 60,
        }
    }

    fn suppressed(reason: &str, events: u64, since_last: u64) -> DropRecord {
        DropRecord::Suppressed(Suppressed { reason: reason.to_owned(), events, since_last: Some(since_last) })
    }

    /// What a follower can have without waiting.
    fn ready(stream: &mut Pin<Box<dyn Stream<Item = DropRecord> + Send>>) -> Vec<DropRecord> {
        std::iter::from_fn(|| stream.next().now_or_never().flatten()).collect()
    }

    #[test]
    fn a_follower_gets_what_is_remembered_and_then_each_record_once() {
        let hub = Hub::default();
        hub.publish(event(1, "no-rule"), 0);
        let mut stream = hub.follow(DropFilter::default());
        hub.publish(event(2, "deny-rule"), 0);
        let expected = [event(1, "no-rule"), event(2, "deny-rule")].map(DropRecord::Drop);
        assert_eq!(ready(&mut stream), expected);
        assert_eq!(ready(&mut stream), []);
    }

    #[test]
    fn what_was_suppressed_is_told_once_whether_an_event_or_the_bucket_says_it() {
        let hub = Hub::default();
        let mut stream = hub.follow(DropFilter::default());
        hub.pending("no-rule", 5);
        hub.pending("no-rule", 5);
        assert_eq!(ready(&mut stream), [suppressed("no-rule", 5, 5)]);
        // The event that tells of them is still on its way when the bucket is read again.
        hub.pending("no-rule", 0);
        assert_eq!(ready(&mut stream), []);
        hub.publish(event(1, "no-rule"), 8);
        assert_eq!(ready(&mut stream), [suppressed("no-rule", 8, 3), DropRecord::Drop(event(1, "no-rule"))]);
        let total = Suppressed { reason: "no-rule".to_owned(), events: 8, since_last: None };
        assert_eq!(hub.recent(&DropFilter::default()).suppressed, std::slice::from_ref(&total));
        let mut late = hub.follow(DropFilter::default());
        assert_eq!(ready(&mut late), [DropRecord::Suppressed(total), DropRecord::Drop(event(1, "no-rule"))]);
    }

    #[test]
    fn memory_is_bounded_and_says_what_it_forgot() {
        let hub = Hub::default();
        for port in 0..REMEMBERED as u16 + 3 {
            hub.publish(event(port, "no-rule"), 0);
        }
        let drops = hub.recent(&DropFilter::default());
        assert_eq!((drops.drops.len(), drops.forgotten), (REMEMBERED, 3));
        assert_eq!(drops.drops[0], event(3, "no-rule"));
        let first = ready(&mut hub.follow(DropFilter::default())).into_iter().next();
        assert_eq!(first, Some(DropRecord::Forgotten { events: 3 }));
    }

    #[test]
    fn a_slow_follower_is_told_what_it_missed_and_others_miss_nothing() {
        let hub = Hub::default();
        let (mut slow, mut quick) = (hub.follow(DropFilter::default()), hub.follow(DropFilter::default()));
        let mut seen = 0;
        for port in 0..BEHIND as u16 + 10 {
            hub.publish(event(port, "no-rule"), 0);
            seen += ready(&mut quick).len();
        }
        assert_eq!(seen, BEHIND + 10);
        let records = ready(&mut slow);
        assert_eq!(records[0], DropRecord::Missed { records: 10 });
        assert_eq!(records.len(), 1 + BEHIND);
    }

    #[test]
    fn a_filter_holds_for_memory_and_stream() {
        let hub = Hub::default();
        for (filter, expected) in [
            (DropFilter { reason: Some("no-rule".to_owned()), ..DropFilter::default() }, 1),
            (DropFilter { source: Some("10.42.1.0/24".parse().unwrap()), ..DropFilter::default() }, 2),
            (DropFilter { destination: Some("10.42.1.0/24".parse().unwrap()), ..DropFilter::default() }, 0),
        ] {
            let before = hub.recent(&filter).drops.len();
            let mut stream = hub.follow(filter.clone());
            ready(&mut stream);
            hub.publish(event(1, "no-rule"), 0);
            hub.publish(event(2, "revoked"), 0);
            hub.pending("revoked", hub.recent(&DropFilter::default()).suppressed.len() as u64);
            assert_eq!(ready(&mut stream).len(), expected, "{filter:?}");
            assert_eq!(hub.recent(&filter).drops.len(), before + expected, "{filter:?}");
        }
    }
}
