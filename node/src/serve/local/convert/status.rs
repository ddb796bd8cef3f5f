//! The node as a whole, and its peers.

use super::super::v1;
use super::{ConvertError, all, narrow, parse_all, parse_some, print_all, print_some, required, wired};
use crate::view::{Controller, Guard, GuardAttachment, Peer, PeerState, Program, Status};

impl From<Status> for v1::Status {
    fn from(status: Status) -> Self {
        let Status {
            network,
            node,
            interface,
            version,
            addresses,
            wireguard,
            listen_port,
            public_key,
            link_up,
            attachment,
            early_drop,
            programs,
            revision,
            generation,
            received_revision,
            controller,
            peers,
            flow_records,
            guard,
            drift_repairs,
            certificate_expires_at,
            lacks,
            error,
        } = status;
        Self {
            network,
            node,
            interface,
            version,
            addresses: print_all(&addresses),
            wireguard,
            listen_port: listen_port.into(),
            public_key,
            link_up,
            attachment,
            early_drop,
            programs: wired(programs),
            revision,
            generation,
            received_revision,
            controller: Some(controller.into()),
            peers: peers as u64,
            flow_records: flow_records as u64,
            guard: Some(guard.into()),
            drift_repairs,
            certificate_expires_at,
            lacks,
            error,
        }
    }
}

impl TryFrom<v1::Status> for Status {
    type Error = ConvertError;

    fn try_from(status: v1::Status) -> Result<Self, Self::Error> {
        let v1::Status {
            network,
            node,
            interface,
            version,
            addresses,
            wireguard,
            listen_port,
            public_key,
            link_up,
            attachment,
            early_drop,
            programs,
            revision,
            generation,
            received_revision,
            controller,
            peers,
            flow_records,
            guard,
            drift_repairs,
            certificate_expires_at,
            lacks,
            error,
        } = status;
        Ok(Self {
            network,
            node,
            interface,
            version,
            addresses: parse_all("status.addresses", &addresses)?,
            wireguard,
            listen_port: narrow("status.listen_port", listen_port)?,
            public_key,
            link_up,
            attachment,
            early_drop,
            programs: all(programs)?,
            revision,
            generation,
            received_revision,
            controller: required("status.controller", controller)?.into(),
            peers: narrow("status.peers", peers)?,
            flow_records: narrow("status.flow_records", flow_records)?,
            guard: required("status.guard", guard)?.try_into()?,
            drift_repairs,
            certificate_expires_at,
            lacks,
            error,
        })
    }
}

impl From<Program> for v1::Program {
    fn from(Program { hook, position, id, name, ours }: Program) -> Self {
        Self { hook, position: position as u64, id, name, ours }
    }
}

impl TryFrom<v1::Program> for Program {
    type Error = ConvertError;

    fn try_from(v1::Program { hook, position, id, name, ours }: v1::Program) -> Result<Self, Self::Error> {
        Ok(Self { hook, position: narrow("program.position", position)?, id, name, ours })
    }
}

impl From<Controller> for v1::Controller {
    fn from(Controller { connected, endpoints, since, error }: Controller) -> Self {
        Self { connected, endpoints, since, error }
    }
}

impl From<v1::Controller> for Controller {
    fn from(v1::Controller { connected, endpoints, since, error }: v1::Controller) -> Self {
        Self { connected, endpoints, since, error }
    }
}

impl From<Guard> for v1::Guard {
    fn from(Guard { enabled, error, attachments }: Guard) -> Self {
        Self { enabled, error, attachments: wired(attachments) }
    }
}

impl TryFrom<v1::Guard> for Guard {
    type Error = ConvertError;

    fn try_from(v1::Guard { enabled, error, attachments }: v1::Guard) -> Result<Self, Self::Error> {
        Ok(Self { enabled, error, attachments: all(attachments)? })
    }
}

impl From<GuardAttachment> for v1::GuardAttachment {
    fn from(GuardAttachment { interface, hook, ahead, note, passed, dropped }: GuardAttachment) -> Self {
        Self { interface, hook, ahead: ahead as u64, note, passed, dropped }
    }
}

impl TryFrom<v1::GuardAttachment> for GuardAttachment {
    type Error = ConvertError;

    fn try_from(attachment: v1::GuardAttachment) -> Result<Self, Self::Error> {
        let v1::GuardAttachment { interface, hook, ahead, note, passed, dropped } = attachment;
        Ok(Self { interface, hook, ahead: narrow("guard.ahead", ahead)?, note, passed, dropped })
    }
}

impl From<Vec<Peer>> for v1::PeersResponse {
    fn from(peers: Vec<Peer>) -> Self {
        Self { peers: wired(peers) }
    }
}

impl TryFrom<v1::PeersResponse> for Vec<Peer> {
    type Error = ConvertError;

    fn try_from(v1::PeersResponse { peers }: v1::PeersResponse) -> Result<Self, Self::Error> {
        all(peers)
    }
}

impl From<Peer> for v1::Peer {
    fn from(peer: Peer) -> Self {
        let Peer { name, public_key, endpoint, allowed_ips, latest_handshake, received_bytes, sent_bytes, state } =
            peer;
        let state = match state {
            PeerState::Ok => v1::PeerState::Ok,
            PeerState::Missing => v1::PeerState::Missing,
            PeerState::Unknown => v1::PeerState::Unknown,
            PeerState::Differs => v1::PeerState::Differs,
        };
        Self {
            name,
            public_key,
            endpoint: print_some(endpoint),
            allowed_ips: print_all(&allowed_ips),
            latest_handshake,
            received_bytes,
            sent_bytes,
            state: state.into(),
        }
    }
}

impl TryFrom<v1::Peer> for Peer {
    type Error = ConvertError;

    fn try_from(peer: v1::Peer) -> Result<Self, Self::Error> {
        let v1::Peer { name, public_key, endpoint, allowed_ips, latest_handshake, received_bytes, sent_bytes, state } =
            peer;
        let state = match v1::PeerState::try_from(state) {
            Ok(v1::PeerState::Ok) => PeerState::Ok,
            Ok(v1::PeerState::Missing) => PeerState::Missing,
            Ok(v1::PeerState::Unknown) => PeerState::Unknown,
            Ok(v1::PeerState::Differs) => PeerState::Differs,
            Ok(v1::PeerState::Unspecified) | Err(_) => {
                return Err(ConvertError::Unknown { field: "peer.state", value: state });
            }
        };
        Ok(Self {
            name,
            public_key,
            endpoint: parse_some("peer.endpoint", endpoint)?,
            allowed_ips: parse_all("peer.allowed_ips", &allowed_ips)?,
            latest_handshake,
            received_bytes,
            sent_bytes,
            state,
        })
    }
}
