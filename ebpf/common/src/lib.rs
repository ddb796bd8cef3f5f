//! The tables, counters and events that `noded` and the eBPF programs share: the ABI of the pinned maps.
//!
//! Everything here is `repr(C)`, made of integers and byte arrays, with its padding written out. A change of any layout,
//! limit or meaning raises [`ABI_VERSION`], which is part of the pin path: another version never reads these maps.
//!
//! # How a packet finds its decision
//!
//! ```text
//! CONTROL.active ──► TABLES[c], a copy of all tables (0 or 1), read once a packet
//! address ─ header.root ─► paths, blocks … ─► leaves = (class, cidr, holder)        one walk for s, one for d
//! (direction, own class, other class) ─► matrix = decision | page                  one load
//! (page, service) ─► pages (─► ports) ─► decisions = (verdict, reason, rule slot, flags)
//! ```
//!
//! A copy is one value of one map: a program asks the map for it once and walks from there by plain loads, which is what
//! makes a lookup cheap (the map would be asked for each step otherwise), and userspace maps both into its memory.

#![no_std]

pub mod bench;
pub mod blake2s;
pub mod counter;
pub mod event;
pub mod flow;
pub mod fragment;
pub mod limit;
pub mod packet;
pub mod reason;
pub mod table;
pub mod underlay;

/// Version of everything in this crate; part of the pin path.
pub const ABI_VERSION: u32 = 5;

/// Names of the maps in the object, which are also the names of their pins.
pub mod map {
    /// `Array<Control>`, 1 entry.
    pub const CONTROL: &str = "CONTROL";
    /// `Array<TableCopy>`, 2 entries, which can be mapped into memory.
    pub const TABLES: &str = "TABLES";
    /// `HashMap<FlowKey, Flow>`, `FLOWS` entries.
    pub const FLOWS: &str = "FLOWS";
    /// `Array<FlowFilter>`, 1 entry, which can be mapped into memory: what is certainly in no record of FLOWS.
    pub const FLOW_FILTER: &str = "FLOW_FILTER";
    /// `HashMap<Remote, u64>`, `REMOTES` entries: records that the programs made for each remote node, ever.
    pub const FLOWS_OPENED: &str = "FLOWS_OPENED";
    /// `HashMap<Remote, u64>`, `REMOTES` entries: those of them that are no more, as userspace counted last.
    pub const FLOWS_GONE: &str = "FLOWS_GONE";
    /// `Array<u64>`, one entry per `flow::TOTAL_*`.
    pub const FLOW_TOTALS: &str = "FLOW_TOTALS";
    /// `HashMap<FragmentKey, Fragment>`, `FRAGMENTS` entries.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// `PerCpuArray<Counter>`, `DIRECTIONS * REASONS` entries.
    pub const REASON_COUNTERS: &str = "REASON_COUNTERS";
    /// `PerCpuArray<Counter>`, `RULES` entries, by rule slot.
    pub const RULE_COUNTERS: &str = "RULE_COUNTERS";
    /// `PerCpuArray<PairBucket>`, `PAIR_BUCKETS` entries. Each CPU has a table of its own; a key may be in several.
    pub const PAIR_TABLE: &str = "PAIR_TABLE";
    /// `PerCpuArray<u64>`, one entry per `counter::LOSS_*`.
    pub const LOSSES: &str = "LOSSES";
    /// `RingBuf` of `Event`.
    pub const EVENTS: &str = "EVENTS";
    /// `Array<Bucket>`, `REASONS` entries: the rate limit of events.
    pub const EVENT_BUCKETS: &str = "EVENT_BUCKETS";
    /// `PerCpuArray<Clock>`, 1 entry.
    pub const CLOCK: &str = "CLOCK";

    /// What the counters' maps hold, as text for other versions. No program reads it.
    pub const LAYOUT: &str = "LAYOUT";
    /// What predecessors counted; added to the counters by whoever reads them. No program touches it.
    pub const INHERITED: &str = "CARRIED";

    /// The policy: what a probe shares with the enforcing programs.
    pub const POLICY: [&str; 2] = [CONTROL, TABLES];
    /// What belongs to no copy of the tables and outlives every generation.
    pub const STATE: [&str; 13] = [
        FLOWS,
        FLOW_FILTER,
        FLOWS_OPENED,
        FLOWS_GONE,
        FLOW_TOTALS,
        FRAGMENTS,
        REASON_COUNTERS,
        RULE_COUNTERS,
        PAIR_TABLE,
        LOSSES,
        EVENTS,
        EVENT_BUCKETS,
        CLOCK,
    ];
}

/// Names of the read-only globals that tell one instance of the program from another.
pub mod global {
    /// `u32`: bytes of link header ahead of the IP header; 0 on a WireGuard interface.
    pub const LINK_HEADER: &str = "LINK_HEADER";
    /// `u32`: [`super::EGRESS`] or [`super::INGRESS`].
    pub const DIRECTION: &str = "DIRECTION";
    /// `u32`: 1 makes the programs report every packet through aya-log.
    pub const TRACE: &str = "TRACE";
    /// `u32`: 1 makes the programs report every packet as an event, whatever its verdict and however many there are. For
    /// probes: it says of each packet what was found, without a look at every counter.
    pub const EVERY: &str = "EVERY";
    /// `i32`: what the program returns to let a packet pass: `TCX_NEXT` (-1; where other clsact filters
    /// follow, `TC_ACT_UNSPEC` is the same number).
    pub const ALLOW: &str = "ALLOW";
}

/// Name of the classifier in the object; it is loaded once for each direction.
pub const PROGRAM: &str = "rampart";

/// Name of the XDP program in the object that drops early, at ingress, what the classifier would drop in any case.
pub const EARLY_PROGRAM: &str = "early";

/// The packet leaves this node: its source must be this node's.
pub const EGRESS: u32 = 0;
/// The packet arrives at this node: its destination must be this node's.
pub const INGRESS: u32 = 1;
/// Number of directions.
pub const DIRECTIONS: u32 = 2;
/// Copies of the tables.
pub const COPIES: u32 = 2;
