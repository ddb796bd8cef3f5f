//! The policy in force as the kernel's tables say it, held against what should be in force.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ebpf_common::counter::{Counter, PairKey};
use ebpf_common::table::{ALLOW, Decision, LOCAL, LOG, NO_RULE_SLOT, cell_index};
use ebpf_common::{EGRESS, INGRESS, reason};
use ipnet::IpNet;
use policy::{CidrId, Slice};

use super::status::{Context, status, unanswered};
use super::{Direction, End, Entry, Policy, Unanswered};
use crate::enforce::Enforcer;
use crate::enforce::Intent;
use crate::enforce::reconcile::Observed;
use crate::kernel::LinkState;
use crate::lower::{TableCell, Tables};

/// `nodectl policy show`.
pub fn policy(enforcer: &mut Enforcer, context: &Context) -> Result<Policy, Unanswered> {
    let status = status(enforcer, context)?;
    if status.generation == 0 {
        let differences = enforcer.intent.as_ref().map(|intent| {
            format!(
                "the kernel has no policy and denies everything; revision {} should be in force",
                intent.slice.revision
            )
        });
        return Ok(Policy { status, differences: differences.into_iter().collect(), entries: Vec::new() });
    }
    let seen = enforcer.datapath.read_tables().map_err(unanswered)?;
    let counters = enforcer.datapath.counters(&[]).map_err(unanswered)?;
    let observed = enforcer.observe().map_err(unanswered)?;
    let intent = enforcer.intent.as_ref();
    let differences = match intent {
        Some(intent) => differences(intent, &seen, &observed),
        None => vec![match enforcer.outdated {
            Some(held) => format!(
                "revision {} is newer than revision {held}, which is on disk; it stays until the controller answers",
                status.revision
            ),
            None => "this is an earlier daemon's policy; there is none to hold it against until the controller answers"
                .to_owned(),
        }],
    };
    let entries = Entries::new(intent, &seen, counters.pairs).collect();
    Ok(Policy { status, differences, entries })
}

fn differences(intent: &Intent, seen: &Tables, observed: &Observed) -> Vec<String> {
    let mut differences = intent.tables.differences(seen);
    for (direction, attached) in [
        ("egress", observed.datapath.as_ref().is_some_and(|datapath| datapath.egress)),
        ("ingress", observed.datapath.as_ref().is_some_and(|datapath| datapath.ingress)),
    ] {
        if !attached {
            differences.push(format!("the program is not attached, or not first, at {direction}"));
        }
    }
    if !observed.link.as_ref().is_some_and(|link: &LinkState| link.up) {
        differences.push("the interface is not up".to_owned());
    }
    let wanted: BTreeMap<_, _> =
        intent.slice.peers.values().map(|peer| (peer.public_key, (&peer.name, &*peer.allowed_ips))).collect();
    let device = observed.device.clone().unwrap_or_default();
    for (key, (name, allowed_ips)) in &wanted {
        match device.peers.get(key) {
            None => differences.push(format!("peer `{name}` is not configured")),
            Some(peer) if peer.allowed_ips != **allowed_ips => {
                differences.push(format!("peer `{name}` has other allowed-ips than the policy gives it"));
            }
            Some(_) => {}
        }
    }
    for key in device.peers.keys().filter(|key| !wanted.contains_key(key)) {
        differences.push(format!("peer `{key}` is configured and the policy does not know it"));
    }
    differences
}

/// The tables in words.
struct Entries<'a> {
    /// `None`: numbers have no names.
    intent: Option<&'a Intent>,
    seen: &'a Tables,
    pairs: BTreeMap<PairKey, Counter>,
    /// Pairs' counters that an entry shows.
    shown: BTreeSet<PairKey>,
    /// Cells repeat: by their word in the matrix.
    cells: BTreeMap<u32, Option<TableCell>>,
    labels: BTreeMap<(u32, u32), Vec<IpNet>>,
    entries: Vec<Entry>,
}

impl<'a> Entries<'a> {
    fn new(intent: Option<&'a Intent>, seen: &'a Tables, pairs: BTreeMap<PairKey, Counter>) -> Self {
        let labels = intent.map(|intent| labels(&intent.slice, seen)).unwrap_or_default();
        Self { intent, seen, pairs, shown: BTreeSet::new(), cells: BTreeMap::new(), labels, entries: Vec::new() }
    }

    fn collect(mut self) -> Vec<Entry> {
        let ends: BTreeSet<_> =
            self.seen.leaves.iter().filter(|leaf| leaf.class != 0).map(|leaf| (leaf.cidr, leaf.class)).collect();
        let own: BTreeSet<_> = self
            .seen
            .leaves
            .iter()
            .filter(|leaf| leaf.flags & LOCAL != 0)
            .map(|leaf| (leaf.cidr, leaf.class))
            .collect();
        for direction in [EGRESS, INGRESS] {
            for own in &own {
                for other in &ends {
                    self.pair(direction, *own, *other);
                }
            }
        }
        self.rest();
        // What is said of named services, then what is left over, then what is no matter of the tables.
        let rank = |entry: &Entry| match entry.services.first().map(String::as_str) {
            None => 2,
            Some("any other") => 1,
            Some(_) => 0,
        };
        self.entries.sort_by(|a, b| {
            (a.direction, &a.source, &a.destination, rank(a), a).cmp(&(
                b.direction,
                &b.source,
                &b.destination,
                rank(b),
                b,
            ))
        });
        self.entries
    }

    fn pair(&mut self, direction: u32, own: (u32, u32), other: (u32, u32)) {
        let (source, destination) = if direction == EGRESS { (own, other) } else { (other, own) };
        let index = cell_index(self.seen.header.own, self.seen.header.classes, direction, own.1, other.1);
        let Some(word) = self.seen.matrix.get(index as usize) else { return };
        let seen = self.seen;
        let cell = self.cells.entry(*word).or_insert_with(|| seen.cell(direction, own.1, other.1)).clone();
        let Some(cell) = cell else { return };
        let mut services: BTreeMap<Decision, Vec<String>> = BTreeMap::new();
        for (range, decision) in &cell.entries {
            services.entry(*decision).or_default().push(range.to_string());
        }
        let nothing_special = services.is_empty();
        for (decision, services) in services {
            self.push(direction, source, destination, services, decision);
        }
        let closed = cell.otherwise.reason == reason::NO_RULE;
        let key = key(direction, source, destination, reason::NO_RULE);
        if !closed || self.pairs.contains_key(&key) {
            let services = if nothing_special { "any" } else { "any other" };
            self.push(direction, source, destination, vec![services.to_owned()], cell.otherwise);
        }
    }

    fn push(
        &mut self,
        direction: u32,
        source: (u32, u32),
        destination: (u32, u32),
        services: Vec<String>,
        decision: Decision,
    ) {
        let allowed = decision.verdict == ALLOW;
        let reason = counted_as(decision);
        let mut decided_by = match decision.rule {
            NO_RULE_SLOT => reason::name(reason).to_owned(),
            slot => self.rule(slot),
        };
        if decision.flags & LOG != 0 {
            decided_by.push_str(" (log)");
        }
        let key = key(direction, source, destination, reason);
        let counter = self.shown.insert(key).then(|| self.pairs.get(&key).copied().unwrap_or_default());
        self.entries.push(Entry {
            direction: Direction::of(direction),
            source: self.end(source),
            destination: self.end(destination),
            services,
            verdict: verdict(allowed),
            decided_by,
            packets: counter.map(|counter| counter.packets),
            bytes: counter.map(|counter| counter.bytes),
        });
    }

    /// Packets whose fate is not in the tables: replies, errors, revoked flows, unknown addresses.
    fn rest(&mut self) {
        let rest: Vec<_> =
            self.pairs.iter().filter(|(key, _)| !self.shown.contains(key)).map(|(k, c)| (*k, *c)).collect();
        for (key, counter) in rest {
            let passes = reason::ALL.get(usize::from(key.reason)).is_some_and(|(_, _, passes)| *passes);
            let mut decided_by = reason::name(key.reason).to_owned();
            if [reason::RULE, reason::DENY_RULE, reason::LINEAGE].contains(&key.reason) {
                decided_by.push_str(" (earlier policy)");
            }
            self.entries.push(Entry {
                direction: Direction::of(key.direction.into()),
                source: End { cidr: self.cidr(key.source), only: Vec::new() },
                destination: End { cidr: self.cidr(key.destination), only: Vec::new() },
                services: Vec::new(),
                verdict: verdict(passes),
                decided_by,
                packets: Some(counter.packets),
                bytes: Some(counter.bytes),
            });
        }
    }

    fn rule(&self, slot: u32) -> String {
        let rule = self.intent.and_then(|intent| intent.slice.rules.get(&intent.tables.rule_of(slot)?));
        rule.map_or_else(|| format!("rule in slot {slot}"), |rule| rule.name.to_string())
    }

    fn end(&self, (cidr, class): (u32, u32)) -> End {
        End { cidr: self.cidr(cidr), only: self.labels.get(&(cidr, class)).cloned().unwrap_or_default() }
    }

    fn cidr(&self, id: u32) -> String {
        match (id, self.intent.and_then(|intent| intent.slice.cidrs.get(&CidrId(id)))) {
            (0, _) => "-".to_owned(),
            (_, Some(name)) => name.to_string(),
            (_, None) => format!("cidr {id}"),
        }
    }
}

/// The tables say `rule`; the counters tell a rule that denies from one that allows.
fn counted_as(decision: Decision) -> u8 {
    if decision.verdict != ALLOW && decision.reason == reason::RULE { reason::DENY_RULE } else { decision.reason }
}

pub(super) fn key(direction: u32, source: (u32, u32), destination: (u32, u32), reason: u8) -> PairKey {
    PairKey { source: source.0, destination: destination.0, direction: direction as u8, reason, _pad: [0; 2] }
}

fn verdict(allowed: bool) -> String {
    if allowed { "allow" } else { "deny" }.to_owned()
}

/// For cidrs whose addresses are not all alike: the prefixes of each class but the one that has the most of the cidr. The
/// node's own addresses, which have a class of their own, are meant wherever it is an end.
fn labels(slice: &Slice, seen: &Tables) -> BTreeMap<(u32, u32), Vec<IpNet>> {
    let mut classes: BTreeMap<u32, BTreeMap<u32, Vec<IpNet>>> = BTreeMap::new();
    let is_own = |prefix: &IpNet| slice.local.addresses.iter().any(|address| IpNet::from(address) == *prefix);
    for (prefix, (_, cidr)) in slice.prefixes.iter().filter(|(prefix, _)| !is_own(prefix)) {
        let leaf = representative(slice, *prefix).and_then(|address| seen.leaf(address));
        if let Some(leaf) = leaf.filter(|leaf| leaf.cidr == cidr.0) {
            classes.entry(cidr.0).or_default().entry(leaf.class).or_default().push(*prefix);
        }
    }
    let mut labels = BTreeMap::new();
    for (cidr, mut classes) in classes {
        let shortest = |prefixes: &Vec<IpNet>| prefixes.iter().map(IpNet::prefix_len).min();
        let rest = classes.iter().min_by_key(|(_, prefixes)| shortest(prefixes)).map(|(class, _)| *class);
        classes.retain(|class, _| Some(*class) != rest);
        labels.extend(classes.into_iter().map(|(class, prefixes)| ((cidr, class), prefixes)));
    }
    labels
}

/// An address of a prefix that no longer prefix of the slice has.
fn representative(slice: &Slice, prefix: IpNet) -> Option<IpAddr> {
    let number = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let (mut free, last) = (number(prefix.network()), number(prefix.broadcast()));
    for (child, _) in slice.prefixes.range(prefix..).skip(1).take_while(|(child, _)| prefix.contains(*child)) {
        if number(child.network()) > free {
            break;
        }
        let end = number(child.broadcast());
        if end >= last {
            return None;
        }
        free = free.max(end + 1);
    }
    Some(match prefix {
        IpNet::V4(_) => IpAddr::V4((free as u32).into()),
        IpNet::V6(_) => IpAddr::V6(free.into()),
    })
}
