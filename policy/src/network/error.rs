//! Why a change is refused: the value, the reason, the remedy.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

use crate::limit::{self, LimitError};
use crate::object::id::{CidrName, GroupName, NodeName, RuleName, ServiceName};
use crate::object::node::NodeState;
use crate::object::prefix::{AddressError, PrefixError};
use crate::object::selector::{Hint, MemberSpec, SelectorSpec};

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Cidr,
    Node,
    Group,
    Rule,
    Service,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cidr => "cidr",
            Self::Node => "node",
            Self::Group => "group",
            Self::Rule => "rule",
            Self::Service => "service",
        })
    }
}

/// Something of some name, as errors speak of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub kind: Kind,
    pub name: String,
}

impl Named {
    pub(crate) fn new(kind: Kind, name: impl AsRef<str>) -> Self {
        Self { kind, name: name.as_ref().to_owned() }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.kind, self.name)
    }
}

/// A change, or a set of objects, that is no valid network. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ChangeError {
    #[error("there is no {0}{1}")]
    Unknown(Named, Hint),
    #[error("the name of {0} is taken; choose another, or delete or rename the one that has it")]
    NameTaken(Named),
    #[error("{object} is in use by {}; change or delete {} first", listed(users), if users.len() == 1 { "it" } else { "them" })]
    InUse { object: Named, users: Vec<Named> },

    // Cidrs.
    #[error(transparent)]
    Prefix(#[from] PrefixError),
    #[error(
        "`{prefix}` of cidr `{cidr}` is not inside the network's root `{root}`; choose a prefix inside it, or make the cidr external"
    )]
    OutsideRoot { cidr: CidrName, prefix: IpNet, root: IpNet },
    #[error(
        "`{prefix}` of cidr `{cidr}` has no place: the network has no {} root; leave it out, or make the cidr external",
        family(prefix)
    )]
    NoRoot { cidr: CidrName, prefix: IpNet },
    #[error(
        "`{prefix}` of external cidr `{cidr}` overlaps the network's root `{root}`; an external cidr lies outside the roots"
    )]
    ExternalInside { cidr: CidrName, prefix: IpNet, root: IpNet },
    #[error("`{prefix}` is already that of cidr `{other}`; choose another prefix, or move or delete `{other}`")]
    SamePrefix { prefix: IpNet, other: CidrName },
    #[error(
        "cidr `{cidr}` would overlap two siblings: its IPv4 prefix lies in cidr `{v4}`, its IPv6 prefix in cidr `{v6}`; \
         choose prefixes inside one and the same"
    )]
    ParentsDisagree { cidr: CidrName, v4: CidrName, v6: CidrName },
    #[error("cidrs {} would contain each other, in IPv4 one way and in IPv6 the other; choose prefixes that nest in one order", quoted(.0))]
    Cycle(Vec<CidrName>),
    #[error(
        "cidr `{cidr}` would no longer contain {}; move or delete {} first, or choose prefixes that contain {}",
        nodes_text(nodes),
        them(nodes),
        them(nodes)
    )]
    NodesOutside { cidr: CidrName, nodes: Vec<NodeName> },
    #[error(
        "cidr `{0}` is external: nodes live in the network's own cidrs, and reach into an external one through a gateway"
    )]
    NodeInExternal(CidrName),

    // Nodes.
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("address `{address}` of node `{node}` lies in no cidr; choose one inside a cidr of the network")]
    AddressNowhere { node: NodeName, address: IpAddr },
    #[error(
        "address `{address}` is not directly in cidr `{cidr}` but in `{actual}`; choose an address of `{cidr}`, or name `{actual}`"
    )]
    AddressElsewhere { address: IpAddr, cidr: CidrName, actual: CidrName },
    #[error("address `{address}` lies outside cidr `{cidr}` ({prefixes}); choose one inside it")]
    AddressOutside { address: IpAddr, cidr: CidrName, prefixes: String },
    #[error("the addresses of node `{node}` would lie in two cidrs, `{v4}` and `{v6}`; choose addresses of one cidr")]
    NodeSplit { node: NodeName, v4: CidrName, v6: CidrName },
    #[error("node `{node}` has no {family} address, but its cidr `{cidr}` has an {family} prefix; give it one")]
    AddressMissing { node: NodeName, cidr: CidrName, family: &'static str },
    #[error("address `{address}` is taken by node `{node}`; choose another, or leave it out to get a free one")]
    AddressTaken { address: IpAddr, node: NodeName },
    #[error(
        "cidr `{cidr}` has no free address left in `{prefix}`; move it to a larger prefix, or delete nodes that are gone"
    )]
    CidrFull { cidr: CidrName, prefix: IpNet },
    #[error("the public key is already that of node `{0}`; make a new key pair")]
    KeyTaken(NodeName),
    #[error("node `{node}` is {state}, so it cannot {what}; {remedy}")]
    State { node: NodeName, state: NodeState, what: &'static str, remedy: &'static str },
    #[error("node `{0}` is active but has no public key")]
    ActiveWithoutKey(NodeName),
    #[error("cidr `{0}` is not external, so it needs no gateway; name an external cidr")]
    NotExternal(CidrName),

    // Groups, services and rules.
    #[error("`{member}` is already a member of group `{group}`")]
    MemberPresent { group: GroupName, member: MemberSpec },
    #[error("`{member}` is not a member of group `{group}`{hint}")]
    MemberAbsent { group: GroupName, member: MemberSpec, hint: Hint },
    #[error(
        "`{selector}` resolves to nothing, so deny rule `{rule}` would deny nothing; give the group a member, or delete the rule"
    )]
    EmptyDeny { rule: RuleName, selector: SelectorSpec },
    #[error("rule `{rule}` has nothing in `{side}`; name a cidr, node, group or prefix, or `any`")]
    NoSelector { rule: RuleName, side: &'static str },
    #[error("rule `{0}` has no service; name one like `tcp/443`, or `any`")]
    NoService(RuleName),
    #[error("service `{0}` is empty; give it at least one like `tcp/443`")]
    EmptyService(ServiceName),
    #[error("priority {priority} of rule `{rule}` is out of bounds; it is {} to {}", limit::PRIORITY.start(), limit::PRIORITY.end())]
    Priority { rule: RuleName, priority: i32 },

    // What a store could hold.
    #[error("{what} of {of} is not supported yet by this version; leave it out")]
    Unsupported { what: &'static str, of: Named },
    #[error("{0} has the id 0, which no object has")]
    ZeroId(Named),
    #[error("{0} has the id {1}, which another has too")]
    SharedId(Named, u32),
    #[error("{0} has the id {1}, but the next id to give out is {2}")]
    FutureId(Named, u32, u32),
    #[error("{by} refers to {kind} {id}, which is not there")]
    Dangling { by: Named, kind: Kind, id: u32 },
    #[error(transparent)]
    Limit(#[from] LimitError),
}

/// Something that was done, but is probably not what was meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// An allow rule names a group without members.
    EmptyAllow { rule: RuleName, selector: SelectorSpec },
    /// A node is in another cidr than before.
    NodeMoved { node: NodeName, from: CidrName, to: CidrName },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyAllow { rule, selector } => {
                write!(
                    f,
                    "`{selector}` resolves to nothing, so rule `{rule}` allows nothing until the group has a member"
                )
            }
            Self::NodeMoved { node, from, to } => write!(f, "node `{node}` is now in cidr `{to}`, before in `{from}`"),
        }
    }
}

/// Names in a message; more would not be read.
const LISTED: usize = 8;

fn listed<T: fmt::Display>(items: &[T]) -> String {
    let shown: Vec<String> = items.iter().take(LISTED).map(ToString::to_string).collect();
    match items.len().checked_sub(LISTED) {
        Some(more @ 1..) => format!("{} and {more} more", shown.join(", ")),
        _ => match shown.as_slice() {
            [] => "nothing".to_owned(),
            [one] => one.clone(),
            [most @ .., last] => format!("{} and {last}", most.join(", ")),
        },
    }
}

fn quoted<T: fmt::Display>(names: &[T]) -> String {
    listed(&names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>())
}

fn nodes_text(nodes: &[NodeName]) -> String {
    format!("{} {}", if nodes.len() == 1 { "node" } else { "nodes" }, quoted(nodes))
}

fn them(nodes: &[NodeName]) -> &'static str {
    if nodes.len() == 1 { "it" } else { "them" }
}

fn family(prefix: &IpNet) -> &'static str {
    match prefix {
        IpNet::V4(_) => "IPv4",
        IpNet::V6(_) => "IPv6",
    }
}
