//! Whatever doesn't fit is refused by name, by agents and by the server, and changes nothing.

use std::collections::BTreeMap;

use tabmesh_federation::id::{CollectionId, Digest, PlanDigest};
use tabmesh_federation::secagg::agent::{Guard, Joined, Refusal};
use tabmesh_federation::secagg::consistency::ConsentError;
use tabmesh_federation::secagg::descriptor::{
    MAX_SUM_DESCRIPTOR_BYTES, MAX_SUM_DIMENSION, SumDescriptor, SumDescriptorError, least_threshold,
};
use tabmesh_federation::secagg::keys::KeyError;
use tabmesh_federation::secagg::mask::Width;
use tabmesh_federation::secagg::message::{Consents, Masked, Opened, Step};
use tabmesh_federation::secagg::policy::PolicyRefusal;
use tabmesh_federation::secagg::server::{Abort, Accepted, Advertising, Rejection};

use crate::world::{NOW_MS, Shape, Silent, Stage, World, identity, opened, revealed, rng, row, seat, sent};

fn world() -> World {
    World::new(Shape::complete(5, 20))
}

#[test]
fn thresholds_are_the_ones_the_bounds_give() {
    // Two thirds, or half with the colluders, whichever is more; then one.
    for ((agents, colluders), expected) in [
        ((4, 1), 3),
        ((5, 1), 4),
        ((6, 1), 5),
        ((10, 1), 7),
        ((10, 3), 7),
        ((40, 13), 27),
        ((1000, 100), 667),
    ] {
        let least = least_threshold(agents, colluders);
        assert_eq!(least, expected);
        assert!(2 * least > agents + colluders as usize, "two quorums have an honest agent in common");
    }
}

#[test]
fn a_graph_with_fewer_neighbours_than_the_policy_wants_is_refused() {
    for ring in [false, true] {
        let shape = Shape { agents: 40, dropouts: 2, ring, ..Shape::complete(40, 20) };
        let mut world = World::new(shape);
        let degree = u32::try_from(world.descriptor.topology.degree(40)).unwrap();
        assert!(if ring { degree < 39 } else { degree == 39 }, "{degree}");
        world.policy.min_neighbours = degree;
        assert!(world.enter(0, Guard::default()).is_ok());
        world.policy.min_neighbours += 1;
        let refused = world.enter(0, Guard::default()).unwrap_err();
        let Refusal::Policy(PolicyRefusal::Beyond { what: "neighbours", limit, got }) = refused else {
            panic!("{refused}")
        };
        assert_eq!((limit, got), (u64::from(degree) + 1, u64::from(degree)));
    }
}

#[test]
fn figures_an_agent_did_not_admit_are_refused() {
    let world = world();
    let change = |change: fn(&mut SumDescriptor)| {
        let mut descriptor = world.descriptor.clone();
        change(&mut descriptor);
        world.enter_with(0, Guard::default(), &descriptor.to_bytes(), &mut rng(1)).unwrap_err()
    };
    let other = |what: &str, refusal: &Refusal| {
        assert!(
            matches!(refusal, Refusal::Policy(PolicyRefusal::Other { what: w, .. }) if *w == what),
            "{refusal}"
        );
    };
    other("collection", &change(|d| d.collection = CollectionId::new(5, &mut rng(99), None)));
    other("payload", &change(|d| d.payload = Digest::of(b"other")));
    other("model", &change(|d| d.model = Digest::of(b"other")));
    other("plan", &change(|d| d.plan = PlanDigest::of(b"other")));
    other("dimension", &change(|d| d.dimension += 1));
    let range = |what: &str, refusal: &Refusal| {
        let named = matches!(
            refusal,
            Refusal::Policy(PolicyRefusal::Descriptor(SumDescriptorError::Range { what: w, .. })) if *w == what
        );
        assert!(named, "{refusal}");
    };
    range("attempt", &change(|d| d.attempt = 0));
    range("dimension", &change(|d| d.dimension = 0));
    range("dimension", &change(|d| d.dimension = MAX_SUM_DIMENSION + 1));
    range("step seconds", &change(|d| d.step_s = 0));
    range("colluders", &change(|d| d.noise.colluders = 0));
    range("colluders", &change(|d| d.noise.colluders = 2));
    range("threshold", &change(|d| d.threshold = 5));
    let noise = change(|d| d.noise.dropouts = 0);
    assert!(
        matches!(noise, Refusal::Policy(PolicyRefusal::Descriptor(SumDescriptorError::Noise(_)))),
        "{noise}"
    );
    let beyond = change(|d| d.attempt = 4);
    assert!(matches!(beyond, Refusal::Policy(PolicyRefusal::Beyond { what: "attempt", limit: 3, got: 4 })));
    let mut cautious = world.clone();
    cautious.policy.colluders = 2;
    let refused = cautious.enter(0, Guard::default()).unwrap_err();
    assert!(matches!(
        refused,
        Refusal::Policy(PolicyRefusal::Beyond { what: "colluders", limit: 2, got: 1 })
    ));
}

#[test]
fn descriptors_that_are_none_are_refused() {
    let malformed =
        |bytes: &[u8]| matches!(SumDescriptor::from_bytes(bytes), Err(SumDescriptorError::Malformed { .. }));
    let bytes = world().bytes();
    assert!(SumDescriptor::from_bytes(&bytes).is_ok());
    assert!(malformed(&bytes[1..]) && malformed(b"{}"));
    let padded = [bytes.clone(), vec![b' '; MAX_SUM_DESCRIPTOR_BYTES - bytes.len()]].concat();
    assert!(SumDescriptor::from_bytes(&padded).is_ok());
    assert!(malformed(&[padded, vec![b' ']].concat()));
}

#[test]
fn an_identity_the_roster_does_not_have_stays_out() {
    let mut world = world();
    world.keys[0] = identity(77).into();
    assert_eq!(world.enter(0, Guard::default()).unwrap_err(), Refusal::NotInRoster);
}

#[test]
fn lists_of_adverts_are_checked() {
    let world = world();
    let (mut agents, honest) = Stage::advertised(&world);
    let what = "adverts";
    let mut ask = |list| agents[0].adverts(&list, &mut rng(1), NOW_MS).unwrap_err();
    let mut list = honest.clone();
    list.descriptor = Digest::of(b"other");
    assert!(matches!(ask(list), Refusal::WrongDescriptor { .. }));
    let mut list = honest.clone();
    list.adverts.swap(1, 2);
    assert_eq!(ask(list), Refusal::Order { what, seat: seat(1) });
    let mut list = honest.clone();
    list.adverts.insert(1, honest.adverts[1].clone());
    assert_eq!(ask(list), Refusal::Order { what, seat: seat(1) });
    let mut list = honest.clone();
    list.adverts[4].seat = seat(5);
    assert_eq!(ask(list), Refusal::Foreign { what, seat: seat(5) });
    let mut list = honest.clone();
    list.adverts.remove(0);
    assert_eq!(ask(list), Refusal::Missing { what, seat: seat(0) });
    let mut list = honest.clone();
    list.adverts.truncate(3);
    assert_eq!(ask(list), Refusal::TooFew { what, expected: 4, got: 3 });
    let mut list = honest.clone();
    list.adverts[0].share_key = list.adverts[0].mask_key;
    assert_eq!(ask(list), Refusal::OwnEntryAltered { what });
    let mut list = honest.clone();
    list.adverts[3].signature = list.adverts[2].signature;
    assert_eq!(ask(list), Refusal::BadSignature { seat: seat(3) });
    assert!(agents[0].adverts(&honest, &mut rng(1), NOW_MS).is_ok(), "refusals changed nothing");
}

#[test]
fn deliveries_are_checked() {
    let world = world();
    let mut stage = Stage::shared(world.clone());
    let honest = stage.deliveries[&seat(0)].clone();
    let contribution = world.contribution(0, 1);
    let mut ask = |delivery| stage.agents[0].mask(&delivery, &contribution, NOW_MS).unwrap_err();
    let mut delivery = honest.clone();
    delivery.senders.truncate(3);
    assert_eq!(ask(delivery), Refusal::TooFew { what: "senders", expected: 4, got: 3 });
    let mut delivery = honest.clone();
    delivery.senders.remove(0);
    assert_eq!(ask(delivery), Refusal::Missing { what: "senders", seat: seat(0) });
    let mut delivery = honest.clone();
    delivery.senders.push(seat(9));
    assert_eq!(ask(delivery), Refusal::Foreign { what: "senders", seat: seat(9) });
    let mut delivery = honest.clone();
    delivery.sealed.remove(&seat(2));
    assert_eq!(ask(delivery), Refusal::Missing { what: "sealed shares", seat: seat(2) });
    let mut delivery = honest.clone();
    let moved = delivery.sealed[&seat(1)].clone();
    delivery.sealed.insert(seat(0), moved.clone());
    assert_eq!(ask(delivery), Refusal::Foreign { what: "sealed shares", seat: seat(0) });
    let mut delivery = honest.clone();
    delivery.sealed.insert(seat(2), moved);
    assert_eq!(ask(delivery), Refusal::Key(KeyError::Sealed { from: seat(2), to: seat(0) }));
    let mut delivery = honest.clone();
    delivery.sealed.get_mut(&seat(3)).unwrap().0.pop();
    assert_eq!(ask(delivery), Refusal::Key(KeyError::Sealed { from: seat(3), to: seat(0) }));
    assert!(stage.agents[0].mask(&honest, &contribution, NOW_MS).is_ok(), "refusals changed nothing");
}

#[test]
fn survivors_and_signatures_are_checked() {
    let mut stage = Stage::masked(world());
    let what = "survivors";
    let honest = stage.survivors.clone();
    let mut ask = |list| stage.agents[0].consent(&list, NOW_MS).unwrap_err();
    let mut list = honest.clone();
    list.survivors.remove(0);
    assert_eq!(ask(list), Refusal::Missing { what, seat: seat(0) });
    let mut list = honest.clone();
    list.survivors[0].1 = Digest::of(b"other");
    assert_eq!(ask(list), Refusal::OwnEntryAltered { what });
    let mut list = honest.clone();
    list.survivors.push((seat(8), Digest::of(b"other")));
    assert_eq!(ask(list), Refusal::Foreign { what, seat: seat(8) });
    let mut list = honest;
    list.survivors[2] = list.survivors[1];
    assert_eq!(ask(list), Refusal::Order { what, seat: seat(1) });

    let mut stage = Stage::signed(world());
    let honest = stage.consents.clone();
    let mut ask = |list: Consents| stage.agents[0].open(&list, NOW_MS).unwrap_err();
    let mut list = honest.clone();
    list.signatures.truncate(3);
    assert_eq!(ask(list), Refusal::Consent(ConsentError::TooFew { expected: 4, got: 3 }));
    let mut list = honest.clone();
    list.signatures[2] = list.signatures[1];
    assert_eq!(ask(list), Refusal::Consent(ConsentError::Order { seat: seat(1) }));
    let mut list = honest.clone();
    list.signatures[4].0 = seat(6);
    assert_eq!(ask(list), Refusal::Consent(ConsentError::NotSurvivor { seat: seat(6) }));
    let mut list = honest.clone();
    list.signatures[1].1 = list.signatures[0].1;
    assert_eq!(ask(list), Refusal::Consent(ConsentError::OtherHistory { seat: seat(1) }));
    assert!(stage.agents[0].open(&honest, NOW_MS).is_ok(), "refusals changed nothing");
}

#[test]
fn steps_come_in_order_and_in_time() {
    let mut stage = Stage::masked(world());
    let list = stage.adverts.clone();
    let refused = stage.agents[0].adverts(&list, &mut rng(1), NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::NotDue { expected: Some(Step::Consent), got: Step::Share });
    let consents = stage.consents.clone();
    let refused = stage.agents[0].open(&consents, NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::NotDue { expected: Some(Step::Consent), got: Step::Open });
    let deadline_ms = stage.world.descriptor.deadline_ms(Step::Consent);
    let list = stage.survivors.clone();
    let refused = stage.agents[0].consent(&list, deadline_ms).unwrap_err();
    assert_eq!(refused, Refusal::Late { step: Step::Consent, deadline_ms, now_ms: deadline_ms });
    assert!(stage.agents[0].consent(&list, deadline_ms - 1).is_ok());
}

#[test]
fn reveals_are_the_parts_committed_to() {
    let world = World::new(Shape {
        agents: 60,
        dimension: 4,
        width: Width::Bits64,
        dropouts: 4,
        colluders: 1,
        ring: true,
    });
    let (mut agents, list) = Stage::advertised(&world);
    let honest = revealed(&world, &mut agents, &list);
    let mut other = honest.clone();
    let moved = other.nonces[&seat(4)];
    other.nonces.insert(seat(3), moved);
    assert_eq!(
        agents[0].reveals(&other, &mut rng(1), NOW_MS).unwrap_err(),
        Refusal::BadReveal { seat: seat(3) }
    );
    let mut other = honest.clone();
    other.nonces.remove(&seat(7));
    let refused = Refusal::Missing { what: "reveals", seat: seat(7) };
    assert_eq!(agents[0].reveals(&other, &mut rng(1), NOW_MS).unwrap_err(), refused);
    let mut other = honest.clone();
    other.nonces.insert(seat(60), moved);
    let refused = Refusal::Foreign { what: "reveals", seat: seat(60) };
    assert_eq!(agents[0].reveals(&other, &mut rng(1), NOW_MS).unwrap_err(), refused);
    let shares = sent(agents[0].reveals(&honest, &mut rng(1), NOW_MS).unwrap());
    assert!(shares.sealed.len() < 59, "a ring, not the complete graph");
}

#[test]
fn the_server_takes_each_answer_once_and_names_what_it_refuses() {
    let world = world();
    let (mut agents, list) = Stage::advertised(&world);
    let mut server = Advertising::open(&world.bytes(), world.roster.clone()).unwrap();
    assert_eq!(server.accept(list.adverts[0].clone(), NOW_MS), Ok(Accepted::New));
    assert_eq!(server.accept(list.adverts[0].clone(), NOW_MS), Ok(Accepted::Again));
    let other = sent(world.enter_with(0, Guard::default(), &world.bytes(), &mut rng(5)).unwrap().1);
    let conflict = Rejection::Conflict { seat: seat(0), step: Step::Advertise };
    assert_eq!(server.accept(other, NOW_MS), Err(conflict));
    let mut stolen = list.adverts[1].clone();
    stolen.mask_key = list.adverts[0].mask_key;
    assert_eq!(server.accept(stolen.clone(), NOW_MS), Err(Rejection::BadSignature { seat: seat(1) }));
    assert_eq!(
        server.accept(stolen.signed(&world.keys[1]), NOW_MS),
        Err(Rejection::SharedKey { seat: seat(1) })
    );
    let mut foreign = list.adverts[1].clone();
    foreign.seat = seat(5);
    let refused = Rejection::NotExpected { seat: seat(5), step: Step::Advertise };
    assert_eq!(server.accept(foreign, NOW_MS), Err(refused));
    let deadline_ms = world.descriptor.deadline_ms(Step::Advertise);
    let late = Rejection::Late { deadline_ms, now_ms: deadline_ms };
    assert_eq!(server.accept(list.adverts[1].clone(), deadline_ms), Err(late));
    for advert in &list.adverts[1..] {
        assert_eq!(server.accept(advert.clone(), NOW_MS), Ok(Accepted::New));
    }
    assert!(server.missing().is_empty());

    let (list, revealing) = server.close().unwrap();
    assert!(!revealing.needed() && revealing.missing().is_empty());
    let (_, mut sharing) = revealing.close().unwrap();
    let mut shares = BTreeMap::new();
    for agent in &mut agents {
        if let Joined::Shares(own) = sent(agent.adverts(&list, &mut rng(1), NOW_MS).unwrap()) {
            shares.insert(own.seat, own);
        }
    }
    let mut short = shares[&seat(0)].clone();
    short.sealed.remove(&seat(1));
    assert_eq!(sharing.accept(short, NOW_MS), Err(Rejection::WrongShares { seat: seat(0) }));
    for own in shares.into_values() {
        sharing.accept(own, NOW_MS).unwrap();
    }
    let (deliveries, mut masking) = sharing.close().unwrap();
    let masked = sent(agents[0].mask(&deliveries[&seat(0)], &world.contribution(0, 1), NOW_MS).unwrap());
    let mut changed = masked.clone();
    changed.payload[0] ^= 1;
    assert_eq!(masking.accept(&changed, NOW_MS), Err(Rejection::Digest { seat: seat(0) }));
    changed.payload.pop();
    changed.digest = Digest::of(&changed.payload);
    assert!(matches!(masking.accept(&changed, NOW_MS), Err(Rejection::Length(_))));
    assert_eq!(masking.accept(&masked, NOW_MS), Ok(Accepted::New));
    assert_eq!(masking.accept(&masked, NOW_MS), Ok(Accepted::Again));
    assert_eq!(masking.missing().len(), 4);
}

#[test]
fn contributions_of_another_length_are_refused() {
    let world = world();
    let longer = row(0, 21);
    let made = tabmesh_federation::secagg::contribution::Contribution::noised(
        &longer,
        &world.descriptor,
        world.digest(),
        1,
        &mut rng(1),
    );
    assert!(made.is_err());
}

#[test]
fn a_wrong_share_is_got_past_and_named_where_there_are_spare_ones() {
    let world = World::new(Shape::complete(10, 20));
    let swap = |all: &mut Vec<Opened>| {
        let other = all[2].seeds[&seat(1)].clone();
        all[2].seeds.insert(seat(0), other);
    };
    let (mut opening, mut all) = opened(&world, &Silent::new(), 1, |_| {}).unwrap();
    swap(&mut all);
    for own in all {
        opening.accept(own, NOW_MS).unwrap();
    }
    let sum = opening.close().unwrap();
    assert_eq!(sum.values, world.plain_sum(&sum.survivors, 1));
    assert_eq!(sum.wrong_shares, [seat(2)].into());
    // Seven answers are just enough, and one of them is wrong.
    let silent: Silent = [(7, Step::Open), (8, Step::Open), (9, Step::Open)].into();
    let (mut opening, mut all) = opened(&world, &silent, 1, |_| {}).unwrap();
    swap(&mut all);
    for own in all {
        opening.accept(own, NOW_MS).unwrap();
    }
    assert_eq!(opening.close(), Err(Abort::WrongShares { owner: seat(0) }));
}

#[test]
fn shares_that_were_not_due_are_refused() {
    let world = world();
    let (mut opening, all) = opened(&world, &[(4, Step::Mask)].into(), 1, |_| {}).unwrap();
    let mut both = all[0].clone();
    let extra = both.seeds[&seat(1)].clone();
    both.keys.insert(seat(1), extra);
    assert_eq!(opening.accept(both, NOW_MS), Err(Rejection::WrongShares { seat: seat(0) }));
    let mut fewer = all[0].clone();
    assert!(fewer.keys.remove(&seat(4)).is_some(), "the dropout's key is due");
    assert_eq!(opening.accept(fewer, NOW_MS), Err(Rejection::WrongShares { seat: seat(0) }));
    assert_eq!(opening.accept(all[0].clone(), NOW_MS), Ok(Accepted::New));
}

#[test]
fn a_vector_beyond_the_bound_shows_in_the_sum() {
    let world = world();
    // Seat 0 sends something else than its agent made (and so can't sign): the top byte of its first word moves by
    // 64.
    let tamper = |masked: &mut Masked| {
        if masked.seat == seat(0) {
            masked.payload[7] = masked.payload[7].wrapping_add(64);
            masked.digest = Digest::of(&masked.payload);
        }
    };
    let (mut opening, all) = opened(&world, &[(0, Step::Consent)].into(), 1, tamper).unwrap();
    for own in all {
        opening.accept(own, NOW_MS).unwrap();
    }
    let refused = opening.close().unwrap_err();
    assert!(matches!(refused, Abort::OutOfRange { position: 0, agents: 5, .. }), "{refused}");
}
