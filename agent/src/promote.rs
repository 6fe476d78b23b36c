//! What a publication offers a domain, loaded: variants of the model, trees beside it, and the blend that is served.
//!
//! Everything built here holds the domain's rows and stays in the process: contexts and trees have no serialised form.

use ring::hmac;
use serde::{Deserialize, Serialize};
use tabmesh_contract::batch::{TypedBatch, UnitKey};
use tabmesh_federation::manifest::Manifest;
use tabmesh_forest::Forest;
use tabmesh_tfm::adapter::Adapter;
use tabmesh_tfm::context::Context;
use tabmesh_tfm::error::TfmError;
use tabmesh_tfm::model::Model;
use tabmesh_tfm::table::{Coding, EncodedTable, Preprocessing};

use crate::calibrate::Calibration;
use crate::choose::{Blend, Member, Share};
use crate::config::ContextSection;
use crate::gate::Gate;
use crate::posterior::like_own;
use crate::publication::{ArtefactError, Artefacts};
use crate::train::onto;
use crate::trees::{Settings, Trees};
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

/// What the rounds of a publication gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offer {
    /// An adapter of the model.
    pub adapter: bool,
    /// A forest beside it.
    pub forest: bool,
}

/// A publication loaded for one domain.
pub struct Loaded {
    schema: FeatureSchema,
    preprocessing: Preprocessing,
    base: Model,
    tuned: Model,
    adapter: Option<Adapter>,
    forest: Option<Forest>,
    corpus: TypedBatch,
    own: FeatureSchema,
    sizes: ContextSection,
    key: hmac::Key,
    /// The gate whose training rows are in the release, so that their own labels are in the level counts.
    counted: Option<Gate>,
}

/// A variant of the model with its context, ready to answer.
pub struct Variant {
    context: Context,
    adapter: Option<Adapter>,
    preprocessing: Preprocessing,
    shared: FeatureSchema,
    own: FeatureSchema,
}

/// A blend with everything it needs, ready to answer.
pub struct Served {
    blend: Blend,
    parts: Vec<Part>,
    calibration: Calibration,
}

/// What answers for a member of a blend.
enum Part {
    Trees(Trees),
    Forest(Box<SharedForest>),
    Variant(Box<Variant>),
}

/// The forest of the rounds, for rows of the domain's own columns. It holds no row.
pub struct SharedForest {
    forest: Forest,
    shared: FeatureSchema,
    own: FeatureSchema,
}

impl SharedForest {
    /// It as it stood when its first trees had learnt.
    #[must_use]
    pub fn after(&self, trees: usize) -> Self {
        let (shared, own) = (self.shared.clone(), self.own.clone());
        Self { forest: self.forest.after(trees), shared, own }
    }

    /// Trees of all rounds.
    #[must_use]
    pub fn trees(&self) -> usize {
        self.forest.shape().trees
    }

    /// Logits of class 1 of rows in the domain's own columns.
    ///
    /// # Errors
    /// [`WorkError::Forest`] if rows and forest don't fit.
    pub fn logits(&self, rows: &TypedBatch) -> Result<Vec<f64>, WorkError> {
        Ok(self.forest.logits(&onto(rows, &self.own, &self.shared))?)
    }
}

impl Loaded {
    /// Loads a verified publication; `counted` is the gate whose training rows its release counted by label, if any, and `product` the
    /// name of the domain's data product, whose corpus rows come first if they are told apart.
    ///
    /// # Errors
    /// [`ArtefactError`] if an artefact is missing, damaged or doesn't fit.
    pub fn new(
        artefacts: &Artefacts,
        manifest: &Manifest,
        (product, own): (&str, &FeatureSchema),
        sizes: ContextSection,
        secret: &[u8; 32],
        counted: Option<Gate>,
    ) -> Result<Self, ArtefactError> {
        let tuned = artefacts.model(&manifest.tuned)?;
        let adapter = |digest| artefacts.adapter(&digest, &manifest.tuned, &tuned);
        Ok(Self {
            schema: manifest.schema.clone(),
            preprocessing: artefacts.preprocessing(&manifest.preprocessing)?,
            base: artefacts.model(&manifest.base)?,
            adapter: manifest.adapter.map(adapter).transpose()?,
            forest: manifest.forest.map(|digest| artefacts.forest(&digest)).transpose()?,
            tuned,
            corpus: artefacts.corpus_for(&manifest.corpus, &manifest.schema, product)?,
            own: own.clone(),
            sizes,
            key: hmac::Key::new(hmac::HMAC_SHA256, secret),
            counted,
        })
    }

    /// The same with every row coded as if none were in the release, to measure what leaving the own label out does.
    #[must_use]
    pub fn own_labels_kept(self) -> Self {
        Self { counted: None, ..self }
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

    /// Whether the publication has an adapter.
    #[must_use]
    pub fn has_adapter(&self) -> bool {
        self.adapter.is_some()
    }

    /// What the rounds gave beside the tuned model.
    #[must_use]
    pub fn offer(&self) -> Offer {
        Offer { adapter: self.adapter.is_some(), forest: self.forest.is_some() }
    }

    /// The forest of the rounds, if they learnt one.
    #[must_use]
    pub fn forest(&self) -> Option<SharedForest> {
        let (shared, own) = (self.schema.clone(), self.own.clone());
        self.forest.clone().map(|forest| SharedForest { forest, shared, own })
    }

    /// Variants of the model that this publication offers.
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
        self.build_with(candidate, rows, |own| self.corpus_like(own))
    }

    /// As [`Self::build`], with corpus rows that are drawn toward the domain's own distribution.
    ///
    /// # Errors
    /// As [`Self::build`].
    pub fn build_by_posterior(&self, candidate: Candidate, rows: &TypedBatch) -> Result<Variant, WorkError> {
        self.build_with(candidate, rows, |own| like_own(&self.corpus, own, self.sizes.corpus_rows))
    }

    /// Builds a candidate with the corpus rows that `like` takes for own rows in the shared columns.
    fn build_with(
        &self,
        candidate: Candidate,
        rows: &TypedBatch,
        like: impl Fn(&TypedBatch) -> Vec<usize>,
    ) -> Result<Variant, WorkError> {
        let labelled: Vec<usize> = (0..rows.rows()).filter(|&row| rows.labels[row].is_some()).collect();
        let rows = onto(&rows.take(&labelled), &self.own, &self.schema);
        let chosen = self.first_by_hash(&rows.units, self.sizes.local_rows);
        let own = rows.take(&chosen);
        let one_class = own.labels.iter().all(|label| Some(label) == own.labels.first());
        let mut parts: Vec<EncodedTable> = Vec::new();
        if own.rows() > 0 && !(one_class && candidate.rows == Rows::Local) {
            parts = own_parts(&self.preprocessing, self.counted.as_ref(), &own)?;
        }
        if candidate.rows == Rows::Mixed || parts.is_empty() {
            parts.push(self.preprocessing.encode(&self.corpus.take(&like(&own)), Coding::Foreign)?);
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
        })
    }

    /// Builds the base on these rows of the domain (columns of its own schema) and codes them by what they show themselves: as
    /// much of the domain as trees on own rows hold, and nothing of the release.
    ///
    /// With rows of one class it is the base on corpus rows alone, as from [`Self::build`].
    ///
    /// # Errors
    /// [`WorkError::Model`] if the model refuses.
    pub fn own_base(&self, rows: &TypedBatch) -> Result<Variant, WorkError> {
        let labelled: Vec<usize> = (0..rows.rows()).filter(|&row| rows.labels[row].is_some()).collect();
        let own = rows.take(&labelled);
        if own.labels.iter().all(|label| Some(label) == own.labels.first()) {
            let alone = Candidate { weights: Weights::Base, rows: Rows::Local, tokens: Tokens::Off };
            return self.build(alone, rows);
        }
        let preprocessing = Preprocessing::fit(&self.own, &own)?;
        let most = self.sizes.local_rows.saturating_add(self.sizes.corpus_rows);
        let shown = preprocessing.encode(&own.take(&self.first_by_hash(&own.units, most)), Coding::OwnRow)?;
        let plan = self.sizes.plan(self.own.target().classes.len());
        Ok(Variant {
            context: Context::build_as(&self.base, &shown, plan)?,
            adapter: None,
            preprocessing,
            shared: self.own.clone(),
            own: self.own.clone(),
        })
    }

    /// Fits trees on these rows of the domain (columns of its own schema), with corpus rows beside them or without;
    /// with `settings`, or with ones that cross-validation chooses. Equal rows give equal trees.
    ///
    /// # Errors
    /// [`WorkError::Trees`] if the target has not two classes.
    pub fn trees(
        &self,
        with_corpus: bool,
        rows: &TypedBatch,
        settings: Option<Settings>,
    ) -> Result<Trees, WorkError> {
        let corpus = with_corpus.then(|| self.in_own_columns(&self.corpus));
        let tag = hmac::sign(&self.key, b"trees");
        let mut seed = [0; 8];
        seed.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
        let (corpus, seed) = (corpus.as_ref(), u64::from_le_bytes(seed));
        Ok(match settings {
            Some(settings) => Trees::refit(settings, rows, corpus, &self.own, seed)?,
            None => Trees::fit(rows, corpus, &self.own, seed)?,
        })
    }

    /// Builds every member of a blend on these rows of the domain; trees without recorded settings get theirs here.
    ///
    /// # Errors
    /// As [`Self::build`], [`Self::own_base`] and [`Self::trees`].
    pub fn serve(
        &self,
        mut blend: Blend,
        calibration: Calibration,
        rows: &TypedBatch,
    ) -> Result<Served, WorkError> {
        let mut parts = Vec::with_capacity(blend.shares.len());
        for share in &mut blend.shares {
            parts.push(match share.member {
                Member::Model(candidate) => Part::Variant(Box::new(self.build(candidate, rows)?)),
                Member::OwnBase => Part::Variant(Box::new(self.own_base(rows)?)),
                Member::Forest => Part::Forest(Box::new(self.forest().ok_or(WorkError::NoForest)?)),
                Member::Trees | Member::TreesAndCorpus => {
                    let trees = self.trees(share.member == Member::TreesAndCorpus, rows, share.settings)?;
                    share.settings = Some(trees.settings());
                    Part::Trees(trees)
                }
            });
        }
        Ok(Served { blend, parts, calibration })
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

impl Served {
    /// What is served, with the settings of its trees.
    #[must_use]
    pub fn blend(&self) -> &Blend {
        &self.blend
    }

    /// Class probabilities of rows in the domain's own columns, `rows × classes`.
    ///
    /// # Errors
    /// [`WorkError`] if rows and models don't fit.
    pub fn predict(&self, rows: &TypedBatch) -> Result<Vec<Vec<f32>>, WorkError> {
        let probability = |logit: f64| self.calibration.probability(logit);
        Ok(self
            .logits(rows)?
            .into_iter()
            .map(|logit| vec![(1.0 - probability(logit)) as f32, probability(logit) as f32])
            .collect())
    }

    /// Weighted logits of class 1 before calibration.
    ///
    /// # Errors
    /// As [`Self::predict`].
    pub fn logits(&self, rows: &TypedBatch) -> Result<Vec<f64>, WorkError> {
        let mut sum = vec![0.0; rows.rows()];
        for (part, Share { weight, .. }) in self.parts.iter().zip(&self.blend.shares) {
            let logits = match part {
                Part::Trees(trees) => trees.logits(rows)?,
                Part::Forest(forest) => forest.logits(rows)?,
                Part::Variant(variant) => variant.logits(rows)?,
            };
            sum.iter_mut().zip(logits).for_each(|(to, logit)| *to += weight * logit);
        }
        Ok(sum)
    }
}

impl Variant {
    /// Logits of class 1 of rows in the domain's own columns.
    ///
    /// # Errors
    /// [`WorkError::Model`] if rows and model don't fit.
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

/// The domain's own rows for a context: those that the release counted, on the training side of the gate, are coded without
/// their own label, others as they are.
fn own_parts(
    preprocessing: &Preprocessing,
    counted: Option<&Gate>,
    own: &TypedBatch,
) -> Result<Vec<EncodedTable>, TfmError> {
    let Some(gate) = counted else { return Ok(vec![preprocessing.encode(own, Coding::Foreign)?]) };
    let split = gate.split(own);
    let sides = [(split.training, Coding::OwnRow), (split.gate, Coding::Foreign)];
    let filled = sides.into_iter().filter(|(rows, _)| !rows.is_empty());
    filled.map(|(rows, coding)| preprocessing.encode(&own.take(&rows), coding)).collect()
}

#[cfg(test)]
mod tests {
    use tabmesh_contract::batch::TypedColumn;
    use tabmesh_contract::contract::Contract;

    use super::*;

    #[test]
    fn every_way_to_serve_is_a_candidate_once() {
        let all = Candidate::all(true);
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!((all.len(), distinct.len()), (8, 8));
        assert_eq!(Candidate::all(false).len(), 4);
    }

    /// A level's code has the labels of the training rows in it and none of the gate's. Levels of eight rows are rare enough for
    /// it to matter.
    #[test]
    fn rows_that_the_release_counted_are_coded_without_their_label_and_no_others() {
        let text = "name: shop.sales
version: '1.0.0'
owner: shop@example.com
schema:
  - {name: label, type: integer, role: target, feature: sale.fraud, categories: ['0', '1']}
  - {name: category, type: categorical, categories: [grocery, travel, casino, fuel, books], feature: sale.category}
privacy: {sensitivity: low, allow_training: true, unit: row, max_units: 100}
source: {type: csv, path: sales.csv}
";
        let schema = Contract::parse("contract.yaml", text).unwrap().0.approved_schema().unwrap();
        let unit = |row: u8| [row; 16];
        let rows = TypedBatch {
            columns: vec![TypedColumn::Categorical((0..40).map(|row| row % 5).collect())],
            labels: (0..40).map(|row| Some(u16::from(row % 3 == 0))).collect(),
            units: (0..40).map(unit).collect(),
        };
        let preprocessing = Preprocessing::fit(&schema, &rows).unwrap();
        let as_all = |coding| preprocessing.encode(&rows, coding).unwrap();
        let (left_out, kept) = (as_all(Coding::OwnRow), as_all(Coding::Foreign));
        assert_ne!(left_out, kept);
        assert_eq!(own_parts(&preprocessing, None, &rows).unwrap(), std::slice::from_ref(&kept));

        let gate = Gate::new(b"secret");
        let split = gate.split(&rows);
        assert!(split.gate.len() > 2 && split.training.len() > 20);
        let parts = own_parts(&preprocessing, Some(&gate), &rows).unwrap();
        assert_eq!(parts, [left_out.take(&split.training), kept.take(&split.gate)]);
        let alone = own_parts(&preprocessing, Some(&gate), &rows.take(&split.gate)).unwrap();
        assert_eq!(alone, [kept.take(&split.gate)], "no empty part");
    }
}
