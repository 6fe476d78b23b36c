//! Missing cells: at random, or more often for some values, some classes or the rows of some hidden group.

use rand::Rng;
use rand_chacha::ChaCha20Rng;

/// How often columns of a table have missing cells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Missing {
    /// Probability that a column has any.
    columns: f64,
}

impl Missing {
    pub(super) fn draw(rng: &mut ChaCha20Rng) -> Self {
        Self { columns: if rng.random_bool(0.55) { 0.0 } else { rng.random_range(0.05..0.8) } }
    }
}

/// Why a cell is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Chance,
    Value,
    Class,
}

/// Which cells of a column are missing; `None` if none can be.
pub(super) fn mask(
    habits: &Missing,
    values: &[f32],
    labels: &[u8],
    rng: &mut ChaCha20Rng,
) -> Option<Vec<bool>> {
    if !rng.random_bool(habits.columns) {
        return None;
    }
    let reason = match rng.random_range(0..10) {
        0..5 => Reason::Chance,
        5..8 => Reason::Value,
        _ => Reason::Class,
    };
    Some(cells(reason, rng.random_range(0.01..0.6), values, labels, rng))
}

fn cells(reason: Reason, share: f64, values: &[f32], labels: &[u8], rng: &mut ChaCha20Rng) -> Vec<bool> {
    // Cells of one kind go missing more often, those of the other less.
    let factor = rng.random_range(1.3..3.0);
    let (often, seldom) = ((share * factor).min(0.95), share / factor);
    let threshold = values[rng.random_range(0..values.len())];
    let class = labels[rng.random_range(0..labels.len())];
    let above = rng.random_bool(0.5);
    values
        .iter()
        .zip(labels)
        .map(|(value, label)| {
            rng.random_bool(match reason {
                Reason::Chance => share,
                Reason::Value if (*value > threshold) == above => often,
                Reason::Class if *label == class => often,
                Reason::Value | Reason::Class => seldom,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Missing, Reason, cells, mask};
    use crate::prior::{generator, random::normals};

    #[test]
    fn shares_reach_none_and_more_than_half() {
        let mut shares = Vec::new();
        for index in 0..400 {
            let mut rng = generator(51, index);
            let habits = Missing::draw(&mut rng);
            let values = normals(300, &mut rng);
            let labels: Vec<u8> = values.iter().map(|v| u8::from(*v > 0.3)).collect();
            let hidden = mask(&habits, &values, &labels, &mut rng)
                .map_or(0, |m| m.iter().filter(|missing| **missing).count());
            shares.push(hidden as f64 / 300.0);
        }
        let none = shares.iter().filter(|s| **s < 1e-9).count();
        assert!((220..380).contains(&none), "{none} of 400 columns are complete");
        assert!(shares.iter().any(|s| *s > 0.5) && shares.iter().filter(|s| **s > 0.05).count() > 25);
    }

    /// Missing by value or class is not missing at random: the two kinds of cells differ by more than chance allows
    /// (4,000 cells each; a share's deviation is below .008).
    #[test]
    fn reasons_show_in_the_cells() {
        let mut rng = generator(52, 0);
        let values = normals(8000, &mut rng);
        let labels: Vec<u8> = (0..8000).map(|i| u8::from(i % 2 == 0)).collect();
        let gap = |hidden: &[bool], kind: &dyn Fn(usize) -> bool| {
            let share = |side: bool| {
                let rows: Vec<usize> = (0..8000).filter(|i| kind(*i) == side).collect();
                rows.iter().filter(|i| hidden[**i]).count() as f64 / rows.len() as f64
            };
            (share(true) - share(false)).abs()
        };
        let by_class = cells(Reason::Class, 0.3, &values, &labels, &mut rng);
        assert!(gap(&by_class, &|i| labels[i] == 1) > 0.08);
        let by_chance = cells(Reason::Chance, 0.3, &values, &labels, &mut rng);
        assert!(gap(&by_chance, &|i| labels[i] == 1) < 0.05);
        let mut sorted = values.clone();
        sorted.sort_by(f32::total_cmp);
        let widest = (0..8).map(|_| {
            let by_value = cells(Reason::Value, 0.3, &values, &labels, &mut rng);
            gap(&by_value, &|i| values[i] > sorted[4000])
        });
        assert!(widest.fold(0.0, f64::max) > 0.08);
    }
}
