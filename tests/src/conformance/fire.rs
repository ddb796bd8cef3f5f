//! Packets in both directions on two processors, one by one, while the policy is switched to and fro.
//!
//! Each packet's fate is known at once, and whether a switch was under way meanwhile. Where none was, the verdict must be
//! that of the policy in force; where one was, that of either; and what both policies allow or deny has no moment at all.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
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
use super::{DIRECTIONS, Lab, foreign, name, on_processor, share, wait_until};

/// Switches in each lab before which senders rest, so that processors that idle end the grace period soon; and switches under
/// packets that never cease.
const RESTED: u64 = 500;
const CEASELESS: u64 = 60;
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
    let last = if policy == 0 { ANSWERED_BY_FIRST } else { ANSWERED } + 9;
    allowing(network, "asked", "cidr:web", "cidr:db", &format!("udp/{ANSWERED}-{last}"))
}

/// One flow, and what became of its packets.
struct Stream {
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

/// What senders, switcher and reader share.
struct Fire {
    /// Even: twice the number of switches that are over. Odd: one is under way.
    epoch: AtomicU64,
    sending: AtomicBool,
    /// Senders rest after each round of their flows while this is not set.
    hot: AtomicBool,
    /// Rounds of each sender.
    rounds: [AtomicU64; SENDERS],
    reading: AtomicBool,
    /// Packets that were read from the TUN, by their destination port.
    left: Vec<AtomicU64>,
}

impl Fire {
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

pub fn is_atomic(lab: &mut Lab) {
    lab.give_addresses();
    let [first, second] = [0, 1].map(|policy| {
        let network = network(policy);
        lab.lower(&network, node(&network, "web1")).1
    });
    lab.datapath.attach().expect("attached");
    lab.datapath.switch(&first).expect("switched");
    let fire = &Fire {
        epoch: AtomicU64::new(0),
        sending: AtomicBool::new(true),
        hot: AtomicBool::new(true),
        rounds: Default::default(),
        reading: AtomicBool::new(true),
        left: std::iter::repeat_with(AtomicU64::default).take(1 << 16).collect(),
    };
    let tun = &lab.tun.try_clone().expect("a descriptor");
    let streams: Vec<Stream> = thread::scope(|scope| {
        let _end = Extinguish(fire);
        scope.spawn(|| read(tun, fire));
        let senders: Vec<_> = (0..SENDERS).map(|cpu| scope.spawn(move || send(tun, cpu, fire))).collect();
        switch(lab, [&first, &second], fire, &senders);
        fire.sending.store(false, Ordering::Release);
        let streams: Vec<_> = senders.into_iter().flat_map(|sender| sender.join().expect("a sender")).collect();
        for stream in &streams {
            let Some(port) = stream.port_beyond() else { continue };
            let passed = stream.tally.passed[EGRESS as usize];
            wait_until(|| fire.left(port) >= passed, "everything that passed egress left the interface");
            assert_eq!(fire.left(port), passed, "left for port {port}, and was let pass");
        }
        streams
    });
    let mut sent = Tally::default();
    for Stream { tally, .. } in &streams {
        for direction in DIRECTIONS {
            sent.add(direction, true, tally.passed[direction as usize]);
            sent.add(direction, false, tally.dropped[direction as usize]);
        }
    }
    println!("{sent:?}");
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

fn switch(lab: &mut Lab, tables: [&Tables; 2], fire: &Fire, senders: &[ScopedJoinHandle<'_, Vec<Stream>>]) {
    let (rested, started) = (share(RESTED), Instant::now());
    let switches = rested + share(CEASELESS);
    for number in 1..=switches {
        if number <= rested {
            fire.hot.store(false, Ordering::SeqCst);
            lab.datapath.settle().expect("settled");
            fire.hot.store(true, Ordering::SeqCst);
            senders.iter().for_each(|sender| sender.thread().unpark());
            await_round(fire, senders);
        }
        fire.epoch.store(2 * number - 1, Ordering::SeqCst);
        lab.datapath.switch(tables[(number % 2) as usize]).expect("switched");
        fire.epoch.store(2 * number, Ordering::SeqCst);
        await_round(fire, senders);
        if senders.iter().any(ScopedJoinHandle::is_finished) {
            return;
        }
    }
    println!("{switches} switches in {:?}", started.elapsed());
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
fn send(tun: &File, cpu: usize, fire: &Fire) -> Vec<Stream> {
    on_processor(cpu);
    let mut streams = streams(tun, cpu as u16);
    while fire.sending.load(Ordering::Acquire) {
        for stream in &mut streams {
            stream.send(fire);
        }
        fire.rounds[cpu].fetch_add(1, Ordering::SeqCst);
        while !fire.hot.load(Ordering::SeqCst) && fire.sending.load(Ordering::Acquire) {
            thread::park_timeout(Duration::from_millis(100));
        }
    }
    streams
}

fn streams(tun: &File, cpu: u16) -> Vec<Stream> {
    let mut streams = Vec::new();
    let mut add = |way, allowed| streams.push(Stream { way, allowed, tally: Tally::default() });
    for (family, [web, db, ..]) in ENDS.into_iter().enumerate() {
        let number = 2 * cpu + family as u16;
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

    fn send(&mut self, fire: &Fire) {
        if let Some(port) = self.port_beyond() {
            let passed = self.tally.passed[EGRESS as usize];
            wait_until(|| passed - fire.left(port) < UNREAD, "what passed egress leaves the interface");
        }
        let before = fire.epoch.load(Ordering::SeqCst);
        let outward = match &self.way {
            Way::In(_) => None,
            Way::Out(mouth) => Some(mouth.says()),
            Way::Answer(ear, to) => Some(ear.says(*to)),
        };
        let inward = match &mut self.way {
            Way::In(ear) | Way::Answer(ear, _) => Some(ear.hears()),
            Way::Out(_) => None,
        };
        let undisturbed = before.is_multiple_of(2) && before == fire.epoch.load(Ordering::SeqCst);
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
fn read(tun: &File, fire: &Fire) {
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
        fire.left[usize::from(port)].fetch_add(1, Ordering::AcqRel);
    }
}
