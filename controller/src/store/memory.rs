//! A store that forgets: for tests.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use policy::Revision;

use super::{
    AuditEntry, AuditLine, Commit, Committed, Entry, Keep, Key, Page, Past, Precondition, Range, RequestId, Room,
    Snapshot, Store, StoreError, Wanted, Watch, Watchers, check_kept, check_lengths, fold_until, is_new,
};

/// Rows, log and audit in memory.
#[derive(Debug, Default)]
pub struct MemoryStore(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    newest: Snapshot,
    /// The oldest that is kept; the log begins after it.
    base: Snapshot,
    log: BTreeMap<Revision, Entry>,
    requests: BTreeMap<String, ([u8; 32], Revision)>,
    audit: Vec<AuditEntry>,
    watchers: Watchers,
}

impl MemoryStore {
    pub fn new() -> Self {
        Self::default()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn request(&self, request: &RequestId) -> Result<Option<Revision>, StoreError> {
        match self.requests.get(&request.id) {
            None => Ok(None),
            Some((digest, revision)) if *digest == request.digest => Ok(Some(*revision)),
            Some((_, revision)) => Err(StoreError::RequestReused { id: request.id.clone(), revision: *revision }),
        }
    }

    fn check(&self, precondition: &Precondition, is_after_refused: bool) -> Result<(), StoreError> {
        let conflict = |key: &Key, reason| Err(StoreError::Conflict { key: key.clone(), reason });
        match precondition {
            Precondition::At(expected) if *expected != self.newest.revision => {
                Err(StoreError::Moved { expected: *expected, found: self.newest.revision })
            }
            Precondition::Absent(key) if self.newest.rows.contains_key(key) => conflict(key, "exists already"),
            Precondition::Unchanged(key, since) => match self.newest.rows.get(key) {
                None => conflict(key, "is gone"),
                Some(row) if row.revision > *since => conflict(key, "was changed meanwhile"),
                Some(_) => Ok(()),
            },
            Precondition::AfterLast if is_after_refused => Err(StoreError::AfterRefused),
            Precondition::At(_) | Precondition::Absent(_) | Precondition::AfterLast => Ok(()),
        }
    }

    fn commit(&mut self, commit: &Commit, is_after_refused: bool) -> Result<Committed, StoreError> {
        check_lengths(commit)?;
        if let Some(request) = &commit.request
            && let Some(revision) = self.request(request)?
        {
            return Ok(Committed { revision, replayed: true });
        }
        commit.preconditions.iter().try_for_each(|precondition| self.check(precondition, is_after_refused))?;
        let Commit { request, preconditions: _, ops, audit, time } = commit.clone();
        let revision = Revision(self.newest.revision.0 + 1);
        self.newest.apply(revision, &ops);
        if let Some(RequestId { id, digest }) = request {
            self.requests.insert(id, (digest, revision));
        }
        let entry = |AuditLine { actor, change }| AuditEntry { revision, time, actor, change };
        self.audit.extend(audit.into_iter().map(entry));
        let entry = Entry { revision, time, ops };
        self.watchers.publish(&entry);
        self.log.insert(revision, entry);
        Ok(Committed { revision, replayed: false })
    }

    fn audit_of(&self, revision: Revision) -> Vec<AuditLine> {
        let entries = self.audit.iter().filter(|entry| entry.revision == revision);
        entries.map(|entry| AuditLine { actor: entry.actor.clone(), change: entry.change.clone() }).collect()
    }
}

impl Store for MemoryStore {
    fn snapshot(&self) -> Result<Snapshot, StoreError> {
        Ok(self.inner().newest.clone())
    }

    fn at(&self, revision: Revision, wanted: &Wanted) -> Result<Snapshot, StoreError> {
        let inner = self.inner();
        check_kept(revision, inner.base.revision, inner.newest.revision)?;
        let mut snapshot = inner.base.clone();
        for entry in inner.log.range(..=revision).map(|(_, entry)| entry) {
            wanted.check()?;
            snapshot.apply(entry.revision, &entry.ops);
        }
        Ok(snapshot)
    }

    fn kept(&self) -> Result<(Revision, Revision), StoreError> {
        let inner = self.inner();
        Ok((inner.base.revision, inner.newest.revision))
    }

    fn commit_all(&self, commits: &[Commit]) -> Result<Vec<Result<Committed, StoreError>>, StoreError> {
        let mut inner = self.inner();
        let mut done: Vec<Result<Committed, StoreError>> = Vec::new();
        for commit in commits {
            let is_after_refused = done.last().is_some_and(|last| !is_new(last));
            done.push(inner.commit(commit, is_after_refused));
        }
        Ok(done)
    }

    fn request(&self, request: &RequestId) -> Result<Option<Revision>, StoreError> {
        self.inner().request(request)
    }

    fn watch(&self, after: Revision) -> Result<Watch, StoreError> {
        let mut inner = self.inner();
        let compacted = inner.base.revision;
        if after < compacted {
            return Err(StoreError::Compacted { after, compacted });
        }
        let backlog = inner.log.values().filter(|entry| entry.revision > after).cloned().collect();
        Ok(inner.watchers.watch(after, backlog))
    }

    fn compact(&self, keep: Keep, now: u64) -> Result<bool, StoreError> {
        let mut inner = self.inner();
        let cutoff = now.saturating_sub(keep.age.as_secs());
        let stale = inner.log.values().take_while(|entry| entry.time < cutoff).last();
        let stale = stale.map_or(0, |entry| entry.revision.0);
        let newest = inner.newest.revision.0;
        let until = |inner: &Inner| fold_until(keep, inner.base.revision.0, newest, stale);
        let last = Revision(until(&inner));
        let kept = inner.log.split_off(&Revision(last.0 + 1));
        for entry in std::mem::replace(&mut inner.log, kept).into_values() {
            inner.base.apply(entry.revision, &entry.ops);
        }
        inner.requests.retain(|_, (_, revision)| *revision > last);
        Ok(until(&inner) > last.0)
    }

    fn history(&self, key: &Key, range: Range, wanted: &Wanted) -> Result<Page<Past>, StoreError> {
        let inner = self.inner();
        let (mut entries, mut room) = (Vec::new(), Room::default());
        let wrote = |entry: &&Entry| is_before(range, entry.revision) && entry.ops.iter().any(|op| op.key() == key);
        for Entry { revision, time, ops: _ } in inner.log.values().rev().filter(wrote).take(range.limit) {
            wanted.check()?;
            let audit = inner.audit_of(*revision);
            if !room.takes(*revision, "", "") {
                return Ok(Page { entries, is_cut: true });
            }
            for AuditLine { actor, change } in &audit {
                room.takes(*revision, actor, change);
            }
            entries.push(Past { revision: *revision, time: *time, audit });
        }
        Ok(Page { entries, is_cut: false })
    }

    fn audit(&self, range: Range, wanted: &Wanted) -> Result<Page<AuditEntry>, StoreError> {
        let (mut entries, mut room) = (Vec::new(), Room::default());
        let inner = self.inner();
        let asked = inner.audit.iter().rev().filter(|entry| is_before(range, entry.revision));
        for entry in asked.take(range.limit) {
            wanted.check()?;
            if !room.takes(entry.revision, &entry.actor, &entry.change) {
                return Ok(Page { entries, is_cut: true });
            }
            entries.push(entry.clone());
        }
        Ok(Page { entries, is_cut: false })
    }
}

fn is_before(range: Range, revision: Revision) -> bool {
    range.before.is_none_or(|before| revision < before)
}

#[cfg(test)]
mod tests {
    crate::store::contract::store_contract!(Box::new(crate::store::memory::MemoryStore::new()));
}
