//! Labels: a score from the nodes that columns show, noise, and cuts into two to ten classes of uneven size.

use std::ops::Range;

use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;

use super::{
    random::{add_noise, log_uniform, normalise, normals, pick},
    structure::{Node, tree},
};

/// Draws labels for all rows: classes `0..k` with `k <= classes`, each of them present among `context` rows.
///
/// `visible` are the nodes that columns show, `last` a node that none shows.
pub(super) fn draw(
    visible: &[Node],
    last: &[f32],
    classes: usize,
    context: Range<usize>,
    rng: &mut ChaCha20Rng,
) -> Vec<u8> {
    let labels = if classes <= 2 {
        binary(&score(visible, last, rng), context.len(), rng)
    } else if rng.random_bool(0.5) {
        ordered(&score(visible, last, rng), classes, rng)
    } else {
        rival_scores(visible, last, classes, rng)
    };
    present_in(labels, context, classes)
}

/// A noisy score of deviation about 1 before noise.
fn score(visible: &[Node], last: &[f32], rng: &mut ChaCha20Rng) -> Vec<f32> {
    let kind: f64 = rng.random();
    let mut score = last.to_vec();
    normalise(&mut score);
    if kind >= 0.25 {
        let own = rng.random_range(0.0..0.8);
        score.iter_mut().for_each(|v| *v *= own);
        if kind < 0.65 {
            add_parts(&mut score, visible, rng);
        } else if kind < 0.9 {
            add_forest(&mut score, visible, rng);
        } else {
            add_products(&mut score, visible, rng);
        }
        normalise(&mut score);
    }
    if rng.random_bool(0.85) {
        let deviation = log_uniform(rng, 0.1, 3.0);
        add_noise(&mut score, deviation, rng);
    }
    score
}

/// A weighted sum of some columns, each as it is or through a simple curve, as in many business tables.
fn add_parts(score: &mut [f32], visible: &[Node], rng: &mut ChaCha20Rng) {
    let share = rng.random_range(0.15..1.0f64);
    let forced = rng.random_range(0..visible.len().max(1));
    for (k, node) in visible.iter().enumerate() {
        if k != forced && !rng.random_bool(share) {
            continue;
        }
        let mut part = node.values.clone();
        normalise(&mut part);
        let weight = normals(1, rng)[0];
        let threshold = part[rng.random_range(0..part.len())];
        let curve = rng.random_range(0..10);
        for (s, &v) in score.iter_mut().zip(&part) {
            *s += weight
                * match curve {
                    0 => v.abs(),
                    1 => f32::from(u8::from(v > threshold)) * 2.0,
                    2 => (2.0 * (v - threshold)).tanh(),
                    3 => v.clamp(-1.5, 1.5),
                    _ => v,
                };
        }
    }
}

/// A few oblivious trees over the columns.
fn add_forest(score: &mut [f32], visible: &[Node], rng: &mut ChaCha20Rng) {
    let layer: Vec<Vec<f32>> = visible.iter().map(|n| n.values.clone()).collect();
    for _ in 0..rng.random_range(1..=10) {
        let weight = rng.random_range(0.3..1.0);
        for (s, v) in score.iter_mut().zip(tree(&layer, rng)) {
            *s += weight * v;
        }
    }
}

/// Products of pairs of columns beside a sum.
fn add_products(score: &mut [f32], visible: &[Node], rng: &mut ChaCha20Rng) {
    add_parts(score, visible, rng);
    for _ in 0..rng.random_range(1..=3) {
        let (mut a, mut b) = (pick(visible, rng).values.clone(), pick(visible, rng).values.clone());
        normalise(&mut a);
        normalise(&mut b);
        for ((s, a), b) in score.iter_mut().zip(&a).zip(&b) {
            *s += (a * b).clamp(-4.0, 4.0);
        }
    }
}

/// Two classes by a threshold; the smaller one has a share from [`LEAST_SHARE`] to one half, and at least about
/// three rows among `context` rows.
pub(super) fn binary(score: &[f32], context: usize, rng: &mut ChaCha20Rng) -> Vec<u8> {
    let least = LEAST_SHARE.max(2.5 / context as f32);
    let share =
        if rng.random_bool(0.4) { log_uniform(rng, least, 0.5) } else { rng.random_range(0.08f32..0.5) }
            .max(least);
    let mut sorted = score.to_vec();
    sorted.sort_by(f32::total_cmp);
    let at = ((1.0 - share) * sorted.len() as f32) as usize;
    let threshold = sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0);
    let flip = rng.random_bool(0.5);
    // Wrong labels, fewer than the rows of the smaller class.
    let slip = if rng.random_bool(0.2) { rng.random_range(0.0..0.25) * f64::from(share) } else { 0.0 };
    score.iter().map(|v| u8::from(((*v >= threshold) ^ flip) ^ rng.random_bool(slip))).collect()
}

/// Cuts of one score at random quantiles, classes in random order.
pub(super) fn ordered(score: &[f32], classes: usize, rng: &mut ChaCha20Rng) -> Vec<u8> {
    let mut cuts: Vec<f32> = (1..classes).map(|_| score[rng.random_range(0..score.len())]).collect();
    cuts.sort_by(f32::total_cmp);
    let names = shuffled(classes, rng);
    let slip = if rng.random_bool(0.3) { rng.random_range(0.0..0.15) } else { 0.0 };
    score
        .iter()
        .map(|v| {
            let class = cuts.partition_point(|c| c < v);
            if rng.random_bool(slip) { *pick(&names, rng) } else { names[class.min(classes - 1)] }
        })
        .collect()
}

/// The class with the highest of several scores, each with its own handicap.
fn rival_scores(visible: &[Node], last: &[f32], classes: usize, rng: &mut ChaCha20Rng) -> Vec<u8> {
    let spread = rng.random_range(0.0..1.5f32);
    let mut best = vec![(f32::NEG_INFINITY, 0u8); last.len()];
    for class in shuffled(classes, rng) {
        let handicap = spread * normals(1, rng)[0];
        for (b, v) in best.iter_mut().zip(score(visible, last, rng)) {
            if v + handicap > b.0 {
                *b = (v + handicap, class);
            }
        }
    }
    best.into_iter().map(|b| b.1).collect()
}

fn shuffled(classes: usize, rng: &mut ChaCha20Rng) -> Vec<u8> {
    // Unwrap safety: a prior has at most MAX_CLASSES classes.
    let mut names: Vec<u8> = (0..u8::try_from(classes).expect("few classes")).collect();
    names.shuffle(rng);
    names
}

/// Renumbers the classes that `context` shows as `0..k`; rows of other classes join the most frequent one.
///
/// Two classes keep their numbers: a model must not learn that class 0 is there before class 1.
pub(super) fn present_in(mut labels: Vec<u8>, context: Range<usize>, classes: usize) -> Vec<u8> {
    let mut counts = vec![0usize; classes];
    for label in &labels[context] {
        counts[usize::from(*label)] += 1;
    }
    if classes <= 2 || counts.iter().all(|c| *c > 0) {
        return labels;
    }
    let frequent = counts.iter().enumerate().max_by_key(|(_, count)| **count).map_or(0, |(class, _)| class);
    let number = |class: usize| counts[..class].iter().filter(|c| **c > 0).count();
    for label in &mut labels {
        let class = usize::from(*label);
        let class = if counts[class] > 0 { class } else { frequent };
        // Unwrap safety: numbers only get smaller.
        *label = u8::try_from(number(class)).expect("few classes");
    }
    labels
}

/// Smallest share of the smaller of two classes.
const LEAST_SHARE: f32 = 0.01;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{binary, draw, present_in};
    use crate::prior::{generator, random::normals, structure};

    /// Over 400 tables of 1,000 rows shares reach from about 1 % to about one half, and both sides are the rare one.
    #[test]
    fn binary_shares_reach_one_per_cent_and_one_half() {
        let shares: Vec<f64> = (0..400)
            .map(|index| {
                let mut rng = generator(31, index);
                let score = normals(1000, &mut rng);
                let labels = binary(&score, 1000, &mut rng);
                labels.iter().map(|l| f64::from(*l)).sum::<f64>() / 1000.0
            })
            .collect();
        let minority: Vec<f64> = shares.iter().map(|s| s.min(1.0 - s)).collect();
        assert!(minority.iter().any(|m| *m < 0.015) && minority.iter().all(|m| *m > 0.004));
        assert!(minority.iter().any(|m| *m > 0.45));
        let rare = minority.iter().filter(|m| **m < 0.05).count();
        assert!((40..160).contains(&rare), "{rare} of 400 below 5 %");
        assert!(shares.iter().any(|s| *s < 0.02) && shares.iter().any(|s| *s > 0.98));
        // Small contexts get shares that leave them some rows of each class.
        let small = binary(&normals(32, &mut generator(32, 0)), 32, &mut generator(32, 1));
        assert!(small.contains(&1) && small.contains(&0));
    }

    #[test]
    fn many_classes_are_all_present_in_the_context() {
        let mut seen = [false; 11];
        for index in 0..60 {
            let mut rng = generator(33, index);
            let s = structure::draw(5, 200, &mut rng);
            let classes = 3 + usize::try_from(index % 8).unwrap();
            let labels = draw(&s.nodes[..5], &s.last, classes, 0..150, &mut rng);
            let present: std::collections::BTreeSet<u8> = labels[..150].iter().copied().collect();
            assert!(labels.iter().all(|l| present.contains(l)));
            assert_eq!(usize::from(*present.last().unwrap()) + 1, present.len());
            seen[present.len()] = true;
        }
        assert!(seen[3..=10].iter().all(|s| *s), "{seen:?}");
    }

    #[test]
    fn absent_classes_are_renumbered_by_hand() {
        assert_eq!(present_in(vec![3, 1, 3, 0, 2, 1], 0..3, 4), [1, 0, 1, 1, 1, 0]);
        assert_eq!(present_in(vec![1, 1, 0], 0..2, 2), [1, 1, 0]);
    }
}
