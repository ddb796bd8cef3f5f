//! Classes: sets of addresses that the policy cannot tell apart. A class is a cidr and the marks that lie on its addresses;
//! its id follows from the two, so that it is the same after a restart and at another controller.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;

use crate::network::{Marks, Network};
use crate::object::digest::{Digest, RowWriter};
use crate::object::id::{CidrId, ClassId};
use crate::object::prefix::{longest_above, longest_match};
use crate::object::selector::Selector;

/// A set of addresses that no rule and no default can tell apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class {
    /// The deepest cidr that contains the addresses.
    pub cidr: CidrId,
    /// The nodes, groups and literals that some rule names and that lie on the addresses.
    pub(crate) marks: Marks,
}

impl Class {
    /// The class of the addresses of a cidr on which nothing lies.
    pub(crate) fn plain(cidr: CidrId) -> Self {
        Self { cidr, marks: Marks::default() }
    }

    pub fn id(&self) -> ClassId {
        if self.marks.is_empty() {
            return ClassId::of_cidr(self.cidr);
        }
        let digest = Digest::of_row(b'k', |row| {
            row.number(self.cidr.0.into());
            self.marks.iter().for_each(|selector| write(row, selector));
        });
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest.to_bytes()[..8]);
        ClassId(u64::from_be_bytes(bytes) | ClassId::MARKED)
    }

    /// The class with no other marks than these.
    pub(crate) fn with_marks_of(&self, wanted: &BTreeSet<Selector>) -> Self {
        if self.marks.is_subset(wanted) {
            return self.clone();
        }
        let marks: BTreeSet<Selector> = self.marks.intersection(wanted).copied().collect();
        Self { cidr: self.cidr, marks: Arc::new(marks) }
    }

    /// The selectors that some rule has and that select the addresses.
    pub(crate) fn selectors(&self, network: &Network) -> BTreeSet<Selector> {
        let mut selectors: BTreeSet<Selector> = selectors_of(network, self.cidr).into_iter().collect();
        selectors.extend(self.marks.iter());
        selectors
    }
}

fn write(row: &mut RowWriter, selector: &Selector) {
    match selector {
        Selector::Any => row.byte(0),
        Selector::Cidr(id) => {
            row.byte(1);
            row.number(id.0.into());
        }
        Selector::Node(id) => {
            row.byte(2);
            row.number(id.0.into());
        }
        Selector::Group(id) => {
            row.byte(3);
            row.number(id.0.into());
        }
        Selector::Prefix(net) => {
            row.byte(4);
            row.nets([*net].into_iter());
        }
    }
}

/// The selectors that select all of a cidr, whether a rule has them or not: `any`, and those that name it, an ancestor, or
/// a group with one of these.
pub(crate) fn selectors_of(network: &Network, cidr: CidrId) -> Vec<Selector> {
    let mut selectors = vec![Selector::Any];
    for cidr in network.lineage_of(cidr) {
        selectors.push(Selector::Cidr(cidr));
        selectors.extend(network.groups_of_cidr(cidr).map(Selector::Group));
    }
    selectors
}

/// The class of all addresses of a prefix that lie in no longer prefix of interest; none if they lie in no cidr.
pub(crate) fn class_of(network: &Network, prefix: IpNet) -> Option<Class> {
    let (_, cidr) = longest_match(network.prefixes(), prefix)?;
    Some(Class { cidr: *cidr, marks: marks_at(network, prefix) })
}

/// The marks of a prefix and of those around it.
pub(crate) fn marks_at(network: &Network, prefix: IpNet) -> Marks {
    let mut found = longest_match(network.marks(), prefix);
    let Some((_, first)) = found else { return Marks::default() };
    let mut marks = Arc::clone(first);
    while let Some((net, more)) = found {
        if !more.is_subset(&marks) {
            Arc::make_mut(&mut marks).extend(more.iter());
        }
        found = longest_above(network.marks(), net);
    }
    marks
}

/// The prefixes of interest within one, itself included: of cidrs, and marked ones.
pub(crate) fn interest_within(network: &Network, outer: IpNet) -> BTreeSet<IpNet> {
    let last = IpNet::from(outer.broadcast());
    let cidrs = network.prefixes().range(outer..=last).map(|(net, _)| *net);
    cidrs.chain(network.marks().range(outer..=last).map(|(net, _)| *net)).collect()
}

/// The longest prefix of interest around one.
pub(crate) fn interest_around(network: &Network, inner: IpNet) -> Option<IpNet> {
    let cidr = longest_above(network.prefixes(), inner).map(|(net, _)| net);
    let mark = longest_above(network.marks(), inner).map(|(net, _)| net);
    cidr.into_iter().chain(mark).max_by_key(IpNet::prefix_len)
}

/// A cidr and its descendants.
pub(crate) fn within(network: &Network, cidr: CidrId) -> BTreeSet<CidrId> {
    let (mut found, mut waiting) = (BTreeSet::new(), vec![cidr]);
    while let Some(cidr) = waiting.pop() {
        if found.insert(cidr) {
            waiting.extend(network.children_of(cidr));
        }
    }
    found
}

/// The cidrs that the lineage default relates a cidr to; none where it does not apply.
pub(crate) fn related(network: &Network, cidr: CidrId) -> BTreeSet<CidrId> {
    let open = |cidr: &CidrId| network.cidrs().get(cidr).is_some_and(|cidr| !cidr.isolated);
    let mut found: BTreeSet<CidrId> = network.lineage_of(cidr).into_iter().take_while(open).collect();
    let mut waiting = Vec::from_iter(open(&cidr).then_some(cidr));
    while let Some(cidr) = waiting.pop() {
        found.insert(cidr);
        waiting.extend(network.children_of(cidr).into_iter().filter(open));
    }
    found
}
