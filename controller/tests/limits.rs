//! What no node could hold is refused before it is committed.

mod common;

use common::{TestController, allow, change_request};
use controller_api::v1;
use policy::limit::MAX_SLICE_PAGES;
use policy::{Change, Network};
use tonic::{Code, Status};

async fn network(controller: &TestController) -> (u64, Network) {
    let answer =
        controller.root().await.get_network(v1::GetNetworkRequest::default()).await.expect("a network").into_inner();
    (answer.revision, answer.network.expect("one").try_into().expect("a valid network"))
}

async fn ask(controller: &TestController, changes: &[Change], dry_run: bool) -> Result<u64, Status> {
    let request = v1::ChangeRequest { dry_run, ..change_request("", changes) };
    Ok(controller.root().await.change(request).await?.into_inner().revision)
}

#[tokio::test]
async fn a_policy_that_one_node_could_not_hold_is_refused_and_nothing_changes() {
    let controller = TestController::start().await;
    controller.join("db1", "db", 1).await;
    // As many clients of `db1` as it has room for, each with a service of its own, but for the last.
    let rule = |number: usize| {
        let client = format!("10.42.{}.{}/32", 1 + number / 256 % 2, number % 256);
        let client = if number < 512 { client } else { format!("fd42:0:0:1::{number:x}/128") };
        allow(&format!("r{number}"), &client, "node:db1", &format!("tcp/{}", 1_000 + number))
    };
    let rules: Vec<Change> = (0..=MAX_SLICE_PAGES).map(rule).collect();
    let (last, fitting) = rules.split_last().expect("some");
    controller.change(fitting).await;
    let before = network(&controller).await;
    for dry_run in [true, false] {
        let status = ask(&controller, std::slice::from_ref(last), dry_run).await.expect_err("refused");
        assert_eq!(status.code(), Code::FailedPrecondition);
        for words in ["`db1`", "1025 sets of services", "1024", "share their services"] {
            assert_eq!(status.message().matches(words).count(), 1, "{words}: {status:?}");
        }
        assert_eq!(network(&controller).await, before);
    }
    let same_service = allow("one-more", "10.42.9.9/32", "node:db1", "tcp/1000");
    assert!(ask(&controller, &[same_service], false).await.expect("a service that is there already") > before.0);
}
