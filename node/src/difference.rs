//! Where two maps differ, at the cost of what they do not share.

use std::collections::BTreeSet;

use imbl::ordmap::DiffItem;
use policy::Map;

/// The keys that one of two maps lacks, or has otherwise.
pub(crate) fn differing_keys<K: Ord + Copy, V: PartialEq>(old: &Map<K, V>, new: &Map<K, V>) -> BTreeSet<K> {
    if old.ptr_eq(new) {
        return BTreeSet::new();
    }
    let key = |item| match item {
        DiffItem::Add(key, _) | DiffItem::Remove(key, _) | DiffItem::Update { new: (key, _), .. } => *key,
    };
    old.diff(new).map(key).collect()
}
