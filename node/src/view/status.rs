//! The node as a whole and its peers, read from its kernel at the moment of the question.

use std::collections::{BTreeMap, BTreeSet};

use ebpf_common::underlay;
use host::clock::seconds;
use host::error::chain;

use super::{Guard, GuardAttachment, Peer, PeerState, Status, Unanswered};
use crate::enforce::Enforcer;
use crate::enforce::guard::Watch;
use crate::kernel::guard;
use crate::kernel::{AttachMethod, Backend, EarlyDrop, KernelError};

/// What the agent knows and the kernel does not.
#[derive(Clone, Debug)]
pub struct Context {
    pub network: String,
    pub node: String,
    pub interface: String,
    pub listen_port: u16,
    pub received_revision: u64,
    pub controller: crate::view::Controller,
    pub certificate_expires_at: u64,
}

pub(super) fn unanswered(error: KernelError) -> Unanswered {
    Unanswered::Kernel(chain(&error))
}

/// `nodectl status`.
pub fn status(enforcer: &mut Enforcer, context: &Context) -> Result<Status, Unanswered> {
    let observed = enforcer.observe().map_err(unanswered)?;
    let flow_records = enforcer.datapath.flow_records().unwrap_or(0);
    let attached = observed.datapath.as_ref().filter(|datapath| datapath.egress && datapath.ingress);
    let guard = guard(&mut enforcer.guard);
    let slice = enforcer.intent.as_ref().map(|intent| &intent.slice);
    Ok(Status {
        network: context.network.clone(),
        node: slice.map_or_else(|| context.node.clone(), |slice| slice.local.name.to_string()),
        interface: context.interface.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        addresses: slice.map(|slice| slice.local.addresses.iter().collect()).unwrap_or_default(),
        wireguard: match enforcer.wireguard.backend() {
            Backend::Kernel => "kernel".to_owned(),
            Backend::Userspace => "userspace".to_owned(),
        },
        listen_port: context.listen_port,
        public_key: enforcer.public_key().to_string(),
        link_up: observed.link.as_ref().is_some_and(|link| link.up),
        attachment: attached.map(|datapath| match datapath.attachment {
            AttachMethod::Tcx => "tcx".to_owned(),
            AttachMethod::Clsact => "clsact".to_owned(),
        }),
        early_drop: match observed.datapath.as_ref().map(|datapath| &datapath.early_drop) {
            None | Some(EarlyDrop::Off) => "off".to_owned(),
            Some(EarlyDrop::On) => "on".to_owned(),
            Some(EarlyDrop::Failed(error)) => error.clone(),
        },
        programs: programs(enforcer).map_err(unanswered)?,
        revision: observed.datapath.as_ref().map_or(0, |datapath| datapath.revision.0),
        generation: observed.datapath.as_ref().map_or(0, |datapath| datapath.generation.0),
        received_revision: context.received_revision,
        controller: context.controller.clone(),
        peers: observed.device.as_ref().map_or(0, |device| device.peers.len()),
        flow_records,
        guard,
        drift_repairs: enforcer.repairs.values().sum(),
        certificate_expires_at: context.certificate_expires_at,
        lacks: enforcer.lacks.clone(),
        error: enforcer.refused.clone().or_else(|| enforcer.error.clone()),
    })
}

fn guard(watch: &mut Watch) -> Guard {
    let (counters, unread) = match watch.counters() {
        Ok(counters) => (counters, None),
        Err(error) => (BTreeMap::new(), Some(error)),
    };
    let attachment = |place: &guard::GuardAttachment| {
        let mut here = GuardAttachment {
            interface: place.interface.clone(),
            hook: place.hook.map(|hook| hook.to_string()),
            ahead: place.ahead,
            note: place.note.clone(),
            passed: 0,
            dropped: BTreeMap::new(),
        };
        let own =
            counters.iter().filter(|((interface, _), counter)| *interface == place.interface && counter.packets > 0);
        for ((_, number), counter) in own {
            if underlay::reason::passes(*number) {
                here.passed += counter.packets;
            } else {
                here.dropped.insert(underlay::reason::name(*number).to_owned(), counter.packets);
            }
        }
        here
    };
    Guard {
        enabled: watch.is_wanted(),
        error: watch.error().map(str::to_owned).or(unread),
        attachments: watch.attachments().iter().map(attachment).collect(),
    }
}

fn programs(enforcer: &mut Enforcer) -> Result<Vec<crate::view::Program>, KernelError> {
    let shown = |program: crate::kernel::Program| {
        let crate::kernel::Program { attachment, position, id, name, ours } = program;
        crate::view::Program { hook: attachment.to_string(), position, id, name, ours }
    };
    Ok(enforcer.datapath.programs()?.into_iter().map(shown).collect())
}

/// `nodectl peers`.
pub fn peers(enforcer: &mut Enforcer) -> Result<Vec<Peer>, Unanswered> {
    let device = enforcer.observe().map_err(unanswered)?.device.unwrap_or_default();
    let wanted = enforcer.peers();
    let names: BTreeMap<_, _> = enforcer
        .intent
        .iter()
        .flat_map(|intent| intent.slice.peers.values())
        .map(|peer| (peer.public_key, peer.name.to_string()))
        .collect();
    let keys: BTreeSet<_> = wanted.keys().chain(device.peers.keys()).copied().collect();
    let mut peers: Vec<_> = keys
        .into_iter()
        .map(|key| {
            let (wanted, seen) = (wanted.get(&key), device.peers.get(&key));
            let state = match (wanted, seen) {
                (None, _) => PeerState::Unknown,
                (_, None) => PeerState::Missing,
                (Some(wanted), Some(seen)) if wanted.allowed_ips == seen.allowed_ips => PeerState::Ok,
                _ => PeerState::Differs,
            };
            let allowed_ips = seen.map(|seen| &seen.allowed_ips).or(wanted.map(|wanted| &wanted.allowed_ips));
            Peer {
                name: names.get(&key).cloned(),
                public_key: key.to_string(),
                endpoint: seen.and_then(|seen| seen.endpoint).or(wanted.and_then(|wanted| wanted.endpoint)),
                allowed_ips: allowed_ips.map(|ips| ips.iter().copied().collect()).unwrap_or_default(),
                latest_handshake: seen.and_then(|seen| seen.last_handshake).and_then(seconds),
                received_bytes: seen.map_or(0, |seen| seen.received_bytes),
                sent_bytes: seen.map_or(0, |seen| seen.sent_bytes),
                state,
            }
        })
        .collect();
    peers.sort_by(|a, b| (a.name.is_none(), &a.name).cmp(&(b.name.is_none(), &b.name)));
    Ok(peers)
}
