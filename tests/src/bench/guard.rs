//! A node under a flood of forged handshake initiations at full sender speed: without a guard, with it, and with a program
//! in its place that does nothing but drop them.
//!
//! The mesh is a real one. Its agents are killed once it stands, and the bench itself puts the guard on and off. Flood, guard
//! and tunnel share the machine's processors, as they share those of a node: what the guard takes from the flood's sender
//! shows in the flood's rate and not in the flow's, so both are printed.

use std::collections::BTreeMap;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebpf_common::underlay::reason;
use nix::net::if_::if_nametoindex;
use nix::sys::signal::Signal;
use node::kernel::Guard;

use node::kernel::guard::{EbpfGuard, GuardProbe, Hook, Interfaces, Mode, Wanted};
use policy::PublicKey;

use super::Effort;
use super::datapath::on_host;
use super::datapath::traffic::{Load, Way};
use super::datapath::tunnel::in_network;
use super::report::{Report, Row, Target};
use super::statistics::{median, minimum, ratio};
use crate::conformance::underlay::{KEY, plenty, to_port, udp, wanted};
use crate::conformance::{INTERFACE, Lab, foreign, in_lab};
use crate::flood::{self, Target as Victim};
use crate::forge;
use crate::mesh::{Family, Mesh, wait_for};
use crate::namespace::Lifetime;

const WIREGUARD: u16 = 51_820;
/// Least share of what a flow keeps under a flood that is dropped by the bare program.
const SHARE: f64 = 0.95;
const HANDSHAKE: Duration = Duration::from_secs(30);
/// A new peer that is not let in after this time counts with it.
const NEWCOMER: Duration = Duration::from_secs(30);
const LOADS: [Load; 2] = [Load::Tcp { streams: 1 }, Load::RoundTrips];

/// What stands between the flood and WireGuard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shield {
    Nothing,
    Guard,
    Bare,
}

impl Shield {
    const ALL: [Self; 3] = [Self::Nothing, Self::Guard, Self::Bare];

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "no guard",
            Self::Guard => "guard",
            Self::Bare => "bare drop",
        }
    }
}

/// The whole bench.
pub fn run(effort: Effort) -> Result<Report> {
    let mut report = Report::new("cargo xtask bench guard");
    costs(effort, &mut report)?;
    on_host(|lab| {
        let mut field = Field::build(lab)?;
        field.measure_flows(effort, &mut report)?;
        field.measure_newcomer(effort, &mut report)
    })?;
    Ok(report)
}

/// What one packet costs the guard, by the kernel's test run.
fn costs(effort: Effort, report: &mut Report) -> Result<()> {
    let (turns, repeat) = effort.choose((30, 20_000), (2, 200));
    let stranger = "198.51.100.7:4000";
    let forged = to_port(stranger, &forge::initiation(1));
    let packets = [
        ("not to the port", udp(stranger, WIREGUARD + 1, &forge::message(4, 1_452, 1))),
        ("data", to_port(stranger, &forge::message(4, 1_452, 1))),
        ("forged response", to_port(stranger, &forge::response(1))),
        ("forged initiation", forged.clone()),
        ("initiation with the right MAC", to_port(stranger, &forge::with_mac(forge::initiation(1), &KEY))),
    ];
    let mut rows = Vec::new();
    in_lab(|lab| {
        for (mode, hook) in [(Mode::Tc, "TC"), (Mode::Xdp, "XDP")] {
            let folder = lab.bpffs.join(hook);
            let mut probe = GuardProbe::load(mode, true, &folder).expect("loaded");
            let own = crate::conformance::underlay::OWN.map(|address| address.parse().expect("an address"));
            // Not configured, it lets everything pass at once: what the test run itself costs.
            let header: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
            let frame = |packet: &[u8]| [&header[..], packet].concat();
            let time = |probe: &mut GuardProbe, packet: &[u8]| {
                let once = |_| probe.time(&frame(packet), repeat).expect("run").as_nanos() as f64;
                minimum(&(0..turns).map(once).collect::<Vec<_>>())
            };
            let nothing = time(&mut probe, &forged);
            probe.configure(&wanted(plenty(), &[]), &own).expect("configured");
            for (what, packet) in &packets {
                let net = time(&mut probe, packet) - nothing;
                rows.push(Row::new(format!("guard at {hook}, {what}, net of one that is off"), net, "ns"));
            }
        }
    });
    rows.into_iter().for_each(|row| report.push(row));
    Ok(())
}

/// `app1` is flooded, `web1` has a flow to it, `db1` comes anew.
struct Field {
    mesh: Mesh,
    victim: Victim,
    guard: EbpfGuard,
    wanted: Wanted,
    bare: Option<OwnedFd>,
}

impl Field {
    fn build(lab: &Lab) -> Result<Self> {
        let mut mesh = Mesh::new(Lifetime::Bound, "deny")?;
        for (number, (node, cidr)) in (1..).zip([("web1", "web"), ("app1", "app"), ("db1", "db")]) {
            let (v4, v6) = (format!("10.42.{number}.0/24"), format!("fd42:0:0:{number}::/64"));
            mesh.meshctl_ok(&["cidr", "add", cidr, &v4, &v6])?;
            mesh.add_node(node, cidr)?;
        }
        for from in ["web", "db"] {
            let cidr = format!("cidr:{from}");
            mesh.meshctl_ok(&["rule", "add", from, "--from", &cidr, "--to", "cidr:app", "--service", "any"])?;
        }
        mesh.converge()?;
        let app1 = mesh.node("app1")?;
        let address = app1.underlay_v4();
        let victim = Victim::of(app1.namespace(), mesh.underlay().port(address), address, WIREGUARD)?;
        let status: serde_json::Value = serde_json::from_str(&mesh.nodectl_ok("app1", &["status", "-o", "json"])?)?;
        let key: PublicKey = status["public-key"].as_str().context("no public key")?.parse()?;
        // As configured by default.
        let defaults = node::config::load(&node::config::Flags::default())?.guard.context("no guard by default")?;
        let web1 = SocketAddr::V4(SocketAddrV4::new(mesh.node("web1")?.underlay_v4(), WIREGUARD));
        let wanted = Wanted {
            interfaces: Interfaces::These(["eth0".to_owned()].into()),
            mode: Mode::Tc,
            limits: defaults.limits,
            port: WIREGUARD,
            public_key: key,
            // `db1` is a stranger here.
            endpoints: [web1].into(),
        };
        let bpffs = lab.bpffs.as_path();
        let guard = in_network(app1.namespace(), || Ok(EbpfGuard::new(INTERFACE, bpffs)?))?;
        let mut field = Self { mesh, victim, guard, wanted, bare: None };
        wait_for("the first handshake", HANDSHAKE, || {
            Ok(field.way()?.carry(Load::RoundTrips, Duration::from_millis(1)).is_ok())
        })?;
        // Configured without a guard, so that nothing of it is left.
        field.mesh.stop_node("app1", Signal::SIGTERM)?;
        field.mesh.configure_node("app1", "[guard]\nenabled = false\n")?;
        field.mesh.start_node("app1")?;
        wait_for("the agent's guard to go", HANDSHAKE, || {
            let status = field.mesh.nodectl("app1", &["status", "-o", "json"])?;
            let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
            Ok(status["guard"]["enabled"] == false)
        })?;
        field.mesh.stop_node("app1", Signal::SIGKILL)?;
        field.put_up(Shield::Nothing)?;
        Ok(field)
    }

    fn way(&self) -> Result<Way<'_>> {
        let (client, server) = (self.mesh.node("web1")?, self.mesh.node("app1")?);
        Ok(Way { client: client.namespace(), server: server.namespace(), address: server.address(Family::V4) })
    }

    fn put_up(&mut self, shield: Shield) -> Result<()> {
        self.bare = None;
        let Self { mesh, guard, wanted, .. } = self;
        let host = mesh.node("app1")?.namespace();
        self.bare = in_network(host, || {
            let kept = guard.keep((shield == Shield::Guard).then_some(&*wanted));
            ensure!(kept.error.is_none(), "{kept:?}");
            ensure!(kept.attachments.iter().all(|place| place.hook.is_some_and(|hook| hook != Hook::Xdp)), "{kept:?}");
            match shield {
                Shield::Bare => {
                    let link = foreign::attach_bare_drop(if_nametoindex("eth0")?, WIREGUARD);
                    Ok(Some(link.context("the kernel has no TCX, which the bare program is attached by")?))
                }
                _ => Ok(None),
            }
        })?;
        Ok(())
    }

    /// Paired and alternating: each turn has all three, in another order.
    fn measure_flows(&mut self, effort: Effort, report: &mut Report) -> Result<()> {
        let turns = effort.choose(30, 2);
        let time = effort.choose(Duration::from_millis(400), Duration::from_millis(200));
        let mut flows: BTreeMap<(usize, Shield), Vec<f64>> = BTreeMap::new();
        let mut floods: BTreeMap<Shield, Vec<f64>> = BTreeMap::new();
        let mut quiet: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for turn in 0..turns {
            for step in 0..Shield::ALL.len() {
                let shield = Shield::ALL[(turn + step) % Shield::ALL.len()];
                self.put_up(shield)?;
                for (index, load) in LOADS.into_iter().enumerate() {
                    let way = self.way()?;
                    let flooded =
                        flood::during(self.mesh.underlay().router(), &self.victim, || Ok(way.carry(load, time)));
                    let (rate, sent) = flooded.with_context(|| format!("{}, {}", load.name(), shield.name()))?;
                    let rate = match rate {
                        Ok(rate) => rate,
                        // A flow that stands still is what is to be shown.
                        Err(_) if shield == Shield::Nothing => 0.0,
                        Err(error) => return Err(error.context(format!("{}, {}", load.name(), shield.name()))),
                    };
                    flows.entry((index, shield)).or_default().push(rate);
                    floods.entry(shield).or_default().push(sent.per_second());
                }
            }
            for (index, load) in LOADS.into_iter().enumerate() {
                quiet.entry(index).or_default().push(self.way()?.carry(load, time)?);
            }
        }
        for shield in Shield::ALL {
            report.push(Row::new(
                format!("forged initiations sent, {}", shield.name()),
                median(&floods[&shield]),
                "packets/s",
            ));
        }
        for (index, load) in LOADS.into_iter().enumerate() {
            let name = load.name();
            report.push(Row::new(format!("{name}, no flood"), median(&quiet[&index]), load.unit()));
            for shield in Shield::ALL {
                let rates = &flows[&(index, shield)];
                report.push(Row::new(format!("{name}, flood, {}", shield.name()), median(rates), load.unit()));
            }
            let against = |shield| -> Vec<(f64, f64)> {
                flows[&(index, shield)].iter().copied().zip(flows[&(index, Shield::Bare)].iter().copied()).collect()
            };
            let row =
                Row::estimate(format!("{name}, flood, guard / bare drop"), ratio(&against(Shield::Guard)), "times");
            report.push(row.target(Target::AtLeast(SHARE)));
            let row = ratio(&against(Shield::Nothing));
            report.push(Row::estimate(format!("{name}, flood, no guard / bare drop"), row, "times"));
        }
        Ok(())
    }

    /// From the start of a peer whose endpoint is not known to its first answer. (The bare program would never let it in.)
    fn measure_newcomer(&mut self, effort: Effort, report: &mut Report) -> Result<()> {
        let turns = effort.choose(5, 1);
        let mut took: BTreeMap<Shield, Vec<f64>> = BTreeMap::new();
        for _ in 0..turns {
            for shield in [Shield::Nothing, Shield::Guard] {
                self.put_up(shield)?;
                took.entry(shield).or_default().push(self.newcomer()?.as_secs_f64());
            }
        }
        for (shield, times) in &took {
            let late = times.iter().filter(|time| **time >= NEWCOMER.as_secs_f64()).count();
            let mut row =
                Row::new(format!("new peer from an unknown endpoint, flood, {}", shield.name()), median(times), "s");
            row = row.also("minimum", minimum(times)).also("not let in", late as f64);
            report.push(row);
        }
        self.put_up(Shield::Guard)?;
        let counters = self.guard.counters()?;
        ensure!(counters.keys().any(|(_, number)| *number == reason::WRONG_MAC), "the guard counts");
        Ok(())
    }

    fn newcomer(&mut self) -> Result<Duration> {
        self.mesh.stop_node("db1", Signal::SIGTERM)?;
        self.mesh.node("db1")?.namespace().run("ip", &["link", "del", INTERFACE])?;
        let app1 = self.mesh.node("app1")?.address(Family::V4);
        self.mesh.start_node("db1")?;
        let host = self.mesh.node("db1")?.namespace();
        let (took, _) = flood::during(self.mesh.underlay().router(), &self.victim, || {
            let begin = Instant::now();
            while begin.elapsed() < NEWCOMER {
                let arguments = ["-n", "-q", "-c", "1", "-W", "0.2", &app1.to_string()];
                let mut ping = std::process::Command::new("ping");
                if host.output(ping.args(arguments)).context("`ping` is in the package iputils-ping")?.status.success()
                {
                    break;
                }
            }
            Ok(begin.elapsed().min(NEWCOMER))
        })?;
        Ok(took)
    }
}
