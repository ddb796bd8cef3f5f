//! Why a verdict is what it is, in words. The verdict is the interpreter's.

use std::fmt;
use std::net::IpAddr;

use crate::interpret::{End, interpret, matching, path};
use crate::network::{DefaultPolicy, Network};
use crate::object::id::CidrId;
use crate::object::rule::Rule;
use crate::object::service;
use crate::object::verdict::{Flow, Reason, Verdict};

/// The verdict of one flow with what led to it. `Display` gives it as lines of a label and a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    pub verdict: Verdict,
    /// The deepest cidrs of the two ends.
    pub source_cidr: Option<CidrId>,
    pub destination_cidr: Option<CidrId>,
    /// Labels and texts, in the order of docs/POLICY.md, section 2.
    pub lines: Vec<(&'static str, String)>,
}

/// Rules that matched but did not decide, in a text.
const LISTED: usize = 8;

/// Explains what the policy says of a flow.
pub fn explain(network: &Network, flow: &Flow) -> Explanation {
    let verdict = interpret(network, flow);
    let (source, destination) = (End::of(network, flow.source), End::of(network, flow.destination));
    let deepest = |end: &Option<End>| end.as_ref().map(|end| end.lineage[0]);
    let mut lines = vec![
        ("source", end_text(network, flow.source, source.as_ref())),
        ("destination", end_text(network, flow.destination, destination.as_ref())),
        ("service", service::point_name(flow.protocol, flow.port)),
    ];
    if let (Some(source), Some(destination)) = (&source, &destination) {
        let mut rules: Vec<&Rule> = matching(network, flow, source, destination).collect();
        rules.sort_by_key(|rule| (Some(rule.id) != verdict.rule, std::cmp::Reverse(rule.priority), &rule.name));
        let (shown, more) = rules.split_at(rules.len().min(LISTED));
        for rule in shown {
            let decides = if Some(rule.id) == verdict.rule { ", decides" } else { "" };
            lines.push(("rule", format!("{}{decides}", rule_text(network, rule))));
        }
        match (rules.is_empty(), more.len()) {
            (true, _) => lines.push(("rule", "none matches".to_owned())),
            (false, 0) => {}
            (false, more) => lines.push(("rule", format!("and {more} more that match"))),
        }
        if rules.is_empty() {
            lines.push(("default", default_text(network, source, destination)));
        }
    }
    lines.push(("verdict", verdict_text(network, verdict)));
    Explanation { verdict, source_cidr: deepest(&source), destination_cidr: deepest(&destination), lines }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = self.lines.iter().map(|(label, text)| format!("{label:<12} {text}"));
        f.write_str(&lines.by_ref().collect::<Vec<_>>().join("\n"))
    }
}

fn end_text(network: &Network, address: IpAddr, end: Option<&End>) -> String {
    let Some(end) = end else {
        return format!("{address}, in no cidr");
    };
    let holder = network.nodes().values().find(|node| node.addresses.contains(address));
    let holder = holder.map_or_else(String::new, |node| format!(", node `{}` ({})", node.name, node.state));
    format!("{address}{holder}, in {}", lineage_text(network, &end.lineage, " in "))
}

fn rule_text(network: &Network, rule: &Rule) -> String {
    fn joined<T: fmt::Display>(items: impl Iterator<Item = T>) -> String {
        items.map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
    }
    let side =
        |selectors: &std::collections::BTreeSet<_>| joined(selectors.iter().filter_map(|s| network.selector_spec(s)));
    let services = joined(rule.services.iter().filter_map(|service| network.service_spec(service)));
    let both = if rule.both { ", both ways" } else { "" };
    let (name, action, from, to) = (&rule.name, rule.action, side(&rule.from), side(&rule.to));
    format!("`{name}`, priority {}: {action} from {from} to {to} services {services}{both}", rule.priority)
}

fn default_text(network: &Network, source: &End, destination: &End) -> String {
    if network.default() == DefaultPolicy::Deny {
        return "deny".to_owned();
    }
    let Some(path) = path(source, destination) else {
        return "lineage: neither cidr is an ancestor of the other".to_owned();
    };
    let text = lineage_text(network, path, " - ");
    match path.iter().filter_map(|id| network.cidrs().get(id)).find(|cidr| cidr.isolated) {
        Some(cidr) => format!("lineage: {text}, but cidr `{}` is isolated", cidr.name),
        None => format!("lineage: {text}"),
    }
}

fn lineage_text(network: &Network, path: &[CidrId], between: &str) -> String {
    let names = path.iter().filter_map(|id| network.cidrs().get(id)).map(|cidr| format!("cidr `{}`", cidr.name));
    names.collect::<Vec<_>>().join(between)
}

fn verdict_text(network: &Network, verdict: Verdict) -> String {
    let rule = verdict.rule.and_then(|id| network.rules().get(&id));
    match (verdict.reason, rule) {
        (Reason::Rule, Some(rule)) => format!("{}, by rule `{}`", verdict.action, rule.name),
        (reason, _) => format!("{}, {reason}", verdict.action),
    }
}
