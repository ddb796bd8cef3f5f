//! Changes of cidrs. The new place is tried, judged by what it moves, and taken back if the judgement is bad.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{ChangeError, Kind, Named, Network, Warning};
use crate::limit::{self, Bounded};
use crate::object::cidr::Cidr;
use crate::object::id::{CidrId, CidrName, NodeId};
use crate::object::prefix::{Prefixes, outermost_below};
use crate::object::selector::{Hint, Selector};

impl Network {
    pub(super) fn add_cidr(
        &mut self,
        name: &CidrName,
        prefixes: Prefixes,
        isolated: bool,
        external: bool,
    ) -> Result<Vec<Warning>, ChangeError> {
        self.check_cidr_name_free(name)?;
        Bounded::Cidrs.check(self.cidrs.len() + 1, limit::MAX_CIDRS)?;
        let (id, next_id) = self.fresh_id()?;
        let cidr = Cidr { id: CidrId(id), name: name.clone(), prefixes, isolated, external };
        let warnings = self.place_cidr(cidr.id, Some(cidr))?;
        self.next_id = next_id;
        Ok(warnings)
    }

    pub(super) fn rename_cidr(&mut self, from: &CidrName, to: &CidrName) -> Result<(), ChangeError> {
        let cidr = self.find_cidr(from)?.clone();
        if from != to {
            self.check_cidr_name_free(to)?;
            self.put_cidr(cidr.id, Some(Cidr { name: to.clone(), ..cidr }));
        }
        Ok(())
    }

    pub(super) fn move_cidr(&mut self, name: &CidrName, prefixes: Prefixes) -> Result<Vec<Warning>, ChangeError> {
        let cidr = self.find_cidr(name)?.clone();
        self.place_cidr(cidr.id, Some(Cidr { prefixes, ..cidr }))
    }

    pub(super) fn set_cidr(&mut self, name: &CidrName, isolated: bool) -> Result<(), ChangeError> {
        let cidr = self.find_cidr(name)?.clone();
        self.put_cidr(cidr.id, Some(Cidr { isolated, ..cidr }));
        Ok(())
    }

    pub(super) fn delete_cidr(&mut self, name: &CidrName) -> Result<(), ChangeError> {
        let id = self.find_cidr(name)?.id;
        let prefixes = self.cidrs[&id].prefixes;
        let inside: BTreeSet<NodeId> =
            self.nodes_in(prefixes.iter()).into_iter().filter(|(_, cidr)| *cidr == id).map(|(node, _)| node).collect();
        let nodes: BTreeSet<NodeId> = inside.into_iter().chain(self.index.gateways_of(id)).collect();
        let nodes = nodes.iter().filter_map(|id| self.nodes.get(id));
        let groups = self.index.groups_of_cidr(id).filter_map(|id| self.groups.get(&id));
        let mut users: Vec<Named> = nodes.map(|node| Named::new(Kind::Node, &node.name)).collect();
        users.extend(groups.map(|group| Named::new(Kind::Group, &group.name)));
        users.extend(self.rules_that_name(Selector::Cidr(id)));
        Self::check_unused(Named::new(Kind::Cidr, name), users)?;
        self.place_cidr(id, None).map(drop)
    }

    pub(super) fn find_cidr(&self, name: &CidrName) -> Result<&Cidr, ChangeError> {
        let hint = || Hint::nearest(name.as_str(), self.index.cidrs.keys().map(CidrName::as_str));
        self.cidr_named(name).ok_or_else(|| ChangeError::Unknown(Named::new(Kind::Cidr, name), hint()))
    }

    fn check_cidr_name_free(&self, name: &CidrName) -> Result<(), ChangeError> {
        match self.cidr_named(name) {
            Some(_) => Err(ChangeError::NameTaken(Named::new(Kind::Cidr, name))),
            None => Ok(()),
        }
    }

    /// Puts a cidr to its new place, or deletes it; refuses and stays as it is where the trees or the nodes do not allow it.
    fn place_cidr(&mut self, id: CidrId, new: Option<Cidr>) -> Result<Vec<Warning>, ChangeError> {
        if let Some(new) = &new {
            self.check_cidr_bounds(new)?;
        }
        let prefixes = |cidr: Option<&Cidr>| cidr.into_iter().flat_map(|cidr| cidr.prefixes.iter()).collect::<Vec<_>>();
        let mut concerned = prefixes(self.cidrs.get(&id));
        concerned.extend(prefixes(new.as_ref()));
        let before = self.nodes_in(concerned.iter().copied());
        let old = self.put_cidr(id, new);
        let name = old.as_ref().or(self.cidrs.get(&id)).map(|cidr| cidr.name.clone());
        let judged =
            self.check_trees_at(id, &concerned).and_then(|()| self.check_nodes_after(id, name.as_ref(), &before));
        if judged.is_err() {
            self.put_cidr(id, old);
        }
        judged
    }

    /// Whether the prefixes lie where the roots allow them, and are nobody else's.
    pub(super) fn check_cidr_bounds(&self, cidr: &Cidr) -> Result<(), ChangeError> {
        for prefix in cidr.prefixes.iter() {
            let name = || cidr.name.clone();
            let root = self.roots.iter().find(|root| root.max_prefix_len() == prefix.max_prefix_len());
            match (cidr.external, root) {
                (false, None) => return Err(ChangeError::NoRoot { cidr: name(), prefix }),
                (false, Some(root)) if !root.contains(&prefix) => {
                    return Err(ChangeError::OutsideRoot { cidr: name(), prefix, root });
                }
                (true, Some(root)) if root.contains(&prefix) || prefix.contains(&root) => {
                    return Err(ChangeError::ExternalInside { cidr: name(), prefix, root });
                }
                _ => {}
            }
            let holder = self.index.prefixes.get(&prefix).filter(|&&holder| holder != cidr.id);
            if let Some(other) = holder.and_then(|holder| self.cidrs.get(holder)) {
                return Err(ChangeError::SamePrefix { prefix, other: other.name.clone() });
            }
        }
        Ok(())
    }

    /// Whether the cidr, and those that lie directly in where it is and was, have one parent each.
    fn check_trees_at(&self, id: CidrId, concerned: &[IpNet]) -> Result<(), ChangeError> {
        let below = concerned.iter().flat_map(|prefix| outermost_below(&self.index.prefixes, *prefix));
        let affected: BTreeSet<CidrId> = below.map(|(_, &id)| id).chain([id]).collect();
        affected.into_iter().filter_map(|id| self.cidrs.get(&id)).try_for_each(|cidr| self.check_tree(cidr))
    }

    /// Whether both families agree on the parent, and no cidr is its own ancestor.
    pub(super) fn check_tree(&self, cidr: &Cidr) -> Result<(), ChangeError> {
        let name = |id: CidrId| self.cidrs[&id].name.clone();
        let parents: Vec<CidrId> = cidr.prefixes.iter().filter_map(|prefix| self.parent_in(prefix)).collect();
        if let &[v4, v6] = parents.as_slice()
            && v4 != v6
        {
            return Err(ChangeError::ParentsDisagree { cidr: cidr.name.clone(), v4: name(v4), v6: name(v6) });
        }
        let mut path = vec![cidr.id];
        while let Some(parent) = path.last().and_then(|&id| self.parent_of(id)) {
            if let Some(start) = path.iter().position(|&id| id == parent) {
                return Err(ChangeError::Cycle(path[start..].iter().map(|&id| name(id)).collect()));
            }
            path.push(parent);
        }
        Ok(())
    }

    /// The nodes with an address in one of the prefixes, each with its cidr.
    fn nodes_in(&self, prefixes: impl Iterator<Item = IpNet>) -> BTreeMap<NodeId, CidrId> {
        let addresses = prefixes.flat_map(|prefix| self.index.addresses.range(prefix.network()..=prefix.broadcast()));
        let nodes: BTreeSet<NodeId> = addresses.map(|(_, &id)| id).collect();
        nodes.into_iter().filter_map(|id| Some((id, self.cidr_of_node(id)?.id))).collect()
    }

    /// Whether the nodes that were where the cidr is or was still have a place, and none was turned out.
    fn check_nodes_after(
        &self,
        id: CidrId,
        name: Option<&CidrName>,
        before: &BTreeMap<NodeId, CidrId>,
    ) -> Result<Vec<Warning>, ChangeError> {
        let inside = |address| self.cidr_of(address).is_some_and(|cidr| cidr.id == id);
        let members = before.iter().filter(|(_, cidr)| **cidr == id).map(|(node, _)| &self.nodes[node]);
        let outside: Vec<_> =
            members.filter(|node| !node.addresses.iter().all(inside)).map(|node| node.name.clone()).collect();
        if let (false, Some(name)) = (outside.is_empty(), name) {
            return Err(ChangeError::NodesOutside { cidr: name.clone(), nodes: outside });
        }
        let mut warnings = Vec::new();
        for (node, from) in before {
            let node = &self.nodes[node];
            let to = self.check_node_place(node)?;
            if to.id != *from {
                let from = self.cidrs[from].name.clone();
                warnings.push(Warning::NodeMoved { node: node.name.clone(), from, to: to.name.clone() });
            }
        }
        Ok(warnings)
    }
}
