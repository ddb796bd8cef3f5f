//! The policy in force.

use super::super::v1;
use super::{ConvertError, all, direction, direction_to_wire, parse_all, print_all, required, wired};
use crate::view::{End, Entry, Policy};

impl From<Policy> for v1::ShowPolicyResponse {
    fn from(Policy { status, differences, entries }: Policy) -> Self {
        Self { status: Some(status.into()), differences, entries: wired(entries) }
    }
}

impl TryFrom<v1::ShowPolicyResponse> for Policy {
    type Error = ConvertError;

    fn try_from(policy: v1::ShowPolicyResponse) -> Result<Self, Self::Error> {
        let v1::ShowPolicyResponse { status, differences, entries } = policy;
        Ok(Self { status: required("policy.status", status)?.try_into()?, differences, entries: all(entries)? })
    }
}

impl From<Entry> for v1::Entry {
    fn from(entry: Entry) -> Self {
        let Entry { direction, source, destination, services, verdict, decided_by, packets, bytes } = entry;
        Self {
            direction: direction_to_wire(direction),
            source: Some(source.into()),
            destination: Some(destination.into()),
            services,
            verdict,
            decided_by,
            packets,
            bytes,
        }
    }
}

impl TryFrom<v1::Entry> for Entry {
    type Error = ConvertError;

    fn try_from(entry: v1::Entry) -> Result<Self, Self::Error> {
        let v1::Entry { direction: at, source, destination, services, verdict, decided_by, packets, bytes } = entry;
        Ok(Self {
            direction: direction("entry.direction", at)?,
            source: required("entry.source", source)?.try_into()?,
            destination: required("entry.destination", destination)?.try_into()?,
            services,
            verdict,
            decided_by,
            packets,
            bytes,
        })
    }
}

impl From<End> for v1::End {
    fn from(End { cidr, only }: End) -> Self {
        Self { cidr, only: print_all(&only) }
    }
}

impl TryFrom<v1::End> for End {
    type Error = ConvertError;

    fn try_from(v1::End { cidr, only }: v1::End) -> Result<Self, Self::Error> {
        Ok(Self { cidr, only: parse_all("end.only", &only)? })
    }
}
