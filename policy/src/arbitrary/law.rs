//! Networks that must mean the same as another, or more, or less: what the laws of docs/POLICY.md are tested with.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::{
    CidrId, CidrName, DefaultPolicy, Flow, Network, NetworkParts, Prefixes, RuleId, Selector, Service, ServiceRef,
};

/// The same objects, with the rules in the opposite order of ids, which is the order in which they are kept. The ids that
/// rules had, each with the id that it has now.
pub fn reordered(network: &Network) -> (Network, Vec<(RuleId, RuleId)>) {
    let mut parts = network.to_parts();
    let ids: Vec<RuleId> = parts.rules.iter().map(|rule| rule.id).collect();
    let moved: Vec<(RuleId, RuleId)> = ids.iter().copied().zip(ids.iter().rev().copied()).collect();
    for (rule, (_, id)) in parts.rules.iter_mut().zip(&moved) {
        rule.id = *id;
    }
    parts.rules.reverse();
    parts.nodes.reverse();
    parts.cidrs.reverse();
    (Network::from_parts(parts).expect("the same objects"), moved)
}

/// Every object with another name. `keeps`: the names of rules sort as before, else the other way round.
pub fn renamed(network: &Network, keeps: bool) -> Network {
    let mut parts = network.to_parts();
    let named = |name: &str| format!("z{name}");
    parts.cidrs.iter_mut().for_each(|cidr| cidr.name = named(cidr.name.as_str()).parse().expect("a name"));
    parts.nodes.iter_mut().for_each(|node| node.name = named(node.name.as_str()).parse().expect("a name"));
    parts.groups.iter_mut().for_each(|group| group.name = named(group.name.as_str()).parse().expect("a name"));
    parts.services.iter_mut().for_each(|service| service.name = named(service.name.as_str()).parse().expect("a name"));
    let mut names: Vec<_> = parts.rules.iter().map(|rule| rule.name.clone()).collect();
    names.sort();
    for rule in &mut parts.rules {
        let rank = names.iter().position(|name| *name == rule.name).unwrap_or(0);
        let rank = if keeps { rank } else { names.len() - rank };
        rule.name = format!("rule-{rank:05}").parse().expect("a name");
    }
    Network::from_parts(parts).expect("the same objects")
}

/// One rule with more selectors, services or directions.
pub fn widened(
    network: &Network,
    rule: RuleId,
    from: Option<IpNet>,
    to: bool,
    both: bool,
    service: Service,
) -> Network {
    let mut parts = network.to_parts();
    for rule in parts.rules.iter_mut().filter(|other| other.id == rule) {
        rule.from.extend(from.map(Selector::Prefix));
        if to {
            rule.to.insert(Selector::Any);
        }
        rule.both |= both;
        rule.services.push(ServiceRef::Literal(service.clone()));
    }
    Network::from_parts(parts).expect("a wider rule is a rule")
}

/// Every literal prefix in a rule as its two halves.
pub fn halved_selectors(network: &Network) -> Network {
    let mut parts = network.to_parts();
    let halves = |selectors: &BTreeSet<Selector>| -> BTreeSet<Selector> {
        let split = |selector: &Selector| match selector {
            Selector::Prefix(prefix) => match halves(*prefix) {
                Some([low, high]) => vec![Selector::Prefix(low), Selector::Prefix(high)],
                None => vec![*selector],
            },
            other => vec![*other],
        };
        selectors.iter().flat_map(split).collect()
    };
    for rule in &mut parts.rules {
        (rule.from, rule.to) = (halves(&rule.from), halves(&rule.to));
    }
    Network::from_parts(parts).expect("the same addresses")
}

/// One cidr as its two halves, and whatever named it names both. None: no tree allows it, or a node would have an address
/// in each.
pub fn split(network: &Network, cidr: CidrId) -> Option<Network> {
    let mut parts = network.to_parts();
    let at = parts.cidrs.iter().position(|other| other.id == cidr)?;
    let [low, high]: [Vec<IpNet>; 2] = {
        let pairs = parts.cidrs[at].prefixes.iter().map(halves).collect::<Option<Vec<_>>>()?;
        [pairs.iter().map(|[low, _]| *low).collect(), pairs.iter().map(|[_, high]| *high).collect()]
    };
    let other = CidrId(parts.next_id);
    parts.next_id += 1;
    let mut upper = parts.cidrs[at].clone();
    (upper.id, upper.name) = (other, free_name(&parts)?);
    upper.prefixes = Prefixes::from_nets(high).ok()?;
    parts.cidrs[at].prefixes = Prefixes::from_nets(low).ok()?;
    parts.cidrs.push(upper);
    let also = |selectors: &mut BTreeSet<Selector>| {
        if selectors.contains(&Selector::Cidr(cidr)) {
            selectors.insert(Selector::Cidr(other));
        }
    };
    for rule in &mut parts.rules {
        also(&mut rule.from);
        also(&mut rule.to);
    }
    let both = |cidrs: &mut BTreeSet<CidrId>| {
        if cidrs.contains(&cidr) {
            cidrs.insert(other);
        }
    };
    parts.groups.iter_mut().for_each(|group| both(&mut group.cidrs));
    parts.nodes.iter_mut().for_each(|node| both(&mut node.gateway_for));
    Network::from_parts(parts).ok()
}

/// One cidr given up to its parent; rules that named it name its prefixes and those of its descendants, which may have one
/// of the family that the cidr has not. None: it has no parent that holds all of it, or something else needs it.
pub fn merged(network: &Network, cidr: CidrId) -> Option<Network> {
    let parent = &network.cidrs()[&network.parent_of(cidr)?];
    let mut own = network.cidrs()[&cidr].prefixes.iter();
    if !own.all(|prefix| parent.prefixes.iter().any(|outer| outer.contains(&prefix))) {
        return None;
    }
    let within = network.cidrs().values().filter(|other| is_within(network, other.id, cidr));
    let prefixes: Vec<IpNet> = within.flat_map(|other| other.prefixes.iter()).collect();
    let mut parts = network.to_parts();
    let is_named = parts.groups.iter().any(|group| group.cidrs.contains(&cidr))
        || parts.nodes.iter().any(|node| node.gateway_for.contains(&cidr) || node.gateway_for.contains(&parent.id));
    if is_named {
        return None;
    }
    parts.cidrs.retain(|other| other.id != cidr);
    let literal = |selectors: &mut BTreeSet<Selector>| {
        if selectors.remove(&Selector::Cidr(cidr)) {
            selectors.extend(prefixes.iter().copied().map(Selector::Prefix));
        }
    };
    for rule in &mut parts.rules {
        literal(&mut rule.from);
        literal(&mut rule.to);
    }
    Network::from_parts(parts).ok()
}

/// Whether lineage, which goes by the cidrs themselves, may say another thing of a flow after `cidr` was split or merged.
/// Rules may not.
pub fn lineage_may_differ(network: &Network, cidr: CidrId, flow: &Flow, is_split: bool) -> bool {
    if network.default() != DefaultPolicy::Lineage {
        return false;
    }
    let ends = [flow.source, flow.destination].map(|address| network.cidr_of(address).map(|own| own.id));
    let inside = ends.map(|own| own.is_some_and(|own| is_within(network, own, cidr)));
    let whole = &network.cidrs()[&cidr];
    if is_split {
        // The halves become strangers. No path between two descendants leads through the cidr itself.
        let mut halves = whole.prefixes.iter().filter_map(halves).flatten();
        let in_one_half = halves.any(|half| half.contains(&flow.source) && half.contains(&flow.destination));
        return inside == [true; 2] && ends.contains(&Some(cidr)) && !in_one_half;
    }
    let Some(parent) = network.parent_of(cidr).map(|parent| &network.cidrs()[&parent]) else { return false };
    if whole.isolated != parent.isolated {
        return inside != [false; 2];
    }
    // What was in the cidr itself is in the parent now, and no stranger to the cidr's siblings and what is in them.
    let is_of_sibling =
        |own: CidrId| own != parent.id && is_within(network, own, parent.id) && !is_within(network, own, cidr);
    !whole.isolated && ends.contains(&Some(cidr)) && ends.iter().flatten().any(|own| is_of_sibling(*own))
}

/// Whether one cidr is another or a descendant of it.
fn is_within(network: &Network, inner: CidrId, outer: CidrId) -> bool {
    network.lineage_of(inner).contains(&outer)
}

fn halves(prefix: IpNet) -> Option<[IpNet; 2]> {
    let mut halves = prefix.subnets(prefix.prefix_len().checked_add(1)?).ok()?;
    Some([halves.next()?, halves.next()?])
}

fn free_name(parts: &NetworkParts) -> Option<CidrName> {
    let is_free = |name: &CidrName| parts.cidrs.iter().all(|cidr| cidr.name != *name);
    (0..).map(|number| format!("half{number}").parse()).find_map(|name| name.ok().filter(is_free))
}
