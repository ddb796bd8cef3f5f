//! Admins' certificates renew by themselves, by the real `meshctl`.

#[path = "../../tests/common/mod.rs"]
mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Output, Stdio};

use base64::Engine as _;
use common::{DAY, Keys, TestController};
use controller::clock;
use controller_api::identity::validity;
use controller_api::tls::certificates_from_pem;
use controller_api::v1;

fn pem(der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
}

/// The directory of an admin's identity, as `meshctl admin join` leaves it.
fn identity(controller: &TestController, keys: &Keys, certificate: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let profile = format!("network = \"corp\"\nname = \"alice\"\nendpoints = [\"{}\"]\n", controller.address);
    let authority = pem(controller.context.authority.certificate());
    for (name, content) in [
        ("admin.toml", profile),
        ("key.pem", keys.tls.serialize_pem()),
        ("certificate.pem", pem(certificate)),
        ("authority.pem", authority),
    ] {
        std::fs::write(dir.path().join(name), content).expect("written");
    }
    dir
}

fn stored(dir: &Path) -> Vec<u8> {
    let text = std::fs::read_to_string(dir.join("certificate.pem")).expect("a certificate");
    certificates_from_pem(&text).expect("PEM")[0].to_vec()
}

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir).expect("a directory").count()
}

/// While this process serves.
async fn meshctl(dir: &Path, words: &[&str]) -> (Output, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_meshctl"));
    command.args(words).arg("--identity").arg(dir).env_remove("RAMPART_CONTROLLER").stdin(Stdio::null());
    let output = tokio::time::timeout(common::LIMIT, command.output()).await.expect("in time").expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

#[tokio::test]
async fn meshctl_renews_a_certificate_that_has_used_most_of_its_time_and_says_nothing() {
    let controller = TestController::start().await;
    for (days, expected) in [(10, false), (25, true)] {
        let (keys, certificate) = controller.join_alice(days).await;
        let dir = identity(&controller, &keys, &certificate);
        let dir = dir.path();
        // A dry run changes nothing at all.
        for words in [&["cidr", "list", "--dry-run"][..], &["cidr", "list"]] {
            assert_eq!(stored(dir), certificate);
            let (output, said) = meshctl(dir, words).await;
            assert!(output.status.success() && said.is_empty(), "{said}");
        }
        assert_eq!(stored(dir) != certificate, expected);
        let (output, said) = meshctl(dir, &["cidr", "list"]).await;
        assert!(output.status.success() && said.is_empty(), "{said}");
        assert_eq!(files(dir), 4);
        if expected {
            let (_, ends) = validity(&stored(dir)).expect("a validity");
            assert!(ends > clock::now() + 29 * DAY);
            let mode = std::fs::metadata(dir.join("certificate.pem")).expect("a file").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }
}

#[tokio::test]
async fn a_revoked_admin_hears_so_once_and_keeps_the_old_certificate() {
    let controller = TestController::start().await;
    let (keys, certificate) = controller.join_alice(25).await;
    let dir = identity(&controller, &keys, &certificate);
    let revoke = v1::RevokeAdminRequest { name: "alice".to_owned() };
    controller.root().await.revoke_admin(revoke).await.expect("revoked");
    let (output, said) = meshctl(dir.path(), &["cidr", "list"]).await;
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert_eq!((said.matches("was revoked").count(), said.lines().count()), (1, 1), "{said}");
    assert_eq!(stored(dir.path()), certificate);
}
