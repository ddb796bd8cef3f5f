//! The state file of version 1, for a node that is upgraded and starts while its controller is away.
//!
//! Its classes were numbered by one process of the controller, for all prefixes alike, and cidrs had no prefixes of their
//! own. The slice that is made of it gives the same verdict on every flow; it has a digest that no controller has sent, so
//! that the node gets everything anew with the first answer.

use std::collections::{BTreeMap, BTreeSet};

use controller_api::v1;
use ipnet::IpNet;
use policy::{Addresses, ClassId, Slice};
use prost::Message as _;

use super::state::{State, Stored};

/// What version 1 had and its successor has not: which other prefixes are routed to the interface.
#[derive(Clone, PartialEq, prost::Message)]
struct Routes {
    #[prost(message, optional, tag = "1")]
    slice: Option<RoutesOfSlice>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RoutesOfSlice {
    #[prost(message, optional, tag = "3")]
    local: Option<RoutesOfLocal>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RoutesOfLocal {
    #[prost(message, repeated, tag = "6")]
    external_routes: Vec<v1::Prefix>,
}

/// Reads the message of a file of version 1.
pub(super) fn decode(message: &[u8]) -> Result<State, String> {
    let routes = Routes::decode(message).map_err(|error| error.to_string())?;
    let mut stored = Stored::decode(message).map_err(|error| error.to_string())?;
    let local = routes.slice.and_then(|slice| slice.local).ok_or("it has no slice")?;
    let external_routes = nets(local.external_routes)?;
    stored.slice = stored.slice.map(|update| renumbered(update, &external_routes)).transpose()?;
    let state = stored.read(Slice::from_rows)?;
    if state.slice.local.external_routes != external_routes {
        return Err("what it routes to others does not follow from its cidrs".to_owned());
    }
    Ok(state)
}

fn nets<C: FromIterator<IpNet>>(prefixes: Vec<v1::Prefix>) -> Result<C, String> {
    prefixes.into_iter().map(|prefix| IpNet::try_from(prefix).map_err(|error| error.to_string())).collect()
}

/// The snapshot in the terms of this version.
fn renumbered(update: v1::Update, external_routes: &BTreeSet<IpNet>) -> Result<v1::Update, String> {
    let mut rows: BTreeMap<IpNet, v1::SlicePrefix> = BTreeMap::new();
    for row in update.prefixes {
        let prefix = row.prefix.clone().ok_or("a prefix is missing")?;
        rows.insert(IpNet::try_from(prefix).map_err(|error| error.to_string())?, row);
    }
    let mut local = update.local.ok_or("it says nothing of its node")?;
    let own = Own::of(&local, &rows, external_routes)?;
    local.split = own.is_split();
    let mut cidrs = update.cidrs;
    for cidr in &mut cidrs {
        let whole: Vec<IpNet> = whole_prefixes(&rows, cidr.id);
        cidr.routed = whole.iter().any(|net| external_routes.contains(net));
        let prefixes = policy::Prefixes::from_nets(whole).map_err(|error| error.to_string())?;
        cidr.prefixes = Some(v1::Prefixes::from(&prefixes));
    }
    let marked = |row: &v1::SlicePrefix| v1::SlicePrefix { class: marked(row.class), ..row.clone() };
    let prefixes = rows.values().map(marked).collect();
    let cells = update.cells.into_iter().flat_map(|cells| own.cells(&cells)).collect();
    Ok(v1::Update { local: Some(local), cidrs, prefixes, cells, ..update })
}

/// The class, as one that is told apart within its cidr; all were that.
fn marked(class: u64) -> u64 {
    ClassId::marked(class).0
}

/// The prefixes of a cidr that lie in no other one of it.
fn whole_prefixes(rows: &BTreeMap<IpNet, v1::SlicePrefix>, cidr: u32) -> Vec<IpNet> {
    let mut whole: Vec<IpNet> = Vec::new();
    // In order, a prefix comes after those that contain it.
    for net in rows.iter().filter(|(_, row)| row.cidr == cidr).map(|(net, _)| *net) {
        if whole.last().is_none_or(|last| !last.contains(&net)) {
            whole.push(net);
        }
    }
    whole
}

/// The classes of the addresses that the node stands for.
struct Own {
    /// As version 1 had them.
    v4: Option<u64>,
    v6: Option<u64>,
    /// Behind the node, as they are now.
    behind: BTreeSet<u64>,
}

impl Own {
    fn of(
        local: &v1::Local,
        rows: &BTreeMap<IpNet, v1::SlicePrefix>,
        external_routes: &BTreeSet<IpNet>,
    ) -> Result<Self, String> {
        let addresses = local.addresses.clone().ok_or("its node has no addresses")?;
        let addresses = Addresses::try_from(addresses).map_err(|error| error.to_string())?;
        let class_of = |net: IpNet| longest(rows.keys(), &net).and_then(|longest| Some(rows.get(&longest)?.class));
        let v4 = addresses.v4().and_then(|address| class_of(IpNet::from(std::net::IpAddr::from(address))));
        let v6 = addresses.v6().and_then(|address| class_of(IpNet::from(std::net::IpAddr::from(address))));
        let gateway_for: BTreeSet<IpNet> = nets(local.gateway_for.clone())?;
        let length = |nets: &BTreeSet<IpNet>, net: &IpNet| longest(nets.iter(), net).map(|net| net.prefix_len());
        let is_behind = |net: &IpNet| {
            let served = length(&gateway_for, net);
            served.is_some() && served > length(external_routes, net)
        };
        let behind = rows.iter().filter(|(net, _)| is_behind(net)).map(|(_, row)| marked(row.class)).collect();
        Ok(Self { v4, v6, behind })
    }

    fn is_split(&self) -> bool {
        matches!((self.v4, self.v6), (Some(v4), Some(v6)) if v4 != v6)
    }

    /// What a class of version 1 is now: that of the node's own addresses, and that of the others in it.
    fn split(&self, class: u64) -> Vec<u64> {
        let mut classes = vec![marked(class)];
        if self.v4 == Some(class) || (self.v6 == Some(class) && !self.is_split()) {
            classes.push(ClassId::OWN.0);
        }
        if self.v6 == Some(class) && self.is_split() {
            classes.push(ClassId::OWN_V6.0);
        }
        classes
    }

    fn is_own(&self, class: u64) -> bool {
        ClassId(class).is_own() || self.behind.contains(&class)
    }

    /// The pairs that concern the node, as rows of one pair each.
    fn cells(&self, cells: &v1::Cells) -> Vec<v1::Cells> {
        let split = |classes: &[u64]| classes.iter().flat_map(|class| self.split(*class)).collect::<Vec<_>>();
        let (sources, destinations) = (split(&cells.sources), split(&cells.destinations));
        let pairs =
            sources.iter().flat_map(|source| destinations.iter().map(move |destination| (*source, *destination)));
        let concerning = pairs.filter(|(source, destination)| self.is_own(*source) || self.is_own(*destination));
        concerning
            .map(|(source, destination)| v1::Cells {
                sources: vec![source],
                destinations: vec![destination],
                ..cells.clone()
            })
            .collect()
    }
}

/// The longest of these prefixes that contains another one.
fn longest<'a>(nets: impl Iterator<Item = &'a IpNet>, net: &IpNet) -> Option<IpNet> {
    nets.filter(|candidate| candidate.contains(net)).max_by_key(|candidate| candidate.prefix_len()).copied()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::path::Path;

    use ipnet::IpNet;
    use policy::{Flow, NodeId, PublicKey, Revision, Verdict};

    use super::super::journal::{self, Journal};
    use super::super::state;
    use crate::lower::lower;

    /// Written by version 1, of one network: a node, and one that is a gateway. Beside each is what the interpreter said of
    /// flows.
    const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/state");

    /// As the fixture has it.
    fn words_of(verdict: &Verdict) -> String {
        let Verdict { action, reason, rule } = verdict;
        format!("{action:?} {reason:?} {}", rule.map_or(0, |rule| rule.0))
    }

    fn read(name: &str) -> (Vec<u8>, String) {
        let path = Path::new(FIXTURES).join(format!("state-1-{name}"));
        (std::fs::read(&path).unwrap(), std::fs::read_to_string(path.with_extension("verdicts")).unwrap())
    }

    #[test]
    fn the_state_of_version_1_is_enforced_as_it_was_and_kept_as_one_of_this_version() {
        for (name, node, peers) in [("app1", NodeId(9), 6), ("gate", NodeId(12), 4)] {
            let (bytes, verdicts) = read(name);
            let directory = tempfile::tempdir().unwrap();
            let file = directory.path().join(state::FILE);
            std::fs::write(&file, &bytes).unwrap();
            let mut opened = Journal::open(directory.path(), node);
            assert!(opened.error.is_none(), "{:?}", opened.error);
            let mut kept = opened.state.unwrap();
            assert_eq!(
                (kept.slice.local.name.as_str(), kept.slice.revision, kept.time),
                (name, Revision(41), 1_700_000_000)
            );
            assert_eq!(kept.slice.peers.len(), peers);
            assert!(kept.slice.peers.values().any(|peer| peer.endpoint == Some("203.0.113.3:51820".parse().unwrap())));
            let own: IpAddr = kept.slice.local.addresses.iter().next().unwrap();
            let key =
                PublicKey::try_from(&[&[0x42], name.as_bytes(), &[0x42; 32][1 + name.len()..]].concat()[..]).unwrap();
            assert_eq!(kept.holders.get(&IpNet::from(own)), Some(&key));

            let slots = kept.slots.pairs();
            assert_eq!(slots.keys().collect::<Vec<_>>(), kept.slice.rules.keys().collect::<Vec<_>>());
            let tables = lower(&kept.slice, &mut kept.slots).unwrap();
            tables.check().unwrap();
            let mut said = 0;
            for line in verdicts.lines() {
                let words: Vec<&str> = line.splitn(5, ' ').collect();
                let flow = Flow {
                    source: words[0].parse().unwrap(),
                    destination: words[1].parse().unwrap(),
                    protocol: words[2].parse().unwrap(),
                    port: words[3].parse().unwrap(),
                };
                assert_eq!(words_of(&kept.slice.verdict(&flow)), words[4], "{name}: {flow}");
                for direction in [ebpf_common::INGRESS, ebpf_common::EGRESS] {
                    let stands = if direction == ebpf_common::INGRESS { flow.destination } else { flow.source };
                    if kept.slice.stands_for(stands) {
                        let verdict = tables.in_policy(&tables.verdict(&flow, direction)).unwrap();
                        assert_eq!(words_of(&verdict), words[4], "{name}: {flow}, lowered");
                    }
                }
                said += 1;
            }
            assert!(said > 300, "{said} flows");

            // Nothing is appended to a file of another version.
            assert!(!directory.path().join(journal::FILE).exists());
            let kept = state::State { slots: crate::lower::RuleSlots::from_pairs(slots), ..kept };
            opened.journal.keep(&kept).unwrap();
            assert!(std::fs::read(&file).unwrap().starts_with(b"rampart node state 2\n"));
            assert_eq!(Journal::open(directory.path(), node).state, Some(kept));
        }
    }

    #[test]
    fn a_damaged_file_of_version_1_is_set_aside() {
        let (bytes, _) = read("app1");
        for at in (0..bytes.len()).step_by(7) {
            let directory = tempfile::tempdir().unwrap();
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            std::fs::write(directory.path().join(state::FILE), &flipped).unwrap();
            let opened = Journal::open(directory.path(), NodeId(9));
            assert!(opened.state.is_none() && opened.error.is_some(), "byte {at}");
        }
    }
}
