//! Cidrs: the named prefixes whose trees give every address its place.

use crate::object::id::{CidrId, CidrName};
use crate::object::prefix::Prefixes;

/// A named prefix of one or both families.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cidr {
    pub id: CidrId,
    pub name: CidrName,
    pub prefixes: Prefixes,
    /// No lineage passes through it, not even among its own addresses.
    pub isolated: bool,
    /// A network behind gateway nodes, outside the roots.
    pub external: bool,
}
