//! Random changes speak of random names. Here they are made to speak of what a network has, so that most are taken.

use std::hash::{DefaultHasher, Hash, Hasher};

use ipnet::IpNet;

use crate::{
    Change, CidrName, GroupName, MemberSpec, Network, NodeName, Prefixes, RuleName, SelectorSpec, ServiceName,
    ServiceSpec,
};

/// The change with names of objects that are there, and cidrs where the roots allow them.
pub(super) fn fit(network: &Network, change: Change) -> Change {
    let fit = Fit { network };
    match change {
        Change::AddCidr { name, prefixes, isolated, external: _ } => {
            let (prefixes, external) = fit.prefixes(prefixes);
            Change::AddCidr { name, prefixes, isolated, external }
        }
        Change::RenameCidr { from, to } => Change::RenameCidr { from: fit.cidr(from), to },
        Change::MoveCidr { name, prefixes } => {
            Change::MoveCidr { name: fit.cidr(name), prefixes: fit.prefixes(prefixes).0 }
        }
        Change::SetCidr { name, isolated } => Change::SetCidr { name: fit.cidr(name), isolated },
        Change::DeleteCidr { name } => Change::DeleteCidr { name: fit.cidr(name) },
        Change::AddNode { name, cidr, addresses, groups, gateway_for } => Change::AddNode {
            name,
            cidr: fit.cidr_where(cidr, false),
            addresses,
            groups: groups.into_iter().map(|name| fit.group(name)).collect(),
            gateway_for: match network.cidrs().values().any(|cidr| cidr.external) {
                true => gateway_for.into_iter().map(|name| fit.cidr_where(name, true)).collect(),
                false => Vec::new(),
            },
        },
        Change::ActivateNode { name, public_key } => Change::ActivateNode { name: fit.node(name), public_key },
        Change::RenameNode { from, to } => Change::RenameNode { from: fit.node(from), to },
        Change::DisableNode { name } => Change::DisableNode { name: fit.node(name) },
        Change::EnableNode { name } => Change::EnableNode { name: fit.node(name) },
        Change::DeleteNode { name } => Change::DeleteNode { name: fit.node(name) },
        Change::SetEndpoint { name, endpoint } => Change::SetEndpoint { name: fit.node(name), endpoint },
        Change::AddGroup { name, members } => {
            let mut members: Vec<MemberSpec> = members.into_iter().map(|member| fit.member(member)).collect();
            members.sort();
            members.dedup();
            Change::AddGroup { name, members }
        }
        Change::RenameGroup { from, to } => Change::RenameGroup { from: fit.group(from), to },
        Change::DeleteGroup { name } => Change::DeleteGroup { name: fit.group(name) },
        Change::AddMember { group, member } => {
            Change::AddMember { group: fit.group(group), member: fit.member(member) }
        }
        Change::RemoveMember { group, member } => {
            let group = fit.group(group);
            let members = network.group_named(&group).map(|group| network.member_specs(group)).unwrap_or_default();
            let member = pick(&member, members.iter()).cloned().unwrap_or(member);
            Change::RemoveMember { group, member }
        }
        Change::AddRule(mut rule) => {
            for selector in rule.from.iter_mut().chain(&mut rule.to) {
                *selector = fit.selector(selector.clone());
            }
            for service in &mut rule.services {
                if let ServiceSpec::Named(name) = service {
                    *name = fit.service(name.clone());
                }
            }
            Change::AddRule(rule)
        }
        Change::DeleteRule { name } => Change::DeleteRule { name: fit.rule(name) },
        Change::DeleteService { name } => Change::DeleteService { name: fit.service(name) },
        same @ (Change::SetDefault(_) | Change::AddService { .. }) => same,
    }
}

struct Fit<'a> {
    network: &'a Network,
}

impl Fit<'_> {
    fn cidr(&self, name: CidrName) -> CidrName {
        known(name, self.network.cidrs().values().map(|cidr| &cidr.name))
    }

    fn cidr_where(&self, name: CidrName, external: bool) -> CidrName {
        let alike = self.network.cidrs().values().filter(|cidr| cidr.external == external);
        known(name, alike.map(|cidr| &cidr.name))
    }

    fn node(&self, name: NodeName) -> NodeName {
        known(name, self.network.nodes().values().map(|node| &node.name))
    }

    fn group(&self, name: GroupName) -> GroupName {
        known(name, self.network.groups().values().map(|group| &group.name))
    }

    fn rule(&self, name: RuleName) -> RuleName {
        known(name, self.network.rules().values().map(|rule| &rule.name))
    }

    fn service(&self, name: ServiceName) -> ServiceName {
        known(name, self.network.services().values().map(|service| &service.name))
    }

    fn member(&self, member: MemberSpec) -> MemberSpec {
        match member {
            MemberSpec::Node(name) => MemberSpec::Node(self.node(name)),
            MemberSpec::Cidr(name) => MemberSpec::Cidr(self.cidr(name)),
        }
    }

    fn selector(&self, selector: SelectorSpec) -> SelectorSpec {
        match selector {
            SelectorSpec::Cidr(name) => SelectorSpec::Cidr(self.cidr(name)),
            SelectorSpec::Node(_) if self.network.nodes().is_empty() => SelectorSpec::Any,
            SelectorSpec::Node(name) => SelectorSpec::Node(self.node(name)),
            SelectorSpec::Group(_) if self.network.groups().is_empty() => SelectorSpec::Any,
            SelectorSpec::Group(name) => SelectorSpec::Group(self.group(name)),
            same @ (SelectorSpec::Any | SelectorSpec::Prefix(_)) => same,
        }
    }

    /// The prefixes inside the roots if there are any, else those outside, which are external.
    fn prefixes(&self, prefixes: Prefixes) -> (Prefixes, bool) {
        let roots = self.network.roots();
        let inside: Vec<IpNet> =
            prefixes.iter().filter(|prefix| roots.iter().any(|root| root.contains(prefix))).collect();
        let apart = |prefix: &IpNet| !roots.iter().any(|root| root.contains(prefix) || prefix.contains(&root));
        let (chosen, external) = match inside.is_empty() {
            true => (prefixes.iter().filter(apart).collect(), true),
            false => (inside, false),
        };
        (Prefixes::from_nets(chosen).unwrap_or(prefixes), external)
    }
}

/// The name if it is known, else one that is.
fn known<'a, T: Hash + Ord + Clone + 'a>(name: T, known: impl Iterator<Item = &'a T>) -> T {
    let known: Vec<&T> = known.collect();
    match known.contains(&&name) {
        true => name,
        false => pick(&name, known.into_iter()).cloned().unwrap_or(name),
    }
}

/// One of the items, always the same for the same seed.
fn pick<'a, T>(seed: &impl Hash, items: impl Iterator<Item = &'a T>) -> Option<&'a T> {
    let items: Vec<&T> = items.collect();
    let mut hasher = DefaultHasher::new();
    seed.hash(&mut hasher);
    let count = u64::try_from(items.len()).ok().filter(|count| *count > 0)?;
    items.get(usize::try_from(hasher.finish() % count).ok()?).copied()
}
