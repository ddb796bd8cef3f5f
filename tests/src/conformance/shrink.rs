//! A network in which something fails, made as small as it can be while the same thing fails; and networks in words.

use std::fmt::{self, Write};

use policy::{
    CidrId, DefaultPolicy, GroupId, Network, NetworkParts, NodeId, Prefixes, RuleSpec, Selector, Service, ServiceId,
    ServiceRef,
};

/// The least network found, by taking away one object or one part of an object after the other, for as long as `fails`
/// says that it still fails. What no network may lack is left.
pub fn shrink(network: Network, mut fails: impl FnMut(&Network) -> bool) -> Network {
    let mut least = network;
    loop {
        let parts = least.to_parts();
        let smaller = steps(&parts).find_map(|step| {
            let mut parts = parts.clone();
            step(&mut parts);
            if parts == least.to_parts() {
                return None;
            }
            Network::from_parts(parts).ok().filter(|network| fails(network))
        });
        match smaller {
            Some(smaller) => least = smaller,
            None => return least,
        }
    }
}

type Step = Box<dyn Fn(&mut NetworkParts)>;

/// What can be taken away, the most telling first.
fn steps(parts: &NetworkParts) -> impl Iterator<Item = Step> + use<> {
    let rules = parts.rules.len();
    let mut steps: Vec<Step> = Vec::new();
    let mut step = |step: Step| steps.push(step);
    for half in [0..rules / 2, rules / 2..rules].into_iter().filter(|half| half.len() > 1) {
        step(Box::new(move |parts| drop(parts.rules.drain(half.clone()))));
    }
    for at in 0..rules {
        step(Box::new(move |parts| drop(parts.rules.remove(at))));
    }
    step(Box::new(|parts| parts.default = DefaultPolicy::Deny));
    for group in parts.groups.iter().map(|group| group.id) {
        step(Box::new(move |parts| remove_group(parts, group)));
    }
    for service in parts.services.iter().map(|service| service.id) {
        step(Box::new(move |parts| remove_service(parts, service)));
    }
    for node in parts.nodes.iter().map(|node| node.id) {
        step(Box::new(move |parts| remove_node(parts, node)));
    }
    for cidr in parts.cidrs.iter().map(|cidr| cidr.id) {
        step(Box::new(move |parts| remove_cidr(parts, cidr)));
    }
    for at in 0..parts.cidrs.len() {
        step(Box::new(move |parts| parts.cidrs[at].isolated = false));
        for v4 in [true, false] {
            step(Box::new(move |parts| one_family(&mut parts.cidrs[at].prefixes, v4)));
        }
    }
    for at in 0..parts.nodes.len() {
        step(Box::new(move |parts| parts.nodes[at].gateway_for.clear()));
    }
    for (at, rule) in parts.rules.iter().enumerate() {
        step(Box::new(move |parts| parts.rules[at].both = false));
        step(Box::new(move |parts| parts.rules[at].log = false));
        step(Box::new(move |parts| parts.rules[at].priority = 0));
        step(Box::new(move |parts| parts.rules[at].comment.clear()));
        // What names nothing keeps no object alive.
        step(Box::new(move |parts| parts.rules[at].from = [Selector::Any].into()));
        step(Box::new(move |parts| parts.rules[at].to = [Selector::Any].into()));
        step(Box::new(move |parts| parts.rules[at].services = vec![ServiceRef::Literal(Service::ANY)]));
        for selector in rule.from.iter().copied() {
            step(Box::new(move |parts| parts.rules[at].from.retain(|other| *other != selector)));
        }
        for selector in rule.to.iter().copied() {
            step(Box::new(move |parts| parts.rules[at].to.retain(|other| *other != selector)));
        }
        for service in 0..rule.services.len() {
            step(Box::new(move |parts| drop(parts.rules[at].services.remove(service))));
        }
    }
    steps.into_iter()
}

fn remove_cidr(parts: &mut NetworkParts, id: CidrId) {
    parts.cidrs.retain(|cidr| cidr.id != id);
    parts.groups.iter_mut().for_each(|group| group.cidrs.retain(|other| *other != id));
    parts.nodes.iter_mut().for_each(|node| node.gateway_for.retain(|other| *other != id));
    remove_selector(parts, Selector::Cidr(id));
}

fn remove_node(parts: &mut NetworkParts, id: NodeId) {
    parts.nodes.retain(|node| node.id != id);
    parts.groups.iter_mut().for_each(|group| group.nodes.retain(|other| *other != id));
    remove_selector(parts, Selector::Node(id));
}

fn remove_group(parts: &mut NetworkParts, id: GroupId) {
    parts.groups.retain(|group| group.id != id);
    remove_selector(parts, Selector::Group(id));
}

fn remove_service(parts: &mut NetworkParts, id: ServiceId) {
    parts.services.retain(|service| service.id != id);
    for rule in &mut parts.rules {
        rule.services.retain(|service| *service != ServiceRef::Named(id));
    }
}

fn remove_selector(parts: &mut NetworkParts, selector: Selector) {
    for rule in &mut parts.rules {
        rule.from.remove(&selector);
        rule.to.remove(&selector);
    }
}

fn one_family(prefixes: &mut Prefixes, v4: bool) {
    let (kept_v4, kept_v6) = if v4 { (prefixes.v4(), None) } else { (None, prefixes.v6()) };
    if let Ok(one) = Prefixes::new(kept_v4, kept_v6) {
        *prefixes = one;
    }
}

/// A network's objects, a line for each, in the words of docs/POLICY.md.
pub struct InWords<'a>(pub &'a Network);

impl fmt::Display for InWords<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let network = self.0;
        writeln!(f, "roots {}, default {}", network.roots(), network.default())?;
        for cidr in network.cidrs().values() {
            let flag = |set, word| if set { word } else { "" };
            let (isolated, external) = (flag(cidr.isolated, " isolated"), flag(cidr.external, " external"));
            writeln!(f, "cidr {} {}{isolated}{external}", cidr.name, cidr.prefixes)?;
        }
        for node in network.nodes().values() {
            write!(f, "node {} {} {}", node.name, node.addresses, node.state)?;
            for cidr in node.gateway_for.iter().filter_map(|id| network.cidrs().get(id)) {
                write!(f, " gateway-for {}", cidr.name)?;
            }
            writeln!(f)?;
        }
        for group in network.groups().values() {
            writeln!(f, "group {}: {}", group.name, list(network.member_specs(group)))?;
        }
        for service in network.services().values() {
            writeln!(f, "service {}: {}", service.name, list(&service.services))?;
        }
        for rule in network.rules().values() {
            let RuleSpec { name, action, from, to, services, priority, both, log, comment: _ } = RuleSpec {
                name: rule.name.clone(),
                action: rule.action,
                from: rule.from.iter().filter_map(|selector| network.selector_spec(selector)).collect(),
                to: rule.to.iter().filter_map(|selector| network.selector_spec(selector)).collect(),
                services: rule.services.iter().filter_map(|service| network.service_spec(service)).collect(),
                priority: rule.priority,
                both: rule.both,
                log: rule.log,
                comment: String::new(),
            };
            let more = [(both, " both"), (log, " log")];
            let more: String = more.iter().filter(|(set, _)| *set).map(|(_, word)| *word).collect();
            writeln!(
                f,
                "rule {name}: {action} from {} to {} services {} priority {priority}{more}",
                list(from),
                list(to),
                list(services)
            )?;
        }
        Ok(())
    }
}

fn list(items: impl IntoIterator<Item = impl fmt::Display>) -> String {
    let mut text = String::new();
    for item in items {
        let separator = if text.is_empty() { "" } else { " " };
        let _infallible = write!(text, "{separator}{item}");
    }
    text
}

impl fmt::Debug for InWords<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
