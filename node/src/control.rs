//! The daemon's Unix socket: one line of JSON asks, one line of JSON answers.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::report::Question;

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Answered with a [`crate::report::Status`].
    Status,
    /// With a list of [`crate::report::Peer`].
    Peers,
    /// With a [`crate::report::Policy`].
    PolicyShow,
    /// With a [`crate::report::Explanation`].
    PolicyExplain { flow: Question },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Response {
    Ok(Value),
    Error(String),
}

/// Whoever answers.
pub trait Answerer: Send + Sync + 'static {
    fn answer(&self, request: Request) -> Pin<Box<dyn Future<Output = Result<Value, String>> + Send + '_>>;
}

/// Longest request.
const REQUEST_MAX: u64 = 4 * 1024;
/// Longest answer that a client reads: the tables of the largest slice fit many times.
const RESPONSE_MAX: u64 = 256 * 1024 * 1024;
/// Questions answered at a time; more wait.
const CONCURRENT: usize = 8;
/// How long either side waits for the other's line.
const PATIENCE: Duration = Duration::from_secs(30);

/// Binds the socket (0600). A socket that a dead daemon left is replaced; that there is no living one is for the caller's
/// lock to know.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    // Bound under another name, so that it is never there with open permissions.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let _ = std::fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    std::fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
    std::fs::rename(&temporary, path)?;
    Ok(listener)
}

/// Answers until it is dropped.
pub async fn serve(listener: UnixListener, answerer: Arc<dyn Answerer>) {
    let permits = Arc::new(Semaphore::new(CONCURRENT));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let answerer = Arc::clone(&answerer);
                tokio::spawn(async move {
                    if let Ok(Err(error)) = timeout(PATIENCE, converse(stream, answerer.as_ref())).await {
                        tracing::debug!(%error, "control connection broke");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "control socket cannot accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn converse(mut stream: UnixStream, answerer: &dyn Answerer) -> io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut line = String::new();
    let read = BufReader::new(reader.take(REQUEST_MAX)).read_line(&mut line).await;
    let response = match read {
        Ok(0) => return Ok(()),
        Ok(_) if !line.ends_with('\n') => {
            Response::Error(format!("the request is not a line of at most {REQUEST_MAX} bytes"))
        }
        Ok(_) => match serde_json::from_str(&line) {
            Ok(request) => answerer.answer(request).await.map_or_else(Response::Error, Response::Ok),
            Err(error) => {
                Response::Error(format!("the request makes no sense ({error}): are nodectl and noded of one version?"))
            }
        },
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Response::Error("the request is no text".to_owned())
        }
        Err(error) => return Err(error),
    };
    let mut text = serde_json::to_vec(&response).map_err(io::Error::other)?;
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
    let response = timeout(PATIENCE, exchange(path, request)).await.map_err(|_| AskError::Silent)?;
    let response = response.map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => AskError::Denied { path: path.to_owned() },
        _ => AskError::Unreachable { path: path.to_owned(), source },
    })?;
    match serde_json::from_str(&response).map_err(AskError::Garbled)? {
        Response::Ok(value) => serde_json::from_value(value).map_err(AskError::Garbled),
        Response::Error(error) => Err(AskError::Answered(error)),
    }
}

async fn exchange(path: &Path, request: Request) -> io::Result<String> {
    let mut stream = UnixStream::connect(path).await?;
    let mut text = serde_json::to_vec(&request).map_err(io::Error::other)?;
    text.push(b'\n');
    stream.write_all(&text).await?;
    let mut line = String::new();
    BufReader::new(stream.take(RESPONSE_MAX)).read_line(&mut line).await?;
    if line.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed"));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Answerer for Echo {
        fn answer(&self, request: Request) -> Pin<Box<dyn Future<Output = Result<Value, String>> + Send + '_>> {
            Box::pin(async move {
                match request {
                    Request::Peers => Err("no peers here".to_owned()),
                    request => serde_json::to_value(request).map_err(|error| error.to_string()),
                }
            })
        }
    }

    async fn started(directory: &Path) -> PathBuf {
        let path = directory.join("rampart0.sock");
        tokio::spawn(serve(bind(&path).unwrap(), Arc::new(Echo)));
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
        assert_eq!(ask::<Request>(&path, question).await.unwrap(), question);
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
}
