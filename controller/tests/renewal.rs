//! Admins' certificates are renewed over real TLS.

mod common;

use common::{Keys, TestController};
use controller::clock;
use controller_api::defaults::ADMIN_CERTIFICATE_LIFETIME;
use controller_api::identity::validity;
use controller_api::v1;
use controller_api::v1::admin_client::AdminClient;
use tonic::Code;

#[tokio::test]
async fn an_admin_renews_with_the_own_key_and_only_while_let_in() {
    let controller = TestController::start().await;
    let (keys, certificate) = controller.join_alice(25).await;
    let mut admin = AdminClient::new(controller.connect(Some(&keys.identity(certificate))).await);
    let request = |keys: &Keys| v1::RenewRequest { certificate_request: keys.request() };
    let new = admin.renew(request(&keys)).await.expect("renewed").into_inner().certificate;
    let (_, ends) = validity(&new).expect("a validity");
    assert!(ends.abs_diff(clock::now() + ADMIN_CERTIFICATE_LIFETIME.as_secs()) < 60);
    let mut renewed = AdminClient::new(controller.connect(Some(&keys.identity(new))).await);
    let list = renewed.list_admins(v1::ListAdminsRequest {}).await.expect("let in").into_inner();
    assert!(list.admins[0].certificate_expires_at.abs_diff(ends) < 60, "{list:?}");

    let other = renewed.renew(request(&Keys::admin())).await.expect_err("another key");
    assert!(other.code() == Code::PermissionDenied && other.message().contains("its own key only"), "{other:?}");
    let garbage = renewed.renew(v1::RenewRequest { certificate_request: vec![1] }).await.expect_err("no request");
    assert_eq!(garbage.code(), Code::InvalidArgument, "{garbage:?}");
    let root = controller.root().await.renew(request(&keys)).await.expect_err("root has none");
    assert!(root.code() == Code::FailedPrecondition && root.message().contains("no certificate"), "{root:?}");
    let (node, _) = controller.join("web1", "web", 1).await;
    let mut node = AdminClient::new(controller.connect(Some(&node)).await);
    assert_eq!(node.renew(request(&keys)).await.expect_err("no admin").code(), Code::PermissionDenied);

    let audit = controller
        .root()
        .await
        .list_audit(v1::ListAuditRequest { limit: 0, before: 0 })
        .await
        .expect("audit")
        .into_inner();
    let lines = audit.entries.iter().filter(|entry| entry.change == "admin renew alice");
    assert_eq!(lines.map(|entry| entry.actor.as_str()).collect::<Vec<_>>(), ["admin:alice"]);

    let revoke = v1::RevokeAdminRequest { name: "alice".to_owned() };
    controller.root().await.revoke_admin(revoke).await.expect("revoked");
    let revoked = renewed.renew(request(&keys)).await.expect_err("revoked");
    assert!(revoked.code() == Code::PermissionDenied && revoked.message().contains("revoked"), "{revoked:?}");
}
