//! Every named refusal, every message-level limit at its maximum and one above, and decoding of arbitrary bytes.

use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::message::Id;

fn submission(payload: Vec<u8>) -> pb::Submission {
    pb::Submission {
        assignment_id: "a-1".into(),
        plan_digest: vec![1; 32],
        stage_or_round: 2,
        attempt: 1,
        payload_digest: sha256(&payload).to_vec(),
        payload,
        ledger_entry_hash: vec![3; 32],
    }
}

fn registration(contract: usize, product: usize) -> pb::ContractRegistration {
    pb::ContractRegistration {
        contract: vec![b'x'; contract],
        product: "p".repeat(product),
        signing_public_key: vec![0; 32],
        signature: vec![0; 64],
    }
}

fn assignment(document: usize) -> pb::Assignment {
    let document = vec![b'{'; document];
    pb::Assignment {
        assignment_id: "a-1".into(),
        kind: 1,
        digest: sha256(&document).to_vec(),
        document,
        signature: vec![0; 64],
    }
}

fn chain(entries: usize, bytes: usize) -> pb::LedgerStatement {
    let mut prev = [0; 32];
    let entries = (0..entries as u64).map(|seq| {
        let entry = ChainedEntry { seq, prev, payload: vec![7; bytes] };
        prev = entry.hash();
        pb::ChainedEntry { seq, prev: entry.prev.to_vec(), payload: entry.payload }
    });
    let entries = entries.collect();
    pb::LedgerStatement { product: "cards".into(), entries, head_signature: vec![0; 64] }
}

fn plan(document: usize, progress: f64) -> pb::PlanSummary {
    pb::PlanSummary {
        plan_id: "p".into(),
        name: "n".into(),
        phase: "open".into(),
        progress,
        created_ms: 1,
        updated_ms: 2,
        document: vec![b'{'; document],
    }
}

fn chunk(offset: u64, total_bytes: u64, data: usize) -> pb::BlobChunk {
    pb::BlobChunk { offset, total_bytes, data: vec![0; data] }
}

/// One row per message-level limit: a parse of a message whose part has the given size.
#[test]
fn each_limit_is_accepted_and_one_more_is_refused() {
    type Row = (&'static str, usize, usize, fn(usize) -> Result<()>);
    let rows: [Row; 13] = [
        ("payload", limits::MAX_PAYLOAD_BYTES, 8, |n| Submission::try_from(submission(vec![0; n])).map(drop)),
        ("contract", limits::MAX_CONTRACT_BYTES, 1, |n| {
            ContractRegistration::try_from(registration(n, 1)).map(drop)
        }),
        ("product", limits::MAX_NAME_BYTES, 1, |n| {
            ContractRegistration::try_from(registration(1, n)).map(drop)
        }),
        ("document", limits::MAX_DOCUMENT_BYTES, 1, |n| Assignment::try_from(assignment(n)).map(drop)),
        ("document", limits::MAX_SUM_ANSWER_BYTES, 1, |n| {
            let answer = SumAnswer::new("a".parse().unwrap(), vec![b'{'; n]);
            SumAnswer::try_from(pb::SumAnswer::from(answer)).map(drop)
        }),
        ("entries", limits::MAX_LEDGER_ENTRIES, 1, |n| LedgerStatement::try_from(chain(n, 1)).map(drop)),
        ("entry", limits::MAX_LEDGER_ENTRY_BYTES, 1, |n| LedgerStatement::try_from(chain(1, n)).map(drop)),
        ("yaml", limits::MAX_PLAN_BYTES, 1, |n| {
            plan_yaml(pb::PlanDocument { yaml: vec![b'x'; n] }).map(drop)
        }),
        ("document", limits::MAX_DOCUMENT_BYTES, 1, |n| PlanSummary::try_from(plan(n, 0.5)).map(drop)),
        ("data", limits::MAX_CHUNK_BYTES, 1, |n| BlobChunk::try_from(chunk(0, 1 << 29, n)).map(drop)),
        ("id", limits::MAX_ID_BYTES, 1, |n| "x".repeat(n).parse::<Id>().map(drop)),
        ("plans", limits::MAX_LIST_ITEMS, 1, |n| {
            plans(pb::PlanList { plans: vec![plan(0, 0.0); n] }).map(drop)
        }),
        ("refusals", limits::MAX_ADMISSION_REFUSALS, 1, |n| {
            let refused =
                pb::Admission { admitted: false, refusals: vec![1; n], contract_digest: vec![0; 32] };
            Admission::try_from(refused).map(drop)
        }),
    ];
    for (field, max, step, parse) in rows {
        assert_eq!(parse(max), Ok(()), "{field} at its limit");
        let above = ConvertError::TooLarge { field, got: max + step, max };
        assert_eq!(WireError::from(&above), WireError::TooLarge);
        assert_eq!(parse(max + step), Err(above));
    }
}

#[test]
fn a_ledger_statement_is_bounded_as_a_whole() {
    let max = limits::MAX_LEDGER_STATEMENT_BYTES;
    let entries = max / limits::MAX_LEDGER_ENTRY_BYTES;
    let full = chain(entries, limits::MAX_LEDGER_ENTRY_BYTES);
    assert!(full.encoded_len() <= limits::MAX_MESH_MESSAGE_BYTES);
    let parsed = LedgerStatement::try_from(full).unwrap();
    let (seq, prev) = parsed.head().unwrap();
    let mut above = parsed.entries;
    above.push(ChainedEntry { seq: seq + 1, prev, payload: vec![7] });
    let refused = ConvertError::TooLarge { field: "statement", got: max + 1, max };
    assert_eq!(check_chain(&above), Err(refused));
}

#[test]
fn a_payload_fits_into_its_message_and_the_message_into_its_limit() {
    let largest = submission(vec![0; limits::MAX_PAYLOAD_BYTES]);
    assert!(largest.encoded_len() <= limits::MAX_MESH_MESSAGE_BYTES);
    assert!(assignment(limits::MAX_DOCUMENT_BYTES).encoded_len() <= limits::MAX_ANSWER_BYTES);
    let plan = pb::PlanDocument { yaml: vec![0; limits::MAX_PLAN_BYTES] };
    assert!(plan.encoded_len() <= limits::MAX_CONTROL_MESSAGE_BYTES);
}

#[test]
fn a_vector_is_whole_integers_with_its_own_digest() {
    let values = [0i64, -1, i64::MAX, i64::MIN];
    let payload: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(Submission::try_from(submission(payload.clone())).unwrap().coordinates(), values);
    for got in [1, 7, 9, 31] {
        let refused = ConvertError::NotAVector { field: "payload", got };
        assert_eq!(Submission::try_from(submission(vec![0; got])), Err(refused));
    }
    let missing = ConvertError::Missing { field: "payload" };
    assert_eq!(Submission::try_from(submission(vec![])), Err(missing));
    let mut changed = submission(payload);
    changed.payload[3] ^= 1;
    let refused = Submission::try_from(changed).unwrap_err();
    assert_eq!(refused, ConvertError::DigestMismatch { field: "payload" });
    assert_eq!(WireError::from(&refused), WireError::DigestMismatch);
}

#[test]
fn fixed_sizes_are_exact() {
    let wrong = |field, got| ConvertError::Length { field, expected: 32, got };
    let short = pb::Submission { plan_digest: vec![0; 31], ..submission(vec![0; 8]) };
    assert_eq!(Submission::try_from(short), Err(wrong("plan_digest", 31)));
    let long = pb::Submission { ledger_entry_hash: vec![0; 33], ..submission(vec![0; 8]) };
    assert_eq!(Submission::try_from(long), Err(wrong("ledger_entry_hash", 33)));
    let key = pb::ContractRegistration { signing_public_key: vec![], ..registration(1, 1) };
    let refused = ConvertError::Length { field: "signing_public_key", expected: 32, got: 0 };
    assert_eq!(ContractRegistration::try_from(key), Err(refused));
    let signature = pb::Assignment { signature: vec![0; 63], ..assignment(2) };
    let refused = ConvertError::Length { field: "signature", expected: 64, got: 63 };
    assert_eq!(Assignment::try_from(signature), Err(refused));
}

#[test]
fn unknown_and_unspecified_enum_values_are_refused() {
    for got in [0, 7, -1, i32::MAX] {
        let kind = pb::Assignment { kind: got, ..assignment(2) };
        assert_eq!(Assignment::try_from(kind), Err(ConvertError::UnknownValue { field: "kind", got }));
        assert_eq!(goodbye_reason(got), Err(ConvertError::UnknownValue { field: "reason", got }));
    }
    assert!(goodbye_reason(6).is_err());
    for value in 1..=6 {
        let kind = assignment_kind(value).unwrap();
        assert_eq!(i32::from(pb::AssignmentKind::from(kind)), value);
    }
    for value in 1..=5 {
        let reason = goodbye_reason(value).unwrap();
        assert_eq!(i32::from(pb::GoodbyeReason::from(reason)), value);
    }
    for value in 1..=10 {
        assert_eq!(i32::from(pb::AdmissionRefusal::from(admission_refusal(value).unwrap())), value);
    }
    assert!(admission_refusal(11).is_err());
    for value in 1..=6 {
        let code = assignment_refusal(value).unwrap();
        assert_eq!(i32::from(pb::AssignmentRefusal::from(code)), value);
        let frame = AgentFrame::AssignmentRefused { assignment_id: "a-1".parse().unwrap(), code };
        assert_eq!(AgentFrame::try_from(pb::AgentFrame::from(frame.clone())), Ok(frame));
    }
    assert!(assignment_refusal(7).is_err());
}

#[test]
fn frames_come_in_their_order() {
    let first = pb::AgentFrame {
        frame: Some(pb::agent_frame::Frame::Hello(pb::Hello {
            protocol_version: 1,
            product_version: "0.1.0".into(),
        })),
    };
    assert_eq!(hello(first.clone()).unwrap().protocol_version, 1);
    assert!(matches!(AgentFrame::try_from(first), Err(ConvertError::Text { field: "frame", .. })));
    let heartbeat = pb::AgentFrame::from(AgentFrame::Heartbeat);
    assert_eq!(hello(heartbeat.clone()), Err(ConvertError::Missing { field: "hello" }));
    assert_eq!(AgentFrame::try_from(heartbeat), Ok(AgentFrame::Heartbeat));
    assert_eq!(
        AgentFrame::try_from(pb::AgentFrame { frame: None }),
        Err(ConvertError::Missing { field: "frame" })
    );
    let greeting = Welcome {
        session_id: "s-1".parse().unwrap(),
        protocol_version: 1,
        heartbeat_interval: Duration::from_secs(5),
    };
    assert_eq!(welcome(greeting.clone().into()), Ok(greeting));
    let goodbye = CoordinatorFrame::Goodbye(GoodbyeReason::Superseded);
    assert_eq!(welcome(goodbye.clone().into()), Err(ConvertError::Missing { field: "welcome" }));
    assert_eq!(CoordinatorFrame::try_from(pb::CoordinatorFrame::from(goodbye.clone())), Ok(goodbye));
}

#[test]
fn a_heartbeat_interval_outside_its_range_is_refused() {
    for heartbeat_interval_ms in [0, 9, 3_600_001] {
        let frame = pb::Welcome { session_id: "s".into(), protocol_version: 1, heartbeat_interval_ms };
        let frame = pb::CoordinatorFrame { frame: Some(pb::coordinator_frame::Frame::Welcome(frame)) };
        assert!(matches!(welcome(frame), Err(ConvertError::Range { .. })));
    }
}

#[test]
fn a_ledger_piece_must_chain() {
    let good = chain(4, 10);
    let parsed = LedgerStatement::try_from(good.clone()).unwrap();
    assert_eq!(parsed.entries().len(), 4);
    assert_eq!(pb::LedgerStatement::from(parsed), good);
    // A piece from the middle of a ledger is fine; its first prev is for the mirror to compare.
    let middle = pb::LedgerStatement { entries: good.entries[2..].to_vec(), ..good.clone() };
    assert!(LedgerStatement::try_from(middle).is_ok());
    type Edit = fn(&mut pb::LedgerStatement);
    let edits: [(&str, u64, Edit); 4] = [
        ("changed payload", 2, |s| s.entries[1].payload[0] ^= 1),
        ("dropped entry", 2, |s| drop(s.entries.remove(1))),
        ("swapped entries", 2, |s| s.entries.swap(1, 2)),
        ("wrong genesis", 0, |s| s.entries[0].prev = vec![9; 32]),
    ];
    for (what, seq, edit) in edits {
        let mut changed = good.clone();
        edit(&mut changed);
        let refused = LedgerStatement::try_from(changed).unwrap_err();
        assert_eq!(refused, ConvertError::ChainBroken { seq }, "{what}");
        assert_eq!(WireError::from(&refused), WireError::LedgerBroken);
    }
    let empty = pb::LedgerStatement { entries: vec![], ..good };
    assert_eq!(LedgerStatement::try_from(empty), Err(ConvertError::Missing { field: "entries" }));
}

#[test]
fn fractions_chunks_and_texts_stay_in_range() {
    for progress in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        let refused = ConvertError::Range { field: "progress", expected: "0 to 1" };
        assert_eq!(PlanSummary::try_from(plan(0, progress)), Err(refused));
    }
    for (offset, total, data) in [(5, 4, 0), (0, 3, 4), (u64::MAX, 4, 1), (0, limits::MAX_BLOB_BYTES + 1, 1)]
    {
        assert!(matches!(BlobChunk::try_from(chunk(offset, total, data)), Err(ConvertError::Range { .. })));
    }
    assert!(BlobChunk::try_from(chunk(4, 4, 0)).is_ok());
    for product in ["", "a\u{7}b", "a\nb"] {
        let bad = pb::ContractRegistration { product: product.into(), ..registration(1, 1) };
        assert!(matches!(
            ContractRegistration::try_from(bad),
            Err(ConvertError::Text { field: "product", .. })
        ));
    }
    for id in ["", "a/b", "a b", "ä"] {
        assert!(matches!(id.parse::<Id>(), Err(ConvertError::Text { field: "id", .. })), "{id}");
    }
}

#[test]
fn an_admission_says_why_exactly_if_it_refuses() {
    let admission = |admitted, refusals: Vec<i32>| {
        Admission::try_from(pb::Admission { admitted, refusals, contract_digest: vec![0; 32] })
    };
    assert!(admission(true, vec![]).is_ok());
    assert_eq!(admission(false, vec![6]).unwrap().refusals, [AdmissionRefusal::Policy]);
    assert!(admission(true, vec![6]).is_err());
    assert!(admission(false, vec![]).is_err());
}

/// Bytes of protocol version 1; field numbers and types must never change. Written by hand from the wire format
/// (protobuf encoding guide: tag = number << 3 | type).
#[test]
fn golden_bytes_of_version_one() {
    let first = pb::AgentFrame {
        frame: Some(pb::agent_frame::Frame::Hello(pb::Hello {
            protocol_version: 1,
            product_version: "0.1".into(),
        })),
    };
    assert_eq!(hex::encode(first.encode_to_vec()), "0a07080112 03302e31".replace(' ', ""));
    let submission = pb::Submission {
        assignment_id: "a".into(),
        plan_digest: vec![0xaa],
        stage_or_round: 2,
        attempt: 3,
        payload: vec![0xbb],
        payload_digest: vec![0xcc],
        ledger_entry_hash: vec![0xdd],
    };
    let expected = "0a0161 1201aa 1802 2003 2a01bb 3201cc 3a01dd".replace(' ', "");
    assert_eq!(hex::encode(submission.encode_to_vec()), expected);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Arbitrary bytes decode to a refusal or to a message that parses back to itself; never a panic.
    #[test]
    fn arbitrary_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(frame) = pb::AgentFrame::decode(data.as_slice()) {
            drop(hello(frame.clone()));
            drop(AgentFrame::try_from(frame));
        }
        if let Ok(frame) = pb::CoordinatorFrame::decode(data.as_slice()) {
            drop(welcome(frame.clone()));
            drop(CoordinatorFrame::try_from(frame));
        }
        if let Ok(message) = pb::Submission::decode(data.as_slice()) {
            drop(Submission::try_from(message));
        }
        if let Ok(message) = pb::LedgerStatement::decode(data.as_slice()) {
            drop(LedgerStatement::try_from(message));
        }
        if let Ok(message) = pb::PlanSummary::decode(data.as_slice())
            && let Ok(parsed) = PlanSummary::try_from(message.clone())
        {
            prop_assert_eq!(pb::PlanSummary::from(parsed), message);
        }
    }
}
