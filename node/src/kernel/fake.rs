//! A kernel in memory: the traits of this module over one shared world, with steps that fail on demand. For tests of
//! what is above.

mod remembered;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use ebpf_common::flow::{Flow as Record, FlowKey};
use ipnet::IpNet;
use policy::{Flow, Generation, PublicKey, Revision};

use super::inspect::{Counters, Inspect, Probed};
use super::{
    AttachMethod, Backend, Datapath, DatapathState, Device, DevicePeer, EarlyDrop, KernelError, Link, LinkKind,
    LinkState, PeerConfig, Program, WireGuard,
};
use crate::key::PrivateKey;
use crate::lower::Tables;

pub use remembered::RememberedWireGuard;

/// MTU of a link that nobody has set.
const FRESH_MTU: u32 = 1500;

/// The world that the fakes share. Clones are the same world.
#[derive(Clone, Debug)]
pub struct FakeKernel(Arc<Mutex<World>>);

/// What there is. Tests change it to make drift.
#[derive(Clone, Debug)]
pub struct World {
    pub backend: Backend,
    pub link: Option<LinkState>,
    pub barriers: BTreeSet<IpNet>,
    /// `None`: nothing serves the link.
    pub device: Option<Device>,
    /// `None`: nothing is attached or pinned.
    pub datapath: Option<DatapathState>,
    /// The tables in force.
    pub tables: Option<Tables>,
    /// What a reader of counters gets; those of rules that were reset are gone.
    pub counters: Counters,
    /// Records of flows, by both ends.
    pub flows: Vec<(IpAddr, IpAddr)>,
    /// Programs on the interface, as they are told.
    pub programs: Vec<Program>,
    /// Each change that was asked for, in order, failed ones too.
    pub steps: Vec<String>,
    /// What must never be: a link that is up without programs on both hooks.
    pub violations: Vec<String>,
    /// The step of this number, counted from 0 over [`World::steps`], fails and changes nothing.
    pub fail_at: Option<usize>,
    /// From the step of this number on nothing happens any more: the daemon is dead.
    pub dead_from: Option<usize>,
    /// Steps whose words begin so fail and change nothing.
    pub refuse: Option<&'static str>,
    /// Whether the link cannot be read back.
    pub hide_link: bool,
    /// Whether the device cannot be read back.
    pub hide_device: bool,
}

impl FakeKernel {
    /// A world without a link.
    pub fn new(backend: Backend) -> Self {
        Self(Arc::new(Mutex::new(World {
            backend,
            link: None,
            barriers: BTreeSet::new(),
            device: None,
            datapath: None,
            tables: None,
            counters: Counters::default(),
            flows: Vec::new(),
            programs: Vec::new(),
            steps: Vec::new(),
            violations: Vec::new(),
            fail_at: None,
            dead_from: None,
            refuse: None,
            hide_link: false,
            hide_device: false,
        })))
    }

    pub fn wireguard(&self) -> FakeWireGuard {
        FakeWireGuard(self.clone())
    }

    pub fn link(&self) -> FakeLink {
        FakeLink(self.clone())
    }

    pub fn datapath(&self) -> FakeDatapath {
        FakeDatapath(self.clone())
    }

    /// The world, to look at and to change.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().expect("a fake does not panic")
    }

    /// Lets the step fail that is `steps` steps from now; 0 is the next.
    pub fn fail_after(&self, steps: usize) {
        let mut world = self.world();
        world.fail_at = Some(world.steps.len() + steps);
    }

    /// Lets the daemon die after so many more steps.
    pub fn die_after(&self, steps: usize) {
        let mut world = self.world();
        world.dead_from = Some(world.steps.len() + steps);
    }

    /// Takes the steps noted so far.
    pub fn take_steps(&self) -> Vec<String> {
        let mut world = self.world();
        (world.fail_at, world.dead_from) = (None, None);
        std::mem::take(&mut world.steps)
    }

    fn change<T>(
        &self,
        step: impl fmt::Display,
        change: impl FnOnce(&mut World) -> Result<T, KernelError>,
    ) -> Result<T, KernelError> {
        let mut world = self.world();
        let number = world.steps.len();
        let step = step.to_string();
        let refused = world.refuse.is_some_and(|words| step.starts_with(words));
        world.steps.push(step.clone());
        let dead = world.dead_from.is_some_and(|first| number >= first);
        if refused || dead || world.fail_at == Some(number) {
            return Err(KernelError::new(format!("step {number}, `{step}`, was told to fail")));
        }
        let result = change(&mut world);
        world.check();
        result
    }

    /// Reads what is not hidden.
    fn read<T>(&self, hidden: impl FnOnce(&World) -> bool, read: impl FnOnce(&World) -> T) -> Result<T, KernelError> {
        let world = self.world();
        if hidden(&world) {
            return Err(KernelError::new("reading back was told to fail"));
        }
        Ok(read(&world))
    }

    fn observe<T>(&self, read: impl FnOnce(&World) -> T) -> Result<T, KernelError> {
        self.read(|_| false, read)
    }
}

impl World {
    fn check(&mut self) {
        let guarded = self.datapath.as_ref().is_some_and(|datapath| datapath.egress && datapath.ingress);
        if self.link.as_ref().is_some_and(|link| link.up) && !guarded {
            self.violations.push(format!("after `{}` the link is up without programs", self.steps.join("`, `")));
        }
    }

    fn kind(&self) -> LinkKind {
        match self.backend {
            Backend::Kernel => LinkKind::WireGuard,
            Backend::Userspace => LinkKind::Tun,
        }
    }

    fn link(&mut self) -> Result<&mut LinkState, KernelError> {
        let kind = self.kind();
        match &mut self.link {
            Some(link) if link.kind == kind => Ok(link),
            Some(_) => Err(KernelError::new("the link is foreign")),
            None => Err(KernelError::new("there is no link")),
        }
    }

    fn device(&mut self) -> Result<&mut Device, KernelError> {
        self.link()?;
        self.device.as_mut().ok_or_else(|| KernelError::new("nothing serves the link"))
    }

    fn datapath(&mut self) -> Result<&mut DatapathState, KernelError> {
        self.datapath.as_mut().ok_or_else(|| KernelError::new("nothing is attached"))
    }
}

/// [`WireGuard`] of a [`FakeKernel`].
#[derive(Debug)]
pub struct FakeWireGuard(FakeKernel);

impl WireGuard for FakeWireGuard {
    fn backend(&self) -> Backend {
        self.0.world().backend
    }

    fn create(&mut self) -> Result<(), KernelError> {
        self.0.change("create", |world| {
            if world.link.is_none() {
                world.link = Some(LinkState {
                    index: 7,
                    kind: world.kind(),
                    up: false,
                    mtu: FRESH_MTU,
                    addresses: BTreeSet::new(),
                    routes: BTreeSet::new(),
                });
                world.device = (world.backend == Backend::Kernel).then(Device::default);
            }
            world.link().map(drop)
        })
    }

    fn serve(&mut self) -> Result<(), KernelError> {
        self.0.change("serve", |world| {
            world.link()?;
            world.device.get_or_insert_default();
            Ok(())
        })
    }

    fn observe(&mut self) -> Result<Option<Device>, KernelError> {
        self.0.read(|world| world.hide_device, |world| world.device.clone())
    }

    fn set_device(&mut self, key: &PrivateKey, listen_port: u16) -> Result<(), KernelError> {
        self.0.change(format_args!("set device {} {listen_port}", key.public()), |world| {
            let device = world.device()?;
            device.public_key = Some(key.public());
            device.listen_port = listen_port;
            Ok(())
        })
    }

    fn set_peer(&mut self, peer: &PeerConfig) -> Result<(), KernelError> {
        self.0.change(format_args!("set peer {}", peer.public_key), |world| {
            let device = world.device()?;
            // A prefix has one owner.
            for other in device.peers.values_mut() {
                other.allowed_ips.retain(|prefix| !peer.allowed_ips.contains(prefix));
            }
            let known = device.peers.entry(peer.public_key).or_insert_with(|| DevicePeer {
                endpoint: None,
                allowed_ips: BTreeSet::new(),
                persistent_keepalive: None,
                last_handshake: None,
                received_bytes: 0,
                sent_bytes: 0,
            });
            known.endpoint = peer.endpoint.or(known.endpoint);
            known.allowed_ips = peer.allowed_ips.clone();
            known.persistent_keepalive = peer.persistent_keepalive;
            Ok(())
        })
    }

    fn remove_peer(&mut self, peer: &PublicKey) -> Result<(), KernelError> {
        self.0.change(format_args!("remove peer {peer}"), |world| {
            world.device()?.peers.remove(peer);
            Ok(())
        })
    }

    fn destroy(&mut self) -> Result<(), KernelError> {
        self.0.change("destroy", |world| {
            if world.link.is_some() {
                world.link()?;
            }
            world.link = None;
            world.device = None;
            world.datapath = None;
            world.tables = None;
            Ok(())
        })
    }
}

/// [`Link`] of a [`FakeKernel`].
#[derive(Debug)]
pub struct FakeLink(FakeKernel);

impl FakeLink {
    fn edit(&self, step: impl fmt::Display, edit: impl FnOnce(&mut LinkState)) -> Result<(), KernelError> {
        self.0.change(step, |world| world.link().map(edit))
    }
}

impl Link for FakeLink {
    fn observe(&mut self) -> Result<Option<LinkState>, KernelError> {
        self.0.read(|world| world.hide_link, |world| world.link.clone())
    }

    fn set_mtu(&mut self, mtu: u32) -> Result<(), KernelError> {
        self.edit(format_args!("set mtu {mtu}"), |link| link.mtu = mtu)
    }

    fn set_up(&mut self, up: bool) -> Result<(), KernelError> {
        self.edit(if up { "up" } else { "down" }, |link| {
            link.up = up;
            if !up {
                // The kernel's way: routes go, and addresses of IPv6.
                link.routes.clear();
                link.addresses.retain(|address| matches!(address, IpNet::V4(_)));
            }
        })
    }

    fn add_address(&mut self, address: IpNet) -> Result<(), KernelError> {
        self.edit(format_args!("add address {address}"), |link| {
            link.addresses.insert(address);
        })
    }

    fn remove_address(&mut self, address: IpNet) -> Result<(), KernelError> {
        self.edit(format_args!("remove address {address}"), |link| {
            link.addresses.remove(&address);
        })
    }

    fn add_route(&mut self, prefix: IpNet) -> Result<(), KernelError> {
        self.0.change(format_args!("add route {prefix}"), |world| {
            let link = world.link()?;
            if !link.up {
                return Err(KernelError::new("the link is down, it takes no routes"));
            }
            link.routes.insert(prefix);
            Ok(())
        })
    }

    fn remove_route(&mut self, prefix: IpNet) -> Result<(), KernelError> {
        self.edit(format_args!("remove route {prefix}"), |link| {
            link.routes.remove(&prefix);
        })
    }

    fn barriers(&mut self) -> Result<BTreeSet<IpNet>, KernelError> {
        self.0.observe(|world| world.barriers.clone())
    }

    fn add_barrier(&mut self, prefix: IpNet) -> Result<(), KernelError> {
        self.0.change(format_args!("add barrier {prefix}"), |world| {
            world.barriers.insert(prefix);
            Ok(())
        })
    }

    fn remove_barrier(&mut self, prefix: IpNet) -> Result<(), KernelError> {
        self.0.change(format_args!("remove barrier {prefix}"), |world| {
            world.barriers.remove(&prefix);
            Ok(())
        })
    }
}

/// [`Datapath`] of a [`FakeKernel`].
#[derive(Debug)]
pub struct FakeDatapath(FakeKernel);

impl Datapath for FakeDatapath {
    fn attach(&mut self) -> Result<(), KernelError> {
        self.0.change("attach", |world| {
            world.link()?;
            let datapath = world.datapath.get_or_insert(DatapathState {
                attachment: AttachMethod::Tcx,
                egress: false,
                ingress: false,
                ahead: Vec::new(),
                generation: Generation::default(),
                revision: Revision::default(),
                early_drop: EarlyDrop::Off,
            });
            datapath.egress = true;
            datapath.ingress = true;
            datapath.ahead.clear();
            Ok(())
        })
    }

    fn observe(&mut self) -> Result<DatapathState, KernelError> {
        self.0.observe(|world| world.datapath.clone())?.ok_or_else(|| KernelError::new("nothing is attached"))
    }

    fn switch(&mut self, tables: &Tables) -> Result<Generation, KernelError> {
        let revision = tables.revision;
        self.0.change(format_args!("switch {revision}"), |world| {
            let datapath = world.datapath()?;
            datapath.generation.0 += 1;
            datapath.revision = revision;
            let generation = datapath.generation;
            world.tables = Some(tables.clone());
            Ok(generation)
        })
    }

    fn forget_flows(&mut self, addresses: &[IpNet]) -> Result<usize, KernelError> {
        self.0.change(format_args!("forget flows {addresses:?}"), |world| {
            let before = world.flows.len();
            let held = |end: &IpAddr| addresses.iter().any(|prefix| prefix.contains(end));
            world.flows.retain(|(source, destination)| !held(source) && !held(destination));
            Ok(before - world.flows.len())
        })
    }

    fn collect_flows(&mut self) -> Result<usize, KernelError> {
        self.0.change("collect flows", |_| Ok(0))
    }

    fn detach(&mut self) -> Result<(), KernelError> {
        self.0.change("detach", |world| {
            world.datapath = None;
            world.tables = None;
            Ok(())
        })
    }
}

impl Inspect for FakeDatapath {
    fn counters(&mut self, slots: &[u32]) -> Result<Counters, KernelError> {
        let mut counters = self.0.observe(|world| world.counters.clone())?;
        counters.rules.retain(|slot, _| slots.contains(slot));
        Ok(counters)
    }

    fn read_tables(&mut self) -> Result<Tables, KernelError> {
        self.0.observe(|world| world.tables.clone())?.ok_or_else(|| KernelError::new("no policy is loaded"))
    }

    fn probe(&mut self, flow: &Flow, direction: u32) -> Result<Probed, KernelError> {
        let outcome = self.read_tables()?.verdict(flow, direction);
        Ok(Probed { passes: outcome.passes, reason: outcome.reason, rule: outcome.rule })
    }

    fn flow_records(&mut self) -> Result<usize, KernelError> {
        self.0.observe(|world| world.flows.len())
    }

    fn list_flows(&mut self) -> Result<Vec<(FlowKey, Record)>, KernelError> {
        let key = |(source, destination): &(IpAddr, IpAddr)| FlowKey {
            source: (*source).into(),
            destination: (*destination).into(),
            ..FlowKey::default()
        };
        self.0.observe(|world| world.flows.iter().map(|ends| (key(ends), Record::default())).collect())
    }

    fn programs(&mut self) -> Result<Vec<Program>, KernelError> {
        self.0.observe(|world| world.programs.clone())
    }

    fn reset_rules(&mut self, slots: &[u32]) -> Result<(), KernelError> {
        self.0.change(format_args!("reset rules {slots:?}"), |world| {
            world.counters.rules.retain(|slot, _| !slots.contains(slot));
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> PublicKey {
        PublicKey::try_from([byte; 32].as_slice()).unwrap()
    }

    fn peer(byte: u8, prefixes: &[&str]) -> PeerConfig {
        PeerConfig {
            public_key: key(byte),
            endpoint: None,
            allowed_ips: prefixes.iter().map(|prefix| prefix.parse().unwrap()).collect(),
            persistent_keepalive: None,
        }
    }

    #[test]
    fn step_that_fails_changes_nothing_and_the_next_goes_on() {
        let kernel = FakeKernel::new(Backend::Userspace);
        kernel.fail_after(1);
        kernel.wireguard().create().unwrap();
        kernel.wireguard().serve().unwrap_err();
        assert_eq!(kernel.wireguard().observe().unwrap(), None);
        kernel.wireguard().serve().unwrap();
        assert_eq!(kernel.wireguard().observe().unwrap(), Some(Device::default()));
        assert_eq!(kernel.take_steps(), ["create", "serve", "serve"]);
    }

    #[test]
    fn link_that_is_up_without_programs_is_noted() {
        let kernel = FakeKernel::new(Backend::Kernel);
        kernel.wireguard().create().unwrap();
        kernel.datapath().attach().unwrap();
        kernel.link().set_up(true).unwrap();
        assert_eq!(kernel.world().violations, [""; 0]);
        kernel.datapath().detach().unwrap();
        assert_eq!(kernel.world().violations.len(), 1);
    }

    #[test]
    fn prefix_has_one_owner() {
        let kernel = FakeKernel::new(Backend::Kernel);
        let mut wireguard = kernel.wireguard();
        wireguard.create().unwrap();
        wireguard.set_peer(&peer(1, &["10.0.0.1/32", "10.0.0.2/32"])).unwrap();
        wireguard.set_peer(&peer(2, &["10.0.0.2/32"])).unwrap();
        let device = wireguard.observe().unwrap().unwrap();
        assert_eq!(device.peers[&key(1)].allowed_ips, peer(1, &["10.0.0.1/32"]).allowed_ips);
    }

    #[test]
    fn foreign_link_is_refused_and_left() {
        let kernel = FakeKernel::new(Backend::Kernel);
        kernel.wireguard().create().unwrap();
        kernel.world().link.as_mut().unwrap().kind = LinkKind::Foreign;
        kernel.wireguard().create().unwrap_err();
        kernel.wireguard().destroy().unwrap_err();
        kernel.link().set_up(true).unwrap_err();
        assert!(kernel.world().link.is_some());
    }
}
