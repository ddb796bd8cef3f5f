//! The last good state, kept at the cost of what changes: entries are appended to a journal beside the whole state, and
//! are on disk before a change is acknowledged.
//!
//! A line with the version and the digest of the whole state that the journal continues, then entries: length, checksum,
//! and a protobuf message whose heart is the delta as the controller would send it. A checksum covers the one before it, so
//! that entries stand for exactly one state after the other, and a journal of another whole state is known and ignored.
//! Where the journal has grown longer than the whole state, that is written anew ([`super::compaction`]).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use host::file::{self, FileError};
use policy::{NodeId, RuleId};
use sha2::{Digest as _, Sha256};

use super::compaction::{self, Compaction, NEXT_JOURNAL, News};
use super::entry;
use super::state::{self, DIGEST, State, StateError, Whole};
use crate::lower::RuleSlots;

/// The file's name in the state directory.
pub const FILE: &str = "journal";

/// Raised with every change of what follows it.
pub(super) const MAGIC: &[u8] = b"rampart node journal 1\n";
const BEGIN: usize = MAGIC.len() + DIGEST;
const LENGTH: usize = size_of::<u32>();
const CHECKSUM: usize = 8;
/// No journal is too long that is shorter than this, in bytes.
const SHORT: u64 = 1 << 20;
/// Larger than any journal becomes.
const FILE_MAX: u64 = 512 * 1024 * 1024;
/// A journal that no compaction has kept shorter ends here, in bytes.
const LONG: u64 = FILE_MAX / 2;

type Checksum = [u8; CHECKSUM];

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
    chain: Option<Chain>,
    /// The journal is not compacted before it has so many bytes.
    compact_at: u64,
    compaction: Option<Underway>,
}

/// A journal that is continued.
struct Chain {
    tail: Box<dyn Tail>,
    /// Bytes of the journal, and the last entry's checksum.
    length: u64,
    checksum: Checksum,
}

/// A compaction, and what it does not have of what was kept.
struct Underway {
    /// Dropped first: whoever waits for its end still has the rest.
    compaction: Compaction,
    next: Next,
}

enum Next {
    /// While the whole state is written: the entries since.
    Written { since: Vec<Vec<u8>> },
    /// While files are replaced: the journal that is the only one then, with the length of its whole state.
    Replacing { chain: Chain, whole: u64 },
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
            Ok(Some(whole)) if !whole.is_current => (Some(whole.state), None),
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
        match self.kept.as_mut().and_then(|kept| Some((entry::between(&kept.state, state)?, kept))) {
            Some((entry, kept)) if kept.has_room_for(&entry) => {
                kept.append(&entry).map_err(FileError::new("append to", &self.state_dir.join(FILE)))?;
                kept.state = state.clone();
                Ok(())
            }
            _ => self.write_whole(state),
        }
    }

    /// Has the whole state written where the journal has become long. For when nobody waits: it takes no longer than to keep
    /// a state does.
    pub fn tend(&mut self) {
        self.tend_by(Compaction::hear);
    }

    fn tend_by(&mut self, hear: impl FnOnce(&Compaction) -> Option<News>) {
        let Some(kept) = &mut self.kept else { return };
        let Some(underway) = &kept.compaction else {
            let length = kept.chain.as_ref().map_or(0, |chain| chain.length);
            if length > kept.compact_at {
                let compaction = Compaction::start(&self.state_dir, kept.state.clone());
                kept.compaction = Some(Underway { compaction, next: Next::Written { since: Vec::new() } });
            }
            return;
        };
        let Some(news) = hear(&underway.compaction) else { return };
        if let Err(error) = kept.go_on(news) {
            tracing::warn!(error, "the last good state cannot be compacted; its journal goes on");
        }
    }

    /// The whole state first: what the journal says until it is replaced too is known to be older.
    fn write_whole(&mut self, state: &State) -> Result<(), FileError> {
        if let Some(kept) = &mut self.kept {
            kept.compaction = None;
        }
        let (digest, whole) = state::store(&self.state_dir.join(state::FILE), state)?;
        let tail = begin(&self.state_dir, &digest)
            .inspect_err(|error| tracing::debug!(error = host::error::chain(error), "no journal can be begun"));
        let chain = tail.ok().map(|tail| Chain::new(tail, &digest));
        self.kept = Some(Kept::new(state.clone(), whole, chain));
        Ok(())
    }
}

/// Removes the state with its journal, and what was set aside of earlier ones.
pub fn remove(state_dir: &Path) -> Result<(), FileError> {
    file::remove_aside(&state_dir.join(FILE))?;
    file::remove(&state_dir.join(FILE))?;
    compaction::remove(state_dir)?;
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
    fn new(state: State, whole: u64, chain: Option<Chain>) -> Self {
        Self { state, whole, chain, compact_at: whole.max(SHORT), compaction: None }
    }

    fn has_room_for(&self, entry: &[u8]) -> bool {
        let length = self.chain.as_ref().map(|chain| chain.length + entry.len() as u64);
        entry.len() as u64 <= self.whole.max(SHORT) && length.is_some_and(|length| length <= LONG)
    }

    /// An error: the entry is not kept. Where that is not certain, the whole state is written next.
    fn append(&mut self, entry: &[u8]) -> io::Result<()> {
        let Some(chain) = &mut self.chain else { return Ok(()) };
        let before = (chain.length, chain.checksum);
        if let Err(failed) = chain.append(entry) {
            self.chain.take_if(|_| !failed.is_cut);
            return Err(failed.error);
        }
        match self.compaction.as_mut().map(|underway| &mut underway.next) {
            None => {}
            Some(Next::Written { since }) => since.push(entry.to_vec()),
            Some(Next::Replacing { chain: next, .. }) => {
                if let Err(failed) = next.append(entry) {
                    self.chain.take_if(|chain| chain.cut(before).is_err() || !failed.is_cut);
                    return Err(failed.error);
                }
            }
        }
        Ok(())
    }

    /// The next step of the compaction.
    fn go_on(&mut self, news: News) -> Result<(), String> {
        let Some(underway) = self.compaction.take() else { return Ok(()) };
        let Underway { compaction, next } = underway;
        match (news, next) {
            (News::Written { digest, whole, journal }, Next::Written { since }) => {
                let mut chain = Chain::new(journal, &digest);
                if let Err(failed) = chain.append_all(&since) {
                    self.compact_later();
                    return Err(failed.error.to_string());
                }
                compaction.go_on();
                self.compaction = Some(Underway { compaction, next: Next::Replacing { chain, whole } });
                Ok(())
            }
            (News::Replaced, Next::Replacing { chain, whole }) => {
                (self.whole, self.compact_at, self.chain) = (whole, whole.max(SHORT), Some(chain));
                Ok(())
            }
            (News::Failed(error), Next::Written { .. }) => {
                self.compact_later();
                Err(host::error::chain(&error))
            }
            // Nobody knows which of the files are there.
            (News::Failed(error), Next::Replacing { .. }) => {
                self.chain = None;
                Err(host::error::chain(&error))
            }
            (News::Written { .. } | News::Replaced, _) => {
                self.chain = None;
                Err("a step was said to be done that was not begun".to_owned())
            }
        }
    }

    fn compact_later(&mut self) {
        self.compact_at = self.chain.as_ref().map_or(0, |chain| chain.length) + SHORT;
    }
}

/// Why an entry was not appended.
struct Failed {
    error: io::Error,
    /// Whatever came of it is cut off again.
    is_cut: bool,
}

impl Chain {
    fn new(tail: File, digest: &[u8; DIGEST]) -> Self {
        Self { tail: Box::new(tail), length: BEGIN as u64, checksum: first_checksum(digest) }
    }

    fn append(&mut self, entry: &[u8]) -> Result<(), Failed> {
        self.append_all(&[entry])
    }

    fn append_all(&mut self, entries: &[impl AsRef<[u8]>]) -> Result<(), Failed> {
        let (mut bytes, mut checksum) = (Vec::new(), self.checksum);
        for entry in entries.iter().map(AsRef::as_ref) {
            checksum = next_checksum(&checksum, entry);
            bytes.extend_from_slice(&(entry.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&checksum);
            bytes.extend_from_slice(entry);
        }
        if let Err(error) = self.tail.append(&bytes) {
            return Err(Failed { error, is_cut: self.tail.cut(self.length).is_ok() });
        }
        (self.length, self.checksum) = (self.length + bytes.len() as u64, checksum);
        Ok(())
    }

    /// Goes back to a length and the checksum that it had then.
    fn cut(&mut self, (length, checksum): (u64, Checksum)) -> io::Result<()> {
        self.tail.cut(length)?;
        (self.length, self.checksum) = (length, checksum);
        Ok(())
    }
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
    let Whole { state, digest, length: whole, is_current: _ } = whole;
    let mut replayed = Replayed { state, length: BEGIN as u64, checksum: first_checksum(&digest) };
    let (path, bytes) = match find(state_dir, &digest) {
        Ok(Some(found)) => found,
        Ok(None) => return (Kept::new(replayed.state, whole, None), None),
        Err(error) => return (Kept::new(replayed.state, whole, None), Some(error.into())),
    };
    if path.ends_with(FILE)
        && let Err(error) = compaction::remove(state_dir)
    {
        tracing::debug!(error = host::error::chain(&error), "what a compaction has left cannot be removed");
    }
    let end = replay(&mut replayed, &bytes);
    let Replayed { state, length, checksum } = replayed;
    let error = match end {
        End::Whole => None,
        End::Torn => Some(StateError::Torn { bytes: bytes.len() as u64 - length }),
        End::Damaged(reason) => {
            let error = match file::set_aside(&path, "corrupt") {
                Ok(aside) => StateError::Damaged { aside, at: length, reason, revision: state.slice.revision },
                Err(error) => error.into(),
            };
            return (Kept::new(state, whole, None), Some(error));
        }
    };
    let tail = named(state_dir, &path)
        .and_then(|path| continue_at(&path, length))
        .inspect_err(|error| tracing::debug!(error = host::error::chain(error), "the journal cannot be continued"));
    let chain = tail.ok().map(|tail| Chain { tail: Box::new(tail), length, checksum });
    (Kept::new(state, whole, chain), error)
}

/// The journal of the whole state with this digest, if there is one. That of another has nothing that the state lacks.
fn find(state_dir: &Path, digest: &[u8; DIGEST]) -> Result<Option<(PathBuf, Vec<u8>)>, FileError> {
    // Where both continue the state, the first has all that the second has.
    for name in [FILE, NEXT_JOURNAL] {
        let path = state_dir.join(name);
        match file::read(&path, FILE_MAX) {
            Ok(bytes) if bytes.strip_prefix(MAGIC).is_some_and(|rest| rest.starts_with(digest)) => {
                return Ok(Some((path, bytes)));
            }
            Err(error) if !error.is_missing() => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(None)
}

/// Where a journal lies once it has its name.
fn named(state_dir: &Path, found: &Path) -> Result<PathBuf, FileError> {
    let path = state_dir.join(FILE);
    if found != path {
        file::replace(&path, found)?;
    }
    Ok(path)
}

/// A state while a journal is applied to it, entry after entry.
struct Replayed {
    state: State,
    length: u64,
    checksum: Checksum,
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
fn replay(replayed: &mut Replayed, bytes: &[u8]) -> End {
    let mut slots: BTreeMap<RuleId, u32> = replayed.state.slots.pairs();
    let mut rest = &bytes[BEGIN..];
    let end = loop {
        if rest.is_empty() {
            break End::Whole;
        }
        let Some((frame, after)) = rest.split_at_checked(LENGTH + CHECKSUM) else { break End::Torn };
        let (length, checksum) = frame.split_at(LENGTH);
        let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]) as usize;
        let Some((entry, after)) = after.split_at_checked(length) else { break End::Torn };
        let expected = next_checksum(&replayed.checksum, entry);
        if expected != checksum {
            // The last bytes of a file may be there before what was written into them.
            break if after.is_empty() { End::Torn } else { End::Damaged("a checksum is wrong".to_owned()) };
        }
        match entry::apply(&replayed.state, &mut slots, entry) {
            Ok(state) => replayed.state = state,
            Err(reason) => break End::Damaged(reason),
        }
        replayed.checksum = expected;
        replayed.length += (frame.len() + length) as u64;
        rest = after;
    };
    replayed.state.slots = RuleSlots::from_pairs(slots);
    end
}

#[cfg(test)]
mod tests;
