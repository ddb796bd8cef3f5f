//! The last good state on disk: what a node enforces when it starts and its controller is away.
//!
//! One file, replaced whole, and a journal of what changed since ([`super::journal`]). The file has a line with its version,
//! the SHA-256 of the rest, and a protobuf message whose heart is the slice as the controller would send it in a snapshot. A
//! file that is not exactly that is set aside, never used; one of version 1 is read ([`version1`]) and written anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use controller_api::convert::{endpoints_from_wire, endpoints_to_wire};
use controller_api::v1;
use ipnet::IpNet;
use policy::{DeltaError, NodeId, PublicKey, Revision, RuleId, Slice, SliceDelta};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::version1;
use crate::enforce::reconcile::Holders;
use crate::lower::RuleSlots;
use host::file::{self, FileError};

/// The file's name in the state directory.
pub const FILE: &str = "state";

/// Raised with every change of what follows it.
const MAGIC: &[u8] = b"rampart node state 2\n";
/// See [`version1`].
const MAGIC_1: &[u8] = b"rampart node state 1\n";
pub(super) const DIGEST: usize = 32;
/// Larger than any slice within the policy's limits.
const FILE_MAX: u64 = 256 * 1024 * 1024;

/// What a node must not forget.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// The slice that was last put in force.
    pub slice: Arc<Slice>,
    /// Which rule counts where, in counters that outlive the agent.
    pub slots: RuleSlots,
    /// Who last held an address: flows die when it changes.
    pub holders: Holders,
    /// The latest time this node has evaluated conditions at, in seconds since the epoch; it never goes back.
    pub time: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Stored {
    #[prost(message, optional, tag = "1")]
    pub(super) slice: Option<v1::Update>,
    #[prost(btree_map = "uint32, uint32", tag = "2")]
    slots: std::collections::BTreeMap<u32, u32>,
    #[prost(message, repeated, tag = "3")]
    holders: Vec<StoredHolder>,
    #[prost(uint64, tag = "4")]
    time: u64,
    /// Where peers were seen.
    #[prost(message, optional, tag = "5")]
    seen: Option<v1::Endpoints>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StoredHolder {
    /// As printed.
    #[prost(string, tag = "1")]
    prefix: String,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
}

impl StoredHolder {
    pub(super) fn new(prefix: &IpNet, key: &PublicKey) -> Self {
        Self { prefix: prefix.to_string(), key: key.as_bytes().to_vec() }
    }

    pub(super) fn read(self) -> Result<(IpNet, PublicKey), String> {
        let Self { prefix, key } = self;
        let prefix = prefix.parse().map_err(|_| format!("`{prefix}` is not a prefix"))?;
        Ok((prefix, PublicKey::try_from(key.as_slice()).map_err(|error| error.to_string())?))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error(transparent)]
    Disk(#[from] FileError),
    /// The file was set aside.
    #[error("the last good state was corrupt ({reason}) and is kept as `{}`", aside.display())]
    Corrupt { aside: PathBuf, reason: String },
    /// Written by a newer or older version; set aside.
    #[error("the last good state is not of this version of noded and is kept as `{}`", aside.display())]
    OtherVersion { aside: PathBuf },
    /// What was written when the machine or the daemon ended; it was not acknowledged.
    #[error(
        "the journal of the last good state ends with an entry that is not whole: its last {bytes} bytes are cut off"
    )]
    Torn { bytes: u64 },
    /// Entries that were acknowledged are lost; the journal was set aside.
    #[error(
        "the journal of the last good state is damaged at byte {at} ({reason}) and is kept as `{}`: the state is that of \
         revision {revision}, which is older than the last one kept",
        aside.display()
    )]
    Damaged { aside: PathBuf, at: u64, reason: String, revision: Revision },
}

/// Why bytes are no state.
#[derive(Debug, PartialEq, Eq)]
enum Refused {
    Version,
    Corrupt(String),
}

/// A state as read, and what its file is known by.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) state: State,
    pub(super) digest: [u8; DIGEST],
    /// Bytes.
    pub(super) length: u64,
    /// Of this version: a journal continues no other.
    pub(super) is_current: bool,
}

/// The state of this directory, or `None` where there is none. A file that cannot be used is set aside and reported.
pub(super) fn load(state_dir: &Path, node: NodeId) -> Result<Option<Whole>, StateError> {
    let path = state_dir.join(FILE);
    let bytes = match file::read(&path, FILE_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let refused = match decode(&bytes) {
        Ok(state) if state.slice.local.node == node => {
            let (digest, is_current) = (digest(&bytes), bytes.starts_with(MAGIC));
            return Ok(Some(Whole { state, digest, length: bytes.len() as u64, is_current }));
        }
        Ok(state) => Refused::Corrupt(format!("it is that of node `{}`", state.slice.local.name)),
        Err(refused) => refused,
    };
    Err(match refused {
        Refused::Version => StateError::OtherVersion { aside: file::set_aside(&path, "other-version")? },
        Refused::Corrupt(reason) => StateError::Corrupt { aside: file::set_aside(&path, "corrupt")?, reason },
    })
}

/// Writes the whole state to a file; returns its digest and its length.
pub(super) fn store(path: &Path, state: &State) -> Result<([u8; DIGEST], u64), FileError> {
    let bytes = encode(state);
    file::write_private(path, &bytes)?;
    Ok((digest(&bytes), bytes.len() as u64))
}

/// Removes the state, and what was set aside of earlier ones.
pub(super) fn remove(state_dir: &Path) -> Result<(), FileError> {
    file::remove_aside(&state_dir.join(FILE))?;
    file::remove(&state_dir.join(FILE))
}

/// As the file has it.
fn digest(bytes: &[u8]) -> [u8; DIGEST] {
    let mut digest = [0; DIGEST];
    digest.copy_from_slice(&bytes[MAGIC.len()..MAGIC.len() + DIGEST]);
    digest
}

fn encode(state: &State) -> Vec<u8> {
    let State { slice, slots, holders, time } = state;
    let stored = Stored {
        slice: Some(v1::Update::from(&slice.to_delta())),
        slots: slots.pairs().into_iter().map(|(rule, slot)| (rule.0, slot)).collect(),
        holders: holders.iter().map(|(prefix, key)| StoredHolder::new(prefix, key)).collect(),
        time: *time,
        seen: Some(endpoints_to_wire(slice.seen())),
    };
    let message = stored.encode_to_vec();
    [MAGIC, Sha256::digest(&message).as_slice(), &message].concat()
}

fn decode(bytes: &[u8]) -> Result<State, Refused> {
    let corrupt = |reason: &str| Refused::Corrupt(reason.to_owned());
    let is_first = bytes.starts_with(MAGIC_1);
    let Some(rest) = bytes.strip_prefix(if is_first { MAGIC_1 } else { MAGIC }) else {
        let family = &MAGIC[..MAGIC.len() - 2];
        return Err(if bytes.starts_with(family) { Refused::Version } else { corrupt("it does not begin like one") });
    };
    let Some((digest, message)) = rest.split_at_checked(DIGEST) else { return Err(corrupt("it is cut off")) };
    if Sha256::digest(message).as_slice() != digest {
        return Err(corrupt("its checksum is wrong"));
    }
    if is_first {
        return version1::decode(message).map_err(Refused::Corrupt);
    }
    let stored = Stored::decode(message).map_err(|error| Refused::Corrupt(error.to_string()))?;
    stored.read(Slice::from_snapshot).map_err(Refused::Corrupt)
}

impl Stored {
    /// `whole`: makes a slice of its rows.
    pub(super) fn read(self, whole: impl Fn(SliceDelta) -> Result<Slice, DeltaError>) -> Result<State, String> {
        let Self { slice, slots, holders, time, seen } = self;
        let update = slice.ok_or("it has no slice")?;
        let delta = SliceDelta::try_from(update).map_err(|error| error.to_string())?;
        let mut slice = whole(delta).map_err(|error| error.to_string())?;
        slice.see(endpoints_from_wire(seen.unwrap_or_default()).map_err(|error| error.to_string())?);
        Ok(State {
            slice: Arc::new(slice),
            slots: RuleSlots::from_pairs(slots.into_iter().map(|(rule, slot)| (RuleId(rule), slot))),
            holders: holders.into_iter().map(StoredHolder::read).collect::<Result<_, _>>()?,
            time,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::enforce::reconcile::holders;
    use crate::fixture;
    use crate::lower::lower;

    pub(in crate::uplink) fn example() -> State {
        let slice = fixture::slice(&fixture::network(), "app1", 9);
        let mut slots = RuleSlots::new();
        lower(&slice, &mut slots).unwrap();
        let holders = holders::holders(&slice, fixture::public_key("app1"));
        // As they are when they have been read back: claimed by the next slice.
        let slots = RuleSlots::from_pairs(slots.pairs());
        State { slice, slots, holders, time: 1_700_000_000 }
    }

    #[test]
    fn a_state_reads_back() {
        let directory = tempfile::tempdir().unwrap();
        let state = example();
        assert!(load(directory.path(), state.slice.local.node).unwrap().is_none());
        store(&directory.path().join(FILE), &state).unwrap();
        let whole = load(directory.path(), state.slice.local.node).unwrap().unwrap();
        assert_eq!(whole.state, state);
        remove(directory.path()).unwrap();
        assert!(load(directory.path(), state.slice.local.node).unwrap().is_none());
    }

    #[test]
    fn any_flipped_byte_and_any_missing_end_is_noticed() {
        let whole = encode(&example());
        assert!(decode(&whole).is_ok());
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            assert!(decode(&flipped).is_err(), "byte {at} flipped");
            assert!(decode(&whole[..at]).is_err(), "{at} bytes");
        }
    }

    #[test]
    fn what_cannot_be_used_is_set_aside_and_said() {
        let directory = tempfile::tempdir().unwrap();
        let state = example();
        let node = state.slice.local.node;
        let path = directory.path().join(FILE);
        let whole = encode(&state);
        let nothing = Stored::default().encode_to_vec();
        let mut newer = whole.clone();
        newer[MAGIC.len() - 2] = b'3';
        let cases: [(&[u8], NodeId, &str); 6] = [
            (b"", node, "begin"),
            (b"garbage", node, "begin"),
            (&whole[..whole.len() - 1], node, "checksum"),
            (&newer, node, "version"),
            (&[MAGIC, Sha256::digest(&nothing).as_slice(), &nothing].concat(), node, "slice"),
            (&whole, NodeId(node.0 + 1), "`app1`"),
        ];
        for (content, node, word) in cases {
            std::fs::write(&path, content).unwrap();
            let error = load(directory.path(), node).unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
            assert!(!path.exists());
            assert!(load(directory.path(), node).unwrap().is_none());
        }
        assert!(directory.path().join("state.corrupt-4").exists());
        assert!(directory.path().join("state.other-version-1").exists());
        remove(directory.path()).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
