//! Records of flows: policy first, record second. A record never allows by itself; it says in whose direction the tables
//! are to be asked.
//!
//! Rules:
//! - a record is judged again when the generation has changed since, in its opener's direction, by whichever packet finds it;
//! - denied then, it becomes a tombstone, which stays for as long as packets of the flow keep coming;
//! - nothing but a packet of its opener that the tables allow turns a tombstone back;
//! - an idle record is as good as none. Userspace deletes it;
//! - where room is short, who has much gets no more of it: nobody's records keep another node from having any;
//! - before there is a record, its bit in the filter is set.
//!
//! Two CPUs may write one record at once. The last writer wins, and each of them wrote what its own reading of the tables
//! allowed; a record's own packets and bytes may miss a few then (those of rules, reasons and pairs are exact). Userspace deletes only what has been idle for long or what it means to forget.
#![allow(unsafe_code, reason = "map values are shared with other CPUs")]

use aya_ebpf::bindings::{BPF_EXIST, BPF_NOEXIST};
use ebpf_common::counter::{LOSS_FLOW, LOSS_FLOW_QUOTA};
use ebpf_common::flow::{
    FILTER_WORDS, Flow, FlowFilter, FlowKey, Remote, STATE_CLOSING, STATE_ESTABLISHED, STATE_OPENING, STATE_TOMBSTONE,
    TOTAL_GONE, TOTAL_OPENED, idle_timeout_ns,
};
use ebpf_common::packet::Packet;
use ebpf_common::{EGRESS, INGRESS, limit};

use crate::atomic::{self, add};
use crate::clock::now;
use crate::context::PacketContext;
use crate::maps::direction;
use crate::maps::{FLOW_FILTER, FLOW_TOTALS, FLOWS, FLOWS_GONE, FLOWS_OPENED, lose};
use crate::settled::settled;
use crate::verdict::{Decision, decide};

/// The direction in which the reverse of this hook's packets goes.
#[inline(always)]
fn opposite() -> u32 {
    INGRESS - direction()
}

/// Keeps the record of a packet that the tables allow. Handshakes are recorded even where no record is needed, so
/// that replies go on when a later policy allows the opener's direction only.
#[inline(always)]
pub(crate) fn keep(context: &PacketContext, decision: Decision) {
    let packet = &context.packet;
    let needed = decision.has(Decision::RECORD);
    if !(needed || packet.is_handshake()) || refresh(context, decision.0) {
        return;
    }
    if packet.can_open() && !packet.is_reset() && (needed || packet.is_opening()) {
        open(context, decision.0);
    }
}

/// Whether there was a record to be refreshed. (Not one function with `open`: the whole chain of calls has 512 bytes of
/// stack.)
#[inline(always)]
fn refresh(context: &PacketContext, decision: u64) -> bool {
    let decision = Decision(decision);
    let packet = &context.packet;
    if packet.can_open()
        && let Some(mut record) = Record::find(&packet.key())
    {
        if record.is_tombstone() && packet.is_reset() {
            record.touch();
        } else {
            record.approve(context, decision);
            record.refresh_by_opener(context);
        }
        return true;
    }
    if packet.can_reply()
        && let Some(mut record) = Record::find(&packet.reply_key())
    {
        if record.judge(context, packet.reply_service()) {
            record.refresh_by_reply(context);
        }
        return true;
    }
    false
}

#[inline(never)]
fn open(context: &PacketContext, decision: u64) -> u32 {
    let (decision, now) = (Decision(decision), now());
    let remote = if direction() == EGRESS { context.packet.destination } else { context.packet.source };
    let remote = Remote::new(remote, context.behind);
    let opened = opened_by(&remote);
    if !has_room(&remote, opened) {
        lose(LOSS_FLOW_QUOTA);
        return 0;
    }
    let flow = &Flow {
        opened: now,
        seen: now,
        packets: 1,
        bytes: context.length.into(),
        reply_packets: 0,
        reply_bytes: 0,
        generation: context.generation,
        rule: decision.rule(),
        state: if context.packet.is_closing() { STATE_CLOSING } else { STATE_OPENING },
        reason: decision.reason(),
        direction: direction() as u8,
        _pad: 0,
        behind: context.behind,
    };
    note(context.packet.key().filter_bit());
    // By reference: each copy would take its place on the stack.
    let key = &context.packet.key().to_words();
    if FLOWS.insert(key, flow, BPF_NOEXIST.into()).is_ok() {
        count(opened);
    } else if FLOWS.insert(key, flow, BPF_EXIST.into()).is_err() {
        // What was there before, idle, is counted already.
        lose(LOSS_FLOW);
    }
    0
}

/// Where the records that the other end ever had are counted; `None`: there is no room for that.
#[inline(always)]
fn opened_by(remote: &Remote) -> Option<*mut u64> {
    if let Some(opened) = FLOWS_OPENED.get_ptr_mut(remote) {
        return Some(opened);
    }
    // Another CPU may be first.
    let _there = FLOWS_OPENED.insert(remote, 0, BPF_NOEXIST.into());
    FLOWS_OPENED.get_ptr_mut(remote)
}

/// Whether the other end may have one more record: everybody while there is much room, else who has little.
#[inline(always)]
fn has_room(remote: &Remote, opened: Option<*mut u64>) -> bool {
    if live(FLOW_TOTALS.get_ptr_mut(TOTAL_OPENED), FLOW_TOTALS.get_ptr_mut(TOTAL_GONE)) < limit::FLOWS_FREE.into() {
        return true;
    }
    // Who cannot be counted has no room among those who are.
    opened.is_some() && live(opened, FLOWS_GONE.get_ptr_mut(remote)) < limit::FLOWS_PER_REMOTE.into()
}

/// Records that are there, of all that were opened.
#[inline(always)]
fn live(opened: Option<*mut u64>, gone: Option<*mut u64>) -> u64 {
    // SAFETY: the maps' values, checked not to be null.
    let [opened, gone] = [opened, gone].map(|counter| counter.map_or(0, |counter| unsafe { *counter }));
    opened.saturating_sub(gone)
}

#[inline(always)]
fn count(opened: Option<*mut u64>) {
    if let Some(total) = FLOW_TOTALS.get_ptr_mut(TOTAL_OPENED) {
        // SAFETY: the map's value, checked not to be null, aligned to 8 bytes.
        unsafe { add(total, 1) };
    }
    if let Some(opened) = opened {
        // SAFETY: as above.
        unsafe { add(opened, 1) };
    }
}

/// What [`answers`] returns: no answer to anything, an answer to a revoked flow, or the rule of the flow that is answered.
pub(crate) struct Answer;

impl Answer {
    pub(crate) const NONE: u64 = 0;
    pub(crate) const REVOKED: u64 = 1;
    const REPLY: u64 = 1 << 32;

    #[inline(always)]
    pub(crate) fn rule(answer: u64) -> u32 {
        answer as u32
    }
}

/// Whether there may be a record of the packet's flow, in whichever direction: said at once of most packets that belong to
/// none.
#[inline(always)]
pub(crate) fn may_be_recorded(context: &PacketContext) -> bool {
    let Some(filter) = FLOW_FILTER.get_ptr_mut(0) else { return true };
    // SAFETY: the map's value, checked not to be null.
    let state = unsafe { (&raw const (*filter).state).read_volatile() };
    // A number that nothing is known of, so that the word is read after it: its address depends on it.
    let half = settled(state.wrapping_sub(1) as usize);
    if half > 1 {
        return true;
    }
    let bit = context.packet.key().filter_bit();
    // SAFETY: as above.
    unsafe { (&raw const *word(filter, half, bit)).read_volatile() >> (bit % 64) & 1 != 0 }
}

/// Says that there may be a record, before there is one.
#[inline(always)]
fn note(bit: u32) {
    let Some(filter) = FLOW_FILTER.get_ptr_mut(0) else { return };
    for half in 0..2 {
        // SAFETY: the map's value, checked not to be null; words are aligned.
        unsafe { atomic::set(word(filter, half, bit), 1 << (bit % 64)) };
    }
}

/// Where in a half of the filter a bit is.
///
/// # Safety
/// `filter` is the map's value.
#[inline(always)]
unsafe fn word(filter: *mut FlowFilter, half: usize, bit: u32) -> *mut u64 {
    let index = half * FILTER_WORDS + (bit / 64) as usize;
    // SAFETY: the caller's, and no index is beyond the end.
    unsafe { (&raw mut (*filter).bits).cast::<u64>().add(settled(index) & (2 * FILTER_WORDS - 1)) }
}

/// Whether a packet that the tables deny is the reverse of a recorded flow that they allow.
#[inline(always)]
pub(crate) fn answers(context: &PacketContext) -> u64 {
    let packet = &context.packet;
    if packet.can_reply()
        && let Some(mut record) = Record::find(&packet.reply_key())
    {
        if !record.judge(context, packet.reply_service()) {
            return Answer::REVOKED;
        }
        record.refresh_by_reply(context);
        return Answer::REPLY | u64::from(record.rule());
    }
    if packet.can_open()
        && let Some(mut record) = Record::find(&packet.key())
    {
        record.revoke();
    }
    Answer::NONE
}

/// Whether there is a record that the packet may be an answer by, or the opener's of. Changes nothing.
#[inline(never)]
pub(crate) fn is_recorded(context: &PacketContext) -> bool {
    let packet = &context.packet;
    (packet.can_reply() && Record::find(&packet.reply_key()).is_some())
        || (packet.can_open() && Record::find(&packet.key()).is_some())
}

/// Whether `quoted`, a packet in the opposite direction of this hook's, belongs to a flow that is allowed. Unless `direct`,
/// the flow must be recorded. Changes no record.
#[inline(never)]
pub(crate) fn is_allowed(context: &PacketContext, quoted: &Packet, own: u32, other: u32, direct: bool) -> bool {
    let service = |port: u16| u32::from(quoted.protocol) << 16 | u32::from(port);
    let decision = Decision(decide(context.copy, opposite(), own, other, service(quoted.destination_port)));
    if direct && decision.allows() {
        return true;
    }
    if decision.allows()
        && quoted.can_open()
        && Record::find(&quoted.key()).is_some_and(|record| !record.is_tombstone())
    {
        return true;
    }
    // It may be a reply itself. Its TCP flags may lie beyond what is quoted, so a SYN is not told apart.
    quoted.can_reply()
        && Record::find(&quoted.reply_key()).is_some_and(|record| !record.is_tombstone())
        && Decision(decide(context.copy, direction(), own, other, service(quoted.reply_service()))).allows()
}

/// A record in the map that is not idle, and when it was found.
struct Record {
    flow: *mut Flow,
    now: u64,
}

impl Record {
    #[inline(always)]
    fn find(key: &FlowKey) -> Option<Self> {
        let flow = FLOWS.get_ptr_mut(key.to_words())?;
        let now = now();
        // SAFETY: the map's value, checked not to be null; it stays readable until the program ends.
        let (seen, state) = unsafe { ((*flow).seen, (*flow).state) };
        // Another CPU's clock may have been read later.
        (now.saturating_sub(seen) <= idle_timeout_ns(key.protocol, state)).then_some(Self { flow, now })
    }

    #[inline(always)]
    fn is_tombstone(&self) -> bool {
        self.state() == STATE_TOMBSTONE
    }

    /// Whether the flow is allowed now. Judges it by the tables if they have changed since it was last judged.
    #[inline(always)]
    fn judge(&mut self, context: &PacketContext, service: u16) -> bool {
        if self.is_tombstone() {
            self.touch();
            return false;
        }
        // SAFETY: as in `find`.
        if unsafe { (*self.flow).generation } == context.generation {
            return true;
        }
        let service = u32::from(context.packet.protocol) << 16 | u32::from(service);
        let decision = Decision(decide(context.copy, opposite(), context.own, context.other, service));
        if decision.allows() {
            self.approve(context, decision);
        } else {
            self.revoke();
        }
        decision.allows()
    }

    /// The tables allow the opener.
    #[inline(always)]
    fn approve(&mut self, context: &PacketContext, decision: Decision) {
        // SAFETY: as in `find`.
        unsafe {
            (*self.flow).generation = context.generation;
            (*self.flow).rule = decision.rule();
            (*self.flow).reason = decision.reason();
        }
    }

    /// The tables deny the opener.
    #[inline(always)]
    fn revoke(&mut self) {
        self.set_state(STATE_TOMBSTONE);
        self.touch();
    }

    #[inline(always)]
    fn refresh_by_opener(&mut self, context: &PacketContext) {
        if context.packet.is_closing() {
            self.set_state(STATE_CLOSING);
        } else if self.is_tombstone() || (context.packet.is_opening() && self.state() == STATE_CLOSING) {
            self.set_state(STATE_OPENING);
        }
        self.touch();
        // SAFETY: as in `find`.
        unsafe {
            (*self.flow).packets += 1;
            (*self.flow).bytes += u64::from(context.length);
        }
    }

    #[inline(always)]
    fn refresh_by_reply(&mut self, context: &PacketContext) {
        if context.packet.is_closing() {
            self.set_state(STATE_CLOSING);
        } else if self.state() == STATE_OPENING {
            self.set_state(STATE_ESTABLISHED);
        }
        self.touch();
        // SAFETY: as in `find`.
        unsafe {
            (*self.flow).reply_packets += 1;
            (*self.flow).reply_bytes += u64::from(context.length);
        }
    }

    #[inline(always)]
    fn touch(&mut self) {
        // SAFETY: as in `find`.
        unsafe { (*self.flow).seen = self.now };
    }

    #[inline(always)]
    fn rule(&self) -> u32 {
        // SAFETY: as in `find`.
        unsafe { (*self.flow).rule }
    }

    #[inline(always)]
    fn state(&self) -> u8 {
        // SAFETY: as in `find`.
        unsafe { (*self.flow).state }
    }

    #[inline(always)]
    fn set_state(&mut self, state: u8) {
        // SAFETY: as in `find`.
        unsafe { (*self.flow).state = state };
    }
}
