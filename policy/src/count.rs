//! Counts of what is there more than once, in maps that share what they have in common.

use crate::Map;

/// One more of it; whether it is the first.
pub(crate) fn more<K: Ord + Clone>(counts: &mut Map<K, usize>, key: &K) -> bool {
    if let Some(count) = counts.get_mut(key) {
        *count += 1;
        return false;
    }
    counts.insert(key.clone(), 1);
    true
}

/// One less of it; whether it was the last.
pub(crate) fn less<K: Ord + Clone>(counts: &mut Map<K, usize>, key: &K) -> bool {
    match counts.get_mut(key) {
        Some(count) if *count > 1 => {
            *count -= 1;
            false
        }
        _ => counts.remove(key).is_some(),
    }
}
