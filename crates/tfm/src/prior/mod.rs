//! Synthetic prior: random structural models whose tables teach the base to predict in context.
//!
//! A table starts from a random structural model ([`structure`]); some of its nodes become labels ([`label`]), others
//! raw columns with the quirks and gaps of real tables ([`observe`], [`missing`]), and those become model columns the
//! way serving codes them ([`encode`]). Most tables have two classes, the rest up to ten. A share of slices comes from
//! real public tables instead ([`real`]). Tables depend on (seed, index) alone, so training can resume anywhere.

mod encode;
mod label;
mod missing;
mod observe;
mod random;
mod real;
mod structure;

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;
use serde::{Deserialize, Serialize};

use self::{
    encode::{Coder, Source},
    observe::Habits,
    random::{log_uniform_count, normals},
    structure::Node,
};
use crate::{error::TfmError, model::Tables};

/// Ranges of the tables that the prior draws.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PriorConfig {
    /// Fewest columns of a table.
    pub min_columns: usize,
    /// Most columns of a table (numbers of columns are log-uniform; large contexts have fewer).
    pub max_columns: usize,
    /// Fewest context rows.
    pub min_context: usize,
    /// Most context rows of an ordinary table (context sizes are log-uniform).
    pub max_context: usize,
    /// Context rows of the largest tables, which are rare.
    pub large_context: usize,
    /// Share of slices with up to `large_context` context rows.
    pub large_share: f64,
    /// Query rows of a table.
    pub queries: usize,
    /// Most classes of a table, 2 to 10.
    #[serde(default = "two_classes")]
    pub max_classes: usize,
    /// Share of slices whose tables have two classes; the others have 3 to `max_classes`.
    #[serde(default = "always")]
    pub binary_share: f64,
    /// Share of slices drawn from the real tables that ship with the crate.
    #[serde(default)]
    pub real_share: f64,
}

/// Number of classes in configurations from before there were more.
fn two_classes() -> usize {
    2
}

/// Share of two-class tables in configurations from before there were others.
fn always() -> f64 {
    1.0
}

impl Default for PriorConfig {
    fn default() -> Self {
        Self {
            min_columns: 2,
            max_columns: 32,
            min_context: 32,
            max_context: 256,
            large_context: 1024,
            large_share: 0.25,
            queries: 64,
            max_classes: 2,
            binary_share: 0.8,
            real_share: 0.0,
        }
    }
}

impl PriorConfig {
    /// The default ranges with as many classes as a model of `max_classes` can tell apart, at most ten.
    #[must_use]
    pub fn for_classes(max_classes: usize) -> Self {
        Self { max_classes: max_classes.clamp(2, MAX_CLASSES), ..Self::default() }
    }

    /// Checks that ranges are ordered and within limits.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] naming the field.
    pub fn check(&self) -> Result<(), TfmError> {
        let bad = |field, expected, got: usize| TfmError::BadConfig { field, expected, got: got.to_string() };
        if self.min_columns < 1 || self.min_columns > self.max_columns || self.max_columns > MAX_COLUMNS {
            return Err(bad("max_columns", "from min_columns (at least 1) to 128", self.max_columns));
        }
        if self.min_context < 8 || self.min_context > self.max_context || self.max_context > MAX_CONTEXT {
            return Err(bad("max_context", "from min_context (at least 8) to 4096", self.max_context));
        }
        if self.large_context < self.min_context || self.large_context > MAX_CONTEXT {
            return Err(bad("large_context", "from min_context to 4096", self.large_context));
        }
        if self.queries < 1 || self.queries > MAX_CONTEXT {
            return Err(bad("queries", "from 1 to 4096", self.queries));
        }
        if self.max_classes < 2 || self.max_classes > MAX_CLASSES {
            return Err(bad("max_classes", "from 2 to 10", self.max_classes));
        }
        for (field, got) in [
            ("large_share", self.large_share),
            ("binary_share", self.binary_share),
            ("real_share", self.real_share),
        ] {
            if !(0.0..=1.0).contains(&got) {
                return Err(TfmError::BadConfig { field, expected: "within [0, 1]", got: got.to_string() });
            }
        }
        Ok(())
    }
}

/// The generator of slice `index` under `seed`.
pub(crate) fn generator(seed: u64, index: u64) -> ChaCha20Rng {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    rng.set_stream(index);
    rng
}

/// Standard normal values, for tests elsewhere in the crate.
#[cfg(test)]
pub(crate) fn random_normals(count: usize, rng: &mut ChaCha20Rng) -> Vec<f32> {
    normals(count, rng)
}

/// Draws `tables` tables that share their sizes and the largest number of classes. Equal generators give equal
/// tables.
pub fn draw(config: &PriorConfig, tables: usize, rng: &mut ChaCha20Rng) -> Tables {
    // Without real tables nothing is drawn for them, so that runs from before they existed repeat.
    if config.real_share > 0.0
        && rng.random_bool(config.real_share)
        && let Some(real) = real::draw(config, tables, classes(config, rng), rng)
    {
        return real;
    }
    let most = if rng.random_bool(config.large_share) { config.large_context } else { config.max_context };
    let context = log_uniform_count(rng, config.min_context, most);
    let rows = context + config.queries;
    let widest = config.max_columns.min(LARGE_TABLE_CELLS / rows).max(config.min_columns);
    let columns = log_uniform_count(rng, config.min_columns, widest);
    let classes = classes(config, rng);
    let mut all = Tables {
        tables,
        rows,
        columns,
        context,
        values: Vec::with_capacity(tables * rows * columns),
        labels: Vec::with_capacity(tables * rows),
        texts: None,
    };
    while all.labels.len() < tables * rows {
        let Some((values, labels)) = table(columns, context, rows, classes, rng) else { continue };
        all.values.extend(values);
        all.labels.extend(labels);
    }
    all
}

/// Most classes that the tables of a slice have.
fn classes(config: &PriorConfig, rng: &mut ChaCha20Rng) -> usize {
    if config.max_classes == 2 || rng.random_bool(config.binary_share) {
        2
    } else {
        rng.random_range(3..=config.max_classes)
    }
}

/// One table `(rows, columns)` with labels, or nothing if the draw came out degenerate.
fn table(
    columns: usize,
    context: usize,
    rows: usize,
    classes: usize,
    rng: &mut ChaCha20Rng,
) -> Option<(Vec<f32>, Vec<u8>)> {
    let (source, release) = Source::draw(rng);
    let total = rows + release;
    let structure = structure::draw(columns, total, rng);
    let labels = label::draw(&structure.nodes[..columns], &structure.last, classes, 0..context, rng);
    if !learnable(&labels[..context]) {
        return None;
    }
    let coder = Coder { labels: &labels, classes, context, rows, source };
    let habits = Habits::draw(rng);
    let mut shown: Vec<Vec<f32>> = Vec::with_capacity(columns + 1);
    let mut nodes = structure.nodes.into_iter();
    while shown.len() < columns {
        let node = nodes.next().unwrap_or_else(|| Node { values: normals(total, rng), levels: None });
        let raw = observe::observe(&node, &labels, &habits, rng);
        shown.extend(coder.columns(&raw, rng));
    }
    // The last column of all may have been a pair.
    shown.truncate(columns);
    shown.shuffle(rng);
    let mut values = vec![0f32; rows * columns];
    for (j, column) in shown.iter().enumerate() {
        for (row, v) in values.chunks_exact_mut(columns).zip(column) {
            row[j] = *v;
        }
    }
    values.iter().all(|v| v.is_finite()).then(|| (values, labels[..rows].to_vec()))
}

/// Whether at least two classes have two rows each.
fn learnable(labels: &[u8]) -> bool {
    let mut counts = [0usize; MAX_CLASSES];
    for label in labels {
        counts[usize::from(*label)] += 1;
    }
    counts.iter().filter(|count| **count >= 2).count() >= 2
}

/// Most columns the prior draws.
pub const MAX_COLUMNS: usize = 128;
/// Most context rows the prior draws.
pub const MAX_CONTEXT: usize = 4096;
/// Most classes the prior draws.
pub const MAX_CLASSES: usize = 10;
/// Cells from which on a table's number of columns is cut.
const LARGE_TABLE_CELLS: usize = 14_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::Tables;
    use super::{MAX_CLASSES, MAX_COLUMNS, PriorConfig, draw, generator};

    #[test]
    fn equal_seeds_give_equal_finite_tables_with_both_classes() {
        let config = PriorConfig::default();
        let mut minority = Vec::new();
        for index in 0..60 {
            let a = draw(&config, 2, &mut generator(5, index));
            assert_eq!(a, draw(&config, 2, &mut generator(5, index)));
            assert!(a.values.iter().all(|v| v.is_finite() && v.abs() <= crate::table::CLIP));
            for labels in a.labels.chunks_exact(a.rows) {
                let ones = labels[..a.context].iter().filter(|&&l| l == 1).count();
                assert!(ones >= 2 && a.context - ones >= 2);
                minority.push(ones.min(a.context - ones) as f64 / a.context as f64);
            }
        }
        assert_ne!(draw(&config, 1, &mut generator(5, 0)), draw(&config, 1, &mut generator(6, 0)));
        // Rare classes are part of the prior: over 120 tables some are below 4 % and some above 40 %.
        assert!(minority.iter().any(|&m| m < 0.04) && minority.iter().any(|&m| m > 0.4));
    }

    /// Sizes and numbers of classes reach both ends of their ranges, and the share of two-class slices is kept
    /// (400 slices; its deviation is .02).
    #[test]
    fn sizes_and_classes_reach_their_ranges() {
        let config = PriorConfig { large_context: 400, queries: 8, ..PriorConfig::for_classes(10) };
        let (mut columns, mut contexts, mut classes) = (Vec::new(), Vec::new(), [0usize; MAX_CLASSES + 1]);
        for index in 0..400 {
            let t = draw(&config, 1, &mut generator(8, index));
            columns.push(t.columns);
            contexts.push(t.context);
            let used = usize::from(*t.labels[..t.context].iter().max().unwrap()) + 1;
            assert!(t.labels.iter().all(|l| usize::from(*l) < used));
            classes[used] += 1;
        }
        assert!(columns.contains(&2) && columns.iter().any(|c| *c > 29) && columns.iter().all(|c| *c <= 32));
        assert!(contexts.iter().any(|c| *c < 36) && contexts.iter().any(|c| *c > 350));
        assert!((285..355).contains(&classes[2]), "{classes:?}");
        assert!(classes[3..].iter().all(|c| *c > 0), "{classes:?}");
    }

    /// Cells that serving fills with the mean are exactly nought: some columns are mostly such cells, most have none.
    #[test]
    fn missing_cells_reach_more_than_half_of_a_column() {
        let (mut full, mut gaps, mut mostly) = (0, 0, 0);
        for index in 0..80 {
            let t = draw(&PriorConfig::default(), 1, &mut generator(9, index));
            for j in 0..t.columns {
                let column = t.values.iter().skip(j).step_by(t.columns);
                let noughts = column.filter(|v| v.abs() < 1e-12).count() as f64 / t.rows as f64;
                full += usize::from(noughts < 1e-9);
                gaps += usize::from((0.02..0.5).contains(&noughts));
                mostly += usize::from((0.5..0.95).contains(&noughts));
            }
        }
        assert!(full > 300 && gaps > 30 && mostly > 5, "{full} {gaps} {mostly}");
    }

    /// AUC of a vote of the nine nearest context rows on the queries of one table.
    pub(super) fn nearest_vote(t: &Tables) -> Option<f64> {
        let row = |i: usize| &t.values[i * t.columns..(i + 1) * t.columns];
        let votes: Vec<f64> = (t.context..t.rows)
            .map(|q| {
                let mut near: Vec<(f32, u8)> = (0..t.context)
                    .map(|c| {
                        let gap = row(q).iter().zip(row(c)).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
                        (gap, t.labels[c])
                    })
                    .collect();
                near.sort_by(|a, b| a.0.total_cmp(&b.0));
                near.iter().take(9).map(|n| f64::from(n.1)).sum()
            })
            .collect();
        crate::metrics::roc_auc(&votes, &t.labels[t.context..])
    }

    /// A nearest-neighbour vote predicts better than chance, so columns carry the label.
    #[test]
    fn columns_carry_the_label() {
        let (mut scores, mut tables) = (0.0, 0);
        for index in 0..60 {
            let t = draw(
                &PriorConfig { max_context: 200, ..PriorConfig::default() },
                1,
                &mut generator(7, index),
            );
            if let Some(auc) = nearest_vote(&t) {
                scores += auc;
                tables += 1;
            }
        }
        let mean = scores / f64::from(tables);
        assert!((0.58..0.9).contains(&mean), "mean AUC {mean}");
    }

    #[test]
    fn limits_hold_at_one_above() {
        let config = PriorConfig { max_columns: MAX_COLUMNS, ..PriorConfig::default() };
        assert!(config.check().is_ok());
        let config = PriorConfig { max_columns: MAX_COLUMNS + 1, ..PriorConfig::default() };
        assert!(config.check().is_err());
        assert!(PriorConfig { large_share: f64::NAN, ..PriorConfig::default() }.check().is_err());
        assert!(PriorConfig { real_share: 1.01, ..PriorConfig::default() }.check().is_err());
        assert!(PriorConfig::for_classes(MAX_CLASSES).check().is_ok());
        let config = PriorConfig { max_classes: MAX_CLASSES + 1, ..PriorConfig::default() };
        assert!(config.check().is_err());
        assert_eq!(PriorConfig::for_classes(64).max_classes, MAX_CLASSES);
    }
}
