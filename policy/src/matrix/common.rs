//! What every slice says of the cidrs.

use std::fmt;

use super::Matrix;
use crate::network::Network;
use crate::object::digest::Digest;
use crate::object::id::{CidrId, CidrName};
use crate::object::prefix::Prefixes;

/// What a node must know of a cidr.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceCidr {
    pub name: CidrName,
    pub prefixes: Prefixes,
    /// External, and some node is its active gateway: routed to the interface by all others.
    pub is_routed: bool,
}

/// Its name.
impl fmt::Display for SliceCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl SliceCidr {
    fn of(network: &Network, id: CidrId) -> Option<Self> {
        let cidr = network.cidrs().get(&id)?;
        let is_routed = cidr.external && network.gateway_of(id).is_some();
        Some(Self { name: cidr.name.clone(), prefixes: cidr.prefixes, is_routed })
    }

    pub(crate) fn digest(&self, id: CidrId) -> Digest {
        let Self { name, prefixes, is_routed } = self;
        Digest::of_row(b'c', |row| {
            row.number(id.0.into());
            row.bytes(name.as_str().as_bytes());
            row.nets(prefixes.iter().collect::<Vec<_>>().into_iter());
            row.byte(u8::from(*is_routed));
        })
    }
}

/// The digest of what is said of a cidr; nothing of one that is not there.
pub(super) fn digest(network: &Network, id: CidrId) -> Digest {
    SliceCidr::of(network, id).map(|cidr| cidr.digest(id)).unwrap_or_default()
}

impl Matrix {
    /// What every slice says of a cidr.
    pub(crate) fn slice_cidr(&self, id: CidrId) -> Option<SliceCidr> {
        SliceCidr::of(&self.network, id)
    }
}
