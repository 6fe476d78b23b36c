//! On a ring an agent opens nothing if too many of its neighbours are gone, though enough agents are left: the server
//! knows the graph when it chooses whom to drop, and could cut an agent off.

use std::collections::{BTreeMap, BTreeSet};

use tabmesh_federation::id::Digest;
use tabmesh_federation::secagg::agent::{Agent, Guard, Joined, Refusal};
use tabmesh_federation::secagg::graph::Topology;
use tabmesh_federation::secagg::keys::{Label, Nonce, Secret, commit, seal};
use tabmesh_federation::secagg::mask::Width;
use tabmesh_federation::secagg::message::{Advert, AdvertList, Delivery, RevealList, Sealed, Survivors};
use tabmesh_federation::secagg::roster::Seat;
use tabmesh_federation::secagg::share::split;
use tabmesh_privacy::signature::Signature;

use crate::world::{NOW_MS, Shape, World, rng, seat, sent};

const N: usize = 300;

/// Agent 0, real, among puppets whose secrets the test knows; up to the masked vector, with its neighbours.
fn among_puppets(world: &World) -> (Agent, BTreeSet<Seat>, Digest) {
    let digest = world.digest();
    let (mut agent, advert) = world.enter(0, Guard::default()).unwrap();
    let own = sent(advert);
    let mut adverts = vec![own.clone()];
    let mut secrets = BTreeMap::new();
    let mut nonces = BTreeMap::new();
    for i in 1..N {
        let mut rng = rng(i as u64);
        let (share_secret, nonce) = (Secret::random(&mut rng), Nonce::random(&mut rng));
        let advert = Advert {
            descriptor: digest,
            seat: seat(i),
            share_key: share_secret.public(),
            mask_key: Secret::random(&mut rng).public(),
            seed_commitment: Digest::of(b"a seed nobody opens"),
            nonce_commitment: commit(Label::GraphNonce, &digest, seat(i), nonce.as_bytes()),
            signature: Signature::from_bytes([0; 64]),
        };
        adverts.push(advert.signed(&world.keys[i]));
        secrets.insert(seat(i), share_secret);
        nonces.insert(seat(i), nonce);
    }
    let list = AdvertList { descriptor: digest, adverts };
    let Joined::Reveal(reveal) = sent(agent.adverts(&list, &mut rng(900), NOW_MS).unwrap()) else {
        panic!("a ring has something to reveal")
    };
    nonces.insert(seat(0), reveal.nonce);
    let reveals = RevealList { descriptor: digest, nonces };
    let shares = sent(agent.reveals(&reveals, &mut rng(901), NOW_MS).unwrap());
    let neighbours: BTreeSet<Seat> = shares.sealed.keys().copied().collect();
    let any = split(&Secret::from_bytes([1; 32]), 1, [seat(0)].into_iter(), &mut rng(902)).unwrap();
    let plain = [any[&seat(0)].to_bytes(), any[&seat(0)].to_bytes()].concat();
    let sealed = neighbours.iter().map(|from| {
        let agreed = secrets[from].agree(&own.share_key, seat(0)).unwrap();
        (*from, Sealed(seal(&agreed, &digest, *from, seat(0), &plain)))
    });
    let delivery =
        Delivery { descriptor: digest, senders: (0..N).map(seat).collect(), sealed: sealed.collect() };
    let masked = sent(agent.mask(&delivery, &world.contribution(0, 1), NOW_MS).unwrap());
    (agent, neighbours, masked.digest)
}

#[test]
fn an_agent_whose_neighbours_are_dropped_signs_nothing() {
    let world = World::new(Shape {
        agents: N,
        dimension: 4,
        width: Width::Bits64,
        dropouts: 30,
        colluders: 5,
        ring: true,
    });
    let Topology::Regular(shape) = &world.descriptor.topology else { panic!("a ring") };
    let most = shape.max_dropped as usize;
    assert!(most < 30, "the dropouts the whole sum bears could all be neighbours: {shape:?}");
    let (mut agent, neighbours, own) = among_puppets(&world);
    assert_eq!(neighbours.len(), shape.degree as usize);
    let without = |dropped: usize| {
        let gone: BTreeSet<Seat> = neighbours.iter().take(dropped).copied().collect();
        let left = (0..N).map(seat).filter(|seat| !gone.contains(seat));
        let digest = |listed: Seat| if listed == seat(0) { own } else { Digest::of(b"somebody's") };
        Survivors { descriptor: world.digest(), survivors: left.map(|seat| (seat, digest(seat))).collect() }
    };
    let refused = agent.consent(&without(most + 1), NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::TooManyDropped { most, got: most + 1 });
    assert!(agent.consent(&without(most), NOW_MS).is_ok());
}
