//! The parser on a committed corpus, on every packet of it cut at every byte, and on random changes of it. The fuzz target
//! in tests/fuzz goes on from here with the same comparison.

mod against;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use against::compare;
use etherparse::PacketBuilder;
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};

const V4: [[u8; 4]; 2] = [[10, 42, 1, 2], [10, 42, 2, 2]];
const V6: [[u8; 16]; 2] =
    [[0xfd, 0x42, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2], [0xfd, 0x42, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2]];

/// Random inputs of one run: seconds, unoptimised.
const MUTATIONS: u32 = 400_000;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/packet")
}

/// The transport headers of a family, by name.
fn transports(v6: bool) -> Vec<(&'static str, u8, Vec<u8>)> {
    let tcp = |flags: u8| {
        let mut header = vec![0, 99, 1, 187, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
        header.extend(b"payload!");
        header
    };
    let icmp = |kind: u8| vec![kind, 0, 0, 0, 0, 7, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8];
    let mut options = tcp(2);
    options[12] = 0x80;
    options.splice(20..20, [2, 4, 5, 0xb4, 1, 3, 3, 7, 1, 1, 4, 2]);
    let (echo, answer, number) = if v6 { (128, 129, 58) } else { (8, 0, 1) };
    vec![
        ("tcp-syn", 6, tcp(2)),
        ("tcp-syn-ack", 6, tcp(0x12)),
        ("tcp-rst", 6, tcp(4)),
        ("tcp-options", 6, options),
        ("udp", 17, vec![0, 99, 0, 53, 0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("udp-no-length", 17, vec![0, 99, 0, 53, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("echo", number, icmp(echo)),
        ("echo-reply", number, icmp(answer)),
        ("timestamp", number, icmp(13)),
        ("gre", 47, vec![0; 8]),
        ("auth", 51, vec![6, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("nothing", 59, vec![]),
    ]
}

fn ipv4(protocol: u8, options: &[u8], fragment: u16, payload: &[u8]) -> Vec<u8> {
    let length = (20 + options.len() + payload.len()) as u16;
    let mut bytes = vec![0x45 + options.len() as u8 / 4, 0];
    bytes.extend(length.to_be_bytes());
    bytes.extend([0x12, 0x34]);
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([64, protocol, 0, 0]);
    bytes.extend(V4.concat());
    [&bytes, options, payload].concat()
}

/// Behind extension headers, given by number and content: the first byte of each becomes what follows.
fn ipv6(headers: &[(u8, &[u8])], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut chain = Vec::new();
    for (at, (_, header)) in headers.iter().enumerate() {
        chain.push(headers.get(at + 1).map_or(protocol, |(next, _)| *next));
        chain.extend(&header[1..]);
    }
    chain.extend(payload);
    let mut bytes = vec![0x60, 0, 0, 0];
    bytes.extend((chain.len() as u16).to_be_bytes());
    bytes.extend([headers.first().map_or(protocol, |(kind, _)| *kind), 64]);
    bytes.extend(V6.concat());
    [bytes, chain].concat()
}

/// An error of the family about a packet.
fn error(v6: bool, kind: u8, quote: &[u8]) -> Vec<u8> {
    let payload = [&[kind, 0, 0, 0, 0, 0, 0, 0], quote].concat();
    if v6 { ipv6(&[], 58, &payload) } else { ipv4(1, &[], 0, &payload) }
}

/// What the corpus is made of, by name.
fn seeds() -> BTreeMap<String, Vec<u8>> {
    let mut seeds = BTreeMap::new();
    let mut add = |name: String, bytes: Vec<u8>| assert!(seeds.insert(name.clone(), bytes).is_none(), "{name} twice");
    for (name, protocol, payload) in transports(false) {
        let whole = ipv4(protocol, &[], 0x4000, &payload);
        add(format!("v4-{name}"), whole.clone());
        add(format!("v4-error-{name}"), error(false, 3, &whole));
        add(format!("v4-first-{name}"), ipv4(protocol, &[], 0x2000, &payload));
    }
    let options: [(&str, &[u8]); 7] = [
        ("nops", &[1, 1, 1, 1]),
        ("end", &[0, 131, 1, 1]),
        ("alert", &[148, 4, 0, 0]),
        ("loose", &[131, 7, 4, 1, 2, 3, 4, 0]),
        ("strict", &[1, 1, 1, 137]),
        ("long", &[7, 9, 4, 0]),
        ("all", &[1; 40]),
    ];
    let udp = transports(false).swap_remove(4).2;
    for (name, options) in options {
        add(format!("v4-options-{name}"), ipv4(17, options, 0, &udp));
        add(format!("v4-error-options-{name}"), error(false, 11, &ipv4(17, options, 0, &udp)));
    }
    for (name, fragment) in [("later", 0x0002), ("middle", 0x2002), ("last", 0x1fff), ("reserved", 0x8000)] {
        add(format!("v4-fragment-{name}"), ipv4(17, &[], fragment, &udp));
        add(format!("v4-error-fragment-{name}"), error(false, 12, &ipv4(17, &[], fragment, &udp)));
    }
    add("v4-fragment-half".into(), ipv4(17, &[], 0x2000, &udp[..13]));
    add("v4-error-error".into(), error(false, 3, &error(false, 3, &ipv4(17, &[], 0, &udp))));

    let plain: &[u8] = &[0; 8];
    for (name, protocol, payload) in transports(true) {
        let whole = ipv6(&[], protocol, &payload);
        add(format!("v6-{name}"), whole.clone());
        add(format!("v6-error-{name}"), error(true, 1, &whole));
        add(format!("v6-options-{name}"), ipv6(&[(0, plain), (60, plain)], protocol, &payload));
        add(format!("v6-first-{name}"), ipv6(&[(44, &[0, 0, 0, 1, 0, 0, 0, 9])], protocol, &payload));
    }
    // Every order of two, and longer chains.
    let kinds: [(&str, u8, &[u8]); 8] = [
        ("hop", 0, plain),
        ("route", 43, plain),
        ("left", 43, &[0, 0, 0, 1, 0, 0, 0, 0]),
        ("first", 44, &[0, 0, 0, 1, 0, 0, 0, 9]),
        ("later", 44, &[0, 0, 0, 16, 0, 0, 0, 9]),
        ("atomic", 44, plain),
        ("options", 60, &[0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("mobility", 135, plain),
    ];
    for (first, kind, header) in kinds {
        add(format!("v6-{first}"), ipv6(&[(kind, header)], 17, &udp));
        for (second, next, header_after) in kinds {
            let chain = [(kind, header), (next, header_after)];
            add(format!("v6-{first}-{second}"), ipv6(&chain, 17, &udp));
            add(format!("v6-error-{first}-{second}"), error(true, 3, &ipv6(&chain, 17, &udp)));
        }
    }
    for length in 5..=8 {
        add(format!("v6-chain-{length}"), ipv6(&vec![(60, plain); length], 17, &udp));
    }
    add("v6-overlong".into(), ipv6(&[(60, &[0, 4, 0, 0, 0, 0, 0, 0])], 17, &udp));
    add("v6-error-error".into(), error(true, 1, &error(true, 1, &ipv6(&[], 17, &udp))));
    let mut jumbo = ipv6(&[(0, &[0, 0, 0xc2, 4, 0, 1, 0, 0])], 17, &udp);
    jumbo[4..6].fill(0);
    add("v6-jumbo".into(), jumbo);
    let mut built = Vec::new();
    PacketBuilder::ipv6(V6[0], V6[1], 64).udp(1000, 53).write(&mut built, b"question").unwrap();
    add("v6-built".into(), [built, vec![0; 12]].concat());
    for (name, bytes) in [("empty", &[][..]), ("version-0", &[0; 40]), ("version-5", &[0x55; 40])] {
        add(name.into(), bytes.to_vec());
    }
    seeds
}

/// Names the corpus to be written anew from the seeds; files that are no seed's stay.
const WRITE: &str = "RAMPART_WRITE_CORPUS";

fn files() -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(corpus()).expect("the corpus");
    let file = |path: PathBuf| Some((path.file_name()?.to_str()?.to_owned(), fs::read(&path).ok()?));
    entries.map(|entry| file(entry.expect("readable").path()).expect("readable")).collect()
}

#[test]
fn the_corpus_holds_every_seed() {
    let seeds = seeds();
    if std::env::var_os(WRITE).is_some_and(|value| !value.is_empty()) {
        seeds.iter().for_each(|(name, bytes)| fs::write(corpus().join(name), bytes).expect("written"));
    }
    let files = files();
    for (name, bytes) in seeds {
        assert_eq!(files.get(&name), Some(&bytes), "{name}: run this test once with {WRITE}=1");
    }
}

#[test]
fn the_corpus_is_read_alike_cut_at_every_byte() {
    for (name, bytes) in files() {
        println!("{name}");
        (0..=bytes.len()).for_each(|length| compare(&bytes[..length]));
        // What the packet itself says of its length is cut with it.
        for length in 20..bytes.len() {
            let mut bytes = bytes[..length].to_vec();
            let (at, said) = if bytes[0] >> 4 == 4 { (2, length) } else { (4, length.saturating_sub(40)) };
            bytes[at..at + 2].copy_from_slice(&(said as u16).to_be_bytes());
            compare(&bytes);
        }
    }
}

#[test]
fn changes_of_the_corpus_are_read_alike() {
    let name = "RAMPART_SEED";
    let seed: u64 = match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{name}=`{text}`: {error}")),
        Err(_) => std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64),
    };
    println!("{name}={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut below = |limit: usize| random.next_u32() as usize % limit.max(1);
    // The bytes that mean something at some place.
    const TELLING: [u8; 24] =
        [0, 1, 2, 4, 5, 6, 7, 8, 17, 20, 32, 40, 43, 44, 51, 58, 60, 64, 128, 131, 135, 137, 0x45, 255];
    let files: Vec<Vec<u8>> = files().into_values().collect();
    for _ in 0..MUTATIONS {
        let mut packet = files[below(files.len())].clone();
        for _ in 0..=below(4) {
            let at = below(packet.len());
            match below(6) {
                _ if packet.is_empty() => packet.push(TELLING[below(TELLING.len())]),
                0 => packet[at] = below(256) as u8,
                1 | 2 => packet[at] = TELLING[below(TELLING.len())],
                3 => packet[at] ^= 1 << below(8),
                4 => packet.truncate(at),
                _ => packet.insert(at, TELLING[below(TELLING.len())]),
            }
        }
        compare(&packet);
    }
}
