use std::io::Cursor;

use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;

fn public_key() -> impl Strategy<Value = PublicKey> {
    any::<[u8; 32]>()
        .prop_filter("zero is no key", |bytes| *bytes != [0; 32])
        .prop_map(|bytes| PublicKey::try_from(bytes.as_slice()).unwrap())
}

fn private_key() -> impl Strategy<Value = PrivateKey> {
    any::<[u8; 32]>()
        .prop_filter("zero is no key", |bytes| *bytes != [0; 32])
        .prop_map(|bytes| PrivateKey::from_bytes(&bytes).unwrap())
}

fn shared_key() -> impl Strategy<Value = SharedKey> {
    any::<[u8; 32]>().prop_filter("zeros stand for none", |bytes| *bytes != [0; 32]).prop_map(|b| SharedKey(b.into()))
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    (any::<std::net::IpAddr>(), any::<u16>()).prop_map(SocketAddr::from)
}

fn prefix_set() -> impl Strategy<Value = BTreeSet<IpNet>> {
    let v4 = (any::<std::net::Ipv4Addr>(), 0..=32u8)
        .prop_map(|(address, length)| IpNet::new(address.into(), length).unwrap().trunc());
    let v6 = (any::<std::net::Ipv6Addr>(), 0..=128u8)
        .prop_map(|(address, length)| IpNet::new(address.into(), length).unwrap().trunc());
    btree_set(prop_oneof![v4, v6], 0..6)
}

prop_compose! {
    fn set_peer()(
        public_key in public_key(),
        flags in any::<[bool; 3]>(),
        preshared_key in option::of(shared_key()),
        endpoint in option::of(endpoint()),
        persistent_keepalive in option::of(any::<u16>()),
        add_allowed_ips in prefix_set(),
        remove_allowed_ips in prefix_set(),
    ) -> SetPeer {
        let [remove, update_only, replace_allowed_ips] = flags;
        SetPeer {
            public_key, remove, update_only, preshared_key, endpoint, persistent_keepalive, replace_allowed_ips,
            add_allowed_ips, remove_allowed_ips,
        }
    }
}

prop_compose! {
    fn set()(
        private_key in option::of(private_key()),
        listen_port in option::of(any::<u16>()),
        fwmark in option::of(any::<u32>()),
        replace_peers in any::<bool>(),
        peers in vec(set_peer(), 0..4),
    ) -> Set {
        Set { private_key, listen_port, fwmark, replace_peers, peers }
    }
}

prop_compose! {
    fn answer_peer()(
        public_key in public_key(),
        preshared_key in option::of(shared_key()),
        endpoint in option::of(endpoint()),
        persistent_keepalive in any::<u16>(),
        handshake in option::of((1..1u64 << 40, 0..1_000_000_000u32)),
        received_bytes in any::<u64>(),
        sent_bytes in any::<u64>(),
        allowed_ips in prefix_set(),
    ) -> AnswerPeer {
        AnswerPeer {
            public_key, preshared_key, endpoint, persistent_keepalive, last_handshake: handshake.and_then(time),
            received_bytes, sent_bytes, allowed_ips,
        }
    }
}

prop_compose! {
    fn answer()(
        private_key in option::of(private_key()),
        listen_port in any::<u16>(),
        fwmark in any::<u32>(),
        peers in vec(answer_peer(), 0..4),
    ) -> Answer {
        Answer { private_key, listen_port, fwmark, peers }
    }
}

proptest! {
    #[test]
    fn request_reads_what_it_prints(set in set()) {
        let request = Request::Set(set);
        let text = request.print();
        let message = read_message(&mut Cursor::new(text.as_bytes())).unwrap().unwrap();
        prop_assert_eq!(Request::parse(&message).unwrap(), request);
    }

    #[test]
    fn answer_reads_what_it_prints(answer in answer()) {
        let text = answer.print();
        let message = read_message(&mut Cursor::new(text.as_bytes())).unwrap().unwrap();
        prop_assert_eq!(Answer::parse(&message).unwrap(), Ok(answer));
    }

    #[test]
    fn no_text_panics(text in "(set=1\n)?([a-z_]{0,12}=?[-0-9a-f./:]{0,64}\n){0,8}") {
        let _ = Request::parse(&text);
        let _ = Answer::parse(&text);
    }
}

#[test]
fn get_reads_what_it_prints() {
    let message = read_message(&mut Cursor::new(Request::Get.print().as_bytes())).unwrap().unwrap();
    assert_eq!(Request::parse(&message), Ok(Request::Get));
}

#[test]
fn errno_is_negative_on_the_wire_and_read_either_way() {
    assert_eq!(print_errno(22), "errno=-22\n\n");
    assert_eq!(Answer::parse("errno=-22\n"), Ok(Err(22)));
    assert_eq!(Answer::parse("errno=22\n"), Ok(Err(22)));
    assert_eq!(print_errno(0), "errno=0\n\n");
}

#[test]
fn messages_follow_each_other_on_one_stream() {
    let mut stream = Cursor::new("\nget=1\n\n\nset=1\nlisten_port=1\n\nget=1\n");
    assert_eq!(read_message(&mut stream).unwrap().unwrap().as_str(), "get=1\n");
    assert_eq!(read_message(&mut stream).unwrap().unwrap().as_str(), "set=1\nlisten_port=1\n");
    assert_eq!(read_message(&mut stream).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(read_message(&mut Cursor::new("")).unwrap(), None);
}

#[test]
fn endless_message_is_refused() {
    let mut endless = io::BufReader::new(io::repeat(b'a'));
    assert_eq!(read_message(&mut endless).unwrap_err().kind(), io::ErrorKind::InvalidData);
    let mut endless = Cursor::new("a=b\n".repeat(MESSAGE_LENGTH / 4 + 1));
    assert_eq!(read_message(&mut endless).unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn malformed_requests_are_refused_without_their_values() {
    fn check(text: &str, expected: &str) {
        assert_eq!(Request::parse(text).unwrap_err().to_string(), expected, "`{text}`");
    }
    check("", "the request begins with neither `get=1` nor `set=1`");
    check("get=2\n", "the request begins with neither `get=1` nor `set=1`");
    check("set=1\nprivate_key=00ff\n", "the value of `private_key` is malformed");
    check(&format!("set=1\nprivate_key={}\n", "0".repeat(64)), "the value of `private_key` is malformed");
    check(&format!("set=1\npublic_key={}\n", "0".repeat(64)), "the value of `public_key` is malformed");
    check("set=1\nlisten_port=65536\n", "the value of `listen_port` is malformed");
    check("set=1\nremove=true\n", "key `remove` is unknown or in the wrong place");
    check("set=1\nlisten_port\n", "line 1 is not `key=value`");
    let peer = format!("set=1\npublic_key={}\n", "ab".repeat(32));
    check(&format!("{peer}allowed_ip=10.0.0.0/33\n"), "the value of `allowed_ip` is malformed");
    check(&format!("{peer}replace_allowed_ips=1\n"), "the value of `replace_allowed_ips` is malformed");
    check(&format!("{peer}private_key={}\n", "ab".repeat(32)), "key `private_key` is unknown or in the wrong place");
}

#[test]
fn host_bits_of_allowed_ips_are_dropped() {
    let text = format!("set=1\npublic_key={}\nallowed_ip=10.0.0.7/24\nallowed_ip=-fd42::7/64\n", "ab".repeat(32));
    let Ok(Request::Set(set)) = Request::parse(&text) else { panic!("`{text}` is a request") };
    assert_eq!(set.peers[0].add_allowed_ips, BTreeSet::from(["10.0.0.0/24".parse().unwrap()]));
    assert_eq!(set.peers[0].remove_allowed_ips, BTreeSet::from(["fd42::/64".parse().unwrap()]));
}
