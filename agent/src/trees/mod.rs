//! Gradient-boosted trees on a domain's own rows, alone or with corpus rows beside them.
//!
//! Trees see typed rows (numbers with `NaN` for missing, category codes). Category coding, size and the number of trees
//! are chosen by cross-validated log loss on own rows, as an ordinary practitioner would; so is how much corpus rows weigh
//! beside own rows. Their classes are weighed to the domain's own label rate.
//!
//! Fitted trees hold what real rows say: they belong to the domain. They have no serialised form, so none can be sent or
//! kept; a restart fits them again from the table and the recorded [`Settings`], which gives equal trees for equal rows
//! and forgets rows that the owner has deleted. Two-class targets only; logits are those of class 1.

mod coding;
mod settings;

use forust_ml::GradientBooster;
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::schema::{FeatureKind, FeatureSchema};
use thiserror::Error;

use coding::{Coded, Coder};
pub use settings::{Coding, Settings};

/// Why trees can't be fitted or asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TreeError {
    /// The target has not two classes.
    #[error("trees need a target of 2 classes, {target} has {got}")]
    Classes {
        /// The target's canonical id.
        target: String,
        /// How many it has.
        got: usize,
    },
    /// A batch has more or fewer columns than the schema.
    #[error("a batch has {got} columns, the schema {expected}")]
    Columns {
        /// The schema's.
        expected: usize,
        /// The batch's.
        got: usize,
    },
    /// A column is longer or shorter than its batch.
    #[error("{feature} has {got} values in a batch of {expected} rows")]
    Length {
        /// The feature's canonical id.
        feature: String,
        /// Rows of the batch.
        expected: usize,
        /// Values of the column.
        got: usize,
    },
    /// A column is of another kind than declared.
    #[error("{feature} is not of the kind the schema declares")]
    Kind {
        /// The feature's canonical id.
        feature: String,
    },
    /// The tree library refuses rows that were checked.
    #[error("the tree library refuses the rows: {reason}")]
    Library {
        /// Its words.
        reason: String,
    },
}

/// Fitted trees.
pub struct Trees {
    answer: Answer,
    settings: Settings,
    schema: FeatureSchema,
}

/// How a row is answered.
enum Answer {
    /// Rows of one class only: the logit of the smoothed share of class 1.
    Constant(f64),
    Fitted {
        coder: Coder,
        booster: Box<GradientBooster>,
    },
}

impl Trees {
    /// Fits trees, their settings chosen by cross-validation on own rows.
    ///
    /// Rows without a label are left out. With rows of one class only the answer is a constant: the smoothed share of
    /// class 1. Equal arguments give equal trees.
    ///
    /// # Errors
    /// [`TreeError`] for a target that has not two classes, or batches that don't fit the schema.
    pub fn fit(
        own: &TypedBatch,
        corpus: Option<&TypedBatch>,
        schema: &FeatureSchema,
        seed: u64,
    ) -> Result<Self, TreeError> {
        let sample = Sample::checked(own, corpus, schema)?;
        let settings = if sample.has_both_classes() {
            settings::choose(&sample, schema, seed)?
        } else {
            Settings::DEFAULT
        };
        Self::fitted(&sample, settings, schema, seed)
    }

    /// As [`Self::fit`], with settings chosen before.
    ///
    /// # Errors
    /// As [`Self::fit`].
    pub fn refit(
        settings: Settings,
        own: &TypedBatch,
        corpus: Option<&TypedBatch>,
        schema: &FeatureSchema,
        seed: u64,
    ) -> Result<Self, TreeError> {
        Self::fitted(&Sample::checked(own, corpus, schema)?, settings, schema, seed)
    }

    fn fitted(
        sample: &Sample,
        settings: Settings,
        schema: &FeatureSchema,
        seed: u64,
    ) -> Result<Self, TreeError> {
        let answer = if sample.has_both_classes() {
            let everything: Vec<usize> = (0..sample.labels.len()).collect();
            let Coded { coder, fitted } = Coded::fit(settings, sample, &everything, schema, seed);
            let booster = Box::new(settings::boost(&fitted, sample, &everything, settings, seed, None)?);
            Answer::Fitted { coder, booster }
        } else {
            let share = sample.smoothed_share();
            Answer::Constant((share / (1.0 - share)).ln())
        };
        Ok(Self { answer, settings, schema: schema.clone() })
    }

    /// What they were fitted with.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Logits of class 1 of rows in the schema's columns; always finite.
    ///
    /// # Errors
    /// [`TreeError`] if the rows don't fit the schema.
    pub fn logits(&self, rows: &TypedBatch) -> Result<Vec<f64>, TreeError> {
        check(rows, &self.schema)?;
        Ok(match &self.answer {
            Answer::Constant(logit) => vec![*logit; rows.rows()],
            Answer::Fitted { .. } if rows.rows() == 0 => Vec::new(),
            Answer::Fitted { coder, booster } => booster.predict(&coder.apply(rows).view(), false),
        })
    }

    /// Probabilities of class 1, in `(0, 1)`.
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn probabilities(&self, rows: &TypedBatch) -> Result<Vec<f64>, TreeError> {
        Ok(self.logits(rows)?.into_iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect())
    }
}

/// Labelled rows with weights; the domain's own rows come first.
struct Sample {
    batch: TypedBatch,
    /// 1 or 0.
    labels: Vec<f64>,
    own: usize,
    /// What brings corpus rows of class 0 and 1 to the own label rate.
    rate_weights: [f64; 2],
}

impl Sample {
    fn checked(
        own: &TypedBatch,
        corpus: Option<&TypedBatch>,
        schema: &FeatureSchema,
    ) -> Result<Self, TreeError> {
        let classes = schema.target().classes.len();
        if classes != 2 {
            return Err(TreeError::Classes { target: schema.target().id.to_string(), got: classes });
        }
        for batch in [Some(own), corpus].into_iter().flatten() {
            check(batch, schema)?;
        }
        Ok(Self::new(own, corpus))
    }

    fn new(own: &TypedBatch, corpus: Option<&TypedBatch>) -> Self {
        let labelled = |rows: &TypedBatch, most: usize| -> Vec<usize> {
            rows.labels.iter().enumerate().filter(|(_, l)| l.is_some()).map(|(i, _)| i).take(most).collect()
        };
        let mut batch = own.take(&labelled(own, usize::MAX));
        let own = batch.rows();
        let mut rate_weights = [1.0; 2];
        if let Some(corpus) = corpus {
            let extra = corpus.take(&labelled(corpus, MOST_CORPUS_ROWS));
            rate_weights = weights_to_rate(ones(&batch), own, ones(&extra), extra.rows());
            batch.append(&extra);
        }
        let labels = batch.labels.iter().map(|l| f64::from(u8::from(*l == Some(1)))).collect();
        Self { batch, labels, own, rate_weights }
    }

    /// The same with no more than so many corpus rows.
    fn with_corpus_rows(&self, most: usize) -> Self {
        let kept = self.labels.len().min(self.own.saturating_add(most));
        let (own, extra): (Vec<usize>, Vec<usize>) = (0..kept).partition(|row| *row < self.own);
        let extra = Some(self.batch.take(&extra)).filter(|rows| rows.rows() > 0);
        Self::new(&self.batch.take(&own), extra.as_ref())
    }

    /// Weight of each row where all corpus rows together weigh `share` times the own rows; a corpus row weighs at
    /// most 1 on average.
    fn weights(&self, share: f64) -> Vec<f64> {
        let (own, corpus) = (self.own as f64, (self.labels.len() - self.own).max(1) as f64);
        // A domain without rows of its own learns from the corpus alone.
        let weight = if self.own == 0 { 1.0 } else { (share * own / corpus).min(1.0) };
        let of_row = |(row, label): (usize, &f64)| match row < self.own {
            true => 1.0,
            false => weight * self.rate_weights[usize::from(*label > 0.5)],
        };
        self.labels.iter().enumerate().map(of_row).collect()
    }

    fn has_both_classes(&self) -> bool {
        self.labels.iter().any(|&l| l > 0.5) && self.labels.iter().any(|&l| l < 0.5)
    }

    /// Share of class 1 with half a row of each class added.
    fn smoothed_share(&self) -> f64 {
        (self.labels.iter().sum::<f64>() + 0.5) / (self.labels.len() as f64 + 1.0)
    }
}

/// Weights of corpus rows of class 0 and 1, 1 on average, that split them as the own labels are, whose rate is drawn
/// towards the corpus' by [`RATE_PRIOR_ROWS`] rows.
fn weights_to_rate(own_ones: usize, own: usize, ones: usize, rows: usize) -> [f64; 2] {
    if ones == 0 || ones == rows {
        return [1.0; 2];
    }
    let rate = ones as f64 / rows as f64;
    let wanted = (own_ones as f64 + RATE_PRIOR_ROWS * rate) / (own as f64 + RATE_PRIOR_ROWS);
    [(1.0 - wanted) / (1.0 - rate), wanted / rate]
}

fn ones(rows: &TypedBatch) -> usize {
    rows.labels.iter().filter(|label| **label == Some(1)).count()
}

fn check(batch: &TypedBatch, schema: &FeatureSchema) -> Result<(), TreeError> {
    let (rows, columns) = (batch.rows(), schema.features().len());
    if batch.columns.len() != columns {
        return Err(TreeError::Columns { expected: columns, got: batch.columns.len() });
    }
    for (column, feature) in batch.columns.iter().zip(schema.features()) {
        let id = || feature.id.to_string();
        if column.len() != rows {
            return Err(TreeError::Length { feature: id(), expected: rows, got: column.len() });
        }
        let fits = matches!(
            (column, &feature.kind),
            (TypedColumn::Numeric(_), FeatureKind::Numeric(_))
                | (TypedColumn::Categorical(_), FeatureKind::Categorical { .. })
        );
        if !fits {
            return Err(TreeError::Kind { feature: id() });
        }
    }
    Ok(())
}

/// Corpus rows that trees see: more of them hardly tell more, and cost time.
const MOST_CORPUS_ROWS: usize = 4_000;
/// Rows at the corpus' label rate that the own label rate starts from.
const RATE_PRIOR_ROWS: f64 = 20.0;

#[cfg(test)]
mod tests;
