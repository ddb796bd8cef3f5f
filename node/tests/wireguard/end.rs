//! One end of a tunnel, as an agent would make it.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use node::kernel::link::NetlinkLink;
use node::kernel::wireguard::{Options, Preference, detect};
use node::kernel::{Device, KernelError, Link, PeerConfig, WireGuard};
use node::key::PrivateKey;
use tempfile::TempDir;

use crate::namespace::Namespace;

pub(crate) const INTERFACE: &str = "rampart0";

/// How long a packet may take before it counts as lost, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(5);

/// An end in a namespace of its own; number 1 has 10.42.0.1, fd42::1 and the underlay's 192.0.2.1.
pub(crate) struct End {
    pub namespace: Namespace,
    pub number: u8,
    pub key: PrivateKey,
    directory: TempDir,
    wireguard: Arc<Mutex<Box<dyn WireGuard>>>,
}

/// The options of a test: a directory of sockets of its own, and the program that was built for it.
pub(crate) fn options(directory: PathBuf) -> Options {
    Options {
        log: Some(directory.join("log")),
        socket_directory: directory,
        executable: Some(env!("CARGO_BIN_EXE_noded").into()),
    }
}

impl End {
    /// With userspace WireGuard.
    pub(crate) fn new(number: u8) -> Self {
        Self::with(number, Preference::Userspace)
    }

    pub(crate) fn with(number: u8, preference: Preference) -> Self {
        let namespace = Namespace::new();
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path().to_owned());
        let wireguard = namespace.run(move || detect(INTERFACE, preference, options)).unwrap();
        let wireguard = Arc::new(Mutex::new(wireguard));
        Self { namespace, number, key: PrivateKey::generate().unwrap(), directory, wireguard }
    }

    /// Two ends joined by an underlay and a tunnel of userspace WireGuard over it.
    pub(crate) fn pair() -> (Self, Self) {
        Self::pair_with(Preference::Userspace)
    }

    pub(crate) fn pair_with(preference: Preference) -> (Self, Self) {
        let (first, second) = (Self::with(1, preference), Self::with(2, preference));
        first.namespace.join(&second.namespace);
        for (end, other) in [(&first, &second), (&second, &first)] {
            end.start();
            end.wireguard(|wireguard| wireguard.create().and_then(|()| wireguard.serve())).unwrap();
            end.configure();
            let peer = other.as_peer();
            end.wireguard(move |wireguard| wireguard.set_peer(&peer)).unwrap();
        }
        (first, second)
    }

    fn start(&self) {
        self.wireguard(|wireguard| wireguard.create()).unwrap();
        let number = self.number;
        self.namespace.run(move || {
            let mut link = NetlinkLink::new(INTERFACE).unwrap();
            link.set_mtu(1420).unwrap();
            link.set_up(true).unwrap();
            for address in [format!("10.42.0.{number}/32"), format!("fd42::{number}/128")] {
                link.add_address(address.parse().unwrap()).unwrap();
            }
            for route in ["10.42.0.0/16", "fd42::/48"] {
                link.add_route(route.parse().unwrap()).unwrap();
            }
        });
    }

    /// Gives WireGuard its key and port.
    pub(crate) fn configure(&self) {
        let key = self.key.clone();
        self.wireguard(move |wireguard| wireguard.set_device(&key, 51820)).unwrap();
    }

    pub(crate) fn wireguard<T: Send + 'static>(&self, job: impl FnOnce(&mut dyn WireGuard) -> T + Send + 'static) -> T {
        let wireguard = Arc::clone(&self.wireguard);
        self.namespace.run(move || job(wireguard.lock().unwrap().as_mut()))
    }

    pub(crate) fn observe(&self) -> Result<Option<Device>, KernelError> {
        self.wireguard(|wireguard| wireguard.observe())
    }

    /// This end as its peers configure it.
    pub(crate) fn as_peer(&self) -> PeerConfig {
        PeerConfig {
            public_key: self.key.public(),
            endpoint: Some(SocketAddr::new(IpAddr::from([192, 0, 2, self.number]), 51820)),
            allowed_ips: self.prefixes().into(),
            persistent_keepalive: None,
        }
    }

    pub(crate) fn prefixes(&self) -> [IpNet; 2] {
        [format!("10.42.0.{}/32", self.number), format!("fd42::{}/128", self.number)].map(|text| text.parse().unwrap())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join(format!("{INTERFACE}.sock"))
    }

    /// The number of the process that serves the device.
    pub(crate) fn process(&self) -> i32 {
        let socket = self.socket();
        let matches = |process: &i32| {
            let command = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            command.split(|byte| *byte == 0).any(|word| word == socket.as_os_str().as_encoded_bytes())
        };
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.find(matches).expect("a process serves the device")
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // Also after a failed test no process stays. What a test has made foreign it takes away itself.
        let wireguard = Arc::clone(&self.wireguard);
        let _ = self.namespace.run(move || match wireguard.lock() {
            Ok(mut wireguard) => wireguard.destroy(),
            Err(poisoned) => poisoned.into_inner().destroy(),
        });
    }
}

/// A socket that returns what it gets, and one that asks it: packet by packet, so that each loss is seen.
pub(crate) struct Echo {
    client: UdpSocket,
    sent: u64,
}

impl Echo {
    /// From the tunnel's address `from` of one end to `to` of the other.
    pub(crate) fn new(client: &End, from: &str, server: &End, to: &str) -> Self {
        let to: IpAddr = to.parse().unwrap();
        let from: IpAddr = from.parse().unwrap();
        let server = server.namespace.run(move || UdpSocket::bind((to, 0))).unwrap();
        let address = server.local_addr().unwrap();
        let client = client.namespace.run(move || UdpSocket::bind((from, 0))).unwrap();
        client.connect(address).unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, from)) = server.recv_from(&mut buffer) {
                // An empty packet says that the client is gone.
                if length == 0 || server.send_to(&buffer[..length], from).is_err() {
                    return;
                }
            }
        });
        Self { client, sent: 0 }
    }

    /// One packet there and back; `false` where it does not come within `patience`.
    pub(crate) fn try_once(&mut self, patience: Duration) -> bool {
        self.sent += 1;
        self.client.set_read_timeout(Some(patience)).unwrap();
        if self.client.send(&self.sent.to_be_bytes()).is_err() {
            return false;
        }
        let mut buffer = [0; 64];
        loop {
            match self.client.recv(&mut buffer) {
                // Late answers to earlier packets are not this one's.
                Ok(8) if buffer[..8] == self.sent.to_be_bytes() => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    /// One packet that must not be lost.
    pub(crate) fn once(&mut self) {
        assert!(self.try_once(PATIENCE), "packet {} was lost", self.sent);
    }

    /// Tries until a packet comes through, as at the beginning and after a session was lost.
    pub(crate) fn until_through(&mut self) {
        wait_until("a packet comes through", || self.try_once(Duration::from_millis(200)));
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.client.send(&[]);
    }
}

/// Waits for a condition, which fails the test when it does not come.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited 30 s in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
