//! The guard on the underlay: every type, length and bucket on the loaded programs. Needs root.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ebpf_common::underlay::Event;
use ebpf_common::underlay::reason::{
    COOKIE_REPLY, DATA, FRAGMENTED, INITIATION, JOINED, LIMITED_CHECKS, LIMITED_ENDPOINT, LIMITED_SOURCE,
    LIMITED_TOTAL, RESPONSE, WRONG_LENGTH, WRONG_MAC, WRONG_TYPE,
};
use node::kernel::datapath::monotonic_ns;
use node::kernel::guard::{Limit, Limits, Mode};
use tests::conformance::in_lab;
use tests::conformance::underlay::{Guarded, KEY, KINDS, ONCE, OWN, PORT, plenty, to_port, udp, wanted};
use tests::forge::{initiation, message, response, with_mac};

/// A stranger of each family.
const STRANGERS: [&str; 2] = ["198.51.100.7:4000", "[2001:db8:7::7]:4000"];

/// Runs for each hook and kind of link.
fn each(limits: Limits, endpoints: &[&str], test: impl Fn(&mut Guarded) + Sync + Send) {
    in_lab(|lab| {
        for (mode, ethernet) in KINDS {
            test(&mut Guarded::new(lab, mode, ethernet, &wanted(limits, endpoints)));
        }
    });
}

#[test]
fn what_is_no_wireguard_is_dropped_and_data_is_not() {
    let right = |bytes| with_mac(bytes, &KEY);
    let cases = [
        ("an initiation", right(initiation(1)), INITIATION),
        ("a response", right(response(1)), RESPONSE),
        ("a cookie reply", message(3, 64, 1), COOKIE_REPLY),
        ("a keepalive", message(4, 32, 1), DATA),
        ("a full packet at an MTU of 1420, which is no multiple of 16", message(4, 1452, 1), DATA),
        ("a forged initiation", initiation(2), WRONG_MAC),
        ("a forged response", response(2), WRONG_MAC),
        ("an initiation for another's key", with_mac(initiation(1), &[8; 32]), WRONG_MAC),
        ("type 0", message(0, 148, 1), WRONG_TYPE),
        ("type 5", message(5, 148, 1), WRONG_TYPE),
        ("a reserved byte that is not 0", [&[1, 0, 1, 0][..], &[0; 144]].concat(), WRONG_TYPE),
        ("a short initiation", message(1, 147, 1), WRONG_LENGTH),
        ("a long initiation", message(1, 149, 1), WRONG_LENGTH),
        ("a short response", message(2, 91, 1), WRONG_LENGTH),
        ("a short cookie reply", message(3, 63, 1), WRONG_LENGTH),
        ("data without a tag", message(4, 31, 1), WRONG_LENGTH),
        ("three bytes", message(4, 3, 1), WRONG_LENGTH),
        ("nothing", Vec::new(), WRONG_LENGTH),
    ];
    each(plenty(), &[], |guarded| {
        for (what, message, expected) in &cases {
            for stranger in STRANGERS {
                guarded.expect(&to_port(stranger, message), Some(*expected), what);
            }
        }
    });
}

#[test]
fn drops_are_reported_as_far_as_the_limit_lets_them_and_the_rest_is_counted() {
    const FLOOD: u64 = 200;
    each(plenty(), &[], |guarded| {
        let mut events = guarded.probe.events().expect("a ring buffer");
        for (stranger, own) in STRANGERS.into_iter().zip(OWN) {
            let from: SocketAddr = stranger.parse().expect("an address");
            guarded.expect(&to_port(stranger, &message(4, 32, 1)), Some(DATA), "passes, and is no event");
            let packet = to_port(stranger, &message(0, 148, 1));
            guarded.expect(&packet, Some(WRONG_TYPE), "an event");
            let event = events.poll().expect("an event");
            let expected = Event {
                time: event.time,
                source: from.ip().into(),
                destination: own.parse::<IpAddr>().expect("an address").into(),
                interface: event.interface,
                length: packet.len() as u32,
                source_port: from.port(),
                destination_port: PORT,
                reason: WRONG_TYPE,
                ..Event::default()
            };
            assert_eq!(event, expected);
            let age = monotonic_ns() - event.time;
            assert!(age < 60_000_000_000, "{age} ns old");
        }
        let mut reported = 0;
        for n in 0..FLOOD {
            guarded.expect(&to_port(STRANGERS[0], &initiation(n)), Some(WRONG_MAC), "a flood");
        }
        let mut said = 0;
        while let Some(event) = events.poll() {
            assert_eq!(event.reason, WRONG_MAC);
            (reported, said) = (reported + 1, said + event.suppressed);
        }
        let left: BTreeMap<_, _> = events.suppressed().expect("counted").into_iter().collect();
        assert_eq!(reported + said + left[&WRONG_MAC], FLOOD, "every one is reported or counted: {reported} {said}");
        assert!((1..FLOOD / 2).contains(&reported), "{reported} of {FLOOD} reported");
        assert_eq!(left[&WRONG_TYPE], 0, "a limit of its own for each reason");
    });
}

#[test]
fn what_is_not_for_wireguard_is_left_alone() {
    each(plenty(), &[], |guarded| {
        for stranger in STRANGERS {
            let to_us = to_port(stranger, &initiation(1));
            guarded.expect(&udp(stranger, PORT + 1, &initiation(1)), None, "another port");
            let mut tcp = to_us.clone();
            tcp[if to_us[0] >> 4 == 4 { 9 } else { 6 }] = 6;
            guarded.expect(&tcp, None, "another protocol");
            let mut forwarded = to_us.clone();
            forwarded[if to_us[0] >> 4 == 4 { 19 } else { 39 }] ^= 2;
            guarded.expect(&forwarded, None, "WireGuard of another host that is routed through this one");
            let mut version = to_us.clone();
            version[0] ^= 0x50;
            guarded.expect(&version, None, "another IP version");
            // The kernel takes no test frame that is shorter than its IP header.
            for length in (if to_us[0] >> 4 == 4 { 20 } else { 40 })..to_us.len() - 148 {
                guarded.expect(&to_us[..length], None, "cut ahead of the message");
            }
        }
        let arp = [&[0xff; 6][..], &[2; 6], &[8, 6], &[0; 46]].concat();
        assert_eq!(guarded.judge(&arp), None, "ARP");
    });
}

#[test]
fn a_udp_length_beyond_the_packet_is_dropped() {
    each(plenty(), &[], |guarded| {
        for stranger in STRANGERS {
            let header = if stranger.starts_with('[') { 40 } else { 20 };
            for length in [0u16, 7, 157, 0xffff] {
                let mut packet = to_port(stranger, &with_mac(initiation(1), &KEY));
                packet[header + 4..header + 6].copy_from_slice(&length.to_be_bytes());
                guarded.expect(&packet, Some(WRONG_LENGTH), &format!("UDP length {length}"));
            }
        }
    });
}

#[test]
fn options_tags_and_extension_headers_hide_nothing() {
    each(plenty(), &[], |guarded| {
        let mut packet = to_port(STRANGERS[0], &initiation(1));
        packet[0] = 0x4f;
        let length = (packet.len() + 40) as u16;
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet.splice(20..20, [1; 40]);
        guarded.expect(&packet, Some(WRONG_MAC), "IPv4 options");

        for count in [1, 2, 7, 100, 160] {
            let mut packet = to_port(STRANGERS[1], &initiation(1));
            // Destination options of 8 bytes: one padding option each.
            let options: Vec<u8> =
                (0..count).flat_map(|i| [if i + 1 == count { 17 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]).collect();
            packet[6] = 60;
            let length = (packet.len() - 40 + options.len()) as u16;
            packet[4..6].copy_from_slice(&length.to_be_bytes());
            packet.splice(40..40, options);
            guarded.expect(&packet, Some(WRONG_MAC), &format!("{count} extension headers"));
        }
    });
    in_lab(|lab| {
        for mode in [Mode::Tc, Mode::Xdp] {
            let mut guarded = Guarded::new(lab, mode, true, &wanted(plenty(), &[]));
            for tags in [&[0x81, 0, 0, 5][..], &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6]] {
                let mut frame = guarded.frame(&to_port(STRANGERS[0], &initiation(1)));
                frame.splice(12..12, tags.iter().copied());
                assert_eq!(guarded.judge(&frame), Some(WRONG_MAC), "{mode:?} {tags:?}");
            }
        }
    });
}

#[test]
fn a_handshake_in_fragments_is_dropped_and_data_in_fragments_is_not() {
    each(plenty(), &[], |guarded| {
        let first4 = |message: &[u8], payload: usize| {
            let mut packet = to_port(STRANGERS[0], message);
            packet.truncate(28 + payload);
            let length = packet.len() as u16;
            packet[2..4].copy_from_slice(&length.to_be_bytes());
            packet[6..8].copy_from_slice(&0x2000u16.to_be_bytes());
            packet
        };
        let first6 = |message: &[u8], payload: usize| {
            let mut packet = to_port(STRANGERS[1], message);
            packet.truncate(48 + payload);
            let length = (packet.len() - 40 + 8) as u16;
            packet[4..6].copy_from_slice(&length.to_be_bytes());
            packet[6] = 44;
            packet.splice(40..40, [17, 0, 0, 1, 0, 0, 0, 9]);
            packet
        };
        let valid = with_mac(initiation(1), &KEY);
        for (what, packet, expected) in [
            ("an initiation", first4(&valid, 80), FRAGMENTED),
            ("an initiation", first6(&valid, 80), FRAGMENTED),
            ("no type", first4(&valid, 0), FRAGMENTED),
            ("no type", first6(&valid, 0), FRAGMENTED),
            ("data", first4(&message(4, 1452, 1), 1024), DATA),
            ("data", first6(&message(4, 1452, 1), 1024), DATA),
            ("nonsense", first4(&message(9, 1452, 1), 1024), WRONG_TYPE),
        ] {
            guarded.expect(&packet, Some(expected), &format!("a first fragment: {what}"));
        }
        let mut later = first4(&valid, 80);
        later[6..8].copy_from_slice(&0x2005u16.to_be_bytes());
        guarded.expect(&later, None, "a later fragment, which says nothing of ports");
        let mut later = first6(&valid, 80);
        later[42..44].copy_from_slice(&(5u16 << 3 | 1).to_be_bytes());
        guarded.expect(&later, None, "a later fragment, which says nothing of ports");
        let mut whole = first6(&valid, 148);
        whole[43] = 0;
        guarded.expect(&whole, Some(INITIATION), "a fragment that is all there is");
    });
}

#[test]
fn one_prefix_gets_its_share_and_no_more() {
    let limits = Limits { source: Limit { per_second: ONCE, burst: 3 }, ..plenty() };
    each(limits, &[], |guarded| {
        for (one, same, other) in [
            ("198.51.100.7:1", "198.51.100.7:9", "198.51.100.8:1"),
            ("[2001:db8:7::7]:1", "[2001:db8:7:0:ffff::9]:9", "[2001:db8:7:1::7]:1"),
        ] {
            for _ in 0..2 {
                guarded.expect_initiation(one, INITIATION);
            }
            guarded.expect_initiation(same, INITIATION);
            guarded.expect_initiation(same, LIMITED_SOURCE);
            guarded.expect_initiation(one, LIMITED_SOURCE);
            guarded.expect_initiation(other, INITIATION);
            guarded.expect(&to_port(one, &message(4, 32, 1)), Some(DATA), "data is never limited");
            guarded.expect(&to_port(one, &message(3, 64, 1)), Some(COOKIE_REPLY), "cookie replies are never limited");
        }
    });
}

#[test]
fn all_strangers_together_get_so_much_and_a_forged_mac_takes_none_of_it() {
    let limits = Limits { total: Limit { per_second: ONCE, burst: 2 }, ..plenty() };
    each(limits, &["203.0.113.5:51820"], |guarded| {
        for n in 0..100 {
            let from = format!("198.51.100.{n}:4000");
            guarded.expect(&to_port(&from, &initiation(n)), Some(WRONG_MAC), "a flood");
        }
        guarded.expect_initiation("198.51.100.200:1", INITIATION);
        guarded.expect_initiation("198.51.100.201:1", INITIATION);
        guarded.expect_initiation("198.51.100.202:1", LIMITED_TOTAL);
        let answer = with_mac(response(1), &KEY);
        guarded.expect(&to_port("198.51.100.203:1", &answer), Some(RESPONSE), "responses have a bucket of their own");
        guarded.expect_initiation("203.0.113.5:51820", INITIATION);
    });
}

#[test]
fn a_known_endpoint_has_a_bucket_that_strangers_do_not_empty() {
    let limits = Limits {
        total: Limit { per_second: ONCE, burst: 1 },
        endpoint: Limit { per_second: ONCE, burst: 4 },
        ..plenty()
    };
    let known = ["203.0.113.5:51820", "[2001:db8:5::5]:51820"];
    each(limits, &known, |guarded| {
        guarded.expect_initiation("198.51.100.1:1", INITIATION);
        guarded.expect_initiation("198.51.100.2:1", LIMITED_TOTAL);
        for endpoint in known {
            for _ in 0..3 {
                guarded.expect_initiation(endpoint, INITIATION);
            }
            guarded.expect(&to_port(endpoint, &initiation(1)), Some(WRONG_MAC), "forged as from a peer");
            // From now on it is one stranger among others.
            guarded.expect_initiation(endpoint, LIMITED_TOTAL);
            let answer = with_mac(response(1), &KEY);
            guarded.expect(&to_port(endpoint, &answer), Some(RESPONSE), "responses have a bucket of their own");
        }
        guarded.expect_initiation("203.0.113.5:51821", LIMITED_TOTAL);
    });
}

#[test]
fn whoever_forges_a_known_endpoint_does_not_shut_it_out() {
    let limits = Limits { endpoint: Limit { per_second: ONCE, burst: 1 }, ..plenty() };
    let known = "203.0.113.5:51820";
    each(limits, &[known], |guarded| {
        for n in 0..50 {
            guarded.expect(&to_port(known, &initiation(n)), Some(WRONG_MAC), "forged");
        }
        guarded.expect_initiation(known, INITIATION);
    });
    let none = Limit { per_second: ONCE, burst: 1 };
    each(Limits { checks: none, ..limits }, &[known], |guarded| {
        let cpus = std::thread::available_parallelism().expect("CPUs").get();
        let frame = guarded.frame(&to_port(known, &initiation(1)));
        let seen: Vec<_> = (0..cpus + 2).map(|_| guarded.judge(&frame).expect("counted")).collect();
        assert!(seen.starts_with(&[WRONG_MAC, WRONG_MAC]), "its own token, then one of the CPU's: {seen:?}");
        assert!(seen.contains(&LIMITED_ENDPOINT), "{seen:?}");
    });
}

#[test]
fn strangers_macs_are_computed_only_so_often() {
    let limits = Limits { checks: Limit { per_second: ONCE, burst: 1 }, ..plenty() };
    each(limits, &[], |guarded| {
        // Each CPU has its own budget, and the test may run on any of them.
        let cpus = std::thread::available_parallelism().expect("CPUs").get();
        let mut seen = Vec::new();
        for n in 0..=cpus {
            let frame = guarded.frame(&to_port(&format!("198.51.100.{n}:1"), &initiation(1)));
            seen.push(guarded.judge(&frame).expect("counted"));
        }
        assert!(seen.starts_with(&[WRONG_MAC]), "{seen:?}");
        assert!(seen.contains(&LIMITED_CHECKS), "{seen:?}");
    });
}

#[test]
fn a_bucket_fills_up_again() {
    let limits = Limits { source: Limit { per_second: 20, burst: 1 }, ..plenty() };
    each(limits, &[], |guarded| {
        guarded.expect_initiation(STRANGERS[0], INITIATION);
        let frame = guarded.frame(&to_port(STRANGERS[0], &with_mac(initiation(1), &KEY)));
        let begin = std::time::Instant::now();
        while guarded.judge(&frame) != Some(INITIATION) {
            assert!(begin.elapsed().as_secs() < 10, "no token in 10 s at 20 a second");
        }
    });
}

#[test]
fn changes_of_configuration_are_used_at_once_and_spare_the_buckets() {
    let one = Limit { per_second: ONCE, burst: 1 };
    let tight = Limits { endpoint: one, total: one, ..plenty() };
    in_lab(|lab| {
        let endpoint = "203.0.113.5:51820";
        let mut guarded = Guarded::new(lab, Mode::Tc, true, &wanted(tight, &[endpoint]));
        guarded.expect_initiation("198.51.100.1:1", INITIATION);
        guarded.expect_initiation(endpoint, INITIATION);
        guarded.expect_initiation(endpoint, LIMITED_TOTAL);
        let own = ["192.0.2.1".parse().expect("an address")];
        guarded.probe.configure(&wanted(tight, &[endpoint, "203.0.113.6:1"]), &own).expect("configured");
        guarded.expect_initiation(endpoint, LIMITED_TOTAL);
        guarded.expect_initiation("203.0.113.6:1", INITIATION);
        let mut moved = wanted(tight, &[]);
        moved.port = PORT + 1;
        guarded.probe.configure(&moved, &own).expect("configured");
        guarded.expect(&to_port(endpoint, &initiation(1)), None, "no longer the port");
    });
}

#[test]
fn datagrams_that_the_kernel_joined_are_seen_through() {
    let known = "203.0.113.5:51820";
    let valid = with_mac(initiation(1), &KEY);
    let data = |length| message(4, length, 1);
    let cases = [
        ("data", known, vec![data(1452), data(1452), data(80)], Some(DATA)),
        ("data of a stranger", STRANGERS[0], vec![data(1452), data(1452), data(80)], Some(DATA)),
        ("an initiation behind data", STRANGERS[0], vec![data(1452), valid.clone()], Some(DATA)),
        ("a forged one behind data", STRANGERS[0], vec![data(1452), initiation(2)], Some(WRONG_MAC)),
        ("a forged one behind a peer's data, which is not lost", known, vec![data(1452), initiation(2)], Some(DATA)),
        ("data behind an initiation", STRANGERS[0], vec![valid.clone(), data(32)], Some(INITIATION)),
        ("data behind a forged initiation", STRANGERS[0], vec![initiation(2), data(32)], Some(WRONG_MAC)),
        ("initiations", STRANGERS[0], vec![valid.clone(), valid.clone(), valid.clone()], Some(JOINED)),
        ("nonsense", STRANGERS[0], vec![message(7, 200, 1), message(7, 200, 1)], Some(WRONG_TYPE)),
    ];
    in_lab(|lab| {
        for (what, from, messages, expected) in &cases {
            let mut guarded = Guarded::new(lab, Mode::Tc, true, &wanted(plenty(), &[known]));
            let frame = guarded.frame(&to_port(from, &messages.concat()));
            let seen = guarded.probe.judge_joined(&frame, messages[0].len() as u32);
            assert_eq!(seen.expect("judged"), *expected, "{what}");
        }
    });
}
