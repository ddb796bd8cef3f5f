//! Changes of groups.

use std::collections::BTreeSet;

use super::{ChangeError, Kind, Named, Network, Warning};
use crate::limit::{self, Bounded};
use crate::object::group::Group;
use crate::object::id::{CidrId, GroupId, GroupName, NodeId, RuleId};
use crate::object::rule::Action;
use crate::object::selector::{Hint, MemberSpec, Selector, SelectorSpec};

/// A member by id.
#[derive(Clone, Copy)]
enum Member {
    Node(NodeId),
    Cidr(CidrId),
}

impl Group {
    fn insert(&mut self, member: Member) -> bool {
        match member {
            Member::Node(id) => self.nodes.insert(id),
            Member::Cidr(id) => self.cidrs.insert(id),
        }
    }

    fn remove(&mut self, member: Member) -> bool {
        match member {
            Member::Node(id) => self.nodes.remove(&id),
            Member::Cidr(id) => self.cidrs.remove(&id),
        }
    }
}

impl Network {
    pub(super) fn add_group(&mut self, name: &GroupName, members: &[MemberSpec]) -> Result<(), ChangeError> {
        self.check_group_name_free(name)?;
        Bounded::Groups.check(self.groups.len() + 1, limit::MAX_GROUPS)?;
        let (id, next_id) = self.fresh_id()?;
        let mut group = Group { id: GroupId(id), name: name.clone(), nodes: BTreeSet::new(), cidrs: BTreeSet::new() };
        for member in members {
            if !group.insert(self.find_member(member)?) {
                return Err(ChangeError::MemberPresent { group: name.clone(), member: member.clone() });
            }
        }
        self.check_group(&group)?;
        self.put_group(group.id, Some(group));
        self.next_id = next_id;
        Ok(())
    }

    pub(super) fn rename_group(&mut self, from: &GroupName, to: &GroupName) -> Result<(), ChangeError> {
        let group = self.find_group(from)?.clone();
        if from != to {
            self.check_group_name_free(to)?;
            self.put_group(group.id, Some(Group { name: to.clone(), ..group }));
        }
        Ok(())
    }

    pub(super) fn delete_group(&mut self, name: &GroupName) -> Result<(), ChangeError> {
        let id = self.find_group(name)?.id;
        Self::check_unused(Named::new(Kind::Group, name), self.rules_that_name(Selector::Group(id)))?;
        self.put_group(id, None);
        Ok(())
    }

    pub(super) fn add_member(&mut self, group: &GroupName, member: &MemberSpec) -> Result<(), ChangeError> {
        let mut changed = self.find_group(group)?.clone();
        if !changed.insert(self.find_member(member)?) {
            return Err(ChangeError::MemberPresent { group: group.clone(), member: member.clone() });
        }
        self.check_group(&changed)?;
        self.put_group(changed.id, Some(changed));
        Ok(())
    }

    pub(super) fn remove_member(
        &mut self,
        group: &GroupName,
        member: &MemberSpec,
    ) -> Result<Vec<Warning>, ChangeError> {
        let mut changed = self.find_group(group)?.clone();
        if !changed.remove(self.find_member(member)?) {
            let known: Vec<String> = self.member_specs(&changed).iter().map(ToString::to_string).collect();
            let hint = Hint::nearest(&member.to_string(), known.iter().map(String::as_str));
            return Err(ChangeError::MemberAbsent { group: group.clone(), member: member.clone(), hint });
        }
        let mut warnings = Vec::new();
        if changed.is_empty() {
            let (id, selector) = (Selector::Group(changed.id), SelectorSpec::Group(group.clone()));
            let named: BTreeSet<RuleId> = self.index.rules_from(id).chain(self.index.rules_to(id)).collect();
            for rule in named.iter().filter_map(|id| self.rules.get(id)) {
                let (rule, selector, action) = (rule.name.clone(), selector.clone(), rule.action);
                match action {
                    Action::Deny => return Err(ChangeError::EmptyDeny { rule, selector }),
                    Action::Allow => warnings.push(Warning::EmptyAllow { rule, selector }),
                }
            }
        }
        self.put_group(changed.id, Some(changed));
        Ok(warnings)
    }

    pub(super) fn find_group(&self, name: &GroupName) -> Result<&Group, ChangeError> {
        let hint = || Hint::nearest(name.as_str(), self.index.groups.keys().map(GroupName::as_str));
        self.group_named(name).ok_or_else(|| ChangeError::Unknown(Named::new(Kind::Group, name), hint()))
    }

    fn find_member(&self, member: &MemberSpec) -> Result<Member, ChangeError> {
        Ok(match member {
            MemberSpec::Node(name) => Member::Node(self.find_node(name)?.id),
            MemberSpec::Cidr(name) => Member::Cidr(self.find_cidr(name)?.id),
        })
    }

    fn check_group_name_free(&self, name: &GroupName) -> Result<(), ChangeError> {
        match self.group_named(name) {
            Some(_) => Err(ChangeError::NameTaken(Named::new(Kind::Group, name))),
            None => Ok(()),
        }
    }

    /// Whether a group's members are there, and not too many.
    pub(super) fn check_group(&self, group: &Group) -> Result<(), ChangeError> {
        let dangling = |kind, id| ChangeError::Dangling { by: Named::new(Kind::Group, &group.name), kind, id };
        if let Some(id) = group.nodes.iter().find(|id| !self.nodes.contains_key(*id)) {
            return Err(dangling(Kind::Node, id.0));
        }
        if let Some(id) = group.cidrs.iter().find(|id| !self.cidrs.contains_key(*id)) {
            return Err(dangling(Kind::Cidr, id.0));
        }
        Ok(Bounded::Members.check(group.nodes.len() + group.cidrs.len(), limit::MAX_MEMBERS)?)
    }
}
