//! The in-context tabular model: column stage, row stage, in-context stage, decoder.
//!
//! Layout and parameter names follow TabICL (arXiv 2502.05564 and its successor): the classifiers of both versions
//! and the second version's regressor, told apart by [`variant::Variant`], so public weights load unchanged. Feature
//! tokens (a projection of hashed feature texts, zero at the start) are ours; they
//! are added to a column's cells between the column and the row stage.

pub(crate) mod attention;
pub(crate) mod column;
pub mod config;
pub(crate) mod decoder;
pub mod forward;
pub(crate) mod icl;
pub mod many;
pub(crate) mod params;
pub(crate) mod row;
pub mod variant;

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha20Rng;

use self::{
    column::ColumnStage,
    config::ModelConfig,
    decoder::Decoder,
    icl::IclStage,
    params::{Given, Init, Random, Source},
    row::RowStage,
    variant::Grouping,
};
use crate::{error::TfmError, infer::Engine, ops::linear::linear};

/// Tables of equal shape, context rows first.
#[derive(Debug, Clone, PartialEq)]
pub struct Tables {
    /// Number of tables, `B`.
    pub tables: usize,
    /// Rows of each table, `T`.
    pub rows: usize,
    /// Columns of each table, `H`.
    pub columns: usize,
    /// Context rows at the start of each table, `n < T`.
    pub context: usize,
    /// Values `(B, T, H)`, standardised, finite.
    pub values: Vec<f32>,
    /// Class of each row `(B, T)`; those of query rows are only read by the loss.
    pub labels: Vec<u8>,
    /// Hashed feature texts `(B, H, feature_text_dim)`, if known.
    pub texts: Option<Vec<f32>>,
}

impl Tables {
    /// Checks lengths, finiteness and class indices against a configuration.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] naming what doesn't fit.
    pub fn check(&self, config: &ModelConfig) -> Result<(), TfmError> {
        let Self { tables, rows, columns, context, .. } = *self;
        if config.regression() {
            return Err(TfmError::mismatch("model of classes", "a classifier", "a regression model"));
        }
        if tables == 0 || columns == 0 || context == 0 || context >= rows {
            let got = format!("{tables} tables, {columns} columns, {context} of {rows} rows as context");
            return Err(TfmError::mismatch("table sizes", "at least 1 of each and one query row", got));
        }
        if self.values.len() != tables * rows * columns {
            return Err(TfmError::mismatch("number of values", tables * rows * columns, self.values.len()));
        }
        if self.labels.len() != tables * rows {
            return Err(TfmError::mismatch("number of labels", tables * rows, self.labels.len()));
        }
        if let Some(texts) = &self.texts {
            let expected = tables * columns * config.feature_text_dim;
            if texts.len() != expected || expected == 0 {
                return Err(TfmError::mismatch("length of feature texts", expected, texts.len()));
            }
        }
        if self.values.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::mismatch("table values", "finite numbers", "a value that is not"));
        }
        match self.labels.iter().find(|&&l| usize::from(l) >= config.max_classes) {
            Some(label) => Err(TfmError::mismatch("class index", format!("< {}", config.max_classes), label)),
            None => Ok(()),
        }
    }
}

/// A model with its weights; cheap to clone, the weights are shared.
#[derive(Clone)]
pub struct Model {
    config: ModelConfig,
    pub(crate) parts: Arc<Parts>,
    tensors: BTreeMap<String, Tensor>,
    /// The weights once more, in the order that serving reads them; made when first needed.
    engine: Arc<OnceLock<Arc<Engine>>>,
}

/// The stages of a model.
pub(crate) struct Parts {
    pub(crate) column: ColumnStage,
    pub(crate) row: RowStage,
    pub(crate) icl: IclStage,
    pub(crate) decoder: Decoder,
    /// Projection `(E, feature_text_dim)` of feature texts.
    text: Option<Tensor>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", &self.config).field("parameters", &self.parameters()).finish()
    }
}

impl Model {
    /// A model with random weights.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] if the configuration is out of range.
    pub fn random(config: &ModelConfig, rng: &mut ChaCha20Rng) -> Result<Self, TfmError> {
        config.check()?;
        let mut source = Random { rng, drawn: BTreeMap::new() };
        let parts = Parts::new(&mut source, config)?;
        Ok(Self::of(config, parts, source.drawn))
    }

    /// A model over given tensors (plain or training variables).
    ///
    /// # Errors
    /// [`TfmError::MissingTensor`], [`TfmError::WrongShape`] or [`TfmError::ExtraTensor`] where the tensors aren't
    /// exactly those of the configuration.
    pub(crate) fn from_tensors(
        config: &ModelConfig,
        tensors: BTreeMap<String, Tensor>,
    ) -> Result<Self, TfmError> {
        config.check()?;
        let mut source = Given { tensors: &tensors, used: 0 };
        let parts = Parts::new(&mut source, config)?;
        if source.used != tensors.len() {
            // The tree's own draw lists the names that belong to this configuration.
            let mut rng = rand::SeedableRng::seed_from_u64(0);
            let known = Self::random(config, &mut rng)?.tensors;
            if let Some(name) = tensors.keys().find(|name| !known.contains_key(*name)) {
                return Err(TfmError::ExtraTensor { name: name.clone() });
            }
        }
        Ok(Self::of(config, parts, tensors))
    }

    fn of(config: &ModelConfig, parts: Parts, tensors: BTreeMap<String, Tensor>) -> Self {
        Self { config: config.clone(), parts: Arc::new(parts), tensors, engine: Arc::default() }
    }

    /// The weights for serving. Training variables change, so theirs are copied anew each time.
    pub(crate) fn engine(&self) -> Result<Arc<Engine>, TfmError> {
        if let Some(engine) = self.engine.get() {
            return Ok(Arc::clone(engine));
        }
        let engine = Arc::new(Engine::new(self)?);
        if self.tensors.values().any(Tensor::is_variable) {
            return Ok(engine);
        }
        Ok(Arc::clone(self.engine.get_or_init(|| engine)))
    }

    /// The same model for more classes: tables with the old classes keep their scores, what new classes add is drawn
    /// at random.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for fewer classes than the model has or a regression model, [`TfmError::BadConfig`] for
    /// too many.
    pub fn with_classes(&self, classes: usize, rng: &mut ChaCha20Rng) -> Result<Self, TfmError> {
        let own = self.config.max_classes;
        if self.config.regression() || classes < own {
            return Err(TfmError::mismatch("classes of a widened model", format!("at least {own}"), classes));
        }
        let config = ModelConfig { max_classes: classes, ..self.config.clone() };
        let mut tensors = Self::random(&config, rng)?.tensors;
        for (name, tensor) in &self.tensors {
            let drawn = tensors.get(name).ok_or_else(|| TfmError::ExtraTensor { name: name.clone() })?;
            let mut widened = tensor.clone();
            for dim in 0..tensor.dims().len() {
                let (old, new) = (tensor.dim(dim)?, drawn.dim(dim)?);
                if new > old {
                    widened = Tensor::cat(&[widened, drawn.narrow(dim, old, new - old)?], dim)?;
                }
            }
            tensors.insert(name.clone(), widened.contiguous()?);
        }
        Self::from_tensors(&config, tensors)
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Number of trainable parameters.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.tensors.iter().filter(|(name, _)| trainable(name)).map(|(_, t)| t.elem_count()).sum()
    }

    /// The weights by name.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// Class scores `(tables, queries, max_classes)`, flattened, of a plain forward pass without cache.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if the tables don't fit the model.
    pub fn forward(&self, tables: &Tables) -> Result<Vec<f32>, TfmError> {
        tables.check(&self.config)?;
        Ok(self.scores(tables)?.flatten_all()?.to_vec1()?)
    }

    /// Class scores as a tensor that gradients flow through.
    pub(crate) fn scores(&self, tables: &Tables) -> Result<Tensor, TfmError> {
        let Tables { tables: b, rows, columns, context, .. } = *tables;
        let width = self.config.embed_dim;
        let parts = &self.parts;
        let one_hot = self.one_hot(tables)?;
        let groups = parts.column.groups(&tables.values, b, rows, columns)?;
        let slots = groups.dim(0)? / b;
        let cells = parts.column.add_labels(parts.column.input(&groups)?, &one_hot)?;
        let cells = parts.column.output(parts.column.embed(cells, context)?, &groups)?;
        let mut cells = cells.reshape((b, slots, rows, width))?.transpose(1, 2)?.contiguous()?;
        if let (Some(texts), Some(_)) = (&tables.texts, &parts.text) {
            let tokens = self.text_slots(texts, b, columns)?.unsqueeze(1)?;
            cells = cells.broadcast_add(&tokens)?;
        }
        let vectors = parts.row.rows(&cells.reshape((b * rows, slots, width))?)?;
        let vectors = vectors.reshape((b, rows, self.config.row_width()))?;
        let labels = parts.icl.labels(&one_hot)?.pad_with_zeros(1, 0, rows - context)?;
        let queries = parts.icl.queries((vectors + labels)?, context)?;
        parts.decoder.scores(&queries)
    }

    /// Feature tokens by slot `(tables, slots, E)` from hashed texts `(tables, columns, feature_text_dim)`.
    pub(crate) fn text_slots(
        &self,
        texts: &[f32],
        tables: usize,
        columns: usize,
    ) -> Result<Tensor, TfmError> {
        let weight = self.parts.text.as_ref().ok_or_else(|| {
            TfmError::mismatch("feature texts", "a model with feature_text_dim > 0", "one without")
        })?;
        let shape = (tables * columns, self.config.feature_text_dim);
        let texts = Tensor::from_slice(texts, shape, &Device::Cpu)?;
        let bias = Tensor::zeros(self.config.embed_dim, candle_core::DType::F32, &Device::Cpu)?;
        let tokens = linear(&texts, weight, &bias)?.reshape((tables, columns, self.config.embed_dim))?;
        let grouping = self.config.variant.grouping();
        let shape = (tables, grouping.slots(columns), columns);
        let sums = slot_sums(grouping, columns)?.unsqueeze(0)?.broadcast_as(shape)?.contiguous()?;
        Ok(sums.matmul(&tokens)?)
    }

    /// One-hot labels `(tables, context, classes)` of the context rows.
    fn one_hot(&self, tables: &Tables) -> Result<Tensor, TfmError> {
        let context = tables.labels.chunks_exact(tables.rows).map(|row| &row[..tables.context]);
        self.one_hot_rows(context, tables.tables, tables.context)
    }

    pub(crate) fn one_hot_rows<'a>(
        &self,
        labels: impl Iterator<Item = &'a [u8]>,
        tables: usize,
        context: usize,
    ) -> Result<Tensor, TfmError> {
        let classes = self.config.max_classes;
        let mut one_hot = vec![0f32; tables * context * classes];
        let rows = one_hot.chunks_exact_mut(classes);
        for (to, &label) in rows.zip(labels.flatten()) {
            if let Some(cell) = to.get_mut(usize::from(label)) {
                *cell = 1.0;
            }
        }
        Ok(Tensor::from_vec(one_hot, (tables, context, classes), &Device::Cpu)?)
    }
}

impl Parts {
    fn new(source: &mut dyn Source, config: &ModelConfig) -> Result<Self, TfmError> {
        let text = match config.feature_text_dim {
            0 => None,
            dim => Some(source.tensor(TEXT_PROJECTION, &[config.embed_dim, dim], Init::Zero)?),
        };
        Ok(Self {
            column: ColumnStage::new(source, config)?,
            row: RowStage::new(source, config)?,
            icl: IclStage::new(source, config)?,
            decoder: Decoder::new(source, config)?,
            text,
        })
    }
}

/// The matrix `(slots, columns)` that sums column tokens into slots: how often each slot holds each column.
fn slot_sums(grouping: Grouping, columns: usize) -> Result<Tensor, TfmError> {
    let slots = grouping.slots(columns);
    let mut sums = vec![0f32; slots * columns];
    for slot in 0..slots {
        for column in grouping.members(slot, columns).flatten() {
            sums[slot * columns + column] += 1.0;
        }
    }
    Ok(Tensor::from_vec(sums, (slots, columns), &Device::Cpu)?)
}

/// Whether a tensor is trained; the rotary frequencies are constants that the file format carries.
pub(crate) fn trainable(name: &str) -> bool {
    name != row::FREQUENCIES
}

const TEXT_PROJECTION: &str = "feature_tokens.weight";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{Model, Tables, config::ModelConfig};
    use crate::{error::TfmError, prior::generator};

    /// A widened model scores tables of the old classes as before, and refuses to be narrowed.
    #[test]
    fn widened_models_keep_their_scores() {
        let model = Model::random(&ModelConfig::tiny(), &mut generator(91, 0)).unwrap();
        let wider = model.with_classes(5, &mut generator(91, 1)).unwrap();
        let tables = Tables {
            tables: 1,
            rows: 9,
            columns: 3,
            context: 6,
            values: crate::prior::random_normals(27, &mut generator(91, 2)),
            labels: vec![0, 1, 1, 0, 1, 0, 0, 0, 0],
            texts: None,
        };
        let (old, new) = (model.forward(&tables).unwrap(), wider.forward(&tables).unwrap());
        assert_eq!((old.len(), new.len()), (3 * 2, 3 * 5));
        for (a, b) in old.chunks_exact(2).zip(new.chunks_exact(5)) {
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} {b:?}");
            assert!(b[2..].iter().any(|v| (v - b[0]).abs() > 1e-4), "new classes have their own scores");
        }
        let refused = wider.with_classes(4, &mut generator(91, 3));
        assert!(matches!(refused, Err(TfmError::Mismatch { .. })));
    }
}
