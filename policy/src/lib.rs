//! The policy of a network: its objects, what they mean, and the tables that they compile to.
//!
//! docs/POLICY.md is the specification. Nothing in this crate does IO, reads a clock, waits, or is random.
//!
//! ```text
//! Change ─► Network ─► Matrix ─► Slice ─► SliceDelta        interpret(Network, Flow) is what all of them must equal
//! ```

mod count;
mod explain;
mod interpret;
pub mod limit;
mod matrix;
mod network;
mod object;
mod peer;
mod slice;

#[cfg(feature = "arbitrary")]
pub mod arbitrary;

/// A copy costs nothing, and shares what neither of the two changes.
pub type Map<K, V> = imbl::OrdMap<K, V>;

pub use explain::{Explanation, explain};
pub use interpret::interpret;
pub use limit::{Bounded, LimitError};
pub use matrix::{Affected, Cell, CellEntry, CellError, Class, Matrix, Role, Room, SliceCidr, stride_room};
pub use network::{
    Change, ChangeError, DefaultPolicy, Header, Kind, Named, Network, NetworkParts, ParseDefaultError, Replacement,
    Rows, Warning,
};
pub use object::cidr::Cidr;
pub use object::digest::Digest;
pub use object::group::Group;
pub use object::id::{
    CidrId, CidrName, ClassId, Generation, GroupId, GroupName, MAX_NAME, NameError, NetworkName, NodeId, NodeName,
    Revision, RuleId, RuleName, ServiceId, ServiceName,
};
pub use object::key::{KeyError, PublicKey};
pub use object::node::{Node, NodeState};
pub use object::prefix::{AddressError, Addresses, PrefixError, Prefixes, check_prefix, parse_prefix};
pub use object::rule::{Action, Mode, Rule, RuleSpec};
pub use object::selector::{Hint, MemberSpec, Selector, SelectorError, SelectorSpec};
pub use object::service::{NamedService, Service, ServiceError, ServiceRange, ServiceRef, ServiceSpec, protocol};
pub use object::verdict::{Flow, Reason, Verdict, parse_flow_service};
pub use peer::Peer;
pub use slice::{
    Cells, DeltaError, Fragment, Local, NodeLimitError, Slice, SliceDelta, SliceRule, Touched, Understanding,
};
