//! What is on disk, whatever became of it, is a state that was kept.

use std::sync::{Arc, Mutex};

use policy::{Change, Network};

use super::*;
use crate::enforce::reconcile::holders;
use crate::fixture;
use crate::lower::lower;

/// States one after the other, each with other rules, slots and holders than the one before.
fn states() -> Vec<State> {
    let mut network = fixture::network();
    let mut states = vec![first(&network)];
    let add = |network: &mut Network, number: u16| {
        fixture::allow(network, &format!("more-{number}"), "cidr:app", "cidr:web", &format!("udp/{number}"));
    };
    let edits: [&dyn Fn(&mut Network); 5] = [
        &|network| add(network, 1),
        &|network| add(network, 2),
        &|network| drop(network.apply(&Change::DeleteRule { name: "app-to-db".parse().unwrap() }).unwrap()),
        &|network| drop(network.apply(&Change::DeleteRule { name: "more-1".parse().unwrap() }).unwrap()),
        &|network| add(network, 3),
    ];
    for edit in edits {
        edit(&mut network);
        let last = states.last().unwrap();
        states.push(after(last, &network));
    }
    states
}

fn first(network: &Network) -> State {
    let slice = fixture::slice(network, "app1", 9);
    let mut slots = RuleSlots::new();
    lower(&slice, &mut slots).unwrap();
    let holders = holders::holders(&slice, fixture::public_key("app1"));
    State { slice, slots, holders, time: 1_700_000_000 }
}

fn after(last: &State, network: &Network) -> State {
    let slice = fixture::slice(network, "app1", last.slice.revision.0 + 1);
    let mut slots = last.slots.clone();
    lower(&slice, &mut slots).unwrap();
    if slice.revision.0.is_multiple_of(2) {
        slots.release(&slots.retired());
    }
    let holders = holders::holders(&slice, fixture::public_key("app1"));
    State { slice, slots, holders, time: last.time + 1 }
}

/// As they are when they have been read back: slots wait for the next slice to claim them.
fn read_back(state: &State) -> State {
    State { slots: RuleSlots::from_pairs(state.slots.pairs()), ..state.clone() }
}

fn open(directory: &Path, state: &State) -> Opened {
    Journal::open(directory, state.slice.local.node)
}

/// A directory with every state kept one after the other, and the length of the journal after each.
fn kept(states: &[State]) -> (tempfile::TempDir, Vec<u64>) {
    let directory = tempfile::tempdir().unwrap();
    let mut journal = Journal::new(directory.path().to_owned());
    let mut lengths = Vec::new();
    for state in states {
        journal.keep(state).unwrap();
        lengths.push(std::fs::metadata(directory.path().join(FILE)).unwrap().len());
    }
    (directory, lengths)
}

#[test]
fn a_state_is_continued_by_its_journal_and_its_journal_by_the_next_daemon() {
    let states = states();
    let directory = tempfile::tempdir().unwrap();
    assert!(open(directory.path(), &states[0]).state.is_none());
    let mut whole = None;
    for state in &states {
        let mut opened = open(directory.path(), state);
        assert!(opened.error.is_none(), "{:?}", opened.error);
        opened.journal.keep(state).unwrap();
        let file = std::fs::read(directory.path().join(state::FILE)).unwrap();
        assert_eq!(*whole.get_or_insert(file.clone()), file, "the whole state is written once");
        assert_eq!(open(directory.path(), state).state, Some(read_back(state)));
    }
    remove(directory.path()).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

/// Killed at any byte of what is written.
#[test]
fn a_journal_that_ends_anywhere_gives_the_last_state_that_was_whole() {
    let states = states();
    let (directory, lengths) = kept(&states);
    let path = directory.path().join(FILE);
    let bytes = std::fs::read(&path).unwrap();
    for length in BEGIN..=bytes.len() {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let Opened { mut journal, state, error } = open(directory.path(), &states[0]);
        let last = lengths.iter().rposition(|end| *end <= length as u64).unwrap();
        assert_eq!(state, Some(read_back(&states[last])), "{length} bytes");
        let cut = length as u64 - lengths[last];
        match error {
            None => assert_eq!(cut, 0),
            Some(StateError::Torn { bytes }) => assert_eq!(bytes, cut),
            Some(other) => panic!("{length} bytes: {other}"),
        }
        // The next one comes right after it.
        journal.keep(states.last().unwrap()).unwrap();
        let again = open(directory.path(), &states[0]);
        assert!(again.error.is_none(), "{length} bytes: {:?}", again.error);
        assert_eq!(again.state, Some(read_back(states.last().unwrap())), "{length} bytes");
    }
    // Not even the beginning: the whole state is all there is.
    for length in 0..BEGIN {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let opened = open(directory.path(), &states[0]);
        assert_eq!(opened.state, Some(read_back(&states[0])), "{length} bytes");
    }
}

#[test]
fn a_flipped_bit_gives_an_older_state_that_is_said_to_be_older_and_never_another() {
    let states = states();
    let (directory, lengths) = kept(&states);
    let path = directory.path().join(FILE);
    let (bytes, whole) = (std::fs::read(&path).unwrap(), std::fs::read(directory.path().join(state::FILE)).unwrap());
    let restore = |journal: &[u8]| {
        std::fs::write(directory.path().join(state::FILE), &whole).unwrap();
        std::fs::write(&path, journal).unwrap();
    };
    for at in BEGIN..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        restore(&flipped);
        file::remove_aside(&path).unwrap();
        let Opened { mut journal, state, error } = open(directory.path(), &states[0]);
        let last = lengths.iter().rposition(|end| *end <= at as u64).unwrap();
        assert_eq!(state, Some(read_back(&states[last])), "byte {at}");
        match error {
            Some(StateError::Torn { .. }) => {}
            Some(StateError::Damaged { at, revision, .. }) => {
                assert_eq!((at, revision), (lengths[last], states[last].slice.revision));
                assert!(!path.exists(), "it is set aside");
            }
            other => panic!("byte {at}: {other:?}"),
        }
        journal.keep(states.last().unwrap()).unwrap();
        assert_eq!(open(directory.path(), &states[0]).state, Some(read_back(states.last().unwrap())), "byte {at}");
    }
    let error = {
        let mut flipped = bytes.clone();
        flipped[lengths[0] as usize + LENGTH] ^= 1;
        restore(&flipped);
        open(directory.path(), &states[0]).error.unwrap().to_string()
    };
    assert!(error.contains("revision 9") && error.contains("older") && error.contains("journal.corrupt-"), "{error}");
}

/// Killed between the two files of a compaction.
#[test]
fn a_journal_of_the_whole_state_before_is_ignored() {
    let states = states();
    let (directory, _) = kept(&states);
    let path = directory.path().join(FILE);
    let old = std::fs::read(&path).unwrap();
    let mut journal = Journal::new(directory.path().to_owned());
    journal.keep(states.last().unwrap()).unwrap();
    std::fs::write(&path, &old).unwrap();
    let Opened { state, error, .. } = open(directory.path(), &states[0]);
    assert_eq!((state, error.is_none()), (Some(read_back(states.last().unwrap())), true));
}

#[test]
fn a_long_journal_is_written_whole_when_nobody_waits() {
    let states = states();
    let directory = tempfile::tempdir().unwrap();
    let mut journal = Journal::new(directory.path().to_owned());
    for state in &states[..4] {
        journal.keep(state).unwrap();
    }
    let path = directory.path().join(FILE);
    journal.tend();
    assert!(journal.kept.as_ref().unwrap().compaction.is_none(), "it is short");
    journal.kept.as_mut().unwrap().compact_at = 0;
    journal.tend();
    for state in &states[4..] {
        journal.keep(state).unwrap();
    }
    while journal.kept.as_ref().unwrap().compaction.is_some() {
        journal.tend_by(Compaction::wait);
    }
    let kept = journal.kept.as_ref().unwrap();
    assert_eq!(kept.whole, std::fs::metadata(directory.path().join(state::FILE)).unwrap().len());
    assert_eq!(kept.chain.as_ref().unwrap().length, std::fs::metadata(&path).unwrap().len());
    assert_eq!(names(directory.path()), [FILE, state::FILE], "nothing is left over");
    let whole = state::load(directory.path(), states[0].slice.local.node).unwrap().unwrap();
    assert_eq!(whole.state, read_back(&states[3]), "as it was when it began");
    assert_eq!(open(directory.path(), &states[0]).state, Some(read_back(states.last().unwrap())));
}

/// What a daemon would find that is started now, while this one goes on.
fn open_copy(directory: &Path) -> Option<State> {
    let copy = copy_of(directory);
    let node = states()[0].slice.local.node;
    let Opened { state, error, .. } = Journal::open(copy.path(), node);
    assert!(error.is_none(), "{error:?}");
    state
}

fn copy_of(directory: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for name in names(directory) {
        std::fs::copy(directory.join(&name), copy.path().join(&name)).unwrap();
    }
    copy
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

/// A journal that is compacted step by step; what the next daemon finds is checked after each.
struct Stepped {
    directory: tempfile::TempDir,
    journal: Journal,
    worker: compaction::Worker,
    states: Vec<State>,
    kept: usize,
}

impl Stepped {
    /// Three states are kept, and the third is being compacted.
    fn new() -> Self {
        let (directory, states) = (tempfile::tempdir().unwrap(), states());
        let mut journal = Journal::new(directory.path().to_owned());
        for state in &states[..3] {
            journal.keep(state).unwrap();
        }
        let (compaction, worker) = Compaction::new(directory.path());
        let next = Next::Written { since: Vec::new() };
        journal.kept.as_mut().unwrap().compaction = Some(Underway { compaction, next });
        Self { directory, journal, worker, states, kept: 2 }
    }

    fn keep(&mut self) {
        self.kept += 1;
        self.journal.keep(&self.states[self.kept]).unwrap();
        self.check();
    }

    /// Whatever the moment, and wherever what is written last is torn.
    fn check(&self) {
        let expected = read_back(&self.states[self.kept]);
        assert_eq!(open_copy(self.directory.path()), Some(expected.clone()));
        // The next daemon goes on from there, and so does the one after it.
        let copy = copy_of(self.directory.path());
        open(copy.path(), &expected).journal.keep(self.states.last().unwrap()).unwrap();
        let Opened { state, error, .. } = open(copy.path(), &expected);
        assert!(error.is_none(), "{error:?}");
        assert_eq!(state, Some(read_back(self.states.last().unwrap())));
    }

    fn step(&mut self, news: News) {
        self.journal.tend_by(|_| Some(news));
        self.check();
    }
}

/// Killed at any step of a compaction, with a state kept before each.
#[test]
fn a_compaction_that_ends_anywhere_leaves_the_last_state_that_was_kept() {
    for keeps in 0..8_u32 {
        let mut stepped = Stepped::new();
        let written = stepped.worker.write(&stepped.states[2]).unwrap();
        stepped.check();
        if keeps & 1 != 0 {
            stepped.keep();
        }
        stepped.step(written);
        if keeps & 2 != 0 {
            stepped.keep();
        }
        stepped.worker.replace_state().unwrap();
        stepped.check();
        if keeps & 4 != 0 {
            stepped.keep();
        }
        stepped.worker.replace_journal().unwrap();
        stepped.check();
        stepped.step(News::Replaced);
        while stepped.kept + 1 < stepped.states.len() {
            stepped.keep();
        }
        assert_eq!(names(stepped.directory.path()), [FILE, state::FILE]);
    }
}

/// Killed at any byte of an entry, in the first or the second journal that gets it.
#[test]
fn an_entry_that_is_torn_while_files_are_replaced_is_no_entry() {
    for is_replaced in [false, true] {
        let mut stepped = Stepped::new();
        let written = stepped.worker.write(&stepped.states[2]).unwrap();
        stepped.step(written);
        if is_replaced {
            stepped.worker.replace_state().unwrap();
        }
        let name = if is_replaced { NEXT_JOURNAL } else { FILE };
        let before = std::fs::metadata(stepped.directory.path().join(name)).unwrap().len();
        stepped.keep();
        let bytes = std::fs::read(stepped.directory.path().join(name)).unwrap();
        for length in before as usize + 1..bytes.len() {
            let copy = copy_of(stepped.directory.path());
            std::fs::write(copy.path().join(name), &bytes[..length]).unwrap();
            let Opened { mut journal, state, error } = open(copy.path(), &stepped.states[0]);
            assert_eq!(state, Some(read_back(&stepped.states[2])), "{length} bytes");
            assert!(matches!(error, Some(StateError::Torn { .. })), "{length} bytes: {error:?}");
            journal.keep(&stepped.states[3]).unwrap();
            assert_eq!(open(copy.path(), &stepped.states[0]).state, Some(read_back(&stepped.states[3])));
        }
    }
}

/// A full disk at each step: what is kept is kept, what is not is said, and the journal goes on.
#[test]
fn a_compaction_that_fails_costs_nothing_that_was_kept() {
    let failed = || News::Failed(FileError::new("write", Path::new("state.next"))(io::ErrorKind::StorageFull.into()));
    let mut stepped = Stepped::new();
    stepped.keep();
    stepped.step(failed());
    assert!(stepped.journal.kept.as_ref().unwrap().compact_at > SHORT, "it is not tried again at once");
    stepped.keep();
    let mut stepped = Stepped::new();
    let written = stepped.worker.write(&stepped.states[2]).unwrap();
    stepped.step(written);
    stepped.worker.replace_state().unwrap();
    stepped.step(failed());
    assert!(stepped.journal.kept.as_ref().unwrap().chain.is_none(), "nobody knows which files are there");
    stepped.keep();
    stepped.keep();
    // The second journal has no room for what the first has already.
    for can_cut in [true, false] {
        let mut stepped = Stepped::new();
        let written = stepped.worker.write(&stepped.states[2]).unwrap();
        stepped.step(written);
        let file = OpenOptions::new().append(true).open(stepped.directory.path().join(NEXT_JOURNAL)).unwrap();
        let full = Full { file, room: Arc::new(Mutex::new(5)), can_cut };
        match &mut stepped.journal.kept.as_mut().unwrap().compaction.as_mut().unwrap().next {
            Next::Replacing { chain, .. } => chain.tail = Box::new(full),
            Next::Written { .. } => panic!("step 2 is done"),
        }
        let error = stepped.journal.keep(&stepped.states[3]).unwrap_err().to_string();
        assert!(error.contains("free some space"), "{error}");
        assert_eq!(stepped.journal.kept.as_ref().unwrap().chain.is_some(), can_cut);
        if can_cut {
            stepped.check();
        }
        drop(stepped.journal.kept.as_mut().unwrap().compaction.take());
        stepped.keep();
        stepped.keep();
    }
}

/// A disk with room for so many bytes.
struct Full {
    file: File,
    room: Arc<Mutex<usize>>,
    can_cut: bool,
}

impl Tail for Full {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut room = self.room.lock().unwrap();
        let written = bytes.len().min(*room);
        *room -= written;
        self.file.write_all(&bytes[..written])?;
        if written < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        if self.can_cut { Tail::cut(&mut self.file, length) } else { Err(io::ErrorKind::StorageFull.into()) }
    }
}

#[test]
fn a_full_disk_is_said_and_what_was_kept_stays_until_there_is_room() {
    let states = states();
    for can_cut in [true, false] {
        for room in [0, 1, LENGTH, LENGTH + CHECKSUM, LENGTH + CHECKSUM + 1] {
            let directory = tempfile::tempdir().unwrap();
            let mut journal = Journal::new(directory.path().to_owned());
            journal.keep(&states[0]).unwrap();
            journal.keep(&states[1]).unwrap();
            let file = OpenOptions::new().append(true).open(directory.path().join(FILE)).unwrap();
            let room = Arc::new(Mutex::new(room));
            let full = Full { file, room: Arc::clone(&room), can_cut };
            journal.kept.as_mut().unwrap().chain.as_mut().unwrap().tail = Box::new(full);
            let error = journal.keep(&states[2]).unwrap_err().to_string();
            assert!(error.contains("append to") && error.contains("free some space"), "{error}");
            assert_eq!(open(directory.path(), &states[0]).state, Some(read_back(&states[1])));
            *room.lock().unwrap() = usize::MAX;
            journal.keep(&states[3]).unwrap();
            let Opened { state, error, .. } = open(directory.path(), &states[0]);
            assert_eq!((state, error.is_none()), (Some(read_back(&states[3])), true));
        }
    }
}

/// What is older than what was kept, or of another node, does not continue it.
#[test]
fn a_state_that_is_no_successor_is_written_whole() {
    let states = states();
    let (directory, _) = kept(&states);
    let mut opened = open(directory.path(), &states[0]);
    opened.journal.keep(&states[2]).unwrap();
    assert_eq!(std::fs::metadata(directory.path().join(FILE)).unwrap().len(), BEGIN as u64);
    assert_eq!(open(directory.path(), &states[0]).state, Some(read_back(&states[2])));
}
