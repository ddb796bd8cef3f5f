//! The policy of a network: its objects, what they mean, and the tables that they compile to.
//!
//! docs/POLICY.md is the specification. Nothing in this crate does IO, reads a clock, waits, or is random.
//!
//! ```text
//! Change ─► Network ─► Matrix ─► Slice ─► SliceDelta        interpret(Network, Flow) is what all of them must equal
//! ```

mod cidr;
mod explain;
mod group;
mod id;
mod interpret;
mod key;
pub mod limit;
mod matrix;
mod network;
mod node;
mod peers;
mod prefix;
mod rule;
mod selector;
mod service;
mod slice;
mod verdict;

#[cfg(feature = "arbitrary")]
pub mod arbitrary;

pub use cidr::Cidr;
pub use explain::{Explanation, explain};
pub use group::Group;
pub use id::{
    CidrId, CidrName, ClassId, Generation, GroupId, GroupName, MAX_NAME, NameError, NetworkName, NodeId, NodeName,
    Revision, RuleId, RuleName, ServiceId, ServiceName,
};
pub use interpret::interpret;
pub use key::{KeyError, PublicKey};
pub use limit::{Bounded, LimitError};
pub use matrix::{Cell, CellEntry, CellError, Matrix, NodeLimitError};
pub use network::{Change, ChangeError, DefaultPolicy, Kind, Named, Network, NetworkParts, ParseDefaultError, Warning};
pub use node::{Endpoint, Node, NodeState};
pub use prefix::{AddressError, Addresses, PrefixError, Prefixes, check_prefix, parse_prefix};
pub use rule::{Action, Mode, Rule, RuleSpec};
pub use selector::{Hint, MemberSpec, Selector, SelectorError, SelectorSpec};
pub use service::{NamedService, Service, ServiceError, ServiceRange, ServiceRef, ServiceSpec, protocol};
pub use slice::{Cells, DeltaError, Local, Map, Peer, Room, Slice, SliceDelta, SliceRule, Touched, stride_room};
pub use verdict::{Flow, Reason, Verdict, parse_flow_service};
