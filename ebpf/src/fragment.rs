//! Later fragments have no transport header: they are judged by what their datagram's first one said.
//!
//! A record is made of a first fragment that passed, and says nothing of a verdict: each later fragment is judged anew, as
//! if the header were its own, so that a change of policy counts for it too. One that comes before its first, or whose
//! first was dropped, has no record.
#![allow(unsafe_code, reason = "map values are shared with other CPUs")]

use ebpf_common::counter::LOSS_FRAGMENT;
use ebpf_common::fragment::{Fragment, FragmentKey, LIFETIME_NS};

use crate::clock::now;
use crate::context::PacketContext;
use crate::maps::{FRAGMENTS, lose};

/// What is known of a later fragment's datagram.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Datagram {
    Unknown,
    /// The fragment would overwrite what the first one said.
    Overlapped,
    /// The packet has the first fragment's transport header now.
    Known,
}

/// Remembers a first fragment that passed.
#[inline(never)]
pub(crate) fn keep(context: &PacketContext) -> u32 {
    let packet = &context.packet;
    let fragment = Fragment {
        seen: now(),
        id: packet.fragment_id,
        edge: packet.fragment_edge,
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        protocol: packet.protocol,
        tcp_flags: packet.tcp_flags,
        _pad: [0; 2],
    };
    if FRAGMENTS.insert(FragmentKey::new(packet), fragment, 0).is_err() {
        lose(LOSS_FRAGMENT);
    }
    0
}

/// Gives a later fragment the transport header of its datagram's first, where that is known.
#[inline(always)]
pub(crate) fn recall(context: &mut PacketContext) -> Datagram {
    let Some(fragment) = FRAGMENTS.get_ptr(FragmentKey::new(&context.packet)) else { return Datagram::Unknown };
    // SAFETY: the map's value, checked not to be null; an update replaces it whole, so that it is of one datagram.
    let fragment = unsafe { *fragment };
    if fragment.id != context.packet.fragment_id || now().saturating_sub(fragment.seen) > LIFETIME_NS {
        return Datagram::Unknown;
    }
    if context.packet.fragment_edge < fragment.edge {
        return Datagram::Overlapped;
    }
    context.packet.protocol = fragment.protocol;
    context.packet.source_port = fragment.source_port;
    context.packet.destination_port = fragment.destination_port;
    context.packet.tcp_flags = fragment.tcp_flags;
    Datagram::Known
}
