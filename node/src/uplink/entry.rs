//! An entry of the journal: what turns one state into the next, as bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use controller_api::convert::{endpoints_from_wire, endpoints_to_wire};
use controller_api::v1;
use ipnet::IpNet;
use policy::{Revision, RuleId, SliceDelta};
use prost::Message as _;

use super::state::{State, StoredHolder};
use crate::difference::differing_keys;

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

/// What turns one state into another; `None`: a delta does not.
pub(super) fn between(old: &State, new: &State) -> Option<Vec<u8>> {
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

/// The state after an entry; `slots` is changed only with it.
pub(super) fn apply(state: &State, slots: &mut BTreeMap<RuleId, u32>, entry: &[u8]) -> Result<State, String> {
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
