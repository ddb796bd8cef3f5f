//! Programs on the interface, ours and those of others.

use std::fmt;

/// Where on the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attachment {
    Egress,
    Ingress,
    Xdp,
}

impl Attachment {
    pub const ALL: [Self; 3] = [Self::Egress, Self::Ingress, Self::Xdp];
}

/// One program, or a filter that is none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Program {
    pub attachment: Attachment,
    /// In the order in which they run, from 1.
    pub position: usize,
    /// `None`: a filter of another kind than BPF.
    pub id: Option<u32>,
    /// `None`: the kernel does not tell without CAP_SYS_ADMIN.
    pub name: Option<String>,
    pub ours: bool,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Egress => "tc egress",
            Self::Ingress => "tc ingress",
            Self::Xdp => "xdp",
        })
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.name, self.id) {
            (Some(name), Some(id)) => write!(f, "`{name}` (id {id})")?,
            (Some(name), None) => write!(f, "a filter of kind `{name}`")?,
            (None, Some(id)) => write!(f, "the program with id {id}")?,
            (None, None) => f.write_str("a filter that is no program")?,
        }
        write!(f, " at {}, number {}", self.attachment, self.position)
    }
}
