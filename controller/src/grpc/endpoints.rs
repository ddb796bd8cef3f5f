//! Where nodes were seen, on its way to the store: a node that moves back and forth is not a commit each time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use policy::{NodeId, NodeName};

use crate::change::Request;
use crate::change::audit::Actor;
use crate::change::writer::{Ask, Writer};

/// Between two commits of one node's endpoint.
pub const INTERVAL: Duration = Duration::from_secs(10);

/// Observed endpoints.
#[derive(Clone, Debug)]
pub struct Endpoints {
    writer: Writer,
    interval: Duration,
    /// Nodes whose endpoint was just stored, with a newer one that waits.
    waiting: Arc<Mutex<BTreeMap<NodeId, Option<Observed>>>>,
}

type Observed = (NodeName, SocketAddr);

impl Endpoints {
    pub fn new(writer: Writer, interval: Duration) -> Self {
        Self { writer, interval, waiting: Arc::default() }
    }

    /// Stores it without the caller waiting: at once, or when the node's last one is old enough, unless a newer one comes.
    pub fn observe(&self, node: NodeId, name: NodeName, address: SocketAddr) {
        let mut waiting = self.waiting();
        if let Some(newer) = waiting.get_mut(&node) {
            *newer = Some((name, address));
            return;
        }
        waiting.insert(node, None);
        drop(waiting);
        let this = self.clone();
        tokio::spawn(async move {
            let mut next = Some((name, address));
            while let Some((name, address)) = next {
                this.store(node, name, address).await;
                next = this.next(node);
            }
        });
    }

    /// What came meanwhile. `None`: the next one is stored at once.
    fn next(&self, node: NodeId) -> Option<Observed> {
        let mut waiting = self.waiting();
        let next = waiting.get_mut(&node).and_then(Option::take);
        if next.is_none() {
            waiting.remove(&node);
        }
        next
    }

    async fn store(&self, node: NodeId, name: NodeName, address: SocketAddr) {
        let ask = Ask::new(Actor::Node(name.clone()), Request::Observe { node, address });
        match self.writer.ask(ask).await {
            Ok(answer) if answer.outcome.changed => tokio::time::sleep(self.interval).await,
            Ok(_) => {}
            Err(error) => tracing::warn!(node = %name, %address, %error, "an observed endpoint was not stored"),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<NodeId, Option<Observed>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::writer;
    use crate::fixture::{NOW, id, network, parse};
    use crate::init::found;
    use crate::metrics::Metrics;
    use crate::state::{self, State};
    use crate::store::account::Settings;
    use crate::store::memory::MemoryStore;

    #[tokio::test]
    async fn a_node_that_moves_back_and_forth_is_few_commits_and_the_last_one_counts() {
        let (network, store) = (network(), Arc::new(MemoryStore::new()));
        found(&*store, &network, Settings::default(), NOW).expect("founded");
        let (publisher, mut current) = state::channel(State::load(&*store).expect("a state"));
        let (writer, _thread) = writer::spawn(store, publisher, Metrics::new(), || NOW).expect("a writer");
        let (web, first) = (id(&network, "web1"), current.take().revision);
        let endpoints = Endpoints::new(writer, Duration::from_millis(200));
        for port in 1..=100 {
            endpoints.observe(web, parse("web1"), SocketAddr::new(parse("192.0.2.1"), port));
        }
        let endpoint = |state: &State| state.network.nodes()[&web].endpoint.map(|endpoint| endpoint.address.port());
        let stored = async {
            while endpoint(&current.take()) != Some(100) {
                current.changed().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), stored).await.expect("the last one in time");
        assert_eq!(current.get().revision.0, first.0 + 2);
    }
}
