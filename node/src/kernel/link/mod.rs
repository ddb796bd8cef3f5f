//! The interface's addresses, routes, MTU and state, by rtnetlink.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::{AddressMessageBuilder, LinkUnspec, RouteMessageBuilder};

use self::netlink::{FoundLink, Netlink, is};
use super::{KernelError, Link, LinkKind, LinkState};

pub(crate) mod netlink;
mod underlay;

/// Our number among routing protocols (`proto 117` in `ip route`). Neither the kernel's `rtnetlink.h` nor iproute2's
/// `rt_protos` assigns it, so routes that have it are ours to remove.
pub const ROUTE_PROTOCOL: u8 = 117;

/// The alias by which our links are known (`ip link show` prints it). Only links that have it are touched.
pub const OWNER: &str = "managed by rampart";

/// Metric of our IPv6 routes: the kernel's would be 1024, and whoever adds an equal route with a lower one would get the
/// packets. (For IPv4 it is 0, which none is below.)
const METRIC_V6: u32 = 1;

/// Bytes of an interface's name, as the kernel limits it (IFNAMSIZ less its NUL).
const NAME_LENGTH: usize = 15;

/// [`Link`] by rtnetlink, in the network namespace of the thread that made it.
#[derive(Debug)]
pub struct NetlinkLink {
    name: String,
    netlink: Netlink,
}

impl NetlinkLink {
    /// Opens a netlink socket; the interface need not exist.
    pub fn new(interface: &str) -> Result<Self, KernelError> {
        check_name(interface)?;
        Ok(Self { name: interface.to_owned(), netlink: Netlink::new()? })
    }

    /// Our link, or why there is none to change.
    fn ours(&self) -> Result<FoundLink, KernelError> {
        match self.netlink.find_link(&self.name)? {
            Some(link) if link.ours => Ok(link),
            Some(link) => Err(KernelError::new(format!(
                "interface `{}` is of kind `{}` and not Rampart's; choose another with `noded run --interface NAME`",
                self.name, link.kind_name
            ))),
            None => Err(KernelError::new(format!("there is no interface `{}`", self.name))),
        }
    }

    /// The barriers of this interface, and not of another's `noded`: known by their metric, which comes from the name and
    /// is above any that somebody would choose.
    fn nowhere(&self) -> Way {
        const ABOVE_OTHERS: u32 = 1 << 31;
        // FNV-1a.
        let hash = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        Way::Nowhere { metric: self.name.bytes().fold(0x811c_9dc5, hash) | ABOVE_OTHERS }
    }

    fn error(&self, what: impl std::fmt::Display, error: io::Error) -> KernelError {
        KernelError::with(format!("failed to {what} on `{}`", self.name), error)
    }

    fn addresses(&self, index: u32) -> io::Result<BTreeSet<IpNet>> {
        let mut request = self.netlink.handle.address().get().set_link_index_filter(index);
        request.message_mut().header.index = index;
        let messages: Vec<_> = self.netlink.wait(request.execute().try_collect())?;
        Ok(messages.iter().filter_map(address_of).filter(|address| !is_link_local(address)).collect())
    }

    fn routes(&self, way: Way) -> io::Result<BTreeSet<IpNet>> {
        let mut routes = BTreeSet::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
            message.header.kind = way.kind();
            if let Way::Link(index) = way {
                message.attributes.push(RouteAttribute::Oif(index));
            }
            let answer = self.netlink.handle.route().get(message).execute().try_collect::<Vec<_>>();
            match self.netlink.wait(answer) {
                Ok(messages) => routes.extend(messages.iter().filter_map(|message| way.of(message))),
                // No table yet, or no such family.
                Err(error) if is(&error, &[libc::ENOENT, libc::EAFNOSUPPORT, libc::EOPNOTSUPP]) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(routes)
    }
}

impl Link for NetlinkLink {
    fn observe(&mut self) -> Result<Option<LinkState>, KernelError> {
        let Some(link) = self.netlink.find_link(&self.name)? else { return Ok(None) };
        let kind = if link.ours { link.kind } else { LinkKind::Foreign };
        Ok(Some(LinkState {
            index: link.index,
            kind,
            up: link.up,
            mtu: link.mtu,
            addresses: self.addresses(link.index).map_err(|error| self.error("list addresses", error))?,
            routes: self.routes(Way::Link(link.index)).map_err(|error| self.error("list routes", error))?,
        }))
    }

    fn set_mtu(&mut self, mtu: u32) -> Result<(), KernelError> {
        let link = self.ours()?;
        self.netlink
            .set_link(LinkUnspec::new_with_index(link.index).mtu(mtu).build())
            .map_err(|error| self.error(format_args!("set the MTU to {mtu}"), error))
    }

    fn set_up(&mut self, up: bool) -> Result<(), KernelError> {
        let message = LinkUnspec::new_with_index(self.ours()?.index);
        let (message, what) =
            if up { (message.up(), "bring the link up") } else { (message.down(), "take the link down") };
        self.netlink.set_link(message.build()).map_err(|error| self.error(what, error))
    }

    fn add_address(&mut self, address: IpNet) -> Result<(), KernelError> {
        let mut request = self.netlink.handle.address().add(self.ours()?.index, address.addr(), address.prefix_len());
        // What is reached through the link is said by routes, not by the address's prefix; and there is nobody on the
        // link to ask whether an address is taken.
        let flags = match address {
            IpNet::V4(_) => AddressFlags::Noprefixroute,
            IpNet::V6(_) => AddressFlags::Noprefixroute | AddressFlags::Nodad,
        };
        let attributes = &mut request.message_mut().attributes;
        attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_)));
        attributes.push(AddressAttribute::Flags(flags));
        match self.netlink.wait(request.execute()) {
            Err(error) if is(&error, &[libc::EEXIST]) => Ok(()),
            other => other.map_err(|error| self.error(format_args!("add address `{address}`"), error)),
        }
    }

    fn remove_address(&mut self, address: IpNet) -> Result<(), KernelError> {
        let request = self.netlink.handle.address().del(address_message(self.ours()?.index, address));
        match self.netlink.wait(request.execute()) {
            Err(error) if is(&error, &[libc::EADDRNOTAVAIL]) => Ok(()),
            other => other.map_err(|error| self.error(format_args!("remove address `{address}`"), error)),
        }
    }

    fn add_route(&mut self, prefix: IpNet) -> Result<(), KernelError> {
        let way = Way::Link(self.ours()?.index);
        let request = self.netlink.handle.route().add(way.message(prefix));
        match self.netlink.wait(request.execute()) {
            Ok(()) => Ok(()),
            Err(error) if is(&error, &[libc::EEXIST]) => match self.routes(way) {
                Ok(routes) if routes.contains(&prefix.trunc()) => Ok(()),
                Ok(_) => Err(KernelError::new(format!(
                    "route `{prefix}` is there already and not Rampart's, so packets would pass by `{}`; remove it \
                     with `ip route delete {prefix}`",
                    self.name
                ))),
                Err(error) => Err(self.error("list routes", error)),
            },
            Err(error) => Err(self.error(format_args!("add route `{prefix}`"), error)),
        }
    }

    fn remove_route(&mut self, prefix: IpNet) -> Result<(), KernelError> {
        let request = self.netlink.handle.route().del(Way::Link(self.ours()?.index).message(prefix));
        match self.netlink.wait(request.execute()) {
            Err(error) if is(&error, &[libc::ESRCH]) => Ok(()),
            other => other.map_err(|error| self.error(format_args!("remove route `{prefix}`"), error)),
        }
    }

    fn barriers(&mut self) -> Result<BTreeSet<IpNet>, KernelError> {
        self.routes(self.nowhere()).map_err(|error| {
            KernelError::with(format!("failed to list the unreachable routes of `{}`", self.name), error)
        })
    }

    fn add_barrier(&mut self, prefix: IpNet) -> Result<(), KernelError> {
        let request = self.netlink.handle.route().add(self.nowhere().message(prefix));
        match self.netlink.wait(request.execute()) {
            Err(error) if is(&error, &[libc::EEXIST]) => Ok(()),
            other => other.map_err(|error| KernelError::with(format!("failed to make `{prefix}` unreachable"), error)),
        }
    }

    fn remove_barrier(&mut self, prefix: IpNet) -> Result<(), KernelError> {
        let request = self.netlink.handle.route().del(self.nowhere().message(prefix));
        match self.netlink.wait(request.execute()) {
            Err(error) if is(&error, &[libc::ESRCH]) => Ok(()),
            other => other.map_err(|error| {
                KernelError::with(format!("failed to remove the unreachable route `{prefix}`"), error)
            }),
        }
    }
}

/// Refuses what the kernel, or a path made of the name, would not take.
pub(crate) fn check_name(interface: &str) -> Result<(), KernelError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let reason = if interface.is_empty() {
        "is empty"
    } else if interface.len() > NAME_LENGTH {
        "is longer than 15 bytes"
    } else if !interface.bytes().all(allowed) {
        "has other characters than letters, digits, `-`, `_` and `.`"
    } else if matches!(interface, "." | ".." | "all" | "default") {
        "is reserved"
    } else {
        return Ok(());
    };
    Err(KernelError::new(format!("interface name `{interface}` {reason}; take one like `rampart0`")))
}

fn is_link_local(address: &IpNet) -> bool {
    match address.addr() {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    match address {
        IpNet::V4(net) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(net.addr(), net.prefix_len()).build()
        }
        IpNet::V6(net) => {
            AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(net.addr(), net.prefix_len()).build()
        }
    }
}

fn address_of(message: &AddressMessage) -> Option<IpNet> {
    // On a point-to-point link IFA_ADDRESS is the other end; IFA_LOCAL is ours wherever it is given.
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(given) if address.is_none() => address = Some(*given),
            _ => {}
        }
    }
    IpNet::new(address?, message.header.prefix_len).ok()
}

/// What becomes of packets for a route's prefix.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// They take the link of this index.
    Link(u32),
    /// Their sender hears at once that there is no way.
    Nowhere { metric: u32 },
}

impl Way {
    fn kind(self) -> RouteType {
        match self {
            Self::Link(_) => RouteType::Unicast,
            Self::Nowhere { .. } => RouteType::Unreachable,
        }
    }

    fn metric(self, family: AddressFamily) -> u32 {
        match self {
            Self::Link(_) if family == AddressFamily::Inet => 0,
            Self::Link(_) => METRIC_V6,
            Self::Nowhere { metric } => metric,
        }
    }

    /// The route to add or to remove.
    fn message(self, prefix: IpNet) -> RouteMessage {
        let protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
        let mut message = match prefix.trunc() {
            IpNet::V4(net) => {
                let builder = RouteMessageBuilder::<Ipv4Addr>::new();
                builder.destination_prefix(net.addr(), net.prefix_len()).protocol(protocol).kind(self.kind()).build()
            }
            IpNet::V6(net) => {
                let builder = RouteMessageBuilder::<Ipv6Addr>::new();
                builder.destination_prefix(net.addr(), net.prefix_len()).protocol(protocol).kind(self.kind()).build()
            }
        };
        if let Self::Link(index) = self {
            message.attributes.push(RouteAttribute::Oif(index));
            if message.header.address_family == AddressFamily::Inet {
                message.header.scope = RouteScope::Link;
            }
        }
        let metric = self.metric(message.header.address_family);
        if metric != 0 {
            message.attributes.push(RouteAttribute::Priority(metric));
        }
        message
    }

    /// The route's prefix where it is ours and goes this way; filters again what a kernel without strict checks sends
    /// unfiltered.
    fn of(self, message: &RouteMessage) -> Option<IpNet> {
        let RouteMessage { header, attributes, .. } = message;
        let has = |attribute| attributes.contains(&attribute);
        let metric = match self.metric(header.address_family) {
            0 => !attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Priority(_))),
            metric => has(RouteAttribute::Priority(metric)),
        };
        let through = match self {
            Self::Link(index) => has(RouteAttribute::Oif(index)),
            Self::Nowhere { .. } => true,
        };
        let ours = header.table == RouteHeader::RT_TABLE_MAIN
            && header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL)
            && header.kind == self.kind();
        (metric && through && ours).then(|| destination(message)).flatten()
    }
}

fn destination(message: &RouteMessage) -> Option<IpNet> {
    let header = &message.header;
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    });
    // The default route has no destination.
    let destination = destination.unwrap_or(match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    });
    IpNet::new(destination, header.destination_prefix_length).ok()
}

#[cfg(test)]
mod tests;
