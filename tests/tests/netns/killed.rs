//! `noded` itself, killed at each call with which it puts a policy of the controller's in force, and refused by the disk.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tests::conformance::fault::{Call, Fate, supervised};
use tests::mesh::{Mesh, START_LIMIT, wait_for};
use tests::namespace::Lifetime;
use tests::probe::{self, EchoServer, RunningFlow};

/// Ports of `app1`: open with both policies, with the first, with the second, with neither.
const BOTH: u16 = 1_001;
const FIRST: u16 = 1_002;
const SECOND: u16 = 1_003;
const NEITHER: u16 = 1_004;
/// Likewise, for the traffic that goes on meanwhile.
const ALWAYS: u16 = 1_011;
const NEVER: u16 = 1_014;
const ECHO: u16 = 8_080;

/// Sockets of `app1`, and one of `web1` that sends to them all.
struct Ears {
    sender: UdpSocket,
    /// The first is open with either policy.
    ears: Vec<(SocketAddr, UdpSocket)>,
}

impl Ears {
    fn new(mesh: &Mesh, ports: &[u16]) -> Result<Self> {
        let (web1, app1) = (mesh.node("web1")?, mesh.node("app1")?);
        let sender = probe::udp_socket(web1.namespace(), app1.v4.into())?;
        let ears = ports.iter().map(|port| {
            let address = SocketAddr::new(app1.v4.into(), *port);
            let socket = app1.namespace().enter(|| Ok(UdpSocket::bind(address)?))?;
            Ok((address, socket))
        });
        Ok(Self { sender, ears: ears.collect::<Result<_>>()? })
    }

    /// The ports that hear, in their order. Packets of one flow of WireGuard's stay in theirs: when the first port, which is
    /// sent to last, hears, the others have heard what they will.
    fn open(&self) -> Result<Vec<u16>> {
        let ((address, always), others) = self.ears.split_first().context("no ears")?;
        for (_, ear) in &self.ears {
            ear.set_nonblocking(true)?;
            while ear.recv(&mut [0; 8]).is_ok() {}
        }
        for (address, _) in self.ears.iter().rev() {
            self.sender.send_to(b"ping", address)?;
        }
        always.set_nonblocking(false)?;
        always.set_read_timeout(Some(probe::PATIENCE))?;
        always.recv(&mut [0; 8]).with_context(|| format!("nothing came to {address}, which both policies allow"))?;
        let open = others.iter().filter(|(_, ear)| ear.recv(&mut [0; 8]).is_ok());
        Ok([address].into_iter().chain(open.map(|(address, _)| address)).map(SocketAddr::port).collect())
    }
}

/// `web1` sends, and `app1` judges: the egress of `web1`, whose `noded` is dead by then, lets everything out.
fn two() -> Result<Mesh> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    for (cidr, v4, v6) in [
        ("web", "10.42.1.0/24", "fd42:0:0:1::/64"),
        ("app", "10.42.2.0/24", "fd42:0:0:2::/64"),
        ("db", "10.42.3.0/24", "fd42:0:0:3::/64"),
    ] {
        mesh.meshctl_ok(&["cidr", "add", cidr, v4, v6])?;
    }
    mesh.add_node("web1", "web")?;
    mesh.add_node("app1", "app")?;
    allow(&mesh, "all", "cidr:web", &["udp/1001-1999", "tcp/8080"])?;
    mesh.converge()?;
    mesh.stop_node("web1", Signal::SIGKILL)?;
    // One commit, who is in the group, opens the one port and closes the other.
    mesh.meshctl_ok(&["group", "add", "moved", "--member", "cidr:db"])?;
    allow(&mesh, "both", "cidr:web", &["udp/1001", "udp/1011", "tcp/8080"])?;
    allow(&mesh, "first", "cidr:web", &["udp/1002"])?;
    allow(&mesh, "second", "group:moved", &["udp/1003"])?;
    let deny = ["rule", "add", "not-first", "--deny", "--priority", "1", "--from", "group:moved", "--to", "cidr:app"];
    mesh.meshctl_ok(&[&deny[..], &["--service", "udp/1002"]].concat())?;
    mesh.meshctl_ok(&["rule", "delete", "all"])?;
    in_force(&mesh)?;
    Ok(mesh)
}

fn allow(mesh: &Mesh, name: &str, from: &str, services: &[&str]) -> Result<String> {
    let services = services.iter().flat_map(|service| ["--service", *service]);
    let words = ["rule", "add", name, "--from", from, "--to", "cidr:app"].into_iter().chain(services);
    mesh.meshctl_ok(&words.collect::<Vec<_>>())
}

/// What the controller knows of `app1`, and its newest revision.
fn app1(mesh: &Mesh) -> Result<Value> {
    let status = mesh.status()?;
    let nodes = status["nodes"].as_array().context("`meshctl status -o json` has no `nodes`")?;
    let mut node = nodes.iter().find(|node| node["node"] == "app1").context("no `app1`")?.clone();
    node["newest"] = status["revision"].clone();
    Ok(node)
}

/// Whether `app1` says that it enforces the newest policy.
fn is_in_force(mesh: &Mesh) -> Result<bool> {
    let node = app1(mesh)?;
    Ok(node["connected"] == true && node["enforced"] == node["sent"] && node["sent"] == node["newest"])
}

fn in_force(mesh: &Mesh) -> Result<()> {
    wait_for("`app1` to enforce the newest policy", START_LIMIT, || is_in_force(mesh)).with_context(|| mesh.log("app1"))
}

/// How a `noded` ended that was to be killed at a call.
#[derive(Debug)]
enum Ended {
    Killed(Call),
    /// It made fewer calls than that.
    Finished,
}

/// Calls that change something, once they count.
#[derive(Default)]
struct Watch {
    counts: bool,
    seen: usize,
    killed_at: Option<Call>,
}

/// Runs the `noded` of `app1` until it enforces the policy, then changes the policy. From there on the calls that change
/// something are counted, and it is killed at the call of this number.
fn kill_at(mesh: &Mesh, number: usize, change: &[&str]) -> Result<Ended> {
    let watch = Mutex::new(Watch::default());
    let decide = |call: Call| {
        let mut watch = watch.lock().expect("no panic");
        // The change leaves links, addresses, routes and peers as they are: messages to netlink only ask.
        if !watch.counts || !call.leaves_something() || call == Call::Send {
            return Fate::Happens;
        }
        watch.seen += 1;
        if watch.seen <= number {
            return Fate::Happens;
        }
        (watch.counts, watch.killed_at) = (false, Some(call));
        Fate::Kills
    };
    let is_killed = || watch.lock().expect("no panic").killed_at.is_some();
    watched(mesh, decide, || {
        watch.lock().expect("no panic").counts = true;
        mesh.meshctl_ok(change)?;
        wait_for("the change, or the end", START_LIMIT, || Ok(is_killed() || is_in_force(mesh)?))?;
        // The answer comes when the change is enforced, or never.
        mesh.nodectl("app1", &["status"])?;
        watch.lock().expect("no panic").counts = false;
        Ok(is_killed())
    })?;
    Ok(watch.into_inner().expect("no panic").killed_at.map_or(Ended::Finished, Ended::Killed))
}

/// Runs `work` beside the `noded` of `app1` once that enforces the policy; `decide` is asked about each of its calls. Ends it
/// afterwards, unless `work` says that it has ended.
fn watched(mesh: &Mesh, decide: impl FnMut(Call) -> Fate + Send, work: impl FnOnce() -> Result<bool>) -> Result<()> {
    thread::scope(|scope| {
        let (sender, started) = mpsc::channel();
        let noded =
            scope.spawn(|| supervised(decide, || mesh.run_node("app1", move |id| sender.send(id).expect("heard"))));
        let id = started.recv().context("`noded` did not start")?;
        // The answer comes when the start is complete.
        let up = in_force(mesh).and_then(|()| mesh.nodectl_ok("app1", &["status"]));
        let done = up.and_then(|_| work());
        if !matches!(done, Ok(true)) {
            kill(Pid::from_raw(id.cast_signed()), Signal::SIGKILL)?;
        }
        noded.join().expect("no panic")?;
        done.map(drop)
    })
}

/// From the first policy to the second again and again, and `noded` dies each time a call later.
fn kill_at_each(mesh: &Mesh, ears: &Ears) -> Result<()> {
    let (old, new) = ([BOTH, FIRST], [BOTH, SECOND]);
    let mut killed = Vec::new();
    loop {
        let number = killed.len();
        let ended = kill_at(mesh, number, &["group", "member", "add", "moved", "node:web1"])?;
        let open = ears.open()?;
        ensure!(open == old || open == new, "killed at call {number}, {ended:?}: {open:?} are open");
        let Ended::Killed(call) = ended else {
            ensure!(open == new, "{open:?} are open once the change is in force");
            break;
        };
        killed.push((call, open == new));
        // The next one hears of it when it has started.
        mesh.meshctl_ok(&["group", "member", "remove", "moved", "node:web1"])?;
    }
    let news = killed.iter().filter(|(_, new)| *new).count();
    println!("killed {} times, {news} of them with the new policy in force: {killed:?}", killed.len());
    let ends = (killed.first().map(|(_, new)| *new), killed.last().map(|(_, new)| *new));
    ensure!(ends == (Some(false), Some(true)), "{killed:?}");
    ensure!(killed.iter().any(|(call, _)| *call == Call::Sync), "the state is put on disk: {killed:?}");
    Ok(())
}

/// The disk refuses the state once, with each error that it has for that: the policy is in force all the same, the controller
/// hears of it, and the state is kept when that is possible again.
fn refuse_at_each(mesh: &Mesh, ears: &Ears) -> Result<()> {
    let refused = AtomicI32::new(0);
    let decide = |call| match refused.load(Ordering::Acquire) {
        error @ 1.. if call == Call::Sync => Fate::Fails(error),
        _ => Fate::Happens,
    };
    watched(mesh, decide, || {
        for (at, error) in [libc::ENOSPC, libc::EIO, libc::EPERM].into_iter().enumerate() {
            refused.store(error, Ordering::Release);
            let (verb, open) = [("remove", [BOTH, FIRST]), ("add", [BOTH, SECOND])][at % 2];
            mesh.meshctl_ok(&["group", "member", verb, "moved", "node:web1"])?;
            let said = io::Error::from_raw_os_error(error).to_string();
            wait_for(&format!("the controller to hear of `{said}`"), START_LIMIT, || {
                Ok(app1(mesh)?["error"].as_str().is_some_and(|error| error.contains("kept") && error.contains(&said)))
            })?;
            ensure!(ears.open()? == open, "{:?} are open without a disk", ears.open()?);
            refused.store(0, Ordering::Release);
            wait_for("the state to be kept", START_LIMIT, || Ok(app1(mesh)?["error"].is_null() && is_in_force(mesh)?))?;
        }
        Ok(false)
    })
}

#[test]
fn a_node_killed_or_refused_at_a_call_of_a_change_has_the_old_policy_or_the_new() -> Result<()> {
    let mut mesh = two()?;
    let _server = EchoServer::start(mesh.node("app1")?.namespace(), &[ECHO])?;
    let echo = SocketAddr::new(mesh.node("app1")?.v4.into(), ECHO);
    let mut flow = RunningFlow::open(mesh.node("web1")?.namespace(), echo)?.patient(probe::PATIENCE)?;
    let (ears, others) = (Ears::new(&mesh, &[BOTH, FIRST, SECOND, NEITHER])?, Ears::new(&mesh, &[ALWAYS, NEVER])?);
    ensure!(ears.open()? == [BOTH, FIRST], "{:?} are open", ears.open()?);
    mesh.stop_node("app1", Signal::SIGKILL)?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            let mut rounds = 0_u64;
            while !over.load(Ordering::Acquire) {
                ensure!(others.open()? == [ALWAYS], "what both policies deny passed after {rounds} rounds");
                ensure!(flow.beats(), "a flow that both policies allow stood still after {rounds} rounds");
                rounds += 1;
            }
            Ok(rounds)
        });
        let done = kill_at_each(&mesh, &ears).and_then(|()| refuse_at_each(&mesh, &ears));
        over.store(true, Ordering::Release);
        let rounds = traffic.join().expect("no panic");
        done?;
        println!("{} rounds of traffic meanwhile", rounds?);
        Ok::<_, anyhow::Error>(())
    })?;
    let revision = app1(&mesh)?["newest"].clone();
    // The next one finds everything in place and its state on disk, while the controller is away.
    mesh.stop_controller(Signal::SIGKILL)?;
    mesh.start_node("app1")?;
    mesh.wait_until_up("app1")?;
    let shown: Value = serde_json::from_str(&mesh.nodectl_ok("app1", &["status", "-o", "json"])?)?;
    ensure!(shown["revision"] == revision, "not revision {revision}: {shown}");
    let drift = mesh.scrape_node("app1")?.sum("rampart_drift_repairs_total", &[]);
    ensure!(drift == 0.0, "{drift} repairs: {}", mesh.log("app1"));
    ensure!(ears.open()? == [BOTH, FIRST], "{:?} are open", ears.open()?);
    let verified = mesh.nodectl_ok("app1", &["policy", "verify"])?;
    ensure!(verified.contains("all as the policy says"), "{verified}");
    Ok(())
}
