//! What is counted of a slice's prefixes, cidrs and gateways: classes, and the room that the address table takes.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::room::Held;
use super::size::Size;
use super::{Slice, Touched};
use crate::Map;
use crate::count::{less, more};
use crate::matrix::{Room, Strides};
use crate::object::id::{CidrId, ClassId, NodeId};
use crate::object::prefix::check_prefix;

/// How often each class, cidr and kind of addresses occurs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AddressTally {
    /// Those that addresses have, and those that no address but the node's own would have.
    pub(super) classes: Map<ClassId, usize>,
    /// Of the addresses that the node stands for.
    pub(super) own: Map<ClassId, usize>,
    cidrs: Map<CidrId, usize>,
    kinds: Map<(ClassId, CidrId), usize>,
    strides: Strides,
    holders: Map<IpNet, Option<NodeId>>,
    held: Map<Held, usize>,
}

impl AddressTally {
    pub(super) fn of(slice: &Slice) -> Self {
        let mut places = Self { holders: slice.gateway_holders(), ..Self::default() };
        slice.held_prefixes().for_each(|net| places.strides.add(net));
        slice.prefixes.iter().for_each(|(net, place)| places.add(slice, *net, *place));
        for (class, _) in slice.marked.values() {
            more(&mut places.classes, class);
        }
        for id in slice.cidrs.keys() {
            more(&mut places.classes, &ClassId::of_cidr(*id));
        }
        for class in own_addresses(slice) {
            more(&mut places.own, &class);
        }
        if !places.holders.is_empty() {
            let nets: BTreeSet<IpNet> = slice.prefixes.keys().chain(places.holders.keys()).copied().collect();
            let held: Vec<Held> = nets.into_iter().filter_map(|net| slice.held(&places.holders, net)).collect();
            for held in &held {
                more(&mut places.held, held);
            }
        }
        places
    }

    /// Those of `new`, which differs from `old`, whose places these are, where it is touched.
    pub(super) fn followed(&self, old: &Slice, new: &Slice, touched: &Touched) -> Self {
        if touched.local || touched.gateways {
            return Self::of(new);
        }
        let mut places = self.clone();
        for net in &touched.prefixes {
            if let Some(place) = old.prefixes.get(net) {
                places.remove(old, *net, *place);
            }
            if let Some(place) = new.prefixes.get(net) {
                places.add(new, *net, *place);
            }
        }
        for net in &touched.marked {
            if let Some((class, _)) = old.marked.get(net) {
                less(&mut places.classes, class);
            }
            if let Some((class, _)) = new.marked.get(net) {
                more(&mut places.classes, class);
            }
        }
        for id in &touched.cidrs {
            let plain = ClassId::of_cidr(*id);
            if old.cidrs.contains_key(id) {
                less(&mut places.classes, &plain);
            }
            if new.cidrs.contains_key(id) {
                more(&mut places.classes, &plain);
            }
        }
        if !touched.prefixes.is_empty() {
            for class in own_addresses(old) {
                less(&mut places.own, &class);
            }
            for class in own_addresses(new) {
                more(&mut places.own, &class);
            }
        }
        for net in places.held_about(touched) {
            let is_there = |slice: &Slice| slice.prefixes.contains_key(&net) || self.holders.contains_key(&net);
            let held = |slice: &Slice| is_there(slice).then(|| slice.held(&self.holders, net)).flatten();
            if let Some(held) = held(old) {
                less(&mut places.held, &held);
            }
            if let Some(held) = held(new) {
                more(&mut places.held, &held);
            }
        }
        places
    }

    /// Whether the prefixes and cidrs of `new` that differ are sound for certain, and no cell is left of a class that went.
    pub(super) fn prove(&self, before: &Self, old: &Slice, new: &Slice, touched: &Touched) -> bool {
        let prefix = |net: &IpNet| match new.prefixes.get(net) {
            Some((class, cidr)) => class.0 != 0 && check_prefix(*net).is_ok() && new.cidrs.contains_key(cidr),
            None => true,
        };
        let marked = |net: &IpNet| new.marked.get(net).is_none_or(|(class, _)| class.0 != 0 && class.is_marked());
        let cidr = |id: &CidrId| match new.cidrs.contains_key(id) {
            true => id.0 != 0 && ClassId::of_cidr(*id).0 != 0,
            false => !self.cidrs.contains_key(id),
        };
        // Every cell has an end among the own classes.
        let is_left = |gone: ClassId| {
            let cells = &new.cells;
            self.own.keys().any(|own| cells.contains_key(&(*own, gone)) || cells.contains_key(&(gone, *own)))
        };
        touched.prefixes.iter().all(prefix)
            && touched.marked.iter().all(marked)
            && touched.cidrs.iter().all(cidr)
            && (self.own.ptr_eq(&before.own) || self.own.keys().eq(before.own.keys()))
            && !classes_before(old, touched).any(|class| !self.classes.contains_key(&class) && is_left(class))
    }

    pub(super) fn room(&self) -> Room {
        self.strides.room()
    }

    pub(super) fn leaves(&self) -> usize {
        Size::leaves(self.kinds.len(), self.held.len())
    }

    fn add(&mut self, slice: &Slice, net: IpNet, place: (ClassId, CidrId)) {
        more(&mut self.classes, &place.0);
        more(&mut self.cidrs, &place.1);
        more(&mut self.kinds, &place);
        self.strides.add(net);
        if slice.local.is_gateway_of(net) {
            more(&mut self.own, &place.0);
        }
    }

    fn remove(&mut self, slice: &Slice, net: IpNet, place: (ClassId, CidrId)) {
        less(&mut self.classes, &place.0);
        less(&mut self.cidrs, &place.1);
        less(&mut self.kinds, &place);
        self.strides.remove(net);
        if slice.local.is_gateway_of(net) {
            less(&mut self.own, &place.0);
        }
    }

    /// Where what a gateway holds may be another kind of addresses: at the prefixes that differ, and at what gateways hold
    /// inside them.
    fn held_about(&self, touched: &Touched) -> BTreeSet<IpNet> {
        if self.holders.is_empty() {
            return BTreeSet::new();
        }
        let inside = |net: &IpNet| self.holders.range(*net..=IpNet::from(net.broadcast())).map(|(net, _)| *net);
        touched.prefixes.iter().flat_map(|net| inside(net).chain([*net])).collect()
    }
}

fn own_addresses(slice: &Slice) -> impl Iterator<Item = ClassId> {
    slice.local.addresses.iter().filter_map(|address| slice.lookup(address)).map(|(class, _)| class)
}

/// The classes that what is touched had.
fn classes_before(old: &Slice, touched: &Touched) -> impl Iterator<Item = ClassId> {
    let prefixes = touched.prefixes.iter().filter_map(|net| old.prefixes.get(net));
    let marked = touched.marked.iter().filter_map(|net| old.marked.get(net));
    let plain = touched.cidrs.iter().map(|id| ClassId::of_cidr(*id));
    prefixes.chain(marked).map(|(class, _)| *class).chain(plain)
}
