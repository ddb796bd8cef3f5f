//! The guard's parser on the host: against etherparse on frames that are whole, and on whatever bytes; and its hash against
//! a library's.

use blake2::digest::{KeyInit, Mac as _};
use blake2::{Blake2s256, Blake2sMac, Digest as _};
use ebpf_common::blake2s;
use ebpf_common::table::Address;
use ebpf_common::underlay::{BINS, Datagram, ETHERNET, Message, Rate, bins, classify, mac1, mac1_state, reason};
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

const PORT: u16 = 51_820;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn find(frame: &[u8], link_header: u32) -> Option<Datagram> {
    let mut datagram = Datagram::default();
    datagram.find(frame, link_header, PORT).then_some(datagram)
}

proptest! {
    #[test]
    fn a_datagram_is_found_where_it_is(
        v6 in any::<bool>(), tagged in any::<bool>(), source in any::<[u8; 16]>(), from in any::<u16>(),
        to in prop_oneof![Just(PORT), any::<u16>()], payload in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let builder = PacketBuilder::ethernet2(MAC, MAC);
        let mut frame = Vec::new();
        let [a, b, c, d, ..] = source;
        let builder = match (tagged, v6) {
            (false, false) => builder.ipv4([a, b, c, d], [192, 0, 2, 1], 64),
            (false, true) => builder.ipv6(source, [1; 16], 64),
            (true, false) => builder.single_vlan(5.try_into().unwrap()).ipv4([a, b, c, d], [192, 0, 2, 1], 64),
            (true, true) => builder.single_vlan(5.try_into().unwrap()).ipv6(source, [1; 16], 64),
        };
        builder.udp(from, to).write(&mut frame, &payload).unwrap();
        let found = find(&frame, ETHERNET);
        prop_assert_eq!(found.is_some(), to == PORT);
        if let Some(found) = found {
            let address = if v6 { Address::from_bytes(source) } else { Address::from_v4([a, b, c, d]) };
            prop_assert_eq!((found.source, found.source_port, found.fragment), (address, from, 0));
            prop_assert_eq!(&frame[found.message as usize..], &payload[..]);
            prop_assert_eq!(found.length as usize, payload.len());
        }
        let bare = &frame[if tagged { 18 } else { 14 }..];
        prop_assert_eq!(find(bare, 0).is_some(), to == PORT);
    }

    /// Whatever the bytes are: what etherparse takes for UDP to the port is found, and what it takes for another protocol or
    /// port is left alone.
    #[test]
    fn etherparse_agrees_on_whatever_bytes(
        v6 in any::<bool>(), seed in prop::collection::vec((0usize..120, any::<u8>()), 0..6), cut in 0usize..120,
    ) {
        let mut packet = Vec::new();
        match v6 {
            false => PacketBuilder::ipv4([1, 2, 3, 4], [192, 0, 2, 1], 64),
            true => PacketBuilder::ipv6([3; 16], [1; 16], 64),
        }.udp(7, PORT).write(&mut packet, &[4; 60]).unwrap();
        for (at, byte) in seed {
            if let Some(place) = packet.get_mut(at) {
                *place = byte;
            }
        }
        packet.truncate(packet.len() - cut.min(packet.len()));
        let found = find(&packet, 0);
        if let Ok(SlicedPacket { net: Some(net), transport, .. }) = SlicedPacket::from_ip(&packet) {
            let fragment = match &net {
                NetSlice::Ipv4(ip) => ip.header().is_fragmenting_payload(),
                NetSlice::Ipv6(ip) => ip.is_payload_fragmented(),
                NetSlice::Arp(_) => false,
            };
            match transport {
                Some(TransportSlice::Udp(udp)) if udp.destination_port() == PORT && !fragment => {
                    let found = found.expect("UDP to the port");
                    prop_assert_eq!(found.source_port, udp.source_port());
                    // Where etherparse makes do with less than the header says, ours is 0.
                    prop_assert!(found.length == 0 || found.length as usize == udp.payload().len());
                }
                Some(TransportSlice::Udp(udp)) if !fragment => prop_assert!(found.is_none(), "port {}", udp.destination_port()),
                Some(TransportSlice::Tcp(_) | TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_)) => {
                    prop_assert!(found.is_none());
                }
                _ => {}
            }
        }
    }

    #[test]
    fn the_hash_is_blake2s(bytes in prop::collection::vec(any::<u8>(), 0..=64)) {
        prop_assert_eq!(&blake2s::hash(&bytes)[..], &Blake2s256::digest(&bytes)[..]);
    }

    #[test]
    fn the_mac_is_wireguards(key in any::<[u8; 32]>(), bytes in prop::collection::vec(any::<u8>(), 1..200)) {
        let hashed = Blake2s256::new().chain_update(b"mac1----").chain_update(key).finalize();
        let mut mac = <Blake2sMac<blake2::digest::consts::U16> as KeyInit>::new_from_slice(&hashed).unwrap();
        mac.update(&bytes);
        prop_assert_eq!(&mac1(&mac1_state(&key), &bytes)[..], &mac.finalize().into_bytes()[..]);
    }

    #[test]
    fn a_prefix_has_one_bin_in_each_row(address in any::<[u8; 16]>(), other in any::<[u8; 8]>(), seed in any::<u64>()) {
        let (first, second) = bins(Address::from_bytes(address), seed);
        prop_assert!(first < BINS && (BINS..2 * BINS).contains(&second));
        let mut same = address;
        same[8..].copy_from_slice(&other);
        let same = Address::from_bytes(same);
        if !same.is_v4() && !Address::from_bytes(address).is_v4() {
            prop_assert_eq!(bins(same, seed), (first, second), "the /64 counts");
        }
    }

    /// Over any time a bucket gives no more than its burst and its rate, and a full one gives its whole burst.
    #[test]
    fn a_bucket_gives_its_rate(
        per_second in 1u32..10_000_000, burst in 1u32..50, waits in prop::collection::vec(0u64..3_000_000_000, 1..100),
    ) {
        let rate = Rate::new(per_second, burst);
        let (mut now, mut full, mut taken) = (1_000_000_000u64, 0, 0u64);
        for _ in 0..burst {
            full = rate.take(full, now).expect("a full bucket");
            taken += 1;
        }
        prop_assert!(rate.take(full, now).is_none(), "no more than the burst at once");
        let begin = now;
        for wait in waits {
            now += wait;
            if let Some(after) = rate.take(full, now) {
                full = after;
                taken += 1;
            }
            prop_assert!(taken <= u64::from(burst) + (now - begin) / rate.period);
        }
    }
}

#[test]
fn types_and_lengths_are_wireguards() {
    let cases = [
        ([1, 0, 0, 0], 148, false, Ok(Message::Initiation)),
        ([1, 0, 0, 0], 147, false, Err(reason::WRONG_LENGTH)),
        ([1, 0, 0, 0], 148, true, Err(reason::FRAGMENTED)),
        ([2, 0, 0, 0], 92, false, Ok(Message::Response)),
        ([2, 0, 0, 0], 148, false, Err(reason::WRONG_LENGTH)),
        ([3, 0, 0, 0], 64, false, Ok(Message::CookieReply)),
        ([4, 0, 0, 0], 32, false, Ok(Message::Data)),
        ([4, 0, 0, 0], 31, false, Err(reason::WRONG_LENGTH)),
        ([4, 0, 0, 0], 1_452, false, Ok(Message::Data)),
        ([4, 0, 0, 0], 1_452, true, Ok(Message::Data)),
        ([5, 0, 0, 0], 148, false, Err(reason::WRONG_TYPE)),
        ([1, 0, 0, 1], 148, false, Err(reason::WRONG_TYPE)),
    ];
    for (first, length, fragment, expected) in cases {
        assert_eq!(classify(Some(first), length, fragment), expected, "{first:?} {length} {fragment}");
    }
    assert_eq!(classify(None, 148, false), Err(reason::WRONG_LENGTH));
    assert_eq!(classify(None, 148, true), Err(reason::FRAGMENTED));
}
