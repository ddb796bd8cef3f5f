//! Changes of rules and of named services.

use std::collections::BTreeSet;

use super::{ChangeError, Kind, Named, Network, Warning};
use crate::limit::{self, Bounded};
use crate::object::id::{RuleId, RuleName, ServiceId, ServiceName};
use crate::object::prefix::check_prefix;
use crate::object::rule::{Action, Mode, Rule, RuleSpec};
use crate::object::selector::{Hint, Selector, SelectorSpec};
use crate::object::service::{NamedService, Service, ServiceRef, ServiceSpec};

impl Network {
    pub(super) fn add_rule(&mut self, spec: &RuleSpec) -> Result<Vec<Warning>, ChangeError> {
        let RuleSpec { name, action, from, to, services, priority, both, log, comment } = spec;
        if self.rule_named(name).is_some() {
            return Err(ChangeError::NameTaken(Named::new(Kind::Rule, name)));
        }
        Bounded::Rules.check(self.rules.len() + 1, limit::MAX_RULES)?;
        let (id, next_id) = self.fresh_id()?;
        let side = |specs: &[SelectorSpec]| {
            specs.iter().map(|spec| self.find_selector(spec)).collect::<Result<BTreeSet<_>, _>>()
        };
        let rule = Rule {
            id: RuleId(id),
            name: name.clone(),
            action: *action,
            from: side(from)?,
            to: side(to)?,
            services: services.iter().map(|spec| self.find_service_ref(spec)).collect::<Result<_, _>>()?,
            priority: *priority,
            both: *both,
            mode: Mode::Enforce,
            log: *log,
            expires_at: None,
            schedule: None,
            comment: comment.clone(),
        };
        let warnings = self.check_rule(&rule)?;
        self.put_rule(rule.id, Some(rule));
        self.next_id = next_id;
        Ok(warnings)
    }

    pub(super) fn delete_rule(&mut self, name: &RuleName) -> Result<(), ChangeError> {
        let Some(rule) = self.rule_named(name) else {
            let hint = Hint::nearest(name.as_str(), self.index.rules.keys().map(RuleName::as_str));
            return Err(ChangeError::Unknown(Named::new(Kind::Rule, name), hint));
        };
        let id = rule.id;
        self.put_rule(id, None);
        Ok(())
    }

    pub(super) fn add_service(&mut self, name: &ServiceName, services: &[Service]) -> Result<(), ChangeError> {
        if self.service_named(name).is_some() {
            return Err(ChangeError::NameTaken(Named::new(Kind::Service, name)));
        }
        Bounded::Services.check(self.services.len() + 1, limit::MAX_SERVICES)?;
        let (id, next_id) = self.fresh_id()?;
        let service = NamedService { id: ServiceId(id), name: name.clone(), services: services.to_vec() };
        Self::check_service(&service)?;
        self.put_service(service.id, Some(service));
        self.next_id = next_id;
        Ok(())
    }

    pub(super) fn delete_service(&mut self, name: &ServiceName) -> Result<(), ChangeError> {
        let id = self.find_service(name)?.id;
        let users = self.index.rules_with(id).filter_map(|id| self.rules.get(&id));
        let users = users.map(|rule| Named::new(Kind::Rule, &rule.name)).collect();
        Self::check_unused(Named::new(Kind::Service, name), users)?;
        self.put_service(id, None);
        Ok(())
    }

    fn find_service(&self, name: &ServiceName) -> Result<&NamedService, ChangeError> {
        let hint = || Hint::nearest(name.as_str(), self.index.services.keys().map(ServiceName::as_str));
        self.service_named(name).ok_or_else(|| ChangeError::Unknown(Named::new(Kind::Service, name), hint()))
    }

    fn find_selector(&self, spec: &SelectorSpec) -> Result<Selector, ChangeError> {
        Ok(match spec {
            SelectorSpec::Any => Selector::Any,
            SelectorSpec::Cidr(name) => Selector::Cidr(self.find_cidr(name)?.id),
            SelectorSpec::Node(name) => Selector::Node(self.find_node(name)?.id),
            SelectorSpec::Group(name) => Selector::Group(self.find_group(name)?.id),
            SelectorSpec::Prefix(prefix) => Selector::Prefix(check_prefix(*prefix)?),
        })
    }

    fn find_service_ref(&self, spec: &ServiceSpec) -> Result<ServiceRef, ChangeError> {
        Ok(match spec {
            ServiceSpec::Literal(service) => ServiceRef::Literal(service.clone()),
            ServiceSpec::Named(name) => ServiceRef::Named(self.find_service(name)?.id),
        })
    }

    /// The rules that name an object in `from` or `to`.
    pub(super) fn rules_that_name(&self, selector: Selector) -> Vec<Named> {
        let rules: BTreeSet<RuleId> = self.index.rules_from(selector).chain(self.index.rules_to(selector)).collect();
        rules.iter().filter_map(|id| self.rules.get(id)).map(|rule| Named::new(Kind::Rule, &rule.name)).collect()
    }

    /// Whether a rule is sound and what it names is there.
    pub(super) fn check_rule(&self, rule: &Rule) -> Result<Vec<Warning>, ChangeError> {
        let (name, named) = (|| rule.name.clone(), || Named::new(Kind::Rule, &rule.name));
        for (what, present) in [
            ("the expiry", rule.expires_at.is_some()),
            ("the schedule", rule.schedule.is_some()),
            ("mode `audit`", rule.mode == Mode::Audit),
        ] {
            if present {
                return Err(ChangeError::Unsupported { what, of: named() });
            }
        }
        if !limit::PRIORITY.contains(&rule.priority) {
            return Err(ChangeError::Priority { rule: name(), priority: rule.priority });
        }
        if rule.services.is_empty() {
            return Err(ChangeError::NoService(name()));
        }
        Bounded::ServicesEach.check(rule.services.len(), limit::MAX_SERVICES_EACH)?;
        Bounded::CommentBytes.check(rule.comment.len(), limit::MAX_COMMENT)?;
        for service in &rule.services {
            match service {
                ServiceRef::Named(id) if !self.services.contains_key(id) => {
                    return Err(ChangeError::Dangling { by: named(), kind: Kind::Service, id: id.0 });
                }
                ServiceRef::Named(_) | ServiceRef::Literal(_) => {}
            }
        }
        let mut empty = BTreeSet::new();
        for (side, selectors) in [("from", &rule.from), ("to", &rule.to)] {
            if selectors.is_empty() {
                return Err(ChangeError::NoSelector { rule: name(), side });
            }
            Bounded::Selectors.check(selectors.len(), limit::MAX_SELECTORS)?;
            for selector in selectors {
                if self.resolves_to_nothing(rule, selector)? {
                    empty.extend(self.selector_spec(selector));
                }
            }
        }
        match (rule.action, empty.first()) {
            (Action::Deny, Some(selector)) => Err(ChangeError::EmptyDeny { rule: name(), selector: selector.clone() }),
            _ => Ok(empty.into_iter().map(|selector| Warning::EmptyAllow { rule: name(), selector }).collect()),
        }
    }

    /// Only a group can. `any` names no object that could be empty by mistake, and a literal may miss all cidrs.
    fn resolves_to_nothing(&self, rule: &Rule, selector: &Selector) -> Result<bool, ChangeError> {
        let (kind, id, found) = match selector {
            Selector::Any => return Ok(false),
            Selector::Prefix(prefix) => return Ok(check_prefix(*prefix).map(|_| false)?),
            Selector::Cidr(id) => (Kind::Cidr, id.0, self.cidrs.contains_key(id).then_some(false)),
            Selector::Node(id) => (Kind::Node, id.0, self.nodes.contains_key(id).then_some(false)),
            Selector::Group(id) => (Kind::Group, id.0, self.groups.get(id).map(|group| group.is_empty())),
        };
        found.ok_or_else(|| ChangeError::Dangling { by: Named::new(Kind::Rule, &rule.name), kind, id })
    }

    pub(super) fn check_service(service: &NamedService) -> Result<(), ChangeError> {
        if service.services.is_empty() {
            return Err(ChangeError::EmptyService(service.name.clone()));
        }
        Ok(Bounded::ServicesEach.check(service.services.len(), limit::MAX_SERVICES_EACH)?)
    }

    /// The id for a new object, and the next id once that is taken.
    pub(super) fn fresh_id(&self) -> Result<(u32, u32), ChangeError> {
        let next = self.next_id.checked_add(1);
        let limit = u32::MAX as usize;
        next.map(|next| (self.next_id, next))
            .ok_or(crate::limit::LimitError { what: Bounded::Ids, count: limit, limit }.into())
    }

    pub(super) fn check_unused(object: Named, users: Vec<Named>) -> Result<(), ChangeError> {
        match users.is_empty() {
            true => Ok(()),
            false => Err(ChangeError::InUse { object, users }),
        }
    }
}
