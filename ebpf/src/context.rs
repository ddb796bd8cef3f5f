//! A packet and what is found out about it on the way to its verdict.

use ebpf_common::packet::Packet;
use ebpf_common::table::NO_RULE_SLOT;

use crate::hook::Hook;

/// Lives on the stack of the classifier; its functions hand it on by reference.
#[derive(Debug)]
pub struct PacketContext {
    pub packet: Packet,
    /// Bytes from the IP header on, by the kernel's word.
    pub length: u32,
    /// On the wire: a GSO packet is several, as is known once it was read.
    pub segments: u32,
    /// The copy of the tables that judges this packet, and the switch that put it in force.
    pub copy: u32,
    pub generation: u32,
    /// Class of the end that this node stands for, and of the other end.
    pub own: u32,
    pub other: u32,
    /// 0: none or not looked up.
    pub source_cidr: u32,
    pub destination_cidr: u32,
    /// Of the other end, where a gateway stands for it: its cidr, else 0.
    pub behind: u32,
    /// Counter slot of the deciding rule.
    pub rule: u32,
    pub reason: u8,
    /// Whether the deciding rule asks for its packets to be reported.
    pub log: bool,
}

impl PacketContext {
    #[inline(always)]
    pub fn new(hook: &impl Hook) -> Self {
        Self {
            packet: Packet::default(),
            length: hook.length(),
            segments: 1,
            copy: 0,
            generation: 0,
            own: 0,
            other: 0,
            source_cidr: 0,
            destination_cidr: 0,
            behind: 0,
            rule: NO_RULE_SLOT,
            reason: 0,
            log: false,
        }
    }
}
