//! Counts of what is there more than once, in maps that share what they have in common.

use crate::Map;

/// One more of it; whether it is the first.
pub(crate) fn more<K: Ord + Clone>(counts: &mut Map<K, usize>, key: &K) -> bool {
    let count = counts.get(key).map_or(1, |count| count + 1);
    counts.insert(key.clone(), count);
    count == 1
}

/// One less of it; whether it was the last.
pub(crate) fn less<K: Ord + Clone>(counts: &mut Map<K, usize>, key: &K) -> bool {
    match counts.get(key) {
        Some(&count) if count > 1 => {
            counts.insert(key.clone(), count - 1);
            false
        }
        _ => counts.remove(key).is_some(),
    }
}
