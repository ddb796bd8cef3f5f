//! Why a question has no answer.

use std::net::IpAddr;

use policy::Revision;

/// Why a question has no answer. The texts are for whoever asked, and say what helps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    #[error("this node has no policy yet and denies everything: wait for the controller")]
    NoPolicy,
    #[error("no policy is in force yet: everything is denied, or as it was before")]
    NotInForce,
    #[error("revision {held}, which is on disk, is older than the kernel's: wait for the controller")]
    Outdated { held: Revision },
    #[error("this node stands for neither `{opener}` nor `{answerer}`: ask a node that does")]
    Elsewhere { opener: IpAddr, answerer: IpAddr },
    #[error("the policy changes too fast to be read: try again")]
    Changing,
    /// What the kernel said, with its causes.
    #[error("{0}")]
    Kernel(String),
    #[error("the thread that owns the kernel's interface has ended: restart `noded`")]
    Gone,
    /// A thread of this daemon broke off.
    #[error("the question was broken off ({0}); this is a bug in Rampart, please report it")]
    BrokenOff(String),
}
