//! The policy's reference: docs/POLICY.md, section 2, step by step. Slow and obvious on purpose: it walks over all objects,
//! uses none of their indices, and shares nothing with the compiler, which the tests hold against it.

use std::net::IpAddr;

use crate::network::{DefaultPolicy, Network};
use crate::object::cidr::Cidr;
use crate::object::id::CidrId;
use crate::object::rule::{Action, Mode, Rule};
use crate::object::selector::Selector;
use crate::object::service::ServiceRef;
use crate::object::verdict::{Flow, Verdict};

/// What the policy says of a new flow.
pub fn interpret(network: &Network, flow: &Flow) -> Verdict {
    // 1. Both ends lie in a cidr.
    let Some(source) = End::of(network, flow.source) else {
        return Verdict::UNKNOWN_SOURCE;
    };
    let Some(destination) = End::of(network, flow.destination) else {
        return Verdict::UNKNOWN_DESTINATION;
    };

    // 2. The rules that match.
    let matching: Vec<&Rule> = matching(network, flow, &source, &destination).collect();

    // 3. Among those of the highest priority, deny if one denies; the first by name decides.
    if let Some(highest) = matching.iter().map(|rule| rule.priority).max() {
        let of_highest = || matching.iter().filter(|rule| rule.priority == highest);
        let action = match of_highest().any(|rule| rule.action == Action::Deny) {
            true => Action::Deny,
            false => Action::Allow,
        };
        let deciding = of_highest().filter(|rule| rule.action == action).min_by_key(|rule| &rule.name);
        return deciding.map_or(Verdict::NO_RULE, |rule| Verdict::of_rule(action, rule.id));
    }

    // 4. The default.
    if network.default() == DefaultPolicy::Lineage && lineage(network, &source, &destination) {
        return Verdict::LINEAGE;
    }

    // 5.
    Verdict::NO_RULE
}

/// The enforced rules that match a flow between two ends, in no order.
pub(crate) fn matching<'a>(
    network: &'a Network,
    flow: &'a Flow,
    source: &'a End,
    destination: &'a End,
) -> impl Iterator<Item = &'a Rule> {
    network.rules().values().filter(move |rule| {
        let selects = |from: &End, to: &End| {
            rule.from.iter().any(|selector| from.is_selected(network, selector))
                && rule.to.iter().any(|selector| to.is_selected(network, selector))
        };
        rule.mode == Mode::Enforce
            && rule.services.iter().any(|service| service_matches(network, service, flow))
            && (selects(source, destination) || (rule.both && selects(destination, source)))
    })
}

/// One end of a flow.
#[derive(Debug)]
pub(crate) struct End {
    address: IpAddr,
    /// The deepest cidr that contains it, that one's parent, and so on to the top.
    pub(crate) lineage: Vec<CidrId>,
}

impl End {
    /// None if the address lies in no cidr.
    pub(crate) fn of(network: &Network, address: IpAddr) -> Option<Self> {
        let prefixes = network.cidrs().values().flat_map(|cidr| cidr.prefixes.iter().map(move |prefix| (prefix, cidr)));
        let containing = prefixes.filter(|(prefix, _)| prefix.contains(&address));
        let (_, deepest) = containing.max_by_key(|(prefix, _)| prefix.prefix_len())?;
        let mut lineage = vec![deepest.id];
        let mut cidr = deepest;
        while let Some(parent) = parent(network, cidr) {
            lineage.push(parent.id);
            cidr = parent;
        }
        Some(Self { address, lineage })
    }

    fn is_selected(&self, network: &Network, selector: &Selector) -> bool {
        // A cidr includes its descendants.
        let in_cidr = |id: &CidrId| self.lineage.contains(id);
        match selector {
            Selector::Any => true,
            Selector::Cidr(id) => in_cidr(id),
            Selector::Node(id) => network.nodes()[id].addresses.contains(self.address),
            Selector::Group(id) => {
                let group = &network.groups()[id];
                group.nodes.iter().any(|id| network.nodes()[id].addresses.contains(self.address))
                    || group.cidrs.iter().any(in_cidr)
            }
            Selector::Prefix(prefix) => prefix.contains(&self.address),
        }
    }
}

/// The smallest other cidr that contains a prefix of this one, of whichever family.
fn parent<'a>(network: &'a Network, cidr: &Cidr) -> Option<&'a Cidr> {
    cidr.prefixes.iter().find_map(|own| {
        let others = network.cidrs().values().filter(|other| other.id != cidr.id);
        let prefixes = others.flat_map(|other| other.prefixes.iter().map(move |prefix| (prefix, other)));
        let containing = prefixes.filter(|(prefix, _)| prefix.contains(&own));
        containing.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, other)| other)
    })
}

fn service_matches(network: &Network, service: &ServiceRef, flow: &Flow) -> bool {
    match service {
        ServiceRef::Literal(service) => service.matches(flow.protocol, flow.port),
        ServiceRef::Named(id) => {
            network.services()[id].services.iter().any(|service| service.matches(flow.protocol, flow.port))
        }
    }
}

/// Whether one end's cidr is the other's or an ancestor of it, and none on the path between them is isolated.
fn lineage(network: &Network, source: &End, destination: &End) -> bool {
    path(source, destination).is_some_and(|path| path.iter().all(|id| !network.cidrs()[id].isolated))
}

/// The cidrs between the two ends, both included, if one is the other or an ancestor of it.
pub(crate) fn path<'a>(source: &'a End, destination: &'a End) -> Option<&'a [CidrId]> {
    let up = |lower: &'a End, upper: &End| {
        let steps = lower.lineage.iter().position(|id| *id == upper.lineage[0])?;
        Some(&lower.lineage[..=steps])
    };
    up(source, destination).or_else(|| up(destination, source))
}
