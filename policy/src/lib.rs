//! The policy of a network: its objects, what they mean, and the tables that they compile to.
//!
//! docs/POLICY.md is the specification. Nothing in this crate does IO, reads a clock, waits, or is random.
//!
//! ```text
//! Change ─► Network ─► Matrix ─► Slice ─► SliceDelta        interpret(Network, Flow) is what all of them must equal
//! ```

mod explain;
mod interpret;
pub mod limit;
mod matrix;
mod network;
mod object;
mod peers;
mod slice;

#[cfg(feature = "arbitrary")]
pub mod arbitrary;

pub use explain::{Explanation, explain};
pub use interpret::interpret;
pub use limit::{Bounded, LimitError};
pub use matrix::{Cell, CellEntry, CellError, Matrix, NodeLimitError};
pub use network::{Change, ChangeError, DefaultPolicy, Kind, Named, Network, NetworkParts, ParseDefaultError, Warning};
pub use object::cidr::Cidr;
pub use object::group::Group;
pub use object::id::{
    CidrId, CidrName, ClassId, Generation, GroupId, GroupName, MAX_NAME, NameError, NetworkName, NodeId, NodeName,
    Revision, RuleId, RuleName, ServiceId, ServiceName,
};
pub use object::key::{KeyError, PublicKey};
pub use object::node::{Endpoint, Node, NodeState};
pub use object::prefix::{AddressError, Addresses, PrefixError, Prefixes, check_prefix, parse_prefix};
pub use object::rule::{Action, Mode, Rule, RuleSpec};
pub use object::selector::{Hint, MemberSpec, Selector, SelectorError, SelectorSpec};
pub use object::service::{NamedService, Service, ServiceError, ServiceRange, ServiceRef, ServiceSpec, protocol};
pub use object::verdict::{Flow, Reason, Verdict, parse_flow_service};
pub use slice::{Cells, DeltaError, Local, Map, Peer, Room, Slice, SliceDelta, SliceRule, Touched, stride_room};
