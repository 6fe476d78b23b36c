//! Who has answered an assignment that asks for no vector, and whoever waits for it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use tabmesh_proto::identity::SpiffeId;
use tabmesh_proto::message::{AssignmentRefusal, Id};
use tokio::sync::Notify;

use crate::mesh::locked;

/// Answers by agent: nothing for "done", or why not.
pub(crate) type ByAgent = BTreeMap<SpiffeId, Option<AssignmentRefusal>>;

/// Answers to the assignments somebody waits for.
#[derive(Default)]
pub(crate) struct Answers {
    expected: Mutex<BTreeMap<Id, ByAgent>>,
    news: Notify,
}

impl Answers {
    /// Collects answers to an assignment from now on.
    pub(crate) fn expect(&self, id: &Id) {
        locked(&self.expected).insert(id.clone(), ByAgent::new());
    }

    /// Notes an answer, if somebody waits for it.
    pub(crate) fn note(&self, agent: &SpiffeId, id: &Id, refusal: Option<AssignmentRefusal>) {
        if let Some(answers) = locked(&self.expected).get_mut(id) {
            answers.insert(agent.clone(), refusal);
            self.news.notify_waiters();
        }
    }

    /// Waits for a number of answers, or for patience to end, and gives those that came.
    pub(crate) async fn wait(&self, id: &Id, number: usize, patience: Duration) -> ByAgent {
        let all = async {
            loop {
                let news = self.news.notified();
                if locked(&self.expected).get(id).is_none_or(|answers| answers.len() >= number) {
                    return;
                }
                news.await;
            }
        };
        // Whoever has not answered by then is not in: that is the meaning of patience.
        let _ = tokio::time::timeout(patience, all).await;
        locked(&self.expected).remove(id).unwrap_or_default()
    }
}
