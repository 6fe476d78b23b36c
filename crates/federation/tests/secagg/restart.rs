//! Crashes: a restored agent gives the same bytes again, an older snapshot or a damaged one gives nothing.

use tabmesh_federation::secagg::agent::{Agent, Guard, Prepared, Refusal, SNAPSHOT_VERSION, SnapshotError};
use tabmesh_federation::secagg::message::Step;

use crate::world::{NOW_MS, Shape, Stage, World, identity, rng, seat, sent};

fn world() -> World {
    World::new(Shape::complete(5, 20))
}

fn restored(world: &World, i: usize, snapshot: &[u8], guard: Guard) -> Result<Agent, SnapshotError> {
    Agent::restore(snapshot, guard, world.roster.clone(), world.keys[i].clone())
}

fn stored<M>(prepared: &Prepared<M>) -> (Vec<u8>, Guard) {
    (prepared.snapshot().to_vec(), prepared.guard())
}

#[test]
fn nothing_is_sent_before_its_guard_is_stored() {
    let (_, advert) = world().enter(0, Guard::default()).unwrap();
    let (expected, got) = (Guard { answers: 1, last_debit: 0 }, Guard::default());
    assert_eq!(advert.guard(), expected);
    assert_eq!(advert.release(got), Err(Refusal::NotStored { expected, got }));
}

#[test]
fn a_restart_after_every_step_repeats_the_same_bytes() {
    let world = world();
    let mut stage = Stage::shared(world.clone());
    let (adverts, delivery) = (stage.adverts.clone(), stage.deliveries[&seat(0)].clone());
    // After sharing.
    let shares = stage.agents[0].adverts(&adverts, &mut rng(77), NOW_MS).unwrap();
    let (snapshot, guard) = stored(&shares);
    let mut agent = restored(&world, 0, &snapshot, guard).unwrap();
    assert_eq!((agent.answered_step(), agent.due()), (Step::Share, Some(Step::Mask)));
    let again = agent.adverts(&adverts, &mut rng(78), NOW_MS).unwrap();
    assert_eq!(sent(again), sent(shares));
    // After masking: another contribution makes no difference, the stored bytes go out.
    let masked = agent.mask(&delivery, &world.contribution(0, 1), NOW_MS).unwrap();
    let (snapshot, guard) = stored(&masked);
    assert_eq!(guard, Guard { answers: 3, last_debit: 1 });
    let mut agent = restored(&world, 0, &snapshot, guard).unwrap();
    let again = agent.mask(&delivery, &world.contribution(0, 2), NOW_MS).unwrap();
    assert_eq!(again.guard(), guard);
    let masked = sent(masked);
    assert_eq!(sent(again), masked);
    // Another delivery is a second question.
    let mut other = delivery.clone();
    other.senders.pop();
    let refused = agent.mask(&other, &world.contribution(0, 2), NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::SecondAnswer { step: Step::Mask });
    // After consent and after opening.
    for (i, agent) in stage.agents.iter_mut().enumerate().skip(1) {
        stage
            .masked
            .push(sent(agent.mask(&stage.deliveries[&seat(i)], &world.contribution(i, 1), NOW_MS).unwrap()));
    }
    stage.masked.insert(0, masked);
    stage.survivors.survivors = stage.masked.iter().map(|masked| (masked.seat, masked.digest)).collect();
    let consent = agent.consent(&stage.survivors, NOW_MS).unwrap();
    let (snapshot, guard) = stored(&consent);
    let mut agent = restored(&world, 0, &snapshot, guard).unwrap();
    let consent = sent(consent);
    assert_eq!(sent(agent.consent(&stage.survivors, NOW_MS).unwrap()), consent);
    stage.consents.signatures.push((consent.seat, consent.signature));
    for other in &mut stage.agents[1..] {
        let consent = sent(other.consent(&stage.survivors, NOW_MS).unwrap());
        stage.consents.signatures.push((consent.seat, consent.signature));
    }
    let opened = agent.open(&stage.consents, NOW_MS).unwrap();
    let (snapshot, guard) = stored(&opened);
    let mut agent = restored(&world, 0, &snapshot, guard).unwrap();
    assert_eq!(agent.due(), None);
    assert_eq!(sent(agent.open(&stage.consents, NOW_MS).unwrap()), sent(opened));
    let mut fewer = stage.consents.clone();
    fewer.signatures.pop();
    let refused = agent.open(&fewer, NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::SecondAnswer { step: Step::Open });
}

#[test]
fn an_old_snapshot_is_refused_and_a_lagging_guard_is_caught_up() {
    let world = world();
    let (mut agents, list) = Stage::advertised(&world);
    let (agent, advert) = world.enter(0, Guard::default()).unwrap();
    let (old, old_guard) = stored(&advert);
    agents[0] = agent;
    let shares = agents[0].adverts(&list, &mut rng(1), NOW_MS).unwrap();
    let (new, new_guard) = stored(&shares);
    let refused = restored(&world, 0, &old, new_guard).unwrap_err();
    assert_eq!(refused, SnapshotError::RolledBack { snapshot: old_guard, guard: new_guard });
    // Crash between the two writes: the answer is in the snapshot, wasn't sent, and can be.
    let mut agent = restored(&world, 0, &new, old_guard).unwrap();
    let again = agent.adverts(&list, &mut rng(2), NOW_MS).unwrap();
    assert_eq!(again.guard(), new_guard);
    assert_eq!(sent(again), sent(shares));
    // A guard that lags more is not what a crash leaves.
    let refused = restored(&world, 0, &new, Guard::default()).unwrap_err();
    assert_eq!(refused, SnapshotError::GuardBehind { snapshot: new_guard, guard: Guard::default() });
}

#[test]
fn guards_go_on_counting_over_sums() {
    let world = world();
    let before = Guard { answers: 41, last_debit: 7 };
    let (agent, advert) = world.enter(0, before).unwrap();
    assert_eq!(advert.guard(), Guard { answers: 42, last_debit: 7 });
    assert_eq!(agent.guard(), advert.guard());
}

#[test]
fn damaged_foreign_and_newer_snapshots_are_refused() {
    let world = world();
    let (_, advert) = world.enter(0, Guard::default()).unwrap();
    let (snapshot, guard) = stored(&advert);
    for at in [0, 5, 40, snapshot.len() - 1] {
        let mut changed = snapshot.clone();
        changed[at] ^= 1;
        assert!(
            matches!(restored(&world, 0, &changed, guard), Err(SnapshotError::Damaged { .. })),
            "byte {at}"
        );
    }
    for length in [0, 4, 5, 36, snapshot.len() - 1] {
        assert!(matches!(
            restored(&world, 0, &snapshot[..length], guard),
            Err(SnapshotError::Damaged { .. })
        ));
    }
    let mut newer = snapshot.clone();
    newer[4] = SNAPSHOT_VERSION + 1;
    let got = SNAPSHOT_VERSION + 1;
    assert!(
        matches!(restored(&world, 0, &newer, guard), Err(SnapshotError::UnknownVersion { got: g }) if g == got)
    );
    let other = Agent::restore(&snapshot, guard, world.roster.clone(), identity(55).into()).unwrap_err();
    assert_eq!(other, SnapshotError::OtherIdentity);
    let foreign = World::new(Shape::complete(6, 20));
    let other = Agent::restore(&snapshot, guard, foreign.roster, world.keys[0].clone()).unwrap_err();
    assert_eq!(other, SnapshotError::OtherIdentity);
}
