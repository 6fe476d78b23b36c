//! Rows in the contract's terms to numbers, by a published specification.
//!
//! A [`Preprocessing`] holds declarations and statistics of a differentially private release (or of public rows)
//! and never anything fitted on the rows it encodes, so an encoded row is a function of that row and the release.
//! Numbers are clamped to their declared range, scaled, standardised and clipped; categories become smoothed
//! label log-odds, many-level ones also a log-frequency. Binary targets only.
//!
//! A row that took part in the release is coded without itself ([`Coding::OwnRow`]): otherwise a rare level's code
//! would carry the row's own label. Levels of [`OWN_ROW_BELOW`] rows and more are coded as they stand: one row moves
//! them less than chance does, and taking it out would shift the two classes apart by an amount that is the same for all
//! rows of the level, which an in-context model reads as a perfect and inverted feature.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tabmesh_contract::{
    batch::{TypedBatch, TypedColumn},
    schema::{Feature, FeatureId, FeatureKind, FeatureSchema, Scale},
};

use crate::error::TfmError;

/// Whether the encoded rows took part in the statistics of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// They did: each row's own label is taken out of its level's counts if the level is rare.
    OwnRow,
    /// They did not: corpus rows, test rows, requests.
    Foreign,
}

/// Released statistics of one feature.
#[derive(Debug, Clone, PartialEq)]
pub enum Statistics {
    /// Mean and standard deviation of a numeric feature after its declared scale.
    Numeric {
        /// Mean.
        mean: f64,
        /// Standard deviation, above 0.
        deviation: f64,
    },
    /// Noisy counts `[class 0, class 1]` of the declared levels, then "other", then missing.
    Levels(Vec<[f64; 2]>),
}

impl Statistics {
    /// Mean and deviation of a numeric feature from a noisy histogram: `edges` on the original scale, one more than
    /// `counts`. Negative counts are read as 0; without any positive count all bins weigh the same.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if lengths don't fit or edges don't increase.
    pub fn from_histogram(edges: &[f64], counts: &[f64], scale: Scale) -> Result<Self, TfmError> {
        if counts.is_empty() || edges.len() != counts.len() + 1 {
            return Err(TfmError::mismatch("histogram edges", counts.len() + 1, edges.len()));
        }
        let edges: Vec<f64> = edges.iter().map(|e| scale.apply(*e)).collect();
        let pairs = || edges.iter().zip(edges.iter().skip(1));
        if !pairs().all(|(a, b)| a < b) || counts.iter().any(|c| !c.is_finite()) {
            return Err(TfmError::mismatch("histogram", "increasing edges, finite counts", "others"));
        }
        let total: f64 = counts.iter().map(|c| c.max(0.0)).sum();
        let weight = |c: f64| if total > 0.0 { c.max(0.0) / total } else { 1.0 / counts.len() as f64 };
        let bins = || pairs().zip(counts).map(|((a, b), c)| (0.5 * (a + b), b - a, weight(*c)));
        let mean: f64 = bins().map(|(middle, _, w)| w * middle).sum();
        // A uniform bin of width h has variance h^2 / 12 around its middle.
        let variance: f64 = bins().map(|(m, h, w)| w * ((m - mean).powi(2) + h * h / 12.0)).sum();
        Ok(Self::Numeric { mean, deviation: variance.sqrt().max(f64::MIN_POSITIVE) })
    }
}

/// How one feature is encoded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FeatureCoding {
    /// Clamp, scale, standardise.
    Numeric {
        /// Canonical id.
        id: FeatureId,
        /// Id, unit and description, for the feature token.
        text: String,
        /// Declared lower bound.
        lower: f64,
        /// Declared upper bound.
        upper: f64,
        /// Scale before standardising.
        scale: Scale,
        /// Mean on that scale.
        mean: f64,
        /// Standard deviation on that scale.
        deviation: f64,
    },
    /// Smoothed label log-odds by level.
    Categorical {
        /// Canonical id.
        id: FeatureId,
        /// Id, unit and description, for the feature token.
        text: String,
        /// Noisy counts `[class 0, class 1]` of the declared levels, then "other", then missing.
        counts: Vec<[f64; 2]>,
    },
}

/// The published specification from typed rows to model columns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Spec", into = "Spec")]
pub struct Preprocessing {
    class_counts: [f64; 2],
    features: Vec<FeatureCoding>,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    version: u32,
    /// Noisy number of rows of class 0 and 1.
    class_counts: [f64; 2],
    features: Vec<FeatureCoding>,
}

impl TryFrom<Spec> for Preprocessing {
    type Error = TfmError;

    fn try_from(spec: Spec) -> Result<Self, TfmError> {
        if spec.version != VERSION {
            return Err(TfmError::mismatch("version of the preprocessing", VERSION, spec.version));
        }
        Self::checked(spec.class_counts, spec.features)
    }
}

impl From<Preprocessing> for Spec {
    fn from(p: Preprocessing) -> Self {
        Self { version: VERSION, class_counts: p.class_counts, features: p.features }
    }
}

impl Preprocessing {
    /// A specification from a schema and released statistics by feature.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] unless the target has two classes; [`TfmError::Mismatch`] for statistics that are
    /// missing, of the wrong kind or length, or not finite.
    pub fn new(
        schema: &FeatureSchema,
        class_counts: [f64; 2],
        statistics: &BTreeMap<FeatureId, Statistics>,
    ) -> Result<Self, TfmError> {
        check_binary(schema)?;
        let mut features = Vec::with_capacity(schema.features().len());
        for feature in schema.features() {
            let given = statistics.get(&feature.id).ok_or_else(|| {
                TfmError::mismatch("released statistics", format!("an entry for {}", feature.id), "none")
            })?;
            features.push(coding(feature, given)?);
        }
        Self::checked(class_counts, features)
    }

    /// A specification fitted on rows: for public rows, or for baselines that never leave a domain.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn fit(schema: &FeatureSchema, rows: &TypedBatch) -> Result<Self, TfmError> {
        check_binary(schema)?;
        check_batch(schema.features().len(), rows)?;
        let mut class_counts = [0f64; 2];
        for label in rows.labels.iter().flatten() {
            if let Some(count) = class_counts.get_mut(usize::from(*label)) {
                *count += 1.0;
            }
        }
        let mut statistics = BTreeMap::new();
        for (feature, column) in schema.features().iter().zip(&rows.columns) {
            let found = match (&feature.kind, column) {
                (FeatureKind::Numeric(domain), TypedColumn::Numeric(values)) => {
                    let known: Vec<f64> = values
                        .iter()
                        .filter(|v| !v.is_nan())
                        .map(|v| domain.scale.apply(v.clamp(domain.lower, domain.upper)))
                        .collect();
                    // A constant column must not blow rounding errors up.
                    let range = domain.scale.apply(domain.upper) - domain.scale.apply(domain.lower);
                    let n = known.len().max(1) as f64;
                    let mean = known.iter().sum::<f64>() / n;
                    let variance = known.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
                    Statistics::Numeric { mean, deviation: variance.sqrt().max(1e-6 * range) }
                }
                (FeatureKind::Categorical { levels }, TypedColumn::Categorical(codes)) => {
                    let mut counts = vec![[0f64; 2]; levels.len() + 2];
                    for (code, label) in codes.iter().zip(&rows.labels) {
                        let cell = label
                            .map(usize::from)
                            .and_then(|label| counts.get_mut(usize::try_from(*code).ok()?)?.get_mut(label));
                        if let Some(cell) = cell {
                            *cell += 1.0;
                        }
                    }
                    Statistics::Levels(counts)
                }
                _ => return Err(TfmError::mismatch("kind of column", &feature.id, "the other kind")),
            };
            statistics.insert(feature.id.clone(), found);
        }
        Self::new(schema, class_counts, &statistics)
    }

    fn checked(class_counts: [f64; 2], features: Vec<FeatureCoding>) -> Result<Self, TfmError> {
        let finite = |values: &[f64]| values.iter().all(|v| v.is_finite() && v.abs() <= MAX_COUNT);
        if features.is_empty() || features.len() > MAX_FEATURES {
            return Err(TfmError::mismatch(
                "number of features",
                format!("1 to {MAX_FEATURES}"),
                features.len(),
            ));
        }
        if !finite(&class_counts) {
            return Err(TfmError::mismatch("class counts", "finite numbers", "others"));
        }
        for feature in &features {
            let fits = match feature {
                FeatureCoding::Numeric { lower, upper, scale, mean, deviation, .. } => {
                    finite(&[*lower, *upper, *mean, *deviation])
                        && lower < upper
                        && *deviation > 0.0
                        && (*scale == Scale::Linear || *lower >= 0.0)
                }
                FeatureCoding::Categorical { counts, .. } => {
                    (3..=MAX_LEVELS + 2).contains(&counts.len()) && counts.iter().all(|c| finite(c))
                }
            };
            if !fits {
                let expected = "finite statistics, lower < upper, deviation above 0, 1 to 1024 levels";
                return Err(TfmError::mismatch("feature coding", expected, feature.id()));
            }
        }
        for (a, b) in features.iter().zip(features.iter().skip(1)) {
            if a.id() >= b.id() {
                return Err(TfmError::mismatch("feature order", "sorted, distinct ids", b.id()));
            }
        }
        Ok(Self { class_counts, features })
    }

    /// How each feature is encoded, in canonical order.
    #[must_use]
    pub fn features(&self) -> &[FeatureCoding] {
        &self.features
    }

    /// Share of class 1 by the released counts, within `[0.001, 0.999]`.
    #[must_use]
    pub fn class_one_share(&self) -> f64 {
        let [zero, one] = self.class_counts.map(|c| c.max(0.0));
        ((one + 0.5) / (zero + one + 1.0)).clamp(0.001, 0.999)
    }

    /// Keys of the model columns: feature ids, and `id#frequency` after those with many levels.
    #[must_use]
    pub fn column_keys(&self) -> Vec<String> {
        self.features
            .iter()
            .flat_map(|f| {
                let id = f.id().to_string();
                let frequency = f.has_frequency().then(|| format!("{id}{FREQUENCY_SUFFIX}"));
                std::iter::once(id).chain(frequency)
            })
            .collect()
    }

    /// Texts of the model columns for feature tokens.
    #[must_use]
    pub fn column_texts(&self) -> Vec<String> {
        self.features
            .iter()
            .flat_map(|f| {
                let frequency = f.has_frequency().then(|| format!("{} frequency", f.text()));
                std::iter::once(f.text().to_owned()).chain(frequency)
            })
            .collect()
    }

    /// Encodes rows of the schema that this specification was made for.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if columns are missing, of the wrong kind or of unequal length.
    pub fn encode(&self, rows: &TypedBatch, coding: Coding) -> Result<EncodedTable, TfmError> {
        check_batch(self.features.len(), rows)?;
        let labels: Vec<Option<u8>> = rows
            .labels
            .iter()
            .map(|label| label.and_then(|l| u8::try_from(l).ok()).filter(|l| *l < 2))
            .collect();
        let mut columns: Vec<Vec<f32>> = Vec::new();
        for (feature, column) in self.features.iter().zip(&rows.columns) {
            match (feature, column) {
                (
                    FeatureCoding::Numeric { lower, upper, scale, mean, deviation, .. },
                    TypedColumn::Numeric(values),
                ) => columns.push(
                    values
                        .iter()
                        .map(|v| if v.is_nan() { *mean } else { scale.apply(v.clamp(*lower, *upper)) })
                        .map(|v| clip((v - mean) / deviation))
                        .collect(),
                ),
                (FeatureCoding::Categorical { counts, .. }, TypedColumn::Categorical(codes)) => {
                    let levels = LevelCodes::new(self.class_counts, counts);
                    let known: Vec<usize> = codes
                        .iter()
                        .map(|c| usize::try_from(*c).map_or(counts.len() - 2, |c| c.min(counts.len() - 1)))
                        .collect();
                    let own = |label: &Option<u8>| if coding == Coding::OwnRow { *label } else { None };
                    let cells = || known.iter().zip(labels.iter().map(own));
                    columns.push(cells().map(|(level, own)| levels.odds(*level, own)).collect());
                    if feature.has_frequency() {
                        columns.push(cells().map(|(level, own)| levels.frequency(*level, own)).collect());
                    }
                }
                _ => return Err(TfmError::mismatch("kind of column", feature.id(), "the other kind")),
            }
        }
        let (count, width) = (rows.rows(), columns.len());
        let mut values = vec![0f32; count * width];
        for (j, column) in columns.iter().enumerate() {
            for (row, v) in values.chunks_exact_mut(width).zip(column) {
                row[j] = *v;
            }
        }
        Ok(EncodedTable {
            rows: count,
            columns: width,
            values,
            labels,
            column_keys: self.column_keys(),
            column_texts: self.column_texts(),
        })
    }
}

impl FeatureCoding {
    /// The feature's canonical id.
    #[must_use]
    pub fn id(&self) -> &FeatureId {
        match self {
            Self::Numeric { id, .. } | Self::Categorical { id, .. } => id,
        }
    }

    fn text(&self) -> &str {
        match self {
            Self::Numeric { text, .. } | Self::Categorical { text, .. } => text,
        }
    }

    fn has_frequency(&self) -> bool {
        // Two of the cells stand for "other" and missing.
        matches!(self, Self::Categorical { counts, .. } if counts.len() > FREQUENCY_ABOVE_LEVELS + 2)
    }
}

/// Encoded rows, ready for the model.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedTable {
    /// Number of rows.
    pub rows: usize,
    /// Number of model columns.
    pub columns: usize,
    /// Values `(rows, columns)`, row by row, within `[-8, 8]`.
    pub values: Vec<f32>,
    /// Class of each row, where known.
    pub labels: Vec<Option<u8>>,
    /// Key of each column.
    pub column_keys: Vec<String>,
    /// Text of each column for feature tokens.
    pub column_texts: Vec<String>,
}

impl EncodedTable {
    /// Values of one row.
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..][..self.columns]
    }

    /// The rows at `indices`, in that order; indices out of range are skipped.
    #[must_use]
    pub fn take(&self, indices: &[usize]) -> Self {
        let inside = || indices.iter().copied().filter(|i| *i < self.rows);
        Self {
            rows: inside().count(),
            columns: self.columns,
            values: inside()
                .flat_map(|i| &self.values[i * self.columns..(i + 1) * self.columns])
                .copied()
                .collect(),
            labels: inside().map(|i| self.labels[i]).collect(),
            column_keys: self.column_keys.clone(),
            column_texts: self.column_texts.clone(),
        }
    }

    /// These rows followed by others with the same columns, e.g. own rows and corpus rows as one context.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if the column keys differ.
    pub fn followed_by(mut self, other: &Self) -> Result<Self, TfmError> {
        if self.column_keys != other.column_keys {
            let shown = |keys: &[String]| keys.join(",");
            return Err(TfmError::mismatch("columns", shown(&self.column_keys), shown(&other.column_keys)));
        }
        self.rows += other.rows;
        self.values.extend_from_slice(&other.values);
        self.labels.extend_from_slice(&other.labels);
        Ok(self)
    }

    /// Checks lengths and finiteness.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] naming what doesn't fit.
    pub fn check(&self) -> Result<(), TfmError> {
        if self.columns == 0
            || self.column_keys.len() != self.columns
            || self.column_texts.len() != self.columns
        {
            return Err(TfmError::mismatch("column keys", self.columns.max(1), self.column_keys.len()));
        }
        if self.values.len() != self.rows * self.columns || self.labels.len() != self.rows {
            return Err(TfmError::mismatch("number of values", self.rows * self.columns, self.values.len()));
        }
        if self.values.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::mismatch("encoded values", "finite numbers", "a value that is not"));
        }
        Ok(())
    }

    /// Labels of all rows.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if a row has none.
    pub fn known_labels(&self) -> Result<Vec<u8>, TfmError> {
        let known: Vec<u8> = self.labels.iter().copied().flatten().collect();
        if known.len() != self.rows {
            return Err(TfmError::mismatch("labelled rows", self.rows, known.len()));
        }
        Ok(known)
    }
}

/// Standardised codes of the levels of one feature.
pub(crate) struct LevelCodes<'a> {
    totals: [f64; 2],
    counts: &'a [[f64; 2]],
    odds: (f64, f64),
    frequency: (f64, f64),
}

impl<'a> LevelCodes<'a> {
    pub(crate) fn new(totals: [f64; 2], counts: &'a [[f64; 2]]) -> Self {
        let mut codes = Self { totals, counts, odds: (0.0, 1.0), frequency: (0.0, 1.0) };
        let weights: Vec<f64> = counts.iter().map(|c| c[0].max(0.0) + c[1].max(0.0)).collect();
        let odds = (0..counts.len()).map(|l| codes.raw_odds(l, None));
        let frequency = (0..counts.len()).map(|l| codes.raw_frequency(l, None));
        (codes.odds, codes.frequency) =
            (weighted_moments(odds, &weights), weighted_moments(frequency, &weights));
        codes
    }

    /// Non-negative counts of a level, without one row of class `own` if the level is rare.
    fn counts(&self, level: usize, own: Option<u8>) -> [f64; 2] {
        let mut counts = self.counts[level].map(|c| c.max(0.0));
        let rare = counts[0] + counts[1] < OWN_ROW_BELOW;
        if let Some(own) = own.filter(|_| rare) {
            counts[usize::from(own)] -= 1.0;
        }
        counts.map(|c| c.max(0.0))
    }

    fn raw_odds(&self, level: usize, own: Option<u8>) -> f64 {
        let [zero, one] = self.counts(level, own);
        let [all_zero, all_one] = self.totals.map(|c| c.max(0.0));
        log_odds(zero, one, all_zero, all_one)
    }

    fn raw_frequency(&self, level: usize, own: Option<u8>) -> f64 {
        self.counts(level, own).iter().sum::<f64>().ln_1p()
    }

    pub(crate) fn odds(&self, level: usize, own: Option<u8>) -> f32 {
        clip((self.raw_odds(level, own) - self.odds.0) / self.odds.1)
    }

    pub(crate) fn frequency(&self, level: usize, own: Option<u8>) -> f32 {
        clip((self.raw_frequency(level, own) - self.frequency.0) / self.frequency.1)
    }

    /// Deviation of the raw log-odds over the levels, weighted by their rows.
    pub(crate) fn odds_deviation(&self) -> f64 {
        self.odds.1
    }
}

/// Weighted mean and deviation (at least [`MIN_DEVIATION`]); plain ones if no weight is positive.
fn weighted_moments(values: impl Iterator<Item = f64> + Clone, weights: &[f64]) -> (f64, f64) {
    let total: f64 = weights.iter().sum();
    let weight = |w: f64| if total > 0.0 { w / total } else { 1.0 / weights.len() as f64 };
    let mean: f64 = values.clone().zip(weights).map(|(v, w)| v * weight(*w)).sum();
    let variance: f64 = values.zip(weights).map(|(v, w)| (v - mean).powi(2) * weight(*w)).sum();
    (mean, variance.sqrt().max(MIN_DEVIATION))
}

/// Log-odds of class 1 in a level with `zero` and `one` rows of each class, shrunk by [`PSEUDO_ROWS`] rows with the
/// overall rates (`all_zero`, `all_one`). All counts at least 0.
#[must_use]
pub fn log_odds(zero: f64, one: f64, all_zero: f64, all_one: f64) -> f64 {
    let prior = (all_one + 0.5) / (all_zero + all_one + 1.0);
    let p = (one + PSEUDO_ROWS * prior) / (zero + one + PSEUDO_ROWS);
    (p / (1.0 - p)).ln()
}

fn clip(v: f64) -> f32 {
    (v as f32).clamp(-CLIP, CLIP)
}

fn coding(feature: &Feature, given: &Statistics) -> Result<FeatureCoding, TfmError> {
    let id = feature.id.clone();
    let text = [Some(id.as_str()), feature.unit.as_deref(), feature.description.as_deref()];
    let text = text.into_iter().flatten().collect::<Vec<_>>().join(" ");
    match (&feature.kind, given) {
        (FeatureKind::Numeric(domain), Statistics::Numeric { mean, deviation }) => {
            Ok(FeatureCoding::Numeric {
                id,
                text,
                lower: domain.lower,
                upper: domain.upper,
                scale: domain.scale,
                mean: *mean,
                deviation: *deviation,
            })
        }
        (FeatureKind::Categorical { levels }, Statistics::Levels(counts)) => {
            if counts.len() != levels.len() + 2 {
                return Err(TfmError::mismatch("level counts", levels.len() + 2, counts.len()));
            }
            Ok(FeatureCoding::Categorical { id, text, counts: counts.clone() })
        }
        _ => Err(TfmError::mismatch("kind of statistics", id, "the other kind")),
    }
}

fn check_binary(schema: &FeatureSchema) -> Result<(), TfmError> {
    match schema.target().classes.len() {
        2 => Ok(()),
        got => Err(TfmError::BadConfig {
            field: "target.classes",
            expected: "two classes",
            got: got.to_string(),
        }),
    }
}

fn check_batch(features: usize, rows: &TypedBatch) -> Result<(), TfmError> {
    if rows.columns.len() != features {
        return Err(TfmError::mismatch("feature columns", features, rows.columns.len()));
    }
    match rows.columns.iter().find(|c| c.len() != rows.rows()) {
        Some(column) => Err(TfmError::mismatch("column length", rows.rows(), column.len())),
        None => Ok(()),
    }
}

/// Pseudo-rows that pull a level's log-odds towards the overall log-odds.
pub const PSEUDO_ROWS: f64 = 20.0;
/// Standardised values are clipped to this distance from 0.
pub const CLIP: f32 = 8.0;
/// Rows of a level from which on a row's own label isn't taken out of its level.
pub const OWN_ROW_BELOW: f64 = 10.0;
/// Features with more declared levels also get a log-frequency column.
pub const FREQUENCY_ABOVE_LEVELS: usize = 8;
/// End of the key of a log-frequency column.
pub const FREQUENCY_SUFFIX: &str = "#frequency";
/// Most features of a specification.
pub const MAX_FEATURES: usize = 512;
/// Most declared levels of a feature.
pub const MAX_LEVELS: usize = 1024;
/// Largest magnitude of a statistic.
pub const MAX_COUNT: f64 = 1e15;
/// Smallest deviation that a column is divided by: log-odds that vary less tell nothing.
const MIN_DEVIATION: f64 = 0.05;
const VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeMap;

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;
    use tabmesh_contract::{
        batch::{TypedBatch, TypedColumn},
        schema::{Feature, FeatureId, FeatureKind, FeatureSchema, NumericDomain, Scale, Target},
    };

    use super::{Coding, FeatureCoding, MAX_FEATURES, MAX_LEVELS, Preprocessing, Statistics, log_odds};
    use crate::{error::TfmError, metrics::roc_auc};

    fn schema(levels: usize) -> FeatureSchema {
        let id = |text: &str| FeatureId::new(text).unwrap();
        let levels = (0..levels).map(|i| format!("l{i}")).collect();
        let domain = NumericDomain { lower: 0.0, upper: 99.0, scale: Scale::Log1p, cut_points: None };
        let feature = |name: &str, kind| Feature { id: id(name), kind, unit: None, description: None };
        FeatureSchema::new(
            vec![
                feature("person.job", FeatureKind::Categorical { levels }),
                feature("person.age", FeatureKind::Numeric(domain)),
            ],
            Target { id: id("churn"), classes: vec!["no".into(), "yes".into()] },
        )
        .unwrap()
    }

    fn batch(ages: Vec<f64>, jobs: Vec<u32>, labels: Vec<Option<u16>>) -> TypedBatch {
        let units = vec![[0; 16]; labels.len()];
        TypedBatch {
            columns: vec![TypedColumn::Numeric(ages), TypedColumn::Categorical(jobs)],
            labels,
            units,
        }
    }

    #[test]
    fn values_match_hand_computation() {
        let statistics = BTreeMap::from([
            (FeatureId::new("person.age").unwrap(), Statistics::Numeric { mean: 2.0, deviation: 0.5 }),
            (
                FeatureId::new("person.job").unwrap(),
                // Two levels, "other", missing; the noise made one count negative.
                Statistics::Levels(vec![[30.0, 10.0], [20.0, 40.0], [0.0, -3.0], [0.0, 0.0]]),
            ),
        ]);
        let p = Preprocessing::new(&schema(2), [50.0, 50.0], &statistics).unwrap();
        let rows = batch(vec![99.5, f64::NAN, -1.0], vec![0, 1, 3], vec![Some(1), Some(0), None]);
        let foreign = p.encode(&rows, Coding::Foreign).unwrap();
        assert_eq!(foreign.column_keys, ["person.age", "person.job"]);
        let column = |t: &super::EncodedTable, j: usize| -> Vec<f64> {
            t.values.chunks_exact(2).map(|r| f64::from(r[j])).collect()
        };
        // ln(1 + 99) clamped from 99.5; missing gives 0; -1 is clamped to 0.
        let ages = column(&foreign, 0);
        assert!((ages[0] - (100f64.ln() - 2.0) / 0.5).abs() < 1e-5);
        assert!(ages[1].abs() < 1e-9 && (ages[2] + 4.0).abs() < 1e-6);
        // Weights 40 and 60; log-odds ln(20/40) and ln(50/30) after 20 pseudo-rows of prior 1/2.
        let (a, b) = ((20f64 / 40.0).ln(), (50f64 / 30.0).ln());
        let mean = 0.4 * a + 0.6 * b;
        let deviation = (0.4 * (a - mean).powi(2) + 0.6 * (b - mean).powi(2)).sqrt();
        let jobs = column(&foreign, 1);
        assert!((jobs[0] - (a - mean) / deviation).abs() < 1e-5);
        assert!((jobs[2] - (0.0 - mean) / deviation).abs() < 1e-5);
        // Both levels have many rows: nothing is taken out.
        let own = column(&p.encode(&rows, Coding::OwnRow).unwrap(), 1);
        assert!(own.iter().zip(&jobs).all(|(a, b)| (a - b).abs() < 1e-9));
    }

    /// By hand: a level of nine rows is coded without the row itself, one of ten as it stands.
    #[test]
    fn rare_levels_are_coded_without_the_row_itself() {
        let statistics = BTreeMap::from([
            (FeatureId::new("person.age").unwrap(), Statistics::Numeric { mean: 0.0, deviation: 1.0 }),
            (
                FeatureId::new("person.job").unwrap(),
                Statistics::Levels(vec![[6.0, 3.0], [6.0, 4.0], [0.0, 0.0], [0.0, 0.0]]),
            ),
        ]);
        let p = Preprocessing::new(&schema(2), [12.0, 7.0], &statistics).unwrap();
        let rows = batch(vec![1.0; 4], vec![0, 1, 0, 0], vec![Some(1), Some(1), Some(0), None]);
        let codes = |coding| -> Vec<f64> {
            let t = p.encode(&rows, coding).unwrap();
            t.values.chunks_exact(2).map(|r| f64::from(r[1])).collect()
        };
        let (foreign, own) = (codes(Coding::Foreign), codes(Coding::OwnRow));
        assert!((own[1] - foreign[1]).abs() < 1e-9, "ten rows");
        assert!((own[3] - foreign[3]).abs() < 1e-9, "an unlabelled row has nothing to take out");
        let odds = |zero, one| log_odds(zero, one, 12.0, 7.0);
        // Codes are the same affine function of log-odds for all rows.
        let unit = (foreign[1] - foreign[0]) / (odds(6.0, 4.0) - odds(6.0, 3.0));
        assert!((own[0] - foreign[0] - unit * (odds(6.0, 2.0) - odds(6.0, 3.0))).abs() < 1e-5);
        assert!((own[2] - foreign[2] - unit * (odds(5.0, 3.0) - odds(6.0, 3.0))).abs() < 1e-5);
    }

    /// What it is for: with 64 rows a flag that says nothing keeps two values, whatever the labels.
    #[test]
    fn a_flag_keeps_its_two_values_in_a_small_table() {
        let mut rng = ChaCha20Rng::seed_from_u64(10);
        let flags: Vec<u32> = (0..64).map(|_| rng.random_range(0..2)).collect();
        let labels: Vec<Option<u16>> = (0..64).map(|_| Some(u16::from(rng.random_bool(0.4)))).collect();
        let rows = batch(vec![1.0; 64], flags, labels);
        let t = Preprocessing::fit(&schema(2), &rows).unwrap().encode(&rows, Coding::OwnRow).unwrap();
        let mut codes: Vec<u32> = t.values.chunks_exact(2).map(|r| r[1].to_bits()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), 2);
    }

    /// Attack: a column of random levels, coded with the rows' own labels, seems to predict them. Without each row
    /// itself it doesn't. 1,500 rows, 400 levels; the AUC of noise has deviation .015, the bound is 3 of them.
    #[test]
    fn random_many_level_column_gains_nothing_without_own_row() {
        let mut rng = ChaCha20Rng::seed_from_u64(9);
        let jobs: Vec<u32> = (0..1500).map(|_| rng.random_range(0..400)).collect();
        let labels: Vec<Option<u16>> = (0..1500).map(|_| Some(u16::from(rng.random_bool(0.4)))).collect();
        let rows = batch(vec![1.0; 1500], jobs, labels);
        let p = Preprocessing::fit(&schema(400), &rows).unwrap();
        let auc = |coding| {
            let t = p.encode(&rows, coding).unwrap();
            assert_eq!(t.column_keys[2], "person.job#frequency");
            let scores: Vec<f64> = t.values.chunks_exact(3).map(|r| f64::from(r[1])).collect();
            let labels: Vec<u8> = t.labels.iter().map(|l| l.unwrap()).collect();
            roc_auc(&scores, &labels).unwrap()
        };
        assert!(auc(Coding::Foreign) > 0.6, "own labels leak without leave-one-out");
        assert!((auc(Coding::OwnRow) - 0.5).abs() < 0.045, "{}", auc(Coding::OwnRow));
    }

    /// Taking a row out of a level of many rows would split the level's code by the label, the same way for all rows.
    #[test]
    fn frequent_levels_have_one_code_whatever_the_label() {
        let n = 1000;
        let labels: Vec<Option<u16>> = (0..n).map(|i| Some(u16::from(i % 3 == 0))).collect();
        let rows = batch(vec![1.0; n], (0..n).map(|i| u32::from(i % 2 == 0)).collect(), labels);
        let p = Preprocessing::fit(&schema(3), &rows).unwrap();
        assert_eq!(p.encode(&rows, Coding::OwnRow).unwrap(), p.encode(&rows, Coding::Foreign).unwrap());
    }

    #[test]
    fn specification_survives_json_and_refuses_nonsense() {
        let rows = batch(vec![1.0, 5.0, f64::NAN], vec![0, 1, 0], vec![Some(0), Some(1), Some(1)]);
        let p = Preprocessing::fit(&schema(3), &rows).unwrap();
        let text = serde_json::to_string(&p).unwrap();
        assert_eq!(serde_json::from_str::<Preprocessing>(&text).unwrap(), p);
        for (from, to) in [("\"version\":1", "\"version\":2"), ("\"upper\":99.0", "\"upper\":-1.0")] {
            assert!(text.contains(from));
            assert!(serde_json::from_str::<Preprocessing>(&text.replace(from, to)).is_err(), "{to}");
        }
        let short = TypedBatch { columns: vec![], ..rows };
        assert!(matches!(p.encode(&short, Coding::Foreign), Err(TfmError::Mismatch { .. })));
    }

    #[test]
    fn limits_hold_at_one_above() {
        let feature = |i: usize, levels: usize| FeatureCoding::Categorical {
            id: FeatureId::new(format!("f.{i:04}")).unwrap(),
            text: String::new(),
            counts: vec![[1.0; 2]; levels + 2],
        };
        assert!(Preprocessing::checked([1.0; 2], vec![feature(0, MAX_LEVELS)]).is_ok());
        assert!(Preprocessing::checked([1.0; 2], vec![feature(0, MAX_LEVELS + 1)]).is_err());
        let many = |n: usize| Preprocessing::checked([1.0; 2], (0..n).map(|i| feature(i, 1)).collect());
        assert!(many(MAX_FEATURES).is_ok() && many(MAX_FEATURES + 1).is_err());
    }

    #[test]
    fn histogram_moments_match_the_uniform_distribution() {
        let Statistics::Numeric { mean, deviation } =
            Statistics::from_histogram(&[0.0, 3.0, 6.0, 12.0], &[25.0, 25.0, 50.0], Scale::Linear).unwrap()
        else {
            panic!("a histogram gives numeric statistics")
        };
        // Uniform on [0, 12]: mean 6, deviation 12 / sqrt(12).
        assert!((mean - 6.0).abs() < 1e-12 && (deviation - 12f64.sqrt()).abs() < 1e-12);
        assert!(Statistics::from_histogram(&[0.0, 1.0], &[1.0, 2.0], Scale::Linear).is_err());
    }
}
