//! A context held ready: what query rows read is computed once and kept.
//!
//! Query rows never change the context or each other, so prediction costs a pass over the query rows alone and a
//! batch gives, to the last bit, what single rows give. Two views with the classes turned are averaged. How a context
//! is held decides its bytes ([`Cache`]), which are known and checked before any work.
//!
//! Whose rows the context may hold is the caller's decision: for serving inside a domain its own rows and corpus
//! rows, for gradients and everything that leaves a domain corpus rows only.

use std::sync::Arc;

use candle_core::Tensor;

use crate::{
    adapter::{Adapter, path::Applied},
    error::TfmError,
    features::text_vectors,
    infer::{
        Cached, Engine,
        back::{Passes, Readable},
        build::Labelled,
    },
    model::{Model, config::ModelConfig},
    table::EncodedTable,
};

pub use crate::infer::{
    heads::Precision,
    size::{Budget, Cache, CacheKind, Footprint},
};

/// A model with a fixed, labelled context.
pub struct Context {
    model: Model,
    engine: Arc<Engine>,
    column_keys: Vec<String>,
    rows: usize,
    classes: usize,
    cache: Cache,
    /// Feature tokens of the base by slot `(1, slots, E)`.
    slots: Option<Tensor>,
    cached: Cached,
}

/// What a context is for and what it may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Classes told apart, 2 to the model's most.
    pub classes: usize,
    /// What is held; whatever fits first if not given.
    pub kind: Option<CacheKind>,
    /// In which numbers; whatever fits first if not given.
    pub precision: Option<Precision>,
    /// Bytes it may take.
    pub budget: Budget,
}

impl Default for Plan {
    /// Two classes, keys and values in single precision, no limit.
    fn default() -> Self {
        let Cache { kind, precision } = Cache::DEFAULT;
        Self { classes: 2, kind: Some(kind), precision: Some(precision), budget: Budget::UNLIMITED }
    }
}

/// How predictions are made from a context.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serving<'a> {
    /// Adapter for the query rows.
    pub adapter: Option<&'a Adapter>,
    /// Added to the logit of class 1, e.g. [`prior_shift`].
    pub logit_offset: f64,
}

/// Logit correction from the class-1 share of a context to that of the served rows; shares are clamped to
/// `[0.001, 0.999]`.
#[must_use]
pub fn prior_shift(context_share: f64, served_share: f64) -> f64 {
    let logit = |p: f64| {
        let p = p.clamp(0.001, 0.999);
        (p / (1.0 - p)).ln()
    };
    logit(served_share) - logit(context_share)
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("rows", &self.rows).field("columns", &self.column_keys).finish()
    }
}

impl Context {
    /// Computes the cache for rows of two classes, keys and values in single precision.
    ///
    /// # Errors
    /// As [`Self::build_as`].
    pub fn build(model: &Model, table: &EncodedTable) -> Result<Self, TfmError> {
        Self::build_as(model, table, Plan::default())
    }

    /// Computes the cache for labelled rows.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for no rows, more than [`MAX_CONTEXT_ROWS`], a row without label or of a class beyond the
    /// plan's, values that aren't finite, or classes that the model can't tell apart; [`TfmError::OverBudget`] before
    /// any work if the context would take more bytes than it may.
    pub fn build_as(model: &Model, table: &EncodedTable, plan: Plan) -> Result<Self, TfmError> {
        table.check()?;
        if table.rows == 0 || table.rows > MAX_CONTEXT_ROWS {
            return Err(TfmError::mismatch("context rows", format!("1 to {MAX_CONTEXT_ROWS}"), table.rows));
        }
        let config = model.config();
        if config.regression() {
            return Err(TfmError::mismatch("model of a context", "a classifier", "a regression model"));
        }
        if !(2..=config.max_classes).contains(&plan.classes) {
            let expected = format!("2 to the model's {}", config.max_classes);
            return Err(TfmError::mismatch("classes of a context", expected, plan.classes));
        }
        let labels = table.known_labels()?;
        if let Some(label) = labels.iter().find(|label| usize::from(**label) >= plan.classes) {
            return Err(TfmError::mismatch("class of a context row", format!("< {}", plan.classes), label));
        }
        let cache = Self::choose(config, table.rows, table.columns, plan)?;
        let slots = match config.feature_text_dim {
            0 => None,
            dim => Some(model.text_slots(&text_vectors(&table.column_texts, dim), 1, table.columns)?),
        };
        let added = plain(slots.as_ref(), config, table.columns)?;
        let engine = model.engine()?;
        let (values, columns, classes) = (table.values.as_slice(), table.columns, plan.classes);
        let labelled = Labelled { values, columns, labels: &labels, classes, added: &added };
        Ok(Self {
            model: model.clone(),
            column_keys: table.column_keys.clone(),
            rows: table.rows,
            classes,
            cache,
            slots,
            cached: engine.build(labelled, VIEWS, cache),
            engine,
        })
    }

    /// Bytes of a context of `rows` rows and `columns` model columns, built on this process's threads.
    ///
    /// Input rows and the model are not counted; the model's weights are copied once for serving, whatever the number
    /// of contexts.
    #[must_use]
    pub fn footprint(config: &ModelConfig, rows: usize, columns: usize, cache: Cache) -> Footprint {
        Footprint::of(config, rows, columns, rayon::current_num_threads(), cache, VIEWS)
    }

    /// The cache that a plan takes: the first of [`Cache::ALL`] that it allows and that is within its budget.
    ///
    /// # Errors
    /// [`TfmError::OverBudget`] with the bytes of the last one tried, which is the smallest.
    pub fn choose(config: &ModelConfig, rows: usize, columns: usize, plan: Plan) -> Result<Cache, TfmError> {
        let allowed = |cache: &Cache| {
            plan.kind.is_none_or(|kind| kind == cache.kind)
                && plan.precision.is_none_or(|precision| precision == cache.precision)
        };
        let mut found = Err(TfmError::mismatch("ways to hold a context", "at least one", 0));
        for cache in Cache::ALL.into_iter().filter(allowed) {
            found = plan.budget.check(cache, Self::footprint(config, rows, columns, cache)).map(|()| cache);
            if found.is_ok() {
                break;
            }
        }
        found
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Number of context rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Classes told apart.
    #[must_use]
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// How the context is held.
    #[must_use]
    pub fn cache(&self) -> Cache {
        self.cache
    }

    /// Bytes held ready for predictions.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.cached.bytes()
    }

    /// Bytes of the weights copied for serving, shared by all contexts of the model.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        self.engine.bytes()
    }

    /// Keys of the columns that query rows must have, in this order.
    #[must_use]
    pub fn column_keys(&self) -> &[String] {
        &self.column_keys
    }

    /// Logits of class 1 before any offset, one per query row; labels of the queries are not read.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if columns differ from the context's, the adapter belongs to a base of other sizes or there
    /// are more than two classes.
    pub fn logits(&self, queries: &EncodedTable, adapter: Option<&Adapter>) -> Result<Vec<f64>, TfmError> {
        if self.classes != 2 {
            return Err(TfmError::mismatch("classes of a logit", 2, self.classes));
        }
        let scores = self.scores(queries, adapter)?;
        Ok(scores.as_chunks::<2>().0.iter().map(|[zero, one]| f64::from(one - zero)).collect())
    }

    /// Class scores `(rows, classes)`, averaged over the views; a softmax makes probabilities of them.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if columns differ from the context's or the adapter belongs to a base of other sizes.
    pub fn scores(&self, queries: &EncodedTable, adapter: Option<&Adapter>) -> Result<Vec<f32>, TfmError> {
        self.check_queries(queries)?;
        let applied = adapter.map(|adapter| adapter.applied(self)).transpose()?.unwrap_or_default();
        if queries.rows == 0 {
            return Ok(Vec::new());
        }
        let mut added = plain(self.slots.as_ref(), self.model.config(), queries.columns)?;
        added.iter_mut().zip(applied.addend()).for_each(|(a, d)| *a += d);
        let change = applied.change(&self.engine);
        Ok(self.engine.scores(&self.cached, &queries.values, &added, &change))
    }

    /// Probabilities `[class 0, class 1]` of each query row.
    ///
    /// # Errors
    /// As [`Self::logits`]; [`TfmError::Mismatch`] for an offset that isn't finite.
    pub fn predict(&self, queries: &EncodedTable, serving: Serving<'_>) -> Result<Vec<[f64; 2]>, TfmError> {
        if !serving.logit_offset.is_finite() {
            return Err(TfmError::mismatch("logit offset", "a finite number", serving.logit_offset));
        }
        let logits = self.logits(queries, serving.adapter)?;
        Ok(logits
            .into_iter()
            .map(|logit| {
                let one = 1.0 / (1.0 + (-(logit + serving.logit_offset)).exp());
                [1.0 - one, one]
            })
            .collect())
    }

    /// Probabilities of the classes of each query row.
    ///
    /// # Errors
    /// As [`Self::scores`].
    pub fn probabilities(
        &self,
        queries: &EncodedTable,
        adapter: Option<&Adapter>,
    ) -> Result<Vec<Vec<f64>>, TfmError> {
        let distribution = |row: &[f32]| {
            let peak = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let shares: Vec<f64> = row.iter().map(|s| f64::from(s - peak).exp()).collect();
            let total: f64 = shares.iter().sum();
            shares.into_iter().map(|share| share / total).collect()
        };
        Ok(self.scores(queries, adapter)?.chunks_exact(self.classes).map(distribution).collect())
    }

    pub(crate) fn check_queries(&self, queries: &EncodedTable) -> Result<(), TfmError> {
        queries.check()?;
        if queries.column_keys != self.column_keys {
            let shown = |keys: &[String]| keys.join(",");
            return Err(TfmError::mismatch(
                "query columns",
                shown(&self.column_keys),
                shown(&queries.column_keys),
            ));
        }
        Ok(())
    }

    /// Number of views averaged into a prediction.
    #[must_use]
    pub fn views(&self) -> usize {
        VIEWS
    }

    /// Cells `(rows, slots, E)` of query rows in one view before any adapter.
    pub(crate) fn cells(&self, view: usize, values: &[f32]) -> Result<Vec<f32>, TfmError> {
        let added = plain(self.slots.as_ref(), self.model.config(), self.column_keys.len())?;
        Ok(self.engine.query_cells(&self.cached, view, values, &added))
    }

    /// What rows that enter the query path before the in-context stage will read.
    pub(crate) fn readable(&self) -> Readable {
        self.engine.readable(&self.cached)
    }

    /// The query path with an adapter's changes.
    pub(crate) fn passes<'a>(
        &'a self,
        applied: &Applied,
        readable: &'a Readable,
    ) -> Result<Passes<'a>, TfmError> {
        if self.classes != 2 {
            return Err(TfmError::mismatch("classes of a gradient", 2, self.classes));
        }
        let (change, added) = (applied.change(&self.engine), applied.addend().to_vec());
        Ok(self.engine.passes(&self.cached, readable, change, added))
    }

    /// The same context, whose query rows go through other weights than it was made with.
    #[cfg(test)]
    pub(crate) fn with_query_weights(self, model: Model) -> Result<Self, TfmError> {
        Ok(Self { engine: model.engine()?, model, ..self })
    }
}

/// Threads that contexts are built and read with.
#[must_use]
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Slots' feature tokens as numbers `(slots, E)`, zero without any.
fn plain(slots: Option<&Tensor>, config: &ModelConfig, columns: usize) -> Result<Vec<f32>, TfmError> {
    match slots {
        Some(slots) => Ok(slots.flatten_all()?.to_vec1()?),
        None => Ok(vec![0.0; config.variant.grouping().slots(columns) * config.embed_dim]),
    }
}

/// Labellings of the context that are averaged: as given, and with the classes turned; two change places.
const VIEWS: usize = 2;
/// Most context rows.
pub const MAX_CONTEXT_ROWS: usize = 16_384;

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use candle_core::Tensor;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::{
        Budget, Cache, CacheKind, Context, MAX_CONTEXT_ROWS, Plan, Precision, Serving, VIEWS, prior_shift,
    };
    use crate::{
        adapter::{Adapter, Kind},
        error::TfmError,
        features::text_vectors,
        model::{
            Model, Tables,
            config::ModelConfig,
            variant::{FeatureGroup, Ssmax, Variant},
        },
        table::EncodedTable,
    };

    /// A random model whose text projection and softmax scaling are not zero either.
    pub(crate) fn model() -> Model {
        model_of(Variant::default())
    }

    /// As [`model`], of another variant.
    pub(crate) fn model_of(variant: Variant) -> Model {
        let mut rng = ChaCha20Rng::seed_from_u64(21);
        let model = Model::random(&ModelConfig { variant, ..ModelConfig::tiny() }, &mut rng).unwrap();
        let tensors = model
            .tensors()
            .iter()
            .map(|(name, tensor)| {
                let noise: Vec<f32> =
                    (0..tensor.elem_count()).map(|_| rng.random_range(-0.3..0.3f32)).collect();
                let noise = Tensor::from_vec(noise, tensor.dims(), tensor.device()).unwrap();
                let fixed = !crate::model::trainable(name);
                (name.clone(), if fixed { tensor.clone() } else { (tensor + noise).unwrap() })
            })
            .collect();
        Model::from_tensors(model.config(), tensors).unwrap()
    }

    /// Random rows with random labels.
    pub(crate) fn table(rows: usize, columns: usize, seed: u64) -> EncodedTable {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let keys: Vec<String> = (0..columns).map(|i| format!("f.c{i}")).collect();
        EncodedTable {
            rows,
            columns,
            values: (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect(),
            labels: (0..rows).map(|_| Some(u8::from(rng.random_bool(0.4)))).collect(),
            column_texts: keys.clone(),
            column_keys: keys,
        }
    }

    /// An adapter of [`model`] with random values.
    pub(crate) fn adapter(kind: Kind, columns: usize, seed: u64) -> Adapter {
        adapter_of(&model(), kind, columns, seed)
    }

    /// As [`adapter`], of another model.
    pub(crate) fn adapter_of(model: &Model, kind: Kind, columns: usize, seed: u64) -> Adapter {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let keys: Vec<String> = (0..columns).map(|i| format!("f.c{i}")).collect();
        let initial = Adapter::initial(kind, model, &keys).unwrap();
        let values = (0..initial.dimension()).map(|_| rng.random_range(-0.5..0.5)).collect();
        initial.with_values(values).unwrap()
    }

    /// As [`model_of`], telling `max_classes` classes apart.
    fn model_with(variant: Variant, max_classes: usize) -> Model {
        let config = ModelConfig { variant, max_classes, ..ModelConfig::tiny() };
        let drawn = Model::random(&config, &mut ChaCha20Rng::seed_from_u64(22)).unwrap();
        let mut rng = ChaCha20Rng::seed_from_u64(23);
        let moved = drawn.tensors().iter().map(|(name, tensor)| {
            let noise: Vec<f32> = (0..tensor.elem_count()).map(|_| rng.random_range(-0.3..0.3f32)).collect();
            let noise = Tensor::from_vec(noise, tensor.dims(), tensor.device()).unwrap();
            let fixed = !crate::model::trainable(name);
            (name.clone(), if fixed { tensor.clone() } else { (tensor + noise).unwrap() })
        });
        Model::from_tensors(&config, moved.collect()).unwrap()
    }

    fn variants() -> Vec<Variant> {
        let col_feature_group = FeatureGroup::Valid;
        let mut all = vec![Variant::default(), Variant::first(), Variant::regressor()];
        for ssmax in [Ssmax::Heads, Ssmax::Mlp, Ssmax::MlpElementwise, Ssmax::QueryMlp] {
            all.push(Variant { col_ssmax: ssmax, icl_ssmax: ssmax, col_feature_group, ..Variant::default() });
        }
        all
    }

    /// Class scores of a plain forward pass without cache, averaged over the views.
    fn plain_scores(
        model: &Model,
        context: &EncodedTable,
        queries: &EncodedTable,
        classes: usize,
    ) -> Vec<f64> {
        let mut sums = vec![0f64; queries.rows * classes];
        for view in 0..VIEWS {
            let turned = |class: usize| (class + view * (classes / 2)) % classes;
            let mut labels: Vec<u8> =
                context.labels.iter().map(|l| turned(usize::from(l.unwrap())) as u8).collect();
            labels.resize(context.rows + queries.rows, 0);
            let scores = model
                .forward(&Tables {
                    tables: 1,
                    rows: context.rows + queries.rows,
                    columns: context.columns,
                    context: context.rows,
                    values: [context.values.clone(), queries.values.clone()].concat(),
                    labels,
                    texts: Some(text_vectors(&context.column_texts, 16)),
                })
                .unwrap();
            let rows = scores.chunks_exact(model.config().max_classes);
            for (to, scores) in sums.chunks_exact_mut(classes).zip(rows) {
                for (class, to) in to.iter_mut().enumerate() {
                    *to += f64::from(scores[turned(class)]) / VIEWS as f64;
                }
            }
        }
        sums
    }

    const KINDS: [Kind; 4] =
        [Kind::FeatureTokens, Kind::Head, Kind::Lora { rank: 1 }, Kind::Core { rank: 3 }];

    fn plan(cache: Cache, classes: usize) -> Plan {
        let Cache { kind, precision } = cache;
        Plan { classes, kind: Some(kind), precision: Some(precision), budget: Budget::UNLIMITED }
    }

    /// Every way to hold a context, of every variant, against the forward pass without any; scores are about 1 in size.
    /// Held bytes are those foretold.
    #[test]
    fn every_cache_equals_the_plain_forward_and_takes_the_bytes_foretold() {
        for (at, variant) in variants().into_iter().enumerate() {
            for classes in [2usize, 5] {
                let model = model_with(variant, 5);
                let mut context = table(130, 5, 1);
                for (row, label) in context.labels.iter_mut().enumerate() {
                    *label = Some((row % classes) as u8);
                }
                let queries = table(if at == 0 { 300 } else { 7 }, 5, 2);
                let plain = plain_scores(&model, &context, &queries, classes);
                for cache in Cache::ALL {
                    let built = Context::build_as(&model, &context, plan(cache, classes)).unwrap();
                    let scores = built.scores(&queries, None).unwrap();
                    assert_eq!(scores.len(), plain.len());
                    let gap = |(a, b): (&f32, &f64)| (f64::from(*a) - b).abs();
                    let worst = scores.iter().zip(&plain).map(gap).fold(0.0, f64::max);
                    let bound = if cache.precision == Precision::F32 { 5e-5 } else { 2e-2 };
                    assert!(worst < bound, "{variant:?} {classes} {cache}: {worst}");
                    let foretold = Context::footprint(model.config(), 130, 5, cache);
                    assert_eq!((built.bytes(), built.cache()), (foretold.held, cache), "{variant:?} {cache}");
                    assert!(foretold.building > foretold.held);
                }
            }
        }
    }

    /// What gradients read from each cache is what predictions read, for adapters of the cells, the queries and the head,
    /// on norms with and without bias.
    #[test]
    fn the_gradient_s_path_gives_the_served_logits() {
        let (rows, queries) = (table(40, 5, 3), table(9, 5, 4));
        for model in [Variant::default(), Variant::regressor()].map(model_of) {
            for kind in KINDS {
                let adapter = adapter_of(&model, kind, 5, 6);
                for cache in Cache::ALL {
                    let context = Context::build_as(&model, &rows, plan(cache, 2)).unwrap();
                    let base = context.logits(&queries, None).unwrap();
                    let served = context.logits(&queries, Some(&adapter)).unwrap();
                    let prepared = context.prepare(&queries, &adapter).unwrap();
                    let slow = context.prepared_logits(&prepared, &adapter);
                    let apart = |a: &[f64], b: &[f64]| {
                        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f64, f64::max)
                    };
                    let bound = if cache.precision == Precision::F32 { 2e-5 } else { 5e-3 };
                    let (gap, moved) = (apart(&served, &slow), apart(&served, &base));
                    assert!(gap < bound && moved > 1e-4, "{kind:?} {cache}: {gap} {moved}");
                }
            }
        }
    }

    #[test]
    fn budgets_hold_at_one_below_and_the_fastest_that_fits_is_taken() {
        let (model, rows) = (model(), table(64, 5, 1));
        let of = |cache| Context::footprint(model.config(), 64, 5, cache);
        let open = |held, building| Plan {
            kind: None,
            precision: None,
            budget: Budget { held, building },
            classes: 2,
        };
        let taken = |held| Context::choose(model.config(), 64, 5, open(held, usize::MAX));
        for pair in Cache::ALL.windows(2) {
            let (larger, smaller) = (of(pair[0]), of(pair[1]));
            assert!(larger.held > smaller.held, "{pair:?}");
            assert_eq!(taken(larger.held).unwrap(), pair[0]);
            assert_eq!(taken(larger.held - 1).unwrap(), pair[1]);
        }
        let least = Cache { kind: CacheKind::Repr, precision: Precision::F16 };
        let (needed, allowed) = (of(least).held, of(least).held - 1);
        let refused = Context::build_as(&model, &rows, open(allowed, usize::MAX)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!(
                "held context as repr f16 needs {needed} bytes, {allowed} are allowed: raise the limit, take fewer \
                 context rows, or hold it as repr or f16"
            )
        );
        let building = of(Cache::DEFAULT).building;
        let exact = Plan { budget: Budget { held: usize::MAX, building }, ..plan(Cache::DEFAULT, 2) };
        assert!(Context::build_as(&model, &rows, exact).is_ok());
        let below = Plan { budget: Budget { held: usize::MAX, building: building - 1 }, ..exact };
        assert!(matches!(
            Context::build_as(&model, &rows, below),
            Err(TfmError::OverBudget { what: "building the context", .. })
        ));
    }

    #[test]
    fn classes_beyond_the_plan_or_the_model_are_refused() {
        let five = model_with(Variant::default(), 5);
        let mut rows = table(9, 3, 1);
        rows.labels[4] = Some(3);
        let build = |classes| Context::build_as(&five, &rows, plan(Cache::DEFAULT, classes));
        assert!(matches!(build(3), Err(TfmError::Mismatch { what: "class of a context row", .. })));
        assert!(matches!(build(6), Err(TfmError::Mismatch { what: "classes of a context", .. })));
        assert!(matches!(build(1), Err(TfmError::Mismatch { what: "classes of a context", .. })));
        let context = build(4).unwrap();
        assert!(matches!(
            context.logits(&table(2, 3, 1), None),
            Err(TfmError::Mismatch { what: "classes of a logit", got, .. }) if got == "4"
        ));
        let many = context.probabilities(&table(2, 3, 1), None).unwrap();
        assert!(many.iter().all(|p| p.len() == 4 && (p.iter().sum::<f64>() - 1.0).abs() < 1e-9));
    }

    /// To the last bit, across chunks, tiles and threads.
    #[test]
    fn a_batch_gives_what_single_rows_give() {
        for (cache, kind) in Cache::ALL.into_iter().flat_map(|cache| KINDS.map(|kind| (cache, kind))) {
            let adapter = adapter(kind, 4, 5);
            let context = Context::build_as(&model(), &table(150, 4, 3), plan(cache, 2)).unwrap();
            let queries = table(270, 4, 4);
            let serving = Serving { adapter: Some(&adapter), logit_offset: 0.3 };
            let batched = context.predict(&queries, serving).unwrap();
            for i in (0..queries.rows).step_by(17) {
                let single = context.predict(&queries.take(&[i]), serving).unwrap();
                assert_eq!(single[0][1].to_bits(), batched[i][1].to_bits(), "{cache}, {kind:?}, row {i}");
                assert!((single[0][0] + single[0][1] - 1.0).abs() < 1e-12);
            }
        }
    }

    /// Keys decide, not positions: the same deltas in another order are the same adapter. A column without a delta and a
    /// delta without a column change nothing.
    #[test]
    fn feature_tokens_go_by_key() {
        let (context, queries) = (Context::build(&model(), &table(40, 4, 3)).unwrap(), table(20, 4, 4));
        let given = adapter(Kind::FeatureTokens, 4, 5);
        let moved = context.logits(&queries, Some(&given)).unwrap();
        let rows: Vec<(&String, &[f32])> = given.layout().keys.iter().zip(given.values().chunks(8)).collect();
        let of = |rows: &[(String, Vec<f32>)]| {
            let keys: Vec<String> = rows.iter().map(|(key, _)| key.clone()).collect();
            let values = rows.iter().flat_map(|(_, values)| values.clone()).collect();
            Adapter::initial(Kind::FeatureTokens, &model(), &keys).unwrap().with_values(values).unwrap()
        };
        let mut turned: Vec<(String, Vec<f32>)> =
            rows.iter().rev().map(|(key, values)| ((*key).clone(), values.to_vec())).collect();
        turned.insert(2, ("another.column".to_owned(), vec![9.0; 8]));
        assert_eq!(context.logits(&queries, Some(&of(&turned))).unwrap(), moved);
        let strangers: Vec<_> =
            turned.iter().map(|(key, values)| (format!("x.{key}"), values.clone())).collect();
        let base = context.logits(&queries, None).unwrap();
        assert_eq!(context.logits(&queries, Some(&of(&strangers))).unwrap(), base);
        assert_ne!(moved, base);
    }

    /// A column without a known text is an anonymous column: what a model that reads no texts makes of it.
    #[test]
    fn columns_without_text_are_anonymous() {
        let (model, queries) = (model(), table(20, 4, 4));
        let predicted = |model: &Model, texts: [&str; 4]| {
            let rows = EncodedTable { column_texts: texts.map(str::to_owned).into(), ..table(40, 4, 3) };
            Context::build(model, &rows).unwrap().logits(&queries, None).unwrap()
        };
        let mut tensors = model.tensors().clone();
        let projection = tensors.get_mut("feature_tokens.weight").unwrap();
        *projection = projection.zeros_like().unwrap();
        let unread = Model::from_tensors(model.config(), tensors).unwrap();
        let known = ["person.age", "person.job", "sale.amount", "sale.kind"];
        let anonymous = predicted(&model, [""; 4]);
        assert_eq!(anonymous, predicted(&unread, known));
        assert_eq!(anonymous, predicted(&model, ["--", "", " | ", ""]));
        let one_known = predicted(&model, ["", "", "sale.amount", ""]);
        assert!(one_known != anonymous && one_known != predicted(&model, known));
    }

    /// Swapping the classes of the context swaps the prediction, whatever the weights are.
    #[test]
    fn predictions_are_symmetric_in_the_classes() {
        let (model, rows, queries) = (model(), table(40, 4, 3), table(20, 4, 4));
        let swapped =
            EncodedTable { labels: rows.labels.iter().map(|l| l.map(|l| 1 - l)).collect(), ..rows.clone() };
        let a = Context::build(&model, &rows).unwrap().logits(&queries, None).unwrap();
        let b = Context::build(&model, &swapped).unwrap().logits(&queries, None).unwrap();
        assert!(a.iter().zip(&b).all(|(a, b)| (a + b).abs() < 1e-5));
    }

    #[test]
    fn unfit_rows_are_refused() {
        let model = model();
        let mut unlabelled = table(5, 3, 1);
        unlabelled.labels[2] = None;
        assert!(matches!(
            Context::build(&model, &unlabelled),
            Err(TfmError::Mismatch { what: "labelled rows", .. })
        ));
        assert!(Context::build(&model, &table(0, 3, 1)).is_err());
        assert!(Context::build(&model, &table(MAX_CONTEXT_ROWS + 1, 1, 1)).is_err());
        let context = Context::build(&model, &table(5, 3, 1)).unwrap();
        assert!(matches!(
            context.logits(&table(2, 4, 1), None),
            Err(TfmError::Mismatch { what: "query columns", .. })
        ));
        assert!(context.logits(&table(0, 3, 1), None).unwrap().is_empty());
        // One class in the context is no error: a newcomer may have seen no other yet.
        let one = EncodedTable { labels: vec![Some(1); 5], ..table(5, 3, 1) };
        assert!(Context::build(&model, &one).is_ok());
        assert!((prior_shift(0.5, 0.2) - (0.25f64).ln()).abs() < 1e-12);
    }
}
