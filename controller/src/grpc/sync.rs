//! What nodes follow.

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::{Duration, Instant};

use controller_api::convert::address_from_wire;
use controller_api::defaults::{NODE_CERTIFICATE_LIFETIME, UPDATE_QUEUE};
use controller_api::identity::Identity;
use controller_api::refusal::Refusal;
use controller_api::v1;
use controller_api::v1::follow_request::Kind;
use controller_api::v1::sync_server::Sync;
use policy::{Flow, Generation, Revision, SliceDelta};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::gate::{Caller, NodeCaller, identify};
use super::listener::Peer;
use super::{Context, refused, text};
use crate::audit::Actor;
use crate::authority::CertificateRequest;
use crate::intent::Intent;
use crate::metrics;
use crate::publish::{Follow, Replaced, Reporter, Step};
use crate::writer::Ask;

/// How long a node may take to say hello on its stream.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Characters of an agent's version that are kept.
const VERSION_MAX: usize = 64;

/// The service `Sync`.
#[derive(Debug)]
pub struct SyncService {
    context: Context,
}

impl SyncService {
    pub fn new(context: Context) -> Self {
        Self { context }
    }
}

/// The node that calls; the gate has put it there.
fn node<T>(request: &Request<T>) -> Result<NodeCaller, Status> {
    match request.extensions().get::<Caller>() {
        Some(Caller::Node(node)) => Ok(node.clone()),
        _ => Err(Status::internal("call came past its gate; report this as a bug")),
    }
}

type Updates = mpsc::Sender<Result<v1::Update, Status>>;

#[tonic::async_trait]
impl Sync for SyncService {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<v1::Update, Status>> + Send>>;

    async fn follow(
        &self,
        request: Request<Streaming<v1::FollowRequest>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let node = node(&request)?;
        let requests = request.into_inner();
        let (updates, receiver) = mpsc::channel(UPDATE_QUEUE);
        let session = Session { context: self.context.clone(), node, updates };
        tokio::spawn(session.run(requests));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::RenewResponse>, Status> {
        let node = node(&request)?;
        let v1::RenewRequest { certificate_request } = request.into_inner();
        let request =
            CertificateRequest::parse(&certificate_request).map_err(|error| Status::invalid_argument(text(&error)))?;
        let intent = Intent::Rekey { node: node.id, shown: node.certificate.key, requested: request.key() };
        let ask = Ask::new(Actor::Node(node.name), intent);
        self.context.writer.ask(ask).await.map_err(|refusal| refused(&refusal))?;
        let certificate = self
            .context
            .authority
            .sign(&request, &Identity::Node(node.id), self.context.now(), NODE_CERTIFICATE_LIFETIME)
            .map_err(|error| Status::internal(text(&error)))?;
        Ok(Response::new(v1::RenewResponse { certificate }))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        node(&request)?;
        let v1::ExplainRequest { source, destination, protocol, port } = request.into_inner();
        let invalid = |field: &str, value: u32, max: u32| {
            Status::invalid_argument(format!("`{field}` is `{value}`; it must be 0 to {max}"))
        };
        let wrong = |error: controller_api::ConvertError| Status::invalid_argument(text(&error));
        let flow = Flow {
            source: address_from_wire("source", &source).map_err(wrong)?,
            destination: address_from_wire("destination", &destination).map_err(wrong)?,
            protocol: u8::try_from(protocol).map_err(|_| invalid("protocol", protocol, 255))?,
            port: u16::try_from(port).map_err(|_| invalid("port", port, 65_535))?,
        };
        let state = self.context.current.get();
        let verdict = policy::interpret(&state.network, &flow);
        let cidr = |address| state.network.cidr_of(address).map(|cidr| cidr.name.to_string()).unwrap_or_default();
        let rule = verdict.rule.and_then(|rule| state.network.rules().get(&rule));
        Ok(Response::new(v1::ExplainResponse {
            revision: state.revision.0,
            verdict: Some(v1::PolicyVerdict::from(&verdict)),
            source_cidr: cidr(flow.source),
            destination_cidr: cidr(flow.destination),
            rule: rule.map(|rule| rule.name.to_string()).unwrap_or_default(),
        }))
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        let node = node(&request)?;
        let ask = Ask::new(Actor::Node(node.name), Intent::Leave(node.id));
        self.context.writer.ask(ask).await.map_err(|refusal| refused(&refusal))?;
        Ok(Response::new(v1::LeaveResponse {}))
    }
}

/// One stream of one node.
struct Session {
    context: Context,
    node: NodeCaller,
    updates: Updates,
}

impl Session {
    #[tracing::instrument(name = "follow", skip_all, fields(node = %self.node.name))]
    async fn run(self, mut requests: Streaming<v1::FollowRequest>) {
        let hello = match timeout(HELLO_TIMEOUT, requests.message()).await {
            Ok(Ok(Some(v1::FollowRequest { kind: Some(Kind::Hello(hello)) }))) => hello,
            Ok(Ok(None) | Err(_)) => return,
            Ok(Ok(Some(_))) => {
                return self.end(Status::invalid_argument("stream does not begin with a hello; upgrade `noded`"));
            }
            Err(_) => return self.end(Status::deadline_exceeded("node did not say hello in time; it tries again")),
        };
        let v1::Hello { revision, listen_port, endpoint, version } = hello;
        let version = version.chars().take(VERSION_MAX).collect();
        let address = match observed(&self.node, listen_port, &endpoint) {
            Ok(address) => address,
            Err(status) => return self.end(status),
        };
        if let Some(address) = address {
            self.observe(address);
        }
        let now = self.context.now();
        let (follow, replaced) = self.context.followers.open(self.node.id, Revision(revision), version, now);
        tracing::info!(held = revision, "a node follows");
        let reporter = follow.reporter();
        let mut stop = self.context.stop.clone();
        let status = tokio::select! {
            status = self.push(follow, replaced) => status,
            status = self.listen(requests, reporter) => status,
            _ = stop.wait_for(|stop| *stop) => Some(Status::unavailable("controller is stopping; connect again")),
        };
        match status {
            Some(status) => {
                tracing::info!(reason = status.message(), "a node was sent away");
                self.end(status);
            }
            None => tracing::info!("a node is gone"),
        }
    }

    /// The stored endpoint follows without the node waiting for it.
    fn observe(&self, address: SocketAddr) {
        let ask = Ask::new(Actor::Node(self.node.name.clone()), Intent::Observe { node: self.node.id, address });
        let writer = self.context.writer.clone();
        tokio::spawn(async move {
            if let Err(error) = writer.ask(ask).await {
                tracing::warn!(%error, %address, "an observed endpoint was not stored");
            }
        });
    }

    /// Sends what concerns the node, until it is gone (`None`) or must go.
    async fn push(&self, mut follow: Follow, mut replaced: Replaced) -> Option<Status> {
        let mut current = self.context.current.clone();
        let lifetime = self.node.certificate.expires_at.saturating_sub(self.context.now());
        let expired = tokio::time::sleep(Duration::from_secs(lifetime));
        tokio::pin!(expired);
        loop {
            if self.updates.capacity() == 0 {
                self.context.metrics.slow_nodes.inc();
            }
            // Room first, the newest state then: what came meanwhile is one update.
            let room = tokio::select! {
                room = self.updates.reserve() => room.ok()?,
                () = replaced.wait() => return Some(taken_over()),
            };
            let state = current.take();
            let peer = Peer::Certified {
                address: SocketAddr::new(self.node.address, 0),
                certificate: self.node.certificate.clone(),
            };
            let refused = identify(&peer, &state, self.context.now()).err();
            let start = Instant::now();
            let step = match &refused {
                None => follow.step(&state),
                Some(status) if Refusal::of(status).is_some() => follow.dismiss(&state),
                Some(_) => return refused,
            };
            metrics::since(&self.context.metrics.publish_seconds, start);
            match step {
                Step::Nothing => {}
                Step::Send(delta) => room.send(Ok(self.update(&delta))),
                Step::Dismiss(last) => {
                    if let Some(delta) = last {
                        room.send(Ok(self.update(&delta)));
                    }
                    return refused.or_else(|| Some(not_active(&self.node)));
                }
                Step::Replaced => return Some(taken_over()),
            }
            tokio::select! {
                more = current.changed() => if !more { return Some(Status::unavailable("controller is stopping")) },
                () = replaced.wait() => return Some(taken_over()),
                () = self.updates.closed() => return None,
                () = &mut expired => {
                    return Some(Status::unauthenticated("certificate has expired; connect again with a new one"));
                }
            }
        }
    }

    fn update(&self, delta: &SliceDelta) -> v1::Update {
        let update = v1::Update::from(delta);
        let kind = if delta.from == Revision(0) { metrics::Update::Snapshot } else { metrics::Update::Delta };
        self.context.metrics.update(kind, update.encoded_len());
        update
    }

    /// Hears what the node enforces.
    async fn listen(&self, mut requests: Streaming<v1::FollowRequest>, reporter: Reporter) -> Option<Status> {
        loop {
            let acknowledgement = match requests.message().await {
                Ok(Some(v1::FollowRequest { kind: Some(Kind::Acknowledgement(acknowledgement)) })) => acknowledgement,
                Ok(Some(_)) => {
                    return Some(Status::invalid_argument("node said something else than an acknowledgement"));
                }
                Ok(None) => return None,
                Err(status) => {
                    tracing::debug!(reason = status.message(), "a stream broke");
                    return None;
                }
            };
            let v1::Acknowledgement { revision, generation, error } = acknowledgement;
            if !error.is_empty() {
                tracing::warn!(revision, error, "a node cannot enforce what it was sent");
            }
            let now = self.context.now();
            if let Err(error) = reporter.acknowledge(Revision(revision), Generation(generation), &error, now) {
                return Some(Status::invalid_argument(text(&error)));
            }
        }
    }

    /// The last word, unless the queue is full: then the stream just ends.
    fn end(&self, status: Status) {
        let _ = self.updates.try_send(Err(status));
    }
}

fn not_active(node: &NodeCaller) -> Status {
    Refusal::NotActive.mark(Status::permission_denied(format!("node `{}` is not active", node.name)))
}

fn taken_over() -> Status {
    Status::aborted(
        "another connection of this node took over; if there is only one `noded`, its keys were copied: invite the node again",
    )
}

/// Where the node is reached: where it says, else where it calls from.
fn observed(node: &NodeCaller, listen_port: u32, endpoint: &str) -> Result<Option<SocketAddr>, Status> {
    if !endpoint.is_empty() {
        let address = endpoint.parse().map_err(|_| {
            Status::invalid_argument(format!(
                "endpoint `{endpoint}` is no address with a port; write `192.0.2.1:51820` or `[2001:db8::1]:51820`"
            ))
        })?;
        return Ok(Some(address));
    }
    let port = u16::try_from(listen_port).map_err(|_| {
        Status::invalid_argument(format!("listen port `{listen_port}` is no port; it must be 1 to 65535"))
    })?;
    Ok((port != 0).then(|| SocketAddr::new(node.address, port)))
}
