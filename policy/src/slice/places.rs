//! What follows from the cidrs, the marked prefixes and the node's own addresses: what each prefix is, and which external
//! prefixes are routed to others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;

use super::{Local, Slice};
use crate::object::id::{CidrId, ClassId};
use crate::object::prefix::{longest_above, longest_match};

impl Slice {
    /// Brings `prefixes` and the routes up to date with a slice whose own addresses, marked prefixes `nets` and cidrs `ids`
    /// may be others than they were.
    pub(super) fn follow_places(&mut self, before: &Slice, nets: &BTreeSet<IpNet>, ids: &BTreeSet<CidrId>) {
        let is_first = before.prefixes.is_empty();
        let local = !is_first && Arc::ptr_eq(&before.local, &self.local);
        if local && nets.is_empty() && ids.is_empty() {
            return;
        }
        let own = |local: &Local| local.addresses.iter().map(IpNet::from).collect::<Vec<_>>();
        let mut touched: BTreeSet<IpNet> = nets.clone();
        touched.extend(own(&before.local));
        for id in ids {
            let cidrs = [&before.cidrs, &self.cidrs].map(|cidrs| cidrs.get(id));
            touched.extend(cidrs.into_iter().flatten().flat_map(|cidr| cidr.prefixes.iter()));
        }
        // Of two cidrs that claim one prefix the first has it.
        let cidrs = ids.iter().rev().filter_map(|id| Some((*id, self.cidrs.get(id)?)));
        let claimed: BTreeMap<IpNet, CidrId> =
            cidrs.flat_map(|(id, cidr)| cidr.prefixes.iter().map(move |net| (net, id))).collect();
        for net in touched {
            match self.place_of(net, &claimed) {
                Some(place) => drop(self.prefixes.insert(net, place)),
                None => drop(self.prefixes.remove(&net)),
            }
        }
        for net in own(&self.local) {
            let class = match net {
                IpNet::V6(_) if self.local.is_split => ClassId::OWN_V6,
                IpNet::V4(_) | IpNet::V6(_) => ClassId::OWN,
            };
            if let Some((_, &(_, cidr))) = longest_match(&self.prefixes, net) {
                self.prefixes.insert(net, (class, cidr));
            }
        }
        let is_routed = |slice: &Slice, id| slice.cidrs.get(id).is_some_and(|cidr| cidr.is_routed);
        if !local || ids.iter().any(|id| is_routed(before, id) || is_routed(self, id)) {
            self.follow_routes();
        }
    }

    /// What a prefix is that is not looked at as one of the node's own addresses. `claimed`: the prefixes of the cidrs that
    /// may have others than they had.
    fn place_of(&self, net: IpNet, claimed: &BTreeMap<IpNet, CidrId>) -> Option<(ClassId, CidrId)> {
        if let Some(place) = self.marked.get(&net) {
            return Some(*place);
        }
        let was_in = || longest_match(&self.prefixes, net).map(|(_, (_, cidr))| *cidr);
        let has = |id: &CidrId| self.cidrs.get(id).is_some_and(|cidr| cidr.prefixes.iter().any(|prefix| prefix == net));
        let cidr = claimed.get(&net).copied().or_else(|| was_in().filter(has))?;
        Some((ClassId::of_cidr(cidr), cidr))
    }

    fn follow_routes(&mut self) {
        let routed = self.cidrs.values().filter(|cidr| cidr.is_routed).flat_map(|cidr| cidr.prefixes.iter());
        let external_routes = routed.filter(|net| !self.local.gateway_for.contains(net)).collect();
        if self.local.external_routes != external_routes {
            self.local = Local { external_routes, ..(*self.local).clone() }.into();
        }
    }

    /// Whether the places are those that follow from the rest.
    pub(super) fn is_placed(&self) -> bool {
        // Of two cidrs that claim one prefix the first has it.
        let cidrs = self.cidrs.iter().rev();
        let claimed: BTreeMap<IpNet, CidrId> =
            cidrs.flat_map(|(id, cidr)| cidr.prefixes.iter().map(|net| (net, *id))).collect();
        let whole = |net: &IpNet| {
            let of_cidr = claimed.get(net).map(|id| (ClassId::of_cidr(*id), *id));
            self.marked.get(net).copied().or(of_cidr)
        };
        let is_own = |net: &IpNet| self.local.addresses.iter().any(|own| IpNet::from(own) == *net);
        self.prefixes.iter().all(|(net, place)| {
            if is_own(net) {
                let around = whole(net).or_else(|| longest_above(&self.prefixes, *net).map(|(_, place)| *place));
                place.0.is_own() && around.is_some_and(|(_, cidr)| cidr == place.1)
            } else {
                whole(net) == Some(*place)
            }
        })
    }
}
