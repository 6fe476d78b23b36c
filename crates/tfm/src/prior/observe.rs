//! What a node looks like in a raw table: a number with its quirks, or a category, a few of the cells missing.

use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;

use super::{
    missing::{self, Missing},
    random::{log_uniform_count, normalise, normals},
    structure::Node,
};

/// A raw column.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Raw {
    pub(super) cells: Cells,
    /// Which cells are missing, if any.
    pub(super) missing: Option<Vec<bool>>,
}

/// The cells of a raw column.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cells {
    /// Numbers on the scale that serving standardises.
    Numeric(Vec<f32>),
    /// Level of each row and number of declared levels.
    Category(Vec<u16>, usize),
}

/// How often the columns of one table are what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Habits {
    /// Probability that a number is cut into levels.
    category: f64,
    /// Probability that a column has nothing to do with the others.
    irrelevant: f64,
    /// How cells go missing.
    missing: Missing,
}

impl Habits {
    pub(super) fn draw(rng: &mut ChaCha20Rng) -> Self {
        let category = match rng.random_range(0..20) {
            0..7 => 0.0,
            7..17 => rng.random_range(0.0..0.6),
            _ => rng.random_range(0.6..1.0),
        };
        let irrelevant = if rng.random_bool(0.5) { 0.03 } else { rng.random_range(0.03..0.6) };
        Self { category, irrelevant, missing: Missing::draw(rng) }
    }
}

/// Shows a node as a raw column; `labels` are read by cells that go missing depending on the class.
pub(super) fn observe(node: &Node, labels: &[u8], habits: &Habits, rng: &mut ChaCha20Rng) -> Raw {
    let unrelated = rng.random_bool(habits.irrelevant).then(|| normals(node.values.len(), rng));
    let levels = node.levels.as_ref().filter(|_| unrelated.is_none());
    let values = unrelated.as_ref().unwrap_or(&node.values);
    let cells = match levels {
        Some((codes, levels)) if rng.random_bool(0.9) => Cells::Category(codes.clone(), *levels),
        // Codes that were declared as numbers, as months or area codes are.
        Some((codes, _)) => Cells::Numeric(codes.iter().map(|c| f32::from(*c)).collect()),
        None if rng.random_bool(habits.category) => cut(values, rng),
        None => Cells::Numeric(number(values, rng)),
    };
    Raw { cells, missing: missing::mask(&habits.missing, values, labels, rng) }
}

/// A number as tables hold it: as it is, with a heavy tail, in steps, as a flag, mostly nought, with outliers.
fn number(values: &[f32], rng: &mut ChaCha20Rng) -> Vec<f32> {
    let mut values = values.to_vec();
    let kind: f64 = rng.random();
    if kind < 0.4 {
        return values;
    }
    normalise(&mut values);
    if kind < 0.55 {
        let power = rng.random_range(0.3..1.5);
        // Declared as positive numbers, serving takes their logarithm.
        let logged = rng.random_bool(0.6);
        for v in &mut values {
            let heavy = (v.clamp(-4.0, 4.0) * power).exp();
            *v = if logged { (10.0 * heavy).ln_1p() } else { heavy };
        }
    } else if kind < 0.7 {
        let steps = rng.random_range(0.7..6.0f32);
        values.iter_mut().for_each(|v| *v = (*v * steps).round());
    } else if kind < 0.85 {
        let threshold = quantile(&values, rng.random_range(0.02..0.98));
        values.iter_mut().for_each(|v| *v = f32::from(u8::from(*v > threshold)));
    } else if kind < 0.95 {
        let threshold = quantile(&values, rng.random_range(0.4..0.95));
        let logged = rng.random_bool(0.5);
        for v in &mut values {
            let above = ((*v - threshold).clamp(0.0, 4.0) * 1.5).exp_m1();
            *v = if logged { (10.0 * above).ln_1p() } else { above };
        }
    } else {
        let share = rng.random_range(0.001..0.02);
        for v in &mut values {
            if rng.random_bool(share) {
                *v *= rng.random_range(5.0..30.0);
            }
        }
    }
    values
}

/// Cuts a number into levels without order; now and then a cell has a level at random.
fn cut(values: &[f32], rng: &mut ChaCha20Rng) -> Cells {
    let levels = match rng.random_range(0..10) {
        0..6 => rng.random_range(2..=8),
        6..9 => rng.random_range(9..=40),
        _ => log_uniform_count(rng, 41, MAX_CUT_LEVELS),
    };
    let mut cuts: Vec<f32> = (1..levels).map(|_| values[rng.random_range(0..values.len())]).collect();
    cuts.sort_by(f32::total_cmp);
    // Unwrap safety: there are at most MAX_CUT_LEVELS levels.
    let mut names: Vec<u16> = (0..u16::try_from(levels).expect("few levels")).collect();
    names.shuffle(rng);
    let stray = if rng.random_bool(0.3) { rng.random_range(0.0..0.5) } else { 0.0 };
    let codes = values
        .iter()
        .map(|v| {
            if rng.random_bool(stray) {
                names[rng.random_range(0..levels)]
            } else {
                names[cuts.partition_point(|c| c < v).min(levels - 1)]
            }
        })
        .collect();
    Cells::Category(codes, levels)
}

fn quantile(values: &[f32], share: f32) -> f32 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted[((share * sorted.len() as f32) as usize).min(sorted.len() - 1)]
}

/// Most levels that a number is cut into.
const MAX_CUT_LEVELS: usize = 300;

#[cfg(test)]
mod tests {
    use super::{Cells, Habits, MAX_CUT_LEVELS, cut, number};
    use crate::prior::{generator, random::normals};

    #[test]
    fn numbers_reach_flags_heavy_tails_and_mostly_nought() {
        let (mut flags, mut heavy, mut sparse, mut plain) = (0, 0, 0, 0);
        for index in 0..300 {
            let mut rng = generator(41, index);
            let source = normals(500, &mut rng);
            let shown = number(&source, &mut rng);
            assert!(shown.iter().all(|v| v.is_finite()));
            let mut distinct = shown.clone();
            distinct.sort_by(f32::total_cmp);
            let (least, most, middle) = (distinct[0], distinct[499], distinct[250]);
            distinct.dedup();
            flags += usize::from(distinct.len() == 2);
            heavy += usize::from(distinct.len() > 100 && most - middle > 4.0 * (middle - least));
            sparse += usize::from(distinct.len() > 10 && (middle - least).abs() < 1e-6);
            plain += usize::from(shown == source);
        }
        assert!(flags > 20 && heavy > 10 && sparse > 8 && plain > 80, "{flags} {heavy} {sparse} {plain}");
    }

    #[test]
    fn levels_reach_two_and_more_than_a_hundred() {
        let mut counts = Vec::new();
        for index in 0..300 {
            let mut rng = generator(42, index);
            let Cells::Category(codes, levels) = cut(&normals(800, &mut rng), &mut rng) else {
                panic!("a cut gives a category")
            };
            assert!(levels <= MAX_CUT_LEVELS && codes.iter().all(|c| usize::from(*c) < levels));
            let mut used = codes;
            used.sort_unstable();
            used.dedup();
            counts.push(used.len());
        }
        assert!(counts.iter().any(|c| *c <= 2) && counts.iter().filter(|c| **c > 100).count() > 3);
    }

    #[test]
    fn habits_reach_tables_without_and_of_mostly_categories() {
        let habits: Vec<Habits> = (0..200).map(|i| Habits::draw(&mut generator(43, i))).collect();
        let none = habits.iter().filter(|h| h.category < 1e-9).count();
        let most = habits.iter().filter(|h| h.category > 0.6).count();
        let noisy = habits.iter().filter(|h| h.irrelevant > 0.3).count();
        assert!((45..95).contains(&none) && most > 10 && noisy > 25, "{none} {most} {noisy}");
    }
}
