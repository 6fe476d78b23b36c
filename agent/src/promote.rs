//! The agent's own choice of what to serve, on rows nothing else has seen.
//!
//! Candidates are judged by log loss on the gate rows, with contexts that hold no gate row. What is served now is replaced only
//! if the best candidate is better by at least one standard error of the paired difference; with too few minority
//! rows at the gate the shipped default is served. What is chosen is then calibrated on the same rows. Nothing about the choice leaves the domain: it stands in a
//! local record. Afterwards the context is rebuilt on all rows.

use ring::hmac;
use serde::{Deserialize, Serialize};
use tabmesh_contract::batch::{TypedBatch, UnitKey};
use tabmesh_federation::id::Digest;
use tabmesh_federation::manifest::Manifest;
use tabmesh_tfm::adapter::Adapter;
use tabmesh_tfm::context::Context;
use tabmesh_tfm::model::Model;
use tabmesh_tfm::table::{Coding, EncodedTable, Preprocessing};

use crate::calibrate::{Calibration, mean_and_error};
use crate::config::ContextSection;
use crate::publication::{ArtefactError, Artefacts};
use crate::train::onto;
use crate::work::WorkError;
use tabmesh_contract::schema::FeatureSchema;

/// Which weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// The base before the plan.
    Base,
    /// The base tuned on the corpus.
    Tuned,
}

/// Which rows stand in the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// The domain's own.
    Local,
    /// The domain's own and corpus rows at the domain's label rate.
    Mixed,
}

/// Whether the adapter of the rounds is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tokens {
    /// Without adapter.
    Off,
    /// With the published adapter on query rows; by default that is feature tokens.
    On,
}

/// One way to serve a publication.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Candidate {
    /// Which weights.
    pub weights: Weights,
    /// Which context.
    pub rows: Rows,
    /// With or without adapter.
    pub tokens: Tokens,
}

impl Candidate {
    /// What is served without evidence for anything else: tuned weights, mixed context, no adapter.
    pub const DEFAULT: Self = Self { weights: Weights::Tuned, rows: Rows::Mixed, tokens: Tokens::Off };

    /// Every way to serve a publication.
    #[must_use]
    pub fn all(adapter: bool) -> Vec<Self> {
        let mut all = Vec::new();
        for weights in [Weights::Base, Weights::Tuned] {
            for rows in [Rows::Local, Rows::Mixed] {
                all.push(Self { weights, rows, tokens: Tokens::Off });
                if adapter {
                    all.push(Self { weights, rows, tokens: Tokens::On });
                }
            }
        }
        all
    }
}

impl std::fmt::Display for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let weights = match self.weights {
            Weights::Base => "base",
            Weights::Tuned => "tuned",
        };
        let rows = match self.rows {
            Rows::Local => "local context",
            Rows::Mixed => "mixed context",
        };
        let tokens = match self.tokens {
            Tokens::Off => "no adapter",
            Tokens::On => "adapter",
        };
        write!(f, "{weights}, {rows}, {tokens}")
    }
}

/// A publication loaded for one domain.
pub struct Loaded {
    schema: FeatureSchema,
    preprocessing: Preprocessing,
    base: Model,
    tuned: Model,
    adapter: Option<Adapter>,
    corpus: TypedBatch,
    own: FeatureSchema,
    sizes: ContextSection,
    key: hmac::Key,
    /// Whether the domain's rows are in the release, so that their own labels are in the level counts.
    in_release: bool,
}

/// A model with its context, ready to answer.
pub struct Variant {
    context: Context,
    adapter: Option<Adapter>,
    preprocessing: Preprocessing,
    shared: FeatureSchema,
    own: FeatureSchema,
    calibration: Calibration,
}

impl Loaded {
    /// Loads a verified publication.
    ///
    /// # Errors
    /// [`ArtefactError`] if an artefact is missing, damaged or doesn't fit.
    pub fn new(
        artefacts: &Artefacts,
        manifest: &Manifest,
        own: &FeatureSchema,
        sizes: ContextSection,
        secret: &[u8; 32],
        in_release: bool,
    ) -> Result<Self, ArtefactError> {
        let tuned = artefacts.model(&manifest.tuned)?;
        let adapter = |digest| artefacts.adapter(&digest, &manifest.tuned, &tuned);
        Ok(Self {
            schema: manifest.schema.clone(),
            preprocessing: artefacts.preprocessing(&manifest.preprocessing)?,
            base: artefacts.model(&manifest.base)?,
            adapter: manifest.adapter.map(adapter).transpose()?,
            tuned,
            corpus: artefacts.corpus(&manifest.corpus, &manifest.schema)?,
            own: own.clone(),
            sizes,
            key: hmac::Key::new(hmac::HMAC_SHA256, secret),
            in_release,
        })
    }

    /// The corpus rows in the contract's terms.
    #[must_use]
    pub fn corpus(&self) -> &TypedBatch {
        &self.corpus
    }

    /// The shared columns.
    #[must_use]
    pub fn schema(&self) -> &FeatureSchema {
        &self.schema
    }

    /// Rows of the domain's own columns as the model reads them, coded as rows that are not in the release.
    ///
    /// # Errors
    /// [`WorkError::Model`] if they don't fit.
    pub fn encode(&self, rows: &TypedBatch) -> Result<EncodedTable, WorkError> {
        encoded(&self.preprocessing, rows, &self.own, &self.schema)
    }

    /// As [`Self::encode`], of rows in the shared columns, such as the corpus'.
    ///
    /// # Errors
    /// [`WorkError::Model`] if they don't fit.
    pub fn encode_shared(&self, rows: &TypedBatch) -> Result<EncodedTable, WorkError> {
        Ok(self.preprocessing.encode(rows, Coding::Foreign)?)
    }

    /// Corpus rows under the domain's own columns; a column that the corpus lacks is missing.
    #[must_use]
    pub fn in_own_columns(&self, rows: &TypedBatch) -> TypedBatch {
        onto(rows, &self.schema, &self.own)
    }

    /// Candidates this publication offers.
    #[must_use]
    pub fn candidates(&self) -> Vec<Candidate> {
        Candidate::all(self.adapter.is_some())
    }

    /// Builds a candidate on these rows of the domain (columns of its own schema).
    ///
    /// A domain without labelled rows, or with one class, is served from corpus rows alone.
    ///
    /// # Errors
    /// [`WorkError::Model`] if the model refuses.
    pub fn build(&self, candidate: Candidate, rows: &TypedBatch) -> Result<Variant, WorkError> {
        let labelled: Vec<usize> = (0..rows.rows()).filter(|&row| rows.labels[row].is_some()).collect();
        let rows = onto(&rows.take(&labelled), &self.own, &self.schema);
        let chosen = self.first_by_hash(&rows.units, self.sizes.local_rows);
        let own = rows.take(&chosen);
        let one_class = own.labels.iter().all(|label| Some(label) == own.labels.first());
        let coding = if self.in_release { Coding::OwnRow } else { Coding::Foreign };
        let mut parts: Vec<EncodedTable> = Vec::new();
        if own.rows() > 0 && !(one_class && candidate.rows == Rows::Local) {
            parts.push(self.preprocessing.encode(&own, coding)?);
        }
        if candidate.rows == Rows::Mixed || parts.is_empty() {
            let like = self.corpus_like(&own);
            parts.push(self.preprocessing.encode(&self.corpus.take(&like), Coding::Foreign)?);
        }
        let mut parts = parts.into_iter();
        let Some(mut context) = parts.next() else { return Err(WorkError::NoContext) };
        for part in parts {
            context = context.followed_by(&part)?;
        }
        let model = match candidate.weights {
            Weights::Base => &self.base,
            Weights::Tuned => &self.tuned,
        };
        let adapter = match candidate.tokens {
            Tokens::On => self.adapter.clone(),
            Tokens::Off => None,
        };
        Ok(Variant {
            context: Context::build_as(model, &context, self.sizes.plan(self.schema.target().classes.len()))?,
            adapter,
            preprocessing: self.preprocessing.clone(),
            shared: self.schema.clone(),
            own: self.own.clone(),
            calibration: Calibration::NONE,
        })
    }

    /// Corpus rows at the label rate of the domain's own rows; at the corpus' own rate for a domain of one class.
    fn corpus_like(&self, own: &TypedBatch) -> Vec<usize> {
        let wanted = self.sizes.corpus_rows.min(self.corpus.rows());
        let classes = self.schema.target().classes.len();
        let mut have = vec![0_usize; classes];
        own.labels.iter().flatten().for_each(|&label| have[usize::from(label).min(classes - 1)] += 1);
        let total: usize = have.iter().sum();
        if have.iter().filter(|&&count| count > 0).count() < 2 {
            return (0..wanted).collect();
        }
        let mut quota: Vec<usize> = have.iter().map(|&count| (count * wanted).div_ceil(total)).collect();
        let mut taken = Vec::with_capacity(wanted);
        for (row, label) in self.corpus.labels.iter().enumerate() {
            let Some(left) = label.and_then(|label| quota.get_mut(usize::from(label))) else { continue };
            if *left > 0 && taken.len() < wanted {
                *left -= 1;
                taken.push(row);
            }
        }
        taken
    }

    /// At most `most` rows, chosen by a keyed hash of their units: the same whatever their order or values.
    fn first_by_hash(&self, units: &[UnitKey], most: usize) -> Vec<usize> {
        let mut ranked: Vec<(Vec<u8>, usize)> = units
            .iter()
            .enumerate()
            .map(|(row, unit)| (hmac::sign(&self.key, unit).as_ref().to_vec(), row))
            .collect();
        ranked.sort();
        ranked.truncate(most);
        let mut rows: Vec<usize> = ranked.into_iter().map(|(_, row)| row).collect();
        rows.sort_unstable();
        rows
    }
}

impl Variant {
    /// The same with its probabilities calibrated.
    #[must_use]
    pub fn calibrated(self, calibration: Calibration) -> Self {
        Self { calibration, ..self }
    }

    /// Class probabilities of rows in the domain's own columns, `rows × classes`.
    ///
    /// # Errors
    /// [`WorkError::Model`] if rows and model don't fit.
    pub fn predict(&self, rows: &TypedBatch) -> Result<Vec<Vec<f32>>, WorkError> {
        let probability = |logit: f64| self.calibration.probability(logit);
        Ok(self
            .logits(rows)?
            .into_iter()
            .map(|logit| vec![(1.0 - probability(logit)) as f32, probability(logit) as f32])
            .collect())
    }

    /// Logits of class 1 before calibration.
    ///
    /// # Errors
    /// As [`Self::predict`].
    pub fn logits(&self, rows: &TypedBatch) -> Result<Vec<f64>, WorkError> {
        if rows.rows() == 0 {
            return Ok(Vec::new());
        }
        let rows = encoded(&self.preprocessing, rows, &self.own, &self.shared)?;
        Ok(self.context.logits(&rows, self.adapter.as_ref())?)
    }
}

/// Rows of a domain's own columns as the model of a publication reads them.
///
/// # Errors
/// [`WorkError::Model`] if they don't fit.
pub fn encoded(
    preprocessing: &Preprocessing,
    rows: &TypedBatch,
    own: &FeatureSchema,
    shared: &FeatureSchema,
) -> Result<EncodedTable, WorkError> {
    Ok(preprocessing.encode(&onto(rows, own, shared), Coding::Foreign)?)
}

/// What was served when a choice was made, and what came of it. Stays in the domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Promotion {
    /// When, UTC milliseconds.
    pub time_ms: i64,
    /// The publication chosen from.
    pub manifest: Digest,
    /// What is served now.
    pub served: Candidate,
    /// Slope and intercept on its logits.
    #[serde(default)]
    pub calibration: Calibration,
    /// Why, in words.
    pub reason: String,
    /// Rows at the gate.
    pub gate_rows: usize,
    /// How often a gate of this domain was used before.
    pub gate_uses: usize,
    /// Log loss on the gate rows by candidate; empty if there were too few.
    pub log_loss: Vec<(String, f64)>,
}

/// What came of a choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// What is to be served.
    pub served: Candidate,
    /// How its logits are calibrated.
    pub calibration: Calibration,
    /// Why, in words.
    pub reason: String,
    /// Log loss on the gate rows by candidate, before calibration; empty if there were too few.
    pub log_loss: Vec<(String, f64)>,
}

impl Choice {
    fn default(reason: String) -> Self {
        Self { served: Candidate::DEFAULT, calibration: Calibration::NONE, reason, log_loss: Vec::new() }
    }
}

/// Chooses by paired log loss on the gate rows.
///
/// # Errors
/// [`WorkError`] if a candidate can't be built or scored.
pub fn choose(
    loaded: &Loaded,
    training: &TypedBatch,
    gate: &TypedBatch,
    champion: Candidate,
) -> Result<Choice, WorkError> {
    let labelled: Vec<usize> = (0..gate.rows()).filter(|&row| gate.labels[row].is_some()).collect();
    let gate = gate.take(&labelled);
    let minority = minority(&gate, loaded.schema.target().classes.len());
    if minority < MIN_MINORITY {
        let reason =
            format!("{minority} minority rows at the gate, {MIN_MINORITY} are needed: the default is served");
        return Ok(Choice::default(reason));
    }
    let mut scored: Vec<Scored> = Vec::new();
    for candidate in loaded.candidates() {
        let logits = loaded.build(candidate, training)?.logits(&gate)?;
        let losses = losses(&logits, &gate);
        scored.push(Scored { candidate, logits, losses });
    }
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len().max(1) as f64;
    let log_loss = scored.iter().map(|one| (one.candidate.to_string(), mean(&one.losses))).collect();
    let holder = scored.iter().find(|one| one.candidate == champion);
    let best = scored.iter().min_by(|a, b| mean(&a.losses).total_cmp(&mean(&b.losses)));
    let (Some(holder), Some(best)) = (holder, best) else {
        let reason = "no candidate could be scored: the default is served".to_owned();
        return Ok(Choice { log_loss, ..Choice::default(reason) });
    };
    let gains: Vec<f64> = holder.losses.iter().zip(&best.losses).map(|(a, b)| a - b).collect();
    let (gain, error) = mean_and_error(&gains);
    let (chosen, mut reason) = if best.candidate != champion && gain >= error && gain > 0.0 {
        let winner = best.candidate;
        (best, format!("{winner} is better than {champion} by {gain:.4} ± {error:.4} in log loss"))
    } else {
        (holder, format!("{champion} is kept: the best challenger gains {gain:.4} ± {error:.4} in log loss"))
    };
    let ones: Vec<bool> = gate.labels.iter().map(|label| *label == Some(1)).collect();
    let calibration = Calibration::fit(&chosen.logits, &ones);
    if calibration != Calibration::NONE {
        let Calibration { slope, intercept } = calibration;
        reason.push_str(&format!("; calibrated with slope {slope:.3}, intercept {intercept:.3}"));
    }
    Ok(Choice { served: chosen.candidate, calibration, reason, log_loss })
}

/// A candidate on the gate rows.
struct Scored {
    candidate: Candidate,
    logits: Vec<f64>,
    losses: Vec<f64>,
}

fn minority(gate: &TypedBatch, classes: usize) -> usize {
    let count =
        |class: usize| gate.labels.iter().flatten().filter(|&&label| usize::from(label) == class).count();
    (0..classes).map(count).min().unwrap_or(0)
}

fn losses(logits: &[f64], gate: &TypedBatch) -> Vec<f64> {
    let loss = |(logit, label): (&f64, &Option<u16>)| {
        let one = Calibration::NONE.probability(*logit);
        let p = if *label == Some(1) { one } else { 1.0 - one };
        -p.max(LOSS_FLOOR).ln()
    };
    logits.iter().zip(&gate.labels).map(loss).collect()
}

/// Minority rows at the gate below which the default is served.
pub const MIN_MINORITY: usize = 20;
/// Smallest probability that is scored.
const LOSS_FLOOR: f64 = 1e-7;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_serve_is_a_candidate_once() {
        let all = Candidate::all(true);
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!((all.len(), distinct.len()), (8, 8));
        assert_eq!(Candidate::all(false).len(), 4);
        assert!(all.contains(&Candidate::DEFAULT));
    }
}
