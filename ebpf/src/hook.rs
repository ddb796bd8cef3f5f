//! Where a packet comes from.
#![allow(unsafe_code, reason = "the context and the packet's bytes are the kernel's")]

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::helpers::bpf_skb_load_bytes;
use aya_ebpf::helpers::generated::{bpf_xdp_get_buff_len, bpf_xdp_load_bytes};
use aya_ebpf::programs::{TcContext, XdpContext};
use core::mem::MaybeUninit;
use ebpf_common::packet::{self, Load, Packet};
use ebpf_common::reason;

use crate::context::PacketContext;
use crate::event;
use crate::maps::LINK_HEADER;
use crate::settled::settled;

/// A packet from its IP header on, where the kernel hands it to a program.
pub trait Hook: Load {
    /// Bytes from the IP header on, by the kernel's word.
    fn length(&self) -> u32;

    /// Reads the headers of a packet of `length` bytes; [`WHOLE`] or the reason to drop.
    fn read(&self, packet: &mut Packet, length: u32) -> u32;

    /// On the wire: a GSO packet is several. `packet` is what was read of it.
    fn segments(&self, packet: &Packet) -> u32;

    /// Says through aya-log what was found.
    fn trace(&self, packet_context: &PacketContext);
}

/// At a classifier.
#[expect(missing_debug_implementations, reason = "the context has none")]
pub struct Skb<'a>(pub &'a TcContext);

impl Hook for Skb<'_> {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.len().saturating_sub(LINK_HEADER.load())
    }

    #[inline(always)]
    fn read(&self, packet: &mut Packet, length: u32) -> u32 {
        if read_near(self.0.skb.skb, packet, length) == WHOLE {
            return WHOLE;
        }
        *packet = Packet::default();
        read_packet(self.0.skb.skb, packet, length)
    }

    #[inline(always)]
    fn segments(&self, packet: &Packet) -> u32 {
        // SAFETY: the kernel calls the program with a valid context.
        let (segments, size) = unsafe { ((*self.0.skb.skb).gso_segs, (*self.0.skb.skb).gso_size) };
        // Those who hand the kernel a large packet, a guest or a TUN, say how it is to be cut and not into how many.
        if segments != 0 || size == 0 { segments.max(1) } else { cut(self, packet, size) }
    }

    #[inline(always)]
    fn trace(&self, packet_context: &PacketContext) {
        event::trace(self.0, packet_context);
    }
}

/// Only headers may be linear, so the kernel copies what is not.
impl Load for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let offset = LINK_HEADER.load() + offset;
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes all `N` bytes, or fails.
        unsafe {
            let failed = bpf_skb_load_bytes(self.0.as_ptr().cast(), offset, bytes.as_mut_ptr().cast(), N as u32);
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

    #[inline(always)]
    fn walk_headers(&self, packet: &mut Packet) -> Result<(), u8> {
        match walk_headers(self.0.skb.skb, packet) {
            WHOLE => Ok(()),
            reason => Err(reason as u8),
        }
    }
}

/// The part of a packet that is where a program can read it without a call. Nothing is found behind it, nor anything that
/// would take a loop: what most packets have lies in it, and of the others all is read again.
struct Near {
    start: usize,
    end: usize,
}

/// As far into that part. The verifier wants a bound.
const NEAR: u32 = 256;

impl Load for Near {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let from = LINK_HEADER.load() + offset;
        if from > NEAR {
            return None;
        }
        let bytes = settled(self.start + from as usize);
        // SAFETY: the packet goes on for as long as that, which the verifier sees too.
        (bytes + N <= self.end).then(|| unsafe { words(bytes) })
    }

    #[inline(always)]
    fn walk_ipv4_options(&self, _header_length: u32) -> Result<(), u8> {
        Err(reason::MALFORMED)
    }

    #[inline(always)]
    fn walk_headers(&self, _packet: &mut Packet) -> Result<(), u8> {
        Err(reason::MALFORMED)
    }
}

/// `N` bytes of a packet, by words wherever they lie: the compiler would take them byte by byte.
///
/// # Safety
/// The packet goes on for `N` bytes from `bytes` on.
#[inline(always)]
unsafe fn words<const N: usize>(bytes: usize) -> [u8; N] {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's; the last bytes that make no word are read one by one.
    unsafe {
        let mut read = [0; N];
        let mut at = 0;
        while at + 4 <= N {
            let word: u64;
            core::arch::asm!(
                "{word} = *(u32 *)({from} + 0)",
                word = out(reg) word,
                from = in(reg) bytes + at,
                options(pure, readonly, nostack),
            );
            let [a, b, c, d] = (word as u32).to_ne_bytes();
            (read[at], read[at + 1], read[at + 2], read[at + 3]) = (a, b, c, d);
            at += 4;
        }
        while at < N {
            read[at] = *((bytes + at) as *const u8);
            at += 1;
        }
        read
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        (bytes as *const [u8; N]).read_unaligned()
    }
}

/// At XDP, before there is an skb.
#[expect(missing_debug_implementations, reason = "the context has none")]
pub struct Buffer<'a>(pub &'a XdpContext);

impl Hook for Buffer<'_> {
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the kernel calls the program with a valid context.
        let length = unsafe { bpf_xdp_get_buff_len(self.0.ctx) };
        (length as u32).saturating_sub(LINK_HEADER.load())
    }

    #[inline(always)]
    fn read(&self, packet: &mut Packet, length: u32) -> u32 {
        read_early(self.0.ctx, packet, length)
    }

    /// Nothing was aggregated yet.
    #[inline(always)]
    fn segments(&self, _packet: &Packet) -> u32 {
        1
    }

    #[inline(always)]
    fn trace(&self, packet_context: &PacketContext) {
        event::trace(self.0, packet_context);
    }
}

impl Load for Buffer<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes all `N` bytes, or fails.
        unsafe {
            let failed =
                bpf_xdp_load_bytes(self.0.ctx, LINK_HEADER.load() + offset, bytes.as_mut_ptr().cast(), N as u32);
            (failed == 0).then(|| bytes.assume_init())
        }
    }

    #[inline(always)]
    fn walk_ipv4_options(&self, header_length: u32) -> Result<(), u8> {
        match walk_options_early(self.0.ctx, header_length) {
            WHOLE => Ok(()),
            reason => Err(reason as u8),
        }
    }

    #[inline(always)]
    fn walk_headers(&self, packet: &mut Packet) -> Result<(), u8> {
        match walk_headers_early(self.0.ctx, packet) {
            WHOLE => Ok(()),
            reason => Err(reason as u8),
        }
    }
}

/// How many packets of `size` bytes behind the headers a packet becomes.
#[inline(never)]
fn cut(skb: &Skb<'_>, packet: &Packet, size: u32) -> u32 {
    let transport = match packet.protocol {
        packet::TCP => skb.load(packet.transport + 12).map_or(0, |[offset]: [u8; 1]| u32::from(offset >> 4) * 4),
        packet::UDP => 8,
        _ => 0,
    };
    let payload = skb.length().saturating_sub(packet.transport + transport);
    // The verifier knows by the caller's test alone that it divides by no zero.
    payload.div_ceil(size.max(1)).max(1)
}

/// Returned by functions of their own for a packet that has no fault; else it is a reason.
pub const WHOLE: u32 = u32::MAX;

/// Of global linkage: the verifier checks it once, for every packet and length, and its caller once, for whatever was
/// read, and not once for each of the ways in which a packet can be read. (On the host `read` would be the C library's.)
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_packet(context: *mut __sk_buff, packet: *mut Packet, length: u32) -> u32 {
    // SAFETY: a packet of the caller's, or null for all that the verifier knows.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return reason::MALFORMED.into() };
    match packet.read(&Skb(&TcContext::new(context)), length) {
        Ok(()) => WHOLE,
        Err(reason) => reason.into(),
    }
}

/// As [`read_packet`], for most packets, and a reason for the others that may be none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_near(context: *mut __sk_buff, packet: *mut Packet, length: u32) -> u32 {
    // SAFETY: as in `read_packet`.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return reason::MALFORMED.into() };
    let context = TcContext::new(context);
    match packet.read(&Near { start: context.data(), end: context.data_end() }, length) {
        Ok(()) => WHOLE,
        Err(reason) => reason.into(),
    }
}

/// As [`read_packet`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_early(context: *mut xdp_md, packet: *mut Packet, length: u32) -> u32 {
    // SAFETY: as in `read_packet`.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return reason::MALFORMED.into() };
    match packet.read(&Buffer(&XdpContext::new(context)), length) {
        Ok(()) => WHOLE,
        Err(reason) => reason.into(),
    }
}

/// As [`read_packet`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_options(context: *mut __sk_buff, header_length: u32) -> u32 {
    match packet::walk_ipv4_options(&Skb(&TcContext::new(context)), header_length) {
        Ok(()) => WHOLE,
        Err(reason) => u32::from(reason),
    }
}

/// As [`read_packet`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_options_early(context: *mut xdp_md, header_length: u32) -> u32 {
    match packet::walk_ipv4_options(&Buffer(&XdpContext::new(context)), header_length) {
        Ok(()) => WHOLE,
        Err(reason) => u32::from(reason),
    }
}

/// As [`read_packet`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_headers(context: *mut __sk_buff, packet: *mut Packet) -> u32 {
    // SAFETY: as in `read_packet`.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return reason::MALFORMED.into() };
    match packet.walk_headers(&Skb(&TcContext::new(context))) {
        Ok(()) => WHOLE,
        Err(reason) => reason.into(),
    }
}

/// As [`read_packet`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_headers_early(context: *mut xdp_md, packet: *mut Packet) -> u32 {
    // SAFETY: as in `read_packet`.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return reason::MALFORMED.into() };
    match packet.walk_headers(&Buffer(&XdpContext::new(context))) {
        Ok(()) => WHOLE,
        Err(reason) => reason.into(),
    }
}
