//! A store that forgets: for tests.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use policy::Revision;

use super::{
    AuditEntry, Commit, Committed, Entry, Key, Op, Precondition, RequestId, Snapshot, Store, StoreError, Watch,
    Watchers, check_lengths,
};

/// Rows, log and audit in memory.
#[derive(Debug, Default)]
pub struct MemoryStore(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    revision: u64,
    compacted: u64,
    /// Value, and the revision that wrote it.
    rows: BTreeMap<Key, (Vec<u8>, u64)>,
    log: BTreeMap<u64, Vec<Op>>,
    requests: BTreeMap<String, ([u8; 32], u64)>,
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
            Some((digest, revision)) if *digest == request.digest => Ok(Some(Revision(*revision))),
            Some((_, revision)) => {
                Err(StoreError::RequestReused { id: request.id.clone(), revision: Revision(*revision) })
            }
        }
    }

    fn check(&self, precondition: &Precondition) -> Result<(), StoreError> {
        match precondition {
            Precondition::At(expected) if expected.0 != self.revision => {
                Err(StoreError::Moved { expected: *expected, found: Revision(self.revision) })
            }
            Precondition::Absent(key) if self.rows.contains_key(key) => {
                Err(StoreError::Conflict { key: key.clone(), reason: "exists already" })
            }
            Precondition::Unchanged(key, since) => match self.rows.get(key) {
                None => Err(StoreError::Conflict { key: key.clone(), reason: "is gone" }),
                Some((_, written)) if *written > since.0 => {
                    Err(StoreError::Conflict { key: key.clone(), reason: "was changed meanwhile" })
                }
                Some(_) => Ok(()),
            },
            Precondition::At(_) | Precondition::Absent(_) => Ok(()),
        }
    }
}

impl Store for MemoryStore {
    fn snapshot(&self) -> Result<Snapshot, StoreError> {
        let inner = self.inner();
        let rows = inner.rows.iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect();
        Ok(Snapshot { revision: Revision(inner.revision), rows })
    }

    fn commit(&self, commit: &Commit) -> Result<Committed, StoreError> {
        check_lengths(commit)?;
        let mut inner = self.inner();
        if let Some(request) = &commit.request
            && let Some(revision) = inner.request(request)?
        {
            return Ok(Committed { revision, replayed: true });
        }
        commit.preconditions.iter().try_for_each(|precondition| inner.check(precondition))?;
        inner.revision += 1;
        let number = inner.revision;
        for op in &commit.ops {
            match op {
                Op::Put(key, value) => inner.rows.insert(key.clone(), (value.clone(), number)),
                Op::Delete(key) => inner.rows.remove(key),
            };
        }
        if let Some(request) = &commit.request {
            inner.requests.insert(request.id.clone(), (request.digest, number));
        }
        let revision = Revision(number);
        inner.audit.extend(commit.audit.iter().map(|line| AuditEntry {
            revision,
            time: commit.time,
            actor: line.actor.clone(),
            change: line.change.clone(),
        }));
        inner.log.insert(number, commit.ops.clone());
        inner.watchers.publish(&Entry { revision, ops: commit.ops.clone() });
        Ok(Committed { revision, replayed: false })
    }

    fn request(&self, request: &RequestId) -> Result<Option<Revision>, StoreError> {
        self.inner().request(request)
    }

    fn watch(&self, after: Revision) -> Result<Watch, StoreError> {
        let mut inner = self.inner();
        if after.0 < inner.compacted {
            return Err(StoreError::Compacted { after, compacted: Revision(inner.compacted) });
        }
        let entry = |(number, ops): (&u64, &Vec<Op>)| Entry { revision: Revision(*number), ops: ops.clone() };
        let backlog = inner.log.range(after.0 + 1..).map(entry).collect();
        Ok(inner.watchers.watch(after, backlog))
    }

    fn compact(&self, before: Revision) -> Result<(), StoreError> {
        let mut inner = self.inner();
        let before = before.0.min(inner.revision + 1);
        inner.log = inner.log.split_off(&before);
        inner.requests.retain(|_, (_, revision)| *revision >= before);
        inner.compacted = inner.compacted.max(before.saturating_sub(1));
        Ok(())
    }

    fn audit(&self, limit: usize) -> Result<Vec<AuditEntry>, StoreError> {
        Ok(self.inner().audit.iter().rev().take(limit).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    crate::store::contract::store_contract!(Box::new(crate::store::memory::MemoryStore::new()));
}
