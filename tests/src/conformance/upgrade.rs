//! One version of the tables follows another: no packet is lost, none is counted twice, and what was counted stays.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use aya::maps::{Array, Map, MapData, PerCpuHashMap, PerCpuValues};
use ebpf_common::counter::{Counter, LOSS_FLOW, PairKey};
use ebpf_common::{ABI_VERSION, EGRESS, INGRESS, map, reason};
use nix::net::if_::if_nametoindex;
use node::kernel::datapath::packet::Packet;
use node::kernel::{AttachMethod, Datapath, Inspect};
use policy::{Generation, Network, Revision};

use super::network::{ENDS, allowing, flow, node, small};
use super::place::observe;
use super::wait_until;
use super::{INTERFACE, Lab, foreign, name};

/// A version that does not exist, so that only its description can tell.
const FORMER: u32 = 1;

fn network() -> Network {
    allowing(small(), "tcp", "cidr:db", "cidr:web", "tcp/443")
}

fn version(lab: &Lab, version: u32) -> PathBuf {
    lab.bpffs.join(format!("rampart/v{version}"))
}

/// The folder of the interface's pins in the other version's.
fn former(lab: &Lab) -> PathBuf {
    folder(lab, FORMER)
}

fn folder(lab: &Lab, number: u32) -> PathBuf {
    let mut namespaces = version(lab, number).read_dir().expect("pins of another version");
    namespaces.next().expect("a namespace").expect("readable").path().join(INTERFACE)
}

/// Puts a policy in force, and makes it look as if another version had.
fn enforced_by_another(lab: &mut Lab) {
    let network = network();
    let web1 = node(&network, "web1");
    lab.enforce(&network, web1);
    become_another(lab);
}

fn become_another(lab: &mut Lab) {
    lab.restart();
    fs::rename(version(lab, ABI_VERSION), version(lab, FORMER)).expect("renamed");
}

/// The first policy of the new version.
fn switch(lab: &mut Lab) -> Generation {
    let network = network();
    let web1 = node(&network, "web1");
    let (_, tables) = lab.lower(&network, web1);
    lab.datapath.switch(&tables).expect("switched")
}

fn reasons(lab: &mut Lab) -> BTreeMap<(u32, u8), Counter> {
    let mut reasons = lab.datapath.counters(&[]).expect("readable").reasons;
    reasons.retain(|_, counter| counter.packets > 0);
    reasons
}

/// Of the packets that arrived; the interface also sends some by itself.
fn received(lab: &mut Lab) -> BTreeMap<u8, Counter> {
    let received = reasons(lab).into_iter().filter(|((direction, _), _)| *direction == INGRESS);
    received.map(|((_, reason), counter)| (reason, counter)).collect()
}

fn assert_taken_over(lab: &mut Lab) {
    let state = observe(lab);
    assert_eq!((state.egress, state.ingress, state.ahead), (true, true, Vec::new()));
    assert!(!version(lab, FORMER).exists(), "its pins are gone");
    let ours = lab.datapath.programs().expect("listed");
    assert_eq!(ours.len(), 2, "nothing of the former version is attached: {ours:?}");
    assert!(ours.iter().all(|program| program.ours));
}

/// Packets of an allowed flow arrive all the while; each is judged once, by a policy, and counted once.
pub fn is_exact(lab: &mut Lab) {
    let network = network();
    let web1 = node(&network, "web1");
    lab.enforce(&network, web1);
    let [web, db, ..] = ENDS[1];
    let quiet = Packet::opening(&flow(db, web, "tcp/443")).to_bytes();
    lab.tun.write_all(&quiet).expect("sent");
    wait_until(|| lab.datapath.flow_records().expect("readable") == 1, "the flow is recorded");
    become_another(lab);
    let [web, db, ..] = ENDS[0];
    let packet = Packet::opening(&flow(db, web, "tcp/443")).to_bytes();
    let stop = AtomicBool::new(false);
    let mut tun = lab.tun.try_clone().expect("a descriptor");
    let sent = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                tun.write_all(&packet).expect("sent");
                sent += 1;
            }
            sent
        });
        lab.datapath.attach().expect("staged");
        let state = observe(lab);
        assert_eq!((state.egress, state.ingress), (true, true), "the former version enforces");
        assert_eq!(state.revision, Revision(lab.revision), "its revision is known");
        assert!(lab.datapath.counters(&[]).is_err(), "what is counted is not ours");
        lab.datapath.attach().expect("nothing to do");
        assert_eq!(switch(lab), Generation(1));
        assert_taken_over(lab);
        become_another(lab);
        lab.datapath.attach().expect("staged");
        assert_eq!(switch(lab), Generation(1));
        stop.store(true, Ordering::Relaxed);
        sender.join().expect("the sender")
    });
    let bytes = sent * packet.len() as u64 + quiet.len() as u64;
    let sent = sent + 1;
    wait_until(|| lab.counted(INGRESS) >= sent, "every packet is counted");
    let expected = Counter { packets: sent, bytes, segments: sent };
    assert_eq!(received(lab), [(reason::RULE, expected)].into(), "none was without a policy");
    let counters = lab.datapath.counters(&lab.slots.pairs().into_values().collect::<Vec<_>>()).expect("readable");
    assert_eq!(counters.rules.values().map(|counter| counter.packets).sum::<u64>(), sent);
    let arrived = counters.pairs.iter().filter(|(key, _)| u32::from(key.direction) == INGRESS);
    assert_eq!(arrived.map(|(_, counter)| counter.packets).sum::<u64>(), sent);
    let flows = lab.datapath.list_flows().expect("readable");
    assert_eq!(flows.len(), 2);
    let kept = flows.iter().find(|(key, _)| !key.source.is_v4()).expect("the quiet flow");
    assert_eq!((kept.1.packets, kept.1.bytes, kept.1.generation), (1, quiet.len() as u64, 0), "to be judged anew");
    // Answers to what was opened before are known as such.
    let [web, db, ..] = ENDS[1];
    let answer = Packet::opening(&flow(db, web, "tcp/443")).reply().to_bytes();
    let out = foreign::Out::new(if_nametoindex(INTERFACE).expect("it is there")).expect("a socket");
    out.send(&answer).expect("sent");
    wait_until(|| reasons(lab).get(&(EGRESS, reason::REPLY)).is_some_and(|reply| reply.packets == 1), "it passes");
    // Another start of the same version finds all that was carried over.
    lab.restart();
    lab.datapath.attach().expect("taken over");
    assert_eq!(received(lab), [(reason::RULE, expected)].into());
    let slots: Vec<u32> = lab.slots.pairs().into_values().collect();
    lab.datapath.reset_rules(&slots).expect("reset");
    lab.restart();
    lab.datapath.attach().expect("taken over");
    let rules = lab.datapath.counters(&slots).expect("readable").rules;
    assert!(rules.values().all(|counter| *counter == Counter::default()), "{rules:?}");
}

/// Makes an array with these values in the place of a map of the former version.
fn replace<const N: usize>(lab: &Lab, map: &str, values: &[[u8; N]]) {
    replace_at(&former(lab).join("maps").join(map), values);
}

fn replace_at<const N: usize>(path: &Path, values: &[[u8; N]]) {
    fs::remove_file(path).expect("removed");
    foreign::pin_array(path, N as u32, values.len() as u32).expect("pinned");
    let data = MapData::from_pin(path).expect("opened");
    let mut array: Array<MapData, [u8; N]> = Array::try_from(Map::Array(data)).expect("an array");
    for (index, value) in values.iter().enumerate() {
        array.set(index as u32, *value, 0).expect("written");
    }
}

/// Counters of bytes, then packets, as a version had them that knew three reasons.
fn older(packets: u64) -> [u8; 16] {
    let words = [packets * 100, packets].map(u64::to_ne_bytes).concat();
    words.try_into().expect("two words")
}

pub fn understands_an_older_layout(lab: &mut Lab) {
    lab.silence();
    enforced_by_another(lab);
    let layout = serde_json::json!({
        "reasons": ["rule", "whim", "no-rule"],
        "losses": ["luck", "flow"],
        "counter": { "size": 16, "bytes": 0, "packets": 8, "segments": null },
        "pair": { "size": 12, "source": 0, "destination": 4, "direction": 8, "reason": 9 },
        "flow": 1,
        "colour": "blue",
    });
    replace(lab, "LAYOUT", &[described(&layout)]);
    // By direction, then reason.
    replace(lab, "REASON_COUNTERS", &[1, 2, 3, 4, 5, 6].map(older));
    replace(lab, "RULE_COUNTERS", &[7, 8].map(older));
    replace(lab, "LOSSES", &[9u64, 10].map(u64::to_ne_bytes));
    fs::remove_file(former(lab).join("maps/PAIR_TABLE")).expect("removed");
    lab.datapath.attach().expect("staged");
    switch(lab);
    assert_taken_over(lab);
    let counted = |packets| Counter { packets, bytes: packets * 100, segments: packets };
    assert_eq!(
        reasons(lab),
        [
            ((EGRESS, reason::RULE), counted(1)),
            ((EGRESS, reason::NO_RULE), counted(3)),
            ((INGRESS, reason::RULE), counted(4)),
            ((INGRESS, reason::NO_RULE), counted(6)),
        ]
        .into()
    );
    let counters = lab.datapath.counters(&[0, 1]).expect("readable");
    assert_eq!(counters.rules, [(0, counted(7)), (1, counted(8))].into());
    assert_eq!(counters.losses[LOSS_FLOW as usize], 10);
    // They go on from there.
    let [web, db, ..] = ENDS[0];
    lab.tun.write_all(&Packet::opening(&flow(db, web, "udp/9")).to_bytes()).expect("sent");
    wait_until(|| reasons(lab)[&(INGRESS, reason::NO_RULE)].packets == 7, "the packet is counted on top");
}

/// Puts a policy in force that some packets were judged by, and returns what was counted of pairs.
fn judged(lab: &mut Lab) -> BTreeMap<PairKey, Counter> {
    let network = network();
    let web1 = node(&network, "web1");
    lab.enforce(&network, web1);
    let [web, db, ..] = ENDS[0];
    for service in ["tcp/443", "udp/9"] {
        lab.tun.write_all(&Packet::opening(&flow(db, web, service)).to_bytes()).expect("sent");
    }
    wait_until(|| received(lab).len() == 2, "the packets are judged");
    lab.datapath.counters(&[]).expect("readable").pairs
}

/// Of a pair on the second processor, as versions up to 3 counted.
const ELSEWHERE: Counter = Counter { packets: 1_000, bytes: 100_000, segments: 2_000 };

/// Counts pairs as versions up to 3 did: a hash of keys without a gap, with values of each processor.
fn replace_pairs(maps: &Path, pairs: &BTreeMap<PairKey, Counter>) {
    fs::remove_file(maps.join("PAIR_TABLE")).expect("removed");
    let path = maps.join("PAIR_COUNTERS");
    foreign::pin_per_cpu_hash(&path, 12, size_of::<Counter>() as u32, 16_384).expect("pinned");
    let data = MapData::from_pin(&path).expect("opened");
    let hash = PerCpuHashMap::try_from(Map::PerCpuHashMap(data));
    let mut hash: PerCpuHashMap<MapData, [u8; 12], Counter> = hash.expect("a hash");
    for (key, counter) in pairs {
        let PairKey { source, destination, direction, reason, _pad } = *key;
        let ends = [source, destination].map(u32::to_ne_bytes).concat();
        let key: Vec<u8> = ends.into_iter().chain([direction, reason, 0, 0]).collect();
        let cpus = aya::util::nr_cpus().expect("processors");
        let mut values = vec![Counter::default(); cpus];
        values[cpus - 1] = ELSEWHERE;
        values[0].packets += counter.packets;
        values[0].bytes += counter.bytes;
        values[0].segments += counter.segments;
        let values = PerCpuValues::try_from(values).expect("one for each");
        hash.insert(<[u8; 12]>::try_from(key).expect("12 bytes"), values, 0).expect("written");
    }
}

/// What was counted of pairs goes on from there.
fn assert_pairs_carried(lab: &mut Lab, pairs: &BTreeMap<PairKey, Counter>) {
    let now = lab.datapath.counters(&[]).expect("readable").pairs;
    let arrived = pairs.iter().filter(|(key, _)| u32::from(key.direction) == INGRESS);
    assert!(arrived.clone().count() > 1, "{pairs:?}");
    for (key, Counter { packets, bytes, segments }) in arrived {
        let expected = Counter {
            packets: packets + ELSEWHERE.packets,
            bytes: bytes + ELSEWHERE.bytes,
            segments: segments + ELSEWHERE.segments,
        };
        assert_eq!(now.get(key), Some(&expected), "{key:?}");
    }
}

/// Version 2 did not describe itself, and had fewer maps and reasons.
pub fn knows_version_2(lab: &mut Lab) {
    const REASONS: u32 = 18;
    let pairs = judged(lab);
    lab.restart();
    fs::rename(version(lab, ABI_VERSION), version(lab, 2)).expect("renamed");
    let maps = folder(lab, 2).join("maps");
    replace_pairs(&maps, &pairs);
    let kept = [&map::POLICY[..], &["FLOWS", "REASON_COUNTERS", "RULE_COUNTERS", "PAIR_COUNTERS", "LOSSES"]].concat();
    for pin in maps.read_dir().expect("pins") {
        let pin = pin.expect("readable");
        if !kept.iter().any(|name| pin.file_name() == **name) {
            fs::remove_file(pin.path()).expect("removed");
        }
    }
    let counter = |number: u32| -> [u8; 24] {
        let words = [1u64, 100, 2].map(|word| (word * u64::from(number)).to_ne_bytes());
        words.concat().try_into().expect("three words")
    };
    let every: Vec<_> = (0..2 * REASONS).map(counter).collect();
    replace_at(&maps.join("REASON_COUNTERS"), &every);
    replace_at(&maps.join("LOSSES"), &[1u64, 2, 3, 4].map(u64::to_ne_bytes));
    lab.datapath.attach().expect("staged");
    assert_eq!(observe(lab).revision, Revision(lab.revision), "it is known what it enforces");
    assert_eq!(switch(lab), Generation(1));
    assert!(!version(lab, 2).exists(), "its pins are gone");
    let counters = lab.datapath.counters(&[]).expect("readable");
    for (reason, number) in [(reason::RULE, 0), (reason::NO_RULE, 5), (reason::CORRUPT_TABLE, 17)] {
        let of = |number: u32| {
            let number = u64::from(number);
            Counter { packets: number, bytes: 100 * number, segments: 2 * number }
        };
        let seen = [EGRESS, INGRESS].map(|direction| counters.reasons[&(direction, reason)]);
        assert_eq!(seen[1], of(REASONS + number), "{reason}");
        // Packets that the interface sends by itself have another reason.
        assert_eq!(seen[0], of(number), "{reason}");
    }
    assert_eq!(counters.losses[..4], [1, 2, 3, 4]);
    assert_pairs_carried(lab, &pairs);
    assert_eq!(lab.datapath.flow_records().expect("readable"), 0, "its records had another layout");
}

/// Version 3 described itself, and had a hash of pairs.
pub fn knows_version_3(lab: &mut Lab) {
    let pairs = judged(lab);
    let [reasons, records] = [received(lab).len(), lab.datapath.flow_records().expect("readable")];
    assert_eq!([reasons, records], [2, 1]);
    let before = received(lab);
    lab.restart();
    fs::rename(version(lab, ABI_VERSION), version(lab, 3)).expect("renamed");
    let maps = folder(lab, 3).join("maps");
    replace_pairs(&maps, &pairs);
    // The tables were maps of their own, of which one began with the revision.
    let mut header = [0; 256];
    header[..8].copy_from_slice(&lab.revision.to_ne_bytes());
    fs::rename(maps.join("TABLES"), maps.join("HEADER")).expect("renamed");
    replace_at(&maps.join("HEADER"), &[header; 2]);
    let layout = serde_json::json!({
        "reasons": [
            "rule", "lineage", "reply", "icmp-error", "deny-rule", "no-rule", "unknown-source", "unknown-destination",
            "not-local", "scope", "malformed", "source-route", "fragment", "extension-header", "icmp-error-unrelated",
            "revoked", "no-policy", "corrupt-table", "fragment-overlap",
        ],
        "losses": ["pair", "flow", "event-limited", "event-full", "flow-quota", "fragment"],
        "counter": { "size": 24, "packets": 0, "bytes": 8, "segments": 16 },
        "pair": { "size": 12, "source": 0, "destination": 4, "direction": 8, "reason": 9 },
        "flow": 3,
    });
    replace_at(&maps.join("LAYOUT"), &[described(&layout)]);
    lab.datapath.attach().expect("staged");
    assert_eq!(observe(lab).revision, Revision(lab.revision), "it is known what it enforces");
    assert_eq!(switch(lab), Generation(1));
    assert!(!version(lab, 3).exists(), "its pins are gone");
    assert_eq!(received(lab), before);
    assert_pairs_carried(lab, &pairs);
    assert_eq!(lab.datapath.flow_records().expect("readable"), records, "its records are ours");
    // They go on from there, and outlive another start.
    let [web, db, ..] = ENDS[0];
    let packet = Packet::opening(&flow(db, web, "tcp/443")).to_bytes();
    lab.tun.write_all(&packet).expect("sent");
    wait_until(|| received(lab)[&reason::RULE].packets == before[&reason::RULE].packets + 1, "counted on top");
    lab.restart();
    lab.datapath.attach().expect("taken over");
    let mut expected = pairs;
    let allowed = |key: &PairKey| u32::from(key.direction) == INGRESS && key.reason == reason::RULE;
    let (_, counter) = expected.iter_mut().find(|(key, _)| allowed(key)).expect("of the allowed packets");
    counter.packets += 1;
    counter.bytes += packet.len() as u64;
    counter.segments += 1;
    assert_pairs_carried(lab, &expected);
}

/// The text of a description in its map.
fn described(layout: &serde_json::Value) -> [u8; 4_096] {
    let mut description = [0; 4_096];
    let text = layout.to_string();
    description[..text.len()].copy_from_slice(text.as_bytes());
    description
}

pub fn leaves_the_unknown_alone(lab: &mut Lab) {
    enforced_by_another(lab);
    let layout = former(lab).join("maps/LAYOUT");
    fs::remove_file(&layout).expect("removed");
    let before = former(lab).join("maps").read_dir().expect("pins").count();
    lab.datapath.attach().expect("staged");
    let state = observe(lab);
    assert_eq!((state.egress, state.ingress, state.revision), (true, true, Revision(0)), "it goes on");
    assert_eq!(former(lab).join("maps").read_dir().expect("pins").count(), before, "nothing of it was touched");
    assert!(!layout.exists());
    switch(lab);
    assert_taken_over(lab);
    assert_eq!(received(lab), BTreeMap::new(), "what it counted is not known");
    assert_eq!(lab.datapath.flow_records().expect("readable"), 0);
    // Leaving takes another version along, known or not.
    become_another(lab);
    lab.datapath.detach().expect("detached");
    assert!(!lab.bpffs.join("rampart").exists(), "no pins");
    // The kernel takes links off a little after their pins.
    wait_until(|| lab.datapath.programs().expect("listed").is_empty(), "no program is attached");
}

pub fn is_closed_without_a_former(lab: &mut Lab) {
    enforced_by_another(lab);
    lab.datapath.attach().expect("staged");
    match lab.attachment() {
        AttachMethod::Tcx => foreign::detach(&former(lab).join("links/ingress")).expect("detached"),
        AttachMethod::Clsact => lab.run("tc", &["filter", "del", "dev", INTERFACE, name(INGRESS)]),
    }
    assert!(!observe(lab).ingress, "it is gone");
    lab.datapath.attach().expect("attached");
    let state = observe(lab);
    assert_eq!((state.egress, state.ingress, state.generation), (true, true, Generation(0)));
    let [web, db, ..] = ENDS[0];
    lab.judge().expect(INGRESS, &Packet::opening(&flow(db, web, "tcp/443")), reason::NO_POLICY);
    assert_taken_over(lab);
    switch(lab);
    lab.judge().expect(INGRESS, &Packet::opening(&flow(db, web, "tcp/443")), reason::RULE);
}
