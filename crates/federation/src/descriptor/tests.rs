//! Attacks on round descriptors, and the figures that must follow from a plan.

#![allow(clippy::unwrap_used, reason = "tests")]

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

use super::*;

/// A plan that trains feature tokens; `rounds` are further fields of its rounds.
fn plan(rounds: &str) -> (Plan, PlanDigest) {
    parsed(&format!("rounds: {{count: 12, adapter: feature_tokens, {rounds}}}"))
}

fn parsed(text: &str) -> (Plan, PlanDigest) {
    let text = format!("kind: TabmeshPlan\nname: p\ntarget: a.y\n{text}\n");
    Plan::parse(text.as_bytes(), "p.yaml").unwrap()
}

fn inputs() -> RoundInputs {
    let mut rng = ChaCha20Rng::seed_from_u64(4);
    let agents = ["a", "b", "c"].map(|name| AgentId::new(name).unwrap());
    RoundInputs {
        id: CollectionId::new(1_000, &mut rng, None),
        index: 0,
        attempt: 1,
        base: Digest::of(b"base"),
        context: Digest::of(b"context"),
        preprocessing: Digest::of(b"bins"),
        adapter_keys: ["a.x", "b.x"].map(str::to_owned).to_vec(),
        width: 3,
        adapter_values: vec![0.25; 6],
        clip_norm: 0.75,
        roster: agents.into(),
        opened_ms: 1_000,
        noisy_total: 5_000.25,
        noisy_total_sd: 10.0,
    }
}

#[test]
fn everything_the_noise_depends_on_follows_from_the_plan() {
    let (plan, digest) = plan("");
    let descriptor = RoundDescriptor::new(inputs(), &plan, digest).unwrap();
    // 0.75·2¹⁶ = 49152 lies in (2¹⁵, 2¹⁶].
    assert_eq!((descriptor.scale, descriptor.sensitivity), (1 << 16, 49_152));
    assert_eq!(descriptor.rho, plan.budget().unwrap().per_round);
    assert_eq!((descriptor.divisor, descriptor.max_units), (5_001, 5_121));
    let cost = descriptor.sigma_squared.cost(49_152 * 49_152).unwrap();
    assert!(cost <= descriptor.rho);
    let bytes = descriptor.to_bytes();
    let read = RoundDescriptor::from_bytes(&bytes).unwrap();
    assert_eq!(read, descriptor);
    read.check(&plan, &digest).unwrap();
}

#[test]
fn limits_of_an_announcement_let_honest_updates_in() {
    let (plan, digest) = plan("");
    let descriptor = RoundDescriptor::new(inputs(), &plan, digest).unwrap();
    let quorum = Quorum::AtLeast { updates: 3 };
    let announcement = descriptor.announcement(Digest::of(&descriptor.to_bytes()), quorum, &plan).unwrap();
    let limits = announcement.limits;
    assert_eq!(limits.len, 6);
    let sigma = descriptor.sigma_squared.sigma();
    let range = 5_121.0 * 49_152.0 + 12.0 * sigma;
    assert!((limits.max_abs as f64 / range - 1.0).abs() < 0.01);
    assert_eq!(announcement.window.deadline_ms(), 61_000);
    assert_eq!(announcement.window.ends_ms(), 71_000);
}

#[test]
fn scales_keep_the_integer_norm_in_its_octave() {
    for clip in [1e-4, 0.01, 0.5, 0.75, 1.0, 3.0, 1e3, 1e4] {
        let norm = clip * scale_for(clip) as f64;
        assert!(norm > 32_768.0 && norm <= 65_536.0, "{clip}: {norm}");
    }
    assert_eq!(scale_for(1e9), 1);
    assert_eq!(scale_for(f64::NAN), 1);
    assert_eq!((plausible_units(-5.0, 0.0), plausible_units(f64::NAN, 1.0)), (0, 12));
}

/// A change to a descriptor, and words its refusal must have.
type Attack = (&'static str, fn(&mut RoundDescriptor));

#[test]
fn descriptors_that_do_not_follow_from_the_plan_are_refused_by_name() {
    let (plan, digest) = plan("clip_norm: 0.75");
    let good = RoundDescriptor::new(inputs(), &plan, digest).unwrap();
    let attacks: &[Attack] = &[
        ("plan: expected", |d| d.plan = PlanDigest::of(b"other")),
        ("round index", |d| d.index = 12),
        ("attempt", |d| d.attempt = 0),
        ("clip norm: expected 0.75", |d| d.clip_norm = 0.7),
        ("power of two", |d| d.scale = 3),
        ("sensitivity: expected 49152", |d| d.sensitivity -= 1),
        ("weight of the counts: expected 0", |d| d.count_weight = 1),
        ("rho: expected", |d| d.rho = Rho::from_units(d.rho.units() + 1)),
        ("sigma squared: expected", |d| d.sigma_squared = SigmaSquared::new(25, 1).unwrap()),
        ("roster: expected 3 to 64 agents, got 2", |d| drop(d.roster.pop_first())),
        ("deadline: expected 61000", |d| d.deadline_ms += 1),
        ("grace: expected 10000", |d| d.grace_ms += 1),
        ("divisor", |d| d.divisor = 0),
        ("adapter keys", |d| d.adapter_keys[1] = d.adapter_keys[0].clone()),
        ("adapter keys", |d| d.adapter_keys[1].clear()),
        ("adapter keys", |d| d.adapter_keys[1] = "k".repeat(MAX_KEY_BYTES + 1)),
        ("adapter keys", |d| d.adapter_keys.clear()),
        ("adapter values", |d| d.adapter_values.truncate(5)),
        ("adapter values", |d| d.width = u32::MAX),
        ("position 2 that is not a finite number", |d| d.adapter_values[2] = f32::NAN),
        ("position 0 that is not a finite number", |d| d.adapter_values[0] = f32::INFINITY),
        ("opening time", |d| d.opened_ms = -1),
    ];
    for (words, change) in attacks {
        let mut descriptor = good.clone();
        change(&mut descriptor);
        let refusal = descriptor.check(&plan, &digest).expect_err(words).to_string();
        assert!(refusal.contains(words), "{words}: {refusal}");
    }
}

#[test]
fn floats_that_are_no_numbers_cannot_be_read() {
    let (plan, digest) = plan("");
    let good = RoundDescriptor::new(inputs(), &plan, digest).unwrap();
    let refused = |bytes: &[u8]| {
        let read = RoundDescriptor::from_bytes(bytes);
        read.is_err() || read.is_ok_and(|d| d.check(&plan, &digest).is_err())
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut descriptor = good.clone();
        descriptor.adapter_values[0] = bad;
        assert!(refused(&descriptor.to_bytes()), "{bad}");
    }
    let text = String::from_utf8(good.to_bytes()).unwrap();
    assert!(!refused(text.as_bytes()));
    for bad in ["null", "NaN", "Infinity", "1e999"] {
        let norm = format!(r#""clip_norm":{bad}"#);
        let changed = text.replacen(r#""clip_norm":0.75"#, &norm, 1);
        assert_ne!(changed, text);
        assert!(refused(changed.as_bytes()), "{bad}");
    }
    let large = vec![b' '; MAX_DESCRIPTOR_BYTES + 1];
    assert!(matches!(RoundDescriptor::from_bytes(&large), Err(DescriptorError::Malformed { .. })));
}

#[test]
fn adapter_values_are_limited() {
    let (plan, digest) = plan("");
    let sized = |n: usize| RoundInputs {
        adapter_keys: vec!["a.x".to_owned()],
        width: u32::try_from(n).unwrap(),
        adapter_values: vec![0.0; n],
        ..inputs()
    };
    assert!(RoundDescriptor::new(sized(MAX_ADAPTER_VALUES), &plan, digest).is_ok());
    let refused = RoundDescriptor::new(sized(MAX_ADAPTER_VALUES + 1), &plan, digest);
    assert!(matches!(refused, Err(DescriptorError::Shape { what: "adapter values", .. })));
}

#[test]
fn in_a_secure_sum_each_agents_noise_is_a_share() {
    let agents = |n: u8| (0..n).map(|i| AgentId::new(format!("agent-{i}")).unwrap()).collect();
    let with = |privacy: &str| {
        parsed(&format!(
            "cohort: {{min_agents: 4}}\nrounds: {{count: 12, adapter: feature_tokens}}\nprivacy: {{{privacy}}}"
        ))
    };
    let (local, local_digest) = with("noise_placement: local");
    let (secure, digest) = with("noise_placement: secure_sum");
    let whole =
        RoundDescriptor::new(RoundInputs { roster: agents(5), ..inputs() }, &local, local_digest).unwrap();
    let descriptor =
        RoundDescriptor::new(RoundInputs { roster: agents(5), ..inputs() }, &secure, digest).unwrap();
    assert_eq!(descriptor.rho, whole.rho);
    // One may drop out, one colludes: a third of the noise each, but for rounding up.
    let ratio = whole.sigma_squared.as_f64() / descriptor.sigma_squared.as_f64();
    assert!((ratio - 3.0).abs() < 1e-6, "{ratio}");
    let mut other = descriptor.clone();
    other.sigma_squared = whole.sigma_squared;
    assert!(matches!(
        other.check(&secure, &digest),
        Err(DescriptorError::Differs { what: "sigma squared", .. })
    ));
    let mut more = descriptor;
    more.roster = agents(6);
    assert!(matches!(
        more.check(&secure, &digest),
        Err(DescriptorError::Differs { what: "sigma squared", .. })
    ));
}

/// A round whose norm follows a quantile has two more values, of which a unit moves one, and noise for all together.
#[test]
fn a_count_is_paid_for_in_the_noise_of_the_round() {
    let (plain, digest) = plan("clip_norm: 0.75");
    let plain = RoundDescriptor::new(inputs(), &plain, digest).unwrap();
    let (plan, digest) = plan("clip_norm: {quantile: 0.9}");
    let counted = RoundDescriptor::new(inputs(), &plan, digest).unwrap();
    assert_eq!((plain.len(), plain.count_weight), (6, 0));
    // 49152 and a tenth of it: the hypotenuse is 49397.2.
    assert_eq!((counted.len(), counted.count_weight, counted.sensitivity), (8, 4_915, 49_398));
    assert_eq!(counted.rho, plain.rho, "the same cost");
    let louder = counted.sigma_squared.sigma() / plain.sigma_squared.sigma();
    assert!((louder - 49_398.0 / 49_152.0).abs() < 1e-4, "{louder}");
    assert!(counted.sigma_squared.cost(49_398 * 49_398).unwrap() <= counted.rho);
    let read = RoundDescriptor::from_bytes(&counted.to_bytes()).unwrap();
    read.check(&plan, &digest).unwrap();
    assert!(!String::from_utf8(plain.to_bytes()).unwrap().contains("count_weight"));
    let announced = counted.announcement(Digest::of(b"d"), Quorum::AtLeast { updates: 3 }, &plan).unwrap();
    assert_eq!(announced.limits.len, 8);
    // Whoever asks for the count at the price of a gradient alone, or for a heavier one, is refused.
    for change in [
        (|d| d.sensitivity = 49_152) as fn(&mut RoundDescriptor),
        |d| d.count_weight = 9_000,
        |d| d.count_weight = 0,
    ] {
        let mut bad = counted.clone();
        change(&mut bad);
        assert!(bad.check(&plan, &digest).is_err());
    }
}

#[test]
fn a_sampled_round_is_divided_by_the_units_it_expects_and_costs_what_a_full_one_does() {
    let (all, digest) = plan("");
    let all = RoundDescriptor::new(inputs(), &all, digest).unwrap();
    let (plan, digest) = plan("sampling_rate: 0.1");
    let sampled = RoundDescriptor::new(inputs(), &plan, digest).unwrap();
    assert_eq!((all.divisor, sampled.divisor), (5_001, 501));
    // By chance all of an agent's units may be drawn, and amplification isn't claimed.
    assert_eq!((sampled.max_units, sampled.rho), (all.max_units, all.rho));
    assert_eq!(sampled.sigma_squared, all.sigma_squared);
}

/// Three rounds of two trees with four leaves: a round's answer has two sums for each of eight leaves, its descriptor the values of
/// all 24. The norm is that of a row, √2, unless the plan says another.
#[test]
fn a_forests_round_is_answered_by_the_sums_of_its_leaves() {
    let text =
        |more: &str| format!("rounds: {{count: 3, adapter: {{kind: forest, trees: 2, depth: 2}}{more}}}");
    let inputs = || RoundInputs {
        adapter_keys: (0..6).map(|tree| format!("tree.{tree}")).collect(),
        width: 4,
        adapter_values: vec![0.25; 24],
        clip_norm: 2.0_f64.sqrt(),
        index: 2,
        ..inputs()
    };
    let (plan, digest) = parsed(&text(""));
    let descriptor = RoundDescriptor::new(inputs(), &plan, digest).unwrap();
    assert_eq!((descriptor.leaf_sums, descriptor.len()), (16, 16));
    let quorum = Quorum::AtLeast { updates: 3 };
    let announcement = descriptor.announcement(Digest::of(&descriptor.to_bytes()), quorum, &plan).unwrap();
    assert_eq!(announcement.limits.len, 16);
    assert_eq!(RoundDescriptor::from_bytes(&descriptor.to_bytes()).unwrap(), descriptor);
    let attacks: [Attack; 4] = [
        ("leaf sums: expected 16, got 0", |d| d.leaf_sums = 0),
        ("leaf sums: expected 16, got 18", |d| d.leaf_sums = 18),
        ("leaf values: expected 24, got 20", |d| {
            d.adapter_values.truncate(20);
            d.adapter_keys.truncate(5);
        }),
        ("clip norm", |d| d.clip_norm = 1.5),
    ];
    for (words, spoil) in attacks {
        let mut spoilt = descriptor.clone();
        spoil(&mut spoilt);
        let refused = spoilt.check(&plan, &digest).unwrap_err().to_string();
        assert!(refused.starts_with(words), "{refused}");
    }
    let (fixed, digest) = parsed(&text(", clip_norm: 1.25"));
    let of = |clip_norm| RoundDescriptor::new(RoundInputs { clip_norm, ..inputs() }, &fixed, digest);
    assert!(of(1.25).is_ok() && of(2.0_f64.sqrt()).is_err());
}
