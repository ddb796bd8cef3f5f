//! What nodes follow.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use controller_api::convert::{address_from_wire, digest_from_wire};
use controller_api::defaults::{NODE_CERTIFICATE_LIFETIME, UPDATE_QUEUE};
use controller_api::identity::Identity;
use controller_api::refusal::Refusal;
use controller_api::v1;
use controller_api::v1::follow_request::Kind;
use controller_api::v1::sync_server::Sync;
use host::error::chain;
use policy::{Flow, Generation, Network, NodeId, Revision};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use tokio_stream::Empty;
use tonic::{Request, Response, Status, Streaming};

use super::frames::Frames;
use super::{Context, refused};
use crate::access::authority::CertificateRequest;
use crate::access::caller::{Caller, NodeCaller, identify};
use crate::access::questions::Cost;
use crate::change;
use crate::change::audit::Actor;
use crate::change::writer::Ask;
use crate::follow::dispatcher::{End, Follower, Queued};
use crate::follow::report::{ERROR_MAX, Said, StreamId};
use crate::socket::principal::Principal;
use crate::socket::throttle::Throttle;
use crate::state::State;

/// How long a node may take to say hello on its stream.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an agent's version that are kept.
const VERSION_MAX: usize = 64;
/// Features that a node lacks, of which note is taken.
const LACKS_MAX: usize = 16;
/// How long a node that has no part any more, and does not read, has to hear its last word.
const LAST_WORD: Duration = Duration::from_secs(5);

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

type Queue = mpsc::Sender<Queued>;

#[tonic::async_trait]
impl Sync for SyncService {
    /// The queue is sent by [`super::frames`].
    type FollowStream = Empty<Queued>;

    async fn follow(
        &self,
        request: Request<Streaming<v1::FollowRequest>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let node = node(&request)?;
        self.context.questions.pace(&Caller::Node(node.clone()))?;
        let requests = request.into_inner();
        let (queue, receiver) = mpsc::channel(UPDATE_QUEUE);
        let session = Session { context: self.context.clone(), node, queue };
        tokio::spawn(session.run(requests));
        let mut response = Response::new(tokio_stream::empty());
        response.extensions_mut().insert(Frames::new(receiver));
        Ok(response)
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::RenewResponse>, Status> {
        let node = node(&request)?;
        self.context.questions.pace(&Caller::Node(node.clone()))?;
        let v1::RenewRequest { certificate_request } = request.into_inner();
        let request =
            CertificateRequest::parse(&certificate_request).map_err(|error| Status::invalid_argument(chain(&error)))?;
        let asked = change::Request::Rekey { node: node.id, shown: node.certificate.key, requested: request.key() };
        let ask = Ask::new(Actor::Node(node.name), asked);
        self.context.writer.ask(ask).await.map_err(|refusal| refused(&refusal))?;
        let certificate = self
            .context
            .authority
            .sign(&request, &Identity::Node(node.id), self.context.now(), NODE_CERTIFICATE_LIFETIME)
            .map_err(|error| Status::internal(chain(&error)))?;
        Ok(Response::new(v1::RenewResponse { certificate }))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        let caller = node(&request)?;
        let asks = Caller::Node(caller.clone());
        let v1::ExplainRequest { source, destination, protocol, port } = request.into_inner();
        let invalid = |field: &str, value: u32, max: u32| {
            Status::invalid_argument(format!("`{field}` is `{value}`; it must be 0 to {max}"))
        };
        let wrong = |error: controller_api::ConvertError| Status::invalid_argument(chain(&error));
        let flow = Flow {
            source: address_from_wire("source", &source).map_err(wrong)?,
            destination: address_from_wire("destination", &destination).map_err(wrong)?,
            protocol: u8::try_from(protocol).map_err(|_| invalid("protocol", protocol, 255))?,
            port: u16::try_from(port).map_err(|_| invalid("port", port, 65_535))?,
        };
        let state = self.context.current.get();
        if ![flow.source, flow.destination].into_iter().any(|end| stands_for(state.network(), caller.id, end)) {
            return Err(Status::permission_denied(format!(
                "node `{}` stands for neither `{}` nor `{}`, and hears of its own flows only; ask at one of the two, or \
                 as an admin (`meshctl policy explain`)",
                caller.name, flow.source, flow.destination
            )));
        }
        self.context.questions.ask(&asks, Cost::High, move |_| Ok(explain(&state, &flow))).await.map(Response::new)
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        let node = node(&request)?;
        let ask = Ask::new(Actor::Node(node.name), change::Request::Leave(node.id));
        self.context.writer.ask(ask).await.map_err(|refusal| refused(&refusal))?;
        Ok(Response::new(v1::LeaveResponse {}))
    }
}

/// One stream of one node.
struct Session {
    context: Context,
    node: NodeCaller,
    queue: Queue,
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
        let follower = match self.follower(hello) {
            Ok(follower) => follower,
            Err(status) => return self.end(status),
        };
        tracing::info!(held = %follower.revision, "a node follows");
        let mut following = self.context.dispatch.open(follower, self.context.now());
        let mut stop = self.context.stop.clone();
        let lifetime = self.node.certificate.expires_at.saturating_sub(self.context.now());
        let stream = following.stream;
        let mut is_dismissed = false;
        let status = tokio::select! {
            end = &mut following.end => Some(self.told(end)),
            status = self.doubted(&following.doubt) => {
                is_dismissed = Refusal::of(&status).is_some();
                Some(status)
            }
            status = self.listen(requests, stream) => status,
            () = self.queue.closed() => None,
            () = tokio::time::sleep(Duration::from_secs(lifetime)) => Some(has_expired()),
            _ = stop.wait_for(|stop| *stop) => Some(Status::unavailable("controller is stopping; connect again")),
        };
        if is_dismissed {
            // The policy says so too, and the dispatcher has a last update for the node.
            let _ = timeout(LAST_WORD, &mut following.end).await;
        }
        match status {
            Some(status) => {
                tracing::info!(reason = status.message(), "a node was sent away");
                // The dispatcher's queue may be full of what comes before it.
                let _ = timeout(LAST_WORD, self.queue.send(Err(status))).await;
            }
            None => tracing::info!("a node is gone"),
        }
    }

    fn follower(&self, hello: v1::Hello) -> Result<Follower, Status> {
        let v1::Hello { revision, listen_port, endpoint, version, digest, features: _ } = hello;
        let endpoint = observed(&self.node, listen_port, &endpoint)?;
        let digest =
            digest_from_wire("hello.digest", &digest).map_err(|error| Status::invalid_argument(chain(&error)))?;
        let version = plain(&version, VERSION_MAX);
        let (node, revision, queue) = (self.node.id, Revision(revision), self.queue.clone());
        Ok(Follower { node, version, revision, digest, endpoint, queue })
    }

    /// What to say to a node whose stream must end.
    fn told(&self, end: Result<End, tokio::sync::oneshot::error::RecvError>) -> Status {
        match end {
            Ok(End::Replaced) => taken_over(),
            // One that is active again begins anew.
            Ok(End::Dismissed) => {
                self.identify().err().unwrap_or_else(|| Status::unavailable("node was not active; connect again"))
            }
            Err(_) => Status::unavailable("controller is stopping; connect again"),
        }
    }

    /// Waits until the node's certificate is refused.
    async fn doubted(&self, doubt: &Notify) -> Status {
        loop {
            doubt.notified().await;
            if let Err(status) = self.identify() {
                return status;
            }
        }
    }

    fn identify(&self) -> Result<Caller, Status> {
        let principal = Principal::Certified {
            address: SocketAddr::new(self.node.address, 0),
            certificate: self.node.certificate.clone(),
        };
        identify(&principal, &self.context.current.get(), self.context.now())
    }

    /// Hears what the node enforces. What else a newer node says is ignored.
    async fn listen(&self, mut requests: Streaming<v1::FollowRequest>, stream: StreamId) -> Option<Status> {
        let (lines, mut last) = (Throttle::default(), None);
        loop {
            let acknowledgement = match requests.message().await {
                Ok(Some(v1::FollowRequest { kind: Some(Kind::Acknowledgement(acknowledgement)) })) => acknowledgement,
                Ok(Some(v1::FollowRequest { kind: Some(Kind::Hello(_)) })) => {
                    return Some(Status::invalid_argument("node said hello twice on one stream; upgrade `noded`"));
                }
                Ok(Some(v1::FollowRequest { kind: None })) => continue,
                Ok(None) => return None,
                Err(status) => {
                    tracing::debug!(reason = status.message(), "a stream broke");
                    return None;
                }
            };
            let v1::Acknowledgement { revision, generation, error, lacks } = acknowledgement;
            let error = plain(&error, ERROR_MAX);
            let lacks: Vec<String> = lacks.iter().take(LACKS_MAX).map(|feature| plain(feature, VERSION_MAX)).collect();
            let said = (!error.is_empty() || !lacks.is_empty()).then(|| (revision, error.clone(), lacks.clone()));
            if said != last
                && said.is_some()
                && let Some(suppressed) = lines.pass(Instant::now())
            {
                let lacks = lacks.join(", ");
                tracing::warn!(revision, error, lacks, suppressed, "a node cannot enforce what it was sent");
            }
            last = said;
            let said = Said { revision: Revision(revision), generation: Generation(generation), error, lacks };
            let reports = &self.context.dispatch.reports;
            if let Err(error) = reports.acknowledge(self.node.id, stream, said, self.context.now()) {
                return Some(Status::invalid_argument(chain(&error)));
            }
        }
    }

    /// The last word, unless the queue is full: then the stream just ends.
    fn end(&self, status: Status) {
        let _ = self.queue.try_send(Err(status));
    }
}

fn has_expired() -> Status {
    Status::unauthenticated("certificate has expired; connect again with a new one")
}

/// A node's words as operators see them: without what a terminal obeys, and not longer than this many bytes.
fn plain(words: &str, max: usize) -> String {
    let mut plain = String::new();
    for character in words.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character }) {
        if plain.len() + character.len_utf8() > max {
            break;
        }
        plain.push(character);
    }
    plain
}

fn taken_over() -> Status {
    Status::aborted(
        "another connection of this node took over; if there is only one `noded`, its keys were copied: invite the node again",
    )
}

/// Costs as much as there are rules.
fn explain(state: &State, flow: &Flow) -> v1::ExplainResponse {
    let network = state.network();
    let verdict = policy::interpret(network, flow);
    let cidr = |address| network.cidr_of(address).map(|cidr| cidr.name.to_string()).unwrap_or_default();
    let rule = verdict.rule.and_then(|rule| network.rules().get(&rule));
    v1::ExplainResponse {
        revision: state.policy.revision.0,
        verdict: Some(v1::PolicyVerdict::from(&verdict)),
        source_cidr: cidr(flow.source),
        destination_cidr: cidr(flow.destination),
        rule: rule.map(|rule| rule.name.to_string()).unwrap_or_default(),
    }
}

/// Whether an address is the node's own, or of an external cidr that it is the gateway for.
fn stands_for(network: &Network, node: NodeId, address: IpAddr) -> bool {
    network.nodes().get(&node).is_some_and(|node| {
        let behind = |id| network.cidrs().get(id).is_some_and(|cidr| cidr.prefixes.contains(address));
        node.addresses.iter().any(|own| own == address) || node.gateway_for.iter().any(behind)
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{add_node, apply, id, network, parse};
    use policy::{Change, Prefixes};

    #[test]
    fn what_a_node_says_is_plain_and_short() {
        let check = |words: &str, max: usize, expected: &str| assert_eq!(plain(words, max), expected);
        check("no room in `BLOCKS`", 64, "no room in `BLOCKS`");
        check("\u{1b}]0;title\u{7}\n", 64, "\u{fffd}]0;title\u{fffd}\u{fffd}");
        check("1.0.0", 3, "1.0");
        check("ää", 3, "ä");
    }

    #[test]
    fn a_node_stands_for_its_addresses_and_for_what_it_is_the_gateway_of() {
        let mut network = network();
        let prefixes = Prefixes::from_nets([parse("192.0.2.0/24")]).expect("prefixes");
        apply(&mut network, &Change::AddCidr { name: parse("lan"), prefixes, isolated: false, external: true });
        let Change::AddNode { name, cidr, addresses, groups, .. } = add_node("gate", "web") else {
            panic!("not a new node")
        };
        apply(&mut network, &Change::AddNode { name, cidr, addresses, groups, gateway_for: vec![parse("lan")] });
        for (node, address, expected) in [
            ("web1", "10.42.1.1", true),
            ("web1", "10.42.2.1", false),
            ("web1", "192.0.2.7", false),
            ("gate", "192.0.2.7", true),
            ("gate", "198.51.100.7", false),
        ] {
            assert_eq!(stands_for(&network, id(&network, node), parse(address)), expected, "{node} {address}");
        }
    }
}
