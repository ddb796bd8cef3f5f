//! The kernel's walk through the tables, in userspace.

use std::net::IpAddr;

use ebpf_common::packet::{ICMP, ICMPV6, Packet, TCP, UDP};
use ebpf_common::table::{
    ALLOW, Address, BLOCK, CELL_INDEX, DENY, Decision, INDEX, LOCAL, LOG, Leaf, NO_RULE_SLOT, PATH, Page, RECORD,
    UNIFORM, UNKNOWN, block_of, cell_index,
};
use ebpf_common::{EGRESS, limit, reason};
use policy::{Action, Flow, Reason, RuleId, Verdict};

use super::Tables;

/// What the kernel does with the first packet of a flow, when nothing is recorded of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub passes: bool,
    /// One of `ebpf_common::reason`.
    pub reason: u8,
    /// The deciding rule's counter slot.
    pub rule: Option<u32>,
    /// The flow is recorded so that its replies pass.
    pub record: bool,
    /// The rule asks for a report.
    pub log: bool,
}

impl Tables {
    /// The walk of docs/POLICY.md, section 3, steps 2, 3 and 6, in `ebpf_common::EGRESS` or `INGRESS`.
    pub fn verdict(&self, flow: &Flow, direction: u32) -> Outcome {
        if is_out_of_scope(flow) {
            return Outcome::dropped(reason::SCOPE);
        }
        let (source, destination) = (self.leaf(flow.source), self.leaf(flow.destination));
        let (Some(source), Some(destination)) = (source, destination) else {
            return Outcome::dropped(reason::CORRUPT_TABLE);
        };
        let (own, other) = if direction == EGRESS { (source, destination) } else { (destination, source) };
        if own.flags & LOCAL == 0 {
            return Outcome::dropped(reason::NOT_LOCAL);
        }
        if other.class == 0 {
            let unknown = if direction == EGRESS { reason::UNKNOWN_DESTINATION } else { reason::UNKNOWN_SOURCE };
            return Outcome::dropped(unknown);
        }
        match self.decision(direction, own.class, other.class, flow.protocol, flow.port) {
            Some((decision, record)) if is_sound(&decision) => Outcome::decided(decision, record),
            Some(_) | None => Outcome::dropped(reason::CORRUPT_TABLE),
        }
    }

    /// The rule that counts in a slot.
    pub fn rule_of(&self, slot: u32) -> Option<RuleId> {
        self.rule_slots.iter().find(|(_, taken)| **taken == slot).map(|(rule, _)| *rule)
    }

    /// In the words of the policy. `None`: what the policy does not know of, such as `not-local`.
    pub fn in_policy(&self, outcome: &Outcome) -> Option<Verdict> {
        let reason = match outcome.reason {
            reason::RULE | reason::DENY_RULE => Reason::Rule,
            reason::LINEAGE => Reason::Lineage,
            reason::NO_RULE => Reason::NoRule,
            reason::UNKNOWN_SOURCE => Reason::UnknownSource,
            reason::UNKNOWN_DESTINATION => Reason::UnknownDestination,
            _ => return None,
        };
        let action = if outcome.passes { Action::Allow } else { Action::Deny };
        Some(Verdict { action, reason, rule: outcome.rule.and_then(|slot| self.rule_of(slot)) })
    }

    /// Class, cidr and holder of an address. `None`: the tables are corrupt.
    pub fn leaf(&self, address: IpAddr) -> Option<Leaf> {
        let (mut entry, steps) = match address {
            IpAddr::V4(_) => (self.header.root_v4, limit::STEPS_V4),
            // The tables write IPv4 addresses like this; no IPv6 packet may speak for one of them.
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => (UNKNOWN, 1),
            IpAddr::V6(_) => (self.header.root_v6, limit::STEPS_V6),
        };
        let address = Address::from(address);
        for _ in 0..steps {
            if entry & BLOCK != 0 {
                let (index, position) = block_of(entry);
                entry = self.blocks.get(index as usize)?.entries[usize::from(address.octet(position))];
            } else if entry & PATH != 0 {
                let path = self.paths.get((entry & INDEX) as usize)?;
                entry = if masked(address, path.mask) == path.prefix { path.inside } else { path.outside };
            } else {
                return self.leaves.get(entry as usize).copied();
            }
        }
        None
    }

    /// The decision of a pair of classes for a service, and whether an allowed flow is recorded.
    pub(super) fn decision(
        &self,
        direction: u32,
        own: u32,
        other: u32,
        protocol: u8,
        port: u16,
    ) -> Option<(Decision, bool)> {
        if own == 0 || own > self.header.own || other >= self.header.classes {
            return None;
        }
        let cell = cell_index(self.header.own, self.header.classes, direction, own, other);
        let word = *self.matrix.get(cell as usize)?;
        let index = (word & CELL_INDEX) as usize;
        let index = if word & UNIFORM != 0 {
            index
        } else {
            let page = self.pages.get(index)?;
            let few = page.few.decision(u32::from(protocol) << 16 | u32::from(port));
            usize::from(few.or_else(|| self.decision_in_runs(page, protocol, port))?)
        };
        Some((*self.decisions.get(index)?, word & RECORD != 0))
    }

    /// The index of the decision on a service by the runs of a page.
    pub(super) fn decision_in_runs(&self, page: &Page, protocol: u8, port: u16) -> Option<u16> {
        let (high, low) = (usize::from(port >> 8), usize::from(port & 0xff));
        let (run, entry) = match protocol {
            TCP => (page.tcp[high], low),
            UDP => (page.udp[high], low),
            ICMP => (page.icmp, low),
            ICMPV6 => (page.icmpv6, low),
            other => (page.protocol, usize::from(other)),
        };
        Some(self.ports.get(usize::from(run))?.decisions[entry])
    }
}

impl Outcome {
    fn dropped(reason: u8) -> Self {
        Self { passes: false, reason, rule: None, record: false, log: false }
    }

    fn decided(decision: Decision, record: bool) -> Self {
        let passes = decision.verdict == ALLOW;
        // The tables say `rule`; the counters tell a rule that denies from one that allows.
        let reason = if !passes && decision.reason == reason::RULE { reason::DENY_RULE } else { decision.reason };
        let rule = (decision.rule != NO_RULE_SLOT).then_some(decision.rule);
        Self { passes, reason, rule, record: passes && record, log: decision.flags & LOG != 0 }
    }
}

/// Whether the program would follow a decision.
fn is_sound(decision: &Decision) -> bool {
    let known = matches!(
        (decision.verdict, decision.reason),
        (ALLOW, reason::RULE | reason::LINEAGE) | (DENY, reason::RULE | reason::DENY_RULE | reason::NO_RULE)
    );
    known && (decision.rule < limit::RULES || decision.rule == NO_RULE_SLOT)
}

fn masked(Address([a, b]): Address, Address([mask_a, mask_b]): Address) -> Address {
    Address([a & mask_a, b & mask_b])
}

/// Whether an address may never cross the mesh (docs/POLICY.md, section 3.2).
fn is_out_of_scope(flow: &Flow) -> bool {
    let family = if flow.source.is_ipv4() { 4 } else { 6 };
    let (source, destination) = (flow.source.into(), flow.destination.into());
    Packet { source, destination, family, ..Packet::default() }.is_out_of_scope()
}
