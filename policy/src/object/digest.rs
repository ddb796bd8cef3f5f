//! Digests: whether two hold the same rows, said in 16 bytes and kept at the cost of what changes.

use std::fmt;
use std::net::IpAddr;
use std::ops::{Add, AddAssign, Sub, SubAssign};

use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

/// The sum, modulo 2^128, of a hash of every row. It tells mistakes, not forgeries: whoever chooses the rows can make two
/// sets with one sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(u128);

impl Digest {
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }

    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// Of one row. `kind` keeps rows of different kinds apart.
    pub(crate) fn of_row(kind: u8, write: impl FnOnce(&mut RowWriter)) -> Self {
        let mut writer = RowWriter(Sha256::new());
        writer.byte(kind);
        write(&mut writer);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&writer.0.finalize()[..16]);
        Self::from_bytes(bytes)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Add for Digest {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }
}

impl AddAssign for Digest {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Digest {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0.wrapping_sub(other.0))
    }
}

impl SubAssign for Digest {
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

impl std::iter::Sum for Digest {
    fn sum<I: Iterator<Item = Self>>(digests: I) -> Self {
        digests.fold(Self::default(), Add::add)
    }
}

/// Takes the fields of one row, in an order of its own for each kind.
pub(crate) struct RowWriter(Sha256);

impl RowWriter {
    pub(crate) fn byte(&mut self, value: u8) {
        self.0.update([value]);
    }

    pub(crate) fn number(&mut self, value: u64) {
        self.0.update(value.to_be_bytes());
    }

    /// With its length ahead, so that no two sequences of fields are one.
    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.number(value.len() as u64);
        self.0.update(value);
    }

    pub(crate) fn address(&mut self, value: IpAddr) {
        match value {
            IpAddr::V4(address) => self.bytes(&address.octets()),
            IpAddr::V6(address) => self.bytes(&address.octets()),
        }
    }

    pub(crate) fn nets(&mut self, nets: impl ExactSizeIterator<Item = IpNet>) {
        self.number(nets.len() as u64);
        for net in nets {
            self.byte(net.prefix_len());
            self.address(net.addr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kind: u8, fields: &[&[u8]]) -> Digest {
        Digest::of_row(kind, |writer| fields.iter().for_each(|field| writer.bytes(field)))
    }

    #[test]
    fn what_is_added_and_taken_away_leaves_no_trace() {
        let (a, b) = (row(1, &[b"a"]), row(1, &[b"b"]));
        assert_eq!(a + b - a, b);
        assert_eq!(b - a + a, b);
        assert_eq!([a, b].into_iter().sum::<Digest>(), b + a);
        assert_eq!(Digest::from_bytes(a.to_bytes()), a);
    }

    #[test]
    fn fields_and_kinds_are_kept_apart() {
        assert_ne!(row(1, &[b"ab", b"c"]), row(1, &[b"a", b"bc"]));
        assert_ne!(row(1, &[b"a"]), row(2, &[b"a"]));
        assert_eq!(row(1, &[b"a"]).to_string().len(), 32);
    }
}
