//! A slice or a delta from elsewhere is whole and within limits, or refused.

use std::collections::BTreeSet;

use ipnet::IpNet;
use thiserror::Error;

use super::size::Size;
use super::{Local, Slice};
use crate::limit::LimitError;
use crate::matrix::{Cell, CellError};
use crate::object::digest::Digest;
use crate::object::id::{ClassId, Revision};
use crate::object::prefix::{PrefixError, check_prefix};

/// Why a delta or a slice is refused. Whoever sent it is wrong: ask for a whole slice.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeltaError {
    #[error("the delta is from revision {from}, but the slice is of revision {revision}; ask for a whole slice")]
    From { from: Revision, revision: Revision },
    #[error("a whole slice is from revision 0 and says what is local; this is a delta from revision {0}")]
    NotWhole(Revision),
    #[error("{0} is both set and removed, or removed twice")]
    Twice(String),
    #[error("{0} is removed, but was not there")]
    NotThere(String),
    #[error("{0} speaks of {1}, which is not in the slice")]
    Dangling(String, String),
    #[error("the cell from class {0} to class {1} is set twice")]
    CellTwice(ClassId, ClassId),
    #[error("the cell from class {0} to class {1} concerns no address that the node stands for")]
    Foreign(ClassId, ClassId),
    #[error("the cell from class {0} to class {1} says only what an absent one says")]
    ClosedCell(ClassId, ClassId),
    #[error("a cell is malformed")]
    Cell(#[from] CellError),
    #[error("a product of cells has no sources or no destinations")]
    EmptyProduct,
    #[error("the prefix `{0}` is told apart within its cidr, but `{1}` is not the id of such a class")]
    PlainClass(IpNet, ClassId),
    #[error("the delta is for a slice with the digest {base}, and this one has {digest}; ask for a whole slice")]
    Base { base: Digest, digest: Digest },
    #[error("the digest of the slice is {found}, and not {expected} as the sender has it; ask for a whole slice")]
    Digest { expected: Digest, found: Digest },
    #[error("{0} has the id 0")]
    ZeroId(&'static str),
    #[error("a prefix is malformed")]
    Prefix(#[from] PrefixError),
    #[error("the prefix `{0}` is that of two peers, or of a peer and of this node")]
    SharedPrefix(IpNet),
    #[error("two peers have one public key, or a peer has the id of this node")]
    SharedIdentity,
    #[error("the slice is too large")]
    Limit(#[from] LimitError),
}

impl Slice {
    /// Refuses a slice that refers to what is not in it, that contradicts itself, or that a node has no room for.
    pub fn validate(&self) -> Result<(), DeltaError> {
        let classes = self.classes();
        self.validate_ids(&classes)?;
        self.validate_prefixes()?;
        let own = self.own_classes();
        self.validate_cells(&classes, &own)?;
        self.validate_peers()?;
        Size::of(self, &classes, own.len()).check()?;
        Ok(())
    }

    fn validate_ids(&self, classes: &BTreeSet<ClassId>) -> Result<(), DeltaError> {
        let zero = [
            ("a node", self.local.node.0 == 0 || self.peers.keys().any(|id| id.0 == 0)),
            ("a cidr", self.cidrs.keys().any(|id| id.0 == 0)),
            ("a rule", self.rules.keys().any(|id| id.0 == 0)),
            ("a class", classes.iter().any(|id| id.0 == 0)),
        ];
        match zero.into_iter().find(|&(_, found)| found) {
            Some((what, _)) => Err(DeltaError::ZeroId(what)),
            None => Ok(()),
        }
    }

    fn validate_prefixes(&self) -> Result<(), DeltaError> {
        for (&prefix, (_, cidr)) in &self.prefixes {
            check_prefix(prefix)?;
            if !self.cidrs.contains_key(cidr) {
                return Err(DeltaError::Dangling(format!("the prefix `{prefix}`"), format!("cidr {cidr}")));
            }
        }
        // Nobody else is of the classes of the node's own addresses, or of those of a whole cidr.
        if let Some((prefix, (class, _))) = self.marked.iter().find(|(_, (class, _))| !class.is_marked()) {
            return Err(DeltaError::PlainClass(*prefix, *class));
        }
        debug_assert!(self.is_placed());
        let Local { external_routes, gateway_for, .. } = &*self.local;
        let peers = self.peers.values().flat_map(|peer| peer.allowed_ips.iter());
        for &prefix in external_routes.iter().chain(gateway_for).chain(peers) {
            check_prefix(prefix)?;
        }
        Ok(())
    }

    fn validate_cells(&self, classes: &BTreeSet<ClassId>, own: &BTreeSet<ClassId>) -> Result<(), DeltaError> {
        // Equal cells are many and checked once.
        let mut checked: BTreeSet<&Cell> = BTreeSet::new();
        for (&(source, destination), cell) in &self.cells {
            let what = || format!("the cell from class {source} to class {destination}");
            for class in [source, destination] {
                if !classes.contains(&class) {
                    return Err(DeltaError::Dangling(what(), format!("class {class}")));
                }
            }
            if !own.contains(&source) && !own.contains(&destination) {
                return Err(DeltaError::Foreign(source, destination));
            }
            if cell.is_closed() {
                return Err(DeltaError::ClosedCell(source, destination));
            }
            if !checked.insert(cell) {
                continue;
            }
            cell.validate()?;
            for verdict in cell.verdicts() {
                let Some(id) = verdict.rule else { continue };
                let Some(rule) = self.rules.get(&id) else {
                    return Err(DeltaError::Dangling(what(), format!("rule {id}")));
                };
                if rule.action != verdict.action {
                    return Err(CellError::Verdict(verdict).into());
                }
            }
        }
        Ok(())
    }

    fn validate_peers(&self) -> Result<(), DeltaError> {
        let own = self.local.addresses.iter().map(IpNet::from).chain(self.local.gateway_for.iter().copied());
        let mut prefixes: BTreeSet<IpNet> = own.collect();
        let mut keys = BTreeSet::new();
        for (id, peer) in &self.peers {
            if *id == self.local.node || !keys.insert(peer.public_key) {
                return Err(DeltaError::SharedIdentity);
            }
            for &prefix in peer.allowed_ips.iter() {
                if !prefixes.insert(prefix) {
                    return Err(DeltaError::SharedPrefix(prefix));
                }
            }
        }
        Ok(())
    }
}
