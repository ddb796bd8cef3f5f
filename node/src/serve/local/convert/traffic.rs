//! Denied packets and live flows.

use super::super::v1;
use super::{
    ConvertError, address, all, direction, direction_to_wire, narrow, narrow_some, parse_some, print_some, wired,
};
use crate::view::{DropFilter, DropRecord, Drops, Event, FlowFilter, FlowState, Flows, LiveFlow, Suppressed};

impl From<DropFilter> for v1::DropFilter {
    fn from(DropFilter { reason, source, destination }: DropFilter) -> Self {
        Self { reason, source: print_some(source), destination: print_some(destination) }
    }
}

impl TryFrom<v1::DropFilter> for DropFilter {
    type Error = ConvertError;

    fn try_from(v1::DropFilter { reason, source, destination }: v1::DropFilter) -> Result<Self, Self::Error> {
        Ok(Self {
            reason,
            source: parse_some("filter.source", source)?,
            destination: parse_some("filter.destination", destination)?,
        })
    }
}

impl From<Drops> for v1::ListDropsResponse {
    fn from(Drops { drops, forgotten, suppressed }: Drops) -> Self {
        Self { drops: wired(drops), forgotten, suppressed: wired(suppressed) }
    }
}

impl TryFrom<v1::ListDropsResponse> for Drops {
    type Error = ConvertError;

    fn try_from(drops: v1::ListDropsResponse) -> Result<Self, Self::Error> {
        let v1::ListDropsResponse { drops, forgotten, suppressed } = drops;
        Ok(Self { drops: all(drops)?, forgotten, suppressed: suppressed.into_iter().map(Suppressed::from).collect() })
    }
}

impl From<DropRecord> for v1::FollowDropsResponse {
    fn from(record: DropRecord) -> Self {
        use v1::follow_drops_response::Kind;
        let kind = match record {
            DropRecord::Drop(event) => Kind::Drop(event.into()),
            DropRecord::Suppressed(suppressed) => Kind::Suppressed(suppressed.into()),
            DropRecord::Forgotten { events } => Kind::Forgotten(events),
            DropRecord::Missed { records } => Kind::Missed(records),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::follow_drops_response::Kind> for DropRecord {
    type Error = ConvertError;

    fn try_from(kind: v1::follow_drops_response::Kind) -> Result<Self, Self::Error> {
        use v1::follow_drops_response::Kind;
        Ok(match kind {
            Kind::Drop(event) => Self::Drop(event.try_into()?),
            Kind::Suppressed(suppressed) => Self::Suppressed(suppressed.into()),
            Kind::Forgotten(events) => Self::Forgotten { events },
            Kind::Missed(records) => Self::Missed { records },
        })
    }
}

impl From<Event> for v1::Event {
    fn from(event: Event) -> Self {
        let Event {
            time,
            direction,
            interface,
            source,
            destination,
            protocol,
            source_port,
            destination_port,
            service,
            source_cidr,
            destination_cidr,
            reason,
            rule,
            revision,
            length,
        } = event;
        Self {
            time,
            direction: direction_to_wire(direction),
            interface,
            source: source.to_string(),
            destination: destination.to_string(),
            protocol: protocol.into(),
            source_port: source_port.map(u32::from),
            destination_port: destination_port.map(u32::from),
            service,
            source_cidr,
            destination_cidr,
            reason,
            rule,
            revision,
            length,
        }
    }
}

impl TryFrom<v1::Event> for Event {
    type Error = ConvertError;

    fn try_from(event: v1::Event) -> Result<Self, Self::Error> {
        let v1::Event {
            time,
            direction: at,
            interface,
            source,
            destination,
            protocol,
            source_port,
            destination_port,
            service,
            source_cidr,
            destination_cidr,
            reason,
            rule,
            revision,
            length,
        } = event;
        Ok(Self {
            time,
            direction: direction("event.direction", at)?,
            interface,
            source: address("event.source", &source)?,
            destination: address("event.destination", &destination)?,
            protocol: narrow("event.protocol", protocol)?,
            source_port: narrow_some("event.source_port", source_port)?,
            destination_port: narrow_some("event.destination_port", destination_port)?,
            service,
            source_cidr,
            destination_cidr,
            reason,
            rule,
            revision,
            length,
        })
    }
}

impl From<Suppressed> for v1::Suppressed {
    fn from(Suppressed { reason, events, since_last }: Suppressed) -> Self {
        Self { reason, events, since_last }
    }
}

impl From<v1::Suppressed> for Suppressed {
    fn from(v1::Suppressed { reason, events, since_last }: v1::Suppressed) -> Self {
        Self { reason, events, since_last }
    }
}

impl From<FlowFilter> for v1::ListFlowsRequest {
    fn from(FlowFilter { address, limit }: FlowFilter) -> Self {
        Self { address: print_some(address), limit: limit as u64 }
    }
}

impl TryFrom<v1::ListFlowsRequest> for FlowFilter {
    type Error = ConvertError;

    fn try_from(v1::ListFlowsRequest { address, limit }: v1::ListFlowsRequest) -> Result<Self, Self::Error> {
        Ok(Self { address: parse_some("address", address)?, limit: narrow("limit", limit)? })
    }
}

impl From<Flows> for v1::ListFlowsResponse {
    fn from(Flows { total, matching, flows }: Flows) -> Self {
        Self { total: total as u64, matching: matching as u64, flows: wired(flows) }
    }
}

impl TryFrom<v1::ListFlowsResponse> for Flows {
    type Error = ConvertError;

    fn try_from(flows: v1::ListFlowsResponse) -> Result<Self, Self::Error> {
        let v1::ListFlowsResponse { total, matching, flows } = flows;
        Ok(Self {
            total: narrow("flows.total", total)?,
            matching: narrow("flows.matching", matching)?,
            flows: all(flows)?,
        })
    }
}

impl From<LiveFlow> for v1::Flow {
    fn from(flow: LiveFlow) -> Self {
        let LiveFlow {
            direction,
            source,
            destination,
            protocol,
            source_port,
            destination_port,
            service,
            source_cidr,
            destination_cidr,
            state,
            reason,
            rule,
            age,
            idle,
            expires_in,
            packets,
            bytes,
            reply_packets,
            reply_bytes,
        } = flow;
        Self {
            direction: direction.map(direction_to_wire),
            source: source.to_string(),
            destination: destination.to_string(),
            protocol: protocol.into(),
            source_port: source_port.map(u32::from),
            destination_port: destination_port.map(u32::from),
            service,
            source_cidr,
            destination_cidr,
            state: state_to_wire(state),
            reason,
            rule,
            age,
            idle,
            expires_in,
            packets,
            bytes,
            reply_packets,
            reply_bytes,
        }
    }
}

impl TryFrom<v1::Flow> for LiveFlow {
    type Error = ConvertError;

    fn try_from(flow: v1::Flow) -> Result<Self, Self::Error> {
        let v1::Flow {
            direction: at,
            source,
            destination,
            protocol,
            source_port,
            destination_port,
            service,
            source_cidr,
            destination_cidr,
            state: stands,
            reason,
            rule,
            age,
            idle,
            expires_in,
            packets,
            bytes,
            reply_packets,
            reply_bytes,
        } = flow;
        Ok(Self {
            direction: at.map(|at| direction("flow.direction", at)).transpose()?,
            source: address("flow.source", &source)?,
            destination: address("flow.destination", &destination)?,
            protocol: narrow("flow.protocol", protocol)?,
            source_port: narrow_some("flow.source_port", source_port)?,
            destination_port: narrow_some("flow.destination_port", destination_port)?,
            service,
            source_cidr,
            destination_cidr,
            state: state("flow.state", stands)?,
            reason,
            rule,
            age,
            idle,
            expires_in,
            packets,
            bytes,
            reply_packets,
            reply_bytes,
        })
    }
}

fn state_to_wire(state: FlowState) -> i32 {
    let state = match state {
        FlowState::Opening => v1::FlowState::Opening,
        FlowState::Established => v1::FlowState::Established,
        FlowState::Closing => v1::FlowState::Closing,
        FlowState::Revoked => v1::FlowState::Revoked,
    };
    state.into()
}

fn state(field: &'static str, value: i32) -> Result<FlowState, ConvertError> {
    match v1::FlowState::try_from(value) {
        Ok(v1::FlowState::Opening) => Ok(FlowState::Opening),
        Ok(v1::FlowState::Established) => Ok(FlowState::Established),
        Ok(v1::FlowState::Closing) => Ok(FlowState::Closing),
        Ok(v1::FlowState::Revoked) => Ok(FlowState::Revoked),
        Ok(v1::FlowState::Unspecified) | Err(_) => Err(ConvertError::Unknown { field, value }),
    }
}
