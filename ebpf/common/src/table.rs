//! The policy's tables. See the crate's documentation for how they hang together.

use crate::limit;

/// One word that every hook reads once a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// The copy of the tables in force: 0 or 1.
    pub active: u32,
    /// Counts switches; 0 means that no policy was ever loaded, and everything is dropped as `no-policy`.
    pub generation: u32,
}

/// One copy of the tables: a value of the map TABLES.
#[repr(C)]
#[derive(Debug)]
pub struct TableCopy {
    /// First, so that another version finds the revision.
    pub header: Header,
    pub blocks: [Block; limit::BLOCKS as usize],
    pub paths: [Path; limit::PATHS as usize],
    pub leaves: [Leaf; limit::LEAVES as usize],
    /// Cells; see [`cell_index`].
    pub matrix: [u32; limit::CELLS as usize],
    pub pages: [Page; limit::PAGES as usize],
    pub ports: [Ports; limit::PORTS as usize],
    pub decisions: [Decision; limit::DECISIONS as usize],
}

/// What is known of one copy as a whole.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The controller's revision that this copy was lowered from.
    pub revision: u64,
    /// The switch that put this copy in force; 0: never filled.
    pub generation: u32,
    /// Classes 1..=own belong to addresses that this node stands for (and possibly to others, see [`LOCAL`]).
    pub own: u32,
    /// The length of a row of the matrix: more than any class is. Numbers that no class has are closed.
    pub classes: u32,
    /// Where the walk of an address begins, as in [`Block::entries`].
    pub root_v4: u32,
    pub root_v6: u32,
    /// So that what follows begins with a cache line.
    pub _pad: [u32; 9],
}

/// An IPv6 address or an IPv4-mapped one (RFC 4291, 2.5.5.2), as two words in memory order: word 0 is bytes 0-7. The
/// words are loaded and compared as they lie in memory, so no byte order is involved.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub [u64; 2]);

impl Address {
    /// From 16 bytes in network order.
    #[inline(always)]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Self([u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes([i, j, k, l, m, n, o, p])])
    }

    /// From the 4 bytes of an IPv4 address in network order.
    #[inline(always)]
    pub const fn from_v4(v4: [u8; 4]) -> Self {
        let [a, b, c, d] = v4;
        Self::from_bytes([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    /// The 16 bytes in network order.
    #[inline(always)]
    pub const fn to_bytes(self) -> [u8; 16] {
        let [a, b, c, d, e, f, g, h] = self.0[0].to_ne_bytes();
        let [i, j, k, l, m, n, o, p] = self.0[1].to_ne_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    /// Byte `at & 15` in network order.
    #[inline(always)]
    pub const fn octet(self, at: u32) -> u8 {
        let word = if at & 8 == 0 { self.0[0] } else { self.0[1] };
        (word.to_le() >> (8 * (at & 7))) as u8
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        let bytes = self.to_bytes();
        self.0[0] == 0 && bytes[8] == 0 && bytes[9] == 0 && bytes[10] == 0xff && bytes[11] == 0xff
    }
}

impl From<core::net::IpAddr> for Address {
    fn from(address: core::net::IpAddr) -> Self {
        match address {
            core::net::IpAddr::V4(v4) => Self::from_v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Self::from_bytes(v6.octets()),
        }
    }
}

impl From<Address> for core::net::IpAddr {
    fn from(address: Address) -> Self {
        core::net::Ipv6Addr::from(address.to_bytes()).to_canonical()
    }
}

/// One stride of 8 bits: the step of an address by one of its bytes.
///
/// An entry is what comes next: the index of a leaf, or with [`BLOCK`] that of a block and the byte that it reads, or with
/// [`PATH`] that of a path.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub entries: [u32; 256],
}

/// Bits in which nothing branches: addresses with `address & mask == prefix` go on in one entry, the others in another.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    pub mask: Address,
    pub prefix: Address,
    pub inside: u32,
    pub outside: u32,
}

/// In an entry: a block comes next. Neither this nor [`PATH`]: a leaf.
pub const BLOCK: u32 = 1 << 31;
/// In an entry: a path comes next.
pub const PATH: u32 = 1 << 30;
/// In an entry without [`BLOCK`]: the index of what comes next.
pub const INDEX: u32 = 0xffff;
/// In an entry with [`BLOCK`], from here on: the index of the block.
pub const BLOCK_SHIFT: u32 = 10;
/// In an entry with [`BLOCK`]: 8 times the number (0-15) of the byte that the block reads.
pub const BIT: u32 = 0x78;

/// The entry of a block that reads byte `position` (0-15) of the address.
pub const fn block_entry(index: u32, position: u32) -> u32 {
    BLOCK | index << BLOCK_SHIFT | (position * 8)
}

/// Index of the block in an entry that has [`BLOCK`], and the byte that it reads.
pub const fn block_of(entry: u32) -> (u32, u32) {
    ((entry & !BLOCK) >> BLOCK_SHIFT, (entry & BIT) / 8)
}

/// What an address is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Leaf {
    /// 0: in no cidr.
    pub class: u32,
    /// The deepest cidr's id; 0: none.
    pub cidr: u32,
    /// [`LOCAL`], or from [`HOLDER_SHIFT`] on a number.
    pub flags: u32,
}

impl Leaf {
    /// Whose address it is, if a gateway's; see [`HOLDER_SHIFT`].
    #[inline(always)]
    pub const fn holder(self) -> u32 {
        self.flags >> HOLDER_SHIFT
    }
}

/// In [`Leaf::flags`]: this node stands for the address.
pub const LOCAL: u32 = 1;
/// In [`Leaf::flags`]: the address lies in an external cidr, behind a gateway.
pub const EXTERNAL: u32 = 2;
/// In [`Leaf::flags`]: the bits from here on number the peer that stands for the address, if that peer is a gateway: its
/// own addresses and those behind it have one number. 0: this node, no gateway, or an address in no cidr. The numbers
/// say nothing beyond one copy of the tables.
pub const HOLDER_SHIFT: u32 = 8;

/// The index of leaf 0 of each copy: an address in no cidr.
pub const UNKNOWN: u32 = 0;

/// In a cell: the low 16 bits are the decision for every service; otherwise they are a page.
pub const UNIFORM: u32 = 1 << 31;
/// In a cell: an allowed flow needs a record, because the opposite cell does not allow every service.
pub const RECORD: u32 = 1 << 30;
/// In a cell: the index of the decision or page.
pub const CELL_INDEX: u32 = 0xffff;

/// Index of a cell in one copy of the matrix. `own` and `other` are classes, `own` in 1..=`header.own`.
#[inline(always)]
pub const fn cell_index(header_own: u32, classes: u32, direction: u32, own: u32, other: u32) -> u32 {
    (direction * header_own + (own - 1)) * classes + other
}

/// An action set: for each run of 256 services the index in PORTS of its decisions; and the same once more as a few ranges of
/// services, if they are so few.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Page {
    /// Where it is known, nothing else is looked at.
    pub few: Few,
    /// By type.
    pub icmp: u16,
    /// By type.
    pub icmpv6: u16,
    /// By protocol number, for the others.
    pub protocol: u16,
    /// The first cache line ends here, and the page at the end of another.
    pub _pad: [u16; 5],
    /// By destination port >> 8.
    pub tcp: [u16; 256],
    /// By destination port >> 8.
    pub udp: [u16; 256],
}

/// Ranges of services that have a decision each, where there are so few of them that one cache line holds them: most
/// action sets are a port or two and the rest. A service is its protocol << 16, and its port or ICMP type.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Few {
    /// The first service of each range but the first, which begins with 0, in order; [`Few::NO_START`] of those that there
    /// are not.
    pub starts: [u32; FEW - 1],
    /// 1, or 0: there are more ranges.
    pub known: u32,
    /// Indices in DECISIONS, by range: each is in one of the page's runs too, and 0 where there is no range.
    pub decisions: [u16; FEW],
}

/// Ranges that a [`Few`] has room for.
pub const FEW: usize = 8;

impl Few {
    /// There are more ranges.
    pub const UNKNOWN: Self = Self { starts: [Self::NO_START; FEW - 1], known: 0, decisions: [0; FEW] };
    /// No service is as high.
    pub const NO_START: u32 = u32::MAX;

    /// The index of a service's decision; `None`: there are more ranges.
    #[inline(always)]
    pub fn decision(&self, service: u32) -> Option<u16> {
        if self.known == 0 {
            return None;
        }
        // As many ranges begin no later as differences are negative; without a branch, of which each could be mispredicted.
        let after = service as u64 + 1;
        let range = self.starts.iter().fold(0, |range, start| range + ((*start as u64).wrapping_sub(after) >> 63));
        Some(self.decisions[range as usize & (FEW - 1)])
    }
}

/// 256 decisions, by the low byte of the port, by ICMP type or by protocol.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    /// Indices in DECISIONS.
    pub decisions: [u16; 256],
}

/// The end of the walk.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Decision {
    /// [`DENY`] or [`ALLOW`].
    pub verdict: u8,
    /// A `reason` of the policy: `RULE`, `LINEAGE` or `NO_RULE`.
    pub reason: u8,
    /// [`LOG`].
    pub flags: u16,
    /// The deciding rule's counter slot, or [`NO_RULE_SLOT`].
    pub rule: u32,
}

/// In [`Decision::verdict`].
pub const DENY: u8 = 0;
/// In [`Decision::verdict`].
pub const ALLOW: u8 = 1;
/// In [`Decision::flags`]: the rule asks for its packets to be reported.
pub const LOG: u16 = 1;
/// In [`Decision::rule`]: no rule decided.
pub const NO_RULE_SLOT: u32 = u32::MAX;

const _: () = assert!(size_of::<Control>() == 8);
const _: () =
    assert!(limit::BLOCKS <= 1 << (31 - BLOCK_SHIFT) && limit::PATHS <= INDEX + 1 && limit::LEAVES <= INDEX + 1);
const _: () = assert!(size_of::<TableCopy>().is_multiple_of(8));
const _: () = assert!(size_of::<Header>() == 64);
const _: () =
    assert!(core::mem::offset_of!(TableCopy, pages).is_multiple_of(64) && size_of::<TableCopy>().is_multiple_of(64));
const _: () = assert!(size_of::<Few>() == 48);
const _: () = assert!(size_of::<Block>() == 1_024);
const _: () = assert!(size_of::<Path>() == 40);
const _: () = assert!(size_of::<Leaf>() == 12);
const _: () = assert!(size_of::<Page>() == 1_088);
const _: () = assert!(size_of::<Ports>() == 512);
const _: () = assert!(size_of::<Decision>() == 8);

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
    // SAFETY: each is repr(C), has no padding that is not a field (asserted above) and no invalid bit pattern.
    unsafe impl aya::Pod for super::Control {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Header {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Block {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Path {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Leaf {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Page {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Ports {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Decision {}
}
