//! A packet and what is found out about it on the way to its verdict.
#![allow(unsafe_code, reason = "the context and the packet's bytes are the kernel's")]

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_skb_load_bytes;
use aya_ebpf::programs::TcContext;
use core::mem::MaybeUninit;
use ebpf_common::packet::{self, Load, Packet};
use ebpf_common::table::NO_RULE_SLOT;
use ebpf_common::{EGRESS, INGRESS};

use crate::maps::{DIRECTION, LINK_HEADER};

/// Lives on the stack of the classifier; its functions hand it on by reference.
pub(crate) struct Case {
    pub(crate) packet: Packet,
    /// Bytes from the IP header on, by the kernel's word.
    pub(crate) length: u32,
    /// On the wire: a GSO packet is several.
    pub(crate) segments: u32,
    /// The copy of the tables that judges this packet, and the switch that put it in force.
    pub(crate) copy: u32,
    pub(crate) generation: u32,
    /// Class of the end that this node stands for, and of the other end.
    pub(crate) own: u32,
    pub(crate) other: u32,
    /// 0: none or not looked up.
    pub(crate) source_cidr: u32,
    pub(crate) destination_cidr: u32,
    /// Counter slot of the deciding rule.
    pub(crate) rule: u32,
    pub(crate) reason: u8,
    /// Whether the deciding rule asks for its packets to be reported.
    pub(crate) log: bool,
}

impl Case {
    #[inline(always)]
    pub(crate) fn new(context: &TcContext) -> Self {
        // SAFETY: the kernel calls the program with a valid context.
        let segments = unsafe { (*context.skb.skb).gso_segs };
        Self {
            packet: Packet::default(),
            length: context.len().saturating_sub(LINK_HEADER.load()),
            segments: segments.max(1),
            copy: 0,
            generation: 0,
            own: 0,
            other: 0,
            source_cidr: 0,
            destination_cidr: 0,
            rule: NO_RULE_SLOT,
            reason: 0,
            log: false,
        }
    }
}

/// `EGRESS` or `INGRESS`, whatever userspace wrote.
#[inline(always)]
pub(crate) fn direction() -> u32 {
    if DIRECTION.load() == EGRESS { EGRESS } else { INGRESS }
}

/// The packet from the IP header on. Only headers may be linear at egress, so the bytes are copied by the kernel.
pub(crate) struct Bytes<'a>(pub(crate) &'a TcContext);

impl Load for Bytes<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes all `N` bytes, or fails.
        unsafe {
            let failed = bpf_skb_load_bytes(
                self.0.skb.skb.cast(),
                LINK_HEADER.load() + offset,
                bytes.as_mut_ptr().cast(),
                N as u32,
            );
            (failed == 0).then(|| bytes.assume_init())
        }
    }

    #[inline(always)]
    fn walk_ipv4_options(&self, header_length: u32) -> Result<(), u8> {
        match walk_options(self.0.skb.skb, header_length) {
            WHOLE => Ok(()),
            reason => Err(reason as u8),
        }
    }
}

/// Returned by functions of their own for a packet that has no fault; else it is a reason.
pub(crate) const WHOLE: u32 = u32::MAX;

/// Of global linkage: the verifier checks it once, for every packet and length, and not along each path that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_options(context: *mut __sk_buff, header_length: u32) -> u32 {
    match packet::walk_ipv4_options(&Bytes(&TcContext::new(context)), header_length) {
        Ok(()) => WHOLE,
        Err(reason) => u32::from(reason),
    }
}
