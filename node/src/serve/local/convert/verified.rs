//! What holding the tables against the policy has found.

use super::super::v1;
use super::{ConvertError, all, direction, direction_to_wire, narrow, required, wired};
use crate::view::Verified;
use crate::view::verified::{ClassEnd, Detail, Differing, Ownership, Said};

impl From<Verified> for v1::VerifyPolicyResponse {
    fn from(verified: Verified) -> Self {
        let Verified { equal, revision, generation, prefixes, cells, differences, more } = verified;
        Self {
            equal,
            revision,
            generation,
            prefixes: prefixes as u64,
            cells: cells as u64,
            differences: wired(differences),
            more: more as u64,
        }
    }
}

impl TryFrom<v1::VerifyPolicyResponse> for Verified {
    type Error = ConvertError;

    fn try_from(verified: v1::VerifyPolicyResponse) -> Result<Self, Self::Error> {
        let v1::VerifyPolicyResponse { equal, revision, generation, prefixes, cells, differences, more } = verified;
        Ok(Self {
            equal,
            revision,
            generation,
            prefixes: narrow("verified.prefixes", prefixes)?,
            cells: narrow("verified.cells", cells)?,
            differences: all(differences)?,
            more: narrow("verified.more", more)?,
        })
    }
}

impl From<Differing> for v1::Differing {
    fn from(Differing { text, detail }: Differing) -> Self {
        Self { text, detail: Some(detail.into()) }
    }
}

impl TryFrom<v1::Differing> for Differing {
    type Error = ConvertError;

    fn try_from(v1::Differing { text, detail }: v1::Differing) -> Result<Self, Self::Error> {
        Ok(Self { text, detail: required("differing.detail", detail)?.try_into()? })
    }
}

impl From<Detail> for v1::differing::Detail {
    fn from(detail: Detail) -> Self {
        match detail {
            Detail::Revision { intended, found } => Self::Revision(v1::DifferingRevision { intended, found }),
            Detail::Malformed { table, index, what } => {
                Self::Malformed(v1::Malformed { table, index: index as u64, what })
            }
            Detail::Prefix { addresses, intended, found } => Self::Prefix(v1::DifferingPrefix {
                addresses,
                intended: Some(intended.into()),
                found: Some(found.into()),
            }),
            Detail::Cell { direction, source, destination, service, intended, found } => {
                Self::Cell(v1::DifferingCell {
                    direction: direction_to_wire(direction),
                    source: Some(source.into()),
                    destination: Some(destination.into()),
                    service,
                    intended: Some(intended.into()),
                    found: Some(found.into()),
                })
            }
            Detail::Record { direction, source, destination, intended, found } => Self::Record(v1::DifferingRecord {
                direction: direction_to_wire(direction),
                source: Some(source.into()),
                destination: Some(destination.into()),
                intended,
                found,
            }),
        }
    }
}

impl TryFrom<v1::differing::Detail> for Detail {
    type Error = ConvertError;

    fn try_from(detail: v1::differing::Detail) -> Result<Self, Self::Error> {
        use v1::differing::Detail as Wire;
        Ok(match detail {
            Wire::Revision(v1::DifferingRevision { intended, found }) => Self::Revision { intended, found },
            Wire::Malformed(v1::Malformed { table, index, what }) => {
                Self::Malformed { table, index: narrow("malformed.index", index)?, what }
            }
            Wire::Prefix(v1::DifferingPrefix { addresses, intended, found }) => Self::Prefix {
                addresses,
                intended: required("prefix.intended", intended)?.into(),
                found: required("prefix.found", found)?.into(),
            },
            Wire::Cell(v1::DifferingCell { direction: at, source, destination, service, intended, found }) => {
                Self::Cell {
                    direction: direction("cell.direction", at)?,
                    source: required("cell.source", source)?.into(),
                    destination: required("cell.destination", destination)?.into(),
                    service,
                    intended: required("cell.intended", intended)?.into(),
                    found: required("cell.found", found)?.into(),
                }
            }
            Wire::Record(v1::DifferingRecord { direction: at, source, destination, intended, found }) => Self::Record {
                direction: direction("record.direction", at)?,
                source: required("record.source", source)?.into(),
                destination: required("record.destination", destination)?.into(),
                intended,
                found,
            },
        })
    }
}

impl From<Ownership> for v1::Ownership {
    fn from(Ownership { cidr, local, external, gateway }: Ownership) -> Self {
        Self { cidr, local, external, gateway }
    }
}

impl From<v1::Ownership> for Ownership {
    fn from(v1::Ownership { cidr, local, external, gateway }: v1::Ownership) -> Self {
        Self { cidr, local, external, gateway }
    }
}

impl From<ClassEnd> for v1::ClassEnd {
    fn from(ClassEnd { addresses, cidr }: ClassEnd) -> Self {
        Self { addresses, cidr }
    }
}

impl From<v1::ClassEnd> for ClassEnd {
    fn from(v1::ClassEnd { addresses, cidr }: v1::ClassEnd) -> Self {
        Self { addresses, cidr }
    }
}

impl From<Said> for v1::Said {
    fn from(Said { verdict, reason, rule, slot, log }: Said) -> Self {
        Self { verdict, reason, rule, slot, log }
    }
}

impl From<v1::Said> for Said {
    fn from(v1::Said { verdict, reason, rule, slot, log }: v1::Said) -> Self {
        Self { verdict, reason, rule, slot, log }
    }
}
