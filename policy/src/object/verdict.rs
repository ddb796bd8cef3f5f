//! Flows, and what the policy says of them.

use std::fmt;
use std::net::IpAddr;

use crate::object::id::RuleId;
use crate::object::rule::Action;
use crate::object::service::{self, ServiceError};

/// A new flow, as its opener would send it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    pub source: IpAddr,
    pub destination: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// Destination port or ICMP type; 0 for protocols without either.
    pub port: u16,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, destination, protocol, port } = *self;
        write!(f, "{source} -> {destination} {}", service::point_name(protocol, port))
    }
}

/// Parses the service of one flow, as `explain` takes it: "tcp/8080", "icmp/8", "icmp" (an echo request), "proto/47".
pub fn parse_flow_service(text: &str) -> Result<(u8, u16), ServiceError> {
    service::parse_point(text)
}

/// Why a verdict is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// A rule decided.
    Rule,
    /// The lineage default let it pass.
    Lineage,
    /// No rule matched, and the default lets nothing pass.
    NoRule,
    /// The source lies in no cidr.
    UnknownSource,
    /// The destination lies in no cidr.
    UnknownDestination,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Rule => "rule",
            Self::Lineage => "lineage",
            Self::NoRule => "no-rule",
            Self::UnknownSource => "unknown-source",
            Self::UnknownDestination => "unknown-destination",
        })
    }
}

/// What the policy says of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Verdict {
    pub action: Action,
    pub reason: Reason,
    /// The deciding rule, where the reason is a rule.
    pub rule: Option<RuleId>,
}

impl Verdict {
    pub const NO_RULE: Self = Self { action: Action::Deny, reason: Reason::NoRule, rule: None };
    pub const LINEAGE: Self = Self { action: Action::Allow, reason: Reason::Lineage, rule: None };
    pub const UNKNOWN_SOURCE: Self = Self { action: Action::Deny, reason: Reason::UnknownSource, rule: None };
    pub const UNKNOWN_DESTINATION: Self = Self { action: Action::Deny, reason: Reason::UnknownDestination, rule: None };

    pub const fn of_rule(action: Action, rule: RuleId) -> Self {
        Self { action, reason: Reason::Rule, rule: Some(rule) }
    }

    pub fn is_allowed(&self) -> bool {
        self.action == Action::Allow
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rule {
            Some(rule) => write!(f, "{} ({} {rule})", self.action, self.reason),
            None => write!(f, "{} ({})", self.action, self.reason),
        }
    }
}
