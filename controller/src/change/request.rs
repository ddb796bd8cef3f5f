//! What can be asked of the controller, and why it is not done.

use std::sync::Arc;

use controller_api::invitation::Subject;
use policy::{Change, ChangeError, LimitError, NodeId, NodeLimitError, Revision};

use super::enrol::{InviteError, RedeemError, Redeemed};
use crate::store::StoreError;
use crate::store::account::{KeyHash, Keys, SecretHash};

/// Most changes in one request.
pub const CHANGES_MAX: usize = 10_000;

/// What is asked for.
#[derive(Clone, Debug)]
pub enum Request {
    /// All or none, in order.
    Change(Vec<Change>),
    Invite {
        subject: Subject,
        hash: SecretHash,
        expires_at: u64,
    },
    Redeem {
        hash: SecretHash,
        keys: Keys,
        certificate_expires_at: u64,
    },
    /// A node renews its certificate: the key it showed, and the one it asked a certificate for.
    Rekey {
        node: NodeId,
        shown: KeyHash,
        requested: KeyHash,
    },
    RevokeAdmin(String),
    /// An admin renews a certificate, of the same key.
    RenewAdmin {
        name: String,
        requested: KeyHash,
        certificate_expires_at: u64,
    },
    /// A node leaves for good.
    Leave(NodeId),
}

/// What came of it, besides a new revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// There is something to commit.
    pub changed: bool,
    pub warnings: Vec<String>,
    pub redeemed: Option<Redeemed>,
}

/// Why it is not done. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    // Not a source, which would be printed a second time: a single change has no words of its own before the reason.
    #[error("{}{reason}", position(*.index, *.count))]
    Change { index: usize, count: usize, reason: Box<ChangeError> },
    #[error("request has {found} changes, not 1 to {max}; split it", max = CHANGES_MAX)]
    Count { found: usize },
    #[error("policy would be too large: {0}")]
    Limit(LimitError),
    #[error(transparent)]
    NodeLimit(#[from] NodeLimitError),
    #[error("network is at revision `{found}`, not at `{expected}`; look at what changed and repeat the change")]
    Revision { expected: Revision, found: Revision },
    #[error(transparent)]
    Invite(#[from] InviteError),
    #[error(transparent)]
    Redeem(#[from] RedeemError),
    #[error("there is no node with id `{node}`; it was deleted")]
    NoNode { node: NodeId },
    #[error("key of node `{node}` is not good any more; ask for a new invitation (`meshctl node invite NAME`)")]
    NoKey { node: NodeId },
    #[error(
        "certificate of admin `{name}` is renewed with its own key only, and not once revoked; ask for a new invitation \
         (`meshctl admin invite {name}`)"
    )]
    NoAdminKey { name: String },
    #[error("there is no admin `{name}`{hint}; `meshctl admin list` shows them")]
    UnknownAdmin { name: String, hint: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Of a transaction that others had a part in.
    #[error(transparent)]
    NotWritten(Arc<StoreError>),
    #[error("other controllers were faster at the same rows, {tries} times; nothing was changed: try again")]
    Outrun { tries: u32 },
    #[error("controller is stopping; try again")]
    Stopping,
}

/// Which of several changes is meant.
pub(super) fn position(index: usize, count: usize) -> String {
    if count > 1 { format!("change {} of {count}: ", index + 1) } else { String::new() }
}
