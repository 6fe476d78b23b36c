//! What works: sessions, registration, submissions, ledgers, blobs, plans, reports, reload and stop.

use std::{convert::Infallible, sync::Arc, time::Duration};

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use ring::{rand::SystemRandom, signature::Ed25519KeyPair};
use tabmesh_privacy::{
    budget::{Delta, Epsilon},
    ledger::{CommitRequest, DebitReceipt, GrantRequest, Ledger, MemoryJournal, PlanRequest, Purpose},
    mechanism::{DiscreteGaussian, EventShape, Noise},
    private::Private,
};
use tabmesh_proto::{
    accept::AcceptOptions,
    client::{AuditorClient, ClientError, MeshClient, OperatorClient},
    limits,
    message::{
        AgentFrame, Assignment, AssignmentKind, AssignmentRefusal, ChainedEntry, ContractRegistration,
        CoordinatorFrame, DocumentAnswer, GoodbyeReason, Hello, Id, LedgerStatement, SubmissionTarget,
        sha256,
    },
    signing::public_key,
    status::WireError,
    tls::ClientTls,
};

use crate::support::{AUDITOR, COORDINATOR, Ca, OPERATOR, PAYMENTS, Recorder, Running, Seen, policy};

fn key() -> Ed25519KeyPair {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap()
}

/// Two noised payloads with their receipts, through the real mechanism and ledger.
fn debited() -> [(Private<Vec<u8>>, DebitReceipt); 2] {
    let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
    let grant = GrantRequest {
        product: "cards".into(),
        entity_namespace: "customers".into(),
        lineage: "db.cards".into(),
        unit: "customer".into(),
        epsilon: Epsilon::new(3.0).unwrap(),
        delta: Delta::new(1e-5).unwrap(),
        signer: "owner".into(),
    };
    let granted = ledger.grant(grant, 1).unwrap();
    let plan = PlanRequest {
        plan_digest: "d".into(),
        product: "cards".into(),
        purpose: Purpose::Release,
        rho: granted,
        approvals: vec![],
        planned: vec![],
    };
    let reservation = ledger.reserve(plan, 2).unwrap();
    [1u8, 2].map(|query| {
        let mechanism = DiscreteGaussian::from_rho(1 << 20, granted.share(1, 3)).unwrap();
        let mut rng = ChaCha20Rng::seed_from_u64(query.into());
        let payload = mechanism.privatize(&[3, -4, 5], &mut rng).encode();
        let event = mechanism.event(EventShape { rows_per_unit: 1, marginals: 1, dimension: 3 });
        let request = CommitRequest { event, step: 1, query_digest: [query; 32] };
        let receipt = ledger.commit(&reservation, request, &payload, 3).unwrap();
        (payload, receipt)
    })
}

fn target() -> SubmissionTarget {
    SubmissionTarget {
        assignment_id: "a-1".parse().unwrap(),
        plan_digest: [4; 32],
        stage_or_round: 2,
        attempt: 1,
    }
}

#[tokio::test]
async fn a_session_carries_frames_both_ways_until_goodbye() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    let session = client.session("0.1.0").await.unwrap();
    assert_eq!(session.welcome().session_id.as_str(), "s-1");
    assert_eq!(session.welcome().heartbeat_interval, Duration::from_secs(5));
    server
        .recorder
        .wait_for(&Seen::Hello(Hello { protocol_version: 1, product_version: "0.1.0".into() }))
        .await;
    let (sender, mut frames) = session.split();

    sender.send(AgentFrame::Heartbeat).await.unwrap();
    assert_eq!(frames.next().await.unwrap(), Some(CoordinatorFrame::HeartbeatAck));
    server.recorder.wait_for(&Seen::Frame(Ok(AgentFrame::Heartbeat))).await;

    let coordinator = COORDINATOR.parse().unwrap();
    let signing = key();
    let id: Id = "a-1".parse().unwrap();
    let task = Assignment::sign(id.clone(), AssignmentKind::Publish, b"{}".to_vec(), &coordinator, &signing)
        .unwrap();
    let to_agent = server.recorder.to_agent();
    to_agent.send(CoordinatorFrame::Assignment(task.clone())).await.unwrap();
    let Some(CoordinatorFrame::Assignment(received)) = frames.next().await.unwrap() else { panic!() };
    assert_eq!(received, task);
    received.verify(&coordinator, &public_key(&signing)).unwrap();

    for answer in [
        AgentFrame::ArtefactReceived { assignment_id: id.clone() },
        AgentFrame::AssignmentRefused { assignment_id: id, code: AssignmentRefusal::Budget },
    ] {
        sender.send(answer.clone()).await.unwrap();
        server.recorder.wait_for(&Seen::Frame(Ok(answer))).await;
    }

    to_agent.send(CoordinatorFrame::Goodbye(GoodbyeReason::Superseded)).await.unwrap();
    assert_eq!(frames.next().await.unwrap(), Some(CoordinatorFrame::Goodbye(GoodbyeReason::Superseded)));
    assert_eq!(frames.next().await.unwrap(), None);
    drop((sender, frames));
    server.recorder.wait_for(&Seen::SessionGone).await;
    server.stop().await;
}

#[tokio::test]
async fn a_silent_agent_is_dropped_and_a_beating_one_is_kept() {
    let ca = Ca::new("acme root");
    let recorder = Recorder { heartbeat_interval: Duration::from_millis(100), ..Recorder::new() };
    let server = Running::start(&ca.material(&[COORDINATOR]), recorder, AcceptOptions::default()).await;
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());

    let (sender, mut frames) = client.session("0.1.0").await.unwrap().split();
    let beating = sender.clone();
    let beats = tokio::spawn(async move { beating.keep_alive().await });
    for _ in 0..8 {
        assert_eq!(frames.next().await.unwrap(), Some(CoordinatorFrame::HeartbeatAck));
    }
    beats.abort();
    // The agent falls silent: after three intervals the coordinator says goodbye.
    loop {
        match frames.next().await {
            Ok(Some(CoordinatorFrame::HeartbeatAck)) => {}
            Ok(Some(CoordinatorFrame::Goodbye(reason))) => {
                assert_eq!(reason, GoodbyeReason::HeartbeatMissed);
                break;
            }
            // Both ends wait equally long; ours may notice first.
            Err(ClientError::Refused(WireError::HeartbeatMissed)) => break,
            other => panic!("{other:?}"),
        }
    }
    server.recorder.wait_for(&Seen::Frame(Err(WireError::HeartbeatMissed))).await;
    server.recorder.wait_for(&Seen::SessionGone).await;
}

#[tokio::test]
async fn a_contract_is_registered_under_the_certificate_s_identity() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    let yaml = b"kind: DataContract\n".to_vec();
    let sign = |agent: &str| {
        ContractRegistration::sign(yaml.clone(), "cards".into(), &agent.parse().unwrap(), &key()).unwrap()
    };
    let registration = sign(PAYMENTS);
    let admission = client.register_contract(registration.clone()).await.unwrap();
    assert!(admission.admitted);
    assert_eq!(admission.contract_digest, sha256(&yaml));
    assert_eq!(server.recorder.seen(), [Seen::Contract(registration)]);

    let other = sign("spiffe://acme.example/tabmesh/agent/loans/a1");
    let refused = client.register_contract(other).await;
    assert_eq!(refused, Err(ClientError::Refused(WireError::Signature)));
    assert_eq!(server.recorder.seen().len(), 1);
}

#[tokio::test]
async fn a_noised_payload_arrives_with_its_debit_and_only_with_its_own() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    let [(payload, receipt), (other_payload, other_receipt)] = debited();

    let answer = client.submit_release(&target(), &payload, &receipt).await.unwrap();
    assert_eq!(answer.digest, payload.payload_digest());
    let again = client.submit_release(&target(), &payload, &receipt).await.unwrap();
    assert_eq!(again, answer);
    let seen = server.recorder.seen();
    let Seen::Release(submission) = &seen[0] else { panic!("{seen:?}") };
    assert_eq!(submission.payload, payload.as_bytes());
    assert_eq!(&submission.ledger_entry_hash, receipt.hash());
    assert_eq!(submission.coordinates().len(), 3);
    assert_eq!(seen[0], seen[1]);

    for (payload, receipt) in [(&payload, &other_receipt), (&other_payload, &receipt)] {
        assert_eq!(
            client.submit_release(&target(), payload, receipt).await,
            Err(ClientError::ReceiptMismatch)
        );
        assert_eq!(
            client.submit_update(&target(), payload, receipt).await,
            Err(ClientError::ReceiptMismatch)
        );
    }
    assert_eq!(server.recorder.seen().len(), 2, "nothing was sent");
    // This coordinator acknowledges updates with another digest.
    let refused = client.submit_update(&target(), &payload, &receipt).await;
    assert_eq!(refused, Err(ClientError::ForeignReceipt));
}

#[tokio::test]
async fn an_answer_to_a_step_of_a_sum_arrives_whole_and_an_oversized_one_is_not_sent() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    let id: Id = "0190-1".parse().unwrap();
    let answer = DocumentAnswer::new(id.clone(), br#"{"consent":{}}"#.to_vec());
    let receipt = client.answer_sum(answer.clone()).await.unwrap();
    assert_eq!(receipt.digest, sha256(&answer.document));
    let large = DocumentAnswer::new(id, vec![b' '; limits::MAX_DOCUMENT_ANSWER_BYTES + 1]);
    let large_copy = large.clone();
    assert!(matches!(client.answer_sum(large).await, Err(ClientError::Answer(_))));
    assert!(matches!(client.answer_witness(large_copy).await, Err(ClientError::Answer(_))));
    let cosigned = DocumentAnswer::new("0190-2".parse().unwrap(), br#"{"cosigned":{}}"#.to_vec());
    client.answer_witness(cosigned.clone()).await.unwrap();
    assert_eq!(server.recorder.seen(), [Seen::Sum(answer), Seen::Witness(cosigned)]);
}

#[tokio::test]
async fn a_ledger_is_mirrored_with_its_signed_head() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    let first = ChainedEntry { seq: 0, prev: [0; 32], payload: b"grant".to_vec() };
    let second = ChainedEntry { seq: 1, prev: first.hash(), payload: b"reserve".to_vec() };
    let agent = PAYMENTS.parse().unwrap();
    let signing = key();
    let statement =
        LedgerStatement::sign("cards".into(), vec![first, second.clone()], &agent, &signing).unwrap();
    let receipt = client.mirror_ledger(statement).await.unwrap();
    assert_eq!(receipt.digest, second.hash());
    let seen = server.recorder.seen();
    let Seen::Ledger(mirrored) = &seen[0] else { panic!("{seen:?}") };
    mirrored.verify(&agent, &public_key(&signing)).unwrap();
}

#[tokio::test]
async fn a_blob_transfer_resumes_where_it_was_cut() {
    let ca = Ca::new("acme root");
    let recorder = Recorder { cut_after: Some(1), ..Recorder::new() };
    let server = Running::start(&ca.material(&[COORDINATOR]), recorder, AcceptOptions::default()).await;
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    let blob = server.recorder.blob.clone();
    let digest = sha256(&blob);
    for start in [0, 5] {
        let mut received = Vec::new();
        let total = client
            .fetch_blob(&digest, start, |chunk| {
                assert!(chunk.data.len() <= limits::MAX_CHUNK_BYTES);
                received.extend_from_slice(&chunk.data);
                Ok::<(), Infallible>(())
            })
            .await
            .unwrap();
        assert_eq!(total, blob.len() as u64);
        assert_eq!(received, blob[start as usize..]);
    }
    let full = client.fetch_blob(&digest, 0, |_| Err("disk full")).await;
    assert_eq!(full, Err(ClientError::Sink { reason: "disk full".into() }));
    let unknown = client.fetch_blob(&[1; 32], 0, |_| Ok::<(), Infallible>(())).await;
    assert_eq!(unknown, Err(ClientError::Refused(WireError::NotFound)));
}

#[tokio::test]
async fn operators_and_auditors_have_their_own_calls() {
    let ca = Ca::new("acme root");
    let mut server = Running::of(&ca).await;
    let operator = OperatorClient::new(server.connect(&ca.material(&[OPERATOR])).await.unwrap());
    let plan = operator.submit_plan(b"name: churn".to_vec()).await.unwrap();
    assert_eq!(plan.document, b"name: churn");
    assert_eq!(server.recorder.seen(), [Seen::Plan(b"name: churn".to_vec())]);
    assert!(operator.validate_plan(b"x".to_vec()).await.unwrap().valid);
    assert_eq!(operator.plan_status(&plan.plan_id).await.unwrap().name, "churn");
    let unknown = "p-2".parse().unwrap();
    assert_eq!(operator.plan_status(&unknown).await, Err(ClientError::Refused(WireError::NotFound)));
    assert_eq!(operator.cancel_plan(&plan.plan_id).await, Err(ClientError::Refused(WireError::StalePlan)));
    assert_eq!(operator.list_agents().await.unwrap()[0].spiffe_id, PAYMENTS.parse().unwrap());
    assert_eq!(operator.list_plans().await.unwrap().len(), 1);

    let auditor_link = server.connect(&ca.material(&[AUDITOR])).await.unwrap();
    let auditor = AuditorClient::new(auditor_link.clone());
    assert_eq!(auditor.report_input(Some("cards")).await.unwrap(), b"{\"product\":Some(\"cards\")}");
    assert_eq!(auditor.report_input(None).await.unwrap(), b"{\"product\":None}");
    assert_eq!(auditor.status().await.unwrap().audit_head, [9; 32]);
    // Auditors may watch plans and may not change them.
    let watching = OperatorClient::new(auditor_link);
    assert_eq!(watching.submit_plan(vec![]).await, Err(ClientError::Refused(WireError::Role)));
    let mut events = watching.watch_plan(&plan.plan_id, 1).await.unwrap();
    assert_eq!(events.next().await.unwrap().unwrap().seq, 2);
    server.begin_stop();
    assert_eq!(events.next().await.unwrap(), None, "a watch ends with the server");
    drop((operator, auditor, watching, events));
    server.stop().await;
}

#[tokio::test]
async fn a_stopping_server_says_goodbye_to_sessions() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    let (_sender, mut frames) = client.session("0.1.0").await.unwrap().split();
    let stopped = tokio::spawn(server.stop());
    assert_eq!(frames.next().await.unwrap(), Some(CoordinatorFrame::Goodbye(GoodbyeReason::ShuttingDown)));
    tokio::time::timeout(limits::SHUTDOWN_GRACE, stopped)
        .await
        .expect("ends before the grace period")
        .unwrap();
    let refused = client.session("0.1.0").await.map(drop).unwrap_err();
    assert!(refused.is_retryable(), "{refused:?}");
}

#[tokio::test]
async fn certificates_are_replaced_without_dropping_sessions() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let serial = |params: &mut rcgen::CertificateParams| params.serial_number = Some(7u64.into());
    let revoked_later = ca.material_with(&[PAYMENTS], serial, &[]);
    let client = MeshClient::new(server.connect(&revoked_later).await.unwrap());
    let (sender, mut frames) = client.session("0.1.0").await.unwrap().split();

    let other = ca.material(&["spiffe://acme.example/tabmesh/operator/ops"]);
    assert!(server.tls.reload(&other).is_err(), "a reload can't change who the server is");
    let with_crl = ca.material_with(&[COORDINATOR], |_| {}, &[ca.revoke(&[7])]);
    server.tls.reload(&with_crl).unwrap();

    sender.send(AgentFrame::Heartbeat).await.unwrap();
    assert_eq!(
        frames.next().await.unwrap(),
        Some(CoordinatorFrame::HeartbeatAck),
        "the open session goes on"
    );
    // A new connection with the revoked certificate fails; a fresh certificate of the same agent works.
    if let Ok(link) = server.connect(&revoked_later).await {
        assert!(MeshClient::new(link).session("0.1.0").await.is_err());
    }
    let revoked = rustls::Error::InvalidCertificate(rustls::CertificateError::Revoked);
    assert_eq!(server.refusal().await, tabmesh_proto::accept::Refusal::Tls(revoked));
    let tls = Arc::new(ClientTls::new(&ca.material(&[PAYMENTS]), policy()).unwrap());
    tls.reload(&ca.material(&[PAYMENTS])).unwrap();
    let fresh = MeshClient::new(server.connect_with(&tls).await.unwrap());
    fresh.session("0.1.0").await.unwrap();
}
