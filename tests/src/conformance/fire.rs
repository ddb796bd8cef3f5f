//! Packets in both directions on two processors, one by one, while policies are switched to and fro in several labs at once:
//! what a switch waits for, an RCU grace period, is the same for all of them.
//!
//! Each packet's fate is known at once, and whether a switch was under way meanwhile. Where none was, the verdict must be
//! that of the policy in force; where one was, that of either; and what both policies allow or deny has no moment at all.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use ebpf_common::{EGRESS, INGRESS, reason};
use node::kernel::datapath::packet::Packet;
use node::kernel::{Datapath, Inspect};
use node::lower::Tables;
use policy::Network;

use super::ear::{Ear, Mouth};
use super::network::{ENDS, allowing, flow, node, small};
use super::{DIRECTIONS, Lab, foreign, in_labs, is_emulated, name, on_processor, share, wait_until};

/// Labs at once.
const LABS: u64 = 8;
/// Switches in each lab before which senders rest, so that processors that idle end the grace period soon; and switches under
/// packets that never cease.
const RESTED: u64 = 250;
const CEASELESS: u64 = 20;
/// Switches in all.
const THOUSANDS: u64 = 2_000;
/// Processors that send.
const SENDERS: usize = 2;
/// Packets of one flow that are not read from the TUN yet: of all 24 that leave it, fewer than the 500 that it holds.
const UNREAD: u64 = 16;

/// Which of the two policies allow a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Allowed {
    Always,
    First,
    Second,
    Never,
}

const ALLOWED: [Allowed; 4] = [Allowed::Always, Allowed::First, Allowed::Second, Allowed::Never];

impl Allowed {
    fn by(self, policy: u64) -> bool {
        match self {
            Self::Always => true,
            Self::First => policy == 0,
            Self::Second => policy == 1,
            Self::Never => false,
        }
    }

    /// The first of its hundred ports above `base`.
    fn ports(self, base: u16) -> u16 {
        base + 100 * self as u16
    }
}

const INWARD: u16 = 2_000;
const OUTWARD: u16 = 3_000;
/// Ports of this host from which `db` is asked something whose answer comes back by its record alone.
const ASKING: u16 = 4_000;
/// Ten services of `db` that both policies let be asked, and ten that only the first does.
const ANSWERED: u16 = 5_300;
const ANSWERED_BY_FIRST: u16 = 5_310;

/// The first policy, or the second.
fn network(policy: u64) -> Network {
    let mut network = small();
    for (at, allowed) in ALLOWED.into_iter().enumerate().filter(|(_, allowed)| allowed.by(policy)) {
        for (from, to, base) in [("cidr:db", "cidr:web", INWARD), ("cidr:web", "cidr:db", OUTWARD)] {
            let first = allowed.ports(base);
            // Other names, so that not even the rules' counters are the same.
            let name = format!("p{policy}-{at}-{base}");
            network = allowing(network, &name, from, to, &format!("udp/{first}-{}", first + 99));
        }
    }
    if policy == 0 {
        // More services than a page has ranges for: its runs are looked at, and those of the other policy are not.
        for (from, to) in [("cidr:db", "cidr:web"), ("cidr:web", "cidr:db")] {
            for port in [1, 3, 5, 7, 9] {
                network = allowing(network, &format!("{port}-of-{}", &to[5..]), from, to, &format!("tcp/{port}"));
            }
        }
    }
    let last = if policy == 0 { ANSWERED_BY_FIRST } else { ANSWERED } + 9;
    allowing(network, "asked", "cidr:web", "cidr:db", &format!("udp/{ANSWERED}-{last}"))
}

/// One flow, and what became of its packets.
struct Stream {
    place: Arc<Place>,
    way: Way,
    allowed: Allowed,
    tally: Tally,
}

enum Way {
    In(Ear),
    Out(Mouth),
    /// An answer to a question that is asked anew before each.
    Answer(Ear, SocketAddr),
}

/// Packets by direction, as those who sent them know, or as the programs counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: [u64; 2],
    dropped: [u64; 2],
}

impl Tally {
    fn add(&mut self, direction: u32, passed: bool, packets: u64) {
        let which = if passed { &mut self.passed } else { &mut self.dropped };
        which[direction as usize] += packets;
    }
}

/// What senders, switcher and reader know of one lab.
struct Place {
    /// Even: twice the number of switches that are over. Odd: one is under way.
    epoch: AtomicU64,
    /// Packets that were read from the TUN, by their destination port.
    left: Vec<AtomicU64>,
}

/// Of one lab, what is made on its own thread.
struct Prepared {
    place: Arc<Place>,
    tun: File,
    /// For each sender.
    streams: [Vec<Stream>; SENDERS],
    /// Of both policies.
    tables: [Tables; 2],
}

/// What senders, switcher and readers share.
struct Fire {
    sending: AtomicBool,
    /// Senders rest after each round of their flows while this is not set.
    hot: AtomicBool,
    /// Rounds of each sender.
    rounds: [AtomicU64; SENDERS],
    reading: AtomicBool,
}

impl Place {
    fn left(&self, port: u16) -> u64 {
        self.left[usize::from(port)].load(Ordering::Acquire)
    }
}

/// Ends every thread when the one that waits for them ends, however it does.
struct Extinguish<'a>(&'a Fire);

impl Drop for Extinguish<'_> {
    fn drop(&mut self) {
        self.0.sending.store(false, Ordering::Release);
        self.0.reading.store(false, Ordering::Release);
    }
}

pub fn is_atomic() {
    in_labs(share(LABS) as usize, prepare, |labs| {
        let (mut labs, prepared): (Vec<_>, Vec<_>) = labs.into_iter().unzip();
        let fire = &Fire {
            sending: AtomicBool::new(true),
            hot: AtomicBool::new(true),
            rounds: Default::default(),
            reading: AtomicBool::new(true),
        };
        let (mut magazines, mut tables, mut places) = ([const { Vec::new() }; SENDERS], Vec::new(), Vec::new());
        let mut tuns = Vec::new();
        for Prepared { place, tun, streams, tables: both } in prepared {
            magazines.iter_mut().zip(streams).for_each(|(magazine, streams)| magazine.extend(streams));
            tables.push(both);
            places.push(Arc::clone(&place));
            tuns.push((tun, place));
        }
        let streams: Vec<Stream> = thread::scope(|scope| {
            let _end = Extinguish(fire);
            for (tun, place) in &tuns {
                scope.spawn(|| read(tun, place, fire));
            }
            let senders: Vec<_> =
                (0..).zip(magazines).map(|(cpu, streams)| scope.spawn(move || send(streams, cpu, fire))).collect();
            switch(&mut labs, &tables, &places, fire, &senders);
            fire.sending.store(false, Ordering::Release);
            let streams: Vec<_> = senders.into_iter().flat_map(|sender| sender.join().expect("a sender")).collect();
            streams.iter().for_each(Stream::assert_left);
            streams
        });
        for (lab, place) in labs.iter_mut().zip(&places) {
            let streams = streams.iter().filter(|stream| Arc::ptr_eq(&stream.place, place));
            assert_counted(lab, &streams.collect::<Vec<_>>());
        }
    });
}

fn prepare(lab: &mut Lab) -> Prepared {
    lab.give_addresses();
    let tables = [0, 1].map(|policy| {
        let network = network(policy);
        lab.lower(&network, node(&network, "web1")).1
    });
    lab.datapath.attach().expect("attached");
    lab.datapath.switch(&tables[0]).expect("switched");
    let left = std::iter::repeat_with(AtomicU64::default).take(1 << 16).collect();
    let place = Arc::new(Place { epoch: AtomicU64::new(0), left });
    let streams = std::array::from_fn(|sender| streams(&lab.tun, &place, sender as u16));
    Prepared { place, tun: lab.tun.try_clone().expect("a descriptor"), streams, tables }
}

/// What the programs of a lab counted is what its senders saw, and each policy was met.
fn assert_counted(lab: &mut Lab, streams: &[&Stream]) {
    let mut sent = Tally::default();
    for Stream { tally, .. } in streams {
        for direction in DIRECTIONS {
            sent.add(direction, true, tally.passed[direction as usize]);
            sent.add(direction, false, tally.dropped[direction as usize]);
        }
    }
    println!("{:?}: {sent:?}", lab.attachment());
    assert_eq!(counted(lab), sent, "what the programs counted, and what was sent");
    for stream in streams.iter().filter(|stream| matches!(stream.allowed, Allowed::First | Allowed::Second)) {
        let Tally { passed, dropped } = stream.tally;
        assert!(passed != [0; 2] && dropped != [0; 2], "one of the policies was not met by {}", stream.describe());
    }
}

/// By the counters of the reasons. Interfaces emit some packets by themselves, out of scope.
fn counted(lab: &mut Lab) -> Tally {
    let mut tally = Tally::default();
    for ((direction, reason), counter) in lab.datapath.counters(&[]).expect("readable").reasons {
        if reason != reason::SCOPE {
            tally.add(direction, reason::passes(reason), counter.packets);
        }
    }
    tally
}

fn switch(
    labs: &mut [&mut Lab],
    tables: &[[Tables; 2]],
    places: &[Arc<Place>],
    fire: &Fire,
    senders: &[ScopedJoinHandle<'_, Vec<Stream>>],
) {
    let (rested, started) = (share(RESTED), Instant::now());
    let switches = rested + share(CEASELESS);
    for number in 1..=switches {
        if number <= rested {
            fire.hot.store(false, Ordering::SeqCst);
            at_once(labs, |_, lab| lab.datapath.settle().expect("settled"));
            fire.hot.store(true, Ordering::SeqCst);
            senders.iter().for_each(|sender| sender.thread().unpark());
            await_round(fire, senders);
        }
        at_once(labs, |at, lab| {
            places[at].epoch.store(2 * number - 1, Ordering::SeqCst);
            lab.datapath.switch(&tables[at][(number % 2) as usize]).expect("switched");
            places[at].epoch.store(2 * number, Ordering::SeqCst);
        });
        await_round(fire, senders);
        if senders.iter().any(ScopedJoinHandle::is_finished) {
            return;
        }
    }
    let all = switches * labs.len() as u64;
    println!("{all} switches in {} labs in {:?}", labs.len(), started.elapsed());
    assert!(is_emulated() || all > THOUSANDS, "{all} switches");
}

/// Does this in all labs, waiting at the same time.
fn at_once(labs: &mut [&mut Lab], work: impl Fn(usize, &mut Lab) + Sync) {
    thread::scope(|scope| {
        for (at, lab) in labs.iter_mut().enumerate() {
            let work = &work;
            scope.spawn(move || work(at, lab));
        }
    });
}

/// Until every sender is done with a round that it may have begun before.
fn await_round(fire: &Fire, senders: &[ScopedJoinHandle<'_, Vec<Stream>>]) {
    for (rounds, sender) in fire.rounds.iter().zip(senders) {
        let now = rounds.load(Ordering::SeqCst);
        let done = || rounds.load(Ordering::SeqCst) > now || sender.is_finished();
        wait_until(done, "a sender is done with a round");
    }
}

/// Sends on one processor until it is over.
fn send(mut streams: Vec<Stream>, cpu: usize, fire: &Fire) -> Vec<Stream> {
    on_processor(cpu);
    while fire.sending.load(Ordering::Acquire) {
        for stream in &mut streams {
            stream.send();
        }
        fire.rounds[cpu].fetch_add(1, Ordering::SeqCst);
        while !fire.hot.load(Ordering::SeqCst) && fire.sending.load(Ordering::Acquire) {
            thread::park_timeout(Duration::from_millis(100));
        }
    }
    streams
}

fn streams(tun: &File, place: &Arc<Place>, sender: u16) -> Vec<Stream> {
    let mut streams = Vec::new();
    let mut add =
        |way, allowed| streams.push(Stream { place: Arc::clone(place), way, allowed, tally: Tally::default() });
    for (family, [web, db, ..]) in ENDS.into_iter().enumerate() {
        let number = 2 * sender + family as u16;
        for allowed in ALLOWED {
            add(Way::In(Ear::new(tun, db, web, allowed.ports(INWARD) + number)), allowed);
            add(Way::Out(Mouth::new(web, db, allowed.ports(OUTWARD) + number)), allowed);
        }
        for (services, allowed) in [(ANSWERED, Allowed::Always), (ANSWERED_BY_FIRST, Allowed::First)] {
            let service = services + number;
            let asked = flow(web, db, &format!("udp/{service}"));
            let answer = Packet::opening(&asked).with_source_port(ASKING + service - ANSWERED).reply();
            add(Way::Answer(Ear::of(tun, &answer), (asked.destination, service).into()), allowed);
        }
    }
    streams
}

impl Stream {
    /// The other end's port, of what passes egress.
    fn port_beyond(&self) -> Option<u16> {
        match &self.way {
            Way::In(_) => None,
            Way::Out(mouth) => Some(mouth.port()),
            Way::Answer(_, to) => Some(to.port()),
        }
    }

    /// Everything that passed egress leaves the interface, and nothing else.
    fn assert_left(&self) {
        let Some(port) = self.port_beyond() else { return };
        let passed = self.tally.passed[EGRESS as usize];
        wait_until(|| self.place.left(port) >= passed, "everything that passed egress left the interface");
        assert_eq!(self.place.left(port), passed, "left for port {port}, and was let pass");
    }

    fn send(&mut self) {
        if let Some(port) = self.port_beyond() {
            let passed = self.tally.passed[EGRESS as usize];
            wait_until(|| passed - self.place.left(port) < UNREAD, "what passed egress leaves the interface");
        }
        let before = self.place.epoch.load(Ordering::SeqCst);
        let outward = match &self.way {
            Way::In(_) => None,
            Way::Out(mouth) => Some(mouth.says()),
            Way::Answer(ear, to) => Some(ear.says(*to)),
        };
        let inward = match &mut self.way {
            Way::In(ear) | Way::Answer(ear, _) => Some(ear.hears()),
            Way::Out(_) => None,
        };
        let undisturbed = before.is_multiple_of(2) && before == self.place.epoch.load(Ordering::SeqCst);
        for (direction, passed) in [(EGRESS, outward), (INGRESS, inward)] {
            let Some(passed) = passed else { continue };
            self.tally.add(direction, passed, 1);
            if undisturbed || matches!(self.allowed, Allowed::Always | Allowed::Never) {
                let expected = self.allowed.by(before / 2 % 2);
                let at = name(direction);
                assert_eq!(passed, expected, "at {at} in epoch {before}, {} with {:?}", self.describe(), self.tally);
            }
        }
    }

    fn describe(&self) -> String {
        let way = match &self.way {
            Way::In(ear) => format!("{ear:?}"),
            Way::Out(mouth) => format!("{mouth:?}"),
            Way::Answer(ear, to) => format!("answers of {to} to {ear:?}"),
        };
        format!("a flow allowed by `{:?}`: {way}", self.allowed)
    }
}

/// Empties the TUN of what passed egress.
fn read(tun: &File, place: &Place, fire: &Fire) {
    let mut buffer = [0; 2_048];
    let mut tun = tun;
    while fire.reading.load(Ordering::Acquire) {
        if !foreign::becomes_readable(tun, 10) {
            continue;
        }
        let length = tun.read(&mut buffer).expect("read");
        let at = if buffer[0] >> 4 == 4 { 22 } else { 42 };
        assert!(length > at + 1, "a packet of {length} bytes");
        let port = u16::from_be_bytes([buffer[at], buffer[at + 1]]);
        place.left[usize::from(port)].fetch_add(1, Ordering::AcqRel);
    }
}
