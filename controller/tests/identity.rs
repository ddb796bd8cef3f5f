//! Who may call what: over real TLS, by real certificates.

mod common;

use std::time::Duration;

use common::{Follower, Keys, TestController, parse};
use controller::access::authority::{Authority, CertificateRequest};
use controller::clock;
use controller_api::client::{self, ConnectError};
use controller_api::identity::Identity;
use controller_api::refusal::Refusal;
use controller_api::tls::{ClientIdentity, Trust};
use controller_api::v1;
use controller_api::v1::admin_client::AdminClient;
use controller_api::v1::invite_request::Subject;
use controller_api::v1::sync_client::SyncClient;
use policy::{Change, Local, NodeId, Revision, SliceDelta};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const DAY: Duration = Duration::from_secs(86_400);

async fn admin(channel: Channel) -> Result<u64, Status> {
    let response = AdminClient::new(channel).get_network(v1::GetNetworkRequest::default()).await?;
    Ok(response.into_inner().revision)
}

async fn sync(channel: Channel) -> Result<u64, Status> {
    let request =
        v1::ExplainRequest { source: vec![10, 42, 1, 1], destination: vec![10, 42, 2, 1], protocol: 6, port: 8080 };
    Ok(SyncClient::new(channel).explain(request).await?.into_inner().revision)
}

async fn health(channel: Channel) -> Result<(), Status> {
    HealthClient::new(channel).check(HealthCheckRequest { service: String::new() }).await.map(|_| ())
}

fn check_refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, words: &[&str]) {
    let status = result.expect_err("refused");
    assert_eq!(status.code(), code, "{status:?}");
    assert!(words.iter().all(|word| status.message().contains(word)), "{status:?}");
}

#[tokio::test]
async fn without_a_certificate_one_can_only_enrol() {
    let controller = TestController::start().await;
    let channel = controller.connect(None).await;
    check_refused(admin(channel.clone()).await, Code::Unauthenticated, &["no certificate", "noded join"]);
    check_refused(sync(channel.clone()).await, Code::Unauthenticated, &["no certificate"]);
    check_refused(health(channel).await, Code::Unauthenticated, &["no certificate"]);
    controller.join("web1", "web", 1).await;
}

#[tokio::test]
async fn nodes_and_admins_and_root_have_doors_of_their_own() {
    let controller = TestController::start().await;
    let (node, _) = controller.join("web1", "web", 1).await;
    let node = controller.connect(Some(&node)).await;
    sync(node.clone()).await.expect("a node's own");
    health(node.clone()).await.expect("anybody's who is known");
    check_refused(admin(node).await, Code::PermissionDenied, &["node `web1` is no admin"]);

    let alice = controller.join_admin("alice").await;
    let alice = controller.connect(Some(&alice)).await;
    admin(alice.clone()).await.expect("an admin's own");
    health(alice.clone()).await.expect("anybody's who is known");
    check_refused(sync(alice).await, Code::PermissionDenied, &["admin `alice` is no node"]);

    let root = client::connect_unix(&controller.socket).await.expect("connected");
    admin(root.clone()).await.expect("root's own");
    check_refused(sync(root).await, Code::PermissionDenied, &["root is no node"]);
}

#[tokio::test]
async fn a_node_asks_for_its_own_flows_only() {
    let controller = TestController::start().await;
    let (node, _) = controller.join("db1", "db", 1).await;
    let asked = sync(controller.connect(Some(&node)).await).await;
    check_refused(asked, Code::PermissionDenied, &["node `db1`", "`10.42.1.1`", "`10.42.2.1`", "meshctl"]);
}

#[tokio::test]
async fn a_disabled_node_is_emptied_sent_away_and_refused() {
    let controller = TestController::start().await;
    let (identity, node) = controller.join("web1", "web", 1).await;
    let channel = controller.connect(Some(&identity)).await;
    let mut follower = Follower::open(channel.clone(), None, "").await.expect("a stream");
    let held = follower.hear().await.expect("a snapshot").local;
    let disabled = controller.change(&[Change::DisableNode { name: parse("web1") }]).await;
    check_last_word(&mut follower, disabled, held.clone()).await;
    let refused = follower.hear().await;
    check_marked(&refused, Refusal::NotActive);
    check_refused(refused, Code::PermissionDenied, &["`web1` is disabled", "meshctl node enable web1"]);
    check_refused(sync(channel.clone()).await, Code::PermissionDenied, &["`web1` is disabled"]);
    let again = sync(controller.connect(Some(&identity)).await).await;
    check_marked(&again, Refusal::NotActive);
    check_refused(again, Code::PermissionDenied, &["`web1` is disabled"]);
    controller.wait_for_status(node, |status| !status.connected).await;

    controller.change(&[Change::EnableNode { name: parse("web1") }]).await;
    let mut follower = Follower::open(channel.clone(), follower.slice, "").await.expect("enabled again");
    assert_eq!(follower.hear().await.expect("a snapshot").from, Revision(0));
    let deleted = controller.change(&[Change::DeleteNode { name: parse("web1") }]).await;
    check_last_word(&mut follower, deleted, held).await;
    let refused = follower.hear().await;
    check_marked(&refused, Refusal::Deleted);
    check_refused(refused, Code::PermissionDenied, &["was deleted"]);
    let again = sync(controller.connect(Some(&identity)).await).await;
    check_marked(&again, Refusal::Deleted);
    check_refused(again, Code::PermissionDenied, &["was deleted"]);
}

/// No peers and nothing allowed, for the same node.
async fn check_last_word(follower: &mut Follower, revision: u64, local: Option<Local>) {
    let last = follower.hear().await.expect("a last word");
    let SliceDelta { digest, .. } = last;
    assert_eq!(last, SliceDelta { revision: Revision(revision), digest, local, ..SliceDelta::default() });
    assert_eq!(follower.slice.as_ref().map(|slice| slice.digest), Some(digest));
}

fn check_marked<T>(result: &Result<T, Status>, refusal: Refusal) {
    assert_eq!(result.as_ref().err().and_then(Refusal::of), Some(refusal));
}

#[tokio::test]
async fn only_a_node_that_is_certainly_meant_hears_that_it_has_no_part() {
    let controller = TestController::start().await;
    let (_, node) = controller.join("web1", "web", 1).await;
    controller.change(&[Change::DisableNode { name: parse("web1") }]).await;
    // Keys that the network has never let in, and an admin's.
    for identity in [Identity::Node(NodeId(node)), Identity::Admin("bob".to_owned()), Identity::Controller] {
        let channel = controller.connect(Some(&controller.sign(&identity, clock::now(), DAY))).await;
        let status = sync(channel).await.expect_err("refused");
        assert_eq!((status.code(), Refusal::of(&status)), (Code::PermissionDenied, None), "{status:?}");
    }
}

#[tokio::test]
async fn a_revoked_admin_is_refused_on_the_connection_that_is_open() {
    let controller = TestController::start().await;
    let identity = controller.join_admin("alice").await;
    let channel = controller.connect(Some(&identity)).await;
    admin(channel.clone()).await.expect("an admin's own");
    let request = v1::RevokeAdminRequest { name: "alice".to_owned() };
    controller.root().await.revoke_admin(request).await.expect("revoked");
    check_refused(admin(channel).await, Code::PermissionDenied, &["admin `alice` was revoked"]);
    let admins = controller.root().await.list_admins(v1::ListAdminsRequest {}).await.expect("a list").into_inner();
    assert!(admins.admins.len() == 1 && admins.admins[0].revoked, "{admins:?}");
    assert!(controller.context.metrics.rejected_certificates.get() > 0);
}

#[tokio::test]
async fn a_signature_of_the_authority_alone_lets_nobody_in() {
    let controller = TestController::start().await;
    let (_, node) = controller.join("web1", "web", 1).await;
    controller.join_admin("alice").await;
    for (identity, words) in [
        (Identity::Node(NodeId(node)), "replaced by one of other keys"),
        (Identity::Node(NodeId(999)), "was deleted"),
        (Identity::Admin("alice".to_owned()), "replaced by one of other keys"),
        (Identity::Admin("bob".to_owned()), "admin `bob` was revoked"),
        (Identity::Controller, "for no caller"),
    ] {
        let forged = controller.sign(&identity, clock::now(), DAY);
        let channel = controller.connect(Some(&forged)).await;
        check_refused(sync(channel.clone()).await, Code::PermissionDenied, &[words]);
        check_refused(admin(channel).await, Code::PermissionDenied, &[words]);
    }
}

#[tokio::test]
async fn certificates_that_expired_or_are_another_authoritys_are_refused_at_once() {
    let controller = TestController::start().await;
    let (_, node) = controller.join("web1", "web", 1).await;
    let endpoint = [controller.address.to_string()];
    let refused =
        async |identity: &ClientIdentity| match client::connect(&endpoint, &controller.trust(), Some(identity)).await {
            Err(ConnectError::Refused { reason, .. }) => reason.to_owned(),
            other => panic!("{other:?}"),
        };
    let old = controller.sign(&Identity::Node(NodeId(node)), clock::now() - 2 * DAY.as_secs(), DAY);
    assert!(refused(&old).await.contains("expired"));

    let directory = tempfile::tempdir().expect("a directory");
    let other = Authority::create(directory.path(), &parse("corp"), clock::now()).expect("an authority");
    let keys = Keys::admin();
    let request = CertificateRequest::parse(&keys.request()).expect("a request");
    let forged = other.sign(&request, &Identity::Node(NodeId(node)), clock::now(), DAY).expect("signed");
    assert!(refused(&keys.identity(forged)).await.contains("not of this controller's network"));

    // And the other way: a client that means another controller.
    for trust in [Trust::authority(other.certificate().to_vec()), Trust::Fingerprint(other.fingerprint())] {
        let error = client::connect(&endpoint, &trust, None).await.expect_err("another authority");
        assert!(matches!(error, ConnectError::OtherAuthority { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_certificate_that_ends_ends_its_stream() {
    let controller = TestController::start().await;
    let (_, node) = controller.join("web1", "web", 1).await;
    let name = NodeId(node);
    // Two seconds of life, for keys that the controller knows.
    let invitation = controller.invite(Subject::Node("web1".to_owned())).await;
    let keys = Keys::new(1);
    controller.redeem(&invitation, &keys).await.expect("let in");
    let request = CertificateRequest::parse(&keys.request()).expect("a request");
    let short = Duration::from_secs(2);
    let certificate =
        controller.context.authority.sign(&request, &Identity::Node(name), clock::now(), short).expect("signed");
    let channel = controller.connect(Some(&keys.identity(certificate))).await;
    let mut follower = Follower::open(channel, None, "").await.expect("a stream");
    follower.hear().await.expect("a snapshot");
    check_refused(follower.hear().await, Code::Unauthenticated, &["certificate has expired"]);
}

#[tokio::test]
async fn invitations_over_the_wire() {
    let controller = TestController::start().await;
    let (_, _) = controller.join("web1", "web", 1).await;
    let invitation = controller.invite(Subject::Node("web1".to_owned())).await;
    let keys = Keys::new(7);
    let first = controller.redeem(&invitation, &keys).await.expect("let in");
    let again = controller.redeem(&invitation, &keys).await.expect("let in again");
    assert_eq!((first.node, &first.name, &first.network), (again.node, &again.name, &again.network));
    check_refused(
        controller.redeem(&invitation, &Keys::new(7)).await,
        Code::PermissionDenied,
        &["`web1` was used already, by other keys"],
    );
    let elsewhere = TestController::start().await;
    let foreign = elsewhere.invite(Subject::Admin("eve".to_owned())).await;
    let smuggled = controller_api::invitation::Invitation {
        endpoints: invitation.endpoints.clone(),
        fingerprint: invitation.fingerprint,
        ..foreign
    };
    check_refused(controller.redeem(&smuggled, &Keys::admin()).await, Code::NotFound, &["another network than `corp`"]);

    let short = Keys { wireguard: vec![1; 31], ..Keys::new(1) };
    check_refused(controller.redeem(&invitation, &short).await, Code::InvalidArgument, &["31", "32"]);
    let zero = Keys::new(0);
    check_refused(controller.redeem(&invitation, &zero).await, Code::InvalidArgument, &["zero"]);
    let line = invitation.to_string();
    let tampered = format!("{}A{}", &line[..40], &line[41..]);
    tampered.parse::<controller_api::invitation::Invitation>().expect_err("tampered");
}

#[tokio::test]
async fn a_node_renews_its_certificate_with_the_same_key_or_a_new_one() {
    let controller = TestController::start().await;
    let (identity, _) = controller.join("web1", "web", 1).await;
    let channel = controller.connect(Some(&identity)).await;
    let new = Keys::new(1);
    let request = v1::RenewRequest { certificate_request: new.request() };
    let renewed = SyncClient::new(channel.clone()).renew(request).await.expect("renewed").into_inner();
    sync(channel.clone()).await.expect("the old one is good until the new one is used");
    let renewed = new.identity(renewed.certificate);
    let renewed = controller.connect(Some(&renewed)).await;
    sync(renewed.clone()).await.expect("the new one is good");
    let same = v1::RenewRequest { certificate_request: new.request() };
    SyncClient::new(renewed.clone()).renew(same).await.expect("renewed");
    check_refused(sync(channel).await, Code::PermissionDenied, &["replaced by one of other keys"]);
    let garbage = v1::RenewRequest { certificate_request: vec![1, 2, 3] };
    check_refused(SyncClient::new(renewed).renew(garbage).await, Code::InvalidArgument, &["PKCS #10"]);
}

#[tokio::test]
async fn a_node_can_leave_but_not_while_a_rule_names_it() {
    let controller = TestController::start().await;
    let (identity, _) = controller.join("web1", "web", 1).await;
    let channel = controller.connect(Some(&identity)).await;
    controller.change(&[common::allow("named", "node:web1", "cidr:db", "tcp/1")]).await;
    let refused = SyncClient::new(channel.clone()).leave(v1::LeaveRequest {}).await;
    check_refused(refused, Code::FailedPrecondition, &["`web1`", "`named`"]);
    controller.change(&[Change::DeleteRule { name: parse("named") }]).await;
    SyncClient::new(channel.clone()).leave(v1::LeaveRequest {}).await.expect("left");
    check_refused(sync(channel).await, Code::PermissionDenied, &["was deleted"]);
    let audit = controller
        .root()
        .await
        .list_audit(v1::ListAuditRequest { limit: 1, before: 0 })
        .await
        .expect("audit")
        .into_inner();
    assert_eq!((audit.entries[0].actor.as_str(), audit.entries[0].change.as_str()), ("node:web1", "node delete web1"));
}
