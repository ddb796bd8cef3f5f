//! What must be done, in which order. Pure: no clock, no kernel, no memory.
//!
//! The order is the policy's (SEMANTICS.md, section 3): what was withdrawn goes first, then the tables switch, then what
//! is new comes. So no packet is ever carried under an identity that the tables in force do not mean, and an address that
//! moves from one peer to another has no holder in between. Deny-all is attached before the link comes up.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::IpNet;
use policy::{PublicKey, Revision, Slice};

use crate::kernel::{DatapathState, Device, DevicePeer, LinkKind, LinkState, PeerConfig};

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
    /// `None`: there is no link to attach to, or nothing of ours is attached.
    pub datapath: Option<DatapathState>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    CreateLink,
    AttachDatapath,
    ServeWireGuard,
    SetDevice {
        listen_port: u16,
    },
    SetMtu(u32),
    RemovePeer(PublicKey),
    /// The peer with only those of its allowed-ips that it keeps.
    NarrowPeer(PeerConfig),
    RemoveRoute(IpNet),
    RemoveAddress(IpNet),
    SwitchTables(Revision),
    ForgetFlows(Vec<IpNet>),
    AddAddress(IpNet),
    SetUp,
    SetPeer(PeerConfig),
    AddRoute(IpNet),
}

impl Step {
    /// Every word of [`Step::kind`].
    pub const KINDS: [&'static str; 10] =
        ["link", "attachment", "process", "device", "mtu", "peer", "route", "address", "tables", "flows"];

    /// Whether the steps after this one may only be taken once this one is done: everything up to the switch, and
    /// forgetting the flows of addresses that are about to get another holder.
    pub fn gates(&self) -> bool {
        match self {
            Self::CreateLink
            | Self::AttachDatapath
            | Self::ServeWireGuard
            | Self::SetDevice { .. }
            | Self::SetMtu(_)
            | Self::RemovePeer(_)
            | Self::NarrowPeer(_)
            | Self::RemoveRoute(_)
            | Self::RemoveAddress(_)
            | Self::SwitchTables(_)
            | Self::ForgetFlows(_) => true,
            Self::AddAddress(_) | Self::SetUp | Self::SetPeer(_) | Self::AddRoute(_) => false,
        }
    }

    /// One word for the metric of repairs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::CreateLink | Self::SetUp => "link",
            Self::AttachDatapath => "attachment",
            Self::ServeWireGuard => "process",
            Self::SetDevice { .. } => "device",
            Self::SetMtu(_) => "mtu",
            Self::RemovePeer(_) | Self::NarrowPeer(_) | Self::SetPeer(_) => "peer",
            Self::RemoveRoute(_) | Self::AddRoute(_) => "route",
            Self::RemoveAddress(_) | Self::AddAddress(_) => "address",
            Self::SwitchTables(_) => "tables",
            Self::ForgetFlows(_) => "flows",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateLink => f.write_str("create the link"),
            Self::AttachDatapath => f.write_str("attach the datapath"),
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

/// The steps from `observed` to `desired`. Without a policy (`None`) only an attached datapath is asked for: what the
/// kernel enforces already stays, and a new link denies everything and stays down.
pub fn plan(desired: Option<&Desired>, observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    // `create` refuses a foreign link and says so.
    if observed.link.as_ref().is_none_or(|link| link.kind == LinkKind::Foreign) {
        steps.push(Step::CreateLink);
    }
    if !observed.datapath.as_ref().is_some_and(|datapath| datapath.egress && datapath.ingress) {
        steps.push(Step::AttachDatapath);
    }
    if observed.device.is_none() {
        steps.push(Step::ServeWireGuard);
    }
    let Some(desired) = desired else { return steps };

    let link = observed.link.as_ref();
    let nothing = Device::default();
    let device = observed.device.as_ref().unwrap_or(&nothing);
    withdraw(&mut steps, desired, link, device);
    if desired.reload || observed.datapath.as_ref().is_none_or(|datapath| datapath.revision != desired.revision) {
        steps.push(Step::SwitchTables(desired.revision));
    }
    if !desired.changed_holder.is_empty() {
        steps.push(Step::ForgetFlows(desired.changed_holder.clone()));
    }
    extend(&mut steps, desired, link, device);
    steps
}

/// What comes before the switch.
fn withdraw(steps: &mut Vec<Step>, desired: &Desired, link: Option<&LinkState>, device: &Device) {
    if device.public_key != Some(desired.public_key) || device.listen_port != desired.listen_port {
        steps.push(Step::SetDevice { listen_port: desired.listen_port });
    }
    if link.is_none_or(|link| link.mtu != desired.mtu) {
        steps.push(Step::SetMtu(desired.mtu));
    }
    for (key, peer) in &device.peers {
        match desired.peers.get(key) {
            None => steps.push(Step::RemovePeer(*key)),
            Some(wanted) => steps.extend(narrowed(wanted, peer).map(Step::NarrowPeer)),
        }
    }
    if let Some(link) = link {
        steps.extend(link.routes.difference(&desired.routes).copied().map(Step::RemoveRoute));
        steps.extend(link.addresses.difference(&desired.addresses).copied().map(Step::RemoveAddress));
    }
}

/// What comes after it.
fn extend(steps: &mut Vec<Step>, desired: &Desired, link: Option<&LinkState>, device: &Device) {
    let none = BTreeSet::new();
    let (addresses, routes) = link.map_or((&none, &none), |link| (&link.addresses, &link.routes));
    steps.extend(desired.addresses.difference(addresses).copied().map(Step::AddAddress));
    if !link.is_some_and(|link| link.up) {
        steps.push(Step::SetUp);
    }
    for (key, wanted) in &desired.peers {
        let observed = device.peers.get(key).cloned().map(|peer| match narrowed(wanted, &peer) {
            // As it is by now.
            Some(PeerConfig { allowed_ips, persistent_keepalive, .. }) => {
                DevicePeer { allowed_ips, persistent_keepalive, ..peer }
            }
            None => peer,
        });
        if let Some(peer) = peer_change(wanted, observed.as_ref(), desired.fresh_endpoints.contains(key)) {
            steps.push(Step::SetPeer(peer));
        }
    }
    // The kernel drops an interface's IPv4 routes when its last address goes.
    let lost = link.is_some_and(|link| link.addresses.is_disjoint(&desired.addresses));
    steps.extend(desired.routes.iter().filter(|route| lost || !routes.contains(route)).copied().map(Step::AddRoute));
}

/// The peer with only what it keeps, if it has allowed-ips to lose.
fn narrowed(wanted: &PeerConfig, observed: &DevicePeer) -> Option<PeerConfig> {
    if observed.allowed_ips.is_subset(&wanted.allowed_ips) {
        return None;
    }
    let allowed_ips = observed.allowed_ips.intersection(&wanted.allowed_ips).copied().collect();
    Some(PeerConfig { allowed_ips, endpoint: None, ..wanted.clone() })
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

/// Who holds an address: the peer's key, or the node's own.
pub type Holders = BTreeMap<IpNet, PublicKey>;

/// The holders that a slice names; `own` is this node's key.
pub fn holders(slice: &Slice, own: PublicKey) -> Holders {
    let peers = slice.peers.values().flat_map(|peer| peer.allowed_ips.iter().map(|prefix| (*prefix, peer.public_key)));
    let local = slice.local.addresses.iter().map(|address| (IpNet::from(address), own));
    peers.chain(local).chain(slice.local.gateway_for.iter().map(|prefix| (*prefix, own))).collect()
}

/// The prefixes that `new` gives to another holder than `old` remembers.
pub fn changed_holder(old: &Holders, new: &Holders) -> Vec<IpNet> {
    new.iter()
        .filter(|(prefix, key)| old.get(prefix).is_some_and(|old| old != *key))
        .map(|(prefix, _)| *prefix)
        .collect()
}

#[cfg(test)]
mod tests;
