//! Ten known attacks on secure sums, each against the real agent and against one without the check.
//!
//! Every test has two halves: what the real agents do, and a negative control in which the check is missing and
//! the attack gets what it is after, so that a check that stops working fails a test, and a control that stops
//! working fails as well.

use std::collections::{BTreeMap, BTreeSet};

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha20Rng;
use tabmesh_federation::id::Digest;
use tabmesh_federation::secagg::agent::{Agent, Guard, Refusal, SnapshotError, pair_sign};
use tabmesh_federation::secagg::consistency::{ConsentError, Transcript};
use tabmesh_federation::secagg::contribution::Contribution;
use tabmesh_federation::secagg::descriptor::{SumDescriptor, SumDescriptorError};
use tabmesh_federation::secagg::keys::{PublicKey, Secret, pair_mask_key, self_mask_key};
use tabmesh_federation::secagg::mask::{RingVector, Sign, Width};
use tabmesh_federation::secagg::message::{Advert, AdvertList, Consents, Masked, Opened, Step, Survivors};
use tabmesh_federation::secagg::policy::PolicyRefusal;
use tabmesh_federation::secagg::roster::{Member, Roster, Seat};
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::signature::{Context, Signature};

use crate::naive::{Naive, secrets_of, strip};
use crate::uniform::{LIMIT, chi_square_of_bytes};
use crate::world::{NOW_MS, Shape, Stage, World, agent_id, identity, rng, row, run, run_with, seat, sent};

const N: usize = 5;

fn world() -> World {
    World::new(Shape::complete(N, 40))
}

fn public_keys(list: &AdvertList) -> BTreeMap<Seat, PublicKey> {
    list.adverts.iter().map(|advert| (advert.seat, advert.mask_key)).collect()
}

fn naive_keys(agents: &[Naive]) -> BTreeMap<Seat, PublicKey> {
    agents.iter().map(|agent| (agent.seat, agent.mask_secret.public())).collect()
}

/// The sum of naive agents' masked vectors with self masks taken off, as any server gets it.
fn naive_sum(agents: &[Naive], vectors: &[Vec<i64>]) -> Vec<i64> {
    let keys = naive_keys(agents);
    let mut total = RingVector::zeros(Width::Bits64, vectors[0].len());
    for (agent, values) in agents.iter().zip(vectors) {
        total.add_bytes(&agent.mask(values, &keys).to_bytes()).unwrap();
    }
    for agent in agents {
        total.apply(&self_mask_key(&agent.self_seed, &agent.bound_to, agent.seat), Sign::Minus);
    }
    total.decode()
}

// 1. Pasquini et al. 2111.07380: every agent but the victim gets a model on which its gradient is zero, so that
// the sum is the victim's.
#[test]
fn attack_01_model_inconsistency() {
    let world = world();
    let mut other = world.clone();
    other.descriptor.model = Digest::of(b"dead model");
    // An agent compares the model with the one it has verified, whatever the server sends.
    let refused = world.enter_with(0, Guard::default(), &other.bytes(), &mut rng(1)).unwrap_err();
    assert!(matches!(refused, Refusal::Policy(PolicyRefusal::Other { what: "model", .. })), "{refused}");
    // Even if both models were ones an agent has verified, the adverts don't go together.
    other.expected.model = other.descriptor.model;
    let (mut victim, advert) = world.enter(0, Guard::default()).unwrap();
    let mut adverts = vec![sent(advert)];
    adverts.extend((1..N).map(|i| sent(other.enter(i, Guard::default()).unwrap().1)));
    for advert in &mut adverts[1..] {
        advert.descriptor = world.digest();
    }
    let list = AdvertList { descriptor: world.digest(), adverts };
    let refused = victim.adverts(&list, &mut rng(2), NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::BadSignature { seat: seat(1) });

    // Control: keys that know nothing of the model. The masks cancel, and the sum is the victim's vector.
    let zero = vec![0; 40];
    let vectors: Vec<Vec<i64>> = (0..N).map(|i| if i == 0 { row(0, 40) } else { zero.clone() }).collect();
    let unbound: Vec<Naive> = (0..N).map(|i| Naive::new(i, Digest::of(b""))).collect();
    assert_eq!(naive_sum(&unbound, &vectors), row(0, 40));
    // With the descriptor in the keys nothing cancels.
    let bound: Vec<Naive> =
        (0..N).map(|i| Naive::new(i, Digest::of(if i == 0 { b"one" } else { b"two" }))).collect();
    assert_ne!(naive_sum(&bound, &vectors), row(0, 40));
}

// 2. The server tells one half that the victim dropped out and the other half that it is alive, and gets shares of
// both of its secrets.
#[test]
fn attack_02_lying_about_dropouts() {
    let n = 7;
    let world = World::new(Shape::complete(n, 40));
    let threshold = world.descriptor.threshold as usize;
    let mut stage = Stage::masked(world);
    let victim = seat(0);
    let alive = stage.survivors.clone();
    let mut dropped = stage.survivors.clone();
    dropped.survivors.retain(|(listed, _)| *listed != victim);
    // Each half signs what it is told.
    let mut signed = Vec::new();
    for (i, agent) in stage.agents.iter_mut().enumerate().skip(1) {
        let told = if i % 2 == 0 { &alive } else { &dropped };
        let consent = sent(agent.consent(told, NOW_MS).unwrap());
        signed.push((consent.seat, consent.signature));
    }
    // All signatures together aren't over the same set; those of either half are too few.
    let all = Consents { descriptor: stage.world.digest(), signatures: signed.clone() };
    let half = Consents {
        descriptor: stage.world.digest(),
        signatures: signed.iter().filter(|(from, _)| from.index() % 2 == 0).copied().collect(),
    };
    for (i, agent) in stage.agents.iter_mut().enumerate().skip(1) {
        let refused = agent.open(&all, NOW_MS).unwrap_err();
        assert!(matches!(refused, Refusal::Consent(ConsentError::OtherHistory { .. })), "{i}: {refused}");
        let refused = agent.open(&half, NOW_MS).unwrap_err();
        assert!(matches!(refused, Refusal::Consent(_)), "{i}: {refused}");
        // Nor does anybody sign a second set.
        let other = if i % 2 == 0 { &dropped } else { &alive };
        let refused = agent.consent(other, NOW_MS).unwrap_err();
        assert!(matches!(refused, Refusal::SecondAnswer { .. }), "{refused}");
    }

    // Control: agents that open what they are asked for, to a server that asks each for both.
    let digest = stage.world.digest();
    let agents: Vec<Naive> = (0..n).map(|i| Naive::new(i, digest)).collect();
    let keys = naive_keys(&agents);
    let masked = agents[0].mask(&row(0, 40), &keys).to_bytes();
    let opened: Vec<Opened> = agents[0]
        .shares(n, threshold)
        .into_iter()
        .map(|(holder, (seed, key))| Opened {
            descriptor: digest,
            seat: holder,
            seeds: [(victim, seed)].into(),
            keys: [(victim, key)].into(),
        })
        .collect();
    let (seed, key) = secrets_of(victim, &opened, threshold);
    let plain = strip(&masked, Width::Bits64, victim, &digest, &seed.unwrap(), &key.unwrap(), &keys);
    assert_eq!(plain, row(0, 40));
}

// 3. The server invents all other agents, or puts its own keys in their place.
#[test]
fn attack_03_sybils_and_key_substitution() {
    let world = world();
    let (mut agents, honest) = Stage::advertised(&world);
    // The server signs adverts with identities of its own.
    let server_identity = identity(900);
    let secrets: Vec<Secret> = (0..N).map(|i| Secret::random(&mut rng(70 + i as u64))).collect();
    let substitute = |advert: &Advert| {
        let secret = &secrets[usize::from(advert.seat.index())];
        Advert { mask_key: secret.public(), ..advert.clone() }.signed(&server_identity)
    };
    let mut list = honest.clone();
    list.adverts[1..].iter_mut().for_each(|advert| *advert = substitute(advert));
    let refused = agents[0].adverts(&list, &mut rng(1), NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::BadSignature { seat: seat(1) });
    // Signed adverts with another key under the old signature are no better.
    let mut list = honest;
    list.adverts[2].mask_key = secrets[2].public();
    assert_eq!(
        agents[0].adverts(&list, &mut rng(1), NOW_MS).unwrap_err(),
        Refusal::BadSignature { seat: seat(2) }
    );
    // Nor is a roster of invented members: its digest isn't the one of the agent's copy.
    let invented = (0..N).map(|i| {
        let key = identity(1_000 + i as u64).verifying_key();
        Member { agent: agent_id(i), key, organisation: format!("org-{i}") }
    });
    let mut other = world.clone();
    other.descriptor.roster = Roster::new(invented.collect()).unwrap().digest();
    let refused = world.enter_with(0, Guard::default(), &other.bytes(), &mut rng(1)).unwrap_err();
    assert!(matches!(refused, Refusal::Policy(PolicyRefusal::Descriptor(SumDescriptorError::Roster { .. }))));
    // Nor a roster, registered or not, that one organisation fills.
    let mut strict = world.clone();
    strict.policy.min_organisations = N as u32 + 1;
    let refused = strict.enter(0, Guard::default()).unwrap_err();
    assert!(matches!(refused, Refusal::Policy(PolicyRefusal::Beyond { what: "organisations", .. })));

    // Control: an agent that masks towards whatever keys it is sent. The server knows all of its pairs' secrets
    // and gets its self mask like that of any survivor.
    let victim = Naive::new(0, world.digest());
    let keys: BTreeMap<Seat, PublicKey> = (1..N).map(|i| (seat(i), secrets[i].public())).collect();
    let mut vector = victim.mask(&row(0, 40), &keys);
    for (i, secret) in secrets.iter().enumerate().skip(1) {
        let agreed = secret.agree(&victim.mask_secret.public(), seat(0)).unwrap();
        let key = pair_mask_key(&agreed, &world.digest(), seat(0), seat(i));
        vector.apply(&key, pair_sign(seat(0), seat(i)).opposite());
    }
    vector.apply(&self_mask_key(&victim.self_seed, &world.digest(), seat(0)), Sign::Minus);
    assert_eq!(vector.decode(), row(0, 40));
}

// 4. The server drops everybody but the victim: a sum over one.
#[test]
fn attack_04_a_set_too_small() {
    let world = world();
    let threshold = world.descriptor.threshold as usize;
    let mut stage = Stage::masked(world.clone());
    for left in 1..N {
        let mut list = stage.survivors.clone();
        list.survivors.truncate(left);
        let answer = stage.agents[0].consent(&list, NOW_MS);
        if left < threshold {
            let refused = Refusal::TooFew { what: "survivors", expected: threshold, got: left };
            assert_eq!(answer.unwrap_err(), refused);
        } else {
            assert!(answer.is_ok());
            break;
        }
    }
    // Nor does a descriptor that allows small sets, or a roster that is one, get an agent's keys.
    let mut other = world.clone();
    other.descriptor.threshold = 3;
    assert!(matches!(
        world.enter_with(0, Guard::default(), &other.bytes(), &mut rng(1)).unwrap_err(),
        Refusal::Policy(PolicyRefusal::Descriptor(SumDescriptorError::Range { what: "threshold", .. }))
    ));
    let mut strict = world.clone();
    strict.policy.min_agents = 6;
    let refused = strict.enter(0, Guard::default()).unwrap_err();
    assert!(matches!(refused, Refusal::Policy(PolicyRefusal::Beyond { what: "agents", limit: 6, got: 5 })));
    // And where the threshold would do, the noise of the honest ones has to.
    let mut noisy = World::new(Shape { dropouts: 1, ..Shape::complete(10, 40) });
    noisy.descriptor.threshold = 7;
    let mut stage = Stage::shared(noisy.clone());
    let mut delivery = stage.deliveries[&seat(0)].clone();
    delivery.senders.truncate(8);
    let refused = stage.agents[0].mask(&delivery, &noisy.contribution(0, 1), NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::TooLittleNoise { honest: 7 }, "nobody is debited for what nobody will open");
    let mut stage = Stage::masked(noisy);
    let mut list = stage.survivors.clone();
    list.survivors.truncate(8);
    assert_eq!(stage.agents[0].consent(&list, NOW_MS).unwrap_err(), Refusal::TooLittleNoise { honest: 7 });

    // Control: agents that open for any set. All others are declared dropouts, the sum over the rest is the victim's.
    let agents: Vec<Naive> = (0..N).map(|i| Naive::new(i, world.digest())).collect();
    let keys = naive_keys(&agents);
    let mut total = agents[0].mask(&row(0, 40), &keys);
    total.apply(&self_mask_key(&agents[0].self_seed, &world.digest(), seat(0)), Sign::Minus);
    for agent in &agents[1..] {
        let agreed = agent.mask_secret.agree(&keys[&seat(0)], seat(0)).unwrap();
        let key = pair_mask_key(&agreed, &world.digest(), seat(0), agent.seat);
        total.apply(&key, pair_sign(seat(0), agent.seat).opposite());
    }
    assert_eq!(total.decode(), row(0, 40));
}

// 5. The same vector in a sum over U and in a retry over U without the victim: the difference is the victim's vector.
#[test]
fn attack_05_differencing_across_retries() {
    let world = world();
    let mut retry = world.clone();
    retry.descriptor.attempt = 2;
    let debit = world.contribution(1, 1).debit();
    // A contribution belongs to one descriptor ...
    let mut stage = Stage::shared(retry.clone());
    let delivery = stage.deliveries[&seat(1)].clone();
    let refused = stage.agents[1].mask(&delivery, &world.contribution(1, 1), NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::ForeignContribution { expected: retry.digest(), got: world.digest() });
    // ... and a debit to one contribution: an agent that has sent under it takes no second one for it.
    let after = Guard { answers: 10, last_debit: debit };
    let (agent, advert) = retry.enter(1, after).unwrap();
    let mut list = Stage::advertised(&retry).1;
    list.adverts[1] = sent(advert);
    stage.agents[1] = agent;
    let shares = stage.agents[1].adverts(&list, &mut rng(3), NOW_MS);
    assert!(shares.is_ok());
    drop(shares);
    let refused = stage.agents[1].mask(&delivery, &retry.contribution(1, debit), NOW_MS).unwrap_err();
    assert_eq!(refused, Refusal::UsedDebit { last: debit, got: debit });
    // An honest retry has fresh noise: the difference of the two sums carries the noise of all survivors.
    let first = run(&world, &[].into()).unwrap();
    let second = run_with(&retry, &[(0, Step::Mask)].into(), 2).unwrap();
    let difference: Vec<i64> = first.values.iter().zip(&second.values).map(|(a, b)| a - b).collect();
    let own = world.contribution(0, 1);
    let off = |x: &[i64]| {
        x.iter().zip(own.values().as_slice()).map(|(a, b)| (a - b).pow(2) as f64).sum::<f64>() / 40.0
    };
    // Eight more noise shares of variance 333,333: a mean square above half a million but for a chance below 1e-7
    // (chi-square with 40 degrees of freedom below 7.5).
    assert!(off(&difference) > 500_000.0, "{}", off(&difference));

    // Control: the same noised vectors summed twice, with and without the victim.
    let everybody: BTreeSet<Seat> = (0..N).map(seat).collect();
    let others: BTreeSet<Seat> = (1..N).map(seat).collect();
    let (with, without) = (world.plain_sum(&everybody, 1), world.plain_sum(&others, 1));
    let difference: Vec<i64> = with.iter().zip(&without).map(|(a, b)| a - b).collect();
    assert_eq!(difference, own.values().as_slice());
}

// 6. Keys or masks that serve twice (MicroSecAgg, 2410.09676): the difference of two masked vectors is the
// difference of the vectors.
#[test]
fn attack_06_key_and_mask_reuse() {
    let world = world();
    let mut next = world.clone();
    next.descriptor.attempt = 2;
    // The worst case: a generator that repeats itself, so that both attempts have equal keys.
    let (one, two) = (Stage::masked(world.clone()), Stage::masked(next.clone()));
    let key = |stage: &Stage| public_keys(&stage.adverts)[&seat(0)];
    assert_eq!(key(&one), key(&two), "the generators of this test repeat themselves");
    let words =
        |stage: &Stage| RingVector::from_bytes(Width::Bits64, 40, &stage.masked[0].payload).unwrap().decode();
    let difference: Vec<i64> = words(&one).iter().zip(words(&two)).map(|(a, b)| a.wrapping_sub(b)).collect();
    let plain = |world: &World| world.contribution(0, 1).values().as_slice().to_vec();
    let leaked: Vec<i64> = plain(&world).iter().zip(plain(&next)).map(|(a, b)| a - b).collect();
    assert!(difference.iter().zip(&leaked).all(|(a, b)| a != b), "masks differ though keys are equal");
    // With a generator that works, the keys differ as well.
    let fresh = |i| sent(world.enter_with(0, Guard::default(), &world.bytes(), &mut rng(i)).unwrap().1);
    assert_ne!(fresh(1).mask_key, fresh(2).mask_key);
    // And no two agents may share a key, nor one use a key for both purposes.
    let (mut agents, mut list) = Stage::advertised(&world);
    let signed = |advert: Advert, i: usize| advert.signed(&world.keys[i]);
    let honest = list.adverts[2].clone();
    list.adverts[2] = signed(Advert { mask_key: list.adverts[1].mask_key, ..honest }, 2);
    assert_eq!(
        agents[0].adverts(&list, &mut rng(1), NOW_MS).unwrap_err(),
        Refusal::SharedKey { seat: seat(2) }
    );
    list.adverts[2] = signed(Advert { mask_key: honest.share_key, ..honest }, 2);
    assert_eq!(
        agents[0].adverts(&list, &mut rng(1), NOW_MS).unwrap_err(),
        Refusal::SharedKey { seat: seat(2) }
    );

    // Control: derivations that don't know the descriptor. Masks of both rounds are equal and fall out.
    let agents: Vec<Naive> = (0..N).map(|i| Naive::new(i, Digest::of(b""))).collect();
    let keys = naive_keys(&agents);
    let masked = |values: &[i64]| agents[0].mask(values, &keys).decode();
    let difference: Vec<i64> =
        masked(&row(0, 40)).iter().zip(masked(&row(3, 40))).map(|(a, b)| a.wrapping_sub(b)).collect();
    let leaked: Vec<i64> = row(0, 40).iter().zip(row(3, 40)).map(|(a, b)| a - b).collect();
    assert_eq!(difference, leaked);
}

// 7. Masks from a weak generator, a modulus that isn't uniform, sums that wrap around.
#[test]
fn attack_07_weak_masks_bias_and_overflow() {
    // Real masks pass a test of uniformity that a biased one fails.
    let world = World::new(Shape { width: Width::Bits32, ..Shape::complete(4, 40_000) });
    let stage = Stage::masked(world.clone());
    for masked in &stage.masked {
        let chi = chi_square_of_bytes(&masked.payload);
        assert!(chi < LIMIT, "{chi}");
    }
    // A sum that could wrap around is no sum anybody takes part in.
    let mut wraps = world.clone();
    wraps.descriptor.max_abs = Width::Bits32.max_sum() / 4 + 1;
    let refused = world.enter_with(0, Guard::default(), &wraps.bytes(), &mut rng(1)).unwrap_err();
    assert!(matches!(refused, Refusal::Policy(PolicyRefusal::Descriptor(SumDescriptorError::Wraps { .. }))));
    wraps.descriptor.max_abs -= 1;
    assert!(world.enter_with(0, Guard::default(), &wraps.bytes(), &mut rng(1)).is_ok());
    // Nor one whose bound cuts noise off.
    wraps.descriptor.max_abs = wraps.descriptor.noise_bound();
    let refused = world.enter_with(0, Guard::default(), &wraps.bytes(), &mut rng(1)).unwrap_err();
    assert!(matches!(
        refused,
        Refusal::Policy(PolicyRefusal::Descriptor(SumDescriptorError::Range { what: "bound on values", .. }))
    ));

    // Control: a mask whose 256-bit secret is folded to 16 bits before use (a deployed one folds to 32). Whoever
    // sees the masked vector tries all of them, and knows the plaintext by its small values.
    let plain = row(2, 64);
    let fold = |secret: &Secret| {
        secret.as_bytes().as_chunks::<2>().0.iter().fold(0_u16, |all, part| all ^ u16::from_le_bytes(*part))
    };
    let weak_mask = |seed: u16| {
        let mut generator = ChaCha20Rng::seed_from_u64(seed.into());
        (0..64).map(|_| generator.next_u32()).collect::<Vec<u32>>()
    };
    let secret = Secret::random(&mut rng(77));
    let masked: Vec<u32> = plain
        .iter()
        .zip(weak_mask(fold(&secret)))
        .map(|(value, mask)| (*value as u32).wrapping_add(mask))
        .collect();
    let found = (0..=u16::MAX).find_map(|seed| {
        let tried: Vec<i64> = masked
            .iter()
            .zip(weak_mask(seed))
            .map(|(word, mask)| i64::from(word.wrapping_sub(mask) as i32))
            .collect();
        tried.iter().all(|value| value.abs() <= 100).then_some(tried)
    });
    assert_eq!(found, Some(plain));
    // Control: words drawn below a modulus that isn't a power of two (3·2²²): the top byte gives it away.
    let mut generator = rng(5);
    let biased: Vec<u8> =
        (0..40_000).flat_map(|_| (generator.next_u32() % (3 << 22)).to_le_bytes()).collect();
    assert!(chi_square_of_bytes(&biased) > LIMIT);
    // Control: without the bound, four values of 2³⁰ come back as another number.
    let mut total = RingVector::zeros(Width::Bits32, 1);
    for _ in 0..4 {
        total.add_bytes(&RingVector::encode(Width::Bits32, &[1 << 30], 1 << 30).to_bytes()).unwrap();
    }
    assert_eq!(total.decode(), [0]);
}

// 8. A model or plan made to show one row: gradients magnified beyond the clip the noise was made for.
#[test]
fn attack_08_malicious_parameters() {
    let world = world();
    // A sensitivity other than the agent's own clipping gives, as a magnified clip would need, is refused; so is the
    // agent's own if the noise is too little for it.
    let mut magnified = world.clone();
    magnified.descriptor.l2_sensitivity_squared *= 1_000_000;
    let refused = world.enter_with(0, Guard::default(), &magnified.bytes(), &mut rng(1)).unwrap_err();
    assert!(matches!(refused, Refusal::Policy(PolicyRefusal::Other { what: "sensitivity", .. })));
    magnified.expected.l2_sensitivity_squared = magnified.descriptor.l2_sensitivity_squared;
    let refused = magnified.enter(0, Guard::default()).unwrap_err();
    assert!(matches!(refused, Refusal::Policy(PolicyRefusal::Beyond { what: "rho units of the sum", .. })));
    let mut alone = world.clone();
    alone.policy.max_local_rho = Rho::from_f64_round_down(0.01).unwrap();
    let refused = alone.enter(0, Guard::default()).unwrap_err();
    assert!(matches!(
        refused,
        Refusal::Policy(PolicyRefusal::Beyond { what: "rho units of the own share", .. })
    ));
    // Whatever vector comes out of a hostile model, data are brought within the bound and noised.
    let hostile = vec![i64::MAX; 40];
    let contribution =
        Contribution::noised(&hostile, &world.descriptor, world.digest(), 1, &mut rng(4)).unwrap();
    let bound = world.descriptor.max_abs as i64;
    assert!(contribution.values().as_slice().iter().all(|value| value.abs() <= bound));
    let distinct: BTreeSet<&i64> = contribution.values().as_slice().iter().collect();
    assert!(distinct.len() > 30, "noise is on top of the bound");

    // Control: an agent that takes the server's word for the sensitivity enters, and adds the noise of a small one to a magnified
    // vector. What all of them send adds up to a sum that shows whether the row was there: ten deviations and more.
    let mut trusting = magnified;
    trusting.policy.max_rho = Rho::from_units(u64::MAX);
    trusting.policy.max_local_rho = Rho::from_units(u64::MAX);
    let entered = trusting.enter(0, Guard::default());
    assert!(entered.is_ok(), "without the ceiling nothing stops it: {:?}", entered.err());
    let clip = (world.descriptor.l2_sensitivity_squared as f64).sqrt();
    let summed = |present: bool, descriptor: &SumDescriptor, magnified_by: f64| -> i64 {
        let one = |i: usize| {
            let mut gradient = vec![0; descriptor.dimension as usize];
            gradient[0] = if present && i == 0 { (magnified_by * clip) as i64 } else { 0 };
            let seed = i as u64 + if present { 100 } else { 0 };
            let sent =
                Contribution::noised(&gradient, descriptor, world.digest(), 1, &mut rng(seed)).unwrap();
            sent.values().as_slice()[0]
        };
        (0..N).map(one).sum()
    };
    let deviation = world.descriptor.noise.central.sigma();
    let shift =
        (summed(true, &trusting.descriptor, 1_000.0) - summed(false, &trusting.descriptor, 1_000.0)) as f64;
    assert!(shift > 10.0 * deviation, "{shift} of {deviation}");
    // The same attack on agents that clip to what the noise is for: within six deviations of the difference of two sums.
    let shift = (summed(true, &world.descriptor, 1.0) - summed(false, &world.descriptor, 1.0)) as f64;
    let most =
        clip + 6.0 * std::f64::consts::SQRT_2 * (N as f64).sqrt() * world.descriptor.noise.share.sigma();
    assert!(shift.abs() < most && most < 500.0 * clip, "{shift} of {most}");
}

// 9. Data beside the mask: counts, metrics, lengths, failure texts.
#[test]
fn attack_09_side_data() {
    // Two worlds that differ in the victim's rows alone, under equal generators: every message is the same byte
    // for byte, except for the masked vector, whose length is.
    let world = world();
    let messages = |rows: &[i64]| {
        let mut stage = Stage::shared(world.clone());
        let contribution =
            Contribution::noised(rows, &world.descriptor, world.digest(), 1, &mut rng(8)).unwrap();
        let delivery = stage.deliveries[&seat(0)].clone();
        let masked = sent(stage.agents[0].mask(&delivery, &contribution, NOW_MS).unwrap());
        let survivors = Survivors {
            descriptor: world.digest(),
            survivors: (0..N)
                .map(|i| (seat(i), if i == 0 { masked.digest } else { Digest::of(&[i as u8]) }))
                .collect(),
        };
        let consent = sent(stage.agents[0].consent(&survivors, NOW_MS).unwrap());
        // Exhaustive on purpose: a new field has to be looked at here.
        let Masked { descriptor, seat: from, payload, digest: _ } = masked;
        let before =
            (serde_json::to_string(&stage.adverts).unwrap(), serde_json::to_string(&delivery).unwrap());
        ((before, descriptor, from, payload.len(), consent.seat), payload)
    };
    let (empty, full, huge) = (vec![0; 40], row(3, 40), vec![i64::MIN; 40]);
    let (sides, payloads): (Vec<_>, Vec<_>) =
        [empty, full.clone(), huge].iter().map(|rows| messages(rows)).unzip();
    assert!(sides.iter().all(|side| *side == sides[0]));
    assert!(payloads[0] != payloads[1] && payloads[1] != payloads[2]);

    // Control: a message with a row count beside the vector, as federated clients have it, tells the worlds apart.
    let beside = |rows: &[i64]| {
        let examples = rows.iter().filter(|value| **value != 0).count();
        serde_json::json!({"side": sides[0].3, "num_examples": examples})
    };
    assert_ne!(beside(&[0; 40]), beside(&full));
    // And one whose length follows from its values, as digits do: the very vectors that go under masks tell the worlds apart.
    let digits = |rows: &[i64]| {
        let noised = Contribution::noised(rows, &world.descriptor, world.digest(), 1, &mut rng(8)).unwrap();
        serde_json::to_string(noised.values().as_slice()).unwrap().len()
    };
    assert_ne!(digits(&[0; 40]), digits(&[i64::MIN; 40]));
}

// 10. A restored snapshot answers again: shares of the victim's other secret.
#[test]
fn attack_10_rollback() {
    let n = 7;
    let world = World::new(Shape::complete(n, 40));
    let threshold = world.descriptor.threshold as usize;
    let mut stage = Stage::masked(world.clone());
    let victim = seat(0);
    // Snapshots of everybody before anybody signed; asking again with the answered request gives them.
    let snapshots: Vec<(Vec<u8>, Guard)> = (0..n)
        .map(|i| {
            let (delivery, contribution) = (stage.deliveries[&seat(i)].clone(), world.contribution(i, 1));
            let again = stage.agents[i].mask(&delivery, &contribution, NOW_MS).unwrap();
            (again.snapshot().to_vec(), again.guard())
        })
        .collect();
    let alive = stage.survivors.clone();
    let mut dropped = alive.clone();
    dropped.survivors.retain(|(listed, _)| *listed != victim);
    let first = open_all(&mut stage.agents, &alive, world.digest());
    // The real caller keeps the guard of the latest answer where a restored snapshot doesn't reach.
    for (i, (snapshot, before)) in snapshots.iter().enumerate() {
        let guard = stage.agents[i].guard();
        assert!(guard > *before);
        let refused = restore(&world, i, snapshot, guard).unwrap_err();
        assert_eq!(refused, SnapshotError::RolledBack { snapshot: *before, guard });
    }

    // Control: a caller that rolls the guard back with the snapshot. All agents but the victim answer a second
    // time, and both of its secrets are out.
    let mut rolled_back: Vec<Agent> = snapshots[1..]
        .iter()
        .enumerate()
        .map(|(i, (s, guard))| restore(&world, i + 1, s, *guard).unwrap())
        .collect();
    let second = open_all(&mut rolled_back, &dropped, world.digest());
    let opened: Vec<Opened> = first.into_iter().chain(second).collect();
    let seeds: Vec<Opened> = opened.iter().filter(|o| o.seeds.contains_key(&victim)).cloned().collect();
    let keys: Vec<Opened> = opened.iter().filter(|o| o.keys.contains_key(&victim)).cloned().collect();
    let (seed, key) = (secrets_of(victim, &seeds, threshold).0, secrets_of(victim, &keys, threshold).1);
    let others = public_keys(&stage.adverts);
    let payload = &stage.masked[0].payload;
    let plain =
        strip(payload, Width::Bits64, victim, &world.digest(), &seed.unwrap(), &key.unwrap(), &others);
    assert_eq!(plain, world.contribution(0, 1).values().as_slice());
}

fn restore(world: &World, i: usize, snapshot: &[u8], guard: Guard) -> Result<Agent, SnapshotError> {
    Agent::restore(snapshot, guard, world.roster.clone(), world.keys[i].clone())
}

fn open_all(agents: &mut [Agent], list: &Survivors, descriptor: Digest) -> Vec<Opened> {
    let mut consents = Consents { descriptor, signatures: Vec::new() };
    for agent in agents.iter_mut() {
        let consent = sent(agent.consent(list, NOW_MS).unwrap());
        consents.signatures.push((consent.seat, consent.signature));
    }
    agents.iter_mut().map(|agent| sent(agent.open(&consents, NOW_MS).unwrap())).collect()
}

// What attack 2 rests on: a signature over one transcript is none over another, nor over another purpose.
#[test]
fn signatures_are_over_one_history() {
    let world = world();
    let transcript = Transcript::begin(&world.digest()).survivors(&[(seat(0), world.digest())]);
    let signature: Signature = transcript.sign(&world.keys[0]);
    assert!(transcript.signed_by(seat(0), &signature, &world.roster));
    assert!(!transcript.signed_by(seat(1), &signature, &world.roster));
    assert!(!Transcript::begin(&world.digest()).signed_by(seat(0), &signature, &world.roster));
    let advert = world.keys[0].sign(Context::SumAdvert, b"anything");
    assert!(!transcript.signed_by(seat(0), &advert, &world.roster));
}
