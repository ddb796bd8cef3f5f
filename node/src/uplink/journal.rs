//! The last good state, kept at the cost of what changes: entries are appended to a journal beside the whole state, and
//! are on disk before a change is acknowledged.
//!
//! A line with the version and the digest of the whole state that the journal continues, then entries: length, checksum,
//! and a protobuf message whose heart is the delta as the controller would send it. A checksum covers the one before it, so
//! that entries stand for exactly one state after the other, and a journal of another whole state is known and ignored.
//! Where the journal has grown longer than the whole state, that is written anew.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use controller_api::convert::{endpoints_from_wire, endpoints_to_wire};
use controller_api::v1;
use host::file::{self, FileError};
use ipnet::IpNet;
use policy::{NodeId, Revision, RuleId, SliceDelta};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::state::{self, DIGEST, State, StateError, StoredHolder, Whole};
use crate::difference::differing_keys;
use crate::lower::RuleSlots;

/// The file's name in the state directory.
pub const FILE: &str = "journal";

/// Raised with every change of what follows it.
const MAGIC: &[u8] = b"rampart node journal 1\n";
const BEGIN: usize = MAGIC.len() + DIGEST;
const LENGTH: usize = size_of::<u32>();
const CHECKSUM: usize = 8;
/// No journal is too long that is shorter than this, in bytes.
const SHORT: u64 = 1 << 20;
/// Larger than any journal becomes: it ends when it is as long as the whole state.
const FILE_MAX: u64 = 512 * 1024 * 1024;

type Checksum = [u8; CHECKSUM];

/// What differs from the state before.
#[derive(Clone, PartialEq, prost::Message)]
struct Entry {
    /// `None`: the slice is the same.
    #[prost(message, optional, tag = "1")]
    update: Option<v1::Update>,
    #[prost(btree_map = "uint32, uint32", tag = "2")]
    slots: BTreeMap<u32, u32>,
    #[prost(uint32, repeated, tag = "3")]
    freed_slots: Vec<u32>,
    #[prost(message, repeated, tag = "4")]
    holders: Vec<StoredHolder>,
    /// Prefixes, as printed.
    #[prost(string, repeated, tag = "5")]
    forgotten: Vec<String>,
    #[prost(uint64, tag = "6")]
    time: u64,
    /// Where peers were seen that were seen elsewhere before.
    #[prost(message, optional, tag = "7")]
    seen: Option<v1::Endpoints>,
}

/// What entries are appended to.
trait Tail: Send {
    /// The bytes are on disk when it returns.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn cut(&mut self, length: u64) -> io::Result<()>;
}

impl Tail for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)?;
        self.sync_data()
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)?;
        self.sync_data()
    }
}

/// The state of one directory.
pub struct Journal {
    state_dir: PathBuf,
    /// What is on disk; `None`: nothing that could be continued.
    kept: Option<Kept>,
}

struct Kept {
    state: State,
    /// Bytes of the whole state's file.
    whole: u64,
    /// `None`: the whole state is to be written before anything can be appended.
    tail: Option<Box<dyn Tail>>,
    /// Bytes of the journal, and the last entry's checksum.
    length: u64,
    checksum: Checksum,
}

/// A journal, and what was found.
#[derive(Debug)]
pub struct Opened {
    pub journal: Journal,
    pub state: Option<State>,
    /// Why there is no state, or an older one.
    pub error: Option<StateError>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("state_dir", &self.state_dir).finish_non_exhaustive()
    }
}

impl Journal {
    /// Of a directory in which nothing is to be continued.
    pub fn new(state_dir: PathBuf) -> Self {
        Self { state_dir, kept: None }
    }

    /// Reads the state of a node.
    pub fn open(state_dir: &Path, node: NodeId) -> Opened {
        let mut journal = Self::new(state_dir.to_owned());
        let (state, error) = match state::load(state_dir, node) {
            Ok(Some(whole)) => {
                let (kept, error) = read(state_dir, whole);
                let state = kept.state.clone();
                journal.kept = Some(kept);
                (Some(state), error)
            }
            Ok(None) => (None, None),
            Err(error) => (None, Some(error)),
        };
        Opened { journal, state, error }
    }

    /// Puts a state on disk, by what differs from the one before.
    pub fn keep(&mut self, state: &State) -> Result<(), FileError> {
        match self.kept.as_mut().and_then(|kept| Some((entry(&kept.state, state)?, kept))) {
            Some((entry, kept)) if kept.tail.is_some() && entry.len() as u64 <= kept.whole.max(SHORT) => {
                kept.append(&entry).map_err(FileError::new("append to", &self.state_dir.join(FILE)))?;
                kept.state = state.clone();
                Ok(())
            }
            _ => self.write_whole(state),
        }
    }

    /// Writes the whole state where the journal has become long. For when nobody waits.
    pub fn compact(&mut self) -> Result<(), FileError> {
        match &self.kept {
            Some(kept) if kept.length > kept.whole.max(SHORT) => self.write_whole(&kept.state.clone()),
            _ => Ok(()),
        }
    }

    /// The whole state first: what the journal says until it is replaced too is known to be older.
    fn write_whole(&mut self, state: &State) -> Result<(), FileError> {
        let (digest, whole) = state::store(&self.state_dir, state)?;
        let tail = begin(&self.state_dir, &digest)
            .inspect_err(|error| tracing::debug!(error = host::error::chain(error), "no journal can be begun"));
        self.kept = Some(Kept {
            state: state.clone(),
            whole,
            tail: tail.ok().map(|tail| Box::new(tail) as Box<dyn Tail>),
            length: BEGIN as u64,
            checksum: first_checksum(&digest),
        });
        Ok(())
    }
}

/// Removes the state with its journal, and what was set aside of earlier ones.
pub fn remove(state_dir: &Path) -> Result<(), FileError> {
    file::remove_aside(&state_dir.join(FILE))?;
    file::remove(&state_dir.join(FILE))?;
    state::remove(state_dir)
}

fn begin(state_dir: &Path, digest: &[u8; DIGEST]) -> Result<File, FileError> {
    let path = state_dir.join(FILE);
    file::write_private(&path, &[MAGIC, digest].concat())?;
    continue_at(&path, BEGIN as u64)
}

/// Cuts off what comes after `length` bytes, and opens the rest to be continued.
fn continue_at(path: &Path, length: u64) -> Result<File, FileError> {
    let open = || {
        let mut file = OpenOptions::new().append(true).open(path)?;
        if file.metadata()?.len() != length {
            file.cut(length)?;
        }
        Ok(file)
    };
    open().map_err(FileError::new("open", path))
}

impl Kept {
    fn append(&mut self, entry: &[u8]) -> io::Result<()> {
        let Some(tail) = &mut self.tail else { return Ok(()) };
        let checksum = next_checksum(&self.checksum, entry);
        let bytes = [&(entry.len() as u32).to_le_bytes()[..], &checksum, entry].concat();
        if let Err(error) = tail.append(&bytes) {
            // Whatever came of it is no entry; where it cannot be cut off, the whole state is written next.
            if tail.cut(self.length).is_err() {
                self.tail = None;
            }
            return Err(error);
        }
        self.length += bytes.len() as u64;
        self.checksum = checksum;
        Ok(())
    }
}

/// What turns one state into another; `None`: a delta does not.
fn entry(old: &State, new: &State) -> Option<Vec<u8>> {
    let update = if Arc::ptr_eq(&old.slice, &new.slice) {
        None
    } else {
        let delta = old.slice.diff(&new.slice);
        let is_news = !delta.is_empty();
        if is_news && new.slice.revision <= old.slice.revision || old.slice.local.node != new.slice.local.node {
            return None;
        }
        (is_news || new.slice.revision != old.slice.revision).then(|| v1::Update::from(&delta))
    };
    let seen = new.slice.seen_since(&old.slice);
    let (slots, freed_slots) = new.slots.changes_since(&old.slots);
    let (held, forgotten): (Vec<IpNet>, Vec<IpNet>) =
        differing_keys(&old.holders, &new.holders).into_iter().partition(|prefix| new.holders.contains_key(prefix));
    let holder = |prefix| Some(StoredHolder::new(prefix, new.holders.get(prefix)?));
    let entry = Entry {
        update,
        slots: slots.into_iter().map(|(rule, slot)| (rule.0, slot)).collect(),
        freed_slots: freed_slots.into_iter().map(|rule| rule.0).collect(),
        holders: held.iter().filter_map(holder).collect(),
        forgotten: forgotten.iter().map(IpNet::to_string).collect(),
        time: new.time,
        seen: (!seen.is_empty()).then(|| endpoints_to_wire(seen)),
    };
    Some(entry.encode_to_vec())
}

fn first_checksum(digest: &[u8; DIGEST]) -> Checksum {
    short(Sha256::digest(digest).as_slice())
}

fn next_checksum(last: &Checksum, entry: &[u8]) -> Checksum {
    short(Sha256::new().chain_update(last).chain_update(entry).finalize().as_slice())
}

fn short(digest: &[u8]) -> Checksum {
    let mut checksum = [0; CHECKSUM];
    checksum.copy_from_slice(&digest[..CHECKSUM]);
    checksum
}

/// Continues a whole state by its journal.
fn read(state_dir: &Path, whole: Whole) -> (Kept, Option<StateError>) {
    let Whole { state, digest, length: whole } = whole;
    let path = state_dir.join(FILE);
    let mut kept = Kept { state, whole, tail: None, length: BEGIN as u64, checksum: first_checksum(&digest) };
    let bytes = match file::read(&path, FILE_MAX) {
        Ok(bytes) => bytes,
        Err(error) if error.is_missing() => return (kept, None),
        Err(error) => return (kept, Some(error.into())),
    };
    let is_ours = bytes.strip_prefix(MAGIC).is_some_and(|rest| rest.starts_with(&digest));
    if !is_ours {
        // Of the whole state before this one, which has all that it says.
        return (kept, None);
    }
    let end = replay(&mut kept, &bytes);
    let revision = kept.state.slice.revision;
    let error = match end {
        End::Whole => None,
        End::Torn => Some(StateError::Torn { bytes: bytes.len() as u64 - kept.length }),
        End::Damaged(reason) => {
            let at = kept.length;
            return match file::set_aside(&path, "corrupt") {
                Ok(aside) => (kept, Some(StateError::Damaged { aside, at, reason, revision })),
                Err(error) => (kept, Some(error.into())),
            };
        }
    };
    match continue_at(&path, kept.length) {
        Ok(file) => kept.tail = Some(Box::new(file)),
        Err(error) => tracing::debug!(error = host::error::chain(&error), "the journal cannot be continued"),
    }
    (kept, error)
}

/// How a journal ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Whole,
    /// In the middle of an entry.
    Torn,
    /// An entry is not what was written, and why.
    Damaged(String),
}

/// Applies one entry after the other, up to the end or to the first that cannot be used.
fn replay(kept: &mut Kept, bytes: &[u8]) -> End {
    let mut slots: BTreeMap<RuleId, u32> = kept.state.slots.pairs();
    let mut rest = &bytes[BEGIN..];
    let end = loop {
        if rest.is_empty() {
            break End::Whole;
        }
        let Some((frame, after)) = rest.split_at_checked(LENGTH + CHECKSUM) else { break End::Torn };
        let (length, checksum) = frame.split_at(LENGTH);
        let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
        let Some((entry, after)) = after.split_at_checked(length) else { break End::Torn };
        let expected = next_checksum(&kept.checksum, entry);
        if expected != checksum {
            // The last bytes of a file may be there before what was written into them.
            break if after.is_empty() { End::Torn } else { End::Damaged("a checksum is wrong".to_owned()) };
        }
        match apply(&kept.state, &mut slots, entry) {
            Ok(state) => kept.state = state,
            Err(reason) => break End::Damaged(reason),
        }
        kept.checksum = expected;
        kept.length += (frame.len() + length) as u64;
        rest = after;
    };
    kept.state.slots = RuleSlots::from_pairs(slots);
    end
}

/// The state after an entry; `slots` is changed only with it.
fn apply(state: &State, slots: &mut BTreeMap<RuleId, u32>, entry: &[u8]) -> Result<State, String> {
    let Entry { update, slots: set, freed_slots, holders, forgotten, time, seen } =
        Entry::decode(entry).map_err(|error| error.to_string())?;
    let mut state = State { time, ..state.clone() };
    if let Some(update) = update {
        let delta = SliceDelta::try_from(update).map_err(|error| error.to_string())?;
        if delta.from == Revision(0) || delta.from != state.slice.revision {
            return Err(format!("it is from revision {}, and the state is of {}", delta.from, state.slice.revision));
        }
        Arc::make_mut(&mut state.slice).apply(delta).map_err(|error| error.to_string())?;
    }
    if let Some(seen) = seen {
        let seen = endpoints_from_wire(seen).map_err(|error| error.to_string())?;
        Arc::make_mut(&mut state.slice).see(seen);
    }
    for holder in holders {
        let (prefix, key) = holder.read()?;
        state.holders.insert(prefix, key);
    }
    for prefix in forgotten {
        let parsed: IpNet = prefix.parse().map_err(|_| format!("`{prefix}` is not a prefix"))?;
        state.holders.remove(&parsed);
    }
    for rule in freed_slots {
        slots.remove(&RuleId(rule));
    }
    slots.extend(set.into_iter().map(|(rule, slot)| (RuleId(rule), slot)));
    Ok(state)
}

#[cfg(test)]
mod tests;
