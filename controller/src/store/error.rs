//! Why a store would not, or could not.

use std::path::PathBuf;

use policy::Revision;

use super::Key;

/// Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the store is at revision `{found}`, not at `{expected}`; read it again and repeat the change")]
    Moved { expected: Revision, found: Revision },
    #[error("row `{key}` {reason}; read it again and repeat the change")]
    Conflict { key: Key, reason: &'static str },
    #[error("a change that this one builds on was not made; read the store again and repeat the change")]
    AfterRefused,
    #[error("request id `{id}` was used for another request at revision `{revision}`; use a new id for each request")]
    RequestReused { id: String, revision: Revision },
    #[error("`{what}` is longer than the {max} bytes that the store keeps; shorten it")]
    TooLong { what: String, max: usize },
    #[error(
        "revisions up to `{compacted}` are compacted, so there is no watch after `{after}`; take a snapshot instead"
    )]
    Compacted { after: Revision, compacted: Revision },
    #[error("revision `{revision}` is not kept any more; choose one of `{oldest}` to `{newest}`")]
    NotKept { revision: Revision, oldest: Revision, newest: Revision },
    #[error("revision `{revision}` has not been yet; choose one of `{oldest}` to `{newest}`")]
    NotYet { revision: Revision, oldest: Revision, newest: Revision },
    #[error("the watch fell behind after revision `{after}`; watch again from there")]
    Lagged { after: Revision },
    #[error("nobody waits for the answer any more")]
    Unwanted,
    #[error("there is no database `{}`; make the network with `controllerd init`", path.display())]
    Missing { path: PathBuf },
    #[error("not allowed to use database `{}`; run as the owner of the state directory (usually root)", path.display())]
    NotAllowed { path: PathBuf },
    #[error("`{}` exists already; choose another `--state-dir`, or remove it if its network is to be lost", path.display())]
    Exists { path: PathBuf },
    #[error("database `{}` is in use by the `controllerd` with pid `{pid}`; stop that one first (`systemctl stop controllerd`, or `kill {pid}`)", path.display())]
    InUse { path: PathBuf, pid: String },
    #[error("database `{}` is corrupt: {reason}; nothing was changed: move it aside and restore a copy of the state directory", path.display())]
    Corrupt { path: PathBuf, reason: String },
    #[error("database `{}` has schema version `{found}`, and this controllerd knows `{known}`; run the version that wrote it", path.display())]
    Version { path: PathBuf, found: i64, known: i64 },
    #[error("the disk of database `{}` is full; nothing was changed: free some space and repeat the change", path.display())]
    Full { path: PathBuf },
    #[error("database `{}` failed to {what}", path.display())]
    Sqlite {
        path: PathBuf,
        what: &'static str,
        #[source]
        source: rusqlite::Error,
    },
    #[error("failed to {what} `{}`", path.display())]
    Io {
        path: PathBuf,
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}
