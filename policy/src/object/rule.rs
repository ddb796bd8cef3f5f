//! Rules: who may, or may not, open what to whom.

use std::collections::BTreeSet;
use std::fmt;

use crate::object::id::{RuleId, RuleName};
use crate::object::selector::{Selector, SelectorSpec};
use crate::object::service::{ServiceRef, ServiceSpec};

/// What a rule, a cell or a verdict does with a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    Allow,
    Deny,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// Whether a rule decides, or only counts what it would decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    #[default]
    Enforce,
    Audit,
}

/// One rule. docs/POLICY.md, section 2, says what it means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub id: RuleId,
    pub name: RuleName,
    pub action: Action,
    pub from: BTreeSet<Selector>,
    pub to: BTreeSet<Selector>,
    pub services: Vec<ServiceRef>,
    /// Higher wins; see `limit::PRIORITY`.
    pub priority: i32,
    /// Also with `from` and `to` exchanged.
    pub both: bool,
    pub mode: Mode,
    /// Report the packets that it decides.
    pub log: bool,
    /// Seconds since the epoch.
    pub expires_at: Option<u64>,
    pub schedule: Option<String>,
    pub comment: String,
}

impl Rule {
    pub(crate) fn is_enforced(&self) -> bool {
        self.mode == Mode::Enforce
    }
}

/// A rule as its author writes it: names, not ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSpec {
    pub name: RuleName,
    pub action: Action,
    pub from: Vec<SelectorSpec>,
    pub to: Vec<SelectorSpec>,
    pub services: Vec<ServiceSpec>,
    pub priority: i32,
    pub both: bool,
    pub log: bool,
    pub comment: String,
}
