//! A context held ready: what query rows read is computed once and kept as keys and values.
//!
//! Query rows never change the context or each other, so prediction costs a pass over the query rows alone and a
//! batch gives what single rows give. Two views with the two classes swapped are averaged. Binary targets.
//!
//! Whose rows the context may hold is the caller's decision: for serving inside a domain its own rows and corpus
//! rows, for gradients and everything that leaves a domain corpus rows only.

use candle_core::Tensor;

use crate::{
    adapter::{Adapter, path::Applied},
    error::TfmError,
    features::text_vectors,
    model::{Model, query::QueryPath},
    table::EncodedTable,
};

/// A model with a fixed, labelled context.
pub struct Context {
    model: Model,
    column_keys: Vec<String>,
    rows: usize,
    /// Feature tokens of the base by slot `(1, columns, E)`.
    slots: Option<Tensor>,
    /// Summary of the context for each column block, `(views * slots, inducing, 2 E)`.
    columns: Vec<Tensor>,
    /// Keys and values of the context for each in-context block, `(views, rows, 2 D)`.
    keys_values: Vec<Tensor>,
}

/// What one labelling of the context adds to the cache: column blocks, in-context blocks.
type View = (Vec<Tensor>, Vec<Tensor>);

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
    /// Computes the cache for labelled rows.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for no rows, more than [`MAX_CONTEXT_ROWS`], a row without label or values that aren't
    /// finite.
    pub fn build(model: &Model, table: &EncodedTable) -> Result<Self, TfmError> {
        table.check()?;
        if table.rows == 0 || table.rows > MAX_CONTEXT_ROWS {
            return Err(TfmError::mismatch("context rows", format!("1 to {MAX_CONTEXT_ROWS}"), table.rows));
        }
        let config = model.config();
        if config.regression() {
            return Err(TfmError::mismatch("model of a context", "a classifier", "a regression model"));
        }
        let labels = table.known_labels()?;
        let slots = match config.feature_text_dim {
            0 => None,
            dim => Some(model.text_slots(&text_vectors(&table.column_texts, dim), 1, table.columns)?),
        };
        let mut context = Self {
            model: model.clone(),
            column_keys: table.column_keys.clone(),
            rows: table.rows,
            slots,
            columns: Vec::new(),
            keys_values: Vec::new(),
        };
        let mut views = Vec::with_capacity(VIEWS);
        for view in 0..VIEWS {
            let swapped = u8::from(is_swapped(view));
            let labels: Vec<u8> = labels.iter().map(|l| l ^ swapped).collect();
            views.push(context.view(table, &labels)?);
        }
        // Side by side, so that one pass over the weights serves all views.
        let (columns, keys_values): (Vec<_>, Vec<_>) = views.into_iter().unzip();
        (context.columns, context.keys_values) = (stacked(&columns)?, stacked(&keys_values)?);
        Ok(context)
    }

    fn view(&self, table: &EncodedTable, labels: &[u8]) -> Result<View, TfmError> {
        let parts = &self.model.parts;
        let one_hot = self.model.one_hot_rows(std::iter::once(labels), 1, table.rows)?;
        let groups = parts.column.groups(&table.values, 1, table.rows, table.columns)?;
        let cells = parts.column.add_labels(parts.column.input(&groups)?, &one_hot)?;
        let (cells, columns) = parts.column.context(cells)?;
        let cells = parts.column.output(cells, &groups)?;
        let cells = self.with_slots(cells.transpose(0, 1)?.contiguous()?)?;
        let mut vectors = Vec::new();
        for first in (0..table.rows).step_by(CHUNK_ROWS) {
            let count = CHUNK_ROWS.min(table.rows - first);
            vectors.push(parts.row.rows(&cells.narrow(0, first, count)?)?);
        }
        let vectors = Tensor::cat(&vectors, 0)?.unsqueeze(0)?;
        let rows = parts.icl.context((vectors + parts.icl.labels(&one_hot)?)?)?;
        Ok((columns, rows))
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

    /// Bytes of keys and values held ready.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let held = |tensors: &[Tensor]| tensors.iter().map(Tensor::elem_count).sum::<usize>();
        (held(&self.columns) + held(&self.keys_values)) * size_of::<f32>()
    }

    /// Keys of the columns that query rows must have, in this order.
    #[must_use]
    pub fn column_keys(&self) -> &[String] {
        &self.column_keys
    }

    /// Logits of class 1 before any offset, one per query row; labels of the queries are not read.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if columns differ from the context's or the adapter belongs to a base of other sizes.
    pub fn logits(&self, queries: &EncodedTable, adapter: Option<&Adapter>) -> Result<Vec<f64>, TfmError> {
        self.check_queries(queries)?;
        let applied = adapter.map(|adapter| adapter.applied(self)).transpose()?.unwrap_or_default();
        let mut logits = Vec::with_capacity(queries.rows);
        for values in queries.values.chunks(CHUNK_ROWS * queries.columns) {
            logits.extend(self.averaged(values, &applied)?.into_iter().map(f64::from));
        }
        Ok(logits)
    }

    /// Logits of class 1 of a few rows, averaged over all views in one pass.
    fn averaged(&self, values: &[f32], mut applied: &Applied) -> Result<Vec<f32>, TfmError> {
        let columns = self.column_keys.len();
        let parts = &self.model.parts;
        let rows = values.len() / columns;
        let groups = parts.column.groups(values, 1, rows, columns)?;
        let groups = Tensor::cat(&[&groups; VIEWS], 0)?;
        let cells = parts.column.query(parts.column.input(&groups)?, &self.columns)?;
        let cells = parts.column.output(cells, &groups)?;
        let (_, _, width) = cells.dims3()?;
        let cells = cells.reshape((VIEWS, (), rows, width))?.transpose(1, 2)?.contiguous()?;
        let cells = applied.cells(self.with_slots(cells.flatten_to(1)?)?)?;
        let vectors = parts.row.rows(&cells)?.reshape((VIEWS, rows, ()))?;
        let read = parts.icl.cached(vectors, &self.keys_values, &mut applied)?;
        let scores = parts.decoder.scores_along(&read, &mut applied)?;
        let margins = (scores.narrow(2, 1, 1)? - scores.narrow(2, 0, 1)?)?.squeeze(2)?;
        let mut sums = vec![0f32; rows];
        for (view, margins) in margins.to_vec2::<f32>()?.into_iter().enumerate() {
            let share = if is_swapped(view) { -1.0 } else { 1.0 } / VIEWS as f32;
            sums.iter_mut().zip(margins).for_each(|(sum, margin)| *sum += share * margin);
        }
        Ok(sums)
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

    /// Cells `(rows, columns, E)` of query rows before any adapter; they depend on each row and the context alone.
    pub(crate) fn cells(&self, view: usize, values: &[f32]) -> Result<Tensor, TfmError> {
        let columns = self.column_keys.len();
        let parts = &self.model.parts;
        let groups = parts.column.groups(values, 1, values.len() / columns, columns)?;
        let cells = parts.column.query(parts.column.input(&groups)?, &of_view(&self.columns, view)?)?;
        let cells = parts.column.output(cells, &groups)?;
        self.with_slots(cells.transpose(0, 1)?.contiguous()?)
    }

    /// Row vectors `(1, rows, D)` of cells `(rows, slots, E)`.
    pub(crate) fn vectors(&self, cells: &Tensor) -> Result<Tensor, TfmError> {
        Ok(self.model.parts.row.rows(cells)?.unsqueeze(0)?)
    }

    /// Query rows `(1, rows, D)` after reading the context in one view, from row vectors `(1, rows, D)`.
    pub(crate) fn read(
        &self,
        view: usize,
        vectors: Tensor,
        path: &mut dyn QueryPath,
    ) -> Result<Tensor, TfmError> {
        self.model.parts.icl.cached(vectors, &of_view(&self.keys_values, view)?, path)
    }

    /// Logits of class 1 `(rows)` of one view from rows `(1, rows, D)` that have read, class order restored.
    pub(crate) fn margins(
        &self,
        view: usize,
        read: &Tensor,
        path: &mut dyn QueryPath,
    ) -> Result<Tensor, TfmError> {
        let scores = self.model.parts.decoder.scores_along(read, path)?.squeeze(0)?;
        let (zero, one) = (scores.narrow(1, 0, 1)?.squeeze(1)?, scores.narrow(1, 1, 1)?.squeeze(1)?);
        Ok(if is_swapped(view) { (zero - one)? } else { (one - zero)? })
    }

    /// The same context, whose query rows go through other weights than it was made with.
    #[cfg(test)]
    pub(crate) fn with_query_weights(self, model: Model) -> Self {
        Self { model, ..self }
    }

    fn with_slots(&self, cells: Tensor) -> Result<Tensor, TfmError> {
        match &self.slots {
            Some(slots) => Ok(cells.broadcast_add(slots)?),
            None => Ok(cells),
        }
    }
}

/// The blocks of all views side by side, view by view.
fn stacked(views: &[Vec<Tensor>]) -> Result<Vec<Tensor>, TfmError> {
    let blocks = views.first().map_or(0, Vec::len);
    let block = |at: usize| Tensor::cat(&views.iter().map(|view| &view[at]).collect::<Vec<_>>(), 0);
    Ok((0..blocks).map(block).collect::<Result<_, _>>()?)
}

/// One view's part of the blocks, without a copy.
fn of_view(blocks: &[Tensor], view: usize) -> Result<Vec<Tensor>, TfmError> {
    let part = |block: &Tensor| {
        let size = block.dim(0)? / VIEWS;
        block.narrow(0, view * size, size)
    };
    Ok(blocks.iter().map(part).collect::<Result<_, _>>()?)
}

/// Whether a view has the two classes swapped.
const fn is_swapped(view: usize) -> bool {
    view == 1
}

/// Labellings of the context that are averaged: as given, and with the classes swapped.
const VIEWS: usize = 2;
/// Most context rows.
pub const MAX_CONTEXT_ROWS: usize = 16_384;
/// Query rows computed together, which bounds memory.
pub(crate) const CHUNK_ROWS: usize = 256;

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use candle_core::Tensor;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::{Context, MAX_CONTEXT_ROWS, Serving, prior_shift};
    use crate::{
        adapter::{Adapter, Kind},
        error::TfmError,
        features::text_vectors,
        model::{
            Model, Tables,
            config::ModelConfig,
            variant::{FeatureGroup, Variant},
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

    #[test]
    fn cached_logits_equal_the_plain_forward_of_both_views() {
        let groups = Variant { col_feature_group: FeatureGroup::Valid, ..Variant::default() };
        for variant in [Variant::default(), Variant::first(), Variant::regressor(), groups] {
            cached_equals_plain(&model_of(variant));
        }
    }

    fn cached_equals_plain(model: &Model) {
        let (context, queries) = (table(30, 5, 1), table(300, 5, 2));
        let cached = Context::build(model, &context).unwrap().logits(&queries, None).unwrap();
        let mut plain = vec![0f64; queries.rows];
        for swap in [0u8, 1] {
            let mut labels: Vec<u8> = context.labels.iter().map(|l| l.unwrap() ^ swap).collect();
            labels.resize(context.rows + queries.rows, 0);
            let scores = model
                .forward(&Tables {
                    tables: 1,
                    rows: context.rows + queries.rows,
                    columns: 5,
                    context: context.rows,
                    values: [context.values.clone(), queries.values.clone()].concat(),
                    labels,
                    texts: Some(text_vectors(&context.column_texts, 16)),
                })
                .unwrap();
            let sign = 1.0 - 2.0 * f64::from(swap);
            for (sum, s) in plain.iter_mut().zip(scores.chunks_exact(2)) {
                *sum += 0.5 * sign * f64::from(s[1] - s[0]);
            }
        }
        let worst = cached.iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-4, "{worst}");
    }

    #[test]
    fn a_batch_gives_what_single_rows_give() {
        let (context, queries) = (Context::build(&model(), &table(40, 4, 3)).unwrap(), table(270, 4, 4));
        let adapter = adapter(Kind::FeatureTokens, 4, 5);
        let serving = Serving { adapter: Some(&adapter), logit_offset: 0.3 };
        let batched = context.predict(&queries, serving).unwrap();
        for i in (0..queries.rows).step_by(17) {
            let single = context.predict(&queries.take(&[i]), serving).unwrap();
            assert!((single[0][1] - batched[i][1]).abs() < 1e-5, "row {i}");
            assert!((single[0][0] + single[0][1] - 1.0).abs() < 1e-12);
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
