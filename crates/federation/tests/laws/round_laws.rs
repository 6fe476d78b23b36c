//! R1, R2 and R3 for rounds: random histories with a restart possible at every step.

use proptest::prelude::*;
use tabmesh_federation::id::{Digest, PlanDigest};
use tabmesh_federation::phase::abandon::AbandonReason;
use tabmesh_federation::phase::collect::{Payloads, Quorum};
use tabmesh_federation::phase::{Outcome, PhaseName, Refusal};
use tabmesh_federation::round::{Phase, Round, RoundEvent};

use crate::world::{
    AGENTS, Answer, DEADLINE_MS, ENDS_MS, Oracle, announcement, answer, payloads, submission,
};

#[derive(Debug, Clone)]
enum Op {
    Open,
    Submit(usize, i64),
    Timer,
    Restart,
    /// The coordinator does what the phase asks for.
    Work,
    /// A result under another digest.
    OtherResult,
    Cancel,
    Fail,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => Just(Op::Open),
        12 => (0..=AGENTS).prop_map(|i| Op::Submit(i, 1)),
        3 => (0..AGENTS).prop_map(|i| Op::Submit(i, 2)),
        3 => Just(Op::Timer),
        4 => Just(Op::Restart),
        5 => Just(Op::Work),
        1 => Just(Op::OtherResult),
        1 => Just(Op::Cancel),
        1 => Just(Op::Fail),
    ]
}

fn round() -> Round {
    Round::new(PlanDigest::of(b"plan"), 0, announcement(Quorum::AtLeast { updates: 2 }))
}

fn result() -> Digest {
    Digest::of(b"result")
}

fn restored(round: &Round) -> Round {
    serde_json::from_slice(&serde_json::to_vec(round).unwrap()).unwrap()
}

fn rank(phase: PhaseName) -> u8 {
    match phase {
        PhaseName::Open => 0,
        PhaseName::Collect => 1,
        PhaseName::Aggregate => 2,
        PhaseName::Publish => 3,
        PhaseName::Published | PhaseName::Abandoned => 4,
    }
}

/// The round of the oracle: a phase beside the rules of collecting.
struct World {
    phase: PhaseName,
    collecting: Oracle,
    now: i64,
}

impl World {
    fn at(&mut self, clock: i64) {
        self.now = self.now.max(clock);
        let now = self.now;
        if self.phase == PhaseName::Collect {
            self.collecting.at(now);
            self.phase = match self.collecting.ended {
                None => PhaseName::Collect,
                Some(true) => PhaseName::Aggregate,
                Some(false) => PhaseName::Abandoned,
            };
        }
        let overdue = match self.phase {
            PhaseName::Open => now >= DEADLINE_MS,
            PhaseName::Aggregate | PhaseName::Publish => now >= ENDS_MS,
            _ => false,
        };
        if overdue {
            self.phase = PhaseName::Abandoned;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(768))]

    #[test]
    fn a_round_agrees_with_the_oracle_at_every_step(
        ops in prop::collection::vec((op(), -2_000_i64..5_000), 1..60),
        open_first in prop::bool::weighted(0.8),
    ) {
        let mut state = round();
        let mut world = World { phase: PhaseName::Open, collecting: Oracle::new(2), now: 1_000 };
        let mut announced = false;
        let mut clock = 1_000_i64;
        let first = open_first.then_some((Op::Open, 0));
        for (op, advance) in first.into_iter().chain(ops) {
            clock += advance;
            world.at(clock);
            let before = world.phase;
            let over = rank(before) == 4;
            let (event, expected) = match &op {
                Op::Open => {
                    let expected = match before {
                        PhaseName::Open | PhaseName::Collect => Answer::Applied,
                        _ => Answer::WrongPhase,
                    };
                    if before == PhaseName::Open {
                        world.phase = PhaseName::Collect;
                        announced = true;
                    }
                    (RoundEvent::Opened, expected)
                }
                Op::Submit(i, amount) => {
                    let expected = if announced {
                        world.collecting.submit(*i, *amount, world.now)
                    } else {
                        Answer::WrongPhase
                    };
                    (RoundEvent::UpdateReceived(submission(*i, *amount)), expected)
                }
                Op::Timer => (RoundEvent::DeadlineReached, Answer::Applied),
                Op::Restart => {
                    state = restored(&state);
                    (RoundEvent::Restarted { payloads: payloads(0..AGENTS) }, Answer::Applied)
                }
                Op::Work => match before {
                    PhaseName::Aggregate => {
                        // R1: what goes into the aggregate is each accepted update once.
                        let aged = state.apply(RoundEvent::DeadlineReached, clock).next;
                        prop_assert_eq!(aged.collection().unwrap().sum().unwrap(), world.collecting.sum());
                        world.phase = PhaseName::Publish;
                        (RoundEvent::Aggregated { result: result() }, Answer::Applied)
                    }
                    PhaseName::Publish => {
                        world.phase = PhaseName::Published;
                        (RoundEvent::Published { result: result() }, Answer::Applied)
                    }
                    PhaseName::Published => (RoundEvent::Published { result: result() }, Answer::Applied),
                    _ => (RoundEvent::Published { result: result() }, Answer::WrongPhase),
                },
                Op::OtherResult => {
                    let got = Digest::of(b"other");
                    let event = RoundEvent::Published { result: got };
                    let changed = Refusal::ResultChanged { expected: result(), got }.to_string();
                    match before {
                        PhaseName::Publish | PhaseName::Published => (event, Answer::Other(changed)),
                        _ => (event, Answer::WrongPhase),
                    }
                }
                Op::Cancel | Op::Fail => {
                    let event = match op {
                        Op::Cancel => RoundEvent::Cancelled { by: "op".into() },
                        _ => RoundEvent::Failed { what: "disk".into() },
                    };
                    let expected = match before {
                        PhaseName::Published => Answer::WrongPhase,
                        _ => Answer::Applied,
                    };
                    if !over {
                        world.phase = PhaseName::Abandoned;
                        world.collecting.ended.get_or_insert(false);
                    }
                    (event, expected)
                }
            };
            let was = state.phase_name();
            let step = state.apply(event, clock);
            prop_assert_eq!(answer(&step.outcome), expected, "{:?} in {:?}", op, before);
            world.at(clock);
            // R2: forward only.
            prop_assert!(rank(step.next.phase_name()) >= rank(was));
            prop_assert_eq!(step.next.phase_name(), world.phase, "{:?} in {:?}", op, before);
            if !step.changed {
                prop_assert_eq!(step.next.phase_name(), was);
            }
            if let Some(collection) = step.next.collection() {
                let receipts: Vec<_> = collection.receipts().values().cloned().collect();
                prop_assert_eq!(receipts, world.collecting.receipts());
            }
            state = step.next;
        }
        // R3: after deadline and grace nothing is half done, also across a last restart.
        let event = RoundEvent::Restarted { payloads: payloads(0..AGENTS) };
        let last = restored(&state).apply(event, ENDS_MS).next;
        prop_assert!(last.is_over());
        if let Phase::Published { end, .. } = last.phase() {
            prop_assert_eq!(end.result, result());
        }
    }
}

/// A round in each phase, with two updates in.
fn course() -> Vec<Round> {
    let mut rounds = vec![round()];
    for (event, now) in [
        (RoundEvent::Opened, 1_000),
        (RoundEvent::UpdateReceived(submission(0, 1)), 2_000),
        (RoundEvent::UpdateReceived(submission(1, 1)), 3_000),
        (RoundEvent::DeadlineReached, DEADLINE_MS),
        (RoundEvent::Aggregated { result: result() }, DEADLINE_MS + 1),
        (RoundEvent::Published { result: result() }, DEADLINE_MS + 2),
    ] {
        let step = rounds.last().unwrap().apply(event, now);
        assert!(step.changed);
        rounds.push(step.next);
    }
    rounds
}

#[test]
fn the_straight_course_publishes_and_survives_a_restart_after_every_step() {
    let names: Vec<PhaseName> = course().iter().map(Round::phase_name).collect();
    use PhaseName as P;
    assert_eq!(names, [P::Open, P::Collect, P::Collect, P::Collect, P::Aggregate, P::Publish, P::Published]);
    for round in course() {
        let event = RoundEvent::Restarted { payloads: payloads([0, 1]) };
        let step = restored(&round).apply(event, 0);
        assert_eq!(step.next, round);
        assert!(!step.changed);
    }
}

#[test]
fn a_restart_that_lost_an_update_abandons_only_while_it_is_needed() {
    for round in course() {
        let needed = matches!(round.phase_name(), PhaseName::Collect | PhaseName::Aggregate)
            && !round.collection().unwrap().receipts().is_empty();
        let step = restored(&round).apply(RoundEvent::Restarted { payloads: Payloads::new() }, 0);
        if needed {
            let Phase::Abandoned { end, .. } = step.next.phase() else {
                panic!("{:?}", step.next.phase_name())
            };
            assert!(
                matches!(&end.cause, AbandonReason::PayloadLost { agent, .. } if agent.as_str() == "agent-0")
            );
            // Its agents still get their receipts.
            let retry = step.next.apply(RoundEvent::UpdateReceived(submission(0, 1)), 5_000);
            assert!(matches!(retry.outcome, Outcome::Duplicate(_)));
        } else {
            assert_eq!(step.next.phase_name(), round.phase_name());
        }
    }
}

#[test]
fn a_coordinator_that_was_down_past_the_end_abandons_at_once_with_the_phase_it_left() {
    for round in course() {
        let event = RoundEvent::Restarted { payloads: payloads([0, 1]) };
        let step = restored(&round).apply(event, ENDS_MS);
        let expected = match (round.phase_name(), round.collection().map_or(0, |c| c.receipts().len())) {
            (PhaseName::Published, _) => None,
            (PhaseName::Open, _) => Some(AbandonReason::NeverOpened),
            (PhaseName::Collect, got @ 0..=1) => Some(AbandonReason::QuorumNotReached { expected: 2, got }),
            (PhaseName::Publish, _) => Some(AbandonReason::Overdue { phase: PhaseName::Publish }),
            _ => Some(AbandonReason::Overdue { phase: PhaseName::Aggregate }),
        };
        let cause = match step.next.phase() {
            Phase::Abandoned { end, .. } => Some(end.cause.clone()),
            _ => None,
        };
        assert_eq!(cause, expected, "{}", round.phase_name());
    }
}

#[test]
fn a_published_result_never_changes() {
    let published = course().pop().unwrap();
    let got = Digest::of(b"other");
    for event in [RoundEvent::Aggregated { result: got }, RoundEvent::Published { result: got }] {
        let step = published.apply(event, DEADLINE_MS + 3);
        let expected = Refusal::ResultChanged { expected: result(), got };
        assert_eq!(step.outcome, Outcome::Refused(expected));
        assert!(!step.changed);
    }
    let again = published.apply(RoundEvent::Published { result: result() }, DEADLINE_MS + 3);
    assert_eq!((again.outcome, again.changed), (Outcome::Applied, false));
    let cancel = published.apply(RoundEvent::Cancelled { by: "op".into() }, DEADLINE_MS + 3);
    let expected = Refusal::WrongPhase { event: "stopping", phase: PhaseName::Published };
    assert_eq!(cancel.outcome, Outcome::Refused(expected));
}
