//! The daemon's end. A connection carries one call at a time, so the bounds on connections are those on questions: so many
//! at a time, each for so long, and others wait. One who follows has a seat of its own kind and gives the other back.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::Either;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_stream::{Stream, StreamExt};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::convert::ConvertError;
use super::v1::local_server::{Local, LocalServer};
use super::{PATIENCE, v1};
use crate::view::{
    self, DropFilter, DropRecord, Drops, Explanation, FlowFilter, Flows, Peer, Policy, Question, Unanswered, Verified,
};

/// Longest request.
const REQUEST_MAX: usize = 4 * 1024;
/// Questions answered at a time; more wait.
pub(super) const CONCURRENT: usize = 8;
/// Followers at a time; more are refused.
pub(super) const FOLLOWERS: usize = 16;
/// A connection on which no question comes for so long is closed.
const SILENCE: Duration = Duration::from_secs(5);
/// How much longer than a question a connection may last: the time in which an answer, or why there is none, is sent.
const FAREWELL: Duration = Duration::from_secs(2);
/// Between two attempts to accept, where the process has no more file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// Records as they come.
pub type Records = Pin<Box<dyn Stream<Item = DropRecord> + Send>>;

/// Whoever answers. A question is dropped when whoever asked has gone or its time is over.
pub trait Answerer: Send + Sync + 'static {
    fn status(&self) -> impl Future<Output = Result<view::Status, Unanswered>> + Send;
    fn peers(&self) -> impl Future<Output = Result<Vec<Peer>, Unanswered>> + Send;
    fn show_policy(&self) -> impl Future<Output = Result<Policy, Unanswered>> + Send;
    fn verify_policy(&self) -> impl Future<Output = Result<Verified, Unanswered>> + Send;
    fn explain(&self, question: Question) -> impl Future<Output = Result<Explanation, Unanswered>> + Send;
    fn list_flows(&self, filter: FlowFilter) -> impl Future<Output = Result<Flows, Unanswered>> + Send;
    fn list_drops(&self, filter: &DropFilter) -> Drops;
    fn follow_drops(&self, filter: DropFilter) -> Records;
}

/// Answers until it is dropped.
pub async fn serve<A: Answerer>(listener: UnixListener, answerer: Arc<A>) {
    let permits = Arc::new(Semaphore::new(CONCURRENT));
    let followers = Arc::new(Semaphore::new(FOLLOWERS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) if !stream.peer_cred().is_ok_and(|credentials| may_ask(credentials.uid())) => {
                tracing::warn!("a user other than root tried the control socket");
            }
            Ok((stream, _)) => {
                let seat = Seat::new(permit, Arc::clone(&followers));
                tokio::spawn(converse(stream, Arc::clone(&answerer), seat));
            }
            Err(error) => {
                tracing::warn!(%error, "control socket cannot accept");
                sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// Root, and the user that the daemon runs as, whatever the mode of the socket has become.
pub(super) fn may_ask(user: u32) -> bool {
    user == 0 || user == nix::unistd::geteuid().as_raw()
}

/// Serves one connection for as long as it may last.
async fn converse<A: Answerer>(stream: UnixStream, answerer: Arc<A>, seat: Arc<Seat>) {
    let service = Service { answerer, seat: Arc::clone(&seat) };
    let service = LocalServer::new(service).max_decoding_message_size(REQUEST_MAX);
    let mut http = Builder::new(TokioExecutor::new()).http2_only();
    http.http2().max_concurrent_streams(1);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)));
    tokio::select! {
        result = &mut connection => {
            if let Err(error) = result {
                tracing::debug!(error, "control connection broke");
            }
            return;
        }
        () = seat.is_over() => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(FAREWELL, connection).await;
}

/// What a connection holds: the permit of a question, or that of a follower.
struct Seat {
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    followers: Arc<Semaphore>,
    stage: watch::Sender<Stage>,
}

/// In this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// No question has come.
    Silent,
    Asking,
    Following,
    Over,
}

/// A follower, for as long as its stream lives.
struct Follower(Arc<Seat>);

impl Seat {
    fn new(permit: OwnedSemaphorePermit, followers: Arc<Semaphore>) -> Arc<Self> {
        let (permit, stage) = (Mutex::new(Some(permit)), watch::Sender::new(Stage::Silent));
        Arc::new(Self { permit, followers, stage })
    }

    /// A question has come.
    fn ask(&self) {
        self.stage.send_if_modified(|stage| {
            let first = *stage == Stage::Silent;
            if first {
                *stage = Stage::Asking;
            }
            first
        });
    }

    /// Takes a follower's permit and gives the other back.
    fn follow(self: &Arc<Self>) -> Result<Follower, Status> {
        let permit = Arc::clone(&self.followers)
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted(format!("{FOLLOWERS} others follow already: end one of them")))?;
        self.hold(Some(permit));
        self.stage.send_replace(Stage::Following);
        Ok(Follower(Arc::clone(self)))
    }

    fn hold(&self, permit: Option<OwnedSemaphorePermit>) {
        // Nobody panics under this lock.
        *self.permit.lock().unwrap_or_else(PoisonError::into_inner) = permit;
    }

    /// Waits until the connection has had its time. A follower has as long as it likes.
    async fn is_over(&self) {
        let mut stages = self.stage.subscribe();
        if timeout(SILENCE, stages.wait_for(|stage| *stage != Stage::Silent)).await.is_err() {
            return;
        }
        if timeout(PATIENCE + FAREWELL, stages.wait_for(|stage| *stage > Stage::Asking)).await.is_err() {
            return;
        }
        // The sender is in `self`.
        let _ = stages.wait_for(|stage| *stage == Stage::Over).await;
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.hold(None);
        self.0.stage.send_replace(Stage::Over);
    }
}

/// What one connection reaches.
struct Service<A> {
    answerer: Arc<A>,
    seat: Arc<Seat>,
}

#[tonic::async_trait]
impl<A: Answerer> Local for Service<A> {
    type FollowDropsStream = Pin<Box<dyn Stream<Item = Result<v1::FollowDropsResponse, Status>> + Send>>;

    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let status = self.within(request.metadata(), self.answerer.status()).await?;
        Ok(Response::new(v1::StatusResponse { status: Some(status.into()) }))
    }

    async fn peers(&self, request: Request<v1::PeersRequest>) -> Result<Response<v1::PeersResponse>, Status> {
        let peers = self.within(request.metadata(), self.answerer.peers()).await?;
        Ok(Response::new(peers.into()))
    }

    async fn show_policy(
        &self,
        request: Request<v1::ShowPolicyRequest>,
    ) -> Result<Response<v1::ShowPolicyResponse>, Status> {
        let policy = self.within(request.metadata(), self.answerer.show_policy()).await?;
        Ok(Response::new(policy.into()))
    }

    async fn verify_policy(
        &self,
        request: Request<v1::VerifyPolicyRequest>,
    ) -> Result<Response<v1::VerifyPolicyResponse>, Status> {
        let verified = self.within(request.metadata(), self.answerer.verify_policy()).await?;
        Ok(Response::new(verified.into()))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        let (metadata, _, question) = request.into_parts();
        let question = Question::try_from(question).map_err(senseless)?;
        let explanation = self.within(&metadata, self.answerer.explain(question)).await?;
        Ok(Response::new(explanation.into()))
    }

    async fn list_flows(
        &self,
        request: Request<v1::ListFlowsRequest>,
    ) -> Result<Response<v1::ListFlowsResponse>, Status> {
        let (metadata, _, filter) = request.into_parts();
        let filter = FlowFilter::try_from(filter).map_err(senseless)?;
        let flows = self.within(&metadata, self.answerer.list_flows(filter)).await?;
        Ok(Response::new(flows.into()))
    }

    async fn list_drops(
        &self,
        request: Request<v1::ListDropsRequest>,
    ) -> Result<Response<v1::ListDropsResponse>, Status> {
        let (metadata, _, v1::ListDropsRequest { filter }) = request.into_parts();
        let filter = DropFilter::try_from(filter.unwrap_or_default()).map_err(senseless)?;
        let drops = self.within(&metadata, async { Ok(self.answerer.list_drops(&filter)) }).await?;
        Ok(Response::new(drops.into()))
    }

    async fn follow_drops(
        &self,
        request: Request<v1::FollowDropsRequest>,
    ) -> Result<Response<Self::FollowDropsStream>, Status> {
        let (metadata, _, v1::FollowDropsRequest { filter }) = request.into_parts();
        let filter = DropFilter::try_from(filter.unwrap_or_default()).map_err(senseless)?;
        let limit = deadline(&metadata)?;
        let follower = self.seat.follow()?;
        let records = self.answerer.follow_drops(filter).map(move |record| {
            let _for_as_long = &follower;
            Ok(record.into())
        });
        let records = match limit {
            None => Either::Left(records),
            Some(limit) => Either::Right(futures_util::stream::select(
                records,
                futures_util::stream::once(async move {
                    sleep(limit).await;
                    Err(late(limit))
                }),
            )),
        };
        Ok(Response::new(Box::pin(records)))
    }
}

impl<A> Service<A> {
    /// An answer within the caller's deadline and the daemon's own.
    async fn within<T>(
        &self,
        metadata: &MetadataMap,
        answer: impl Future<Output = Result<T, Unanswered>>,
    ) -> Result<T, Status> {
        self.seat.ask();
        let limit = deadline(metadata)?.map_or(PATIENCE, |limit| limit.min(PATIENCE));
        timeout(limit, answer).await.map_err(|_| late(limit))?.map_err(|error| status(&error))
    }
}

fn late(limit: Duration) -> Status {
    Status::deadline_exceeded(format!("`noded` did not answer within {limit:?}"))
}

fn senseless(error: ConvertError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Each reason with gRPC's word for it.
fn status(error: &Unanswered) -> Status {
    let text = error.to_string();
    match error {
        Unanswered::NoPolicy | Unanswered::NotInForce | Unanswered::Outdated { .. } | Unanswered::Elsewhere { .. } => {
            Status::failed_precondition(text)
        }
        Unanswered::Changing => Status::aborted(text),
        Unanswered::Gone => Status::unavailable(text),
        Unanswered::Kernel(_) | Unanswered::BrokenOff(_) => Status::internal(text),
    }
}

/// The caller's, which gRPC writes as at most eight digits and a unit.
pub(super) fn deadline(metadata: &MetadataMap) -> Result<Option<Duration>, Status> {
    let Some(value) = metadata.get("grpc-timeout") else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(|text| {
        let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let is_number = (1..=8).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit());
        let number: u64 = number.parse().ok().filter(|_| is_number)?;
        match unit {
            "H" => Some(Duration::from_secs(number * 3_600)),
            "M" => Some(Duration::from_secs(number * 60)),
            "S" => Some(Duration::from_secs(number)),
            "m" => Some(Duration::from_millis(number)),
            "u" => Some(Duration::from_micros(number)),
            "n" => Some(Duration::from_nanos(number)),
            _ => None,
        }
    });
    parsed.map(Some).ok_or_else(|| {
        Status::invalid_argument(format!(
            "`grpc-timeout` is {value:?}; write digits and a unit, such as `30S` or `500m`"
        ))
    })
}
