//! What must be done, in which order. Pure: no clock, no kernel, no memory.
//!
//! The order is the policy's (docs/POLICY.md, section 3): what was withdrawn goes first, then the tables switch, then what
//! is new comes. So no packet is ever carried under an identity that the tables in force do not mean, and an address that
//! moves from one peer to another has no holder in between: neither of the two, nor a peer with a shorter prefix around it.
//! Deny-all is attached before the link comes up, and what is no part of the policy waits until the tables have switched.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::IpNet;
use policy::{PublicKey, Revision};

use super::holders::{self, Holders};
use crate::kernel::{Attachment, DatapathState, Device, DevicePeer, LinkKind, LinkState, PeerConfig, Program};

/// What the interface should be while a policy is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Desired {
    /// Belongs to the private key that `apply` sets.
    pub public_key: PublicKey,
    pub listen_port: u16,
    pub mtu: u32,
    pub addresses: BTreeSet<IpNet>,
    pub routes: BTreeSet<IpNet>,
    pub peers: BTreeMap<PublicKey, PeerConfig>,
    pub revision: Revision,
    /// Load the tables even if the kernel claims to have this revision.
    pub reload: bool,
    /// Peers whose endpoint is news: it replaces what WireGuard learned. Other peers' endpoints only fill a gap.
    pub fresh_endpoints: BTreeSet<PublicKey>,
    /// Addresses that changed holder since the policy in force.
    pub changed_holder: Vec<IpNet>,
}

/// What the kernel says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    pub link: Option<LinkState>,
    pub device: Option<Device>,
    /// Why the link, if that is `None`, or the device could not be read. Nothing is planned about what was not seen.
    pub unseen: Option<String>,
    /// `None`: there is no link to attach to, or nothing of ours is attached.
    pub datapath: Option<DatapathState>,
    /// Prefixes that are unreachable without the link.
    pub barriers: BTreeSet<IpNet>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    AddBarrier(IpNet),
    CreateLink,
    AttachDatapath,
    /// Ours goes ahead of these.
    Overtake(Vec<Program>),
    RemovePeer(PublicKey),
    /// The peer with only those of its allowed-ips that it keeps.
    NarrowPeer(PeerConfig),
    SwitchTables(Revision),
    ForgetFlows(Vec<IpNet>),
    ServeWireGuard,
    SetDevice {
        listen_port: u16,
    },
    SetMtu(u32),
    RemoveRoute(IpNet),
    RemoveAddress(IpNet),
    RemoveBarrier(IpNet),
    AddAddress(IpNet),
    SetUp,
    SetPeer(PeerConfig),
    AddRoute(IpNet),
}

impl Step {
    /// Every word of [`Step::kind`].
    pub const KINDS: [&'static str; 11] =
        ["link", "attachment", "order", "process", "device", "mtu", "peer", "route", "address", "tables", "flows"];

    /// Whether this step, later in the same round, is not to be taken after `failed`.
    ///
    /// Nothing goes on without the programs. Otherwise the tables switch whatever failed before: they may deny what was
    /// allowed. But no peer comes while one that should have gone may still be there, or under the old tables, or to an
    /// address whose flows are another's; and not around a prefix of a peer that could not be set.
    pub fn waits_for(&self, failed: &Self) -> bool {
        match failed {
            Self::CreateLink | Self::AttachDatapath | Self::Overtake(_) | Self::SwitchTables(_) => true,
            Self::RemovePeer(_) | Self::NarrowPeer(_) | Self::ForgetFlows(_) => matches!(self, Self::SetPeer(_)),
            Self::ServeWireGuard => matches!(self, Self::SetDevice { .. } | Self::SetPeer(_)),
            Self::SetPeer(inner) => matches!(self, Self::SetPeer(outer) if is_around(outer, inner)),
            Self::AddBarrier(_)
            | Self::RemoveBarrier(_)
            | Self::SetDevice { .. }
            | Self::SetMtu(_)
            | Self::RemoveRoute(_)
            | Self::RemoveAddress(_)
            | Self::AddAddress(_)
            | Self::SetUp
            | Self::AddRoute(_) => false,
        }
    }

    /// One word for the metric of repairs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::CreateLink | Self::SetUp => "link",
            Self::AttachDatapath => "attachment",
            Self::Overtake(_) => "order",
            Self::ServeWireGuard => "process",
            Self::SetDevice { .. } => "device",
            Self::SetMtu(_) => "mtu",
            Self::RemovePeer(_) | Self::NarrowPeer(_) | Self::SetPeer(_) => "peer",
            Self::RemoveRoute(_) | Self::AddRoute(_) | Self::AddBarrier(_) | Self::RemoveBarrier(_) => "route",
            Self::RemoveAddress(_) | Self::AddAddress(_) => "address",
            Self::SwitchTables(_) => "tables",
            Self::ForgetFlows(_) => "flows",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddBarrier(prefix) => write!(f, "add unreachable route {prefix}"),
            Self::RemoveBarrier(prefix) => write!(f, "remove unreachable route {prefix}"),
            Self::CreateLink => f.write_str("create the link"),
            Self::AttachDatapath => f.write_str("attach the datapath"),
            Self::Overtake(programs) => {
                let programs: Vec<_> = programs.iter().map(Program::to_string).collect();
                write!(f, "put the datapath ahead of {}", programs.join(" and "))
            }
            Self::ServeWireGuard => f.write_str("serve the device"),
            Self::SetDevice { listen_port } => write!(f, "set the key and listen on port {listen_port}"),
            Self::SetMtu(mtu) => write!(f, "set the mtu to {mtu}"),
            Self::RemovePeer(key) => write!(f, "remove peer {key}"),
            Self::NarrowPeer(peer) => write!(f, "narrow peer {} to {}", peer.public_key, list(&peer.allowed_ips)),
            Self::RemoveRoute(prefix) => write!(f, "remove route {prefix}"),
            Self::RemoveAddress(address) => write!(f, "remove address {address}"),
            Self::SwitchTables(revision) => write!(f, "switch the tables to revision {revision}"),
            Self::ForgetFlows(addresses) => write!(f, "forget flows of {}", list(addresses)),
            Self::AddAddress(address) => write!(f, "add address {address}"),
            Self::SetUp => f.write_str("set the link up"),
            Self::SetPeer(peer) => write!(f, "set peer {} with {}", peer.public_key, list(&peer.allowed_ips)),
            Self::AddRoute(prefix) => write!(f, "add route {prefix}"),
        }
    }
}

fn list<'a>(prefixes: impl IntoIterator<Item = &'a IpNet>) -> String {
    let list: Vec<_> = prefixes.into_iter().map(IpNet::to_string).collect();
    if list.is_empty() { "nothing".to_owned() } else { list.join(" ") }
}

/// Whether a prefix of one peer contains a longer one of another.
fn is_around(outer: &PeerConfig, inner: &PeerConfig) -> bool {
    let longer = |prefix: &IpNet| inner.allowed_ips.iter().any(|inner| inner != prefix && prefix.contains(inner));
    outer.allowed_ips.iter().any(longer)
}

/// The steps from `observed` to `desired`. Without a policy (`None`) only an attached datapath is asked for: what the
/// kernel enforces already stays, and a new link denies everything and stays down.
pub fn plan(desired: Option<&Desired>, observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    let link_seen = observed.link.is_some() || observed.unseen.is_none();
    if let Some(desired) = desired.filter(|_| link_seen) {
        steps.extend(desired.routes.difference(&observed.barriers).copied().map(Step::AddBarrier));
    }
    // `create` refuses a foreign link and says so.
    if link_seen && observed.link.as_ref().is_none_or(|link| link.kind == LinkKind::Foreign) {
        steps.push(Step::CreateLink);
    }
    steps.extend(attachments(observed.datapath.as_ref()));
    let serve = (observed.device.is_none() && observed.unseen.is_none()).then_some(Step::ServeWireGuard);
    let Some(desired) = desired else {
        steps.extend(serve);
        return steps;
    };
    let seen = observed.device.as_ref().map(|device| device.peers.clone()).unwrap_or_default();
    let peers = observed.unseen.is_none().then(|| Peers::new(&desired.peers, &desired.fresh_endpoints, seen));
    steps.extend(peers.iter().flat_map(Peers::withdraw));
    if desired.reload || observed.datapath.as_ref().is_none_or(|datapath| datapath.revision != desired.revision) {
        steps.push(Step::SwitchTables(desired.revision));
    }
    if !desired.changed_holder.is_empty() {
        steps.push(Step::ForgetFlows(desired.changed_holder.clone()));
    }
    steps.extend(serve);
    if peers.is_some() && !has_device(desired, observed.device.as_ref()) {
        steps.push(Step::SetDevice { listen_port: desired.listen_port });
    }
    if link_seen {
        trim(&mut steps, desired, observed);
    }
    steps.extend(peers.iter().flat_map(Peers::extend));
    if link_seen {
        add_routes(&mut steps, desired, observed.link.as_ref());
    }
    steps
}

/// What a change asks of the peers that it touches, none of which has a prefix around or inside one of another peer.
#[derive(Clone, Debug, Default)]
pub struct PeerChange {
    pub wanted: BTreeMap<PublicKey, PeerConfig>,
    /// As they are, as far as anybody knows.
    pub present: BTreeMap<PublicKey, DevicePeer>,
    pub fresh_endpoints: BTreeSet<PublicKey>,
    pub changed_holder: Vec<IpNet>,
    /// `None`: the tables say what they should.
    pub switch: Option<Revision>,
}

/// The steps of a change, in the order in which [`plan`] has them; peers that it does not touch, and the rest of the
/// interface, are left alone.
pub fn plan_change(change: &PeerChange) -> Vec<Step> {
    let peers = Peers::new(&change.wanted, &change.fresh_endpoints, change.present.clone());
    let mut steps = peers.withdraw();
    steps.extend(change.switch.map(Step::SwitchTables));
    if !change.changed_holder.is_empty() {
        steps.push(Step::ForgetFlows(change.changed_holder.clone()));
    }
    steps.extend(peers.extend());
    steps
}

/// The programs where they belong: first, at both hooks.
fn attachments(datapath: Option<&DatapathState>) -> Vec<Step> {
    let Some(DatapathState { egress, ingress, ahead, .. }) = datapath else { return vec![Step::AttachDatapath] };
    let overtaken = |at| ahead.iter().any(|program| program.attachment == at);
    let missing = |there: bool, at| !there && !overtaken(at);
    let mut steps = Vec::new();
    if missing(*egress, Attachment::Egress) || missing(*ingress, Attachment::Ingress) {
        steps.push(Step::AttachDatapath);
    }
    if !ahead.is_empty() {
        steps.push(Step::Overtake(ahead.clone()));
    }
    steps
}

fn has_device(desired: &Desired, device: Option<&Device>) -> bool {
    device.is_some_and(|device| {
        device.public_key == Some(desired.public_key) && device.listen_port == desired.listen_port
    })
}

/// The link as it should be, but for its routes, which want peers first.
fn trim(steps: &mut Vec<Step>, desired: &Desired, observed: &Observed) {
    let link = observed.link.as_ref();
    if link.is_none_or(|link| link.mtu != desired.mtu) {
        steps.push(Step::SetMtu(desired.mtu));
    }
    let none = BTreeSet::new();
    let (addresses, routes) = link.map_or((&none, &none), |link| (&link.addresses, &link.routes));
    steps.extend(routes.difference(&desired.routes).copied().map(Step::RemoveRoute));
    steps.extend(addresses.difference(&desired.addresses).copied().map(Step::RemoveAddress));
    steps.extend(observed.barriers.difference(&desired.routes).copied().map(Step::RemoveBarrier));
    steps.extend(desired.addresses.difference(addresses).copied().map(Step::AddAddress));
    if !link.is_some_and(|link| link.up) {
        steps.push(Step::SetUp);
    }
}

fn add_routes(steps: &mut Vec<Step>, desired: &Desired, link: Option<&LinkState>) {
    // The kernel drops an interface's IPv4 routes when its last address goes.
    let lost = link.is_none_or(|link| link.addresses.is_disjoint(&desired.addresses));
    let there = |route: &IpNet| !lost && link.is_some_and(|link| link.routes.contains(route));
    steps.extend(desired.routes.iter().filter(|route| !there(route)).copied().map(Step::AddRoute));
}

/// Peers as they should be and as they are.
struct Peers<'a> {
    wanted: &'a BTreeMap<PublicKey, PeerConfig>,
    fresh_endpoints: &'a BTreeSet<PublicKey>,
    observed: BTreeMap<PublicKey, DevicePeer>,
    /// Prefixes that go before anything in them does, and come after it.
    around_changes: BTreeSet<IpNet>,
}

impl<'a> Peers<'a> {
    fn new(
        wanted: &'a BTreeMap<PublicKey, PeerConfig>,
        fresh_endpoints: &'a BTreeSet<PublicKey>,
        observed: BTreeMap<PublicKey, DevicePeer>,
    ) -> Self {
        let seen = observed.iter().flat_map(|(key, peer)| peer.allowed_ips.iter().map(|prefix| (*prefix, *key)));
        let around_changes = holders::around_changes(&seen.collect(), &wanted_holders(wanted));
        Self { wanted, fresh_endpoints, observed, around_changes }
    }

    /// What comes before the switch.
    fn withdraw(&self) -> Vec<Step> {
        let (mut first, mut then) = (Vec::new(), Vec::new());
        for (key, peer) in &self.observed {
            let narrowed = |allowed_ips| PeerConfig {
                public_key: *key,
                endpoint: None,
                allowed_ips,
                persistent_keepalive: self
                    .wanted
                    .get(key)
                    .map_or(peer.persistent_keepalive, |peer| peer.persistent_keepalive),
            };
            let mut left = peer.allowed_ips.clone();
            left.retain(|prefix| !self.around_changes.contains(prefix));
            if left != peer.allowed_ips {
                first.push(Step::NarrowPeer(narrowed(left.clone())));
            }
            match self.wanted.get(key) {
                None => then.push(Step::RemovePeer(*key)),
                Some(wanted) if left.is_subset(&wanted.allowed_ips) => {}
                Some(wanted) => then.push(Step::NarrowPeer(narrowed(&left & &wanted.allowed_ips))),
            }
        }
        first.extend(then);
        first
    }

    /// What comes after it: a prefix around another peer's comes when that is there, the longest first.
    fn extend(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let around_others = holders::around_others(&wanted_holders(self.wanted));
        let mut late = Vec::new();
        for (key, wanted) in self.wanted {
            // As it is by now.
            let observed = self.observed.get(key).cloned().map(|mut peer| {
                peer.allowed_ips
                    .retain(|prefix| wanted.allowed_ips.contains(prefix) && !self.around_changes.contains(prefix));
                peer
            });
            let mut early = wanted.clone();
            early.allowed_ips.retain(|prefix| {
                let is_late = around_others.contains(prefix)
                    && !observed.as_ref().is_some_and(|peer| peer.allowed_ips.contains(prefix));
                if is_late {
                    late.push((std::cmp::Reverse(prefix.prefix_len()), *prefix, *key));
                }
                !is_late
            });
            let fresh_endpoint = self.fresh_endpoints.contains(key);
            steps.extend(peer_change(&early, observed.as_ref(), fresh_endpoint).map(Step::SetPeer));
        }
        late.sort_unstable();
        let mut later: BTreeSet<_> = late.iter().map(|(_, prefix, _)| *prefix).collect();
        for (_, prefix, key) in late {
            later.remove(&prefix);
            let mut peer = PeerConfig { endpoint: None, ..self.wanted[&key].clone() };
            peer.allowed_ips.retain(|prefix| !later.contains(prefix));
            steps.push(Step::SetPeer(peer));
        }
        steps
    }
}

fn wanted_holders(wanted: &BTreeMap<PublicKey, PeerConfig>) -> Holders {
    let prefixes = |(key, peer): (&PublicKey, &PeerConfig)| {
        let key = *key;
        peer.allowed_ips.iter().map(move |prefix| (*prefix, key)).collect::<Vec<_>>()
    };
    wanted.iter().flat_map(prefixes).collect()
}

/// The peer as it must be set, or `None` if it is already right. WireGuard may have learned a better endpoint than the one
/// that we were told: it is only replaced by news.
fn peer_change(wanted: &PeerConfig, observed: Option<&DevicePeer>, fresh_endpoint: bool) -> Option<PeerConfig> {
    let Some(observed) = observed else { return Some(wanted.clone()) };
    let endpoint = wanted.endpoint.filter(|endpoint| match observed.endpoint {
        None => true,
        Some(learned) => fresh_endpoint && learned != *endpoint,
    });
    let same =
        observed.allowed_ips == wanted.allowed_ips && observed.persistent_keepalive == wanted.persistent_keepalive;
    (!same || endpoint.is_some()).then(|| PeerConfig { endpoint, ..wanted.clone() })
}

#[cfg(test)]
mod tests;
