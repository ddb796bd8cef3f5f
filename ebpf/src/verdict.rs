//! The verdict on a packet, in the order of docs/POLICY.md, section 3, and the walk through the tables.
//!
//! The functions that are not inlined are verified once a call and keep the classifier's own stack small. They return one
//! word, as a BPF function must.
#![allow(unsafe_code, reason = "symbols with global linkage, which the verifier checks once and not once a call")]

use ebpf_common::limit;
use ebpf_common::packet::{FIRST_FRAGMENT, LATER_FRAGMENT, Packet, UNFRAGMENTED};
use ebpf_common::table::{
    self, ALLOW, Address, BLOCK, BLOCK_SHIFT, CELL_INDEX, DENY, EXTERNAL, LOCAL, Leaf, NO_RULE_SLOT, PATH, Path,
    RECORD, TableCopy, UNIFORM, UNKNOWN,
};
use ebpf_common::{EGRESS, packet, reason};

use crate::context::PacketContext;
use crate::flow;
use crate::fragment::{self, Datagram};
use crate::hook::{Hook, WHOLE};
use crate::maps::direction;
use crate::maps::{TABLES, control};
use crate::settled::entry;

/// Returned by [`find_leaf`] where the tables contradict themselves.
const CORRUPT: u32 = u32::MAX;

/// The reason for which the packet passes or not.
#[inline(always)]
pub fn judge(hook: &impl Hook, context: &mut PacketContext) -> u8 {
    let Known { holder } = match know(hook, context) {
        Ok(known) => known,
        Err(reason) => return reason,
    };
    if context.packet.is_icmp_error() {
        return judge_error(hook, context, holder);
    }
    if context.other == 0 {
        return unknown();
    }
    if context.packet.fragment == LATER_FRAGMENT {
        match fragment::recall(context) {
            Datagram::Known => {}
            Datagram::Unknown => return judge_headless(context),
            Datagram::Overlapped => return reason::FRAGMENT_OVERLAP,
        }
    }
    let reason = judge_flow(context);
    if context.packet.fragment == FIRST_FRAGMENT && reason::passes(reason) {
        fragment::keep(context);
    }
    reason
}

/// The reason for which the packet would be dropped whatever is recorded, ahead of everything that is kept or learned of
/// a packet; `None`: [`judge`] is to be asked.
#[inline(always)]
pub fn judge_early(hook: &impl Hook, context: &mut PacketContext) -> Option<u8> {
    if let Err(reason) = know(hook, context) {
        return Some(reason);
    }
    if context.packet.fragment != UNFRAGMENTED || context.packet.is_icmp_error() {
        return None;
    }
    if context.other == 0 {
        return Some(unknown());
    }
    let decision = Decision(decide_for(context, direction(), context.packet.destination_port));
    if decision.allows() || (flow::may_be_recorded(context) && flow::is_recorded(context)) {
        return None;
    }
    let Some(reason) = decision.denial() else { return Some(reason::CORRUPT_TABLE) };
    context.rule = decision.rule();
    Some(reason)
}

/// What the rest of the judgement needs besides what is in the context.
struct Known {
    /// Of the other end's leaf.
    holder: u32,
}

/// Reads the packet and looks up its ends: steps 1 to 3.
#[inline(always)]
fn know(hook: &impl Hook, context: &mut PacketContext) -> Result<Known, u8> {
    let fault = hook.read(&mut context.packet, context.length);
    let (active, generation) = control();
    if generation == 0 {
        return Err(reason::NO_POLICY);
    }
    if active > 1 {
        return Err(reason::CORRUPT_TABLE);
    }
    (context.copy, context.generation) = (active, generation);
    if fault != WHOLE {
        return Err(fault as u8);
    }
    if context.packet.is_out_of_scope() {
        return Err(reason::SCOPE);
    }
    let Some(tables) = TABLES.get(context.copy) else { return Err(reason::CORRUPT_TABLE) };
    let (source, destination) = (context.packet.source, context.packet.destination);
    let Some([source, destination]) = lookup(tables, active, [source, destination], context.packet.family) else {
        return Err(reason::CORRUPT_TABLE);
    };
    (context.source_cidr, context.destination_cidr) = (source.cidr, destination.cidr);
    let (own, other) = if direction() == EGRESS { (source, destination) } else { (destination, source) };
    if own.flags & LOCAL == 0 {
        return Err(reason::NOT_LOCAL);
    }
    (context.own, context.other) = (own.class, other.class);
    context.behind = if other.flags & EXTERNAL == 0 { 0 } else { other.cidr };
    Ok(Known { holder: other.holder() })
}

/// The other end lies in no cidr.
#[inline(always)]
fn unknown() -> u8 {
    if direction() == EGRESS { reason::UNKNOWN_DESTINATION } else { reason::UNKNOWN_SOURCE }
}

#[inline(always)]
fn judge_error(hook: &impl Hook, context: &PacketContext, holder: u32) -> u8 {
    if context.packet.fragment != UNFRAGMENTED {
        // No error is so long that it needs fragments (RFC 1812, 4.3.2.3; RFC 4443, 2.4).
        reason::FRAGMENT
    } else if is_related(hook, context, holder) {
        reason::ICMP_ERROR
    } else {
        reason::ICMP_ERROR_UNRELATED
    }
}

/// A fragment of a datagram of which nothing is known passes if no transport header could make a difference.
#[inline(always)]
fn judge_headless(context: &mut PacketContext) -> u8 {
    let has_ports = matches!(context.packet.protocol, packet::TCP | packet::UDP | packet::ICMP | packet::ICMPV6);
    // Of a later IPv6 fragment not even the protocol is known.
    let any = has_ports || context.packet.family != 4;
    let decision = if any {
        Decision(decide_any(context.copy, direction(), context.own, context.other))
    } else {
        Decision(decide_for(context, direction(), 0))
    };
    if !decision.allows() {
        return reason::FRAGMENT;
    }
    context.rule = decision.rule();
    context.log = decision.has(Decision::LOG);
    decision.reason()
}

/// Rules, then replies.
#[inline(always)]
fn judge_flow(context: &mut PacketContext) -> u8 {
    let Some(tables) = TABLES.get(context.copy) else { return reason::CORRUPT_TABLE };
    let service = u32::from(context.packet.protocol) << 16 | u32::from(context.packet.destination_port);
    // In line, as the walk is.
    let Some(decision) = find_decision(tables, direction(), context.own, context.other, service) else {
        return reason::CORRUPT_TABLE;
    };
    if decision.allows() {
        context.rule = decision.rule();
        context.log = decision.has(Decision::LOG);
        flow::keep(context, decision);
        return decision.reason();
    }
    let Some(denial) = decision.denial() else { return reason::CORRUPT_TABLE };
    context.rule = decision.rule();
    if !flow::may_be_recorded(context) {
        return denial;
    }
    match flow::answers(context) {
        flow::Answer::NONE => denial,
        flow::Answer::REVOKED => {
            context.rule = NO_RULE_SLOT;
            reason::REVOKED
        }
        rule => {
            context.rule = flow::Answer::rule(rule);
            reason::REPLY
        }
    }
}

#[inline(never)]
fn read_quote(hook: &impl Hook, context: &PacketContext, quoted: &mut Packet) -> bool {
    context.packet.read_quote(hook, quoted)
}

/// Whether an ICMP error is about a flow that is allowed (section 3.5). `holder` is that of the other end's leaf.
///
/// The quoted packet was sent by the error's destination, so its direction is the opposite of the error's. An error that
/// comes from elsewhere than the quoted destination is believed only of a recorded flow, and only from who stands for
/// that destination: at ingress the same gateway, itself or an address behind it, at egress this node.
#[inline(never)]
fn is_related(hook: &impl Hook, context: &PacketContext, holder: u32) -> bool {
    let mut quoted = Packet::default();
    if !read_quote(hook, context, &mut quoted) || quoted.source != context.packet.destination {
        return false;
    }
    let (mut own_class, mut other_class) = (context.own, context.other);
    let direct = quoted.destination == context.packet.source;
    if !direct {
        let Some(tables) = TABLES.get(context.copy) else { return false };
        let [high, low] = quoted.destination.0;
        let Some(target) = entry(&tables.leaves, find_leaf(context.copy, high, low, quoted.family.into())) else {
            return false;
        };
        if direction() == EGRESS {
            if target.flags & LOCAL == 0 {
                return false;
            }
            own_class = target.class;
        } else {
            if holder == 0 || target.holder() != holder {
                return false;
            }
            other_class = target.class;
        }
    }
    if own_class == 0 || other_class == 0 {
        return false;
    }
    flow::is_allowed(context, &quoted, own_class, other_class, direct)
}

/// What the tables know of the ends of a packet; `None` where they contradict themselves.
#[inline(always)]
fn lookup(tables: &TableCopy, copy: u32, ends: [Address; 2], family: u8) -> Option<[Leaf; 2]> {
    let [source, destination] = ends.map(|end| end.0);
    let (source, destination) = if family == 4 {
        // In line: a call costs as much as the walk, where returns are guarded against speculation.
        (find_leaf_v4(tables, source[1]), find_leaf_v4(tables, destination[1]))
    } else {
        let both = find_leaves_v6(copy, source[0], source[1], destination[0], destination[1]);
        (both as u32, (both >> 32) as u32)
    };
    Some([*entry(&tables.leaves, source)?, *entry(&tables.leaves, destination)?])
}

/// The leaf of an IPv4 address, by strides of 8 bits. The upper half of the address is that of all.
#[inline(always)]
fn find_leaf_v4(tables: &TableCopy, low: u64) -> u32 {
    let follows = move |path: &Path| low & path.mask.0[1] == path.prefix.0[1];
    walk::<{ limit::STEPS_V4 }>(tables, tables.header.root_v4, move |_| low.to_le(), follows)
}

/// The leaf of an IPv6 address.
#[inline(always)]
fn find_leaf_v6(tables: &TableCopy, high: u64, low: u64) -> u32 {
    let address = Address([high, low]);
    if address.is_v4() {
        // The tables write IPv4 addresses like this; no IPv6 packet may speak for one of them.
        return UNKNOWN;
    }
    let word = move |bit: u32| if bit & 64 == 0 { high.to_le() } else { low.to_le() };
    walk::<{ limit::STEPS_V6 }>(tables, tables.header.root_v6, word, |path| matches(address, path.mask, path.prefix))
}

/// The leaves of two IPv6 addresses, the first in the lower half. Checked once by the verifier, and not along each path
/// that leads here: the walks are long.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_leaves_v6(copy: u32, high: u64, low: u64, other_high: u64, other_low: u64) -> u64 {
    let Some(tables) = TABLES.get(copy) else { return u64::MAX };
    let (one, other) = (find_leaf_v6(tables, high, low), find_leaf_v6(tables, other_high, other_low));
    u64::from(other) << 32 | u64::from(one)
}

/// The leaf of one address, where it is not asked of every packet.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_leaf(copy: u32, high: u64, low: u64, family: u32) -> u32 {
    let Some(tables) = TABLES.get(copy) else { return CORRUPT };
    if family == 4 { find_leaf_v4(tables, low) } else { find_leaf_v6(tables, high, low) }
}

/// From entry to entry to a leaf. `word`: the half of the address that has a bit; `follows`: whether the address goes along
/// a path.
#[inline(always)]
fn walk<const STEPS: u32>(
    tables: &TableCopy,
    root: u32,
    word: impl Fn(u32) -> u64,
    follows: impl Fn(&Path) -> bool,
) -> u32 {
    let mut next = root;
    for _ in 0..STEPS {
        if next & BLOCK != 0 {
            let block = &tables.blocks[(next >> BLOCK_SHIFT) as usize & (tables.blocks.len() - 1)];
            next = block.entries[usize::from(word(next).wrapping_shr(next) as u8)];
        } else if next & PATH != 0 {
            let path = &tables.paths[next as usize & (tables.paths.len() - 1)];
            next = if follows(path) { path.inside } else { path.outside };
        } else {
            return next;
        }
    }
    CORRUPT
}

/// Whether the tables alone allow a flow of `service` (protocol << 16 | port) between two addresses, one of which this
/// node stands for; for the bench.
#[inline(always)]
pub fn is_allowed(copy: u32, direction: u32, ends: &[Address; 2], family: u8, service: u32) -> bool {
    let Some(tables) = TABLES.get(copy) else { return false };
    let Some([source, destination]) = lookup(tables, copy, *ends, family) else { return false };
    let (own, other) = if direction == EGRESS { (source, destination) } else { (destination, source) };
    other.class != 0 && find_decision(tables, direction, own.class, other.class, service).is_some_and(Decision::allows)
}

#[inline(always)]
fn matches(address: Address, mask: Address, prefix: Address) -> bool {
    address.0[0] & mask.0[0] == prefix.0[0] && address.0[1] & mask.0[1] == prefix.0[1]
}

/// A `table::Decision` in one word, as it lies in memory, and whether an allowed flow is recorded.
#[derive(Clone, Copy)]
pub(crate) struct Decision(pub(crate) u64);

impl Decision {
    /// Neither allows nor denies.
    const CORRUPT: Self = Self(0xff);
    const VERDICT: u64 = 0xff;
    const REASON: u64 = 0xff00;
    /// The rule asks for its packets to be reported.
    pub(crate) const LOG: u64 = (table::LOG as u64) << 16;
    /// The flow needs a record. No flag of a decision.
    pub(crate) const RECORD: u64 = 1 << 31;

    #[inline(always)]
    fn new(decision: &table::Decision, cell: u32) -> Self {
        // SAFETY: 8 bytes, aligned as the map's values and the tables in them are.
        let word = unsafe { core::ptr::from_ref(decision).cast::<u64>().read() };
        Self(word & !Self::RECORD | u64::from(cell & RECORD) << 1)
    }

    #[inline(always)]
    pub(crate) fn has(self, flag: u64) -> bool {
        self.0 & flag != 0
    }

    #[inline(always)]
    pub(crate) fn allows(self) -> bool {
        // Both reasons in one comparison.
        const { assert!(ALLOW == 1 && reason::RULE == 0 && reason::LINEAGE == 1) };
        self.0 & (Self::VERDICT | Self::REASON & !0x100) == 1
    }

    /// Why it denies; `None`: it does not, or means nothing.
    #[inline(always)]
    fn denial(self) -> Option<u8> {
        match ((self.0 & Self::VERDICT) as u8, (self.0 >> 8) as u8) {
            (DENY, reason::RULE | reason::DENY_RULE) => Some(reason::DENY_RULE),
            (DENY, reason::NO_RULE) => Some(reason::NO_RULE),
            _ => None,
        }
    }

    /// Counter slot; one that is not there is [`NO_RULE_SLOT`] or means as much.
    #[inline(always)]
    pub(crate) fn rule(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Of one that allows.
    #[inline(always)]
    pub(crate) fn reason(self) -> u8 {
        (self.0 >> 8) as u8
    }
}

/// The decision on a flow between the two ends of the packet.
#[inline(always)]
pub(crate) fn decide_for(context: &PacketContext, direction: u32, service: u16) -> u64 {
    decide(
        context.copy,
        direction,
        context.own,
        context.other,
        u32::from(context.packet.protocol) << 16 | u32::from(service),
    )
}

/// The decision on a flow of `service` (protocol << 16 | port) from class `own` to class `other` at `EGRESS`, from
/// `other` to `own` at `INGRESS`; a [`Decision`]. `other` is not the unknown class.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn decide(copy: u32, direction: u32, own: u32, other: u32, service: u32) -> u64 {
    let decision = TABLES.get(copy).and_then(|tables| find_decision(tables, direction, own, other, service));
    decision.unwrap_or(Decision::CORRUPT).0
}

#[inline(always)]
fn find_decision(tables: &TableCopy, direction: u32, own: u32, other: u32, service: u32) -> Option<Decision> {
    let cell = find_cell(tables, direction, own, other)?;
    let index = cell & CELL_INDEX;
    let decision = if cell & UNIFORM != 0 { index } else { find_in_page(tables, index, service)? };
    read_decision(tables, decision, cell)
}

/// The decision on every service from one class to another, where services are not told apart.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn decide_any(copy: u32, direction: u32, own: u32, other: u32) -> u64 {
    let Some(tables) = TABLES.get(copy) else { return Decision::CORRUPT.0 };
    let cell = find_cell(tables, direction, own, other).filter(|cell| cell & UNIFORM != 0);
    cell.and_then(|cell| read_decision(tables, cell & CELL_INDEX, cell)).unwrap_or(Decision::CORRUPT).0
}

#[inline(always)]
fn find_cell(tables: &TableCopy, direction: u32, own: u32, other: u32) -> Option<u32> {
    let (owns, classes) = (tables.header.own, tables.header.classes);
    if own == 0 || own > owns || other >= classes || owns > limit::CELLS || classes > limit::CELLS {
        return None;
    }
    // As `table::cell_index`, in a width in which bounds that the check above lets through cannot overflow.
    let cell = (u64::from(direction) * u64::from(owns) + u64::from(own - 1)) * u64::from(classes) + u64::from(other);
    entry(&tables.matrix, u32::try_from(cell).ok()?).copied()
}

#[inline(always)]
fn read_decision(tables: &TableCopy, decision: u32, cell: u32) -> Option<Decision> {
    entry(&tables.decisions, decision).map(|found| Decision::new(found, cell))
}

/// The index of the decision on a service, where services are told apart.
#[inline(always)]
fn find_in_page(tables: &TableCopy, page: u32, service: u32) -> Option<u32> {
    let page = entry(&tables.pages, page)?;
    if let Some(decision) = page.few.decision(service) {
        return Some(decision.into());
    }
    let (protocol, high, low) = ((service >> 16) as u8, (service >> 8) as u8, service as u8);
    let (run, last) = match protocol {
        packet::TCP => (page.tcp[usize::from(high)], low),
        packet::UDP => (page.udp[usize::from(high)], low),
        packet::ICMP => (page.icmp, low),
        packet::ICMPV6 => (page.icmpv6, low),
        _ => (page.protocol, protocol),
    };
    let ports = entry(&tables.ports, run.into())?;
    Some(ports.decisions[usize::from(last)].into())
}
