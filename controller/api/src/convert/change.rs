//! What an admin asks for.

use std::net::SocketAddr;

use policy::{Change, RuleSpec};

use super::{ConvertError, action, default_policy, parse, parse_all, print_all, required};
use crate::v1::{self, change::Kind};

/// Refuses the one that no admin can ask for: a node becomes active by redeeming its invitation.
impl TryFrom<&Change> for v1::Change {
    type Error = ConvertError;

    fn try_from(change: &Change) -> Result<Self, Self::Error> {
        let rename = |from: String, to: String| v1::Rename { from, to };
        let kind = match change {
            Change::SetDefault(default) => Kind::SetDefault(v1::Default::from(*default).into()),
            Change::AddCidr { name, prefixes, isolated, external } => Kind::AddCidr(v1::AddCidr {
                name: name.to_string(),
                prefixes: Some(prefixes.into()),
                isolated: *isolated,
                external: *external,
            }),
            Change::RenameCidr { from, to } => Kind::RenameCidr(rename(from.to_string(), to.to_string())),
            Change::MoveCidr { name, prefixes } => {
                Kind::MoveCidr(v1::MoveCidr { name: name.to_string(), prefixes: Some(prefixes.into()) })
            }
            Change::SetCidr { name, isolated } => {
                Kind::SetCidr(v1::SetCidr { name: name.to_string(), isolated: *isolated })
            }
            Change::DeleteCidr { name } => Kind::DeleteCidr(name.to_string()),
            Change::AddNode { name, cidr, addresses, groups, gateway_for } => Kind::AddNode(v1::AddNode {
                name: name.to_string(),
                cidr: cidr.to_string(),
                addresses: addresses.as_ref().map(Into::into),
                groups: print_all(groups),
                gateway_for: print_all(gateway_for),
            }),
            Change::ActivateNode { name, public_key: _ } => {
                return Err(ConvertError::invalid(
                    "change.activate_node",
                    name,
                    "a node becomes active by redeeming its invitation with `noded join`",
                ));
            }
            Change::RenameNode { from, to } => Kind::RenameNode(rename(from.to_string(), to.to_string())),
            Change::DisableNode { name } => Kind::DisableNode(name.to_string()),
            Change::EnableNode { name } => Kind::EnableNode(name.to_string()),
            Change::DeleteNode { name } => Kind::DeleteNode(name.to_string()),
            Change::SetEndpoint { name, endpoint } => Kind::SetEndpoint(v1::SetEndpoint {
                node: name.to_string(),
                endpoint: endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default(),
            }),
            Change::AddGroup { name, members } => {
                Kind::AddGroup(v1::AddGroup { name: name.to_string(), members: print_all(members) })
            }
            Change::RenameGroup { from, to } => Kind::RenameGroup(rename(from.to_string(), to.to_string())),
            Change::DeleteGroup { name } => Kind::DeleteGroup(name.to_string()),
            Change::AddMember { group, member } => {
                Kind::AddMember(v1::Member { group: group.to_string(), member: member.to_string() })
            }
            Change::RemoveMember { group, member } => {
                Kind::RemoveMember(v1::Member { group: group.to_string(), member: member.to_string() })
            }
            Change::AddRule(rule) => Kind::AddRule(rule.into()),
            Change::DeleteRule { name } => Kind::DeleteRule(name.to_string()),
            Change::AddService { name, services } => {
                Kind::AddService(v1::AddService { name: name.to_string(), services: print_all(services) })
            }
            Change::DeleteService { name } => Kind::DeleteService(name.to_string()),
        };
        Ok(Self { kind: Some(kind) })
    }
}

impl TryFrom<v1::Change> for Change {
    type Error = ConvertError;

    fn try_from(change: v1::Change) -> Result<Self, Self::Error> {
        let v1::Change { kind } = change;
        Ok(match required("change.kind", kind)? {
            Kind::AddCidr(v1::AddCidr { name, prefixes, isolated, external }) => Self::AddCidr {
                name: parse("add_cidr.name", &name)?,
                prefixes: required("add_cidr.prefixes", prefixes)?.try_into()?,
                isolated,
                external,
            },
            Kind::RenameCidr(v1::Rename { from, to }) => {
                Self::RenameCidr { from: parse("rename_cidr.from", &from)?, to: parse("rename_cidr.to", &to)? }
            }
            Kind::MoveCidr(v1::MoveCidr { name, prefixes }) => Self::MoveCidr {
                name: parse("move_cidr.name", &name)?,
                prefixes: required("move_cidr.prefixes", prefixes)?.try_into()?,
            },
            Kind::SetCidr(v1::SetCidr { name, isolated }) => {
                Self::SetCidr { name: parse("set_cidr.name", &name)?, isolated }
            }
            Kind::DeleteCidr(name) => Self::DeleteCidr { name: parse("delete_cidr", &name)? },
            Kind::AddNode(v1::AddNode { name, cidr, addresses, groups, gateway_for }) => Self::AddNode {
                name: parse("add_node.name", &name)?,
                cidr: parse("add_node.cidr", &cidr)?,
                addresses: addresses.map(TryInto::try_into).transpose()?,
                groups: parse_all("add_node.groups", groups)?,
                gateway_for: parse_all("add_node.gateway_for", gateway_for)?,
            },
            Kind::RenameNode(v1::Rename { from, to }) => {
                Self::RenameNode { from: parse("rename_node.from", &from)?, to: parse("rename_node.to", &to)? }
            }
            Kind::DisableNode(name) => Self::DisableNode { name: parse("disable_node", &name)? },
            Kind::EnableNode(name) => Self::EnableNode { name: parse("enable_node", &name)? },
            Kind::DeleteNode(name) => Self::DeleteNode { name: parse("delete_node", &name)? },
            Kind::SetEndpoint(v1::SetEndpoint { node, endpoint }) => {
                Self::SetEndpoint { name: parse("set_endpoint.node", &node)?, endpoint: configured(&endpoint)? }
            }
            Kind::AddGroup(v1::AddGroup { name, members }) => Self::AddGroup {
                name: parse("add_group.name", &name)?,
                members: parse_all("add_group.members", members)?,
            },
            Kind::RenameGroup(v1::Rename { from, to }) => {
                Self::RenameGroup { from: parse("rename_group.from", &from)?, to: parse("rename_group.to", &to)? }
            }
            Kind::DeleteGroup(name) => Self::DeleteGroup { name: parse("delete_group", &name)? },
            Kind::AddMember(v1::Member { group, member }) => Self::AddMember {
                group: parse("add_member.group", &group)?,
                member: parse("add_member.member", &member)?,
            },
            Kind::RemoveMember(v1::Member { group, member }) => Self::RemoveMember {
                group: parse("remove_member.group", &group)?,
                member: parse("remove_member.member", &member)?,
            },
            Kind::AddRule(rule) => Self::AddRule(rule.try_into()?),
            Kind::DeleteRule(name) => Self::DeleteRule { name: parse("delete_rule", &name)? },
            Kind::AddService(v1::AddService { name, services }) => Self::AddService {
                name: parse("add_service.name", &name)?,
                services: parse_all("add_service.services", services)?,
            },
            Kind::DeleteService(name) => Self::DeleteService { name: parse("delete_service", &name)? },
            Kind::SetDefault(default) => Self::SetDefault(default_policy("set_default", default)?),
        })
    }
}

fn configured(text: &str) -> Result<Option<SocketAddr>, ConvertError> {
    if text.is_empty() { Ok(None) } else { parse("set_endpoint.endpoint", text).map(Some) }
}

impl From<&RuleSpec> for v1::AddRule {
    fn from(rule: &RuleSpec) -> Self {
        let RuleSpec { name, action, from, to, services, priority, both, log, comment } = rule;
        Self {
            name: name.to_string(),
            action: v1::Action::from(*action).into(),
            from: print_all(from),
            to: print_all(to),
            services: print_all(services),
            priority: *priority,
            both: *both,
            log: *log,
            comment: comment.clone(),
        }
    }
}

impl TryFrom<v1::AddRule> for RuleSpec {
    type Error = ConvertError;

    fn try_from(rule: v1::AddRule) -> Result<Self, Self::Error> {
        let v1::AddRule { name, action: verb, from, to, services, priority, both, log, comment } = rule;
        Ok(Self {
            name: parse("add_rule.name", &name)?,
            action: action("add_rule.action", verb)?,
            from: parse_all("add_rule.from", from)?,
            to: parse_all("add_rule.to", to)?,
            services: parse_all("add_rule.services", services)?,
            priority,
            both,
            log,
            comment,
        })
    }
}
