//! The daemon's Unix socket: one line of JSON asks, one line of JSON answers. A request to follow something is answered
//! with a line for each record, until either side closes.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt};

use crate::view::{DropFilter, FlowFilter, Question};

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Answered with a [`crate::view::Status`].
    Status,
    /// With a list of [`crate::view::Peer`].
    Peers,
    /// With a [`crate::view::Policy`].
    PolicyShow,
    /// With a [`crate::view::Explanation`].
    PolicyExplain { flow: Question },
    /// With a [`crate::view::Verified`].
    PolicyVerify,
    /// With a [`crate::view::Flows`].
    Flows { filter: FlowFilter },
    /// With a [`crate::view::Drops`].
    Drops { filter: DropFilter },
    /// With one [`crate::view::DropRecord`] after the other.
    FollowDrops { filter: DropFilter },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Response {
    Ok(Value),
    Error(String),
}

/// Records as they come.
pub type Records = Pin<Box<dyn Stream<Item = Value> + Send>>;

/// What a request is answered with.
pub enum Reply {
    Whole(Value),
    Records(Records),
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole(value) => f.debug_tuple("Whole").field(value).finish(),
            Self::Records(_) => f.write_str("Records"),
        }
    }
}

/// Whoever answers.
pub trait Answerer: Send + Sync + 'static {
    fn answer(&self, request: Request) -> Pin<Box<dyn Future<Output = Result<Reply, String>> + Send + '_>>;
}

/// Longest request.
const REQUEST_MAX: u64 = 4 * 1024;
/// Longest answer that a client reads: the tables of the largest slice fit many times.
const RESPONSE_MAX: u64 = 256 * 1024 * 1024;
/// Questions answered at a time; more wait.
const CONCURRENT: usize = 8;
/// Followers at a time; more are refused. They take no place from questions.
const FOLLOWERS: usize = 16;
/// How long either side waits for the other's line.
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers until it is dropped.
pub async fn serve(listener: UnixListener, answerer: Arc<dyn Answerer>) {
    let permits = Arc::new(Semaphore::new(CONCURRENT));
    let followers = Arc::new(Semaphore::new(FOLLOWERS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (answerer, followers) = (Arc::clone(&answerer), Arc::clone(&followers));
                tokio::spawn(async move {
                    let records = match timeout(PATIENCE, converse(stream, answerer.as_ref())).await {
                        Ok(Ok(None)) | Err(_) => return,
                        Ok(Ok(Some(records))) => records,
                        Ok(Err(error)) => return tracing::debug!(%error, "control connection broke"),
                    };
                    drop(permit);
                    if let Err(error) = follow(records, &followers).await {
                        tracing::debug!(%error, "a follower went");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "control socket cannot accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Reads a request and answers it, unless the answer is a stream.
async fn converse(stream: UnixStream, answerer: &dyn Answerer) -> io::Result<Option<(UnixStream, Records)>> {
    let (mut reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let read = BufReader::new((&mut reader).take(REQUEST_MAX)).read_line(&mut line).await;
    let response = match read {
        Ok(0) => return Ok(None),
        Ok(_) if !line.ends_with('\n') => {
            Response::Error(format!("the request is not a line of at most {REQUEST_MAX} bytes"))
        }
        Ok(_) => match serde_json::from_str(&line) {
            Ok(request) => match answerer.answer(request).await {
                Ok(Reply::Whole(value)) => Response::Ok(value),
                Ok(Reply::Records(records)) => {
                    let stream = reader.reunite(writer).map_err(io::Error::other)?;
                    return Ok(Some((stream, records)));
                }
                Err(error) => Response::Error(error),
            },
            Err(error) => {
                Response::Error(format!("the request makes no sense ({error}): are nodectl and noded of one version?"))
            }
        },
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Response::Error("the request is no text".to_owned())
        }
        Err(error) => return Err(error),
    };
    say(&mut writer, &response).await?;
    Ok(None)
}

/// Passes records on until either side has enough. Whoever reads slowly waits alone.
async fn follow((stream, mut records): (UnixStream, Records), followers: &Semaphore) -> io::Result<()> {
    let (mut reader, mut writer) = stream.into_split();
    let Ok(_place) = followers.try_acquire() else {
        let error = format!("{FOLLOWERS} others follow already: end one of them");
        return say(&mut writer, &Response::Error(error)).await;
    };
    let mut nothing = [0; 16];
    loop {
        tokio::select! {
            record = records.next() => match record {
                Some(record) => say(&mut writer, &Response::Ok(record)).await?,
                None => return Ok(()),
            },
            // Whoever follows has nothing more to say: it is gone.
            _ = reader.read(&mut nothing) => return Ok(()),
        }
    }
}

async fn say(writer: &mut OwnedWriteHalf, response: &Response) -> io::Result<()> {
    let mut text = serde_json::to_vec(response).map_err(io::Error::other)?;
    text.push(b'\n');
    writer.write_all(&text).await
}

/// Why there is no answer.
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
    #[error("`noded` did not answer within {} s", PATIENCE.as_secs())]
    Silent,
    #[error("{0}")]
    Answered(String),
    #[error("the answer makes no sense: are nodectl and noded of one version?")]
    Garbled(#[source] serde_json::Error),
}

/// Asks the daemon at this socket.
pub async fn ask<T: DeserializeOwned>(path: &Path, request: Request) -> Result<T, AskError> {
    let exchange = async {
        let mut connection = Connection::open(path, &request).await?;
        connection.next(path).await?.ok_or_else(|| unreachable(path, closed()))
    };
    timeout(PATIENCE, exchange).await.map_err(|_| AskError::Silent)?
}

/// A daemon that answers with one record after the other.
#[derive(Debug)]
pub struct Following {
    path: PathBuf,
    connection: Connection,
}

impl Following {
    pub async fn begin(path: &Path, request: Request) -> Result<Self, AskError> {
        let connection = timeout(PATIENCE, Connection::open(path, &request)).await.map_err(|_| AskError::Silent)??;
        Ok(Self { path: path.to_owned(), connection })
    }

    /// Waits for the next record; `None`: the daemon has ended. Dropping the future may lose a record.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, AskError> {
        self.connection.next(&self.path).await
    }
}

#[derive(Debug)]
struct Connection(BufReader<UnixStream>);

impl Connection {
    async fn open(path: &Path, request: &Request) -> Result<Self, AskError> {
        let failed = |error| unreachable(path, error);
        let mut stream = UnixStream::connect(path).await.map_err(failed)?;
        let mut text = serde_json::to_vec(request).map_err(|error| failed(io::Error::other(error)))?;
        text.push(b'\n');
        stream.write_all(&text).await.map_err(failed)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// The next line; `None`: there is none.
    async fn next<T: DeserializeOwned>(&mut self, path: &Path) -> Result<Option<T>, AskError> {
        let mut line = String::new();
        let read = (&mut self.0).take(RESPONSE_MAX).read_line(&mut line).await;
        match read.map_err(|error| unreachable(path, error))? {
            0 => Ok(None),
            _ if !line.ends_with('\n') => Err(unreachable(path, closed())),
            _ => match serde_json::from_str(&line).map_err(AskError::Garbled)? {
                Response::Ok(value) => serde_json::from_value(value).map(Some).map_err(AskError::Garbled),
                Response::Error(error) => Err(AskError::Answered(error)),
            },
        }
    }
}

fn unreachable(path: &Path, source: io::Error) -> AskError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => AskError::Denied { path: path.to_owned() },
        _ => AskError::Unreachable { path: path.to_owned(), source },
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use host::socket::{PrivateSocket, bind_private};

    use super::*;

    struct Echo;

    impl Answerer for Echo {
        fn answer(&self, request: Request) -> Pin<Box<dyn Future<Output = Result<Reply, String>> + Send + '_>> {
            Box::pin(async move {
                match request {
                    Request::Peers => Err("no peers here".to_owned()),
                    Request::FollowDrops { .. } => {
                        let numbers = tokio_stream::iter(0..3u32).map(Value::from);
                        Ok(Reply::Records(Box::pin(numbers.chain(tokio_stream::pending()))))
                    }
                    request => serde_json::to_value(request).map(Reply::Whole).map_err(|error| error.to_string()),
                }
            })
        }
    }

    async fn started(directory: &Path) -> PathBuf {
        let path = directory.join("rampart0.sock");
        let PrivateSocket { listener, file } = bind_private(&path).unwrap();
        std::mem::forget(file);
        tokio::spawn(serve(listener, Arc::new(Echo)));
        path
    }

    async fn raw(path: &Path, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    #[tokio::test]
    async fn questions_travel_and_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = started(directory.path()).await;
        let flow = Question { source: [10, 0, 0, 1].into(), destination: [10, 0, 0, 2].into(), protocol: 6, port: 80 };
        let question = Request::PolicyExplain { flow };
        assert_eq!(ask::<Request>(&path, question.clone()).await.unwrap(), question);
        assert_eq!(ask::<Request>(&path, Request::Peers).await.unwrap_err().to_string(), "no peers here");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[tokio::test]
    async fn garbage_gets_an_error_and_the_next_question_an_answer() {
        let directory = tempfile::tempdir().unwrap();
        let path = started(directory.path()).await;
        for (garbage, word) in [
            (&b"hello\n"[..], "makes no sense"),
            (b"{\"request\":\"reboot\"}\n", "makes no sense"),
            (b"{\"request\":\"status\"", "not a line"),
            (b"\xff\xfe\n", "no text"),
            (&[b'x'; 5_000], "not a line"),
        ] {
            let answer = raw(&path, garbage).await;
            assert!(answer.contains(word) || answer.is_empty() && garbage.len() > 4_096, "{answer}");
        }
        assert_eq!(ask::<Request>(&path, Request::Status).await.unwrap(), Request::Status);
    }

    #[tokio::test]
    async fn nobody_there_is_said_with_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("none.sock");
        let error = ask::<Request>(&path, Request::Status).await.unwrap_err();
        assert!(matches!(error, AskError::Unreachable { .. }) && error.to_string().contains("noded run"), "{error}");
    }

    #[tokio::test]
    async fn followers_get_record_after_record_are_bounded_and_leave_their_places() {
        let directory = tempfile::tempdir().unwrap();
        let path = started(directory.path()).await;
        let request = || Request::FollowDrops { filter: DropFilter::default() };
        let mut followers = Vec::new();
        for _ in 0..FOLLOWERS {
            let mut following = Following::begin(&path, request()).await.unwrap();
            for number in 0..3u32 {
                assert_eq!(following.next().await.unwrap(), Some(number));
            }
            followers.push(following);
        }
        let mut refused = Following::begin(&path, request()).await.unwrap();
        assert!(refused.next::<u32>().await.unwrap_err().to_string().contains("16 others"));
        // Questions have places of their own.
        assert_eq!(ask::<Request>(&path, Request::Status).await.unwrap(), Request::Status);
        followers.pop();
        let again = async {
            loop {
                let mut following = Following::begin(&path, request()).await.unwrap();
                if following.next::<u32>().await.is_ok() {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, again).await.expect("the place of one that went is free again");
    }
}
