//! What the controller answers, over TLS and over root's Unix socket: three services of its own, health and reflection.

use std::sync::Arc;

use controller_api::defaults::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, MAX_REQUEST, MAX_RESPONSE, REQUEST_TIMEOUT};
use controller_api::v1::admin_server::AdminServer;
use controller_api::v1::enrol_server::EnrolServer;
use controller_api::v1::sync_server::SyncServer;
use host::error::chain;
use tokio::task::JoinSet;
use tonic::service::interceptor::InterceptedService;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::Server;
use tonic::{Code, Status};

use self::frames::Framed;
use crate::access::authority::Authority;
use crate::access::caller::identify;
use crate::access::gate::{Door, Gate};
use crate::access::questions::Questions;
use crate::change::enrol::{InviteError, RedeemError};
use crate::change::request::Refusal;
use crate::change::writer::Writer;
use crate::follow::dispatcher::Dispatch;
use crate::metrics::Metrics;
use crate::socket::connection::Incoming;
use crate::socket::throttle::Throttle;
use crate::socket::tls::Accepts;
use crate::state::Current;
use crate::store::{Store, StoreError};

pub mod admin;
mod archive;
pub mod enrol;
mod frames;
pub mod sync;

/// Calls at one time on one connection: a node has one stream and now and then a call.
const STREAMS: u32 = 64;
/// Bytes of one message of a node, or of somebody who wants to become one: a certificate request of 8 KiB is the largest
/// part of any. Times [`STREAMS`] and connections, this is memory that others decide on.
const SMALL_REQUEST: usize = 16_384;
/// Bytes of a request's headers.
const HEADERS: u32 = 16_384;

/// What every service works with.
#[derive(Clone, Debug)]
pub struct Context {
    pub current: Current,
    pub writer: Writer,
    pub dispatch: Dispatch,
    pub store: Arc<dyn Store>,
    pub authority: Arc<Authority>,
    pub metrics: Arc<Metrics>,
    pub questions: Questions,
    /// Seconds since the epoch.
    pub clock: fn() -> u64,
    /// Becomes true when calls are to be ended.
    pub stop: tokio::sync::watch::Receiver<bool>,
    /// Refused calls that are logged.
    pub refusals: Arc<Throttle>,
}

impl Context {
    fn now(&self) -> u64 {
        (self.clock)()
    }

    /// Whether whoever is behind a connection may call now.
    pub fn accepts(&self) -> Accepts {
        let (current, clock) = (self.current.clone(), self.clock);
        Arc::new(move |principal| identify(principal, &current.get(), clock()).is_ok())
    }

    fn gate(&self, door: Door) -> Gate {
        Gate {
            door,
            current: self.current.clone(),
            metrics: Arc::clone(&self.metrics),
            clock: self.clock,
            refusals: Arc::clone(&self.refusals),
        }
    }
}

/// All services, each behind its gate; enrolment has none.
pub async fn routes(context: &Context) -> Result<Routes, tonic_reflection::server::Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<AdminServer<admin::AdminService>>().await;
    reporter.set_serving::<SyncServer<sync::SyncService>>().await;
    reporter.set_serving::<EnrolServer<enrol::EnrolService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(controller_api::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let admin = AdminServer::new(admin::AdminService::new(context.clone()))
        .max_decoding_message_size(MAX_REQUEST)
        .max_encoding_message_size(MAX_RESPONSE);
    let sync = SyncServer::new(sync::SyncService::new(context.clone()))
        .max_decoding_message_size(SMALL_REQUEST)
        .max_encoding_message_size(MAX_RESPONSE);
    let enrol = EnrolServer::new(enrol::EnrolService::new(context.clone())).max_decoding_message_size(SMALL_REQUEST);
    let mut routes = RoutesBuilder::default();
    routes
        .add_service(InterceptedService::new(admin, context.gate(Door::Admins)))
        .add_service(InterceptedService::new(Framed(sync), context.gate(Door::Nodes)))
        .add_service(enrol)
        .add_service(InterceptedService::new(health, context.gate(Door::Known)))
        .add_service(InterceptedService::new(reflection, context.gate(Door::Known)));
    Ok(routes.routes())
}

/// Serves connections until `stop` is done: then open calls are ended.
pub async fn serve(
    routes: Routes,
    incoming: Vec<Incoming>,
    stop: tokio::sync::watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error> {
    let mut servers = JoinSet::new();
    for incoming in incoming {
        let mut stopped = stop.clone();
        let signal = async move {
            // An error means that whoever could stop us is gone.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let server = server().add_routes(routes.clone()).serve_with_incoming_shutdown(incoming, signal);
        servers.spawn(server);
    }
    while let Some(ended) = servers.join_next().await {
        ended.unwrap_or(Ok(()))?;
    }
    Ok(())
}

fn server() -> Server {
    Server::builder()
        .timeout(REQUEST_TIMEOUT)
        .max_concurrent_streams(STREAMS)
        .http2_max_header_list_size(HEADERS)
        // Nodes probe too, and need to know sooner; both together stay below 1 MB a day and node.
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL * 2))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .trace_fn(|request| tracing::debug_span!("call", path = request.uri().path()))
}

/// A refusal as gRPC says it: the code for programs, the whole text for people.
pub(crate) fn refused(refusal: &Refusal) -> Status {
    let code = match refusal {
        Refusal::Change { .. } | Refusal::Limit(_) | Refusal::NodeLimit(_) => Code::FailedPrecondition,
        Refusal::Count { .. } => Code::InvalidArgument,
        Refusal::Revision { .. } | Refusal::Outrun { .. } => Code::Aborted,
        Refusal::Invite(error) => match error {
            InviteError::UnknownNode { .. } => Code::NotFound,
            InviteError::NotInvitable { .. } => Code::FailedPrecondition,
            InviteError::TooLong { .. } => Code::InvalidArgument,
        },
        Refusal::Redeem(error) => match error {
            RedeemError::Unknown { .. } => Code::NotFound,
            RedeemError::Expired { .. } | RedeemError::NotActive { .. } | RedeemError::Change(_) => {
                Code::FailedPrecondition
            }
            RedeemError::OtherKeys { .. } | RedeemError::Replaced { .. } => Code::PermissionDenied,
            RedeemError::WireGuardKey { .. } => Code::InvalidArgument,
        },
        Refusal::NoNode { .. } | Refusal::UnknownAdmin { .. } => Code::NotFound,
        Refusal::NoKey { .. } | Refusal::NoAdminKey { .. } => Code::PermissionDenied,
        Refusal::Store(error) => store_code(error),
        Refusal::NotWritten(error) => store_code(error),
        Refusal::Stopping => Code::Unavailable,
    };
    Status::new(code, chain(refusal))
}

fn store_code(error: &StoreError) -> Code {
    match error {
        StoreError::Moved { .. } | StoreError::Conflict { .. } | StoreError::AfterRefused => Code::Aborted,
        StoreError::NotKept { .. } | StoreError::NotYet { .. } => Code::OutOfRange,
        StoreError::RequestReused { .. } => Code::AlreadyExists,
        StoreError::TooLong { .. } => Code::InvalidArgument,
        StoreError::Full { .. } => Code::ResourceExhausted,
        StoreError::Unwanted => Code::Cancelled,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use policy::Change;

    use super::*;
    use crate::change::Request;
    use crate::change::audit::Actor;
    use crate::change::draft::Draft;
    use crate::fixture::{NOW, add_cidr, network, parse, state};

    fn said(changes: Vec<Change>) -> String {
        let mut draft = Draft::of(&state(1, &network()));
        let refusal = draft.apply(&Actor::Root, &Request::Change(changes), NOW).expect_err("refused");
        refused(&refusal).message().to_owned()
    }

    #[test]
    fn a_refusal_says_its_reason_once() {
        let reason = network().apply(&Change::DeleteCidr { name: parse("nosuch") }).expect_err("refused").to_string();
        let delete = Change::DeleteCidr { name: parse("nosuch") };
        assert_eq!(said(vec![delete.clone()]), reason);
        assert_eq!(said(vec![add_cidr("lab", "10.42.9.0/24"), delete]), format!("change 2 of 2: {reason}"));
        let full = Refusal::Limit(policy::LimitError { what: policy::Bounded::Classes, count: 3, limit: 2 });
        assert_eq!(refused(&full).message().matches("classes of addresses").count(), 1);
    }

    #[test]
    fn a_node_without_room_is_named_with_the_remedy() {
        let limit = policy::LimitError { what: policy::Bounded::SlicePages, count: 1_025, limit: 1_024 };
        let refusal = Refusal::from(policy::NodeLimitError { node: parse("web1"), limit });
        assert_eq!(
            refused(&refusal).message(),
            "policy asks too much of node `web1`: 1025 sets of services in one node's slice are more than the 1024 that \
             there is room for; let more of the rules that one node is an end of share their services"
        );
    }
}
