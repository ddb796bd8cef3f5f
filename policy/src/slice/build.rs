//! From the matrix to one node's slice.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use ipnet::IpNet;

use super::{Local, Map, Peer, Slice, SliceRule};
use crate::matrix::{Cell, Cross, Matrix, Place};
use crate::network::Network;
use crate::object::id::{CidrId, ClassId, NodeId, Revision, RuleId};
use crate::object::node::{Node, NodeState};

/// Index of a class of the slice that has no id yet.
type Draft = usize;

/// The cells of the classes that the node stands for.
type Crosses = BTreeMap<ClassId, Cross>;

/// See [`Matrix::slice`].
pub(crate) fn build(
    matrix: &Matrix,
    network: &Network,
    revision: Revision,
    node: NodeId,
    previous: Option<&Slice>,
) -> Option<Slice> {
    let node = network.nodes().get(&node).filter(|node| node.state == NodeState::Active)?;
    let own = matrix.stands.classes_of(node.id);
    let crosses: Crosses = own.iter().map(|&(class, _)| (class, matrix.cross(class))).collect();
    let drafts = merge(matrix, &own, &crosses);
    let prefixes = outermost(matrix, &drafts);
    let ids = number(&prefixes, previous);
    let cells = cells(matrix, &own, &crosses, |place| ids[drafts[place]]);
    let cidrs: BTreeSet<CidrId> = prefixes.iter().map(|&(_, _, cidr)| cidr).collect();
    let named = |cidr: CidrId| Some((cidr, network.cidrs().get(&cidr)?.name.clone()));
    Some(Slice {
        revision,
        local: local(matrix, network, node).into(),
        peers: peers(matrix, network, node.id, &crosses),
        cidrs: cidrs.into_iter().filter_map(named).collect(),
        rules: rules(network, &cells),
        prefixes: prefixes.into_iter().map(|(prefix, draft, cidr)| (prefix, (ids[draft], cidr))).collect(),
        cells,
        kept: Default::default(),
    })
}

/// Merges the classes that no cell of the node tells apart: the class of the slice for each place of the matrix.
///
/// A class of the slice never spans two cidrs, although two may look alike from here: else the first rule that tells them
/// apart would move all their prefixes to other classes, and the node would hear of each.
fn merge(matrix: &Matrix, own: &BTreeSet<Place>, crosses: &Crosses) -> Vec<Draft> {
    /// What must be equal for two places in one cidr to share a class.
    #[derive(PartialEq, Eq, PartialOrd, Ord)]
    enum Key<'a> {
        /// The number of a distinct cross.
        Own(usize),
        /// (own class, whether it is the source, number of a distinct cell).
        Other(&'a [(ClassId, bool, usize)]),
    }
    let mut numbers: HashMap<&Cell, usize> = HashMap::new();
    let mut seen: BTreeMap<ClassId, Vec<(ClassId, bool, usize)>> = BTreeMap::new();
    for (&own, cross) in crosses {
        for (line, is_source) in [(&cross.row, true), (&cross.column, false)] {
            for (&other, cell) in line {
                let next = numbers.len();
                let number = *numbers.entry(cell.as_ref()).or_insert(next);
                seen.entry(other).or_default().push((own, is_source, number));
            }
        }
    }
    let alike = |class: ClassId| crosses.values().position(|cross| Some(cross) == crosses.get(&class));
    let mut known: BTreeMap<(CidrId, Key<'_>), Draft> = BTreeMap::new();
    let mut draft = |place: &Place| {
        let (class, cidr) = *place;
        let key = match own.contains(place).then(|| alike(class)).flatten() {
            Some(cross) => Key::Own(cross),
            None => Key::Other(seen.get(&class).map_or(&[], Vec::as_slice)),
        };
        let next = known.len();
        *known.entry((cidr, key)).or_insert(next)
    };
    matrix.places().iter().map(&mut draft).collect()
}

/// The prefixes that say something else than the one around them, in order.
fn outermost(matrix: &Matrix, drafts: &[Draft]) -> Vec<(IpNet, Draft, CidrId)> {
    let mut kept: Vec<(IpNet, Draft, CidrId)> = Vec::new();
    let mut around: Vec<(IpNet, Draft)> = Vec::new();
    for &(prefix, place) in matrix.placed() {
        let (draft, (_, cidr)) = (drafts[place], matrix.places()[place]);
        while around.last().is_some_and(|(outer, _)| !outer.contains(&prefix)) {
            around.pop();
        }
        // Equal classes are of equal cidrs.
        if around.last().is_none_or(|&(_, outer)| outer != draft) {
            kept.push((prefix, draft, cidr));
            around.push((prefix, draft));
        }
    }
    kept
}

/// Gives each class an id: that of the class which had most of its prefixes before, or one that was in no use.
fn number(prefixes: &[(IpNet, Draft, CidrId)], previous: Option<&Slice>) -> Vec<ClassId> {
    let drafts = prefixes.iter().map(|&(_, draft, _)| draft + 1).max().unwrap_or(0);
    let mut ids: Vec<Option<ClassId>> = vec![None; drafts];
    let mut used: BTreeSet<ClassId> = BTreeSet::new();
    if let Some(previous) = previous {
        used = previous.classes();
        let mut shared: HashMap<(Draft, ClassId), usize> = HashMap::new();
        for (prefix, draft, _) in prefixes {
            if let Some(&(class, _)) = previous.prefixes.get(prefix) {
                *shared.entry((*draft, class)).or_default() += 1;
            }
        }
        let mut claims: Vec<_> = shared.into_iter().collect();
        claims.sort_unstable_by_key(|&((draft, class), count)| (std::cmp::Reverse(count), draft, class));
        let mut given = HashSet::new();
        for ((draft, class), _) in claims {
            if ids[draft].is_none() && given.insert(class) {
                ids[draft] = Some(class);
            }
        }
    }
    let mut fresh = (1..).map(ClassId).filter(|id| !used.contains(id));
    ids.into_iter().map(|id| id.or_else(|| fresh.next()).unwrap_or_default()).collect()
}

/// The cells of the slice; `id` gives the class of the slice for the index of a place.
fn cells(
    matrix: &Matrix,
    own: &BTreeSet<Place>,
    crosses: &Crosses,
    id: impl Fn(usize) -> ClassId,
) -> Map<(ClassId, ClassId), Cell> {
    let places = matrix.places();
    let ids_of = |class: ClassId| {
        let first = places.partition_point(|place| place.0 < class);
        let last = places.partition_point(|place| place.0 <= class);
        (first..last).map(&id).collect::<BTreeSet<_>>()
    };
    let mut cells = Map::new();
    for place in own {
        let (Some(cross), Ok(index)) = (crosses.get(&place.0), places.binary_search(place)) else { continue };
        let own = id(index);
        for (line, is_source) in [(&cross.row, true), (&cross.column, false)] {
            for (&class, cell) in line {
                for other in ids_of(class) {
                    let pair = if is_source { (own, other) } else { (other, own) };
                    cells.entry(pair).or_insert_with(|| cell.as_ref().clone());
                }
            }
        }
    }
    cells
}

fn local(matrix: &Matrix, network: &Network, node: &Node) -> Local {
    Local {
        node: node.id,
        name: node.name.clone(),
        network: network.name().clone(),
        addresses: node.addresses,
        roots: *network.roots(),
        external_routes: matrix.stands.elsewhere(node.id).collect(),
        gateway_for: matrix.stands.behind(node.id).collect(),
    }
}

/// The nodes that stand for a class with which some service is allowed, in either direction.
fn peers(matrix: &Matrix, network: &Network, node: NodeId, crosses: &Crosses) -> Map<NodeId, Peer> {
    let cells = crosses.values().flat_map(|cross| cross.row.iter().chain(&cross.column));
    let open: BTreeSet<ClassId> = cells.filter(|(_, cell)| cell.allows_any()).map(|(class, _)| *class).collect();
    let nodes: BTreeSet<NodeId> = open.into_iter().flat_map(|class| matrix.stands.nodes_in(class)).collect();
    let others = nodes.into_iter().filter(|other| *other != node);
    others.filter_map(|other| Some((other, matrix.stands.peer(network, other)?))).collect()
}

fn rules(network: &Network, cells: &Map<(ClassId, ClassId), Cell>) -> Map<RuleId, SliceRule> {
    let distinct: BTreeSet<&Cell> = cells.values().collect();
    let ids: BTreeSet<RuleId> =
        distinct.into_iter().flat_map(Cell::verdicts).filter_map(|verdict| verdict.rule).collect();
    let rule = |id| {
        let rule = network.rules().get(&id)?;
        Some((id, SliceRule { name: rule.name.clone(), action: rule.action, log: rule.log }))
    };
    ids.into_iter().filter_map(rule).collect()
}
