//! Denied packets, and packets of rules with `log`, as userspace hears of them.

use crate::table::Address;

/// One packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// `bpf_ktime_get_ns`.
    pub time: u64,
    /// Revision of the tables that judged it.
    pub revision: u64,
    pub source: Address,
    pub destination: Address,
    /// Ids of the cidrs; 0: none or not looked up.
    pub source_cidr: u32,
    pub destination_cidr: u32,
    /// Counter slot of the deciding rule, or `NO_RULE_SLOT`.
    pub rule: u32,
    /// Bytes from the IP header on.
    pub length: u32,
    /// Host order; ICMP: the identifier of an echo, else 0.
    pub source_port: u16,
    /// Host order; ICMP: the type.
    pub destination_port: u16,
    /// Protocol number.
    pub protocol: u8,
    /// `EGRESS` or `INGRESS`.
    pub direction: u8,
    /// A `reason`.
    pub reason: u8,
    pub _pad: u8,
    /// Events of this reason that the rate limit suppressed since the last one reported.
    pub suppressed: u64,
}

/// A token bucket; races between CPUs may let a few more through, never lose a count.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When the tokens were last counted, ns.
    pub time: u64,
    pub tokens: u64,
    /// Suppressed since the last event that passed.
    pub suppressed: u64,
    /// The kernel's tick in which there was no token; 0: none yet.
    pub empty: u64,
}

/// The coarse clock as one CPU read it last: it stands still within a tick.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// `bpf_jiffies64`, which is never 0; 0: not read yet.
    pub tick: u64,
    /// `bpf_ktime_get_coarse_ns`.
    pub time: u64,
}

const _: () = assert!(size_of::<Event>() == 80);
const _: () = assert!(size_of::<Bucket>() == 32);
const _: () = assert!(size_of::<Clock>() == 16);

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
    // SAFETY: repr(C), no hidden padding, no invalid bit pattern.
    unsafe impl aya::Pod for super::Event {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Bucket {}
}
