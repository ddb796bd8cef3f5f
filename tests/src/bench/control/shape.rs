//! Networks that the bench is run on, and the changes that are made to them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use ipnet::IpNet;
use policy::{
    Action, Addresses, Change, Cidr, CidrId, DefaultPolicy, Group, GroupId, Mode, NetworkParts, Node, NodeId,
    NodeState, Prefixes, Rule, RuleId, RuleSpec, Selector, ServiceRef,
};

/// Nodes of one cidr, where there are enough of them.
const PER_CIDR: u32 = 100;
/// A rule between two nodes needs cidrs that have nothing to do with each other.
const CIDRS_MIN: u32 = 4;
/// Members of the group that a change of a mesh is about.
const MEMBERS: u32 = 100;
/// Where WireGuard of the first node listens; each other has the next port.
const FIRST_PORT: u32 = 10_000;

/// How the nodes are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Cidrs of 100 nodes, default deny. A cidr reaches itself, and one port of the next.
    Groups,
    /// One cidr, and everybody reaches everybody.
    Mesh,
}

/// One network.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) kind: Kind,
    pub(super) nodes: u32,
    /// Nodes beyond them that are invited and have not joined.
    pub(super) invited: u32,
}

/// Whom a change affects, by what it is meant to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    Two,
    Hundred,
    All,
}

impl Reach {
    pub(super) const EACH: [Self; 3] = [Self::Two, Self::Hundred, Self::All];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Two => "2 nodes",
            Self::Hundred => "100 nodes",
            Self::All => "all nodes",
        }
    }
}

impl Shape {
    pub(super) fn name(&self) -> String {
        let kind = match self.kind {
            Kind::Groups => "groups",
            Kind::Mesh => "mesh",
        };
        format!("{kind} {}", self.nodes)
    }

    pub(super) fn per_cidr(&self) -> u32 {
        match self.kind {
            Kind::Groups => PER_CIDR.min(self.nodes / CIDRS_MIN),
            Kind::Mesh => self.nodes,
        }
    }

    fn cidrs(&self) -> u32 {
        self.nodes.div_ceil(self.per_cidr())
    }

    /// Two nodes that no rule speaks of together.
    pub(super) fn pair(&self) -> [u32; 2] {
        [0, self.nodes / 2]
    }

    /// Those that the change of 100 nodes is about: as many as there are.
    pub(super) fn hundred(&self) -> std::ops::Range<u32> {
        match self.kind {
            Kind::Groups => 0..self.per_cidr(),
            Kind::Mesh => 0..MEMBERS.min(self.nodes / 2),
        }
    }

    pub(super) fn node_id(index: u32) -> NodeId {
        NodeId(index + 1)
    }

    pub(super) fn node_name(index: u32) -> String {
        format!("n{index}")
    }

    pub(super) fn port(index: u32) -> u16 {
        u16::try_from(FIRST_PORT + index).unwrap_or(u16::MAX)
    }

    /// The objects, with nodes that have no keys yet.
    pub(super) fn parts(&self) -> Result<NetworkParts> {
        let total = self.nodes + self.invited;
        let mut ids = total + 1..;
        let mut id = move || ids.next().unwrap_or(u32::MAX);
        let mut parts = NetworkParts {
            name: "bench".parse()?,
            roots: Prefixes::from_nets(["10.0.0.0/8".parse()?, "fd42::/32".parse()?])?,
            default: if self.kind == Kind::Groups { DefaultPolicy::Deny } else { DefaultPolicy::Lineage },
            next_id: 0,
            cidrs: Vec::new(),
            nodes: Vec::new(),
            groups: Vec::new(),
            services: Vec::new(),
            rules: Vec::new(),
        };
        for number in 0..self.cidrs() {
            let (name, prefixes) = (format!("c{number}").parse()?, self.prefixes(number)?);
            parts.cidrs.push(Cidr { id: CidrId(id()), name, prefixes, isolated: false, external: false });
        }
        for index in 0..total {
            parts.nodes.push(self.node(index)?);
        }
        match self.kind {
            Kind::Groups => parts.rules = self.rules(&parts.cidrs, &mut id)?,
            Kind::Mesh => {
                let nodes: BTreeSet<NodeId> = self.hundred().map(Self::node_id).collect();
                let group = Group { id: GroupId(id()), name: "hundred".parse()?, nodes, cidrs: BTreeSet::new() };
                let members = Selector::Group(group.id);
                parts.groups.push(group);
                parts.rules.push(rule(id(), "members", members, members, "tcp/22")?);
            }
        }
        parts.next_id = id();
        Ok(parts)
    }

    fn rules(&self, cidrs: &[Cidr], id: &mut impl FnMut() -> u32) -> Result<Vec<Rule>> {
        let mut rules = Vec::new();
        for (number, cidr) in cidrs.iter().enumerate() {
            let own = Selector::Cidr(cidr.id);
            rules.push(rule(id(), &format!("self-{number}"), own, own, "any")?);
            if let Some(next) = cidrs.get(number + 1) {
                rules.push(rule(id(), &format!("next-{number}"), own, Selector::Cidr(next.id), "tcp/8080")?);
            }
        }
        Ok(rules)
    }

    fn node(&self, index: u32) -> Result<Node> {
        // The invited ones follow the others, cidr by cidr.
        let (cidr, host) = match index.checked_sub(self.nodes) {
            None => (index / self.per_cidr(), index % self.per_cidr()),
            Some(extra) => (extra % self.cidrs(), self.per_cidr() + extra / self.cidrs()),
        };
        let (v4, v6) = self.address(cidr, host + 1);
        Ok(Node {
            id: Self::node_id(index),
            name: Self::node_name(index).parse()?,
            addresses: Addresses::from_addresses([v4, v6])?,
            public_key: None,
            state: if index < self.nodes { NodeState::Active } else { NodeState::Invited },
            gateway_for: BTreeSet::new(),
            endpoint: None,
            expires_at: None,
        })
    }

    fn address(&self, cidr: u32, host: u32) -> (IpAddr, IpAddr) {
        let v4 = u32::from(Ipv4Addr::new(10, 0, 0, 0)) + (cidr << 8) + host;
        let v6 = u128::from(Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 0)) + (u128::from(cidr) << 64) + u128::from(host);
        (Ipv4Addr::from(v4).into(), Ipv6Addr::from(v6).into())
    }

    fn prefixes(&self, cidr: u32) -> Result<Prefixes> {
        let (v4, v6) = self.address(cidr, 0);
        let v4 = IpNet::new(v4, if self.kind == Kind::Groups { 24 } else { 16 })?;
        Ok(Prefixes::from_nets([v4, IpNet::new(v6, 64)?])?)
    }

    /// The change, and on odd turns its end.
    pub(super) fn change(&self, reach: Reach, turn: u32) -> Result<Change> {
        let ends = turn % 2 == 1;
        let subject = match reach {
            Reach::Two => {
                let [from, to] = self.pair().map(|index| format!("node:{}", Self::node_name(index)));
                return rule_change("pair", Action::Allow, [&from, &to], "tcp/443", ends);
            }
            Reach::Hundred if self.kind == Kind::Groups => "cidr:c0",
            Reach::Hundred => "group:hundred",
            Reach::All => return extra_cidr(ends),
        };
        rule_change("among", Action::Deny, [subject, subject], "tcp/23", ends)
    }
}

fn rule(id: u32, name: &str, from: Selector, to: Selector, service: &str) -> Result<Rule> {
    Ok(Rule {
        id: RuleId(id),
        name: name.parse()?,
        action: Action::Allow,
        from: [from].into(),
        to: [to].into(),
        services: vec![ServiceRef::Literal(service.parse()?)],
        priority: 0,
        both: false,
        mode: Mode::Enforce,
        log: false,
        expires_at: None,
        schedule: None,
        comment: String::new(),
    })
}

/// A rule, or its end.
pub(super) fn rule_change(
    name: &str,
    action: Action,
    [from, to]: [&str; 2],
    service: &str,
    ends: bool,
) -> Result<Change> {
    let name = name.parse()?;
    if ends {
        return Ok(Change::DeleteRule { name });
    }
    Ok(Change::AddRule(RuleSpec {
        name,
        action,
        from: vec![from.parse()?],
        to: vec![to.parse()?],
        services: vec![service.parse()?],
        priority: 0,
        both: false,
        log: false,
        comment: String::new(),
    }))
}

fn extra_cidr(ends: bool) -> Result<Change> {
    let name = "extra".parse()?;
    if ends {
        return Ok(Change::DeleteCidr { name });
    }
    let prefixes = Prefixes::from_nets(["10.255.0.0/24".parse()?, "fd42:0:ffff::/64".parse()?])?;
    Ok(Change::AddCidr { name, prefixes, isolated: false, external: false })
}
