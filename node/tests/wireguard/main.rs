//! Userspace WireGuard between real network namespaces:
//!
//! ```text
//!   namespace 1                                          namespace 2
//!   rampart0  10.42.0.1  fd42::1                         rampart0  10.42.0.2  fd42::2
//!   noded wireguard                                      noded wireguard
//!   underlay  192.0.2.1  2001:db8::1  ----- veth -----   underlay  192.0.2.2  2001:db8::2
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use node::kernel::wireguard::{Preference, detect};
use node::kernel::{Backend, PeerConfig};
use node::key::PrivateKey;
use tempfile::TempDir;

use self::end::{Echo, End, INTERFACE, options, wait_until};
use self::namespace::Namespace;

mod end;
mod namespace;

/// Says to a copy of this test program which directory of sockets to serve, and nothing more.
const AGENT: &str = "RAMPART_TEST_AGENT";

/// A peer that exists nowhere, with prefixes in nobody's way.
fn stranger(number: u16) -> PeerConfig {
    let prefixes = [format!("10.42.{}.{}/32", 1 + number / 256, number % 256), format!("fd42:0:0:1::{number:x}/128")];
    PeerConfig {
        public_key: PrivateKey::generate().unwrap().public(),
        endpoint: None,
        allowed_ips: prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect(),
        persistent_keepalive: None,
    }
}

#[test]
fn traffic_passes_and_is_counted() {
    let (first, second) = End::pair();
    let peers = |end: &End| end.observe().unwrap().unwrap().peers;
    let before = peers(&first)[&second.key.public()].clone();
    assert_eq!((before.last_handshake, before.received_bytes), (None, 0));
    for (from, to) in [("10.42.0.1", "10.42.0.2"), ("fd42::1", "fd42::2")] {
        let mut echo = Echo::new(&first, from, &second, to);
        echo.until_through();
        (0..100).for_each(|_| echo.once());
    }
    for (end, other) in [(&first, &second), (&second, &first)] {
        let device = end.observe().unwrap().unwrap();
        assert_eq!((device.public_key, device.listen_port), (Some(end.key.public()), 51820));
        assert_eq!(device.peers.len(), 1);
        let peer = &device.peers[&other.key.public()];
        assert_eq!(peer.endpoint, other.as_peer().endpoint);
        assert_eq!(peer.allowed_ips, BTreeSet::from(other.prefixes()));
        // 200 packets of 8 bytes under headers, and the handshake.
        assert!(peer.received_bytes > 200 * 36 && peer.sent_bytes > 200 * 36, "{peer:?}");
        let age = SystemTime::now().duration_since(peer.last_handshake.unwrap()).unwrap();
        assert!(age < Duration::from_secs(120), "{age:?}");
        assert_eq!(fs::metadata(end.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    }
    let reading = || peers(&first)[&second.key.public()].last_handshake;
    assert_eq!(reading(), reading());
}

#[test]
fn edits_lose_no_packet() {
    let (first, second) = End::pair();
    let mut echoes =
        [("10.42.0.1", "10.42.0.2"), ("fd42::1", "fd42::2")].map(|(from, to)| Echo::new(&first, from, &second, to));
    echoes.iter_mut().for_each(Echo::until_through);
    let done = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let streams = echoes.each_mut().map(|echo| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    echo.once();
                }
                echo.sent()
            })
        });
        for round in 0..40 {
            for (end, other) in [(&first, &second), (&second, &first)] {
                edit(end, other, round);
            }
        }
        done.store(true, Ordering::Relaxed);
        streams.map(|stream| stream.join().unwrap())
    });
    assert!(sent.iter().all(|sent| *sent > 100), "the streams ran beside the edits: {sent:?}");
}

/// Every kind of edit that leaves the other end its addresses.
fn edit(end: &End, other: &End, round: u16) {
    let key = end.key.clone();
    let mut peer = other.as_peer();
    end.wireguard(move |wireguard| {
        let (one, two) = (stranger(round), stranger(round));
        wireguard.set_device(&key, 51820).unwrap();
        wireguard.set_peer(&one).unwrap();
        // The second takes the first one's prefixes.
        wireguard.set_peer(&two).unwrap();
        // Unchanged, with more prefixes, with another keepalive, and as it was.
        wireguard.set_peer(&peer).unwrap();
        peer.allowed_ips.extend(&one.allowed_ips);
        wireguard.set_peer(&peer).unwrap();
        peer.persistent_keepalive = Some(Duration::from_secs(25));
        wireguard.set_peer(&peer).unwrap();
        let device = wireguard.observe().unwrap().unwrap();
        assert_eq!(device.peers[&peer.public_key].allowed_ips, peer.allowed_ips);
        assert_eq!(device.peers[&peer.public_key].persistent_keepalive, peer.persistent_keepalive);
        assert!(device.peers[&one.public_key].allowed_ips.is_empty());
        assert!(device.peers[&two.public_key].allowed_ips.is_empty());
        peer.allowed_ips = peer.allowed_ips.difference(&one.allowed_ips).copied().collect();
        peer.persistent_keepalive = None;
        wireguard.set_peer(&peer).unwrap();
        wireguard.remove_peer(&one.public_key).unwrap();
        wireguard.remove_peer(&two.public_key).unwrap();
        let device = wireguard.observe().unwrap().unwrap();
        assert_eq!(device.peers.keys().collect::<Vec<_>>(), [&peer.public_key]);
    });
}

#[test]
fn peer_that_lost_its_prefixes_or_itself_is_cut_off() {
    let (first, second) = End::pair();
    let mut echo = Echo::new(&first, "10.42.0.1", &second, "10.42.0.2");
    echo.until_through();
    let key = second.key.public();
    let cut = Duration::from_millis(300);
    let nothing = PeerConfig { allowed_ips: BTreeSet::new(), ..second.as_peer() };
    first.wireguard(move |wireguard| wireguard.set_peer(&nothing)).unwrap();
    assert!(!echo.try_once(cut));
    let back = second.as_peer();
    first.wireguard(move |wireguard| wireguard.set_peer(&back)).unwrap();
    echo.once();
    first.wireguard(move |wireguard| wireguard.remove_peer(&key)).unwrap();
    assert!(!echo.try_once(cut));
    let back = second.as_peer();
    first.wireguard(move |wireguard| wireguard.set_peer(&back)).unwrap();
    echo.until_through();
}

#[test]
fn killing_the_agent_leaves_the_tunnel() {
    let (first, second) = End::pair();
    let process = Pid::from_raw(first.process());
    kill(process, Signal::SIGKILL).unwrap();
    wait_until("nobody serves the first end", || first.observe().unwrap().is_none());
    // Another agent, in a process of its own, starts WireGuard again, and is killed.
    let directory = first.socket().parent().unwrap().to_owned();
    let mut agent = first.namespace.run(move || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "agent_that_is_killed", "--nocapture"])
            .env(AGENT, directory)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let mut lines = BufReader::new(agent.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("serving")), "the agent serves");
    first.configure();
    let peer = second.as_peer();
    first.wireguard(move |wireguard| wireguard.set_peer(&peer)).unwrap();
    let mut echo = Echo::new(&first, "10.42.0.1", &second, "10.42.0.2");
    echo.until_through();
    let served_by = first.process();
    agent.kill().unwrap();
    agent.wait().unwrap();
    (0..100).for_each(|_| echo.once());
    assert_eq!(first.process(), served_by);
    // And the next agent takes it over as it is.
    first.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve())).unwrap();
    assert_eq!(first.process(), served_by);
    echo.once();
}

/// Not a test but the other process of the one above, and without its variable nothing.
#[test]
fn agent_that_is_killed() {
    let Some(directory) = std::env::var_os(AGENT) else { return };
    let mut wireguard = detect(INTERFACE, Preference::Auto, options(directory.into())).unwrap();
    assert_eq!(wireguard.backend(), Backend::Userspace, "the interface is there and keeps its kind");
    wireguard.create().and_then(|()| wireguard.serve()).unwrap();
    println!("serving");
    loop {
        std::thread::park();
    }
}

#[test]
fn dead_process_is_replaced_under_the_same_link() {
    let (first, second) = End::pair();
    let mut echo = Echo::new(&first, "10.42.0.1", &second, "10.42.0.2");
    echo.until_through();
    let link = first.namespace.ip("-o link show rampart0");
    kill(Pid::from_raw(first.process()), Signal::SIGKILL).unwrap();
    wait_until("nobody serves", || first.observe().unwrap().is_none());
    let peer = second.as_peer();
    let error = first.wireguard(move |wireguard| wireguard.set_peer(&peer)).unwrap_err().to_string();
    assert!(error.contains("no process serves it"), "{error}");
    first.wireguard(|wireguard| wireguard.serve()).unwrap();
    let device = first.observe().unwrap().unwrap();
    assert_eq!((device.public_key, device.peers.len()), (None, 0));
    let index = |link: &str| link.split(':').next().unwrap().to_owned();
    assert_eq!(index(&first.namespace.ip("-o link show rampart0")), index(&link));
    first.configure();
    let peer = second.as_peer();
    first.wireguard(move |wireguard| wireguard.set_peer(&peer)).unwrap();
    echo.until_through();
}

#[test]
fn process_goes_with_its_socket_and_with_its_link() {
    let end = End::new(1);
    let alive = |process: i32| fs::read_to_string(format!("/proc/{process}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    let serve = || end.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve()));
    serve().unwrap();
    let process = end.process();
    fs::remove_file(end.socket()).unwrap();
    assert_eq!(end.observe().unwrap(), None);
    wait_until("the process follows its socket", || !alive(process));
    serve().unwrap();
    let process = end.process();
    end.namespace.ip("link delete rampart0");
    wait_until("the process follows its link", || !alive(process));
    assert!(!end.socket().exists());
    assert_eq!(end.observe().unwrap(), None);
}

#[test]
fn link_that_is_down_for_a_while_is_no_end() {
    let (first, second) = End::pair();
    let mut echo = Echo::new(&second, "10.42.0.2", &first, "10.42.0.1");
    echo.until_through();
    let process = first.process();
    first.namespace.ip("link set rampart0 down");
    assert!((0..5).all(|_| !echo.try_once(Duration::from_millis(50))));
    first.namespace.ip("link set rampart0 up");
    first.namespace.ip("route replace 10.42.0.0/16 dev rampart0");
    echo.until_through();
    assert_eq!(first.process(), process);
}

#[test]
fn destroy_leaves_nothing() {
    let (first, _second) = End::pair();
    let process = first.process();
    first.wireguard(|wireguard| wireguard.destroy()).unwrap();
    assert!(!fs::exists(format!("/proc/{process}")).unwrap());
    assert!(!first.socket().exists());
    assert!(!first.namespace.ip("-o link show").contains(INTERFACE));
    // Again, and when the process does not listen to SIGTERM.
    first.wireguard(|wireguard| wireguard.destroy()).unwrap();
    first.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve())).unwrap();
    let process = first.process();
    kill(Pid::from_raw(process), Signal::SIGSTOP).unwrap();
    first.wireguard(|wireguard| wireguard.destroy()).unwrap();
    assert!(!fs::exists(format!("/proc/{process}")).unwrap());
}

#[test]
fn foreign_link_is_refused_and_left() {
    for (create, kind) in [("tuntap add rampart0 mode tun", "tun"), ("link add rampart0 type veth peer name x", "veth")] {
        let end = End::new(1);
        end.namespace.ip(create);
        let before = end.namespace.ip("link show");
        for refused in [
            end.wireguard(|wireguard| wireguard.create()),
            end.wireguard(|wireguard| wireguard.serve()),
            end.wireguard(|wireguard| wireguard.destroy()),
            end.wireguard(|wireguard| wireguard.set_peer(&stranger(1))),
        ] {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(&format!("of kind `{kind}`")) && error.contains("noded run --interface"), "{error}");
        }
        assert_eq!(end.observe().unwrap(), None);
        assert_eq!(end.namespace.ip("link show"), before);
    }
}

#[test]
fn foreign_socket_is_refused_and_left() {
    let (first, second) = (End::new(1), End::new(2));
    for end in [&first, &second] {
        end.wireguard(|wireguard| wireguard.create()).unwrap();
    }
    second.wireguard(|wireguard| wireguard.serve()).unwrap();
    let process = second.process();
    // The first end's path leads to the second's process, as where two namespaces share the directory.
    std::os::unix::fs::symlink(second.socket(), first.socket()).unwrap();
    let error = first.wireguard(|wireguard| wireguard.serve()).unwrap_err().to_string();
    assert!(error.contains(&format!("served by process {process}")), "{error}");
    first.observe().unwrap_err();
    first.wireguard(|wireguard| wireguard.destroy()).unwrap_err();
    assert!(second.observe().unwrap().is_some());
    // Somebody in our namespace who is not ours.
    fs::remove_file(first.socket()).unwrap();
    let _listener = UnixListener::bind(first.socket()).unwrap();
    first.observe().unwrap_err();
    fs::remove_file(first.socket()).unwrap();
}

#[test]
fn socket_that_nobody_serves_is_replaced() {
    let end = End::new(1);
    drop(UnixListener::bind(end.socket()).unwrap());
    end.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve())).unwrap();
    assert!(end.observe().unwrap().is_some());
}

#[test]
fn port_that_is_taken_is_said_and_the_old_one_stays() {
    let (first, second) = End::pair();
    let mut echo = Echo::new(&first, "10.42.0.1", &second, "10.42.0.2");
    echo.until_through();
    let taken = first.namespace.run(|| std::net::UdpSocket::bind("0.0.0.0:51821")).unwrap();
    let key = first.key.clone();
    let error = first.wireguard(move |wireguard| wireguard.set_device(&key, 51821)).unwrap_err().to_string();
    assert!(error.contains("port `51821`") && error.contains("choose another `listen-port`"), "{error}");
    let before = first.observe().unwrap().unwrap();
    assert_eq!(before.listen_port, 51820);
    echo.once();
    drop(taken);
    let key = first.key.clone();
    first.wireguard(move |wireguard| wireguard.set_device(&key, 51821)).unwrap();
    let after = first.observe().unwrap().unwrap();
    assert_eq!(after.listen_port, 51821);
    echo.until_through();
    // The peer is the same to who counts its bytes.
    let (before, after) = (&before.peers[&second.key.public()], &after.peers[&second.key.public()]);
    assert!(after.received_bytes >= before.received_bytes && after.last_handshake >= before.last_handshake);
    assert_eq!((&after.allowed_ips, after.endpoint), (&before.allowed_ips, before.endpoint));
}

#[test]
fn process_that_cannot_start_says_why() {
    let end = End::new(1);
    end.wireguard(|wireguard| wireguard.create()).unwrap();
    // Somebody else has the device open.
    let _holder = end.namespace.run(|| Holder::new(INTERFACE));
    let error = end.wireguard(|wireguard| wireguard.serve()).unwrap_err();
    assert!(error.to_string().contains("did not start (exit status: 1)"), "{error}");
    let reason = error.source.expect("the process said why").to_string();
    assert!(reason.contains("another process has it"), "{reason}");
}

/// A process that has the TUN device open: `ip` cannot, so it is a second `noded wireguard` on another socket.
struct Holder {
    process: Child,
    _directory: TempDir,
}

impl Holder {
    fn new(interface: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_noded"));
        let command = command.args(["wireguard", "--interface", interface, "--socket"]).arg(&socket);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the holder serves", || socket.exists());
        Self { process, _directory: directory }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn namespace_without_wireguard_falls_back_to_userspace() {
    let namespace = Namespace::new();
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path().to_owned());
    let (auto, kernel, links) = namespace.run(move || {
        let auto = detect(INTERFACE, Preference::Auto, options.clone()).unwrap().backend();
        let kernel = detect(INTERFACE, Preference::Kernel, options).map(|wireguard| wireguard.backend());
        let links = Command::new("ip").args(["-o", "link"]).output().unwrap().stdout;
        (auto, kernel, String::from_utf8(links).unwrap())
    });
    match auto {
        Backend::Kernel => assert_eq!(kernel.unwrap(), Backend::Kernel),
        Backend::Userspace => {
            let error = kernel.unwrap_err().to_string();
            assert!(error.contains("modprobe wireguard"), "{error}");
        }
    }
    assert_eq!(links.lines().count(), 1, "choosing leaves only the loopback link: {links}");
}
