//! Changes of nodes.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::{ChangeError, Kind, Named, Network};
use crate::limit::{self, Bounded};
use crate::object::cidr::Cidr;
use crate::object::id::{CidrName, GroupId, GroupName, NodeId, NodeName};
use crate::object::key::PublicKey;
use crate::object::node::{Node, NodeState};
use crate::object::prefix::{Addresses, outermost_below};
use crate::object::selector::{Hint, Selector};

impl Network {
    pub(super) fn add_node(
        &mut self,
        name: &NodeName,
        cidr: &CidrName,
        addresses: Option<Addresses>,
        groups: &[GroupName],
        gateway_for: &[CidrName],
    ) -> Result<(), ChangeError> {
        self.check_node_name_free(name)?;
        Bounded::Nodes.check(self.nodes.len() + 1, limit::MAX_NODES)?;
        let cidr = self.find_cidr(cidr)?;
        if cidr.external {
            return Err(ChangeError::NodeInExternal(cidr.name.clone()));
        }
        let addresses = match addresses {
            Some(addresses) => self.check_addresses_in(name, cidr, addresses)?,
            None => self.free_addresses(cidr)?,
        };
        let gateway_for =
            gateway_for.iter().map(|name| Ok(self.find_cidr(name)?.id)).collect::<Result<_, ChangeError>>()?;
        let groups = groups
            .iter()
            .map(|name| Ok(self.find_group(name)?.id))
            .collect::<Result<BTreeSet<GroupId>, ChangeError>>()?;
        for group in &groups {
            let group = &self.groups[group];
            Bounded::Members.check(group.nodes.len() + group.cidrs.len() + 1, limit::MAX_MEMBERS)?;
        }
        let (id, next_id) = self.fresh_id()?;
        let node = Node {
            id: NodeId(id),
            name: name.clone(),
            addresses,
            public_key: None,
            state: NodeState::Invited,
            gateway_for,
            endpoint: None,
            expires_at: None,
        };
        self.check_node(&node)?;
        let id = node.id;
        self.put_node(id, Some(node));
        for group in groups {
            let mut group = self.groups[&group].clone();
            group.nodes.insert(id);
            self.put_group(group.id, Some(group));
        }
        self.next_id = next_id;
        Ok(())
    }

    pub(super) fn activate_node(&mut self, name: &NodeName, key: PublicKey) -> Result<(), ChangeError> {
        let node = self.find_node(name)?;
        match node.state {
            NodeState::Invited | NodeState::Active => {}
            state @ (NodeState::Disabled | NodeState::Expired) => {
                let (what, remedy) = ("join", "enable it first");
                return Err(ChangeError::State { node: name.clone(), state, what, remedy });
            }
        }
        if let Some(other) = self.index.keys.get(&key).filter(|&&other| other != node.id) {
            return Err(ChangeError::KeyTaken(self.nodes[other].name.clone()));
        }
        self.set_node(name, |node| {
            node.state = NodeState::Active;
            node.public_key = Some(key);
        })
    }

    pub(super) fn enable_node(&mut self, name: &NodeName) -> Result<(), ChangeError> {
        self.set_node(name, |node| {
            node.state = match node.public_key {
                Some(_) => NodeState::Active,
                None => NodeState::Invited,
            };
        })
    }

    pub(super) fn rename_node(&mut self, from: &NodeName, to: &NodeName) -> Result<(), ChangeError> {
        if self.find_node(from)?.name != *to {
            self.check_node_name_free(to)?;
        }
        self.set_node(from, |node| node.name = to.clone())
    }

    pub(super) fn delete_node(&mut self, name: &NodeName) -> Result<(), ChangeError> {
        let id = self.find_node(name)?.id;
        let groups = self.index.groups_of_node(id).filter_map(|id| self.groups.get(&id));
        let mut users: Vec<Named> = groups.map(|group| Named::new(Kind::Group, &group.name)).collect();
        users.extend(self.rules_that_name(Selector::Node(id)));
        Self::check_unused(Named::new(Kind::Node, name), users)?;
        self.put_node(id, None);
        Ok(())
    }

    /// Changes what no other object depends on.
    pub(super) fn set_node(&mut self, name: &NodeName, set: impl FnOnce(&mut Node)) -> Result<(), ChangeError> {
        let mut node = self.find_node(name)?.clone();
        set(&mut node);
        self.put_node(node.id, Some(node));
        Ok(())
    }

    pub(super) fn find_node(&self, name: &NodeName) -> Result<&Node, ChangeError> {
        let hint = || Hint::nearest(name.as_str(), self.index.nodes.keys().map(NodeName::as_str));
        self.node_named(name).ok_or_else(|| ChangeError::Unknown(Named::new(Kind::Node, name), hint()))
    }

    fn check_node_name_free(&self, name: &NodeName) -> Result<(), ChangeError> {
        match self.node_named(name) {
            Some(_) => Err(ChangeError::NameTaken(Named::new(Kind::Node, name))),
            None => Ok(()),
        }
    }

    /// Whether a node is sound, and nothing of it is another's.
    pub(super) fn check_node(&self, node: &Node) -> Result<(), ChangeError> {
        let named = || Named::new(Kind::Node, &node.name);
        if node.expires_at.is_some() {
            return Err(ChangeError::Unsupported { what: "the expiry", of: named() });
        }
        if node.state == NodeState::Active && node.public_key.is_none() {
            return Err(ChangeError::ActiveWithoutKey(node.name.clone()));
        }
        for address in node.addresses.iter() {
            if let Some(other) = self.index.addresses.get(&address).filter(|&&other| other != node.id) {
                return Err(ChangeError::AddressTaken { address, node: self.nodes[other].name.clone() });
            }
        }
        if let Some(other) =
            node.public_key.and_then(|key| self.index.keys.get(&key)).filter(|&&other| other != node.id)
        {
            return Err(ChangeError::KeyTaken(self.nodes[other].name.clone()));
        }
        for id in &node.gateway_for {
            match self.cidrs.get(id) {
                None => return Err(ChangeError::Dangling { by: named(), kind: Kind::Cidr, id: id.0 }),
                Some(cidr) if !cidr.external => return Err(ChangeError::NotExternal(cidr.name.clone())),
                Some(_) => {}
            }
        }
        self.check_node_place(node).map(drop)
    }

    /// The one cidr that all addresses of the node lie directly in.
    pub(super) fn check_node_place(&self, node: &Node) -> Result<&Cidr, ChangeError> {
        let mut place: Option<&Cidr> = None;
        for address in node.addresses.iter() {
            let Some(cidr) = self.cidr_of(address) else {
                return Err(ChangeError::AddressNowhere { node: node.name.clone(), address });
            };
            match place.replace(cidr) {
                Some(v4) if v4.id != cidr.id => {
                    let (node, v4, v6) = (node.name.clone(), v4.name.clone(), cidr.name.clone());
                    return Err(ChangeError::NodeSplit { node, v4, v6 });
                }
                _ => {}
            }
        }
        let cidr = place.ok_or(crate::object::prefix::AddressError::None)?;
        if cidr.external {
            return Err(ChangeError::NodeInExternal(cidr.name.clone()));
        }
        let (has, needs) = (node.addresses, cidr.prefixes);
        for (family, missing) in
            [("IPv4", needs.v4().is_some() && has.v4().is_none()), ("IPv6", needs.v6().is_some() && has.v6().is_none())]
        {
            if missing {
                return Err(ChangeError::AddressMissing { node: node.name.clone(), cidr: cidr.name.clone(), family });
            }
        }
        Ok(cidr)
    }

    /// Addresses that somebody chose, if they lie directly in the cidr.
    fn check_addresses_in(&self, name: &NodeName, cidr: &Cidr, addresses: Addresses) -> Result<Addresses, ChangeError> {
        for address in addresses.iter() {
            if let Some(node) = self.node_at(address).filter(|node| node.name != *name) {
                return Err(ChangeError::AddressTaken { address, node: node.name.clone() });
            }
            if !cidr.prefixes.contains(address) {
                let prefixes = cidr.prefixes.to_string();
                return Err(ChangeError::AddressOutside { address, cidr: cidr.name.clone(), prefixes });
            }
            if let Some(actual) = self.cidr_of(address).filter(|actual| actual.id != cidr.id) {
                let (cidr, actual) = (cidr.name.clone(), actual.name.clone());
                return Err(ChangeError::AddressElsewhere { address, cidr, actual });
            }
        }
        Ok(addresses)
    }

    fn free_addresses(&self, cidr: &Cidr) -> Result<Addresses, ChangeError> {
        let full = |prefix| ChangeError::CidrFull { cidr: cidr.name.clone(), prefix };
        let free = cidr.prefixes.iter().map(|prefix| self.lowest_free(prefix).ok_or_else(|| full(prefix)));
        Ok(Addresses::from_addresses(free.collect::<Result<Vec<_>, _>>()?)?)
    }

    /// The lowest address that lies directly in a cidr's prefix and is nobody's. Low and dense, since that is what the
    /// kernel's tables hold best.
    fn lowest_free(&self, prefix: IpNet) -> Option<IpAddr> {
        let below = outermost_below(&self.index.prefixes, prefix);
        let mut below = below.iter().map(|(child, _)| (number(child.network()), number(child.broadcast()))).peekable();
        let mut taken =
            self.index.addresses.range(prefix.network()..=prefix.broadcast()).map(|(a, _)| number(*a)).peekable();
        let (mut candidate, last) = hosts(prefix);
        while candidate <= last {
            while below.next_if(|&(_, end)| end < candidate).is_some() {}
            while taken.next_if(|&address| address < candidate).is_some() {}
            let address = address(prefix, candidate);
            candidate = match below.peek() {
                Some(&(start, end)) if start <= candidate => end.checked_add(1)?,
                _ if taken.peek() == Some(&candidate) => candidate.checked_add(1)?,
                _ if Addresses::from_addresses([address]).is_err() => candidate.checked_add(1)?,
                _ => return Some(address),
            };
        }
        None
    }
}

/// The addresses of a prefix that a host can have: not IPv4's network and broadcast, not IPv6's anycast of routers.
fn hosts(prefix: IpNet) -> (u128, u128) {
    let (first, last) = (number(prefix.network()), number(prefix.broadcast()));
    match prefix {
        IpNet::V4(net) if net.prefix_len() <= 30 => (first + 1, last - 1),
        IpNet::V6(net) if net.prefix_len() <= 126 => (first + 1, last),
        IpNet::V4(_) | IpNet::V6(_) => (first, last),
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// The inverse of [`number`], in the family of the prefix.
fn address(prefix: IpNet, number: u128) -> IpAddr {
    match (prefix, u32::try_from(number)) {
        (IpNet::V4(_), Ok(number)) => IpAddr::V4(Ipv4Addr::from(number)),
        (IpNet::V4(_), Err(_)) | (IpNet::V6(_), _) => IpAddr::V6(Ipv6Addr::from(number)),
    }
}
