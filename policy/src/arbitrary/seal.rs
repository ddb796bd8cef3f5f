//! Deltas that are wrong in what they say, and right in their digests.

use crate::{DeltaError, Slice, SliceDelta};

/// The delta with the digests that it would have if it were sound. `None`: it is a whole slice.
pub fn sealed(held: Option<&Slice>, mut delta: SliceDelta) -> SliceDelta {
    delta.base = held.map(|held| held.digest).unwrap_or_default();
    let applied = match held {
        Some(held) => held.clone().apply(delta.clone()),
        None => Slice::from_snapshot(delta.clone()).map(drop),
    };
    if let Err(DeltaError::Digest { found, .. }) = applied {
        delta.digest = found;
    }
    delta
}
