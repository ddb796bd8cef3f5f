//! The digest of each row of a slice.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::{Local, SliceRule};
use crate::matrix::{Cell, CellEntry};
use crate::object::digest::{Digest, RowWriter};
use crate::object::id::{CidrId, ClassId, RuleId};
use crate::object::rule::Action;
use crate::object::verdict::{Reason, Verdict};

impl Local {
    pub(super) fn digest(&self) -> Digest {
        let Self { node, name, network, addresses, is_split, roots, external_routes: _, gateway_for, requires } = self;
        Digest::of_row(b'l', |row| {
            row.number(node.0.into());
            row.bytes(name.as_str().as_bytes());
            row.bytes(network.as_str().as_bytes());
            row.nets(addresses.iter().map(IpNet::from).collect::<Vec<_>>().into_iter());
            row.byte(u8::from(*is_split));
            row.nets(roots.iter().collect::<Vec<_>>().into_iter());
            row.nets(gateway_for.iter().copied());
            write_features(row, requires);
        })
    }
}

impl SliceRule {
    pub(super) fn digest(&self, id: RuleId) -> Digest {
        let Self { name, action, log, requires } = self;
        Digest::of_row(b'r', |row| {
            row.number(id.0.into());
            row.bytes(name.as_str().as_bytes());
            row.byte(u8::from(*action == Action::Allow));
            row.byte(u8::from(*log));
            write_features(row, requires);
        })
    }
}

fn write_features(row: &mut RowWriter, features: &BTreeSet<String>) {
    row.number(features.len() as u64);
    features.iter().for_each(|feature| row.bytes(feature.as_bytes()));
}

pub(super) fn of_prefix(net: IpNet, (class, cidr): (ClassId, CidrId)) -> Digest {
    Digest::of_row(b'n', |row| {
        row.nets([net].into_iter());
        row.number(class.0);
        row.number(cidr.0.into());
    })
}

pub(super) fn of_cell((source, destination): (ClassId, ClassId), cell: &Cell) -> Digest {
    Digest::of_row(b'x', |row| {
        row.number(source.0);
        row.number(destination.0);
        write_verdict(row, &cell.otherwise);
        row.number(cell.entries.len() as u64);
        for CellEntry { range, verdict } in &cell.entries {
            row.byte(range.protocol);
            row.number(u64::from(range.low) << 16 | u64::from(range.high));
            write_verdict(row, verdict);
        }
    })
}

fn write_verdict(row: &mut RowWriter, Verdict { action, reason, rule }: &Verdict) {
    row.byte(u8::from(*action == Action::Allow));
    row.byte(match reason {
        Reason::Rule => 1,
        Reason::Lineage => 2,
        Reason::NoRule => 3,
        Reason::UnknownSource => 4,
        Reason::UnknownDestination => 5,
    });
    row.number(rule.map_or(0, |rule| rule.0).into());
}
