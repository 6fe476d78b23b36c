//! P(feature | parents, class) of one clique: as little interaction as the released counts ask for.
//!
//! Without 3-way counts it is the distribution of largest entropy among those with the joint distribution of parents and
//! class and with the feature's 2-way marginals, found by iterative proportional fitting (Deming & Stephan, 1940; Csiszár,
//! *I-divergence geometry*, 1975): no interaction of the feature with two others at once. 3-way counts move it by the share
//! of their squared distance from it that noise doesn't explain (positive-part James–Stein), judged over the whole clique.

use crate::marginal::{probabilities, project_to_simplex};

/// What is known of a clique by pairs. `K` classes, `Q` combinations of parent cells, `C` cells of the feature.
pub(crate) struct Pairs<'a> {
    /// P(class, parent cells), K runs of Q, the last parent's cells side by side.
    pub(crate) own: &'a [f64],
    /// P(cell | class), K runs of C.
    pub(crate) by_class: &'a [Vec<f64>],
    /// P(cell | parent cell) of each parent, as many runs of C as the parent has cells.
    pub(crate) by_parent: &'a [Vec<Vec<f64>>],
}

impl Pairs<'_> {
    /// P(cell | parent cells, class) without interaction of more than two, laid out `(class, parent cells, cell)`.
    ///
    /// Where class and parent cells never meet it is P(cell | class).
    pub(crate) fn without_interaction(&self) -> Vec<f64> {
        let Self { own, by_class, by_parent } = *self;
        let cells = by_class.first().map_or(0, Vec::len);
        let above: usize = by_parent.iter().map(Vec::len).product();
        let mut joint: Vec<f64> =
            own.iter().flat_map(|p| std::iter::repeat_n(*p / cells as f64, cells)).collect();
        // Runs of (class, parent cells) that each parent's cell is in, with their mass.
        let mut inner = above;
        let groups: Vec<Vec<(Vec<usize>, f64)>> = by_parent
            .iter()
            .map(|given| {
                inner /= given.len();
                let of_cell = |cell: usize| {
                    let runs: Vec<usize> =
                        (0..own.len()).filter(|run| run / inner % given.len() == cell).collect();
                    let mass = runs.iter().map(|run| own[*run]).sum();
                    (runs, mass)
                };
                (0..given.len()).map(of_cell).collect()
            })
            .collect();
        for _ in 0..FITTING_SWEEPS {
            for ((mass, given), block) in
                own.chunks_exact(above).zip(by_class).zip(joint.chunks_exact_mut(above * cells))
            {
                let class: f64 = mass.iter().sum();
                for (cell, p) in given.iter().enumerate() {
                    scale(block, cell, cells, class * p);
                }
            }
            for (groups, given) in groups.iter().zip(by_parent) {
                for ((runs, mass), given) in groups.iter().zip(given) {
                    for (cell, p) in given.iter().enumerate() {
                        scale_at(&mut joint, runs, (cell, cells), mass * p);
                    }
                }
            }
            for (mass, run) in own.iter().zip(joint.chunks_exact_mut(cells)) {
                scale(run, 0, 1, *mass);
            }
        }
        for (at, run) in joint.chunks_exact_mut(cells).enumerate() {
            let sum: f64 = run.iter().sum();
            if sum > f64::MIN_POSITIVE * 1e20 {
                run.iter_mut().for_each(|p| *p /= sum);
            } else {
                run.copy_from_slice(&by_class[at / above]);
            }
        }
        joint
    }
}

/// Multiplies the values of one cell in some runs so that they sum to `wanted`; zeros stay.
fn scale_at(values: &mut [f64], runs: &[usize], (cell, cells): (usize, usize), wanted: f64) {
    let sum: f64 = runs.iter().map(|run| values[run * cells + cell]).sum();
    let factor = if sum > 0.0 { wanted / sum } else { 0.0 };
    runs.iter().for_each(|run| values[run * cells + cell] *= factor);
}

/// Multiplies every `step`-th value from `first` so that they sum to `wanted`; zeros stay.
fn scale(values: &mut [f64], first: usize, step: usize, wanted: f64) {
    let sum: f64 = values.iter().skip(first).step_by(step).sum();
    let factor = if sum > 0.0 { wanted / sum } else { 0.0 };
    values.iter_mut().skip(first).step_by(step).for_each(|value| *value *= factor);
}

/// `back_off` moved by 3-way counts of the same layout, whose cells have noise of `variance`.
pub(crate) fn with_counts(back_off: &[f64], counts: &[f64], cells: usize, variance: f64) -> Vec<f64> {
    let runs = || counts.chunks_exact(cells).zip(back_off.chunks_exact(cells));
    let distance: f64 = runs()
        .map(|(column, back)| {
            let rows = column.iter().sum::<f64>().max(0.0);
            column.iter().zip(back).map(|(n, p)| (n - rows * p).powi(2)).sum::<f64>()
        })
        .sum();
    let noise = variance * counts.len() as f64;
    let share = if noise > 0.0 { (1.0 - noise / distance).max(0.0) } else { 1.0 };
    let pseudo = CELL_PSEUDO_SDS * variance.sqrt();
    runs()
        .flat_map(|(column, back)| {
            let rows = column.iter().sum::<f64>().max(0.0);
            let own: Vec<f64> = project_to_simplex(column, rows).into_iter().map(|n| n * share).collect();
            probabilities(&own, back, pseudo + (1.0 - share) * rows)
        })
        .collect()
}

/// Sweeps of proportional fitting; those of the tests' tables are met to 2e-8 of the rows.
const FITTING_SWEEPS: usize = 20;
/// Pseudo-rows of back-off per (parent cell, class), in standard deviations of a 3-way cell's noise.
const CELL_PSEUDO_SDS: f64 = 0.5;

#[cfg(test)]
mod tests;
