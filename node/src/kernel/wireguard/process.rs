//! The process under the userspace backend (`noded wireguard`): gotatun on the TUN device that the agent made, and a
//! UAPI socket. It has a session of its own and outlives the agent; it ends by SIGTERM, and by itself when its TUN
//! device or its socket is gone.

use std::fs;
use std::io::{self, BufReader, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use gotatun::tun::tun;
use gotatun::tun::tun_async_device::{Error as OpenError, TunDevice};
use nix::net::if_::if_nametoindex;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tracing_subscriber::EnvFilter;
use zeroize::Zeroizing;

use super::server::Server;
use super::uapi::{self, Request};
use crate::kernel::KernelError;

/// Clients at a time; more are turned away. The agent is one, `wg show` another.
const MAX_CLIENTS: usize = 64;

/// How long a client may say nothing before it is turned away.
const CLIENT_PATIENCE: Duration = Duration::from_secs(60);

/// How long to wait for the device while another process has it.
const DEVICE_PATIENCE: Duration = Duration::from_secs(3);

/// How often to look whether socket and device are still there.
const CHECK: Duration = Duration::from_secs(1);

/// What is said when nobody asks otherwise. gotatun says some things once per packet.
const LOG_FILTER: &str = "info,gotatun=off";

/// The variable that asks otherwise. Not the agent's `RUST_LOG`: what is meant for a look at the agent would fill this
/// process's log for as long as it lives.
const LOG_VARIABLE: &str = "RAMPART_WIREGUARD_LOG";

/// Arguments of `noded wireguard`, a verb that only `noded` itself calls.
#[derive(Clone, Debug, clap::Args)]
pub struct UserspaceArgs {
    /// The persistent TUN device to serve
    #[arg(long)]
    pub interface: String,
    /// Path of the UAPI socket to make
    #[arg(long)]
    pub socket: PathBuf,
}

/// Serves a TUN device until SIGTERM. Makes its own runtime: call it from a plain `main`. Why it could not start goes to
/// stdout too, for the process that waits for it.
pub fn run_userspace(args: &UserspaceArgs) -> Result<(), KernelError> {
    // Who is the leader of a process group already stays in its session.
    let _ = nix::unistd::setsid();
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(LOG_FILTER));
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).try_init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| KernelError::with("failed to start a runtime", error))?;
    let result = runtime.block_on(async {
        let started = start(args).await.inspect_err(|error| {
            let reason = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
            let _ = writeln!(io::stdout(), "{error}{reason}");
        })?;
        serve(started, args).await
    });
    // Threads may wait for clients; nothing waits for those.
    runtime.shutdown_background();
    result
}

struct Started {
    server: Server,
    socket: Socket,
    /// The device's number, by which it is told from one that took its name.
    index: u32,
}

async fn start(args: &UserspaceArgs) -> Result<Started, KernelError> {
    let name = args.interface.as_str();
    super::super::link::check_name(name)?;
    let missing = |source: nix::Error| KernelError::with(format!("there is no TUN device `{name}`"), source);
    let index = if_nametoindex(name).map_err(missing)?;
    // The kernel lets one process open the device: whoever has it may take the socket.
    let tun = open(name).await?;
    if if_nametoindex(name).map_err(missing)? != index {
        return Err(KernelError::new(format!("the TUN device `{name}` was replaced meanwhile")));
    }
    Ok(Started { server: Server::new(tun), socket: Socket::bind(&args.socket)?, index })
}

/// Opens the device, after whoever had it last is gone: a killed process takes a moment.
async fn open(name: &str) -> Result<TunDevice, KernelError> {
    let deadline = Instant::now() + DEVICE_PATIENCE;
    loop {
        match TunDevice::from_name(name) {
            Ok(tun) => return Ok(tun),
            Err(OpenError::OpenTun(tun::Error::Io(error))) if error.raw_os_error() == Some(libc::EBUSY) => {
                if Instant::now() > deadline {
                    let what = format!("failed to open the TUN device `{name}`; another process has it, stop that one");
                    return Err(KernelError::with(what, error));
                }
            }
            Err(error) => return Err(KernelError::with(format!("failed to open the TUN device `{name}`"), error)),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Answers clients until a signal or an end of TUN device or socket.
async fn serve(started: Started, args: &UserspaceArgs) -> Result<(), KernelError> {
    let Started { mut server, socket, index } = started;
    let signals = |error| KernelError::with("failed to wait for signals", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(signals)?;
    let mut check = tokio::time::interval(CHECK);
    let (sender, mut requests) = mpsc::channel(1);
    let listener = socket.listener.try_clone();
    let listener = listener.map_err(|error| KernelError::with("failed to share the socket", error))?;
    std::thread::spawn(move || accept(&listener, &sender));
    tracing::info!(interface = %args.interface, socket = %args.socket.display(), "serving");
    let why = loop {
        tokio::select! {
            _ = terminate.recv() => break "signal",
            _ = interrupt.recv() => break "signal",
            () = server.failed() => break "device failed",
            _ = check.tick() => {
                if !socket.is_there() {
                    break "socket removed";
                }
                // A deleted device wakes nobody who waits for its packets.
                if if_nametoindex(args.interface.as_str()) != Ok(index) {
                    break "device removed";
                }
            }
            // A client that is gone needs no answer.
            Some((request, reply)) = requests.recv() => drop(reply.send(answer(&mut server, request).await)),
        }
    };
    tracing::info!(interface = %args.interface, why, "stopping");
    socket.remove();
    server.stop().await;
    Ok(())
}

async fn answer(server: &mut Server, request: Request) -> Zeroizing<String> {
    match request {
        Request::Get => server.get().await.print(),
        Request::Set(set) => match server.set(set).await {
            Ok(()) => uapi::print_errno(0).into(),
            Err(errno) => {
                tracing::warn!(error = %io::Error::from_raw_os_error(errno), "change refused");
                uapi::print_errno(errno).into()
            }
        },
    }
}

type Ask = (Request, oneshot::Sender<Zeroizing<String>>);

/// Gives each client a thread. Clients are few, and the codec reads from what blocks.
fn accept(listener: &UnixListener, requests: &mpsc::Sender<Ask>) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of descriptors, for one; the backlog waits.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        if clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
            clients.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (requests, clients) = (requests.clone(), Arc::clone(&clients));
        std::thread::spawn(move || {
            if let Err(error) = talk(&stream, &requests) {
                tracing::debug!(%error, "client turned away");
            }
            clients.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn talk(stream: &UnixStream, requests: &mpsc::Sender<Ask>) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_PATIENCE))?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut reader = BufReader::new(stream);
    while let Some(message) = uapi::read_message(&mut reader)? {
        let answer = match Request::parse(&message) {
            Ok(request) => {
                let (reply, answer) = oneshot::channel();
                let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
                requests.blocking_send((request, reply)).map_err(|_| gone())?;
                answer.blocking_recv().map_err(|_| gone())?
            }
            Err(error) => {
                tracing::warn!(%error, "request not understood");
                uapi::print_errno(libc::EINVAL).into()
            }
        };
        (&mut &*stream).write_all(answer.as_bytes())?;
    }
    Ok(())
}

/// The UAPI socket, for root alone.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, by which our socket is told from one that took its place.
    identity: (u64, u64),
}

impl Socket {
    /// Takes the path, in place of a socket that nobody serves.
    fn bind(path: &Path) -> Result<Self, KernelError> {
        let failed = |error: io::Error| KernelError::with(format!("failed to make socket `{}`", path.display()), error);
        match UnixStream::connect(path) {
            Ok(_) => {
                return Err(KernelError::new(format!(
                    "socket `{}` is served already, perhaps from another network namespace; stop that process",
                    path.display()
                )));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(error) => return Err(failed(error)),
        }
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        // Made beside its place and moved there, so that nobody meets it with a wider mode.
        let beside = path.with_extension(format!("{}.new", std::process::id()));
        let _ = fs::remove_file(&beside);
        let listener = UnixListener::bind(&beside).map_err(failed)?;
        let placed = fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&beside, path))
            .and_then(|()| identity(path));
        match placed {
            Ok(identity) => Ok(Self { listener, path: path.to_owned(), identity }),
            Err(error) => {
                let _ = fs::remove_file(&beside);
                Err(failed(error))
            }
        }
    }

    fn is_there(&self) -> bool {
        identity(&self.path).is_ok_and(|identity| identity == self.identity)
    }

    fn remove(&self) {
        if self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}
