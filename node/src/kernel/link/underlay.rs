//! What the guard on the underlay asks of the network: where the default routes lead, and which addresses are ours.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};

use super::address_of;
use super::netlink::{Netlink, is};
use crate::kernel::KernelError;

impl Netlink {
    /// The interfaces of the main table's default routes.
    pub(crate) fn default_interfaces(&self) -> Result<BTreeSet<String>, KernelError> {
        let failed = |error| KernelError::with("failed to list the default routes", error);
        let mut indices = BTreeSet::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            message.header.kind = RouteType::Unicast;
            match self.wait(self.handle.route().get(message).execute().try_collect::<Vec<_>>()) {
                Ok(messages) => indices.extend(messages.iter().flat_map(default_ways)),
                // No table yet, or no such family.
                Err(error) if is(&error, &[libc::ENOENT, libc::EAFNOSUPPORT, libc::EOPNOTSUPP]) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let mut names = BTreeSet::new();
        for index in indices {
            match self.wait(self.handle.link().get().match_index(index).execute().try_collect::<Vec<_>>()) {
                Ok(messages) => {
                    names.extend(messages.into_iter().flat_map(|message| message.attributes).find_map(|attribute| {
                        match attribute {
                            LinkAttribute::IfName(name) => Some(name),
                            _ => None,
                        }
                    }))
                }
                // Gone since.
                Err(error) if is(&error, &[libc::ENODEV, libc::ENOENT]) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(names)
    }

    /// Every address at which this machine is spoken to, the broadcasts included that a socket of everybody's hears too.
    pub(crate) fn own_addresses(&self) -> Result<BTreeSet<IpAddr>, KernelError> {
        let messages: Vec<_> = self
            .wait(self.handle.address().get().execute().try_collect())
            .map_err(|error| KernelError::with("failed to list this machine's addresses", error))?;
        let mut addresses: BTreeSet<IpAddr> = messages
            .iter()
            .filter_map(address_of)
            .flat_map(|address| {
                let broadcast = match address {
                    IpNet::V4(net) if net.prefix_len() < 31 => Some(IpAddr::V4(net.broadcast())),
                    _ => None,
                };
                broadcast.into_iter().chain([address.addr()])
            })
            .collect();
        // All hosts on the link.
        addresses.extend([IpAddr::V4(Ipv4Addr::BROADCAST), IpAddr::V4(Ipv4Addr::new(224, 0, 0, 1))]);
        addresses.insert(IpAddr::V6("ff02::1".parse().expect("an address")));
        Ok(addresses)
    }
}

/// The interfaces by which a default route leads; none: it is another route.
fn default_ways(message: &RouteMessage) -> Vec<u32> {
    let header = &message.header;
    let is_default = header.destination_prefix_length == 0
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast;
    let ways = message.attributes.iter().filter(|_| is_default).flat_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(ways) => ways.iter().map(|way| way.interface_index).collect(),
        _ => Vec::new(),
    });
    ways.collect()
}
