//! Large networks, and what one node of them receives.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use ebpf_common::packet::UDP;
use ipnet::IpNet;
use policy::{
    Action, Addresses, Cidr, CidrId, DefaultPolicy, Flow, Matrix, Mode, Network, NetworkParts, Node, NodeId, NodeState,
    Prefixes, PublicKey, Revision, Rule, RuleId, Selector, ServiceRef, Slice,
};

use super::statistics::Draw;
use crate::mesh::Family;

/// Where the addresses lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One cidr beside the other, each 256 in one around them: as the controller gives them out.
    Dense,
    /// Scattered over the root: for IPv4 /24s over a /8, for IPv6 single addresses over a /32.
    Sparse,
}

impl Layout {
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Sparse => "sparse",
        }
    }
}

/// Which families the cidrs have addresses of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    Both,
    One(Family),
}

/// How large a network is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub cidrs: u32,
    pub rules_per_cidr: u32,
    pub layout: Layout,
    pub families: Families,
    /// How all partners are treated; otherwise they take turns.
    pub treatment: Option<Treatment>,
    /// Rules of each treatment that concern the subject, at most: partners share them.
    pub groups: u32,
}

impl Size {
    /// Partners treated in every way, by as many rules about the subject as `rules_per_cidr` gives it.
    pub fn mixed(cidrs: u32, rules_per_cidr: u32, layout: Layout, families: Families) -> Self {
        let groups = (GROUPS * rules_per_cidr).clamp(1, GROUPS_LIMIT);
        Self { cidrs, rules_per_cidr, layout, families, treatment: None, groups }
    }

    /// As many partners as `rules`, each with one port open, and no other rules.
    pub fn ports(rules: u32, family: Family) -> Self {
        // The subject, what is around it, and what is around each 255 more.
        let cidrs = (0..).map(|spare| rules + 2 + spare).find(|cidrs| cidrs - 1 - cidrs.div_ceil(256) == rules);
        Self {
            cidrs: cidrs.unwrap_or(rules),
            rules_per_cidr: 0,
            layout: Layout::Dense,
            families: Families::One(family),
            treatment: Some(Treatment::RecordedPort),
            groups: PORT_GROUPS,
        }
    }
}

/// What the policy says of packets from another cidr to the subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Everything, both ways.
    AnyService,
    /// One port; in the other direction everything, so that no record is needed.
    Port,
    /// One port, and nothing in the other direction: flows are recorded.
    RecordedPort,
    /// Nothing. In the other direction one port, whose replies pass by their record.
    Replies,
}

/// Another cidr, and an address in it.
#[derive(Clone, Copy, Debug)]
pub struct Partner {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub treatment: Treatment,
    /// Of the service that a rule names.
    pub port: u16,
    /// The cidr, in one family or the other.
    pub nets: (IpNet, IpNet),
}

impl Partner {
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    pub fn net(&self, family: Family) -> IpNet {
        match family {
            Family::V4 => self.nets.0,
            Family::V6 => self.nets.1,
        }
    }
}

/// A network seen from one of its nodes, the subject.
#[derive(Debug)]
pub struct Scale {
    pub network: Network,
    pub subject: NodeId,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub partners: Vec<Partner>,
}

/// The subject's cidr; 0 is the one around it.
const SUBJECT: u32 = 1;
/// The first /16 that dense cidrs lie in, so that the first of them are those of the mesh of the tests.
const FIRST: u32 = 42;
/// Rules of each treatment that concern the subject, for each rule that a cidr has: what its tables hold at ten (their
/// pages are what they have fewest of).
const GROUPS: u32 = 25;
const GROUPS_LIMIT: u32 = 250;
/// Rules with a port of their own that one node's tables have room for.
const PORT_GROUPS: u32 = 1_000;
/// Named in rules about the subject: from here on.
const PORT: u16 = 5_000;
const PORTS: u32 = 50;

impl Scale {
    pub fn new(size: Size) -> Result<Self> {
        Builder::new(size).build()
    }

    /// The subject's own address.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// The subject's slice.
    pub fn slice(&self, revision: u64) -> Result<Slice> {
        self.slice_of(&Matrix::compile(&self.network)?, revision)
    }

    /// Likewise, of a matrix that is compiled already.
    pub fn slice_of(&self, matrix: &Matrix, revision: u64) -> Result<Slice> {
        matrix.slice(self.subject, Revision(revision)).context("the subject is not active")
    }

    /// The name of the subject's cidr.
    pub const SUBJECT_CIDR: &str = "c1";

    /// The names of the partners' cidrs.
    pub fn partner_names(&self) -> impl Iterator<Item = &str> {
        let cidrs = self.network.cidrs().values().map(|cidr| cidr.name.as_str());
        cidrs.filter(|name| *name != Self::SUBJECT_CIDR)
    }

    /// The flow that the rule about a partner speaks of, from it to the subject.
    pub fn flow(&self, partner: &Partner, family: Family) -> Flow {
        Flow { source: partner.address(family), destination: self.address(family), protocol: UDP, port: partner.port }
    }

    pub fn with(&self, treatment: Treatment) -> Vec<Partner> {
        self.partners.iter().filter(|partner| partner.treatment == treatment).copied().collect()
    }
}

struct Builder {
    size: Size,
    parts: NetworkParts,
    /// Cidr ids by number.
    cidrs: Vec<CidrId>,
    partners: Vec<(CidrId, Partner)>,
    draw: Draw,
}

impl Builder {
    fn new(size: Size) -> Self {
        let root = |text: &str| text.parse::<IpNet>().expect("a prefix");
        let v6 = if size.layout == Layout::Dense { "fd42::/48" } else { "fd42::/32" };
        let parts = NetworkParts {
            name: "scale".parse().expect("a name"),
            roots: Prefixes::from_nets([root("10.0.0.0/8"), root(v6)]).expect("one of each family"),
            default: DefaultPolicy::Deny,
            next_id: 1,
            cidrs: Vec::new(),
            nodes: Vec::new(),
            groups: Vec::new(),
            services: Vec::new(),
            rules: Vec::new(),
        };
        Self { size, parts, cidrs: Vec::new(), partners: Vec::new(), draw: Draw::new(88_172_645_463_325_252) }
    }

    fn id(&mut self) -> u32 {
        self.parts.next_id += 1;
        self.parts.next_id - 1
    }

    fn build(mut self) -> Result<Scale> {
        let mut taken = std::collections::BTreeSet::new();
        let mut subject = None;
        for number in 0..self.size.cidrs {
            let (nets, hosts) = match self.size.layout {
                Layout::Dense => dense(number),
                // The subject is where it is in the mesh of the tests.
                Layout::Sparse if number <= SUBJECT => dense(number),
                Layout::Sparse => sparse(&mut self.draw, &mut taken),
            };
            let cidr = self.cidr(number, nets)?;
            if number == SUBJECT {
                subject = Some((self.node(number, hosts)?, hosts));
            } else if number > SUBJECT && (self.size.layout == Layout::Sparse || number & 255 != 0) {
                self.node(number, hosts)?;
                let turn = match number % 4 {
                    0 => Treatment::AnyService,
                    1 => Treatment::Port,
                    2 => Treatment::RecordedPort,
                    _ => Treatment::Replies,
                };
                let treatment = self.size.treatment.unwrap_or(turn);
                self.partners.push((cidr, Partner { v4: hosts.0, v6: hosts.1, treatment, port: PORT, nets }));
            }
        }
        let (subject, (v4, v6)) = subject.context("a network of fewer than two cidrs has no subject")?;
        self.rules_about_subject();
        self.other_rules();
        let partners = self.partners.into_iter().map(|(_, partner)| partner).collect();
        Ok(Scale { network: Network::from_parts(self.parts)?, subject, v4, v6, partners })
    }

    fn cidr(&mut self, number: u32, (v4, v6): (IpNet, IpNet)) -> Result<CidrId> {
        let nets = match self.size.families {
            // The subject always has both, as nodes do.
            Families::One(Family::V4) if number > SUBJECT => vec![v4],
            Families::One(Family::V6) if number > SUBJECT => vec![v6],
            _ => vec![v4, v6],
        };
        let id = CidrId(self.id());
        let (name, prefixes) = (format!("c{number}").parse()?, Prefixes::from_nets(nets)?);
        self.parts.cidrs.push(Cidr { id, name, prefixes, isolated: false, external: false });
        self.cidrs.push(id);
        Ok(id)
    }

    fn node(&mut self, number: u32, (v4, v6): (Ipv4Addr, Ipv6Addr)) -> Result<NodeId> {
        let id = NodeId(self.id());
        let mut key = [1; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        let addresses: Vec<IpAddr> = match self.size.families {
            Families::One(Family::V4) if number > SUBJECT => vec![v4.into()],
            Families::One(Family::V6) if number > SUBJECT => vec![v6.into()],
            _ => vec![v4.into(), v6.into()],
        };
        self.parts.nodes.push(Node {
            id,
            name: format!("n{number}").parse()?,
            addresses: Addresses::from_addresses(addresses)?,
            public_key: PublicKey::try_from(key).ok(),
            state: NodeState::Active,
            gateway_for: Default::default(),
            endpoint: None,
            expires_at: None,
        });
        Ok(id)
    }

    /// The partners of each treatment in groups, each with rules and a port of its own.
    fn rules_about_subject(&mut self) {
        let subject = vec![Selector::Cidr(self.cidrs[SUBJECT as usize])];
        let wanted = self.size.groups as usize;
        let treatments = [Treatment::AnyService, Treatment::Port, Treatment::RecordedPort, Treatment::Replies];
        for treatment in treatments {
            let of = |(_, partner): &(CidrId, Partner)| partner.treatment == treatment;
            let members: Vec<usize> = (0..self.partners.len()).filter(|index| of(&self.partners[*index])).collect();
            for (group, members) in members.chunks(members.len().div_ceil(wanted).max(1)).enumerate() {
                let port = group_port(group as u32);
                let from: Vec<Selector> =
                    members.iter().map(|member| Selector::Cidr(self.partners[*member].0)).collect();
                members.iter().for_each(|member| self.partners[*member].1.port = port);
                let service = format!("udp/{port}");
                match treatment {
                    Treatment::AnyService => self.rule(Action::Allow, from, subject.clone(), "any", true),
                    Treatment::Port => {
                        self.rule(Action::Allow, from.clone(), subject.clone(), &service, false);
                        self.rule(Action::Allow, subject.clone(), from, "any", false);
                    }
                    Treatment::RecordedPort => self.rule(Action::Allow, from, subject.clone(), &service, false),
                    Treatment::Replies => self.rule(Action::Allow, subject.clone(), from, &service, false),
                }
            }
        }
    }

    /// Rules between other cidrs, up to the number wanted.
    fn other_rules(&mut self) {
        let total = (self.size.cidrs * self.size.rules_per_cidr) as usize;
        let others = self.partners.len();
        while self.parts.rules.len() < total && others > 0 {
            let mut other = || Selector::Cidr(self.partners[self.draw.below(others)].0);
            let (from, to) = (vec![other()], vec![other()]);
            let service = format!("tcp/{}", 1 + self.draw.below(65_535));
            let action = if self.draw.below(4) == 0 { Action::Deny } else { Action::Allow };
            self.rule(action, from, to, &service, false);
        }
    }

    fn rule(&mut self, action: Action, from: Vec<Selector>, to: Vec<Selector>, service: &str, both: bool) {
        let id = self.id();
        self.parts.rules.push(Rule {
            id: RuleId(id),
            name: format!("r{id}").parse().expect("a name"),
            action,
            from: from.into_iter().collect(),
            to: to.into_iter().collect(),
            services: vec![ServiceRef::Literal(service.parse().expect("a service"))],
            priority: 0,
            both,
            mode: Mode::Enforce,
            log: false,
            expires_at: None,
            schedule: None,
            comment: String::new(),
        });
    }
}

type Place = ((IpNet, IpNet), (Ipv4Addr, Ipv6Addr));

/// 10.(42 + h).l.0/24 and fd42:0:0:hl::/64, with /16s and /56s around them.
fn dense(number: u32) -> Place {
    let (high, low) = (FIRST as u8 + (number >> 8) as u8, number as u8);
    let net4 = Ipv4Addr::new(10, high, low, 0);
    let net6 = Ipv6Addr::new(0xfd42, 0, 0, number as u16, 0, 0, 0, 0);
    let (bits4, bits6) = if low == 0 { (16, 56) } else { (24, 64) };
    let hosts = (Ipv4Addr::from(u32::from(net4) + 1), Ipv6Addr::from(u128::from(net6) + 1));
    ((IpNet::new_assert(net4.into(), bits4), IpNet::new_assert(net6.into(), bits6)), hosts)
}

fn sparse(draw: &mut Draw, taken: &mut std::collections::BTreeSet<u32>) -> Place {
    let net4 = loop {
        let third = draw.below(1 << 16) as u32;
        // Not among the subject's.
        if third >> 8 != FIRST && taken.insert(third) {
            break Ipv4Addr::from(10 << 24 | third << 8);
        }
    };
    // Anywhere in the /32 but where the subject is.
    let low = u128::from(draw.word()) | u128::from(draw.word() >> 32 | 1 << 31) << 64;
    let host6 = Ipv6Addr::from(0xfd42 << 112 | low);
    let nets = (IpNet::new_assert(net4.into(), 24), IpNet::new_assert(host6.into(), 128));
    (nets, (Ipv4Addr::from(u32::from(net4) + 1), host6))
}

/// The ports that rules about the subject name.
pub fn ports() -> impl Iterator<Item = u16> {
    (0..PORTS).map(group_port)
}

fn group_port(group: u32) -> u16 {
    PORT + (group % PORTS) as u16 * 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_partner_for_each_rule() {
        for rules in [10, 100, 1_000, 10_000] {
            let scale = Scale::new(Size::ports(rules, Family::V4)).expect("a network");
            assert_eq!(scale.partners.len(), rules as usize);
            assert_eq!(scale.network.rules().len(), rules.min(PORT_GROUPS) as usize);
        }
    }
    use ebpf_common::INGRESS;
    use node::lower::{RuleSlots, lower};

    #[test]
    fn partners_are_treated_as_they_say() {
        for layout in [Layout::Dense, Layout::Sparse] {
            let size = Size::mixed(300, 10, layout, Families::Both);
            let scale = Scale::new(size).expect("a network");
            assert_eq!((scale.network.cidrs().len(), scale.network.rules().len()), (300, 3_000));
            let tables = lower(&scale.slice(1).expect("a slice"), &mut RuleSlots::new()).expect("tables");
            for (family, partner) in
                [Family::V4, Family::V6].into_iter().flat_map(|family| scale.partners.iter().map(move |p| (family, p)))
            {
                let outcome = tables.verdict(&scale.flow(partner, family), INGRESS);
                let expected = match partner.treatment {
                    Treatment::AnyService | Treatment::Port => (true, false),
                    Treatment::RecordedPort => (true, true),
                    Treatment::Replies => (false, false),
                };
                assert_eq!((outcome.passes, outcome.record), expected, "{family:?} {partner:?}");
            }
        }
    }
}
