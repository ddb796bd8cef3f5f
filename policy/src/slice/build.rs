//! From the matrix to one node's slice.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use ipnet::IpNet;

use super::{Local, Peer, Slice, SliceRule};
use crate::id::{CidrId, ClassId, NodeId, Revision, RuleId};
use crate::matrix::{Cell, Cross, Matrix};
use crate::network::Network;
use crate::node::{Node, NodeState};

/// A class of the matrix as far as it is met in one cidr. A class of the slice never spans two cidrs, although two may
/// look alike from here: else the first rule that tells them apart would move all their prefixes to other classes, and
/// the node would hear of each.
type Place = (ClassId, CidrId);

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
    let cells = cells(&own, &crosses, &drafts, &ids);
    let named = |cidr: CidrId| Some((cidr, network.cidrs().get(&cidr)?.name.clone()));
    Some(Slice {
        revision,
        local: local(matrix, network, node),
        peers: peers(matrix, network, node.id, &crosses),
        cidrs: prefixes.values().filter_map(|&(_, cidr)| named(cidr)).collect(),
        rules: rules(network, &cells),
        prefixes: prefixes.into_iter().map(|(prefix, (draft, cidr))| (prefix, (ids[draft], cidr))).collect(),
        cells,
    })
}

/// Merges the classes that no cell of the node tells apart: each place with its class of the slice.
fn merge(matrix: &Matrix, own: &BTreeSet<Place>, crosses: &Crosses) -> BTreeMap<Place, Draft> {
    /// What must be equal for two places in one cidr to share a class.
    #[derive(PartialEq, Eq, Hash)]
    enum Key {
        /// The number of a distinct cross.
        Own(usize),
        /// (own class, whether it is the source, number of a distinct cell).
        Other(Vec<(ClassId, bool, usize)>),
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
    let places: BTreeSet<Place> = matrix.prefixes().values().copied().collect();
    let mut known: HashMap<(CidrId, Key), Draft> = HashMap::new();
    let mut drafts = BTreeMap::new();
    for place @ (class, cidr) in places {
        let key = match alike(class).filter(|_| own.contains(&place)) {
            Some(cross) => Key::Own(cross),
            None => Key::Other(seen.get(&class).cloned().unwrap_or_default()),
        };
        let next = known.len();
        drafts.insert(place, *known.entry((cidr, key)).or_insert(next));
    }
    drafts
}

/// The prefixes that say something else than the one around them.
fn outermost(matrix: &Matrix, drafts: &BTreeMap<Place, Draft>) -> BTreeMap<IpNet, (Draft, CidrId)> {
    let mut kept: Vec<(IpNet, (Draft, CidrId))> = Vec::new();
    let mut around: Vec<(IpNet, (Draft, CidrId))> = Vec::new();
    for (&prefix, place) in matrix.prefixes() {
        let Some(&draft) = drafts.get(place) else { continue };
        while around.last().is_some_and(|(outer, _)| !outer.contains(&prefix)) {
            around.pop();
        }
        let entry = (prefix, (draft, place.1));
        if around.last().is_none_or(|(_, found)| *found != entry.1) {
            kept.push(entry);
            around.push(entry);
        }
    }
    kept.into_iter().collect()
}

/// Gives each class an id: that of the class which had most of its prefixes before, or one that was in no use.
fn number(prefixes: &BTreeMap<IpNet, (Draft, CidrId)>, previous: Option<&Slice>) -> Vec<ClassId> {
    let drafts = prefixes.values().map(|&(draft, _)| draft + 1).max().unwrap_or(0);
    let mut ids: Vec<Option<ClassId>> = vec![None; drafts];
    let mut used: BTreeSet<ClassId> = BTreeSet::new();
    if let Some(previous) = previous {
        used = previous.classes();
        let mut shared: BTreeMap<(Draft, ClassId), usize> = BTreeMap::new();
        for (prefix, &(draft, _)) in prefixes {
            if let Some(&(class, _)) = previous.prefixes.get(prefix) {
                *shared.entry((draft, class)).or_default() += 1;
            }
        }
        let mut claims: Vec<_> = shared.into_iter().collect();
        claims.sort_by_key(|&((draft, class), count)| (std::cmp::Reverse(count), draft, class));
        let mut given = BTreeSet::new();
        for ((draft, class), _) in claims {
            if ids[draft].is_none() && given.insert(class) {
                ids[draft] = Some(class);
            }
        }
    }
    let mut fresh = (1..).map(ClassId).filter(|id| !used.contains(id));
    ids.into_iter().map(|id| id.or_else(|| fresh.next()).unwrap_or_default()).collect()
}

fn cells(
    own: &BTreeSet<Place>,
    crosses: &Crosses,
    drafts: &BTreeMap<Place, Draft>,
    ids: &[ClassId],
) -> BTreeMap<(ClassId, ClassId), Cell> {
    let mut of_class: BTreeMap<ClassId, BTreeSet<ClassId>> = BTreeMap::new();
    for ((class, _), draft) in drafts {
        of_class.entry(*class).or_default().insert(ids[*draft]);
    }
    let others = |line: &BTreeMap<ClassId, Arc<Cell>>| -> Vec<(ClassId, Arc<Cell>)> {
        let of_class = &of_class;
        let spread = |(class, cell): (&ClassId, &Arc<Cell>)| {
            let cell = Arc::clone(cell);
            of_class.get(class).into_iter().flatten().map(move |id| (*id, Arc::clone(&cell))).collect::<Vec<_>>()
        };
        line.iter().flat_map(spread).collect()
    };
    let mut cells = BTreeMap::new();
    for place in own {
        let (Some(cross), Some(&draft)) = (crosses.get(&place.0), drafts.get(place)) else { continue };
        for (other, cell) in others(&cross.row) {
            cells.entry((ids[draft], other)).or_insert_with(|| cell.as_ref().clone());
        }
        for (other, cell) in others(&cross.column) {
            cells.entry((other, ids[draft])).or_insert_with(|| cell.as_ref().clone());
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
fn peers(matrix: &Matrix, network: &Network, node: NodeId, crosses: &Crosses) -> BTreeMap<NodeId, Peer> {
    let cells = crosses.values().flat_map(|cross| cross.row.iter().chain(&cross.column));
    let open: BTreeSet<ClassId> = cells.filter(|(_, cell)| cell.allows_any()).map(|(class, _)| *class).collect();
    let nodes: BTreeSet<NodeId> = open.into_iter().flat_map(|class| matrix.stands.nodes_in(class)).collect();
    let others = nodes.into_iter().filter(|other| *other != node);
    others.filter_map(|other| Some((other, matrix.stands.peer(network, other)?))).collect()
}

fn rules(network: &Network, cells: &BTreeMap<(ClassId, ClassId), Cell>) -> BTreeMap<RuleId, SliceRule> {
    let distinct: BTreeSet<&Cell> = cells.values().collect();
    let ids: BTreeSet<RuleId> =
        distinct.into_iter().flat_map(Cell::verdicts).filter_map(|verdict| verdict.rule).collect();
    let rule = |id| {
        let rule = network.rules().get(&id)?;
        Some((id, SliceRule { name: rule.name.clone(), action: rule.action, log: rule.log }))
    };
    ids.into_iter().filter_map(rule).collect()
}
