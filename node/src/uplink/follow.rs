//! Following the controller: one stream on which the node's slice comes, and acknowledgements of what it enforces go.
//!
//! What arrives is applied to a copy and checked whole before anybody else sees it. A change that does not fit makes the
//! node ask for everything anew; the kernel keeps what it has meanwhile. It keeps it too while the controller is away, but
//! not when the controller says that this node has no part in the network (any more): then nothing is allowed, and
//! nobody a peer, until it is active again.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use controller_api::convert::{FollowError, Followed, digest_to_wire};
use controller_api::refusal::Refusal;
use controller_api::v1::sync_client::SyncClient;
use controller_api::{defaults, v1};
use host::clock::now;
use policy::{DeltaError, Generation, NodeId, Revision, Slice, SliceDelta};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::CompressionEncoding;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::config::Settings;
use crate::uplink::identity::{Identity, IdentityError, Keys};
use crate::uplink::join::{self, JoinError, ReachError};
use crate::uplink::renewal;

/// What the kernel enforces, as the controller hears it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enforced {
    /// The revision that was tried last.
    pub revision: Revision,
    /// Of the tables in force.
    pub generation: Generation,
    /// Why `revision` is not, or not wholly, in force.
    pub error: Option<String>,
    /// What the policy requires that this node does not understand: it denies what that concerns.
    pub lacks: Vec<String>,
}

/// What this node understands beyond the first version of the protocol.
pub const FEATURES: &[&str] = &[];

/// How it stands with the controller.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    /// While connected: for other questions than the stream's.
    pub channel: Option<Channel>,
    pub endpoints: Vec<String>,
    /// Seconds since the epoch at which this state began.
    pub since: u64,
    pub error: Option<String>,
    /// Of this node's certificate, seconds since the epoch.
    pub certificate_expires_at: u64,
}

/// The two ends that the agent holds.
#[derive(Clone, Debug)]
pub struct Handle {
    /// The newest whole slice; at first the one from disk.
    pub received: watch::Receiver<Option<Arc<Slice>>>,
    pub connection: watch::Receiver<Connection>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Reach(ReachError),
    #[error("the controller refuses this node: {0}")]
    Refused(String),
    #[error("this node has no part in the network: {0}")]
    NoPart(String),
    #[error("the stream broke: {0}")]
    Broken(String),
    #[error("the controller ended the stream")]
    Ended,
    #[error("the controller sent what makes no sense")]
    Update(#[from] UpdateError),
}

/// Why an update cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    #[error(transparent)]
    Follow(#[from] FollowError),
    #[error(transparent)]
    Delta(#[from] DeltaError),
    #[error("it begins at revision {from}, and this node holds {held}")]
    Gap { from: Revision, held: Revision },
    #[error("it is for node {0}")]
    OtherNode(NodeId),
}

struct Follower {
    state_dir: PathBuf,
    listen_port: u16,
    endpoint: Option<SocketAddr>,
    received: watch::Sender<Option<Arc<Slice>>>,
    connection: watch::Sender<Connection>,
    enforced: watch::Receiver<Enforced>,
}

/// Acknowledgements that wait to be sent; the newest is all that matters.
const OUTBOX: usize = 4;
/// A session that lasted this long was a good one: waits begin anew after it.
const GOOD_SESSION: Duration = Duration::from_secs(10);

/// Follows the controller for ever. `held` is the slice from disk.
pub fn start(settings: &Settings, held: Option<Arc<Slice>>, enforced: watch::Receiver<Enforced>) -> Handle {
    let (received, received_rx) = watch::channel(held);
    let (connection, connection_rx) = watch::channel(Connection::default());
    let follower = Follower {
        state_dir: settings.state_dir.clone(),
        listen_port: settings.listen_port,
        endpoint: settings.endpoint,
        received,
        connection,
        enforced,
    };
    tokio::spawn(follower.run());
    Handle { received: received_rx, connection: connection_rx }
}

impl Follower {
    async fn run(mut self) {
        let mut attempt = 0;
        loop {
            let began = tokio::time::Instant::now();
            let Err(error) = self.session().await;
            let was_connected = self.connection.borrow().channel.is_some();
            let text = host::error::chain(&error);
            let known = self.connection.borrow().error.as_deref() == Some(text.as_str());
            let no_part = matches!(error, SessionError::NoPart(_));
            if no_part {
                self.dismiss();
            }
            match (was_connected || !known, no_part) {
                (true, true) => tracing::warn!(error = text, "nothing is allowed and nobody a peer until that changes"),
                (true, false) => tracing::warn!(error = text, "controller is away; the policy in force stays"),
                (false, _) => tracing::debug!(error = text, attempt, "it is still so"),
            }
            self.connection.send_modify(|connection| {
                if connection.channel.take().is_some() || connection.since == 0 {
                    connection.since = now();
                }
                connection.error = Some(text);
            });
            if was_connected && began.elapsed() >= GOOD_SESSION {
                attempt = 0;
            }
            tokio::time::sleep(backoff(attempt, random())).await;
            attempt += 1;
        }
    }

    async fn session(&mut self) -> Result<std::convert::Infallible, SessionError> {
        let (mut identity, keys) = (Identity::load(&self.state_dir)?, Keys::load(&self.state_dir)?);
        self.connection.send_modify(|connection| {
            connection.endpoints.clone_from(&identity.endpoints);
            connection.certificate_expires_at = identity.validity().map_or(0, |(_, end)| end);
        });
        let channel = join::reach(&self.state_dir, &mut identity, &keys).await?;
        self.connection.send_modify(|connection| {
            connection.certificate_expires_at = identity.validity().map_or(0, |(_, end)| end);
        });
        let mut revision = self.received.borrow().as_ref().map_or(Revision(0), |slice| known_revision(slice));
        loop {
            match self.follow(&channel, &mut identity, &keys, revision).await {
                Err(SessionError::Update(error)) if revision != Revision(0) => {
                    tracing::warn!(error = host::error::chain(&error), "update does not fit; asking for a snapshot");
                    revision = Revision(0);
                }
                other => return other,
            }
        }
    }

    async fn follow(
        &mut self,
        channel: &Channel,
        identity: &mut Identity,
        keys: &Keys,
        revision: Revision,
    ) -> Result<std::convert::Infallible, SessionError> {
        let mut held = (revision != Revision(0)).then(|| self.received.borrow().clone()).flatten();
        let (outbox, requests) = mpsc::channel(OUTBOX);
        let hello = v1::follow_request::Kind::Hello(v1::Hello {
            revision: revision.0,
            listen_port: self.listen_port.into(),
            endpoint: self.endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            digest: held.as_ref().map(|held| digest_to_wire(held.digest)).unwrap_or_default(),
            features: FEATURES.iter().map(|feature| (*feature).to_owned()).collect(),
        });
        let _ = outbox.try_send(v1::FollowRequest { kind: Some(hello) });
        let mut sync = sync_client(channel.clone());
        let mut updates = sync.follow(ReceiverStream::new(requests)).await.map_err(status_error)?.into_inner();
        self.connected(channel, revision);
        let mut greeted = false;
        let mut renewal = Box::pin(tokio::time::sleep(renewal::wait(identity)));
        loop {
            tokio::select! {
                followed = next(&mut updates) => {
                    let Followed { update, endpoints } = followed?;
                    if let Some(update) = update {
                        let slice = Arc::new(receive(held.as_deref(), update, identity.node)?);
                        tracing::debug!(revision = %slice.revision, "update received");
                        self.keep_name(identity, &slice);
                        // A controller that has forgotten what this node holds sends it again.
                        if held.as_ref() != Some(&slice) {
                            held = Some(Arc::clone(&slice));
                            self.received.send_replace(Some(slice));
                        }
                        if !greeted {
                            greeted = true;
                            // What is enforced already is news to this stream.
                            self.enforced.mark_changed();
                        }
                    }
                    if let Some(slice) = seeing(held.as_deref(), endpoints) {
                        held = Some(Arc::clone(&slice));
                        self.received.send_replace(Some(slice));
                    }
                }
                // Before the first update nobody knows whether this controller ever sent what is enforced.
                changed = self.enforced.changed(), if greeted => {
                    changed.map_err(|_| SessionError::Ended)?;
                    let enforced = self.enforced.borrow_and_update().clone();
                    let newest = held.as_ref().map_or(Revision(0), |slice| slice.revision);
                    if (Revision(1)..=newest).contains(&enforced.revision) {
                        outbox.send(acknowledgement(enforced)).await.map_err(|_| SessionError::Ended)?;
                    }
                }
                () = &mut renewal => {
                    let wait = self.renew(&mut sync, identity, keys).await;
                    renewal = Box::pin(tokio::time::sleep(wait));
                }
            }
        }
    }

    /// Lets go of everything but what this node is called.
    fn dismiss(&self) {
        let held = self.received.borrow().clone();
        let Some(held) = held.filter(|held| known_revision(held) != Revision(0)) else { return };
        self.received.send_replace(Some(Arc::new(dismissed(&held))));
    }

    fn connected(&self, channel: &Channel, revision: Revision) {
        tracing::info!(%revision, "controller connected");
        self.connection.send_modify(|connection| {
            connection.channel = Some(channel.clone());
            connection.since = now();
            connection.error = None;
        });
    }

    /// Renews the certificate, and says how long until the next time. Until then the old one serves.
    async fn renew(&self, sync: &mut SyncClient<Channel>, identity: &mut Identity, keys: &Keys) -> Duration {
        match renewal::renewed(sync, identity, keys).await {
            Ok(fresh) => {
                if let Err(error) = fresh.store(&self.state_dir) {
                    tracing::warn!(%error, "renewed certificate cannot be stored");
                    return renewal::AGAIN;
                }
                *identity = fresh;
                let end = identity.validity().map_or(0, |(_, end)| end);
                self.connection.send_modify(|connection| connection.certificate_expires_at = end);
                tracing::info!(expires_at = end, "certificate renewed");
                renewal::wait(identity).max(renewal::AGAIN)
            }
            Err(error) => {
                tracing::warn!(error, "certificate cannot be renewed; trying again");
                renewal::AGAIN
            }
        }
    }

    /// An admin may have renamed the node.
    fn keep_name(&self, identity: &mut Identity, slice: &Slice) {
        if identity.name != slice.local.name {
            identity.name = slice.local.name.clone();
            if let Err(error) = identity.store(&self.state_dir) {
                tracing::warn!(%error, "this node's new name cannot be stored");
            }
        }
    }
}

/// A client that reads whole slices.
pub fn sync_client(channel: Channel) -> SyncClient<Channel> {
    SyncClient::new(channel)
        .max_decoding_message_size(defaults::MAX_RESPONSE)
        .accept_compressed(CompressionEncoding::Gzip)
}

/// The slice after an update. `held` is not touched: what does not fit leaves no trace.
pub fn receive(held: Option<&Slice>, delta: SliceDelta, node: NodeId) -> Result<Slice, UpdateError> {
    let slice = if delta.from == Revision(0) {
        let mut slice = Slice::from_snapshot(delta)?;
        // Where peers were seen is not said again.
        slice.see(held.into_iter().flat_map(Slice::seen));
        slice
    } else {
        let held = held
            .filter(|held| held.revision == delta.from)
            .ok_or(UpdateError::Gap { from: delta.from, held: held.map_or(Revision(0), |held| held.revision) })?;
        let mut slice = held.clone();
        slice.apply(delta)?;
        slice
    };
    if slice.local.node != node {
        return Err(UpdateError::OtherNode(slice.local.node));
    }
    Ok(slice)
}

/// The slice with what was said of where peers were seen; `None`: that is no news.
fn seeing(held: Option<&Slice>, endpoints: Vec<(NodeId, SocketAddr)>) -> Option<Arc<Slice>> {
    let mut slice = held?.clone();
    slice.see(endpoints).then(|| Arc::new(slice))
}

/// The slice of a node that has no part in the network (any more). It is newer than what the node held, and no newer than
/// the revision that dismissed it.
fn dismissed(held: &Slice) -> Slice {
    held.emptied(Revision(held.revision.0.saturating_add(1)))
}

/// What the controller may build upon; not upon the slice of a [`dismissed`] node, which it need not know. That of an
/// active one has at least the prefixes of its own cidr.
fn known_revision(slice: &Slice) -> Revision {
    if slice.prefixes.is_empty() { Revision(0) } else { slice.revision }
}

async fn next(responses: &mut Streaming<v1::FollowResponse>) -> Result<Followed, SessionError> {
    let response = responses.message().await.map_err(status_error)?.ok_or(SessionError::Ended)?;
    Ok(Followed::try_from(response).map_err(UpdateError::from)?)
}

fn acknowledgement(enforced: Enforced) -> v1::FollowRequest {
    let Enforced { revision, generation, error, lacks } = enforced;
    let acknowledgement =
        v1::Acknowledgement { revision: revision.0, generation: generation.0, error: error.unwrap_or_default(), lacks };
    v1::FollowRequest { kind: Some(v1::follow_request::Kind::Acknowledgement(acknowledgement)) }
}

impl From<ReachError> for SessionError {
    fn from(error: ReachError) -> Self {
        match error {
            ReachError::Again { error: JoinError::NoPart { text, .. }, .. } => Self::NoPart(text),
            other => Self::Reach(other),
        }
    }
}

fn status_error(status: Status) -> SessionError {
    if Refusal::of(&status).is_some() {
        return SessionError::NoPart(status.message().to_owned());
    }
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated | Code::NotFound | Code::FailedPrecondition => {
            SessionError::Refused(status.message().to_owned())
        }
        _ => SessionError::Broken(status.message().to_owned()),
    }
}

/// The wait before attempt number `attempt`: doubled each time up to a bound, and of that a random part between the half
/// and the whole, so that the nodes of a restarted controller do not all come at one moment.
pub fn backoff(attempt: u32, random: u32) -> Duration {
    let whole = defaults::RECONNECT_MIN.saturating_mul(1 << attempt.min(16)).min(defaults::RECONNECT_MAX);
    let half = whole / 2;
    half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

fn random() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX / 2)
}

#[cfg(test)]
mod tests {
    use policy::Digest;

    use super::*;
    use crate::fixture;

    #[test]
    fn waits_grow_are_bounded_and_spread() {
        let check = |attempt, random, low: u64, high: u64| {
            let wait = backoff(attempt, random).as_millis() as u64;
            assert!((low..=high).contains(&wait), "attempt {attempt}: {wait} ms");
        };
        check(0, 0, 500, 500);
        check(0, u32::MAX, 1_000, 1_000);
        check(2, 0, 2_000, 2_000);
        check(2, u32::MAX, 4_000, 4_000);
        for attempt in [20, u32::MAX] {
            check(attempt, u32::MAX, 1_000, defaults::RECONNECT_MAX.as_millis() as u64);
        }
    }

    #[test]
    fn a_change_gives_the_slice_that_the_controller_meant_or_nothing() {
        let mut network = fixture::network();
        let before = fixture::slice(&network, "app1", 3);
        fixture::allow(&mut network, "db-to-app", "cidr:db", "cidr:app", "udp/53");
        let after = fixture::slice(&network, "app1", 4);
        let node = before.local.node;
        let change = before.diff(&after);
        assert_eq!(receive(Some(&before), change.clone(), node).unwrap(), *after);
        assert_eq!(receive(None, after.to_delta(), node).unwrap(), *after);
        let gap = receive(Some(&after), change.clone(), node).unwrap_err();
        assert!(matches!(gap, UpdateError::Gap { from: Revision(3), held: Revision(4) }), "{gap}");
        assert!(matches!(receive(Some(&before), change.clone(), NodeId(99)), Err(UpdateError::OtherNode(_))));
        let unnamed =
            policy::arbitrary::sealed(Some(&before), SliceDelta { rules: Default::default(), ..change.clone() });
        assert!(receive(Some(&before), unnamed, node).is_err(), "a cell names a rule that is not in the slice");
        // Another controller may have given revision 3 to something else.
        let other = SliceDelta { base: Digest::from_bytes([9; 16]), ..change.clone() };
        let error = receive(Some(&before), other, node).unwrap_err();
        assert!(matches!(error, UpdateError::Delta(DeltaError::Base { .. })), "{error}");
        let lying = SliceDelta { digest: Digest::from_bytes([9; 16]), ..change };
        let error = receive(Some(&before), lying, node).unwrap_err();
        assert!(matches!(error, UpdateError::Delta(DeltaError::Digest { .. })), "{error}");
    }

    #[test]
    fn where_peers_were_seen_outlives_updates_and_is_no_revision() {
        let mut network = fixture::network();
        let before = fixture::slice(&network, "app1", 3);
        let peer = *before.peers.keys().next().unwrap();
        let endpoint: SocketAddr = "192.0.2.7:51820".parse().unwrap();
        let seen = seeing(Some(&before), vec![(peer, endpoint), (NodeId(9_999), endpoint)]).unwrap();
        assert_eq!((seen.revision, seen.digest), (before.revision, before.digest));
        assert_eq!(seen.peers[&peer].reached_at(), Some(endpoint));
        assert!(seeing(Some(&seen), vec![(peer, endpoint)]).is_none(), "it is no news");
        fixture::allow(&mut network, "db-to-app", "cidr:db", "cidr:app", "udp/53");
        let after = fixture::slice(&network, "app1", 4);
        for delta in [before.diff(&after), after.to_delta()] {
            let slice = receive(Some(&seen), delta, before.local.node).unwrap();
            assert_eq!(slice.peers[&peer].reached_at(), Some(endpoint));
            assert_eq!(slice.digest, after.digest);
        }
    }

    #[test]
    fn a_dismissed_node_allows_nothing_and_asks_for_everything() {
        let mut network = fixture::network();
        let before = fixture::slice(&network, "app1", 3);
        let empty = dismissed(&before);
        assert_eq!((&empty.local.name, empty.revision), (&before.local.name, Revision(4)));
        assert!(empty.peers.is_empty() && empty.prefixes.is_empty() && empty.cells.is_empty());
        assert_eq!((known_revision(&before), known_revision(&empty)), (Revision(3), Revision(0)));
        // What the controller says at the end says the same.
        assert_eq!(receive(Some(&before), empty.to_delta(), before.local.node).unwrap(), empty);
        // A node that nothing is allowed to still knows where it is.
        for rule in ["web-to-app", "app-to-db"] {
            network.apply(&policy::Change::DeleteRule { name: rule.parse().unwrap() }).unwrap();
        }
        assert_eq!(known_revision(&fixture::slice(&network, "app1", 5)), Revision(5));

        let tables = crate::lower::lower(&empty, &mut crate::lower::RuleSlots::new()).unwrap();
        tables.check().unwrap();
        let own: std::net::IpAddr = before.local.addresses.v4().unwrap().into();
        let other = "10.42.1.1".parse().unwrap();
        for (source, destination, direction, reason) in [
            (own, other, ebpf_common::EGRESS, ebpf_common::reason::UNKNOWN_DESTINATION),
            (other, own, ebpf_common::INGRESS, ebpf_common::reason::UNKNOWN_SOURCE),
        ] {
            let flow = policy::Flow { source, destination, protocol: 6, port: 8080 };
            let outcome = tables.verdict(&flow, direction);
            assert_eq!((outcome.passes, outcome.reason), (false, reason), "{flow}");
        }
    }

    #[test]
    fn a_change_of_another_revision_and_an_empty_snapshot_are_refused() {
        let update = SliceDelta { from: Revision(3), revision: Revision(4), ..SliceDelta::default() };
        let error = receive(None, update, NodeId(1)).unwrap_err();
        assert!(matches!(error, UpdateError::Gap { from: Revision(3), held: Revision(0) }), "{error}");
        assert!(receive(None, SliceDelta { revision: Revision(4), ..SliceDelta::default() }, NodeId(1)).is_err());
    }
}
