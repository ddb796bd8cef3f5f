//! Where the guard's bytes come from: a classifier's buffer, or a driver's.
#![allow(unsafe_code, reason = "the context and the packet's bytes are the kernel's")]

use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::helpers::{bpf_skb_load_bytes, bpf_xdp_get_buff_len, bpf_xdp_load_bytes};
use aya_ebpf::programs::{TcContext, XdpContext};
use ebpf_common::underlay::{Frame, Transport, walk_ipv6};

/// What a program needs of a frame beyond what the parser does.
pub(crate) trait Hook: Frame {
    /// Bytes of one datagram's message where the kernel has joined several that came together (GRO), else 0.
    fn joined(&self) -> u32;

    /// Datagrams in it.
    fn segments(&self) -> u32;

    /// Index of the interface that it came by.
    fn interface(&self) -> u32;

    /// `N` bytes at an offset, at most 64, as words of little-endian order, ahead of zeros.
    fn fill<const N: u32>(&self, offset: u32, words: &mut [u32; 16]) -> bool;
}

/// At a classifier.
pub(crate) struct Skb<'a>(pub(crate) &'a TcContext);

/// In a driver. It joins nothing.
pub(crate) struct Buffer<'a>(pub(crate) &'a XdpContext);

impl Frame for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes all `N` bytes, or fails.
        unsafe {
            let failed = bpf_skb_load_bytes(self.0.as_ptr().cast(), offset, bytes.as_mut_ptr().cast(), N as u32);
            (failed == 0).then(|| bytes.assume_init())
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.len()
    }

    #[inline(always)]
    fn walk_ipv6(&self, start: u32, protocol: u8) -> Transport {
        Transport(walk_skb(self.0.skb.skb, start, protocol.into()))
    }
}

impl Hook for Skb<'_> {
    #[inline(always)]
    fn joined(&self) -> u32 {
        // SAFETY: the kernel calls the program with a valid context.
        unsafe { (*self.0.skb.skb).gso_size }
    }

    #[inline(always)]
    fn segments(&self) -> u32 {
        // SAFETY: as above.
        let segments = unsafe { (*self.0.skb.skb).gso_segs };
        segments.max(1)
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).ifindex }
    }

    #[inline(always)]
    fn fill<const N: u32>(&self, offset: u32, words: &mut [u32; 16]) -> bool {
        fill::<N>(words, |to| {
            // SAFETY: there is room for the `N` bytes.
            unsafe { bpf_skb_load_bytes(self.0.as_ptr().cast(), offset, to.cast(), N) == 0 }
        })
    }
}

impl Frame for Buffer<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes all `N` bytes, or fails.
        unsafe {
            let failed = bpf_xdp_load_bytes(self.0.ctx, offset, bytes.as_mut_ptr().cast(), N as u32);
            (failed == 0).then(|| bytes.assume_init())
        }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the kernel calls the program with a valid context.
        unsafe { bpf_xdp_get_buff_len(self.0.ctx) as u32 }
    }

    #[inline(always)]
    fn walk_ipv6(&self, start: u32, protocol: u8) -> Transport {
        Transport(walk_buffer(self.0.ctx, start, protocol.into()))
    }
}

impl Hook for Buffer<'_> {
    #[inline(always)]
    fn joined(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn segments(&self) -> u32 {
        1
    }

    #[inline(always)]
    fn interface(&self) -> u32 {
        // SAFETY: the kernel calls the program with a valid context.
        unsafe { (*self.0.ctx).ingress_ifindex }
    }

    #[inline(always)]
    fn fill<const N: u32>(&self, offset: u32, words: &mut [u32; 16]) -> bool {
        fill::<N>(words, |to| {
            // SAFETY: there is room for the `N` bytes.
            unsafe { bpf_xdp_load_bytes(self.0.ctx, offset, to.cast(), N) == 0 }
        })
    }
}

#[inline(always)]
fn fill<const N: u32>(words: &mut [u32; 16], load: impl FnOnce(*mut u32) -> bool) -> bool {
    const { assert!(N <= 64) }
    *words = [0; 16];
    if !load(words.as_mut_ptr()) {
        return false;
    }
    if cfg!(target_endian = "big") {
        for word in words {
            *word = u32::from_le(*word);
        }
    }
    true
}

/// Of global linkage: the verifier checks the walk once, and not along each path that leads here.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_skb(context: *mut __sk_buff, start: u32, protocol: u32) -> u32 {
    // What the verifier knows of the arguments is their types.
    walk_ipv6(&Plain(Skb(&TcContext::new(context))), start & 0xffff, protocol as u8).0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn walk_buffer(context: *mut xdp_md, start: u32, protocol: u32) -> u32 {
    walk_ipv6(&Plain(Buffer(&XdpContext::new(context))), start & 0xffff, protocol as u8).0
}

/// The same bytes, for the functions that walk.
struct Plain<F>(F);

impl<F: Frame> Frame for Plain<F> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.load(offset)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.length()
    }
}
