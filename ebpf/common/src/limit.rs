//! Sizes of the tables and maps. They are allocated whole, so these are also what a node pays: a copy of the tables is
//! 14.8 MB.

/// Blocks of 256 entries in one copy of the stride table (1,024 bytes each): one wherever prefixes part. A densely filled
/// IPv4 /16 of 10,000 cidrs needs 256.
pub const BLOCKS: u32 = 8_192;
/// Paths in one copy of the stride table (40 bytes each): at most one ahead of each block, and one for each prefix that
/// has no block to end in, as a sparse IPv6 /128.
pub const PATHS: u32 = 32_768;
/// Distinct (class, cidr, holder) triples in one copy.
pub const LEAVES: u32 = 65_536;
/// Cells of one copy: 2 directions x classes of the node's own x classes it can talk to.
pub const CELLS: u32 = 524_288;
/// Action sets that tell services apart, in one copy.
pub const PAGES: u32 = 1_024;
/// Deduplicated runs of 256 ports in one copy.
pub const PORTS: u32 = 2_048;
/// Distinct decisions in one copy.
pub const DECISIONS: u32 = 8_192;
/// Rules with a counter of their own in one node's slice.
pub const RULES: u32 = 8_192;
/// Records of flows. A full table refuses new records, never allows.
pub const FLOWS: u32 = 131_072;
/// Bits of one half of the records' filter: with so many records in it one packet in nine is looked up for nothing.
pub const FLOW_BITS: u32 = 8 * FLOWS;
/// Records beyond which the quota of [`FLOWS_PER_REMOTE`] holds: below it there is room for everybody.
pub const FLOWS_FREE: u32 = FLOWS / 2;
/// Records that one remote node, or one external cidr behind a gateway, may add to once [`FLOWS_FREE`] are there. Of the
/// half that is left, it takes eight of them together to fill it.
pub const FLOWS_PER_REMOTE: u32 = FLOWS / 16;
/// Remote nodes that are told apart for that quota: twice the nodes that a network is made for.
pub const REMOTES: u32 = 32_768;
/// Records of datagrams in fragments: 256 of each pair of addresses and protocol at the most.
pub const FRAGMENTS: u32 = 32_768;
/// (direction, source cidr, destination cidr, reason) with counters of their own, 40 bytes each on every CPU. Up to three
/// quarters of them find room however they look; some beyond that, and those that none is left for, are counted as lost.
pub const PAIRS: u32 = 16_384;
/// Buckets of slots that hold them, for each CPU.
pub const PAIR_BUCKETS: u32 = PAIRS / crate::counter::PAIR_WAYS as u32;
/// Bytes of the events' ring buffer; a power of two, a multiple of the page size.
pub const EVENT_BYTES: u32 = 262_144;
/// The longest walk of an IPv4 address: the path along the network's own root; for each two of its 4 bytes a path that ends
/// within the first, one along the rest of that and a block that reads the second; and the leaf.
pub const STEPS_V4: u32 = 8;
/// Likewise of an IPv6 address, which has 16 bytes.
pub const STEPS_V6: u32 = 26;
/// Events per second and reason that reach the ring buffer, and the largest burst.
pub const EVENTS_PER_SECOND: u64 = 32;
