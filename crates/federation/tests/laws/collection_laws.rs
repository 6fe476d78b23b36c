//! R1 for collections: whatever is repeated, late, contradicted, lost or restarted, each agent counts 0 or 1 times.

use proptest::prelude::*;
use tabmesh_federation::id::Digest;
use tabmesh_federation::phase::abandon::AbandonReason;
use tabmesh_federation::phase::collect::{
    Collection, CollectionState, Payloads, Quorum, Submission, SumError,
};
use tabmesh_federation::phase::{Outcome, PhaseName, Receipt, Refusal};
use tabmesh_federation::screen::ScreenRefusal;
use tabmesh_federation::vector::Vector;

use crate::world::{
    AGENTS, Answer, DEADLINE_MS, Oracle, agent, announcement, answer, id, one_hot, payloads, submission,
};

#[derive(Debug, Clone)]
enum Op {
    Submit(usize, i64),
    WrongRound(usize),
    Tick,
    Restart,
    Cancel,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => (0..=AGENTS).prop_map(|i| Op::Submit(i, 1)),
        3 => (0..AGENTS).prop_map(|i| Op::Submit(i, 2)),
        1 => (0..AGENTS).prop_map(Op::WrongRound),
        3 => Just(Op::Tick),
        3 => Just(Op::Restart),
        1 => Just(Op::Cancel),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_collection_agrees_with_the_oracle_at_every_step(
        ops in prop::collection::vec((op(), -3_000_i64..6_000), 1..60),
        needed in 1_u32..=5,
        everyone in any::<bool>(),
    ) {
        let quorum = if everyone { Quorum::Everyone } else { Quorum::AtLeast { updates: needed } };
        let mut state = Collection::new(announcement(quorum));
        let mut oracle = Oracle::new(if everyone { AGENTS } else { needed as usize });
        let mut clock = 1_000_i64;
        for (op, advance) in ops {
            clock += advance;
            let (step, expected) = match &op {
                Op::Submit(i, amount) => {
                    let step = state.submit(&submission(*i, *amount), clock);
                    (step, oracle.submit(*i, *amount, clock))
                }
                Op::WrongRound(i) => {
                    oracle.at(clock);
                    let step = state.submit(&Submission { collection: id(2), ..submission(*i, 1) }, clock);
                    let (expected, got) = (id(1), id(2));
                    (step, Answer::Other(Refusal::WrongCollection { expected, got }.to_string()))
                }
                Op::Tick => {
                    oracle.at(clock);
                    (state.tick(clock), Answer::Applied)
                }
                Op::Restart => {
                    oracle.at(clock);
                    let stored = serde_json::to_vec(&state).unwrap();
                    let restored: Collection = serde_json::from_slice(&stored).unwrap();
                    prop_assert!(restored.values().is_empty());
                    (restored.restart(&payloads(0..AGENTS), clock), Answer::Applied)
                }
                Op::Cancel => {
                    oracle.at(clock);
                    let step = state.cancel(AbandonReason::Cancelled { by: "op".into() }, clock);
                    let possible = oracle.ended.is_none();
                    oracle.ended.get_or_insert(false);
                    (step, if possible { Answer::Applied } else { Answer::WrongPhase })
                }
            };
            prop_assert_eq!(answer(&step.outcome), expected);
            let moved = (step.next.state(), step.next.receipts()) != (state.state(), state.receipts());
            prop_assert_eq!(step.changed, moved, "{:?}", op);
            state = step.next;
            check(&state, &oracle)?;
        }
        // The deadline ends every collection.
        oracle.at(DEADLINE_MS);
        let last = state.tick(DEADLINE_MS).next;
        prop_assert!(oracle.ended.is_some());
        check(&last, &oracle)?;
    }
}

fn check(state: &Collection, oracle: &Oracle) -> Result<(), TestCaseError> {
    let phase = match oracle.ended {
        None => PhaseName::Collect,
        Some(true) => PhaseName::Aggregate,
        Some(false) => PhaseName::Abandoned,
    };
    prop_assert_eq!(state.phase(), phase);
    let receipts: Vec<Receipt> = state.receipts().values().cloned().collect();
    prop_assert_eq!(receipts, oracle.receipts());
    if phase == PhaseName::Aggregate {
        prop_assert_eq!(state.sum().unwrap(), oracle.sum());
    } else {
        prop_assert_eq!(state.sum(), Err(SumError::NotComplete));
    }
    Ok(())
}

fn collecting() -> Collection {
    Collection::new(announcement(Quorum::AtLeast { updates: 2 }))
}

#[test]
fn each_refusal_has_its_name() {
    let state = collecting().submit(&submission(0, 1), 2_000).next;
    let refusal = |s: &Submission, now| match state.submit(s, now).outcome {
        Outcome::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    };
    let good = submission(1, 1);
    assert_eq!(refusal(&submission(AGENTS, 1), 2_000), Refusal::NotInRoster { agent: agent(AGENTS) });
    let wrong = Submission { collection: id(2), ..good.clone() };
    assert_eq!(refusal(&wrong, 2_000), Refusal::WrongCollection { expected: id(1), got: id(2) });
    let wrong = Submission { attempt: 2, ..good.clone() };
    assert_eq!(refusal(&wrong, 2_000), Refusal::WrongAttempt { expected: 1, got: 2 });
    let (expected, got) = (good.descriptor, Digest::of(b"other"));
    let wrong = Submission { descriptor: got, ..good.clone() };
    assert_eq!(refusal(&wrong, 2_000), Refusal::WrongDescriptor { expected, got });
    assert_eq!(refusal(&good, DEADLINE_MS), Refusal::Late { deadline_ms: DEADLINE_MS, now_ms: DEADLINE_MS });
    let (accepted, got) = (submission(0, 1).payload, submission(0, 2).payload);
    assert_eq!(refusal(&submission(0, 2), 2_000), Refusal::Conflict { agent: agent(0), accepted, got });
    let short = Submission { vector: Vector::new([1_i64]), ..good.clone() };
    let shape = ScreenRefusal::Shape { expected: AGENTS, got: 1 };
    assert_eq!(refusal(&short, 2_000), Refusal::Screened(shape));
    let lying = Submission { payload: Digest::of(b"other"), ..good.clone() };
    let (announced, got) = (lying.payload, good.payload);
    assert_eq!(refusal(&lying, 2_000), Refusal::Screened(ScreenRefusal::Digest { announced, got }));
    let huge = Vector::new([i64::MAX; AGENTS]);
    let huge = Submission { payload: *huge.digest(), vector: huge, ..good.clone() };
    assert!(matches!(refusal(&huge, 2_000), Refusal::Screened(ScreenRefusal::Range { position: 0, .. })));
    let cancelled = state.cancel(AbandonReason::Cancelled { by: "op".into() }, 2_000).next;
    let expected = Refusal::WrongPhase { event: "submitting", phase: PhaseName::Abandoned };
    assert_eq!(cancelled.submit(&good, 2_000).outcome, Outcome::Refused(expected));
}

#[test]
fn a_lost_answer_is_repeated_even_after_the_end() {
    let accepted = collecting().submit(&submission(0, 1), 2_000);
    let Outcome::Accepted(receipt) = accepted.outcome else { panic!("not accepted") };
    for (state, now) in [
        (accepted.next.clone(), 3_000),
        (accepted.next.tick(DEADLINE_MS).next, DEADLINE_MS + 5),
        (accepted.next.cancel(AbandonReason::NeverOpened, 2_500).next, 9_000),
    ] {
        let step = state.submit(&submission(0, 1), now);
        assert_eq!(step.outcome, Outcome::Duplicate(receipt.clone()));
    }
}

#[test]
fn a_clock_that_jumps_back_reopens_nothing() {
    let state = collecting().submit(&submission(0, 1), 2_000).next;
    let state = state.submit(&submission(1, 1), 3_000).next.tick(DEADLINE_MS).next;
    let step = state.submit(&submission(2, 1), 4_000);
    assert_eq!(step.outcome, Outcome::Refused(Refusal::Late { deadline_ms: DEADLINE_MS, now_ms: 4_000 }));
    assert_eq!(step.next.sum().unwrap(), [1, 1, 0, 0, 0]);
}

#[test]
fn a_restart_without_its_payloads_abandons_with_the_name_of_the_lost_update() {
    let state = collecting().submit(&submission(0, 1), 2_000).next.submit(&submission(1, 1), 2_000).next;
    let lost = state.restart(&payloads([0]), 3_000).next;
    let expected = AbandonReason::PayloadLost { agent: agent(1), payload: submission(1, 1).payload };
    assert_eq!(lost.state(), &CollectionState::Abandoned { cause: expected, at_ms: 3_000 });

    let mut changed: Payloads = payloads([0]);
    changed.insert(submission(1, 1).payload, one_hot(2, 1));
    let changed = state.restart(&changed, 3_000).next;
    let expected = AbandonReason::PayloadChanged { agent: agent(1), payload: submission(1, 1).payload };
    assert_eq!(changed.state(), &CollectionState::Abandoned { cause: expected, at_ms: 3_000 });

    // Forgetting the restart event gives no wrong sum.
    let complete = state.tick(DEADLINE_MS).next;
    let stored = serde_json::to_vec(&complete).unwrap();
    let restored: Collection = serde_json::from_slice(&stored).unwrap();
    assert_eq!(restored.sum(), Err(SumError::NotLoaded { missing: 2, accepted: 2 }));
}

#[test]
fn the_whole_roster_completes_early_and_a_fixed_seed_waits_for_it() {
    let everyone = || Collection::new(announcement(Quorum::Everyone));
    let some = (0..AGENTS - 1).fold(everyone(), |state, i| state.submit(&submission(i, 1), 2_000).next);
    assert_eq!(some.state(), &CollectionState::Collecting);
    let cause = AbandonReason::QuorumNotReached { expected: AGENTS, got: AGENTS - 1 };
    let late = some.tick(DEADLINE_MS).next;
    assert_eq!(late.state(), &CollectionState::Abandoned { cause, at_ms: DEADLINE_MS });
    let all = some.submit(&submission(AGENTS - 1, 1), 2_500).next;
    assert_eq!(all.state(), &CollectionState::Complete { at_ms: 2_500 });
    assert_eq!(all.sum().unwrap(), [1; AGENTS]);
}
