//! What is found by name, prefix, address or key. Follows from the objects.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::object::cidr::Cidr;
use crate::object::id::{
    CidrId, CidrName, GroupId, GroupName, NodeId, NodeName, RuleId, RuleName, ServiceId, ServiceName,
};
use crate::object::key::PublicKey;
use crate::object::node::Node;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) cidrs: Arc<BTreeMap<CidrName, CidrId>>,
    pub(super) nodes: Arc<BTreeMap<NodeName, NodeId>>,
    pub(super) groups: Arc<BTreeMap<GroupName, GroupId>>,
    pub(super) services: Arc<BTreeMap<ServiceName, ServiceId>>,
    pub(super) rules: Arc<BTreeMap<RuleName, RuleId>>,
    pub(super) prefixes: Arc<BTreeMap<IpNet, CidrId>>,
    pub(super) addresses: Arc<BTreeMap<IpAddr, NodeId>>,
    pub(super) keys: Arc<BTreeMap<PublicKey, NodeId>>,
}

impl Index {
    pub(super) fn insert_cidr(&mut self, cidr: &Cidr) {
        Arc::make_mut(&mut self.cidrs).insert(cidr.name.clone(), cidr.id);
        let prefixes = Arc::make_mut(&mut self.prefixes);
        prefixes.extend(cidr.prefixes.iter().map(|prefix| (prefix, cidr.id)));
    }

    pub(super) fn remove_cidr(&mut self, cidr: &Cidr) {
        Arc::make_mut(&mut self.cidrs).remove(&cidr.name);
        let prefixes = Arc::make_mut(&mut self.prefixes);
        for prefix in cidr.prefixes.iter() {
            prefixes.remove(&prefix);
        }
    }

    pub(super) fn insert_node(&mut self, node: &Node) {
        Arc::make_mut(&mut self.nodes).insert(node.name.clone(), node.id);
        let addresses = Arc::make_mut(&mut self.addresses);
        addresses.extend(node.addresses.iter().map(|address| (address, node.id)));
        if let Some(key) = node.public_key {
            Arc::make_mut(&mut self.keys).insert(key, node.id);
        }
    }

    pub(super) fn remove_node(&mut self, node: &Node) {
        Arc::make_mut(&mut self.nodes).remove(&node.name);
        let addresses = Arc::make_mut(&mut self.addresses);
        for address in node.addresses.iter() {
            addresses.remove(&address);
        }
        if let Some(key) = node.public_key {
            Arc::make_mut(&mut self.keys).remove(&key);
        }
    }
}
