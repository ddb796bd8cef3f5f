//! Bounds. A network beyond one of the first kind is refused when it is committed; a slice beyond one of the second kind
//! is what `Slice::validate` refuses, which the controller asks before it commits, so that no node ever has to refuse.

use std::fmt;
use std::ops::RangeInclusive;

use thiserror::Error;

// Of a network: what a controller can compile in the time that an edit may take.

/// Cidrs of a network.
pub const MAX_CIDRS: usize = 16_384;
/// Nodes of a network.
pub const MAX_NODES: usize = 32_768;
/// Groups of a network.
pub const MAX_GROUPS: usize = 16_384;
/// Named services of a network.
pub const MAX_SERVICES: usize = 16_384;
/// Rules of a network.
pub const MAX_RULES: usize = 131_072;
/// Selectors in `from` or in `to` of one rule.
pub const MAX_SELECTORS: usize = 256;
/// Services of one rule, or of one named service.
pub const MAX_SERVICES_EACH: usize = 256;
/// Ranges of ports or types in one service: "tcp/80,443" has two.
pub const MAX_RANGES: usize = 256;
/// Members of one group.
pub const MAX_MEMBERS: usize = 32_768;
/// Priorities of rules.
pub const PRIORITY: RangeInclusive<i32> = -1_000_000..=1_000_000;
/// Bytes in a rule's comment.
pub const MAX_COMMENT: usize = 1_024;

/// Prefixes of a compiled matrix: cidrs, and the nodes and literals that rules name, of both families.
pub const MAX_PREFIXES: usize = 262_144;
/// Classes of a compiled matrix.
pub const MAX_CLASSES: usize = 131_072;

// Of a slice: the maps of `ebpf-common::limit`, which a test in `node` holds these against.

/// Blocks of the table that finds out what an address is.
pub const MAX_SLICE_BLOCKS: usize = 8_192;
/// Paths of that table.
pub const MAX_SLICE_PATHS: usize = 32_768;
/// Distinct (class, cidr) pairs, each of which may be local or not, or held by a gateway.
pub const MAX_SLICE_LEAVES: usize = 65_536;
/// 2 directions x own classes x all classes, the unknown one included.
pub const MAX_SLICE_CELLS: usize = 524_288;
/// Rules with a counter of their own.
pub const MAX_SLICE_RULES: usize = 8_192;
/// Distinct verdicts.
pub const MAX_SLICE_DECISIONS: usize = 8_192;
/// Distinct cells that tell services apart.
pub const MAX_SLICE_PAGES: usize = 1_024;
/// Distinct runs of 256 verdicts in these cells.
pub const MAX_SLICE_PORTS: usize = 2_048;

/// More of something than there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{count} {what} are more than the {limit} that there is room for; {}", what.remedy())]
pub struct LimitError {
    pub what: Bounded,
    pub count: usize,
    pub limit: usize,
}

/// What a bound is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounded {
    Cidrs,
    Nodes,
    Groups,
    Services,
    Rules,
    Ids,
    Selectors,
    ServicesEach,
    Members,
    CommentBytes,
    Prefixes,
    Classes,
    SliceBlocks,
    SlicePaths,
    SliceLeaves,
    SliceCells,
    SliceRules,
    SliceDecisions,
    SlicePages,
    SlicePorts,
}

impl Bounded {
    /// Refuses a count above the limit.
    pub(crate) fn check(self, count: usize, limit: usize) -> Result<(), LimitError> {
        match count <= limit {
            true => Ok(()),
            false => Err(LimitError { what: self, count, limit }),
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Cidrs | Self::Nodes | Self::Groups | Self::Services | Self::Rules => "delete those that are not used",
            Self::Ids => "make a new network",
            Self::Selectors | Self::Members => "use a cidr that contains them",
            Self::ServicesEach => "use a range or several rules",
            Self::CommentBytes => "shorten it",
            Self::Prefixes | Self::Classes | Self::SliceLeaves | Self::SliceCells => {
                "let rules name cidrs rather than nodes, groups and literal prefixes"
            }
            Self::SliceBlocks | Self::SlicePaths => {
                "give out prefixes and addresses side by side, or let rules name cidrs rather than nodes"
            }
            Self::SliceRules | Self::SliceDecisions => "join rules that one node is an end of",
            Self::SlicePages | Self::SlicePorts => {
                "let more of the rules that one node is an end of share their services"
            }
        }
    }
}

impl fmt::Display for Bounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cidrs => "cidrs",
            Self::Nodes => "nodes",
            Self::Groups => "groups",
            Self::Services => "named services",
            Self::Rules => "rules",
            Self::Ids => "ids",
            Self::Selectors => "selectors on one side of a rule",
            Self::ServicesEach => "services in one place",
            Self::Members => "members of one group",
            Self::CommentBytes => "bytes of comment",
            Self::Prefixes => "prefixes of the compiled matrix",
            Self::Classes => "classes of addresses",
            Self::SliceBlocks => "blocks of the address table in one node's slice",
            Self::SlicePaths => "paths of the address table in one node's slice",
            Self::SliceLeaves => "pairs of class and cidr in one node's slice",
            Self::SliceCells => "cells in one node's slice",
            Self::SliceRules => "rules in one node's slice",
            Self::SliceDecisions => "verdicts in one node's slice",
            Self::SlicePages => "sets of services in one node's slice",
            Self::SlicePorts => "runs of ports in one node's slice",
        })
    }
}
