//! The policy as it was, over the real services.

mod common;

use common::{TestController, allow, parse};
use controller::store::Keep;
use controller_api::v1;
use policy::{Change, Network};
use std::time::Duration;
use tonic::{Code, Status};

async fn network_at(controller: &TestController, revision: u64) -> Result<(u64, Network), Status> {
    let request = v1::GetNetworkRequest { revision };
    let v1::GetNetworkResponse { revision, network } = controller.root().await.get_network(request).await?.into_inner();
    Ok((revision, Network::try_from(network.expect("a network")).expect("converts")))
}

async fn history(controller: &TestController, limit: u32) -> Vec<(u64, Vec<String>)> {
    let answer =
        controller.root().await.list_history(v1::ListHistoryRequest { limit, before: 0 }).await.expect("history");
    let past = |past: v1::PastRevision| {
        assert!(past.time > 0);
        let changes = past.changes.into_iter().map(|change| format!("{} {}", change.actor, change.change));
        (past.revision, changes.collect())
    };
    answer.into_inner().revisions.into_iter().map(past).collect()
}

fn has_rule(network: &Network, name: &str) -> bool {
    network.rule_named(&parse(name)).is_some()
}

#[tokio::test]
async fn every_kept_revision_is_shown_with_who_made_it() {
    let controller = TestController::start().await;
    let first = controller.change(&[allow("app-to-db", "cidr:app", "cidr:db", "tcp/5432")]).await;
    // Touches accounts, and no policy.
    controller.invite(v1::invite_request::Subject::Admin("alice".to_owned())).await;
    let delete = |name: &str| Change::DeleteRule { name: parse(name) };
    let second = controller.change(&[delete("app-to-db"), delete("web-to-app")]).await;
    assert!(second > first + 1, "the invitation has a revision of the store");

    let (revision, then) = network_at(&controller, first).await.expect("kept");
    assert_eq!((revision, has_rule(&then, "app-to-db"), has_rule(&then, "web-to-app")), (first, true, true));
    let (revision, between) = network_at(&controller, first + 1).await.expect("kept");
    assert_eq!((revision, &between), (first, &then), "an invitation changes nothing of the policy");
    for now in [0, second] {
        let (revision, now) = network_at(&controller, now).await.expect("the newest");
        assert_eq!((revision, has_rule(&now, "app-to-db"), has_rule(&now, "web-to-app")), (second, false, false));
    }

    let lines = history(&controller, 2).await;
    let deleted = vec!["root rule delete app-to-db".to_owned(), "root rule delete web-to-app".to_owned()];
    let added = vec!["root rule add app-to-db --from cidr:app --to cidr:db --service tcp/5432".to_owned()];
    assert_eq!(lines, [(second, deleted), (first, added)]);
    assert_eq!(history(&controller, 0).await.last().expect("the first").0, 1);
}

#[tokio::test]
async fn what_is_not_kept_is_refused_with_what_is() {
    let controller = TestController::start().await;
    let newest = controller.change(&[allow("one", "cidr:app", "cidr:db", "tcp/1")]).await;
    let refused = network_at(&controller, newest + 5).await.expect_err("not yet");
    assert_eq!(refused.code(), Code::OutOfRange);
    let said = refused.message();
    assert!(said.contains(&format!("`{}` has not been yet", newest + 5)), "{said}");
    assert!(said.contains(&format!("`1` to `{newest}`")), "{said}");

    let keep = Keep { revisions: 1, age: Duration::from_secs(3_600) };
    while controller.context.store.compact(keep, controller::clock::now()).expect("compacted") {}
    let refused = network_at(&controller, 1).await.expect_err("not kept");
    assert_eq!(refused.code(), Code::OutOfRange);
    let said = refused.message();
    assert!(said.contains("`1` is not kept any more"), "{said}");
    assert!(said.contains(&format!("`{}` to `{newest}`", newest - 1)), "{said}");
    assert_eq!(network_at(&controller, newest - 1).await.expect("the base").0, newest - 1);
    assert_eq!(history(&controller, 10).await.len(), 1);
}
