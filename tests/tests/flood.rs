//! A node under a flood of forged handshake initiations at full sender speed.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tests::flood::{self, Target};
use tests::mesh::{Family, Mesh, START_LIMIT, wait_for};
use tests::namespace::Lifetime;
use tests::probe::{self, EchoServer, RunningFlow};

/// The port of WireGuard, and of the echo server.
const WIREGUARD: u16 = 51820;
const ECHO: u16 = 8080;
/// A new peer tries every 5 s, and a fraction of its attempts gets the guard's time.
const NEWCOMER_LIMIT: Duration = Duration::from_secs(60);

/// `app1` is flooded, `web1` has a flow to it, `db1` is new to it.
fn three() -> Result<(Mesh, EchoServer)> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    for (node, cidr, v4, v6) in [
        ("web1", "web", "10.42.1.0/24", "fd42:0:0:1::/64"),
        ("app1", "app", "10.42.2.0/24", "fd42:0:0:2::/64"),
        ("db1", "db", "10.42.3.0/24", "fd42:0:0:3::/64"),
    ] {
        mesh.meshctl_ok(&["cidr", "add", cidr, v4, v6])?;
        mesh.add_node(node, cidr)?;
    }
    for (rule, from) in [("web", "cidr:web"), ("db", "cidr:db")] {
        for (service, kind) in [("tcp/8080", "tcp"), ("udp/8080", "udp")] {
            let name = format!("{rule}-{kind}");
            mesh.meshctl_ok(&["rule", "add", &name, "--from", from, "--to", "cidr:app", "--service", service])?;
        }
    }
    mesh.converge()?;
    let server = EchoServer::start(mesh.node("app1")?.namespace(), &[ECHO])?;
    Ok((mesh, server))
}

fn target(mesh: &Mesh) -> Result<Target> {
    let app1 = mesh.node("app1")?;
    let address = app1.underlay_v4();
    Target::of(app1.namespace(), mesh.underlay().port(address), address, WIREGUARD)
}

/// Gives `db1` another address on the underlay and a new WireGuard device while the controller cannot tell `app1`, so that
/// `app1` does not know the endpoint of this peer.
fn become_a_stranger(mesh: &mut Mesh) -> Result<()> {
    mesh.stop_controller(Signal::SIGKILL)?;
    mesh.stop_node("db1", Signal::SIGTERM)?;
    let former = mesh.node("db1")?.underlay_v4();
    let [a, b, c, _] = former.octets();
    let host = mesh.node("db1")?.namespace();
    host.run("ip", &["link", "del", "rampart0"])?;
    host.run("ip", &["address", "del", &format!("{former}/24"), "dev", "eth0"])?;
    host.run("ip", &["address", "add", &format!("{}/24", Ipv4Addr::new(a, b, c, 77)), "dev", "eth0"])?;
    host.run("ip", &["route", "replace", "default", "via", &Ipv4Addr::new(a, b, c, 1).to_string()])?;
    Ok(())
}

fn status(mesh: &Mesh) -> Result<Value> {
    Ok(serde_json::from_str(&mesh.nodectl_ok("app1", &["status", "-o", "json"])?)?)
}

/// How `app1`'s guard hangs on its only interface.
fn hook(mesh: &Mesh) -> Result<String> {
    let status = status(mesh)?;
    let hook = status["guard"]["places"][0]["hook"].as_str();
    Ok(hook.with_context(|| format!("no guard: {}", status["guard"]))?.to_owned())
}

fn dropped(mesh: &Mesh) -> Result<f64> {
    Ok(mesh.scrape_node("app1")?.sum("rampart_guard_packets_total", &[("verdict", "deny")]))
}

/// The flow beats and the newcomer is let in, both during the flood.
fn holds(mode: &str, expected: &str) -> Result<()> {
    let (mut mesh, _server) = three()?;
    mesh.stop_node("app1", Signal::SIGTERM)?;
    mesh.configure_node("app1", &format!("[guard]\nmode = \"{mode}\"\n"))?;
    mesh.start_node("app1")?;
    mesh.wait_until_up("app1")?;
    wait_for("the guard", START_LIMIT, || Ok(hook(&mesh).is_ok_and(|hook| hook.starts_with(expected))))
        .with_context(|| mesh.log("app1"))?;
    let (web1, app1) = (mesh.node("web1")?, mesh.node("app1")?);
    let echo = SocketAddr::new(app1.address(Family::V4), ECHO);
    let mut flow = RunningFlow::open(web1.namespace(), echo)?.patient(Duration::from_secs(5))?;
    become_a_stranger(&mut mesh)?;
    let target = target(&mesh)?;
    let before = dropped(&mesh)?;
    let ((took, beats), sent) = {
        mesh.start_node("db1")?;
        let mesh = &mesh;
        flood::during(mesh.underlay().router(), &target, || {
            let begin = Instant::now();
            let mut beats = 0u32;
            let newcomer = std::thread::scope(|scope| {
                let newcomer = scope.spawn(|| probe::first_echo(mesh.node("db1")?.namespace(), echo, NEWCOMER_LIMIT));
                while !newcomer.is_finished() {
                    ensure!(flow.beats(), "the live flow stood still for 5 s");
                    beats += 1;
                }
                newcomer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })?;
            let arrived = newcomer.context("the new peer was not let in")?;
            Ok((arrived - begin, beats))
        })
        .with_context(|| format!("{}\n{}", mesh.log("app1"), mesh.log("db1")))?
    };
    println!(
        "{expected}: new peer after {took:.1?}, {beats} beats, {:.0} forged initiations a second",
        sent.per_second()
    );
    let dropped = dropped(&mesh)? - before;
    // The queue between the two ends holds some, and may drop others.
    ensure!(dropped >= 0.5 * sent.frames as f64, "of {} sent only {dropped} were dropped by the guard", sent.frames);
    let passed = mesh.scrape_node("app1")?.sum("rampart_guard_packets_total", &[("reason", "initiation")]);
    ensure!(passed >= 1.0, "the new peer's own initiation was counted");
    let shown = mesh.nodectl_ok("app1", &["status"])?;
    ensure!(shown.contains("wrong-mac"), "{shown}");
    events(&mesh)
}

/// The drops are told like the policy's denials: some of them, and how many more there were.
fn events(mesh: &Mesh) -> Result<()> {
    let address = mesh.node("app1")?.underlay_v4().to_string();
    wait_for("what was suppressed to be told", START_LIMIT, || {
        let drops = mesh.nodectl_ok("app1", &["drops", "--reason", "wrong-mac", "-o", "json"])?;
        let drops: Value = serde_json::from_str(&drops)?;
        let Some(drop) = drops["drops"].as_array().and_then(|drops| drops.last()) else { return Ok(false) };
        for (field, expected) in [
            ("direction", Value::from("ingress")),
            ("interface", "eth0".into()),
            ("destination", address.clone().into()),
            ("service", format!("udp/{WIREGUARD}").into()),
            ("length", 176.into()),
            ("rule", Value::Null),
            ("revision", Value::Null),
        ] {
            ensure!(drop[field] == expected, "{field} is not {expected}: {drop}");
        }
        ensure!(drop["source"].is_string() && drop["source-port"].is_u64() && drop["time"].is_string(), "{drop}");
        Ok(drops["suppressed"][0]["events"].as_u64() > Some(1_000))
    })
}

#[test]
fn a_flow_lives_and_a_new_peer_gets_in_under_a_flood() -> Result<()> {
    holds("tc", "tc")
}

#[test]
fn likewise_with_the_guard_in_the_driver() -> Result<()> {
    holds("xdp", "xdp")
}

/// It stays without the agent, a changed configuration needs no gap, and `leave` takes it off.
#[test]
fn the_guard_is_off_where_it_is_turned_off_and_gone_with_the_node() -> Result<()> {
    let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
    mesh.meshctl_ok(&["cidr", "add", "app", "10.42.2.0/24", "fd42:0:0:2::/64"])?;
    mesh.add_node("app1", "app")?;
    let target = target(&mesh)?;
    hook(&mesh)?;
    mesh.stop_node("app1", Signal::SIGKILL)?;
    let ((), first) = flood::during(mesh.underlay().router(), &target, || {
        std::thread::sleep(Duration::from_millis(100));
        Ok(())
    })?;
    ensure!(first.frames > 0, "nothing was sent");
    mesh.start_node("app1")?;
    mesh.wait_until_up("app1")?;
    wait_for("the guard", START_LIMIT, || Ok(hook(&mesh).is_ok()))?;
    ensure!(dropped(&mesh)? > 0.0, "the guard went with the agent");
    mesh.stop_node("app1", Signal::SIGTERM)?;
    mesh.configure_node("app1", "[guard]\nenabled = false\n")?;
    mesh.start_node("app1")?;
    mesh.wait_until_up("app1")?;
    wait_for("the guard to go", START_LIMIT, || Ok(status(&mesh)?["guard"]["enabled"] == false))?;
    let pins = || {
        let script = "find /sys/fs/bpf -name 'guard-v*'";
        mesh.node("app1")?.namespace().run("sh", &["-c", script])
    };
    wait_for("its pins to go", START_LIMIT, || Ok(pins()?.is_empty()))?;
    ensure!(mesh.nodectl_ok("app1", &["status"])?.contains("off"), "status says so");
    Ok(())
}
