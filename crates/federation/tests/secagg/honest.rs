//! Honest runs: the sum is the plain one of the survivors, whoever drops out when; too many dropouts end it by name.

use std::collections::BTreeSet;

use proptest::prelude::*;
use tabmesh_federation::secagg::mask::Width;
use tabmesh_federation::secagg::message::Step;
use tabmesh_federation::secagg::roster::Seat;
use tabmesh_federation::secagg::server::Abort;

use crate::world::{Shape, Silent, World, run, seat};

const STEPS: [Step; 5] = [Step::Advertise, Step::Share, Step::Mask, Step::Consent, Step::Open];

/// Who is in the sum: everybody who wasn't silent up to and including the masked vector.
fn in_sum(agents: usize, silent: &Silent) -> BTreeSet<Seat> {
    (0..agents).filter(|i| silent.get(i).is_none_or(|from| *from > Step::Mask)).map(seat).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn the_sum_is_the_plain_one_whoever_drops_out_when(
        agents in prop::sample::select(vec![4_usize, 5, 10, 40]),
        narrow in any::<bool>(),
        picks in proptest::collection::vec((any::<prop::sample::Index>(), 0_usize..5), 0..13),
    ) {
        let width = if narrow { Width::Bits32 } else { Width::Bits64 };
        let world = World::new(Shape { width, ..Shape::complete(agents, 300) });
        let most = world.descriptor.noise.dropouts as usize;
        let mut silent = Silent::new();
        for (who, step) in picks {
            if silent.len() < most {
                silent.insert(who.index(agents), STEPS[step]);
            }
        }
        let sum = run(&world, &silent).unwrap();
        let survivors = in_sum(agents, &silent);
        prop_assert_eq!(&sum.values, &world.plain_sum(&survivors, 1));
        prop_assert_eq!(sum.survivors, survivors);
        prop_assert!(sum.wrong_shares.is_empty());
        prop_assert!(sum.guarantee.rho < sum.guarantee.local);
    }

    #[test]
    fn one_dropout_too_many_ends_it_by_name_in_every_step(
        agents in prop::sample::select(vec![4_usize, 5, 10]), step in 0_usize..5
    ) {
        let world = World::new(Shape::complete(agents, 20));
        let most = world.descriptor.noise.dropouts as usize;
        let silent: Silent = (0..=most).map(|i| (i, STEPS[step])).collect();
        let (expected, got) = (agents - most, agents - most - 1);
        prop_assert_eq!(run(&world, &silent), Err(Abort::TooFew { step: STEPS[step], expected, got }));
    }
}

// Above the threshold, but with less noise than the sum needs: fewer dropouts were counted on than the threshold
// allows.
#[test]
fn a_threshold_that_is_met_without_enough_noise_ends_it() {
    let mut world = World::new(Shape { dropouts: 1, ..Shape::complete(10, 20) });
    world.descriptor.threshold = 7;
    // In the first two steps it ends before anyone is asked for a masked vector.
    for step in [Step::Advertise, Step::Share, Step::Mask] {
        let silent: Silent = [(0, step), (1, step)].into();
        assert_eq!(run(&world, &silent), Err(Abort::TooLittleNoise { honest: 7 }), "{step:?}");
    }
    let silent: Silent = [(0, Step::Mask), (1, Step::Open)].into();
    assert_eq!(run(&world, &silent).unwrap().values, world.plain_sum(&in_sum(10, &silent), 1));
}

#[test]
fn a_ring_of_150_sums_with_dropouts_in_every_step() {
    let world = World::new(Shape {
        agents: 150,
        dimension: 64,
        width: Width::Bits32,
        dropouts: 8,
        colluders: 3,
        ring: true,
    });
    let everybody = run(&world, &Silent::new()).unwrap();
    assert_eq!(everybody.values, world.plain_sum(&in_sum(150, &Silent::new()), 1));
    let silent: Silent = [
        (3, Step::Advertise),
        (20, Step::Share),
        (21, Step::Share),
        (77, Step::Mask),
        (78, Step::Mask),
        (149, Step::Consent),
        (0, Step::Open),
    ]
    .into();
    let sum = run(&world, &silent).unwrap();
    assert_eq!(sum.values, world.plain_sum(&in_sum(150, &silent), 1));
    assert_eq!(sum.survivors.len(), 145);
    // A part of the seed that stays away ends the attempt: going on without it would be the server's choice.
    let silent: Silent = [(5, Step::Reveal)].into();
    assert_eq!(run(&world, &silent), Err(Abort::MissingReveal { seat: seat(5) }));
}
