//! What a node hears: a slice, or the difference of two.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use ipnet::IpNet;
use policy::{
    Cell, CellEntry, Cells, CidrId, ClassId, Digest, Local, NodeId, Peer, Reason, Revision, RuleId, ServiceRange,
    SliceCidr, SliceDelta, SliceRule, Verdict,
};

use super::{ConvertError, action, id, length_error, narrow, parse, prefixes_to_nets, public_key, required};
use crate::v1;

impl From<&SliceDelta> for v1::Update {
    fn from(delta: &SliceDelta) -> Self {
        let SliceDelta {
            from,
            base,
            revision,
            digest,
            local,
            peers,
            removed_peers,
            cidrs,
            removed_cidrs,
            rules,
            removed_rules,
            prefixes,
            removed_prefixes,
            cells,
        } = delta;
        Self {
            from: from.0,
            base: digest_to_wire(*base),
            revision: revision.0,
            digest: digest_to_wire(*digest),
            local: local.as_ref().map(v1::Local::from),
            peers: peers.iter().map(|(node, peer)| peer_to_wire(*node, peer)).collect(),
            removed_peers: removed_peers.iter().map(|node| node.0).collect(),
            cidrs: cidrs.iter().map(|(id, cidr)| cidr_to_wire(*id, cidr)).collect(),
            removed_cidrs: removed_cidrs.iter().map(|cidr| cidr.0).collect(),
            rules: rules.iter().map(|(id, rule)| rule_to_wire(*id, rule)).collect(),
            removed_rules: removed_rules.iter().map(|rule| rule.0).collect(),
            prefixes: prefixes
                .iter()
                .map(|(prefix, (class, cidr))| v1::SlicePrefix {
                    prefix: Some(prefix.into()),
                    class: class.0,
                    cidr: cidr.0,
                })
                .collect(),
            removed_prefixes: removed_prefixes.iter().map(v1::Prefix::from).collect(),
            cells: cells.iter().map(v1::Cells::from).collect(),
        }
    }
}

impl TryFrom<v1::Update> for SliceDelta {
    type Error = ConvertError;

    fn try_from(update: v1::Update) -> Result<Self, Self::Error> {
        let v1::Update {
            from,
            base,
            revision,
            digest,
            local,
            peers,
            removed_peers,
            cidrs,
            removed_cidrs,
            rules,
            removed_rules,
            prefixes,
            removed_prefixes,
            cells,
        } = update;
        Ok(Self {
            from: Revision(from),
            base: digest_from_wire("update.base", &base)?,
            revision: Revision(revision),
            digest: digest_from_wire("update.digest", &digest)?,
            local: local.map(Local::try_from).transpose()?,
            peers: map("update.peers", peers.into_iter().map(peer_from_wire))?,
            removed_peers: list("update.removed_peers", removed_peers, NodeId)?,
            cidrs: map("update.cidrs", cidrs.into_iter().map(cidr_from_wire))?,
            removed_cidrs: list("update.removed_cidrs", removed_cidrs, CidrId)?,
            rules: map("update.rules", rules.into_iter().map(rule_from_wire))?,
            removed_rules: list("update.removed_rules", removed_rules, RuleId)?,
            prefixes: map("update.prefixes", prefixes.into_iter().map(prefix_from_wire))?,
            removed_prefixes: prefixes_to_nets(removed_prefixes)?,
            cells: cells.into_iter().map(Cells::try_from).collect::<Result<_, _>>()?,
        })
    }
}

/// The digest of no rows has no bytes.
pub fn digest_to_wire(digest: Digest) -> Vec<u8> {
    if digest == Digest::default() { Vec::new() } else { digest.to_bytes().to_vec() }
}

/// The inverse of [`digest_to_wire`].
pub fn digest_from_wire(field: &'static str, bytes: &[u8]) -> Result<Digest, ConvertError> {
    if bytes.is_empty() {
        return Ok(Digest::default());
    }
    bytes.try_into().map(Digest::from_bytes).map_err(|_| length_error(field, bytes, "16"))
}

/// Things by their keys, none of which is given twice.
fn map<K: Ord + Display, V>(
    field: &'static str,
    entries: impl Iterator<Item = Result<(K, V), ConvertError>>,
) -> Result<BTreeMap<K, V>, ConvertError> {
    let mut map = BTreeMap::new();
    for entry in entries {
        let (key, value) = entry?;
        match map.entry(key) {
            Entry::Vacant(place) => place.insert(value),
            Entry::Occupied(place) => return Err(ConvertError::invalid(field, place.key(), "it is given twice")),
        };
    }
    Ok(map)
}

fn cidr_to_wire(id: CidrId, cidr: &SliceCidr) -> v1::SliceCidr {
    let SliceCidr { name, prefixes, is_routed } = cidr;
    v1::SliceCidr { id: id.0, name: name.to_string(), prefixes: Some(prefixes.into()), routed: *is_routed }
}

fn cidr_from_wire(cidr: v1::SliceCidr) -> Result<(CidrId, SliceCidr), ConvertError> {
    let v1::SliceCidr { id: number, name, prefixes, routed } = cidr;
    let prefixes = required("cidr.prefixes", prefixes)?.try_into()?;
    let cidr = SliceCidr { name: parse("cidr.name", &name)?, prefixes, is_routed: routed };
    Ok((id("cidr.id", number, CidrId)?, cidr))
}

fn prefix_from_wire(prefix: v1::SlicePrefix) -> Result<(IpNet, (ClassId, CidrId)), ConvertError> {
    let v1::SlicePrefix { prefix, class, cidr } = prefix;
    let prefix = IpNet::try_from(required("prefix.prefix", prefix)?)?;
    Ok((prefix, (class_from_wire("prefix.class", class)?, id("prefix.cidr", cidr, CidrId)?)))
}

fn class_from_wire(field: &'static str, class: u64) -> Result<ClassId, ConvertError> {
    if class == 0 { Err(ConvertError::Missing { field }) } else { Ok(ClassId(class)) }
}

fn classes(field: &'static str, classes: Vec<u64>) -> Result<Vec<ClassId>, ConvertError> {
    classes.into_iter().map(|class| class_from_wire(field, class)).collect()
}

fn list<T, C: FromIterator<T>>(
    field: &'static str,
    values: Vec<u32>,
    make: impl Fn(u32) -> T,
) -> Result<C, ConvertError> {
    values.into_iter().map(|value| id(field, value, &make)).collect()
}

impl From<&Local> for v1::Local {
    fn from(local: &Local) -> Self {
        let Local { node, name, network, addresses, is_split, roots, external_routes: _, gateway_for, requires } =
            local;
        Self {
            node: node.0,
            name: name.to_string(),
            network: network.to_string(),
            addresses: Some(addresses.into()),
            roots: Some(roots.into()),
            gateway_for: gateway_for.iter().map(v1::Prefix::from).collect(),
            split: *is_split,
            requires: requires.iter().cloned().collect(),
        }
    }
}

impl TryFrom<v1::Local> for Local {
    type Error = ConvertError;

    fn try_from(local: v1::Local) -> Result<Self, Self::Error> {
        let v1::Local { node, name, network, addresses, roots, gateway_for, split, requires } = local;
        Ok(Self {
            node: id("local.node", node, NodeId)?,
            name: parse("local.name", &name)?,
            network: parse("local.network", &network)?,
            addresses: required("local.addresses", addresses)?.try_into()?,
            roots: required("local.roots", roots)?.try_into()?,
            is_split: split,
            external_routes: Default::default(),
            gateway_for: prefixes_to_nets(gateway_for)?,
            requires: requires.into_iter().collect(),
        })
    }
}

fn peer_to_wire(node: NodeId, peer: &Peer) -> v1::Peer {
    let Peer { name, public_key, endpoint, seen: _, allowed_ips } = peer;
    v1::Peer {
        node: node.0,
        name: name.to_string(),
        public_key: public_key.as_bytes().to_vec().into(),
        endpoint: endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default(),
        allowed_ips: allowed_ips.iter().map(v1::Prefix::from).collect(),
    }
}

fn peer_from_wire(peer: v1::Peer) -> Result<(NodeId, Peer), ConvertError> {
    let v1::Peer { node, name, public_key: key, endpoint, allowed_ips } = peer;
    let node = id("peer.node", node, NodeId)?;
    // One by one: of the few that a peer has, a set is not sorted first.
    let mut allowed = BTreeSet::new();
    for prefix in allowed_ips {
        allowed.insert(IpNet::try_from(prefix)?);
    }
    let peer = Peer {
        name: parse("peer.name", &name)?,
        public_key: public_key("peer.public_key", &key)?,
        endpoint: if endpoint.is_empty() { None } else { Some(parse("peer.endpoint", &endpoint)?) },
        seen: None,
        allowed_ips: allowed.into(),
    };
    Ok((node, peer))
}

fn rule_to_wire(id: RuleId, rule: &SliceRule) -> v1::SliceRule {
    let SliceRule { name, action, log, requires } = rule;
    v1::SliceRule {
        id: id.0,
        name: name.to_string(),
        action: v1::Action::from(*action).into(),
        log: *log,
        requires: requires.iter().cloned().collect(),
    }
}

fn rule_from_wire(rule: v1::SliceRule) -> Result<(RuleId, SliceRule), ConvertError> {
    let v1::SliceRule { id: number, name, action: verb, log, requires } = rule;
    let (name, action) = (parse("rule.name", &name)?, action("rule.action", verb)?);
    let rule = SliceRule { name, action, log, requires: requires.into_iter().collect() };
    Ok((id("rule.id", number, RuleId)?, rule))
}

impl From<&Cells> for v1::Cells {
    fn from(cells: &Cells) -> Self {
        let Cells { sources, destinations, cell } = cells;
        let Cell { otherwise, entries } = cell;
        Self {
            sources: sources.iter().map(|class| class.0).collect(),
            destinations: destinations.iter().map(|class| class.0).collect(),
            otherwise: Some(otherwise.into()),
            entries: entries.iter().map(v1::CellEntry::from).collect(),
        }
    }
}

impl TryFrom<v1::Cells> for Cells {
    type Error = ConvertError;

    fn try_from(cells: v1::Cells) -> Result<Self, Self::Error> {
        let v1::Cells { sources, destinations, otherwise, entries } = cells;
        Ok(Self {
            sources: classes("cells.sources", sources)?,
            destinations: classes("cells.destinations", destinations)?,
            cell: Cell {
                otherwise: required("cells.otherwise", otherwise)?.try_into()?,
                entries: entries.into_iter().map(CellEntry::try_from).collect::<Result<_, _>>()?,
            },
        })
    }
}

impl From<&CellEntry> for v1::CellEntry {
    fn from(entry: &CellEntry) -> Self {
        let CellEntry { range: ServiceRange { protocol, low, high }, verdict } = entry;
        Self {
            protocol: u32::from(*protocol),
            low: u32::from(*low),
            high: u32::from(*high),
            verdict: Some(verdict.into()),
        }
    }
}

impl TryFrom<v1::CellEntry> for CellEntry {
    type Error = ConvertError;

    fn try_from(entry: v1::CellEntry) -> Result<Self, Self::Error> {
        let v1::CellEntry { protocol, low, high, verdict } = entry;
        let range = ServiceRange {
            protocol: narrow("entry.protocol", protocol)?,
            low: narrow("entry.low", low)?,
            high: narrow("entry.high", high)?,
        };
        if range.low > range.high {
            return Err(ConvertError::invalid(
                "entry.high",
                range.high,
                format!("it is below the low end, {}", range.low),
            ));
        }
        Ok(Self { range, verdict: required("entry.verdict", verdict)?.try_into()? })
    }
}

impl From<&Verdict> for v1::PolicyVerdict {
    fn from(verdict: &Verdict) -> Self {
        let Verdict { action, reason, rule } = verdict;
        Self {
            action: v1::Action::from(*action).into(),
            reason: v1::PolicyReason::from(*reason).into(),
            rule: rule.map_or(0, |rule| rule.0),
        }
    }
}

impl TryFrom<v1::PolicyVerdict> for Verdict {
    type Error = ConvertError;

    fn try_from(verdict: v1::PolicyVerdict) -> Result<Self, Self::Error> {
        let v1::PolicyVerdict { action: verb, reason: why, rule } = verdict;
        let verdict = Self {
            action: action("verdict.action", verb)?,
            reason: reason("verdict.reason", why)?,
            rule: (rule != 0).then_some(RuleId(rule)),
        };
        match (verdict.reason, verdict.rule) {
            (Reason::Rule, None) => Err(ConvertError::Missing { field: "verdict.rule" }),
            (Reason::Rule, Some(_)) | (_, None) => Ok(verdict),
            (_, Some(rule)) => Err(ConvertError::invalid("verdict.rule", rule, "no rule decided")),
        }
    }
}

impl From<Reason> for v1::PolicyReason {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::Rule => Self::Rule,
            Reason::Lineage => Self::Lineage,
            Reason::NoRule => Self::NoRule,
            Reason::UnknownSource => Self::UnknownSource,
            Reason::UnknownDestination => Self::UnknownDestination,
        }
    }
}

fn reason(field: &'static str, value: i32) -> Result<Reason, ConvertError> {
    match v1::PolicyReason::try_from(value) {
        Ok(v1::PolicyReason::Rule) => Ok(Reason::Rule),
        Ok(v1::PolicyReason::Lineage) => Ok(Reason::Lineage),
        Ok(v1::PolicyReason::NoRule) => Ok(Reason::NoRule),
        Ok(v1::PolicyReason::UnknownSource) => Ok(Reason::UnknownSource),
        Ok(v1::PolicyReason::UnknownDestination) => Ok(Reason::UnknownDestination),
        Ok(v1::PolicyReason::Unspecified) => Err(ConvertError::Missing { field }),
        Err(_) => Err(ConvertError::Unknown { field, value }),
    }
}
