//! Who changed what, for the audit log.

use std::fmt::{self, Display};

use policy::NodeName;

/// Who asked for a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    /// Root on the controller's own machine.
    Root,
    Admin(String),
    Node(NodeName),
    /// The controller itself.
    Controller,
}

impl Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("root"),
            Self::Admin(name) => write!(f, "admin:{name}"),
            Self::Node(name) => write!(f, "node:{name}"),
            Self::Controller => f.write_str("controller"),
        }
    }
}
