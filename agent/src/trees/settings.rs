//! Settings of the trees, chosen by cross-validated log loss on own rows; corpus rows only ever train.

use forust_ml::GradientBooster;
use forust_ml::gradientbooster::GrowPolicy;
use forust_ml::objective::ObjectiveType;
use forust_ml::sampler::SampleMethod;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use serde::{Deserialize, Serialize};
use tabmesh_contract::schema::FeatureSchema;

use super::coding::{Coded, Table};
use super::{Sample, TreeError};

/// How categories become numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Coding {
    /// A 0/1 column for each code seen in training.
    OneHot,
    /// Smoothed share of class 1 per code, computed without the row's own fold, and the code's frequency.
    TargetStatistic,
}

/// What trees are fitted with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Coding of categories.
    pub coding: Coding,
    /// Levels of a tree.
    pub depth: usize,
    /// Leaves of a tree.
    pub leaves: usize,
    /// Share of columns that a tree sees.
    pub column_share: f64,
    /// How many trees.
    pub rounds: usize,
    /// Weight of all corpus rows together, in own rows; without meaning where there are none.
    pub corpus_share: f64,
}

impl Settings {
    /// Used where a class has fewer than two own rows and nothing can be cross-validated.
    pub const DEFAULT: Self = Self { rounds: 60, ..SMALL };
}

/// The best of [`CANDIDATES`] with its best number of rounds.
///
/// # Errors
/// [`TreeError::Library`] if the tree library refuses rows.
pub(super) fn choose(sample: &Sample, schema: &FeatureSchema, seed: u64) -> Result<Settings, TreeError> {
    // Corpus rows weigh together what their share says, however many they are: a part of them tells as much, in less time. Where
    // own rows are many, as many stay as would weigh less than one each.
    let enough = (SMALL.corpus_share * sample.own as f64).ceil() as usize;
    let part = sample.with_corpus_rows(enough.max(TRIED_CORPUS_ROWS));
    let sample = &part;
    // Target statistics of few rows are noise that trees trust: on draws of 64 rows one-hot coding was ahead by
    // .05 AUC, and cross-validation on so few rows couldn't tell.
    let candidates =
        if sample.labels.len() < FEW_ROWS { &CANDIDATES[..ONE_HOT_CANDIDATES] } else { &CANDIDATES };
    let Some((best, mut loss)) = best_of(candidates, sample, schema, seed)? else {
        return Ok(Settings::DEFAULT);
    };
    let mut settings = best;
    if sample.own < sample.labels.len() {
        // A noisy corpus of little worth must not drown own rows: the share is tried after the rest is settled.
        let others = CORPUS_SHARES.map(|corpus_share| Settings { corpus_share, rounds: MAX_ROUNDS, ..best });
        if let Some((other, other_loss)) = best_of(&others, sample, schema, seed)?
            && other_loss < loss
        {
            (settings, loss) = (other, other_loss);
        }
    }
    tracing::debug!(?settings, loss, "settings of trees chosen");
    Ok(settings)
}

/// The candidate with the smallest held-out loss, with its best number of rounds, and that loss; candidates are tried on
/// the same folds. `None` where no fold can be made.
fn best_of(
    candidates: &[Settings],
    sample: &Sample,
    schema: &FeatureSchema,
    seed: u64,
) -> Result<Option<(Settings, f64)>, TreeError> {
    // On two threads, half the candidates each.
    let curves = std::thread::scope(|scope| {
        let workers: Vec<_> = candidates
            .chunks(candidates.len().div_ceil(2).max(1))
            .map(|group| {
                scope.spawn(move || -> Result<Vec<_>, TreeError> {
                    group.iter().map(|&c| Ok((c, loss_curve(c, sample, schema, seed)?))).collect()
                })
            })
            .collect();
        let mut curves = Vec::new();
        for worker in workers {
            curves.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok::<_, TreeError>(curves)
    })?;
    let best = curves
        .iter()
        .flat_map(|&(settings, ref curve)| {
            curve
                .iter()
                .enumerate()
                .map(move |(round, &loss)| (Settings { rounds: round + 1, ..settings }, loss))
        })
        .filter(|(_, loss)| loss.is_finite())
        .min_by(|a, b| a.1.total_cmp(&b.1));
    Ok(best)
}

/// Held-out log loss after each round, averaged over folds and repeats; empty where no fold can be made.
fn loss_curve(
    settings: Settings,
    sample: &Sample,
    schema: &FeatureSchema,
    seed: u64,
) -> Result<Vec<f64>, TreeError> {
    // Few rows alone make noisy folds; corpus rows steady the fits, and make each of them dear.
    let repeats = if sample.labels.len() < FEW_ROWS { 3 } else { 1 };
    let mut total = vec![0.0; settings.rounds];
    for repeat in 0..repeats {
        let seed = seed.wrapping_add(repeat);
        let Some(folds) = folds(sample, seed) else {
            return Ok(Vec::new());
        };
        for held in &folds {
            let mut inside = vec![true; sample.labels.len()];
            for &row in held {
                inside[row] = false;
            }
            let fit: Vec<usize> = (0..inside.len()).filter(|&row| inside[row]).collect();
            let coded = Coded::fit(settings, sample, &fit, schema, seed);
            let held_table = coded.coder.apply(&sample.batch.take(held));
            let held_labels: Vec<f64> = held.iter().map(|&row| sample.labels[row]).collect();
            let held_out = Some((&held_table, &*held_labels));
            let booster = boost(&coded.fitted, sample, &fit, settings, seed, held_out)?;
            let history = booster
                .evaluation_history
                .ok_or_else(|| TreeError::Library { reason: "no evaluation history was kept".to_owned() })?;
            // A fold that stopped early lost more with every further round; what it had last is the least it would have.
            let last = history.data.last().copied().unwrap_or(f64::INFINITY);
            let losses = history.data.iter().copied().chain(std::iter::repeat(last));
            for (sum, loss) in total.iter_mut().zip(losses) {
                *sum += loss * held.len() as f64;
            }
        }
    }
    let rows = (sample.own as u64 * repeats) as f64;
    Ok(total.into_iter().map(|sum| sum / rows).collect())
}

/// Own rows dealt into folds class by class; corpus rows are in no fold. `None` with too few of a class.
fn folds(sample: &Sample, seed: u64) -> Option<Vec<Vec<usize>>> {
    let mut classes = [Vec::new(), Vec::new()];
    for (row, &label) in sample.labels.iter().take(sample.own).enumerate() {
        classes[usize::from(label > 0.5)].push(row);
    }
    let count = classes.iter().map(Vec::len).min().unwrap_or(0).min(FOLDS);
    if count < 2 {
        return None;
    }
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let mut folds = vec![Vec::new(); count];
    for class in &mut classes {
        class.shuffle(&mut rng);
    }
    for (turn, &row) in classes.iter().flatten().enumerate() {
        folds[turn % count].push(row);
    }
    Some(folds)
}

/// Fits trees; with `held`, keeps the held-out loss after each, and stops when it hasn't fallen for [`PATIENCE`] rounds,
/// unless rows are few.
///
/// # Errors
/// [`TreeError::Library`] if the tree library refuses the rows.
pub(super) fn boost(
    fitted: &Table,
    sample: &Sample,
    fit: &[usize],
    settings: Settings,
    seed: u64,
    held: Option<(&Table, &[f64])>,
) -> Result<GradientBooster, TreeError> {
    let labels: Vec<f64> = fit.iter().map(|&row| sample.labels[row]).collect();
    let of_row = sample.weights(settings.corpus_share);
    let weights: Vec<f64> = fit.iter().map(|&row| of_row[row]).collect();
    // The library rounds down; a tree must see a column.
    let one_column = 1.001 / fitted.columns().max(1) as f64;
    // Of few rows a fold holds out a handful, whose loss goes up and down by chance.
    let patience = held.filter(|_| sample.labels.len() >= FEW_ROWS).map(|_| PATIENCE);
    let mut booster = GradientBooster::default()
        .set_objective_type(ObjectiveType::LogLoss)
        .set_iterations(settings.rounds)
        .set_learning_rate(LEARNING_RATE)
        .set_max_depth(settings.depth)
        .set_max_leaves(settings.leaves)
        .set_min_leaf_weight(MIN_LEAF_WEIGHT)
        .set_sample_method(SampleMethod::Random)
        .set_subsample(SUBSAMPLE)
        .set_nbins(BINS)
        .set_colsample_bytree(settings.column_share.max(one_column).min(1.0))
        .set_initialize_base_score(true)
        .set_early_stopping_rounds(patience)
        .set_parallel(false)
        .set_seed(seed);
    booster.grow_policy = GrowPolicy::LossGuide;
    let held_weights = held.map(|(_, y)| vec![1.0; y.len()]);
    let evaluation = match (held, &held_weights) {
        (Some((rows, y)), Some(w)) => Some(vec![(rows.view(), y, w.as_slice())]),
        _ => None,
    };
    booster
        .fit(&fitted.view(), &labels, &weights, evaluation)
        .map_err(|error| TreeError::Library { reason: error.to_string() })?;
    Ok(booster)
}

/// For few rows.
const SMALL: Settings = Settings {
    coding: Coding::OneHot,
    depth: 2,
    leaves: 4,
    column_share: 0.3,
    rounds: MAX_ROUNDS,
    corpus_share: 3.0,
};
/// For thousands of rows.
const LARGE: Settings = Settings { depth: 4, leaves: 7, column_share: 0.5, ..SMALL };
/// What cross-validation chooses from, candidates of one coding side by side.
const CANDIDATES: [Settings; 4] = [
    SMALL,
    LARGE,
    Settings { coding: Coding::TargetStatistic, ..SMALL },
    Settings { coding: Coding::TargetStatistic, ..LARGE },
];
/// How many of [`CANDIDATES`], from the front, code one-hot.
const ONE_HOT_CANDIDATES: usize = 2;
/// Shares of corpus rows that are tried beside [`SMALL`]'s.
const CORPUS_SHARES: [f64; 2] = [1.0, 0.3];
/// Folds of cross-validation.
const FOLDS: usize = 5;
/// Below this many rows only one-hot coding is tried, and cross-validation is repeated.
const FEW_ROWS: usize = 500;
/// Corpus rows that settings are tried with, at least.
const TRIED_CORPUS_ROWS: usize = 1_500;
/// Rounds without a smaller held-out loss after which a fold isn't fitted further.
const PATIENCE: usize = 30;
/// Rounds at most.
const MAX_ROUNDS: usize = 200;
/// Step of each round.
const LEARNING_RATE: f32 = 0.08;
/// Least sum of `weight · p (1 - p)` in a leaf.
const MIN_LEAF_WEIGHT: f32 = 0.3;
/// Quantile bins of a numeric column: a quarter of the library's own number, since fits take less time and were no worse.
const BINS: u16 = 64;
/// Share of rows each tree sees.
const SUBSAMPLE: f32 = 0.8;
