//! The whole of Rampart in network namespaces on this kernel: four programs, real WireGuard, real traffic.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::net::if_::if_nametoindex;
use nix::sys::signal::Signal;
use tests::conformance::{DIRECTIONS, foreign};
use tests::mesh::{Family, Mesh, START_LIMIT, wait_for};
use tests::namespace::Lifetime;
use tests::probe::{self, RunningFlow, Seen, Traffic};
use tests::scenario::{self, Expected, Line};

#[path = "netns/killed.rs"]
mod killed;
#[path = "netns/operator.rs"]
mod operator;

fn story() -> Result<(Mesh, Vec<probe::EchoServer>)> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    scenario::build(&mut mesh, |_| ())?;
    scenario::allow(&mesh)?;
    let servers = scenario::serve(&mesh)?;
    Ok((mesh, servers))
}

fn check_lines(mesh: &Mesh, when: &str) -> Result<()> {
    let lines = scenario::lines();
    for (line, outcome) in lines.iter().zip(scenario::run(mesh, &lines)?) {
        ensure!(line.holds(&outcome), "{when}: {line}: expected {}, seen {outcome}", line.expected);
    }
    Ok(())
}

#[test]
fn the_story_of_the_demo_holds() -> Result<()> {
    let (mut mesh, _servers) = story()?;
    check_lines(&mesh, "at first")?;
    for family in [Family::V4, Family::V6] {
        scenario::time_to_allow(&mesh, family)?;
        scenario::time_to_revoke(&mesh, family)?;
    }
    mesh.converge()?;
    mesh.stop_controller(Signal::SIGKILL)?;
    mesh.stop_node("app1", Signal::SIGKILL)?;
    check_allowed(&mesh, "while controllerd and the noded of app1 are dead")?;
    mesh.start_node("app1")?;
    mesh.wait_until_up("app1")?;
    check_lines(&mesh, "without a controller, after a restart of noded")?;
    mesh.start_controller()?;
    mesh.converge()
}

/// The lines that need no counter: a dead agent serves no metrics.
fn check_allowed(mesh: &Mesh, when: &str) -> Result<()> {
    for line in scenario::lines().into_iter().filter(|line| line.traffic != Traffic::Ping) {
        let seen = line.try_it(mesh)?;
        let expected = if line.expected == Expected::Answered { Seen::Answered } else { Seen::Silent };
        ensure!(seen == expected, "{when}: {line}: expected {expected:?}, seen {seen:?}");
    }
    Ok(())
}

/// With the sender's egress program gone, the receiver's ingress must refuse what the policy denies.
#[test]
fn ingress_alone_refuses() -> Result<()> {
    let (mut mesh, _servers) = story()?;
    // They are peers because of one service, so WireGuard would carry every other one as well.
    for (name, from, to) in [("peers-1", "web", "db"), ("peers-2", "db", "app")] {
        let (from, to) = (format!("cidr:{from}"), format!("cidr:{to}"));
        mesh.meshctl_ok(&["rule", "add", name, "--from", &from, "--to", &to, "--service", "tcp/9001"])?;
    }
    for (node, peer) in [("web1", "db1"), ("db1", "web1"), ("db1", "app1"), ("app1", "db1")] {
        wait_for(&format!("{peer} to be a peer of {node}"), START_LIMIT, || {
            Ok(mesh.nodectl_ok(node, &["peers"])?.contains(peer))
        })?;
    }
    mesh.converge()?;
    for node in ["web1", "app1", "db1"] {
        mesh.stop_node(node, Signal::SIGKILL)?; // it would put its program back
    }
    let denied: Vec<Line> = scenario::lines().into_iter().filter(|line| line.expected != Expected::Answered).collect();
    for node in ["web1", "app1", "db1"] {
        take_off_egress(&mesh, node)?;
    }
    for line in &denied {
        let seen = line.try_it(&mesh)?;
        ensure!(seen == Seen::Silent, "{line}: {seen:?} although ingress denies it");
    }
    for node in ["web1", "app1", "db1"] {
        mesh.start_node(node)?;
        mesh.wait_until_up(node)?;
    }
    for line in &denied {
        let cidr = |node: &'static str| node.trim_end_matches('1');
        let labels = [
            ("direction", "ingress"),
            ("reason", "no-rule"),
            ("source", cidr(line.from)),
            ("destination", cidr(line.to)),
        ];
        let dropped = mesh.scrape_node(line.to)?.sum("rampart_packets_total", &labels);
        ensure!(dropped >= 1.0, "{line}: nothing was counted at ingress of {}", line.to);
    }
    check_lines(mesh_without(&mesh, &["peers-1", "peers-2"])?, "after the programs are back")
}

fn mesh_without<'a>(mesh: &'a Mesh, rules: &[&str]) -> Result<&'a Mesh> {
    for rule in rules {
        mesh.meshctl_ok(&["rule", "delete", rule])?;
    }
    mesh.converge()?;
    Ok(mesh)
}

/// Detaches the egress program behind the agent's back: the pinned TCX link goes, or the clsact filter.
fn take_off_egress(mesh: &Mesh, node: &str) -> Result<()> {
    let host = mesh.node(node)?.namespace();
    host.enter(|| unpin(Path::new("/sys/fs/bpf"), &["links", "egress"]))?;
    // On kernels without TCX the link is a filter.
    let filters = || host.run("tc", &["filter", "show", "dev", "rampart0", "egress"]);
    if !filters()?.is_empty() {
        host.run("tc", &["filter", "delete", "dev", "rampart0", "egress"])?;
    }
    let left = filters()?;
    ensure!(left.is_empty(), "{node} still has the filter {left}");
    Ok(())
}

/// Removes the pins below a folder whose path has all these words.
fn unpin(folder: &Path, words: &[&str]) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            unpin(&path, words)?;
        } else if words.iter().all(|word| path.to_string_lossy().contains(word)) {
            std::fs::remove_file(&path).with_context(|| format!("failed to remove `{}`", path.display()))?;
        }
    }
    Ok(())
}

/// noded is killed again and again under traffic: what is denied never passes, what is allowed never stops.
#[test]
fn killed_agents_neither_open_nor_close_anything() -> Result<()> {
    let (mut mesh, _servers) = story()?;
    let allowed = SocketAddr::new(mesh.node("app1")?.v4.into(), 8080);
    let denied = SocketAddr::new(mesh.node("app1")?.v6.into(), 9000);
    let mut flow = RunningFlow::open(mesh.node("web1")?.namespace(), allowed)?.patient(probe::PATIENCE)?;
    let socket = probe::udp_socket(mesh.node("web1")?.namespace(), denied.ip())?;
    socket.set_read_timeout(Some(Duration::from_millis(1)))?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let beating = scope.spawn(|| {
            let mut beats = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                ensure!(flow.beats(), "the allowed flow stopped after {beats} beats");
                beats += 1;
            }
            Ok(beats)
        });
        let trying = scope.spawn(|| {
            let mut sent = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let _ = socket.send_to(b"ping", denied);
                ensure!(socket.recv_from(&mut [0; 16]).is_err(), "a denied datagram was answered after {sent}");
                sent += 1;
            }
            Ok(sent)
        });
        let killed = kill_agents(&mut mesh);
        stop.store(true, Ordering::Relaxed);
        let (beats, sent) = (beating.join().expect("panicked"), trying.join().expect("panicked"));
        let (beats, sent) = (beats?, sent?);
        killed?;
        ensure!(beats > 100 && sent > 100, "too little traffic to tell: {beats} beats, {sent} datagrams");
        Ok(())
    })
}

fn kill_agents(mesh: &mut Mesh) -> Result<()> {
    let mut wait = Duration::from_millis(3);
    for round in 0..12 {
        let node = ["web1", "app1"][round % 2];
        mesh.stop_node(node, Signal::SIGKILL)?;
        mesh.start_node(node)?;
        // A different moment of the start each time: 3 ms, 5, 8, … 400.
        let until = Instant::now() + wait;
        while Instant::now() < until {
            thread::park_timeout(until - Instant::now());
        }
        wait = wait * 8 / 5;
    }
    for node in ["web1", "app1"] {
        mesh.wait_until_up(node)?;
    }
    Ok(())
}

/// The link is deleted again and again under traffic: the agent makes it anew, nothing that is denied passes, and no moment is
/// seen at which it is up without both programs.
#[test]
fn a_deleted_link_is_made_anew_and_enforced_before_it_is_up() -> Result<()> {
    let (mesh, _servers) = story()?;
    let (web, app) = (mesh.node("web1")?, mesh.node("app1")?);
    let denied = SocketAddr::new(app.v6.into(), 9000);
    let socket = probe::udp_socket(web.namespace(), denied.ip())?;
    socket.set_read_timeout(Some(Duration::from_millis(1)))?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let trying = scope.spawn(|| {
            let mut sent = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let _ = socket.send_to(b"ping", denied);
                ensure!(socket.recv_from(&mut [0; 16]).is_err(), "a denied datagram was answered after {sent}");
                sent += 1;
            }
            Ok(sent)
        });
        let watching = [web, app].map(|node| {
            let stop = &stop;
            scope.spawn(move || node.namespace().enter(|| watch_for_open_links(stop)))
        });
        let deleted = (0..4).try_for_each(|round| {
            let node = [app, web][round % 2].namespace();
            node.run("ip", &["link", "delete", "rampart0"])?;
            wait_for("traffic after the link was deleted", START_LIMIT, || {
                let seen = probe::attempt(web.namespace(), app.v4.into(), Traffic::Tcp(8080), Duration::from_secs(1));
                // Without the link there is no source address.
                Ok(seen.is_ok_and(|seen| seen == Seen::Answered))
            })
        });
        stop.store(true, Ordering::Relaxed);
        let sent = trying.join().expect("panicked")?;
        for watching in watching {
            let looked = watching.join().expect("panicked")?;
            ensure!(looked > 100, "too few looks to tell: {looked}");
        }
        deleted?;
        ensure!(sent > 100, "too little traffic to tell: {sent} datagrams");
        Ok(())
    })?;
    for node in ["web1", "app1"] {
        let repairs = mesh.scrape_node(node)?.sum("rampart_drift_repairs_total", &[]);
        ensure!(repairs >= 2.0, "{node} counted {repairs} repairs");
    }
    check_lines(&mesh, "after all repairs")
}

/// Looks whether the link is up and then how many programs it has; returns how often it was up.
fn watch_for_open_links(stop: &AtomicBool) -> Result<u64> {
    let mut looked = 0;
    while !stop.load(Ordering::Relaxed) {
        let Ok(index) = if_nametoindex("rampart0") else { continue };
        let Ok(flags) = std::fs::read_to_string("/sys/class/net/rampart0/flags") else { continue };
        let up = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16)? & 1 != 0;
        // A number is never given twice: these are the flags of this link.
        if !up || if_nametoindex("rampart0") != Ok(index) {
            continue;
        }
        for direction in DIRECTIONS {
            match foreign::count_tcx(index, direction) {
                Ok(programs) => ensure!(programs > 0, "the link is up without a program after {looked} looks"),
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => return Err(error).context("failed to ask for programs"),
            }
        }
        looked += 1;
    }
    Ok(looked)
}

/// Every change that `meshctl` said was done is there after `controllerd` was killed, and reaches the nodes.
#[test]
fn a_killed_controller_loses_no_acknowledged_change() -> Result<()> {
    let (mut mesh, _servers) = story()?;
    let mut acknowledged = Vec::new();
    for round in 0..5 {
        for n in 0..=round {
            let (name, service) = (format!("r{round}-{n}"), format!("tcp/{}", 20_000 + 100 * round + n));
            let args = ["rule", "add", &name, "--from", "cidr:web", "--to", "cidr:db", "--service", &service];
            if mesh.meshctl(&args)?.status.success() {
                acknowledged.push(name);
            }
        }
        mesh.stop_controller(Signal::SIGKILL)?;
        mesh.start_controller()?;
    }
    let rules = mesh.meshctl_ok(&["rule", "list", "-o", "json"])?;
    for name in &acknowledged {
        ensure!(rules.contains(&format!("\"{name}\"")), "rule `{name}` was acknowledged and is gone:\n{rules}");
    }
    let last = acknowledged.last().context("nothing was acknowledged")?;
    wait_for(&format!("rule `{last}` to reach db1"), START_LIMIT, || {
        Ok(mesh.nodectl_ok("db1", &["policy", "show"])?.contains(last.as_str()))
    })
}

/// What somebody breaks by hand is put right within seconds, and counted.
#[test]
fn drift_is_repaired_and_reported() -> Result<()> {
    let (mesh, _servers) = story()?;
    let web = mesh.node("web1")?.namespace();
    let repairs = || Ok::<_, anyhow::Error>(mesh.scrape_node("web1")?.sum("rampart_drift_repairs_total", &[]));
    type Breakage<'a> = (&'a str, Box<dyn Fn() -> Result<()> + 'a>);
    let breakages: [Breakage<'_>; 4] = [
        ("the egress program", Box::new(|| take_off_egress(&mesh, "web1"))),
        (
            "an address",
            Box::new(|| {
                let address = format!("{}/32", mesh.node("web1")?.v4);
                let shown = web.run("ip", &["-o", "-4", "address", "show", "dev", "rampart0"])?;
                let given = shown.split_whitespace().find(|word| word.contains('/')).unwrap_or(&address).to_owned();
                web.run("ip", &["address", "delete", &given, "dev", "rampart0"]).map(drop)
            }),
        ),
        ("a route", Box::new(|| web.run("ip", &["route", "delete", "10.42.0.0/16", "dev", "rampart0"]).map(drop))),
        ("the link's state", Box::new(|| web.run("ip", &["link", "set", "rampart0", "down"]).map(drop))),
    ];
    for (what, break_it) in &breakages {
        let before = repairs()?;
        break_it().with_context(|| format!("breaking {what}"))?;
        wait_for(&format!("the repair of {what}"), START_LIMIT, || Ok(repairs()? > before))?;
        wait_for(&format!("traffic after the repair of {what}"), START_LIMIT, || {
            Ok(probe::attempt(web, mesh.node("app1")?.v4.into(), Traffic::Tcp(8080), probe::PATIENCE)?
                == Seen::Answered)
        })?;
    }
    check_lines(&mesh, "after all repairs")
}

/// Packets for the mesh do not take the underlay's default route when the link is gone, until the node has left.
#[test]
fn nothing_for_the_mesh_leaves_in_clear() -> Result<()> {
    let (mut mesh, _servers) = story()?;
    mesh.stop_node("web1", Signal::SIGKILL)?; // it would make the link again
    let app = mesh.node("app1")?;
    let addresses = [SocketAddr::new(app.v4.into(), 8080), SocketAddr::new(app.v6.into(), 8080)];
    let web = mesh.node("web1")?.namespace();
    for change in [["set", "rampart0", "down"].as_slice(), &["delete", "rampart0"]] {
        web.run("ip", &[&["link"], change].concat())?;
        for address in addresses {
            let connected = web.enter(|| Ok(TcpStream::connect_timeout(&address, START_LIMIT)))?;
            let error = connected.err().with_context(|| format!("{address} was reached without the link"))?;
            let unreachable = [ErrorKind::HostUnreachable, ErrorKind::NetworkUnreachable].contains(&error.kind());
            ensure!(unreachable, "{address}: {error}");
            // The refusal is the node's own, and not a router's on the way.
            let route = web.output(Command::new("ip").args(["route", "get", &address.ip().to_string()]))?;
            ensure!(!route.status.success(), "{address} has a route without the link: {route:?}");
        }
    }
    let left = web.output(mesh.program("noded").args(["leave", "--state-dir", "/run/rampart-node"]))?;
    ensure!(left.status.success(), "{left:?}");
    for family in ["-4", "-6"] {
        let routes = web.run("ip", &[family, "route", "show", "proto", "117"])?;
        ensure!(routes.is_empty(), "`noded leave` left routes behind: {routes}");
    }
    Ok(())
}

/// A disabled node has no peers and is refused by the controller; enabled again it is back.
#[test]
fn a_disabled_node_is_cut_off() -> Result<()> {
    let (mesh, _servers) = story()?;
    let app = mesh.node("app1")?;
    let web = mesh.node("web1")?.namespace();
    let reaches =
        || Ok(probe::attempt(web, app.v4.into(), Traffic::Tcp(8080), Duration::from_secs(1))? == Seen::Answered);
    ensure!(reaches()?, "web1 does not reach app1 at first");
    mesh.meshctl_ok(&["node", "disable", "app1"])?;
    wait_for("app1 to be nobody's peer", START_LIMIT, || Ok(!mesh.nodectl_ok("web1", &["peers"])?.contains("app1")))?;
    ensure!(!reaches()?, "web1 reaches a disabled node");
    mesh.meshctl_ok(&["node", "enable", "app1"])?;
    wait_for("app1 to be reached again", START_LIMIT, reaches)
}

/// Two disabled nodes are not each other's peers either: not while they follow, not after a restart from what is on disk,
/// and not if they were away when it happened.
#[test]
fn disabled_nodes_do_not_talk_to_each_other() -> Result<()> {
    let (mut mesh, _servers) = story()?;
    check_disabled(&mut mesh, false)?;
    check_disabled(&mut mesh, true)?;
    mesh.converge()?;
    check_lines(&mesh, "after all is enabled again")
}

const PAIR: [&str; 2] = ["web1", "app1"];

fn check_disabled(mesh: &mut Mesh, away: bool) -> Result<()> {
    for node in PAIR.into_iter().filter(|_| away) {
        mesh.stop_node(node, Signal::SIGKILL)?;
    }
    for node in PAIR {
        mesh.meshctl_ok(&["node", "disable", node])?;
    }
    for node in PAIR.into_iter().filter(|_| away) {
        mesh.start_node(node)?;
    }
    for node in PAIR {
        wait_for(&format!("`{node}` to have no peers"), START_LIMIT, || has_no_peers(mesh, node))
            .with_context(|| mesh.log(node))?;
    }
    ensure!(!web_reaches_app(mesh)?, "a disabled node reaches another (away: {away})");
    for node in PAIR {
        mesh.stop_node(node, Signal::SIGKILL)?;
    }
    mesh.stop_controller(Signal::SIGKILL)?;
    for node in PAIR {
        mesh.start_node(node)?;
        mesh.wait_until_up(node)?;
    }
    ensure!(!web_reaches_app(mesh)?, "restarts made a disabled node reach another (away: {away})");
    for node in PAIR {
        ensure!(has_no_peers(mesh, node)?, "a restart gave `{node}` its peers back (away: {away})");
    }
    mesh.start_controller()?;
    for node in PAIR {
        mesh.meshctl_ok(&["node", "enable", node])?;
    }
    wait_for("app1 to be reached again", START_LIMIT, || web_reaches_app(mesh)).with_context(|| mesh.logs())
}

fn has_no_peers(mesh: &Mesh, node: &str) -> Result<bool> {
    let output = mesh.nodectl(node, &["peers", "-o", "json"])?;
    let peers: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Ok(output.status.success() && peers.as_array().is_some_and(Vec::is_empty))
}

fn web_reaches_app(mesh: &Mesh) -> Result<bool> {
    let (web, app) = (mesh.node("web1")?.namespace(), mesh.node("app1")?.v4.into());
    Ok(probe::attempt(web, app, Traffic::Tcp(8080), Duration::from_secs(1))? == Seen::Answered)
}
