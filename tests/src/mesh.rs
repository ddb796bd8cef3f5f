//! A controller and its nodes, each on a host of its own, driven as an operator would: by the four programs.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::metrics::Page;
use crate::namespace::{self, Lifetime, Namespace};
use crate::underlay::Underlay;

/// State lives on the host's own /run, so that it ends with the host.
const CONTROLLER_STATE: &str = "/run/rampart-controller";
const NODE_STATE: &str = "/run/rampart-node";
const NODE_CONFIG: &str = "/run/rampart-node.toml";
const CONTROLLER_LOG: &str = "/run/controllerd.log";
const NODE_LOG: &str = "/run/noded.log";
const CONTROLLER_PORT: u16 = 7443;
const NODE_METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9586);
const CONTROLLER_METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9587);
/// Generous: emulated processors are slow.
pub const START_LIMIT: Duration = Duration::from_secs(60);

/// The whole arrangement. Dropping it ends every process and namespace.
#[derive(Debug)]
pub struct Mesh {
    programs: PathBuf,
    underlay: Underlay,
    lifetime: Lifetime,
    controller: Host,
    nodes: BTreeMap<String, Node>,
}

#[derive(Debug)]
struct Host {
    namespace: Namespace,
    underlay_v4: Ipv4Addr,
    daemon: Option<Child>,
}

/// One node of the mesh.
#[derive(Debug)]
pub struct Node {
    host: Host,
    /// Inside the mesh.
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Node {
    pub fn namespace(&self) -> &Namespace {
        &self.host.namespace
    }

    /// Its address on the underlay.
    pub fn underlay_v4(&self) -> Ipv4Addr {
        self.host.underlay_v4
    }

    /// Its address inside the mesh.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Mesh {
    /// A controller of the network `corp` with `default`, running, without nodes.
    pub fn new(lifetime: Lifetime, default: &str) -> Result<Self> {
        let programs = program_folder()?;
        let mut underlay = Underlay::new(lifetime)?;
        let namespace = Namespace::new("controller", lifetime)?;
        let (underlay_v4, _) = underlay.connect(&namespace)?;
        let controller = Host { namespace, underlay_v4, daemon: None };
        let mut mesh = Self { programs, underlay, lifetime, controller, nodes: BTreeMap::new() };
        let endpoint = format!("{underlay_v4}:{CONTROLLER_PORT}");
        let mut init = mesh.program("controllerd");
        init.args(["init", "--network", "corp", "--root", "10.42.0.0/16", "--root", "fd42::/48"]).args([
            "--default",
            default,
            "--endpoint",
            &endpoint,
            "--state-dir",
            CONTROLLER_STATE,
        ]);
        succeed(mesh.controller.namespace.output(&mut init)?, "controllerd init")?;
        mesh.start_controller()?;
        Ok(mesh)
    }

    /// Starts `controllerd` and waits until it answers.
    pub fn start_controller(&mut self) -> Result<()> {
        let mut serve = self.program("controllerd");
        serve.args(["serve", "--state-dir", CONTROLLER_STATE]);
        self.controller.start(serve, CONTROLLER_LOG)?;
        wait_for("the controller to answer", START_LIMIT, || Ok(self.meshctl(&["status"])?.status.success()))
            .with_context(|| self.controller.log(CONTROLLER_LOG))
    }

    /// Ends `controllerd` with a signal and waits for it.
    pub fn stop_controller(&mut self, signal: Signal) -> Result<()> {
        self.controller.stop(signal)
    }

    /// Invites, joins and runs a node; returns when it enforces a policy.
    pub fn add_node(&mut self, name: &str, cidr: &str) -> Result<()> {
        let line = self.meshctl_ok(&["node", "invite", name, "--cidr", cidr, "--expires", "1h"])?;
        self.join_node(name, line.trim())?;
        self.start_node(name)?;
        self.wait_until_up(name)
    }

    /// A host whose `noded` has redeemed an invitation, not yet running.
    pub fn join_node(&mut self, name: &str, invitation: &str) -> Result<()> {
        let namespace = Namespace::new(name, self.lifetime)?;
        let (underlay_v4, _) = self.underlay.connect(&namespace)?;
        let mut join = self.program("noded");
        join.args(["join", "--state-dir", NODE_STATE, invitation]);
        succeed(namespace.output(&mut join)?, "noded join")?;
        let host = Host { namespace, underlay_v4, daemon: None };
        let node = Node { host, v4: Ipv4Addr::UNSPECIFIED, v6: Ipv6Addr::UNSPECIFIED };
        self.nodes.insert(name.to_owned(), node);
        Ok(())
    }

    /// What `noded` is configured with when it starts next.
    pub fn configure_node(&self, name: &str, text: &str) -> Result<()> {
        self.node(name)?.host.namespace.enter(|| Ok(std::fs::write(NODE_CONFIG, text)?))
    }

    /// Starts `noded` without waiting.
    pub fn start_node(&mut self, name: &str) -> Result<()> {
        self.start_node_with(name, &["--state-dir", NODE_STATE])
    }

    /// Likewise, with other arguments.
    pub fn start_node_with(&mut self, name: &str, args: &[&str]) -> Result<()> {
        let run = self.run(name, args)?;
        let node = self.nodes.get_mut(name).with_context(|| format!("no node `{name}`"))?;
        node.host.start(run, NODE_LOG)
    }

    /// Runs `noded` to its end, as a child of the calling thread, which tells `started` its id.
    pub fn run_node(&self, name: &str, started: impl FnOnce(u32)) -> Result<ExitStatus> {
        let mut child = self.node(name)?.host.spawn(self.run(name, &["--state-dir", NODE_STATE])?, NODE_LOG)?;
        started(child.id());
        Ok(child.wait()?)
    }

    fn run(&self, name: &str, args: &[&str]) -> Result<Command> {
        let mut run = self.program("noded");
        run.arg("run").args(args);
        if self.node(name)?.host.namespace.enter(|| Ok(std::path::Path::new(NODE_CONFIG).exists()))? {
            run.args(["--config", NODE_CONFIG]);
        }
        Ok(run)
    }

    /// Waits until a node enforces a policy and has its addresses.
    pub fn wait_until_up(&mut self, name: &str) -> Result<()> {
        wait_for(&format!("`{name}` to enforce a policy"), START_LIMIT, || {
            Ok(self.scrape_node(name).is_ok_and(|page| page.sum("rampart_policy_generation", &[]) >= 1.0))
        })
        .with_context(|| self.log(name))?;
        let node = self.nodes.get_mut(name).with_context(|| format!("no node `{name}`"))?;
        let mut found = None;
        wait_for(&format!("the addresses of `{name}`"), START_LIMIT, || {
            found = mesh_addresses(&node.host.namespace)?;
            Ok(found.is_some())
        })?;
        (node.v4, node.v6) = found.context("no addresses")?;
        Ok(())
    }

    /// Ends `noded` with a signal and waits for it.
    pub fn stop_node(&mut self, name: &str, signal: Signal) -> Result<()> {
        self.nodes.get_mut(name).with_context(|| format!("no node `{name}`"))?.host.stop(signal)
    }

    /// Waits until every connected node enforces what it was sent.
    pub fn converge(&self) -> Result<()> {
        wait_for("every node to enforce its revision", START_LIMIT, || {
            let status = self.status()?;
            let nodes = status["nodes"].as_array().context("`meshctl status -o json` has no `nodes`")?;
            Ok(nodes.iter().all(|node| node["enforced"] == node["sent"] && node["connected"] == true))
        })
    }

    /// What `meshctl status` knows.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.meshctl_ok(&["status", "-o", "json"])?)?)
    }

    /// Runs `meshctl` on the controller's host.
    pub fn meshctl(&self, args: &[&str]) -> Result<Output> {
        let mut command = self.program("meshctl");
        self.controller.namespace.output(command.args(args))
    }

    /// Runs `meshctl`, which must succeed; returns its stdout.
    pub fn meshctl_ok(&self, args: &[&str]) -> Result<String> {
        succeed(self.meshctl(args)?, &format!("meshctl {}", args.join(" ")))
    }

    /// Runs `nodectl` on a node.
    pub fn nodectl(&self, node: &str, args: &[&str]) -> Result<Output> {
        let mut command = self.program("nodectl");
        self.node(node)?.host.namespace.output(command.args(args))
    }

    /// Runs `nodectl`, which must succeed; returns its stdout.
    pub fn nodectl_ok(&self, node: &str, args: &[&str]) -> Result<String> {
        succeed(self.nodectl(node, args)?, &format!("nodectl {}", args.join(" ")))
    }

    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.get(name).with_context(|| format!("no node `{name}`"))
    }

    /// In the order of their names.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(name, node)| (name.as_str(), node))
    }

    pub fn controller(&self) -> &Namespace {
        &self.controller.namespace
    }

    /// The controller's address on the underlay.
    pub fn controller_endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.controller.underlay_v4.into(), CONTROLLER_PORT)
    }

    pub fn underlay(&self) -> &Underlay {
        &self.underlay
    }

    pub fn scrape_node(&self, name: &str) -> Result<Page> {
        Page::scrape(&self.node(name)?.host.namespace, NODE_METRICS)
    }

    pub fn scrape_controller(&self) -> Result<Page> {
        Page::scrape(&self.controller.namespace, CONTROLLER_METRICS)
    }

    /// The end of a node's log.
    pub fn log(&self, name: &str) -> String {
        self.node(name).map_or_else(|error| error.to_string(), |node| node.host.log(NODE_LOG))
    }

    /// The ends of all logs.
    pub fn logs(&self) -> String {
        let nodes = self.nodes.values().map(|node| node.host.log(NODE_LOG));
        [self.controller.log(CONTROLLER_LOG)].into_iter().chain(nodes).collect::<Vec<_>>().join("\n\n")
    }

    /// A command for one of the four programs.
    pub fn program(&self, name: &str) -> Command {
        Command::new(self.programs.join(name))
    }

    /// Every process to kill to end a kept mesh.
    pub fn holders(&self) -> Vec<u32> {
        let nodes = self.nodes.values().map(|node| &node.host.namespace);
        [self.underlay.router(), &self.controller.namespace].into_iter().chain(nodes).map(Namespace::holder).collect()
    }
}

impl Host {
    fn start(&mut self, command: Command, log: &'static str) -> Result<()> {
        ensure!(self.daemon.is_none(), "the daemon of `{}` runs already", self.namespace.name());
        self.daemon = Some(self.spawn(command, log)?);
        Ok(())
    }

    fn spawn(&self, mut command: Command, log: &'static str) -> Result<Child> {
        self.namespace.enter(|| {
            let output = File::options().create(true).append(true).open(log)?;
            command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
            command.spawn().with_context(|| format!("failed to start {command:?}"))
        })
    }

    fn stop(&mut self, signal: Signal) -> Result<()> {
        let mut child = self.daemon.take().with_context(|| format!("no daemon runs on `{}`", self.namespace.name()))?;
        namespace::signal(&child, signal)?;
        child.wait()?;
        Ok(())
    }

    fn log(&self, path: &'static str) -> String {
        let text =
            self.namespace.enter(|| Ok(std::fs::read_to_string(path)?)).unwrap_or_else(|error| error.to_string());
        let lines: Vec<_> = text.lines().collect();
        format!(
            "the end of {path} on `{}`:\n{}",
            self.namespace.name(),
            lines[lines.len().saturating_sub(30)..].join("\n")
        )
    }
}

/// Where the four programs are: beside the running one, or where RAMPART_PROGRAMS says.
pub fn program_folder() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("RAMPART_PROGRAMS") {
        return Ok(path.into());
    }
    let own = std::env::current_exe()?;
    let beside = own.ancestors().skip(1).take(2).find(|folder| folder.join("noded").exists());
    let folder = beside.context("`noded` is not beside this program; build it with `cargo build --workspace`")?;
    for name in ["controllerd", "meshctl", "noded", "nodectl"] {
        ensure!(folder.join(name).exists(), "`{name}` is not built; build it with `cargo build --workspace`");
    }
    Ok(folder.to_owned())
}

/// The addresses of the mesh's interface, once it has both.
fn mesh_addresses(host: &Namespace) -> Result<Option<(Ipv4Addr, Ipv6Addr)>> {
    let mut command = Command::new("ip");
    let output = host.output(command.args(["-o", "address", "show", "dev", "rampart0"]))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let addresses = || text.split_whitespace().filter_map(|word| word.split('/').next());
    let v4 = addresses().find_map(|word| word.parse::<Ipv4Addr>().ok().filter(|a| a.octets()[0] == 10));
    let v6 = addresses().find_map(|word| word.parse::<Ipv6Addr>().ok().filter(|a| a.segments()[0] == 0xfd42));
    Ok(v4.zip(v6))
}

fn succeed(output: Output, what: &str) -> Result<String> {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("`{what}` ended with {}: {stdout}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(stdout)
}

/// Asks again and again until `done` says so, or fails after `limit`.
pub fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        if done()? {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "waited {} s in vain for {what}", limit.as_secs());
        thread::park_timeout(Duration::from_millis(20));
    }
}

/// Whether the kernel has WireGuard, asked by making a link in a host that is thrown away.
pub fn kernel_has_wireguard(host: &Namespace) -> Result<bool> {
    let mut add = Command::new("ip");
    let made = host.output(add.args(["link", "add", "probe0", "type", "wireguard"]))?.status.success();
    if made {
        host.run("ip", &["link", "delete", "probe0"])?;
    }
    Ok(made)
}
