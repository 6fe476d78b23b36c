//! Episodes from real public tables that ship with the crate: another column as target each time.
//!
//! The tables are few and small (`data/real`, sources and licences in `data/real/PROVENANCE.md`), so a base can't learn
//! much of them by heart; what they teach is what real columns look like together. An episode takes a random column
//! as target, random other columns, random rows, and codes them as serving codes columns ([`super::encode`]). The
//! target is a category's levels, joined to as many classes as asked for, or a number cut as the prior cuts scores.

use std::sync::LazyLock;

use rand::{
    Rng,
    seq::{SliceRandom, index},
};
use rand_chacha::ChaCha20Rng;
use serde::Deserialize;

use super::{
    PriorConfig,
    encode::{Coder, Source},
    label, learnable, log_uniform_count,
    observe::{Cells, Raw},
    random::normalise,
};
use crate::model::Tables;

/// A table of the shipped set.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RealTable {
    name: String,
    columns: Vec<Column>,
}

/// A column by rows; `None` is a missing cell.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Column {
    Numeric { name: String, values: Vec<Option<f32>> },
    Category { name: String, levels: Vec<String>, codes: Vec<Option<u16>> },
}

impl Column {
    fn rows(&self) -> usize {
        match self {
            Self::Numeric { values, .. } => values.len(),
            Self::Category { codes, .. } => codes.len(),
        }
    }

    fn complete(&self) -> bool {
        match self {
            Self::Numeric { values, .. } => values.iter().all(Option::is_some),
            Self::Category { codes, .. } => codes.iter().all(Option::is_some),
        }
    }

    /// Chosen rows as a raw column; numbers may come with the other sign or as a logarithm, as if declared so.
    fn raw(&self, rows: &[usize], rng: &mut ChaCha20Rng) -> Raw {
        let (cells, missing): (Cells, Vec<bool>) = match self {
            Self::Numeric { values, .. } => {
                let sign = if rng.random_bool(0.5) { 1.0 } else { -1.0 };
                let positive = values.iter().flatten().all(|v| *v >= 0.0);
                let logged = positive && rng.random_bool(0.3);
                let shown = |v: f32| sign * if logged { v.ln_1p() } else { v };
                let cells = rows.iter().map(|i| values[*i].map_or(0.0, shown)).collect();
                (Cells::Numeric(cells), rows.iter().map(|i| values[*i].is_none()).collect())
            }
            Self::Category { levels, codes, .. } => {
                let cells = rows.iter().map(|i| codes[*i].unwrap_or(0)).collect();
                (Cells::Category(cells, levels.len()), rows.iter().map(|i| codes[*i].is_none()).collect())
            }
        };
        Raw { cells, missing: missing.contains(&true).then_some(missing) }
    }

    /// Labels of chosen rows of a complete column, each class present among the first `context` of them.
    fn labels(&self, rows: &[usize], context: usize, classes: usize, rng: &mut ChaCha20Rng) -> Vec<u8> {
        let labels = match self {
            Self::Numeric { values, .. } => {
                let mut score: Vec<f32> = rows.iter().map(|i| values[*i].unwrap_or(0.0)).collect();
                normalise(&mut score);
                if classes <= 2 {
                    label::binary(&score, context, rng)
                } else {
                    label::ordered(&score, classes, rng)
                }
            }
            Self::Category { levels, codes, .. } => {
                // Levels in random order, dealt to the classes in turn: one against the rest, halves, or as they are.
                let mut order: Vec<usize> = (0..levels.len()).collect();
                order.shuffle(rng);
                let alone = classes == 2 && rng.random_bool(0.6);
                let class = |level: usize| if alone { usize::from(level == 0) } else { level % classes };
                let flip = classes == 2 && rng.random_bool(0.5);
                rows.iter()
                    .map(|i| {
                        let level = order.get(usize::from(codes[*i].unwrap_or(0))).map_or(0, |l| *l);
                        // Unwrap safety: a class is below MAX_CLASSES.
                        u8::try_from(class(level)).expect("few classes") ^ u8::from(flip)
                    })
                    .collect()
            }
        };
        label::present_in(labels, 0..context, classes)
    }
}

/// Draws `tables` tables of equal sizes from one real table; `None` if it is too small or [`DRAWS`] draws are degenerate.
pub(super) fn draw(
    config: &PriorConfig,
    tables: usize,
    classes: usize,
    rng: &mut ChaCha20Rng,
) -> Option<Tables> {
    let real = &TABLES[rng.random_range(0..TABLES.len())];
    let total = real.columns.first().map_or(0, Column::rows);
    let queries = config.queries.min(total / 4);
    if total - queries < config.min_context {
        return None;
    }
    let context = log_uniform_count(rng, config.min_context, config.large_context.min(total - queries));
    let columns = rng.random_range(2..real.columns.len()).clamp(config.min_columns, config.max_columns);
    let mut all = Tables {
        tables,
        rows: context + queries,
        columns,
        context,
        values: Vec::new(),
        labels: Vec::new(),
        texts: None,
    };
    for _ in 0..DRAWS * tables {
        if let Some((values, labels)) = episode(real, &all, total, classes, rng) {
            all.values.extend(values);
            all.labels.extend(labels);
        }
        if all.labels.len() == tables * all.rows {
            return Some(all);
        }
    }
    None
}

/// Values `(rows, columns)` and labels of one episode, or nothing if the draw came out degenerate.
fn episode(
    real: &RealTable,
    sizes: &Tables,
    total: usize,
    classes: usize,
    rng: &mut ChaCha20Rng,
) -> Option<(Vec<f32>, Vec<u8>)> {
    let (source, release) = Source::draw(rng);
    let spare = total - sizes.rows;
    // A release of a few rows tells nothing.
    let (source, release) =
        if spare < LEAST_RELEASE { (Source::Context, 0) } else { (source, release.min(spare)) };
    let rows = index::sample(rng, total, sizes.rows + release).into_vec();
    let complete: Vec<usize> = (0..real.columns.len()).filter(|c| real.columns[*c].complete()).collect();
    let target = complete[rng.random_range(0..complete.len())];
    let labels = real.columns[target].labels(&rows, sizes.context, classes, rng);
    if !learnable(&labels[..sizes.context]) {
        return None;
    }
    let coder = Coder { labels: &labels, classes, context: sizes.context, rows: sizes.rows, source };
    let mut others: Vec<usize> = (0..real.columns.len()).filter(|c| *c != target).collect();
    others.shuffle(rng);
    let mut shown: Vec<Vec<f32>> = Vec::with_capacity(sizes.columns + 1);
    for column in others {
        if shown.len() < sizes.columns {
            shown.extend(coder.columns(&real.columns[column].raw(&rows, rng), rng));
        }
    }
    shown.truncate(sizes.columns);
    shown.shuffle(rng);
    let mut values = vec![0f32; sizes.rows * sizes.columns];
    for (j, column) in shown.iter().enumerate() {
        for (row, v) in values.chunks_exact_mut(sizes.columns).zip(column) {
            row[j] = *v;
        }
    }
    (shown.len() == sizes.columns).then(|| (values, labels[..sizes.rows].to_vec()))
}

/// The shipped tables.
static TABLES: LazyLock<Vec<RealTable>> = LazyLock::new(|| {
    // Unwrap safety: the files are part of the build and a test reads them all.
    FILES.iter().map(|text| serde_json::from_str(text).expect("shipped tables are valid")).collect()
});

/// The shipped files; their order is part of what a seed means.
const FILES: [&str; 8] = [
    include_str!("../../data/real/anes96.json"),
    include_str!("../../data/real/digits.json"),
    include_str!("../../data/real/grunfeld.json"),
    include_str!("../../data/real/iris.json"),
    include_str!("../../data/real/macrodata.json"),
    include_str!("../../data/real/modechoice.json"),
    include_str!("../../data/real/penguins.json"),
    include_str!("../../data/real/wine.json"),
];
/// Draws of an episode before the slice is given up, times tables.
const DRAWS: usize = 20;
/// Fewest rows that a release is made of.
const LEAST_RELEASE: usize = 100;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{Column, FILES, TABLES, draw};
    use crate::prior::{PriorConfig, generator, tests::nearest_vote};

    /// Names, sizes and the total against PROVENANCE.md, which is what a reader goes by.
    #[test]
    fn shipped_tables_are_those_of_the_provenance_file() {
        let provenance = include_str!("../../data/real/PROVENANCE.md");
        assert!(FILES.iter().map(|f| f.len()).sum::<usize>() < 300_000);
        for table in TABLES.iter() {
            let rows = table.columns[0].rows();
            let line = format!("| {} | {rows} | {} |", table.name, table.columns.len());
            assert!(provenance.contains(&line), "no line {line:?}");
            let mut names: Vec<&String> = Vec::new();
            for column in &table.columns {
                assert_eq!(column.rows(), rows, "{}", table.name);
                let (Column::Numeric { name, .. } | Column::Category { name, .. }) = column;
                names.push(name);
                if let Column::Category { levels, codes, .. } = column {
                    assert!(codes.iter().flatten().all(|c| usize::from(*c) < levels.len()));
                }
            }
            let count = names.len();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), count);
            // Enough rows for the smallest context and its queries, and three targets without gaps.
            assert!(rows >= 140 && table.columns.iter().filter(|c| c.complete()).count() >= 3);
        }
    }

    /// 200 slices: equal seeds give equal tables, sizes and classes are those asked for, every shape reaches its ends.
    #[test]
    fn episodes_keep_their_sizes_and_repeat() {
        let config = PriorConfig::for_classes(10);
        let (mut widths, mut contexts, mut most) = (Vec::new(), Vec::new(), 0);
        for index in 0..200 {
            let classes = if index % 2 == 0 { 2 } else { 7 };
            let drawn = |seed| draw(&config, 2, classes, &mut generator(seed, index));
            let Some(t) = drawn(71) else { continue };
            assert_eq!(Some(&t), drawn(71).as_ref());
            assert_eq!(t.values.len(), 2 * t.rows * t.columns);
            assert!(t.values.iter().all(|v| v.is_finite() && v.abs() <= crate::table::CLIP));
            assert!(t.labels.iter().all(|l| usize::from(*l) < classes));
            most = most.max(usize::from(*t.labels.iter().max().unwrap()) + 1);
            widths.push(t.columns);
            contexts.push(t.context);
        }
        assert!(widths.len() > 190, "{} of 200 slices", widths.len());
        assert!(widths.contains(&2) && widths.iter().any(|w| *w >= 12));
        assert!(contexts.iter().any(|c| *c < 40) && contexts.iter().any(|c| *c > 500));
        assert_eq!(most, 7);
    }

    /// A nearest-neighbour vote beats chance clearly: the columns of an episode carry its target.
    #[test]
    fn columns_carry_the_target() {
        let config = PriorConfig { max_context: 200, large_context: 200, ..PriorConfig::default() };
        let (mut sum, mut count) = (0.0, 0);
        for index in 0..60 {
            let Some(t) = draw(&config, 1, 2, &mut generator(72, index)) else { continue };
            if let Some(auc) = nearest_vote(&t) {
                sum += auc;
                count += 1;
            }
        }
        let mean = sum / f64::from(count);
        assert!(count > 40 && mean > 0.65, "mean AUC {mean} of {count} tables");
    }
}
