//! The objects, as the store keeps them and as admins read them.

use std::collections::BTreeSet;

use ipnet::IpNet;
use policy::{
    Cidr, CidrId, Group, GroupId, Mode, NamedService, Network, NetworkParts, Node, NodeId, Rule, RuleId, Selector,
    ServiceId,
};

use super::{
    ConvertError, action, default_policy, id, ids, node_state, nonzero, parse, parse_all, print_all, public_key,
    required,
};
use crate::v1;

impl From<&Cidr> for v1::Cidr {
    fn from(cidr: &Cidr) -> Self {
        let Cidr { id, name, prefixes, isolated, external } = cidr;
        Self {
            id: id.0,
            name: name.to_string(),
            prefixes: Some(prefixes.into()),
            isolated: *isolated,
            external: *external,
        }
    }
}

impl TryFrom<v1::Cidr> for Cidr {
    type Error = ConvertError;

    fn try_from(cidr: v1::Cidr) -> Result<Self, Self::Error> {
        let v1::Cidr { id: number, name, prefixes, isolated, external } = cidr;
        Ok(Self {
            id: id("cidr.id", number, CidrId)?,
            name: parse("cidr.name", &name)?,
            prefixes: required("cidr.prefixes", prefixes)?.try_into()?,
            isolated,
            external,
        })
    }
}

impl From<&Node> for v1::Node {
    fn from(node: &Node) -> Self {
        let Node { id, name, addresses, public_key, state, gateway_for, endpoint, expires_at } = node;
        Self {
            id: id.0,
            name: name.to_string(),
            addresses: Some(addresses.into()),
            public_key: public_key.as_ref().map(|key| key.as_bytes().to_vec()).unwrap_or_default(),
            state: v1::NodeState::from(*state).into(),
            gateway_for: gateway_for.iter().map(|cidr| cidr.0).collect(),
            endpoint: endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default(),
            endpoint_fixed: endpoint.is_some(),
            expires_at: expires_at.unwrap_or(0),
        }
    }
}

impl TryFrom<v1::Node> for Node {
    type Error = ConvertError;

    fn try_from(node: v1::Node) -> Result<Self, Self::Error> {
        let v1::Node {
            id: number,
            name,
            addresses,
            public_key: key,
            state,
            gateway_for,
            endpoint,
            endpoint_fixed,
            expires_at,
        } = node;
        // An observed endpoint is not part of the policy; rows of older stores may hold one.
        let endpoint = if endpoint_fixed { Some(parse("node.endpoint", &endpoint)?) } else { None };
        Ok(Self {
            id: id("node.id", number, NodeId)?,
            name: parse("node.name", &name)?,
            addresses: required("node.addresses", addresses)?.try_into()?,
            public_key: (!key.is_empty()).then(|| public_key("node.public_key", &key)).transpose()?,
            state: node_state("node.state", state)?,
            gateway_for: ids("node.gateway_for", gateway_for, CidrId)?,
            endpoint,
            expires_at: nonzero(expires_at),
        })
    }
}

impl From<&Group> for v1::Group {
    fn from(group: &Group) -> Self {
        let Group { id, name, nodes, cidrs } = group;
        Self {
            id: id.0,
            name: name.to_string(),
            nodes: nodes.iter().map(|node| node.0).collect(),
            cidrs: cidrs.iter().map(|cidr| cidr.0).collect(),
        }
    }
}

impl TryFrom<v1::Group> for Group {
    type Error = ConvertError;

    fn try_from(group: v1::Group) -> Result<Self, Self::Error> {
        let v1::Group { id: number, name, nodes, cidrs } = group;
        Ok(Self {
            id: id("group.id", number, GroupId)?,
            name: parse("group.name", &name)?,
            nodes: ids("group.nodes", nodes, NodeId)?,
            cidrs: ids("group.cidrs", cidrs, CidrId)?,
        })
    }
}

impl From<&NamedService> for v1::NamedService {
    fn from(service: &NamedService) -> Self {
        let NamedService { id, name, services } = service;
        Self { id: id.0, name: name.to_string(), services: print_all(services) }
    }
}

impl TryFrom<v1::NamedService> for NamedService {
    type Error = ConvertError;

    fn try_from(service: v1::NamedService) -> Result<Self, Self::Error> {
        let v1::NamedService { id: number, name, services } = service;
        Ok(Self {
            id: id("service.id", number, ServiceId)?,
            name: parse("service.name", &name)?,
            services: parse_all("service.services", services)?,
        })
    }
}

impl From<&Selector> for v1::Selector {
    fn from(selector: &Selector) -> Self {
        use v1::selector::Kind;
        let kind = match selector {
            Selector::Any => Kind::Any(true),
            Selector::Cidr(id) => Kind::Cidr(id.0),
            Selector::Node(id) => Kind::Node(id.0),
            Selector::Group(id) => Kind::Group(id.0),
            Selector::Prefix(prefix) => Kind::Prefix(prefix.into()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::Selector> for Selector {
    type Error = ConvertError;

    fn try_from(selector: v1::Selector) -> Result<Self, Self::Error> {
        use v1::selector::Kind;
        let v1::Selector { kind } = selector;
        Ok(match required("selector.kind", kind)? {
            Kind::Any(true) => Self::Any,
            Kind::Any(false) => {
                return Err(ConvertError::invalid("selector.any", "false", "only `true` means anything"));
            }
            Kind::Cidr(number) => Self::Cidr(id("selector.cidr", number, CidrId)?),
            Kind::Node(number) => Self::Node(id("selector.node", number, NodeId)?),
            Kind::Group(number) => Self::Group(id("selector.group", number, GroupId)?),
            Kind::Prefix(prefix) => Self::Prefix(IpNet::try_from(prefix)?),
        })
    }
}

fn selectors(selectors: Vec<v1::Selector>) -> Result<BTreeSet<Selector>, ConvertError> {
    selectors.into_iter().map(Selector::try_from).collect()
}

impl From<&Rule> for v1::Rule {
    fn from(rule: &Rule) -> Self {
        let Rule { id, name, action, from, to, services, priority, both, mode, log, expires_at, schedule, comment } =
            rule;
        Self {
            id: id.0,
            name: name.to_string(),
            action: v1::Action::from(*action).into(),
            from: from.iter().map(v1::Selector::from).collect(),
            to: to.iter().map(v1::Selector::from).collect(),
            services: print_all(services),
            priority: *priority,
            both: *both,
            mode: v1::Mode::from(*mode).into(),
            log: *log,
            comment: comment.clone(),
            expires_at: expires_at.unwrap_or(0),
            schedule: schedule.clone().unwrap_or_default(),
        }
    }
}

impl TryFrom<v1::Rule> for Rule {
    type Error = ConvertError;

    fn try_from(rule: v1::Rule) -> Result<Self, Self::Error> {
        let v1::Rule {
            id: number,
            name,
            action: verb,
            from,
            to,
            services,
            priority,
            both,
            mode: how,
            log,
            comment,
            expires_at,
            schedule,
        } = rule;
        Ok(Self {
            id: id("rule.id", number, RuleId)?,
            name: parse("rule.name", &name)?,
            action: action("rule.action", verb)?,
            from: selectors(from)?,
            to: selectors(to)?,
            services: parse_all("rule.services", services)?,
            priority,
            both,
            mode: mode("rule.mode", how)?,
            log,
            expires_at: nonzero(expires_at),
            schedule: (!schedule.is_empty()).then_some(schedule),
            comment,
        })
    }
}

impl From<Mode> for v1::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Enforce => Self::Enforce,
            Mode::Audit => Self::Audit,
        }
    }
}

fn mode(field: &'static str, value: i32) -> Result<Mode, ConvertError> {
    match v1::Mode::try_from(value) {
        Ok(v1::Mode::Enforce) => Ok(Mode::Enforce),
        Ok(v1::Mode::Audit) => Ok(Mode::Audit),
        Ok(v1::Mode::Unspecified) => Err(ConvertError::Missing { field }),
        Err(_) => Err(ConvertError::Unknown { field, value }),
    }
}

impl From<&NetworkParts> for v1::Network {
    fn from(parts: &NetworkParts) -> Self {
        let NetworkParts { name, roots, default, next_id, cidrs, nodes, groups, services, rules } = parts;
        Self {
            name: name.to_string(),
            roots: Some(roots.into()),
            default: v1::Default::from(*default).into(),
            next_id: *next_id,
            cidrs: cidrs.iter().map(v1::Cidr::from).collect(),
            nodes: nodes.iter().map(v1::Node::from).collect(),
            groups: groups.iter().map(v1::Group::from).collect(),
            services: services.iter().map(v1::NamedService::from).collect(),
            rules: rules.iter().map(v1::Rule::from).collect(),
        }
    }
}

impl From<&Network> for v1::Network {
    fn from(network: &Network) -> Self {
        Self::from(&network.to_parts())
    }
}

impl TryFrom<v1::Network> for NetworkParts {
    type Error = ConvertError;

    fn try_from(network: v1::Network) -> Result<Self, Self::Error> {
        let v1::Network { name, roots, default, next_id, cidrs, nodes, groups, services, rules } = network;
        Ok(Self {
            name: parse("network.name", &name)?,
            roots: required("network.roots", roots)?.try_into()?,
            default: default_policy("network.default", default)?,
            next_id,
            cidrs: cidrs.into_iter().map(Cidr::try_from).collect::<Result<_, _>>()?,
            nodes: nodes.into_iter().map(Node::try_from).collect::<Result<_, _>>()?,
            groups: groups.into_iter().map(Group::try_from).collect::<Result<_, _>>()?,
            services: services.into_iter().map(NamedService::try_from).collect::<Result<_, _>>()?,
            rules: rules.into_iter().map(Rule::try_from).collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<v1::Network> for Network {
    type Error = ConvertError;

    fn try_from(network: v1::Network) -> Result<Self, Self::Error> {
        Ok(Self::from_parts(NetworkParts::try_from(network)?)?)
    }
}
