//! Whether the kernel's tables are the policy, at intervals and when somebody asks. Reading and comparing happen beside the
//! thread that puts changes in force, which only says what should be there and hears what was found.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use policy::{Generation, RuleId, Slice};

use crate::kernel::KernelError;
use crate::lower::Tables;
use crate::verify::{Difference, Direction, End, Ownership, Said, Word, verify};
use crate::view::verified::{self, ClassEnd, Detail, Differing};
use crate::view::{self, Unanswered, Verified};
use host::clock::seconds;
use host::error::chain;

/// What should be in force.
#[derive(Clone, Debug)]
pub struct Expected {
    pub slice: Arc<Slice>,
    pub slots: BTreeMap<RuleId, u32>,
    /// Of the tables that say it; what another generation says is another matter.
    pub generation: Generation,
}

/// What was found, and when.
#[derive(Clone, Debug)]
pub struct Finding {
    pub verified: Verified,
    pub at: SystemTime,
    pub took: Duration,
}

/// The last finding and how often there was which, for the metrics.
#[derive(Clone, Debug, Default)]
pub struct Record {
    pub last: Option<Finding>,
    pub equal: u64,
    pub different: u64,
}

/// How often tables that are switched while they are read are read again.
const READ_AGAIN: u32 = 3;

impl Expected {
    /// Reads the tables and compares them. `None`: another generation is in force by now.
    pub fn check(
        &self,
        mut read: impl FnMut() -> Result<Option<(Generation, Tables)>, KernelError>,
    ) -> Result<Option<Finding>, Unanswered> {
        let (at, began) = (SystemTime::now(), Instant::now());
        for _ in 0..READ_AGAIN {
            match read().map_err(|error| Unanswered::Kernel(chain(&error)))? {
                Some((generation, tables)) if generation == self.generation => {
                    let verified = self.compare(&tables);
                    return Ok(Some(Finding { verified, at, took: began.elapsed() }));
                }
                Some(_) => return Ok(None),
                None => {}
            }
        }
        Ok(None)
    }

    fn compare(&self, tables: &Tables) -> Verified {
        let verification = verify(&self.slice, tables, &self.slots);
        let differing =
            |difference: &Difference| Differing { text: difference.to_string(), detail: detail(difference) };
        Verified {
            equal: verification.is_equal(),
            revision: self.slice.revision.0,
            generation: self.generation.0,
            prefixes: verification.prefixes,
            cells: verification.cells,
            differences: verification.differences.iter().map(differing).collect(),
            more: verification.more,
        }
    }
}

/// For programs that read it.
fn detail(difference: &Difference) -> Detail {
    match difference {
        Difference::Revision { intended, found } => Detail::Revision { intended: *intended, found: *found },
        Difference::Malformed { table, index, what } => {
            Detail::Malformed { table: (*table).to_owned(), index: *index, what: what.clone() }
        }
        Difference::Prefix { addresses, intended, found } => {
            Detail::Prefix { addresses: addresses.to_string(), intended: ownership(intended), found: ownership(found) }
        }
        Difference::Cell { direction, source, destination, service, intended, found } => Detail::Cell {
            direction: at(*direction),
            source: end(source),
            destination: end(destination),
            service: service.to_string(),
            intended: said(intended),
            found: said(found),
        },
        Difference::Record { direction, source, destination, intended, found } => Detail::Record {
            direction: at(*direction),
            source: end(source),
            destination: end(destination),
            intended: *intended,
            found: *found,
        },
    }
}

fn at(direction: Direction) -> view::Direction {
    match direction {
        Direction::Egress => view::Direction::Egress,
        Direction::Ingress => view::Direction::Ingress,
    }
}

fn end(End { addresses, cidr }: &End) -> ClassEnd {
    ClassEnd { addresses: addresses.to_string(), cidr: cidr.clone() }
}

fn ownership(Ownership { cidr, local, external, gateway }: &Ownership) -> verified::Ownership {
    verified::Ownership { cidr: cidr.clone(), local: *local, external: *external, gateway: gateway.clone() }
}

fn said(Said { verdict, reason, rule, slot, log }: &Said) -> verified::Said {
    let verdict = match verdict {
        Word::Allow => "allow",
        Word::Deny => "deny",
    };
    verified::Said {
        verdict: verdict.to_owned(),
        reason: (*reason).to_owned(),
        rule: rule.clone(),
        slot: *slot,
        log: *log,
    }
}

impl Finding {
    /// Seconds since the epoch.
    pub fn at(&self) -> u64 {
        seconds(self.at).unwrap_or(0)
    }

    /// Differences, named or only counted.
    pub fn count(&self) -> usize {
        self.verified.differences.len() + self.verified.more
    }
}

impl Record {
    pub fn note(&mut self, finding: Finding) {
        let count = if finding.verified.equal { &mut self.equal } else { &mut self.different };
        *count += 1;
        self.last = Some(finding);
    }
}
