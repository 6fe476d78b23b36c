//! Raw columns as model columns, coded as serving codes them.
//!
//! Serving standardises numbers and codes categories by counts that come from the context rows themselves, from a
//! release without them, or from a release that they took part in, with noise ([`crate::table`]). Tables of the prior
//! have all three. With more than two classes a category keeps its one log-odds column: that of the class whose
//! log-odds vary most over the levels, against the rest. Every party can find that class from the released counts,
//! it doesn't depend on the order of the classes (but for ties), and the number of columns doesn't grow with them.

use rand::Rng;
use rand_chacha::ChaCha20Rng;

use super::{
    observe::{Cells, Raw},
    random::{log_uniform, normals},
};
use crate::table::{CLIP, FREQUENCY_ABOVE_LEVELS, LevelCodes};

/// Which rows the statistics of a table come from. Rows are the context, the queries, then those of the release.
#[derive(Debug, Clone, Copy)]
pub(super) struct Coder<'a> {
    pub(super) labels: &'a [u8],
    pub(super) classes: usize,
    /// Context rows.
    pub(super) context: usize,
    /// Context and query rows.
    pub(super) rows: usize,
    pub(super) source: Source,
}

/// Where statistics come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Source {
    /// The context rows, as in a domain without a release.
    Context,
    /// Other rows, with this deviation of the noise in each count.
    Release {
        /// Deviation of the noise.
        noise: f32,
        /// Whether the context rows took part.
        shared: bool,
    },
}

impl Source {
    /// A source and the number of rows that a table needs beyond its own.
    pub(super) fn draw(rng: &mut ChaCha20Rng) -> (Self, usize) {
        if rng.random_bool(0.5) {
            return (Self::Context, 0);
        }
        let noise = if rng.random_bool(0.5) { log_uniform(rng, 0.5, 15.0) } else { 0.0 };
        let rows = log_uniform(rng, 150.0, MAX_RELEASE_ROWS) as usize;
        (Self::Release { noise, shared: rng.random_bool(0.5) }, rows)
    }

    /// Whether the context rows are part of the counts.
    fn has_context(self) -> bool {
        !matches!(self, Self::Release { shared: false, .. })
    }
}

impl Coder<'_> {
    /// One or two model columns over context and query rows.
    pub(super) fn columns(&self, raw: &Raw, rng: &mut ChaCha20Rng) -> Vec<Vec<f32>> {
        let missing = raw.missing.as_deref();
        match &raw.cells {
            Cells::Numeric(values) => vec![self.numeric(values, missing, rng)],
            Cells::Category(codes, levels) => self.category(codes, *levels, missing, rng),
        }
    }

    /// Rows that statistics are computed from.
    fn counted(&self) -> impl Iterator<Item = usize> + Clone {
        let own = if self.source.has_context() { self.context } else { 0 };
        (0..own).chain(self.rows..self.labels.len())
    }

    fn noise(&self) -> f32 {
        match self.source {
            Source::Context => 0.0,
            Source::Release { noise, .. } => noise,
        }
    }

    fn numeric(&self, values: &[f32], missing: Option<&[bool]>, rng: &mut ChaCha20Rng) -> Vec<f32> {
        let hidden = |i: usize| missing.is_some_and(|m| m[i]);
        let known = || self.counted().filter(|i| !hidden(*i)).map(|i| f64::from(values[i]));
        let n = known().count().max(1) as f64;
        let mut mean = known().sum::<f64>() / n;
        let mut deviation = (known().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
        if self.noise() > 0.0 {
            // Moments of a noisy histogram are off by a few hundredths of a deviation.
            let off = normals(2, rng);
            mean += 0.03 * deviation * f64::from(off[0]);
            deviation *= f64::from(0.05 * off[1]).exp();
        }
        let inverse = 1.0 / (deviation + 1e-6);
        let clip = f64::from(CLIP);
        (0..self.rows)
            .map(|i| {
                let v = if hidden(i) { 0.0 } else { (f64::from(values[i]) - mean) * inverse };
                v.clamp(-clip, clip) as f32
            })
            .collect()
    }

    fn category(
        &self,
        codes: &[u16],
        levels: usize,
        missing: Option<&[bool]>,
        rng: &mut ChaCha20Rng,
    ) -> Vec<Vec<f32>> {
        // Serving counts the declared levels, "other" (never drawn here) and missing cells.
        let level = |i: usize| if missing.is_some_and(|m| m[i]) { levels + 1 } else { usize::from(codes[i]) };
        let mut counts = vec![vec![0f64; self.classes]; levels + 2];
        for i in self.counted() {
            counts[level(i)][usize::from(self.labels[i])] += 1.0;
        }
        if self.noise() > 0.0 {
            for cell in &mut counts {
                for (count, off) in cell.iter_mut().zip(normals(self.classes, rng)) {
                    *count += f64::from(self.noise() * off);
                }
            }
        }
        let class = telling_class(&counts, self.classes);
        let against = against_rest(&counts, class);
        let coded = LevelCodes::new(totals(&against), &against);
        let cells = || {
            (0..self.rows).map(|i| {
                let own = self.source.has_context() && i < self.context;
                (level(i), own.then(|| u8::from(usize::from(self.labels[i]) == class)))
            })
        };
        let mut columns = vec![cells().map(|(level, own)| coded.odds(level, own)).collect()];
        if levels > FREQUENCY_ABOVE_LEVELS {
            columns.push(cells().map(|(level, own)| coded.frequency(level, own)).collect());
        }
        columns
    }
}

/// The class whose log-odds against the rest vary most over the levels; class 1 of two.
fn telling_class(counts: &[Vec<f64>], classes: usize) -> usize {
    if classes <= 2 {
        return 1;
    }
    let spread = |class: usize| {
        let against = against_rest(counts, class);
        LevelCodes::new(totals(&against), &against).odds_deviation()
    };
    let mut best = (0, f64::NEG_INFINITY);
    for class in 0..classes {
        let spread = spread(class);
        if spread > best.1 {
            best = (class, spread);
        }
    }
    best.0
}

/// Counts `[rest, class]` of each level.
fn against_rest(counts: &[Vec<f64>], class: usize) -> Vec<[f64; 2]> {
    counts.iter().map(|cell| [cell.iter().sum::<f64>() - cell[class], cell[class]]).collect()
}

fn totals(counts: &[[f64; 2]]) -> [f64; 2] {
    counts.iter().fold([0.0; 2], |sum, c| [sum[0] + c[0], sum[1] + c[1]])
}

/// Most rows of a release.
const MAX_RELEASE_ROWS: f32 = 1500.0;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use tabmesh_contract::{
        batch::{TypedBatch, TypedColumn},
        schema::{Feature, FeatureId, FeatureKind, FeatureSchema, NumericDomain, Scale, Target},
    };

    use super::{Coder, Source, telling_class};
    use crate::{
        prior::{
            generator,
            observe::{Cells, Raw},
        },
        table::{Coding, Preprocessing},
    };

    /// Two classes: the prior's columns equal those of the serving path for the same rows.
    #[test]
    fn columns_equal_those_of_the_serving_path() {
        let (n, context, levels) = (60, 40, 12usize);
        let codes: Vec<u16> = (0..n).map(|i| u16::try_from((i * 7) % 11).unwrap()).collect();
        let values: Vec<f32> = (0..n).map(|i| ((i * 13) % 29) as f32).collect();
        let labels: Vec<u8> = (0..n).map(|i| u8::from((i * 5) % 7 < 3)).collect();
        let hidden: Vec<bool> = (0..n).map(|i| i % 9 == 4).collect();
        let coder = Coder { labels: &labels, classes: 2, context, rows: n, source: Source::Context };
        let mut rng = generator(61, 0);
        let missing = Some(hidden.clone());
        let category = Raw { cells: Cells::Category(codes.clone(), levels), missing: missing.clone() };
        let numeric = Raw { cells: Cells::Numeric(values.clone()), missing };
        let mut got = coder.columns(&category, &mut rng);
        got.extend(coder.columns(&numeric, &mut rng));

        let id = |text: &str| FeatureId::new(text).unwrap();
        let names = (0..levels).map(|i| format!("l{i}")).collect();
        let domain = NumericDomain { lower: 0.0, upper: 30.0, scale: Scale::Linear, cut_points: None };
        let feature = |name: &str, kind| Feature { id: id(name), kind, unit: None, description: None };
        let schema = FeatureSchema::new(
            vec![
                feature("a.level", FeatureKind::Categorical { levels: names }),
                feature("b.number", FeatureKind::Numeric(domain)),
            ],
            Target { id: id("label"), classes: vec!["no".into(), "yes".into()] },
        )
        .unwrap();
        let batch = |rows: std::ops::Range<usize>| TypedBatch {
            columns: vec![
                TypedColumn::Categorical(
                    rows.clone().map(|i| if hidden[i] { 13 } else { u32::from(codes[i]) }).collect(),
                ),
                TypedColumn::Numeric(
                    rows.clone().map(|i| if hidden[i] { f64::NAN } else { f64::from(values[i]) }).collect(),
                ),
            ],
            labels: rows.clone().map(|i| Some(u16::from(labels[i]))).collect(),
            units: vec![[0; 16]; rows.len()],
        };
        let fitted = Preprocessing::fit(&schema, &batch(0..context)).unwrap();
        let own = fitted.encode(&batch(0..context), Coding::OwnRow).unwrap();
        let foreign = fitted.encode(&batch(context..n), Coding::Foreign).unwrap();
        assert_eq!(own.columns, got.len());
        for (j, column) in got.iter().enumerate() {
            let expected = own.values.chunks_exact(3).chain(foreign.values.chunks_exact(3)).map(|row| row[j]);
            for (i, (a, b)) in column.iter().zip(expected).enumerate() {
                assert!((a - b).abs() < 1e-4, "column {j} row {i}: {a} {b}");
            }
        }
    }

    #[test]
    fn telling_class_is_the_one_that_levels_separate() {
        // Class 2 sits in the second level alone; the others are even.
        let counts = vec![vec![20.0, 22.0, 0.0], vec![21.0, 19.0, 30.0]];
        assert_eq!(telling_class(&counts, 3), 2);
        // Renumbered classes give the same class by its new number.
        let turned: Vec<Vec<f64>> = counts.iter().map(|c| vec![c[2], c[0], c[1]]).collect();
        assert_eq!(telling_class(&turned, 3), 0);
    }

    /// Queries and context of a release without them are coded the same way: a query's column can't tell its label.
    #[test]
    fn labels_of_queries_reach_no_column() {
        let codes: Vec<u16> = (0..300).map(|i| i % 5).collect();
        let labels: Vec<u8> = (0..300).map(|i| u8::from(i % 3 == 0)).collect();
        let mut other = labels.clone();
        other[40..60].iter_mut().for_each(|l| *l ^= 1);
        for source in [
            Source::Context,
            Source::Release { noise: 0.0, shared: false },
            Source::Release { noise: 0.0, shared: true },
        ] {
            let column = |labels: &[u8]| {
                let coder = Coder { labels, classes: 2, context: 40, rows: 60, source };
                let raw = Raw { cells: Cells::Category(codes.clone(), 5), missing: None };
                coder.columns(&raw, &mut generator(62, 0))
            };
            assert_eq!(column(&labels), column(&other));
        }
    }
}
