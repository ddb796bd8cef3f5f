//! Garbage, oversized and slow callers: they are dropped, and others do not notice.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::{Follower, LIMIT, TestController, allow, change_request, parse};
use controller_api::tls::{self, ClientIdentity};
use controller_api::v1;
use controller_api::v1::enrol_client::EnrolClient;
use controller_api::v1::sync_client::SyncClient;
use policy::Change;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tonic::Code;

/// A caller who behaves gets an answer.
async fn check_alive(controller: &TestController) {
    let alive = async {
        let mut root = controller.root().await;
        root.get_status(v1::GetStatusRequest {}).await.expect("an answer");
        let channel = controller.connect(None).await;
        let refused = EnrolClient::new(channel).redeem(v1::RedeemRequest::default()).await;
        assert_eq!(refused.expect_err("no invitation").code(), Code::InvalidArgument);
    };
    tokio::time::timeout(LIMIT, alive).await.expect("an answer in time");
}

/// The other end closes, and does not keep us waiting for long.
async fn check_closed(stream: &mut (impl tokio::io::AsyncRead + Unpin)) {
    let mut rest = Vec::new();
    let closed = tokio::time::timeout(LIMIT, stream.read_to_end(&mut rest)).await;
    // An error is a reset, which is a close too.
    let _ = closed.expect("closed in time");
}

async fn tls_without_a_word(controller: &TestController) -> tokio_rustls::client::TlsStream<TcpStream> {
    speak_tls(controller, None).await
}

async fn speak_tls(
    controller: &TestController,
    identity: Option<&ClientIdentity>,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let config = tls::client_config(&controller.trust(), identity).expect("a configuration");
    let tcp = TcpStream::connect(controller.address).await.expect("connected");
    let name = tls::SERVER_NAME.try_into().expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect("TLS")
}

#[tokio::test]
async fn garbage_is_dropped() {
    let controller = TestController::start().await;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 70_000], &[0x16, 3, 1, 0xff, 0xff, 1, 2, 3]] {
        let mut stream = TcpStream::connect(controller.address).await.expect("connected");
        let _ = stream.write_all(garbage).await;
        if garbage.len() > 10 {
            check_closed(&mut stream).await;
        }
    }
    let mut stream = tls_without_a_word(&controller).await;
    let _ = stream.write_all(&[0xff; 4_096]).await;
    check_closed(&mut stream).await;
    check_alive(&controller).await;
    assert!(controller.context.metrics.rejected_connections.get() >= 2);
}

#[tokio::test]
async fn the_slow_are_dropped_and_hold_up_nobody() {
    let controller = TestController::start().await;
    // More than one address may have of the handshakes; others come from elsewhere.
    let mut silent = Vec::new();
    for _ in 0..200 {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::from(([127, 0, 0, 2], 0))).expect("bound");
        silent.push(socket.connect(controller.address).await.expect("connected"));
    }
    let mut half = TcpStream::connect(controller.address).await.expect("connected");
    half.write_all(&[0x16, 3, 1, 2, 0]).await.expect("written");
    let mut without_a_word = tls_without_a_word(&controller).await;
    check_alive(&controller).await;
    check_closed(&mut half).await;
    check_closed(&mut without_a_word).await;
    for stream in &mut silent {
        check_closed(stream).await;
    }
    check_alive(&controller).await;
}

#[tokio::test]
async fn oversized_requests_are_refused() {
    let controller = TestController::start().await;
    let channel = controller.connect(None).await;
    let request =
        v1::RedeemRequest { secret: vec![1; 32], certificate_request: vec![0; 100_000], ..Default::default() };
    let refused = EnrolClient::new(channel).redeem(request).await.expect_err("too large");
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let mut huge = change_request("", &[allow("r", "cidr:web", "cidr:db", "tcp/1")]);
    huge.request_id = "x".repeat(5_000_000);
    let refused = controller.root().await.change(huge).await.expect_err("too large");
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let mut long = change_request("", &[allow("r", "cidr:web", "cidr:db", "tcp/1")]);
    long.request_id = "x".repeat(200);
    let refused = controller.root().await.change(long).await.expect_err("too long");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    check_alive(&controller).await;
}

/// The preface of HTTP/2 and empty settings: a client who has much time.
async fn idle_http(
    controller: &TestController,
    identity: &ClientIdentity,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut stream = speak_tls(controller, Some(identity)).await;
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("written");
    stream
}

#[tokio::test]
async fn one_identity_has_a_few_connections_and_none_when_it_is_disabled() {
    let controller = TestController::start().await;
    let (identity, node) = controller.join("web1", "web", 1).await;
    let mut streams = Vec::new();
    for _ in 0..8 {
        streams.push(idle_http(&controller, &identity).await);
    }
    for stream in &mut streams[..4] {
        check_closed(stream).await;
    }
    let mut follower =
        Follower::open(controller.connect(Some(&identity)).await, None, "").await.expect("another one takes over");
    follower.hear().await.expect("a snapshot");
    controller.change(&[Change::DisableNode { name: parse("web1") }]).await;
    let mut refused = idle_http(&controller, &identity).await;
    for stream in &mut streams[4..] {
        check_closed(stream).await;
    }
    check_closed(&mut refused).await;
    controller.wait_for_status(node, |status| !status.connected).await;
}

#[tokio::test]
async fn a_node_says_little_and_nothing_that_a_terminal_obeys() {
    let controller = TestController::start().await;
    let (identity, node) = controller.join("web1", "web", 1).await;
    let channel = controller.connect(Some(&identity)).await;
    let renewal = v1::RenewRequest { certificate_request: vec![0; 17_000] };
    let refused = SyncClient::new(channel.clone()).renew(renewal).await.expect_err("too large");
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let mut follower = Follower::open(channel, None, "").await.expect("a stream");
    let revision = follower.hear().await.expect("a snapshot").revision.0;
    let error = format!("\u{1b}[2J{}", "x".repeat(1_000));
    let acknowledgement = v1::Acknowledgement { revision, generation: 1, error, lacks: Vec::new() };
    let kind = Some(v1::follow_request::Kind::Acknowledgement(acknowledgement));
    follower.requests.send(v1::FollowRequest { kind }).await.expect("room");
    let status = controller.wait_for_status(node, |status| !status.error.is_empty()).await;
    assert!(status.error.starts_with("\u{fffd}[2Jxx") && status.error.len() <= 500, "{status:?}");
}

#[tokio::test]
async fn malformed_messages_are_named() {
    let controller = TestController::start().await;
    let mut root = controller.root().await;
    let empty = v1::ChangeRequest { changes: vec![v1::Change { kind: None }], ..Default::default() };
    let refused = root.change(empty).await.expect_err("nothing asked for");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    for (name, word) in [("", "name"), ("A", "`A`")] {
        let subject = Some(v1::invite_request::Subject::Admin(name.to_owned()));
        let request = v1::InviteRequest { subject, expires_in: 0, endpoints: Vec::new() };
        let refused = root.invite(request).await.expect_err("no name");
        assert!(refused.code() == Code::InvalidArgument && refused.message().contains(word), "{refused:?}");
    }
    let subject = Some(v1::invite_request::Subject::Admin("alice".to_owned()));
    let request = v1::InviteRequest { subject, expires_in: 0, endpoints: vec!["https://x".to_owned()] };
    let refused = root.invite(request).await.expect_err("no endpoint");
    assert!(refused.message().contains("`https://x`"), "{refused:?}");
    tokio::time::timeout(Duration::from_secs(5), check_alive(&controller)).await.expect("alive");
}
