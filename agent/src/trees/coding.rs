//! Categories as numbers for trees: 0/1 columns, or out-of-fold target statistics.

use forust_ml::Matrix;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::schema::{FeatureKind, FeatureSchema};

use super::Sample;
use super::settings::{Coding, Settings};

/// A dense column-major table as the tree library wants it.
pub(super) struct Table {
    cells: Vec<f64>,
    rows: usize,
    columns: usize,
}

impl Table {
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    pub(super) fn view(&self) -> Matrix<'_, f64> {
        Matrix::new(&self.cells, self.rows, self.columns)
    }
}

/// A fitted coding together with the coded rows it was fitted on.
pub(super) struct Coded {
    pub(super) coder: Coder,
    pub(super) fitted: Table,
}

/// What a coding learnt from its fitting rows.
pub(super) enum Coder {
    /// Codes seen, per column.
    OneHot(Vec<Vec<u32>>),
    /// `(smoothed share, frequency)` by code, per column; numeric columns hold nothing.
    TargetStatistic(Vec<Vec<(f64, f64)>>),
}

impl Coded {
    pub(super) fn fit(
        settings: Settings,
        sample: &Sample,
        fit: &[usize],
        schema: &FeatureSchema,
        seed: u64,
    ) -> Self {
        let rows = sample.batch.take(fit);
        match settings.coding {
            Coding::OneHot => {
                let coder = Coder::OneHot(rows.columns.iter().map(codes_seen).collect());
                let fitted = coder.apply(&rows);
                Self { coder, fitted }
            }
            Coding::TargetStatistic => {
                let statistics = Statistics::count(sample, settings.corpus_share, fit, &rows, schema, seed);
                let fitted = statistics.out_of_fold(&rows);
                Self { coder: Coder::TargetStatistic(statistics.whole), fitted }
            }
        }
    }
}

impl Coder {
    pub(super) fn apply(&self, rows: &TypedBatch) -> Table {
        let mut cells = Vec::new();
        for (position, column) in rows.columns.iter().enumerate() {
            match (column, self) {
                (TypedColumn::Numeric(values), _) => cells.extend_from_slice(values),
                (TypedColumn::Categorical(codes), Self::OneHot(seen)) => {
                    for level in &seen[position] {
                        cells.extend(codes.iter().map(|code| f64::from(u8::from(code == level))));
                    }
                }
                (TypedColumn::Categorical(codes), Self::TargetStatistic(known)) => {
                    let known = &known[position];
                    let look = |code: &u32| known.get(*code as usize).copied().unwrap_or((f64::NAN, 0.0));
                    cells.extend(codes.iter().map(|code| look(code).0));
                    cells.extend(codes.iter().map(|code| look(code).1));
                }
            }
        }
        table(cells, rows.rows())
    }
}

/// Target statistics of the fitting rows, dealt into folds.
struct Statistics {
    /// `(smoothed share, frequency)` over all fitting rows by code, per column.
    whole: Vec<Vec<(f64, f64)>>,
    /// Smoothed share over the rows outside a fold: per column, per fold, by code.
    by_fold: Vec<Vec<Vec<f64>>>,
    /// Fold of each fitting row.
    fold_of: Vec<usize>,
}

impl Statistics {
    fn count(
        sample: &Sample,
        share: f64,
        fit: &[usize],
        rows: &TypedBatch,
        schema: &FeatureSchema,
        seed: u64,
    ) -> Self {
        let mut fold_of: Vec<usize> = (0..fit.len()).map(|i| i % FOLDS).collect();
        fold_of.shuffle(&mut ChaCha20Rng::seed_from_u64(seed.wrapping_add(STATISTIC_STREAM)));
        let weights = sample.weights(share);
        let weight: Vec<f64> = fit.iter().map(|&row| weights[row]).collect();
        let positive: Vec<f64> = fit.iter().map(|&row| weights[row] * sample.labels[row]).collect();
        let mut all = vec![(0.0, 0.0); FOLDS];
        for ((&fold, w), p) in fold_of.iter().zip(&weight).zip(&positive) {
            all[fold].0 += w;
            all[fold].1 += p;
        }
        let total = all.iter().fold((0.0, 0.0), |sum, fold| (sum.0 + fold.0, sum.1 + fold.1));
        let (mut whole, mut by_fold) = (Vec::new(), Vec::new());
        for (column, feature) in rows.columns.iter().zip(schema.features()) {
            let (TypedColumn::Categorical(codes), FeatureKind::Categorical { levels }) =
                (column, &feature.kind)
            else {
                whole.push(Vec::new());
                by_fold.push(Vec::new());
                continue;
            };
            // Declared levels, "other" and "missing".
            let width = levels.len() + 2;
            let mut counts = vec![vec![(0.0, 0.0); width]; FOLDS];
            for (((code, &fold), w), p) in codes.iter().zip(&fold_of).zip(&weight).zip(&positive) {
                let cell = &mut counts[fold][(*code as usize).min(width - 1)];
                cell.0 += w;
                cell.1 += p;
            }
            let sums: Vec<(f64, f64)> = (0..width)
                .map(|code| {
                    counts.iter().fold((0.0, 0.0), |sum, fold| (sum.0 + fold[code].0, sum.1 + fold[code].1))
                })
                .collect();
            whole.push(sums.iter().map(|&cell| (smooth(cell, total), cell.0 / total.0)).collect());
            by_fold.push(
                counts
                    .iter()
                    .zip(&all)
                    .map(|(fold, &fold_total)| {
                        sums.iter()
                            .zip(fold)
                            .map(move |(&sum, &own)| smooth(less(sum, own), less(total, fold_total)))
                    })
                    .map(Iterator::collect)
                    .collect(),
            );
        }
        Self { whole, by_fold, fold_of }
    }

    /// The fitting rows, each coded by the folds it isn't in.
    fn out_of_fold(&self, rows: &TypedBatch) -> Table {
        let mut cells = Vec::new();
        for (position, column) in rows.columns.iter().enumerate() {
            match column {
                TypedColumn::Numeric(values) => cells.extend_from_slice(values),
                TypedColumn::Categorical(codes) => {
                    let (shares, whole) = (&self.by_fold[position], &self.whole[position]);
                    let last = whole.len() - 1;
                    cells.extend(
                        codes
                            .iter()
                            .zip(&self.fold_of)
                            .map(|(code, &fold)| shares[fold][(*code as usize).min(last)]),
                    );
                    cells.extend(codes.iter().map(|code| whole[(*code as usize).min(last)].1));
                }
            }
        }
        table(cells, rows.rows())
    }
}

fn codes_seen(column: &TypedColumn) -> Vec<u32> {
    match column {
        TypedColumn::Numeric(_) => Vec::new(),
        TypedColumn::Categorical(codes) => {
            codes.iter().copied().collect::<std::collections::BTreeSet<_>>().into_iter().collect()
        }
    }
}

fn table(cells: Vec<f64>, rows: usize) -> Table {
    let columns = cells.len().checked_div(rows).unwrap_or(0);
    Table { cells, rows, columns }
}

/// Share of class 1 in a cell, drawn towards the whole's by [`PRIOR_ROWS`] rows.
fn smooth((weight, positive): (f64, f64), (all, all_positive): (f64, f64)) -> f64 {
    let prior = if all > 0.0 { all_positive / all } else { 0.5 };
    (positive + PRIOR_ROWS * prior) / (weight + PRIOR_ROWS)
}

fn less(a: (f64, f64), b: (f64, f64)) -> (f64, f64) {
    ((a.0 - b.0).max(0.0), (a.1 - b.1).max(0.0))
}

/// Folds of out-of-fold statistics.
const FOLDS: usize = 5;
/// Added to the seed where statistics are dealt into folds, so that they differ from those of cross-validation.
const STATISTIC_STREAM: u64 = 1 << 32;
/// Rows of prior in a smoothed share.
const PRIOR_ROWS: f64 = 10.0;
