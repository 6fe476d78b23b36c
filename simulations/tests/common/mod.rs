//! What tests of whole deployments share: a plan on its way, its events, and what it published.

use tabmesh_agent::publication::Artefacts;
use tabmesh_federation::manifest::Trust;
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_proto::client::OperatorClient;
use tabmesh_proto::message::{Id, PlanEvent};
use tabmesh_sim::quickstart::dataset::DOMAINS;
use tabmesh_sim::quickstart::deployed::Deployment;
use tabmesh_sim::quickstart::pki::Role;

/// Waits for the agents, then submits the deployment's plan.
pub(crate) async fn submitted(deployment: &mut Deployment) -> (OperatorClient, Id) {
    let operator = deployment.operator().await.unwrap();
    deployment.admitted(&operator).await.unwrap();
    let plan = std::fs::read(deployment.layout.plan()).unwrap();
    let id = operator.submit_plan(plan).await.unwrap().plan_id;
    (operator, id)
}

/// Reads events until one says `detail`, or the plan is over; the last one read.
pub(crate) async fn until(operator: &OperatorClient, id: &Id, detail: &str) -> PlanEvent {
    let mut events = operator.watch_plan(id, 0).await.unwrap();
    let mut last = None;
    while let Some(event) = events.next().await.unwrap() {
        let found = event.detail == detail;
        last = Some(event);
        if found {
            break;
        }
    }
    last.unwrap()
}

/// Digests of what was published: base, corpus-tuned weights, adapter or forest, corpus.
pub(crate) type Published = Vec<Option<String>>;

pub(crate) fn published(deployment: &Deployment) -> Published {
    let key = std::fs::read(deployment.pki.signing_public_key(&Role::Coordinator)).unwrap();
    let data = deployment.layout.domain(DOMAINS[0].id).join("data");
    let key = VerifyingKey::from_bytes(key.try_into().unwrap());
    let artefacts = Artefacts::open(&data, key, Trust::InsecureDev).unwrap();
    let (_, manifest) = artefacts.current().unwrap().unwrap();
    let learnt = manifest.adapter.or(manifest.forest);
    assert!(learnt.is_some(), "the rounds gave an adapter or a forest");
    let named = [Some(manifest.base), Some(manifest.tuned), learnt, Some(manifest.corpus)];
    named.iter().map(|digest| digest.map(|digest| digest.to_string())).collect()
}
