//! Counters. Each lives in a per-CPU map; userspace adds the CPUs up.

/// Packets with one fate.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets as the hook saw them (a GSO packet is one).
    pub packets: u64,
    /// Bytes from the IP header on.
    pub bytes: u64,
    /// Segments on the wire (a GSO packet is several).
    pub segments: u64,
}

/// Which counter of a pair of cidrs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PairKey {
    /// Id of the source's cidr; 0: none.
    pub source: u32,
    /// Id of the destination's cidr; 0: none.
    pub destination: u32,
    /// `EGRESS` or `INGRESS`.
    pub direction: u8,
    /// A `reason`.
    pub reason: u8,
    pub _pad: [u8; 2],
}

/// Slots of a [`PairBucket`].
pub const PAIR_WAYS: usize = 4;
/// Buckets that are tried for a pair before its packets count as lost. While three quarters of the slots are taken there
/// is room for every pair, and beyond it gets rarer.
pub const PAIR_TRIES: u32 = 16;

/// A pair and what one CPU counted of it. Taken once and never given back.
///
/// Only its own CPU writes it, the counter before the key; both words of the key say that they are written, so that a
/// reader on another CPU who sees one of them sees that the other is missing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PairSlot {
    /// [`PairKey::to_words`]; zeros: free.
    pub key: [u64; 2],
    pub counter: Counter,
}

/// Slots that are looked for together.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PairBucket {
    pub slots: [PairSlot; PAIR_WAYS],
}

/// Marks a word of a key as written.
const TAKEN: u8 = 1;

impl PairKey {
    /// As it stands in a [`PairSlot`].
    #[inline(always)]
    pub const fn to_words(self) -> [u64; 2] {
        let Self { source, destination, direction, reason, _pad: _ } = self;
        let ([a, b, c, d], [e, f, g, h]) = (source.to_ne_bytes(), destination.to_ne_bytes());
        [
            u64::from_ne_bytes([a, b, c, d, direction, reason, 0, TAKEN]),
            u64::from_ne_bytes([e, f, g, h, 0, 0, 0, TAKEN]),
        ]
    }

    /// `None`: not taken, or just being taken.
    pub const fn from_words(words: [u64; 2]) -> Option<Self> {
        let [a, b, c, d, direction, reason, _, first] = words[0].to_ne_bytes();
        let [e, f, g, h, .., second] = words[1].to_ne_bytes();
        if first != TAKEN || second != TAKEN {
            return None;
        }
        let (source, destination) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
        Some(Self { source, destination, direction, reason, _pad: [0; 2] })
    }
}

/// Where the search for a key begins and how it goes on, in one word for [`pair_bucket`].
#[inline(always)]
pub const fn pair_hash(key: [u64; 2]) -> u64 {
    let sum = key[0].wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(key[1].wrapping_mul(0xc2b2_ae3d_27d4_eb4f));
    (sum ^ sum >> 32).wrapping_mul(0xff51_afd7_ed55_8ccd)
}

/// The bucket to look into at a try, of so many: a power of two.
#[inline(always)]
pub const fn pair_bucket(hash: u64, number: u32, buckets: u32) -> u32 {
    let step = (hash >> 28) as u32 | 1;
    ((hash >> 48) as u32).wrapping_add(number.wrapping_mul(step)) & (buckets - 1)
}

/// In LOSSES: packets that PAIR_TABLE had no room for.
pub const LOSS_PAIR: u32 = 0;
/// In LOSSES: records that FLOWS had no room for.
pub const LOSS_FLOW: u32 = 1;
/// In LOSSES: events that the rate limit suppressed.
pub const LOSS_EVENT_LIMITED: u32 = 2;
/// In LOSSES: events that the ring buffer had no room for.
pub const LOSS_EVENT_FULL: u32 = 3;
/// In LOSSES: records that were refused because FLOWS is half full and the remote node has more than its share.
pub const LOSS_FLOW_QUOTA: u32 = 4;
/// In LOSSES: datagrams in fragments that FRAGMENTS had no room for.
pub const LOSS_FRAGMENT: u32 = 5;
/// Entries of LOSSES.
pub const LOSSES: u32 = 6;

/// Names of the losses by number, for other versions.
pub const LOSS_NAMES: [&str; LOSSES as usize] =
    ["pair", "flow", "event-limited", "event-full", "flow-quota", "fragment"];

const _: () = assert!(size_of::<Counter>() == 24);
const _: () = assert!(size_of::<PairKey>() == 12);
const _: () = assert!(size_of::<PairSlot>() == 40);
const _: () = assert!(size_of::<PairBucket>() == 160);

#[cfg(feature = "user")]
mod pod {
    #![allow(unsafe_code, reason = "aya reads and writes map values as bytes")]
    // SAFETY: repr(C), no hidden padding, no invalid bit pattern.
    unsafe impl aya::Pod for super::Counter {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PairSlot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PairBucket {}
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use crate::limit::{PAIR_BUCKETS, PAIRS};
    use std::vec;

    fn key(source: u32, destination: u32, kind: u32) -> PairKey {
        PairKey { source, destination, direction: (kind & 1) as u8, reason: (kind >> 1) as u8, _pad: [0; 2] }
    }

    #[test]
    fn a_key_comes_back_and_half_a_key_is_none() {
        for key in [key(0, 0, 0), key(1, u32::MAX, 37), key(u32::MAX, 0, 5)] {
            let [first, second] = key.to_words();
            assert_eq!(PairKey::from_words([first, second]), Some(key));
            for half in [[first, 0], [0, second], [0, 0]] {
                assert_eq!(PairKey::from_words(half), None, "{key:?}");
            }
        }
    }

    /// How many of these pairs find room, as the programs search it, before the first that does not.
    fn room(pairs: impl Iterator<Item = PairKey>) -> u32 {
        let mut taken = vec![0; PAIR_BUCKETS as usize];
        let mut placed = 0;
        for pair in pairs {
            let hash = pair_hash(pair.to_words());
            let mut buckets = (0..PAIR_TRIES).map(|number| pair_bucket(hash, number, PAIR_BUCKETS) as usize);
            let Some(bucket) = buckets.find(|bucket| taken[*bucket] < PAIR_WAYS) else { return placed };
            taken[bucket] += 1;
            placed += 1;
        }
        placed
    }

    /// Ids of cidrs are small and close together, which a poor hash does not tell apart.
    #[test]
    fn there_is_room_for_three_quarters_however_pairs_look() {
        let enough = PAIRS / 4 * 3;
        let all = || 0..2 * PAIRS;
        for width in [1, 2, 3, 10, 64, 100, 128, 256, 1_000, 1_024, 4_096, 16_384] {
            let grid = all().map(|n| key(n / width + 1, n % width + 1, 1));
            let kinds = all().map(|n| key(n / 8 / width + 1, n / 8 % width + 1, n % 8));
            let apart = all().map(|n| key((n / width + 1) * 977, (n % width + 1) * 64, 1));
            for room in [room(grid), room(kinds), room(apart)] {
                assert!((enough..=PAIRS).contains(&room), "{room} at {width}");
            }
        }
        let hub = room(all().map(|n| if n % 2 == 0 { key(5, n / 2, n % 4) } else { key(n / 2, 5, n % 4) }));
        assert!((enough..=PAIRS).contains(&hub), "{hub}");
        for seed in 1..16u64 {
            let mut state = seed;
            let random = all().map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                key((state >> 40) as u32, (state >> 12) as u32 & 0xffff, 3)
            });
            let room = room(random);
            assert!((enough..=PAIRS).contains(&room), "{room} at seed {seed}");
        }
    }
}
