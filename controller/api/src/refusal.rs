//! Why a node is refused, for its agent: one that has no part in the network (any more) must not go on with what it held,
//! while one that only needs a new certificate must. It stands in a status's metadata; the text beside it is for people.

use tonic::Status;
use tonic::metadata::MetadataValue;

const KEY: &str = "rampart-refusal";
const NOT_ACTIVE: &str = "not-active";
const DELETED: &str = "deleted";

/// Why a node has no part in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is disabled or expired; an admin can enable it.
    NotActive,
    /// The network knows no such node: it does not come back.
    Deleted,
}

impl Refusal {
    /// The status, with this in it.
    pub fn mark(self, mut status: Status) -> Status {
        let word = match self {
            Self::NotActive => NOT_ACTIVE,
            Self::Deleted => DELETED,
        };
        status.metadata_mut().insert(KEY, MetadataValue::from_static(word));
        status
    }

    /// What a status says. It counts only from a controller of the network's own authority.
    pub fn of(status: &Status) -> Option<Self> {
        match status.metadata().get(KEY)?.to_str().ok()? {
            NOT_ACTIVE => Some(Self::NotActive),
            DELETED => Some(Self::Deleted),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_keeps_its_mark_and_no_other_has_one() {
        for refusal in [Refusal::NotActive, Refusal::Deleted] {
            let status = refusal.mark(Status::permission_denied("node `web1` is disabled"));
            assert_eq!(Refusal::of(&status), Some(refusal));
            assert_eq!(status.message(), "node `web1` is disabled");
        }
        let mut other = Status::permission_denied("certificate has expired");
        assert_eq!(Refusal::of(&other), None);
        other.metadata_mut().insert(KEY, MetadataValue::from_static("something newer"));
        assert_eq!(Refusal::of(&other), None);
    }
}
