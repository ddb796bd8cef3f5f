//! Classes: sets of addresses that the policy cannot tell apart.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::compile::{Used, index};
use crate::object::id::{CidrId, ClassId};
use crate::object::prefix::longest_match;

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
    /// Every pair of a class and a cidr that a prefix has, sorted.
    places: Vec<Place>,
    /// The prefixes in order, each with the index of its place.
    placed: Vec<(IpNet, usize)>,
    /// From a cidr upwards as far as the lineage default reaches, itself included; and downwards.
    above: BTreeMap<CidrId, Vec<CidrId>>,
    below: BTreeMap<CidrId, Vec<CidrId>>,
    by_lineage: BTreeMap<CidrId, Vec<ClassId>>,
    by_selector: Vec<Vec<ClassId>>,
}

/// A class as far as it is met in one cidr.
pub(crate) type Place = (ClassId, CidrId);

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

    /// Derives what is asked for often, once all classes are there. `above` is as the field says.
    pub(super) fn seal(&mut self, above: BTreeMap<CidrId, Vec<CidrId>>, selectors: usize) {
        self.places = self.prefixes.values().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let place = |found: &Place| self.places.partition_point(|place| place < found);
        self.placed = self.prefixes.iter().map(|(&prefix, found)| (prefix, place(found))).collect();
        for (&lower, path) in &above {
            path.iter().for_each(|&upper| self.below.entry(upper).or_default().push(lower));
        }
        self.above = above;
        self.by_selector = vec![Vec::new(); selectors];
        for (position, class) in self.classes.iter().enumerate() {
            let id = ClassId(index(position + 1));
            if let Some(cidr) = class.lineage {
                self.by_lineage.entry(cidr).or_default().push(id);
            }
            class.selected.iter().for_each(|&used| self.by_selector[used as usize].push(id));
        }
    }

    pub(super) fn places(&self) -> &[Place] {
        &self.places
    }

    pub(super) fn placed(&self) -> &[(IpNet, usize)] {
        &self.placed
    }

    /// The classes that a selector selects.
    pub(super) fn selected_by(&self, used: Used) -> &[ClassId] {
        self.by_selector.get(used as usize).map_or(&[], Vec::as_slice)
    }

    /// Whether the lineage default lets one reach the other; it is symmetric.
    pub(super) fn related(&self, a: &Class, b: &Class) -> bool {
        let above = |lower, upper| self.above.get(&lower).is_some_and(|path| path.contains(&upper));
        match (a.lineage, b.lineage) {
            (Some(a), Some(b)) => above(a, b) || above(b, a),
            _ => false,
        }
    }

    /// The classes that [`Classes::related`] relates to this one.
    pub(super) fn related_to(&self, class: &Class) -> impl Iterator<Item = ClassId> + '_ {
        let cidr = class.lineage;
        let paths = [&self.above, &self.below].into_iter().filter_map(move |paths| paths.get(&cidr?));
        paths.flatten().filter_map(|cidr| self.by_lineage.get(cidr)).flatten().copied()
    }
}
