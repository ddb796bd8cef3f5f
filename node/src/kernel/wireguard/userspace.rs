//! WireGuard by gotatun: a persistent TUN device, and a process that serves it and is asked by UAPI.

use std::fs::{self, File};
use std::io::{self, BufReader, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;
use policy::PublicKey;

use super::uapi::{self, Answer, AnswerPeer, Request, Set, SetPeer};
use super::{Options, foreign, other_backend, tun};
use crate::kernel::link::netlink::{FoundLink, Netlink};
use crate::kernel::{Backend, Device, DevicePeer, KernelError, LinkKind, PeerConfig, WireGuard};
use crate::key::PrivateKey;

/// How long the process may take to answer; it waits for nothing but its own locks.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// How long the process may take to start.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// How long the process may take to stop before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// How often to look whether a process has started or ended.
const POLL: Duration = Duration::from_millis(5);

/// What the other end's death looks like in the middle of a question.
const ENDED: [io::ErrorKind; 3] =
    [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe, io::ErrorKind::UnexpectedEof];

/// What `observe` does, for its errors.
const READ: &str = "read WireGuard's state";

/// [`WireGuard`] by a process of our own.
#[derive(Debug)]
pub(super) struct UserspaceWireGuard {
    interface: String,
    socket: PathBuf,
    options: Options,
    netlink: Netlink,
    /// The process where this agent started it; kept to learn of its end.
    child: Option<Child>,
}

impl UserspaceWireGuard {
    pub(super) fn new(interface: &str, options: Options) -> Result<Self, KernelError> {
        let socket = options.socket_directory.join(format!("{interface}.sock"));
        // The process has another working directory.
        let socket = std::path::absolute(&socket).map_err(|error| {
            KernelError::with(format!("failed to find directory `{}`", options.socket_directory.display()), error)
        })?;
        Ok(Self { interface: interface.to_owned(), socket, options, netlink: Netlink::new()?, child: None })
    }

    /// Our TUN device; `None` where the name is free.
    fn link(&self) -> Result<Option<FoundLink>, KernelError> {
        match self.netlink.find_link(&self.interface)? {
            None => Ok(None),
            Some(link) if !link.ours => Err(foreign(&self.interface, &link.kind_name)),
            Some(link) if link.kind != LinkKind::Tun => Err(other_backend(&self.interface, &link.kind_name)),
            Some(link) => Ok(Some(link)),
        }
    }

    /// A connection to the process that serves our device; `None` where none does.
    fn connect(&self) -> Result<Option<Connection>, KernelError> {
        let path = self.socket.display();
        let stream = match UnixStream::connect(&self.socket) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(KernelError::with(format!("failed to connect to socket `{path}`"), error)),
        };
        let failed = |error: io::Error| KernelError::with(format!("failed to ask who serves socket `{path}`"), error);
        stream.set_read_timeout(Some(ANSWER_PATIENCE)).map_err(failed)?;
        stream.set_write_timeout(Some(ANSWER_PATIENCE)).map_err(failed)?;
        let credentials = getsockopt(&stream, sockopt::PeerCredentials).map_err(|error| failed(error.into()))?;
        let process = Pid::from_raw(credentials.pid());
        match self.is_ours(process) {
            Ok(true) => Ok(Some(Connection { stream, process })),
            Ok(false) => Err(KernelError::new(format!(
                "socket `{path}` is served by process {process}, which is not Rampart's for `{}` in this network \
                 namespace; choose another interface with `noded run --interface NAME`, or stop that process",
                self.interface
            ))),
            // It ended between the connection and the question.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// Whether the process is `noded wireguard` for this interface, in this network namespace: the sockets' directory is
    /// shared by all namespaces.
    fn is_ours(&self, process: Pid) -> io::Result<bool> {
        let there = fs::metadata(format!("/proc/{process}/ns/net"))?;
        let here = fs::metadata("/proc/thread-self/ns/net")?;
        let command = fs::read(format!("/proc/{process}/cmdline"))?;
        if command.is_empty() {
            // A process that ends has no words left.
            return Err(io::ErrorKind::NotFound.into());
        }
        let words: Vec<_> = command.split(|byte| *byte == 0).collect();
        let serves = words.get(1) == Some(&b"wireguard".as_slice())
            && words.windows(2).any(|pair| pair == [b"--interface".as_slice(), self.interface.as_bytes()]);
        Ok(serves && (there.dev(), there.ino()) == (here.dev(), here.ino()))
    }

    /// Asks the process; `None` where none serves our device, or it ends over the question. The inner error is its `errno`.
    fn ask(&self, request: &Request, what: &str) -> Result<Option<Result<Answer, i32>>, KernelError> {
        let Some(mut connection) = self.connect()? else { return Ok(None) };
        match connection.ask(request) {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if ENDED.contains(&error.kind()) => Ok(None),
            Err(error) => Err(KernelError::with(format!("failed to {what} of `{}`", self.interface), error)),
        }
    }

    fn set(&self, set: Set, what: &str) -> Result<(), KernelError> {
        let failed = || format!("failed to {what} of `{}`", self.interface);
        self.link()?.ok_or_else(|| KernelError::new(format!("there is no interface `{}`", self.interface)))?;
        match self.ask(&Request::Set(set), what)? {
            None => Err(KernelError::new(format!("{}; no process serves it", failed()))),
            Some(Ok(_)) => Ok(()),
            Some(Err(errno)) => {
                let remedy =
                    if errno == libc::EADDRINUSE { "; the port is taken, choose another `listen-port`" } else { "" };
                Err(KernelError::with(format!("{}{remedy}", failed()), io::Error::from_raw_os_error(errno)))
            }
        }
    }

    fn spawn(&self) -> Result<Child, KernelError> {
        let program = match &self.options.executable {
            Some(program) => program.clone(),
            // Also when an upgrade has replaced the file that runs.
            None => "/proc/self/exe".into(),
        };
        let log = match &self.options.log {
            Some(path) => Stdio::from(open_log(path)?),
            None => Stdio::null(),
        };
        Command::new(&program)
            .args(["wireguard", "--interface", &self.interface, "--socket"])
            .arg(&self.socket)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|error| KernelError::with(format!("failed to start `{} wireguard`", program.display()), error))
    }

    /// Waits until the process answers, or says why it does not.
    fn await_start(&self, child: &mut Child) -> Result<(), KernelError> {
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            let ended = child.try_wait().map_err(|error| KernelError::with("failed to wait for a process", error))?;
            if let Some(status) = ended {
                let mut reason = String::new();
                // It is over, so its end of the pipe is closed.
                if let Some(output) = child.stdout.take() {
                    let _ = output.take(4096).read_to_string(&mut reason);
                }
                return Err(KernelError::with(
                    format!("userspace WireGuard for `{}` did not start ({status})", self.interface),
                    reason.trim().to_owned(),
                ));
            }
            if self.connect()?.is_some() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(KernelError::new(format!(
                    "userspace WireGuard for `{}` did not answer within {} s",
                    self.interface,
                    START_PATIENCE.as_secs()
                )));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Takes note of the end of a process that this agent started. Gives whether it still runs.
    fn reap(&mut self) -> bool {
        if let Some(child) = &mut self.child
            && !matches!(child.try_wait(), Ok(None))
        {
            self.child = None;
        }
        self.child.is_some()
    }
}

impl WireGuard for UserspaceWireGuard {
    fn backend(&self) -> Backend {
        Backend::Userspace
    }

    fn create(&mut self) -> Result<(), KernelError> {
        match self.link()? {
            Some(_) => Ok(()),
            None => tun::create(&self.interface, &self.netlink),
        }
    }

    fn serve(&mut self) -> Result<(), KernelError> {
        self.reap();
        self.link()?.ok_or_else(|| KernelError::new(format!("there is no interface `{}`", self.interface)))?;
        if self.connect()?.is_some() {
            return Ok(());
        }
        let mut child = self.spawn()?;
        self.await_start(&mut child)?;
        // It says no more there; without a reader it must not try.
        child.stdout = None;
        self.child = Some(child);
        Ok(())
    }

    fn observe(&mut self) -> Result<Option<Device>, KernelError> {
        self.reap();
        match self.netlink.find_link(&self.interface)? {
            Some(link) if link.ours && link.kind == LinkKind::Tun => {}
            _ => return Ok(None),
        }
        match self.ask(&Request::Get, READ)? {
            None => Ok(None),
            Some(Ok(answer)) => Ok(Some(device(answer))),
            Some(Err(errno)) => Err(KernelError::with(
                format!("failed to {READ} of `{}`", self.interface),
                io::Error::from_raw_os_error(errno),
            )),
        }
    }

    fn set_device(&mut self, key: &PrivateKey, listen_port: u16) -> Result<(), KernelError> {
        let set = Set { private_key: Some(key.clone()), listen_port: Some(listen_port), ..Set::default() };
        self.set(set, &format!("set key and port `{listen_port}`"))
    }

    fn set_peer(&mut self, peer: &PeerConfig) -> Result<(), KernelError> {
        let keepalive = peer.persistent_keepalive.map_or(0, |interval| interval.as_secs());
        let change = SetPeer {
            endpoint: peer.endpoint,
            persistent_keepalive: Some(keepalive.try_into().unwrap_or(u16::MAX)),
            replace_allowed_ips: true,
            add_allowed_ips: peer.allowed_ips.clone(),
            ..SetPeer::new(peer.public_key)
        };
        self.set(Set { peers: vec![change], ..Set::default() }, &format!("set peer `{}`", peer.public_key))
    }

    fn remove_peer(&mut self, peer: &PublicKey) -> Result<(), KernelError> {
        let change = SetPeer { remove: true, ..SetPeer::new(*peer) };
        self.set(Set { peers: vec![change], ..Set::default() }, &format!("remove peer `{peer}`"))
    }

    fn destroy(&mut self) -> Result<(), KernelError> {
        let link = self.link()?;
        if let Some(connection) = self.connect()? {
            connection.stop(&self.interface)?;
        }
        let deadline = Instant::now() + STOP_PATIENCE;
        while self.reap() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        if link.is_some() {
            self.netlink.delete_link(&self.interface).map_err(|error| {
                KernelError::with(format!("failed to delete interface `{}`", self.interface), error)
            })?;
        }
        match fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(KernelError::with(format!("failed to remove socket `{}`", self.socket.display()), error))
            }
            _ => Ok(()),
        }
    }
}

/// A connection to our process.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    process: Pid,
}

impl Connection {
    /// The inner error is the process's `errno`.
    fn ask(&mut self, request: &Request) -> io::Result<Result<Answer, i32>> {
        (&self.stream).write_all(request.print().as_bytes())?;
        let message = uapi::read_message(&mut BufReader::new(&self.stream))?;
        let message = message.ok_or(io::ErrorKind::UnexpectedEof)?;
        Answer::parse(&message).map_err(io::Error::other)
    }

    /// Ends the process. The connection ends with it, and not before, so the process number stays its own until then.
    fn stop(mut self, interface: &str) -> Result<(), KernelError> {
        let failed = |error: io::Error| {
            KernelError::with(format!("failed to stop process {} of `{interface}`", self.process), error)
        };
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            match kill(self.process, signal) {
                Ok(()) | Err(nix::Error::ESRCH) => {}
                Err(error) => return Err(failed(error.into())),
            }
            self.stream.set_read_timeout(Some(STOP_PATIENCE)).map_err(failed)?;
            match self.stream.read(&mut [0]) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                _ => return Ok(()),
            }
        }
        Err(failed(io::ErrorKind::TimedOut.into()))
    }
}

fn open_log(path: &Path) -> Result<File, KernelError> {
    // Emptied at each start and appended to, so that somebody else may empty it too.
    let file = File::options().create(true).append(true).mode(0o600).open(path);
    file.and_then(|file| file.set_len(0).map(|()| file))
        .map_err(|error| KernelError::with(format!("failed to open log `{}`", path.display()), error))
}

fn device(answer: Answer) -> Device {
    let Answer { private_key, listen_port, fwmark: _, peers } = answer;
    let peers = peers.into_iter().map(|peer| {
        let AnswerPeer {
            public_key,
            preshared_key: _,
            endpoint,
            persistent_keepalive,
            last_handshake,
            received_bytes,
            sent_bytes,
            allowed_ips,
        } = peer;
        let persistent_keepalive = Some(persistent_keepalive).filter(|seconds| *seconds != 0);
        let persistent_keepalive = persistent_keepalive.map(|seconds| Duration::from_secs(seconds.into()));
        let peer =
            DevicePeer { endpoint, allowed_ips, persistent_keepalive, last_handshake, received_bytes, sent_bytes };
        (public_key, peer)
    });
    Device { public_key: private_key.map(|key| key.public()), listen_port, peers: peers.collect() }
}
