//! Changes, in the words of whoever makes them.

use std::net::SocketAddr;

use super::{ChangeError, DefaultPolicy, Network, Warning};
use crate::object::id::{CidrName, GroupName, NodeName, RuleName, ServiceName};
use crate::object::key::PublicKey;
use crate::object::node::NodeState;
use crate::object::prefix::{Addresses, Prefixes};
use crate::object::rule::RuleSpec;
use crate::object::selector::MemberSpec;
use crate::object::service::Service;

/// One step from one valid network to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    SetDefault(DefaultPolicy),
    AddCidr {
        name: CidrName,
        prefixes: Prefixes,
        isolated: bool,
        external: bool,
    },
    RenameCidr {
        from: CidrName,
        to: CidrName,
    },
    MoveCidr {
        name: CidrName,
        prefixes: Prefixes,
    },
    SetCidr {
        name: CidrName,
        isolated: bool,
    },
    DeleteCidr {
        name: CidrName,
    },
    /// In state `invited`. Without addresses it gets the lowest free ones of its cidr.
    AddNode {
        name: NodeName,
        cidr: CidrName,
        addresses: Option<Addresses>,
        groups: Vec<GroupName>,
        gateway_for: Vec<CidrName>,
    },
    /// Also gives an active node that lost its key a new one.
    ActivateNode {
        name: NodeName,
        public_key: PublicKey,
    },
    RenameNode {
        from: NodeName,
        to: NodeName,
    },
    DisableNode {
        name: NodeName,
    },
    /// Back to active, or to invited if it never joined.
    EnableNode {
        name: NodeName,
    },
    DeleteNode {
        name: NodeName,
    },
    SetEndpoint {
        name: NodeName,
        endpoint: Option<SocketAddr>,
    },
    AddGroup {
        name: GroupName,
        members: Vec<MemberSpec>,
    },
    RenameGroup {
        from: GroupName,
        to: GroupName,
    },
    DeleteGroup {
        name: GroupName,
    },
    AddMember {
        group: GroupName,
        member: MemberSpec,
    },
    RemoveMember {
        group: GroupName,
        member: MemberSpec,
    },
    AddRule(RuleSpec),
    DeleteRule {
        name: RuleName,
    },
    AddService {
        name: ServiceName,
        services: Vec<Service>,
    },
    DeleteService {
        name: ServiceName,
    },
}

impl Network {
    /// Makes the change, or refuses it and stays as it is.
    pub fn apply(&mut self, change: &Change) -> Result<Vec<Warning>, ChangeError> {
        const DONE: Result<Vec<Warning>, ChangeError> = Ok(Vec::new());
        match change {
            Change::SetDefault(default) => {
                self.touched.header |= self.default != *default;
                self.default = *default;
                DONE
            }
            Change::AddCidr { name, prefixes, isolated, external } => {
                self.add_cidr(name, *prefixes, *isolated, *external)
            }
            Change::RenameCidr { from, to } => self.rename_cidr(from, to).and(DONE),
            Change::MoveCidr { name, prefixes } => self.move_cidr(name, *prefixes),
            Change::SetCidr { name, isolated } => self.set_cidr(name, *isolated).and(DONE),
            Change::DeleteCidr { name } => self.delete_cidr(name).and(DONE),
            Change::AddNode { name, cidr, addresses, groups, gateway_for } => {
                self.add_node(name, cidr, *addresses, groups, gateway_for).and(DONE)
            }
            Change::ActivateNode { name, public_key } => self.activate_node(name, *public_key).and(DONE),
            Change::RenameNode { from, to } => self.rename_node(from, to).and(DONE),
            Change::DisableNode { name } => self.set_node(name, |node| node.state = NodeState::Disabled).and(DONE),
            Change::EnableNode { name } => self.enable_node(name).and(DONE),
            Change::DeleteNode { name } => self.delete_node(name).and(DONE),
            Change::SetEndpoint { name, endpoint } => self.set_node(name, |node| node.endpoint = *endpoint).and(DONE),
            Change::AddGroup { name, members } => self.add_group(name, members).and(DONE),
            Change::RenameGroup { from, to } => self.rename_group(from, to).and(DONE),
            Change::DeleteGroup { name } => self.delete_group(name).and(DONE),
            Change::AddMember { group, member } => self.add_member(group, member).and(DONE),
            Change::RemoveMember { group, member } => self.remove_member(group, member),
            Change::AddRule(spec) => self.add_rule(spec),
            Change::DeleteRule { name } => self.delete_rule(name).and(DONE),
            Change::AddService { name, services } => self.add_service(name, services).and(DONE),
            Change::DeleteService { name } => self.delete_service(name).and(DONE),
        }
    }
}
