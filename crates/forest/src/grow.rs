//! Drawing the splits: from noisy counts by class and a seed, nothing else.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;

use crate::error::ForestError;
use crate::forest::{Forest, Shape};
use crate::split::Split;

/// Noisy counts of one column by class: post-processing of a release.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// Position of the column in the schema.
    pub position: u32,
    /// What its cells hold.
    pub cells: Cells,
    /// Rows of class 0 and of class 1 in each cell; noise may have made them negative.
    pub counts: Vec<[f64; 2]>,
    /// Variance of the noise in each count.
    pub variance: f64,
}

/// What the cells of a column hold.
#[derive(Debug, Clone, PartialEq)]
pub enum Cells {
    /// Numbers: bins in increasing order, cut at these edges, and a last cell of missing values. A number at an edge is in the bin
    /// above it.
    Bins(Vec<f64>),
    /// Categories: the codes in each cell.
    Levels(Vec<Vec<u32>>),
}

/// The splits of one column that trees may draw, with how much each tells.
struct Choice {
    splits: Vec<(Split, f64)>,
    /// How much the best of them tells.
    best: f64,
}

impl Forest {
    /// Draws the splits of a forest; its leaves say nothing yet.
    ///
    /// A tree's columns differ from each other while there are columns left. How much a split tells is the variance of the label that
    /// it explains by the counts, less what noise alone would explain; where nearly all rows answer alike a split isn't asked, unless that is
    /// so of all. A column is drawn in proportion to a power of what its best
    /// split tells (0.7), a split of the column likewise; each keeps a small chance.
    ///
    /// # Errors
    /// [`ForestError`] for a shape out of range, counts that don't fit their cells, or no columns.
    pub fn grow(columns: &[Column], shape: Shape, seed: [u8; 32]) -> Result<Self, ForestError> {
        shape.check()?;
        let mut choices = Vec::new();
        for column in columns {
            let splits = column.splits()?;
            if !splits.is_empty() {
                let best = splits.iter().map(|(_, told)| *told).fold(0.0, f64::max);
                choices.push(Choice { splits, best });
            }
        }
        if choices.is_empty() {
            // Counts drowned in noise say nothing: what they cost is spent, and rounds may still find something.
            choices = columns.iter().map(Column::untold).filter(|choice| !choice.splits.is_empty()).collect();
        }
        if choices.is_empty() {
            return Err(ForestError::NothingToSplit);
        }
        let mut rng = ChaCha20Rng::from_seed(seed);
        rng.set_stream(STREAM);
        let trees = (0..shape.trees).map(|_| tree(&choices, shape.depth, &mut rng)).collect();
        Ok(Self::bare(start(columns), trees, shape))
    }
}

/// Logit of the label rate by all columns together.
fn start(columns: &[Column]) -> f64 {
    let mut classes = [0.0; 2];
    for count in columns.iter().flat_map(|column| &column.counts) {
        classes[0] += count[0];
        classes[1] += count[1];
    }
    let [zeros, ones] = classes.map(|count: f64| count.max(0.0) + 0.5);
    (ones / zeros).ln()
}

/// The questions of one tree. Where there are fewer columns than levels, columns come again.
fn tree(choices: &[Choice], depth: usize, rng: &mut ChaCha20Rng) -> Vec<Split> {
    let whole: Vec<f64> = choices.iter().map(|choice| weight(choice.best, LEAST_COLUMN)).collect();
    let mut left = whole.clone();
    let mut splits = Vec::with_capacity(depth);
    for _ in 0..depth {
        if left.iter().all(|weight| *weight <= 0.0) {
            left.clone_from(&whole);
        }
        let at = drawn(&left, rng);
        left[at] = 0.0;
        let weights: Vec<f64> =
            choices[at].splits.iter().map(|(_, told)| weight(*told, LEAST_SPLIT)).collect();
        splits.push(choices[at].splits[drawn(&weights, rng)].0.clone());
    }
    splits
}

fn weight(told: f64, least: f64) -> f64 {
    (told + least).powf(EAGERNESS)
}

/// A position, drawn in proportion to its weight; weights are not all zero.
fn drawn(weights: &[f64], rng: &mut ChaCha20Rng) -> usize {
    let mut point = rng.random::<f64>() * weights.iter().sum::<f64>();
    let mut last = 0;
    for (at, weight) in weights.iter().enumerate() {
        if *weight > 0.0 {
            last = at;
            point -= weight;
            if point < 0.0 {
                break;
            }
        }
    }
    last
}

impl Column {
    /// What the column can be asked, with how much each answer tells.
    fn splits(&self) -> Result<Vec<(Split, f64)>, ForestError> {
        let expected = match &self.cells {
            Cells::Bins(edges) => edges.len() + 2,
            Cells::Levels(levels) => levels.len(),
        };
        if self.counts.len() != expected {
            return Err(ForestError::shape("cells of a column", expected, self.counts.len()));
        }
        let known = self.counts.iter().flatten().all(|count| count.is_finite());
        if !known || !self.variance.is_finite() {
            return Err(ForestError::shape("counts of a column", "numbers", "one that is none"));
        }
        Ok(self.sides().into_iter().filter_map(|(split, yes)| Some((split, self.told(&yes)?))).collect())
    }

    /// Every question of the column, with the cells whose answer is yes.
    fn sides(&self) -> Vec<(Split, Vec<usize>)> {
        match &self.cells {
            Cells::Bins(edges) => self.cuts(edges),
            Cells::Levels(levels) => self.subsets(levels),
        }
    }

    /// Every question of the column, all alike.
    fn untold(&self) -> Choice {
        Choice { splits: self.sides().into_iter().map(|(split, _)| (split, 0.0)).collect(), best: 0.0 }
    }

    /// Every edge, and whether a number is missing; with the cells whose answer is yes.
    fn cuts(&self, edges: &[f64]) -> Vec<(Split, Vec<usize>)> {
        let (column, missing) = (self.position, edges.len() + 1);
        let reached = edges.iter().enumerate().map(|(at, threshold)| {
            (Split::AtLeast { column, threshold: *threshold }, (at + 1..missing).collect())
        });
        std::iter::once((Split::Missing { column }, vec![missing])).chain(reached).collect()
    }

    /// The largest cells one by one, and heads of the cells in the order of their share of class 1.
    fn subsets(&self, levels: &[Vec<u32>]) -> Vec<(Split, Vec<usize>)> {
        let rows: Vec<f64> = self.counts.iter().map(|count| count[0].max(0.0) + count[1].max(0.0)).collect();
        let total: f64 = rows.iter().sum();
        let rate = self.counts.iter().map(|count| count[1].max(0.0)).sum::<f64>() / total.max(1.0);
        // A cell of few rows, or of little but noise, is taken for an ordinary one.
        let prior = PRIOR_ROWS + 2.0 * self.variance.max(0.0).sqrt();
        let share = |cell: usize| (self.counts[cell][1].max(0.0) + prior * rate) / (rows[cell] + prior);
        let mut order: Vec<usize> = (0..levels.len()).collect();
        order.sort_by(|a, b| rows[*b].total_cmp(&rows[*a]));
        let mut sets: Vec<Vec<usize>> = order.iter().take(SINGLE_CELLS).map(|cell| vec![*cell]).collect();
        order.sort_by(|a, b| share(*a).total_cmp(&share(*b)).then(a.cmp(b)));
        let (mut reached, mut cut) = (0.0, 1);
        for length in 1..order.len() {
            reached += rows[order[length - 1]];
            if reached * HEADS as f64 >= total * f64::from(cut) {
                while reached * HEADS as f64 >= total * f64::from(cut) && cut < HEADS {
                    cut += 1;
                }
                let mut head = order[..length].to_vec();
                head.sort_unstable();
                // A head of one cell asks what that cell alone does.
                if !sets.contains(&head) {
                    sets.push(head);
                }
            }
        }
        let split = |cells: Vec<usize>| {
            let mut codes: Vec<u32> =
                cells.iter().filter_map(|cell| levels.get(*cell)).flatten().copied().collect();
            codes.sort_unstable();
            codes.dedup();
            (Split::OneOf { column: self.position, codes }, cells)
        };
        sets.into_iter().map(split).collect()
    }

    /// Variance of the label that a question explains, less what noise would; `None` if nearly all rows answer alike.
    fn told(&self, yes: &[usize]) -> Option<f64> {
        let mut sides = [[0.0_f64; 2]; 2];
        let mut cells = [0.0_f64; 2];
        for (cell, count) in self.counts.iter().enumerate() {
            let side = usize::from(yes.contains(&cell));
            cells[side] += 1.0;
            sides[side][0] += count[0];
            sides[side][1] += count[1];
        }
        let rows = sides.map(|[zeros, ones]| zeros + ones);
        let total = rows[0] + rows[1];
        if total <= 0.0 || rows.iter().any(|side| *side < LEAST_SHARE * total) {
            return None;
        }
        let rate = ((sides[0][1] + sides[1][1]) / total).clamp(0.0, 1.0);
        let apart = sides[1][1] / rows[1] - sides[0][1] / rows[0];
        // Noise in a side's counts moves its share by about (noise of class 1 - rate * noise of both) / rows.
        let of_side = |side: usize| {
            cells[side] * self.variance * (rate * rate + (1.0 - rate) * (1.0 - rate))
                / (rows[side] * rows[side])
        };
        let by_noise = of_side(0) + of_side(1);
        Some((rows[0] * rows[1] / (total * total) * (apart * apart - by_noise)).max(0.0))
    }
}

/// Sets the draws apart from others under the same seed, such as the corpus'.
const STREAM: u64 = 0x666f_7265_7374;
/// Power of what a column or a split tells that it is drawn in proportion to: at 1 a few columns have nearly all trees.
const EAGERNESS: f64 = 0.7;
/// Heads of the cells of categories: about so many, of equally many rows.
const HEADS: i32 = 8;
/// Cells of categories that are asked for one by one.
const SINGLE_CELLS: usize = 12;
/// Smallest share of rows on either side of a split.
const LEAST_SHARE: f64 = 0.01;
/// Rows at the label rate that a cell's share of class 1 starts from, beside what noise calls for.
const PRIOR_ROWS: f64 = 10.0;
/// Added to what a column tells, so that each can be drawn.
const LEAST_COLUMN: f64 = 1e-5;
/// Added to what a split tells.
const LEAST_SPLIT: f64 = 1e-6;

#[cfg(test)]
mod tests;
