//! A daemon that answers with examples, and those who ask it.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use host::socket::{PrivateSocket, bind_private};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_stream::StreamExt;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::client::{AskError, Client, Following};
use super::server::{Answerer, CONCURRENT, FOLLOWERS, Records, deadline, may_ask, serve};
use super::{PATIENCE, v1};
use crate::view::{
    self, DropFilter, Drops, Explanation, FlowFilter, Flows, Peer, Policy, Question, Unanswered, Verified, example,
};

/// Answers `verify_policy` when it is told to, and knows how many wait for that.
#[derive(Default)]
struct Examples {
    waiting: Arc<AtomicUsize>,
    go_on: Notify,
}

/// One who waits.
struct Waiting(Arc<AtomicUsize>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Examples {
    /// Waits until so many wait.
    async fn until_waiting(&self, number: usize) {
        while self.waiting.load(Ordering::SeqCst) != number {
            tokio::task::yield_now().await;
        }
    }
}

impl Answerer for Examples {
    async fn status(&self) -> Result<view::Status, Unanswered> {
        Ok(example::status())
    }

    async fn peers(&self) -> Result<Vec<Peer>, Unanswered> {
        Ok(example::peers())
    }

    async fn show_policy(&self) -> Result<Policy, Unanswered> {
        Ok(example::policy())
    }

    async fn verify_policy(&self) -> Result<Verified, Unanswered> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(Arc::clone(&self.waiting));
        self.go_on.notified().await;
        Ok(example::verified())
    }

    async fn explain(&self, question: Question) -> Result<Explanation, Unanswered> {
        let Question { source, destination, protocol, port } = question;
        match (protocol, port) {
            (6, 80) => Ok(Explanation { source, destination, ..example::explanation() }),
            (6, _) => Err(Unanswered::NoPolicy),
            _ => Err(Unanswered::Elsewhere { opener: source, answerer: destination }),
        }
    }

    async fn list_flows(&self, filter: FlowFilter) -> Result<Flows, Unanswered> {
        let net = |text: &str| text.parse().unwrap();
        match filter {
            FlowFilter { address: Some(address), limit: 9 } if address == net("10.42.1.0/24") => Ok(example::flows()),
            _ => Err(Unanswered::Changing),
        }
    }

    fn list_drops(&self, filter: &DropFilter) -> Drops {
        if *filter == self::filter() { example::drops() } else { Drops::default() }
    }

    fn follow_drops(&self, filter: DropFilter) -> Records {
        let records = if filter == self::filter() { example::records() } else { Vec::new() };
        Box::pin(tokio_stream::iter(records).chain(tokio_stream::pending()))
    }
}

/// The one filter that admits something.
fn filter() -> DropFilter {
    let net = |text: &str| Some(text.parse().unwrap());
    DropFilter { reason: Some("no-rule".to_owned()), source: net("10.42.1.0/24"), destination: net("fd42::/16") }
}

/// The daemon; its socket goes with the directory.
struct Daemon {
    answerer: Arc<Examples>,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rampart0.sock");
        let PrivateSocket { listener, file } = bind_private(&path).unwrap();
        std::mem::forget(file);
        let answerer = Arc::new(Examples::default());
        tokio::spawn(serve(listener, Arc::clone(&answerer)));
        Self { answerer, path, _directory: directory }
    }

    async fn client(&self) -> Client {
        Client::connect(&self.path).await.unwrap()
    }

    /// What a client that is not `nodectl` has.
    async fn channel(&self) -> Channel {
        let stream = std::sync::Mutex::new(Some(UnixStream::connect(&self.path).await.unwrap()));
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let stream = hyper_util::rt::TokioIo::new(stream.lock().unwrap().take().unwrap());
            async move { Ok::<_, std::io::Error>(stream) }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://noded.rampart");
        endpoint.connect_with_connector(connector).await.unwrap()
    }

    async fn stub(&self) -> v1::local_client::LocalClient<Channel> {
        v1::local_client::LocalClient::new(self.channel().await)
    }
}

fn question(protocol: u8, port: u16) -> Question {
    Question { source: [10, 0, 0, 1].into(), destination: [10, 0, 0, 2].into(), protocol, port }
}

/// Another call of this protocol.
async fn call(channel: Channel, method: &'static str) -> Status {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(method);
    let codec = tonic_prost::ProstCodec::<v1::StatusRequest, v1::StatusResponse>::default();
    grpc.unary(Request::new(v1::StatusRequest {}), path, codec).await.unwrap_err()
}

#[tokio::test]
async fn questions_travel_and_answers_come_back_whole() {
    let daemon = Daemon::start();
    assert_eq!(daemon.client().await.status().await.unwrap(), example::status());
    assert_eq!(daemon.client().await.peers().await.unwrap(), example::peers());
    assert_eq!(daemon.client().await.show_policy().await.unwrap(), example::policy());
    daemon.answerer.go_on.notify_one();
    assert_eq!(daemon.client().await.verify_policy().await.unwrap(), example::verified());
    let Question { source, destination, .. } = question(6, 80);
    let explanation = Explanation { source, destination, ..example::explanation() };
    assert_eq!(daemon.client().await.explain(question(6, 80)).await.unwrap(), explanation);
    let flows = FlowFilter { address: Some("10.42.1.0/24".parse().unwrap()), limit: 9 };
    assert_eq!(daemon.client().await.list_flows(flows).await.unwrap(), example::flows());
    assert_eq!(daemon.client().await.list_drops(filter()).await.unwrap(), example::drops());
    // One connection serves one question after the other.
    let mut client = daemon.client().await;
    for _ in 0..3 {
        assert_eq!(client.list_drops(DropFilter::default()).await.unwrap(), Drops::default());
    }
}

/// What is new in a version may be left out; what is there may not be lost.
#[test]
fn answers_that_are_empty_or_rare_come_back_whole_too() {
    let fresh = example::fresh_status();
    assert_eq!(view::Status::try_from(v1::Status::from(fresh.clone())), Ok(fresh));
    let contradiction = example::contradiction();
    assert_eq!(Explanation::try_from(v1::ExplainResponse::from(contradiction.clone())), Ok(contradiction));
    let unknown = v1::Peer { state: 9, ..v1::Peer::default() };
    assert!(Peer::try_from(unknown).unwrap_err().to_string().contains("`peer.state` is 9"));
    let senseless = v1::Status { listen_port: 70_000, ..v1::Status::from(example::status()) };
    assert!(view::Status::try_from(senseless).unwrap_err().to_string().contains("70000"));
}

#[tokio::test]
async fn the_socket_is_roots() {
    let daemon = Daemon::start();
    let mode = std::fs::metadata(&daemon.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let own = nix::unistd::geteuid().as_raw();
    assert!(may_ask(0) && may_ask(own));
    assert!(!may_ask(own + 1) && !may_ask(u32::MAX));
}

#[tokio::test]
async fn refusals_have_a_kind_and_the_reason() {
    let daemon = Daemon::start();
    for (protocol, kind, part) in
        [(6, Code::FailedPrecondition, "no policy yet"), (17, Code::FailedPrecondition, "neither `10.0.0.1` nor")]
    {
        let error = daemon.client().await.explain(question(protocol, 81)).await.unwrap_err();
        let AskError::Answered { code, text } = &error else { panic!("{error}") };
        assert!(*code == kind && text.contains(part), "{error:?}");
    }
    let error = daemon.client().await.list_flows(FlowFilter { address: None, limit: 1 }).await.unwrap_err();
    assert!(matches!(error, AskError::Answered { code: Code::Aborted, .. }), "{error:?}");
    assert_eq!(error.to_string(), "the policy changes too fast to be read: try again");
}

#[tokio::test]
async fn garbage_gets_an_error_and_the_next_question_an_answer() {
    let daemon = Daemon::start();
    for garbage in
        [&b"hello\n"[..], b"{\"request\":\"status\"}\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\n", &[b'x'; 5_000]]
    {
        let mut stream = UnixStream::connect(&daemon.path).await.unwrap();
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(!answer.starts_with(b"{"), "{answer:?}");
    }
    let flow = |source: &str, protocol, port| v1::ExplainRequest {
        source: source.to_owned(),
        destination: "10.0.0.2".to_owned(),
        protocol,
        port,
    };
    for (senseless, parts) in [
        (flow("10.0.0.300", 6, 80), ["`source`", "10.0.0.300"]),
        (flow("10.0.0.1", 300, 80), ["`protocol`", "300"]),
        (flow("10.0.0.1", 6, 70_000), ["`port`", "70000"]),
    ] {
        let status = daemon.stub().await.explain(senseless).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(parts.iter().all(|part| status.message().contains(part)), "{status}");
    }
    let long = DropFilter { reason: Some("x".repeat(5_000)), ..DropFilter::default() };
    let error = daemon.client().await.list_drops(long).await.unwrap_err();
    assert!(
        matches!(&error, AskError::Answered { code: Code::OutOfRange, text } if text.contains("4096")),
        "{error:?}"
    );
    assert_eq!(daemon.client().await.status().await.unwrap(), example::status());
}

#[tokio::test]
async fn a_question_that_only_a_newer_version_knows_is_refused_as_such() {
    let daemon = Daemon::start();
    for method in ["/rampart.node.v1.Local/Reboot", "/rampart.node.v2.Local/Status"] {
        let status = call(daemon.channel().await, method).await;
        assert_eq!(status.code(), Code::Unimplemented);
        let error = super::client::failure(&daemon.path, "Reboot", &status);
        let text = error.to_string();
        assert!(
            matches!(error, AskError::Older { .. }) && text.contains("`Reboot`") && text.contains("restart"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn nobody_there_is_said_with_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none.sock");
    let error = Client::connect(&path).await.unwrap_err();
    assert!(matches!(error, AskError::Unreachable { .. }) && error.to_string().contains("noded run"), "{error}");
}

#[tokio::test]
async fn what_is_not_noded_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(b"{\"error\":\"the request makes no sense\"}\n").await;
    });
    let error = match Client::connect(&path).await {
        Ok(mut client) => client.status().await.unwrap_err(),
        Err(error) => error,
    };
    let text = error.to_string();
    assert!(matches!(error, AskError::Broken { .. }) && text.contains("other.sock"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_question_ends_at_the_daemons_limit_and_at_the_callers() {
    let daemon = Daemon::start();
    let began = Instant::now();
    // Of a caller that sets none.
    let status = daemon.stub().await.verify_policy(v1::VerifyPolicyRequest {}).await.unwrap_err();
    assert_eq!((status.code(), began.elapsed() >= PATIENCE), (Code::DeadlineExceeded, true), "{status}");
    daemon.answerer.until_waiting(0).await;

    let error = daemon.client().await.verify_policy().await.unwrap_err();
    assert!(matches!(error, AskError::Silent), "{error:?}");
    daemon.answerer.until_waiting(0).await;

    let began = Instant::now();
    let mut request = Request::new(v1::VerifyPolicyRequest {});
    request.set_timeout(Duration::from_secs(1));
    daemon.stub().await.verify_policy(request).await.unwrap_err();
    daemon.answerer.until_waiting(0).await;
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());

    // A stream has none, unless the caller sets one.
    let mut request = Request::new(v1::FollowDropsRequest::default());
    request.set_timeout(Duration::from_secs(1));
    let mut records = daemon.stub().await.follow_drops(request).await.unwrap().into_inner();
    assert_eq!(records.message().await.unwrap_err().code(), Code::DeadlineExceeded);
    let mut following = daemon.client().await.follow_drops(DropFilter::default()).await.unwrap();
    assert!(timeout(PATIENCE * 10, following.next()).await.is_err(), "it goes on");
}

#[test]
fn a_deadline_is_digits_and_a_unit() {
    let parsed = |text: &str| {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", text.parse().unwrap());
        deadline(&metadata)
    };
    for (text, expected) in [
        ("2H", Duration::from_secs(7_200)),
        ("2M", Duration::from_secs(120)),
        ("30S", Duration::from_secs(30)),
        ("500m", Duration::from_millis(500)),
        ("7u", Duration::from_micros(7)),
        ("99999999n", Duration::from_nanos(99_999_999)),
    ] {
        assert_eq!(parsed(text).unwrap(), Some(expected), "{text}");
    }
    for text in ["", "S", "30", "30s", "-1S", "+1S", "1.5S", "999999999S", "S30"] {
        let status = parsed(text).unwrap_err();
        assert!(status.code() == Code::InvalidArgument && status.message().contains("grpc-timeout"), "{text}");
    }
    assert_eq!(deadline(&MetadataMap::new()).unwrap(), None);
}

#[tokio::test]
async fn questions_beyond_the_bound_wait_and_a_caller_that_goes_makes_room() {
    let daemon = Daemon::start();
    let mut callers = Vec::new();
    for _ in 0..CONCURRENT {
        let mut client = daemon.client().await;
        callers.push(tokio::spawn(async move { client.verify_policy().await.is_ok() }));
    }
    daemon.answerer.until_waiting(CONCURRENT).await;
    let mut client = daemon.client().await;
    let mut waits = tokio::spawn(async move { client.status().await });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!waits.is_finished(), "it has no place yet");
    callers.pop().unwrap().abort();
    assert_eq!((&mut waits).await.unwrap().unwrap(), example::status());
    daemon.answerer.until_waiting(CONCURRENT - 1).await;
    daemon.answerer.go_on.notify_waiters();
    for caller in callers {
        assert!(caller.await.unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn connections_that_say_nothing_are_closed() {
    let daemon = Daemon::start();
    let mut silent = Vec::new();
    for _ in 0..CONCURRENT {
        silent.push(UnixStream::connect(&daemon.path).await.unwrap());
    }
    assert_eq!(daemon.client().await.status().await.unwrap(), example::status());
    let mut said = Vec::new();
    silent[0].read_to_end(&mut said).await.unwrap();
}

async fn followed(daemon: &Daemon) -> (Client, Following) {
    let mut client = daemon.client().await;
    let mut following = client.follow_drops(filter()).await.unwrap();
    for record in example::records() {
        assert_eq!(following.next().await.unwrap(), Some(record));
    }
    (client, following)
}

#[tokio::test]
async fn followers_get_record_after_record_are_bounded_and_leave_their_places() {
    let daemon = Daemon::start();
    let mut followers = Vec::new();
    for _ in 0..FOLLOWERS {
        followers.push(followed(&daemon).await);
    }
    let refused = daemon.client().await.follow_drops(filter()).await.unwrap_err();
    assert!(matches!(refused, AskError::Answered { code: Code::ResourceExhausted, .. }), "{refused:?}");
    assert!(refused.to_string().contains("16 others"), "{refused}");
    // Questions have places of their own.
    assert_eq!(daemon.client().await.status().await.unwrap(), example::status());
    // Whether the connection goes or only the stream is cancelled.
    let (kept, cancelled) = followers.pop().unwrap();
    drop(cancelled);
    let again = async {
        while daemon.client().await.follow_drops(filter()).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, again).await.expect("the place of one that went is free again");
    drop(kept);
}

#[tokio::test]
async fn a_follower_hears_that_the_daemon_has_ended() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rampart0.sock");
    let PrivateSocket { listener, file: _file } = bind_private(&path).unwrap();
    // A runtime that ends takes its connections along, as the process does.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = {
        let _entered = runtime.enter();
        tokio::net::UnixListener::from_std(listener.into_std().unwrap()).unwrap()
    };
    runtime.spawn(serve(listener, Arc::new(Examples::default())));
    let mut following = Client::connect(&path).await.unwrap().follow_drops(filter()).await.unwrap();
    for record in example::records() {
        assert_eq!(following.next().await.unwrap(), Some(record));
    }
    runtime.shutdown_background();
    assert_eq!(following.next().await.unwrap(), None);
}
