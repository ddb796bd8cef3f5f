//! The end of one who asks.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Response, Status, Streaming, TimeoutExpired};

use super::convert::ConvertError;
use super::v1::local_client::LocalClient;
use super::{PATIENCE, v1};
use crate::view::{
    self, DropFilter, DropRecord, Drops, Explanation, FlowFilter, Flows, Peer, Policy, Question, Verified,
};
use host::error::chain;

/// Longest answer that a client reads: the tables of the largest slice fit many times.
const RESPONSE_MAX: usize = 256 * 1024 * 1024;
/// How much longer than the deadline to wait for the daemon's word on it.
const LAST_WORD: Duration = Duration::from_secs(1);

/// `noded` did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    #[error("no `noded` answers at `{}`: start it with `noded run`, or name its socket with `--socket` or `--interface`", path.display())]
    Unreachable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("not allowed to use `{}`: run as root", path.display())]
    Denied { path: PathBuf },
    /// It died, or is something else.
    #[error(
        "`{}` broke off ({reason}): see that `noded` runs there and is of nodectl's version, {}", path.display(),
        env!("CARGO_PKG_VERSION")
    )]
    Broken { path: PathBuf, reason: String },
    #[error("`noded` did not answer within {} s", PATIENCE.as_secs())]
    Silent,
    #[error(
        "`noded` is an older version that does not know `{question}`: upgrade it to nodectl's version, {}, and restart it",
        env!("CARGO_PKG_VERSION")
    )]
    Older { question: &'static str },
    /// What the daemon says, and the kind of it.
    #[error("{text}")]
    Answered { code: Code, text: String },
    #[error("the answer makes no sense: are nodectl and noded of one version?")]
    Garbled(#[source] ConvertError),
}

/// A connection to the daemon at a socket.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    stub: LocalClient<Channel>,
}

impl Client {
    pub async fn connect(path: &Path) -> Result<Self, AskError> {
        let stream = UnixStream::connect(path).await.map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => AskError::Denied { path: path.to_owned() },
            _ => AskError::Unreachable { path: path.to_owned(), source },
        })?;
        // One connection: the daemon says when it is over.
        let made = Mutex::new(Some(stream));
        let connector = tower::service_fn(move |_: Uri| {
            let made = made.lock().ok().and_then(|mut made| made.take());
            async move { made.map(TokioIo::new).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
        });
        // The name is only the authority that requests carry.
        let endpoint = Endpoint::from_static("http://noded.rampart").http2_adaptive_window(true);
        let connected = timeout(PATIENCE, endpoint.connect_with_connector(connector));
        let channel = connected
            .await
            .map_err(|_| AskError::Silent)?
            .map_err(|error| AskError::Broken { path: path.to_owned(), reason: chain(&error) })?;
        let stub = LocalClient::new(channel).max_decoding_message_size(RESPONSE_MAX);
        Ok(Self { path: path.to_owned(), stub })
    }

    pub async fn status(&mut self) -> Result<view::Status, AskError> {
        let question = self.stub.status(timed(v1::StatusRequest {}));
        let v1::StatusResponse { status } = answer(&self.path, "Status", question).await?;
        status.ok_or(ConvertError::Missing { field: "status" }).and_then(TryInto::try_into).map_err(AskError::Garbled)
    }

    pub async fn peers(&mut self) -> Result<Vec<Peer>, AskError> {
        let question = self.stub.peers(timed(v1::PeersRequest {}));
        answer(&self.path, "Peers", question).await?.try_into().map_err(AskError::Garbled)
    }

    pub async fn show_policy(&mut self) -> Result<Policy, AskError> {
        let question = self.stub.show_policy(timed(v1::ShowPolicyRequest {}));
        answer(&self.path, "ShowPolicy", question).await?.try_into().map_err(AskError::Garbled)
    }

    pub async fn verify_policy(&mut self) -> Result<Verified, AskError> {
        let question = self.stub.verify_policy(timed(v1::VerifyPolicyRequest {}));
        answer(&self.path, "VerifyPolicy", question).await?.try_into().map_err(AskError::Garbled)
    }

    pub async fn explain(&mut self, question: Question) -> Result<Explanation, AskError> {
        let question = self.stub.explain(timed(v1::ExplainRequest::from(question)));
        answer(&self.path, "Explain", question).await?.try_into().map_err(AskError::Garbled)
    }

    pub async fn list_flows(&mut self, filter: FlowFilter) -> Result<Flows, AskError> {
        let question = self.stub.list_flows(timed(v1::ListFlowsRequest::from(filter)));
        answer(&self.path, "ListFlows", question).await?.try_into().map_err(AskError::Garbled)
    }

    pub async fn list_drops(&mut self, filter: DropFilter) -> Result<Drops, AskError> {
        let request = v1::ListDropsRequest { filter: Some(filter.into()) };
        let question = self.stub.list_drops(timed(request));
        answer(&self.path, "ListDrops", question).await?.try_into().map_err(AskError::Garbled)
    }

    /// The stream has no deadline, its beginning has.
    pub async fn follow_drops(&mut self, filter: DropFilter) -> Result<Following, AskError> {
        let request = v1::FollowDropsRequest { filter: Some(filter.into()) };
        let question = self.stub.follow_drops(Request::new(request));
        let records = answer(&self.path, "FollowDrops", question).await?;
        Ok(Following { path: self.path.clone(), records })
    }
}

/// A daemon that answers with one record after the other.
#[derive(Debug)]
pub struct Following {
    path: PathBuf,
    records: Streaming<v1::FollowDropsResponse>,
}

impl Following {
    /// Waits for the next record; `None`: the daemon has ended. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<DropRecord>, AskError> {
        loop {
            match self.records.message().await {
                // Of a kind that only a newer daemon knows.
                Ok(Some(v1::FollowDropsResponse { kind: None })) => {}
                Ok(Some(v1::FollowDropsResponse { kind: Some(kind) })) => {
                    return DropRecord::try_from(kind).map(Some).map_err(AskError::Garbled);
                }
                Ok(None) => return Ok(None),
                Err(status) => match failure(&self.path, "FollowDrops", &status) {
                    AskError::Broken { .. } => return Ok(None),
                    error => return Err(error),
                },
            }
        }
    }
}

/// A request with the deadline that every question has.
fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(PATIENCE);
    request
}

async fn answer<T>(
    path: &Path,
    question: &'static str,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, AskError> {
    let answered = timeout(PATIENCE + LAST_WORD, answer).await.map_err(|_| AskError::Silent)?;
    answered.map(Response::into_inner).map_err(|status| failure(path, question, &status))
}

pub(super) fn failure(path: &Path, question: &'static str, status: &Status) -> AskError {
    // What the daemon says has no cause here; what the connection does has.
    let cause = std::error::Error::source(status);
    let late = std::iter::successors(cause, |cause| cause.source()).any(|cause| cause.is::<TimeoutExpired>());
    match (cause, status.code()) {
        (_, Code::DeadlineExceeded) => AskError::Silent,
        _ if late => AskError::Silent,
        (Some(cause), _) => AskError::Broken { path: path.to_owned(), reason: chain(cause) },
        (None, Code::Unimplemented) => AskError::Older { question },
        (None, code) => AskError::Answered { code, text: status.message().to_owned() },
    }
}
