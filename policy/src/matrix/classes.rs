//! Classes: sets of addresses that the policy cannot tell apart.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::compile::{Used, index};
use crate::id::{CidrId, ClassId};
use crate::prefix::longest_match;

/// One class.
#[derive(Debug)]
pub(super) struct Class {
    /// The cidr, where the lineage default applies to it.
    pub(super) lineage: Option<CidrId>,
    /// The selectors that select it, sorted.
    pub(super) selected: Vec<Used>,
}

/// All classes, and which addresses have them.
#[derive(Debug, Default)]
pub(super) struct Classes {
    /// By id, from 1.
    classes: Vec<Class>,
    pub(super) prefixes: BTreeMap<IpNet, (ClassId, CidrId)>,
    /// From a cidr upwards as far as the lineage default reaches.
    pub(super) lineages: BTreeMap<CidrId, Vec<CidrId>>,
}

impl Classes {
    pub(super) fn add(&mut self, class: Class) -> ClassId {
        self.classes.push(class);
        ClassId(index(self.classes.len()))
    }

    pub(super) fn place(&mut self, prefix: IpNet, class: ClassId, cidr: CidrId) {
        self.prefixes.insert(prefix, (class, cidr));
    }

    pub(super) fn len(&self) -> usize {
        self.classes.len()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = ClassId> + use<> {
        (1..=index(self.classes.len())).map(ClassId)
    }

    pub(super) fn get(&self, id: ClassId) -> Option<&Class> {
        self.classes.get((id.0 as usize).checked_sub(1)?)
    }

    /// What an address or a prefix lies in.
    pub(super) fn find(&self, prefix: IpNet) -> Option<(ClassId, CidrId)> {
        longest_match(&self.prefixes, prefix).map(|(_, &found)| found)
    }

    /// Whether the lineage default lets one reach the other; it is symmetric.
    pub(super) fn related(&self, a: &Class, b: &Class) -> bool {
        let above = |lower, upper| self.lineages.get(&lower).is_some_and(|path: &Vec<CidrId>| path.contains(&upper));
        match (a.lineage, b.lineage) {
            (Some(a), Some(b)) => above(a, b) || above(b, a),
            _ => false,
        }
    }
}
