//! Choosing on made-up gates: shipped and learnt weights, few units, records.

#![allow(clippy::float_cmp, reason = "a weight of exactly 0 is none")]

use super::*;

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

const MODEL: Member =
    Member::Model(Candidate { weights: Weights::Tuned, rows: Rows::Mixed, tokens: Tokens::Off });
const OTHER: Member =
    Member::Model(Candidate { weights: Weights::Base, rows: Rows::Local, tokens: Tokens::Off });

fn gate(units: Vec<UnitKey>, labels: &[bool]) -> TypedBatch {
    let labels = labels.iter().map(|label| Some(u16::from(*label))).collect();
    TypedBatch { columns: vec![], labels, units }
}

fn unit(n: usize) -> UnitKey {
    let mut key = [0; 16];
    // Spread as a hash would be.
    key[..8].copy_from_slice(&(n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    key
}

/// `n` rows whose true logit is `truth`; every member sees it through noise of its own, scaled by what is given for trees, trees
/// with the corpus, the shipped variant and another; the base on own rows is as noisy as trees with the corpus.
fn evidence(n: usize, noise: [f64; 4], folds: usize) -> Evidence {
    let spread = |i: usize, step: f64| 2.0 * ((i as f64 * step + 0.17) % 1.0) - 1.0;
    let truth: Vec<f64> = (0..n).map(|i| 3.0 * spread(i, 0.618_034)).collect();
    let labels: Vec<bool> = truth
        .iter()
        .enumerate()
        .map(|(i, logit)| (i as f64 * 0.754_877_7 + 0.31) % 1.0 < sigmoid(*logit))
        .collect();
    let steps = [0.414_213_6, 0.732_050_8, 0.236_068, 0.645_751_3, 0.302_775_6];
    let logits = [Member::Trees, Member::TreesAndCorpus, MODEL, OTHER, Member::OwnBase]
        .into_iter()
        .zip(noise.into_iter().chain([noise[1]]).zip(steps))
        .map(|(member, (noise, step))| {
            (member, truth.iter().enumerate().map(|(i, z)| z + noise * spread(i, step)).collect())
        })
        .collect();
    Evidence::new(logits, &gate((0..n).map(unit).collect(), &labels), folds)
}

#[test]
fn the_shipped_weights_move_smoothly_from_the_corpus_to_own_rows() {
    let of = |member: Member, m: usize| Blend::default_for(m, Offer::default(), true).weight(member);
    let trees = |m: usize| of(Member::Trees, m);
    assert!(trees(0) == 0.0 && trees(8) < 0.05 && trees(5_000) > 0.9 * MOST_TREES);
    assert!((trees(40) - MOST_TREES / 2.0).abs() < 1e-12, "half of it at {HALF_MINORITY}");
    assert!(of(Member::OwnBase, 0) == 0.0 && of(Member::OwnBase, 1) < of(Member::OwnBase, 3));
    // Trees have less than the least weight there, and what they had goes to the others.
    assert!((of(Member::OwnBase, 2) - MOST_BASE / 2.0).abs() < 1e-3, "half of it at {HALF_BASE}");
    for m in 0..300 {
        let blend = Blend::default_for(m, Offer::default(), true);
        assert!((blend.shares.iter().map(|s| s.weight).sum::<f64>() - 1.0).abs() < 1e-12);
        let twice = of(Member::TreesAndCorpus, m) - 2.0 * of(MODEL, m);
        assert!(twice.abs() < 1e-12 && of(MODEL, m) > 1.0 / 9.0, "{m}: {blend}");
        // Under the least weight they aren't served at all.
        let (less, more) = (trees(m), trees(m + 1));
        assert!(more >= less && (more - less < 0.02 || less == 0.0), "{m}: {less} {more}");
    }
    assert_eq!(Blend::default_for(500, Offer::default(), false), Blend::of(MODEL));
    let with = Blend::default_for(0, Offer { adapter: true, forest: false }, false).shares[0].member;
    assert_eq!(with, Member::Model(Candidate { tokens: Tokens::On, ..default_variant(false) }));
}

/// A forest takes its part of everything and a third of what own rows leave; own rows keep their shares of the rest.
#[test]
fn a_forest_has_its_part_of_the_shipped_weights() {
    let offer = Offer { adapter: false, forest: true };
    for m in [0, 40, 1_000] {
        let (with, without) =
            (Blend::default_for(m, offer, true), Blend::default_for(m, Offer::default(), true));
        assert!((with.shares.iter().map(|s| s.weight).sum::<f64>() - 1.0).abs() < 1e-12);
        assert!(without.weight(Member::Forest) == 0.0);
        assert!((with.weight(Member::TreesAndCorpus) - with.weight(MODEL)).abs() < 1e-12, "{with}");
        assert!((with.weight(Member::Forest) - with.weight(MODEL) - FOREST).abs() < 1e-9, "{with}");
        for own in [Member::Trees, Member::OwnBase] {
            assert!((with.weight(own) - (1.0 - FOREST) * without.weight(own)).abs() < 1e-9, "{with}");
        }
    }
    let alone = Blend::default_for(9, offer, false);
    assert_eq!((alone.weight(Member::Forest), alone.weight(MODEL)), (0.5, 0.5));
}

#[test]
fn a_blend_is_sharpened_about_the_label_rate_and_one_model_is_not() {
    let thirds = Blend::weighed(&[Member::Trees, Member::OwnBase, MODEL], &[1.0 / 3.0; 3], &BTreeMap::new());
    let calibration = thirds.sharpened([90, 10]);
    let rate = (10.0_f64 / 90.0).ln();
    assert!((calibration.slope - 1.3).abs() < 1e-12 && (calibration.apply(rate) - rate).abs() < 1e-12);
    assert_eq!(Blend::of(MODEL).sharpened([90, 10]), Calibration::NONE);
    assert_eq!(thirds.sharpened([100, 0]), Calibration::NONE);
}

#[test]
fn a_member_that_is_clearly_better_gets_the_weight_and_a_useless_one_is_dropped() {
    let evidence = evidence(10_000, [0.0, 8.0, 8.0, 8.0], 5);
    let default = Blend::default_for(400, Offer::default(), true);
    let (served, held_out, reason) = decide(&evidence, &default, &default);
    assert!(served.weight(Member::Trees) > 0.85 && served.shares.len() < 3, "{served}; {reason}");
    assert!(evidence.mean(&held_out) < evidence.mean(&evidence.blended(&default)));
}

#[test]
fn another_variant_takes_the_place_of_the_shipped_one_if_it_is_better() {
    let default = Blend::default_for(400, Offer::default(), true);
    let better = evidence(10_000, [3.0, 3.0, 8.0, 0.0], 5);
    let (served, ..) = decide(&better, &default, &default);
    assert!(served.weight(OTHER) > 0.7 && served.weight(MODEL) == 0.0, "{served}");
    let equal = evidence(2_000, [3.0, 3.0, 1.0, 1.0], 5);
    assert_eq!(equal.fitted(&(0..2_000).collect::<Vec<_>>(), &default).weight(OTHER), 0.0);
}

#[test]
fn without_a_gain_of_one_standard_error_the_champion_stays() {
    // All members say the same, so that no weights are better than others.
    let same = evidence(600, [0.0; 4], 5);
    let default = Blend::default_for(100, Offer::default(), true);
    let champion = Blend::of(OTHER);
    for held in [&default, &champion] {
        let (served, held_out, reason) = decide(&same, &default, held);
        assert!(&served == held && reason.contains("kept"), "{served}: {reason}");
        assert_eq!(held_out, same.blended(held));
    }
    // A champion that is worse than what the gate teaches goes.
    let (served, ..) = decide(&evidence(2_000, [0.0, 1.0, 1.0, 9.0], 5), &default, &champion);
    assert_eq!(served.weight(OTHER), 0.0);
}

/// Labels that have nothing to do with any member: what was learnt on them must not look like a gain.
#[test]
fn noise_teaches_nothing() {
    let mut random = evidence(400, [1.0, 2.0, 3.0, 4.0], 5);
    random.labels = (0..400).map(|i| (i * 7919) % 101 < 30).collect();
    let default = Blend::default_for(100, Offer::default(), true);
    let (_, held_out, _) = decide(&random, &default, &default);
    // Near or below the loss of the shipped weights, up to the noise of 400 rows.
    assert!(random.mean(&held_out) < random.mean(&random.blended(&default)) + 0.02);
}

#[test]
fn folds_keep_units_together_are_stratified_and_independent_of_the_order_of_rows() {
    let units: Vec<UnitKey> = (0..200).map(|row| unit(row / 2)).collect();
    let labels: Vec<bool> = (0..200).map(|row| (row / 2) % 5 == 0).collect();
    let first = Evidence::new(BTreeMap::new(), &gate(units.clone(), &labels), 5);
    assert!(first.folds.chunks(2).all(|pair| pair[0] == pair[1]));
    for fold in 0..5 {
        let ones = (0..200).filter(|&row| first.folds[row] == fold && labels[row]).count();
        assert_eq!(ones, 8, "20 units of class 1 over 5 folds, two rows each");
    }
    let turned =
        gate(units.iter().rev().copied().collect(), &labels.iter().rev().copied().collect::<Vec<_>>());
    let second = Evidence::new(BTreeMap::new(), &turned, 5);
    assert_eq!(first.folds, second.folds.into_iter().rev().collect::<Vec<_>>());
}

#[test]
fn minority_units_are_counted_not_rows() {
    let units: Vec<UnitKey> = (0..40).map(|row| unit(row / 4)).collect();
    let labels: Vec<bool> = (0..40).map(|row| row < 12).collect();
    let batch = gate(units, &labels);
    assert_eq!((rarer_units(&batch), class_counts(&[&batch])), (3, [28, 12]));
    assert_eq!(rarer_units(&gate(vec![], &[])), 0);
}

#[test]
fn a_blend_survives_its_record_and_reads_well() {
    let settings = BTreeMap::from([(Member::Trees, Settings::DEFAULT)]);
    let blend = Blend::weighed(&[Member::Trees, MODEL, OTHER], &[0.25, 0.735, 0.015], &settings);
    assert_eq!(blend.shares.len(), 2, "a weight under .02 is dropped");
    let text = serde_json::to_string(&blend).unwrap();
    assert_eq!(serde_json::from_str::<Blend>(&text).unwrap(), blend);
    assert_eq!(blend.to_string(), "0.25 trees on own rows + 0.75 tuned, mixed context, no adapter");
}
