//! From the objects to classes: a walk over all prefixes of interest, outermost first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::classes::{Class, Classes};
use super::table::RuleTable;
use crate::limit::{self, Bounded, LimitError};
use crate::network::{DefaultPolicy, Network};
use crate::object::id::{CidrId, ClassId};
use crate::object::selector::Selector;

/// Index of a selector that some rule uses.
pub(super) type Used = u32;

/// What a prefix of interest says of the addresses in it, beside what those around it say.
#[derive(Default)]
struct Mark {
    cidr: Option<CidrId>,
    selected: Vec<Used>,
}

/// What holds for the addresses directly in a prefix.
struct Region {
    prefix: IpNet,
    cidr: Option<CidrId>,
    /// By literals and nodes, the enclosing ones included; sorted.
    selected: Vec<Used>,
}

/// Partitions the addresses of all cidrs into classes that no rule and no default can tell apart.
pub(super) fn partition(network: &Network, rules: &RuleTable) -> Result<Classes, LimitError> {
    let lineages = Lineages::of(network, rules);
    let marks = marks(network, rules);
    Bounded::Prefixes.check(marks.len(), limit::MAX_PREFIXES)?;
    let mut classes = Classes::default();
    let mut known: HashMap<(Option<CidrId>, Vec<Used>), ClassId> = HashMap::new();
    let mut around: Vec<Region> = Vec::new();
    for (prefix, mark) in marks {
        while around.last().is_some_and(|outer| !outer.prefix.contains(&prefix)) {
            around.pop();
        }
        let outer = around.last();
        let mut selected = outer.map_or_else(Vec::new, |outer| outer.selected.clone());
        selected.extend(mark.selected);
        selected.sort_unstable();
        selected.dedup();
        let cidr = mark.cidr.or(outer.and_then(|outer| outer.cidr));
        if let Some(cidr) = cidr {
            let mut all = selected.clone();
            all.extend(&lineages.selected[&cidr]);
            all.sort_unstable();
            all.dedup();
            let told_apart = lineages.told_apart(cidr);
            let id = *known.entry((told_apart, all)).or_insert_with_key(|(cidr, selected)| {
                classes.add(Class { lineage: *cidr, selected: selected.clone() })
            });
            classes.place(prefix, id, cidr);
        }
        around.push(Region { prefix, cidr, selected });
    }
    Bounded::Classes.check(classes.len(), limit::MAX_CLASSES)?;
    classes.seal(lineages.paths, rules.selectors.len());
    Ok(classes)
}

/// What follows from an address's cidr alone.
struct Lineages {
    /// The selectors that select all of a cidr: `any`, and those that name it or an ancestor.
    selected: BTreeMap<CidrId, Vec<Used>>,
    /// With the lineage default: from each cidr that is not isolated to the top or to below the first isolated one.
    paths: BTreeMap<CidrId, Vec<CidrId>>,
}

impl Lineages {
    fn of(network: &Network, rules: &RuleTable) -> Self {
        let mut named: BTreeMap<CidrId, Vec<Used>> = BTreeMap::new();
        let mut everywhere = Vec::new();
        for (used, selector) in rules.selectors.iter().enumerate() {
            let used = index(used);
            match selector {
                Selector::Any => everywhere.push(used),
                Selector::Cidr(id) => named.entry(*id).or_default().push(used),
                Selector::Group(id) => {
                    for cidr in network.groups().get(id).into_iter().flat_map(|group| &group.cidrs) {
                        named.entry(*cidr).or_default().push(used);
                    }
                }
                Selector::Node(_) | Selector::Prefix(_) => {}
            }
        }
        let (mut selected, mut paths) = (BTreeMap::new(), BTreeMap::new());
        for &cidr in network.cidrs().keys() {
            let lineage = network.lineage_of(cidr);
            let mut of_cidr = everywhere.clone();
            of_cidr.extend(lineage.iter().filter_map(|cidr| named.get(cidr)).flatten());
            selected.insert(cidr, of_cidr);
            if network.default() == DefaultPolicy::Lineage {
                let open = lineage.into_iter().take_while(|cidr| !network.cidrs()[cidr].isolated);
                paths.insert(cidr, open.collect::<Vec<_>>());
            }
        }
        paths.retain(|_, path| !path.is_empty());
        Self { selected, paths }
    }

    /// The cidr, if the default treats it otherwise than all others.
    fn told_apart(&self, cidr: CidrId) -> Option<CidrId> {
        self.paths.contains_key(&cidr).then_some(cidr)
    }
}

/// All prefixes of interest. Canonical prefixes order so that each comes after those that contain it.
fn marks(network: &Network, rules: &RuleTable) -> BTreeMap<IpNet, Mark> {
    let mut marks: BTreeMap<IpNet, Mark> = BTreeMap::new();
    for cidr in network.cidrs().values() {
        for prefix in cidr.prefixes.iter() {
            marks.entry(prefix).or_default().cidr = Some(cidr.id);
        }
    }
    for (used, selector) in rules.selectors.iter().enumerate() {
        let used = index(used);
        let prefixes: BTreeSet<IpNet> = match selector {
            Selector::Any | Selector::Cidr(_) => continue,
            Selector::Prefix(prefix) => BTreeSet::from([*prefix]),
            Selector::Node(id) => {
                network.nodes().get(id).into_iter().flat_map(|node| node.addresses.iter()).map(IpNet::from).collect()
            }
            Selector::Group(id) => {
                let members = network.groups().get(id).into_iter().flat_map(|group| &group.nodes);
                let nodes = members.filter_map(|id| network.nodes().get(id));
                nodes.flat_map(|node| node.addresses.iter()).map(IpNet::from).collect()
            }
        };
        for prefix in prefixes {
            marks.entry(prefix).or_default().selected.push(used);
        }
    }
    marks
}

/// The host prefix of an address.
pub(super) fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// Indices fit, as `limit` bounds what is counted.
pub(super) fn index(position: usize) -> u32 {
    u32::try_from(position).unwrap_or(u32::MAX)
}
